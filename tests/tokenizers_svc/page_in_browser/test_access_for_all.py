"""The page for those who see little, use no mouse, or hold a phone."""

import pytest
from playwright.sync_api import expect

from tests.tokenizers_svc.page_in_browser.support import choose

CONTROLS_WITHOUT_A_NAME = """
[...document.querySelectorAll("button, input, select, summary, a, [tabindex='0'], [role=img]")]
    .filter((e) => e.checkVisibility())
    .filter((e) => ![
        e.getAttribute("aria-label"), e.labels?.[0]?.textContent, e.textContent,
        ...(e.getAttribute("aria-labelledby") ?? "").split(" ")
            .map((id) => document.getElementById(id)?.textContent),
    ].some((text) => text?.trim()))
    .map((e) => e.outerHTML)
"""
BROKEN_REFERENCES = """
[...document.querySelectorAll("*")]
    .flatMap((e) => ["aria-labelledby", "aria-describedby", "aria-activedescendant", "for"]
        .flatMap((name) => (e.getAttribute(name) ?? "").split(" ")))
    .filter((id) => id && document.querySelectorAll(`[id="${id}"]`).length !== 1)
"""
# WCAG 2: (L1 + 0.05) / (L2 + 0.05) of text and what is painted under it.
LOW_CONTRAST = """
(() => {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const rgba = (colour) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        return canvas.getImageData(0, 0, 1, 1).data;
    };
    const ground = (e) => {
        for (; e; e = e.parentElement) {
            const colour = getComputedStyle(e).backgroundColor;
            if (rgba(colour)[3] === 255) return colour;
        }
        return "white";
    };
    const luminance = (colour) => [...rgba(colour)].slice(0, 3)
        .map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, at) => sum + v * [0.2126, 0.7152, 0.0722][at], 0);
    const hasText = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    return [...document.querySelectorAll("body *")]
        .filter((e) => hasText(e) && e.checkVisibility())
        .map((e) => {
            const [a, b] = [getComputedStyle(e).color, ground(e)].map(luminance).sort();
            return [Math.round(100 * (b + 0.05) / (a + 0.05)) / 100, e.textContent.trim()];
        })
        .filter(([ratio]) => ratio < 4.5);
})()
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_has_a_name_and_is_readable_in_light_and_dark(open_page, url, scheme):
    page = open_page(url, color_scheme=scheme)
    assert page.evaluate(LOW_CONTRAST) == []
    choose(page)
    page.get_by_text("API key").click()
    page.locator("#map").focus()
    assert page.evaluate(CONTROLS_WITHOUT_A_NAME) == []
    assert page.evaluate(BROKEN_REFERENCES) == []
    assert page.evaluate(LOW_CONTRAST) == []
    for landmark in ("banner", "main", "navigation"):
        expect(page.get_by_role(landmark)).to_have_count(1)
    for heading in ("Picture", "Tokens", "The same from elsewhere"):
        expect(page.get_by_role("region", name=heading, exact=True)).to_have_count(1)
    page.get_by_label("Width", exact=True).fill("500")
    page.get_by_label("Width", exact=True).blur()
    expect(page.get_by_role("alert")).not_to_be_empty()
    assert page.evaluate(LOW_CONTRAST) == []


def test_what_has_the_focus_of_the_keyboard_is_outlined(page):
    choose(page)
    seen = {}
    while True:
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            """() => {
                const e = document.activeElement;
                if (e === document.body) return [null, null];
                const outlined = e.id === "file" ? e.previousElementSibling : e;
                const name = e.id || e.getAttribute("aria-label") || e.textContent.trim();
                return [name, getComputedStyle(outlined).outlineStyle];
            }"""
        )
        if name is None or name in seen:
            break
        seen[name] = outline
    assert set(seen.values()) == {"solid"}, seen
    order = ["Skip to the tokens", "API documentation", "model", "file", "top", "left", "height"]
    assert [name for name in seen if name in order] == order
    assert {"hflip", "centre", "whole", "overlay", "map", "curl", "python"} <= seen.keys()


def test_a_phone_needs_no_scrolling_to_the_side(open_page, url):
    page = open_page(url, viewport={"width": 360, "height": 740}, has_touch=True)
    choose(page, name="a-name-that-is-long-and-has-no-place-to-break-" * 3 + ".jpg")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.locator("#map").scroll_into_view_if_needed()
    box = page.locator("#map").bounding_box()
    page.touchscreen.tap(box["x"] + 5, box["y"] + 5)
    expect(page.locator("#patch-place")).to_have_text("0, 0")


def test_nothing_moves_for_those_who_asked_for_less_motion(open_page, url):
    page = open_page(url, reduced_motion="reduce")
    page.locator("#tokens").evaluate("e => e.setAttribute('aria-busy', 'true')")
    names = page.evaluate(
        "[...document.querySelectorAll('*')].map((e) => getComputedStyle(e).animationName)"
    )
    assert set(names) == {"none"}
