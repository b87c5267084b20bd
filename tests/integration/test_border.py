"""Prepared models on ranks against the same models on one process: outputs, losses and gradients."""

from __future__ import annotations

import copy
import functools
import gc
import types
import weakref

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_outputs import CausalLMOutputWithPast

import hf_context_parallel as hcp
from hf_context_parallel.compat import tree_leaves
from hf_context_parallel.integration.border.chunked_loss import chunked_sum
from hf_context_parallel.integration.border.parallelize import borders_of
from hf_context_parallel.integration.switches import allow_unchecked_models
from tests.helpers.border import batch_for, errors_of, mean_gradients, model_with
from tests.helpers.models import context, document_positions, error, labelled, some_labels, tokens

NO_PADDING = labelled()
LEFT = {name: value.flip(1) for name, value in batch_for("causal").items()}

IMAGES = torch.zeros(3, 19, dtype=torch.long)
"""Token types with two images in the first row, one in the second, and none in the third."""
IMAGES[0, 2:6] = IMAGES[0, 7:11] = IMAGES[1, 4:17] = 1

LANGUAGE_MODELS = {
    "rows": ("llama", {}, NO_PADDING),
    "padding": ("llama", {}, batch_for("causal")),
    "labels at padding": ("llama", {}, batch_for("causal") | {"labels": tokens(3, 19)}),
    "padding on the left": ("qwen3", {}, LEFT),
    "a scale of logits": ("cohere", {}, NO_PADDING),
    "divided logits": ("granite", {}, NO_PADDING),
    "softcaps": ("gemma2", {}, NO_PADDING),
    "sinks and windows": ("gpt_oss", {}, NO_PADDING),
    "tied embeddings": ("gemma3_text", {"tie_word_embeddings": True}, NO_PADDING),
    "biases": ("phi", {}, NO_PADDING),
    "the squares of logits": ("bamba", {"z_loss_coefficient": 0.1}, batch_for("causal")),
    "masks of a composite": ("gemma3", {}, batch_for("causal")),
    "blocks of images": ("gemma3", {}, batch_for("causal") | {"token_type_ids": IMAGES}),
    "labels of their own tokens": ("xlm", {}, NO_PADDING),
    "a window": ("mistral", {"sliding_window": 5}, batch_for("causal")),
    "hidden states": ("llama", {"output_hidden_states": True}, batch_for("causal")),
}
HEADS = {
    "sequence": ("llama", {"pad_token_id": 0}),
    "token": ("qwen2", {"classifier_dropout": 0.0}),
    "question": ("llama", {}),
    "base": ("llama4_text", {"attention_chunk_size": 4}),
}
ENCODERS = {
    "base": ("bert", {}),
    "masked": ("modernbert", {}),
    "sequence": ("bert", {}),
    "token": ("eurobert", {}),
    "question": ("roberta", {}),
    "choice": ("bert", {}),
}
MODELS = {
    **{kind: ("causal", *case) for kind, case in LANGUAGE_MODELS.items()},
    **{f"{head} of a decoder": (head, *case, None) for head, case in HEADS.items()},
    **{f"{head} of an encoder": (head, *case, None) for head, case in ENCODERS.items()},
}
SIMPLER = {
    "rows",
    "masks of a composite",
    "padding",
    "divided logits",
    "biases",
    "hidden states",
    "tied embeddings",
    "sinks and windows",
    "sequence of an encoder",
    "token of an encoder",
    "question of an encoder",
}
"""Cases that make test-all runs alone."""


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.exhaustive] * (case in SIMPLER)) for case in MODELS]
)
def test_models_return_what_one_process_returns(on_ranks, case):
    """Compare outputs in training and evaluation, at padding too, and the mean of the gradients."""
    head, model_type, changes, batch = MODELS[case]
    for ranks in (2, 3):
        assert max(on_ranks(ranks, errors_of, head, model_type, changes, batch)) < 1e-7


