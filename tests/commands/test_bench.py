"""`loki bench`: each way is checked before it is timed, and its figures follow from one another."""

import dataclasses
import json
import logging
import math

import pytest
import torch
from click.testing import CliRunner
from torch.nn import functional as F

from loki_compile.commands import bench as bench_command
from loki_compile.commands import rounds as rounds_of
from loki_compile.commands import ways as ways_known
from loki_compile.commands.bench import policy_words
from loki_compile.commands.bench_rows import Judged, Row
from loki_compile.commands.clock import Reader, timed
from loki_compile.commands.main import main
from loki_compile.commands.measure import filled_cache, new_cache
from loki_compile.commands.traffic import Layer, cache_bytes, layers_of, weight_bytes
from loki_compile.commands.ways import packed_attention, policy_options, with_packed_attention
from loki_compile.config import LokiConfig
from loki_compile.report import SiteReport

transformers = pytest.importorskip("transformers")

ROUNDS = 2
STEPS_OF_A_ROUND = rounds_of.SETTLING + rounds_of.STEPS
AMONG = ("--rounds", ROUNDS, "--min-context", "30", "--top-k", "40")
FEW = (*AMONG, "--dense", "packed", "--cache", "static")


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("LOKI_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("loki_compile.commands.clock.CPU_BUFFER", 2**20)


def bench(*arguments):
    return CliRunner().invoke(main, ["bench", "random:1", *map(str, arguments)])


def succeed(*arguments):
    result = bench(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def rows_in(file):
    return json.loads(file.read_text())["rows"]


# ------------------------------------------------------------------------------ what it measures


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Two lengths, read and of noise, by both caches and two policies, node by node."""
    from loki_compile.engines import default_engine, interpreter

    file = tmp_path_factory.mktemp("bench") / "rows.json"
    contexts = ("--context", "150", "--context", "90", "--prompt", "100")
    policies = ("--policies", "loki,window@37", "--dense", "packed,exact")
    with pytest.MonkeyPatch.context() as patch, default_engine(interpreter):
        patch.setattr("loki_compile.commands.clock.CPU_BUFFER", 2**20)
        patch.setattr(rounds_of, "SETTLING_S", 1e9)
        shown = succeed(*contexts, *policies, *AMONG, "--out", file)
    return file, shown


def test_every_way_has_a_row_at_each_length_of_each_cache(measured):
    file, shown = measured
    found = [(row["cache"], row["context"], row["way"]) for row in rows_in(file)]
    ways = ("eager", "packed", "exact", "loki", "window@37")
    assert found == [
        (cache, context, way)
        for context in (90, 150)
        for cache in ("static", "dynamic")
        for way in ways
    ]
    assert all(row["note"] == "" and row["ms"] > 0 and row["cpu_ms"] > 0 for row in rows_in(file))
    assert f"wrote {file}" in shown
    assert file.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert logging.getLogger("loki_compile.notices").level == logging.NOTSET  # as it was


def test_dense_ways_give_eagers_logits_and_policies_do_not(measured):
    for row in rows_in(measured[0]):
        assert row["dense"] == (row["way"] in ("eager", "packed", "exact"))
        assert row["sparse"] is not row["dense"]
        if row["dense"]:
            assert row["error"] < 1e-5 and row["kl"] < 1e-9
        else:
            assert row["error"] > 1e-4 and 0 < row["kl"] < 1


def test_only_what_was_read_has_a_first_token(measured):
    for row in rows_in(measured[0]):
        assert (row["first_token_s"] is not None) == (row["context"] == 90)
        assert row["compile_s"] >= 0


def test_bytes_and_rates_follow_from_shapes_and_times(measured):
    """random:1: 2 KV heads x 128 in float32; an index of half the dims in bytes, and scales; all
    weights but the embedding table."""
    weights = 4 * (256 * (1024 + 2 * 256 + 1024) + 3 * 256 * 512 + 3 * 256 + 1024 * 256)
    each = 2 * 128 * 4
    for row in rows_in(measured[0]):
        tokens = row["context"] + rounds_of.WARM_UP + ROUNDS * STEPS_OF_A_ROUND // 2
        caches = {"loki": tokens * 2 * (64 + 4) + 40 * 2 * each, "window@37": 37 * 2 * each}
        assert row["cache_bytes"] == caches.get(row["way"], tokens * 2 * each)
        assert row["bytes"] == weights + row["cache_bytes"]
        assert row["gb_s"] == pytest.approx(row["bytes"] / row["ms"] * 1e3 / 1e9)
        assert row["share_of_limit"] == pytest.approx(row["gb_s"] / row["limit_gb_s"])


def test_slopes_and_ratios_follow_from_rows(measured):
    rows = rows_in(measured[0])
    by = {(row["cache"], row["context"], row["way"]): row for row in rows}
    for (cache, context, way), row in by.items():
        dense = min(by[cache, context, name]["ms"] for name in ("eager", "packed", "exact"))
        assert row["against_fastest_dense"] == pytest.approx(dense / row["ms"])
        if context == 90:
            assert row["slope_us_per_token"] is None
        else:
            longer = row["ms"] - by[cache, 90, way]["ms"]
            assert row["slope_us_per_token"] == pytest.approx(1e3 * longer / 60)


# --------------------------------------------------------------------------- going on, refusing


def test_a_run_goes_on_where_it_was_stopped(tmp_path, interpreted, monkeypatch):
    file = tmp_path / "rows.json"
    real, done = rounds_of.measured, []

    def stopping(model, ways, kind, ids, **options):
        if done:
            raise KeyboardInterrupt
        done.append(kind)
        return real(model, ways, kind, ids, **options)

    monkeypatch.setattr(rounds_of, "measured", stopping)
    command = ("--context", "40", "--context", "50", *FEW, "--out", file)
    stopped = bench(*command)
    assert stopped.exit_code == 130
    assert f"stopped: {file} holds 1 of 2 lengths; the same command goes on" in stopped.stderr
    first = rows_in(file)
    assert {row["context"] for row in first} == {40}
    monkeypatch.setattr(rounds_of, "measured", real)
    assert "holds 1 of 2 lengths already" in bench(*command).stderr
    assert rows_in(file)[: len(first)] == first
    assert {row["context"] for row in rows_in(file)} == {40, 50}
    monkeypatch.setattr(rounds_of, "measured", lambda *_, **__: pytest.fail("measured again"))
    succeed(*command)
    refused = bench(*command, "--rank", "7")
    assert refused.exit_code == 2 and "holds rows of a run with options" in refused.stderr


def test_a_run_that_is_stopped_without_out_says_that_nothing_is_kept(monkeypatch):
    def stopping(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(rounds_of, "measured", stopping)
    stopped = bench("--context", "40", *FEW)
    assert stopped.exit_code == 130
    assert "stopped: nothing is kept without --out" in stopped.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("loki,loki@1024,window", ["loki", "loki@1024", "window"]),
        ("moa:4:64,128", ["moa:4:64,128"]),
        ("window,moa:4:64|-10+1N,0.25N,loki", ["window", "moa:4:64|-10+1N,0.25N", "loki"]),
        ("moa:4:64;loki", ["moa:4:64", "loki"]),
        ("loki,128", ["loki", "128"]),  # which no policy is called
    ],
)
def test_a_comma_between_the_spans_of_a_word_belongs_to_the_word(text, words):
    assert policy_words(text) == words


def test_policies_may_be_repeated(tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(bench_command, "run_all", lambda *of: taken.extend(of[5]))
    monkeypatch.setattr(bench_command, "show_all", lambda *_: None)
    succeed("--context", "40", "--policies", "moa:4:64,128", "--policies", "loki,window")
    assert taken == ["moa:4:64,128", "loki", "window"]


def test_a_share_of_full_heads_is_no_budget():
    assert policy_options("heads.tsv@0.25", {})["policy"] == "heads.tsv@0.25"


def test_what_gives_other_logits_is_not_timed(tmp_path, interpreted, monkeypatch):
    """The others go on; and so they do where a way raises."""
    file = tmp_path / "rows.json"

    def broken(module, query, key, value, *arguments, **more):
        if query.shape[2] > 1:
            return packed_attention(module, query, key, value, *arguments, **more)
        out, _ = packed_attention(module, query, key, value, *arguments, **more)
        return 1.2 * out, None

    monkeypatch.setattr(ways_known, "packed_attention", broken)
    shown = succeed("--context", "40", *FEW, "--out", file)
    rows = {row["way"]: row for row in rows_in(file)}
    assert rows["packed"]["ms"] is None and "from eager's logits" in rows["packed"]["note"]
    assert rows["loki"]["ms"] > 0 and "not timed" in shown


def test_a_way_that_raises_leaves_the_others(tmp_path, interpreted, monkeypatch):
    file = tmp_path / "rows.json"

    def raising(*_, **__):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(ways_known, "packed_attention", raising)
    succeed("--context", "40", *FEW, "--out", file)
    rows = {row["way"]: row for row in rows_in(file)}
    assert "RuntimeError: no such kernel" in rows["packed"]["note"]
    assert rows["packed"]["ms"] is None and rows["loki"]["ms"] > 0


@pytest.mark.slow
def test_through_inductor_all_ways_are_right(tmp_path):
    file = tmp_path / "rows.json"
    succeed("--context", "90", *AMONG, "--dtype", "bfloat16", "--out", file)
    rows = rows_in(file)
    assert len(rows) == 12 and all(row["note"] == "" for row in rows)
    assert {row["way"] for row in rows if row["sparse"]} == {"loki"}


# --------------------------------------------------------------------------------- what follows


def row(way, context, ms, *, dense=False, cache="static", cpu=None):
    return Row(cache, context, way, dense, ms=ms, cpu_ms=cpu)


def test_what_is_over_3_percent_slower_than_a_dense_way_is_named():
    rows = [
        row("eager", 64, 5.0, dense=True, cpu=1.0),
        row("packed", 64, 2.0, dense=True, cpu=3.0),
        row("broken", 64, None, dense=True),
        row("loki", 64, 2.05, cpu=1.1),
        row("window", 64, 2.07, cpu=1.0),
        row("loki", 64, 9.0, cache="dynamic"),
        row("eager", 128, 1.0, dense=True),
    ]
    (line,) = Judged(rows).exceptions()
    assert line.startswith("window behind 64 tokens, static cache: 2.07 ms where packed takes 2.00")
    assert "+3%" in line or "+4%" in line
    (line,) = Judged(rows, "cpu").exceptions()
    assert line.startswith("loki behind 64 tokens") and "eager takes 1.00 (+10%)" in line


def test_nothing_is_said_of_policies_that_were_not_timed_sparse():
    """Neither of one that ran dense, nor of one that was too far off."""
    dense = row("exact", 1024, 10.0, dense=True)
    failed = dataclasses.replace(row("window", 1024, None), note="not timed: 3.0 nats from eager")
    ran_dense = row("loki", 1024, 10.0)
    assert Judged([dense, ran_dense, failed]).verdict() == [
        "no policy was timed sparse: loki behind 1024 tokens ran dense; window behind 1024 tokens "
        "(not timed: 3.0 nats from eager)"
    ]
    sparse = dataclasses.replace(row("oracle", 1024, 9.0), sparse=True)
    (line,) = Judged([dense, ran_dense, failed, sparse]).verdict()
    assert line.startswith("no policy is over 3%") and "1 of 3 rows" in line
    (line,) = Judged([dense, dataclasses.replace(sparse, ms=11.0)]).verdict()
    assert line.startswith("slower than the fastest dense way: oracle behind 1024")
    assert Judged([dense]).verdict() == []


def test_slopes_reach_back_to_the_next_shorter_context_that_was_timed():
    rows = [
        row("loki", 100, 1.0, cpu=2.0),
        row("loki", 200, None),
        row("loki", 400, 2.5, cpu=8.0),
        row("loki", 800, 2.1),
        row("loki", 300, 7.0, cache="dynamic"),
    ]
    assert Judged(rows).slope(rows[2]) == pytest.approx(5.0)
    assert Judged(rows, "cpu").slope(rows[2]) == pytest.approx(20.0)
    assert Judged(rows).slope(rows[3]) == pytest.approx(-1.0)
    assert Judged(rows).slope(rows[0]) is None and Judged(rows).slope(rows[1]) is None


def site(policy, *, outcome="sparse", index=0.0):
    return SiteReport("", "", outcome, "", 6, 2, 20, 5, "", index, policy=policy)


def test_bytes_of_each_policy_are_what_it_must_read():
    layer, tokens = Layer(key=10, value=6), 1000
    config = LokiConfig(top_k=100, min_context=0)
    cases = {
        "loki": (site("loki", index=3.0), 3 * tokens + 100 * 16),
        "oracle": (site("oracle"), 10 * tokens + 100 * 16),
        "window": (site("window"), 100 * 16),
        "reuse": (site("reuse of layer 2", index=3.0), 100 * 16),
        "chooses for others": (site("loki", outcome="dense by plan", index=3.0), 19 * tokens),
        "oracle+dense": (site("oracle", outcome="dense by plan"), 16 * tokens),
        "unified+dense": (site("unified", outcome="dense by plan"), 16 * tokens),
        "dense": (site("", outcome="dense by plan", index=None), 16 * tokens),
    }
    for name, (one, expected) in cases.items():
        assert cache_bytes([layer], tokens, [one], config) == expected, name
    spans = dataclasses.replace(site("moa", index=0.0), spans="moa:64:100,0.5N")
    read = cache_bytes([layer], tokens, [spans], config)
    assert read == (64 + (100 + 500) / 2) * 16  # on average of both KV heads, whatever top_k is
    each_head = LokiConfig(top_k=100, min_context=0, share="head")
    assert cache_bytes([layer], tokens, [site("window")], each_head) == 3 * 100 * 16
    assert cache_bytes([layer], 250, [site("window")], each_head) == 250 * 16
    assert cache_bytes([layer, layer], tokens, [site("loki", index=3.0)], config) is None
    assert cache_bytes([layer], tokens, [site("loki", index=None)], config) is None
    assert cache_bytes([Layer(10, 6, most=64)], tokens) == 64 * 16


def llama(**changes):
    torch.manual_seed(2)
    shape = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 31}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10}
    config = transformers.LlamaConfig(**{**shape, **heads, **changes})
    return transformers.LlamaForCausalLM(config).double().eval()


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_read_once_and_a_table_that_is_looked_up_is_not(tied):
    model = llama(tie_word_embeddings=tied)
    layer = 24 * 60 * 2 + 24 * 20 * 2 + 3 * 24 * 40 + 2 * 24
    assert weight_bytes(model) == 8 * (2 * layer + 24 + 31 * 24)


def test_of_experts_the_chosen_share_is_read():
    config = transformers.MixtralConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=1, vocab_size=31,
        num_attention_heads=6, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    others = sum(p.numel() for n, p in model.named_parameters() if ".experts." not in n)
    assert experts == 4 * 3 * 24 * 40
    assert weight_bytes(model) == 4 * (others - 31 * 24 + experts // 2)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_layers_are_told_by_their_caches_shapes(kind):
    cache = filled_cache(llama(), kind, 17, 3)
    assert layers_of(cache) == [Layer(2 * 10 * 8, 2 * 10 * 8)] * 2


def test_packed_attention_is_attention_and_shares_all_tensors():
    model = llama()
    packed = with_packed_attention(model)
    assert model.config._attn_implementation == "sdpa"
    for (name, one), other in zip(model.named_parameters(), packed.parameters(), strict=True):
        assert one is other, name
    ids = torch.randint(31, (1, 23))
    caches = [new_cache(each, "static", 25) for each in (model, packed)]
    with torch.no_grad():
        for part in (ids[:, :21], ids[:, 21:22], ids[:, 22:]):
            one, other = (
                each(part, past_key_values=cache).logits
                for each, cache in zip((model, packed), caches, strict=True)
            )
            torch.testing.assert_close(other, one)


def test_packed_attention_obeys_its_mask():
    query, key = torch.randn(2, 6, 1, 5), torch.randn(2, 2, 9, 5)
    value, mask = torch.randn(2, 2, 9, 7), torch.rand(2, 1, 1, 9) < 0.6
    mask[..., 0] = True
    out, _ = packed_attention(None, query, key, value, mask, scaling=0.3)
    expected = F.scaled_dot_product_attention(
        query, key, value, mask, scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(out, expected)


def test_the_clock_and_the_reader_measure():
    calls = []
    sample = timed(lambda: calls.append(1), torch.device("cpu"), 5)
    assert len(calls) == 5 and sample.wall > 0 and sample.cpu >= 0
    reader = Reader(torch.device("cpu"), 2**16)
    assert reader.best == 0
    reader.read()
    first = reader.best
    reader.read()
    assert math.isfinite(first) and reader.best >= first > 0
