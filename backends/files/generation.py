"""The marks of turns that have well-known names, and how a folder's smaller files are read."""

import os
from pathlib import Path
from typing import Any

from tightrope.backends.files.json import read_object

MAX_FILE = 64 << 20  # In bytes. The longest real ones list every added token.

# Tokens that end a turn in every family that has them, and tokens that begin one; fine-tunes often flag neither and
# leave them out of generation_config.json. From llama.cpp's list and the files of published models.
TURN_ENDS = frozenset(
    {
        *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|eom|>", "<|end_of_text|>", "<|endoftext|>"),
        *("<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>"),
        *("<end_of_turn>", "<|end_of_turn|>", "<|endofturn|>", "[|endofturn|]", "<|END_OF_TURN_TOKEN|>"),
        *("<end_of_utterance>", "<|end▁of▁sentence|>", "<｜end▁of▁sentence｜>", "<|end_of_sentence|>"),
        *("<EOT>", "▁<EOT>", "[EOT]", "<eoa>", "<eod>", "<seed:eos>", "[e~["),
    }
)
HARMONY_ENDS = frozenset({"<|return|>", "<|call|>"})  # Where they are, <|end|> ends a message within a turn.
TURN_STARTS = frozenset(
    {
        *("<|im_start|>", "<|im_middle|>", "<|im_system|>", "<|im_user|>", "<|im_assistant|>"),
        *("<|start_header_id|>", "<|end_header_id|>", "<|header_start|>", "<|header_end|>"),
        *("<start_of_turn>", "<|start_of_role|>", "<|end_of_role|>", "<|START_OF_TURN_TOKEN|>"),
        *("<|startoftext|>", "<|begin_of_text|>", "<|begin▁of▁sentence|>", "<｜begin▁of▁sentence｜>", "<seed:bos>"),
        *("<｜User｜>", "<｜Assistant｜>", "<|system|>", "<|user|>", "<|assistant|>", "]~b]"),
        *("<|start|>", "<|message|>", "<|channel|>"),
        *("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
        *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    }
)


def read_optional(path: Path) -> dict[str, Any]:
    """A JSON object that a folder may lack; empty if it does. Raises BackendError when it is malformed, or a link to
    what is gone.

    Numbers may be NaN or infinite: a limit such as model_max_length is written so where there is none.
    """
    return read_object(path, MAX_FILE, finite=False) if os.path.lexists(path) else {}
