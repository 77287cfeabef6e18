"""Claim checks of CodeGen2's mixture (arXiv:2305.02309) on rows of pairs and on source code.

CodeGen2 and next-token prediction start from equal weights and see equal rows in equally many steps, for each seed.
"""

from __future__ import annotations

import functools
import random

from transformers import PreTrainedModel

from hf_ext.claims import held_out
from hf_ext.claims import infilling_task as task
from hf_ext.trainer_callbacks import CodeGen2, Document
from hf_ext.verify import Claim, Measurement, Threshold

SHARE = 0.5
DOCUMENTS = 4000


def objective(**options: object) -> CodeGen2:
    """Return CodeGen2's mixture with sentinels of the task's vocabulary."""
    first = task.FIRST_SENTINEL
    marks = {"mask_tokens": [first, first + 1], "end_token": first + 2, "separator_token": first + 3, "max_spans": 2}
    return CodeGen2(**{"causal_share": SHARE, "mean_span": 2, **marks, **options})  # type: ignore[arg-type]


@functools.cache
def trained(seed: int) -> PreTrainedModel:
    """Return the model that was trained with CodeGen2's mixture."""
    return task.train(objective(), seed)


def restored() -> Measurement:
    """Count texts that do not come back exactly from being cut at characters and their spans being moved."""
    method = CodeGen2(
        causal_share=0.0,
        mean_span=40,
        mask_tokens=["<|mask|>", "<|pad|>", "@"],
        separator_token="`",
        end_token="$",
        max_spans=3,
        level="character",
    )
    return task.restored(method, random.Random(0))


def causal_share() -> Measurement:
    """Return how far the share of documents that stay the very same objects is from what was asked for."""
    method = objective()
    method.resolve(None, task.small_model(0).config)
    draw, same = random.Random(0), 0
    for row in task.rows_of(DOCUMENTS, seed=3).tolist():
        document = Document(row, row)
        same += method.rewrite(document, draw) is document
    found = same / DOCUMENTS
    return Measurement(abs(found - SHARE), seeds=(0,), details={"documents": DOCUMENTS, "share untouched": found})


def all_causal() -> Measurement:
    """Return the largest difference between weights trained with only causal documents and without CodeGen2."""
    return task.distance(objective(causal_share=1.0))


CLAIMS = (
    Claim(
        name="restored",
        paper="Spans of a file are moved behind it; nothing else is changed.",
        measures="texts that differ after cuts at characters and the inverse",
        threshold=Threshold("==", 0),
        check=restored,
        unit="texts",
        seconds=5,
        data=held_out.DATA,
    ),
    Claim(
        name="all-causal",
        paper="The causal share is causal language modelling.",
        measures="largest difference of a weight after 20 steps with causal_share=1 and without CodeGen2",
        threshold=Threshold("==", 0),
        check=all_causal,
        seconds=3,
        data=task.DATA,
    ),
    Claim(
        name="causal-share",
        paper="Half of the sequences are trained by causal language modelling, half by span corruption.",
        measures=f"share of documents that come back as the same objects, distance from {SHARE}",
        threshold=Threshold("<=", 0.03),  # four standard errors
        check=causal_share,
        unit="share of documents",
        seconds=2,
        data=task.DATA,
    ),
    Claim(
        name="left-to-right",
        paper="The paper found no evidence that infilling comes for free.",
        measures="held-out next-token loss over all tokens but the masks, less that of next-token "
        "prediction, equal steps",
        threshold=None,
        check=lambda: task.losses_of_moved_spans("CodeGen2", trained),
        unit="nats per token",
        seconds=75,
        data=task.DATA,
    ),
    Claim(
        name="infills",
        paper="Causal language modelling and infilling are unified in one model.",
        measures="share of held-out gaps filled exactly given both sides, less that of next-token prediction given "
        "what stands before",
        threshold=Threshold(">=", 0.5),
        check=lambda: task.shares_of_moved_spans("CodeGen2", trained, objective(), 1),
        unit="share of gaps",
        seconds=75,
        data=task.DATA,
    ),
)
