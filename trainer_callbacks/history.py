"""An earlier version of the model that trains: its weights as they were, or their moving average."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerState, TrainingArguments

from hf_ext.trainer_callbacks.starting_weights import starting_weights


class History:
    """Weights that were, to run the model with.

    Only weights that train are copied, so for LoRA the history is the base model with its adapters as they
    began, at the price of a copy of the adapters. A run that resumes finds them again: the fixed ones beside
    the checkpoints, a moving average in each checkpoint.

    Args:
        name: names the files.
        model: the model that trains, unwrapped.
        args: the Trainer's arguments.
        state: the Trainer's state.
        decay: share of itself that the average keeps at each `update`; 1 stays at the beginning.

    Raises:
        ValueError: the weights are sharded.
    """

    def __init__(
        self, name: str, model: nn.Module, args: TrainingArguments, state: TrainerState, decay: float = 1.0
    ) -> None:
        trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
        sharded = any(isinstance(value, DTensor) or hasattr(value, "ds_id") for value in trained.values())
        if sharded or "FullyShardedDataParallel" in {type(module).__name__ for module in model.modules()}:
            raise ValueError(
                f"{name} keeps a copy of the trained weights to run the model as it was, which does not work with "
                "weights that FSDP or DeepSpeed shard. Give it the earlier model itself: history=AutoModelForCausalLM."
                "from_pretrained(...)."
            )
        self._model, self._decay, self._file = model, decay, f"{name}-history.safetensors"
        self.weights: dict[str, Tensor]
        if decay == 1:
            self.weights = starting_weights(name, lambda: trained, args, state)
        else:
            self.weights = self._averages(name, trained, args, state)
        places = {key: value.device for key, value in trained.items()}
        self.weights = {key: value.to(places[key]) for key, value in self.weights.items()}

    def _averages(
        self, name: str, trained: Mapping[str, Tensor], args: TrainingArguments, state: TrainerState
    ) -> dict[str, Tensor]:
        noted = (state.stateful_callbacks or {}).get(name)
        if state.stateful_callbacks is not None:
            here = str(Path(args.output_dir).resolve())
            state.stateful_callbacks[name] = {"args": {}, "attributes": {"folder": here}}  # type: ignore[index]
        if not state.global_step:
            return {key: value.detach().clone() for key, value in trained.items()}
        path = Path(noted["attributes"]["folder"], f"checkpoint-{state.global_step}", self._file) if noted else None
        if path is None or not path.is_file():
            raise FileNotFoundError(
                f"{name} averages the weights of all steps and cannot find the average of step {state.global_step}"
                + (f" at {path}" if path else "")
                + ": put the file back, or begin anew instead of resuming."
            )
        return load_file(path)

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights as they are now."""
        if self._decay == 1:
            return
        now = dict(self._model.named_parameters())
        for key, value in self.weights.items():
            value.lerp_(now[key].to(value.dtype), 1 - self._decay)

    def save(self, folder: Path) -> None:
        """Write the average into a checkpoint; fixed weights lie beside the checkpoints already."""
        if self._decay != 1:
            save_file({key: value.contiguous() for key, value in self.weights.items()}, folder / self._file)
