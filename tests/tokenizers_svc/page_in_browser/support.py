"""What the tests of the page share: pictures, tokenizers, and what can be done with a page."""

import numpy as np
from playwright.sync_api import expect

from cache_builder import imaging, pictures
from cache_builder.formats.codebook import Codebook
from cache_builder.formats.codebook_header import ExtractorSpec
from cache_builder.formats.views import View, centre_square
from cache_builder.tokenizers import PatchTokenizer
from tests.tokenizers_svc.support import RULE, jpeg, make_codebook

PATIENCE_MS = 60_000  # for a machine that is busy with something else
PHOTO = jpeg((80, 60))
VIEW = View(5, 11, 40, 50, hflip=False)


def make_cosine_tokenizer():
    centroids = np.random.default_rng(1).normal(size=(1, 16, 192)).astype(np.float32)
    centroids /= np.linalg.norm(centroids, axis=-1, keepdims=True)
    counts, extractor = np.ones((1, 16), np.int64), ExtractorSpec(id="pixel")
    codebook = Codebook(centroids, counts, metric="cosine", pixel_rule=RULE, extractor=extractor)
    return PatchTokenizer.load(codebook)


def make_residual_tokenizer():
    return PatchTokenizer.load(make_codebook(num_stages=3, dtype=np.float32))


def ids_of(tokenizer, body=PHOTO, view=None):
    """What the library says: (rows, cols[, M])."""
    return tokenizer.encode(view_of(body, view)[None])[0].numpy()


def view_of(body=PHOTO, view=None):
    pixels = imaging.decode(body)
    view = view or centre_square(tuple(pixels.shape[-2:]))
    return imaging.apply_view(pixels, view, RULE.size, RULE.interpolation)


def choose(page, body=PHOTO, name="photo.jpg"):
    """Choose a file and wait for its tokens, and their reconstruction."""
    page.set_input_files("#file", {"name": name, "mimeType": "image/jpeg", "buffer": body})
    wait_for_answer(page)


def wait_for_answer(page):
    expect(page.locator("#tokens")).to_have_attribute("aria-busy", "false")
    expect(page.locator("#results")).to_be_visible()


def pixels_of(page, selector):
    """What is drawn on a canvas: (H, W, 3)."""
    width, height, flat = page.locator(selector).evaluate(
        """(c) => {
            const image = c.getContext("2d").getImageData(0, 0, c.width, c.height);
            return [c.width, c.height, [...image.data]];
        }"""
    )
    return np.array(flat, np.uint8).reshape(height, width, 4)[..., :3]


def shown_ids(page, num_ids=16):
    """The ids that the colours of the token map stand for."""
    palette = pictures.token_map(np.arange(num_ids, dtype=np.uint16)[None], num_ids)[0]
    drawn = pixels_of(page, "#map-ids")
    return (drawn[:, :, None] == palette).all(-1).argmax(-1)


def point_at(page, selector, row, col, *, click=False):
    page.locator(selector).scroll_into_view_if_needed()
    box = page.locator(selector).bounding_box()
    rows, cols = RULE.grid
    x, y = (col + 0.5) / cols * box["width"], (row + 0.5) / rows * box["height"]
    page.mouse.move(box["x"] + x, box["y"] + y)
    if click:
        page.mouse.down()
        page.mouse.up()


def hand_over(page, kind, body, name):
    """Let the page get a file as by drag and drop, or from the clipboard."""
    page.evaluate(
        """([kind, bytes, name]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
            const options = { bubbles: true, cancelable: true };
            const event = kind === "paste"
                ? new ClipboardEvent("paste", { ...options, clipboardData: data })
                : new DragEvent(kind, { ...options, dataTransfer: data });
            document.querySelector("#drop").dispatchEvent(event);
        }""",
        [kind, list(body), name],
    )
