"""Make `hf_ext` importable for pytest in a checkout where it is not installed.

An installed package is used as it is. Otherwise the checkout is laid out as the installed package
would be (`tests/linked_tree.py`), for this process and, through `PYTHONPATH`, for those it starts.

It also keeps the garbage collector from walking again and again through all that is imported.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent


def usable() -> bool:
    """Tell whether hf_ext, its mounted folders and its entry points can be found."""
    try:
        if importlib.util.find_spec("hf_ext.generation.manifest") is None:
            return False
    except ModuleNotFoundError:
        return False
    return any(entry.value.startswith("hf_ext.") for entry in entry_points(group="hf_ext.generation"))


def mount() -> None:
    """Put the linked tree first on the search path of this process and of its children."""
    spec = importlib.util.spec_from_file_location("linked_tree", ROOT / "tests" / "linked_tree.py")
    assert spec is not None
    assert spec.loader is not None
    linked_tree = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(linked_tree)
    tree = str(linked_tree.build(ROOT / "build" / "tree"))
    # A package hf_ext found half-way (the folder in the working directory) must not stay.
    for name in [name for name in sys.modules if name.partition(".")[0] == "hf_ext"]:
        del sys.modules[name]
    sys.path.insert(0, tree)
    # `python -m` and scripts would otherwise put the checkout's bare `hf_ext/` before the tree.
    os.environ["PYTHONSAFEPATH"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [tree, os.environ.get("PYTHONPATH", "")]))
    importlib.invalidate_caches()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Let the garbage collector go, which stands still until everything is imported: imports make much, drop little."""
    gc.enable()
    gc.set_threshold(20_000, 20, 20)  # most of what a test makes goes with it, without the collector


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Take what lives at the start of a file out of the collector's sight: transformers' Trainer makes it walk through
    everything after each training, which took longer than the training itself.
    """
    if item.path != _file[0]:
        _file[0] = item.path
        gc.collect()
        gc.freeze()


def pytest_unconfigure() -> None:
    """Give it back before the interpreter ends: nanobind reports as leaked what is never freed."""
    gc.unfreeze()


_file = [ROOT]
gc.disable()
if not usable():
    mount()
