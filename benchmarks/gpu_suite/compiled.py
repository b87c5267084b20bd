"""Prepared models that `torch.compile` has compiled, compared with the same models without it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch._dynamo.testing import CompileCounterWithBackend

import hf_context_parallel as hcp
from hf_context_parallel.integration.switches import sharded_on_one_rank
from hf_context_parallel.verification.types.tiny import VOCABULARY, tiny_config, tiny_model

from .models import EXACT, difference, whole_step

GRAPHS = 6
"""Most graphs of a model, however many layers it has."""
OF_EAGER = 2.0
"""Largest error in bfloat16 as a multiple of the error without compiling, both against float32."""


class Case(NamedTuple):
    """Way to run the model: kernel, dtype, and with gradient checkpointing or without."""

    kernel: str
    dtype: torch.dtype
    checkpointed: bool

    def __str__(self) -> str:
        return f"{str(self.dtype)[6:]}, kernel={self.kernel!r}{', checkpointed' * self.checkpointed}"


CASES = [Case("reference", torch.float32, False), Case("auto", torch.bfloat16, True)]


def run(options: Namespace) -> Iterator[dict[str, Any]]:
    device = torch.device(options.device)
    with sharded_on_one_rank():
        for case in CASES[:1] if device.type == "cpu" else CASES:
            yield compared(case, device)


def compared(case: Case, device: torch.device) -> dict[str, Any]:
    """Compare steps of a compiled model of four layers with those of the same model in float32 on one process."""
    small = device.type == "cpu"
    config = tiny_config("llama", num_hidden_layers=2 if small else 4)
    input_ids = torch.randint(3, VOCABULARY, (2, 150), generator=torch.Generator().manual_seed(0)).to(device)
    batch = {"input_ids": input_ids, "labels": input_ids}
    truth = tiny_model(config, None, torch.float32).to(device).train()
    true_loss = whole_step(truth, batch)
    cp = hcp.ContextParallel(hcp.ContextParallelConfig(size=1, kernel=case.kernel))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager" if small else "inductor")
    errors = {}
    for way in ("eager", "compiled"):
        model = hcp.parallelize(tiny_model(config, "context_parallel", torch.float32), cp).to(device, case.dtype)
        model.train()
        if case.checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if way == "compiled":
            model.compile(backend=counter)
        for _ in range(1 if small else 2):  # the second step compiles nothing
            model.zero_grad()
            loss = whole_step(model, batch)
        errors[way] = difference(model, loss, truth, true_loss)
    limit = EXACT if case.dtype == torch.float32 else OF_EAGER * errors["eager"]
    right = errors["compiled"] <= limit and 0 < counter.frame_count <= GRAPHS
    return {"what": f"llama, {case}", "right": right, "graphs": counter.frame_count, **errors}
