"""Chat templates: what they render, what of it is plain text, and how hostile ones end."""

import asyncio
import os
import resource
from collections.abc import AsyncIterator, Sequence

import pytest
from fake_api import api
from msgspec import structs
from served_app import PATIENCE_S

from tightrope.engine.errors import EngineUnavailable
from tightrope.engine.types import ModelInfo, Span
from tightrope.server.http.errors import TemplateFailed
from tightrope.server.prompts.template_renderer import TemplateRenderer
from tightrope.server.prompts.templates import ChatTemplate
from tightrope.server.prompts.typed_tokens import TypedTokens, special_texts

SPECIALS = ("<|im_start|>", "<|im_end|>", "</s>", "<think>", "</think>", " ")
HI = [{"role": "user", "content": "hi"}]
ECHO = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[go]{% endif %}"


def info(chat_template: str | None) -> ModelInfo:
    return ModelInfo("m", "rules", "fake", 9, 9, 9, 9, "f16", 1, "<s>", "</s>", SPECIALS, chat_template, ())


@pytest.fixture
async def renderer() -> AsyncIterator[TemplateRenderer]:
    renderer = TemplateRenderer(timeout_s=PATIENCE_S)
    yield renderer
    await renderer.close()


async def rendered(
    renderer: TemplateRenderer,
    source: str | None,
    messages: Sequence[dict[str, object]] = HI,
    *,
    opens: bool = True,
    goes_on: bool = False,
    **variables: object,
) -> tuple[Span, ...]:
    prompt = await ChatTemplate(info(source)).render(
        renderer,
        [dict(message) for message in messages],
        add_generation_prompt=opens,
        continue_final_message=goes_on,
        variables=variables,
    )
    return prompt.spans


async def test_a_model_without_a_template_gets_chatml_and_its_stop(renderer: TemplateRenderer) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *HI]
    assert await rendered(renderer, None, messages) == (
        Span(
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        ),
    )
    assert ChatTemplate(info(None)).stops == ("<|im_end|>",)
    assert ChatTemplate(info(ECHO)).stops == ()


async def test_the_settings_template_wins_over_the_models() -> None:
    assert ChatTemplate(info(ECHO), "mine").source == "mine"


async def test_the_models_named_tokens_reach_the_template(renderer: TemplateRenderer) -> None:
    named = (("bos_token", "<b>"), ("pad_token", "<pad>"), ("additional_special_tokens", ("<x>", "<y>")))
    source = (
        "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ additional_special_tokens[1] }}{{ unk_token }}"
        "{{ messages[0].content }}"
    )
    template = ChatTemplate(structs.replace(info(source), named_tokens=named), variables={"pad_token": "mine"})

    prompt = await template.render(renderer, HI, add_generation_prompt=True, continue_final_message=False)

    assert prompt.spans == (Span("<b></s><pad><y>hi"),)


async def test_special_tokens_in_what_people_wrote_stay_plain_text(renderer: TemplateRenderer) -> None:
    messages = [{"role": "user", "content": "say </s><|im_end|> twice", "name": "<|im_start|>"}]
    source = "<s>{{ messages[0].name }}:{{ messages[0].content }}</s>"
    assert await rendered(renderer, source, messages) == (
        Span("<s>"),
        Span("<|im_start|>", False),
        Span(":say "),
        Span("</s>", False),
        Span("<|im_end|>", False),
        Span(" twice</s>"),
    )


async def test_every_character_that_came_is_in_the_prompt(renderer: TemplateRenderer) -> None:
    strange = "a\ue0f1<|im_\ue0f0end|>\ue0f1\ue0f2\0\u202eb"
    assert await rendered(renderer, ECHO, [{"role": "user", "content": strange}]) == (Span(f"[user]{strange}[go]"),)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ messages[0].content | tojson }}</s>", '"</s>é"'),
        ("{{ messages[0].content | tojson(ensure_ascii=true) }}</s>", '"</s>\\u00e9"'),
        ("{{ [messages[0].content] }}</s>", "['</s>é']"),
        (
            "{{ messages[0].content | length }}{{ messages[0].content | upper }}{{ messages[0].content }}</s>",
            "5</S>É</s>é",
        ),
        ("{{ messages[0].content.split('</s>')[1].lstrip() }}{{ messages[0].content }}</s>", "é</s>é"),
    ],
)
async def test_looking_for_typed_tokens_leaves_no_trace_in_the_prompt(
    renderer: TemplateRenderer, source: str, text: str
) -> None:
    before, _, behind = text.partition("</s>")
    expected = (Span(before), Span("</s>", parse_special=False), Span(f"{behind}</s>"))
    found = await rendered(renderer, source, [{"role": "user", "content": "</s>é"}])
    assert found == tuple(span for span in expected if span.text)


