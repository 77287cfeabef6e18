"""From this process to the Hub and into a process that cannot import hf_ext, with the real client on both ends."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hf_ext import hub as hub_package
from hf_ext.generation.contrastive_search import ContrastiveSearch
from hf_ext.modeling.swan_gpt.configuration_swan_gpt import SwanGPTConfig
from hf_ext.modeling.swan_gpt.modeling_swan_gpt import SwanGPTForCausalLM
from hf_ext.testing.isolated import run_without
from hf_ext.testing.local_hub import Fault, LocalHub
from hf_ext.testing.tiny_models import build, fill

PROMPT = {"input_ids": [[0, 0, 5, 6], [7, 8, 9, 10]], "attention_mask": [[0, 0, 1, 1], [1, 1, 1, 1]]}
SETTINGS = {"max_new_tokens": 12, "pad_token_id": 0, "do_sample": False}

#: Pushes a model as a user does, then with a refused token, then on a line that breaks.
PUSHER = """
import json, sys
import hf_ext
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(json.dumps({"class": type(model).__module__, "url": str(model.push_to_hub("user/swan"))}))
for kind, options in (("refused", {"token": "hf_wrong"}), ("broken", {})):
    try:
        model.push_to_hub("user/" + kind, **options)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
"""

#: Loads what was pushed, knowing transformers only.
LOADER = """
import json, sys
import torch
from transformers import AutoModelForCausalLM

try:
    import hf_ext
except ModuleNotFoundError as error:
    print(json.dumps({"hf_ext": str(error)}))

prompt, settings, local = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
prompt = {name: torch.tensor(rows) for name, rows in prompt.items()}
model = AutoModelForCausalLM.from_pretrained("user/swan", trust_remote_code=True)
print(json.dumps({"class": type(model).__module__, "ids": model.generate(**prompt, **settings).tolist()}))

for name in ("user/swan", local):
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
    remote = {"custom_generate": "user/contrastive-search", "trust_remote_code": True}
    ids = model.generate(**prompt, **settings, **remote, penalty_alpha=0.6, top_k=4)
    print(json.dumps({"ids": ids.tolist()}))

for name, trust in (("user/swan", False), ("user/corrupt", True)):
    try:
        AutoModelForCausalLM.from_pretrained(name, trust_remote_code=trust)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
print(json.dumps({"imported": sorted({name.split(".")[0] for name in sys.modules} & {"hf_ext"})}))
"""


@pytest.fixture
def models(tmp_path: Path) -> SimpleNamespace:
    """A SWAN-GPT and a Llama, and where they are saved."""
    config = SwanGPTConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, sliding_window=6,
    )  # fmt: skip
    made = SimpleNamespace(swan=fill(SwanGPTForCausalLM(config)), llama=build("llama"))
    for name, model in vars(made).items():
        model.save_pretrained(tmp_path / name)
    return made


def tokens_of(model: object, **options: object) -> list[list[int]]:
    prompt = {name: torch.tensor(rows) for name, rows in PROMPT.items()}
    return model.generate(**prompt, **SETTINGS, **options).tolist()


def test_pushed_models_and_strategies_give_the_same_tokens_in_a_process_without_hf_ext(
    hub: LocalHub, models: SimpleNamespace, tmp_path: Path
):
    home = tmp_path / "home"
    home.mkdir()
    hub.faults = [Fault("/user/broken/commit/", after=100)]
    pushed = run_without([], PUSHER, tmp_path / "swan", home=home, environment=hub.environment(), seconds=300)
    ours, refused, broken = map(json.loads, pushed.splitlines())
    assert ours["class"].startswith("hf_ext.")
    assert "401" in refused["error"]
    files = hub.files("user/swan")
    assert {"config.json", "model.safetensors", "modeling_swan_gpt.py", "configuration_swan_gpt.py"} <= set(files)
    auto_map = json.loads(files["config.json"])["auto_map"]
    assert auto_map["AutoModelForCausalLM"] == "modeling_swan_gpt.SwanGPTForCausalLM"
    with pytest.raises(KeyError):
        hub.repository("user/refused")
    assert re.search(r"(?i)reset|disconnect|broken pipe", broken["error"]), broken
    assert sorted(hub.files("user/broken")) == [".gitattributes"]

    there = {"token": hub.token, "endpoint": hub.endpoint, "check": False}
    hub_package.push("contrastive-search", "user/contrastive-search", **there)
    corrupt = hub_package.export("swan-gpt", tmp_path / "corrupt", model=tmp_path / "swan", check=False)
    weights = (corrupt / "model.safetensors").read_bytes()
    (corrupt / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    hub_package.push(corrupt, "user/corrupt", **there)

    printed = run_without(
        ["hf_ext"], LOADER, json.dumps(PROMPT), json.dumps(SETTINGS), tmp_path / "llama",
        home=home, environment=hub.environment(token=None), seconds=300,
    )  # fmt: skip
    blocked, plain, swan, llama, untrusted, corrupted, imported = map(json.loads, printed.splitlines())
    assert "No module named 'hf_ext'" in blocked["hf_ext"]
    assert imported == {"imported": []}
    assert plain["class"].startswith("transformers_modules.user.swan.")
    assert plain["ids"] == tokens_of(models.swan)
    strategy = ContrastiveSearch(penalty_alpha=0.6, top_k=4)
    assert swan["ids"] == tokens_of(models.swan, custom_generate=strategy)
    assert llama["ids"] == tokens_of(models.llama, custom_generate=strategy)
    assert llama["ids"] != tokens_of(models.llama), "the prompt does not tell contrastive from greedy search"
    assert "trust_remote_code=True" in untrusted["error"]
    assert "Error while deserializing header" in corrupted["error"]
