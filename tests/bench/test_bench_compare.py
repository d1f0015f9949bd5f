"""Servers that are compared: all up at the same time, asked by turns, and gone afterwards."""

import json
from functools import partial
from pathlib import Path

import psutil
import pytest

from bench.compare import compared, results_of
from bench.peers import Peer, Setup, StartFailed
from bench.stats import Sample
from bench.workloads import Scenario, run_streams

# Writes down its start with its process id, and each request.
SERVER = """
import os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

port, name, log = sys.argv[1:]

def note(*words):
    with open(log, "a") as file:
        print(name, *words, file=file)

class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        note("asked")
        self.do_GET()
        self.wfile.write(b'data: {"choices": [{"text": "One"}]}\\n\\ndata: [DONE]\\n\\n')

note("begins", os.getpid())
HTTPServer(("127.0.0.1", int(port)), Answer).serve_forever()
"""


def peer(name: str, log: Path, server: str = SERVER) -> Peer:
    return Peer(name, lambda setup, port: ["-c", server, str(port), name, str(log)])


async def test_servers_are_all_up_before_they_take_turns_and_gone_afterwards(tmp_path: Path) -> None:
    log = tmp_path / "log"
    scenarios = [Scenario(f"{n} stream", partial(run_streams, num_streams=n), rounds=n) for n in (1, 2)]

    samples = await compared([peer("A", log), peer("B", log)], Setup(tmp_path / "m.gguf"), scenarios, None)

    assert [(one.scenario, one.round, one.server) for one in samples] == [
        ("1 stream", 0, "A"), ("1 stream", 0, "B"),
        ("2 stream", 0, "A"), ("2 stream", 0, "B"), ("2 stream", 1, "B"), ("2 stream", 1, "A"),
    ]  # fmt: skip
    assert all(one.metrics["tokens"] == int(one.scenario[0]) for one in samples)
    begun, asked = (log.read_text().splitlines()[part] for part in (slice(2), slice(2, None)))
    assert [line.split()[:2] for line in begun] == [["A", "begins"], ["B", "begins"]]
    assert "".join(line[0] for line in asked) == "AB" + "AB" + "AABB" + "BBAA"
    assert not any(psutil.pid_exists(int(line.split()[2])) for line in begun)


async def test_a_server_that_does_not_start_is_told_with_what_it_printed_and_the_others_end(tmp_path: Path) -> None:
    log = tmp_path / "log"
    peers = [peer("A", log), peer("B", log, "raise SystemExit('no such model')")]

    with pytest.raises(StartFailed, match=r"did not start: no such model$"):
        await compared(peers, Setup(tmp_path / "m.gguf"), [], None)

    [begun] = log.read_text().splitlines()
    assert not psutil.pid_exists(int(begun.split()[2]))


@pytest.mark.quick
def test_what_is_written_names_the_model_by_its_file_alone() -> None:
    found = results_of(Setup(Path("/home/me/m.gguf")), [Sample("A", "1 stream", 0, {"tokens": 3.0})], bars=[])

    assert list(found) == ["setup", "bars", "summary", "rounds"]
    assert found["setup"]["model"] == "m.gguf"
    assert json.loads(json.dumps(found)) == found
