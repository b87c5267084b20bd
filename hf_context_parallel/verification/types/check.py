"""Check of a model type: a tiny model on shards against the same model on one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from transformers import AttentionMaskInterface, DistributedConfig, PreTrainedConfig, PreTrainedModel

from ...config import ContextParallelConfig
from ...context_parallel import ContextParallel
from ...data.batch import IGNORED
from ...distributed.mesh import mesh_of
from ...integration.border.parallelize import borders_of, decoders_of, parallelize
from ...integration.checks.proofs import keep_proof
from ...integration.deferred import Deferred
from ...integration.model_registry import NAME, UNSHIFTED, known_states
from ...integration.switches import allow_unchecked_models
from .media import AUXILIARY, Batch, auto_class, media_batches
from .tiny import TEXT, configuration, is_encoder, tiny_model

DOCUMENTS = (11, 1, 2, 20, 7)
"""Lengths of the documents in the packed batch."""
ONLY_FLOAT32 = {"inkling2_loop_text", "inkling2_text", "xglm"}
"""Types that do not run in float64."""


class Errors(NamedTuple):
    """Largest differences from one process, relative to the largest entry of the tensor."""

    loss: float
    gradients: float
    parameter: str
    """Name of the parameter whose gradient differs most."""


class Unrounded(TorchFunctionMode):
    """Mode in which casts to float32 become casts to float64, such as those of norms and softmax.

    Every difference from one process is then an error, and not the rounding of float32 sums in another order.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(issubclass(x, Deferred) for x in types):  # a mode is off while it handles a function
            with self:
                return Deferred.__torch_function__(function, types, args, kwargs)
        if function is torch.Tensor.float:
            return args[0].double()
        if function is torch.Tensor.__setitem__ and isinstance(args[2], torch.Tensor):  # such as positions
            args = *args[:2], args[2].to(args[0].dtype)
        if function is torch.Tensor.scatter_add_:  # such as tokens of experts, which a padding mask weighs
            args = *args[:3], args[3].to(args[0].dtype)
        is_cast = function in (torch.Tensor.to, torch.Tensor.type)
        if is_cast:  # casts of all dtypes, since the results meet tensors that stay in float64
            args = args[:1] + tuple(torch.float64 if x is torch.float32 else x for x in args[1:])
        if is_cast or (args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64):
            kwargs = {name: torch.float64 if x is torch.float32 else x for name, x in kwargs.items()}
        return function(*args, **kwargs)


