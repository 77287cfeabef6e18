"""The engine of objectives that rewrite documents: what they see, what comes of it, and what they refuse."""

import gc
import pickle
import random
from dataclasses import dataclass

import pytest
import torch

from hf_ext.testing.objective import ObjectiveInProcess
from hf_ext.testing.objective_training import collate, examples, tiny_model, train
from hf_ext.trainer_callbacks import MEAP, Document, Rewriting
from hf_ext.trainer_callbacks.documents import batch_of, documents_of
from hf_ext.trainer_callbacks.rewriting import RewritingCollator
from hf_ext.trainer_callbacks.token_ids import token_id


@dataclass(eq=False)
class Shuffle(Rewriting):
    """Move tokens about and put a token before a share of the documents, which makes them longer."""

    share: float = 1.0

    def rewrite(self, document: Document, draw: random.Random) -> Document:
        if self.share == 0 or draw.random() >= self.share:
            return document
        order = list(range(len(document.tokens)))
        draw.shuffle(order)
        return Document([3, *(document.tokens[i] for i in order)], [3, *(document.labels[i] for i in order)])


@dataclass(eq=False)
class Twins(Rewriting):
    """Make two documents of one, as objectives do that train on a plain and a changed copy."""

    on: bool = True

    def rewrite(self, document: Document, draw: random.Random) -> Document | list[Document]:
        return [document, Document(document.tokens[::-1], document.labels[::-1])] if self.on else document


class TestShuffle(ObjectiveInProcess):
    objective = Shuffle
    options = {"share": 0.7}  # noqa: RUF012
    null_options = {"share": 0.0}  # noqa: RUF012


class TestTwins(ObjectiveInProcess):
    objective = Twins
    options = {"on": True}  # noqa: RUF012
    null_options = {"on": False}  # noqa: RUF012


def left(batch):
    """Move the padding of a batch to the left."""
    lengths = batch["attention_mask"].sum(-1)
    return {
        name: torch.stack([row.roll(int(len(row) - n)) for row, n in zip(value, lengths, strict=True)])
        for name, value in batch.items()
    }


@pytest.mark.parametrize("seed", range(3))
def test_taking_a_batch_apart_and_together_again_changes_nothing(seed):
    batch = collate(examples(5, seed=seed))
    for given in (batch, left(batch)):
        rows, layout = documents_of(given)
        again = batch_of(rows, layout)
        first = given["attention_mask"].cumsum(-1) == 1  # nothing predicts a row's first token, whatever its label
        given["labels"][first] = again["labels"][first] = -100
        assert given.keys() == again.keys()
        assert all(torch.equal(again[name], value) for name, value in given.items())


def test_packed_rows_fall_into_documents_and_keep_their_positions():
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 9, 10]]),
        "labels": torch.tensor([[5, 6, 7, -100, 9, 10]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]),
    }
    rows, layout = documents_of(batch)
    assert [document.tokens for document in rows[0]] == [[5, 6, 7], [8, 9, 10]]
    longer = [Document([*document.tokens, 3], [*document.labels, 3]) for document in rows[0]]
    again = batch_of([longer], layout)
    assert again["input_ids"].tolist() == [[5, 6, 7, 3, 8, 9, 10, 3]]
    assert again["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]
    assert again["labels"].tolist() == [[5, 6, 7, 3, -100, 9, 10, 3]]


def test_each_document_is_rewritten_alike_wherever_it_stands():
    """Batch, padding side, packing, `map` and `collator` give the same document for the same tokens."""
    rows = examples(4)
    known = Shuffle(seed=5)
    mapped = known.map()({"input_ids": [r["input_ids"] for r in rows], "labels": [r["labels"] for r in rows]})
    together = Shuffle(seed=5).collator(collate)(rows)
    on_the_left = Shuffle(seed=5).collator(lambda given: left(collate(given)))(rows)
    for at, row in enumerate(rows):
        length = len(row["input_ids"]) + 1
        assert mapped["input_ids"][at] == together["input_ids"][at, :length].tolist()
        assert mapped["labels"][at] == together["labels"][at, :length].tolist()
        assert mapped["input_ids"][at] == on_the_left["input_ids"][at, -length:].tolist()
        alone = Shuffle(seed=5).collator(collate)([row])
        assert mapped["input_ids"][at] == alone["input_ids"][0].tolist()
    packed = {
        "input_ids": torch.tensor([[t for r in rows for t in r["input_ids"]]]),
        "labels": torch.tensor([[t for r in rows for t in r["labels"]]]),
        "position_ids": torch.tensor([[p for r in rows for p in range(len(r["input_ids"]))]]),
    }
    one_row = Shuffle(seed=5).collator(lambda given: packed)(None)
    assert one_row["input_ids"][0].tolist() == [token for document in mapped["input_ids"] for token in document]


def test_another_epoch_draws_anew_and_a_resumed_one_does_not(tmp_path):
    batches = []

    def seen(model):
        return model.get_input_embeddings().register_forward_pre_hook(lambda _, given: batches.append(given[0].clone()))

    options = {"max_steps": 4, "clean": 0, "per_device_train_batch_size": 16}
    options.pop("clean")
    model = tiny_model()
    seen(model)
    train(model, Shuffle(clean_loss_every=0), save_strategy="steps", save_steps=2, folder=tmp_path, **options)
    whole = list(batches)
    rows = [{tuple(row) for row in batch.tolist()} for batch in whole]
    assert rows[0] != rows[1]
    batches.clear()
    again = tiny_model(seed=1)
    seen(again)
    train(again, Shuffle(clean_loss_every=0), resume=str(tmp_path / "checkpoint-2"), **options)
    assert all(torch.equal(here, there) for here, there in zip(batches, whole[2:], strict=True))


def test_workers_rewrite_as_the_training_process_does():
    models = [tiny_model(), tiny_model()]
    for model, workers in zip(models, (0, 2), strict=True):
        train(model, Shuffle(), dataloader_num_workers=workers)
    both = zip(models[0].parameters(), models[1].parameters(), strict=True)
    difference = max(float((one - other).abs().max()) for one, other in both)
    assert difference == 0, f"weights differ by up to {difference:.3g}"


def test_a_collator_can_be_sent_to_another_process():
    """Spawned workers pickle the collator, and with it the objective, in the middle of training."""
    objective = Shuffle(seed=5)
    before = objective.collator(collate)(examples(4))
    after = pickle.loads(pickle.dumps(objective.collator(collate)))(examples(4))
    assert all(torch.equal(before[name], value) for name, value in after.items())


def test_documents_are_cut_at_the_longest_row_that_the_model_takes():
    model = tiny_model(max_position_embeddings=8)
    lengths = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, given: lengths.append(given[0].shape[1]))
    train(model, Shuffle(clean_loss_every=0))
    assert max(lengths) == 8
    assert max(map(len, Shuffle(max_length=5).map()({"input_ids": [list(range(9))]})["input_ids"])) == 5


