"""Put an objective's hooks on one model instance, and take them off again without a trace."""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainingArguments

from hf_ext.layers import TargetEnds, decoder_layers
from hf_ext.trainer_callbacks.clean_loss import shifted_targets
from hf_ext.trainer_callbacks.conflicts import refuse_company
from hf_ext.trainer_callbacks.logits_readers import reader_of_logits
from hf_ext.trainer_callbacks.plain_head import PlainHead
from hf_ext.trainer_callbacks.targets_only import TargetsOnly

if TYPE_CHECKING:
    from hf_ext.trainer_callbacks.objective import Objective

logger = logging.getLogger(__name__)


class Installation:
    """What one objective has put on one model.

    Only weak references lead back to the objective: if training raises and the Trainer is thrown
    away, the objective dies with it and its hooks leave the model.

    Args:
        objective: whose hooks to install.
        model: the unwrapped model (a `PeftModel` is taken as it is, its base model gets the loss).
        args: of the training.
        trainer: that trains the model, None if it is not known.
    """

    def __init__(
        self, objective: Objective, model: nn.Module, args: TrainingArguments, trainer: Trainer | None = None
    ) -> None:
        refuse_company(objective, objectives_on(model))
        self.model = model
        corrupts = f"{objective.name}.corrupt, " if objective.has("corrupt") else ""
        self.lines = [f"forward pre-hook on {type(model).__name__}: {corrupts}clean next-token loss"]
        self._handle = model.register_forward_pre_hook(_BatchHook(objective, model), with_kwargs=True)
        self._loss_owner: nn.Module | None = None
        if objective.loss_hook:
            self._replace_loss(objective, model)
        self._layer_handles: list[Any] = []
        self._undo: list[Callable[[], None]] = []
        self.head: PlainHead | None = None
        self.targets_only: TargetsOnly | None = None
        if objective.can_leave_out_logits and objective.without_logits is not False:
            self._leave_out_logits(objective, model, args, trainer)
        self._batch: dict[str, Any] = {}
        self._wanted: set[int] = set()
        self.ends: TargetEnds | None = None
        self._states: dict[int, Tensor] = {}
        self.quiet = False
        if objective.has("on_layer") or objective.has("loss_on_hidden"):
            self._hook_layers(objective, model)
        if args.torch_compile:
            torch.compiler.reset()  # what was compiled before does not notice that hooks have come since
        self._finalizer = weakref.finalize(objective, self._take_off)

    def remove(self) -> None:
        """Take everything off the model. Calling it twice does nothing."""
        self._finalizer()

    def add(self, line: str, undo: Callable[[], None]) -> None:
        """Take note of something else that was put somewhere, and of how to take it off.

        Args:
            line: what was put where, for `Objective.installed()`.
            undo: takes it off; must hold no reference to the objective.
        """
        self.lines.append(line)
        self._undo.append(undo)

    def begin(self, batch: dict[str, Any], wanted: Iterable[int]) -> None:
        """Collect the wanted states of the training pass over `batch` that comes now."""
        self._batch, self._wanted = batch, set(wanted)
        self._states.clear()

    def finish(self) -> tuple[dict[int, Tensor], Any]:
        """Return the collected states and what turns a state into logits, and collect no more."""
        states, self._states = self._states, {}
        missing, self._wanted = self._wanted - set(states), set()
        if missing or any(not state.requires_grad for state in states.values()):
            raise RuntimeError(
                f"the states after layers {sorted(missing) or sorted(states)} cannot be trained on: gradient "
                'checkpointing hides them. Use gradient_checkpointing_kwargs={"use_reentrant": False} or none.'
            )
        return states, ToLogits(self)

    def _leave_out_logits(
        self, objective: Objective, model: nn.Module, args: TrainingArguments, trainer: Trainer | None
    ) -> None:
        """Train without logits, or say why not where that was left open."""
        reason = None if objective.without_logits else reader_of_logits(objective, model, args, trainer)
        if reason is None:
            try:
                if objective.few_targets:
                    self.targets_only = TargetsOnly(model)
                else:
                    self.head = PlainHead(model)
            except ValueError as error:
                if objective.without_logits:
                    raise
                reason = str(error)
        head = self.head if self.targets_only is None else self.targets_only.head
        self.lines.append(f"nothing for the head: logits are built, since {reason}" if head is None else head.line)
        if head is None:
            logger.info("%s: logits are built, since %s", objective.name, reason)

    def _hook_layers(self, objective: Objective, model: nn.Module) -> None:
        self.ends = None if isinstance(model, FSDPModule) else TargetEnds(model)
        layers = decoder_layers(model)
        duties = [hook for hook in ("on_layer", "loss_on_hidden") if objective.has(hook)]
        self.lines.append(f"forward hooks on {len(layers)} layers: {', '.join(duties)}")
        for index, layer in enumerate(layers):
            hook = _LayerHook(objective, self, index, layer)
            self._layer_handles.append(layer.register_forward_hook(hook, with_kwargs=True))

    def _replace_loss(self, objective: Objective, model: nn.Module) -> None:
        module: Any = model
        owner = module.get_base_model() if hasattr(module, "get_base_model") else module
        self._loss_owner = owner
        self._had_loss = "_loss_function" in vars(owner)
        self._original_loss = owner.loss_function
        owner.loss_function = _LossHook(objective, owner, owner.loss_function)
        self.lines.append(f"loss_function of {type(owner).__name__}: {objective.name}.{objective.loss_hook}")

    def _take_off(self) -> None:
        self._handle.remove()
        for undo in self._undo:
            undo()
        self._undo.clear()
        if self.head is not None:
            self.head.remove()
        if self.targets_only is not None:
            self.targets_only.remove()
        for handle in self._layer_handles:
            handle.remove()
        self._states.clear()
        if self._loss_owner is not None:
            # the setter stores the function on the instance; without it the class's own loss is found again
            if self._had_loss:
                self._loss_owner.loss_function = self._original_loss  # type: ignore[assignment]
            else:
                vars(self._loss_owner).pop("_loss_function", None)


