"""What a chat template does with the words that it is given, found by giving it marked ones.

Templates differ in the content that they read: text, a list of parts, or either. One that reads the other kind writes
nothing of it, or Python's own form of a list, and says no word. So a few short chats are rendered in each shape, and
looked through for their words.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Literal

from tightrope.server.http.errors import TemplateFailed
from tightrope.server.prompts.content import Message, in_shape
from tightrope.server.prompts.template_renderer import TemplateRenderer

Shape = Literal["text", "parts"]

SHAPES: tuple[Shape, ...] = ("text", "parts")
_ROLES = ("system", "user", "assistant")
_CHATS = (
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user", "assistant"),
)
_LISTED = re.compile(r"""["']text["']\s*:\s*["'](\\[nrt]|\s)*$""", re.IGNORECASE)
_LISTED_CHARS = 64  # So many characters in front of words are looked at, blanks among them.
_CALL_CONTENTS: tuple[Mapping[str, str | None], ...] = ({}, {"content": ""}, {"content": None})
TOOL = {
    "type": "function",
    "function": {"name": "probe", "description": "", "parameters": {"type": "object", "properties": {}}},
}


@dataclass(frozen=True, slots=True)
class TemplateFacts:
    """What one template was seen to do."""

    shapes: Mapping[str, frozenset[Shape]]  # In these shapes most words of a role's content are kept.
    lost: frozenset[str] = frozenset()  # Of these roles no word is kept.
    partly_lost: frozenset[str] = frozenset()  # Of these roles some turns are kept, and some aren't.
    one_part: frozenset[str] = frozenset()  # Of these roles' parts only some are kept, so that they are to be one.
    is_broken: bool = False  # It is when not one of the chats could be rendered.
    call_content: Mapping[str, str | None] = field(
        default_factory=lambda: {"content": ""}
    )  # It stands beside calls without text.

    def shapes_of(self, role: str) -> frozenset[Shape]:
        """Those in which content of this role is kept; a role that wasn't probed is like the user's."""
        return self.shapes.get(role, self.shapes["user"])


UNKNOWN = TemplateFacts(dict.fromkeys(_ROLES, frozenset({"text"})))  # Most templates read this.


@dataclass(frozen=True, slots=True)
class _Chat:
    """A chat of marked words, each in its role's shape."""

    roles: tuple[str, ...]
    shapes: tuple[tuple[str, Shape], ...]  # Only roles that occur are in it.

    def words(self) -> list[tuple[str, str]]:
        """The role and the words of each message."""
        return [(role, f"{role}probe{place}") for place, role in enumerate(self.roles)]

    def messages(self) -> list[dict[str, Any]]:
        shapes = dict(self.shapes)
        return [
            {"role": role, "content": word if shapes[role] == "text" else [{"type": "text", "text": word}]}
            for role, word in self.words()
        ]


async def probe(
    renderer: TemplateRenderer, source: str, variables: Mapping[str, Any], *, with_tools: bool
) -> TemplateFacts:
    """Render the chats in every shape, and look at what comes out.

    `variables` are those that the template sees beside the messages; with_tools: it is made for chats with tools alone.
    UNKNOWN for a template that had to be stopped.
    """
    fixed = {**variables, "tools": [TOOL] if with_tools else None, "add_generation_prompt": False}
    asked = _Template(renderer, source, fixed)
    try:
        facts = await _probe_parts(asked, await _probe_words(asked))
        if "tool_calls" not in source:
            return facts
        return await _probe_calls(replace(asked, fixed={**fixed, "tools": [TOOL]}), facts)
    except TemplateFailed:
        return UNKNOWN


@dataclass(frozen=True, slots=True)
class _Template:
    """A template with what it sees beside the messages."""

    renderer: TemplateRenderer
    source: str
    fixed: Mapping[str, Any]

    async def texts(self, chats: Iterable[Sequence[Message]]) -> list[str | None]:
        """Of several chats; None where the template failed."""
        return await self.renderer.render_each(self.source, [{**self.fixed, "messages": chat} for chat in chats])


async def _probe_words(asked: _Template) -> TemplateFacts:
    assignments = [dict(zip(_ROLES, shapes, strict=True)) for shapes in product(SHAPES, repeat=len(_ROLES))]
    chats = list(dict.fromkeys(_chat(roles, shapes) for roles in _CHATS for shapes in assignments))
    texts = await asked.texts(chat.messages() for chat in chats)
    return _facts(assignments, dict(zip(chats, texts, strict=True)))


