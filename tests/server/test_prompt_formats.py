"""The built-in prompt formats, exact to the character, and chats in the orders that role-play clients send."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from checkout import DATA
from fakes import BOS, ByteTokenizer

from tightrope.engine.intake import encode_prompt
from tightrope.engine.settings import LimitSettings
from tightrope.engine.types import ModelInfo, Span, TextPrompt
from tightrope.server.chats.rendering import RenderedChat
from tightrope.server.dialects.openai.reading import chat_asked
from tightrope.server.dialects.openai.requests import ChatRequest
from tightrope.server.http.errors import TemplateFailed
from tightrope.server.prompts.prompt_formats import PROMPT_FORMATS
from tightrope.server.prompts.role_order import regular_orders
from tightrope.server.prompts.template_renderer import TemplateRenderer
from tightrope.server.prompts.templates import ChatTemplate, RenderedPrompt
from tightrope.server.served import Served
from tightrope.server.settings.settings import SettingsError, load_settings

GOLDEN = json.loads(DATA.joinpath("prompt_formats/golden.json").read_text("utf-8"))
INFO = ModelInfo("m", "rules", "fake", 9, 9, 9, 9, "f16", 1, "<s>", "</s>", ("<s>", "</s>"), None, ())
LENGTHS = ("micro", "tiny", "short", "medium", "long", "massive", "huge", "enormous", "humongous", "unlimited")

SYSTEM = {"role": "system", "content": "Be Mara."}
NOTE = {"role": "system", "content": "It rains."}
GREETING = {"role": "assistant", "content": "Welcome!"}
HELLO = {"role": "user", "content": "Hello."}
MORE = {"role": "user", "content": "Anyone?"}

STRICT = (  # as Mistral's: no system role, and roles that alternate
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}"
)
FORGETFUL = (  # as many: a system message is looked for at the start alone
    "{% if messages[0].role == 'system' %}[{{ messages[0].content }}]{% endif %}"
    "{% for m in messages if m.role != 'system' %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}"
)


@pytest.fixture
async def renderer() -> AsyncIterator[TemplateRenderer]:
    renderer = TemplateRenderer()
    yield renderer
    await renderer.close()


async def rendered(
    renderer: TemplateRenderer,
    template: ChatTemplate,
    messages: list[dict[str, Any]],
    *,
    goes_on: bool = False,
    **v: str,
) -> RenderedPrompt:
    return await template.render(
        renderer, messages, add_generation_prompt=not goes_on, continue_final_message=goes_on, variables=v
    )


def text(prompt: RenderedPrompt) -> str:
    return "".join(span.text for span in prompt.spans)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['format']}-{len(case['messages'])}")
async def test_a_built_in_format_is_exact_to_the_character(renderer: TemplateRenderer, case: dict[str, Any]) -> None:
    prompt = await rendered(renderer, ChatTemplate(INFO, case["format"]), case["messages"], **case["variables"])
    assert text(prompt) == case["prompt"]
    assert prompt.notes == ()


def test_every_built_in_format_has_a_golden_text() -> None:
    assert {case["format"] for case in GOLDEN} == PROMPT_FORMATS.keys()


@pytest.mark.parametrize("length", LENGTHS)
async def test_limarp_takes_each_of_its_lengths(renderer: TemplateRenderer, length: str) -> None:
    template = ChatTemplate(INFO, "limarp-alpaca", {"length": "tiny"})
    assert text(await rendered(renderer, template, [HELLO], length=length)).endswith(
        f"\n\n### Response: (length = {length})\nCharacter:"
    )


async def test_the_servers_variables_stand_beneath_the_requests(renderer: TemplateRenderer) -> None:
    template = ChatTemplate(INFO, "limarp-alpaca", {"length": "tiny"})
    assert "(length = tiny)" in text(await rendered(renderer, template, [HELLO]))
    assert "(length = huge)" in text(await rendered(renderer, template, [HELLO], length="huge"))


async def test_an_unknown_length_is_refused_with_those_that_are_known(renderer: TemplateRenderer) -> None:
    with pytest.raises(TemplateFailed, match=r"micro, tiny, .*; it is gigantic"):
        await rendered(renderer, ChatTemplate(INFO, "limarp-alpaca"), [HELLO], length="gigantic")


async def test_a_length_stands_on_the_answer_that_is_continued_too(renderer: TemplateRenderer) -> None:
    prompt = await rendered(
        renderer, ChatTemplate(INFO, "limarp-alpaca"), [HELLO, GREETING], goes_on=True, length="long"
    )
    assert text(prompt).endswith("\n\n### Response: (length = long)\nCharacter: Welcome!")


@pytest.mark.parametrize("name", PROMPT_FORMATS)
async def test_every_format_takes_what_role_play_clients_send(renderer: TemplateRenderer, name: str) -> None:
    chat = [SYSTEM, NOTE, GREETING, HELLO, NOTE | {"content": "Thunder."}]
    prompt = text(await rendered(renderer, ChatTemplate(INFO, name), chat))
    places = [prompt.index(m["content"]) for m in (SYSTEM, NOTE, GREETING, HELLO)]
    assert sorted(places[2:]) == places[2:]
    assert "Thunder." in prompt


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([SYSTEM, NOTE, GREETING, HELLO], "<u>Be Mara.\n\nIt rains.<a>Welcome!<u>Hello."),
        ([GREETING, HELLO], "<u><a>Welcome!<u>Hello."),
        ([GREETING, GREETING, HELLO], "<u><a>Welcome!\n\nWelcome!<u>Hello."),
        ([HELLO, NOTE, GREETING, MORE, NOTE], "<u>Hello.\n\nIt rains.<a>Welcome!<u>Anyone?\n\nIt rains."),
        ([HELLO, GREETING, NOTE, MORE], "<u>Hello.<a>Welcome!<u>It rains.\n\nAnyone?"),
        ([SYSTEM, HELLO], "<u>Be Mara.\n\nHello."),
        ([SYSTEM], "<u>Be Mara."),
        ([SYSTEM, GREETING], "<u>Be Mara.<a>Welcome!"),
        ([SYSTEM, HELLO, GREETING, MORE], "<u>Be Mara.\n\nHello.<a>Welcome!<u>Anyone?"),
        ([HELLO, MORE], "<u>Hello.\n\nAnyone?"),
        ([HELLO | {"name": "Tom"}, MORE | {"name": "Ann"}], "<u>Hello.\n\nAnyone?"),
        ([SYSTEM, NOTE, GREETING, HELLO, MORE], "<u>Be Mara.\n\nIt rains.<a>Welcome!<u>Hello.\n\nAnyone?"),
        ([HELLO, GREETING, GREETING], "<u>Hello.<a>Welcome!\n\nWelcome!"),
        ([HELLO | {"content": [{"type": "text", "text": "Hello."}]}, MORE], "<u>Hello.\n\nAnyone?"),
    ],
)
async def test_a_template_that_insists_on_alternation_is_met_by_merging(
    renderer: TemplateRenderer, messages: list[dict[str, Any]], expected: str
) -> None:
    prompt = await rendered(renderer, ChatTemplate(INFO, STRICT), messages)
    assert text(prompt) == expected
    assert "roles must alternate" in prompt.notes[0]


async def test_a_chat_that_stays_refused_is_refused_in_the_words_it_met_first(renderer: TemplateRenderer) -> None:
    source = "{{ raise_exception('no: ' ~ messages | length) }}"
    with pytest.raises(TemplateFailed, match=r"^no: 3$"):
        await rendered(renderer, ChatTemplate(INFO, source), [SYSTEM, NOTE, HELLO])


async def test_system_messages_that_a_template_would_pass_over_are_merged(renderer: TemplateRenderer) -> None:
    prompt = await rendered(renderer, ChatTemplate(INFO, FORGETFUL), [SYSTEM, NOTE, HELLO, GREETING, NOTE, MORE])
    assert text(prompt) == "[Be Mara.\n\nIt rains.]<u>Hello.<a>Welcome!<u>It rains.\n\nAnyone?"


async def test_a_system_message_that_a_template_drops_goes_into_the_users_turn(renderer: TemplateRenderer) -> None:
    source = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    prompt = await rendered(renderer, ChatTemplate(INFO, source), [SYSTEM, HELLO])
    assert text(prompt) == "Be Mara.\n\nHello."
    assert prompt.notes == ("messages were merged into 1 turn: the chat template leaves out a system message",)


async def test_a_system_message_that_no_order_saves_is_told_of(renderer: TemplateRenderer) -> None:
    source = (
        "{% for m in messages %}{% if m.role != 'system' and 'Be Mara' in m.content %}{{ raise_exception('no') }}"
        "{% endif %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    prompt = await rendered(renderer, ChatTemplate(INFO, source), [SYSTEM, HELLO])
    assert text(prompt) == "Hello."
    assert prompt.notes == ("the chat template leaves out a system message",)


@pytest.mark.parametrize(
    "messages", [[HELLO, GREETING, GREETING], [SYSTEM, GREETING], [HELLO, GREETING | {"content": "Wel"}, GREETING]]
)
async def test_an_answer_that_was_merged_goes_on_where_it_ends(
    renderer: TemplateRenderer, messages: list[dict[str, Any]]
) -> None:
    prompt = await rendered(renderer, ChatTemplate(INFO, STRICT + "<end>"), messages, goes_on=True)
    assert text(prompt).endswith("Welcome!")


def test_the_orders_of_a_chat_come_from_its_own_to_the_strictest() -> None:
    noted = HELLO | {"content": "Hello.\n\nIt rains."}
    joined = HELLO | {"content": "Hello.\n\nIt rains.\n\nAnyone?"}
    assert list(regular_orders([HELLO, NOTE, MORE])) == [[HELLO, NOTE, MORE], [noted, MORE], [joined]]
    top = HELLO | {"content": "Be Mara.\n\nHello."}
    assert list(regular_orders([SYSTEM, HELLO, GREETING])) == [[SYSTEM, HELLO, GREETING], [top, GREETING]]
    assert list(regular_orders([HELLO, GREETING, MORE])) == [[HELLO, GREETING, MORE]]


def test_calls_keep_their_results_behind_them_and_results_stay_apart() -> None:
    one = {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}
    two = {"role": "assistant", "content": None, "tool_calls": [{"id": "2"}]}
    result = {"role": "tool", "content": "4", "tool_call_id": "1"}
    chat = [HELLO, MORE, GREETING, one, result, result, two, GREETING]
    joined = HELLO | {"content": "Hello.\n\nAnyone?"}
    told = one | {"content": "Welcome!"}
    assert list(regular_orders(chat)) == [chat, [joined, told, result, result, two, GREETING]]


@pytest.mark.parametrize(
    ("name", "stops"),
    [
        ("chatml", ("<|im_end|>",)),
        ("bagel", ()),
        ("llama-2", ()),
        ("vicuna", ("USER:",)),
        ("airoboros", ("USER:",)),
        ("alpaca", ("### Instruction:",)),
        ("limarp-alpaca", ("### Input:", "### Instruction:")),
    ],
)
def test_a_formats_stops_are_added_to_the_requests_own(name: str, stops: tuple[str, ...]) -> None:
    template = ChatTemplate(INFO, name)
    body = ChatRequest.model_validate({"messages": [HELLO], "stop": ["#"]})
    served = Served("m", INFO, LimitSettings(), 4)
    (request,) = chat_asked(body, RenderedChat(RenderedPrompt((Span("prompt"),)), template.stops), served).requests
    assert request.stop.strings == ("#", *stops)


@pytest.mark.parametrize("written", ["", "<s>", "<s><s>", "<s><s><s>"])
def test_a_prompt_begins_with_one_bos_whoever_wrote_it(written: str) -> None:
    assert encode_prompt(TextPrompt((Span(written), Span("<s>a"))), ByteTokenizer()) == [BOS, ord("a")]
    assert encode_prompt(TextPrompt((Span(f"{written}a"),)), ByteTokenizer()) == [BOS, ord("a")]


def test_bos_inside_a_prompt_is_part_of_its_format() -> None:
    assert encode_prompt(TextPrompt((Span("<s>a<s><s>b"),)), ByteTokenizer()) == [BOS, ord("a"), BOS, BOS, ord("b")]


def test_settings_take_a_formats_name_and_variables() -> None:
    settings = load_settings({"chat-template": "limarp-alpaca", "chat-template-arg": "length=short, mood = calm"}, {})
    assert settings.chat_template == "limarp-alpaca"
    assert settings.chat_template_args == {"length": "short", "mood": "calm"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"chat-template": "alpacca"}, "built-in are chatml, bagel"),
        ({"chat-template-arg": "length"}, "expected NAME=VALUE"),
        ({"chat-template-arg": "messages=x"}, "not 'messages'"),
    ],
)
def test_settings_that_make_no_template_are_refused_in_one_line(options: dict[str, str], words: str) -> None:

    with pytest.raises(SettingsError, match=words):
        load_settings(options, {})
