"""What config.json says about RoPE, in old and new style: every value checked, gaps filled as transformers does."""

import copy
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tightrope.backends.errors import BackendError
from tightrope.backends.files.config_fields import computing

if TYPE_CHECKING:  # A model needs pydantic only where settings are read.
    from tightrope.backends.settings import RopeKind

FILE = "config.json"
KINDS: "dict[str, RopeKind]" = {  # Files name the kinds so, and we do.
    "default": "none",
    "linear": "linear",
    "dynamic": "dynamic",
    "ntk": "ntk",
    "yarn": "yarn",
    "llama3": "llama3",
    "longrope": "longrope",
    "su": "longrope",  # The first Phi-3 files name it so.
}
SEVERAL_AXES = ("mrope", "default")  # Models that see have these as `type` and `rope_type`; text has all axes alike.
REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "ntk": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
STRETCHING = frozenset({"dynamic", "yarn", "llama3", "longrope"})  # A factor below 1 has no meaning for these kinds.
ORIGINAL = "original_max_position_embeddings"
ORDERED = (  # These are pairs with their defaults, of which the first must be the smaller one.
    (("low_freq_factor", 1.0), ("high_freq_factor", 4.0)),
    (("beta_slow", 1.0), ("beta_fast", 32.0)),
)
LISTS = ("short_factor", "long_factor")

# the range of each number, both ends included; in a section or beside it
LEAST_POSITIVE = 1e-6
RANGES = {
    "factor": (LEAST_POSITIVE, 1e6),
    "rope_theta": (1.0 + LEAST_POSITIVE, 1e18),
    "rope_local_base_freq": (1.0 + LEAST_POSITIVE, 1e18),
    "rotary_emb_base": (1.0 + LEAST_POSITIVE, 1e18),
    "partial_rotary_factor": (LEAST_POSITIVE, 1.0),
    "rotary_pct": (LEAST_POSITIVE, 1.0),
    ORIGINAL: (2, 1 << 28),
    "max_position_embeddings": (2, 1 << 28),
    "hidden_size": (1, 1 << 24),
    "num_attention_heads": (1, 1 << 16),
    "head_dim": (1, 1 << 16),
    "attention_factor": (LEAST_POSITIVE, 1e3),
    "beta_fast": (LEAST_POSITIVE, 1e6),
    "beta_slow": (LEAST_POSITIVE, 1e6),
    "mscale": (0, 1e3),
    "mscale_all_dim": (0, 1e3),
    "low_freq_factor": (LEAST_POSITIVE, 1e6),
    "high_freq_factor": (LEAST_POSITIVE, 1e6),
}

ERROR_NAME = re.compile(r"^\w+Error: ")

Section = Mapping[str, Any]  # They are one kind of layer's parameters: numbers, texts, lists.


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """What the file says. Sections are keyed "default", or by kind of layer where the model has several.

    A section's numbers are in range, and it has rope_theta and whatever its kind needs. Lengths are in tokens.
    """

    sections: Mapping[str, Section]
    head_dim: int
    max_len: int  # It is max_position_embeddings.
    outer_len: int | None = None  # The file may have original_max_position_embeddings beside the section.

    @property
    def has_layer_kinds(self) -> bool:
        return "default" not in self.sections


def kind_of(section: Section) -> "RopeKind":
    """The kind of scaling, as we name it."""
    return KINDS[section.get("rope_type") or section.get("type") or "default"]


def rotary_dim(section: Section, head_dim: int) -> int:
    """Values of a head that are rotated."""
    return int(head_dim * section.get("partial_rotary_factor", 1.0))


def read_rope(config: Mapping[str, Any]) -> RopeConfig:
    """Check and complete the RoPE part of a parsed config.json; a model without one has no sections.

    Raises BackendError that names the field. Any: it is JSON, of which everything used is checked here.
    """
    text = config.get("text_config")
    config = text if isinstance(text, Mapping) else config
    _check_numbers(config, "")
    outer_len = config.get(ORIGINAL)
    for label, section in _written(config):
        _check_section(section, label, has_original=outer_len is not None)
    sections, head_dim, max_len = _completed(config)
    labels = dict(zip(sections, _labels(config, list(sections)), strict=True))
    for name, section in sections.items():
        if "rope_theta" not in section:
            raise BackendError(
                f"{FILE}: {labels[name]}.rope_theta is missing, and the model's class has no usual value"
            )
        _check_dims(section, head_dim, labels[name])
    return RopeConfig(sections, head_dim, max_len, outer_len if "default" in sections else None)


def _written(config: Mapping[str, Any]) -> Iterator[tuple[str, Section]]:
    """The sections as they stand in the file, each with its name there."""
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key)
        if value is None:
            continue
        if not isinstance(value, Mapping):
            raise BackendError(f"{FILE}: {key} is {value!r}; it must be an object or null")
        if _is_nested(value):
            yield from ((f"{key}.{kind}", section) for kind, section in value.items() if section is not None)
        else:
            yield key, value


def _is_nested(value: Section) -> bool:
    return any(isinstance(section, Mapping) for section in value.values())


