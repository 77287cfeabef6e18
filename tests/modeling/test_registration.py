"""`import hf_ext` makes its architectures known to transformers, whatever is imported first."""

import sys

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import hf_ext.registration
from hf_ext import plugins
from hf_ext.modeling.swan_gpt.configuration_swan_gpt import SwanGPTConfig
from hf_ext.modeling.swan_gpt.modeling_swan_gpt import SwanGPTForCausalLM, SwanGPTModel
from hf_ext.testing.isolated import run_without

TINY = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}

ORDERS = {
    "hf_ext first": """
import hf_ext
heavy = {"torch", "transformers"} & set(sys.modules)
assert not heavy, f"import hf_ext imported {heavy}"
""",
    "transformers first": """
import transformers
transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM
import hf_ext
""",
    "the architecture first": """
from hf_ext.modeling.swan_gpt.modeling_swan_gpt import SwanGPTForCausalLM
""",
    "its configuration first": """
from hf_ext.modeling.swan_gpt.configuration_swan_gpt import SwanGPTConfig
""",
}

CHECK = """
import warnings
warnings.simplefilter("error", UserWarning)
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
config = AutoConfig.from_pretrained(sys.argv[1])
models = [auto.from_pretrained(sys.argv[1]) for auto in (AutoModel, AutoModelForCausalLM)]
models.append(AutoModelForCausalLM.from_config(config))
print(*(f"{type(x).__module__}.{type(x).__name__}" for x in (config, *models)), sep="\\n")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("swan")
    SwanGPTForCausalLM(SwanGPTConfig(**TINY)).save_pretrained(path)
    return path


@pytest.mark.parametrize("order", ORDERS)
def test_auto_classes_load_the_installed_classes_without_trusting_remote_code(order, folder, tmp_path):
    printed = run_without([], "import sys\n" + ORDERS[order] + CHECK, folder, home=tmp_path)
    assert printed.split() == [
        "hf_ext.modeling.swan_gpt.configuration_swan_gpt.SwanGPTConfig",
        "hf_ext.modeling.swan_gpt.modeling_swan_gpt.SwanGPTModel",
        "hf_ext.modeling.swan_gpt.modeling_swan_gpt.SwanGPTForCausalLM",
        "hf_ext.modeling.swan_gpt.modeling_swan_gpt.SwanGPTForCausalLM",
    ]


def test_the_installed_class_wins_over_the_code_in_the_folder(folder):
    assert (folder / "modeling_swan_gpt.py").exists()
    assert type(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)) is SwanGPTForCausalLM


def test_auto_classes_build_from_a_configuration():
    config = AutoConfig.for_model("swan_gpt", **TINY)
    assert type(config) is SwanGPTConfig
    assert type(AutoModel.from_config(config)) is SwanGPTModel
    assert type(AutoModelForCausalLM.from_config(config)) is SwanGPTForCausalLM


def test_registering_again_changes_nothing():
    finders = list(sys.meta_path)
    hf_ext.registration.register_when_ready()
    assert sys.meta_path == finders
    assert type(AutoModelForCausalLM.from_config(SwanGPTConfig(**TINY))) is SwanGPTForCausalLM


def test_an_architecture_that_cannot_be_imported_is_named_and_the_others_are_registered(monkeypatch):
    broken = plugins.Plugin(
        name="broken-model",
        kind="model",
        summary="",
        target="no_such_package.modeling_x:X",
        auto={"AutoConfig": "no_such_package.configuration_x:XConfig"},
    )
    good = plugins.get("swan-gpt")
    monkeypatch.setattr(plugins, "all", lambda kind=None: [broken, good])
    with pytest.warns(UserWarning, match=r"'broken-model' cannot load 'no_such_package.configuration_x:XConfig'"):
        hf_ext.registration.register_when_ready()
    assert type(AutoConfig.for_model("swan_gpt", **TINY)) is SwanGPTConfig
