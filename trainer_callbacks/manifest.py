"""The training objectives of this package, as the host lists them. Imports no torch."""

from hf_ext.plugins import Plugin

PLUGINS = (
    Plugin(
        name="meap",
        kind="objective",
        summary="Next-token prediction on inputs of which a share is masked, meant to teach a model to retrieve.",
        target="hf_ext.trainer_callbacks.meap:MEAP",
        paper="Mask-Enhanced Autoregressive Prediction: Pay Less Attention to Learn More (arXiv:2502.07490)",
        covers=("meap",),
        claims="hf_ext.claims.meap:CLAIMS",
        example="Trainer(model, args, train_dataset=data, callbacks=[MEAP(mask_ratio=0.15)]).train()",
    ),
)
