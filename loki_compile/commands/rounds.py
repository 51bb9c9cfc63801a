"""What `loki bench` does for one kind of cache and one length: every way reads or is given the same
tokens, is checked against eager, and is then timed in turn with all others."""

from __future__ import annotations

import copy
import inspect
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from loki_compile.commands.bench_rows import Row
from loki_compile.commands.clock import Reader, Sample, timed
from loki_compile.commands.measure import filled_cache, new_cache, prefill
from loki_compile.commands.traffic import cache_bytes, layers_of, weight_bytes
from loki_compile.commands.ways import Way
from loki_compile.counts import stats
from loki_compile.report import SiteReport, clear_reports, reports

# A growing cache's graphs are traced at its first two steps, an index is built at the first that is
# sparse: those behind them are what all later ones cost.
WARM_UP = 4
# Of a sample, and at most before it, or for so many seconds. What another way has left in the
# processor's caches is not what a step finds while it decodes: behind two steps a small model's was
# up to a third slower where PyTorch's own came before.
STEPS, SETTLING, SETTLING_S = 4, 8, 0.1
# How far logits of a dense way may be from eager's, as a share of their norm, behind four layers.
# Rounding adds up as a random walk does, over more layers.
LOGITS_BOUND = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 1e-4}
# Missed by a sparse way over text, in nats: behind more than that no speed is worth its tokens.
KL_BOUND = 1.0


@dataclass
class Decoder:
    """One way, decoding from a cache of its own; a call is one token, and all feed the same."""

    way: Way
    cache: Any
    tokens: Iterator[Tensor]
    logits: list[Tensor] = field(default_factory=list)
    first: Sample | None = None  # from the prompt to its first token; None where none was read
    warm_up: list[Sample] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    sites: tuple[SiteReport, ...] = ()  # of its sparse graph
    taken: int = 0

    def __call__(self) -> Tensor:
        self.taken += 1
        out = self.way.step(next(self.tokens), past_key_values=self.cache, use_cache=True)
        logits: Tensor = out.logits[0, -1]
        return logits

    def warm(self, device: torch.device) -> None:
        """The steps that compile; what they say is kept to be checked."""
        for _ in range(WARM_UP):
            self.warm_up.append(timed(lambda: self.logits.append(self()), device))


def room_for(rounds: int) -> int:
    """Tokens that each way decodes behind a context."""
    return WARM_UP + rounds * (SETTLING + STEPS)


@torch.no_grad()
def measured(
    model: Any,
    ways: Sequence[Way],
    kind: str,
    ids: Tensor,
    *,
    reads: bool,
    rounds: int,
    most_seconds: float,
    reader: Reader,
    begin: Callable[[str], None],
) -> list[Row]:
    """A row for each way, in one run.

    Args:
      ways: eager first.
      kind: "static" or "dynamic".
      ids: (context + `room_for(rounds)`,) int64: the prompt, and what is fed behind it.
      reads: each way reads the prompt itself, and is timed until its first token. Otherwise all
        begin with the same cache of noise.
      most_seconds: ends the rounds early, after the third.
      begin: told what begins.
    """
    case, device = _Case(kind, ids, len(ids) - room_for(rounds), reads), model.device
    torch._dynamo.reset()
    truth = _filled(model, case)
    decoders: list[Decoder] = []
    rows: list[Row] = []
    for way in ways:
        about = "compiles and warms up" if way.step is not way.model else "warms up"
        begin(f"{way.name}: {'reads the prompt, ' if reads else ''}{about}")
        row, decoder = _warmed(way, case, truth, decoders[0] if decoders else None)
        rows.append(row)
        if decoder is not None and not row.note:
            decoders.append(decoder)
        del decoder  # with its cache, if it is not to be timed
    del truth
    last = [decoder.warm_up[-1].wall for decoder in decoders]
    a_round = sum(wall * STEPS + min(wall * SETTLING, wall + SETTLING_S) for wall in last)
    begin(f"measuring in turn, about {math.ceil(min(rounds * a_round, most_seconds))} s")
    _take_turns(decoders, rounds, most_seconds, reader, device)
    weights = weight_bytes(model)
    for row in rows:
        for decoder in decoders:
            if decoder.way.name == row.way:
                _fill_in(row, decoder, weights, reader)
    return rows


@dataclass(frozen=True)
class _Case:
    """The tokens behind which ways decode: of `ids`, the first `context`, which they read
    themselves (`reads`) or are given as noise; in a kind of cache."""

    kind: str
    ids: Tensor
    context: int
    reads: bool


def _filled(model: Any, case: _Case) -> Any:
    """The cache that every way begins with: of the prompt as eager reads it, or of noise."""
    slots = len(case.ids)
    if not case.reads:
        return filled_cache(model, case.kind, case.context, slots - case.context)
    cache = new_cache(model, case.kind, slots)
    prefill(model, case.ids[None, : case.context], cache)
    return cache


