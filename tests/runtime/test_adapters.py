"""PEFT: LoRA adapters loaded, switched and merged around compiling, at the default options."""

from __future__ import annotations

import pytest
import torch
from loki_compile.passes.graphs import adapters_of, nearest_matrix
from loki_compile.pca_store.fingerprint import weights_fingerprint
from toy_capture import interpret, normal_graph
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from loki_compile import calibrate, explain, reports, reset_stats, stats

peft = pytest.importorskip("peft")

CONTEXT, NEW = 1101, 5


def base(layers=2):
    torch.manual_seed(6)
    config = LlamaConfig(
        hidden_size=48, intermediate_size=40, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, vocab_size=89, max_position_embeddings=2048,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def lora(seed, targets=("q_proj", "k_proj", "v_proj")):
    torch.manual_seed(seed)  # of the weights that the adapter is made with next
    return peft.LoraConfig(r=5, target_modules=list(targets), init_lora_weights=False)


@pytest.fixture(autouse=True)
def engine(use_engine):
    return interpret(use_engine)


@torch.no_grad()
def logits_of(call):
    """Logits (NEW, vocabulary) of a prompt and what follows it, greedily."""
    ids = torch.randint(0, 89, (1, CONTEXT), generator=torch.Generator().manual_seed(1))
    cache, rows = DynamicCache(), []
    for _ in range(NEW):
        rows.append(call(input_ids=ids, past_key_values=cache).logits[:, -1])
        ids = rows[-1].argmax(-1, keepdim=True)
    return torch.cat(rows)


def assert_close_and_sparse(model, compiled):
    """With a budget of all keys, read by the sparse variant, it computes what eager does."""
    reset_stats()
    found = logits_of(compiled)
    assert stats()["sparse_steps"] == NEW - 1
    torch.testing.assert_close(found, logits_of(model.forward), rtol=1e-4, atol=1e-5)
    return found


def all_keys(model):
    # At the default `min_context` a budget of all keys would run the dense variant.
    options = {"min_context": 0, "top_k": 1.0}
    return torch.compile(model.forward, backend="loki", options=options)


class TestSteps:
    @pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("k_proj",), ("o_proj", "up_proj")])
    def test_adapters_loaded_before_compiling(self, targets):
        model = peft.get_peft_model(base(layers=1), lora(1, targets)).eval()
        assert_close_and_sparse(model, all_keys(model))

    # Dynamo compiles `forward` for each set of adapters: nine graphs here, one more than its
    # default limit, behind which it runs uncompiled whatever the backend is.
    @torch._dynamo.config.patch(recompile_limit=16)
    def test_adapters_loaded_after_compiling_and_switched_between_generations(self):
        plain = base(layers=1)
        run = all_keys(plain)
        before = assert_close_and_sparse(plain, run)
        model = peft.get_peft_model(plain, lora(1), adapter_name="one").eval()
        torch.manual_seed(2)
        model.add_adapter("two", lora(2))
        seen = [before]
        for name in ("one", "two", "one"):
            model.set_adapter(name)
            seen.append(assert_close_and_sparse(plain, run))
        assert torch.equal(seen[1], seen[3])
        assert (seen[1] - seen[2]).abs().max() > 1e-3 and (seen[0] - seen[1]).abs().max() > 1e-3
        with model.disable_adapter():
            assert torch.allclose(assert_close_and_sparse(plain, run), before, atol=1e-5)

    def test_an_adapter_is_merged_and_unmerged_in_place(self):
        model = peft.get_peft_model(base(layers=1), lora(1)).eval()
        run = all_keys(model)
        apart = assert_close_and_sparse(model, run)
        model.merge_adapter()
        merged = assert_close_and_sparse(model, run)
        model.unmerge_adapter()
        torch.testing.assert_close(merged, apart, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(assert_close_and_sparse(model, run), apart, rtol=1e-3, atol=1e-4)

    def test_transformers_loads_an_adapter_itself(self, tmp_path):
        peft.get_peft_model(base(layers=1), lora(1)).save_pretrained(tmp_path)
        model = base(layers=1)
        run = all_keys(model)
        before = assert_close_and_sparse(model, run)
        model.load_adapter(str(tmp_path), adapter_name="saved")
        after = assert_close_and_sparse(model, run)
        assert (before - after).abs().max() > 1e-3
        model.disable_adapters()
        torch.testing.assert_close(assert_close_and_sparse(model, run), before)


class TestStoredBasis:
    def calibrated(self, model):
        return calibrate(model, [torch.randint(0, 89, (1, 300))], kind="pca")

    def decode_report(self):
        return [r for r in reports() if r.count("sparse")][-1]

    @pytest.mark.parametrize("adapters", [1, 3])
    def test_is_found_by_the_base_weights_and_the_report_says_it(self, adapters):
        plain = base()
        chosen = self.calibrated(plain)
        names = ["a", "b", "c"][:adapters]
        model = peft.get_peft_model(plain, lora(1), adapter_name="a").eval()
        for name in names[1:]:
            model.add_adapter(name, lora(len(name)))
        model.base_model.set_adapter(names)
        torch._dynamo.reset()
        logits_of(torch.compile(model.forward, backend="loki", options={"basis": chosen}))
        assert stats()["sparse_steps"] == NEW - 1  # at the default options
        for site in self.decode_report().sites:
            assert site.basis.startswith("pca, 300 tokens")
            assert f"{2 * 3 * adapters} adapters change" in site.basis

    def test_says_nothing_of_adapters_where_there_are_none(self):
        plain = base()
        chosen = self.calibrated(plain)
        torch._dynamo.reset()
        logits_of(torch.compile(plain.forward, backend="loki", options={"basis": chosen}))
        assert [site.basis for site in self.decode_report().sites] == ["pca, 300 tokens"] * 2

    def test_explain_says_it_too(self):
        plain = base()
        chosen = self.calibrated(plain)
        model = peft.get_peft_model(plain, lora(1)).eval()
        cache = DynamicCache()
        with torch.no_grad():
            model(input_ids=torch.randint(0, 89, (1, CONTEXT)), past_key_values=cache)
            step = torch.tensor([[3]])
            (report,) = explain(
                model, input_ids=step, past_key_values=cache, options={"basis": chosen}
            )
        assert all("6 adapters change" in site.basis for site in report.sites)

    def test_of_merged_weights_is_another_one(self):
        plain = base()
        chosen = self.calibrated(plain)
        model = peft.get_peft_model(plain, lora(1)).eval()
        model.merge_adapter()
        torch._dynamo.reset()
        with pytest.raises(Exception, match="belongs to other weights"):
            logits_of(torch.compile(model.forward, backend="loki", options={"basis": chosen}))


class TestAnalysis:
    """The shape of a sum, whatever library wrote it."""

    def graph(self, function, *weights):
        # Dynamo names inputs in the order of their use.
        gm = normal_graph(function, torch.randn(2, 3, 8), *weights)
        inputs = dict(zip(gm.graph.find_nodes(op="placeholder"), ("x", *weights), strict=True))
        return gm.graph, inputs, lambda node: not isinstance(inputs[node], str)

    def test_the_largest_of_many_summands_is_found_behind_all_adapters(self):
        w, a, b = torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)

        def adapted(x, c, d, w, a, b):
            linear = torch.nn.functional.linear
            out = linear(linear(x, c), d) + linear(x, w)
            for _ in range(3):
                out = out + linear(linear(x, a), b) * 0.5
            return out

        graph, inputs, is_parameter = self.graph(adapted, a + 1, b + 1, w, a, b)
        (out,) = graph.output_node().args[0]
        found = nearest_matrix([out], is_parameter)
        assert weights_fingerprint(inputs[found]) == weights_fingerprint(w)
        assert adapters_of(graph, is_parameter) == 4

    def test_a_sum_of_maps_of_other_values_is_no_adapter(self):
        w, a, b = torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)

        def branches(x, w, a, b):
            linear = torch.nn.functional.linear
            return linear(x.sin(), w) + linear(linear(x, a), b)

        graph, _, is_parameter = self.graph(branches, w, a, b)
        assert adapters_of(graph, is_parameter) == 0
