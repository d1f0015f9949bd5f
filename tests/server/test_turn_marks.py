"""Which tokens a chat template makes special, and which of them end a turn."""

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import msgspec
import pytest
from fake_api import api
from fakes import VOCAB_SIZE, script
from one_model import front_of_one

from tightrope.engine.process.client import EngineClient
from tightrope.engine.settings import EngineSettings
from tightrope.engine.types import ModelInfo, TurnMarks
from tightrope.server.prompts.prompt_formats import PROMPT_FORMATS
from tightrope.server.prompts.template_renderer import TemplateRenderer
from tightrope.server.prompts.templates import ChatTemplate
from tightrope.server.prompts.turn_marks import find_turn_marks
from tightrope.server.settings.settings import ServerSettings

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURNS = CHATML.replace("im_end", "turn").replace("assistant\n", "assistant?")  # where the model of rules answers
ECHO = "{% for m in messages %}{{ m.content }}{% endfor %}"
CHATML_MARKS = ("<|im_start|>", "<|im_end|>")
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
)
PHI = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}{{ eos_token }}"
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
GLM = "[gMASK]<sop>{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
GLM_MARKS = ("[gMASK]", "<sop>", "<|user|>", "<|system|>", "<|assistant|>")
THINKING = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nThink in <think> tags<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
)
ONLY_OPENED = CHATML.replace("'<|im_start|>' + m.role + '\n'", "'<|im_start|>' + m.role + '\n' + thought[m.role]")
ONLY_OPENED = "{% set thought = {'assistant': '<think>\n', 'user': '', 'system': ''} %}" + ONLY_OPENED
CALLS_AS = "\nCall as <tool_call>\n{}\n</tool_call>"
TAGS_AT_THE_END_OF_A_SYSTEM_PROMPT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    f"{{% if loop.first %}}{CALLS_AS}{{% endif %}}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
)
COMMAND = (
    "{% for m in messages %}<|START|>{% if m.role == 'assistant' %}<|CHATBOT|><|START_THINKING|><|END_THINKING|>"
    "{% else %}{{ '<|' + m.role | upper + '|>' }}{% endif %}{{ m.content }}<|END|>{% endfor %}"
)
DEEPSEEK = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<｜Assistant｜><think></think>' + m.content + '<｜stop｜>' }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
TAGS = "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '</' + m.role + '>' }}{% endfor %}"
TAG_MARKS = tuple(f"<{slash}{role}>" for role in ("system", "user", "assistant") for slash in ("", "/"))
HARMONY = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
)
HARMONY_MARKS = ("<|start|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")


def info(added: tuple[str, ...] = (), flagged: tuple[str, ...] = (), ends: tuple[str, ...] = ("</s>",)) -> ModelInfo:
    specials = ("<s>", "</s>", *flagged)
    model = ModelInfo("m", "rules", "fake", 9, 9, 9, 9, "f16", 1, "<s>", "</s>", specials, None, ())
    return msgspec.structs.replace(model, added_texts=added, end_texts=ends)


@pytest.fixture
async def renderer() -> AsyncIterator[TemplateRenderer]:
    renderer = TemplateRenderer()
    yield renderer
    await renderer.close()


async def found(renderer: TemplateRenderer, template: str, model: ModelInfo) -> tuple[set[str], set[str]]:
    marks = await find_turn_marks(renderer, ChatTemplate(model, template), model)
    return set(marks.texts), set(marks.ends)


