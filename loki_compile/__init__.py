"""loki_compile: `torch.compile(model, backend="loki")` makes long-context decoding sparse.

Importing is not needed to use the backend (it is an entry point); this module has what surrounds
it: what ran (`stats`), what became of each attention site (`reports`).
"""

from loki_compile.config import LokiConfig
from loki_compile.report import GraphReport, SiteReport, reports
from loki_compile.runtime import reset_stats, stats

__all__ = ["GraphReport", "LokiConfig", "SiteReport", "reports", "reset_stats", "stats"]
