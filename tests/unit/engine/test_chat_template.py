"""Conversations through Jinja templates, as models bring them."""

import pytest
from fake_engine import byte_tokenizer

from sarathi.engine.chat_template import ChatTemplateError, jinja_renderer, normalize
from sarathi.engine.tokenizer import Tokenizer

HELLO = [{"role": "user", "content": "hello"}]


def test_a_template_sees_messages_special_tokens_and_the_prompt_for_an_answer() -> None:
    loop = "{% for m in messages %}\n  [{{ m.role }}] {{ m.content }}\n{% endfor %}"
    template = "{{ bos_token }}" + loop + "{{ add_generation_prompt }}"
    assert jinja_renderer(template, {"bos_token": "<s>"})(HELLO) == "<s>  [user] hello\nTrue"


def test_what_templates_on_the_hub_call_is_there() -> None:
    loop = "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}"
    template = loop + "{{ strftime_now('%Y') | length }}"
    assert jinja_renderer(template, {})([*HELLO, *HELLO]) == '{"role": "user", "content": "hello"}4'


def test_a_refusal_by_the_template_is_a_clear_error() -> None:
    render = jinja_renderer("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(ChatTemplateError, match="roles must alternate"):
        render(HELLO)


def test_templates_cannot_reach_out_of_their_sandbox() -> None:
    with pytest.raises(ChatTemplateError, match=r"unsafe|access"):
        jinja_renderer("{{ ''.__class__.__mro__[1].__subclasses__() }}", {})(HELLO)


def test_parts_of_text_become_one_text_and_other_keys_stay() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert normalize([{"role": "user", "content": parts, "name": "x"}]) == [
        {"role": "user", "content": "ab", "name": "x"}
    ]


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


def test_a_model_without_a_template_cannot_chat() -> None:
    bare = Tokenizer(byte_tokenizer()._backend)
    with pytest.raises(ChatTemplateError, match="no chat template"):
        bare.encode_chat(HELLO)
