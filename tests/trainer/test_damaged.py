"""Damaged and forged files of the trainer: an error that says what to do, and nothing is run."""

import errno
import io
import json
import resource
import zipfile

import pytest
import safetensors.torch
import torch

from cache_builder.errors import ArtifactError
from tests.trainer.caches import make_cache, tiny_config
from trainer import checkpoint, run_log, train
from trainer.backbones import load_backbone
from trainer.export import export


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("damaged")
    config = tiny_config(run={"steps": 2}, optim={"warmup_steps": 1})
    train.run(config, make_cache(root, num_images=12), root / "run")
    return root / "run"


@pytest.fixture
def small_files():
    """No file of this process may have more than 50,000 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_checkpoint_that_the_disk_has_no_room_for_is_named_and_leaves_nothing(
    trained, tmp_path, small_files
):
    loaded = checkpoint.load(trained)
    with pytest.raises(OSError, match="File too large") as caught:
        checkpoint.save(tmp_path, loaded, keep=2)
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename.endswith("step_00000002.pt")
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.fixture
def exported(trained, tmp_path):
    export(trained, tmp_path / "vit.safetensors")
    return tmp_path / "vit.safetensors"


def rewrite(source, target, change):
    """Write a checkpoint again with a changed pickle, and checksums that are right."""
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(target, "w") as out:
        for info in archive.infolist():
            data = archive.read(info)
            out.writestr(info, change(data) if info.filename.endswith("data.pkl") else data)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"",
        lambda data: data[:50],
        lambda data: b"\x80\x02.",
        lambda data: b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00lsR.",
        lambda data: data.replace(b"header", b"handle"),
        lambda data: data.replace(b"optimizer", b"optimised"),
    ],
)
def test_a_forged_checkpoint_is_refused_with_what_to_do(trained, tmp_path, change):
    path = tmp_path / "step_00000002.pt"
    rewrite(checkpoint.latest(trained), path, change)
    expected = r"step_00000002.pt is damaged.*Delete it to go on"
    with pytest.raises(ArtifactError, match=expected) as caught:
        checkpoint.load(path)
    assert "torch.load" not in str(caught.value)  # what torch advises is not for users of ours


def test_a_member_that_inflates_is_refused_unread(trained, tmp_path):
    path = tmp_path / "step_00000002.pt"
    rewrite(checkpoint.latest(trained), path, lambda data: data)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("bomb", bytes(1 << 20), zipfile.ZIP_DEFLATED)
    with pytest.raises(ArtifactError, match="member bomb is damaged"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"arguments": {"img_size": 1 << 40}}, "img_size is 1099511627776"),
        ({"arguments": []}, "arguments: "),
        ({"mean": [0]}, "mean"),
        ({"model": None}, "model: "),
        ({"model": "nonsense", "arguments": {}}, "img_size is None"),
        ({"model": "test_vit.of_nobody", "arguments": {}}, "img_size is None"),
    ],
)
def test_an_exported_file_says_what_is_wrong_with_what_it_says(exported, changes, problem):
    with safetensors.safe_open(exported, "pt") as file:
        told = json.loads(file.metadata()["patchcache"])
    state = safetensors.torch.load_file(exported)
    metadata = {"patchcache": json.dumps(told | changes)}
    exported.write_bytes(safetensors.torch.save(state, metadata=metadata))
    with pytest.raises(ArtifactError, match=rf"{problem}.*Write it again with `patchcache export`"):
        load_backbone(exported)


@pytest.mark.parametrize("changes", [{"depth": 0.5}, {"num_heads": 0}])
def test_weights_of_another_model_than_a_file_says_are_refused_by_its_name(exported, changes):
    backbone = load_backbone(exported)
    wrong = backbone._replace(arguments={**backbone.arguments, **changes})
    with pytest.raises(ArtifactError, match=r"vit.safetensors does not hold the weights of"):
        wrong.build()


@pytest.mark.parametrize("line", [b'{"step": "x"}\n', b"[" * 5000 + b"\n", b"[]\n", b"\xff\n"])
def test_a_log_goes_on_behind_its_last_whole_row(tmp_path, line):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line)
    assert run_log._rows_up_to(path, 5) == b'{"step": 1}\n'


def test_a_checkpoint_of_another_host_is_checked_as_one_of_this(trained):
    path = checkpoint.latest(trained)
    content = io.BytesIO(path.read_bytes()).getvalue()
    same = checkpoint.load(path, content)
    assert torch.equal(same.model["vit.cls_token"], checkpoint.load(path).model["vit.cls_token"])
    with pytest.raises(ArtifactError, match="Delete it to go on"):
        checkpoint.load(path, content[:-100])
