"""BICO: what is masked and hidden, who sees whom, mirrored positions, and what is refused."""

import random
from typing import ClassVar

import pytest
import torch
from transformers import LlamaForCausalLM

from hf_ext import adapter
from hf_ext.attention import AttentionStructure, masks_for
from hf_ext.attention.by_hand import attended, probabilities, scores
from hf_ext.attention.intercept import intercept
from hf_ext.attention.rotary import Rotary
from hf_ext.kernels.linear_loss import linear_loss
from hf_ext.testing.objective import ObjectiveInProcess
from hf_ext.testing.objective_processes import tiny_tokenizer
from hf_ext.testing.objective_training import BOS, EOS, MASK, PAD, collate, examples, logged, tiny_model, train
from hf_ext.testing.tiny_models import build
from hf_ext.trainer_callbacks.bico import BICO
from hf_ext.trainer_callbacks.denoising import CAUSAL, COLUMN, HIDDEN, SEEN, structure_of
from hf_ext.trainer_callbacks.documents import Document
from hf_ext.trainer_callbacks.mirror import Mirror
from hf_ext.trainer_callbacks.prefix_lm import PrefixLMTraining


class TestBICO(ObjectiveInProcess):
    objective = BICO
    options: ClassVar = {"share": 0.7, "mask_ratio": 0.3, "mask_token": MASK}
    null_options: ClassVar = {"share": 0.0}
    refused: ClassVar = {"collator": "changes the attention as well as the data"}


def rewritten(document, count=200, **options):
    objective = BICO(**{"mask_token": MASK, **options})
    objective.resolve(tiny_tokenizer(), tiny_model().config)
    return [objective.rewrite(document, random.Random(seed)) for seed in range(count)]


TEXT = Document([BOS, 10, 11, 12, 13, 14, 15, EOS], [-100, -100, 11, 12, 13, 14, 15, EOS])


def test_labels_stand_at_the_masks_alone_and_masks_never_on_prompts_or_special_tokens():
    masked = set()
    for new in rewritten(TEXT, share=1.0, mask_ratio=0.4):
        for at, (token, label, kind) in enumerate(zip(new.tokens, new.labels, new.columns[COLUMN], strict=True)):
            if token == MASK:
                assert (label, kind) == (TEXT.labels[at], HIDDEN)
                masked.add(at)
            else:
                assert (token, label, kind) == (TEXT.tokens[at], -100, SEEN)
        assert MASK in new.tokens, "a denoised document has a mask, whatever the ratio"
    assert masked == {2, 3, 4, 5, 6}


def test_shares_are_those_asked_for():
    documents = rewritten(TEXT, count=4000, share=0.3, mask_ratio=0.4)
    denoised = [document for document in documents if document.columns[COLUMN][0] == SEEN]
    share = len(denoised) / len(documents)
    assert abs(share - 0.3) < 0.03, f"{share:.3f} of the documents are denoised"
    # of 5 tokens each is drawn with 0.4; where none is (0.6 ** 5), one is taken
    ratio, expected = sum(d.tokens.count(MASK) for d in denoised) / 5 / len(denoised), 0.4 + 0.6**5 / 5
    assert abs(ratio - expected) < 0.03, f"{ratio:.3f} of the tokens are masked, expected {expected:.3f}"
    for document in documents:
        if document.columns[COLUMN][0] == CAUSAL:
            assert (document.tokens, document.labels) == (TEXT.tokens, TEXT.labels)


def test_a_document_without_anything_to_mask_stays_causal():
    [new] = rewritten(Document([BOS, 10, EOS], [-100, -100, EOS]), count=1, share=1.0)
    assert new.columns[COLUMN] == [CAUSAL] * 3


def test_denoised_documents_see_all_but_masks_and_padding_and_packed_documents_do_not_see_each_other():
    kinds = torch.tensor([[CAUSAL, CAUSAL, SEEN, HIDDEN, SEEN, 0], [0, 0, 0, SEEN, SEEN, HIDDEN]])
    positions = torch.tensor([[0, 1, 0, 1, 2, 0], [0, 0, 0, 0, 1, 2]])
    inputs = {"input_ids": kinds, "attention_mask": (kinds > 0).long(), "position_ids": positions}
    expected = [
        ["x.....", "xx....", "..x.x.", "..x.x.", "..x.x.", "......"],
        ["......", "......", "......", "...xx.", "...xx.", "...xx."],
    ]
    seen = structure_of(kinds, inputs).dense()[:, 0]
    assert [["".join(".x"[int(v)] for v in row) for row in rows] for rows in seen] == expected
    # without positions a row is one document, and padding on the left counts for nothing
    alone = structure_of(kinds[1:], {"input_ids": kinds[1:], "attention_mask": (kinds[1:] > 0).long()})
    assert ["".join(".x"[int(v)] for v in row) for row in alone.dense()[0, 0]] == expected[1]