@pytest.mark.parametrize(
    "settings",
    [
        {"comm_type": "all_gather"},
        pytest.param({"comm_type": "a2a"}, marks=pytest.mark.exhaustive),
        pytest.param({"layout": "contiguous"}, marks=pytest.mark.exhaustive),
    ],
)
def test_padding_reads_by_every_strategy(on_ranks, settings):
    assert max(on_ranks(2, errors_of, "base", "llama", {}, None, settings)) < 1e-7


def packed_errors() -> float:
    """Compare packed documents, which are described in several ways, with each document alone."""
    lengths = (7, 1, 12, 3)
    whole, sharded = (model_with("causal", "llama", name) for name in (None, "context_parallel"))
    hcp.parallelize(sharded, context())
    ids = tokens(1, sum(lengths))
    labels = some_labels(ids).masked_fill(document_positions(*lengths) == 0, -100)
    count = (labels != -100).sum()
    expected = torch.zeros((), dtype=torch.float64)
    for part, targets in zip(ids.split(lengths, 1), labels.split(lengths, 1)):
        if (targets != -100).any():
            expected = expected + whole(input_ids=part, labels=targets, num_items_in_batch=count).loss
    expected.backward()
    edges = torch.tensor([0, *lengths]).cumsum(0).int()
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    positions = document_positions(*lengths)
    ways = ({}, {"seq_idx": numbers}, {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": 12})
    worst = 0.0
    for way in ways:
        sharded.zero_grad()
        found = sharded(input_ids=ids, labels=labels, position_ids=positions, **way).loss
        found.backward()
        gradients = zip(mean_gradients(sharded), whole.parameters())
        worst = max(worst, error(found, expected), *(error(a, b.grad) for a, b in gradients))
    return worst


def test_packed_documents_stay_apart(on_ranks):
    assert max(on_ranks(3, packed_errors)) < 1e-6


# Wrappers


def stock_loop(model: torch.nn.Module, batches: list[dict]) -> list[float]:
    """Take steps of plain SGD, without any factor."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained(wrapper: str, checkpointing: dict | None, first: bool) -> float:
    """Train a wrapped model by the stock loop, and return the largest error of losses and weights."""
    batches = [labelled(seed=number) for number in range(3)]
    whole, model = (model_with("causal", "llama", name).train() for name in (None, "context_parallel"))
    losses = stock_loop(whole, batches)
    cp = context()
    wrapped = model
    if first:
        hcp.parallelize(model, cp)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(checkpointing)
    if wrapper == "DDP":
        wrapped = DistributedDataParallel(model)
    elif wrapper == "FSDP2":
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    hcp.parallelize(wrapped, cp)
    found = stock_loop(wrapped, batches)
    pairs = zip(model.parameters(), whole.parameters())
    weights = [error(a.full_tensor() if isinstance(a, DTensor) else a, b) for a, b in pairs]
    return max(*weights, *(abs(a - b) / b for a, b in zip(found, losses)))


@pytest.mark.parametrize(
    "checkpointing",
    [pytest.param(None, marks=pytest.mark.exhaustive), {"use_reentrant": False}, {"use_reentrant": True}],
)
@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
def test_the_stock_loop_trains_as_on_one_process(on_ranks, wrapper, checkpointing):
    for first in (True, False):
        assert max(on_ranks(2, trained, wrapper, checkpointing, first)) < 1e-6


def peft_errors(tuner: str) -> float:
    from peft import AdaLoraConfig, LoraConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model

    config = {
        "LoRA": lambda: LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False),
        "AdaLoRA": lambda: AdaLoraConfig(
            target_modules=["q_proj"], total_step=10, tinit=1, tfinal=2, task_type="CAUSAL_LM"
        ),
        "prompt tuning": lambda: PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
        "p-tuning": lambda: PromptEncoderConfig(
            num_virtual_tokens=5, encoder_hidden_size=8, task_type="CAUSAL_LM", encoder_dropout=0.0
        ),
    }[tuner]
    models = []
    for name in (None, "context_parallel"):
        model = model_with("causal", "llama", name)
        torch.manual_seed(1)
        models.append(get_peft_model(model, config()).double().train())
    whole, sharded = models
    hcp.parallelize(sharded, context())
    batch = batch_for("causal")
    expected, found = whole(**batch).loss, sharded(**batch).loss
    expected.backward()
    found.backward()
    pairs = zip(mean_gradients(sharded), whole.parameters())
    return max(error(found, expected), *(error(a, b.grad) for a, b in pairs if b.grad is not None))


@pytest.mark.parametrize(
    "tuner", ["LoRA", pytest.param("AdaLoRA", marks=pytest.mark.exhaustive), "prompt tuning", "p-tuning"]
)
def test_tuners_are_exact(on_ranks, tuner):
    assert max(on_ranks(2, peft_errors, tuner)) < 1e-6


def positioned() -> dict[str, torch.Tensor]:
    """Make a batch that one rank computes like several."""
    return labelled() | {"position_ids": torch.arange(19).expand(2, -1)}


def test_an_adapter_that_counts_places_of_whole_rows_is_refused():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj"], alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM")
    model = get_peft_model(model_with("causal", "llama", "context_parallel"), config)
    cp = context()
    hcp.parallelize(model, cp)
    with pytest.raises(ValueError, match=r"alora_invocation_tokens=\[5, 6\]: it acts from a place"):
        model(**positioned())
    with cp.whole(model):
        assert model(**labelled()).loss.isfinite()


# Several models and batches


def several_errors(checkpointing: dict | None) -> float:
    """Compare a loss over two batches, and over two models that see the same batch."""
    worst = 0.0
    for kind in ("towers", "teacher"):
        results = []
        for name in (None, "context_parallel"):
            student = model_with("causal", "llama", name).train()
            teacher = copy.deepcopy(student) if kind == "teacher" else student
            if name is not None:
                hcp.parallelize(student, context())
                hcp.parallelize(teacher, context())
            if checkpointing is not None:
                student.gradient_checkpointing_enable(checkpointing)
            one, two = tokens(2, 19), tokens(3, 11, seed=4)
            if kind == "towers":
                first, second = (student.model(x).last_hidden_state.mean(1) for x in (one, two))
                loss = torch.logsumexp(first @ second.T, dim=-1).sum()
            else:
                with torch.no_grad():
                    for parameter in teacher.parameters():
                        parameter.mul_(1.01)
                    wanted = teacher(one).logits.log_softmax(-1)
                loss = torch.nn.functional.kl_div(student(one).logits.log_softmax(-1), wanted, log_target=True)
            loss.backward()
            results.append(
                (loss.detach(), mean_gradients(student) if name else [p.grad for p in student.parameters()])
            )
        (expected, theirs), (found, mine) = results
        pairs = [(a, b) for a, b in zip(mine, theirs) if b is not None]
        worst = max(worst, error(found, expected), *(error(a, b) for a, b in pairs))
    return worst


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}])
def test_losses_over_two_batches_and_two_models_are_exact(on_ranks, checkpointing):
    assert max(on_ranks(2, several_errors, checkpointing)) < 1e-6


def recomputed_errors() -> float:
    """Recompute the whole model in backward, as gradient caches do."""
    whole, sharded = (model_with("causal", "llama", name) for name in (None, "context_parallel"))
    hcp.parallelize(sharded, context())
    batch = labelled()
    whole(**batch).loss.backward()
    run = torch.utils.checkpoint.checkpoint
    run(lambda: sharded(**batch).loss, use_reentrant=False).backward()
    return max(error(a, b.grad) for a, b in zip(mean_gradients(sharded), whole.parameters()))


def test_a_whole_model_may_be_recomputed(on_ranks):
    assert max(on_ranks(2, recomputed_errors)) < 1e-6


def custom_errors() -> float:
    """Compare a module of a user around two models of Transformers."""

    class Towers(torch.nn.Module):
        def __init__(self, name):
            super().__init__()
            self.left, self.right = (model_with("base", kind, name) for kind in ("llama", "bert"))

        def forward(self, ids):
            left, right = self.left(ids).last_hidden_state, self.right(ids).last_hidden_state
            return (left.mean(1) * right.amax(1)).sum()

    whole, sharded = Towers(None), Towers("context_parallel")
    hcp.parallelize(sharded, context())
    expected, found = whole(tokens(2, 19)), sharded(tokens(2, 19))
    expected.backward()
    found.backward()
    pairs = [(a, b.grad) for a, b in zip(mean_gradients(sharded), whole.parameters()) if b.grad is not None]
    return max(error(found, expected), *(error(a, b) for a, b in pairs))


def test_models_inside_of_a_module_of_a_user_are_sharded(on_ranks):
    assert max(on_ranks(2, custom_errors)) < 1e-6


def fused_forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
    """Compute the loss from hidden states and the weight of the head, as fused losses do."""
    hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
    logits = hidden[:, :-1].flatten(0, 1) @ self.lm_head.weight.T
    return CausalLMOutputWithPast(loss=torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten()))


def patched_errors(how: str) -> float:
    """Compare models whose forward another library has replaced."""
    results = []
    for name in (None, "context_parallel"):
        model = model_with("causal", "llama", name).train()
        forward = functools.wraps(type(model).forward)(fused_forward) if how == "wrapped" else fused_forward
        if name is not None and how == "after":
            hcp.parallelize(model, context())
        model.forward = types.MethodType(forward, model)
        if name is not None and how != "after":
            hcp.parallelize(model, context())
        loss = model(**batch_for("causal")).loss
        loss.backward()
        results.append((loss.detach(), mean_gradients(model) if name else [p.grad for p in model.parameters()]))
    (expected, theirs), (found, mine) = results
    return max(error(found, expected), *(error(a, b) for a, b in zip(mine, theirs)))


@pytest.mark.parametrize("how", [pytest.param("before", marks=pytest.mark.exhaustive), "after", "wrapped"])
def test_replaced_forwards_around_the_decoder_see_whole_batches(on_ranks, how):
    assert max(on_ranks(2, patched_errors, how)) < 1e-6


# What comes before the decoder


def hooked_errors() -> float:
    """Add noise to the embeddings by a hook whose size depends on the length of a row, as NEFTune does."""

    def noise(module, args, output):
        drawn = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
        return output + drawn / (output.shape[1] * output.shape[2]) ** 0.5

    return errors_of(
        "causal",
        "llama",
        prepare=lambda model: model.get_input_embeddings().register_forward_hook(noise) and None,
    )


def test_hooks_on_the_embedding_see_whole_rows(on_ranks):
    assert max(on_ranks(3, hooked_errors)) < 1e-7


def hooked_lengths() -> list[int]:
    """Return the lengths of rows that a hook on an embedding sees which FSDP2 shards by itself."""
    seen = []
    model = model_with("causal", "llama", "context_parallel")
    fully_shard(model.get_input_embeddings())
    fully_shard(model)
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    hcp.parallelize(model, context())
    model(**labelled()).loss.backward()
    return seen


def test_hooks_on_an_embedding_under_fsdp_see_whole_rows(on_ranks):
    assert on_ranks(2, hooked_lengths) == [[19], [19]]


def embedded_lengths(adapted: bool) -> list[int]:
    """Return the lengths of the rows that an embedding embeds in a step with gradient checkpointing."""
    seen, forward = [], torch.nn.Embedding.forward
    model = model_with("causal", "llama", "context_parallel").train()
    if adapted:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
        model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    hcp.parallelize(model, context())

    @functools.wraps(forward)
    def seeing(self, ids):
        seen.append(ids.shape[1])
        return forward(self, ids)

    torch.nn.Embedding.forward = seeing
    try:
        model(**labelled()).loss.backward()
    finally:
        torch.nn.Embedding.forward = forward
    return seen


@pytest.mark.parametrize("adapted", [False, True], ids=["all weights", "LoRA"])
def test_hooks_that_ask_for_gradients_leave_the_embedding_to_the_shard(on_ranks, adapted):
    """Gradient checkpointing registers such a hook, so rows would be embedded whole, on every rank."""
    assert on_ranks(2, embedded_lengths, adapted) == [[10], [10]]


def checkpointed_error(model_type: str) -> float:
    """Train a step with gradient checkpointing in float32, and return the error of the loss or of the gradients."""
    whole, sharded = (model_with("causal", model_type, name).train() for name in (None, "context_parallel"))
    sharded.gradient_checkpointing_enable({"use_reentrant": False})
    with allow_unchecked_models():
        hcp.parallelize(sharded, context())
    expected, found = (model(**labelled()).loss for model in (whole, sharded))
    expected.backward()
    found.backward()
    pairs = zip(mean_gradients(sharded), (x.grad for x in whole.parameters()))
    return max(error(found, expected), *(error(a, b) for a, b in pairs if b is not None and b.abs().max() > 1e-3))


def test_a_decoder_that_reads_its_ids_takes_gradient_checkpointing(on_ranks):
    """Its hook on the embedding was taken for one that needs whole rows, which such a decoder cannot be given."""
    assert max(on_ranks(2, checkpointed_error, "gemma4_text")) < 1e-4


def embedded_errors() -> float:
    whole, sharded = (model_with("causal", "llama", name) for name in (None, "context_parallel"))
    hcp.parallelize(sharded, context())
    embeds = [model.get_input_embeddings()(tokens(2, 19)).detach().requires_grad_() for model in (whole, sharded)]
    labels = some_labels(tokens(2, 19))
    expected, found = (m(inputs_embeds=x, labels=labels).loss for m, x in zip((whole, sharded), embeds))
    expected.backward()
    found.backward()
    gradient = embeds[1].grad
    if dist.is_initialized():
        dist.all_reduce(gradient)
    return max(error(found, expected), error(gradient / context().size, embeds[0].grad))


def test_embeddings_may_come_in(on_ranks):
    assert max(on_ranks(3, embedded_errors)) < 1e-6


# Calls


def test_logits_are_made_where_they_are_asked_for():
    model = hcp.parallelize(model_with("causal", "llama", "context_parallel"), context())
    batch = labelled()
    assert model.train()(**batch).logits is None
    assert model(input_ids=batch["input_ids"]).logits.shape == (2, 19, model.config.vocab_size)
    assert model(**batch, return_dict=False)[1] is None
    assert model.eval()(**batch).logits.shape == (2, 19, model.config.vocab_size)
    assert model(batch["input_ids"], logits_to_keep=2).logits.shape == (2, 2, model.config.vocab_size)
    hcp.parallelize(model, context(logits="whole"))
    assert model.train()(**batch).logits.shape == (2, 19, model.config.vocab_size)
    hcp.parallelize(model, context(logits="shard"))
    assert model(**positioned()).logits.shape == (2, 20, model.config.vocab_size)  # padded for two chunks


class CountingHead(torch.nn.Linear):
    """Output embeddings that note for how many tokens they make logits at a time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.counts.append(x.shape[:-1].numel())
        return super().forward(x)


def counts_of_tokens(model_type: str) -> list[int]:
    model = model_with("causal", model_type, "context_parallel").train()
    head = model.lm_head
    model.lm_head = CountingHead(head.in_features, head.out_features, bias=head.bias is not None, dtype=torch.float64)
    model.lm_head.counts = []
    hcp.parallelize(model, context(loss_chunk_tokens=4))
    model(**labelled()).loss.backward()
    return model.lm_head.counts


@pytest.mark.parametrize(
    "model_type",
    ["gemma2", "cohere", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("llama", "granite", "phi"))],
)
def test_the_loss_makes_the_logits_of_few_tokens(on_ranks, model_type):
    for counts in on_ranks(2, counts_of_tokens, model_type):
        assert max(counts) == 4 and len(counts) > 2


class LargestOfVocabulary(TorchDispatchMode):
    """Record the largest number of elements of a tensor that is made with a dimension of the vocabulary.

    The weights of the head and their gradients, `[V, hidden]`, are left out.
    """

    def __init__(self, vocabulary: int, hidden: int):
        super().__init__()
        self._vocabulary, self._weights, self.largest = vocabulary, {vocabulary, hidden}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for x in tree_leaves(output):
            if isinstance(x, torch.Tensor) and self._vocabulary in x.shape and set(x.shape) != self._weights:
                self.largest = max(self.largest, x.numel())
        return output


def largest_of_vocabulary(vocabulary: int) -> int:
    model = model_with("causal", "llama", "context_parallel", vocab_size=vocabulary, hidden_size=8).float().train()
    hcp.parallelize(model, context())
    ids = tokens(2, 300)
    with LargestOfVocabulary(vocabulary, 8) as mode:
        model(input_ids=ids, labels=ids).loss.backward()
    return mode.largest


@pytest.mark.parametrize("vocabulary", [pytest.param(128_256, marks=pytest.mark.exhaustive), 262_144])
def test_no_tensor_of_the_loss_grows_with_the_vocabulary(on_ranks, vocabulary):
    """Each rank makes logits of 300 tokens: 38 and 79 million in one piece."""
    for largest in on_ranks(2, largest_of_vocabulary, vocabulary):
        assert 2**25 - vocabulary < largest <= 2**25


def lengths_of_shards() -> tuple[int, int]:
    """Count the tokens that layers see in a sharded call, and in one that is not."""
    seen = []
    model = model_with("causal", "llama", "context_parallel")
    model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    cp = context()
    hcp.parallelize(model, cp)
    ids = tokens(2, 20)
    sharded = model(ids).logits
    with cp.whole(model):
        assert error(sharded, model(ids).logits) < 1e-10
    assert len(borders_of(model)) == 1
    generated = model.generate(ids, max_new_tokens=2, do_sample=False)
    assert generated.shape == (2, 22)
    return seen[0], seen[1]


def test_generation_and_whole_calls_are_not_sharded(on_ranks):
    assert on_ranks(2, lengths_of_shards) == [(10, 20)] * 2


def both_ways(model_type: str, changes: dict) -> float:
    """Compare `cp.shard`, whose losses and gradients are summed over the ranks, with a prepared model."""
    cp, batch = context(), batch_for("causal")
    model = hcp.parallelize(model_with("causal", model_type, "context_parallel", **changes), cp)
    found = model(**batch).loss
    found.backward()
    mine = [gradient.clone() for gradient in mean_gradients(model)]
    model.zero_grad()
    weights = torch.rand(3, 19, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with cp.shard(batch, model) as local:
        loss = model(**local).loss
        loss.backward()
        assert error(cp.gather(cp.sharded(weights)), weights) == 0
        with pytest.raises(ValueError, match="the batch has 3 rows of 19 tokens"):
            cp.sharded(weights[:, :4])
    total = loss.detach().clone()
    dist.all_reduce(total)
    pairs = zip(mean_gradients(model), mine)
    return max(error(total, found), *(error(a * cp.size, b) for a, b in pairs))


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [("llama", {}), ("mixtral", {"output_router_logits": True, "router_aux_loss_coef": 1.0})],
)
def test_both_ways_of_sharding_agree(on_ranks, model_type, changes):
    assert max(on_ranks(2, both_ways, model_type, changes)) < 1e-6


def graphs_of_a_compiled_model() -> tuple[int, float]:
    """Compile a prepared model of four layers, and return the number of graphs and the error of its loss."""
    from torch._dynamo.testing import CompileCounter

    model = model_with("causal", "llama", "context_parallel", num_hidden_layers=4).train()
    hcp.parallelize(model, context())
    expected, counter = model(**labelled()).loss, CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter)
    compiled(**labelled()).loss.backward()
    return counter.frame_count, error(compiled(**labelled()).loss, expected)


