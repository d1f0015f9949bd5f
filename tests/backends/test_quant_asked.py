"""A model in another format than was asked for is refused, in one line, before its weights are read."""

from pathlib import Path

import pytest
from checkout import TINY
from hf_folders import mixtral_8x7b

from tightrope.backends.errors import BackendError
from tightrope.backends.gguf.model_file import read_model
from tightrope.backends.hf.load.inspection import inspect
from tightrope.backends.locate import bundled_model
from tightrope.backends.settings import ModelSettings, Quantize

FOLDERS: dict[Quantize, str] = {
    "exl2": "llama-exl2-mixed-h6",
    "gptq": "llama-gptq-4bit-32g-actorder",
    "awq": "llama-awq-4bit-32g",
    "bitsandbytes-nf4": "llama-untied-bnb-nf4",
}


@pytest.mark.parametrize("asked", FOLDERS)
@pytest.mark.parametrize("there", FOLDERS)
def test_the_format_that_was_asked_for_is_the_one_that_is_served(asked: Quantize, there: Quantize):
    folder = TINY / FOLDERS[there]
    if asked == there:
        assert inspect(folder, ModelSettings(quantize=asked)).blueprint.quantization is not None
        return

    with pytest.raises(BackendError) as caught:
        inspect(folder, ModelSettings(quantize=asked))

    assert str(caught.value).startswith(f"--quantize {asked}: the weights in {folder} are ")
    assert str(caught.value).endswith(" bits per weight; leave it out")


def test_plain_weights_are_not_quantized_while_loading(tmp_path: Path):
    folder = mixtral_8x7b(tmp_path)

    with pytest.raises(
        BackendError,
        match=r"^--quantize gptq: the weights in .* are plain, and nothing is quantized while loading; leave it out$",
    ):
        inspect(folder, ModelSettings(quantize="gptq"))


def test_a_gguf_file_is_in_none_of_these_formats():
    with pytest.raises(BackendError, match=r"^--quantize awq: llama.cpp, which runs GGUF files, has types of its own"):
        read_model(bundled_model(), ModelSettings(quantize="awq"))
