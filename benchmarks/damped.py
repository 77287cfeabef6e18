"""How a target of 300 M parameters, built from the embedded one, agrees with drafts, and what its calls cost.

    hf-ext bench damped --damping 0.5 1.0

A speculative method pays where a call of the target is bound by memory: many positions then cost
about as much as one. The embedded target fits into the processor's cache and is bound by Python
instead. `build` makes a target that is not: a stock `LlamaForCausalLM` of 315 M parameters
(1.26 GB in float32) without a download, in seconds.

    hidden      [ 192: the embedded target | 832: more width   ]
    heads       [   6: the embedded target |  26: more heads   ]
    MLP neurons [ 512: the embedded target | 3072: more neurons ]
    layers      [   6: the embedded target |  16: more layers  ]

Its shape is the usual one of a model of that size (heads of 32 aside, which the embedded target's
rotary angles fix): 22 layers, hidden 1024, an MLP 3.5 times as wide as in Llama 3. Every weight is
drawn at random like that of an untrained model, except the block in which the embedded target's
weights stand. What the other heads, neurons and layers *write* into the residual stream, and the
other columns of the embeddings, are scaled by `damping`. At 0 the model computes exactly what the
embedded target computes; the larger it is, the more the text differs, as that of a large model
differs from that of a small one which was distilled from it. Nothing is skipped whatever the
damping is: all weights are read and multiplied in every call, so the cost of a call is that of any
model of this shape. The embedded layers come first: later layers refine what earlier ones say, as
is reported of trained models, so that an early exit is a sensible draft here too.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_ext import demo
from hf_ext.cli.output import CliError, print_table, quiet
from hf_ext.demo.prompts import prompts

#: Chosen so that the embedded target, as a draft, is right about 19 times in 20; `main` measures it.
DAMPING = 0.5
HIDDEN, INTERMEDIATE, LAYERS = 1024, 3584, 22
#: Weights that write into the residual stream; tied ones read it at the end as well.
_WRITERS = ("o_proj.weight", "down_proj.weight", "embed_tokens.weight", "lm_head.weight")
#: Seed of the random weights.
SEED = 20


def build(
    damping: float = DAMPING,
    *,
    source: LlamaForCausalLM | None = None,
    hidden: int = HIDDEN,
    intermediate: int = INTERMEDIATE,
    layers: int = LAYERS,
    seed: int = SEED,
) -> LlamaForCausalLM:
    """Return a wide and deep model that behaves like a small one, up to damped disturbances.

    Args:
        damping: scale of what everything beyond the small model writes; 0 leaves it without effect.
        source: the small model; the embedded target by default.
        hidden: width of the residual stream, a multiple of the small model's head dimension and not below its width.
        intermediate: neurons of an MLP, not fewer than the small model has.
        layers: layers, not fewer than the small model has.
        seed: of the random weights.

    Returns:
        A float32 `LlamaForCausalLM` in evaluation mode.

    Raises:
        ValueError: the damping is negative, or a size is below that of the small model or does not fit its heads.

    Example:
        >>> from hf_ext.testing import tiny_models
        >>> small = tiny_models.build("llama")
        >>> big = build(0.0, source=small, hidden=64, intermediate=96, layers=5)
        >>> ids = torch.tensor([[5, 6, 7]])
        >>> bool(torch.allclose(big(ids).logits, small(ids).logits, atol=1e-4))
        True
    """
    if source is None:
        source = AutoModelForCausalLM.from_pretrained(demo.path("target"), dtype=torch.float32).eval()
    config = source.config
    if not damping >= 0:
        raise ValueError(f"damping must be a number from 0 on, got {damping!r}")
    least = {"hidden": config.hidden_size, "intermediate": config.intermediate_size, "layers": config.num_hidden_layers}
    for (name, low), value in zip(least.items(), (hidden, intermediate, layers), strict=True):
        if value < low:
            raise ValueError(f"{name} must be {low} at least, as in the small model, got {value}")
    group = config.num_attention_heads // config.num_key_value_heads
    if hidden % (config.head_dim * group):
        raise ValueError(
            f"hidden must be a multiple of {config.head_dim * group} (the small model's heads), got {hidden}"
        )
    heads = hidden // config.head_dim
    wide = LlamaConfig(**{
        **config.to_dict(), "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads // group, "dtype": "float32",
        # The mean square is taken over more columns, most of which are about 0.
        "rms_norm_eps": config.rms_norm_eps * config.hidden_size / hidden,
    })  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(wide).eval()
        for name, parameter in model.named_parameters():
            _fill(name, parameter, config.hidden_size, damping, config.initializer_range)
        _embed(model, source)
    # Neither generates an end token of its own accord unless the small model does.
    model.generation_config = copy.deepcopy(source.generation_config)
    return model


def _fill(name: str, parameter: torch.Tensor, width: int, damping: float, scale: float) -> None:
    """Draw the weights of a layer; `width` is that of the small model."""
    if name.endswith("norm.weight"):
        # The norm divides by the root mean square over all columns: this undoes that most are about 0.
        parameter.fill_((width / len(parameter)) ** 0.5)
        return
    parameter.normal_(std=scale)
    if name.endswith(_WRITERS):
        parameter.mul_(damping)


def _embed(model: LlamaForCausalLM, source: LlamaForCausalLM) -> None:
    """Copy the small model's weights into the first rows and columns of the wide one's."""
    small = dict(source.named_parameters())
    for name, parameter in model.named_parameters():
        if name not in small:
            continue  # a layer beyond those of the small model
        block = small[name]
        if name.endswith("norm.weight"):
            parameter[: len(block)] *= block
        else:
            parameter[: block.shape[0], : block.shape[1]] = block


@torch.no_grad()
def agreement(
    model: PreTrainedModel,
    draft: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    tokens: int,
    temperature: float = 0.7,
) -> dict[str, float]:
    """Return how well a draft foresees a model on the model's own continuations.

    Args:
        model: the model.
        draft: the draft.
        inputs: left-padded `input_ids` and `attention_mask` of prompts.
        tokens: length of the continuations.
        temperature: of the sampled ones.

    Returns:
        `"argmax"`: on greedy text, the share of positions at which both find the same token likeliest.
        `"overlap"`: on sampled text, the mean of the sum over tokens of min(p, q) at `temperature`, which is the
        probability that a token drafted from q is accepted.
    """
    start = inputs["input_ids"].shape[1]
    length = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    found = {}
    sampled = {"do_sample": True, "top_k": 0, "temperature": temperature}
    for name, settings in (("argmax", {"do_sample": False}), ("overlap", sampled)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            text = model.generate(**inputs, **length, **settings)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(text[:, start:])], dim=1)
        p, q = (m(text, attention_mask=mask).logits[:, start - 1 : -1] for m in (model, draft))
        if name == "argmax":
            found[name] = (p.argmax(-1) == q.argmax(-1)).float().mean().item()
        else:
            laws = ((logits / temperature).softmax(-1) for logits in (p, q))
            found[name] = torch.minimum(*laws).sum(-1).mean().item()
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Print, for each damping, how both embedded models agree with the damped one."""
    parser = argparse.ArgumentParser(prog="hf-ext bench damped", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--damping", type=float, nargs="+", default=[DAMPING])
    parser.add_argument("--prompts", type=int, default=8, help="held-out prompts, all in one batch")
    parser.add_argument("--tokens", type=int, default=48, help="new tokens of each")
    arguments = parser.parse_args(argv)
    quiet()
    tokenizer = AutoTokenizer.from_pretrained(demo.path("target"), padding_side="left")
    try:
        texts = [prompt.text for prompt in prompts(arguments.prompts, tokenizer)]
    except ValueError as error:
        raise CliError(f"--prompts {arguments.prompts}: {error}") from error
    encoded = tokenizer(texts, return_tensors="pt", padding=True)
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    drafts = {
        name: AutoModelForCausalLM.from_pretrained(demo.path(name), dtype=torch.float32).eval()
        for name in ("target", "draft")
    }
    rows = []
    for damping in arguments.damping:
        model = build(damping, source=drafts["target"])
        for name, draft in drafts.items():
            found = agreement(model, draft, inputs, arguments.tokens)
            rows.append([damping, f"embedded {name}", f"{found['argmax']:.3f}", f"{found['overlap']:.3f}"])
    print_table(["damping", "draft", "same argmax, greedy text", "sum of min(p, q), T=0.7"], rows)


if __name__ == "__main__":
    main()
