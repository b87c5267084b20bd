"""The `with` block of `cp.shard`: it checks the batch and the model, and replaces the modules that need it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from ..cp_group import CPGroup
from ..data.batch import SHARD
from ..data.shard import Shard, shard_batch
from ..distributed.agreement import collective, fingerprint
from ..distributed.failures import FailureReport
from .active_batch import ActiveBatch, active_batch, enter, leave
from .checks.agreement import SAME_BATCHES, check_weights, sampled, signature
from .checks.inputs import accepted, check_inputs, check_range, refuse_part
from .checks.model import check_model
from .interfaces.masks import GIVEN_A_MASK
from .mixers.native import NativeMixers
from .mixers.recognise import is_native, mixers
from .mixers.whole_sequences import WholeSequences
from .model_registry import NAME, transformers_model
from .patches.loss import BalancingLoss, corrected_loss
from .patches.module_patch import by_name
from .patches.randomness import own_stream
from .patches.rope import RopeByLength, follows_length
from .tensor_parallel.checks import check_parallelism
from .tensor_parallel.plan_styles import styles_of
from .tensor_parallel.replicated import ReplicatedParameters
from .tensor_parallel.sequence_parallel import SequenceParallel


class ShardedBatch(AbstractContextManager):
    """`with` block in which a model computes the shard of this rank; see `ContextParallel.shard`."""

    def __init__(self, group: CPGroup, batch: Mapping[str, Any], model: torch.nn.Module | None):
        self._group = group
        self._batch = batch
        self._model = model
        self._passed: PreTrainedModel | None = None
        """The Transformers model inside the model that was passed."""
        self._entered = False
        self._active: ActiveBatch
        self._positions: torch.Tensor
        self._running: torch.nn.Module | None = None
        self._hooks: list[Any] = []
        self._random: AbstractContextManager | None = None

    @property
    def shard(self) -> Shard:
        """The shard of this rank, once the block is entered."""
        return self._active.shard

    @property
    def handled(self) -> dict[str, set[str]]:
        """Class names of modules that mix tokens, each with the ways in which they were computed."""
        return self._active.handled

    def __enter__(self) -> dict[str, Any]:
        if self._entered:
            raise RuntimeError("this sharded batch was entered before. For another pass, call cp.shard(batch) again.")
        self._entered = True
        self._failure_report = FailureReport()
        compared = []
        try:
            with collective(self._group.groups.same_batch, "batches or models", SAME_BATCHES) as notes:
                mark = ()
                if self._model is not None:
                    self._check(self._model)
                    compared = sampled(self._model, self._group)
                    self._passed, mark = transformers_model(self._model), (*signature(self._model), len(compared))
                local = self._local()
                if self._passed is not None:
                    check_range(self._passed, self._batch, local[SHARD], values=self._group.config.check_batch)
                notes.fingerprint = fingerprint({"batch": local[SHARD].fingerprint, "model": mark})
            check_weights(compared, self._group.groups)
        except RuntimeError as failure:
            self._failure_report.explain(failure, self._failure_report.block - 1)
            raise
        except ValueError as refusal:
            self._failure_report.publish(refusal)  # for other groups: they go on, and then wait for this one
            raise
        self._active, self._positions = ActiveBatch(local.pop(SHARD), self._group), local["position_ids"]
        self._whole = WholeSequences(self._active)
        self._native = NativeMixers(self._active, self._whole)
        self._rope = RopeByLength(self._active)
        self._sequence = SequenceParallel(self._active)
        self._replicated = ReplicatedParameters(self._group.groups.tensor.group)
        if self._passed is not None:
            self._hooks.append(self._passed.register_forward_pre_hook(self._begin, with_kwargs=True))
            optional = {"position_ids", "use_cache", "shift_labels", "num_items_in_batch"}
            refused = optional - set(accepted(self._passed, optional))
            local = {name: value for name, value in local.items() if name not in refused}
        del self._batch, self._model
        enter(self._active)
        self._hooks += [
            register_module_forward_pre_hook(self._before),
            register_module_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]
        return local

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        for replacement in (self._sequence, self._replicated, self._rope, self._native, self._whole):
            replacement.restore()
        if self._random:
            self._random.__exit__(None, None, None)
        self._passed = None
        leave(self._active)
        if error is not None:
            self._failure_report.publish(error)

    def _check(self, model: torch.nn.Module) -> None:
        """Refuse a model that would not be exact, or does not fit the configuration."""
        check_model(model)
        check_parallelism(model, self._group)
        config = transformers_model(model).config.get_text_config()
        self._group.config.check_layers(
            getattr(config, "num_hidden_layers", None)
        )  # a few types have several stacks of layers, under other names

    def _local(self) -> dict[str, Any]:
        """Return the shard of this rank. The batch is whole, or the collator has sharded it."""
        rank, size = self._group.rank, self._group.size
        if SHARD not in self._batch:
            return shard_batch(self._batch, self._group.config, rank)
        local = dict(self._batch)
        shard = local[SHARD]
        if (shard.rank, shard.layout.size) != (rank, size):
            raise ValueError(
                f"the batch was sharded for rank {shard.rank} of {shard.layout.size}, and this is rank "
                f"{rank} of {size}. Give the collator cp.config and cp.rank."
            )
        return local

    @torch.compiler.disable
    def _before(self, module: torch.nn.Module, _) -> None:
        """Check the outermost model before it runs, and replace modules. It may not be the one passed to `shard`."""
        if isinstance(module, PreTrainedModel) and active_batch() is self._active and self._running is None:
            if self._passed is not None and self._passed is not module and self.shard.has_targets:
                refuse_part(module, self._passed)
            self._check(module)
            self._running, self._active.handled = module, {}
            if module.training and not self._random:
                self._random = own_stream(self._group)
                self._random.__enter__()
            self._balancing = BalancingLoss(self._active, module)
            self._balancing.__enter__()
            for part in mixers(module):
                (self._native if is_native(part) else self._whole).replace(part)
            for part in module.modules():
                if follows_length(part):
                    self._rope.replace(part)
            if self._group.groups.tensor.size > 1:
                self._replicated.replace_all(styles_of(module))
            if self._group.config.sequence_parallel:
                self._sequence.replace_parts(module)

    @torch.compiler.disable
    def _begin(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Check the inputs of the model that was passed to `shard`, while all ranks still see the same."""
        if active_batch() is self._active and self._running is module:
            given = by_name(module.forward, args, kwargs)
            if given.get("attention_mask") is not None:
                raise ValueError(GIVEN_A_MASK)
            check_inputs(module, given, self._positions, self._group)

    @torch.compiler.disable
    def _after(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any = None) -> Any:
        """Check the inputs of the model, and that it used our attention. A model that raised has no output.

        Returns:
            The output with a corrected loss, where the model does not compute a sum over tokens; else None.
        """
        if module is not self._running:
            return None
        self._running = None
        self._balancing.__exit__()
        if output is None:
            return None
        if not self.handled:
            raise RuntimeError(
                f"{type(module).__name__} ran on a shard, and none of its attention layers used {NAME!r}, so each "
                f"rank attended to its own shard alone. Load the model with attn_implementation={NAME!r}."
            )
        given = by_name(module.forward, args, kwargs)
        check_inputs(module, given, self._positions, self._group)
        corrected = corrected_loss(module, output, given, self.shard)
        output = output if corrected is None else corrected
        # Reentrant checkpointing builds its graph in backward. Then it is too late to find its batch.
        for tensor in tree_leaves(dict(output) if isinstance(output, Mapping) else output):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.register_hook(self._check_hook)
        return corrected

    def _check_hook(self, _) -> None:
        self._active.check_backward()
