"""C kernels that are compiled where they run, by the compiler that is there, and kept for the next process.

What is compiled lies in `$XDG_CACHE_HOME/hf_ext/native` (`~/.cache/hf_ext/native`), which nobody else may write to. A
file is named after all that it was made from (source, flags, compiler, processor), so that none is loaded on another
processor that shares the folder, and after what is in it, so that none is loaded that was damaged. `HF_EXT_NATIVE=0`
switches all of this off, `CC` names the compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

#: Tried in this order until one compiles: not every compiler has OpenMP, or knows the processor by this name.
FLAGS = (("-march=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",))
#: Always given.
COMMON = ("-O3", "-std=gnu99", "-shared", "-fPIC", "-w")
#: What tells processors apart in /proc/cpuinfo.
TRAITS = (
    "vendor_id", "cpu family", "model", "model name", "stepping", "flags", "Features", "CPU implementer",
    "CPU architecture", "CPU variant", "CPU part",
)  # fmt: skip
#: Seconds that a compiler may take.
PATIENCE = 120


class NotHere(Exception):
    """There is no native kernel, and nothing is wrong: it is switched off, or there is nothing to compile it with."""


class Failed(Exception):
    """There should be a native kernel, and there is none."""


def build(source: Path) -> ctypes.CDLL:
    """Return a compiled C file, from the cache folder if it is there.

    Args:
        source: the file.

    Raises:
        NotHere: switched off, another system than Linux and macOS, no source file, no compiler.
        Failed: the compiler, the cache folder or the loader refused.
    """
    if os.environ.get("HF_EXT_NATIVE", "1").strip().lower() in ("0", "false", "off", "no"):
        raise NotHere("HF_EXT_NATIVE switches it off")
    if sys.platform not in ("linux", "darwin"):
        raise NotHere(f"it is compiled on Linux and macOS only, not on {sys.platform}")
    if not source.is_file():
        raise NotHere(f"the source file {source.name} is not there")
    command = compiler()
    try:
        version = _output([*command, "--version"])
        text = source.read_bytes()
        key = _digest(repr((text, FLAGS, COMMON, command, version, processor())).encode())
        where = folder()
        kept = _find(where, key)
        return ctypes.CDLL(str(kept or _compile(command, source, where, key)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # a RuntimeError where there is no home
        raise Failed(str(error)) from error


def compiler() -> list[str]:
    """Return the command of the C compiler: `CC`, or the first of cc, gcc and clang that there is.

    Raises:
        NotHere: there is none.
    """
    if given := shlex.split(os.environ.get("CC", "")):
        return given
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return [found]
    raise NotHere("there is no C compiler (cc, gcc or clang; CC names another)")


def folder() -> Path:
    """Return the cache folder, which is made if it is not there.

    Raises:
        Failed: others could write to it, and so say what runs here.
    """
    found = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_ext" / "native"
    found.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = found.stat()
    if about.st_uid != os.getuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Failed(f"{found} belongs to or can be written by others: make it yours alone (chmod 700)")
    return found


def processor() -> str:
    """Return what tells this processor from others, for which code may have been compiled in the same folder."""
    found = [platform.system(), platform.machine()]
    if sys.platform == "darwin":
        return "\n".join([*found, _output(["sysctl", "-n", "machdep.cpu.brand_string"])])
    first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    return "\n".join([*found, *(line for line in first.splitlines() if line.partition(":")[0].strip() in TRAITS)])


def _find(where: Path, key: str) -> Path | None:
    """Return a library with this key that is what was written; one that is not is removed."""
    for found in sorted(where.glob(f"{key}-*.so")):
        if found.name == f"{key}-{_digest(found.read_bytes())}.so":
            return found
        found.unlink(missing_ok=True)
    return None


def _compile(command: list[str], source: Path, where: Path, key: str) -> Path:
    """Compile, and move what was made to its place in one step, whoever else is doing the same."""
    said = ""
    with tempfile.TemporaryDirectory(prefix="build-", dir=where) as scratch:
        made = Path(scratch) / "made.so"
        for flags in FLAGS:
            if sys.platform == "darwin" and "-fopenmp" in flags:
                continue  # a second OpenMP beside that of PyTorch ends the process there
            line = [*command, *COMMON, *flags, "-o", str(made), str(source)]
            run = subprocess.run(line, capture_output=True, text=True, errors="replace", timeout=PATIENCE)
            if run.returncode == 0 and made.is_file():
                place = where / f"{key}-{_digest(made.read_bytes())}.so"
                made.replace(place)
                return place
            said = said or (run.stderr.strip() or f"exit status {run.returncode}")[:500]
    raise Failed(f"{shlex.join(command)} could not compile {source.name}: {said}")


def _output(command: list[str]) -> str:
    run = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PATIENCE)
    return run.stdout


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
