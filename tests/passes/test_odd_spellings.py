"""Spellings that nobody writes on purpose: right in every case, and rewritten or dense as listed.

Each differs in one thing from a spelling that is rewritten, so it meets one of the refusals of
`passes/`. Sparse is forced with the whole budget, where outputs and caches must equal eager's.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from loki_compile.passes.attention import Reason
from tally import count
from torch import Tensor
from toy_attends import gqa_flag, gqa_repeat_kv, mqa_broadcast, plain, repeat_kv, sdpa
from toy_conversation import Conversation, tokens
from toy_decoders import Spelling, ToyDecoder
from toy_masks import causal, causal_float, causal_inf, left_padded, no_mask
from toy_options import FILLED, HEADS, KV_HEADS
from toy_writes import cat_bhtd, index_copy_method, one_head_3d

from loki_compile import reports

pytestmark = [pytest.mark.soak, pytest.mark.covers, pytest.mark.usefixtures("interpreted")]
REWRITTEN, NOTHING, LEFT = "rewritten", "no attention", "dense, or not taken for attention"
_static = Spelling(index_copy_method, mask=no_mask)
_growing = Spelling(cat_bhtd, mask=no_mask, growing=True)


# --- attention


def written_out(
    scores: Callable = lambda s: s,
    weights: Callable = lambda w: w,
    product: Callable = lambda q, k: q @ k.transpose(2, 3) * 0.3,
    out: Callable = lambda w, v: w @ v,
):
    """Attention as two products, with something done to what lies between."""

    def attend(q, keys, values, mask):
        s = product(q, repeat_kv(keys))
        if mask is not None:
            s = s + (mask if mask.dtype != torch.bool else torch.where(mask, 0.0, -torch.inf))
        return out(weights(scores(s).softmax(-1)), repeat_kv(values))

    return attend


def column(s: Tensor) -> Tensor:
    """Another sink logit for each row, (B,Hq,S,1)."""
    return s[..., :1] * 0.5


def with_column(s: Tensor) -> Tensor:
    return torch.cat((s, column(s)), -1)


def without_last(w: Tensor) -> Tensor:
    return w[..., :-1]


def folded(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[2:])


def batched(bias: float, scale: float, added: Callable[[Tensor], Tensor]):
    def product(q, k):
        q, k = folded(q), folded(k).transpose(1, 2)
        s = torch.baddbmm(added(q[:, :, :1] @ k[:, :1]), q, k, beta=bias, alpha=scale)
        return s.view(-1, HEADS, *s.shape[1:])

    return product


def grouped_rows(s: Tensor) -> Tensor:
    """Query heads as (KV heads, group), and back."""
    return (s.view(s.shape[0], KV_HEADS, -1, *s.shape[2:]) * 1.0).view(s.shape)


def twelve_heads(q, keys, values, mask):
    """KV heads as tiles, each of which serves a block of query heads."""
    q = torch.cat([q, q * 0.5], 1)
    return sdpa(q, keys.repeat(1, 2, 1, 1), values.repeat(1, 2, 1, 1), enable_gqa=True)[:, :HEADS]


def through(change: Callable[[Tensor], Tensor], heads: Callable[[Tensor], Tensor] = lambda x: x):
    """SDPA over keys and values that something was done to."""

    def attend(q, keys, values, mask):
        keys, values = heads(change(keys)), heads(change(values))
        return sdpa(q, keys, values, attn_mask=mask, enable_gqa=True)

    return attend


def tokens_repeated(x: Tensor) -> Tensor:
    """As `repeat_kv`, but each key is repeated instead of each head."""
    b, h, t, d = x.shape
    return x[:, :, :, None].expand(b, h, t, 2, d).reshape(b, h, 2 * t, d)


def heads_into_tokens(x: Tensor) -> Tensor:
    """As `repeat_kv`, but the new dimension is folded into another one."""
    b, h, t, d = x.shape
    return x[:, :, None].expand(b, h, 2, t, d).reshape(b, h, 2 * t, d)


def halves_flipped(x: Tensor) -> Tensor:
    """As `repeat_kv`, but what is expanded is a computed tensor of five dimensions."""
    b, h, t, d = x.shape
    wide = torch.stack([x, x.flip(2)], 2)
    return wide.expand(b, h, 2, t, d).reshape(b, 2 * h, t, d)


def last_keys_doubled(x: Tensor) -> Tensor:
    """As `repeat_kv`, of a slice."""
    b, h, t, d = x.shape
    return x[:, :, None, -t:].expand(b, h, 2, t, d).reshape(b, 2 * h, t, d)


def two_of_one(x: Tensor) -> Tensor:
    return x.expand(x.shape[0], 2, *x.shape[2:]).repeat_interleave(3, 1)


_uneven = torch.tensor([1, 2, 3])


def number_added(s):
    return s + 1.5


def where_as_method(s):
    return s.where(s < 100, torch.finfo(s.dtype).min)


def by_written_keys(q, k):
    keys = folded(k).clone()
    keys[:, 0] = 0.5
    return (folded(q) @ keys.transpose(1, 2)).unflatten(0, (-1, HEADS))


ATTENTION = {
    # What is done to scores.
    "a number added": (written_out(number_added), REWRITTEN),
    "a cast on the way": (written_out(lambda s: s.to(torch.float32)), REWRITTEN),
    "a number subtracted": (written_out(lambda s: s - 1.5), Reason.SOFTMAX),
    "added with a factor": (
        written_out(lambda s: torch.add(s, s[..., :1] * 0.1, alpha=2)), Reason.SOFTMAX),
    "scaled by a tensor": (written_out(lambda s: s * torch.tensor(0.5)), REWRITTEN),
    "divided by a tensor": (written_out(lambda s: s / torch.tensor(0.5)), REWRITTEN),
    "divided and rounded": (
        written_out(lambda s: torch.div(s, 0.5, rounding_mode="floor")), Reason.SOFTMAX),
    "capped twice": (
        written_out(lambda s: torch.tanh(torch.tanh(s / 3) * 3 / 2) * 2), Reason.SOFTMAX),
    "clamped, then capped": (
        written_out(lambda s: torch.tanh(s.clamp(min=-1e38) / 3) * 3), Reason.SOFTMAX),
    "where, as a method": (written_out(where_as_method), Reason.SOFTMAX),
    "filled with a tensor": (
        written_out(lambda s: torch.where(s > 100, torch.zeros(()), s)), Reason.SOFTMAX),
    "seen by groups": (written_out(grouped_rows), Reason.SOFTMAX),
    "shifted by the mean": (written_out(lambda s: s - s.mean(-1, keepdim=True)), Reason.SOFTMAX),
    "shifted by another maximum": (
        written_out(lambda s: s - s.abs().amax(-1, keepdim=True)), Reason.SOFTMAX),
    "three columns joined": (
        written_out(lambda s: torch.cat((s, column(s), column(s)), -1), lambda w: w[..., :-2]),
        NOTHING),
    "two sinks, one after the other": (
        written_out(lambda s: with_column(with_column(s)), lambda w: w[..., :-1][..., :-1]),
        LEFT),
    "a sink of each row, no mask": (written_out(with_column, without_last), Reason.SOFTMAX),
    "a sink in front": (
        written_out(lambda s: torch.cat((column(s), s), -1), lambda w: w[..., 1:]), NOTHING),
    "a sink that is scaled": (
        written_out(lambda s: with_column(s) * 0.5, without_last), Reason.SOFTMAX),
    "a sink above a floor": (
        written_out(lambda s: with_column(s).clamp(min=-1e38), without_last), Reason.SOFTMAX),
    "the last key's weight dropped": (
        written_out(weights=without_last, out=lambda w, v: w @ v[:, :, :-1]), Reason.SOFTMAX),
    "negative product": (
        written_out(product=batched(1.0, -0.3, lambda s: s)), Reason.SOFTMAX),
    "negative bias": (written_out(product=batched(-1.0, 0.3, lambda s: s)), Reason.SOFTMAX),
    "bias under a cap": (
        written_out(lambda s: torch.tanh(s), product=batched(1.0, 0.3, lambda s: s)),
        Reason.SOFTMAX),
    # What is done to weights.
    "many copies of the weights": (
        written_out(weights=lambda w: functools_repeat(torch.Tensor.contiguous, w, 9)), NOTHING),
    "weights scaled in place": (written_out(weights=lambda w: w.mul_(0.5)), NOTHING),
    # Products.
    "einsum of a list": (
        written_out(product=lambda q, k: torch.einsum("bhsd,bhtd->bhst", [q, k]) * 0.3),
        REWRITTEN),
    "queries folded from another order": (
        written_out(
            product=lambda q, k: (
                q.transpose(2, 3).contiguous().flatten(0, 1).transpose(1, 2)
                @ folded(k).transpose(1, 2)
            ).unflatten(0, (-1, HEADS))
        ),
        REWRITTEN),
    "keys folded, then scaled": (
        written_out(
            product=lambda q, k: (folded(q) @ (folded(k) * 0.3).transpose(1, 2)).unflatten(
                0, (-1, HEADS)
            )
        ),
        Reason.LAYOUT),
    "keys folded, then copied": (
        written_out(
            product=lambda q, k: (folded(q) @ folded(k).contiguous().transpose(1, 2)).unflatten(
                0, (-1, HEADS)
            )
        ),
        REWRITTEN),
    "keys folded, then cloned": (
        written_out(
            product=lambda q, k: (folded(q) @ folded(k).clone().transpose(1, 2)).unflatten(
                0, (-1, HEADS)
            )
        ),
        REWRITTEN),
    "keys folded, cloned and written": (written_out(product=by_written_keys), Reason.SOFTMAX),
    # Heads.
    "tiles of blocks": (twelve_heads, Reason.GROUPS),
    "heads moved there and back": (through(lambda x: x.movedim(1, 2).movedim(2, 1)), REWRITTEN),
    "copied whole": (through(torch.Tensor.contiguous), REWRITTEN),
    "each head another number of times": (
        through(lambda x: x.repeat_interleave(_uneven, 1, output_size=6)), Reason.OPAQUE_VIEW),
    "repeated by a list": (through(lambda x: x.repeat([1, 2, 1, 1])), REWRITTEN),
    "repeated into a new dimension": (through(lambda x: x.repeat(1, 1, 2, 1, 1)[0]), REWRITTEN),
    "cloned": (through(torch.clone), REWRITTEN),
    "split and joined": (through(lambda x: x.unflatten(1, (-1, 1)).flatten(1, 2)), REWRITTEN),
    "grouped by unflatten": (
        through(lambda x: x.unflatten(1, (-1, 1)).expand(-1, -1, 2, -1, -1).flatten(1, 2)),
        REWRITTEN),
    "head dims grouped": (
        through(lambda x: x.unflatten(3, (-1, 2)).transpose(3, 4).flatten(3, 4)),
        Reason.OPAQUE_VIEW),
    "heads and tokens repeated": (through(lambda x: x.repeat(1, 2, 2, 1)), Reason.OPAQUE_VIEW),
    "tokens repeated": (through(tokens_repeated), Reason.OPAQUE_VIEW),
    "heads folded into tokens": (through(heads_into_tokens), Reason.OPAQUE_VIEW),
    "a stack expanded": (through(halves_flipped), Reason.NO_CACHE),
    "a slice repeated": (through(last_keys_doubled), REWRITTEN),
}  # fmt: skip


def functools_repeat(function: Callable[[Tensor], Tensor], x: Tensor, times: int) -> Tensor:
    for _ in range(times):
        x = function(x)
    return x


def check(spelling: Spelling, expected: Reason | str) -> None:
    with torch.no_grad():
        module = ToyDecoder(spelling).eval()
        fast = torch.compile(
            module, backend="loki", options={"min_context": 0, "top_k": 1.0, "sink": 0, "recent": 0}
        )
        here = Conversation.start(spelling)
        there = here.fork()
        for x in tokens(spelling, 2):
            out, truth = here.step(fast, x), there.step(module, x)
            torch.testing.assert_close(out, truth, rtol=1e-5, atol=2e-5)
        assert torch.equal(here.keys, there.keys) and torch.equal(here.values, there.values)
    count("whole graphs: odd spellings")
    sites = reports()[-1].sites
    if expected in (NOTHING, LEFT):
        assert all(site.outcome == "dense" for site in sites) and (expected == LEFT or not sites)
        return
    (site,) = sites
    if expected == REWRITTEN:
        assert site.outcome == "sparse", site
    else:
        assert site.outcome == "dense", site
        assert site.reason.startswith(expected.value.partition("{")[0]), site.reason


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("base", [_static, _growing], ids=["static", "growing"])
def test_odd_attention_is_right_and_dense_unless_understood(name, base):
    attend, expected = ATTENTION[name]
    check(base.but(attend=attend), expected)


@pytest.mark.parametrize(
    "mask", [causal, causal_float, causal_inf, left_padded], ids=lambda f: f.__name__
)
@pytest.mark.parametrize(
    "name", [name for name, (_, expected) in ATTENTION.items() if expected == REWRITTEN]
)
def test_odd_attention_that_is_understood_takes_masks(name, mask):
    # The mask is scaled too here; queries can carry what multiplies the product alone.
    expected = Reason.SOFTMAX if name.endswith("by a tensor") else REWRITTEN
    check(_static.but(attend=ATTENTION[name][0], mask=mask), expected)


def test_a_number_for_all_scores_as_a_tensor_is_no_mask():
    attend = written_out(lambda s: s + torch.full((), 0.5))
    check(_static.but(attend=attend), Reason.MASK)


# --- one KV head, with or without a dimension for it


@pytest.mark.parametrize(
    "name, attend, expected",
    [
        ("unsqueezed elsewhere", lambda x: x[:, 0].unsqueeze(2).transpose(1, 2), REWRITTEN),
        ("new and sliced", lambda x: x[:, 0][:, None, 1:], REWRITTEN),
        ("two new", lambda x: x[:, 0][:, None, None][:, :, 0], REWRITTEN),
        ("two heads of one", two_of_one, REWRITTEN),
    ],
    ids=lambda x: x if isinstance(x, str) and " " in x else "",
)
def test_one_head_in_odd_places(name, attend, expected):
    spelling = Spelling(one_head_3d, kv_heads=1, layout="btd", mask=no_mask)

    def over(q, keys, values, mask):
        return mqa_broadcast(q, attend(keys), attend(values), mask)

    check(spelling.but(attend=over), expected)


# --- writes


def writes(write: Callable[[Tensor, Tensor, Tensor], None]):
    """A way to store new keys (B,S,Hkv,D) into a cache (B,Hkv,T,D) at positions (S,) or an int."""

    def toy(k, v, ck, cv, pos):
        write(ck, k, pos)
        write(cv, v, pos)
        return ck, cv, ()

    return toy


def ellipsis(c, new, pos):
    c[..., pos : pos + 1, :] = new.transpose(1, 2)


def new_dimension(c, new, pos):
    c[:, :, None, pos : pos + 1] = new.transpose(1, 2)[:, :, None]


def slice_copied(c, new, pos):
    c[:, :, pos : pos + 1].copy_(new.transpose(1, 2))


def two_views_copied(c, new, pos):
    c.transpose(1, 2)[:, pos : pos + 1].copy_(new)


def transposed_view(c, new, pos):
    c.transpose(1, 2).index_copy_(1, pos, new)


def heads_narrowed(c, new, pos):
    c.narrow(1, 0, 1).narrow(2, pos, 1).copy_(new.transpose(1, 2)[:, :1])


def one_head_selected(c, new, pos):
    """Every head in turn, by a view without the dimension of heads."""
    for head in range(c.shape[1]):
        c.select(1, head)[:, pos] = new[:, 0, head]


def along_heads(c, new, pos):
    c[:, :, pos : pos + 1].index_copy_(1, torch.tensor([2, 0, 1]), new.transpose(1, 2))


def heads_in_place(c, new, pos):
    c.index_copy_(1, torch.tensor([2, 0, 1]), c * 0.5 + new.transpose(1, 2))


def onto_itself(c, new, pos):
    c[:, :, pos : pos + 1] = c[:, :, :1]


def rows_then_head(c, new, pos):
    rows = torch.arange(c.shape[0])
    for head in range(c.shape[1]):
        c[rows, head, pos] = new[:, 0, head]


def heads_counted(c, new, pos):
    """The heads are in their order, which is told by a range."""
    rows, heads = torch.arange(c.shape[0])[:, None], torch.arange(c.shape[1])
    c[rows, heads, pos] = new[:, 0]


def heads_counted_from_one(c, new, pos):
    rows, heads = torch.arange(c.shape[0])[:, None], torch.arange(1, c.shape[1] + 1) - 1
    c[rows, heads, pos] = new[:, 0]


def heads_counted_in_steps(c, new, pos):
    rows, heads = torch.arange(c.shape[0])[:, None], torch.arange(0, 2 * c.shape[1], 2) // 2
    c[rows, heads, pos] = new[:, 0]


def heads_counted_behind_the_first(c, new, pos):
    """As many new keys as there are heads; two of them are stored, into the heads before."""
    rows, heads = torch.arange(c.shape[0])[:, None], torch.arange(1, c.shape[1])
    c[rows, heads, pos] = new[:, 0, :-1]


def rows_behind_the_first(c, new, pos):
    """A row of the batch gets another's keys: an index that does the same is right."""
    c[torch.arange(1, c.shape[0]), :, pos] = new[:-1, 0]


