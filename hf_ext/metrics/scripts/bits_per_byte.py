"""The evaluate metric on top of `hf_ext.metrics.bits_per_byte`."""

import datasets
import evaluate

from hf_ext.metrics import base
from hf_ext.metrics.likelihood import bits_per_byte

_CITATION = """\
@article{gao2020pile,
  title={The Pile: An 800GB Dataset of Diverse Text for Language Modeling},
  author={Gao, Leo and others},
  journal={arXiv:2101.00027}, year={2020}
}"""


class BitsPerByte(base.TextMetric):
    """Bits a live model needs per UTF-8 byte of text; comparable between tokenizers.

    `predictions` are the texts; `compute` also takes `model`, `tokenizer`, `context`, `stride`,
    `start_token_id` and `batch_size`.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=BitsPerByte.__doc__,
            citation=_CITATION,
            inputs_description=bits_per_byte.__doc__,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions, model=None, tokenizer=None, **options):  # type: ignore[no-untyped-def]
        if model is None or tokenizer is None:
            raise ValueError(
                "bits per byte is measured under a live model: compute(..., model=model, tokenizer=tokenizer)"
            )
        return bits_per_byte(model, tokenizer, predictions, **options)
