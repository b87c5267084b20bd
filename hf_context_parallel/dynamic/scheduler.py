"""Scheduler of dynamic CP: cuts loaded batches into samples, schedules them, and sends each to its ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad
from transformers import PreTrainedConfig, PreTrainedModel

from ..compat import widest_layer
from ..config import refuse
from ..context_parallel import ContextParallel
from ..data.batch import IGNORED
from ..distributed.agreement import collective, fingerprint
from ..distributed.mesh import world
from ..distributed.process_groups import build_columns
from ..integration.mixers.recognise import makes_positions, mixers
from ..integration.model_registry import UNSHIFTED, transformers_model
from ..integration.patches.rope import follows_length
from ..planning.balanced import fewest_chunks
from .costs import Costs, ModelShape
from .groups import Group, Schedule, sizes
from .media import TYPES, MediaOfModel, text_parameters
from .samples import CARRIED, NO_BYTES, NOT_GIVEN, Sample, bytes_of, compared, cut, media_of
from .schedule import make_schedule


class _Known(NamedTuple):
    """Knowledge of all ranks about a sample.

    Args:
        length: its tokens.
        nbytes: bytes of its media as they are sent.
        work: products of two numbers that towers take for it.
        largest: those for its largest item.
        targets: number of targets of the batch that it comes from.
        forms: see `MediaOfModel.forms`.
    """

    length: int
    nbytes: int
    work: int
    largest: int
    targets: int
    forms: tuple[int, ...]

    @classmethod
    def of(cls, entries: list[int]) -> _Known:
        """Read an entry of what was gathered."""
        *numbers, forms = *entries[:NUMBERS], tuple(entries[NUMBERS:])
        return cls(*numbers, forms)


NUMBERS = len(_Known._fields) - 1
"""Numbers of an entry before the forms."""


@dataclass(frozen=True)
class Round:
    """One run of the model on this rank.

    Args:
        size: the size of the group that this rank is in.
        batch: the whole batch of the group, which holds its samples as documents of one row.
        weights: `[1, length]`, the weight of each target in the mean over its own batch.
        tokens: the tokens of the samples. It is 0 if the group has no sample and runs so that others need not wait,
            on a row without targets.
        longest: tokens of the longest sample.
    """

    size: int
    batch: dict[str, torch.Tensor]
    weights: torch.Tensor
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
        self._model = transformers_model(model)
        self._media = MediaOfModel(self._model)
        self._rows = (*CARRIED, *["axis"] * self._media.axes, *self._media.types)
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
            parts = [cut(batch, self._media) for batch in batches]
            samples = [sample for part in parts for sample in part]
            targets: list[int] = []
            for part in parts:
                targets += [sum(sample.targets for sample in part)] * len(part)
            if any(sample.media for sample in samples):
                _refuse_sharded_towers(self._model)
            # With one data rank nothing is sent.
            packed = [bytes_of(sample.media) if self._column.size > 1 else NO_BYTES for sample in samples]
            if self._cp.config.check_batch:
                mark = fingerprint({f"{number}": content for number, content in enumerate(map(compared, samples))})
            notes.fingerprint, notes.number = self._settings, len(samples)
        known = self._gathered(samples, packed, targets, mark, notes.numbers)
        names = [
            f"sample {number} of data rank {rank}" for rank, share in enumerate(known) for number in range(len(share))
        ]
        every = [sample for share in known for sample in share]
        self._refuse_different(every, names)
        schedule = make_schedule(
            [sample.length for sample in every],
            self._extent.size * len(known),
            self._extent.size,
            self._cp.config.max_tokens_per_rank,
            self._costs,
            self._cp.config.layout,
            names,
            [(sample.work, sample.largest) for sample in every] if any(sample.work for sample in every) else None,
        )
        self._busy += schedule.work.mean(axis=1).sum()
        self._passed += schedule.total
        return self._routed(schedule, samples, packed, known)

    def idle_share(self) -> float:
        """Estimate the share of time that ranks have waited since the last call, by the costs of the schedules."""
        share = 1 - self._busy / self._passed if self._passed else 0.0
        self._busy = self._passed = 0.0
        return share

    def _gathered(
        self, samples: list[Sample], packed: list[torch.Tensor], targets: list[int], mark: int, counts: list[int]
    ) -> list[list[_Known]]:
        """Gather what all ranks must know of all samples, one list for each data rank.

        Args:
            samples: this rank's samples.
            packed: the bytes of their media.
            targets: for each, the number of targets of its batch.
            mark: the fingerprint of this rank's samples.
            counts: the number of samples of each rank.

        Raises:
            ValueError: if two ranks of a CP group have loaded different samples.
        """
        everyone = world()
        width = NUMBERS + len(self._media.kinds)
        own = torch.zeros(2 + max(counts) * width, dtype=torch.int64)
        own[0], own[1] = self._extent.data_rank, mark
        entries = []
        for sample, content, count in zip(samples, packed, targets):
            work, forms = self._media.work(sample.media), self._media.forms(sample.media)
            entries.append((sample.table.shape[1], len(content), *work, count, *forms))
        own[2 : 2 + len(samples) * width] = torch.tensor(entries, dtype=torch.int64).flatten()
        notes = [own]
        if everyone.size > 1:
            own = own.to(everyone.device)
            notes = [torch.empty_like(own) for _ in counts]
            dist.all_gather(notes, own)
        found: dict[int, tuple[int, int, list[_Known]]] = {}
        for rank, (count, note) in enumerate(zip(counts, notes)):
            share, other_mark = note[:2].tolist()
            mine = [_Known.of(entry) for entry in note[2 : 2 + count * width].view(count, width).tolist()]
            first, *known = found.setdefault(share, (rank, other_mark, mine))
            if known != [other_mark, mine]:
                raise ValueError(
                    f"ranks {first} and {rank} are in one CP group and have loaded different samples. Use "
                    "ContextParallelTrainer or cp.prepare_data_loader(), which deal samples to CP groups."
                )
        return [found[share][2] for share in sorted(found)]

    def _refuse_different(self, samples: Sequence[_Known], names: Sequence[str]) -> None:
        """Refuse media that cannot be joined in a row."""
        for place, kind in enumerate(self._media.kinds):
            forms: dict[int, str] = {}
            for sample, title in zip(samples, names):
                if sample.forms[place]:
                    forms.setdefault(sample.forms[place], title)
            if len(forms) > 1:
                first, second, *_ = forms.values()
                raise ValueError(
                    f"dynamic=True joins the media of samples, and the {kind.items} of {first} and of {second} differ "
                    f"in which of {', '.join(kind.arguments)} there are, in a dtype, or in a dimension beside their "
                    "number. Let the processor make them alike, or set dynamic=False."
                )

    def _routed(
        self, schedule: Schedule, samples: list[Sample], packed: list[torch.Tensor], known: list[list[_Known]]
    ) -> list[Round]:
        """Make the rounds of this rank, with the samples that other data ranks loaded and send."""
        share, size, counts = self._extent.data_rank, self._extent.size, list(map(len, known))
        begins = [sum(counts[:rank]) for rank in range(len(counts) + 1)]
        mine = _wanted(schedule, share * size + self._extent.rank)
        here = {begins[share] + number: sample for number, sample in enumerate(samples)}
        if self._column.size > 1:
            sent = []
            for other in range(len(counts)):
                wanted = _wanted(schedule, other * size + self._extent.rank)
                sent.append([sample for sample in wanted if sample in here])
            received = [[sample for sample in mine if a <= sample < b] for a, b in zip(begins, begins[1:])]
            tables = {number: sample.table.T for number, sample in here.items()}
            tables = self._exchanged(sent, received, tables, torch.int64, len(self._rows), schedule.lengths)
            nbytes = [sample.nbytes for part in known for sample in part]
            media = dict.fromkeys(tables, NO_BYTES)
            if any(nbytes):
                own = {begins[share] + number: content[:, None] for number, content in enumerate(packed)}
                media = self._exchanged(sent, received, own, torch.uint8, 1, nbytes)
            here = {number: Sample(table.T, media_of(media[number])) for number, table in tables.items()}
        rank = share * size + self._extent.rank
        targets = [sample.targets for part in known for sample in part]
        return [self._round(_group_of(groups, rank), here, targets) for groups in schedule.rounds]

    def _exchanged(
        self,
        sent: list[list[int]],
        received: list[list[int]],
        here: Mapping[int, torch.Tensor],
        dtype: torch.dtype,
        width: int,
        lengths: Sequence[int],
    ) -> dict[int, torch.Tensor]:
        """Exchange samples, so that this rank has those that it computes.

        Args:
            sent: for each rank of the column, the samples that this rank sends it.
            received: for each rank of the column, the samples that it sends to this rank.
            here: the samples that this rank has loaded, `[length, width]` each.
            dtype, width: the dtype and the width of all samples.
            lengths: the length of each sample.
        """
        device = self._extent.device
        parts = [here[sample].to(dtype) for to in sent for sample in to]
        out = torch.cat([torch.empty(0, width, dtype=dtype), *parts]).to(device)
        gives, gets = ([sum(lengths[sample] for sample in group) for group in groups] for groups in (sent, received))
        into = torch.empty(sum(gets), width, dtype=dtype, device=device)
        dist.all_to_all_single(into, out, gets, gives, group=self._column.group)
        order = [sample for group in received for sample in group]
        return dict(zip(order, into.cpu().split([lengths[sample] for sample in order])))

    def _round(self, group: Group, here: Mapping[int, Sample], targets: Sequence[int]) -> Round:
        if not group.samples:
            length = fewest_chunks(self._cp.config.layout) * group.size
            row, lengths = torch.zeros(len(self._rows), length, dtype=torch.int64), []
            row[CARRIED.index("shift_labels")] = IGNORED
            row[CARRIED.index("position_ids")] = torch.arange(length)
            row[len(CARRIED) : len(CARRIED) + self._media.axes] = torch.arange(length)
            edges, media, weights = [0, length], {}, torch.zeros(length)
        else:
            samples = [here[sample] for sample in group.samples]
            row = torch.cat([sample.table for sample in samples], dim=1)
            lengths = [sample.table.shape[1] for sample in samples]
            edges = [sum(lengths[:number]) for number in range(len(lengths) + 1)]
            media = self._media.joined([sample.media for sample in samples])
            means = torch.tensor([1 / max(1, targets[sample]) for sample in group.samples], dtype=torch.float64)
            weights = means.repeat_interleave(torch.tensor(lengths))
        batch = {name: values[None].contiguous() for name, values in zip(CARRIED, row)}
        # Without labels a model computes no loss, and losses of a user shift them.
        batch["labels"] = pad(batch["shift_labels"][:, :-1], (1, 0), value=IGNORED)
        if media:
            batch |= media | self._of_media(row)
        else:
            batch["cu_seq_lens_q"] = torch.tensor(edges, dtype=torch.int32)
        return Round(group.size, batch, weights[None], sum(lengths), max(lengths, default=0))

    def _of_media(self, row: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the inputs that go with media: types of tokens, and positions on several axes.

        Documents are told by positions that begin again, since towers would be given `cu_seq_lens_q` too.
        """
        found = {
            name: values.clamp(min=0)[None]
            for name, values in zip(self._rows, row)
            if name in TYPES and bool((values != NOT_GIVEN).any())
        }
        if self._media.axes:
            axes = row[len(CARRIED) : len(CARRIED) + self._media.axes]
            found["position_ids"] = torch.cat([row[CARRIED.index("position_ids")][None], axes])[:, None].contiguous()
        return found


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
    embeddings = {id(x.weight) for x in module.modules() if isinstance(x, torch.nn.Embedding)}
    own = [p for p in text_parameters(module) if id(p) not in embeddings]
    stacked = sum(p.numel() for p in own if p.dim() == 3 and p.shape[0] == experts)
    return sum(p.numel() for p in own) - stacked * others // max(experts, 1)


def _refuse_sharded_towers(model: PreTrainedModel) -> None:
    """Refuse towers that FSDP shards: all ranks wait for each other in a tower, and some groups have no media."""
    inside = {id(x) for x in text_parameters(model)}
    sharded = [name for name, x in model.named_parameters() if isinstance(x, DTensor) and id(x) not in inside]
    if sharded:
        raise ValueError(
            f"dynamic=True gives media to some groups and none to others, and FSDP shards {sharded[0]}, whose tower "
            "all ranks must run together. Train with DDP, or set dynamic=False."
        )


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
