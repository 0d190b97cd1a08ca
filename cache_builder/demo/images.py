"""Real images that installed libraries bundle, laid out as a user's folders would be."""

import random
import shutil
from pathlib import Path
from statistics import median

from PIL import Image

from cache_builder.errors import SourceError
from cache_builder.sources import IMAGE_EXTENSIONS

_SKIMAGE_PHOTOS = (
    "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "clock_motion.png",
    "coffee.png", "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png",
    "logo.png", "moon.png", "motorcycle_left.png", "motorcycle_right.png", "page.png",
    "retina.jpg", "rocket.jpg", "text.png",
)  # fmt: skip
_SKLEARN_PHOTOS = ("china.jpg", "flower.jpg")
_SMALL_SIDE = 96  # pixels; pictures below are cut into small patches


def collect_photos(folder: Path) -> int:
    """Copy the photographs of scikit-image and scikit-learn; returns how many."""
    import skimage
    import sklearn

    folder.mkdir(parents=True)
    skimage_data = Path(skimage.__file__).parent / "data"
    sklearn_data = Path(sklearn.__file__).parent / "datasets" / "images"
    places = [skimage_data / name for name in _SKIMAGE_PHOTOS]
    places += [sklearn_data / name for name in _SKLEARN_PHOTOS]
    # Other versions of the two libraries bundle a few more or less.
    present = [place for place in places if place.is_file()]
    for place in present:
        shutil.copyfile(place, folder / place.name)
    return len(present)


def collect_digits(folder: Path) -> int:
    """Write scikit-learn's labelled handwritten digits as PNG files by class; returns how many."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for index, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        place = folder / str(label) / f"{index:04d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels / 16 * 255).round().astype("uint8")).save(place)
    return len(digits.images)


def link_sample(data: Path, folder: Path, limit: int) -> int:
    """Link at most `limit` images of a user's folder below `folder`; returns how many.

    Raises:
        SourceError: The folder is not there or holds no images.
    """
    if not data.is_dir():
        raise SourceError(f"{data} is not a folder. Pass DATA=/path/to/a/folder/of/images.")
    found = sorted(
        path
        for path in data.rglob("*")
        if path.suffix[1:].lower() in IMAGE_EXTENSIONS and not path.name.startswith(".")
    )
    if not found:
        raise SourceError(f"{data} holds no images ({', '.join(sorted(IMAGE_EXTENSIONS))}).")
    chosen = random.Random(0).sample(found, min(limit, len(found)))
    for path in chosen:
        link = folder / path.relative_to(data)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.resolve())
    return len(chosen)


def are_small(folder: Path) -> bool:
    """Whether the typical picture of a folder is an icon, a digit or a CIFAR-like thumbnail."""
    sides = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file())[:200]:
        try:
            with Image.open(path) as image:
                sides.append(min(image.size))
        except OSError:
            continue  # the build records it
    return bool(sides) and median(sides) < _SMALL_SIDE
