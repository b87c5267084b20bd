"""The rings that others wrote, driven over our kernel, so that what differs is the ring alone.

Both keep zigzag's order of tokens. Each gets its inputs in the layout that it wants.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.metadata import version
from types import ModuleType

import torch

from hf_context_parallel.kernels.base import Kernel, Scores
from hf_context_parallel.plan import CAUSAL, FULL, Segments

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class MissingPeer(Exception):
    """A peer that is not installed. The message says how to get it."""


def ring_flash_attn_zigzag(layer) -> Callable[[], tuple[torch.Tensor, ...]]:
    """ring-flash-attn's zigzag ring, for inputs `[1, T, H, D]`."""
    function = _import_ring_flash_attn(layer.kernel).zigzag_ring_flash_attn_func
    inputs = [tensor[None].detach().requires_grad_() for tensor in layer.inputs]

    def run():
        output = function(*inputs, softmax_scale=layer.scores.scale, causal=True, group=layer.group)
        grads = torch.autograd.grad(output, inputs, layer.grad_output[None])
        return tuple(tensor.detach()[0] for tensor in (output, *grads))

    return run


def torch_ring(layer) -> Callable[[], tuple[torch.Tensor, ...]]:
    """The ring of torch.distributed's experimental context parallelism, for inputs `[1, H, T, D]`."""
    try:
        ring = importlib.import_module("torch.distributed.tensor.experimental._context_parallel._attention")
        ring_forward, ring_backward = ring._templated_ring_attention, ring._templated_ring_attention_backward
    except (ImportError, AttributeError) as error:
        raise MissingPeer(f"torch {torch.__version__} has no ring attention where torch 2.13 has it") from error
    query, key, value, grad_output = (_heads_first(x).contiguous() for x in (*layer.inputs, layer.grad_output))

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

    return run


def versions() -> str:
    """The peers' versions, as far as they are here."""
    try:
        return f"ring-flash-attn {version('ring-flash-attn')}"
    except ImportError:
        return "no ring-flash-attn"


def _import_ring_flash_attn(kernel: Kernel) -> ModuleType:
    """The package, with `kernel` where it imports flash-attn's functions."""

    def forward(q, k, v, softmax_scale, causal, **unused):
        output, lse = _forward(kernel, q[0], k[0], v[0], causal, softmax_scale)
        return output[None], lse.T[None], None, None

    def backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, softmax_scale, causal, **unused):
        grads = _backward(kernel, dout[0], q[0], k[0], v[0], out[0], softmax_lse[0].T, causal, softmax_scale)
        for buffer, grad in zip((dq, dk, dv), grads):
            buffer[0].copy_(grad)  # flash-attn writes where it is told; torch's CPU operator cannot

    varlen = dict.fromkeys(("_flash_attn_varlen_forward", "_flash_attn_varlen_backward"))  # imported, not called
    interface = _module(
        "flash_attn.flash_attn_interface", _flash_attn_forward=forward, _flash_attn_backward=backward, **varlen
    )
    # The adapters, which nobody needs here, import names that Transformers 5 no longer has.
    adapters = _module("ring_flash_attn.adapters", substitute_hf_flash_attn=None, update_ring_flash_attn_params=None)
    stand_ins = {module.__name__: module for module in (_module("flash_attn"), interface, adapters)}
    originals = {name: sys.modules.get(name) for name in stand_ins}
    sys.modules.update(stand_ins)
    try:
        package = importlib.import_module("ring_flash_attn")
        zigzag = importlib.import_module("ring_flash_attn.zigzag_ring_flash_attn")
    except ModuleNotFoundError as error:
        raise MissingPeer("ring-flash-attn is not installed: pip install ring-flash-attn --no-deps") from error
    finally:  # or others would take the stand-ins for flash-attn
        for name, module in originals.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    zigzag.torch = _module(
        "torch", **{**vars(torch), "empty": lambda *a, **kw: torch.empty(*a, **kw).as_subclass(_Buffer)}
    )
    return package


class _Buffer(torch.Tensor):
    """What ring-flash-attn's zigzag has gradients written to, again and again.

    It keeps the first as `buffer.to(torch.float32)`. Of float32 inputs, which flash-attn does not take, that is the
    buffer itself, and the next step would overwrite it: so it is a copy here, as it is of bfloat16 ones.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    def to(self, dtype: torch.dtype) -> torch.Tensor:
        return self.as_subclass(torch.Tensor).to(dtype, copy=True)


def _module(name: str, **contents) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(contents)
    return module


def _forward(kernel: Kernel, query, key, value, causal: bool, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `[Q, H, D]` in the dtype of `query`, as a flash-attention function returns it, and LSE `[Q, H]`."""
    output, lse = kernel.forward(query, key, value, _tile(query, key, causal), Scores(scale))
    return output.to(query.dtype), lse


def _backward(kernel: Kernel, grad_output, query, key, value, output, lse, causal: bool, scale: float) -> Gradients:
    """The gradients in the dtype of `query`."""
    grads = kernel.backward(grad_output, query, key, value, output, lse, _tile(query, key, causal), Scores(scale))
    return tuple(grad.to(query.dtype) for grad in grads)


def _tile(query: torch.Tensor, key: torch.Tensor, causal: bool) -> Segments:
    return Segments(((0, len(query)),), ((0, len(key)),), CAUSAL if causal else FULL)


def _heads_first(tensor: torch.Tensor) -> torch.Tensor:
    """`[T, H, D]` as `[1, H, T, D]`."""
    return tensor.transpose(0, 1)[None]


def _tokens_first(tensor: torch.Tensor) -> torch.Tensor:
    """`[1, H, T, D]` as `[T, H, D]`."""
    return tensor[0].transpose(0, 1)