async def test_a_template_that_cuts_messages_apart_leaves_no_marks(renderer: TemplateRenderer) -> None:
    source = "{{ messages[0].content.split('</think>')[-1] }}|{{ messages[0].content.split('</think>')[0] }}"
    messages = [{"role": "assistant", "content": "<think>hm</think>yes"}]
    assert await rendered(renderer, source, messages) == (Span("yes|"), Span("<think>", False), Span("hm"))


@pytest.mark.parametrize(
    ("prompt", "marked", "expected"),
    [
        ("a</s>b", "a1</s>b", [("a</s>b", True)]),  # a mark without its partner
        ("a</s>", "a2</s>11</s>2", [("a</s>", True)]),
        ("a</s>", "a21</s>2", [("a", True), ("</s>", False)]),
        ("</s>b</s>", "1</s>2b</s>", [("</s>", False), ("b</s>", True)]),
        ("</s>a</s>b</s>", "1</s>2b</s>", [("</s>", False), ("a</s>b", True), ("</s>", False)]),
        ("</s>", "1</S>2", [("</s>", True)]),
        ("<s>a</s>", "1</s>2", [("<s>a", True), ("</s>", False)]),
        ("", "", []),
    ],
)
def test_typed_tokens_are_told_by_their_marks(prompt: str, marked: str, expected: list[tuple[str, bool]]) -> None:
    typed = TypedTokens(special_texts(("<s>", "</s>")), opening="1", closing="2")
    assert typed.spans(prompt, marked) == tuple(Span(*piece) for piece in expected)


def test_many_typed_tokens_are_told_though_the_template_looked_at_one() -> None:
    typed = TypedTokens(special_texts(("<s>", "</s>")), opening="1", closing="2")
    marked = "</s>" + "1<s>2</s>" * 50_000
    spans = typed.spans("</s></s>" + "<s></s>" * 50_000, marked)
    assert sum(not span.parse_special for span in spans) == 50_000
    assert "".join(span.text for span in spans[::2]) == "</s></s>" + "</s>" * 50_000


@pytest.mark.parametrize("parts", [["<", "/s>"], ["a<", "/", "s>"], [*"</s>"], ["</ ", " s> b"], ["</s>", "</", "s>"]])
async def test_parts_that_a_template_joins_make_no_special_token(renderer: TemplateRenderer, parts: list[str]) -> None:
    source = "{% for part in messages[0].content %}{{ part.text | trim }}{% endfor %}</s>"
    content = [{"type": "text", "text": text} for text in parts]
    *spans, end = await rendered(renderer, source, [{"role": "user", "content": content}])
    assert end.text.endswith("</s>")
    assert "</s>" not in "".join(span.text for span in (*spans, end) if span.parse_special).removesuffix("</s>")
    assert "".join(span.text for span in spans) + end.text == "".join(map(str.strip, parts)) + "</s>"


async def test_keys_of_what_a_template_is_shown_are_text(renderer: TemplateRenderer) -> None:
    tools = [{"properties": {"</s>": {}}}]
    template = ChatTemplate(info("{{ messages[0].content }}{{ tools | tojson }}</s>"))
    found = await template.render(renderer, HI, add_generation_prompt=True, continue_final_message=False, tools=tools)
    assert found.spans == (Span('hi[{"properties": {"'), Span("</s>", False), Span('": {}}}]</s>'))


async def test_the_last_message_is_continued_where_it_ends(renderer: TemplateRenderer) -> None:
    messages = [*HI, {"role": "assistant", "content": "Once upon "}]
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</s>{% endfor %}"
    assert await rendered(renderer, source, messages, opens=False, goes_on=True) == (
        Span("<user>hi</s><assistant>Once upon "),
    )


async def test_a_template_that_drops_the_last_message_cannot_continue_it(renderer: TemplateRenderer) -> None:
    answered = [*HI, {"role": "assistant", "content": "Once upon"}]
    with pytest.raises(TemplateFailed, match="leaves out"):
        await rendered(renderer, "{{ messages[0].content }}", answered, goes_on=True)


async def test_templates_see_what_they_were_written_for(renderer: TemplateRenderer) -> None:
    source = (
        "{{ bos_token }}{{ eos_token }}{{ tools is none }}{{ documents is none }}{{ mood }}"
        "{{ {'a': '<é>'} | tojson }}{% generation %}g{% endgeneration %}"
        "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}{{ strftime_now('%Y')|length }}"
        "{{ messages[0].content }}"
    )
    (span,) = await rendered(renderer, source, mood="calm")
    assert span.text == '<s></s>TrueTruecalm{"a": "<é>"}g014hi'


async def test_blocks_leave_no_empty_lines(renderer: TemplateRenderer) -> None:
    source = "{% if true %}\n  {% set x = 1 %}\na\n{% endif %}\n{{ messages[0].content }}"
    assert await rendered(renderer, source) == (Span("a\nhi"),)


