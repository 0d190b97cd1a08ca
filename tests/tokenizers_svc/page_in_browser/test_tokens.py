"""What a person sees of a picture's tokens, by mouse and by keyboard, in a real Chromium."""

import re

import numpy as np
import pytest
import torch
from playwright.sync_api import expect

from cache_builder import imaging, pictures
from cache_builder.formats.views import View
from tests.tokenizers_svc.page_in_browser.support import (
    VIEW,
    choose,
    hand_over,
    ids_of,
    make_cosine_tokenizer,
    make_residual_tokenizer,
    pixels_of,
    point_at,
    shown_ids,
    view_of,
    wait_for_answer,
)
from tests.tokenizers_svc.support import RULE, draw, encode_image, jpeg, make_tokenizer


def test_the_colours_are_those_of_the_token_maps_in_reports(page):
    ids = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    drawn = page.evaluate(
        """async () => {
            const { colourOf } = await import("./page/colours.js");
            return Array.from({ length: 4096 }, (_, id) => colourOf(id));
        }"""
    )
    assert np.array_equal(np.array(drawn), pictures.token_map(ids, 64).reshape(-1, 3))


def test_a_chosen_picture_becomes_a_token_map_and_a_reconstruction(page):
    choose(page)
    tokenizer = make_tokenizer()
    ids = ids_of(tokenizer)
    assert np.array_equal(shown_ids(page), ids)
    decoded = tokenizer.decode(torch.from_numpy(ids)[None])[0]
    assert np.array_equal(pixels_of(page, "#reconstruction"), decoded.permute(1, 2, 0).numpy())
    mse = (decoded.double() - view_of().double()).square().mean().item()
    expect(page.locator("#psnr")).to_have_text(f"{10 * np.log10(255**2 / mse):.2f} dB PSNR")
    num_ids = len(np.unique(ids))
    expect(page.get_by_role("status").first).to_have_text(f"{num_ids} distinct ids in 16 patches")
    drawn = pixels_of(page, "#view-picture").astype(float)  # the browser resizes a little otherwise
    assert abs(drawn - view_of().permute(1, 2, 0).numpy()).mean() < 8


@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_a_picture_may_be_dropped_or_pasted(page, kind):
    body = encode_image(draw(seed=3), "PNG")
    hand_over(page, kind, body, "dropped.png")
    wait_for_answer(page)
    assert np.array_equal(shown_ids(page), ids_of(make_tokenizer(), body))
    expect(page.locator("#picture-name")).to_have_text("dropped.png, 80 x 60 pixels")


@pytest.mark.parametrize("square", ["#view-picture", "#map", "#reconstruction"])
def test_pointing_at_a_patch_shows_its_id_its_place_its_centroid_and_its_like(page, square):
    choose(page)
    tokenizer = make_tokenizer()
    ids = ids_of(tokenizer)
    point_at(page, square, 1, 2)
    expect(page.locator("#patch-id")).to_have_text(str(ids[1, 2]))
    expect(page.locator("#patch-place")).to_have_text("1, 2")
    expect(page.locator("#patch-same")).to_have_text(f"{(ids == ids[1, 2]).sum()} of 16 patches")
    centroid = tokenizer.codebook.centroids[0, ids[1, 2]].reshape(3, 8, 8).transpose(1, 2, 0)
    assert np.array_equal(pixels_of(page, "#patch-centroid"), centroid)
    assert np.array_equal(
        pixels_of(page, "#patch-pixels"), pixels_of(page, "#view-picture")[8:16, 16:24]
    )
    marked = page.locator("#map .same").get_attribute("d")
    places = [f"M{col} {row}h1v1h-1z" for row, col in np.argwhere(ids == ids[1, 2])]
    assert marked == "".join(places)
    page.mouse.move(0, 0)
    expect(page.locator("#no-patch")).to_be_visible()


def test_a_click_holds_a_patch_until_the_next_one(page):
    choose(page)
    ids = ids_of(make_tokenizer())
    point_at(page, "#map", 0, 0, click=True)
    point_at(page, "#map", 3, 3)
    expect(page.locator("#patch-title")).to_have_text("Patch (held)")
    expect(page.locator("#patch-place")).to_have_text("0, 0")
    point_at(page, "#map", 0, 0, click=True)
    point_at(page, "#map", 3, 3)
    expect(page.locator("#patch-id")).to_have_text(str(ids[3, 3]))


def test_the_keyboard_alone_reaches_every_patch_and_a_screen_reader_hears_it(page):
    choose(page)
    ids = ids_of(make_tokenizer())
    page.locator("#overlay").focus()
    page.keyboard.press("Tab")
    token_map = page.get_by_role("grid", name="Token map")
    expect(token_map).to_be_focused()

    def heard():
        cell = page.locator("#" + token_map.get_attribute("aria-activedescendant"))
        row = cell.locator("..").get_attribute("aria-rowindex")
        return int(row) - 1, int(cell.get_attribute("aria-colindex")) - 1, cell.text_content()

    for keys, place in [
        ([], (0, 0)),
        (["ArrowRight", "ArrowDown", "ArrowDown"], (2, 1)),
        (["ArrowUp", "ArrowLeft", "ArrowLeft"], (1, 0)),
        (["End"], (1, 3)),
        (["Home"], (1, 0)),
        (["PageDown"], (3, 0)),
        (["Control+End"], (3, 3)),
        (["Control+Home"], (0, 0)),
    ]:
        for key in keys:
            page.keyboard.press(key)
        row, col, text = heard()
        assert (row, col) == place, keys
        assert text.startswith(f"Row {row}, column {col}: id {ids[place]}, ")
    commonest = np.bincount(ids.ravel()).argmax()
    page.get_by_role("button", name=f"Id {commonest}:").click()
    places = [tuple(place) for place in np.argwhere(ids == commonest)]
    expect(page.locator("#patch-place")).to_have_text(f"{places[0][0]}, {places[0][1]}")
    token_map.focus()
    page.keyboard.press("n")
    assert heard()[:2] == places[1 % len(places)]
    page.keyboard.press("Escape")
    expect(page.locator("#patch-title")).to_have_text("Patch")
    page.keyboard.press("Enter")
    expect(page.locator("#patch-title")).to_have_text("Patch (held)")


