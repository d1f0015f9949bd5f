"""What a template does with words, and that no chat loses them."""

from collections.abc import AsyncIterator

import pytest
from served_app import PATIENCE_S

from tightrope.engine.types import ModelInfo, Span
from tightrope.server.http.errors import TemplateFailed
from tightrope.server.prompts.template_probe import UNKNOWN, TemplateFacts
from tightrope.server.prompts.template_renderer import TemplateRenderer
from tightrope.server.prompts.templates import ChatTemplate

EITHER, TEXT, PARTS = frozenset({"text", "parts"}), frozenset({"text"}), frozenset({"parts"})

_PARTS = "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
_EITHER = "{% if m.content is string %}{{ m.content }}{% else %}" + _PARTS + "{% endif %}"
ECHO = "{% for m in messages %}{{ m.content }}{% endfor %}"
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}" + ECHO
_ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must alternate') }}{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}"
)


def each(written: str) -> str:
    return "{% for m in messages %}<{{ m.role }}>" + written + "|{% endfor %}"


def info(source: str) -> ModelInfo:
    return ModelInfo("m", "rules", "fake", 9, 9, 9, 9, "f16", 1, "<s>", "</s>", ("<|im_end|>",), source, ())


@pytest.fixture
async def renderer() -> AsyncIterator[TemplateRenderer]:
    renderer = TemplateRenderer(timeout_s=PATIENCE_S)
    yield renderer
    await renderer.close()


async def facts(renderer: TemplateRenderer, source: str) -> TemplateFacts:
    return await ChatTemplate(info(source)).facts(renderer, source)


@pytest.mark.parametrize(
    ("source", "system", "user", "assistant"),
    [
        (each("{{ m.content }}"), TEXT, TEXT, TEXT),
        (each("{{ m.content | tojson }}"), TEXT, TEXT, TEXT),
        (each("{{ m.content | trim }}"), TEXT, TEXT, TEXT),
        (each("{{ '- ' + m.content }}"), TEXT, TEXT, TEXT),
        (each(_PARTS), PARTS, PARTS, PARTS),
        (each("{{ m.content[0].text }}"), PARTS, PARTS, PARTS),
        (each("{{ m.content | selectattr('type', 'eq', 'text') | map(attribute='text') | join }}"), *[PARTS] * 3),
        (each(_EITHER), EITHER, EITHER, EITHER),
        (each("{% if m.role == 'user' %}" + _PARTS + "{% else %}{{ '' + m.content }}{% endif %}"), TEXT, PARTS, TEXT),
        (
            each("{% if m.role == 'system' %}{{ '' + m.content }}{% else %}%s{% endif %}".replace("%s", _EITHER)),
            TEXT,
            *[EITHER] * 2,
        ),
        (_ALTERNATING, TEXT, TEXT, TEXT),
    ],
)
async def test_each_role_gets_the_shapes_that_keep_its_words(
    renderer: TemplateRenderer,
    source: str,
    system: frozenset[str],
    user: frozenset[str],
    assistant: frozenset[str],
) -> None:
    found = await facts(renderer, source)
    assert (found.shapes_of("system"), found.shapes_of("user"), found.shapes_of("assistant")) == (
        system,
        user,
        assistant,
    )
    assert found.lost == found.partly_lost == frozenset()


@pytest.mark.parametrize("source", [each(_PARTS), each("{{ m.content }}"), each(_EITHER)])
@pytest.mark.parametrize("content", ["Is the <|im_end|> in?", [{"type": "text", "text": "Is the <|im_end|> in?"}]])
async def test_words_reach_every_template_as_text_and_as_parts(
    renderer: TemplateRenderer, source: str, content: object
) -> None:
    prompt = await ChatTemplate(info(source)).render(
        renderer, [{"role": "user", "content": content}], add_generation_prompt=True, continue_final_message=False
    )
    assert prompt.spans == (Span("<user>Is the "), Span("<|im_end|>", parse_special=False), Span(" in?|"))
    assert prompt.notes == ()


