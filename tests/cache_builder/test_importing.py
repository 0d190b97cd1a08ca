"""Token ids of other tools become caches: found by key, checked, and used for what ids can do."""

import json

import numpy as np
import pytest
import torch

from cache_builder import extend, importing, transform, verify
from cache_builder.codebook_export import export_codebook
from cache_builder.errors import ArtifactError, ConfigError
from cache_builder.formats import TokenCache
from cache_builder.importing import ImportOptions
from cache_builder.ray_cluster import ClusterOptions
from cache_builder.tokenizers import PatchTokenizer
from tests import factories
from tests.trainer.caches import tiny_config
from trainer import train

HERE = ClusterOptions(num_workers=0)
K = 50
NAMES = [f"{'ab'[i % 2]}/{i:03d}" for i in range(12)]


@pytest.fixture
def images(tmp_path):
    return factories.write_folder(tmp_path / "images", factories.photo_images(12))


def drawn_ids(*shape, seed=0, high=K):
    return np.random.default_rng(seed).integers(0, high, shape)


def options(tmp_path, images, tokens, **changes):
    fields = {
        "tokens": tmp_path / tokens, "images": str(images), "out": str(tmp_path / "cache"),
        "tokenizer": "dalle-v1", "vocab_size": K, "image_size": 16, "patch_size": 4,
        "unit_size": 5, "cluster": HERE,
    }  # fmt: skip
    return ImportOptions(**(fields | changes))


def write_keys(path, names=NAMES):
    path.write_text("".join(f"{name}.jpg\n" for name in names))
    return path


def samples_of(place):
    with TokenCache.open(place) as cache:
        return {sample.key: sample for sample in (cache[i] for i in range(len(cache)))}


def saved_4m(tmp_path, num_views=3):
    """Write ids and boxes as 4M's token saver does, one file per image, and return both."""
    ids = {name: drawn_ids(num_views, 16, seed=i) for i, name in enumerate(NAMES)}
    boxes = {}
    for i, name in enumerate(NAMES):
        rng = np.random.default_rng(100 + i)
        height, width = rng.integers(8, 48, num_views), rng.integers(8, 64, num_views)
        top, left = rng.integers(0, 49 - height), rng.integers(0, 65 - width)
        boxes[name] = np.stack([top, left, height, width, rng.integers(0, 2, num_views)], 1)
        for folder, array in (("tok_rgb", ids[name]), ("crop_settings", boxes[name])):
            path = tmp_path / folder / f"{name}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, array)
    return ids, boxes


@pytest.mark.parametrize("layout", ["webdataset", "zarr"])
def test_a_folder_of_4m_becomes_a_cache_with_its_boxes(tmp_path, images, layout):
    ids, boxes = saved_4m(tmp_path)
    summary = importing.run(
        options(
            tmp_path, images, "tok_rgb", crop_settings=tmp_path / "crop_settings", num_views=3,
            layout=layout,
        )
    )  # fmt: skip
    assert summary.manifest.num_samples == 12
    found = samples_of(tmp_path / "cache")
    for name in NAMES:
        assert np.array_equal(found[name].token_ids, ids[name].reshape(3, 4, 4))
        assert np.array_equal(found[name].views, boxes[name])
        assert found[name].label == "ab".index(name[0])
    assert verify.run(tmp_path / "cache", cluster=HERE).problems == []
    # The same command finds everything done, and other caches are made of this one.
    transform.convert(
        transform.ConvertOptions(
            str(tmp_path / "cache"), str(tmp_path / "copy"),
            "zarr" if layout == "webdataset" else "webdataset", cluster=HERE,
        )
    )  # fmt: skip
    assert verify.run(tmp_path / "copy", cluster=HERE).problems == []


def test_a_stopped_import_goes_on_with_the_same_command(tmp_path, images):
    saved_4m(tmp_path, num_views=1)
    wanted = options(tmp_path, images, "tok_rgb")
    importing.run(wanted)
    before = factories.contents(tmp_path / "cache")
    (tmp_path / "cache" / "manifest.json").unlink()
    (tmp_path / "cache" / "units" / "000001.json").unlink()
    assert importing.run(wanted).num_units_kept == 2
    assert factories.contents(tmp_path / "cache") == before


def test_rows_are_joined_by_the_list_of_keys_and_not_by_order(tmp_path, images):
    ids = drawn_ids(12, 16)
    torch.save(torch.from_numpy(ids), tmp_path / "mapet.pth")
    order = [7, 3, 11, 0, 5, 1, 9, 2, 10, 4, 8, 6]
    keys = write_keys(tmp_path / "keys.txt", [NAMES[i] for i in order])
    importing.run(options(tmp_path, images, "mapet.pth", keys=keys))
    found = samples_of(tmp_path / "cache")
    for row, i in enumerate(order):
        assert np.array_equal(found[NAMES[i]].token_ids[0].ravel(), ids[row])
        # The largest centred square of 48 x 64 pixels.
        assert found[NAMES[i]].views.tolist() == [[0, 8, 48, 48, 0]]


