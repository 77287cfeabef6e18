"""Coherence and bits per byte against the model's own loss and against one-token-at-a-time loops."""

import math

import pytest
import torch

from hf_ext.metrics import bits_per_byte, coherence, continuation_nats
from hf_ext.metrics.likelihood import windows

TEXTS = ["the other three", "naïve café, 12 €", "x = {'a': 1}\n\treturn x"]


def token_by_token(model, ids, context, stride):
    """The surprise of each token but the first, each from its own forward pass over its own history."""
    nats, scored, end = [], 1, min(context, len(ids))
    while scored < len(ids):
        for position in range(scored, end):
            history = torch.tensor([ids[max(end - context, 0) : position]])
            with torch.no_grad():
                log_probabilities = model(history).logits[0, -1].log_softmax(-1)
            nats.append(-log_probabilities[ids[position]].item())
        scored, end = end, min(end + stride, len(ids))
    return nats


def test_bits_per_byte_of_a_text_within_the_context_is_the_models_own_loss(tiny_model, byte_tokenizer):
    text = "the café"
    ids = torch.tensor([[0, *byte_tokenizer(text)["input_ids"]]])
    with torch.no_grad():
        loss = tiny_model(ids, labels=ids).loss.item()
    measured = bits_per_byte(tiny_model, byte_tokenizer, [text])
    assert measured["nats_per_token"] == pytest.approx(loss, rel=1e-6)
    assert measured["tokens"] == ids.shape[1] - 1
    assert measured["bytes"] == len(text) + 1  # é takes two bytes
    assert measured["bits_per_byte"] == pytest.approx(
        loss * measured["tokens"] / math.log(2) / measured["bytes"], rel=1e-6
    )
    assert measured["perplexity"] == pytest.approx(math.exp(loss), rel=1e-6)


@pytest.mark.parametrize(("context", "stride"), [(16, 8), (16, 15), (7, 1), (5, 3), (2, 1)])
def test_sliding_windows_score_every_token_once_as_a_loop_over_tokens_does(tiny_model, byte_tokenizer, context, stride):
    text = "for key in other: return the_three[key]"
    expected = token_by_token(tiny_model, [0, *byte_tokenizer(text)["input_ids"]], context, stride)
    measured = bits_per_byte(tiny_model, byte_tokenizer, [text], context=context, stride=stride)
    assert measured["tokens"] == len(expected)
    difference = abs(measured["bits"] - sum(expected) / math.log(2))
    assert difference < 1e-3, f"total bits differ by {difference}"


def test_model_that_knows_nothing_needs_eight_bits_for_a_byte_on_a_byte_alphabet(tiny_model, byte_tokenizer):
    class Uniform(torch.nn.Module):
        """Equal logits over a vocabulary of 256."""

        config, device = tiny_model.config, torch.device("cpu")

        def forward(self, input_ids, **_):
            return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 256)})

    class Bytes:
        """UTF-8 bytes as tokens."""

        bos_token_id, eos_token_id, unk_token_id = 0, None, None

        def __call__(self, text, add_special_tokens):
            return {"input_ids": list(text.encode())}

    measured = bits_per_byte(Uniform(), Bytes(), ["any text: ü €", "b" * 40])
    assert measured["bits_per_byte"] == pytest.approx(8, rel=1e-6)
    assert measured["per_text"] == pytest.approx([8, 8], rel=1e-6)


def test_merging_bytes_into_tokens_does_not_change_the_bytes_counted(tiny_model, byte_tokenizer):
    measured = bits_per_byte(tiny_model, byte_tokenizer, ["there there"])
    assert measured["bytes"] == 11
    assert measured["tokens"] == 7  # th e re, space, th e re


def test_bits_per_byte_does_not_depend_on_the_batch(tiny_model, byte_tokenizer):
    texts = [*TEXTS, "t", "return " * 9]
    together = bits_per_byte(tiny_model, byte_tokenizer, texts, batch_size=32)
    one_by_one = bits_per_byte(tiny_model, byte_tokenizer, texts, batch_size=1)
    alone = [bits_per_byte(tiny_model, byte_tokenizer, [text])["bits_per_byte"] for text in texts]
    difference = max(abs(a - b) for a, b in zip(together["per_text"], alone, strict=True))
    assert difference < 1e-5, f"a text's figure differs by {difference} between a batch and alone"
    assert together["bits"] == pytest.approx(one_by_one["bits"], rel=1e-6)


