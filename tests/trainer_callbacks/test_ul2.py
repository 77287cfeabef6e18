"""UL2: spans cover the rate and have the mean length, nothing is lost, modes and labels stand where they should."""

import itertools
import random
from typing import ClassVar

import pytest
import torch

from hf_ext.testing.objective import ObjectiveInProcess
from hf_ext.testing.objective_processes import tiny_tokenizer
from hf_ext.testing.objective_training import BOS, EOS, VOCABULARY, tiny_model, train
from hf_ext.testing.tiny_models import build
from hf_ext.trainer_callbacks.documents import Document
from hf_ext.trainer_callbacks.prefix_lm import PrefixLMTraining
from hf_ext.trainer_callbacks.ul2 import UL2
from hf_ext.trainer_callbacks.ul2_denoisers import DENOISERS, Denoiser, corrupt_spans, draw_spans, restore_spans

#: Ids that the tiny data rarely has; 16 sentinels are enough for its rows.
MARKS = {"sentinels": list(range(45, 61)), "mode_tokens": {"R": 61, "X": 62, "S": 63}}
SENTINELS = MARKS["sentinels"]


class TestUL2(ObjectiveInProcess):
    objective = UL2
    options: ClassVar = {**MARKS, "bos_token": BOS, "eos_token": EOS}
    null_options: ClassVar = {"share": 0.0}


CONFIG = tiny_model().config


def made(config=None, **options):
    objective = UL2(**{**MARKS, **options})
    objective.resolve(None, config or CONFIG)
    return objective


TEXT = Document([BOS, *range(5, 35), EOS], [BOS, *range(5, 35), EOS])
SPANS = [denoiser for denoiser in DENOISERS if denoiser.mode != "S"]


@pytest.mark.parametrize("denoiser", SPANS, ids=str)
@pytest.mark.parametrize("length", [512, 100, 9, 2])
def test_spans_cover_the_rate_in_the_number_that_the_mean_length_asks_for(length, denoiser):
    taken = min(max(1, round(denoiser.rate * length)), length - 1)
    for seed in range(50):
        spans = draw_spans(length, denoiser, random.Random(seed))
        assert sum(stop - start for start, stop in spans) == taken
        assert len(spans) == min(max(1, round(taken / denoiser.mean)), taken, length - taken + 1)
        assert spans[0][0] >= 0
        assert spans[-1][1] <= length
        assert all(before[1] < after[0] for before, after in itertools.pairwise(spans)), "spans touch"


def test_a_single_span_stands_anywhere():
    starts = [draw_spans(20, Denoiser("R", 3, 0.15), random.Random(seed))[0][0] for seed in range(4000)]
    assert set(starts) == set(range(18))
    assert max(abs(starts.count(start) / 4000 - 1 / 18) for start in range(18)) < 0.015


def test_span_lengths_vary_around_the_mean():
    lengths = [b - a for seed in range(400) for a, b in draw_spans(400, Denoiser("X", 8, 0.5), random.Random(seed))]
    assert abs(sum(lengths) / len(lengths) - 8) < 0.05
    assert min(lengths) == 1
    assert max(lengths) > 24


def test_the_end_of_a_text_that_is_taken_out_has_the_rate_on_average_and_every_length():
    lengths = [b - a for seed in range(4000) for a, b in draw_spans(40, Denoiser("S", 1, 0.25), random.Random(seed))]
    assert set(lengths) == set(range(1, 21))
    assert abs(sum(lengths) / len(lengths) / 40 - 0.2625) < 0.01


def test_denoisers_are_drawn_as_often_as_their_weights_say():
    objective = made()
    modes = [objective.rewrite(TEXT, random.Random(seed)).tokens[1] for seed in range(4000)]
    for mode, share in ((61, 0.4), (62, 0.4), (63, 0.2)):
        assert abs(modes.count(mode) / len(modes) - share) < 0.03


