"""Claim checks of MixCE (arXiv:2305.16958): the embedded draft model trained on with and without, and sampled from."""

from __future__ import annotations

from hf_ext.claims import sampled_code
from hf_ext.trainer_callbacks.mixce import MixCE

#: Chosen with a seed that is not judged.
ETA = 0.3

CLAIMS = sampled_code.claims(
    "MixCE",
    lambda: MixCE(eta=ETA),
    lambda: MixCE(eta=1.0),
    null=(
        "eta-1",
        "With eta = 1, training is that of maximum likelihood.",
        "largest difference of a weight after 10 steps with eta=1 and without MixCE",
    ),
    likelihood="Its perplexity may be worse; here, how much.",
)
