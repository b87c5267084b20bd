"""Tests of kept attention: models on ranks against one process, and what a step computes and sends."""

import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import hf_context_parallel as hcp
from hf_context_parallel.attention.host_memory import HostMemory
from hf_context_parallel.attention.tape import Record, Tape, active_pass, with_tape
from hf_context_parallel.verification.types.check import Unrounded
from tests.helpers.border import batch_for, errors_of, model_with
from tests.helpers.models import context, document_positions, error, some_labels, tokens

KINDS = {"non-reentrant": False, "reentrant": True}
WAYS = {
    "p2p": {"comm_type": "p2p"},
    "all_gather": {"comm_type": "all_gather"},
    "a2a": {"comm_type": "a2a"},
    "a2a+p2p": {"comm_type": "a2a+p2p", "a2a_size": 2},
    "p2p in groups": {"comm_type": "p2p", "head_groups": 2},
    "a2a+p2p in groups": {"comm_type": "a2a+p2p", "a2a_size": 2, "head_groups": 2},
}
PACKED = {
    "input_ids": tokens(1, 37),
    "labels": some_labels(tokens(1, 37)),
    "position_ids": document_positions(1, 11, 2, 23),
    "use_cache": False,  # with a cache, Transformers does not see the documents
}
MODELS = {
    "grouped heads": ("qwen3", {}, None),
    "equal heads": ("qwen3", {"num_attention_heads": 4, "num_key_value_heads": 4}, None),
    "three heads": ("qwen3", {"num_attention_heads": 3, "num_key_value_heads": 1}, None),
    "windows": ("gemma3_text", {}, None),
    "sinks": ("gpt_oss", {}, None),
    "other head dim of values": ("deepseek_v3", {}, None),
    "packed": ("qwen3", {}, PACKED),
}


def checkpointed(model: torch.nn.Module, reentrant: bool, **more) -> torch.nn.Module:
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant, **more})  # since Transformers 5.24
    return model


def recomputed_unrounded(model: torch.nn.Module, reentrant: bool) -> None:
    """Checkpoint a model whose layers run in the mode `Unrounded`, which is off in backward."""
    checkpointed(model, reentrant)

    def function(run, *args):
        def unrounded(*args):
            with Unrounded():
                return run(*args)

        return checkpoint(unrounded, *args, use_reentrant=reentrant)

    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = function


def worst_error(reentrant: bool, name: str, settings: dict) -> float:
    model_type, changes, batch = MODELS[name]
    prepare = partial(recomputed_unrounded, reentrant=reentrant)
    return errors_of("causal", model_type, changes, batch, settings, prepare)


KEEPING = [("non-reentrant", "device"), ("reentrant", "host"), ("non-reentrant", "host"), ("reentrant", "device")]
CASES = [(name, way, *keeping) for name in MODELS for way in WAYS for keeping in KEEPING]
QUICK = [
    case
    for case in CASES
    if (case[2:] == KEEPING[0] and (case[1] == "p2p" or case[0] in ("sinks", "three heads")))
    or (case[2:] == KEEPING[0] and case[0] == "equal heads" and case[1].endswith("in groups"))
    or (case[2:] == KEEPING[1] and case[0] == "packed")
]


@pytest.mark.parametrize(
    "name, way, kind, place",
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.exhaustive) for case in CASES],
)
def test_kept_attention_is_exact(on_ranks, name, way, kind, place):
    settings = WAYS[way] | {"attention_checkpoints": place}
    ranks = 4 if way.startswith("a2a+p2p") else 3 if way != "a2a" else 2
    assert max(on_ranks(ranks, worst_error, KINDS[kind], name, settings)) < 1e-7


def test_kept_attention_of_one_rank_is_exact():
    assert worst_error(False, "grouped heads", {"attention_checkpoints": "device"}) < 1e-7
    plain, kept = (counted(kind, {"attention_checkpoints": "device"}) for kind in (None, False))
    assert kept == plain and kept["forward"] > 0


@contextmanager
def counting(cp: hcp.ContextParallel, counts: Counter) -> Iterator[None]:
    """Count the kernel calls, messages and bytes of this rank in this block."""
    kernel, post = cp.group.kernel(torch.device("cpu")), cp.exchange.post

    def noted(name, function, *args):
        counts[name] += 1
        return function(*args)

    def posted(sends, receives):
        counts["messages"] += len(sends)
        counts["bytes"] += sum(x.nbytes for _, x in sends)
        return post(sends, receives)

    cp.exchange.post = posted
    both = {"forward": kernel.forward, "backward": kernel.backward}
    vars(kernel).update({name: partial(noted, name, function) for name, function in both.items()})
    try:
        yield
    finally:
        del kernel.forward, kernel.backward, cp.exchange.post


