"""The conformance suite's tests of an objective with PEFT and TRL."""

from __future__ import annotations

import pytest

from hf_ext.testing import objective_processes as processes
from hf_ext.testing.objective_base import ONE_GRADIENT, SPLIT_TOLERANCE, ObjectiveSuite
from hf_ext.testing.objective_training import largest_difference, logged, weights


class WithLibraries(ObjectiveSuite):
    """What holds for any objective on LoRA adapters, on TRL's SFTTrainer, and on both."""

    def lora_gradient(self, **changes: object) -> tuple[dict, float]:
        """Return the gradient of the adapters in one optimizer step, and the loss."""
        return self.gradient(processes.with_lora(self.model()), self.make(), **changes)

    def test_lora_gradients_do_not_depend_on_the_split_and_the_base_stays(self) -> None:
        """Under PEFT the adapters train, the base weights do not, and the split does not matter."""
        if "lora" in self.refused:
            with pytest.raises(ValueError, match=self.refused["lora"]):
                self.lora_gradient()
            return
        gradients = []
        for parts in (1, 4):
            model = processes.with_lora(self.model())
            base = {n: v.clone() for n, v in model.named_parameters() if not v.requires_grad}
            before = {n: v.detach().clone() for n, v in model.named_parameters() if v.requires_grad}
            split = {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts}
            trainer = self.run(model, self.make(), **{**ONE_GRADIENT, **split})
            after = dict(model.named_parameters())
            gradients.append({name: before[name] - after[name].detach() for name in before})
            assert all((base[name] == after[name]).all() for name in base), "LoRA training changed base weights"
            assert logged(trainer, self.plain_loss), f"no {self.plain_loss} under LoRA"
        difference = largest_difference(*gradients)
        assert difference <= SPLIT_TOLERANCE, f"adapter gradients differ by up to {difference:.3g}"
        assert any(bool(value.any()) for value in gradients[0].values()), "the adapters did not train"

    def test_gradient_checkpointing_with_lora_gives_the_same_gradient(self) -> None:
        """Recomputing layers whose base is frozen gives the adapters the gradient of no checkpointing."""
        if "lora" in self.refused:
            return
        plain, loss = self.whole(adapters=True)
        saved, saved_loss = self.lora_gradient(gradient_checkpointing=True)
        difference = largest_difference(plain, saved)
        assert difference <= 1e-6, f"adapter gradients differ by up to {difference:.3g}"
        assert abs(loss - saved_loss) <= 1e-6, f"loss {saved_loss} with checkpointing, {loss} without"

    def test_trl_sft_trainer_trains_the_same_gradient(self) -> None:
        """SFTTrainer gives the gradient that Trainer gives, whole and split, and logs the clean loss."""
        attached = self.attached or self.attached_sft
        if "sft" in self.refused:
            with pytest.raises(ValueError, match=self.refused["sft"]):
                processes.train_sft(self.model(), self.make(), 1, attached=attached)
            return
        expected, _ = self.whole()
        for parts in (1, 4):
            model = self.model()
            before = weights(model)
            trainer = processes.train_sft(model, self.make(), parts, attached=attached)
            after = weights(model)
            difference = largest_difference(expected, {name: before[name] - after[name] for name in expected})
            assert difference <= SPLIT_TOLERANCE, f"split in {parts}: gradients differ by up to {difference:.3g}"
            assert len(logged(trainer, "clean_loss")) == 1

    def test_trl_sft_trainer_trains_the_same_adapters(self) -> None:
        """SFTTrainer on a PEFT model gives the adapters the gradient that Trainer gives them."""
        if "lora" in self.refused or "sft" in self.refused:
            return
        expected, _ = self.whole(adapters=True)
        model = processes.with_lora(self.model())
        before = weights(model)
        trainer = processes.train_sft(model, self.make(), 1, attached=self.attached or self.attached_sft)
        after = weights(model)
        difference = largest_difference(expected, {name: before[name] - after[name] for name in expected})
        assert difference <= SPLIT_TOLERANCE, f"adapter gradients differ by up to {difference:.3g}"
        assert len(logged(trainer, "clean_loss")) == 1