def bidirectional(model, ids, mirror):
    """Return logits under full attention, with mirrored positions or without."""
    mask = masks_for(model, AttentionStructure.bidirectional(torch.ones_like(ids)))
    if not mirror:
        return model(ids, attention_mask=mask).logits
    attention = Mirror(Rotary.of(model), [adapter.layer_window(layer) for layer in adapter.empty_cache(model).layers])
    attention.begin({"input_ids": ids})
    model.train()
    with intercept(model, attention):
        return model(ids, attention_mask=mask).logits


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
@torch.no_grad()
def test_with_mirrored_positions_only_distances_count_so_a_reversed_text_gives_reversed_states(name, implementation):
    model = build(name, attn_implementation=implementation).eval()
    ids = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    plain = bidirectional(model, ids, False) - bidirectional(model, ids.flip(1), False).flip(1)
    assert plain.abs().max() > 1e-2, "without the mirror, direction should matter"
    there, back = bidirectional(model, ids, True), bidirectional(model, ids.flip(1), True).flip(1)
    difference = float((there - back).abs().max())
    assert difference < 2e-4, f"logits differ by up to {difference:.3g}"


@torch.no_grad()
def test_causal_documents_are_read_as_without_the_mirror():
    model = tiny_model().train()
    ids = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    attention = Mirror(Rotary.of(model), [adapter.layer_window(layer) for layer in adapter.empty_cache(model).layers])
    attention.begin({"input_ids": ids})
    mask = masks_for(model, AttentionStructure.causal(torch.ones_like(ids)))
    with intercept(model, attention):
        found = model(ids, attention_mask=mask).logits
    difference = float((found - model(ids).logits).abs().max())
    assert difference < 1e-5, f"logits differ by up to {difference:.3g}"


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("least", [48, 2])
def test_rows_that_look_back_only_go_the_models_own_way_and_gradients_are_the_same(name, least, monkeypatch):
    """Row by row or together, by the formula with its own gradient, in blocks, or by autograd: one result."""
    monkeypatch.setattr("hf_ext.trainer_callbacks.mirror.LEAST", least)
    kinds = torch.tensor([[SEEN, SEEN, HIDDEN, SEEN, HIDDEN, 0], [1, 1, 1, 1, 1, 1], [SEEN, HIDDEN, SEEN, SEEN, 0, 0]])
    ids = torch.tensor([[BOS, 10, MASK, 12, MASK, 0], [BOS, 9, 8, 7, 6, 5], [BOS, MASK, 5, 6, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": (kinds > 0).long()}
    found = []
    for split, by_hand in ((False, True), (False, False), (True, False)):
        model = build(name).double().train()
        windows = [adapter.layer_window(layer) for layer in adapter.empty_cache(model).layers]
        attention = Mirror(Rotary.of(model), windows)
        attention.begin(batch, (kinds > 1).any(-1) if split else None)
        mask = masks_for(model, structure_of(kinds, batch))
        with monkeypatch.context() as patch, intercept(model, attention):
            if by_hand:
                patch.setattr("hf_ext.trainer_callbacks.mirror._TwoScores.apply", formula)
            out = model(ids, attention_mask=mask).logits
        out[kinds > 0].square().sum().backward()
        found.append([out.detach()[kinds > 0], *(parameter.grad for parameter in model.parameters())])
    for other in found[1:]:
        difference = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(found[0], other, strict=True))
        assert difference < 1e-5, f"they differ by up to {difference:.3g} of the largest"  # the mirror turns in float32


def formula(query, key, value, turn, unseen, scaling, dtype):
    call, ahead = {"scaling": scaling}, torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1)
    found = torch.where(ahead, scores(turn(query), turn(key), call), scores(query, key, call))
    return attended(probabilities(found, unseen == 0, call), value).transpose(1, 2)


def test_no_prediction_reads_a_hidden_mask_unless_it_stands_on_it():
    """Gradients of the embeddings show which tokens were read for the predictions."""
    model = tiny_model().train()
    kinds = torch.tensor([[SEEN, SEEN, HIDDEN, SEEN, HIDDEN, SEEN]])
    ids = torch.tensor([[BOS, 10, MASK, 12, MASK, 14]])
    mask = masks_for(model, structure_of(kinds, {"input_ids": ids}))
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embedded, attention_mask=mask).logits[0, [0, 1, 3, 5]].sum().backward()
    read = embedded.grad[0].abs().sum(-1) > 0
    assert read.tolist() == [True, True, False, True, False, True]


def test_packed_rows_train_what_padded_rows_train():
    def packed(rows):
        return {
            "input_ids": torch.tensor([[token for row in rows for token in row["input_ids"]]]),
            "labels": torch.tensor([[label for row in rows for label in (-100, *row["labels"][1:])]]),
            "position_ids": torch.tensor([[at for row in rows for at in range(len(row["input_ids"]))]]),
        }

    losses = []
    for collator in (collate, packed):
        objective = BICO(share=0.6, mask_ratio=0.3, mask_token=MASK, max_length=400)
        entry = train(tiny_model(), objective, collator=collator, max_steps=1).state.log_history[0]
        losses.append([entry[name] for name in ("loss", "clean_loss", "denoised_share", "masked_share")])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


