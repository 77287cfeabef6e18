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
)
