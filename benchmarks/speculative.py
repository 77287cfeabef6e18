"""Speculative decoding beside plain `generate`, transformers' assisted generation and its prompt lookup.

    hf-ext bench speculative --models all --temperature 0 0.7 --write

All methods take turns on every prompt, in one process with a fixed number of threads, and produce the
same number of tokens. What is left out, what is counted and how is said in `speculative_table.LEGEND`.

`--mkl-cbwr` sets MKL's variable of that name before MKL is used first. By default MKL reads the
weights of a linear layer at half the speed as soon as there is more than one position, on the AMD
processors it was tried on; the branches that are reproducible from run to run do not, and are as
fast for one position. It applies to all methods alike, plain `generate` included; `OFF` leaves torch
as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from hf_ext.benchmarks import damped, records, speculative_table
from hf_ext.benchmarks.speculative_figures import Curves, figures
from hf_ext.benchmarks.speculative_measure import WIDTHS, weights_memory, widths
from hf_ext.benchmarks.speculative_methods import ASSISTED, PLAIN, Method, select
from hf_ext.benchmarks.speculative_runs import Tick, batches, measure, rows_of, runs
from hf_ext.benchmarks.speculative_settings import TARGETS, Setting, load
from hf_ext.cli.output import CliError, print_table, quiet
from hf_ext.verify.stamp import hardware, versions, weights

#: Cached tokens before the calls whose cost is measured by width.
CONTEXT = 128


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(prog="hf-ext bench speculative", description=(__doc__ or "").partition("\n")[0])
    add = found.add_argument
    add("--models", choices=[*TARGETS, "all"], default="all", help="the targets")
    add("--methods", help="comma-separated; `baselines` for those of transformers, `none` for plain only; default all")
    add("--prompts", type=_positive, default=8, help="held-out prompts; a quarter are tables")
    add("--tokens", type=_positive, default=64, help="new tokens of each run")
    add("--temperature", type=float, nargs="+", default=[0.0, 0.7], help="0 is greedy")
    add("--draft-tokens", type=_positive, default=5, help="tokens drafted a step, the same for all")
    add("--rounds", type=_positive, default=3, help="timed runs of each prompt")
    add("--threads", type=_positive, default=2)
    add("--batch", type=_positive, nargs="*", default=[], help="batch sizes for the throughput of our methods")
    add("--damping", type=float, default=damped.DAMPING, help="of the memory-bound target")
    add("--mkl-cbwr", default="AUTO", help="MKL's reproducible branch (AUTO, AVX2, AVX512, ...); OFF for its default")
    add("--json", type=Path, metavar="FILE", help="write the record there")
    add("--write", action="store_true", help="write benchmarks/results/speculative.json and .md of this checkout")
    add("--quick", action="store_true", help="embedded target, two prompts, few tokens, one round")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables and write the record.

    Raises:
        CliError: an option cannot be honoured, or a method failed or differed (after everything is written).
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = parser().parse_args(argv)
    if arguments.quick:
        arguments.models, arguments.temperature = "embedded", arguments.temperature[:1]
        arguments.prompts, arguments.tokens, arguments.rounds = 2, 16, 1
    if arguments.tokens < 2:
        raise CliError("--tokens must be 2 at least: the first token belongs to the prompt")
    if any(temperature < 0 for temperature in arguments.temperature):
        raise CliError(f"--temperature must be 0 or more, got {min(arguments.temperature):g}")
    folder = records.results() if arguments.write else None
    methods = [] if arguments.methods == "none" else select(arguments.methods)
    # MKL reads it when it is used first, which importing torch does not do.
    os.environ["MKL_CBWR"] = os.environ.get("MKL_CBWR", arguments.mkl_cbwr)
    if os.environ["MKL_CBWR"] == "OFF":
        del os.environ["MKL_CBWR"]
    quiet()
    threads = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    try:
        record = _record(arguments, argv)
        for name in TARGETS if arguments.models == "all" else [arguments.models]:
            record["targets"].append(_target(name, arguments, methods))
            _show(record["targets"][-1])
    finally:
        torch.set_num_threads(threads)
    if arguments.json is not None:
        records.write(arguments.json, json.dumps(record, indent=1) + "\n")
    if folder is not None:
        records.write(folder / "speculative.json", json.dumps(record, indent=1) + "\n")
        records.write(folder / "speculative.md", speculative_table.markdown(record))
    _complain(record)


def _record(arguments: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """Return the head of the record: where, with what and how."""
    options = {key: value for key, value in vars(arguments).items() if key not in ("json", "write", "quick")}
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["hf-ext bench speculative", *argv]),
        "hardware": hardware(),
        "versions": versions(),
        "weights": weights(),
        "mkl_cbwr": os.environ.get("MKL_CBWR", "OFF"),
        "context": CONTEXT,
        "options": options,
        "targets": [],
    }


def _target(name: str, arguments: argparse.Namespace, methods: Sequence[Method]) -> dict[str, Any]:
    """Measure one target in all ways that were asked for."""
    setting = load(name, arguments.prompts, arguments.damping)
    ks = (1, 2, 4, 9) if arguments.quick else WIDTHS
    models = {"target": setting.target, **{f"draft {key!r}": model for key, model in setting.drafts.items()}}
    curves = {key: widths(model, ks, CONTEXT) for key, model in models.items()}
    found: dict[str, Any] = {"name": name, "notes": setting.notes, "curves": {}, "sections": [], "batches": []}
    found["curves"] = {key: {str(k): ms for k, ms in curve.items()} for key, curve in curves.items()}
    # Beside those of the drafts, under None, that of the target: a draft may be called "target", too.
    by_draft: dict[str | None, dict[int, float]] = {None: curves["target"]}
    by_draft |= {key: curves[f"draft {key!r}"] for key in setting.drafts}
    red: set[tuple[str, str | None]] = set()
    tables = [rows_of(setting, methods) for _ in arguments.temperature]
    total = sum(runs(setting, rows, arguments.rounds) for rows in tables)
    total += len(arguments.batch) * (arguments.rounds + 1) * sum(row.method.baseline is None for row in tables[0])
    with _progress(f"{name} target", total) as tick:
        # Greedy first: a method that fails there shows no speed in sampling either.
        for temperature, rows in sorted(zip(arguments.temperature, tables, strict=True), key=lambda pair: pair[0]):
            for row in rows:
                if (row.method.name, row.draft) in red:
                    row.status = "differs"
            measure(
                setting, rows, temperature, arguments.tokens, arguments.draft_tokens, arguments.rounds, tick
            )  # fmt: skip
            red |= {(row.method.name, row.draft) for row in rows if row.status == "differs"}
            found["sections"].append(_section(setting, rows, temperature, arguments.tokens, by_draft))
        if arguments.batch:
            rows = [row for row in rows_of(setting, methods) if (row.method.name, row.draft) not in red]
            found["batches"] = batches(
                setting, rows, arguments.batch, arguments.tokens, arguments.draft_tokens, arguments.rounds, tick
            )
    return found


def _section(setting: Setting, rows: Sequence[Any], temperature: float, tokens: int, curves: Curves) -> dict[str, Any]:
    """Return the figures of one table, over all prompts and over those that are no tables."""
    chosen = {
        "rows": list(range(len(setting.prompts))),
        "rows_without_tables": [i for i, prompt in enumerate(setting.prompts) if not prompt.table],
    }
    plain, weight = rows[0], weights_memory(setting.target)
    if plain.status != "ok":
        raise CliError(f"{PLAIN.name} on the {setting.name} target: {plain.status}")
    assisted = {row.draft: row for row in rows if row.method.name == ASSISTED}
    return {
        "target": setting.name,
        "temperature": temperature,
        "prompts": {which: [setting.prompts[i].name for i in chosen[which]] for which in chosen},
        **{
            which: [figures(row, plain, tokens, curves, indices, weight, assisted.get(row.draft)) for row in rows]
            for which, indices in chosen.items()
        },
    }


def _show(target: dict[str, Any]) -> None:
    """Print the tables of a target, none wider than a small terminal."""
    columns, cells = speculative_table.curve_rows(target["curves"])
    print_table(columns, cells, title=f"{target['name']} target: t(k) / t(1) after {CONTEXT} cached tokens")
    for section in target["sections"]:
        for which in speculative_table.shown(section):
            for columns, cells, title in speculative_table.narrow(section, which):
                print()
                print_table(columns, cells, title=title)
            print("\n".join(speculative_table.remarks(section, which)))
    if target["batches"]:
        print()
        print_table(*speculative_table.batch_rows(target["batches"]), title="tokens a second by batch size, greedy")


def _complain(record: dict[str, Any]) -> None:
    """Raise CliError if a method failed or its text differed."""
    bad: dict[str, str] = {}
    for target in record["targets"]:
        for row in [row for section in target["sections"] for row in section["rows"]] + target["batches"]:
            if row["status"] == "differs" or row["status"].startswith("failed"):
                where = f"{row['method']} on the {target['name']} target"
                bad.setdefault(where, "its greedy text differs" if row["status"] == "differs" else row["status"])
    if bad:
        raise CliError("; ".join(f"{where}: {what}" for where, what in bad.items()))


@contextmanager
def _progress(text: str, total: int) -> Iterator[Tick]:
    """Show a progress bar on the standard error stream if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(text, total=total)
        yield lambda what: bar.update(task, advance=1, description=f"{text}: {what}")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 at least, got {value}")
    return value


if __name__ == "__main__":
    main()
