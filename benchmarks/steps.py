"""Figures of two training loops that take their steps alternately."""

from dataclasses import dataclass, field


@dataclass
class Steps:
    """Figures of the steps of two loops.

    Attributes:
        kinds: "clips" or "images" of every step.
        trainer, plain: CPU-seconds of every step.
        losses: pairs of losses, the trainer's and the plain loop's.
        peaks: peak memory of a step in bytes, beyond weights and states, of "trainer" and "plain".
    """

    kinds: list[str] = field(default_factory=list)
    trainer: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)
    losses: list[tuple[float, float]] = field(default_factory=list)
    peaks: dict[str, int] = field(default_factory=dict)

    def least(self, name: str, kind: str, warm_up: int) -> float:
        rows = zip(self.kinds[warm_up:], vars(self)[name][warm_up:], strict=True)
        return min(seconds for each, seconds in rows if each == kind)

    def mean(self, name: str, weights: dict[str, float], warm_up: int) -> float:
        """Return the least CPU-seconds of each kind, averaged with the weights of their sources."""
        total = sum(
            weight * self.least(name, kind, warm_up)
            for kind, weight in weights.items()
            if kind in self.kinds[warm_up:]
        )
        return total / sum(w for kind, w in weights.items() if kind in self.kinds[warm_up:])
