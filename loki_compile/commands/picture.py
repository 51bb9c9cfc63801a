"""Pictures: of `loki demo`, milliseconds per token by cached tokens; of a plan, who reads whom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from loki_compile.commands.measure import latencies, variants
from loki_compile.commands.models import longest_context
from loki_compile.commands.output import announcing
from loki_compile.config import LokiConfig
from loki_compile.pca_store.layer_plan import LayerPlan
from loki_compile.policies.kinds import kind_of
from loki_compile.report import shown_ranges

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


def plan_lines(plan: LayerPlan) -> list[str]:
    """A plan in words: a line for each group of layers, and what choosing layers capture."""
    kinds = [kind_of(layer.word) for layer in plan.layers]
    at = f"top_k={plan.top_k}"
    lines = [f"plan of {plan.created[:10]} from {plan.source or 'unknown text'}, {at}:"]
    for number, kind in enumerate(kinds):
        if not kind.ranking:
            continue
        readers = [n for n, other in enumerate(kinds) if other.source == number]
        what = f"  layer {number} chooses ({kind.ranking}"
        what += ", and reads all keys)" if kind.dense else ")"
        if readers:
            shares = [plan.mass[number][n] for n in readers] if plan.mass else []
            known = [share for share in shares if share is not None]
            mean = f", which captures {sum(known) / len(known):.0%} of their attention"
            what += f" for layers {shown_ranges(readers)}" + (mean if known else "")
        lines.append(what)
    dense = [n for n, kind in enumerate(kinds) if kind.dense and not kind.ranking]
    if dense:
        lines.append(f"  layers {shown_ranges(dense)} read all keys")
    return lines


def mass_lines(plan: LayerPlan) -> list[str]:
    """The captured attention as text: a row for each layer that chooses, a digit for each reader
    (9: 90 % and more), brackets around those that read it."""
    kinds = [kind_of(layer.word) for layer in plan.layers]
    lines = []
    for number, row in enumerate(plan.mass):
        if not kinds[number].ranking:
            continue
        cells = []
        for reader, share in enumerate(row):
            digit = "." if share is None else str(min(9, int(share * 10)))
            reads = kinds[reader].source == number or reader == number
            cells.append(f"[{digit}]" if reads else f" {digit} ")
        lines.append(f"  {number:>3} " + "".join(cells))
    return lines


def draw_mass(plan: LayerPlan, picture: Path) -> None:
    """Writes one picture: the share of each layer's attention that each earlier layer's choice
    captures, with the pairs that the plan makes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = [kind_of(layer.word) for layer in plan.layers]
    figure = Figure(figsize=(6.4, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    shares = [[float("nan") if x is None else x for x in row] for row in plan.mass]
    image = axes.imshow(shares, vmin=0.3, vmax=1.0, cmap="viridis")
    figure.colorbar(image, label="share of the reader's attention")
    pairs = [(n if kind.ranking else kind.source, n) for n, kind in enumerate(kinds)]
    for number, (source, reader) in enumerate(pairs):
        if source is not None:
            chooses = bool(kinds[number].ranking)
            color, marker = ("red", "s") if chooses else ("white", ".")
            axes.scatter([reader], [source], s=36, color=color, marker=marker)
    axes.set_xlabel("layer that reads")
    axes.set_ylabel("layer that chose")
    axes.set_title(f"{plan.model}: red chooses, white reads", fontsize=10)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
