"""What a speculative decoding call cost, by row and in all."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hf_ext.generation.report import DecodeReport

#: Where the time of a step goes: drafting, the target's forward pass, and all the rest.
PARTS = ("draft", "verify", "bookkeeping")


class Ledger:
    """Times and counts of a call; `close` writes them into the report.

    Args:
        report: the report of the call.
        rows: number of rows.
    """

    def __init__(self, report: DecodeReport, rows: int) -> None:
        self.report = report
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.steps = 0
        self.ahead = False
        self._rows = [
            {"steps": 0, "drafted": 0, "accepted": 0, "target_calls": 1, "target_positions": 0, "draft_calls": 0,
             "seconds": 0.0}
            for _ in range(rows)
        ]  # fmt: skip

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Add the time spent inside to a part. On a GPU it is the time until the results were asked for."""
        start = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - start

    def prompt(self, lengths: list[int]) -> None:
        """Note that the prompts have been read."""
        for row, length in zip(self._rows, lengths, strict=True):
            row["target_positions"] += length

    def step(self, rows: list[int], drafted: list[int], accepted: list[int], positions: int, draft_calls: int,
             seconds: float, with_prompt: bool = False) -> None:  # fmt: skip
        """Note a step.

        Args:
            rows: the rows that took part.
            drafted: nodes that were drafted for each.
            accepted: tokens of them that were kept.
            positions: positions that the target evaluated for each.
            draft_calls: forward passes of a draft model.
            seconds: duration; shared by the rows.
            with_prompt: whether the call that read the prompts verified this draft, too; `prompt` has noted that call.
        """
        self.steps += 1
        self.ahead = self.ahead or with_prompt
        for row, nodes, kept in zip(rows, drafted, accepted, strict=True):
            found = self._rows[row]
            found["steps"] += 1
            found["drafted"] += nodes
            found["accepted"] += kept
            found["target_calls"] += not with_prompt
            found["target_positions"] += positions
            found["draft_calls"] += draft_calls
            found["seconds"] += seconds / len(rows)

    def close(
        self, target_calls: int, target_positions: int, draft_calls: int, draft_positions: int, tokens: list[int]
    ) -> None:
        """Write everything into the report."""
        report = self.report
        report.target_calls, report.target_positions = target_calls, target_positions
        report.draft_calls = draft_calls
        report.accepted = int(sum(row["accepted"] for row in self._rows))
        steps = sum(row["steps"] for row in self._rows)
        details: dict[str, Any] = {
            "steps": self.steps,
            "drafted_ahead": self.ahead,
            "drafted": int(sum(row["drafted"] for row in self._rows)),
            "draft_positions": draft_positions,
            "mean_accepted": report.accepted / steps if steps else 0.0,
        }
        details |= {f"{part}_seconds": self.seconds[part] for part in PARTS}
        details["rows"] = [
            {"tokens": count, **row, "mean_accepted": row["accepted"] / row["steps"] if row["steps"] else 0.0}
            for count, row in zip(tokens, self._rows, strict=True)
        ]
        report.details.update(details)
