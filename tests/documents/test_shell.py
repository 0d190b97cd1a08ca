"""The commands of the documents are run, in the order of their page, in a folder of small things.

They run as they stand, but for options after them that make them small, for the address of the
service, and for what an `--out` holds already. Commands that are not run have a reason in
`programs.py`; all are parsed in `test_blocks.py`.
"""

import contextlib
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path

import pytest

from tests.documents.blocks import SHELL, blocks_of, commands_of
from tests.documents.folders import FURTHER, write_common
from tests.documents.pages import PAGES
from tests.documents.programs import ONLY_PARSED, OTHERS, OURS
from tests.hub_server import running_hub
from tests.small_commands import SMALLER, served

ELSEWHERE = {"tokenizers.md": "with its plugin, by tests/test_plugin_route.py"}
RUN = {"patchcache", "curl"}
FILLED = {"build", "convert", "import", "merge", "pull", "subset"}  # these want an empty --out
HERE = {  # in this process, without Ray
    name: ["--workers", "0"]
    for name in ("build", "convert", "fit", "import", "merge", "subset", "verify")
}
URL = re.compile(r"http://127\.0\.0\.1:\d+")


def all_commands_of(page):
    blocks = [block for block in blocks_of(page) if block.language in SHELL]
    return [words for block in blocks for words in commands_of(block)]


def is_run(words):
    return words[0] in RUN and not any(" ".join(words).startswith(each) for each in ONLY_PARSED)


WITH_COMMANDS = [
    page for page in PAGES if page.name not in ELSEWHERE and any(map(is_run, all_commands_of(page)))
]


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    root = tmp_path_factory.mktemp("common")
    write_common(root)
    return root


@pytest.fixture
def folder(common, tmp_path, monkeypatch):
    """A function that makes the folder of a page, and works in it."""

    def make(page):
        root = tmp_path / "work"
        shutil.copytree(common, root)
        if further := FURTHER.get(page.name):
            further(root)
        monkeypatch.chdir(root)
        return root

    return make


@pytest.fixture
def far(monkeypatch, bucket, s3_server):
    """The storage and the Hub that pages name."""
    from huggingface_hub import constants

    make = urllib.request.Request(f"{s3_server}/bucket", method="PUT")
    urllib.request.urlopen(make, timeout=10).close()
    with running_hub(monkeypatch) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        url = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        yield


@pytest.mark.usefixtures("far")
@pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # huggingface_hub uploads
@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.name)
def test_commands_run_one_after_the_other(page, folder, patchcache, service_url):
    root, url = folder(page), service_url  # that of a service of the page, once it has one
    with contextlib.ExitStack() as service:
        for words in filter(is_run, all_commands_of(page)):
            words = [word for word in words if word != "..."]
            if words[:2] == ["patchcache", "serve"]:
                service.close()
                url = service.enter_context(served(root, words[1:]))
            elif words[0] == "curl":
                done = subprocess.run(
                    [*(URL.sub(url, word) for word in words), "--fail"], capture_output=True,
                    text=True, check=False, timeout=60,
                )  # fmt: skip
                assert done.returncode == 0, (words, done.stderr)
                assert done.stdout.strip()
            else:
                run_ours([URL.sub(url, word) for word in words[1:]], patchcache)


def expanded(word):
    """What a shell makes of a word with a star."""
    return sorted(map(str, Path().glob(word))) if "*" in word else [word]


def run_ours(words, patchcache):
    name, *rest = [path for word in words for path in expanded(word)]
    if name in FILLED and "--extend" not in rest:
        out = rest[rest.index("--out") + 1]
        shutil.rmtree(out, ignore_errors=True)
    done = patchcache(name, *rest, *SMALLER.get(name, []), *HERE.get(name, []))
    assert done.status == 0, (words, done.err)
    assert done.out.strip(), words
    assert "Traceback" not in done.err


def test_what_is_not_run_has_a_reason_and_no_reason_is_left_over():
    commands = [words for page in PAGES for words in all_commands_of(page)]
    programs = {words[0].rpartition("/")[2] for words in commands}
    assert programs - RUN <= OTHERS.keys() | OURS.keys()
    lines = [" ".join(words) for words in commands]
    assert [x for x in ONLY_PARSED if not any(line.startswith(x) for line in lines)] == []
    assert (OTHERS.keys() | OURS.keys()) - programs == set()
