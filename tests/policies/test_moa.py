"""policy="moa": each KV head reads the first keys and a span of the last ones, in two ranges."""

import pytest
import torch
from loki_compile.kernels import positions
from loki_compile.kernels.spans import Span, Spans, heads_from, heads_text, span_of
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from toy_attends import INTERLEAVED, gqa_flag, gqa_repeat_kv, interleaved, mqa_broadcast, plain
from toy_capture import clear_runtime
from toy_conversation import Conversation, farthest_apart, tokens
from toy_decoders import REWRITTEN, Spelling, ToyDecoder
from toy_masks import alibi, causal, causal_float, left_padded, no_mask
from toy_models import LONG, make_model, prompt, started, tiny_deepseek, tiny_llama
from toy_options import HEADS, KV_HEADS
from toy_policies import DirectPolicy, in_spans
from toy_writes import cat_bhtd, cat_folded, index_copy_method, ring, roll_window, slice_assignment
from transformers import DynamicCache

from loki_compile import LokiConfig, reports, stats
from loki_compile.policies.kinds import Kind, kind_of

STEPS = 3
FEW = {"min_context": 0, "sink": 1, "recent": 2}
SPANS = ["3", "0.5N", "9|-6+1N", "0", "2+0.25N", "1N"]
_static = Spelling(index_copy_method)
_cat = Spelling(cat_bhtd, mask=no_mask, growing=True)
QUICK = [
    _cat,
    _cat.but(write=cat_folded, layout="btf", mask=causal, new_tokens=3),
    _static.but(new_tokens=2, mask=left_padded),
    _static.but(mask=causal_float, attend=plain, kv_heads=6),
    _static.but(write=slice_assignment, position="int", attend=mqa_broadcast, kv_heads=1),
    _static.but(mask=alibi, attend=plain, kv_heads=HEADS),
    _static.but(write=ring),
    _static.but(write=roll_window),
]
# Query heads of one KV head have masks of their own there: dense.
_refused = [s for s in REWRITTEN if s.mask is alibi and s.kv_heads < HEADS]
SLOW = [pytest.param(s, marks=pytest.mark.slow) for s in REWRITTEN if s not in [*QUICK, *_refused]]
interpreting = pytest.mark.usefixtures("interpreted")


def word_for(kv_heads: int, sink: int = 2) -> str:
    return f"moa:{sink}:" + ",".join(SPANS[head % len(SPANS)] for head in range(kv_heads))


def compare(module, policy, truth, options=FEW) -> float:
    """Largest difference of outputs over some steps from equal caches."""
    fast = torch.compile(module, backend="loki", options={**options, "policy": policy})
    here = Conversation.start(module.spelling)
    there = here.fork()
    return farthest_apart(here, there, fast, module, tokens(module.spelling, STEPS), truth)


@interpreting
@pytest.mark.parametrize("spelling", [*QUICK, *SLOW], ids=lambda s: s.name)
@torch.no_grad()
def test_each_head_reads_its_span_by_the_definition(spelling, interpreted):
    module = ToyDecoder(spelling).eval()
    word = word_for(module.kv_heads)
    truth = DirectPolicy(word, module.kv_heads, FEW, interleaved=spelling.attend in INTERLEAVED)
    assert compare(module, word, truth) < 2e-5
    assert stats()["sparse_steps"] == STEPS
    assert stats()["rebuilds"] == stats()["index_bytes"] == 0
    assert interpreted.calls("loki.attention") == len(interpreted.graphs)
    assert not interpreted.calls("loki.attend") and not interpreted.calls("loki.select")
    (site,) = reports()[-1].sites
    assert (site.outcome, site.policy) == ("sparse", "moa") and "% of 8192 keys" in site.note


