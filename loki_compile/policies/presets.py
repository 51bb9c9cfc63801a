"""Plans of all layers, by name: which choose, and which read what these chose.

tidal            ours: layers that choose do so by the index, all others reuse. Where `loki tune`
                 has found a plan for the model, that one
tidal-published  TidalDecode (ICLR 2025, arXiv 2410.05076): layers 0 and 1 are dense, 2 and one
                 further down rank exactly and stay dense, each query head for itself
lessismore       LessIsMore (arXiv 2508.07101): the same layers, one set for all heads
kascade          Kascade (arXiv 2512.16391): layer 0 ranks exactly and stays dense, a few others
                 rank exactly
"""

from __future__ import annotations

from loki_compile.policies.kinds import Kind

DENSE, REUSE = Kind(dense=True), Kind(reuse=True)
# Depths, as shares of all layers, at which the published methods choose again: TidalDecode in layer
# 13 of 32 and 12 of 36, Kascade's program in 0, 2, 8, 13, 14 of 32 and 0, 2, 7, 14, 23 of 36.
_AGAIN = 0.4
_ANCHORS = (0.22, 0.4, 0.54)
# Where no plan was measured, the first layers choose, which attend the least alike, and one of so
# many behind them.
_FIRST, _EVERY = 3, 5


def preset(name: str, layers: int) -> list[Kind]:
    """The kinds of so many layers under a plan of `kinds.PLANS` that was not measured."""
    if name == "tidal":
        chosen = {*range(_FIRST), *range(0, layers, _EVERY)}
        return [Kind("loki") if n in chosen else REUSE for n in range(layers)]
    if name == "kascade":
        chosen = {2, *(round(depth * layers) for depth in _ANCHORS)}
        kinds = [Kind("oracle") if n in chosen else REUSE for n in range(layers)]
        return [Kind("oracle", dense=True), *kinds[1:]]
    chooses = Kind("unified" if name == "lessismore" else "oracle", dense=True)
    again = max(3, round(_AGAIN * layers))
    kinds = [chooses if n in (2, again) else REUSE for n in range(layers)]
    return [DENSE, DENSE, *kinds[2:]][:layers]


def chooses_instead(name: str) -> str:
    """The ranking of a layer that would reuse, under a plan, and has nobody to reuse from."""
    return {"tidal": "loki", "lessismore": "unified"}.get(name, "oracle")
