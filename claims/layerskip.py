"""Claim checks of LayerSkip (arXiv:2404.16710): the embedded target with adapters trained by `LayerSkipTraining`."""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from hf_ext import demo
from hf_ext.claims import held_out, speculation
from hf_ext.claims.held_out import DATA, bootstrap, mean
from hf_ext.claims.speculation import PROMPTS, TOKENS, tokens_per_call, tokens_per_step
from hf_ext.generation import LayerSkip
from hf_ext.layers import only_layers
from hf_ext.verify import Claim, Measurement, Threshold

EXIT, GAMMA = 3, 3


@functools.cache
def trained() -> Any:
    """Return the embedded target with the adapters of LayerSkip's training merged in."""
    target = AutoModelForCausalLM.from_pretrained(demo.path("target"), dtype=torch.float32)
    return PeftModel.from_pretrained(target, demo.path("layerskip")).merge_and_unload().eval()


def ours() -> LayerSkip:
    """Return the method at the exit that the figures are of."""
    return LayerSkip(exit_layer=EXIT, draft_tokens=GAMMA)


@torch.no_grad()
def agreements(model: Any) -> list[float]:
    """Return for every prompt and its continuation how often the exit's likeliest token is the model's."""
    found = []
    for prompt in held_out.prompts(PROMPTS):
        ids = held_out.load()[1](prompt.text + prompt.reference, return_tensors="pt").input_ids[:, :256]
        whole = model(ids).logits.argmax(-1)
        with only_layers(model, 0, EXIT):
            early = model(ids).logits.argmax(-1)
        found.append(float((whole == early).float().mean()))
    return found


def exit_gain() -> Measurement:
    """Compare the exit's agreement with the whole model, trained and untrained."""
    after, before = agreements(trained()), agreements(held_out.load()[0])
    gain = [a - b for a, b in zip(after, before, strict=True)]
    return Measurement(
        mean(gain), spread=bootstrap(gain), spread_of=f"95 % bootstrap interval over {PROMPTS} texts",
        details={"trained": mean(after), "untrained": mean(before)},
    )  # fmt: skip


def trained_tokens_per_call() -> list[float]:
    """Return tokens per whole call of the trained model, prompt by prompt."""
    inputs = held_out.batch(held_out.prompts(PROMPTS))
    strategy = ours()
    strategy.generate(trained(), **inputs, do_sample=False, max_new_tokens=TOKENS, min_new_tokens=TOKENS)
    assert strategy.report is not None  # set by the call above
    return tokens_per_step(strategy.report.details)


def tokens_gain() -> Measurement:
    """Compare what a call of the whole model yields, trained and untrained."""
    after, before = trained_tokens_per_call(), tokens_per_call(ours())
    gain = [a - b for a, b in zip(after, before, strict=True)]
    return Measurement(
        mean(gain), spread=bootstrap(gain), spread_of=f"95 % bootstrap interval over {PROMPTS} prompts",
        details={"trained": mean(after), "untrained": mean(before)},
    )  # fmt: skip


def shared_compute() -> Measurement:
    """Count how often a layer evaluates a position, with hooks, against drafting with a model of its own."""
    model, _ = held_out.load()
    inputs = held_out.batch(held_out.prompts(4))
    evaluated = [0] * len(model.model.layers)

    def count(at: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            evaluated[at] += kwargs["hidden_states"].shape[1] * kwargs["hidden_states"].shape[0]

        return hook

    strategy = ours()
    strategy.generate(model, **inputs, do_sample=False, max_new_tokens=2)  # the model is asked once whether it can
    hooks = [
        layer.self_attn.register_forward_hook(count(i), with_kwargs=True) for i, layer in enumerate(model.model.layers)
    ]
    strategy.generate(model, **inputs, do_sample=False, max_new_tokens=48, min_new_tokens=48)
    for hook in hooks:
        hook.remove()
    return Measurement(
        evaluated[0] / evaluated[-1],
        details={"positions of a first layer": evaluated[0], "of a last layer": evaluated[-1]},
    )


CLAIMS = (
    speculation.identity_claim(ours, "Verification by the remaining layers makes the output that of the whole model."),
    Claim(
        name="early-exit-agreement",
        paper="Layer dropout and the early exit loss make early exits predict better (sections 4.1 and 4.2).",
        measures=f"share of places where the exit after {EXIT} of 6 layers agrees with the model, gained by training",
        threshold=Threshold(">", 0),
        check=exit_gain,
        seconds=15,
        data=DATA,
    ),
    Claim(
        name="tokens-per-call",
        paper="So more of what the early exit drafts is accepted.",
        measures=f"tokens per pass of the deep layers gained by training, greedy, {GAMMA} tokens drafted",
        threshold=Threshold(">", 0),
        check=tokens_gain,
        unit="tokens per pass",
        seconds=40,
        data=DATA,
    ),
    Claim(
        name="shared-compute",
        paper="Draft and verification share activations and cache, so no layer runs twice for a token (section 4.3).",
        measures="positions that a first layer evaluates over those of a last layer, prompts included",
        threshold=Threshold("==", 1),
        check=shared_compute,
        seconds=15,
        data=DATA,
    ),
)
