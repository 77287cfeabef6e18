import json
import sys

import pytest
import torch
from transformers import LlamaForCausalLM, Trainer

from hf_ext.generation.heads import HiddenTransferHead, KangarooHead, RecurrentDrafterHead
from hf_ext.layers import TargetEnds, captured
from hf_ext.testing import objective_processes as processes
from hf_ext.testing.objective import installed_parts
from hf_ext.testing.objective_training import (
    arguments,
    collate,
    examples,
    largest_difference,
    logged,
    tiny_model,
    train,
    weights,
)
from hf_ext.trainer_callbacks import MEAP
from hf_ext.trainer_callbacks.draft_head import TrainDraftHead

STEP = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
HEADS = [
    (KangarooHead, {"exit_layer": 1}),
    (RecurrentDrafterHead, {"train_steps": 3}),
    (HiddenTransferHead, {"transfer_layers": [1, 1], "anchors": 4}),
]
each_head = pytest.mark.parametrize(("kind", "options"), HEADS, ids=[kind.__name__ for kind, _ in HEADS])


def made(kind, options, target=None, seed=3):
    torch.manual_seed(seed)
    return kind.for_target(target or tiny_model(), **options)


def gradient(kind, options, **changes):
    """The head's gradient of one step, and the loss that was logged."""
    target, head = tiny_model(attention_dropout=0.3), made(kind, options)
    before = weights(head)
    trainer = train(target, TrainDraftHead(head), **{**STEP, **changes})
    after = weights(head)
    return {name: before[name] - after[name] for name in before}, logged(trainer, "loss")[0]


@each_head
def test_gradients_and_loss_do_not_depend_on_how_the_batch_is_split(kind, options):
    whole, loss = gradient(kind, options)
    assert max(float(value.abs().max()) for value in whole.values()) > 1e-5, "no gradient at all"
    for parts in (4, 8):
        split, split_loss = gradient(
            kind, options, per_device_train_batch_size=8 // parts, gradient_accumulation_steps=parts
        )
        difference = largest_difference(whole, split)
        assert difference <= 1e-6, f"split in {parts}: gradients differ by up to {difference:.3g}"
        assert abs(split_loss - loss) <= 1e-5, f"split in {parts}: loss {split_loss}, whole {loss}"


@each_head
def test_the_target_is_bit_equal_afterwards_and_nothing_is_left_on_it(kind, options):
    target, plain = tiny_model(), tiny_model()
    target.lm_head.weight.requires_grad_(False)  # a flag of the user's own
    flags = [parameter.requires_grad for parameter in target.parameters()]
    before, head = weights(target), made(kind, options)
    start, callback = weights(head), TrainDraftHead(head)
    train(target, callback)
    train(plain, None)
    assert largest_difference(before, weights(target)) == 0
    assert largest_difference(start, weights(head)) > 0, "the head did not train"
    assert [parameter.requires_grad for parameter in target.parameters()] == flags
    assert all(parameter.grad is None for parameter in target.parameters())
    left, expected = installed_parts(target), installed_parts(plain)
    assert {name: parts for name, parts in left.items() if parts != expected[name]} == {}
    assert callback.installed() == []


