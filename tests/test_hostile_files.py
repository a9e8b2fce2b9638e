"""Files that ask for gigabytes, for hours, or to be printed: refused in one line before anything in them is made."""

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, Callable, Dict

import numpy as np
import pytest
import safetensors.torch
import torch
from detectron2.data import DatasetMapper
from detectron2.modeling import build_model
from PIL import Image
from small import small_config
from torch import nn

from d2kd.checkpoint import SafeCheckpointer, bounds, convert_mmdet, files, load_strict
from d2kd.config import load_config
from d2kd.data.bad_images import EvaluationMapper
from d2kd.data.images import missing_files
from d2kd.data.loader import SeededDataset
from d2kd.errors import MESSAGE_LENGTH, D2kdError


def message(action: Callable[[], Any]) -> str:
    """What a mistake tells the user: one line that a terminal shows as it is."""
    with pytest.raises(D2kdError) as caught:
        action()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < MESSAGE_LENGTH + 100
    return str(caught.value)


# ---- weights that ask for too much


def nested_keys(depth: int) -> bytes:
    """A dict with a key that is a tuple of twice the same tuple, and so on: hashing takes 2 to the depth steps."""
    pairs = b"".join(b"q%ch%c\x86" % (i, i) for i in range(depth))
    return b"\x80\x02}K\x01" + pairs + b"K\x01s."


def unknown_classes(count: int) -> bytes:
    """A dict with objects of different classes of mmengine."""
    return (
        b"\x80\x02}(" + b"".join(b"M%scmmengine.x\nC%d\n)R" % (struct.pack("<H", i), i) for i in range(count)) + b"u."
    )


def zipped(path: Path, compression: int = zipfile.ZIP_STORED, **replaced: bytes) -> None:
    """A file of torch in which some entries, named by what they end with, are replaced."""
    whole = path.with_suffix(".whole")
    torch.save({"w": torch.zeros(3)}, whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, replaced.get(name.rpartition("/")[2].replace(".", "_"), old.read(name)))


def legacy(content: bytes) -> bytes:
    """A file of torch's old format."""
    before = [0x1950A86A20F9469CFC6C, 1001, {}]
    return b"".join(pickle.dumps(x, protocol=2) for x in before) + content + pickle.dumps([], protocol=2)


def test_an_index_into_the_memo_reserves_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x02}r" + struct.pack("<I", 2**28) + b".")
    assert f"has an index of {2**28} in its pickle" in message(lambda: files.read(str(path)))


@pytest.mark.parametrize("form", ["pkl", "zip.pth", "legacy.pth"])
def test_nested_keys_are_not_hashed(form: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{form}"
    if form == "zip.pth":
        zipped(path, data_pkl=nested_keys(60))
    else:
        path.write_bytes(nested_keys(60) if form == "pkl" else legacy(nested_keys(60)))
    assert "has nested keys that would take hours" in message(lambda: files.read(str(path)))


def test_zeros_are_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    zipped(path, zipfile.ZIP_DEFLATED, **{"0": bytes(64 << 20)})
    assert "unpacks to 67 MB, more than 10 times its own size" in message(lambda: files.read(str(path)))


def test_a_long_header_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    monkeypatch.setattr(bounds, "MAX_HEADER", 1 << 20)
    tensors = {f"w{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)}
    header = json.dumps(tensors).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b" ")
    assert "has a header of 1 MB" in message(lambda: files.read(str(path)))
    safetensors.torch.save_file({"w": torch.zeros(3)}, path)
    assert files.read(str(path)).keys() == {"w"}


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_a_file_with_many_unknown_classes_is_read_once(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.pth"
    if form == "zip":
        zipped(path, data_pkl=unknown_classes(800))
    else:
        path.write_bytes(legacy(unknown_classes(800)))
    loaded, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: loaded.append(args) or load(*args, **kwargs))
    assert files.read(str(path)) == {i: {} for i in range(800)}
    assert len(loaded) == 1


def test_states_of_all_kinds_pass_the_bounds(tmp_path: Path) -> None:
    """Optimizers, schedules with counters, and generators."""
    import random

    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones(3)
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5])
    content = {"optimizer": optimizer.state_dict(), "python": random.getstate(), "numpy": np.random.get_state()}
    content["schedule"] = schedule.state_dict()
    for zip_format in (True, False):
        path = tmp_path / f"{zip_format}.pth"
        torch.save(content, path, _use_new_zipfile_serialization=zip_format)
        assert files.read(str(path))["python"] == content["python"]


