"""Claim checks of the recurrent drafter (arXiv:2403.09919) with the embedded head."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch

from hf_ext.claims import draft_heads, held_out, speculation
from hf_ext.claims.held_out import DATA, bootstrap, mean
from hf_ext.claims.speculation import PROMPTS, tokens_per_call
from hf_ext.generation.heads.recurrent_drafter import RecurrentDrafterHead
from hf_ext.generation.recurrent_drafter import RecurrentBeamDrafter, RecurrentDrafter
from hf_ext.generation.run import DecodingRun
from hf_ext.generation.speculative.context import DraftContext
from hf_ext.generation.speculative.drafter import Drafter, Verified
from hf_ext.generation.speculative.tree import DraftTree
from hf_ext.verify import Claim, Measurement, Threshold

WIDTHS, ROWS, TOKENS = (1, 2, 4, 8, 16), 4, 24


def head() -> Any:
    """Return the embedded head."""
    return draft_heads.embedded(RecurrentDrafterHead, "recurrent-drafter")


def ours(which: Any = None, beam_width: int = 8) -> RecurrentDrafter:
    """Return the method."""
    return RecurrentDrafter(which or head(), beam_width=beam_width)


class _Noting(RecurrentDrafter):
    """The method, with a note of each draft: text, tree, and the target's logits at its nodes."""

    def drafter(self, run: DecodingRun) -> Drafter:
        drafter = super().drafter(run)
        assert isinstance(drafter, RecurrentBeamDrafter)
        self.notes: list[tuple[list[int], DraftTree, torch.Tensor]] = []
        propose, observe = drafter.propose, drafter.observe
        texts: list[list[int]] = []

        def noting_texts(context: DraftContext) -> DraftTree:
            texts[:] = [list(context.texts[0])]
            return propose(context)

        def noting(context: DraftContext, verified: Verified) -> None:
            if verified.tree.nodes:
                self.notes.append((texts[0], verified.tree, verified.logits[0]))
            observe(context, verified)

        drafter.propose, drafter.observe = noting_texts, noting  # type: ignore[method-assign]
        return drafter


@functools.cache
@torch.no_grad()
def packing() -> tuple[float, int, int]:
    """Evaluate every beam by itself as well: the largest difference of logits, merged nodes, tokens of all beams."""
    target, _ = held_out.load()
    worst, merged, separate = 0.0, 0, 0
    for prompt in held_out.prompt_ids(held_out.batch(held_out.prompts(ROWS))):
        strategy = _Noting(head())
        strategy.generate(target, torch.tensor([prompt]), do_sample=False, max_new_tokens=TOKENS)
        for text, tree, logits in strategy.notes:
            parents, tokens = tree.parents[0], tree.tokens[0].tolist()
            paths: list[list[int]] = []
            for node, parent in enumerate(parents):
                paths.append([*(paths[parent] if parent >= 0 else []), node])
            beams = [path for node, path in enumerate(paths) if node not in set(parents)]
            ids = torch.tensor([text + [tokens[node] for node in path] for path in beams])  # equally long, all of them
            plain = target(ids).logits[:, len(text) :]
            found = logits[torch.tensor(beams) + 1]
            worst = max(worst, float((plain - found).abs().max()))
            merged, separate = merged + tree.nodes, separate + sum(map(len, beams))
    return worst, merged, separate


def same_logits() -> Measurement:
    """Compare the target's logits in the merged tree with those of separate beams."""
    worst, merged, separate = packing()
    return Measurement(worst, details={"nodes of the trees": merged, "tokens of separate beams": separate})


def saved_positions() -> Measurement:
    """Count the positions of merged trees as a share of those of separate beams."""
    _, merged, separate = packing()
    return Measurement(merged / separate, details={"nodes of the trees": merged, "tokens of separate beams": separate})


def wider_beams() -> Measurement:
    """Count what each doubling of the beam adds to the tokens per call; the least is the measure."""
    found = {width: tokens_per_call(ours(beam_width=width), tokens=draft_heads.TOKENS) for width in WIDTHS}
    steps = [mean(found[b]) - mean(found[a]) for a, b in itertools.pairwise(WIDTHS)]
    whole = [b - a for a, b in zip(found[WIDTHS[0]], found[WIDTHS[-1]], strict=True)]
    low, high = bootstrap(whole)
    return Measurement(
        min(steps),
        details={
            **{f"tokens per call with {width} beams": mean(values) for width, values in found.items()},
            f"{WIDTHS[-1]} beams over one": mean(whole),
            "its 95 % bootstrap interval over prompts": f"{low:.3f} to {high:.3f}",
        },
    )


CLAIMS = (
    speculation.identity_claim(ours, "Speculative decoding with the drafter changes nothing in greedy text."),
    Claim(
        name="same-logits",
        paper="Dynamic tree attention removes shared prefixes from the beams without changing the result.",
        measures="largest difference of a logit of the target between the merged tree and separate beams",
        threshold=Threshold("<=", 1e-3),
        check=same_logits,
        seconds=45,
        data=DATA,
    ),
    Claim(
        name="fewer-positions",
        paper="Removing shared prefixes saves computation: there are fewer positions to evaluate.",
        measures="positions of merged trees, as a share of those of separate beams",
        threshold=Threshold("<=", 0.8),
        check=saved_positions,
        seconds=45,
        data=DATA,
    ),
    Claim(
        name="wider-beams",
        paper="The more beams, the more tokens are accepted.",
        measures=f"least gain in tokens per call when the beam is doubled, from 1 to {WIDTHS[-1]}; mean of "
        f"{PROMPTS} prompts, greedy",
        threshold=Threshold(">=", 0),
        check=wider_beams,
        unit="tokens per call",
        seconds=90,
        data=DATA,
    ),
    *draft_heads.head_claims(ours, head, share=0.2),
)