class MadeInFloat64(TorchFunctionMode):
    """Mode in which tensors that are asked for in float32 are made in float64.

    The weights of some routers are made in float32, whatever the dtype of the model. Loading keeps that dtype, and
    FSDP refuses to shard parameters of two dtypes together.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = {name: torch.float64 if x is torch.float32 else x for name, x in (kwargs or {}).items()}
        return function(*args, **kwargs)


def unrounded(config: PreTrainedConfig) -> AbstractContextManager:
    """Return `Unrounded()` for a model that runs in float64, else an empty context."""
    return Unrounded() if _dtype(config) == torch.float64 else nullcontext()


def tolerance(config: PreTrainedConfig) -> float:
    """Return the largest error of a model that counts as exact."""
    return 1e-3 if config.model_type in ONLY_FLOAT32 else 1e-8


def batches(config: PreTrainedConfig) -> dict[str, dict[str, torch.Tensor]]:
    """Make a batch of each kind that matters for a model, with labels for some of its tokens."""
    random = torch.Generator().manual_seed(0)

    def tokens(rows: int, length: int) -> dict[str, torch.Tensor]:
        input_ids = torch.randint(3, TEXT, (rows, length), generator=random)
        drawn = torch.rand(input_ids.shape, generator=random) > 0.4
        return {"input_ids": input_ids, "labels": input_ids.masked_fill(drawn, IGNORED)}

    dense, packed = tokens(2, 37), tokens(1, sum(DOCUMENTS))
    packed["position_ids"] = torch.cat([torch.arange(length) for length in DOCUMENTS])[None]
    packed["labels"] = packed["labels"].masked_fill(packed["position_ids"] == 0, IGNORED)
    kinds = {"dense": dense, "packed": packed}
    for side in ("left", "right"):
        batch = tokens(3, 29)
        mask = torch.ones_like(batch["input_ids"])
        for row, padding in ((0, 9), (1, 20)):
            mask[row, :padding] = 0
        mask = mask if side == "left" else mask.flip(1)
        first = mask.cumsum(1) == 1  # nothing is predicted from padding
        batch |= {"attention_mask": mask, "labels": batch["labels"].masked_fill((mask == 0) | first, IGNORED)}
        kinds[f"padded {side}"] = batch
    if hasattr(config, "output_router_logits") and getattr(config, "is_moe", True):  # Doge has a router or none
        kinds[AUXILIARY] = dense
    return kinds


def errors(
    config: PreTrainedConfig, settings: dict[str, Any], tp_size: int = 1, media: bool = False
) -> tuple[dict[str, Errors], dict[str, list[str]]]:
    """Run a tiny model on all ranks of the world, and compare it with one process.

    Args:
        config: the configuration of the tiny model.
        settings: keywords of `ContextParallelConfig`.
        tp_size: the number of ranks that share each layer, by Transformers' tensor parallelism.
        media: the model takes images, video or sound, which its batches have.

    Returns:
        The errors for each kind of batch, and for each class of modules the ways it was computed.

    Raises:
        Exception: any error of the model's run, a refusal included.
    """
    size = dist.get_world_size() // tp_size if dist.is_initialized() else 1
    case = Case(config, media)
    sharded = case.model(NAME) if tp_size == 1 else _tensor_parallel(case, size, tp_size)
    cp = ContextParallel(ContextParallelConfig(size=size, **settings), mesh_of(sharded))
    with allow_unchecked_models():
        parallelize(sharded, cp)  # which refuses a model before it is given a batch
    found: dict[str, Errors] = {}
    handled: dict[str, set[str]] = {}
    for kind in case.batches():
        found[kind] = error_of(case, kind, sharded, cp)
        for name, how in borders_of(sharded)[0].handled.items():
            handled.setdefault(name, set()).update(how)
    _prove(sharded, found)
    return found, {name: sorted(how) for name, how in handled.items()}


def error_of(case: Case, kind: str, sharded: PreTrainedModel, cp: ContextParallel) -> Errors:
    """Run the model on shards with a batch of one kind, and compare it with one process."""
    sharded.zero_grad(set_to_none=True)
    sharded.config.get_text_config().output_router_logits = kind == AUXILIARY
    with allow_unchecked_models(), unrounded(case.config):
        parallelize(sharded, cp)
        loss = sharded(**case.batches()[kind].inputs).loss
        loss.backward()
    referee = list(case.batches()).index(kind) % min(cp.size, 2)  # ranks 0 and 1 for all sizes, which cache references
    is_referee = not dist.is_initialized() or dist.get_rank() == referee
    truth = _reference(case, kind) if is_referee else None
    return _compare(cp, referee, truth, loss, sharded)


def errors_of(
    model: str,
    settings: dict[str, Any],
    tp_size: int,
    trust_remote_code: bool,
    module: str | None,
    media: bool = False,
) -> tuple[dict[str, Errors], dict[str, list[str]], bool]:
    """Make the configuration of a model in this process, and run `errors`. The arguments are those of both.

    A class that comes with a model is made in each process: it cannot be sent there.

    Returns:
        What `errors` returns, and True if the processor of the type made the images.
    """
    config = configuration(model, trust_remote_code, module)
    found, handled = errors(config, settings, tp_size, media)
    return found, handled, any(batch.by_processor for batch in Case(config, media).batches().values())


def _prove(model: PreTrainedModel, found: dict[str, Errors]) -> None:
    """Keep the proof of a model that was found exact and that no table has."""
    exact = all(max(errors.loss, errors.gradients) <= tolerance(model.config) for errors in found.values())
    first = not dist.is_initialized() or dist.get_rank() == 0
    if exact and first and model.config.model_type not in known_states():
        for _, decoder in decoders_of(model):
            keep_proof(decoder)


def _tensor_parallel(case: Case, fsdp_size: int, tp_size: int) -> PreTrainedModel:
    """Make the tiny model and let Transformers shard it, which it does while loading."""
    whole, config = case.model(NAME), case.config
    with MadeInFloat64() if _dtype(config) == torch.float64 else nullcontext():
        model = type(whole).from_pretrained(
            None,
            config=whole.config,
            state_dict=whole.state_dict(),
            dtype=_dtype(config),
            attn_implementation=NAME,
            distributed_config=DistributedConfig(tp_size=tp_size, fsdp_size=fsdp_size),
        )
    if _dtype(config) == torch.float64:
        model.set_experts_implementation("eager")
    for name, module in whole.named_modules():  # loading recreates some in float32, such as RoPE's frequencies
        model.get_submodule(name)._buffers.update(module._buffers)
    return model


def _dtype(config: PreTrainedConfig) -> torch.dtype:
    return torch.float32 if config.model_type in ONLY_FLOAT32 else torch.float64


class Case:
    """Tiny model with its batches. It is equal to another with the same values in its configuration.

    Args:
        config: the configuration of the tiny model.
        media: the model takes images, video or sound.
    """

    def __init__(self, config: PreTrainedConfig, media: bool = False):
        self.config = config
        self.media = media
        self._text = f"{type(config).__name__} {media} {config.to_json_string(use_diff=False)}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Case) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)

    def model(self, attn_implementation: str | None) -> PreTrainedModel:
        """Make the model."""
        auto = auto_class(self.config) if self.media else None
        with MadeInFloat64() if self.media else nullcontext():  # features meet weights of the decoder
            return tiny_model(self.config, attn_implementation, _dtype(self.config), auto=auto)

    def batches(self) -> dict[str, Batch]:
        """Make the batch of each kind, and what one process computes in its place."""
        return _batches(self)


@lru_cache(maxsize=2)
def _batches(case: Case) -> dict[str, Batch]:
    if case.media:
        with unrounded(case.config):
            return media_batches(case.model(None))
    return {kind: Batch(batch, _documents(batch, kind)) for kind, batch in batches(case.config).items()}


def _documents(batch: dict[str, torch.Tensor], kind: str) -> list[dict[str, torch.Tensor]]:
    """Return the documents of a packed batch, each alone, or the batch."""
    if kind != "packed":
        return [batch]
    return [dict(zip(batch, values)) for values in zip(*(value.split(DOCUMENTS, 1) for value in batch.values()))]


@lru_cache(maxsize=8)
def _reference(case: Case, kind: str) -> tuple[torch.Tensor, list]:
    """Compute the loss and the gradients of all parameters on one process, each packed document alone."""
    config = case.config
    # In earlier versions of Transformers, SDPA ignored softcaps, and the causal mask of Doge without padding.
    is_eager = config.model_type == "doge" or getattr(config.get_text_config(), "attn_logit_softcapping", None)
    model = case.model("eager" if is_eager else None)
    model.config.get_text_config().output_router_logits = kind == AUXILIARY
    with finite_masks(), unrounded(config):
        loss = _sum_of_parts(model, case.batches()[kind].parts)
    return loss, [parameter.grad for parameter in model.parameters()]


@contextmanager
def finite_masks() -> Iterator[None]:
    """Limit the masks of eager attention to the range of float32.

    Eager attention computes its softmax in float32, where the lowest float64 number is -inf. A row of padding would
    then become NaN.
    """
    original = AttentionMaskInterface()["eager"]

    def finite(*args: Any, **kwargs: Any):
        mask = original(*args, **kwargs)
        return None if mask is None else mask.clamp(min=torch.finfo(torch.float32).min)

    AttentionMaskInterface.register("eager", finite)
    try:
        yield
    finally:
        AttentionMaskInterface.register("eager", original)


def _sum_of_parts(model: torch.nn.Module, parts: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Run the model on each part, and compute the mean loss over the targets of all parts, with its gradients."""
    shifted = model.config.model_type not in UNSHIFTED and not is_encoder(model.config)
    counts = [(part["labels"][:, int(shifted) :] != IGNORED).sum() for part in parts]
    total = torch.zeros((), dtype=torch.float64)
    for part, count in zip(parts, counts):
        if count:
            loss = model(**part, use_cache=False).loss * count / sum(counts)
            loss.backward()
            total += loss.detach()
    return total