def test_a_compiled_model_has_few_graphs(on_ranks):
    """The embedding, documents that Transformers looks for as it makes masks, and all the rest."""
    for graphs, worst in on_ranks(2, graphs_of_a_compiled_model):
        assert graphs <= 3 and worst < 1e-6


def message_of_other_labels() -> str:
    model = hcp.parallelize(model_with("causal", "llama", "context_parallel"), context())
    batch = labelled()
    if dist.get_rank() == 1:
        batch["labels"] = batch["labels"].roll(1)
    with pytest.raises(ValueError) as refusal:
        model(**batch)
    return str(refusal.value)


def test_ranks_with_other_labels_are_refused(on_ranks):
    first, second = on_ranks(2, message_of_other_labels)
    assert first == second and "batches or models" in first


def test_models_that_cannot_be_exact_are_refused():
    with pytest.raises(ValueError, match=r"loaded with attn_implementation='sdpa'"):
        hcp.parallelize(model_with("causal", "llama", "sdpa"), context())
    with pytest.raises(ValueError, match="BartModel is an encoder and a decoder"):
        hcp.parallelize(model_with("base", "bart", "context_parallel"), context())
    model = hcp.parallelize(model_with("causal", "llama", "context_parallel"), context())
    with pytest.raises(ValueError, match="no rank holds the attention weights"):
        model(**positioned(), output_attentions=True)
    with pytest.raises(ValueError, match="given extra of shape"):
        model(**positioned(), extra=torch.zeros(3, 4))
    with pytest.raises(ValueError, match="given extra, a list of tensors"):
        model(**positioned(), extra=[torch.zeros(3, 4)])
    with pytest.raises(ValueError, match="labels has 64, and LlamaForCausalLM takes 0 to 63"):
        model(**positioned() | {"labels": torch.full((2, 19), 64)})


