"""Where the packages lie; everything else is in pyproject.toml.

``converters/`` and ``spec/`` stand beside ``ucp/`` in a checkout and are installed inside it, as ``ucp.converters`` and
``ucp.spec``. New packages are found, not listed.
"""

from setuptools import find_packages, setup

MAPPED = ("converters", "spec")

setup(
    packages=[
        *find_packages(include=["ucp", "ucp.*"]),
        *(f"ucp.{name}" for top in MAPPED for name in find_packages(include=[top, f"{top}.*"])),
    ],
    package_dir={f"ucp.{top}": top for top in MAPPED},
)
