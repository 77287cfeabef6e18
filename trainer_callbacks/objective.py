"""The base of all training objectives: a `TrainerCallback` that changes what one model trains on.

A callback is handed the model but neither the batch nor the loss. So when training begins, an
objective puts a forward pre-hook on the model instance (and, if it has a token loss, sets the
instance's `loss_function`), and takes both off when training ends. Nothing is patched globally,
the hook does nothing outside training, and `print(objective.installed())` says what is where.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_ext import adapter
from hf_ext.trainer_callbacks import cards, noise
from hf_ext.trainer_callbacks.clean_loss import clean_loss, next_token_loss
from hf_ext.trainer_callbacks.conflicts import refuse_arguments
from hf_ext.trainer_callbacks.documents import split_clean
from hf_ext.trainer_callbacks.hooks import ATTACHED_HOOKS, HOOKS, LOSS_HOOKS, WITHOUT_LOGITS, Hooks
from hf_ext.trainer_callbacks.installation import Installation, objectives_on
from hf_ext.trainer_callbacks.meters import Meters
from hf_ext.trainer_callbacks.statistics import loss_of_distributions, loss_of_statistics

#: With `logging_strategy="epoch"` over data of unknown length, measure the clean loss this often.
STEPS_WITHOUT_EPOCH_LENGTH = 100


@dataclass(eq=False)
class Objective(Hooks, TrainerCallback):
    """A training objective for `Trainer(..., callbacks=[Objective(...)])`.

    Subclass it as a dataclass (`@dataclass(eq=False)`), one field an option, and define some of

    - `corrupt(inputs) -> inputs`: change what the model reads. Gets the batch on the device and
      returns a changed copy; labels stay. Draw random numbers with `self.uniform(inputs)`: they
      depend on seed, optimizer step and position only, so that no split of the batch, no padding,
      no number of processes and no resume changes them.
    - `token_loss(logits, targets, **extra) -> (sum, count)`: replace the loss. `logits[:, i]`
      predicts `targets[:, i]`, -100 is ignored. The engine divides the sum by the number of targets
      in the whole accumulated batch; `count` serves only where the Trainer does not know that.
    - `loss_on_hidden(states, logits, targets, to_logits, **extra) -> (sum, count)`: the same with the
      states between the layers that `states_needed()` names; `to_logits` applies final norm and head.
    - `statistics_loss(statistics, targets, **extra) -> (sum, count)`: the same for losses that need no
      more of each distribution than a few numbers (see `hf_ext.kernels.linear_loss.TokenStatistics`),
      and so can do without the logits.
    - `distribution_loss(logits, targets, **extra) -> (sum, count)`: likewise for losses that need whole
      distributions, but of a few tokens at a time (see `hf_ext.kernels.linear_logits.Logits`).
    - `on_layer(index, before, after, batch) -> after`: change what a decoder layer passes on.
    - `on_gradients(model, optimizer)`: change the accumulated gradients before the optimizer steps.

    and, through `attach(trainer, objective)` only,

    - `step(trainer, model, inputs, num_items_in_batch) -> loss`: replace the computation of the
      loss, with as many forward passes as it takes.
    - `training_step(trainer, model, inputs, num_items_in_batch) -> loss`: replace the backward pass, too.
    - `make_optimizer(model, args) -> optimizer`: replace the Trainer's optimizer.
    - `on_window(trainer, batches)`: see all micro-batches of the coming optimizer step.

    What changes labels or lengths is a `hf_ext.trainer_callbacks.Rewriting` instead. Objectives
    compose: any number may change documents, batches and gradients, one may replace the loss.

    `setup` runs when training begins; `self.record(name, total, count)` logs an average; `self.batch`
    is the batch that the model reads.

    Args:
        seed: base of all random numbers; the Trainer's `args.seed` if None.
        clean_loss_every: measure the next-token loss on the uncorrupted batch each time the step is
            a multiple of this; None for the steps that are logged, 0 for never. With a corruption
            it costs one more forward pass (about a third of a step) at those steps, otherwise a
            cross-entropy over logits that are there already. It is logged as `clean_loss`.
        without_logits: True to never build the vocabulary-sized logits: the loss is computed from the last
            hidden states, a part at a time. For objectives with `statistics_loss` or `distribution_loss`, on models
            whose logits are those of their head alone, up to a scale or soft-capping. None does so where
            the model allows it and nobody else reads the logits (a trainer with a `compute_loss` of its own
            may, SFTTrainer for one); `installed()` says which. False for never. Objectives with `few_targets` that
            do not replace the loss leave out the logits that have no target, under the same conditions.

    Example:
        >>> @dataclass(eq=False)
        ... class Confident(Objective):
        ...     power: float = 2.0
        ...     def token_loss(self, logits, targets, **extra):
        ...         kept = targets != -100
        ...         nll = -logits.log_softmax(-1)[kept].gather(-1, targets[kept][:, None])
        ...         return (nll**self.power).sum(), kept.sum()
        >>> Confident(power=1.5).describe()["options"]["power"]
        1.5
    """

    #: slug, as `hf-ext list` prints it; None for the class name in lower case
    slug: ClassVar[str | None] = None
    #: title and identifier of the paper
    paper: ClassVar[str] = ""
    #: which of "entropy", "expectation", "best" `statistics_loss` reads beside the `nll`
    statistics_needed: ClassVar[frozenset[str]] = frozenset()
    #: whether passes leave so few targets that the model's own loss is computed of these alone; see `targets_only`
    few_targets: ClassVar[bool] = False
    #: whether `statistics_loss` of all targets is the sum of those of any parts of them; then it may be asked in parts
    additive: ClassVar[bool] = True

    seed: int | None = field(default=None, kw_only=True)
    clean_loss_every: int | None = field(default=None, kw_only=True)
    without_logits: bool | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.clean_loss_every is not None and self.clean_loss_every < 0:
            raise ValueError(f"clean_loss_every must be None, 0 or a number of steps, got {self.clean_loss_every}")
        if self.without_logits and not self.can_leave_out_logits:
            raise ValueError(f"{self.name} needs the logits (it has no statistics_loss); drop without_logits=True")
        self._targets_only = False
        self._installation: Installation | None = None
        self._meters = Meters()
        self._attached = False
        self._popped_labels: Tensor | None = None
        self._inputs: Mapping[str, Any] = {}
        #: in `statistics_loss` and `distribution_loss`: (targets,), row and column that each target is predicted from
        self.rows: Tensor = torch.empty(0, dtype=torch.long)
        self.columns: Tensor = self.rows

    # -- what a subclass may use --------------------------------------------------------------------

    def uniform(self, inputs: Mapping[str, Any], *, stream: int = 0, per_document: bool = False) -> Tensor:
        """Draw a number in [0, 1) for each position; see `hf_ext.trainer_callbacks.noise.uniform`."""
        return noise.uniform(
            inputs, seed=self._seed, step=self._state.global_step, stream=stream, per_document=per_document
        )

    def record(self, name: str, total: Tensor, count: Tensor | int = 1) -> None:
        """Log the average `total / count` as `name`, over micro-batches, steps and processes."""
        self._meters.add(name, total, count)

    @property
    def batch(self) -> Mapping[str, Any]:
        """The batch that the model reads in this training pass, as it reads it; empty outside of one."""
        return self._inputs

    # -- what a user may ask ------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The objective's slug."""
        return self.slug or type(self).__name__.lower()

    def has(self, hook: str) -> bool:
        """Tell whether the subclass defines `hook` (one of `HOOKS`)."""
        return getattr(type(self), hook) is not getattr(Objective, hook)

    @property
    def loss_hook(self) -> str | None:
        """Name of the hook that replaces the loss on the model's logits, if one does."""
        return next((hook for hook in LOSS_HOOKS if self.has(hook)), None)

    @property
    def can_leave_out_logits(self) -> bool:
        """Whether the loss can do without the logits of all tokens."""
        return self.few_targets or any(self.has(hook) for hook in WITHOUT_LOGITS)

    @property
    def replaces_loss(self) -> str | None:
        """Name of the hook that replaces the loss, on the logits or altogether, if one does."""
        return self.loss_hook or next((hook for hook in ("step", "training_step") if self.has(hook)), None)

    @property
    def needs_attach(self) -> list[str]:
        """The hooks for which `attach(trainer, objective)` is needed."""
        return [hook for hook in ATTACHED_HOOKS if self.has(hook)]

    @property
    def attached(self) -> bool:
        """Whether `attach` gave the objective to a trainer."""
        return self._attached

    @property
    def corrupts(self) -> bool:
        """Whether the logits of a training pass are not those of a plain one."""
        return self.has("rewrite") or self.has("corrupt") or self.has("on_layer")

    def describe(self) -> dict[str, Any]:
        """Return name, paper, options and hooks, for logs and model cards."""
        options = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        hooks = [hook for hook in HOOKS if self.has(hook)]
        return {"objective": self.name, "paper": self.paper, "options": options, "hooks": hooks}

    def installed(self) -> list[str]:
        """Say what the objective has put on the model, one line each; empty outside training."""
        lines = list(self._installation.lines) if self._installation is not None else []
        return [*lines, "mixin on the trainer's class (see attach)"] if self._attached else lines

    def remove(self) -> None:
        """Take the objective off the model. Training calls it at its end.

        If training raises, a plain callback is not told: call this then, or use `attach`, which does.
        """
        if self._installation is not None:
            self._installation.remove()
            self._installation = None
        self._meters.clear()
        self._popped_labels = None
        self._inputs = {}

    # -- Trainer events -----------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check for conflicts and install the hooks."""
        self.remove()  # a run before this one may have raised
        refuse_arguments(self, args)
        model = extract_model_from_parallel(kwargs["model"], keep_torch_compile=False)
        self._args, self._state = args, state
        self._seed = args.seed if self.seed is None else self.seed
        self._steps_per_epoch = _steps_per_epoch(kwargs.get("train_dataloader"), args)
        self._batches = self._losses = 0
        self.setup(model, kwargs.get("processing_class"), args)
        self._installation = Installation(self, model, args, adapter.calling_trainer(self))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start counting the batches that pass through the hooks."""
        self._batches = self._losses = 0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop before an update that the objective had no part in; let it change the gradients."""
        if (self.has("corrupt") or self.has("on_layer")) and not self._batches:
            raise RuntimeError(
                f"{self.name} saw no batch in this step: the training step does not call the model that the Trainer "
                "gave to its callbacks. An objective needs a Trainer that calls `model(**inputs)`."
            )
        if self.loss_hook and not self._losses:
            raise RuntimeError(
                f"{self.name}.{self.loss_hook} was not asked in this step: something computes the loss without the "
                f"model's `loss_function` (a user `compute_loss_func`, a fused loss such as Liger's, or the model's "
                f"own code). Switch that off, or use attach(trainer, {type(self).__name__}(...))."
            )
        if self.has("on_gradients"):
            self.on_gradients(kwargs["model"], kwargs.get("optimizer"))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the objective's averages to the Trainer's training log."""
        if logs is None or "loss" not in logs:
            return
        terms = self._meters.drain()
        logs.update(terms)  # for the callbacks after this one
        state.log_history[-1].update(terms)  # the Trainer copied the logs before it asked

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model as it was, and the objective's description beside the checkpoints."""
        self.remove()
        if args.should_save and Path(args.output_dir).is_dir():  # a run that saves nothing makes no folder
            cards.write_description(self.describe(), args.output_dir)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the objective's description beside the checkpoints, and into the card, if there is one already."""
        if args.should_save:
            cards.write_description(self.describe(), args.output_dir)
            self._add_to_card(args, state, kwargs["model"])

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tag the model, for the card that the Trainer is about to write, and add the description to what is pushed."""
        cards.tag(kwargs.get("model"), self.name)
        if args.should_save:
            cards.write_description(self.describe(), args.output_dir)
            self._add_to_card(args, state, kwargs["model"])

    def _add_to_card(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        """Add the section on all objectives of the training to the card that the trainer wrote, once."""
        here = objectives_on(extract_model_from_parallel(model, keep_torch_compile=False))
        if here[:1] == [self]:
            cards.add_section(args.output_dir, [one.describe() for one in here], state.log_history)

    # -- the engine: called by the hooks ------------------------------------------------------------

    def on_batch(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        """Take a training batch on its way into the model and return the one it shall read."""
        self._batches += 1
        if self.loss_hook and inputs.get("fused_lm_head"):
            raise ValueError(
                f"{self.name} replaces the loss on logits, but this TRL trainer fuses the head with the loss and "
                f"builds no logits. Use attach(trainer, {type(self).__name__}(...)), which computes the logits for it."
            )
        inputs, clean = split_clean(inputs)  # the first objective on the model sees it, and leaves none for the others
        here = objectives_on(model)
        if here[:1] == [self] and self.clean_loss_due() and _measured_by_a_pass(here):
            self.measure_clean_loss(model.forward, model, clean or inputs)
        if self.has("corrupt"):
            inputs = self._corrupted(inputs)
        if self.loss_hook:
            self._inputs = inputs
        if self._installation is not None:
            self._installation.begin(inputs, self.states_needed() if self.has("loss_on_hidden") else ())
            if self._installation.head is not None and (self.without_logits or not self.is_plain()):
                inputs = self._installation.head.begin(inputs)
        # the last one on the model knows what all have made of the batch
        return _without_idle_logits(here, inputs) if here[-1:] == [self] else inputs

    def _corrupted(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if inputs.get("input_ids") is None:
            raise ValueError(f"{self.name} changes input_ids, but the batch has only: {', '.join(inputs)}")
        versions = {name: value._version for name, value in inputs.items() if isinstance(value, Tensor)}
        changed = self.corrupt(dict(inputs))
        for name, version in versions.items():
            if inputs[name]._version != version:
                raise RuntimeError(f"{self.name}.corrupt changed {name} in place; return a changed copy instead")
        for name in ("labels", "shift_labels"):
            if changed.get(name) is not inputs.get(name):
                raise ValueError(
                    f"{self.name}.corrupt changed {name}, but the Trainer has counted the targets already, so the loss "
                    "would be divided by a wrong number. Change labels in the data or in the collator."
                )
        return changed

    def reduce_token_loss(
        self, logits: Tensor, targets: Tensor, num_items_in_batch: Tensor | int | None, **extra: Any
    ) -> Tensor:
        """Turn the sum of `token_loss` into the loss that the Trainer accumulates."""
        self._losses += 1
        if num_items_in_batch is None:
            self.refuse_unknown_count()
        assert self._installation is not None
        measure = self.clean_loss_due() and not any(o.corrupts for o in objectives_on(self._installation.model))
        if self.can_leave_out_logits:
            head = self._installation.head
            armed = head if head is not None and head.armed else None
            ask = loss_of_statistics if self.has("statistics_loss") else loss_of_distributions
            total, count, plain = ask(self, armed, logits, targets, extra)
            if measure:
                self.record("clean_loss", plain() if callable(plain) else plain, (targets != -100).sum())
        else:
            if measure:  # with a corruption, it was measured before
                with torch.no_grad():
                    self.record("clean_loss", *next_token_loss(logits.detach(), targets))
            if self.has("loss_on_hidden"):
                states, to_logits = self._installation.finish()
                total, count = self.loss_on_hidden(states, logits, targets, to_logits, **extra)
            else:
                total, count = self.token_loss(logits, targets, **extra)
        self._inputs, self.rows, self.columns = {}, self.rows[:0], self.columns[:0]
        if total.dim():
            raise ValueError(
                f"{self.name}.{self.loss_hook} must return a summed scalar, got shape {tuple(total.shape)}"
            )
        denominator = count if num_items_in_batch is None else num_items_in_batch
        return total / (denominator.to(total.device) if isinstance(denominator, Tensor) else denominator)

    def refuse_unknown_count(self) -> None:
        """Raise if gradients would depend on the split because nobody counted the targets."""
        if self._args.gradient_accumulation_steps > 1 or self._args.world_size > 1:
            raise ValueError(
                f"{self.name} needs num_items_in_batch to accumulate gradients, but the Trainer passes none: the "
                "model's forward must accept **kwargs (Trainer.model_accepts_loss_kwargs) and batches need labels."
            )

    def measure_clean_loss(self, forward: Any, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Record the next-token loss on a batch that is not corrupted yet."""
        known = dict(inputs)
        if known.get("labels") is None and known.get("shift_labels") is None:
            if self._popped_labels is None:
                return  # label smoothing or compute_loss_func took the labels away, and only attach sees them
            known["labels"] = self._popped_labels
        self.record("clean_loss", *clean_loss(forward, model, known))

    def clean_loss_due(self) -> bool:
        """Tell whether this optimizer step measures the clean loss."""
        upcoming, args, every = self._state.global_step + 1, self._args, self.clean_loss_every
        if every is not None:
            return every > 0 and upcoming % every == 0
        if args.logging_strategy == "epoch":
            return upcoming % self._steps_per_epoch == 0
        if args.logging_strategy != "steps":
            return False
        return upcoming % self._state.logging_steps == 0 or (upcoming == 1 and args.logging_first_step)


def _steps_per_epoch(loader: Any, args: TrainingArguments) -> int:
    try:
        return math.ceil(len(loader) / args.gradient_accumulation_steps)
    except TypeError:  # an iterable dataset has no length
        return STEPS_WITHOUT_EPOCH_LENGTH


def _without_idle_logits(objectives: list[Objective], inputs: dict[str, Any]) -> dict[str, Any]:
    """Ask for no logits where one of the objectives left few targets, and all that reads them is the model's loss."""
    if inputs.get("labels") is None or any(one.replaces_loss for one in objectives):
        return inputs
    for one in objectives:
        installation = one._installation
        if one._targets_only and installation is not None and installation.targets_only is not None:
            return installation.targets_only.begin(inputs)
    return inputs


def _measured_by_a_pass(objectives: list[Objective]) -> bool:
    """Tell whether the clean loss takes a forward pass of its own, on the way into the model.

    Not where the logits of the training pass give it (see `reduce_token_loss`), and not where an
    attached objective replaces the step: that may call the model several times (see `attachment`).
    """
    if any(objective.has("step") or objective.has("training_step") for objective in objectives):
        return False
    return any(objective.corrupts for objective in objectives) or not any(o.loss_hook for o in objectives)
