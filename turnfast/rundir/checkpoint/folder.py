"""Checkpoint folders on disk: written under another name, flushed and renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

FORMAT = 1
MANIFEST = "manifest.json"
TRAINER = "trainer"


def find_damage(path: Path, *, hashes: bool = True) -> str | None:
    """Return a description of the first thing wrong with a checkpoint, or None if it is complete.

    Args:
        hashes: also compare the SHA-256 of every file; otherwise only names and sizes.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']}, this version reads {FORMAT}"
        if f"step_{manifest['step']:06d}" != path.name:
            return f"{MANIFEST} is for step {manifest['step']}"
        for name, expected in manifest["files"].items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["size_bytes"]:
                return f"{name} has {file.stat().st_size} of {expected['size_bytes']} bytes"
            if hashes and _sha256(file) != expected["sha256"]:
                return f"{name} is damaged (SHA-256 differs)"
        if f"{TRAINER}/state.json" not in manifest["files"]:
            return f"{MANIFEST} does not list {TRAINER}/state.json"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    # a damaged manifest can be any JSON or none
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error!r})"
    return None


def write_manifest(folder: Path, step: int) -> None:
    """Write the manifest of a folder and flush all its files to disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {
        str(path.relative_to(folder)): {"size_bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in files
    }
    manifest = folder / MANIFEST
    manifest.write_text(
        json.dumps({"format": FORMAT, "step": step, "files": entries}, indent=1), encoding="utf-8"
    )
    folders = (path for path in folder.iterdir() if path.is_dir())
    for path in (*files, manifest, *folders, folder):
        _flush(path)


def publish(partial: Path, target: Path) -> None:
    """Rename a flushed folder to its final name; a damaged folder of that name is retired."""
    if target.exists():
        target.rename(_retired(target))
    partial.rename(target)
    _flush(target.parent)


def point_latest(folder: Path, name: str) -> None:
    """Write the name of the newest checkpoint to the file `latest`."""
    partial = folder / ".latest.partial"
    partial.write_text(name + "\n", encoding="utf-8")
    _flush(partial)
    partial.replace(folder / "latest")
    _flush(folder)


def retire_old(folder: Path, step: int, keep: int) -> None:
    """Remove all complete checkpoints up to this step but the newest `keep`.

    Incomplete checkpoints and those of later steps, which a resumed run skipped, do not count.
    """
    steps = (path for path in folder.glob("step_*") if path.name <= f"step_{step:06d}")
    usable = sorted((p for p in steps if find_damage(p, hashes=False) is None), reverse=True)
    for path in usable[max(keep, 1) :]:
        path.rename(_retired(path))
    remove_leftovers(folder)


def remove_leftovers(folder: Path) -> None:
    """Remove retired checkpoints and the folder of an interrupted save."""
    for path in (*folder.glob(".step_*.partial"), *folder.glob(".step_*.retired")):
        shutil.rmtree(path, ignore_errors=True)


def _retired(path: Path) -> Path:
    return path.with_name(f".{path.name}.retired")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
