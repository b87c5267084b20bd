"""Tests of checkpoints that are whole or not there, of the one that a run resumes from, and of the lock of a run."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import IntervalStrategy

from hf_context_parallel.distributed.mesh import world
from hf_context_parallel.trainer.checkpoints import SAVING, WHOLE, flaw_of, recover, replaced_whole
from hf_context_parallel.trainer.run_lock import NAME, only_run_in
from tests.helpers.trainer import make_trainer

SAVES = {"save_strategy": "steps", "save_steps": 1}


def make_checkpoint(folder: Path, step: int = 1) -> Path:
    """Write the files that are looked at of a checkpoint of two shards."""
    folder.mkdir(parents=True)
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name in names:
        save_file({name: torch.ones(64)}, folder / name)
    index = {"weight_map": {name: name for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.save({"state": torch.ones(64)}, folder / "optimizer.pt")
    (folder / TRAINER_STATE_NAME).write_text(json.dumps({"global_step": step}))
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "flaw"),
    {
        "state": (lambda x: cut(x / TRAINER_STATE_NAME), TRAINER_STATE_NAME),
        "no state": (lambda x: (x / TRAINER_STATE_NAME).unlink(), TRAINER_STATE_NAME),
        "shard": (lambda x: cut(x / "model-00002-of-00002.safetensors"), "model-00002-of-00002.safetensors has"),
        "empty": (lambda x: (x / "model-00001-of-00002.safetensors").write_bytes(b""), "is half there"),
        "no shard": (lambda x: (x / "model-00001-of-00002.safetensors").unlink(), "names model-00001"),
        "index": (lambda x: cut(x / "model.safetensors.index.json"), "index.json is half there"),
        "optimizer": (lambda x: cut(x / "optimizer.pt"), "optimizer.pt is half there"),
        "no weights": (lambda x: [y.unlink() for y in x.glob("model*")], "no weights"),
        "folder": (shutil.rmtree, "no such folder"),
    }.values(),
)
def test_a_half_checkpoint_is_recognised(tmp_path, damage, flaw):
    folder = make_checkpoint(tmp_path / "checkpoint-1")
    assert flaw_of(folder) is None
    damage(folder)
    assert flaw in flaw_of(folder)


def test_a_checkpoint_of_fsdp_needs_its_metadata(tmp_path):
    folder = tmp_path / "checkpoint-1"
    (folder / "pytorch_model_fsdp_0").mkdir(parents=True)
    (folder / TRAINER_STATE_NAME).write_text('{"global_step": 1}')
    (folder / "pytorch_model_fsdp_0" / "__0_0.distcp").write_bytes(b"weights")
    assert ".metadata" in flaw_of(folder)
    (folder / "pytorch_model_fsdp_0" / ".metadata").write_bytes(b"names")
    assert flaw_of(folder) is None


def test_a_checkpoint_of_deepspeed_needs_its_state(tmp_path):
    folder = make_checkpoint(tmp_path / "checkpoint-4")
    (folder / "latest").write_text("global_step4")
    assert "names 'global_step4', which is missing" in flaw_of(folder)
    (folder / "global_step4").mkdir()
    assert flaw_of(folder) is None


def test_a_checkpoint_that_was_whole_when_its_run_was_killed_gets_its_place(tmp_path):
    before = make_checkpoint(tmp_path / "checkpoint-3", step=3)
    (before / "of_an_earlier_run").touch()
    make_checkpoint(tmp_path / SAVING / f"checkpoint-3{WHOLE}", step=3)
    make_checkpoint(tmp_path / SAVING / "checkpoint-4", step=4)
    assert recover(tmp_path) == ["checkpoint-4"]
    assert flaw_of(before) is None
    assert not (before / "of_an_earlier_run").exists()
    assert not (tmp_path / "checkpoint-4").exists()


def test_files_of_a_model_are_replaced_when_all_are_written(tmp_path):
    (tmp_path / "model.safetensors").write_text("old")
    (tmp_path / "model-00001-of-00002.safetensors").write_text("of an older model")
    with pytest.raises(OSError, match="full"), replaced_whole(tmp_path) as staged:
        Path(staged, "model.safetensors").write_text("ne")
        raise OSError("full")
    assert (tmp_path / "model.safetensors").read_text() == "old"
    with replaced_whole(tmp_path) as staged:
        Path(staged, "model.safetensors").write_text("new")
    assert (tmp_path / "model.safetensors").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]


def test_files_of_other_models_and_the_card_stay(tmp_path):
    base = ["consolidated-00001-of-00001.safetensors", "model-00001-of-00001.safetensors", "README.md"]
    for name in base:
        (tmp_path / name).write_text("of the base")
    with replaced_whole(tmp_path) as staged:
        assert Path(staged, "README.md").read_text() == "of the base"
        Path(staged, "adapter_model.safetensors").write_text("adapter")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_model.safetensors", *base}


def test_a_second_run_into_a_folder_is_refused(tmp_path):
    """Assert that the lock is held while its process lives, that it is told, and that a process may take it twice."""
    ready, told = os.pipe()
    holder = os.fork()
    if not holder:
        with only_run_in(tmp_path, world()):
            os.write(told, b"held")
            signal.pause()
    try:
        assert os.read(ready, 4) == b"held"
        words = f"process {holder} on {socket.gethostname()}.*set another output_dir"
        with pytest.raises(ValueError, match=words), only_run_in(tmp_path, world()):
            pass
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    with only_run_in(tmp_path, world()), only_run_in(tmp_path, world()):
        assert (tmp_path / NAME).read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"output_dir=.*cannot be written"), only_run_in(tmp_path / "file", world()):
        pass


def weights_of(trainer) -> list[float]:
    return torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()]).tolist()


def resumes_past_half_ones(folder: str) -> tuple[list[int], bool, str, list[str]]:
    """Train, damage the two newest checkpoints, and resume by the path of a half one and by True."""
    whole = make_trainer(2, folder, **SAVES)
    whole.train()
    dist.barrier()
    if dist.get_rank() == 0:
        cut(Path(folder, "checkpoint-4", "model.safetensors"))
        Path(folder, "checkpoint-3", TRAINER_STATE_NAME).unlink()
    dist.barrier()
    refused = ""
    try:
        make_trainer(2, folder, **SAVES).train(resume_from_checkpoint=f"{folder}/checkpoint-3")
    except ValueError as error:
        refused = str(error)
    steps: list[int] = []
    resumed = make_trainer(2, folder, **SAVES)
    resumed.add_callback(StepNumbers(steps))
    resumed.train(resume_from_checkpoint=True)
    resumed.train(resume_from_checkpoint=True)  # all its steps are done
    return steps, weights_of(resumed) == weights_of(whole), refused, sorted(x.name for x in Path(folder).iterdir())


class StepNumbers(TrainerCallback):
    def __init__(self, steps: list[int]):
        self._steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        self._steps.append(state.global_step)


def test_half_checkpoints_are_passed_over(on_ranks, tmp_path):
    for steps, is_same, refused, left in on_ranks(2, resumes_past_half_ones, str(tmp_path)):
        assert steps == [3, 4]
        assert is_same
        assert "checkpoint-3' is no whole checkpoint: trainer_state.json is missing" in refused
        assert f"Whole ones beside it: {tmp_path}/checkpoint-2, {tmp_path}/checkpoint-1." in refused
        assert left == [NAME, *(f"checkpoint-{step}" for step in (1, 2, 3, 4))]
    assert all(flaw_of(tmp_path / f"checkpoint-{step}") is None for step in (1, 2, 3, 4))


def saves_with_best_and_limit(folder: str) -> tuple[str, list[str], list[str]]:
    """Train with an evaluation each step and one checkpoint to keep besides the best one."""
    trainer = make_trainer(2, folder, **SAVES, save_total_limit=1, metric_for_best_model="loss", eval_steps=1)
    trainer.eval_dataset = trainer.train_dataset
    trainer.args.eval_strategy, trainer.args.load_best_model_at_end = IntervalStrategy.STEPS, True
    values = iter((4.0, 1.0, 3.0, 2.0))
    evaluate, seen = trainer.evaluate, []
    trainer.evaluate = lambda *args, **kwargs: evaluate(*args, **kwargs) | {"eval_loss": next(values)}

    class Saved(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            name = Path(folder, f"checkpoint-{state.global_step}", TRAINER_STATE_NAME)
            seen.append(json.loads(name.read_text())["best_model_checkpoint"])

    trainer.add_callback(Saved())
    trainer.train()
    dist.barrier()
    return trainer.state.best_model_checkpoint, seen, sorted(x.name for x in Path(folder).iterdir())


def test_the_best_checkpoint_is_named_where_it_is_and_kept(on_ranks, tmp_path):
    folder = str(tmp_path)
    best = f"{folder}/checkpoint-2"
    for found in on_ranks(2, saves_with_best_and_limit, folder):
        assert found == (best, [f"{folder}/checkpoint-1", best, best, best], [NAME, "checkpoint-2"])


def cannot_write(folder: str, settings: dict, how: str, **options) -> tuple[str, list[str]]:
    """Train, where the checkpoint of the second step is too large for the disk; return the error."""
    trainer = make_trainer(2, folder, settings=settings, **SAVES, **options)
    save, free = trainer._save_checkpoint, shutil.disk_usage

    def limited(*args):
        if trainer.state.global_step != 2:
            return save(*args)
        if how == "write":  # as a full disk, for files of this process; that of the store of the world is smaller
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
        else:
            shutil.disk_usage = lambda path: free(path)._replace(free=4096)
        try:
            return save(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            shutil.disk_usage = free

    trainer._save_checkpoint = limited
    message = ""
    try:
        trainer.train()
    except ValueError as error:
        message = str(error)
    dist.barrier()
    return message, sorted(x.name for x in Path(folder).iterdir() if x.is_dir())


@pytest.mark.parametrize("how", ["write", pytest.param("room", marks=pytest.mark.exhaustive)])
def test_a_full_disk_is_told_to_all_ranks(on_ranks, tmp_path, how):
    for message, left in on_ranks(2, cannot_write, str(tmp_path), {}, how):
        assert f"{tmp_path}/checkpoint-2 was not saved (" in message
        assert "bytes or more" in message
        assert "4,096 bytes are free" in message or how == "write"
        assert left == [SAVING, "checkpoint-1"]


def test_a_run_goes_on_without_a_checkpoint_if_asked(on_ranks, tmp_path):
    for message, left in on_ranks(2, cannot_write, str(tmp_path), {"on_save_error": "continue"}, "write"):
        assert not message
        assert left == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]


def sharded_run_goes_on(folder: str, state_dict_type: str) -> tuple[list[str], list[int]]:
    """Train with FSDP2 past a checkpoint that cannot be written, lose the last one, and resume.

    PyTorch loads no full state of an optimizer that has none, such as plain SGD.
    """
    options = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": state_dict_type}}
    options["optim"] = "adamw_torch"
    message, left = cannot_write(folder, {"on_save_error": "continue"}, "write", **options)
    assert not message
    dist.barrier()
    if dist.get_rank() == 0:
        lost = TRAINER_STATE_NAME if state_dict_type == "FULL_STATE_DICT" else ".metadata"
        next(Path(folder, "checkpoint-4").rglob(lost)).unlink()
    dist.barrier()
    steps: list[int] = []
    resumed = make_trainer(2, folder, **SAVES, **options)
    resumed.add_callback(StepNumbers(steps))
    resumed.train(resume_from_checkpoint=True)
    return left, steps


@pytest.mark.parametrize("state_dict_type", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_sharded_models_too(on_ranks, tmp_path, state_dict_type):
    for left, steps in on_ranks(2, sharded_run_goes_on, str(tmp_path), state_dict_type):
        assert left == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]
        assert steps == [4]
