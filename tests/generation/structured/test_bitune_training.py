"""Training a BituneModel with the stock Trainer: gradients of both passes, padding, accumulation, checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, TaskType
from transformers import Trainer

from hf_ext.generation.bitune_model import BituneModel
from hf_ext.testing import tiny_models
from hf_ext.testing.objective import ONE_GRADIENT
from hf_ext.testing.objective_training import arguments, collate, largest_difference, tiny_model
from hf_ext.testing.strategy_base import close, refusal
from hf_ext.testing.twice import row_logits

CONFIG = {"r": 2, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "init_lora_weights": False}
#: Tokens of the prompts and of the answers; the first row has no prompt, the last no answer.
ROWS = ((0, 6), (1, 4), (2, 3), (9, 2), (5, 7), (4, 1), (7, 4), (6, 0))


def rows(count: int = 8) -> list[dict[str, list[int]]]:
    draw = torch.Generator().manual_seed(5)
    made = []
    for number in range(count):
        prompt, answer = ROWS[number % len(ROWS)]
        ids = torch.randint(4, 60, (prompt + answer,), generator=draw).tolist()
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return made


def adapted(seed: int = 3, **changes) -> BituneModel:
    model = tiny_model()
    torch.manual_seed(seed)
    made = BituneModel(model, LoraConfig(**{**CONFIG, **changes})).eval()
    made.mix.fill(0.6, 0.3)
    return made


def train(model, folder, resume=None, data=None, **changes):
    data = data or rows(16)
    trainer = Trainer(
        model, arguments(folder, **{"learning_rate": 0.01, **changes}), train_dataset=data, eval_dataset=rows(),
        data_collator=collate,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def trainable(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def mirrored(batch):
    """The same rows with their padding on the left."""
    turned = {name: value.clone() for name, value in batch.items()}
    for row, mask in enumerate(batch["attention_mask"].bool()):
        for value in turned.values():
            value[row] = torch.cat([value[row][~mask], value[row][mask]])
    return turned


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_batch_gives_the_logits_and_the_loss_of_its_rows(side):
    model, batch = adapted(), collate(rows())
    batch = mirrored(batch) if side == "left" else batch
    with torch.no_grad():
        out = model(**batch)
    total, count = 0.0, 0
    for row, example in enumerate(rows()):
        ids = torch.tensor([example["input_ids"]])
        prompt = sum(label == -100 for label in example["labels"])
        expected = row_logits(model, ids, prompt, 0.6, 0.3)[0]
        found = out.logits[row, batch["attention_mask"][row].bool()][-len(expected) :]
        close(found, expected, f"row {row}, padded on the {side}", tolerance=2e-5)
        targets = ids[0, max(prompt, 1) :]
        if len(targets):
            total += float(torch.nn.functional.cross_entropy(expected[: len(targets)], targets, reduction="sum"))
            count += len(targets)
    assert abs(float(out.loss) - total / count) < 2e-5, f"loss {float(out.loss)}, of the rows {total / count}"
    lengths = torch.tensor([prompt for prompt, _ in ROWS])
    with torch.no_grad():
        told = model(batch["input_ids"], batch["attention_mask"], prompt_lengths=lengths)
    assert told.loss is None
    assert torch.equal(told.logits, out.logits), "prompt_lengths are not what the labels say"


def test_gradients_reach_both_adapters_and_every_coefficient_and_are_right():
    model, batch = adapted().double(), collate(rows())

    def loss():  # the model's own is in float32
        logits = model(**batch).logits[:, :-1].transpose(1, 2)
        return torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:])

    loss().backward()
    parameters = dict(model.named_parameters())
    missing = [n for n, p in parameters.items() if p.requires_grad and (p.grad is None or not p.grad.any())]
    # What the last layer makes of the prompt with the second adapter counts by its keys and values only.
    rest = [n for n in missing if not ("layers.1." in n and "bidirectional" in n and ("q_proj" in n or "o_proj" in n))]
    assert not rest, f"no gradient: {rest}"
    assert len(missing) == 4
    assert not any(p.grad is not None for p in parameters.values() if not p.requires_grad)
    for name in ("bitune.keys", "bitune.values", "0.self_attn.k_proj.lora_A.bidirectional.weight",
                 "0.self_attn.v_proj.lora_B.default.weight"):  # fmt: skip
        parameter = next(p for n, p in parameters.items() if n.endswith(name))
        with torch.no_grad():
            steepest, step, losses = parameter.grad.abs().argmax(), 1e-4, []
            for sign in (1, -1):
                parameter.view(-1)[steepest] += sign * step
                losses.append(float(loss()))
                parameter.view(-1)[steepest] -= sign * step
        slope = (losses[0] - losses[1]) / (2 * step)  # norms are computed in float32, hence the tolerance
        assert slope == pytest.approx(float(parameter.grad.view(-1)[steepest]), rel=5e-3), name


def test_gradients_do_not_depend_on_how_the_batch_is_split_and_the_base_stays(tmp_path: Path):
    moved = []
    for parts in (1, 4):
        model = adapted()
        base = {n: v.clone() for n, v in model.named_parameters() if not v.requires_grad}
        before, split = (
            trainable(model),
            {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts},
        )
        train(model, tmp_path, data=rows(), **{**ONE_GRADIENT, **split})
        after = dict(model.named_parameters())
        assert all(torch.equal(base[name], after[name]) for name in base), "training changed base weights"
        moved.append({name: before[name] - after[name].detach() for name in before})
    difference = largest_difference(*moved)
    assert difference < 1e-5, f"gradients differ by up to {difference:.3g}"
    assert max(float(value.abs().max()) for value in moved[0].values()) > 1e-2


def test_checkpoints_hold_adapters_and_coefficients_and_resume_bit_for_bit(tmp_path: Path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}
    model = adapted(lora_dropout=0.1)
    trainer = train(model, tmp_path / "once", **settings)
    fresh = adapted(seed=8, lora_dropout=0.1)
    again = train(fresh, tmp_path / "again", resume=str(tmp_path / "once" / "checkpoint-2"), **settings)
    difference = largest_difference(trainable(model), trainable(fresh))
    assert difference == 0, f"weights differ by up to {difference:.3g}"
    assert trainer.evaluate()["eval_loss"] == again.evaluate()["eval_loss"]
    shares = [share.tolist() for share in model.mix.shares()]
    assert all(
        abs(share - start) > 1e-3 for share, start in zip(shares[0] + shares[1], [0.6] * 2 + [0.3] * 2, strict=True)
    )
    # The last checkpoint, and what the Trainer saves at the end, load for use, and the causal adapter into stock PEFT.
    trainer.save_model(str(tmp_path / "model"))
    batch = collate(rows())
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        plain = model(batch["input_ids"], batch["attention_mask"]).logits
        for folder in (tmp_path / "model", tmp_path / "once" / "checkpoint-4"):
            loaded = BituneModel.from_pretrained(tiny_model(), folder)
            assert torch.equal(loaded(**batch).logits, expected), folder.name
            assert not loaded.training
            assert not trainable(loaded)
        stock = PeftModel.from_pretrained(tiny_model(), tmp_path / "model")
        close(stock(batch["input_ids"], batch["attention_mask"]).logits, plain, "the causal adapter", tolerance=1e-6)
    assert trainable(BituneModel.from_pretrained(tiny_model(), tmp_path / "model", is_trainable=True)).keys() == (
        trainable(model).keys()
    )


def test_the_best_checkpoint_is_loaded_whole(tmp_path: Path):
    settings = {
        "max_steps": 2, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
        "load_best_model_at_end": True, "learning_rate": 3.0, "lr_scheduler_type": "constant", "optim": "sgd",
    }  # fmt: skip
    model = adapted()
    trainer = train(model, tmp_path, **settings)
    best = BituneModel.from_pretrained(tiny_model(), trainer.state.best_model_checkpoint)
    difference = largest_difference(trainable(model), {n: dict(best.named_parameters())[n] for n in trainable(model)})
    assert difference == 0, f"weights differ from the best checkpoint's by up to {difference:.3g}"
    other = {1: 2, 2: 1}[int(trainer.state.best_model_checkpoint.rsplit("-", 1)[1])]
    last = BituneModel.from_pretrained(tiny_model(), tmp_path / f"checkpoint-{other}")
    assert not torch.equal(last.mix.keys, best.mix.keys)


def test_without_labels_it_is_the_causal_adapter_alone():
    model, batch = adapted(), collate(rows())
    with torch.no_grad():
        out = model(batch["input_ids"], batch["attention_mask"])
        model.mix.fill(0, 0)
        zero = model(**batch)
    real = batch["attention_mask"].bool()
    close(zero.logits[real], out.logits[real], "a share of 0", tolerance=1e-5)


def test_what_cannot_be_honoured_is_refused():
    model, batch = adapted(), collate(rows())
    positions = torch.zeros_like(batch["input_ids"])
    refusal(lambda: model(**batch, position_ids=positions), "takes no position_ids", what="packed rows")
    refusal(lambda: model(labels=batch["labels"]), "input_ids", what="no ids")
    model.get_base_model().gradient_checkpointing_enable()
    refusal(lambda: model.train()(**batch), "gradient checkpointing", what="checkpointing")
    for changes, words in (({"modules_to_save": ["lm_head"]}, "modules_to_save"), ({"bias": "all"}, "bias")):
        refusal(lambda c=changes: BituneModel(tiny_model(), LoraConfig(**CONFIG, **c)), words, what=words)
    tuning = PromptTuningConfig(TaskType.CAUSAL_LM, num_virtual_tokens=3)
    refusal(lambda: BituneModel(tiny_model(), tuning), "virtual tokens", what="prompt tuning")
    model = tiny_models.build("llama")
    refusal(lambda: BituneModel(model, LoraConfig(**CONFIG), share=2), "from 0 to 1", what="a share of 2")


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_two_adapters_are_not_merged_into_one_set_of_weights(method: str):
    with pytest.raises(ValueError, match="merge the causal adapter alone"):
        getattr(adapted(), method)()