@interpreting
@pytest.mark.parametrize("spelling", QUICK[:3], ids=lambda s: s.name)
@torch.no_grad()
def test_without_a_plan_every_head_reads_the_first_and_the_last_of_top_k(spelling):
    module = ToyDecoder(spelling).eval()
    assert compare(module, "moa", None, {**FEW, "top_k": 1.0}) < 2e-5
    torch._dynamo.reset()
    whole = "moa:1:0.4N"
    truth = DirectPolicy(whole, module.kv_heads, FEW)
    for options in ({"top_k": 0.4}, {"top_k": 12}):
        torch._dynamo.reset()
        alpha, beta = (0, options["top_k"]) if options["top_k"] < 1 else (11, 0.0)
        guess = Kind("moa", spans=(Span.of((alpha, beta)),), sink=1)
        truth = DirectPolicy(str(guess), module.kv_heads, FEW)
        assert compare(module, "moa", truth, {**FEW, **options}) < 2e-5


@interpreting
@torch.no_grad()
def test_as_many_graphs_as_for_loki_whatever_the_sizes(interpreted):
    """A cache that grows, and batches that differ, with sizes as symbols."""
    made = {}
    for policy in ("loki", word_for(3)):
        torch._dynamo.reset()
        clear_runtime()
        interpreted.graphs.clear()
        module = ToyDecoder(_cat.but(kv_heads=3)).eval()
        fast = torch.compile(
            module, backend="loki", dynamic=True, options={**FEW, "top_k": 0.5, "policy": policy}
        )
        for batch, filled in ((2, 18), (3, 30), (2, 47)):
            here = Conversation.start(module.spelling, filled=filled, batch=batch)
            for x in tokens(module.spelling, 4, batch=batch):
                torch._dynamo.mark_static(x, 1)
                there = here.fork()
                out = here.step(fast, x)
                if policy != "loki":
                    with DirectPolicy(policy, 3, FEW):
                        expected = there.step(module, x)
                    torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)
        assert stats()["sparse_steps"] == 12
        made[policy] = len(interpreted.graphs)
    assert made[word_for(3)] <= made["loki"]


@interpreting
@torch.no_grad()
def test_spans_are_not_dense_attention_nor_those_of_other_heads():
    """Otherwise the comparison with the definition would prove nothing."""
    module = ToyDecoder(_cat).eval()
    word = word_for(module.kv_heads)
    assert compare(module, word, None) > 1e-2
    torch._dynamo.reset()
    kind = kind_of(word)
    turned = Kind("moa", spans=kind.spans[::-1], sink=2)
    assert compare(module, word, DirectPolicy(str(turned), module.kv_heads, FEW)) > 1e-2


@interpreting
@torch.no_grad()
def test_a_row_below_min_context_reads_all_whatever_its_neighbours_see():
    module = ToyDecoder(_static.but(mask=left_padded)).eval()
    for least in (0, 26, 29, 30, 100):  # rows see 31, 28 and 25 keys at first
        torch._dynamo.reset()
        options = {**FEW, "min_context": least}
        truth = DirectPolicy(word_for(module.kv_heads), module.kv_heads, options)
        assert compare(module, word_for(module.kv_heads), truth, options) < 2e-5


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [1, 3, 7])
@pytest.mark.parametrize("sink, recent, least", [(0, 1, 0), (4, 3, 0), (1, 1, 40), (90, 1, 0)])
def test_ranges_are_what_the_rule_says_of_what_each_row_sees(kv_heads, sink, recent, least):
    cached = 61
    generator = torch.Generator().manual_seed(kv_heads)
    q, k = torch.zeros(3, 2 * kv_heads, 4, 8), torch.zeros(3, kv_heads, cached, 8)
    masks = [None, torch.rand(3, 1, 4, cached, generator=generator) > 0.3]
    masks.append(torch.rand(1, 2 * kv_heads, 4, cached, generator=generator) > 0.6)
    masks[1][0, 0, 0] = False
    masks[1][0, 0, 1, 5:] = False
    kind = kind_of(word_for(kv_heads, sink))
    spans = Spans(kind.spans, sink, recent, least)
    config = LokiConfig(sink=sink, recent=recent, min_context=least, top_k=200)
    for mask in masks:
        added = None if mask is None else torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        for form in {id(m): m for m in (mask, added)}.values():
            slots = positions.visible_slots(q, k, form)
            found = positions.span_ranges(slots, kv_heads, *spans.numbers).expand(3, kv_heads, 4, 4)
            seen = torch.ones(3, 2 * kv_heads, 4, cached, dtype=torch.bool)
            seen = seen if mask is None else seen & mask
            wanted = in_spans(seen, kv_heads, kind, config)
            by_head = seen.unflatten(1, (kv_heads, -1)).any(2)
            for row in torch.cartesian_prod(*map(torch.arange, (3, kv_heads, 4))).tolist():
                first, stop, last, end = found[tuple(row)].tolist()
                assert 0 <= first <= stop <= last <= end <= cached
                read = [*range(first, stop), *range(last, end)]
                visible = by_head[tuple(row)]
                read = [at for at in read if visible[at]]
                at = wanted[tuple(row)]
                assert read == at[at >= 0].tolist()
                count = int(visible.sum())
                assert len(read) == spans.keys(count)[row[1] % len(spans.heads)]


