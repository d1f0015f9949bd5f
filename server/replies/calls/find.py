"""Which family of call forms a template speaks of. The marks that only one family has are looked for first."""

import re
from collections.abc import Sequence

from tightrope.server.replies.calls.form import CallForm
from tightrope.server.replies.calls.gemma import FUNCTION_GEMMA, GEMMA_4
from tightrope.server.replies.calls.json_calls import JsonCalls
from tightrope.server.replies.calls.mistral import LISTED, NAMED
from tightrope.server.replies.calls.pythonic import PYTHONIC
from tightrope.server.replies.calls.sections import DEEPSEEK, DEEPSEEK_V3, KIMI
from tightrope.server.replies.calls.tagged import BARE_FUNCTIONS, DEEPSEEK_V4, DEEPSEEK_V32, GLM, MINIMAX, QWEN_CODER

HERMES = JsonCalls("<tool_call>", "</tool_call>")
LLAMA = JsonCalls("", arguments_key="parameters", also_opening="<|python_tag|>")
FUNCTOOLS = JsonCalls("functools", is_list=True)
PHI = JsonCalls("<|tool_call|>", "<|/tool_call|>", is_list=True)
GRANITE = JsonCalls("<|tool_call|>", is_list=True)
COMMAND = JsonCalls("<|START_ACTION|>", "<|END_ACTION|>", "tool_name", "parameters", is_list=True)

_TOOLS = re.compile(r"\btools\b")
_PYTHON_CALL = re.compile(r"\[\s*func\w*\(\w*=|<\|python_start\|>")
_FORMS: Sequence[tuple[tuple[str, ...], CallForm]] = (  # All texts of a row stand in the template.
    ((GEMMA_4.opening,), GEMMA_4),
    ((FUNCTION_GEMMA.opening,), FUNCTION_GEMMA),
    ((DEEPSEEK.opening, "```json"), DEEPSEEK_V3),
    ((DEEPSEEK.opening,), DEEPSEEK),
    (("｜DSML｜", "function_calls"), DEEPSEEK_V32),
    (("｜DSML｜",), DEEPSEEK_V4),
    ((MINIMAX.opening,), MINIMAX),
    ((KIMI.opening,), KIMI),
    ((LISTED.opening, "[ARGS]"), NAMED),
    ((LISTED.opening,), LISTED),
    (("<arg_key>",), GLM),
    (("<function=", "<tool_call>"), QWEN_CODER),
    (("<function=", "<parameter="), BARE_FUNCTIONS),
    (("functools[",), FUNCTOOLS),
    ((COMMAND.opening,), COMMAND),
    ((PHI.opening, PHI.closing), PHI),
    ((GRANITE.opening,), GRANITE),
    ((HERMES.opening,), HERMES),
)


def call_form(template: str) -> CallForm:
    """The form that a chat template speaks of; that of Hermes if it speaks of none, or knows no tools."""
    if _TOOLS.search(template) is None:
        return HERMES
    found = next((form for marks, form in _FORMS if all(mark in template for mark in marks)), None)
    if found is not None:
        return found
    if _PYTHON_CALL.search(template) is not None:
        return PYTHONIC
    return LLAMA if '"parameters"' in template else HERMES
