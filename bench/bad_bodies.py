"""Requests that no server should take: each must be answered with a status from 400 to 499, and nothing else happen."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

CHAT, COMPLETIONS, GENERATE = "/v1/chat/completions", "/v1/completions", "/generate"
Body = dict[str, object]


@dataclass(frozen=True, slots=True)
class Bad:
    """A body, its path, and headers beside the usual ones."""

    path: str
    payload: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


def _json(path: str, body: object, **headers: str) -> Bad:
    return Bad(path, json.dumps(body).encode(), {name.replace("_", "-"): value for name, value in headers.items()})


def _said(content: object, **fields: object) -> Body:
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 4, **fields}


def _asked(**fields: object) -> Body:
    return {"prompt": "Once", "max_tokens": 4, **fields}


def _told(**parameters: object) -> Body:
    return {"inputs": "Once", "parameters": {"max_new_tokens": 4, **parameters}}


_LOOP = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}

BAD_BODIES: Mapping[str, Bad] = {
    # no JSON, or not the server's
    "nothing": Bad(COMPLETIONS, b""),
    "half an object": Bad(CHAT, b'{"messages": ['),
    "no UTF-8": Bad(COMPLETIONS, b'{"prompt": "\xff\xfe"}'),
    "NaN": Bad(COMPLETIONS, b'{"prompt": "Once", "temperature": NaN}'),
    "many brackets": Bad(COMPLETIONS, b"[" * 100_000),
    "deep lists": Bad(COMPLETIONS, b'{"prompt": ' + b"[" * 20_000 + b"]" * 20_000 + b"}"),
    "number of 10,000 digits": Bad(COMPLETIONS, b'{"prompt": "Once", "max_tokens": ' + b"9" * 10_000 + b"}"),
    "a list": _json(CHAT, []),
    "a form": _json(COMPLETIONS, _asked(), Content_Type="application/x-www-form-urlencoded"),
    "another host": _json(COMPLETIONS, _asked(), Host="example.org"),
    "3 MB": _json(COMPLETIONS, _asked(prompt="a " * 1_500_000)),
    "no such route": _json("/v1/engines/x/completions", _asked()),
    # wrong values
    "no messages": _json(CHAT, {"messages": []}),
    "a role that is none": _json(CHAT, {"messages": [{"role": 7, "content": "Hi"}]}),
    "an image": _json(CHAT, _said([{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}])),
    "no prompt": _json(COMPLETIONS, _asked(prompt="")),
    "ids out of the vocabulary": _json(COMPLETIONS, _asked(prompt=[2**31])),
    "negative ids": _json(COMPLETIONS, _asked(prompt=[-1])),
    "too many prompts": _json(COMPLETIONS, _asked(prompt=["Once"] * 5000)),
    "a prompt beyond the window": _json(COMPLETIONS, _asked(prompt="word " * 100_000)),
    "fewer tokens than none": _json(COMPLETIONS, _asked(max_tokens=-2)),
    "a billion answers": _json(COMPLETIONS, _asked(n=10**9)),
    "cold": _json(COMPLETIONS, _asked(temperature=-1)),
    "top_p above 1": _json(COMPLETIONS, _asked(top_p=1.5)),
    "many alternatives": _json(COMPLETIONS, _asked(logprobs=10_000)),
    "a stop that is no text": _json(COMPLETIONS, _asked(stop=7)),
    "an unknown model": _json(COMPLETIONS, _asked(model="no-such-model")),
    # grammars that can't be
    "a schema that is none": _json(CHAT, _said("Hi", guided_json={"type": "nonsense"})),
    "a schema in a circle": _json(CHAT, _said("Hi", guided_json=_LOOP)),
    "an open regex": _json(COMPLETIONS, _asked(guided_regex="(")),
    "an endless repeat": _json(COMPLETIONS, _asked(guided_regex="((((a*)*)*)*){1,10000}")),
    "left recursion": _json(COMPLETIONS, _asked(grammar_string='root ::= root "a" | "b"')),
    "a rule from nowhere": _json(COMPLETIONS, _asked(grammar_string="root ::= nowhere")),
    # text-generation-inference
    "no inputs": _json(GENERATE, {"parameters": {}}),
    "no new tokens": _json(GENERATE, _told(max_new_tokens=0)),
    "a temperature of zero": _json(GENERATE, _told(temperature=0)),
    "a watermark that is no yes or no": _json(GENERATE, _told(watermark="twice")),
    "an unknown adapter": _json(GENERATE, _told(adapter_id="no-such-adapter")),
    "more answers than may be": _json(GENERATE, _told(best_of=1000, do_sample=True)),
}
