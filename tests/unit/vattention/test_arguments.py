"""An argument that does not fit is refused with its name and its value, in every public call of the library."""

import inspect
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

import vattention
from vattention import Arena, VirtualKVCache
from vattention.transformers import VirtualCache

SIZES = {
    "num_layers": 2, "num_kv_heads": 2, "head_size": 32, "num_slots": 4, "max_tokens": 1024, "dtype": "float16",
    "device": "cpu", "budget_bytes": 1 << 20, "page_bytes": 4096, "megacache": False, "deferred_reclamation": True,
    "reclaim_threshold": 0.1, "max_extent_rows": 64,
}  # fmt: skip
CLASSIC = {
    "num_layers": 2, "num_kv_heads": 2, "head_size": 32, "max_batch_size": 4, "max_context_length": 1024,
    "device": "cpu", "dtype": "float16", "page_size": 4096, "megacache": False,
}  # fmt: skip
CALLS = {  # of a cache of these sizes whose slots 0 and 1 are allocated, 1 with 40 tokens
    "rows_for": {"tokens": 1}, "view": {"slot": 1, "layer": 0}, "layer": {"index": 0}, "alloc": {"tokens": 1},
    "claim": {"slot": 2}, "free": {"slot": 0}, "prepare": {"slots": [0], "tokens": [1]},
    "prefetch": {"slots": [0], "tokens": [1], "lead_tokens": 1}, "share": {"source": 1, "target": 0, "tokens": 40},
    "trim": {"slot": 1, "tokens": 3}, "map_ahead": {"tokens": 3}, "set_deferred_reclamation": {"deferred": True},
    "resize": {"budget_bytes": 1 << 20}, "fill_pool": {"bytes": 1 << 16}, "slot_state": {"slot": 0},
}  # fmt: skip
FUNCTIONS = {
    "reserve_physical_pages": {"free_memory": 1 << 20}, "alloc_new_batch_idx": {"seq_len": 5},
    "free_batch_idx": {"idx": 0}, "step": {"seq_lens": [0, 0, 0, 0], "eager_reclaim": False},
    "step_async": {"seq_lens": [0, 0, 0, 0]}, "set_deferred_reclamation": {"value": True},
    "map_common_pages": {"num_tokens": 32}, "set_verbose": {"value": False},
}  # fmt: skip
UNDER_TRANSFORMERS = {"max_tokens": 100, "budget_bytes": 1 << 20, "max_batch_size": 2, "page_bytes": 4096}
WRONG = ["7", None, 1.5, [2.5], slice(2), -1]
MAY_BE_NONE = ("page_bytes", "page_size")  # the device's own


def refuse(call: Callable[..., object], right: dict[str, object]) -> None:
    """Each argument in turn is each wrong value, and the error names both."""
    for name in right:
        for wrong in WRONG:
            if wrong is None and name in MAY_BE_NONE:
                continue
            with pytest.raises((TypeError, ValueError)) as caught:
                call(**{**right, name: wrong})
            shown = str(caught.value)
            assert re.search(rf"\b{name}\b|seq_lens\[0\]", shown) and repr(wrong).strip("[]") in shown, (name, shown)


@pytest.fixture
def cache():
    with VirtualKVCache(**SIZES) as cache:
        cache.prepare([cache.alloc(), cache.alloc()], [0, 40])
        yield cache
        assert [cache.slot_state(slot)[:2] for slot in range(4)] == [(True, 0), (True, 40), (False, 0), (False, 0)]
        cache.check_integrity()


def test_the_constructor_names_what_does_not_fit() -> None:
    refuse(VirtualKVCache, SIZES)


@pytest.mark.parametrize("name", CALLS)
def test_a_method_names_what_does_not_fit_and_changes_nothing(name: str, cache: VirtualKVCache) -> None:
    assert list(inspect.signature(getattr(cache, name)).parameters) == list(CALLS[name])
    refuse(getattr(cache, name), CALLS[name])


def test_no_public_method_is_forgotten() -> None:
    methods = {name: value for name, value in vars(VirtualKVCache).items() if inspect.isfunction(value)}
    with_arguments = {name for name, each in methods.items() if len(inspect.signature(each).parameters) > 1}
    assert {name for name in with_arguments if not name.startswith("_")} == set(CALLS)


def test_an_arena_names_what_does_not_fit() -> None:
    refuse(Arena, {"max_bytes": 1 << 20, "device": "cpu"})
    refuse(Arena(1 << 20).empty, {"shape": (3, 4), "dtype": "float16"})


def test_the_functions_of_the_original_release_name_what_does_not_fit() -> None:
    refuse(vattention.init_kvcache, CLASSIC)
    vattention.init_kvcache(**CLASSIC)
    for name, right in FUNCTIONS.items():
        function = getattr(vattention, name)
        assert list(inspect.signature(function).parameters) == list(right)
        refuse(function, right)
    vattention.cleanup()


def test_the_cache_of_transformers_names_what_does_not_fit() -> None:
    config = LlamaConfig(num_hidden_layers=2)
    refuse(lambda **options: VirtualCache(config, **options), UNDER_TRANSFORMERS)
    with pytest.raises(TypeError, match=r"config must be a model's configuration \(model.config\), got str"):
        VirtualCache("llama", **UNDER_TRANSFORMERS)


def test_integers_of_numpy_and_torch_are_integers() -> None:
    sizes = {name: np.int64(value) if type(value) is int else value for name, value in SIZES.items()}
    with VirtualKVCache(**sizes) as cache:
        slots, lengths = np.array([cache.alloc(np.int32(5)), cache.alloc()]), torch.tensor([7, 9])
        cache.prepare(slots, lengths)
        assert [cache.slot_state(slot)[1] for slot in slots] == [7, 9]
        assert cache.view(slots[1], np.int64(1))[0].shape == (9, 2, 32) and type(cache.token_bytes) is int
        assert cache.rows_for(lengths[0]) == 1 and cache.trim(torch.tensor(1), np.uint8(4)) == 4
