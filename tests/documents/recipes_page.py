"""docs/recipes.md: the recipes of the trainer as they are."""

from pathlib import Path

RECIPES = Path(__file__).parents[2] / "trainer" / "recipes"
HEAD = """\
# Recipes

Made from `trainer/recipes/` by `python -m tests.documents`. `patchcache train NAME` takes one by
its name, `--set a.b=value` changes a setting, and a TOML file of your own is given by its path. The
header of each says where its values come from, what differs from that, what is to be expected and
what was measured. [Methods](methods.md) says what each method sees and predicts.
"""
FINE_TUNING = """\
## Fine-tuning

`patchcache finetune NAME` takes these; [Runs](evaluation.md#probe-and-fine-tuning) has examples.
"""


def describe():
    """Return the page."""
    sections = [_section("##", path) for path in sorted(RECIPES.glob("*.toml"))]
    fine_tuning = [_section("###", path) for path in sorted(RECIPES.glob("finetune/*.toml"))]
    return "\n".join([HEAD, *sections, FINE_TUNING, *fine_tuning])


def _section(level, path):
    return f"{level} {path.stem}\n\n```toml\n{path.read_text().rstrip()}\n```\n"
