"""Each row of docs/troubleshooting.md: the mistake is made, and its message stands on the page."""

import json
import os
import shutil
import socket

import pytest
import torch
from detectron2.engine import SimpleTrainer
from messages import documented, rows_of
from small import CONFIGS, save_teacher

from d2kd.data import dataset_root, register_coco
from d2kd.dense import DenseOutputs
from d2kd.engine import main
from d2kd.engine.hooks import EXIT_PREEMPTED

PLAIN = str(CONFIGS / "quick_retinanet.yaml")
DISTILL = str(CONFIGS / "quick_crosskd_retinanet.yaml")
LAZY = str(CONFIGS / "lazy" / "quick_crosskd_retinanet.py")
SHORT = ["SOLVER.MAX_ITER", "2", "SOLVER.CHECKPOINT_PERIOD", "1", "DATASETS.TEST", "()"]
# In test_preflight.py, test_preflight_causes.py and test_distributed.py.
SAID_OF_TEACHERS = (" detects", " seems", " counts", " finds", " was", " predicts", "'s")
ELSEWHERE = tuple(f"the teacher{rest}" for rest in SAID_OF_TEACHERS)
ELSEWHERE += ("The teacher is weak", "process … terminated")
# In test_guarded_runs.py, test_errors.py and test_resume.py.
ELSEWHERE += ("the disk is full", "the log in", "… is in use by", "the annotation file … of data set")
ELSEWHERE += ("the checkpoint holds the state",)
# In test_hostile_files.py.
ELSEWHERE += ("… unpacks to", "… has an index", "… holds the name", "…: … holds", "… builds on", "… has more than")


class Place:
    """Runs train_net.py with mistakes; calls return all it says."""

    def __init__(self, folder, capfd, monkeypatch):
        self.folder = folder
        self.output = folder / "run"
        self.capfd = capfd
        self.monkeypatch = monkeypatch
        self.teacher = folder.parent / "teacher.pth"

    def run(self, *overrides, config=PLAIN, flags=(), status=2):
        opts = ["OUTPUT_DIR", self.output, *SHORT, *overrides]
        if config == DISTILL:
            opts = ["MODEL.DISTILL.TEACHER.WEIGHTS", self.teacher, *opts]
        return self.main("--config-file", config, *flags, *opts, status=status)

    def main(self, *args, status=2):
        assert main([str(x) for x in args]) == status
        return "".join(self.capfd.readouterr())

    def distill(self, *overrides, **options):
        return self.run(*overrides, config=DISTILL, **options)

    def weights(self, content):
        path = self.folder / "weights.pth"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        return ["MODEL.DISTILL.TEACHER.WEIGHTS", path]

    def config(self, text):
        path = self.folder / "own.yaml"
        path.write_text(f'_BASE_: "{PLAIN}"\n{text}\n')
        return path

    def data(self, change, *overrides, **options):
        """Trains on a copy of the blood cells whose annotations and images were changed in place."""
        folder, name = self.folder / "data", f"cells_{self.folder.name}"
        shutil.copytree(dataset_root() / "blood_cells", folder)
        annotations = folder / "instances_train.json"
        content = json.loads(annotations.read_text())
        text = change(content, folder) or json.dumps(content)
        annotations.write_text(text)
        register_coco(name, annotations, folder / "images")
        return self.run("DATASETS.TRAIN", f"('{name}',)", *overrides, **options)

    def resumed(self, *overrides, change=lambda: None, config=DISTILL, status=2):
        self.run(config=config, status=0)
        change()
        return self.run(*overrides, config=config, flags=["--resume"], status=status)

    def truncate(self, *names):
        for name in names:
            os.truncate(self.output / name, 100)


TIMM = ("MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", "MODEL.TIMM.NAME", "test_efficientnet")


def classifier(folder):
    """A file of weights for TIMM."""
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model(TIMM[-1]).state_dict(), folder / "classifier.pth")
    return str(folder / "classifier.pth")


def port_in_use(place):
    with socket.create_server(("", 0)) as server:
        return place.run(flags=["--num-gpus", 2, "--dist-url", f"tcp://127.0.0.1:{server.getsockname()[1]}"])


def in_an_iteration(place, error, status=2):
    def fail(*_):
        raise error

    place.monkeypatch.setattr(DenseOutputs, "anchors_per_level", property(fail))
    return place.distill(status=status)


