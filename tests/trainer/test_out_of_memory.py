"""Errors for want of memory in a training step: they go on as they are, with a note."""

import pytest
import torch

from hf_context_parallel.trainer import out_of_memory
from hf_context_parallel.trainer.out_of_memory import advised, is_of_memory, job_of
from tests.helpers.trainer import make_trainer


def raised(folder, error, options=None):
    """Train until the model raises `error` on every rank. Return what `train` raised, in words, and its notes."""
    trainer = make_trainer(2, folder, **(options or {}))

    def fail(*_):
        raise error

    trainer.model.model.layers[0].register_forward_hook(fail)
    try:
        trainer.train()
    except Exception as caught:
        return repr(caught), getattr(caught, "__notes__", []), caught is error
    raise AssertionError("nothing was raised")


def test_an_error_for_want_of_memory_gains_a_note(on_ranks, tmp_path):
    error = torch.OutOfMemoryError("CUDA out of memory.")
    for words, notes, is_same in on_ranks(2, raised, tmp_path, error):
        assert is_same and "CUDA out of memory" in words
        [note] = notes
        assert "on 2 CP ranks" in note
        assert "The largest part of it:" in note
        assert "GiB with gradient_checkpointing=True" in note


def test_other_errors_have_no_note(on_ranks, tmp_path):
    for words, notes, is_same in on_ranks(2, raised, tmp_path, RuntimeError("shapes differ")):
        assert is_same and "shapes differ" in words
        assert notes == []


def described(folder, options):
    trainer = make_trainer(2, folder, **options)
    trainer._count(96, 48)
    return job_of(trainer)


def test_the_job_is_that_of_the_trainer(on_ranks, tmp_path):
    options = {
        "gradient_checkpointing": True,
        "gradient_accumulation_steps": 2,
        "settings": {"comm_type": "a2a", "loss_chunk_tokens": 8},
    }
    for job, weights, ranks in on_ranks(2, described, tmp_path, options):
        assert (job.tokens, job.cp, job.tp, job.fsdp, job.ddp) == (96, 2, 1, 1, True)
        assert (job.comm_type, job.kernel, job.optimizer) == ("a2a", "cpu", "sgd")
        assert job.checkpointing and job.accumulates and not job.offload
        assert job.loss_chunk_tokens == 8
        assert job.facts.lora_parameters is None
        assert (weights, ranks) == (torch.float32, 2)


@pytest.mark.parametrize(
    "error, expected",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), True),
        (MemoryError(), True),
        (RuntimeError("shapes differ"), False),
        (ValueError("not enough memory"), False),
    ],
)
def test_errors_for_want_of_memory(error, expected):
    assert is_of_memory(error) is expected


def test_what_the_allocator_of_cpus_raises():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58, dtype=torch.uint8)
    assert is_of_memory(caught.value)


def test_advice_that_fails_does_not_hide_the_error(monkeypatch):
    def broken(trainer):
        raise KeyError("no such model")

    monkeypatch.setattr(out_of_memory, "advice_of", broken)
    with pytest.raises(MemoryError) as caught, advised(None):
        raise MemoryError
    assert not getattr(caught.value, "__notes__", [])


def test_python_without_notes_logs(monkeypatch, caplog):
    class Old(MemoryError):
        add_note = property()  # as if Python had none

    monkeypatch.setattr(out_of_memory, "advice_of", lambda trainer: "what to do")
    with pytest.raises(Old), advised(None):
        raise Old
    assert caplog.messages == ["what to do"]
