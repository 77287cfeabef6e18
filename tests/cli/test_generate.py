"""`hf-ext generate`: text and report, and a clear line for everything that cannot be done."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_ext.testing.local_hub import LocalHub

PROMPT = "def f(x):"


def reference(folder: Path, prompt: str, **arguments: Any) -> list[int]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    return model.generate(**inputs, **arguments)[0, inputs["input_ids"].shape[1] :].tolist()


def test_greedy_gives_the_tokens_of_transformers(cli: Any, model_folder: Path) -> None:
    run = cli("generate", "--model", model_folder, "--max-new-tokens", 8, "--json", PROMPT)
    assert (run.status, run.err) == (0, "")
    result = json.loads(run.out)
    assert result["tokens"] == reference(model_folder, PROMPT, max_new_tokens=8, do_sample=False)
    assert result["report"]["tokens"] == 8
    assert result["report"]["target_calls"] == 8
    assert result["report"]["target_positions"] == len(PROMPT) + 7


def test_strategy_with_options_streams_the_text_and_reports(cli: Any, model_folder: Path) -> None:
    from hf_ext.generation import ContrastiveSearch

    arguments = ["generate", "--model", model_folder, "--strategy", "contrastive-search", "--set", "top_k=3",
                 "--set", "penalty_alpha=0.8", "--max-new-tokens", 8]  # fmt: skip
    expected = reference(
        model_folder, PROMPT, max_new_tokens=8, custom_generate=ContrastiveSearch(top_k=3, penalty_alpha=0.8)
    )
    assert expected != reference(model_folder, PROMPT, max_new_tokens=8, do_sample=False), "a test that cannot fail"
    result = json.loads(cli(*arguments, "--json", PROMPT).out)
    assert result["tokens"] == expected
    run = cli(*arguments, PROMPT)
    text = AutoTokenizer.from_pretrained(model_folder).decode(expected, skip_special_tokens=True)
    assert run.out.strip() == text.strip()
    assert "ContrastiveSearch: 8 tokens" in run.err
    assert result["text"] == text


def test_text_is_streamed_token_by_token(cli: Any, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[int] = []

    class Recorder:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def put(self, value: torch.Tensor) -> None:
            pieces.append(value.numel())

        def end(self) -> None:
            pieces.append(-1)

    monkeypatch.setattr("transformers.TextStreamer", Recorder)
    for strategy in ("greedy", "contrastive-search"):
        pieces.clear()
        cli("generate", "--model", model_folder, "--strategy", strategy, "--max-new-tokens", 4, PROMPT)
        assert pieces == [len(PROMPT), 1, 1, 1, 1, -1]


def test_sampling_follows_the_seed(cli: Any, model_folder: Path) -> None:
    def tokens(*arguments: object) -> list[int]:
        shared = ("generate", "--model", model_folder, "--max-new-tokens", 8, "--json")
        return json.loads(cli(*shared, *arguments, PROMPT).out)["tokens"]

    first = tokens("--strategy", "sample", "--seed", 3)
    assert first == tokens("--strategy", "sample", "--seed", 3) == tokens("--sample", "--seed", 3)
    assert first != tokens("--strategy", "sample", "--seed", 4)
    assert cli("generate", "--model", model_folder, "--max-new-tokens", 2, "--sample", PROMPT).err.startswith("sample:")
    assert tokens("--temperature", 1e-4, "--seed", 3) == tokens()


def test_stock_decoding_takes_the_options_of_generate(cli: Any, model_folder: Path) -> None:
    shared = ("generate", "--model", model_folder, "--max-new-tokens", 8, "--json")
    run = cli(*shared, "--set", "repetition_penalty=1.7", PROMPT)
    expected = reference(model_folder, PROMPT, max_new_tokens=8, do_sample=False, repetition_penalty=1.7)
    assert json.loads(run.out)["tokens"] == expected
    run = cli(*shared, "--set", "repetition_penlty=1.7", PROMPT)
    assert run.status == 1
    assert "greedy has no option 'repetition_penlty'; did you mean 'repetition_penalty'?" in run.err


def test_prompt_from_standard_input(cli: Any, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    run = cli("generate", "--model", model_folder, "--max-new-tokens", 2, "--json", "-")
    assert json.loads(run.out)["prompt"] == PROMPT


def test_the_text_fills_the_context_and_no_more(cli: Any, model_folder: Path) -> None:
    run = cli("generate", "--model", model_folder, "--json", "x" * 60)
    assert json.loads(run.out)["report"]["tokens"] == 4
    run = cli("generate", "--model", model_folder, "--json", "--beyond-context", "--max-new-tokens", 9, "x" * 60)
    assert json.loads(run.out)["report"]["tokens"] == 9


def test_embedded_drafts_and_heads_go_by_their_names(cli: Any) -> None:
    for strategy, setting in (("speculative-decoding", "draft_model=draft"), ("kangaroo", "head=kangaroo")):
        run = cli("generate", "--strategy", strategy, "--set", setting, "--max-new-tokens", 2, PROMPT)
        assert run.status == 0, run.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strategy", "contrastive-serch", "x"], "unknown plugin 'contrastive-serch'; nearest: contrastive-search"),
        (["--strategy", "meap", "x"], "meap is of the kind objective; --strategy takes one of the kind strategy"),
        (["--strategy", "contrastive-search", "--set", "top_k=abc", "x"], "option top_k expects int, got 'abc'"),
        (
            ["--strategy", "contrastive-search", "--set", "topk=3", "x"],
            "contrastive-search has no option 'topk'; did you mean 'top_k'? it has penalty_alpha, top_k",
        ),
        (["--strategy", "contrastive-search", "--set", "top_k=0", "x"], "top_k must be"),
        ([""], "the prompt is empty; there is nothing to continue"),
        (["\udcff"], "the prompt is not valid text"),
        (["--model", "", "x"], "--model is empty"),
        (["--set", "top_k=3", "x"], "greedy: GenerationConfig is invalid: - `top_k`"),
        (["--set", "return_dict_in_generate=true", "x"], "greedy has no option 'return_dict_in_generate'"),
        (
            ["--strategy", "speculative-decoding", "--set", "draft_model=./none", "x"],
            "no such folder: './none'",
        ),
        (["--strategy", "kangaroo", "--set", "head=", "x"], "head is empty; it takes a folder"),
        (["--temperature", "0", "x"], "--temperature 0.0: expected a number above 0"),
        (["--temperature", "inf", "x"], "--temperature inf: expected a number above 0"),
        (["--dtype", "int8", "x"], "--dtype int8: expected one of auto, float32, bfloat16, float16"),
        (["--device", "warp", "x"], "--device warp: "),
        (["x" * 64], "the prompt has 64 tokens and the context of"),
        (["--max-new-tokens", "9", "x" * 60], "a prompt of 60 tokens and --max-new-tokens 9 exceed the context of"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    cli: Any, model_folder: Path, arguments: list[str], message: str
) -> None:
    run = cli("generate", "--model", model_folder, *arguments)
    assert (run.status, run.out) == (1, "")
    assert run.err.startswith(f"error: {message}"), run.err
    assert run.err.count("\n") == 1


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def damage_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def empty_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def lose_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def damage_config(folder: Path) -> None:
    (folder / "config.json").write_text("{", encoding="utf-8")


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def unknown_architecture(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "no-such-thing"}', encoding="utf-8")


def remove_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (damage_weights, "its safetensors file is damaged or incomplete"),
        (empty_weights, "cannot load the model"),
        (remove_weights, "cannot load the model"),
        (lose_a_tensor, "lack 1 tensors that its config asks for: model.norm.weight"),
        (damage_config, "cannot load the model"),
        (remove_config, "is no model folder: it holds no config.json"),
        (unknown_architecture, "cannot load the model"),
        (remove_tokenizer, "holds no tokenizer: save one there"),
    ],
)
def test_a_model_that_cannot_be_read_is_named_in_one_line(
    cli: Any, model_folder: Path, tmp_path: Path, harm: Any, message: str
) -> None:
    folder = copy(model_folder, tmp_path / "model")
    harm(folder)
    run = cli("generate", "--model", folder, "x")
    assert (run.status, run.out) == (1, "")
    assert run.err.startswith("error: "), run.err
    assert message in run.err
    assert str(folder) in run.err
    assert run.err.count("\n") == 1


def test_a_folder_that_is_not_there_and_a_file_are_named(cli: Any, tmp_path: Path) -> None:
    assert cli("generate", "--model", tmp_path / "none", "x").err == f"error: no such folder: '{tmp_path / 'none'}'\n"
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert "is a file; --model takes a folder" in cli("generate", "--model", tmp_path / "file", "x").err


def test_a_repository_that_cannot_be_had_is_one_line_at_once(
    cli: Any, model_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import HfApi, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))

    def ask(endpoint: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    with LocalHub() as hub:
        ask(hub.endpoint)
        HfApi(endpoint=hub.endpoint, token=hub.token).create_repo("user/empty")
        errors = {
            "user/none": f"user/none is neither a folder here nor a repository at {hub.endpoint}; a private one needs",
            "user/empty": f"{hub.endpoint}/user/empty is no model: it holds no config.json",
            "a b": "no such folder, and no name of a repository: 'a b'",
        }
        for name, message in errors.items():
            run = cli("generate", "--model", name, "x")
            assert (run.status, run.err.count("\n")) == (1, 1), run.err
            assert run.err.startswith(f"error: {message}")
    ask("http://127.0.0.1:1")  # where nobody answers
    drafts = "--strategy", "speculative-decoding", "--set", "draft_model=user/none"
    for arguments in (("--model", "user/none"), ("--model", model_folder, *drafts)):
        run = cli("generate", *arguments, "x")
        assert run.err.startswith(
            "error: user/none is neither a folder here nor in the local cache, and http://127.0.0.1:1 "
        )
        assert run.err.count("\n") == 1, run.err
