"""What checkpoint files call the tensors of transformers' modules, which were renamed and nested over the years."""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence

# names in older files, by those in transformers 5
RENAMES: tuple[tuple[str, str], ...] = (
    (".mlp.", ".block_sparse_moe."),  # Mixtral and MiniMax have it.
    (".mlp.gate.moe_statics.", ".mlp.moe_statics."),  # Ernie 4.5 has it.
    ("lm_head.", "embed_out."),  # GPT-NeoX has it.
    (".input_layernorm.", ".ln1."),  # Yi has it, as first uploaded.
    (".post_attention_layernorm.", ".ln2."),
)

# prefixes of a language model within one that also sees, beside its head (the second one of Idefics and SmolVLM), and
# before transformers 5, with it
NESTED, NESTED_BEFORE = ("model.language_model.", "model.text_model."), "language_model."

# computed by every model that has them, and yet in some old files
COMPUTED = re.compile(
    r"(^|\.)(rotary_(pos_)?emb\.(inv_freq|cos_cached|sin_cached)|rope\.freqs|masked_bias|position_ids)$"
)

# of use for something else than the next token: layers that predict several tokens at once (of Qwen, MiMo, Ernie),
# scales for a cache of 8 bits (of llm-compressor, ModelOpt, Quark), the value head of trl, and what sees or hears
OTHER_USE = re.compile(
    r"^(model\.)?(visual|(vision|audio)_(tower|model)|(multi_modal|mm|vision|audio)_projector|connector)\."
    r"|(^|\.)(mtp(_\w+)?\.|(v|value)_head\.|(([kv]|kv|q|prob)_(cache_)?(scale|zero_point)|[kv]_proj\.output_scale)$)"
)
# and in what such layers of DeepSeek's and GLM's, which follow the model's own, differ from these
_MTP_PART = re.compile(r"^(?P<layer>.*\.layers\.\d+\.)(eh_proj|enorm|hnorm|shared_head)\.")


class FileNames:
    """The names in one checkpoint: with the base model's prefix, or without, or nested in a larger model."""

    def __init__(self, names: Collection[str], base: str, ignored: Collection[str] = ()) -> None:
        """base: transformers' name of the base model, such as "model". ignored: patterns that its class declares."""
        self._names, self._base = names, f"{base}."
        self._ignored = (COMPUTED, *map(re.compile, ignored))
        self._mtp_layers = tuple({match["layer"] for name in names if (match := _MTP_PART.match(name))})
        self._nest = nest_of(names)
        self._has_base = self._has(self._base)

    def find(self, wanted: Sequence[str]) -> list[str] | None:
        """The names in the files of the model's tensors `wanted`; None unless all are there."""
        plain = [self.of(name) for name in wanted]
        for new, old in (("", ""), *RENAMES):
            found = [name.replace(new, old) for name in plain]
            if all(name in self._names for name in found):
                return found
        return None

    def of(self, name: str) -> str:
        """What the files should call the model's tensor `name`."""
        if self._nest in NESTED:  # It is model.language_model.layers, but lm_head.
            return self._nest + name.removeprefix(self._base) if name.startswith(self._base) else name
        if self._nest:  # It is language_model.model.layers, and language_model.lm_head.
            return NESTED_BEFORE + name
        return name if self._has_base else name.removeprefix(self._base)

    def may_be_left(self, name: str) -> bool:
        """Whether a tensor of the files may go unused: computed anyway, or not of the language model."""
        is_of_text = not self._nest or name.startswith((self._nest, "lm_head."))
        return not is_of_text or any(pattern.search(name) for pattern in self._ignored)

    def is_of_other_use(self, name: str) -> bool:
        """Whether a tensor is known by its name to be of no use for a text's next token: MTP layers, towers."""
        return OTHER_USE.search(name) is not None or name.startswith(self._mtp_layers)

    def _has(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self._names)


def nest_of(names: Iterable[str]) -> str:
    """The prefix under which a larger model has its language model, by the names of tensors; empty if there is none."""
    found = tuple(names)
    return next((nest for nest in (*NESTED, NESTED_BEFORE) if any(name.startswith(nest) for name in found)), "")


def spellings(module: str) -> Iterator[str]:
    """What a module of an adapter may be called in transformers' tree of today."""
    for nest in (*NESTED, NESTED_BEFORE, ""):
        if module.startswith(nest):
            plain = module.removeprefix(nest)
            for base in ("", "model."):
                for new, old in (("", ""), *RENAMES):
                    yield base + (f"{plain}.".replace(old, new).removesuffix(".") if old else plain)
