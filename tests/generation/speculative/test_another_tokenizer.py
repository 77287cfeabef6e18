"""A draft model with a tokenizer of its own."""

from __future__ import annotations

import copy
import functools
import itertools
import random
import sysconfig
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hf_ext.generation import BanditSpec, SpeculativeDecoding
from hf_ext.generation.speculative.translation import Language, Translator, common_prefix
from hf_ext.testing import exactness, tiny_models
from hf_ext.testing.strategy_base import refusal

SPECIALS = ("<pad>", "<s>", "</s>")
SOURCE = Path(sysconfig.get_path("stdlib"), "textwrap.py").read_text()


def wrapped(backend: Tokenizer) -> PreTrainedTokenizerFast:
    """Return a tokenizer of transformers."""
    pad, bos, eos = SPECIALS
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, bos_token=bos, eos_token=eos, padding_side="left"
    )


@functools.cache
def in_bytes(size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes, as GPT-2's, with so many tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    train = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[*SPECIALS], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(SOURCE.splitlines(keepends=True), train)
    return wrapped(backend)


@functools.cache
def in_words(size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of words that begin with a mark, as Llama's: the first of a text loses its space."""
    backend = Tokenizer(models.BPE(unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    train = trainers.BpeTrainer(vocab_size=size, special_tokens=[*SPECIALS], show_progress=False)
    backend.train_from_iterator(SOURCE.splitlines(keepends=True), train)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return wrapped(backend)


@functools.cache
def in_characters(merges: int, seed: int = 0) -> PreTrainedTokenizerFast:
    """Return a tokenizer of ASCII with so many merges, its characters under ids of their own for every seed."""
    characters = [chr(32 + i) for i in range(tiny_models.VOCABULARY - 3)]
    rng = random.Random(seed)
    order = rng.sample(characters, len(characters)) if seed else characters
    pairs = rng.sample(list(itertools.product(characters, repeat=2)), merges)
    names = [*SPECIALS, *order, *(a + b for a, b in pairs)]
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges=pairs))
    backend.decoder = decoders.Fuse()
    return wrapped(backend)


def model_for(tokenizer: PreTrainedTokenizerFast, kind: str = "llama"):
    return tiny_models.build(kind, vocab_size=len(tokenizer))


def writer(tokenizer: PreTrainedTokenizerFast):
    """Return a model that says no special tokens."""
    model = model_for(tokenizer)
    with torch.no_grad():
        model.lm_head.weight[: len(SPECIALS)] = 0
    return model


def renamed(model, first: PreTrainedTokenizerFast, second: PreTrainedTokenizerFast):
    """Return the same model for a tokenizer that has the same tokens under other ids."""
    other, ids = copy.deepcopy(model), first.get_vocab()
    order = [ids[token] for token, _ in sorted(second.get_vocab().items(), key=lambda item: item[1])]
    with torch.no_grad():
        for table in (other.get_input_embeddings(), other.get_output_embeddings()):
            table.weight.copy_(table.weight[order].clone())
    return other


TOKENIZERS = {
    "finer": lambda: (in_characters(400, 1), in_characters(0)),
    "coarser": lambda: (in_characters(0), in_characters(400, 1)),
    "of bytes": lambda: (in_bytes(300), in_bytes(420)),
}


@pytest.mark.parametrize(
    ("name", "kind"), [("finer", "llama"), ("coarser", "mistral"), ("of bytes", "llama")], ids=lambda value: value
)  # Mistral drops what has left its window
def test_greedy_text_is_that_of_generate(name, kind):
    mine, other = TOKENIZERS[name]()
    target, draft = model_for(mine), model_for(other, kind)
    exactness.assert_greedy_identity(
        lambda model: SpeculativeDecoding(draft, 2, tokenizer=mine, draft_tokenizer=other), models={name: target}
    )


@pytest.mark.parametrize("name", ["finer", "coarser"])
def test_sampled_text_follows_the_law_of_generate(name, monkeypatch):
    def of(*tokens, merges=()):
        backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges=list(merges)))
        backend.decoder = decoders.Fuse()
        return PreTrainedTokenizerFast(tokenizer_object=backend)

    mine, other = {  # of the draft models that these make, ones that are right often enough
        "finer": lambda: (of("d", "ab", "a", "c", "b", "ca", merges=[("a", "b"), ("c", "a")]), of("c", "d", "a", "b")),
        "coarser": lambda: (
            of("a", "b", "c", "d"),
            of("d", "ab", "a", "c", "b", "ca", merges=[("a", "b"), ("c", "a")]),
        ),
    }[name]()
    # The rows say the same few things.
    decode = functools.cache(lambda language, ids, decode=Language.decode: decode(language, list(ids)))
    monkeypatch.setattr(Language, "encode", functools.cache(Language.encode))
    monkeypatch.setattr(Language, "decode", lambda language, ids: decode(language, tuple(ids)))
    target = exactness.small_vocabulary(vocabulary=len(mine))
    draft = exactness.small_vocabulary(vocabulary=len(other))
    built = []

    def build(model):
        built.append(SpeculativeDecoding(draft, 2, tokenizer=mine, draft_tokenizer=other))
        return built[-1]

    settings = {"length": 2, "beyond": 2, "prompt": torch.tensor([[3, 1, 2, 3]]), "temperature": 0.8, "top_p": 0.95}
    distance = exactness.assert_sampling_law(build, target, draws=1500, repetition_penalty=1.1, **settings)
    assert built[-1].report.accepted > 100, f"only {built[-1].report.accepted} drafts accepted at distance {distance}"


