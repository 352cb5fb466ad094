"""What the Triton loss head remembers about a machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from turnfast.kernels.loss_head import choice, driver, memory


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(memory, "_known", {})
    return tmp_path / "turnfast" / "kernels.json"


def test_lasting_values_reach_the_next_process_and_others_do_not(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.remember("design/a", "safe")
    memory.remember("selftest/a", "broken", lasting=False)
    assert (memory.recall("design/a"), memory.recall("selftest/a")) == ("safe", "broken")
    monkeypatch.setattr(memory, "_known", {})
    assert (memory.recall("design/a"), memory.recall("selftest/a")) == ("safe", None)
    memory.remember("design/b", "anchored")
    assert json.loads(cache.read_text()) == {"design/a": "safe", "design/b": "anchored"}


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"design/a": 3}'])
def test_a_broken_or_strange_file_is_as_good_as_none(cache: Path, text: str) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(text)
    assert memory.recall("design/a") is None
    memory.remember("design/a", "safe")
    assert memory.recall("design/a") == "safe"


def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(memory, "_known", {})
    memory.remember("design/a", "safe")
    assert memory.recall("design/a") == "safe"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_only_bf16_on_cuda_is_measured(dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    head = torch.zeros(8, 4, dtype=dtype)
    assert choice.choose_design(head, driver.whole_vocab(head), 100) == "safe"
