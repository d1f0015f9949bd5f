"""Tokens that four replicas reuse, by who chooses the replica: `python -m bench.routed`.

The engines, their schedulers, caches, digests and the choice are the server's own; the model is made up, one token a
character, so that nothing is measured but where prompts go. All replicas step at the same time. Two hundred short chats
begin one after another, some dozens at a time, all with the same text or each with one of twelve; each turn follows
after a pause. Every router has the same chats. Writes bench/results/routed.json.
"""

import argparse
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from statistics import mean

import torch

from bench import report
from bench.character_guess import CharacterGuess
from tightrope.backends.hf.cache.pages import PagedKVCache
from tightrope.backends.protocol import Capabilities, Chunk, ModelCard
from tightrope.engine.core import EngineCore
from tightrope.engine.process.held import HeldTeller
from tightrope.engine.process.wire import Held, ToFront
from tightrope.engine.sampler.steps import SamplingParams
from tightrope.engine.settings import LimitSettings
from tightrope.engine.types import GenerateRequest, StopRules, TokenPrompt
from tightrope.kernels.forms.layout import PAGE
from tightrope.server.cluster.choosing import Candidate, choose
from tightrope.server.cluster.digests import DigestIndex, ReplicaHoldings

NUM_REPLICAS, NUM_CHATS = 4, 200
CARDS = {"one assistant": 1, "twelve characters": 12}  # So many texts of 200 to 500 characters do chats begin with.
SEED, KEY = 20261130, b"k" * 32
VOCABULARY = 128
MAX_SEQS, STEP_TOKENS, WINDOW = 16, 256, 4096


class Letters:
    """A tokenizer of one token a character."""

    vocab_size, bos_id, eos_ids, adds_bos = VOCABULARY, None, frozenset[int](), False
    lost_bytes, max_token_bytes = b"", 1

    def encode(self, text: str, *, parse_special: bool, is_start: bool) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])

    def is_special(self, token_id: int) -> bool:
        return False

    def special_texts(self) -> Sequence[str]:
        return ()

    def added_texts(self) -> Sequence[str]:
        return ()

    def set_marks(self, marks: object, ends: object) -> None:
        """There are none."""


