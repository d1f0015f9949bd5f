"""All kernels that models of every format launch compile for the cards that people own."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from checkout import FORMATS, ROOT

from bench.gpu.mixture import MIXTURE
from bench.gpu.random_weights import YI_34B, exl2_entries, gptq_entries, plain_entries, random_model
from tightrope.backends.hf.run.rotary import RotarySets
from tightrope.backends.hf.run.warmup import Steps, gather
from tightrope.backends.hf.warm import META, meta_steps
from tightrope.backends.rope.scaling import resolve_rope
from tightrope.backends.settings import ModelSettings, RopeSettings
from tightrope.kernels import dispatch

ONE_LAYER = {**YI_34B, "num_hidden_layers": 1}  # all of its layers launch the same
LARGE = {
    "Yi-34B in bf16": (ONE_LAYER, plain_entries),
    "Yi-34B in EXL2": (ONE_LAYER, exl2_entries),
    "Yi-34B in GPTQ": (ONE_LAYER, gptq_entries),
    "a mixture in GPTQ": ({**ONE_LAYER, **MIXTURE}, gptq_entries),
    "a mixture in bf16": ({**ONE_LAYER, **MIXTURE}, plain_entries),
}
TINY = ("llama-gptq-4bit-32g-actorder", "llama-awq-4bit-32g", "llama-untied-bnb-nf4", "llama-exl2-mixed-h6")

READERS = ("vector_parts", "batch_parts", "expand_columns")


@cache
def steps_of(name: str) -> Steps:
    settings = ModelSettings(adapter_folder=str(Path.cwd()))  # some folder: kernels of adapters are wanted, too
    if name in TINY:
        return meta_steps(FORMATS / "tiny" / name, settings)
    sizes, entries = LARGE[name]
    model, _ = random_model(sizes, entries(sizes), META, lambda line: None)
    config = {"rope_theta": 5e6, "max_position_embeddings": 24_000, "head_dim": 128, **sizes}
    rotary = {key: RotarySets(spec, 24_000, META) for key, spec in resolve_rope(config, RopeSettings(), 0).items()}
    return Steps.of(settings, model, rotary, "q8", 24_000)


@pytest.fixture(autouse=True)
def _nothing_is_compiled_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def launches_of_every_format(architecture: int) -> dict[str, Any]:
    """Every kernel with everything that it is compiled for, by a text that tells them apart."""
    launches: dict[str, Any] = {}
    with dispatch.standing_in(architecture):
        for name in LARGE:
            launches |= gather(steps_of(name))
        for name in TINY:  # of other layouts; the rest of their kernels differs by sizes that no large model has
            found = gather(steps_of(name))
            launches |= {text: kernel for text, kernel in found.items() if kernel.__name__ in READERS}
    return launches


def compile_all(launches: dict[str, Any], architecture: int) -> None:
    with dispatch.standing_in(architecture):
        # Threads that take turns at Python take half as much of the CPUs again, which other tests are waiting for.
        assert dispatch.compile_all(launches, 1, lambda share: None) == len(launches)


def test_every_kernel_is_launched_by_some_format_and_compiles_for_the_smallest_cards():
    launches = launches_of_every_format(86)
    one_of_each = {kernel.__name__: (text, kernel) for text, kernel in reversed(launches.items())}

    assert one_of_each.keys() == kernels_there_are()
    compile_all(dict(one_of_each.values()), 86)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [86, 89, 90], ids=["RTX 30", "RTX 40", "H100 and H200"])
def test_every_kernel_of_every_format_compiles(architecture: int):
    compile_all(launches_of_every_format(architecture), architecture)


def kernels_there_are() -> set[str]:
    """Whatever is marked as one in kernels/triton."""
    texts = [path.read_text("utf-8") for path in (ROOT / "kernels/triton").glob("*.py")]
    return {name for text in texts for name in re.findall(r"^@kernel\ndef (\w+)", text, re.MULTILINE)}
