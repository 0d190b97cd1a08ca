"""What an installed tokenizer must be, and what is said of one that is not."""

import re
import sys

import numpy as np
import pytest
import torch

from cache_builder.errors import (
    ArtifactError,
    ConfigError,
    MissingDependencyError,
    PatchCacheError,
    PluginError,
    TokenizerMismatchError,
)
from cache_builder.formats import Codebook, ExtractorSpec, PluginSpec, TokenCache
from cache_builder.tokenizers import PatchTokenizer
from cache_builder.tokenizers.plugins import Installed, adopt, installed
from tests import factories, plugins

CODE = """
import torch
from torch import nn


class Tokenizer(nn.Module):
    # Ids are the mean brightness of a patch in steps.
    image_size, patch_size, vocab_size = 16, 4, 4

    def __init__(self, bias=0):
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(float(bias)))

    def brightness(self, pixels):
        means = nn.functional.avg_pool2d(pixels.float().mean(1, keepdim=True), 4)[:, 0]
        return (means + self.bias).clamp(0, 255)

    def encode(self, pixels):
        return (self.brightness(pixels) / 64).long()


class Drawing(Tokenizer):
    def decode(self, ids):
        assert ids.dtype == torch.int64
        grey = (ids.float() * 64 + 31.6)[:, None].expand(-1, 3, -1, -1)
        return nn.functional.interpolate(grey, scale_factor=4)


def read(weights=None, scale: int = 1):
    return Drawing(bias=weights.read_text() if weights else 0)


def plain(weights=None):
    return Tokenizer()


class Pair(Tokenizer):
    num_stages = 2
    centroids = torch.arange(24.0).view(2, 4, 3)

    def encode(self, pixels):
        ids = super().encode(pixels)
        return torch.stack([ids, 3 - ids], -1)


def pair(weights=None):
    return Pair()


def needs(weights):
    if weights is None:
        raise ValueError("weights are needed")
    return Tokenizer()


def text(weights=None):
    return "no module"


def bare(weights=None):
    return nn.Linear(2, 2)


def altered(**values):
    def make(weights=None):
        tokenizer = Drawing()
        for name, value in values.items():
            setattr(tokenizer, name, value)
        return tokenizer
    return make


def fail(pixels):
    raise RuntimeError("no kernel for this")


odd_size = altered(image_size=18)
odd_metric = altered(metric="angle")
huge = altered(vocab_size=70_000)
beyond = altered(encode=lambda pixels: torch.full((len(pixels), 4, 4), 4))
flat = altered(encode=lambda pixels: torch.zeros(len(pixels), 16).long())
fractions = altered(encode=lambda pixels: torch.zeros(len(pixels), 4, 4))
chance = altered(encode=lambda pixels: torch.rand(len(pixels), 4, 4).mul(4).long())
failing = altered(encode=fail)
small = altered(decode=lambda ids: torch.zeros(len(ids), 3, 4, 4))
few = altered(centroids=torch.zeros(3, 8))
nan = altered(centroids=torch.full((4, 8), torch.nan))
"""
NAMES = [
    "read", "plain", "pair", "needs", "text", "bare", "odd_size", "odd_metric", "huge", "beyond",
    "flat", "fractions", "chance", "failing", "small", "few", "nan", "gone",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def odd(tmp_path_factory):
    """A distribution of good and bad tokenizers."""
    names = {name: name for name in NAMES}
    site = plugins.offer(tmp_path_factory.mktemp("odd"), CODE, **names)
    with plugins.on_path(site):
        yield site


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("absent", MissingDependencyError, r"no tokenizer 'absent' .*\(bare, beyond, chance.*Inst"),
        ("gone", PluginError, "odd has no odd_tokenizers:gone"),
        ("needs", ConfigError, "'needs' of odd cannot be made .* weights are needed"),
        ("text", PluginError, "odd_tokenizers:text must return a torch.nn.Module, not .*str"),
        ("bare", PluginError, "has no image_size, patch_size, vocab_size, encode"),
        ("odd_size", PluginError, "image size 18 is not a multiple of patch size 4"),
        ("odd_metric", PluginError, "plugin:odd_metric: metric: Input should be 'l2' or 'cosine'"),
        ("huge", PluginError, "1 to 65,535 centroids, not 70,000"),
        ("beyond", PluginError, r"ids 4\.\.4, which do not lie in \[0, 4\)"),
        ("flat", PluginError, r"must give ids \(2, 4, 4\) of an integer type, and gave \(2, 16\)"),
        ("fractions", PluginError, "integer type, and gave .* torch.float32"),
        ("chance", PluginError, "ids differently when the same pictures come again"),
        ("failing", PluginError, "fails on pictures of noise: RuntimeError: no kernel for this"),
        ("small", PluginError, r"decode to pixels \(2, 3, 16, 16\), and gave \(2, 3, 4, 4\)"),
        ("few", PluginError, r"with M, K = \(1, 4\), not \(1, 3, 8\)"),
        ("nan", PluginError, "plugin:nan: centroids hold NaN"),
    ],
)
def test_what_is_no_tokenizer_is_refused_with_the_reason(name, error, message):
    with pytest.raises(error, match=message):
        adopt(name, None, {})


