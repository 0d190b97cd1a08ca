"""A shard is a plain tar: any tar reader lists it, webdataset reads it, ours reads it at random."""

import io
import json
import subprocess
import tarfile

import numpy as np
import pytest

from cache_builder.errors import ArtifactError
from cache_builder.formats.manifest import FileDigest, UnitRecord
from cache_builder.formats.sample import CachedSample, NewSample, from_npy, npy_bytes
from cache_builder.formats.shards import ShardWriter, TarShard, read_shard
from cache_builder.stores import LocalStore
from tests import factories


def new_sample(key, *, image=b"image bytes", label=3, views=2, stages=()):
    rng = np.random.default_rng(len(key))
    token_ids = rng.integers(0, 65_535, (views, 4, 4, *stages)).astype(np.uint16)
    boxes = rng.integers(0, 9, (views, 5)).astype(np.int32)
    sample = CachedSample(key, image, label, boxes, token_ids)
    return NewSample(sample, "jpg" if image else "", f"{key}.JPEG", (30, 40))


SAMPLES = [
    new_sample("a/first"),
    new_sample("b/" + "long" * 60, image=b"x" * 512),
    new_sample("c", label=None),
    new_sample("d", image=b"y" * 513),
]


def assert_same(read, written):
    for a, b in zip(read, written, strict=True):
        assert (a.key, a.image, a.label) == (b.key, b.image, b.label)
        np.testing.assert_array_equal(a.views, b.views)
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
        assert a.token_ids.dtype == np.uint16


def write_shard(root, samples):
    """Write a tar below `root`; return its path and what the writer says of it."""
    with ShardWriter(LocalStore(root), 0) as writer:
        for sample in samples:
            writer.add(sample)
        return root / "shards/000000.tar", writer.finish()


@pytest.fixture
def shard(tmp_path):
    path, written = write_shard(tmp_path, SAMPLES)
    return path, list(written.samples)


def open_shard(path, entries):
    record = UnitRecord(unit=0, num_samples=len(entries), files=(), samples=tuple(entries))
    return TarShard(LocalStore(path.parent.parent), 0, record)


def test_what_is_written_is_read_by_walking_and_by_offset(shard):
    path, entries = shard
    written = [new.sample for new in SAMPLES]
    assert_same(list(read_shard(path)), written)
    tar = open_shard(path, entries)
    order = [2, 0, 3, 1, 0]
    assert_same([tar.read(row) for row in order], [written[row] for row in order])
    assert tar.keys == [sample.key for sample in written]
    assert len(tar) == 4
    tar.close()


def test_offsets_are_those_of_the_members(shard):
    path, entries = shard
    with tarfile.open(path) as tar:
        places = {m.name: (m.offset_data, m.size) for m in tar}
    ours = {f"{e.key}.{x}": place for e in entries for x, place in e.members.items()}
    assert ours == places


def test_tar_lists_it(shard):
    path, _ = shard
    done = subprocess.run(["tar", "tf", path], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.split()[:4] == [
        "a/first.jpg",
        "a/first.json",
        "a/first.tokens.npy",
        "a/first.views.npy",
    ]


# webdataset leaves the tar to the garbage collector.
@pytest.mark.filterwarnings("ignore:Exception ignored in.*FileIO")
def test_plain_webdataset_reads_it(shard):
    import webdataset

    path, _ = shard
    read = list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in read] == [new.sample.key for new in SAMPLES]
    for sample, new in zip(read, SAMPLES, strict=True):
        assert sample["jpg"] == new.sample.image
        token_ids = np.load(io.BytesIO(sample["tokens.npy"]))
        np.testing.assert_array_equal(token_ids, new.sample.token_ids)
    assert json.loads(read[0]["json"]) == {
        "height": 30,
        "label": 3,
        "source": "a/first.JPEG",
        "width": 40,
    }


def test_the_same_samples_give_the_same_bytes(shard, tmp_path):
    path, entries = shard
    again, written = write_shard(tmp_path / "again", SAMPLES)
    assert list(written.samples) == entries
    assert again.read_bytes() == path.read_bytes()


def test_the_digest_is_that_of_the_file(tmp_path):
    path, written = write_shard(tmp_path, SAMPLES)
    assert written.files == (FileDigest.of(LocalStore(tmp_path), "shards/000000.tar"),)
    assert path.stat().st_size == written.files[0].bytes


def test_a_sample_may_lack_its_image(tmp_path):
    sample = new_sample("a", image=None)
    path, written = write_shard(tmp_path, [sample])
    assert_same(list(read_shard(path)), [sample.sample])
    assert set(written.samples[0].members) == {"json", "tokens.npy", "views.npy"}


def test_a_shard_may_be_empty(tmp_path):
    path, written = write_shard(tmp_path, [])
    assert written.samples == ()
    assert list(read_shard(path)) == []


def test_residual_stages_are_one_more_axis(tmp_path):
    sample = new_sample("a", stages=(3,))
    path, _ = write_shard(tmp_path, [sample])
    (read,) = read_shard(path)
    assert read.token_ids.shape == (2, 4, 4, 3)


def test_when_the_samples_end_in_an_error_there_is_no_shard(tmp_path):
    def broken():
        yield SAMPLES[0]
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        write_shard(tmp_path, broken())
    assert list((tmp_path / "shards").iterdir()) == []


def test_a_writer_that_is_left_before_its_end_leaves_nothing(tmp_path):
    with ShardWriter(LocalStore(tmp_path), 0) as writer:
        writer.add(SAMPLES[0])
    assert list((tmp_path / "shards").iterdir()) == []


def test_a_shard_cut_anywhere_is_refused(shard):
    path, entries = shard
    content = path.read_bytes()
    stop = sum(entries[-1].members["views.npy"])
    for size in range(0, stop, 512):
        path.write_bytes(content[:size])
        with pytest.raises(ArtifactError):
            list(read_shard(path))
    tar = open_shard(path, entries)
    with pytest.raises(ArtifactError, match=r"ends before sample d.*patchcache verify"):
        tar.read(3)
    tar.close()


def test_a_damaged_member_header_is_refused(shard):
    path, entries = shard
    offset, _ = entries[2].members["json"]
    factories.flip_byte(path, offset - 500)
    with pytest.raises(ArtifactError, match=f"not a whole tar .*damaged at byte {offset - 512:,}"):
        list(read_shard(path))


def test_a_tar_without_targets_is_refused(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(ArtifactError, match=r"sample a has no json, tokens.npy, views.npy"):
        list(read_shard(tmp_path / "s.tar"))


def test_a_missing_shard_says_how_to_find_out_more(tmp_path):
    with pytest.raises(ArtifactError, match="patchcache verify"):
        open_shard(tmp_path / "cache" / "shards" / "000000.tar", [])


def test_a_damaged_array_is_refused():
    array = np.arange(6, dtype=np.uint16).reshape(2, 3)
    data = npy_bytes(array)
    np.testing.assert_array_equal(from_npy(data, "x"), array)
    for damaged in (b"", data[:5], data[:-1], b"\x93NUMPY" + data[7:]):
        with pytest.raises(ArtifactError, match=r"x is damaged"):
            from_npy(damaged, "x")


def test_an_array_of_python_objects_is_refused():
    buffer = io.BytesIO()
    np.save(buffer, np.array([{}], object), allow_pickle=True)
    with pytest.raises(ArtifactError, match="damaged"):
        from_npy(buffer.getvalue(), "x")
