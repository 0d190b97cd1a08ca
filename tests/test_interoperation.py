"""The page on other tools, run from top to bottom, and what it says printed."""

import re

import pytest

from tests import factories
from tests.places import ROOT
from tests.test_documents import code_blocks

PAGE = ROOT / "docs" / "interoperation.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the caches that the page names."""
    root = tmp_path_factory.mktemp("interoperation")
    images = factories.write_folder(root / "photos", factories.photo_images(24))
    codebook = factories.write_codebook(root / "codebook.safetensors")
    for out, layout in (("cache", "webdataset"), ("cache.zarr", "zarr")):
        factories.build_cache(
            images=str(images), codebook=codebook, out=root / out, num_views=2, layout=layout,
            unit_size=10,
        )  # fmt: skip
    return root


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of other tools, which we cannot mend
def test_the_page_on_other_tools_runs_as_it_is(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    names = {"__name__": "interoperation"}
    said = []
    for block in code_blocks(PAGE, "python"):
        exec(compile(block, PAGE.name, "exec"), names)
        said.append(capsys.readouterr().out)
    webdataset, zarr, torch, datasets, generator, litdata, timm, mmengine, faiss = said
    assert re.fullmatch(r"a/000 \d+ \(2, 4, 4\) \[ ?0 +8 +48 +48 +0\] 0\n", webdataset)
    assert zarr.splitlines() == [
        "000000 10 (10, 2, 4, 4) uint16", "000001 10 (10, 2, 4, 4) uint16",
        "000002 4 (4, 2, 4, 4) uint16",
    ]  # fmt: skip
    assert torch == "torch.Size([8, 3, 16, 16]) torch.Size([8, 16]) torch.Size([8])\n"
    assert datasets.endswith("a/000 (64, 48) 0\n")
    assert generator == "a/000\n"
    assert litdata == "24 a/000 (2, 4, 4)\n"
    first, last = map(float, re.fullmatch(r"loss ([\d.]+) -> ([\d.]+)\n", timm).groups())
    assert last < first
    assert mmengine == "24 (16, 16, 3) (4, 4)\n"
    assert faiss == "True\n"
