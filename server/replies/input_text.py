"""The text in the arguments of a function that takes one text alone: what a custom tool is called with."""

import json
import re

INPUT = "input"  # The name of that argument.
_BEGIN = re.compile(rf'\s*\{{\s*"{INPUT}"\s*:\s*"')
# Characters and escapes of JSON that are whole; the first half of a character waits for the second.
_WHOLE = re.compile(
    r'(?:[^"\\]|\\[^u]|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[0-9a-fA-F]{4}|\\u(?![dD][89abAB])[0-9a-fA-F]{4})*'
)


class InputText:
    """Reads the JSON text of one call's arguments while it comes."""

    def __init__(self) -> None:
        self._held = ""
        self._has_begun = self._is_over = False

    def feed(self, text: str) -> str:
        """What the input has gained by some more of the arguments."""
        if self._is_over:
            return ""
        self._held += text
        if not self._has_begun:
            if (begin := _BEGIN.match(self._held)) is None:
                return ""
            self._has_begun, self._held = True, self._held[begin.end() :]
        whole = _WHOLE.match(self._held)
        assert whole is not None
        self._held = self._held[whole.end() :]
        self._is_over = self._held.startswith('"')
        made: str = json.loads(f'"{whole[0]}"', strict=False)
        return made

    def finish(self) -> str:
        """Arguments of another shape are the input as they are."""
        return "" if self._has_begun else self._held
