"""The conformance suite's tests of an objective on a stock Trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_ext.testing.objective_base import SPLIT_TOLERANCE, ObjectiveSuite, installed_parts
from hf_ext.testing.objective_training import collate, examples, largest_difference, logged, weights
from hf_ext.trainer_callbacks.clean_loss import next_token_loss, shifted_targets


class OnTrainer(ObjectiveSuite):
    """What holds for any objective on a stock Trainer in one process."""

    def test_gradients_and_loss_do_not_depend_on_how_the_batch_is_split(self) -> None:
        """1x8, 4x2 and 8x1 rows give the same gradient, although rows differ in length."""
        whole, whole_loss = self.whole()
        for parts in (4, 8):
            split = {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts}
            gradient, loss = self.gradient(self.model(), self.make(), **split)
            difference = largest_difference(whole, gradient)
            assert difference <= SPLIT_TOLERANCE, f"split in {parts}: gradients differ by up to {difference:.3g}"
            assert abs(loss - whole_loss) <= SPLIT_TOLERANCE, f"split in {parts}: loss {loss}, whole {whole_loss}"

    def test_it_trains_something_else_than_plain_next_token_prediction(self) -> None:
        """With `options`, the gradient is not the plain one; otherwise the other tests say nothing."""
        changed, _ = self.whole()
        plain, _ = self.gradient(self.model(), None)
        difference = largest_difference(changed, plain)
        assert difference > 1e-4, f"gradient differs from plain training by {difference:.3g} only"

    def test_zero_strength_is_plain_training_bit_for_bit(self) -> None:
        """With `null_options` and dropout, weights end the same as without the objective."""
        models = [self.model(attention_dropout=0.2), self.model(attention_dropout=0.2)]
        self.run(models[0], self.objective(**self.null_options))
        self.run(models[1], None)
        difference = largest_difference(weights(models[0]), weights(models[1]))
        assert difference == 0, f"weights differ by up to {difference:.3g}"

    def test_evaluation_during_training_is_plain_evaluation(self) -> None:
        """`eval_loss` in the middle of training is that of the same weights under a plain Trainer."""
        model = self.model()
        trainer = self.run(model, self.make(), max_steps=1, eval_strategy="steps", eval_steps=1)
        untouched = self.model()  # the trained instance may still carry what a broken objective left on it
        untouched.load_state_dict(model.state_dict())
        here, there = logged(trainer, "eval_loss")[0], self.evaluate_plainly(untouched, trainer.args)
        assert abs(here - there) <= 1e-6, f"eval_loss is {here} under the objective, {there} without it"

    def test_clean_loss_is_the_next_token_loss_on_the_uncorrupted_batch(self) -> None:
        """The first logged `clean_loss` is what one forward pass over the whole batch gives by hand."""
        model = self.model()
        batch = collate(examples(16))
        with torch.no_grad():
            logits = model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        total, count = next_token_loss(logits, shifted_targets(batch["labels"]))
        for split in (16, 4):
            trainer = self.run(
                self.model(),
                self.make(),
                max_steps=2,
                per_device_train_batch_size=split,
                gradient_accumulation_steps=16 // split,
            )
            seen = logged(trainer, "clean_loss")
            assert len(seen) == 2, f"clean_loss logged {len(seen)} times in two logged steps"
            assert abs(seen[0] - float(total / count)) <= 1e-5, f"clean_loss {seen[0]}, by hand {float(total / count)}"

    def test_measuring_the_clean_loss_changes_nothing(self) -> None:
        """With dropout, weights are bit-equal whether the clean loss is measured or not."""
        models = [self.model(attention_dropout=0.2) for _ in range(2)]
        for model, every in zip(models, (0, 1), strict=True):
            self.run(model, self.make(clean_loss_every=every))
        difference = largest_difference(weights(models[0]), weights(models[1]))
        assert difference == 0, f"weights differ by up to {difference:.3g}"

    def test_resume_from_a_checkpoint_is_bit_equal(self, tmp_path: Path) -> None:
        """Four steps, and two steps plus a resume in a new trainer, end with the same bits and logs."""
        options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
        options["per_device_train_batch_size"] = 4
        model, resumed = self.model(attention_dropout=0.2), self.model(seed=1, attention_dropout=0.2)
        trainer = self.run(model, self.make(), folder=tmp_path, **options)
        torch.manual_seed(99)  # the random state must come from the checkpoint
        checkpoint = str(tmp_path / "checkpoint-2")
        again = self.run(resumed, self.make(), folder=tmp_path / "again", resume=checkpoint, **options)
        difference = largest_difference(weights(model), weights(resumed))
        assert difference == 0, f"weights differ by up to {difference:.3g}"
        for name in ("loss", self.plain_loss):
            assert logged(trainer, name) == logged(again, name), f"{name} differs after the resume"

    def test_gradient_checkpointing_sees_the_same_batch(self) -> None:
        """Recomputing the layers gives the gradient of training without checkpointing."""
        plain, loss = self.whole()
        saved, saved_loss = self.gradient(self.model(), self.make(), gradient_checkpointing=True)
        difference = largest_difference(plain, saved)
        assert difference <= 1e-6, f"gradients differ by up to {difference:.3g}"
        assert abs(loss - saved_loss) <= 1e-6, f"loss {saved_loss} with checkpointing, {loss} without"

    def test_bf16_autocast_stays_close_to_full_precision(self) -> None:
        """Under bf16 the loss agrees to bf16's precision and the gradients point the same way."""
        full, loss = self.whole()
        half, half_loss = self.gradient(self.model(), self.make(), bf16=True)
        assert abs(loss - half_loss) <= 2e-2 * abs(loss), f"loss {half_loss} under bf16, {loss} in float32"
        both = [torch.cat([value.flatten() for value in gradient.values()]) for gradient in (full, half)]
        cosine = float(torch.cosine_similarity(*both, dim=0))
        assert cosine > 0.99, f"cosine of the gradients is {cosine}"

    def test_training_leaves_the_model_as_plain_training_does(self) -> None:
        """Afterwards no hook, attribute or loss of the objective is left on any module."""
        model, plain = self.model(), self.model()
        objective = self.make()
        self.run(model, objective)
        self.run(plain, None)
        left, expected = installed_parts(model), installed_parts(plain)
        extra = {name: parts ^ expected[name] for name, parts in left.items() if parts != expected[name]}
        assert not extra, f"left on the model: {extra}"
        assert objective.installed() == (["mixin on the trainer's class (see attach)"] if self.attached else [])

    def test_remove_cleans_up_after_training_that_raised(self) -> None:
        """After a failing batch, `remove()` (or `attach` by itself) leaves no trace."""
        model, before = self.model(), installed_parts(self.model())
        objective = self.make()

        def broken(rows: Any) -> Any:
            raise OSError("the data is gone")

        with pytest.raises(OSError, match="the data is gone"):
            self.run(model, objective, collator=broken)
        if not self.attached:
            assert objective.installed(), "a plain callback is not told of the failure, so hooks should still be there"
            objective.remove()
        left = {name: parts - before[name] for name, parts in installed_parts(model).items()}
        assert not any(parts - self.trainer_parts for parts in left.values()), left

    def test_description_is_plain_data_with_all_options(self) -> None:
        """`describe()` goes into JSON and names every option that was set."""
        described = json.loads(json.dumps(self.make().describe()))
        assert described["objective"]
        assert set(self.options) <= set(described["options"])
