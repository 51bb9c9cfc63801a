"""FlexAttention: the calls that are an attention core, and those that only look like one."""

import pytest
import torch
from loki_compile.passes.attention import Reason
from loki_compile.passes.sites import find_sites
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from toy_capture import interpret, normal_graph
from toy_conversation import Conversation, tokens
from toy_decoders import Spelling, ToyDecoder
from toy_masks import causal, left_padded, no_mask, nothing_seen_by_first
from toy_writes import cat_bhtd, index_copy_method

from loki_compile import reports, stats

pytestmark = [
    pytest.mark.covers,
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]


def looked_up(mask):
    """A block mask that reads each entry of a tensor, whatever that broadcasts over."""
    full = mask.expand(mask.shape[0], mask.shape[1], *mask.shape[2:])
    batch, heads, new, slots = full.shape
    rows = full.flatten()

    def visible(b, h, q, k):
        b, h = (b if batch > 1 else 0), (h if heads > 1 else 0)
        return rows[((b * heads + h) * new + q) * slots + k]

    return create_block_mask(visible, batch, heads, new, slots, device=str(mask.device))


def plain(q, keys, values, mask):
    mask = None if mask is None else looked_up(mask)
    return flex_attention(q, keys, values, block_mask=mask, enable_gqa=True)


def in_one_lookup(q, keys, values, mask):
    blocks = create_block_mask(
        lambda b, h, i, k: mask[b, 0, i, k],
        mask.shape[0], None, *mask.shape[2:], device=str(mask.device),
    )  # fmt: skip
    return flex_attention(q, keys, values, block_mask=blocks, enable_gqa=True)


def by_position(q, keys, values, mask):
    """The rule is arithmetic on positions and a number from a tensor."""
    last = mask.sum(-1, keepdim=True).flatten()[0] - 1

    def visible(b, h, i, k):
        return (k <= last + i) & ((k > last + i - 9) | (k < 2))

    blocks = create_block_mask(visible, None, None, 1, mask.shape[3], device=str(mask.device))
    return flex_attention(q, keys, values, block_mask=blocks, enable_gqa=True)


def heads_differ(q, keys, values, mask):
    def visible(b, h, i, k):
        return mask[b, 0, i, k] & ((k + h) % 3 != 0)

    shape = (mask.shape[0], q.shape[1], *mask.shape[2:])
    blocks = create_block_mask(visible, *shape, device=str(mask.device))
    return flex_attention(q, keys, values, block_mask=blocks, enable_gqa=True)


def padding_looked_up(q, keys, values, mask):
    """Of a cache that grows: no tensor in the graph is as long as it."""
    padding = 3 * torch.arange(q.shape[0], device=q.device)
    blocks = create_block_mask(
        lambda b, h, i, k: k >= padding[b],
        q.shape[0], None, q.shape[2], keys.shape[2], device=str(q.device),
    )  # fmt: skip
    return flex_attention(q, keys, values, block_mask=blocks, enable_gqa=True)


def capped(q, keys, values, mask):
    return flex_attention(
        q * 9, keys, values, lambda s, b, h, i, k: 5.0 * torch.tanh(s / 5.0),
        block_mask=looked_up(mask), scale=0.4, enable_gqa=True,
    )  # fmt: skip


def scaled(q, keys, values, mask):
    return flex_attention(
        q, keys, values, lambda s, b, h, i, k: s * 3 / 2,
        block_mask=looked_up(mask), enable_gqa=True,
    )  # fmt: skip


CORES = [
    (index_copy_method, plain, causal),
    (index_copy_method, plain, left_padded),
    (index_copy_method, plain, nothing_seen_by_first),
    (cat_bhtd, plain, no_mask),
    (cat_bhtd, padding_looked_up, no_mask),
    (index_copy_method, in_one_lookup, left_padded),
    (index_copy_method, by_position, causal),
    (index_copy_method, heads_differ, left_padded),
    (index_copy_method, capped, causal),
    (index_copy_method, scaled, causal),
]


