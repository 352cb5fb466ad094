"""Checkpoints: bitwise resume; complete or absent after a full disk or a kill."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from turnfast.config.schema import OptimConfig
from turnfast.rundir.checkpoint import (
    CheckpointError,
    TrainingState,
    load_checkpoint,
    newest_complete,
    save_checkpoint,
)
from turnfast.update.optimizer import Optimizer as OurOptimizer


def make(
    dtype: torch.dtype = torch.float32,
    tied: bool = True,
    seed: int = 0,
    width: int = 16,
    master_weights: bool = False,
):
    torch.manual_seed(seed)
    shape = Qwen3Config(
        vocab_size=64, hidden_size=width, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=64,
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = Qwen3ForCausalLM(shape).to(dtype)
    if master_weights:
        config = OptimConfig(lr=1e-3, warmup_steps=8)
        return model, OurOptimizer(model.parameters(), config)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99))


def train(model, optimizer, steps: int) -> None:
    """Train on data drawn from the random states of all three libraries."""
    for _ in range(steps):
        ids = torch.randint(0, 64, (2, 8))
        ids[0, 0] = random.randrange(64)
        ids[1, 0] = int(np.random.randint(64))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def digest(model, optimizer) -> str:
    total = hashlib.sha256()
    tensors = [*model.state_dict().values()]
    for _, entries in sorted(optimizer.state_dict()["state"].items()):
        tensors += [torch.as_tensor(entries[name]) for name in sorted(entries)]
    for tensor in tensors:
        total.update(str(tensor.dtype).encode())
        total.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def save(folder: Path, step: int, model, optimizer, keep: int = 2, **progress) -> Path:
    training = TrainingState(model=model, optimizer=optimizer)
    return save_checkpoint(folder, step, training, progress=progress, keep=keep)


def load(path: Path, model, optimizer) -> dict:
    return load_checkpoint(path, TrainingState(model=model, optimizer=optimizer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("master_weights", [True, False])
def test_resuming_after_five_of_ten_steps_is_bitwise_equal(tmp_path, dtype, tied, master_weights):
    model, optimizer = make(dtype, tied, master_weights=master_weights)
    seed_all(3)
    train(model, optimizer, 5)
    path = save(tmp_path, 5, model, optimizer, position=40, weights_version=5)
    train(model, optimizer, 5)

    again, optimizer_again = make(dtype, tied, seed=99, master_weights=master_weights)
    seed_all(77)
    state = load(path, again, optimizer_again)
    assert state == {"step": 5, "position": 40, "weights_version": 5}
    train(again, optimizer_again, 5)
    assert digest(again, optimizer_again) == digest(model, optimizer)
    assert not master_weights or optimizer_again.num_steps == 10


def test_random_states_continue(tmp_path):
    def drawn():
        return random.gauss(0, 1), random.random(), np.random.randn(), torch.randn(3).tolist()

    model, optimizer = make()
    seed_all(5)
    drawn()
    path = save(tmp_path, 1, model, optimizer)
    expected = drawn()
    seed_all(6)
    load(path, model, optimizer)
    assert drawn() == expected


def test_float32_moments_of_bfloat16_weights_are_not_rounded(tmp_path):
    model, optimizer = make(torch.bfloat16)
    train(model, optimizer, 1)
    for entries in optimizer.state.values():
        entries["exp_avg"] = torch.randn(entries["exp_avg"].shape)
    before = digest(model, optimizer)
    path = save(tmp_path, 1, model, optimizer)
    again, optimizer_again = make(torch.bfloat16, seed=1)
    load(path, again, optimizer_again)
    assert digest(again, optimizer_again) == before


def test_an_optimizer_without_steps_and_with_two_groups(tmp_path):
    model, _ = make()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD([{"params": parameters[:3], "lr": 0.5}, {"params": parameters[3:]}])
    path = save(tmp_path, 0, model, optimizer)
    other = torch.optim.SGD([{"params": parameters[:3]}, {"params": parameters[3:]}], lr=0.1)
    load(path, model, other)
    assert other.param_groups[0]["lr"] == 0.5


def test_the_folder_is_a_model_path_with_one_weight_file_and_no_pickle(tmp_path):
    model, optimizer = make(torch.bfloat16)
    train(model, optimizer, 1)
    path = save(tmp_path, 7, model, optimizer)
    assert [file.name for file in path.glob("*.safetensors")] == ["model.safetensors"]
    suffixes = {file.suffix for file in path.rglob("*") if file.is_file()}
    assert suffixes == {".json", ".safetensors"}
    loaded = AutoModelForCausalLM.from_pretrained(path)
    assert loaded.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])


FILES = ["model.safetensors", "config.json", "trainer/optimizer.safetensors", "trainer/state.json"]


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(tmp_path, caplog, name, damage):
    model, optimizer = make()
    train(model, optimizer, 1)
    old, new = (save(tmp_path, step, model, optimizer) for step in (1, 2))
    assert newest_complete(tmp_path) == new
    data = bytearray((new / name).read_bytes())
    data[len(data) // 2] ^= 0x80
    if damage == "remove":
        (new / name).unlink()
    else:
        (new / name).write_bytes(data if damage == "flip" else data[:-1])
    assert newest_complete(tmp_path) == old
    assert str(new) in caplog.text
    if damage != "flip" or name == "manifest.json":
        with pytest.raises(CheckpointError, match="incomplete checkpoint"):
            load(new, model, optimizer)


def test_no_checkpoint_is_none(tmp_path):
    assert newest_complete(tmp_path / "missing") is None
    (tmp_path / "step_000003").mkdir()
    assert newest_complete(tmp_path) is None


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_are_kept_and_latest_names_the_last(tmp_path):
    model, optimizer = make()
    for step in (10, 20, 30):
        save(tmp_path, step, model, optimizer, keep=2)
    assert names_in(tmp_path) == ["latest", "step_000020", "step_000030"]
    assert (tmp_path / "latest").read_text().strip() == "step_000030"


def test_later_checkpoints_do_not_count_as_kept(tmp_path):
    model, optimizer = make()
    for step in (10, 30, 20):  # 20 by a run resumed from step 10
        save(tmp_path, step, model, optimizer, keep=2)
    assert names_in(tmp_path) == ["latest", "step_000010", "step_000020", "step_000030"]


def test_damaged_checkpoints_do_not_count_as_kept_and_are_replaced(tmp_path):
    model, optimizer = make()
    first, broken = (save(tmp_path, step, model, optimizer) for step in (10, 20))
    (broken / "model.safetensors").unlink()
    third = save(tmp_path, 15, model, optimizer, keep=2)
    assert first.exists() and newest_complete(tmp_path) == third
    assert save(tmp_path, 20, model, optimizer, keep=2) == newest_complete(tmp_path) == broken
    assert not first.exists()


def test_a_complete_checkpoint_is_not_written_again(tmp_path):
    model, optimizer = make()
    path = save(tmp_path, 10, model, optimizer)
    before = (path / "manifest.json").stat().st_mtime_ns
    assert save(tmp_path, 10, model, optimizer) == path
    assert (path / "manifest.json").stat().st_mtime_ns == before


def test_files_are_flushed_before_the_rename_and_latest_is_written_after_it(tmp_path, monkeypatch):
    events: list[tuple[str, str]] = []
    fsync = os.fsync

    def record_fsync(handle):
        events.append(("flush", os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def record_move(move):
        def record(source, target, **options):
            events.append(("move", str(target)))
            move(source, target, **options)

        return record

    model, optimizer = make()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", record_fsync)
        patch.setattr(os, "rename", record_move(os.rename))
        patch.setattr(os, "replace", record_move(os.replace))
        path = save(tmp_path, 1, model, optimizer)

    published = events.index(("move", str(path)))
    flushed = {name for kind, name in events[:published] if kind == "flush"}
    partial = tmp_path / ".step_000001.partial"
    written = [partial, *(partial / file.relative_to(path) for file in path.rglob("*"))]
    assert {str(file) for file in written} <= flushed
    latest = events.index(("move", str(tmp_path / "latest")))
    assert published < latest
    assert ("flush", str(tmp_path)) in events[published:latest]
    assert ("flush", str(tmp_path / ".latest.partial")) in events[published:latest]
    assert ("flush", str(tmp_path)) in events[latest:]


def test_leftovers_of_an_interrupted_save_are_removed(tmp_path):
    model, optimizer = make()
    complete = save(tmp_path, 1, model, optimizer)
    shutil.copytree(complete, tmp_path / ".step_000002.partial")
    assert newest_complete(tmp_path) == complete
    save(tmp_path, 2, model, optimizer)
    assert not list(tmp_path.glob(".step*"))


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path):
    model, optimizer = make()
    train(model, optimizer, 1)
    earlier = save(tmp_path, 1, model, optimizer)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"step_000002.*could not be written"):
            save(tmp_path, 2, model, optimizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert newest_complete(tmp_path) == earlier
    assert not list(tmp_path.glob(".step*"))


def test_an_unwritable_folder_is_an_error(tmp_path):
    model, optimizer = make()
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match="could not be written"):
        save(tmp_path / "checkpoints", 1, model, optimizer)


def test_progress_that_is_not_json_is_rejected_before_writing(tmp_path):
    model, optimizer = make()
    with pytest.raises(CheckpointError, match="progress cannot be JSON"):
        save(tmp_path / "c", 1, model, optimizer, position={1, 2})
    assert not (tmp_path / "c").exists()


def test_another_model_or_optimizer_is_rejected(tmp_path):
    model, optimizer = make()
    train(model, optimizer, 1)
    path = save(tmp_path, 1, model, optimizer)
    wide, wide_optimizer = make(width=24)
    with pytest.raises(CheckpointError, match="do not match the model"):
        load(path, wide, wide_optimizer)
    fewer = torch.optim.AdamW(list(model.parameters())[1:])
    with pytest.raises(CheckpointError, match="does not match the parameters"):
        load(path, model, fewer)


KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_checkpoint import make, save
model, optimizer = make()
folder = Path({folder!r})
save(folder, 1, model, optimizer)
hook = lambda event, args: os.kill(os.getpid(), 9) if event == "os.rename" else None
sys.addaudithook(hook)
save(folder, 2, model, optimizer)
"""


def test_a_kill_before_the_rename_leaves_the_earlier_checkpoint(tmp_path):
    script = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / ".step_000002.partial" / "manifest.json").exists()
    assert newest_complete(tmp_path) == tmp_path / "step_000001"
