"""Patch features are the maps of the named models, computed by hand here."""

import json
import logging

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from cache_builder.errors import ConfigError, TokenizerMismatchError
from cache_builder.formats import ExtractorSpec
from cache_builder.formats.views import centre_square
from cache_builder.imaging import apply_view, decode, patchify
from cache_builder.tokenizers import models
from cache_builder.tokenizers.features import (
    FeatureOptions,
    extract_features,
    load_extractor,
    make_extractor,
)

CPU = torch.device("cpu")
TEXT = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 1, "layers": 1}
SMALL_VIT = {
    "embed_dim": 24,
    "text_cfg": TEXT,
    "vision_cfg": {
        "image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8,
    },
}  # fmt: skip
SMALL_RESNET = {
    "embed_dim": 24,
    "text_cfg": TEXT,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
}
SMALL_TIMM_VIT = {"depth": 2, "embed_dim": 64, "num_heads": 2}


@pytest.fixture
def pixels():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=generator)


def extractor(features, **options):
    options = {"random_weights_seed": 0} | options
    return make_extractor(FeatureOptions(features, **options), CPU)


def normalised(pixels, rule):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (rule.mean, rule.std))
    return (pixels.float() / 255 - mean) / std


def flat(maps):
    """(B, D, rows, cols) to (B, N, D), row-major."""
    return torch.stack([m.reshape(m.shape[0], -1).T for m in maps])


def test_pixels_are_the_patches_themselves(pixels):
    patches = make_extractor(FeatureOptions("pixel", image_size=32, patch_size=8), CPU)
    assert torch.equal(patches(pixels), patchify(pixels, 8))
    assert patches(pixels).dtype == torch.uint8
    assert patches.spec == ExtractorSpec(id="pixel")
    assert patches.pixel_rule.grid == (4, 4)


def test_pixels_are_224_in_patches_of_16_unless_said_otherwise():
    rule = make_extractor(FeatureOptions("pixel"), CPU).pixel_rule
    assert (rule.size, rule.patch_size, rule.interpolation) == (224, 16, "bicubic")


@pytest.mark.parametrize("layer", ["ln_post", "proj"])
def test_a_clip_vit_gives_its_patch_tokens_after_the_final_norm(pixels, layer):
    features = extractor("open_clip:ViT-B-32", model_args=SMALL_VIT, layer=layer, image_size=32)
    visual = models.create_model("open_clip", "ViT-B-32", "random:0", dict(SMALL_VIT), 32)
    with torch.inference_mode():
        x = visual.conv1(normalised(pixels, features.pixel_rule)).flatten(2).transpose(1, 2)
        cls = visual.class_embedding.expand(len(x), 1, -1)
        x = visual.ln_pre(torch.cat([cls, x], 1) + visual.positional_embedding)
        for block in visual.transformer.resblocks:
            x = x + block.attention(block.ln_1(x))
            x = x + block.mlp(block.ln_2(x))
        expected = visual.ln_post(x)[:, 1:]
        if layer == "proj":
            expected = expected @ visual.proj
    torch.testing.assert_close(features(pixels), expected, rtol=1e-4, atol=1e-5)
    assert features.pixel_rule.grid == (4, 4)
    assert features.pixel_rule.mean == pytest.approx((0.481, 0.458, 0.408), abs=1e-3)


def test_the_norm_is_the_default_layer_of_a_clip_vit():
    features = extractor("open_clip:ViT-B-32", model_args=SMALL_VIT, image_size=32)
    assert features.spec.layer == "ln_post"


