"""What many kinds of clients ask of a server, drawn at random: each kind is one entry of KINDS."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

from bench.bad_bodies import BAD_BODIES, CHAT, COMPLETIONS, GENERATE
from bench.workloads import prose

ADAPTER, GUEST_FOLDER, ADMIN_KEY = "warm", "guest", "admin-of-the-soak"
_PERSON: Mapping[str, Any] = {  # a JSON schema
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer"},
        "is_kind": {"type": "boolean"},
    },
    "required": ["name", "age", "is_kind"],
    "additionalProperties": False,
}
_guests = count()

Expected = Literal["stream", "whole", "refusal", "nothing"]
Check = Callable[[Any], bool]  # of the JSON of a whole answer


@dataclass(frozen=True, slots=True)
class Ask:
    """One request and what should come of it.

    hang_up_events: leave after so many events; hang_up_s: leave after this time, whatever has come. missing: bytes
    that are announced and never sent. is_tried_again: until an engine has done it, however many die of it.
    """

    kind: str
    path: str
    payload: bytes | None
    expected: Expected = "whole"
    headers: Mapping[str, str] = field(default_factory=dict)
    check: Check | None = None
    hang_up_events: int | None = None
    hang_up_s: float | None = None
    missing: int = 0
    is_tried_again: bool = False


Maker = Callable[[random.Random], Sequence[Ask]]


def _json(body: object) -> bytes:
    return json.dumps(body).encode()


def _salt(draw: random.Random) -> str:
    return str(draw.getrandbits(48))


def _sampling(draw: random.Random, max_tokens: int) -> dict[str, object]:
    return {"temperature": draw.choice([0, 0.7, 1.2]), "seed": draw.getrandbits(32), "max_tokens": max_tokens}


def _chat_body(draw: random.Random, words: int = 20) -> dict[str, object]:
    return {
        "messages": [{"role": "user", "content": prose(_salt(draw), words)}],
        **_sampling(draw, draw.randint(4, 48)),
    }


def _chat(draw: random.Random) -> list[Ask]:
    return [Ask("chat", CHAT, _json({**_chat_body(draw), "stream": True}), "stream")]


def _growing_chat(draw: random.Random) -> list[Ask]:
    """Three turns of one chat, each of which repeats those before it."""
    salt = _salt(draw)
    turns = [{"role": "system", "content": prose(salt, 60)}]
    asks = []
    for turn in range(3):
        turns = [*turns, {"role": "user", "content": prose(f"{salt} {turn}", 25)}]
        asks.append(
            Ask("growing chat", CHAT, _json({"messages": turns, **_sampling(draw, 12), "stream": True}), "stream")
        )
        turns = [*turns, {"role": "assistant", "content": prose(f"{salt} answer {turn}", 10)}]
    return asks


def _several(draw: random.Random) -> list[Ask]:
    n = draw.randint(2, 4)
    body = {"prompt": prose(_salt(draw), 15), "n": n, **_sampling(draw, 16), "temperature": 1.0}
    if draw.random() < 0.5:
        return [Ask("n > 1", COMPLETIONS, _json({**body, "stream": True}), "stream")]
    return [Ask("n > 1", COMPLETIONS, _json(body), check=lambda answer: len(answer["choices"]) == n)]


def _tgi(draw: random.Random) -> list[Ask]:
    body = {"inputs": prose(_salt(draw), 20), "parameters": {"max_new_tokens": draw.randint(2, 32), "do_sample": True}}
    if draw.random() < 0.5:
        return [Ask("generate", "/generate_stream", _json(body), "stream")]
    return [Ask("generate", GENERATE, _json(body), check=lambda answer: isinstance(answer["generated_text"], str))]


def _is_person(answer: Any) -> bool:  # noqa: ANN401 - what the server has sent
    choice = answer["choices"][0]
    return choice["finish_reason"] != "stop" or set(json.loads(choice["message"]["content"])) == {
        *_PERSON["properties"]
    }


def _grammar(draw: random.Random) -> list[Ask]:
    shapes: list[dict[str, object]] = [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": _PERSON}}},
        {"guided_regex": f"[a-z]{{1,{draw.randint(3, 30)}}} [0-9]+"},  # a bound of its own, so that it is compiled anew
        {"grammar_string": 'root ::= word (" " word)*\nword ::= [a-z]+'},
        {"guided_choice": ["yes", "no", prose(_salt(draw), 4)]},
    ]
    place = draw.randrange(len(shapes))
    body = {**_chat_body(draw), "max_tokens": 40, **shapes[place]}
    if place and draw.random() < 0.5:
        return [Ask("grammar", CHAT, _json({**body, "stream": True}), "stream")]
    return [Ask("grammar", CHAT, _json(body), check=None if place else _is_person)]


def _adapter(draw: random.Random) -> list[Ask]:
    body = {**_chat_body(draw), "model": ADAPTER, "adapter_scale": draw.choice([0.5, 1.0]), "stream": True}
    return [Ask("adapter", CHAT, _json(body), "stream")]


def _guest_adapter(draw: random.Random) -> list[Ask]:
    """An adapter that is loaded, used and unloaded."""
    name, key = f"guest-{next(_guests)}", {"Authorization": f"Bearer {ADMIN_KEY}"}
    load, unload = {"lora_name": name, "lora_path": GUEST_FOLDER}, {"lora_name": name}
    return [
        Ask("adapter loaded", "/v1/load_lora_adapter", _json(load), headers=key, is_tried_again=True),
        Ask(
            "adapter used", COMPLETIONS, _json({"model": name, "prompt": prose(_salt(draw), 10), **_sampling(draw, 8)})
        ),
        Ask("adapter unloaded", "/v1/unload_lora_adapter", _json(unload), headers=key, is_tried_again=True),
    ]


def _cancel(draw: random.Random) -> list[Ask]:
    """A client that leaves: after some events, at any time, or in the middle of its body."""
    body = {**_chat_body(draw, draw.choice([10, 300])), "max_tokens": 400, "n": draw.choice([1, 1, 3]), "stream": True}
    how = draw.randrange(4)
    if how == 0:
        return [Ask("cancel", CHAT, _json(body), "nothing", hang_up_events=draw.randint(1, 20))]
    if how == 1:
        return [Ask("cancel", CHAT, _json({**body, "stream": False}), "nothing", hang_up_s=draw.uniform(0, 1))]
    if how == 2:
        return [Ask("cancel", CHAT, _json(body), "nothing", hang_up_s=draw.uniform(0, 0.3))]
    return [Ask("cancel", CHAT, _json(body)[:-20], "nothing", hang_up_s=draw.uniform(0, 0.1), missing=20)]


def _long_prompt(draw: random.Random) -> list[Ask]:
    body = {"prompt": prose(_salt(draw), draw.randint(150, 400)), **_sampling(draw, 4)}
    return [Ask("long prompt", COMPLETIONS, _json({**body, "stream": True}), "stream")]


def _scored(draw: random.Random) -> list[Ask]:
    body = {"prompt": prose(_salt(draw), 40), "echo": True, "logprobs": 3, "max_tokens": 1}
    return [Ask("scored prompt", COMPLETIONS, _json(body), check=lambda answer: answer["choices"][0]["logprobs"])]


def _batch(draw: random.Random) -> list[Ask]:
    prompts = [prose(_salt(draw), 8) for _ in range(draw.randint(2, 6))]
    body = {"prompt": prompts, **_sampling(draw, 6)}
    return [Ask("batch", COMPLETIONS, _json(body), check=lambda answer: len(answer["choices"]) == len(prompts))]


def _negative_prompt(draw: random.Random) -> list[Ask]:
    body = {"prompt": prose(_salt(draw), 12), "negative_prompt": "Sad.", "guidance_scale": 1.5, **_sampling(draw, 10)}
    return [Ask("negative prompt", COMPLETIONS, _json({**body, "stream": True}), "stream")]


def _other_dialects(draw: random.Random) -> list[Ask]:
    text, few = prose(_salt(draw), 12), {"num_predict": 8}
    messages = [{"role": "user", "content": text}]
    asks: list[tuple[str, object]] = [
        ("/api/chat", {"messages": messages, "stream": False, "options": few}),
        ("/api/generate", {"prompt": text, "stream": False, "options": few}),
        ("/api/v1/generate", {"prompt": text, "max_length": 8}),
        ("/completion", {"prompt": text, "n_predict": 8}),
    ]
    path, body = draw.choice(asks)
    return [Ask("other dialects", path, _json(body))]


def _no_answer(draw: random.Random) -> list[Ask]:
    """What needs no step of the model."""
    text = prose(_salt(draw), draw.choice([10, 500]))
    asks: list[tuple[str, object]] = [
        ("/tokenize", {"prompt": text}),
        ("/tokenize", {"inputs": text}),
        ("/v1/models", None),
        ("/info", None),
        ("/metrics", None),
        ("/props", None),
    ]
    path, body = draw.choice(asks)
    return [Ask("no answer", path, None if body is None else _json(body))]


def _bad(draw: random.Random) -> list[Ask]:
    name, bad = draw.choice([*BAD_BODIES.items()])
    return [Ask(f"bad: {name}", bad.path, bad.payload, "refusal", bad.headers)]


# how often each comes, and who makes it
KINDS: Mapping[str, tuple[int, Maker]] = {
    "chat": (5, _chat),
    "growing chat": (2, _growing_chat),
    "n > 1": (2, _several),
    "generate": (3, _tgi),
    "grammar": (3, _grammar),
    "adapter": (2, _adapter),
    "guest adapter": (1, _guest_adapter),
    "cancel": (4, _cancel),
    "long prompt": (1, _long_prompt),
    "scored prompt": (1, _scored),
    "batch": (1, _batch),
    "negative prompt": (1, _negative_prompt),
    "other dialects": (2, _other_dialects),
    "no answer": (3, _no_answer),
    "bad": (4, _bad),
}


def draw_asks(draw: random.Random) -> Sequence[Ask]:
    """What one client asks next, one after the other."""
    weights = [weight for weight, _ in KINDS.values()]
    [(_, make)] = draw.choices([*KINDS.values()], weights)
    return make(draw)
