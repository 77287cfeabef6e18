"""The conformance suite of objectives, run on what this package ships and on the other kinds of hook."""

from hf_ext.testing.objective import ObjectiveConformance
from hf_ext.trainer_callbacks import MEAP


class TestMEAP(ObjectiveConformance):
    objective = MEAP
    options = {"mask_ratio": 0.3, "mask_token_id": 3}
    null_options = {"mask_ratio": 0.0, "mask_token_id": 3}