def flipped_whole(c, new, pos):
    c.copy_(c.flip(2))
    c[:, :, -1:] = new.transpose(1, 2)


def rolled_heads(c, new, pos):
    moved = c.roll(1, dims=1)
    moved[:, :, -1:] = new.transpose(1, 2)
    c.copy_(moved)


def rolled_and_scaled(c, new, pos):
    moved = c.roll(-1, dims=2)
    moved *= 0.5
    moved[:, :, -1:] = new.transpose(1, 2)
    c.copy_(moved)


def rolled_and_partly_scaled(c, new, pos):
    moved = c.roll(-1, dims=2)
    moved[:, :, :3].mul_(0.5)
    moved[:, :, -1:] = new.transpose(1, 2)
    c.copy_(moved)


def rolled_while_written(c, new, pos):
    moved = c.roll(-1, dims=2)
    c[:, :, 0] = 7.0
    moved[:, :, -1:] = new.transpose(1, 2)
    c.copy_(moved)


def rolled_by_dims(c, new, pos):
    moved = c.roll((-1,), dims=(2,))
    moved[:, :, -1:] = new.transpose(1, 2)
    c.copy_(moved)


def rolled_flat(c, new, pos):
    """Without dims a roll runs over all numbers in a row."""
    moved = c.roll(-c.shape[3])
    moved[:, :, -1:] = new.transpose(1, 2)
    c.copy_(moved)


