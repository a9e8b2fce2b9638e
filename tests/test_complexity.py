"""What a detector costs: MACs are fvcore's, adapters and teacher do not count, latency is measured if asked for."""

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from small import build, distill_config, save_teacher, small_config
from torch import nn

from d2kd.complexity import count_macs, measure, num_parameters

SIZE = (96, 160)  # not a multiple of the stride of P6


class Network(nn.Module):
    def __init__(self, detector):
        super().__init__()
        self.detector = detector

    def forward(self, image):
        features = self.detector.backbone(image)
        return self.detector.head([features[name] for name in self.detector.head_in_features])


@pytest.mark.slow
def test_macs_are_those_of_fvcore():
    detector = build(small_config()).eval()
    analysis = FlopCountAnalysis(Network(detector), torch.zeros(1, 3, *SIZE)).unsupported_ops_warnings(False)
    assert count_macs(detector, SIZE) == analysis.by_operator()["conv"] > 1e7
    assert count_macs(detector, (90, 131)) == count_macs(detector, SIZE), "padded as the detector pads"


class OneConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)

    def forward(self, image):
        return {"p1": self.conv(image)}


def test_without_a_dense_head_the_backbone_counts():
    """16 x 32 outputs of 8 channels, each from 3 x 3 x 3 inputs."""
    detector = nn.Module()
    detector.backbone = OneConv()
    assert count_macs(detector, (32, 64)) == 16 * 32 * 8 * 27


def test_a_student_costs_what_its_detector_costs(tmp_path):
    teacher = save_teacher(tmp_path / "teacher.pth")
    student = build(distill_config(teacher, methods=("CrossKD", "MGD")))
    plain = build(small_config())
    assert any(name.startswith("distill.") for name, _ in student.named_parameters())
    assert student.training, "measuring leaves it as it is"
    assert measure(student, SIZE) == measure(plain, SIZE)
    assert student.training
    assert num_parameters(plain) == sum(p.numel() for p in plain.parameters())
    assert next(student.parameters()).device.type == "cpu"


def test_latency_only_if_asked_for():
    detector = build(small_config())
    assert measure(detector, SIZE).latency_ms is None
    assert measure(detector, SIZE, seconds=0.01).latency_ms > 0
