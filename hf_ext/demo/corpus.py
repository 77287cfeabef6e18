"""The corpus of the embedded models: the Python standard library's own source.

It is on every machine that can run hf_ext, so training, fine-tuning examples and claim
checks on text need no download. Files that are tables rather than code are left out: they
are so predictable that they flatter prompt lookup and draft models.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

#: Folders that hold tables, generated code, test data or third-party packages.
EXCLUDED_PARTS = frozenset(
    {"encodings", "pydoc_data", "site-packages", "dist-packages", "cjkencodings", "__pycache__", "_bundled"}
)
#: Generated modules outside those folders.
GENERATED = re.compile(r"^(_sysconfigdata.*|token|keyword|symbol|stringprep|_opcode_metadata|entities|keysyms)\.py$")
#: Modules the embedded models never saw; neither did they see the tests of these modules.
HELD_OUT = (
    "bisect", "calendar", "colorsys", "csv", "dataclasses", "fnmatch", "fractions", "graphlib",
    "heapq", "imaplib", "netrc", "numbers", "quopri", "random", "sched", "shlex", "statistics",
    "string", "textwrap", "timeit", "wave", "zipapp",
)  # fmt: skip

_DATA_LINE = re.compile(r"""^\s*[\[({]*\s*(?:[bru]?["'].*["']|[-+]?(?:0x)?[0-9a-fA-F_.]+)[\s\]}),:]*(?:.*,)?$""")
_DATA_STARTS = frozenset("\"'bru+-_.0123456789abcdefABCDEF")


@dataclass(frozen=True)
class Source:
    """One file of the corpus.

    Args:
        name: path relative to the standard library, with forward slashes.
        text: its decoded text.
        held_out: whether the embedded models never saw it.
    """

    name: str
    text: str
    held_out: bool

    @property
    def sha256(self) -> str:
        """Hex digest of the UTF-8 text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def is_table(text: str) -> bool:
    """Tell whether more than 40 % of the non-blank lines are nothing but literals.

    Example:
        >>> is_table("1,\\n2,\\n3,\\n")
        True
        >>> is_table("def f(x):\\n    return x\\n")
        False
    """
    lines = [line for line in text.splitlines() if line.strip()]
    return bool(lines) and sum(map(_is_data, lines)) > 0.4 * len(lines)


def _is_data(line: str) -> bool:
    # Most lines of code are told by their first character, and the pattern is slow on long ones.
    return line.lstrip(" \t[({")[:1] in _DATA_STARTS and _DATA_LINE.match(line) is not None


def is_held_out(name: str) -> bool:
    """Tell whether the relative path `name` is a module of `HELD_OUT` or one of its tests.

    Example:
        >>> is_held_out("heapq.py"), is_held_out("test/test_heapq.py"), is_held_out("xml/heapq.py")
        (True, True, False)
    """
    parts = Path(name).with_suffix("").parts
    tests = (part.removeprefix("test_") for part in parts if part.startswith("test_"))
    return parts[0] in HELD_OUT or any(test in HELD_OUT for test in tests)


def sources(root: str | Path | None = None, *, held_out: bool | None = None) -> Iterator[Source]:
    """Yield the corpus file by file, in the order of their names.

    Args:
        root: folder of the library; the running interpreter's own by default.
        held_out: only the held-out files, or only those trained on; both by default.

    Yields:
        `Source` records: UTF-8 Python files that are neither tables nor generated.
    """
    base = Path(root or sysconfig.get_path("stdlib"))
    for path in sorted(base.rglob("*.py"), key=lambda p: p.relative_to(base).as_posix()):
        relative = path.relative_to(base)
        if EXCLUDED_PARTS.intersection(relative.parts) or GENERATED.match(path.name):
            continue
        name = relative.as_posix()
        if held_out is not None and is_held_out(name) != held_out:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # test files that are deliberately not UTF-8
            continue
        if len(text) < 200 or is_table(text):
            continue
        yield Source(name, text, is_held_out(name))
