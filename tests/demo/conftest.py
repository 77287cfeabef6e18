import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_ext import demo


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo.path("tokenizer"))


@pytest.fixture(scope="session")
def target():
    return AutoModelForCausalLM.from_pretrained(demo.path("target"))


@pytest.fixture(scope="session")
def draft():
    return AutoModelForCausalLM.from_pretrained(demo.path("draft"))
