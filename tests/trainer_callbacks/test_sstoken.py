"""ssToken: scores and selection by hand, the attention against eager attention, the earlier version and its resume."""

import math
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from hf_ext.testing.objective import ObjectiveInProcess
from hf_ext.testing.objective_training import (
    arguments,
    collate,
    examples,
    largest_difference,
    logged,
    tiny_model,
    train,
    weights,
)
from hf_ext.trainer_callbacks import SSToken
from hf_ext.trainer_callbacks.sstoken import scaled, top_share
from hf_ext.trainer_callbacks.statistics import loss_of_statistics


class TestSSToken(ObjectiveInProcess):
    objective = SSToken
    options: ClassVar = {"share": 0.5, "gamma": 0.5}
    null_options: ClassVar = {"share": 1.0}
    attached_sft = True

    def make(self, **changes):
        """Compare with another model, so that the first step already selects by both scores."""
        return super().make(**{"history": tiny_model(seed=5), **changes})


def by_hand(scores, groups, share):
    kept = [False] * len(scores)
    for group in set(groups):
        members = [i for i, g in enumerate(groups) if g == group]
        best = sorted(members, key=lambda i: (-scores[i], i))
        for i in best[: math.ceil(round(share * len(members), 6))]:
            kept[i] = True
    return kept


@pytest.mark.parametrize("share", [0.01, 0.3, 0.55, 0.6, 0.999, 1.0])
def test_the_highest_share_of_each_group_is_kept(share):
    draw = torch.Generator().manual_seed(int(share * 100))
    scores = torch.randint(0, 9, (200,), generator=draw).float()  # with ties
    groups = torch.randint(0, 11, (200,), generator=draw)
    found = top_share(scores, groups, 12, share)
    assert found.tolist() == by_hand(scores.tolist(), groups.tolist(), share)


def test_scaling_is_within_the_group_and_keeps_the_order():
    values, groups = torch.tensor([5.0, 7.0, 9.0, -1.0, -1.0]), torch.tensor([3, 3, 3, 0, 0])
    assert scaled(values, groups, 4).tolist() == pytest.approx([0, 0.5, 1, 0, 0])


class Frozen(SSToken):
    """Give the loss a batch by hand instead of a training pass."""

    @property
    def batch(self):
        return self.given


def on_batch(objective, model, batch, **setup):
    """Set `objective` up on a model and return its loss on a batch, with what the model computes."""
    objective._state = type("State", (), {"global_step": 0, "stateful_callbacks": {}, "is_world_process_zero": True})
    objective.setup(model, None, arguments("out"))
    objective.given = {name: value for name, value in batch.items() if name != "labels"}
    model.train()
    logits = model(**objective.given).logits
    targets = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    total, count, _ = loss_of_statistics(objective, None, logits, targets, {})
    objective.remove()
    return total, count, logits, targets


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_scores_are_those_of_the_eager_last_layer(left, implementation):
    """gamma=0: the loss is that of the tokens which attend most to the prompt, by the whole matrix."""
    model = tiny_model()
    model.set_attn_implementation(implementation)
    batch = collate(examples(6))
    batch["labels"][:, :3] = -100
    if left:
        lengths = batch["attention_mask"].sum(-1)
        batch = {
            name: torch.stack([row.roll(int(len(row) - n)) for row, n in zip(value, lengths, strict=True)])
            for name, value in batch.items()
        }
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    total, count, logits, targets = on_batch(Frozen(share=0.4, gamma=0.0), model, batch)

    model.set_attn_implementation("eager")
    given = {name: value for name, value in batch.items() if name != "labels"}
    attention = model.eval()(**given, output_attentions=True).attentions[-1].mean(1)
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    expected = 0.0
    for row in range(6):
        mine = [i for i in range(targets.shape[1]) if targets[row, i] != -100]
        prompt = [p for p in range(targets.shape[1]) if batch["attention_mask"][row, p] and p - 1 not in mine]
        scores = [float(attention[row, i + 1, prompt].sum()) for i in mine]
        kept = by_hand(scores, [0] * len(mine), 0.4)
        own = [float(losses.view_as(targets)[row, i]) for i, keep in zip(mine, kept, strict=True) if keep]
        expected += len(mine) * sum(own) / len(own)
    assert float(total.detach()) == pytest.approx(expected, rel=1e-5)
    assert int(count) == int((targets != -100).sum())