def whole_by_new_keys(c, new, pos):
    c.copy_(new.transpose(1, 2).expand(c.shape))


def scattered(index: Callable[[Tensor], Tensor] = lambda at: at, **more):
    """A position for each sequence, spread over heads and head_dim."""

    def write(c, new, pos):
        new = new.transpose(1, 2)
        at = pos.expand(new.shape[0], -1)[:, None, :, None].expand(new.shape)
        c.scatter_(2, index(at), new, **more)

    return write


def scattered_by_a_copied_index(c, new, pos):
    """Nothing says that all numbers of a row go to one slot."""
    scattered(lambda at: at.contiguous())(c, new, pos)


def scattered_and_multiplied(c, new, pos):
    scattered(reduce="multiply")(c, new, pos)


def scattered_along_heads(c, new, pos):
    heads = torch.arange(new.shape[2])[None, :, None, None]
    one = new.transpose(1, 2)
    c[:, :, pos] = one
    c.narrow(2, 0, 1).scatter_(1, heads.expand(one.shape), one)


scattered_by_token = scattered()
scattered_by_token.__name__ = "scattered_by_token"


def heads_of_one(k, v, ck, cv, pos):
    """Functional: the first new head is broadcast to all."""
    rows, heads = torch.arange(k.shape[0])[:, None, None], torch.arange(k.shape[2])[None, :, None]
    at = (rows, heads, pos)
    keys, values = (c.index_put(at, new.transpose(1, 2)[:, :1]) for c, new in ((ck, k), (cv, v)))
    return keys, values, (keys, values)


