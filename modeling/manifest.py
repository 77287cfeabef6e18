"""The architectures of this package, as the host lists them. Imports no torch."""

from hf_ext.plugins import Plugin

PLUGINS = (
    Plugin(
        name="metalm",
        kind="model",
        summary="Any causal language model that reads chosen spans of its input, or images, through bidirectional "
        "encoders docked to it; trained with spans drawn at random by the stock Trainer.",
        target="hf_ext.modeling.metalm.modeling_metalm:MetaLMForCausalLM",
        paper="Language Models are General-Purpose Interfaces (arXiv:2206.06336)",
        covers=("metalm",),
        auto={
            "AutoConfig": "hf_ext.modeling.metalm.configuration_metalm:MetaLMConfig",
            "AutoModelForCausalLM": "hf_ext.modeling.metalm.modeling_metalm:MetaLMForCausalLM",
        },
        claims="hf_ext.claims.metalm:CLAIMS",
        example="model = MetaLMForCausalLM.from_parts(encoder, decoder); model.generate(**inputs, spans=spans)",
    ),
    Plugin(
        name="swan-gpt",
        kind="model",
        summary="Decoder that keeps working beyond its training length: layers without positions between "
        "sliding-window rotary layers; converts from Llama checkpoints.",
        target="hf_ext.modeling.swan_gpt.modeling_swan_gpt:SwanGPTForCausalLM",
        paper="SWAN-GPT: An Efficient and Scalable Approach for Long-Context Language Modeling (arXiv:2504.08719)",
        covers=("swan-gpt",),
        auto={
            "AutoConfig": "hf_ext.modeling.swan_gpt.configuration_swan_gpt:SwanGPTConfig",
            "AutoModel": "hf_ext.modeling.swan_gpt.modeling_swan_gpt:SwanGPTModel",
            "AutoModelForCausalLM": "hf_ext.modeling.swan_gpt.modeling_swan_gpt:SwanGPTForCausalLM",
        },
        claims="hf_ext.claims.swan_gpt:CLAIMS",
        example='AutoModelForCausalLM.from_pretrained("user/swan-gpt", trust_remote_code=True)',
    ),
)