def counted(reentrant: bool | None, settings: dict, batch: dict | None = None) -> Counter:
    """Count what a step computes and sends on this rank. Without `reentrant`, no layer is computed again."""
    cp, counts, heads = context(**settings), Counter(), MODELS["equal heads"][1]
    model = hcp.parallelize(model_with("causal", "qwen3", "context_parallel", **heads).train(), cp)
    if reentrant is not None:
        checkpointed(model, reentrant)
    with counting(cp, counts):
        model(**(batch or batch_for("causal"))).loss.backward()
    return counts


@pytest.mark.parametrize(
    "way, kind",
    [
        pytest.param(way, kind, marks=pytest.mark.exhaustive if kind == "reentrant" and way != "a2a" else ())
        for way in WAYS
        for kind in KINDS
    ],
)
def test_a_step_computes_and_sends_what_it_does_without_checkpointing(on_ranks, way, kind):
    for batch in (None, PACKED):
        plain, again, kept = (
            on_ranks(4, counted, reentrant, WAYS[way] | {"attention_checkpoints": place}, batch)
            for reentrant, place in [(None, "off"), (KINDS[kind], "off"), (KINDS[kind], "device")]
        )
        for rank in range(4):
            for name in ("forward", "backward", "messages"):
                assert kept[rank][name] == plain[rank][name]
            assert again[rank]["forward"] == 2 * plain[rank]["forward"] > 0
            assert again[rank]["messages"] > plain[rank]["messages"] > 0
        sent = [sum(counts["bytes"] for counts in ranks) for ranks in (plain, kept, again)]
        assert sent[0] == sent[1] < sent[2] if not way.startswith("a2a") else sent[0] < sent[1] <= sent[2]


