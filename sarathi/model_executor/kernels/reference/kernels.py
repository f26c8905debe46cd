"""All torch twins behind the interface of the fused kernels. Runs on any device."""

from sarathi.model_executor.kernels.reference import activation, embedding, norm, rope, sampling
from sarathi.model_executor.kernels.reference import linear as products


class ReferenceKernels:
    """Implements ``sarathi.model_executor.kernels.Kernels`` with torch operations."""

    embed = staticmethod(embedding.embed)
    rms_norm = staticmethod(norm.rms_norm)
    add_rms_norm = staticmethod(norm.add_rms_norm)
    rope_and_store = staticmethod(rope.rope_and_store)
    store = staticmethod(rope.store)
    silu_and_mul = staticmethod(activation.silu_and_mul)
    argmax = staticmethod(sampling.argmax)
    keep_argmax = staticmethod(sampling.keep_argmax)
    draw = staticmethod(sampling.draw)
    nucleus_floor = staticmethod(sampling.nucleus_floor)
    linear = staticmethod(products.linear)
    linear_add = staticmethod(products.linear_add)
    gated_linear = staticmethod(products.gated_linear)