@pytest.mark.parametrize(("layer", "stride"), [(None, 32), ("layer2", 8), ("stem", 4)])
def test_a_clip_resnet_gives_the_map_before_attention_pooling(layer, stride):
    features = extractor("open_clip:RN50", model_args=SMALL_RESNET, layer=layer, image_size=64)
    visual = models.create_model("open_clip", "RN50", "random:0", dict(SMALL_RESNET), 64)
    pixels = torch.arange(3 * 64 * 64).reshape(1, 3, 64, 64).to(torch.uint8)
    with torch.inference_mode():
        x = visual.stem(normalised(pixels, features.pixel_rule))
        for name in ("layer1", "layer2", "layer3", "layer4"):
            if features.spec.layer == "stem":
                break
            x = getattr(visual, name)(x)
            if features.spec.layer == name:
                break
    torch.testing.assert_close(features(pixels), flat(x), rtol=1e-4, atol=1e-6)
    assert features.pixel_rule.patch_size == stride
    assert features.spec.layer == layer or features.spec.layer == "layer4"


@pytest.mark.parametrize("layer", [None, "0", "1"])
def test_a_timm_vit_gives_its_patch_tokens(pixels, layer):
    name = "vit_tiny_patch16_224"
    features = extractor(f"timm:{name}", model_args=SMALL_TIMM_VIT, layer=layer, image_size=32)
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=32, **SMALL_TIMM_VIT).eval()
    with torch.inference_mode():
        x = normalised(pixels, features.pixel_rule)
        if layer is None:
            expected = model.forward_features(x)[:, 1:]
        else:
            x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
            for block in model.blocks[: int(layer) + 1]:
                x = block(x)
            expected = x[:, 1:]
    torch.testing.assert_close(features(pixels), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("layer", "stride"), [(None, 32), ("2", 8)])
def test_a_convolutional_timm_model_gives_any_stage(layer, stride):
    features = extractor("timm:resnet10t", layer=layer, image_size=64)
    torch.manual_seed(0)
    index = 4 if layer is None else int(layer)
    model = timm.create_model("resnet10t", features_only=True, out_indices=(index,)).eval()
    torch.manual_seed(0)
    model.load_state_dict(timm.create_model("resnet10t").state_dict(), strict=False)
    pixels = torch.arange(3 * 64 * 64).reshape(1, 3, 64, 64).to(torch.uint8)
    with torch.inference_mode():
        expected = flat(model(normalised(pixels, features.pixel_rule))[0])
    torch.testing.assert_close(features(pixels), expected, rtol=1e-4, atol=1e-5)
    assert features.pixel_rule.patch_size == stride


@pytest.mark.slow
def test_the_real_encoder_gives_the_map_that_its_makers_describe(mobilenet_weights, photos):
    features = make_extractor(
        FeatureOptions(
            f"timm:mobilenetv2_100@{mobilenet_weights}",
            layer="3",
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            model_args={"pad_type": "same"},
        ),
        CPU,
    )
    assert features.pixel_rule.grid == (14, 14)
    picture = decode((photos / "n01443537_goldfish.JPEG").read_bytes())
    view = apply_view(picture, centre_square(picture.shape[-2:]), 224)[None]
    model = timm.create_model(
        "mobilenetv2_100", pad_type="same", checkpoint_path=str(mobilenet_weights)
    ).eval()
    with torch.inference_mode():
        x = view.float() / 127.5 - 1
        expected = flat(model.forward_intermediates(x, indices=[3], intermediates_only=True)[0])
        assert model(x).argmax().item() == 1  # goldfish
    found = features(view)
    assert found.shape == (1, 196, 96)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    again = load_extractor(features.spec, features.pixel_rule, CPU)
    assert torch.equal(again(view), found)


def test_a_recorded_extractor_is_made_again(pixels):
    for name, args in (
        ("open_clip:ViT-B-32", SMALL_VIT),
        ("timm:vit_tiny_patch16_224", SMALL_TIMM_VIT),
    ):
        first = extractor(name, model_args=args, image_size=32)
        spec = ExtractorSpec.model_validate_json(first.spec.model_dump_json())
        again = load_extractor(spec, first.pixel_rule, CPU)
        assert torch.equal(again(pixels), first(pixels))


