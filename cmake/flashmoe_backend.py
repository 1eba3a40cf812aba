"""The build backend: scikit-build-core's, with the commit written into a source distribution.

A source distribution has no repository to ask, so `build_sdist` leaves a stamp in it that
cmake/build_info.py reads when a wheel is built from it.
"""

from __future__ import annotations

import json
from pathlib import Path

from build_info import STAMP, commit
from scikit_build_core import build as skbuild
from scikit_build_core.build import *  # noqa: F403  (a build backend is its module's functions)


def build_sdist(
    sdist_directory: str, config_settings: dict[str, list[str] | str] | None = None
) -> str:
    """PEP 517: makes the sdist with ``cmake/sdist_commit.json`` in it; returns its file name."""
    source = Path.cwd()
    stamp = source / STAMP
    if stamp.exists():  # this tree is itself an unpacked sdist
        return skbuild.build_sdist(sdist_directory, config_settings)
    stamp.write_text(json.dumps(commit(source)) + "\n", encoding="utf-8")
    try:
        return skbuild.build_sdist(sdist_directory, config_settings)
    finally:
        stamp.unlink()
