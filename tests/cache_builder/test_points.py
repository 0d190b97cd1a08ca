"""Points are read in any order and in blocks, and are never put into one array."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from cache_builder.points import PointSet


def arrays(dtype=np.uint8, sizes=(3, 0, 1, 5), dim=4):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 100, (size, dim)).astype(dtype) for size in sizes]


def stored(folder, parts):
    """Write arrays as .npy files and return them as memory maps."""
    for number, part in enumerate(parts):
        np.save(folder / f"{number}.npy", part)
    return [np.load(folder / f"{n}.npy", mmap_mode="r" if len(p) else None)
            for n, p in enumerate(parts)]  # fmt: skip


@pytest.mark.parametrize(
    ("stored_as", "read_as"),
    [
        (np.uint8, torch.uint8),
        (np.int16, torch.int16),
        (np.float16, torch.float32),
        (np.float32, torch.float32),
    ],
)
def test_every_row_is_read_from_memory_and_from_files_alike(tmp_path, stored_as, read_as):
    parts = arrays(stored_as)
    whole = torch.from_numpy(np.concatenate(parts)).to(read_as)
    for points in (PointSet(parts), PointSet(stored(tmp_path, parts))):
        assert (len(points), points.dim, points.dtype) == (9, 4, read_as)
        for start in range(10):
            for stop in range(start, 10):
                block = points.read(start, stop)
                assert block.dtype == read_as
                assert torch.equal(block, whole[start:stop])


def test_rows_are_gathered_in_any_order_and_repeatedly(tmp_path):
    parts = arrays(np.float16)
    whole = torch.from_numpy(np.concatenate(parts)).float()
    points = PointSet(stored(tmp_path, parts))
    for indices in ([], [8], [8, 0, 3, 3, 2, 8, 4], list(range(9))):
        chosen = torch.tensor(indices, dtype=torch.int64)
        assert torch.equal(points.gather(chosen), whole[chosen])


@pytest.mark.parametrize("rows", [1, 2, 4, 9, 100])
def test_blocks_follow_one_another_and_cover_the_set(rows):
    parts = arrays()
    blocks = list(PointSet(parts).blocks(rows))
    assert [start for start, _ in blocks] == list(range(0, 9, rows))
    assert all(len(block) == rows for _, block in blocks[:-1])
    assert torch.equal(torch.cat([b for _, b in blocks]), torch.from_numpy(np.concatenate(parts)))


def test_a_tensor_is_wrapped_and_not_copied():
    tensor = torch.arange(12, dtype=torch.float32).view(4, 3)
    points = PointSet.of(tensor)
    assert points.read(1, 3).data_ptr() == tensor[1].data_ptr()
    assert torch.equal(PointSet.of(tensor.numpy()).read(0, 4), tensor)


def test_an_empty_set_has_a_width():
    points = PointSet.of(torch.empty(0, 5))
    assert (len(points), points.dim) == (0, 5)
    assert points.read(0, 0).shape == points.gather(torch.empty(0, dtype=torch.int64)).shape
    assert list(points.blocks(2)) == []


def peak_bytes():
    """Return the most memory that this process has had since `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) << 10


def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")


def test_points_on_disk_do_not_fill_the_memory(tmp_path):
    path = tmp_path / "points.npy"
    file = np.lib.format.open_memmap(path, "w+", np.float16, (1 << 16, 512))
    file[:, 0] = 1
    file.flush()
    del file
    points = PointSet([np.load(path, mmap_mode="r")] * 8)  # 512 MiB, 1 GiB as float32
    forget_peak()
    before = peak_bytes()
    total = sum(float(block[:, 0].sum()) for _, block in points.blocks(1 << 13))
    points.gather(torch.randint(len(points), (1000,)))
    assert total == 8 << 16
    # The 64 MiB of the file may stay mapped.
    assert peak_bytes() - before < 256 << 20


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "needs at least one array"),
        ([np.zeros((2, 3))], "not float64"),
        ([np.zeros(3, np.uint8)], "do not fit together"),
        ([np.zeros((2, 3), np.uint8), np.zeros((2, 4), np.uint8)], "do not fit together"),
        ([np.zeros((2, 3), np.uint8), np.zeros((2, 3), np.int16)], "do not fit together"),
    ],
)
def test_arrays_that_are_no_points_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        PointSet(parts)


def test_rows_that_do_not_exist_are_refused():
    points = PointSet(arrays())
    for start, stop in ((0, 10), (-1, 3), (5, 4)):
        with pytest.raises(IndexError, match="of 9 points do not exist"):
            points.read(start, stop)
    for index in (-1, 9):
        with pytest.raises(IndexError, match="do not fit 9 points"):
            points.gather(torch.tensor([0, index]))
    with pytest.raises(ValueError, match="1 row or more, not 0"):
        next(points.blocks(0))
