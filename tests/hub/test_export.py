"""`export` writes whole repositories that load without the plugin's package, or nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import LlamaConfig, LlamaForCausalLM, dynamic_module_utils

from hf_ext import adapter, hub, plugins
from hf_ext.generation.contrastive_search import ContrastiveSearch
from hf_ext.hub import ExportError, exporting
from hf_ext.hub.cards import argument_docs
from hf_ext.hub.code import check_as_loader_reads
from hf_ext.hub.exporting import check_loads
from hf_ext.modeling.swan_gpt.configuration_swan_gpt import SwanGPTConfig
from hf_ext.modeling.swan_gpt.modeling_swan_gpt import SwanGPTForCausalLM
from hf_ext.testing.tiny_models import build


@pytest.fixture
def swan() -> SwanGPTForCausalLM:
    torch.manual_seed(0)
    config = SwanGPTConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, global_every=2, sliding_window=8,
    )  # fmt: skip
    return SwanGPTForCausalLM(config).eval()


def everything_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_an_exported_strategy_is_complete_and_has_the_card_the_hub_expects(tmp_path: Path):
    folder = hub.export("contrastive-search", tmp_path / "out", check=False, repo_id="me/cs")
    assert folder == tmp_path / "out"
    files = everything_in(folder)
    assert {"README.md", "custom_generate/generate.py", "custom_generate/requirements.txt"} <= set(files)
    assert all(name == "README.md" or name.startswith("custom_generate/") for name in files)
    card = ModelCard((folder / "README.md").read_text())
    assert "custom_generate" in card.data.tags
    headings = ["Base model", "Model compatibility", "Additional Arguments", "Output Type changes", "Example usage"]
    assert [line[3:] for line in card.text.splitlines() if line[3:] in headings] == headings
    assert "| `penalty_alpha` | `float` | `0.6` |" in card.text
    assert '    custom_generate="me/cs",' in card.text
    assert "    penalty_alpha=0.6,\n    top_k=4,\n    max_new_tokens=64,\n" in card.text
    needed = (folder / "custom_generate" / "requirements.txt").read_text().split()
    assert {line.split(">=")[0] for line in needed} == {"torch", "transformers"}
    assert all(">=" in line for line in needed)
    for path in (folder / "custom_generate").glob("*.py"):
        check_as_loader_reads(path)
        assert "hf_ext" not in {name.split(".")[0] for name in dynamic_module_utils.get_imports(path)}
        assert not [line for line in path.read_text().splitlines() if line.startswith(("from hf_ext", "import hf_ext"))]


@pytest.mark.parametrize("name", [plugin.name for plugin in plugins.all() if plugin.kind in ("strategy", "model")])
def test_every_strategy_and_architecture_can_be_exported(tmp_path: Path, name: str):
    folder = hub.export(name, tmp_path / "out", check=False)
    for path in folder.rglob("*.py"):
        relative, packages = adapter.remote_code_imports(path)
        assert not packages & {"hf_ext", "accelerate", "peft", "triton"}, path
        assert all((path.parent / f"{module}.py").is_file() for module in relative), path


def test_the_exported_strategy_decodes_as_the_installed_one_and_its_own_top_k_wins(tmp_path: Path):
    folder = str(hub.export("contrastive-search", tmp_path / "out", check=False))
    model = build("llama")
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    common = {"attention_mask": (ids != 0).long(), "max_new_tokens": 12, "pad_token_id": 0}
    expected = ContrastiveSearch(penalty_alpha=0.6, top_k=4).generate(model, ids, **common)
    remote = {"custom_generate": folder, "trust_remote_code": True}
    found = model.generate(ids, penalty_alpha=0.6, top_k=4, **remote, **common)
    assert (found == expected).all(), f"{int((found != expected).sum())} tokens differ"
    greedy = model.generate(ids, do_sample=False, **common)
    assert (expected != greedy).any(), "the prompt does not tell contrastive from greedy search"
    assert (model.generate(ids, penalty_alpha=0.6, top_k=1, **remote, **common) == greedy).all()
    with pytest.raises(ValueError, match="top_k must be a positive int"):
        model.generate(ids, top_k=0, **remote, **common)
    with pytest.raises(ValueError, match="trust_remote_code"):
        model.generate(ids, custom_generate=folder, trust_remote_code=False, **common)


def test_a_model_loaded_from_a_repository_with_the_strategy_decodes_with_it(tmp_path: Path):
    folder = hub.export("contrastive-search", tmp_path / "out", check=False)
    build("llama").save_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, trust_remote_code=True)
    ids = torch.tensor([[7, 8, 9, 10]])
    common = {"max_new_tokens": 12, "pad_token_id": 0}
    expected = ContrastiveSearch(penalty_alpha=0.5, top_k=3).generate(build("llama"), ids, **common)
    assert (model.generate(ids, penalty_alpha=0.5, top_k=3, **common) == expected).all()


def test_options_are_told_from_the_arguments_of_generate_by_the_fields_of_the_dataclass(tmp_path: Path, toy_plugin):
    toy_plugin()
    folder = hub.export("repeat", tmp_path / "out", check=False)
    model, ids = build("gpt2"), torch.tensor([[3, 4]])
    remote = {"custom_generate": str(folder), "trust_remote_code": True}
    assert model.generate(ids, **remote, times=1, top_k=9, max_new_tokens=2).tolist() == [[3, 4, 4, 4]]
    assert model.journal == [(1, 9, None, None, ["max_new_tokens"])]
    assert model.generate(ids, **remote, eos_token_id=5).tolist() == [[3, 4, 4, 4, 4, 4]]
    assert model.journal[1] == (2, None, None, None, ["eos_token_id"])
    model.generate(ids, **remote, tokenizer="t")  # an option and an argument that the strategy's generate names
    assert model.journal[2] == (2, None, "t", "t", [])


def test_an_exported_architecture_loads_without_hf_ext_with_the_same_weights(tmp_path: Path, swan):
    folder = hub.export("swan-gpt", tmp_path / "out", model=swan)  # check=True loads it in a process of its own
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForCausalLM"] == "modeling_swan_gpt.SwanGPTForCausalLM"
    assert auto_map["AutoConfig"] == "configuration_swan_gpt.SwanGPTConfig"
    source = Path(__file__).parents[2] / "modeling" / "swan_gpt"
    assert (folder / "modeling_swan_gpt.py").read_text() == (source / "modeling_swan_gpt.py").read_text()
    card = ModelCard((folder / "README.md").read_text())
    assert "trust_remote_code=True" in card.text
    assert card.data.license is None, "nobody told the licence of these weights"
    assert "The code is under apache-2.0" in card.text
    assert "model-index" not in card.content, "the results are those of other weights"
    again = SwanGPTForCausalLM.from_pretrained(folder)
    for name, tensor in swan.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    second = hub.export("swan-gpt", tmp_path / "second", model=folder, check=False)
    assert everything_in(second) == everything_in(folder)
    assert (second / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_without_a_checkpoint_a_small_architecture_with_fresh_weights_is_written(tmp_path: Path):
    one = hub.export("swan-gpt", tmp_path / "one", check=False)
    two = hub.export("swan-gpt", tmp_path / "two", check=False)
    assert SwanGPTForCausalLM.from_pretrained(one).num_parameters() < 1_000_000
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


def test_a_checkpoint_that_is_corrupt_or_of_another_architecture_is_refused_and_nothing_is_written(tmp_path, swan):
    broken = hub.export("swan-gpt", tmp_path / "broken", model=swan, check=False)
    weights = (broken / "model.safetensors").read_bytes()
    for damaged in (weights[: len(weights) // 2], b"\xff" * 64, b""):
        (broken / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ExportError, match=r"cannot read the checkpoint in .*broken: ") as error:
            hub.export("swan-gpt", tmp_path / "out", model=broken)
        assert "\n" not in str(error.value)
    (broken / "config.json").write_text("{")
    with pytest.raises(ExportError, match="cannot read the checkpoint"):
        hub.export("swan-gpt", tmp_path / "out", model=broken)
    build("llama").save_pretrained(tmp_path / "llama")
    with pytest.raises(ExportError, match="a model of type 'llama', expected 'swan_gpt'"):
        hub.export("swan-gpt", tmp_path / "out", model=tmp_path / "llama")
    with pytest.raises(ExportError, match="is a LlamaForCausalLM, expected"):
        hub.export("swan-gpt", tmp_path / "out", model=LlamaForCausalLM(LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)))  # fmt: skip
    with pytest.raises(ExportError, match="no folder with a checkpoint"):
        hub.export("swan-gpt", tmp_path / "out", model=tmp_path / "absent")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "llama"]


def test_a_folder_with_files_is_left_alone_unless_it_is_an_export_and_overwriting_is_asked_for(tmp_path, monkeypatch):
    target = tmp_path / "out"
    target.mkdir()
    hub.export("contrastive-search", target, check=False)  # an empty folder is fine
    (target / "mine.txt").write_text("x")
    with pytest.raises(ExportError, match=r"not empty; .* overwrite=True"):
        hub.export("contrastive-search", target, check=False)
    assert (target / "mine.txt").exists()
    hub.export("contrastive-search", target, check=False, overwrite=True)
    assert not (target / "mine.txt").exists()
    assert (target / "README.md").exists()

    other = tmp_path / "other"
    other.mkdir()
    for name in ("thesis.txt", "config.json", "README.md"):  # the last two look like a trained checkpoint
        (other / name).write_text("x")
        with pytest.raises(ExportError, match="something other than an earlier export"):
            hub.export("contrastive-search", other, check=False, overwrite=True)
    (target / ".git").mkdir()
    with pytest.raises(ExportError, match="git checkout"):
        hub.export("contrastive-search", target, check=False, overwrite=True)
    with pytest.raises(ExportError, match="it is a file"):
        hub.export("contrastive-search", other / "thesis.txt", check=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ExportError, match="current folder"):
        hub.export("contrastive-search", ".", check=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "other", "out"]


def test_a_failure_on_the_way_leaves_neither_a_folder_nor_scraps(tmp_path: Path, toy_plugin: Callable[..., object]):
    toy_plugin(tools="from {package} import deep\n")
    with pytest.raises(ExportError, match="deep is a package"):
        hub.export("repeat", tmp_path / "new" / "out")
    assert everything_in(tmp_path / "new") == []
    kept = hub.export("contrastive-search", tmp_path / "new" / "out", check=False)
    before = everything_in(kept)
    with pytest.raises(ExportError, match="deep is a package"):
        hub.export("repeat", kept, overwrite=True)
    assert everything_in(kept) == before
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


def test_the_check_fails_for_code_that_needs_hf_ext_although_it_is_installed_here(tmp_path: Path):
    folder = tmp_path / "out"
    (folder / "custom_generate").mkdir(parents=True)
    (folder / "custom_generate" / "generate.py").write_text("from hf_ext.plugins import get as generate\n")
    with pytest.raises(ExportError, match=r"does not load: .*not found in your environment: hf_ext") as error:
        check_loads(plugins.get("contrastive-search"), folder)
    assert "\n" not in str(error.value)


def test_a_check_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(plugin: plugins.Plugin, folder: Path) -> None:
        assert (folder / "README.md").is_file()
        raise ExportError("it does not load")

    monkeypatch.setattr(exporting, "check_loads", fail)
    with pytest.raises(ExportError, match="it does not load"):
        hub.export("contrastive-search", tmp_path / "out")
    assert everything_in(tmp_path) == []


def test_plugins_that_are_no_repository_say_what_to_do_instead(tmp_path: Path, toy_plugin: Callable[..., object]):
    with pytest.raises(ExportError, match=r"trainer\.push_to_hub\(\)"):
        hub.export("meap", tmp_path / "out")
    toy_plugin(kind="cache")
    with pytest.raises(ExportError, match=r"past_key_values="):
        hub.export("repeat", tmp_path / "out")
    toy_plugin(kind="metric")
    with pytest.raises(ExportError, match="only strategies and models"):
        hub.export("repeat", tmp_path / "out")
    with pytest.raises(plugins.PluginError, match="nearest: contrastive-search"):
        hub.export("contrastive-serach", tmp_path / "out")
    with pytest.raises(ExportError, match="holds code only"):
        hub.export("contrastive-search", tmp_path / "out", model=tmp_path)
    assert not list(tmp_path.glob("out*"))


def test_a_class_that_is_no_strategy_is_refused(tmp_path: Path, toy_plugin: Callable[..., object]):
    toy_plugin(strategy="class Repeat:\n    pass\n")
    with pytest.raises(ExportError, match="expected a dataclass that derives from"):
        hub.export("repeat", tmp_path / "out")


def test_options_are_documented_from_their_docstring(tmp_path: Path, toy_plugin: Callable[..., object]):
    toy_plugin()
    card = (hub.export("repeat", tmp_path / "out", check=False) / "README.md").read_text()
    assert "| `times` | `int` | `2` | how often the last token is repeated. |" in card
    assert "| `top_k` | `int \\| None` | `None` | has the name of a setting of generate. |" in card
    assert argument_docs("No arguments.") == {}
