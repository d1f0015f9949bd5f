"""transformers' module tree of a model folder: every parameter on the meta device, every buffer real.

`torch.device("meta")` would lose buffers that no file holds (`inv_freq`, Gemma's `embed_scale`), so only parameters go
there, one by one as they are registered.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from tightrope.backends.errors import BackendError
from tightrope.backends.files.config_fields import computing
from tightrope.backends.files.hf_config import ModelShape
from tightrope.backends.hf.modules.interface import INTERFACE
from tightrope.backends.rope.scaling import RopeSpec

QUERY_SCALING = ("llama_4_scaling_beta", "original_max_position_embeddings")  # Ministral 3 scales by position.


def build_skeleton(folder: Path, shape: ModelShape, rope: Mapping[str, RopeSpec] | None) -> PreTrainedModel:
    """The untouched causal language model that config.json describes, without weights.

    Where `rope` is given, its rotary modules have the right shape but not yet the right frequencies
    (backends.hf.rotary). Raises BackendError when transformers can't build it.
    """
    fields = computing(shape.raw)
    if rope is not None:
        fields.pop("rope_scaling", None)
        fields["rope_parameters"] = _plain_rotation(shape.raw.get("rope_parameters"), rope)
    try:
        config = CONFIG_MAPPING[shape.model_type].from_dict(fields)
        if config.pad_token_id is not None and not 0 <= config.pad_token_id < shape.vocab_size:
            config.pad_token_id = None  # Many a tune gave this token no row; nothing is padded.
        with _parameters_on_meta(), no_init_weights():
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation=INTERFACE, experts_implementation="eager"
            )
    except Exception as error:  # Transformers checks the fields in many places, each in its own way.
        path = folder / "config.json"
        for name, value in fields.items():
            # A name of an activation, for one, is looked up like this.
            if isinstance(error, KeyError) and isinstance(value, str) and error.args == (value,):
                raise BackendError(f"{path}: {name} is {value!r:.80}, which transformers doesn't know") from error
        raise BackendError(f"{path}: transformers can't build it: {_one_line(error)}") from error
    assert isinstance(model, PreTrainedModel)
    model.requires_grad_(False).eval()
    return model


def _plain_rotation(given: object, rope: Mapping[str, RopeSpec]) -> dict[str, object]:
    """transformers' rope_parameters without scaling, but with those of the file, `given`, that scale queries."""
    others = {key: given[key] for key in QUERY_SCALING if key in given} if isinstance(given, dict) else {}
    plain = {
        key: {
            "rope_type": "default",
            "rope_theta": spec.theta,
            "partial_rotary_factor": spec.rotary_dim / spec.head_dim,
            **others,
        }
        for key, spec in rope.items()
    }
    return dict(plain.get("default", plain))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Move each parameter to the meta device when a module registers it; not for two threads at once."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(self, name, None if param is None else nn.Parameter(param.to("meta"), requires_grad=False))

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]
