"""Train many objectives in one `accelerate launch` of two processes, and load what they saved without `hf_ext`.

Starting processes is the slow part, so one launch trains everything that is to be checked: first with DDP, then with
FSDP2, a model after the other. Each conformance class says what to train; the launched processes find it again by
its file and its name.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from hf_ext.testing.objective_processes import DESCENT, finish, free_port, start, with_lora
from hf_ext.testing.objective_training import largest_difference, logged, weights

#: How the two processes share the work, in the order in which they are tried: FSDP changes accelerate's state.
MODES = ("ddp", "fsdp")
#: FSDP on LoRA adapters, with the rest of the model frozen: for some of the cases, see `launch`.
ADAPTERS = "fsdp-lora"
#: Weights and losses of two processes and of one differ by roundings only.
TOLERANCE = 1e-5

WITHOUT_HF_EXT = """
import json, sys
sys.modules["hf_ext"] = None  # importing it raises from here on
import torch, transformers
for folder in json.loads(sys.argv[1]):
    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0]).from_pretrained(folder).eval()
    tokens = torch.arange(4, 20)[None]
    inputs = {"decoder_input_ids": tokens} if config.is_encoder_decoder else {}
    with torch.no_grad():
        torch.save(model(tokens, **inputs).logits, folder + "/logits.pt")
"""


@dataclasses.dataclass(frozen=True)
class Case:
    """A conformance class, as another process finds it.

    Args:
        file: the Python file that defines the class at its top level.
        name: of the class.
    """

    file: str
    name: str

    @classmethod
    def of(cls, suite: type) -> Case:
        """Say where a class is defined.

        Raises:
            ValueError: it is not at the top level of a file, where another process could find it.
        """
        if "<locals>" in suite.__qualname__ or suite.__module__ == "__main__":
            raise ValueError(f"{suite.__qualname__} must stand at the top level of a test file: two processes load it")
        return cls(inspect.getfile(suite), suite.__qualname__)

    @property
    def id(self) -> str:
        """Name of the case's files: `test_meap-TestMEAP`."""
        return f"{Path(self.file).stem}-{self.name}"

    def load(self) -> Any:
        """Return an instance of the class."""
        return getattr(module_of(self.file), self.name)()


def module_of(file: str | Path) -> Any:
    """Import a Python file under a name of its own, once."""
    name = f"conformance_of_{Path(file).stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise ImportError(f"{file} is no Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up while they are defined
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def suites_in(files: Iterable[Path], *bases: type, but: type | None = None) -> list[type]:
    """Return the conformance classes that test files define at their top level, in order.

    Args:
        files: those that name none of the bases are not imported.
        *bases: of the classes.
        but: leave out subclasses of this one.
    """
    found = []
    for file in sorted(files):
        text = file.read_text(encoding="utf-8")
        if not any(base.__name__ in text for base in bases):
            continue
        module = module_of(file)
        for value in vars(module).values():
            mine = isinstance(value, type) and issubclass(value, bases) and value.__module__ == module.__name__
            if mine and value.__name__.startswith("Test") and not (but and issubclass(value, but)):
                found.append(value)
    return found


