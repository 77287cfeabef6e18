"""Claim checks of hidden transfer (arXiv:2404.12022) with the embedded head."""

from __future__ import annotations

from typing import Any

from hf_ext.claims import draft_heads, held_out, speculation
from hf_ext.claims.held_out import DATA, bootstrap, mean
from hf_ext.claims.speculation import PROMPTS, tokens_per_call
from hf_ext.generation.heads.hidden_transfer import HiddenTransferHead
from hf_ext.generation.hidden_transfer import HiddenTransfer
from hf_ext.verify import Claim, Measurement, Threshold

SIZES = ((1, 3), (4, 8), (8, 16))


def head() -> Any:
    """Return the embedded head."""
    return draft_heads.embedded(HiddenTransferHead, "hidden-transfer")


def ours(which: Any = None, width: int = 4, nodes: int = 8) -> HiddenTransfer:
    """Return the method."""
    return HiddenTransfer(which or head(), width=width, nodes=nodes)


def one_pass() -> Measurement:
    """Count tokens per call; and draft calls, of which there are none."""
    strategy = ours()
    found = tokens_per_call(strategy, tokens=draft_heads.TOKENS)
    report = strategy.report
    assert report is not None  # set by the call above
    return Measurement(
        mean(found), spread=bootstrap(found), spread_of=f"95 % bootstrap interval over {PROMPTS} prompts",
        details={"draft calls": report.draft_calls, "mean accepted tokens": report.details["mean_accepted"]},
    )  # fmt: skip


def tree_gain() -> Measurement:
    """Compare a tree with a chain of the same pseudo tokens."""
    found = {size: tokens_per_call(ours(None, *size), tokens=draft_heads.TOKENS) for size in SIZES}
    gain = [b - a for a, b in zip(found[SIZES[0]], found[SIZES[1]], strict=True)]
    layers = held_out.load()[0].config.num_hidden_layers
    return Measurement(
        mean(gain), spread=bootstrap(gain), spread_of=f"95 % bootstrap interval over {PROMPTS} prompts",
        details={
            "layers of the target": layers, "transferred after": str(head().config.transfer_layers),
            **{f"tokens per call, {nodes} nodes, {width} candidates a place": mean(values)
               for (width, nodes), values in found.items()},
        },
    )  # fmt: skip


CLAIMS = (
    speculation.identity_claim(ours, "Hidden transfer is lossless."),
    Claim(
        name="several-tokens-a-pass",
        paper="Several tokens are decoded in a single forward pass, without any other model.",
        measures="tokens per call of the target, greedy, without a draft call",
        threshold=Threshold(">", 1.2),
        check=one_pass,
        unit="tokens per call",
        seconds=25,
        data=DATA,
    ),
    Claim(
        name="tree",
        paper="Tree attention generates and verifies several candidate sequences at once, which improves efficiency.",
        measures="more tokens per call of the target with a tree of 8 nodes than with a chain, greedy",
        threshold=Threshold(">", 0),
        check=tree_gain,
        unit="tokens per call",
        seconds=70,
        data=DATA,
    ),
    *draft_heads.head_claims(ours, head, share=0.05),
)