def test_keys_come_as_text_table_or_json_and_an_array_as_npy_or_by_name(tmp_path, images):
    ids = drawn_ids(12, 4, 4).astype(np.int32)
    np.save(tmp_path / "ids.npy", ids)
    named = {f"{name}.jpg": torch.from_numpy(ids[i]) for i, name in enumerate(NAMES)}
    torch.save(named, tmp_path / "named.pt")
    write_keys(tmp_path / "keys.txt")
    rows = "".join(f"{name},{i}\n" for i, name in enumerate(NAMES))
    # As spreadsheets write it: `key` first, behind a byte order mark.
    (tmp_path / "keys.csv").write_text(f"key,row\n{rows}", encoding="utf-8-sig")
    (tmp_path / "keys.json").write_text(json.dumps(NAMES))
    caches = []
    for number, (tokens, keys) in enumerate(
        [("ids.npy", "txt"), ("ids.npy", "csv"), ("ids.npy", "json"), ("named.pt", None)]
    ):
        out = tmp_path / f"cache{number}"
        path = tmp_path / f"keys.{keys}" if keys else None
        importing.run(options(tmp_path, images, tokens, keys=path, out=str(out)))
        caches.append(factories.contents(out))
    assert all(cache == caches[0] for cache in caches)


def test_boxes_of_resized_pictures_are_those_of_their_centre(tmp_path, images):
    saved_4m(tmp_path, num_views=1)
    importing.run(options(tmp_path, images, "tok_rgb", resized_short_side=24))
    # 16 of 24 pixels are 32 of 48.
    views = {tuple(sample.views[0].tolist()) for sample in samples_of(tmp_path / "cache").values()}
    assert views == {(8, 16, 32, 32, 0)}
    assert verify.run(tmp_path / "cache", cluster=HERE).problems == []


def test_images_without_good_ids_are_left_out_with_the_reason(tmp_path, images):
    saved_4m(tmp_path, num_views=1)
    folder = tmp_path / "tok_rgb"
    np.save(folder / "a/000.npy", np.array([{"a": 1}], object), allow_pickle=True)
    np.save(folder / "a/002.npy", drawn_ids(16).astype(float))
    np.save(folder / "a/004.npy", drawn_ids(15))
    np.save(folder / "a/006.npy", np.full(16, K))
    np.save(folder / "a/008.npy", np.full(16, -1))
    whole = (folder / "a/010.npy").read_bytes()
    (folder / "a/010.npy").write_bytes(whole.replace(b"(1, 16)", b"(9, 16)"))
    (folder / "b/001.npy").unlink()
    (folder / "b/003.npy").write_bytes(whole[:-20])
    (folder / "b/005.npy").write_bytes(b"")
    (images / "b/007.jpg").write_bytes(b"no image")
    manifest = importing.run(options(tmp_path, images, "tok_rgb")).manifest
    assert (manifest.num_samples, manifest.num_skipped) == (2, 10)
    lines = (tmp_path / "cache" / "skipped.jsonl").read_text().splitlines()
    reasons = {line["key"]: line["reason"] for line in map(json.loads, lines)}
    for key, expected in {
        "a/000": "cannot be read as a .npy file",
        "a/002": "token ids are float64, not integers",
        "a/004": "token ids have the shape (15,), not (1, 16)",
        "a/006": "token id 50 is not in [0, 50)",
        "a/008": "token id -1 is not in [0, 50)",
        "a/010": "cannot be read as a .npy file",
        "b/001": "001.npy is not there",
        "b/003": "cannot be read as a .npy file",
        "b/005": "cannot be read as a .npy file",
    }.items():
        assert expected in reasons[key]
    assert verify.run(tmp_path / "cache", cluster=HERE).problems == []


class _Harmful:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_a_file_that_could_run_code_is_refused_and_does_not(tmp_path, images, capsys):
    torch.save(_Harmful(), tmp_path / "harmful.pth")
    keys = write_keys(tmp_path / "keys.txt")
    with pytest.raises(ConfigError, match="holds more than tensors, and nothing else is loaded"):
        importing.run(options(tmp_path, images, "harmful.pth", keys=keys))
    assert "never" not in capsys.readouterr().out
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("content", [b"", b"PK\3\4 no zip", b"\x80\x02}q\x00.", b"text"])
def test_damaged_tensor_files_are_refused(tmp_path, images, content):
    (tmp_path / "ids.pth").write_bytes(content)
    with pytest.raises(ConfigError, match=r"ids\.pth (cannot be read|holds)"):
        importing.run(options(tmp_path, images, "ids.pth"))


