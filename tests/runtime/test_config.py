"""Options: what is taken, what is refused, and that each refusal says what to do."""

import dataclasses

import pytest
import torch
from loki_compile.kernels.ops import Budget
from loki_compile.pca_store.basis import BasisSet, random_basis

from loki_compile import LokiConfig

pytestmark = pytest.mark.covers


def test_defaults_are_the_documented_ones():
    assert LokiConfig() == LokiConfig(
        top_k=0.125, rank="auto", basis="auto", min_context=1024, sink=4, recent=32, share="group",
        pack_gqa=True, index_dtype="auto", layers="all", policy="loki", prefill="dense",
        strict=False, watch_mass=None, inductor={},
    )  # fmt: skip
    assert LokiConfig.from_options(None) == LokiConfig.from_options({}) == LokiConfig()


@pytest.mark.parametrize(
    "options, found, advice",
    [
        ({"topk": 5}, '"topk"', 'did you mean "top_k"?'),
        ({"min_contxt": 5}, '"min_contxt"', 'did you mean "min_context"?'),
        ({"zebra": 5}, '"zebra"', "Use one of: top_k"),
        ({"max_autotune": True}, '"max_autotune"', "inductor={...}"),
        ({"top_k": 0}, "top_k=0", "count >= 1"),
        ({"top_k": 0.0}, "top_k=0.0", "(0, 1]"),
        ({"top_k": 1.5}, "top_k=1.5", "(0, 1]"),
        ({"top_k": -3}, "top_k=-3", "count >= 1"),
        ({"top_k": True}, "top_k=True", "count >= 1"),
        ({"top_k": "many"}, "top_k='many'", "count >= 1"),
        ({"top_k": None}, "top_k=None", "count >= 1"),
        ({"top_k": float("nan")}, "top_k=nan", "(0, 1]"),
        ({"top_k": 8}, "top_k=8", "raise top_k, or lower sink or recent"),
        ({"top_k": "mass:0"}, "top_k='mass:0'", '"mass:0.95,2048"'),
        ({"top_k": "mass:1.0"}, "top_k='mass:1.0'", "in (0, 1)"),
        ({"top_k": "mass:nan"}, "top_k='mass:nan'", "in (0, 1)"),
        ({"top_k": "mass:0.9,0"}, "top_k='mass:0.9,0'", "the most keys"),
        ({"top_k": "mass:0.9,1.5"}, "top_k='mass:0.9,1.5'", "the most keys"),
        ({"top_k": "mass:0.9,"}, "top_k='mass:0.9,'", "the most keys"),
        ({"top_k": "0.9"}, "top_k='0.9'", '"mass:0.95"'),
        ({"top_k": "mass:0.9,8"}, "top_k=mass:0.9,8", "raise top_k, or lower sink or recent"),
        ({"top_k": "mass:0.9", "policy": "quest"}, "'quest' ranks by bounds", '"oracle"'),
        ({"top_k": "mass:0.9", "policy": "window"}, "'window' ranks nothing", '"oracle"'),
        ({"top_k": "mass:0.9", "policy": "moa:4:64"}, "'moa:4:64' reads spans", "fixed top_k"),
        ({"top_k": "mass:0.9", "policy": "unified"}, "'unified' has heads name", "fixed top_k"),
        ({"top_k": "mass:0.9", "policy": "lessismore"}, "'lessismore' has heads", "fixed top_k"),
        ({"top_k": "mass:0.9", "policy": {1: "quest"}}, "'quest' ranks by bounds", "fixed top_k"),
        ({"watch_mass": 0.0}, "watch_mass=0.0", "in (0, 1)"),
        ({"watch_mass": 1}, "watch_mass=1", "in (0, 1)"),
        ({"watch_mass": 0.1, "policy": "window"}, "watch_mass=0.1", '"tidal"'),
        ({"rank": 0}, "rank=0", "count >= 1"),
        ({"rank": 1.01}, "rank=1.01", "(0, 1]"),
        ({"rank": "variance"}, "rank='variance'", "variance:0.9"),
        ({"rank": "variance:0"}, "rank='variance:0'", "variance:0.9"),
        ({"rank": "variance:1.1"}, "rank='variance:1.1'", "variance:0.9"),
        ({"rank": "variance:x"}, "rank='variance:x'", "variance:0.9"),
        ({"min_context": -1}, "min_context=-1", ">= 0"),
        ({"min_context": 10.0}, "min_context=10.0", ">= 0"),
        ({"min_context": True}, "min_context=True", ">= 0"),
        ({"sink": -1}, "sink=-1", ">= 0"),
        ({"recent": 1.5}, "recent=1.5", ">= 0"),
        ({"share": "all"}, "share='all'", "'group', 'head'"),
        ({"index_dtype": "int4"}, "index_dtype='int4'", "'int8', 'cache'"),
        ({"policy": "magic"}, "policy='magic'", "'loki'"),
        ({"pack_gqa": 1}, "pack_gqa=1", "True or False"),
        ({"strict": "yes"}, "strict='yes'", "True or False"),
        ({"basis": None}, "basis=None", "loki bases list"),
        ({"basis": 3}, "basis=3", "loki bases list"),
        ({"layers": ()}, "layers=()", "(2, 3)"),
        ({"layers": 2.5}, "layers=2.5", "(2, 3)"),
        ({"layers": None}, "layers=None", "(2, 3)"),
        ({"layers": (1, None)}, "layers=(1, None)", "(2, 3)"),
        ({"inductor": None}, "inductor=None", "dict"),
        ({"inductor": {"max_autotun": True}}, "'max_autotun'", 'did you mean "max_autotune"?'),
        ({"inductor": {5: True}}, "inductor={5: ...}", "list_options()"),
    ],
)
def test_a_refusal_names_what_was_found_and_what_is_needed(options, found, advice):
    with pytest.raises(ValueError) as error:
        LokiConfig.from_options(options)
    assert found in str(error.value) and advice in str(error.value)
    assert "\n" not in str(error.value)