class ToLogits:
    """Turn states into logits as the model does: final norm, head, and what else there is."""

    def __init__(self, installation: Installation) -> None:
        self._installation = installation
        ends = installation.ends
        #: Norm and head, where these are all there is and their weights are whole; else None.
        self.shortcut = None if ends is None or isinstance(installation.model, FSDPModule) else ends.shortcut

    def __call__(self, states: Tensor) -> Tensor:
        """Apply norm and head; where that means running the model without its layers, keep their hooks quiet."""
        found = self._installation
        found.quiet = True
        try:
            if found.ends is None:  # of a sharded model, whose parts work within a pass of the whole only
                found.ends = TargetEnds(found.model)
            return found.ends.logits(states)
        finally:
            found.quiet = False


def objectives_on(model: nn.Module) -> list[Objective]:
    """Return the objectives that have their hooks on a model, in the order in which they see a batch."""
    hooks = [hook for hook in model._forward_pre_hooks.values() if isinstance(hook, _BatchHook)]
    return [found for hook in hooks if (found := hook.objective()) is not None]


class _BatchHook:
    """See each training batch on its way into the model: measure the clean loss, then corrupt."""

    def __init__(self, objective: Objective, model: nn.Module) -> None:
        self.objective = weakref.ref(objective)
        self._model = weakref.ref(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> _BatchHook:
        return self  # a copy of the model (an EMA, say) is not the model that trains: see __call__

    @torch.compiler.disable
    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        objective = self.objective()
        if objective is None or model is not self._model() or not (model.training and torch.is_grad_enabled()):
            return None
        inputs = {**_named(model, args), **kwargs}
        return (), objective.on_batch(model, inputs)


class _LayerHook:
    """Let the objective change what a layer passes on in training, and collect it for the loss."""

    def __init__(self, objective: Objective, installation: Installation, index: int, layer: nn.Module) -> None:
        self._objective = weakref.ref(objective)
        self._installation = weakref.ref(installation)
        self._layer = weakref.ref(layer)
        self._index = index

    def __deepcopy__(self, memo: dict[int, Any]) -> _LayerHook:
        return self

    @torch.compiler.disable
    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        objective, installation = self._objective(), self._installation()
        if objective is None or installation is None or layer is not self._layer():
            return None
        if installation.quiet or not (layer.training and torch.is_grad_enabled()):
            return None
        if not isinstance(output, Tensor):
            raise TypeError(f"{type(layer).__name__} returns a {type(output).__name__}, not its hidden states")
        if objective.has("on_layer"):
            before = args[0] if args else kwargs["hidden_states"]
            output = objective.on_layer(self._index, before, output, installation._batch)
        if self._index + 1 in installation._wanted:
            installation._states[self._index + 1] = output
        return output


class _LossHook:
    """Stand in for `model.loss_function`: the objective's loss while training, the model's own otherwise."""

    def __init__(self, objective: Objective, model: nn.Module, original: Any) -> None:
        self._objective = weakref.ref(objective)
        self._model = weakref.ref(model)
        self._original = original

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self._original

    @torch.compiler.disable
    def __call__(
        self,
        logits: Tensor,
        labels: Tensor | None = None,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        shift_labels: Tensor | None = None,
        **extra: Any,
    ) -> Tensor:
        objective, model = self._objective(), self._model()
        if objective is None or model is None or not (model.training and torch.is_grad_enabled()):
            return self._original(
                logits=logits,
                labels=labels,
                vocab_size=vocab_size,
                num_items_in_batch=num_items_in_batch,
                shift_labels=shift_labels,
                **extra,
            )
        targets = shifted_targets(labels, shift_labels)  # type: ignore[arg-type]
        return objective.reduce_token_loss(logits, targets, num_items_in_batch, **extra)


def _named(model: nn.Module, args: tuple[Any, ...]) -> dict[str, Any]:
    """Name the positional arguments of a forward call."""
    return dict(inspect.signature(model.forward).bind_partial(*args).arguments) if args else {}