def _labels(config: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """What to call the sections `names` in a message."""
    key = next((key for key in ("rope_scaling", "rope_parameters") if config.get(key)), "rope_parameters")
    return [f"{key}.{name}" if _is_nested(config.get(key) or {}) else key for name in names]


def _check_section(section: Section, label: str, *, has_original: bool) -> None:
    """has_original: the file has an original window beside the section."""
    if not isinstance(section, Mapping):
        raise BackendError(f"{FILE}: {label} is {section!r}; it must be an object or null")
    name = section.get("rope_type") or section.get("type") or "default"
    if not isinstance(name, str) or name not in KINDS:
        raise BackendError(f"{FILE}: {label}.rope_type is {name!r}; known are {', '.join(KINDS)}")
    old = section.get("type") or name
    is_same = isinstance(old, str) and KINDS.get(old) == KINDS[name]
    if not is_same and (old, name) != SEVERAL_AXES:
        raise BackendError(
            f"{FILE}: {label}.type is {old!r} and {label}.rope_type is {name!r}; they must name the same kind"
        )
    kind = KINDS[name]
    _check_numbers(section, f"{label}.")
    for key in REQUIRED.get(kind, ()):
        if section.get(key) is None:
            raise BackendError(f"{FILE}: {label}.{key} is missing; {name!r} needs it")
    if kind == "yarn" and section.get("factor") is None and section.get(ORIGINAL) is None and not has_original:
        raise BackendError(f"{FILE}: {label}.factor is missing; {name!r} needs it, or {ORIGINAL}")
    if kind in STRETCHING and (factor := section.get("factor")) is not None and factor < 1:
        raise BackendError(f"{FILE}: {label}.factor is {factor!r}; {name!r} needs at least 1")
    for (low, least), (high, most) in ORDERED:
        least, most = section.get(low) or least, section.get(high) or most
        if least >= most:
            raise BackendError(f"{FILE}: {label}.{low} is {least!r}; it must be less than {high}, {most!r}")
    for key in LISTS:
        values = section.get(key)
        if values is not None and (not isinstance(values, list) or not all(is_number(v, 1e-3, 1e6) for v in values)):
            raise BackendError(f"{FILE}: {label}.{key} must be a list of positive numbers")


def _check_numbers(section: Section, prefix: str) -> None:
    for key, (least, most) in RANGES.items():
        value = section.get(key)
        if value is not None and not is_number(value, least, most):
            least = 1 if 1 < least < 2 else 0 if least == LEAST_POSITIVE else least
            bound = f"above {least:g}" if least in (0, 1) and "mscale" not in key else f"of at least {least:g}"
            raise BackendError(f"{FILE}: {prefix}{key} is {value!r}; it must be a number {bound} and at most {most:g}")


def is_number(value: object, least: float, most: float) -> bool:
    """Whether a value of JSON is a number within the range; NaN is in none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def _check_dims(section: Section, head_dim: int, label: str) -> None:
    dims = rotary_dim(section, head_dim)
    least = 4 if kind_of(section) in ("ntk", "dynamic") else 2  # Their exponent is d / (d - 2).
    if dims % 2 or dims < least:
        share = section.get("partial_rotary_factor", 1.0)
        raise BackendError(
            f"{FILE}: partial_rotary_factor {share:g} of head_dim {head_dim} rotates {dims} values a head; "
            f"it must be an even number of at least {least}"
        )
    for key in LISTS if kind_of(section) == "longrope" else ():
        if len(section[key]) != dims // 2:
            raise BackendError(
                f"{FILE}: {label}.{key} has {len(section[key])} numbers; {dims} rotated values a head need {dims // 2}"
            )


def _completed(config: Mapping[str, Any]) -> tuple[dict[str, Section], int, int]:
    """(sections, head_dim, max_position_embeddings) with what the model's own class fills in where the file is silent.

    Defaults differ by class: Mixtral's theta, Gemma's head size, GPT-NeoX's share of rotated values.
    """
    from transformers import CONFIG_MAPPING  # It takes seconds to import, and torch with it.
    from transformers import logging as transformers_logging

    model_type = config.get("model_type", "llama")
    if model_type not in CONFIG_MAPPING:
        raise BackendError(f"{FILE}: model_type is {model_type!r}, which the installed transformers doesn't know")
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)  # Its warnings are about what is checked here.
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # Old files have such names.
            filled = CONFIG_MAPPING[model_type].from_dict(_as_expected(config))
            filled.standardize_rope_params()  # Its rotary modules do so first: only now values beside a section count.
    except Exception as error:  # Its validation raises many kinds; all mean that the file is wrong.
        reason = str(error).strip().splitlines()[-1].strip()  # The line before only says that something is wrong.
        raise BackendError(f"{FILE}: {ERROR_NAME.sub('', reason)}") from None
    finally:
        transformers_logging.set_verbosity(verbosity)
    parameters = filled.to_dict().get("rope_parameters")
    if not parameters:
        return {}, 0, 0
    head_dim = filled.to_dict().get("head_dim") or filled.hidden_size // filled.num_attention_heads
    max_len = filled.max_position_embeddings
    nested = {name: section for name, section in parameters.items() if isinstance(section, dict)}
    sections = nested or {"default": parameters}
    return {name: _without_nulls(section) for name, section in sections.items()}, head_dim, max_len


def _as_expected(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy that transformers may write to: without nulls, which hide its defaults, and with today's names."""
    own = _without_nulls(copy.deepcopy(computing(config)))
    for key in ("rope_scaling", "rope_parameters"):
        if key in own:
            own[key] = _renamed(own[key])
    return own


def _renamed(section: Section) -> Section:
    """A section, or an object of sections, without nulls and with no name that transformers has dropped."""
    if _is_nested(section):
        return {name: value and _renamed(value) for name, value in section.items()}
    known = _without_nulls(section)
    if kind_of(known) == "yarn":
        known.setdefault("factor", None)  # It stands for the ratio of the two windows, but must be there.
    return {**known, "rope_type": "longrope"} if kind_of(known) == "longrope" else known


def _without_nulls(section: Section) -> dict[str, Any]:
    return {name: value for name, value in section.items() if value is not None}