class Adding(LlamaForCausalLM):
    """A model that adds something to its loss."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, logits_to_keep=0, **kwargs):
        kwargs |= {"attention_mask": attention_mask, "labels": labels, "logits_to_keep": logits_to_keep}
        found = super().forward(input_ids, **kwargs)
        if found.loss is not None:
            found.loss = found.loss + self.lm_head.weight.square().mean()
        return found


def test_logits_are_made_of_targets_alone_and_the_loss_is_the_models_own(monkeypatch):
    """What the model adds to its loss stays, and so does a loss that somebody gave it."""
    seen = []

    def spy(hidden, weight, targets, *args, **kwargs):
        seen.append((len(hidden), int((targets == -100).sum())))
        return linear_loss(hidden, weight, targets, *args, **kwargs)

    monkeypatch.setattr("hf_ext.kernels.linear_loss.linear_loss", spy)
    found = []
    for without in (False, None):
        trained = Adding(tiny_model().config)
        trained.load_state_dict(tiny_model().state_dict())
        options = {"mask_token": MASK, "mask_ratio": 0.2, "share": 0.9}
        trainer = train(trained, BICO(**options, without_logits=without), max_steps=2, gradient_accumulation_steps=2)
        found.append([torch.tensor(logged(trainer, "loss")), *(p.detach() for p in trained.parameters())])
        assert len(seen) == (0 if without is False else 4)
        assert "_loss_function" not in vars(trained)
    assert all(rows < 60 and unlabelled == 0 for rows, unlabelled in seen), f"of 8 rows, these have logits: {seen}"
    difference = max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))
    assert difference < 1e-4, f"losses and weights differ by up to {difference:.3g}"
    mine = tiny_model()
    mine.loss_function = lambda logits, labels, **rest: logits.float().square().mean()
    seen.clear()
    train(mine, BICO(mask_token=MASK), max_steps=1)
    assert not seen, "a loss that the user gave was left out"


def test_a_forward_pass_that_raises_leaves_the_models_loss():
    def broken(layer, args, output):
        if layer.training:
            raise OSError("no memory")

    model, objective = tiny_model(), BICO(mask_token=MASK)
    model.model.layers[1].register_forward_hook(broken)
    with pytest.raises(OSError, match="no memory"):
        train(model, objective)
    assert "_loss_function" in vars(model), "the pass was to compute its loss of the targets alone"
    objective.remove()
    assert "_loss_function" not in vars(model)


def test_the_mask_is_the_tokenizers_or_else_the_padding_token():
    objective = BICO()
    objective.resolve(tiny_tokenizer(mask_token="w9"), tiny_model().config)
    assert objective._mask == 9
    objective.resolve(None, tiny_model().config)
    assert objective._mask == PAD
    with pytest.raises(ValueError, match=r"bico needs a mask token.*add_special_tokens.*BICO\(mask_token="):
        objective.resolve(None, tiny_model(pad_token_id=None).config)


def test_learned_positions_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"no rotary positions.*BICO\(mirror=False\)"):
        train(build("gpt2"), BICO(mask_token=MASK))
    trainer = train(build("gpt2"), BICO(mask_token=MASK, mirror=False), max_steps=1)
    assert trainer.state.log_history[0]["masked_share"] > 0


@pytest.mark.parametrize("objective", [BICO(mask_token=MASK), PrefixLMTraining()])
def test_experts_that_are_balanced_by_the_mask_of_padding_are_refused(objective):
    with pytest.raises(ValueError, match=rf"{objective.name} puts a mask.*output_router_logits = False"):
        train(build("gpt_oss", output_router_logits=True), objective)


def test_encoder_decoders_are_refused():
    with pytest.raises(ValueError, match=r"bico lifts the causal mask.*UL2"):
        train(build("t5"), BICO(mask_token=MASK))


def test_training_leaves_the_models_attention_as_it_was():
    model = tiny_model()
    before = model.config._attn_implementation
    trainer = train(model, BICO(mask_token=MASK))
    assert model.config._attn_implementation == before
    assert trainer.state.log_history[0]["denoised_share"] > 0
    ids = torch.tensor([examples(1)[0]["input_ids"]])
    changed = ids.clone()
    changed[0, -1] = 9
    with torch.no_grad():
        model.train()
        difference = (model(ids).logits - model(changed).logits)[0, :-1].abs().max()
    assert difference == 0, "the model still looks ahead"


@pytest.mark.parametrize("options", [{"share": 1.5}, {"share": True}, {"mask_ratio": 0}, {"mask_ratio": 15}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        BICO(**options)
