"""Strategies that draft with a trained head: finding the head, and making sure that it is the target's."""

from __future__ import annotations

import copy
import dataclasses
import os
from typing import Any, ClassVar

from transformers import PreTrainedModel

from hf_ext import adapter
from hf_ext.generation.heads.base import DraftHead
from hf_ext.generation.speculative.engine import Speculative


@dataclasses.dataclass
class HeadedSpeculative(Speculative):
    """Base of speculative methods that draft with a head trained for the target.

    Args:
        head: the head, or the folder (or Hub repository) that it was saved to.

    Attributes:
        head_class: the class of head that the method drafts with.
    """

    head_class: ClassVar[type[DraftHead]]

    head: Any
    _loaded: Any = dataclasses.field(default=None, init=False, repr=False, compare=False)
    _moved: Any = dataclasses.field(default=None, init=False, repr=False, compare=False)

    def check_options(self) -> None:
        """Raise ValueError for a head that is none."""
        if not isinstance(self.head, (str, os.PathLike, self.head_class)):
            name = self.head_class.__name__
            raise ValueError(
                f"head must be a {name} or the folder of a saved one, got an object of type "
                f"{type(self.head).__name__}; train one with TrainDraftHead({name}.for_target(model))"
            )

    def head_for(self, target: PreTrainedModel) -> Any:
        """Return the head in the target's dtype and on its device; one that is loaded or moved is kept for later calls.

        Raises:
            ValueError: the folder holds another kind of head, or the head was made for another target.
        """
        if self._loaded is None or self._loaded[0] is not self.head:
            self._loaded = (self.head, self.head if isinstance(self.head, DraftHead) else self._load(self.head))
        head, device = self._loaded[1], adapter.device_of(target)
        head.check_target(target)
        if (head.device, head.dtype) == (device, target.dtype):
            return head.eval()
        # The caller's own head stays as it is, and may have been trained since.
        key = (head, device, target.dtype, sum(parameter._version for parameter in head.parameters()))
        if self._moved is None or self._moved[0] != key:
            self._moved = (key, copy.deepcopy(head).to(device=device, dtype=target.dtype).eval())
        return self._moved[1]

    def _load(self, folder: str | os.PathLike[str]) -> DraftHead:
        config_class, wanted = self.head_class.config_class, self.head_class.__name__
        try:
            found = config_class.get_config_dict(folder)[0].get("model_type")
            if found == config_class.model_type:
                return self.head_class.from_pretrained(folder)
        except OSError as error:  # what transformers raises for a folder or name without a model
            raise ValueError(f"cannot load a {wanted} from {os.fspath(folder)!r}: {error}") from error
        what = "no saved head" if found is None else f"a {found!r}"
        raise ValueError(
            f"{folder} holds {what}, but {type(self).__name__} drafts with a {config_class.model_type!r}; give the "
            f"folder that {wanted}.save_pretrained wrote, or draft_head/ in a checkpoint"
        )