@each_head
def test_resume_restores_the_head_bit_for_bit(kind, options, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    settings["per_device_train_batch_size"] = 4
    head, resumed = made(kind, options), made(kind, options, seed=9)
    trainer = train(tiny_model(), TrainDraftHead(head), folder=tmp_path / "first", **settings)
    torch.manual_seed(99)
    checkpoint = tmp_path / "first" / "checkpoint-2"
    again = train(tiny_model(), TrainDraftHead(resumed), folder=tmp_path / "second", resume=str(checkpoint), **settings)
    difference = largest_difference(weights(head), weights(resumed))
    assert difference == 0, f"heads differ by up to {difference:.3g}"
    assert logged(trainer, "loss") == logged(again, "loss")
    saved = kind.from_pretrained(tmp_path / "first" / "checkpoint-4" / "draft_head")
    assert largest_difference(weights(head), weights(saved)) == 0


def test_a_checkpoint_loads_as_the_plain_target(tmp_path):
    target = tiny_model()
    train(target, TrainDraftHead(made(*HEADS[0])), folder=tmp_path, save_strategy="steps", save_steps=2)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert largest_difference(weights(target), weights(loaded)) == 0


def test_dropout_of_the_target_does_not_touch_the_head():
    kind, options = HEADS[0]
    _, loss = gradient(kind, options)
    target, head = tiny_model(), made(kind, options)
    without = logged(train(target, TrainDraftHead(head), **STEP), "loss")[0]
    assert loss == without


@each_head
def test_training_lowers_the_held_out_loss_and_evaluation_repeats_itself(kind, options, tmp_path):
    target, head = tiny_model(), made(kind, options)
    with torch.no_grad():  # a target with something to imitate
        target.lm_head.weight.mul_(20)
    args = arguments(tmp_path, max_steps=30, learning_rate=0.02, prediction_loss_only=True)
    rows, held_out = examples(16), examples(8, seed=1)
    trainer = Trainer(target, args, collate, rows, held_out, callbacks=[TrainDraftHead(head)])
    before = trainer.evaluate()
    assert trainer.evaluate()["eval_loss"] == before["eval_loss"]
    trainer.train()
    again = Trainer(target, args, collate, rows, held_out, callbacks=[TrainDraftHead(head)])
    after = again.evaluate()
    assert after["eval_loss"] < before["eval_loss"] - 0.05, (before, after)
    name = "eval_agreement" if kind is KangarooHead else "eval_agreement_1"
    assert 0 <= after[name] <= 1
    assert logged(trainer, name.removeprefix("eval_")), "the agreement is not in the training log"


def test_bf16_autocast_gives_nearly_the_loss_of_full_precision():
    kind, options = HEADS[0]
    _, full = gradient(kind, options)
    _, half = gradient(kind, options, bf16=True)
    assert half != full
    assert abs(half - full) < 2e-2 * full, f"{half} under bf16, {full} in float32"


@each_head
def test_a_target_in_half_precision_trains_a_head_of_full_precision(kind, options, tmp_path):
    """Without `bf16=True`: the weights of most targets are in bfloat16, and a head is made in float32."""
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        target = tiny_model().to(dtype)
        head = made(kind, options, target)
        before = weights(head)
        losses[dtype] = logged(train(target, TrainDraftHead(head), **STEP), "loss")[0]
        assert head.dtype == torch.float32
        assert largest_difference(before, weights(head)) > 0, "the head has not learned"
    full, half = losses.values()
    assert abs(half - full) < 2e-2 * full, f"{half} of a target in bfloat16, {full} in float32"
    with pytest.raises(ValueError, match="float16"):
        Trainer(tiny_model().half(), arguments(tmp_path), callbacks=[TrainDraftHead(made(kind, options))])


def test_the_model_still_generates_while_the_head_is_on_it(tmp_path):
    target = tiny_model().eval()
    ids = torch.tensor([[1, 5, 6]])
    expected = target.generate(ids, max_new_tokens=5, do_sample=False)
    callback = TrainDraftHead(made(*HEADS[0]))
    with_callback = Trainer(target, arguments(tmp_path), callbacks=[callback])
    assert torch.equal(with_callback.model.generate(ids, max_new_tokens=5, do_sample=False), expected)
    assert any("draft_head" in line for line in callback.installed())
    callback.remove()
    assert not hasattr(target, "draft_head")


def test_remove_cleans_up_after_training_that_raised():
    target, callback = tiny_model(), TrainDraftHead(made(*HEADS[0]))

    def broken(rows):
        raise OSError("the data is gone")

    with pytest.raises(OSError, match="gone"):
        train(target, callback, collator=broken)
    callback.remove()
    assert not target._forward_pre_hooks
    assert not hasattr(target, "draft_head")
    assert all(parameter.requires_grad for parameter in target.parameters())


def test_a_pass_that_raises_leaves_no_layer_hook_behind(tmp_path):
    target, callback = tiny_model(), TrainDraftHead(made(*HEADS[0]))
    Trainer(target, arguments(tmp_path), callbacks=[callback])
    with pytest.raises(IndexError):
        target(input_ids=torch.tensor([[5, 999]]), labels=torch.tensor([[5, 6]]))
    assert not any(layer._forward_hooks for layer in target.model.layers)
    callback.remove()


def test_the_head_is_taught_by_what_the_target_says_without_it():
    """The loss logged at the first step is the cross-entropy computed by hand from a plain forward pass."""
    kind, options = HEADS[0]
    seen = []

    def spy(rows):
        seen.append(collate(rows))
        return seen[-1]

    head = made(kind, options)
    start = made(kind, options)
    loss = logged(train(tiny_model(), TrainDraftHead(head), collator=spy, **STEP), "loss")[0]
    target, batch = tiny_model().eval(), seen[0]
    with torch.no_grad():
        with captured(target, [1]) as states:
            teacher = target(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        total, count, ends = 0.0, 0, TargetEnds(target)
        for row in range(8):  # each row alone, without its padding
            length = int(batch["attention_mask"][row].sum())
            drafted = start.logits(states[1][row : row + 1, :length], torch.arange(length)[None], ends)[0, :-1]
            keep = batch["labels"][row, 1:length] != -100
            wanted = teacher[row, : length - 1].softmax(-1)
            total -= float((wanted * drafted.log_softmax(-1)).sum(-1)[keep].sum())
            count += int(keep.sum())
    assert loss == pytest.approx(total / count, abs=1e-5)


def test_what_cannot_work_is_refused_when_the_trainer_is_built(tmp_path):
    head = made(*HEADS[0])
    with pytest.raises(ValueError, match="merge_and_unload"):
        Trainer(processes.with_lora(tiny_model()), arguments(tmp_path), callbacks=[TrainDraftHead(head)])
    with pytest.raises(ValueError, match="num_hidden_layers is 3, was 2"):
        Trainer(tiny_model(num_hidden_layers=3), arguments(tmp_path), callbacks=[TrainDraftHead(head)])
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        Trainer(tiny_model(), arguments(tmp_path, label_smoothing_factor=0.1), callbacks=[TrainDraftHead(head)])
    target = tiny_model()
    first = Trainer(target, arguments(tmp_path), callbacks=[TrainDraftHead(head)])
    with pytest.raises(ValueError, match="draft_head already"):
        Trainer(target, arguments(tmp_path), callbacks=[TrainDraftHead(made(*HEADS[0]))])
    assert first.model is target  # the head stays as long as its Trainer lives


def test_a_callback_that_came_too_late_or_twice_is_refused(tmp_path):
    callback = TrainDraftHead(made(*HEADS[0]))
    trainer = Trainer(tiny_model(), arguments(tmp_path), collate, examples(8))
    trainer.add_callback(callback)
    with pytest.raises(ValueError, match="when the Trainer is built"):
        trainer.train()


def test_an_objective_beside_it_is_refused(tmp_path):
    both = [TrainDraftHead(made(*HEADS[0])), MEAP(mask_token_id=3)]
    trainer = Trainer(tiny_model(), arguments(tmp_path), collate, examples(8), callbacks=both)
    with pytest.raises(ValueError, match="objective"):
        trainer.train()


def test_the_config_records_the_target_and_no_weight_of_it(tmp_path):
    target = tiny_model()
    for kind, options in HEADS:
        head = made(kind, options, target)
        head.save_pretrained(tmp_path / kind.__name__)
        config = json.loads((tmp_path / kind.__name__ / "config.json").read_text())
        assert config["target"] == {
            "model_type": "llama",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "vocab_size": 64,
        }
        assert not any(64 in parameter.shape[:1] and "block" not in name for name, parameter in head.named_parameters())


IN_A_PROCESS = """
import sys
import torch
from hf_ext.generation.heads import HiddenTransferHead
from hf_ext.testing.objective_processes import DESCENT
from hf_ext.testing.objective_training import tiny_model, train, logged, weights
from hf_ext.trainer_callbacks import TrainDraftHead
torch.manual_seed(3)
head = HiddenTransferHead.for_target(tiny_model(), transfer_layers=[1, 1], anchors=4)
trainer = train(tiny_model(), TrainDraftHead(head), per_device_train_batch_size=4, **DESCENT)
assert trainer.args.world_size == 2, trainer.args.world_size
saved = {"weights": weights(head), "loss": logged(trainer, "loss"), "agreement": logged(trainer, "agreement_1")}
torch.save(saved, f"{sys.argv[1]}/{trainer.args.process_index}.pt")
"""


def test_two_processes_train_the_head_that_one_process_trains(tmp_path):
    port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(processes.free_port()), "ACCELERATE_USE_CPU": "true"}
    ranks = [{"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2"} for r in (0, 1)]
    command = [sys.executable, "-c", IN_A_PROCESS, str(tmp_path)]
    running = [processes.start(command, {**port, **rank}) for rank in ranks]
    head = made(HiddenTransferHead, {"transfer_layers": [1, 1], "anchors": 4})
    alone = train(tiny_model(), TrainDraftHead(head), **processes.DESCENT)
    for process in running:
        processes.finish(process)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert largest_difference(first["weights"], second["weights"]) == 0
    difference = largest_difference(weights(head), first["weights"])
    assert difference <= 1e-6, f"two processes and one differ by up to {difference:.3g}"
    assert first["loss"] == pytest.approx(logged(alone, "loss"), abs=1e-5)
    assert first["agreement"] == pytest.approx(logged(alone, "agreement_1"), abs=1e-6)
