"""Sampling parameters, stop strings and chats on SmolLM2, beside transformers."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from comparison import Values, compared
from smollm2 import load_reference
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from sarathi import LLM, SamplingParams
from sarathi.engine.tokenizer.tokenizer import Tokenizer

GENERATE = "transformers `generate`"
PROMPT = "1, 2, 3, 4,"
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
    "{{ c.function.arguments['a'] }}{% endfor %}\n{% endfor %}{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
QUESTION = {"role": "user", "content": "What is 1 + 1?"}


@cache
def engine() -> LLM:
    return LLM("smollm2-135m", device="cpu", memory_bytes=2**26, max_num_seqs=2)


@cache
def reference() -> PreTrainedModel:
    return load_reference()


def tokenizer() -> Tokenizer:
    found = engine().tokenizer
    assert found is not None
    return found


def their_tokenizer() -> PreTrainedTokenizerFast:
    """transformers' over our token ids: what it makes of a GGUF file itself does not split numbers into digits."""
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend, chat_template=TEMPLATE)


@torch.inference_mode()
def their_text(**options: Any) -> str:
    ids = torch.tensor([tokenizer().encode(PROMPT)])
    known = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    return tokenizer().decode(reference().generate(ids, **known, **options)[0, ids.shape[1] :].tolist())


def our_text(**options: Any) -> str:
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, **options)
    return engine().generate(PROMPT, params, use_tqdm=False)[0].outputs[0].text


@compared(
    "stop string `5, 6`, kept in the text",
    GENERATE,
    "integration/test_engine.py::test_any_stop_string_cuts_the_same_text",
)
def stop_string(folder: Path) -> Values:
    theirs = their_text(stop_strings=["5, 6"], tokenizer=their_tokenizer())
    return Values(theirs, our_text(stop=["5, 6"], include_stop_str_in_output=True))


@compared(
    "`bad_words` ` 5` and `5`", GENERATE, "unit/model_executor/test_sampler.py::test_bad_words_equal_transformers"
)
def bad_words(folder: Path) -> Values:
    ids = [tokenizer().encode(word) for word in (" 5", "5")]
    return Values(their_text(bad_words_ids=ids), our_text(bad_words=[" 5", "5"]))


@compared(
    "`allowed_token_ids` of ` 5`, ` seven` and `,`", "transformers `generate(prefix_allowed_tokens_fn=)`",
    "unit/model_executor/test_sampler.py::test_only_allowed_tokens_are_chosen",
)  # fmt: skip
def allowed(folder: Path) -> Values:
    ids = sorted({token for word in (" 5", " seven", ",") for token in tokenizer().encode(word)})
    return Values(their_text(prefix_allowed_tokens_fn=lambda batch, tokens: ids), our_text(allowed_token_ids=ids))


@compared(
    "`prompt_logprobs` of `The capital of France is Paris`, their sum", "transformers' logits",
    "integration/test_prompt_logprobs.py::test_prompt_logprobs_are_those_of_transformers",
)  # fmt: skip
@torch.inference_mode()
def prompt_logprobs(folder: Path) -> Values:
    ids = tokenizer().encode("The capital of France is Paris")
    rows = reference()(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    [output] = engine().generate([ids], params, use_tqdm=False)
    assert output.prompt_logprobs is not None
    ours = [entry[token].logprob for token, entry in zip(ids[1:], output.prompt_logprobs[1:], strict=True) if entry]
    return Values(f"{float(rows.gather(1, torch.tensor(ids[1:])[:, None]).sum()):.2f}", f"{sum(ours):.2f}")


@compared(
    "`skip_special_tokens=False` on `<\\|im_start\\|>`, ` a`, `<\\|im_end\\|>`", "transformers `decode`",
    "integration/test_engine.py::test_special_tokens_are_shown_where_that_is_asked_for",
)  # fmt: skip
def special_tokens(folder: Path) -> Values:
    ids = tokenizer().encode("<|im_start|> a<|im_end|>", add_special_tokens=False)
    theirs = their_tokenizer().decode(ids, skip_special_tokens=False)
    biases = [{token: 100.0} for token in ids]
    params = SamplingParams(
        temperature=0.0, max_tokens=3, ignore_eos=True, skip_special_tokens=False,
        logits_processors=[lambda output, logits: _only(logits, biases[len(output)])],
    )  # fmt: skip
    return Values(theirs, engine().generate(PROMPT, params, use_tqdm=False)[0].outputs[0].text)


def _only(logits: torch.Tensor, bias: dict[int, float]) -> torch.Tensor:
    for token, value in bias.items():
        logits[token] += value
    return logits


def chats(conversation: list[dict[str, Any]], **options: Any) -> Values:
    theirs = their_tokenizer().apply_chat_template(
        conversation, tokenize=False, **({"add_generation_prompt": True} | options)
    )
    names = {"add_generation_prompt", "continue_final_message"}
    kwargs = {key: value for key, value in options.items() if key not in names}
    ids = engine().encode_chat(
        conversation, chat_template=TEMPLATE, chat_template_kwargs=kwargs,
        **{key: value for key, value in options.items() if key in names},
    )  # fmt: skip
    return Values(theirs, tokenizer().decode(ids, skip_special_tokens=False))


CHAT = "transformers `apply_chat_template`"


@compared(
    "a chat with a tool call (`content: null`) and its result", CHAT,
    "unit/engine/test_chat_template.py::test_an_assistant_that_calls_a_tool_needs_no_content_and_arguments_are_objects",
)  # fmt: skip
def tool_call(folder: Path) -> Values:
    read = {**CALL, "function": {"name": "add", "arguments": {"a": 1}}}  # transformers leaves JSON text as it is
    theirs = chats(
        [QUESTION, {"role": "assistant", "content": "", "tool_calls": [read]}, {"role": "tool", "content": "2"}]
    )
    ours = chats(
        [QUESTION, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "2"}]
    )
    return Values(theirs.theirs, ours.ours)


OPTIONS = "unit/entrypoints/test_llm.py::test_options_of_chat_reach_the_template"


@compared("`chat_template_kwargs` with `enable_thinking: false`", CHAT, OPTIONS)
def thinking(folder: Path) -> Values:
    return chats([QUESTION], enable_thinking=False)


@compared("`continue_final_message` behind `It is`", CHAT, OPTIONS)
def continued(folder: Path) -> Values:
    begun = [QUESTION, {"role": "assistant", "content": "It is"}]
    return chats(begun, add_generation_prompt=False, continue_final_message=True)
