"""The page at `/`, as files: what is sent, with which headers, and that it needs nothing else."""

import re
from html.parser import HTMLParser

import pytest

from tests.tokenizers_svc.support import check_problem, make_tokenizer, serving
from tokenizers_svc import page
from tokenizers_svc.app import create_app
from tokenizers_svc.options import ServiceOptions

FILES = sorted(path.name for path in page._FOLDER.iterdir())
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


def path_of(name):
    return "/" if name == "index.html" else f"/page/{name}"


class Elements(HTMLParser):
    """Every element of a document, as (name, attributes)."""

    def __init__(self, document):
        super().__init__()
        self.found = []
        self.feed(document)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_sent_with_its_type_and_a_policy_that_allows_this_service_alone(client, name):
    answer = client.get(path_of(name))
    assert answer.status_code == 200
    assert answer.content == (page._FOLDER / name).read_bytes()
    assert answer.headers["content-type"].split(";")[0] == TYPES[name.rpartition(".")[2]]
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self';" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("tags", ["{etag}", "W/{etag}", '"other", {etag}', "*"])
def test_a_file_that_a_browser_has_is_not_sent_again(client, tags):
    first = client.get("/page/main.js")
    assert first.headers["cache-control"] == "no-cache"  # asked for again each time
    etag = first.headers["etag"]
    again = client.get("/page/main.js", headers={"If-None-Match": tags.format(etag=etag)})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)


def test_a_changed_file_is_sent_again(client):
    answer = client.get("/page/main.js", headers={"If-None-Match": '"an older one"'})
    assert answer.status_code == 200


def test_probes_of_the_page_may_use_head(client):
    answer = client.head("/")
    assert answer.status_code == 200
    assert int(answer.headers["content-length"]) == len(client.get("/").content)


@pytest.mark.parametrize(
    "path",
    ["/page/", "/page/other.js", "/page/..%2Fapp.py", "/page/%2e%2e/page.py", "/page/index.html"],
)
def test_there_are_no_other_files(client, path):
    check_problem(client.get(path), 404, "not-found")


def test_the_page_has_no_script_style_or_handler_of_its_own_in_the_html(client):
    found = Elements(client.get("/").text).found
    assert {"script", "button"} <= {name for name, _ in found}
    for name, attributes in found:
        assert name != "style"
        assert name != "script" or attributes["src"]
        assert not [key for key in attributes if key.startswith("on") or key == "style"]


def test_everything_that_the_page_loads_is_one_of_its_files(client):
    loaded = {
        attributes.get("src") or attributes["href"]
        for name, attributes in Elements(client.get("/").text).found
        if name in ("script", "link", "img")
    }
    for name in FILES:
        text = client.get(path_of(name)).text
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(", text), name
        loaded |= {f"page/{module}" for module in re.findall(r'from "\./([^"]+)"', text)}
    assert loaded == {f"page/{name}" for name in FILES} - {"page/index.html"}


def test_the_page_is_not_part_of_the_documented_interface(client):
    paths = client.get("/openapi.json").json()["paths"]
    assert not [path for path in paths if path == "/" or path.startswith("/page")]


def test_the_page_can_be_left_out():
    app = create_app(make_tokenizer(), options=ServiceOptions(page=False))
    with serving(app) as client:
        check_problem(client.get("/"), 404, "not-found")
        check_problem(client.get("/page/main.js"), 404, "not-found")


def test_the_page_links_to_the_documentation_only_where_there_is_one(client):
    assert 'href="docs"' in client.get("/").text
    app = create_app(make_tokenizer(), options=ServiceOptions(docs=False))
    with serving(app) as without:
        assert "docs" not in without.get("/").text
