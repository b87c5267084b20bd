"""Comparison of a whole model on shards with the model on whole sequences: loss, outputs, and a gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..compat import causal_lm_classes, tree_leaves
from ..context_parallel import ContextParallel
from ..data.batch import IGNORED
from ..integration.border.decoder import reads_ids
from ..integration.border.parallelize import decoders_of, whole
from ..integration.checks.model import stock_class
from ..integration.model_registry import outermost_models
from ..integration.switches import computed_otherwise, sharded_on_one_rank
from .layers.batches import Batch
from .layers.runs import FLOOR, MARGIN, ROUTED, Difference

MODEL = "the whole model"
"""Name of the model in differences."""
COARSE = 1e-4
"""Epsilon of a dtype above which rounding may route tokens to other experts."""


def compare_model(model: torch.nn.Module, cp: ContextParallel, batch: Batch, epsilon: float) -> list[Difference]:
    """Compare the Transformers models inside a module: their loss, and the gradient of their embeddings.

    Models whose parameters are sharded are compared by their loss alone. Models with experts are compared in float32
    and wider alone, since rounding may route a token to other experts.

    Args:
        model: the model, which `parallelize` has prepared.
        batch: a batch of whole rows.
        epsilon: the coarsest epsilon that its layers compute with.
    """
    return [difference for inner in outermost_models(model) for difference in _compare(inner, cp, batch, epsilon)]


def _compare(model: PreTrainedModel, cp: ContextParallel, batch: Batch, epsilon: float) -> Iterator[Difference]:
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    epsilon = max(epsilon, torch.finfo(dtype).eps)
    if epsilon > COARSE and any(ROUTED.fullmatch(type(part).__name__) for part in model.modules()):
        return
    graded = not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    graded = graded and not any(reads_ids(decoder) for _, decoder in decoders_of(model))
    with whole(model):
        try:
            first = _run(model, batch, graded, 0.0)
        except RuntimeError:  # a few models write into what backward needs
            graded = False
            first = _run(model, batch, graded, 0.0)
        with computed_otherwise():
            second = _run(model, batch, graded, epsilon)
    with sharded_on_one_rank():
        found = _run(model, batch, graded, 0.0)
    if graded and cp.size > 1:  # the mean over the ranks is the gradient of one process
        dist.all_reduce(found["input gradient"], group=cp.groups.group)
        found["input gradient"] /= cp.size
    for name, expected in first.items():
        largest = max(float(expected.abs().max()), torch.finfo(torch.float32).tiny)
        rounding = float((second[name] - expected).abs().max()) / largest
        error = float((found[name] - expected).abs().max()) / largest
        yield Difference(MODEL, name, batch.kind, error, max(MARGIN * rounding, FLOOR * epsilon))


def _run(model: PreTrainedModel, batch: Batch, graded: bool, noise: float) -> dict[str, torch.Tensor]:
    """Run a model, and return its loss, or a sum of its outputs, and the gradient of its embeddings, in float64.

    Args:
        graded: whether to compute the gradient.
        noise: relative change of the embeddings.
    """
    inputs = dict(batch.inputs)
    if stock_class(model, causal_lm_classes().values()) is not None:
        near = ~batch.real | ~torch.nn.functional.pad(batch.real, (1, 0), value=True)[:, :-1]
        inputs["labels"] = inputs["input_ids"].masked_fill(near.to(inputs["input_ids"].device), IGNORED)
    if not graded:
        with torch.no_grad():
            return {"loss": _objective(model(**inputs)).double()[None]}
    with _leaf(model, noise) as leaves, torch.enable_grad():
        loss = _objective(model(**inputs))
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    gradient = sum(x.double() for x in gradients if x is not None)
    return {"loss": loss.detach().double()[None], "input gradient": gradient}


@contextmanager
def _leaf(model: PreTrainedModel, noise: float) -> Iterator[list[torch.Tensor]]:
    """Let the embeddings return leaves of the graph in this block, and yield the list of them."""
    leaves: list[torch.Tensor] = []

    def detach(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        signs = torch.sign(torch.randn(output.shape, generator=torch.Generator().manual_seed(2))).to(output)
        leaves.append((output * (1 + noise * signs)).detach().requires_grad_())
        return leaves[-1]

    hook = model.get_input_embeddings().register_forward_hook(detach)
    try:
        yield leaves
    finally:
        hook.remove()


def _objective(output: Any) -> torch.Tensor:
    """Return the loss, or a sum of all outputs with random weights."""
    if isinstance(output, Mapping) and output.get("loss") is not None:
        return output["loss"]
    total = torch.zeros(())
    for x in tree_leaves(dict(output) if isinstance(output, Mapping) else output):
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(x)
            total = total.to(x) + (x * weights).mean()
    return total
