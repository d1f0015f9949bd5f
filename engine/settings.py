"""Limits of the loop."""

from pydantic import BaseModel, Field

from tightrope.backends.settings import ModelSettings


class LimitSettings(BaseModel, frozen=True, extra="forbid"):
    """Bounds that no request can exceed."""

    max_waiting: int = Field(128, ge=0, description="Requests that may wait for their first step; above it: 429.")
    max_best_of: int = Field(8, ge=1, description="Answers to one prompt (n, best_of).")
    max_logprobs: int = Field(20, ge=0, description="Alternatives listed at each token.")
    busy_step_ms: float = Field(
        150.0, gt=0, description="While answers are being written, a step takes in no more prompt than fits this time."
    )


class EngineSettings(BaseModel, frozen=True, extra="forbid"):
    """All that the engine process is told at its start."""

    model: ModelSettings = ModelSettings()
    limits: LimitSettings = LimitSettings()
