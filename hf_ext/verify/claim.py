"""What a claim check is: what the paper says, what is measured here, and when it counts as reproduced."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "==": operator.eq,
    "<=": operator.le,
    "<": operator.lt,
    ">=": operator.ge,
    ">": operator.gt,
}


@dataclass(frozen=True)
class Threshold:
    """The condition under which a measured value reproduces its claim.

    Args:
        op: one of `==`, `<=`, `<`, `>=`, `>`.
        value: what the measured value is compared with.

    Raises:
        ValueError: unknown `op`, or a `value` that is not finite.

    Example:
        >>> Threshold(">=", 0.25).holds(0.3), str(Threshold("==", 0))
        (True, '== 0')
    """

    op: str
    value: float

    def __post_init__(self) -> None:
        if self.op not in _OPERATORS:
            raise ValueError(f"threshold operator {self.op!r} is unknown; use one of {', '.join(_OPERATORS)}")
        if not math.isfinite(self.value):
            raise ValueError(f"threshold value must be finite, got {self.value}")

    def holds(self, value: float) -> bool:
        """Tell whether `value` satisfies the condition; NaN never does."""
        return _OPERATORS[self.op](value, self.value)

    def __str__(self) -> str:
        return f"{self.op} {self.value:g}"


@dataclass(frozen=True)
class Measurement:
    """What one claim check measured. Everything in it can be written as JSON.

    Args:
        value: the figure that the threshold judges.
        spread: low and high end of its uncertainty, for example a 95 % bootstrap interval.
        spread_of: what `spread` is, in words (`"95 % bootstrap interval over 24 prompts"`).
        seeds: the random seeds that were used.
        details: further figures behind `value` (both sides of a comparison, counts, settings).

    Raises:
        TypeError: `value` is not a number, or `details` holds something JSON cannot.
        ValueError: a figure is NaN or infinite, or `spread` has its ends swapped or lacks `spread_of`.

    Example:
        >>> Measurement(0.5, spread=(0.4, 0.6), spread_of="95 % interval over 8 prompts").to_dict()["value"]
        0.5
    """

    value: float
    spread: tuple[float, float] | None = None
    spread_of: str = ""
    seeds: tuple[int, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            raise TypeError(f"Measurement.value must be a plain number, got {type(self.value).__name__}; use .item()")
        if not math.isfinite(self.value):
            raise ValueError(f"measured {self.value}, which is no figure")
        if self.spread is not None:
            low, high = self.spread
            if not low <= high:
                raise ValueError(f"Measurement.spread must be (low, high), got {self.spread}")
            if not self.spread_of:
                raise ValueError("Measurement.spread needs spread_of, which says what the interval is")
        _check_json(self.details, "details")

    def to_dict(self) -> dict[str, Any]:
        """Return the measurement as plain JSON values."""
        return {
            "value": self.value,
            "spread": list(self.spread) if self.spread is not None else None,
            "spread_of": self.spread_of,
            "seeds": list(self.seeds),
            "details": dict(self.details),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Measurement:
        """Build the measurement that `to_dict` wrote."""
        spread = values["spread"]
        return cls(
            **{**values, "spread": tuple(spread) if spread is not None else None, "seeds": tuple(values["seeds"])}
        )


@dataclass(frozen=True)
class Claim:
    """One claim of a paper, or one property that makes a method correct, with the check that measures it.

    Args:
        name: short identifier, unique among the plugin's claims (`"greedy-at-alpha-0"`).
        paper: what the paper says, in one sentence.
        measures: what is measured here, in one sentence.
        threshold: when the claim counts as reproduced; `None` for a figure that is only reported.
        check: does the measuring, without arguments. It must not depend on other checks having run.
        unit: of the measured value (`"nats per token"`, `"tokens"`).
        seconds: how long the check takes on two CPU cores, roughly.
        data: what it is measured on; becomes the dataset of the card's evaluation results.

    Example:
        >>> claim = Claim("sum", "One and one are two.", "1 + 1", Threshold("==", 2), lambda: Measurement(1 + 1))
        >>> claim.threshold.holds(claim.check().value)
        True
    """

    name: str
    paper: str
    measures: str
    threshold: Threshold | None
    check: Callable[[], Measurement]
    unit: str = ""
    seconds: float = 1.0
    data: str = "synthetic"

    def judge(self, measurement: Measurement) -> bool | None:
        """Tell whether the threshold holds for the figure and for both ends of its spread; None without threshold.

        Example:
            >>> better = Claim("better", "It is better.", "gain", Threshold(">", 0), lambda: Measurement(0.1))
            >>> better.judge(Measurement(0.1, spread=(-0.1, 0.3), spread_of="range of 3 seeds"))
            False
        """
        if self.threshold is None:
            return None
        return all(map(self.threshold.holds, (measurement.value, *(measurement.spread or ()))))


@dataclass(frozen=True)
class Result:
    """What came of one claim check.

    Args:
        plugin: name of the plugin that makes the claim.
        claim: the claim.
        measurement: what was measured, or `None` when the check raised.
        passed: whether the threshold holds over the whole spread; `None` for a figure without threshold and for
            an error.
        seconds: how long the check took.
        error: type and text of the exception that ended the check, or empty.
    """

    plugin: str
    claim: Claim
    measurement: Measurement | None
    passed: bool | None
    seconds: float
    error: str = ""

    @property
    def status(self) -> str:
        """One of `"reproduced"`, `"not reproduced"`, `"inconclusive"`, `"measured"` (no threshold) and `"error"`.

        Inconclusive: the threshold holds for the figure, but not all over its spread.
        """
        if self.measurement is None:
            return "error"
        if self.passed is False and self.claim.threshold and self.claim.threshold.holds(self.measurement.value):
            return "inconclusive"
        return {True: "reproduced", False: "not reproduced", None: "measured"}[self.passed]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain JSON values: the form in which records and `--json` hold it."""
        threshold = self.claim.threshold
        return {
            "plugin": self.plugin,
            "claim": self.claim.name,
            "paper": self.claim.paper,
            "measures": self.claim.measures,
            "threshold": str(threshold) if threshold is not None else None,
            "unit": self.claim.unit,
            "data": self.claim.data,
            "status": self.status,
            "passed": self.passed,
            "measurement": self.measurement.to_dict() if self.measurement is not None else None,
            "error": self.error,
            "seconds": round(self.seconds, 1),
        }


def _check_json(value: object, where: str) -> None:
    """Raise `TypeError` or `ValueError` naming the first place below `where` that JSON cannot hold."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"Measurement.{where} has the key {key!r}; keys must be strings")
            _check_json(item, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_json(item, f"{where}[{index}]")
    elif value is not None and not isinstance(value, str | int | float | bool):
        raise TypeError(f"Measurement.{where} is a {type(value).__name__}, which JSON cannot hold; use plain numbers")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"Measurement.{where} is {value}, which JSON cannot hold")
