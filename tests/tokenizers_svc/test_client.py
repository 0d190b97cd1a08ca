"""The client at the real service: what comes back is what the library says."""

import hashlib
import io

import numpy as np
import pytest
import torch
from PIL import Image

from cache_builder.errors import ConfigError
from cache_builder.formats.views import View
from cache_builder.tokenizers import PatchTokenizer
from tests.tokenizers_svc.clients import connect
from tests.tokenizers_svc.support import (
    GRID,
    RULE,
    expected_ids,
    jpeg,
    make_codebook,
    make_tokenizer,
    serving,
)
from tokenizers_svc.app import create_app
from tokenizers_svc.client import ProblemError
from tokenizers_svc.limits import Limits


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module", params=["sync", "async"])
def asking(request, client):
    with connect(request.param, str(client.base_url)) as asking:
        yield asking


def listed(tokens):
    return tokens.ids.ravel().tolist()


def test_a_picture_has_the_ids_of_the_library_in_whatever_form_it_is_given(
    asking, tokenizer, tmp_path
):
    path = tmp_path / "photo.jpg"
    path.write_bytes(jpeg())
    for picture in (path, str(path), jpeg(), Image.open(path)):
        tokens = asking.tokenize(picture)
        assert listed(tokens) == expected_ids(jpeg())
        assert list(tokens.ids.shape) == GRID
        assert tokens.ids.dtype == np.uint16
        assert tokens.fingerprint == tokenizer.fingerprint
        assert tokens.model == "tiny-k16"
        assert tokens.view == View(0, 10, 60, 60, hflip=False)
    pixels = np.asarray(Image.open(io.BytesIO(jpeg())))
    assert listed(asking.tokenize(pixels)) == expected_ids(jpeg())


def test_the_stages_of_the_service_are_timed(request, asking):
    fresh = jpeg(seed=len(request.node.name))  # an answer that is kept has no stages
    timings = asking.tokenize(fresh).timings
    assert set(timings) == {"read", "decode", "queue", "infer"}
    assert all(0 <= seconds < 60 for seconds in timings.values())


def test_a_view_of_ones_own_is_cut_and_mirrored(asking):
    view = View(3, 5, 40, 30, hflip=True)
    tokens = asking.tokenize(jpeg(), view)
    assert listed(tokens) == expected_ids(jpeg(), view)
    assert tokens.view == view


def test_many_pictures_have_the_ids_of_the_library(asking):
    pictures = [jpeg(seed=i) for i in range(7)]
    views = [None, View(0, 0, 32, 32, hflip=True), *[None] * 5]
    pictures[3] = b"no picture"
    items = list(asking.tokenize_many(pictures, views=views, batch_size=3, on_error="return"))
    assert [item.index for item in items] == list(range(7))
    for item, picture, view in zip(items, pictures, views, strict=True):
        if item.index == 3:
            assert item.error.code == "not-an-image"
            assert item.error.status == 415
        else:
            assert listed(item.tokens) == expected_ids(picture, view)
    with pytest.raises(ProblemError, match="not-an-image"):
        list(asking.tokenize_many(pictures))


def test_soft_targets_begin_with_the_token_id(asking):
    tokens = asking.tokenize(jpeg(), soft_top_k=3)
    assert tokens.soft.ids.shape == tokens.soft.probabilities.shape == (*GRID, 3)
    assert np.array_equal(tokens.soft.ids[..., 0], tokens.ids)
    assert np.allclose(tokens.soft.probabilities.sum(-1), 1, atol=0.01)
    assert (np.diff(tokens.soft.probabilities) <= 0).all()


def test_a_residual_codebook_has_an_id_for_every_stage():
    tokenizer = PatchTokenizer.load(make_codebook(num_stages=2))
    with (
        serving(create_app(tokenizer)) as client,
        connect("sync", str(client.base_url)) as asking,
    ):
        alone = asking.tokenize(jpeg())
        first, second = asking.tokenize_many([jpeg(), jpeg(seed=1)])
        assert alone.ids.shape == (*GRID, 2)
        assert np.array_equal(first.tokens.ids, alone.ids)
        pair = np.stack([first.tokens.ids, second.tokens.ids])
        assert np.array_equal(asking.detokenize(pair)[0], asking.detokenize(alone))


def test_ids_become_pictures_again(asking, tokenizer):
    tokens = asking.tokenize(jpeg())
    decoded = tokenizer.decode(torch.from_numpy(tokens.ids[None].astype(np.int64)))
    expected = decoded[0].permute(1, 2, 0).numpy()
    for ids in (tokens, tokens.ids, tokens.ids.tolist()):
        assert np.array_equal(asking.detokenize(ids), expected)
    batch = asking.detokenize(np.stack([tokens.ids, np.zeros_like(tokens.ids)]))
    assert batch.shape == (2, RULE.size, RULE.size, 3)
    assert np.array_equal(batch[0], expected)
    again = asking.reconstruct(jpeg())
    assert np.array_equal(again.pixels, expected)
    assert 0 < again.psnr_db < 60
    assert again.fingerprint == tokens.fingerprint


def test_ids_that_are_too_large_are_refused_by_the_service(asking):
    with pytest.raises(ProblemError, match="invalid-tokens"):
        asking.detokenize(np.full(GRID, 16))


def test_the_codebook_is_the_codebook(asking):
    assert np.array_equal(asking.codebook(), make_codebook().centroids)
    (model,) = asking.models()
    assert (model.id, model.vocab_size, list(model.grid)) == ("tiny-k16", 16, GRID)
    with pytest.raises(ConfigError, match="no model 'other'"):
        asking.codebook(model="other")


def test_what_was_answered_is_known_by_the_hash_of_the_file(asking):
    body = jpeg(seed=99)
    tokens = asking.tokenize(body)
    kept = asking.tokens_of(hashlib.sha256(body).hexdigest())
    assert listed(kept) == listed(tokens)
    assert asking.tokens_of("0" * 64) is None
    with pytest.raises(ProblemError, match="model-not-found"):
        asking.tokens_of("0" * 64, model="other")


def test_batches_fit_a_service_with_small_limits(tokenizer):
    limits = Limits(max_items=4, max_batch_body_bytes=9_000)
    pictures = [jpeg(seed=i) for i in range(9)]
    with (
        serving(create_app(tokenizer, limits=limits)) as client,
        connect("sync", str(client.base_url)) as asking,
    ):
        items = asking.tokenize_many(pictures, batch_size=32, concurrency=2)
        assert [listed(item.tokens) for item in items] == list(map(expected_ids, pictures))
