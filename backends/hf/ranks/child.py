"""A rank's process: it does what the first rank tells, one thing after the other, until that is gone.

The first rank starts it by `python -m tightrope.backends.hf.ranks.child SOCKET MEMORY`, with descriptors that it has
inherited. Only adapters are read beside, by a thread of their own.
"""

import importlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import assert_never

import msgspec
import torch
from torch import Tensor

from tightrope.backends.devices.choice import choose_device
from tightrope.backends.errors import BackendError, DoesNotFit, OutOfMemory
from tightrope.backends.hf.modules.gather import Gather
from tightrope.backends.hf.part import Part
from tightrope.backends.hf.ranks.gather import SharedGather, Way, open_gather
from tightrope.backends.hf.ranks.link import Link
from tightrope.backends.hf.ranks.messages import (
    Adapter,
    AllocateCache,
    Answer,
    Beside,
    Calibrate,
    Command,
    CopyPages,
    CopySlots,
    Drop,
    Ended,
    EndStep,
    Failed,
    Found,
    Load,
    Loaded,
    MakePlan,
    MeetAgain,
    Ok,
    Open,
    Planned,
    PrepareAdapter,
    PutAdapter,
    ReadPages,
    Record,
    RemoveAdapter,
    Setup,
    Step,
    WarmUp,
    WritePages,
    inputs_of,
    slots_of,
)
from tightrope.backends.hf.runner import ModelRunner
from tightrope.backends.settings import ModelSettings
from tightrope.backends.tensor_parallel import Share
from tightrope.kernels.forms.layout import CacheFormat, LayerCache

log = logging.getLogger("tightrope.hf")

Done = tuple[Answer, bytes]
OK: Done = Ok(), b""


