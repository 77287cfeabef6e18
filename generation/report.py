"""What a decoding call did and what it cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class DecodeReport:
    """Ledger of one decoding call; `strategy.report` holds that of the last call.

    Args:
        strategy: name of the strategy's class.
        rows: sequences decoded together.
        tokens_per_row: new tokens of each row, its eos included and padding after it not.
        target_calls: forward passes of the model, the prompt's included.
        target_positions: token positions those passes evaluated, over all rows.
        draft_calls: forward passes of a draft model, for strategies that have one.
        accepted: drafted tokens that were kept, likewise.
        seconds: wall-clock time of the call.
        details: what else the strategy has to tell.

    Example:
        >>> report = DecodeReport("Greedy", rows=1, tokens_per_row=[8], target_calls=8, seconds=2.0)
        >>> report.tokens, report.tokens_per_second, report.tokens_per_call
        (8, 4.0, 1.0)
    """

    strategy: str
    rows: int = 0
    tokens_per_row: list[int] = field(default_factory=list)
    target_calls: int = 0
    target_positions: int = 0
    draft_calls: int = 0
    accepted: int = 0
    seconds: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """New tokens over all rows."""
        return sum(self.tokens_per_row)

    @property
    def tokens_per_second(self) -> float:
        """New tokens over all rows per second of wall-clock time."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_call(self) -> float:
        """New tokens of a row per forward pass of the model."""
        return self.tokens / (self.rows * self.target_calls) if self.rows and self.target_calls else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return all figures, the derived ones included, ready for JSON."""
        derived = {name: getattr(self, name) for name in ("tokens", "tokens_per_second", "tokens_per_call")}
        return {**asdict(self), **derived}

    def __str__(self) -> str:
        parts = [
            f"{self.strategy}: {self.tokens} tokens in {self.seconds:.2f} s ({self.tokens_per_second:.1f} tokens/s)",
            f"{self.target_calls} model calls over {self.target_positions} positions",
        ]
        if self.draft_calls:
            parts.append(f"{self.draft_calls} draft calls, {self.accepted} drafted tokens kept")
        parts += [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                  for key, value in self.details.items() if not isinstance(value, (list, dict))]  # fmt: skip
        return "; ".join(parts)
