"""Pages and tables that are made from the code are what the code makes now."""

import ast
import re
import tarfile

import pytest

from tests.documents import sizing
from tests.documents.pages import DOCS, GENERATED, PAGES
from tests.places import ROOT

FAILURES = {"operations.md", "service-operations.md"}


@pytest.mark.parametrize("path", GENERATED, ids=lambda path: path.name)
def test_a_page_is_what_the_code_says(path):
    assert path.read_text() == GENERATED[path](), "run: python -m tests.documents"


def test_the_targets_of_a_sample_take_the_bytes_that_the_table_of_sizes_counts():
    shards = sorted(ROOT.glob("tests/golden/v1/webdataset/shards/*.tar"))
    assert shards
    for path in shards:
        with tarfile.open(path) as tar:
            targets = [member for member in tar if member.name.endswith((".npy", ".json"))]
        sizes = [512 + member.size + -member.size % 512 for member in targets]
        num_samples = sum(member.name.endswith(".json") for member in targets)
        assert sum(sizes) == num_samples * sizing.per_image(views=3, grid=(4, 4)).tar


def test_the_cpu_time_of_the_measured_views_is_the_measured_one():
    assert f"{sizing.cpu_ms(sizing.VIEWS_MEASURED):.3f}" in sizing.BENCHMARKS.read_text()
    assert sizing.cpu_ms(1) < sizing.cpu_ms(2) < sizing.cpu_ms(8)


def messages_of_the_code():
    """Return every literal text of the packages, f-strings in the pieces between their values."""
    found = []
    for package in ("cache_builder", "tokenizers_svc", "trainer"):
        for path in (ROOT / package).rglob("*.py"):
            found += [
                node.value
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Constant) and isinstance(node.value, str)
            ]
    return "\n".join(found)


def test_every_message_that_a_table_of_failures_explains_is_one_of_the_code():
    messages = messages_of_the_code()
    missing = []
    for name in FAILURES:
        table = (DOCS / name).read_text().split("\n## Failures\n")[1]
        for line in re.findall(r"^\| (.*?) \|", table, re.MULTILINE):
            for quoted in re.findall(r'`([^`]*\s[^`]*)`|"([^"]+)"', line):
                pieces = re.split(r"\.\.\.", "".join(quoted))
                missing += [(name, p) for p in map(str.strip, pieces) if p and p not in messages]
    assert missing == []


def test_every_link_between_pages_leads_to_a_heading_that_is_there():
    broken = []
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith(("http:", "https:")):
                continue
            name, _, anchor = target.partition("#")
            path = (page.parent / name).resolve() if name else page
            if not path.exists() or (anchor and anchor not in anchors_of(path)):
                broken.append(f"{page.name}: {target}")
    assert broken == []


def anchors_of(page):
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_every_page_is_in_the_navigation_of_the_site():
    config = (ROOT / ".zensical.toml").read_text()
    assert [p.name for p in PAGES if p.parent == DOCS and f'"{p.name}"' not in config] == []


def test_pictures_are_small():
    assert sum(path.stat().st_size for path in (DOCS / "pictures").iterdir()) < 1_500_000
