"""Model contract, part 3: loss, gradients and `Trainer`."""

# ruff: noqa: D102 (the name of a test says what it shows)
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_ext.adapter import checkpoint_activations
from hf_ext.testing.model_base import ContractBase, assert_close


def gradients(model: PreTrainedModel, ids: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return all gradients of one training step as one vector, and how often linear layers ran for it."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    handles = [module.register_forward_pre_hook(count) for module in linear]
    model.train().zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    for handle in handles:
        handle.remove()
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]), calls


class TrainingContract(ContractBase):
    """The model trains under `Trainer`, and the ways to save memory change nothing."""

    @torch.no_grad()
    def test_loss_is_the_mean_over_the_labels_that_count(self) -> None:
        model, ids = self.make_model(), self.tokens()
        labels = ids.clone()
        labels[0, :7] = -100
        output = model(ids, labels=labels)
        predicted, wanted = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        expected = torch.nn.functional.cross_entropy(predicted, wanted, ignore_index=-100)
        assert_close(output.loss, expected, 1e-5, "the model's loss and the cross-entropy of its logits")

    def test_gradient_checkpointing_gives_the_same_gradients(self) -> None:
        model, ids = self.make_model(), self.tokens()
        if not model.supports_gradient_checkpointing:
            with pytest.raises(ValueError, match="does not support"):
                checkpoint_activations(model)
            return
        plain, calls = gradients(model, ids)
        for reentrant in (False, True):
            checkpoint_activations(model, use_reentrant=reentrant)
            checkpointed, more_calls = gradients(model, ids)
            assert more_calls > calls, "supports_gradient_checkpointing is set, but nothing is recomputed"
            assert_close(
                checkpointed, plain, self.tolerance, f"gradients with and without ({reentrant=}) checkpointing"
            )

    def test_every_parameter_gets_a_gradient(self) -> None:
        model = self.make_model()
        gradients(model, self.tokens())
        idle = [n for n, weight in model.named_parameters() if weight.grad is None or not weight.grad.abs().max() > 0]
        assert not idle, f"parameters without gradient: {idle}"

    def test_trainer_step_does_not_depend_on_gradient_accumulation(self, tmp_path: Path) -> None:
        """Holds only when the loss is normalized by `num_items_in_batch`, since the rows count differently."""
        ids = self.tokens(batch=4)
        labels = ids.clone()
        for row, hidden in enumerate((0, 3, 9, ids.shape[1] - 3)):
            labels[row, :hidden] = -100
        rows = [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]
        weights = []
        for batch, accumulation in ((4, 1), (1, 4)):
            model = self.make_model()
            before = torch.cat([weight.detach().flatten().clone() for weight in model.parameters()])
            arguments = TrainingArguments(
                output_dir=str(tmp_path),
                max_steps=1,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulation,
                optim="sgd",
                learning_rate=0.1,
                lr_scheduler_type="constant",
                max_grad_norm=0.0,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
            )
            Trainer(model, arguments, train_dataset=rows).train()
            after = torch.cat([weight.detach().flatten() for weight in model.parameters()])
            assert (after - before).abs().max() > 1e-4, "a training step changed no weight"
            weights.append(after)
        assert_close(*weights, self.tolerance, "weights after one step with 4 rows at once and 4 times one row")
