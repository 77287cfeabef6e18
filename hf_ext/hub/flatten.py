"""Code of a package as flat files that transformers' loader of remote code can copy and import.

That loader finds relative imports with a regular expression and knows one form only:
`from .module import name`, with the file beside the importing one. So every module that an entry
module needs from the packages to be copied becomes a file of its own name, all in one folder, and
every import among them is rewritten to that form. Imports of other packages stay as they are.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from hf_ext.hub.errors import ExportError
from hf_ext.hub.sources import Module, definition, find_module


@dataclass(frozen=True)
class Flat:
    """The result of `flatten`.

    Args:
        files: text of each file by its name.
        names: for each copied module, the name it goes by in the flat folder.
    """

    files: dict[str, str]
    names: dict[str, str]


def flatten(entries: Sequence[str], packages: Collection[str], reserved: Collection[str] = ()) -> Flat:
    """Copy modules and everything they need from `packages` into flat files.

    Files keep the module's last name; where two modules would collide, the later one found gets
    its package's name in front. A file whose imports need no change is copied unchanged.

    Args:
        entries: dotted names of the modules to start from.
        packages: top-level packages whose code is copied; all others are dependencies.
        reserved: file names without `.py` that are taken.

    Returns:
        The files and the names.

    Raises:
        ExportError: an import that cannot be expressed in a flat folder.

    Example:
        >>> flat = flatten(["hf_ext.generation.report"], ["hf_ext"])
        >>> list(flat.files), flat.names
        (['report.py'], {'hf_ext.generation.report': 'report'})
    """
    modules: dict[str, Module] = {}
    waiting = list(entries)
    while waiting:
        name = waiting.pop(0)
        if name in modules:
            continue
        module = find_module(name)
        if module is None or module.package:
            raise ExportError(f"cannot export {name}: it is not a module with a source file")
        modules[name] = module
        for item in _Imports(module, packages).found:
            waiting += [target.name for _, target, _ in item.targets]
    names = _flat_names(modules, reserved)
    return Flat({f"{names[name]}.py": _rewrite(module, packages, names) for name, module in modules.items()}, names)


def _flat_names(modules: Iterable[str], reserved: Collection[str]) -> dict[str, str]:
    """Give each module a name of its own.

    Example:
        >>> _flat_names(["a.run", "a.b.run", "a.c.generate"], ["generate"])
        {'a.run': 'run', 'a.b.run': 'b_run', 'a.c.generate': 'c_generate'}
    """
    names: dict[str, str] = {}
    for module in modules:
        parts = module.split(".")
        taken = {*names.values(), *reserved}
        options = ("_".join(parts[start:]) for start in range(len(parts) - 1, -1, -1))
        names[module] = next(option for option in options if option not in taken)
    return names


@dataclass(frozen=True)
class _Import:
    """An import statement that has to change.

    Args:
        node: the statement.
        targets: the name it binds here, the module that has it, and the name there (`None`: the
            module itself is bound). Empty for imports that are for type checkers only.
    """

    node: ast.Import | ast.ImportFrom
    targets: tuple[tuple[str, Module, str | None], ...] = ()


class _Imports(ast.NodeVisitor):
    """Collects the statements of a module that import from `packages`, wherever they stand."""

    def __init__(self, module: Module, packages: Collection[str]) -> None:
        self.module, self.packages = module, packages
        self.found: list[_Import] = []
        self._typing_only = False
        self.visit(module.tree)

    def visit_If(self, node: ast.If) -> None:
        test = node.test
        name = test.id if isinstance(test, ast.Name) else test.attr if isinstance(test, ast.Attribute) else ""
        outer, self._typing_only = self._typing_only, self._typing_only or name == "TYPE_CHECKING"
        for child in node.body:
            self.visit(child)
        self._typing_only = outer
        for child in node.orelse:
            self.visit(child)

    def visit_Import(self, node: ast.Import) -> None:
        if self._typing_only:
            self.found.append(_Import(node))
            return
        if not any(self._ours(alias.name) for alias in node.names):
            return
        if len(node.names) > 1:
            raise self._error(node, "import one module a line")
        (alias,) = node.names
        target = find_module(alias.name)
        if alias.asname is None or target is None or target.package:
            raise self._error(node, "write `from module import name`, or `import module as name`")
        self.found.append(_Import(node, ((alias.asname, target, None),)))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if self._typing_only:
            self.found.append(_Import(node))
            return
        origin = self.module.absolute(node.module, node.level)
        if not self._ours(origin):
            return
        if node.names[0].name == "*":
            raise self._error(node, "name what is imported")
        source = find_module(origin)
        if source is None:
            raise self._error(node, f"there is no module {origin} with a source file")
        targets = []
        for alias in node.names:
            module, name = definition(source, alias.name) if source.package else (source, alias.name)
            targets.append((alias.asname or alias.name, module, name))
        self.found.append(_Import(node, tuple(targets)))

    def visit_Call(self, node: ast.Call) -> None:
        # A module named in a string would be looked for in a package that is not there.
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        first = node.args[0] if node.args else None
        if called in ("import_module", "__import__") and isinstance(first, ast.Constant) and self._ours(first.value):
            raise self._error(node, "use an import statement")
        self.generic_visit(node)

    def _ours(self, name: object) -> bool:
        return isinstance(name, str) and name.split(".")[0] in self.packages

    def _error(self, node: ast.stmt | ast.expr, advice: str) -> ExportError:
        text = ast.unparse(node)
        return ExportError(f"cannot export `{text}` ({self.module.path}, line {node.lineno}): {advice}")


def _rewrite(module: Module, packages: Collection[str], names: dict[str, str]) -> str:
    """Return the text of `module` with its imports pointing to the flat files."""
    lines = module.text.splitlines(keepends=True)
    for item in reversed(_Imports(module, packages).found):
        node = item.node
        new = _statements(item, names)
        if new is None:
            continue
        first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
        indent = lines[first].encode()[: node.col_offset].decode()
        rest = lines[last].encode()[node.end_col_offset :].decode().strip()
        if indent.strip() or (rest and not rest.startswith("#")):
            where = f"{module.path}, line {node.lineno}"
            raise ExportError(f"cannot export `{ast.unparse(node)}` ({where}): put it on a line of its own")
        lines[first : last + 1] = [f"{indent}{line}\n" for line in new]
    text = "".join(lines)
    ast.parse(text, filename=f"{names[module.name]}.py")
    return text


def _statements(item: _Import, names: dict[str, str]) -> list[str] | None:
    """Return the statements that replace an import, None where it can stay."""
    node = item.node
    if not item.targets:
        return ["pass  # an import for type checkers"]
    if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module is not None:
        flat = {names[module.name] for _, module, _ in item.targets}
        if flat == {node.module} and all(name is not None for _, _, name in item.targets):
            return None
    grouped: dict[str, list[str]] = {}
    modules: list[str] = []
    for bound, module, name in item.targets:
        flat_name = names[module.name]
        if name is None:
            # `from . import module` is not followed by the loader: import a name that every module has instead.
            hidden = f"_{flat_name}_module"
            grouped.setdefault(flat_name, []).append(f"__name__ as {hidden}")
            modules.append(f"{bound} = sys.modules[{hidden}]")
        else:
            grouped.setdefault(flat_name, []).append(name if name == bound else f"{name} as {bound}")
    imports = [f"from .{flat_name} import {', '.join(items)}" for flat_name, items in grouped.items()]
    return [*(["import sys"] if modules else []), *imports, *modules]
