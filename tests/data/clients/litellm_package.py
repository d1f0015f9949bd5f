"""LiteLLM by the providers that fit this server: openai, ollama, ollama_chat, anthropic."""

import json
import os
import sys

import litellm

litellm.suppress_debug_info = True
URL = os.environ["URL"]
QUESTION = [{"role": "user", "content": "Repeat after me: Hello, Mary!"}]
PROVIDERS = {
    "openai": {"model": "openai/tgi", "api_base": f"{URL}/v1", "api_key": "none"},
    "ollama": {"model": "ollama/any", "api_base": URL},
    "ollama_chat": {"model": "ollama_chat/any", "api_base": URL},
    "anthropic": {"model": "anthropic/claude-3-haiku-20240307", "api_base": URL, "api_key": "none"},
}
for name, fields in PROVIDERS.items():
    shared = {**fields, "messages": QUESTION, "max_tokens": 30, "temperature": 0, "num_retries": 0}
    whole = litellm.completion(**shared)
    stream = litellm.completion(**shared, stream=True)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    told = {"text": whole.choices[0].message.content, "finish": whole.choices[0].finish_reason, "streamed": streamed}
    sys.stdout.write(json.dumps({name: told | {"tokens": whole.usage.completion_tokens}}) + "\n")
answer = litellm.responses(
    model="openai/tgi",
    api_base=f"{URL}/v1",
    api_key="none",
    input=QUESTION[0]["content"],
    max_output_tokens=30,
    temperature=0,
)
sys.stdout.write(json.dumps({"responses": answer.output[-1].content[0].text}) + "\n")
