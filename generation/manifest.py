"""The decoding strategies of this package, as the host lists them. Imports no torch."""

from hf_ext.plugins import Plugin

PLUGINS = (
    Plugin(
        name="contrastive-search",
        kind="strategy",
        summary="Deterministic text without repetition: among the top-k tokens, trade probability against "
        "similarity to what was already said.",
        target="hf_ext.generation.contrastive_search:ContrastiveSearch",
        paper="Contrastive Search Is What You Need For Neural Text Generation (arXiv:2210.14140)",
        covers=("contrastive-search",),
        claims="hf_ext.claims.contrastive_search:CLAIMS",
        example="model.generate(**inputs, custom_generate=ContrastiveSearch(penalty_alpha=0.6, top_k=4))",
    ),
    Plugin(
        name="cautious-decoding",
        kind="strategy",
        summary="Sampling that tries again where the model is unsure: several trials up to the next punctuation, "
        "the one of lowest perplexity is kept.",
        target="hf_ext.generation.cautious:CautiousDecoding",
        paper="Cautious Next Token Prediction (arXiv:2507.03038)",
        covers=("cautious-next-token-prediction",),
        claims="hf_ext.claims.cautious_decoding:CLAIMS",
        example="CautiousDecoding(max_trials=10).generate(model, **inputs, tokenizer=tokenizer)",
    ),
    Plugin(
        name="speculative-decoding",
        kind="strategy",
        summary="A small model drafts a few tokens, the target checks them in one call; the text is exactly the "
        "target's, greedy or sampled, for every row of a batch.",
        target="hf_ext.generation.speculative_decoding:SpeculativeDecoding",
        paper="Fast Inference from Transformers via Speculative Decoding (arXiv:2211.17192)",
        covers=("speculative-decoding",),
        claims="hf_ext.claims.speculative_decoding:CLAIMS",
        example="model.generate(**inputs, custom_generate=SpeculativeDecoding(draft_model=draft, draft_tokens=4))",
    ),
    Plugin(
        name="speculative-contrastive-decoding",
        kind="strategy",
        summary="Contrastive decoding at the price of speculative decoding: the amateur whose faults are subtracted "
        "also drafts.",
        target="hf_ext.generation.speculative_contrastive_decoding:SpeculativeContrastiveDecoding",
        paper="Speculative Contrastive Decoding (arXiv:2311.08981)",
        covers=("speculative-contrastive-decoding",),
        claims="hf_ext.claims.speculative_contrastive_decoding:CLAIMS",
        example="model.generate(**inputs, custom_generate=SpeculativeContrastiveDecoding(draft_model=amateur))",
    ),
    Plugin(
        name="spectr",
        kind="strategy",
        summary="Speculative decoding with several independent draft sequences, accepted by K-SEQ, which solves the "
        "choice among them as a transport problem.",
        target="hf_ext.generation.spectr:SpecTr",
        paper="SpecTr: Fast Speculative Decoding via Optimal Transport (arXiv:2310.15141)",
        covers=("spectr",),
        claims="hf_ext.claims.spectr:CLAIMS",
        example="model.generate(**inputs, custom_generate=SpecTr(draft_model=draft, sequences=4))",
    ),
    Plugin(
        name="recursive-speculative-decoding",
        kind="strategy",
        summary="Speculative decoding with trees of distinct drafts: siblings are drawn without replacement, level by "
        "level or by stochastic beam search.",
        target="hf_ext.generation.recursive_speculative_decoding:RecursiveSpeculativeDecoding",
        paper="Recursive Speculative Decoding: Accelerating LLM Inference via Sampling Without Replacement "
        "(arXiv:2402.14160)",
        covers=("recursive-speculative-decoding",),
        claims="hf_ext.claims.recursive_speculative_decoding:CLAIMS",
        example="model.generate(**inputs, custom_generate=RecursiveSpeculativeDecoding(draft_model=draft))",
    ),
    Plugin(
        name="opt-tree",
        kind="strategy",
        summary="Speculative decoding with, at every step, the draft tree of the largest expected acceptance.",
        target="hf_ext.generation.opt_tree:OptTree",
        paper="OPT-Tree: Speculative Decoding with Adaptive Draft Tree Structure (arXiv:2406.17276)",
        covers=("opt-tree",),
        claims="hf_ext.claims.opt_tree:CLAIMS",
        example="model.generate(**inputs, custom_generate=OptTree(draft_model=draft, nodes=24))",
    ),
    Plugin(
        name="dyspec",
        kind="strategy",
        summary="Speculative decoding with draft trees that grow, draw by draw, where acceptance is most likely.",
        target="hf_ext.generation.dyspec:DySpec",
        paper="DySpec: Faster Speculative Decoding with Dynamic Token Tree Structure (arXiv:2410.11744)",
        covers=("dyspec",),
        claims="hf_ext.claims.dyspec:CLAIMS",
        example="model.generate(**inputs, custom_generate=DySpec(draft_model=draft, nodes=24))",
    ),
    Plugin(
        name="staged-speculative-decoding",
        kind="strategy",
        summary="Speculative decoding in two stages: n-grams draft for the draft model, which drafts a tree for the "
        "target.",
        target="hf_ext.generation.staged_speculative_decoding:StagedSpeculativeDecoding",
        paper="Accelerating LLM Inference with Staged Speculative Decoding (arXiv:2308.04623)",
        covers=("staged-speculative-decoding",),
        claims="hf_ext.claims.staged_speculative_decoding:CLAIMS",
        example="model.generate(**inputs, custom_generate=StagedSpeculativeDecoding(draft_model=draft))",
    ),
)
