"""The simulated fleet: what it counts, that it loses nobody, and that the page tells what came of it."""

import random
from dataclasses import replace

import pytest
import simpy
from checkout import ROOT
from hypothesis import given
from hypothesis import strategies as st

from bench.fleet import results
from bench.fleet.calibrate import CASES, HELD, WITHIN
from bench.fleet.clients import Clients
from bench.fleet.costs import Costs, Shape
from bench.fleet.held import Disk, Held
from bench.fleet.measure import _fit
from bench.fleet.plan import Plan
from bench.fleet.prompts import Message, Prompt
from bench.fleet.replica import Replica
from bench.fleet.requests import Request
from bench.fleet.routing import ROUTERS, ExactDigest, Loads
from bench.fleet.simulate import Fleet, simulate
from bench.fleet.table import TABLES
from bench.fleet.traces import CROWDS, Scale

pytestmark = pytest.mark.quick

COSTS = Costs(0.01, 0.001, 1e-7, 0.01, 0.001, 1e-7, 1e-5, 2e-5)
SHAPE = Shape(cache_tokens=8192, host_tokens=8192)
SMALL = Plan("role-play", "exact digest", 4, 120.0, 30.0, scale=Scale(lengths=0.3, window=1200))


def prompt(*keys: int, tokens: int = 100) -> Prompt:
    return Prompt.of(Message(key, tokens) for key in keys)


def answered(prompts: list[Prompt], shape: Shape = SHAPE) -> list[Request]:
    """What comes of prompts that reach an idle replica at once."""
    env = simpy.Environment()
    held = Held(shape.cache_tokens, shape.host_tokens, None)
    replica = Replica(env, COSTS, shape, held, wrote=lambda request: None, lost=lambda request: None)
    requests = [Request(one, Message(9000 + n, 10), "", 0.0, env.event()) for n, one in enumerate(prompts)]
    for request in requests:
        replica.submit(request)
    env.run(1000)
    return requests


# ---- what a replica holds ----


def test_a_beginning_is_found_and_no_more():
    held = Held(1000, 0, None)
    held.keep(prompt(1, 2, 3), [])

    assert held.find(prompt(1, 2, 4), 0.0).cached == 200
    assert held.find(prompt(2, 3), 0.0).total == 0


def test_a_full_window_that_lost_its_oldest_message_is_moved():
    held = Held(2000, 0, None)
    held.keep(prompt(1, 2, 3, 4), [])

    found = held.find(prompt(1, 3, 4, 5), 0.0)

    assert (found.cached, found.moved) == (300, 200)


def test_what_it_was_moved_from_leaves_first():
    held = Held(800, 0, None)
    held.keep(prompt(1, 2, 3, 4), [])
    found = held.find(prompt(1, 3, 4), 0.0)
    held.keep(prompt(1, 3, 4), found.from_places)
    held.keep(prompt(7, 8, 9), [])

    assert held.find(prompt(1, 3, 4), 0.0).cached == 300
    assert prompt(1, 2, 3, 4).chain[-1] not in held.cache.messages


@given(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=5, unique=True), max_size=30))
def test_the_router_is_told_all_that_memory_holds_and_no_more(chats: list[list[int]]):
    told: set[int] = set()
    held = Held(700, 400, None, lambda place, is_there: told.add(place) if is_there else told.discard(place))
    for keys in chats:
        held.keep(prompt(*keys), [])

        assert held.cache.used <= 700
        assert held.host.used <= 400
        assert told == {*held.cache.messages, *held.host.messages}


def test_a_disk_that_is_shared_is_found_by_the_other_after_it_was_written():
    disk = Disk(10_000, lag_s=2.0)
    one, other = Held(1000, 0, disk), Held(1000, 0, disk)
    one.keep(prompt(1, 2), [])
    disk.write(prompt(1, 2), 5.0)

    assert other.find(prompt(1, 2), 6.0).total == 0
    assert other.find(prompt(1, 2), 7.0).disk == 200


# ---- a replica ----


def test_one_prompt_takes_what_was_measured():
    (request,) = answered([prompt(1, tokens=400)])

    assert request.first_s == pytest.approx(COSTS.overhead_s + COSTS.prefill_s(0, 400) + COSTS.step_s)


def test_a_short_prompt_does_not_wait_for_a_long_one():
    long, short = answered([prompt(1, tokens=4000), prompt(2, tokens=50)])

    assert short.first_s is not None
    assert long.first_s is not None
    assert short.first_s < 1.0 < COSTS.prefill_s(0, 4000) < long.first_s


