"""LLM over a fake model: shapes of prompts and parameters, order, streaming, what errors leave behind."""

import gc
import itertools
import json
import sys
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from fake_engine import END, FakeExecutor, make_engine, says

import sarathi
from sarathi.engine.outputs import RequestOutput
from sarathi.entrypoints.llm import LLM
from sarathi.sampling_params import SamplingParams

LONG = SamplingParams(max_tokens=50)


def make_llm(text: str = "fine", **settings: bool) -> LLM:
    return LLM.from_engine(make_engine(says(text), **settings))


def mapped_bytes(llm: LLM) -> int:
    return llm.memory_stats().mapped_bytes


def parrot(tokens: Sequence[int], params: SamplingParams) -> int:
    """Repeats the last token of the prompt, ten times as often as it says."""
    return tokens[-1]


def answers(prompts: object) -> list[str]:
    llm = LLM.from_engine(make_engine(parrot))
    outputs = llm.generate(prompts, SamplingParams(max_tokens=2), use_tqdm=False)  # type: ignore[arg-type]
    return [output.outputs[0].text for output in outputs]


def test_every_shape_of_prompts() -> None:
    assert answers("a") == ["aa"]
    assert answers(["a", "b"]) == ["aa", "bb"]
    assert answers([97, 98]) == ["bb"]
    assert answers([[97], [97, 98]]) == ["aa", "bb"]
    assert answers(["a", [98], {"prompt": "c"}, {"prompt_token_ids": [100]}]) == ["aa", "bb", "cc", "dd"]
    assert answers({"prompt": "c"}) == ["cc"]
    assert answers([]) == []


def test_arrays_are_prompts_or_batches_by_their_dimensions() -> None:
    for array in (np.array, torch.tensor):
        assert answers(array([97, 98])) == ["bb"]
        assert answers(array([97])) == ["aa"]
        assert answers(list(array([97, 98]))) == ["bb"]
        assert answers(array([[97], [98]])) == ["aa", "bb"]
        assert answers(array([[97, 98], [98, 97]])) == ["bb", "aa"]
        assert answers([array([97]), array([98])]) == ["aa", "bb"]
        assert answers([array([97, 98]), array([97])]) == ["bb", "aa"]
        assert answers(["a", array([98]), {"prompt_token_ids": array([99])}]) == ["aa", "bb", "cc"]


def test_outputs_keep_the_order_of_prompts_and_their_own_parameters() -> None:
    params = [SamplingParams(max_tokens=count) for count in (9, 1, 5)]
    outputs = LLM.from_engine(make_engine(parrot)).generate(["a", "b", "c"], params, use_tqdm=False)
    assert [output.outputs[0].text for output in outputs] == ["a" * 9, "b", "c" * 5]
    assert [output.prompt for output in outputs] == ["a", "b", "c"]


def test_parameters_must_match_prompts() -> None:
    with pytest.raises(ValueError, match="sampling_params has 2 entries for 3 prompts"):
        make_llm().generate(["a", "b", "c"], [LONG, LONG])


def test_the_default_is_sixteen_tokens() -> None:
    llm = LLM.from_engine(make_engine(parrot))
    assert llm.generate("a", use_tqdm=False)[0].outputs[0].num_tokens == 16


def test_one_bad_prompt_is_named_and_leaves_nothing_behind() -> None:
    llm = make_llm()
    with pytest.raises(ValueError, match=r"prompt 1 of 3, counted from 0: the prompt is empty"):
        llm.generate(["a\0", "", "b\0"], LONG)
    assert llm.engine.num_unfinished == 0 and not llm.engine.has_work
    assert llm.generate("a\0", LONG, use_tqdm=False)[0].outputs[0].text == "fine"