def one_key_alone(k, v, ck, cv, pos):
    """Attention sees one slot of the cache, unsqueezed to a cache of one."""
    slice_copied(ck, k, pos), slice_copied(cv, v, pos)
    return ck.select(2, pos).unsqueeze(2), cv.select(2, pos).unsqueeze(2), ()


def gathered(k, v, ck, cv, pos):
    """Attention reads the cache through indices that count its slots."""
    slice_copied(ck, k, pos), slice_copied(cv, v, pos)
    slots = torch.arange(ck.shape[2])
    return ck[:, :, slots], cv[:, :, slots], ()


def stored(write: Callable[..., None] = slice_copied):
    """Ways to read the cache, behind the write of new keys or before it."""

    def reading(read: Callable[[Tensor, int], Tensor], *, early: bool = False):
        def toy(k, v, ck, cv, pos):
            before = [read(c, pos + 1) for c in (ck, cv)] if early else []
            write(ck, k, pos), write(cv, v, pos)
            keys, values = before or [read(c, pos + 1) for c in (ck, cv)]
            return keys, values, ()

        return toy

    return reading


def written_into(copy: Callable[[Tensor], Tensor]) -> Callable[[Tensor, int], Tensor]:
    """A copy of the cache whose first key is not the cache's."""

    def read(c, end):
        keys = copy(c)
        keys[:, :, 0] = 0.5
        return keys

    return read


