"""The options of `torch.compile(..., backend="loki", options={...})`, checked in one place."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loki_compile.kernels.ops import KEEP_ALL_Q16, Budget
from loki_compile.pca_store.basis import AUTO, AUTO_SHARE, BasisSet
from loki_compile.policies.kinds import (
    PLANS,
    RANKINGS,
    SPANS,
    Kind,
    kind_of,
    why_no_mass,
    why_unweighed,
)

if TYPE_CHECKING:
    from loki_compile.passes.attention import AttentionSite

# Keys: no model of today caches as many.
_LONGEST = 1 << 30
MASS = "mass:"
# Of the keys that a row sees, where a mass names no ceiling: twice the default of `top_k`.
_CEILING = 0.25


class _Open(float):
    """The default of `top_k`, which nobody has asked for; as a number it is like any other."""


@dataclass(frozen=True)
class LokiConfig:
    """Options, as in docs/options.md. As in scikit-learn a float is a fraction, an int a count.

    Raises:
      ValueError: an unknown name, or a value outside what is allowed; the message says what was
        found, what is needed and what to do.
    """

    top_k: int | float | str = _Open(0.125)
    rank: int | float | str = AUTO
    basis: str | Path | BasisSet = "auto"
    min_context: int = 1024
    sink: int = 4
    recent: int = 32
    share: str = "group"
    group_choice: str = "max"
    pack_gqa: bool = True
    index_dtype: str = "auto"
    layers: str | tuple[int | str, ...] = "all"
    policy: str | Mapping[Any, str] = "loki"
    prefill: str = "dense"
    strict: bool = False
    watch_mass: float | None = None
    inductor: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_options(cls, options: dict[str, Any] | None) -> LokiConfig:
        """Builds the configuration from torch.compile's `options`."""
        names = [f.name for f in dataclasses.fields(cls)]
        for name in options or {}:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f'; did you mean "{near[0]}"?' if near else "."
                raise ValueError(
                    f'backend="loki" has no option "{name}"{hint} '
                    f"Use one of: {', '.join(names)}. (Inductor's own go into inductor={{...}}.)"
                )
        return cls(**(options or {}))

    def __post_init__(self) -> None:
        if isinstance(self.top_k, str):
            _mass_and_ceiling(self.top_k)
        else:
            _fraction_or_count("top_k", self.top_k, "keys each query reads")
        if self.rank == AUTO:
            pass
        elif isinstance(self.rank, str):
            _variance(self.rank)
        else:
            _fraction_or_count("rank", self.rank, "dims of the key index")
        for name in ("min_context", "sink", "recent"):
            value = getattr(self, name)
            if not _is_int(value) or value < 0:
                raise ValueError(f"{name}={value!r}: needs a count of keys >= 0.")
        if isinstance(self.ceiling, int) and self.ceiling < self.sink + self.recent:
            raise ValueError(
                f"top_k={self.top_k} does not hold sink={self.sink} + recent={self.recent} keys "
                "that are always kept: raise top_k, or lower sink or recent."
            )
        _one_of("share", self.share, ("group", "head"))
        _one_of("index_dtype", self.index_dtype, ("auto", "int8", "cache"))
        _one_of("group_choice", self.group_choice, ("max", "probability"))
        _policies(self.policy)
        self._check_weighed()
        _one_of("prefill", self.prefill, ("dense", "spans"))
        for name in ("pack_gqa", "strict"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: needs True or False.")
        if self.basis is None or not isinstance(self.basis, (str, Path, BasisSet)):
            raise ValueError(
                f'basis={self.basis!r}: needs "auto", the name of a stored basis, a path, a hub '
                "id, or a BasisSet. `loki bases list` shows what is stored."
            )
        if self.layers != "all":
            one = isinstance(self.layers, str) or not isinstance(self.layers, Sequence)
            picks = (self.layers,) if one else self.layers
            if not picks or not all(_is_int(p) or isinstance(p, str) for p in picks):
                raise ValueError(
                    f'layers={self.layers!r}: needs "all", or layer numbers and module path '
                    'patterns such as (2, 3) or ("model.layers.1*",).'
                )
            object.__setattr__(self, "layers", tuple(picks))
        if not isinstance(self.inductor, dict):
            raise ValueError(f"inductor={self.inductor!r}: needs a dict of Inductor options.")
        if self.inductor:
            _inductor_options(self.inductor)

    def _check_weighed(self) -> None:
        """
        Raises:
          ValueError: keys are to be weighed, or a bound watched, by what is none, or by policies
            whose rankings give no weights.
        """
        watched = self.watch_mass
        if watched is not None and not (isinstance(watched, float) and 0.0 < watched < 1.0):
            raise ValueError(
                f"watch_mass={watched!r}: needs None, or the share of attention left out above "
                "which a layer is warned of, a float in (0, 1) such as 0.1."
            )
        names = [self.policy] if isinstance(self.policy, str) else list(self.policy.values())
        why_not = why_no_mass if self.mass else why_unweighed
        reasons = {name: why for name in names if (why := why_not(name))}
        if not reasons or not (self.mass or (watched is not None and isinstance(self.policy, str))):
            return
        name, why = next(iter(reasons.items()))
        asked, fixed = f"top_k={self.top_k!r}", "; or a fixed top_k such as 0.125"
        if not self.mass:
            asked, fixed = f"watch_mass={watched!r}", ""
        raise ValueError(
            f"{asked}: policy={name!r} {why}: needs a policy whose scores weigh keys, such as "
            f'"loki", "oracle" or "tidal"{fixed}.'
        )

    def notices(self) -> list[str]:
        """What is allowed and is hardly meant, a sentence each."""
        found = []
        if self.min_context >= _LONGEST:
            found.append(
                f"min_context={self.min_context} is longer than any context: nothing will run "
                "sparse. Lower min_context (the default is 1024)."
            )
        elif self.min_context > 0 and self.budget.covers(_LONGEST) and not self.reads_spans:
            found.append(
                f"top_k={self.top_k!r} covers every context: nothing will run sparse. Lower top_k "
                "(the default is 0.125)."
            )
        if self.prefill == "spans" and not self._may_have_spans:
            found.append(
                f'prefill="spans" is for layers of spans, and policy={self.policy!r} has none: '
                'prompts will be dense. Use policy="moa".'
            )
        return found

    @property
    def _may_have_spans(self) -> bool:
        """Whether a policy may have layers of spans: what a file holds is seen when it is read."""
        if isinstance(self.policy, str):
            return bool(self.plan_file) or self.policy.startswith(SPANS)
        return any(kind.ranking == SPANS for kind in self.kinds)

    def kind_for(self, site: AttentionSite, number: int) -> Kind:
        """What the policy has one site do, the `number`-th of its graph: the first entry that names
        it. Not for plans of all layers."""
        if isinstance(self.policy, str):
            return kind_of(self.policy)
        for layers, name in self.policy.items():
            if site.is_among(_picks(layers), number):
                return kind_of(name)
        return kind_of("loki")

    def kind_of_layer(self, layer: int) -> Kind:
        """What the policy has a layer do that is known by its number alone; "*" names all."""
        if isinstance(self.policy, str):
            return kind_of(self.policy)
        named = (name for key, name in self.policy.items() if {layer, "*"} & {*_picks(key)})
        return kind_of(next(named, "loki"))

    @property
    def plan_file(self) -> str:
        """The path of the plan that `policy` names; "" where it names none."""
        return self.policy if isinstance(self.policy, str) and _is_file(self.policy) else ""

    @property
    def kinds(self) -> list[Kind]:
        """Those that `policy` names for layers; none where it is one name for all."""
        names = () if isinstance(self.policy, str) else self.policy.values()
        return [kind_of(name) for name in names]

    @property
    def reads_spans(self) -> bool:
        """Whether some layers read as many keys as a plan or their words say, and not `top_k`."""
        if isinstance(self.policy, str):
            if self.plan_file or self.policy.startswith(SPANS):
                return True
            return self.policy not in PLANS and bool(kind_of(self.policy).budgets)
        return any(kind.ranking == SPANS or kind.budgets for kind in self.kinds)

    @property
    def open_budget(self) -> bool:
        """Whether nobody has said how many keys are read: a plan that is stored for the model then
        may."""
        return self.policy == "loki" and isinstance(self.top_k, _Open)

    def layers_named(self) -> list[tuple[str, Any, tuple[int | str, ...]]]:
        """Words by which options call layers: the option, its words, what these stand for."""
        named: list[tuple[str, Any, tuple[int | str, ...]]] = []
        if self.layers != "all":
            named += [("layers", pick, (pick,)) for pick in self.layers]
        if not isinstance(self.policy, str):
            named += [("policy", layers, _picks(layers)) for layers in self.policy]
        return named

    @property
    def rank_by_spectrum(self) -> bool:
        """Whether a basis' spectrum decides how many dims the index has."""
        return isinstance(self.rank, str) and self.rank != AUTO

    @property
    def plain_rank(self) -> int | float:
        """How many dims keys are ranked in, a fraction or a count, where no basis has a say."""
        return AUTO_SHARE if isinstance(self.rank, str) else self.rank

    @property
    def mass(self) -> float:
        """The share of attention that a row's keys are to hold; 0 where `top_k` says how many."""
        return _mass_and_ceiling(self.top_k)[0] if isinstance(self.top_k, str) else 0.0

    @property
    def weighs(self) -> bool:
        """Whether what rows read and leave out is added up, by layers."""
        return bool(self.mass) or self.watch_mass is not None

    @property
    def ceiling(self) -> int | float:
        """The most keys that a row reads, a fraction or a count: `top_k`, but where that is a
        mass."""
        return _mass_and_ceiling(self.top_k)[1] if isinstance(self.top_k, str) else self.top_k

    @property
    def budget(self) -> Budget:
        """`top_k`, `sink`, `recent` and `min_context` as the passes and kernels take them."""
        cap, keep, most = None, KEEP_ALL_Q16, self.ceiling
        if isinstance(most, int):
            cap = most
        else:
            keep = max(1, round(most * KEEP_ALL_Q16))
        return Budget(cap, keep, self.sink, self.recent, self.min_context, self.mass)

    def to_options(self) -> dict[str, Any]:
        """What differs from the defaults, as an `options` dict; a `top_k` that was asked for, too:
        under the default's a stored plan may say how many keys are read."""
        default = LokiConfig()
        fields = [f.name for f in dataclasses.fields(self)]
        given = {n: getattr(self, n) for n in fields if getattr(self, n) != getattr(default, n)}
        return given if isinstance(self.top_k, _Open) else {"top_k": self.top_k, **given}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _mass_and_ceiling(value: str) -> tuple[float, int | float]:
    """Of "mass:0.95", "mass:0.95,2048" or "mass:0.95,0.25".

    Raises:
      ValueError: another word, a share or a ceiling that cannot be.
    """
    share, comma, most = value.removeprefix(MASS).partition(",")
    try:
        mass = float(share)
        ceiling = _CEILING if not comma else int(most) if most.strip().isdecimal() else float(most)
    except ValueError:
        mass = ceiling = 0.0
    fits = ceiling >= 1 if isinstance(ceiling, int) else 0.0 < ceiling <= 1.0
    if value.startswith(MASS) and 0.0 < mass < 1.0 and fits:
        return mass, ceiling
    raise ValueError(
        f"top_k={value!r:.60}: needs a fraction in (0, 1] (float), a count >= 1 (int), or "
        f'"{MASS}0.95": a share of attention in (0, 1), with the most keys behind it, as in '
        f'"{MASS}0.95,2048" or "{MASS}0.95,{_CEILING}" (the ceiling where there is none).'
    )


def _fraction_or_count(name: str, value: Any, meaning: str) -> None:
    if _is_int(value) and value >= 1:
        return
    if isinstance(value, float) and 0.0 < value <= 1.0:
        return
    raise ValueError(
        f"{name}={value!r}: needs a fraction in (0, 1] (float) or a count >= 1 (int) of {meaning}."
    )


def _variance(value: str) -> None:
    kind, _, share = value.partition(":")
    try:
        ok = kind == "variance" and 0.0 < float(share) <= 1.0
    except ValueError:
        ok = False
    if not ok:
        raise ValueError(
            f'rank={value!r}: needs "auto", a count, a fraction of head_dim, or "variance:0.9" '
            "(the share of the keys' variance that the index must hold)."
        )


def _picks(layers: Any) -> tuple[int | str, ...]:
    """Layer numbers and patterns of a key of `policy`: 3, "0-3", "model.layers.1*", or several."""
    if isinstance(layers, (int, str)):
        layers = (layers,)
    picks: list[int | str] = []
    for pick in layers:
        ends = pick.split("-") if isinstance(pick, str) else []
        if 1 <= len(ends) <= 2 and all(end.isdecimal() for end in ends):
            picks += range(int(ends[0]), int(ends[-1]) + 1)
        else:
            picks.append(pick)
    return tuple(picks)


def _names_layers(pick: Any) -> bool:
    """Whether a key of `policy`, or an item of one, names any layer: no number below 0, no range
    that is empty."""
    if isinstance(pick, str):
        return bool(pick) and bool(_picks(pick))
    return _is_int(pick) and pick >= 0


def _policies(policy: Any) -> None:
    if not isinstance(policy, Mapping):
        if policy not in PLANS and not (isinstance(policy, str) and _is_file(policy)):
            alone = kind_of(policy)
            if alone.reuse or alone.dense or alone.sources:
                raise ValueError(
                    f"policy={policy!r} is for some layers: needs a dict, such as "
                    '{"0-1": "dense", 2: "loki", "*": "reuse"}, or one of '
                    f"{', '.join(map(repr, (*RANKINGS, *PLANS)))}."
                )
        return
    for layers, name in policy.items():
        many = layers if isinstance(layers, tuple) else (layers,)
        if not many or not all(_names_layers(pick) for pick in many):
            raise ValueError(
                f'policy={{{layers!r}: ...}}: needs layer numbers, ranges such as "0-3", or '
                'module path patterns such as "model.layers.1*".'
            )
        kind = kind_of(name)
        numbers = [pick for pick in _picks(layers) if isinstance(pick, int)]
        source = max(kind.sources, default=-1)
        if numbers and min(numbers) <= source:
            raise ValueError(
                f"policy={{{layers!r}: {name!r}}}: layer {min(numbers)} cannot read what layer "
                f"{source} chose, which does not lie before it: name an earlier layer."
            )


def _is_file(policy: str) -> bool:
    return policy.endswith((".json", ".tsv")) or ".tsv@" in policy


def _inductor_options(given: dict[str, Any]) -> None:
    import torch._inductor

    known = torch._inductor.list_options()
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f'; did you mean "{near[0]}"?' if near else ""
            raise ValueError(
                f"inductor={{{name!r}: ...}}: Inductor has no such option{hint or ';'} "
                "torch._inductor.list_options() has all of them."
            )


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: needs one of {', '.join(map(repr, allowed))}.")
