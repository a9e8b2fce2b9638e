"""Importing d2kd registers things and has no other effects."""

import subprocess
import sys

import pytest


def run(code: str) -> str:
    """Runs code in a fresh process; returns what it prints, errors included."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_warning_filters_backend_and_loggers_stay_as_they_are() -> None:
    run(
        """
import logging, os, warnings
warnings.simplefilter("ignore")
import detectron2.engine, detectron2.evaluation, detectron2.model_zoo, matplotlib, torch
os.environ.pop("MPLBACKEND", None)

def state():
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    loggers = [x for x in loggers if isinstance(x, logging.Logger) and (x.handlers or x.filters)]
    handlers = [(x.name, x.handlers, x.filters) for x in loggers]
    backend = matplotlib.rcParams._get_backend_or_none()
    return list(warnings.filters), backend, handlers, dict(os.environ), torch.get_rng_state().tolist()

before = state()
import d2kd, d2kd.engine, d2kd.experiments.pictures, d2kd.export
assert state() == before, (before, state())
"""
    )


@pytest.mark.slow
def test_what_is_exported_and_that_no_warnings_of_other_packages_are_shown() -> None:
    names = "add_distill_config load_config drop_teacher load_teacher Teacher DistillMetaArch"
    names += " DistillRetinaNet DistillGFL DistillATSS DistillFCOS __version__"
    said = run(
        f"""
import d2kd
from detectron2.data import DatasetCatalog
missing = [name for name in {names.split()} if not hasattr(d2kd, name)]
assert not missing, missing
assert "bccd_train" in DatasetCatalog
"""
    )
    assert "Warning" not in said


@pytest.mark.slow
def test_a_data_set_name_that_another_package_has_registered() -> None:
    said = run(
        """
import warnings
warnings.simplefilter("ignore")
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
register_coco_instances("bccd_train", {}, "/elsewhere/bccd.json", "/elsewhere")
import d2kd
assert MetadataCatalog.get("bccd_train").json_file == "/elsewhere/bccd.json"
assert "bccd_val" in DatasetCatalog
"""
    )
    assert "'bccd_train' is already used for /elsewhere/bccd.json" in said
