"""HTML pages that need nothing but themselves: one style, light and dark, no script, no network."""

import html
from collections.abc import Iterable, Sequence

from cache_builder.measures import Measure

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
.beside { min-width: 10rem; }
.measures tr + tr { border-top: 1px solid var(--rule); }
.measures .number { white-space: nowrap; font-variant-numeric: tabular-nums; }
.patches { display: grid; grid-template-columns: repeat(8, 1fr); gap: .2rem; }
.patches img { width: 100%; display: block; }
pre { padding: .8rem; overflow-x: auto; }
.sample { display: grid; gap: .4rem 1.2rem; padding: 1rem 0; align-items: start; }
.sample { border-top: 1px solid var(--rule); }
.sample { grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); }
.views { display: grid; gap: .8rem .5rem; }
.views { grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); }
.view { display: grid; gap: .25rem; max-width: 14rem; font-size: .85rem; }
.view img { width: 100%; display: block; aspect-ratio: 1; image-rendering: pixelated; }
.view img.photo { image-rendering: auto; } .view b { padding: 0 .45em; border-radius: .2em; }
.few { display: grid; column-gap: 2rem; }
.few { grid-template-columns: repeat(auto-fill, minmax(min(28rem, 100%), 1fr)); }
.few .views { grid-template-columns: minmax(0, 1fr); }
.few .view { grid-template-columns: repeat(3, minmax(0, 1fr)); max-width: none; }
.few .view span { grid-column: 1 / -1; }
svg.boxes { display: block; max-height: 26rem; max-width: 100%; margin-bottom: .4rem; }
svg.boxes { font-weight: 600; }
svg.boxes rect.blank { fill: color-mix(in srgb, currentColor 8%, transparent); }
.counts { display: grid; grid-template-columns: minmax(4rem, auto) 1fr auto; gap: .15rem .8rem; }
.counts { max-width: 40rem; font-size: .9rem; align-items: center; }
.counts i { background: var(--line); height: .8em; min-width: 1px; }
.counts span { overflow-wrap: anywhere; } .counts em { grid-column: 1 / -1; }
.counts b { font-weight: normal; text-align: right; font-variant-numeric: tabular-nums; }
@media (max-width: 44rem) {
  .sample { grid-template-columns: minmax(0, 1fr); }
  .views { grid-template-columns: repeat(auto-fill, minmax(5rem, 1fr)); }
  .view small { display: none; } .beside { min-width: 0; }
}
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


def measure_table(lines: Iterable[Measure]) -> str:
    """Return measures as a table that scrolls where it is too wide."""
    return table(
        ("measure", "value", "beside", "meaning"),
        lines,
        classes=("", "number", "muted beside", "muted wide"),
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]], classes: Sequence[str] = ()) -> str:
    """Return rows of plain text as a table that scrolls where it is too wide.

    Args:
        header: Names of the columns.
        rows: As long as the header.
        classes: Of the cells of a column; none by default.
    """
    kinds = [f' class="{kind}"' if kind else "" for kind in classes or [""] * len(header)]
    heads = "".join(
        f"<th{kind if 'number' in kind else ''}>{html.escape(name)}</th>"
        for kind, name in zip(kinds, header, strict=True)
    )
    lines = "".join(
        "<tr>"
        + "".join(
            f"<td{kind}>{html.escape(text)}</td>" for kind, text in zip(kinds, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table class="measures"><tr>{heads}</tr>{lines}</table></div>'


def count_bars(lines: Iterable[tuple[str, int]]) -> str:
    """Return names with their counts as bars, the longest as wide as there is room.

    A name without a count (-1) is a remark between the bars.
    """
    found = list(lines)
    top = max((count for _, count in found), default=0) or 1
    drawn = "".join(
        f'<em class="muted">{html.escape(name)}</em>'
        if count < 0
        else f'<span>{html.escape(name)}</span><i style="width:{count / top:.2%}"></i>'
        f"<b>{count:,}</b>"
        for name, count in found
    )
    return f'<div class="counts">{drawn}</div>'
