"""Caches that grow in place: when a step writes behind its past, and that nobody can tell.

Toys and an interpreter in Inductor's place. What the caller holds, cuts, shares or writes between
two steps must come out as under `torch.cat`, which makes a tensor of its own at each step.
"""

from __future__ import annotations

import copy
import functools
import gc
import io
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from toy_conversation import Conversation, tokens
from toy_decoders import Spelling, ToyDecoder
from toy_masks import no_mask
from toy_options import EVERYTHING, FILLED, MODES
from toy_writes import cat_bhtd, cat_bthd, cat_cropped, cat_folded

from loki_compile import buffers, reset_stats, runtime, stats
from loki_compile.buffers import all_buffers, buffer_of

pytestmark = [pytest.mark.covers, pytest.mark.usefixtures("interpreted")]

GROWING = Spelling(cat_bhtd, mask=no_mask, growing=True)
WAYS = pytest.mark.parametrize(
    "options", [EVERYTHING, {"min_context": 10**6}], ids=["sparse", "dense"]
)


class Pair:
    """A compiled toy and an eager one; `here` and `there` are one conversation with each."""

    def __init__(self, options=EVERYTHING, spelling=GROWING):
        self.spelling = spelling
        self.module = ToyDecoder(spelling).eval()
        self.fast = torch.compile(self.module, backend="loki", options=options)
        with torch.no_grad():  # how many references such a call takes is known then
            self.step(*self.start(), 8)
        reset_stats()

    def start(self, **kwargs):
        here = Conversation.start(self.spelling, **kwargs)
        return here, here.fork()

    def step(self, here, there, steps=1):
        for x in tokens(self.spelling, steps, batch=here.batch):
            out, expected = here.step(self.fast, x), there.step(self.module, x)
            torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)
            agree(here.keys, there.keys)
            agree(here.values, there.values)


