"""What heads are said to miss is what attention in fp64 misses; spans are counted as words say."""

import pytest
import torch
from loki_compile.kernels.fused import index_rows
from loki_compile.kernels.spans import Span
from loki_compile.pca_store.covariance import KeyCovariance
from toy_models import make_model, prompt

from loki_compile.mass_curves import MassCurves, keys_at, missed_of, read_curves
from loki_compile.observation import Observed

SHARES = (0.05, 0.2, 0.5, 1.0)
SINK, RECENT = 2, 3
HEADS, GROUP, DIMS, TOKENS, RANK = 2, 2, 12, 70, 5
ROWS = torch.tensor([40, 53, 69])


def curves(rank=RANK):
    return MassCurves(False, "pca", rank, sink=SINK, recent=RECENT, shares=SHARES)


def keys_and_queries(seed):
    torch.manual_seed(seed)
    mixed = torch.randn(HEADS, DIMS, DIMS)
    keys = torch.randn(1, HEADS, TOKENS, DIMS) @ mixed / 2
    return keys, torch.randn(1, HEADS * GROUP, TOKENS, DIMS)


def attention_of(keys, queries, row):
    """(Hkv, T) fp64: the mean of a group's."""
    grouped = queries[0, :, row].double().unflatten(0, (HEADS, GROUP))
    scores = 0.3 * torch.einsum("hgd,htd->hgt", grouped, keys[0, :, : row + 1].double())
    return scores.softmax(-1).mean(1)


def ranks_of(keys, queries, row):
    """(Hkv, T) fp64, by an index of int8 in the basis of the whole prompt."""
    moments = KeyCovariance(HEADS, DIMS)
    moments.update(keys, queries)
    low, high = moments.score_optimal().truncate(RANK)
    rows, scale = index_rows(keys, high, torch.int8)
    near = (rows.double() * scale.double())[0, :, : row + 1]
    wanted = queries[0, :, row].double().unflatten(0, (HEADS, GROUP)) @ low.double()
    return torch.einsum("hgr,htr->hgt", wanted, near).amax(1)


def first(order, count, share):
    """Of the keys that a row sees, those that it reads in an order (T,) of them, best first."""
    always = [*range(SINK), *range(count - RECENT, count)]
    keep = max(Span.of((0, share)).keys(count), SINK + RECENT)
    rest = [int(t) for t in order if int(t) not in always]
    return (always + rest)[:keep]


@torch.no_grad()
def test_curves_are_what_attention_misses_of_the_keys_that_each_way_reads():
    layers = [keys_and_queries(seed) for seed in range(3)]
    seen = curves()
    seen.begin(ROWS)
    for number, (keys, queries) in enumerate(layers):
        own = Observed((f"{number}", 0), f"layer {number}", HEADS, DIMS, 0.3, None, (), ())
        seen.add(own, keys, [queries])
    assert not seen.reasons
    missed = missed_of([*seen.of_layers.values()], [seen.sums], [len(ROWS)])
    assert missed.layers.tolist() == [0, 0, 1, 1, 2, 2] and missed.heads.tolist() == [0, 1] * 3
    total = {name: torch.zeros(6, len(SHARES)) for name in ("ranked", "last")}
    read = torch.zeros(6, 6, len(SHARES))
    for row in ROWS.tolist():
        attention = torch.cat([attention_of(*layer, row) for layer in layers])
        ranked = torch.cat([ranks_of(*layer, row) for layer in layers]).argsort(-1, descending=True)
        for k, share in enumerate(SHARES):
            newest = first(range(row, -1, -1), row + 1, share)
            for head in range(6):
                chosen = first(ranked[head], row + 1, share)
                total["ranked"][head, k] += 1 - attention[head, chosen].sum()
                total["last"][head, k] += 1 - attention[head, newest].sum()
                for reader in range(head + 1, 6):
                    read[reader, head, k] += 1 - attention[reader, chosen].sum()
    for name, expected in total.items():
        found = getattr(missed, name).float()
        torch.testing.assert_close(found, expected / len(ROWS), rtol=0, atol=1e-5)
    for reader in range(6):
        for source in range(6):
            if source // 2 < reader // 2:
                found, expected = missed.read[reader, source], read[reader, source] / len(ROWS)
                torch.testing.assert_close(found.float(), expected, rtol=0, atol=1e-5)
            else:
                assert missed.read[reader, source].isinf().all()


@pytest.mark.parametrize("visible", [1, 4, 35, 36, 1000, 4097])
def test_shares_of_keys_are_what_words_of_these_shares_read(visible):
    keys = keys_at(SHARES, torch.tensor([visible]), SINK + RECENT).tolist()
    spans = [Span.of((0, share)) for share in SHARES]
    assert keys == [min(visible, max(span.keys(visible), SINK + RECENT)) for span in spans]


@torch.no_grad()
def test_every_layer_of_a_model_is_seen_and_prompts_count_alike():
    model, seen, found = make_model(layers=3), curves("auto"), []
    prompts = [(prompt(1, 90)[0], torch.tensor([70, 89])), (prompt(2, 120)[0], torch.arange(100))]
    read_curves(model, seen, prompts, lambda: found.append({**seen.sums}))
    layers = [*seen.of_layers.values()]
    assert [layer.path for layer in layers] == [f"model.layers.{n}.self_attn" for n in range(3)]
    assert not seen.sums and not seen.orders
    apart = [missed_of(layers, [each], [n]) for each, n in zip(found, (2, 100), strict=True)]
    both = missed_of(layers, found, [2, 100])
    torch.testing.assert_close(both.ranked, (apart[0].ranked + apart[1].ranked) / 2)
    torch.testing.assert_close(both.last, apart[0].mean(apart[1]).last)
    for curve in (both.ranked, both.last, both.read[4, 1]):
        assert (curve.diff(dim=-1) <= 1e-6).all() and (curve[..., -1].abs() < 1e-5).all()
    assert (both.ranked[:, 1] < both.last[:, 1]).all()


def test_what_cannot_be_seen_is_one_line():
    said = r"0 layers were seen in a prompt of 4 tokens: .* Needs a decoder whose prefill is one"
    with pytest.raises(ValueError, match=said):
        read_curves(Nothing(), curves(), [(torch.arange(4), ROWS)], lambda: None)


class Nothing(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4))

    def forward(self, input_ids):
        return input_ids * self.weight