# ---- weights of other kinds, names that terminals obey


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build_model(small_config())


LOADERS: Dict[str, Callable[[nn.Module, str], Any]] = {
    "teacher": load_strict,
    "student": lambda model, path: SafeCheckpointer(model, save_to_disk=False).resume_or_load(path, resume=False),
}
NAME = "head.cls_score.bias"


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_weights_that_are_no_real_numbers_are_refused(
    load: Callable, dtype: torch.dtype, model: nn.Module, tmp_path: Path
) -> None:
    path = str(tmp_path / "x.pth")
    state = model.state_dict()
    torch.save({"model": {**state, NAME: state[NAME].to(dtype)}}, path)
    assert f"x.pth: {NAME} holds {dtype}, the model torch.float32" in message(lambda: load(model, path))
    torch.save({"model": {**state, NAME: state[NAME].half()}}, path)
    load(model, path)


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_zoo_files_of_integers_are_refused(load: Callable, model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    path.write_bytes(pickle.dumps({"model": {**state, NAME: state[NAME].astype("i4")}, "__author__": "zoo"}))
    assert f"{NAME} holds int32" in message(lambda: load(model, str(path)))


FAKE = "\x1b[2J\nerror: all is well\u202e"


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_names_do_not_reach_the_terminal_raw(load: Callable, model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"model": {**model.state_dict(), FAKE: torch.zeros(1)}}, path)
    assert r"holds the name \x1b[2J\nerror: all is well\u202e" in message(lambda: load(model, str(path)))
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x02}U\x01wccollections\nx\x1b[2J\n)Rs.")
    assert r"(collections.x\x1b[2J)" in message(lambda: load(model, str(path)))


def test_names_are_escaped_by_the_converter() -> None:
    state = {"bbox_head.retina_cls.weight": torch.zeros(9, 1, 3, 3), f"bbox_head.{FAKE}": torch.zeros(1)}
    assert r"bbox_head.\x1b[2J\nerror" in message(lambda: convert_mmdet(state))


def test_messages_are_sentences(model: nn.Module, tmp_path: Path) -> None:
    path = str(tmp_path / "x.pth")
    torch.save({"model": {f"{i}{'x' * 10_000}": torch.zeros(1) for i in range(9)}}, path)
    text = message(lambda: load_strict(model, path))
    assert len(text) < 2500
    assert text.endswith("trained with")
    assert str(D2kdError("x" * 38_000 + "; fix it")).endswith("xx; fix it")


# ---- configs


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)
YAMLS = {
    "bomb": (BOMB, "has more than 100000 values when its aliases (*name) are written out"),
    "recursive": ("MODEL: &a [*a]\n", "has more than 100000 values"),
    "large": ("VERSION: 2\n" + "#" * (1 << 20), "has more than 1048576 bytes"),
    "loop": ("_BASE_: x.yaml\n", "builds on itself: its _BASE_ leads back to it"),
    "URL": ("_BASE_: https://example.com/x.yaml\n", "builds on https://example.com/x.yaml; download that config"),
    "pipe": ("_BASE_: pipe\n", "builds on pipe, which is no file"),
    "merge keys": ("a: &a {x: 1}\n" + BOMB.replace("a0: &a0 [x", "a0: &a0 [*a"), "values when its aliases"),
}


