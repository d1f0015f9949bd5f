"""Which fields of config.json a model's arithmetic is made of, and what is meant by their values."""

from collections.abc import Mapping
from typing import Any, get_args

_OTHERS = frozenset(
    {
        *("quantization_config", "auto_map", "torch_dtype", "dtype"),  # Others of our modules read these.
        *("bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id"),
        *("id2label", "label2id", "problem_type", "initializer_range"),  # These are about training.
        *("use_cache", "return_dict", "output_attentions", "output_hidden_states"),  # A call gives this back.
    }
)


def computing(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that may have a say in the arithmetic, so that a mistake in another one stops nobody."""
    fields = {name: value for name, value in config.items() if name not in _OTHERS}
    if type(fields.get("pad_token_id")) is not int:  # some families count positions from it
        fields.pop("pad_token_id", None)
    return fields


def as_meant(config: Mapping[str, Any], declared: Mapping[str, object]) -> dict[str, Any]:
    """config.json with the types that its class declares: 256.0 is a whole number where one is expected, and 1 a
    float; null states nothing where a number, a switch or a text is expected.

    declared: the class's annotations by the names that config.json uses.
    """
    found = {}
    for name, value in config.items():
        kinds = set(get_args(declared.get(name)) or (declared.get(name),))
        if value is None and kinds <= {int, float, bool, str}:
            continue
        if type(value) is int and float in kinds and int not in kinds:
            value = float(value)
        elif type(value) is float and int in kinds and float not in kinds and value.is_integer():
            value = int(value)
        found[name] = value
    return found