class MadeUp:
    """A backend with the torch engine's cache, and no model in it."""

    def __init__(self, cache_tokens: int, rng: random.Random) -> None:
        self.card = ModelCard("made-up", "letters", "none", WINDOW, WINDOW, "f16", None, ())
        self.capabilities = Capabilities(MAX_SEQS, STEP_TOKENS, STEP_TOKENS)
        self.kv = PagedKVCache(cache_tokens // PAGE)
        self.tokenizer, self.adapters, self._rng = Letters(), NoAdapters(), rng

    def forward(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        rows = sum(chunk.want_logits == "last" for chunk in chunks)
        logits = torch.zeros(rows, VOCABULARY)
        for row in range(rows):
            logits[row, self._rng.randrange(97, 123)] = 50.0
        return logits

    def close(self) -> None:
        """Nothing is held."""


class NoAdapters:
    def prepare(self, name: str, path: object) -> Callable[[], None]:
        raise NotImplementedError("the made-up model takes no adapters, and no prompt here names one")

    def tokenizer(self, name: str) -> None:
        return None

    def fingerprint(self, name: str) -> str:
        return name

    def remove(self, name: str) -> None:
        """There are none."""


class Replica:
    """An engine, and the relay beside it."""

    def __init__(self, name: str, cache_tokens: int, rng: random.Random) -> None:
        self.name, self.relay = name, ReplicaHoldings()
        self.waiting: dict[str, tuple[int, int]] = {}  # Without a word yet: since which step, tokens to be computed.
        self.core = EngineCore(MadeUp(cache_tokens, rng), LimitSettings(max_waiting=4096))  # type: ignore[arg-type]
        self._sent: list[ToFront] = []
        self._teller = HeldTeller(self.core, self, lambda: None)  # type: ignore[arg-type]
        self._teller.begin()

    def send(self, message: ToFront) -> None:
        """Take what the engine sends."""
        self._sent.append(message)

    def news(self, index: DigestIndex) -> None:
        """Have the ingress hear what has changed."""
        self._teller.send()
        for held in self._sent:
            assert isinstance(held, Held)
            assert self.relay.apply(held)
            assert index.apply(self.name, self.relay.changes(held, KEY))
        self._sent.clear()


@dataclass
class Chat:
    """A card, messages that are yet to be said, and all that was said."""

    text: str
    messages: deque[str]
    answer_tokens: list[int]
    due: int  # The step in which the next message is sent.
    replicas: list[str] = field(default_factory=list)


Route = Callable[[str, "Fleet"], str]


class Fleet:
    """Replicas and their chats under one router."""

    def __init__(self, cache_tokens: int, route: Route, seed: int) -> None:
        rng = random.Random(seed)
        self.replicas = {str(n): Replica(str(n), cache_tokens, random.Random(seed + n)) for n in range(NUM_REPLICAS)}
        self.index, self.rng, self._route = DigestIndex(KEY), rng, route
        self._asked: dict[str, tuple[Chat, Replica]] = {}
        self.first_word_steps: list[int] = []

    def queue_lengths(self) -> Mapping[str, int]:
        """Requests that each replica has and hasn't finished."""
        counts = dict.fromkeys(self.replicas, 0)
        for _, replica in self._asked.values():
            counts[replica.name] += 1
        return counts

    def run(self, chats: Sequence[Chat], most_at_once: int) -> dict[str, object]:
        """All chats to their ends."""
        coming, here, step = deque(chats), list[Chat](), 0
        while coming or here or self._asked:
            while coming and len(here) < most_at_once:
                here.append(coming.popleft())
                here[-1].due = step + self.rng.randrange(50)
            for chat in [chat for chat in here if chat.due == step]:
                self._ask(chat, step)
            for replica in self.replicas.values():
                for chat in self._step(replica, step):
                    if not chat.messages:
                        here.remove(chat)
            step += 1
        return self._results(chats, step)

    def _ask(self, chat: Chat, step: int) -> None:
        chat.text += chat.messages.popleft()
        request_id = f"{id(chat)}-{step}"
        replica = self.replicas[self._route(chat.text, self)]
        chat.replicas.append(replica.name)
        stop = StopRules(max_tokens=chat.answer_tokens.pop())
        prompt = TokenPrompt(tuple(chat.text.encode()))
        request = GenerateRequest(request_id, prompt, SamplingParams(temperature=0), stop)
        replica.core.add(replica.core.prepare(request))
        found = self.index.find(prompt.token_ids).get(replica.name)
        replica.waiting[request_id] = step, len(chat.text) - (found.cached if found else 0)
        self._asked[request_id] = chat, replica

    def _step(self, replica: Replica, step: int) -> list[Chat]:
        """One step of an engine; the chats whose answers have ended."""
        if not replica.core.has_work:
            return []
        ended = []
        result = replica.core.step()
        assert not result.failed
        replica.news(self.index)
        for delta in result.deltas:
            chat, _ = self._asked[delta.request_id]
            chat.text += delta.text
            began = replica.waiting.pop(delta.request_id, None)
            if began is not None:
                self.first_word_steps.append(step - began[0])
            if delta.finish is not None:
                del self._asked[delta.request_id]
                chat.due = step + self.rng.randrange(20, 200)
                ended.append(chat)
        return ended

    def _results(self, chats: Sequence[Chat], steps: int) -> dict[str, object]:
        stats = [replica.core.stats() for replica in self.replicas.values()]
        follow_ups = [a == b for chat in chats for a, b in zip(chat.replicas, chat.replicas[1:], strict=False)]
        return {
            "prompt_tokens": sum(s.prompt_tokens for s in stats),
            "reused_tokens": sum(s.cached_tokens for s in stats),
            "reused_share": round(sum(s.cached_tokens for s in stats) / sum(s.prompt_tokens for s in stats), 4),
            "follow_ups_on_the_same_replica": round(mean(follow_ups), 4),
            "steps_to_first_word": round(mean(self.first_word_steps), 2),
            "steps": steps,
        }


def chats_of(num_cards: int, seed: int) -> list[Chat]:
    """Two hundred short chats: a card of 200 to 500 characters, three to six messages of 20 to 80."""
    rng = random.Random(seed)

    def words(length: int) -> str:
        return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz     ") for _ in range(length))

    cards = [words(rng.randrange(200, 500)) for _ in range(num_cards)]
    chats = []
    for _ in range(NUM_CHATS):
        turns = rng.randrange(3, 7)
        messages = deque(f"\nUser: {words(rng.randrange(20, 80))}\nBot:" for _ in range(turns))
        chats.append(Chat(rng.choice(cards), messages, [rng.randrange(20, 100) for _ in range(turns)], 0))
    return chats


# ---- routers ----


def exact(text: str, fleet: Fleet) -> str:
    """By digests."""
    found, loads = fleet.index.find(list(text.encode())), fleet.queue_lengths()
    candidates = [
        Candidate(
            name,
            cached=found[name].cached if name in found else 0,
            queued_tokens=sum(tokens for _, tokens in replica.waiting.values()),
            num_queued=len(replica.waiting),
            num_running=loads[name],
            is_full=loads[name] >= MAX_SEQS,
        )
        for name, replica in fleet.replicas.items()
    ]
    return choose(len(text), candidates, fleet.rng)


def guessed(guess: CharacterGuess, text: str, fleet: Fleet) -> str:
    return guess.choose(text, fleet.queue_lengths())


def least_loaded(text: str, fleet: Fleet) -> str:
    loads = fleet.queue_lengths()
    least = min(loads.values())
    return fleet.rng.choice([name for name in loads if loads[name] == least])


def routers(seed: int) -> dict[str, Route]:
    names = [str(number) for number in range(NUM_REPLICAS)]

    def guess(threshold: float) -> Route:
        return partial(guessed, CharacterGuess(names, random.Random(seed), threshold))

    return {
        "exact digest": exact,
        "character guess": guess(float("inf")),
        "character guess, queues may differ by 4": guess(4),
        "least loaded": least_loaded,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache-tokens", type=int, nargs="+", default=[4096, 8192], help="of each replica")
    parser.add_argument("--at-once", type=int, default=48, help="chats that are under way at the same time")
    arguments = parser.parse_args()
    settings = []
    for (chats, num_cards), cache_tokens in product(CARDS.items(), arguments.cache_tokens):
        results = {
            name: Fleet(cache_tokens, route, SEED).run(chats_of(num_cards, SEED), arguments.at_once)
            for name, route in routers(SEED).items()
        }
        reused = {name: int(str(result["reused_tokens"])) for name, result in results.items()}
        ratios = {
            name: round(reused["exact digest"] / count, 3) for name, count in reused.items() if name != "exact digest"
        }
        settings.append({"chats": chats, "cache_tokens": cache_tokens, "routers": results, "exact_to": ratios})
        print(chats, cache_tokens, ratios, *(f"\n  {name}: {result}" for name, result in results.items()), flush=True)
    sizes = {"replicas": NUM_REPLICAS, "chats": NUM_CHATS, "at_once": arguments.at_once}
    print(report.write("routed", {**sizes, "settings": settings}))


if __name__ == "__main__":
    main()
