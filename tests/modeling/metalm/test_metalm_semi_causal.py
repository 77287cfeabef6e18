"""Semi-causal language modelling: which spans are drawn, and training on them."""

import pytest
import torch
from transformers import BertConfig, BertModel, Trainer, TrainingArguments

from hf_ext.modeling.metalm.modeling_metalm import MetaLMForCausalLM
from hf_ext.modeling.metalm.semi_causal_metalm import SemiCausalCollator, random_spans
from hf_ext.testing.model_base import assert_close
from hf_ext.testing.tiny_models import VOCABULARY, build

ENCODER = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def rows(lengths=(40, 25, 33, 12), seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, VOCABULARY, (n,), generator=draw).tolist()} for n in lengths]


def pad(side="right"):
    """A collator that pads, on either side."""

    def collate(batch):
        width = max(len(row["input_ids"]) for row in batch)
        empty = [[0] * (width - len(row["input_ids"])) for row in batch]
        ids = [row["input_ids"] for row in batch]
        both = [(e, i) if side == "left" else (i, e) for e, i in zip(empty, ids, strict=True)]
        mask = [[int(p is i) for p in pair for _ in p] for pair, i in zip(both, ids, strict=True)]
        return {
            "input_ids": torch.tensor([a + b for a, b in both]),
            "attention_mask": torch.tensor(mask),
        }

    return collate


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 9, 40, 401])
@pytest.mark.parametrize(("share", "low", "high"), [(0.25, 2, 5), (0.25, 64, 128), (0.9, 1, 1), (0.5, 3, 100)])
def test_spans_leave_a_token_before_between_and_behind_them(length, share, low, high):
    for seed in range(20):
        spans = random_spans(length, share, low, high, torch.Generator().manual_seed(seed))
        edges = [0, *(edge for span in spans for edge in span), length]
        gaps = [b - a for a, b in zip(edges[::2], edges[1::2], strict=True)]
        assert length == 0 or min(gaps) >= 1, f"{spans} of {length} tokens leave gaps of {gaps}"
        wanted = round(share * length)
        for start, end in spans:
            assert min(low, wanted) <= end - start <= high, f"{spans} with lengths from {low} to {high}"
        if share <= 0.5 and length > 3 * low + 3:
            assert wanted - low < sum(b - a for a, b in spans) <= wanted, (
                f"{spans} cover {share} of {length} tokens badly"
            )


def test_every_place_is_covered_about_as_often():
    counts = torch.zeros(60)
    for seed in range(3000):
        for start, end in random_spans(60, 0.25, 3, 6, torch.Generator().manual_seed(seed)):
            counts[start:end] += 1
    inner = counts[8:-8] / 3000
    assert counts[0] == counts[-1] == 0
    assert inner.min() > 0.2, f"some places are covered in {inner.min():.2f} of the rows, expected about 0.27"
    assert inner.max() < 0.34, f"some places are covered in {inner.max():.2f} of the rows, expected about 0.27"


def test_what_is_drawn_depends_on_the_row_only():
    collator = SemiCausalCollator(pad(), min_length=2, max_length=5)
    together = collator(rows())
    drawn = [[span for span in row if span != [-1, -1]] for row in together["spans"].tolist()]
    for number, row in enumerate(rows()):
        assert collator([row])["spans"].tolist()[0] == drawn[number], f"row {number} alone"
    left = SemiCausalCollator(pad("left"), min_length=2, max_length=5)(rows())
    shift = [40 - n for n in (40, 25, 33, 12)]
    found = [[[a - s, b - s] for a, b in row if a != -1] for row, s in zip(left["spans"].tolist(), shift, strict=True)]
    assert found == drawn, "padding on the left moves more than the columns"
    assert (
        SemiCausalCollator(pad(), min_length=2, max_length=5, seed=1)(rows())["spans"].tolist()
        != together["spans"].tolist()
    )


def test_labels_stay_outside_spans_and_padding_and_where_there_were_any():
    batch = SemiCausalCollator(pad(), min_length=2, max_length=5)(rows())
    inside = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    for row, spans in enumerate(batch["spans"].tolist()):
        for start, end in spans:
            inside[row, max(start, 0) : max(end, 0)] = True
    expected = batch["input_ids"].masked_fill(inside | (batch["attention_mask"] == 0), -100)
    assert torch.equal(batch["labels"], expected)
    labelled = [{**row, "labels": [-100] * 6 + row["input_ids"][6:]} for row in rows((30, 30))]
    kept = SemiCausalCollator(min_length=2, max_length=5)(labelled)["labels"]
    assert (kept[:, :6] == -100).all()
    assert (kept != -100).any(1).all()