async def _probe_parts(asked: _Template, facts: TemplateFacts) -> TemplateFacts:
    """The facts with those about content of two parts, in the roles that have parts at all."""
    chats = [_Chat(roles, ()).words() for roles in _CHATS]
    messages = ([_in_two(role, word, facts.shapes_of(role)) for role, word in words] for words in chats)
    texts = await asked.texts(messages)
    seen = [(role, word, text) for words, text in zip(chats, texts, strict=True) if text for role, word in words]
    kept = [(role, keeps(text, f"{word}a"), keeps(text, f"{word}b")) for role, word, text in seen]
    torn = {role for role, keeps_first, keeps_second in kept if keeps_first != keeps_second}
    return replace(facts, one_part=frozenset(torn))


def _in_two(role: str, word: str, shapes: Collection[Shape]) -> dict[str, Any]:
    parts = [{"type": "text", "text": f"{word}{letter}"} for letter in "ab"]
    return in_shape({"role": role, "content": parts}, shapes)


async def _probe_calls(asked: _Template, facts: TemplateFacts) -> TemplateFacts:
    """The facts with those about calls and their results: the first form in which most of them is kept."""
    call = {"id": "call00000", "type": "function", "function": {"name": "callprobe", "arguments": {"x": "givenprobe"}}}
    forms = [(content, shape) for content in _CALL_CONTENTS for shape in SHAPES]
    chats = [
        [
            in_shape({"role": "user", "content": "userprobe"}, facts.shapes_of("user")),
            {"role": "assistant", **content, "tool_calls": [call]},
            in_shape(
                {"role": "tool", "content": "resultprobe", "name": "callprobe", "tool_call_id": "call00000"}, {shape}
            ),
            in_shape({"role": "assistant", "content": "assistantprobe"}, facts.shapes_of("assistant")),
        ]
        for content, shape in forms
    ]
    texts = await asked.texts(chats)
    words = ("userprobe", "callprobe", "givenprobe", "resultprobe", "assistantprobe")
    kept = [0 if text is None else sum(keeps(text, word) for word in words) for text in texts]
    if not any(kept):
        return facts
    best = [form for form, num in zip(forms, kept, strict=True) if num == max(kept)]
    results = frozenset(shape for content, shape in best if content == best[0][0])
    return replace(facts, call_content=best[0][0], shapes={**facts.shapes, "tool": results})


def _chat(roles: tuple[str, ...], shapes: Mapping[str, Shape]) -> _Chat:
    return _Chat(roles, tuple((role, shapes[role]) for role in sorted(set(roles))))


def _facts(assignments: Sequence[Mapping[str, Shape]], texts: Mapping[_Chat, str | None]) -> TemplateFacts:
    def seen(shapes: Mapping[str, Shape]) -> list[tuple[_Chat, str]]:
        """The chats in these shapes that could be rendered, with their texts."""
        chats = (_chat(roles, shapes) for roles in _CHATS)
        return [(chat, text) for chat in chats if (text := texts[chat]) is not None]

    def kept(shapes: Mapping[str, Shape]) -> int:
        return sum(sum(keeps(text, word) for _, word in chat.words()) for chat, text in seen(shapes))

    most = max(map(kept, assignments))
    best = [shapes for shapes in assignments if kept(shapes) == most]
    chosen = seen(best[0])
    words = [(role, keeps(text, word)) for chat, text in chosen for role, word in chat.words()]
    lost = frozenset(role for role in _ROLES if (role, False) in words and (role, True) not in words)
    return TemplateFacts(
        shapes={
            role: frozenset(shapes[role] for shapes in best) if (role, True) in words else frozenset({"text"})
            for role in _ROLES
        },
        lost=lost,
        partly_lost=frozenset(role for role in _ROLES if (role, False) in words) - lost,
        is_broken=not chosen,
    )


def keeps(text: str, word: str) -> bool:
    """Whether a word is in the text as itself, and not as part of a list in Python's or JSON's notation."""
    text = text.lower()  # Some write it in capitals.
    return word in text and not any(is_listed(text, found.start()) for found in re.finditer(re.escape(word), text))


def is_listed(text: str, place: int) -> bool:
    """Whether what begins at this place of a text is a part's words in Python's or JSON's notation of a list."""
    return _LISTED.search(text[max(0, place - _LISTED_CHARS) : place]) is not None
