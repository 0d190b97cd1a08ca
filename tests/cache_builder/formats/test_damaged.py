"""Damage that a reader of a cache notices by itself, and damage that `verify` is there for."""

import io
import json
import os
import shutil
import tarfile

import numpy as np
import pytest

from cache_builder import verify
from cache_builder.errors import ArtifactError
from cache_builder.formats import Codebook, TokenCache
from cache_builder.formats.manifest import FileDigest
from cache_builder.formats.sample import from_npy, npy_bytes
from cache_builder.formats.shards import read_shard
from cache_builder.ray_cluster import ClusterOptions
from cache_builder.stores import LocalStore
from tests import factories
from tests.golden.test_golden import V1
from tests.trainer.caches import make_cache

HERE = ClusterOptions(num_workers=0)


@pytest.fixture(params=["webdataset", "zarr"])
def cache(request, tmp_path):
    return make_cache(tmp_path, num_images=4, layout=request.param)


@pytest.fixture
def tar_cache(tmp_path):
    return shutil.copytree(V1 / "webdataset", tmp_path / "cache")


def edit(path, change):
    """Change a JSON file, and write it as patchcache does."""
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree, sort_keys=True, separators=(",", ":")) + "\n")


def read_all(cache):
    with TokenCache.open(cache) as opened:
        return list(opened)


def replace(path, old, new):
    """Replace bytes by as many others, once."""
    data = path.read_bytes()
    assert len(old) == len(new)
    assert old in data
    path.write_bytes(data.replace(old, new, 1))


def npy_with(shape=(2, 2), order=False, descr="<u2", values=4):
    header = {"descr": descr, "fortran_order": order, "shape": shape}
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + bytes(2 * values)


@pytest.mark.parametrize(
    "data",
    [
        npy_with(shape=(1 << 40, 1 << 20)),
        npy_with(shape=(3, 3)),
        npy_with(values=5),
        npy_with(order=True),
        npy_with(descr="|O"),
        npy_bytes(np.zeros(4, np.uint16)).replace(b"{", b"("),
        npy_bytes(np.zeros(4, np.uint16)).replace(b"False", b"\0\0\0\0\0"),
        b"\x93NUMPY\x09\x00",
        b"",
    ],
)
def test_an_array_whose_header_lies_is_refused_before_memory_is_taken(data):
    with pytest.raises(ArtifactError, match=r"x is damaged \(.*\). Run `patchcache verify`"):
        from_npy(data, "x")


def test_an_array_that_was_read_may_be_written_to():
    array = from_npy(npy_bytes(np.arange(4)), "x")
    array[0] = 7


def test_a_file_that_a_record_places_beyond_its_end_takes_no_memory(tmp_path):
    (tmp_path / "file").write_bytes(b"0123")
    reader = LocalStore(tmp_path).open("file")
    for start, size in ((1, 1 << 60), (1 << 70, 1), (4, 1)):
        assert reader.read(start, size) == b"0123"[start : start + size]
    reader.close()


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", "a/../../b", "a\0b", "", "x" * 600])
def test_a_digest_names_no_file_outside_of_its_cache(path):
    with pytest.raises(ValueError, match="no name of a file of a cache"):
        FileDigest(path=path, bytes=0, sha256="")


