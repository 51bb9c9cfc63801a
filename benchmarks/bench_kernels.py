"""One layer's decode attention: select and attend against every dense path that runs here.

    python benchmarks/bench_kernels.py                    this machine's shapes, about 2 minutes
    python benchmarks/bench_kernels.py --quick            fewer of them
    python benchmarks/bench_kernels.py --attention        all keys: our op and each dense path
    python benchmarks/bench_kernels.py --scorers          what a group's choice and a scorer cost
    python benchmarks/bench_kernels.py --spans            two ranges of keys against all of them
    python benchmarks/bench_kernels.py --autotune         neighbours of the Triton launch tables
    python benchmarks/bench_kernels.py --compare REV      against the kernels of a git revision

Each shape is verified first: the chosen keys against exact fp32 scores of the same index, the
output against fp64 attention over those keys, each dense path against fp64 attention over all; a
shape that fails is not timed. All of a shape's variants are timed in turn in one run, over several
input sets, so that no input waits in a cache that a decode step would find cold.

A row has: the stage ("select", "attend", "loki" for both, "attention" for our op over all keys, or
a dense path), milliseconds, bytes that must move at least (T*(R*index_bytes + 4 for an int8 scale)
+ 2*K*D*bytes per KV head), its share of the bandwidth measured in the same run (a large copy on a
GPU, large reads on a CPU), the ratio to the fastest dense path, device, versions, commit.
`share_of_index_and_kv` counts the bytes of index and keys and values alone, without the scales. On
a CPU the reads take turns with the kernels, and shares are of the least times of both, since others
may use the machine. On a GPU each launched kernel has a row too.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from harness import (
    RESULTS,
    Timing,
    checkout,
    copy_bandwidth,
    draw_lines,
    importable,
    input_sets,
    measure,
    readers,
    require,
    run_python,
    stamp,
    table,
    timing_fields,
    traffic_fields,
    write_rows,
)
from loki_compile.kernels import reference
from loki_compile.kernels.fused import index_rows
from loki_compile.kernels.ops import attend, attention, select, update_pages
from loki_compile.kernels.positions import span_ranges, visible_slots
from loki_compile.kernels.spans import Spans, heads_from
from torch import Tensor

try:  # CPU builds of torch come without Triton
    from loki_compile.kernels import triton_attend, triton_select
    from loki_compile.kernels.triton_launch import attend_launch, device_of, select_launch
    from triton import next_power_of_2
except ImportError:
    triton_attend = triton_select = None

COUNT_Q16 = 1 << 16  # `top_k` is a count
DensePath = Callable[["Inputs"], Tensor]
BOUND = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}


@dataclass(frozen=True)
class Shape:
    """B sequences, Hkv KV heads that serve `group` query heads each, T cached tokens, D dims."""

    batch: int
    kv_heads: int
    group: int
    tokens: int
    head_dim: int
    top_k: int
    rank: int
    dtype: torch.dtype
    index_dtype: torch.dtype

    def dense_bytes(self) -> int:
        return self.batch * self.kv_heads * 2 * self.tokens * self.head_dim * self.dtype.itemsize

    def select_bytes(self) -> int:
        rows = self.batch * self.kv_heads * self.tokens
        return rows * self.rank * self.index_dtype.itemsize + self.scale_bytes()

    def scale_bytes(self) -> int:
        return self.batch * self.kv_heads * self.tokens * 4 * (self.index_dtype == torch.int8)

    def attend_bytes(self) -> int:
        keys = min(self.top_k, self.tokens)
        return self.batch * self.kv_heads * 2 * keys * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True)
class Inputs:
    """q (B, Hq, 1, D), k and v (B, Hkv, T, D), index and its scale, query basis (Hkv, D, R)."""

    q: Tensor
    k: Tensor
    v: Tensor
    index: Tensor
    index_scale: Tensor | None
    basis: Tensor


def make_inputs(shape: Shape, device: str, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device)

    cached = (shape.batch, shape.kv_heads, shape.tokens, shape.head_dim)
    q = randn(shape.batch, shape.kv_heads * shape.group, 1, shape.head_dim).to(shape.dtype)
    k, v = randn(*cached).to(shape.dtype), randn(*cached).to(shape.dtype)
    full = torch.linalg.qr(randn(shape.kv_heads, shape.head_dim, shape.head_dim)).Q
    basis = full[..., : shape.rank].contiguous()
    index, scale = index_rows(k, basis, shape.index_dtype)
    return Inputs(q, k, v, index, scale, basis)


def select_options(shape: Shape) -> dict:
    options = dict(
        scale=shape.head_dim**-0.5, top_k=shape.top_k, keep_q16=COUNT_Q16, sink=4, recent=32,
        min_keys=1024, per_head=False,
    )  # fmt: skip
    # A revision that `--compare` takes may not have all of them yet.
    known = {argument.name for argument in select._schema.arguments}
    return {name: value for name, value in options.items() if name in known}


def choose(x: Inputs, shape: Shape) -> Tensor:
    return select(x.q, x.basis, x.index, x.index_scale, None, None, **select_options(shape))


def read(x: Inputs, shape: Shape, positions: Tensor) -> Tensor:
    return attend(x.q, x.k, x.v, positions, None, scale=shape.head_dim**-0.5)


def read_all(x: Inputs, shape: Shape) -> Tensor:
    return attention(x.q, x.k, x.v, None, scale=shape.head_dim**-0.5)


def packed(x: Inputs, shape: Shape) -> Tensor:
    """Query heads of a KV group as rows: (B, Hkv, G, D), a view."""
    return x.q.view(shape.batch, shape.kv_heads, shape.group, shape.head_dim)


def packed_matmul(x: Inputs, shape: Shape) -> Tensor:
    scores = packed(x, shape) @ x.k.transpose(-1, -2) * shape.head_dim**-0.5
    return scores.float().softmax(-1).to(x.v.dtype) @ x.v


def repeated(x: Inputs, shape: Shape) -> Tensor:
    """What a model with a mask does eagerly: K and V copied for every query head."""
    k, v = (t.repeat_interleave(shape.group, 1) for t in (x.k, x.v))
    return F.scaled_dot_product_attention(x.q, k, v)


def dense_paths(shape: Shape, device: str) -> dict[str, DensePath]:
    """Every dense path to try here, by name; each returns (B, Hq, 1, D) up to a view."""
    paths: dict[str, DensePath] = {
        "matmul packed": lambda x: packed_matmul(x, shape),
        "sdpa packed": lambda x: F.scaled_dot_product_attention(packed(x, shape), x.k, x.v),
        "sdpa enable_gqa": lambda x: F.scaled_dot_product_attention(x.q, x.k, x.v, enable_gqa=True),
        "sdpa repeated": lambda x: repeated(x, shape),
    }
    return paths | _gpu_paths(shape) if device.startswith("cuda") else paths


def _gpu_paths(shape: Shape) -> dict[str, DensePath]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    paths: dict[str, DensePath] = {}
    for backend in (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
    ):

        def through(x: Inputs, backend=backend) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(packed(x, shape), x.k, x.v)

        paths[f"sdpa packed {backend.name.lower()}"] = through

    if shape.tokens in FLEX_TOKENS:
        from torch.nn.attention.flex_attention import flex_attention

        torch._dynamo.reset()  # each shape compiles its own, and none is refused
        compiled = torch.compile(flex_attention, dynamic=False)
        paths["flex_attention"] = lambda x: compiled(x.q, x.k, x.v, enable_gqa=True)

    def flashinfer(x: Inputs) -> Tensor:
        import flashinfer

        assert shape.batch == 1, "its single-request decode takes one sequence"
        return flashinfer.single_decode_with_kv_cache(x.q[0, :, 0], x.k[0], x.v[0], kv_layout="HND")

    def flash_attn(x: Inputs) -> Tensor:
        from flash_attn import flash_attn_with_kvcache

        q, k, v = (t.transpose(1, 2) for t in (x.q, x.k, x.v))
        return flash_attn_with_kvcache(q, k, v).transpose(1, 2)

    return {**paths, "flashinfer": flashinfer, "flash_attn": flash_attn}


def exact(x: Inputs, shape: Shape, positions: Tensor | None = None) -> Tensor:
    """fp64 attention, over all keys or over the chosen positions; (B, Hkv, G, D)."""
    k, v, q = x.k.double(), x.v.double(), packed(x, shape).double()
    if positions is not None:
        at = positions[:, :, 0].long().clamp_min(0)[..., None].expand(-1, -1, -1, shape.head_dim)
        k, v = k.gather(2, at), v.gather(2, at)
    scores = q @ k.transpose(-1, -2) * shape.head_dim**-0.5
    if positions is not None:
        scores = scores.masked_fill(positions < 0, float("-inf"))
    return scores.softmax(-1) @ v


def check_choice(x: Inputs, shape: Shape, positions: Tensor) -> None:
    """The chosen keys are the best by exact scores of the index, up to rounding at the threshold.

    Raises:
      AssertionError: a wrong count, a repeated or misplaced key, or a key better than a chosen one.
    """
    rows = x.index.float() * (1.0 if x.index_scale is None else x.index_scale)
    low = packed(x, shape).float() @ x.basis
    scores = (low @ rows.transpose(-1, -2)).amax(2) * shape.head_dim**-0.5
    keys = min(shape.top_k, shape.tokens)
    for batch, head in [(b, h) for b in range(shape.batch) for h in range(shape.kv_heads)]:
        chosen = positions[batch, head, 0].long()
        chosen = chosen[chosen >= 0]
        assert chosen.numel() == keys, f"{chosen.numel()} keys chosen, {keys} wanted"
        assert bool((chosen.diff() > 0).all()), "positions do not ascend"
        always = {*range(4), *range(shape.tokens - 32, shape.tokens)}
        assert always <= set(chosen.tolist()), "first and last keys are not all kept"
        left = torch.ones(shape.tokens, dtype=torch.bool, device=chosen.device)
        left[chosen] = False
        free = torch.tensor([c for c in chosen.tolist() if c not in always], device=chosen.device)
        if free.numel() and bool(left.any()):
            worst, best = scores[batch, head][free].min(), scores[batch, head][left].max()
            slack = 2e-2 * float(scores[batch, head].abs().max())
            assert float(worst) >= float(best) - slack, f"left out {best}, chose {worst}"


def verify(shape: Shape, device: str, paths: dict[str, DensePath]) -> dict[str, DensePath]:
    """The dense paths that run on this shape.

    Raises:
      AssertionError: one of them, or `select` or `attend`, gives a wrong result.
    """
    x = make_inputs(shape, device, seed=99)
    positions = choose(x, shape)
    check_choice(x, shape, positions)
    bound = BOUND[shape.dtype]
    got = read(x, shape, positions).view(shape.batch, shape.kv_heads, shape.group, -1)
    require("loki::attend", got, exact(x, shape, positions), bound)
    truth = exact(x, shape)
    require("loki::attention", read_all(x, shape).view(truth.shape), truth, bound)
    running: dict[str, DensePath] = {}
    for name, path in paths.items():
        try:
            out = path(x)
        except Exception as error:
            print(f"not here: {name}: {type(error).__name__}: {str(error)[:80]}", file=sys.stderr)
            continue
        require(name, out.reshape(truth.shape), truth, bound)
        running[name] = path
    return running


def launched_kernels(shape: Shape, inputs: list[Inputs]) -> dict[str, list[Callable[[], None]]]:
    """Each launch of the sparse path alone, over the inputs; for the device of the Triton path."""
    launches: dict[str, list[Callable[[], None]]] = {}
    for x in inputs:
        positions, _, stages = triton_select.select_stages(
            x.q, x.basis, x.index, x.index_scale, None, None, **select_options(shape)
        )
        _, more = triton_attend.attend_stages(
            x.q, x.k, x.v, positions, None, scale=shape.head_dim**-0.5
        )
        for stage in (*stages, *more):
            stage.run()  # the next ones need what it writes
            launches.setdefault(f"kernel {stage.name}", []).append(stage.run)
    return launches


def bench(
    shape: Shape, device: str, bandwidth: float, budget_s: float, kernels: bool
) -> list[dict]:
    paths = verify(shape, device, dense_paths(shape, device))
    # Enough inputs that nothing the sparse path reads is still in the last cache.
    sets = input_sets(shape.select_bytes() + shape.attend_bytes(), device)
    room = (8 << 30) if device == "cpu" else (64 << 30)
    sets = max(1, min(sets, room // (shape.dense_bytes() + shape.select_bytes())))
    inputs = [make_inputs(shape, device, seed) for seed in range(sets)]
    chosen = [choose(x, shape) for x in inputs]
    variants: dict[str, list[Callable[[], Tensor]]] = {
        "select": [lambda x=x: choose(x, shape) for x in inputs],
        "attend": [lambda x=x, p=p: read(x, shape, p) for x, p in zip(inputs, chosen, strict=True)],
        "loki": [lambda x=x: read(x, shape, choose(x, shape)) for x in inputs],
    }
    variants["attention"] = [lambda x=x: read_all(x, shape) for x in inputs]
    variants |= {name: [lambda x=x, p=p: p(x) for x in inputs] for name, p in paths.items()}
    if kernels:
        variants |= launched_kernels(shape, inputs)
    timings, bandwidth = timed(variants, device, budget_s, bandwidth)
    fastest = min(paths, key=lambda name: timings[name].median_ms)
    moved = {
        "select": shape.select_bytes(),
        "attend": shape.attend_bytes(),
        "loki": shape.select_bytes() + shape.attend_bytes(),
        "attention": shape.dense_bytes(),
        "kernel list": shape.select_bytes(),
        "kernel attend": shape.attend_bytes(),
    }
    floor_ms = (moved["loki"] - shape.scale_bytes()) / bandwidth * 1e3
    shared = {
        **stamp(device),
        "bench": "kernels",
        **fields_of(shape),
        "input_sets": sets,
        "fastest_dense": fastest,
    }
    rows = []
    for name, timing in timings.items():
        row = {**shared, "stage": name, **timing_fields(timing)}
        if name in paths or name in moved:
            size = moved.get(name, shape.dense_bytes())
            row |= traffic_fields(size, best_ms(timing, device), bandwidth)
        if name == "loki":
            row["share_of_index_and_kv"] = floor_ms / best_ms(timing, device)
        if not name.startswith("kernel "):
            row["vs_fastest_dense"] = timings[fastest].median_ms / timing.median_ms
        rows.append(row)
    return rows


def fields_of(shape: Shape) -> dict:
    return {
        name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
        for name, value in asdict(shape).items()
    }


def best_ms(timing: Timing, device: str) -> float:
    """What is compared with a bandwidth: the median on a GPU, the least on a CPU."""
    return timing.least_ms if device == "cpu" else timing.median_ms


def timed(
    variants: dict[str, list[Callable[[], Tensor]]], device: str, budget_s: float, bandwidth: float
) -> tuple[dict[str, Timing], float]:
    """The variants' times, and bytes per second: `bandwidth` on a GPU, read in turn on a CPU."""
    if device != "cpu":
        return measure(variants, device, budget_s=budget_s), bandwidth
    reads = readers(device, READ_BYTES)
    timings = measure({**variants, **reads}, device, budget_s=budget_s)
    least = min(timings.pop(name).least_ms for name in reads)
    return timings, READ_BYTES / least * 1e3


