"""The servers of a Hugging Face folder that are compared: tightrope, `transformers serve`, and plain `generate`.

The peers come in variants, of which a comparison keeps the fastest for each scenario.
"""

import asyncio
import json
import time
import urllib.request
from collections.abc import Sequence
from functools import partial

from bench.peers import PEERS, Peer, Setup
from bench.sse import Answer, RequestFailed
from bench.workloads import Target

_PAGE = 256  # tokens in a block of transformers' continuous batching
_STEP_TOKENS = 512  # with the default of 8192, a prompt of 4,000 tokens takes it 10.6 s instead of 7.4
_SHORT = frozenset({"1 stream", "8 streams"})  # eager attention takes five times as long for a long prompt
_GREEDY: dict[str, object] = {"temperature": 0}  # every server can, and it is the least work
_SERVE_BODY: dict[str, object] = {
    **dict.fromkeys(("top_k", "top_p", "min_p", "ignore_eos")),  # it refuses fields that it doesn't know
    **_GREEDY,
    "generation_config": json.dumps({"eos_token_id": -1, "do_sample": False}),  # no such token: it runs to the end
}


class BatchTarget(Target):
    """bench.generate_server: all prompts go in one request, as a padded batch."""

    __slots__ = ()

    async def complete(self, prompt: str, max_tokens: int, seed: int, until: asyncio.Event | None = None) -> Answer:
        [answer] = await self.complete_all([prompt], max_tokens)
        return answer

    async def complete_all(self, prompts: Sequence[str], max_tokens: int) -> list[Answer]:
        return await asyncio.to_thread(self._post, prompts, max_tokens)

    def _post(self, prompts: Sequence[str], max_tokens: int) -> list[Answer]:
        body = json.dumps({"prompts": list(prompts), "max_tokens": max_tokens}).encode()
        sent_s = time.perf_counter()
        try:
            with urllib.request.urlopen(urllib.request.Request(self.base_url, body), timeout=300) as reply:
                found = json.load(reply)
        except OSError as error:
            raise RequestFailed(f"generate did not answer: {error}") from error
        arrivals_s = [sent_s + arrival_s for arrival_s in found["arrivals_s"]]
        return [
            Answer(sent_s, arrivals_s, "", len(arrivals_s), num_tokens, 0, arrivals_s[-1])
            for num_tokens in found["prompt_tokens"]
        ]


def _serve(setup: Setup, port: int, dtype: str) -> list[str]:
    return [
        *("-m", "transformers.cli.transformers", "serve", str(setup.model), "--host", "127.0.0.1"),
        *("--port", str(port), "--device", "cpu", "--dtype", dtype, "--continuous-batching"),
        *("--cb-num-blocks", str(setup.context // _PAGE), "--cb-max-batch-tokens", str(_STEP_TOKENS)),
    ]


def _generate(setup: Setup, port: int, dtype: str, attention: str) -> list[str]:
    return [
        *("-m", "bench.generate_server", str(setup.model), "--port", str(port), "--threads", str(setup.threads)),
        *("--dtype", dtype, "--attention", attention),
    ]


OURS = Peer("tightrope", PEERS["tightrope"].arguments, extra_body=_GREEDY)

VARIANTS = (
    *(
        Peer(f"transformers serve, {dtype}", partial(_serve, dtype=dtype), extra_body=_SERVE_BODY)
        for dtype in ("bfloat16", "float32")
    ),
    *(
        Peer(
            f"generate, {dtype} {attention}",
            partial(_generate, dtype=dtype, attention=attention),
            target=BatchTarget,
            only=scenarios,
        )
        for dtype, attention, scenarios in (
            ("bfloat16", "sdpa", None),
            ("bfloat16", "eager", _SHORT),
            ("float32", "sdpa", None),  # with eager attention it is slower throughout
        )
    ),
)


def family(name: str) -> str:
    """The peer that a variant of this name is one of."""
    return name.partition(",")[0]
