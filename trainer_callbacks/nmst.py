"""Train a non-monotonic self-terminating language model (arXiv:2210.00660)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import TrainingArguments

from hf_ext.generation.self_terminating import Free, check_options
from hf_ext.trainer_callbacks import noise
from hf_ext.trainer_callbacks.objective import Objective


@dataclass(eq=False)
class SelfTerminating(Objective):
    """Train on the likelihood of a model whose texts are sure to end.

    After `t` tokens the end of the text has probability `1 - (1 - epsilon) ** t * (1 - p)`, at least
    `1 - (1 - epsilon) ** t`, where `p` is free; the other tokens share the rest by their softmax. In the paper, `p` is
    the sigmoid of the end's logit (`free="sigmoid"`). With `free="softmax"` it is the end's plain softmax probability:
    a pretrained model then starts as what it is, `epsilon=0` is plain training bit for bit, and targets other than the
    end have their plain gradient. Positions count from the beginning of each text, the prompt included.

    What is saved is a stock checkpoint. To decode from the model that was trained, give `generate` the same bound:
    `logits_processor=[SelfTerminatingLogitsProcessor(epsilon, eos_token_id, free)]` of
    `hf_ext.generation.self_terminating`. Plain decoding has no guarantee to end; after `free="sigmoid"` it also reads
    the end's logit as what it was not trained to be.

    Args:
        epsilon: rate of the bound. After `ln 2 / epsilon` tokens the end has half of the probability at least, and
            each target that is not the end costs about `t * epsilon` nats, so it must suit the length of the texts.
        free: where the model's own probability of the end comes from.
        eos_token_id: id of the end; None takes the model's, if it has a single one.
        clean_loss_every: see `Objective`; the clean loss is that of the plain softmax.
        without_logits: see `Objective`.

    Raises:
        ValueError: an option is out of range; in training, the model has no end or several ones.

    Source:
        "A Non-monotonic Self-terminating Language Model" (arXiv:2210.00660), equation 10.

    Example:
        >>> SelfTerminating(epsilon=1e-3).describe()["options"]["free"]
        'sigmoid'
        >>> SelfTerminating(epsilon=1)
        Traceback (most recent call last):
        ...
        ValueError: epsilon must be a number from 0 up to but not including 1, got 1
    """

    slug: ClassVar[str] = "non-monotonic-self-terminating-lm"
    paper: ClassVar[str] = "A Non-monotonic Self-terminating Language Model (arXiv:2210.00660)"

    epsilon: float = 5e-4
    free: Free = "sigmoid"
    eos_token_id: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self.epsilon, self.eos_token_id, self.free)

    def setup(self, model: nn.Module, processing_class: Any, args: TrainingArguments) -> None:
        """Find the end of texts."""
        self._eos = self.eos_token_id
        if self._eos is None:
            config: Any = model.config
            found = config.get_text_config(decoder=True).eos_token_id
            if not isinstance(found, int):
                raise ValueError(
                    f"{self.name} bounds the probability of one token that ends a text, and the model's config has "
                    f"eos_token_id={found!r}; name the one that your data use: {type(self).__name__}(eos_token_id=...)"
                )
            self._eos = found

    def is_plain(self) -> bool:
        """Tell whether the options are those of plain training."""
        return self.epsilon == 0 and self.free == "softmax"

    def apart(self) -> int | None:
        """Name the end: the others share what it leaves by their softmax."""
        return self._eos

    def statistics_loss(self, statistics: Any, targets: Tensor, **extra: Any) -> tuple[Tensor, Tensor]:
        """Return the sum of the negative log-likelihoods and the number of targets."""
        count = torch.as_tensor(targets.numel())
        if self.is_plain():
            return statistics.nll.sum(), count
        places = noise.document_positions(self.batch)[self.rows, self.columns]
        end_loss, stay = termination(statistics, places.to(targets.device) + 1, self.epsilon, self.free)
        assert self._eos is not None
        ends = targets.eq(self._eos)
        losses = torch.where(ends, end_loss, statistics.nll - stay)
        with torch.no_grad():
            self.record("end_probability", (-end_loss).exp().sum(), count)
            self.record("end_loss", (losses * ends).sum(), ends.sum())
        return losses.sum(), count


def termination(statistics: Any, read: Tensor, epsilon: float, free: str) -> tuple[Tensor, Tensor]:
    """Return `-log p(end)`, and the logarithm of what is left for the others.

    Args:
        statistics: `apart`, the end's logit, and `lse` of the others.
        read: number of tokens that were read, from 1.
        epsilon: rate of the bound.
        free: see `SelfTerminating`.

    Example:
        >>> from hf_ext.kernels.linear_loss import TokenStatistics
        >>> zeros = TokenStatistics(torch.zeros(1), apart=torch.zeros(1), lse=torch.tensor([2.0]).log())
        >>> [x.exp() for x in termination(zeros, torch.ones(1), 0.1, "softmax")]  # the end: 1 - 0.9 * 2/3
        [tensor([2.5000]), tensor([0.6000])]
    """
    own = statistics.apart - statistics.lse if free == "softmax" else statistics.apart
    bound = read.to(own.dtype) * math.log1p(-epsilon)
    goes_on = functional.logsigmoid(-own)
    # A sum of two logarithms, since 1 - exp(stay) loses a small probability to rounding.
    end = torch.logaddexp((-torch.expm1(bound)).log() + goes_on, functional.logsigmoid(own))
    return -end, goes_on + bound
