"""Templates with the features of published ones, character by character as transformers' own renderer writes them."""

import json
from collections.abc import AsyncIterator, Callable
from itertools import product
from typing import Any

import pytest
from checkout import DATA
from jinja2 import TemplateError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from tightrope.engine.types import ModelInfo
from tightrope.server.chats.messages import template_messages
from tightrope.server.chats.offers import offer_of
from tightrope.server.chats.tools import tool_use
from tightrope.server.dialects.openai.reading import template_variables
from tightrope.server.dialects.openai.requests import ChatRequest
from tightrope.server.http.body import parse_json
from tightrope.server.prompts.template_renderer import TemplateRenderer
from tightrope.server.prompts.templates import ChatTemplate, RenderedPrompt
from tightrope.server.replies.tools_in_words import takes_tools

SOURCES = {path.stem: path.read_text() for path in sorted((DATA / "templates").glob("*.jinja"))}
SPECIALS = ("<s>", "</s>", "<|im_end|>", "<think>", "</think>")

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "find_berth",
            "description": "Finds a free berth,\nif there is <any> & 'all'.",
            "parameters": {
                "type": "object",
                "properties": {
                    "ship": {
                        "type": "object",
                        "description": "The ship.",
                        "properties": {
                            "name": {"type": "string"},
                            "draught": {"type": "number", "maximum": 12.5, "default": 3.0},
                            "crew": {"type": "array", "items": {"type": "string"}},
                        },
                        "required": ["name"],
                    },
                    "hours": {"type": ["integer", "null"], "maximum": 10**23, "default": None, "minimum": -0.5},
                    "kind": {"enum": ["quay", "mooring", "ünïcode"], "type": "string", "description": "Which kind?"},
                },
                "required": ["ship"],
            },
            "strict": True,
            "return": {"type": "string"},
        },
    },
    {
        "type": "function",
        "function": {
            "parameters": {"type": "object", "properties": {}},
            "description": "Rings it.",
            "name": "ring_bell",
        },
    },
]
DOCUMENTS = [{"title": "Tides", "text": "High at noon.", "page": 7}, {"title": "Fog", "text": "Until ten."}]


def user(text: object, **more: object) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def assistant(text: object, **more: object) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(name: str, place: int, **arguments: object) -> dict[str, Any]:
    return {"id": f"call{place:05}", "type": "function", "function": {"name": name, "arguments": arguments}}


def result(text: str, place: int, name: str) -> dict[str, Any]:
    return {"role": "tool", "content": text, "tool_call_id": f"call{place:05}", "name": name}


SYSTEM = {"role": "system", "content": "You steer.\n\nBe brief. "}
ASK = user("Is the ferry in?  ")
BERTH = call(
    "find_berth", 1, ship={"name": "Åsa </s>", "draught": 4.0, "crew": ["Bo", None]}, hours=10**20, kind="quay"
)
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [ASK],
    "system": [SYSTEM, ASK],
    "three": [user("Hi"), assistant(" Ahoy!\n"), user("<|im_end|> 𝛼β 日本\n\n```py\nx = {'a': 1}\n```")],
    "five": [SYSTEM, ASK, assistant("It is."), user("And <s>now</s>?", name="Ann"), assistant("Still.")],
    "thoughts": [
        ASK,
        assistant("<think>\nHm, 3.\n</think>\n\nYes."),
        user("Why?"),
        assistant("So.", reasoning_content="Oh."),
    ],
    "call": [ASK, assistant("", tool_calls=[BERTH]), result("[4, 5]", 1, "find_berth")],
    "calls": [
        SYSTEM,
        ASK,
        assistant(None, tool_calls=[BERTH, call("ring_bell", 2)]),
        result('{"berth": 4}', 1, "find_berth"),
        result("ding", 2, "ring_bell"),
        assistant("Berth 4."),
        user("Thanks."),
    ],
    "thoughtful": [SYSTEM, ASK, assistant("", reasoning="Look.", tool_calls=[BERTH]), result("4", 1, "find_berth")],
    "parts": [
        user([{"type": "text", "text": "Is it"}, {"type": "text", "text": "in?"}]),
        assistant([{"type": "text", "text": "Yes"}]),
    ],
}
VARIABLES: dict[str, dict[str, Any]] = {
    "thoughts": {"enable_thinking": False},
    "headers_and_dates": {"tools_first": False},
    "controls": {"controls": {"length": "long", "Big": 10**30, "f": 1.0}},
    "channels": {"reasoning_effort": "high"},
}


@pytest.fixture
async def renderer() -> AsyncIterator[TemplateRenderer]:
    renderer = TemplateRenderer()
    yield renderer
    await renderer.close()


