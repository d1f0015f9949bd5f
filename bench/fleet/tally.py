"""What came of the requests of a run."""

from dataclasses import dataclass, field

import numpy as np

from bench.fleet.requests import Request


@dataclass(slots=True)
class Tally:
    """What was counted."""

    ttft_s: list[float] = field(default_factory=list)
    prompt: int = 0
    cached: int = 0
    moved: int = 0
    disk: int = 0
    moves: int = 0

    def add(self, request: Request) -> None:
        """A request that was answered."""
        assert request.first_s is not None
        found = request.found
        self.ttft_s.append(request.first_s - request.arrived_s)
        self.prompt += request.prompt.num_tokens
        self.cached += min(found.total - found.again, request.prompt.num_tokens - 1)
        self.moved += found.moved - found.again
        self.disk += found.disk
        self.moves += request.num_moves

    def summary(self) -> dict[str, float]:
        times = np.array(self.ttft_s or [0.0])
        return {
            "requests": len(self.ttft_s),
            "hit_rate": round(self.cached / max(1, self.prompt), 4),
            "moved_rate": round(self.moved / max(1, self.prompt), 4),
            "disk_rate": round(self.disk / max(1, self.prompt), 4),
            "ttft_mean_s": round(float(times.mean()), 3),
            "ttft_p50_s": round(float(np.percentile(times, 50)), 3),
            "ttft_p90_s": round(float(np.percentile(times, 90)), 3),
            "ttft_p99_s": round(float(np.percentile(times, 99)), 3),
            "moved_requests": self.moves,
        }
