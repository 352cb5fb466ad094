"""The C++ extension is rejected if it does not match its sources."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from turnfast.kernels.extension import SOURCES, load_error, stale
from turnfast.kernels.sources import digest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.cpp").write_text("int a;")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "b.h").write_text("int b;")
    return tmp_path


def test_an_extension_matches_the_sources_it_was_built_from(folder: Path) -> None:
    assert stale(digest(folder), folder) is None
    assert stale("", folder / "absent") is None  # a wheel has no sources


@pytest.mark.parametrize("change", ["edit", "new file", "renamed", "no digest"])
def test_an_older_extension_is_rejected_with_the_fix(folder: Path, change: str) -> None:
    built_from = "" if change == "no digest" else digest(folder)
    if change == "edit":
        (folder / "inner" / "b.h").write_text("int c;")
    elif change == "new file":
        (folder / "c.cpp").write_text("")
    elif change == "renamed":
        (folder / "a.cpp").rename(folder / "d.cpp")
    reason = stale(built_from, folder)
    assert reason is not None and "pip install" in reason


@pytest.mark.skipif(
    importlib.util.find_spec("turnfast._C") is None or not SOURCES.is_dir(),
    reason="no extension, or no sources",
)
def test_the_installed_extension_is_not_stale() -> None:
    assert load_error() is None
