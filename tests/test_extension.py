"""The compiled extension knows what it was built from."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from turnfast.kernels.extension import SOURCES, load_error, stale
from turnfast.kernels.sources import digest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.cpp").write_text("int a;")
    (tmp_path / "b.h").write_text("int b;")
    return tmp_path


def test_an_extension_fits_the_sources_it_was_built_from(folder: Path) -> None:
    assert stale(digest(folder), folder) is None
    assert stale("", folder / "absent") is None  # a wheel


@pytest.mark.parametrize("change", ["edit", "new file", "renamed", "no stamp"])
def test_an_older_extension_is_refused_with_the_way_out(folder: Path, change: str) -> None:
    built_from = "" if change == "no stamp" else digest(folder)
    if change == "edit":
        (folder / "b.h").write_text("int c;")
    elif change == "new file":
        (folder / "c.cpp").write_text("")
    elif change == "renamed":
        (folder / "a.cpp").rename(folder / "d.cpp")
    reason = stale(built_from, folder)
    assert reason is not None and "pip install" in reason


@pytest.mark.skipif(
    importlib.util.find_spec("turnfast._C") is None or not SOURCES.is_dir(),
    reason="no extension, or no sources beside it",
)
def test_the_extension_here_is_not_stale() -> None:
    assert load_error() is None
