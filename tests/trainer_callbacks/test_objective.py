"""The engine: what it installs, what it refuses, and that nothing outside training notices it."""

import copy
import gc
from dataclasses import dataclass

import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_ext.testing.example_objectives import Focal, Roulette, Twice
from hf_ext.testing.objective_training import MASK, arguments, collate, examples, tiny_model, train
from hf_ext.trainer_callbacks import MEAP, Objective, attach, detach
from hf_ext.trainer_callbacks.installation import Installation


class During(TrainerCallback):
    """Call a function with the model in the middle of training."""

    def __init__(self, look):
        self.look = look

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.look(model)


def trainer_with(tmp_path, *callbacks, model=None, cls=Trainer, **changes):
    return cls(
        model=model or tiny_model(),
        args=arguments(tmp_path, **changes),
        train_dataset=examples(16),
        data_collator=collate,
        callbacks=list(callbacks),
    )


def test_installed_prints_what_is_where_during_training_only(tmp_path):
    objective, seen = Focal(), []
    trainer_with(tmp_path, objective, During(lambda model: seen.append(objective.installed()))).train()
    assert seen[0] == [
        "forward pre-hook on LlamaForCausalLM: clean next-token loss",
        "loss_function of LlamaForCausalLM: focal.token_loss",
    ]
    assert objective.installed() == []


def test_passes_that_do_not_train_read_the_uncorrupted_batch(tmp_path):
    batch = collate(examples(4))
    reference, seen = [], []

    def look(model):
        copied = tiny_model()
        copied.load_state_dict(model.state_dict())
        with torch.no_grad():
            reference.append(copied(**batch).loss)
            seen.append(model(**batch).loss)  # in training mode, without gradients
            model.eval()
            seen.append(model(**batch).loss)
        seen.append(model(**batch).loss.detach())  # with gradients, in evaluation mode
        model.train()

    for objective in (MEAP(mask_ratio=0.5, mask_token_id=MASK), Focal()):
        reference.clear()
        seen.clear()
        trainer_with(tmp_path, objective, During(look), max_steps=1).train()
        assert all(torch.equal(loss, reference[0]) for loss in seen), (reference, seen)


def test_a_copy_of_the_model_made_during_training_is_not_corrupted(tmp_path):
    batch, seen = collate(examples(4)), []

    def look(model):
        twin, plain = copy.deepcopy(model), tiny_model()
        plain.load_state_dict(model.state_dict())
        seen.append((twin.train()(**batch).loss, plain.train()(**batch).loss))

    for objective in (MEAP(mask_ratio=0.5, mask_token_id=MASK), Focal()):
        trainer_with(tmp_path, objective, During(look), max_steps=1).train()
    assert all(torch.equal(*pair) for pair in seen), seen


def test_positional_arguments_are_corrupted_as_well(tmp_path):
    seen = []

    def look(model):
        tokens = collate(examples(4))["input_ids"]
        hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        model(tokens)
        hook.remove()

    trainer_with(tmp_path, MEAP(mask_ratio=0.5, mask_token_id=MASK), During(look), max_steps=1).train()
    assert (seen[0] == MASK).any()


def test_hooks_leave_the_model_with_the_objective_when_training_raised(tmp_path):
    model = tiny_model()

    def fail(model):
        raise OSError("interrupted")

    trainer = trainer_with(tmp_path, Focal(), During(fail), model=model)
    with pytest.raises(OSError, match="interrupted"):
        trainer.train()
    assert model._forward_pre_hooks
    del trainer
    gc.collect()
    assert not model._forward_pre_hooks
    assert "_loss_function" not in vars(model)


def test_training_twice_after_a_failure_installs_one_hook(tmp_path):
    objective, seen = MEAP(mask_token_id=MASK), []
    fail = During(lambda model: 1 / 0)
    trainer = trainer_with(tmp_path, objective, fail)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    fail.look = lambda model: seen.append(len(model._forward_pre_hooks))
    trainer.train()
    assert seen == [1, 1]
    assert not trainer.model._forward_pre_hooks


