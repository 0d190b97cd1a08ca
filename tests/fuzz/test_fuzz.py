"""Damaged files of every format: a few inputs each; `make fuzz` reads a hundred thousand.

What the harness itself must notice is tested with readers that do it wrong.
"""

import ctypes
import time
from pathlib import Path

import numpy as np
import pytest

from cache_builder.errors import ArtifactError
from tests.fuzz import formats, worker
from tests.fuzz.__main__ import fuzz
from tests.fuzz.formats import FORMATS, Format

NUM_INPUTS = 40


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_is_an_error_of_ours_or_reads_as_what_was_written(tmp_path, name):
    row = fuzz(FORMATS[name], tmp_path, range(NUM_INPUTS), seed=1)
    assert row.kinds.total() == NUM_INPUTS
    assert row.failures == []


def write(folder):
    (folder / "file.txt").write_bytes(bytes(range(200)))


def planted(read):
    """Return a format whose reader looks at one byte: nobody has damaged it, or it goes wrong."""

    def look(folder: Path):
        path = folder / "file.txt"
        data = path.read_bytes() if path.exists() else b""
        return "right" if data == bytes(range(200)) else read(path)

    return Format("planted", write, look, ("*.txt",), 1)


def crash(path):
    ctypes.string_at(0)


def hang(path):
    time.sleep(1000)


def take_memory(path):
    return np.ones(1 << 28).sum()


def raise_another(path):
    raise KeyError(path.name)


def say_nothing_useful(path):
    raise ArtifactError("invalid file")


def advise_nothing(path):
    raise ArtifactError(f"{path} is bad.")


def answer_wrongly(path):
    return "wrong"


@pytest.mark.parametrize(
    ("read", "found"),
    [
        (crash, "ended the process"),
        (hang, "hung"),
        (take_memory, "MemoryError"),
        (raise_another, "KeyError"),
        (say_nothing_useful, "names no file"),
        (advise_nothing, "does not say what to do"),
        (answer_wrongly, "another answer, and nothing says so"),
    ],
)
def test_what_must_not_be_is_found_with_the_number_of_its_input(tmp_path, monkeypatch, read, found):
    monkeypatch.setitem(FORMATS, "planted", planted(read))
    monkeypatch.setattr(worker, "MAX_SECONDS", 0.3)
    monkeypatch.setattr(worker, "START", "fork")
    row = fuzz(FORMATS["planted"], tmp_path, range(3), seed=0)
    assert row.kinds == {"failure": 3}
    assert [failure.number for failure in row.failures] == [0, 1, 2]
    assert all(found in failure.detail for failure in row.failures), row.failures


def test_an_input_is_the_same_for_the_same_seed_and_number(tmp_path):
    form = planted(answer_wrongly)
    write(tmp_path)
    whole = {path: path.read_bytes() for path in form.files(tmp_path)}
    first, again, other = (worker.draw(form, whole, seed, 7) for seed in (0, 0, 1))
    assert first == again != other


def test_every_format_has_a_share_and_files_to_damage(tmp_path):
    for number, form in enumerate(formats.FORMATS.values()):
        assert form.share > 0
        if "golden" in form.make.__qualname__:
            folder = tmp_path / str(number)
            folder.mkdir()
            form.make(folder)
            assert form.files(folder), form.name
