"""Own data named on the command line: each layout, both config styles, all detectors, splits, resuming, mistakes."""

import json
import pickle
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog
from omegaconf import OmegaConf
from PIL import Image
from small import CONFIGS, save_teacher

from d2kd.config import load_config
from d2kd.data.coco import check_coco
from d2kd.data.own import prepare_own_data
from d2kd.engine import main
from d2kd.engine.main import parser
from d2kd.engine.styles import load_recipe
from d2kd.errors import D2kdError
from d2kd.experiments.pictures import read_metrics

QUICK = str(CONFIGS / "quick_crosskd_retinanet.yaml")
LAZY = str(CONFIGS / "lazy" / "quick_crosskd_retinanet.py")
CLASSES = ["ant", "bee"]
SIZE = (160, 128)
BOXES = [[8.0, 16.0, 40.0, 32.0], [80.0, 40.0, 64.0, 48.0]]  # x, y, width, height


@pytest.fixture
def coco(tmp_path):
    """Ten images with a box of each of two classes, and an eleventh without boxes: "ann.json:images"."""
    content = {"images": [], "annotations": [], "categories": [{"id": 5 + i, "name": x} for i, x in enumerate(CLASSES)]}
    (tmp_path / "images").mkdir()
    for number in range(11):
        image = {"id": number, "file_name": f"{number}.png", "width": SIZE[0], "height": SIZE[1]}
        Image.new("RGB", SIZE, (20 * number, 90, 60)).save(tmp_path / "images" / image["file_name"])
        content["images"].append(image)
        for category, box in enumerate(BOXES if number < 10 else []):
            entry = {"id": len(content["annotations"]) + 1, "image_id": number, "category_id": 5 + category}
            content["annotations"].append({**entry, "bbox": box, "area": box[2] * box[3], "iscrowd": 0})
    (tmp_path / "ann.json").write_text(json.dumps(content))
    return f"{tmp_path}/ann.json:{tmp_path}/images"


def recipe(config, *args, data=(), opts=()):
    """The recipe of a command line with own data, and its arguments."""
    options = [word for text in data for word in ("--train-data", text)]
    parsed = parser().parse_args(["--config-file", str(config), *options, *args, *map(str, opts)])
    return load_recipe(parsed), parsed


def output(config, folder):
    return [f"train.output_dir={folder}"] if str(config).endswith(".py") else ["OUTPUT_DIR", folder]


@pytest.mark.slow
@pytest.mark.parametrize("detector", ["retinanet", "gfl", "atss", "fcos"])
@pytest.mark.parametrize("style", ["yaml", "lazy"])
def test_classes_of_student_and_teacher_come_from_the_file(coco, tmp_path, detector, style):
    folder, suffix = (CONFIGS / "lazy", "py") if style == "lazy" else (CONFIGS, "yaml")
    config = folder / f"crosskd_{detector}_R18.{suffix}"
    made, args = recipe(config, "--val-data", coco, data=[coco], opts=output(config, tmp_path / "run"))
    assert made.num_classes[1] == 2
    assert (list(made.train_sets), list(made.test_sets)) == (["own_train"], ["own_val"])
    opts = made.get("MODEL.DISTILL.TEACHER.OPTS")
    assert load_config(f"{CONFIGS}/{detector}_R50.yaml", opts).MODEL[detector.upper()].NUM_CLASSES == 2
    assert args.data.classes == tuple(CLASSES)
    assert "2 classes (ant, bee) for student and teacher" in args.data.remark()[1]
    if style == "lazy":
        assert OmegaConf.to_container(made.config.model.head)["num_classes"] == "${..num_classes}"


@pytest.mark.slow
def test_a_teacher_with_a_map_of_classes_or_own_overrides_keeps_its_classes(coco, tmp_path):
    opts = [*output(QUICK, tmp_path), "MODEL.DISTILL.CLASS_MAP", "(('ant','RBC'),)"]
    assert recipe(QUICK, data=[coco], opts=opts)[0].get("MODEL.DISTILL.TEACHER.OPTS") == []
    own = "['MODEL.RETINANET.NUM_CLASSES', '7']"
    opts = [*output(QUICK, tmp_path), "MODEL.DISTILL.TEACHER.OPTS", own]
    found = recipe(QUICK, data=[coco], opts=opts)[0].get("MODEL.DISTILL.TEACHER.OPTS")
    assert load_config(f"{CONFIGS}/quick_retinanet.yaml", found).MODEL.RETINANET.NUM_CLASSES == 7
    lazy = recipe(LAZY, data=[coco], opts=[*output(LAZY, tmp_path), "model.class_map=[[ant,RBC]]"])[0]
    assert "model.teacher.opts" not in lazy.values


def test_a_lazy_config_without_evaluation(coco, tmp_path):
    made, args = recipe(LAZY, data=[coco], opts=output(LAZY, tmp_path))
    assert list(made.test_sets) == []
    assert "nothing is evaluated" in args.data.remark()[1]


