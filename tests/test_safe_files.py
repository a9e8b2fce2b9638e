"""Files from anywhere: checkpoints of every kind and configs load without running code, or are refused in a word."""

import contextlib
import datetime
import json
import logging
import os
import pickle
import resource
import struct
import sys
import types
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone, build_model
from small import CONFIGS, small_config
from torch import Tensor, nn

from d2kd.checkpoint import SafeCheckpointer, convert_mmdet, files, load_strict
from d2kd.checkpoint.convert import main
from d2kd.config import ALLOW_UNSAFE_YAML, load_config
from d2kd.errors import D2kdError

KEYS = json.loads((Path(__file__).parent / "goldens/crosskd/mmdet_state_dict_keys.json").read_text())


def load_student(model: nn.Module, path: str) -> None:
    """What a run does with MODEL.WEIGHTS."""
    SafeCheckpointer(model, save_to_disk=False).resume_or_load(path, resume=False)


LOADERS = pytest.mark.parametrize("load", [load_strict, load_student], ids=["teacher", "student"])


def message(action: Callable[[], Any]) -> str:
    """What a mistake tells the user: one line."""
    with pytest.raises(D2kdError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build_model(small_config())


def other_model() -> nn.Module:
    return build_model(small_config())


def equal(a: Dict[str, Tensor], b: Dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---- malicious files


class Payload:
    """Unpickles to the result of a call."""

    def __init__(self, function: Callable, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def payload(kind: str, target: Path) -> Payload:
    """Something that makes the file ``target`` when it is unpickled."""
    if kind == "os.system":
        return Payload(os.system, f"touch {target}")
    if kind == "builtins.eval":
        return Payload(eval, f"open({str(target)!r}, 'w').close()")
    inner = pickle.dumps(Payload(os.system, f"touch {target}"), protocol=2)  # torch's own: unpickles what is inside
    return Payload(torch.storage._load_from_bytes, legacy_prefix() + inner)


def legacy_prefix() -> bytes:
    """What a file of torch's old format begins with."""
    magic, protocol = 0x1950A86A20F9469CFC6C, 1001
    return pickle.dumps(magic, protocol=2) + pickle.dumps(protocol, protocol=2) + pickle.dumps({}, protocol=2)


PAYLOADS = ["os.system", "builtins.eval", "torch.storage._load_from_bytes"]


@LOADERS
@pytest.mark.parametrize("kind", PAYLOADS)
@pytest.mark.parametrize("form", ["zip.pth", "legacy.pth", "pickle0.pkl", "pickle2.pkl", "pickle4.pkl", "pycls.pyth"])
def test_malicious_files_run_nothing(load: Callable, kind: str, form: str, model: nn.Module, tmp_path: Path) -> None:
    target, path = tmp_path / "written", tmp_path / form
    content = {"model": {"head.cls_score.bias": payload(kind, target)}, "__author__": "zoo"}
    if form.endswith(".pkl"):
        path.write_bytes(pickle.dumps(content, protocol=int(form[6])))
        unpickle: Callable = partial(pickle.loads, path.read_bytes())
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy.pth")
        unpickle = partial(torch.load, path, weights_only=False)
    with contextlib.suppress(pickle.UnpicklingError, RuntimeError, EOFError):  # after it has done its work
        unpickle()
    assert target.exists()  # the file is dangerous
    target.unlink()
    text = message(lambda: load(model, str(path)))
    assert f"{path} holds Python objects other than weights (" in text
    assert kind.split(".")[-1] in text
    assert not target.exists()


class ObjectsOfBytes:
    """Unpickles to a numpy array of objects made of raw bytes: reading an element ends the process."""

    def __reduce__(self) -> Any:
        dtype = Described("O8", (3, "|", None, None, None, -1, -1, 0))  # the last 0: "has no objects in it"
        return np.core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), (1, (1,), dtype, False, b"\x01" * 8)


class Described:
    """Unpickles to a numpy dtype with a state of one's choice."""

    def __init__(self, code: str, state: Any) -> None:
        self.code, self.state = code, state

    def __reduce__(self) -> Any:
        return np.dtype, (self.code, False, True), self.state


@pytest.mark.parametrize("suffix", ["pth", "pkl"])
def test_raw_bytes_do_not_become_objects(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{suffix}"
    content = {"w": ObjectsOfBytes()}
    torch.save(content, path) if suffix == "pth" else path.write_bytes(pickle.dumps(content, protocol=2))
    assert "(numpy.dtype 'O8')" in message(lambda: files.read(str(path)))


@pytest.mark.parametrize("name", ["numpy.core.multiarray\n_reconstruct", "numpy\nndarray", "numpy\ndtype"])
def test_stand_ins_cannot_be_changed(name: str, tmp_path: Path) -> None:
    """Opcode BUILD sets attributes of anything, also of a class, where nothing stops it."""
    path = tmp_path / "x.pkl"
    state = pickle.dumps((None, {"__setstate__": 1, "__new__": 1}), protocol=2)[2:-1]
    path.write_bytes(b"\x80\x02c" + f"{name}\n".encode() + state + b"b.")
    assert "cannot be read as weights" in message(lambda: files.read(str(path)))
    path.write_bytes(pickle.dumps({"w": np.arange(3.0)}, protocol=2))
    assert np.array_equal(files.read(str(path))["w"], np.arange(3.0))


@pytest.mark.parametrize(
    ("shape", "raw"), [((3,), b"\0" * 8), ((-1, -2), b"\0" * 8), ((2.0,), b"\0" * 8), ((2**62, 4), b"")]
)
def test_arrays_are_exactly_their_bytes(shape: Any, raw: bytes, tmp_path: Path) -> None:
    class Array:
        def __reduce__(self) -> Any:
            state = 1, shape, np.dtype("f4"), False, raw
            return np.core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), state

    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"w": Array()}, protocol=2))
    assert "cannot be read as weights" in message(lambda: files.read(str(path)))


