"""What digests cost: of an engine's steps, and of a request at the router. `python -m bench.digest_cost [MODEL ...]`.

An engine runs a prompt and an answer to it while somebody wants to know what it holds; the time spent on telling is
counted call by call, as a share of the steps that it is spent in. The router looks prompts up that are held to their
ends, among few replicas and many, and chooses. Writes bench/results/digest_cost.json.
"""

import argparse
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from unittest.mock import patch

from bench import report
from tightrope.backends.detect import open_backend
from tightrope.backends.gguf.held_entries import HeldEntries
from tightrope.backends.hf.cache.held_pages import HeldPages
from tightrope.backends.holdings import Holdings, chain, root_of
from tightrope.backends.sessions.held_pieces import HeldPieces
from tightrope.backends.settings import CacheSettings, ModelSettings
from tightrope.engine.core import EngineCore
from tightrope.engine.process.held import HeldTeller
from tightrope.engine.process.wire import Held, HeldBlocks, ToFront, encode_frame
from tightrope.engine.sampler.steps import SamplingParams
from tightrope.engine.settings import LimitSettings
from tightrope.engine.types import GenerateRequest, StopRules, TokenPrompt
from tightrope.server.cluster.choosing import Candidate, choose
from tightrope.server.cluster.digests import DigestIndex, ReplicaHoldings

TOLD = [(HeldPages, "see"), (HeldEntries, "see"), (HeldPieces, "added"), (HeldPieces, "removed"), (HeldTeller, "send")]
KEY = b"k" * 32


class End:
    """Encodes what is sent, as the engine's end of a socket does."""

    def send(self, message: ToFront) -> None:
        encode_frame(message)


@contextmanager
def counted(spent_s: list[float]) -> Iterator[None]:
    """Add the time of all that is done to tell what is held."""

    def timed(call: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object, **named: object) -> object:
            began = time.thread_time()  # Not what others take of a busy machine meanwhile.
            result = call(*args, **named)
            spent_s[0] += time.thread_time() - began
            return result

        return run

    with ExitStack() as stack:
        for owner, name in TOLD:
            stack.enter_context(patch.object(owner, name, timed(getattr(owner, name))))
        yield


def engine(model: str | None, gguf_engine: str, num_prompt: int, num_answer: int) -> dict[str, float]:
    """Shares of the time of prompts' steps and of answers' steps."""
    cache = CacheSettings(tokens=8192)
    settings = ModelSettings(
        model=model,
        gguf_engine=gguf_engine,
        max_model_len=4096,
        max_num_seqs=4,
        cache=cache,
    )
    backend = open_backend(settings, lambda share: None)
    core, spent_s = EngineCore(backend, LimitSettings()), [0.0]
    rng, times = random.Random(1), {"prompt": [0.0, 0.0], "answer": [0.0, 0.0]}
    with counted(spent_s):
        teller = HeldTeller(core, End(), lambda: None)  # type: ignore[arg-type]
        teller.begin()
        teller.send()
        for number in range(4):
            prompt = tuple(rng.randrange(100, 40_000) for _ in range(num_prompt))
            stop = StopRules(max_tokens=num_answer, ignore_eos=True)
            sampling = SamplingParams(temperature=0)
            core.add(core.prepare(GenerateRequest(str(number), TokenPrompt(prompt), sampling, stop)))
        num_writing = 0
        while core.has_work:
            kind = "answer" if num_writing == 4 else "prompt"
            spent_s[0], began = 0.0, time.perf_counter()
            result = core.step()
            teller.send()
            times[kind][0] += time.perf_counter() - began
            times[kind][1] += spent_s[0]
            num_writing += sum(delta.prompt is not None for delta in result.deltas)
    backend.close()
    return {f"share_of_{kind}_steps": round(told / of, 6) for kind, (of, told) in times.items()}


def router(num_tokens: int, num_replicas: int) -> dict[str, float]:
    """Milliseconds to look a prompt up that every fourth replica holds to its end, and to choose."""
    index, tokens = DigestIndex(KEY), [(7 * place) % 30_000 for place in range(num_tokens)]
    for number in range(num_replicas):
        holdings, relay = Holdings(), ReplicaHoldings()
        if number % 4 == 0:
            holdings.add("cached", list(chain(root_of(b"", ""), tokens)), 0)
        cached, stored = (HeldBlocks(part.is_whole, part.stride, part.added, part.removed) for part in holdings.take())
        held = Held(0, cached, stored, b"", 0.03, {})
        relay.apply(held)
        index.apply(str(number), relay.changes(held, KEY))
    rng, times = random.Random(1), []
    for _ in range(21):
        began = time.perf_counter()
        found = index.find(tokens)
        choose(num_tokens, [Candidate(name, cached=one.cached) for name, one in found.items()], rng)
        times.append(1e3 * (time.perf_counter() - began))
    return {"tokens": num_tokens, "replicas": num_replicas, "p50_ms": round(median(times), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="beside the bundled one")
    parser.add_argument("--prompt", type=int, default=1000)
    parser.add_argument("--answer", type=int, default=64)
    arguments = parser.parse_args()
    runs = {"bundled, torch": (None, "own"), "bundled, llama.cpp": (None, "llama.cpp")}
    runs |= {model.rstrip("/").rpartition("/")[2]: (model, "auto") for model in arguments.models}
    engines = {name: engine(*run, arguments.prompt, arguments.answer) for name, run in runs.items()}
    routers = [router(tokens, replicas) for tokens in (500, 3000, 24_000) for replicas in (2, 16, 256)]
    print(engines, *routers, sep="\n")
    print(report.write("digest_cost", {"engines": engines, "router": routers}))


if __name__ == "__main__":
    main()
