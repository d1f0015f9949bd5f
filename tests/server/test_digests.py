"""Digests on their way from an engine to the one who chooses: keyed, in order, and trusted for nothing but speed."""

import random

from hypothesis import given
from hypothesis import strategies as st

from tightrope.backends.holdings import BLOCK, Holdings, chain, root_of
from tightrope.engine.process.wire import Held, HeldBlocks, decode_to_front, encode_frame
from tightrope.server.cluster.digests import DigestIndex, Found, ReplicaHoldings

KEY = b"k" * 32
TEXT = list(range(1000, 1100))


class Engine:
    """An engine's books and its relay's."""

    def __init__(self, fingerprint: bytes = b"", adapters: dict[str, str] | None = None) -> None:
        self.holdings, self.relay, self.number = Holdings(), ReplicaHoldings(), 0
        self.fingerprint, self.adapters = fingerprint, adapters or {}

    def hold(self, token_ids: list[int], namespace: str = "", kind: str = "cached") -> None:
        self.holdings.add(kind, list(chain(root_of(self.fingerprint, namespace), token_ids)), 0)  # type: ignore[arg-type]

    def drop(self, token_ids: list[int], namespace: str = "", kind: str = "cached", first: int = 0) -> None:
        blocks = list(chain(root_of(self.fingerprint, namespace), token_ids))[first:]
        self.holdings.remove(kind, blocks)  # type: ignore[arg-type]

    def held(self, *, restarted: bool = False) -> Held:
        """The next message, as it comes over the wire."""
        if restarted:
            self.holdings.begin()
        news = self.holdings.take()
        blocks = [HeldBlocks(part.is_whole, part.stride, part.added, part.removed) for part in news]
        held = Held(self.number, *blocks, self.fingerprint, 0.05, self.adapters if news[0].is_whole else None)
        self.number += 1
        message = decode_to_front(encode_frame(held)[4:])
        assert message == held
        return held


def tell(index: DigestIndex, name: str, engine: Engine) -> bool:
    held = engine.held()
    assert engine.relay.apply(held)
    return index.apply(name, engine.relay.changes(held, KEY))


def test_the_index_tells_of_each_replica_what_it_has_cached_and_stored_behind_that() -> None:
    index, engines = DigestIndex(KEY), {name: Engine() for name in "abc"}
    engines["a"].hold(TEXT[:50])
    engines["a"].hold(TEXT, kind="stored")
    engines["b"].hold(TEXT)
    engines["c"].hold([1, *TEXT])
    assert index.is_empty
    assert all(tell(index, name, engine) for name, engine in engines.items())
    assert index.find([*TEXT, 7]) == {"a": Found(48, 48, 0.05), "b": Found(96, 0, 0.05)}
    assert index.find(TEXT[: 3 * BLOCK]) == {"a": Found(32, 0, 0.05), "b": Found(32, 0, 0.05)}  # The last one runs.
    engines["b"].drop(TEXT, first=1)
    assert tell(index, "b", engines["b"])
    assert index.find(TEXT)["b"] == Found(16, 0, 0.05)
    index.forget("b")
    assert index.find(TEXT).keys() == {"a"}
    index.forget("a")
    index.forget("c")
    assert index.is_empty


def test_namespaces_adapters_and_models_never_meet() -> None:
    index = DigestIndex(KEY)
    tuned, other, newer = Engine(adapters={"tuned": "1f"}), Engine(adapters={"tuned": "2e"}), Engine(b"newer")
    tuned.hold(TEXT, "mine\0tuned\x001f\x001.0")
    other.hold(TEXT, "mine\0tuned\x002e\x001.0")
    newer.hold(TEXT, "mine")
    assert all(tell(index, name, engine) for name, engine in (("tuned", tuned), ("other", other), ("newer", newer)))
    assert index.find(TEXT, "mine").keys() == {"newer"}
    assert index.find(TEXT, "yours") == {}
    assert index.find(TEXT, "mine", "tuned").keys() == {"tuned", "other"}
    assert index.find(TEXT, "mine", "tuned", 0.5) == {}
    assert index.find(TEXT, "mine", "unheard of") == {}


def test_without_the_key_no_guess_of_a_prompt_can_be_tested() -> None:
    engine = Engine()
    engine.hold(TEXT)
    held = engine.held()
    engine.relay.apply(held)
    digest, others = engine.relay.changes(held, KEY), engine.relay.changes(held, b"another key")
    guess = next(chain(root_of(b"", ""), TEXT))
    assert guess in held.cached.added  # It is in what stays on the machine.
    assert guess not in digest.cached.added
    assert digest.cached.added != others.cached.added
    assert len(digest.cached.added) == len(held.cached.added)