class Sharded(Trainer):
    """A Trainer under FSDP2 on CPUs.

    accelerate ignores its FSDP plugin where there is no accelerator, although torch's `fully_shard` works over gloo.
    Telling accelerate's state what the distributed type is makes it run the code that it runs on GPUs.
    """

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, and switch FSDP on in its state."""
        from accelerate.state import PartialState
        from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

        super().create_accelerator_and_postprocess()
        PartialState().distributed_type = DistributedType.FSDP  # each AcceleratorState copies it
        self.accelerator.state.distributed_type = DistributedType.FSDP
        self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        self.is_fsdp_enabled = True


def launch(cases: Sequence[Case], folder: Path, adapters: Sequence[Case] = ()) -> None:
    """Train every case in two processes under `accelerate launch --cpu`; see `results` for what comes out.

    On CPUs accelerate starts one process and leaves the others to MPI, which sets a rank for each.
    Here every rank gets a launcher of its own with the same variables, so that no MPI is needed.

    Args:
        cases: to train in each of `MODES`.
        folder: for the results.
        adapters: to train as `ADAPTERS`, too.
    """
    runs = [(case, mode) for mode in MODES for case in cases] + [(case, ADAPTERS) for case in adapters]
    job = {"runs": [(*dataclasses.astuple(case), mode) for case, mode in runs], "folder": str(folder)}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1"]
    command += ["--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={free_port()}"]
    command += ["-m", __name__, json.dumps(job)]
    ranks = [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"} for rank in (0, 1)
    ]
    running = [start(command, rank) for rank in ranks]
    for process in running:
        finish(process, seconds=300 + 15 * len(runs))


def results(case: Case, mode: str, folder: Path) -> list[dict[str, Any]]:
    """Return what the two processes saved of a case: `weights`, `loss` and the plain loss, or an `error`."""
    return [torch.load(folder / f"{case.id}-{mode}-{rank}.pt", weights_only=True) for rank in (0, 1)]


def compare(suite: Any, mode: str, folder: Path) -> None:
    """Assert that two processes trained what one process does, or refused as the suite says.

    Args:
        suite: an instance of a conformance class.
        mode: one of `MODES`, or `ADAPTERS`.
        folder: where `launch` left its results.
    """
    case = Case.of(type(suite))
    found = results(case, mode, folder)
    errors = [part.get("error") for part in found]
    if (expected := suite.refused.get(mode)) is not None:
        import re

        assert all(error and re.search(expected, error) for error in errors), f"expected a refusal, got {errors}"
        return
    assert errors == [None, None], f"under {mode} it failed: {found[0].get('trace') or found[1].get('trace')}"
    model = with_lora(suite.model()) if mode == ADAPTERS else suite.model()
    trainer = suite.run(model, suite.make(), **DESCENT)
    alone = weights(model)
    between = largest_difference(found[0]["weights"], found[1]["weights"])
    assert between == 0, f"under {mode} the processes' weights differ by up to {between:.3g}"
    difference = largest_difference(found[0]["weights"], alone)
    assert difference <= TOLERANCE, f"two processes under {mode} and one differ by up to {difference:.3g}"
    for name in ("loss", suite.plain_loss):
        here, there = logged(trainer, name), found[0][name]
        assert len(here) == len(there), f"{name} is logged {len(there)} times under {mode}, {len(here)} times by one"
        worst = max((abs(a - b) for a, b in zip(here, there, strict=True)), default=0.0)
        assert worst <= TOLERANCE, f"{name} under {mode} is {there}, in one process {here}"
    saved = load_saved(suite, mode, folder / f"{case.id}-{mode}")
    difference = largest_difference(weights(saved), alone)
    assert difference <= TOLERANCE, f"the model saved under {mode} differs from one process by up to {difference:.3g}"


def load_saved(suite: Any, mode: str, folder: Path) -> nn.Module:
    """Load what the Trainer saved; adapters onto the model that they were trained on."""
    if mode != ADAPTERS:
        return type(suite.model()).from_pretrained(folder)
    from peft import PeftModel

    return PeftModel.from_pretrained(suite.model(), folder)


def save_trained(suite: Any, folder: Path) -> torch.Tensor:
    """Train in this process, save the model as the Trainer does, and return its logits on some tokens."""
    model = suite.model()
    trainer = suite.run(model, suite.make())
    trainer.save_model(str(folder))
    tokens = torch.arange(4, 20)[None]
    inputs = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(tokens, **inputs).logits


def load_without_hf_ext(folders: Sequence[Path]) -> list[torch.Tensor]:
    """Load saved models in one process that cannot import `hf_ext`, and return their logits on the same tokens."""
    command = [sys.executable, "-c", WITHOUT_HF_EXT, json.dumps([str(folder) for folder in folders])]
    finish(start(command, {}), seconds=300)
    return [torch.load(folder / "logits.pt", weights_only=True) for folder in folders]


def gathered(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copy a model's parameters, whole where they are sharded. Every process must call it."""
    return {
        name: value.full_tensor().detach().clone() if hasattr(value, "full_tensor") else value.detach().clone()
        for name, value in model.named_parameters()
    }


def _train(case: Case, mode: str, folder: Path) -> dict[str, Any]:
    """Train one case in one of two processes, 4 rows each."""
    sharded: dict[str, Any] = {"trainer_class": Sharded, "fsdp": True, "fsdp_config": {"version": 2}}
    suite = case.load()
    model = with_lora(suite.model()) if mode == ADAPTERS else suite.model()
    trainer = suite.run(
        model,
        suite.make(),
        per_device_train_batch_size=4,
        ddp_timeout=180,
        **DESCENT,
        **({} if mode == "ddp" else sharded),
    )
    if trainer.args.world_size != 2 or trainer.is_fsdp_enabled == (mode == "ddp"):
        raise RuntimeError(f"expected two processes under {mode}, got {trainer.accelerator.state!r}")
    trainer.save_model(str(folder / f"{case.id}-{mode}"))
    found = gathered(trainer.model)
    return {"weights": found} | {name: logged(trainer, name) for name in ("loss", suite.plain_loss)}


def main(argument: str) -> None:
    """Train all cases of a job in one of two processes, and save what came out."""
    job = json.loads(argument)
    folder, rank = Path(job["folder"]), int(os.environ["RANK"])
    for file, name, mode in job["runs"]:
        case = Case(file, name)
        try:
            found = _train(case, mode, folder)
        except Exception as error:  # the others are to be trained all the same; the parent reports it
            found = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        torch.save(found, folder / f"{case.id}-{mode}-{rank}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
