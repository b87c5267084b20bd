"""Scheduler of dynamic CP: cuts loaded batches into samples, schedules them, and sends each to its ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedConfig, PreTrainedModel

from ..compat import widest_layer
from ..config import refuse
from ..context_parallel import ContextParallel
from ..data.batch import CONSUMED, IGNORED, read_batch
from ..distributed.agreement import collective, fingerprint
from ..distributed.mesh import world
from ..distributed.process_groups import build_columns
from ..integration.mixers.recognise import makes_positions, mixers
from ..integration.model_registry import UNSHIFTED, transformers_model
from ..integration.patches.rope import follows_length
from ..planning.balanced import fewest_chunks
from .costs import Costs, ModelShape
from .groups import Group, Schedule, sizes
from .schedule import make_schedule

CARRIED = ("input_ids", "shift_labels", "position_ids")
"""Inputs of a sample that are sent to the ranks that compute it."""


@dataclass(frozen=True)
class Round:
    """One run of the model on this rank.

    Args:
        size: the size of the group that this rank is in.
        batch: the whole batch of the group, which holds its samples as documents of one row.
        tokens: the tokens of the samples. It is 0 if the group has no sample and runs so that others need not wait,
            on a row without targets.
        longest: tokens of the longest sample.
    """

    size: int
    batch: dict[str, torch.Tensor]
    tokens: int
    longest: int


class Scheduler:
    """Deals global batches to groups within the present CP group of `cp`; see `schedule.py`.

    Every process of the world makes a scheduler, because the process groups of all sizes are made here.

    Args:
        cp: the `ContextParallel` of this process, whose config has `max_tokens_per_rank`.
        model: the model, whose shape and device decide the costs of samples.
        sharded: True if the weights of the model are gathered for each run.

    Raises:
        ValueError: if the model's loss is not a sum over tokens, or depends on the rows that hold the tokens.
    """

    def __init__(self, cp: ContextParallel, model: torch.nn.Module, sharded: bool = False):
        _refuse(model)
        if cp.groups.tensor.size > 1:
            raise ValueError(
                "dynamic=True has not been compared with one process under tensor parallelism, and tp_size is "
                f"{cp.groups.tensor.size}. Set dynamic=False, or load the model without tp_size."
            )
        self._cp, self._extent = cp, cp.groups
        for size in sizes(cp.size):
            with cp.using(size):
                pass
        self._column = build_columns(cp.size, cp.mesh)
        cp.keep(self._column)
        machine = cp.group.machine(next(model.parameters()).device)
        self._costs = Costs.of(model_shape(model), machine, sharded)
        self._settings = fingerprint({"costs": self._costs, "config": cp.config})
        self._busy = self._passed = 0.0

    def rounds(self, batches: Sequence[Mapping[str, Any]]) -> list[Round]:
        """Schedule the samples of all ranks, and return the rounds of this rank.

        Args:
            batches: whole batches, as one process would give them to the model. They are the same on all ranks of a
                CP group.

        Raises:
            ValueError: on every rank, if the batches of a rank cannot be cut into samples or differ from those of its
                group, or if a sample is too long for the largest group.
        """
        mark = 0
        with collective(world(), "models or settings", "Give every process the same model and settings.") as notes:
            samples = [sample for batch in batches for sample in cut(batch)]
            if self._cp.config.check_batch:
                mark = fingerprint({f"{number}": sample for number, sample in enumerate(samples)})
            notes.fingerprint, notes.number = self._settings, len(samples)
        lengths = self._gathered_lengths(samples, mark, notes.numbers)
        schedule = make_schedule(
            [length for share in lengths for length in share],
            self._extent.size * len(lengths),
            self._extent.size,
            self._cp.config.max_tokens_per_rank,
            self._costs,
            self._cp.config.layout,
            [
                f"sample {number} of data rank {rank}"
                for rank, share in enumerate(lengths)
                for number in range(len(share))
            ],
        )
        self._busy += schedule.work.mean(axis=1).sum()
        self._passed += schedule.total
        return self._routed(schedule, samples, [len(share) for share in lengths])

    def idle_share(self) -> float:
        """Estimate the share of time that ranks have waited since the last call, by the costs of the schedules."""
        share = 1 - self._busy / self._passed if self._passed else 0.0
        self._busy = self._passed = 0.0
        return share

    def _gathered_lengths(self, samples: list[torch.Tensor], mark: int, counts: list[int]) -> list[list[int]]:
        """Gather the lengths of all samples, one list for each data rank.

        Args:
            samples: this rank's samples.
            mark: the fingerprint of this rank's samples.
            counts: the number of samples of each rank.

        Raises:
            ValueError: if two ranks of a CP group have loaded different samples.
        """
        everyone = world()
        own = torch.zeros(max(counts) + 2, dtype=torch.int64)
        own[0], own[1] = self._extent.data_rank, mark
        own[2 : 2 + len(samples)] = torch.tensor([sample.shape[1] for sample in samples], dtype=torch.int64)
        notes = [own]
        if everyone.size > 1:
            own = own.to(everyone.device)
            notes = [torch.empty_like(own) for _ in counts]
            dist.all_gather(notes, own)
        lengths: dict[int, tuple[int, int, list[int]]] = {}
        for rank, (count, note) in enumerate(zip(counts, notes)):
            share, mark, *rest = note.tolist()
            first, *known = lengths.setdefault(share, (rank, mark, rest[:count]))
            if known != [mark, rest[:count]]:
                raise ValueError(
                    f"ranks {first} and {rank} are in one CP group and have loaded different samples. Use "
                    "ContextParallelTrainer or cp.prepare_data_loader(), which deal samples to CP groups."
                )
        return [lengths[share][2] for share in sorted(lengths)]

    def _routed(self, schedule: Schedule, samples: list[torch.Tensor], counts: list[int]) -> list[Round]:
        """Make the rounds of this rank, with the samples that other data ranks loaded and send."""
        share, size = self._extent.data_rank, self._extent.size
        begins = [sum(counts[:rank]) for rank in range(len(counts) + 1)]
        mine = _wanted(schedule, share * size + self._extent.rank)
        here = {begins[share] + number: sample for number, sample in enumerate(samples)}
        if self._column.size > 1:
            sent = []
            for other in range(len(counts)):
                wanted = _wanted(schedule, other * size + self._extent.rank)
                sent.append([sample for sample in wanted if sample in here])
            received = [sample for begin, end in zip(begins, begins[1:]) for sample in mine if begin <= sample < end]
            here = self._exchanged(sent, received, here, schedule.lengths, begins)
        rank = share * size + self._extent.rank
        return [self._round(_group_of(groups, rank), here) for groups in schedule.rounds]

    def _exchanged(self, sent, received, here, lengths, begins) -> dict[int, torch.Tensor]:
        """Exchange samples, so that this rank has those that it computes.

        Args:
            sent: for each rank of the column, the samples that this rank sends it.
            received: the samples that this rank receives, in the order of the ranks that send them.
            here: the samples that this rank has loaded, `[3, length]` each.
            lengths: tokens of each sample.
            begins: the first sample of each rank of the column, and the number of samples.
        """
        device = self._extent.device
        out = torch.cat([here[sample] for to in sent for sample in to] or [torch.empty(len(CARRIED), 0)], dim=1)
        out = out.T.contiguous().to(device, torch.int64)
        into = torch.empty(sum(lengths[sample] for sample in received), len(CARRIED), dtype=torch.int64, device=device)
        gets = [
            sum(lengths[sample] for sample in received if begin <= sample < end)
            for begin, end in zip(begins, begins[1:])
        ]
        gives = [sum(lengths[sample] for sample in to) for to in sent]
        dist.all_to_all_single(into, out, gets, gives, group=self._column.group)
        parts = into.cpu().split([lengths[sample] for sample in received])
        return {sample: part.T for sample, part in zip(received, parts)}

    def _round(self, group: Group, here: dict[int, torch.Tensor]) -> Round:
        if not group.samples:
            length = fewest_chunks(self._cp.config.layout) * group.size
            row, lengths = torch.zeros(len(CARRIED), length, dtype=torch.int64), []
            row[CARRIED.index("shift_labels")] = IGNORED
            row[CARRIED.index("position_ids")] = torch.arange(length)
            edges = [0, length]
        else:
            row = torch.cat([here[sample] for sample in group.samples], dim=1)
            lengths = [here[sample].shape[1] for sample in group.samples]
            edges = [sum(lengths[:number]) for number in range(len(lengths) + 1)]
        batch = {name: values[None].contiguous() for name, values in zip(CARRIED, row)}
        batch["labels"] = batch["shift_labels"]  # without labels a model computes no loss
        batch["cu_seq_lens_q"] = torch.tensor(edges, dtype=torch.int32)
        return Round(group.size, batch, sum(lengths), max(lengths, default=0))


def cut(batch: Mapping[str, Any]) -> list[torch.Tensor]:
    """Cut a batch into samples, which are its documents.

    Returns:
        The samples, `[3, length]` each, whose rows are the inputs `CARRIED`.

    Raises:
        ValueError: if the batch cannot be cut into samples without a change to its loss.
    """
    batch, rows, whole = read_batch(batch)
    for name in batch:
        if name not in (*CARRIED, "labels", *CONSUMED):
            raise ValueError(
                f"the batch has {name!r}, and with dynamic=True samples are dealt to groups with "
                f"{', '.join(CARRIED)} alone. Leave it out, or set dynamic=False."
            )
    if "shift_labels" not in whole:
        raise ValueError("the batch has no labels, and dynamic=True divides losses by their count. Add labels.")
    table = torch.stack([whole[name].long() for name in CARRIED])
    samples = []
    for number, documents in enumerate(rows):
        for document in documents:
            (start, stop), *others = document
            if others or ("attention_mask" in batch and start):
                raise ValueError(
                    f"row {number} has padding before or between its tokens, which dynamic=True cannot cut off. Pack "
                    "rows or pad them on the right (padding_side='right'), or set dynamic=False."
                )
            samples.append(table[:, number, start:stop])
    return samples


def model_shape(model: torch.nn.Module) -> ModelShape:
    """Read the sizes that decide the cost of a token from a model's configuration.

    A size that the configuration does not have counts as 1, or follows from the other sizes.
    """
    module = transformers_model(model)
    config = module.config.get_text_config()
    widest = widest_layer(config)
    heads = getattr(widest, "num_attention_heads", None) or 1
    hidden = getattr(config, "hidden_size", None) or 1
    return ModelShape(
        layers=getattr(config, "num_hidden_layers", None) or 1,
        heads=heads,
        key_heads=getattr(widest, "num_key_value_heads", None) or heads,
        head_dim=getattr(widest, "head_dim", None) or hidden // heads,
        parameters=_met_by_a_token(module, widest),
        itemsize=next(module.parameters()).itemsize,
    )


def _met_by_a_token(module: PreTrainedModel, config: PreTrainedConfig) -> int:
    """Count the parameters that compute with each token, without embeddings.

    Experts are stacked in tensors of three dimensions. Of these, the experts that a token is routed to are counted.
    """
    fields = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((getattr(config, field) for field in fields if getattr(config, field, None)), 0)
    others = experts - (getattr(config, "num_experts_per_tok", None) or experts)
    stacked = sum(p.numel() for p in module.parameters() if p.dim() == 3 and p.shape[0] == experts)
    return module.num_parameters(exclude_embeddings=True) - stacked * others // max(experts, 1)


def _wanted(schedule: Schedule, rank: int) -> list[int]:
    """List the samples that a rank computes, in order."""
    return [sample for groups in schedule.rounds for sample in _group_of(groups, rank).samples]


def _group_of(groups: tuple[Group, ...], rank: int) -> Group:
    return next(group for group in groups if group.first <= rank < group.first + group.size)


def _refuse(model: torch.nn.Module) -> None:
    """Refuse models whose loss is not the sum of the losses of the rounds."""
    module = transformers_model(model)
    config, kind = module.config.get_text_config(), module.config.model_type
    cases = (
        (
            getattr(config, "output_router_logits", False),
            "output_router_logits=True adds a mean over the batch. Set it to False",
        ),
        (getattr(config, "z_loss_coefficient", 0), "z_loss_coefficient adds a mean over the batch. Set it to 0"),
        (kind in UNSHIFTED, f"the loss of {kind} is a mean over its row. Take another model"),
        (any(map(makes_positions, mixers(module))), f"{kind} counts positions within its row. Take another model"),
        (
            any(map(follows_length, module.modules())),
            f"the RoPE of {kind} depends on the length of its row. Take another rope_type",
        ),
    )
    refuse(cases, "dynamic=True moves samples to other rows, and {}, or set dynamic=False.")
