"""What `import hf_ext` adds to `import transformers`.

    hf-ext bench import_time --runs 15

Each run is a fresh process. The variants take turns, so that a machine that becomes busier meets
all of them alike; medians are reported, with the quartiles beside them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from hf_ext.cli.output import CliError
from hf_ext.verify.stamp import hardware, versions

#: What is imported before hf_ext; the time of `import hf_ext` itself is taken inside the process.
BEFORE = {
    "after `import transformers`": "import transformers",
    "after `from transformers import AutoModelForCausalLM`": "from transformers import AutoModelForCausalLM",
    "alone": "pass",
}
PROGRAM = """
import time
start = time.perf_counter()
{before}
between, cpu = time.perf_counter(), time.process_time()
import hf_ext
print(between - start, time.perf_counter() - between, time.process_time() - cpu)
"""


def measure(runs: int, before: Sequence[str] = tuple(BEFORE)) -> dict[str, dict[str, float]]:
    """Time `import hf_ext` in fresh processes.

    Args:
        runs: processes for each variant, at least 2; one more comes first and is not counted.
        before: which variants of `BEFORE`.

    Returns:
        For each variant, in milliseconds: median and quartiles of `import hf_ext` by the wall
        clock, the median of its processor time, which other processes hardly change, and the median
        of what was imported before it.
    """
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in before}
    for _ in range(runs + 1):
        for name in before:
            program = PROGRAM.format(before=BEFORE[name])
            out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
            first, own, cpu = (float(seconds) * 1e3 for seconds in out.split())
            times[name].append((first, own, cpu))
    found = {}
    for name, measured in times.items():
        before_times, own_times, cpu_times = zip(*measured[1:], strict=True)
        low, median, high = statistics.quantiles(own_times, n=4)
        found[name] = {
            "median_ms": round(median, 2),
            "quartile_low_ms": round(low, 2),
            "quartile_high_ms": round(high, 2),
            "cpu_median_ms": round(statistics.median(cpu_times), 2),
            "before_median_ms": round(statistics.median(before_times), 1),
        }
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write the record if hf_ext is used from a checkout.

    Raises:
        CliError: there are too few runs for quartiles.
    """
    here = Path(__file__).resolve().parent
    default = here / "results" / "import_time.json" if (here.parent / "pyproject.toml").is_file() else None
    parser = argparse.ArgumentParser(prog="hf-ext bench import_time", description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--out", type=Path, default=default, help="where to write the record")
    arguments = parser.parse_args(argv)
    if arguments.runs < 2:
        raise CliError(f"--runs must be 2 at least, for the quartiles, got {arguments.runs}")
    results = measure(arguments.runs)
    for name, figures in results.items():
        interval = f"[{figures['quartile_low_ms']:.2f}, {figures['quartile_high_ms']:.2f}]"
        print(
            f"import hf_ext {name}: {figures['median_ms']:.2f} ms {interval}, {figures['cpu_median_ms']:.2f} ms of CPU"
        )
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": f"hf-ext bench import_time --runs {arguments.runs}",
        "hardware": hardware(),
        "versions": versions(),
        "runs": arguments.runs,
        "import_hf_ext": results,
    }
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