# ---- the zoo's pickles


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_come_back(protocol: int, tmp_path: Path) -> None:
    arrays = {
        "float32": np.random.rand(3, 4).astype(np.float32),
        "fortran": np.asfortranarray(np.random.rand(30, 40)),
        "large": np.random.rand(5000),
        "empty": np.zeros((0, 3)),
        "bool": np.array([True, False]),
        "text": np.array(["ab", "c"]),
        "none": np.array(2.5),
        "scalar": np.float64(3.5),
    }
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"blobs": arrays, "bytes": b"\xff", "plain": [1, (2.0, None)]}, protocol=protocol))
    loaded = files.read(str(path))
    assert loaded["bytes"] == b"\xff"
    assert loaded["plain"] == [1, (2.0, None)]
    for name, array in arrays.items():
        assert np.array_equal(loaded["blobs"][name], array)
        assert loaded["blobs"][name].dtype == array.dtype


def test_big_endian_arrays_come_back(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"w": np.arange(3, dtype=">f4")}, protocol=2))
    assert files.read(str(path))["w"].tolist() == [0, 1, 2]


def python2_pickle(name: str, array: np.ndarray) -> bytes:
    """What Python 2 wrote: strings without an encoding (opcodes U and T), also for the array's bytes."""

    def string(raw: bytes) -> bytes:
        return b"U" + bytes([len(raw)]) + raw if len(raw) < 256 else b"T" + struct.pack("<i", len(raw)) + raw

    dtype = b"cnumpy\ndtype\n" + string(array.dtype.str[1:].encode()) + b"K\0K\1\x87R"
    dtype += b"(K\3" + string(b"<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85" + string(b"b") + b"\x87R"
    shape = b"(" + b"".join(b"J" + struct.pack("<i", n) for n in array.shape) + b"t"
    filled = made + b"(K\1" + shape + dtype + b"\x89" + string(array.tobytes()) + b"tb"
    return b"\x80\2}(" + string(b"blobs") + b"}" + string(name.encode()) + filled + b"su."


def test_caffe2_pickle_of_python_2(model: nn.Module, tmp_path: Path) -> None:
    weight = np.random.rand(*model.backbone.bottom_up.stem.conv1.weight.shape).astype(np.float32)
    path = tmp_path / "R.pkl"
    path.write_bytes(python2_pickle("conv1_w", weight))
    assert pickle.loads(path.read_bytes(), encoding="latin1")["blobs"]["conv1_w"].tolist() == weight.tolist()
    other = other_model()
    load_student(other, str(path))
    loaded = other.backbone.bottom_up.stem.conv1.weight.detach().numpy()
    assert np.array_equal(loaded, weight[:, ::-1]) or np.array_equal(loaded, weight)


@LOADERS
def test_zoo_files_of_names_to_be_matched(load: Callable, model: nn.Module, tmp_path: Path) -> None:
    """Names without the prefix of the module that they belong to, as in the zoo's ImageNet models."""
    state = {k.replace("backbone.", ""): v.numpy() for k, v in model.state_dict().items()}
    path = tmp_path / "zoo.pkl"
    path.write_bytes(pickle.dumps({"model": state, "__author__": "zoo", "matching_heuristics": True}))
    other = other_model()
    load(other, str(path))
    assert equal(other.state_dict(), model.state_dict())


@LOADERS
def test_pycls_files(load: Callable, model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "x.pyth"
    torch.save({"model_state": model.state_dict(), "epoch": 3}, path)
    other = other_model()
    load(other, str(path))
    assert equal(other.state_dict(), model.state_dict())


# ---- mmdetection's metadata

HISTORY_BUFFER = """
import numpy as np

class HistoryBuffer:
    def __init__(self):
        self._log_history = np.arange(3.0)
        self._count_history = np.array([1, 1, 1])
        self._statistics_methods = {"min": HistoryBuffer.min}
        self.ran = open(MARKER, "w")

    def __getstate__(self):
        return {k: v for k, v in vars(self).items() if k != "ran"}

    def __setstate__(self, state):
        open(MARKER, "w").close()

    @staticmethod
    def min():
        pass

class ConfigDict(dict):
    def __getattr__(self, name):
        raise AttributeError(name)
"""


@pytest.fixture
def mmengine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """A module that is there while a file is written; its class leaves a trace when it is made or unpickled."""
    name = "mmengine.logging.history_buffer"
    module = types.ModuleType(name)
    module.MARKER = str(tmp_path / "ran")
    exec(HISTORY_BUFFER.replace("__name__", repr(name)), module.__dict__)
    for package in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    monkeypatch.setitem(sys.modules, name, module)
    return module


@LOADERS
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("keep_module", [True, False])
def test_metadata_is_ignored(
    load: Callable, zipped: bool, keep_module: bool, model: nn.Module, tmp_path: Path, mmengine: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As mmengine saves: its log with numpy arrays and ``HistoryBuffer.min`` (by getattr), configs, dates, scalars."""
    meta = {
        "hook_msgs": {"loss": mmengine.HistoryBuffer(), "best": np.float64(0.4)},
        "cfg": mmengine.ConfigDict(model=mmengine.ConfigDict(depth=50)),
        "time": datetime.datetime.now(),
        "config": tmp_path,
        "counts": defaultdict(list, a=[1]),
    }
    path = tmp_path / "epoch_12.pth"
    torch.save({"model": model.state_dict(), "meta": meta}, path, _use_new_zipfile_serialization=zipped)
    marker = Path(mmengine.MARKER)
    marker.unlink()
    if not keep_module:
        monkeypatch.delitem(sys.modules, mmengine.__name__)
    other = other_model()
    load(other, str(path))
    assert equal(other.state_dict(), model.state_dict())
    assert not marker.exists()


def test_metadata_is_no_way_in(tmp_path: Path) -> None:
    """A name of mmdetection's beside it does not let anything else in, and getattr gets nothing."""
    target, path = tmp_path / "written", tmp_path / "x.pth"
    torch.save({"meta": datetime.datetime.now(), "x": payload("os.system", target)}, path)
    assert "(posix.system)" in message(lambda: files.read(str(path)))
    assert not target.exists()
    torch.save({"meta": Payload(getattr, datetime.datetime, "now")}, path)
    assert files.read(str(path)) == {"meta": {}}


def test_stand_ins_leave_torch_as_it_was(tmp_path: Path) -> None:
    before = torch.serialization.get_safe_globals()
    path = tmp_path / "x.pth"
    torch.save({"meta": datetime.datetime.now(), "rng": np.random.get_state()[1]}, path)
    files.read(str(path))
    assert torch.serialization.get_safe_globals() == before


def test_states_of_generators_come_back(tmp_path: Path) -> None:
    path = str(tmp_path / "x.pth")
    files.write(path, {"numpy": np.random.get_state(), "torch": torch.get_rng_state()})
    drawn = np.random.rand(), torch.rand(1).item()
    loaded = files.read(path)
    np.random.set_state(loaded["numpy"])
    torch.set_rng_state(loaded["torch"])
    assert (np.random.rand(), torch.rand(1).item()) == drawn


# ---- safetensors, damaged and foreign files


@LOADERS
def test_safetensors(load: Callable, model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    other = other_model()
    load(other, str(path))
    assert equal(other.state_dict(), model.state_dict())


@pytest.fixture(scope="module")
def whole(model: nn.Module) -> Dict[str, bytes]:
    """A whole file of each kind, by suffix."""
    state = model.state_dict()
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    out = {"safetensors": safetensors.torch.save(state), "pkl": pickle.dumps({"model": arrays, "__author__": "zoo"})}
    path = Path(os.environ["DETECTRON2_DATASETS"]) / "x.pth"
    for suffix, zipped in (("pth", True), ("pyth", False)):
        torch.save({"model_state": state}, path, _use_new_zipfile_serialization=zipped)
        out[suffix] = path.read_bytes()
    path.unlink()
    return out


DAMAGE = {
    "truncated": (lambda whole: whole[: len(whole) // 2], "cannot be read as weights (damaged"),
    "begun": (lambda whole: whole[:10], "cannot be read as weights (damaged"),
    "noise": (lambda whole: bytes(range(256)) * 9, "cannot be read as weights (damaged"),
    "empty": (lambda whole: b"", "is empty"),
    "html": (lambda whole: b"\n<!DOCTYPE html><html>Sign in</html>", "is a web page"),
    "lfs": (
        lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "is a Git LFS pointer",
    ),
}


@LOADERS
@pytest.mark.parametrize("suffix", ["pth", "pyth", "pkl", "safetensors"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files(
    load: Callable, suffix: str, damage: str, model: nn.Module, whole: Dict[str, bytes], tmp_path: Path
) -> None:
    path = tmp_path / f"x.{suffix}"
    harm, expected = DAMAGE[damage]
    path.write_bytes(harm(whole[suffix]))
    assert f"{path} {expected}" in message(lambda: load(model, str(path)))


@LOADERS
@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([1, 2], "holds a list, not a state dict"),
        (torch.zeros(3), "holds a Tensor, not a state dict"),
        (7, "holds a int, not a state dict"),
        ({"model": 3}, "has no state dict under its key 'model'"),
        ({"model": {"head.cls_score.bias": 3}}, "holds values that are not weights"),
        ({"epoch": 3}, "holds values that are not weights"),
        ({1: torch.zeros(1)}, "holds values that are not weights"),
        ({"model": {}}, "none of its 0 keys match"),
        ({"student.head.cls_score.bias": torch.zeros(1)}, "none of its 1 keys match (first: student.head.cls"),
        ({"model": {"head.cls_score.bias": torch.zeros(1)}}, "head.cls_score.bias (1,) in the file, ("),
    ],
)
def test_files_of_another_type(load: Callable, content: Any, text: str, model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save(content, path)
    said = message(lambda: load(model, str(path)))
    assert said.startswith(str(path))
    assert text in said


@LOADERS
@pytest.mark.parametrize("content", [[1], 7, {"blobs": 3}, {"model": [], "__author__": "zoo"}])
def test_pickles_of_another_type(load: Callable, content: Any, model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(content))
    assert "state dict" in message(lambda: load(model, str(path)))


@LOADERS
def test_torchscript_is_named(load: Callable, model: nn.Module, tmp_path: Path) -> None:
    path = str(tmp_path / "x.pth")
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), path)
    assert "is a TorchScript program" in message(lambda: load(model, path))


@LOADERS
def test_paths_that_lead_nowhere(load: Callable, model: nn.Module, tmp_path: Path) -> None:
    assert "no such file" in message(lambda: load(model, str(tmp_path / "none.pth")))
    assert "catalog://ImageNetPretrained/none could not be downloaded" in message(
        lambda: load(model, "catalog://ImageNetPretrained/none")
    )


# ---- a student's weights may fit in part


def warnings_of(caplog: pytest.LogCaptureFixture) -> List[str]:
    return [record.getMessage() for record in caplog.records if "fits only part of the model" in record.getMessage()]


def test_a_backbone_alone_is_one_warning(model: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = {k: v for k, v in model.state_dict().items() if k.startswith("backbone.")}
    state["classifier.weight"] = torch.zeros(2)
    state["backbone.fpn_lateral3.weight"] = torch.zeros(1)
    path, other = tmp_path / "x.pth", other_model()
    kept = other.backbone.fpn_lateral3.weight.clone()
    torch.save(state, path)
    with caplog.at_level(logging.WARNING):
        load_student(other, str(path))
    assert torch.equal(other.backbone.fpn_output3.weight, model.backbone.fpn_output3.weight)
    assert torch.equal(other.backbone.fpn_lateral3.weight, kept)
    (text,) = warnings_of(caplog)
    heads = sum(name.startswith("head.") for name in model.state_dict())
    assert f"{heads} missing in the file (head." in text
    assert "1 unknown to the model (classifier.weight)" in text
    assert "1 with a different shape (backbone.fpn_lateral3.weight (1,) in the file, (" in text


def test_a_whole_model_is_no_warning(model: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "x.pth"
    torch.save(model.state_dict(), path)
    with caplog.at_level(logging.WARNING):
        load_student(other_model(), str(path))
    assert not warnings_of(caplog)


def test_no_weights_are_no_mistake(model: nn.Module) -> None:
    load_student(model, "")


def test_mmdetection_weights_need_conversion(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"bbox_head.retina_cls.weight": torch.zeros(1)}, path)
    assert "python -m d2kd.checkpoint.convert" in message(lambda: load_student(model, str(path)))


def test_an_unknown_query_is_named(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save(model.state_dict(), path)
    assert "matching_heuristics=True" in message(lambda: load_student(model, f"{path}?guess=1"))


def test_frozen_norms_do_not_pass_for_weights(tmp_path: Path) -> None:
    """FrozenBatchNorm2d fills in statistics that a file lacks, so its buffers are never missing."""
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    path, backbone = tmp_path / "x.pth", build_backbone(cfg)
    torch.save({"x.weight": torch.zeros(1)}, path)
    assert "none of its 1 keys match" in message(lambda: load_student(backbone, str(path)))


# ---- writing


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: List[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        done.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    def note_replace(source: str, target: str) -> None:
        assert torch.load(source, weights_only=True) == {"x": 1}  # all of it
        done.append("name")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    files.write(str(tmp_path / "x.pth"), {"x": 1})
    assert done == ["file", "name", "folder"]


def test_a_full_disk_leaves_the_last_file(tmp_path: Path) -> None:
    path = str(tmp_path / "x.pth")
    files.write(path, {"x": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            files.write(path, {"x": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files.read(path) == {"x": 1}
    assert os.listdir(tmp_path) == ["x.pth"]


# ---- configs


@pytest.fixture
def no_unsafe_yaml(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("yaml.unsafe_load was called")

    monkeypatch.setattr(yaml, "unsafe_load", refuse)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_our_configs_run_no_code(path: Path, no_unsafe_yaml: None) -> None:
    load_config(str(path))


def malicious_yaml(folder: Path) -> Path:
    path = folder / "evil.yaml"
    path.write_text(f'OUTPUT_DIR: !!python/object/apply:os.system ["touch {folder / "written"}"]\n')
    return path


@pytest.mark.parametrize("as_base", [False, True])
def test_configs_run_no_code(as_base: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = malicious_yaml(tmp_path)
    if as_base:
        path = tmp_path / "config.yaml"
        path.write_text("_BASE_: evil.yaml\nVERSION: 2\n")
    text = message(lambda: load_config(str(path)))
    assert "python/object/apply:os.system" in text
    assert "evil.yaml" in text
    assert f"{ALLOW_UNSAFE_YAML}=1" in text
    assert not (tmp_path / "written").exists()
    monkeypatch.setenv(ALLOW_UNSAFE_YAML, "1")  # the file is dangerous
    message(lambda: load_config(str(path)))  # 0, what os.system gives, is no folder
    assert (tmp_path / "written").exists()


def test_the_zoos_configs_need_no_permission() -> None:
    cfg = load_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES[0] == [32, 32 * 2 ** (1 / 3), 32 * 2 ** (2 / 3)]


def test_a_file_of_the_zoos_name_is_not_the_zoos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "COCO-Detection"
    folder.mkdir()
    malicious_yaml(folder).rename(folder / "retinanet_R_50_FPN_1x.yaml")
    monkeypatch.chdir(tmp_path)
    assert "os.system" in message(lambda: load_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml"))
    assert not (folder / "written").exists()


def test_a_link_to_the_zoos_file_is_not_the_zoos(tmp_path: Path) -> None:
    """Its _BASE_ is looked for beside the link, where anybody may have put a file."""
    from detectron2 import model_zoo

    (tmp_path / "link").mkdir()
    malicious_yaml(tmp_path).rename(tmp_path / "Base-RetinaNet.yaml")
    link = tmp_path / "link" / "x.yaml"
    link.symlink_to(model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml"))
    assert "os.system" in message(lambda: load_config(str(link)))
    assert not (tmp_path / "written").exists()


# ---- the command line, on every layout that mmdetection writes

DETECTORS = ["retinanet_r18", "gfl_r18", "atss_r50", "fcos_r50"]
LAYOUTS: Dict[str, Callable[[Dict[str, Tensor]], Dict[str, Any]]] = {
    "2.x": lambda state: {"meta": {"mmdet_version": "2.28"}, "state_dict": state, "optimizer": {"state": {}}},
    "3.x": lambda state: {
        "meta": {"time": datetime.datetime.now(), "loss": np.float64(0.1)},
        "state_dict": {**state, "data_preprocessor.mean": torch.zeros(3)},
        "message_hub": {"log_scalars": {}},
        "ema_state_dict": {f"module.{name}": tensor for name, tensor in state.items()},
    },
    "bare": lambda state: state,
    "prefixed": lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
    "ema": lambda state: {**state, **{f"ema_{n.replace('.', '_')}": t for n, t in state.items()}},
}


def numbered(entry: str) -> Dict[str, Tensor]:
    """A state dict in which each tensor is full of its own number; the file holds one of each."""
    return {name: torch.tensor(float(i)).expand(shape) for i, (name, shape) in enumerate(KEYS[entry].items())}


def detector(entry: str) -> nn.Module:
    name, depth = entry.split("_r")
    opts = ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", depth, "MODEL.FPN.EXTRA.RELU", str(name == "fcos")]
    if name == "retinanet":
        opts += ["MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.FPN.EXTRA.IN_FEATURE", "res5"]
        opts += [
            "MODEL.ANCHOR_GENERATOR.SIZES",
            str([[x, x * 2 ** (1 / 3), x * 2 ** (2 / 3)] for x in (32, 64, 128, 256, 512)]),
        ]
    else:
        opts += ["MODEL.META_ARCHITECTURE", name.upper(), "MODEL.FCOS.BOX_SCALES", "True"]
        opts += ["MODEL.FCOS.TOWER_BIAS", "False"]
    return build_model(load_config(str(CONFIGS / "Base-dense.yaml"), opts))


@pytest.mark.slow
@pytest.mark.parametrize("entry", DETECTORS)
def test_every_layout_converts_to_the_same(entry: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    state, model = numbered(entry), detector(entry)
    expected = convert_mmdet(state)
    for layout, wrap in LAYOUTS.items():
        source, target = tmp_path / f"{layout}.pth", str(tmp_path / f"{layout}.out.pth")
        torch.save(wrap(state), source)
        assert main([str(source), target]) == 0
        report = capsys.readouterr().out
        assert f"{len(expected)} tensors mapped, 80 classes" in report
        assert report.lower().startswith(f"mmdetection {entry.split('_')[0]}")
        assert "bbox_head.cls_convs -> head.cls_subnet (" in report
        assert ("ema_* dropped, not needed (" in report) == (layout == "ema")
        assert equal(files.read(target)["model"], expected)
    load_strict(model, target)
    assert equal(model.state_dict(), expected)


@pytest.mark.parametrize("entry", DETECTORS)
def test_leftovers_are_refused(entry: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, target = tmp_path / "in.pth", tmp_path / "out.pth"
    torch.save({"state_dict": {**numbered(entry), "bbox_head.extra.weight": torch.zeros(1)}}, source)
    assert main([str(source), str(target)]) == 2
    assert "no counterpart of bbox_head.extra.weight" in capsys.readouterr().err
    assert not target.exists()


def test_the_command_line_reads_safetensors(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    state = {name: torch.rand(3) for name in KEYS["gfl_r18"]}
    source, target = str(tmp_path / "in.safetensors"), str(tmp_path / "out.pth")
    safetensors.torch.save_file(state, source)
    assert main([source, target]) == 0
    assert equal(files.read(target)["model"], convert_mmdet(state))