def boxes(*box, first=True):
    """Gives the first annotation, or all, another box."""

    def change(content, folder):
        for annotation in content["annotations"][: 1 if first else None]:
            annotation["bbox"] = list(box)

    return change


def repeat_id(content, folder):
    content["images"][1]["id"] = content["images"][0]["id"]


def not_json(content, folder):
    return "<html>"


def no_annotations(content, folder):
    content["annotations"] = []


def other_order(content, folder):
    content["categories"][0]["name"], content["categories"][1]["name"] = "RBC", "Platelets"


def no_folder(content, folder):
    shutil.rmtree(folder / "images")


def missing_image(content, folder):
    (folder / "images" / content["images"][0]["file_name"]).unlink()


def damaged_images(content, folder):
    for image in content["images"][:6]:
        os.truncate(folder / "images" / image["file_name"], 500)


def gpus(place):
    place.monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    place.monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    return place.run(flags=["--num-gpus", 8])


def full_disk(place):
    def full(*_):
        raise OSError(28, "No space left on device")

    place.monkeypatch.setattr(os, "fsync", full)
    return place.run()


def other_teacher(place):
    copy = shutil.copy(place.teacher, place.folder)
    save_teacher(place.folder / "other.pth", seed=1)
    weights = ["MODEL.DISTILL.TEACHER.WEIGHTS", copy]
    place.distill(*weights, status=0)
    shutil.copy(place.folder / "other.pth", copy)
    return place.distill(*weights, flags=["--resume"])


def sigterm(place):
    from runs import sigterm

    write = SimpleTrainer._write_metrics
    place.monkeypatch.setattr(SimpleTrainer, "_write_metrics", lambda *args: (sigterm(), write(*args)))
    return place.run("SOLVER.MAX_ITER", 9, status=EXIT_PREEMPTED)


def not_finite(place, box_loss):
    state = torch.load(place.teacher)["model"]
    state["backbone.fpn_output3.weight"][0, 0, 0, 0] = float("nan")
    torch.save({"model": state}, place.folder / "nan.pth")
    return place.run("MODEL.WEIGHTS", place.folder / "nan.pth", "MODEL.RETINANET.BBOX_REG_LOSS_TYPE", box_loss)


class Code:
    def __reduce__(self):
        return print, ("this file runs code",)