def compile_toy(write, attend, mask, **options):
    spelling = Spelling(write, attend=attend, mask=mask)
    module = ToyDecoder(spelling).eval()
    fast = torch.compile(module, backend="loki", options={"min_context": 0, **options})
    return spelling, module, fast


def follow(spelling, module, fast, steps):
    """Steps of one conversation, compiled and not; every output must agree."""
    here = Conversation.start(spelling)
    there = here.fork()
    with torch.no_grad():
        for x in tokens(spelling, steps):
            out, expected = here.step(fast, x), there.step(module, x)
            torch.testing.assert_close(out, expected, rtol=0, atol=3e-5, equal_nan=True)


@pytest.mark.parametrize("write, attend, mask", CORES)
def test_a_flex_call_is_the_same_core(write, attend, mask, use_engine):
    compiled = interpret(use_engine)
    follow(*compile_toy(write, attend, mask, top_k=1.0), steps=3)
    assert stats()["sparse_steps"] == 3
    assert compiled.calls("loki.attend") > 0 and compiled.calls("flex_attention") == 0


def test_a_small_budget_changes_what_a_flex_call_gives(use_engine):
    interpret(use_engine)
    options = {"top_k": 1, "sink": 0, "recent": 0}
    spelling, module, fast = compile_toy(index_copy_method, plain, causal, **options)
    here = Conversation.start(spelling)
    there = here.fork()
    with torch.no_grad():
        x = tokens(spelling, 1)[0]
        assert not torch.allclose(here.step(fast, x), there.step(module, x), atol=1e-3)


def test_the_cap_and_the_scale_are_read():
    def step(q, keys, values):
        cap = lambda s, b, h, i, k: torch.tanh(s * 0.1) * 20.0  # noqa: E731
        return flex_attention(q, keys, values, cap, scale=0.5)

    q, keys = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 40, 16)
    sites, skipped = find_sites(normal_graph(step, q, keys, keys).graph)
    assert not skipped
    # 20 * tanh(0.1 * 0.5 * qk) = 20 * tanh(scale * qk / 20)
    assert (sites[0].core.softcap, sites[0].scale) == (20.0, pytest.approx(0.5 * 0.1 * 20.0))


# ---- what only looks like a core ----------------------------------------------------------------


def bias_by_distance(q, keys, values, mask):
    return flex_attention(
        q, keys, values, lambda s, b, h, i, k: s + 0.01 * k, block_mask=looked_up(mask),
        enable_gqa=True,
    )  # fmt: skip


def bias_looked_up(q, keys, values, mask):
    slopes = q.sum((0, 2, 3))
    return flex_attention(
        q, keys, values, lambda s, b, h, i, k: s * slopes[h], block_mask=looked_up(mask),
        enable_gqa=True,
    )  # fmt: skip


def capped_twice(q, keys, values, mask):
    return flex_attention(
        q, keys, values, lambda s, b, h, i, k: torch.tanh(torch.tanh(s)), enable_gqa=True
    )


def negated(q, keys, values, mask):
    return flex_attention(q, keys, values, lambda s, b, h, i, k: s * -1.0, enable_gqa=True)


def statistics_read(q, keys, values, mask):
    out, lse = flex_attention(
        q, keys, values, block_mask=looked_up(mask), enable_gqa=True, return_lse=True
    )
    return out + lse[..., None]


def rows_looked_up_in_turn(q, keys, values, mask):
    """`x[b]` of many b at once is a row of rows: the next index would take the wrong dimension."""
    blocks = create_block_mask(
        lambda b, h, i, k: mask[b][0][i][k],
        mask.shape[0], None, *mask.shape[2:], device=str(mask.device),
    )  # fmt: skip
    return flex_attention(q, keys, values, block_mask=blocks, enable_gqa=True)


