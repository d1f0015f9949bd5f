"""SmolLM2 in the quantized formats that people have, written once and kept under build/test-models.

`python tests/support/quant_models.py [FORM,...]` with PYTHONPATH=. writes them, or some
of them, and prints their paths, the bf16 model first.
"""

import json
import shutil
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

from hf_models import once, smollm2_bf16
from quantizers import awq, exl2, gptq, nf4
from quantizers.calibration import NUM_WINDOWS, WINDOW, Calibrated, calibrated
from safetensors.torch import save_file
from torch import Tensor

Json = dict[str, Any]
COPIED = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def _exl2(mix: exl2.Mix) -> Callable[[Calibrated, Path], None]:
    def write(model: Calibrated, folder: Path) -> None:
        tensors, bits = exl2.quantize(model, mix)
        config = {
            "quant_method": "exl2",
            "version": "0.3.2",
            "bits": round(bits, 2),
            "head_bits": 6,
            "calibration": {"rows": NUM_WINDOWS, "length": WINDOW, "dataset": "pydoc_data.topics"},
        }
        _finish(model, folder, "output.safetensors", tensors, config)

    return write


def _gptq(model: Calibrated, folder: Path) -> None:
    _finish(model, folder, "gptq_model-4bit-128g.safetensors", gptq.quantize(model), gptq.CONFIG)
    (folder / "quantize_config.json").write_text(json.dumps(gptq.CONFIG, indent=2), "utf-8")


def _plainly(quantizer: ModuleType, model: Calibrated, folder: Path) -> None:
    _finish(model, folder, "model.safetensors", quantizer.quantize(model), quantizer.CONFIG)


WRITERS: dict[str, Callable[[Calibrated, Path], None]] = {
    "exl2-4.0bpw": _exl2(exl2.plain(4)),
    "exl2-mixed": _exl2(exl2.mixed),
    "gptq-4bit-128g-actorder": _gptq,
    "awq-4bit-64g": partial(_plainly, awq),
    "nf4": partial(_plainly, nf4),
}


@cache
def smollm2(form: str) -> Path:
    """The folder of SmolLM2-135M-Instruct in a form of WRITERS."""
    return once(f"smollm2-135m-{form}", lambda folder: WRITERS[form](calibrated(smollm2_bf16()), folder))


def _finish(model: Calibrated, folder: Path, file: str, tensors: dict[str, Tensor], quantization: Json) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file, {"format": "pt"})
    config = json.loads((model.folder / "config.json").read_text("utf-8"))
    dtype = "bfloat16" if quantization["quant_method"] == "bitsandbytes" else "float16"
    config |= {"torch_dtype": dtype, "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config, indent=1), "utf-8")
    for name in COPIED:
        shutil.copy(model.folder / name, folder / name)


if __name__ == "__main__":
    for path in (
        smollm2_bf16(),
        *map(smollm2, WRITERS if len(sys.argv) == 1 else filter(None, sys.argv[1].split(","))),
    ):
        print(path, flush=True)
