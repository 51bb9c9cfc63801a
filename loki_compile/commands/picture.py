"""Pictures: milliseconds per token by cached tokens; of a plan, who reads whom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loki_compile.commands.bench_rows import Judged
from loki_compile.commands.measure import latencies, variants
from loki_compile.commands.models import load_model, longest_context
from loki_compile.commands.output import announcing
from loki_compile.config import LokiConfig
from loki_compile.pca_store.layer_plan import LayerPlan
from loki_compile.plan_words import kinds_of
from loki_compile.report import shown_ranges

# Of the model of random weights that stands in for the bundled one.
SHAPE_CONTEXTS = (1024, 4096, 16384, 65536, 131072)
SHAPE_TOP_K = 1024


def check_picture(option: str, picture: Path) -> None:
    """Refuses a picture that could not be written, before what it shows is measured.

    Raises:
        ValueError: matplotlib is missing, or does not write files of this kind.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        raise ValueError(
            "matplotlib is not installed; needed for the picture: pip install 'loki-compile[eval]'"
        ) from None
    known = FigureCanvasAgg.get_supported_filetypes()
    if picture.suffix[1:].lower() not in known:
        raise ValueError(
            f"{option} {picture}: found the ending {picture.suffix!r}; needs one of "
            f"{', '.join(sorted(known))}."
        )


def draw(model: Any, name: str, config: LokiConfig, picture: Path) -> None:
    """Measures a model at several contexts, and writes the picture.

    The bundled model is too small to show anything: a larger shape with random weights stands in.
    """
    options = config.to_options()
    if name == "reference":
        title = "random weights, 4 layers, 8 query and 2 KV heads x 128 dims"
        dtype = str(model.dtype).removeprefix("torch.")
        subject = load_model("random", device=str(model.device), dtype=dtype)
        contexts = list(SHAPE_CONTEXTS)
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


def plot_ways(judged: Judged, title: str, picture: Path) -> None:
    """Writes one picture of `loki bench`: milliseconds per token by context, a panel for each kind
    of cache, dense ways dashed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = judged.rows
    kinds = list(dict.fromkeys(row.cache for row in rows))
    ways = {row.way: row.dense for row in rows}
    figure = Figure(figsize=(1.5 + 4.8 * len(kinds), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        contexts = sorted({row.context for row in rows if row.cache == kind})
        for number, (way, dense) in enumerate(ways.items()):
            of_way = (row for row in rows if (row.cache, row.way) == (kind, way))
            points = sorted((row.context, judged.ms(row) or 0.0) for row in of_way if row.ms)
            style = "--" if dense else "-"
            lengths, times = [x for x, _ in points], [y for _, y in points]
            axes.plot(lengths, times, style, marker="o", color=f"C{number}", label=way)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(contexts, [f"{context:,}" for context in contexts], rotation=45)
        axes.minorticks_off()
        axes.set_xlabel("cached tokens")
        axes.set_title(f"{kind} cache", fontsize=10)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("milliseconds per token")
    panels[-1].legend(title="dense dashed, policies solid", fontsize=8)
    figure.suptitle(title, fontsize=10)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)


def plan_lines(plan: LayerPlan) -> list[str]:
    """A plan in words: a line for each group of layers, and what choosing layers capture."""
    kinds = kinds_of(plan)
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
    kinds = kinds_of(plan)
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

    kinds = kinds_of(plan)
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
