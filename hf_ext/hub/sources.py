"""Where the code of a name lives: modules as files, and what packages re-export."""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from hf_ext.hub.errors import ExportError


@dataclass(frozen=True)
class Module:
    """The source of a module.

    Args:
        name: dotted name.
        path: its file.
        package: whether it is a package (the file is `__init__.py`).
    """

    name: str
    path: Path
    package: bool

    @cached_property
    def text(self) -> str:
        """The source text."""
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree."""
        return ast.parse(self.text, filename=str(self.path))

    def absolute(self, module: str | None, level: int) -> str:
        """Return the full name of what `from <level dots><module> import ...` refers to here.

        Example:
            >>> Module("a.b.c", Path("c.py"), package=False).absolute("d", 2)
            'a.d'
        """
        if level == 0:
            return module or ""
        parts = self.name.split(".")
        keep = len(parts) - level + self.package
        return ".".join([*parts[:keep], *([module] if module else [])])


def find_module(name: str) -> Module | None:
    """Return the module called `name`, or None if there is none that has a source file.

    Example:
        >>> find_module("json.decoder").path.name, find_module("json.no_such")
        ('decoder.py', None)
    """
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return Module(name, Path(spec.origin), package=spec.submodule_search_locations is not None)


def definition(package: Module, name: str) -> tuple[Module, str | None]:
    """Find what `from package import name` means.

    Args:
        package: the package.
        name: what is imported from it.

    Returns:
        The module that defines the name and the name there; `None` for the name means that the
        module itself is imported.

    Raises:
        ExportError: the package defines the name itself, or does not know it.

    Example:
        >>> module, name = definition(find_module("json"), "JSONDecoder")
        >>> module.name, name
        ('json.decoder', 'JSONDecoder')
    """
    source = _reexports(package).get(name)
    if source is not None:
        module, attribute = find_module(source[0]), source[1]
        if module is None:
            raise ExportError(f"{package.path}: {name} comes from {source[0]}, which has no source file")
        return definition(module, attribute) if module.package else (module, attribute)
    submodule = find_module(f"{package.name}.{name}")
    if submodule is not None and not submodule.package:
        return submodule, None
    what = "is a package" if submodule is not None else f"is not defined in a module of {package.name}"
    raise ExportError(
        f"cannot export `from {package.name} import {name}`: {name} {what}; only modules can be copied into a Hub "
        f"repository, so import it from the module that defines it (`from {package.name}.module import {name}`)"
    )


def _reexports(package: Module) -> dict[str, tuple[str, str]]:
    """Map each name that a package passes on to the module it is imported from and its name there."""
    found: dict[str, tuple[str, str]] = {}
    for node in ast.walk(package.tree):
        if isinstance(node, ast.ImportFrom):
            origin = package.absolute(node.module, node.level)
            # Only names of the package's own modules; the rest of an __init__ is its own business.
            if origin.startswith(f"{package.name}."):
                found.update({alias.asname or alias.name: (origin, alias.name) for alias in node.names})
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "lazy_attributes"
            and len(node.args) == 2
            and isinstance(node.args[1], ast.Dict)
        ):
            where: dict[str, str] = ast.literal_eval(node.args[1])
            found.update({name: (f"{package.name}.{module}", name) for name, module in where.items()})
    return found