def test_a_draft_model_that_is_the_target_under_other_ids_is_always_right():
    """As with the target's own tokenizer: as many calls, as many tokens accepted, and texts that end in a draft."""
    mine, other = in_characters(0), in_characters(0, 1)
    target = writer(mine)
    draft = renamed(target, mine, other)
    ids, mask = tiny_models.prompts((9, 4, 1))
    free = target.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False, pad_token_id=0)
    for eos in (None, free[:, 16].tolist()):
        settings = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
        settings["eos_token_id"] = eos
        reports = []
        for strategy in (
            SpeculativeDecoding(target, 4),
            SpeculativeDecoding(draft, 4, tokenizer=mine, draft_tokenizer=other),
        ):
            ours = strategy.generate(target, ids, **settings)
            assert ours.tolist() == target.generate(ids, **settings).tolist()
            reports.append(strategy.report)
        chain, text = reports
        assert (text.target_calls, text.accepted) == (chain.target_calls, chain.accepted)
        steps, new = text.details["steps"], sum(text.tokens_per_row)
        read = text.details["draft_positions"]
        assert read <= ids.numel() + new + 4 * 3 * steps + 12, f"{read} positions for {new} tokens in {steps} steps"


def test_a_draft_model_ends_texts_with_its_own_eos():
    """The end is drafted as well, so that it costs no call."""
    mine, other = in_characters(0), in_characters(0, 1)
    target, (ids, mask) = writer(mine), tiny_models.prompts((9, 4))
    settings = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2}
    said = int(target.generate(ids, **settings)[0, 9 + 7])
    with torch.no_grad():  # where a token was said that has a positive logit, the end is said instead
        target.lm_head.weight[2] = 1.01 * target.lm_head.weight[said]
    expected = target.generate(ids, **settings)
    assert (expected[0] == 2).any(), "the text does not end"
    draft, calls = renamed(target, mine, other), []
    for strategy in (SpeculativeDecoding(target, 4), SpeculativeDecoding(draft, 4, 0.0, mine, other)):
        assert strategy.generate(target, ids, **settings).tolist() == expected.tolist()
        calls.append(strategy.report.target_calls)
    assert calls[0] == calls[1]


@pytest.mark.parametrize(
    ("first", "second"),
    [(in_bytes, in_words), (in_words, in_bytes), (in_bytes, in_bytes)],
    ids=["to words", "to bytes", "bytes"],
)
def test_text_that_grows_is_read_as_if_it_were_read_at_once(first, second):
    """And the true continuation, tokenised by the draft model, comes back as the tokens that follow."""
    mine, other = first(400), second(500)
    text = SOURCE[:1500] + ("日本語 héllo 🎉🎉 wörld" if first is second else "")
    row, rng, translator = mine(text).input_ids, random.Random(0), Translator(mine, other)
    line, place, right, back = translator.line(), 3, 0, 0

    def plain(ids):
        return [token for token in ids if token != other.bos_token_id]

    whole = plain(other(text).input_ids)
    while place < len(row):
        translator.follow(line, row[:place])
        read = plain(line.ids)
        assert read == plain(other(mine.decode(row[: line.read], skip_special_tokens=True)).input_ids)
        assert line.read >= place - 3
        if whole[: len(read)] == read:
            found = translator.back(line, row[:place], whole[len(read) : len(read) + 6])
            right += common_prefix(found, row[place:])
            back += len(found)
        place += rng.randint(1, 5)
    assert right > 0.9 * back > 0, f"{right} of {back} tokens that came back follow"


