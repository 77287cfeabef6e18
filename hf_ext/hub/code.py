"""Writing a plugin's code where transformers' loader of remote code finds all of it."""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement

from hf_ext.hub.errors import ExportError
from hf_ext.hub.flatten import flatten
from hf_ext.plugins import Plugin


def packages_of(plugin: Plugin) -> list[str]:
    """Return the top-level packages whose code goes into a plugin's repository: its own, and the host.

    Example:
        >>> packages_of(Plugin("x", "strategy", "", target="their_package.module:X"))
        ['their_package', 'hf_ext']
    """
    own = plugin.target.split(".")[0].partition(":")[0]
    return list(dict.fromkeys([own, "hf_ext"]))


def write_code(plugin: Plugin, modules: Sequence[str], folder: Path, reserved: Collection[str] = ()) -> dict[str, str]:
    """Write `modules` and all they need into `folder`, one file each.

    Args:
        plugin: whose code it is.
        modules: dotted names.
        folder: where to write.
        reserved: file names without `.py` that are taken.

    Returns:
        The name of each module there.

    Raises:
        ExportError: an import cannot be expressed, or transformers' loader would read a file otherwise than Python.
    """
    flat = flatten(modules, packages_of(plugin), reserved)
    for name, text in flat.files.items():
        path = folder / name
        path.write_text(text, encoding="utf-8")
        check_as_loader_reads(path)
    return flat.names


def check_as_loader_reads(path: Path) -> None:
    """Check that transformers' loader finds the imports that Python finds.

    The loader searches the text with a regular expression, docstrings and comments included, and
    would fail for want of a file that a docstring mentions.

    Raises:
        ExportError: the two differ.
    """
    from hf_ext import adapter

    tree = ast.parse(path.read_text(encoding="utf-8"))
    real = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1}
    read, _ = adapter.remote_code_imports(path)
    if extra := read - real:
        example = sorted(extra)[0]
        raise ExportError(
            f"cannot export {path.name}: a docstring or a string in it has a line that starts with "
            f"`from .{example} import`, which transformers takes for an import; word it differently"
        )
    if lost := {str(name) for name in real - read}:
        raise ExportError(
            f"cannot export {path.name}: transformers overlooks its import of {', '.join(sorted(lost))}; "
            "put it at the start of a line of its own"
        )


def requirements(folder: Path, distribution_of: str) -> list[str]:
    """Return the lines of `requirements.txt` for the code in `folder`.

    Args:
        folder: the code.
        distribution_of: the package whose installed metadata says from which version on.

    Returns:
        One line a distribution, with the lowest version where the metadata has one.
    """
    from hf_ext import adapter

    imported: set[str] = set()
    for path in folder.glob("*.py"):
        imported |= adapter.remote_code_imports(path)[1]
    distributions = _distributions()
    bounds: dict[str, str] = {}
    for package in dict.fromkeys([distribution_of, "hf_ext"]):
        for text in _requirements_of((distributions.get(package) or [package])[0]):
            requirement = Requirement(text)
            lowest = [f"{item.operator}{item.version}" for item in requirement.specifier if item.operator == ">="]
            bounds.setdefault(requirement.name.lower(), "".join(lowest[:1]))
    names = {(distributions.get(name) or [name])[0] for name in imported - set(sys.stdlib_module_names)}
    return sorted(f"{name}{bounds.get(name.lower(), '')}" for name in names)


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    """Return the distributions that ship each top-level package; reading them takes a while."""
    return packages_distributions()


def _requirements_of(distribution: str) -> list[str]:
    try:
        return requires(distribution) or []
    except PackageNotFoundError:  # code that was never installed, only put on the path, says nothing about versions
        return []