def test_arguments_and_weights_that_it_does_not_take_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="'read' says: got an unexpected keyword argument 'size'"):
        adopt("read", None, {"size": 3})
    with pytest.raises(ConfigError, match=r"weights .*nowhere.txt of plugin:read are not there"):
        adopt("read", str(tmp_path / "nowhere.txt"), {})


def write_weights(path, bias="0"):
    path.write_text(bias)
    return str(path)


def test_the_fingerprint_covers_name_arguments_and_weights_and_not_where_they_lie(tmp_path):
    one = write_weights(tmp_path / "one.txt")
    copy, other = write_weights(tmp_path / "copy.txt"), write_weights(tmp_path / "other.txt", "9")
    first = adopt("read", one, {})
    assert adopt("read", copy, {}).fingerprint == first.fingerprint
    others = [adopt("read", other, {}), adopt("read", one, {"scale": 2}), adopt("plain", None, {})]
    assert len({first.fingerprint, *(each.fingerprint for each in others)}) == 4


def test_the_file_says_all_and_a_moved_or_changed_weights_file_is_noticed(tmp_path):
    weights = write_weights(tmp_path / "weights.txt", "40")
    adopt("read", weights, {}).save(tmp_path / "codebook.safetensors")
    codebook = Codebook.load(tmp_path / "codebook.safetensors")
    assert codebook.plugin == PluginSpec(distribution="odd", version="1.5", decodes_to_pixels=True)
    assert codebook.extractor.weights == f"file:{weights}"
    assert codebook.centroids.shape == (1, 4, 0)
    assert not codebook.has_centroids
    grey = torch.full((1, 3, 16, 16), 100, dtype=torch.uint8)
    assert PatchTokenizer.load(codebook).encode(grey).unique().tolist() == [2]
    (tmp_path / "weights.txt").rename(tmp_path / "moved.txt")
    with pytest.raises(ConfigError, match="are not there"):
        PatchTokenizer.load(codebook)
    moved = PatchTokenizer.load(codebook, weights=str(tmp_path / "moved.txt"))
    assert moved.encode(grey).unique().tolist() == [2]
    write_weights(tmp_path / "weights.txt", "0")
    with pytest.raises(TokenizerMismatchError, match="written for plugin:read with weights"):
        PatchTokenizer.load(codebook)


def test_another_version_with_another_vocabulary_or_size_is_refused(monkeypatch):
    codebook = adopt("plain", None, {})
    tokenizer = sys.modules["odd_tokenizers"].Tokenizer
    monkeypatch.setattr(tokenizer, "vocab_size", 5)
    with pytest.raises(TokenizerMismatchError, match=r"M, K = \(1, 4\), but .* has \(1, 5\)"):
        PatchTokenizer.load(codebook)
    monkeypatch.setattr(tokenizer, "image_size", 32)
    with pytest.raises(TokenizerMismatchError, match=r"a pixel rule size=16 .* has size=32"):
        PatchTokenizer.load(codebook)


def test_ids_and_pictures_are_those_of_the_plugin():
    tokenizer = PatchTokenizer.load(adopt("read", None, {}))
    ids = torch.arange(16).view(1, 4, 4) % 4
    pixels = tokenizer.decode(ids.to(torch.uint8))
    assert pixels.dtype == torch.uint8
    assert pixels[0, :, ::4, ::4].unique().tolist() == [32, 96, 160, 224]
    assert torch.equal(tokenizer.encode(pixels), ids)
    assert tokenizer.encode(pixels[:0]).shape == (0, 4, 4)
    with pytest.raises(ConfigError, match=r"ids 0\.\.4 do not lie in \[0, 4\)"):
        tokenizer.decode(torch.arange(16).view(1, 4, 4) % 5)
    with pytest.raises(ValueError, match=r"pixels must be \(B, 3, 16, 16\) uint8"):
        tokenizer.encode(pixels.float())


