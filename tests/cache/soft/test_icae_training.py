"""Training an ICAEModel with the stock Trainer: what learns, padding, accumulation, recomputed layers, checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import Trainer

from hf_ext import adapter
from hf_ext.cache.soft import ICAECollator, ICAEModel
from hf_ext.testing import tiny_models
from hf_ext.testing.objective import ONE_GRADIENT
from hf_ext.testing.objective_training import arguments, largest_difference, tiny_model
from hf_ext.testing.strategy_base import close, refusal

CONFIG = {"r": 2, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}
COLLATE = ICAECollator(eos_token_id=2, context=7, shortest=3, left_out=1)


def texts(count: int = 8) -> list[dict[str, list[int]]]:
    draw = torch.Generator().manual_seed(5)
    lengths = [2, 5, 9, 14, 20, 7, 3, 11]
    return [{"input_ids": torch.randint(4, 60, (lengths[i % 8],), generator=draw).tolist()} for i in range(count)]


def adapted(seed: int = 3, **changes) -> ICAEModel:
    model = tiny_model()
    torch.manual_seed(seed)
    return ICAEModel(model, LoraConfig(**{**CONFIG, **changes}), slots=3).eval()


def train(model, folder, resume=None, data=None, **changes):
    data = data or texts(16)
    trainer = Trainer(
        model, arguments(folder, **{"learning_rate": 0.01, **changes}), train_dataset=data, eval_dataset=texts(),
        data_collator=COLLATE,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def trainable(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def gradients(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def test_rows_are_cut_by_their_text_alone_and_hold_what_the_losses_need():
    batch, kinds = COLLATE(texts()), set()
    for row, text in enumerate(texts()):
        ids = text["input_ids"]
        alone = COLLATE([text])
        for name in ("context_ids", "input_ids", "labels"):
            mask = {"context_ids": "context_mask"}.get(name, "attention_mask")
            assert torch.equal(alone[name][alone[mask].bool()], batch[name][row][batch[mask][row].bool()]), name
        context = batch["context_ids"][row][batch["context_mask"][row].bool()].tolist()
        read = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
        labels = batch["labels"][row][batch["attention_mask"][row].bool()].tolist()
        kinds.add(bool(batch["reconstruct"][row]))
        assert 1 <= len(context) <= 7
        if batch["reconstruct"][row]:
            assert read == labels == [*context, 2]
        else:
            assert labels == [-100, *read[1:]]
            assert len(read) >= 3
            joined = ids[ids.index(context[0]) :]
            assert joined[: len(context) + len(read)] == context + read
    assert kinds == {True, False}, "the share of continued texts does nothing"
    assert not batch["attention_mask"][:, 0].any(), "the first token would not be counted as a target"


def test_instructions_keep_their_labels_and_rows_that_lost_their_context_are_refused():
    row = {"context_ids": [4, 5], "input_ids": [6, 7, 8], "labels": [-100, 7, 8]}
    batch = COLLATE([row])
    assert batch["input_ids"].tolist() == [[0, 6, 7, 8]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 8]]
    assert not batch["reconstruct"].any()
    for changed, words in (
        ({"input_ids": [6], "labels": [6]}, "remove_unused_columns=False"),
        ({**row, "labels": [7]}, "3 input_ids and 1 labels"),
        ({"input_ids": []}, "no tokens"),
    ):
        refusal(lambda changed=changed: COLLATE([changed]), words, what=words)
    refusal(lambda: ICAECollator(continued=2), "share", what="a share of 2")


def test_the_loss_is_that_of_each_row_read_by_the_frozen_model():
    model, batch = adapted(), COLLATE(texts())
    with torch.no_grad():
        out, plain = model(**batch), tiny_model().eval()
        total, count = 0.0, 0
        for row in range(8):
            ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
            targets = batch["labels"][row][batch["attention_mask"][row].bool()]
            context = batch["context_ids"][row][batch["context_mask"][row].bool()]
            before = [model.compress(context[None]).vectors[0]]
            before += [model.learned.reconstruct] if batch["reconstruct"][row] else []
            embeds = torch.cat([*before, plain.get_input_embeddings()(ids)])
            logits = plain(inputs_embeds=embeds[None]).logits[0, -len(ids) - 1 : -1]
            total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            count += int((targets != -100).sum())
    assert abs(float(out.loss) - total / count) < 2e-5, f"loss {float(out.loss)}, of the rows {total / count}"
    longest = {name: batch[name][row:][:1] for row in [batch["attention_mask"].sum(-1).argmax()] for name in batch}
    bare = {n: longest[n][:, 1:] if n in ("input_ids", "attention_mask", "labels") else longest[n] for n in longest}
    assert bare["attention_mask"].all()
    close(model(**bare).loss, model(**longest).loss, "without a column before the first token", tolerance=1e-5)
    summed = model(**batch, num_items_in_batch=torch.tensor(10)).loss.detach()
    assert abs(float(summed) - total / 10) < 2e-4


def test_gradients_reach_adapter_and_learned_embeddings_only_and_are_right():
    model, batch = adapted().double(), COLLATE(texts())

    def loss():  # the model's own is in float32
        wide = model(**batch).logits[:, :-1].transpose(1, 2)
        return torch.nn.functional.cross_entropy(wide, batch["labels"][:, 1:])

    loss().backward()
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        learns = "lora_" in name or "icae" in name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == learns, name
    for name in ("icae.memory", "icae.reconstruct", "0.self_attn.q_proj.lora_A.default.weight"):
        parameter = next(p for n, p in parameters.items() if n.endswith(name))
        with torch.no_grad():
            steepest, step, losses = parameter.grad.abs().argmax(), 1e-3, []
            for sign in (1, -1):
                parameter.view(-1)[steepest] += sign * step
                losses.append(float(loss()))
                parameter.view(-1)[steepest] -= sign * step
        slope = (losses[0] - losses[1]) / (2 * step)  # norms are computed in float32, hence the tolerance
        assert slope == pytest.approx(float(parameter.grad.view(-1)[steepest]), rel=5e-3), name


def test_layers_that_are_recomputed_give_the_same_gradients():
    batch = COLLATE(texts())
    plain = gradients(adapted().train(), batch)
    model = adapted().train()
    adapter.checkpoint_activations(model.get_base_model(), use_reentrant=False)
    again = gradients(model, batch)
    difference = largest_difference(plain, again)
    assert difference < 1e-6, f"gradients differ by up to {difference:.3g}"
    assert trainable(model).keys() == plain.keys(), "what is trainable has changed"


def test_in_bfloat16_it_trains_and_reads_as_in_float32_up_to_rounding():
    batch, exact = COLLATE(texts()), adapted()
    model = adapted()
    model.get_base_model().to(torch.bfloat16)
    with torch.no_grad():
        difference = abs(float(model(**batch).loss) - float(exact(**batch).loss))
    assert difference < 0.05, f"losses differ by {difference:.3g}"
    found = gradients(model.train(), batch)
    assert all(bool(value.isfinite().all()) for value in found.values())
    assert any("icae" in name for name in found)


def test_gradients_do_not_depend_on_how_the_batch_is_split_and_the_base_stays(tmp_path: Path):
    moved = []
    for parts in (1, 4):
        model = adapted()
        base = {n: v.clone() for n, v in model.named_parameters() if not v.requires_grad}
        before = trainable(model)
        split = {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts}
        train(model, tmp_path, data=texts(), **{**ONE_GRADIENT, **split})
        after = dict(model.named_parameters())
        assert all(torch.equal(base[name], after[name]) for name in base), "training changed base weights"
        moved.append({name: before[name] - after[name].detach() for name in before})
    difference = largest_difference(*moved)
    assert difference < 1e-5, f"gradients differ by up to {difference:.3g}"
    assert max(float(value.abs().max()) for value in moved[0].values()) > 1e-2


def test_checkpoints_hold_the_encoder_alone_and_resume_bit_for_bit(tmp_path: Path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}
    model = adapted(lora_dropout=0.1)
    trainer = train(model, tmp_path / "once", **settings)
    fresh = adapted(seed=8, lora_dropout=0.1)
    again = train(fresh, tmp_path / "again", resume=str(tmp_path / "once" / "checkpoint-2"), **settings)
    difference = largest_difference(trainable(model), trainable(fresh))
    assert difference == 0, f"weights differ by up to {difference:.3g}"
    assert trainer.evaluate()["eval_loss"] == again.evaluate()["eval_loss"]
    trainer.save_model(str(tmp_path / "model"))
    names = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert {"adapter_model.safetensors", "icae.safetensors"} <= set(names)
    assert "model.safetensors" not in names
    batch = COLLATE(texts())
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        for folder in (tmp_path / "model", tmp_path / "once" / "checkpoint-4"):
            loaded = ICAEModel.from_pretrained(tiny_model(), folder)
            assert torch.equal(loaded(**batch).logits, expected), folder.name
            assert not loaded.training
            assert not trainable(loaded)
        stock = PeftModel.from_pretrained(tiny_model(), tmp_path / "model")  # the encoder is a stock adapter
        ids, mask = tiny_models.prompts((6, 4), seed=2)
        ids = ids.clamp_max(60)
        close(stock(ids, mask).logits, model.get_base_model()(ids, mask).logits, "the encoder", tolerance=1e-6)
    more = ICAEModel.from_pretrained(tiny_model(), tmp_path / "model", is_trainable=True)
    assert trainable(more).keys() == trainable(model).keys()


def test_the_best_checkpoint_is_loaded_whole(tmp_path: Path):
    settings = {
        "max_steps": 2, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
        "load_best_model_at_end": True, "learning_rate": 3.0, "lr_scheduler_type": "constant", "optim": "sgd",
    }  # fmt: skip
    model = adapted()
    trainer = train(model, tmp_path, **settings)
    best = ICAEModel.from_pretrained(tiny_model(), trainer.state.best_model_checkpoint)
    difference = largest_difference(trainable(model), {n: dict(best.named_parameters())[n] for n in trainable(model)})
    assert difference == 0, f"weights differ from the best checkpoint's by up to {difference:.3g}"


def test_a_model_in_bfloat16_is_taken_as_it_is():
    made = ICAEModel(tiny_models.build("llama").bfloat16(), LoraConfig(**CONFIG), slots=2)
    assert made.learned.memory.dtype == torch.float32
    assert made.compress(*tiny_models.prompts()).vectors.dtype == torch.bfloat16
