"""Templates render as they are written to; hostile ones neither run code, nor hang, nor fill the memory."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from dvi_jax.data.conversations import Message
from dvi_jax.data.template import ChatTemplate, TemplateLimits, TemplateRefusedError
from dvi_jax.errors import UserError

CHAT = (
    Message("system", "Be <brief>."),
    Message("user", "Hi 'there' \u00e9\n"),
    Message("assistant", "Yes & no"),
)
CHATML = """
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message.content | trim + '<|im_end|>' + '\\n' -}}
    {% if loop.last and add_generation_prompt %}
<|im_start|>assistant
    {% endif %}
{%- endfor %}
"""
LLAMA = """{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}
{% set rest = messages[1:] %}
{% else %}{% set system = none %}{% set rest = messages %}{% endif %}
{% for message in rest %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate') }}{% endif %}
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + (system or '') + message['content'].strip() + ' [/INST]' }}
{% else %}{{ ' ' + message['content'] | tojson + ' ' + eos_token }}{% endif %}{% endfor %}"""
TOKENS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}


def chatml(messages: tuple[Message, ...], generation_prompt: bool) -> str:
    """What CHATML means, in Python."""
    text = "".join(f"<|im_start|>{m.role}\n{m.content.strip()}<|im_end|>\n" for m in messages)
    return text + ("<|im_start|>assistant\n" if generation_prompt else "")


def llama(messages: tuple[Message, ...], _: bool) -> str:
    """What LLAMA means, in Python; its blocks leave no line breaks behind, its expressions do."""
    system = messages[0].content if messages[0].role == "system" else ""
    text = ""
    for message in messages[1:] if system else messages:
        if message.role == "user":
            text += f"<|im_start|>[INST] {system}{message.content.strip()} [/INST]\n"
        else:
            text += f' "{message.content}" <|im_end|>'
    return text


@pytest.mark.parametrize(("source", "meaning"), [(CHATML, chatml), (LLAMA, llama)])
def test_blanks_and_line_breaks_as_templates_expect(source, meaning):
    template = ChatTemplate(source, TOKENS)
    for messages in (CHAT, CHAT[:2], CHAT[1:], CHAT[1:2]):
        for generation_prompt in (False, True):
            text = template.render(messages, add_generation_prompt=generation_prompt)
            assert text == meaning(messages, generation_prompt)


def test_tojson_is_plain_json():
    assert (
        ChatTemplate("{{ messages[0].content | tojson }}", {}).render([Message("user", '<\u00e9> & "')])
        == '"<\u00e9> & \\""'
    )


def test_loop_controls():
    template = ChatTemplate(
        "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role }},{% endfor %}", {}
    )
    assert template.render(CHAT) == "system,user,"


def test_a_refused_conversation_leaves_the_template_usable():
    template = ChatTemplate(LLAMA, TOKENS)
    with pytest.raises(TemplateRefusedError, match="the chat template failed: TemplateError: roles must alternate"):
        template.render([CHAT[1], CHAT[1]])
    assert "[INST]" in template.render(CHAT)


RUNAWAY = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "big range": "{% for a in range(10**9) %}x{% endfor %}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "repeated text": "{{ 'x' * 10**12 }}",
    "repeated list": "{{ ([0] * 10**12) | length }}",
    "wide format": "{{ '%1000000000000d' % 1 }}",
    "wide format method": "{{ '{:>1000000000000}'.format(1) }}",
    "centred": "{{ 'x' | center(10**12) }}",
    "filler text": "{{ lipsum(n=10**7) }}",
    "doubling": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "long output": "{% for a in range(90000) %}{{ 'x' * 100 }}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "deep source": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "nested blocks": "{% for a in [] %}" * 30 + "{% endfor %}" * 30,
}
FORBIDDEN = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class by filter": "{{ ('' | attr('__class__')).x }}",
    "class by item": "{{ ''['__class__'].x }}",
    "globals": "{{ raise_exception.__globals__['sys'].exit() }}",
    "init": "{{ cycler.__init__.__globals__.os.getcwd() }}",
    "format": "{{ '{0.__class__.__mro__}'.format(raise_exception).x }}",
    "format by filter": "{{ (('{0.__class__.__init__.__globals__}' | attr('format'))(cycler)).x }}",
    "changing": "{{ messages.append(1) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os.getcwd() }}",
    "syntax": "{% for %}",
    "type": "{{ 1 + 'a' }}",
    "division": "{{ 1 // 0 }}",
    "unknown": "{{ nothing.at.all }}",
}


@pytest.mark.parametrize("name", RUNAWAY)
def test_runaway_templates_end(name):
    began = time.monotonic()
    with pytest.raises(UserError, match="the chat template failed"):
        ChatTemplate(RUNAWAY[name], {}, TemplateLimits(cpu_seconds=0.2, memory_bytes=256 << 20)).render(CHAT)
    assert time.monotonic() - began < 20  # seconds on a busy machine; unbounded otherwise


@pytest.mark.parametrize("name", FORBIDDEN)
def test_forbidden_templates_are_refused(name):
    with pytest.raises(UserError, match=r"the chat template failed: [A-Z][A-Za-z]+(Error|NotFound): "):
        ChatTemplate(FORBIDDEN[name], {}).render(CHAT)


def test_only_some_messages_run_away():
    """The simplest conversation passes at the start; a later one hits the limit, and the next one renders again."""
    source = (
        "{% if 'now' in messages[0].content %}{% set n = 10 %}{{ n ** (n ** n) }}{% endif %}{{ messages[0].content }}"
    )
    template = ChatTemplate(source, {}, TemplateLimits(cpu_seconds=0.2))
    with pytest.raises(TemplateRefusedError, match=r"ran over its limits of 0\.2 s and 512 MiB"):
        template.render([Message("user", "now")])
    assert template.render([Message("user", "later")]) == "later"


def test_messages_longer_than_any_text_are_not_even_sent():
    template = ChatTemplate("{{ messages[0].content }}", {}, TemplateLimits(max_chars=100))
    with pytest.raises(TemplateRefusedError, match="the messages are longer than 100 characters"):
        template.render([Message("user", "x" * 60), Message("assistant", "y" * 60)])
    assert template.render([Message("user", "x" * 60)]) == "x" * 60


def test_long_source_is_refused():
    with pytest.raises(UserError, match="longer than 200000 characters"):
        ChatTemplate("x" * 200_001, {}).render(CHAT)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files through /proc")
def test_no_process_or_pipe_is_left():
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = open_files()
    template = ChatTemplate("{{ messages[0].content }}", {})
    assert open_files() == before  # nothing is started that may never be used
    template.render(CHAT)
    worker = template._worker
    assert open_files() > before
    del template
    assert worker.poll() is not None
    assert open_files() == before


def rendered(source: str, *messages: Message) -> str:
    return ChatTemplate(source, TOKENS).render(messages or (Message("user", "Hi"),))


def test_the_generation_tag_passes_through():
    source = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% set x = 1 %}{% endgeneration %}{{ x }}|{% endfor %}"
    )
    assert rendered(source, Message("user", "a"), Message("assistant", "b")) == "a|b|"  # x is not seen outside


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", '{"role": "user", "content": "\u00e9"}'),
        ("(ensure_ascii=True)", '{"role": "user", "content": "\\u00e9"}'),
        ("(indent=1, separators=(',', ':'))", '{\n "role":"user",\n "content":"\u00e9"\n}'),
        ("(False, None, (',', ':'), True)", '{"content":"\u00e9","role":"user"}'),
        ("(sort_keys=True)", '{"content": "\u00e9", "role": "user"}'),
    ],
)
def test_tojson_takes_what_json_dumps_takes(arguments, expected):
    assert rendered(f"{{{{ messages[0] | tojson{arguments} }}}}", Message("user", "\u00e9")) == expected


def test_the_date_is_the_same_every_day():
    assert rendered("{{ strftime_now('%Y-%m-%d %H:%M') }}") == "2024-07-26 00:00"
    assert rendered("{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}") == "26 Jul 2024"


def test_tools_and_documents_are_none():
    source = "{% for x in (tools, documents) %}{{ x is defined }},{{ x is none }};{% endfor %}{{ absent is defined }}"
    assert rendered(source) == "True,True;True,True;False"


def test_a_template_that_wants_a_system_message_takes_one():
    source = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages | length }}"
    template = ChatTemplate(source, {})
    assert template.fault() == "the chat template failed: TemplateError: no system"
    assert template.render([Message("system", "s"), Message("user", "u")]) == "2"
    assert ChatTemplate(CHATML, TOKENS).fault() is None


def test_one_that_does_not_compile_is_no_matter_of_the_messages():
    template = ChatTemplate("{% for %}", {})
    for _ in range(2):
        with pytest.raises(UserError, match="the chat template failed: TemplateSyntaxError") as caught:
            template.render([Message("user", "Hi")])
        assert not isinstance(caught.value, TemplateRefusedError)


def test_without_its_process_there_is_an_error_and_not_before_it_is_used(monkeypatch):
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    template = ChatTemplate("{{ messages[0].content }}", {})
    with pytest.raises(UserError, match="its process does not start"):
        template.render([Message("user", "Hi")])
