"""Limits of the loop."""

from typing import Literal

from pydantic import BaseModel, Field

from tightrope.backends.settings import MAX_SEQS, MAX_TOKENS, ModelSettings

MAX_WAITING = 1 << 16  # Each keeps a connection open, of which a process has about as many.
MAX_ALTERNATIVES = 1 << 10  # Each is a line in the answer, for every token of it.
MAX_BUSY_STEP_MS = 60_000.0  # While a step runs no answer grows: after a minute people take the server for dead.

Heal = Literal["auto", "off", "always"]


class LimitSettings(BaseModel, frozen=True, extra="forbid"):
    """Bounds that no request can exceed, and what is done while there is none."""

    max_waiting: int = Field(
        128, ge=0, le=MAX_WAITING, description="Requests that may wait for their first step; above it: 429."
    )
    max_input_tokens: int = Field(
        0, ge=0, le=MAX_TOKENS, description="Most tokens of a prompt; 0 is what the window has room for."
    )
    max_best_of: int = Field(8, ge=1, le=MAX_SEQS, description="Answers to one prompt (n, best_of).")
    max_logprobs: int = Field(20, ge=0, le=MAX_ALTERNATIVES, description="Alternatives listed at each token.")
    busy_step_ms: float = Field(
        150.0,
        gt=0,
        le=MAX_BUSY_STEP_MS,
        description="While answers are being written, a step takes in no more prompt than fits this time.",
    )
    heal: Heal = Field(
        "auto", description="Moved tokens are computed again while nothing runs; auto: where that takes under a minute."
    )


BEATS = 20  # So many signs of life come in the time after which an engine without any is killed.
PATIENCE = 5  # A step, and silence while a model loads, may last so many times as long.
MAX_LIFE_S = 86_400.0


class LifeSettings(BaseModel, frozen=True, extra="forbid"):
    """When an engine is given up. Seconds."""

    stuck_s: float = Field(60.0, gt=0, le=MAX_LIFE_S, description="An engine without a sign of life is killed then.")
    restart_limit_s: float = Field(
        600.0, gt=0, le=MAX_LIFE_S, description="The server ends when no engine could be started for this long."
    )


class EngineSettings(BaseModel, frozen=True, extra="forbid"):
    """All that the engine process is told at its start."""

    model: ModelSettings = ModelSettings()
    limits: LimitSettings = LimitSettings()
    life: LifeSettings = LifeSettings()
