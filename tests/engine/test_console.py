"""What is printed and logged: texts of files and clients stand in it, and none of them steers a terminal."""

import logging
import sys
from pathlib import Path

import pytest
from gguf import GGUFWriter
from hypothesis import given
from hypothesis import strategies as st

from tightrope.engine.console import LineFormatter, printable, printable_lines
from tightrope.server.cli.main import main

pytestmark = pytest.mark.quick

RED = "\x1b[31mred\x1b[0m"
TITLE = "\x1b]0;owned\x07"


@given(st.text())
def test_a_printed_line_is_one_line_and_has_nothing_that_steers(text: str) -> None:
    line = printable(text)
    assert len(line.splitlines()) <= 1
    assert not any(ord(char) < 32 or 127 <= ord(char) < 160 or char in "\u202e\u2066\u2028" for char in line)
    assert line.encode().decode() == line
    assert printable(line) == line


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (RED, "\\x1b[31mred\\x1b[0m"),
        ("one\ntwo\r\tthree", "one\\ntwo\\r\\tthree"),
        ("\x9b31m", "\\x9b31m"),
        ("gpj.\u202eexe", "gpj.\\u202eexe"),
        ("\ud800", "\\ud800"),
        ("grün, 模型, 👩‍👩‍👧, שלום, C:\\models", "grün, 模型, 👩‍👩‍👧, שלום, C:\\models"),
    ],
)
def test_what_steers_is_shown_as_an_escape_and_writing_stays(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_a_text_of_several_lines_keeps_them() -> None:
    assert printable_lines(f"def f():\n\treturn {RED}\r\n") == "def f():\n\treturn \\x1b[31mred\\x1b[0m\\r\n"


def test_a_log_line_quotes_without_being_steered() -> None:
    record = logging.LogRecord("tightrope", logging.ERROR, "f.py", 1, "failed: %s", (f"{RED}\nERROR forged",), None)
    formatter = LineFormatter("%(levelname)s %(name)s: %(message)s")
    assert formatter.format(record) == "ERROR tightrope: failed: \\x1b[31mred\\x1b[0m\\nERROR forged"
    try:
        raise ValueError(TITLE)
    except ValueError:
        record.exc_info, record.exc_text = sys.exc_info(), None
    first, *trace = formatter.format(record).splitlines()
    assert first.endswith("forged")
    assert trace[0].startswith("Traceback")
    assert trace[-1] == "ValueError: \\x1b]0;owned\\x07"


def test_a_file_cannot_steer_the_terminal_of_who_asks_about_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, f"{RED}{TITLE}")
    writer.add_name(RED)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert main(["plan", str(path)]) == 1
    assert main(["plan", str(tmp_path / RED)]) == 1
    assert main(["plan", str(path), "--memory", RED]) == 2
    told = capfd.readouterr()
    assert "\x1b" not in told.out + told.err
    assert "\\x1b[31mred" in told.err
    assert len(told.err.splitlines()) == 3
