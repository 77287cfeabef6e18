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
        name="expected-attention",
        kind="cache",
        summary="Keep what queries to come are expected to attend to, by the distribution of those so far.",
        target="hf_ext.cache.policies.expected_attention:ExpectedAttention",
        paper="Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution "
        "(arXiv:2510.00636)",
        example="policy = ExpectedAttention.of(model, budget=0.25)\n"
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
        name="kvmerger",
        kind="cache",
        summary="Merge neighbours with similar keys into one entry, a weighted mean that counts for all it stands for.",
        target="hf_ext.cache.policies.kvmerger:KVMerger",
        paper="Model Tells You Where to Merge: Adaptive KV Cache Merging for LLMs (arXiv:2407.08454)",
        covers=("kvmerger",),
        claims="hf_ext.claims.kvmerger:CLAIMS",
        example="model.generate(**inputs, past_key_values=CompressedCache(model.config, KVMerger(budget=0.5)))",
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
        name="q-filters",
        kind="cache",
        summary="Keep the keys that lie in the direction of the queries, fitted once from any text.",
        target="hf_ext.cache.policies.q_filters:QFilters",
        paper="Q-Filters: Leveraging QK Geometry for Efficient KV Cache Compression (arXiv:2503.02812)",
        covers=("q-filters",),
        example="policy = QFilters(filters=QFilters.fit(model, texts, tokenizer), budget=0.25)\n"
        "model.generate(**inputs, past_key_values=CompressedCache(model.config, policy))",
        claims="hf_ext.claims.q_filters:CLAIMS",
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
        name="kivi",
        kind="cache",
        summary="Keep everything in a few bits: keys by channel, values by token, the last ones as they are.",
        target="hf_ext.cache.policies.kivi:KIVI",
        paper="KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache (arXiv:2402.02750)",
        claims="hf_ext.claims.kivi:CLAIMS",
        example="model.generate(**inputs, past_key_values=CompressedCache(model.config, KIVI(bits=4)))",
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
    Plugin(
        name="autocompressor",
        kind="compressor",
        summary="A model sums up each segment of a text in a few vectors and reads them before all later segments; "
        "trained whole or by adapters, by the stock Trainer.",
        target="hf_ext.cache.soft.autocompressor:AutoCompressor",
        paper="Adapting Language Models to Compress Contexts (arXiv:2305.14788)",
        covers=("autocompressor",),
        claims="hf_ext.claims.autocompressor:CLAIMS",
        example="model = AutoCompressor(summary_tokens=50).convert(model)\n"
        "Trainer(model, args, train_dataset=texts, data_collator=SegmentCollator()).train()",
    ),
    Plugin(
        name="icae",
        kind="compressor",
        summary="An adapter writes a context into a few slots that the untouched model reads in its place; trained by "
        "the stock Trainer, cached as a prefix.",
        target="hf_ext.cache.soft.icae:ICAEModel",
        paper="In-context Autoencoder for Context Compression in a Large Language Model (arXiv:2307.06945)",
        covers=("icae",),
        claims="hf_ext.claims.icae:CLAIMS",
        example="model = ICAEModel.from_pretrained(model, 'path/of/the/adapter')\n"
        "model.generate(context_ids=context_ids, input_ids=input_ids)",
    ),
    Plugin(
        name="dynamic-context-pruning",
        kind="cache",
        summary="Drop for good what small trained parts of a stock model say that nobody needs any more.",
        target="hf_ext.cache.trained.dynamic_context_pruning:DynamicContextPruning",
        paper="Dynamic Context Pruning for Efficient and Interpretable Autoregressive Transformers (arXiv:2305.15805)",
        covers=("dynamic-context-pruning",),
        claims="hf_ext.claims.dynamic_context_pruning:CLAIMS",
        example="model = DynamicContextPruningModel(model, LoraConfig(r=8, target_modules='all-linear'))\n"
        "Trainer(model, args, train_dataset=data, callbacks=[DynamicContextPruningTraining()]).train()\n"
        "model.eval().generate(**inputs)",
    ),
    Plugin(
        name="nugget2d",
        kind="cache",
        summary="Keep of each context the tokens that a trained scorer values most, and read later text after them.",
        target="hf_ext.cache.trained.nugget2d:Nugget2D",
        paper="Nugget 2D: Dynamic Contextual Compression for Scaling Decoder-only Language Models (arXiv:2310.02409)",
        covers=("nugget2d",),
        claims="hf_ext.claims.nugget2d:CLAIMS",
        example="model = Nugget2DModel(model, LoraConfig(r=8, target_modules='all-linear'), budget=0.1)\n"
        "Trainer(model, args, train_dataset=texts, data_collator=NuggetCollator(context=512)).train()\n"
        "model.eval().generate(context_ids=context_ids, input_ids=input_ids)",
    ),
)
