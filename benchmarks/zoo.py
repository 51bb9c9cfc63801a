"""Decodes every causal language model of transformers through `backend="loki"` and compares.

    python benchmarks/zoo.py                                  # everything, resumable
    python benchmarks/zoo.py --caches dynamic --attention sdpa --engine inductor llama gemma3_text
    python benchmarks/zoo.py --report-only                    # write the table from what is there
    python benchmarks/zoo.py --sample --record other.jsonl    # under other versions of libraries
    python benchmarks/zoo.py --against other.jsonl            # what came out otherwise there

Each architecture is built with a tiny random configuration: hidden size 64, 4 query heads, 2 KV
heads where it has them, head_dim 16, one layer of each layer kind, sliding window 16, vocabulary
128, fp32. It prefills 12 tokens uncompiled and decodes 6 more, one at a time: once uncompiled, once
compiled with `top_k=1.0, min_context=0` (every rewritten site takes the sparse ops but reads all
keys, so that results must agree), once with a small budget (results must be finite). Both runs feed
the tokens of the uncompiled one. Plain `backend="eager"` runs as well: what a difference and the
numbers of graphs, graph breaks and recompiles are compared with.

Finished cases are lines of `benchmarks/results/zoo.jsonl`, from which `zoo.md` beside it is
written; a second call continues. What a line leaves out (each site, traces) is in `runs/zoo/`.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import multiprocessing
import os
import subprocess
import tempfile
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "zoo"
RECORD = ROOT / "benchmarks" / "results" / "zoo.jsonl"
TABLE = RECORD.with_suffix(".md")
VERSIONS = RECORD.with_name("zoo_versions.md")

CACHES = ("static", "dynamic", "generate")
ATTENTIONS = ("sdpa", "eager")
PROMPT, STEPS, SLOTS = 12, 6, 64
TOLERANCE = 1e-4  # of the largest logit, at least 1
SAME_READ = {"top_k": 1.0, "min_context": 0}
SMALL = {"top_k": 6, "min_context": 0, "sink": 1, "recent": 2}

# ------------------------------------------------------------------------- tiny configurations

# Attribute name -> tiny value, wherever a configuration or one of its parts has that attribute.
TINY: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim", "emb_dim",
         "input_embedding_size", "output_embedding_size", "backbone_hidden_size", "lru_width",
         "linear_dim", "attention_hidden_size", "text_hidden_size", "pronunciation_embed_dim",
         "shape_embed_dim", "vision_output_dim", "out_hidden_size", "projection_dim",
         "hidden_size_global"), 64),
    **dict.fromkeys(
        ("intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim", "n_inner", "dff",
         "dim_ff", "ffn_hidden_size", "d_ff", "feed_forward_size", "shared_intermediate_size",
         "dense_intermediate_size", "intermediate_size_mlp", "mlp_dim", "prompt_mid_dim",
         "d_inner", "decoder_ffn_size"), 128),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size",
         "moe_shared_expert_intermediate_size", "shared_experts_intermediate_size",
         "expert_intermediate_size"), 32),
    **dict.fromkeys(
        ("num_attention_heads", "decoder_attention_heads", "encoder_attention_heads", "n_head",
         "n_heads", "num_heads", "attention_heads", "num_decoder_attention_heads",
         "num_encoder_attention_heads", "swa_num_attention_heads", "linear_num_heads",
         "linear_num_value_heads", "num_linear_heads"), 4),
    **dict.fromkeys(
        ("num_key_value_heads", "kv_n_heads", "num_kv_heads", "swa_num_key_value_heads",
         "num_global_key_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(
        ("head_dim", "swa_head_dim", "d_kv", "kv_channels", "attention_head_size", "dim_head",
         "attention_head_dim", "linear_head_dim", "linear_key_head_dim", "linear_value_head_dim",
         "v_head_dim", "qk_nope_head_dim", "mamba_d_head", "mamba_head_dim", "index_head_dim",
         "swa_v_head_dim", "d_head", "global_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 8),
    "qk_head_dim": 24,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    **dict.fromkeys(
        ("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size", "audio_vocab_size",
         "pronunciation_vocab_size", "shape_vocab_size", "unpadded_vocab_size"), 128),
    "hidden_size_per_layer_input": 16,
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length",
         "max_target_positions", "max_source_positions", "model_max_length"), 256),
    **dict.fromkeys(
        ("sliding_window", "sliding_window_size", "attention_window_size", "window_size",
         "local_attention", "attention_chunk_size", "keep_window_size"), 16),
    **dict.fromkeys(
        ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(
        ("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "num_experts_per_token",
         "top_k_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_groups", "mamba_n_groups"), 1),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 16),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank"), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 16),
    "index_n_heads": 2,
    "index_topk": 8,
    "num_nextn_predict_layers": 0,
    "num_mem_blocks": 1,
    "query_pre_attn_scalar": 16,
    "laurel_rank": 8,
    "zero_expert_num": 2,
    "o_lora_rank": 16,
    "o_groups": 2,
    "hc_lowrank": 16,
    "rel_extent": 64,
    "adapter_rank": 8,
    "is_decoder": True,
    "tie_word_embeddings": False,
    "use_mamba_kernels": False,
}  # fmt: skip

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id",
           "forced_eos_token_id", "forced_bos_token_id", "cls_token_id", "sep_token_id",
           "eod_token_id", "mask_token_id", "unk_token_id")  # fmt: skip

_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers",
           "encoder_layers", "num_decoder_layers", "num_encoder_layers", "num_blocks", "depth",
           "num_global_layers")  # fmt: skip

# What the rules above do not reach, by model type; a dict stands for a part's own attributes.
_SHARED_KV = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 128},
    "cohere_compass_text": {"rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 1e4}
        for kind in ("full_attention", "sliding_attention")
    }},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v4": {"compress_rates": {
        "compressed_sparse_attention": 4, "heavily_compressed_attention": 8
    }},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {
        **_SHARED_KV, "intermediate_size": 128, "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0]
    },
    "gemma4_text": _SHARED_KV,
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": {
        "indexer_head_dim": 16, "indexer_n_heads": 2, "indexer_kv_heads": 1,
        "indexer_budget": 8, "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_shape": (16, 16), "axial_pos_embds_dim": (16, 48)},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


# One type for each way to write attention or a cache; all of them are in transformers 4.57.
SAMPLE = ("bamba", "bart", "bloom", "cohere2", "deepseek_v3", "diffllama", "falcon", "gemma2",
          "gemma3_text", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "gptj", "jetmoe", "llama",
          "mistral", "mixtral", "mpt", "olmo2", "opt", "phi3", "qwen3_moe", "xglm")  # fmt: skip

# Types that want all tokens at each step, also those whose keys are cached.
ALL_TOKENS = ("cpmant",)
# Types whose causal language model takes the decoder's part of the configuration.
DECODER_CONFIG = ("musicgen", "musicgen_melody")


def tiny_config(model_type: str) -> Any:
    """A configuration of the type with small sizes and one layer of each kind."""
    from transformers import CONFIG_MAPPING

    return _tiny(CONFIG_MAPPING[model_type], EXCEPTIONS.get(model_type, {}))


def _tiny(cls: type, exceptions: dict[str, Any]) -> Any:
    from transformers import PretrainedConfig

    default = vars(cls())
    parts = {name for name, value in default.items() if isinstance(value, PretrainedConfig)}
    chosen: dict[str, Any] = {}
    for name, value in default.items():
        if name in parts:
            part = {**EXCEPTIONS.get(value.model_type, {}), **exceptions.get(name, {})}
            chosen[name] = _tiny(type(value), part)
        elif name in TINY and (value is not None or name in ("head_dim", "num_key_value_heads")):
            chosen[name] = TINY[name]
        elif name in _TOKENS and value is not None:
            chosen[name] = [1] if isinstance(value, list) else 1
        elif name.endswith("_token_id") and isinstance(value, int) and value >= 128:
            chosen[name] = 127
    if "qk_rope_head_dim" in default and "head_dim" in chosen:
        chosen["head_dim"] = TINY["qk_rope_head_dim"]  # there it names the rotary part
    if "kv_lora_rank" in default and "num_key_value_heads" in chosen:
        chosen["num_key_value_heads"] = TINY["num_attention_heads"]  # one latent serves all heads
    chosen.update(_layers(default))
    chosen.update({n: v for n, v in exceptions.items() if n not in parts})
    return cls(**chosen)


def _layers(default: dict[str, Any]) -> dict[str, Any]:
    """One layer of each kind, with every list that has an entry per layer cut alike."""
    depths = {name: default[name] for name in _DEPTHS if isinstance(default.get(name), int)}
    depth = next(iter(depths.values()), 0)
    lists = {
        name: value
        for name, value in default.items()
        if isinstance(value, (list, tuple))
        and len(value) == depth > 1
        and not name.startswith("_")
        and list(value) != list(range(depth))  # numbers of layers, not their kinds
    }
    kinds = list(zip(*(map(repr, value) for value in lists.values()), strict=True))
    first = sorted({kind: place for place, kind in reversed(list(enumerate(kinds)))}.values())
    # Kinds that no list names: experts behind the first layers, every n-th layer of its own.
    mixed = any(w in name for name in default for w in ("expert", "moe", "period", "interval"))
    if len(first) == 1 and mixed:
        first = [0, 1]
    cut = {name: type(value)(value[i] for i in first) for name, value in lists.items()}
    return {**dict.fromkeys(depths, max(1 + mixed, len(first))), **cut}


def build(model_type: str, attention: str) -> Any:
    """The random model in fp32 and eval mode, with weights large enough that attention matters."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    def make(**options: Any) -> Any:
        config = tiny_config(model_type)
        if model_type in DECODER_CONFIG:
            kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            return kind._from_config(config.decoder, dtype=torch.float32, **options)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)

    torch.manual_seed(0)
    try:
        model = make(attn_implementation=attention)
    except ValueError as error:
        if "does not support" not in str(error) and "not supported" not in str(error):
            raise
        model = make()
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)) or (
            type(module).__name__ == "Conv1D"
        ):
            fan_in = module.weight.shape[-1] if module.weight.ndim > 1 else 1
            module.weight.data.normal_(0.0, 1.5 / math.sqrt(fan_in))
            if getattr(module, "bias", None) is not None:
                module.bias.data.normal_(0.0, 0.1)
    for parameter in model.parameters():
        if not parameter.any():  # zero at first: gates and scales of keys that training opens
            parameter.data.normal_(0.0, 0.1)
    return model.eval()


