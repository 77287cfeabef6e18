"""Dynamic loss-based sample reweighting (arXiv:2502.06733): rows weigh by how their losses compare in the batch.

The mean losses of the rows of the whole batch are brought to [-1, 1], a strategy makes a preference of
each, and a softmax with a temperature makes weights of them. Weights are constants: no gradient flows
through them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from hf_ext import adapter
from hf_ext.layers import in_evaluation
from hf_ext.trainer_callbacks.clean_loss import shifted_targets
from hf_ext.trainer_callbacks.documents import split_clean
from hf_ext.trainer_callbacks.installation import objectives_on
from hf_ext.trainer_callbacks.objective import Objective
from hf_ext.trainer_callbacks.statistics import loss_of_statistics
from hf_ext.trainer_callbacks.tap import texts_of

#: What each strategy makes of a loss h in [-1, 1]; it sees no others.
STRATEGIES: dict[str, Callable[[Tensor], Tensor]] = {
    "linupper": lambda h: (h + 1).clamp(max=1),
    "quadratic": lambda h: 1 - h.square(),
    "extremes": lambda h: h.abs(),
}


def factors(
    losses: Sequence[Tensor], strategy: str, temperature: float, reduce: Callable[[Tensor, str], Tensor] | None = None
) -> list[Tensor]:
    """Return n times the weight of each row, so that equal weights are ones.

    `h = (2 l - max - min) / (max - min)`, `w = softmax(f(h) / temperature)`, over all rows given.

    Args:
        losses: (rows,) for each micro-batch; NaN for a row without targets, which has no weight.
        strategy: one of `STRATEGIES`: "linupper" min(h + 1, 1), "quadratic" 1 - h², "extremes" |h|.
        temperature: of the softmax.
        reduce: joins a scalar of all processes by "min", "max" or "sum"; None for one process.

    Example:
        >>> [one] = factors([torch.tensor([1.0, 2.0, 3.0])], "linupper", temperature=1.0)
        >>> [round(value, 3) for value in one.tolist()]  # e^0, e^1, e^1
        [0.466, 1.267, 1.267]
    """
    joined = reduce or (lambda value, how: value)
    together = torch.cat([part.detach().float() for part in losses])
    real = ~together.isnan()
    low = joined(together.masked_fill(~real, math.inf).min(), "min")
    high = joined(together.masked_fill(~real, -math.inf).max(), "max")
    # equal losses are all in the middle, and get equal weights
    h = (2 * together - high - low) / (high - low).clamp(min=1e-6)
    preference = STRATEGIES[strategy](h) / temperature
    top = joined(preference.masked_fill(~real, -math.inf).max(), "max")
    powers = torch.where(real, (preference - top).exp(), 0.0)
    weights = powers * joined(real.sum(), "sum") / joined(powers.sum(), "sum")
    return list(weights.split([len(part) for part in losses]))


@dataclass(eq=False)
class DynamicLossReweighting(Objective):
    """Weigh each row of the global batch by its loss, through `attach(trainer, DynamicLossReweighting(...))`.

    The global batch is all micro-batches of an update in all processes. A batch that comes in one
    micro-batch is weighed by the losses of its own training pass. Otherwise the losses are needed
    before the first backward pass, and a forward pass without gradients over the micro-batches finds
    them, about a third of a step. That needs `attach`; without accumulation it may be a plain callback.

    Each token's loss is multiplied by n times the weight of its row, n rows in all, and the sum divided
    by the number of targets. Where all rows have equally many targets, as in pre-training, that is the
    paper's weighted mean of the rows' mean losses; otherwise long rows keep their share. In packed rows, whose
    `position_ids` start again, each text counts as a row.

    Args:
        strategy: what is preferred: "linupper" rows of at least middling loss (the paper's best for
            pre-training), "quadratic" rows of middling loss, "extremes" the easiest and the hardest.
        temperature: of the softmax over rows; smaller is bolder, infinite is plain training, bit for bit.
        warmup_steps: how many first updates have another temperature, since at first a loss says little.
        warmup_temperature: the temperature until then.
        seed: not used.
        clean_loss_every: see `Objective`.
        without_logits: see `Objective`.

    Raises:
        ValueError: an option is out of range; at the beginning of training, gradients are accumulated
            and the objective is not attached.

    Example:
        >>> DynamicLossReweighting("quadratic").describe()["options"]["strategy"]
        'quadratic'
        >>> DynamicLossReweighting("mid")
        Traceback (most recent call last):
        ...
        ValueError: strategy must be one of linupper, quadratic, extremes, got 'mid'
    """

    slug: ClassVar[str] = "dynamic-loss-reweighting"
    paper: ClassVar[str] = (
        "Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining (arXiv:2502.06733)"
    )
    additive: ClassVar[bool] = False  # weights depend on all rows of the batch

    strategy: str = "linupper"
    temperature: float = 0.4
    warmup_steps: int = 0
    warmup_temperature: float = math.inf

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {self.strategy!r}")
        for name in ("temperature", "warmup_temperature"):
            value = getattr(self, name)
            if isinstance(value, bool) or not value > 0:
                raise ValueError(f"{name} must be a positive number or infinite, got {value!r}")
        if isinstance(self.warmup_steps, bool) or not isinstance(self.warmup_steps, int) or self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be a number of steps, got {self.warmup_steps!r}")
        self._planned: Iterator[Tensor] | None = None
        self._ahead: Tensor | None = None  # filled with the losses of samples while looking ahead
        self._window: Mapping[str, Any] = {}  # the batch that is looked at then

    def has(self, hook: str) -> bool:
        """Tell whether the objective uses `hook`: it looks ahead only where it is attached."""
        return super().has(hook) and (hook != "on_window" or getattr(self, "_attached", False))

    def setup(self, model: nn.Module, processing_class: Any, args: TrainingArguments) -> None:
        """Refuse accumulation that cannot be looked through."""
        self._planned = None
        if args.gradient_accumulation_steps > 1 and not self.attached:
            raise ValueError(
                "DynamicLossReweighting needs to see the whole accumulated batch before its first backward pass, "
                "which a callback cannot: use attach(trainer, DynamicLossReweighting(...))."
            )

    def on_window(self, trainer: Any, batches: Sequence[Mapping[str, Any]]) -> None:
        """Find the weights of an accumulated batch before its first training pass."""
        self._planned = None
        if len(batches) > 1 and math.isfinite(self._temperature()):
            losses = [self._losses_ahead(trainer, batch) for batch in batches]
            self._planned = iter(self._factors(losses))

    def is_plain(self) -> bool:
        """Tell whether no row weighs more than another at this step."""
        return not math.isfinite(self._temperature())

    def statistics_loss(self, statistics: Any, targets: Tensor, **extra: Any) -> tuple[Tensor, Tensor]:
        """Return the weighted sum and the number of targets."""
        count = torch.as_tensor(targets.numel())
        if self._ahead is not None:
            self._ahead = _sample_losses(statistics.nll, *self._samples(self._window))
            return statistics.nll.sum(), count
        if not math.isfinite(self._temperature()):
            return statistics.nll.sum(), count
        numbers, total = self._samples(self.batch)
        if self._planned is not None:
            weights = next(self._planned)
        else:
            [weights] = self._factors([_sample_losses(statistics.nll, numbers, total)])
        return (weights[numbers.to(weights.device)] * statistics.nll).sum(), count

    def _temperature(self) -> float:
        return self.warmup_temperature if self._state.global_step < self.warmup_steps else self.temperature

    def _factors(self, losses: Sequence[Tensor]) -> list[Tensor]:
        found = factors(losses, self.strategy, self._temperature(), _over_processes())
        together, real = torch.cat(found), (~torch.cat(list(losses)).isnan()).sum()
        # rows that would weigh as much if they weighed the same: n for equal weights
        self.record("reweighting_effective_share", together.sum() ** 2 / together.square().sum(), real)
        return found

    def _samples(self, batch: Mapping[str, Any]) -> tuple[Tensor, int]:
        """Number the sample of each target: its row, or its text where the positions of a row start again."""
        positions = batch.get("position_ids")
        if batch.get("input_ids") is None or positions is None or positions.dim() != 2:
            return self.rows, _rows_of(batch)
        return texts_of({name: batch[name] for name in ("input_ids", "position_ids")}, self.rows, self.columns)

    @torch.no_grad()
    def _losses_ahead(self, trainer: Any, batch: Mapping[str, Any]) -> Tensor:
        """Return the mean losses of the rows that the training pass is going to find, dropout aside."""
        model, bare = trainer.model_wrapped, trainer.accelerator.unwrap_model(trainer.model_wrapped)
        inputs = adapter.prepared_inputs(trainer, split_clean(batch)[0])
        for other in objectives_on(bare):
            inputs = other.corrupt(dict(inputs)) if other.has("corrupt") else inputs
        shift = not getattr(bare.config, "is_encoder_decoder", False)
        targets = shifted_targets(inputs.get("labels"), inputs.get("shift_labels"), shift=shift)
        if shift:  # nothing is computed from labels
            inputs = {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
        head = None
        if self._installation is not None and self._installation.head is not None:
            head = self._installation.head
            inputs = head.begin(inputs)
        with in_evaluation(model), trainer.compute_loss_context_manager():
            outputs = model(**inputs)
        beyond = 0 if head else outputs.logits.shape[1] - targets.shape[1]  # prompt tuning puts virtual tokens first
        self._ahead, self._window = torch.empty(0), inputs
        try:
            loss_of_statistics(self, head, outputs.logits[:, beyond:], targets, {})
            return self._ahead
        finally:
            self._ahead, self._window = None, {}


def _rows_of(batch: Mapping[str, Any]) -> int:
    """Return how many rows a batch has."""
    return len(next(value for value in batch.values() if isinstance(value, Tensor) and value.dim() > 1))


def _sample_losses(nll: Tensor, numbers: Tensor, total: int) -> Tensor:
    """Return the mean loss of each of `total` samples; NaN for those without targets."""
    nll, numbers = nll.detach().float(), numbers.to(nll.device)
    sums = nll.new_zeros(total).index_add_(0, numbers, nll)
    return sums / nll.new_zeros(total).index_add_(0, numbers, torch.ones_like(nll))


def _over_processes() -> Callable[[Tensor, str], Tensor] | None:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return None

    def reduce(value: Tensor, how: str) -> Tensor:
        joined = value.clone()
        distributed.all_reduce(joined, getattr(distributed.ReduceOp, how.upper()))
        return joined

    return reduce
