"""A small chat, a template that shows what becomes of messages, and what is made of them."""

from typing import Any

import httpx

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}({{ p.type }}:{{ p.text }}){% endfor %}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments.port }}{% endfor %}{% endfor %}?"
)
USER = {"role": "user", "content": "Hi"}
CHAT = {"messages": [USER], "max_tokens": 8, "temperature": 0}


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}


async def chat_prompt(http: httpx.AsyncClient, *messages: object) -> tuple[str, list[str]]:
    """What becomes of messages, and the names of the fields that were bent."""
    reply = await http.post("/v1/chat/completions", json={**CHAT, "messages": messages, "explain": True})
    assert reply.status_code == 200, reply.text
    told = reply.json()["explain"]
    return told["prompts"][0]["text"].removeprefix("<s>"), [bent["field"] for bent in told["bent"]]
