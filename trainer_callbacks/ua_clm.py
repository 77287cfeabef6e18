"""Uncertainty-aware causal language modelling (UA-CLM, arXiv:2412.02904).

A model should be unsure where it is wrong. The tokens of a batch are parted into those that the
model gets right (its most probable token is the target) and the others; entropy is pushed down on
the first and up on the second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from hf_ext.trainer_callbacks.objective import Objective

#: Entropies below this are taken for this: log tanh H has no bound at 0.
SMALLEST_ENTROPY = 1e-6


def uncertainty_terms(entropy: Tensor, best_nll: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return what each token adds to the two sums of UA-CLM (equation 2 of the paper).

    Args:
        entropy: H of the model's distribution, in nats.
        best_nll: -log p of the most probable token.
        right: whether that token is the target.

    Returns:
        For tokens that are right, (1 - p) · -log(1 - tanh H), else 0; for the others,
        p · -log(tanh H), else 0.

    Example:
        >>> p, entropy = torch.tensor([0.8, 0.8]), torch.tensor([0.5, 0.5])
        >>> certain, unsure = uncertainty_terms(entropy, -p.log(), torch.tensor([True, False]))
        >>> [round(value, 4) for value in certain.tolist()], [round(value, 4) for value in unsure.tolist()]
        ([0.124, 0.0], [0.0, 0.6175])
    """
    p, entropy = (-best_nll).exp(), entropy.clamp_min(SMALLEST_ENTROPY)
    # 1 - tanh H = 2 / (1 + e^2H) and tanh H = (1 - e^-2H) / (1 + e^-2H), without cancellation
    certain = (1 - p) * (functional.softplus(2 * entropy) - math.log(2))
    unsure = p * (torch.log1p((-2 * entropy).exp()) - (-torch.expm1(-2 * entropy)).log())
    return torch.where(right, certain, 0.0), torch.where(right, 0.0, unsure)


@dataclass(eq=False)
class UACLM(Objective):
    """Train so that entropy is low on tokens that the model gets right and high on those that it gets wrong.

    The paper averages the two sums over their own tokens. How many there are in an accumulated batch
    is known only after its last forward pass, so here the share of right tokens is an option;
    training logs the true one as `share_right`. In the paper's equation 2 the loss has no
    likelihood in it: that is `likelihood=0`. Then nothing raises the probability of a target that is
    not on top already, so the default adds the plain loss.

    Args:
        weight: of the uncertainty terms; 0, with `likelihood=1`, is plain training, bit for bit.
        likelihood: weight of the plain loss.
        share_right: about what share of tokens the model gets right, between 0 and 1.
        seed: not used.
        clean_loss_every: see `Objective`.
        without_logits: see `Objective`.

    Raises:
        ValueError: an option is out of range, or both weights are 0.

    Example:
        >>> UACLM(weight=0.5).describe()["options"]["weight"]
        0.5
        >>> UACLM(share_right=1.0)
        Traceback (most recent call last):
        ...
        ValueError: share_right must lie between 0 and 1, got 1.0
    """

    slug: ClassVar[str] = "ua-clm"
    paper: ClassVar[str] = (
        "Enhancing Trust in Large Language Models with Uncertainty-Aware Fine-Tuning (arXiv:2412.02904)"
    )
    statistics_needed: ClassVar[frozenset[str]] = frozenset({"entropy", "best"})

    weight: float = 1.0
    likelihood: float = 1.0
    share_right: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("weight", "likelihood"):
            value = getattr(self, name)
            if isinstance(value, bool) or not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a weight of 0 or more, got {value!r}")
        if self.weight == self.likelihood == 0:
            raise ValueError("weight and likelihood are both 0, so that nothing is left to train on")
        if isinstance(self.share_right, bool) or not 0 < self.share_right < 1:
            raise ValueError(f"share_right must lie between 0 and 1, got {self.share_right!r}")

    def is_plain(self) -> bool:
        """Tell whether the options are those of plain training."""
        return self.weight == 0 and self.likelihood == 1

    def statistics_loss(self, statistics: Any, targets: Tensor, **extra: Any) -> tuple[Tensor, Tensor]:
        """Return the weighted sum and the number of targets."""
        count, right = torch.as_tensor(targets.numel()), statistics.best == targets
        with torch.no_grad():
            self.record("share_right", right.sum(), count)
            entropy = statistics.entropy.detach()
            self.record("entropy_right", torch.where(right, entropy, 0).sum(), right.sum())
            self.record("entropy_wrong", torch.where(right, 0, entropy).sum(), (~right).sum())
        plain = statistics.nll.sum()
        if self.weight == 0:
            return self.likelihood * plain if self.likelihood != 1 else plain, count
        certain, unsure = uncertainty_terms(statistics.entropy, statistics.best_nll, right)
        total = self.weight * (certain.sum() / self.share_right + unsure.sum() / (1 - self.share_right))
        return (total + self.likelihood * plain if self.likelihood else total), count
