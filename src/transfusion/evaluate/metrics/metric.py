"""One measured figure, how it was measured, and the threshold it should reach."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One figure. how: the measurement in a sentence. threshold: what it should reach, if there is such a figure."""

    value: float
    how: str
    unit: str = ""
    threshold: float | None = None
    higher_is_better: bool = True

    @property
    def passed(self) -> bool | None:
        if self.threshold is None:
            return None
        return self.value >= self.threshold if self.higher_is_better else self.value < self.threshold

    def describe(self) -> str:
        """Value, unit, and how it stands to its threshold."""
        text = f"{self.value:.4f} {self.unit}".strip()
        if self.threshold is None:
            return text
        relation = "at least" if self.higher_is_better else "below"
        return f"{text} ({'reached' if self.passed else 'missed'}: {relation} {self.threshold:.4f})"

    def as_dict(self) -> dict[str, object]:
        """As metrics.json holds it."""
        return asdict(self) | {"passed": self.passed}
