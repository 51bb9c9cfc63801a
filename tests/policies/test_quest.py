"""Bounds of pages stay those of the keys that the cache holds, whatever is done to it."""

import pytest
import torch
from loki_compile.kernels.kept import PAGE, PageLayout
from torch import nn
from toy_attends import gqa_repeat_kv_bthd, sdpa
from toy_conversation import Conversation, basis_for, tokens
from toy_decoders import Spelling, ToyDecoder
from toy_masks import causal, left_padded, no_mask
from toy_options import BATCH, FILLED, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, SLOTS
from toy_policies import DirectPolicy, bounds_of
from toy_writes import (
    cat_bhtd,
    cat_cropped,
    cat_window_read,
    index_copy_method,
    index_copy_returned,
    llama_reference,
    ring,
    roll_window,
    row_assignment,
)

from loki_compile import reports, stats
from loki_compile.indexes import indexes_of

FEW = {
    "min_context": 0, "top_k": 0.3, "sink": 1, "recent": 1, "rank": 4, "index_dtype": "cache"
}  # fmt: skip
QUEST = {**FEW, "policy": "quest"}
pytestmark = pytest.mark.usefixtures("interpreted")


def page_indexes(tensor):
    return [index for index in indexes_of(tensor) if isinstance(index.layout, PageLayout)]


