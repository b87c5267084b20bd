"""Helpers of the tests of the decoder's border: a prepared model on ranks, and the same model on one process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, set_seed

import hf_context_parallel as hcp
from hf_context_parallel.compat import tree_leaves
from hf_context_parallel.integration.switches import allow_unchecked_models
from hf_context_parallel.verification.types import tiny
from hf_context_parallel.verification.types.check import unrounded
from tests.helpers.models import context, error, labelled, some_labels, tokens

AUTO = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "sequence": "AutoModelForSequenceClassification",
    "token": "AutoModelForTokenClassification",
    "question": "AutoModelForQuestionAnswering",
    "choice": "AutoModelForMultipleChoice",
    "base": "AutoModel",
}
"""Heads, with the class that makes a model with this head."""


def model_with(head: str, model_type: str, attention: str | None, **changes: Any) -> PreTrainedModel:
    """Make a tiny model in float64. It is the same for every value of `attention`."""
    import transformers

    config = copy.deepcopy(tiny.tiny_config(model_type, **changes))
    set_seed(0)
    options = {} if attention is None else {"attn_implementation": attention}
    model = getattr(transformers, AUTO[head]).from_config(config, dtype=torch.float64, **options)
    if hasattr(config.get_text_config(), "num_experts_per_tok"):
        model.set_experts_implementation("eager")  # the default one has no float64
    return model


def batch_for(head: str) -> dict[str, torch.Tensor]:
    """Make a batch with labels for a head, padded on the right."""
    ids = tokens(3, 19)
    mask = torch.ones_like(ids)
    mask[0, 12:] = mask[2, 18:] = 0
    batch = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    if head in ("causal", "masked"):
        labels = some_labels(ids).masked_fill(mask == 0, -100)
        return batch | {"labels": labels}
    if head == "sequence":
        return batch | {"labels": torch.tensor([0, 1, 1])}
    if head == "token":
        return batch | {"labels": (ids % 2).masked_fill(mask == 0, -100)}
    if head == "question":
        return batch | {"start_positions": torch.tensor([1, 18, 7]), "end_positions": torch.tensor([5, 18, 9])}
    if head == "choice":
        return {name: torch.stack([value, value.flip(0)]) for name, value in batch.items()} | {
            "labels": torch.tensor([0, 2])
        }
    return batch


def mean_gradients(model: torch.nn.Module) -> list[torch.Tensor | None]:
    """Return the mean over the ranks of the gradients of all parameters."""
    gradients = [parameter.grad for parameter in model.parameters()]
    if dist.is_initialized():
        for gradient in gradients:
            if gradient is not None:
                dist.all_reduce(gradient)
                gradient /= dist.get_world_size()
    return gradients


def differences(found: Any, expected: Any) -> float:
    """Compute the largest error of the tensors of an output that the other output has too, padding included."""
    names = [name for name in found if name in expected and "cache" not in name and name != "past_key_values"]
    pairs = [pair for name in names for pair in zip(tree_leaves(found[name]), tree_leaves(expected[name]))]
    tensors = [(a, b) for a, b in pairs if isinstance(a, torch.Tensor)]
    assert tensors
    return max(error(a, b) for a, b in tensors)


def objective(output: Mapping[str, Any]) -> torch.Tensor:
    """Return the loss, or a sum over the outputs of a model without one."""
    if output.get("loss") is not None:
        return output["loss"]
    tensors = [x for x in tree_leaves(dict(output)) if isinstance(x, torch.Tensor) and x.requires_grad]
    return sum(x.pow(2).mean() for x in tensors)


def errors_of(
    head: str,
    model_type: str,
    changes: dict[str, Any] | None = None,
    batch: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    prepare: Callable[[torch.nn.Module], Any] = lambda model: None,
) -> float:
    """Compare a model with one process: outputs in training and evaluation, and the gradients of all parameters.

    Args:
        head: a key of `AUTO`.
        changes: values of the configuration.
        batch: the whole batch, `batch_for(head)` unless given.
        settings: keywords of `ContextParallelConfig`.
        prepare: function that changes both models before they run.
    """
    batch = batch_for(head) if batch is None else batch
    whole, sharded = (model_with(head, model_type, name, **(changes or {})) for name in (None, "context_parallel"))
    with allow_unchecked_models(), unrounded(whole.config):
        cp = context(**(settings or {}))
        hcp.parallelize(sharded, cp)
        for model in (whole, sharded):
            prepare(model)
            model.train()
        expected, found = whole(**batch), sharded(**batch)
        worst = differences(found, expected)
        objective(expected).backward()
        objective(found).backward()
        for mine, theirs in zip(mean_gradients(sharded), whole.parameters()):
            if theirs.grad is not None:
                worst = max(worst, error(mine, theirs.grad))
        whole.eval(), sharded.eval()
        with torch.no_grad():
            worst = max(worst, differences(sharded(**batch), whole(**batch)))
    return worst


__all__ = ["batch_for", "errors_of", "labelled", "model_with"]