@pytest.mark.parametrize("denoiser", DENOISERS, ids=str)
def test_what_is_left_and_what_was_taken_out_restore_the_text(denoiser):
    for seed in range(100):
        tokens = list(range(100, 100 + random.Random(seed).randint(2, 90)))
        sentinels = list(range(1, 60))
        spans = draw_spans(len(tokens), denoiser, random.Random(seed))
        kept, moved = corrupt_spans(tokens, spans, sentinels)
        assert restore_spans(kept, moved, sentinels) == tokens
        assert len(kept) + len(moved) == len(tokens) + 2 * len(spans)


@pytest.mark.parametrize("denoiser", DENOISERS, ids=str)
def test_a_row_holds_the_mode_what_is_left_and_what_was_taken_out_with_labels_on_the_latter(denoiser):
    objective = made(denoisers=[denoiser])
    for seed in range(50):
        new = objective.rewrite(TEXT, random.Random(seed))
        assert new.tokens[:2] == [BOS, MARKS["mode_tokens"][denoiser.mode]]
        first = next(at for at, label in enumerate(new.labels) if label != -100)
        assert new.labels[first:] == new.tokens[first:], "labels are not those of the second part"
        assert new.tokens[-1] == EOS
        if denoiser.mode == "S":
            assert [BOS, *new.tokens[2:]] == TEXT.tokens
            continue
        assert new.tokens[first - 1] == SENTINELS[0], "the first sentinel parts the row and is given"
        kept, moved = [BOS, *new.tokens[2 : first - 1]], new.tokens[first - 1 :]
        assert objective.restore(kept, moved) == TEXT.tokens[:-1]
        assert [token for token in kept if token in SENTINELS] == [token for token in moved if token in SENTINELS]


def test_prompts_stay_in_front_and_untrained_tokens_stay_untrained():
    labels = [-100] * 8 + TEXT.labels[8:]
    labels[20] = -100
    objective = made(denoisers=[Denoiser("X", 3, 0.5)])
    for seed in range(50):
        new = objective.rewrite(Document(TEXT.tokens, labels), random.Random(seed))
        assert new.tokens[:9] == [BOS, 62, *TEXT.tokens[1:8]]
        assert TEXT.tokens[20] not in [label for label in new.labels if label != -100]
        at = new.tokens.index(TEXT.tokens[20])
        assert new.labels[at] == -100


def test_nothing_is_lost_when_rows_have_a_longest_length():
    for limit, seed in itertools.product((16, 24, 33), range(50)):
        objective = made(max_length=limit)
        new = objective.rewrite(TEXT, random.Random(seed))
        assert len(new.tokens) <= limit, f"{len(new.tokens)} tokens"
        first = next(at for at, label in enumerate(new.labels) if label != -100)
        if new.tokens[1] != 63:
            whole = objective.restore([BOS, *new.tokens[2 : first - 1]], new.tokens[first - 1 :])
            assert whole == TEXT.tokens[: len(whole)]


def test_an_encoder_reads_what_is_left_and_the_decoder_says_what_was_taken_out():
    config = build("t5").config
    config.eos_token_id = EOS
    text = Document(TEXT.tokens[1:], TEXT.labels[1:])  # T5 has no bos token
    for denoiser, seed in itertools.product(DENOISERS, range(20)):
        new = made(config, denoisers=[denoiser]).rewrite(text, random.Random(seed))
        assert new.tokens[0] == MARKS["mode_tokens"][denoiser.mode]
        assert (new.tokens[-1], new.labels[-1]) == (EOS, EOS)
        kept, moved = new.tokens[1:-1], new.labels[:-1]
        whole = kept + moved if denoiser.mode == "S" else restore_spans(kept, moved, SENTINELS)
        assert whole == text.tokens[:-1]


