"""A model on shards against the same model on whole sequences, layer by layer: before it is trained.

A short random batch goes through the model whole, on every rank, and once more sharded. Whole, each module that mixes
tokens runs a second time in another of Transformers' own ways, which says how much rounding alone makes of its
inputs. Sharded, it is given the whole run's inputs, so that differences neither add up nor hide behind each other.
Both runs are without a graph, but for one module's at a time, so that neither DDP nor FSDP sees a backward pass.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from ..context_parallel import ContextParallel
from ..distributed.agreement import collective, fingerprint
from ..distributed.mesh import world
from ..integration.checks.model import check_model
from ..integration.model_registry import transformers_model
from ..integration.patches.rope import follows_length
from ..integration.tensor_parallel.checks import check_parallelism
from ..integration.tensor_parallel.plan_styles import styles_of
from ..integration.tensor_parallel.replicated import ReplicatedParameters
from .layers.batches import make_batches
from .layers.runs import Difference, Sharded, Whole


def verify(model: torch.nn.Module, cp: ContextParallel) -> list[Difference]:
    """Compare each layer of a model on shards with the same layer on whole sequences.

    Token mixers (attention, and all else that mixes tokens) are compared in outputs and in gradients of their inputs,
    decoder layers in outputs, and the first of them in its input (with sequence parallelism its input is the whole
    shard's, and is not compared). A layer with experts is compared on most tokens,
    since a difference in rounding may send a token to other experts.

    Every process of the world calls this, with the model as it is trained: wrapped by DDP, FSDP or PEFT, quantised, or
    not at all. Weights, gradients, buffers, random numbers and the modules' training modes stay as they are.

    Returns:
        What was compared, in the order of the model.

    Raises:
        ValueError: on every rank alike, if a layer differs by more than rounding does, naming the first that does; or
            if the model is refused, as by `cp.shard`.
    """
    with collective(world(), "models", "All ranks must be given the same.") as notes:
        check_model(model)
        check_parallelism(model, cp.group)
        with _untouched(model), _summed(model, cp):
            differences = _compare_batches(model, cp)
        notes.fingerprint = fingerprint({"compared": [difference[:3] for difference in differences]})
    differences = _of_all_ranks(differences, cp)
    with collective(world()):
        if (error := _first_error(differences)) is not None:
            raise error
    return differences


def _of_all_ranks(differences: list[Difference], cp: ContextParallel) -> list[Difference]:
    """The group's largest, so that all of its ranks say the same."""
    found, bound = torch.tensor([difference[3:] for difference in differences], dtype=torch.float32).view(-1, 2).T
    # What is no number differs, and explains no difference.
    figures = torch.stack([found.nan_to_num(nan=float("inf")), bound.nan_to_num(nan=0.0)], dim=1)
    figures = figures.to(cp.groups.device)
    if cp.groups.same_batch.size > 1:
        dist.all_reduce(figures, dist.ReduceOp.MAX, group=cp.groups.same_batch.group)
    return [
        difference._replace(found=found, bound=bound)
        for difference, (found, bound) in zip(differences, figures.tolist())
    ]


def _first_error(differences: list[Difference]) -> ValueError | None:
    wrong = [difference for difference in differences if difference.found > difference.bound]
    if not wrong:
        return None
    layer, tensor, batch, found, bound = wrong[0]
    return ValueError(
        f"{layer} is not exact on shards: of a {batch} batch, its {tensor} differs from that on whole sequences by "
        f"{found:.1e} of the largest entry, where rounding explains {bound:.1e} ({len(wrong)} of {len(differences)} "
        "comparisons differ). Training would not be that of one process. `hf-context-parallel check` compares a model "
        "type on its own; ContextParallelConfig(verify=False) trains without this comparison."
    )


def _compare_batches(model: torch.nn.Module, cp: ContextParallel) -> list[Difference]:
    """The differences on this rank, of each batch that the model takes.

    Raises:
        ValueError: if it takes none.
    """
    differences, refusal = [], None
    for batch in make_batches(model, cp):
        try:
            records = Whole(model, batch).run()
            differences += Sharded(model, batch, records).run(cp)
        except ValueError as error:  # some models take no packed rows, or no padding
            refusal = error
    if not differences:
        raise refusal or ValueError(f"{type(model).__name__} has no layer that could be compared.")
    return differences


@contextmanager
def _summed(model: torch.nn.Module, cp: ContextParallel) -> Iterator[None]:
    """Whole sequences too run without the hooks that Transformers would leave on replicated parameters."""
    replacement = ReplicatedParameters(cp.groups.tensor.group)
    if cp.groups.tensor.size > 1:
        replacement.replace_all(styles_of(transformers_model(model)))
    try:
        yield
    finally:
        replacement.restore()


@contextmanager
def _untouched(model: torch.nn.Module) -> Iterator[None]:
    """The model runs in evaluation mode and leaves no trace: on itself, or on random numbers."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, *_kept(buffer)) for module in model.modules() for name, buffer in module._buffers.items()
    ]
    ropes = [(module, dict(vars(module))) for module in model.modules() if follows_length(module)]
    numbers = random.getstate(), numpy.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    # Dynamo would compile the model with our hooks in it.
    compiler = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    model.eval()
    try:
        with torch.random.fork_rng(devices), compiler:
            yield
    finally:
        for module, training in modes:
            module.training = training
        for module, state in ropes:
            vars(module).update(state)
        for module, name, buffer, content in buffers:
            if content is not None:
                buffer.copy_(content)
            module._buffers[name] = buffer
        for module in model.modules():
            if isinstance(module, FSDPModule):  # the outermost stays gathered after a pass without gradients
                module.reshard()
        random.setstate(numbers[0])
        numpy.random.set_state(numbers[1])


def _kept(buffer: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """A buffer and its content. That of integers is not written to: it may be all of a quantised model."""
    return buffer, buffer.clone() if buffer is not None and buffer.is_floating_point() else None
