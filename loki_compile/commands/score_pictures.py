"""Pictures of `loki eval`: scores by depth and length, quality against bytes and against time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loki_compile.commands.trials import DENSE, Row


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def draw_depths(rows: Sequence[Row], labels: Sequence[str], path: Path) -> bool:
    """One map for each setting: scores of the pass key by its depth and the prompt's length.

    False, and no file, where there are none.
    """
    cells: dict[str, dict[tuple[float, int], list[float]]] = {}
    for row in rows:
        if row["depth"] is not None and row["task"] == "passkey":
            at = row["depth"], row["length"]
            cells.setdefault(row["setting"], {}).setdefault(at, []).append(row["score"])
    shown = [label for label in (DENSE, *labels) if label in cells]
    if not shown:
        return False
    depths = sorted({depth for of in cells.values() for depth, _ in of})
    lengths = sorted({length for of in cells.values() for _, length in of})
    across = min(6, len(shown))
    down = -(-len(shown) // across)
    figure, axes = _figure(down, across, (1.6 + 1.7 * across, 0.8 + 1.7 * down))
    for number, place in enumerate(axes.flat):
        if number >= len(shown):
            place.set_axis_off()
            continue
        of = cells[shown[number]]
        grid = [
            [statistics.fmean(of[d, n]) if (d, n) in of else math.nan for n in lengths]
            for d in depths
        ]
        image = place.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for y, line in enumerate(grid):
            for x, share in enumerate(line):
                text = "?" if math.isnan(share) else f"{share:.0%}"
                color = "white" if share < 0.2 or share > 0.8 else "black"
                place.text(x, y, text, ha="center", va="center", fontsize=6, color=color)
        place.set_title(shown[number], fontsize=7)
        place.set_xticks(range(len(lengths)), [str(n) for n in lengths], fontsize=6)
        left = number % across == 0
        place.set_yticks(range(len(depths)), [f"{d:.0%}" if left else "" for d in depths])
        place.tick_params(labelsize=6)
        if left:
            place.set_ylabel("depth of the pass key", fontsize=7)
        if number >= len(shown) - across:
            place.set_xlabel("tokens", fontsize=7)
    figure.colorbar(image, ax=axes, label="found", shrink=0.8)
    figure.savefig(path, dpi=130)
    return True


def draw_quality(found: Sequence[Row], policies: dict[str, str], path: Path) -> bool:
    """Quality against bytes read and against time: divergence from dense, and scores of tasks.

    Args:
        found: `scores.summary`.
        policies: which of the settings are one line, by label.

    Returns:
        False, and no file, where nothing was measured that can be shown.
    """
    dense = next((row for row in found if row["setting"] == DENSE), {})
    ups = [("kl", "KL divergence from dense, nats")] if any(r.get("kl") for r in found) else []
    ups += [(p, f"mean score, {p} question") for p in ("sparse", "dense") if p in dense]
    overs = [("bytes_share", "bytes of keys, values and index read, against dense")]
    overs += [("step_ms", "milliseconds of a step")]
    overs = [over for over in overs if any(r.get(over[0]) is not None for r in found)]
    if not ups or not overs:
        return False
    figure, axes = _figure(len(ups), len(overs), (5.2 * len(overs), 3.6 * len(ups)))
    names = list(dict.fromkeys(policies.values()))
    for (up, up_label), line in zip(ups, axes, strict=True):
        for (over, over_label), place in zip(overs, line, strict=True):
            for number, name in enumerate(names):
                points = [
                    (row[over], _height(row, up))
                    for row in sorted(found, key=lambda row: row.get("keys", 0))
                    if policies.get(row["setting"]) == name
                    and row.get(over) is not None
                    and _height(row, up) is not None
                ]
                if points:
                    marks = "o^sDvPX*"[number % 8] + "-"
                    place.plot(*zip(*points, strict=True), marks, label=name, markersize=4)
            _draw_dense(place, dense, up, over)
            _scale_axes(place, up, over)
            place.set_xlabel(over_label, fontsize=8)
            place.set_ylabel(up_label, fontsize=8)
    shown = next((place for place in axes.flat if place.get_legend_handles_labels()[0]), None)
    if shown is not None:
        shown.legend(fontsize=7)
    figure.savefig(path, dpi=130)
    return True


def _draw_dense(place: Any, dense: Row, up: str, over: str) -> None:
    """Lines where dense decoding lies; by divergence and by bytes it is the axis itself."""
    level = None if up == "kl" else _height(dense, up)
    if level is not None:
        place.axhline(level, color="black", linestyle="--", linewidth=1, label="dense")
    if over == "step_ms" and dense.get(over) is not None:
        place.axvline(dense[over], color="black", linestyle=":", linewidth=1)
        at = {"xycoords": place.get_xaxis_transform(), "rotation": 90, "fontsize": 7}
        place.annotate("dense", (dense[over], 0.98), ha="right", va="top", **at)


def _scale_axes(place: Any, up: str, over: str) -> None:
    if over == "bytes_share":
        place.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    if up == "kl":
        place.set_yscale("log")
        for which in (place.yaxis.set_major_formatter, place.yaxis.set_minor_formatter):
            which(_nats)
    place.tick_params(labelsize=7, which="both")
    place.grid(alpha=0.3)


def _nats(value: float, _: Any) -> str:
    """The label of a tick: 1, 2 and 5 of each decade."""
    first = f"{value:e}"[0]
    return f"{value:.3g}" if first in "125" else ""


def _height(row: Row, up: str) -> float | None:
    value = row.get(up)
    if isinstance(value, dict):
        return float(value["score"])
    return value if value else None  # a divergence of 0 lies on no logarithmic axis
