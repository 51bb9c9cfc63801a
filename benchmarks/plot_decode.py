"""The README's picture: milliseconds per token behind two contexts, from the recorded runs.

    python benchmarks/plot_decode.py

The bars of a context are of one run of `bench_decode.py`, whose commands are in docs/measured.md.
"""

import json
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RUNS = ("decode_exact", "decode_exact_131072")
DENSE, SPARSE = "#9a9a9a", "#4878a8"
SHOWN = {
    "eager": ("eager", DENSE),
    "packed matmul, inductor": ("matmuls by hand, Inductor", DENSE),
    "loki, dense": ("our exact attention", DENSE),
    "loki top_k=0.125": ("loki, top_k=0.125 (default)", SPARSE),
    "loki top_k=1024": ("loki, top_k=1024", SPARSE),
}


def main() -> None:
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    FigureCanvasAgg(figure)
    labels = [label for label, _ in SHOWN.values()]
    colors = [color for _, color in SHOWN.values()]
    for axes, name in zip(figure.subplots(1, len(RUNS), sharey=True), RUNS, strict=True):
        rows = [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]
        times = {row["variant"]: row["median_ms"] for row in rows}
        bars = axes.barh(labels, [times[variant] for variant in SHOWN], color=colors)
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=9)
        axes.margins(x=0.15)
        axes.set_title(f"{rows[0]['context']:,} cached tokens", fontsize=10)
        axes.set_xlabel("milliseconds per token")
        axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()  # of both
    what = "4 layers, 8 query and 2 KV heads x 128, bf16, 2 CPU cores; dense ways grey"
    figure.suptitle(what, fontsize=10)
    figure.savefig(ROOT / "docs" / "decode.png", dpi=110)


if __name__ == "__main__":
    main()
