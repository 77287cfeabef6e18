"""Training to drop tokens with the stock Trainer: loss, schedule, accumulation, recomputed layers, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import Trainer

from hf_ext import adapter
from hf_ext.cache import DynamicContextPruningModel, DynamicContextPruningTraining
from hf_ext.cache.trained.interaction import kept_share, log_survival
from hf_ext.testing.objective import ONE_GRADIENT
from hf_ext.testing.objective_training import arguments, collate, examples, largest_difference, tiny_model
from hf_ext.testing.strategy_base import refusal
from hf_ext.trainer_callbacks import attach


def wrapped(beta: float = 0.2, seed: int = 3, **changes: Any) -> DynamicContextPruningModel:
    torch.manual_seed(seed)
    base = tiny_model()
    lora = LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **changes})
    return DynamicContextPruningModel(base, lora, rank=4, beta=beta)


def train(model: Any, folder: Any, objective: Any = None, resume: str | None = None, **changes: Any) -> Trainer:
    objective = DynamicContextPruningTraining() if objective is None else objective
    trainer = Trainer(
        model, arguments(folder, **changes), train_dataset=examples(16), eval_dataset=examples(8, seed=1),
        data_collator=collate, callbacks=[objective],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def trainable(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def gradients(model: Any, alpha: float = 1.7) -> dict[str, torch.Tensor]:
    """Return the gradients of a training pass and the price of what is kept, as a loop of one's own would take them."""
    model.train()
    model.zero_grad()
    model.alpha = alpha
    loss = model(**collate(examples(6))).loss
    (loss + model.kept.mean()).backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def test_the_loss_is_the_next_token_loss_and_the_price_of_what_each_row_keeps(tmp_path: Path) -> None:
    model = wrapped()
    batch = collate(examples(8))
    with torch.no_grad():
        model.train()
        model.alpha = 2.5
        plain, total, count = model(**batch), 0.0, 0
        for row in range(8):
            n = int(batch["attention_mask"][row].sum())
            alone = model(**{name: value[row : row + 1, :n] for name, value in batch.items()})
            targets = int((batch["labels"][row, 1:n] != -100).sum())
            total += targets * (float(alone.loss) + 0.7 * float(model.kept.mean()))
            count += targets
    objective = DynamicContextPruningTraining(gamma=0.7, first_alpha=2.5, last_alpha=2.5)
    trainer = Trainer(
        model, arguments(tmp_path, max_steps=1), train_dataset=examples(8), data_collator=collate, callbacks=[objective]
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(total / count, abs=2e-4)
    assert log["clean_loss"] == pytest.approx(float(plain.loss), abs=2e-4)
    assert log["loss"] - log["clean_loss"] == pytest.approx(0.7 * log["kept"], abs=2e-4)
    assert log["alpha"] == 2.5


def test_alpha_follows_its_schedule_and_a_price_makes_it_keep_less(tmp_path: Path) -> None:
    shares = {}
    for gamma in (0.0, 5.0):
        seen: list[float] = []

        class Noting(DynamicContextPruningTraining):
            def token_loss(self, logits: Any, targets: Any, seen: Any = seen, **extra: Any) -> Any:
                seen.append(self._model.alpha)
                return super().token_loss(logits, targets, **extra)

        model = wrapped(beta=0.5)
        trainer = train(model, tmp_path, Noting(gamma=gamma, steps=6), max_steps=8)
        wanted = [DynamicContextPruningTraining().alpha(step, 6) for step in range(8)]
        assert seen == wanted
        assert wanted[0] == 1
        assert wanted[6:] == [8, 8]
        shares[gamma] = [entry["kept"] for entry in trainer.state.log_history if "kept" in entry]
        assert all(0 < share < 1 for share in shares[gamma])
    assert shares[5.0][-1] < 0.8 * shares[0.0][-1], shares


def test_evaluation_drops_for_good_and_has_no_price(tmp_path: Path) -> None:
    model = wrapped()
    trainer = train(model, tmp_path, DynamicContextPruningTraining(gamma=100.0), max_steps=1)
    found = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        batch = collate(examples(8, seed=1))
        wanted = float(model.eval()(**batch).loss)
        model.train()
        model.alpha = 1.0
        soft = float(model(**batch).loss)
    assert found == pytest.approx(wanted, abs=1e-4)
    assert abs(soft - wanted) > 1e-3, "dropping is the same as fading, so this shows nothing"


def test_gradients_reach_adapter_and_parts_only() -> None:
    model = wrapped()
    found = gradients(model)
    for name, parameter in model.named_parameters():
        learns = "lora_" in name or "dynamic_context_pruning" in name
        assert (name in found and bool(found[name].any())) == learns, name
        assert found[name].isfinite().all() if learns else not parameter.requires_grad


@pytest.mark.parametrize("alpha", [1.0, 1.7, 8.0])
def test_layers_that_are_recomputed_give_the_same_gradients(alpha: float) -> None:
    plain, model = gradients(wrapped(), alpha), wrapped()
    adapter.checkpoint_activations(model.get_base_model(), use_reentrant=False)
    difference = largest_difference(plain, gradients(model, alpha))
    assert difference < 1e-6, f"gradients differ by up to {difference:.3g}"


def test_reentrant_checkpointing_is_refused(tmp_path: Path) -> None:
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match="use_reentrant=False"):
        train(wrapped(), tmp_path, **settings)