# ----------------------------------------------------------------------------------- one case


@dataclass(frozen=True)
class Case:
    """One architecture with one kind of cache and one attention implementation."""

    model: str
    cache: str
    attention: str
    engine: str = "eager"
    small: bool = True

    @property
    def key(self) -> str:
        return f"{self.model}/{self.cache}/{self.attention}/{self.engine}"


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def failure(self) -> str | None:
        """The line that says that a graph was given up: decoding goes on dense, the case fails."""
        return next((line for line in self.lines if "could not be built" in line), None)


def run_case(case: Case) -> dict[str, Any]:
    """Decodes the case uncompiled and compiled; the result is one line of the record.

    status: "equal", "differs" (wrong), "crashes" (wrong), "differs without us" and "crashes without
    us" (plain `backend="eager"` does the same), "does not build", "does not run"; `run_cases` adds
    "out of time".
    """
    import torch

    result: dict[str, Any] = {"key": case.key, **vars(case)}
    try:
        model = build(case.model, case.attention)
    except Exception as error:
        return {**result, "status": "does not build", "error": _line(error)}
    try:
        tokens, truth = decode(model, case.cache, None, None)
    except Exception as error:
        return {**result, "status": "does not run", "error": _line(error)}
    heard = _Warnings()
    logging.getLogger("loki_compile").addHandler(heard)
    try:
        return {**result, **_compiled(model, case, tokens, truth, heard)}
    finally:
        logging.getLogger("loki_compile").removeHandler(heard)
        torch._dynamo.reset()


