"""What an objective says about itself where the trained model goes: a file, tags and a section of the card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: Written beside the checkpoints when training ends, and pushed with them.
FILE = "training_objective.json"
_BEGIN, _END = "<!-- training objective -->", "<!-- /training objective -->"


def write_description(description: Mapping[str, Any], folder: str | Path) -> Path:
    """Write an objective's description into `training_objective.json`, beside those of others.

    Args:
        description: `Objective.describe()`.
        folder: the Trainer's output folder.

    Returns:
        The file. It holds a list, an entry an objective; an entry of the same name is replaced.
    """
    path = Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    kept = [entry for entry in known if entry["objective"] != description["objective"]]
    path.write_text(json.dumps([*kept, description], indent=2, default=str) + "\n", encoding="utf-8")
    return path


def tag(model: Any, name: str) -> None:
    """Add the objective's tags to those that the Trainer puts on the model's card."""
    if hasattr(model, "add_model_tags"):
        model.add_model_tags([name, "hf_ext"])


def add_section(
    folder: str | Path, descriptions: Sequence[Mapping[str, Any]], history: Sequence[Mapping[str, Any]]
) -> None:
    """Add or renew the section on training objectives in the model card of a folder.

    Args:
        folder: holds the README.md that the Trainer wrote; without one, nothing is done.
        descriptions: `Objective.describe()` of each.
        history: the Trainer's `state.log_history`, for the clean loss.
    """
    path = Path(folder) / "README.md"
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    if _BEGIN in text:
        text = text[: text.index(_BEGIN)].rstrip() + "\n" + text[text.index(_END) + len(_END) :]
    path.write_text(f"{text.rstrip()}\n\n{section(descriptions, history)}\n", encoding="utf-8")


def section(descriptions: Sequence[Mapping[str, Any]], history: Sequence[Mapping[str, Any]]) -> str:
    """Write the section: each objective with its paper and options, and how the clean loss went.

    Example:
        >>> text = section([{"objective": "meap", "paper": "A paper", "options": {"mask_ratio": 0.15}}], [])
        >>> print(text.splitlines()[2])
        ## Training objective
    """
    lines = [_BEGIN, "", "## Training objective", ""]
    for description in descriptions:
        paper = f": {description['paper']}" if description.get("paper") else ""
        lines.append(f"`{description['objective']}`{paper}")
        options = [f"- {name}: `{value!r}`" for name, value in description["options"].items() if value is not None]
        lines += ["", *options, ""]
    clean = [(entry["step"], entry["clean_loss"]) for entry in history if "clean_loss" in entry]
    if clean:
        (first, before), (last, after) = clean[0], clean[-1]
        lines += [
            f"Next-token loss on unchanged batches: {before:.4f} at step {first}, {after:.4f} at step {last}.",
            "",
        ]
    lines += ["The checkpoint is a stock one and loads without the package that trained it.", "", _END]
    return "\n".join(lines)
