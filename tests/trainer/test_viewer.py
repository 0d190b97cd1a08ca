"""Counting and drawing look at a run and change nothing of it."""

import importlib.util

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from cache_builder.errors import MissingDependencyError
from tests import factories
from tests.trainer.caches import tiny_config
from tests.trainer.logs import read_rows
from tests.trainer.methods import NUM_PATCHES, draws, make_objective, read_batch
from trainer import flops, train
from trainer.objectives.interface import Preview
from trainer.pictures import TokenColours, component_colours, draw_preview


def losses(out):
    return [(row["step"], row["loss"], row["gradient_norm"]) for row in read_rows(out)]


def test_the_count_of_a_vit_is_that_of_its_matrix_products():
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    images = torch.zeros(2, 3, 224, 224)
    tokens, width, hidden, depth = 197, 192, 768, 12
    patches = 196 * 16 * 16 * 3 * width
    block = tokens * width * (4 * width + 2 * hidden) + 2 * tokens * tokens * width
    forward = 2 * (patches + depth * block)
    assert flops.training_flops(vit, lambda: vit(images), 2) == pytest.approx(3 * forward)


def test_counting_and_looking_change_nothing_of_a_module():
    module = torch.nn.Sequential(
        torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5)
    )
    module[0].eval()
    with torch.no_grad():
        module[1].running_mean += 3
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.get_rng_state()

    def disturb():
        torch.randn(3)
        module[1].running_mean.add_(1)
        return module(torch.ones(2, 4))

    flops.training_flops(module, disturb, 2)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert [part.training for part in module] == [False, True, True]
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("Some card", None),
    ],
)
def test_the_peak_of_a_card_follows_from_its_name(name, peak):
    assert flops.peak_of(name) == peak


def test_mfu_is_what_is_needed_over_what_the_devices_can_do():
    assert flops.Utilisation(100e9, 1e12).mfu(4.0, num_devices=2) == pytest.approx(0.2)


def test_without_a_known_peak_no_mfu_is_shown_and_with_one_it_is(tiny_cache, tmp_path, caplog):
    caplog.set_level("INFO")
    train.run(tiny_config(run={"steps": 3}), tiny_cache, tmp_path / "plain")
    assert "mfu" not in caplog.text
    assert all("mfu" not in row for row in read_rows(tmp_path / "plain"))
    train.run(tiny_config(run={"steps": 3, "peak_flops": 1e12}), tiny_cache, tmp_path / "known")
    assert "mfu" in caplog.text
    objective = make_objective(tiny_cache, "beit", mask_ratio=0.5, mask_kind="random")
    inputs = read_batch(tiny_cache, objective)
    per_image = flops.training_flops(objective, lambda: objective(*inputs, draws()), 4)
    for row in read_rows(tmp_path / "known"):
        assert row["mfu"] == pytest.approx(per_image * row["images_per_s"] / 1e12)
    assert losses(tmp_path / "plain") == losses(tmp_path / "known")


def test_a_line_of_the_log_says_loss_accuracy_perplexity_speed_wait_and_eta(
    tiny_cache, tmp_path, caplog
):
    caplog.set_level("INFO")
    train.run(tiny_config(run={"steps": 3, "peak_flops": 1e12}), tiny_cache, tmp_path)
    lines = [record.getMessage() for record in caplog.records]
    (line,) = (line for line in lines if line.startswith("step 1 "))
    words = line.split()
    assert words[::2] == ["step", "loss", "acc", "ppl", "img/s", "mfu", "wait", "eta"]


def test_pictures_change_no_loss_and_lie_in_the_run(tiny_cache, tmp_path):
    changes = {"model": {"drop_path": 0.3}, "data": {"color_jitter": 0.4}}
    train.run(tiny_config(**changes), tiny_cache, tmp_path / "without")
    train.run(tiny_config(run={"picture_every": 5}, **changes), tiny_cache, tmp_path / "with")
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    names = sorted(path.name for path in (tmp_path / "with" / "pictures").iterdir())
    assert names == ["step_00000005.png", "step_00000010.png"]
    with Image.open(tmp_path / "with" / "pictures" / names[0]) as picture:
        assert picture.width > 4 * 168
        assert picture.height > 8 * 168
    assert not (tmp_path / "without" / "pictures").exists()


def test_pictures_are_in_tensorboard(tiny_cache, tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator
    train.run(tiny_config(run={"picture_every": 6, "peak_flops": 1e12}), tiny_cache, tmp_path)
    events = accumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Images("preview")] == [6, 12]
    assert {"loss", "accuracy", "perplexity", "images_per_s", "data_wait", "mfu"} <= set(
        events.Tags()["scalars"]
    )


def test_a_picture_shows_targets_in_their_colours_and_hides_what_is_hidden():
    codebook, grid = factories.colour_codebook(), (4, 4)
    ids = torch.from_numpy(factories.random_ids(0)).flatten()[None]
    images = torch.from_numpy(factories.draw_patches(ids.view(4, 4).numpy()) / 255.0)
    images = images.permute(2, 0, 1)[None].float()
    hidden = torch.arange(NUM_PATCHES)[None] < 8
    preview = Preview(images, hidden, hidden, (ids + 1) % 6)
    colours = TokenColours(codebook, grid)
    assert torch.equal(colours.draw(ids), images)
    pixels = draw_preview(images, ids, preview, colours, grid, "title")
    tile = (pixels.shape[1] - 5 * 8) // 4
    centre = tile // 8  # of the first patch, and from there of the others

    def seen(column, patch):
        row, col = divmod(patch, 4)
        top, left = 60 + row * tile // 4, 8 + column * (tile + 8) + col * tile // 4
        return pixels[top + centre, left + centre].tolist()

    for patch, token in enumerate(ids[0].tolist()):
        colour = factories.COLOURS[token].tolist()
        assert seen(0, patch) == seen(2, patch) == colour
        assert (seen(1, patch) == colour) == (patch >= 8)
        if patch < 8:
            assert seen(3, patch) == factories.COLOURS[(token + 1) % 6].tolist()


def test_near_centroids_of_features_have_near_colours_and_the_same_ones_every_time():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 32)) * 10
    centroids = (centres[np.arange(40) % 4] + rng.normal(size=(40, 32)) * 0.1).astype(np.float32)
    colours = component_colours(centroids)
    assert colours.shape == (40, 3)
    assert 0 <= colours.min() <= colours.max() <= 1
    assert np.array_equal(colours, component_colours(centroids))
    distances = np.linalg.norm(colours[:, None] - colours, axis=-1)
    same = np.arange(40)[:, None] % 4 == np.arange(40) % 4
    assert distances[same].max() < 0.1 < distances[~same].min()


def test_weights_and_biases_that_is_not_installed_is_named_with_the_way_out(tiny_cache, tmp_path):
    if importlib.util.find_spec("wandb"):
        pytest.skip("Weights & Biases is installed")
    config = tiny_config(run={"wandb_project": "vits"})
    with pytest.raises(MissingDependencyError, match=r"wandb_project is 'vits'.*pip install wandb"):
        train.run(config, tiny_cache, tmp_path)


def test_weights_and_biases_gets_every_row_offline(tiny_cache, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="Weights & Biases is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = tiny_config(run={"wandb_project": "vits", "steps": 4, "picture_every": 2})
    train.run(config, tiny_cache, tmp_path, stop_after=2)
    train.run(config, tiny_cache, tmp_path)
    assert [step for step, *_ in losses(tmp_path)] == [1, 2, 3, 4]
    names = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    run_id = (tmp_path / "wandb_id").read_text()
    assert len(names) == 2
    assert all(name.endswith(run_id) for name in names)
