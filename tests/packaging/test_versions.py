"""The pinned versions agree with the ranges, and what runs them is there."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FILES = ("constraints.txt", "constraints-oldest.txt")


def pins(name: str) -> dict[str, Version]:
    found = {}
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            [pin] = requirement.specifier
            assert pin.operator == "==", line
            found[canonicalize_name(requirement.name)] = Version(pin.version)
    return found


def needed() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *(line for extra in ("test", "trl", "plots", "dev") for line in extras[extra])]
    return [Requirement(line) for line in lines if not line.startswith("hf_ext[")]


@pytest.mark.parametrize("name", FILES)
def test_every_dependency_is_pinned_inside_its_range(name: str) -> None:
    pinned = pins(name)
    for requirement in needed():
        version = pinned[canonicalize_name(requirement.name)]
        assert version in requirement.specifier, f"{requirement} excludes {version}"


@pytest.mark.parametrize("name", FILES)
def test_no_pin_asks_for_a_local_build(name: str) -> None:
    assert [str(version) for version in pins(name).values() if version.local] == []


def test_the_oldest_environment_has_the_oldest_transformers_that_is_promised() -> None:
    [requirement] = [r for r in needed() if r.name == "transformers"]
    [lower] = [spec.version for spec in requirement.specifier if spec.operator == ">="]
    oldest = pins("constraints-oldest.txt")["transformers"]
    assert oldest.release[:2] == Version(lower).release[:2]
    assert pins("constraints.txt")["transformers"] > oldest


def test_continuous_integration_runs_the_suite() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text
    assert "make test" in text


def test_version_is_the_same_everywhere() -> None:
    import hf_ext

    assert hf_ext.__version__ == PROJECT["version"]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[(?:{re.escape(PROJECT['version'])}|Unreleased)\]", changes, re.MULTILINE)