@pytest.mark.parametrize(("text", "expected"), YAMLS.values(), ids=YAMLS)
@pytest.mark.parametrize("as_base", [False, True])
def test_configs_that_ask_for_too_much(text: str, expected: str, as_base: bool, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    path = tmp_path / "x.yaml"
    path.write_text(text)
    if as_base:
        (tmp_path / "y.yaml").write_text("_BASE_: [x.yaml]\n")
    assert expected in message(lambda: load_config(str(tmp_path / ("y.yaml" if as_base else "x.yaml"))))


def test_a_base_may_be_shared(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("VERSION: 2\nSEED: 3\n")
    for name in "ab":
        (tmp_path / f"{name}.yaml").write_text("_BASE_: x.yaml\n")
    (tmp_path / "y.yaml").write_text("_BASE_: [a.yaml, b.yaml]\n")
    assert load_config(str(tmp_path / "y.yaml")).SEED == 3


# ---- images


DEEP = {
    "12 bits.png": np.full((8, 8), 4000, np.uint16),
    "32 bits.tif": np.full((8, 8), 70_000, np.int32),
    "float.tif": np.full((8, 8), 0.5, np.float32),
}


def readers(path: Path) -> Dict[str, Callable[[], Any]]:
    """How training, with and without replacing bad images, and evaluation read an image."""
    cfg = small_config("INPUT.CROP.ENABLED", False)
    entry = {"file_name": str(path), "image_id": 3, "annotations": []}
    train, test = DatasetMapper(cfg, is_train=True), DatasetMapper(cfg, is_train=False)
    return {
        "train": lambda: SeededDataset([entry], train, 0)[0, 0],
        "skip": lambda: SeededDataset([entry], train, 0, skip_bad_images=True)[0, 0],
        "evaluate": lambda: EvaluationMapper(test)(entry),
    }


@pytest.mark.parametrize("reader", ["train", "skip", "evaluate"])
@pytest.mark.parametrize("name", DEEP)
def test_images_that_would_be_clipped_are_refused(name: str, reader: str, tmp_path: Path) -> None:
    Image.fromarray(DEEP[name]).save(tmp_path / name)
    text = message(readers(tmp_path / name)[reader])
    assert f"the image {tmp_path / name} (id 3) cannot be used: its pixels are" in text
    assert "would be clipped to 0...255" in text


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK"])
def test_images_of_8_bits_are_read(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    Image.new(mode, (8, 8)).save(path)
    assert readers(path)["train"]()["image"].shape[0] == 3


@pytest.mark.parametrize("reader", ["train", "evaluate"])
def test_a_pipe_is_no_image(reader: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.png")
    assert "cannot be used: it is no regular file" in message(readers(tmp_path / "x.png")[reader])
    assert missing_files(tmp_path, ["x.png"]) == ["x.png"]


@pytest.mark.parametrize("reader", ["train", "evaluate"])
@pytest.mark.parametrize("size", [(5000, 1), (1, 5000)])
def test_an_image_without_pixels_after_resizing_is_named(reader: str, size: Any, tmp_path: Path) -> None:
    Image.new("RGB", size).save(tmp_path / "thin.png")
    assert f"{tmp_path / 'thin.png'} (id 3) cannot be used: a side of it" in message(
        readers(tmp_path / "thin.png")[reader]
    )


def test_mappers_of_ones_own_read_what_they_like(tmp_path: Path) -> None:
    Image.fromarray(DEEP["12 bits.png"]).save(tmp_path / "x.png")

    class Scaled(DatasetMapper):
        def __call__(self, entry: Any) -> Any:
            return {"image": np.asarray(Image.open(entry["file_name"])) / 16}

    mapper = Scaled(small_config(), is_train=True)
    assert SeededDataset([{"file_name": str(tmp_path / "x.png")}], mapper, 0)[0, 0]["image"].max() == 250
