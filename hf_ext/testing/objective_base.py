"""What the parts of the conformance suite of objectives share: what a class says, and how to train with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_ext.testing import objective_processes as processes
from hf_ext.testing.objective_training import collate, examples, logged, tiny_model, train, weights
from hf_ext.trainer_callbacks import Objective

#: One SGD step of rate 1 without clipping, after which the weights have moved by the gradient.
ONE_GRADIENT = {
    "max_steps": 1,
    "optim": "sgd",
    "learning_rate": 1.0,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
}
SPLIT_TOLERANCE = 1e-5
#: Gradients on the whole batch that several tests need, by class and options.
_WHOLE: dict[Any, tuple[dict[str, Tensor], float]] = {}


class ObjectiveSuite:
    """What a conformance class says of its objective; see `hf_ext.testing.objective.ObjectiveInProcess`."""

    objective: ClassVar[type[Objective]]
    options: ClassVar[Mapping[str, Any]] = {}
    null_options: ClassVar[Mapping[str, Any]]
    attached: ClassVar[bool] = False
    attached_sft: ClassVar[bool] = False
    refused: ClassVar[Mapping[str, str]] = {}
    #: what the plain loss of the same batch is logged as
    plain_loss: ClassVar[str] = "clean_loss"
    #: what any Trainer of the kind leaves on a model, with or without an objective
    trainer_parts: ClassVar[frozenset[str]] = frozenset({"_is_accelerate_prepared"})

    def make(self, **changes: Any) -> Objective:
        """Build the objective under test."""
        return self.objective(**{**self.options, **changes})

    def model(self, **config: Any) -> PreTrainedModel:
        """Build the model to train. Override it for an objective that needs another one."""
        return tiny_model(**config)

    def run(self, model: nn.Module, objective: Objective | None, **changes: Any) -> Trainer:
        """Train as `hf_ext.testing.objective_training.train` does, attached if the class says so."""
        return train(model, objective, **{"attached": self.attached, **changes})

    def evaluate_plainly(self, model: nn.Module, args: TrainingArguments) -> float:
        """Return the `eval_loss` of a model under the same trainer without an objective."""
        trainer = Trainer(model=model, args=args, eval_dataset=examples(8, seed=1), data_collator=collate)
        return trainer.evaluate()["eval_loss"]

    def gradient(self, model: nn.Module, objective: Objective | None, **changes: Any) -> tuple[dict, float]:
        """Return the gradient of one optimizer step and the logged loss; of what trains alone."""
        before = weights(model)
        trainer = self.run(model, objective, **{**ONE_GRADIENT, **changes})
        after = weights(model)
        moved = {name: before[name] - after[name] for name in before if model.get_parameter(name).requires_grad}
        return moved, logged(trainer, "loss")[0]

    def whole(self, adapters: bool = False) -> tuple[dict, float]:
        """Return the gradient of the objective on the whole batch of 8 rows, and the loss; computed once.

        Args:
            adapters: train LoRA adapters.
        """
        key = (type(self), self.objective, self.attached, repr(sorted(self.options.items())), adapters)
        if key not in _WHOLE:
            model = processes.with_lora(self.model()) if adapters else self.model()
            _WHOLE[key] = self.gradient(model, self.make())
        return _WHOLE[key]


def installed_parts(model: nn.Module) -> dict[str, set[str]]:
    """List each module's attribute names and hooks, to compare before and after."""
    parts = {}
    for name, module in model.named_modules():
        hooks = {
            f"{kind}: {getattr(hook, '__qualname__', type(hook).__qualname__)}"
            for kind, held in vars(module).items()
            if kind.endswith("_hooks") and isinstance(held, dict)
            for hook in held.values()
        }
        parts[name] = set(vars(module)) | hooks
    return parts
