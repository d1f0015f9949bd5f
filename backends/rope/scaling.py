"""RoPE scaling: from a model's config.json and a person's settings to rotary frequencies.

Sources: Su et al. 2021, arXiv 2104.09864 (RoPE); Chen et al. 2023, arXiv 2306.15595 (linear); Peng et al. 2023,
arXiv 2309.00071 (YaRN; NTK and dynamic NTK in its appendix); Ding et al. 2024, arXiv 2402.13753 (longrope); Llama 3.1's
reference code (llama3). What config.json calls the parameters is transformers' convention.
"""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tightrope.backends.errors import BackendError
from tightrope.backends.rope.config import FILE, LISTS, STRETCHING, RopeConfig, Section, kind_of, read_rope
from tightrope.backends.rope.config import rotary_dim as rotary_dim_of
from tightrope.backends.rope.window import Witnesses, own_windows

if TYPE_CHECKING:  # A model needs pydantic only where settings are read.
    from tightrope.backends.settings import RopeKind, RopeSettings

SLIDING = "sliding_attention"  # An override leaves layers of a short window as they are.


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """The rotation of one kind of layer, resolved.

    `trained_len` is the window, in tokens, that the frequencies were made for before any scaling, `window` the one that
    is served. The fields after it are of single kinds: `dynamic_len` is the window beyond which dynamic scaling begins,
    0 for the trained one, `attention_factor` multiplies cosines and sines (yarn, longrope), the betas are turns within
    the trained window between which YaRN ramps, the freq factors those between which llama3 does, and longrope divides
    frequency i by element i of a list [rotary_dim / 2]. `note` says what the files disagree about, if anything.
    """

    kind: "RopeKind"
    factor: float
    theta: float
    rotary_dim: int
    head_dim: int
    trained_len: int
    window: int
    dynamic_len: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    note: str = ""

    @property
    def depends_on_length(self) -> bool:
        """Whether a sequence's frequencies change while it grows."""
        return self.kind in ("dynamic", "longrope")

    def frequencies(self, length: int) -> tuple[NDArray[np.float32], float]:
        """Radians a token, float32 [rotary_dim / 2], and the attention factor, for a sequence of `length` tokens."""
        return self._scaled(length).astype(np.float32), self.attention_factor

    def key(self, length: int) -> Hashable:
        """What tells the frequencies of a sequence of `length` tokens from those of others."""
        if not self.depends_on_length:
            return None
        inv_freq, attention_factor = self.frequencies(length)
        return inv_freq.tobytes(), attention_factor

    def describe(self) -> str:
        """The line printed at start: kind, factor, trained window, served window."""
        how = "no scaling" if self.kind == "none" else f"{self.kind} scaling by {self.factor:g}"
        windows = f"trained window {self.trained_len} tokens, served window {self.window}"
        return f"rope: {how}, theta {self.theta:.10g}, {windows}"

    def _scaled(self, length: int) -> NDArray[np.float64]:
        if self.kind == "linear":
            return self._plain(self.theta) / self.factor
        if self.kind == "ntk":
            return self._plain(self._ntk_theta(self.factor))
        if self.kind == "dynamic":
            begin = self.dynamic_len or self.trained_len
            beyond = max(length, begin) / begin - 1
            return self._plain(self._ntk_theta(1 + self.factor * beyond))
        if self.kind == "yarn":
            return self._yarn()
        if self.kind == "llama3":
            return self._llama3()
        if self.kind == "longrope":
            factors = self.long_factor if length > self.trained_len else self.short_factor
            return self._plain(self.theta) / np.asarray(factors, np.float64)
        return self._plain(self.theta)

    def _plain(self, theta: float) -> NDArray[np.float64]:
        """theta^(-2i / d). The exponents are rounded to float32, as they were when the models were trained."""
        exponents = np.arange(0, self.rotary_dim, 2, dtype=np.float32) / np.float32(self.rotary_dim)
        return np.power(theta, -exponents.astype(np.float64))

    def _ntk_theta(self, factor: float) -> float:
        """The base with which the slowest pair turns `factor` times slower, and the fastest as before."""
        return float(self.theta * factor ** (self.rotary_dim / (self.rotary_dim - 2)))

    def _yarn(self) -> NDArray[np.float64]:
        """Pairs of many turns within the trained window keep their frequency, those of few have it divided."""
        low, high = self._pair_of_turns(self.beta_fast), self._pair_of_turns(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.rotary_dim - 1)
        ramp = (np.arange(self.rotary_dim // 2) - low) / (high - low if high != low else 0.001)
        divided: NDArray[np.float64] = np.clip(ramp, 0.0, 1.0)
        inv_freq = self._plain(self.theta)
        return inv_freq / self.factor * divided + inv_freq * (1 - divided)

    def _pair_of_turns(self, turns: float) -> float:
        """Which pair, fractional, turns that often within the trained window."""
        return self.rotary_dim * math.log(self.trained_len / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

    def _llama3(self) -> NDArray[np.float64]:
        """As YaRN, ramped over the number of turns itself."""
        inv_freq = self._plain(self.theta)
        turns = self.trained_len * inv_freq / (2 * math.pi)
        kept = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0.0, 1.0)
        return inv_freq / self.factor * (1 - kept) + inv_freq * kept


def resolve_rope(
    config: Mapping[str, Any], settings: "RopeSettings", max_model_len: int, witnesses: Witnesses = MappingProxyType({})
) -> dict[str, RopeSpec]:
    """The rotation of each kind of layer: "full_attention" and "sliding_attention" where a model has both, else
    "default"; nothing for a model whose config.json has no RoPE.

    config is the parsed config.json, of which Any is checked here. `settings` override it, but not for sliding layers.
    max_model_len is the served window in tokens; 0 takes factor times the trained window where the scaling stretches
    it, else what the file says. Raises BackendError naming the field, or the option, that can't be.
    """
    from tightrope.backends.settings import RopeSettings

    rope = read_rope(config)
    check_override(settings)
    if not rope.sections and settings != RopeSettings():
        raise BackendError(f"{FILE}: a model of type {config.get('model_type')!r} has no RoPE that could be changed")
    specs = {
        name: _resolve(section, rope, RopeSettings() if name == SLIDING else settings, witnesses)
        for name, section in rope.sections.items()
    }
    window = max_model_len or max((spec.window for name, spec in specs.items() if name != SLIDING), default=0)
    return {name: replace(spec, window=window, note="" if max_model_len else spec.note) for name, spec in specs.items()}


def check_override(settings: "RopeSettings") -> None:
    """Raises BackendError when a factor has no kind, or is one that its kind has no meaning for."""
    if settings.factor is not None and settings.kind in (None, "none"):
        raise BackendError("a RoPE factor needs a kind of scaling: --rope-scaling linear, ntk, dynamic or yarn")
    if settings.factor is not None and settings.kind in STRETCHING and settings.factor < 1:
        raise BackendError(f"a RoPE factor of {settings.factor:g} is too small: {settings.kind!r} needs at least 1")


def _resolve(section: Section, rope: RopeConfig, settings: "RopeSettings", witnesses: Witnesses) -> RopeSpec:
    """The spec of a section under the settings; its window is the one that it is made for."""
    own, own_kind = own_windows(section, rope, witnesses), kind_of(section)
    trained_len = settings.original_len or own.trained_len
    is_own = settings.kind is None and (settings.original_len is None or own_kind in ("none", "llama3", "longrope"))
    section = _overridden(section, settings)
    kind = kind_of(section)
    factor = _factor(section, kind, trained_len, rope.max_len)
    return RopeSpec(
        kind=kind,
        factor=factor,
        theta=float(section["rope_theta"]),
        rotary_dim=rotary_dim_of(section, rope.head_dim),
        head_dim=rope.head_dim,
        trained_len=trained_len,
        window=own.reach if is_own else round(factor * trained_len),
        # transformers' formula begins beyond max_position_embeddings, whatever else a file says
        dynamic_len=rope.max_len if own_kind == "dynamic" and settings.original_len is None else 0,
        attention_factor=_attention_factor(section, kind, factor, trained_len),
        beta_fast=section.get("beta_fast") or 32.0,
        beta_slow=section.get("beta_slow") or 1.0,
        truncate=section.get("truncate", True),
        low_freq_factor=section.get("low_freq_factor", 1.0),
        high_freq_factor=section.get("high_freq_factor", 4.0),
        short_factor=tuple(section.get("short_factor", ())),
        long_factor=tuple(section.get("long_factor", ())),
        note=own.note if is_own else "",
    )


def _overridden(section: Section, settings: "RopeSettings") -> Section:
    """The section as the person wants it; of the file's scaling nothing is left unless the kind is the same."""
    changed = dict(section)
    if settings.kind is not None and settings.kind != kind_of(section):
        changed = {key: section[key] for key in ("rope_theta", "partial_rotary_factor") if key in section}
        changed["rope_type"] = "default" if settings.kind == "none" else settings.kind
        if settings.kind == "longrope":
            raise BackendError(f"RoPE scaling 'longrope' needs {' and '.join(LISTS)}, and this {FILE} has none")
        if settings.kind == "dynamic":
            changed["factor"] = 1.0  # As many times as a chat's own length is the trained window's.
        elif settings.kind != "none" and settings.factor is None:
            raise BackendError(
                f"RoPE scaling {settings.kind!r} needs a factor: how many times the trained window to serve"
            )
    if settings.factor is not None:
        changed["factor"] = settings.factor
    if settings.theta is not None:
        changed["rope_theta"] = settings.theta
    return changed


def _factor(section: Section, kind: "RopeKind", trained_len: int, max_len: int) -> float:
    """How many times slower the slowest pairs turn; where a file has no factor, it is the ratio of its two windows."""
    if kind == "none":
        return 1.0
    return float(section.get("factor", max_len / trained_len))


def _attention_factor(section: Section, kind: "RopeKind", factor: float, trained_len: int) -> float:
    """What sharpens attention over a stretched window: as the file says, or as the kind's paper recommends."""
    if kind not in ("yarn", "longrope"):
        return 1.0
    if (given := section.get("attention_factor")) is not None:
        return float(given)
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(trained_len)) if factor > 1 else 1.0
    growth = 0.1 * math.log(max(1.0, factor))
    mscale, all_dims = section.get("mscale"), section.get("mscale_all_dim")
    return (growth * mscale + 1) / (growth * all_dims + 1) if mscale and all_dims else growth + 1
