"""Model contract, part 2: saving, loading, and loading where the package is not installed."""

# ruff: noqa: D102 (the name of a test says what it shows)
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.dynamic_module_utils import check_imports, get_relative_import_files

from hf_ext.testing.isolated import run_without
from hf_ext.testing.model_base import ContractBase, assert_close

_RELOAD = """
import torch, transformers
folder, result, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
given = torch.load(result)
with torch.no_grad():
    logits = model(given["ids"]).logits
    tokens = model.generate(given["ids"], max_new_tokens=4, do_sample=False)
torch.save({"logits": logits, "tokens": tokens}, result)
assert not Blocker.blocked.intersection(name.partition(".")[0] for name in sys.modules)
"""


def largest_weight_difference(first: PreTrainedModel, second: PreTrainedModel) -> float:
    """Return the largest difference of two models' weights; infinity when names, shapes or dtypes differ."""
    one, other = first.state_dict(), second.state_dict()
    if {n: (w.shape, w.dtype) for n, w in one.items()} != {n: (w.shape, w.dtype) for n, w in other.items()}:
        return float("inf")
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


class StorageContract(ContractBase):
    """A saved model is the same model everywhere."""

    @torch.no_grad()
    def test_saving_and_loading_keeps_every_bit(self, tmp_path: Path) -> None:
        model, ids = self.make_model(), self.tokens()
        model.save_pretrained(tmp_path)
        assert list(tmp_path.glob("*.safetensors")), (
            f"no safetensors among {sorted(p.name for p in tmp_path.iterdir())}"
        )
        loaded = self.model_class.from_pretrained(tmp_path)
        difference = largest_weight_difference(model, loaded)
        assert difference == 0, f"weights differ by up to {difference:.3g} after loading"
        assert_close(loaded(ids).logits, model(ids).logits, 0.0, "logits before saving and after loading")

    @pytest.mark.parametrize("tied", [True, False])
    def test_embeddings_are_tied_after_loading_exactly_when_configured(self, tmp_path: Path, tied: bool) -> None:
        self.make_model(tie_word_embeddings=tied).save_pretrained(tmp_path)
        loaded = self.model_class.from_pretrained(tmp_path)
        with torch.no_grad():
            loaded.get_input_embeddings().weight.add_(1.0)
        difference = (loaded.get_input_embeddings().weight - loaded.get_output_embeddings().weight).abs().max().item()
        assert (difference == 0) == tied, (
            f"tie_word_embeddings={tied}, but after changing the input embedding the output embedding differs by "
            f"{difference:.3g}"
        )

    def test_configuration_survives_a_round_trip(self, tmp_path: Path) -> None:
        config = self.config()
        config.save_pretrained(tmp_path)
        before, after = config.to_dict(), type(config).from_pretrained(tmp_path).to_dict()
        changed = {
            key: (before.get(key), after.get(key)) for key in {*before, *after} if before.get(key) != after.get(key)
        }
        assert not changed, f"saving and loading changed (before, after): {changed}"

    def test_wrong_options_are_refused_with_their_name(self) -> None:
        assert self.invalid_options, "set invalid_options: which configurations must be refused, and with what message"
        for options, message in self.invalid_options:
            with pytest.raises(Exception, match=message):  # transformers' own checks raise several types
                self.model_class(self.config(**options))

    @torch.no_grad()
    def test_saved_folder_loads_where_the_package_is_not_installed(self, tmp_path: Path) -> None:
        model, ids = self.make_model(), self.tokens(batch=1)
        folder, home, result = tmp_path / "model", tmp_path / "home", tmp_path / "result.pt"
        home.mkdir()
        model.save_pretrained(folder)
        code = sorted(folder.glob("*.py"))
        for file in code:  # transformers' own checks of code from the Hub
            check_imports(file)
            missing = [name for name in get_relative_import_files(file) if not Path(name).exists()]
            assert not missing, f"{file.name} imports {missing}, which the saved folder lacks"
        torch.save({"ids": ids}, result)
        run_without(self.blocked_packages, _RELOAD, folder, result, str(torch.get_num_threads()), home=home)
        there = torch.load(result)
        assert_close(there["logits"], model(ids).logits, 0.0, "logits here and in a process without the package")
        tokens = model.generate(ids, max_new_tokens=4, do_sample=False)
        assert torch.equal(there["tokens"], tokens), f"generated there {there['tokens']}, here {tokens}"

    def test_saved_folder_loads_through_the_auto_class(self, tmp_path: Path) -> None:
        model = self.make_model()
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(loaded) is self.model_class, f"AutoModelForCausalLM loaded a {type(loaded)}"
