"""What the Trainer pushes of a model that an objective trained."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
from transformers import Trainer

from hf_ext.testing.local_hub import LocalHub
from hf_ext.testing.objective_training import MASK, arguments, collate, examples, tiny_model
from hf_ext.trainer_callbacks import MEAP, attach


@pytest.mark.parametrize("attached", [False, True])
def test_a_push_carries_tags_and_description_and_with_attach_a_section_of_the_card(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attached: bool
):
    # the client that transformers calls is kept from its first use
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
    objective = MEAP(mask_ratio=0.2, mask_token_id=MASK)
    args = arguments(tmp_path / "model", max_steps=1, hub_model_id="user/tuned", hub_token=hub.token)
    callbacks = [] if attached else [objective]
    trainer = Trainer(tiny_model(), args, train_dataset=examples(16), data_collator=collate, callbacks=callbacks)
    if attached:
        attach(trainer, objective)
    trainer.train()
    trainer.push_to_hub()
    files = hub.files("user/tuned")
    card = files["README.md"].decode()
    assert "- meap\n" in card.split("---")[1], card
    assert json.loads(files["training_objective.json"])[0]["options"]["mask_ratio"] == 0.2
    assert ("## Training objective" in card) is attached
