"""The cache policies of this package, as the host lists them. Imports no torch."""

from hf_ext.plugins import Plugin

PLUGINS: tuple[Plugin, ...] = (
    Plugin(
        name="knorm",
        kind="cache",
        summary="Keep the keys of the smallest norm; looks at nothing but keys.",
        target="hf_ext.cache.policies.knorm:Knorm",
        paper="A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression (arXiv:2406.11430)",
        example="model.generate(**inputs, past_key_values=CompressedCache(model.config, Knorm(budget=0.5)))",
    ),
    Plugin(
        name="streaming-llm",
        kind="cache",
        summary="Keep the first tokens, which are sinks of attention, and the last ones.",
        target="hf_ext.cache.policies.streaming_llm:StreamingLLM",
        paper="Efficient Streaming Language Models with Attention Sinks (arXiv:2309.17453)",
        example="model.generate(**inputs, past_key_values=CompressedCache(model.config, StreamingLLM(budget=512)))",
    ),
)
