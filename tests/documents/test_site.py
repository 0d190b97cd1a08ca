"""The site of the documents is built without a warning and fetches nothing from elsewhere."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents.pages import DOCS, PAGES
from tests.places import ROOT

ZENSICAL = Path(sys.executable).parent / "zensical"
FETCHED = re.compile(
    r"""<(?:script|link|img|iframe)\b[^>]*(?:src|href)=["']?(?:https?:)?//|url\(["']?https?:"""
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site."""
    root = tmp_path_factory.mktemp("site")
    shutil.copytree(DOCS, root / "docs")
    shutil.copy(ROOT / ".zensical.toml", root)
    for package in ("cache_builder", "tokenizers_svc", "trainer"):
        (root / package).symlink_to(ROOT / package)
    done = subprocess.run(
        [ZENSICAL, "build", "--strict", "--config-file", ".zensical.toml"],
        cwd=root, capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return root / ".site"


def test_every_page_is_there(site):
    wanted = {path.stem for path in PAGES if path.parent == DOCS}
    assert wanted <= {path.stem for path in site.glob("*.html")}


def test_nothing_is_fetched_from_elsewhere(site):
    files = [path for path in site.rglob("*") if path.suffix in {".html", ".css"}]
    found = [
        (path.name, match[0]) for path in files for match in FETCHED.finditer(path.read_text())
    ]
    assert found == []


def test_the_page_on_python_has_docstrings_and_signatures(site):
    text = re.sub(r"<[^>]+>", "", (site / "api.html").read_text())
    for expected in ("nearest_centroid", "Raises", "block_mask", "TokenCache"):
        assert expected in text, expected
    assert ":::" not in text
