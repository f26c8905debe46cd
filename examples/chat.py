"""Two turns of a conversation, printed as the words come: python examples/chat.py"""

from sarathi import LLM, SamplingParams

llm = LLM("smollm2-135m")
params = SamplingParams(temperature=0.2, top_p=0.9, seed=1, max_tokens=64)
messages = [{"role": "system", "content": "You are a friendly guide. Answer in one or two sentences."}]

for question in ("What should I see in Paris?", "And where do I eat?"):
    messages.append({"role": "user", "content": question})
    print(f"> {question}")
    for output in llm.stream(llm.encode_chat(messages), params):
        print(output.outputs[0].delta, end="", flush=True)
    messages.append({"role": "assistant", "content": output.outputs[0].text})
    print("\n")
