"""Adapters of other packages, run over our kernel, so that only the communication differs.

Each package gets the tokens in its own layout. A run names the positions that this rank holds.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.metadata import version
from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist

from hf_context_parallel.attention.kernels.base import Kernel
from hf_context_parallel.attention.scores import Scores
from hf_context_parallel.planning.layout import contiguous, zigzag
from hf_context_parallel.planning.mask import Mask
from hf_context_parallel.planning.plan import build_own_plan
from hf_context_parallel.planning.tiles import CAUSAL, FULL, Band, Segments

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class MissingPeer(Exception):
    """Error for a peer that is not installed. The message says how to get it."""


class UnsuitablePeer(Exception):
    """Error for a peer that does not support the case."""


class Layer(NamedTuple):
    """Layer of a case: queries, keys, values `[S, H, D]` and the gradient of the output, of the whole batch."""

    whole: list[torch.Tensor]
    mask: Mask
    kernel: Kernel
    scores: Scores
    group: dist.ProcessGroup

    @property
    def lengths(self) -> list[int]:
        """Lengths of the documents."""
        return [document[-1][1] - document[0][0] for document in self.mask.rows[0]]

    @property
    def window(self) -> int | None:
        return self.mask.pattern.sliding_window


Run = Callable[[], tuple[torch.Tensor, ...]]
"""Forward and backward: the output `[T, H, D]` and the gradients of query, key and value, for the tokens at
`positions`."""


def _run(layer: Layer, positions: torch.Tensor, function: Callable[..., torch.Tensor]) -> Run:
    """Make a run of the differentiable `function(query, key, value)` for `[T, H, D]`."""
    inputs = [tensor[positions].requires_grad_() for tensor in layer.whole[:3]]
    grad_output = layer.whole[3][positions]

    def run():
        output = function(*inputs)
        return output.detach(), *torch.autograd.grad(output, inputs, grad_output)

    run.positions = positions
    return run


def _zigzag(layer: Layer) -> torch.Tensor:
    return zigzag(layer.mask.length, dist.get_world_size(layer.group)).positions(dist.get_rank(layer.group))


def _contiguous(layer: Layer) -> torch.Tensor:
    return contiguous(layer.mask.length, dist.get_world_size(layer.group)).positions(dist.get_rank(layer.group))


def _one_document_only(layer: Layer) -> None:
    if len(layer.lengths) > 1 or layer.window is not None:
        raise UnsuitablePeer("it takes only one document without a window")


def ring_flash_attn_zigzag(layer: Layer) -> Run:
    """Zigzag ring of ring-flash-attn, for inputs `[1, T, H, D]`."""
    _one_document_only(layer)
    function = _import_ring_flash_attn(layer.kernel).zigzag_ring_flash_attn_func
    how = {"softmax_scale": layer.scores.scale, "causal": True, "group": layer.group}
    return _run(layer, _zigzag(layer), lambda *inputs: function(*(x[None] for x in inputs), **how)[0])


def ring_flash_attn_zigzag_varlen(layer: Layer) -> Run:
    """Zigzag ring of ring-flash-attn for packed documents, each of which is dealt in zigzag."""
    if layer.window is not None or len(layer.lengths) == 1:
        raise UnsuitablePeer("it takes no windows, and for one document it equals the other zigzag ring")
    function = _import_ring_flash_attn(layer.kernel).zigzag_ring_flash_attn_varlen_func
    size, rank = dist.get_world_size(layer.group), dist.get_rank(layer.group)
    starts = [document[0][0] for document in layer.mask.rows[0]]
    if any(length % (2 * size) for length in layer.lengths):
        raise UnsuitablePeer("it takes only documents whose length is a multiple of twice the number of ranks")
    positions = torch.cat([start + zigzag(n, size).positions(rank) for start, n in zip(starts, layer.lengths)])
    cu_seqlens = torch.tensor([0, *layer.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32) // size
    how = {"softmax_scale": layer.scores.scale, "causal": True, "group": layer.group}
    longest = max(layer.lengths) // size
    return _run(layer, positions, lambda *inputs: function(*inputs, cu_seqlens, longest, **how))


def ring_flash_attn_llama3(layer: Layer) -> Run:
    """All-gather of ring-flash-attn (as in the training of Llama 3), for contiguous tokens, all heads at once."""
    package = _import_ring_flash_attn(layer.kernel)
    edges = torch.tensor([0, *layer.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    size, rank = dist.get_world_size(layer.group), dist.get_rank(layer.group)
    lengths = package.llama3_flash_attn_prepare_cu_seqlens(edges, True, rank, size)
    window = (-1, -1) if layer.window is None else (layer.window - 1, 0)
    how = {"heads_k_stride": layer.whole[1].shape[1], "local_k_slice": lengths[4], "window_size": window}
    how |= {"softmax_scale": layer.scores.scale, "causal": True, "group": layer.group}
    function = package.llama3_flash_attn_varlen_func
    return _run(layer, _contiguous(layer), lambda *inputs: function(*inputs, *lengths[:4], **how))


def ringmaster_ulysses(layer: Layer) -> Run:
    """Ulysses of axolotl-ringmaster: its exchanges around our kernel, fused as in that package.

    On gloo the package gathers all tensors and keeps a part. Here it gets the all-to-all that it uses on NCCL, which
    gloo supports too.
    """
    try:
        comm = importlib.import_module("ringmaster.comm")
    except ImportError as error:
        raise MissingPeer("ringmaster is not installed. Run: pip install axolotl-ringmaster --no-deps") from error
    comm.dist = _module("dist", **{**vars(dist), "get_backend": lambda group: "nccl"})
    size = dist.get_world_size(layer.group)
    if layer.whole[1].shape[1] % size:
        raise UnsuitablePeer("it takes only numbers of key heads that are multiples of the number of ranks")
    calls = build_own_plan(zigzag(layer.mask.length, 1), layer.mask, 0).steps[0].calls

    def function(query, key, value):
        heads_first = [x.transpose(0, 1)[None] for x in (query, key, value)]
        if query.shape[1] == key.shape[1]:
            whole = comm.seq_all_to_all(torch.stack(heads_first), 2, 3, layer.group).unbind()
        else:
            keys = comm.seq_all_to_all(torch.stack(heads_first[1:]), 2, 3, layer.group)
            whole = comm.seq_all_to_all(heads_first[0], 1, 2, layer.group), *keys.unbind()
        output = _OneRank.apply(*(_tokens_first(x) for x in whole), layer, calls)
        return comm.seq_all_to_all(output[None], 1, 2, layer.group)[0]

    return _run(layer, _contiguous(layer), function)


class _OneRank(torch.autograd.Function):
    """Attention of whole sequences `[S, H, D]`, computed by the kernel."""

    @staticmethod
    def forward(ctx, query, key, value, layer, calls):
        output, lse = torch.empty_like(query), torch.empty(query.shape[:2])
        for call in calls:
            part, part_lse = layer.kernel.forward(query, key, value, call, layer.scores)
            _put(output, call.query_runs, part)
            _put(lse, call.query_runs, part_lse)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.how = layer, calls
        return output

    @staticmethod
    def backward(ctx, grad_output):
        layer, calls = ctx.how
        grads = [torch.empty_like(x) for x in ctx.saved_tensors[:3]]
        for call in calls:
            parts = layer.kernel.backward(grad_output.contiguous(), *ctx.saved_tensors, call, layer.scores)
            for grad, part, runs in zip(grads, parts, (call.query_runs, call.key_runs, call.key_runs)):
                _put(grad, runs, part)
        return *grads, None, None


def _put(target: torch.Tensor, runs, rows: torch.Tensor) -> None:
    """Copy rows to these ranges of the target."""
    for part, (start, stop) in zip(rows.split([stop - start for start, stop in runs]), runs):
        target[start:stop] = part


def torch_ring(layer: Layer) -> Run:
    """Ring of torch.distributed's experimental context parallelism, for inputs `[1, H, T, D]`."""
    _one_document_only(layer)
    try:
        ring = importlib.import_module("torch.distributed.tensor.experimental._context_parallel._attention")
        ring_forward, ring_backward = ring._templated_ring_attention, ring._templated_ring_attention_backward
    except (ImportError, AttributeError) as error:
        raise MissingPeer(f"torch {torch.__version__} has no known ring attention. Install torch 2.13") from error
    positions = _zigzag(layer)
    query, key, value, grad_output = (_heads_first(x[positions]).contiguous() for x in layer.whole)

    def forward(query, key, value, is_causal, scale):
        output, lse = _forward(layer.kernel, *map(_tokens_first, (query, key, value)), is_causal, scale)
        return _heads_first(output), lse.T[None]

    def backward(grad_output, query, key, value, out, logsumexp, is_causal, scale):
        tensors = map(_tokens_first, (grad_output, query, key, value, out))
        grads = _backward(layer.kernel, *tensors, logsumexp[0].T, is_causal, scale)
        return tuple(_heads_first(grad) for grad in grads)

    def run():
        settings = {"is_causal": True, "scale": layer.scores.scale}
        output, lse = ring_forward(layer.group, 2, forward, query, key, value, **settings)
        tensors = (grad_output, "grad_output", query, key, value, output, lse)
        grads = ring_backward(layer.group, 2, backward, *tensors, **settings)
        return tuple(_tokens_first(tensor) for tensor in (output, *grads))

    run.positions = positions
    return run


