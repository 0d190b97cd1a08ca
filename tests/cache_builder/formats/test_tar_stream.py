"""The tars are those that Python's tarfile would write, byte for byte."""

import io
import tarfile

import pytest

from cache_builder.formats.tar_stream import TarStream

NAMES = ["a", "b/" + "n" * 98, "c/" + "n" * 99, "d/" + "long" * 60, "e/\u00e9.jpg", "f.tokens.npy"]


def written(members):
    file = io.BytesIO()
    tar = TarStream(file)
    starts = tar.add(dict(members[:2])) + tar.add(dict(members[2:]))
    tar.finish()
    assert tar.offset == len(file.getvalue())
    return file.getvalue(), starts


def by_tarfile(members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o444
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 100_000])
def test_a_tar_has_the_bytes_of_tarfile(size):
    members = [(name, bytes([number]) * size) for number, name in enumerate(NAMES)]
    content, starts = written(members)
    assert content == by_tarfile(members)
    for start, (_, data) in zip(starts, members, strict=True):
        assert content[start : start + size] == data


def test_a_tar_without_members_has_the_bytes_of_tarfile():
    assert written([])[0] == by_tarfile([])