async def test_a_template_refuses_in_its_own_words(renderer: TemplateRenderer) -> None:
    source = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(TemplateFailed, match=r"^System role not supported$"):
        await rendered(renderer, source)


ENDLESS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}"
)
DOUBLING = (
    "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}"
)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (ENDLESS, "stopped after 2 s"),
        ("{{ 10 ** (10 ** 9) }}", "stopped"),
        ("{{ range(999999999) | list }}", "range|Range"),
        ("{{ 'a' * 10 ** 9 }}", "too much memory"),
        ("{{ '%1000000000d' % 1 }}", "too much memory"),
        ("{{ 'x' | center(10 ** 9) }}", "too much memory"),
        (DOUBLING, "stopped"),
        ("{{ 'a' * (20 * 2 ** 20) }}", "more than 16777216 bytes"),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "calls itself without end"),
        (
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
            "stopped after 2 s",
        ),
        ("{{ ''.__class__.__mro__ }}", "can't render|forbidden"),
        ("{{ messages.__class__.__base__.__subclasses__() }}", "forbidden"),
        ("{{ raise_exception.__globals__['sys'] }}", "forbidden"),
        ("{% include '/etc/hostname' %}", "can't render|forbidden"),
        ("{% import 'os' as os %}{{ os.system('true') }}", "can't render|forbidden"),
        ("{{ messages.append(1) }}", "forbidden"),
        ("{{ open('/etc/hostname') }}", "undefined"),
        ("{{ nothing.at.all }}", "undefined"),
        ("{% if %}", "broken in line 1"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
async def test_a_hostile_template_ends_in_one_line_and_the_next_one_renders(source: str, why: str) -> None:
    renderer = TemplateRenderer(timeout_s=2.0 if why.startswith("stopped") else PATIENCE_S)
    with pytest.raises(TemplateFailed, match=why) as caught:
        await rendered(renderer, source)
    assert "\n" not in caught.value.message
    assert await rendered(renderer, ECHO) == (Span("[user]hi[go]"),)
    await renderer.close()


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("{% if false %}{{ messages.__class__ }}{% endif %}", "__class__ in line 1"),
        ("hello\n{{ messages['__class__'] }}", "__class__ in line 2"),
        ("{% macro m() %}{{ ''|attr('x') }}{{ raise_exception.__globals__ }}{% endmacro %}", "__globals__ in line 1"),
        ("{% include '/etc/hostname' %}", "include in line 1"),
        ("{% from 'os' import system %}", "fromimport in line 1"),
    ],
)
async def test_what_a_template_may_not_reach_is_seen_without_running_it(
    renderer: TemplateRenderer, source: str, what: str
) -> None:
    with pytest.raises(TemplateFailed, match=f"forbidden: {what}"):
        await renderer.check(source)
    for harmless in (ECHO, ENDLESS, "{% if %}"):
        await renderer.check(harmless)


async def test_a_render_that_nobody_waits_for_is_not_mistaken_for_the_next(renderer: TemplateRenderer) -> None:
    await rendered(renderer, ECHO)
    task = asyncio.create_task(rendered(renderer, ENDLESS))
    while not renderer._lock.locked():
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await rendered(renderer, ECHO) == (Span("[user]hi[go]"),)


async def test_renders_side_by_side_do_not_mix(renderer: TemplateRenderer) -> None:
    chats = [[{"role": "user", "content": str(i)}] for i in range(20)]
    results = await asyncio.gather(*(rendered(renderer, ECHO, chat) for chat in chats))
    assert [spans[0].text for spans in results] == [f"[user]{i}[go]" for i in range(20)]


async def test_a_refusing_template_is_a_400_and_a_long_chat_is_no_problem() -> None:
    refuses = "{% if messages | length == 1 %}{{ raise_exception('too short') }}{% endif %}"
    refuses += "{% for m in messages %}{{ m.content }}{% endfor %}?"
    async with api(chat_template=refuses) as http:
        body = {"messages": HI}
        reply = await http.post("/v1/chat/completions", json=body)
        assert reply.status_code == 400
        assert reply.json()["error"] == {
            "message": "too short",
            "type": "invalid_request_error",
            "param": "messages",
            "code": None,
        }
        body = {"messages": [{"role": "user", "content": "x"}] * 900}
        assert (await http.post("/v1/chat/completions", json=body)).status_code == 200


async def test_a_chat_that_finds_no_descriptor_for_its_template_is_told_to_come_again():
    renderer = TemplateRenderer()
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1, before[1]))
    try:
        with pytest.raises(EngineUnavailable, match="can't be started"):
            await renderer.render("{{ word }}", {"word": "hello"})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert await renderer.render("{{ word }}", {"word": "hello"}) == "hello"
    await renderer.close()
