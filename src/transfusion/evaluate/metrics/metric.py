"""One measured figure, how it was measured, and the threshold it should reach."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from transfusion.evaluate.metrics.bootstrap import Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One figure.

    how: the measurement in a sentence. threshold: what it should reach, if there is such a figure. count: samples that
    it is taken over. interval: where 95 % of the figures of as many other samples would lie, by resampling these. None
    where that says nothing.
    """

    value: float
    how: str
    unit: str = ""
    threshold: float | None = None
    higher_is_better: bool = True
    count: int = 0
    interval: Interval | None = None

    @property
    def passed(self) -> bool | None:
        if self.threshold is None:
            return None
        return self.value >= self.threshold if self.higher_is_better else self.value < self.threshold

    def describe(self) -> str:
        """Value, interval, unit, and how it stands to its threshold."""
        spread = "" if self.interval is None else " [{:.4f}, {:.4f}]".format(*self.interval)
        text = f"{self.value:.4f}{spread} {self.unit}".strip()
        if self.threshold is None:
            return text
        relation = "at least" if self.higher_is_better else "below"
        return f"{text} ({'reached' if self.passed else 'missed'}: {relation} {self.threshold:.4f})"

    def as_dict(self) -> dict[str, object]:
        """As metrics.json holds it."""
        return asdict(self) | {"passed": self.passed}
