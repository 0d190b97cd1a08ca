"""Every Python block of the documents is run, in the order of its page, and prints what it should.

A page that is not in `RUNS`, or has more blocks than the table tells of, fails.
"""

import re
from importlib.util import find_spec
from typing import NamedTuple

import pytest

from tests.documents.blocks import blocks_of, texts_of
from tests.documents.pages import PAGES

SERVICE = "http://127.0.0.1:8000"  # of the pages; a test's is on a port that is free


class Run(NamedTuple):
    """How the blocks of one page are run."""

    place: str | None  # the fixture that makes what they find; it may return names for them
    prints: list[str]  # by each block, as a regular expression


RUNS = {
    "README.md": Run(
        "with_a_service",
        [
            r"\(4, 4\) uint16 \w{64}\n0 \[\[[\d\s\[\]]+\]\]\n"
            r"1 b\.jpg cannot be read: No such file or directory\n"
        ],
    ),
    "caches.md": Run("among_caches", [r"a/000 0 \(2, 5\) \(2, 4, 4\)\n"]),
    "formats.md": Run(
        "in_the_repository",
        [r"a/000 \(3, 4, 4\) uint16\n([ab]/\S+ \(3, 4, 4\) uint16\n){3}"],
    ),
    "interoperation.md": Run(
        "among_caches",
        [
            r"a/000 \d+ \(2, 4, 4\) \[ ?0 +8 +48 +48 +0\] 0\n",
            r"000000 10 \(10, 2, 4, 4\) uint16\n000001 10 \(10, 2, 4, 4\) uint16\n"
            r"000002 4 \(4, 2, 4, 4\) uint16\n",
            r"torch\.Size\(\[8, 3, 16, 16\]\) torch\.Size\(\[8, 16\]\) torch\.Size\(\[8\]\)\n",
            r"(.*\n)*a/000 \(64, 48\) 0\n",
            r"a/000\n",
            r"24 a/000 \(2, 4, 4\)\n",
            r"loss (?P<first>[\d.]+) -> (?P<last>[\d.]+)\n",
            r"24 \(16, 16, 3\) \(4, 4\)\n",
            r"loss (?P<first>[\d.]+) -> (?P<last>[\d.]+)\n",
            r"True\n",
        ],
    ),
    "service-client.md": Run(
        "with_a_service",
        [
            r"\(4, 4\) uint16\nTrue\n",
            r"View\(top=0, left=0, height=32, width=32, hflip=True\)\nTrue True\n\(1, 16, 192\)\n",
            r"0 \[.*\]\n1 \[.*\]\n2 The picture is refused: .* \(not-an-image\)\n",
            r"0 True\n1 True\n",
            r"not-an-image 415\nThe service does not answer:\n",
        ],
    ),
    "tokenizers.md": Run(None, [r""]),  # a plugin; tests/test_plugin_route.py takes it as one
}
NEEDS = {("interoperation.md", 8): "mmpretrain"}
"""Blocks, counted from 0, that run only where their library is installed.

MMPretrain's last release is of January 2024; development does not install it.
"""
WITH_PYTHON = [page for page in PAGES if texts_of(page, "python")]


@pytest.mark.filterwarnings("default")  # of other tools, which we cannot mend
@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_python_runs_as_it_stands_and_prints_what_it_should(page, request, capsys, subtests):
    assert page.name in RUNS, f"RUNS does not tell where the blocks of {page.name} run"
    run = RUNS[page.name]
    names = {"__name__": page.stem}
    if run.place:
        names |= request.getfixturevalue(run.place) or {}
    blocks = [block for block in blocks_of(page) if block.language == "python"]
    for number, (block, printed) in enumerate(zip(blocks, run.prints, strict=True)):
        library = NEEDS.get((page.name, number))
        if library and find_spec(library) is None:
            with subtests.test(block.where):
                pytest.skip(f"{library} is not installed")
            continue
        text = block.text.replace(SERVICE, names.get("URL", SERVICE))
        exec(compile(text, block.where, "exec"), names)
        found = re.fullmatch(printed, out := capsys.readouterr().out)
        assert found, f"{block.where} printed:\n{out}"
        if "first" in found.groupdict():
            assert float(found["last"]) < float(found["first"])
    for name in names.keys() & {"client", "impatient"}:  # a page leaves them open
        names[name].close()


def test_the_table_tells_of_pages_that_are_there():
    assert RUNS.keys() == {page.name for page in WITH_PYTHON}
