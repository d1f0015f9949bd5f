"""What llama.cpp says that it allocates, read from its log."""

import logging
import re
from collections import Counter

import pytest

LINE = re.compile(r"(\S+)\s+(model|KV|RS|output|compute) buffer size =\s+([\d.]+) MiB")


def allocated(caplog: pytest.LogCaptureFixture) -> Counter[tuple[str, str]]:
    """Bytes by (device, kind of buffer) since the log was cleared; CPU is everything in the host's memory."""
    sizes: Counter[tuple[str, str]] = Counter()
    for record in caplog.records:
        if record.name == "tightrope.gguf" and (match := LINE.search(record.getMessage())):
            device = "CPU" if match[1].startswith("CPU") or match[1].endswith("_Host") else match[1]
            sizes[device, match[2]] += int(float(match[3]) * (1 << 20))
    return sizes


def listen(caplog: pytest.LogCaptureFixture) -> None:
    """Keep llama.cpp's lines from now on."""
    caplog.set_level(logging.DEBUG, "tightrope.gguf")
    caplog.clear()
