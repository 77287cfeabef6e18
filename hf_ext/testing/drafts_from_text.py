"""Sampling laws of methods that draft from what a text has said: short prompts that hold every pair of tokens often."""

from __future__ import annotations

from typing import Any

import torch

from hf_ext.testing import exactness

#: Vocabulary, length of a continuation, draws, prompt, and settings of `generate`.
CASES: tuple[tuple[int, int, int, list[int], dict[str, Any]], ...] = (
    (6, 3, 4000, [0, 1, 2, 3, 4, 5, 0, 2, 4, 1, 3, 5, 3], {}),
    # Longer texts over fewer tokens: trees are deeper, and most drafts are tried.
    (4, 5, 4000, [0, 1, 2, 3, 0, 2, 1, 3], {"temperature": 0.7, "top_p": 0.9}),
)


def assert_laws(build: exactness.Build, share: float = 1.0) -> None:
    """Fail unless sampled continuations follow the law of `generate`, with drafts accepted and rejected on the way.

    Args:
        build: makes the strategy for a model.
        share: of the draws to take.
    """
    for vocabulary, length, draws, prompt, settings in CASES:
        built: list[Any] = []

        def remembered(model: Any, built: list = built) -> Any:
            built.append(build(model))
            return built[-1]

        model = exactness.small_vocabulary(vocabulary=vocabulary)
        exactness.assert_sampling_law(
            remembered, model, draws=int(share * draws), length=length, prompt=torch.tensor([prompt]), **settings
        )
        report = built[-1].report
        rejected = report.details["drafted"] - report.accepted
        assert report.accepted > 0.05 * report.rows, f"only {report.accepted} drafts accepted in {report.rows} rows"
        assert rejected > 0.05 * report.rows, f"only {rejected} drafts rejected in {report.rows} rows"