def theirs(source: str) -> Callable[..., str | None]:
    """transformers' renderer of a template: the prompt of a chat, or None where it fails."""
    words = Tokenizer(WordLevel({"<s>": 0, "</s>": 1}, "<s>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", chat_template=source)

    def render(messages: list[dict[str, Any]], **fields: object) -> str | None:
        try:
            made = tokenizer.apply_chat_template(messages, tokenize=False, **fields)
        except (TemplateError, TypeError, ValueError):
            return None
        assert isinstance(made, str)
        return made

    return render


def as_sent(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages as a client of the API sends them: the arguments of calls are JSON text."""

    def sent(one: dict[str, Any]) -> dict[str, Any]:
        function = one["function"]
        return one | {"function": function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}}

    return [m | {"tool_calls": list(map(sent, m["tool_calls"]))} if "tool_calls" in m else m for m in messages]


def chat_template(source: str) -> ChatTemplate:
    return ChatTemplate(ModelInfo("m", "rules", "fake", 9, 9, 9, 9, "f16", 1, "<s>", "</s>", SPECIALS, source, ()))


async def ours(renderer: TemplateRenderer, template: ChatTemplate, raw: bytes, *, opens: bool) -> RenderedPrompt:
    """The prompt of a request, which begins as bytes."""
    request = ChatRequest.model_validate(parse_json(raw))
    tools = tool_use(offer_of(request))
    return await template.render(
        renderer,
        template_messages(request.messages),
        add_generation_prompt=opens,
        continue_final_message=request.continue_final_message,
        variables=template_variables(request),
        tools=[] if tools is None else tools.shown,
        documents=request.documents or (),
    )


@pytest.mark.parametrize("name", SOURCES)
async def test_prompts_are_those_of_transformers(renderer: TemplateRenderer, name: str) -> None:
    source = SOURCES[name]
    template, expected = chat_template(source), theirs(source)
    num_equal = 0
    for key, tools, opens, variables in product(
        CHATS, (None, TOOLS) if takes_tools(source) else (None,), (True, False), ({}, VARIABLES.get(name, {}))
    ):
        if (key == "parts" and "parts" not in name) or (key != "parts" and name == "parts_alone"):
            continue  # transformers writes Python's form of a list there, or nothing
        documents = DOCUMENTS if "documents" in source and tools is None else None
        asked: dict[str, Any] = {"tools": tools, "documents": documents}
        body = {"messages": as_sent(CHATS[key]), "chat_template_kwargs": variables, **asked}
        asked |= {"add_generation_prompt": opens, **variables}
        before = expected(CHATS[key], **asked)
        if before is None:
            continue  # what becomes of such chats is tested below
        prompt = await ours(renderer, template, json.dumps(body).encode(), opens=opens)
        if prompt.notes:
            continue  # transformers leaves words out
        text = "".join(span.text for span in prompt.spans)
        assert text in (before, expected(CHATS[key], **asked)), (key, tools is not None)  # a day may end in between
        num_equal += 1
    assert num_equal >= (2 if name == "parts_alone" else 4)


@pytest.mark.parametrize("name", SOURCES)
async def test_no_chat_of_plain_words_is_refused_or_loses_any(renderer: TemplateRenderer, name: str) -> None:
    template = chat_template(SOURCES[name])
    for messages in (
        [SYSTEM, SYSTEM, assistant("Ahoy."), user("First?"), user("Second?")],
        [SYSTEM],
        [user([{"type": "text", "text": "First?"}]), assistant("One."), assistant([{"type": "text", "text": "Two."}])],
    ):
        prompt = await ours(renderer, template, json.dumps({"messages": messages}).encode(), opens=True)
        text = "".join(span.text for span in prompt.spans)
        for words in ("You steer.", "Ahoy.", "First?", "Second?", "One.", "Two."):
            assert words in text or words not in json.dumps(messages) or name in ("breaks", "string_methods"), words


@pytest.mark.parametrize("name", SOURCES)
async def test_an_answer_goes_on_where_transformers_lets_it(renderer: TemplateRenderer, name: str) -> None:
    source = SOURCES[name]
    template, expected = chat_template(source), theirs(source)
    messages: list[dict[str, Any]] = [ASK, assistant("It is, and")]
    if name in ("string_methods", "batches"):
        return  # they count letters, and transformers' own mark has some
    if name == "parts_alone":
        messages = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
    wanted = expected(messages, continue_final_message=True)
    if wanted is not None:
        raw = json.dumps({"messages": messages, "continue_final_message": True}).encode()
        prompt = await ours(renderer, template, raw, opens=False)
        text = "".join(span.text for span in prompt.spans)
        assert text in (wanted, expected(messages, continue_final_message=True))
