"""The kernels on one GPU: are they right, and does a ring of them keep the speed of one call?

    python -m benchmarks.gpu

Parity: every kernel that is here computes a sequence cut to several ranks, simulated by threads of this process, and
outputs and gradients are compared with the reference kernel's on the whole sequence in float32. Messages are slow and
go from memory to memory on streams of their own, so what does not wait for them, or frees what they use, shows.

Speed: each rank's ring steps, forward and backward through `planned_attention` with messages that are already there,
against one call of the same kernel on the whole sequence, in TFLOP/s.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from hf_context_parallel.attention.kernels.base import Kernel
from hf_context_parallel.attention.kernels.registry import KERNELS
from hf_context_parallel.attention.ring import planned_attention
from hf_context_parallel.attention.scores import Scores
from hf_context_parallel.distributed.messages import Exchange, GroupExchange
from hf_context_parallel.planning.layout import zigzag
from hf_context_parallel.planning.mask import Mask, Pattern, from_cu_seqlens, whole_rows
from hf_context_parallel.planning.plan import Plan, build_plan
from hf_context_parallel.planning.tiles import CAUSAL, Segments

from . import report
from .simulation import PreparedExchange, ThreadGroup

TOLERANCE = {"bfloat16": 2e-2, "float16": 4e-3}  # of a tensor's largest entry
AIM = 0.95  # of one call's TFLOP/s
WARM_UP = 2  # runs before those that count
DELAY = 1_000_000  # cycles that messages take on top when results are compared, about half a millisecond


class Shape(NamedTuple):
    heads: int
    key_heads: int
    head_dim: int


SHAPES = (Shape(8, 8, 64), Shape(8, 2, 96), Shape(4, 1, 128))


def masks(length: int) -> dict[str, Mask]:
    """One document, documents of one token and of several chunks, and windows; causal and not."""
    edges = torch.tensor([0, 1, length // 5, length // 5 + 3, length // 2 + 1, length])
    packed = (from_cu_seqlens(edges, length),)
    window = length // 6
    return {
        "one document": Mask(length, whole_rows(1, length)),
        "packed": Mask(length, packed),
        "packed, bidirectional": Mask(length, packed, Pattern(causal=False)),
        "a window": Mask(length, whole_rows(1, length), Pattern(sliding_window=window)),
        "packed, a window": Mask(length, packed, Pattern(sliding_window=window)),
        "packed, a bidirectional window": Mask(length, packed, Pattern(causal=False, sliding_window=window)),
    }


def random_tensors(shape: Shape, tokens: int, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """Query, key, value and the gradient of the output, `[tokens, heads, head_dim]`."""
    torch.manual_seed(0)
    heads = (shape.heads, shape.key_heads, shape.key_heads, shape.heads)
    return [torch.randn(tokens, n, shape.head_dim, device=device, dtype=dtype) for n in heads]


def forward_backward(tensors: list[torch.Tensor], plan: Plan, exchange: Exchange, kernel: Kernel):
    """The output and the gradients of query, key and value, of one rank."""
    *inputs, grad_output = (tensor.detach() for tensor in tensors)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    scores = Scores(inputs[0].shape[-1] ** -0.5)
    output = planned_attention(*inputs, plan=plan, exchange=exchange, kernel=kernel, scores=scores)
    return output.detach(), *torch.autograd.grad(output, inputs, grad_output)


def errors(kernel: Kernel, shape: Shape, mask: Mask, dtype: torch.dtype, device: torch.device, size: int) -> dict:
    """For the output and each gradient the largest error, as a fraction of the largest entry."""
    tensors = random_tensors(shape, mask.length, dtype, device)
    alone = build_plan(zigzag(mask.length, 1), mask, 0)
    exact = [tensor.float() for tensor in tensors]
    expected = forward_backward(exact, alone, GroupExchange(None), KERNELS["reference"]())
    layout = zigzag(mask.length, size)
    positions = [layout.positions(rank).to(device) for rank in range(size)]

    def work(rank: int, exchange: Exchange):
        shard = [tensor[positions[rank]] for tensor in tensors]
        return forward_backward(shard, build_plan(layout, mask, rank), exchange, kernel)

    results = zip(*ThreadGroup(size, DELAY).run(work))
    return {
        what: ((torch.cat(parts).float() - whole[torch.cat(positions)]).abs().max() / whole.abs().max()).item()
        for what, parts, whole in zip(("output", "dq", "dk", "dv"), results, expected)
    }


def check_parity(kernels: list[Kernel], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The errors of every kernel, dtype, mask and shape that it takes."""
    device = torch.device(options.device)
    results = []
    cases = list(product(kernels, options.dtypes, masks(options.parity_tokens).items(), SHAPES))
    for kernel, dtype, (name, mask), shape in tqdm(cases, desc="parity", unit="case"):
        case = {"kernel": kernel.name, "dtype": dtype, "mask": name, **shape._asdict()}
        found = errors(kernel, shape, mask, getattr(torch, dtype), device, options.parity_ranks)
        # Written so that a NaN is no success.
        results.append({**case, "errors": found, "right": all(e <= TOLERANCE[dtype] for e in found.values())})
    return results