def check_bounds(cache, filled: list[int]) -> None:
    """That the bounds of a cache (B, Hkv, T, D) are those of its rows' filled slots."""
    (index,) = [index for index in page_indexes(cache) if index.valid]
    expected = bounds_of(cache, torch.tensor(filled))
    for row, count in enumerate(filled):
        pages = -(-count // PAGE)  # what lies behind holds what was there before
        held = index.tensors[0][row, :, :pages]
        torch.testing.assert_close(held, expected[row, :, :pages], rtol=0, atol=0)


def quest(module, **options):
    return torch.compile(module, backend="loki", options={**QUEST, **options})


def follows(module, fast, talk, steps: int = 1, policy: str = "quest") -> None:
    """So many steps, each of them as the definition says."""
    twin = talk.fork()
    truth = DirectPolicy(policy, module.kv_heads, FEW)
    for x in tokens(talk.spelling, steps, batch=talk.batch):
        out = talk.step(fast, x)
        with truth:
            expected = twin.step(module, x)
        torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("new", [1, 2, 3])
@pytest.mark.parametrize("growing", [True, False])
@torch.no_grad()
def test_bounds_are_those_of_the_filled_slots_at_every_step(growing, new):
    spelling = (
        Spelling(cat_bhtd, mask=causal, growing=True)
        if growing
        else Spelling(index_copy_method, mask=left_padded, slots=70)
    )
    module = ToyDecoder(spelling.but(new_tokens=new)).eval()
    talk = Conversation.start(module.spelling)
    fast = quest(module)
    for _ in range(24 // new):  # through two ends of a page
        follows(module, fast, talk)
        check_bounds(talk.keys, [talk.filled] * BATCH)
    assert stats()["rebuilds"] == 1


@torch.no_grad()
def test_a_static_cache_that_goes_back_is_as_one_that_is_built_anew():
    module = ToyDecoder(Spelling(index_copy_method)).eval()
    talk, fast = Conversation.start(module.spelling), quest(module)
    follows(module, fast, talk, 20)
    for filled in (35, 33, 32, 31, 20, 16, 15, 3, 1):
        talk.filled = filled
        follows(module, fast, talk, 3)
        check_bounds(talk.keys, [talk.filled] * BATCH)
    assert stats()["rebuilds"] == 1


@torch.no_grad()
def test_a_static_cache_serves_another_prompt_after_a_reset():
    module = ToyDecoder(Spelling(index_copy_method)).eval()
    talk, fast = Conversation.start(module.spelling), quest(module)
    follows(module, fast, talk, 20)
    talk.keys.zero_(), talk.values.zero_()
    talk.keys[:, :, :18] = 3 * torch.randn(BATCH, KV_HEADS, 18, HEAD_DIM)
    talk.values[:, :, :18] = torch.randn(BATCH, KV_HEADS, 18, HEAD_DIM)
    talk.filled = 18
    follows(module, fast, talk, 3)
    check_bounds(talk.keys, [21] * BATCH)
    assert stats()["rebuilds"] == 2


@pytest.mark.parametrize("edit", ["a key", "a row of the batch", "rows changed places", "all"])
@torch.no_grad()
def test_an_edit_in_place_is_seen(edit):
    module = ToyDecoder(Spelling(index_copy_method)).eval()
    talk, fast = Conversation.start(module.spelling), quest(module)
    follows(module, fast, talk, 3)
    if edit == "a key":
        talk.keys[:, :, 4] *= -9
    elif edit == "a row of the batch":
        talk.keys[1] = torch.randn_like(talk.keys[1])
    elif edit == "rows changed places":
        talk.keys.copy_(talk.keys.flip(0))
    else:
        talk.keys.neg_()
    follows(module, fast, talk, 2)
    check_bounds(talk.keys, [talk.filled] * BATCH)
    assert stats()["rebuilds"] == 2


@torch.no_grad()
def test_rows_that_are_filled_differently_far_have_bounds_of_their_own_tokens():
    """What lies behind a row's own last token is not its own, and may be anything."""

    def of_each_row(batch, new, slots, at):
        return (torch.arange(slots) <= (at - 9 * torch.arange(batch))[:, None])[:, None, None]

    module = ToyDecoder(Spelling(row_assignment, mask=of_each_row)).eval()
    talk, fast = Conversation.start(module.spelling, filled=30), quest(module)
    behind = torch.arange(SLOTS) >= 30 - 9 * torch.arange(BATCH)[:, None]
    talk.keys.masked_fill_(behind[:, None, :, None], 1e30)
    twin, truth = talk.fork(), DirectPolicy("quest", KV_HEADS, FEW)
    for x in tokens(module.spelling, 4):
        _, _, _, _, mask = talk.inputs(x)
        pos = talk.filled - 9 * torch.arange(BATCH)
        (out,) = fast(x, talk.keys, talk.values, pos, mask)
        with truth:
            (expected,) = module(x, twin.keys, twin.values, pos, mask)
        torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)
        talk.filled += 1
        check_bounds(talk.keys, (talk.filled - 9 * torch.arange(BATCH)).tolist())


@pytest.mark.parametrize("growing", [True, False])
@torch.no_grad()
def test_two_that_go_on_from_one_replaced_cache_have_bounds_of_their_own(growing):
    spelling = Spelling(index_copy_returned, slots=70)
    if growing:
        spelling = Spelling(cat_bhtd, mask=no_mask, growing=True)
    module = ToyDecoder(spelling).eval()
    one, fast = Conversation.start(module.spelling), quest(module)
    follows(module, fast, one, 3)
    other = Conversation(spelling, one.keys, one.values, one.filled)
    follows(module, fast, one, 20)
    for _ in range(3):
        follows(module, fast, other, 2)
        follows(module, fast, one, 2)
    check_bounds(one.keys, [one.filled] * BATCH)
    check_bounds(other.keys, [other.filled] * BATCH)


@torch.no_grad()
def test_bounds_of_a_cache_for_more_sequences_serve_those_that_decode():
    module = ToyDecoder(
        Spelling(
            llama_reference, gqa_repeat_kv_bthd, no_mask, layout="bthd", position="int",
            note="larger_batch",
        )
    ).eval()  # fmt: skip
    talk, fast = Conversation.start(module.spelling), quest(module)
    follows(module, fast, talk, 20)
    assert stats()["rebuilds"] == 1 and talk.keys.shape[0] == BATCH + 1


class TwoReaders(nn.Module):
    """Layer `0` writes a cache and reads it, or its first `window` keys; layer `1` reads it all."""

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList([ToyDecoder(Spelling(index_copy_method)), nn.Identity()])
        self.q = nn.Linear(HIDDEN, HEADS * HEAD_DIM)
        self.out = nn.Linear(HEADS * HEAD_DIM, HIDDEN)
        self.window = window
        self.kv_heads = KV_HEADS

    def forward(self, x, ck, cv, pos, mask):
        first, batch = self.layers[0], x.shape[0]
        q, k, v = (f(x).view(batch, 1, -1, HEAD_DIM) for f in (first.q, first.k, first.v))
        ck.index_copy_(2, pos, k.transpose(1, 2))
        cv.index_copy_(2, pos, v.transpose(1, 2))
        keys, values, seen = ck, cv, mask
        if self.window:
            keys, values, seen = (y[..., : self.window, :] for y in (ck, cv, mask.mT))
            seen = seen.mT
        out = sdpa(q.transpose(1, 2), keys, values, attn_mask=seen, enable_gqa=True)
        x = x + first.out(out.transpose(1, 2).flatten(2))
        q = self.q(x).view(batch, 1, -1, HEAD_DIM).transpose(1, 2)
        out = sdpa(q, ck, cv, attn_mask=mask, enable_gqa=True)
        return (x + self.out(out.transpose(1, 2).flatten(2)),)


@torch.no_grad()
def test_a_reader_of_the_first_keys_alone_leaves_no_bounds_behind(interpreted):
    module = TwoReaders(window=PAGE).eval()
    talk = Conversation.start(module.layers[0].spelling)
    fast = quest(module)
    for _ in range(6):
        (x,) = tokens(talk.spelling, 1)
        twin = talk.fork()
        out = talk.step(fast, x)
        with DirectPolicy("quest", KV_HEADS, FEW):
            expected = twin.step(module, x)
        torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)
        check_bounds(talk.keys, [talk.filled] * BATCH)
    assert [site.policy for site in reports()[-1].sites] == ["quest", "quest"]