def test_a_loss_function_that_the_user_set_is_put_back(tmp_path):
    model = tiny_model()
    own = model.loss_function

    def mine(**inputs):
        return own(**inputs)

    model.loss_function = mine
    trainer_with(tmp_path, Focal(), model=model, max_steps=1).train()
    assert vars(model)["_loss_function"] is mine


def test_two_objectives_that_replace_the_loss_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"focal cannot be combined with focal: both replace the loss \(token_loss"):
        trainer_with(tmp_path, Focal(), Focal(gamma=1.0)).train()


def test_a_corruption_and_a_token_loss_train_together(tmp_path):
    """The gradient is that of the token loss on the corrupted batch; the clean loss is measured once, before it."""
    model, reads = tiny_model(), []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, given: reads.append(given[0].clone()))
    step = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    trainer = trainer_with(tmp_path, MEAP(mask_ratio=0.5, mask_token_id=MASK), Focal(gamma=2.0), model=model, **step)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer.train()
    hook.remove()
    clean, corrupted = reads
    assert not (clean == MASK).any()
    assert (corrupted == MASK).any()
    row = next(i for i in collate(examples(16))["input_ids"].tolist() if i[:3] == clean[0, :3].tolist())
    assert row[: clean.shape[1]] == clean[0].tolist()[: len(row)]
    plain = tiny_model()
    labels = torch.full_like(clean, -100)
    by_start = {tuple(r["input_ids"][:4]): r["labels"] for r in examples(16)}
    for i, tokens in enumerate(clean.tolist()):
        wanted = by_start[tuple(tokens[:4])]
        labels[i, : len(wanted)] = torch.tensor(wanted)
    mask = (clean != 0).long()
    logits = plain(corrupted, attention_mask=mask).logits
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    total, count = Focal(gamma=2.0).token_loss(logits, targets)
    (total / count).backward()
    difference = max(
        float((before[name] - model.get_parameter(name) - value.grad).abs().max())
        for name, value in plain.named_parameters()
    )
    assert difference < 1e-6, f"gradients differ by up to {difference:.3g}"
    assert len([entry for entry in trainer.state.log_history if "clean_loss" in entry]) == 1


def test_a_step_without_attach_is_refused_with_the_line_to_write(tmp_path):
    with pytest.raises(ValueError, match=r"Twice replaces the whole training step.*attach\(trainer, Twice"):
        trainer_with(tmp_path, Twice()).train()


@pytest.mark.parametrize(("objective", "attached"), [(Focal(), False), (Twice(), True)])
def test_label_smoothing_with_another_loss_is_refused(tmp_path, objective, attached):
    with pytest.raises(ValueError, match="label_smoothing_factor must be 0"):
        train(tiny_model(), objective, attached=attached, label_smoothing_factor=0.1)


