"""A copy of the sources, and environments that see the heavy dependencies but no hf_ext."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Environment:
    """A fresh virtual environment to which the packages of this one are visible, save hf_ext.

    A path file names this environment's site-packages. Python does not run the path files it
    finds there, so an editable hf_ext stays behind; its metadata is hidden by whichever hf_ext is
    installed here, and looked past where none is.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        venv.create(folder, with_pip=False, symlinks=True)
        site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        borrowed = folder / "borrowed"
        borrowed.mkdir()
        for packages in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
            for item in Path(packages).iterdir():
                if not item.name.lower().startswith(("hf_ext", "__editable__")) and not (borrowed / item.name).exists():
                    (borrowed / item.name).symlink_to(item)
        (site / "borrowed.pth").write_text(f"{borrowed}\n", encoding="utf-8")

    def run(self, *command: object, cwd: Path, status: int = 0) -> subprocess.CompletedProcess[str]:
        """Run a command without this process's search path and check its exit status."""
        kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSAFEPATH")}
        found = subprocess.run([*map(str, command)], cwd=cwd, env=kept, capture_output=True, text=True)
        assert found.returncode == status, f"{command} gave {found.returncode}:\n{found.stdout}\n{found.stderr}"
        return found

    def pip(self, *arguments: object, cwd: Path) -> None:
        """Run this process's pip on the environment, without network."""
        options = ("--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
        self.run(sys.executable, "-m", "pip", "--python", self.python, *arguments, *options, cwd=cwd)


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout as a fresh clone would have it: building in it leaves the real one alone."""
    copy = tmp_path_factory.mktemp("sources") / "checkout"
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=unwanted, symlinks=True)
    return copy


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """An environment without hf_ext."""
    return Environment(tmp_path / "environment")
