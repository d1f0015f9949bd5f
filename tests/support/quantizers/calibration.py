"""What quantizers ask of a model: its weights, and what its matrices get to see while it reads prose."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from pydoc_data.topics import topics

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

HEAD, TABLE = "lm_head", "model.embed_tokens"
# matrices of a llama's layer that have their input in common
FAMILIES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
NUM_WINDOWS, WINDOW = 24, 256  # tokens


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A llama in bf16. `hessians` [K, K] float32 are sums of x x^T over tokens, by the first matrix of each family."""

    folder: Path
    tensors: dict[str, Tensor]
    hessians: dict[str, Tensor]
    num_layers: int

    def families(self) -> Iterator[tuple[list[str], Tensor]]:
        """The matrices that share an input, by name, and that input's hessian; the head is not among them."""
        for layer in range(self.num_layers):
            for family in FAMILIES:
                names = [f"model.layers.{layer}.{name}" for name in family]
                yield names, self.hessians[names[0]]

    def weight(self, name: str) -> Tensor:
        """[K, N] float32 of the matrix; the head's is the embedding's where the model has no other."""
        own = self.tensors.get(f"{name}.weight")
        return (self.tensors[f"{TABLE}.weight"] if own is None else own).float().t()

    def others(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Embeddings and norms, which every format leaves as they are."""
        matrices = ("_proj.", f"{HEAD}.")
        return {name: t.to(dtype) for name, t in self.tensors.items() if not any(part in name for part in matrices)}


@cache
def calibrated(folder: Path) -> Calibrated:
    """Read the folder of a llama and run it on 6,144 tokens of prose."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    token_ids = tokenizer("\n".join(topics.values())[: 8 * NUM_WINDOWS * WINDOW])["input_ids"]
    windows = torch.tensor(token_ids[: NUM_WINDOWS * WINDOW]).view(NUM_WINDOWS, WINDOW)
    hessians: dict[str, Tensor] = {}
    firsts = [(f"model.layers.{i}.{family[0]}") for i in range(len(model.model.layers)) for family in FAMILIES]
    for name in (*firsts, HEAD):
        model.get_submodule(name).register_forward_pre_hook(partial(_watch, _adder(hessians, name)))
    with torch.inference_mode():
        for window in windows.split(4):
            model(input_ids=window, use_cache=False, logits_to_keep=slice(0, None, 8))  # the head's share is large
    tensors = {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}
    return Calibrated(folder, tensors, hessians, len(model.model.layers))


def _watch(add: Callable[[Tensor], None], module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    add(inputs[0].flatten(0, -2))


def _adder(hessians: dict[str, Tensor], name: str) -> Callable[[Tensor], None]:
    def add(x: Tensor) -> None:
        product = x.t() @ x
        hessians[name] = hessians[name] + product if name in hessians else product

    return add
