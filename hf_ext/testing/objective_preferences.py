"""The conformance suite for objectives of TRL's DPOTrainer: the same checks, on pairs of answers."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_ext.testing.objective import ObjectiveInProcess
from hf_ext.testing.objective_base import SPLIT_TOLERANCE
from hf_ext.testing.objective_processes import tiny_tokenizer
from hf_ext.testing.objective_training import VOCABULARY, arguments, logged, tiny_model
from hf_ext.trainer_callbacks import Objective

#: Temperature of DPO, so high that policy and reference, two random models, make a difference.
BETA = 0.5
#: Tests of SFTTrainer, and of the side of the padding, which is TRL's.
LEFT_OUT = (
    "test_trl_sft_trainer_trains_the_same_gradient",
    "test_trl_sft_trainer_trains_the_same_adapters",
    "test_left_padding_gives_the_gradient_of_right_padding",
)


def pairs(count: int = 16, seed: int = 0) -> list[dict[str, str]]:
    """Make prompts with a right and a wrong answer, of different lengths."""
    draw = torch.Generator().manual_seed(seed)

    def words(low: int, high: int) -> str:
        length = int(torch.randint(low, high, (), generator=draw))
        return " ".join(f"w{token}" for token in torch.randint(5, VOCABULARY, (length,), generator=draw).tolist())

    return [
        {"prompt": f"w1 {words(2, 5)}", "chosen": f" {words(2, 7)} w2", "rejected": f" {words(2, 7)} w2"}
        for _ in range(count)
    ]


def dpo_trainer(
    model: nn.Module, args: TrainingArguments, trainer_class: type[Trainer] = Trainer, **more: Any
) -> Trainer:
    """Build a DPOTrainer over `pairs()`, whose reference is another tiny model, or the model without its adapters.

    Args:
        model: the policy.
        args: a DPOConfig.
        trainer_class: put before DPOTrainer, if it is more than a Trainer.
        **more: arguments of DPOTrainer.
    """
    from datasets import Dataset
    from trl import DPOTrainer

    kind: Any = DPOTrainer if trainer_class is Trainer else type("Both", (trainer_class, DPOTrainer), {})
    return kind(
        model=model,
        ref_model=None if hasattr(model, "peft_config") else tiny_model(seed=5),
        args=args,
        train_dataset=Dataset.from_list(pairs()),
        eval_dataset=Dataset.from_list(pairs(8, seed=1)),
        processing_class=tiny_tokenizer(),
        **more,
    )


class PreferencesInProcess(ObjectiveInProcess):
    """`ObjectiveInProcess` for an objective that DPOTrainer trains, attached.

    In the place of the next-token loss stands the plain loss of DPO on the same pairs, logged as `dpo_loss`. What has
    no meaning on pairs is left out, see `LEFT_OUT`.
    """

    attached = True
    plain_loss = "dpo_loss"
    trainer_parts = ObjectiveInProcess.trainer_parts | {"forward", "model_tags"}  # TRL fuses the head with the loss

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Hide the tests that have no meaning on pairs."""
        super().__init_subclass__(**kwargs)
        for test in LEFT_OUT:
            setattr(cls, test, None)  # pytest does not collect None

    def run(
        self,
        model: nn.Module,
        objective: Objective | None,
        *,
        attached: bool = True,
        resume: str | None = None,
        folder: Path | str | None = None,
        trainer_class: type[Trainer] = Trainer,
        collator: Any = None,
        company: Sequence[Any] = (),
        **changes: Any,
    ) -> Trainer:
        """Train with DPOTrainer; see `hf_ext.testing.objective_training.train`."""
        from hf_ext.trainer_callbacks import attach

        with tempfile.TemporaryDirectory() as scratch:
            args = self.arguments(folder or scratch, **changes)
            more = {"callbacks": list(company), "data_collator": collator}
            trainer = dpo_trainer(model, args, trainer_class, **more)
            if objective is not None:
                attach(trainer, objective)
            trainer.train(resume_from_checkpoint=resume)
        return trainer

    def arguments(self, folder: Path | str, **changes: Any) -> TrainingArguments:
        """Build a DPOConfig; with dropout if the model has it, as other trainers and unlike DPOTrainer by default."""
        from trl import DPOConfig

        values = {"beta": BETA, "bf16": False, "gradient_checkpointing": False, "disable_dropout": False}
        return arguments(folder, DPOConfig, **{**values, **changes})

    def evaluate_plainly(self, model: nn.Module, args: TrainingArguments) -> float:
        """Return the `eval_loss` of a plain DPOTrainer."""
        return dpo_trainer(model, args).evaluate()["eval_loss"]

    def test_clean_loss_is_the_next_token_loss_on_the_uncorrupted_batch(self) -> None:
        """Here it is the plain loss of DPO: the first `dpo_loss` is the first `loss` of a plain DPOTrainer."""
        expected = logged(self.run(self.model(), None, max_steps=1), "loss")[0]
        for parts in (1, 4):
            split = {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts}
            trainer = self.run(self.model(), self.make(), **split)
            seen = logged(trainer, self.plain_loss)
            assert len(seen) == 2, f"{self.plain_loss} logged {len(seen)} times in two logged steps"
            assert abs(seen[0] - expected) <= SPLIT_TOLERANCE, f"{self.plain_loss} {seen[0]}, of plain DPO {expected}"
