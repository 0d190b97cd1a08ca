"""Fine-tuning learns labels, and goes on after a stop as if there had been none."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import timm
import torch

from cache_builder.errors import ArtifactError, ConfigError
from tests import factories
from tests.trainer.caches import tiny_config
from tests.trainer.logs import losses, read_rows
from trainer import evaluate, finetune, train
from trainer import finetune_checkpoint as checkpoints
from trainer.backbones import load_backbone
from trainer.classifier import build_classifier
from trainer.export import export
from trainer.finetune_config import (
    FINETUNE_RECIPES,
    load_finetune_config,
    parse_finetune_config,
)
from trainer.finetune_data import AugmentedImages, batches
from trainer.finetune_step import FinetuneStepper
from trainer.labelled import Place, open_labelled

TINY = {
    "data": {"batch_size": 16, "crop_scale": (0.6, 1.0), "mixup": 0.2, "cutmix": 0.2,
             "random_erasing": 0.1, "test_crop": 1.0},
    "model": {"drop_path": 0.1},
    "optim": {"lr": 5e-3, "layer_decay": 0.8, "warmup_epochs": 1},
    "run": {"epochs": 4, "precision": "fp32", "device": "cpu", "log_every": 2},
}  # fmt: skip

TUNE = """
import sys
from tests.trainer.test_finetune import tiny
from trainer import finetune
import torch
torch.set_num_threads(1)
finetune.run(tiny(run={"epochs": 30, "checkpoint_every": 2}), *sys.argv[1:])
"""


def tiny(**sections):
    return parse_finetune_config(
        {name: {**values, **sections.get(name, {})} for name, values in TINY.items()}
    )


def classed(num_images):
    """Two classes: every picture has more of warm colours, or more of cold ones."""
    images = {}
    for i in range(num_images):
        rng = np.random.default_rng(i)
        ids = rng.choice([0, 3] if i % 2 else [1, 2], (4, 4))
        images[f"{'ab'[i % 2]}/{i:03d}.png"] = factories.encode(factories.draw_patches(ids))
    return images


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder of 100 pictures of two classes, and a ViT pre-trained on their tokens."""
    root = tmp_path_factory.mktemp("tuned")
    images = factories.write_folder(root / "images", classed(100))
    codebook = factories.write_codebook(root / "codebook.safetensors")
    factories.build_cache(images=str(images), codebook=codebook, out=root / "cache")
    model = train.run(tiny_config(run={"steps": 20}), root / "cache", root / "run").checkpoint
    return images, model


