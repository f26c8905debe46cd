"""All Triton kernels behind one interface. Safe in CUDA graphs: nothing here waits for the device or reads from it."""

import torch
from torch import Tensor

from sarathi.model_executor.ops.triton import activation, embedding, norm, rope, sampling
from sarathi.model_executor.ops.triton.linear import LinearKernels
from sarathi.model_executor.ops.triton.skinny import MAX_TOKENS
from sarathi.model_executor.ops.types import CacheTarget, RotationTable


class TritonOps(LinearKernels):
    """Implements ``sarathi.model_executor.ops.Ops`` on CUDA. One instance serves one stream."""

    def __init__(self, device: torch.device, *, max_skinny_tokens: int = MAX_TOKENS, pdl: bool = False):
        """pdl: let each kernel start while the one before it ends (programmatic dependent launch, Hopper and later)."""
        num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        super().__init__(num_sms, device, max_skinny_tokens=max_skinny_tokens, pdl=pdl)

    def embed(self, token_ids: Tensor, newest: Tensor, weight: Tensor) -> Tensor:
        """See ``native.embedding.embed``."""
        return embedding.embed(token_ids, newest, weight)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See ``native.norm.rms_norm``."""
        return norm.rms_norm(x, weight, eps, pdl=self._pdl)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See ``native.norm.add_rms_norm``."""
        return norm.add_rms_norm(x, residual, weight, eps, pdl=self._pdl)

    def rope_and_store(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, table: RotationTable, target: CacheTarget
    ) -> None:
        """See ``native.rope.rope_and_store``."""
        rope.rope_and_store(q, k, v, positions, table, target, pdl=self._pdl)

    def store(self, k: Tensor, v: Tensor, target: CacheTarget) -> None:
        """See ``native.rope.store``."""
        rope.store(k, v, target, pdl=self._pdl)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """See ``native.activation.silu_and_mul``."""
        return activation.silu_and_mul(gate_up, pdl=self._pdl)

    def argmax(self, logits: Tensor) -> Tensor:
        """See ``native.sampling.argmax``."""
        return sampling.argmax(logits)

    def argmax_into(self, logits: Tensor, homes: Tensor, newest: Tensor) -> Tensor:
        """See ``native.sampling.argmax_into``."""
        return sampling.argmax_into(logits, homes, newest)

    def draw(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """See ``native.sampling.draw``."""
        return sampling.draw(logits, uniform)

    def top_p_threshold(self, logits: Tensor, top_p: Tensor) -> Tensor:
        """See ``native.sampling.top_p_threshold``."""
        return sampling.top_p_threshold(logits, top_p)