def test_numbers_and_the_mirror_say_which_view_is_tokenised(page):
    choose(page)
    for name, value in VIEW._asdict().items():
        if name != "hflip":
            page.get_by_label(name.capitalize(), exact=True).fill(str(value))
            page.get_by_label(name.capitalize(), exact=True).blur()
    wait_for_answer(page)
    assert np.array_equal(shown_ids(page), ids_of(make_tokenizer(), view=VIEW))
    page.get_by_label("Mirror").check()
    wait_for_answer(page)
    mirrored = VIEW._replace(hflip=True)
    assert np.array_equal(shown_ids(page), ids_of(make_tokenizer(), view=mirrored))
    page.get_by_role("button", name="Centre square").click()
    wait_for_answer(page)
    assert np.array_equal(shown_ids(page), ids_of(make_tokenizer()))
    page.get_by_role("button", name="Whole picture").click()
    wait_for_answer(page)
    whole = View(0, 0, 60, 80, hflip=False)
    assert np.array_equal(shown_ids(page), ids_of(make_tokenizer(), view=whole))


def test_a_box_is_drawn_moved_and_pulled_on_the_picture(page):
    choose(page)
    page.locator("#box").scroll_into_view_if_needed()
    box = page.locator("#box").bounding_box()

    def drag(start, end):
        """From and to (y, x) in pixels of the picture."""
        for act, (y, x) in ((page.mouse.down, start), (page.mouse.up, end)):
            page.mouse.move(box["x"] + x / 80 * box["width"], box["y"] + y / 60 * box["height"])
            act()
        wait_for_answer(page)
        return [int(page.locator(f"#{name}").input_value()) for name in VIEW._fields[:4]]

    def nearly(found, wanted):
        return np.abs(np.subtract(found, wanted)).max() <= 1  # a pixel of the screen is not one

    assert nearly(drag((10, 3), (40, 45)), [10, 3, 30, 42])
    assert nearly(drag((25, 24), (29, 34)), [14, 13, 30, 42])  # within it: moved
    found = drag((44, 55), (54, 75))  # its corner: pulled
    assert nearly(found, [14, 13, 40, 62])
    view = View(*found, hflip=False)
    assert np.array_equal(shown_ids(page), ids_of(make_tokenizer(), view=view))


def test_the_ids_can_be_laid_over_the_view(page):
    choose(page)
    expect(page.locator("#view-ids")).to_be_hidden()
    page.get_by_label("Ids over the view").check()
    expect(page.locator("#view-ids")).to_be_visible()
    assert np.array_equal(pixels_of(page, "#view-ids"), pixels_of(page, "#map-ids"))


def test_every_stage_of_a_residual_codebook_can_be_looked_at(page):
    page.get_by_label("Model").select_option("residual")
    choose(page)
    tokenizer = make_residual_tokenizer()
    ids = ids_of(tokenizer)
    expect(page.locator("#psnr")).to_have_text(re.compile(r"stages 1 to 1; all 3: [0-9.]+ dB PSNR"))
    for stage in (3, 2):
        page.get_by_label("Stage").select_option(str(stage))
        assert np.array_equal(shown_ids(page), ids[..., stage - 1])
        centroids = tokenizer.codebook.centroids
        parts = sum(centroids[m, ids[..., m].ravel()] for m in range(stage))
        sums = torch.from_numpy(parts).round().clamp(0, 255)[None]
        expected = imaging.unpatchify(sums, RULE.grid, RULE.patch_size)[0].permute(1, 2, 0)
        assert np.array_equal(pixels_of(page, "#reconstruction"), expected.numpy()), stage
    point_at(page, "#map", 0, 1)
    expect(page.locator("#patch-stages")).to_have_text(", ".join(map(str, ids[0, 1])))


def test_another_model_is_asked_as_soon_as_it_is_chosen(page):
    choose(page)
    page.get_by_label("Model").select_option("cosine")
    expect(page.locator("#about")).to_contain_text("cosine: 16 ids")
    wait_for_answer(page)
    assert np.array_equal(shown_ids(page), ids_of(make_cosine_tokenizer()))
    expect(page.locator("#no-reconstruction")).to_contain_text("are not pixels")
    point_at(page, "#map", 0, 0)
    expect(page.locator("#patch-pixels")).to_be_visible()
    expect(page.locator("#patch-centroid")).to_be_hidden()


def test_the_time_of_each_step_is_shown_and_whether_the_answer_was_kept(page):
    choose(page, jpeg(seed=11))
    steps = page.locator("#times li span")
    expect(steps).to_have_text(
        [
            "reading the body",
            "decoding and resizing",
            "waiting for a batch",
            "tokenizer",
            "network and the rest",
        ]
    )
    assert page.locator("#time-bar i").count() == 5
    expect(page.locator("#answer-notes")).to_contain_text("in a batch of 1; request ")
    choose(page, jpeg(seed=11))
    expect(page.locator("#answer-notes")).to_contain_text("answered from the kept answers")
