"""Shared fixtures, and the rules for skipping tests."""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from turnfast.chat.template import Chat
    from turnfast.model import Policy


MISSING = re.compile(
    r"could not import|not installed|not built|no _C|no sandbox|TURNFAST_TEST_DATA|compiler"
    r"|needs (the data extra|real data|vLLM)"
)
"""Reasons to skip that a complete installation does not have."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return _strict((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return _strict((yield))


def _strict(report):
    """With TURNFAST_STRICT_SKIPS a skip for a missing package, tool or data folder is a failure."""
    if report.skipped and os.environ.get("TURNFAST_STRICT_SKIPS"):
        reason = str(report.longrepr)
        if MISSING.search(reason):
            report.outcome = "failed"
            report.longrepr = f"skipped under TURNFAST_STRICT_SKIPS: {reason}"
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny model with a tokenizer, in Hugging Face form."""
    from turnfast.model.tiny import write_tiny_model

    corpus = ["user assistant tool result answer Who wrote Ulm? Ida wrote Ulm in Oslo."] * 50
    return write_tiny_model(
        tmp_path_factory.mktemp("tiny"), corpus, seed=0, layers=2, width=64, max_context=512
    )


@pytest.fixture(scope="session")
def chat(tiny_folder: Path) -> Chat:
    """The chat interface of the tiny model."""
    from transformers import AutoTokenizer

    from turnfast.chat.template import Chat

    return Chat(AutoTokenizer.from_pretrained(tiny_folder))


@pytest.fixture
def policy(tiny_folder: Path) -> Policy:
    """The tiny model on the CPU, loaded again for every test."""
    from turnfast.config.schema import ModelConfig
    from turnfast.model import load_policy

    return load_policy(ModelConfig(), tiny_folder, torch.device("cpu"))


@pytest.fixture(scope="session")
def letters_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny model whose first samples in the letters environment differ in reward."""
    from turnfast.model.tiny import write_tiny_model

    corpus = ["user Say ulm. assistant oslo Again, ida. bela koru arne mira sorime tovel ganu"] * 9
    return write_tiny_model(
        tmp_path_factory.mktemp("letters"),
        corpus,
        seed=0,
        vocab_size=300,
        layers=2,
        width=64,
        max_context=512,
    )


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Run torch on one thread: sums of several threads are not bitwise repeatable."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