@pytest.mark.parametrize("text", ["0", "1024", "0.25N", "512+0.25N", "-1024+1N", "64|-1024+1N"])
def test_spans_are_read_as_they_are_written(text):
    assert str(span_of(text)) == text
    assert heads_text(heads_from(f"7,{text}")) == f"7,{text}"
    word = f"moa:64:7,{text}"
    assert str(kind_of(word)) == word


def test_a_beta_is_kept_through_its_text():
    for beta in range(0, 65537, 97):
        span = Span(((5, beta),))
        assert span_of(str(span)) == span


@pytest.mark.parametrize(
    "policy, says",
    [
        ("moa:64:", "none of that name"),
        ("moa:64:1.5N", "beta 1.5"),
        ("moa:64:-5N", "found a span"),
        ("moa:64:7,,8", "found a span ''"),
        ("moa:x:7", "none of that name"),
        ("moa:1:99999999999", "found a span"),
        ("moa+dense", "chooses for nobody"),
        ({"0-3": "moa:1:2N"}, "beta 2.0"),
    ],
)
def test_spans_that_are_none_are_refused_in_one_line(policy, says):
    with pytest.raises(ValueError) as caught:
        LokiConfig(policy=policy)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith("policy=")


@interpreting
@pytest.mark.parametrize(
    "policy, says",
    [
        ("moa:4:7,8,9", "2 KV heads, and is to read 3 spans"),
        ({0: "moa:4:7", 1: "reuse:0"}, 'which is "moa:4:7" and does not choose'),
    ],
)
@torch.no_grad()
def test_what_a_model_cannot_do_is_refused_in_one_line(policy, says):
    model = tiny_llama()
    fast = torch.compile(model, backend="loki", options={**FEW, "policy": policy})
    cache = DynamicCache(config=model.config)
    model(torch.randint(64, (1, 9)), past_key_values=cache)
    with pytest.raises(ValueError) as caught:
        fast(torch.randint(64, (1, 1)), past_key_values=cache)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def by_head(heads: int):
    """bool (1, heads, S, T): even heads see early keys alone, odd ones the first and the last."""

    def mask(batch, new, slots, at):
        key = torch.arange(slots)
        early, ends = (key > 4) & (key < 11), (key < 2) | (key > 12)
        odd = (torch.arange(heads) % 2 == 1).view(1, heads, 1, 1)
        return causal(batch, new, slots, at) & torch.where(odd, ends, early)

    return mask


def in_groups(q, keys, values, mask):
    """Scores (B, Hkv, G, S, T), the mask the same for all G."""
    scores = q.unflatten(1, (KV_HEADS, -1)) @ keys[:, :, None].transpose(-1, -2)
    scores = scores.masked_fill(~mask[:, :, None], -torch.inf)
    return (scores.softmax(-1) @ values[:, :, None]).flatten(1, 2)


def with_row_sinks(q, keys, values, mask):
    """Each query head has a sink logit, which hides nothing."""
    sinks = torch.linspace(-1, 1, HEADS).view(1, HEADS, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)
    keys, values = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (keys, values))
    scores = (q @ keys.transpose(-1, -2) * 0.3).masked_fill(~mask, -torch.inf)
    return torch.cat((scores, sinks), -1).softmax(-1)[..., :-1] @ values