def test_special_tokens_go_over_by_name_and_are_not_part_of_any_word():
    mine, other = copy.deepcopy(in_characters(0)), copy.deepcopy(in_characters(0, 1))
    mine.add_tokens(["<user>", "<only here>"], special_tokens=True)
    other.add_tokens(["<other>", "<user>"], special_tokens=True)
    line = (translator := Translator(mine, other)).line()
    row = mine("<s><user>hi<only here> you<user>").input_ids
    for stop in (1, 3, 6, len(row)):
        translator.follow(line, row[:stop])
    assert other.convert_ids_to_tokens(line.ids) == ["<s>", "<user>", "h", "i", " ", "y", "o", "u", "<user>"]
    drafted = other("ok</s>no").input_ids
    assert mine.convert_ids_to_tokens(translator.back(line, row, drafted)) == ["o", "k", "</s>"]
    for text in ("<s> a", " a"):  # a text that begins with a token begins with it once
        line = (translator := Translator(mine, in_words(500))).line()
        translator.follow(line, mine(text).input_ids)
        assert line.ids == in_words(500)(" a").input_ids


def test_a_draft_that_would_merge_with_the_last_token_is_tokenised_by_itself():
    names = ["a", "b", "c", "ab"]
    merging = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges=[("a", "b")]))
    merging.decoder = decoders.Fuse()
    mine = PreTrainedTokenizerFast(tokenizer_object=merging)
    translator = Translator(mine, in_characters(0))
    line, row = translator.line(), mine("ca").input_ids
    translator.follow(line, row)
    drafted = in_characters(0)("bc").input_ids
    assert mine.convert_ids_to_tokens(translator.back(line, row, drafted)) == ["b", "c"], "the text goes on with bc"


def test_a_character_that_is_not_complete_waits_for_the_rest_of_it():
    mine = in_bytes(300)
    translator, row = Translator(mine, mine), mine("é日").input_ids
    assert len(row) == 5, "a byte a token"
    line = translator.line()
    for count, read in ((1, 0), (2, 2), (3, 2), (4, 2)):
        translator.follow(line, row[:count])
        assert line.read == read, f"after {count} bytes"
    assert translator.back(line, row[:4], row[2:] + mine("x").input_ids) == [row[4], *mine("x").input_ids]
    assert translator.back(line, row[:4], mine("x").input_ids) == [], "bytes that are there cannot be taken back"


def test_tokens_beyond_the_rows_of_a_model_are_not_fed_to_it():
    mine, other = copy.deepcopy(in_characters(0)), copy.deepcopy(in_characters(0, 1))
    target, draft = writer(mine), renamed(writer(mine), mine, other)
    for tokenizer in (mine, other):
        tokenizer.add_tokens(["<user>", "e", "."], special_tokens=False)
        tokenizer.add_tokens(["the"])
    ids, mask = tiny_models.prompts((9, 4))
    settings = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    ours = SpeculativeDecoding(draft, 4, tokenizer=mine, draft_tokenizer=other).generate(target, ids, **settings)
    assert ours.tolist() == target.generate(ids, **settings).tolist()


def test_a_draft_model_that_reads_text_may_be_one_of_several_arms():
    mine, other = in_characters(0), in_characters(0, 1)
    target, (ids, mask) = writer(mine), tiny_models.prompts((9, 4))
    settings = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    through_text = SpeculativeDecoding(renamed(target, mine, other), 3, tokenizer=mine, draft_tokenizer=other)
    strategy = BanditSpec(arms=(through_text, SpeculativeDecoding(target, 2)))
    assert strategy.generate(target, ids, **settings).tolist() == target.generate(ids, **settings).tolist()
    assert min(strategy.report.details["pulls"]) > 0


def test_tokenizers_may_come_from_the_call_and_one_alone_is_refused():
    mine, other = in_characters(0), in_characters(0, 1)
    target, (ids, mask) = writer(mine), tiny_models.prompts((9, 4))
    draft = renamed(target, mine, other)
    settings = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    strategy = SpeculativeDecoding(draft, 4)
    ours = strategy.generate(target, ids, tokenizer=mine, assistant_tokenizer=other, **settings)
    assert ours.tolist() == target.generate(ids, **settings).tolist()
    assert strategy.report.details["mean_accepted"] >= 3
    own = SpeculativeDecoding(draft, 4, tokenizer=mine, draft_tokenizer=other)
    assert target.generate(ids, custom_generate=own, **settings).tolist() == ours.tolist()
    assert own.report.accepted == strategy.report.accepted
    refusal(
        lambda: SpeculativeDecoding(draft, draft_tokenizer=other).generate(target, ids, **settings),
        "draft_tokenizer", "tokenizer=", what="one tokenizer alone",
    )  # fmt: skip
