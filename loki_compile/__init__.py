"""loki_compile: `model.compile(backend="loki")` makes long-context decoding sparse.

Importing is not needed to use the backend (it is an entry point); this module has what surrounds
it: fit a basis (`calibrate`), what would become of each attention site (`explain`), what became
of it (`reports`), what Dynamo did not compile (`given_up`), what ran (`stats`); and around decode
loops: steps that are dense (`exact`), caches that are corrected (`correct`, `corrected`), dense
decoding's tokens from sparse drafts (`lossless`, `LosslessDecoder`), and a cache that keeps no keys
but those that spans read (`SpanCache`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loki_compile.calibration import calibrate
    from loki_compile.config import LokiConfig
    from loki_compile.counts import reset_stats, stats
    from loki_compile.exact_steps import exact
    from loki_compile.explanation import explain
    from loki_compile.generation.correction import correct, corrected
    from loki_compile.generation.lossless import LosslessDecoder, lossless
    from loki_compile.generation.span_cache import SpanCache
    from loki_compile.report import GraphReport, SiteReport, given_up, reports

__all__ = [
    "GraphReport",
    "LokiConfig",
    "LosslessDecoder",
    "SiteReport",
    "SpanCache",
    "calibrate",
    "correct",
    "corrected",
    "exact",
    "explain",
    "given_up",
    "lossless",
    "reports",
    "reset_stats",
    "stats",
]

# PyTorch is imported with the first name that is used: `loki --help` needs none.
_HOME = {
    "GraphReport": "report",
    "LokiConfig": "config",
    "LosslessDecoder": "generation.lossless",
    "SiteReport": "report",
    "SpanCache": "generation.span_cache",
    "calibrate": "calibration",
    "correct": "generation.correction",
    "corrected": "generation.correction",
    "exact": "exact_steps",
    "explain": "explanation",
    "given_up": "report",
    "lossless": "generation.lossless",
    "reports": "report",
    "reset_stats": "counts",
    "stats": "counts",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
