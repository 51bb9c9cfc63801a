"""Two processes that share a model's heads: torchrun, gloo, transformers' own plan.

Default options but where the whole budget is said. What each process does and asserts is in
tensor_parallel_run.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed

pytest.importorskip("transformers.distributed.tensor_parallel")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("needs gloo", allow_module_level=True)

RUN = Path(__file__).parent.parent / "toys" / "tensor_parallel_run.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama of 2 layers and 4 KV heads, saved; its calibrated basis is stored as "whole"."""
    from loki_compile.pca_store.store import Store
    from transformers import LlamaConfig, LlamaForCausalLM

    from loki_compile import calibrate

    torch.manual_seed(4)
    config = LlamaConfig(
        hidden_size=56, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, head_dim=12, vocab_size=97, max_position_embeddings=2048,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)  # peaked attention: a key too many or too few shows
    place = tmp_path_factory.mktemp("sharded")
    model.save_pretrained(place / "model")
    torch._dynamo.reset()
    batches = [torch.randint(0, 97, (1, 300)) for _ in range(2)]
    basis = calibrate(model, batches, kind="score-optimal", name="whole")
    torch._dynamo.reset()
    Store(place / "home" / "bases").save(basis)
    return place


def torchrun(folder, engine, what, seconds):
    """The exit status and all that was printed."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "LOKI_HOME": str(folder / "home") if "basis" in what else str(folder / "empty"),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    # `--standalone` takes a free port.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["--local-addr=127.0.0.1", str(RUN), str(folder / "model"), engine, what]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        printed, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its workers
        printed, _ = process.communicate()
        pytest.fail(f"no end after {seconds} s:\n{printed[-3000:]}")
    return process.returncode, printed


def all_done(printed, what):
    return all(f"done: {one} on {rank}" in printed for one in what.split("+") for rank in (0, 1))


def test_each_process_decodes_sparsely_what_one_process_decodes(folder):
    """Both in one start: what is known of the first model must not serve the second."""
    status, printed = torchrun(folder, "interpreted", "tokens+basis", 500)
    assert status == 0, printed[-6000:]
    assert all_done(printed, "tokens+basis")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["tokens", "basis+tokens"])
def test_each_process_decodes_what_one_process_decodes_under_inductor(folder, what):
    status, printed = torchrun(folder, "inductor", what, 550)
    assert status == 0, printed[-6000:]
    assert all_done(printed, what)


def test_a_process_that_dies_ends_the_others_with_torchruns_message(folder):
    status, printed = torchrun(folder, "interpreted", "death", 400)
    assert status != 0
    assert "ChildFailedError" in printed and "Root Cause" in printed
    assert "exitcode  : -9" in printed
    assert "done: death" not in printed
