"""Completes three prompts together and shows what the KV cache took: python examples/quickstart.py"""

from sarathi import LLM, SamplingParams

PROMPTS = ["The capital of France is", "Water boils at", "def is_even(n):\n"]

with LLM("smollm2-135m", attention_backend="sdpa_vattn_megacache") as llm:
    for output in llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=24)):
        print(f"{output.prompt!r} -> {output.outputs[0].text!r}")
    print(f"{llm.memory_stats().peak_mapped_bytes / 2**20:.1f} MiB of KV cache were mapped at the peak")
