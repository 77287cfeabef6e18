"""Claim checks of EMO (arXiv:2310.04691): the embedded draft model trained on with and without it, and sampled from."""

from __future__ import annotations

from hf_ext.claims import sampled_code
from hf_ext.trainer_callbacks.emo import EMO

#: Chosen with a seed that is not judged.
MODE, STRENGTH = 2, 0.5

CLAIMS = sampled_code.claims(
    "EMO",
    lambda: EMO(mode=MODE, strength=STRENGTH),
    lambda: EMO(strength=0.0),
    null=(
        "zero-strength",
        "With nothing of EMO in the loss, training is that of maximum likelihood.",
        "largest difference of a weight after 10 steps with strength=0 and without EMO",
    ),
    likelihood="That is no worse a language model.",
)