def test_frozen_parts_are_refused(tmp_path: Path) -> None:
    model = wrapped()
    model.parts.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and "layers.1" in name)  # what the last layer keeps comes before it
    with pytest.raises(RuntimeError, match="frozen"):
        train(model, tmp_path)


def test_gradients_do_not_depend_on_how_the_batch_is_split_and_the_base_stays(tmp_path: Path) -> None:
    moved = []
    for parts in (1, 4):
        model = wrapped()
        base = {n: v.clone() for n, v in model.named_parameters() if not v.requires_grad}
        before = trainable(model)
        split = {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts}
        train(model, tmp_path, DynamicContextPruningTraining(gamma=2.0), **{**ONE_GRADIENT, **split})
        after = dict(model.named_parameters())
        assert all(torch.equal(base[name], after[name]) for name in base), "training changed base weights"
        moved.append({name: before[name] - after[name].detach() for name in before})
    difference = largest_difference(*moved)
    assert difference < 1e-5, f"gradients differ by up to {difference:.3g}"
    assert max(float(v.abs().max()) for n, v in moved[0].items() if "pruning" in n) > 1e-3


def test_padding_on_either_side_changes_nothing() -> None:
    model = wrapped().train()
    model.alpha = 1.7
    batch = collate(examples(6))
    pads = (batch["attention_mask"] == 0).sum(-1).tolist()
    left = {
        name: torch.stack([row.roll(count) for row, count in zip(value, pads, strict=True)])
        for name, value in batch.items()
    }
    left["position_ids"] = (left["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    left["labels"].masked_fill_(left["attention_mask"].cumsum(-1) < 2, -100)  # a first token is no target
    with torch.no_grad():
        found, kept = float(model(**batch).loss), model.kept
        assert float(model(**left).loss) == pytest.approx(found, abs=1e-5)
    assert (model.kept - kept).abs().max() < 1e-5


def test_it_trains_in_bfloat16(tmp_path: Path) -> None:
    model = wrapped()
    before = trainable(model)
    trainer = train(model, tmp_path, bf16=True, max_steps=3)
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry)
    after = trainable(model)
    assert all(bool(value.isfinite().all()) for value in after.values())
    assert all(bool((after[n] != before[n]).any()) for n in before if "pruning" in n)
    half = wrapped()
    half.get_base_model().to(torch.bfloat16)
    found = gradients(half)
    assert found
    assert all(bool(value.isfinite().all()) for value in found.values())


def test_checkpoints_resume_bit_for_bit_and_alpha_goes_on(tmp_path: Path) -> None:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}
    model = wrapped(lora_dropout=0.1)
    trainer = train(model, tmp_path / "once", **settings)
    fresh = wrapped(seed=8, lora_dropout=0.1)
    again = train(fresh, tmp_path / "again", resume=str(tmp_path / "once" / "checkpoint-2"), **settings)
    difference = largest_difference(trainable(model), trainable(fresh))
    assert difference == 0, f"weights differ by up to {difference:.3g}"
    assert trainer.evaluate()["eval_loss"] == again.evaluate()["eval_loss"]
    loaded = DynamicContextPruningModel.from_pretrained(wrapped_base(), tmp_path / "once" / "checkpoint-4")
    batch = collate(examples(4))
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)


def wrapped_base() -> Any:
    torch.manual_seed(3)
    return tiny_model()


def test_parts_of_another_model_are_refused(tmp_path: Path) -> None:
    wrapped().save_pretrained(tmp_path)
    other = tiny_model(num_hidden_layers=3)
    refusal(
        lambda: DynamicContextPruningModel.from_pretrained(other, tmp_path),
        "was trained on another model",
        what="layers",
    )


def test_nothing_is_left_on_the_model_and_conflicts_are_refused(tmp_path: Path) -> None:
    model = wrapped()
    objective = DynamicContextPruningTraining()
    train(model, tmp_path, objective, max_steps=1)
    assert objective.installed() == []
    assert not any(module._forward_pre_hooks for module in model.modules())
    refusal(lambda: train(tiny_model(), tmp_path), "wrap it", what="a stock model")
    for options in ({"gamma": -1}, {"first_alpha": 0.5}, {"last_alpha": float("inf")}, {"steps": 0}):
        refusal(lambda options=options: DynamicContextPruningTraining(**options), "must", what=str(options))
    trainer = Trainer(model, arguments(tmp_path, max_steps=1), train_dataset=examples(8), data_collator=collate)
    attach(trainer, DynamicContextPruningTraining())
    trainer.train()
    assert "kept" in trainer.state.log_history[0]


def test_a_row_of_one_token_keeps_all_that_came_before_it() -> None:
    survival = log_survival(torch.full((2, 3, 3), -1.0), 2.0).exp()
    visible = torch.ones(3, 3, dtype=torch.bool).tril()[None].repeat(2, 1, 1)
    visible[1] &= torch.tensor([False, False, True])
    assert kept_share(survival, visible).tolist() == [pytest.approx(0.0, abs=1e-6), 1.0]