def test_excess_loss_is_the_fall_of_the_loss_since_the_earlier_version():
    """gamma=1: the loss is that of the tokens whose loss has fallen most."""
    model, earlier, batch = tiny_model(), tiny_model(seed=4), collate(examples(4))
    total, _, logits, targets = on_batch(Frozen(share=0.3, gamma=1.0, history=earlier), model, batch)
    given = {name: value for name, value in batch.items() if name != "labels"}
    past = earlier.eval()(**given).logits
    now, then = (
        torch.nn.functional.cross_entropy(x.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        for x in (logits, past)
    )
    expected = 0.0
    for row in range(4):
        mine = (targets[row] != -100).nonzero().flatten()
        fall = (then - now)[row, mine]
        kept = fall.topk(math.ceil(0.3 * len(mine))).indices
        expected += len(mine) * float(now[row, mine[kept]].mean())
    assert float(total.detach()) == pytest.approx(expected, rel=1e-5)


def test_selection_has_no_gradient_of_its_own_and_unselected_tokens_have_none():
    model, batch = tiny_model(), collate(examples(2))
    total, _, logits, targets = on_batch(Frozen(share=0.5, history=tiny_model(seed=4)), model, batch)
    logits.retain_grad()
    total.backward()
    touched = logits.grad.abs().sum(-1) > 0
    for row in range(2):
        assert int(touched[row].sum()) == math.ceil(0.5 * int((targets[row] != -100).sum()))
    assert not (touched & (targets == -100)).any()


def test_packed_texts_are_selected_from_one_by_one():
    def packed(rows):
        labels = [label for row in rows for label in (-100, *row["labels"][1:])]
        return {
            "input_ids": torch.tensor([[token for row in rows for token in row["input_ids"]]]),
            "labels": torch.tensor([labels]),
            "position_ids": torch.tensor([[p for row in rows for p in range(len(row["input_ids"]))]]),
        }

    losses = []
    for collator in (collate, packed):
        objective = SSToken(share=0.4, history=tiny_model(seed=4))
        trainer = train(tiny_model(), objective, collator=collator, max_steps=1, max_grad_norm=0.0)
        entry = trainer.state.log_history[0]
        losses.append([entry[name] for name in ("loss", "clean_loss", "selected_share", "selected_loss")])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_the_earlier_version_is_the_model_at_the_beginning():
    """Its own copy gives the same training as the untrained model given as `history`."""
    trained = []
    for history in (None, tiny_model()):
        model = tiny_model()
        train(model, SSToken(share=0.5, history=history), max_steps=4)
        trained.append(weights(model))
    assert largest_difference(*trained) == 0


def test_a_moving_average_follows_the_model():
    model, ours = tiny_model(), SSToken(share=0.5, decay=0.75)
    seen = []
    update = type(ours).on_step_end

    class Spy(SSToken):
        def on_step_end(self, args, state, control, **kwargs):
            update(self, args, state, control, **kwargs)
            seen.append((weights(model)["lm_head.weight"], self._past.weights["lm_head.weight"].clone()))

    start = weights(model)["lm_head.weight"]
    train(model, Spy(share=0.5, decay=0.75), max_steps=3)
    for now, average in seen:
        start = 0.75 * start + 0.25 * now
        assert torch.allclose(start, average, atol=1e-6)


@pytest.mark.parametrize(("decay", "where"), [(1.0, "sstoken-start"), (0.5, "checkpoint-2/sstoken-history")])
def test_the_earlier_version_is_found_again_by_a_run_that_resumes(tmp_path: Path, decay, where):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    model, resumed = tiny_model(), tiny_model(seed=1)
    train(model, SSToken(share=0.5, decay=decay), folder=tmp_path, **options)
    again = {"folder": tmp_path / "again", "resume": str(tmp_path / "checkpoint-2"), **options}
    trainer = train(resumed, SSToken(share=0.5, decay=decay), **again)
    assert largest_difference(weights(model), weights(resumed)) == 0
    assert len(logged(trainer, "selected_share")) == 4
    (tmp_path / f"{where}.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="or begin anew instead of resuming"):
        train(tiny_model(), SSToken(share=0.5, decay=decay), **again)


def test_sharded_weights_are_refused_with_the_remedy():
    model = tiny_model()
    model.lm_head.weight.ds_id = 0  # what DeepSpeed ZeRO-3 marks its parameters with
    with pytest.raises(ValueError, match=r"FSDP or DeepSpeed shard.*history=AutoModelForCausalLM"):
        train(model, SSToken())


def test_the_description_names_a_history_model():
    assert SSToken(history=tiny_model()).describe()["options"]["history"] == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0}, "share must be above 0 and at most 1"),
        ({"share": 60}, "share must be above 0 and at most 1"),
        ({"gamma": 1.5}, "gamma must be a number from 0 to 1"),
        ({"decay": -0.1}, "decay must be a number from 0 to 1"),
        ({"history": "gpt2"}, "history must be a model or None, got str"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SSToken(**options)


def test_a_history_model_does_not_move():
    with pytest.raises(ValueError, match="does not go with a history model"):
        SSToken(history=tiny_model(), decay=0.5)


def test_the_claims_task_gives_in_its_responses_what_its_prompts_say():
    from hf_ext.claims import sstoken as claims

    for row in claims.lookups(32, seed=2).tolist():
        prompt, response = row[: claims.PROMPT - 1], row[claims.PROMPT :]
        said = dict(zip(prompt[::2], prompt[1::2], strict=True))
        assert dict(zip(response[::4], response[1::4], strict=True)) == said
        assert all(token >= claims.FIRST_NOISE for token in response[2::4] + response[3::4])
    batch = claims.collate(list(claims.lookups(2, seed=0)))
    assert (batch["labels"][:, : claims.PROMPT] == -100).all()
    assert torch.equal(batch["labels"][:, claims.PROMPT :], batch["input_ids"][:, claims.PROMPT :])