READ_BYTES = 1 << 28


def bench_attention(device: str, budget_s: float, bandwidth: float) -> list[dict]:
    """All keys by our op and by every dense path, by length and dtype."""
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for tokens in (128, 512, 2048, 16384, 131072):
            shape = Shape(1, 2, 4, tokens, 128, tokens, 32, dtype, dtype)
            paths = verify(shape, device, dense_paths(shape, device))
            sets = input_sets(shape.dense_bytes(), device)
            inputs = [make_inputs(shape, device, seed) for seed in range(sets)]
            variants = {"attention": [lambda x=x, s=shape: read_all(x, s) for x in inputs]}
            for name, path in paths.items():
                variants[name] = [lambda x=x, p=path: p(x) for x in inputs]
            timings, reached = timed(variants, device, budget_s, bandwidth)
            fastest = min(paths, key=lambda name: best_ms(timings[name], device))
            for name, timing in timings.items():
                row = {**stamp(device), "bench": "attention", **fields_of(shape), "stage": name}
                row |= {"input_sets": sets, "fastest_dense": fastest, **timing_fields(timing)}
                mine = best_ms(timing, device)
                row |= traffic_fields(shape.dense_bytes(), mine, reached)
                row["vs_fastest_dense"] = best_ms(timings[fastest], device) / mine
                rows.append(row)
    return rows