class ByTurns(DirectPolicy):
    """The policies of a graph's sites, in order."""

    def __init__(self, names, basis, options=FEW):
        super().__init__(names[0], KV_HEADS, options, basis=basis)
        self.names, self.turn = names, 0

    def positions(self, *args):
        self.policy = self.names[self.turn % len(self.names)]
        self.turn += 1
        return super().positions(*args)


@pytest.mark.parametrize("names", [("quest", "loki"), ("loki", "quest"), ("window", "quest")])
@pytest.mark.parametrize("rank", [4, "variance:0.5"])
@torch.no_grad()
def test_two_policies_rank_one_cache_each_by_its_own(names, rank):
    """With a basis of the user's, and with one that is fitted and says how many dims it needs."""
    module = TwoReaders().eval()
    options = {**FEW, "rank": rank, "policy": dict(enumerate(names))}
    if rank == 4:
        options["basis"] = basis_for(module.layers[0])
    fast = torch.compile(module, backend="loki", options=options)
    talk = Conversation.start(module.layers[0].spelling)
    for _ in range(5):
        (x,) = tokens(talk.spelling, 1)
        twin = talk.fork()
        out = talk.step(fast, x)
        if rank == 4:
            with ByTurns(names, options["basis"]):
                expected = twin.step(module, x)
            torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)
        check_bounds(talk.keys, [talk.filled] * BATCH)
    assert [site.policy for site in reports()[-1].sites] == list(names)
    assert stats()["rebuilds"] == (1 if "window" in names else 2)
    assert stats()["sparse_steps"] == 5


@pytest.mark.parametrize(
    "spelling",
    [
        Spelling(cat_cropped, mask=no_mask, growing=True),
        Spelling(cat_window_read, mask=no_mask, growing=True),
        Spelling(roll_window, mask=no_mask),
        Spelling(ring, mask=no_mask, slots=FILLED + 2),
        Spelling(ring, mask=lambda b, s, t, at: torch.ones(b, 1, s, t, dtype=torch.bool)),
    ],
    ids=lambda s: s.name,
)
@torch.no_grad()
def test_where_keys_change_pages_quest_says_so_and_is_dense(spelling):
    module = ToyDecoder(spelling).eval()
    fast = quest(module, pack_gqa=False)
    talk = Conversation.start(spelling)
    twin = talk.fork()
    for x in tokens(spelling, 3):
        assert torch.equal(talk.step(fast, x), twin.step(module, x))
    (site,) = reports()[-1].sites
    assert site.reason.startswith("the policy 'quest' cannot serve it: ")
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="the policy 'quest' cannot serve it"):
        quest(module, strict=True)(*talk.inputs(x))