def test_a_loss_that_bypasses_the_token_loss_stops_before_the_first_update(tmp_path):
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    trainer = trainer_with(tmp_path, Focal(), model=model)
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch: outputs.logits.mean()
    with pytest.raises(RuntimeError, match=r"focal\.token_loss was not asked in this step.*compute_loss_func.*attach"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_sft_trainer_with_a_token_loss_says_to_attach():
    from hf_ext.testing.objective_processes import train_sft

    with pytest.raises(ValueError, match=r"fuses the head with the loss.*attach\(trainer, Focal"):
        train_sft(tiny_model(), Focal(), 1, attached=False)


def test_data_parallel_is_refused(tmp_path, monkeypatch):
    args = arguments(tmp_path)
    monkeypatch.setattr(type(args), "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match=r"does not work under torch\.nn\.DataParallel"):
        MEAP(mask_token_id=MASK).on_train_begin(args, None, None, model=tiny_model())


@dataclass(eq=False)
class InPlace(Objective):
    def corrupt(self, inputs):
        inputs["input_ids"].fill_(MASK)
        return inputs


@dataclass(eq=False)
class ChangesLabels(Objective):
    def corrupt(self, inputs):
        return {**inputs, "labels": inputs["labels"].clone()}


@dataclass(eq=False)
class NotSummed(Objective):
    def token_loss(self, logits, targets, **extra):
        return logits.sum(-1), (targets != -100).sum()


@pytest.mark.parametrize(
    ("objective", "error", "message"),
    [
        (InPlace(), RuntimeError, "changed input_ids in place"),
        (ChangesLabels(), ValueError, "changed labels, but the Trainer has counted the targets"),
        (NotSummed(), ValueError, r"must return a summed scalar, got shape \(8,"),
    ],
)
def test_a_hook_that_breaks_its_contract_is_stopped(objective, error, message):
    with pytest.raises(error, match=message):
        train(tiny_model(), objective)


def test_extra_tensors_of_the_batch_reach_the_token_loss():
    seen = []

    @dataclass(eq=False)
    class Weighted(Focal):
        def token_loss(self, logits, targets, *, importance, **extra):
            seen.append(importance.shape)
            return super().token_loss(logits, targets)

    def with_importance(rows):
        return {**collate(rows), "importance": torch.ones(len(rows))}

    train(tiny_model(), Weighted(), collator=with_importance, max_steps=1)
    assert seen == [(8,)]


class Reporter(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def test_attach_keeps_the_trainers_class_and_detach_gives_it_back(tmp_path):
    class Mine(Trainer):
        def compute_loss(self, *args, **kwargs):
            self.asked = True
            return super().compute_loss(*args, **kwargs)

    reporter = Reporter()
    trainer = trainer_with(tmp_path, reporter, cls=Mine, max_steps=1)
    objective = MEAP(mask_ratio=0.3, mask_token_id=MASK)
    assert attach(trainer, objective) is trainer
    assert isinstance(trainer, Mine)
    assert type(trainer).__name__ == "Mine"
    with pytest.raises(ValueError, match="has meap attached"):
        attach(trainer, Focal())
    trainer.train()
    assert trainer.asked
    assert "clean_loss" in reporter.seen[0], "a callback that was there before attach does not see the clean loss"
    assert detach(trainer) is objective
    assert type(trainer) is Mine
    assert objective not in trainer.callback_handler.callbacks
    with pytest.raises(ValueError, match="no objective is attached"):
        detach(trainer)


def test_clean_loss_is_measured_at_logged_steps_only_unless_asked_otherwise():
    counts = {}
    for every, logging_steps in ((None, 2), (1, 2), (0, 1), (4, 4)):
        calls = []

        class Counting(Roulette):
            def measure_clean_loss(self, forward, model, inputs, calls=calls):
                calls.append(self._state.global_step + 1)
                super().measure_clean_loss(forward, model, inputs)

        train(tiny_model(), Counting(clean_loss_every=every), max_steps=4, logging_steps=logging_steps)
        counts[every] = calls
    assert counts == {None: [2, 4], 1: [1, 2, 3, 4], 0: [], 4: [4]}


def test_clean_loss_with_logging_by_epoch_is_measured_at_the_end_of_each():
    trainer = train(tiny_model(), MEAP(mask_token_id=MASK), max_steps=4, logging_strategy="epoch")
    entries = [entry for entry in trainer.state.log_history if "clean_loss" in entry]
    assert [entry["step"] for entry in entries] == [2, 4]


def test_a_negative_interval_is_refused():
    with pytest.raises(ValueError, match="clean_loss_every must be None, 0 or a number of steps, got -1"):
        MEAP(clean_loss_every=-1)


def test_code_that_was_compiled_before_sees_the_hooks_of_a_training(tmp_path):
    """`torch.compile` keeps no watch on hooks: without compiling anew, those that come later are never called."""
    model, seen = torch.nn.Sequential(torch.nn.Linear(2, 2)), []
    compiled = torch.compile(model, backend="eager")
    compiled(torch.ones(1, 2))
    model[0].register_forward_pre_hook(torch.compiler.disable(lambda module, given: seen.append(1)))
    compiled(torch.ones(1, 2))
    assert not seen, "torch.compile now sees hooks that come later: Installation need not reset it"
    Installation(Focal(), tiny_model(), arguments(tmp_path, torch_compile=True, torch_compile_backend="eager")).remove()
    compiled(torch.ones(1, 2))
    assert seen
