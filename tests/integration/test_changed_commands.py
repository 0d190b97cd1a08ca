"""A half-built cache is continued by its own command alone; another one hears what differs."""

import pytest

from cache_builder.errors import ConfigError, PatchCacheError, TokenizerMismatchError
from cache_builder.formats.codebook import Codebook
from tests import factories
from tests.integration import builds

LAYOUTS = ["webdataset", "zarr"]


@pytest.fixture
def begun(tmp_path, inputs):
    """A build of two tokenizers that stopped in its fourth unit, and a function that goes on."""
    images = builds.write_images(tmp_path / "images")
    _, codebooks = inputs
    out = tmp_path / "cache"
    broken = sorted(images.rglob("*.jpg"))[3 * builds.UNIT_SIZE]
    content = broken.read_bytes()

    def go_on(layout, **changes):
        settings = {"images": images, "codebooks": codebooks, "out": out} | changes
        builds.build_here(builds.options_of(**settings, layout=layout))

    def begin(layout):
        broken.unlink()
        broken.symlink_to("nowhere")
        with pytest.raises(PatchCacheError):
            go_on(layout)
        broken.unlink()
        broken.write_bytes(content)
        assert not (out / "manifest.json").exists()
        return go_on

    return begin


def further(tmp_path, inputs):
    """Return a third codebook."""
    _, (_, coarse) = inputs
    codebook = factories.colour_codebook(colours=factories.COLOURS[:5])
    codebook.save(tmp_path / "third.safetensors")
    return tmp_path / "third.safetensors", codebook, Codebook.load(coarse)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_layers_are_refused_and_named(tmp_path, inputs, begun, layout):
    _, (fine, coarse) = inputs
    third, codebook, layer = further(tmp_path, inputs)
    there = f"targets/{layer.fingerprint[:12]}-000"
    now = f"targets/{codebook.fingerprint[:12]}-000"
    go_on = begun(layout)
    before = factories.contents(tmp_path / "cache")
    for codebooks, difference in (
        ([fine], rf'layers: \["{there}"\] there, null now'),
        ([fine, third], rf'layers: \["{there}"\] there, \["{now}"\] now'),
        ([fine, coarse, third], rf'layers: \[\] there, \["{now}"\] now'),
    ):
        with pytest.raises(ConfigError, match=rf"other settings: {difference}\. Run the first"):
            go_on(layout, codebooks=codebooks)
    with pytest.raises(TokenizerMismatchError, match=f"{layer.fingerprint}"):
        go_on(layout, codebooks=[coarse, fine])
    assert factories.contents(tmp_path / "cache") == before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_views_and_another_source_are_refused_and_the_command_itself_is_not(
    tmp_path, inputs, undisturbed, begun, layout
):
    go_on = begun(layout)
    cache = tmp_path / "cache"
    before = factories.contents(cache)
    elsewhere, _ = inputs
    for changes, difference in (
        ({"num_views": 4}, r"view_spec\.num_views: 3 there, 4 now"),
        ({"hflip": 0.0}, r"view_spec\.hflip: 0\.5 there, 0\.0 now"),
        ({"ratio": (0.5, 2.0)}, r"view_spec\.ratio: \[0\.75, 1\.3\d+\] there, \[0\.5, 2\.0\] now"),
        ({"images": elsewhere}, r'source\.location: "\S+" there, "\S+" now'),
    ):
        with pytest.raises(ConfigError, match=rf"other settings: .*{difference}"):
            go_on(layout, **changes)
    added = factories.write_folder(tmp_path / "images", {"a/zzz.jpg": b"x"}) / "a/zzz.jpg"
    with pytest.raises(ConfigError, match=r"source\.num_samples: 60 there, 61 now"):
        go_on(layout)
    added.unlink()
    assert factories.contents(cache) == before
    go_on(layout)
    finished = factories.contents(cache)
    expected = undisturbed(layout)
    assert finished.keys() == expected.keys()
    differ = {name for name in finished if finished[name] != expected[name]}
    # The source's location is part of the plans and the manifests.
    assert {name.rpartition("/")[2] for name in differ} == {"plan.json", "manifest.json"}


def test_of_two_layers_the_order_in_the_command_does_not_matter(tmp_path, inputs):
    images, (fine, coarse) = inputs
    third, *_ = further(tmp_path, inputs)
    out = tmp_path / "cache"
    builds.build_here(builds.options_of(images, [fine, coarse, third], out))
    before = factories.contents(out)
    builds.build_here(builds.options_of(images, [fine, third, coarse], out))
    assert factories.contents(out) == before
