"""The torch engine's comparison: `generate` as a server, the choice among a peer's variants, and the bars."""

import json
import threading
from collections.abc import Iterator

import pytest
import torch
from test_bench import ScriptedServer, streamed
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.cli.serving.completion import TransformersTextCompletionCreateParams

from bench import generate_server
from bench.compare import takes_part
from bench.compare_hf import BARS, entrants, scenarios, winners
from bench.peers_hf import OURS, VARIANTS, BatchTarget, family
from bench.sse import RequestFailed
from bench.stats import Sample, judge
from bench.workloads import Target, run_prompt, run_streams

pytestmark = pytest.mark.quick

WORDS = ("<pad>", "<end>", "one", "two", "three", "four")


def small_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=None,
    )
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", padding_side="left")
    return LlamaForCausalLM(config).eval(), tokenizer


@pytest.fixture(scope="module")
def target() -> Iterator[BatchTarget]:
    server = generate_server.serve(*small_model(), port=0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield BatchTarget("generate", f"http://127.0.0.1:{server.server_port}", None, {})
    server.shutdown()
    server.server_close()
    thread.join()


async def test_a_batch_gives_every_prompt_its_tokens_at_the_same_times(target: BatchTarget) -> None:
    short, long = await target.complete_all(["one", "one two three"], 5)
    assert (short.prompt_tokens, long.prompt_tokens) == (1, 3)
    assert short.num_tokens == long.num_tokens == 5
    assert short.arrivals_s == long.arrivals_s == sorted(long.arrivals_s)
    assert short.sent_s < short.arrivals_s[0]
    assert short.arrivals_s[-1] == short.done_s


async def test_streams_and_prompts_are_measured_with_generate_as_with_a_server(target: BatchTarget) -> None:
    streams = await run_streams(target, "salt", 8, max_tokens=3)
    assert streams["tokens"] == 24
    prompt = await run_prompt(target, "salt", 50)
    assert prompt["prompt_tokens"] >= 50
    assert prompt["prompt_tokens_per_s"] == pytest.approx(prompt["prompt_tokens"] / prompt["ttft_ms"] * 1e3)


async def test_generate_that_is_gone_fails_the_measurement() -> None:
    with pytest.raises(RequestFailed, match="generate did not answer"):
        await BatchTarget("generate", "http://127.0.0.1:9", None, {}).complete("one", 1, seed=0)


async def test_transformers_is_sent_no_field_that_it_refuses() -> None:
    [body] = {json.dumps(peer.extra_body) for peer in VARIANTS if family(peer.name) == "transformers serve"}
    server = ScriptedServer(streamed("a"))
    async with server as url:
        await Target("transformers serve", url, None, json.loads(body)).complete("one", 4, seed=0)
    [sent] = server.bodies
    assert set(sent) <= set(TransformersTextCompletionCreateParams.__mutable_keys__)
    assert sent["temperature"] == 0
    assert json.loads(str(sent["generation_config"]))["eos_token_id"] == -1


def trial(server: str, scenario: str, value: float) -> Sample:
    return Sample(
        server, scenario, 0, dict.fromkeys(("decode_tokens_per_s", "tokens_per_s", "prompt_tokens_per_s"), value)
    )


TRIALS = [
    trial("transformers serve, bfloat16", "1 stream", 25.0),
    trial("transformers serve, float32", "1 stream", 15.0),
    trial("generate, bfloat16 sdpa", "8 streams", 107.0),
    trial("generate, bfloat16 eager", "8 streams", 151.0),
    trial("generate, bfloat16 sdpa", "4,000 tokens", 550.0),
    trial("generate, float32 sdpa", "4,000 tokens", 350.0),
]


def test_the_fastest_variant_of_each_peer_is_kept_for_each_scenario() -> None:
    assert winners(TRIALS) == {
        "transformers serve, bfloat16": ["1 stream"],
        "generate, bfloat16 eager": ["8 streams"],
        "generate, bfloat16 sdpa": ["4,000 tokens"],
    }


def test_a_variant_takes_part_in_what_it_won_under_its_peers_name() -> None:
    variants = [(peer, peer.target(peer.name, "http://127.0.0.1:1", None, {})) for peer in VARIANTS]
    entered = entrants(variants, winners(TRIALS))
    assert {target.name: type(target) for _, target in entered} == {
        "transformers serve": Target,
        "generate": BatchTarget,
    }
    parts = [(s.name, t.name) for peer, t in entered for s in scenarios(8) if takes_part(peer, s)]
    assert sorted(parts) == [
        ("1 stream", "transformers serve"),
        ("4,000 tokens", "generate"),
        ("8 streams", "generate"),
    ]


def test_tightrope_takes_part_in_all() -> None:
    assert all(takes_part(OURS, scenario) for scenario in scenarios(8))


def test_every_bar_is_judged_by_a_metric_of_its_scenario() -> None:
    metrics = {"decode_tokens_per_s": 40.0, "tokens_per_s": 200.0, "prompt_tokens_per_s": 900.0}
    samples = [
        Sample(
            server, scenario.name, 0, {name: value * (server == "tightrope" or 0.5) for name, value in metrics.items()}
        )
        for scenario in scenarios(8)
        for server in ("tightrope", "transformers serve", "generate")
    ]
    verdicts = judge(samples, BARS)
    assert [verdict["bar"] for verdict in verdicts] == [2.0, 2.0, 2.0, 2.0, 1.0, 1.0]
    assert all(verdict["value"] == pytest.approx(2.0) and verdict["met"] for verdict in verdicts)
