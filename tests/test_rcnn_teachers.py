"""Teachers that are no dense detectors: R-CNNs and ViTDet, whose pyramid teaches features."""

import re

import pytest
import torch
from detectron2 import model_zoo
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from small import CONFIGS, batch, build, distill_config, gradients, save_teacher, step

from d2kd.config import load_config
from d2kd.diagnose.dry_run import dry_run
from d2kd.diagnose.preflight import judge, look, shuffle_parts
from d2kd.diagnose.sample import Sample, at_scale
from d2kd.errors import D2kdError
from d2kd.levels import LevelPair, pair_levels
from d2kd.methods import PKD, FitNet
from d2kd.methods.base import channel_statistics
from d2kd.teacher import Teacher, load_teacher

FASTER = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
SMALL = (
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.BACKBONE.NAME", "build_extra_fpn_backbone"),
    *("MODEL.FPN.EXTRA.NUM_LEVELS", "1", "MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.STEM_OUT_CHANNELS", "4"),
    *("MODEL.RESNETS.BLOCKS", "(1, 1, 1, 1)", "MODEL.FPN.OUT_CHANNELS", "32", "MODEL.ROI_BOX_HEAD.FC_DIM", "16"),
    *("MODEL.ROI_HEADS.NUM_CLASSES", "3", "MODEL.PIXEL_STD", "[57.375, 57.12, 58.395]"),
)
STOCK = {
    "faster": (FASTER, ()),
    "mask": ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", ()),
    "cascade": ("Misc/cascade_mask_rcnn_R_50_FPN_3x.yaml", ()),
    "panoptic": ("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml", ()),
}


