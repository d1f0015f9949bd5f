"""Ollama's Python package: texts, streams, tools and their results, shapes, what is there and what is loaded."""

import json
import os
import sys
from importlib.metadata import version

import ollama

client = ollama.Client(host=os.environ["URL"])
QUESTION = {"role": "user", "content": "Repeat after me: Hello, Mary!"}
OPTIONS = {"temperature": 0, "num_predict": 30}
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["seven"]}}, "required": ["a"], "additionalProperties": False}


def tell(**what: object) -> None:
    sys.stdout.write(json.dumps(what) + "\n")


def tide(port: str) -> str:
    """Tell the tide of a port.

    Args:
      port: its name
    """
    return f"High at nine in {port}."


tell(version=version("ollama"))
(model,) = client.list().models
tell(listed=model.model, running=client.ps().models[0].model, capabilities=client.show(model.model).capabilities)
tell(text=client.chat(model=model.model, messages=[QUESTION], options=OPTIONS).message.content)
pieces = client.chat(model=model.model, messages=[QUESTION], options=OPTIONS, stream=True)
tell(streamed="".join(piece.message.content for piece in pieces))
tell(generated=client.generate(model=model.model, prompt=QUESTION["content"], options=OPTIONS).response)

ask = {"role": "user", "content": "How is the tide in Hull?"}
call = {"function": {"name": "tide", "arguments": {"port": "Hull"}}}
turns = [
    ask,
    {"role": "assistant", "content": "", "tool_calls": [call]},
    {"role": "tool", "tool_name": "tide", "content": tide("Hull")},
]
after = client.chat(model=model.model, messages=turns, tools=[tide], options=OPTIONS)
tell(after=bool(after.message.content or after.message.tool_calls))
shaped = client.chat(model=model.model, messages=[QUESTION], format=SCHEMA, options=OPTIONS)
tell(shape=json.loads(shaped.message.content))
try:
    client.generate(model=model.model, prompt="a", options={"temperature": -1})
except ollama.ResponseError as error:
    tell(error=error.error, status=error.status_code)
