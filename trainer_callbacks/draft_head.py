"""Train a drafting head on a frozen target, inside a stock `Trainer` whose model is the target.

An `Objective` comes on when training begins, after the optimizer was made, and changes what the
model itself learns. A head needs to be there earlier and to learn in the model's stead, so this is
a callback of its own: when the Trainer is built, it freezes the target and adds the head to it as a
submodule. Optimizer, gradient clipping, mixed precision, DDP and checkpoints then treat the head
as they treat any weights. A hook on the model's forward replaces the loss by the head's.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput

from hf_ext.layers import TargetEnds, captured, in_evaluation
from hf_ext.trainer_callbacks import noise
from hf_ext.trainer_callbacks.clean_loss import shifted_targets
from hf_ext.trainer_callbacks.installation import objectives_on
from hf_ext.trainer_callbacks.meters import Meters

#: What the head is called in the model while it trains, and its folder in a checkpoint.
NAME = "draft_head"


class TrainDraftHead(TrainerCallback):
    """Train a drafting head with `Trainer(model=target, ..., callbacks=[TrainDraftHead(head)])`.

    While the callback is on the model, a call with labels returns the head's loss: training steps
    train the head, `trainer.evaluate()` measures it (`eval_loss`, `eval_agreement...`), before and
    after training alike. The target runs without dropout and is not changed. The loss is a sum
    over target tokens divided by their number in the whole accumulated batch, over all processes.

    Each checkpoint gets the head by itself in `draft_head/`, to be loaded by `from_pretrained`; the
    checkpoint's own weights hold target and head, so `train(resume_from_checkpoint=...)` goes on
    with the same bits. When training ends the head leaves the model, and `trainer.save_model()`
    saves the plain target. If training raises, call `remove()`.

    Args:
        head: a head made by `for_target(target)`, moved to the target's device.
        seed: base of the random numbers of heads that draw positions; the Trainer's seed if None.

    Raises:
        ValueError: when the Trainer is built: the head is not for this model, the model is wrapped
            by PEFT or has a head already, or the arguments ask for something that cannot work.

    Example:
        >>> from hf_ext.generation.heads import KangarooHead
        >>> from hf_ext.testing.tiny_models import build
        >>> callback = TrainDraftHead(KangarooHead.for_target(build("llama")))
        >>> callback.installed()
        []
    """

    def __init__(self, head: Any, seed: int | None = None) -> None:
        self.head, self.seed = head, seed
        self._attachment: _Attachment | None = None
        self._meters = {True: Meters(), False: Meters()}
        self._batches = 0

    def installed(self) -> list[str]:
        """Say what the callback has put on the model, one line each; empty before and after."""
        return list(self._attachment.lines) if self._attachment is not None else []

    def remove(self) -> None:
        """Take the head and the hooks off the model and unfreeze it. Training calls it at its end."""
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None
        for meters in self._meters.values():
            meters.clear()

    # -- Trainer events ----------------------------------------------------------------------------

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Freeze the target and add the head, before an optimizer is made."""
        model = kwargs["model"]
        if self._attachment is not None:
            raise ValueError("this TrainDraftHead is on a model already: call its remove() before building a Trainer")
        _refuse_conflicts(args, model)
        self.head.check_target(model)
        self._args, self._state = args, state
        self._seed = args.seed if self.seed is None else self.seed
        self._attachment = _Attachment(self, model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the head is what the optimizer trains."""
        if self._attachment is None:
            raise ValueError(
                "TrainDraftHead has to be among the callbacks when the Trainer is built, and serves one training: "
                "Trainer(..., callbacks=[TrainDraftHead(head)]). Build a new Trainer to train again."
            )
        self._state = state
        optimizer = kwargs.get("optimizer")
        if optimizer is not None:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if missing := [name for name, p in self.head.named_parameters() if id(p) not in held]:
                raise ValueError(
                    f"the optimizer does not hold the head's {', '.join(missing)}: do not pass `optimizers=` made from "
                    "the target alone"
                )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start counting the batches that pass through the hook."""
        self._batches = 0
        for other in objectives_on(kwargs["model"]):
            raise ValueError(
                f"TrainDraftHead cannot be combined with the objective {other.name}, which changes what the model "
                "learns: the target is frozen. Take one of them out of the callbacks."
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop before an update that the head had no part in."""
        if not self._batches:
            raise RuntimeError(
                "TrainDraftHead saw no batch with labels in this step: the data needs labels, and the Trainer has to "
                "call `model(**inputs)` with them (no compute_loss_func)."
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the head's averages to the logs of training and evaluation."""
        for training, key, prefix in ((True, "loss", ""), (False, "eval_loss", "eval_")):
            if logs is not None and key in logs:
                terms = {prefix + name: value for name, value in self._meters[training].drain().items()}
                logs.update(terms)
                state.log_history[-1].update(terms)  # the Trainer copied the logs before it asked

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save the head by itself into the checkpoint."""
        if args.should_save:
            self.head.save_pretrained(Path(args.output_dir) / f"checkpoint-{state.global_step}" / NAME)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the target as it was."""
        self.remove()

    # -- called by the hook ------------------------------------------------------------------------

    def loss(
        self, ends: TargetEnds, batch: Mapping[str, Any], targets: Tensor, states: Any, outputs: Any, items: Any
    ) -> Tensor:
        """Return the head's loss on one micro-batch and meter its terms."""
        training = self.head.training and torch.is_grad_enabled()
        self._batches += training
        if training and items is None and (self._args.gradient_accumulation_steps > 1 or self._args.world_size > 1):
            raise ValueError(
                "TrainDraftHead needs num_items_in_batch to accumulate gradients, but the Trainer passes none: the "
                "target's forward must accept **kwargs (Trainer.model_accepts_loss_kwargs)."
            )
        step = self._state.global_step if training else 0  # every evaluation draws the same numbers

        def uniform(inputs: Mapping[str, Any], *, stream: int = 0, per_document: bool = False) -> Tensor:
            return noise.uniform(inputs, seed=self._seed, step=step, stream=stream, per_document=per_document)

        terms = self.head.training_terms(ends, batch, targets, states, outputs, uniform)
        total, count = terms.pop("loss")
        for name, (value, number) in terms.items():
            self._meters[training].add(name, value, number)
        return total / (items if training and items is not None else count)


class _Attachment:
    """The head and the hooks on one model, and how the model was before.

    Only a weak reference leads back to the callback: once it is gone, so are the hooks.
    """

    def __init__(self, callback: TrainDraftHead, model: Any) -> None:
        self.ends = TargetEnds(model)
        self._model, self._head = model, callback.head
        self._callback = weakref.ref(callback)
        self._flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self._modes = [(module, module.training) for module in model.modules()]
        self._pass: contextlib.ExitStack | None = None
        for parameter, _ in self._flags:
            parameter.requires_grad_(False)
        callback.head.to(next(model.parameters()).device).requires_grad_(True)
        model.add_module(NAME, callback.head)
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]
        kind = type(model).__name__
        self.lines = [
            f"submodule {NAME} of {kind}: {type(callback.head).__name__}",
            f"forward hooks on {kind}: the head's loss in place of the model's",
            f"requires_grad off on {len(self._flags)} parameters of {kind}",
        ]
        self._finalizer = weakref.finalize(callback, self._take_off)

    def remove(self) -> None:
        """Undo everything. Calling it twice does nothing."""
        self._finalizer()

    def _take_off(self) -> None:
        for hook in self._hooks:
            hook.remove()
        if NAME in self._model._modules:
            delattr(self._model, NAME)
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
            parameter.grad = None if not flag else parameter.grad
        for module, training in self._modes:
            module.training = training

    @torch.compiler.disable
    def _before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        self._labels: Tensor | None = None
        if model is not self._model:  # a copy of the model (an EMA, say) is not the model that trains
            return None
        inputs = {**_named(model, args), **kwargs}
        labels, shifted = inputs.pop("labels", None), inputs.pop("shift_labels", None)
        if labels is None and shifted is None:
            return None  # generation, or somebody else's forward pass
        self._labels = shifted_targets(labels, shifted)
        self._items = inputs.pop("num_items_in_batch", None)
        inputs.setdefault("use_cache", False)
        if self._head.needs_cache:
            inputs |= {"use_cache": True, "past_key_values": DynamicCache()}
        self._inputs = inputs
        self._pass = contextlib.ExitStack()
        self._pass.enter_context(in_evaluation(model, but=self._head))
        self._states = self._pass.enter_context(captured(model, self._head.trained_on))
        return (), inputs

    @torch.compiler.disable
    def _after(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], outputs: Any) -> Any:
        if self._pass is None:
            return outputs
        stack, self._pass = self._pass, None
        with stack:
            callback = self._callback()
            if callback is None or self._labels is None or outputs is None:  # `always_call`: None after an exception
                return outputs
            dtype = torch.float16 if callback._args.fp16 else torch.bfloat16
            mixed = callback._args.bf16 or callback._args.fp16 or model.dtype != self._head.dtype
            states = {number: state.detach() for number, state in self._states.items()}
            with torch.autocast(outputs.logits.device.type, dtype, enabled=mixed):
                loss = callback.loss(self.ends, self._inputs, self._labels, states, outputs, self._items)
            return CausalLMOutput(loss=loss, logits=outputs.logits)


