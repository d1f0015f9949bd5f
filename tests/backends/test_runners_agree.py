"""Both runners on the same weights with the same settings give the same probabilities; linear scaling is what it says.

The Hugging Face folder holds the bundled GGUF file's own weights, dequantized. So what is left between the runners is
rounding, of weights to bf16 in one and of activations to 8 bits in the other, and a scaling that meant something else
in one of them would move them much further apart than that.
"""

from collections.abc import Iterator, Sequence

import pytest
import torch
from hf_models import smollm2_bf16
from torch import Tensor
from transformers import AutoModelForCausalLM

from tightrope.backends.gguf.backend import GGUFBackend
from tightrope.backends.hf.backend import HFBackend
from tightrope.backends.hf.run.calibrate import TEXT
from tightrope.backends.hf.run.rotary import RotarySets
from tightrope.backends.locate import bundled_model
from tightrope.backends.protocol import Backend, Chunk
from tightrope.backends.settings import ModelSettings
from tightrope.server.settings.settings import load_settings

NUM_TOKENS = 128
# As people type them. Dynamic NTK is NTK with a factor of its own for each length, and llama.cpp has none.
SCALINGS = {
    "none": {"rope-scaling": "none"},
    "linear": {"compress-pos-emb": "4"},
    "ntk": {"alpha-value": "4"},
    "yarn": {"rope-scaling": "yarn", "rope-factor": "4"},
}


def settings(options: dict[str, str]) -> ModelSettings:
    """What `serve` would hand to a runner; keys and values in 16 bits, as both have them."""
    small = {"max-model-len": "512", "kv-cache-tokens": "512", "kv-cache": "f16", "max-num-seqs": "1"}
    return load_settings(small | options, {}).engine.model


def logits_of(backend: Backend, token_ids: Sequence[int]) -> Tensor:
    """[n, V] of one sequence, run in one step."""
    backend.kv.open(0, token_ids, "", reuse="nothing")
    assert backend.kv.reserve(0, len(token_ids))
    logits = backend.forward([Chunk(0, token_ids, 0, "all")])
    backend.kv.close(0, keep=False)
    return logits


def torch_engine(options: dict[str, str]) -> HFBackend:
    return HFBackend(smollm2_bf16(), settings(options), lambda _: None)


@pytest.fixture(scope="module")
def plain() -> Iterator[HFBackend]:
    """The torch engine without any scaling."""
    loaded = torch_engine(SCALINGS["none"])
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def token_ids(plain: HFBackend) -> list[int]:
    return plain.tokenizer.encode(TEXT, parse_special=False, is_start=True)[:NUM_TOKENS]


@pytest.fixture(scope="module")
def answers(plain: HFBackend, token_ids: list[int]) -> dict[str, tuple[Tensor, Tensor]]:
    """Log-probabilities [n, V] of the torch engine and of llama.cpp, for every scaling."""
    found = {}
    for kind, options in SCALINGS.items():
        ours = plain if kind == "none" else torch_engine(options)
        theirs = GGUFBackend(bundled_model(), settings(options), lambda _: None)
        assert theirs.tokenizer.encode(TEXT, parse_special=False, is_start=True)[:NUM_TOKENS] == token_ids
        found[kind] = logits_of(ours, token_ids).log_softmax(-1), logits_of(theirs, token_ids).log_softmax(-1)
        theirs.close()
    return found


def divergence(expected: Tensor, got: Tensor) -> float:
    """Mean KL divergence, in nats a token."""
    return float((expected.exp() * (expected - got)).sum(-1).mean())


@pytest.mark.parametrize("kind", SCALINGS)
def test_a_scaling_leaves_nothing_between_the_runners_but_the_rounding_of_the_unscaled_model(
    kind: str, answers: dict[str, tuple[Tensor, Tensor]]
) -> None:
    rounding = divergence(*answers["none"])
    assert rounding < 0.005  # nats; of the 4.9-bit file's products with activations in 8 bits

    apart = divergence(*answers[kind])
    others = [divergence(answers[kind][0], theirs) for other, (_, theirs) in answers.items() if other != kind]

    assert apart < 1.5 * rounding
    assert min(others) > 8 * rounding  # so that a wrong kind or factor could not have passed


def test_positions_eight_times_as_far_apart_give_the_unscaled_models_logits_with_compress_pos_emb_8(
    plain: HFBackend, token_ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that was tuned for linear scaling by 8 sees at position 8 i what the model before tuning saw at i."""
    expected = logits_of(plain, token_ids)
    angles = RotarySets._angles
    with monkeypatch.context() as patch:
        patch.setattr(RotarySets, "_angles", lambda sets, length, positions: angles(sets, length, 8 * positions))
        tuned = torch_engine({"compress-pos-emb": "8"})

    assert torch.equal(logits_of(tuned, token_ids), expected)  # an eighth of a float has the same digits
    tuned.close()


def test_compress_pos_emb_8_is_the_untouched_model_at_an_eighth_of_each_position(token_ids: list[int]) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(smollm2_bf16(), dtype=torch.float32)
    ids = torch.tensor([token_ids])
    scaled = torch_engine({"compress-pos-emb": "8"})

    with torch.inference_mode():
        # the mask is given lest positions that don't count up be taken for several sequences in a row
        eighths = torch.arange(NUM_TOKENS).unsqueeze(0) / 8
        expected = theirs(ids, position_ids=eighths, attention_mask=torch.ones_like(ids)).logits[0]
    logits = logits_of(scaled, token_ids)

    assert (logits - expected).norm() < 1e-3 * expected.norm()  # keys and values of 11 bits against 24
    scaled.close()