def test_a_replica_holds_a_prompt_to_its_end_or_not_any_more() -> None:
    index, engine = DigestIndex(KEY), Engine(adapters={"tuned": "1f"})
    assert index.end_of("a", TEXT) is None
    assert tell(index, "a", engine)
    ends = index.end_of("a", TEXT, "mine"), index.end_of("a", TEXT, "mine", "tuned")
    assert None not in ends
    assert not any(end and index.holds("a", end) for end in ends)
    engine.hold(TEXT, "mine")
    engine.hold(TEXT, "mine\0tuned\x001f\x001.0")
    assert tell(index, "a", engine)
    assert all(end and index.holds("a", end) for end in ends)
    engine.drop(TEXT, "mine", first=5)
    assert tell(index, "a", engine)
    assert [bool(end and index.holds("a", end)) for end in ends] == [False, True]
    assert not any(end and index.holds("b", end) for end in ends)
    assert index.end_of("a", TEXT[:15]) is None


def test_after_a_lost_update_a_snapshot_is_asked_for_and_makes_all_right() -> None:
    index, engine = DigestIndex(KEY), Engine()
    engine.hold(TEXT[:50])
    assert tell(index, "a", engine)
    engine.hold(TEXT[:50], "lost")
    engine.relay.apply(engine.held())  # It doesn't reach the ingress.
    engine.hold(TEXT[:50], "late")
    held = engine.held()
    engine.relay.apply(held)
    assert not index.apply("a", engine.relay.changes(held, KEY))
    assert index.find(TEXT).keys() == {"a"}
    assert index.find(TEXT, "late") == {}
    snapshot = engine.relay.snapshot(KEY)
    assert snapshot is not None
    assert index.apply("a", snapshot)
    assert all(index.find(TEXT, namespace) == {"a": Found(48, 0, 0.05)} for namespace in ("", "lost", "late"))
    engine.drop(TEXT[:50], "late")
    assert tell(index, "a", engine)
    assert index.find(TEXT, "late") == {}


def test_a_relay_that_has_missed_something_takes_no_more_until_all_is_told() -> None:
    engine = Engine()
    assert engine.relay.snapshot(KEY) is None
    assert engine.relay.apply(engine.held())
    engine.held()
    assert not engine.relay.apply(engine.held())
    engine.hold(TEXT)
    assert not engine.relay.apply(engine.held())
    assert engine.relay.apply(engine.held(restarted=True))
    snapshot = engine.relay.snapshot(KEY)
    assert snapshot is not None
    assert len(snapshot.cached.added) == 8 * (len(TEXT) // BLOCK)


def test_a_new_engine_takes_the_place_of_what_the_old_one_held() -> None:
    index, old, new = DigestIndex(KEY), Engine(), Engine()
    old.hold(TEXT)
    tell(index, "a", old)
    new.hold([5, *TEXT])
    new.relay = old.relay
    assert tell(index, "a", new)
    assert index.find(TEXT) == {}
    assert index.find([5, *TEXT]).keys() == {"a"}


@given(st.randoms(use_true_random=False))
def test_a_walk_tells_what_a_search_through_all_texts_would(rng: random.Random) -> None:
    """Replicas come and go; each tells one of so many blocks."""
    index, texts = DigestIndex(KEY), [[rng.randrange(2) for _ in range(BLOCK)] * rng.randrange(1, 9) for _ in range(6)]
    engines: dict[str, Engine] = {}
    held: dict[str, dict[str, list[list[int]]]] = {}
    for _ in range(20):
        name = rng.choice("abcd")
        if name not in engines:
            engines[name], held[name] = Engine(), {"cached": [], "stored": []}
            engines[name].holdings._books["cached"].stride = rng.choice((1, 1, 2, 4))
        elif rng.random() < 0.2:
            index.forget(name)
            del engines[name]
            continue
        kind = rng.choice(("cached", "stored"))
        if held[name][kind] and rng.random() < 0.3:
            engines[name].drop(held[name][kind].pop(), kind=kind)
        else:
            held[name][kind].append(rng.choice(texts))
            engines[name].hold(held[name][kind][-1], kind=kind)
        assert tell(index, name, engines[name])
        prompt = [*rng.choice(texts), 9]
        found = index.find(prompt)
        for other, engine in engines.items():
            cached, stored = (
                longest(prompt, held[other][kind], engine.holdings._books[kind].stride)  # type: ignore[index]
                for kind in ("cached", "stored")
            )
            expected = Found(cached, max(0, stored - cached), 0.05)
            assert found.get(other, Found(0, 0, 0.05)) == expected


def longest(prompt: list[int], texts: list[list[int]], stride: int) -> int:
    best = max((common(prompt, text) for text in texts), default=0)
    return best // (BLOCK * stride) * BLOCK * stride


def common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