def _compiled(model: Any, case: Case, tokens: Any, truth: Any, heard: _Warnings) -> dict[str, Any]:
    import torch

    from loki_compile.counts import reset_stats, stats
    from loki_compile.report import clear_reports, reports

    found: dict[str, Any] = {"plain": _plain(model, case, tokens, truth, "eager")}
    clear_reports()
    reset_stats()
    _forget_graphs()
    try:
        own, logits = decode(model, case.cache, _backend(SAME_READ, case.engine), tokens)
        found["difference"] = difference(logits, truth)
        found["tokens"] = bool(own.equal(tokens))
        wrong = None if found["difference"] <= TOLERANCE and found["tokens"] else "differs"
    except Exception as error:
        wrong = "crashes"
        found.update(error=_line(error), trace=traceback.format_exc()[-4000:])
    found["graphs"] = [[vars(site) for site in graph.sites] for graph in reports()]
    found["warnings"] = sorted(set(heard.lines))
    found["steps"] = stats()
    found["dynamo"] = _dynamo_counts()
    if case.engine == "inductor" and _more(found):
        found["plain"] = _plain(model, case, tokens, truth, "inductor")
    if wrong:
        return {**found, "status": wrong + " without us" * found["plain"]["wrong"]}
    if failure := heard.failure():
        return {**found, "status": "crashes", "error": failure}
    if case.small and found["steps"]["sparse_steps"]:
        torch._dynamo.reset()
        try:
            _, logits = decode(model, case.cache, _backend(SMALL, case.engine), tokens)
            if bool(logits.isfinite().all()) != bool(truth.isfinite().all()):
                return {**found, "status": "differs", "error": "small budget: not finite"}
        except Exception as error:
            trace = traceback.format_exc()[-4000:]
            return {**found, "status": "crashes", "error": _line(error), "trace": trace}
        if failure := heard.failure():
            return {**found, "status": "crashes", "error": failure}
    return {**found, "status": "equal"}


