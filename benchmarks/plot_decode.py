"""The README's picture: milliseconds per token against cached tokens, from the recorded runs.

    python benchmarks/plot_decode.py

Of each context the newest run that has every variant is shown: all of its points are of one run.
"""

import json
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SHOWN = {
    "eager": ("eager", "--"),
    "packed matmul, inductor": ("fastest dense: matmuls by hand, Inductor", "--"),
    "loki top_k=0.125": ("loki, top_k=0.125 (default)", "-"),
    "loki top_k=1024": ("loki, top_k=1024", "-"),
}


def runs(dtype: str) -> dict[int, dict[str, float]]:
    """Milliseconds by context and variant."""
    found: dict[tuple[int, str], dict[str, float]] = {}
    for name in ("decode", "decode_short"):
        for line in (RESULTS / f"{name}.jsonl").read_text().splitlines():
            row = json.loads(line)
            if row["dtype"] == dtype and row["index_dtype"] == "auto":
                run = found.setdefault((row["context"], row["time"]), {})
                run[row["variant"]] = row["median_ms"]
    whole = {key: run for key, run in sorted(found.items()) if run.keys() >= SHOWN.keys()}
    return {context: run for (context, _), run in whole.items()}  # the newest comes last


def main() -> None:
    rows = runs("bfloat16")
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, (variant, (label, style)) in enumerate(SHOWN.items()):
        times = [rows[context][variant] for context in rows]
        axes.plot(list(rows), times, style, marker="o", color=f"C{number}", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(list(rows), [f"{context:,}" for context in rows])
    ticks = [1, 2, 4, 8, 16, 32, 64]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel("cached tokens")
    axes.set_ylabel("milliseconds per token")
    axes.set_title("4 layers, 8 query and 2 KV heads x 128, bf16, 2 CPU cores", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(ROOT / "docs" / "decode.png", dpi=110)


if __name__ == "__main__":
    main()