def _compare(
    cp: ContextParallel, referee: int, truth: tuple | None, loss: torch.Tensor, model: torch.nn.Module
) -> Errors:
    """Take the mean of the gradients over ranks on the referee, compare it and the losses there, and broadcast errors.

    Args:
        cp: the CP group.
        referee: the rank that has the reference.
        truth: loss and gradients of one process on the referee, None on other ranks.
        loss: this rank's loss, which is the same on all ranks.
        model: the model, whose parameters have this rank's gradients.
    """
    losses = _gathered(loss)
    worst, name_of_worst = 0.0, ""
    for number, (name, parameter) in enumerate(model.named_parameters()):
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if cp.groups.tensor.size > 1:  # FSDP2 has already taken the mean, on every rank
            grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
        grad = _mean(grad, referee)
        if truth is not None:
            error = _error(grad, truth[1][number])
            if not error <= worst:  # true for NaN as well
                worst, name_of_worst = error, name
    answer = [None if truth is None else Errors(max(_error(x, truth[0]) for x in losses), worst, name_of_worst)]
    if cp.size > 1:
        dist.broadcast_object_list(answer, src=referee)
    return answer[0]


def _gathered(loss: torch.Tensor) -> list[torch.Tensor]:
    """Return the losses of all ranks."""
    loss = loss.detach().double()
    losses = [torch.empty_like(loss) for _ in range(dist.get_world_size() if dist.is_initialized() else 1)]
    if dist.is_initialized():
        dist.all_gather(losses, loss)
    return losses if dist.is_initialized() else [loss]


def _mean(tensor: torch.Tensor, referee: int) -> torch.Tensor:
    """Compute the mean of a tensor over all ranks, on the referee."""
    tensor = tensor.detach().clone()
    if dist.is_initialized():
        dist.reduce(tensor, referee)
        tensor /= dist.get_world_size()
    return tensor


def _error(found: torch.Tensor, expected: torch.Tensor | None) -> float:
    expected = torch.zeros_like(found) if expected is None else expected
    least = 1e-6 if found.dtype == torch.float64 else 1e-4  # some gradients are 0 but for rounding
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=least)).item()
