"""One layer's decode attention: select and attend against every dense path that runs here.

    python benchmarks/bench_kernels.py                    this machine's shapes, about 2 minutes
    python benchmarks/bench_kernels.py --quick            fewer of them
    python benchmarks/bench_kernels.py --compare REV      against the kernels of a git revision

Each shape is verified first: the chosen keys against exact fp32 scores of the same index, the
output against fp64 attention over those keys, each dense path against fp64 attention over all; a
shape that fails is not timed. All of a shape's variants are timed in turn in one run, over several
input sets, so that no input waits in a cache that a decode step would find cold.

A row has: the stage ("select", "attend", "loki" for both, or a dense path), milliseconds, bytes
that must move at least (design: T*R*index_bytes + 2*K*D*bytes per KV head), the share of the read
bandwidth measured in the same run, the ratio to the fastest dense path, device, versions, commit.
On a GPU `--kernels` adds the time of each launched kernel, from the profiler.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from harness import (
    RESULTS,
    checkout,
    draw_lines,
    importable,
    input_sets,
    measure,
    read_bandwidth,
    require,
    run_python,
    stamp,
    table,
    timing_fields,
    traffic_fields,
    write_rows,
)
from loki_compile.kernels.ops import attend, index_rows, select
from torch import Tensor

COUNT_Q16 = 1 << 16  # `top_k` is a count
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
        row = self.rank * self.index_dtype.itemsize + 4 * (self.index_dtype == torch.int8)
        return self.batch * self.kv_heads * self.tokens * row

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


def choose(x: Inputs, shape: Shape) -> Tensor:
    return select(
        x.q,
        x.basis,
        x.index,
        x.index_scale,
        None,
        None,
        scale=shape.head_dim**-0.5,
        top_k=shape.top_k,
        keep_q16=COUNT_Q16,
        sink=4,
        recent=32,
        per_head=False,
    )


def read(x: Inputs, shape: Shape, positions: Tensor) -> Tensor:
    return attend(x.q, x.k, x.v, positions, None, scale=shape.head_dim**-0.5)


def packed(x: Inputs, shape: Shape) -> Tensor:
    """Query heads of a KV group as rows: (B, Hkv, G, D), a view."""
    return x.q.view(shape.batch, shape.kv_heads, shape.group, shape.head_dim)


def packed_matmul(x: Inputs, shape: Shape) -> Tensor:
    scores = packed(x, shape) @ x.k.transpose(-1, -2) * shape.head_dim**-0.5
    return scores.float().softmax(-1).to(x.v.dtype) @ x.v


def dense_paths(shape: Shape, device: str) -> dict[str, Callable[[Inputs], Tensor]]:
    """Every dense path that runs here, by name; each returns (B, Hq, 1, D) up to a view."""
    paths: dict[str, Callable[[Inputs], Tensor]] = {
        "matmul packed": lambda x: packed_matmul(x, shape),
        "sdpa packed": lambda x: F.scaled_dot_product_attention(packed(x, shape), x.k, x.v),
        "sdpa enable_gqa": lambda x: F.scaled_dot_product_attention(x.q, x.k, x.v, enable_gqa=True),
    }
    if device.startswith("cuda"):
        paths |= _gpu_paths(shape)
    probe = make_inputs(Shape(**{**asdict(shape), "tokens": 256, "top_k": 64}), device, 0)
    return {name: path for name, path in paths.items() if _runs(name, path, probe)}


def _gpu_paths(shape: Shape) -> dict[str, Callable[[Inputs], Tensor]]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    paths: dict[str, Callable[[Inputs], Tensor]] = {}
    for backend in (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
    ):

        def through(x: Inputs, backend=backend) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(packed(x, shape), x.k, x.v)

        paths[f"sdpa packed {backend.name.lower()}"] = through

    def flex(x: Inputs) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        compiled = _once("flex", lambda: torch.compile(flex_attention, dynamic=False))
        return compiled(x.q, x.k, x.v, enable_gqa=True)

    def flashinfer(x: Inputs) -> Tensor:
        import flashinfer

        assert shape.batch == 1, "its single-request decode takes one sequence"
        return flashinfer.single_decode_with_kv_cache(x.q[0, :, 0], x.k[0], x.v[0], kv_layout="HND")

    def flash_attn(x: Inputs) -> Tensor:
        from flash_attn import flash_attn_with_kvcache

        q, k, v = (t.transpose(1, 2) for t in (x.q, x.k, x.v))
        return flash_attn_with_kvcache(q, k, v).transpose(1, 2)

    return {**paths, "flex_attention": flex, "flashinfer": flashinfer, "flash_attn": flash_attn}


_made: dict[str, Callable[..., Tensor]] = {}


def _once(name: str, make: Callable[[], Callable[..., Tensor]]) -> Callable[..., Tensor]:
    return _made.setdefault(name, make())


def _runs(name: str, path: Callable[[Inputs], Tensor], probe: Inputs) -> bool:
    try:
        path(probe)
    except Exception as error:
        print(f"not here: {name}: {type(error).__name__}: {str(error)[:80]}", file=sys.stderr)
        return False
    return True


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


def verify(shape: Shape, device: str, paths: dict[str, Callable[[Inputs], Tensor]]) -> None:
    x = make_inputs(shape, device, seed=99)
    positions = choose(x, shape)
    check_choice(x, shape, positions)
    bound = BOUND[shape.dtype]
    got = read(x, shape, positions).view(shape.batch, shape.kv_heads, shape.group, -1)
    require("loki::attend", got, exact(x, shape, positions), bound)
    truth = exact(x, shape)
    for name, path in paths.items():
        require(name, path(x).reshape(truth.shape), truth, bound)


def bench(shape: Shape, device: str, bandwidth: float, budget_s: float) -> list[dict]:
    paths = dense_paths(shape, device)
    verify(shape, device, paths)
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
    variants |= {name: [lambda x=x, p=p: p(x) for x in inputs] for name, p in paths.items()}
    timings = measure(variants, device, budget_s=budget_s)
    fastest = min(paths, key=lambda name: timings[name].median_ms)
    moved = {
        "select": shape.select_bytes(),
        "attend": shape.attend_bytes(),
        "loki": shape.select_bytes() + shape.attend_bytes(),
    }
    shared = {
        **stamp(device),
        "bench": "kernels",
        **{
            name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
            for name, value in asdict(shape).items()
        },
        "input_sets": sets,
        "fastest_dense": fastest,
    }
    return [
        {
            **shared,
            "stage": name,
            **timing_fields(timing),
            **traffic_fields(moved.get(name, shape.dense_bytes()), timing.median_ms, bandwidth),
            "vs_fastest_dense": timings[fastest].median_ms / timing.median_ms,
        }
        for name, timing in timings.items()
    ]


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


GPU_GRID = [(b, t) for b in (1, 8) for t in (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)]


def kernel_times(shape: Shape, device: str) -> list[dict]:
    """Microseconds of each launched kernel of one sparse call, from the profiler."""
    from torch.profiler import ProfilerActivity, profile

    x = make_inputs(shape, device, seed=0)
    for _ in range(3):
        read(x, shape, choose(x, shape))
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(10):
            read(x, shape, choose(x, shape))
        torch.cuda.synchronize()
    return [
        {"batch": shape.batch, "tokens": shape.tokens, "kernel": e.key, "us": e.device_time}
        for e in trace.key_averages()
        if e.device_time
    ]


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
    parser.add_argument("--kernels", action="store_true", help="also each kernel's time (GPU)")
    parser.add_argument("--budget", type=float, default=4.0, help="seconds of timing per shape")
    parser.add_argument("--rows-only", action="store_true", help="JSON lines on stdout, no files")
    parser.add_argument("--compare", metavar="REV", help="time against this git revision")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of --compare")
    parser.add_argument("--bound", type=float, default=1.1, help="slowest allowed by --compare")
    args = parser.parse_args()
    if args.compare:
        return compare(args.compare, args.device, args.rounds, args.bound)
    bandwidth = read_bandwidth(args.device)
    rows: list[dict] = []
    for shape in shapes_of(args.device, args.quick):
        new = bench(shape, args.device, bandwidth, args.budget)
        rows += new
        if args.rows_only:
            print("\n".join(json.dumps(row) for row in new), flush=True)
            continue
        columns = ["batch", "tokens", "top_k", "index_dtype", "stage", "median_ms"]
        print(table(new, [*columns, "share_of_bandwidth", "vs_fastest_dense"]), flush=True)
        if args.kernels and args.device.startswith("cuda"):
            print(table(kernel_times(shape, args.device), ["kernel", "us"]), flush=True)
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