def gradients(model: torch.nn.Module, *batches: dict, times: int = 1) -> list[torch.Tensor]:
    """Compute the gradients of a sum of losses. Dropout is the same in each call."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    loss = sum(model(**batch).loss for batch in batches)
    for number in range(times):
        loss.backward(retain_graph=number + 1 < times)
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def largest(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(error(a, b) for a, b in zip(found, expected, strict=True))


def differences_by_keeping(place: str) -> dict[str, float]:
    """Compare kept attention with attention that is not checkpointed at all, on this rank, in cases of their own."""
    cp, off = context(comm_type="p2p", attention_checkpoints=place), context(comm_type="p2p")
    kind = "qwen3", "context_parallel"
    kept, plain = (
        hcp.parallelize(model_with("causal", *kind, attention_dropout=0.3).train(), each) for each in (cp, off)
    )
    checkpointed(kept, reentrant=False)
    first, second = batch_for("causal"), PACKED
    found = {
        "dropout": largest(gradients(kept, first), gradients(plain, first)),
        "two batches in one loss": largest(gradients(kept, first, second), gradients(plain, first, second)),
        "backward twice": largest(gradients(kept, first, times=2), gradients(plain, first, times=2)),
    }
    return found


@pytest.mark.parametrize("place", ["device", "host"])
def test_kept_attention_changes_nothing(on_ranks, place):
    for found in on_ranks(2, differences_by_keeping, place):
        assert max(found.values()) < 1e-12, found


def nested(on_host: bool) -> tuple[float, int, int]:
    """Compare nested checkpoints with none: gradients, and the number of kernel calls of each."""
    cp, kept = context(comm_type="p2p"), lambda run: partial(checkpoint, with_tape(run, on_host), use_reentrant=False)
    x = torch.randn(1, 2, 8, 4, dtype=torch.float64, requires_grad=True)

    def attend(x):
        return cp.attention(x, x, x)

    def layers(keep, x):
        return keep(lambda x: attend(keep(lambda x: attend(x).sin())(attend(x).sin())).sin())(x)

    calls = []
    for keep in (lambda run: run, kept):
        calls.append(Counter())
        with counting(cp, calls[-1]):
            (gradient,) = torch.autograd.grad(layers(keep, x).pow(2).sum(), x)
        calls[-1]["gradient"] = gradient
    plain, found = calls
    return error(found["gradient"], plain["gradient"]), plain["forward"], found["forward"]


@pytest.mark.parametrize("on_host", [False, True])
def test_nested_checkpoints_share_a_tape(on_ranks, on_host):
    for difference, plain, found in on_ranks(2, nested, on_host):
        assert difference < 1e-12 and plain == found > 3


def policy(_, operator, *args, **kwargs) -> CheckpointPolicy:
    products = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
    return CheckpointPolicy.MUST_SAVE if operator in products else CheckpointPolicy.PREFER_RECOMPUTE


def error_with_a_policy(place: str) -> float:
    """Compare gradients with a policy that keeps products of matrices. Our reference kernel makes some too."""
    settings = {"comm_type": "p2p", "kernel": "reference", "attention_checkpoints": place}
    kept, plain = (
        hcp.parallelize(model_with("causal", "qwen3", "context_parallel").train(), context(**settings))
        for _ in range(2)
    )
    checkpointed(kept, False, context_fn=partial(create_selective_checkpoint_contexts, policy))
    return largest(gradients(kept, batch_for("causal")), gradients(plain, batch_for("causal")))


@pytest.mark.parametrize("place", ["device", "host"])
def test_a_policy_for_single_operators_decides_alone(on_ranks, place):
    assert max(on_ranks(2, error_with_a_policy, place)) < 1e-12


def tapes_left() -> list[int]:
    """Count the tapes that are alive before and after backward."""
    cp = context(comm_type="p2p", attention_checkpoints="host")
    model = hcp.parallelize(model_with("causal", "qwen3", "context_parallel").train(), cp)
    checkpointed(model, reentrant=False)
    gc.collect()
    gc.disable()  # a tape ends with the graph, and does not wait for the collector
    loss = model(**batch_for("causal")).loss
    counts = [sum(isinstance(x, Tape) for x in gc.get_objects())]
    loss.backward()
    gc.enable()
    return [*counts, sum(isinstance(x, Tape) for x in gc.get_objects())]


def test_a_tape_ends_with_the_graph_of_its_layer(on_ranks):
    layers = model_with("causal", "qwen3", None).config.num_hidden_layers
    assert on_ranks(2, tapes_left) == [[layers, 0]] * 2


class Layer(torch.nn.Module):
    """Attention that is another one when it is computed again."""

    def __init__(self, cp: hcp.ContextParallel, what: str):
        super().__init__()
        self.cp, self.what, self.passes = cp, what, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        heads = x[:, :1] if self.what == "fewer heads" and self.passes > 1 else x
        output = self.cp.attention(heads, heads, heads)
        if self.what == "one more" and self.passes > 1:
            output = self.cp.attention(output, x, x)
        return output if output.shape == x.shape else output.expand_as(x)


def message_of(what: str, on_host: bool) -> str:
    layer = Layer(context(comm_type="p2p"), what)
    x = torch.randn(1, 2, 8, 4, dtype=torch.float64).requires_grad_()
    output = checkpoint(with_tape(layer, on_host), x, use_reentrant=True)  # which does not compare tensors itself
    try:
        output.sum().backward()
    except RuntimeError as raised:
        assert active_pass() is None
        return str(raised)
    return ""


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("what, said", [("fewer heads", "where its first pass"), ("one more", "no more attention")])
def test_a_replay_that_differs_is_refused(on_ranks, what, said, on_host):
    for message in on_ranks(2, message_of, what, on_host):
        assert said in message and "attention_checkpoints='off'" in message


@pytest.mark.parametrize("on_host", [False, True])
def test_an_output_that_was_changed_in_place_is_refused(on_host):
    record, output = Record((), None, on_host), torch.ones(3, 2)
    record.keep(output, torch.ones(3))
    output.mul_(2)
    with pytest.raises(RuntimeError, match=r"in place.*attention_checkpoints='off'"):
        record.fetch()
        record.kept()


def test_host_memory_copies_and_lets_go():
    memory, x = HostMemory(torch.device("cpu")), torch.arange(6.0)
    held = memory.hold(x, x[:2])
    assert memory._leaving is not None
    held.fetch()
    assert memory._leaving is None
    tensors = held.tensors()
    for found, expected in zip(tensors, (x, x[:2]), strict=True):
        assert found.equal(expected) and found.data_ptr() != expected.data_ptr()
    gone = weakref.ref(tensors[0])
    del tensors, found
    assert gone() is None
    assert held.tensors()[0].equal(x)  # another pass fetches them again
