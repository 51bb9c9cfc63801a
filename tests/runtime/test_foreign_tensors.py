"""Weights that are no plain tensors: each has an identity or none, and decoding is sparse.

Default options, 1101 tokens of context, an interpreter in Inductor's place.
"""

from __future__ import annotations

import pytest
import torch
import torch.utils._pytree as pytree
from loki_compile.pca_store import basis_header
from loki_compile.pca_store.basis import Basis, BasisSet
from loki_compile.pca_store.basis_file import decode, encode
from loki_compile.pca_store.fingerprint import block_fingerprints, weights_fingerprint
from loki_compile.pca_store.metadata import run_of
from loki_compile.pca_store.store import Store
from torch import nn
from toy_capture import interpret
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from loki_compile import calibrate, reset_stats, stats

CONTEXT, NEW = 1101, 5


class Wrapped(torch.Tensor):
    """A weight in a wrapper that serves linear maps alone: no indexing, no `.numpy()`."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, dtype=held.dtype, device=held.device, requires_grad=False
        )

    def __init__(self, held):
        self.held = held

    def __tensor_flatten__(self):
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner, _, size, stride):
        return Wrapped(inner["held"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name == "index" or name.startswith(("unsafe", "_to_copy", "select")):
            raise NotImplementedError(f"{name} of a wrapped weight")
        plain = pytree.tree_map_only(Wrapped, lambda x: x.held, (args, kwargs or {}))
        out = function(*plain[0], **plain[1])
        keep = name in ("detach", "alias", "t", "view")
        return Wrapped(out) if keep and isinstance(out, torch.Tensor) else out


class Sealed(Wrapped):
    """One that does not even say what it is made of."""

    __tensor_flatten__ = None


def llama(dtype=torch.float32):
    torch.manual_seed(6)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=89, max_position_embeddings=2048,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to(dtype)


def wrapped(model):
    for module in model.model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(Wrapped(module.weight.detach()), requires_grad=False)
    return model


def torchao_int8(model):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def torchao_int4(model):
    quantization = pytest.importorskip("torchao.quantization")
    try:
        quantization.quantize_(model, quantization.Int4WeightOnlyConfig(group_size=32))
    except (ImportError, ValueError, RuntimeError, NotImplementedError) as error:
        pytest.skip(f"torchao's int4 weights do not run here: {error}")
    return model


def quanto(bits):
    def quantised(model):
        library = pytest.importorskip("optimum.quanto")
        library.quantize(model, weights={8: library.qint8, 4: library.qint4}[bits])
        library.freeze(model)
        return model

    return quantised


def bitsandbytes(bits):
    def quantised(model):
        library = pytest.importorskip("bitsandbytes")
        make = {8: library.nn.Linear8bitLt, 4: library.nn.Linear4bit}[bits]
        extra = {"has_fp16_weights": False} if bits == 8 else {}
        for layer in model.model.layers:
            for name in ("q_proj", "k_proj", "v_proj"):
                old = getattr(layer.self_attn, name)
                new = make(old.in_features, old.out_features, bias=False, **extra)
                new.load_state_dict({"weight": old.weight.detach()})
                setattr(layer.self_attn, name, new.to("cpu"))
        return model

    return quantised


KINDS = {
    "wrapped": wrapped,
    "torchao int8": torchao_int8,
    "torchao int4": torchao_int4,
    "quanto int8": quanto(8),
    "quanto int4": quanto(4),
    "bitsandbytes int8": bitsandbytes(8),
    "bitsandbytes int4": bitsandbytes(4),
}


@torch.no_grad()
def logits_of(call, cache):
    ids = torch.randint(0, 89, (1, CONTEXT), generator=torch.Generator().manual_seed(1))
    rows, place = [], 0
    for _ in range(NEW):
        positions = torch.arange(place, place + ids.shape[1])[None]
        rows.append(
            call(input_ids=ids, position_ids=positions, past_key_values=cache).logits[:, -1]
        )
        place += ids.shape[1]
        ids = rows[-1].argmax(-1, keepdim=True)
    return torch.cat(rows)


# quanto compiles an extension of its own for 4 bits: a minute, for what bitsandbytes shows as well.
@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=pytest.mark.slow if k == "quanto int4" else ()) for k in KINDS],
)
def test_a_model_of_such_weights_is_sparse_and_right(kind, use_engine):
    model = KINDS[kind](llama())
    interpret(use_engine)
    expected = logits_of(model.forward, DynamicCache())
    for make in (DynamicCache, lambda: StaticCache(config=model.config, max_cache_len=1200)):
        torch._dynamo.reset()
        reset_stats()
        # At the default `min_context` a budget of all keys would run the dense variant.
        options = {"min_context": 0, "top_k": 1.0}
        run = torch.compile(model.forward, backend="loki", options=options)
        found = logits_of(run, make())
        assert stats()["sparse_steps"] == NEW - 1
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["wrapped", "torchao int8", "quanto int8"])
def test_a_basis_of_such_weights_is_stored_and_found_again(kind, use_engine, monkeypatch, tmp_path):
    monkeypatch.setenv("LOKI_HOME", str(tmp_path))
    basis = calibrate(KINDS[kind](llama()), [torch.randint(0, 89, (1, 300))], kind="pca")
    Store().save(basis)
    interpret(use_engine)
    reset_stats()
    logits_of(torch.compile(KINDS[kind](llama()).forward, backend="loki"), DynamicCache())
    assert stats()["sparse_steps"] == NEW - 1 and stats()["fitted_bases"] == 0


class TestIdentity:
    def test_of_a_wrapper_is_that_of_what_it_holds(self):
        one, other = torch.randn(2, 7, 5)
        assert weights_fingerprint(Wrapped(one)) == weights_fingerprint(Wrapped(one.clone()))
        assert weights_fingerprint(Wrapped(one)) != weights_fingerprint(Wrapped(other))
        assert weights_fingerprint(Wrapped(one)) != weights_fingerprint(one)
        assert weights_fingerprint(nn.Parameter(Wrapped(one))) == weights_fingerprint(Wrapped(one))

    @pytest.mark.parametrize(
        "make",
        [
            lambda: torch.empty(3, 4, device="meta"),
            lambda: Wrapped(torch.empty(3, 4, device="meta")),
            lambda: Sealed(torch.randn(3, 4)),
            lambda: torch._subclasses.FakeTensorMode().from_tensor(torch.randn(3, 4)),
            lambda: torch.eye(4).to_sparse(),
        ],
        ids=["meta", "a wrapper of meta", "sealed", "fake", "sparse"],
    )
    def test_of_what_cannot_be_read_is_none(self, make):
        tensor = make()
        assert weights_fingerprint(tensor) == ""
        assert block_fingerprints(tensor, 1) == ()

    def test_of_a_distributed_tensor_is_that_of_what_this_process_holds(self, tmp_path):
        distributed = torch.distributed
        if not distributed.is_available() or not distributed.is_gloo_available():
            pytest.skip("needs gloo")
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
        )
        try:
            mesh = distributed.init_device_mesh("cpu", (1,))
            plain = torch.randn(6, 5)
            for placement in (Shard(0), Shard(1), Replicate()):
                tensor = nn.Parameter(distribute_tensor(plain, mesh, [placement]))
                assert weights_fingerprint(tensor) == weights_fingerprint(plain)
                assert block_fingerprints(tensor, 2) == block_fingerprints(plain, 2)
        finally:
            distributed.destroy_process_group()


class TestRows:
    def test_a_shard_has_the_blocks_of_the_whole(self):
        whole = torch.randn(12, 7).to(torch.bfloat16)
        blocks = block_fingerprints(whole, 3)
        assert len(set(blocks)) == 4
        for first, last in ((0, 2), (1, 2), (2, 4), (0, 4)):
            shard = whole[3 * first : 3 * last].clone()
            assert block_fingerprints(shard, 3) == blocks[first:last]
            assert run_of(block_fingerprints(shard, 3), blocks) == first
        # Not along rows, not of whole blocks, of another dtype: not these.
        assert run_of(block_fingerprints(whole[:, :4], 3), blocks) is None
        assert block_fingerprints(whole[:4], 3) == ()
        assert run_of(block_fingerprints(whole[:3].float(), 3), blocks) is None
        assert run_of((), blocks) is None

    def basis_set(self, weight, heads, dim):
        key = torch.linalg.qr(torch.randn(heads, dim, dim)).Q
        spectrum = torch.rand(heads, dim).sort(-1, descending=True).values
        rows = block_fingerprints(weight, dim)
        name = weights_fingerprint(weight)
        return BasisSet((Basis(key, key, spectrum, "pca", name, "a", 9, rows),))

    @pytest.mark.parametrize("rows_per_head", [1, 3])  # keys alone; queries and values beside them
    def test_a_basis_is_cut_to_the_heads_of_a_shard(self, rows_per_head):
        heads, dim = 4, 5
        weight = torch.randn(heads * dim * rows_per_head, 7)
        saved = self.basis_set(weight, heads, dim)
        loaded = decode(encode(saved), "memory")
        shard = weight[dim * rows_per_head : 3 * dim * rows_per_head]
        how = {"blocks": block_fingerprints(shard, dim), "num_kv_heads": 2}
        cut = loaded.find("f" * 32, **how)
        assert torch.equal(cut.key, saved.bases[0].key[1:3])
        assert torch.equal(cut.spectrum, saved.bases[0].spectrum[1:3])
        assert cut.rank_for("variance:0.5") == saved.bases[0].rank_for("variance:0.5")
        assert loaded.find("f" * 32, **how) is cut  # indexes belong to bases
        # All heads are here though rows are not: what they make has been gathered.
        assert loaded.find("f" * 32, blocks=how["blocks"], num_kv_heads=4) is loaded.bases[0]
        # Heads that these rows do not make, and rows of other weights.
        assert loaded.find("f" * 32, blocks=how["blocks"], num_kv_heads=1) is None
        other = block_fingerprints(torch.randn_like(shard), dim)
        assert loaded.find("f" * 32, blocks=other, num_kv_heads=2) is None

    def test_the_store_finds_the_set_of_a_shard(self, tmp_path):
        store = Store(tmp_path)
        weights = [torch.randn(12, 7) for _ in range(2)]
        for weight in weights:
            store.save(self.basis_set(weight, 4, 3))
        shard = weights[0][3:9]
        rows = {weights_fingerprint(shard): block_fingerprints(shard, 3)}
        found = store.find(rows, rows)
        assert found.bases[0].weights == weights_fingerprint(weights[0])
        assert store.find(rows) is None

    def test_a_file_of_the_format_without_blocks_is_read(self, monkeypatch):
        weight = torch.randn(12, 7)
        saved = self.basis_set(weight, 4, 3)
        with monkeypatch.context() as patch:
            patch.setattr(basis_header, "FORMAT_VERSION", 1)
            patch.setattr(basis_header, "SITE_FIELDS", basis_header.SITE_FIELDS[:-2])
            data = encode(saved)
        loaded = decode(data, "old")
        assert loaded.bases[0].blocks == ()
        assert loaded.find(weights_fingerprint(weight)) is loaded.bases[0]
        rows = block_fingerprints(weight[:6], 3)
        assert loaded.find("f" * 32, blocks=rows, num_kv_heads=2) is None
