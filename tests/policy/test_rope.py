"""The two-dimensional rotary embedding against published numbers."""

from __future__ import annotations

import pytest
import torch

from argrpo_cli.policy.llamagen.model import Encoded, apply_rope, rope_table
from tests.goldens import cases, golden_model, max_difference, tensors


@pytest.mark.parametrize("table", cases()["C_rope"]["rope_tables"], ids=lambda table: table["key"])
def test_table(table):
    actual = rope_table(table["grid"], table["head_dim"], table["cls_token_num"])
    assert max_difference(torch.view_as_real(actual), tensors("C_rope")[f"out/{table['key']}"]) < 1e-5


def test_application():
    data = tensors("C_rope")
    assert max_difference(apply_rope(data["in/rot_x"], rope_table(4, 16, 8)), data["out/rot_y"]) < 1e-5


def test_queries_and_keys_of_condition_tokens_vanish():
    rotated = apply_rope(torch.randn(2, 24, 3, 16), rope_table(4, 16, 8))
    assert not rotated[:, :8].any()
    assert rotated[:, 8:].all()


def test_the_rotation_is_float32():
    x = torch.randn(1, 17, 2, 16)
    rotated = apply_rope(x.bfloat16(), rope_table(4, 16, 1))
    assert rotated.dtype == torch.float32
    assert torch.equal(rotated, apply_rope(x.bfloat16().float(), rope_table(4, 16, 1)))


def test_a_table_first_used_in_inference_mode_can_train():
    rope_table.cache_clear()
    with torch.inference_mode():
        rope_table(2, 8, 1)
    x = torch.randn(1, 5, 1, 8, requires_grad=True)
    apply_rope(x, rope_table(2, 8, 1)).sum().backward()
    assert x.grad is not None


def test_layers_are_given_nothing_beside_their_input_that_mixed_precision_would_round():
    """FSDP2 casts floating-point arguments; the sampler, which draws without its hooks, would turn by other angles."""
    given = []
    data, model = tensors("A_c2i"), golden_model("A_c2i")
    hook = model.model.layers[0].register_forward_pre_hook(lambda module, arguments: given.extend(arguments))
    model(Encoded(data["in/labels"]), data["in/tokens"])
    hook.remove()
    assert [torch.is_tensor(one) and one.is_floating_point() for one in given].count(True) == 1
