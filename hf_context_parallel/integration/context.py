"""A batch while it is computed: its share of this rank, and the checks of the model that runs with it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from ..attention.auto_strategy import Choice
from ..attention.strategy import Shape, Strategy
from ..data.batch import IGNORED, SHARD, positions_in_documents
from ..data.shard import Shard, shard_batch
from ..distributed.agreement import agree, fingerprint
from ..distributed.failures import LastWords
from ..planning.mask import Pattern, layer_type
from .current import current_batch, enter, leave
from .loss import BalancingLoss, corrected_loss
from .masks import GIVEN_A_MASK
from .models import NAME, UNSHIFTED, check_model, is_native, learned_positions, mixers, styles_of, transformers_model
from .native import NativeMixers
from .randomness import own_stream
from .replacement import by_name
from .replicated import ReplicatedParameters
from .rope import RopeByLength, follows_length
from .sequence import SequenceParallel
from .tensor import check_parallelism
from .weights import sampled_parameters, weights_differ
from .whole import WholeSequences

if TYPE_CHECKING:
    from ..context_parallel import ContextParallel


ENCODED = ("encoder_hidden_states", "encoder_outputs", "cross_attention_states")
"""What models take of an encoder, by its names in their forwards."""


class ShardedBatch(AbstractContextManager):
    """`with` block in which the model computes with one rank's share of a batch; see `ContextParallel.shard`."""

    def __init__(self, cp: ContextParallel, batch: Mapping[str, Any], model: torch.nn.Module | None):
        self.cp = cp
        self.shard: Shard
        self.handled: dict[str, set[str]] = {}
        """For each class of modules that mix tokens: how they were computed."""
        self._batch = batch
        self._model = model
        self._passed: PreTrainedModel | None = None
        """The Transformers model in what was passed."""
        self._entered = self._left = False
        self.positions: torch.Tensor
        self._running: torch.nn.Module | None = None
        self._hooks: list[Any] = []
        self._whole = WholeSequences(self)
        self._native = NativeMixers(self, self._whole)
        self._rope = RopeByLength(self)
        self._sequence = SequenceParallel(self)
        self._replicated = ReplicatedParameters(cp.groups.tensor.group)
        self._random: AbstractContextManager | None = None
        self._choices: dict[tuple, Choice] = {}

    def __enter__(self) -> dict[str, Any]:
        if self._entered:
            raise RuntimeError("this sharded batch was entered before: call cp.shard(batch) again for another pass.")
        self._entered = True
        self._last_words = LastWords()
        local, error, signature, sampled = {}, None, (), []
        try:
            if self._model is not None:
                self._check(self._model)
                sampled = self._sampled(self._model)
                self._passed, signature = transformers_model(self._model), (*_signature(self._model), len(sampled))
            local = self._local()
            if self._passed is not None:
                self._check_range(self._passed, local)
        except Exception as caught:  # whatever it is, the other ranks must hear of it
            error = caught
        about = {"batch": local[SHARD].fingerprint if local else 0, "model": signature}
        try:
            agree(
                self.cp.groups.alike,
                error,
                fingerprint(about),
                "batches or models",
                "All ranks of a CP group must be given the same: use cp.prepare_data_loader() or "
                "ContextParallelTrainer, which deal samples to CP groups rather than ranks.",
            )
            if weights_differ(sampled, self.cp.groups):
                raise ValueError(
                    "the ranks of the group have different weights, and what they compute together would be of no "
                    "model. Give all ranks the same to begin with (seed them alike before the model is made, or load "
                    "it), and sum gradients over all ranks before each step of the optimizer. DistributedDataParallel "
                    "and ContextParallelTrainer do both."
                )
        except RuntimeError as failure:
            self._last_words.explain(failure, self._last_words.block - 1)
            raise
        except ValueError as refusal:
            self._last_words.leave(refusal)  # to other groups, which go on and will wait for this one
            raise
        self.shard, self.positions = local.pop(SHARD), local["position_ids"]
        if self._passed is not None:
            self._hooks.append(self._passed.register_forward_pre_hook(self._begin, with_kwargs=True))
            optional = {"position_ids", "use_cache", "shift_labels", "num_items_in_batch"}
            refused = optional - set(accepted(self._passed, optional))
            local = {name: value for name, value in local.items() if name not in refused}
        del self._batch, self._model
        enter(self)
        self._hooks += [
            register_module_forward_pre_hook(self._before),
            register_module_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]
        return local

    def __exit__(self, kind, error, traceback) -> None:
        for hook in self._hooks:
            hook.remove()
        for replacement in (self._sequence, self._replicated, self._rope, self._native, self._whole):
            replacement.restore()
        if self._random:
            self._random.__exit__(None, None, None)
        self._left, self._passed = True, None
        leave(self)
        if error is not None:
            self._last_words.leave(error)

    def note(self, module: torch.nn.Module, how: str) -> None:
        """Remember how a module that mixes tokens is computed."""
        self.handled.setdefault(type(module).__name__, set()).add(how)

    def strategy(self, module: torch.nn.Module, pattern: Pattern, shape: Shape, device: torch.device) -> Strategy:
        """How a layer's attention is computed.

        Raises:
            ValueError: if the configuration says nothing of such a layer.
        """
        comm_type = self.cp.config.comm_type_of(layer_type(pattern), getattr(module, "layer_idx", None))
        key = pattern, comm_type, shape, device
        if key not in self._choices:
            self._choices[key] = self.cp.choice(comm_type, self.shard.layout, self.shard.mask(pattern), shape, device)
        return self.shard.strategy(pattern, *self._choices[key][:2])

    def _check(self, model: torch.nn.Module) -> None:
        """Refuse a model that would not be exact, or that the configuration does not fit."""
        check_model(model)
        check_parallelism(model, self.cp)
        config = transformers_model(model).config.get_text_config()
        self.cp.config.check_layers(getattr(config, "num_hidden_layers", None))  # a few have stacks of several names

    def _sampled(self, model: torch.nn.Module) -> list[torch.nn.Parameter]:
        """The parameters that the ranks compare."""
        groups = self.cp.groups
        # Beside tensor parallelism, ranks have weights of their own.
        if not self.cp.config.check_batch or groups.size == 1 or groups.alike.size > groups.size:
            return []
        return sampled_parameters(model)

    def _check_range(self, model: PreTrainedModel, local: Mapping[str, Any]) -> None:
        """Refuse tokens, labels and positions that the model has nothing for, which the ranks that hold them would
        raise for while the others wait."""
        if self.cp.config.check_batch:
            embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
            vocabulary = "take the tokenizer of this model, or call model.resize_token_embeddings()"
            if isinstance(embeddings, torch.nn.Embedding):
                self._check_values("input_ids", embeddings.num_embeddings, vocabulary)
            if isinstance(head, torch.nn.Linear):
                for name in ("labels", "shift_labels"):
                    self._check_values(name, head.out_features, f"{vocabulary}; {IGNORED} is no target", IGNORED)
            kinds = getattr(model.config.get_text_config(), "type_vocab_size", None)
            if kinds:
                self._check_values("token_type_ids", kinds, "leave token_type_ids out, or make them by its tokenizer")
        length, positions = max(local[SHARD].all_lengths), learned_positions(model)
        if positions is not None and length > positions:
            raise ValueError(
                f"the batch has a token at position {length - 1}, and {type(model).__name__} has learned the "
                f"positions 0 to {positions - 1}: cut rows or documents to {positions} tokens, or take a model with "
                "more."
            )
        if model.config.model_type in UNSHIFTED and local[SHARD].has_targets and local[SHARD].unshifted is None:
            raise ValueError(
                f"{type(model).__name__} compares each token's logits with the token's own label, and the batch has "
                "shift_labels alone. Give labels."
            )

    def _check_values(self, name: str, most: int, remedy: str, *beside: int) -> None:
        """Refuse values of a batch's tensor that are neither 0 to `most - 1` nor among those `beside`."""
        values = self._batch.get(name)
        if values is None:
            return
        wrong = values[(values < 0) | (values >= most)]
        for value in beside:
            wrong = wrong[wrong != value]
        if len(wrong):
            raise ValueError(
                f"{name} has {int(wrong[0])}, and {type(self._passed).__name__} takes 0 to {most - 1}: {remedy}."
            )

    def _refuse_part(self, module: PreTrainedModel) -> None:
        """Refuse a part of the model that was passed, run by itself: what the model does with its outputs was not seen
        to, as where its `forward` is called and not it."""
        if any(part is module for part in self._passed.modules()):
            raise ValueError(
                f"{type(module).__name__} runs by itself in a block for the {type(self._passed).__name__} that it is "
                "a part of, with labels: that model's loss would be computed unseen. Call it as model(**local), not "
                "its forward; or pass the part to cp.shard, and leave the labels out."
            )

    @cached_property
    def indices(self) -> torch.Tensor:
        """`[B, S_local]`, where each token stands in its row; in its document, where rows are packed."""
        shard = self.shard
        rows = shard.rows if shard.packed else ((),) * shard.batch_size
        return positions_in_documents(rows, shard.layout.length)[:, shard.layout.positions(shard.rank)]

    def check_backward(self) -> None:
        """Raise unless this batch's gradients can be computed now."""
        if self._left:
            raise RuntimeError(
                "backward of a sharded batch after leaving it: call backward() inside `with cp.shard(...)`."
            )
        if current_batch() is not self:
            raise RuntimeError(
                "backward of a sharded batch inside another one's `with cp.shard(...)`: leave the inner one first."
            )

    def _local(self) -> dict[str, Any]:
        """The batch as this rank's share of it, whether it came whole or from the collator."""
        if SHARD not in self._batch:
            return shard_batch(self._batch, self.cp.config, self.cp.rank)
        local = dict(self._batch)
        shard = local[SHARD]
        if (shard.rank, shard.layout.size) != (self.cp.rank, self.cp.size):
            raise ValueError(
                f"the batch was sharded for rank {shard.rank} of {shard.layout.size} and this is rank "
                f"{self.cp.rank} of {self.cp.size}: give the collator cp.config and cp.rank."
            )
        return local

    @torch.compiler.disable
    def _before(self, module: torch.nn.Module, _) -> None:
        """Check the model that is about to run: the outermost, whether or not it was passed to `shard`."""
        if isinstance(module, PreTrainedModel) and current_batch() is self and self._running is None:
            if self._passed is not None and self._passed is not module and self.shard.has_targets:
                self._refuse_part(module)
            self._check(module)
            self._running, self.handled = module, {}
            if module.training and not self._random:
                self._random = own_stream(self.cp)
                self._random.__enter__()
            self._balancing = BalancingLoss(self, module)
            self._balancing.__enter__()
            for part in mixers(module):
                (self._native if is_native(part) else self._whole).replace(part)
            for part in module.modules():
                if follows_length(part):
                    self._rope.replace(part)
            if self.cp.groups.tensor.size > 1:
                self._replicated.replace_all(styles_of(module))
            if self.cp.config.sequence_parallel:
                self._sequence.replace_parts(module)

    @torch.compiler.disable
    def _begin(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Check what a model that was passed to `shard` is given, before what a rank sees depends on its share."""
        if current_batch() is self and self._running is module:
            given = by_name(module.forward, args, kwargs)
            if given.get("attention_mask") is not None:
                raise ValueError(GIVEN_A_MASK)
            self._check_inputs(module, given)

    @torch.compiler.disable
    def _after(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any = None) -> Any:
        """Check what the model was given and that it used our attention; there is no output if it raised.

        Returns:
            The output with another loss, where the model's own is not a sum over tokens.
        """
        if module is not self._running:
            return None
        self._running = None
        self._balancing.__exit__()
        if output is None:
            return None
        if not self.handled:
            raise RuntimeError(
                f"a model ran on a shard, but none of its attention layers used {NAME!r}: each rank attended to its "
                f"own shard alone, and the result is wrong. Load the model with attn_implementation={NAME!r}."
            )
        given = by_name(module.forward, args, kwargs)
        self._check_inputs(module, given)
        corrected = corrected_loss(module, output, given, self)
        output = output if corrected is None else corrected
        # Reentrant checkpointing builds its graph in backward, when it is too late to tell which batch it is of.
        for tensor in tree_leaves(dict(output) if isinstance(output, Mapping) else output):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.register_hook(self._check_hook)
        return corrected

    def _same(self, given: torch.Tensor | None, ours: torch.Tensor | None) -> bool:
        """Whether a tensor that the model is given has the values that it should, on every rank; True without one.

        That two tensors are not one all ranks find alike, so all come here to compare.
        """
        if given is None or ours is None or given is ours:
            return True
        return not any(agree(self.cp.groups.alike, None, 0, "", "", not torch.equal(given.cpu(), ours.cpu())))

    def _check_hook(self, _) -> None:
        self.check_backward()

    def _check_inputs(self, module: torch.nn.Module, given: Mapping[str, Any]) -> None:
        """Refuse a call without the inputs that make a shard's result that of the whole."""
        required = {"position_ids", "use_cache"}
        if given.get("labels") is not None:
            required |= {"shift_labels", "num_items_in_batch"}
        complete = all(given.get(name) is not None for name in required & set(accepted(module, required)))
        labels, targets, positions = (given.get(name) for name in ("labels", "shift_labels", "position_ids"))
        # The same tensors in nearly every call; a copy, perhaps on another device, is compared by its values. That
        # comes last, for it waits for the other ranks.
        if not complete or given.get("use_cache") or not self._same(positions, self.positions):
            raise ValueError(
                "the model must be called with all that cp.shard yields: position_ids, use_cache=False, and with "
                "labels also shift_labels and num_items_in_batch. Call it as model(**local); call other models, and "
                "generate(), outside the block. Where its forward takes no such inputs, pass the model to cp.shard."
            )
        if not self._same(labels, targets):
            raise ValueError(
                "labels and shift_labels differ: cp.shard yields both shifted, each token's being the next one's, and "
                "the loss goes by shift_labels. Change both alike, or the labels of the batch before cp.shard."
            )
        for name in ENCODED:
            if given.get(name) is not None:
                raise ValueError(
                    f"{name}: cross-attention to an encoder's tokens is not known to be exact on shards of the "
                    "decoder's. Leave it out, or run the model outside the block."
                )
        kept = given.get("logits_to_keep")
        if isinstance(kept, torch.Tensor) or kept:
            raise ValueError(
                "logits_to_keep would keep the last tokens of each rank's shard, which are not the sequence's. Leave "
                "it out, and take what you need of cp.gather(logits)."
            )
        wanted = given.get("output_hidden_states")
        if self.cp.config.sequence_parallel and (module.config.output_hidden_states if wanted is None else wanted):
            raise ValueError(
                "output_hidden_states=True: with sequence_parallel=True layers return a share of the shard's tokens, "
                "which cp.gather does not restore. Leave one of the two off."
            )


def accepted(module: torch.nn.Module, names: Iterable[str]) -> list[str]:
    """Those of `names` that a module's forward can be given."""
    parameters = inspect.signature(module.forward).parameters
    anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return [name for name in names if anything or name in parameters]


def _signature(model: torch.nn.Module) -> tuple:
    """What all ranks' models must have in common."""
    parameter = next(model.parameters(), None)
    return type(model).__name__, model.training, None if parameter is None else str(parameter.dtype)