def assert_equal_states(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_fine_tuning_learns_classes_and_says_how_well(places, tmp_path):
    images, model = places
    summary = finetune.run(tiny(run={"epochs": 8}), model, images, tmp_path)
    assert summary.finished
    assert summary.num_train + summary.num_test == 100
    assert summary.num_classes == 2
    assert summary.top1 > 0.9 > summary.chance
    assert summary.top5 == 1
    rows = read_rows(tmp_path)
    assert rows[-1]["top1"] == summary.top1
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_it_begins_with_the_trained_weights_and_a_fresh_norm_and_head(places):
    config = tiny()
    torch.manual_seed(0)
    backbone = load_backbone(places[1])
    model = build_classifier(backbone, 2, config)
    for name, tensor in backbone.state.items():
        if not name.startswith("norm."):
            assert torch.equal(model.state_dict()[name], tensor), name
    assert isinstance(model.norm, torch.nn.Identity)
    assert torch.equal(model.fc_norm.weight, torch.ones(32))
    assert 0 < model.head.weight.abs().max() < 1e-4
    assert model.global_pool == "avg"
    scratch = build_classifier(backbone, 2, tiny(model={"weights": "random"}))
    assert not torch.equal(scratch.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


def test_lower_layers_learn_more_slowly_and_vectors_do_not_decay(places):
    _, model = places
    stepper = FinetuneStepper(
        tiny(), load_backbone(model), num_classes=2, steps_per_epoch=4, device=torch.device("cpu")
    )
    names = {id(p): name for name, p in stepper.model.named_parameters()}
    found = {
        names[id(p)]: (group["lr_scale"], group["weight_decay"])
        for group in stepper.optimizer.param_groups
        for p in group["params"]
    }
    assert found["head.weight"] == (1, 0.05)
    assert found["head.bias"] == (1, 0)
    assert found["blocks.1.attn.qkv.weight"] == pytest.approx((0.8, 0.05))
    assert found["blocks.0.attn.qkv.weight"] == pytest.approx((0.8**2, 0.05))
    assert found["patch_embed.proj.weight"] == pytest.approx((0.8**3, 0.05))
    assert found["pos_embed"] == pytest.approx((0.8**3, 0))
    assert found["cls_token"] == pytest.approx((0.8**3, 0))


def test_stopping_and_going_on_changes_nothing_wherever_it_happens(places, tmp_path):
    images, model = places
    config = tiny(model={"ema_decay": 0.9})
    whole = finetune.run(config, model, images, tmp_path / "whole")
    for stop_after in (1, 7):
        part = finetune.run(config, model, images, tmp_path / "parts", stop_after=stop_after)
        assert not part.finished
    parts = finetune.run(config, model, images, tmp_path / "parts")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    first, second = (checkpoints.load(run.checkpoint) for run in (whole, parts))
    assert_equal_states(first.model, second.model)
    assert_equal_states(first.ema, second.ema)
    assert (parts.top1, parts.steps) == (whole.top1, whole.steps)


def test_workers_change_nothing(places, tmp_path):
    images, model = places
    for name, workers in (("alone", 0), ("helped", 1)):
        config = tiny(data={"num_workers": workers})
        finetune.run(config, model, images, tmp_path / name, stop_after=3)
    assert losses(tmp_path / "alone") == losses(tmp_path / "helped")


def test_sigterm_finishes_the_step_and_writes_a_checkpoint(places, tmp_path):
    images, model = places
    argv = [sys.executable, "-c", TUNE, str(model), str(images), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}  # noqa: PTH109
    process = subprocess.Popen(argv, env=environment)
    while checkpoints.latest(tmp_path) is None:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert checkpoints.load(tmp_path).header.progress.step >= max(losses(tmp_path))


def test_another_model_or_other_images_or_settings_are_refused_on_resume(places, tmp_path):
    images, model = places
    out = tmp_path / "run"
    finetune.run(tiny(), model, images, out, stop_after=1)
    with pytest.raises(ConfigError, match=r"optim.lr was 0.005, is 0.001"):
        finetune.run(tiny(optim={"lr": 1e-3}), model, images, out)
    export(model, tmp_path / "vit.safetensors")
    others = factories.write_folder(tmp_path / "others", classed(60))
    with pytest.raises(ConfigError, match="samples was"):
        finetune.run(tiny(), model, others, out)
    other = train.run(
        tiny_config(), images.parent / "cache", tmp_path / "other", stop_after=3
    ).checkpoint
    with pytest.raises(ConfigError, match="begun_with was"):
        finetune.run(tiny(), other, images, out)


def test_the_directory_of_a_pre_training_is_refused(places, tmp_path):
    images, model = places
    with pytest.raises(ConfigError, match=r"holds a run of pre-training.*another --out"):
        finetune.run(tiny(), model, images, model.parent.parent)


@pytest.mark.parametrize("stop_after", [0, -1])
def test_a_run_cannot_stop_before_its_first_step(places, tmp_path, stop_after):
    images, model = places
    with pytest.raises(ConfigError, match=rf"counts steps from 1; it cannot be {stop_after}"):
        finetune.run(tiny(), model, images, tmp_path / "tuned", stop_after=stop_after)
    assert not (tmp_path / "tuned").exists()


def test_pre_training_refuses_the_directory_of_a_fine_tuning(places, tmp_path):
    images, model = places
    finetune.run(tiny(), model, images, tmp_path / "tuned")
    with pytest.raises(ConfigError, match=r"holds a run of fine-tuning.*another --out"):
        train.run(tiny_config(), images.parent / "cache", tmp_path / "tuned")


def test_the_command_line_fine_tunes_probes_inspects_and_exports(places, tmp_path, patchcache):
    images, model = places
    settings = ["data.batch_size=16", "run.epochs=2", "run.device=cpu"]
    words = [word for setting in settings for word in ("--set", setting)]
    out = tmp_path / "tuned"
    done = patchcache("finetune", "small", "--model", model, "--data", images, "--out", out, *words)
    assert done.status == 0, done.err
    assert "accuracy     top 1" in done.out
    again = patchcache(
        "finetune", "small", "--model", model, "--data", images, "--out", out, *words, "--json"
    )
    result = json.loads(again.out)
    assert result["finished"]
    assert f"top 1 {result['top1']:.1%}" in done.out
    described = json.loads(patchcache("inspect", result["checkpoint"], "--json").out)
    assert (described["step"], described["num_classes"]) == (result["steps"], 2)
    probed = patchcache("probe", out, "--data", images, "--json")
    assert json.loads(probed.out)["num_classes"] == 2
    exported = patchcache("export", out, "--out", tmp_path / "hub", "--layout", "huggingface")
    assert f"local-dir:{tmp_path / 'hub'}" in exported.out
    assert (tmp_path / "hub" / "config.json").is_file()


def test_a_damaged_checkpoint_is_named_with_the_way_out(places, tmp_path):
    images, model = places
    newest = finetune.run(tiny(), model, images, tmp_path, stop_after=1).checkpoint
    factories.flip_byte(newest)
    with pytest.raises(ArtifactError, match=rf"{newest.name}.*Delete {newest.name}"):
        finetune.run(tiny(), model, images, tmp_path)


def test_a_classifier_is_probed_and_exported_with_its_head(places, tmp_path):
    images, model = places
    tuned = finetune.run(tiny(), model, images, tmp_path / "run").checkpoint
    assert evaluate.probe(tmp_path / "run", data=images, k=5).linear > 0.9
    call = export(tuned, tmp_path / "classifier.safetensors")
    classifier = eval(call, {"timm": timm}).eval()
    assert classifier.num_classes == 2
    assert_equal_states(classifier.state_dict(), checkpoints.load(tuned).model)
    call = export(tuned, tmp_path / "folder", "huggingface")
    again = eval(call, {"timm": timm}).eval()
    assert_equal_states(again.state_dict(), checkpoints.load(tuned).model)
    assert again.pretrained_cfg["label_names"] == ["a", "b"]


def test_an_export_with_a_moving_average_is_the_average(places, tmp_path):
    images, model = places
    config = tiny(model={"ema_decay": 0.9})
    tuned = finetune.run(config, model, images, tmp_path / "run", stop_after=4).checkpoint
    loaded = checkpoints.load(tuned)
    assert not torch.equal(loaded.ema["head.weight"], loaded.model["head.weight"])
    assert_equal_states(dict(load_backbone(tuned).state), loaded.ema)


def test_a_test_set_of_its_own_is_used_by_class_name(places, tmp_path):
    images, model = places
    only_b = {name: data for name, data in classed(40).items() if name.startswith("b/")}
    place = factories.write_folder(tmp_path / "test", only_b)
    summary = finetune.run(
        tiny(run={"epochs": 8}), model, images, tmp_path / "run", test_data=place
    )
    assert (summary.num_train, summary.num_test) == (100, 20)
    assert summary.top1 > 0.9


def test_an_image_looks_the_same_whenever_it_is_read_in_an_epoch(places):
    images = open_labelled(places[0])
    data = AugmentedImages(images, load_backbone(places[1]), tiny().data, seed=0)
    spots, labels = images.places(), images.labels()

    def read(epoch):
        (samples,) = batches(spots[:8], labels[:8], 8, seed=0, steps=range(epoch, epoch + 1))
        return data.read(samples).images

    first, again, later = read(0), read(0), read(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, later)


def test_an_epoch_has_every_image_at_most_once_in_another_order():
    spots = [Place(str(i), 0, i) for i in range(20)]
    steps = list(batches(spots, [0] * 20, 6, seed=0, steps=range(6)))
    epochs = [[s.place.row for step in steps[at : at + 3] for s in step] for at in (0, 3)]
    assert all(len(set(epoch)) == 18 for epoch in epochs)
    assert {s.epoch for s in steps[3]} == {1}
    assert set(map(tuple, map(sorted, epochs[0:1]))) != set(map(tuple, map(sorted, epochs[1:])))
    again = list(batches(spots, [0] * 20, 6, seed=0, steps=range(4, 6)))
    assert again == steps[4:]


def test_a_damaged_image_is_replaced_with_a_warning(places, tmp_path, caplog):
    images = factories.write_folder(tmp_path / "images", classed(40))
    (images / "a" / "000.png").write_bytes(b"no picture")
    summary = finetune.run(
        tiny(run={"epochs": 2}, data={"batch_size": 4}), places[1], images, tmp_path / "run"
    )
    assert summary.finished
    assert "a/000: not an image" in caplog.text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.layer_deca=0.5", "did you mean 'layer_decay'"),
        ("data.batch_size=15", "15 is odd"),
        ("optim.min_lr=2", "min_lr 2.0 is above lr"),
        ("run.epochs=1", "leaves nothing of run.epochs 1"),
        ("model.weights=none_such", "Wrong value 'none_such' for 'model.weights'"),
    ],
)
def test_a_wrong_setting_is_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        load_finetune_config("small", [override])