def _plain(model: Any, case: Case, tokens: Any, truth: Any, backend: str) -> dict[str, Any]:
    """What Dynamo makes of the case without us: its counts, and whether it decodes otherwise.

    "inductor" has the counts of "eager", which is quicker, or more: it may add guards of its own.
    """
    _forget_graphs()
    try:
        own, logits = decode(model, case.cache, backend, tokens)
    except Exception as error:
        return {"wrong": True, "error": _line(error), **_dynamo_counts()}
    far = difference(logits, truth)
    wrong = far > TOLERANCE or not own.equal(tokens)
    return {"wrong": bool(wrong), "difference": far, **_dynamo_counts()}


def _forget_graphs() -> None:
    import torch
    from torch._dynamo.utils import clear_compilation_metrics, counters

    torch._dynamo.reset()
    counters.clear()
    clear_compilation_metrics()


def _dynamo_counts() -> dict[str, int]:
    """Graphs, graph breaks and recompiled frames since `_forget_graphs`."""
    from torch._dynamo.utils import counters, get_compilation_metrics

    return {
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
        "recompiles": sum(bool(frame.recompile_reason) for frame in get_compilation_metrics()),
    }


def difference(logits: Any, truth: Any) -> float:
    """Largest difference of two logits, as a share of the largest one (at least 1)."""
    both = (logits - truth).abs().nan_to_num(nan=0.0 if truth.isnan().any() else math.inf)
    return float(both.max() / truth.nan_to_num().abs().max().clamp_min(1.0))


def _backend(options: dict[str, Any], engine: str) -> Callable[..., Any]:
    """ "eager" runs rewritten graphs node by node, which is quick to start; "inductor" is real."""
    from loki_compile.backend import loki
    from loki_compile.engines import inductor, interpreter

    compiler = interpreter if engine == "eager" else inductor
    return lambda gm, inputs, **_: loki(gm, inputs, options=options, engine=compiler)


def decode(model: Any, cache: str, backend: Any, tokens: Any) -> tuple[Any, Any]:
    """Greedy tokens (STEPS,) and their logits (STEPS, vocabulary), after an uncompiled prefill.

    With `tokens`, those are fed instead of the greedy ones. `backend` None runs uncompiled.
    """
    import torch

    torch.manual_seed(1)
    rows = getattr(model.config, "num_codebooks", 1) if is_decoder_part(model) else 1
    prompt = torch.randint(3, 120, (1, PROMPT)).expand(rows, -1)
    with torch.no_grad():
        if cache == "generate":
            return _generate(model, prompt, backend)
        past = _cache(model, cache)
        try:
            out = model(input_ids=prompt, past_key_values=past, use_cache=True)
        except ValueError as error:
            if "uses cache of its own" not in str(error) or cache == "static":
                raise
            out = model(input_ids=prompt, use_cache=True)
        step = model if backend is None else torch.compile(model, backend=backend)
        picked, logits = [], []
        for number in range(STEPS + 1):
            logits.append(_logits(out)[0, -1].float().clone())
            picked.append(logits[-1].nan_to_num().argmax())
            if number < STEPS:
                fed = picked[-1] if tokens is None else tokens[number]
                past = getattr(out, "past_key_values", None) or past
                fed = fed.view(1, 1).expand(rows, 1)
                if model.config.model_type in ALL_TOKENS:
                    fed = prompt = torch.cat([prompt, fed], dim=1)
                out = step(input_ids=fed, past_key_values=past, use_cache=True)
        return torch.stack(picked), torch.stack(logits)


