"""Fixtures that several rooms share, and the rules by which a test is skipped, by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny model with a tokenizer, in Hugging Face form."""
    from turnfast.tiny import write_tiny_model

    corpus = ["user assistant tool result answer Who wrote Ulm? Ida wrote Ulm in Oslo."] * 50
    return write_tiny_model(
        tmp_path_factory.mktemp("tiny"), corpus, seed=0, layers=2, width=64, max_context=512
    )