def _warmed(way: Way, case: _Case, truth: Any, eager: Decoder | None) -> tuple[Row, Decoder | None]:
    """The row of a way that has taken its first steps, and what goes on with it; None where it
    raised. `eager`: the first way's; None for that itself."""
    try:
        decoder = _begun(way, case, truth)
        decoder.warm(case.ids.device)
    except Exception as error:  # of a model, a compiler or a kernel: the others go on
        if eager is None:  # without eager there is nothing to compare with
            raise
        row = Row(case.kind, case.context, way.name, way.dense)
        first = str(error).strip().partition("\n")[0]
        row.note = f"failed: {type(error).__name__}: {first}"
        return row, None
    return _checked(decoder, eager or decoder, case), decoder


def _begun(way: Way, case: _Case, truth: Any) -> Decoder:
    """A way with its cache. Where it read the prompt itself, the cache lies as it left it and holds
    what eager made of it, lest ways differ by what they begin with."""
    # Else the way before it would have told Dynamo which sizes change: it is traced as if alone.
    torch._dynamo.pgo.reset_code_state()
    clear_reports()
    ids, context = case.ids, case.context
    tokens = (token.view(1, 1) for token in ids[context:])
    if not case.reads:
        return Decoder(way, copy.deepcopy(truth), tokens)
    cache = new_cache(way.model, case.kind, len(ids))
    keep = "logits_to_keep" in inspect.signature(way.model.forward).parameters
    extra = {"logits_to_keep": 1} if keep else {}

    def read() -> int:
        out = way.step(ids[None, :context], past_key_values=cache, use_cache=True, **extra)
        return int(out.logits[0, -1].argmax())

    decoder = Decoder(way, cache, tokens)
    decoder.first = timed(read, ids.device)
    for layer, source in zip(cache.layers, truth.layers, strict=True):
        layer.keys.copy_(source.keys)
        layer.values.copy_(source.values)
    return decoder


def _checked(decoder: Decoder, eager: Decoder, case: _Case) -> Row:
    """The row of a way that has warmed up; its note says why it is not to be timed."""
    row = Row(case.kind, case.context, decoder.way.name, decoder.way.dense)
    pairs = [(a.double(), b.double()) for a, b in zip(decoder.logits, eager.logits, strict=True)]
    row.error = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    row.kl = statistics.fmean(_kl(b, a) for a, b in pairs)
    bound = LOGITS_BOUND.get(decoder.logits[0].dtype, 3e-2)
    bound *= max(1.0, len(decoder.cache.layers) / 4) ** 0.5
    graphs = [report.sites for report in reports() if report.count("sparse")]
    decoder.sites = graphs[-1] if graphs else ()
    if not math.isfinite(row.error) or not math.isfinite(row.kl):
        row.note = "not timed: its logits are not finite"
    elif decoder.way.dense and row.error > bound:
        row.note = f"not timed: {row.error:.1e} from eager's logits, allowed {bound:.0e}"
    elif not decoder.way.dense and case.reads and row.kl > KL_BOUND:
        row.note = f"not timed: {row.kl:.1f} nats from eager, allowed {KL_BOUND:.0f}"
    return row


def _kl(truth: Tensor, other: Tensor) -> float:
    p, q = truth.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum())


def _take_turns(
    decoders: Sequence[Decoder],
    rounds: int,
    most_seconds: float,
    reader: Reader,
    device: torch.device,
) -> None:
    """Each round takes one sample of every way, and one of the machine's bandwidth."""
    started = time.perf_counter()
    for number in range(rounds):
        if number >= 3 and time.perf_counter() - started > most_seconds:
            return
        reader.read()
        for decoder in decoders:
            _settle(decoder)
            before = stats()["sparse_steps"]
            decoder.samples.append(timed(decoder, device, STEPS))
            if stats()["sparse_steps"] == before:
                decoder.sites = ()  # it ran dense


def _settle(decoder: Decoder) -> None:
    began = time.perf_counter()
    for _ in range(SETTLING):
        decoder()
        if time.perf_counter() - began > SETTLING_S:
            return


def _fill_in(row: Row, decoder: Decoder, weights: int, reader: Reader) -> None:
    """What was timed, and what a token had to read."""
    walls = sorted(1e3 * sample.wall / STEPS for sample in decoder.samples)
    row.ms = statistics.median(walls)
    row.ms_p20, row.ms_p80 = walls[len(walls) // 5], walls[4 * len(walls) // 5]
    row.cpu_ms = statistics.median(1e3 * sample.cpu / STEPS for sample in decoder.samples)
    if decoder.first is not None:
        row.first_token_s, row.first_token_cpu_s = decoder.first.wall, decoder.first.cpu
    ordinary = decoder.warm_up[-1]
    row.compile_s = sum(max(s.wall - ordinary.wall, 0.0) for s in decoder.warm_up)
    row.compile_cpu_s = sum(max(s.cpu - ordinary.cpu, 0.0) for s in decoder.warm_up)
    row.sparse = bool(decoder.sites)
    # Half of the way from the first sample on.
    tokens = row.context + (WARM_UP + decoder.taken) // 2
    layers = layers_of(decoder.cache)
    sites = decoder.sites or None
    caches = cache_bytes(layers, tokens, sites, decoder.way.config)
    row.limit_gb_s = reader.best / 1e9
    if caches is not None:
        row.bytes = weights + caches
        row.cache_bytes = caches
