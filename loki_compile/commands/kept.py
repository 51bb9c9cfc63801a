"""What a search has measured, kept until it ends: a run that is stopped goes on from there."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from loki_compile.pca_store.partial import Partial, PartialError, default_partial_root
from loki_compile.progress import run_key

log = logging.getLogger("loki_compile")


class Kept:
    """Of one search: its model, settings and token ids are the key to what was kept of it."""

    def __init__(self, model: Any, settings: dict[str, Any], ids: Sequence[Tensor]) -> None:
        self.files = Partial(default_partial_root(), run_key(model, settings, ids))

    def recall(self, name: str) -> tuple[dict[str, Tensor], Any] | None:
        """The tensors and the record of that name; None where there are none, or damaged ones."""
        if not self.files.has(name):
            return None
        try:
            return self.files.read(name)
        except PartialError as error:
            log.warning("measured again: %s", error)
            return None

    def keep(self, name: str, tensors: dict[str, Tensor], record: Any) -> None:
        try:
            self.files.write(name, tensors, record)
        except OSError as error:
            log.warning("cannot keep what was measured (%s): a stop will lose it", error)

    def forget(self) -> None:
        self.files.remove()
