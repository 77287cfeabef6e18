"""The record of the benchmark of caches as a page, and as plots."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Cell = dict[str, Any]
#: The best method is looked for among those that hold so much more than the budget says, as the question is held, too.
ALLOWED = 0.05
LEGEND = """\
*Accuracy* is the share of answer tokens that are right, greedy, in per cent: the mean over seeds, with the lowest and
the highest seed. *Bytes* are those of all tensors that a cache holds (keys, values, positions, scores, scales) after
the question and one token of the answer, as a share of a full cache. Text and budget are the same for all; the question
comes after the text was compressed (*unaware*) or with it (*aware*; the first token of the answer is known before
anything is dropped then and does not count, so that needles have no such part). kvpress runs in its own environment on
the same weights and tokens, at the same nominal ratio; "equal bytes" is our method with so few tokens that it holds no
more bytes than kvpress's. kvpress's per-head methods mask instead of dropping: their bytes are those they hold. *To
full cache* is the ratio to a full cache beside the method, read just after it and decoded in turns with it, token by
token: the median over rounds with its 95 % bootstrap interval; the full cache's own row is that of two full caches."""


def groups(cells: Sequence[Cell]) -> dict[tuple[str, str], dict[tuple[Any, ...], list[Cell]]]:
    """Sort cells by kind and method, then by task, whether aware, and budget; the members are seeds."""
    found: dict[tuple[str, str], dict[tuple[Any, ...], list[Cell]]] = {}
    for cell in cells:
        if "problem" not in cell:
            key = (cell["task"], cell["aware"], cell["budget"])
            found.setdefault((cell["kind"], cell["method"]), {}).setdefault(key, []).append(cell)
    return found


