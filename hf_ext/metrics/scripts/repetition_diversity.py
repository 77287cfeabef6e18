"""The evaluate metric on top of `hf_ext.metrics.repetition_diversity`."""

import datasets
import evaluate

from hf_ext.metrics import base
from hf_ext.metrics.repetition import repetition_diversity, words

_CITATION = """\
@inproceedings{su2022contrastive,
  title={A Contrastive Framework for Neural Text Generation},
  author={Su, Yixuan and Lan, Tian and Wang, Yan and Yogatama, Dani and Kong, Lingpeng and Collier, Nigel},
  booktitle={NeurIPS}, year={2022}
}"""


class RepetitionDiversity(base.TextMetric):
    """Repetition (rep-n, seq-rep-4) and diversity (distinct-n, Zipf exponent) of texts."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=RepetitionDiversity.__doc__,
            citation=_CITATION,
            inputs_description=repetition_diversity.__doc__,
            features=[
                datasets.Features({"predictions": datasets.Value("string")}),
                datasets.Features({"predictions": datasets.Sequence(datasets.Value("int64"))}),
            ],
        )

    def _compute(self, predictions, orders=(2, 3, 4), tokenize=words):  # type: ignore[no-untyped-def]
        return repetition_diversity(predictions, orders=orders, tokenize=tokenize)