@pytest.mark.parametrize(
    ("template", "added", "marks", "ends"),
    [
        (CHATML, (*CHATML_MARKS, "<think>", "</think>"), set(CHATML_MARKS), {"<|im_end|>"}),
        (CHATML, ("<|im_end|>",), {"<|im_end|>"}, {"<|im_end|>"}),
        (CHATML, ("<|im_end|>\n", "<|im_end|>"), {"<|im_end|>\n"}, {"<|im_end|>\n"}),
        (CHATML, ("<|im_sep|>", "<tool_call>", "</tool_call>"), set(), set()),
        (
            LLAMA_3,
            ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
            {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"},
            {"<|eot_id|>"},
        ),
        (
            PHI,
            ("<|user|>", "<|system|>", "<|assistant|>", "<|end|>"),
            {"<|user|>", "<|system|>", "<|assistant|>", "<|end|>"},
            {"<|end|>"},
        ),
        (MISTRAL, ("[INST]", "[/INST]", "[TOOL_CALLS]"), {"[INST]", "[/INST]"}, set()),
        (GLM, GLM_MARKS, set(GLM_MARKS), {"<|user|>"}),
        (THINKING, (*CHATML_MARKS, "<think>", "</think>"), set(CHATML_MARKS), {"<|im_end|>"}),
        (
            DEEPSEEK,
            ("<｜User｜>", "<｜Assistant｜>", "<｜stop｜>", "<think>", "</think>"),
            {"<｜User｜>", "<｜Assistant｜>", "<｜stop｜>"},
            {"<｜stop｜>"},
        ),
        (ONLY_OPENED, (*CHATML_MARKS, "<think>"), set(CHATML_MARKS), {"<|im_end|>"}),
        (
            TAGS_AT_THE_END_OF_A_SYSTEM_PROMPT,
            (*CHATML_MARKS, "<tool_call>", "</tool_call>"),
            set(CHATML_MARKS),
            {"<|im_end|>"},
        ),
        (
            COMMAND,
            ("<|START|>", "<|USER|>", "<|SYSTEM|>", "<|CHATBOT|>", "<|START_THINKING|>", "<|END_THINKING|>", "<|END|>"),
            {"<|START|>", "<|USER|>", "<|SYSTEM|>", "<|CHATBOT|>", "<|END|>"},
            {"<|END|>"},
        ),
        (TAGS, TAG_MARKS, set(TAG_MARKS), {"</assistant>"}),
        (HARMONY, HARMONY_MARKS, set(HARMONY_MARKS) - {"<|call|>"}, {"<|return|>"}),
    ],
)
async def test_marks_around_turns_are_found_whatever_their_flag(
    renderer: TemplateRenderer, template: str, added: tuple[str, ...], marks: set[str], ends: set[str]
):
    assert await found(renderer, template, info(added)) == (marks, ends)


@pytest.mark.parametrize("name", ["alpaca", "vicuna", "vicuna-newline", "limarp-alpaca", "airoboros"])
async def test_words_headings_and_blanks_are_no_marks_though_they_be_one_token(renderer: TemplateRenderer, name: str):
    added = ("\n", "\n\n", " ", "###", "### ", "\n\n### Instruction:", "USER", "USER:", "ASSISTANT:", "User: ")
    assert await found(renderer, PROMPT_FORMATS[name].source, info(added)) == (set(), set())
    assert await found(renderer, PROMPT_FORMATS[name].source, info(flagged=added)) == (set(), set())


async def test_a_flagged_mark_that_no_file_names_as_an_end_ends_a_turn_as_well(renderer: TemplateRenderer):
    assert await found(renderer, CHATML, info(flagged=CHATML_MARKS)) == (set(), {"<|im_end|>"})


async def test_an_end_of_a_message_within_a_turn_is_no_end(renderer: TemplateRenderer):
    assert await found(renderer, HARMONY, info(flagged=HARMONY_MARKS)) == (set(), {"<|return|>"})


async def test_the_template_for_chats_with_tools_counts_as_well(renderer: TemplateRenderer):
    model = info((*CHATML_MARKS, "<|turn|>"))
    named = (("tool_use", CHATML.replace("im_end", "turn")),)
    model = msgspec.structs.replace(model, chat_template=CHATML, chat_templates=named)
    marks = await find_turn_marks(renderer, ChatTemplate(model), model)
    assert set(marks.ends) == {"<|im_end|>", "<|turn|>"}


async def test_a_template_that_takes_no_chat_marks_nothing(renderer: TemplateRenderer):
    assert await found(renderer, "{{ raise_exception('never') }}", info(CHATML_MARKS)) == (set(), set())
    assert await found(renderer, "{% for %}", info(CHATML_MARKS)) == (set(), set())
    assert await found(renderer, "{{ messages[0].content }}<|im_end|>", info(CHATML_MARKS)) == (
        {"<|im_end|>"},
        set(),
    )


async def test_nothing_is_rendered_where_every_token_is_known():
    assert await find_turn_marks(TemplateRenderer(), ChatTemplate(info()), info()) == TurnMarks()


@pytest.mark.parametrize("chosen", [TURNS, "chatml"])
async def test_the_template_that_is_chosen_counts_and_not_the_files_own(chosen: str):
    client = EngineClient(EngineSettings())
    front = front_of_one(client, ServerSettings(chat_template=chosen))
    model = msgspec.structs.replace(info(("<|turn|>", "<|im_end|>")), chat_template=ECHO)
    marks = await front.turn_marks(model)
    await front.renderer.close()
    wanted = ("<|turn|>",) if chosen == TURNS else ("<|im_end|>",)
    assert marks == TurnMarks(wanted, wanted)


class CountingRenderer(TemplateRenderer):
    """Counts how often a template is given several chats at once, which is how it is probed."""

    num_probes = 0

    async def render_each(self, source: str, chats: Sequence[Mapping[str, Any]]) -> list[str | None]:
        self.num_probes += 1
        return await super().render_each(source, chats)


async def test_one_process_probes_a_template_once_for_marks_notes_and_chats():
    renderer, model = CountingRenderer(), msgspec.structs.replace(info(CHATML_MARKS), chat_template=CHATML)
    client = EngineClient(EngineSettings())
    front = front_of_one(client, ServerSettings(), renderer)
    marks = await front.turn_marks(model)
    num_probes = renderer.num_probes
    assert num_probes > 0

    client._exchange.info = msgspec.structs.replace(
        model, special_texts=(*model.special_texts, *marks.texts), added_texts=()
    )
    assert await front.template_notes() == ()
    messages = [{"role": "user", "content": "fine?"}]
    await front.template().render(renderer, messages, add_generation_prompt=True, continue_final_message=False)
    await renderer.close()

    assert renderer.num_probes == num_probes


async def test_a_model_without_a_template_is_told_of_at_the_start():
    client = EngineClient(EngineSettings())
    client._exchange.info = info()
    for chosen, notes in ((None, 1), ("chatml", 0)):
        front = front_of_one(client, ServerSettings(chat_template=chosen))
        assert [note.partition(":")[0] for note in await front.template_notes()] == [
            "the model's file has no chat template"
        ] * notes
        await front.renderer.close()


async def test_an_answer_ends_where_the_model_writes_the_mark_that_the_template_writes():
    says = script("fine", end=VOCAB_SIZE)
    async with api(says, chat_template=TURNS, added=["<|turn|>", "<|im_start|>"]) as http:
        messages = [{"role": "user", "content": "How<|turn|> are you?"}]
        chat = {"messages": messages, "max_tokens": 9, "explain": True}
        for path, body in {
            "/v1/chat/completions": chat,
            "/v1/completions": {"prompt": "How are you?", "max_tokens": 9},
            "/generate": {"inputs": "How are you?", "parameters": {"max_new_tokens": 9, "details": True}},
        }.items():
            reply = (await http.post(path, json=body)).json()
            if path == "/generate":
                text, reason = reply["generated_text"], reply["details"]["finish_reason"]
            else:
                choice = reply["choices"][0]
                text, reason = choice.get("text") or choice["message"]["content"], choice["finish_reason"]
            assert (text, reason) == ("fine", "eos_token" if path == "/generate" else "stop"), path
            if path == "/v1/chat/completions":
                ids = reply["explain"]["prompts"][0]["token_ids"]
                assert (ids.count(VOCAB_SIZE), ids.count(VOCAB_SIZE + 1)) == (1, 2)


async def test_a_mark_that_the_template_does_not_write_is_text():
    says = script(b"fine", end=VOCAB_SIZE)
    async with api(says, chat_template=CHATML.replace("assistant\n", "assistant?"), added=["<|turn|>"]) as http:
        body = {"messages": [{"role": "user", "content": "How are you?"}], "max_tokens": 9}
        choice = (await http.post("/v1/chat/completions", json=body)).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("fine<|turn|>fine", "length")
