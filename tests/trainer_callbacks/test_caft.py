"""CAFT: its loss by loops, its weights, what it leaves alone, and training through the Trainer."""

import functools
import math
import re
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch.nn import functional

from hf_ext.generation.heads import MultiTokenHead
from hf_ext.layers import TargetEnds, captured
from hf_ext.testing import tiny_models
from hf_ext.testing.objective import ObjectiveInProcess
from hf_ext.testing.objective_training import tiny_model, train
from hf_ext.trainer_callbacks import CAFT
from hf_ext.trainer_callbacks.caft import ahead


def trained_heads(heads=2):
    """Heads of the conformance suite's model that say something else than the next token."""
    head = MultiTokenHead.for_target(tiny_model(), heads=heads)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    return head


class TestCAFT(ObjectiveInProcess):
    objective = CAFT
    options: ClassVar = {"heads": trained_heads(), "coefficient": 0.5}
    null_options: ClassVar = {"heads": trained_heads(), "coefficient": 0.0}
    attached_sft = True


def by_loops(model, head, batch, targets, documents, weights):
    """The definition: the next-token loss, and that of every head at every position."""
    out = model(**batch, output_hidden_states=True)
    total = functional.cross_entropy(out.logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    state = {}
    handle = model.model.norm.register_forward_pre_hook(lambda module, args: state.update(last=args[0]))
    model(**batch)
    handle.remove()
    for row in range(len(targets)):
        for place in range(targets.shape[1]):
            for number, weight in enumerate(weights, start=1):
                later = place + number
                if later + 1 >= targets.shape[1] or targets[row, later] == -100:
                    continue
                if documents[row, place] < 0 or documents[row, place] != documents[row, later + 1]:
                    continue
                logits = model.lm_head(model.model.norm(head(state["last"][row, place], number)))
                total = total - weight * logits.log_softmax(-1)[targets[row, later]]
    return total


def test_the_loss_is_that_of_the_definition_with_padding_prompts_and_packed_documents():
    torch.manual_seed(0)
    model, head = tiny_models.build("llama").double(), MultiTokenHead.for_target(tiny_models.build("llama"), heads=3)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    objective = CAFT(heads=head, coefficient=0.7, decay=0.5, schedule="constant")
    ids = torch.randint(2, 90, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    labels = ids.clone()
    labels[0, :4] = -100  # padding and prompt
    positions = torch.tensor([[0, 0, 0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 0, 1, 2, 3, 4]])
    labels[1, 4] = -100  # the first token of a packed document has nothing before it
    documents = torch.tensor([[-1, -1, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    targets = functional.pad(labels[:, 1:], (0, 1), value=-100)

    objective.setup(model, None, None)
    objective._state = type("State", (), {"global_step": 0, "max_steps": 10})()
    objective._inputs = batch
    with captured(model, objective.states_needed()) as states:
        logits = model(**batch).logits
    # in float32, as the Trainer's own loss is computed
    ends = TargetEnds(model)
    expected = by_loops(model, objective._heads, batch, targets, documents, [0.35, 0.175, 0.0875])
    slopes = []
    for shortcut in (None, ends.shortcut):  # with the heads' logits, and a part of them at a time
        to_logits = functools.partial(ends.logits)
        to_logits.shortcut = shortcut
        total, count = objective.loss_on_hidden(states, logits, targets, to_logits)
        assert int(count) == int((targets != -100).sum())
        assert float(total) == pytest.approx(float(expected), rel=1e-5)
        slopes.append(torch.autograd.grad(total, model.model.embed_tokens.weight, retain_graph=True)[0])
    assert torch.allclose(*slopes, atol=1e-6), f"gradients differ by {float((slopes[0] - slopes[1]).abs().max()):.3g}"
    assert float(expected) > float(functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("rsine", [1, math.sqrt(0.5), 0]), ("sine", [0, math.sqrt(0.5), 1]), ("constant", [1] * 3)],
)
def test_weights_follow_the_schedule_and_fall_from_head_to_head(schedule, expected):
    objective = CAFT(heads=trained_heads(3), coefficient=2.0, decay=0.5, schedule=schedule)
    for step, factor in zip((0, 10, 20), expected, strict=True):
        assert objective.weights(step, 20) == pytest.approx([factor, factor / 2, factor / 4], abs=1e-12)


def test_places_ahead_stay_within_the_document_and_the_row():
    targets = torch.tensor([[1, 2, 3, -100, 5, -100]])
    documents = torch.tensor([[-1, 0, 0, 0, 0, 0]])
    assert ahead(targets, documents, 1).tolist() == [[-100, 3, -100, 5, -100, -100]]
    assert ahead(targets, documents, 2).tolist() == [[-100, -100, 5, -100, -100, -100]]
    for places in (6, 60):
        assert ahead(targets, documents, places).tolist() == [[-100] * 6]


def test_training_changes_the_model_and_leaves_the_heads_and_the_architecture_alone(tmp_path):
    head = trained_heads()
    before = {name: value.clone() for name, value in head.state_dict().items()}
    plain, model = tiny_model(), tiny_model()
    train(plain, None, folder=tmp_path / "plain")
    trainer = train(model, CAFT(heads=head, coefficient=1.0), folder=tmp_path / "caft")
    for name, value in head.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.requires_grad for parameter in head.parameters())
    assert list(model.state_dict()) == list(plain.state_dict())
    assert type(model) is type(plain)
    assert model.config.to_dict() == plain.config.to_dict()
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    logged = [entry for entry in trainer.state.log_history if "loss_ahead_2" in entry]
    assert logged
    assert all(entry["loss_ahead_1"] > 0 for entry in logged)


def test_heads_can_be_the_folder_of_saved_ones(tmp_path):
    head = trained_heads()
    head.save_pretrained(tmp_path)
    objective = CAFT(heads=tmp_path)
    objective.setup(tiny_model(), None, None)
    for (name, ours), theirs in zip(objective._heads.named_parameters(), head.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        assert not ours.requires_grad
    assert "MultiTokenHead of 2" in CAFT(heads=head).describe()["options"]["heads"]


def test_heads_of_another_model_are_refused():
    objective = CAFT(heads=MultiTokenHead.for_target(tiny_models.build("gpt2")))
    with pytest.raises(ValueError, match="made for another target"):
        objective.setup(tiny_model(), None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 4}, "heads must be a MultiTokenHead or the folder"),
        ({"coefficient": -1}, "coefficient must be a number from 0"),
        ({"decay": math.inf}, "decay must be a number from 0"),
        ({"schedule": "cosine"}, "schedule must be one of rsine, sine, constant"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CAFT(**{"heads": trained_heads(), **options})


def test_code_of_the_page_on_multi_token_training_runs(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "multi-token-training.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 1
    exec(compile(blocks[0], "multi-token-training.md", "exec"), {"__name__": "page"})
    assert "MultiTokenDrafting: 16 tokens" in capsys.readouterr().out