def summary(members: Sequence[Cell]) -> tuple[float, float, float, float]:
    """Return mean, lowest and highest accuracy over seeds, and the mean share of bytes.

    Example:
        >>> summary([{"accuracy": 0.5, "share": 0.25}, {"accuracy": 1.0, "share": 0.25}])
        (0.75, 0.5, 1.0, 0.25)
    """
    values = [cell["accuracy"] for cell in members]
    return statistics.mean(values), min(values), max(values), statistics.mean(cell["share"] for cell in members)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a markdown table."""
    lines = [columns, ["---", *["--:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def quality_rows(cells: Sequence[Cell], task: str, aware: bool) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of the accuracies of a task, best first at the middle budget."""
    budgets = sorted({c["budget"] for c in cells if c["budget"] != 1.0}, reverse=True)
    middle = budgets[len(budgets) // 2] if budgets else 1.0
    found = []
    for (kind, method), places in groups(cells).items():
        shown, rank = [], -1.0
        whole = places.get((task, aware, 1.0))
        if whole:
            rank = summary(whole)[0]
            shown = [_accuracy(whole)] + [""] * max(len(budgets) - 1, 0)
        else:
            for budget in budgets:
                members = places.get((task, aware, budget))
                shown.append(_accuracy(members) if members else "")
                if members and budget == middle:
                    rank = summary(members)[0]
        if any(shown):
            found.append((rank, [f"{method} ({kind})" if kind != "transformers" else method, *shown]))
    found.sort(key=lambda pair: -pair[0])
    return ["method", *(f"budget {budget:g}" for budget in budgets)], [row for _, row in found]


def _accuracy(members: Sequence[Cell]) -> str:
    mean, low, high, share = summary(members)
    return f"{100 * mean:.0f} [{100 * low:.0f}, {100 * high:.0f}] at {share:.3f}"


def shared_rows(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Return the mean accuracies over tasks and budgets of the methods that kvpress has, too, and their differences."""
    rows = []
    by = groups(cells)
    for (kind, method), theirs in sorted(by.items()):
        ours = by.get(("hf_ext", method))
        if kind != "kvpress" or ours is None:
            continue
        fewer = by.get(("hf_ext", f"{method}, equal bytes"), {})
        for aware in (False, True):
            places = [place for place in theirs if place[1] == aware and place in ours]
            if not places:
                continue
            press, nominal, equal = [], [], []
            for place in places:
                press.append(summary(theirs[place])[0])
                nominal.append(summary(ours[place])[0])
                equal.append(summary(fewer.get(place, ours[place]))[0])
            lost = sum(b < a - 1e-9 for a, b in zip(press, equal, strict=True))
            rows.append([
                method, "aware" if aware else "unaware",
                *(f"{100 * statistics.mean(v):.1f}" for v in (press, nominal, equal)),
                f"{100 * (statistics.mean(equal) - statistics.mean(press)):+.1f}", f"{lost} of {len(places)}",
            ])  # fmt: skip
    columns = ["method", "question", "kvpress", "hf_ext, same ratio", "hf_ext, equal bytes", "difference", "cells lost"]
    return columns, rows


def best_rows(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Return, for each number of bytes that a budget allows, the best method of each kind over all tasks."""
    budgets = sorted({c["budget"] for c in cells if c["budget"] != 1.0}, reverse=True)
    rows = []
    for aware in (False, True):
        for limit in budgets:
            row = ["aware" if aware else "unaware", f"{limit + ALLOWED:g}"]
            for kind in ("transformers", "kvpress", "hf_ext"):
                row.append(_best(cells, kind, aware, limit))
            rows.append(row)
    return ["question", "share of bytes, up to", "transformers", "kvpress", "hf_ext"], rows


def _best(cells: Sequence[Cell], kind: str, aware: bool, limit: float) -> str:
    scores = []
    for (own, method), places in groups(cells).items():
        if own != kind:
            continue
        tasks: dict[str, float] = {}
        for (task, asked, _), members in places.items():
            accuracy, _, _, share = summary(members)
            if asked == aware and share <= limit + ALLOWED:
                tasks[task] = max(tasks.get(task, 0.0), accuracy)
        if tasks and len(tasks) == len({c["task"] for c in cells if c["aware"] == aware}):
            scores.append((statistics.mean(tasks.values()), method))
    if not scores:
        return "-"
    score, method = max(scores)
    return f"{method} {100 * score:.0f}"


def padded_rows(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of the comparison of batch 1 with padded batches."""
    found: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell["method"], cell["kind"]), []).append(cell)
    rows = []
    for (method, kind), members in found.items():
        name = f"{method} ({kind})" if kind != "transformers" else method
        problems = [cell["problem"] for cell in members if "problem" in cell]
        if problems:
            rows.append([name, problems[0], "", ""])
            continue
        rows.append(
            [name, *(f"{100 * statistics.mean(c[key] for c in members):.0f}" for key in ("alone", "padded", "same"))]
        )
    return ["method", "batch 1", "padded batch of 4", "same answer"], rows


def speed_rows(rows: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of times."""
    found = []
    for row in rows:
        if "problem" in row:
            found.append([row["method"], row["problem"], "", "", ""])
            continue
        cells = [row["method"]]
        for name in ("prefill", "decode"):
            low, high = row[f"{name}_spread"]
            cells += [f"{row[f'{name}_ms']:.1f}", f"{row[f'{name}_ratio']:.3f} [{low:.3f}, {high:.3f}]"]
        found.append(cells)
    return ["method", "prefill ms", "to full cache", "decode ms/token", "to full cache"], found


def resident_rows(rows: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of bytes held over bytes allowed."""
    found = []
    for row in rows:
        name = f"{row['method']}, {row['budget']:g}"
        if "problem" in row:
            found.append([name, row["problem"], ""])
        else:
            found.append([name, f"{row['after_prefill']:.3f}", f"{row['after_decoding']:.3f}"])
    return ["method, budget", "after the prompt", "after decoding"], found


def peak_rows(rows: Sequence[Cell], key: str) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of peaks by length."""
    lengths = sorted({row["length"] for row in rows})
    found: dict[str, dict[int, str]] = {}
    for row in rows:
        name = f"{row['method']}, {'chunks of ' + str(row['chunk']) if row['chunk'] else 'at once'}"
        found.setdefault(name, {})[row["length"]] = "-" if row[key] is None else f"{row[key]:.0f}"
    columns = ["cache", *(f"{length} tokens" for length in lengths)]
    return columns, [[name, *(cells.get(length, "-") for length in lengths)] for name, cells in found.items()]


def sections(record: Cell) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Yield title, columns and rows of every table of a record."""
    quality = record.get("quality")
    if quality:
        cells = quality["cells"]
        yield "Best method within a number of bytes, mean over tasks", *best_rows(cells)
        if shared_rows(cells)[1]:
            yield "Methods that kvpress has, too", *shared_rows(cells)
        for task in dict.fromkeys(cell["task"] for cell in cells):
            for aware in (False, True):
                columns, rows = quality_rows(cells, task, aware)
                if rows:
                    yield f"Accuracy: {task}, {'aware' if aware else 'unaware'}", columns, rows
        yield "Batch 1 and padded batches", *padded_rows(quality["padded"])
        left_out = {(c["method"], c["kind"], c["problem"]) for c in cells if "problem" in c}
        if left_out:
            rows = [[f"{method} ({kind})", problem] for method, kind, problem in sorted(left_out)]
            yield "Not measured", ["method", "why"], rows
    if record.get("speed"):
        yield f"Speed at {record['speed']['length']} tokens, ratio 0.5", *speed_rows(record["speed"]["rows"])
    memory = record.get("memory")
    if memory:
        yield "Bytes held over the keys and values that the budget allows", *resident_rows(memory["resident"])
        yield "Growth of resident memory while a prompt is read, MiB", *peak_rows(memory["curves"], "rss_mib")
        if any(row["device_mib"] is not None for row in memory["curves"]):
            yield "Growth of GPU memory while a prompt is read, MiB", *peak_rows(memory["curves"], "device_mib")


def markdown(record: Cell, plots: Sequence[str] = ()) -> str:
    """Return a record as a page.

    Args:
        record: see `docs/cache-benchmarks.md`.
        plots: names of files beside the page.
    """
    hardware, versions = record["hardware"], dict(record["versions"])
    for name, version in record.get("quality", {}).get("versions", {}).items():
        versions[f"{name} beside kvpress" if name != "kvpress" else name] = version
    parts = [
        "# Compressed caches",
        f"{hardware['cpu']}, {hardware['cores']} cores, {record['threads']} threads; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f"; {record['date']}.",
        f"```\n{record['command']}\n```",
        LEGEND,
        *(f"![{name}]({name})" for name in plots),
    ]
    for title, columns, rows in sections(record):
        parts += [f"## {title}", table(columns, rows)]
    return "\n\n".join(parts) + "\n"


def plot(record: Cell, folder: Path) -> list[str]:
    """Draw accuracy against bytes, and peaks against length; return the names of the files.

    Raises:
        ImportError: matplotlib is not installed; `pip install hf_ext[plots]`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = []
    if record.get("quality"):
        cells = record["quality"]["cells"]
        for aware in (False, True):
            tasks = list(dict.fromkeys(cell["task"] for cell in cells if cell["aware"] == aware))
            if not tasks:
                continue
            figure, axes = pyplot.subplots(1, len(tasks), figsize=(5 * len(tasks), 5), sharey=True, squeeze=False)
            for axis, task in zip(axes[0], tasks, strict=True):
                _draw(axis, cells, task, aware)
            axes[0][0].set_ylabel("answer tokens right")
            handles, labels = axes[0][0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="lower center", ncols=6, fontsize="small")
            figure.subplots_adjust(bottom=0.32)
            names.append(f"cache_{'aware' if aware else 'unaware'}.png")
            figure.savefig(folder / names[-1], dpi=80)
            pyplot.close(figure)
    if record.get("memory"):
        figure, axis = pyplot.subplots(figsize=(7, 5))
        peaks = record["memory"]["curves"]
        for method, chunk in dict.fromkeys((row["method"], row["chunk"]) for row in peaks):
            points = [(r["length"], r["rss_mib"]) for r in peaks if (r["method"], r["chunk"]) == (method, chunk)]
            if all(peak is not None for _, peak in points):
                axis.plot(*zip(*points, strict=True), marker="o", label=f"{method}{'' if chunk else ', at once'}")
        axis.set_xlabel("tokens")
        axis.set_ylabel("growth of resident memory, MiB")
        axis.legend(fontsize="small")
        names.append("cache_memory.png")
        figure.savefig(folder / names[-1], dpi=80)
        pyplot.close(figure)
    return names


def _draw(axis: Any, cells: Sequence[Cell], task: str, aware: bool) -> None:
    styles = {"hf_ext": "-", "kvpress": ":", "transformers": "--"}
    for (kind, method), places in groups(cells).items():
        if method.endswith(", equal bytes"):
            continue
        points = [summary(members) for (own, asked, _), members in places.items() if (own, asked) == (task, aware)]
        points.sort(key=lambda point: point[3])
        if points:
            means, shares = [p[0] for p in points], [p[3] for p in points]
            bars = [[p[0] - p[1] for p in points], [p[2] - p[0] for p in points]]
            label = f"{method} ({kind})" if kind == "kvpress" else method
            axis.errorbar(shares, means, yerr=bars, linestyle=styles[kind], marker=".", capsize=2, label=label)
    axis.set_title(task)
    axis.set_xlabel("bytes held, share of a full cache")
