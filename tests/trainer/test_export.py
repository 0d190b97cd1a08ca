"""What is exported loads strictly elsewhere and computes the same."""

import importlib.util
import json

import pytest
import safetensors
import timm
import torch
from safetensors.torch import load_file, save_file

from cache_builder.errors import ConfigError
from tests import factories
from tests.trainer.caches import tiny_config
from trainer import checkpoint as checkpoints
from trainer import train
from trainer.backbones import load_backbone
from trainer.export import export


@pytest.fixture(scope="module")
def trained(tiny_cache, tmp_path_factory):
    return train.run(tiny_config(), tiny_cache, tmp_path_factory.mktemp("run")).checkpoint


def ours_of(checkpoint):
    return load_backbone(checkpoint).build().eval()


def pictures():
    return torch.randn(2, 3, factories.SIZE, factories.SIZE)


def test_an_export_loads_strictly_into_timm_and_computes_the_same(trained, tmp_path):
    path = tmp_path / "vit.safetensors"
    call = export(trained, path)
    vit = eval(call, {"timm": timm}).eval()
    vit.load_state_dict(load_file(path), strict=True)
    images = pictures()
    assert torch.equal(vit(images), ours_of(trained)(images))


def test_an_export_says_what_it_is_and_has_the_same_bytes_twice(trained, tmp_path):
    for name in ("a", "b"):
        export(trained, tmp_path / f"{name}.safetensors")
    first, second = (tmp_path / f"{name}.safetensors" for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    with safetensors.safe_open(first, "numpy") as file:
        metadata = json.loads(file.metadata()["patchcache"])
    assert metadata["fingerprint"] == checkpoints.load(trained).header.cache.fingerprint
    assert metadata["step"] == 12


def test_a_model_of_timm_is_exported_to_a_file_that_we_load_again(tmp_path):
    weights, out = tmp_path / "weights.safetensors", tmp_path / "vit.safetensors"
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), weights)
    export(f"timm:test_vit@{weights}", out)
    first, again = load_backbone(f"timm:test_vit@{weights}"), load_backbone(out)
    assert again.image_size == first.image_size == 160
    assert (again.mean, again.std) == (first.mean, first.std)
    built = again.build().state_dict()
    assert all(torch.equal(built[name], tensor) for name, tensor in first.state.items())


def test_a_folder_for_the_hub_loads_into_timm_bit_for_bit(trained, tmp_path):
    call = export(trained, tmp_path / "vit", "huggingface")
    vit = eval(call, {"timm": timm}).eval()
    ours = ours_of(trained)
    assert vit.state_dict().keys() == ours.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(vit.state_dict()[name], tensor), name
    images = pictures()
    assert torch.equal(vit(images), ours(images))
    rule = timm.data.resolve_model_data_config(vit)
    assert rule["input_size"] == (3, factories.SIZE, factories.SIZE)
    assert rule["crop_pct"] == 1.0
    names = sorted(path.name for path in tmp_path.rglob("*"))
    assert names == ["config.json", "model.safetensors", "vit"]


def test_a_folder_for_the_hub_is_written_anew_over_an_older_one(trained, tmp_path):
    first = export(trained, tmp_path / "vit", "huggingface")
    content = factories.contents(tmp_path / "vit")
    assert export(trained, tmp_path / "vit", "huggingface") == first
    assert factories.contents(tmp_path / "vit") == content
    description = json.loads(content["config.json"])["patchcache"]
    assert description["step"] == 12


def test_transformers_opens_the_folder(trained, tmp_path):
    if not importlib.util.find_spec("transformers"):
        pytest.skip("transformers is not installed")
    from transformers import AutoModel

    export(trained, tmp_path / "vit", "huggingface")
    model = AutoModel.from_pretrained(tmp_path / "vit").eval()
    images = pictures()
    expected = ours_of(trained).forward_features(images)
    assert torch.equal(model(images).last_hidden_state, expected)


@pytest.mark.parametrize(
    ("name", "layout", "message"),
    [
        ("vit.pt", "timm", r"vit\.pt must end in \.safetensors.*--layout huggingface"),
        ("vit.safetensors", "huggingface", "writes a folder"),
    ],
)
def test_a_name_that_does_not_go_with_the_layout_is_refused(
    trained, tmp_path, name, layout, message
):
    with pytest.raises(ConfigError, match=message):
        export(trained, tmp_path / name, layout)
