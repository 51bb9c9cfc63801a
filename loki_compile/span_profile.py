"""What a model loses where KV heads read spans of their keys: to first order, and measured.

The compiler's own front half finds the attention cores of a call, as `calibrate` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from loki_compile.gradients import Attended, Tape, attended, why_not
from loki_compile.kernels.fused import laid_out
from loki_compile.kernels.spans import Span, Spans
from loki_compile.observation import Seen
from loki_compile.passes.attention import AttentionSite
from loki_compile.passes.normalize import normalize
from loki_compile.passes.sites import find_sites
from loki_compile.pca_store.covariance import KeyCovariance
from loki_compile.pca_store.layer_plan import PlannedLayer
from loki_compile.span_effects import SpanEffects, attend_spans, span_effects
from loki_compile.watching import watched

_ALL = Spans((Span.of((0, 1.0)),), sink=0)
# Tokens that are enough to see every layer once.
_FEW = 16


@dataclass(frozen=True)
class Profiled:
    """Of one call, by the path of the layer: what spans do to its labels, and the numbers that a KV
    head caches of a token."""

    effects: dict[str, SpanEffects]
    numbers: dict[str, int]


class SpanProfiler:
    """Calls a decoder and looks on; for use in a `with`, the model is left as it was.

    layers: those whose attention is understood, in the order of the model, each with the word
    "dense"; known in full behind the first call of `effects`. refused: why that of another layer is
    not, by its path.
    """

    def __init__(self, model: nn.Module) -> None:
        """
        Raises:
          ValueError: a model in training mode.
        """
        if model.training:
            raise ValueError(
                "the model is in training mode; what its attention loses is defined without "
                "dropout: call model.eval() first"
            )
        self.model = model
        self.layers: list[PlannedLayer] = []
        self.refused: dict[str, str] = {}
        self.tapes: list[Tape] = []
        self.spans: Mapping[str, Spans] | None = None

    def __enter__(self) -> SpanProfiler:
        self._see_layers()
        self.watching = watched(self.model, self._look)
        self.call = self.watching.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.watching.__exit__(*error)
        self.tapes.clear()

    @torch.no_grad()
    def effects(
        self, inputs: Mapping[str, Any], labels: Tensor, spans: Spans, *, published: bool = False
    ) -> Profiled:
        """The effects of `spans`, each for every KV head, on the labels of one call.

        They are effects on minus the log-odds of each label, summed: those of the loss vanish where
        a model is sure, though it is sure because of what a head found. With `published` they are
        effects on the mean loss, entry by entry too, as MoA has it.

        Args:
          inputs: what the model is called with: one sequence, maybe behind a filled cache.
          labels: (L,) int64, the tokens that follow the last L of the call's.

        Raises:
          ValueError: a model whose attention is not in one graph with what it returns, or is not
            understood.
        """
        self.spans = None
        logits = self._called(inputs, labels)
        tapes = [tape for tape in self.tapes if tape.returned]
        if not tapes:
            raise ValueError(self._nothing())
        if len(tapes) > 1:
            raise ValueError(
                f"the model's attention is in {len(tapes)} graphs; needs a decoder whose prefill "
                "is one graph, with no graph break between its layers"
            )
        grad = _gradient(logits, labels, of_loss=published)
        found: dict[str, SpanEffects] = {}
        numbers: dict[str, int] = {}

        def see(each: Attended, grad: Tensor) -> None:
            path = each.site.path
            found[path] = _effects_of(each, grad, spans, published)
            numbers[path] = each.key.shape[-1] + each.value.shape[-1]

        tapes[0].backward([(logits, grad)], see)
        self.layers = [layer for layer in self.layers if layer.path in found]
        return Profiled({layer.path: found[layer.path] for layer in self.layers}, numbers)

    def keep_to(self, paths: Sequence[str], refused: Mapping[str, str]) -> None:
        """What an earlier run of the same model has found out of its layers."""
        self.layers = [layer for layer in self.layers if layer.path in set(paths)]
        self.refused = dict(refused)

    @torch.no_grad()
    def loss(
        self, inputs: Mapping[str, Any], labels: Tensor, spans: Mapping[str, Spans]
    ) -> tuple[float, Tensor]:
        """The mean loss of a call in which layers, by path, read spans; and its log-probabilities
        (L, vocabulary)."""
        self.spans = spans
        logits = self._called(inputs, labels)
        logs = logits[0, -len(labels) :].float().log_softmax(-1)
        return -float(logs.gather(-1, labels[:, None]).mean()), logs

    def _called(self, inputs: Mapping[str, Any], labels: Tensor) -> Tensor:
        for tape in self.tapes:
            tape.forget()
        result = self.call(**inputs)
        logits = getattr(result, "logits", result)
        logits = logits if isinstance(logits, Tensor) else logits[0]
        if logits.shape[0] != 1 or logits.shape[1] < len(labels):
            raise ValueError(
                f"found logits of shape {tuple(logits.shape)} for {len(labels)} labels; needs one "
                "sequence, and a token for each label"
            )
        return logits

    def _see_layers(self) -> None:
        seen = Seen(False, "pca", 0.25)
        device = next(self.model.parameters()).device
        ids = torch.arange(_FEW, device=device)[None] % 7
        with torch.no_grad(), watched(self.model, seen.observe) as run:
            run(input_ids=ids)
        if seen.error is not None:
            raise seen.error
        self.unseen = list(seen.reasons)
        for identity, path in seen.layers.items():
            weights = identity[0]
            heads = seen.held[identity]
            assert isinstance(heads, KeyCovariance)
            own = (path, weights, seen.blocks[weights], heads.num_kv_heads, "dense")
            self.layers.append(PlannedLayer(*own))
        seen.forget()
        if not self.layers:
            raise ValueError(self._nothing())

    def _nothing(self) -> str:
        reasons = "; ".join(self.unseen or self.refused.values()) or "it runs no attention"
        return (
            f"found no attention whose spans can be judged ({reasons[:300]}): needs a decoder in "
            "eval mode whose attention is understood"
        )

    def _look(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        normal, _ = normalize(gm)
        sites, skipped = find_sites(normal.graph, max_query_tokens=None)
        known = {layer.path for layer in self.layers}
        for skip in skipped:
            self.refused[skip.path] = skip.sentence()
        paths = [site.path for site in sites]
        plain = []
        for site in sites:
            why = why_not(site)
            if not why and site.path not in known:
                why = "which weights make its keys is not known"
            if not why and paths.count(site.path) > 1:
                why = "its module attends more than once"
            if why:
                self.refused[site.path] = why
            else:
                plain.append(site)
        if not plain:
            return gm.forward
        tape = Tape(normal, plain)
        self.tapes.append(tape)

        def run(*args: Any) -> Any:
            if self.spans is None:
                return tape.run(*args)
            return _Spanned(normal, plain, self.spans).run(*args)

        return run


class _Spanned(fx.Interpreter):
    """Takes the attention of layers anew, from what their spans hold."""

    def __init__(
        self, gm: fx.GraphModule, sites: Sequence[AttentionSite], spans: Mapping[str, Spans]
    ) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.sites = {site.node: site for site in sites if site.path in spans}
        self.spans = spans

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        site = self.sites.get(n)
        if site is None:
            return result
        self.env[n] = result
        each = attended(site, self.env)
        out = attend_spans(*_operands(each), self.spans[site.path], **_options(each))[None]
        if site.core.out_layout != ("b", "h", "s", "d"):
            out = laid_out(out, site.core.out_layout, site.group_dim)
        return out.reshape(result.shape).to(result.dtype)


def _effects_of(each: Attended, grad: Tensor, spans: Spans, entrywise: bool) -> SpanEffects:
    operands, options = _operands(each), _options(each)
    _check(each, operands, options)
    return span_effects(*operands, each.out[0], grad[0], spans, **options, entrywise=entrywise)


def _check(each: Attended, operands: Any, options: dict[str, Any]) -> None:
    """
    Raises:
      ValueError: the last row of the core is not attention over its operands, as understood.
    """
    query, key, value = operands
    mask = options["mask"]
    options = {**options, "mask": mask if mask is None else mask[:, -1:]}
    again = attend_spans(query[:, -1:], key, value, _ALL, **options)
    wide = torch.finfo(again.dtype).eps * 64 * float(value.abs().max())
    worst = float((again.float() - each.out[0, :, -1:].float()).abs().max())
    if not worst <= wide:
        raise ValueError(
            f"{each.site.path}: attention over what was understood as its operands is off by "
            f"{worst:.2g}: its mask or its caches are not what they seem; leave the layer out"
        )


def _operands(each: Attended) -> tuple[Tensor, Tensor, Tensor]:
    return each.query[0], each.key[0], each.value[0]


def _options(each: Attended) -> dict[str, Any]:
    mask = each.mask
    if mask is not None:
        mask = mask.expand(1, *mask.shape[1:])[0]
    return {
        "scale": each.site.scale,
        "mask": mask,
        "softcap": each.site.core.softcap,
        "sink_logits": each.sink_logits,
    }


def _gradient(logits: Tensor, labels: Tensor, *, of_loss: bool) -> Tensor:
    """At logits (1, S, V), for the labels of the last tokens: that of the mean loss, or of the sum
    of log(sum of the other tokens' chances) - log(the label's)."""
    grad = torch.zeros_like(logits)
    for row, label in enumerate(labels.tolist()):
        place = row - len(labels)
        own = logits[0, place].float()
        if not of_loss:
            own = own.clone()
            own[label] = -torch.inf
        chances = own.softmax(-1)
        chances[label] -= 1.0
        grad[0, place] = (chances / len(labels) if of_loss else chances).to(grad.dtype)
    return grad
