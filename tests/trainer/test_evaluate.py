import numpy as np
import pytest
import safetensors
import timm
import torch
from safetensors.torch import load_file

from cache_builder.errors import ConfigError
from tests import factories
from tests.trainer.caches import make_cache, tiny_config
from trainer import checkpoint as checkpoints
from trainer import evaluate, train
from trainer.evaluate import Part


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


def test_a_probe_takes_a_run_and_another_test_cache(trained, tmp_path):
    root, _ = trained
    other = make_cache(tmp_path, num_images=10)
    result = evaluate.probe(root / "run", test_cache=other, k=5)
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
    accuracy = evaluate.knn_accuracy(train_part, test_part, 3, k=7, temperature=0.07)
    assert accuracy == pytest.approx(right / 30)


def test_an_export_loads_strictly_into_timm_and_computes_the_same(trained, tmp_path):
    path = tmp_path / "vit.safetensors"
    call = checkpoints.export(trained[1], path)
    vit = eval(call, {"timm": timm}).eval()
    ours = checkpoints.load(trained[1]).build_vit().eval()
    vit.load_state_dict(load_file(path), strict=True)
    images = torch.randn(2, 3, factories.SIZE, factories.SIZE)
    assert torch.equal(vit(images), ours(images))


def test_an_export_says_what_it_is_and_has_the_same_bytes_twice(trained, tmp_path):
    for name in ("a", "b"):
        checkpoints.export(trained[1], tmp_path / f"{name}.safetensors")
    first, second = (tmp_path / f"{name}.safetensors" for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    with safetensors.safe_open(first, "numpy") as file:
        assert (
            checkpoints.load(trained[1]).header.cache.fingerprint in file.metadata()["patchcache"]
        )


def test_a_description_names_model_cache_and_loss(trained):
    description = checkpoints.describe(trained[1])
    assert description["step"] == 20
    assert description["model_arguments"]["embed_dim"] == 32
    assert description["cache"]["num_samples"] == 120
