"""Bases fitted to the attention itself: the pair of projections whose scores predict it best.

Legend: B batch, Hq query heads, Hkv KV heads, G = Hq / Hkv, T keys, S queries, D head_dim, R rank,
N queries of one step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from loki_compile.pca_store.basis import Basis
from loki_compile.pca_store.covariance import KeyCovariance
from torch import Tensor

# Keys that the runtime reads whatever their score (the defaults of LokiConfig): nothing to learn.
SINK = 4
RECENT = 32
# Queries kept of each prompt and head, drawn evenly; what a step reads; how many steps.
QUERIES_PER_PROMPT = 512
QUERIES_PER_STEP = 24
STEPS = 500
# Of Adam, in root mean squares of the entries it starts from.
LEARNING_RATE = 0.1
# Noise on where the descent begins, in the same unit: a direction that neither projection holds has
# no gradient.
JITTER = 0.1


@dataclass(frozen=True)
class _Prompt:
    """One row of a batch: keys (Hkv, T, D), seen (Hkv, 1, 1, T), queries (Hkv, G, S, D), and the
    position of each query (S,), the last key that it sees."""

    keys: Tensor
    seen: Tensor
    queries: Tensor
    positions: Tensor


class AttentionSamples:
    """Keys of whole prompts and some of their queries, and the basis that ranks them best.

    What is kept stays in its dtype and on its device. Per prompt that is T x Hkv x D entries of
    keys and at most 512 x Hq x D of queries. Keys or queries with NaN or infinity are left out.

    Args:
        scale: of the scores, as in softmax(scale * q.k).
        seed: of the draws, here and in `fit`.
        queries_per_prompt: how many are kept.
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        *,
        scale: float,
        seed: int = 0,
        queries_per_prompt: int = QUERIES_PER_PROMPT,
    ) -> None:
        self.moments = KeyCovariance(num_kv_heads, head_dim)
        self._queries_per_prompt = queries_per_prompt
        self.scale = scale
        self._prompts: list[_Prompt] = []
        self._seed = seed
        self._generator = torch.Generator("cpu").manual_seed(seed)

    @torch.no_grad()
    def update(self, keys: Tensor, queries: Tensor, mask: Tensor | None = None) -> None:
        """Take in prompts, with the arguments of `KeyCovariance.update`.

        Raises:
            ValueError: shapes that do not fit together.
        """
        self.moments.update(keys, queries, mask)
        first = keys.shape[2] - queries.shape[2]
        # Ordinary tensors: what inference mode makes cannot take part in a fit.
        with torch.inference_mode(False):
            for row, (k, q) in enumerate(zip(keys, queries, strict=True)):
                seen = k.isfinite().all(-1)
                if mask is not None:
                    seen = seen & mask[row].to(k.device)
                q = q.unflatten(0, (self.moments.num_kv_heads, -1))
                real = q.isfinite().all(-1).all(0).all(0)
                if mask is not None:
                    real = real & mask[row, first:].to(q.device)
                at = real.nonzero().flatten().cpu()
                at = at[torch.randperm(len(at), generator=self._generator)]
                at = at[: self._queries_per_prompt]
                # Before this, every visible key is read in any case.
                at = at[at + first >= SINK + RECENT].sort().values.to(q.device)
                if len(at):
                    kept = torch.where(seen[..., None], k, 0).clone()
                    seen = seen[:, None, None]
                    self._prompts.append(_Prompt(kept, seen, q[:, :, at].clone(), at + first))

    @property
    def prompts(self) -> int:
        """Prompts kept so far."""
        return len(self._prompts)

    def state(self) -> dict[str, Tensor]:
        """What `restore` takes besides prompts: moments, and the state of the draws."""
        return {**self.moments.state(), "generator": self._generator.get_state()}

    def prompt(self, number: int) -> dict[str, Tensor]:
        """The tensors of one kept prompt, by name, in their dtypes and on their device."""
        return dict(vars(self._prompts[number]))

    def restore(self, state: dict[str, Tensor], prompts: Sequence[dict[str, Tensor]]) -> None:
        """Takes the place of what was taken in; `prompts` lie where the fit is to run.

        Raises:
            ValueError: tensors are missing or do not fit together.
        """
        heads, dim = self.moments.num_kv_heads, self.moments.head_dim
        try:
            kept = [_Prompt(**prompt) for prompt in prompts]
            self._generator.set_state(state["generator"])
        except (TypeError, KeyError, RuntimeError) as error:
            raise ValueError(f"found samples that are not whole ({error})") from None
        for p in kept:
            if p.keys.dim() != 3 or (p.keys.shape[0], p.keys.shape[2]) != (heads, dim):
                raise ValueError(f"found keys of shape {tuple(p.keys.shape)}")
        self.moments.restore(state)
        self._prompts = kept

    def seconds_per_step(self, rank: int, steps: int = 6) -> float:
        """Measured on the samples so far: how long a step of `fit` takes, without what comes once
        in front of them. 0.0 without samples."""
        if not self._prompts:
            return 0.0
        where = self._prompts[0].keys.device
        generator = torch.Generator("cpu").manual_seed(self._seed)
        with torch.inference_mode(False), torch.no_grad():
            start = self.moments.score_optimal().truncate(rank)
            query, key = (part.to(where) for part in start)
            ends: list[float] = []

            def end(count: int) -> None:
                if where.type == "cuda":
                    torch.cuda.synchronize(where)
                ends.append(time.perf_counter())

            self._descend(query, key, generator, end, steps=1 + steps)  # the first is a warm-up
        return (ends[-1] - ends[0]) / steps

    def fit(
        self,
        rank: int,
        *,
        weights: str = "",
        layer: str = "",
        device: torch.device | str | None = None,
        progress: Callable[[int], None] | None = None,
        steps: int | None = None,
    ) -> Basis:
        """The pair (A, B) of `rank` columns with the least cross-entropy from attention to
        softmax(scale * (q @ A).(k @ B)), by gradient descent from the score-optimal pair.

        Attention is causal, and counted per query head over the keys that are not read anyhow (the
        first 4, the last 32), so a query weighs by what it looks up far away. PCA and the
        score-optimal pair keep what varies most over all keys and queries; this keeps what tells
        the few keys that are attended from the rest. (DeepSeek-V3.2, arXiv:2512.02556, warms its
        indexer up by the same objective.) Sliding windows, additive biases and softcaps are not
        modelled.

        The columns are in the order of the score variance that they explain, so that a smaller rank
        takes the best of them; more than `rank` there are not. Where the descent ends worse than it
        began, on the queries it was trained on, the start is returned.

        Args:
            device: where to compute; that of the samples where None.
            progress: called with 1 after each of the `steps`, `STEPS` where None.

        Raises:
            ValueError: rank is not in 1..D, or no prompt long enough to have a choice was seen.
        """
        if not self._prompts:
            raise ValueError(
                f"found no prompts of more than {SINK + RECENT} tokens; a basis fitted to "
                "attention needs some: pass longer text"
            )
        where = torch.device(device) if device is not None else self._prompts[0].keys.device
        with torch.inference_mode(False), torch.no_grad():
            start = self.moments.score_optimal(weights=weights, layer=layer).truncate(rank)
            query, key = (part.to(where) for part in start)
            generator = torch.Generator("cpu").manual_seed(self._seed)
            probe = [self._draw(generator, where) for _ in range(min(16, 4 * len(self._prompts)))]
            before = sum(float(_loss(query, key, *drawn, self.scale)) for drawn in probe)
            fitted = self._descend(query, key, generator, progress, steps)
            after = sum(float(_loss(*fitted, *drawn, self.scale)) for drawn in probe)
            if after < before:  # not so for NaN
                query, key = fitted
            return self.moments.ordered(
                query.cpu(), key.cpu(), kind="attention", weights=weights, layer=layer
            )

    def _descend(
        self,
        query: Tensor,
        key: Tensor,
        generator: torch.Generator,
        progress: Callable[[int], None] | None,
        steps: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """In coordinates in which queries and keys have unit covariance, so that one learning rate
        suits large dims and small."""
        steps = STEPS if steps is None else steps
        where = key.device
        roots = (part.to(where, torch.float32) for part in self.moments.score_roots())
        query_root, query_inverse, key_root, key_inverse = roots
        with torch.enable_grad():
            pair = []
            for part in (query_root @ query, key_root @ key):
                noise = torch.randn(part.shape, generator=generator).to(where)
                pair.append((part + JITTER * _rms(part) * noise).requires_grad_())
            # One rate for all heads: their entries are of one order, for the scores are.
            rate = LEARNING_RATE * float(_rms(pair[0].detach()).mean())
            optimizer = torch.optim.Adam(pair, lr=rate)
            schedule = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, max_lr=rate, total_steps=steps, pct_start=0.1
            )
            for _ in range(steps):
                projections = query_inverse @ pair[0], key_inverse @ pair[1]
                loss = _loss(*projections, *self._draw(generator, where), self.scale)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                if progress is not None:
                    progress(1)
        return query_inverse @ pair[0].detach(), key_inverse @ pair[1].detach()

    def _draw(
        self, generator: torch.Generator, where: torch.device
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys (Hkv, T, D), their `seen`, N queries (Hkv, G, N, D) and their positions (N,)."""
        number = int(torch.randint(len(self._prompts), (), generator=generator))
        prompt = self._prompts[number]
        picks = torch.randint(len(prompt.positions), (QUERIES_PER_STEP,), generator=generator)
        picks = picks.to(prompt.positions.device)
        return (
            prompt.keys.to(where, torch.float32),
            prompt.seen.to(where),
            prompt.queries[:, :, picks].to(where, torch.float32),
            prompt.positions[picks].to(where),
        )


def _loss(
    query: Tensor,
    key: Tensor,
    keys: Tensor,
    seen: Tensor,
    queries: Tensor,
    positions: Tensor,
    scale: float,
) -> Tensor:
    """Cross-entropy, per query and head, from attention to the scores of the pair."""
    position = torch.arange(keys.shape[1], device=keys.device)
    visible = seen & (position <= positions[:, None])  # (Hkv, 1, N, T)
    chosen = visible & (position >= SINK) & (position <= positions[:, None] - RECENT)
    with torch.no_grad():
        exact = scale * (queries @ keys[:, None].mT)
        attention = exact.masked_fill(~visible, -torch.inf).softmax(-1).masked_fill(~chosen, 0)
    score = scale * ((queries @ query[:, None]) @ (keys @ key)[:, None].mT)
    # A finite fill: a query without a choice then has a softmax, and no weight.
    predicted = score.masked_fill(~chosen, -1e30).log_softmax(-1)
    return -(attention * predicted).sum(-1).mean()


def _rms(part: Tensor) -> Tensor:
    """(Hkv, 1, 1), not zero."""
    return part.square().mean((1, 2), keepdim=True).sqrt().clamp_min(1e-12)
