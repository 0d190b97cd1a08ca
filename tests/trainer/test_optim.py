"""Which parameters learn how fast, which decay, and when."""

import pytest
import timm
import torch
from torch import nn

from tests.trainer.caches import tiny_config
from trainer.optim import learning_rate, parameter_groups, set_learning_rate


@pytest.fixture(scope="module")
def vit():
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=2,
        num_classes=5,
    )  # fmt: skip


def scales(module, **settings):
    """Return `lr_scale` and weight decay of every parameter by name."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        names[id(parameter)]: (group["lr_scale"], group["weight_decay"])
        for group in parameter_groups(module, 0.05, **settings)
        for parameter in group["params"]
    }


def test_every_parameter_is_in_one_group(vit):
    listed = [p for group in parameter_groups(vit, 0.05, 0.5) for p in group["params"]]
    assert len(listed) == len(set(map(id, listed))) == len(list(vit.parameters()))


def test_each_layer_learns_slower_than_the_next(vit):
    found = {name: scale for name, (scale, _) in scales(vit, layer_decay=0.5).items()}
    expected = {
        "cls_token": 1 / 16, "pos_embed": 1 / 16, "patch_embed.proj.weight": 1 / 16,
        "blocks.0.attn.qkv.weight": 1 / 8, "blocks.1.mlp.fc1.bias": 1 / 4,
        "blocks.2.norm1.weight": 1 / 2, "norm.weight": 1, "head.weight": 1,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected


def test_what_a_method_adds_to_its_vit_learns_fastest(vit):
    module = nn.Module()
    module.vit = vit
    module.blocks = nn.Sequential(nn.Linear(4, 4))
    found = scales(module, layer_decay=0.5)
    assert found["blocks.0.weight"] == (1, 0.05)
    assert found["vit.blocks.0.attn.qkv.weight"] == (1 / 8, 0.05)


def test_vectors_positions_and_prefix_are_not_decayed(vit):
    found = scales(vit)
    plain = {name for name, (_, decay) in found.items() if decay == 0}
    expected = {name for name, p in vit.named_parameters() if p.ndim == 1}
    assert plain == expected | {"cls_token", "pos_embed"}
    assert {scale for scale, _ in found.values()} == {1}


def test_the_schedule_times_the_scale_is_what_a_group_learns_at(vit):
    config = tiny_config(optim={"lr": 1e-3, "min_lr": 0, "warmup_steps": 4}, run={"steps": 20})
    assert learning_rate(2, config) == pytest.approx(5e-4)
    assert learning_rate(12, config) == pytest.approx(5e-4)
    optimizer = torch.optim.AdamW(parameter_groups(vit, 0.05, 0.5), lr=1)
    set_learning_rate(optimizer, learning_rate(4, config))
    assert min(group["lr"] for group in optimizer.param_groups) == pytest.approx(1e-3 / 16)
    assert max(group["lr"] for group in optimizer.param_groups) == pytest.approx(1e-3)