def _refuse_conflicts(args: TrainingArguments, model: Any) -> None:
    if not hasattr(model, "get_output_embeddings") or hasattr(model, "peft_config"):
        raise ValueError(
            f"TrainDraftHead trains on a plain transformers causal LM, not on a {type(model).__name__} with PEFT "
            "around or in it: such a model saves its adapters only, so a checkpoint would lose the head. Merge the "
            "adapters first (merge_and_unload() of a PeftModel); the head then drafts for the adapted model as well."
        )
    if hasattr(model, NAME):
        raise ValueError(f"the model has a {NAME} already: remove() the other TrainDraftHead first")
    if model.dtype == torch.float16 and not args.fp16:
        raise ValueError(
            "TrainDraftHead's gradients would vanish in a target of float16: load the target in bfloat16 or float32, "
            "or train with fp16=True, which scales them"
        )
    if args.n_gpu > 1:
        raise ValueError(
            "TrainDraftHead does not work under torch.nn.DataParallel, which the Trainer uses when one process sees "
            f"{args.n_gpu} GPUs. Start it with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES."
        )
    if args.fsdp or args.deepspeed:
        raise ValueError("TrainDraftHead reads the target's layers whole, which FSDP and DeepSpeed cut up: use DDP")
    if args.label_smoothing_factor:
        raise ValueError("TrainDraftHead replaces the loss, so label_smoothing_factor must be 0")
    if getattr(args, "use_liger_kernel", False):
        raise ValueError("TrainDraftHead needs logits, which Liger's fused loss never builds: drop use_liger_kernel")


def _named(model: nn.Module, args: tuple) -> dict[str, Any]:
    """Name the positional arguments of a forward call."""
    return dict(inspect.signature(model.forward).bind_partial(*args).arguments) if args else {}
