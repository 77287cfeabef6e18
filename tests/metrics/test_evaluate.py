"""The metrics through `evaluate.load(path)`, with the network switched off."""

import socket

import evaluate
import pytest

from hf_ext import metrics


@pytest.fixture(scope="module", autouse=True)
def no_network(tmp_path_factory):
    """Any connection fails the test, and evaluate's caches start empty."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"tried to reach the network: {args[1:]}")

    caches = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        patch.setattr("evaluate.config.HF_METRICS_CACHE", str(caches / "metrics"))
        patch.setattr("evaluate.config.HF_MODULES_CACHE", str(caches / "modules"))
        patch.syspath_prepend(str(caches / "modules"))
        yield


def test_loaded_repetition_diversity_gives_the_figures_of_the_function_for_strings():
    metric = evaluate.load(metrics.path("repetition_diversity"))
    texts = ["a b a b a b a", "def f(x): return f(f(x))"]
    assert metric.compute(predictions=texts) == metrics.repetition_diversity(texts)


def test_loaded_repetition_diversity_takes_token_ids_and_options():
    metric = evaluate.load(metrics.path("repetition_diversity"))
    texts = [[1, 2, 1, 2, 1], [3, 3, 3]]
    assert metric.compute(predictions=texts, orders=(2,)) == metrics.repetition_diversity(texts, orders=(2,))


def test_loaded_metric_can_be_filled_batch_by_batch():
    metric = evaluate.load(metrics.path("repetition_diversity"))
    texts = ["a b a b a b a", "c d e f g", "h h h h h"]
    metric.add_batch(predictions=texts[:2])
    metric.add(prediction=texts[2])
    assert metric.compute() == metrics.repetition_diversity(texts)


def test_loaded_coherence_and_bits_per_byte_take_a_live_model(tiny_model, byte_tokenizer):
    live = {"model": tiny_model, "tokenizer": byte_tokenizer}
    prompts, continuations = ["the", "def"], [" other", " f(x)"]
    metric = evaluate.load(metrics.path("coherence"))
    expected = metrics.coherence(tiny_model, prompts, continuations, tokenizer=byte_tokenizer)
    assert metric.compute(predictions=continuations, references=prompts, **live) == expected
    ids = [[1, 2], [3, 4]]
    assert metric.compute(predictions=ids, references=ids, model=tiny_model) == metrics.coherence(tiny_model, ids, ids)
    metric = evaluate.load(metrics.path("bits_per_byte"))
    expected = metrics.bits_per_byte(tiny_model, byte_tokenizer, prompts, context=4, stride=2)
    assert metric.compute(predictions=prompts, context=4, stride=2, **live) == expected


def test_loaded_metric_says_that_it_needs_a_model():
    with pytest.raises(ValueError, match="live model"):
        evaluate.load(metrics.path("coherence")).compute(predictions=["a"], references=["b"])
    with pytest.raises(ValueError, match="live model"):
        evaluate.load(metrics.path("bits_per_byte")).compute(predictions=["a"])


@pytest.mark.parametrize("name", metrics.NAMES)
def test_every_metric_loads_and_describes_itself(name):
    metric = evaluate.load(metrics.path(name))
    assert metric.module_type == "metric"
    assert "Args:" in metric.inputs_description
    assert metric.citation


def test_path_of_an_unknown_metric_names_the_known_ones():
    with pytest.raises(ValueError, match="repetition_diversity, coherence, bits_per_byte"):
        metrics.path("bleu")


@pytest.mark.parametrize("name", ["repetition_diversity", "coherence", "bits_per_byte"])
def test_no_texts_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"predictions is empty; {name} of no texts"):
        evaluate.load(metrics.path(name)).compute(predictions=[])
