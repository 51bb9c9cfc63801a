"""Each policy, on every spelling: the whole budget is dense, a small one is its definition.

Inductor's place is taken by an interpreter; `test_policies_compiled.py` runs Inductor.
"""

import pytest
import torch
from toy_decoders import (
    FILLED,
    REWRITTEN,
    TILED,
    Conversation,
    ToyDecoder,
    basis_for,
    cat_cropped,
    cat_window_read,
    read_only,
    ring,
    roll_window,
    tokens,
)
from toy_policies import KEEP_NOTHING, POLICIES, DirectPolicy

from loki_compile import reports, stats

STEPS = 4
EVERYTHING = {"min_context": 0, "top_k": 1.0}
FEW = {"min_context": 0, "top_k": 0.4, "sink": 1, "recent": 2, "rank": 4}
NEW = [name for name in POLICIES if name != "loki"]
# Keys that move from page to page, or that are written over where rows still see their neighbours.
NO_PAGES = (cat_cropped, cat_window_read, roll_window, ring)
pytestmark = pytest.mark.usefixtures("interpreted")


def compiled(module, policy, **options):
    if policy == "loki" and module.spelling.write is not read_only:
        options.setdefault("basis", basis_for(module))
    return torch.compile(module, backend="loki", options={**options, "policy": policy})


def compare(module, fast, spelling, slow=None, steps=STEPS, **start) -> float:
    """Largest difference of outputs over some steps from equal caches."""
    here = Conversation.start(spelling, **start)
    there = here.fork()
    worst = 0.0
    for x in tokens(spelling, steps, batch=here.batch):
        out = here.step(fast, x)
        if slow is None:
            expected = there.step(module, x)
        else:
            with slow:
                expected = there.step(module, x)
        worst = max(worst, (out - expected).abs().max().item())
    return worst


@pytest.mark.parametrize("policy", NEW)
@pytest.mark.parametrize("spelling", REWRITTEN, ids=lambda s: s.name)
@torch.no_grad()
def test_whole(spelling, policy):
    module = ToyDecoder(spelling).eval()
    difference = compare(module, compiled(module, policy, **EVERYTHING), spelling)
    sparse = policy != "quest" or spelling.write not in NO_PAGES
    assert [site.outcome for site in reports()[-1].sites] == ["sparse" if sparse else "dense"]
    assert stats()["sparse_steps"] == (STEPS if sparse else 0) and stats()["dense_steps"] == 0
    assert difference < 2e-5
    if policy in KEEP_NOTHING:
        assert stats()["rebuilds"] == stats()["index_bytes"] == 0


@pytest.mark.parametrize("policy", NEW)
@pytest.mark.parametrize("group_choice", ["max", "probability"])
@pytest.mark.parametrize("spelling", REWRITTEN, ids=lambda s: s.name)
@torch.no_grad()
def test_few(spelling, policy, group_choice):
    module = ToyDecoder(spelling).eval()
    options = {**FEW, "group_choice": group_choice}
    truth = DirectPolicy(policy, module.kv_heads, options, tiled=spelling.attend in TILED)
    if policy == "quest" and spelling.write in NO_PAGES:
        pytest.skip()
    assert compare(module, compiled(module, policy, **options), spelling, truth) < 2e-5
    assert stats()["sparse_steps"] == STEPS
