"""Metrics of generated text and of language models, without downloads.

Each is a plain function, and also a metric that `evaluate.load(hf_ext.metrics.path(name))` loads.

Example:
    >>> from hf_ext.metrics import repetition_diversity
    >>> round(repetition_diversity([[1, 2, 1, 2]], orders=(2,))["rep_2"], 4)  # two of the three bigrams are the same
    0.3333
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_ext.metrics.repetition import distinct_n, rep_n, repetition_diversity, zipf_coefficient

if TYPE_CHECKING:
    from hf_ext.metrics.likelihood import bits_per_byte, coherence, continuation_nats

#: Names that `path` knows.
NAMES = ("repetition_diversity", "coherence", "bits_per_byte")

__all__ = [
    "NAMES",
    "bits_per_byte",
    "coherence",
    "continuation_nats",
    "distinct_n",
    "path",
    "rep_n",
    "repetition_diversity",
    "zipf_coefficient",
]


def path(name: str) -> str:
    """Return where `evaluate.load` finds the metric called `name`.

    Args:
        name: one of `NAMES`.

    Raises:
        ValueError: no such metric.

    Example:
        >>> Path(path("repetition_diversity")).name
        'repetition_diversity.py'
    """
    if name not in NAMES:
        raise ValueError(f"unknown metric {name!r}; hf_ext has {', '.join(NAMES)}")
    return str(Path(__file__).parent / "scripts" / f"{name}.py")


def __getattr__(name: str) -> Any:
    """Import the functions that need torch when they are first used."""
    if name in ("bits_per_byte", "coherence", "continuation_nats"):
        from hf_ext.metrics import likelihood

        return getattr(likelihood, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
