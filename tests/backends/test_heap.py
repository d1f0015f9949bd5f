"""What this process has freed, and whether the system has it back."""

import subprocess
import sys

import pytest

SCRIPT = """
import os
from tightrope.backends import heap
from tightrope.backends.memory import private_memory

bytearray(30 << 20)  # Having seen it freed, the library takes blocks of up to that size from its heap.
if {is_told}:
    heap.map_from(1 << 20)
blocks = [bytearray(b"x") * (2 << 20) for _ in range(32)]
before = private_memory(os.getpid())
del blocks[::2]
print((before - private_memory(os.getpid())) >> 20)
"""


@pytest.mark.parametrize(("is_told", "least", "most"), [(True, 30, 34), (False, -4, 8)])
def test_large_blocks_go_back_when_they_are_freed_though_others_lie_between(is_told: bool, least: int, most: int):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(is_told=is_told)], capture_output=True, text=True, check=True
    )
    assert least <= int(done.stdout) <= most
