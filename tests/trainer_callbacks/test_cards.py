"""Objectives describe themselves beside the checkpoints and in the card that the Trainer writes."""

import json

import pytest
from transformers import Trainer

from hf_ext.testing.example_objectives import Focal, Roulette
from hf_ext.testing.objective_processes import tiny_tokenizer
from hf_ext.testing.objective_training import MASK, arguments, collate, examples, tiny_model
from hf_ext.trainer_callbacks import MEAP, attach


def trainer_with(folder, *callbacks):
    data = examples(16)
    args = arguments(folder, max_steps=2)
    return Trainer(tiny_model(), args, train_dataset=data, data_collator=collate, callbacks=list(callbacks))


def test_training_leaves_each_objectives_description_beside_the_checkpoints(tmp_path):
    trainer_with(tmp_path, MEAP(mask_ratio=0.2, mask_token_id=MASK), Focal(gamma=1.5)).train()
    trainer_with(tmp_path, Focal(gamma=0.5)).train()
    found = json.loads((tmp_path / "training_objective.json").read_text())
    assert [(entry["objective"], entry["options"].get("gamma")) for entry in found] == [("meap", None), ("focal", 0.5)]
    assert found[0]["options"]["mask_ratio"] == 0.2


def test_the_card_of_an_attached_objective_names_all_objectives_and_how_the_clean_loss_went(tmp_path):
    trainer = trainer_with(tmp_path, MEAP(mask_ratio=0.2, mask_token_id=MASK))
    attach(trainer, Focal(gamma=1.5))
    trainer.train()
    for _ in range(2):  # a second card replaces the first
        trainer.create_model_card()
        card = (tmp_path / "README.md").read_text()
        assert card.count("## Training objective") == 1
        assert "`meap`: Mask-Enhanced Autoregressive Prediction" in card
        assert "- gamma: `1.5`" in card
        clean = [entry["clean_loss"] for entry in trainer.state.log_history if "clean_loss" in entry]
        assert f"{clean[0]:.4f} at step 1, {clean[-1]:.4f} at step 2" in card


def test_plain_callbacks_add_to_the_card_that_trl_writes_with_each_checkpoint(tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    args = arguments(tmp_path, SFTConfig, max_steps=2, save_strategy="steps", save_steps=1, bf16=False)
    trainer = SFTTrainer(
        model=tiny_model(),
        args=args,
        train_dataset=Dataset.from_list(examples(16)),
        processing_class=tiny_tokenizer(),
        data_collator=collate,
        callbacks=[MEAP(mask_ratio=0.2, mask_token_id=MASK), Roulette(share=0.1)],
    )
    trainer.train()
    card = (tmp_path / "README.md").read_text()
    assert "TRL" in card
    assert card.count("## Training objective") == 1
    assert "- mask_ratio: `0.2`" in card
    assert "- share: `0.1`" in card
    assert "at step 1, " in card


@pytest.mark.parametrize("attached", [False, True])
def test_a_push_tags_the_model(tmp_path, attached):
    objective = Focal()
    trainer = trainer_with(tmp_path, *([] if attached else [objective]))
    if attached:
        attach(trainer, objective)
    trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
    assert {"focal", "hf_ext"} <= set(trainer.model.model_tags)
