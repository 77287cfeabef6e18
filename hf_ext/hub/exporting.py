"""`export`: a plugin as a complete Hub repository in a folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from hf_ext import plugins
from hf_ext.hub.errors import ExportError
from hf_ext.plugins import Plugin

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: What to do with a plugin of a kind that is no repository.
INSTEAD = {
    "objective": "an objective trains a stock architecture, so the trained checkpoint is a stock checkpoint: "
    "push that with trainer.push_to_hub()",
    "cache": "a cache is an argument of generate and changes no checkpoint: whoever uses it installs the package "
    "that ships it and passes past_key_values=...",
    "attention": "an attention backend is chosen at load time and changes no checkpoint: whoever uses it installs "
    "the package that ships it and passes attn_implementation=...",
}


def export(
    name: str,
    directory: str | Path,
    *,
    model: PreTrainedModel | str | Path | None = None,
    overwrite: bool = False,
    check: bool = True,
    repo_id: str | None = None,
) -> Path:
    """Write a plugin as a Hub repository that works where the plugin's package is not installed.

    The repository is written beside `directory` and moved there when it is complete, so that a
    failure leaves nothing behind.

    Args:
        name: a plugin of the kind strategy or model.
        directory: where to write; must not exist or be empty.
        model: for an architecture, the model or a folder with its checkpoint; without it a small
            model with fresh weights is written.
        overwrite: replace an earlier export in `directory`, with everything that is in it.
        check: load the repository in a fresh process that cannot import the plugin's package
            (takes some seconds).
        repo_id: what the card's example calls the repository, `"user/<name>"` by default.

    Returns:
        The folder.

    Raises:
        ExportError: the plugin is of another kind, its code cannot be written as remote code, the
            folder is not empty, or the result does not load.
        hf_ext.plugins.PluginError: no such plugin, or it is broken.

    Example:
        >>> folder = export("contrastive-search", "exported", check=False)
        >>> (folder / "custom_generate" / "generate.py").is_file()
        True
    """
    plugin = plugins.get(name)
    target = Path(directory).absolute()
    if plugin.kind not in ("strategy", "model"):
        reason = INSTEAD.get(plugin.kind, "only strategies and models are repositories")
        raise ExportError(f"cannot export {plugin.name}, a plugin of the kind {plugin.kind}: {reason}")
    if plugin.kind == "strategy" and model is not None:
        raise ExportError(f"cannot export {plugin.name} with a model: a strategy's repository holds code only")
    _refuse_to_lose(target, overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
            # Named as the target, because transformers names the modules it loads after their folder.
            draft = Path(scratch) / target.name
            draft.mkdir()
            write(plugin, draft, repo_id or f"user/{plugin.name}", model)
            if check:
                check_loads(plugin, draft)
            _move(draft, target, Path(scratch) / "replaced")
    except OSError as error:
        raise ExportError(f"cannot write {target}: {error.strerror or error}") from error
    return target


def write(plugin: Plugin, folder: Path, repo_id: str, model: PreTrainedModel | str | Path | None = None) -> None:
    """Write the repository of a strategy or model plugin into the empty `folder`.

    Raises:
        ExportError: it cannot be written as remote code.
    """
    from hf_ext.hub.model_repo import write_model
    from hf_ext.hub.strategy_repo import write_strategy

    if plugin.kind == "strategy":
        write_strategy(plugin, folder, repo_id)
    else:
        write_model(plugin, folder, repo_id, model)


def check_loads(plugin: Plugin, folder: Path) -> None:
    """Load a repository in a fresh process that cannot import the package of `plugin` or hf_ext.

    Raises:
        ExportError: it does not load, with the reason.
    """
    from hf_ext.hub.code import packages_of

    script = Path(__file__).with_name("isolated_load.py")
    with tempfile.TemporaryDirectory(prefix="hf-modules-") as modules:
        done = subprocess.run(
            [sys.executable, "-P", str(script), plugin.kind, str(folder), ",".join(packages_of(plugin))],
            env=os.environ | {"HF_MODULES_CACHE": modules, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise ExportError(f"cannot export {plugin.name}: without its package the repository does not load: {reason}")


def _refuse_to_lose(target: Path, overwrite: bool) -> None:
    """Refuse to write over files, other than those of an earlier export if `overwrite`."""
    if target.exists() and not target.is_dir():
        raise ExportError(f"cannot write {target}: it is a file; name a folder")
    if target == Path.cwd():  # it is replaced as a whole, and a shell that stands in it would see the old one
        raise ExportError(f"cannot write {target}: it is the current folder; name one inside it")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise ExportError(
            f"cannot write {target}: the folder is not empty; name a new one, or pass overwrite=True (--overwrite)"
        )
    # The tags that every export has; a config.json alone may be that of a checkpoint that somebody trained.
    card = target / "README.md"
    ours = card.is_file() and re.search(r"^- custom_(generate|code)$", card.read_text("utf-8", "replace"), re.MULTILINE)
    if not ours or (target / ".git").exists():
        what = "is a git checkout" if (target / ".git").exists() else "holds something other than an earlier export"
        raise ExportError(f"cannot overwrite {target}: the folder {what}; name another one")


def _move(draft: Path, target: Path, aside: Path) -> None:
    """Put `draft` in the place of `target`; what was there goes to `aside`, and back if this fails."""
    if not target.exists():
        draft.rename(target)
        return
    target.rename(aside)
    try:
        draft.rename(target)
    except OSError:
        aside.rename(target)
        raise
