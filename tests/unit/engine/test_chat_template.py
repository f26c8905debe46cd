"""Conversations through Jinja templates, as models bring them."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_engine import byte_tokenizer
from transformers import PreTrainedTokenizerFast

from sarathi.engine.tokenizer import chat_template
from sarathi.engine.tokenizer.chat_template import ChatTemplateError, jinja_renderer, normalize
from sarathi.engine.tokenizer.load import load_tokenizer
from sarathi.engine.tokenizer.tokenizer import Tokenizer
from sarathi.model_executor.loader.source import ModelSource

HELLO = [{"role": "user", "content": "hello"}]


def test_a_template_sees_messages_special_tokens_and_the_prompt_for_an_answer() -> None:
    loop = "{% for m in messages %}\n  [{{ m.role }}] {{ m.content }}\n{% endfor %}"
    template = "{{ bos_token }}" + loop + "{{ add_generation_prompt }}"
    assert jinja_renderer(template, {"bos_token": "<s>"})(HELLO) == "<s>  [user] hello\nTrue"


def test_what_templates_on_the_hub_call_is_there() -> None:
    loop = "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}"
    template = loop + "{{ strftime_now('%Y') | length }}"
    assert jinja_renderer(template, {})([*HELLO, *HELLO]) == '{"role": "user", "content": "hello"}4'


def test_what_else_templates_written_against_transformers_expect() -> None:
    """Blocks that mark what an assistant wrote, JSON in any layout, and `tools` that are there and none."""
    loop = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    assert jinja_renderer(loop, {})(HELLO) == "hello"
    layout = "ensure_ascii=false, indent=1, separators=(';', '='), sort_keys=true"
    assert jinja_renderer(f"{{{{ {{'b': 'é', 'a': 1}} | tojson({layout}) }}}}", {})(HELLO) == '{\n "a"=1;\n "b"="é"\n}'
    assert jinja_renderer("{{ tools is none }}", {})(HELLO) == "True"


def test_a_template_that_loops_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_TIME_LIMIT_S", 0.2)
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    started_s = time.monotonic()
    with pytest.raises(ChatTemplateError, match=r"TemplateTimeoutError: it ran longer than 0.2 s"):
        jinja_renderer(loops, {})(HELLO)
    assert time.monotonic() - started_s < 30
    assert jinja_renderer("{{ messages | length }}", {})(HELLO) == "1"
    time.sleep(0.3)  # the limit of a rendering that has ended interrupts nothing


FAILING_TEMPLATES = [
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ("{{ messages[5].content }}", "undefined|no element"),
    ("{{ 1 + 'a' }}", "TypeError"),
    ("{% for m in messages %}", "TemplateSyntaxError"),
]


@pytest.mark.parametrize(("template", "message"), FAILING_TEMPLATES)
def test_a_template_that_fails_or_refuses_is_one_clear_error(template: str, message: str) -> None:
    render = jinja_renderer(template, {})  # says nothing yet: whoever never chats needs no template
    with pytest.raises(ChatTemplateError, match=message):
        render(HELLO)


@pytest.mark.parametrize(("template", "message"), FAILING_TEMPLATES)
def test_so_it_is_for_a_folder(template: str, message: str, tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer()._backend, chat_template=template)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(ModelSource("m", "safetensors", tmp_path))
    assert loaded is not None
    with pytest.raises(ChatTemplateError, match=message):
        loaded.encode_chat(HELLO)


def test_templates_cannot_reach_out_of_their_sandbox() -> None:
    with pytest.raises(ChatTemplateError, match=r"unsafe|access"):
        jinja_renderer("{{ ''.__class__.__mro__[1].__subclasses__() }}", {})(HELLO)


def test_parts_of_text_become_one_text_and_other_keys_stay() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert normalize([{"role": "user", "content": parts, "name": "x"}]) == [
        {"role": "user", "content": "a\nb", "name": "x"}  # as in vLLM
    ]


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1, "é"]}'}}


@pytest.mark.parametrize("content", [{"content": None}, {}, {"content": ""}, {"content": []}])
def test_an_assistant_that_calls_a_tool_needs_no_content_and_arguments_are_objects(content: dict[str, object]) -> None:
    history = [*HELLO, {"role": "assistant", "tool_calls": [CALL], **content}, {"role": "tool", "content": "10"}]
    _, assistant, tool = normalize(history)
    assert assistant["content"] == "" and tool == {"role": "tool", "content": "10"}
    function = {"name": "f", "arguments": {"x": [1, "é"]}}
    assert assistant["tool_calls"] == [{"id": "c1", "type": "function", "function": function}]
    assert history[1]["tool_calls"] == [CALL], "what the caller gave has changed"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("f", "must be"),
        ({"function": {"arguments": {}}}, "must be"),
        ({"function": {"name": "f", "arguments": "{"}}, "JSON"),
    ],
)
def test_what_is_no_tool_call_is_refused(call: object, message: str) -> None:
    with pytest.raises(ChatTemplateError, match=message):
        normalize([{"role": "assistant", "content": None, "tool_calls": [call]}])


@pytest.mark.parametrize("message", [{"role": "user", "content": None}, {"role": "assistant", "tool_calls": []}])
def test_without_tool_calls_there_must_be_content(message: dict[str, object]) -> None:
    with pytest.raises(ChatTemplateError):
        normalize([message])


@pytest.mark.parametrize(
    "conversation",
    ["text", [], {"role": "user", "content": "x"}, ["x"], [{"role": "user"}], [{"role": 3, "content": "x"}]],
)
def test_what_is_no_conversation_is_refused(conversation: object) -> None:
    with pytest.raises(ChatTemplateError):
        normalize(conversation)  # type: ignore[arg-type]


def test_images_are_refused_with_the_place() -> None:
    with pytest.raises(ChatTemplateError, match="message 1 must be text"):
        normalize([*HELLO, {"role": "user", "content": [{"type": "image_url"}]}])


def test_text_that_no_tokenizer_takes_is_refused_with_the_place() -> None:
    with pytest.raises(ChatTemplateError, match=r"the conversation holds '\\ud83d' at 8: a lone surrogate"):
        byte_tokenizer().encode_chat([{"role": "user", "content": "ab\ud83d"}])


def test_a_model_without_a_template_cannot_chat() -> None:
    bare = Tokenizer(byte_tokenizer()._backend)
    with pytest.raises(ChatTemplateError, match="no chat template"):
        bare.encode_chat(HELLO)


def test_threads_that_chat_first_at_the_same_time() -> None:
    """In a new process, where transformers has not been imported yet."""
    program = (
        "import sys, threading\n"
        "from sarathi.engine.tokenizer.chat_template import check_template_names, jinja_renderer\n"
        "threads = [threading.Thread(target=check_template_names, args=({'a': 1},)) for _ in range(2)]\n"
        "threads += [threading.Thread(target=jinja_renderer('x', {}), args=([{'role': 'user', 'content': ''}],))]\n"
        "failures = []\n"
        "threading.excepthook = failures.append\n"
        "[each.start() for each in threads]; [each.join() for each in threads]\n"
        "sys.exit(str(failures[0].exc_value) if failures else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
