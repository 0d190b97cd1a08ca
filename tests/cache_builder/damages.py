"""A cache with a layer, what can happen to its files, and a file of every kind."""

from cache_builder.formats.manifest import CacheManifest
from tests import factories


def build(root, out, layout="webdataset", **settings):
    """Build a cache of five photographs and one bad image, in three units, with a layer."""
    if not (root / "images").exists():
        content = factories.photo_images(5) | {"b/bad.jpg": b"text"}
        factories.write_folder(root / "images", content)
        factories.write_codebook(root / "one.safetensors")
        factories.write_codebook(root / "two.safetensors", colours=factories.COLOURS[:5])
    given = {
        "images": str(root / "images"), "codebook": root / "one.safetensors", "layout": layout,
        "further_codebooks": (root / "two.safetensors",), "num_views": 2,
    }  # fmt: skip
    if "codebook" in settings:
        given.pop("further_codebooks")
    if not str(settings.get("images", "")).endswith(".tar"):
        given["unit_size"] = 2
    factories.build_cache(out=out, **(given | settings))
    return out


def flip(path):
    factories.flip_byte(path)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def remove(path):
    path.unlink()


def kinds_of_files(cache):
    """Return one file of each kind, by what it is."""
    layer = CacheManifest.load(cache).layers[0].name
    files = {"plan unit": "plan/000001.json"}
    for what, folder in (("", ""), ("layer's ", f"{layer}/")):
        manifest = CacheManifest.load(cache / folder)
        files |= {
            f"{what}shard": folder + manifest.shards[1].files[0].path,
            f"{what}record": f"{folder}units/000001.json",
            f"{what}codebook": f"{folder}codebook.safetensors",
            f"{what}skipped list": f"{folder}skipped.jsonl",
            f"{what}plan": f"{folder}plan.json",
            f"{what}manifest": f"{folder}manifest.json",
        }
        if manifest.store_files:
            files[f"{what}metadata"] = folder + manifest.store_files[0].path
    return files