@pytest.mark.slow
@pytest.mark.parametrize("config", [QUICK, LAZY])
def test_train_resume_and_evaluate(coco, tmp_path, config, capfd):
    """The split is the same each time, another one is refused, and dry run and evaluation know the data."""
    teacher = save_teacher(tmp_path / "teacher.pth", "MODEL.RETINANET.NUM_CLASSES", 2)
    run = tmp_path / "run"
    lazy = config == LAZY
    settings = [f"model.teacher.weights={teacher}"] if lazy else ["MODEL.DISTILL.TEACHER.WEIGHTS", str(teacher)]
    settings += ["model.test_score_thresh=0.0"] if lazy else ["MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"]
    settings += map(str, output(config, run))
    base = ["--config-file", config, "--train-data", coco]

    def length(iterations):
        if not lazy:
            return ["SOLVER.MAX_ITER", str(iterations)]
        return [f"train.max_iter={iterations}", f"train.eval_period={iterations}"]

    assert main([*base, "--val-split", "0.3", "--dry-run", *settings]) == 0
    assert "Own data: " in capfd.readouterr().out
    assert not run.exists()
    assert main([*base, "--val-split", "0.3", *settings, *length(2)]) == 0
    parts = [json.loads((run / "data" / f"own_{split}.json").read_text())["images"] for split in ("train", "val")]
    assert [len(part) for part in parts] == [8, 3]
    assert "bbox/AP-bee" in set().union(*read_metrics(run))
    allowed = ["--resume", "--allow-config-change"]
    assert main([*base, "--val-split", "0.3", *allowed, *settings, *length(3)]) == 0
    assert [json.loads((run / "data" / f"own_{x}.json").read_text())["images"] for x in ("train", "val")] == parts
    capfd.readouterr()
    assert main([*base, "--val-split", "0.5", "--resume", *settings, *length(3)]) == 2
    assert "--train-data was ['own_train.json (SHA-256 " in capfd.readouterr().err
    weights = [f"train.init_checkpoint={run}/model_final.pth"] if lazy else ["MODEL.WEIGHTS", f"{run}/model_final.pth"]
    evaluation = ["--config-file", config, "--eval-only", "--val-data", coco, *settings, *weights]
    assert main(evaluation) == 0
    assert (run / "inference" / "own_val" / "coco_instances_results.json").stat().st_size > 2


def test_processes_that_are_started_register_the_data_without_reading_them_again(coco, tmp_path):
    _, args = recipe(QUICK, "--val-split", "0.2", data=[coco], opts=output(QUICK, tmp_path / "run"))
    Path(coco.rpartition(":")[0]).unlink()
    args = pickle.loads(pickle.dumps(args))
    for name in ("own_train", "own_val"):
        DatasetCatalog.remove(name)
    assert list(load_recipe(args).train_sets) == ["own_train"]
    assert (len(DatasetCatalog.get("own_train")), len(DatasetCatalog.get("own_val"))) == (9, 2)


def yolo(coco, folder):
    """The same data set in YOLO's layout."""
    images = Path(coco.rpartition(":")[2])
    (folder / "train").mkdir(parents=True)
    (folder / "train" / "images").symlink_to(images)
    (folder / "train" / "labels").mkdir()
    for number in range(10):
        lines = []
        for category, (x, y, width, height) in enumerate(BOXES):
            numbers = ((x + width / 2) / SIZE[0], (y + height / 2) / SIZE[1], width / SIZE[0], height / SIZE[1])
            lines.append(" ".join(map(str, (category, *numbers))))
        (folder / "train" / "labels" / f"{number}.txt").write_text("\n".join(lines) + "\n")
    (folder / "data.yaml").write_text(f"train: ../train/images\nval: train/images\nnames: {CLASSES}\n")
    return folder


def voc(coco, folder):
    """The same data set in Pascal VOC's layout, where pixels count from 1."""
    for name in ("Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    (folder / "JPEGImages").symlink_to(coco.rpartition(":")[2])
    for number in range(11):
        objects = [
            f"<object><name>{name}</name><difficult>0</difficult><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin>"
            f"<xmax>{x + width}</xmax><ymax>{y + height}</ymax></bndbox></object>"
            for name, (x, y, width, height) in zip(CLASSES, BOXES if number < 10 else [])
        ]
        size = f"<size><width>{SIZE[0]}</width><height>{SIZE[1]}</height></size>"
        (folder / "Annotations" / f"{number}.xml").write_text(f"<annotation>{size}{''.join(objects)}</annotation>")
    for split in ("train", "val"):
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(map(str, range(11))))
    return folder


def boxes_by_image(file):
    content = json.loads(Path(file).read_text())
    names = {x["id"]: x["name"] for x in content["categories"]}
    found = {Path(x["file_name"]).stem: [] for x in content["images"]}
    stems = {x["id"]: Path(x["file_name"]).stem for x in content["images"]}
    for entry in content["annotations"]:
        found[stems[entry["image_id"]]].append((names[entry["category_id"]], entry["bbox"]))
    return found


