"""Code is flattened into files that transformers' own loader copies and imports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from transformers import dynamic_module_utils

from hf_ext import adapter
from hf_ext.hub.code import check_as_loader_reads
from hf_ext.hub.errors import ExportError
from hf_ext.hub.flatten import flatten


def load(folder: Path, file: str, name: str):
    """Load a name from a file of a repository as transformers does."""
    return dynamic_module_utils.get_class_in_module(name, dynamic_module_utils.get_cached_module_file(folder, file))


def write(files: dict[str, str], folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def test_everything_a_strategy_imports_is_copied_and_works_through_the_loader(toy_package, tmp_path):
    package = toy_package()
    flat = flatten([f"{package}.strategy"], [package, "hf_ext"])
    assert sorted(flat.files) == ["deep_tools.py", "engine.py", "log.py", "settings.py", "strategy.py", "tools.py"]
    for text in flat.files.values():
        roots = {
            (node.module or "").split(".")[0]
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.ImportFrom) and node.level == 0
        }
        assert not roots & {package, "hf_ext"}
        assert "no_such_package" not in text
    code = write(flat.files, tmp_path / "repo" / "custom_generate")
    for path in code.iterdir():
        check_as_loader_reads(path)
        dynamic_module_utils.check_imports(path)
    strategy = load(tmp_path / "repo", "custom_generate/strategy.py", "Repeat")
    assert strategy.__module__.startswith("transformers_modules.")
    ids = torch.tensor([[5, 7]])
    assert strategy(times=3).generate(None, ids).tolist() == [[5, 7] + [7] * 6]


def test_a_file_that_needs_no_change_is_copied_unchanged():
    folder = Path(__file__).parents[2] / "modeling" / "swan_gpt"
    flat = flatten(["hf_ext.modeling.swan_gpt.modeling_swan_gpt"], ["hf_ext"])
    assert sorted(flat.files) == ["configuration_swan_gpt.py", "modeling_swan_gpt.py"]
    for name, text in flat.files.items():
        assert text == (folder / name).read_text()


def test_names_that_are_taken_get_their_package_in_front(toy_package):
    package = toy_package()
    names = flatten([f"{package}.strategy"], [package], reserved=["engine"]).names
    assert names[f"{package}.engine"] == f"{package}_engine"
    assert names[f"{package}.tools"] == "tools"
    assert names[f"{package}.deep.tools"] == "deep_tools"


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("from {package}.tools import *", "name what is imported"),
        ("import {package}.tools", "import module as name"),
        ("import torch, {package}.tools", "import one module a line"),
        ("from {package} import deep", "deep is a package"),
        ("from {package} import VERSION", "VERSION is not defined in a module"),
        ("from {package}.missing import x", "there is no module"),
        ("import importlib; importlib.import_module('{package}.tools')", "use an import statement"),
        ("x = 1; from {package}.tools import double", "on a line of its own"),
    ],
)
def test_an_import_that_no_flat_file_can_express_is_named_with_its_line(toy_package, line, advice):
    package = toy_package(strategy=f"import torch\n{line}\n")
    with pytest.raises(ExportError, match=advice) as error:
        flatten([f"{package}.strategy"], [package])
    assert "\n" not in str(error.value)
    assert package in str(error.value)


def test_a_docstring_that_the_loader_takes_for_an_import_is_refused(tmp_path):
    path = tmp_path / "a.py"
    path.write_text('"""Use it so:\n\n    from .tools import double\n"""\n')
    with pytest.raises(ExportError, match=r"line that starts with `from \.tools import`"):
        check_as_loader_reads(path)
    path.write_text('"""Use it so: from .tools import double"""\nif True: from .tools import double\n')
    with pytest.raises(ExportError, match="overlooks its import of tools"):
        check_as_loader_reads(path)


def test_the_loader_reads_imports_as_the_adapter_says(tmp_path):
    """The canary for `transformers.dynamic_module_utils`."""
    path = tmp_path / "a.py"
    path.write_text(
        "import os\nfrom torch import nn\nfrom .tools import a\n"
        "try:\n    import absent\nexcept ImportError:\n    pass\n"
        "def f():\n    from .deep import b\n    import safetensors\n"
    )
    assert adapter.remote_code_imports(path) == ({"tools", "deep"}, {"os", "torch", "safetensors"})
