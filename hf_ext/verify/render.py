"""Turn the record of a claim check run into the figures of a model card.

A card's figures are a function of its record alone, so a test can tell a card whose figures
were typed by hand from one whose figures were measured.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult

BEGIN = "<!-- claims:begin, written by `hf-ext verify --write` from the record of the run; do not edit -->"
END = "<!-- claims:end -->"
BLOCK = re.compile(rf"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
OPTIONS_BEGIN = "<!-- options:begin, written from the class's own signature and docstring; do not edit -->"
OPTIONS_END = "<!-- options:end -->"
OPTIONS_BLOCK = re.compile(rf"{re.escape(OPTIONS_BEGIN)}.*?{re.escape(OPTIONS_END)}", re.DOTALL)

_FIGURE = re.compile(r"(?<![\w.])\d+\.\d+(?![\w.]*\d)|(?<![\w.])\d+(?=\s?(?:%|×|x\b|times\b|percent))")
_NOT_PROSE = (
    re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE),
    re.compile(r"`[^`\n]*`"),
    re.compile(r"https?://\S+|arXiv:\S+", re.IGNORECASE),
    re.compile(r"<!-- (\w+):begin.*?<!-- \1:end -->", re.DOTALL),
)


def figure(value: float) -> str:
    """Write a number the way cards show it: four significant digits, whole numbers in full.

    Example:
        >>> figure(0.123456), figure(3), figure(12345.0), figure(-1.5e-7)
        ('0.1235', '3', '12345', '-1.5e-07')
    """
    return str(int(value)) if float(value).is_integer() else f"{value:.4g}"


def block(record: Mapping[str, Any]) -> str:
    """Return the marked part of the card: the table of claims, what is behind each figure, where it was measured.

    Args:
        record: what `hf_ext.verify.write` keeps as `results/<name>.json`.
    """
    rows = [
        "| Claim | Measured | Reproduced when, over the whole spread | Figure | Verdict |",
        "|---|---|---|---|---|",
        *(_row(item) for item in record["claims"]),
    ]
    behind = [line for item in record["claims"] if (line := _behind(item))]
    parts = ["\n".join(rows), *(["Behind the figures:\n\n" + "\n".join(behind)] if behind else []), _stamp(record)]
    return "\n\n".join([BEGIN, *parts, END])


def options_block(options: Sequence[Mapping[str, str]]) -> str:
    """Return the marked table of a plugin's options.

    Args:
        options: each with `name`, `type`, `default` and `help`.
    """
    rows = [
        "| Option | Type | Default | |",
        "|---|---|---|---|",
        *(f"| `{o['name']}` | `{_text(o['type'])}` | `{_text(o['default'])}` | {_text(o['help'])} |" for o in options),
    ]
    return "\n\n".join([OPTIONS_BEGIN, "\n".join(rows) if options else "None.", OPTIONS_END])


def eval_results(record: Mapping[str, Any]) -> list[EvalResult]:
    """Return the record's figures as the Hub's evaluation results, for the card's `model-index`."""
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            dataset_type=re.sub(r"[^a-z0-9]+", "-", item["data"].lower()).strip("-"),
            dataset_name=item["data"],
            metric_type=item["claim"],
            metric_name=_text(item["measures"]) + (f" ({item['unit']})" if item["unit"] else ""),
            metric_value=float(f"{item['measurement']['value']:.6g}"),
        )
        for item in record["claims"]
        if item["measurement"] is not None
    ]


def stray_figures(body: str, record: Mapping[str, Any]) -> list[str]:
    """Return the measured-looking numbers in a card's prose that its record did not produce.

    Decimal numbers, percentages and factors count; code, links and generated blocks do not.

    Example:
        >>> stray_figures("It is 3.7 times better on `python3.11`.", {"claims": []})
        ['3.7']
    """
    known = {number for item in record["claims"] for number in _FIGURE.findall(f"{_row(item)} {_behind(item)}")}
    known |= {figure(item["measurement"]["value"]) for item in record["claims"] if item["measurement"]}
    for pattern in _NOT_PROSE:
        body = pattern.sub(" ", body)
    return [number for number in _FIGURE.findall(body) if number not in known]


def _row(item: Mapping[str, Any]) -> str:
    if item["measurement"] is None:
        shown = f"error: {item['error']}"
    else:
        shown = figure(item["measurement"]["value"]) + (f" {item['unit']}" if item["unit"] else "")
        if item["measurement"]["spread"]:
            low, high = item["measurement"]["spread"]
            shown += f" [{figure(low)}, {figure(high)}]"
    condition = f"`{item['threshold']}`" if item["threshold"] else "(reported only)"
    verdict = item["status"] if item["status"] in ("reproduced", "measured") else f"**{item['status']}**"
    cells = (f"`{item['claim']}`: {item['paper']}", item["measures"], condition, shown, verdict)
    return "| " + " | ".join(_text(cell) for cell in cells) + " |"


def _behind(item: Mapping[str, Any]) -> str:
    """One line with everything else that the check measured, or nothing."""
    if item["measurement"] is None:
        return ""
    measurement = item["measurement"]
    facts = [f"{key} {_value(value)}" for key, value in measurement["details"].items()]
    if measurement["spread"]:
        facts.append(f"in brackets: {measurement['spread_of']}")
    if measurement["seeds"]:
        facts.append(f"seeds {_value(measurement['seeds'])}")
    return f"- `{item['claim']}`, on {item['data']}: {_text('; '.join(facts))}" if facts else ""


def _value(value: object) -> str:
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return str(value)
    if isinstance(value, int | float):
        return figure(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_value(item)}" for key, item in value.items()) + "}"
    return ", ".join(_value(item) for item in value)  # type: ignore[attr-defined]


def _stamp(record: Mapping[str, Any]) -> str:
    machine, packages = record["hardware"], record["versions"]
    where = f"{machine['cpu']} ({machine['machine']}), {machine['cores']} cores, {machine['threads']} threads"
    if machine["accelerator"]:
        where += f", {machine['accelerator']}"
    with_what = ", ".join(f"{name} {number}" for name, number in packages.items())
    return f"Measured on {record['date']} with `{record['command']}` on {where}; {with_what}."


def _text(text: str) -> str:
    """Make `text` fit a table cell."""
    return " ".join(text.split()).replace("|", "\\|")
