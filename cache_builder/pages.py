"""HTML pages that need nothing but themselves: one style, light and dark, no script, no network."""

import html
from collections.abc import Iterable

_STYLE = """
:root { color-scheme: light dark; }
:root { --line: light-dark(#2563eb, #6ea0ff); --muted: light-dark(#5b6472, #a1aab8); }
:root { --rule: light-dark(#d1d5db, #3b4350); }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; } .muted { color: var(--muted); }
table { border-collapse: collapse; } td, th { padding: .25rem .9rem .25rem 0; text-align: left; }
td.number, th.number { text-align: right; }
.images { display: grid; gap: 1.2rem; }
.images { grid-template-columns: repeat(auto-fill, minmax(min(30rem, 100%), 1fr)); }
figure { margin: 0; }
figcaption { color: var(--muted); font-size: .85rem; overflow-wrap: anywhere; }
.row { display: grid; grid-template-columns: repeat(3, 1fr); gap: .3rem; margin-bottom: .3rem; }
.row img { width: 100%; image-rendering: pixelated; display: block; }
.row img.photo { image-rendering: auto; } .sheet { image-rendering: pixelated; max-width: 100%; }
svg { width: 100%; max-width: 40rem; font: 12px system-ui, sans-serif; fill: currentColor; }
svg .line { fill: none; stroke: var(--line); stroke-width: 2; }
svg .grid { stroke: var(--rule); stroke-width: .5; } svg.bars { fill: var(--line); }
svg .level { stroke: currentColor; stroke-width: 1; stroke-dasharray: 5 4; opacity: .6; }
.scroll { overflow-x: auto; } .measures td { vertical-align: top; } .wide { min-width: 16rem; }
.measures tr + tr { border-top: 1px solid var(--rule); }
.measures .number { white-space: nowrap; font-variant-numeric: tabular-nums; }
.patches { display: grid; grid-template-columns: repeat(8, 1fr); gap: .2rem; }
.patches img { width: 100%; display: block; }
pre { padding: .8rem; overflow-x: auto; }
pre { background: color-mix(in srgb, currentColor 8%, transparent); }
"""


def document(title: str, lead: str, sections: Iterable[str]) -> str:
    """Return a page of HTML sections under a title and a line of plain text."""
    body = "\n".join(sections)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>"
        f'<h1>{html.escape(title)}</h1><p class="muted">{html.escape(lead)}</p>'
        f"{body}</html>\n"
    )


def picture_row(cells: Iterable[tuple[str, str, str]]) -> str:
    """Return pictures side by side: class (`photo` is smoothed), data URI, description."""
    images = "".join(
        f'<img class="{kind}" alt="{html.escape(text)}" src="{uri}">' for kind, uri, text in cells
    )
    return f'<div class="row">{images}</div>'