def test_two_rewritings_and_a_corruption_train_together_and_the_clean_loss_is_that_of_the_data(tmp_path):
    model = tiny_model()
    seen = []
    train(model, None, max_steps=1, collator=lambda rows: seen.append(collate(rows)) or seen[-1])
    from transformers import Trainer

    from hf_ext.testing.objective_training import arguments

    model = tiny_model()
    objectives = [Shuffle(), Shuffle(share=0.5, seed=3), MEAP(mask_ratio=0.3, mask_token_id=3)]
    args = arguments(tmp_path, max_steps=1)
    trainer = Trainer(model, args, train_dataset=examples(16), data_collator=collate, callbacks=objectives)
    trainer.train()
    with torch.no_grad():
        expected = tiny_model()(**seen[0]).loss
    logged = [entry["clean_loss"] for entry in trainer.state.log_history if "clean_loss" in entry]
    assert logged == [pytest.approx(float(expected), abs=1e-5)]
    left = trainer.callback_handler.train_dataloader.collate_fn
    assert not isinstance(left, RewritingCollator), left


def test_what_cannot_be_rewritten_is_refused():
    rows = {"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[5, 6]])}
    with pytest.raises(ValueError, match="the batch has only: input_ids"):
        documents_of({"input_ids": rows["input_ids"]})
    with pytest.raises(ValueError, match="completion_mask has a value for each token"):
        documents_of({**rows, "completion_mask": torch.ones(1, 2)})
    with pytest.raises(ValueError, match="flattens rows"):
        documents_of({**rows, "cu_seq_lens_q": torch.tensor([0, 2])})
    with pytest.raises(ValueError, match="token_type_ids are not all zero"):
        documents_of({**rows, "token_type_ids": torch.tensor([[0, 1]])})
    with pytest.raises(ValueError, match="makes several documents of one"):
        Twins().collator(lambda given: {**rows, "weight": torch.ones(1)})(None)
    with pytest.raises(ValueError, match="max_length must be a number of tokens"):
        Shuffle(max_length=0)


def test_special_tokens_are_found_by_text_or_id_or_refused_with_the_remedy():
    from hf_ext.testing.objective_processes import tiny_tokenizer

    tokenizer, config = tiny_tokenizer(), tiny_model().config
    assert token_id("w7", tokenizer, config, purpose="prefix") == 7
    with pytest.raises(ValueError, match=r"no token '<PRE>' \(prefix\).*add_special_tokens"):
        token_id("<PRE>", tokenizer, config, purpose="prefix")
    with pytest.raises(ValueError, match="outside the model's vocabulary of 64"):
        token_id(64, tokenizer, config, purpose="prefix")
    with pytest.raises(ValueError, match="must be a text or an id"):
        token_id(1.5, tokenizer, config, purpose="prefix")


def test_hooks_leave_the_model_with_the_objective_when_training_raised():
    """A failed trainer that is thrown away takes the objective and its hooks with it."""
    model = tiny_model()
    calls = []

    def broken(rows):
        calls.append(len(rows))
        if len(calls) > 1:
            raise OSError("the data is gone")
        return collate(rows)

    with pytest.raises(OSError, match="the data is gone"):
        train(model, Shuffle(), collator=broken, max_steps=3)
    gc.collect()
    assert not model._forward_pre_hooks
