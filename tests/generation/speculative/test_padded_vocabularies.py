"""Draft models whose vocabulary is padded to another size than the target's."""

from __future__ import annotations

import copy
import functools
import gc
import warnings
import weakref

import pytest
import torch

from hf_ext.generation import (
    BanditSpec,
    DySpec,
    OptTree,
    RecursiveSpeculativeDecoding,
    SpecTr,
    SpeculativeContrastiveDecoding,
    SpeculativeDecoding,
    StagedSpeculativeDecoding,
)
from hf_ext.generation.speculative import vocabulary
from hf_ext.generation.speculative_contrastive_decoding import contrastive_logits
from hf_ext.testing import exactness, tiny_models
from hf_ext.testing.strategy_base import refusal

#: Every strategy that drafts with a second model and follows the target's law.
BUILDS = {
    "chain": lambda draft: SpeculativeDecoding(draft, 3, confidence=0.1),
    "sequences": lambda draft: SpecTr(draft, sequences=3, draft_tokens=3),
    "branches": lambda draft: RecursiveSpeculativeDecoding(draft),
    "expected": lambda draft: OptTree(draft, nodes=8, depth=3),
    "drawn": lambda draft: DySpec(draft, nodes=8, depth=3),
    "staged": lambda draft: StagedSpeculativeDecoding(draft, nodes=8, depth=3),
    "bandit": lambda draft: BanditSpec(draft_model=draft),
}


@functools.cache
def padded(model, size: int, strength: float):
    """Return a draft model with `size` rows; those beyond the target's are its likeliest tokens everywhere."""
    draft, known = copy.deepcopy(exactness.perturbed(model, strength)), model.config.vocab_size
    draft.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        for row in range(known, size):
            draft.get_output_embeddings().weight[row] = 2 * draft.get_output_embeddings().weight[row - known]
    return draft


@pytest.fixture(autouse=True)
def _said():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="draft_model has a vocabulary")
        yield


@pytest.mark.parametrize("size", [60, 130], ids="draft of {}".format)
@pytest.mark.parametrize("name", BUILDS)
def test_greedy_text_is_that_of_generate(name, size):
    target = tiny_models.shared("llama")
    draft = padded(target, size, 0.15)
    exactness.assert_greedy_identity(lambda model: BUILDS[name](draft), kinds=("llama",))


@pytest.mark.parametrize("size", [3, 6], ids="draft of {}".format)
@pytest.mark.parametrize("name", BUILDS)
def test_sampled_text_follows_the_law_of_generate(name, size):
    target = exactness.small_vocabulary(vocabulary=4)
    draft = padded(target, size, 0.5)
    built = []

    def build(model):
        built.append(BUILDS[name](draft))
        return built[-1]

    exactness.assert_sampling_law(
        build, target, draws=2500, prompt=torch.tensor([[3, 1, 2, 3]]), temperature=0.8, top_p=0.95
    )
    assert built[-1].report.accepted > 0, "no draft was accepted"


def test_a_draft_model_of_fewer_tokens_drafts_what_it_may_when_all_it_knows_is_forbidden():
    """Its law must not become one of nothing: a processor may leave only tokens that it does not have."""
    target = exactness.small_vocabulary(vocabulary=5)
    draft, settings = padded(target, 3, 0.3), {"suppress_tokens": [0, 1, 2]}
    for name in ("chain", "sequences", "drawn"):
        exactness.assert_sampling_law(
            lambda model, name=name: BUILDS[name](draft), target, draws=1500, prompt=torch.tensor([[3, 1, 2, 4]]),
            length=3, law={k: v for k, v in _law(target, settings).items() if v}, **settings,
        )  # fmt: skip


def _law(target, settings):
    return exactness.continuation_law(target, torch.tensor([[3, 1, 2, 4]]), 3, **settings)