def test_an_encoder_decoder_trains_on_texts_and_pairs_need_a_mode():
    def texts(rows):
        ids = torch.tensor([[*row["input_ids"][1:6], EOS] for row in rows])
        return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}

    def pairs(rows):
        return {**texts(rows), "labels": texts(rows)["labels"][:, :3]}

    options = {**MARKS, "eos_token": EOS, "clean_loss_every": 0}
    trainer = train(build("t5", vocab_size=VOCABULARY), UL2(**options), collator=texts, max_steps=2)
    assert trainer.state.log_history[0]["loss"] > 0
    with pytest.raises(ValueError, match=r"holds pairs of texts.*UL2\(mode='S'\)"):
        train(build("t5", vocab_size=VOCABULARY), UL2(**options), collator=pairs, max_steps=1)
    train(build("t5", vocab_size=VOCABULARY), UL2(mode="S", **options), collator=pairs, max_steps=1)


def test_a_mode_for_fine_tuning_adds_its_token_and_nothing_else():
    given = Document([BOS, 7, 8, 9, EOS], [-100, -100, 8, 9, EOS])
    new = made(mode="R").rewrite(given, random.Random(0))
    assert new == Document([BOS, 61, 7, 8, 9, EOS], [-100, -100, -100, 8, 9, EOS])
    pair = made(mode="X", encoder_decoder=True).rewrite(Document([7, 8], [9]), random.Random(0))
    assert pair == Document([62, 7, 8], [9])


def test_the_first_part_can_be_read_both_ways_beside_prefix_lm():
    trainer = train(tiny_model(), UL2(**MARKS), company=[PrefixLMTraining()], max_steps=1)
    assert trainer.state.log_history[0]["prefix_share"] > 0.3


def test_the_prompt_of_generation_is_the_beginning_of_a_row_of_training():
    objective = made(denoisers=[Denoiser("X", 3, 0.3)])
    new = objective.rewrite(TEXT, random.Random(3))
    first = next(at for at, label in enumerate(new.labels) if label != -100)
    kept = [BOS, *new.tokens[2 : first - 1]]
    parts = [list(part) for is_gap, part in itertools.groupby(kept, SENTINELS.__contains__) if not is_gap]
    parts += [[]] * (kept[-1] in SENTINELS)
    assert objective.prompt(parts, "X") == new.tokens[:first]
    assert objective.prompt([[BOS, 5, 6]], "S") == [BOS, 63, 5, 6]


def test_without_mode_tokens_none_is_put_in_front():
    new = made(mode_tokens=None, denoisers=[Denoiser("S", 1, 0.25)]).rewrite(TEXT, random.Random(0))
    assert new.tokens == TEXT.tokens


def test_documents_that_are_too_short_or_need_too_many_sentinels():
    short = Document([BOS, 5, EOS], [BOS, 5, EOS])
    assert made().rewrite(short, random.Random(0)) is short
    with pytest.raises(ValueError, match=r"needs 5 sentinels.*there are 2: add some.*max_length"):
        made(sentinels=[50, 51], denoisers=[Denoiser("X", 3, 0.5)]).rewrite(TEXT, random.Random(0))


def test_tokens_that_are_not_there_are_named():
    with pytest.raises(ValueError, match=r"no token '\[NLU\]' \(mode R\).*add_special_tokens"):
        UL2().resolve(tiny_tokenizer(), tiny_model().config)
    with pytest.raises(ValueError, match=r"no token '<extra_id_0>' \(sentinel\)"):
        UL2(mode_tokens=None).resolve(tiny_tokenizer(), tiny_model().config)
    with pytest.raises(ValueError, match="ends spans with an eos token"):
        made(tiny_model(eos_token_id=None).config)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"share": 2}, "share must be"),
        ({"denoisers": []}, "denoisers must hold one"),
        ({"mode": "Z"}, "mode must be one of"),
        ({"mode": "R", "mode_tokens": None}, "needs mode_tokens"),
        ({"mode_tokens": {"R": 1}}, "mode_tokens must have a token for each"),
        ({"sentinels": "<extra>"}, "sentinels must be a text with"),
    ],
)
def test_options_out_of_range_are_refused(options, error):
    with pytest.raises(ValueError, match=error):
        UL2(**options)
    with pytest.raises(ValueError, match="rate between 0 and 1"):
        Denoiser("R", 3, 15)
