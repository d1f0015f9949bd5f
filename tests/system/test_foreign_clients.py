"""Clients in their newest versions, each installed apart from this project, against the real server on both engines."""

from pathlib import Path

import pytest
from installed import run_node, run_python

pytestmark = pytest.mark.slow

CLIENTS = Path(__file__).parents[1] / "data" / "clients"
ANSWER = "Hello, Mary!"
PORTS = [{"port": "Hull"}, {"port": "Rome"}]


@pytest.fixture(scope="module", params=["gguf", "torch"])
def url(request: pytest.FixtureRequest) -> str:
    served: str = request.getfixturevalue("server_url" if request.param == "gguf" else "torch_server_url")
    return served


def test_anthropic_chats_streams_uses_tools_and_counts(url: str) -> None:
    told = run_python(CLIENTS / "anthropic_package.py", "anthropic", url=url)
    assert told["text"] == told["streamed"] == told["final"] == ANSWER
    assert told["stop_reason"] == "end_turn"
    assert (told["tool"], told["tool_stop"]) == ("tide", "tool_use")
    assert told["input"] == told["streamed_input"]
    assert told["input"] in PORTS
    assert told["after"]
    assert told["counted"] == told["usage"]
    assert str(told["error"]).startswith("prompt is too long: ")


def test_openais_javascript_answers_and_chats(url: str) -> None:
    told = run_node(CLIENTS / "openai_package.mjs", "openai", url=url)
    assert told["text"] == told["streamed"] == told["final"] == told["chat"] == ANSWER
    assert told["status"] == "completed"
    assert told["tool"] == "tide"
    assert told["input"] in PORTS
    assert told["after"]
    assert told["status_of_error"] == 400
    assert "no answer is stored" in str(told["error"])


def test_vercels_sdk_speaks_by_both_of_its_providers(url: str) -> None:
    told = run_node(CLIENTS / "ai_sdk.mjs", "ai", "@ai-sdk/openai", "@ai-sdk/anthropic", "zod", url=url)
    assert told.keys() == {"responses", "chat", "messages"}
    for name, made in told.items():
        assert isinstance(made, dict)
        assert made["text"] == made["streamed"] == ANSWER, name
        assert (made["finish"], made["steps"], made["used"] > 0) == ("stop", 2, True), name
        assert made["object"] == {"a": "seven"}, name
        assert made["tokens"] > 0, name


def test_ollamas_packages_chat_stream_shape_and_use_tools(url: str) -> None:
    by_python = run_python(CLIENTS / "ollama_package.py", "ollama", url=url)
    by_node = run_node(CLIENTS / "ollama_package.mjs", "ollama", url=url)
    for told in (by_python, by_node):
        assert told["text"] == told["streamed"] == ANSWER
        assert told["listed"] == told["running"]
        assert told["after"]
        assert told["shape"] == {"a": "seven"}
    assert by_python["generated"] == ANSWER
    assert by_python["capabilities"] == ["completion"]
    assert (by_python["status"], "temperature" in str(by_python["error"])) == (400, True)


def test_litellm_answers_by_every_provider_that_fits(url: str) -> None:
    told = run_python(CLIENTS / "litellm_package.py", "litellm", url=url)
    assert told.pop("responses") == ANSWER
    assert told.keys() == {"openai", "ollama", "ollama_chat", "anthropic"}
    for name, made in told.items():
        assert isinstance(made, dict)
        assert made["text"] == made["streamed"], name
        assert made["text"].startswith(ANSWER), name  # For "ollama" it writes the prompt itself.
        assert (made["finish"], made["tokens"] > 0) == ("stop", True), name


def test_instructor_gets_objects_in_each_of_its_ways(url: str) -> None:
    told = run_python(CLIENTS / "instructor_package.py", "instructor", url=url)
    assert len(told) == 2
    for mode, person in told.items():
        assert isinstance(person, dict)
        assert person.keys() == {"name", "age"}, mode


def test_pydantic_ai_answers_streams_and_gets_objects(url: str) -> None:
    told = run_python(CLIENTS / "pydantic_ai_package.py", "pydantic-ai-slim[openai,anthropic]", url=url)
    assert told.keys() == {"chat", "responses", "messages"}
    for name, made in told.items():
        assert isinstance(made, dict)
        assert made["text"] == made["streamed"] == ANSWER, name
        assert made["by_tool"]["name"] in ("Mary", "Tom"), name
        assert name == "messages" or made["shaped"]["name"] in ("Mary", "Tom"), name
