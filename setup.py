"""Packaging of d2kd. The requirements are listed in requirements/*.txt only, the version in d2kd/__init__.py only."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def requirements(name: str) -> list:
    lines = (HERE / "requirements" / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def version() -> str:
    """Read, not imported: d2kd cannot be imported before its requirements are installed."""
    text = (HERE / "d2kd" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


setup(
    name="d2kd",
    version=version(),
    description="Knowledge distillation for dense object detectors, as an extension of detectron2",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords="knowledge distillation, object detection, detectron2, CrossKD, PKD, FGD, GFL, ATSS, FCOS, RetinaNet",
    project_urls={
        "detectron2": "https://github.com/facebookresearch/detectron2",
        "CrossKD (paper)": "https://arxiv.org/abs/2306.11369",
        "PKD (paper)": "https://arxiv.org/abs/2207.02039",
        "LD (paper)": "https://arxiv.org/abs/2102.12252",
        "FGD (paper)": "https://arxiv.org/abs/2111.11837",
        "MGD (paper)": "https://arxiv.org/abs/2205.01529",
        "CWD (paper)": "https://arxiv.org/abs/2011.13256",
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.9",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["d2kd", "d2kd.*"]),
    package_data={"d2kd": ["py.typed"], "d2kd.report": ["template.html"]},
    python_requires=">=3.9",
    # detectron2 is not listed: it has no official release in the package registry. `make setup` installs it, and
    # `import d2kd` says how where it is missing.
    install_requires=requirements("runtime.txt"),
    extras_require={"dev": requirements("dev.txt"), "timm": requirements("timm.txt")},
)
