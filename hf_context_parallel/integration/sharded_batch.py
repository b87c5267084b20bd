"""The `with` block of `cp.shard`: it checks the batch and the model, and replaces the modules that need it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import PreTrainedModel

from ..cp_group import CPGroup
from ..data.batch import SHARD
from ..data.shard import Shard, shard_batch
from ..distributed.agreement import collective, fingerprint
from ..distributed.failures import FailureReport
from .active_batch import ActiveBatch, active_batch, enter, leave
from .checks.agreement import REMEDIES, SAME_BATCHES, check_weights, sampled, shown, signature, structure
from .checks.inputs import accepted, check_inputs, check_range, refuse_part
from .checks.model import check_model
from .installation import OutermostPatch, carry_batches, install
from .interfaces.masks import GIVEN_A_MASK
from .kept_attention import agreed_place, proposed_place
from .model_registry import NAME, transformers_model
from .patches.loss import corrected_loss
from .patches.module_patch import by_name, patch_of
from .patches.randomness import own_stream
from .tensor_parallel.checks import check_parallelism


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
        self._hook: Any = None

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
        self._failure_report = FailureReport(self._group.groups.same_batch, "a block of cp.shard")
        compared: dict[str, torch.nn.Parameter] = {}
        with self._failure_report.opening():
            with collective(self._group.groups.same_batch, "batches or models", SAME_BATCHES) as notes:
                notes.alarm = self._group.exchange.interrupted
                mark: dict[str, object] = {}
                notes.remedies = REMEDIES
                if self._model is not None:
                    self._check(self._model)
                    compared = sampled(self._model, self._group)
                    self._passed = transformers_model(self._model)
                    checkpointed = carry_batches(self._passed)
                    mark = {**signature(self._model), "the model is checkpointed": checkpointed}
                    if compared:
                        mark |= structure(self._model, self._group)
                local = self._local()
                if self._passed is not None:
                    shard = local[SHARD]
                    check_range(self._passed, self._batch, shard, values=self._group.config.check_batch)
                    tokens, device = shard.batch_size * shard.layout.length, local["position_ids"].device
                    kept = proposed_place(self._passed, self._group, tokens, device, checkpointed)
                    notes.number = kept.number
                notes.fingerprint = fingerprint({"batch": local[SHARD].fingerprint, "model": mark})
                notes.shown = {**shown(self._batch, self._group), **mark}
            if notes.alarm:
                self._group.exchange.settle(self._group.groups)
            if self._model is not None:
                check_weights(self._model, compared, self._group)
        self._active = ActiveBatch(local.pop(SHARD), self._group, run_outermost=self._run)
        setting = self._group.config.attention_checkpoints
        if self._passed is not None:
            self._active.attention_checkpoints = agreed_place(self._group, kept, notes.numbers)
        elif setting != "auto":  # which cannot be decided without a model
            self._active.attention_checkpoints = setting
        self._positions = local["position_ids"]
        if self._passed is not None:
            install(self._passed, self._group)
            optional = {"position_ids", "use_cache", "shift_labels", "num_items_in_batch"}
            refused = optional - set(accepted(self._passed, optional))
            local = {name: value for name, value in local.items() if name not in refused}
        del self._batch, self._model
        enter(self._active)
        self._hook = register_module_forward_pre_hook(self._refuse_stranger)
        return local

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._hook.remove()
        self._passed = None
        leave(self._active)
        if error is not None:
            self._group.exchange.interrupt()
            self._failure_report.publish(error)
        else:
            self._failure_report.leave()

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
    def _refuse_stranger(self, module: torch.nn.Module, _: Any) -> None:
        """Refuse a Transformers model that is not prepared, and would attend to the shard of each rank alone."""
        if not isinstance(module, PreTrainedModel) or active_batch() is not self._active or self._running is not None:
            return
        self._check(module)
        if patch_of(module, OutermostPatch) is None:
            raise ValueError(
                f"{type(module).__name__} runs on a shard and was not prepared. Pass it to cp.shard(batch, model), or "
                "prepare it by hf_context_parallel.parallelize(model, cp)."
            )

    @torch.compiler.disable
    def _run(self, module: PreTrainedModel, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run a model on the shard, or a part of the model that runs already.

        Raises:
            ValueError: if its inputs would not give the result of the whole batch.
            RuntimeError: if none of its layers used our attention.
        """
        if self._running is not None:
            return forward(*args, **kwargs)
        if self._passed is not None and self._passed is not module and self.shard.has_targets:
            refuse_part(module, self._passed)
        self._check(module)
        given = by_name(forward, args, kwargs)
        if self._passed is module:  # all ranks still see the same
            if given.get("attention_mask") is not None:
                raise ValueError(GIVEN_A_MASK)
            check_inputs(module, given, self._positions, self._group)
        carry_batches(module)
        self._running, self._active.handled = module, {}
        try:
            with own_stream(self._group, module.training):
                output = forward(*args, **kwargs)
        finally:
            self._running = None
        if not self.handled:
            raise RuntimeError(
                f"{type(module).__name__} ran on a shard, and none of its attention layers used {NAME!r}, so each "
                f"rank attended to its own shard alone. Load the model with attn_implementation={NAME!r}."
            )
        check_inputs(module, given, self._positions, self._group)
        corrected = corrected_loss(module, output, given, self.shard)
        return output if corrected is None else corrected
