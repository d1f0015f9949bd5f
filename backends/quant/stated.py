"""What a model's settings state of its packed tensors, where the tensors themselves can't tell.

A number is read as it is meant: 32.0 and "128" are whole numbers, and null states nothing. Sources: AutoGPTQ 0.7.1,
GPTQModel 7.7 (quantization/config.py), and auto-round from 0.1 to 0.16 (export_to_autoround/export.py,
inference/backend.py), whose files named a kernel behind the packing before 0.5.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from tightrope.backends.errors import BackendError
from tightrope.backends.quant.format import Settings

# How zero points of a GPTQ layout are stored: less one, or as they are.
Layout = Literal["gptq", "gptq_v2", "awq"]
PACKINGS: Mapping[str, Layout] = {
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto_gptq": "gptq",
    "gptq": "gptq",
    "auto": "gptq",
    "auto_round:auto_awq": "awq",
    "auto_round:awq": "awq",
    "auto_awq": "awq",
    "awq": "awq",
}
KERNELS = ("exllamav1", "exllamav2", "triton", "tritonv2", "cuda", "gemm")
INTEGER_TYPES = ("int", "int_sym", "int_asym", "int_sym_gptq")
RECIPES = ("rtn_", "opt_rtn_")  # They say in front of such a type how codes were found.
TURNED = ("rotation_config", "spinquant_config", "hadamard_config", "transform_config")
# They stand within a name: files also say intel/auto-round, gptq_marlin or autoround.
METHODS = ("gptq", "awq", "auto-round")
OVERRIDES = ("extra_config", "dynamic")  # auto-round and GPTQModel have such fields for single linears.
# fields of one linear in auto-round's settings, of which the tensors tell the first ones
KNOWN = ("bits", "group_size", "sym", "scale_dtype", "data_type", "super_bits", "super_group_size")
ACTIVATIONS = ("act_bits", "act_group_size", "act_sym", "act_data_type", "act_dynamic")


def whole_number(path: Path, settings: Settings, field: str, default: int) -> int:
    """A field of the file `path`, or the default where it is null or missing. Raises BackendError for no number."""
    value = settings.get(field)
    if value is None:
        return default
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.strip().removeprefix("-").isdecimal() and len(value) < 10:
        return int(value)
    if type(value) is not int:
        raise BackendError(f"{path}: {field} {value!r:.40} must be a whole number")
    return value


def method_of(settings: Settings) -> str | None:
    """The method that is stated, one of METHODS whichever way it is spelt, or another as it is; None for none.

    The first files of bitsandbytes name it by its switches alone.
    """
    stated = settings.get("quant_method")
    if stated is None:
        return "bitsandbytes" if "load_in_4bit" in settings or "load_in_8bit" in settings else None
    plain = str(stated).lower().replace("_", "-").replace("autoround", "auto-round")
    return next((method for method in METHODS if method in plain), plain)


def is_awq(settings: Settings) -> bool:
    """Whether the settings are those of AutoAWQ or its relatives, which an old file tells by its names of fields."""
    return method_of(settings) == "awq" or "w_bit" in settings


def layout_of(path: Path, settings: Settings) -> Layout:
    """The layout that is stated. Raises BackendError, naming the field, for one that is not known."""
    if settings.get("is_marlin_format"):
        raise BackendError(f"{path}: checkpoint_format 'marlin' is not known; gptq and gptq_v2 are")
    stated = settings.get("checkpoint_format") or settings.get("format")
    field = "packing_format"
    packing = settings.get(field)
    if packing is None and _is_auto_round(settings) and (packing := settings.get("backend")) is not None:
        field = "backend"
    if packing is None:
        if stated in (None, "gptq"):
            return "awq" if is_awq(settings) else "gptq"
        if stated == "gptq_v2":
            return "gptq_v2"
        raise BackendError(f"{path}: checkpoint_format {stated!r:.40} is not known; gptq and gptq_v2 are")
    layout = PACKINGS.get(_plain(packing))
    if layout is None:
        raise BackendError(f"{path}: {field} {packing!r:.60} is not known; {', '.join(PACKINGS)} are")
    if stated in ("gptq", "gptq_v2") and stated != layout:
        raise BackendError(f"{path}: {field} {packing!r:.60} and checkpoint_format {stated!r} contradict each other")
    return layout


def check_meaning(path: Path, settings: Settings) -> None:
    """Raise BackendError, naming the field, where packed integers would stand for something else than weights."""
    if method_of(settings) not in (None, *METHODS):
        stated = settings["quant_method"]
        raise BackendError(f"{path}: quant_method {stated!r:.40} is not known here; {', '.join(METHODS)} are")
    if _is_auto_round(settings):
        _check_types(path, settings, "")
    for name, entry in _overrides(path, settings, "extra_config"):
        for field in entry:
            if field not in (*KNOWN, *ACTIVATIONS, *TURNED):
                raise BackendError(f"{path}: extra_config.{name}.{field} is not known; {', '.join(KNOWN)} are")
        _check_types(path, entry, f"extra_config.{name}.")
    for name, entry in _overrides(path, settings, "dynamic"):
        for field, only in (("pack_dtype", "int32"), ("checkpoint_format", None), ("format", None), ("adapter", None)):
            if entry.get(field) not in (None, only):
                raise BackendError(f"{path}: dynamic.{name}.{field} {entry[field]!r:.40} can't be read")


def group_sizes(path: Path, settings: Settings) -> dict[str, int]:
    """Group sizes of single linears, by their names or by patterns of names."""
    return {
        name: whole_number(path, entry, "group_size", -1)
        for field in OVERRIDES
        for name, entry in _overrides(path, settings, field)
        if entry.get("group_size") is not None
    }


def is_symmetric(path: Path, settings: Settings) -> bool:
    """Whether no linear is said to have zero points of its own."""
    entries = [entry for field in OVERRIDES for _, entry in _overrides(path, settings, field)]
    return all(entry.get("sym") is not False for entry in (settings, *entries))


def _check_types(path: Path, settings: Settings, prefix: str) -> None:
    """That the weights are integers, and all that is quantized; bits above 8 stand for a linear left as it was."""
    if whole_number(path, settings, "bits", 0) > 8:
        return
    kind = settings.get("data_type")
    plain = str(kind).removeprefix(RECIPES[1]).removeprefix(RECIPES[0])
    if kind is not None and plain not in INTEGER_TYPES:
        raise BackendError(f"{path}: {prefix}data_type {kind!r:.40} is not known; {', '.join(INTEGER_TYPES)} are")
    if (bits := whole_number(path, settings, "act_bits", 16)) < 16:
        raise BackendError(f"{path}: {prefix}act_bits are {bits}: quantized activations are not served; 16 bits are")
    for field in (*TURNED, "super_bits"):
        if settings.get(field):
            raise BackendError(f"{path}: {prefix}{field} is set, which is not known; it must be null")


def _overrides(path: Path, settings: Settings, field: str) -> Iterator[tuple[str, Settings]]:
    """Settings of single linears, each with its name or pattern."""
    entries = settings.get(field) or {}
    if not isinstance(entries, dict):
        raise BackendError(f"{path}: {field} is {entries!r:.40}; it must be an object")
    for name, entry in entries.items():
        if entry is not None and not isinstance(entry, dict):
            raise BackendError(f"{path}: {field}.{name:.80} is {entry!r:.40}; it must be an object")
        yield name, entry or {}


def _plain(packing: Any) -> str:  # noqa: ANN401 - whatever JSON holds
    """A packing without the kernel that was meant for it."""
    words = str(packing).lower().replace("-", "_").replace("autoround", "auto_round").split(":")
    return ":".join(words[:-1] if len(words) > 1 and words[-1] in KERNELS else words)


def _is_auto_round(settings: Settings) -> bool:
    return method_of(settings) == "auto-round"
