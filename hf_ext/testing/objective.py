"""The conformance suite that every training objective runs through, here or in a package of its own.

Example:
    >>> from hf_ext.trainer_callbacks import MEAP
    >>> class TestMEAP(ObjectiveConformance):
    ...     objective = MEAP
    ...     options = {"mask_ratio": 0.3, "mask_token_id": 3}
    ...     null_options = {"mask_ratio": 0.0, "mask_token_id": 3}
"""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_ext.testing import objective_launch as launching
from hf_ext.testing.objective_base import ONE_GRADIENT, SPLIT_TOLERANCE, installed_parts
from hf_ext.testing.objective_forms import OtherForms
from hf_ext.testing.objective_libraries import WithLibraries
from hf_ext.testing.objective_on_trainer import OnTrainer

__all__ = [
    "ONE_GRADIENT",
    "SPLIT_TOLERANCE",
    "ObjectiveConformance",
    "ObjectiveInProcess",
    "installed_parts",
]

#: Where `launched` of a class left its results.
_LAUNCHED: dict[type, Path] = {}


class ObjectiveInProcess(OnTrainer, WithLibraries, OtherForms):
    """The part of `ObjectiveConformance` that starts no other process.

    A package with many objectives subclasses this one for each and lets `hf_ext.testing.objective_launch` train all
    of them in one launch, as `tests/trainer_callbacks/test_processes.py` of this package does.

    Attributes:
        objective: the class under test.
        options: options that make it do something visible on the tiny data of
            `hf_ext.testing.objective_training` (vocabulary of 64; id 3 is free for a mask token).
        null_options: options of zero strength, with which training must be plain, bit for bit.
        attached: use `attach(trainer, objective)` instead of `callbacks=[objective]`.
        attached_sft: the same for TRL's SFTTrainer (token losses need it there).
        refused: what the objective refuses, each with a pattern that its error must match: `"lora"`, `"sft"`,
            `"company"` (of another objective), `"collator"` (and `map`, of what rewrites), `"ddp"`, `"fsdp"`.
    """


class ObjectiveConformance(ObjectiveInProcess):
    """Tests that hold for any objective; subclass it as `Test...` at the top level of a file and pytest runs them."""

    @pytest.fixture
    def launched(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Train in two processes, with DDP and with FSDP, once a class, and return the folder of the results."""
        if type(self) not in _LAUNCHED:
            folder = tmp_path_factory.mktemp("launched")
            launching.launch([launching.Case.of(type(self))], folder)
            _LAUNCHED[type(self)] = folder
        return _LAUNCHED[type(self)]

    @pytest.mark.parametrize("mode", launching.MODES)
    def test_two_processes_train_what_one_process_does(self, mode: str, launched: Path) -> None:
        """Under `accelerate launch` both processes end with equal weights, those of one process, and save them."""
        launching.compare(self, mode, launched)

    def test_saved_model_loads_without_hf_ext(self, tmp_path: Path) -> None:
        """A process that cannot import `hf_ext` loads the trained model and computes the same logits."""
        expected = launching.save_trained(self, tmp_path)
        [found] = launching.load_without_hf_ext([tmp_path])
        difference = float((found - expected).abs().max())
        assert difference <= 1e-6, f"logits differ by up to {difference:.3g}"
