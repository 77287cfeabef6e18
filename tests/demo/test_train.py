import signal

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_ext.demo.train import Schedule, optimizers, save


@pytest.fixture(autouse=True)
def _handler():
    before = signal.getsignal(signal.SIGUSR1)
    yield
    signal.signal(signal.SIGUSR1, before)


def tiny():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, tie_word_embeddings=True, **shape))


def test_learning_rate_rises_stays_and_falls_to_zero():
    schedule = Schedule(1000, warmup=100)
    assert [schedule(step) for step in (0, 99, 100, 799)] == [0.01, 1.0, 1.0, 1.0]
    assert schedule(900) == 0.5
    assert schedule(999) == pytest.approx(1 / 200)


def test_a_signal_starts_the_fall_at_once_and_the_schedule_records_it():
    schedule = Schedule(1000, warmup=10)
    assert schedule(400) == 1.0
    signal.raise_signal(signal.SIGUSR1)
    assert schedule(401) == 1.0
    assert (schedule.decay_start, schedule.steps) == (401, 501)
    assert schedule(451) == 0.5


def test_every_parameter_has_one_optimizer():
    model = tiny()
    held = [id(p) for opt in optimizers(model, 1e-3) for group in opt.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_saved_weights_are_rounded_to_bfloat16_and_load_in_float32(tmp_path):
    model = tiny()
    save(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float32
    assert (tmp_path / "model.safetensors").stat().st_size < 2.5 * sum(p.numel() for p in model.parameters()) + 2000
    for (name, ours), theirs in zip(model.named_parameters(), loaded.parameters(), strict=True):
        difference = (ours.to(torch.bfloat16).float() - theirs).abs().max()
        assert difference == 0, f"{name} differs from its rounded value by {difference}"