PROVOCATIONS = {
    "there is no config key": lambda at: at.run("SOLVER.MAX_ITERS", 3),
    "override": lambda at: at.main("--config-file", LAZY, f"train.output_dir={at.output}", "train.max_iters=3"),
    "… is …; it must be of the type": lambda at: at.run("SOLVER.MAX_ITER", "many"),
    "… is …; it must be …": lambda at: at.run("SOLVER.MAX_ITER", 0),
    "…: a value is missing": lambda at: at.run(config=at.config("MODEL: {FPN: {OUT_CHANNELS: }}")),
    "… must come before": lambda at: at.run("--num-gpus", "2"),
    "config … is no file": lambda at: at.run(config="gone.yaml"),
    "bug: …": lambda at: in_an_iteration(at, TypeError("of code with a bug"), status=1),
    "… is …; … takes … there": lambda at: at.main("--config-file", LAZY, "model.methods.0.cut=x"),
    "… is …, which nothing": lambda at: at.run("MODEL.META_ARCHITECTURE", "RetinaNets"),
    "a NORM is GN": lambda at: at.run("MODEL.RESNETS.NORM", "GN"),
    "… has … labels": lambda at: at.run("MODEL.RETINANET.IOU_LABELS", "[0, 1]"),
    "no data set": lambda at: at.run("DATASETS.TRAIN", "('blood_cell_train',)"),
    "cannot read the annotation file": lambda at: at.run("DATASETS.TRAIN", "('bccd_train',)"),
    "… is not a JSON": lambda at: at.data(not_json),
    "…: all boxes end": lambda at: at.data(boxes(0.1, 0.1, 0.2, 0.2, first=False)),
    "…: annotations[": lambda at: at.data(boxes(1, 2, 3)),
    "…: … entries of": lambda at: at.data(repeat_id),
    "the list": lambda at: at.data(no_annotations),
    "…: no image has": lambda at: at.data(boxes(-9, -9, 5, 5, first=False)),
    "…: boxes without area": lambda at: at.data(boxes(3, 3, 0, 9), status=0),
    "class …": lambda at: at.data(other_order, "DATASETS.TEST", "('blood_cells_val',)"),
    "the image folder": lambda at: at.data(no_folder),
    "… images named in": lambda at: at.data(missing_image),
    "the image … cannot": lambda at: at.data(damaged_images),
    "Replaced an image": lambda at: at.data(damaged_images, "DATALOADER.SKIP_BAD_IMAGES", True, status=0),
    "data set … has": lambda at: at.run("MODEL.RETINANET.NUM_CLASSES", 4),
    "a batch of": lambda at: at.run("SOLVER.IMS_PER_BATCH", 3, flags=["--num-gpus", 2]),
    "--num-gpus": gpus,
    "--dist-url": port_in_use,
    "the folder": lambda at: at.run("OUTPUT_DIR", f"{PLAIN}/run"),
    "… could not be written": full_disk,
    "… was set for batches": lambda at: at.run("SOLVER.IMS_PER_BATCH", 2, status=0),
    "…: the GPU's memory is full": lambda at: in_an_iteration(at, torch.OutOfMemoryError("CUDA out of memory")),
    "iteration …: … is": lambda at: not_finite(at, "smooth_l1"),
    "iteration … (not finite": lambda at: not_finite(at, "giou"),
    "… holds checkpoints": lambda at: (at.run(status=0), at.run())[1],
    "… holds a run of another config": lambda at: at.resumed("SOLVER.BASE_LR", 0.1),
    "the teacher … is not the one": other_teacher,
    "none of the checkpoints": lambda at: at.resumed(
        change=lambda: at.truncate("model_0000000.pth", "model_0000001.pth", "model_final.pth")
    ),
    "Trying the previous checkpoint": lambda at: at.resumed(change=lambda: at.truncate("model_final.pth"), status=0),
    "stopped by SIGTERM": sigterm,
    "the teacher has no weights": lambda at: at.distill("MODEL.DISTILL.TEACHER.WEIGHTS", ""),
    "… does not fit the model": lambda at: at.distill(
        "MODEL.DISTILL.TEACHER.OPTS", "['MODEL.RETINANET.NUM_CONVS', '3']"
    ),
    "… is a web page": lambda at: at.distill(*at.weights(b"<html>Sign in</html>")),
    "… holds Python objects": lambda at: at.distill(*at.weights({"model": Code()})),
    "the student has … classes": lambda at: at.distill(
        *at.weights(save_teacher(at.folder / "t.pth", "MODEL.RETINANET.NUM_CLASSES", 2).read_bytes()),
        *("MODEL.DISTILL.TEACHER.OPTS", "['MODEL.RETINANET.NUM_CLASSES', '2']"),
    ),
    "… is …; timm has no such model": lambda at: at.run(*TIMM, "MODEL.TIMM.NAME", "resnet1"),
    "the pretrained weights of the timm": lambda at: at.run(*TIMM, "MODEL.TIMM.PRETRAINED", classifier(at.folder)),
    "the anchors": lambda at: at.distill("MODEL.DISTILL.TEACHER.OPTS", "['MODEL.ANCHOR_GENERATOR.OFFSET', '0.5']"),
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory, blood_cells):
    folder = tmp_path_factory.mktemp("troubles")
    save_teacher(folder / "teacher.pth")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("start", PROVOCATIONS)
def test_the_mistake_gives_the_message_of_its_row(start, shared, capfd, monkeypatch):
    folder = shared / str(len(list(shared.iterdir())))
    folder.mkdir()
    (row,) = [row for row in documented() if row.startswith(start)][:1]
    said = PROVOCATIONS[start](Place(folder, capfd, monkeypatch))
    assert row in {found for line in said.splitlines() for found in rows_of(line)}, said[-2000:]
    assert ("Traceback" in said) == row.startswith("bug:")


def test_every_row_is_provoked():
    first = [next(row for row in documented() if row.startswith(start)) for start in PROVOCATIONS]
    assert len(first) == len(set(first))
    assert [row for row in documented() if row not in first and not row.startswith(ELSEWHERE)] == []
