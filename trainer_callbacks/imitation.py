"""What an imitation learner sees: the data's steps, with slips to correct, and the model's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_ext.generation.backspace import Walks
from hf_ext.trainer_callbacks.clean_loss import as_in_evaluation


@dataclass
class Steps:
    """Steps of a batch, one an entry: in which row, from which node, which action, to which node, at what time.

    `first` is the node of every row at which the first step begins.
    """

    row: Tensor
    state: Tensor
    action: Tensor
    after: Tensor
    time: Tensor
    first: Tensor


@dataclass
class Data:
    """Rows of the data as trees: a chain of tokens, and slips that hang from it.

    Args:
        tokens: (rows, columns) ids.
        positions: (rows, columns) depths.
        visible: (rows, columns, columns) bool; all nodes see themselves.
        steps: what the data does.
    """

    tokens: Tensor
    positions: Tensor
    visible: Tensor
    steps: Steps

    def padded(self, columns: int) -> Data:
        """Return the same with further columns that nothing sees."""
        more = columns - self.tokens.shape[1]
        pad = torch.nn.functional.pad
        visible = pad(self.visible, (0, more, 0, more))
        visible |= torch.eye(columns, dtype=torch.bool, device=visible.device)
        return Data(pad(self.tokens, (0, more)), pad(self.positions, (0, more)), visible, self.steps)


def with_slips(
    inputs: Mapping[str, Any],
    slips: tuple[Tensor, Tensor] | None,
    words: Tensor,
    positions: Tensor,
    backspace: int | None,
) -> Data:
    """Lay out a batch with random tokens behind some states, whose right action is the backspace.

    Args:
        inputs: `input_ids` and `labels` (rows, length), and `attention_mask` if there is padding.
        slips: (rows, length) bool, where a token may be preceded by a slip, and numbers in [0, 1)
            that choose the slip; None for no slips.
        words: ids that slips are chosen from.
        positions: (rows, length), -1 on padding.
        backspace: id of the action that deletes.

    Example:
        >>> batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[-100, 6, 7]])}
        >>> where = torch.tensor([[False, False, True]]), torch.zeros(1, 3)
        >>> data = with_slips(batch, where, torch.tensor([8]), torch.arange(3)[None], backspace=9)
        >>> data.tokens.tolist(), data.visible[0, 3].int().tolist()
        ([[5, 6, 7, 8]], [1, 1, 0, 1])
        >>> data.steps.state.tolist(), data.steps.action.tolist(), data.steps.after.tolist()
        ([0, 1, 3], [6, 7, 9], [1, 2, 1])
    """
    ids, labels = inputs["input_ids"], inputs["labels"]
    device = ids.device
    rows, length = ids.shape
    mask = inputs.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    place = torch.arange(length, device=device)
    target = torch.zeros_like(real)
    target[:, 1:] = (labels[:, 1:] != -100) & real[:, 1:] & real[:, :-1]  # its state is the token before it
    time = (target.long().cumsum(-1) - 1).clamp_min(0)
    nowhere = torch.where(real, place, -1).amax(-1)  # a row without targets is continued from its end
    first = torch.where(target.any(-1), target.long().argmax(-1) - 1, nowhere)
    visible = real[:, None, :] & (place <= place[:, None])
    visible = visible | torch.eye(length, dtype=torch.bool, device=device)
    row, column = target.nonzero(as_tuple=True)
    steps = Steps(row, column - 1, labels[row, column], column, time[row, column], first)
    positions = positions.clamp_min(0)
    if slips is None:
        return Data(ids, positions, visible, steps)
    where, number = slips
    row, column = (where & target).nonzero(as_tuple=True)
    slot = (where & target).long().cumsum(-1)[row, column] - 1
    wide = int(slot.max()) + 1 if len(slot) else 0
    words = words.to(device)
    tokens = torch.cat((ids, ids.new_zeros(rows, wide)), 1)
    depths = torch.cat((positions, positions.new_zeros(rows, wide)), 1)
    seen = torch.nn.functional.pad(visible, (0, wide, 0, wide))
    node = length + slot
    tokens[row, node] = words[(number[row, column] * len(words)).long()]
    depths[row, node] = positions[row, column - 1] + 1
    seen[row, node] = seen[row, column - 1]
    seen |= torch.eye(length + wide, dtype=torch.bool, device=device)
    more = Steps(
        row, node, torch.full_like(row, -1 if backspace is None else backspace), column - 1, time[row, column], first
    )
    joined = Steps(
        torch.cat((steps.row, more.row)),
        torch.cat((steps.state, more.state)),
        torch.cat((steps.action, more.action)),
        torch.cat((steps.after, more.after)),
        torch.cat((steps.time, more.time)),
        first,
    )
    return Data(tokens, depths, seen, joined)


@dataclass
class Walker:
    """Lets a model continue prompts, backspaces included, and may use what it wrote again for a while.

    Args:
        backspace: id of the action that deletes, or None.
        ends: ids that end a text.
        actions: how many actions are sampled.
        replay: for how many optimizer steps a row's actions are used again.
    """

    backspace: int | None
    ends: tuple[int, ...]
    actions: int
    replay: int = 0
    _kept: dict[tuple[int, ...], tuple[int, list[int]]] = field(default_factory=dict, repr=False)

    def walk(
        self, trainer: Any, model: nn.Module, inputs: Mapping[str, Any], first: Tensor, draws: Tensor, step: int
    ) -> tuple[Walks, Tensor]:
        """Continue every row from its first state.

        Args:
            trainer: the Trainer, which knows how the model is wrapped.
            model: what its step got.
            inputs: the batch.
            first: (rows,) column of the last token of each prompt.
            draws: (rows, actions) numbers in [0, 1).
            step: the optimizer step.

        Returns:
            The walks, and (rows, actions) bool, which actions were done before the text had ended.
        """
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        columns = int(first.max()) + 1
        place = torch.arange(columns, device=ids.device)
        real = place <= first[:, None]
        if mask is not None:
            real &= mask[:, :columns].bool()
        sharded = str(trainer.accelerator.distributed_type).rpartition(".")[2] in ("FSDP", "DEEPSPEED")
        if self.replay and sharded:
            raise ValueError(
                "replay lets processes sample at different steps, which a sharded model cannot; set replay=0"
            )
        whole = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        keys = [tuple(row[keep].tolist()) for row, keep in zip(ids, whole, strict=True)] if self.replay else []
        known = [self._kept.get(key) for key in keys]
        fresh = [found is not None and step - found[0] < self.replay for found in known]
        walks = Walks.of(ids[:, :columns], real, self.actions)
        if keys and all(fresh):
            stored = torch.tensor([found[1] for found in known if found is not None], device=ids.device)
            for action in stored.unbind(1):
                walks.act(action, self.backspace)
        else:
            bare = model if sharded else trainer.accelerator.unwrap_model(model)
            with torch.no_grad(), as_in_evaluation(bare):
                self._sample(model if sharded else bare, walks, real, draws)
            for key, actions in zip(keys, walks.actions.tolist() if keys else [], strict=True):
                self._kept[key] = step, actions
        over = torch.isin(walks.actions, torch.tensor(self.ends, device=ids.device)) if self.ends else walks.actions < 0
        alive = torch.ones_like(over)
        alive[:, 1:] = over[:, :-1].long().cumsum(-1) == 0
        return walks, alive

    def _sample(self, model: nn.Module, walks: Walks, real: Tensor, draws: Tensor) -> None:
        """Draw one action after another; after a backspace, the last token left is read again, its old copy hidden."""
        rows = torch.arange(len(real), device=real.device)
        prompt = real.shape[1]
        seen = real.long()
        outputs = model(
            input_ids=walks.tokens[:, :prompt],
            attention_mask=seen,
            position_ids=walks.positions[:, :prompt],
            use_cache=True,
        )
        logits = outputs.logits[rows, walks.root]
        copies = torch.arange(walks.tokens.shape[1], device=real.device).expand(len(rows), -1).clone()
        for number in range(self.actions):
            law = logits.double().softmax(-1).cumsum(-1)
            chosen = torch.searchsorted(law, draws[:, number, None].double() * law[:, -1:], right=True)
            action = chosen[:, 0].clamp_max(logits.shape[-1] - 1)
            before = walks.states[:, number]
            walks.act(action, self.backspace)
            if number + 1 == self.actions:
                return
            now = walks.states[:, number + 1]
            column = seen.shape[1]
            back = torch.zeros_like(now, dtype=torch.bool) if self.backspace is None else action == self.backspace
            seen = torch.cat((seen, torch.ones_like(seen[:, :1])), 1)
            # the deleted token, and the copy of the last one left that is read again
            for gone in (before, now):
                old = copies[rows, gone]
                seen[rows, old] = torch.where(back, 0, seen[rows, old])
            seen[:, column] = 1
            copies[rows, now] = column
            outputs = model(
                input_ids=walks.tokens[rows, now][:, None],
                attention_mask=seen,
                position_ids=walks.positions[rows, now][:, None],
                past_key_values=outputs.past_key_values,
                use_cache=True,
            )
            logits = outputs.logits[:, -1]