def test_a_folder_is_no_file_of_a_cache(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    store = LocalStore(tmp_path)
    for name in ("folder", "file/below"):
        for ask in (store.read, store.measure):
            with pytest.raises(FileNotFoundError):
                ask(name)


@pytest.mark.parametrize("name", ["num_samples", "num_skipped"])
def test_totals_that_are_not_those_of_the_shards_are_refused(tar_cache, name):
    edit(tar_cache / "manifest.json", lambda tree: tree.update({name: 99}))
    with pytest.raises(ArtifactError, match=rf"{name} is 99, and its shards have \d.*--repair"):
        TokenCache.open(tar_cache)


def test_payloads_of_any_length_are_refused_in_a_line_that_can_be_read(tar_cache):
    edit(tar_cache / "manifest.json", lambda tree: tree["payloads"].append("9" * 5000))
    expected = r"payloads are tokens, views, image, 9{50,300}\.\.\., and by its settings tokens"
    with pytest.raises(ArtifactError, match=expected):
        TokenCache.open(tar_cache)


def test_verify_tells_of_a_shard_whose_name_no_file_can_have(tar_cache):
    record = tar_cache / "units" / "000000.json"
    name = record.read_text().replace("shards/000000.tar", f"shards/{'0' * 300}.tar")
    record.write_text(name)
    report = verify.run(str(tar_cache), cluster=HERE)
    assert report.problems
    assert all(len(problem) < 2000 for problem in report.problems)


@pytest.mark.parametrize(
    ("name", "value"), [("unit_size", 3), ("vocab_size", 7), ("fingerprint", "0" * 64)]
)
def test_settings_that_are_not_those_of_the_plan_are_refused(tar_cache, name, value):
    edit(tar_cache / "manifest.json", lambda tree: tree["spec"].update({name: value}))
    with pytest.raises(ArtifactError, match=rf"{name} is not that of plan.json\. Run.*--repair"):
        TokenCache.open(tar_cache)


def test_two_samples_whose_places_were_exchanged_in_a_record_are_refused(tar_cache):
    def exchange(tree):
        first, second = tree["samples"][:2]
        first["members"], second["members"] = second["members"], first["members"]

    edit(tar_cache / "units/000000.json", exchange)
    with pytest.raises(ArtifactError, match=r"units/000000.json has SHA-256 .*--repair"):
        read_all(tar_cache)


def test_an_id_that_is_not_below_k_is_refused_by_key(tar_cache):
    with TokenCache.open(tar_cache) as opened:
        sample = opened[0]
    replace(
        tar_cache / "shards/000000.tar",
        sample.token_ids.tobytes(),
        np.full_like(sample.token_ids, 6).tobytes(),
    )
    with pytest.raises(ArtifactError, match=rf"token id 6 of {sample.key} is not below K=6"):
        read_all(tar_cache)
    with TokenCache.open(tar_cache) as opened, pytest.raises(ArtifactError, match="id 6 of shard"):
        opened.columns(0)


@pytest.mark.parametrize("name", ["tokens", "views", "labels", "keys"])
def test_a_changed_chunk_of_a_small_zarr_array_is_refused_by_its_digest(tmp_path, name):
    cache = make_cache(tmp_path, num_images=4, layout="zarr")
    chunk = next(path for path in (cache / f"tokens.zarr/{name}/c").rglob("*") if path.is_file())
    factories.flip_byte(chunk)
    with pytest.raises(ArtifactError, match=rf"tokens.zarr/{name}/c.* has SHA-256 .*verify"):
        read_all(cache)


def test_changed_metadata_of_a_zarr_group_is_refused_by_its_digest(tmp_path):
    cache = make_cache(tmp_path, num_images=4, layout="zarr")
    edit(cache / "tokens.zarr/tokens/zarr.json", lambda tree: tree["shape"].__setitem__(0, 1 << 40))
    with pytest.raises(ArtifactError, match=r"tokens/zarr.json has .*expected.*verify"):
        read_all(cache)


def test_a_layer_that_is_not_the_one_that_the_manifest_describes_is_refused(tmp_path):
    other = factories.write_codebook(tmp_path / "o.safetensors", colours=factories.COLOURS[::-1])
    cache = make_cache(tmp_path, num_images=4, further_codebooks=(other,))
    edit(cache / "manifest.json", lambda tree: tree["layers"][0].update(first_view=5))
    with pytest.raises(ArtifactError, match=r"describes layer .*--repair"):
        TokenCache.open(cache, Codebook.load(other).fingerprint)


@pytest.mark.parametrize(
    "info",
    [b"[]", b'{"height": 4}', b'{"height":-1,"source":"","width":1}', b"[" * 5000,
     b'{"height":1,"label":"x","source":"","width":1}', b"\xff"],
)  # fmt: skip
def test_the_description_of_a_sample_has_the_fields_and_types_that_it_should(tmp_path, info):
    members = {
        "json": info,
        "tokens.npy": npy_bytes(np.zeros(1)),
        "views.npy": npy_bytes(np.eye(1)),
    }
    path = factories.write_tar(
        tmp_path / "s.tar", ((f"a.{name}", data) for name, data in members.items())
    )
    with pytest.raises(ArtifactError, match=r"a\.json is damaged \(.*\)\. Run `patchcache verify`"):
        list(read_shard(path))


def test_a_link_in_a_tar_is_no_member_of_a_sample(tmp_path):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("a.json")
        link.type, link.linkname = tarfile.LNKTYPE, "nowhere"
        tar.addfile(link)
    assert list(read_shard(path)) == []


def test_a_tar_whose_header_promises_more_than_there_is_takes_no_memory(tmp_path):
    path = factories.write_tar(tmp_path / "s.tar", [("a.json", b"{}")])
    header = tarfile.TarInfo("a.json")
    header.size = 1 << 40
    path.write_bytes(header.tobuf() + path.read_bytes()[512:])
    with pytest.raises(ArtifactError, match=r"not a whole tar \(cut short or damaged at byte 0\)"):
        list(read_shard(path))


@pytest.mark.parametrize("num_bytes", [b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f"])
def test_a_chunk_that_promises_more_or_less_than_there_can_be_is_refused(tmp_path, num_bytes):
    cache = shutil.copytree(V1 / "payloads" / "zarr", tmp_path / "cache")
    chunk = cache / "tokens.zarr/soft_probs/c/0/0/0/0/0"
    data = bytearray(chunk.read_bytes())
    data[4:8] = num_bytes  # of the first chunk in the shard, inflated
    chunk.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"unit 0 cannot be read \(.*\)\. Run"):
        read_all(cache)


def test_other_ids_below_k_read_as_they_lie_and_verify_says_so(cache):
    """What only `verify` notices, of tars: their members have no digests of their own."""
    with TokenCache.open(cache) as opened:
        layout, ids = opened.manifest.spec.layout, opened[0].token_ids
    if layout == "zarr":
        factories.flip_byte(cache / "tokens.zarr/images/000000/c/0")
    else:
        replace(cache / "shards/000000.tar", ids.tobytes(), ((ids + 1) % 6).tobytes())
        assert np.array_equal(read_all(cache)[0].token_ids, (ids + 1) % 6)
    (damage,) = verify.run(cache, cluster=HERE).damages
    assert damage.kind == "changed"
    assert damage.file in ("shards/000000.tar", "tokens.zarr/images/000000/c/0")


def test_the_answer_to_any_damaged_codebook_says_to_copy_it_again(tmp_path):
    data = (V1 / "codebook.safetensors").read_bytes()
    path = tmp_path / "codebook.safetensors"
    for changed in (data[:-1], data.replace(b'"l2', b'"l3'), data.replace(b"version", b"verzion")):
        path.write_bytes(changed)
        with pytest.raises(ArtifactError, match=r"Copy it again from its source\.$"):
            Codebook.load(path)


def test_what_a_damaged_file_says_is_shortened_to_one_readable_line(tmp_path):
    path = tmp_path / "codebook.safetensors"
    data = (V1 / "codebook.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    fields = json.loads(header["__metadata__"]["patchcache"])
    fields["\n" + "x" * 5000] = 1
    header["__metadata__"]["patchcache"] = json.dumps(fields)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(ArtifactError, match="header is damaged") as refused:
        Codebook.load(path)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 600 + len(os.fspath(path))