def is_decoder_part(model: Any) -> bool:
    """Whether the model's configuration is the decoder's part of one in `DECODER_CONFIG`."""
    return model.config.model_type.removesuffix("_decoder") in DECODER_CONFIG


def _cache(model: Any, kind: str) -> Any:
    from transformers import DynamicCache, EncoderDecoderCache, StaticCache

    config = model.config.get_text_config(decoder=True)
    if kind == "static":
        return StaticCache(config=config, max_cache_len=SLOTS)
    if not hasattr(config, "num_hidden_layers"):  # parts of a model that share one cache
        return EncoderDecoderCache(DynamicCache(), DynamicCache())
    return DynamicCache(config=config)


def _generate(model: Any, prompt: Any, backend: Any) -> tuple[Any, Any]:
    import torch
    from transformers import CompileConfig

    extra: dict[str, Any] = {"disable_compile": True}
    if backend is not None:
        compile_config = CompileConfig(backend=backend)
        compile_config._compile_all_devices = True
        extra = {"compile_config": compile_config}
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    out = model.generate(
        prompt,
        cache_implementation="static",
        max_new_tokens=STEPS + 1,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **extra,
    )
    return out.sequences[0, -STEPS - 1 :], torch.stack([step[0].float() for step in out.logits])


def _logits(out: Any) -> Any:
    return out.logits if hasattr(out, "logits") else out[0]


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


# ------------------------------------------------------------------------- processes and record

_PRELOAD = ("torch", "torch._dynamo", "torch._inductor", "transformers", "transformers.cache_utils",
            "transformers.modeling_utils", "transformers.models.llama.modeling_llama",
            "loki_compile", "loki_compile.backend")  # fmt: skip


def _serve(cases: Sequence[Case], pipe: Any, home: str) -> None:
    """Child process: runs the cases in order and sends one result each."""
    os.environ["LOKI_HOME"] = home
    import warnings

    import torch
    import transformers

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    logging.getLogger("loki_compile").propagate = False
    for case in cases:
        pipe.send(run_case(case))