def test_what_a_plugin_cannot_do_is_refused_by_name():
    tokenizer = PatchTokenizer.load(adopt("plain", None, {}))
    with pytest.raises(ConfigError, match="Ids of plugin:plain with metric l2 are not pixels"):
        tokenizer.decode(torch.zeros(1, 4, 4))
    with pytest.raises(ConfigError, match="plugin:plain does not say what it quantises"):
        tokenizer.features(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


def test_two_distributions_of_one_name_are_refused(tmp_path):
    twin = plugins.offer(tmp_path, CODE, distribution="twin", module="twins", plain="plain")
    with plugins.on_path(twin):
        assert Installed("plain", "twin", "1.5") in installed()
        with pytest.raises(PluginError, match="odd, twin all offer a tokenizer"):
            adopt("plain", None, {})


@pytest.mark.parametrize("name", ["trap:spring", "trap", "os:system", "../trap.py"])
def test_a_codebook_file_cannot_name_a_module(tmp_path, monkeypatch, name):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "trap.py").write_text("spring = open(__file__ + '.sprung', 'w')\n")
    spec = ExtractorSpec(id=f"plugin:{name}")
    codebook = Codebook(
        np.zeros((1, 4, 0), np.float32), np.zeros((1, 4), np.int64), metric="l2",
        pixel_rule=factories.colour_codebook().pixel_rule, extractor=spec,
        plugin=PluginSpec(distribution="trap", version="2.1"),
    )  # fmt: skip
    path = tmp_path / "codebook.safetensors"
    codebook.save(path)
    wanted = f"no tokenizer '{re.escape(name)}' .* Install trap .it was written with 2.1"
    with pytest.raises(MissingDependencyError, match=wanted):
        PatchTokenizer.load(path)
    assert "trap" not in sys.modules
    assert not list(tmp_path.glob("*.sprung"))


def test_only_a_plugin_may_lack_centroids_and_says_that_it_is_one():
    rule = factories.colour_codebook().pixel_rule
    arrays = np.zeros((1, 4, 0), np.float32), np.zeros((1, 4), np.int64)
    with pytest.raises(ArtifactError, match="centroids of pixel have no values"):
        Codebook(*arrays, metric="l2", pixel_rule=rule, extractor=ExtractorSpec(id="pixel"))
    with pytest.raises(ValueError, match="extractor plugin:x and plugin None disagree"):
        Codebook(*arrays, metric="l2", pixel_rule=rule, extractor=ExtractorSpec(id="plugin:x"))


def write_images(root):
    return factories.write_folder(root / "images", factories.photo_images(4))


@pytest.mark.parametrize(("name", "shape"), [("plain", (4, 4)), ("pair", (4, 4, 2))])
def test_a_cache_holds_the_ids_of_the_plugin(tmp_path, name, shape):
    codebook = adopt(name, None, {})
    codebook.save(tmp_path / "codebook.safetensors")
    factories.build_cache(
        images=str(write_images(tmp_path)), codebook=tmp_path / "codebook.safetensors",
        out=tmp_path / "cache", num_views=2,
    )  # fmt: skip
    tokenizer = PatchTokenizer.load(codebook)
    with TokenCache.open(tmp_path / "cache") as cache:
        for index in range(len(cache)):
            sample = cache[index]
            views = factories.views_of(sample, codebook.pixel_rule)
            assert sample.token_ids.shape == (2, *shape)
            np.testing.assert_array_equal(sample.token_ids, tokenizer.encode(views))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"soft_top_k": 2}, "--soft-top-k measures distances .* plugin:pair quantises by itself"),
        ({"store_features": "int8"}, "--store-features .* plugin:pair quantises by itself"),
    ],
)
def test_targets_of_our_quantiser_are_refused_for_a_plugin(tmp_path, asked, message):
    adopt("pair", None, {}).save(tmp_path / "codebook.safetensors")
    with pytest.raises(PatchCacheError, match=message):
        factories.build_cache(
            images=str(write_images(tmp_path)), codebook=tmp_path / "codebook.safetensors",
            out=tmp_path / "cache", **asked,
        )  # fmt: skip