class Rank:
    """One rank but the first."""

    part: Part
    _gather: Gather
    _way: Way
    _store: str

    def __init__(self, link: Link, memory: int) -> None:
        self._link, self._memory = link, memory
        self._runners: dict[int, ModelRunner] = {}
        self._factors: list[Tensor] = []
        self._prepared: dict[str, Callable[[], None]] = {}
        self._left_for: BackendError | None = None  # Why a step was left, until all meet again.

    def serve(self) -> None:
        """Do what is told until the first rank is gone, or a step has failed."""
        decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
        while True:
            try:
                call, command, payload = self._link.receive(decoder)
            except OSError:
                return
            if isinstance(command, PrepareAdapter):
                threading.Thread(target=self._answer, args=(call, command, payload), daemon=True).start()
            elif not self._answer(call, command, payload):
                return

    def _answer(self, call: int, command: Command, payload: bytearray) -> bool:
        """Do it. False: it has failed, and the first rank, which has gone on, doesn't wait for an answer."""
        answer, back = OK
        try:
            answer, back = self._do(command, payload)
        except BackendError as error:
            answer = Failed(str(error), isinstance(error, DoesNotFit))
        is_lost = not call and isinstance(answer, Failed)
        if call or is_lost:
            try:
                self._link.send(call, answer, back)
            except OSError:
                return False
        return not is_lost

    def _do(self, command: Command, payload: bytearray) -> Done:
        if isinstance(command, Step):
            self._step(command)
        elif isinstance(command, EndStep):
            error = self._left_for
            return Ended(None if error is None else str(error), isinstance(error, OutOfMemory)), b""
        elif isinstance(command, MeetAgain):
            assert isinstance(self._gather, SharedGather)
            self._gather.meet_again(command.num_meetings)
            self._left_for = None
        elif isinstance(command, CopyPages):
            self._runners[0].copy_pages(command.copies, are_windowed=command.are_windowed)
        elif isinstance(command, CopySlots):
            self._runners[0].copy_slots(*slots_of(command))
        elif isinstance(command, ReadPages):
            pages = self._runners[0].read_pages(command.numbers, command.window_numbers)
            return Ok(), pages.numpy().tobytes()
        elif isinstance(command, WritePages):
            stored = torch.frombuffer(payload, dtype=torch.uint8) if payload else torch.empty(0, dtype=torch.uint8)
            self._runners[0].write_pages(stored, command.shape, command.pages, command.windows)
        elif isinstance(command, Beside):
            self._runners[command.runner] = self._runner_beside(command)
        elif isinstance(command, Drop):
            for runner in command.runners:
                del self._runners[runner]
        elif isinstance(command, PrepareAdapter | PutAdapter | RemoveAdapter):
            self._adapt(command)
        else:
            return self._set_up(command)
        return OK

    def _step(self, command: Step) -> None:
        """Run it; where it fails, leave it, and those that follow until all meet again. Else what fails is raised."""
        if self._left_for is not None:
            return
        try:
            self._runners[command.runner].run(inputs_of(command))
        except BackendError as error:
            if not isinstance(self._gather, SharedGather):
                raise
            self._left_for = error
            self._gather.leave_step()

    def _set_up(self, command: Setup) -> Done:
        if isinstance(command, Open):
            return self._open(command), b""
        part = self.part
        if isinstance(command, MakePlan):
            plan = part.make_plan(ModelSettings.model_validate_json(command.settings), command.host_bytes)
            return Planned(plan.window, plan.num_pages, plan.step_tokens, part.memory), b""
        if isinstance(command, Load):
            self._gather = open_gather(self._way, part.share, part.num_threads, self._memory, self._store, part.device)
            part.load(lambda done: None, self._gather)
            part.load_adapters()
            return Loaded([(layer.first_kv_head, layer.num_kv_heads) for layer in part.model.layers]), b""
        if isinstance(command, WarmUp):
            part.warm_up(lambda done: None)
        elif isinstance(command, Calibrate):
            self._factors = self._runners[command.runner].found_factors()
        elif isinstance(command, AllocateCache):
            self._runners[0] = part.cached_runner(self._factors)
            factors = [factor.numpy().tobytes() for factor in self._runners[0].key_factors]
            return Ok(), b"".join(factors)
        elif isinstance(command, Record):
            self._runners[0].record_decode(command.max_num_seqs, command.max_model_len, lambda done: None)
        else:
            assert_never(command)
        return OK

    def _open(self, command: Open) -> Answer:
        settings = ModelSettings.model_validate_json(command.settings)
        inspect = importlib.import_module(command.source).inspect
        self._way, self._store = command.way, command.store
        share = Share(command.rank, command.count)
        self.part = Part(Path(command.path), settings, choose_device(command.device), inspect, share, command.threads)
        return Found(self.part.weight_bytes, self.part.cache_bytes)

    def _runner_beside(self, command: Beside) -> ModelRunner:
        """A runner over caches as the first rank's, with this rank's heads."""
        caches = []
        factors: Sequence[Tensor | None] = self._factors or [None] * len(command.caches)
        for layer, factor, (dtype, num_pages, is_windowed, is_divided) in zip(
            self.part.model.layers, factors, command.caches, strict=True
        ):
            form = CacheFormat(dtype, layer.num_kv_heads, layer.head_dim)
            cache = LayerCache.allocate(form, num_pages, self.part.device, is_windowed=is_windowed)
            if is_divided:
                assert factor is not None, "keys are divided by what a calibration has found"
                cache.key_factor.copy_(factor)
            caches.append(cache)
        return self.part.runner_over(caches)

    def _adapt(self, command: Adapter) -> None:
        adapters = self.part.model.adapters
        if isinstance(command, PrepareAdapter):
            self._prepared[command.name] = adapters.prepare(command.name, Path(command.path))
        elif isinstance(command, PutAdapter):
            self._prepared.pop(command.name)()
        else:
            self._prepared.pop(command.name, None)
            adapters.remove(command.name)


def main() -> None:
    """Entry point of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the front, which ends the engine when it is done.
    descriptor, memory = map(int, sys.argv[1:])
    logging.disable(logging.WARNING)  # The first rank says the same.
    Rank(Link(socket.socket(fileno=descriptor)), memory).serve()
    os._exit(0)  # At once: libraries that tidy up may wait for ranks that have gone.


if __name__ == "__main__":
    main()
