"""Packaging of d2kd; the requirement ranges stand in requirements/*.txt only."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def requirements(name: str) -> list:
    lines = (HERE / "requirements" / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


setup(
    name="d2kd",
    version="0.1.0",
    description="Knowledge distillation for dense object detectors, as an extension of detectron2",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["d2kd", "d2kd.*"]),
    package_data={"d2kd": ["py.typed"]},
    python_requires=">=3.9",
    # detectron2 is not listed: it has no official release in the package registry. `make setup` installs it, and
    # `import d2kd` says how where it is missing.
    install_requires=requirements("runtime.txt"),
    extras_require={"dev": requirements("dev.txt")},
)
