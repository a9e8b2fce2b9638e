"""Mistakes in annotation files and images: one sentence before training starts, or a warning that counts them."""

import copy
import json
import logging
import os
import shutil
import subprocess
import sys
import uuid

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import check_image_size, read_image
from detectron2.evaluation import COCOEvaluator
from PIL import Image
from small import CONFIGS

from d2kd.checkpoint import files
from d2kd.data import check_coco, coco, images, register_coco
from d2kd.data.bad_images import EvaluationMapper
from d2kd.data.checks import check_datasets
from d2kd.data.loader import build_train_loader
from d2kd.diagnose.preflight import draw
from d2kd.engine import main
from d2kd.errors import D2kdError
from d2kd.experiments.pictures import read_metrics

ROOT = CONFIGS.parent
PLAIN = str(CONFIGS / "quick_retinanet.yaml")
LAZY = str(CONFIGS / "lazy" / "quick_crosskd_retinanet.py")
NAMES = ["a.png", "b.png", "c.png"]


def content_of(names=NAMES):
    """Two boxes on each image of 40 x 30 pixels, the second one a crowd."""
    pairs = [(i, crowd) for i in range(1, len(names) + 1) for crowd in (0, 1)]
    return {
        "images": [{"id": i, "file_name": name, "width": 40, "height": 30} for i, name in enumerate(names, 1)],
        "categories": [{"id": 1, "name": "cell"}, {"id": 3, "name": "plate"}],
        "annotations": [
            {"id": k, "image_id": i, "category_id": 1, "bbox": [4, 5, 20.5, 10], "area": 205, "iscrowd": crowd}
            for k, (i, crowd) in enumerate(pairs, 1)
        ],
    }


def write(folder, content, name="a.json"):
    (folder / "images").mkdir(exist_ok=True)
    for i, file_name in enumerate(NAMES):
        Image.new("RGB", (40, 30), (80 * i, 0, 0)).save(folder / "images" / file_name)
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def put(*path_and_value):
    """An edit that sets the value at a path."""
    *path, key, value = path_and_value

    def edit(content):
        for step in path:
            content = content[step]
        content[key] = value

    return edit


def drop(*path):
    return lambda content: parent(content, path).pop(path[-1])


def repeat(listed):
    return lambda content: content[listed].append(copy.deepcopy(content[listed][0]))


def parent(content, path):
    for step in path[:-1]:
        content = content[step]
    return content


def shift_ids(content):
    for annotation in content["annotations"]:
        annotation["id"] -= 2


