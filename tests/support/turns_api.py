"""What tests of dialects of items and blocks share: a template, a tool and its call, the events of a stream."""

import json
from typing import Any

import httpx

Json = dict[str, Any]
THINK = ("<think>", "</think>")
TURNS = (
    "{% for t in tools or [] %}<{{ t.function.name }}>{% endfor %}{% for m in messages %}[{{ m.role }}"
    "{{ ' ' ~ m.name if m.name }}{{ ' ' ~ m.tool_call_id if m.tool_call_id }}]"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}({{ p.text }}){% endfor %}{% endif %}"
    "{% for c in m.tool_calls or [] %}({{ c.id }} {{ c.function.name }} {{ c.function.arguments.port }}){% endfor %}"
    "{% endfor %}"
)
PLAIN = "{{ messages[-1].content }}?"
CALL = '<tool_call>\n{"name": "tide", "arguments": {"port": "Hull"}}\n</tool_call>'
PORT: Json = {
    "type": "object",
    "properties": {"port": {"enum": ["Hull", "Rome"]}},
    "required": ["port"],
    "additionalProperties": False,
}


def named_events(reply: httpx.Response) -> list[Json]:
    """The events of a stream, whose lines of names have to say the same."""
    assert reply.status_code == 200, reply.text
    told = []
    for block in reply.text.split("\n\n"):
        if block and not block.startswith(":"):
            name, data = block.split("\n")
            told.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {told[-1]['type']}"
    return told
