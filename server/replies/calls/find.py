"""Which family of call formats a template speaks of."""

import re

from tightrope.server.replies.calls.form import CallForm
from tightrope.server.replies.calls.json_calls import JsonCalls

HERMES = JsonCalls("<tool_call>", "</tool_call>")
LLAMA = JsonCalls("", arguments_key="parameters", also_opening="<|python_tag|>")


_TOOLS = re.compile(r"\btools\b")


def call_form(template: str) -> CallForm:
    """The form that a chat template speaks of; that of Hermes if it speaks of none."""
    is_llama = HERMES.opening not in template and _TOOLS.search(template) is not None and '"parameters"' in template
    return LLAMA if is_llama else HERMES
