"""Claim checks of causal masking (arXiv:2201.07520) on rows of pairs and on source code.

CM3 and next-token prediction start from equal weights and see equal rows in equally many steps, for each seed.
"""

from __future__ import annotations

import functools
import random

from transformers import PreTrainedModel

from hf_ext.claims import held_out
from hf_ext.claims import infilling_task as task
from hf_ext.trainer_callbacks import CM3
from hf_ext.verify import Claim, Measurement, Threshold

HOLES = 2
MASKS = [task.FIRST_SENTINEL, task.FIRST_SENTINEL + 1]


def objective(**options: object) -> CM3:
    """Return CM3 as its authors released it, with sentinels of the task's vocabulary."""
    marks = {"mask_tokens": MASKS, "end_token": task.FIRST_SENTINEL + 2, "max_spans": HOLES}
    return CM3(**{**marks, **options})  # type: ignore[arg-type]


@functools.cache
def trained(seed: int) -> PreTrainedModel:
    """Return the model that was trained with CM3."""
    return task.train(objective(), seed)


def restored() -> Measurement:
    """Count texts that do not come back exactly from being cut at characters and their spans being moved."""
    method = CM3(min_spans=1, mask_tokens=["<|mask|>", "<|pad|>", "@"], end_token="$", max_spans=3, level="character")
    return task.restored(method, random.Random(0))


def zero_rate() -> Measurement:
    """Return the largest difference between weights trained with rate 0 and without CM3."""
    return task.distance(objective(mask_rate=0.0))


CLAIMS = (
    Claim(
        name="restored",
        paper="Masked spans are moved to the end of the document; nothing else is changed.",
        measures="texts that differ after cuts at characters and the inverse",
        threshold=Threshold("==", 0),
        check=restored,
        unit="texts",
        seconds=5,
        data=held_out.DATA,
    ),
    Claim(
        name="zero-rate",
        paper="Masking no document is next-token prediction.",
        measures="largest difference of a weight after 20 steps with mask_rate=0 and without CM3",
        threshold=Threshold("==", 0),
        check=zero_rate,
        seconds=3,
        data=task.DATA,
    ),
    Claim(
        name="left-to-right",
        paper="Causal masking enables full generative modelling left to right.",
        measures="held-out next-token loss over all tokens but the masks, less that of next-token "
        "prediction, equal steps",
        threshold=Threshold("<=", 0.01),
        check=lambda: task.losses_of_moved_spans("CM3", trained),
        unit="nats per token",
        seconds=75,
        data=task.DATA,
    ),
    Claim(
        name="infills",
        paper="Masked spans are generated with context from both sides.",
        measures=f"share of held-out gaps filled exactly, {HOLES} a row, less that of next-token prediction given what "
        "stands before",
        threshold=Threshold(">=", 0.5),
        check=lambda: task.shares_of_moved_spans("CM3", trained, objective(), HOLES),
        unit="share of gaps",
        seconds=75,
        data=task.DATA,
    ),
)
