"""Where the benchmarks write what they measured."""

from __future__ import annotations

from pathlib import Path

from hf_ext.cli.output import CliError


def results() -> Path:
    """Return `benchmarks/results` of this checkout.

    Raises:
        CliError: hf_ext is installed without its repository.
    """
    here = Path(__file__).resolve().parent
    if not (here.parent / "pyproject.toml").is_file():
        raise CliError("--write needs a checkout of hf_ext; use --json FILE here")
    return here / "results"


def write(path: Path, text: str) -> None:
    """Write a file, with its folder, and say so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"wrote {path}")