def one_more_dim(c, end):
    return c.view(c.shape[0], 1, *c.shape[1:])[:, :, :, :end].squeeze(1)


def halves_of_tokens(c, end):
    return c[:, :, 1:].unflatten(2, (2, -1))[:, :, 0]


def through_another_name(c, new, pos):
    c.detach()[:, :, pos : pos + 1].copy_(new.transpose(1, 2))


READS = {
    "cloned": (stored()(lambda c, end: c.clone()), REWRITTEN),
    "cloned before the write": (stored()(lambda c, end: c.clone(), early=True), Reason.OPAQUE_VIEW),
    "cloned and written": (stored()(written_into(torch.clone)), Reason.OPAQUE_VIEW),
    "repeated and written": (
        stored()(written_into(lambda c: c.repeat_interleave(2, 1))), Reason.OPAQUE_VIEW),
    "sliced, then cloned": (stored()(lambda c, end: c[:, :, :end].clone()), REWRITTEN),
    "sliced, then cloned before the write": (
        stored()(lambda c, end: c[:, :, :end].clone(), early=True), Reason.OPAQUE_VIEW),
    "a dimension added, sliced, squeezed": (stored()(one_more_dim), REWRITTEN),
    "new by None, sliced, squeezed": (
        stored()(lambda c, end: c[None][:, :, :, :end].squeeze(0)), REWRITTEN),
    "squeezed wherever it can be": (
        stored()(lambda c, end: c[:, None][:, :, :, :end].squeeze()), Reason.OPAQUE_VIEW),
    "half of the tokens": (stored()(halves_of_tokens), Reason.OPAQUE_VIEW),
    "detached and sliced": (stored()(lambda c, end: c.detach()[:, :, :end]), REWRITTEN),
    "written by another name": (stored(through_another_name)(lambda c, end: c), REWRITTEN),
    "cast by name": (stored()(lambda c, end: c.bfloat16().float()), REWRITTEN),
    "cast by name before the write": (
        stored()(lambda c, end: c.float(), early=True), Reason.OPAQUE_VIEW),
    "cast by type": (stored()(lambda c, end: c.type(torch.float32)), REWRITTEN),
    "cast to whole numbers": (
        stored()(lambda c, end: (c * 4).short().float()), Reason.NO_CACHE),
}  # fmt: skip


