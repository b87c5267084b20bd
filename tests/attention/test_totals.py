"""Tests of totals and of the fused kernel, which Triton's interpreter runs on the CPU."""

import subprocess
import sys
from itertools import product

import pytest
import torch

from hf_context_parallel.attention.merge import add_rows, merge_rows
from hf_context_parallel.attention.totals import Output, Places, Sum
from hf_context_parallel.distributed.rows import Rows
from hf_context_parallel.planning.portions import portions_of

ROWS, HEADS, DIM, KEYS = 12, 3, 4, 5
PARTS = {
    "one part with all rows": [((0, 12),)],
    "parts of different rows": [((0, 5),), ((5, 12),)],
    "two parts": [((0, 12),), ((3, 9),)],
    "many parts": [((0, 12),), ((0, 6),), ((3, 12),), ((4, 5), (7, 8), (10, 11))],
    "rows that no part has": [((1, 4), (6, 7))],
    "a part with rows twice": [((0, 4), (0, 8))],
    "many runs": [tuple((row, row + 1) for row in range(0, 12, 2)), ((0, 12),), ((11, 12), (2, 3))],
}


def outputs_of(parts, dtype):
    """Draw the scores and values of each part, and return its output and LSE, and those of all parts together."""
    random = torch.Generator().manual_seed(0)
    scores = torch.full((ROWS, HEADS, 0), 0.0, dtype=torch.float64)
    values, found = torch.zeros(ROWS, HEADS, 0, DIM, dtype=torch.float64), []
    for runs in parts:
        rows = torch.cat([torch.arange(*run) for run in runs])
        mine = torch.randn(len(rows), HEADS, KEYS, generator=random, dtype=torch.float64)
        theirs = torch.randn(len(rows), HEADS, KEYS, DIM, generator=random, dtype=torch.float64)
        output = torch.einsum("rhk,rhkd->rhd", mine.softmax(-1), theirs)
        found.append((output.to(dtype), mine.logsumexp(-1)))
        for index, row in enumerate(rows.tolist()):
            places = torch.full((ROWS, HEADS, KEYS), float("-inf"), dtype=torch.float64)
            places[row] = mine[index]
            scores = torch.cat([scores, places], -1)
            values = torch.cat([values, theirs[index].expand(ROWS, HEADS, KEYS, DIM)], 2)
    weights = scores.softmax(-1).nan_to_num()
    return found, torch.einsum("rhk,rhkd->rhd", weights, values), scores.logsumexp(-1)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("name", PARTS)
def test_outputs_are_those_over_all_keys(name, dtype, tolerance):
    parts, expected, lse = outputs_of(PARTS[name], dtype)
    output = Output(Places(portions_of(PARTS[name], ROWS)))
    for number, (part, part_lse) in enumerate(parts):
        output.add(number, part, part_lse if dtype == torch.float64 else part_lse.float())
    got, got_lse = output.value
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(got_lse.double(), lse, rtol=0, atol=max(tolerance / 100, 1e-12))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", PARTS)
def test_sums_are_rounded_once(name, dtype):
    random = torch.Generator().manual_seed(0)
    expected = torch.zeros(ROWS, HEADS, DIM, dtype=torch.float64)
    total = Sum(Places(portions_of(PARTS[name], ROWS)))
    for number, runs in enumerate(PARTS[name]):
        rows = torch.cat([torch.arange(*run) for run in runs])
        part = torch.randn(len(rows), HEADS, DIM, generator=random, dtype=torch.float64).to(dtype)
        expected.index_add_(0, rows, part.double())
        total.add(number, part)
    if dtype == torch.float64:
        torch.testing.assert_close(total.value, expected, rtol=0, atol=1e-14)
    elif name != "a part with rows twice":  # whose order of rounding is that of its rows
        torch.testing.assert_close(total.value, expected.float().to(dtype), rtol=0, atol=0)


def test_a_row_of_one_part_is_not_copied():
    part, lse = torch.randn(ROWS, HEADS, DIM).bfloat16(), torch.randn(ROWS, HEADS)
    output = Output(Places(portions_of([((0, ROWS),)], ROWS)))
    output.add(0, part, lse)
    assert output.value[0] is part


def interpreted(every: bool):
    """Compare the fused kernel with plain PyTorch. It runs in a process of its own, which sets TRITON_INTERPRET.

    Args:
        every: True for every combination of settings, False for one in seven, in which each setting occurs.
    """
    from hf_context_parallel.attention import fused

    places = [
        (Rows.of_runs([(3, 9)]), Rows.of_runs([(0, 6)])),
        (Rows.of_runs([(0, 1), (4, 6), (9, 12)]), Rows.of_runs([(2, 8)])),
        (Rows.of_runs([(3, 9)]), Rows.of_runs([(1, 2), (4, 9)])),
    ]
    torch.manual_seed(0)
    settings = product((torch.bfloat16, torch.float16, torch.float32), (False, True), places, (16, 20))
    for dtype, summed, (rows, of_part), dim in settings if every else list(settings)[::7]:
        source = torch.randn(ROWS, 5, dim).to(torch.float32 if summed else dtype)
        part, part_lse = torch.randn(5, 9, dim).to(dtype).transpose(0, 1), torch.randn(5, 9).T
        lse = torch.randn(ROWS, 5)
        part_lse[3] = lse[4] = lse[6] = float("-inf")  # of one side, and of both
        for target_dtype in (dtype, torch.float32):
            targets = [torch.zeros(ROWS, 5, dim, dtype=target_dtype) for _ in range(4)]
            logs = lse.clone(), lse.clone()
            merge_rows(source, part, targets[0], logs[0], part_lse, rows, of_part)
            fused.merge_rows(source, part, targets[1], logs[1], part_lse, rows, of_part)
            add_rows(source, part, targets[2], rows, of_part)
            fused.add_rows(source, part, targets[3], rows, of_part)
            close = 2.0**-6 if target_dtype == torch.bfloat16 else 2.0**-9 if target_dtype == torch.float16 else 1e-6
            for expected, got in ((*targets[:2],), (*targets[2:],), logs):
                # The interpreter cuts bfloat16 off where a device rounds it.
                torch.testing.assert_close(got, expected, rtol=close, atol=1e-6)


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_the_fused_kernel_computes_the_same(every):
    pytest.importorskip("triton", reason="Triton has builds for Linux alone")
    code = f"from tests.attention.test_totals import interpreted; interpreted({every})"
    environment = {"TRITON_INTERPRET": "1", "PATH": "", "PYTHONWARNINGS": "ignore", "PYTHONPATH": "."}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("merges, indexed", [(True, True), (False, False)])
def test_the_fused_kernel_compiles_for_a_gpu(merges, indexed):
    """Compile for Hopper, which needs no device. The interpreter takes more of Python than the compiler does."""
    triton = pytest.importorskip("triton", reason="Triton has builds for Linux alone")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hf_context_parallel.attention import fused

    types = {"source": "*fp32", "part": "*bf16", "target": "*bf16"}
    types |= dict.fromkeys(("lse", "part_lse"), "*fp32") if merges else {}
    types |= dict.fromkeys(("index", "index_of_part"), "*i64") if indexed else {}
    constants = {"MERGES": merges, "HEIGHT": 4, "WIDTH": 128}
    constants |= dict.fromkeys({"lse", "part_lse", "index", "index_of_part"} - types.keys())
    names = fused._combine.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    source = ASTSource(fn=fused._combine, signature=signature, constexprs=constants)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
