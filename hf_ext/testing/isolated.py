"""Run code in a process that cannot import given packages, as a user of the Hub would who has not installed them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

_BLOCKER = """
import sys
from importlib.abc import MetaPathFinder

class Blocker(MetaPathFinder):
    blocked = {blocked!r}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.blocked:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked in this process)", name=name)

sys.meta_path.insert(0, Blocker())
"""


def run_without(
    packages: Iterable[str],
    code: str,
    *arguments: str | os.PathLike[str],
    home: str | os.PathLike[str],
    environment: Mapping[str, str] | None = None,
    seconds: float = 120,
) -> str:
    """Run Python code in a fresh, offline process where `packages` do not exist.

    Args:
        packages: top-level packages that cannot be imported there.
        code: the program; it finds `arguments` in `sys.argv[1:]`.
        arguments: passed on as strings.
        home: empty folder that the process uses as Hugging Face cache and working directory.
        environment: further environment variables.
        seconds: the process is ended after this time.

    Returns:
        What the program printed.

    Raises:
        RuntimeError: the program failed; the message ends with what it wrote to stderr.

    Example:
        >>> import tempfile
        >>> program = "import sys; import colorsys"
        >>> with tempfile.TemporaryDirectory() as home:
        ...     run_without(["colorsys"], program, home=home)
        Traceback (most recent call last):
            ...
        RuntimeError: ...No module named 'colorsys' (blocked in this process)...
    """
    variables = {
        **os.environ,
        "HF_HOME": str(home),
        "HF_MODULES_CACHE": str(Path(home) / "modules"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONSAFEPATH": "1",  # neither the working directory nor the program's folder is searched for modules
        **(environment or {}),
    }
    command = [sys.executable, "-c", _BLOCKER.format(blocked=set(packages)) + code, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=home, env=variables, capture_output=True, text=True, timeout=seconds, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the process ended with code {done.returncode}:\n{done.stderr[-4000:]}")
    return done.stdout