def rcnn_file(folder, kind="faster", seed=0):
    """Random weights of a stock config with a small backbone."""
    torch.manual_seed(seed)
    config, opts = STOCK[kind]
    path = folder / f"{kind}.pth"
    torch.save({"model": build_model(load_config(config, [*SMALL, *opts])).state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    return rcnn_file(tmp_path_factory.mktemp("teacher"))


def make(file, *opts, methods=("PKD",), kind="faster"):
    config, teacher_opts = STOCK[kind]
    opts = ["MODEL.DISTILL.TEACHER.CONFIG_FILE", config, *opts]
    return build(distill_config(file, *opts, methods=methods, teacher_opts=[*SMALL, *teacher_opts]))


def pkd(own, theirs):
    """PKD of one pair of maps."""
    own, theirs = ((x - mean) / (std + 1e-6) for x in (own, theirs) for mean, std in [channel_statistics(x)])
    return (own - theirs).square().mean() / 2


@pytest.mark.parametrize("kind", STOCK)
@pytest.mark.slow
def test_stock_configs_teach_features(tmp_path, kind):
    """Levels pair by stride: the teacher's P2 has no partner."""
    student = make(rcnn_file(tmp_path, kind), kind=kind)
    inputs = batch()
    losses = step(student, inputs)
    teacher = student.teacher.detector
    images = teacher.preprocess_image(inputs).tensor
    own, theirs = student.backbone(images), teacher.backbone(images)
    expected = 6 * sum(pkd(own[f"p{i}"], theirs[f"p{i}"]) for i in (3, 4, 5, 6))
    torch.testing.assert_close(losses["loss_pkd_feature"], expected)
    assert student.level_pairs == [LevelPair(i, i + 1, 1.0) for i in range(4)]
    assert not [name for name in student.state_dict() if "roi_heads" in name]


@pytest.mark.parametrize("method", ["PKD", "FGD", "MGD", "CWD", "FitNet"])
def test_all_feature_methods_learn_from_an_rcnn(teacher_file, method):
    student = make(teacher_file, "MODEL.FPN.OUT_CHANNELS", "64", methods=[method])
    grads = gradients(student, {k: v for k, v in step(student, batch()).items() if method.lower() in k})
    assert any(grad.abs().max() > 0 for name, grad in grads.items() if name.startswith("backbone."))
    assert all(f"distill.{method.lower()}.adapters.{i}.weight" in grads for i in range(4))


@pytest.mark.parametrize("method", ["CrossKD", "ResponseKD", "LD"])
def test_methods_that_need_a_head_say_so(teacher_file, method):
    with pytest.raises(D2kdError, match=f"{method} needs the head of a dense detector .* is a GeneralizedRCNN; use"):
        make(teacher_file, methods=[method, "PKD"])


def test_the_region_that_reads_scores_needs_a_head(teacher_file):
    with pytest.raises(D2kdError, match="FitNet needs the head of a dense"):
        make(teacher_file, "MODEL.DISTILL.FITNET.REGION", "gibox", methods=["FitNet"])


@pytest.mark.slow
def test_a_level_without_a_partner_is_left_out(teacher_file, caplog):
    """The student's P7, and its region in FitNet."""
    five = ["MODEL.FPN.EXTRA.NUM_LEVELS", "2", "MODEL.RETINANET.IN_FEATURES", "['p3','p4','p5','p6','p7']"]
    five += ["MODEL.ANCHOR_GENERATOR.SIZES", "[[16],[32],[64],[128],[256]]"]
    opts = [*five, "MODEL.DISTILL.FITNET.REGION", "boxes"]
    student = make(teacher_file, *opts, methods=["PKD", "FitNet"])
    assert len(student.distill["pkd"].adapters) == 4
    losses = step(student, batch())
    assert all(losses[name] > 0 for name in ("loss_pkd_feature", "loss_fitnet_feature"))
    text = dry_run(student, batch(), (128, 256))
    for words in (r"p3 / p3\s+8 / 8\s+32 / 32\s+3 / -", r"p7 / none\s+128 / none", r"RetinaNet\s+GeneralizedRCNN"):
        assert re.search(words, text), text
    assert re.search(r"classes\s+3\s+3", text)


@pytest.mark.slow
def test_levels_pair_levels_by_name_and_pkd_resizes(teacher_file):
    """As PKD's authors pair P3 to P6 of a student with P2 to P5 of a Mask R-CNN."""
    student = make(teacher_file, "MODEL.DISTILL.LEVELS", "('p3:p2', 'p5')")
    assert student.level_pairs == [LevelPair(0, 0, 2.0), LevelPair(2, 3, 1.0)]
    inputs = batch()
    losses = step(student, inputs)
    images = student.preprocess_image(inputs).tensor
    own, theirs = student.backbone(images), student.teacher.detector.backbone(images)
    p3 = torch.nn.functional.interpolate(own["p3"], scale_factor=2, mode="bilinear")
    expected = 6 * (pkd(p3, theirs["p2"]) + pkd(own["p5"], theirs["p5"]))
    torch.testing.assert_close(losses["loss_pkd_feature"], expected)
    assert re.search(r"p3 / p2\s+8 / 4", dry_run(student, inputs, (128, 256)))


@pytest.mark.parametrize(
    ("levels", "methods", "message"),
    [
        ("('p3:p9',)", ["PKD"], "MODEL.DISTILL.LEVELS, a level of the teacher, is 'p9'; use one of p2, p3"),
        ("('p2:p3',)", ["PKD"], "a level of the student, is 'p2'"),
        ("('p3:p2',)", ["MGD"], r"strides \[8\] with levels of strides \[4.0\]; .* such as PKD"),
    ],
)
def test_wrong_levels_are_refused(teacher_file, levels, methods, message):
    with pytest.raises(D2kdError, match=message):
        make(teacher_file, "MODEL.DISTILL.LEVELS", levels, methods=methods)


def test_levels_and_features_exclude_each_other(teacher_file):
    features = ["MODEL.DISTILL.FEATURES", "('backbone.bottom_up.res4',)"]
    assert step(make(teacher_file, *features), batch())["loss_pkd_feature"] > 0
    with pytest.raises(D2kdError, match=r"FEATURES replaces MODEL\.DISTILL\.LEVELS"):
        make(teacher_file, *features, "MODEL.DISTILL.LEVELS", "('p3',)")


@pytest.mark.slow
def test_levels_between_dense_detectors(tmp_path):
    """By default two dense detectors must have the same levels; LEVELS pairs others, and head methods read all."""
    file = save_teacher(tmp_path / "dense.pth")
    student = build(distill_config(file, "MODEL.DISTILL.LEVELS", "('p4', 'p5')", methods=["CrossKD", "PKD"]))
    alone = build(distill_config(file, methods=["CrossKD", "PKD"]))
    losses, other = step(student, batch()), step(alone, batch())
    torch.testing.assert_close(losses["loss_crosskd_cls"], other["loss_crosskd_cls"])
    assert losses["loss_pkd_feature"] < other["loss_pkd_feature"]


def test_class_map_takes_the_classes_of_an_rcnn(teacher_file):
    student = make(teacher_file, "MODEL.DISTILL.CLASS_MAP", "((0, 2),)")
    assert student.shared_classes == ([0], [2])
    with pytest.raises(D2kdError, match="the teacher has classes 0 to 2, not 3"):
        make(teacher_file, "MODEL.DISTILL.CLASS_MAP", "((0, 3),)")


def test_a_teacher_needs_a_pyramid(tmp_path):
    with pytest.raises(D2kdError, match="ProposalNetwork has no preprocess_image; give it"):
        load_teacher("COCO-Detection/rpn_R_50_FPN_1x.yaml", "", [*SMALL], when_needed=True)


@pytest.fixture(scope="module")
def vitdet():
    """detectron2's stock ViTDet, tiny: it pads to a square."""
    pytest.importorskip("timm", reason="detectron2's ViT needs timm")
    from detectron2.config import instantiate

    model = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
    net = model.backbone.net
    net.img_size, net.embed_dim, net.depth, net.num_heads, net.drop_path_rate = 128, 16, 2, 2, 0.0
    net.window_block_indexes = [0]
    model.backbone.out_channels, model.backbone.square_pad = 32, 160
    model.roi_heads.num_classes = 3
    model.roi_heads.box_head.fc_dims, model.roi_heads.box_head.conv_dims = [8], [8]
    model.roi_heads.mask_head.conv_dims = [8, 8]
    torch.manual_seed(0)
    return instantiate(model)


def test_vitdet_pads_to_a_square_and_its_maps_are_cropped(vitdet):
    """The student's batch is 96x128, the teacher's 160x160; both show the images from the same corner."""
    from d2kd import distill

    plain = build_model(load_config(str(CONFIGS / "quick_retinanet.yaml"))).train()
    student = distill(plain, Teacher(vitdet, "BGR"), [PKD(), FitNet()])
    observation = student.observe(batch())
    assert [x.shape[-2:] for x in observation.student.maps] == [x.shape[-2:] for x in observation.teacher.maps]
    whole = vitdet.backbone(vitdet.preprocess_image(batch()).tensor)
    assert whole["p3"].shape[-2:] == (20, 20)
    torch.testing.assert_close(observation.teacher.maps[0], whole["p3"][..., :12, :16])
    with pytest.raises(D2kdError, match=r"pads images to 160x160 .* an image of 192; lower INPUT.MAX_SIZE_TRAIN"):
        student.observe(batch(sizes=[(96, 192)]))


# Scale


@pytest.mark.slow
def test_scale_pairs_levels_in_the_students_pixels(teacher_file):
    """A teacher at twice the size: its P4 lies where the student's P3 lies."""
    student = make(teacher_file, "MODEL.DISTILL.TEACHER.SCALE", "2.0")
    assert student.level_pairs == [LevelPair(i, i + 2, 1.0) for i in range(3)]
    inputs = batch(sizes=[(90, 125), (64, 64)])
    observation = student.observe(inputs)
    teacher = student.teacher.detector
    doubled = torch.zeros(2, 3, 192, 256)
    for place, x in zip(doubled, inputs):
        larger = torch.nn.functional.interpolate(x["image"][None].float(), scale_factor=2, mode="bilinear")[0]
        place[:, : larger.shape[1], : larger.shape[2]] = (larger - teacher.pixel_mean) / teacher.pixel_std
    expected = teacher.backbone(doubled)
    for found, name, own in zip(observation.teacher.maps, ("p4", "p5", "p6"), observation.student.maps):
        torch.testing.assert_close(found, expected[name])
        assert found.shape[-2:] == own.shape[-2:]
    assert step(student, inputs)["loss_pkd_feature"] > 0
    assert re.search(r"p3 / p4\s+8 / 8", dry_run(student, inputs, (128, 256)))


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["0.5", "2.0", "4.0"])
@pytest.mark.parametrize("method", ["FGD", "MGD", "CWD", "FitNet"])
def test_maps_of_a_scaled_teacher_have_the_students_sizes(teacher_file, method, scale):
    """Methods that do not resize run on any image: with 0.5, the teacher pads further than the student."""
    student = make(teacher_file, "MODEL.DISTILL.TEACHER.SCALE", scale, methods=[method])
    assert all(value.isfinite() for value in step(student, batch(sizes=[(100, 225), (33, 64)])).values())


def test_scales_without_equal_strides_need_levels_and_a_method_that_resizes(teacher_file):
    scale = ["MODEL.DISTILL.TEACHER.SCALE", "1.5"]
    with pytest.raises(D2kdError, match=r"so none is paired; name pairs in MODEL\.DISTILL\.LEVELS"):
        make(teacher_file, *scale)
    student = make(teacher_file, *scale, "MODEL.DISTILL.LEVELS", "('p3:p3', 'p4:p5')")
    assert [pair.ratio for pair in student.level_pairs] == pytest.approx([1.5, 0.75])
    assert step(student, batch(sizes=[(90, 125)]))["loss_pkd_feature"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["CrossKD", "ResponseKD", "LD"])
def test_methods_that_read_heads_refuse_a_scaled_teacher(tmp_path, method):
    file = save_teacher(tmp_path / "dense.pth")
    scaled = ["MODEL.DISTILL.TEACHER.SCALE", "2.0"]
    with pytest.raises(D2kdError, match=f"{method} compares predictions of equal levels, but at .*SCALE 2 "):
        build(distill_config(file, *scaled, methods=[method]))
    student = build(distill_config(file, *scaled, methods=["PKD"]))
    assert len(student.level_pairs) == 3
    assert step(student, batch())["loss_pkd_feature"] > 0


def test_scale_1_is_the_path_without_it(teacher_file):
    plain, one = make(teacher_file), make(teacher_file, "MODEL.DISTILL.TEACHER.SCALE", "1.0")
    assert torch.equal(step(plain, batch())["loss_pkd_feature"], step(one, batch())["loss_pkd_feature"])


def test_pairs_by_stride_by_hand():
    class Pyramid:
        def __init__(self, **strides):
            from types import SimpleNamespace

            from detectron2.layers import ShapeSpec

            shapes = {name: ShapeSpec(channels=8, stride=stride) for name, stride in strides.items()}
            self.backbone = SimpleNamespace(output_shape=lambda: shapes)

    student, teacher = Pyramid(p3=8, p4=16, p5=32), Pyramid(p5=32, p2=4, p3=8)
    assert pair_levels(student, teacher) == [LevelPair(0, 1, 1.0), LevelPair(2, 2, 1.0)]
    assert pair_levels(student, teacher, scale=0.5) == [LevelPair(0, 0, 1.0), LevelPair(1, 1, 1.0)]
    assert pair_levels(student, Pyramid(p1=2)) == []


# The pre-flight


class Finder(torch.nn.Module):
    """Stands for a trained R-CNN: finds the boxes of images as it was trained on, if its weights are in order."""

    num_classes = 3

    def __init__(self, images):
        super().__init__()
        self.backbone = torch.nn.Linear(16, 1, bias=False)
        self.backbone.weight.data = torch.arange(16.0)[None]
        self.register_buffer("pixel_mean", torch.tensor([103.53, 116.28, 123.675]).view(-1, 1, 1))
        self.register_buffer("pixel_std", torch.ones(3, 1, 1))
        self.known = [(self.look(x["image"]), x["instances"]) for x in images]

    def look(self, image):
        return ((image - self.pixel_mean) / self.pixel_std).mean((1, 2))

    def forward(self, inputs):
        seen = self.look(inputs[0]["image"])
        truth = next((truth for look, truth in self.known if torch.allclose(look, seen)), None)
        found = Instances(tuple(inputs[0]["image"].shape[-2:]))
        is_sound = truth is not None and torch.equal(self.backbone.weight.data, torch.arange(16.0)[None])
        found.pred_boxes = truth.gt_boxes if is_sound else Boxes(torch.tensor([[0.0, 0.0, 2.0, 2.0]]))
        found.pred_classes = (truth.gt_classes if is_sound else torch.zeros(1, dtype=torch.long)) + 0
        found.scores = torch.ones(len(found.pred_classes))
        return [{"instances": found}]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("input_format", "std", "change", "message"),
    [
        ("BGR", 1.0, 0.0, None),
        ("RGB", 1.0, 0.0, "expect BGR and gets RGB"),
        ("BGR", 57.0, 0.0, r"expect pixels of another scale: .*MODEL.PIXEL_STD \[1.0, 1.0, 1.0\]"),
        ("BGR", 1.0, 1.0, "no better .* with all weights shuffled"),
    ],
    ids=["sound", "RGB", "scale", "random"],
)
def test_the_preflight_judges_detections(input_format, std, change, message):
    images = batch(sizes=[(96, 128), (80, 112), (64, 64)])
    for i, image in enumerate(images):  # in other colors each, and not the same in all channels
        image["image"] = (image["image"] // 2 + torch.tensor([10, 60, 100]).view(-1, 1, 1) + 5 * i).to(torch.uint8)
    detector = Finder(images)
    detector.pixel_std *= std
    detector.backbone.weight.data += change
    teacher = Teacher(detector, input_format)
    sample = Sample(images, "BGR", range(3), range(3))
    ways = look(sample, teacher)
    configured, parts = ways[0], shuffle_parts(sample, ways[0])
    assert (configured.ap50 < 10) == (message is not None)
    if message is None:
        assert configured.losses.tolist() == pytest.approx([0, 0, 0], abs=1e-6)
        judge(ways, parts, class_is_read=False)
    else:
        with pytest.raises(D2kdError, match=message):
            judge(ways, parts, class_is_read=False)


def test_the_preflight_sees_images_at_the_teachers_scale():
    images = batch(sizes=[(96, 128)])
    (seen,) = at_scale(images, 2.0)
    assert seen["image"].shape == (3, 192, 256)
    assert seen["instances"].image_size == (192, 256)
    assert torch.equal(seen["instances"].gt_boxes.tensor, 2 * images[0]["instances"].gt_boxes.tensor)
