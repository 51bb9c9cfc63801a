"""The numerical contract of the ops on generated inputs: every clause, every backend run here.

`kernels/reference.py` in fp64 is the truth. The compiled CPU kernels and the PyTorch ops that stand
in for them take each case; Triton's interpreter, which is slow, takes small ones in a process of
its own. Legend: B batch, Hq query heads, Hkv KV heads, S new tokens, T cached tokens, D dims of q
and k, Dv dims of v, R index dims, K slots.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from loki_compile.kernels import cpu, cpu_torch, reference
from loki_compile.kernels.budget import Budget, HeadBudgets, budgets_of_rows
from loki_compile.kernels.checks import hidden_below
from loki_compile.kernels.fused import index_rows
from loki_compile.kernels.masks import mask_bounds
from loki_compile.kernels.ops import KEEP_ALL_Q16
from loki_compile.kernels.spans import Span
from loki_compile.pca_store.covariance import KeyCovariance
from tally import cases, count
from torch import Tensor

pytestmark = pytest.mark.soak

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def implementations() -> list:
    if not INTERPRETED:
        built = [cpu._kernels(only) for only in (None, *FLOATS)]
        assert all(built), "the CPU kernels must be compiled to be tested"
        return [cpu, cpu_torch]
    from loki_compile.kernels import triton_attend, triton_pages, triton_select

    class Triton:
        select = staticmethod(triton_select.select)
        select_weighed = staticmethod(triton_select.select_weighed)
        attend = staticmethod(triton_attend.attend)
        update_pages = staticmethod(triton_pages.update_pages)
        extend_pages = staticmethod(triton_pages.extend_pages)

    return [Triton]


# The interpreter takes a second where the CPU takes a millisecond.
SHARE = 0.05 if INTERPRETED else 1.0
SIZES = [1, 2, 7, 16, 17, 33] if INTERPRETED else [1, 2, 3, 7, 15, 16, 17, 31, 33, 64, 65, 130]


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty gives NaN, or the largest integer: what an op forgets to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


# ---- cases -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Everything that the tensors of one case are made from; `seed` fills them."""

    b: int
    hkv: int
    group: int
    s: int
    t: int
    d: int
    dv: int
    r: int
    k: int | None
    min_keys: int
    keep_q16: int
    sink: int
    recent: int
    per_head: bool
    dtype: torch.dtype
    index_dtype: torch.dtype
    layout: str
    mask: str
    filler: float
    basis: str
    values: str
    scale: float
    softcap: float
    sink_logits: bool
    seed: int

    @property
    def hq(self) -> int:
        return self.hkv * self.group

    def generator(self, salt: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 64 + salt)

    # -- tensors

    def floats(self, salt: int, *shape: int) -> Tensor:
        """Values of the case's kind, fp32, not yet rounded to its dtype."""
        generator = self.generator(salt)
        x = torch.randn(shape, generator=generator)
        if self.values == "integers":
            return torch.randint(-3, 4, shape, generator=generator).float()
        if self.values == "large":  # whose products stay finite in fp32
            return x * (30.0 if self.dtype == torch.float16 else 1e12)
        if self.values == "tiny":
            return x * (1e-3 if self.dtype == torch.float16 else 1e-15)
        if self.values == "denormal":
            return x * torch.finfo(self.dtype).tiny * 0.3
        if self.values == "zero":
            return x * (torch.rand(shape, generator=generator) < 0.1)
        if self.values == "spread":  # rows of very different size
            rows = torch.rand((*shape[:-1], 1), generator=generator)
            return x * (10 ** (6 * rows - 3))
        return x

    def laid_out(self, x: Tensor, fill: float) -> Tensor:
        """(B,H,T,D) in another place of memory: as (B,T,H,D), or inside a larger buffer."""
        if self.layout == "bthd":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if self.layout == "inside":
            b, h, t, d = x.shape
            wide = torch.full((b, h + 1, t + 3, d + 5), fill, dtype=x.dtype)
            view = wide[:, 1:, 2 : t + 2, 3 : d + 3]
            view.copy_(x)
            return view
        return x.contiguous()

    def cached(self, salt: int, width: int) -> Tensor:
        x = self.floats(salt, self.b, self.hkv, self.t, width).to(self.dtype)
        return self.laid_out(x, torch.nan)

    def q(self) -> Tensor:
        x = self.floats(1, self.b, self.s, self.hq, self.d).to(self.dtype)
        return x.transpose(1, 2) if self.layout == "bthd" else x.transpose(1, 2).contiguous()

    def keys(self) -> Tensor:
        return self.cached(2, self.d)

    def contents(self) -> Tensor:
        return self.cached(3, self.dv)

    def projections(self) -> tuple[Tensor, Tensor]:
        """Of queries and of keys, each (Hkv, D, R) fp32."""
        generator = self.generator(4)
        shape = (self.hkv, self.d, self.d)
        if self.basis == "score-optimal":  # from queries and keys with spectra of their own
            falling = 0.7 ** torch.arange(self.d)
            k = torch.randn(1, self.hkv, 64, self.d, generator=generator) * falling
            q = torch.randn(1, self.hq, 64, self.d, generator=generator) * falling.flip(0)
            moments = KeyCovariance(self.hkv, self.d)
            moments.update(k, q)
            return moments.score_optimal().truncate(self.r)
        full = torch.randn(shape, generator=generator)
        if self.basis == "orthogonal":
            full = torch.linalg.qr(full.double()).Q.float()
        elif self.basis == "axes":
            full = torch.eye(self.d).expand(shape)
        elif self.basis == "deficient":
            full[..., self.d // 2 :] = full[..., :1]
            full[..., -1] = 0
        cut = full[..., : self.r].contiguous()
        return cut, cut

    def visible_and_mask(self) -> tuple[Tensor, Tensor | None]:
        """What each row sees, bool (B,Hm,S,T), and the mask that says so."""
        generator = self.generator(5)
        position = torch.arange(self.t)
        newest = self.t - self.s + torch.arange(self.s).view(-1, 1)
        rows = torch.arange(self.b).view(-1, 1, 1, 1)
        shape = (self.b, 1, self.s, self.t)
        if self.mask == "none":
            return torch.ones(1, 1, 1, self.t, dtype=torch.bool), None
        if self.mask == "causal":
            visible = (position <= newest).view(1, 1, self.s, self.t)
        elif self.mask == "left padded":
            visible = (position >= (rows + 1) * self.t // 3).expand(shape)
        elif self.mask == "right padded":
            visible = (position < self.t - (rows + 1) * self.t // 4).expand(shape)
        elif self.mask == "sliding":
            window = max(1, self.t // 2)
            visible = ((position <= newest) & (position > newest - window))[None, None]
        elif self.mask == "heads":
            visible = torch.rand(self.b, self.hq, self.s, self.t, generator=generator) > 0.4
        else:
            share = {"random": 0.5, "rare": 0.93}[self.mask]
            visible = torch.rand(shape, generator=generator) > share
            visible[0, 0, 0] = False  # a row that sees nothing
        if self.filler == 0:
            return visible, visible
        bias = torch.randn(visible.shape, generator=generator)
        dtype = self.dtype
        filler = torch.finfo(dtype).min if self.filler == 1 else -torch.inf
        return visible, bias.to(dtype).masked_fill(~visible, filler)

    def options(self) -> dict:
        return {
            "scale": self.scale,
            "top_k": self.k,
            "keep_q16": self.keep_q16,
            "sink": self.sink,
            "recent": self.recent,
            "min_keys": self.min_keys,
            "per_head": self.per_head or self.mask == "heads",
        }

    def attend_options(self) -> dict:
        logits = None
        if self.sink_logits:
            logits = torch.randn(self.hq, generator=self.generator(6)) * 3
        return {"scale": self.scale, "softcap": self.softcap, "sink_logits": logits}

    def index(self) -> tuple[Tensor, Tensor | None]:
        rows, scale = index_rows(self.keys(), self.projections()[1], self.index_dtype)
        rows = self.laid_out(rows, 77)
        return rows, None if scale is None else self.laid_out(scale, 77.0)

    def select_inputs(self) -> list:
        rows, scale = self.index()
        _, mask = self.visible_and_mask()
        bounds = None if mask is None else mask_bounds(mask)
        return [self.q(), self.projections()[0], rows, scale, mask, bounds]


MASKS = ["none", "causal", "left padded", "right padded", "sliding", "random", "rare", "heads"]
FINITE = ["normal", "integers", "large", "tiny", "denormal", "zero", "spread"]


@st.composite
def make_case(draw, values: tuple[str, ...] = tuple(FINITE), masks: tuple[str, ...] = tuple(MASKS)):
    d = draw(st.sampled_from([1, 2, 5, 8, 16, 24, 64] if not INTERPRETED else [8, 16, 24]))
    t = draw(st.sampled_from(SIZES))
    dtype = draw(st.sampled_from(FLOATS))
    kind = draw(st.sampled_from(values))
    scales = [0.125, 1.0, 0.3] if kind not in ("large", "spread") else [1e-4, 1e-2]
    k = draw(st.integers(1, t + 3))
    return Case(
        b=draw(st.integers(1, 2)),
        hkv=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 3)),
        s=draw(st.integers(1, 3)),
        t=t,
        d=d,
        dv=draw(st.sampled_from([1, 3, 8, 17, 32])),
        r=draw(st.integers(1, d)),
        k=draw(st.sampled_from([k, k, k, None])),
        # None, fewer than some row sees, as many, one more, more than there are.
        min_keys=draw(st.sampled_from([0, 0, t // 2, t - t // 3, t, t + 1, 10 * t])),
        keep_q16=draw(st.sampled_from([KEEP_ALL_Q16, KEEP_ALL_Q16, 1, 8192, 20000, 60000])),
        sink=draw(st.sampled_from([0, 0, 1, 4])),
        recent=draw(st.sampled_from([0, 0, 1, 5])),
        per_head=draw(st.booleans()),
        dtype=dtype,
        index_dtype=draw(st.sampled_from([dtype, torch.float32, torch.int8])),
        layout=draw(st.sampled_from(["contiguous", "bthd", "inside"])),
        mask=draw(st.sampled_from(masks)),
        filler=draw(st.sampled_from([0, 1, 2])),
        basis=draw(st.sampled_from(["orthogonal", "random", "axes", "deficient", "score-optimal"])),
        values=kind,
        scale=draw(st.sampled_from(scales)),
        softcap=draw(st.sampled_from([0.0, 0.0, 2.0, 30.0])),
        sink_logits=draw(st.booleans()),
        seed=draw(st.integers(0, 2**20)),
    )


# ---- selection, budget, mask ---------------------------------------------------------------------


def scorer_rounding(case: Case, inputs: list) -> float:
    """A bound on the error of any score where q meets keys, or bounds of pages, as they are."""
    q, _, keys, *_, mask, _ = inputs
    packed = q.double().nan_to_num(0, 0, 0).abs().unflatten(1, (keys.shape[1], -1)).flatten(2, 3)
    rows = keys.double().nan_to_num(0, 0, 0).abs()
    if rows.shape[3] > case.d:
        rows = torch.maximum(*rows.chunk(2, -1))
    largest = float((packed @ rows.transpose(-1, -2)).max()) * case.scale
    # Entries below the least normal number of their dtype may count as zero.
    underflow = 2.0**-126 * (1 + case.d * float(rows.max() + packed.max()))
    biased = mask is not None and mask.dtype != torch.bool
    return largest * 2.0**-20 + underflow + (2.0**-20 * 8 if biased else 0.0)


def rounding(case: Case, inputs: list) -> float:
    """A bound on the error of any score. An int8 index meets q in 16 bits, the rest is fp32."""
    q, basis, index, index_scale = inputs[:4]
    packed = q.double().nan_to_num(0, 0, 0).unflatten(1, (index.shape[1], -1)).abs()
    low = torch.einsum("bhgsd,hdr->bhgsr", packed, basis.double().abs()) * case.scale
    rows = index.double().nan_to_num(0, 0, 0).abs()
    if index_scale is None:
        largest = torch.einsum("bhgsr,bhtr->bhgst", low, rows).max()
        relative = 2.0**-20
    else:
        rows = rows * index_scale.abs()
        largest = low.amax(-1).max() * rows.sum(-1).max()
        relative = 2.0**-16
    # Below the least normal number every step may round to zero.
    underflow = 2.0**-126 * (1 + case.r * float(rows.max()))
    biased = inputs[4] is not None and inputs[4].dtype != torch.bool
    return float(largest) * relative + underflow + (2.0**-20 * 8 if biased else 0.0)


def check_choice(case: Case, positions: Tensor, inputs: list, **more) -> None:
    """Clauses 3 and 5: the reference's choice up to scores within rounding of the threshold.

    more: options that `case` does not have.
    """
    options = {**case.options(), **more}
    expected = reference.select(*inputs, **options)
    assert positions.dtype == torch.int32 and positions.shape == expected.shape
    assert positions.is_contiguous()
    kept = positions >= 0
    assert torch.equal(kept, expected >= 0), "not the budget, or -1 before a position"
    assert (positions[~kept] == -1).all()
    assert (positions[..., 1:] > positions[..., :-1])[kept[..., 1:]].all(), "not ascending"
    score = reference.scores(*inputs[:5], scale=case.scale, per_head=options["per_head"], **more)
    slack = (rounding if inputs[1] is not None else scorer_rounding)(case, inputs)
    if more.get("by_probability"):
        slack = 2 * slack + 2.0**-18  # of the score and of the sum; their logarithms
    for row in (positions != expected).any(-1).nonzero().tolist():
        row = tuple(row)
        found, wanted = set(positions[row].tolist()), set(expected[row].tolist())
        gained, lost = score[row][sorted(found - wanted)], score[row][sorted(wanted - found)]
        assert (gained >= lost.max() - slack).all(), f"row {row}: {found ^ wanted}, {slack:.3g}"
    visible, _ = case.visible_and_mask()
    heads = positions.shape[1]
    seen = visible.expand(case.b, case.hq, case.s, case.t)[:, :: case.hq // heads]
    hit = torch.gather(seen, 3, positions.clamp(min=0).long())
    assert hit[kept].all(), "a hidden key was chosen"


@given(make_case())
@cases(2 * SHARE)
def test_select_chooses_as_defined_and_nothing_hidden(case):
    inputs = case.select_inputs()
    for implementation in implementations():
        check_choice(case, implementation.select(*inputs, **case.options()), inputs)
    count("selection, budget and mask")


@given(make_case(), st.data())
@cases(2 * SHARE)
def test_every_scorer_and_group_choice_is_as_defined(case, data):
    """Clauses 1 and 3: queries meet the index, the keys or bounds of pages; a group ranks by its
    best score or by the sum of its probabilities."""
    inputs, more = case.select_inputs(), {}
    if not case.options()["per_head"]:
        more["by_probability"] = data.draw(st.booleans())
    scorer = data.draw(st.sampled_from(["low rank", "exact", "pages"]))
    if scorer != "low rank":
        inputs[1:4] = None, case.keys(), None
    if scorer == "pages":
        page = data.draw(st.sampled_from([2, 3, 16, 200]))
        keys, every = case.keys(), torch.ones(1, 1, 1, 1, dtype=torch.bool)
        pages = keys.new_full((case.b, case.hkv, -(-case.t // page), 2 * case.d), 77)
        reference.update_pages(pages, keys, every, page=page)
        inputs[2] = case.laid_out(pages, torch.nan)
        more |= {"page": page, "keys": case.t}
    for implementation in implementations():
        positions = implementation.select(*inputs, **case.options(), **more)
        check_choice(case, positions, inputs, **more)
    count("selection: scorers and group choices")


@st.composite
def head_budgets(draw, heads: int) -> HeadBudgets:
    """Of KV heads that choose, that keep the last keys, and that choose nothing."""
    lines = st.lists(
        st.tuples(st.integers(-20, 40), st.sampled_from([0.0, 0.0, 0.1, 0.4, 1.0])),
        min_size=1,
        max_size=2,
    )
    of_heads = [draw(st.one_of(st.none(), lines)) for _ in range(draw(st.sampled_from([1, heads])))]
    spans = tuple(None if each is None else Span.of(*each) for each in of_heads)
    last = tuple(span is not None and draw(st.booleans()) for span in spans)
    return HeadBudgets(spans, last, 0, 0, 0)


@given(make_case(), st.data())
@cases(2 * SHARE)
def test_kv_heads_choose_by_budgets_of_their_own(case, data):
    """Clause 11: as many keys as each head's budget says, of the best or of the last ones."""
    own = data.draw(head_budgets(case.hkv))
    own = replace(own, sink=case.sink, recent=case.recent, min_keys=case.min_keys)
    inputs, more = case.select_inputs(), {}
    options = {**case.options(), "top_k": None, "keep_q16": KEEP_ALL_Q16}
    if not options["per_head"]:
        more["by_probability"] = data.draw(st.booleans())
    if data.draw(st.booleans()):
        inputs[1:4] = None, case.keys(), None
    heads = case.hq if options["per_head"] else case.hkv
    visible, _ = case.visible_and_mask()
    count_of = visible.sum(-1)
    of_rows = budgets_of_rows(count_of, heads, case.hkv, own)
    more |= {"budgets": of_rows, "slots": int(own.slots(case.t))}
    by = {"per_head": options["per_head"], "by_probability": more.get("by_probability", False)}
    score = reference.scores(*inputs[:5], scale=case.scale, **by)
    seen = visible.expand(case.b, case.hq, case.s, case.t)[:, :: case.hq // heads]
    expected, told = reference.select_weighed(*inputs, **options, **more)
    for row in itertools.product(*map(range, expected.shape[:3])):
        number, candidates = row[1] * case.hkv // heads, seen[row].nonzero().flatten()
        number = number if len(own.heads) > 1 else 0
        chosen = expected[row][expected[row] >= 0].long()
        assert len(chosen) == own.keys(len(candidates))[number], "not the budget"
        if own.last[number] and 0 < len(chosen) < len(candidates):
            first = min(case.sink, len(chosen))
            behind = len(candidates) - (len(chosen) - first)
            assert chosen.tolist() == [*candidates[:first], *candidates[behind:]]
    slack = (rounding if inputs[1] is not None else scorer_rounding)(case, inputs)
    slack = 2 * slack + 2.0**-18
    for implementation in implementations():
        positions = implementation.select(*inputs, **options, **more)
        kept = positions >= 0
        assert positions.shape == expected.shape and torch.equal(kept, expected >= 0)
        assert torch.gather(seen, 3, positions.clamp(min=0).long())[kept].all(), "a hidden key"
        for row in (positions != expected).any(-1).nonzero().tolist():
            row = tuple(row)
            found, wanted = set(positions[row].tolist()), set(expected[row].tolist())
            gained, lost = score[row][sorted(found - wanted)], score[row][sorted(wanted - found)]
            assert (gained >= lost.max() - slack).all(), f"row {row}: {found ^ wanted}, {slack:.3g}"
        again, weighed = implementation.select_weighed(*inputs, **options, **more)
        assert torch.equal(again, positions), "weighed, and chosen otherwise"
        assert torch.equal(weighed[..., 0], kept.sum(-1).float())
        near = 2 * slack + 2.0**-16
        assert ((weighed[..., 1] - told[..., 1]).abs() <= near).all(), "not what was left out"
    count("selection: budgets of KV heads")


def check_weighed(
    case: Case, positions: Tensor, weighed: Tensor, inputs: list, **more: float
) -> None:
    """Clause 10: of what is chosen, what it weighs; and, by a mass, that it is the fewest.

    more: options that `case` does not have.
    """
    options = {**case.options(), **more}
    mass = more.get("mass", 0.0)
    budget = Budget(*(options[name] for name in ("top_k", "keep_q16", "sink", "recent")),
                    options["min_keys"], mass)  # fmt: skip
    by = {"per_head": options["per_head"], "by_probability": more.get("by_probability", False)}
    score = reference.scores(*inputs[:5], scale=case.scale, **by)
    heads = score.shape[1]
    visible, _ = case.visible_and_mask()
    seen = visible.expand(case.b, case.hq, case.s, case.t)[:, :: case.hq // heads]
    weight = reference.weights(score, seen)
    slack = (rounding if inputs[1] is not None else scorer_rounding)(case, inputs)
    slack = 2 * slack + 2.0**-18  # of two scores; of a logarithm
    near = 2 * slack + 2.0**-16  # of a weight, relative to it, and of sums
    assert weighed.dtype == torch.float32 and weighed.shape == (*positions.shape[:3], 2)
    kept = positions >= 0
    assert torch.equal(weighed[..., 0], kept.sum(-1).float()), "not the number of keys"
    assert not (kept[..., 1:] & ~kept[..., :-1]).any(), "-1 before a position"
    for row in itertools.product(*map(range, positions.shape[:3])):
        chosen = positions[row][kept[row]].long()
        candidates = seen[row].nonzero().flatten()
        count, has = len(candidates), len(chosen)
        assert seen[row][chosen].all() and (chosen.diff() > 0).all()
        recent = min(case.recent, count)
        sink = min(case.sink, count - recent)
        always = torch.cat((candidates[:sink], candidates[count - recent :]))
        assert torch.isin(always, chosen).all(), "a key that is always kept"
        held = float(weight[row][chosen].sum())
        left_out = float(weight[row].sum()) - held
        assert abs(float(weighed[row][1]) - left_out) <= near, "not what was left out"
        assert has <= budget.keys(count)
        ranked = chosen[~torch.isin(chosen, always)]
        if len(ranked):
            passed = candidates[~torch.isin(candidates, chosen)]
            worst = score[row][ranked].min()
            assert (score[row][passed] <= worst + slack).all(), "not the best"
        if not mass or count < case.min_keys or not weight[row].any():
            assert has == budget.keys(count), "not the budget"
            continue
        assert held >= mass - near or has == budget.keys(count), "not enough"
        if len(ranked):
            held -= float(weight[row][ranked[score[row][ranked].argmin()]])
            assert held < mass + near, "more than the fewest"


@given(make_case(), st.data())
@cases(2 * SHARE)
def test_a_mass_is_held_by_the_fewest_keys(case, data):
    """Clause 10, by each scorer and group choice."""
    inputs = case.select_inputs()
    more = {"mass": data.draw(st.sampled_from([0.0, 0.05, 0.5, 0.9, 0.95, 0.999]))}
    if not case.options()["per_head"]:
        more["by_probability"] = data.draw(st.booleans())
    if data.draw(st.booleans()):
        inputs[1:4] = None, case.keys(), None
    for implementation in implementations():
        positions, weighed = implementation.select_weighed(*inputs, **case.options(), **more)
        check_weighed(case, positions, weighed, inputs, **more)
        alone = implementation.select(*inputs, **case.options(), **more)
        assert torch.equal(alone, positions), "weighed, and chosen otherwise"
    count("selection: mass")


def tied(case: Case) -> list:
    """Operands whose scores are exact, and most of them equal to others: small integers."""
    inputs = case.select_inputs()
    inputs[1] = torch.eye(case.d)[:, : case.r].expand(case.hkv, -1, -1).contiguous()
    index = torch.randint(-2, 3, inputs[2].shape, generator=case.generator(9))
    inputs[2] = case.laid_out(index.to(case.index_dtype), 77)
    if inputs[3] is not None:
        # Integers that a query rounded to 16 bits still holds exactly.
        inputs[0] = inputs[0].clamp(-1, 1)
        inputs[3] = torch.ones(inputs[3].shape)
    return inputs


@given(make_case(values=("integers",)), st.sampled_from([0.1, 0.6, 0.93]))
@cases(SHARE)
def test_of_equal_weights_the_lower_positions_hold_the_mass(case, mass):
    """As many keys by a fixed budget are the same keys."""
    case = replace(case, mask="none", min_keys=0)
    inputs = tied(case)
    options = {**case.options(), "scale": 0.5}
    for implementation in implementations():
        positions = implementation.select(*inputs, **options, mass=mass)
        for row in itertools.product(*map(range, positions.shape[:3])):
            chosen = positions[row][positions[row] >= 0]
            fixed = {**options, "top_k": len(chosen), "keep_q16": KEEP_ALL_Q16}
            same = reference.select(*inputs, **fixed)[row]
            assert torch.equal(chosen, same[same >= 0])
    count("selection: ties of weights")


@given(make_case(), st.data())
@cases(SHARE)
def test_bounds_of_pages_follow_the_cache(case, data):
    """Clause 9, over steps that write anywhere: as defined, in place and as the cache grows."""
    page = data.draw(st.sampled_from([2, 3, 16, 200]))
    keys, generator = case.keys(), case.generator(11)
    for implementation in implementations():
        count_of_pages = -(-case.t // page)
        pages = torch.zeros(case.b, case.hkv, count_of_pages, 2 * case.d, dtype=case.dtype)
        expected = pages.clone()
        for _ in range(3):
            written = torch.rand(case.b, 1, case.t, 1, generator=generator) < 0.2
            implementation.update_pages(pages, keys, written, page=page)
            reference.update_pages(expected, keys, written, page=page)
            assert torch.equal(pages, expected)
        fewer = pages[:, :, : data.draw(st.integers(1, count_of_pages))]
        grown = implementation.extend_pages(fewer, keys, written, page=page)
        assert torch.equal(grown, reference.extend_pages(fewer, keys, written, page=page))
    count("bounds of pages")


@given(make_case(values=("integers",)))
@cases(SHARE)
def test_equal_scores_go_to_the_lower_position(case):
    inputs = tied(case)
    if inputs[4] is not None and inputs[4].dtype != torch.bool:
        inputs[4] = inputs[4].masked_fill(inputs[4] > hidden_below(case.dtype), 0)
    options = {**case.options(), "scale": 0.5}
    expected = reference.select(*inputs, **options)
    for implementation in implementations():
        assert torch.equal(implementation.select(*inputs, **options), expected)
    count("selection: ties")


@given(make_case(values=("normal", "integers", "spread")), st.data())
@cases(SHARE)
def test_what_is_not_finite_ranks_as_defined(case, data):
    """NaN ranks with -inf, for that key or that query head alone; infinities rank as they are."""
    inputs = case.select_inputs()
    q, index = inputs[0], inputs[2]
    value = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
    if index.dtype == torch.int8 or data.draw(st.booleans()):
        q[:, data.draw(st.integers(0, case.hq - 1)), :, 0] = value
        assume(index.dtype != torch.int8 or value != value)
    else:
        keys = st.lists(st.integers(0, case.t - 1), min_size=1, max_size=3, unique=True)
        dims = data.draw(st.sampled_from([1, case.r]))
        index[:, :, data.draw(keys), :dims] = value
    for implementation in implementations():
        check_choice(case, implementation.select(*inputs, **case.options()), inputs)
    count("selection: NaN and infinity")


@given(make_case(), st.randoms(use_true_random=False))
@cases(SHARE)
def test_keys_that_were_not_chosen_may_change_places(case, random):
    """Permuting the visible keys that were not chosen changes neither the choice nor the output."""
    case = replace(case, values="normal", per_head=False, hkv=1, s=1)
    case = replace(case, dtype=torch.float32, index_dtype=torch.float32)  # no two scores are equal
    if case.mask == "heads":
        case = replace(case, mask="random")
    inputs, k, v = case.select_inputs(), case.keys(), case.contents()
    visible, mask = case.visible_and_mask()
    if mask is not None and mask.dtype != torch.bool:
        mask = inputs[4] = mask.masked_fill(visible, 0)  # a bias belongs to a place
    for implementation in implementations():
        positions = implementation.select(*inputs, **case.options())
        out = implementation.attend(inputs[0], k, v, positions, mask, **case.attend_options())
        index, moved_k, moved_v = inputs[2].clone(), k.clone(), v.clone()
        for b in range(case.b):
            seen = visible.expand(case.b, 1, 1, case.t)[b, 0, 0].nonzero().flatten().tolist()
            chosen = positions[b, 0, 0].tolist()
            rest = [i for i in seen if i not in chosen] if chosen[0] >= 0 else []
            shuffled = random.sample(rest, len(rest))
            for new, old in ((index, inputs[2]), (moved_k, k), (moved_v, v)):
                new[b, :, rest] = old[b, :, shuffled]
        again = implementation.select(*inputs[:2], index, *inputs[3:], **case.options())
        assert torch.equal(again, positions)
        after = implementation.attend(
            inputs[0], moved_k, moved_v, again, mask, **case.attend_options()
        )
        assert torch.equal(after, out)
    count("selection: unselected keys permuted")


# ---- attend --------------------------------------------------------------------------------------


def some_positions(case: Case) -> Tensor:
    """Ascending lists of any length, -1 behind, of each KV head or each query head."""
    generator = case.generator(7)
    heads = case.hq if case.per_head else case.hkv
    noise = torch.rand(case.b, heads, case.s, case.t, generator=generator)
    slots = case.k or case.t
    kept = min(slots, case.t)
    positions = noise.topk(kept).indices.sort().values.int()
    used = torch.randint(0, kept + 1, (case.b, heads, case.s, 1), generator=generator)
    padded = torch.full((case.b, heads, case.s, slots), -1, dtype=torch.int32)
    padded[..., :kept] = positions.masked_fill(torch.arange(kept) >= used, -1)
    return padded


def pytorch_attention(case: Case, q, k, v, positions, mask, sink_logits) -> Tensor:
    """PyTorch's own attention over the chosen keys, in the dtype of q, one row at a time."""
    out = torch.empty(case.b, case.hq, case.s, case.dv, dtype=q.dtype)
    for i, h, j in itertools.product(range(case.b), range(case.hq), range(case.s)):
        kv = h // case.group
        row = positions[i, h if positions.shape[1] == case.hq else kv, j]
        at = row[row >= 0].long() if (row >= 0).any() else torch.arange(case.t)
        added = None
        if mask is not None:
            added = mask.expand(case.b, case.hq, case.s, case.t)[i, h, j, at]
            if added.dtype == torch.bool:
                added = torch.zeros(at.shape, dtype=q.dtype).masked_fill(~added, -torch.inf)
        query, keys, values = q[i, h, j][None], k[i, kv, at], v[i, kv, at]
        if case.softcap or sink_logits is not None:
            logits = query @ keys.T * case.scale
            if case.softcap:
                logits = torch.tanh(logits / case.softcap) * case.softcap
            logits = logits if added is None else logits + added
            if sink_logits is not None:
                logits = torch.cat((logits, sink_logits[h].to(logits.dtype).view(1, 1)), -1)
            weights = logits.softmax(-1, dtype=torch.float32).nan_to_num(0).to(q.dtype)
            out[i, h, j] = (weights[:, : len(at)] @ values)[0]
        else:
            bias = None if added is None else added[None, None]
            out[i, h, j] = F.scaled_dot_product_attention(
                query[None], keys[None], values[None], bias, scale=case.scale
            )[0, 0]
    return out


def check_attention(
    case: Case, implementation, inputs: list, mask: Tensor | None, ranges: Tensor | None = None
) -> None:
    """Clause 2: within twice the error of PyTorch's own attention in the same dtype.

    The floor is what one rounding of the output, and of the logits in fp32, may cost.
    """
    q, k, v, positions = inputs
    options = case.attend_options()
    truth = reference.attend(q.double(), k.double(), v.double(), positions, mask, **options)
    if ranges is not None:  # in which those positions are
        found = implementation.attend(q, k, v, None, mask, **options, ranges=ranges)
    else:
        found = implementation.attend(*inputs, mask, **options)
    assert found.dtype == q.dtype and found.shape == truth.shape and found.is_contiguous()
    assert found.isfinite().all()
    theirs = pytorch_attention(case, q, k, v, positions, mask, options["sink_logits"])
    error = (found.double() - truth).abs().max()
    their_error = (theirs.double() - truth).abs().nan_to_num().max()
    logits = torch.einsum("bhgsd,bhtd->bhgst", *absolute(case, q, k)).max() * case.scale
    floor = torch.finfo(q.dtype).eps * truth.abs().max() + torch.finfo(q.dtype).tiny
    floor += 8 * 2.0**-24 * (logits + 1) * v.double().abs().max()
    assert error <= 2 * their_error + floor, f"error {error:.2e}, PyTorch's {their_error:.2e}"


def absolute(case: Case, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return q.double().abs().unflatten(1, (case.hkv, case.group)), k.double().abs()


@given(make_case())
@cases(2 * SHARE)
def test_attend_is_as_exact_as_pytorch_over_the_positions(case):
    _, mask = case.visible_and_mask()
    inputs = [case.q(), case.keys(), case.contents(), some_positions(case)]
    for implementation in implementations():
        check_attention(case, implementation, inputs, mask)
    count("definition of attend")


def some_ranges(case: Case) -> Tensor:
    """(B, Hkv, S, 4), any of the first three maybe 1; rows with two ranges, one, none, and all."""
    generator = case.generator(9)
    sizes = [
        1 if torch.rand((), generator=generator) < 0.3 else size
        for size in (case.b, case.hkv, case.s)
    ]
    ends = torch.randint(0, case.t + 1, (*sizes, 4), generator=generator).sort(-1).values
    kind = torch.randint(0, 5, (*sizes, 1), generator=generator)
    at = torch.arange(4)
    ends = torch.where((kind == 1) & (at < 2), ends[..., :1], ends)  # the last keys alone
    ends = torch.where((kind == 2) & (at == 2), ends[..., 1:2], ends)  # ranges that touch
    ends = torch.where(kind == 3, ends[..., :1], ends)  # none
    ends = torch.where(kind == 4, torch.tensor([0, case.t, case.t, case.t]), ends)
    return ends.to(torch.int32)


def positions_in(case: Case, ranges: Tensor) -> Tensor:
    """The same keys as positions (B, Hkv, S, T)."""
    at = torch.arange(case.t)
    first, stop, last, end = ranges.expand(case.b, case.hkv, case.s, 4)[..., None].unbind(-2)
    inside = ((at >= first) & (at < stop)) | ((at >= last) & (at < end))
    order = torch.where(inside, at, case.t).sort(-1).values
    return torch.where(order < case.t, order, -1).to(torch.int32)


@given(make_case())
@cases(2 * SHARE)
def test_attention_in_ranges_is_as_exact_as_pytorch_over_the_same_keys(case):
    _, mask = case.visible_and_mask()
    ranges = some_ranges(case)
    inputs = [case.q(), case.keys(), case.contents(), positions_in(case, ranges)]
    for implementation in implementations():
        check_attention(case, implementation, inputs, mask, ranges)
    count("definition of ranges")


@given(make_case(values=("normal", "integers")))
@cases(SHARE)
def test_between_ranges_nothing_is_read(case):
    """NaN lies in all that no row of a KV head reads."""
    ranges = some_ranges(case)
    positions = positions_in(case, ranges)
    q, k, v = case.q(), case.keys(), case.contents()
    read = torch.zeros(case.b, case.hkv, case.s, case.t + 1, dtype=torch.bool)
    read.scatter_(3, torch.where(positions < 0, case.t, positions).long(), True)
    read = read[..., :-1] | ~read[..., :-1].any(-1, keepdim=True)
    options = case.attend_options()
    hidden = ~read.any(2)[..., None]
    broken = k.masked_fill(hidden, torch.nan), v.masked_fill(hidden, torch.nan)
    for implementation in implementations():
        found = implementation.attend(q, k, v, None, None, **options, ranges=ranges)
        after = implementation.attend(q, *broken, None, None, **options, ranges=ranges)
        assert torch.equal(found, after)
    count("ranges: nothing between is read")


@given(make_case(values=("normal", "integers")), st.data())
@cases(SHARE)
def test_what_is_not_finite_reaches_the_rows_that_read_it_alone(case, data):
    """And there it gives what the definition gives: the same NaN, the same infinities."""
    case = replace(case, scale=0.05, softcap=0.0)
    q, k, v = case.q(), case.keys(), case.contents()
    positions = some_positions(case)
    visible, mask = case.visible_and_mask()
    at = data.draw(st.integers(0, case.t - 1))
    kv = data.draw(st.integers(0, case.hkv - 1))
    value = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
    target = data.draw(st.sampled_from(["k", "v", "both"]))
    if target != "v":
        k[0, kv, at, 0] = value
    if target != "k":
        v[0, kv, at, 0] = value
    options = case.attend_options()
    truth = reference.attend(q.double(), k.double(), v.double(), positions, mask, **options)
    for implementation in implementations():
        found = implementation.attend(q, k, v, positions, mask, **options).double()
        assert torch.equal(found.isnan(), truth.isnan())
        torch.testing.assert_close(
            found, truth.to(q.dtype).double(), rtol=2e-2, atol=2e-2, equal_nan=True
        )
    if mask is not None:
        spoilt = (truth.isnan() | truth.isinf()).any(-1)
        listed = (positions == at).any(-1) | (positions < 0).all(-1)
        listed = listed.repeat_interleave(case.hq // positions.shape[1], 1)
        sees = visible[..., at].expand(case.b, case.hq, case.s)
        hidden = ~sees if case.filler != 1 else torch.zeros_like(sees)
        assert not (spoilt & (hidden | ~listed)).any()
    count("mask: hidden NaN and infinity")


@given(make_case(), st.sampled_from([-9, "T", 2**31 - 1]))
@cases(SHARE)
def test_what_is_no_position_is_passed_over(case, filler):
    """Behind the positions of a row anything may stand that is no key."""
    inputs = [case.q(), case.keys(), case.contents()]
    _, mask = case.visible_and_mask()
    positions = some_positions(case)
    filled = positions.masked_fill(positions < 0, case.t if filler == "T" else filler)
    for implementation in [*implementations(), reference]:
        out, same = (
            implementation.attend(*inputs, at, mask, **case.attend_options())
            for at in (positions, filled)
        )
        assert torch.equal(out, same)
    count("definition of attend: no positions")


# ---- both together -------------------------------------------------------------------------------


@given(make_case())
@cases(SHARE)
def test_the_whole_budget_is_dense_attention(case):
    """Clause 1: whatever the basis, the order and the mask."""
    case = replace(
        case, k=case.t + (case.k or 0), keep_q16=KEEP_ALL_Q16, softcap=0.0, sink_logits=False
    )
    inputs, k, v = case.select_inputs(), case.keys(), case.contents()
    visible, mask = case.visible_and_mask()
    options = case.options()
    bias = mask if mask is None or mask.dtype == torch.bool else mask.double()
    truth = F.scaled_dot_product_attention(
        inputs[0].double(), k.double(), v.double(), bias, scale=case.scale, enable_gqa=True
    )
    for implementation in implementations():
        positions = implementation.select(*inputs, **options)
        heads = positions.shape[1]
        expected = visible.expand(case.b, case.hq, case.s, case.t)[:, :: case.hq // heads]
        chosen = torch.zeros(case.b, heads, case.s, case.t + 1, dtype=torch.bool)
        chosen.scatter_(3, torch.where(positions < 0, case.t, positions).long(), True)
        assert torch.equal(chosen[..., : case.t], expected)
        check_attention(case, implementation, [inputs[0], k, v, positions], mask)
        found = implementation.attend(
            inputs[0], k, v, positions, mask, **case.attend_options()
        ).double()
        logits = torch.einsum("bhgsd,bhtd->bhgst", *absolute(case, inputs[0], k)).max()
        slack = 4 * torch.finfo(case.dtype).eps + 2.0**-20 * (1 + case.scale * logits)
        off = (found - truth).abs().max()
        assert off <= slack * v.double().abs().max() + torch.finfo(case.dtype).tiny
    count("identity")


@given(make_case())
@cases(2 * SHARE)
def test_what_is_left_out_bounds_the_difference_from_dense(case):
    """Clause 4: at most (1 - m)(max v - min v). A sink logit is a chosen key with the value 0."""
    inputs, k, v = case.select_inputs(), case.keys(), case.contents()
    visible, mask = case.visible_and_mask()
    q, options = inputs[0], case.attend_options()
    wide = [x.double() for x in (q, k, v)]
    everything = torch.full((case.b, case.hkv, case.s, 1), -1, dtype=torch.int32)
    dense = reference.attend(*wide, everything, mask, **options)
    logits = case.scale * torch.einsum(
        "bhgsd,bhtd->bhgst", wide[0].unflatten(1, (case.hkv, case.group)), wide[1]
    ).flatten(1, 2)
    if case.softcap:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    if mask is not None:
        logits = logits + (0 if mask.dtype == torch.bool else mask.double())
        if mask.dtype == torch.bool:
            logits = logits.masked_fill(~mask, -torch.inf)
    values = wide[2].repeat_interleave(case.group, 1)
    if case.sink_logits:
        column = options["sink_logits"].double().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat((logits, column), -1)
        values = torch.cat((values, torch.zeros_like(values[:, :, :1])), 2)
    weights = logits.softmax(-1)
    spread = (values.amax(2) - values.amin(2)).amax(-1)[:, :, None]
    sees = visible.expand(case.b, case.hq, case.s, case.t).any(-1)
    for implementation in implementations():
        positions = implementation.select(*inputs, **case.options())
        found = implementation.attend(q, k, v, positions, mask, **options).double()
        chosen = torch.zeros(*positions.shape[:3], case.t + 1, dtype=torch.bool)
        chosen.scatter_(3, torch.where(positions < 0, case.t, positions).long(), True)
        chosen = chosen[..., : case.t].repeat_interleave(case.hq // positions.shape[1], 1)
        mass = (weights[..., : case.t] * chosen).sum(-1)
        mass += weights[..., case.t :].sum(-1)
        largest = torch.einsum("bhgsd,bhtd->bhgst", *absolute(case, q, k)).max() * case.scale
        rounding = torch.finfo(case.dtype).eps * 2 + 2.0**-20 * (1 + largest)
        slack = rounding * values.abs().max() + torch.finfo(case.dtype).tiny
        off = (found - dense).abs().amax(-1)
        bound = (1 - mass).clamp(min=0) * spread + slack
        assert ((off <= bound) | ~sees).all(), f"{(off - bound).max():.2e}"
    count("bound")


@given(make_case(values=("normal", "spread")))
@cases(SHARE)
def test_what_is_hidden_changes_nothing(case):
    """Hidden keys, values and index rows may hold anything."""
    assume(case.mask not in ("none", "heads"))
    inputs, k, v = case.select_inputs(), case.keys(), case.contents()
    visible, mask = case.visible_and_mask()
    rows = visible.any(2).expand(case.b, 1, case.t)[:, 0]  # seen by any token of the batch row
    broken = list(inputs)
    broken[2] = inputs[2].clone()
    hidden = ~rows[:, None, :].expand(case.b, case.hkv, case.t)
    broken[2][hidden] = 127 if inputs[2].dtype == torch.int8 else torch.nan
    if inputs[3] is not None:
        broken[3] = inputs[3].clone()
        broken[3][hidden] = 1e30
    broken_k, broken_v = k.clone(), v.clone()
    broken_k[hidden], broken_v[hidden] = torch.nan, torch.inf
    sees = visible.expand(case.b, case.hq, case.s, case.t).any(-1)
    for implementation in implementations():
        positions = implementation.select(*inputs, **case.options())
        again = implementation.select(*broken, **case.options())
        assert torch.equal(positions, again)
        options = case.attend_options()
        out = implementation.attend(inputs[0], k, v, positions, mask, **options)
        after = implementation.attend(inputs[0], broken_k, broken_v, positions, mask, **options)
        assert torch.equal(out[sees], after[sees])
    count("mask: hidden keys hold anything")


@given(make_case(values=("normal", "integers")))
@cases(SHARE)
def test_a_row_that_sees_nothing_is_what_sdpa_makes_of_it(case):
    case = replace(case, mask="rare", dtype=torch.float32, softcap=0.0, sink_logits=False)
    inputs, k, v = case.select_inputs(), case.keys(), case.contents()
    visible, mask = case.visible_and_mask()
    if case.filler == 1:  # SDPA adds the score to finfo.min, and what is left of it decides
        mask = inputs[4] = mask.masked_fill(~visible, torch.finfo(torch.float32).min)
    expected = F.scaled_dot_product_attention(
        inputs[0], k, v, mask, scale=case.scale, enable_gqa=True
    )
    blind = ~visible.expand(case.b, case.hq, case.s, case.t).any(-1)
    assert blind.any()
    for implementation in implementations():
        positions = implementation.select(*inputs, **case.options())
        heads = positions.shape[1]
        assert (positions[blind[:, :: case.hq // heads]] == -1).all()
        found = implementation.attend(inputs[0], k, v, positions, mask, scale=case.scale)
        torch.testing.assert_close(found[blind], expected[blind], rtol=1e-4, atol=1e-4)
    count("mask: rows that see nothing")


# ---- rank ----------------------------------------------------------------------------------------


@given(make_case(values=("normal", "integers", "spread")))
@cases(SHARE)
def test_an_orthogonal_basis_errs_less_with_every_dim(case):
    """|score - approximate score| <= |q behind R| |k behind R|, which falls with R; exact at D.

    So recall can only be lost to keys within that bound of the threshold, fewer with every dim.
    """
    case = replace(case, basis="orthogonal", index_dtype=torch.float32, mask="none")
    case = replace(case, dtype=torch.float32, sink=0, recent=0, keep_q16=KEEP_ALL_Q16, min_keys=0)
    case = replace(case, k=case.k or case.t)
    full = replace(case, r=case.d)
    q, (basis, _) = full.q(), full.projections()
    keys = full.keys()
    exact = case.scale * torch.einsum(
        "bhgsd,bhtd->bhgst", q.double().unflatten(1, (case.hkv, case.group)), keys.double()
    )
    exact = exact.flatten(1, 2) if case.per_head else exact.amax(2)
    best = exact.topk(min(case.k, case.t)).values[..., -1:]
    q_all = torch.einsum(
        "bhgsd,hdr->bhgsr", q.double().unflatten(1, (case.hkv, case.group)), basis.double()
    )
    k_all = torch.einsum("bhtd,hdr->bhtr", keys.double(), basis.double())
    rounding = 2.0**-19 * case.scale * float(q_all.norm(dim=-1).max() * k_all.norm(dim=-1).max())
    before = None
    for r in sorted({1, case.r, case.d}):
        q_rest = q_all[..., r:].norm(dim=-1).amax(2)[..., None]
        if case.per_head:
            q_rest = q_all[..., r:].norm(dim=-1).flatten(1, 2)[..., None]
        heads = exact.shape[1] // case.hkv
        k_pe = k_all[..., r:].norm(dim=-1)[:, :, None].repeat_interleave(heads, 1)
        bound = case.scale * q_rest * k_pe + rounding
        assert before is None or (bound <= before + rounding).all()
        before = bound
        index, _ = index_rows(keys, basis[..., :r].contiguous(), torch.float32)
        for implementation in implementations():
            positions = implementation.select(
                q, basis[..., :r].contiguous(), index, None, None, None, **case.options()
            )
            kept = positions >= 0
            found = torch.gather(exact, 3, positions.clamp(min=0).long())
            worst = 2 * bound.amax(-1, keepdim=True)
            assert ((found >= best - worst) | ~kept).all()
    count("recall: error falls with rank")


@given(st.integers(0, 2**20), st.sampled_from(["orthogonal", "random"]))
@cases(0.3 * SHARE)
def test_recall_grows_with_the_rank(seed, kind):
    """On keys with a falling spectrum, dims in its order, averaged over many queries."""
    generator = torch.Generator().manual_seed(seed)
    d, t, k, queries = 32, 200, 20, 24
    size = 0.85 ** torch.arange(d)
    turn = torch.linalg.qr(torch.randn(d, d, generator=generator).double()).Q.float()
    keys = (torch.randn(1, 4, t, d, generator=generator) * size) @ turn.T
    q = torch.randn(1, 4, queries, d, generator=generator) @ turn.T
    basis = turn if kind == "orthogonal" else turn * torch.linspace(1.3, 0.9, d)
    basis = basis.expand(4, d, d).contiguous()
    truth = q.double() @ keys.double().transpose(2, 3)
    worst, exact = truth.topk(k).values[..., -1:], truth.topk(k).indices
    options = {"scale": 1.0, "top_k": k, "keep_q16": KEEP_ALL_Q16}
    options |= {"sink": 0, "recent": 0, "min_keys": 0}
    for implementation in implementations():
        recalls = []
        for r in (2, 4, 8, 16, 32):
            cut = basis[..., :r].contiguous()
            index, _ = index_rows(keys, cut, torch.float32)
            found = implementation.select(
                q, cut, index, None, None, None, **options, per_head=False
            )
            hits = (exact.unsqueeze(-1) == found.unsqueeze(-2)).any(-1)
            recalls.append(hits.double().mean().item())
        assert all(b > a for a, b in itertools.pairwise(recalls)), recalls
        # At full rank all of them, but for ties within the rounding of fp32 scores.
        scores = truth.gather(-1, found.long())
        assert kind != "orthogonal" or (scores >= worst - 1e-4).all()
    count("recall: grows with rank")


# ---- the interpreter -----------------------------------------------------------------------------


INTERPRETER_RUNS = (
    "as_defined or lower_position or as_exact or nothing_is or budget_is_dense or no_position"
)


@pytest.mark.skipif(INTERPRETED, reason="runs here already")
def test_this_file_passes_in_the_interpreter(request):
    pytest.importorskip("triton", reason="the Triton kernels need Triton")
    seed = request.config.option.hypothesis_seed
    profile = request.config.getoption("--hypothesis-profile") or "bounded"
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__,
            f"--hypothesis-seed={seed}", f"--hypothesis-profile={profile}", "--timeout=0",
            "-k", INTERPRETER_RUNS,
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    for line in done.stdout.splitlines():
        clause, _, number = line.strip().rpartition("  ")
        if number.strip().isdigit() and not clause.startswith("record"):
            count(f"interpreter, {clause.strip()}", int(number))
