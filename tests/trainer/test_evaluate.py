"""A probe tells what frozen features know of classes."""

import shutil
import zipfile

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from cache_builder.errors import ArtifactError, ConfigError
from cache_builder.formats import Codebook
from tests import factories
from tests.trainer.caches import make_cache, tiny_config
from trainer import checkpoint as checkpoints
from trainer import evaluate, train
from trainer.evaluate import Part
from trainer.export import export


def classed_images(num_images):
    """Two classes that a ViT tells apart: one in warm colours, one in cold ones."""
    images = {}
    for i in range(num_images):
        ids = np.random.default_rng(i).choice([0, 3] if i % 2 else [1, 2], (4, 4))
        images[f"{'ab'[i % 2]}/{i:03d}.png"] = factories.encode(factories.draw_patches(ids))
    return images


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on 120 labelled pictures, and its cache."""
    root = tmp_path_factory.mktemp("probed")
    images = factories.write_folder(root / "images", classed_images(120))
    codebook = factories.write_codebook(root / "codebook.safetensors")
    factories.build_cache(images=str(images), codebook=codebook, out=root / "cache", unit_size=40)
    summary = train.run(tiny_config(run={"steps": 20}), root / "cache", root / "run")
    return root, summary.checkpoint


def test_a_probe_tells_classes_apart_and_names_the_sizes(trained):
    result = evaluate.probe(trained[1], k=5)
    assert result.num_train + result.num_test == 120
    assert result.num_test > 5
    assert result.num_classes == 2
    assert result.linear > 0.9
    assert result.knn > 0.9
    assert 0.3 < result.chance < 0.7


def test_a_probe_gives_the_same_numbers_twice(trained):
    assert evaluate.probe(trained[1], k=5) == evaluate.probe(trained[1], k=5)


def test_a_probe_takes_a_run_and_another_cache_to_test_on(trained, tmp_path):
    root, _ = trained
    other = make_cache(tmp_path, num_images=10)
    result = evaluate.probe(root / "run", test_data=other, k=5)
    assert (result.num_train, result.num_test) == (120, 10)


def test_an_untrained_probe_is_no_better_than_the_random_one(trained, tmp_path):
    root, _ = trained
    untrained = train.run(
        tiny_config(optim={"lr": 1e-9, "min_lr": 0.0}), root / "cache", tmp_path, stop_after=1
    )
    result = evaluate.probe(untrained.checkpoint, k=5)
    assert abs(result.knn - result.knn_random) < 0.35


def test_without_labels_a_probe_says_so(tmp_path):
    images = factories.write_folder(
        tmp_path / "images",
        {f"{i}.png": factories.encode(factories.draw_photo(i)) for i in range(9)},
    )
    codebook = factories.write_codebook(tmp_path / "codebook.safetensors")
    factories.build_cache(images=str(images), codebook=codebook, out=tmp_path / "cache")
    path = train.run(tiny_config(), tmp_path / "cache", tmp_path / "run", stop_after=1).checkpoint
    with pytest.raises(ConfigError, match="label"):
        evaluate.probe(path)


def test_knn_votes_like_the_definition():
    rng = np.random.default_rng(0)
    train_part = Part(
        torch.tensor(rng.normal(size=(40, 6))).float(), torch.tensor(rng.integers(0, 3, 40))
    )
    test_part = Part(
        torch.tensor(rng.normal(size=(30, 6))).float(), torch.tensor(rng.integers(0, 3, 30))
    )
    right = 0
    for feature, label in zip(test_part.features.numpy(), test_part.labels.tolist(), strict=True):
        others = train_part.features.numpy()
        cosine = others @ feature / np.linalg.norm(others, axis=1) / np.linalg.norm(feature)
        votes = np.zeros(3)
        for neighbour in np.argsort(-cosine)[:7]:
            votes[train_part.labels[neighbour]] += np.exp(cosine[neighbour] / 0.07)
        right += int(votes.argmax() == label)
    accuracy = evaluate.knn_accuracy(train_part, test_part, 3, k=7)
    assert accuracy.top1 == pytest.approx(right / 30)
    assert accuracy.top5 == 1


def test_a_description_names_model_cache_and_loss(trained):
    description = checkpoints.describe(trained[1])
    assert description["step"] == 20
    assert description["model_arguments"]["embed_dim"] == 32
    assert description["cache"]["num_samples"] == 120


def test_five_guesses_are_the_five_highest_scores():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.2, 0.3, 0.4, 0.0]] * 3)
    named = evaluate.five_best(scores)
    assert named.tolist() == [[1, 2, 5, 4, 3]] * 3
    assert evaluate.accuracy_of(named, torch.tensor([1, 3, 0])) == pytest.approx((1 / 3, 2 / 3))


def folder_of(root, num_images):
    return factories.write_folder(root / "labelled", classed_images(num_images))


def zip_of(root, num_images):
    path = root / "labelled.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in classed_images(num_images).items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("make", [folder_of, zip_of])
def test_a_probe_reads_a_folder_or_an_archive_as_it_reads_a_cache_of_it(trained, tmp_path, make):
    _, checkpoint = trained
    assert evaluate.probe(checkpoint, data=make(tmp_path, 120), k=5) == evaluate.probe(
        checkpoint, k=5
    )


def test_workers_read_the_same_as_the_process_itself(trained, tmp_path):
    place = folder_of(tmp_path, 120)
    alone, helped = (evaluate.probe(trained[1], data=place, k=5, num_workers=n) for n in (0, 1))
    assert alone == helped


def test_classes_of_two_places_are_matched_by_name(trained, tmp_path):
    # Class b alone is label 0 of its folder, and 1 of the other.
    only_b = {name: data for name, data in classed_images(60).items() if name.startswith("b/")}
    place = factories.write_folder(tmp_path / "b", only_b)
    assert evaluate.probe(trained[1], test_data=place, k=5).linear > 0.9


def test_a_class_that_was_not_trained_on_is_refused_by_name(trained, tmp_path):
    place = factories.write_folder(
        tmp_path / "c",
        {f"{name}/0.png": factories.encode(factories.draw_patches(np.eye(4, dtype=int)))
         for name in "abc"},
    )  # fmt: skip
    with pytest.raises(ConfigError, match="class 'c'"):
        evaluate.probe(trained[1], test_data=place, k=5)


def test_an_image_that_cannot_be_decoded_is_left_out_with_a_warning(trained, tmp_path, caplog):
    place = folder_of(tmp_path, 120)
    (place / "a" / "000.png").write_bytes(b"no picture")
    result = evaluate.probe(trained[1], data=place, k=5)
    assert result.num_train + result.num_test == 119
    assert "1 images are left out, as a/000" in caplog.text


def test_an_unfinished_cache_is_refused_as_one(trained, tmp_path):
    root, checkpoint = trained
    copy = shutil.copytree(root / "cache", tmp_path / "cache")
    (copy / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="build has not finished"):
        evaluate.probe(checkpoint, data=copy)


def test_a_cache_without_images_is_probed_with_those_it_was_built_from(trained, tmp_path):
    root, checkpoint = trained
    factories.build_cache(
        images=str(root / "images"), codebook=root / "codebook.safetensors",
        out=tmp_path / "bare", images_in_cache="none",
    )  # fmt: skip
    assert evaluate.probe(checkpoint, data=tmp_path / "bare", k=5) == evaluate.probe(
        checkpoint, k=5
    )


def test_a_run_on_a_further_tokenizer_of_a_cache_is_probed_on_that_cache(tmp_path):
    images = factories.write_folder(tmp_path / "images", classed_images(60))
    first = factories.write_codebook(tmp_path / "first.safetensors")
    size = 2 * factories.SIZE
    second = factories.write_codebook(tmp_path / "second.safetensors", size=size, patch_size=8)
    factories.build_cache(
        images=str(images), codebook=first, further_codebooks=(second,), out=tmp_path / "cache"
    )
    fingerprint = Codebook.load(second).fingerprint
    config = tiny_config(data={"tokenizer": fingerprint})
    checkpoint = train.run(config, tmp_path / "cache", tmp_path / "run", stop_after=1).checkpoint
    assert checkpoints.load(checkpoint).header.vit_spec.image_size == size
    assert evaluate.probe(checkpoint, k=5).num_train > 20


def test_an_export_is_probed_like_its_checkpoint(trained, tmp_path):
    root, checkpoint = trained
    export(checkpoint, tmp_path / "vit.safetensors")
    assert evaluate.probe(tmp_path / "vit.safetensors", data=root / "cache", k=5) == evaluate.probe(
        checkpoint, k=5
    )
    with pytest.raises(ConfigError, match=r"--data"):
        evaluate.probe(tmp_path / "vit.safetensors")


def test_a_model_of_timm_is_probed_with_the_weights_of_a_file(trained, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=7)
    path = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), path)
    result = evaluate.probe(f"timm:test_vit@{path}", data=trained[0] / "cache", k=5)
    assert result.linear > 0.9
    with pytest.raises(ArtifactError, match=f"timm:NAME@{path}"):
        evaluate.probe(path, data=trained[0] / "cache")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:vit_huge_nonsense", "timm knows no model 'vit_huge_nonsense'"),
        ("timm:test_vit@nowhere.safetensors", "There is no file nowhere.safetensors"),
        ("nowhere.safetensors", "There is no file nowhere.safetensors"),
        ("nowhere/", "There is no checkpoint at nowhere"),
    ],
)
def test_a_model_that_is_not_there_is_refused_by_name(trained, name, message):
    with pytest.raises((ConfigError, ArtifactError), match=message):
        evaluate.probe(name, data=trained[0] / "cache")


@pytest.mark.parametrize("content", [b"", b"no weights at all"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_damaged_file_of_weights_is_named_with_what_to_do(tmp_path, suffix, content):
    path = tmp_path / f"weights.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{path}: \w.*\. Copy the file again"):
        evaluate.probe(f"timm:test_vit@{path}", data=tmp_path)


def test_weights_of_another_model_are_refused(trained, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"layer": torch.zeros(3)}, path)
    with pytest.raises(ArtifactError, match=r"does not hold the weights of test_vit"):
        evaluate.probe(f"timm:test_vit@{path}", data=trained[0] / "cache")
