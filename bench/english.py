"""Real English text that every CPython brings: the language reference behind `help()`, as prose."""

import re
from pydoc_data.topics import topics

NAME = "pydoc_data.topics of CPython's standard library: its language reference, each paragraph once, without markup"

_MARKUP = re.compile(r"\s*(?:[*=~^-]+|.*::=.*|[|+].*)\s*")  # underlines of titles, grammar, tables
_STARS = re.compile(r"\*+([^*\n]+)\*+")  # emphasis


def english_text() -> str:
    """All paragraphs in the topics' order. Topics repeat each other; a model would copy what it has read before."""
    seen: dict[str, None] = {}
    for topic in topics.values():
        for paragraph in topic.split("\n\n"):
            lines = [line for line in paragraph.split("\n") if line.strip() and not _MARKUP.fullmatch(line)]
            if lines:
                seen.setdefault(_STARS.sub(r"\1", "\n".join(lines)))
    return "\n\n".join(seen) + "\n"
