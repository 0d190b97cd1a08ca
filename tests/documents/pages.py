"""The documents: where they lie, and which of them are made from the code."""

from tests.documents import cli_reference, recipes_page, sizing
from tests.places import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]

OPERATIONS = DOCS / "operations.md"
BEGIN, END = "<!-- sizing -->\n", "\n<!-- end -->"


def operations():
    """Return the page with the table of sizes as it is now."""
    before, rest = OPERATIONS.read_text().split(BEGIN)
    return f"{before}{BEGIN}\n{sizing.describe()}\n{END}{rest.split(END)[1]}"


GENERATED = {
    DOCS / "cli.md": cli_reference.describe,
    DOCS / "recipes.md": recipes_page.describe,
    OPERATIONS: operations,
}
