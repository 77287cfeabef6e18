"""MEAP: what is masked, what never is, which token it becomes, and which options are refused."""

import functools

import pytest
import torch
from transformers import Trainer

from hf_ext.testing.objective_processes import tiny_tokenizer
from hf_ext.testing.objective_training import BOS, EOS, MASK, PAD, arguments, collate, examples, tiny_model, train
from hf_ext.trainer_callbacks import MEAP


class Watch:
    """Record the batches that reach a model's embedding, beside those that the Trainer sent."""

    def __init__(self, model):
        self.read, self.sent = [], []
        model.get_input_embeddings().register_forward_pre_hook(lambda _, given: self.read.append(given[0].clone()))
        forward = model.forward

        @functools.wraps(forward)  # the Trainer reads the signature
        def spy(**inputs):
            self.sent.append({name: value.clone() for name, value in inputs.items() if torch.is_tensor(value)})
            return forward(**inputs)

        model.forward = spy


def masked_batches(objective, **changes):
    model = tiny_model()
    watch = Watch(model)
    train(model, objective, max_steps=4, **changes)
    return watch


def test_only_inputs_change_and_labels_mask_and_padding_stay():
    watch = masked_batches(MEAP(mask_ratio=0.6, mask_token_id=MASK, clean_loss_every=0))
    clean = {tuple(row["input_ids"]): row["labels"] for row in examples(16)}
    seen = 0
    for read, sent in zip(watch.read, watch.sent, strict=True):
        for tokens, labels, mask in zip(read, sent["labels"], sent["attention_mask"], strict=True):
            length = int(mask.sum())
            assert (tokens[length:] == PAD).all()
            assert (labels[length:] == -100).all()
            kept = tokens[:length] != MASK
            matches = [
                row for row in clean if len(row) == length and (torch.tensor(row) == tokens[:length])[kept].all()
            ]
            assert any(clean[row] == labels[:length].tolist() for row in matches), "a label changed"
            seen += int((~kept).sum())
    assert seen > 100, f"only {seen} tokens were masked"


def test_special_tokens_are_never_masked():
    watch = masked_batches(MEAP(mask_ratio=0.9, mask_token_id=MASK, clean_loss_every=0))
    for read, sent in zip(watch.read, watch.sent, strict=True):
        last = sent["attention_mask"].sum(-1) - 1
        assert (read[:, 0] == BOS).all()
        assert (read.gather(1, last[:, None]) == EOS).all()


def test_special_tokens_of_the_tokenizer_are_never_masked():
    objective = MEAP(mask_ratio=0.99)
    tokenizer = tiny_tokenizer(mask_token=f"w{MASK}", additional_special_tokens=["w9"])
    objective.setup(tiny_model(), tokenizer, arguments("out"))
    tokens = torch.tensor([[9, PAD, EOS, BOS, MASK, 10]])
    assert objective.maskable({"input_ids": tokens}).tolist() == [[False] * 5 + [True]]


def test_the_same_positions_are_masked_in_every_row_and_others_in_the_next_step():
    watch = masked_batches(MEAP(mask_ratio=0.5, mask_token_id=MASK, clean_loss_every=0))
    patterns = []
    for read, sent in zip(watch.read, watch.sent, strict=True):
        masked = read == MASK
        shortest = int(sent["attention_mask"].sum(-1).min()) - 1  # the last token is eos
        assert (masked[:, :shortest] == masked[:1, :shortest]).all()
        patterns.append(masked[0, :6].tolist())
    assert any(pattern != patterns[0] for pattern in patterns[1:])


def test_documents_differ_when_asked():
    watch = masked_batches(MEAP(mask_ratio=0.5, mask_token_id=MASK, per_document=True, clean_loss_every=0))
    masked = watch.read[0][:, 1:6] == MASK
    assert (masked != masked[:1]).any()


@pytest.mark.parametrize("ratio", [0.15, 0.5])
def test_the_masked_share_is_the_ratio(ratio):
    objective = MEAP(mask_ratio=ratio, mask_token_id=MASK, per_document=True, clean_loss_every=0)
    model = tiny_model()
    trainer = train(model, objective, max_steps=40, logging_steps=40)
    share = trainer.state.log_history[0]["masked_share"]
    assert abs(share - ratio) < 0.04, f"masked {share:.3f} of the tokens, asked for {ratio}"  # about 8,000 draws


def test_mask_token_comes_from_the_tokenizer_before_the_config():
    model = tiny_model()
    objective = MEAP()
    model.config.mask_token_id = 11
    objective.setup(model, tiny_tokenizer(mask_token="w12"), arguments("out"))
    assert objective._mask_id == 12
    objective.setup(model, None, arguments("out"))
    assert objective._mask_id == 11


def test_without_any_mask_token_training_does_not_begin_and_the_error_says_what_to_do():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"needs a mask token.*add_special_tokens.*MEAP\(mask_token_id="):
        train(model, MEAP())
    assert not model._forward_pre_hooks


def test_a_mask_token_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"mask_token_id=64 lies outside the model's 64 embeddings.*resize"):
        train(tiny_model(), MEAP(mask_token_id=64))


@pytest.mark.parametrize("ratio", [-0.1, 1, 15, float("nan"), True])
def test_a_ratio_out_of_range_is_refused_at_construction(ratio):
    with pytest.raises(ValueError, match=r"mask_ratio must be a share from 0 up to but not including 1"):
        MEAP(mask_ratio=ratio)


@pytest.mark.parametrize("token", [-1, 2.0, "<mask>", True])
def test_a_mask_token_that_is_no_id_is_refused_at_construction(token):
    with pytest.raises(ValueError, match="mask_token_id must be a token id"):
        MEAP(mask_token_id=token)


def test_packed_rows_are_masked_by_position_in_their_document():
    """Padding-free rows: eight documents in one row give the gradient of eight padded rows."""

    def packed(rows):
        tokens = [token for row in rows for token in row["input_ids"]]
        labels = [label for row in rows for label in (-100, *row["labels"][1:])]
        positions = [position for row in rows for position in range(len(row["input_ids"]))]
        return {
            "input_ids": torch.tensor([tokens]),
            "labels": torch.tensor([labels]),
            "position_ids": torch.tensor([positions]),
        }

    losses = []
    for collator in (collate, packed):
        objective = MEAP(mask_ratio=0.4, mask_token_id=MASK)
        trainer = train(tiny_model(), objective, collator=collator, max_steps=1, max_grad_norm=0.0)
        entry = trainer.state.log_history[0]
        losses.append((entry["loss"], entry["clean_loss"], entry["masked_share"]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_label_smoothing_trains_and_attach_still_sees_the_clean_loss(tmp_path):
    from hf_ext.trainer_callbacks import attach

    args = arguments(tmp_path, label_smoothing_factor=0.1, max_steps=1)
    trainer = Trainer(tiny_model(), args, train_dataset=examples(16), data_collator=collate)
    attach(trainer, MEAP(mask_ratio=0.3, mask_token_id=MASK)).train()
    smoothed, clean = (trainer.state.log_history[0][name] for name in ("loss", "clean_loss"))
    plain = train(tiny_model(), None, max_steps=1).state.log_history[0]["loss"]
    assert clean == pytest.approx(plain, abs=1e-5)
    assert smoothed != pytest.approx(clean, abs=1e-4)
