"""Claim checks of Draft & Verify (arXiv:2309.08168) with the embedded target, and with idle layers added to it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import LlamaForCausalLM

from hf_ext.claims import held_out, speculation
from hf_ext.claims.held_out import DATA, bootstrap, mean
from hf_ext.claims.speculation import tokens_per_step
from hf_ext.generation import DraftAndVerify
from hf_ext.verify import Claim, Measurement, Threshold

EXTRA, DAMPING, ROWS, TOKENS = 6, 0.05, 12, 48


@functools.cache
def deeper() -> Any:
    """Return the embedded target with `EXTRA` random layers behind its own that hardly change its states."""
    model, _ = held_out.load()
    config = model.config.__class__(
        **{**model.config.to_dict(), "num_hidden_layers": model.config.num_hidden_layers + EXTRA, "layer_types": None}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        larger = LlamaForCausalLM(config).eval()
    larger.load_state_dict(model.state_dict(), strict=False)
    own = model.model.layers[-1]
    with torch.no_grad():
        for layer in larger.model.layers[-EXTRA:]:
            for name, weight in layer.named_parameters():
                known = own.get_parameter(name)
                if weight.ndim > 1:
                    damped = DAMPING if name.startswith(("self_attn.o_proj", "mlp.down_proj")) else 1.0
                    weight.copy_(
                        torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * known.std() * damped
                    )
                else:
                    weight.copy_(known)
    return larger


@functools.cache
def found() -> tuple[str, ...]:
    """Return the parts that the search leaves out of the deeper model, on prompts that are not measured."""
    inputs = held_out.batch(held_out.prompts(24)[::4])
    return DraftAndVerify.search(deeper(), **inputs, trials=100, draft_tokens=4)


def idle_share() -> Measurement:
    """Look where the parts that were left out stand."""
    first = held_out.load()[0].config.num_hidden_layers
    idle = [name for name in found() if int(name.split(".")[1]) >= first]
    return Measurement(len(idle) / (2 * EXTRA), details={"left out": list(found()), "idle parts": 2 * EXTRA})


def run(skip: tuple[str, ...] | None, **options: Any) -> list[float]:
    """Return tokens per call of the deeper model for prompts that the search has not seen."""
    inputs = held_out.batch(held_out.prompts(24)[1::2])
    strategy = DraftAndVerify(skip, draft_tokens=4, **options)
    strategy.generate(deeper(), **inputs, do_sample=False, max_new_tokens=TOKENS, min_new_tokens=TOKENS)
    assert strategy.report is not None  # set by the call above
    return tokens_per_step(strategy.report.details)


def search_gain() -> Measurement:
    """Compare the parts that were found with leaving out every second layer."""
    ours, plain = run(found(), confidence=0.0, acceptance=None), run(None, confidence=0.0, acceptance=None)
    gain = [a - b for a, b in zip(ours, plain, strict=True)]
    return Measurement(
        mean(gain), spread=bootstrap(gain), spread_of=f"95 % bootstrap interval over {ROWS} prompts",
        details={"parts that were found": mean(ours), "every second layer": mean(plain)},
    )  # fmt: skip


def accepted_share(**options: Any) -> list[float]:
    """Return for every prompt the share of drafted tokens that was accepted, one row at a time."""
    shares = []
    for prompt in held_out.prompts(ROWS):
        strategy = DraftAndVerify(("attention.4", "mlp.4"), draft_tokens=6, **options)
        strategy.generate(
            held_out.load()[0],
            **held_out.batch([prompt]),
            do_sample=False,
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
        )
        assert strategy.report is not None  # set by the call above
        shares.append(strategy.report.accepted / max(strategy.report.details["drafted"], 1))
    return shares


def threshold_gain() -> Measurement:
    """Compare the adaptive threshold with drafting to the full length."""
    adaptive, fixed = accepted_share(), accepted_share(confidence=0.0, acceptance=None)
    gain = [a - b for a, b in zip(adaptive, fixed, strict=True)]
    return Measurement(
        mean(gain), spread=bootstrap(gain), spread_of=f"95 % bootstrap interval over {ROWS} prompts",
        details={"adaptive threshold": mean(adaptive), "none": mean(fixed), "aimed at": DraftAndVerify().acceptance},
    )  # fmt: skip


def on_the_embedded_target() -> Measurement:
    """Search on the embedded target itself, whose six layers are all busy."""
    inputs = held_out.batch(held_out.prompts(12))
    left_out = DraftAndVerify.search(held_out.load()[0], **inputs, trials=80)
    return Measurement(len(left_out), details={"left out": list(left_out)})


CLAIMS = (
    speculation.identity_claim(
        lambda: DraftAndVerify(("attention.4", "mlp.4")), "The output is identical to that of the unaltered model."
    ),
    Claim(
        name="search",
        paper="A search on little text finds the layers that drafting can do without (section 3.2).",
        measures=f"share of the parts of {EXTRA} added, nearly idle layers that the search leaves out",
        threshold=Threshold(">=", 0.75),
        check=idle_share,
        seconds=60,
        data=DATA,
    ),
    Claim(
        name="search-gain",
        paper="Which layers are left out matters (section 4).",
        measures="tokens per call with the parts that were found, less those with every second layer left out",
        threshold=Threshold(">", 0),
        check=search_gain,
        unit="tokens per call",
        seconds=90,
        data=DATA,
    ),
    Claim(
        name="adaptive-threshold",
        paper="The adaptive draft-exit threshold avoids drafting tokens that will be rejected (section 3.3).",
        measures="share of drafted tokens that is accepted, gained by the threshold (layer 5 of 6 left out)",
        threshold=Threshold(">", 0),
        check=threshold_gain,
        seconds=60,
        data=DATA,
    ),
    Claim(
        name="small-models",
        paper="The layers of a model of 13 or 70 billion parameters are redundant.",
        measures="parts that can be left out of the embedded target's six layers at a predicted gain",
        threshold=None,
        check=on_the_embedded_target,
        unit="parts of 12",
        seconds=40,
        data=DATA,
    ),
)