def flexible(differ: bool):
    def attend(q, keys, values, mask):
        def visible(b, h, i, k):
            return mask[b, 0, i, k] & ((k + h) % 3 != 0 if differ else k != 3)

        shape = (mask.shape[0], q.shape[1] if differ else None, *mask.shape[2:])
        blocks = create_block_mask(visible, *shape, device="cpu")
        return flex_attention(q, keys, values, block_mask=blocks, enable_gqa=True)

    return attend


@interpreting
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "changes, sparse",
    [
        ({"attend": gqa_flag, "mask": by_head(HEADS)}, False),
        ({"attend": mqa_broadcast, "mask": by_head(HEADS), "kv_heads": 1}, False),
        ({"attend": gqa_repeat_kv, "mask": alibi}, False),  # what is added may hide as well
        ({"attend": interleaved, "mask": by_head(HEADS)}, False),
        ({"attend": flexible(True), "mask": left_padded}, False),
        ({"attend": flexible(False), "mask": left_padded}, True),
        ({"attend": in_groups, "mask": by_head(KV_HEADS)}, True),
        ({"attend": plain, "mask": by_head(HEADS), "kv_heads": HEADS}, True),
        ({"attend": with_row_sinks, "mask": causal}, True),
    ],
)
@torch.no_grad()
def test_heads_of_a_group_that_see_keys_of_their_own_are_dense(changes, sparse):
    """Of two such heads one could read none of the keys that it sees, and give zeros."""
    module = ToyDecoder(_static.but(**changes)).eval()
    difference = compare(module, "moa:2:3", None)
    (site,) = reports()[-1].sites
    assert site.outcome == ("sparse" if sparse else "dense")
    if sparse:
        assert difference > 1e-3
        torch._dynamo.reset()
        assert compare(module, "moa:2:3", None, {**FEW, "recent": 40}) < 2e-5
    else:
        assert difference < 2e-5
        assert "'moa' cannot serve it: query heads of one KV head see" in site.reason
        assert "\n" not in site.reason


@interpreting
@torch.no_grad()
def test_spans_and_other_ways_share_a_graph_layer_by_layer():
    model = make_model(layers=5)
    words = ["moa:4:8,0.5N", "oracle", "moa:8:0.25N", "reuse", "moa:4:1N"]
    policy = dict(enumerate(words))
    fast = torch.compile(model, backend="loki", options={"policy": policy})
    ids = prompt(1, LONG + 2)
    cache = started(model, "growing", ids[:, :LONG])
    for at in (LONG, LONG + 1):
        fast(ids[:, at : at + 1], past_key_values=cache)
    sites = reports()[-1].sites
    assert [s.policy for s in sites] == ["moa", "oracle", "moa", "reuse of layer 1", ""]
    assert sites[4].outcome == "dense by plan"  # all keys, however many there are
    assert stats()["sparse_steps"] == 2 and stats()["rebuilds"] == 0


@interpreting
@torch.no_grad()
def test_latents_in_two_tensors_are_read_in_ranges():
    model = tiny_deepseek()
    ids = torch.randint(64, (1, 23))
    for policy, least in ((None, 0.0), ("moa:2:5", 1e-3)):
        torch._dynamo.reset()
        options = {**FEW, "policy": policy or "moa", "top_k": 1.0}
        fast = torch.compile(model, backend="loki", options=options)
        here, there = (DynamicCache(config=model.config) for _ in range(2))
        for cache in (here, there):
            model(ids[:, :20], past_key_values=cache)
        apart = []
        for at in range(20, 23):
            out = fast(ids[:, at : at + 1], past_key_values=here).logits
            apart.append(out - model(ids[:, at : at + 1], past_key_values=there).logits)
        worst = torch.cat(apart).abs().max()
        assert worst < 2e-4 if policy is None else worst > least
        assert {site.outcome for site in reports()[-1].sites} == {"sparse"}
