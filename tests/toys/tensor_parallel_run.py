"""What each process of test_tensor_parallel.py runs, started by torchrun.

Arguments: a folder with a model, the engine, and what to do, joined by "+" where it is several
things, each with models of its own. A failed assertion ends the process, so torchrun ends with its
message.
"""

import os
import signal
import sys
import warnings

import torch
import torch.distributed as dist

NEW = 9
FULL = {"min_context": 0, "top_k": 1.0}


def load(folder, **how):
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # how to ask for a plan is spelt anew in each version
        return AutoModelForCausalLM.from_pretrained(folder, **how).eval()


def prompt():
    return torch.randint(0, 97, (1, 1101), generator=torch.Generator().manual_seed(3))


def generated(model, **how):
    out = model.generate(prompt(), max_new_tokens=NEW, do_sample=False, **how)
    return out[0, -NEW:].tolist()


def looped(call, cache, after=lambda step: None):
    """Logits of NEW tokens, and the tokens."""
    ids, place, logits = prompt(), 0, []
    for step in range(NEW):
        positions = torch.arange(place, place + ids.shape[1])[None]
        out = call(input_ids=ids, position_ids=positions, past_key_values=cache)
        place += ids.shape[1]
        logits.append(out.logits[:, -1])
        ids = logits[-1].argmax(-1, keepdim=True)
        after(step)
    return torch.cat(logits), torch.cat(logits).argmax(-1).tolist()


def compiled(model, **options):
    from loki_compile import reset_stats

    torch._dynamo.reset()
    reset_stats()
    model.compile(backend="loki", options=options)
    return model


def sparse_steps():
    from loki_compile import stats

    return stats()["sparse_steps"]


def tokens_are_those_of_the_whole_model(whole, sharded):
    from transformers import StaticCache

    expected = generated(whole, disable_compile=True)
    for how in ({}, {"cache_implementation": "static"}):
        found = generated(compiled(sharded, **FULL), disable_compile=True, **how)
        assert found == expected, (how, found, expected)
        assert sparse_steps() == NEW - 1, sparse_steps()
    compiled(sharded, **FULL)
    cache = StaticCache(config=sharded.config, max_cache_len=1200)
    assert looped(sharded, cache)[1] == expected
    assert sparse_steps() == NEW - 1, sparse_steps()


def heads_find_their_basis(whole, sharded):
    """At the default options, with what `calibrate` stored for the whole weights."""
    from loki_compile.pca_store.store import Store
    from transformers import DynamicCache

    from loki_compile import backend

    made = []

    class Watched(backend.DecodeGraph):
        def __init__(self, variants, config, parts, served, *more):
            made.append([binding.basis for binding in served.bindings])
            super().__init__(variants, config, parts, served, *more)

    backend.DecodeGraph = Watched
    expected, _ = looped(compiled(whole), DynamicCache(config=whole.config))
    assert sparse_steps() == NEW - 1, sparse_steps()
    wholes = made.pop()
    made.clear()
    found, _ = looped(compiled(sharded), DynamicCache(config=sharded.config))
    assert sparse_steps() == NEW - 1, sparse_steps()
    stored = Store().load("whole").bases
    heads = stored[0].num_kv_heads // dist.get_world_size()
    mine = slice(dist.get_rank() * heads, (dist.get_rank() + 1) * heads)
    assert made and all(bases == made[0] for bases in made)  # the same objects: indexes are kept
    for held, one, basis in zip(made[0], wholes, stored, strict=True):
        assert held is not None and one is not None
        assert torch.equal(one.key, basis.key)
        assert torch.equal(held.key, basis.key[mine])
        assert torch.equal(held.query, basis.query[mine])
        assert held.rank_for("variance:0.9") == basis.rank_for("variance:0.9")
    # A key more or less chosen shows far above the rounding of sums over processes.
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
    dense, _ = looped(whole.forward, DynamicCache(config=whole.config))
    assert (expected - dense).abs().max() > 2e-3


def a_process_dies(sharded):
    from transformers import DynamicCache

    def die(step):
        if step == 4 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    looped(compiled(sharded), DynamicCache(config=sharded.config), die)


@torch.no_grad()
def main(folder, engine, what):
    from loki_compile import engines

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    chosen = engines.interpreter if engine == "interpreted" else engines.inductor
    with engines.default_engine(chosen):
        for one in what.split("+"):
            run(folder, one)
    dist.destroy_process_group()


def run(folder, what):
    sharded = load(folder, tp_plan="auto")
    assert type(sharded.model.layers[0].self_attn.k_proj.weight).__name__ == "DTensor"
    if what == "tokens":
        tokens_are_those_of_the_whole_model(load(folder), sharded)
    elif what == "basis":
        heads_find_their_basis(load(folder), sharded)
    else:
        a_process_dies(sharded)
    print(f"done: {what} on {dist.get_rank()}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
