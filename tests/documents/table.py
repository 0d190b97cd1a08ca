"""Tables in Markdown."""


def table(header, rows):
    """Return a table; every cell is Markdown already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "|" + "|".join(f" {cell} " if cell else " " for cell in line) + "|" for line in lines
    )
