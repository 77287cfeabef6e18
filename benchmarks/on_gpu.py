"""What the benchmarks on a GPU share: results are held against float64, then timed, and written down step by step."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import torch

from hf_ext.cli.output import CliError, print_table
from hf_ext.verify.stamp import hardware, versions

#: The largest error of a result, relative to the largest value; both are rounded to bfloat16 within.
BOUND = 2e-2


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference relative to the largest value."""
    return float((found.double() - expected).abs().max() / expected.abs().max().clamp_min(1))


def demand(what: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise unless a result is right.

    Raises:
        CliError: it is not.
    """
    off = error(found, expected)
    if not off <= BOUND:
        raise CliError(f"{what} is off by {off:.2e} of its largest value, at most {BOUND} is right: nothing is timed")


class Clock:
    """Times functions: by the device's events, with its cache emptied before each run."""

    def __init__(self, device: torch.device, runs: int) -> None:
        self.device = device
        self.runs = runs

    def __call__(self, function: Callable[[], Any]) -> float:
        """Return the median of seconds."""
        if self.device.type == "cuda":
            import triton.testing

            return float(triton.testing.do_bench(function, warmup=50, rep=10 * self.runs, return_mode="median")) / 1e3
        times = []
        for _ in range(self.runs):
            begin = time.perf_counter()
            function()
            times.append(time.perf_counter() - begin)
        return statistics.median(times)


class Measure(Protocol):
    """Returns all figures of a benchmark, its rows under `"rows"`."""

    def __call__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        clock: Clock,
        tiny: bool = False,
        seconds: float = float("inf"),
        save: Callable[[dict[str, Any]], None] = ...,
    ) -> dict[str, Any]:
        """Measure on a device; `tiny` goes through everything on tiny shapes, `save` gets what there is so far."""


def in_time(
    steps: Iterable[tuple[str, Callable[[], list[dict[str, Any]]]]],
    found: dict[str, Any],
    seconds: float,
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Go through named steps until the time is up.

    Args:
        steps: what gives rows, each with its name.
        found: what is known before; gets `"rows"`, and the names of the steps that were left out as `"left_out"`.
        seconds: after so many no step is begun.
        save: gets `found` after every step.
    """
    begin = time.monotonic()
    found |= {"rows": [], "left_out": []}
    for name, step in steps:
        if time.monotonic() - begin > seconds:
            found["left_out"].append(name)
            continue
        found["rows"] += step()
        save(found)
    return found


def run(
    name: str, doc: str, measure: Measure, show: Callable[[dict[str, Any]], None], argv: Sequence[str] | None
) -> None:
    """Be the command line of a benchmark on a GPU.

    Args:
        name: of the benchmark.
        doc: its module's, whose first line describes it.
        measure: returns its figures.
        show: prints them.
        argv: the arguments.

    Raises:
        CliError: there is no GPU, or a result is wrong.
    """
    parser = argparse.ArgumentParser(prog=f"hf-ext bench {name}", description=doc.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=50, help="about how many runs a figure is the median of")
    parser.add_argument("--dry-run", action="store_true", help="go through everything on the CPU, without figures")
    parser.add_argument("--seconds", type=float, default=420, help="after so many nothing new is begun")
    parser.add_argument("--out", type=Path, help="folder of the record; by default this checkout's results")
    chosen = parser.parse_args(argv)
    if chosen.dry_run:
        found = measure(torch.device("cpu"), torch.float32, Clock(torch.device("cpu"), 1), tiny=True)
        print(f"{len(found['rows'])} figures would be measured; on the CPU they would say nothing")
        return
    if not torch.cuda.is_available():
        raise CliError("this benchmark needs a GPU; --dry-run goes through it on the CPU")
    device = torch.device("cuda", torch.cuda.current_device())
    named = torch.cuda.get_device_name(device)
    folder = chosen.out or Path(__file__).resolve().parent / "results"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_{named.replace(' ', '_')}.json"

    def save(found: dict[str, Any]) -> None:
        record = {
            "date": datetime.now(UTC).date().isoformat(), "command": f"hf-ext bench {name}", "device": named,
            "hardware": hardware(), "versions": versions(), "dtype": "bfloat16", **found,
        }  # fmt: skip
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    found = measure(device, torch.bfloat16, Clock(device, chosen.runs), seconds=chosen.seconds, save=save)
    save(found)
    print(named)
    show(found)
    for missing in found["left_out"]:
        print(f"left out, as the time was up: {missing}")
    print(f"wrote {path}")


def table(columns: list[str], rows: list[dict[str, Any]]) -> None:
    """Print some columns of rows as a table."""
    cells = [[row.get(column, "") for column in columns] for row in rows]
    print_table(columns, [[f"{c:.3g}" if isinstance(c, float) else str(c) for c in line] for line in cells])
