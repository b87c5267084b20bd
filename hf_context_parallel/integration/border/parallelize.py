"""`parallelize`: it prepares a model in place, so that it is called with whole batches and computes shards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from ...compat import attention_name
from ...cp_group import HasGroup
from ..checks.model import check_decoder, stock_class
from ..checks.peft import check_loss_of_tuners
from ..installation import install
from ..model_registry import NAME, decoder_of, models_inside, outermost_models
from ..patches.module_patch import patch_of
from ..tensor_parallel.checks import check_parallelism
from ..towers.shared import share_towers
from .decoder import DecoderBorder
from .deferred_embeddings import InputEmbeddingsPatch
from .head import EmbeddingsPatch, OuterPatch

Model = TypeVar("Model", bound=torch.nn.Module)


def parallelize(model: Model, cp: HasGroup) -> Model:
    """Prepare a model for context parallelism, in place. Afterwards it is used like the same model on one process.

    It takes whole batches, the same on all ranks of a CP group, and returns what one process returns: the loss of the
    whole batch, and whole outputs in the order of the batch. Between, tokens are sharded where they enter the text
    decoder (or the encoder of an encoder model), and each rank computes its shard. What lies around the decoder runs
    as it was written, on every rank alike. The head of a language model stays on the shard. In training with labels it
    returns no logits; see `ContextParallelConfig.logits`.

    The *mean* over the ranks of the gradients is the gradient of one process, whoever takes it: DDP, FSDP2, or a loop
    that averages gradients. Backward may run at any time, and for several batches together.

    A call with a key/value cache, as `generate` makes it, is not sharded, and neither is one in `cp.whole(model)`.

    Args:
        model: a Transformers model, or a module that holds some. It may be prepared before or after it is wrapped by
            DDP, FSDP2, PEFT or `torch.compile`. A second call changes nothing but the `cp`.
        cp: the `ContextParallel` of this process.

    Returns:
        The model itself.

    Raises:
        ValueError: if a decoder would not be exact on shards. The message says why and what to do. In a call, all
            ranks of the group raise it alike: if the batch cannot be exact, or batches, models or a sample of their
            weights differ.
    """
    check_loss_of_tuners(model, cp.group.config.logits)
    found = [pair for inner in outermost_models(model) for pair in decoders_of(inner)]
    for inner, decoder in found:
        check_decoder(decoder, inner)
        check_parallelism(inner, cp.group)
    for inner, decoder in found:
        install(inner, cp.group)
        border = patch_of(decoder, DecoderBorder)
        if border is not None:
            border.cp = cp
            continue
        border = DecoderBorder(cp, decoder.config.model_type)
        border.replace(decoder)
        if inner is not decoder:
            OuterPatch(border).replace(inner)
            inputs = decoder.get_input_embeddings()
            if share_towers(inner, decoder, border) and isinstance(inputs, torch.nn.Module):
                InputEmbeddingsPatch().replace(inputs)
            embeddings = inner.get_output_embeddings()
            if isinstance(embeddings, torch.nn.Module):
                EmbeddingsPatch().replace(embeddings)
    return model


def models_to_shard(holder: object) -> list[torch.nn.Module]:
    """List the modules among the attributes of an object, and in its lists, that were loaded with our attention."""
    values = [x for value in vars(holder).values() for x in (value if isinstance(value, list) else [value])]
    modules = {id(x): x for x in values if isinstance(x, torch.nn.Module)}
    return [module for module in modules.values() if has_our_attention(module)]


def has_our_attention(module: torch.nn.Module) -> bool:
    """Return whether a module holds a model that was loaded with our attention."""
    return any(attention_name(decoder.config) == NAME for x in models_inside(module) for _, decoder in decoders_of(x))


def decoders_of(model: PreTrainedModel) -> list[tuple[PreTrainedModel, PreTrainedModel]]:
    """List the decoders of a model, each with the model that it belongs to.

    It is the decoder of the model itself, or, if no class of Transformers has that, those of the models inside.
    """
    decoder = decoder_of(model)
    inside = [x for child in model.children() for x in models_inside(child)] if stock_class(decoder) is None else []
    return [x for part in inside for x in decoders_of(part)] or [(model, decoder)]


@contextmanager
def whole(model: torch.nn.Module) -> Iterator[None]:
    """Run a prepared model on whole batches in this block, on every rank alike."""
    with ExitStack() as stack:
        for border in borders_of(model):
            stack.enter_context(border.whole())
        yield


def borders_of(model: torch.nn.Module) -> list[DecoderBorder]:
    """List the borders of the decoders of a prepared model."""
    decoders = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    return [border for decoder in decoders if (border := patch_of(decoder, DecoderBorder)) is not None]