@pytest.mark.parametrize("name", READS)
def test_odd_reads_are_right_and_dense_unless_understood(name):
    write, expected = READS[name]
    more = {"cache_dtype": torch.bfloat16} if "cast" in name else {}
    attend = plain if name == "repeated and written" else gqa_flag
    check(_static.but(write=write, attend=attend, position="int", mask=no_mask, **more), expected)


WRITES = {
    ellipsis: REWRITTEN,
    slice_copied: REWRITTEN,
    two_views_copied: REWRITTEN,
    transposed_view: REWRITTEN,
    new_dimension: REWRITTEN,
    rolled_by_dims: REWRITTEN,
    heads_counted: REWRITTEN,
    scattered_by_token: REWRITTEN,
    scattered_by_a_copied_index: Reason.WRITE,
    scattered_and_multiplied: Reason.WRITE,
    scattered_along_heads: Reason.WRITE,
    rows_behind_the_first: REWRITTEN,
    heads_counted_from_one: Reason.WRITE,
    heads_counted_in_steps: Reason.WRITE,
    heads_counted_behind_the_first: Reason.WRITE,
    heads_narrowed: Reason.WRITE,
    one_head_selected: Reason.WRITE,
    along_heads: Reason.WRITE,
    heads_in_place: Reason.WRITE,
    onto_itself: Reason.WRITE,
    rows_then_head: Reason.WRITE,
    flipped_whole: Reason.WRITE,
    rolled_heads: Reason.WRITE,
    rolled_and_scaled: Reason.WRITE,
    rolled_and_partly_scaled: Reason.WRITE,
    rolled_while_written: Reason.WRITE,
    rolled_flat: Reason.WRITE,
    whole_by_new_keys: Reason.WRITE,
}


