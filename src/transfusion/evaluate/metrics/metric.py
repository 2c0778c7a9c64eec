"""One measured figure, how it was measured, and the bar it should reach."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One figure. how: the measurement in a sentence. bar: what it should reach, if there is such a figure."""

    value: float
    how: str
    unit: str = ""
    bar: float | None = None
    higher_is_better: bool = True

    @property
    def passed(self) -> bool | None:
        if self.bar is None:
            return None
        return self.value >= self.bar if self.higher_is_better else self.value < self.bar

    def describe(self) -> str:
        """Value, unit, and how it stands to its bar."""
        text = f"{self.value:.4f} {self.unit}".strip()
        if self.bar is None:
            return text
        relation = "at least" if self.higher_is_better else "below"
        return f"{text} ({'reached' if self.passed else 'missed'}: {relation} {self.bar:.4f})"

    def as_dict(self) -> dict[str, object]:
        """As metrics.json holds it."""
        return asdict(self) | {"passed": self.passed}
