"""The settings of a small build."""


def settings(tmp_path, **changes):
    defaults = {
        "images": str(tmp_path / "images"),
        "codebook": tmp_path / "codebook.safetensors",
        "out": tmp_path / "cache",
        "num_views": 3,
        "unit_size": 2,
    }
    return defaults | changes
