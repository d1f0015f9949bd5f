"""A model made of rules that writes 50 tokens a second a stream, whatever else runs: what is measured is around it.

python -m bench.fake_model cluster --replicas 2 [options of tightrope cluster]
python -m bench.fake_model serve [options of tightrope serve]
"""

import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING
from unittest.mock import patch

from bench.peers import ROOT, finding_ours
from tightrope.backends.protocol import Chunk
from tightrope.backends.settings import ModelSettings
from tightrope.engine.process.client import EngineClient
from tightrope.engine.process.launch import ProcessHandle, run_process
from tightrope.processes import child_command, set_variables
from tightrope.server.cluster.ray_variables import keep_ray_at_home

sys.path.append(str(ROOT / "tests" / "support"))

from fakes import FakeBackend  # It lies there.

if TYPE_CHECKING:
    from torch import Tensor

NAME = "bench.fake_model"
STEP_S = 1 / 50
READ_S = 0.0002  # A token of a prompt takes so long.


class Steady(FakeBackend):  # type: ignore[misc]  # The folder of the tests' fakes is no package.
    """Its step takes the same time for one stream and for many, and ends that long after the step before it."""

    ended_s = 0.0

    def forward(self, chunks: Sequence[Chunk]) -> "Tensor":
        now_s = time.perf_counter()
        began_s = self.ended_s if now_s < self.ended_s + STEP_S else now_s
        logits: Tensor = super().forward(chunks)
        num_read = sum(len(chunk.token_ids) for chunk in chunks) - len(chunks)
        time.sleep(max(0.0, began_s + STEP_S + READ_S * num_read - time.perf_counter()))
        self.ended_s = time.perf_counter()
        return logits


def open_model(settings: ModelSettings, progress: Callable[[float], None]) -> Steady:
    progress(1.0)
    return Steady(capacity=1 << 12, max_model_len=4096, max_num_seqs=settings.max_num_seqs, max_step_tokens=256)


def launch(sock: socket.socket) -> ProcessHandle:
    return run_process(child_command(NAME, str(sock.fileno())), sock)


def main() -> int:
    """The engine, where a number says which descriptor it is asked by; else the command."""
    if sys.argv[1].isdecimal():
        from tightrope.engine.process.child import serve

        return serve(socket.socket(fileno=int(sys.argv[1])), os._exit, open_model)
    set_variables(finding_ours())
    from tightrope.server.cli import serve as serving
    from tightrope.server.cli.commands import run

    if sys.argv[1] == "serve":
        with patch.object(serving, "EngineClient", partial(EngineClient, launch=launch)):
            return run(sys.argv[1:])
    keep_ray_at_home()
    from bench import fake_model
    from tightrope.server.cluster import local

    # Ray's workers import the launcher by its name, which must not be that of the main module.
    with patch.object(local, "LocalCluster", partial(local.LocalCluster, launch=fake_model.launch)):
        return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
