"""The benchmark of objectives: what it times and weighs, which bar holds for what, and its page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hf_ext import plugins
from hf_ext.benchmarks import objectives, objectives_measure
from hf_ext.benchmarks.objectives_measure import Clock, Sizes
from hf_ext.benchmarks.objectives_work import Work
from hf_ext.cli.output import CliError
from hf_ext.plugins import Plugin

TINY = Sizes(vocabulary=objectives_measure.SMALLEST, hidden=32, layers=2, rows=2, length=32, prompt=8)
EXAMPLES = {name: Plugin(name.lower(), "objective", "", f"hf_ext.testing.example_objectives:{name}")
            for name in ("Focal", "Roulette", "Twice")}  # fmt: skip


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the example objectives all that there are."""
    known = {plugin.name: plugin for plugin in EXAMPLES.values()}
    monkeypatch.setattr(plugins, "all", lambda kind=None: list(known.values()))
    monkeypatch.setattr(plugins, "get", known.__getitem__)


@pytest.mark.usefixtures("examples")
def test_objectives_are_sorted_by_the_work_that_they_do() -> None:
    found = {method.name: method.kind for method in objectives_measure.methods()}
    assert found == {"plain": "", "focal": "single-forward loss", "roulette": "corruption", "twice": "several passes"}


def test_an_objective_that_cannot_begin_is_a_row_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(objectives_measure.OPTIONS, "meap", {"mask_ratio": 3})
    found = {method.name: method.problem for method in objectives_measure.methods(["meap"])}
    assert found["plain"] == ""
    assert found["meap"].startswith("mask_ratio must be a share")


@pytest.mark.usefixtures("examples")
def test_a_run_prints_ratios_and_writes_its_record(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    file = tmp_path / "record.json"
    objectives.main(["--training", "--quick", "--no-memory", "--threads", "1", "--json", str(file)])
    record = json.loads(file.read_text())
    rows = {row["name"]: row for row in record["training"]["rows"]}
    assert list(rows) == ["plain", "focal", "roulette", "twice"]
    assert all(len(row["rounds"]) == 1 and row["tokens_per_second"] > 0 for row in rows.values())
    assert rows["twice"]["seconds"] > rows["plain"]["seconds"]
    assert record["command"].startswith("hf-ext bench objectives --training --quick")
    assert str(tmp_path) not in record["command"]
    assert "twice" in capsys.readouterr().out
    page = objectives.markdown(record)
    assert "| roulette | corruption |" in page
    assert "## With and without logits" not in page


@pytest.mark.usefixtures("examples")
def test_passes_are_counted_by_the_tokens_that_the_model_reads(tmp_path: Path) -> None:
    read, flops = {}, {}
    rows = objectives_measure.data(TINY, 4)
    for name in ("plain", "twice"):
        trainer = objectives_measure.trainer_of(name, TINY, rows, 1, str(tmp_path))
        with Work() as work:
            trainer.train()
        read[name], flops[name] = work.tokens, work.flops
    assert read == {"plain": 64, "twice": 128}
    assert 1.5 < flops["twice"] / flops["plain"] < 2.5, flops
    torch.nn.Embedding(4, 4)(torch.tensor([1]))
    assert work.tokens == 128, "the hook outlived the block"


def test_a_causal_attention_counts_the_pairs_that_it_looks_at() -> None:
    states = torch.ones(2, 3, 9, 4)
    counted = []
    for causal in (True, False):
        with Work() as work:
            torch.nn.functional.scaled_dot_product_attention(states, states, states, is_causal=causal)
        counted.append(work.flops)
    assert counted == [2 * 2 * 2 * 3 * 45 * 4, 2 * 2 * 2 * 3 * 81 * 4]


def test_rewritten_rows_keep_the_length_of_the_data(tmp_path: Path) -> None:
    rows, lengths = objectives_measure.data(TINY, 4), set()
    for name in ("ul2", "cm3"):
        trainer = objectives_measure.trainer_of(name, TINY, rows, 2, str(tmp_path))
        trainer.model.register_forward_pre_hook(
            lambda *given: lengths.add(given[-1]["input_ids"].shape[1]), with_kwargs=True
        )
        trainer.train()
    assert lengths == {32}


def test_data_begins_with_a_prompt_that_is_not_trained_on() -> None:
    rows = objectives_measure.data(TINY, 6)
    assert len(rows) == 6
    assert all(len(row["input_ids"]) == len(row["labels"]) == 32 for row in rows)
    assert all([label == -100 for label in row["labels"]] == [True] * 8 + [False] * 24 for row in rows)


def test_the_first_step_of_a_run_does_not_count() -> None:
    clock = Clock()
    for _ in range(2):
        clock.on_train_begin(None, None, None)
        for _ in range(3):
            clock.on_step_end(None, None, None)
        assert len(clock.seconds) == 2


def test_a_method_that_breaks_is_reported_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(objectives_measure.OPTIONS, "meap", {"mask_token_id": 99999})
    found = objectives_measure.timed([("meap", "meap", {})], TINY, 1, 1)
    assert "lies outside the model's 4224 embeddings" in found["meap"]["problem"]
    assert found["plain"]["seconds"]


def test_a_row_over_its_bar_says_so() -> None:
    assert objectives.verdict({"bar": 0.05, "ratio": 1.06, "read": 1.0}) == "over 5 %"
    assert objectives.verdict({"bar": 0.05, "ratio": 1.06, "read": None}) == "over 5 %"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--rounds", "0"], "must be 1 at least"), (["--objectives", "nothing-like-it"], "no such objective")],
)
def test_wrong_options_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(CliError, match=message):
        objectives.main(arguments)


def test_memory_is_weighed_in_a_process_of_its_own_and_grows_with_the_vocabulary() -> None:
    small, large = (Sizes(vocabulary=size, hidden=32, layers=2, rows=4, length=128, prompt=8) for size in (4224, 32768))
    peaks = [objectives_measure.weighed([("plain", "plain", {})], sizes, 1, 1)["plain"] for sizes in (small, large)]
    assert all(found["read"] == 1 for found in peaks), peaks
    if peaks[0]["peak_mib"] is not None:  # the system tells
        logits = 4 * 128 * 32768 * 4 / 2**20
        assert peaks[1]["peak_mib"] > peaks[0]["peak_mib"] + logits, peaks
