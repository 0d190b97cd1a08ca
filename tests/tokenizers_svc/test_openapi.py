"""What the service says of itself is what it does."""

import json
import re
from pathlib import Path

import pytest

from tests.tokenizers_svc.support import make_zoo
from tests.tokenizers_svc.write_openapi import GOLDEN, describe
from tokenizers_svc.problems import KINDS

ROOT = Path(__file__).parents[2]


def operations():
    document = json.loads(GOLDEN.read_text())
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def test_the_document_is_the_one_that_was_read_by_a_person():
    assert describe() == GOLDEN.read_text(), (
        "The surface of the service has changed. If it was meant to, write it down: "
        "python -m tests.tokenizers_svc.write_openapi"
    )


@pytest.mark.parametrize("path", [path for path, _, _ in operations()])
def test_every_path_and_answer_is_described(path):
    for _path, _method, operation in operations():
        if _path != path:
            continue
        assert operation["description"]
        for status, answer in operation["responses"].items():
            assert answer["description"]
            if int(status) >= 400:
                assert list(answer["content"]) == ["application/problem+json"]


def bodies():
    for path, method, operation in operations():
        for media_type, content in operation.get("requestBody", {}).get("content", {}).items():
            if "example" in content:
                yield pytest.param(method, path, media_type, content["example"], id=path)


@pytest.mark.parametrize(("method", "path", "media_type", "example"), list(bodies()))
def test_the_example_of_every_body_is_taken(zoo, method, path, media_type, example):
    if path == "/v1/detokenize":
        # The ids of an example are those of a larger codebook.
        example = {"token_ids": [0] * 16}
    answer = zoo.request(method, path, json=example)
    assert answer.status_code == 200, answer.text


def test_every_answer_has_the_fields_that_are_described(zoo):
    document = json.loads(GOLDEN.read_text())
    schemas = document["components"]["schemas"]
    example = {
        path: content["example"]
        for path, _, operation in operations()
        for content in operation.get("requestBody", {}).get("content", {}).values()
        if "example" in content
    }
    one = zoo.post("/v1/tokenize", json=example["/v1/tokenize"], params={"soft_top_k": 2}).json()
    assert set(one) == set(schemas["TokenizeAnswer"]["properties"])
    assert set(one["soft"]) == set(schemas["SoftAnswer"]["properties"])
    assert set(one["image"]) == set(schemas["ImageInfo"]["properties"])
    path = "/v1/tokenize/batch"
    several = zoo.post(path, json=example[path]).json()
    assert set(several) == set(schemas["BatchAnswer"]["properties"])
    items = several["items"]
    assert set(items[0]) == set(schemas["BatchItem"]["properties"]) - {"error"}
    assert set(zoo.get("/v1/models/plain").json()) == set(schemas["ModelInfo"]["properties"])
    assert len(zoo.get("/v1/models").json()["models"]) == 1 + len(make_zoo())


def test_the_document_for_users_has_every_problem():
    page = (ROOT / "docs" / "service.md").read_text()
    rows = re.findall(r"^\| `([a-z-]+)` \| (\d+) \|", page, re.MULTILINE)
    assert {code: int(status) for code, status in rows} == {
        code: status for code, (status, _) in KINDS.items()
    }


def test_the_document_for_users_has_every_path():
    page = (ROOT / "docs" / "service.md").read_text()
    for path, _, _ in operations():
        assert path in page, f"{path} is not in docs/service.md"
