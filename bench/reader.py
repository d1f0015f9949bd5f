"""How long a small request waits while long texts are tokenized: python -m bench.reader [MODEL]

Eight bodies of 2 MB go to /tokenize at once, words in half of them and special tokens in the others, on an engine that
is otherwise idle; meanwhile a completion of one token, a small /tokenize and /health are asked for again and again.
Writes bench/results/reader.json.
"""

import argparse
import json
import tempfile
import time
import urllib.request
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from bench import report
from bench.compare import bundled_model
from bench.load import exclusive
from bench.peers import end_servers_when_told
from bench.served import serving
from bench.stats import spread

NUM_BODIES, BODY_BYTES = 8, 2_000_000
NUM_ALONE = 20
BAR_S = 0.5  # that the small request is held up, at most
WORDS = "The ferry left at seven, when the harbour was still grey and the gulls sat in a row along the wall.\n"
SMALL = {"prompt": "A small request", "max_tokens": 1, "temperature": 0}


def asked(url: str, body: bytes | None = None) -> float:
    """Seconds until the whole answer is there."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    began_s = time.perf_counter()
    with urllib.request.urlopen(request, timeout=600) as reply:
        reply.read()
    return time.perf_counter() - began_s


def held_up(url: str) -> dict[str, object]:
    """Seconds of the small requests and of the long bodies."""
    small, completions, health = json.dumps(SMALL).encode(), f"{url}/v1/completions", f"{url}/health"
    alone_s = [asked(completions, small) for _ in range(NUM_ALONE)]
    texts = [unit * (BODY_BYTES // len(json.dumps(unit))) for unit in (WORDS, "<|im_end|>")] * (NUM_BODIES // 2)
    bodies = [json.dumps({"prompt": text}).encode() for text in texts]
    small_s, tokens_s, health_s = list[float](), list[float](), list[float]()
    with ThreadPoolExecutor(NUM_BODIES) as pool:
        long_ones: list[Future[float]] = [pool.submit(asked, f"{url}/tokenize", body) for body in bodies]
        while not all(one.done() for one in long_ones):
            small_s.append(asked(completions, small))
            tokens_s.append(asked(f"{url}/tokenize", b'{"prompt": "hi"}'))
            health_s.append(asked(health))
    held_up_s = max(small_s) - spread(alone_s)["median"]
    return {
        "alone_s": spread(alone_s),
        "meanwhile_s": spread(small_s),
        "worst_s": max(small_s),
        "tokens_worst_s": max(tokens_s),
        "health_worst_s": max(health_s),
        "long_bodies_s": spread([one.result() for one in long_ones]),
        "num_small": len(small_s),
        "held_up_s": held_up_s,
        "bar_s": BAR_S,
        "holds": held_up_s <= BAR_S,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, help="a model; default: the bundled one")
    parser.add_argument("--lock", type=Path, help="lock file to hold while measuring")
    options = parser.parse_args()
    end_servers_when_told()
    model = options.model or bundled_model()
    with (
        exclusive(options.lock),
        tempfile.TemporaryDirectory() as folder,
        serving(model, Path(folder), "reader", ()) as served,
    ):
        found = held_up(served.url)
    print(json.dumps(found, indent=1))
    print(report.write("reader", found))


if __name__ == "__main__":
    main()
