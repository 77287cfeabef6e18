"""The examples in docstrings run, in the modules as users import them (`hf_ext.generation`, ...)."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "hf_ext": "hf_ext",
    "generation": "hf_ext.generation",
    "modeling": "hf_ext.modeling",
    "trainer_callbacks": "hf_ext.trainer_callbacks",
    "claims": "hf_ext.claims",
    "benchmarks": "hf_ext.benchmarks",
}


def modules_with_examples() -> list[str]:
    """Return the dotted name of each module whose source holds a doctest prompt."""
    names = []
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            if ">>> " in path.read_text(encoding="utf-8"):
                parts = path.relative_to(ROOT / folder).with_suffix("").parts
                names.append(".".join([package, *(part for part in parts if part != "__init__")]))
    return names


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_in_docstrings_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # an example that writes files does not write them into the checkout
    module = importlib.import_module(name)
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    examples = 0
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        examples += len(test.examples)
        runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)
    assert examples > 0, f"{name} holds '>>> ' but no example that doctest finds"
