"""Dynamo's limit of graphs rises with the steps that graphs serve, and is the user's where set."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from toy_models import tiny_llama

from loki_compile import given_up, recompiles, reset_stats, stats

pytestmark = pytest.mark.usefixtures("fresh")
CONFIG = torch._dynamo.config


@pytest.fixture(autouse=True)
def default_limit():
    with CONFIG.patch(recompile_limit=recompiles.DEFAULT):
        yield recompiles.DEFAULT


def test_the_default_is_pytorchs():
    code = "import torch._dynamo; print(torch._dynamo.config.recompile_limit)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert int(printed.stdout) == recompiles.DEFAULT


def test_it_rises_by_a_graph_for_so_many_steps_and_not_without_end(default_limit):
    each = recompiles.STEPS_PER_GRAPH
    seen = []
    for steps in (0, each * default_limit, each * (default_limit + 1), 100, 99, 10**6):
        recompiles.allow_for(steps)
        seen.append(CONFIG.recompile_limit)
    assert seen == [default_limit] * 2 + [default_limit + 1, 100 // each, 100 // each, 64]


def test_it_stays_where_somebody_has_set_another(default_limit):
    recompiles.allow_for(10**6)  # what it has risen to in this process is neither
    for limit in (default_limit - 1, default_limit + 1):
        CONFIG.recompile_limit = limit
        recompiles.allow_for(10**6)
        assert CONFIG.recompile_limit == limit


def test_it_stays_where_it_was_set_after_it_had_risen():
    recompiles.allow_for(10**6)
    CONFIG.recompile_limit = 3
    recompiles.allow_for(10**6)
    assert CONFIG.recompile_limit == 3


def test_a_function_that_is_compiled_at_every_call_is_given_up_as_before(interpreted):
    torch._dynamo.utils.counters.clear()
    run = torch.compile(lambda layer, x: x * layer.number, backend="loki")
    for number in range(12):
        layer = torch.nn.Module()
        layer.number = number + 2
        run(layer, torch.ones(1))
    assert len(given_up()) == 1
    torch._dynamo.utils.counters.clear()


def test_batches_of_many_sizes_and_both_caches_stay_compiled(interpreted):
    torch._dynamo.utils.counters.clear()
    reset_stats()
    model = tiny_llama()
    model.compile(backend="loki")
    for cache in ("dynamic", "static"):
        for rows, padding in ((1, 0), (2, 0), (2, 9), (3, 0), (3, 9), (1, 0)):
            for tokens in (1103, 1150):
                ids = torch.randint(1, 64, (rows, tokens))
                mask = torch.ones_like(ids)
                mask[0, :padding] = 0
                new = 9
                model.generate(
                    ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new,
                    do_sample=False, pad_token_id=0, cache_implementation=cache,
                )  # fmt: skip
    assert given_up() == []
    assert stats()["sparse_steps"] == 24 * 8 and stats()["dense_steps"] == 0
    assert CONFIG.recompile_limit > 8
