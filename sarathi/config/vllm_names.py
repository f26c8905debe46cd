"""vLLM's engine settings that have another name or no counterpart here, with what the error message says."""

from __future__ import annotations

_NOT_HERE = "not supported here"
VLLM_NAMES: dict[str, str] = {
    # under another name, or not needed
    "max_num_batched_tokens": "called chunk_size here, or max_batched_tokens where a scheduler takes whole prompts",
    "kv_cache_memory_bytes": "called memory_bytes here",
    "num_gpu_blocks_override": "called memory_bytes here, in bytes",
    "block_size": "part of the attention_backend's name here, as in fa_paged_16 or fa_vattn_2mb",
    "distributed_executor_backend": "called executor here",
    "long_prefill_token_threshold": "called max_chunk_per_request here",
    "scheduling_policy": "called scheduler_type here; its policies are other ones",
    "enable_chunked_prefill": "decided by scheduler_type here: sarathi and simple_chunking chunk prompts",
    "compilation_config": "only enforce_eager here: nothing is compiled, and CUDA graphs are on unless it is set",
    "cudagraph_capture_sizes": "only enforce_eager here",
    "max_seq_len_to_capture": "only enforce_eager here",
    "disable_log_stats": "not needed here: nothing is logged while requests run",
    "async_scheduling": "not needed here: the next step is always scheduled beside the running one on a GPU",
    "disable_cascade_attn": "called cascade_attention here, which is on by default",
    "enable_sleep_mode": "not needed here for sleep level 1; called mapped_weights here for level 2 on a GPU",
    "skip_tokenizer_init": "not needed here: a model without a tokenizer takes token ids",
    "tokenizer_mode": "not needed here: tokenizers are always fast ones",
    "hf_token": "read from HF_TOKEN by the hub's client",
    # not supported
    "quantization": _NOT_HERE,
    "swap_space": f"{_NOT_HERE}: requests without memory are computed again",
    "cpu_offload_gb": _NOT_HERE,
    "kv_offloading_size": _NOT_HERE,
    "enable_lora": _NOT_HERE,
    "max_loras": _NOT_HERE,
    "max_lora_rank": _NOT_HERE,
    "speculative_config": _NOT_HERE,
    "enable_expert_parallel": f"{_NOT_HERE}: no family with experts is",
    "data_parallel_size": f"{_NOT_HERE}: start an engine for each",
    "limit_mm_per_prompt": f"{_NOT_HERE}: models are of text alone",
    "mm_processor_kwargs": f"{_NOT_HERE}: models are of text alone",
    "hf_overrides": f"{_NOT_HERE}: change config.json",
    "rope_scaling": f"{_NOT_HERE}: change config.json",
    "revision": f"{_NOT_HERE}: download the revision and give its folder",
    "code_revision": _NOT_HERE,
    "download_dir": "read from HF_HOME by the hub's client",
    "max_logprobs": "not needed here: any number of them may be asked for",
    "override_generation_config": f"{_NOT_HERE}: give SamplingParams",
    "task": f"{_NOT_HERE}: models generate",
    "runner": f"{_NOT_HERE}: models generate",
}
