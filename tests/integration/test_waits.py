"""Tests that a step does not wait for the device: the host reads nothing that a device computes or was sent."""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist

from hf_context_parallel import parallelize
from hf_context_parallel.distributed import buffers, host
from hf_context_parallel.integration.switches import switches
from tests.helpers.device_reads import PretendedDevice
from tests.helpers.models import context, some_labels, tiny_model, tokens

# Losses are in float32, in Transformers too.
AGREEMENT = {"weights_differ"}
"""Functions in which ranks wait for each other."""
PACKED = torch.cat([torch.arange(length) for length in (13, 1, 27, 7)])[None]


def batch_of(kind: str, seed: int) -> dict[str, torch.Tensor]:
    ids = tokens(1 if kind == "packed" else 2, 48, seed)
    batch = {"input_ids": ids, "labels": some_labels(ids, seed)}
    if kind == "packed":
        return batch | {"position_ids": PACKED}
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    return batch | {"attention_mask": mask, "labels": batch["labels"].masked_fill(mask == 0, -100)}


def reads_of_third_step(kind: str, model_type: str, alone: bool) -> tuple[list[tuple[str, str]], list[float]]:
    """Train three steps, the last on a pretended device.

    Returns:
        What the host read of the device in that step, and the losses of all steps.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(switches, "shards_on_one_rank", alone)
        patch.setattr(buffers, "SMALL", 1 << 40)  # the pool of buffers on the CPU makes tensors of arrays
        model, cp = tiny_model(model_type, "context_parallel").train(), context(kernel="reference")
        parallelize(model, cp)
        optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
        for step in range(3):
            device, batch = PretendedDevice(), batch_of(kind, step)
            with device if step == 2 else nullcontext():
                if step == 2:
                    device.put(*model.parameters(), *model.buffers())
                    batch = device.moved(batch)
                loss = model(**batch).loss
                loss.backward()
                if not alone:
                    for parameter in model.parameters():
                        dist.all_reduce(parameter.grad)
                        parameter.grad /= dist.get_world_size()
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
            losses.append(loss.item())
    return device.reads, losses


def stock_losses(kind: str, model_type: str) -> list[float]:
    model, losses = tiny_model(model_type, "sdpa").train(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        loss = model(**batch_of(kind, step), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", ["packed", "padded"])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_one_rank_waits_for_nothing(kind, model_type):
    reads, losses = reads_of_third_step(kind, model_type, True)
    assert reads == []
    assert losses == pytest.approx(stock_losses(kind, model_type), rel=1e-6)


def test_ranks_wait_for_each_other_alone(on_ranks):
    expected = stock_losses("packed", "llama")
    for reads, losses in on_ranks(2, reads_of_third_step, "packed", "llama", False):
        assert {function for _, function in reads} <= AGREEMENT
        assert losses == pytest.approx(expected, rel=1e-6)


def test_reads_are_found():
    x = torch.arange(3.0)
    with PretendedDevice() as device:
        x.sum().item(), x.tolist()
        device.put(x)
        y = x * 2
        y[y > 1], y.sum().item(), bool(y[0] == 0), y.nonzero(), x.tolist(), y.cpu()
    assert {name for name, _ in device.reads} == {"index", "_local_scalar_dense", "nonzero", "tolist", "cpu"}


def test_values_are_remembered_until_they_are_written():
    source = torch.arange(4)
    copy, other = (torch.empty(4, device="meta", dtype=torch.int64) for _ in range(2))
    host.remember(copy, source)
    assert host.on_host(copy) is source
    with pytest.raises(NotImplementedError):
        host.on_host(other)
    copy.add_(1)
    with pytest.raises(NotImplementedError):
        host.on_host(copy)
    host.remember(other, source)
    source.add_(1)
    with pytest.raises(NotImplementedError):
        host.on_host(other)
    known = len(host._known)
    del other
    assert len(host._known) == known - 1


def test_the_host_follows_labels_as_a_loss_shifts_them():
    labels = torch.arange(8).view(2, 4)
    with PretendedDevice() as device:
        twin = host.Twin.of(device.moved({"labels": labels})["labels"])
        shifted = torch.nn.functional.pad(twin, (0, 1), value=-100)[..., 1:].contiguous().view(-1).to("cpu")
        values, plain = host.values_of(shifted)
        assert values.tolist() == [1, 2, 3, -100, 5, 6, 7, -100] and not device.has(values)
        assert type(plain) is torch.Tensor and device.has(plain) and not device.reads
        twin[0, 1] = 7  # what is written on the device is read from there
        values, _ = host.values_of(twin[..., 1:])
        assert values.tolist() == [[7, 2, 3], [5, 6, 7]] and device.reads
