"""The functions of the original vAttention release: python examples/allocator_classic.py"""

import torch

import vattention

SLOTS, CONTEXT = 4, 2000

tensors = vattention.init_kvcache(2, 4, 64, SLOTS, CONTEXT, "cpu", torch.float16, 65536)
vattention.reserve_physical_pages(32 << 20)
lengths = [0] * SLOTS
for prompt in (700, 30, 1500):
    lengths[vattention.alloc_new_batch_idx(prompt)] = prompt

for step in range(100):
    vattention.step_async(lengths)  # memory for these lengths now, and for one token more beside the step
    for tensor in tensors:
        for slot, length in enumerate(lengths):
            tensor[slot, max(0, length - 1) : length] = step
    lengths = [length + 1 if length else 0 for length in lengths]
    if step == 50:
        vattention.free_batch_idx(lengths.index(max(lengths)))
        lengths[lengths.index(max(lengths))] = 0

vattention.show_allocator_state()
print(f"{vattention.num_free_kvblocks()} rows free")
vattention.cleanup()