def time_runs(runs: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of each, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in tqdm(range(WARM_UP + repeats), desc="timing", unit="turn"):
        for name, run in runs.items():
            elapsed = _milliseconds(run, device)
            if turn >= WARM_UP:
                times[name].append(elapsed)
    return {name: median(values) for name, values in times.items()}


def _milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def time_kernel(kernel: Kernel, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds and TFLOP/s of one call on the whole sequence, and of every rank's steps."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtypes[0])
    shape = Shape(options.heads, options.kv_heads, options.head_dim)
    length = options.ranks * options.tokens
    layout, mask = zigzag(length, options.ranks), Mask(length, whole_rows(1, length))
    plans = [build_plan(layout, mask, rank) for rank in range(options.ranks)]
    whole = random_tensors(shape, length, dtype, device)
    shard = [tensor[: options.tokens] for tensor in whole]
    exchange = PreparedExchange(torch.cat([tensor[-options.tokens :] for tensor in whole[1:3]], dim=-1))
    segments = Segments(((0, length),), ((0, length),), CAUSAL)

    def one_call():
        *inputs, grad_output = whole
        scores = Scores(shape.head_dim**-0.5)
        output, lse = kernel.forward(*inputs, segments, scores)
        kernel.backward(grad_output, *inputs, output, lse, segments, scores)

    runs: dict[str, Callable[[], Any]] = {"one call": one_call}
    for plan in plans:
        runs[f"rank {plan.rank}"] = lambda plan=plan: forward_backward(shard, plan, exchange, kernel)
    pairs = {"one call": segments.pairs, **{f"rank {plan.rank}": plan.pairs for plan in plans}}
    results = []
    for name, milliseconds in time_runs(runs, options.repeats, device).items():
        # Two products of 2 * head_dim operations a pair and head forward, and five backward.
        teraflops = 14 * shape.head_dim * shape.heads * pairs[name] / milliseconds / 1e9
        results.append({"kernel": kernel.name, "run": name, "milliseconds": milliseconds, "teraflops": teraflops})
    return [{**result, "efficiency": result["teraflops"] / results[0]["teraflops"]} for result in results]


def page(parity: list[dict[str, Any]], speed: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """The results as Markdown."""
    wrong = [result for result in parity if not result["right"]]
    tolerances = " and ".join(f"{TOLERANCE[dtype]} in {dtype}" for dtype in options.dtypes)
    parity_rows = [
        (
            *(str(value) for value in list(result.values())[:6]),
            *(f"{error:.1e}" for error in result["errors"].values()),
        )
        for result in parity
    ]
    headers = ["kernel", "dtype", "mask", "heads", "key heads", "head dim", "output", "dq", "dk", "dv"]
    speed_rows = [
        (
            result["kernel"],
            result["run"],
            f"{result['milliseconds']:.2f}",
            f"{result['teraflops']:.4g}",
            f"{result['efficiency']:.3f}",
        )
        for result in speed
    ]
    ring = {result["kernel"]: [] for result in speed}
    for result in speed:
        ring[result["kernel"]] += [result["efficiency"]] if result["run"] != "one call" else []
    verdicts = [
        f"{kernel}: {'met' if min(values) >= AIM else 'MISSED'}, {min(values):.3f} of one call's TFLOP/s on the "
        f"slowest rank with {AIM} the aim"
        for kernel, values in ring.items()
    ]
    return "\n\n".join(
        [
            f"## Parity\n\n{len(parity) - len(wrong)} of {len(parity)} cases are within the tolerance, "
            f"{tolerances}. Largest errors as fractions of the largest entry, {options.parity_tokens:,} tokens on "
            f"{options.parity_ranks} simulated ranks.",
            report.table(headers, parity_rows),
            f"## Speed\n\nForward and backward of one causal document, {options.tokens:,} tokens a rank on "
            f"{options.ranks} simulated ranks, {options.heads} query heads on {options.kv_heads} key heads of "
            f"{options.head_dim}, {options.dtypes[0]}; medians of {options.repeats}.",
            report.table(["kernel", "run", "ms", "TFLOP/s", "of one call's"], speed_rows),
            "\n".join(f"- {verdict}" for verdict in verdicts),
        ]
    )


def present_kernels(options: argparse.Namespace) -> tuple[list[Kernel], list[str]]:
    """The kernels to measure, and why others are absent."""
    kernels, absent = [], []
    for name, kernel in KERNELS.items():
        head_dim = max(options.head_dim, *(shape.head_dim for shape in SHAPES))
        reasons = [kernel.missing()]
        for dtype in options.dtypes:
            scores = Scores(head_dim**-0.5)
            dtype = getattr(torch, dtype)
            reasons.append(kernel().refusal(torch.device(options.device), dtype, head_dim, head_dim, scores))
        reason = next(filter(None, reasons), None)
        if name == "reference":
            continue
        if reason:
            absent.append(f"kernel={name!r} is left out: {reason}")
        else:
            kernels.append(kernel())
    return kernels, absent


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu tries the same code on sizes that a CPU can do")
    parser.add_argument("--dtypes", type=report.comma_separated(), default=["bfloat16", "float16"])
    parser.add_argument("--parity-ranks", type=int, default=4)
    parser.add_argument("--parity-tokens", type=int, default=1500)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32768, help="tokens a rank whose steps are timed")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder for gpu.md and .json")
    options = parser.parse_args(arguments)
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        print("PyTorch sees no CUDA device. --device cpu tries the same code on small sizes.", file=sys.stderr)
        return 2

    kernels, absent = present_kernels(options)
    print(*absent, sep="\n", file=sys.stderr)
    if not kernels:
        return 2
    parity = check_parity(kernels, options)
    speed = [result for kernel in kernels for result in time_kernel(kernel, options)]
    facts = report.machine()
    data = {"machine": facts, "parity": parity, "speed": speed, "absent": absent}
    text = f"{report.described(facts)}\n\n{page(parity, speed, options)}"
    report.write(options.output, "gpu", "Kernels on one device", text, data)
    return 0 if all(result["right"] for result in parity) else 1


if __name__ == "__main__":
    sys.exit(main())