def test_a_policy_that_timm_does_not_know_is_refused(places, tmp_path):
    config = tiny(data={"auto_augment": "rnad-m9"})
    with pytest.raises(ConfigError, match="auto_augment 'rnad-m9'"):
        finetune.run(config, places[1], places[0], tmp_path)


def test_the_strongest_augmentation_of_a_policy_is_no_error(places):
    images = open_labelled(places[0])
    config = tiny(data={"auto_augment": "rand-m10-n9-inc1"}).data
    data = AugmentedImages(images, load_backbone(places[1]), config, seed=0)
    spots, labels = images.places(), images.labels()
    for samples in batches(spots, labels, 50, seed=0, steps=range(2)):
        assert torch.isfinite(data.read(samples).images).all()


def test_every_recipe_of_fine_tuning_loads():
    names = [path.stem for path in FINETUNE_RECIPES.glob("*.toml")]
    assert {"vit_base", "small"} <= set(names)
    for name in names:
        assert load_finetune_config(name).run.epochs > 0


def test_images_without_labels_and_too_few_are_refused(places, tmp_path):
    flat = factories.write_folder(
        tmp_path / "flat", {f"{i}.png": data for i, data in enumerate(classed(9).values())}
    )
    with pytest.raises(ConfigError, match=r"0 labelled images of 0 classes.*subfolder per class"):
        finetune.run(tiny(), places[1], flat, tmp_path / "run")
    few = factories.write_folder(tmp_path / "few", classed(12))
    with pytest.raises(ConfigError, match="fewer than one batch of 16"):
        finetune.run(tiny(), places[1], few, tmp_path / "run")