FIRST = ("annotations", 0)
REFUSED = {
    "an image is no object": (put("images", 1, [1]), "images[1] is [1]; make it an object {...}"),
    "an annotation is no object": (put("annotations", 2, None), "annotations[2] is None; make it an object"),
    "no image id": (drop("images", 1, "id"), "images[1] has no id; set it to a unique integer or string"),
    "image id is a list": (put("images", 1, "id", [2]), "images[1] has id [2]; "),
    "image id is a fraction": (put("images", 1, "id", 2.5), "images[1] has id 2.5; "),
    "image id is true": (put("images", 1, "id", True), "images[1] has id True; "),
    "image id is beyond int64": (put("images", 1, "id", 2**63), "images[1] has id 9223372036854775808; "),
    "image id is cut off by NumPy": (put("images", 1, "id", "2\0"), r"images[1] has id '2\x00'; "),
    "image ids of two kinds": (put("images", 1, "id", "2"), "the ids of 'images' are integers and strings; use one"),
    "image ids repeat": (repeat("images"), "2 entries of 'images' have the id 1; give each a unique id"),
    "category ids repeat": (repeat("categories"), "2 entries of 'categories' have the id 1; "),
    "annotation ids repeat": (repeat("annotations"), "2 entries of 'annotations' have the id 1; "),
    "annotation id is a string": (put(*FIRST, "id", "x"), "annotations[0] has id 'x'; set it to a unique integer"),
    "annotation id is infinite": (put(*FIRST, "id", float("inf")), "annotations[0] has id inf; "),
    "no file name": (drop("images", 0, "file_name"), "images[0] (id 1) has no file_name; set it to the name of the"),
    "file name is empty": (put("images", 0, "file_name", ""), "images[0] (id 1) has file_name ''; "),
    "file name is a number": (put("images", 0, "file_name", 7), "images[0] (id 1) has file_name 7; "),
    "file name with a NUL": (put("images", 0, "file_name", "a\0"), "images[0] (id 1) has file_name 'a"),
    "no height": (drop("images", 0, "height"), "images[0] (id 1) has no height; set it to the image's height in"),
    "width is zero": (put("images", 0, "width", 0), "images[0] (id 1) has width 0; set it to the image's width in"),
    "width is a string": (put("images", 0, "width", "40"), "images[0] (id 1) has width '40'; "),
    "width is a fraction": (put("images", 0, "width", 40.5), "images[0] (id 1) has width 40.5; "),
    "no category id": (drop("categories", 0, "id"), "categories[0] has no id; "),
    "category ids of two kinds": (put("categories", 0, "id", "1"), "the ids of 'categories' are integers and strings"),
    "no category name": (drop("categories", 1, "name"), "categories[1] (id 3) has no name; set it to the name of the"),
    "category name is a number": (put("categories", 1, "name", 5), "categories[1] (id 3) has name 5; "),
    "category name is half a character": (put("categories", 1, "name", "\ud800"), "categories[1] (id 3) has name"),
    "unknown image": (
        put(*FIRST, "image_id", 9),
        "annotations[0] (id 1) has image_id 9; set it to an id from '",
    ),
    "no image": (drop(*FIRST, "image_id"), "annotations[0] (id 1) has no image_id; set it to an id from '"),
    "image is a list": (put(*FIRST, "image_id", [1]), "annotations[0] (id 1) has image_id [1]; "),
    "unknown category": (put(*FIRST, "category_id", 2), "annotations[0] (id 1) has category_id 2; "),
    "category is an object": (put(*FIRST, "category_id", {}), "annotations[0] (id 1) has category_id {}; "),
    "no box": (drop(*FIRST, "bbox"), "annotations[0] (id 1) has no bbox; set it to [x, y, width, height] in pixels"),
    "box of 3": (put(*FIRST, "bbox", [1, 2, 3]), "annotations[0] (id 1) has bbox [1, 2, 3]; "),
    "box is a string": (put(*FIRST, "bbox", "1234"), "annotations[0] (id 1) has bbox '1234'; "),
    "box of strings": (put(*FIRST, "bbox", ["1", 2, 3, 4]), "annotations[0] (id 1) has bbox ['1', 2, 3, 4]; "),
    "box with NaN": (put(*FIRST, "bbox", [1, float("nan"), 3, 4]), "annotations[0] (id 1) has bbox [1, nan, 3, 4]; "),
    "box with infinity": (
        put(*FIRST, "bbox", [1, 2, 3, float("inf")]),
        "annotations[0] (id 1) has bbox [1, 2, 3, inf]",
    ),
    "box beyond all integers": (put(*FIRST, "bbox", [10**400, 2, 3, 4]), "annotations[0] (id 1) has bbox [1000"),
    "box of negative width": (put(*FIRST, "bbox", [9, 9, -3, 4]), "annotations[0] (id 1) has bbox [9, 9, -3, 4]; "),
    "box of negative height": (put(*FIRST, "bbox", [9, 9, 3, -4]), "annotations[0] (id 1) has bbox [9, 9, 3, -4]; "),
    "no area": (
        drop(*FIRST, "area"),
        "annotations[0] (id 1) has no area; set it to a number from 0 to 1e+10 (for instance width x height); ",
    ),
    "area is a string": (
        put(*FIRST, "area", "big"),
        "annotations[0] (id 1) has area 'big'; set it to a number from 0 to 1e+10",
    ),
    "area is negative": (put(*FIRST, "area", -1), "annotations[0] (id 1) has area -1; "),
    "area is NaN": (put(*FIRST, "area", float("nan")), "annotations[0] (id 1) has area nan; "),
    "area that evaluation ignores": (put(*FIRST, "area", 1e11), "annotations[0] (id 1) has area 100000000000.0; "),
    "no iscrowd": (drop(*FIRST, "iscrowd"), "annotations[0] (id 1) has no iscrowd; set it to 0, or 1 for a group"),
    "iscrowd is null": (put(*FIRST, "iscrowd", None), "annotations[0] (id 1) has iscrowd None; set it to 0, or 1"),
    "iscrowd is 2": (put(*FIRST, "iscrowd", 2), "annotations[0] (id 1) has iscrowd 2; "),
    "ignore": (
        put(*FIRST, "ignore", 1),
        "annotations[0] (id 1) has ignore 1; set it to 0 (did you mean iscrowd 1?)",
    ),
    "segmentation is a number": (put(*FIRST, "segmentation", 1), "annotations[0] (id 1) has segmentation 1; "),
    "polygon is a number": (put(*FIRST, "segmentation", [1] * 6), "annotations[0] (id 1) has segmentation [1, 1, "),
    "RLE without counts": (put(*FIRST, "segmentation", {"size": [30, 40]}), "annotations[0] (id 1) has segmentation"),
    "RLE without size": (put(*FIRST, "segmentation", {"counts": [1]}), "annotations[0] (id 1) has segmentation"),
    "RLE of negative counts": (put(*FIRST, "segmentation", {"counts": [-1], "size": [30, 40]}), "has segmentation"),
    "keypoints are a string": (
        put(*FIRST, "keypoints", "abc"),
        "annotations[0] (id 1) has keypoints 'abc'; set it to a",
    ),
    "keypoints of strings": (put(*FIRST, "keypoints", ["1"]), "annotations[0] (id 1) has keypoints ['1']; "),
    "boxes normalized by the size": (
        lambda content: [a.update(bbox=[0.1, 0.5, 0.2, 0.3]) for a in content["annotations"]],
        "all boxes end within the first pixel, as if normalized by the image size; use pixels",
    ),
    "crowds alone": (
        lambda content: [a.update(iscrowd=1) for a in content["annotations"]],
        "no image has a usable box (with an area, inside its image and with iscrowd 0); ",
    ),
    "flat boxes alone": (
        lambda content: [a.update(bbox=[4, 5, 0, 10]) for a in content["annotations"]],
        "no image has a usable box",
    ),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_cannot_be_used_is_refused(mistake, tmp_path):
    edit, message = REFUSED[mistake]
    content = content_of()
    edit(content)
    path = write(tmp_path, content)
    with pytest.raises(D2kdError) as caught:
        check_coco(path, tmp_path / "images")
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[", '{"images": ', "\ufeff{}", "[" * 100_000])
def test_what_is_no_json_is_refused(text, tmp_path):
    with pytest.raises(D2kdError, match=r"a\.json is not a JSON file \(.+\); use an annotation file in COCO"):
        check_coco(write(tmp_path, text), tmp_path / "images")


def test_minival_may_repeat_annotations_as_in_detectron2(tmp_path):
    content = content_of()
    repeat("annotations")(content)
    check_coco(write(tmp_path, content, "instances_minival2014.json"), tmp_path / "images")


HARMLESS = {
    "other keys": lambda content: [x.update(own=None) for x in content["images"] + content["annotations"]],
    "strings as ids": lambda content: [
        *(x.update(id=str(x["id"])) for x in content["images"] + content["categories"]),
        *(x.update(image_id=str(x["image_id"]), category_id="1") for x in content["annotations"]),
    ],
    "whole numbers as fractions": put(*FIRST, "image_id", 1.0),
    "empty segmentation": put(*FIRST, "segmentation", []),
    "polygon": put(*FIRST, "segmentation", [[1, 2, 3, 4, 5, 6]]),
    "RLE": put("annotations", 1, "segmentation", {"counts": [5, 10, 1185], "size": [30, 40]}),
    "compressed RLE": put("annotations", 1, "segmentation", {"counts": "abc", "size": [30, 40]}),
    "no ground truth on an image": lambda content: content["annotations"].__delitem__(slice(0, 2)),
    "ignore 0": put(*FIRST, "ignore", 0),
    "true and false": put("annotations", 1, "iscrowd", True),
}


@pytest.mark.parametrize("what", HARMLESS)
def test_what_is_accepted_can_be_used(what, tmp_path, caplog):
    """By detectron2's loader and by evaluation."""
    content = content_of()
    HARMLESS[what](content)
    own = register(tmp_path, "train", content)
    with caplog.at_level(logging.WARNING):
        check_coco(tmp_path / "train.json", tmp_path / "images")
    assert not caplog.records
    evaluator = COCOEvaluator(own)
    evaluator.reset()
    for entry in DatasetCatalog.get(own):
        found = [{"image_id": entry["image_id"], "category_id": 0, "bbox": [4, 5, 20.5, 10], "score": 0.5}]
        evaluator._predictions.append({"image_id": entry["image_id"], "instances": found})
    assert evaluator.evaluate()["bbox"]["AP"] > 40


@pytest.mark.parametrize("key", ["area", "iscrowd"])
def test_training_needs_less(key, tmp_path):
    content = content_of()
    content["annotations"][4].pop(key)
    path = write(tmp_path, content)
    check_coco(path, tmp_path / "images", evaluated=False)
    with pytest.raises(D2kdError, match=rf"annotations\[4\] \(id 5\) has no {key}; .*; evaluation needs it"):
        check_coco(path, tmp_path / "images")


ODD = {
    "flat": (
        put(*FIRST, "bbox", [1, 2, 0, 3]),
        "boxes without area: 1, such as annotation 1 with [1, 2, 0, 3] (training",
    ),
    "outside": (
        put(*FIRST, "bbox", [40, 2, 9, 3]),
        "boxes outside their image: 1, such as annotation 1 with [40, 2, 9",
    ),
    "reaching out": (
        lambda content: [a.update(bbox=[-1.5, 2, 9, 3]) for a in content["annotations"][2:4]],
        "boxes that extend beyond their image: 2, such as annotation 3 with [-1.5, 2, 9, 3] (training clips them)",
    ),
    "two points": (
        put(*FIRST, "segmentation", [[1, 2, 3, 4]]),
        "boxes whose segmentation has no polygon with three points: 1, such as annotation 1",
    ),
    "file twice": (put("images", 2, "file_name", "a.png"), "file names shared by several images: 1, such as 'a.png'"),
    "ids from 0": (
        shift_ids,
        "annotation ids below 1: 2, such as -1 (evaluation counts these objects as not found)",
    ),
}


@pytest.mark.parametrize("what", ODD)
def test_what_would_be_dropped_silently_is_counted(what, tmp_path, caplog):
    edit, message = ODD[what]
    content = content_of()
    edit(content)
    path = write(tmp_path, content)
    with caplog.at_level(logging.WARNING):
        check_coco(path, tmp_path / "images")
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{path}: {message}")
    assert record.getMessage().count("such as") == 1
    assert record.getMessage().endswith("; fix or remove these entries")


def test_a_pixel_of_tolerance(tmp_path, caplog):
    content = content_of()
    content["annotations"][0]["bbox"] = [-1, -0.5, 42, 31.5]
    with caplog.at_level(logging.WARNING):
        check_coco(write(tmp_path, content), tmp_path / "images")
    assert not caplog.records


def test_one_warning_lists_all_defects_and_images_without_boxes_are_counted(tmp_path, caplog):
    content = content_of()
    content["annotations"][0]["bbox"] = [1, 2, 0, 3]
    content["annotations"][2]["bbox"] = [50, 2, 9, 3]
    with caplog.at_level(logging.INFO):
        check_coco(write(tmp_path, content), tmp_path / "images")
    warning, info = caplog.records
    assert "boxes without area: 1" in warning.getMessage()
    assert "boxes outside their image: 1" in warning.getMessage()
    assert info.levelname == "INFO"
    assert "2 of 3 images have no usable box" in info.getMessage()


@pytest.fixture(autouse=True)
def _forget_sets():
    before = set(DatasetCatalog.list())
    yield
    for own in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(own)
        MetadataCatalog.remove(own)


def register(folder, split, content):
    """Registers a set in a folder under a name of its own."""
    own = f"{split}_{folder.name}_{uuid.uuid4().hex}"
    register_coco(own, write(folder, content, f"{split}.json"), folder / "images")
    return own


def test_classes_in_another_order_name_both_files(tmp_path):
    content = content_of()
    train = register(tmp_path, "train", content)
    content["categories"][0]["id"] = 2  # the same order, other ids
    for annotation in content["annotations"]:
        annotation["category_id"] = 2
    check_datasets([train, register(tmp_path, "same", content)], ("KEY", 2))
    content["categories"][0]["id"] = 4
    for annotation in content["annotations"]:
        annotation["category_id"] = 4
    val = register(tmp_path, "val", content)
    with pytest.raises(D2kdError, match=r"class 0 is 'cell' in .*train\.json, but 'plate' in .*val\.json; give both"):
        check_datasets([train, val], ("KEY", 2), evaluated=[val])


def test_other_classes_than_registered_are_refused(tmp_path):
    """detectron2 would stop when it reads the file, as it does when a file of COCO's own name is replaced."""
    own = register(tmp_path, "train", content_of())
    MetadataCatalog.get(own).thing_classes = ["cat", "dog"]
    with pytest.raises(D2kdError, match=r"is registered with other categories than .*train\.json has; register"):
        check_datasets([own], ("KEY", 2))


def test_a_file_is_examined_once_in_a_run(tmp_path, monkeypatch):
    examined = []
    examine = coco.examine_coco
    monkeypatch.setattr("d2kd.data.checks.examine_coco", lambda path: examined.append(path) or examine(path))
    content = content_of()
    content["annotations"][0]["bbox"][2] = 0
    own = register(tmp_path, "train", content)
    remarks = check_datasets([own, own], ("KEY", 2))
    assert examined == [str(tmp_path / "train.json")]
    assert [level for level, text in remarks if "boxes without area" in text] == [logging.WARNING]
    content["categories"].append({"id": 4, "name": "third"})
    write(tmp_path, content, "train.json")
    with pytest.raises(D2kdError, match="has 3 categories"):
        check_datasets([own], ("KEY", 2))


def test_only_what_is_evaluated_needs_all(tmp_path):
    content = content_of()
    del content["annotations"][0]["area"]
    own = register(tmp_path, "train", content)
    check_datasets([own], ("KEY", 2), evaluated=["another"])
    with pytest.raises(D2kdError, match="has no area"):
        check_datasets([own], ("KEY", 2), evaluated=[own])


def test_missing_images_are_counted_over_the_whole_set(tmp_path, monkeypatch):
    """Without asking for each of those that are there."""
    nested = ["sub/d.png", "../images/a.png", str(tmp_path / "images" / "b.png")]
    content = content_of([f"x_{i}.png" for i in range(30)] + NAMES + nested)
    path = write(tmp_path, content)
    (tmp_path / "images" / "sub").mkdir()
    shutil.copy(tmp_path / "images" / "a.png", tmp_path / "images" / "sub" / "d.png")
    first = "'x_0.png', 'x_1.png', 'x_2.png'; put the images there or set the folder"
    with pytest.raises(D2kdError, match=rf"30 of 36 images named in .*a\.json are not in .*images, such as {first}"):
        check_coco(path, tmp_path / "images")
    asked = []
    monkeypatch.setattr(images.os.path, "isfile", lambda path: asked.append(path))
    assert images.missing_files(tmp_path / "images", NAMES + nested) == []
    assert asked == []


def test_a_folder_in_the_place_of_an_image_is_none(tmp_path):
    path = write(tmp_path, content_of())
    (tmp_path / "images" / "a.png").unlink()
    (tmp_path / "images" / "a.png").mkdir()
    with pytest.raises(D2kdError, match=r"1 of 3 images named .* such as 'a\.png'"):
        check_coco(path, tmp_path / "images")


def truncated(path):
    path.write_bytes(path.read_bytes()[:60])


def other_size(path):
    Image.new("RGB", (41, 30)).save(path)


def rotated(path):
    exif = Image.Exif()
    exif[images.ORIENTATION] = 6
    Image.new("RGB", (40, 30)).save(path, exif=exif)


SPOILS = {
    "no image": (lambda path: path.write_text("<html>"), "cannot identify image file"),
    "empty": (lambda path: path.write_bytes(b""), "cannot identify image file"),
    "gone": (lambda path: path.unlink(), "No such file or directory"),
    "truncated": (truncated, "truncated"),
    "other size": (other_size, "it has 41 x 30 pixels, but the annotations say 40 x 30"),
    "rotated": (
        rotated,
        "it has 30 x 40 pixels after rotation by its EXIF orientation, but the annotations say 40 x 30",
    ),
}


@pytest.mark.parametrize("how", [how for how in SPOILS if how not in ("gone", "truncated")])
def test_images_to_evaluate_are_opened_before(how, tmp_path):
    spoil, reason = SPOILS[how]
    path = write(tmp_path, content_of())
    spoil(tmp_path / "images" / "b.png")
    check_coco(path, tmp_path / "images", evaluated=False)
    with pytest.raises(D2kdError) as caught:
        check_coco(path, tmp_path / "images")
    assert f"the image {tmp_path}/images/b.png of {path} cannot be used: {reason}" in str(caught.value)


def test_of_many_images_some_are_opened(tmp_path, monkeypatch):
    path = write(tmp_path, content_of())
    opened = []
    monkeypatch.setattr(images, "read_fault", lambda path, size, decode: opened.append(path) or "")
    monkeypatch.setattr(images, "HEADERS_READ", 2)
    check_coco(path, tmp_path / "images")
    assert [os.path.basename(path) for path in opened] == ["a.png", "c.png"]


def entries(folder, names=NAMES):
    return [
        {"file_name": str(folder / "images" / name), "width": 40, "height": 30, "image_id": i}
        for i, name in enumerate(names, 1)
    ]


def mapper(entry):
    image = read_image(entry["file_name"], "BGR")
    check_image_size(entry, image)
    return {**entry, "drawn": np.random.rand()}


def loader(folder, workers=0, **options):
    options = {"mapper": mapper, "seed": 1, "total_batch_size": 3, **options}
    return build_train_loader(entries(folder), num_workers=workers, **options)


@pytest.mark.parametrize(("how", "workers"), [*((how, 0) for how in SPOILS), ("truncated", 1)])
def test_training_names_the_image_it_cannot_read(how, workers, tmp_path):
    """In one sentence, also if a loading process raises it."""
    spoil, reason = SPOILS[how]
    write(tmp_path, content_of())
    spoil(tmp_path / "images" / "b.png")
    with pytest.raises(D2kdError) as caught:
        list(zip(range(2), loader(tmp_path, workers)))
    message = str(caught.value)
    assert message.startswith(f"the image {tmp_path}/images/b.png (id 2) cannot be used: ")
    assert reason in message
    assert message.endswith("; fix the file or its entry, or set DATALOADER.SKIP_BAD_IMAGES True to train without it")
    assert "\n" not in message


def test_other_mistakes_of_a_mapper_are_its_own(tmp_path):
    write(tmp_path, content_of())
    for wrong in (lambda entry: entry["no such key"], EvaluationMapper(lambda entry: 1 / 0)):
        with pytest.raises((KeyError, ZeroDivisionError)):
            next(iter(loader(tmp_path, mapper=wrong, skip_bad_images=True)))
    with pytest.raises(KeyError):  # no image at all
        next(
            iter(
                build_train_loader(
                    [{}], mapper=lambda entry: entry["x"], total_batch_size=1, aspect_ratio_grouping=False
                )
            )
        )


def test_an_error_of_the_system_is_told_though_it_is_gone(tmp_path):
    """A network folder that fails for a moment."""

    def fails(entry):
        raise OSError(5, "Input/output error")

    write(tmp_path, content_of())
    with pytest.raises(D2kdError, match=r"the image .* cannot be used: Input/output error; fix"):
        next(iter(loader(tmp_path, mapper=fails)))


def test_bad_images_are_replaced_always_alike(tmp_path):
    """Whatever the number of loading processes; the other samples stay as they are."""
    write(tmp_path, content_of())
    whole = [sample for _, batch in zip(range(4), loader(tmp_path)) for sample in batch]
    truncated(tmp_path / "images" / "b.png")
    spoilt = [
        [sample for _, batch in zip(range(4), loader(tmp_path, workers, skip_bad_images=True)) for sample in batch]
        for workers in (0, 0, 2)
    ]
    assert spoilt[0] == spoilt[1] == spoilt[2]
    for before, after in zip(whole, spoilt[0]):
        if before["image_id"] != 2:
            assert after == before
        else:
            assert after["image_id"] in (1, 3)
            (fault,) = after["bad_images"].items()
            assert fault[0] == str(tmp_path / "images" / "b.png")
            assert "(id 2) cannot be used" in fault[1]


def test_nothing_but_bad_images_is_told(tmp_path):
    write(tmp_path, content_of())
    for image in (tmp_path / "images").iterdir():
        truncated(image)
    with pytest.raises(D2kdError, match=r"images in a row could not be used, the first: the image .*png"):
        next(iter(loader(tmp_path, skip_bad_images=True)))


def test_the_preflight_reads_the_same_way(tmp_path):
    write(tmp_path, content_of())
    truncated(tmp_path / "images" / "a.png")
    with pytest.raises(D2kdError, match="SKIP_BAD_IMAGES"):
        draw(loader(tmp_path).dataset, 2, [0])


@pytest.fixture
def cells(blood_cells, tmp_path):
    """A copy of the drawn set, with the overrides of a short run on it; ``cells.spoil`` damages two training images."""
    return Cells(blood_cells, tmp_path)


class Cells:
    def __init__(self, original, folder):
        self.folder = shutil.copytree(original, folder / "cells")
        self.output = folder / "run"
        self.names = {split: f"cells_{split}_{uuid.uuid4().hex}" for split in ("train", "val")}
        for split, own in self.names.items():
            register_coco(own, self.folder / f"instances_{split}.json", self.folder / "images")

    def edit(self, split, act):
        path = self.folder / f"instances_{split}.json"
        content = json.loads(path.read_text())
        act(content)
        path.write_text(json.dumps(content))

    def spoil(self, *names):
        for own in names:
            truncated(self.folder / "images" / own)

    def run(self, *opts, flags=(), test=False, output=None):
        """A run over all 12 training images, two in a batch; returns the exit status."""
        short = ["SOLVER.MAX_ITER", 6, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.CHECKPOINT_PERIOD", 2, "SEED", 5]
        sizes = ["INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", 64, "OUTPUT_DIR", output or self.output]
        train, val = self.names.values()
        sets = ["DATASETS.TRAIN", f"('{train}',)", "DATASETS.TEST", f"('{val}',)" if test else "()"]
        return main([str(x) for x in ("--config-file", PLAIN, *flags, *short, *sizes, *sets, *opts)])

    def lazy(self, *opts, flags=()):
        """The same with a LazyConfig; evaluates."""
        train, val = self.names.values()
        own = [f"dataloader.train.dataset.names={train}", f"dataloader.test.dataset.names={val}"]
        own += ["dataloader.train.total_batch_size=2", "train.max_iter=6", "train.eval_period=0", "train.seed=5"]
        return main(
            ["--config-file", LAZY, *flags, *own, "model.methods=[]", "model.teacher=null"]
            + [f"train.output_dir={self.output}", *opts]
        )


def last_error(capfd):
    return capfd.readouterr().err.strip().splitlines()[-1]


SPOILT = ("train_00003.png", "train_00008.png")


@pytest.mark.slow
@pytest.mark.parametrize("style", ["yaml", "lazy"])
def test_a_run_with_bad_images_counts_them(style, cells, capfd):
    cells.spoil(*SPOILT)
    run, opts = {
        "yaml": (cells.run, ["DATALOADER.SKIP_BAD_IMAGES", True]),
        "lazy": (cells.lazy, ["train.skip_bad_images=True"]),
    }[style]
    assert run() == 2
    error = last_error(capfd)
    assert error.startswith("error: the image ")
    assert any(own in error for own in SPOILT)
    assert run(*opts, flags=["--resume"]) == 0
    out = capfd.readouterr().out
    for own in SPOILT:
        assert out.count(f"{own} (id") == out.count("Replaced an image by another one: ") / 2 == 1
    assert [line["bad_images"] for line in read_metrics(cells.output) if "bad_images" in line][-1] == 2


@pytest.mark.slow
def test_resume_is_exact_with_bad_images(cells, tmp_path, capfd):
    cells.spoil(*SPOILT)
    skip = ["DATALOADER.SKIP_BAD_IMAGES", True]
    assert cells.run(*skip) == 0
    broken = shutil.copytree(cells.output, tmp_path / "broken")
    for own in ("model_final.pth", "model_0000005.pth", "last_checkpoint"):
        (broken / own).unlink()
    assert cells.run(*skip, "DATALOADER.NUM_WORKERS", 1, flags=["--resume"], output=broken) == 0
    assert "Starting training from iteration 4" in capfd.readouterr().out
    one, two = (files.read(str(folder / "model_final.pth")) for folder in (cells.output, broken))
    hooks = [state["trainer"]["hooks"] for state in (one, two)]
    assert hooks[0]["BadImages"] == hooks[1]["BadImages"]
    assert len(hooks[0]["BadImages"]["faults"]) == 2
    assert all((one["model"][key] == two["model"][key]).all() for key in one["model"])


@pytest.mark.slow
@pytest.mark.parametrize("style", ["yaml", "lazy"])
def test_evaluation_leaves_out_no_image(style, cells, capfd):
    """Not even if training may: the results would be others."""
    cells.run()
    weights = cells.output / "model_final.pth"
    cells.spoil("val_00002.png")
    capfd.readouterr()
    if style == "yaml":
        opts = ["MODEL.WEIGHTS", weights, "DATALOADER.SKIP_BAD_IMAGES", True]
        assert cells.run(*opts, flags=["--eval-only"], test=True) == 2
    else:
        assert cells.lazy(f"train.init_checkpoint={weights}", "train.skip_bad_images=True", flags=["--eval-only"]) == 2
    error = last_error(capfd)
    assert "val_00002.png (id 2) cannot be used: " in error
    assert error.endswith("fix the file or its entry, since the results depend on all images")


@pytest.mark.slow
def test_a_run_tells_in_its_log_what_is_odd(cells, capfd):
    def act(content):
        content["annotations"][0]["bbox"][2] = 0

    cells.edit("train", act)
    assert cells.run("SOLVER.MAX_ITER", 1) == 0
    assert "boxes without area: 1, such as annotation 1 with" in (cells.output / "log.txt").read_text()
    assert capfd.readouterr().out.count("boxes without area") == 1


@pytest.mark.slow
def test_a_run_ends_though_loading_processes_wait(cells):
    """Python would wait for ever for those that take no SIGTERM from anyone.

    All images are spoiled, because the order in which they are drawn is detectron2's, and not the same in all versions.
    """
    cells.spoil(*(path.name for path in (cells.folder / "images").glob("train_*.png")))
    code = f"""
import sys
from d2kd.data import register_coco
from d2kd.engine import main
for split, own in {cells.names!r}.items():
    register_coco(own, f"{cells.folder}/instances_{{split}}.json", "{cells.folder}/images")
sys.exit(main(sys.argv[1:]))
"""
    opts = ["--config-file", PLAIN, "DATASETS.TRAIN", f"('{cells.names['train']}',)", "DATASETS.TEST", "()"]
    opts += ["SEED", "1", "SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "2", "OUTPUT_DIR", str(cells.output)]
    done = subprocess.run([sys.executable, "-c", code, *opts], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: the image ")
