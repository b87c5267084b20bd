"""Self-check of a model before training: each layer on shards against the same layer on whole sequences.

A short random batch runs through the model twice: as whole sequences on every rank, and as shards. In the run on
whole sequences, each module that mixes tokens is computed a second time by another implementation of Transformers.
The difference of the two measures rounding. In the run on shards, each module gets the inputs of the run on whole
sequences, so that differences neither add up nor hide each other. Gradients are computed for one module at a time, so
neither DDP nor FSDP sees a backward pass.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from ..context_parallel import ContextParallel
from ..distributed.agreement import collective, fingerprint, gather_numbers
from ..distributed.mesh import world
from ..integration.border.parallelize import decoders_of, parallelize
from ..integration.checks.peft import check_adapters, uses_prefix
from ..integration.checks.proofs import keep_proof
from ..integration.checks.weights import numbers_of, packing_modules, refuse_non_finite
from ..integration.model_registry import outermost_models, transformers_model
from ..integration.patches.rope import follows_length
from ..integration.switches import allow_unchecked_models, several_tiles
from ..integration.tensor_parallel.plan_styles import styles_of
from ..integration.tensor_parallel.replicated import AlwaysReplicated
from .layers.batches import make_batches
from .layers.runs import TRAINED_ANYWAY, Difference, Sharded, Whole
from .whole_model import compare_model


def verify(model: torch.nn.Module, cp: ContextParallel) -> list[Difference]:
    """Compare each layer of a model on shards with the same layer on whole sequences.

    Attention and all other modules that mix tokens are compared by their outputs and the gradients of their inputs.
    Decoder layers are compared by their outputs, and the first decoder layer by its input too. With sequence
    parallelism that input is not compared, because it is the input of all tensor-parallel ranks together. A layer with
    experts is compared on most tokens only, since rounding may route a token to other experts. Then the whole model is
    compared by its loss and the gradient of its embeddings.

    A model that is found exact is admitted from then on, in this process and in later ones, though no table of the
    package has it; see `integration/checks/proofs.py`.

    Every process of the world calls this with the model that it trains, which may be quantised or wrapped by DDP, FSDP
    or PEFT. Weights, gradients, buffers, random states and training modes stay unchanged.

    Args:
        model: the model.
        cp: the `ContextParallel` of this process.

    Returns:
        The comparisons, in the order of the model.

    Raises:
        ValueError: on every rank, if a layer differs by more than rounding explains. The error names the first such
            layer. It is also raised if `parallelize` refuses the model.
    """
    if uses_prefix(model):  # which is a cache, so that its calls are not sharded
        model = transformers_model(model)
    with collective(world(), "models", "Give every process the same model.") as notes:
        for part in outermost_models(model):
            check_adapters(part)
        with allow_unchecked_models():
            parallelize(model, cp)
        with _untouched(model), _summed(model, cp), several_tiles():
            differences = _compare_batches(model, cp)
        notes.fingerprint = fingerprint({"compared": [difference[:3] for difference in differences]})
    differences = _of_all_ranks(differences, cp)
    error = _first_error(differences)
    [differs] = gather_numbers(world(), error is not None)
    if any(differs):  # which NaN in the weights explains
        refuse_non_finite(numbers_of(model), world())
    with collective(world()):
        if error is not None:
            raise error
    for inner in outermost_models(model):
        for _, decoder in decoders_of(inner):
            keep_proof(decoder)
    return differences


def _of_all_ranks(differences: list[Difference], cp: ContextParallel) -> list[Difference]:
    """Take the largest difference and bound of all ranks of the group, so that all ranks decide alike."""
    found, bound = torch.tensor([difference[3:] for difference in differences], dtype=torch.float32).view(-1, 2).T
    # A NaN counts as an infinite difference, and a bound that is NaN as 0.
    figures = torch.stack([found.nan_to_num(nan=float("inf")), bound.nan_to_num(nan=0.0)], dim=1)
    figures = figures.to(cp.groups.device)
    if cp.groups.same_batch.size > 1:
        dist.all_reduce(figures, dist.ReduceOp.MAX, group=cp.groups.same_batch.group)
    return [
        difference._replace(found=found, bound=bound)
        for difference, (found, bound) in zip(differences, figures.tolist())
    ]


def _first_error(differences: list[Difference]) -> ValueError | None:
    wrong = [each for each in differences if each.found > each.bound or not math.isfinite(each.found)]
    if not wrong:
        return None
    layer, tensor, batch, found, bound = wrong[0]
    return ValueError(
        f"{layer} is not exact on shards: for a {batch} batch, its {tensor} differs from that on whole sequences by "
        f"{found:.1e} of the largest entry, and rounding explains {bound:.1e} ({len(wrong)} of {len(differences)} "
        f"comparisons differ). Check the model type by `hf-context-parallel check`. {TRAINED_ANYWAY}"
    )


def _compare_batches(model: torch.nn.Module, cp: ContextParallel) -> list[Difference]:
    """Compute the differences on this rank, for each batch that the model accepts.

    Raises:
        ValueError: if the model accepts no batch, or has no layer to compare.
    """
    differences, refusal = [], None
    for batch in make_batches(model, cp):
        try:
            records = Whole(model, batch).run()
            differences += Sharded(model, batch, records).run()
            if len(batch.pieces) == 1:  # Transformers may let packed documents see each other
                epsilon = max((each.epsilon for calls in records.values() for each in calls), default=0.0)
                differences += compare_model(model, cp, batch, epsilon)
        except ValueError as error:  # some models refuse packed rows, or padding
            refusal = error
    if not differences:
        raise refusal or ValueError(f"{type(model).__name__} has no layer to compare. {TRAINED_ANYWAY}")
    return differences


@contextmanager
def _summed(model: torch.nn.Module, cp: ContextParallel) -> Iterator[None]:
    """Remove the hooks of Transformers on replicated parameters, in the run on whole sequences as on shards."""
    replacement = AlwaysReplicated(cp.groups.tensor.group)
    if cp.groups.tensor.size > 1:
        replacement.replace_all(styles_of(transformers_model(model)))
    try:
        yield
    finally:
        replacement.restore()


@contextmanager
def _untouched(model: torch.nn.Module) -> Iterator[None]:
    """Run the model in evaluation mode, and afterwards restore the model and all random states."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, *_kept(buffer)) for module in model.modules() for name, buffer in module._buffers.items()
    ]
    ropes = [(module, dict(vars(module))) for module in model.modules() if follows_length(module)]
    numbers = random.getstate(), numpy.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    # Dynamo would compile the model with the hooks of this comparison.
    compiler = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    model.eval()
    for module in packing_modules(model):
        module.training = True  # in evaluation they are packed anew on some CPUs, and stay rounded
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
            if isinstance(module, FSDPModule):  # the root stays gathered after a forward pass without gradients
                module.reshard()
        random.setstate(numbers[0])
        numpy.random.set_state(numbers[1])


def _kept(buffer: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return a buffer and a copy of its content.

    The content of integer buffers is not copied, because it may be all weights of a quantised model.
    """
    return buffer, buffer.clone() if buffer is not None and buffer.is_floating_point() else None