def blocks_alone(q, keys, values, mask):
    """No mask_mod, and a block that the block mask leaves out."""
    one = torch.ones(1, 1, 1, dtype=torch.int32)
    first = torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    blocks = BlockMask.from_kv_blocks(one, first, BLOCK_SIZE=16, seq_lengths=(1, mask.shape[3]))
    return flex_attention(q, keys, values, block_mask=blocks, enable_gqa=True)


@pytest.mark.parametrize(
    "attend, reason",
    [
        (bias_by_distance, "score_mod is not understood: it computes `mul, add`"),
        (bias_looked_up, "score_mod is not understood"),
        (capped_twice, "score_mod is not understood: it computes `tanh`"),
        (negated, "score_mod is not understood: it computes `mul`"),
        (statistics_read, "other results"),
        (rows_looked_up_in_turn, "mask_mod is not understood"),
        (blocks_alone, "block mask without a mask_mod"),
    ],
)
def test_another_flex_call_stays_as_it_is_and_says_why(attend, reason, use_engine):
    compiled = interpret(use_engine)
    follow(*compile_toy(index_copy_method, attend, left_padded, top_k=1.0), steps=2)
    assert compiled.calls("loki.") == 0
    (dense,) = reports()[-1].sites
    assert reason in dense.reason


def test_flex_under_inductor_gives_the_eager_result():
    torch._dynamo.reset()
    spelling, module, fast = compile_toy(index_copy_method, capped, causal, top_k=1.0)
    before = stats()["sparse_steps"]
    here = Conversation.start(spelling)
    there = here.fork()
    with torch.no_grad():
        for x in tokens(spelling, 2):
            out, expected = here.step(fast, x), there.step(module, x)
            torch.testing.assert_close(out, expected, rtol=0, atol=3e-5)
    assert stats()["sparse_steps"] == before + 2


# ---- rules that cannot be asked about all keys at once, or are none ------------------------------


def ruled_by(visible):
    """Attention over the keys that `visible(batch, head, query, key, mask)` shows."""

    def attend(q, keys, values, mask):
        blocks = create_block_mask(
            lambda b, h, i, k: visible(b, h, i, k, mask),
            q.shape[0], None, q.shape[2], keys.shape[2], device=str(q.device),
        )  # fmt: skip
        return flex_attention(q, keys, values, block_mask=blocks, enable_gqa=True)

    return attend


def written_in_place(b, h, i, k, mask):
    hidden = k > 17
    return hidden.logical_not_()


def made_of_several_ones(b, h, i, k, mask):
    return k.new_ones(3, dtype=torch.bool).all() & (k <= 17)


def compared_with_a_row(b, h, i, k, mask):
    return (k == torch.arange(17)).any()


def entry_of_a_row(b, h, i, k, mask):
    return mask[b, 0, i][k]


@pytest.mark.parametrize(
    "visible",
    [
        written_in_place,
        made_of_several_ones,
        compared_with_a_row,
        entry_of_a_row,
    ],
    ids=lambda f: f.__name__,
)
def test_a_rule_of_other_steps_stays_as_it_is_and_says_why(visible, use_engine):
    compiled = interpret(use_engine)
    follow(*compile_toy(index_copy_method, ruled_by(visible), left_padded, top_k=1.0), steps=2)
    assert compiled.calls("loki.") == 0
    (dense,) = reports()[-1].sites
    assert "mask_mod is not understood" in dense.reason


def test_a_scale_of_the_number_of_keys_is_not_read():
    def step(q, keys, values):
        return flex_attention(q, keys, values, scale=keys.shape[2] ** -0.5)

    q, keys = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 40, 16)
    torch._dynamo.mark_dynamic(keys, 2)
    sites, (skip,) = find_sites(normal_graph(step, q, keys, keys).graph)
    assert not sites and skip.reason is Reason.SCALE


def test_a_call_that_nobody_reads_is_no_core():
    def step(q, keys, values):
        flex_attention(q, keys, values)
        return q + 1

    q, keys = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 40, 16)
    gm = normal_graph(step, q, keys, keys)
    assert find_sites(gm.graph) == ([], [])
