"""What watches a model's graphs sees every layer of it, whatever ran in the process before."""

import pytest
import torch
from loki_compile.kernels.budget import Budget
from transformers import LlamaConfig, LlamaForCausalLM

import loki_compile
from loki_compile.explanation import explain
from loki_compile.mass_curves import MassCurves, read_curves
from loki_compile.simulation import Simulation
from loki_compile.watching import watched

LAYERS = 3


def llama(heads: int, layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def ids(tokens: int) -> torch.Tensor:
    return torch.arange(tokens)[None] % 64


def calibrated(model):
    bases = loki_compile.calibrate(model, [ids(40), ids(50)], kind="pca")
    return len(bases.bases)


def read(model):
    seen = MassCurves(False, "pca", 5, sink=2, recent=3)
    read_curves(model, seen, [(ids(40)[0], torch.tensor([30, 39]))], lambda: None)
    return len(seen.of_layers)


def simulated(model):
    simulation = Simulation(Budget(None, 1 << 13, 2, 3, 1), 5, {})
    with watched(model, simulation.look) as run:
        run(input_ids=ids(40))
    return len(simulation.served)


def explained(model):
    cache = model(input_ids=ids(40)).past_key_values
    reports = explain(model, ids(1), past_key_values=cache)
    return sum(site.outcome == "sparse" for report in reports for site in report.sites)


@pytest.mark.parametrize("watch", [calibrated, read, simulated, explained])
@torch.no_grad()
def test_a_layer_whose_scale_another_model_had_otherwise_is_seen(watch):
    """Dynamo shows a float of the model, that was another one before, as a symbol."""
    torch._dynamo.reset()
    assert watch(llama(8, 1)) == 1
    assert watch(llama(4, LAYERS)) == LAYERS
