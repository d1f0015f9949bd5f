"""A fleet of replicas, its clients and its failures over simulated time; what came of it."""

import random
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
import simpy

from bench.fleet.clients import Clients
from bench.fleet.costs import Costs, Shape
from bench.fleet.held import Disk, Held
from bench.fleet.plan import Plan
from bench.fleet.prompts import Prompt
from bench.fleet.replica import Machine, Replica
from bench.fleet.requests import Request
from bench.fleet.routing import DOWN, Loads, router_of
from bench.fleet.tally import Tally
from bench.fleet.traces import Turn

Advance = Callable[[float], object]


class Fleet:
    """All replicas behind one router."""

    def __init__(self, env: simpy.Environment, plan: Plan, costs: Costs, shape: Shape) -> None:
        self.env, self.plan = env, plan
        draw = random.Random(f"{plan.seed} routes")
        self.loads = Loads(plan.replicas, draw, shape.max_num_seqs)
        self.router = router_of(plan.router, self.loads, plan.lag_s, self._on_disk)
        self.tally = Tally()
        self._machine = None if plan.together == 1.0 else Machine(plan.together)
        shared = Disk(plan.disk_tokens * plan.replicas) if plan.disk == "shared" else None
        self.replicas = [self._replica(number, costs, shape, shared) for number in range(plan.replicas)]
        self._homes: dict[Request, int] = {}
        self._homeless: list[Request] = []
        if plan.mtbf_s:
            for number in range(plan.replicas):
                env.process(self._live(number, random.Random(f"{plan.seed} life {number}")))

    def _replica(self, number: int, costs: Costs, shape: Shape, shared: Disk | None) -> Replica:
        disk = Disk(self.plan.disk_tokens) if self.plan.disk == "own" else shared

        def told(place: int, is_there: bool) -> None:
            self.router.told(number, place, is_there, self.env.now)

        held = Held(shape.cache_tokens, shape.host_tokens, disk, told)
        return Replica(self.env, costs, shape, held, self._wrote, self._move, self._machine)

    def _on_disk(self, number: int, prompt: Prompt) -> int:
        disk = self.replicas[number].held.disk
        return 0 if disk is None else disk.first_tokens(prompt, self.env.now)

    def ask(self, session: str, turn: Turn) -> simpy.Event:
        """What happens when it was answered."""
        expected = turn.prompt.num_tokens
        done = self.env.event()
        request = Request(turn.prompt, turn.answer, session, self.env.now, done, expected)
        done.callbacks.append(lambda event: self._end(request))
        self._send(request)
        return done

    def _send(self, request: Request) -> None:
        if self.loads.requests.min() >= DOWN:
            self._homeless.append(request)
            return
        number = self.router.choose(request, self.env.now)
        self._homes[request] = number
        self.loads.sent(number, request)
        self.replicas[number].submit(request)

    def _wrote(self, request: Request) -> None:
        self.loads.wrote(self._homes[request], request)

    def _move(self, request: Request) -> None:
        """Its replica has died; what was written of it is read again elsewhere."""
        del self._homes[request]
        request.num_moves += 1
        self._send(request)

    def _end(self, request: Request) -> None:
        self.loads.ended(self._homes.pop(request))
        if request.arrived_s >= self.plan.warm_s:
            self.tally.add(request)

    def _live(self, number: int, draw: random.Random) -> Generator[simpy.Event, Any, None]:
        while True:
            yield self.env.timeout(draw.expovariate(1 / self.plan.mtbf_s))
            self.loads.died(number)
            self.router.died(number)
            self.replicas[number].die()
            yield self.env.timeout(self.plan.down_s)
            self.replicas[number].come_back()
            self.loads.came_back(number)
            homeless, self._homeless = self._homeless, []
            for request in homeless:
                self._send(request)


def _clients(fleet: Fleet, clients: Clients) -> Generator[simpy.Event, Any, None]:
    env = fleet.env
    yield env.timeout(clients.begins_s)
    while env.now < fleet.plan.seconds:
        yield env.all_of([env.process(_stream(fleet, *pair)) for pair in clients.next()])
        yield env.timeout(clients.rest_s())


def _stream(fleet: Fleet, session: str, turns: Iterator[Turn]) -> Generator[simpy.Event, Any, None]:
    for turn in turns:
        yield fleet.env.timeout(turn.pause_s)
        if fleet.env.now >= fleet.plan.seconds:
            return
        yield fleet.ask(session, turn)


def simulate(plan: Plan, costs: Costs, shape: Shape, advance: Advance = lambda seconds: None) -> dict[str, Any]:
    """Run it; `advance` hears of each simulated second times replicas. Returns what is to be told of it."""
    env = simpy.Environment()
    fleet = Fleet(env, plan, costs, shape)
    for place in range(plan.num_places):
        env.process(_clients(fleet, Clients(plan, place)))
    busy_s = 0.0
    for until in np.linspace(0, plan.seconds, 51)[1:]:
        if until > plan.warm_s >= until - plan.seconds / 50:
            busy_s = sum(replica.busy_s for replica in fleet.replicas)
        env.run(until)
        advance(plan.replicas * plan.seconds / 50)
    busy_s = sum(replica.busy_s for replica in fleet.replicas) - busy_s
    env.run(2 * plan.seconds)  # Nobody comes any more; those who wait are answered.
    busy = busy_s / (plan.replicas * (plan.seconds - plan.warm_s))
    named = {name: getattr(plan, name) for name in _NAMED}
    return {**named, **fleet.tally.summary(), "busy": round(busy, 3)}


_NAMED = ("crowd", "router", "replicas", "disk", "mtbf_s", "lag_s", "sends_ids")
