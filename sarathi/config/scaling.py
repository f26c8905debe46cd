"""Every knob of API processes and engine replicas."""

from __future__ import annotations

from dataclasses import dataclass

from sarathi.config.knobs import ConfigError, Section, knob


@dataclass(frozen=True)
class ScalingConfig(Section):
    """Number of API processes over one engine, or of engines behind one address."""

    api_workers: int = knob(1, "processes that answer HTTP, over one engine", low=1, high=256)
    replicas: int = knob(
        1, "engines behind one address, through Ray Serve; 1: one engine, without Ray", low=1, high=4096
    )
    max_replicas: int | None = knob(
        None, "engines that Ray Serve may start as queues grow, replicas being the fewest; none: always replicas",
        low=1, high=4096,
    )  # fmt: skip
    requests_per_replica: float = knob(
        32.0, "max_replicas: requests under way at each engine, on average, that Ray Serve scales to", low=0.1
    )
    scale_up_delay_s: float = knob(
        30.0, "max_replicas: seconds for which engines must have more requests than that before another one starts",
        low=0.5,
    )  # fmt: skip
    scale_down_delay_s: float = knob(
        600.0, "max_replicas: seconds for which fewer engines must be enough before one is stopped", low=0.5
    )
    prefix_affinity_lead: int = knob(
        8, "replicas: requests that the engine with a prompt's beginning in its cache may have more than the "
        "idlest one and still be chosen", low=0,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ConfigError(
                f"max_replicas is {self.max_replicas}: it must be none or at least replicas, {self.replicas}"
            )
        if self.uses_ray and self.api_workers > 1:
            raise ConfigError(
                f"api_workers is {self.api_workers}: it must be 1 where Ray Serve runs the engines, each of which "
                "has an API process of its own"
            )

    @property
    def uses_ray(self) -> bool:
        """Whether Ray Serve runs the engines."""
        return self.replicas > 1 or self.max_replicas is not None
