"""What the page gives to the clipboard, and what it says when it is refused."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from playwright.sync_api import expect

from cache_builder.formats.views import View
from tests.tokenizers_svc.page_in_browser.support import (
    PHOTO,
    choose,
    ids_of,
    shown_ids,
    wait_for_answer,
)
from tests.tokenizers_svc.support import ROOT, make_tokenizer, serving
from tokenizers_svc.access import AccessOptions
from tokenizers_svc.app import create_app
from tokenizers_svc.options import ServiceOptions

SECRET = "a-key-for-the-tests-0123456789abcdef"


def copied(page, label):
    page.get_by_role("button", name=label).click()
    expect(page.locator("#copied")).to_have_text("Copied.")
    return page.evaluate("navigator.clipboard.readText()")


def choose_mirrored_view(page, folder):
    """Choose a picture, with a name that is hard to quote, and a view; return the ids."""
    name = "it's a $photo.jpg"
    (folder / name).write_bytes(PHOTO)
    choose(page, name=name)
    page.get_by_label("Mirror").check()
    wait_for_answer(page)
    view = View(0, 10, 60, 60, hflip=True)
    return ids_of(make_tokenizer(), view=view)


@pytest.mark.skipif(not shutil.which("curl"), reason="there is no curl")
def test_the_copied_curl_command_gets_the_ids_that_are_shown(page, tmp_path):
    expected = choose_mirrored_view(page, tmp_path)
    command = copied(page, "Copy the curl command")
    done = subprocess.run(
        ["sh", "-c", f"{command} --no-progress-meter"],
        cwd=tmp_path,
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout)["token_ids"] == expected.ravel().tolist()


def test_the_copied_python_program_prints_the_ids_that_are_shown(page, tmp_path):
    expected = choose_mirrored_view(page, tmp_path)
    program = copied(page, "Copy the Python program")
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=True,
        text=True,
    )
    assert done.stdout == f"{expected}\n"


def test_calls_are_copied_where_the_browser_has_no_clipboard_for_the_page(page):
    choose(page)
    page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    page.get_by_role("button", name="Copy the curl command").click()
    expect(page.locator("#copied")).to_have_text("Copied.")


def test_a_refusal_is_shown_with_its_reason_and_leaves_nothing_of_the_last_answer(page):
    choose(page)
    page.set_input_files(
        "#file", {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no picture"}
    )
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("The body is not a picture of a known format")
    expect(alert).to_contain_text("not-an-image, status 415, request ")
    expect(page.locator("#results")).to_be_hidden()
    expect(page.locator("#calls")).to_be_hidden()
    choose(page)
    expect(alert).to_be_empty()


def test_a_view_outside_is_refused_and_the_numbers_stay_to_be_mended(page):
    choose(page)
    page.get_by_label("Width", exact=True).fill("500")
    page.get_by_label("Width", exact=True).blur()
    expect(page.get_by_role("alert")).to_contain_text("view-outside")
    expect(page.get_by_label("Width", exact=True)).to_have_value("500")


def test_a_file_that_the_service_would_not_read_is_not_sent(page):
    page.set_input_files(
        "#file", {"name": "large.jpg", "mimeType": "image/jpeg", "buffer": bytes(100_001)}
    )
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("It has 100,001 bytes; this service takes 100,000.")
    expect(alert.get_by_role("button")).to_have_count(0)


def test_a_service_that_is_away_can_be_asked_again(page):
    page.context.route("**/v1/tokenize*", lambda route: route.abort())
    page.set_input_files("#file", {"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": PHOTO})
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("The service does not answer")
    page.context.unroute("**/v1/tokenize*")
    alert.get_by_role("button", name="Try again").click()
    wait_for_answer(page)
    assert np.array_equal(shown_ids(page), ids_of(make_tokenizer()))


def test_a_key_is_asked_for_used_and_kept_nowhere(open_page, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(SECRET + "\n")
    keys.chmod(0o600)
    options = ServiceOptions(access=AccessOptions(key_file=keys))
    with serving(create_app(make_tokenizer(), model="guarded", options=options)) as client:
        page = open_page(str(client.base_url))
        expect(page.get_by_role("alert")).to_contain_text("unauthorized, status 401")
        key = page.get_by_label("Key, if this service asks for one")
        expect(key).to_be_visible()
        key.fill(SECRET)
        key.press("Enter")
        expect(page.locator("#about")).to_contain_text("guarded: 16 ids")
        choose(page)
        assert SECRET not in page.locator("#calls").inner_text()
        assert 'Bearer $PATCHCACHE_KEY"' in page.locator("#curl").inner_text()
        assert 'key=os.environ["PATCHCACHE_KEY"]' in page.locator("#python").inner_text()
        assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [
            0, 0, "",
        ]  # fmt: skip
        page.reload()
        expect(page.get_by_role("alert")).to_contain_text("status 401")
