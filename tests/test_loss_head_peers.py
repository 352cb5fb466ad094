"""The benchmark's adapters to other projects, whose signatures change between versions."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

PEERS = Path(__file__).parent.parent / "bench" / "harness" / "loss_head_peers.py"


@pytest.fixture
def peers(monkeypatch):
    spec = importlib.util.spec_from_file_location("peers", PEERS)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "peers", module)  # dataclasses look up their module there
    spec.loader.exec_module(module)
    return module


class ReductionFirst(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, reduction="none", temperature=1.0):
        return hidden


class TemperatureFirst(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, temperature, softcap=None, reduction="none"):
        return hidden


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (ReductionFirst, [1, 2, 3, "none", 0.5]),
        (TemperatureFirst, [1, 2, 3, 0.5, None, "none"]),
    ],
)
def test_arguments_follow_the_installed_signature(peers, function, expected):
    arguments = {"hidden": 1, "weight": 2, "labels": 3, "temperature": 0.5, "reduction": "none"}
    assert peers.arranger(function, set(arguments))(arguments) == expected


def test_a_missing_required_argument_is_named(peers):
    message = r"TemperatureFirst of this version needs 'temperature'"
    with pytest.raises(ImportError, match=message):
        peers.arranger(TemperatureFirst, {"hidden", "weight", "labels"})


def test_peers_that_are_not_installed_are_named(peers):
    available, missing = peers.contenders(torch.device("cpu"), {"torch-eager", "trl"})
    assert "torch eager" in {one.name for one in available}
    assert len(available) + len(missing) == 2
    assert all(line.startswith("trl: not timed") for line in missing)
