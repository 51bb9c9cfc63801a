"""How far a calibration has come: what of it outlives an interruption, and the time left."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from loki_compile.observation import Seen
from loki_compile.pca_store.attention_fit import STEPS, AttentionSamples
from loki_compile.pca_store.basis import Basis, library_versions
from loki_compile.pca_store.covariance import KeyCovariance
from loki_compile.pca_store.fingerprint import weights_fingerprint
from loki_compile.pca_store.partial import Partial

log = logging.getLogger("loki_compile")

# Of a fit, beside its steps: the scores of where it begins and ends, in steps.
_STEPS_BESIDE = 12
# Fewer steps than this end where they began.
LEAST_STEPS = 40


class Pace:
    """How long the rest will take, from what has been measured. Seconds and tokens."""

    def __init__(self, tokens: int) -> None:
        self.tokens_left = tokens
        self.tokens_read = 0
        self.reading = 0.0
        self.step_seconds: float | None = None
        self.steps_left = 0
        self._begun: float | None = None
        self._steps_done = 0

    def read(self, tokens: int, seconds: float) -> None:
        self.tokens_left -= tokens
        self.tokens_read += tokens
        self.reading += seconds

    def probe(self, seen: Seen) -> None:
        """Measures a step of the fit, once."""
        if self.step_seconds is not None:
            return
        self.step_seconds = 0.0
        for identity, held in seen.held.items():
            if isinstance(held, AttentionSamples):
                self.step_seconds = held.seconds_per_step(seen.columns(identity))
                break

    def bound(self, seen: Seen, seconds: float) -> None:
        """Gives the "attention" fits so many steps that they end within so many seconds."""
        self.probe(seen)
        each = len(seen.held) * (self.step_seconds or 0.0)
        within = int(seconds / each) - _STEPS_BESIDE if each > 0 else STEPS
        seen.steps = max(LEAST_STEPS, min(STEPS, within))

    def begin_fitting(self, steps: int) -> None:
        self.steps_left = steps
        self._begun = time.perf_counter()

    def skip(self, steps: int) -> None:
        self.steps_left -= steps

    def step(self, count: int) -> None:
        self.steps_left -= count
        self._steps_done += count

    def left(self, seen: Seen) -> float:
        seconds = self.tokens_left * self.reading / max(self.tokens_read, 1)
        steps = seen.steps
        each = (self.step_seconds or 0.0) * (steps + _STEPS_BESIDE) / steps
        if self._begun is None:
            return seconds + len(seen.held) * steps * each
        if self._steps_done >= max(1, steps // 10):
            each = (time.perf_counter() - self._begun) / self._steps_done
        return self.steps_left * each


class Kept:
    """What a `Partial` holds of a run: "seen" (moments, and how far it has come), "chunk-N" (the
    samples of batch N), "basis-N"."""

    def __init__(self, files: Partial, device: torch.device) -> None:
        self.files = files
        self.device = device
        self.fitted: dict[int, Basis] = {}
        self._prompts: dict[tuple[str, int], int] = {}
        self._broken = False

    def restore(self, seen: Seen) -> int:
        """Fills in what was kept; the number of batches that need not be read again."""
        if not self.files.has("seen"):
            return 0
        try:
            done = self._restore(seen)
        except ValueError as error:
            log.warning("%s: it is not used, and calibration begins anew", error)
            for known in (
                seen.held,
                seen.layers,
                seen.scales,
                seen.head_dims,
                seen.pairs,
                seen.blocks,
                self.fitted,
            ):
                known.clear()
            self._prompts.clear()
            seen.per_batch = 0
            self.files.remove()
            return 0
        log.info(
            "going on from %s: %d batches, %d bases", self.files.folder, done, len(self.fitted)
        )
        return done

    def _restore(self, seen: Seen) -> int:
        moments, record = self.files.read("seen")
        prompts: dict[int, list[dict[str, Tensor]]] = {}
        for number, (weights, occurrence, layer, kv_heads, head_dim, scale, pairs) in enumerate(
            record["caches"]
        ):
            identity = (weights, occurrence)
            seen.layers[identity], seen.head_dims[identity] = layer, head_dim
            seen.scales[identity] = scale
            if self.files.has(f"basis-{number}"):
                self.fitted[number] = self._basis(number)
                continue
            prompts[number] = []
            seen.pairs[identity] = tuple((a, b) for a, b in pairs)
            seen.held[identity] = seen.empty(kv_heads, head_dim, scale, seen.pairs[identity])
        keeps_prompts = not any(isinstance(x, KeyCovariance) for x in seen.held.values())
        if keeps_prompts and prompts:
            for batch in range(record["done"]):
                tensors, counts = self.files.read(
                    f"chunk-{batch}", lambda name: int(name.split(".")[0]) in prompts
                )
                for number, samples in prompts.items():
                    for row in range(counts[number]):
                        names = ("keys", "seen", "queries", "positions")
                        samples.append(
                            {n: tensors[f"{number}.{row}.{n}"].to(self.device) for n in names}
                        )
        for number, identity in enumerate(seen.layers):
            if number not in prompts:
                continue
            held = seen.held[identity]
            state = {
                name.partition(".")[2]: value
                for name, value in moments.items()
                if name.partition(".")[0] == str(number)
            }
            if isinstance(held, KeyCovariance):
                held.restore(state)
            else:
                held.restore(state, prompts[number])
                self._prompts[identity] = held.prompts
        seen.per_batch = record["per_batch"]
        seen.blocks = {weights: tuple(blocks) for weights, blocks in record["blocks"].items()}
        return int(record["done"])

    def keep(self, seen: Seen, number: int) -> None:
        """After a batch: its samples first, then how far the run has come."""
        tensors: dict[str, Tensor] = {}
        moments: dict[str, Tensor] = {}
        counts, caches = [], []
        for place, (identity, held) in enumerate(seen.held.items()):
            if not isinstance(held, KeyCovariance):
                first = self._prompts.get(identity, 0)
                counts.append(held.prompts - first)
                for row in range(held.prompts - first):
                    for name, value in held.prompt(first + row).items():
                        tensors[f"{place}.{row}.{name}"] = value
                self._prompts[identity] = held.prompts
            moments |= {f"{place}.{name}": value for name, value in held.state().items()}
            kv_heads = (held if isinstance(held, KeyCovariance) else held.moments).num_kv_heads
            shape = (
                kv_heads,
                seen.head_dims[identity],
                seen.scales[identity],
                seen.pairs[identity],
            )
            caches.append((*identity, seen.layers[identity], *shape))
        record = {"done": number + 1, "per_batch": seen.per_batch, "caches": caches}
        record["blocks"] = seen.blocks
        if counts:
            self._write(f"chunk-{number}", tensors, counts)
        self._write("seen", moments, record)

    def keep_basis(self, basis: Basis, number: int) -> None:
        tensors = {"query": basis.query, "key": basis.key, "spectrum": basis.spectrum}
        record = {"weights": basis.weights, "layer": basis.layer, "tokens": basis.tokens}
        self._write(f"basis-{number}", tensors, record)

    def _basis(self, number: int) -> Basis:
        tensors, record = self.files.read(f"basis-{number}")
        return Basis(**tensors, **record, kind="attention")  # type: ignore[arg-type]

    def _write(self, name: str, tensors: dict[str, Tensor], record: Any) -> None:
        if self._broken:
            return
        try:
            self.files.write(name, tensors, record)
        except OSError as error:
            self._broken = True
            log.warning(
                "cannot keep what was seen in %s (%s): a stop will lose it. Free some space, or "
                "set LOKI_HOME to another folder.",
                self.files.folder,
                error,
            )


def run_key(
    model: nn.Module, settings: dict[str, Any], batches: Iterable[Tensor | Mapping[str, Any]]
) -> str:
    """Names a run (64 hex digits): the weights of the model, the settings, and every token."""
    digest = hashlib.sha256(json.dumps([type(model).__name__, settings, STEPS]).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {_fingerprint(parameter)} ".encode())
    for batch in batches:
        given = {"input_ids": batch} if isinstance(batch, Tensor) else batch
        for name, value in sorted(given.items()):
            digest.update(f"{name} ".encode())
            if isinstance(value, Tensor):
                digest.update(f"{tuple(value.shape)} {value.dtype} ".encode())
                flat = value.detach().cpu().contiguous().reshape(-1)
                digest.update(flat.view(torch.uint8).numpy().tobytes())
            else:
                digest.update(repr(value).encode())
    return digest.hexdigest()


def _fingerprint(parameter: Tensor) -> str:
    """Weights of a kind that has no fingerprint are told by their shape."""
    try:
        return weights_fingerprint(parameter)
    except Exception:  # of whatever library's tensor subclass
        return str(tuple(parameter.shape))


def rope_parameters(model: nn.Module) -> dict[str, Any]:
    """RoPE parameters as the model's configuration states them, where it has one."""
    config = getattr(model, "config", None)
    stated = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    return dict(stated) if isinstance(stated, Mapping) else {}


def versions() -> dict[str, str]:
    own = library_versions()
    if "transformers" in sys.modules:
        own["transformers"] = metadata.version("transformers")
    return own
