"""The set of Triton operations. Safe in CUDA graphs: nothing here waits for the device or reads from it."""

import torch
from torch import Tensor

from sarathi.model_executor.ops.triton import elementwise, rope, sampling
from sarathi.model_executor.ops.triton.linear import LinearKernels
from sarathi.model_executor.ops.triton.skinny import MAX_TOKENS
from sarathi.model_executor.ops.types import CacheTarget, RopeTable


class TritonOps(LinearKernels):
    """Implements ``sarathi.model_executor.ops.Ops`` on CUDA. One instance serves one stream."""

    def __init__(self, device: torch.device, *, max_skinny_tokens: int = MAX_TOKENS, pdl: bool = False):
        """pdl: let each kernel start while the one before it ends (programmatic dependent launch, Hopper and later)."""
        num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        super().__init__(num_sms, device, max_skinny_tokens=max_skinny_tokens, pdl=pdl)

    def embed(self, token_ids: Tensor, weight: Tensor, last_tokens: Tensor | None = None) -> Tensor:
        """See ``NativeOps.embed``."""
        return elementwise.embed(token_ids, weight, last_tokens)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See ``NativeOps.rms_norm``."""
        return elementwise.rms_norm(x, weight, eps, pdl=self._pdl)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """See ``NativeOps.silu_and_mul``."""
        return elementwise.silu_and_mul(gate_up, pdl=self._pdl)

    def rope_and_store(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, table: RopeTable, target: CacheTarget
    ) -> None:
        """See ``NativeOps.rope_and_store``."""
        rope.rope_and_store(q, k, v, positions, table, target, pdl=self._pdl)

    argmax = staticmethod(sampling.argmax)
    argmax_into = staticmethod(sampling.argmax_into)
    mask_tokens = staticmethod(sampling.mask_tokens)
    draw = staticmethod(sampling.draw)
    top_p_threshold = staticmethod(sampling.top_p_threshold)
