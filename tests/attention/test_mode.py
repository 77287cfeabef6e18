"""Where the kernels run."""

import types

import pytest
import torch

from hf_ext.attention import mode


@pytest.mark.parametrize(("room", "runs"), [(101_376, False), (166_912, True), (232_448, True)])
@pytest.mark.skipif(not mode.HAS_TRITON, reason="without Triton nothing runs the kernels")
def test_a_gpu_without_the_shared_memory_runs_what_runs_without_kernels(room, runs, monkeypatch):
    properties = types.SimpleNamespace(shared_memory_per_block_optin=room)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    mode._has_room.cache_clear()
    try:
        if runs:
            assert mode.runs_kernels("cuda:0")
        else:
            with pytest.warns(UserWarning, match="runs as 'sdpa' on a GPU"):
                assert not mode.runs_kernels("cuda:0")
            assert not mode.runs_kernels("cuda:0"), "asked again, it says nothing"
    finally:
        mode._has_room.cache_clear()


def test_the_cpu_runs_the_kernels_only_where_that_is_asked_for():
    assert not mode.runs_kernels("cpu")
    with mode.kernels("always"):
        assert mode.runs_kernels("cpu")
    with mode.kernels("never"):
        assert not mode.runs_kernels("cuda")
    with pytest.raises(ValueError, match="'auto', 'always' or 'never'"), mode.kernels("sometimes"):
        pass
