"""What a basis set says of itself, checked: kinds, names, dates, fingerprints. Needs no tensors.

Apart from the tensors, so that a store is listed without PyTorch.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

# "random" is the control: any orthonormal basis, fitted to nothing.
KINDS = ("pca", "score-optimal", "attention", "random")
# For these the query's projection is the key's, and its columns are orthonormal (Loki, Lemma 4.1).
ORTHONORMAL_KINDS = ("pca", "random")
# Which keys the basis was fitted on. It is applied after RoPE in both cases, as in the paper.
CALIBRATIONS = ("pre-rotary", "post-rotary")

MAX_TEXT = 4096
_FINGERPRINT = re.compile(r"[0-9a-f]{16,64}")
HEX_DIGITS = 32
# Of each block of rows. A weight has few enough blocks for a header, and a wrong match takes a run
# of equal blocks.
MAX_BLOCKS = 4096
MAX_MEASURED = 16


class BasisNotFound(ValueError):
    """No basis is stored under the name, path or hub id given."""


def calibrate_command(model: str = "") -> str:
    """The command that makes a basis for `model`, quoted for a shell and for a message."""
    return f"`loki calibrate {shlex.quote(model) if model else 'MODEL'} --text FILES`"


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"found {name} {value!r}; needed one of {', '.join(allowed)}")


def check_fingerprint(name: str, value: Any) -> None:
    if not isinstance(value, str) or not _FINGERPRINT.fullmatch(value):
        raise ValueError(f"found {name} {value!r:.80}; needed 16 to 64 lower-case hex digits")


def check_text(name: str, value: Any) -> None:
    """Text that is shown in terminals: no control characters, no lone surrogates, bounded."""
    if not isinstance(value, str) or len(value) > MAX_TEXT or not value.isprintable():
        raise ValueError(
            f"found {name} {value!r:.80}; needed at most {MAX_TEXT} printable characters"
        )


def check_measured(value: Any) -> None:
    """What was measured of a basis: few finite numbers, by name."""
    if not isinstance(value, Mapping) or len(value) > MAX_MEASURED:
        raise ValueError(f"found measured that is not a mapping of at most {MAX_MEASURED} entries")
    for name, number in value.items():
        check_text("name of what was measured", name)
        if type(number) is not float or not math.isfinite(number):
            raise ValueError(f"found measured {name!r:.80} {number!r:.80}; needed a finite float")


def check_metadata(record: Any) -> None:
    """The fields that a BasisSet and the header of its file share.

    Raises:
        ValueError: a field of the wrong type, not printable, not JSON, or not a date.
    """
    check_choice("calibration", record.calibration, CALIBRATIONS)
    for name in ("model", "dtype", "source"):
        check_text(name, getattr(record, name))
    if not isinstance(record.rope, Mapping) or not isinstance(record.versions, Mapping):
        raise ValueError("found rope or versions that are not mappings; needed a mapping for each")
    for name, version in record.versions.items():
        check_text("name of a library", name)
        check_text(f"version of {name}", version)
    try:
        json.dumps(dict(record.rope), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"found rope parameters that are not JSON ({error})") from None
    try:
        aware = datetime.fromisoformat(record.created).tzinfo is not None
    except (TypeError, ValueError):
        aware = False
    if not aware:
        raise ValueError(
            f"found created={record.created!r:.80}; needed an ISO 8601 date with offset"
        )


def combine_fingerprints(fingerprints: Iterable[str]) -> str:
    """One fingerprint (32 hex digits) for several; their order does not count, repetition does.

    Makes a site's fingerprint of its weights (key projection, bias, key norm), and a model's of
    its sites.
    """
    return hashlib.sha256(" ".join(sorted(fingerprints)).encode()).hexdigest()[:HEX_DIGITS]


def run_of(part: Sequence[str], whole: Sequence[str]) -> int | None:
    """Where `part` lies in `whole` as one run of blocks; None where it does not, or is empty.

    The first of several places: blocks that are equal make equal keys.
    """
    length = len(part)
    for start in range(len(whole) - length + 1 if length else 0):
        if whole[start] == part[0] and tuple(whole[start : start + length]) == tuple(part):
            return start
    return None