def test_other_weights_are_refused_by_both_digests(tmp_path):
    first = extractor("timm:resnet10t", image_size=64)
    other = extractor("timm:resnet10t", image_size=64, random_weights_seed=1)
    spec = first.spec.model_copy(update={"weights": "random:1"})
    message = (
        f"with weights {first.spec.weights_digest}, but random:1 holds {other.spec.weights_digest}"
    )
    with pytest.raises(TokenizerMismatchError, match=message):
        load_extractor(spec, first.pixel_rule, CPU)


@pytest.fixture
def weights_file(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "weights.safetensors"
    save_file(timm.create_model("resnet10t").state_dict(), path)
    return path


def test_weights_may_lie_elsewhere_than_recorded(tmp_path, weights_file):
    first = extractor(f"timm:resnet10t@{weights_file}", image_size=64, random_weights_seed=None)
    assert first.spec.weights == f"file:{weights_file}"
    moved = weights_file.rename(tmp_path / "moved.safetensors")
    with pytest.raises(ConfigError, match=r"is not there. Pass its new place as --weights"):
        load_extractor(first.spec, first.pixel_rule, CPU)
    again = load_extractor(first.spec, first.pixel_rule, CPU, str(moved))
    pixels = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    assert torch.equal(again(pixels), first(pixels))


def test_the_digest_is_of_the_weights_and_not_of_their_source(weights_file):
    from_file = extractor(f"timm:resnet10t@{weights_file}", image_size=64, random_weights_seed=None)
    drawn = extractor("timm:resnet10t", image_size=64)
    assert from_file.spec.weights_digest == drawn.spec.weights_digest
    assert from_file.spec.identity() == drawn.spec.identity()


def test_one_changed_weight_changes_the_digest():
    model = nn.Linear(2, 2)
    before = models.weights_digest(model)
    with torch.no_grad():
        model.weight[0, 0] += 1e-6
    assert models.weights_digest(model) != before


def test_a_model_trained_with_quick_gelu_gets_it():
    assert models.tag_args("open_clip", "ViT-B-16", "pretrained:openai") == {
        "force_quick_gelu": True
    }
    assert models.tag_args("open_clip", "ViT-B-16-quickgelu", "pretrained:openai") == {}
    assert models.tag_args("open_clip", "ViT-B-16", "pretrained:laion2b_s34b_b88k") == {}
    assert models.tag_args("timm", "resnet10t", "pretrained:") == {}


def test_features_do_not_depend_on_the_batch_beyond_rounding(pixels):
    features = extractor("timm:vit_tiny_patch16_224", model_args=SMALL_TIMM_VIT, image_size=32)
    together = features(pixels)
    alone = torch.cat([features(pixels[:1]), features(pixels[1:])])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        ("clip", {}, r"Unknown features 'clip'. Use pixel, open_clip:MODEL"),
        ("timm:", {}, r"Unknown features 'timm:'"),
        ("pixel", {"layer": "3"}, r"--layer has no meaning for --features pixel"),
        ("pixel", {"mean": (0.5, 0.5, 0.5)}, r"--mean has no meaning"),
        ("pixel", {"model_args": {"a": 1}}, r"--features-arg has no meaning"),
        ("pixel", {"random_weights_seed": 0}, r"--weights random has no meaning"),
        ("pixel", {"image_size": 30, "patch_size": 16}, r"30 is not a multiple of patch size 16"),
        ("timm:resnet10t@/no/file", {}, r"There is no weights file /no/file"),
        ("timm:no_such_model", {"random_weights_seed": 0}, r"timm:no_such_model cannot be created"),
        (
            "timm:resnet10t",
            {"random_weights_seed": 0, "model_args": {"colour": 1}},
            r"cannot be created with {'colour': 1} from random:0",
        ),
        ("timm:resnet10t", {"random_weights_seed": 0, "layer": "x"}, r"`last` or a number from 0"),
        (
            "timm:resnet10t@here",
            {"random_weights_seed": 0},
            r"--weights random and the weights 'here' exclude each other",
        ),
        (
            "timm:resnet10t",
            {"random_weights_seed": 0, "image_size": 64, "patch_size": 16},
            r"layer last has patches of 32 pixels, not 16",
        ),
        (
            "timm:resnet10t",
            {"random_weights_seed": 0, "image_size": 100},
            r"map of 4 x 4 patches of 32 pixels for 100 x 100, which they do not cover exactly",
        ),
        ("open_clip:ViT-B-32@nothing", {}, r"no pretrained weights 'nothing'.*laion2b_s34b_b79k"),
        ("open_clip:NoSuch", {"random_weights_seed": 0}, r"open_clip:NoSuch cannot be created"),
        (
            "open_clip:ViT-B-32",
            {"random_weights_seed": 0, "model_args": SMALL_VIT, "layer": "9", "image_size": 32},
            r"one of ln_post, proj, not '9'",
        ),
        (
            "open_clip:RN50",
            {"random_weights_seed": 0, "model_args": SMALL_RESNET, "layer": "9"},
            r"one of stem, layer1, layer2, layer3, layer4, not '9'",
        ),
        (
            "timm:vit_tiny_patch16_224",
            {"random_weights_seed": 0, "model_args": SMALL_TIMM_VIT, "image_size": 40},
            r"map of 2 x 2 patches of 16 pixels for 40 x 40",
        ),
    ],
)
def test_a_wrong_request_says_what_is_wrong(features, options, message):
    with pytest.raises(ConfigError, match=message):
        make_extractor(FeatureOptions(features, **options), CPU)


