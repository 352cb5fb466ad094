"""The benchmark's adapters to other projects, whose arguments move between their versions."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

HARNESS = Path(__file__).parent.parent / "bench" / "harness"


@pytest.fixture
def peers(monkeypatch):
    spec = importlib.util.spec_from_file_location("peers", HARNESS / "loss_head_peers.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "peers", module)  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


class Early(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, reduction="none", temperature=1.0):
        return hidden


class Late(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, temperature, softcap=None, reduction="none"):
        return hidden


@pytest.mark.parametrize(
    ("function", "expected"),
    [(Early, [1, 2, 3, "none", 0.5]), (Late, [1, 2, 3, 0.5, None, "none"])],
)
def test_arguments_go_where_the_installed_version_has_them(peers, function, expected):
    given = {"hidden": 1, "weight": 2, "labels": 3, "temperature": 0.5, "reduction": "none"}
    assert peers.arranger(function, set(given))(given) == expected


def test_a_required_argument_that_is_unknown_leaves_the_peer_out_by_name(peers):
    with pytest.raises(ImportError, match=r"Late of this version needs 'temperature'"):
        peers.arranger(Late, {"hidden", "weight", "labels"})


def test_peers_that_are_not_installed_are_named(peers):
    found, missing = peers.contenders(torch.device("cpu"), {"torch-eager", "trl"})
    assert "torch eager" in {one.name for one in found}
    assert len(found) + len(missing) == 2
    assert all(line.startswith("trl: not timed") for line in missing)