def test_a_refusal_reaches_the_caller_of_a_compiled_function():
    with pytest.raises(ValueError, match='did you mean "top_k"'):
        torch.compile(lambda x: x + 1, backend="loki", options={"top_kk": 4})(torch.ones(3))


@pytest.mark.parametrize(
    "layers, kept",
    [("all", "all"), (3, (3,)), ((0, 3), (0, 3)), ([1], (1,)), ("model.layers.1*", None)],
)
def test_layers_are_numbers_patterns_or_all(layers, kept):
    assert LokiConfig(layers=layers).layers == (("model.layers.1*",) if kept is None else kept)


def test_a_basis_may_be_an_object():
    basis = BasisSet((random_basis(2, 8, seed=1, weights="0" * 16),))
    assert LokiConfig(basis=basis).basis is basis


@pytest.mark.parametrize(
    "top_k, visible, keys",
    [
        (1.0, 999, 999),
        (1.0, 1 << 20, 1 << 20),
        (0.125, 1024, 128),
        (0.125, 1025, 129),  # a part of a key is a key
        (0.1, 1, 1),
        (0.5, 3, 2),
        (64, 1000, 64),
        (64, 10, 10),
    ],
)
def test_the_budget_in_keys(top_k, visible, keys):
    budget = LokiConfig(top_k=top_k, sink=0, recent=0, min_context=0).budget
    assert budget.keys(visible) == keys
    assert budget.covers(visible) == (keys == visible)


@pytest.mark.parametrize(
    "top_k, mass, visible, most",
    [
        ("mass:0.95", 0.95, 4096, 1024),  # a quarter where none is named
        ("mass:0.9,2048", 0.9, 1 << 20, 2048),
        ("mass:0.5,0.5", 0.5, 4096, 2048),
    ],
)
def test_a_mass_has_a_ceiling_and_covers_nothing(top_k, mass, visible, most):
    budget = LokiConfig(top_k=top_k).budget
    assert (budget.mass, budget.keys(visible), budget.least(visible)) == (mass, most, 4 + 32)
    assert not LokiConfig(top_k="mass:0.5,1.0").budget.covers(visible)
    assert budget.covers(1023) and not budget.covers(1024)


@pytest.mark.parametrize(
    "policy", ["loki", "oracle", "tidal", "kascade", {0: "dense", 1: "oracle+dense", "*": "reuse"}]
)
def test_what_ranks_by_scores_takes_a_mass(policy):
    options = {"top_k": "mass:0.9,512", "policy": policy, "watch_mass": 0.2}
    assert LokiConfig.from_options(options).to_options() == {
        name: value for name, value in options.items() if value != "loki"
    }


def test_a_tiny_fraction_still_keeps_a_key():
    assert LokiConfig(top_k=1e-9).budget == Budget(None, 1, 4, 32, 1024)
    assert LokiConfig(top_k=1e-9, sink=0, recent=0, min_context=0).budget.keys(10) == 1


@pytest.mark.parametrize(
    "visible, keys",
    [
        (0, 0),
        (50, 50),  # fewer than min_context: all
        (1023, 1023),
        (1024, 128),
        (1025, 129),
    ],
)
def test_a_row_that_sees_fewer_than_min_context_reads_all(visible, keys):
    assert LokiConfig().budget.keys(visible) == keys


@pytest.mark.parametrize("visible, keys", [(1, 1), (30, 30), (36, 36), (37, 36), (300, 38)])
def test_sink_and_recent_are_kept_whatever_the_fraction(visible, keys):
    assert LokiConfig(min_context=0).budget.keys(visible) == keys


def test_options_and_configuration_convert_both_ways():
    options = {"top_k": 300, "share": "head", "inductor": {"max_autotune": True}}
    config = LokiConfig.from_options(options)
    assert config.to_options() == options
    assert LokiConfig.from_options(config.to_options()) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.top_k = 3
