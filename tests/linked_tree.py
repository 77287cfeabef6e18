"""Lay the repository out as the package it installs as, with symbolic links.

    python tests/linked_tree.py build/tree

makes `build/tree/hf_ext/`, where `hf_ext/generation` is a link to the top-level folder `generation/`
and so on, and a `dist-info` folder that carries the entry points of `pyproject.toml`. With that
folder on `PYTHONPATH` everything works as after an installation. It serves whoever cannot install:
pytest in a bare checkout, the type checker, a GPU machine without network.
"""

from __future__ import annotations

import os
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def mounted() -> tuple[str, ...]:
    """Return the top-level folders that install as `hf_ext.*`, as `setup.py` lists them."""
    listing = re.search(r"^MOUNTED = \((.*)\)$", (ROOT / "setup.py").read_text(encoding="utf-8"), re.MULTILINE)
    if listing is None:
        raise RuntimeError("setup.py has no one-line tuple MOUNTED")
    return tuple(re.findall(r'"(\w+)"', listing.group(1)))


def build(out: Path) -> Path:
    """Create the tree in the folder `out`, or bring it up to date, and return it."""
    package = out.resolve() / "hf_ext"
    package.mkdir(parents=True, exist_ok=True)
    wanted = {path.name: path for path in (ROOT / "hf_ext").iterdir() if path.name != "__pycache__"}
    wanted |= {name: ROOT / name for name in mounted()}
    for path in package.iterdir():
        if path.is_symlink() and path.name not in wanted:
            path.unlink()
    for name, source in wanted.items():
        link = package / name
        if not link.is_symlink():
            # Two test workers may build the same tree at the same time: the last link wins.
            fresh = package / f".{name}.{os.getpid()}"
            fresh.symlink_to(source, target_is_directory=source.is_dir())
            fresh.replace(link)
    _write_metadata(out)
    return out.resolve()


def _write_metadata(out: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = out / f"{project['name']}-{project['version']}.dist-info"
    info.mkdir(exist_ok=True)
    metadata = ["Metadata-Version: 2.4", f"Name: {project['name']}", f"Version: {project['version']}"]
    (info / "METADATA").write_text("\n".join(metadata) + "\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("\n".join(_entry_points(project)) + "\n", encoding="utf-8")


def _entry_points(project: dict) -> Iterator[str]:
    yield "[console_scripts]"
    yield from (f"{name} = {target}" for name, target in project["scripts"].items())
    for group, entries in project["entry-points"].items():
        yield f"[{group}]"
        yield from (f"{name} = {target}" for name, target in entries.items())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/linked_tree.py FOLDER")
    print(build(Path(sys.argv[1])))
