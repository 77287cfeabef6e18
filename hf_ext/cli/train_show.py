"""What `hf-ext train` shows: a progress bar while it trains, and the curves afterwards."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from hf_ext.cli.output import CliError, print_report

#: What the Trainer logs beside the losses and the objectives' own terms.
BOOKKEEPING = frozenset(
    {"epoch", "step", "grad_norm", "learning_rate", "total_flos", "train_loss", "num_input_tokens_seen"}
)
LOSSES = {"loss": "objective", "clean_loss": "next-token loss, training", "eval_loss": "next-token loss, evaluation"}


class Diverged(TrainerCallback):
    """Stops a training whose loss is no number any more."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Look at the losses."""
        for name in LOSSES:
            value = (logs or {}).get(name, 0.0)
            if not math.isfinite(value):
                raise CliError(f"{name} is {value} at step {state.global_step}: try a smaller --learning-rate")


class Silent(TrainerCallback):
    """Shows nothing."""

    def close(self) -> None:
        """Do nothing: nothing was opened."""


class Progress(TrainerCallback):
    """A bar on a terminal, a line a log elsewhere; on the standard error stream, from the first process only."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._said = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the bar."""
        if not state.is_world_process_zero or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
        self._bar.start()
        self._task = self._bar.add_task("training", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance."""
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Say the losses."""
        if not state.is_world_process_zero:
            return
        known = {name: value for name, value in (logs or {}).items() if name in LOSSES}
        if not known:
            return
        text = ", ".join(f"{name} {value:.4g}" for name, value in known.items())
        if self._bar is not None:
            self._bar.update(self._task, description=text)
        else:
            print_report(f"step {state.global_step}/{state.max_steps}: {text}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the bar away."""
        self.close()

    def close(self) -> None:
        """Give the terminal back, also where training raised."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def can_draw(wanted: bool | None) -> bool:
    """Tell whether curves are to be drawn.

    Args:
        wanted: as the user said; None draws them where matplotlib is installed.

    Raises:
        CliError: they are wanted, but matplotlib is missing.
    """
    from importlib.util import find_spec

    if wanted and find_spec("matplotlib") is None:
        raise CliError("--curves needs matplotlib: pip install 'hf_ext[plots]'")
    return wanted is not False and find_spec("matplotlib") is not None


def series(history: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """Return what was logged over the steps, by name: the losses, then the objectives' own terms.

    Example:
        >>> series([{"step": 5, "loss": 2.0, "masked_share": 0.15, "epoch": 0.1}])
        {'loss': ([5], [2.0]), 'masked_share': ([5], [0.15])}
    """
    found: dict[str, tuple[list[int], list[float]]] = {}
    for entry in history:
        for name, value in entry.items():
            told = name in LOSSES or not (name in BOOKKEEPING or name.startswith(("eval_", "train_")))
            if told and isinstance(value, (int, float)):
                steps, values = found.setdefault(name, ([], []))
                steps.append(entry["step"])
                values.append(value)
    order = list(LOSSES)
    return dict(sorted(found.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def draw(history: Sequence[Mapping[str, Any]], title: str, path: Path) -> Path:
    """Draw the losses, and beside them the objectives' own terms, into a PNG file.

    Args:
        history: the Trainer's `state.log_history`.
        title: over the picture.
        path: of the file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = series(history)
    terms = [name for name in found if name not in LOSSES]
    figure = Figure(figsize=(11 if terms else 6.5, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if terms else 1, squeeze=False)[0]
    for name in found:
        side = axes[1] if name in terms else axes[0]
        side.plot(*found[name], label=LOSSES.get(name, name), marker="." if len(found[name][0]) < 30 else "")
    for side, label in zip(axes, ("nats a token", "terms of the objective"), strict=False):
        side.set(xlabel="optimizer step", ylabel=label)
        side.grid(alpha=0.3)
        side.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    return path