def test_what_is_found_is_not_computed():
    first, second = answered([prompt(1, 2, 3)]), answered([prompt(1, 2, 3)])
    env = simpy.Environment()
    held = Held(8192, 0, None)
    held.keep(prompt(1, 2, 3), [])
    replica = Replica(env, COSTS, SHAPE, held, wrote=lambda request: None, lost=lambda request: None)
    again = Request(prompt(1, 2, 3, 4), Message(9, 1), "", 0.0, env.event())
    replica.submit(again)
    env.run(100)

    assert first[0].first_s == second[0].first_s
    assert again.first_s == pytest.approx(COSTS.overhead_s + COSTS.prefill_s(300, 100) + COSTS.step_s)


# ---- a fleet ----


@pytest.mark.parametrize("crowd", CROWDS)
@pytest.mark.parametrize("router", ROUTERS)
def test_every_request_is_answered_though_replicas_die(crowd: str, router: str):
    plan = replace(SMALL, crowd=crowd, router=router, mtbf_s=40.0, down_s=10.0, places=6)
    env = simpy.Environment()
    fleet = Fleet(env, plan, COSTS, SHAPE)
    asked: list[simpy.Event] = []

    def stream(number: int):
        clients = Clients(plan, number)
        while env.now < plan.seconds:
            for session, turns in clients.next():
                for turn in turns:
                    yield env.timeout(turn.pause_s)
                    if env.now >= plan.seconds:
                        break
                    asked.append(fleet.ask(session, turn))
                    yield asked[-1]

    for number in range(plan.num_places):
        env.process(stream(number))
    env.run(3 * plan.seconds)

    assert asked
    assert all(event.triggered for event in asked)
    up = [number for number in range(plan.replicas) if fleet.loads.is_up(number)]
    assert not fleet.loads.requests[up].any()
    assert not fleet.loads.tokens.any()


def test_the_same_seed_gives_the_same_numbers_and_another_does_not():
    one, same, other = (simulate(replace(SMALL, seed=seed), COSTS, SHAPE) for seed in (0, 0, 1))

    assert one == same
    assert one != other


def test_chats_that_stay_are_found_and_those_that_are_strewn_are_not():
    found = {router: simulate(replace(SMALL, router=router), COSTS, SHAPE)["hit_rate"] for router in ROUTERS}

    assert found["exact digest"] > found["random"] + 0.1
    assert found["session"] > found["random"] + 0.1


def test_a_digest_that_is_late_costs_hits_and_nothing_else():
    late = simulate(replace(SMALL, crowd="agents", lag_s=60.0), COSTS, SHAPE)
    fresh = simulate(replace(SMALL, crowd="agents", lag_s=0.1), COSTS, SHAPE)

    assert late["hit_rate"] < fresh["hit_rate"]
    assert late["requests"] > 0


def test_the_digest_knows_which_replica_holds_most():
    loads = Loads(3, random.Random(1), 16)
    router = ExactDigest(loads, 0.0, lambda replica, prompt: 0)
    long = prompt(1, 2, 3, 4)
    for replica, length in ((0, 1), (2, 3)):
        for place in long.chain[:length]:
            router.told(replica, place, True, 0.0)

    assert router.choose(Request(long, Message(9, 1), "", 0.0), 1.0) == 2
    router.died(2)
    assert router.choose(Request(long, Message(9, 1), "", 0.0), 1.0) == 0


# ---- costs, and what is told ----


def test_costs_are_found_again_from_what_they_make():
    rows = [(1, n, n * n / 2) for n in (64, 256, 1024, 3000)]

    found = _fit(rows, [0.02 * a + 0.0018 * b + 3e-7 * c for a, b, c in rows])

    assert found == pytest.approx([0.02, 0.0018, 3e-7])


def test_no_cost_is_below_nothing():
    assert min(_fit([(1, n, n * n / 2) for n in (10, 20, 40)], [0.1, 0.19, 0.35])) >= 0


def test_the_tables_of_the_page_are_those_of_the_results():
    page = (ROOT / "docs/replicas.md").read_text("utf-8")

    told = {name: f"<!-- fleet: {name} -->\n" + "\n".join(rows(results.read())) + "\n" for name, rows in TABLES.items()}
    assert [name for name, table in told.items() if table not in page] == []


def test_a_row_of_the_calibration_says_truly_whether_the_bar_is_met():
    for row in results.read()["calibration"]:
        apart = {name: row["simulated"][name] / row["real"][name] - 1 for name in HELD}

        assert row["case"] in CASES
        assert row["apart"] == pytest.approx(apart, abs=1e-4)
        assert row["met"] == all(abs(value) <= WITHIN for value in apart.values())