def test_windows_cover_every_token_once_and_never_exceed_the_context():
    for length in range(2, 40):
        for context, stride in [(2, 1), (8, 3), (8, 7), (64, 5)]:
            new = []
            for window, count in windows(list(range(length)), context, stride):
                assert len(window) <= context
                new += window[-count:]
            assert new == list(range(1, length)), (length, context, stride)


def test_coherence_is_the_negated_loss_on_the_continuation_alone(tiny_model):
    prompt, continuation = [0, 5, 9, 7], [4, 8, 100]
    ids = torch.tensor([prompt + continuation])
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    with torch.no_grad():
        loss = tiny_model(ids, labels=labels).loss.item()
    measured = coherence(tiny_model, [prompt], [continuation])
    assert measured["coherence"] == pytest.approx(-loss, rel=1e-6)
    assert measured["perplexity"] == pytest.approx(math.exp(loss), rel=1e-6)


def test_coherence_agrees_with_the_transition_scores_of_generate(tiny_model):
    torch.manual_seed(3)
    prompts = torch.randint(1, 250, (3, 5))
    out = tiny_model.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, max_new_tokens=6, eos_token_id=None,
        pad_token_id=0, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    expected = tiny_model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    measured = continuation_nats(tiny_model, prompts.tolist(), out.sequences[:, 5:].tolist())
    difference = (torch.stack(measured) + expected).abs().max().item()
    assert difference < 1e-4, f"largest difference {difference}"


def test_coherence_does_not_depend_on_the_batch(tiny_model, byte_tokenizer):
    prompts, continuations = ["the", "def f", "a", "€"], [" other", "(x):", "b", " 12"]
    together = coherence(tiny_model, prompts, continuations, tokenizer=byte_tokenizer)
    single = coherence(tiny_model, prompts, continuations, tokenizer=byte_tokenizer, batch_size=1)
    difference = max(abs(a - b) for a, b in zip(together["per_text"], single["per_text"], strict=True))
    assert difference < 1e-5, f"largest difference {difference}"
    assert together["coherence"] == pytest.approx(sum(single["per_text"]) / 4)


def test_measuring_leaves_the_model_in_the_mode_it_was_in(tiny_model, byte_tokenizer):
    tiny_model.train()
    try:
        bits_per_byte(tiny_model, byte_tokenizer, ["text"])
        assert tiny_model.training
    finally:
        tiny_model.eval()


def test_start_token_falls_back_to_eos_and_can_be_given(tiny_model, byte_tokenizer):
    with_bos = bits_per_byte(tiny_model, byte_tokenizer, ["text"])["bits"]
    assert bits_per_byte(tiny_model, byte_tokenizer, ["text"], start_token_id=0)["bits"] == with_bos
    assert bits_per_byte(tiny_model, byte_tokenizer, ["text"], start_token_id=9)["bits"] != with_bos


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": []}, "non-empty"),
        ({"texts": "a string"}, "non-empty sequence"),
        ({"texts": ["ok", ""]}, "text at 1 is empty"),
        ({"texts": ["ok"], "context": 17}, "model's 16"),
        ({"texts": ["ok"], "context": 1}, "between 2"),
        ({"texts": ["ok"], "context": 8, "stride": 8}, "context - 1 = 7"),
        ({"texts": ["ok"], "stride": 0}, "stride"),
    ],
)
def test_bits_per_byte_refuses_input_that_makes_no_sense(tiny_model, byte_tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        bits_per_byte(tiny_model, byte_tokenizer, **options)


def test_bits_per_byte_refuses_unknown_tokens_and_a_missing_start_token(tiny_model):
    class Words:
        """A word-level tokenizer that knows one word."""

        bos_token_id, eos_token_id, unk_token_id = None, None, 1

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [2 if word == "known" else 1 for word in text.split()]}

    with pytest.raises(ValueError, match="start_token_id"):
        bits_per_byte(tiny_model, Words(), ["known"])
    with pytest.raises(ValueError, match="unknown tokens"):
        bits_per_byte(tiny_model, Words(), ["known other"], start_token_id=0)


@pytest.mark.parametrize(
    ("prompts", "continuations", "message"),
    [
        ([], [], "at least one"),
        ([[1]], [[1], [2]], "got 1 and 2"),
        ([[1], []], [[1], [2]], "prompt at 1 is empty"),
        ([[1], [1]], [[], [2]], "continuation at 0 is empty"),
        ([[1] * 10], [[2] * 7], "17 tokens, the model's context is 16"),
        (["text"], ["text"], "tokenizer="),
    ],
)
def test_coherence_refuses_input_that_makes_no_sense(tiny_model, prompts, continuations, message):
    with pytest.raises(ValueError, match=message):
        coherence(tiny_model, prompts, continuations)
