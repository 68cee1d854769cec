"""Maps the top-level folders of this repository onto the `internvl_edge` package; the rest is in pyproject.toml."""

from setuptools import find_packages, setup

STAGES = ("export", "quantize", "runtime", "calibration")

packages = find_packages(include=["internvl_edge", "internvl_edge.*"])
for stage in STAGES:
    packages += [f"internvl_edge.{stage}"] + [f"internvl_edge.{stage}.{name}" for name in find_packages(stage)]

setup(packages=packages, package_dir={f"internvl_edge.{stage}": stage for stage in STAGES})
