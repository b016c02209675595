"""Finds the packages; everything else about the distribution is in pyproject.toml.

The top-level folders plugins/ and recipes/ are installed as cm_export.plugins and cm_export.recipes: packages called
`plugins` and `recipes` would pollute site-packages.
"""

from setuptools import find_packages, setup

OUTSIDE = ("plugins", "recipes")

setup(
    packages=[
        *find_packages(include=["cm_export", "cm_export.*"]),
        *(f"cm_export.{name}" for top in OUTSIDE for name in find_packages(include=[top, f"{top}.*"])),
    ],
    package_dir={"cm_export": "cm_export", **{f"cm_export.{top}": top for top in OUTSIDE}},
)