@pytest.mark.parametrize("content", [b"", b"no weights at all"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("model", ["timm:resnet10t", "open_clip:RN50"])
def test_a_damaged_file_of_weights_is_named(tmp_path, model, suffix, content):
    path = tmp_path / f"weights.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{model} cannot be created .* from file:{path}: \w"):
        make_extractor(FeatureOptions(f"{model}@{path}"), CPU)


def test_every_map_of_a_model_has_the_stride_that_it_says():
    vit = SMALL_VIT | {"vision_cfg": SMALL_VIT["vision_cfg"] | {"image_size": 64}}
    for name, args, layers in (
        ("open_clip:ViT-B-32", vit, ["ln_post", "proj"]),
        ("open_clip:RN50", SMALL_RESNET, ["stem", "layer1", "layer2", "layer3", "layer4"]),
        ("timm:resnet10t", {}, ["0", "1", "2", "3", "4", "last"]),
        ("timm:mobilenetv2_035", {}, ["0", "1", "2", "3", "4", "last"]),
        ("timm:vit_tiny_patch16_224", SMALL_TIMM_VIT, ["0", "1", "last"]),
        ("timm:convnext_atto", {}, ["0", "3", "last"]),
    ):
        library, _, model_name = name.partition(":")
        model = models.create_model(library, model_name, "random:0", dict(args), 64)
        for layer in layers:
            with torch.inference_mode():
                rows = models.feature_map(model, torch.zeros(1, 3, 64, 64), layer).shape[-2]
            assert rows * models.map_stride(model, layer) == 64, (name, layer)


def test_the_arguments_of_a_model_can_be_kept_as_json():
    features = extractor("open_clip:ViT-B-32", model_args=SMALL_VIT, image_size=32)
    assert json.loads(features.spec.model_dump_json())["args"] == SMALL_VIT


class Cramped:
    """An extractor on a device that holds no more than a few pictures."""

    spec = ExtractorSpec(id="timm:cramped")

    def __init__(self, capacity):
        self.capacity = capacity

    def __call__(self, pixels):
        if len(pixels) > self.capacity:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return pixels.float().flatten(1)[:, None]


def test_a_batch_too_large_for_the_device_is_halved_and_that_is_said(caplog):
    pixels = torch.randint(0, 256, (13, 3, 4, 4), dtype=torch.uint8)
    with caplog.at_level(logging.WARNING):
        features = extract_features(Cramped(3), pixels)
    assert torch.equal(features, pixels.float().flatten(1)[:, None])
    assert "takes 6 pictures at a time" in caplog.text
    with pytest.raises(ConfigError, match="Not even one picture of 4 pixels fits"):
        extract_features(Cramped(0), pixels)
