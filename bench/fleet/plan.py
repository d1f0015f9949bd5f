"""What is run: which crowd, in front of how many replicas, sent where by whom, and what fails."""

from dataclasses import dataclass, field

from bench.fleet.traces import CROWDS, Scale


@dataclass(frozen=True, slots=True)
class Plan:
    """One run. Times in seconds; what happens in the first `warm_s` is not counted."""

    crowd: str
    router: str
    replicas: int
    seconds: float
    warm_s: float
    seed: int = 0
    places: float | None = None  # for clients, all replicas together; None: as many a replica as the crowd says
    disk: str = "none"  # or "own", or "shared"
    disk_tokens: int = 1 << 24
    lag_s: float = 0.5  # until a digest's change is known to the router
    mtbf_s: float = 0.0  # A replica lives so long on average; 0: for ever.
    down_s: float = 30.0
    sends_ids: bool = True  # clients that have sessions name them
    together: float = 1.0  # times as long as alone work takes while another replica is at it, on one machine
    scale: Scale = field(default_factory=Scale)

    @property
    def num_places(self) -> int:
        return round(CROWDS[self.crowd].places * self.replicas if self.places is None else self.places)
