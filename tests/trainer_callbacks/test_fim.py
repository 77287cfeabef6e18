"""FIM: the orders of the parts and their inverse, cuts at characters, and which tokens stay where they are."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import ClassVar

import pytest
import torch
from transformers import AutoTokenizer, BartConfig, LlamaConfig, Trainer

from hf_ext import demo
from hf_ext.testing.objective import ObjectiveInProcess
from hf_ext.testing.objective_processes import tiny_tokenizer
from hf_ext.testing.objective_training import BOS, EOS, arguments, collate, examples, logged, tiny_model, train
from hf_ext.trainer_callbacks import CM3, FIM, CodeGen2, Document
from hf_ext.trainer_callbacks.characters import Characters
from hf_ext.trainer_callbacks.fim import MODES, SPELLINGS, FIMTokens, fim, unfim

#: Behind the vocabulary of the tiny data.
MARKS = {"prefix_token": 64, "suffix_token": 65, "middle_token": 66, "end_token": 67}
PRE, SUF, MID, END = MARKS.values()
IDS = FIMTokens(PRE, SUF, MID, END)
EOT = 0  # of the embedded tokenizer
TEXTS = (
    "def add(a, b):\n    return a + b\n",
    "Γειά σου Κόσμε — “quotes”, naïve café, 你好，世界 and 👩‍👩‍👧 emoji\n",
    "   leading spaces,\ttabs\t\tand trailing ones   \n\n\n",
    "x",
    "tokenization untokenizable\r\nlines\r\n",
)


class TestFIM(ObjectiveInProcess):
    objective = FIM
    # `map` without a tokenizer knows of no special tokens, so they are named
    options: ClassVar = {"fim_rate": 0.7, "level": "token", "bos_token": BOS, "eos_token": EOS, **MARKS}
    null_options: ClassVar = {"fim_rate": 0.0, "level": "token", **MARKS}

    def model(self, **config):
        return tiny_model(**{"vocab_size": 68, **config})


@pytest.fixture(scope="module")
def tokenizer():
    found = AutoTokenizer.from_pretrained(demo.path("tokenizer"))
    found.add_special_tokens({"additional_special_tokens": list(SPELLINGS[0][:3])})
    return found


def ready(tokenizer=None, config=None, **options):
    level = "character" if tokenizer is not None else "token"
    marks = {} if tokenizer is not None else MARKS
    objective = FIM(**{"fim_rate": 1.0, "level": level, **marks, **options})
    objective.resolve(tokenizer, config)
    return objective


def rewritten(objective, tokens, labels=None, seed=0):
    return objective.rewrite(Document(list(tokens), list(labels or tokens)), random.Random(seed))


# -- the orders and their inverse ---------------------------------------------------------------------


def test_the_three_orders_are_those_of_the_paper():
    marks = FIMTokens("<PRE>", "<SUF>", "<MID>", "<EOT>")
    found = {mode: " ".join(fim(["p"], ["m"], ["s"], marks, mode)) for mode in MODES}
    assert found == {
        "psm": "<PRE> p <SUF> s <MID> m <EOT>",
        "spm": "<SUF> s <PRE> p <MID> m <EOT>",
        "joint": "<PRE> <SUF> s <MID> p m <EOT>",
    }


@pytest.mark.parametrize("mode", MODES)
def test_every_cut_of_a_document_is_undone_exactly(mode):
    document = list(range(7))
    for start, stop in itertools.combinations_with_replacement(range(8), 2):  # empty parts, too
        row = fim(document[:start], document[start:stop], document[stop:], IDS, mode)
        assert unfim(row, IDS) == document, (start, stop, row)
        assert len(row) == len(document) + 4


def test_an_unknown_order_is_refused():
    with pytest.raises(ValueError, match="mode must be one of psm, spm, joint, got 'msp'"):
        fim([1], [2], [3], IDS, "msp")


@pytest.mark.parametrize(
    "row", [[1, 2, 3], [PRE, 1, MID, 2, SUF, 3, END], [1, PRE, 2, SUF, 3, MID, END], [PRE, SUF, SUF, MID, END]]
)
def test_what_is_in_none_of_the_orders_is_refused_by_the_inverse(row):
    with pytest.raises(ValueError, match="no document in the order of fill-in-the-middle"):
        unfim(row, IDS)


# -- characters ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("spm_rate", [0.0, 1.0])
@pytest.mark.parametrize("spm", ["joint", "spm"])
def test_cutting_at_characters_gives_back_the_very_same_text_for_many_seeds(tokenizer, spm_rate, spm):
    objective = ready(tokenizer, spm_rate=spm_rate, spm=spm)
    within = 0
    for text, seed in itertools.product(TEXTS, range(40)):
        ids = tokenizer(text)["input_ids"]
        row = rewritten(objective, ids, seed=seed).tokens
        restored = objective.restore(row)
        assert tokenizer.decode(restored) == text + tokenizer.eos_token
        within += restored[:-1] != ids  # cut within a token, so that its pieces are other tokens
    assert within > 50, f"only {within} of 200 documents were cut within a token"


def test_each_part_is_tokenised_as_a_prompt_with_this_text_would_be(tokenizer):
    objective = ready(tokenizer, spm_rate=0.0)
    text = TEXTS[0]
    for seed in range(20):
        row = rewritten(objective, tokenizer(text)["input_ids"], seed=seed).tokens
        parts = [
            row[1 : row.index(objective._marks.suffix)],
            row[row.index(objective._marks.suffix) + 1 : row.index(objective._marks.middle)],
        ]
        for part in parts:
            assert part == tokenizer(tokenizer.decode(part))["input_ids"]


def test_cuts_are_uniform_over_characters(tokenizer):
    text = "abcdefghij" * 3
    objective = ready(tokenizer, spm_rate=0.0)
    ids = tokenizer(text)["input_ids"]
    lengths = Counter()
    for seed in range(600):
        row = rewritten(objective, ids, seed=seed).tokens
        lengths[len(tokenizer.decode(row[1 : row.index(objective._marks.suffix)]))] += 1
    # the smaller of two uniform cuts among n + 1 places has the mean n (2n + 1) / (6 (n + 1)), a third of n
    mean = sum(length * count for length, count in lengths.items()) / 600
    expected = sum((2 * (30 - k) + 1) * k for k in range(31)) / 31**2
    assert abs(mean - expected) < 1, f"prefixes have {mean:.2f} characters on average, expected {expected:.2f}"
    assert len(lengths) > 25


def test_half_a_character_and_spelled_out_sentinels_are_cut_between_tokens_with_a_warning(tokenizer):
    broken = tokenizer("a b c 👩")["input_ids"][:-1]  # ends within the bytes of the emoji
    spelled = tokenizer("x = '<|fim_prefix|>' # text", split_special_tokens=True)["input_ids"]
    for ids in (broken, spelled):
        objective = ready(tokenizer)
        with pytest.warns(UserWarning, match="does not give a document back"):
            rows = [rewritten(objective, ids, seed=seed).tokens for seed in range(20)]
        assert {tokenizer.decode(objective.restore(row)) for row in rows} == {tokenizer.decode([*ids, EOT])}
        assert all(len(objective.restore(row)) == len(ids) + 1 for row in rows) == (ids is broken)


def test_a_tokenizer_that_prepends_spaces_is_asked_behind_a_marker():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: at for at, letter in enumerate("▁abcdefgh \n\té")}
    raw = Tokenizer(models.BPE({**letters, "<unk>": 13, "<M>": 14, "</s>": 15}, [], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    raw.decoder = decoders.Metaspace(prepend_scheme="first")
    found = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", additional_special_tokens=["<M>"])
    characters = Characters(found, 14)
    assert characters.marker == 14
    ids = found("ab cd")["input_ids"]
    assert found.convert_ids_to_tokens(ids)[0] == "▁", "this tokenizer was to begin texts with a space"
    parts = characters.cut(ids, [2, 4])
    assert [characters.read(part) for part in parts] == [" a", "b ", "cd"]
    assert [token for part in parts for token in part] == ids


def test_a_tokenizer_that_loses_text_is_not_trusted_with_it():
    objective = ready(tiny_tokenizer(), spm_rate=0.0, **dict(zip(MARKS, ("w60", "w61", "w62", "w63"), strict=True)))
    tokens = list(range(10, 20))
    with pytest.warns(UserWarning, match="cut between tokens"):
        assert {tuple(objective.restore(rewritten(objective, tokens, seed=s).tokens)) for s in range(20)} == {
            tuple(tokens)
        }


# -- rows ---------------------------------------------------------------------------------------------


def test_bos_and_end_of_text_stay_at_the_ends():
    objective = ready(config=LlamaConfig(bos_token_id=BOS, eos_token_id=EOS))
    for seed in range(10):
        row = rewritten(objective, [BOS, 10, 11, 12, EOS], seed=seed).tokens
        assert row[0] == BOS
        assert row[1] == PRE
        assert row[-2:] == [END, EOS]
        assert objective.restore(row) == [BOS, 10, 11, 12, EOS]


def test_an_end_that_is_the_end_of_text_stands_there_once():
    objective = ready(config=LlamaConfig(eos_token_id=EOS), end_token=None)
    row = rewritten(objective, [10, 11, 12, EOS]).tokens
    assert row.count(EOS) == 1
    assert objective.restore(row) == [10, 11, 12, EOS]


def test_documents_within_a_row_are_rewritten_one_by_one():
    objective = ready(config=LlamaConfig(bos_token_id=BOS, eos_token_id=EOS))
    documents = [[BOS, *range(10, 20), EOS], [BOS, *range(20, 25), EOS], [30, 31, 32]]
    row = [token for document in documents for token in document]
    found = rewritten(objective, row).tokens
    assert found.count(MID) == 3
    assert objective.restore(found) == row
    first = found[: found.index(EOS) + 1]
    assert set(first) >= set(range(10, 20))
    assert not set(first) & set(range(20, 33))


def test_a_prompt_stays_in_front_and_untrained_tokens_stay_untrained():
    objective = ready()
    tokens, labels = [10, 11, 12, 20, 21, 22, 23], [-100, -100, -100, 20, -100, 22, 23]
    for seed in range(20):
        found = rewritten(objective, tokens, labels, seed)
        assert found.tokens[:3] == [10, 11, 12]
        assert found.labels[:3] == [-100] * 3
        pairs = dict(zip(found.tokens, found.labels, strict=True))
        assert {token: pairs[token] for token in tokens} == dict(zip(tokens, labels, strict=True))
        assert all(pairs[mark] == mark for mark in MARKS.values())


def test_at_characters_the_prompt_stays_too_and_all_else_is_trained(tokenizer):
    objective = ready(tokenizer)
    prompt, answer = tokenizer("Question? ")["input_ids"], tokenizer(TEXTS[0])["input_ids"]
    found = rewritten(objective, prompt + answer, [-100] * len(prompt) + answer)
    assert found.tokens[: len(prompt)] == prompt
    assert found.labels == [-100] * len(prompt) + found.tokens[len(prompt) :]


def test_the_unpredicted_first_token_of_a_packed_document_moves_with_the_document(tokenizer):
    ids = tokenizer(TEXTS[0])["input_ids"]
    found = rewritten(ready(tokenizer, spm_rate=0.0), ids, [-100, *ids[1:]], seed=3)
    assert found.tokens[0] == ready(tokenizer)._marks.prefix
    assert found.labels.count(-100) == 1


@pytest.mark.parametrize(("tokens", "labels"), [([10, 11], [-100, -100]), ([10, SUF, 12], None), ([EOS], None)])
def test_rows_without_anything_to_learn_or_rewritten_before_stay_as_they_are(tokens, labels):
    objective = ready(config=LlamaConfig(eos_token_id=EOS))
    document = Document(tokens, labels or tokens)
    assert objective.rewrite(document, random.Random(0)) is document


@pytest.mark.parametrize(("rate", "spm_rate"), [(0.5, 0.5), (0.9, 0.25)])
def test_shares_are_those_that_were_asked_for(rate, spm_rate):
    objective = ready(fim_rate=rate, spm_rate=spm_rate, spm="spm")
    rows = [rewritten(objective, range(10, 30), seed=seed).tokens for seed in range(2000)]
    changed = [row for row in rows if MID in row]
    assert abs(len(changed) / 2000 - rate) < 0.04
    assert abs(sum(row[0] == SUF for row in changed) / len(changed) - spm_rate) < 0.04


def test_map_and_training_on_packed_rows_rewrite_each_document():
    columns = FIM(fim_rate=1.0, level="token", **MARKS).map()({"input_ids": [[10, 11, 12], [13, 14]]})
    assert [sorted(set(row) - set(MARKS.values())) for row in columns["input_ids"]] == [[10, 11, 12], [13, 14]]

    def packed(rows):
        tokens = [token for row in rows for token in row["input_ids"]]
        positions = [position for row in rows for position in range(len(row["input_ids"]))]
        labels = torch.tensor([tokens])
        return {"input_ids": torch.tensor([tokens]), "labels": labels, "position_ids": torch.tensor([positions])}

    batch = FIM(fim_rate=1.0, level="token", **MARKS).collator(packed)(examples(3))
    assert int((batch["position_ids"] == 0).sum()) == 3
    assert int((batch["input_ids"] == MID).sum()) == 3


def test_batches_padded_on_the_left_stay_so():
    objective = FIM(fim_rate=1.0, level="token", **MARKS)

    def left(rows):
        return {name: value.flip(1) for name, value in collate(rows).items()}

    batch = objective.collator(left)(examples(4))
    assert batch["attention_mask"][:, -1].all()
    assert not batch["attention_mask"].all()
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_training_divides_by_the_targets_that_there_are():
    model = tiny_model(vocab_size=68)
    objective = FIM(fim_rate=1.0, level="token", bos_token=BOS, eos_token=EOS, seed=7, **MARKS)
    trainer = train(model, objective, max_steps=1, learning_rate=0.0)
    batch = objective.collator(lambda given: given)(next(iter(trainer.get_train_dataloader())))
    with torch.no_grad():
        loss = model.eval()(**batch).loss
    assert logged(trainer, "loss")[0] == pytest.approx(float(loss), abs=1e-4)  # a mean over all targets


# -- options and names --------------------------------------------------------------------------------


def test_sentinels_are_found_in_whichever_way_the_tokenizer_spells_them():
    for spelling in SPELLINGS:
        found = AutoTokenizer.from_pretrained(demo.path("tokenizer"))
        found.add_special_tokens({"additional_special_tokens": [name for name in spelling if name]})
        marks = ready(found)._marks
        wanted = [found.convert_tokens_to_ids(name) for name in spelling[:3]]
        assert [marks.prefix, marks.suffix, marks.middle] == wanted
        assert marks.end == (found.convert_tokens_to_ids(spelling[3]) if spelling[3] else found.eos_token_id)


def test_a_tokenizer_without_sentinels_is_refused_with_the_remedy():
    plain = AutoTokenizer.from_pretrained(demo.path("tokenizer"))
    with pytest.raises(ValueError, match=r"found no sentinels.*add_special_tokens.*resize_token_embeddings.*FIM\("):
        FIM().resolve(plain, None)
    with pytest.raises(ValueError, match=r"no token '<P>' \(prefix\)"):
        FIM(prefix_token="<P>", suffix_token="<S>", middle_token="<M>").resolve(plain, None)


def test_sentinels_outside_the_model_are_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="lies outside the model's vocabulary of 68"):
        train(tiny_model(vocab_size=68), FIM(level="token", **{**MARKS, "middle_token": 68}))


def test_characters_without_a_tokenizer_are_refused(tmp_path):
    trainer = Trainer(
        tiny_model(), arguments(tmp_path), train_dataset=examples(), data_collator=collate, callbacks=[FIM(**MARKS)]
    )
    with pytest.raises(ValueError, match=r'needs the tokenizer.*level="token"'):
        trainer.train()


def test_an_encoder_decoder_and_equal_sentinels_and_a_missing_end_are_refused():
    with pytest.raises(ValueError, match="for decoder-only models"):
        ready(config=BartConfig())
    with pytest.raises(ValueError, match=r"differ from each other, got the ids \[64, 64, 66, 67\]"):
        ready(suffix_token=64)
    with pytest.raises(ValueError, match="needs a token that ends the middle"):
        ready(end_token=None)


def test_columns_of_another_objective_are_refused():
    with pytest.raises(ValueError, match=r"cannot follow them: put FIM first"):
        ready().rewrite(Document([1, 2], [1, 2], {"denoised": [1, 1]}), random.Random(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fim_rate": 1.1}, "fim_rate must be a share from 0 to 1"),
        ({"fim_rate": True}, "fim_rate must be a share from 0 to 1"),
        ({"spm_rate": -0.1}, "spm_rate must be a share from 0 to 1"),
        ({"spm": "psm"}, "spm must be one of spm, joint, got 'psm'"),
        ({"level": "word"}, "level must be one of character, token, got 'word'"),
        ({"prefix_token": 5}, "name prefix_token, suffix_token and middle_token, or none"),
        ({"end_token": 5}, "name prefix_token, suffix_token and middle_token, or none"),
    ],
)
def test_options_out_of_range_are_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        FIM(**options)


@pytest.mark.parametrize("name", ["fim", "spm", "cm3", "codegen2"])
def test_a_row_that_would_become_too_long_lacks_the_end_of_its_text_and_of_no_span(name):
    marks = {"mask_tokens": [64, 65, 66], "end_token": 67, "max_spans": 3}
    made = {
        "fim": lambda limit: ready(max_length=limit),
        "spm": lambda limit: ready(max_length=limit, spm="spm", spm_rate=1.0),
        "cm3": lambda limit: CM3(min_spans=1, max_length=limit, **marks),
        "codegen2": lambda limit: CodeGen2(causal_share=0, mean_span=2, separator_token=68, max_length=limit, **marks),
    }[name]
    config = LlamaConfig(bos_token_id=BOS, eos_token_id=EOS)
    cut = 0
    for seed, ends in itertools.product(range(40), (False, True)):
        draw = random.Random(seed)
        text = [draw.randint(5, 60) for _ in range(draw.randint(2, 14))] + [EOS] * ends
        limit = len(text) + draw.randint(0, 8)
        rows = []
        for longest in (limit, None):
            objective = made(longest)
            objective.resolve(None, config)
            objective._limit = longest
            rows.append(objective.rewrite(Document(list(text), list(text)), random.Random(seed)).tokens)
        row, whole = rows
        assert len(row) <= limit
        if len(whole) <= limit:
            assert row == whole
            continue
        cut += 1
        kept = [token for token in objective.restore(row) if token != EOS]
        # spans of the whole row, without the last tokens of the text; or the text as it was, where marks have no room
        assert kept == text[: len(kept)] or row == text, (text, row)
        assert row == text or len(row) >= limit - ends, "more is missing than had to be"
    assert cut > 10


def test_cut_at_characters_a_row_keeps_to_its_length_too(tokenizer):
    tokens = tokenizer("def add(first, second):\n    return first + second\n" * 3)["input_ids"]
    for seed in range(20):
        objective = ready(tokenizer, max_length=len(tokens))
        objective._limit = len(tokens)
        row = objective.rewrite(Document(list(tokens), list(tokens)), random.Random(seed)).tokens
        assert len(row) <= len(tokens)
        text = tokenizer.decode([token for token in objective.restore(row) if token != EOT])
        assert tokenizer.decode(tokens).startswith(text)
        assert len(text) > 100
