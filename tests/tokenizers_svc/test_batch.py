"""Several pictures in one request: everyone's own ids, everyone's own fault."""

import logging

import numpy as np
import pytest

from cache_builder.formats.views import View
from tests.tokenizers_svc.sending import BATCH_BODIES, FORMS, b64, read_ids, send_batch
from tests.tokenizers_svc.support import (
    RED,
    AllergicTokenizer,
    check_problem,
    draw,
    encode_image,
    expected_ids,
    jpeg,
    serving,
)
from tokenizers_svc.app import create_app
from tokenizers_svc.limits import Limits

PICTURES = [
    jpeg(seed=21), encode_image(draw((50, 90), seed=22), "PNG"), jpeg((33, 77), seed=23),
    jpeg(seed=24), jpeg(seed=25), jpeg((9, 7), seed=26), jpeg(seed=27), jpeg(seed=28),
    jpeg(seed=21),
]  # fmt: skip
VIEWS = [None, [0, 0, 20, 20], None, [5, 6, 30, 40, True], None, None, None, None, [1, 1, 50, 40]]


def expected():
    views = [
        None if view is None else View(*view[:4], hflip=len(view) == 5 and view[4])
        for view in VIEWS
    ]
    return [expected_ids(body, view) for body, view in zip(PICTURES, views, strict=True)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", BATCH_BODIES)
def test_every_picture_at_every_position_has_the_ids_of_the_library(zoo, kind, form):
    answer = send_batch(
        zoo, kind, PICTURES, VIEWS, params={"on_error": "fail"}, headers={"Accept": FORMS[form]}
    )
    ids = read_ids(answer)
    assert ids.shape == (9, 4, 4)
    assert ids.reshape(9, -1).tolist() == expected()


def test_items_say_which_they_are_and_what_they_turned_out_to_be(zoo):
    answer = send_batch(zoo, "json", PICTURES, VIEWS).json()
    assert answer["model"] == "plain"
    assert answer["shape"] == [4, 4]
    assert [item["index"] for item in answer["items"]] == list(range(9))
    assert answer["items"][3]["view"] == [5, 6, 30, 40, True]
    assert answer["items"][1]["image"] == {"width": 50, "height": 90, "format": "PNG"}


def test_a_batch_of_a_residual_codebook_has_its_stages(zoo):
    params = {"model": "residual", "on_error": "fail"}
    answer = send_batch(zoo, "json", PICTURES[:2], params=params, headers={"Accept": FORMS["npy"]})
    assert read_ids(answer).shape == (2, 4, 4, 2)


@pytest.mark.parametrize("kind", BATCH_BODIES)
def test_a_bad_picture_fails_alone_and_says_why(zoo, kind):
    bodies = [jpeg(seed=31), b"no picture", jpeg(seed=32), jpeg()[:300], b""]
    answer = send_batch(zoo, kind, bodies)
    assert answer.status_code == 200
    items = answer.json()["items"]
    for index in (0, 2):
        assert items[index]["token_ids"] == expected_ids(bodies[index])
    codes = {index: items[index]["error"]["code"] for index in (1, 3, 4)}
    assert codes == {1: "not-an-image", 3: "corrupt-image", 4: "empty-body"}
    assert items[1]["error"]["instance"] == f"urn:request:{answer.headers['x-request-id']}"
    assert "token_ids" not in items[1]


def test_a_view_outside_of_its_picture_fails_alone(zoo):
    answer = send_batch(zoo, "json", [jpeg(), jpeg()], [[0, 0, 500, 5], None]).json()
    assert answer["items"][0]["error"]["code"] == "view-outside"
    assert answer["items"][1]["token_ids"] == expected_ids(jpeg())


def test_a_bad_picture_fails_all_if_it_is_asked_to(zoo):
    bodies = [jpeg(seed=31), b"no picture", b""]
    answer = send_batch(zoo, "json", bodies, params={"on_error": "fail"})
    problem = check_problem(answer, 415, "not-an-image")
    assert problem["errors"][0]["pointer"] == "/items/1"
    assert problem["detail"].startswith("Picture 1: ")


@pytest.mark.parametrize("form", ["npy", "raw"])
def test_an_array_has_no_place_for_errors(zoo, form):
    answer = send_batch(zoo, "json", PICTURES[:1], headers={"Accept": FORMS[form]})
    check_problem(answer, 406, "not-acceptable")


def test_a_picture_that_breaks_the_tokenizer_fails_alone_and_says_nothing(caplog):
    with serving(create_app(AllergicTokenizer())) as client:
        bodies = [jpeg(seed=1), RED, jpeg(seed=2)]
        answer = send_batch(client, "json", bodies, headers={"X-Request-Id": "with-a-red-one"})
        items = answer.json()["items"]
        assert [item.get("token_ids") for item in items] == [
            expected_ids(bodies[0]), None, expected_ids(bodies[2]),
        ]  # fmt: skip
        assert items[1]["error"]["code"] == "internal"
        assert "secret" not in answer.text
        failed = send_batch(client, "json", bodies, params={"on_error": "fail"})
        check_problem(failed, 500, "internal")
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert any("with-a-red-one" in record.getMessage() for record in errors)


@pytest.mark.parametrize("kind", BATCH_BODIES)
def test_more_pictures_than_the_limit_are_refused(small, kind):
    problem = check_problem(send_batch(small, kind, [b"x"] * 4), 413, "batch-too-large")
    assert problem["limit"] == 3


def test_very_many_items_are_refused_before_they_are_made(small):
    content = b'{"items":[' + b"{}," * 15_000 + b"{}]}"
    answer = small.post(
        "/v1/tokenize/batch", content=content, headers={"Content-Type": "application/json"}
    )
    check_problem(answer, 413, "batch-too-large")


def test_pictures_that_are_too_large_together_are_refused_by_their_headers(small):
    bodies = [jpeg((80, 60), seed=seed) for seed in range(3)]
    problem = check_problem(send_batch(small, "json", bodies), 413, "image-too-large")
    assert (problem["limit"], problem["actual"]) == (12_000, 14_400)


def test_pictures_that_are_refused_by_themselves_do_not_count(small):
    bodies = [jpeg((80, 60)), jpeg((200, 60)), jpeg((80, 60), seed=1)]
    items = send_batch(small, "json", bodies).json()["items"]
    assert [item.get("error", {}).get("code") for item in items] == [None, "image-too-large", None]


def test_a_picture_of_too_many_bytes_is_refused(small):
    for kind in BATCH_BODIES:
        problem = check_problem(send_batch(small, kind, [bytes(25_000)]), 413, "body-too-large")
        assert problem["limit"] == 20_000


def test_a_body_of_too_many_bytes_is_refused(small):
    problem = check_problem(
        send_batch(small, "msgpack", [bytes(19_000)] * 4), 413, "body-too-large"
    )
    assert problem["limit"] == 60_000


def test_every_picture_takes_a_place_and_gives_it_back():
    app = create_app(AllergicTokenizer(), limits=Limits(max_queue=4, max_items=4, kept_bytes=0))
    door, most = app.state.service.door, []
    take = door.take_pictures
    door.take_pictures = lambda number: (take(number), most.append(door.num_pictures))
    with serving(app) as client:
        assert send_batch(client, "json", [jpeg()] * 4).status_code == 200
        assert max(most) == 4
        assert door.num_pictures == door.num_bytes == 0
        check_problem(send_batch(client, "json", [jpeg()] * 5), 413, "batch-too-large")
        assert door.num_pictures == door.num_bytes == 0


@pytest.mark.parametrize(
    "fields", [{}, {"items": []}, {"items": None}, {"items": {}}, {"items": [1]}, {"images": []}]
)
def test_what_is_no_list_of_pictures_is_refused(zoo, fields):
    check_problem(zoo.post("/v1/tokenize/batch", json=fields), 400, "bad-request")


@pytest.mark.parametrize("views", ["", "[", "{}", "7", "[null]", "[null,null,null]", "[1,2]"])
def test_views_of_a_form_are_a_list_as_long_as_the_files(zoo, views):
    answer = zoo.post(
        "/v1/tokenize/batch", files=[("files", jpeg()), ("files", jpeg())], data={"views": views}
    )
    assert "as long as there are files" in check_problem(answer, 400, "bad-request")["detail"]


def test_a_form_without_files_is_told_how_to_send_some(zoo):
    answer = zoo.post("/v1/tokenize/batch", files={"file": jpeg()})
    assert "curl -F files=@a.jpg" in check_problem(answer, 400, "bad-request")["detail"]


def test_bare_bytes_are_no_batch(zoo):
    answer = zoo.post("/v1/tokenize/batch", content=jpeg())
    check_problem(answer, 415, "unsupported-body")


@pytest.mark.parametrize("params", [{"on_error": "ignore"}, {"view": "0,0,5,5"}])
def test_other_parameters_are_refused(zoo, params):
    check_problem(send_batch(zoo, "json", PICTURES[:1], params=params), 400, "bad-request")


def test_base64_that_is_none_is_pointed_at(zoo):
    items = [{"image": {"b64": b64(jpeg())}}, {"image": {"b64": "???"}}]
    problem = check_problem(
        zoo.post("/v1/tokenize/batch", json={"items": items}), 400, "bad-request"
    )
    assert problem["errors"][0]["pointer"] == "/items/1/image/b64"


def test_the_batches_of_one_request_are_shared(zoo):
    bodies = [jpeg(seed=seed) for seed in range(100, 108)]
    answer = send_batch(zoo, "msgpack", bodies)
    assert int(answer.headers["x-batch-size"]) >= 1
    assert answer.headers["server-timing"].startswith("read;dur=")
    assert np.array_equal(
        [item["token_ids"] for item in answer.json()["items"]], [expected_ids(b) for b in bodies]
    )