BY_TENSOR = (
    transposed_view, rows_then_head, rows_behind_the_first, heads_counted, heads_counted_from_one,
    heads_counted_in_steps, heads_counted_behind_the_first, scattered_by_token,
    scattered_by_a_copied_index, scattered_and_multiplied, scattered_along_heads,
)  # fmt: skip


@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("attend", [gqa_flag, gqa_repeat_kv], ids=lambda f: f.__name__)
def test_odd_writes_are_right_and_dense_unless_understood(write, attend):
    position = "tensor" if write in BY_TENSOR else "int"
    check(_static.but(write=writes(write), attend=attend, position=position), WRITES[write])


@pytest.mark.parametrize(
    "write, position, expected",
    [
        (heads_of_one, "tensor", Reason.WRITE),
        (one_key_alone, "int", Reason.OPAQUE_VIEW),
        (gathered, "int", Reason.OPAQUE_VIEW),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_odd_ways_to_read_and_return_are_right_and_dense(write, position, expected):
    check(_static.but(write=write, position=position), expected)


def test_a_cache_that_begins_as_an_empty_vector_is_right():
    """`torch.cat` takes an empty vector whatever the other's dimensions are."""
    with torch.no_grad():
        module = ToyDecoder(_growing).eval()
        fast = torch.compile(module, backend="loki", options={"min_context": 0, "top_k": 1.0})
        here = Conversation.start(_growing, filled=0)
        here.keys, here.values = torch.empty(0), torch.empty(0)
        there = here.fork()
        for number, x in enumerate(tokens(_growing, 3)):
            out, truth = here.step(fast, x), there.step(module, x)
            torch.testing.assert_close(out, truth, rtol=1e-5, atol=2e-5)
            (site,) = reports()[-1].sites
            assert site.outcome == ("sparse" if number else "dense"), site


def test_slots_filled_says_what_an_odd_write_says():
    """`min_context` is met by what is filled, whatever the write looks like."""
    from loki_compile import stats

    for write in (ellipsis, slice_copied):
        before = stats()["dense_steps"]
        spelling = _static.but(write=writes(write), position="int", mask=causal)
        with torch.no_grad():
            module = ToyDecoder(spelling).eval()
            options = {"min_context": FILLED + 3, "top_k": 0.5, "sink": 1, "recent": 1}
            fast = torch.compile(module, backend="loki", options=options)
            here = Conversation.start(spelling)
            for x in tokens(spelling, 4):
                here.step(fast, x)
        assert stats()["dense_steps"] - before == 2


# --- sinks and numbers


def head_sinks(s: Tensor, heads: int = HEADS) -> Tensor:
    """Another sink logit for each head, spread to (B,Hq,S,1)."""
    logits = torch.linspace(-1.0, 1.0, heads)
    return logits.reshape(1, -1, 1, 1).expand(s.shape[0], s.shape[1], s.shape[2], 1)


def with_head_sinks(change: Callable[[Tensor], Tensor] = lambda x: x, heads: int = HEADS):
    return written_out(lambda s: torch.cat((s, change(head_sinks(s, heads))), -1), without_last)


def with_folded_column(q, keys, values, mask):
    """Batch and heads are one dimension where the sink is joined."""
    s = folded(q) @ folded(repeat_kv(keys)).transpose(1, 2) * 0.3
    weights = torch.cat((s, s[..., :1] * 0.5), -1).softmax(-1)[..., :-1]
    return (weights @ folded(repeat_kv(values))).unflatten(0, (-1, HEADS))


NUMBERS = {
    "a sink of each head": (with_head_sinks(), REWRITTEN),
    "a sink of each head, cast": (with_head_sinks(lambda x: x.to(torch.float32)), REWRITTEN),
    "a sink of each head, computed": (with_head_sinks(lambda x: x * 2.0), Reason.SOFTMAX),
    "one sink for all heads": (with_head_sinks(heads=1), Reason.SOFTMAX),
    "a sink where heads are folded": (with_folded_column, Reason.SOFTMAX),
    "nothing joined beside the sink": (
        written_out(lambda s: torch.cat((s, s[..., :0], column(s)), -1), without_last),
        Reason.SOFTMAX),
    "multiplied by a negative number": (written_out(lambda s: s * -0.5), Reason.SOFTMAX),
    "what a number is divided by": (written_out(lambda s: 0.5 / s), Reason.SOFTMAX),
    "scaled by a tensor of another dtype": (
        written_out(lambda s: s * torch.tensor(0.5, dtype=torch.float64)), Reason.SOFTMAX),
    "a number in the place of large scores": (
        written_out(lambda s: torch.where(s > 1, 0.0, s)), Reason.SOFTMAX),
    "hidden, then capped": (
        written_out(lambda s: torch.tanh(s.masked_fill(s > 1, -torch.inf)) * 2), Reason.SOFTMAX),
    "added behind sixteen factors": (
        written_out(
            lambda s: functools_repeat(lambda x: x * 1.01, s, 16) + torch.zeros(s.shape[-1])
        ),
        Reason.SOFTMAX),
    "added behind fifteen factors": (
        written_out(
            lambda s: functools_repeat(lambda x: x * 1.01, s, 14) + torch.zeros(s.shape[-1])
        ),
        REWRITTEN),
    "values in a product of three": (
        written_out(out=lambda w, v: torch.einsum("bhst,bhtd,h->bhsd", w, v, torch.ones(HEADS))),
        Reason.LAYOUT),
}  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("base", [_static, _growing], ids=["static", "growing"])
def test_odd_sinks_and_numbers_are_right_and_dense_unless_understood(name, base):
    attend, expected = NUMBERS[name]
    check(base.but(attend=attend), expected)


@pytest.mark.parametrize("mask", [causal, causal_inf, left_padded], ids=lambda f: f.__name__)
@pytest.mark.parametrize("heads", [HEADS, 1])
def test_sinks_of_heads_take_masks(mask, heads):
    """One sink for all heads becomes a number subtracted from each row: a mask says from which."""
    check(_static.but(attend=with_head_sinks(heads=heads), mask=mask), REWRITTEN)


@pytest.mark.parametrize(
    "base, expected", [(_static, REWRITTEN), (_growing, Reason.SOFTMAX)], ids=["static", "growing"]
)
def test_a_factor_that_grows_with_the_keys_is_not_read(base, expected):
    check(base.but(attend=written_out(lambda s: s * s.shape[-1])), expected)