def test_two_tensors_of_one_image_are_refused(tmp_path, images):
    named = {
        f"a/000.{extension}": torch.zeros(16, dtype=torch.int64) for extension in ("jpg", "png")
    }
    torch.save(named, tmp_path / "ids.pt")
    with pytest.raises(ConfigError, match=r"ids\.pt names 'a/000' twice"):
        importing.run(options(tmp_path, images, "ids.pt"))


def test_keys_and_rows_that_do_not_fit_are_refused(tmp_path, images):
    np.save(tmp_path / "ids.npy", drawn_ids(12, 16))
    saved_4m(tmp_path, num_views=1)
    keys = tmp_path / "keys.txt"

    def refused(match, tokens="ids.npy", **changes):
        with pytest.raises(ConfigError, match=match):
            importing.run(options(tmp_path, images, tokens, **changes))

    refused(r"rows without names. Say with --keys")
    np.save(tmp_path / "boxes.npy", np.zeros((12, 1, 5), np.int32))
    refused(r"boxes\.npy has rows without names", "tok_rgb",
            crop_settings=tmp_path / "boxes.npy")  # fmt: skip
    refused(r"12 rows, and --keys .* names 11 images", keys=write_keys(keys, NAMES[1:]))
    refused(r"1 of the 12 keys .* 'a/999'", keys=write_keys(keys, ["a/999", *NAMES[1:]]))
    refused(r"names 'b/001' twice", keys=write_keys(keys, ["b/001", *NAMES[1:]]))
    refused(r"has names of its own", "tok_rgb", keys=write_keys(keys))
    refused(r"no column named `key`", keys=factories.write_folder(
        tmp_path, {"keys.csv": b"image\na\n"}) / "keys.csv")  # fmt: skip
    refused(r"boxes of several views are not known", "tok_rgb", num_views=2)
    refused(r"does not fit into a picture", "tok_rgb", resized_short_side=8)
    refused(r"is no name", "tok_rgb", tokenizer="a b")
    refused(r"not a multiple of patch size", "tok_rgb", patch_size=5)
    assert not (tmp_path / "cache").exists()


def test_ids_are_trained_on_and_what_needs_more_is_refused(tmp_path, images):
    saved_4m(tmp_path, num_views=1)
    importing.run(options(tmp_path, images, "tok_rgb", resized_short_side=24))
    place = tmp_path / "cache"
    config = tiny_config(run={"steps": 3}, data={"batch_size": 4}, optim={"warmup_steps": 1})
    summary = train.run(config, place, tmp_path / "run")
    assert summary.steps == 3
    codebook = place / "codebook.safetensors"
    dtm = tiny_config(objective={"method": "dtm", "source": "centroids"})
    refused = r"foreign:dalle-v1 (were imported|come without|stand for no vectors: they were)"
    for action in (
        lambda: PatchTokenizer.load(codebook),
        lambda: export_codebook(codebook, tmp_path / "a.npy"),
        lambda: verify.run(place, retokenize=1, cluster=HERE),
        lambda: train.run(dtm, place, tmp_path / "other"),
    ):
        with pytest.raises(ConfigError, match=refused):
            action()
    with pytest.raises(ConfigError, match="were given when it was imported"):
        extend.run(extend.ExtendOptions(str(place), num_views=2, cluster=HERE))


def test_a_damaged_shard_is_found_and_only_imported_again(tmp_path, images):
    saved_4m(tmp_path, num_views=1)
    importing.run(options(tmp_path, images, "tok_rgb"))
    before = factories.contents(tmp_path / "cache")
    factories.flip_byte(tmp_path / "cache" / "shards" / "000001.tar")
    report = verify.run(tmp_path / "cache", repair=True, cluster=HERE)
    assert any("000001.tar" in problem for problem in report.problems)
    assert any("were imported" in refusal for refusal in report.refused)
    importing.run(options(tmp_path, images, "tok_rgb"))
    assert factories.contents(tmp_path / "cache") == before


def test_what_an_import_says_to_run_next_suits_a_cache_of_few_images(tmp_path, images, patchcache):
    np.save(tmp_path / "ids.npy", drawn_ids(12, 16))
    done = patchcache(
        "import", tmp_path / "ids.npy", "--keys", write_keys(tmp_path / "keys.txt"), "--images",
        images, "--tokenizer", "dalle", "-k", K, "--image-size", 16, "--patch-size", 4, "--out",
        tmp_path / "cache", "--workers", 0,
    )  # fmt: skip
    assert done.status == 0, done.err
    assert done.out.endswith(" --set data.batch_size=12\n")


def test_not_one_image_with_ids_is_an_error_with_the_first_reason(tmp_path, images):
    (tmp_path / "tok_rgb").mkdir()
    with pytest.raises(ArtifactError, match=r"Not one of 12 images .*a/000\.npy is not there"):
        importing.run(options(tmp_path, images, "tok_rgb"))
