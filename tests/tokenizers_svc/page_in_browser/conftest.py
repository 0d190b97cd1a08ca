"""One Chromium and one service with three models for every module."""

import shutil

import pytest
from playwright.sync_api import expect, sync_playwright

from tests.tokenizers_svc.page_in_browser.support import (
    PATIENCE_MS,
    make_cosine_tokenizer,
    make_residual_tokenizer,
)
from tests.tokenizers_svc.support import make_tokenizer, serving
from tokenizers_svc.app import create_app
from tokenizers_svc.limits import Limits

ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-dev-shm-usage",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next(filter(None, map(shutil.which, names)), None)
    if executable is None:
        pytest.skip(f"none of {', '.join(names)} is installed")
    expect.set_options(timeout=PATIENCE_MS)
    # Not longer than this module: while it runs, this thread cannot run an event loop of its own.
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable, args=list(ARGUMENTS), timeout=PATIENCE_MS
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def url():
    codebooks = {
        "tiny": make_tokenizer(),
        "residual": make_residual_tokenizer(),
        "cosine": make_cosine_tokenizer(),
    }
    with serving(create_app(codebooks, limits=Limits(max_body_bytes=100_000))) as client:
        yield str(client.base_url)


@pytest.fixture
def open_page(browser):
    """Open the page of a service; nothing but that service can be reached, or is asked for."""
    contexts, complaints = [], []

    def open_at(url, **options):
        context = browser.new_context(permissions=["clipboard-read", "clipboard-write"], **options)
        contexts.append(context)
        context.set_default_timeout(PATIENCE_MS)

        def guard(route):
            if route.request.url.startswith(url):
                route.continue_()
            else:
                complaints.append(f"asked for {route.request.url}")
                route.abort()

        context.route("**/*", guard)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.extend(_complaint(message)))
        page.goto(url)
        expect(page.locator("#about")).not_to_contain_text("Asking")
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert complaints == []


def _complaint(message):
    # A refusal is logged by the browser itself.
    is_refusal = "Failed to load resource" in message.text
    return [message.text] if message.type == "error" and not is_refusal else []


@pytest.fixture
def page(open_page, url):
    return open_page(url)
