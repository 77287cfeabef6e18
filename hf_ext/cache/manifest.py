"""The cache policies of this package, as the host lists them. Imports no torch."""

from hf_ext.plugins import Plugin

PLUGINS: tuple[Plugin, ...] = (
    Plugin(
        name="adakv",
        kind="cache",
        summary="Share a layer's budget among its heads, by the scores of any other policy.",
        target="hf_ext.cache.policies.adakv:AdaKV",
        paper="Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation (arXiv:2407.11550)",
        example="policy = AdaKV(policy=SnapKV(budget=0.25))\n"
        "model.generate(**inputs, past_key_values=CompressedCache(model.config, policy))",
    ),
    Plugin(
        name="h2o",
        kind="cache",
        summary="Keep what got most attention from all queries so far, and the last tokens.",
        target="hf_ext.cache.policies.h2o:H2O",
        paper="H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models (arXiv:2306.14048)",
        example="model.generate(**inputs, past_key_values=CompressedCache(model.config, H2O(budget=0.25)))",
    ),
    Plugin(
        name="keydiff",
        kind="cache",
        summary="Keep the keys that are least like the others; looks at nothing but keys.",
        target="hf_ext.cache.policies.keydiff:KeyDiff",
        paper="KeyDiff: Key Similarity-Based KV Cache Eviction (arXiv:2504.15364)",
        example="model.generate(**inputs, past_key_values=CompressedCache(model.config, KeyDiff(budget=0.5)))",
    ),
    Plugin(
        name="pyramidkv",
        kind="cache",
        summary="SnapKV with more budget for the lower layers than for the upper ones.",
        target="hf_ext.cache.policies.pyramidkv:PyramidKV",
        paper="PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling (arXiv:2406.02069)",
        example="model.generate(**inputs, past_key_values=CompressedCache(model.config, PyramidKV(budget=0.25)))",
    ),
    Plugin(
        name="snapkv",
        kind="cache",
        summary="Keep what the last queries of the prompt attend to, and these last tokens.",
        target="hf_ext.cache.policies.snapkv:SnapKV",
        paper="SnapKV: LLM Knows What You are Looking for Before Generation (arXiv:2404.14469)",
        example="model.generate(**inputs, past_key_values=CompressedCache(model.config, SnapKV(budget=0.25)))",
    ),
    Plugin(
        name="tova",
        kind="cache",
        summary="Keep what the last query attends to, the same tokens in all heads of a layer.",
        target="hf_ext.cache.policies.tova:TOVA",
        paper="Transformers are Multi-State RNNs (arXiv:2401.06104)",
        example="model.generate(**inputs, past_key_values=CompressedCache(model.config, TOVA(budget=0.5)))",
    ),
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
