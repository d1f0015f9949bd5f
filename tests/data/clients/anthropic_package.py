"""Anthropic's Python package: a text, a stream, a tool's round, thinking, counting, an error."""

import json
import os
import sys

import anthropic

client = anthropic.Anthropic(base_url=os.environ["URL"], api_key="none", max_retries=0)
GREEDY = {"temperature": 0}  # The package itself knows no temperature any more.
QUESTION = {"role": "user", "content": "Repeat after me: Hello, Mary!"}
TIDE = {
    "name": "tide",
    "description": "Tells the tide of a port.",
    "input_schema": {
        "type": "object",
        "properties": {"port": {"enum": ["Hull", "Rome"]}},
        "required": ["port"],
        "additionalProperties": False,
    },
}


def tell(**what: object) -> None:
    sys.stdout.write(json.dumps(what) + "\n")


tell(version=anthropic.__version__)
message = client.messages.create(model="claude-x", max_tokens=30, messages=[QUESTION], extra_body=GREEDY)
tell(text=message.content[0].text, stop_reason=message.stop_reason, output_tokens=message.usage.output_tokens)

with client.messages.stream(model="claude-x", max_tokens=30, messages=[QUESTION], extra_body=GREEDY) as stream:
    tell(streamed="".join(stream.text_stream), final=stream.get_final_message().content[0].text)

ask = {"role": "user", "content": "How is the tide in Hull?"}
forced = {"tools": [TIDE], "tool_choice": {"type": "tool", "name": "tide"}, "max_tokens": 60, "extra_body": GREEDY}
use = client.messages.create(model="claude-x", messages=[ask], **forced)
(called,) = use.content
tell(tool=called.name, input=called.input, tool_stop=use.stop_reason)
with client.messages.stream(model="claude-x", messages=[ask], **forced) as stream:
    (block,) = stream.get_final_message().content
    tell(streamed_input=block.input)

result = {"type": "tool_result", "tool_use_id": called.id, "content": "High at nine."}
turns = [ask, {"role": "assistant", "content": use.content}, {"role": "user", "content": [result]}]
after = client.messages.create(model="claude-x", max_tokens=20, messages=turns, tools=[TIDE], extra_body=GREEDY)
tell(after=[one.type for one in after.content])

counted = client.messages.count_tokens(model="claude-x", messages=[QUESTION])
tell(counted=counted.input_tokens, usage=message.usage.input_tokens + message.usage.cache_read_input_tokens)

try:
    client.messages.create(model="claude-x", max_tokens=5, messages=[{"role": "user", "content": "a " * 40000}])
except anthropic.BadRequestError as error:
    tell(error=error.body["error"]["message"])