def run_cases(cases: Sequence[Case], *, limit: float, workers: int = 1) -> Iterator[dict[str, Any]]:
    """Runs each architecture in a process of its own; yields results as they come, in any order.

    A case that takes more than `limit` seconds, or whose process dies, gets a line that says so.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOAD))
    groups: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        groups[case.model].append(case)
    ready = threading.Condition()
    done: list[dict[str, Any]] = []

    def report(result: dict[str, Any]) -> None:
        with ready:
            done.append(result)
            ready.notify()

    with tempfile.TemporaryDirectory() as home, ThreadPoolExecutor(workers) as pool:
        for group in groups.values():
            pool.submit(_watch, context, group, limit, home, report)
        for _ in cases:
            with ready:
                ready.wait_for(lambda: bool(done))
                result = done.pop(0)
            yield result


def _watch(
    context: Any,
    cases: list[Case],
    limit: float,
    home: str,
    report: Callable[[dict[str, Any]], None],
) -> None:
    while cases:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_serve, args=(cases, theirs, home), daemon=True)
        process.start()
        theirs.close()
        try:
            while cases:
                began = time.monotonic()
                status, error = "out of time", f"no result in {limit:.0f} s"
                try:
                    result = ours.recv() if ours.poll(limit) else None
                except EOFError:
                    process.join()
                    result, status = None, "crashes"
                    error = f"its process ended with {process.exitcode}"
                if result is None:
                    case = cases.pop(0)
                    report({"key": case.key, **vars(case), "status": status, "error": error})
                    break
                cases.pop(0)
                report({**result, "seconds": round(time.monotonic() - began, 1)})
        finally:
            process.kill()
            process.join()


def compact(result: dict[str, Any]) -> dict[str, Any]:
    """A result as the record keeps it: sites counted by outcome and reason, no traces."""
    sites = Counter(
        (site["outcome"], site["reason"]) for graph in result.get("graphs", []) for site in graph
    )
    names = ("key", "small", "status", "error", "tokens", "difference", "dynamo", "plain",
             "seconds", "revision", "versions")  # fmt: skip
    line = {name: result[name] for name in names if name in result}
    if sites:
        line["sites"] = [[*site, number] for site, number in sorted(sites.items())]
    if "steps" in result:
        line["steps"] = {kind: result["steps"][f"{kind}_steps"] for kind in ("sparse", "dense")}
    for numbers in (line, line.get("plain", {})):
        if "difference" in numbers:
            numbers["difference"] = float(f"{numbers['difference']:.1e}")
    return line


def read_record(path: Path) -> dict[str, dict[str, Any]]:
    """Results by key; the last line of a key wins."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return {line["key"]: line for line in lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("models", nargs="*", help="model types; all where none is named")
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=list(CACHES))
    parser.add_argument("--attention", nargs="+", choices=ATTENTIONS, default=list(ATTENTIONS))
    parser.add_argument("--engine", choices=("eager", "inductor"), default="eager")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for one case")
    parser.add_argument("--no-small", action="store_true", help="leave out the small budget")
    parser.add_argument("--again", action="store_true", help="run finished cases again")
    parser.add_argument("--report-only", action="store_true", help="write the table, run nothing")
    parser.add_argument("--sample", action="store_true", help="the types in SAMPLE")
    parser.add_argument("--record", type=Path, default=RECORD, help="where finished cases are kept")
    parser.add_argument(
        "--against", type=Path, nargs="+", help="write what other records have otherwise, and stop"
    )
    args = parser.parse_args()
    if args.against:
        records = {path: read_record(path) for path in (args.record, *args.against)}
        _write(VERSIONS, versions_table([list(rows.values()) for rows in records.values()]))
        return
    models = args.models or (SAMPLE if args.sample else model_types())
    unknown = sorted(set(models) - set(model_types()))
    if unknown:
        parser.error(f"found {', '.join(unknown)}; needed model types of AutoModelForCausalLM")
    known = read_record(args.record)
    cases = [
        Case(model, cache, attention, args.engine, not args.no_small)
        for attention in args.attention
        for cache in args.caches
        for model in models
    ]
    cases = [case for case in cases if args.again or not _finished(case, known)]
    if cases and not args.report_only:
        _run(cases, args)
        known = read_record(args.record)
    lines = [json.dumps(known[key]) + "\n" for key in sorted(known)]
    args.record.write_text("".join(lines))
    if args.record == RECORD:
        _write(TABLE, table(known.values()))


def _finished(case: Case, known: dict[str, dict[str, Any]]) -> bool:
    line = known.get(case.key)
    return line is not None and not line.get("from_table") and line["small"] >= case.small


def _write(path: Path, text: str) -> None:
    path.write_text(text)
    print(f"wrote {path.relative_to(ROOT)}")


def _run(cases: Sequence[Case], args: argparse.Namespace) -> None:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    facts = {"revision": _revision(), "versions": _versions()}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    RUNS.mkdir(parents=True, exist_ok=True)
    full = RUNS / f"{args.engine}.jsonl"
    with (
        Progress(*columns, TimeRemainingColumn()) as progress,
        full.open("a") as details,
        args.record.open("a") as kept,
    ):
        task = progress.add_task("decoding", total=len(cases))
        for result in run_cases(cases, limit=args.limit, workers=args.workers):
            result.update(facts)
            for out, line in ((details, result), (kept, compact(result))):
                out.write(json.dumps(line) + "\n")
                out.flush()
            if result["status"] in ("differs", "crashes", "out of time"):
                progress.print(f"{result['key']}: {result['status']} {result.get('error', '')}")
            progress.update(task, advance=1, description=result["model"])


def model_types() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


# ------------------------------------------------------------------------------------- the table

_STATUSES = ("equal", "differs", "crashes", "differs without us", "crashes without us",
             "does not run", "does not build", "out of time")  # fmt: skip


