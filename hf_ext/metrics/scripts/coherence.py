"""The evaluate metric on top of `hf_ext.metrics.coherence`."""

import datasets
import evaluate

from hf_ext.metrics import base
from hf_ext.metrics.likelihood import coherence

_CITATION = """\
@article{su2022contrastive_search,
  title={Contrastive Search Is What You Need For Neural Text Generation},
  author={Su, Yixuan and Collier, Nigel},
  journal={arXiv:2210.14140}, year={2022}
}"""


class Coherence(base.TextMetric):
    """Mean log-likelihood per token of continuations given their prompts, under a live model.

    `predictions` are the continuations, `references` the prompts, as strings or token ids;
    `compute` also takes `model`, `tokenizer` and `batch_size`.
    """

    def _info(self) -> evaluate.MetricInfo:
        text, ids = datasets.Value("string"), datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=Coherence.__doc__,
            citation=_CITATION,
            inputs_description=coherence.__doc__,
            features=[
                datasets.Features({"predictions": text, "references": text}),
                datasets.Features({"predictions": ids, "references": ids}),
            ],
        )

    def _compute(self, predictions, references, model=None, tokenizer=None, batch_size=8):  # type: ignore[no-untyped-def]
        if model is None:
            raise ValueError("coherence is measured under a live model: compute(..., model=model, tokenizer=tokenizer)")
        return coherence(model, references, predictions, tokenizer=tokenizer, batch_size=batch_size)
