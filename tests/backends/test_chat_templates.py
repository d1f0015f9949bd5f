"""Chat templates where each format keeps them, and which of several writes a chat."""

import json
from pathlib import Path

import pytest
from fake_api import api
from gguf import GGUFWriter
from msgspec import structs

from tightrope.backends.errors import BackendError
from tightrope.backends.files.chat_templates import chat_templates
from tightrope.backends.files.gguf.header import read_header
from tightrope.engine.types import ModelInfo
from tightrope.server.prompts.templates import ChatTemplate

pytestmark = pytest.mark.quick

NAMED = '{"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}'


@pytest.mark.parametrize(
    ("files", "templates"),
    [
        ({"chat_template.jinja": "file", "tokenizer_config.json": '{"chat_template": "old"}'}, {"default": "file"}),
        ({"chat_template.jinja": "a\r\nb"}, {"default": "a\nb"}),
        ({"tokenizer_config.json": '{"chat_template": "one"}'}, {"default": "one"}),
        ({"tokenizer_config.json": NAMED}, {"tool_use": "t", "default": "d"}),
        ({"chat_template.jinja": "file", "tokenizer_config.json": NAMED}, {"default": "file"}),
        (
            {"chat_template.jinja": "file", "additional_chat_templates/tool_use.jinja": "calls"},
            {"default": "file", "tool_use": "calls"},
        ),
        (
            {"tokenizer_config.json": NAMED, "additional_chat_templates/rag.jinja": "r"},
            {"tool_use": "t", "default": "d", "rag": "r"},
        ),
        (
            {"tokenizer_config.json": '{"chat_template": [{"name": "only", "template": "o"}]}'},
            {"only": "o", "default": "o"},
        ),
        ({"tokenizer_config.json": '{"chat_template": {"a": "a", "b": "b"}}'}, {"a": "a", "b": "b"}),
        ({"chat_template.json": '{"chat_template": "of a vision model"}'}, {"default": "of a vision model"}),
        ({"chat_template.json": NAMED}, {"tool_use": "t", "default": "d"}),
        ({"tokenizer_config.json": "{}"}, {}),
        ({}, {}),
    ],
)
def test_templates_are_found_where_each_version_put_them(
    tmp_path: Path, files: dict[str, str], templates: dict[str, str]
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    assert chat_templates(tmp_path) == templates


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("tokenizer_config.json", b'{"chat_template": 7}', r"tokenizer_config\.json: chat_template is 7; it must be"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "a"}]}', r"json: chat_template is .* it must be"),
        ("tokenizer_config.json", b"{", r"tokenizer_config\.json: not JSON"),
        ("chat_template.jinja", b"\xff\xfe", r"chat_template\.jinja: can't be read as UTF-8 text"),
        ("chat_template.jinja", b" " * (5 << 20), r"chat_template\.jinja: 5242880 bytes are too many"),
        ("additional_chat_templates/tool_use.jinja", b"\xff\xfe", r"tool_use\.jinja: can't be read as UTF-8 text"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_wrong_chat_template_is_one_line(tmp_path: Path, name: str, content: bytes, line: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BackendError, match=line):
        chat_templates(tmp_path)


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json", "chat_template.json"])
def test_a_link_to_a_template_that_is_gone_is_no_folder_without_one(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("../blobs/0123")
    with pytest.raises(BackendError, match=rf"{name}: a link to .*/blobs/0123, which is missing; bring that back"):
        chat_templates(tmp_path)


def test_more_templates_than_any_model_has_are_refused(tmp_path: Path) -> None:
    many = {f"t{i}": "x" for i in range(33)}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": many}))
    with pytest.raises(BackendError, match="33 templates; 32 are the most"):
        chat_templates(tmp_path)


def test_a_gguf_file_has_named_templates_beside_the_default_one(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_chat_template([{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert read_header(tmp_path / "m.gguf").chat_templates == (("tool_use", "t"),)


def info(*named: tuple[str, str]) -> ModelInfo:
    model = ModelInfo("m", "rules", "fake", 9, 9, 9, 9, "f16", 1, "<s>", "</s>", (), "d", ())
    return structs.replace(model, chat_templates=named)


NAMES = (("default", "d"), ("tool_use", "t"), ("rag", "r"))


@pytest.mark.parametrize(
    ("template", "plain", "with_tools"),
    [
        (ChatTemplate(info(*NAMES)), "d", "t"),
        (ChatTemplate(info()), "d", "d"),
        (ChatTemplate(info(("rag", "r"))), "d", "d"),
        (ChatTemplate(info(*NAMES), "mine"), "mine", "mine"),
        (ChatTemplate(info(*NAMES), "rag"), "r", "r"),
    ],
)
def test_the_template_called_tool_use_writes_chats_with_tools(
    template: ChatTemplate, plain: str, with_tools: str
) -> None:
    assert template.source_for(has_tools=False) == plain
    assert template.source_for(has_tools=True) == with_tools
    assert set(template.sources) == {plain, with_tools}


@pytest.mark.plain
async def test_a_request_that_may_call_tools_is_written_by_tool_use() -> None:
    words = "{% for m in messages %}{{ m.content }}{% endfor %}"
    named = {"tool_use": "{{ tools | map(attribute='function.name') | join }}" + words, "default": "plain " + words}
    ask = {"messages": [{"role": "user", "content": " hi?"}], "explain": True}
    tools = [{"type": "function", "function": {"name": "ring"}}]
    async with api("fine", chat_template=named["default"], chat_templates=named) as http:
        prompts = [
            (await http.post("/v1/chat/completions", json=ask | more)).json()["explain"]["prompts"][0]["text"]
            for more in ({}, {"tools": tools}, {"tools": tools, "tool_choice": "none"}, {"tools": []})
        ]
    assert [prompt.removeprefix("<s>") for prompt in prompts] == ["plain  hi?", "ring hi?", "plain  hi?", "plain  hi?"]
