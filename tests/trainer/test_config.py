import pytest

from cache_builder.errors import ConfigError
from trainer.config import load_config, recipe_names


def test_every_recipe_of_ours_loads():
    assert {"beit", "beit_drop"} <= set(recipe_names())
    for name in recipe_names():
        assert load_config(name).run.steps > 0


def test_overrides_are_toml_values_or_bare_words():
    config = load_config(
        "beit_drop", ["optim.lr=1e-4", "run.device=cpu", "optim.betas=[0.8, 0.9]", "run.steps=70"]
    )
    assert config.optim.lr == 1e-4
    assert config.run.device == "cpu"
    assert config.optim.betas == (0.8, 0.9)
    assert config.run.steps == 70


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.weigth_decay=0", r"Unknown key 'optim.weigth_decay'; did you mean 'weight_decay'"),
        ("otpim.lr=1", r"Unknown key 'otpim.*did you mean 'optim'"),
        ("run.steps=many", r"Wrong value 'many' for 'run.steps'"),
        ("run.steps=0", r"0 for 'run.steps'"),
        ("objective.mask_ratio=1.5", r"1.5 for 'objective.mask_ratio'.*less than 1"),
        ("run.precision=fp8", r"'fp8' for 'run.precision'.*'bf16'"),
        ("lr", r"lr"),
    ],
)
def test_a_wrong_setting_names_the_key_and_the_value(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config("beit_drop", [override])


def test_an_unknown_recipe_names_those_that_there_are():
    with pytest.raises(ConfigError, match="beit_drop"):
        load_config("biet")


def test_a_recipe_that_is_not_toml_says_where(tmp_path):
    path = tmp_path / "broken.toml"
    path.write_text("[run\nsteps = 1")
    with pytest.raises(ConfigError, match=r"broken\.toml"):
        load_config(path)
