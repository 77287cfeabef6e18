"""`hf-ext train`: what it trains on, what it leaves, how it resumes, and what it refuses in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_ext import plugins
from hf_ext.cli import models, train, train_data, train_run, train_show
from hf_ext.cli.output import CliError
from hf_ext.plugins import Plugin

FOCAL = Plugin("focal", "objective", "", "hf_ext.testing.example_objectives:Focal")
ROULETTE = Plugin("roulette", "objective", "", "hf_ext.testing.example_objectives:Roulette")
TWICE = Plugin("twice", "objective", "", "hf_ext.testing.example_objectives:Twice")


@pytest.fixture
def objectives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the example objectives known by name, beside the real ones."""
    known = {plugin.name: plugin for plugin in (FOCAL, ROULETTE, TWICE)}
    real = plugins.get
    monkeypatch.setattr(plugins, "get", lambda name: known.get(name) or real(name))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "words.txt"
    file.write_text("the cat sat on the mat and saw the dog run. " * 60, encoding="utf-8")
    return file


def common(model: Path, data: Path, out: Path) -> list[Any]:
    return ["train", "--model", model, "--data", data, "--out", out, "--length", 32, "--batch", 4, "--cpu"]


@pytest.mark.usefixtures("objectives")
def test_it_trains_composed_objectives_and_leaves_model_card_curves_and_summary(
    cli: Any, model_folder: Path, text: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    run = cli(
        *common(model_folder, text, out), "--objective", "focal", "--objective", "roulette", "--set", "gamma=1.0",
        "--set", "roulette.share=0.1", "--steps", 6, "--accumulate", 2, "--learning-rate", 0.01, "--json",
    )  # fmt: skip
    assert (run.status, run.err) == (0, ""), run.err
    summary = json.loads(run.out)
    assert [one["objective"] for one in summary["objectives"]] == ["focal", "roulette"]
    assert summary["objectives"][0]["options"]["gamma"] == 1.0
    assert summary["objectives"][1]["options"]["share"] == 0.1
    assert summary["steps"] == 6
    for name in ("loss", "clean_loss", "eval_loss"):
        assert summary[name]["last"] < summary[name]["first"], (name, summary[name])
    assert summary["loss"]["first"] < summary["clean_loss"]["first"]  # focal weights are below 1
    assert Path(summary["curves"]).read_bytes().startswith(b"\x89PNG")
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "## Training objective" in card
    assert "gamma: `1.0`" in card
    assert "share: `0.1`" in card
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(out)
    ids = AutoTokenizer.from_pretrained(out)("the cat sat", return_tensors="pt")["input_ids"]
    assert torch.isfinite(loaded(ids).logits).all()


@pytest.mark.usefixtures("objectives")
def test_a_resumed_run_ends_where_one_without_a_break_ends(
    cli: Any, model_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def options(out: Path) -> list[Any]:
        objective = ["--objective", "twice", "--steps", 4, "--save", 2, "--no-curves"]
        return [*common(model_folder, text, out), *objective, "--eval", 0]

    assert cli(*options(tmp_path / "whole"), "--json").status == 0
    broken = tmp_path / "broken"
    real = train_show.Progress.on_step_end

    def interrupt(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        real(self, args, state, control, **kwargs)
        if state.global_step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(train_show.Progress, "on_step_end", interrupt)
    run = cli(*options(broken))
    assert run.status == 130
    assert "step 1/4: loss" in run.err
    monkeypatch.undo()
    monkeypatch.setattr(plugins, "get", lambda name: TWICE)
    torn = broken / "checkpoint-3"  # as if the process had been killed while it wrote: the state comes last
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    (torn / "trainer_state.json").write_text('{"epoch": 0.5, ', encoding="utf-8")
    again = cli(*options(broken), "--resume", "--json")
    assert again.status == 0, again.err
    assert json.loads(again.out)["resumed_from"] == 2
    from safetensors.torch import load_file

    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken"))
    difference = max(float((whole[name] - resumed[name]).abs().max()) for name in whole)
    assert difference == 0, difference
    other = cli(*options(broken), "--resume", "--batch", 2)
    assert other.err == f"error: --resume: the run in {broken} has batch 4, this one 2\n"
    assert "exists and is not empty" in cli(*options(broken)).err
    assert "has taken all its 4 steps; --steps or --epochs ask for more" in cli(*options(broken), "--resume").err
    text.write_text(text.read_text(encoding="utf-8").replace("dog", "cow"), encoding="utf-8")
    assert "the data have changed since the run in" in cli(*options(broken), "--resume").err


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(
    cli: Any, model_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, arguments = tmp_path / "out", ["--steps", 2, "--eval", 0, "--no-curves"]
    whole = tmp_path / "whole"
    assert cli(*common(model_folder, text, whole), *arguments).status == 0
    out.mkdir()
    (out / train_run.FILE).write_text((whole / train_run.FILE).read_text(encoding="utf-8"), encoding="utf-8")
    (out / "checkpoint-1").mkdir()
    run = cli(*common(model_folder, text, out), *arguments, "--resume")
    assert run.status == 0, run.err
    assert run.err.startswith(f"the run in {out} was stopped before its first checkpoint: it begins anew\n")
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    for folder in out.glob("checkpoint-*"):
        (folder / "trainer_state.json").unlink()
    run = cli(*common(model_folder, text, out), *arguments, "--resume")
    assert run.err == f"error: --resume: the run in {out} has ended, and its checkpoints are gone\n"
    assert (out / "model.safetensors").exists()


def test_a_loss_that_is_no_number_stops_the_training_and_leaves_no_folder(
    cli: Any, model_folder: Path, text: Path, tmp_path: Path
) -> None:
    run = cli(*common(model_folder, text, tmp_path / "out"), "--steps", 40, "--save", 40, "--learning-rate", 1e30)
    assert run.status == 1
    assert " is nan at step " in run.err, run.err
    assert run.err.endswith("try a smaller --learning-rate\n")
    assert not (tmp_path / "out").exists()


def test_adapters_train_and_are_saved_alone(cli: Any, model_folder: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = cli(*common(model_folder, text, out), "--lora", "--lora-rank", 2, "--bf16", "--steps", 2, "--no-curves")
    assert run.status == 0, run.err
    assert (out / "adapter_config.json").is_file()
    assert not (out / "model.safetensors").exists()
    assert "next-token loss, evaluation" in run.out
    assert "step 2/2: loss" in run.err
    loaded, _ = models.load(str(out), "cpu", "float32", trust_remote_code=False)  # for `hf-ext generate`
    added = [weight for name, weight in loaded.named_parameters() if "lora_B" in name]
    assert added
    assert all(weight.abs().max() > 0 for weight in added), "the trained adapters are not in the model that was loaded"
    again = cli(*common(out, text, tmp_path / "more"))
    assert (
        again.err == f"error: {out} holds adapters, not a model: load it with peft, merge_and_unload, and save that\n"
    )


def test_completions_are_trained_on_and_prompts_are_not(tmp_path: Path, model_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "ab", "completion": "cde"}\n\n{"prompt": "", "completion": "f"}\n', encoding="utf-8")
    found = train_data.rows(train_data.texts(str(file), 0), tokenizer, 16, 0.0, 0, pack=True)
    first, second = found.train
    assert [label == -100 for label in first["labels"]] == [True] * 2 + [False] * 4  # "cde" and the end
    assert tokenizer.decode(first["input_ids"]) == "abcde<end>"
    assert second["labels"] == second["input_ids"]
    assert found.evaluation == []


def test_packed_rows_hold_all_text_and_evaluation_has_documents_of_its_own(model_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    documents = [train_data.Text(chr(65 + index) * 15) for index in range(40)]
    found = train_data.rows(documents, tokenizer, 16, 0.25, 0, pack=True)
    assert (len(found.train), len(found.evaluation)) == (30, 10)
    letters = [{tokenizer.decode([row["input_ids"][0]]) for row in rows} for rows in (found.train, found.evaluation)]
    assert not letters[0] & letters[1]
    assert len(letters[0] | letters[1]) == 40
    assert found.tokens == 30 * 16


def test_the_standard_library_is_there_without_what_is_kept_for_evaluation() -> None:
    found = train_data.texts("stdlib", 0)
    assert len(found) > 100
    assert not any("class StatisticsError" in text.completion for text in found)
    assert found != train_data.texts("stdlib", 1)
    assert sorted(map(repr, found)) == sorted(map(repr, train_data.texts("stdlib", 1)))


def test_new_special_tokens_get_a_role_and_room(model_folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    size = len(tokenizer)
    train_run.add_tokens(model, tokenizer, ["mask_token=<mask>", "<PRE>", "<M_{0..2}>"])
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == ("<mask>", size)
    assert tokenizer("<PRE>")["input_ids"] == [size + 1]
    assert model.get_input_embeddings().weight.shape[0] == size + 5
    assert tokenizer("<M_2>")["input_ids"] == [size + 4]
    with pytest.raises(CliError, match="tokenizers have no maks_token; there are"):
        train_run.add_tokens(model, tokenizer, ["maks_token=<m>"])


@pytest.mark.usefixtures("objectives")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--objective", "focl"], "unknown plugin 'focl'"),
        (["--objective", "contrastive-search"], "contrastive-search is of the kind strategy; --objective takes"),
        (["--objective", "focal", "--objective", "focal"], "--objective focal is given twice"),
        (["--objective", "focal", "--set", "gamma=big"], "option gamma expects float, got 'big'"),
        (["--objective", "focal", "--set", "gama=1"], "focal has no option 'gama'; did you mean 'gamma'?"),
        (["--objective", "meap", "--set", "mask_ratio=2"], "meap: mask_ratio must be a share"),
        (["--objective", "focal", "--objective", "roulette", "--set", "seed=1"], "focal and roulette have this option"),
        (["--objective", "focal", "--set", "meap.seed=1"], "meap is no --objective here; there are focal"),
        (["--set", "gamma=1"], "there is no --objective that it could be for"),
        (["--steps", "3", "--epochs", "1"], "--steps and --epochs exclude each other"),
        (["--eval", "1.5"], "--eval 1.5: expected a share"),
        (["--epochs", "inf"], "--epochs inf: expected a number above 0"),
        (["--add-token", ""], "--add-token '': expected a text"),
        (["--add-token", "<M_{3..1}>"], "--add-token '<M_{3..1}>': expected a text"),
        (["--data", "nowhere.txt"], "--data nowhere.txt: no such file"),
        (["--data", "table.csv"], "--data table.csv: of .csv files no fields are read; write a .jsonl file"),
        (["--length", "4096"], "--length 4096 exceeds the context of"),
        (["--objective", "focal", "--objective", "twice", "--steps", "1"], "both replace the loss"),
        (["--objective", "meap", "--steps", "1", "--no-curves"], "MEAP needs a mask token"),
        (["--objective", "hyperfitting", "--steps", "1"], "lr_scheduler_type is SchedulerType.COSINE"),
        (["--objective", "fim", "--steps", "1", "--no-curves"], "(on this command line: --add-token TEXT)"),
        (["--objective", "emo", "--objective", "ua-clm", "--steps", "1"], "both replace the loss"),
    ],
)
def test_wrong_input_is_one_line(
    cli: Any, model_folder: Path, text: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    base = ["train", "--model", model_folder, "--data", text, "--out", tmp_path / "out", "--cpu"]
    run = cli(*base, *arguments, *([] if "--length" in arguments else ["--length", 32]))
    assert run.status == 1
    assert run.out == ""
    assert message in run.err, run.err
    assert [line for line in run.err.splitlines() if line.startswith("error: ")] == [run.err.splitlines()[-1]]
    assert not (tmp_path / "out").exists(), "the next try would be told to choose another folder"


def test_an_objective_that_needs_an_object_says_where_to_give_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = Plugin("taught", "objective", "", f"{__name__}:Taught")
    monkeypatch.setattr(plugins, "get", lambda name: plugin)
    monkeypatch.setattr(Plugin, "load", lambda self: _taught())
    with pytest.raises(CliError, match=r"taught needs a teacher, which is an object of Python.*Taught\(teacher=\.\.\."):
        train.choose(["taught"], [])


def _taught() -> Any:
    from dataclasses import dataclass

    from hf_ext.trainer_callbacks import Objective

    @dataclass(eq=False)
    class Taught(Objective):
        teacher: torch.nn.Module

    return Taught


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\nnot json\n', "line 2: no JSON"),
        ('{"txt": "a"}\n', 'line 1: expected an object with "text"'),
        ("\n", "holds no text"),
        ('{"text": "a", "completion": "b"}\n', 'line 1: "text" and "completion" both'),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(CliError, match=message):
        train_data.texts(str(file), 0)


def test_a_mark_of_byte_order_and_separators_within_strings_are_no_trouble(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('\ufeff{"text": "a\u2028b\x85c"}\r\n{"text": "d"}', encoding="utf-8")
    assert [text.completion for text in train_data.texts(str(file), 0)] == ["a\u2028b\x85c", "d"]


def test_documents_whose_prompt_fills_the_row_are_left_out_and_that_is_said(model_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    long, short = train_data.Text("xyz", prompt="abc " * 10), train_data.Text("xyz", prompt="abc")
    with pytest.warns(UserWarning, match="20 of 25 documents are left out"):
        found = train_data.rows([long] * 20 + [short] * 5, tokenizer, 32, 0.05, 0, pack=True)
    assert (len(found.train), len(found.evaluation)) == (4, 1)
    with pytest.raises(CliError, match=r"in 3 documents with nothing to train on in 32 tokens.*a larger --length"):
        train_data.rows([long] * 3, tokenizer, 32, 0.0, 0, pack=True)


def test_too_little_text_is_refused(model_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    with pytest.raises(CliError, match="the data has 6 tokens, too few for rows of 64"):
        train_data.rows([train_data.Text("hello")], tokenizer, 64, 0.1, 0, pack=True)


def test_curves_without_matplotlib_are_refused_or_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CliError, match="--curves needs matplotlib: pip install"):
        train_show.can_draw(True)
    assert train_show.can_draw(None) is False
    assert train_show.can_draw(False) is False