def versions() -> str:
    """Versions of the peers that are installed."""
    found = []
    for name in ("ring-flash-attn", "axolotl-ringmaster"):
        try:
            found.append(f"{name} {version(name)}")
        except ImportError:
            found.append(f"no {name}")
    return ", ".join(found)


def _import_ring_flash_attn(kernel: Kernel) -> ModuleType:
    """Import the package, with `kernel` in place of flash-attn's functions."""

    def forward(q, k, v, softmax_scale, causal, **unused):
        output, lse = _forward(kernel, q[0], k[0], v[0], causal, softmax_scale)
        return output[None], lse.T[None], None, None

    def backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, softmax_scale, causal, **unused):
        grads = _backward(kernel, dout[0], q[0], k[0], v[0], out[0], softmax_lse[0].T, causal, softmax_scale)
        for buffer, grad in zip((dq, dk, dv), grads):
            buffer[0].copy_(grad)  # flash-attn writes into given buffers; torch's CPU operator cannot

    # The package looks in the signature to see if a window is one argument.
    def varlen_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_size=(-1, -1), **unused):
        tiles = _tiles(cu_seqlens_q, cu_seqlens_k, causal, window_size)
        output, lse = kernel.forward(q, k, v, tiles, Scores(softmax_scale))
        return output.to(q.dtype), lse.T, None, None

    def varlen_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, window_size=(-1, -1), **how):
        tiles = _tiles(how["cu_seqlens_q"], how["cu_seqlens_k"], how["causal"], window_size)
        grads = kernel.backward(dout, q, k, v, out, softmax_lse.T, tiles, Scores(how["softmax_scale"]))
        for buffer, grad in zip((dq, dk, dv), grads):
            buffer.copy_(grad)

    interface = _module(
        "flash_attn.flash_attn_interface",
        _flash_attn_forward=forward,
        _flash_attn_backward=backward,
        _flash_attn_varlen_forward=varlen_forward,
        _flash_attn_varlen_backward=varlen_backward,
    )
    # The adapters are not needed here, and import names that Transformers 5 no longer has.
    adapters = _module("ring_flash_attn.adapters", substitute_hf_flash_attn=None, update_ring_flash_attn_params=None)
    stand_ins = {module.__name__: module for module in (_module("flash_attn"), interface, adapters)}
    originals = {name: sys.modules.get(name) for name in stand_ins}
    sys.modules.update(stand_ins)
    try:
        package = importlib.import_module("ring_flash_attn")
        rings = [importlib.import_module(f"ring_flash_attn.zigzag_ring_flash_attn{kind}") for kind in ("", "_varlen")]
    except ModuleNotFoundError as error:
        raise MissingPeer("ring-flash-attn is not installed. Run: pip install ring-flash-attn --no-deps") from error
    finally:  # else other packages would take the stand-ins for flash-attn
        for name, module in originals.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    for ring in rings:
        ring.torch = _module(
            "torch", **{**vars(torch), "empty": lambda *a, **kw: torch.empty(*a, **kw).as_subclass(_Buffer)}
        )
    return package


