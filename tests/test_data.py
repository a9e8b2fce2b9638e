"""The generated data set, the registration and checks of COCO files, and the preparation of BCCD."""

import hashlib
import importlib.util
import json
import uuid
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Dict, List

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from PIL import Image

from d2kd.data import CLASS_NAMES, check_coco, dataset_root, register_builtin, register_coco, write_blood_cells
from d2kd.data import blood_cells as drawing
from d2kd.errors import D2kdError

NUM_IMAGES = 12
SCRIPT = Path(__file__).parents[1] / "datasets" / "prepare_bccd.py"


def hashes(root: Path) -> Dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def smears(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("smears")
    write_blood_cells(root, "train", NUM_IMAGES, seed=3)
    return root


@pytest.mark.slow
def test_same_seed_same_bytes(smears: Path, tmp_path: Path) -> None:
    write_blood_cells(tmp_path, "train", NUM_IMAGES, seed=3)
    assert len(hashes(tmp_path)) == NUM_IMAGES + 1
    assert hashes(tmp_path) == hashes(smears)


def test_other_seed_or_split_shares_no_image(smears: Path, tmp_path: Path) -> None:
    write_blood_cells(tmp_path, "train", 3, seed=4)
    write_blood_cells(tmp_path, "val", 3, seed=3)
    pictures = [digest for root in (smears, tmp_path) for name, digest in hashes(root).items() if name.endswith("png")]
    assert len(set(pictures)) == len(pictures) == NUM_IMAGES + 6


def test_annotations_are_complete_and_valid(smears: Path) -> None:
    check_coco(smears / "instances_train.json", smears / "images")
    content = json.loads((smears / "instances_train.json").read_text())
    assert [category["name"] for category in content["categories"]] == ["RBC", "WBC", "Platelets"]
    assert [category["id"] for category in content["categories"]] == [1, 2, 3]
    assert len(content["images"]) == NUM_IMAGES
    with Image.open(smears / "images" / content["images"][0]["file_name"]) as image:
        assert image.size == (170, 128)
    for annotation in content["annotations"]:
        x, y, width, height = annotation["bbox"]
        assert min(x, y) >= 0
        assert x + width <= 170.01
        assert y + height <= 128.01
        assert min(width, height) >= 2
        assert annotation["area"] == pytest.approx(width * height, abs=0.01)
    ids = [annotation["id"] for annotation in content["annotations"]]
    assert ids == list(range(1, len(ids) + 1))
    per_image = {c: sum(a["category_id"] == c for a in content["annotations"]) / NUM_IMAGES for c in (1, 2, 3)}
    assert 9 <= per_image[1] <= 23
    assert 0.5 <= per_image[2] <= 1.5
    assert 0.7 <= per_image[3] <= 3


def test_boxes_fit_the_drawn_cells() -> None:
    """A single opaque cell on a flat, noiseless canvas changes exactly the pixels of its box, give or take the edge."""
    cell = drawing.Cell(drawing.WBC, 60.0, 50.0, (24.0, 18.0), 0.4, ((2, 0.05, 1.0), (3, 0.03, 2.0)))
    canvas = np.zeros((128, 170, 3))
    drawing._draw_cell(np.random.default_rng(0), canvas, cell)
    rows, columns = np.nonzero(canvas.any(axis=2))
    drawn = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    # The soft edge is at most 3 pixels wide, half of it outside.
    np.testing.assert_allclose(drawn, cell.box(), atol=2.5)


def test_hidden_cells_are_not_labelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two cells at the same place, only the upper one is labelled; a third one elsewhere is labelled too."""
    below = drawing.Cell(drawing.RBC, 60.0, 50.0, (10.0, 10.0), 0.0, ((2, 0.0, 0.0),))
    above = drawing.Cell(drawing.WBC, 60.0, 50.0, (20.0, 20.0), 0.0, ((2, 0.0, 0.0),))
    beside = drawing.Cell(drawing.RBC, 160.0, 50.0, (20.0, 20.0), 0.0, ((2, 0.0, 0.0),))
    monkeypatch.setattr(drawing, "_place_cells", lambda *_: [below, beside, above])
    pixels, cells = drawing.draw_smear(np.random.default_rng(0), (128, 170))
    assert pixels.shape == (128, 170, 3)
    assert cells == [beside, above]
    written = drawing._annotation(1, 1, beside, (128, 170))  # half of it lies beyond the image
    np.testing.assert_allclose(written["bbox"], [140, 30, 30, 40], atol=0.1)


def test_outlines_are_masks_of_their_boxes(smears: Path) -> None:
    for annotation in json.loads((smears / "instances_train.json").read_text())["annotations"]:
        (outline,) = annotation["segmentation"]
        points = np.array(outline).reshape(-1, 2)
        x, y, width, height = annotation["bbox"]
        sides = [*points.min(0), *np.ptp(points, axis=0)]
        np.testing.assert_allclose(sides, [x, y, width, height], atol=1.0)


def test_cells_grow_with_the_image(tmp_path: Path) -> None:
    """At twice the height and width the cells are twice as large and equally many, within sampling error."""
    means = []
    for size in ((64, 85), (128, 170)):
        path = write_blood_cells(tmp_path / str(size[0]), "train", 6, seed=0, size=size)
        boxes = [a["bbox"] for a in json.loads(path.read_text())["annotations"] if a["category_id"] == 1]
        means.append((np.median([box[2] for box in boxes]), len(boxes)))
    assert means[1][0] / means[0][0] == pytest.approx(2, rel=0.2)
    assert means[1][1] / means[0][1] == pytest.approx(1, rel=0.4)


def test_interrupted_write_is_not_taken_for_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, drawn = drawing.draw_smear, []

    def interrupt(*arguments: Any) -> Any:
        drawn.append(1)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return draw(*arguments)

    write_blood_cells(tmp_path, "train", 2, seed=0)
    with monkeypatch.context() as patch:
        patch.setattr(drawing, "draw_smear", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_blood_cells(tmp_path, "train", 4, seed=1)
    assert not (tmp_path / "instances_train.json").exists()
    write_blood_cells(tmp_path, "train", 4, seed=1)
    write_blood_cells(tmp_path / "fresh", "train", 4, seed=1)
    fresh = hashes(tmp_path / "fresh")
    assert {name: digest for name, digest in hashes(tmp_path).items() if not name.startswith("fresh")} == fresh


def test_annotation_file_appears_only_when_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fail)
        with pytest.raises(OSError, match="disk full"):
            write_blood_cells(tmp_path, "train", 1, seed=0)
    assert not (tmp_path / "instances_train.json").exists()


def test_reuse_needs_same_parameters_and_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, drawn = drawing.draw_smear, []
    monkeypatch.setattr(drawing, "draw_smear", lambda *arguments: drawn.append(1) or draw(*arguments))
    write_blood_cells(tmp_path, "train", 2, seed=0)
    write_blood_cells(tmp_path, "train", 2, seed=0)
    assert len(drawn) == 2
    (tmp_path / "images" / "train_00002.png").unlink()
    write_blood_cells(tmp_path, "train", 2, seed=0)
    assert len(drawn) == 4
    write_blood_cells(tmp_path, "train", 2, seed=0, size=(64, 85))
    assert len(drawn) == 6


@pytest.mark.parametrize("content", ["{}", "[]", "not json", '{"info": {}}'])
def test_foreign_annotations_are_never_overwritten(tmp_path: Path, content: str) -> None:
    file = tmp_path / "instances_train.json"
    file.write_text(content)
    with pytest.raises(D2kdError, match=r"instances_train\.json was not written by"):
        write_blood_cells(tmp_path, "train", 1, seed=0)
    assert file.read_text() == content


@pytest.mark.parametrize("wrong", [{"num_images": 0}, {"seed": -1}, {"size": (16, 170)}])
def test_generator_rejects_parameters_out_of_range(tmp_path: Path, wrong: Dict[str, Any]) -> None:
    with pytest.raises(D2kdError, match="cannot generate"):
        write_blood_cells(**{"root": tmp_path, "split": "train", "num_images": 1, "seed": 0, **wrong})


@pytest.fixture
def name() -> Any:
    name = f"test_data_{uuid.uuid4().hex}"
    yield name
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)


def test_register_is_lazy_and_idempotent(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    register_coco(name, "later.json", "images")
    register_coco(name, tmp_path / "later.json", tmp_path / "images")
    with pytest.raises(FileNotFoundError):
        DatasetCatalog.get(name)


def test_registered_set_loads(name: str, smears: Path) -> None:
    register_coco(name, smears / "instances_train.json", smears / "images")
    entries = DatasetCatalog.get(name)
    assert len(entries) == NUM_IMAGES
    assert {box["category_id"] for entry in entries for box in entry["annotations"]} == {0, 1, 2}


@pytest.mark.parametrize("files", [("other.json", "images"), ("a.json", "other")])
def test_register_conflict(name: str, files: List[str]) -> None:
    register_coco(name, "a.json", "images")
    with pytest.raises(D2kdError, match=f"'{name}' is already used for .*a.json .* choose another name for {files[0]}"):
        register_coco(name, *files)


def test_register_does_not_take_over_foreign_names(name: str) -> None:
    DatasetCatalog.register(name, list)
    with pytest.raises(D2kdError, match="is already used for another data set"):
        register_coco(name, "a.json", "images")


def test_register_builtin() -> None:
    register_builtin(dataset_root())
    expected = {"blood_cells_train", "blood_cells_val", "bccd_train", "bccd_val", "bccd_test"}
    assert expected <= set(DatasetCatalog.list())


def test_dataset_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    assert dataset_root() == Path("datasets")
    monkeypatch.setenv("DETECTRON2_DATASETS", "~/data")
    assert dataset_root() == Path.home() / "data"


def tiny_coco() -> Dict[str, Any]:
    return {
        "images": [{"id": 7, "file_name": "a_7.jpg", "width": 20, "height": 10}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0}],
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASS_NAMES, 1)],
    }


def write_tiny_coco(root: Path, content: Any) -> Path:
    (root / "images").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 10)).save(root / "images" / "a_7.jpg")
    (root / "a.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return root / "a.json"


def test_check_coco_accepts_a_valid_set(tmp_path: Path) -> None:
    check_coco(write_tiny_coco(tmp_path, tiny_coco()), tmp_path / "images")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: "{", r"a\.json is not a JSON file \(.*line 1 column 2.*\); use"),
        (lambda content: [1], r"a\.json has no list 'images'; use"),
        (lambda content: content.pop("images"), r"a\.json has no list 'images'; use"),
        (lambda content: content.pop("annotations"), r"a\.json has no list 'annotations'; use"),
        (lambda content: content.pop("categories"), r"a\.json has no list 'categories'; use"),
        (lambda content: content["images"].clear(), r"list 'images' of .*a\.json is empty; use"),
        (lambda content: content["annotations"].clear(), r"list 'annotations' of .*a\.json is empty; use"),
        (
            lambda content: content["annotations"][0].update(category_id=9),
            r"a\.json: annotations\[0\] \(id 1\) has category_id 9; set it to an id from 'categories'",
        ),
        (
            lambda content: content["annotations"][0].update(image_id=8),
            r"a\.json: annotations\[0\] \(id 1\) has image_id 8; set it to an id from 'images'",
        ),
        (
            lambda content: content["images"][0].update(file_name="b.jpg"),
            r"1 of 1 images named in .*a\.json are not in .*images, such as 'b\.jpg'; put",
        ),
    ],
)
def test_check_coco_names_file_and_fix(tmp_path: Path, damage: Callable[[Any], Any], message: str) -> None:
    content = tiny_coco()
    replacement = damage(content)
    broken = replacement if replacement in ("{", [1]) else content
    with pytest.raises(D2kdError, match=message):
        check_coco(write_tiny_coco(tmp_path, broken), tmp_path / "images")


def test_check_coco_names_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(D2kdError, match=r"annotation file .*none\.json .*; put the data set there or set DETECTRON2"):
        check_coco(tmp_path / "none.json", tmp_path)
    file = write_tiny_coco(tmp_path, tiny_coco())
    with pytest.raises(D2kdError, match=r"image folder .*nowhere of .*a\.json does not exist; put"):
        check_coco(file, tmp_path / "nowhere")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_bccd", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def voc_object(name: str, *corners: int) -> str:
    tags = "".join(f"<{tag}>{value}</{tag}>" for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), corners))
    return f"<object><name>{name}</name><bndbox>{tags}</bndbox></object>"


def write_voc(source: Path) -> Path:
    voc = source / "BCCD"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (voc / folder).mkdir(parents=True)
    objects = {
        "train": voc_object("RBC", 1, 1, 20, 10) + voc_object("RBC", 5, 5, 5, 5) + voc_object("Platelets", 4, 3, 6, 8),
        "val": voc_object("WBC", 2, 2, 11, 9),
        "test": voc_object("RBC", 2, 3, 3, 4),
    }
    for number, (split, body) in enumerate(objects.items(), 7):
        stem = f"BloodImage_{number:05d}"
        size = "<size><width>20</width><height>10</height><depth>3</depth></size>"
        (voc / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{size}{body}</annotation>")
        (voc / "ImageSets" / "Main" / f"{split}.txt").write_text(f"{stem}\n")
        Image.new("RGB", (20, 10)).save(voc / "JPEGImages" / f"{stem}.jpg")
    (source / "LICENSE").write_text("MIT")
    return source


@pytest.mark.parametrize("below", [".", "BCCD"])
def test_prepare_from_voc(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture, below: str) -> None:
    """VOC's corners count from 1 and are inclusive.

    The box 1, 1, 20, 10 is the whole image of 20 x 10 pixels: x 1 - 1 = 0, y 0, width 20 - 1 + 1 = 20, height 10. The
    box 4, 3, 6, 8 covers the columns 4, 5, 6 and the rows 3 to 8: x 3, y 2, width 3, height 6. The box 5, 5, 5, 5 is
    one of the marks without area and is dropped.
    """
    output = tmp_path / "out"
    assert script.main([str(write_voc(tmp_path / "source") / below), "--output", str(output)]) == 0
    for split in ("train", "val", "test"):
        check_coco(output / f"instances_{split}.json", output / "images")
    content = json.loads((output / "instances_train.json").read_text())
    assert content["images"] == [{"id": 7, "file_name": "BloodImage_00007.jpg", "width": 20, "height": 10}]
    found = [(a["id"], a["image_id"], a["category_id"], a["bbox"], a["area"]) for a in content["annotations"]]
    assert found == [(1, 7, 1, [0, 0, 20, 10], 200), (2, 7, 3, [3, 2, 3, 6], 18)]
    printed = capsys.readouterr().out
    assert printed.splitlines()[1].split() == ["train", "1", "1", "0", "1", "2"]
    assert "dropped BloodImage_00007: RBC box without area [5, 5, 5, 5]" in printed
    assert printed.rstrip().endswith("make demo DATA=bccd")
    assert (output / "LICENSE").is_file() == (below == ".")


@pytest.mark.parametrize("link", [False, True])
def test_prepare_from_coco(script: ModuleType, tmp_path: Path, link: bool) -> None:
    source, output = tmp_path / "source", tmp_path / "out"
    file = write_tiny_coco(source, tiny_coco())
    for split in ("train", "val", "test"):
        (source / f"instances_{split}.json").write_text(file.read_text())
    arguments = [str(source), "--output", str(output)] + ["--link"] * link
    assert script.main(arguments) == 0
    assert script.main(arguments) == 0
    assert json.loads((output / "instances_test.json").read_text()) == tiny_coco()
    assert (output / "images" / "a_7.jpg").is_symlink() == link
    assert (output / "images" / "a_7.jpg").read_bytes() == (source / "images" / "a_7.jpg").read_bytes()
    assert not list(output.rglob("*.tmp"))


def damage_class(source: Path) -> None:
    file = source / "BCCD" / "Annotations" / "BloodImage_00008.xml"
    file.write_text(file.read_text().replace("WBC", "XBC"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda source: (source / "BCCD" / "Annotations").rename(source / "gone"), "neither BCCD/JPEGImages"),
        (lambda source: (source / "BCCD/ImageSets/Main/val.txt").unlink(), "val.txt"),
        (lambda source: (source / "BCCD/Annotations/BloodImage_00009.xml").unlink(), "BloodImage_00009.xml"),
        (lambda source: (source / "BCCD/Annotations/BloodImage_00009.xml").write_text("<"), "BloodImage_00009.xml"),
        (lambda source: (source / "BCCD/JPEGImages/BloodImage_00009.jpg").unlink(), "BloodImage_00009.jpg"),
        (damage_class, "unknown class 'XBC'"),
    ],
)
def test_prepare_errors_are_one_line_and_write_nothing(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture, damage: Callable[[Path], Any], message: str
) -> None:
    damage(write_voc(tmp_path / "source"))
    assert script.main([str(tmp_path / "source"), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()


def test_prepare_refuses_to_write_into_its_source(script: ModuleType, tmp_path: Path) -> None:
    source = write_voc(tmp_path / "source")
    before = hashes(source)
    assert script.main([str(source), "--output", str(source)]) == 2
    assert hashes(source) == before
