"""The conformance suite's tests of the other ways to the same gradient: company, padding, data, no logits."""

from __future__ import annotations

from typing import Any

import pytest

from hf_ext.testing.objective_base import ONE_GRADIENT, SPLIT_TOLERANCE, ObjectiveSuite
from hf_ext.testing.objective_training import collate, collate_left, examples, largest_difference, logged, weights
from hf_ext.trainer_callbacks import Objective
from hf_ext.trainer_callbacks.hooks import WITHOUT_LOGITS


def partner_of(objective: Objective) -> Objective:
    """Return an objective to train together with another: a token loss, or a corruption if it has a loss itself."""
    from hf_ext.testing.example_objectives import Focal, Roulette

    return Roulette(share=0.3) if objective.replaces_loss else Focal(gamma=2.0)


class OtherForms(ObjectiveSuite):
    """What holds for any objective beside another one, on padding of either side, and in each form that it has."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Hide the tests of what the class's objective does not have."""
        super().__init_subclass__(**kwargs)
        objective = getattr(cls, "objective", None)
        for hooks, test in (
            (("rewrite",), "test_collator_and_map_rewrite_as_the_callback_does"),
            (WITHOUT_LOGITS, "test_without_logits_the_gradient_is_the_same"),
        ):
            if objective is not None:
                has = any(getattr(objective, hook) is not getattr(Objective, hook) for hook in hooks)
                has |= hooks is WITHOUT_LOGITS and objective.few_targets
                setattr(cls, test, getattr(OtherForms, test) if has else None)  # pytest does not collect None

    def test_it_trains_together_with_another_objective(self) -> None:
        """Beside a token loss or a corruption both act, no split matters, and zero strength leaves the other alone."""
        partner = partner_of(self.make())
        if "company" in self.refused:
            with pytest.raises(ValueError, match=self.refused["company"]):
                self.run(self.model(), self.make(), company=[partner])
            return
        alone, _ = self.whole()
        both, loss = self.gradient(self.model(), self.make(), company=[partner])
        parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
        split, split_loss = self.gradient(self.model(), self.make(), company=[partner_of(self.make())], **parts)
        difference = largest_difference(both, split)
        assert difference <= SPLIT_TOLERANCE, f"with {partner.name}, split in 4: gradients differ by {difference:.3g}"
        assert abs(loss - split_loss) <= SPLIT_TOLERANCE, f"split in 4: loss {split_loss}, whole {loss}"
        other, other_loss = self.gradient(self.model(), None, company=[partner_of(self.make())])
        null, null_loss = self.gradient(
            self.model(), self.objective(**self.null_options), company=[partner_of(self.make())]
        )
        difference = largest_difference(other, null)
        assert difference == 0, f"with zero strength the gradient of {partner.name} changed by {difference:.3g}"
        # a loss of per-token statistics adds up the same numbers in another order than cross-entropy does
        assert abs(other_loss - null_loss) <= 1e-6, f"with zero strength the loss is {null_loss}, not {other_loss}"
        for what, gradient in ((self.make().name, alone), (partner.name, other)):
            difference = largest_difference(both, gradient)
            assert difference > 1e-4, f"the gradient of both is that of {what} alone up to {difference:.3g}"

    def test_left_padding_gives_the_gradient_of_right_padding(self) -> None:
        """The side on which rows are padded changes neither gradient nor loss."""
        right, loss = self.whole()
        left, left_loss = self.gradient(self.model(), self.make(), collator=collate_left)
        difference = largest_difference(right, left)
        assert difference <= SPLIT_TOLERANCE, f"gradients differ by up to {difference:.3g}"
        assert abs(loss - left_loss) <= SPLIT_TOLERANCE, f"loss {left_loss} with left padding, {loss} with right"

    def test_collator_and_map_rewrite_as_the_callback_does(self) -> None:
        """Wrapped around the collator, or mapped over the data, the rewriting is what the callback makes of it."""
        if "collator" in self.refused:
            for form in (lambda: self.make().map(), lambda: self.make().collator(collate)):
                with pytest.raises(ValueError, match=self.refused["collator"]):
                    form()
            return
        seed = {"seed": 7}  # of the Trainer's arguments, which the other forms do not see
        rows = examples(16)
        given = {name: [row[name] for row in rows] for name in ("input_ids", "labels")}
        mapped = self.make(**seed).map()(given)
        rewrite: Any = self.make(**seed).collator(collate)
        batch = rewrite(rows)
        lengths = batch["attention_mask"].sum(-1).tolist()
        collated = {
            name: [row[:length] for row, length in zip(batch[name].tolist(), lengths, strict=True)]
            for name in ("input_ids", "labels")
        }
        assert mapped["input_ids"] == collated["input_ids"], "map and collator make different tokens"
        assert mapped.get("labels", mapped["input_ids"]) == collated["labels"], "map and collator make different labels"
        assert mapped["input_ids"] != given["input_ids"] or mapped.get("labels") != given["labels"], "nothing changed"
        expected, loss = self.gradient(self.model(), self.make(**seed))
        found, found_loss = self.gradient(self.model(), None, collator=self.make(**seed).collator(collate))
        difference = largest_difference(expected, found)
        assert difference <= 1e-6, f"gradients of callback and collator differ by up to {difference:.3g}"
        assert abs(loss - found_loss) <= 1e-6, f"loss {found_loss} with the collator, {loss} with the callback"

    def test_without_logits_the_gradient_is_the_same(self) -> None:
        """Computed from the last states, a part at a time, loss and gradients are those computed from logits."""
        whole, loss = self.gradient(self.model(), self.make(without_logits=False))
        for parts in (1, 4):
            split = {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts}
            model = self.model()
            before = weights(model)
            trainer = self.run(model, self.make(without_logits=True), **{**ONE_GRADIENT, **split})
            found = {name: before[name] - value for name, value in weights(model).items() if name in whole}
            difference = largest_difference(whole, found)
            assert difference <= SPLIT_TOLERANCE, f"split in {parts}: gradients differ by up to {difference:.3g}"
            other = logged(trainer, "loss")[0]
            assert abs(loss - other) <= SPLIT_TOLERANCE, f"loss {other} without logits, {loss} with them"
            assert len(logged(trainer, "clean_loss")) == 1, "no clean_loss without logits"
