"""Tiny MetaLMs, and what their tests share."""

from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from hf_ext.modeling.metalm.modeling_metalm import MetaLMForCausalLM
from hf_ext.testing.tiny_models import VOCABULARY, build

ENCODER = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 12, "initializer_range": 0.3,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4, "num_channels": 1, "initializer_range": 0.3, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def docked(kind: str = "llama", vision: bool = False, text: bool = True) -> MetaLMForCausalLM:
    """A tiny decoder with tiny encoders, all with weights large enough for mistakes to show."""
    torch.manual_seed(0)
    parts = {"encoder": BertModel(BertConfig(**ENCODER)) if text else None}
    parts["vision_encoder"] = ViTModel(ViTConfig(**VISION)) if vision else None
    model = MetaLMForCausalLM.from_parts(decoder=build(kind), **parts)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "connector" in name:
                weight.normal_(std=0.3)
    return model.eval()


def ids(rows: int = 2, length: int = 14, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


SPANS = torch.tensor([[[2, 5], [8, 12]], [[1, 9], [-1, -1]]])


def by_hand(model: MetaLMForCausalLM, row: torch.Tensor, spans: list[tuple[int, int]]) -> torch.Tensor:
    """The input of the language model, span by span without a batch."""
    embeds = model.get_input_embeddings()(row[None]).clone()
    for start, end in spans:
        embeds[:, start:end] = model.connector(model.encoder(input_ids=row[None, start:end]).last_hidden_state)
    return embeds


def encodings(model, run):
    """Return what `run` returns, and how many spans the encoder read on the way."""
    rows = []
    hook = model.encoder.register_forward_pre_hook(
        lambda _, args, kw: rows.append(len(kw["input_ids"])), with_kwargs=True
    )
    try:
        return run(), rows
    finally:
        hook.remove()


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    return SimpleNamespace(
        docked=docked, ids=ids, by_hand=by_hand, encodings=encodings, SPANS=SPANS, ENCODER=ENCODER, TOLERANCE=2e-5
    )
