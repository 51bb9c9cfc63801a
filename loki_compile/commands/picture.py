"""The picture of `loki demo`: milliseconds per token against cached tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from loki_compile.commands.measure import latencies, variants
from loki_compile.commands.models import longest_context
from loki_compile.commands.output import announcing
from loki_compile.config import LokiConfig

# An attention-heavy shape for the picture: what long contexts cost when little else is computed.
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 1024,
    "max_position_embeddings": 1 << 20,
}
SHAPE_CONTEXTS = (1024, 4096, 16384, 65536, 131072)
SHAPE_TOP_K = 1024


def draw(model: Any, name: str, config: LokiConfig, picture: Path) -> None:
    """Measures a model at several contexts, and writes the picture.

    The bundled model is too small to show anything: a larger shape with random weights stands in.
    """
    options = config.to_options()
    if name == "reference":
        title = "random weights, 4 layers, 8 query and 2 KV heads x 128 dims"
        subject, contexts = _shape(model), list(SHAPE_CONTEXTS)
        options.pop("basis")
        named = {f"loki, top_k={config.top_k}": options}
        named[f"loki, top_k={SHAPE_TOP_K}"] = {**options, "top_k": SHAPE_TOP_K}
    else:
        title = f"{name}, a cache of noise"
        subject = model
        longest = longest_context(model) - 64
        contexts = [2**n for n in range(6, 18) if 2**n <= longest][-6:]
        named = {f"loki, top_k={config.top_k}": options}
    steps = variants(subject, named, dynamic=True)
    rows: dict[int, dict[str, float]] = {}
    for context in contexts:
        rows[context] = latencies(
            subject,
            steps,
            context,
            rounds=3,
            steps_per_round=2,
            most_seconds=4,
            begin=announcing(f"picture, {context} cached tokens"),
        )
    plot_latencies(rows, title, f"{model.device}, {model.dtype}".replace("torch.", ""), picture)


def _shape(model: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).to(model.device, model.dtype).eval()


def plot_latencies(
    rows: dict[int, dict[str, float]], title: str, device: str, picture: Path
) -> None:
    """Writes one picture: rows[context][variant] in milliseconds per token."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    contexts = list(rows)
    for number, label in enumerate(next(iter(rows.values()))):
        style = "--" if label in ("eager", "inductor") else "-"
        times = [rows[context][label] for context in contexts]
        axes.plot(contexts, times, style, marker="o", color=f"C{number}", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.set_xlabel("cached tokens")
    axes.set_ylabel("milliseconds per token")
    axes.set_title(f"{title}\n{device}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(title="dense dashed, sparse solid")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
