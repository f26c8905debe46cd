"""All torch twins behind the interface of the fused kernels. Runs on any device."""

from sarathi.model_executor.ops.native import activation, embedding, norm, rope, sampling
from sarathi.model_executor.ops.native import linear as products


class NativeOps:
    """Implements ``sarathi.model_executor.ops.Ops`` with torch operations."""

    embed = staticmethod(embedding.embed)
    rms_norm = staticmethod(norm.rms_norm)
    add_rms_norm = staticmethod(norm.add_rms_norm)
    rope_and_store = staticmethod(rope.rope_and_store)
    store = staticmethod(rope.store)
    silu_and_mul = staticmethod(activation.silu_and_mul)
    argmax = staticmethod(sampling.argmax)
    argmax_into = staticmethod(sampling.argmax_into)
    draw = staticmethod(sampling.draw)
    top_p_threshold = staticmethod(sampling.top_p_threshold)
    linear = staticmethod(products.linear)
    linear_add = staticmethod(products.linear_add)
    gated_linear = staticmethod(products.gated_linear)