class _Buffer(torch.Tensor):
    """Gradient buffer that the zigzag ring of ring-flash-attn reuses at each step.

    The package keeps the first gradient as `buffer.to(torch.float32)`. For float32 inputs, which flash-attn does not
    support, that is the buffer itself, and the next step would overwrite it. So `to` makes a copy here, as it does for
    bfloat16.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    def to(self, dtype: torch.dtype) -> torch.Tensor:
        return self.as_subclass(torch.Tensor).to(dtype, copy=True)


def _module(name: str, **contents) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(contents)
    return module


def _forward(kernel: Kernel, query, key, value, causal: bool, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the output `[Q, H, D]` in the dtype of `query`, as flash-attention does, and the LSE `[Q, H]`."""
    output, lse = kernel.forward(query, key, value, _tile(query, key, causal), Scores(scale))
    return output.to(query.dtype), lse


def _backward(kernel: Kernel, grad_output, query, key, value, output, lse, causal: bool, scale: float) -> Gradients:
    """Compute the gradients in the dtype of `query`."""
    grads = kernel.backward(grad_output, query, key, value, output, lse, _tile(query, key, causal), Scores(scale))
    return tuple(grad.to(query.dtype) for grad in grads)


def _tiles(cu_queries: torch.Tensor, cu_keys: torch.Tensor, causal: bool, window_size) -> Segments:
    """Make segments of cumulative lengths, aligned at the bottom right as in flash-attn."""
    queries, keys = (tuple(zip(edges[:-1], edges[1:])) for edges in (cu_queries.tolist(), cu_keys.tolist()))
    left = None if window_size[0] < 0 else window_size[0]
    return Segments(queries, keys, Band(left, 0 if causal else None))


def _tile(query: torch.Tensor, key: torch.Tensor, causal: bool) -> Segments:
    return Segments(((0, len(query)),), ((0, len(key)),), CAUSAL if causal else FULL)


def _heads_first(tensor: torch.Tensor) -> torch.Tensor:
    """View `[T, H, D]` as `[1, H, T, D]`."""
    return tensor.transpose(0, 1)[None]


def _tokens_first(tensor: torch.Tensor) -> torch.Tensor:
    """View `[1, H, T, D]` as `[T, H, D]`."""
    return tensor[0].transpose(0, 1)
