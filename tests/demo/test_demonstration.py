import io
import json

import pytest
from rich.console import Console

from hf_ext import demo


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    text = io.StringIO()
    console = Console(file=text, width=120)
    figures = demo.run(report=folder, functions=2, new_tokens=12, steps=2, console=console)
    return figures, text.getvalue(), folder


def test_four_ways_of_decoding_stand_side_by_side(short):
    figures, printed, _ = short
    assert [row["name"] for row in figures["decoding"]] == ["greedy", "sampling", "contrastive search", "cautious"]
    for row in figures["decoding"]:
        assert row["name"] in printed
        assert row["tokens_per_second"] > 0
        assert len(row["texts"]) == 2
        assert 0 <= row["rep_4"] <= 1


def test_second_process_continues_with_identical_tokens_by_the_checkpoints_own_code(short):
    swan = short[0]["swan"]
    assert swan["identical"]
    assert swan["reloaded_class"].startswith("transformers_modules.")
    assert {"modeling_swan_gpt.py", "configuration_swan_gpt.py", "config.json"} <= set(swan["files"])


def test_training_logs_the_clean_loss_beside_the_objective(short):
    log = short[0]["swan"]["log"]
    assert log
    assert all("clean_loss" in entry for entry in log)


def test_report_holds_tables_plots_and_texts(short):
    _, _, folder = short
    text = (folder / "report.md").read_text()
    for plot in ("decoding.png", "training.png"):
        assert plot in text
        assert (folder / plot).read_bytes().startswith(b"\x89PNG")
    assert "| greedy |" in text


def test_figures_are_ready_for_json(short):
    assert json.loads(json.dumps(short[0]))["swan"]["identical"]


def test_a_report_folder_that_cannot_be_made_is_named_before_any_work(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="cannot write a report into"):
        demo.run(report=file / "sub")