@pytest.mark.parametrize("size", [60, 130], ids="amateur of {}".format)
def test_contrast_is_among_the_tokens_that_the_amateur_has(size):
    """Against the two models asked for every token one after the other."""
    expert = tiny_models.shared("llama")
    amateur, common = padded(expert, size, 0.3), min(size, tiny_models.VOCABULARY)
    ids = torch.tensor([[70, 5, 81, 9, 33]])
    ours = SpeculativeContrastiveDecoding(amateur, draft_tokens=3).generate(
        expert, ids, max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    text = ids
    for _ in range(12):
        read = text.clamp(max=size - 1)
        with torch.no_grad():
            logits = (expert(text).logits[:, -1, :common], amateur(read).logits[:, -1, :common])
        text = torch.cat([text, contrastive_logits(*logits, beta=0.5, alpha=0.1).argmax(-1, keepdim=True)], dim=1)
    assert ours.tolist() == text.tolist()


def test_padding_is_said_once_and_more_than_padding_is_refused():
    target, ids = tiny_models.shared("llama"), torch.tensor([[5, 6, 7]])
    vocabulary._say_padding.cache_clear()
    for strategy in (SpeculativeDecoding(padded(target, 130, 0.15)), SpecTr(padded(target, 130, 0.15))):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            strategy.generate(target, ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        words = [str(warning.message) for warning in said if "vocabulary of 130" in str(warning.message)]
        assert len(words) == isinstance(strategy, SpeculativeDecoding), f"{type(strategy).__name__} said {words}"
    far = tiny_models.build("llama", vocab_size=tiny_models.VOCABULARY + vocabulary.PADDING + 1)
    for build in BUILDS.values():
        refusal(
            lambda build=build: build(far).generate(target, ids, max_new_tokens=4, pad_token_id=0),
            "vocabulary of 609", "target one of 96", "draft_tokenizer", what="a vocabulary of another size",
        )  # fmt: skip


def test_tokenizers_that_are_given_decide_instead_of_the_sizes():
    target, ids = tiny_models.shared("llama"), torch.tensor([[5, 6, 7]])
    far = tiny_models.build("llama", vocab_size=tiny_models.VOCABULARY + vocabulary.PADDING + 1)
    same, other = tiny_models.tokenizer(), _shifted(tiny_models.tokenizer())
    same.add_tokens(["<tool>"], special_tokens=True)
    common = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "tokenizer": tiny_models.tokenizer()}
    expected = target.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    for draft in (far, tiny_models.shared("llama")):
        strategy = SpecTr(draft)
        assert strategy.generate(target, ids, assistant_tokenizer=same, **common).tolist() == expected.tolist()
        refusal(
            lambda strategy=strategy: strategy.generate(target, ids, assistant_tokenizer=other, **common),
            "SpecTr", "other tokens", "draft_tokenizer", what="a draft model with another tokenizer",
        )  # fmt: skip
    said = refusal(
        lambda: SpecTr(target).generate(target, ids, assistant_tokenizer=same, max_new_tokens=5, pad_token_id=0),
        "assistant_tokenizer", "tokenizer=", what="one tokenizer alone",
    )  # fmt: skip
    assert "draft_model" not in said, "it has one"
    refusal(
        lambda: BanditSpec().generate(target, ids, assistant_tokenizer=same, **common),
        "assistant_tokenizer", "draft_model", what="a tokenizer of no draft model",
    )  # fmt: skip


def test_comparing_tokenizers_keeps_neither_alive_and_sees_what_is_added():
    one, other = tiny_models.tokenizer(), tiny_models.tokenizer()
    assert vocabulary.same_ids(one, other)
    assert not vocabulary.same_ids(one, _shifted(other))
    other.add_tokens(["<tool>"])
    assert vocabulary.same_ids(one, other)
    gone = [weakref.ref(one), weakref.ref(other)]
    del one, other
    gc.collect()
    assert [found() for found in gone] == [None, None]


def _shifted(tokenizer):
    """Return a tokenizer with the same characters under other ids."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    names = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    specials, characters = names[:3], names[3:]
    ids = {name: i for i, name in enumerate([*specials, *characters[1:], characters[0]])}
    backend = Tokenizer(models.BPE(ids, merges=[]))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
