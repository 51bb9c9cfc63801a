"""Cache correction and lossless decoding: what they are worth, and what they take.

    python benchmarks/bench_lossless.py correction     the bundled model, every = none, 8, 32, 128
    python benchmarks/bench_lossless.py parting        tokens until greedy paths part
    python benchmarks/bench_lossless.py tokens         lossless tokens against dense ones
    python benchmarks/bench_lossless.py speed          the model of bench_decode.py, by context
    python benchmarks/bench_lossless.py steps          what its sparse and verifying steps take
    python benchmarks/bench_lossless.py real --model FOLDER --prompt 6000    a model with weights
    python benchmarks/bench_lossless.py real-steps --model FOLDER ...        what its steps take

Rows that the file of results holds already are not made again: a run that is stopped goes on where
it was. Times are CPU time of this process with one thread, so that others on the machine do not
count; both sides of a ratio come from one process, in turn. "Dense" is loki's own dense variant.

`correction` decodes a held-out text token by token behind a prompt, and compares each step's logits
with those of dense decoding of the same tokens. `speed` takes keys as those of trained models are,
with a spectrum that falls, and queries that find few of them: behind random ones hardly a draft is
right (see `trained`). Each variant has run before anything is timed; a part in which one is
compiled all the same is made again. What the pace of drafts learns in the timed part is in the
times. `chance` is that a draft was accepted where those before it were.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from bench_decode import DTYPES, build, filled_cache
from harness import RESULTS, stamp, table, write_rows
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import DynamicCache

import loki_compile
from loki_compile.commands.models import encode, load_model, load_tokenizer, read_text
from loki_compile.commands.reference_data import stdlib_text
from loki_compile.deferred import PRICE
from loki_compile.exact_steps import exact, resting
from loki_compile.generation.feed import Feed
from loki_compile.generation.pace import Pace

NAME = "lossless"


def missing(key: dict[str, Any]) -> bool:
    """Whether no row of the results has these fields."""
    path = RESULTS / f"{NAME}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return not any(all(row.get(k) == v for k, v in key.items()) for row in rows)


def keep(key: dict[str, Any], values: dict[str, Any]) -> None:
    row = {**stamp("cpu"), **key, **values}
    write_rows(NAME, [row])
    print(table([row], [*key, *values]), flush=True)


def text_ids(args: argparse.Namespace) -> Tensor:
    """(1, T) of held-out text."""
    text = read_text(args.text) if args.text else stdlib_text("held_out")
    return encode(load_tokenizer(args.model), text[: 16 * max(args.tokens, args.prompt)])[None]


def prefilled(model: Any, ids: Tensor, read: Any = None) -> tuple[DynamicCache, Tensor]:
    """A cache behind a prompt, and the token behind it (1, 1). `read`: what reads the prompt, a
    compiled model for a cache with room; else it is read uncompiled."""
    cache = DynamicCache(config=model.config)
    logits = (read or model.forward)(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits
    return cache, logits[:, -1:].argmax(-1)


# ------------------------------------------------------------------------------------ correction


def correction(args: argparse.Namespace) -> None:
    base = {"bench": "correction", "model": args.model, "policy": args.policy, "top_k": args.top_k}
    base |= {"prompt": args.prompt, "tokens": args.tokens}
    todo = [n for n in args.every if missing({**base, "every": n})]
    if not todo:
        return
    model = load_model(args.model, device="cpu", dtype="float32")
    ids = text_ids(args)[:, : args.prompt + args.tokens]
    exact = model(input_ids=ids).logits[0, args.prompt - 1 :].log_softmax(-1)
    options = {"policy": args.policy, "top_k": args.top_k}
    model.compile(backend="loki", options=options)
    for every in todo:
        kl, same, seconds = along_text(model, ids, args.prompt, every, exact)
        third = len(kl) // 3
        values = {
            "kl": statistics.mean(kl),
            "kl_last_third": statistics.mean(kl[-third:]),
            "same_token": statistics.mean(same),
            "cpu_ms_per_token": 1e3 * seconds / len(kl),
        }
        keep({**base, "every": every}, values)


def along_text(
    model: Any, ids: Tensor, prompt: int, every: int, exact: Tensor
) -> tuple[list[float], list[float], float]:
    """KL to dense and agreement of each step, and CPU seconds; `every` 0: no correction."""
    cache, _ = prefilled(model, ids[:, :prompt])
    kl, same, seconds = [], [], 0.0
    for at in range(prompt, ids.shape[1]):
        began = time.process_time()
        logits = model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits
        done = at + 1 - prompt
        if every and done % every == 0:
            loki_compile.correct(model, cache, ids[:, at + 1 - every : at + 1])
        if done > 2 * max(every, 32):  # compiled by then
            seconds += time.process_time() - began
        got, truth = logits[0, -1].log_softmax(-1), exact[done]
        kl.append(float((truth.exp() * (truth - got)).sum()))
        same.append(float(got.argmax() == truth.argmax()))
    counted = len(kl) - 2 * max(every, 32)
    return kl, same, seconds / counted * len(kl)


def dense_path(model: Any, ids: Tensor, tokens: int) -> list[int]:
    """Greedy tokens of dense decoding."""
    cache, newest = prefilled(model, ids)
    path = [int(newest)]
    with loki_compile.exact():
        while len(path) < tokens:
            logits = model(input_ids=newest, past_key_values=cache, use_cache=True).logits
            newest = logits[:, -1:].argmax(-1)
            path.append(int(newest))
    return path


def parting(args: argparse.Namespace) -> None:
    """Greedy tokens until a sparse path parts from the dense one, over some prompts."""
    base = {"bench": "parting", "model": args.model, "policy": args.policy, "top_k": args.top_k}
    base |= {"prompt": args.prompt, "paths": args.paths, "tokens": args.each}
    if all(not missing({**base, "every": n}) for n in args.every):
        return
    model = load_model(args.model, device="cpu", dtype="float32")
    model.compile(backend="loki", options={"policy": args.policy, "top_k": args.top_k})
    ids, after = text_ids(args), {every: [] for every in args.every}
    for path in range(args.paths):
        prompt = ids[:, path * 256 : path * 256 + args.prompt]
        dense_cache, newest = prefilled(model, prompt)
        going = {every: (prefilled(model, prompt)[0], []) for every in args.every}
        for made in range(1, args.each + 1):
            with loki_compile.exact():
                logits = model(input_ids=newest, past_key_values=dense_cache, use_cache=True).logits
            following = logits[:, -1:].argmax(-1)
            for every, (cache, fed) in list(going.items()):
                logits = model(input_ids=newest, past_key_values=cache, use_cache=True).logits
                fed.append(newest)
                if every and len(fed) == every:
                    loki_compile.correct(model, cache, torch.cat(fed, 1))
                    fed.clear()
                if logits[0, -1].argmax() != following or made == args.each:
                    after[every].append(made)
                    del going[every]
            if not going:
                break
            newest = following
    for every, lengths in after.items():
        values = {"median": statistics.median(lengths), "mean": statistics.mean(lengths)}
        keep({**base, "every": every}, values)


# ---------------------------------------------------------------------------------------- tokens


def tokens(args: argparse.Namespace) -> None:
    for name in args.dtype:
        base = {"bench": "tokens", "model": args.model, "policy": args.policy, "dtype": name}
        base |= {"prompt": args.prompt, "tokens": args.tokens, "top_k": args.top_k}
        if not missing(base):
            continue
        model = load_model(args.model, device="cpu", dtype=name)
        options = {"policy": args.policy, "top_k": args.top_k}
        model.compile(backend="loki", options=options)
        ids = text_ids(args)
        got = different = parted = accepted = cycles = 0
        starts: Iterator[int] = iter(range(0, ids.shape[1] - args.prompt, args.prompt // 2))
        while got < args.tokens:
            start = next(starts)
            prompt = ids[:, start : start + args.prompt]
            cache, newest = prefilled(model, prompt)
            decoder = loki_compile.LosslessDecoder(model, cache)
            decoder.pace = Eager(decoder.pace.most)
            path = [int(newest)]
            while len(path) < args.each:
                more = decoder.next(newest, most=args.each - len(path))
                newest = more[:, -1:]
                path += more[0].tolist()
                accepted += more.shape[1] - 1
                cycles += 1
            truth = dense_path(model, prompt, args.each)
            wrong = [a != b for a, b in zip(path, truth, strict=True)]
            got, different = got + len(path), different + sum(wrong)
            parted += any(wrong)
        values = {
            "compared": got,
            "different": different,
            "paths": got // args.each,
            "paths_that_part": parted,
            "accepted_per_cycle": accepted / cycles,
        }
        keep(base, values)


class Eager(Pace):
    """Drafts at every cycle, of each length in turn, whatever it takes."""

    def next(self, limit: int) -> int:
        self.cycles += 1
        return min(limit, 1 + self.cycles % self.most)


# ----------------------------------------------------------------------------------------- speed


def speed(args: argparse.Namespace) -> None:
    options: dict[str, Any] = {"top_k": args.top_k, "policy": args.policy}
    for name in args.dtype:
        for context in args.context:
            base = {"bench": "speed", "dtype": name, "context": context, "layers": args.layers}
            base |= {"kv_heads": args.kv_heads, "top_k": args.top_k, "policy": args.policy}
            base |= {"peak": args.peak, "tokens": args.tokens, "dense_first": args.dense_first}
            if missing(base):
                torch._dynamo.reset()
                keep(base, of_bench_model(args, DTYPES[name], context, options))


def trained(model: Any, cache: Any, peak: float) -> None:
    """Keys whose variance falls along the dims, so that few rank them, and queries `peak` times
    as long, so that few keys matter: at 8, scores have a standard deviation of 2.6 and the best
    eighth of the keys misses 7 % of attention, as in trained models. 0 leaves both random."""
    if not peak:
        return
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            layer.self_attn.q_proj.weight.mul_(peak)
            dims = torch.arange(layer.self_attn.head_dim, dtype=torch.float32)
            fall = torch.exp(-dims / 10)
            cache.layers[number].keys.mul_((fall / fall.square().mean().sqrt()).to(model.dtype))


def of_bench_model(
    args: argparse.Namespace, dtype: torch.dtype, context: int, options: dict[str, Any]
) -> dict[str, Any]:
    ways, spare = {}, []
    given_ways = [("lossless", options), ("dense", {"min_context": 1 << 30})]
    for way, given in given_ways[:: -1 if args.dense_first else 1]:
        model = build(dtype, "cpu", args.layers, kv_heads=args.kv_heads)
        if not spare:  # a process's first memory was read more slowly than the next, by a tenth
            spare = [filled_cache(model, "static", context, seed=0) for _ in range(2)]
        cache = filled_cache(model, "static", context, seed=0)
        trained(model, cache, args.peak)
        model.compile(backend="loki", options=given)
        ways[way] = (model, cache, torch.full((1, 1), 7))
    return against_dense(ways, args.tokens)


def real(args: argparse.Namespace) -> None:
    """A model with weights behind a prompt of text."""
    for name in args.dtype:
        base = {"bench": "real", "model": args.model, "dtype": name, "prompt": args.prompt}
        base |= {"top_k": args.top_k, "policy": args.policy, "tokens": args.tokens}
        if not missing(base):
            continue
        torch._dynamo.reset()
        ways: dict[str, tuple[Any, Any, Tensor]] = {}
        ids = text_ids(args)[:, : args.prompt]
        options = {"top_k": args.top_k, "policy": args.policy}
        for way, given in (("lossless", options), ("dense", {"min_context": 1 << 30})):
            model = load_model(args.model, device="cpu", dtype=name)
            model.compile(backend="loki", options=given)
            ways[way] = (model, *prefilled(model, ids, read=model))
        keep(base, against_dense(ways, args.tokens))


def real_steps(args: argparse.Namespace) -> None:
    """What steps of a model with weights take, its cache set back behind each."""
    ids = text_ids(args)[:, : args.prompt]
    for name in args.dtype:
        base = {"bench": "real-steps", "model": args.model, "dtype": name, "prompt": args.prompt}
        base |= {"top_k": args.top_k, "policy": args.policy}
        if not missing(base):
            continue
        torch._dynamo.reset()
        model = load_model(args.model, device="cpu", dtype=name)
        model.compile(backend="loki", options={"top_k": args.top_k, "policy": args.policy})
        cache, newest = prefilled(model, ids, read=model)
        took = steps_of(Feed(model, cache, {}), int(newest), resting)
        keep(base, {"cpu_ms": {rows: 1e3 * seconds for rows, seconds in took.items()}})


def dense_step(model: Any, cache: Any, newest: Tensor) -> Tensor:
    """The token behind `newest`, (1, 1) both."""
    logits = model(input_ids=newest, past_key_values=cache, use_cache=True).logits
    return logits[:, -1:].argmax(-1)


def against_dense(ways: dict[str, tuple[Any, Any, Tensor]], tokens: int) -> dict[str, Any]:
    """CPU milliseconds per token of both, tokens that differ, and how drafts fared."""
    model, cache, _ = ways["lossless"]
    decoder = loki_compile.LosslessDecoder(model, cache)
    newest = {way: given[2] for way, given in ways.items()}
    made: dict[str, list[int]] = {way: [] for way in ways}
    spent = dict.fromkeys(ways, 0.0)
    dense: list[float] = []  # seconds of each step

    def run(cycles: int) -> None:
        began, before = time.process_time(), len(made["lossless"])
        for _ in range(cycles):
            more = decoder.next(newest["lossless"])
            newest["lossless"] = more[:, -1:]
            made["lossless"] += more[0].tolist()
        between = time.process_time()
        for _ in range(len(made["lossless"]) - before):
            dense.append(-time.process_time())
            newest["dense"] = dense_step(*ways["dense"][:2], newest["dense"])
            made["dense"].append(int(newest["dense"]))
            dense[-1] += time.process_time()
        spent["lossless"] += between - began
        spent["dense"] += time.process_time() - between

    # Steps behind cycles of the other kind have variants of their own.
    for kind in (Eager, Resting, Eager, Resting):
        decoder.pace = pace = kind(decoder.pace.most)
        run(2 * pace.most)
    for _ in range(3):  # made again where something was compiled, as behind the first right draft
        graphs, compiling = counters["stats"]["unique_graphs"], PRICE.seconds
        warm = len(made["dense"])
        spent.update(dict.fromkeys(ways, 0.0))
        dense.clear()
        decoder.pace = pace = Pace(decoder.pace.most, time.process_time)
        while len(made["dense"]) < warm + tokens:
            run(8)
        if (counters["stats"]["unique_graphs"], PRICE.seconds) == (graphs, compiling):
            break
    timed = len(made["dense"]) - warm
    ms = {way: 1e3 * seconds / timed for way, seconds in spent.items()}
    cycles, middle = sum(pace.ran.values()), statistics.median(dense)
    return {
        "dense_ms": ms["dense"],
        "lossless_ms": ms["lossless"],
        "speedup": ms["dense"] / ms["lossless"],
        "chance": pace.chance,
        "tokens_per_cycle": timed / cycles,
        "cycles_by_drafts": {str(n): count for n, count in sorted(pace.ran.items())},
        "cycle_over_dense": {str(n): pace.seconds(n) / middle for n in sorted(pace.taken)},
        "compiled_while_timed": counters["stats"]["unique_graphs"] - graphs,
        "compile_s_while_timed": PRICE.seconds - compiling,
        "compared": len(made["dense"]),
        "different": sum(a != b for a, b in zip(*made.values(), strict=True)),
    }


class Resting(Pace):
    """Never drafts."""

    def next(self, limit: int) -> int:
        return 0


# ----------------------------------------------------------------------------------------- steps


def steps_of(
    feed: Feed, token: int, alone: Callable[[], contextlib.AbstractContextManager[None]]
) -> dict[str, float]:
    """Median CPU seconds of a sparse step, and of exact ones of so many tokens; of one token it is
    run in what `alone` returns."""
    took: dict[str, list[float]] = {}
    for number in range(24):
        for rows in (0, *range(1, 9)):  # 0: the sparse one
            ids = torch.full((1, max(rows, 1)), token)
            around = alone() if rows == 1 else exact() if rows else contextlib.nullcontext()
            began = time.process_time()
            with around:
                feed(ids)
            seconds = time.process_time() - began
            feed.rewind(ids.shape[1])
            if number > 3:  # compiled by then
                took.setdefault(str(rows or "sparse"), []).append(seconds)
    return {rows: statistics.median(seconds) for rows, seconds in took.items()}


def steps(args: argparse.Namespace) -> None:
    """A sparse step, and exact ones of several tokens, over a dense one of one token."""
    for name in args.dtype:
        for context in args.context:
            base = {"bench": "steps", "dtype": name, "context": context, "layers": args.layers}
            base |= {"kv_heads": args.kv_heads, "top_k": args.top_k, "policy": args.policy}
            if not missing(base):
                continue
            torch._dynamo.reset()
            model = build(DTYPES[name], "cpu", args.layers, kv_heads=args.kv_heads)
            cache = filled_cache(model, "static", context, seed=0)
            trained(model, cache, args.peak)
            model.compile(backend="loki", options={"top_k": args.top_k, "policy": args.policy})
            feed = Feed(model, cache, {})
            middle = steps_of(feed, 7, exact)
            over = {rows: seconds / middle["1"] for rows, seconds in middle.items()}
            keep(base, {"dense_ms": 1e3 * middle["1"], "over_dense": over})


WHAT = {
    "correction": correction,
    "parting": parting,
    "tokens": tokens,
    "speed": speed,
    "steps": steps,
    "real": real,
    "real-steps": real_steps,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=list(WHAT))
    parser.add_argument("--model", default="reference")
    parser.add_argument("--text", nargs="*", default=[])
    parser.add_argument("--policy", default="loki")
    parser.add_argument("--top-k", type=lambda x: float(x) if "." in x else int(x), default=0.125)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--each", type=int, default=512, help="tokens of one path of `tokens`")
    parser.add_argument("--paths", type=int, default=16, help="prompts of `parting`")
    parser.add_argument("--every", type=int, nargs="+", default=[0, 128, 32, 8])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=DTYPES)
    parser.add_argument("--context", type=int, nargs="+", default=[16384, 65536])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument(
        "--dense-first", action="store_true", help="of `speed`: whose cache is made first"
    )
    parser.add_argument("--peak", type=float, default=8.0, help="0: random keys and queries")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64
    with torch.no_grad():
        WHAT[args.what](args)


if __name__ == "__main__":
    main()
