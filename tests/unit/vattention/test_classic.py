"""A script written against the original release finds its functions, and they mean what they meant."""

import pydoc
import random

import pytest
import torch

import vattention

SLOTS, CONTEXT = 6, 1000
PAGE = 4096  # a token is 128 bytes: 32 tokens a page


@pytest.fixture
def tensors():
    yield vattention.init_kvcache(3, 2, 32, SLOTS, CONTEXT, "cpu", torch.float16, PAGE)
    vattention.cleanup()


def test_demo_loop_of_the_original(tensors):
    """Requests come and go, every step writes all tokens: nobody's are changed by another."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    assert vattention.reserve_physical_pages(100 * 6 * PAGE) == 600
    lengths = [0] * SLOTS
    for step in range(120):
        if step % 3 == 0 and 0 in lengths:
            lengths[lengths.index(0)] = rng.randint(1, 300)
        while sum(-(-n // 32) for n in lengths) > 100 or rng.random() < 0.1:
            lengths[rng.randrange(SLOTS)] = 0
        if step % 2:
            vattention.step_async(lengths)
        else:
            vattention.step(lengths, rng.random() < 0.5)
        for slot, length in enumerate(lengths):
            for tensor in tensors:
                tensor[slot, :length] = slot + 1
        for slot, length in enumerate(lengths):
            assert all(tensor[slot, :length].eq(slot + 1).all() for tensor in tensors)
        lengths = [min(n + 1, CONTEXT) if n else 0 for n in lengths]


def test_batch_index_functions(tensors):
    vattention.reserve_physical_pages(64 * 6 * PAGE)
    ids = [vattention.alloc_new_batch_idx(100) for _ in range(SLOTS)]
    assert sorted(ids) == list(range(SLOTS)) and vattention.alloc_new_batch_idx(1) == -1
    assert vattention.num_free_kvblocks() == 64
    vattention.step([100] * SLOTS, False)
    assert vattention.num_free_kvblocks() == 64 - 4 * SLOTS
    vattention.free_batch_idx(ids[3])
    assert vattention.num_free_kvblocks() == 64 - 4 * (SLOTS - 1)
    assert vattention.alloc_new_batch_idx(90) == ids[3]


def test_running_out_is_an_exception_not_an_exit(tensors):
    vattention.reserve_physical_pages(4 * 6 * PAGE)
    with pytest.raises(vattention.OutOfMemoryError):
        vattention.step([500] + [0] * (SLOTS - 1), False)
    vattention.step([128] + [0] * (SLOTS - 1), False)


def test_common_pages_are_one_memory_for_all(tensors):
    vattention.reserve_physical_pages(64 * 6 * PAGE)
    vattention.map_common_pages(60)
    tensors[4][0, :60] = 7
    assert all(tensors[4][slot, :60].eq(7).all() for slot in range(SLOTS))
    assert vattention.num_free_kvblocks() == 62
    vattention.step([100] * SLOTS, False)
    tensors[4][2, 64:100] = 1
    assert vattention.num_free_kvblocks() == 62 - 2 * SLOTS
    vattention.step([0] * SLOTS, True)
    assert vattention.num_free_kvblocks() == 64


def test_megacache_returns_one_k_and_one_v():
    k, v = vattention.init_kvcache(3, 2, 32, 4, 500, torch.device("cpu"), torch.bfloat16, None, megacache=True)
    assert k.shape == v.shape == (4, 500, 3, 2, 32)
    vattention.cleanup()


def test_shows_print_what_they_are_asked_for(tensors, capsys):
    vattention.set_verbose(True)
    slot = vattention.alloc_new_batch_idx(10)
    vattention.set_verbose(False)
    vattention.show_kvcache_config()
    vattention.show_allocator_state()
    out = capsys.readouterr().out
    assert f"slot {slot} for 10 tokens" in out and "page_bytes: 4096" in out and "free rows: 6 of 6" in out


def test_deferral_can_be_switched_off(tensors):
    vattention.reserve_physical_pages(64 * 6 * PAGE)
    vattention.set_deferred_reclamation(False)
    vattention.step([100] + [0] * (SLOTS - 1), False)
    vattention.step([0] * SLOTS, False)
    vattention.show_allocator_state()
    assert vattention.num_free_kvblocks() == 64


def test_nothing_works_before_init():
    vattention.cleanup()
    with pytest.raises(vattention.VAttentionError, match="init_kvcache"):
        vattention.step([1], False)


@pytest.mark.parametrize("length", [0, -1, CONTEXT + 1, 2**70])
def test_no_slot_is_given_out_for_what_is_no_length(tensors, length):
    """Free slots have length 0: one given out with it would be given out again."""
    with pytest.raises(ValueError, match=f"seq_len is {length}: it must be from 1 to {CONTEXT}"):
        vattention.alloc_new_batch_idx(length)
    assert sorted(vattention.alloc_new_batch_idx(1) for _ in range(SLOTS)) == list(range(SLOTS))


@pytest.mark.parametrize("length", [-1, CONTEXT + 1, 2**70])
def test_lengths_that_are_none_change_nothing(tensors, length, capsys):
    vattention.step([10] + [0] * (SLOTS - 1), False)
    for call in (lambda lengths: vattention.step(lengths, True), vattention.step_async):
        with pytest.raises(ValueError, match=rf"seq_lens\[2\] is {length}: it must be from 0 to {CONTEXT}"):
            call([0, 5, length] + [0] * (SLOTS - 3))
    vattention.show_allocator_state()
    assert [int(line.split(":")[1]) for line in capsys.readouterr().out.splitlines()[2:]] == [10] + [0] * (SLOTS - 1)


@pytest.mark.parametrize("idx", [-1, SLOTS])
def test_only_slots_can_be_freed(tensors, idx):
    """-1 is what alloc_new_batch_idx gives where no slot is free."""
    with pytest.raises(ValueError, match=f"idx is {idx}: it must be from 0 to {SLOTS - 1}"):
        vattention.free_batch_idx(idx)


@pytest.mark.parametrize("tokens", [-5, CONTEXT + 1, 2**57])
def test_common_pages_are_refused_where_no_slot_has_so_many(tensors, tokens):
    with pytest.raises(ValueError, match=f"num_tokens is {tokens}: it must be from 0 to {CONTEXT}"):
        vattention.map_common_pages(tokens)


def test_lengths_must_cover_every_slot(tensors):
    with pytest.raises(ValueError, match=r"seq_lens must be a list of one length a slot, 6, got \[1, 2\]"):
        vattention.step([1, 2], False)


def test_help_shows_functions():
    text = pydoc.render_doc(vattention.step, renderer=pydoc.plaintext)
    assert "step(seq_lens: 'Sequence[int]', eager_reclaim: 'bool') -> 'None'" in text
    assert "method of" not in text and "eager_reclaim, unmaps those of slots of length 0" in text