def agree(ours, theirs):
    """Holds nothing behind it: a local variable would, and the next step would see that."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def storage(tensor):
    return tensor.untyped_storage().data_ptr()


@WAYS
@MODES
def test_a_cache_stays_in_its_memory(options, mode):
    with mode():
        pair = Pair(options)
        here, there = pair.start()
        pair.step(here, there)
        places = storage(here.keys), storage(here.values)
        pair.step(here, there, 9)
        assert (storage(here.keys), storage(here.values)) == places
        assert here.keys.is_inference() == (mode is torch.inference_mode)
    assert stats()["rebuilds"] == (options is EVERYTHING)


@pytest.mark.parametrize("write", [cat_bhtd, cat_bthd, cat_folded])
def test_memory_that_is_full_is_laid_out_anew_and_the_index_goes_along(write, monkeypatch):
    monkeypatch.setattr(buffers, "ROOM", {"cpu": (1 << 20, 3)})
    monkeypatch.setattr(buffers, "ROUND", 1)
    layout = {cat_bhtd: "bhtd", cat_bthd: "bthd", cat_folded: "btf"}[write]
    with torch.no_grad():
        pair = Pair(EVERYTHING, Spelling(write, layout=layout, mask=no_mask, growing=True))
        here, there = pair.start()
        places = {}  # by id, and alive, lest another gets it
        for _ in range(12):
            pair.step(here, there)
            buffer = buffer_of(here.keys)
            places[id(buffer)] = buffer
    assert len(places) > 2 and stats()["rebuilds"] == 1 and stats()["sparse_steps"] == 12


@WAYS
@MODES
def test_older_tensors_stay_as_they_were_whatever_is_done_later(options, mode):
    with mode():
        pair = Pair(options)
        here, there = pair.start()
        pair.step(here, there, 2)
        kept = [
            (here.keys, here.keys.clone()),
            (here.values[:, :, 3:5], here.values[:, :, 3:5] + 0),
        ]
        pair.step(here, there, 3)
        for conversation in (here, there):
            conversation.keys.mul_(-1)
            conversation.values[:, :, 4] = 7
        pair.step(here, there, 2)
        for tensor, before in kept:
            assert torch.equal(tensor, before)


@WAYS
@pytest.mark.parametrize("which", ["keys", "values"])
def test_a_past_that_comes_with_more_references_than_others_grows_in_place_too(which, options):
    """At every call: it is how these calls come, and no other cache. Dynamo holds arguments
    unevenly where steps have several tokens."""
    with torch.no_grad():
        pair = Pair(options)
        here, there = pair.start()
        places = []
        for _ in range(9):
            also = getattr(here, which)
            pair.step(here, there)
            places.append((storage(here.keys), storage(here.values)))
        del also
    assert len({*places[-4:]}) == 1
    assert stats()["rebuilds"] == (options is EVERYTHING)


@MODES
def test_forks_that_share_a_tensor_part_at_the_next_step(mode):
    """What one writes in place the other does not see."""
    with mode():
        pair = Pair()
        here, there = pair.start()
        pair.step(here, there, 3)
        twin, its_truth = copy.copy(here), copy.copy(there)
        pair.step(here, there)
        for conversation in (here, there):
            conversation.keys.mul_(-3)
            conversation.values.mul_(2)
        pair.step(twin, its_truth, 2)
        pair.step(here, there, 2)
        assert storage(twin.keys) != storage(here.keys)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.clone(),
        lambda x: x[:1].expand(2, -1, -1, -1),
        lambda x: x.index_select(0, torch.tensor([1, 0])),
        lambda x: x.flip(0),
        copy.deepcopy,
    ],
    ids=["clone", "expanded", "reordered", "flipped", "deep copy"],
)
def test_tensors_from_elsewhere_are_copied_once(change):
    with torch.no_grad():
        pair = Pair()
        here, there = pair.start()
        pair.step(here, there, 3)
        for conversation in (here, there):
            conversation.keys, conversation.values = map(
                change, (conversation.keys, conversation.values)
            )
        pair.step(here, there)
        place = storage(here.keys)
        pair.step(here, there, 2)
        assert storage(here.keys) == place


def cut(conversation, length):
    conversation.filled = length
    conversation.keys = conversation.keys[:, :, :length]
    conversation.values = conversation.values[:, :, :length]


def test_a_cut_goes_on_where_it_is_and_keeps_its_index():
    with torch.no_grad():
        pair = Pair()
        here, there = pair.start()
        pair.step(here, there, 4)
        place = storage(here.keys)
        for _ in range(5):
            for conversation in (here, there):
                cut(conversation, conversation.filled - 2)
            pair.step(here, there, 3)
        assert storage(here.keys) == place
    assert stats()["rebuilds"] == 1


def test_a_cut_of_what_somebody_holds_is_copied_with_its_index():
    with torch.no_grad():
        pair = Pair()
        here, there = pair.start()
        pair.step(here, there, 4)
        longer, its_truth = copy.copy(here), copy.copy(there)
        for conversation in (here, there):
            cut(conversation, FILLED + 1)
        pair.step(here, there, 3)
        assert storage(here.keys) != storage(longer.keys)
        pair.step(longer, its_truth, 3)
    assert stats()["rebuilds"] == 1  # of the longer one, whose rows nobody has written over, too


@pytest.mark.parametrize(("sizes", "axis"), [((2, 3, 700, 16), 2), ((1, 700, 3, 16), 1)])
def test_large_pages_are_asked_for_where_rows_fill_them_and_never_for_room(
    sizes, axis, monkeypatch
):
    monkeypatch.setattr(buffers, "LARGE_PAGE", page := 4096)
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(buffers, "MADVISE", lambda at, size, advice: asked.append((at, size)))
    past = torch.randn(sizes)
    buffer, room = buffers.new_buffer(past, axis, 701, 1100)
    assert torch.equal(room.narrow(axis, 0, 700), past)
    row = past.stride(axis) * 4
    runs = [buffer.address + i * 1100 * row for i in range(past.numel() * 4 // (700 * row))]
    assert asked
    for at, size in asked:
        assert at % page == 0 and size % page == 0
        assert any(run <= at and at + size <= run + 700 * row for run in runs)
    assert sum(size for _, size in asked) > len(runs) * (700 * row - 2 * page)


def test_the_memory_dies_with_the_cache():
    gc.collect()
    others, held = len(all_buffers()), stats()["index_bytes"]  # of what failed before, say
    with torch.no_grad():
        pair = Pair()
        here, there = pair.start()
        pair.step(here, there, 3)
        watched = weakref.ref(here.keys.untyped_storage())
        assert len(all_buffers()) == others + 2 and stats()["index_bytes"] > held
        del here
    gc.collect()
    assert watched() is None
    assert len(all_buffers()) == others and stats()["index_bytes"] == held


@pytest.mark.parametrize("how", ["exact", "none"])
def test_short_of_memory_an_exact_fit_is_tried_then_the_copying_path(how, monkeypatch, caplog):
    new_buffer = buffers.new_buffer

    def scarce(past, axis, rows, capacity):
        if how == "none" or capacity > rows + 1:
            raise MemoryError("not enough memory")
        return new_buffer(past, axis, rows, capacity)

    with torch.no_grad():
        pair = Pair()
        here, there = pair.start()
        monkeypatch.setattr(buffers, "new_buffer", scarce)
        pair.step(here, there, 5)
        monkeypatch.setattr(buffers, "new_buffer", new_buffer)
        shortage = stats()["dense_because"].get("shortage", 0)
        assert shortage == (0 if how == "exact" else 5)
        said = [record for record in caplog.records if "no memory for caches" in record.message]
        assert len(said) == (how == "none")
        pair.step(here, there, 2)
    assert stats()["sparse_steps"] == (7 if how == "exact" else 2)


def test_a_step_that_fails_can_be_taken_again(monkeypatch):
    with torch.no_grad():
        pair = Pair()
        here, there = pair.start()
        pair.step(here, there, 3)
        real = runtime.DecodeGraph.run_sparse

        def fails(self, step):
            real(self, step)
            raise RuntimeError("the power is out")

        monkeypatch.setattr(runtime.DecodeGraph, "run_sparse", fails)
        with pytest.raises(RuntimeError, match="power"):
            here.step(pair.fast, tokens(GROWING, 1)[0])
        monkeypatch.setattr(runtime.DecodeGraph, "run_sparse", real)
        pair.step(here, there, 3)


def test_threads_that_begin_with_one_tensor_have_their_own(request):
    """One of 4 rounds failed while asking whether a memory is held and holding it were two acts."""
    request.addfinalizer(functools.partial(sys.setswitchinterval, sys.getswitchinterval()))
    sys.setswitchinterval(1e-5)
    pair = Pair()

    def go_on(talk):
        with torch.no_grad():
            pair.step(*talk, 5)

    for _ in range(30):
        with torch.no_grad():
            here, there = pair.start()
            pair.step(here, there, 3)
        talks = [(copy.copy(here), copy.copy(there)) for _ in range(8)]
        del here, there
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(go_on, talks))


def test_a_saved_tensor_is_read_back():
    """`torch.save` writes the memory behind it as well: a clone is smaller."""
    with torch.no_grad():
        pair = Pair()
        here, there = pair.start()
        pair.step(here, there, 2)
        sizes = []
        for tensor in (here.keys, here.keys.clone()):
            file = io.BytesIO()
            torch.save(tensor, file)
            sizes.append(file.tell())
            file.seek(0)
            assert torch.equal(torch.load(file), here.keys)
        assert sizes[0] > sizes[1]


def test_windows_stay_as_they_were_written():
    before = set(map(id, all_buffers()))  # what other tests hold yet
    with torch.no_grad():
        pair = Pair(EVERYTHING, Spelling(cat_cropped, mask=no_mask, growing=True))
        here, there = pair.start()
        for x in tokens(pair.spelling, 4):
            out, expected = here.step(pair.fast, x), there.step(pair.module, x)
            torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)
    assert set(map(id, all_buffers())) <= before


def test_no_cache_grows_in_place_where_cuda_graphs_keep_addresses():
    before = set(map(id, all_buffers()))
    with torch.no_grad():
        pair = Pair({**EVERYTHING, "inductor": {"triton.cudagraphs": True}})
        here, there = pair.start()
        pair.step(here, there, 3)
    assert set(map(id, all_buffers())) <= before and stats()["sparse_steps"] == 3
