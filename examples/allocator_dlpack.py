"""The allocator without torch: python examples/allocator_dlpack.py [numpy|jax|cupy]

A region is an array of bytes for any library that takes DLPack, without a copy. JAX arrays are immutable, so NumPy
writes here and JAX reads the same memory; CuPy does both, and needs an NVIDIA GPU.
"""

import importlib
import sys
from typing import Any

import numpy as np

from vattention import VirtualKVCache

NUM_TOKENS, NUM_HEADS, HEAD_SIZE = 300, 4, 16
SIZES: dict[str, Any] = {
    "num_layers": 2, "num_kv_heads": NUM_HEADS, "head_size": HEAD_SIZE, "num_slots": 4, "max_tokens": 10_000,
    "dtype": "float16", "budget_bytes": 1 << 26,
}  # fmt: skip


def main(name: str) -> None:
    arrays = importlib.import_module({"jax": "jax.numpy"}.get(name, name))
    with VirtualKVCache(**SIZES, device="cuda" if name == "cupy" else "cpu") as cache:
        slot = cache.alloc(NUM_TOKENS)
        cache.prepare([slot], [NUM_TOKENS])
        keys_of_layer_0 = cache.regions()[0]
        print(keys_of_layer_0)
        begin = slot * cache.slot_bytes
        prepared = slice(begin, begin + NUM_TOKENS * cache.token_bytes)  # no other byte may be touched

        def tokens(library: Any) -> Any:
            """[tokens, heads, head size] of layer 0 at the slot, in that library."""
            region = library.from_dlpack(keys_of_layer_0)
            return region[prepared].view(library.float16).reshape(NUM_TOKENS, NUM_HEADS, HEAD_SIZE)

        writer = np if name == "jax" else arrays
        tokens(writer)[:] = writer.arange(NUM_TOKENS, dtype=writer.float16)[:, None, None]
        assert (tokens(arrays)[:, 2, 3] == arrays.arange(NUM_TOKENS)).all()
        print(f"{name}: {NUM_TOKENS} tokens written and read, {cache.stats().mapped_bytes >> 10} KiB mapped")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "numpy")
