"""One replica as a process of the simulation: steps of prompts and answers as the engine's scheduler makes them."""

from collections.abc import Callable, Generator
from typing import Any

import simpy

from bench.fleet.costs import Costs, Shape
from bench.fleet.held import Held
from bench.fleet.prompts import Prompt
from bench.fleet.requests import Request, Running
from tightrope.engine.healing import MIN_STEP, MOST_CHATS


class Machine:
    """What replicas on one machine share: while several work, each takes `together` times as long."""

    MOST_S = 0.1  # So long at most a replica works before it looks again who else does.

    def __init__(self, together: float = 1.0) -> None:
        self.together = together
        self.num_at_work = 0

    def stretch(self) -> float:
        """How much longer what begins now takes, of one that is at work itself."""
        return self.together if self.num_at_work > 1 else 1.0


class Replica:
    """Belongs to one simpy environment."""

    def __init__(
        self,
        env: simpy.Environment,
        costs: Costs,
        shape: Shape,
        held: Held,
        wrote: Callable[[Request], None],
        lost: Callable[[Request], None],
        machine: Machine | None = None,
    ) -> None:
        """wrote: is told of each request's first token here. lost: gets the requests that it had when it died."""
        self._env, self._costs, self._shape = env, costs, shape
        self._wrote, self._lost = wrote, lost
        self._machine = machine or Machine()
        self.held = held
        self.is_up = True
        self.busy_s = 0.0
        self._waiting: list[Running] = []  # prompts without a place, the oldest first
        self._reading: list[Running] = []
        self._writing: list[Running] = []
        self._to_heal: dict[str, tuple[int, int]] = {}  # place and number of moved tokens by session, the latest last
        self._wake: simpy.Event | None = None
        self._process = env.process(self._run())

    @property
    def num_requests(self) -> int:
        return len(self._waiting) + len(self._reading) + len(self._writing)

    def submit(self, request: Request) -> None:
        self._env.process(self._arrive(Running(request, self._env.now)))

    def _arrive(self, running: Running) -> Generator[simpy.Event, Any, None]:
        yield self._env.timeout(self._costs.overhead_s)
        if not self.is_up:
            self._lost(running.request)
            return
        self._waiting.append(running)
        if self._wake is not None and not self._wake.triggered:
            self._wake.succeed()

    def die(self) -> None:
        """All that it had in memory and under way is gone."""
        self.is_up = False
        self._process.interrupt()
        lost = [*self._writing, *self._reading, *self._waiting]
        self._waiting, self._reading, self._writing = [], [], []
        self._to_heal.clear()
        self.held.lose()
        for running in lost:
            self._lost(running.request)

    def come_back(self) -> None:
        self.is_up = True
        self._process = self._env.process(self._run())

    def _run(self) -> Generator[simpy.Event, Any, None]:
        try:
            while True:
                if self._waiting or self._reading:
                    yield from self._step()
                elif self._writing:
                    yield from self._write_on()
                elif self._to_heal:
                    yield from self._heal()
                else:
                    self._wake = self._env.event()
                    yield self._wake
                    self._wake = None
        except simpy.Interrupt:
            self._wake = None

    def _work(self, seconds: float) -> Generator[simpy.Event, Any, None]:
        """Be at work for what takes so long alone."""
        if self._machine.together == 1.0:
            self.busy_s += seconds
            yield self._env.timeout(seconds)
            return
        self._machine.num_at_work += 1
        try:
            while seconds > 0:
                part_s, stretch = min(seconds, Machine.MOST_S), self._machine.stretch()
                self.busy_s += part_s * stretch
                yield self._env.timeout(part_s * stretch)
                seconds -= part_s
        finally:
            self._machine.num_at_work -= 1

    # ---- a step with prompts in it ----

    def _step(self) -> Generator[simpy.Event, Any, None]:
        """One token for each answer, and of prompts what the scheduler's budget takes."""
        writing = list(self._writing)
        parts, seconds = self._parts()
        if writing:
            seconds += self._decode_s(writing)
        assert parts or writing, "what is alone fits the cache"
        yield from self._work(seconds)
        self._give(writing, 1)
        for running, number in parts:
            running.left -= number
            running.place += number
            if running.left == 0:
                self._reading.remove(running)
                self._begin_to_write(running)

    def _parts(self) -> tuple[list[tuple[Running, int]], float]:
        """How many tokens of which prompts, and their seconds: see `Scheduler.schedule`."""
        shape, costs = self._shape, self._costs
        is_busy = bool(self._writing)
        budget_s = shape.busy_step_s if is_busy else shape.quiet_step_s
        least = shape.least_busy if is_busy else shape.least_quiet
        room = shape.max_step_tokens - len(self._writing)
        prompts = [*self._reading, *self._waiting]
        oldest = next((running for running in sorted(prompts, key=_since) if self._start(running)), None)
        prompts.sort(key=lambda running: running.left if running.is_started else running.num_tokens)
        stretch = shape.stretch if not is_busy and len(prompts) == 1 else 1.0
        kept = 0.0
        if oldest is not None and prompts[0] is not oldest:
            prompts.remove(oldest)
            prompts.append(oldest)
            kept = shape.oldest_share
        parts: list[tuple[Running, int]] = []
        spent_s, taken = 0.0, 0
        for running in prompts:
            kept = 0.0 if running is oldest else kept
            has_minimum = running is oldest or not taken
            if not self._start(running):
                continue
            fitting = max(
                costs.tokens_in(running.place, max(0.0, budget_s * (1 - kept) - spent_s)), least if has_minimum else 0
            )
            number = running.left if running.left <= stretch * fitting else fitting
            number = min(number, int(room * (1 - kept)) - taken)
            if number <= 0 or (not has_minimum and number < min(shape.least_busy, running.left)):
                continue
            parts.append((running, number))
            taken += number
            spent_s += costs.prefill_s(running.place, number)
            if number == running.left:
                budget_s, least = min(budget_s, shape.busy_step_s), shape.least_busy
        restored_s = sum(running.restore_s for running, _ in parts)
        for running, _ in parts:
            running.restore_s = 0.0
        return parts, spent_s + restored_s + (0.0 if self._writing or not parts else costs.step_s)

    def _start(self, running: Running) -> bool:
        """Whether a prompt runs: already, or from now on, if there is a place and room."""
        if running.is_started:
            return True
        others = [*self._reading, *self._writing]
        if len(others) >= self._shape.max_num_seqs:
            return False
        needed = running.num_tokens + running.left_to_write
        if others and needed + sum(map(_room, others)) > self.held.cache.capacity:
            return False
        request = running.request
        found = self.held.find(request.prompt, self._env.now)
        running.place = min(found.total, running.num_tokens - 1)
        running.left = running.num_tokens - running.place
        if found.moved:
            found.again = min(found.moved, self._shape.recomputed(found.total - found.moved))
            running.left += found.again
            self._to_heal.pop(request.session, None)
            self._to_heal[request.session] = (found.total - found.moved, found.moved)
            if len(self._to_heal) > MOST_CHATS:
                self._to_heal.pop(next(iter(self._to_heal)))
        running.restore_s = found.host * self._costs.host_token_s + found.disk * self._costs.disk_token_s
        running.is_started = True
        if request.first_s is None:
            request.found = found
        self._waiting.remove(running)
        self._reading.append(running)
        return True

    def _begin_to_write(self, running: Running) -> None:
        request = running.request
        self.held.keep(request.prompt, request.found.from_places)
        self._writing.append(running)
        if request.first_s is None:
            request.first_s = self._env.now
        self._wrote(request)
        self._give([running], 1)

    # ---- answers alone ----

    def _write_on(self) -> Generator[simpy.Event, Any, None]:
        """As many steps as there are until the first answer ends, or a request comes."""
        writing = list(self._writing)
        step_s = self._decode_s(writing)
        number = min(running.left_to_write for running in writing)
        if self._machine.together != 1.0:
            yield from self._work(step_s)
            self._give(writing, 1)
            return
        began_s = self._env.now
        self._wake = self._env.event()
        yield self._env.timeout(number * step_s) | self._wake
        self._wake = None
        done = min(number, max(1, int((self._env.now - began_s) / step_s + 1e-6)))
        rest_s = done * step_s - (self._env.now - began_s)
        if rest_s > 1e-9:  # The step under way ends before the request's own begins.
            yield self._env.timeout(rest_s)
        self.busy_s += self._env.now - began_s
        self._give(writing, done)

    def _decode_s(self, writing: list[Running]) -> float:
        cached = sum(running.num_tokens for running in writing)
        return self._costs.decode_s(len(writing), cached)

    def _give(self, writing: list[Running], number: int) -> None:
        """So many tokens to each; those that have all end."""
        for running in writing:
            request = running.request
            request.num_written += number
            if request.num_written >= request.answer.tokens:
                self._writing.remove(running)
                whole = Prompt.of((*request.prompt.messages, request.answer))
                self.held.keep(whole, [])
                if self.held.disk is not None:
                    self.held.disk.write(whole, self._env.now)
                assert request.done is not None
                request.done.succeed()

    # ---- idle ----

    def _heal(self) -> Generator[simpy.Event, Any, None]:
        """A short step over moved tokens, the latest chat's first; a request that comes waits for its end."""
        session, (place, left) = self._to_heal.popitem()
        cache = self.held.cache
        fitting = self._costs.tokens_in(place, self._shape.busy_step_s)
        number = min(left, max(MIN_STEP, min(fitting, cache.capacity - cache.used)))
        yield from self._work(self._costs.prefill_s(place, number) + self._costs.step_s)
        if left > number and session not in self._to_heal:
            self._to_heal[session] = (place + number, left - number)


def _since(running: Running) -> float:
    return running.since_s


def _room(running: Running) -> int:
    return running.num_tokens + running.left_to_write
