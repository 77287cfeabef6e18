"""Tiny models, prompts and a tokenizer for tests: no download, the same on every machine.

A weight is a function of its parameter's name, so that two releases of transformers build the same
model. The weights are large enough for distributions to be peaked, and no model has an eos token
of its own: a test that wants one says so. Needs torch and transformers only (any release from
4.55), because the script that records reference outputs runs where hf_ext does not.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from typing import Any

import torch

VOCABULARY = 96
PAD, BOS = 0, 1
WINDOW = 8
CONTEXT = 128

DECODERS = ("gpt2", "llama", "qwen3", "mistral", "gemma3", "opt")
ENCODER_DECODERS = ("t5", "bart")


def fill(model: Any, scale: float = 0.25) -> Any:
    """Give every parameter of `model` the values that belong to its name, and return it in eval mode."""
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            # Releases disagree on whether encoder and decoder share their embeddings; so both get the same.
            key = "embeddings" if name.endswith(("shared.weight", "embed_tokens.weight")) else name
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
            if parameter.ndim > 1:
                parameter.copy_(noise * scale)
            elif ("norm" in name or "ln_" in name) and name.endswith("weight"):
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(noise * 0.02)
    return model.eval()


def build(kind: str, **changes: Any) -> Any:
    """Build a fresh tiny model.

    Args:
        kind: an entry of `DECODERS` or `ENCODER_DECODERS`, or `"qwen2"`, `"gpt_oss"` (attention sinks), `"mamba"`
            (recurrent state), `"openai-gpt"` (no cache at all).
        **changes: settings of its config to change.

    Returns:
        The model in eval mode, on the CPU in float32.

    Example:
        >>> build("llama").config.vocab_size
        96
    """
    import transformers as tf

    tokens = {"vocab_size": VOCABULARY, "bos_token_id": BOS, "eos_token_id": None, "pad_token_id": PAD}
    shape = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
    }  # fmt: skip
    untied = {"tie_word_embeddings": False}  # where tied ones would repeat the last token for ever
    gpt = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
    opt = {
        "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT, "word_embed_proj_dim": 32,
    }  # fmt: skip
    bart = {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
        "max_position_embeddings": CONTEXT, "forced_eos_token_id": None, "decoder_start_token_id": BOS, **untied,
    }  # fmt: skip
    t5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": BOS}
    window = {"sliding_window": WINDOW}
    gemma = {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"], **window, **untied}
    mamba = {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}
    kinds: dict[str, tuple[str, str, dict[str, Any]]] = {
        "gpt2": ("GPT2LMHeadModel", "GPT2Config", gpt),
        "openai-gpt": ("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", gpt),
        "llama": ("LlamaForCausalLM", "LlamaConfig", shape),
        "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", shape),
        "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**shape, "head_dim": 8}),
        "mistral": ("MistralForCausalLM", "MistralConfig", {**shape, **window}),
        "gpt_oss": (
            "GptOssForCausalLM",
            "GptOssConfig",
            {**shape, **gemma, "num_local_experts": 2, "num_experts_per_tok": 1},
        ),
        "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**shape, **gemma}),
        "opt": ("OPTForCausalLM", "OPTConfig", opt),
        "t5": ("T5ForConditionalGeneration", "T5Config", t5),
        "bart": ("BartForConditionalGeneration", "BartConfig", bart),
        "mamba": ("MambaForCausalLM", "MambaConfig", mamba),
    }
    model_class, config_class, settings = kinds[kind]
    return fill(getattr(tf, model_class)(getattr(tf, config_class)(**{**tokens, **settings, **changes})))


@functools.lru_cache
def shared(kind: str) -> Any:
    """Return `build(kind)`, the same object every time; whoever changes it builds one of their own."""
    return build(kind)


def prompts(lengths: tuple[int, ...] = (12, 7, 3), seed: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `(ids, mask)` of random prompts of these lengths, left-padded to the longest.

    Example:
        >>> prompts((4, 2))[1]
        tensor([[1, 1, 1, 1],
                [0, 0, 1, 1]])
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]).long()
    return ids.where(mask.bool(), torch.tensor(PAD)), mask


def pad_left(ids: torch.Tensor, mask: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Put `columns` more columns of padding before a batch of prompts."""
    widen = functools.partial(torch.nn.functional.pad, pad=(columns, 0))
    return widen(ids, value=PAD), widen(mask, value=0)


def tokenizer() -> Any:
    """Return a tokenizer of one printable ASCII character a token, for the vocabulary of the models.

    Example:
        >>> tokenizer()("ab c").input_ids
        [68, 69, 3, 70]
    """
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<s>", "</s>"]
    vocabulary = {token: i for i, token in enumerate([*specials, *map(chr, range(32, 32 + VOCABULARY - 3))])}
    characters = Tokenizer(models.BPE(vocabulary, merges=[]))
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def calls_of(model: Any, run: Callable[[], Any]) -> tuple[Any, list[tuple[int, int]]]:
    """Run something and count, by a hook, the forward passes of `model` on the way.

    Returns:
        What `run` returned, and for each forward pass its rows and positions.
    """
    calls: list[tuple[int, int]] = []

    def note(_: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        names = ("decoder_input_ids", "inputs_embeds") if model.config.is_encoder_decoder else ("inputs_embeds",)
        given = [kwargs[name] for name in (*names, "input_ids") if kwargs.get(name) is not None]
        rows, positions = (given or [*args])[0].shape[:2]
        calls.append((rows, positions))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        return run(), calls
    finally:
        hook.remove()