@pytest.mark.parametrize("model_type", ["falcon", "deepseek_v32"])
def test_types_that_ask_for_the_name_of_their_attention_run_on_one_rank(model_type):
    assert errors_of("causal", model_type, batch=NO_PADDING) < 1e-6


def peaks_under_fsdp() -> tuple[float, int]:
    """Train a model whose head FSDP2 wraps by itself, and count the tokens whose logits it makes at a time."""
    whole, model = (model_with("causal", "llama", name).train() for name in (None, "context_parallel"))
    head = CountingHead(32, 64, bias=False, dtype=torch.float64)
    head.weight, head.counts, model.lm_head = model.lm_head.weight, [], head
    fully_shard(model.lm_head, reshard_after_forward=False)
    fully_shard(model)
    hcp.parallelize(model, context(loss_chunk_tokens=4))
    losses = stock_loop(whole, [labelled(seed=number) for number in range(2)])
    found = stock_loop(model, [labelled(seed=number) for number in range(2)])
    weights = [error(a.full_tensor(), b) for a, b in zip(model.parameters(), whole.parameters())]
    return max(*weights, *(abs(a - b) / b for a, b in zip(found, losses))), max(head.counts)


def test_a_head_that_fsdp_wraps_stays_on_the_shard(on_ranks):
    for worst, count in on_ranks(2, peaks_under_fsdp):
        assert worst < 1e-6 and count == 4


def test_a_loss_that_raises_holds_nothing():
    """Autograd's saved output would else hold itself, until Python's collector looks."""
    made = []

    def loss(piece, tokens):
        logits = (piece @ piece.T).log_softmax(-1)  # which autograd saves
        made.append(weakref.ref(logits))
        del logits  # the traceback holds this frame
        raise MemoryError

    gc.disable()
    try:
        with pytest.raises(MemoryError):
            chunked_sum(torch.ones(4, 3, requires_grad=True), loss, 8, [])
        assert made[0]() is None
    finally:
        gc.enable()