@pytest.mark.parametrize("layout", [yolo, voc])
def test_other_layouts_give_the_same_boxes(coco, tmp_path, layout):
    folder = layout(coco, tmp_path / "other")
    data = prepare_own_data([str(folder)], [], 0.0, tmp_path / "written")
    for part in (*data.train, *data.val):
        check_coco(part.json_file, part.image_root)
        expected = boxes_by_image(coco.rpartition(":")[0])
        for stem, boxes in boxes_by_image(part.json_file).items():
            assert [name for name, _ in boxes] == [name for name, _ in expected[stem]]
            for (_, one), (_, other) in zip(boxes, expected[stem]):
                assert one == pytest.approx(other, abs=2e-3)
    assert (len(data.train), len(data.val)) == (1, 1)
    assert data.classes == tuple(CLASSES)


def test_a_polygon_is_read_as_its_box(coco, tmp_path):
    folder = yolo(coco, tmp_path / "other")
    (folder / "train" / "labels" / "0.txt").write_text("1 0.25 0.5 0.5 0.25 0.75 0.75\n")
    data = prepare_own_data([f"{folder}/data.yaml:train"], [], 0.0, tmp_path / "written")
    assert boxes_by_image(data.train[0].json_file)["0"] == [("bee", [40.0, 32.0, 80.0, 64.0])]


def test_a_split_follows_the_names_of_images_alone(coco, tmp_path):
    """More images, in another order, leave the drawn ones drawn; and images without boxes are divided separately."""
    file, _, images = coco.rpartition(":")
    drawn = []
    for reverse in (False, True):
        content = json.loads(Path(file).read_text())
        content["images"].sort(key=lambda image: image["id"], reverse=reverse)
        Path(file).write_text(json.dumps(content))
        data = prepare_own_data([f"{file}:{images}"], [], 0.2, tmp_path / str(reverse))
        drawn.append(boxes_by_image(data.val[0].json_file))
        assert not set(drawn[-1]) & set(boxes_by_image(data.train[0].json_file))
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 2
    assert all(drawn[0].values())


def test_several_sets(coco, tmp_path):
    made, _ = recipe(QUICK, "--val-data", coco, data=[coco, coco], opts=output(QUICK, tmp_path))
    assert list(made.train_sets) == ["own_train", "own_train_2"]
    assert all(name in DatasetCatalog for name in made.train_sets)


def test_mistakes_name_the_file_and_the_fix(coco, tmp_path):
    folder = yolo(coco, tmp_path / "yolo")
    labels = folder / "train" / "labels" / "3.txt"
    voc_folder = voc(coco, tmp_path / "voc")
    (tmp_path / "empty").mkdir()

    def message(train, val=(), split=0.0):
        with pytest.raises(D2kdError) as error:
            prepare_own_data(train, val, split, tmp_path / "written")
        return str(error.value)

    assert "gone.json does not exist; name a COCO file" in message([f"{tmp_path}/gone.json:images"])
    assert "is a folder of an unknown layout" in message([f"{tmp_path}/empty"])
    assert "--val-split is 1" in message([coco], split=1.0)
    assert "leave one out" in message([coco], [coco], 0.2)
    assert "no entry 'test'" in message([f"{folder}/data.yaml:test"])
    assert "has no ImageSets/Main/test.txt" in message([f"{voc_folder}:test"])
    for text, wrong in (("2 0.5 0.5 0.1 0.1", "there is no class 2"), ("0 64 64 9 9", "not between 0 and 1")):
        labels.write_text(text)
        assert f"{labels}, line 1: " in message([str(folder)])
        assert wrong in message([str(folder)])
    (voc_folder / "Annotations" / "3.xml").write_text("<annotation><object>")
    assert "3.xml is not an annotation" in message([str(voc_folder)])


@pytest.mark.slow
def test_a_teacher_of_other_classes_is_explained(coco, tmp_path, capfd):
    teacher = save_teacher(tmp_path / "teacher.pth")
    settings = ["MODEL.DISTILL.TEACHER.WEIGHTS", str(teacher), "OUTPUT_DIR", str(tmp_path / "run")]
    assert main(["--config-file", QUICK, "--train-data", coco, *settings]) == 2
    error = capfd.readouterr().err
    assert f"{teacher} does not fit the model" in error
    assert "the file holds a detector of 3 classes and the config has 2: train one on the same data" in error
    assert "MODEL.DISTILL.CLASS_MAP" in error


def test_only_evaluation_works_without_training_data(coco, tmp_path, capfd):
    assert main(["--config-file", QUICK, "--val-data", coco, "OUTPUT_DIR", str(tmp_path / "run")]) == 2
    assert "--eval-only" in capfd.readouterr().err
