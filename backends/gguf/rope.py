"""RoPE scaling as a person asks for it, in llama.cpp's terms."""

from dataclasses import dataclass

from llama_cpp import llama_cpp as ll

from tightrope.backends.errors import BackendError
from tightrope.backends.gguf.shape import ModelShape
from tightrope.backends.settings import RopeSettings


@dataclass(frozen=True, slots=True)
class RopePlan:
    """Values for a native context (None and 0 leave the file's), and the window that they are meant for, in tokens."""

    window: int
    scaling_type: int | None = None
    freq_base: float = 0.0
    freq_scale: float = 0.0
    yarn_orig_ctx: int = 0
    yarn_ext_factor: float | None = None
    note: str | None = None


def plan_rope(settings: RopeSettings, shape: ModelShape) -> RopePlan:
    """Turn the settings into native values.

    linear: positions divided by the factor. ntk: base' = base * factor^(d / (d - 2)), d the rotated dimensions. yarn:
    per-frequency mix of both with the temperature of the paper, done by llama.cpp. none: no scaling, whatever the file
    says. Raises BackendError when a kind lacks its factor or a factor its kind.
    Sources: Chen et al. 2023, arXiv 2306.15595; Peng et al. 2023, arXiv 2309.00071.
    """
    kind, factor, theta = settings.kind, settings.factor, settings.theta or 0.0
    if kind in ("linear", "ntk", "yarn") and factor is None:
        raise BackendError(f"RoPE scaling {kind!r} needs a factor: how many times the trained window to serve")
    if factor is not None and kind in (None, "none"):
        raise BackendError("a RoPE factor needs a kind of scaling: linear, ntk or yarn")
    if kind is None:
        return RopePlan(shape.trained_len, freq_base=theta)
    if kind == "none":
        return RopePlan(shape.unscaled_len, ll.LLAMA_ROPE_SCALING_TYPE_NONE, theta, 1.0)
    assert factor is not None
    window = int(shape.unscaled_len * factor)
    note = f"rope: {kind} scaling by {factor:g}, window {window} of a model trained for {shape.unscaled_len}"
    if kind == "linear":
        return RopePlan(window, ll.LLAMA_ROPE_SCALING_TYPE_LINEAR, theta, 1 / factor, note=note)
    if kind == "ntk":
        base = (theta or shape.rope_base) * factor ** (shape.rope_dims / (shape.rope_dims - 2))
        return RopePlan(window, ll.LLAMA_ROPE_SCALING_TYPE_NONE, base, 1.0, note=f"{note}, base {base:.0f}")
    return RopePlan(
        window, ll.LLAMA_ROPE_SCALING_TYPE_YARN, theta, 1 / factor, shape.unscaled_len, 1.0, note=f"{note} (YaRN)"
    )
