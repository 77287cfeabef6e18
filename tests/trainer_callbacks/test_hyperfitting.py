"""Hyperfitting: plain training that ends by its own loss, and what is measured of greedy text."""

import math
import tempfile
from typing import ClassVar

import pytest
import torch
from transformers import Trainer

from hf_ext.testing.example_objectives import Roulette
from hf_ext.testing.objective import ObjectiveInProcess
from hf_ext.testing.objective_processes import tiny_tokenizer
from hf_ext.testing.objective_training import (
    arguments,
    collate,
    examples,
    largest_difference,
    logged,
    tiny_model,
    weights,
)
from hf_ext.trainer_callbacks.hyperfitting import Hyperfitting, greedy_text


class TestHyperfitting(ObjectiveInProcess):
    objective = Hyperfitting
    options: ClassVar = {"largest_rate": None, "prompts": [[5, 6, 7]], "new_tokens": 8}
    null_options: ClassVar = {"largest_rate": None, "threshold": 0}
    attached_sft = True

    def run(self, model, objective, **changes):
        """Train at a constant rate, as hyperfitting demands."""
        return super().run(model, objective, **{"lr_scheduler_type": "constant", **changes})

    def test_it_trains_something_else_than_plain_next_token_prediction(self) -> None:
        """It does not: the gradient is the plain one, and only the end of training differs."""
        plain, _ = self.gradient(self.model(), None)
        mine, _ = self.gradient(self.model(), self.make())
        difference = largest_difference(plain, mine)
        assert difference == 0, f"gradients differ by up to {difference:.3g}"
        ended = self.run(self.model(), self.make(threshold=100), max_steps=8)
        assert ended.state.global_step == 2, "two steps are an epoch here"

    def test_it_trains_together_with_another_objective(self) -> None:
        """Beside a corruption the gradient is that of the corruption."""
        alone, _ = self.gradient(self.model(), Roulette(share=0.3))
        both, _ = self.gradient(self.model(), self.make(), company=[Roulette(share=0.3)])
        difference = largest_difference(alone, both)
        assert difference == 0, f"gradients differ by up to {difference:.3g}"


def hyperfit(objective, rows=4, **changes):
    model = tiny_model()
    values = {"max_steps": -1, "num_train_epochs": 200, "lr_scheduler_type": "constant", "learning_rate": 1e-2}
    args = arguments(tempfile.mkdtemp(), **{**values, "logging_strategy": "epoch", **changes})
    trainer = Trainer(
        model,
        args,
        train_dataset=examples(rows),
        data_collator=collate,
        processing_class=tiny_tokenizer(),
        callbacks=[objective],
    )
    trainer.train()
    return trainer


def test_training_ends_after_the_first_epoch_whose_mean_loss_is_under_the_threshold():
    objective = Hyperfitting(threshold=0.5, largest_rate=None, clean_loss_every=0)
    trainer = hyperfit(objective, per_device_train_batch_size=1)
    means = logged(trainer, "epoch_loss")
    assert all(mean > 0.5 for mean in means[:-1])
    assert means[-1] <= 0.5
    assert len(means) == trainer.state.epoch < 100
    batch = collate(examples(4))
    with torch.no_grad():
        assert float(trainer.model.eval()(**batch).loss) < 0.5


def test_a_threshold_of_zero_never_ends_training():
    assert hyperfit(Hyperfitting(threshold=0, largest_rate=None), num_train_epochs=30).state.epoch == 30


def test_greedy_text_is_measured_before_and_after_from_texts_and_ids():
    objective = Hyperfitting(
        threshold=0.3, prompts=["w5 w6 w7", [8, 9]], new_tokens=12, largest_rate=None, clean_loss_every=0
    )
    trainer = hyperfit(objective)
    assert set(objective.report) == {"before", "after"}
    for figures in objective.report.values():
        assert 0 < figures["type_token_ratio"] <= 1
        assert 0 <= figures["repetition"] < 1
        assert figures["tokens"] <= 12
    assert objective.report["after"]["entropy"] < objective.report["before"]["entropy"] - 1, objective.report
    assert objective.report["before"] == greedy_text(tiny_model(), [[5, 6, 7], [8, 9]], 12)
    assert logged(trainer, "entropy_after") == [objective.report["after"]["entropy"]]


class Scripted(torch.nn.Module):
    """Stand in for a model that continues with given tokens."""

    def __init__(self, texts, logits):
        super().__init__()
        self.texts, self.logits = iter(texts), logits
        self.embedding = torch.nn.Embedding(2, 2)
        self.generation_config = type("Config", (), {"eos_token_id": [0]})()

    def get_input_embeddings(self):
        return self.embedding

    def generate(self, input_ids, attention_mask, generation_config):
        assert not self.training
        assert generation_config.do_sample is False
        sequence = torch.tensor([input_ids[0].tolist() + next(self.texts)])
        return type("Output", (), {"sequences": sequence, "logits": [self.logits]})()


def test_the_figures_are_those_of_the_formulas():
    # 4-grams of 1 2 1 2 1 2 1: (1212) (2121) (1212) (2121), two of four repeat
    texts = [[1, 2, 1, 2, 1, 2, 1, 0, 0], [5, 6, 7, 8]]
    found = greedy_text(Scripted(texts, torch.tensor([[0.0, 0.0, -math.inf]])), [[9], [9, 9]], 8)
    assert found["type_token_ratio"] == pytest.approx((2 / 7 + 1) / 2)
    assert found["repetition"] == pytest.approx((0.5 + 0) / 2)
    assert found["entropy"] == pytest.approx(math.log(2))
    assert found["tokens"] == pytest.approx(5.5)


def test_only_the_last_tokens_count_for_the_type_token_ratio():
    text = [*range(100, 150), *([7] * 96)]
    assert greedy_text(Scripted([text], torch.zeros(1, 2)), [[1]], 146)["type_token_ratio"] == 1 / 96


def test_measuring_leaves_mode_and_weights_alone():
    model = tiny_model().train()
    before = weights(model)
    greedy_text(model, [[4, 5]], 4)
    assert model.training
    assert all(module.training for module in model.modules())
    assert largest_difference(before, weights(model)) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr_scheduler_type": "linear"}, "set it to 'constant'"),
        ({"learning_rate": 1e-3}, "needs a small learning rate"),
        ({"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}, "set it to False"),
    ],
)
def test_another_recipe_is_refused(changes, message, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1} if "eval_steps" in changes else {}
    args = arguments(tmp_path, **{"lr_scheduler_type": "constant", "learning_rate": 1e-5, **options, **changes})
    with pytest.raises(ValueError, match=message):
        Hyperfitting().setup(tiny_model(), None, args)


def test_wrong_options_are_refused(tmp_path):
    args = arguments(tmp_path, lr_scheduler_type="constant", learning_rate=1e-5)
    with pytest.raises(ValueError, match="has no tokenizer"):
        Hyperfitting(prompts=["def"]).setup(tiny_model(), None, args)
    with pytest.raises(ValueError, match=r"write \[text\]"):
        Hyperfitting(prompts="def")
    with pytest.raises(ValueError, match="new_tokens must be 4 or more"):
        Hyperfitting(new_tokens=1)