def shapes_of(device: str, quick: bool) -> list[Shape]:
    bf16, int8 = torch.bfloat16, torch.int8
    if device.startswith("cuda"):
        grid = [(8, 131072), (1, 131072), (8, 32768)] if quick else GPU_GRID
        return [Shape(b, 8, 4, t, 128, min(2048, t // 2), 32, bf16, int8) for b, t in grid]
    cells = [(131072, 512, bf16), (131072, 16384, bf16), (16384, 512, bf16)]
    if not quick:
        cells += [(131072, 512, int8), (131072, 16384, int8), (16384, 512, int8)]
        cells += [(4096, 512, bf16), (4096, 512, int8)]
    cpu = [Shape(1, 2, 4, t, 128, k, 32, bf16, index) for t, k, index in cells]
    if not quick:
        cpu.append(Shape(1, 2, 4, 131072, 128, 512, 32, torch.float32, torch.float32))
    return cpu


# Spans of 8 KV heads: all alike, of many lengths, and half of the heads reading all keys.
SPANS = {
    "alike": "0.5N",
    "ragged": "1N,0.75N,0.75N,0.5N,0.5N,0.25N,0.25N,256",
    "two classes": "1N,1N,1N,1N,256,256,256,256",
    "alike, a quarter": "0.25N",
    "ragged, a quarter": "1N,0.25N,0.25N,0.25N,0.125N,0.125N,256,256",
    "two classes, a quarter": "1N,1N,256,256,256,256,256,256",
}


def bench_spans(device: str, rounds: int) -> list[dict]:
    """`attention` in two ranges against all keys: one layer of 8 KV heads behind 64 sinks.

    Milliseconds of wall time and, on a CPU, of processor time (all threads), the least of rounds in
    which every variant runs in turn; shares of them, and of the keys' bytes.
    """
    shape = Shape(1, 8, 4, 32768, 128, 32768, 32, torch.bfloat16, torch.bfloat16)
    inputs = [make_inputs(shape, device, seed) for seed in range(2)]
    every = {name: Spans(heads_from(text), 64) for name, text in SPANS.items()}
    ranges: dict[str, Tensor | None] = {"all keys": None}
    for name, spans in every.items():
        slots = visible_slots(inputs[0].q, inputs[0].k, None)
        ranges[name] = span_ranges(slots, shape.kv_heads, *spans.numbers)
        _check_spans(inputs[0], shape, ranges[name], name)
    wall: dict[str, list[float]] = {name: [] for name in ranges}
    spent: dict[str, list[float]] = {name: [] for name in ranges}
    for _ in range(rounds):
        for x, (name, read) in itertools.product(inputs, ranges.items()):
            begin, used = time.perf_counter(), time.process_time()
            attention(x.q, x.k, x.v, None, scale=shape.head_dim**-0.5, ranges=read)
            if device != "cpu":
                torch.cuda.synchronize(device)
            wall[name].append((time.perf_counter() - begin) * 1e3)
            spent[name].append((time.process_time() - used) * 1e3)
    rows = []
    for name in ranges:
        kept = every[name].share(shape.tokens) if name in every else 1.0
        row = {**stamp(device), "bench": "spans", **fields_of(shape), "spans": name, "kept": kept}
        for column, samples in (("wall_ms", wall), ("cpu_ms", spent)):
            row[column] = min(samples[name])
            row[f"{column}_share"] = row[column] / min(samples["all keys"])
            row[f"kept_of_{column}_share"] = kept / row[f"{column}_share"]
        rows.append(row)
    return rows


def _check_spans(x: Inputs, shape: Shape, ranges: Tensor | None, what: str) -> None:
    options = {"scale": shape.head_dim**-0.5, "ranges": ranges}
    truth = reference.attention(x.q.double(), x.k, x.v, None, **options)
    found = attention(x.q, x.k, x.v, None, **options)
    require(f"spans {what}", found.double(), truth, BOUND[shape.dtype])


PAGE = 16


def bench_scorers(device: str, rounds: int) -> list[dict]:
    """`select` alone by scorer and by how a group chooses, bf16 keys, top_k an eighth of them.

    Milliseconds of wall time and, on a CPU, of processor time (all threads), medians over rounds in
    which every variant runs in turn; `vs_maximum` is the ratio of either to that of the same scorer
    by maximum.
    """
    rows = []
    for tokens in (8192, 32768):
        shape = Shape(1, 2, 4, tokens, 128, tokens // 8, 32, torch.bfloat16, torch.bfloat16)
        sets = input_sets(shape.select_bytes(), device)
        inputs = [make_inputs(shape, device, seed) for seed in range(sets)]
        kinds = [(s, p) for s in ("low rank", "exact", "pages") for p in (False, True)]
        calls = {kind: [_scored(x, shape, *kind) for x in inputs] for kind in kinds}
        for scorer, by_probability in kinds:
            _check_scored(*calls[scorer, by_probability][0], f"{scorer} {by_probability}")
        wall: dict[tuple[str, bool], list[float]] = {kind: [] for kind in kinds}
        spent: dict[tuple[str, bool], list[float]] = {kind: [] for kind in kinds}
        for _ in range(rounds):
            for kind in kinds:
                for arguments, options in calls[kind]:
                    begin, used = time.perf_counter(), time.process_time()
                    select(*arguments, **options)
                    if device != "cpu":
                        torch.cuda.synchronize(device)
                    wall[kind].append((time.perf_counter() - begin) * 1e3)
                    spent[kind].append((time.process_time() - used) * 1e3)
        for scorer, by_probability in kinds:
            mine = {"wall_ms": wall, "cpu_ms": spent}
            row = {
                **stamp(device), "bench": "scorers", "tokens": tokens, "scorer": scorer,
                "group": "probability" if by_probability else "maximum", "top_k": shape.top_k,
            }  # fmt: skip
            for name, samples in mine.items():
                row[name] = statistics.median(samples[scorer, by_probability])
                row[f"{name}_vs_maximum"] = row[name] / statistics.median(samples[scorer, False])
            rows.append(row)
    return rows


def _scored(x: Inputs, shape: Shape, scorer: str, by_probability: bool) -> tuple[tuple, dict]:
    """Arguments of `select`."""
    options = {**select_options(shape), "by_probability": by_probability}
    if scorer == "low rank":
        return (x.q, x.basis, x.index, x.index_scale, None, None), options
    if scorer == "exact":
        return (x.q, None, x.k, None, None, None), options
    pages = x.k.new_empty((*x.k.shape[:2], -(-shape.tokens // PAGE), 2 * shape.head_dim))
    update_pages(pages, x.k, torch.ones(1, 1, 1, 1, dtype=torch.bool, device=x.k.device), page=PAGE)
    return (x.q, None, pages, None, None, None), {**options, "page": PAGE, "keys": shape.tokens}


def _check_scored(arguments: tuple, options: dict, what: str) -> None:
    """The choice is that of the definition, up to rounding at the threshold."""
    found = select(*arguments, **options).cpu()
    moved = [None if a is None else a.cpu() for a in arguments]
    ranked_by = ("scale", "per_head", "page", "keys", "by_probability")
    score = reference.scores(*moved[:5], **{n: options[n] for n in ranked_by if n in options})
    expected = reference.select(*moved, **options)
    for row in (found != expected).any(-1).nonzero().tolist():
        mine, theirs = set(found[tuple(row)].tolist()), set(expected[tuple(row)].tolist())
        gained = score[tuple(row)][sorted(mine - theirs)]
        lost = score[tuple(row)][sorted(theirs - mine)]
        assert len(gained) == len(lost), f"{what}: a wrong count of keys"
        assert bool((gained >= lost.max() - 1e-4).all()), f"{what}: a better key was left out"


GPU_GRID = [(b, t) for b in (1, 8) for t in (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)]


FLEX_TOKENS = (32768, 131072)


def autotune(shape: Shape, device: str, budget_s: float) -> None:
    """Print the neighbours of the tables' launches, fastest first; the table's own is marked."""
    x = make_inputs(shape, device, seed=0)
    where = device_of(x.q)
    block_r = max(32 if shape.index_dtype == torch.int8 else 16, next_power_of_2(shape.rank))
    table_select = select_launch(
        where, group=shape.group, block_r=block_r, index_bytes=shape.index_dtype.itemsize,
        slots=shape.top_k,
    )  # fmt: skip
    table_attend = attend_launch(
        where, group=shape.group, block_d=next_power_of_2(shape.head_dim),
        bytes_each=shape.dtype.itemsize,
    )  # fmt: skip
    positions = choose(x, shape)
    out = read(x, shape, positions)
    tuned: list[tuple[str, object, Callable[[object], Tensor], Tensor, dict]] = [
        (
            "select", table_select,
            lambda launch: triton_select.select(
                x.q, x.basis, x.index, x.index_scale, None, None, **select_options(shape),
                launch=launch,
            ),
            positions,
            dict(
                block_t=[table_select.block_t // 2, table_select.block_t, table_select.block_t * 2],
                warps=[4, 8], stages=[2, 3, 4], programs=[2, 4, 6],
            ),
        ),
        (
            "attend", table_attend,
            lambda launch: triton_attend.attend(
                x.q, x.k, x.v, positions, None, scale=shape.head_dim**-0.5, launch=launch
            ),
            out,
            dict(block_n=[32, 64, 128], warps=[4, 8], stages=[1, 2, 3], programs=[2, 4, 6]),
        ),
    ]  # fmt: skip
    for name, own, run, truth, choices in tuned:
        neighbours = [
            dataclasses.replace(own, **dict(zip(choices, values, strict=True)))
            for values in itertools.product(*choices.values())
        ]
        launches = {}
        for launch in {own, *neighbours}:
            try:
                got = run(launch)
            except Exception as error:  # does not fit this device
                print(f"not here: {launch}: {str(error)[:60]}", file=sys.stderr)
                continue
            require(f"{name} {launch}", got, truth, BOUND[shape.dtype])
            launches[launch] = functools.partial(run, launch)
        timings = measure({str(k): v for k, v in launches.items()}, device, budget_s=budget_s)
        fastest = sorted(timings, key=lambda launch: timings[launch].median_ms)
        print(f"{name} B={shape.batch} T={shape.tokens}")
        for launch in dict.fromkeys([*fastest[:8], str(own)]):
            mark = " <- table" if launch == str(own) else ""
            print(f"  {timings[launch].median_ms * 1e3:8.1f} us  {launch}{mark}")


def compare(rev: str, device: str, rounds: int, bound: float) -> int:
    """Times this tree's and a revision's kernels in turn; 1 if ours are slower than `bound`."""
    command = ["benchmarks/bench_kernels.py", "--quick", "--rows-only", "--device", device]
    samples: dict[str, dict[str, list[float]]] = {"here": {}, rev: {}}
    here = RESULTS.parent.parent
    with checkout(rev) as tree, importable(tree) as theirs, importable(here) as ours:
        for _ in range(rounds):
            for name, env in (("here", ours), (rev, theirs)):
                for line in run_python(command, env).splitlines():
                    row = json.loads(line)
                    if row["stage"] in ("select", "attend", "loki"):
                        key = f"{row['stage']} B={row['batch']} T={row['tokens']} K={row['top_k']}"
                        samples[name].setdefault(key, []).append(row["median_ms"])
    rows = []
    for key in samples["here"]:
        if key in samples[rev]:
            mine, their = (statistics.median(samples[n][key]) for n in ("here", rev))
            rows.append({"what": key, "here_ms": mine, f"{rev}_ms": their, "ratio": mine / their})
    print(table(rows, ["what", "here_ms", f"{rev}_ms", "ratio"]))
    slower = [row for row in rows if row["ratio"] > bound]
    print(f"{len(slower)} of {len(rows)} slower than {bound} x {rev}")
    return int(bool(slower))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="the shapes of the stated goals only")
    parser.add_argument("--scorers", action="store_true", help="select by scorer and group choice")
    parser.add_argument("--attention", action="store_true", help="our op and dense paths by length")
    parser.add_argument("--spans", action="store_true", help="two ranges of keys against all")
    parser.add_argument("--autotune", action="store_true", help="try other launches (GPU)")
    parser.add_argument("--budget", type=float, default=4.0, help="seconds of timing per shape")
    parser.add_argument("--rows-only", action="store_true", help="JSON lines on stdout, no files")
    parser.add_argument("--compare", metavar="REV", help="time against this git revision")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of --compare, ...")
    parser.add_argument("--bound", type=float, default=1.1, help="slowest allowed by --compare")
    args = parser.parse_args()
    if args.compare:
        return compare(args.compare, args.device, args.rounds, args.bound)
    on_gpu = args.device.startswith("cuda")
    if args.scorers:
        scored = bench_scorers(args.device, args.rounds * 5)
        times = ["wall_ms", "wall_ms_vs_maximum", "cpu_ms", "cpu_ms_vs_maximum"]
        print(table(scored, ["tokens", "scorer", "group", *times]))
        print("written to", write_rows(f"scorers_{args.device.partition(':')[0]}", scored))
        return 0
    if args.spans:
        spans = bench_spans(args.device, args.rounds * 10)
        times = ["wall_ms", "wall_ms_share", "cpu_ms", "cpu_ms_share", "kept_of_cpu_ms_share"]
        print(table(spans, ["spans", "kept", *times]))
        print("written to", write_rows(f"spans_{args.device.partition(':')[0]}", spans))
        return 0
    if args.autotune:
        for shape in shapes_of(args.device, quick=True):
            autotune(shape, args.device, args.budget)
        return 0
    bandwidth = copy_bandwidth(args.device) if on_gpu else 0.0
    if args.attention:
        rows = bench_attention(args.device, args.budget, bandwidth)
        columns = ["tokens", "dtype", "stage", "median_ms", "least_ms"]
        print(table(rows, [*columns, "share_of_bandwidth", "vs_fastest_dense"]))
        print("written to", write_rows(f"attention_{args.device.partition(':')[0]}", rows))
        return 0
    rows: list[dict] = []
    for shape in shapes_of(args.device, args.quick):
        new = bench(shape, args.device, bandwidth, args.budget, kernels=on_gpu)
        rows += new
        if args.rows_only:
            print("\n".join(json.dumps(row) for row in new), flush=True)
            continue
        columns = ["batch", "tokens", "top_k", "index_dtype", "stage", "median_ms"]
        print(table(new, [*columns, "share_of_bandwidth", "vs_fastest_dense"]), flush=True)
    if not args.rows_only:
        name = "kernels_cpu" if args.device == "cpu" else "kernels_gpu"
        print("written to", write_rows(name, rows))
        draw(rows, name)
    return 0


def draw(rows: list[dict], name: str) -> None:
    """Milliseconds against cached tokens: the fastest dense path, and the sparse one by index."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        label = f"B={row['batch']} {row['dtype']} "
        if row["stage"] == row["fastest_dense"]:
            series.setdefault(label + "fastest dense", []).append((row["tokens"], row["median_ms"]))
        elif row["stage"] == "loki":
            label += f"loki top_k={row['top_k']} {row['index_dtype']} index"
            series.setdefault(label, []).append((row["tokens"], row["median_ms"]))
    draw_lines(
        RESULTS / f"{name}.png",
        series,
        title=f"Decode attention of one layer, {rows[0]['device']}",
        x_label="cached tokens",
        y_label="milliseconds",
    )


if __name__ == "__main__":
    sys.exit(main())