def test_spans_do_not_cross_documents():
    row = rows((120,))[0]["input_ids"]
    for place in (30, 61, 90, 119):
        row[place] = 2
    for seed in range(20):
        collator = SemiCausalCollator(min_length=3, max_length=9, boundary_token_id=2, seed=seed)
        spans = collator([{"input_ids": row}])["spans"][0].tolist()
        assert len(spans) >= 4, f"{spans}: a document has none"
        assert not any(2 in row[start:end] for start, end in spans), f"{spans} cross the ends of documents"


def test_as_callback_it_draws_anew_in_every_epoch_but_not_for_a_resumed_run(tmp_path):
    def run(callback, epochs=2, **options):
        collator = SemiCausalCollator(pad(), min_length=2, max_length=5)
        seen = []

        def noting(batch):
            made = collator(batch)
            seen.append(made["spans"].tolist())
            return made

        model = MetaLMForCausalLM.from_parts(BertModel(BertConfig(**ENCODER)), build("llama"))
        arguments = TrainingArguments(
            str(tmp_path), num_train_epochs=epochs, per_device_train_batch_size=4, save_strategy="no", report_to=[],
            use_cpu=True, disable_tqdm=True, **options,
        )  # fmt: skip
        Trainer(
            model, arguments, train_dataset=rows(), data_collator=noting, callbacks=[collator] if callback else []
        ).train()
        return [{str(row) for row in batch} for batch in seen]

    fixed, fresh = run(False), run(True)
    assert fixed[0] == fixed[1] == fresh[0]
    assert fresh[1] != fresh[0]


def test_gradients_do_not_depend_on_gradient_accumulation(tmp_path):
    weights = []
    for size, accumulation in ((4, 1), (1, 4), (2, 2)):
        torch.manual_seed(0)
        model = MetaLMForCausalLM.from_parts(BertModel(BertConfig(**ENCODER)), build("llama"))
        before = torch.cat([weight.detach().flatten().clone() for weight in model.parameters()])
        arguments = TrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
            optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0.0, save_strategy="no",
            report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        collator = SemiCausalCollator(pad(), min_length=2, max_length=5)
        Trainer(model, arguments, train_dataset=rows(), data_collator=collator).train()
        after = torch.cat([weight.detach().flatten() for weight in model.parameters()])
        weights.append(after - before)
        moved = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is None or p.requires_grad}
        assert {"encoder", "connector", "language_model"} <= moved
    scale = weights[0].abs().max()
    assert scale > 1e-3, "a training step changed no weight"
    assert_close(weights[1] / scale, weights[0] / scale, 1e-5, "gradients of four rows one by one and at once")
    assert_close(weights[2] / scale, weights[0] / scale, 1e-5, "gradients of four rows in pairs and at once")


def test_the_trainer_evaluates_on_the_same_spans_each_time(tmp_path):
    model = MetaLMForCausalLM.from_parts(BertModel(BertConfig(**ENCODER)), build("llama"))
    arguments = TrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, per_device_eval_batch_size=4
    )
    collator = SemiCausalCollator(pad(), min_length=2, max_length=5)
    trainer = Trainer(model, arguments, eval_dataset=rows(), data_collator=collator)
    found = [trainer.evaluate()["eval_loss"] for _ in range(2)]
    with torch.no_grad():
        assert found[0] == found[1] == pytest.approx(float(model.eval()(**collator(rows())).loss), abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0}, "share=0 must be a number above 0 and below 1"),
        ({"share": 25}, "share=25 must be a number above 0 and below 1"),
        ({"min_length": 0}, "min_length=0 must be a whole number >= 1"),
        ({"max_length": 2.5}, "max_length=2.5 must be a whole number >= 1"),
        ({"min_length": 9, "max_length": 8}, "min_length=9 must not be above max_length=8"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SemiCausalCollator(**options)


def test_batches_without_ids_with_spans_or_packed_are_refused():
    ids = torch.arange(8)[None]
    with pytest.raises(ValueError, match="expected a batch with input_ids and without spans, got one with labels"):
        SemiCausalCollator(lambda _: {"labels": ids})([])
    with pytest.raises(ValueError, match="and without spans"):
        SemiCausalCollator(lambda _: {"input_ids": ids, "spans": ids})([])
    with pytest.raises(ValueError, match="positions go back within a row"):
        SemiCausalCollator(lambda _: {"input_ids": ids, "position_ids": ids % 4})([])
