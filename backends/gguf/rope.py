"""RoPE scaling as a person asks for it, in llama.cpp's terms: backends/rope/scaling.py holds what the kinds mean."""

from dataclasses import dataclass

from llama_cpp import llama_cpp as ll

from tightrope.backends.errors import BackendError
from tightrope.backends.gguf.shape import ModelShape
from tightrope.backends.rope.scaling import check_override
from tightrope.backends.settings import RopeSettings


@dataclass(frozen=True, slots=True)
class RopePlan:
    """Values for a native context; None and 0 leave the file's.

    `window` is what they are meant for and `trained_len` the window before any scaling, in tokens; `how` says it.
    """

    window: int
    trained_len: int
    how: str
    scaling_type: int | None = None
    freq_base: float = 0.0
    freq_scale: float = 0.0
    yarn_orig_ctx: int = 0
    yarn_ext_factor: float | None = None

    def describe(self, window: int) -> str:
        """The line printed at start, with the window that is served."""
        return f"rope: {self.how}, trained window {self.trained_len} tokens, served window {window}"


def plan_rope(settings: RopeSettings, shape: ModelShape) -> RopePlan:
    """Turn the settings into native values.

    linear: positions divided by the factor. ntk: base' = base * factor^(d / (d - 2)), d the rotated dimensions. yarn:
    per-frequency mix of both with the temperature of the paper, done by llama.cpp. none: no scaling, whatever the file
    says. llama3: the file's own factors, one for each frequency, which llama.cpp applies whatever else is asked for.
    Raises BackendError when a kind lacks its factor, a factor its kind, or llama.cpp can't do what is asked.
    Sources: Chen et al. 2023, arXiv 2306.15595; Peng et al. 2023, arXiv 2309.00071.
    """
    check_override(settings)
    kind, factor = settings.kind, settings.factor
    original = settings.original_len or shape.unscaled_len
    if kind in ("dynamic", "longrope"):
        raise BackendError(
            f"RoPE scaling {kind!r} can't be chosen for a GGUF file: it changes with a chat's length, and llama.cpp "
            "caches keys rotated; linear, ntk and yarn work"
        )
    if kind == "llama3" and (factor is not None or not shape.has_freq_factors):
        has = "holds its own factors; leave --rope-factor out" if shape.has_freq_factors else "holds no such factors"
        raise BackendError(f"RoPE scaling 'llama3' is the file's, and this GGUF file {has}")
    theta = settings.theta or 0.0
    if kind is None or kind == "llama3":
        yarn_orig_ctx = settings.original_len or 0
        return RopePlan(shape.trained_len, original, _own(shape), freq_base=theta, yarn_orig_ctx=yarn_orig_ctx)
    on_top = " on top of the factors in the file" if shape.has_freq_factors else ""
    if kind == "none":
        return RopePlan(original, original, f"no scaling{on_top}", ll.LLAMA_ROPE_SCALING_TYPE_NONE, theta, 1.0)
    if factor is None:
        raise BackendError(f"RoPE scaling {kind!r} needs a factor: how many times the trained window to serve")
    window, how = round(original * factor), f"{kind} scaling by {factor:g}{on_top}"
    if kind == "linear":
        return RopePlan(window, original, how, ll.LLAMA_ROPE_SCALING_TYPE_LINEAR, theta, 1 / factor)
    if kind == "ntk":
        base = (theta or shape.rope_base) * factor ** (shape.rope_dims / (shape.rope_dims - 2))
        return RopePlan(window, original, how, ll.LLAMA_ROPE_SCALING_TYPE_NONE, base, 1.0)
    return RopePlan(window, original, how, ll.LLAMA_ROPE_SCALING_TYPE_YARN, theta, 1 / factor, original, 1.0)


def _own(shape: ModelShape) -> str:
    """What the file itself does."""
    parts = [shape.own_scaling or "no scaling"]
    return " with ".join([*parts, "a factor for each frequency"] if shape.has_freq_factors else parts)
