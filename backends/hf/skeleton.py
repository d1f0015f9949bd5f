"""transformers' module tree of a model folder: every parameter on the meta device, every buffer real.

`torch.device("meta")` would lose buffers that no file holds (`inv_freq`, Gemma's `embed_scale`), so only parameters go
there, one by one as they are registered.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tightrope.backends.errors import BackendError

INTERFACE = "tightrope"  # our name among transformers' attention implementations


def build_skeleton(folder: Path) -> PreTrainedModel:
    """The untouched causal language model that `folder`/config.json names, without weights.

    Raises BackendError when transformers doesn't know the model, or config.json doesn't describe one.
    """
    path = folder / "config.json"
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with _parameters_on_meta(), no_init_weights():
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation=INTERFACE, experts_implementation="eager"
            )
    except Exception as error:  # of many kinds, as transformers checks the file in many places
        raise BackendError(f"{path}: transformers can't build this model: {_one_line(error)}") from error
    assert isinstance(model, PreTrainedModel)
    model.requires_grad_(False).eval()
    return model


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


class AttentionCall:
    """What stands behind the attention interface in one module: called with queries, keys, values and a mask."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: object, **settings: object
    ) -> tuple[Tensor, None]:
        """query [1, H, T, D], key and value [1, Hkv, T, D] to [1, T, H, D]."""
        raise NotImplementedError


def answer_with(module: nn.Module, attend: AttentionCall) -> None:
    """Let `attend` compute whatever `module` asks of the attention interface."""
    module.__dict__["attend"] = attend


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    **settings: object,
) -> tuple[Tensor, None]:
    attend: AttentionCall = module.__dict__["attend"]
    return attend(query, key, value, attention_mask, **settings)


class Mask:
    """Which tokens a token sees, as transformers describes it; never materialised."""

    def __init__(self, is_seen: Callable[[int, int, Tensor, Tensor], Tensor]) -> None:
        self._is_seen = is_seen

    def sees(self, query: int, key: int) -> bool:
        """Whether the token at position `query` sees the one at `key`."""
        return bool(self._is_seen(0, 0, torch.tensor(query), torch.tensor(key)))


def _mask(*, mask_function: Callable[[int, int, Tensor, Tensor], Tensor], **sizes: object) -> Mask:
    """In place of a mask: attention knows causality and window from the layer's AttentionSpec."""
    return Mask(mask_function)


ALL_ATTENTION_FUNCTIONS.register(INTERFACE, _attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(INTERFACE, _mask)