def table(results: Iterable[dict[str, Any]]) -> str:
    """Lines of a record (see `compact`) as Markdown: totals, reasons, and one row per case."""
    sections: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for result in sorted(results, key=lambda r: r["key"]):
        _, cache, attention, engine = result["key"].split("/")
        sections[engine, cache, attention].append(result)
    every = [row for rows in sections.values() for row in rows]
    head = {
        "covered": len({_model(row) for row in every}),
        "known": len(model_types()),
        "taken_over": sum("from_table" in row for row in every),
    }
    versions, revisions = (
        ", ".join(f"{name} ({n})" for name, n in Counter(row[what] for row in every).most_common())
        for what in ("versions", "revision")
    )
    parts = [_HEAD.format(versions=versions, revisions=revisions, **head)]
    names = list(sections)
    names.sort(key=lambda n: (n[0], CACHES.index(n[1]), ATTENTIONS.index(n[2])))
    parts.append(_totals([(name, sections[name]) for name in names]))
    parts.append(_reasons(every))
    parts += [_section(name, sections[name]) for name in names]
    return "\n".join(parts)


_HEAD = """# Every causal language model of transformers through `backend="loki"`

Written by `python benchmarks/zoo.py` from `zoo.jsonl`, CPU. Tiny random models, fp32, one prefill
of 12 tokens uncompiled, then 6 steps compiled with `top_k=1.0, min_context=0`: sparse is forced and
must agree with the uncompiled run of the same cache kind. The record covers {covered} of {known}
architectures; what is not listed has not been run.

Cases by versions: {versions}. By commit ("+": with changes that were not committed yet):
{revisions}. {taken_over} of them were taken over from a table whose record is lost: counts of
graphs and small budgets are missing there, and the next run replaces them.

* **equal**: the same tokens, and logits within 1e-4 of the largest one; where a small budget
  (`top_k=6`) was run too, finite at it (the column **small** counts those).
* **differs**, **crashes**: wrong, and plain `torch.compile(backend="eager")` is not.
* **without us**: `backend="eager"` differs or crashes as well. **does not run**: nor does the
  uncompiled model (its cache is of another kind). Difference: of logits, as a share of the largest.
* Sites are summed over the graphs that Dynamo made (lengths become symbolic, windows fill).
* **all rewritten**: has attention sites, and each is sparse or dense by plan. **all cached
  rewritten** leaves aside sites whose keys are computed in the graph or expanded from a latent.
* **more than plain**: of the architectures whose **graphs** were **compared**, those with more
  graphs, graph breaks or recompiles than `backend="eager"` has in the same process (with engine
  inductor also than `backend="inductor"`, whose own guards can cost graphs); in the sections, by
  how many.
"""


def _revision() -> str:
    """The commit that is checked out, with "+" behind it where files differ from it."""

    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results")
    return (git("rev-parse", "--short", "HEAD") or "?") + "+" * bool(changed)


def _versions() -> str:
    from importlib.metadata import version

    return ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))


def _model(result: dict[str, Any]) -> str:
    return result["key"].partition("/")[0]


def _sites(result: dict[str, Any]) -> Counter[tuple[str, str]]:
    """How many sites of the case have this outcome for this reason."""
    return Counter({(outcome, why): number for outcome, why, number in result.get("sites", [])})


def _more(result: dict[str, Any]) -> dict[str, int]:
    """Graphs, breaks and recompiles beyond plain Dynamo's."""
    ours, plain = result.get("dynamo", {}), result.get("plain", {})
    return {name: n - plain[name] for name, n in ours.items() if n > plain[name]}


def _all_rewritten(result: dict[str, Any]) -> bool:
    sites = _sites(result)
    return bool(sites) and all(outcome != "dense" for outcome, _ in sites)


def _all_cached_rewritten(result: dict[str, Any]) -> bool:
    from loki_compile.passes.attention import Reason

    computed = tuple(r.value.partition("{")[0] for r in (Reason.NO_CACHE, Reason.LATENT))
    outcomes = [outcome for outcome, why in _sites(result) if not why.startswith(computed)]
    return bool(outcomes) and "dense" not in outcomes


def _short(reason: str) -> str:
    return reason.split(":")[0].split(", which")[0].split("; ")[0].split(" of ")[0]


