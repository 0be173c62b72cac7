"""Number formats that a processor is slow at."""

from __future__ import annotations

import torch

from argrpo_cli.policy import load_policy
from argrpo_cli.system.processes import tell_slow
from tests.training.tiny import save_tiny_policy


def test_a_processor_that_is_slow_in_bfloat16_is_told_of_once(tmp_path, monkeypatch, capsys):
    saved = save_tiny_policy(tmp_path / "policy")

    def times_told(dtype, **has):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
        tell_slow.cache_clear()
        for _ in range(2):
            load_policy(saved, dtype=dtype)
        return capsys.readouterr().err.count("bfloat16 takes longer than float32 on this processor")

    assert times_told("bfloat16", avx512_bf16=True, amx_bf16=False) == 1
    assert times_told("bfloat16", amx_bf16=True) == times_told("float32", amx_bf16=False) == 0
    assert times_told("bfloat16") == 0, "a torch that does not know its processor"
    tell_slow.cache_clear()
