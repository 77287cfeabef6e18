"""What the evaluate metrics share."""

from __future__ import annotations

from typing import Any

import evaluate


class TextMetric(evaluate.Metric):
    """A metric of texts that refuses an empty list, on which evaluate itself fails with an IndexError."""

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> Any:
        """Compute the metric; see `evaluate.Metric.compute`.

        Raises:
            ValueError: `predictions` or `references` is given and holds no text.
        """
        for name, texts in (("predictions", predictions), ("references", references)):
            if texts is not None and len(texts) == 0:
                raise ValueError(f"{name} is empty; {self.name} of no texts is not defined")
        return super().compute(predictions=predictions, references=references, **kwargs)
