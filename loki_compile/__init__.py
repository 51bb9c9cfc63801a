"""loki_compile: `torch.compile(model, backend="loki")` makes long-context decoding sparse.

Importing is not needed to use the backend (it is an entry point); this module has what surrounds
it: fit a basis (`calibrate`), what would become of each attention site (`explain`), what became
of it (`reports`), what Dynamo did not compile (`given_up`), what ran (`stats`).
"""

from loki_compile.calibration import calibrate
from loki_compile.config import LokiConfig
from loki_compile.counts import reset_stats, stats
from loki_compile.explanation import explain
from loki_compile.report import GraphReport, SiteReport, given_up, reports

__all__ = [
    "GraphReport",
    "LokiConfig",
    "SiteReport",
    "calibrate",
    "explain",
    "given_up",
    "reports",
    "reset_stats",
    "stats",
]
