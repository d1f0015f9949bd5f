"""What other servers call the sampler's steps where a client orders them."""

from collections.abc import Callable, Mapping

from tightrope.engine.errors import InvalidRequest
from tightrope.engine.sampler.steps import BY_NAME, SAMPLER_ORDER
from tightrope.server.fields.names import NUMBERS, ORDERS

# the steps in order, the SamplingParams that a list switches off, and names in it that mean no step
Order = tuple[tuple[str, ...], frozenset[str], tuple[str, ...]]

_STEPS: Mapping[str, str] = (
    {step: step for step in SAMPLER_ORDER}
    | {name: number.target for number in NUMBERS if number.target in SAMPLER_ORDER for name in number.names}
    | {"dynamic_temperature": "temperature", "quadratic_sampling": "smoothing"}
)
# Steps that come before or after all others, whatever a list says.
_IN_THEIR_PLACE = BY_NAME.keys() - {*SAMPLER_ORDER} | {"penalties", "encoder_repetition_penalty", "infill"}
_LETTERS: Mapping[str, str] = {  # llama.cpp lists steps by these letters, too.
    "d": "dry",
    "k": "top_k",
    "y": "typ_p",
    "p": "top_p",
    "s": "top_n_sigma",
    "m": "min_p",
    "t": "temperature",
    "x": "xtc",
    "i": "infill",
    "e": "penalties",
    "a": "adaptive_p",
}
# those that a list of llama.cpp's can leave out
_LLAMA_CPP = frozenset({"top_n_sigma", "top_k", "typical_p", "tfs", "xtc", "top_p", "min_p", "adaptive_p"})
# They stand by their numbers; 6 are the penalties.
_KOBOLD = ("top_k", "top_a", "top_p", "tfs", "typical_p", "temperature", None)


def named_order(name: str, value: object) -> Order:
    """text-generation-webui's `sampler_priority`: names, in a list or one a line; what it leaves out comes last.

    Penalties, mirostat and adaptive-p have their places, before and after all steps, wherever a list names them.
    """
    names = _names(name, value)
    unknown = tuple(item for item in dict.fromkeys(names) if item not in _STEPS and item not in _IN_THEIR_PLACE)
    return tuple(dict.fromkeys(_STEPS[item] for item in names if item in _STEPS)), frozenset(), unknown


def _names(name: str, value: object) -> list[str]:
    if isinstance(value, str):
        value = [line.strip() for line in value.replace(",", "\n").splitlines() if line.strip()]
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InvalidRequest(f"{name} must be a list of names, not {type(value).__name__}", name)
    return value


def llama_cpp_order(name: str, value: object) -> Order:
    """llama.cpp's `samplers`, names or a text of letters: a step that isn't there doesn't run."""
    if isinstance(value, str) and set(value) <= _LETTERS.keys():
        value = [_LETTERS[letter] for letter in value]
    order, _, unknown = named_order(name, value)
    missing = _LLAMA_CPP - {*order, *_names(name, value)}
    left_out = frozenset(BY_NAME[step].params[0] for step in missing) if order else frozenset()
    return order, left_out, unknown


def kobold_order(name: str, value: object) -> Order:
    """KoboldCpp's `sampler_order`: numbers. min_p, which has none, follows top_p."""
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item < len(_KOBOLD) for item in value):
        raise InvalidRequest(f"{name} must be a list of numbers from 0 to {len(_KOBOLD) - 1}", name)
    order: list[str] = []
    for step in dict.fromkeys(_KOBOLD[item] for item in value):
        if step is not None:
            order += [step, "min_p"] if step == "top_p" else [step]
    return tuple(order), frozenset(), ()


READERS: Mapping[str, Callable[[str, object], Order]] = dict(
    zip(ORDERS, (named_order, llama_cpp_order, kobold_order), strict=True)
)
