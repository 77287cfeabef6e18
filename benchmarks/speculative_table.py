"""The record of the speculative benchmark as tables for the terminal and as a markdown page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

COLUMNS = (
    "method", "draft", "speed", "predicted", "ms/token", "tokens/call", "calls/token", "positions/token",
    "drafts/token", "memory MiB", "ms/step: draft, verify, rest", "over assisted", "note",
)  # fmt: skip
#: Status of rows that ran to the end.
RAN = ("ok", "differs")
LEGEND = """\
*Speed* is the ratio to plain `generate` in the same round, the median over prompts of each prompt's median, with the
95 % bootstrap interval over prompts. Every run's time leaves out its pass of the target over the prompt and what was
drafted ahead of that, which hooks on the layers time; a method's own work on the prompt, such as the draft model's,
counts. Calls, positions and drafts are counted by hooks on the models' layers, the same way for every method;
*tokens/call* is the mean number of tokens that a call of the target gives. *Predicted* is that number divided by the
measured cost of the models' calls alone. *Over assisted* is the ratio to transformers' assisted generation with the
same draft and length in the same rounds, taken like *speed*. *Memory* is the highest resident memory during a run
less that before it. *DIFFERS* marks a method whose greedy text is not that of plain `generate`; its speed is not
shown."""


def rows(section: dict[str, Any], which: str = "rows") -> list[list[str]]:
    """Return the cells of a section's table, a list for each method in the order of `COLUMNS`."""
    return [_cells(row) for row in section[which]]


def _cells(row: dict[str, Any]) -> list[str]:
    head = [row["method"], row["draft"] or "-"]
    if row["status"] != "ok" or "speed" not in row:
        label = {"differs": "DIFFERS", "ok": "no runs"}.get(row["status"], row["status"])
        note = "greedy text is not that of plain generate" if row["status"] == "differs" else ""
        short, _, reason = label.partition(": ")
        return [*head, short, *["-"] * (len(COLUMNS) - 4), reason or note]
    low, high = row["speed_spread"]
    step, memory = row.get("ms_per_step"), row.get("memory_mib")
    notes = [] if row["exact"] else ["has another law than plain generate"]
    notes += [row["why"]] if "why" in row else []
    return [
        *head,
        f"{row['speed']:.2f} [{low:.2f}, {high:.2f}]",
        f"{row['predicted_speed']:.2f}" if "predicted_speed" in row else "-",
        f"{row['ms_per_token']:.2f}",
        f"{row['tokens_per_call']:.2f}",
        f"{row['calls_per_token']:.2f}",
        f"{row['positions_per_token']:.2f}",
        f"{row['draft_calls_per_token']:.2f}",
        "-" if memory is None else f"{memory:.1f}",
        "-" if step is None else ", ".join(f"{step[name]:.2f}" for name in ("draft", "verify", "bookkeeping")),
        _over_assisted(row),
        "; ".join(notes),
    ]


def _over_assisted(row: dict[str, Any]) -> str:
    if "over_assisted" not in row:
        return "-"
    low, high = row["over_assisted_spread"]
    return f"{row['over_assisted']:.2f} [{low:.2f}, {high:.2f}]"


def narrow(section: dict[str, Any], which: str) -> list[tuple[list[str], list[list[str]], str]]:
    """Return the table of a section as two narrow ones, of speeds and of counts: columns, rows, title of each."""
    ran = [cells for cells, row in zip(rows(section, which), section[which], strict=True) if row["status"] in RAN]
    found = []
    for what, names in (
        ("speed", COLUMNS[:5] + COLUMNS[9:10] + COLUMNS[11:12]),
        ("counts", COLUMNS[:2] + COLUMNS[5:9] + COLUMNS[10:11]),
    ):
        at = [COLUMNS.index(name) for name in names]
        found.append((list(names), [[cells[i] for i in at] for cells in ran], f"{title(section, which)}: {what}"))
    return found


def remarks(section: dict[str, Any], which: str) -> list[str]:
    """Return the notes of a section's table as lines, and which methods did not run."""
    notes = [
        f"{cells[0]}{'' if cells[1] == '-' else f' ({cells[1]})'}: {cells[-1]}"
        for cells, row in zip(rows(section, which), section[which], strict=True)
        if cells[-1] and row["status"] in RAN
    ]
    for row in section[which]:
        if row["status"].startswith("failed"):
            notes.append(f"{row['method']}: {row['status']}")
    for status in ("not installed", "not for this target"):
        names = [row["method"] for row in section[which] if row["status"] == status]
        notes += [f"{status}: {', '.join(names)}"] if names else []
    return notes


def title(section: dict[str, Any], which: str = "rows") -> str:
    """Return the heading of a section's table."""
    law = "greedy" if section["temperature"] == 0 else f"sampling at temperature {section['temperature']:g}"
    count = len(section["prompts"][which])
    kind = "prompts" if which == "rows" else "prompts without tables"
    return f"{section['target']} target, {law}, {count} {kind}"


def shown(section: dict[str, Any]) -> list[str]:
    """Return which tables a section has: that without table prompts only where it would be another one."""
    other = "rows_without_tables"
    return ["rows"] + ([other] if 0 < len(section["prompts"][other]) < len(section["prompts"]["rows"]) else [])


def curve_rows(curves: dict[str, dict[str, float]]) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of the table of t(k) / t(1), a row for each model."""
    widths = list(next(iter(curves.values())))
    columns = ["model", "t(1) ms", *(f"k={k}" for k in widths)]
    found = []
    for name, curve in curves.items():
        first = curve[widths[0]]
        found.append([name, f"{first:.2f}", *(f"{curve[k] / first:.2f}" for k in widths)])
    return columns, found


def batch_rows(batches: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of the table of tokens a second by batch size."""
    sizes = sorted({entry["batch"] for entry in batches})
    found: dict[tuple[str, str], dict[int, str]] = {}
    for entry in batches:
        rate = entry["tokens_per_second"]
        label = "DIFFERS" if entry["status"] == "differs" else entry["status"]
        cells = found.setdefault((entry["method"], entry["draft"] or "-"), {})
        cells[entry["batch"]] = label if rate is None else f"{rate:.1f}"
    columns = ["method", "draft", *(f"batch {size}" for size in sizes)]
    return columns, [[*key, *(cells.get(size, "-") for size in sizes)] for key, cells in found.items()]


def markdown(record: dict[str, Any]) -> str:
    """Return the record as a markdown page."""
    hardware, versions = record["hardware"], record["versions"]
    parts = [
        "# Speculative decoding beside plain generate",
        f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['threads']} threads, MKL_CBWR={record['mkl_cbwr']}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f"; {record['date']}.",
        f"```\n{record['command']}\n```",
        LEGEND,
    ]
    for target in record["targets"]:
        about = target["notes"]
        sizes = ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in about["parameters"].items())
        extra = f"; damping {about['damping']:g}" if "damping" in about else ""
        parts += [f"## {target['name'].capitalize()} target", f"Parameters: {sizes}{extra}."]
        parts += [f"t(k) / t(1) of a call over k new tokens after {record['context']} cached ones:"]
        parts += [_table(*curve_rows(target["curves"]))]
        for section in target["sections"]:
            for which in shown(section):
                parts += [f"### {title(section, which).capitalize()}", _table(COLUMNS, rows(section, which))]
        if target["batches"]:
            parts += ["### Tokens a second by batch size, greedy", _table(*batch_rows(target["batches"]))]
    return "\n\n".join(parts) + "\n"


def _table(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