BAD_PROMPTS: list[tuple[object, str]] = [
    ("\udc80", r"prompt 1 of 2, counted from 0: the prompt holds '\\udc80' at 0: a lone surrogate"),
    (b"text", "prompt 1 of 2, counted from 0: the prompt must be text or a list of token ids, got b'text'"),
    ({"prompt": 5}, "prompt 1 of 2, counted from 0: prompt is 5: it must be text"),
    ({"prompt_token_ids": "a"}, "prompt_token_ids is 'a': it must be a list of token ids"),
    ({"text": "a"}, "needs 'prompt' or 'prompt_token_ids'"),
    ([1, 10**5000], "holds token id a int too long to be written: it must be from 0 to 256"),
    ([1, "2"], "must be text or a list of token ids"),
    (None, "must be text or a list of token ids, got None"),
    ({5, 7}, "must be text or a list of token ids, got {5, 7}"),
    (np.array([[5], [7]]), "must be text or a list of token ids, got array"),
    ([torch.tensor([5]), torch.tensor([7])], r"must be text or a list of token ids, got \[tensor"),
    ({"prompt_token_ids": {5, 7}}, "prompt_token_ids is {5, 7}: it must be a list of token ids"),
    ({"prompt_token_ids": {5: 7}}, "prompt_token_ids is {5: 7}: it must be a list of token ids"),
    ({"prompt_token_ids": {5: 7}.values()}, r"prompt_token_ids is dict_values\(\[7\]\): it must be a list"),
]


@pytest.mark.parametrize(("prompt", "message"), BAD_PROMPTS)
def test_whatever_is_given_for_a_prompt_takes_back_the_ones_before(prompt: object, message: str) -> None:
    llm = make_llm()
    with pytest.raises(ValueError, match=message):
        llm.generate(["a\0", prompt], LONG)  # type: ignore[list-item]
    assert llm.engine.num_unfinished == 0 and not llm.engine.has_work


@pytest.mark.parametrize(
    "prompts", [5, None, b"text", {"a", "b"}, {"a": "b"}.values(), iter(["a"]), np.array(5), torch.tensor(5)]
)
def test_prompts_that_are_none(prompts: object) -> None:
    with pytest.raises(ValueError, match=r"prompts is .*: it must be text, a list of token ids, or "):
        make_llm().generate(prompts, LONG)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"prompts is .*: it must be a list of prompts"):
        list(make_llm().stream_all(prompts, LONG))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([LONG, None], r"sampling_params\[1\] is None: each entry must be a SamplingParams"),
        ([{"temperature": 0}, LONG], r"sampling_params\[0\] is {'temperature': 0}"),
        ({"temperature": 0}, "sampling_params is {'temperature': 0}: it must be a SamplingParams"),
        (5, "sampling_params is 5: it must be a SamplingParams"),
    ],
)
def test_parameters_must_be_parameters(params: object, message: str) -> None:
    llm = make_llm()
    with pytest.raises(ValueError, match=message):
        llm.generate(["a\0", "b\0"], params)  # type: ignore[arg-type]
    assert llm.engine.num_unfinished == 0 and not llm.engine.has_work


