"""Train the bundled reference model: a small Llama on Python's standard library and recall lines.

    python benchmarks/reference_model/train_reference.py --minutes 110 --out runs/reference

Starts from `--resume FOLDER` where given (a checkpoint of this script; the committed weights in
`loki_compile/reference_model` will do, the optimizer then starts afresh), else from random weights
and a freshly trained tokenizer. Length curriculum, data mix and learning rate follow the share of
`--minutes` that has passed, so a paused process still ends its decay in time. Every
`--save-minutes` the model is written to `--out` as a Hugging Face folder (bf16) with the training
state beside it; one JSON line per logged step goes to `--out`/train_log.jsonl.
"""

import argparse
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loki_compile.commands import reference_data as data

VOCABULARY = 2048
END_OF_TEXT = "<|endoftext|>"


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE on the training split; every recall word is one token of its own."""
    words = [f" {word}" for word in (*data.RECALL_KEYS, *data.RECALL_VALUES)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(words),
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for _, text in data.stdlib_modules("train")), trainer)
    tokenizer.add_tokens([AddedToken(word, normalized=False, single_word=True) for word in words])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=int(1e9),
    )


def new_model(tokenizer) -> LlamaForCausalLM:
    """Random weights: fan-in scaled matrices, blocks that start as the identity (Muon likes it)."""
    end = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        # Tied, every softmax pushes the rare recall words the same way and they end up alike.
        tie_word_embeddings=False,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if "embed_tokens" in name:
            nn.init.normal_(weight, std=config.hidden_size**-0.5)
        elif "lm_head" in name:
            nn.init.normal_(weight, std=0.02)
        elif "o_proj" in name or "down_proj" in name:
            nn.init.zeros_(weight)
        elif weight.ndim == 2:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    look_one_back(model)
    return model


@torch.no_grad()
def look_one_back(model, heads: int = 2, frequencies: int = 6, sharpness: float = 3.5) -> None:
    """Start `heads` query heads of layer 0 (KV head 0) as attention to the previous token.

    Induction needs such a head, and finding one takes small models most of their training. Channel
    0 of every embedding gets one constant, which serves q and k as a bias: k is a constant pair
    (s, 0) in the fastest RoPE planes and q that pair turned back by one token, so the score is
    sharpness * sum_f cos(theta_f (distance - 1)). Nothing is frozen; training goes on from there.
    """
    config, attention = model.config, model.model.layers[0].self_attn
    model.model.embed_tokens.weight[:, 0] = 0.5
    half = config.head_dim // 2
    constant = 0.5 * (config.hidden_size / 1.25) ** 0.5  # channel 0 after RMSNorm
    size = (sharpness * config.head_dim**0.5) ** 0.5 / constant
    angles = model.model.rotary_emb.inv_freq[:frequencies]
    attention.k_proj.weight[: config.head_dim] *= 0.3
    attention.k_proj.weight[:frequencies, 0] = size
    for head in range(heads):
        rows = attention.q_proj.weight[head * config.head_dim : (head + 1) * config.head_dim]
        rows *= 0.3
        rows[:frequencies, 0] = size * angles.cos()
        rows[half : half + frequencies, 0] = -size * angles.sin()


# --- Data ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """What is trained from `start` (share of the run, 0..1) until the next phase starts."""

    start: float
    length: int  # tokens per sequence
    rows: int  # sequences per step
    recall: float  # share of sequences with recall lines
    repeats: float  # share of sequences made of a repeated random run


# At most ~8k tokens a step: small models learn more from many small steps than from few large.
CURRICULUM = (
    Phase(0.00, 128, 64, 0.35, 0.05),
    Phase(0.10, 256, 32, 0.35, 0.05),
    Phase(0.30, 512, 16, 0.35, 0.0),
    Phase(0.55, 1024, 8, 0.50, 0.0),
    Phase(0.75, 2048, 4, 0.50, 0.0),
    Phase(0.85, 4096, 2, 0.75, 0.0),
)
# New models first learn to look up, in pairs alone: 99 % right after 60 steps. Mixed with text from
# the start, the noise of the text gradient kept recall at a guess for 2.7 M tokens.
LOOK_UP_STEPS = 80


class Rows:
    """Draws training sequences; each is (ids, kind of every id), kind of an id as a target:

    0 not trained on (nothing before it says what it is), 1 text, 2 value of a recall line asked
    again, 3 second or later copy of a random run.
    """

    def __init__(self, tokenizer, seed: int):
        end = tokenizer.eos_token_id
        modules = data.stdlib_modules("train")
        encoded = tokenizer([text for _, text in modules], add_special_tokens=False)["input_ids"]
        self.code = np.concatenate([np.array([end, *ids]) for ids in encoded]).astype(np.int64)
        self.line_ends = np.flatnonzero(data.newline_tokens(tokenizer)[self.code])
        self.keys, self.values = data.recall_token_ids(tokenizer)
        self.line_start = data.encode(tokenizer, "\n#")
        self.vocabulary = len(tokenizer)
        self.rng = random.Random(seed)

    def text(self, length: int):
        start = self.rng.randrange(len(self.code) - length)
        return self.code[start : start + length], np.ones(length, dtype=np.int64)

    def repeated(self, length: int):
        """A run of random tokens, again and again."""
        period = self.rng.randint(8, max(9, length // 2))
        run = np.random.default_rng(self.rng.getrandbits(32)).integers(0, self.vocabulary, period)
        kinds = np.full(length, 3)
        kinds[:period] = 0
        return np.resize(run, length), kinds

    def pairs(self, length: int):
        """Facts without code between them, then all of them asked, in new orders, to the end."""
        facts = self.rng.randint(4, 14)
        keys = self.rng.sample(self.keys.tolist(), facts)
        values = self.rng.sample(self.values.tolist(), facts)
        order = list(range(facts))
        while len(order) * (len(self.line_start) + 2) < length:
            order += self.rng.sample(range(facts), facts)
        lines = np.array([[*self.line_start, keys[n], values[n]] for n in order])
        kinds = np.zeros_like(lines)
        kinds[facts:, -1] = 2
        return lines.flatten()[:length], kinds.flatten()[:length]

    def recall(self, length: int):
        """Facts and questions with code between them: mixed, or all facts first."""
        rng, line = self.rng, len(self.line_start) + 2
        gap = rng.choice((0, 0, 8, 24, 64)) if length <= 256 else rng.choice((0, 16, 48, 128))
        lines = max(3, length // (line + gap))
        facts_first = rng.random() < 0.5
        if facts_first:
            facts = min(max(1, rng.randint(lines // 4, lines // 2)), 48)
        else:
            facts = min(max(1, rng.randint(lines // 8, lines // 2)), len(self.keys))
        keys = rng.sample(self.keys.tolist(), facts)
        values = rng.sample(self.values.tolist(), facts)
        told, order = 0, []
        for _ in range(lines):
            if told == 0 or (told < facts and (facts_first or rng.random() < 0.5)):
                order.append((told, False))
                told += 1
            else:
                order.append((rng.randrange(told), True))
        if facts_first:
            asked = rng.sample(range(facts), facts)
            order = [(n, False) for n in range(facts)] + [(n, True) for n in asked]
        room = max(0, length - len(order) * line)
        spread = facts if facts_first else len(order)
        cuts = sorted(rng.randint(0, room) for _ in range(spread))
        start = rng.randrange(len(self.code) - 2 * length)
        ids, kinds, at = [], [], 0
        for position, (number, asked) in enumerate(order):
            if position < spread:
                nearest = np.searchsorted(self.line_ends, start + cuts[position])
                stop = int(self.line_ends[nearest]) if nearest < len(self.line_ends) else 0
                stop = max(at, min(stop - start, room))
            else:
                stop = room
            ids.extend(self.code[start + at : start + stop].tolist())
            kinds.extend([1] * (stop - at))
            at = stop
            ids += [*self.line_start, keys[number], values[number]]
            kinds += [0] * (line - 1) + [2 if asked else 0]
        ids.extend(self.code[start + at : start + room].tolist())
        kinds.extend([1] * (room - at))
        return np.array(ids[:length]), np.array(kinds[:length])

    def batch(self, phase: Phase, pairs_only: bool = False):
        """ids (rows, length + 1) int64 and kinds of the same shape."""
        drawn = []
        for _ in range(phase.rows):
            kind = self.rng.random()
            if pairs_only:
                drawn.append(self.pairs(phase.length + 1))
            elif kind < phase.recall:
                drawn.append(self.recall(phase.length + 1))
            elif kind < phase.recall + phase.repeats:
                drawn.append(self.repeated(phase.length + 1))
            else:
                drawn.append(self.text(phase.length + 1))
        ids = np.stack([row for row, _ in drawn])
        kinds = np.stack([kinds for _, kinds in drawn])
        return torch.from_numpy(ids), torch.from_numpy(kinds)


# --- Optimizer -----------------------------------------------------------------------------------


def orthogonalised(updates: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """(N, rows, columns) -> the nearest semi-orthogonal matrices, by Newton-Schulz (Muon)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = updates.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Muon:
    """Momentum, orthogonalised; for the hidden matrices. https://kellerjordan.github.io/posts/muon"""

    def __init__(self, weights: list[nn.Parameter], lr: float, momentum: float = 0.95):
        self.lr, self.momentum = lr, momentum
        self.groups: dict[tuple[int, int], list[nn.Parameter]] = {}
        for weight in weights:
            self.groups.setdefault(tuple(weight.shape), []).append(weight)
        self.moments = {
            shape: torch.zeros(len(group), *shape) for shape, group in self.groups.items()
        }

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One update with learning rate `lr` times `scale`; weights shrink by 1 % of it."""
        for shape, group in self.groups.items():
            grads = torch.stack([weight.grad for weight in group])
            moment = self.moments[shape].lerp_(grads, 1 - self.momentum)
            updates = orthogonalised(grads.lerp(moment, self.momentum))
            rate = self.lr * scale * max(1.0, shape[0] / shape[1]) ** 0.5
            for weight, update in zip(group, updates, strict=True):
                weight.mul_(1 - 0.01 * self.lr * scale).add_(update, alpha=-rate)


def schedule(progress: float, step: int, warm_up: int, decay: float = 0.45) -> float:
    """Share of the peak learning rate: linear warm-up, constant, linear to zero at the end."""
    return min(1.0, (step + 1) / warm_up, max(0.0, (1 - progress) / decay))


# --- Loop ----------------------------------------------------------------------------------------


def losses(model, ids, kinds, weights):
    """Cross-entropy summed with `weights` (by kind), and per target: loss and whether it is right.

    The model runs under bf16 autocast, the softmax in fp32.
    """
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden).flatten(0, 1)
    targets = ids[:, 1:].flatten()
    each = F.cross_entropy(logits.float(), targets, reduction="none")
    return (each * weights).sum(), each.detach(), logits.detach()


def target_weights(kinds: torch.Tensor, value_weight: float) -> torch.Tensor:
    """Per target, so that text counts as a mean, values and repeats as `value_weight` means."""
    flat = kinds[:, 1:].flatten()
    counts = torch.bincount(flat, minlength=4).clamp(min=1)
    share = torch.tensor([0.0, 1.0, value_weight, value_weight]) / counts
    return share[flat]


def edit_json(path: Path, **entries) -> None:
    content = json.loads(path.read_text()) | entries
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def save(folder: Path, model, tokenizer, state: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    half = LlamaForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # transformers 4 reads these spellings and no others, transformers 5 reads both.
    edit_json(folder / "config.json", rope_theta=model.config.rope_parameters["rope_theta"])
    edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    torch.save({"model": model.state_dict(), **state}, folder / "training_state.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, required=True, help="length of this run")
    parser.add_argument("--out", type=Path, default=Path("runs/reference"))
    parser.add_argument("--resume", type=Path, help="a folder this script wrote")
    parser.add_argument("--from-phase", type=float, default=0.0, help="enter the curriculum here")
    parser.add_argument("--seed", type=int, default=20260, help="another one after --resume")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=0.003)
    parser.add_argument("--warm-up", type=int, default=60, help="steps to the full learning rate")
    parser.add_argument("--value-weight", type=float, default=0.5)
    parser.add_argument("--log-steps", type=int, default=25, help="steps per line of the log")
    parser.add_argument("--save-minutes", type=float, default=5.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--eager", action="store_true", help="do not compile the model")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    if args.resume:
        tokenizer = AutoTokenizer.from_pretrained(args.resume)
        model = LlamaForCausalLM.from_pretrained(args.resume, dtype=torch.float32)
    else:
        tokenizer = train_tokenizer()
        model = new_model(tokenizer)
    model.train()
    hidden = [w for n, w in model.model.layers.named_parameters() if w.ndim == 2]
    rest = [w for w in model.parameters() if all(w is not h for h in hidden)]
    muon = Muon(hidden, args.muon_lr)
    adam = torch.optim.AdamW(
        rest, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, foreach=True
    )
    step, tokens, seen_minutes = 0, 0, 0.0
    state_file = args.resume / "training_state.pt" if args.resume else None
    if state_file and state_file.exists():
        state = torch.load(state_file)
        model.load_state_dict(state["model"])
        adam.load_state_dict(state["adam"])
        muon.moments = state["muon"]
        step, tokens, seen_minutes = state["step"], state["tokens"], state["minutes"]

    rows = Rows(tokenizer, args.seed + step)
    size = sum(w.numel() for w in model.parameters())
    print(f"{size:,} parameters, {len(rows.code):,} tokens of code", flush=True)
    run = losses if args.eager else torch.compile(losses, dynamic=False)
    args.out.mkdir(parents=True, exist_ok=True)
    log = open(args.out / "train_log.jsonl", "a")  # noqa: SIM115

    started = saved = logged = time.monotonic()
    first_step, sums = step, np.zeros((4, 3))
    logged_tokens = tokens
    while True:
        now = time.monotonic()
        minutes = (now - started) / 60
        progress = minutes / args.minutes
        where = args.from_phase + (1 - args.from_phase) * progress
        phase = [p for p in CURRICULUM if p.start <= where][-1]
        finished = progress >= 1
        if finished or now - saved > 60 * args.save_minutes:
            state = {"adam": adam.state_dict(), "muon": muon.moments, "step": step}
            state |= {"tokens": tokens, "minutes": seen_minutes + minutes}
            save(args.out, model, tokenizer, state)
            saved = time.monotonic()
        if finished:
            break
        ids, kinds = rows.batch(phase, pairs_only=not args.resume and step < LOOK_UP_STEPS)
        weights = target_weights(kinds, args.value_weight)
        loss, each, logits = run(model, ids, kinds, weights)
        loss.backward()
        scale = schedule(progress, step - first_step, args.warm_up)
        muon.step(scale)
        for group in adam.param_groups:
            group["lr"] = args.adam_lr * scale
        adam.step()
        model.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + phase.rows * phase.length

        targets, flat = ids[:, 1:].flatten(), kinds[:, 1:].flatten()
        for kind in (1, 2, 3):
            at = (flat == kind).nonzero()[:, 0]
            right = 0
            if kind != 1 and len(at):
                right = (logits[at].argmax(-1) == targets[at]).sum().item()
            sums[kind] += (len(at), each[at].sum().item(), right)
        if step % args.log_steps == 0:
            now = time.monotonic()
            count = np.maximum(sums[:, 0], 1)
            line = {
                "step": step,
                "tokens": tokens,
                "minutes": round(seen_minutes + (now - started) / 60, 2),
                "length": phase.length,
                "lr": round(scale, 4),
                "text": round(sums[1, 1] / count[1], 4),
                "value": round(sums[2, 1] / count[2], 4),
                "value_right": round(sums[2, 2] / count[2], 4),
                "repeat_right": round(sums[3, 2] / count[3], 4),
                "tokens_per_s": round((tokens - logged_tokens) / (now - logged)),
            }
            if not math.isfinite(line["text"]):
                raise FloatingPointError(f"the loss is {line['text']} at step {step}")
            print(json.dumps(line), file=log, flush=True)
            left = args.minutes - (now - started) / 60
            print(json.dumps(line), f"{left:.1f} minutes left", flush=True)
            sums[:], logged, logged_tokens = 0, now, tokens
    print(f"wrote {args.out}: {step} steps, {tokens:,} tokens")


if __name__ == "__main__":
    main()
