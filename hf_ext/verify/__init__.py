"""Claim checks: what a method's paper says, measured again on this machine.

A claims file holds `CLAIMS`, a tuple of `Claim`; `Plugin.claims` names it. `run` does the
measuring and `write` puts the figures into the model card.

Example:
    >>> from hf_ext.verify import Claim, Measurement, Threshold
    >>> CLAIMS = (
    ...     Claim(
    ...         name="exact",
    ...         paper="The method changes no token.",
    ...         measures="tokens that differ from the reference",
    ...         threshold=Threshold("==", 0),
    ...         check=lambda: Measurement(0, details={"tokens": 64}),
    ...         unit="tokens",
    ...     ),
    ... )
"""

from hf_ext.verify.cards import CardError, cards_dir, problems, snippets, write
from hf_ext.verify.claim import Claim, Measurement, Result, Threshold
from hf_ext.verify.runner import claims_of, run, run_one

__all__ = [
    "CardError",
    "Claim",
    "Measurement",
    "Result",
    "Threshold",
    "cards_dir",
    "claims_of",
    "problems",
    "run",
    "run_one",
    "snippets",
    "write",
]
