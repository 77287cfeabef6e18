"""Contrastive search (arXiv:2202.06417 eq. 5; arXiv:2210.14140)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import normalize
from transformers.utils import ModelOutput

from hf_ext import adapter
from hf_ext.generation.run import DecodingRun
from hf_ext.generation.strategy import DecodingStrategy, positive, share


def contrastive_choice(
    probabilities: torch.Tensor, candidates: torch.Tensor, context: torch.Tensor, mask: torch.Tensor, alpha: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the candidate of highest `(1 - alpha) p(v) - alpha max_j cos(h_v, h_j)` in every row.

    Args:
        probabilities: `(batch, k)` model confidence in each candidate.
        candidates: `(batch, k, width)` hidden state of each candidate, of any length.
        context: `(batch, length, width)` hidden states of the tokens before, of length one.
        mask: `(batch, length)` true where there is a token.
        alpha: weight of the degeneration penalty, 0 to 1.

    Returns:
        `(batch,)` index of the choice and `(batch,)` its degeneration penalty.

    Example:
        >>> h = torch.eye(2)[None]  # the second candidate says something new
        >>> contrastive_choice(torch.tensor([[0.6, 0.4]]), h, h[:, :1], torch.ones(1, 1).bool(), 0.6)[0]
        tensor([1])
    """
    similarity = normalize(candidates, dim=-1) @ context.transpose(1, 2)
    penalty = similarity.masked_fill(~mask[:, None], -torch.inf).amax(-1)
    choice = ((1 - alpha) * probabilities - alpha * penalty).argmax(-1)
    return choice, penalty.gather(1, choice[:, None])[:, 0]


@dataclass
class ContrastiveSearch(DecodingStrategy):
    """Among the `top_k` likeliest tokens, take the one least similar to what was already said.

    Deterministic. One forward pass of `top_k` candidates a token; the prompt is run once and
    the cache is widened and narrowed once a step. `isotropy` tells whether a model suits it.

    Args:
        penalty_alpha: weight of the penalty against the probability, 0 to 1; 0 is greedy search.
        top_k: candidates a step; 1 is greedy search.

    Raises:
        ValueError: options out of range, `do_sample=True`, beams, a cache that already holds
            tokens (their hidden states are gone), or one whose rows cannot be repeated.

    Source:
        "A Contrastive Framework for Neural Text Generation" (arXiv:2202.06417), equation 5.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2, pad_token_id=0, eos_token_id=31)
        >>> model = LlamaForCausalLM(config).eval()
        >>> strategy = ContrastiveSearch(penalty_alpha=0.6, top_k=4)
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> model.generate(ids, custom_generate=strategy, min_new_tokens=4, max_new_tokens=4).shape
        torch.Size([1, 7])
        >>> strategy.report.tokens
        4
    """

    penalty_alpha: float = 0.6
    top_k: int = 4

    samples: ClassVar[bool] = False

    def check_options(self) -> None:
        """Check that `penalty_alpha` is a share and `top_k` a positive integer."""
        share("penalty_alpha", self.penalty_alpha)
        positive("top_k", self.top_k)

    def decode(self, run: DecodingRun) -> None:
        """Recall `top_k` candidates, look one token ahead of each, keep the best."""
        if run.cache is not None and run.cache.get_seq_length() > 0:
            raise ValueError(
                "ContrastiveSearch compares new tokens with the hidden states of the whole prompt, which a filled "
                "past_key_values no longer has; pass the whole prompt with an empty cache"
            )
        if run.config.prefill_chunk_size is not None:
            raise ValueError("ContrastiveSearch needs the prompt's hidden states at once; leave out prefill_chunk_size")
        outputs = run.prefill(output_hidden_states=True)
        if problem := adapter.row_editing_problem(run.cache):
            raise ValueError(f"ContrastiveSearch has to repeat and select rows of the cache, but {problem}")
        k = min(self.top_k, outputs.logits.shape[-1])
        batch = len(run.input_ids)
        first_rows = torch.arange(batch, device=run.input_ids.device) * k

        logits = outputs.logits[:, -1]
        context = normalize(run.last_hidden_state(outputs), dim=-1)
        mask = torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)
        if context.shape[1] == run.attention_mask.shape[1]:  # not so for prompts given as embeddings without a mask
            mask = run.attention_mask.bool().to(context.device)
        # Candidates of a row share its mask and positions; only the cache differs between them.
        run.model_kwargs = adapter.expand_kwargs(run.model, run.model_kwargs, k)
        rewind = adapter.CacheRewind(run.cache, needed=run.cache_outlives_call)
        penalties = []

        while run.running:
            scores = run.process(logits)
            probabilities, candidates = scores.softmax(-1).topk(k)

            run.cache.batch_repeat_interleave(k)
            ahead = run.forward(candidates.view(-1, 1), output_hidden_states=True)
            states = run.last_hidden_state(ahead)[:, -1].view(batch, k, -1)
            choice, penalty = contrastive_choice(
                probabilities.to(states.device), states, context, mask, self.penalty_alpha
            )
            rows = first_rows + choice.to(first_rows.device)
            run.cache.batch_select_indices(rows)

            run.commit(
                candidates.gather(1, choice[:, None].to(candidates.device))[:, 0],
                scores=scores,
                logits=logits,
                outputs=outputs,
            )
            penalties.append(penalty.mean())
            outputs = select_rows(ahead, rows)
            logits = ahead.logits[rows, -1]
            chosen = normalize(states[torch.arange(batch, device=states.device), choice.to(states.device)], dim=-1)
            context = torch.cat([context, chosen[:, None]], dim=1)
            mask = torch.cat([mask, mask.new_ones(batch, 1)], dim=1)
            # The cache has looked one token further than a caller who goes on from it expects.
            rewind.step(last=not run.any_unfinished)

        rewind.finish()
        run.report.details["mean_penalty"] = float(torch.stack(penalties).mean()) if penalties else 0.0


def select_rows(outputs: ModelOutput, rows: torch.Tensor) -> ModelOutput:
    """Return the chosen rows of the states and attentions of a forward pass."""
    per_layer = ("hidden_states", "attentions", "decoder_hidden_states", "decoder_attentions", "cross_attentions")
    return ModelOutput(
        {name: tuple(layer[rows] for layer in outputs[name]) for name in per_layer if outputs.get(name) is not None}
    )