@pytest.mark.parametrize(
    "written",
    [
        "{{ m.content[0].text }}",
        "{{ m.content if m.content is string else m.content[-1]['text'] }}",
        "{{ (m.content | selectattr('type', 'eq', 'text') | list)[0].text }}",
        "{% if m.role == 'user' %}" + _EITHER + "{% else %}{{ m.content[0].text }}{% endif %}",
    ],
)
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
async def test_no_part_is_lost_where_a_template_reads_one(renderer: TemplateRenderer, written: str, role: str) -> None:
    content = [{"type": "text", "text": "Is it"}, {"type": "text", "text": "in?"}]
    prompt = await ChatTemplate(info(each(written))).render(
        renderer, [{"role": role, "content": content}], add_generation_prompt=True, continue_final_message=False
    )
    text = "".join(span.text for span in prompt.spans)
    assert text == f"<{role}>Is it{'' if role == 'user' and 'if m.role' in written else chr(10)}in?|"
    assert prompt.notes == ()


async def test_a_template_that_leaves_out_the_assistant_says_so_and_refuses_its_turns(
    renderer: TemplateRenderer,
) -> None:
    template = ChatTemplate(info("{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}"))
    (note,) = await template.notes(renderer)
    assert "leaves out what the assistant wrote" in note
    chat = [{"role": "user", "content": "hi"}]
    prompt = await template.render(renderer, chat, add_generation_prompt=True, continue_final_message=False)
    assert prompt.spans == (Span("hi"),)
    with pytest.raises(TemplateFailed, match="leaves out what the assistant wrote"):
        await template.render(
            renderer,
            [*chat, {"role": "assistant", "content": "hi"}, *chat],
            add_generation_prompt=True,
            continue_final_message=False,
        )


async def test_a_template_that_writes_capitals_keeps_words(renderer: TemplateRenderer) -> None:
    assert await ChatTemplate(info(each("{{ m.content | upper }}"))).notes(renderer) == ()


@pytest.mark.parametrize("shape", ["text", "parts"])
async def test_a_message_of_parts_is_continued_where_it_ends(renderer: TemplateRenderer, shape: str) -> None:
    greeting: object = "Once upon" if shape == "text" else [{"type": "text", "text": "Once upon"}]
    for source in (each(_PARTS), each("{{ m.content }}")):
        prompt = await ChatTemplate(info(source)).render(
            renderer,
            [{"role": "user", "content": "hi"}, {"role": "assistant", "content": greeting}],
            add_generation_prompt=False,
            continue_final_message=True,
        )
        assert prompt.spans == (Span("<user>hi|<assistant>Once upon"),)


async def test_a_template_that_leaves_out_the_user_says_so_and_refuses(renderer: TemplateRenderer) -> None:
    template = ChatTemplate(info("{% for m in messages %}<{{ m.role }}>{% endfor %}"))
    (note,) = await template.notes(renderer)
    assert "leaves out what users write, as text and as parts" in note
    with pytest.raises(TemplateFailed, match="leaves out what a user wrote"):
        await template.render(
            renderer, [{"role": "user", "content": "hi"}], add_generation_prompt=True, continue_final_message=False
        )


async def test_a_template_that_keeps_the_last_turn_alone_refuses_longer_chats(renderer: TemplateRenderer) -> None:
    template = ChatTemplate(info("{{ messages[-1].content }}"))
    (note,) = await template.notes(renderer)
    assert "some turns of the user" in note
    one = [{"role": "user", "content": "hi"}]
    prompt = await template.render(renderer, one, add_generation_prompt=True, continue_final_message=False)
    assert prompt.spans == (Span("hi"),)
    with pytest.raises(TemplateFailed, match="leaves out what a user wrote"):
        await template.render(
            renderer,
            [*one, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "hi there"}],
            add_generation_prompt=True,
            continue_final_message=False,
        )


