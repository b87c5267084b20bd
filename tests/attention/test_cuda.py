"""Tests of streams and of the allocator on a CUDA device. They need such a device.

On the CPU, test_side_stream.py checks what the streams wait for.
"""

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig

import hf_context_parallel as hcp
from benchmarks.simulation import ThreadGroup
from hf_context_parallel.attention.kernels.registry import choose_kernel
from hf_context_parallel.distributed import messages as exchanges
from hf_context_parallel.integration.switches import sharded_on_one_rank
from hf_context_parallel.planning.layout import zigzag
from hf_context_parallel.planning.mask import Mask, whole_rows
from tests.helpers.ring import dense, on_rank, tensors

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
WAYS = {"p2p": 1, "all_gather": 1, "a2a": 4, "a2a+p2p": 2}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("comm_type", WAYS)
def test_slow_messages_are_waited_for(comm_type, groups):
    """Delay messages for far longer than kernels take, so that memory used or freed too early changes the results."""
    mask = Mask(1024, whole_rows(1, 1024))
    layout, whole = zigzag(mask.length, 4), tensors(mask, heads=16, key_heads=8, dtype=torch.float32)
    on_device = [x.cuda() for x in whole]

    def work(rank, exchange):
        exchange.rank = rank
        kernel = choose_kernel("reference", "cuda")
        return on_rank(exchange, layout, mask, on_device, kernel, way=(comm_type, WAYS[comm_type]), groups=groups)

    shards = ThreadGroup(4, delay=20_000_000).run(work)
    for index, truth in enumerate(dense(mask, *whole)):
        for rank, shard in enumerate(shards):
            expected = truth[:, layout.positions(rank)].flatten(0, 1).float()
            torch.testing.assert_close(shard[index].cpu(), expected, rtol=1e-4, atol=1e-4)


def test_memory_of_messages_is_used_again_at_once():
    other, messages = torch.cuda.Stream(), torch.empty(1 << 22, device="cuda")
    address = messages.data_ptr()
    with torch.cuda.stream(other):
        torch.cuda._sleep(1_000_000_000)
    exchanges._unrecorded(messages).record_stream(other)
    del messages
    assert torch.empty(1 << 22, device="cuda").data_ptr() == address


def staged_sum() -> float:
    """Sum of the tensors that a rank of a gloo group receives on its device."""
    group = exchanges.GroupExchange(dist.group.WORLD)
    rank = dist.get_rank()
    sent, received = torch.full((1000,), rank + 1.0, device="cuda"), torch.empty(1000, device="cuda")
    group.post([(1 - rank, sent)], [(1 - rank, received)]).wait()
    return received.sum().item()


def test_gloo_stages_messages_through_the_host(on_ranks):
    assert on_ranks(2, staged_sum) == [2000, 1000]


SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8}
SIZES |= {"head_dim": 64, "vocab_size": 64}


def step_of(place: str) -> tuple[int, list[torch.Tensor]]:
    """Return the bytes on the device between forward and backward of a checkpointed model, and its gradients.

    The gradients are on the host, where they do not count in the next step.
    """
    config = LlamaConfig(**SIZES)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="context_parallel", dtype=torch.bfloat16)
    cp = hcp.ContextParallel(hcp.ContextParallelConfig(size=1, attention_checkpoints=place))
    model = hcp.parallelize(model.cuda().train(), cp)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    ids = torch.arange(8192, device="cuda")[None] % 64
    with sharded_on_one_rank():
        loss = model(input_ids=ids, labels=ids).loss
    held = torch.cuda.memory_allocated()
    loss.backward()
    return held, [parameter.grad.cpu() for parameter in model.parameters()]


def test_attention_kept_on_the_host_is_that_of_the_device():
    step_of("off")  # the first backward of a thread allocates what cuBLAS keeps
    off, device, host = map(step_of, ("off", "device", "host"))
    one_layer = 8192 * 8 * (64 * 2 + 4)
    assert device[0] - off[0] >= 6 * one_layer
    assert host[0] - off[0] <= 2 * one_layer  # the last layer's is let go of in backward
    for other in (device, host):
        assert all(a.equal(b) for a, b in zip(other[1], off[1], strict=True))
