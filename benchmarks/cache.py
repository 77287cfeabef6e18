"""Compressed caches: quality, speed and memory beside a full cache, transformers' own and kvpress.

    hf-ext bench cache --kvpress /path/to/environment/bin/python --write

Quality: small models are trained on the spot (and kept, so that the next run does not) to answer questions about texts
of symbols; accuracy against the bytes that caches hold. Speed: prefill and decode in turns with a full cache. Memory:
bytes held beside the budget, and peaks over the length of a prompt. `docs/cache-benchmarks.md` says how to read it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from hf_ext.benchmarks import cache_memory, cache_speed, cache_table, records
from hf_ext.benchmarks.cache_methods import FAILED
from hf_ext.benchmarks.cache_models import Recipe
from hf_ext.benchmarks.cache_quality import Plan, quality
from hf_ext.cli.output import CliError, print_table, quiet
from hf_ext.verify.stamp import hardware, versions

PARTS = ("quality", "speed", "memory")
#: A run in seconds, to see that everything works.
QUICK = Recipe(layers=2, hidden=32, width=8, steps=2, tokens=144, length=32, shortest=24)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(prog="hf-ext bench cache", description=(__doc__ or "").partition("\n")[0])
    add = found.add_argument
    for part in PARTS:
        add(f"--{part}", action="store_true", help=f"this part; without any of {', '.join(PARTS)}: all")
    add("--methods", help="comma-separated names; all by default")
    add("--seeds", type=int, default=3, help="models, each of its own seed")
    add("--budgets", type=float, nargs="+", default=[0.5, 0.35, 0.2], help="shares of a text, below 1.0")
    add("--rows", type=int, default=48, help="texts of each task")
    add("--kvpress", type=Path, metavar="PYTHON", help="interpreter of an environment with kvpress")
    add("--models", type=Path, metavar="FOLDER", help="where trained models are kept; a cache folder by default")
    add("--length", type=int, default=2000, help="tokens of the prompt that is timed")
    add("--tokens", type=int, default=24, help="tokens decoded after it")
    add("--rounds", type=int, default=5, help="rounds of timing in which all methods take turns")
    add("--lengths", type=int, nargs="+", default=[2000, 4000, 8000], help="of prompts whose peaks are measured")
    add("--threads", type=int, default=2, help="of timing; as many processes of one thread for quality")
    add("--json", type=Path, metavar="FILE", help="write the record there")
    add(
        "--write",
        action="store_true",
        help="write cache.json, cache.md and plots into benchmarks/results of this checkout",
    )
    add("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables and write the record.

    Raises:
        CliError: an option cannot be honoured.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parser().parse_args(argv)
    _check(options)
    if options.quick:
        options.rows, options.length, options.tokens, options.rounds, options.lengths = 4, 64, 2, 2, [96]
        options.seeds, options.budgets = min(options.seeds, 1), options.budgets[:1]
    folder = records.results() if options.write else None
    quiet()
    parts = [part for part in PARTS if getattr(options, part)] or list(PARTS)
    only = tuple(filter(None, (options.methods or "").split(",")))
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    record: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(), "command": " ".join(["hf-ext bench cache", *_portable(argv)]),
        "hardware": hardware(), "versions": versions(), "threads": options.threads,
    }  # fmt: skip
    try:
        if "quality" in parts:
            plan = Plan(
                recipe=QUICK if options.quick else Recipe(), seeds=range(options.seeds), budgets=options.budgets,
                rows=options.rows, kvpress=options.kvpress, folder=options.models,
                workers=0 if options.quick else options.threads, only=only,
            )  # fmt: skip
            record["quality"] = quality(plan, _tell)
        if "speed" in parts:
            model = cache_speed.model_of(2, 64, 16) if options.quick else cache_speed.model_of()
            record["speed"] = {
                "length": options.length, "tokens": options.tokens, "rounds": options.rounds,
                "rows": cache_speed.speed(model, options.length, options.tokens, options.rounds, only, _tell),
            }  # fmt: skip
        if "memory" in parts:
            shape, decoded = ((2, 64), 2) if options.quick else ((8, 256), 64)
            record["memory"] = {
                "resident": cache_memory.resident(max(options.length // 2, 64), decoded, options.budgets),
                "curves": cache_memory.curves(options.lengths, 512, 512, options.threads, shape, only, _tell),
            }  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    for title, columns, rows in cache_table.sections(record):
        print_table(columns, rows, title=title)
    text = json.dumps(record, indent=1) + "\n"
    # Parts that were run alone do not replace the others.
    name = "cache" if len(parts) == len(PARTS) else "_".join(["cache", *parts])
    for path in filter(None, [options.json, folder and folder / f"{name}.json"]):
        records.write(path, text)
    if folder is not None:
        records.write(folder / f"{name}.md", cache_table.markdown(record, cache_table.plot(record, folder)))
    failures = broken(record)
    if failures:
        raise CliError("\n".join(["some methods broke:", *failures]))


def broken(record: dict[str, Any]) -> list[str]:
    """Return the methods of this package and of transformers that broke rather than refuse, each with its error."""
    quality, memory = record.get("quality", {}), record.get("memory", {})
    rows = [*quality.get("cells", []), *quality.get("padded", []), *memory.get("resident", [])]
    rows += record.get("speed", {}).get("rows", [])
    return sorted({f"{r['method']}: {r['problem']}" for r in rows if r.get("problem", "").startswith(FAILED)})


def _check(options: argparse.Namespace) -> None:
    if options.seeds < 1 or options.rounds < 2 or options.rows < 4 or options.threads < 1:
        raise CliError("--seeds and --threads must be 1 at least, --rounds 2 and --rows 4")
    if not all(0 < budget < 1 for budget in options.budgets):
        raise CliError("--budgets are shares of a text above 0.0 and below 1.0")
    if options.kvpress is not None and not options.kvpress.is_file():
        raise CliError(f"--kvpress: there is no interpreter {options.kvpress}")


def _portable(argv: Sequence[str]) -> list[str]:
    """Return arguments without the paths of this machine."""
    return [Path(word).name if word.startswith("/") else word for word in argv]


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
