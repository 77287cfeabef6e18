"""Training objectives beside the plain Trainer: tokens a second and peak memory, in one run.

    hf-ext bench objectives --write

Every installed objective trains a model of random weights on the standard library's source. For time, all of them take
turns in one process, each turn between two of plain training; the ratio is to the mean of these two. For memory, each
trains in a process of its own. A second part sets losses that can do without the logits beside themselves with logits
and beside plain training, at a large vocabulary.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from hf_ext.benchmarks import objectives_measure as measuring
from hf_ext.benchmarks import records
from hf_ext.benchmarks.objectives_measure import BARS, PLAIN, Method, Sizes
from hf_ext.cli.output import CliError, print_table, quiet
from hf_ext.verify.stamp import hardware, versions

COLUMNS = (
    "objective", "work", "tokens/s", "step time", "lowest to highest", "bar", "read", "FLOPs", "peak MiB", "memory"
)  # fmt: skip
LOGITS_COLUMNS = ("objective", "logits", "tokens/s", "step time", "lowest to highest", "FLOPs", "peak MiB", "memory")
PARTS = ("training", "logits")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(prog="hf-ext bench objectives", description=(__doc__ or "").partition("\n")[0])
    add = found.add_argument
    for part in PARTS:
        add(f"--{part}", action="store_true", help=f"this part; without any of {', '.join(PARTS)}: both")
    add("--objectives", help="comma-separated names; all by default")
    add("--rounds", type=int, default=5, help="in which every objective has its turn")
    add("--steps", type=int, default=3, help="timed steps of a turn")
    add("--vocabulary", type=int, default=8192, help="of the model")
    add("--large-vocabulary", type=int, default=32000, help="of the model that trains with and without logits")
    add("--no-memory", action="store_true", help="time only")
    add("--threads", type=int, default=2)
    add("--json", type=Path, metavar="FILE", help="write the record there")
    add("--write", action="store_true", help="write objectives.json and .md into benchmarks/results of this checkout")
    add("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables and write the record.

    Raises:
        CliError: an option cannot be honoured, or an objective broke.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parser().parse_args(argv)
    if options.rounds < 1 or options.steps < 1 or options.threads < 1:
        raise CliError("--rounds, --steps and --threads must be 1 at least")
    folder = records.results() if options.write else None
    quiet()
    only = tuple(filter(None, (options.objectives or "").split(",")))
    chosen = measuring.methods(only)
    if unknown := set(only) - {method.name for method in chosen}:
        raise CliError(f"--objectives {', '.join(sorted(unknown))}: no such objective is installed")
    parts = [part for part in PARTS if getattr(options, part)] or list(PARTS)
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    record: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(), "command": " ".join(["hf-ext bench objectives", *_plain(argv)]),
        "hardware": hardware(), "versions": versions(), "threads": options.threads, "rounds": options.rounds,
        "steps": options.steps,
    }  # fmt: skip
    try:
        if "training" in parts:
            sizes = _sizes(options, options.vocabulary)
            runs: list[tuple[str, str, dict[str, Any]]] = [
                (m.name, m.name, {}) for m in chosen if m.name != PLAIN and not m.problem
            ]
            record["training"] = _measured(runs, chosen, sizes, options)
        if "logits" in parts:
            sizes = _sizes(options, options.large_vocabulary, layers=2)
            runs = [
                (f"{m.name} {'without' if flag else 'with'} logits", m.name, {"without_logits": flag})
                for m in chosen if m.statistics for flag in (False, True)
            ]  # fmt: skip
            record["logits"] = _measured(runs, chosen, sizes, options)
    finally:
        torch.set_num_threads(threads)
    if "training" in record:
        print_table(COLUMNS, [_cells(row) for row in record["training"]["rows"]], title="Training steps")
    if "logits" in record:
        print_table(LOGITS_COLUMNS, [_logits_cells(row) for row in record["logits"]["rows"]], title="Logits")
    name = "objectives" if len(parts) == len(PARTS) else f"objectives_{parts[0]}"
    for path in filter(None, [options.json, folder and folder / f"{name}.json"]):
        records.write(path, json.dumps(record, indent=1) + "\n")
    if folder is not None:
        records.write(folder / f"{name}.md", markdown(record))
    broken = [f"{row['name']}: {row['problem']}" for part in ("training", "logits") if part in record
              for row in record[part]["rows"] if row.get("broke")]  # fmt: skip
    if broken:
        raise CliError("\n".join(["some objectives broke:", *broken]))


def _sizes(options: argparse.Namespace, vocabulary: int, layers: int = 6) -> Sizes:
    if options.quick:
        return Sizes(vocabulary=measuring.SMALLEST, hidden=32, layers=2, rows=2, length=64, prompt=16)
    return Sizes(vocabulary=vocabulary, layers=layers)


def _measured(
    runs: Sequence[tuple[str, str, dict[str, Any]]], chosen: Sequence[Method], sizes: Sizes, options: argparse.Namespace
) -> dict[str, Any]:
    """Time and weigh runs, and return a row for each method."""
    rounds, steps = (1, 1) if options.quick else (options.rounds, options.steps)
    times = measuring.timed(runs, sizes, rounds, steps, _tell)
    weights = {}
    if not options.no_memory:
        weights = measuring.weighed([(PLAIN, PLAIN, {}), *runs], sizes, 2, options.threads, _tell)
    kinds = {method.name: method for method in chosen}
    tokens = sizes.rows * sizes.length
    rows = []
    for key, name, given in [(PLAIN, PLAIN, {}), *runs]:
        row: dict[str, Any] = {"key": key, "name": name, "kind": kinds[name].kind, "options": given}
        found = {**weights.get(key, {}), **times[key]}
        if "problem" in found:
            rows.append({**row, "problem": found["problem"], "broke": True})
            continue
        median = statistics.median(found["seconds"])
        row |= {
            "seconds": median, "tokens_per_second": tokens / median, "ratio": statistics.median(found["ratios"]),
            "lowest": min(found["ratios"]), "highest": max(found["ratios"]), "rounds": found["ratios"],
            "bar": BARS.get(row["kind"]), "read": found.get("read"), "peak_mib": found.get("peak_mib"),
        }  # fmt: skip
        if found.get("flops") and weights[PLAIN].get("flops"):
            row["flops"] = found["flops"] / weights[PLAIN]["flops"]
        if row["peak_mib"] is not None and weights[PLAIN].get("peak_mib"):
            row["memory"] = row["peak_mib"] / weights[PLAIN]["peak_mib"]
        rows.append(row)
    used = {name for _, name, _ in runs}
    rows += [{"key": m.name, "name": m.name, "problem": m.problem} for m in chosen if m.problem and m.name not in used]
    return {"sizes": asdict(sizes), "rows": rows}


def verdict(row: dict[str, Any]) -> str:
    """Say whether a step's ratio keeps its bar, and where it does not, whether it does for what is computed in it.

    Example:
        >>> verdict({"bar": 0.05, "ratio": 1.02, "read": 1.0}), verdict({"bar": 0.1, "ratio": 1.2, "read": 1.0})
        ('within 5 %', 'over 10 %')
        >>> verdict({"bar": 0.05, "ratio": 1.9, "read": 2.0}), verdict({"bar": None, "ratio": 3.0, "read": 2.0})
        ('within 5 % a token read', '')
        >>> verdict({"bar": 0.1, "ratio": 2.1, "read": 1.0, "flops": 2.0})
        'within 10 % a FLOP'
    """
    if not row["bar"]:
        return ""
    bar = f"{100 * row['bar']:.0f} %"
    for work, name in ((1.0, ""), (row.get("read") or 1.0, " a token read"), (row.get("flops") or 1.0, " a FLOP")):
        if row["ratio"] / work <= 1 + row["bar"]:
            return f"within {bar}{name}"
    return f"over {bar}"


def _cells(row: dict[str, Any]) -> list[str]:
    if row.get("problem"):
        return [row["name"], row["problem"], *[""] * (len(COLUMNS) - 2)]
    work = [_number(row.get(name), ".2f") for name in ("read", "flops")]
    return [row["name"], row["kind"] or "", *_times(row), verdict(row), *work, *_memory(row)]


def _logits_cells(row: dict[str, Any]) -> list[str]:
    if row.get("problem"):
        return [row["name"], row["problem"], *[""] * (len(LOGITS_COLUMNS) - 2)]
    logits = "without" if row["options"].get("without_logits") else "with"
    return [row["name"], logits, *_times(row), _number(row.get("flops"), ".2f"), *_memory(row)]


def _times(row: dict[str, Any]) -> list[str]:
    spread = f"{row['lowest']:.3f} to {row['highest']:.3f}" if row["name"] != PLAIN else ""
    return [f"{row['tokens_per_second']:.0f}", f"{row['ratio']:.3f}", spread]


def _memory(row: dict[str, Any]) -> list[str]:
    return [_number(row["peak_mib"], ".0f"), _number(row.get("memory"), ".2f")]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def markdown(record: dict[str, Any]) -> str:
    """Write the record as a page."""
    lines = [
        "# Training objectives beside the plain Trainer", "",
        f"`{record['command']}`, {record['date']}, on {record['hardware']['cpu']}, "
        f"{record['hardware']['cores']} cores, {record['threads']} threads; "
        + ", ".join(f"{name} {version}" for name, version in record["versions"].items()) + ".", "",
        "*Step time* is that of an optimizer step over plain training's, data and collator included: the median over "
        f"{record['rounds']} rounds of the ratio to the plain runs before and after, {record['steps']} steps a run, "
        "with the lowest and highest round. *tokens/s* counts the tokens of the data. *Read* is what the model reads "
        "in a step, over all passes and models, against the data's tokens: some methods copy texts or take several "
        "passes, and pay for it by definition. *FLOPs* are those of a step's matrix products and attentions, against "
        "plain training's: heads and directions of attention that a method adds are in them. The bars are 5 % for "
        "corruptions and 10 % for losses of a single forward pass; what does not keep its bar may keep it *a token "
        "read* or *a FLOP*. Losses of statistics train without logits by themselves here, objectives that leave few "
        "targets make logits of these alone, and rewritten rows stay as long as the data's (`max_length`). "
        "*Peak* is the growth of resident memory in training, of a process of its "
        "own; *memory* is that against plain training. The clean loss, which is measured at logged steps only, is off.",
    ]  # fmt: skip
    for part, title, columns, cells in (
        ("training", "Training steps", COLUMNS, _cells),
        ("logits", "With and without logits", LOGITS_COLUMNS, _logits_cells),
    ):
        if part not in record:
            continue
        sizes = record[part]["sizes"]
        lines += [
            "", f"## {title}", "",
            f"Llama of {sizes['layers']} layers, width {sizes['hidden']}, vocabulary {sizes['vocabulary']}; batches of "
            f"{sizes['rows']} rows of {sizes['length']} tokens, of which {sizes['prompt']} are a prompt; AdamW, "
            "float32.", "",
            f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}",
        ]  # fmt: skip
        lines += [f"| {' | '.join(cells(row))} |" for row in record[part]["rows"]]
        told = {row["name"]: measuring.options_of(row["name"]) for row in record[part]["rows"]}
        if any(told.values()):
            found = "; ".join(f"`{name}` with {text}" for name, text in told.items() if text)
            lines += ["", f"Options other than defaults and special tokens: {found}."]
    return "\n".join(lines) + "\n"


def _plain(argv: Sequence[str]) -> list[str]:
    return [Path(word).name if word.startswith("/") else word for word in argv]


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