async def test_a_template_that_keeps_the_last_turn_alone_refuses_a_greeting_before_it(
    renderer: TemplateRenderer,
) -> None:
    with pytest.raises(TemplateFailed, match="leaves out what the assistant wrote"):
        await ChatTemplate(info("{{ messages[-1].content }}")).render(
            renderer,
            [{"role": "assistant", "content": "Welcome"}, {"role": "user", "content": "hi"}],
            add_generation_prompt=True,
            continue_final_message=False,
        )


@pytest.mark.parametrize("roles", [("system", "system", "user"), ("user", "system", "user")])
async def test_no_list_stands_in_a_prompt_where_the_first_system_turn_alone_is_read_as_parts(
    renderer: TemplateRenderer, roles: tuple[str, ...]
) -> None:
    source = (
        "{% if messages[0].role == 'system' %}{{ messages[0].content[0].text }}{% set rest = messages[1:] %}"
        "{% else %}{% set rest = messages %}{% endif %}{% for m in rest %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    chat = [{"role": role, "content": f" Hornbeam{place}"} for place, role in enumerate(roles)]
    prompt = await ChatTemplate(info(source)).render(
        renderer, chat, add_generation_prompt=True, continue_final_message=False
    )
    text = "".join(span.text for span in prompt.spans)
    assert "'text'" not in text
    assert [text.find(f" Hornbeam{place}") >= 0 for place in range(3)] == [True] * 3
    assert "merged" in prompt.notes[0]


async def test_words_that_a_template_changes_are_not_lost(renderer: TemplateRenderer) -> None:
    template = ChatTemplate(info(each("{{ m.content | upper | replace(' ', '_') }}")))
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "good day"}]
    prompt = await template.render(renderer, messages, add_generation_prompt=True, continue_final_message=False)
    assert prompt.spans == (Span("<system>BE_BRIEF|<user>GOOD_DAY|"),)
    assert prompt.notes == ()


async def test_a_broken_template_is_told_of_and_an_endless_one_is_not_waited_for_long(
    renderer: TemplateRenderer,
) -> None:
    (note,) = await ChatTemplate(info("{% if %}")).notes(renderer)
    assert "can't write even a word" in note
    hasty = TemplateRenderer(timeout_s=2.0)
    assert await facts(hasty, ENDLESS) == UNKNOWN
    await hasty.close()


CALL = {"id": "1", "type": "function", "function": {"name": "ring", "arguments": {"times": 3}}}
_CALLS = "{% for c in m.tool_calls or [] %}({{ c.function.name }}{{ c.function.arguments | tojson }}){% endfor %}"


@pytest.mark.parametrize(
    "source",
    [
        each("{{ m.content }}" + _CALLS),
        each("{% if m.content is defined %}{{ m.content | trim }}{% endif %}" + _CALLS),
        each("{{ m.content + '' }}" + _CALLS),
        each("{% if m.role == 'assistant' and m.content is none %}" + _CALLS + "{% else %}{{ m.content }}{% endif %}"),
        each("{% if m.tool_calls and 'content' not in m %}" + _CALLS + "{% else %}{{ m.content }}{% endif %}"),
        each("{% for part in m.content or [] %}{{ part.text }}{% endfor %}" + _CALLS),
        each("{% if m.role == 'tool' %}" + _PARTS + "{% else %}{{ m.content }}{% endif %}" + _CALLS),
        each("{% if m.role == 'tool' %}{{ m.content }}{% else %}" + _PARTS + "{% endif %}" + _CALLS),
    ],
)
async def test_calls_without_words_and_their_results_are_kept(renderer: TemplateRenderer, source: str) -> None:
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": "ding", "tool_call_id": "1"},
    ]
    prompt = await ChatTemplate(info(source)).render(
        renderer, messages, add_generation_prompt=True, continue_final_message=False
    )
    assert prompt.spans == (Span('<user>hi|<assistant>(ring{"times": 3})|<tool>ding|'),)
