"""The demonstration's report: Markdown with tables, texts and plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_ext.demo.prompts import Prompt


def check(folder: Path) -> None:
    """Make sure that a report can be written into `folder`.

    Raises:
        ValueError: matplotlib is missing, or the folder cannot be made.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("the report's plots need matplotlib: pip install 'hf_ext[plots]'") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write a report into {folder}: {error.strerror}") from None


def write(folder: Path, chosen: list[Prompt], figures: dict[str, Any]) -> Path:
    """Write `report.md` and its plots into `folder` and return the path of the former."""
    _plot_decoding(folder / "decoding.png", figures["decoding"])
    _plot_training(folder / "training.png", figures["swan"])
    names = ["tokens_per_second", "rep_4", "distinct_2", "diversity", "perplexity"]
    losses = figures["swan"]["held_out_loss"]
    lines = [
        "# hf_ext demonstration",
        "",
        f"{len(chosen)} functions of standard-library modules that the models were not trained on, one batch, "
        f"{figures['threads']} threads, {figures['seconds']} s in all.",
        "",
        "| decoding | " + " | ".join(names) + " |",
        "|---|" + "---:|" * len(names),
        *(f"| {row['name']} | " + " | ".join(f"{row[n]:.4g}" for n in names) + " |" for row in figures["decoding"]),
        "",
        "![diversity against perplexity](decoding.png)",
        "",
        "## SWAN-GPT, trained with MEAP",
        "",
        f"Layers: {', '.join(figures['swan']['layer_types'])}. Held-out loss in nats per token: Llama "
        f"{losses['llama']}, converted {losses['converted']}, after {figures['swan']['steps']} steps "
        f"{losses['fine_tuned']}. A second process without hf_ext continued with "
        f"{'identical' if figures['swan']['identical'] else 'OTHER'} tokens.",
        "",
        "![training loss](training.png)",
        "",
        "## Texts",
    ]
    for index, prompt in enumerate(chosen):
        lines += ["", f"### `{prompt.module}`: `{prompt.function}`", "", *_code(prompt.text)]
        for row in figures["decoding"]:
            lines += ["", f"**{row['name']}**", "", *_code(row["texts"][index])]
        lines += ["", "**what the file says**", "", *_code(prompt.reference)]
    target = folder / "report.md"
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


def _code(text: str) -> list[str]:
    # Four backticks: a continuation may hold three.
    return ["````python", text.strip("\n"), "````"]


def _figure(title: str, x: str, y: str) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a screen and without pyplot's global state
    axes = figure.add_subplot(title=title, xlabel=x, ylabel=y)
    return figure, axes


def _plot_decoding(path: Path, rows: list[dict[str, Any]]) -> None:
    figure, axes = _figure("Diversity against perplexity", "perplexity under the target", "diversity")
    for row, marker in zip(rows, "osD^", strict=True):  # a marker each, as greedy and cautious often lie close
        axes.scatter(row["perplexity"], row["diversity"], marker=marker, alpha=0.8, label=row["name"])
    axes.legend()
    figure.savefig(path, dpi=120)


def _plot_training(path: Path, swan: dict[str, Any]) -> None:
    figure, axes = _figure("SWAN-GPT fine-tuned with MEAP", "optimizer step", "loss (nats per token)")
    axes.plot([entry["step"] for entry in swan["log"]], [entry["loss"] for entry in swan["log"]], marker="o")
    axes.axhline(swan["held_out_loss"]["llama"], linestyle="--", label="held-out, Llama before")
    axes.axhline(swan["held_out_loss"]["fine_tuned"], linestyle=":", label="held-out, after")
    axes.legend()
    figure.savefig(path, dpi=120)
