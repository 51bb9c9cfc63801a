"""Measure the reference model with dense attention: bits per byte against xz -9e, and recall.

    python benchmarks/reference_model/evaluate_reference.py [--model FOLDER] [--out FILE.json]

Bits per byte are over the held-out modules, concatenated: windows of `--window` tokens that
overlap by half, every token counted once and (after the first window) with at least half a window
of context; xz gets the very same bytes. Recall is the share of questions of
`loki_compile.commands.reference_data.recall_prompt` whose answer has the highest logit.
"""

import argparse
import json
import lzma
import math
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import loki_compile
from loki_compile.commands import reference_data as data

BUNDLED = Path(loki_compile.__file__).parent / "reference_model"
PAIRS = {512: 16, 1024: 32, 2048: 32, 4096: 32}


def progress(done: int, total: int, what: str) -> None:
    if sys.stderr.isatty() or done == total:
        end = "\n" if done == total else ""
        print(f"\r{what}: {done}/{total}", end=end, file=sys.stderr, flush=True)


@torch.inference_mode()
def bits_per_byte(model, tokenizer, text: str, window: int) -> float:
    """-log2 of the model's probability of `text`, over its bytes in UTF-8."""
    ids = torch.tensor([tokenizer.bos_token_id, *data.encode(tokenizer, text)])
    nats, counted = 0.0, 0
    starts = range(0, max(1, len(ids) - window // 2 - 1), window // 2)
    for number, start in enumerate(starts, 1):
        piece = ids[start : start + window + 1]
        logits = model(piece[None, :-1], use_cache=False).logits[0].float()
        fresh = start + len(piece) - 1 - counted
        nats += F.cross_entropy(logits[-fresh:], piece[-fresh:], reduction="sum").item()
        counted += fresh
        progress(number, len(starts), "bits per byte, windows")
    assert counted == len(ids) - 1
    return nats / math.log(2) / len(text.encode())


@torch.inference_mode()
def recall(model, tokenizer, tokens: int, pairs: int, prompts: int, seed: int) -> dict:
    """Share of questions answered right at `tokens`, and their number."""
    right: list[bool] = []
    for number in range(prompts):
        ids, queries = data.recall_prompt(tokenizer, tokens, pairs, seed + number)
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
        right += data.recall_correct(logits, queries)
        progress(number + 1, prompts, f"recall at {tokens} tokens, prompts")
    return {"right": sum(right) / len(right), "questions": len(right), "pairs": pairs}


def xz_bits_per_byte(texts: list[str]) -> float:
    """`xz -9e` of each text by itself, all compressed bits over all bytes."""
    raw = [text.encode() for text in texts]
    packed = [lzma.compress(one, preset=9 | lzma.PRESET_EXTREME) for one in raw]
    return 8 * sum(map(len, packed)) / sum(map(len, raw))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--window", type=int, default=4096)
    parser.add_argument("--prompts", type=int, default=16, help="recall prompts per length")
    parser.add_argument("--lengths", type=int, nargs="*", default=list(PAIRS))
    parser.add_argument("--seed", type=int, default=9000)
    parser.add_argument("--skip-text", action="store_true", help="recall only")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    model.eval()
    started = time.monotonic()
    results: dict = {"dtype": args.dtype, "attention": model.config._attn_implementation}
    results["recall"] = {
        tokens: recall(model, tokenizer, tokens, PAIRS.get(tokens, 32), args.prompts, args.seed)
        for tokens in args.lengths
    }
    if not args.skip_text:
        text = data.stdlib_text("held_out")
        results["held_out_bytes"] = len(text.encode())
        results["window"] = args.window
        results["model_bits_per_byte"] = bits_per_byte(model, tokenizer, text, args.window)
        results["xz_bits_per_byte"] = xz_bits_per_byte([text])
        modules = [text for _, text in data.stdlib_modules("held_out")]
        results["xz_per_file_bits_per_byte"] = xz_bits_per_byte(modules)
    results["seconds"] = round(time.monotonic() - started, 1)
    print(json.dumps(results, indent=2))
    if args.out:
        args.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