def test_ctrl_c_while_prompts_are_added_takes_them_back(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make_llm()
    add = llm.engine.add_request

    def interrupted(request_id: str, prompt: str, params: SamplingParams) -> None:
        add(request_id, prompt, params)
        if prompt == "b\0":
            raise KeyboardInterrupt

    monkeypatch.setattr(llm.engine, "add_request", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a\0", "b\0", "c\0"], LONG)
    assert llm.engine.num_unfinished == 0 and not llm.engine.has_work
    monkeypatch.undo()
    assert llm.generate("a\0", LONG, use_tqdm=False)[0].outputs[0].text == "fine"


def test_an_error_in_the_model_reaches_the_caller_once() -> None:
    llm = make_llm()
    executor = llm.engine.core.executor
    assert isinstance(executor, FakeExecutor)
    executor.fail_next = RuntimeError("device lost")
    with pytest.raises(RuntimeError, match="device lost"):
        llm.generate(["a\0", "b\0"], LONG, use_tqdm=False)
    assert llm.generate("a\0", LONG, use_tqdm=False)[0].outputs[0].text == "fine"


def test_memory_is_free_when_answers_are_there() -> None:
    llm = make_llm()
    llm.generate(["a\0", "b\0"], LONG, use_tqdm=False)
    assert mapped_bytes(llm) == 0


def test_streaming_gives_an_output_a_token() -> None:
    outputs = list(make_llm("abc").stream("x\0", LONG))
    assert [output.outputs[0].delta for output in outputs] == ["a", "b", "c", ""]
    assert [output.finished for output in outputs] == [False, False, False, True]


def test_leaving_a_stream_aborts_its_request() -> None:
    llm = make_llm("abc" * 20)
    for output in llm.stream("x\0", LONG):
        if output.outputs[0].text == "abca":
            break
    gc.collect()
    assert llm.engine.num_unfinished == 0 and mapped_bytes(llm) == 0


@pytest.mark.parametrize("where", ["_admit_waiting", "update", "add"])
def test_a_stream_collected_in_the_middle_of_a_step_harms_no_other(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection may come at any allocation; here it comes as a method of the scheduler returns."""
    llm = make_llm("abcdef")
    streams = {name: llm.stream(f"{name}\0", LONG) for name in "xyz"}
    first = next(streams["x"]).outputs[0].text + next(streams["y"]).outputs[0].text
    abandoned: list[Iterator[RequestOutput]] = [streams.pop("x")]
    original = getattr(llm.engine.core.scheduler, where)

    def collecting(*args: object) -> object:
        result = original(*args)
        abandoned.clear()
        return result

    monkeypatch.setattr(llm.engine.core.scheduler, where, collecting)
    texts = ["".join(output.outputs[0].delta for output in stream) for stream in streams.values()]
    assert not abandoned and first == "aa"
    assert texts == ["bcdef", "abcdef"]
    assert llm.engine.num_unfinished == 0 and not llm.engine.has_work and mapped_bytes(llm) == 0
    llm.engine.core.scheduler.check_integrity()


def test_streams_read_in_turn_lose_nothing() -> None:
    llm = make_llm("abcdef")
    streams = [llm.stream("x\0", LONG), llm.stream("y\0", SamplingParams(max_tokens=4)), llm.stream("z\0", LONG)]
    rounds = list(itertools.zip_longest(*streams))
    deltas = ["".join(output.outputs[0].delta for output in column if output) for column in zip(*rounds, strict=True)]
    assert deltas == ["abcdef", "abcd", "abcdef"]


def test_a_failed_step_ends_other_streams_with_an_error_too() -> None:
    llm = make_llm("abcdef")
    first, second = llm.stream("x\0", LONG), llm.stream("y\0", LONG)
    assert next(first).outputs[0].text == "a" and next(second).outputs[0].text == "a"
    assert isinstance(llm.engine.core.executor, FakeExecutor)
    llm.engine.core.executor.fail_next = RuntimeError("device lost")
    with pytest.raises(RuntimeError, match="device lost"):
        list(first)
    with pytest.raises(RuntimeError, match="another stream"):
        list(second)


def test_a_stream_whose_requests_are_gone_fails_at_once_and_leaves_the_others_where_they_are() -> None:
    llm = make_llm("abcdef")
    failing, dead = llm.stream("x\0", LONG), llm.stream("y\0", LONG)
    next(failing), next(dead)
    assert isinstance(llm.engine.core.executor, FakeExecutor)
    llm.engine.core.executor.fail_next = RuntimeError("device lost")
    with pytest.raises(RuntimeError, match="device lost"):
        list(failing)
    later = llm.stream("z\0", LONG)
    assert next(later).outputs[0].text == "a"
    with pytest.raises(RuntimeError, match="another stream"):
        list(dead)
    [tokens] = llm.engine.core.executor.tokens.values()
    assert bytes(tokens) == b"z\0a"
    assert "".join(output.outputs[0].delta for output in later) == "bcdef"


def test_chat_takes_one_conversation_or_many_and_parts_of_text() -> None:
    llm = LLM.from_engine(make_engine(parrot))
    message = {"role": "user", "content": [{"type": "text", "text": "hello"}]}
    one = llm.chat([message], SamplingParams(max_tokens=3), use_tqdm=False)
    many = llm.chat([[message], [message, message]], SamplingParams(max_tokens=3), use_tqdm=False)
    assert bytes(one[0].prompt_token_ids) == b"user: hello\nassistant:"
    assert [output.outputs[0].text for output in (*one, *many)] == [":::"] * 3
    assert bytes(many[1].prompt_token_ids).count(b"hello") == 2


@pytest.mark.parametrize("conversation", ["hello", {"content": "x", "role": "user"}, [], 5, {5}, iter([[]])])
def test_what_is_no_conversation_is_shown_whole(conversation: object) -> None:
    with pytest.raises(ValueError, match="a conversation is a non-empty list of messages, got ") as caught:
        make_llm().chat(conversation)  # type: ignore[arg-type]
    assert str(caught.value).endswith(repr(conversation))
    with pytest.raises(ValueError, match="a conversation is a non-empty list of messages, got "):
        make_llm().chat([[{"role": "user", "content": "x"}], conversation])  # type: ignore[list-item]


def test_options_of_chat_reach_the_template() -> None:
    llm = LLM.from_engine(make_engine(parrot))
    hello = [{"role": "user", "content": "hello"}]
    begun = [*hello, {"role": "assistant", "content": "It is"}]
    tool = {"type": "function", "function": {"name": "f"}}

    def read(conversation: list[dict[str, str]], **options: object) -> str:
        return bytes(llm.encode_chat(conversation, **options)).decode()  # type: ignore[arg-type]

    assert read(hello, add_generation_prompt=False) == "user: hello\nassistant:"  # this template ignores it
    template = (
        "{{ thinking }}{% for t in tools or [] %}<{{ t.function.name }}>{% endfor %}"
        "{% for m in messages %}{{ m.role[0] }}={{ m.content }};{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    assert read(hello, chat_template=template) == "u=hello;>"
    assert read(hello, chat_template=template, add_generation_prompt=False) == "u=hello;"
    kwargs = {"thinking": "no "}
    assert read(hello, chat_template=template, tools=[tool], chat_template_kwargs=kwargs) == "no <f>u=hello;>"
    open_end = {"chat_template": template, "add_generation_prompt": False, "continue_final_message": True}
    assert read(begun, **open_end) == "u=hello;a=It is"
    [output] = llm.chat(begun, SamplingParams(max_tokens=2), use_tqdm=False, **open_end)
    assert bytes(output.prompt_token_ids) == b"u=hello;a=It is" and output.outputs[0].text == "ss"
    with pytest.raises(ValueError, match="continue_final_message is True: it needs add_generation_prompt=False"):
        llm.chat(begun, continue_final_message=True)
    with pytest.raises(ValueError, match="chat_template_kwargs holds 'tokenize'"):
        llm.chat(hello, chat_template_kwargs={"tokenize": True})


def test_chat_without_a_tokenizer_says_what_works() -> None:
    with pytest.raises(ValueError, match="use generate"):
        make_llm(has_tokenizer=False).chat([{"role": "user", "content": "x"}])


def test_with_close_and_deletion_shut_the_executor_down() -> None:
    with make_llm() as llm:
        executor = llm.engine.core.executor
        assert isinstance(executor, FakeExecutor) and not executor.is_shut_down
    assert executor.is_shut_down
    llm.close()
    other = make_llm()
    executor = other.engine.core.executor
    del other
    gc.collect()
    assert isinstance(executor, FakeExecutor) and executor.is_shut_down


def test_closing_ends_open_streams_and_dropping_one_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    unraised: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", unraised.append)
    llm = make_llm("abcdef")
    read, dropped = llm.stream("x\0", LONG), llm.stream("y\0", LONG)
    next(read), next(dropped)
    llm.close()
    with pytest.raises(RuntimeError, match="the LLM was closed"):
        list(read)
    del dropped
    assert not unraised
    with pytest.raises(RuntimeError, match="takes no more requests"):
        llm.generate("z\0", LONG, use_tqdm=False)


def test_the_end_token_is_in_the_ids() -> None:
    assert make_llm("a").generate("\0", LONG, use_tqdm=False)[0].outputs[0].token_ids == [97, END]


def test_an_output_is_json_and_a_chat_keeps_its_prompt() -> None:
    llm = LLM.from_engine(make_engine(lambda tokens, params: ord("o")))
    [output] = llm.chat([{"role": "user", "content": "hi"}], SamplingParams(max_tokens=2, logprobs=1))
    assert output.prompt == "user: hi\nassistant:"
    read = json.loads(json.dumps(output.to_dict(), allow_nan=False))
    assert read["prompt"] == output.prompt and read["prompt_token_ids"] == list(output.prompt_token_ids)
    [answer] = read["outputs"]
    assert answer["text"] == output.outputs[0].text and answer["token_ids"] == output.outputs[0].token_ids
    assert answer["logprobs"][0][0]["token_id"] == answer["token_ids"][0]
    assert isinstance(output, sarathi.RequestOutput)


def test_what_auto_became_is_shown() -> None:
    assert repr(LLM.from_engine(make_engine(says("ok")))).startswith(
        "LLM('of an engine', attention_backend='no_op_vattn', dtype='float32', device='cpu', max_model_len="
    )