def _totals(sections: Sequence[tuple[tuple[str, str, str], list[dict[str, Any]]]]) -> str:
    head = ["engine", "cache", "attention", *_STATUSES, "small", "has sites", "all rewritten",
            "all cached rewritten", "graphs compared", "more than plain"]  # fmt: skip
    rows = []
    for name, results in sections:
        counts = Counter(result["status"] for result in results)
        small = sum(result["small"] and result["status"] == "equal" for result in results)
        tests = (_sites, _all_rewritten, _all_cached_rewritten, lambda r: "plain" in r, _more)
        rows.append([
            *name, *(counts[status] for status in _STATUSES), small,
            *(sum(bool(test(result)) for result in results) for test in tests),
        ])  # fmt: skip
    return "## Totals (architectures)\n\n" + _markdown(head, rows)


def _reasons(results: Sequence[dict[str, Any]]) -> str:
    models: dict[str, set[str]] = defaultdict(set)
    for result in results:
        for outcome, why in _sites(result):
            if outcome == "dense":
                models[_short(why)].add(_model(result))
    ordered = sorted(models.items(), key=lambda item: (-len(item[1]), item[0]))
    rows = [[len(names), reason, ", ".join(sorted(names))] for reason, names in ordered]
    return "## Why sites are dense\n\n" + _markdown(["architectures", "reason", "which"], rows)


def _section(name: tuple[str, str, str], results: Sequence[dict[str, Any]]) -> str:
    head = ["architecture", "graphs", "more than plain", "sites", "sparse", "by plan", "dense",
            "why dense", "outcome", "tokens", "difference", "commit"]  # fmt: skip
    rows = []
    for result in results:
        sites = _sites(result)
        outcomes: Counter[str] = Counter()
        for (outcome, _), number in sites.items():
            outcomes[outcome] += number
        why = sorted({_short(why) for outcome, why in sites if outcome == "dense"})
        tokens = {True: "equal", False: "differ"}.get(result.get("tokens"), "")
        far = result.get("difference")
        rows.append([
            _model(result), result.get("dynamo", {}).get("graphs", ""),
            ", ".join(f"{number} {what}" for what, number in _more(result).items()),
            sum(outcomes.values()), outcomes["sparse"],
            outcomes["dense by plan"], outcomes["dense"], "; ".join(why) or result.get("error", ""),
            result["status"], tokens, "" if far is None else f"{far:.0e}", result["revision"],
        ])  # fmt: skip
    return "## Engine {}, cache {}, attention {}\n\n".format(*name) + _markdown(head, rows)


def versions_table(records: Sequence[Sequence[dict[str, Any]]]) -> str:
    """What the cases of the second and later records have otherwise than the first, as Markdown.

    An outcome is the status, the outcomes of sites, and the reasons of dense ones.
    """
    first, *others = ({row["key"]: row for row in rows} for rows in records)
    totals, differing = [], []
    for other in others:
        here, there = (
            " and ".join(sorted({rows[key]["versions"] for key in other if key in rows}))
            for rows in (first, other)
        )
        shared = sorted(key for key in other if key in first)
        odd = [key for key in shared if _outcome(first[key]) != _outcome(other[key])]
        wrong = sum(row["status"] in ("differs", "crashes") for row in other.values())
        more = sum(bool(_more(row)) for row in other.values())
        totals.append([there, here, len(shared), len(shared) - len(odd), wrong, more])
        differing += [[there, key, _outcome(other[key]), _outcome(first[key])] for key in odd]
    head = ["versions", "against", "cases", "same outcome", "wrong", "more graphs than plain"]
    return (
        "# The zoo under other versions\n\n"
        "Written by `python benchmarks/zoo.py --against`; an outcome is what a case of `zoo.md`\n"
        "came to, with the outcomes of its sites.\n\n"
        + _markdown(head, totals)
        + "\n## Cases with another outcome\n\n"
        + _markdown(["versions", "case", "outcome", "against"], differing)
    )


def _outcome(result: dict[str, Any]) -> str:
    sites = {
        outcome + f" ({_short(why)})" * (outcome == "dense") for outcome, why in _sites(result)
    }
    return "; ".join([result["status"], *sorted(sites)])


def _markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


if __name__ == "__main__":
    main()
