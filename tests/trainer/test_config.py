"""Recipes load, and a wrong setting is told by its key and its value."""

import logging

import pytest
from typer.testing import CliRunner

from cache_builder.cli import app
from cache_builder.errors import ConfigError
from tests.trainer.caches import TINY, tiny_config
from trainer.config import load_config, recipe_names
from trainer.objectives import METHOD_NAMES


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
        ("otpim.clip_norm=none", r"Unknown key 'otpim'; did you mean 'optim'"),
        ("optim.clip_nrom=none", r"Unknown key 'optim.clip_nrom'; did you mean 'clip_norm'"),
        ("run.steps=many", r"Wrong value 'many' for 'run.steps'"),
        ("run.steps=0", r"0 for 'run.steps'"),
        ("objective.mask_ratio=1.5", r"1.5 for 'objective.mask_ratio'.*less than 1"),
        ("run.precision=fp8", r"'fp8' for 'run.precision'.*'bf16'"),
        ("optim.min_lr=2", r"'optim'.*min_lr 2.0 is above lr"),
        ("optim.betas=[0.9, 1.0]", r"'optim'.*betas must lie in \[0, 1\), not \(0.9, 1.0\)"),
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


def test_a_method_alone_is_trained_by_the_recipe_of_its_name():
    for name in METHOD_NAMES:
        assert load_config(method=name) == load_config(name)
        assert load_config(name).objective.method == name


def test_a_method_takes_the_place_of_the_recipes_and_keeps_the_settings_it_knows(caplog):
    with caplog.at_level(logging.INFO, logger="trainer.config"):
        config = load_config("beitv2", ["objective.visible_weight=0.5"], method="dmjd")
    assert config.objective.method == "dmjd"
    assert config.objective.mask_kind == "block"
    assert config.objective.visible_weight == 0.5
    assert config.optim == load_config("beitv2").optim
    (line,) = caplog.messages
    assert line == ("of beitv2, dmjd has no aggregation_blocks, aggregation_layer; left out")


@pytest.mark.parametrize(
    ("recipe", "overrides", "method", "message"),
    [
        (None, [], None, r"Name a recipe or a method.*beit_drop.*dmjd"),
        ("beit", [], "biet", r"no method 'biet'. Pass --method with one of: .*dmjd"),
        ("beit", ["objective.method=mcbeit"], "dmjd", r"contradict.*Leave one of them out"),
        ("beit", ["objective.aggregation_blocks=2"], "dmjd", r"Unknown key .*aggregation_blocks"),
    ],
)
def test_a_wrong_choice_of_method_is_refused(recipe, overrides, method, message):
    with pytest.raises(ConfigError, match=message):
        load_config(recipe, overrides, method=method)


def test_the_help_of_train_lists_the_recipes():
    text = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "300"}).output
    assert f"({', '.join(recipe_names())})" in " ".join(text.split())


def test_the_command_trains_by_a_method_into_a_folder_of_its_name(
    tiny_cache, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    sets = [
        f"{section}.{key}={value}"
        for section in ("data", "model", "optim", "run")
        for key, value in TINY[section].items()
    ]
    sets.append("data.num_workers=0")
    words = [word for each in sets for word in ("--set", each)]
    for choice, name in (
        (["--method", "mcbeit"], "mcbeit"),
        (["beit_drop", "--method", "dmjd"], "beit_drop-dmjd"),
    ):
        done = CliRunner().invoke(app, ["train", *choice, "--cache", str(tiny_cache), *words])
        assert done.exit_code == 0, done.output
        assert (tmp_path / "runs" / name / "log.jsonl").is_file()


def test_pictures_of_a_sharded_model_are_refused():
    with pytest.raises(ConfigError, match=r"picture_every.*no process has the whole model"):
        tiny_config(run={"sharding": "fsdp", "picture_every": 10})
