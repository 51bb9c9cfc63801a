"""CUDA graphs hold only if every input that keeps its address is known to keep it."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.utils import counters
from torch._inductor.compile_fx import compile_fx
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import loki_compile


def tiny(device: str = "cpu", dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        vocab_size=128,
    )
    return LlamaForCausalLM(config).to(device, dtype).eval()


def decode(model, step, tokens: int, prompt: int = 40):
    ids = torch.randint(0, 128, (1, prompt + tokens), device=model.device)
    cache = StaticCache(config=model.config, max_cache_len=128)
    outputs = []
    with torch.no_grad():
        model(ids[:, :prompt], past_key_values=cache)
        for position in range(prompt, prompt + tokens):
            outputs.append(step(ids[:, position : position + 1], past_key_values=cache).logits)
    return outputs


def test_every_input_but_the_tokens_is_static_in_both_variants(use_engine):
    moving: list[list[str]] = []

    def spy(gm, example_inputs, **kwargs):
        names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
        static = kwargs["static_input_idxs"]
        moving.append([name for i, name in enumerate(names) if i not in static])
        return make_boxed_func(gm.forward)  # what Inductor would make of it decides nothing here

    use_engine(lambda gm, inputs, **_: compile_fx(gm, inputs, inner_compile=spy))
    torch._dynamo.reset()
    model = tiny()
    options = {"min_context": 42, "top_k": 0.5}
    decode(model, torch.compile(model, backend="loki", options=options), tokens=4)
    assert len(moving) == 2, "one dense and one sparse variant"
    assert all(len(names) == 1 for names in moving), moving


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA graphs")
def test_reduce_overhead_records_cuda_graphs_and_skips_none():
    torch._dynamo.reset()
    counters.clear()
    loki_compile.reset_stats()
    model = tiny("cuda", torch.bfloat16)
    options = {
        "min_context": 0,
        "top_k": 0.5,
        "inductor": torch._inductor.list_mode_options("reduce-overhead"),
    }
    step = torch.compile(model, backend="loki", options=options)
    got = [logits.clone() for logits in decode(model, step, tokens=8)]
    assert loki_compile.stats()["sparse_steps"] == 8
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert all(torch.isfinite(logits).all() for logits in got)
