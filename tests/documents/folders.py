"""What the commands of a page find in the folder where they run."""

import shutil

import numpy as np
import torch

from tests import factories

NUM_IMAGES = 60  # a probe wants 20 neighbours of each


def write_common(root):
    """Write what many pages name: photographs in two classes, a codebook and a cache."""
    images = factories.photo_images(NUM_IMAGES)
    images = {("bird/" if "a/" in name else "mammal/") + name[2:]: images[name] for name in images}
    images["bird/jay.jpg"] = images.pop("bird/000.jpg")
    factories.write_folder(root / "photos", images)
    demo = factories.photo_images(8)
    demo["astronaut.png"] = factories.encode(factories.draw_photo(99))
    factories.write_folder(root / "demo/photos", demo)
    factories.write_codebook(root / "codebook.safetensors")
    build(root, "photos", "cache")
    shutil.copy(root / "photos/bird/jay.jpg", root / "photo.jpg")


def build(root, images, out):
    factories.build_cache(
        images=str(root / images), codebook=root / "codebook.safetensors", out=root / out,
        num_views=2, unit_size=10,
    )  # fmt: skip


def _imagenet(root):
    for part in ("train", "val"):
        shutil.copytree(root / "photos", root / "imagenet" / part)


def _readme(root):
    shutil.copytree(root / "cache", root / "demo/digits.cache")


def _caches(root):
    shutil.copy(root / "codebook.safetensors", root / "pixels.safetensors")
    factories.feature_codebook().save(root / "clip.safetensors")
    shutil.copytree(root / "cache", root / "train")
    shutil.copytree(root / "photos/bird", root / "others/cat")
    build(root, "others", "more")


def _evaluation(root):
    _imagenet(root)
    members = []
    for path in sorted((root / "photos").rglob("*.jpg")):
        label = ["bird", "mammal"].index(path.parent.name)
        members += [(f"{path.stem}.jpg", path.read_bytes()), (f"{path.stem}.cls", b"%d" % label)]
    (root / "train").mkdir()
    for name in ("train/0.tar", "test.tar"):
        factories.write_tar(root / name, members)


def _interoperation(root):
    """Ids as 4M and MaPeT leave them, of ten views and of one."""
    _imagenet(root)
    names = sorted(
        path.relative_to(root / "imagenet/train").with_suffix("").as_posix()
        for path in (root / "imagenet/train").rglob("*.jpg")
    )
    rng = np.random.default_rng(0)
    for name in names:
        boxes = np.tile([0, 8, 48, 48, 0], (10, 1))
        for folder, array in (
            ("tok_rgb", rng.integers(0, 16384, (10, 196))),
            ("crop_settings", boxes),
        ):
            path = root / folder / f"{name}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, array)
    torch.save(torch.from_numpy(rng.integers(0, 8192, (len(names), 196))), root / "kclip.pth")
    (root / "keys.txt").write_text("".join(f"{name}.jpg\n" for name in names))


def _service(root):
    shutil.copy(root / "codebook.safetensors", root / "photos.safetensors")
    (root / "more").mkdir()
    shutil.copy(root / "photo.jpg", root / "more/a.jpg")


FURTHER = {
    "README.md": _readme,
    "caches.md": _caches,
    "codebooks.md": _imagenet,
    "evaluation.md": _evaluation,
    "interoperation.md": _interoperation,
    "service-client.md": _service,
    "service-operations.md": _service,
}
"""By page: what it names beyond that."""
