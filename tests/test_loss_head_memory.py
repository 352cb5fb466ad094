"""What the Triton loss head remembers about a machine, and what makes it ask again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from turnfast.kernels.loss_head import driver
from turnfast.kernels.loss_head.triton import choice, memory


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "turnfast" / "kernels"


def test_an_answer_is_a_file_of_its_own(cache: Path) -> None:
    memory.remember("design/NVIDIA H200/V5", "safe")
    assert (cache / "design" / "NVIDIA-H200" / "V5").read_text() == "safe"
    assert memory.recall("design/NVIDIA H200/V5") == "safe"
    assert memory.recall("design/NVIDIA H200/V6") is None
    memory.remember("design/NVIDIA H200/V5", "anchored")
    assert memory.recall("design/NVIDIA H200/V5") == "anchored"
    assert [path.name for path in cache.rglob("*") if path.is_file()] == ["V5"]


@pytest.mark.parametrize("part", ["..", "a b", "a\\b", "é", "x" * 200])
def test_no_key_leaves_the_cache(cache: Path, part: str) -> None:
    memory.remember(f"{part}/design", "safe")
    assert memory.recall(f"{part}/design") == "safe"
    assert all(cache in path.parents for path in cache.parent.parent.rglob("design"))


def test_a_broken_file_is_as_good_as_none(cache: Path) -> None:
    (cache / "a").mkdir(parents=True)
    (cache / "a" / "bytes").write_bytes(b"\xff\xfe\x00safe")
    assert memory.recall("a/bytes") is None
    memory.remember("a/bytes", "safe")
    assert memory.recall("a/bytes") == "safe"


def test_a_folder_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    memory.remember("design/a", "safe")
    assert memory.recall("design/a") is None


def test_a_write_that_fails_late_leaves_nothing_behind(cache: Path) -> None:
    (cache / "a" / "taken").mkdir(parents=True)
    memory.remember("a/taken", "safe")
    assert memory.recall("a/taken") is None
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_user_without_a_home_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    memory.remember("design/a", "safe")
    assert memory.recall("design/a") is None


WRITER = """
import sys
from pathlib import Path
from turnfast.kernels.loss_head import memory

me = sys.argv[1]
print("ready", flush=True)
sys.stdin.readline()
for i in range(300):
    memory.remember(f"own/{me}-{i}", me)
    memory.remember("shared/one", me * 1000)
    read = memory.recall("shared/one")
    assert read in ("a" * 1000, "b" * 1000), read
"""


def test_two_processes_at_once_lose_nothing(cache: Path) -> None:
    writers = {
        me: subprocess.Popen(
            [sys.executable, "-c", WRITER, me],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for me in "ab"
    }
    for writer in writers.values():
        assert writer.stdout and writer.stdout.readline() == "ready\n"
    for writer in writers.values():
        assert writer.stdin
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers.values():
        _, errors = writer.communicate(timeout=120)
        assert writer.returncode == 0, errors
    for me in writers:
        assert all(memory.recall(f"own/{me}-{i}") == me for i in range(300))
    files = [path for path in cache.rglob("*") if path.is_file()]
    assert len(files) == 601 and not [path for path in files if path.name.startswith(".part")]


VERSION = """NVRM version: NVIDIA UNIX {} Kernel Module  {}  Release Build
GCC version:  gcc version 12.2.0
"""


@pytest.mark.parametrize(
    ("kind", "version"), [("x86_64", "570.124.06"), ("Open", "580.65.06"), ("aarch64", "535.1")]
)
def test_the_driver_is_read_from_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, version: str
) -> None:
    monkeypatch.setattr(memory, "DRIVER", tmp_path / "version")
    assert memory.driver() == "unknown"
    (tmp_path / "version").write_text("something else")
    assert memory.driver() == "unknown"
    (tmp_path / "version").write_text(VERSION.format(kind, version))
    assert memory.driver() == version


def test_gpu_driver_versions_and_sources_are_in_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(memory, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(memory, "KERNELS", tmp_path)
    (tmp_path / "version").write_text(VERSION.format("x86_64", "570.1"))
    gpu, keys = torch.device("cuda", 0), []

    def ask() -> None:
        memory.sources.cache_clear()
        keys.append(memory.device_key(gpu))
        assert memory.device_key(gpu) == keys[-1]

    try:
        ask()
        (tmp_path / "version").write_text(VERSION.format("x86_64", "580.1"))
        ask()
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
        ask()
        monkeypatch.setattr(torch, "__version__", "99.0+cu999")
        ask()
        monkeypatch.setattr(triton, "__version__", "99.1")
        ask()
        (tmp_path / "room").mkdir()
        (tmp_path / "room" / "kernel.py").write_text("x = 1")
        ask()
        (tmp_path / "room" / "kernel.py").write_text("x = 2")
        ask()
    finally:
        memory.sources.cache_clear()
    assert len(set(keys)) == 7
    assert "NVIDIA H100/driver-580.1/torch99.0+cu999/triton99.1/" in keys[-1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_only_bf16_on_cuda_is_measured(dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    head = torch.zeros(8, 4, dtype=dtype)
    assert choice.choose_design(head, driver.whole_vocab(head), 100) == "safe"
