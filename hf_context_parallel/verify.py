"""A model on shards against the same model on whole sequences, layer by layer: before it is trained.

A short random batch goes through the model whole, on every rank, and once more sharded. Whole, each module that mixes
tokens runs a second time in another of Transformers' own ways, which says how much rounding alone makes of its
inputs. Sharded, it is given the whole run's inputs, so that differences neither add up nor hide behind each other.
Both runs are without a graph, but for one module's at a time, so that neither DDP nor FSDP sees a backward pass.
"""

from __future__ import annotations

import random
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from . import mask as masks
from .balance import padded_layout
from .consensus import agree, fingerprint
from .context_parallel import ContextParallel
from .integration.attention import computed_otherwise, heard_by
from .integration.context import accepted
from .integration.masks import stock_attention, told_otherwise
from .integration.models import check_model, mixers, styles_of, transformers_model
from .integration.replacement import Replacement
from .integration.replicated import ReplicatedParameters
from .integration.rope import follows_length
from .integration.sequence import Shares
from .integration.tensor import check_parallelism
from .mesh import world

INPUT, OUTPUT, GRADIENT = "input", "output", "input gradient"
TOKENS_A_RANK = 16
"""Of a row, at least."""
LONGEST = 1024
"""Tokens of a row that is made long for the sake of a window."""
WINDOWS = ("sliding_window", "sliding_window_size", "attention_chunk_size", "local_attention", "attention_window_size")
"""The fields of configurations that limit how far attention reaches."""
MARGIN = 8.0
"""Times the difference of two stock implementations that a shard may differ by."""
FLOOR = 8.0
"""Times the dtype's epsilon, of the largest entry, that it always may."""
MOST = 0.75
"""Of the tokens of a mixture-of-experts layer: those that are compared. Others may take another route."""
ROUTED = re.compile(r".*(Expert|MoE|MOE|Moe|Router).*")
"""The modules of such layers, by their classes' names."""


class Difference(NamedTuple):
    """How far a layer on shards is from the layer on whole sequences, given the same inputs.

    Args:
        layer: the module's name within the Transformers model.
        tensor: which of its tensors: its input, its output, or the gradient of its input for a random gradient.
        batch: `"packed"` or `"padded"`.
        found: the largest difference on any rank, by the tensor's largest entry.
        bound: the most that it may be.
    """

    layer: str
    tensor: str
    batch: str
    found: float
    bound: float


def verify(model: torch.nn.Module, cp: ContextParallel) -> list[Difference]:
    """Compare each layer of a model on shards with the same layer on whole sequences.

    Token mixers (attention, and all else that mixes tokens) are compared in outputs and in gradients of their inputs,
    decoder layers in outputs, and the first of them in its input (with sequence parallelism its input is the whole
    shard's, and is not compared). A layer with experts is compared on most tokens,
    since a difference in rounding may send a token to other experts.

    Every process of the world calls this, with the model as it is trained: wrapped by DDP, FSDP or PEFT, quantised, or
    not at all. Weights, gradients, buffers, random numbers and the modules' training modes stay as they are.

    Returns:
        What was compared, in the order of the model.

    Raises:
        ValueError: on every rank alike, if a layer differs by more than rounding does, naming the first that does; or
            if the model is refused, as by `cp.shard`.
    """
    differences, error = [], None
    try:
        check_model(model)
        check_parallelism(model, cp)
        with _untouched(model), _summed(model, cp):
            differences = _compare_batches(model, cp)
    except Exception as caught:  # whatever it is, the other ranks must hear of it
        error = caught
    compared = [difference[:3] for difference in differences]
    agree(world(), error, fingerprint({"compared": compared}), "models", "All ranks must be given the same.")
    differences = _of_all_ranks(differences, cp)
    agree(world(), _first_error(differences), 0, "models", "")
    return differences


def _of_all_ranks(differences: list[Difference], cp: ContextParallel) -> list[Difference]:
    """The group's largest, so that all of its ranks say the same."""
    figures = torch.tensor([difference[3:] for difference in differences], dtype=torch.float32)
    figures = figures.nan_to_num(nan=float("inf")).to(cp.groups.device)
    if cp.groups.alike.size > 1:
        dist.all_reduce(figures, dist.ReduceOp.MAX, group=cp.groups.alike.group)
    return [
        difference._replace(found=found, bound=bound)
        for difference, (found, bound) in zip(differences, figures.tolist())
    ]


def _first_error(differences: list[Difference]) -> ValueError | None:
    wrong = [difference for difference in differences if difference.found > difference.bound]
    if not wrong:
        return None
    layer, tensor, batch, found, bound = wrong[0]
    return ValueError(
        f"{layer} is not exact on shards: of a {batch} batch, its {tensor} differs from that on whole sequences by "
        f"{found:.1e} of the largest entry, where rounding explains {bound:.1e} ({len(wrong)} of {len(differences)} "
        "comparisons differ). Training would not be that of one process. `hf-context-parallel check` compares a model "
        "type on its own; ContextParallelConfig(verify=False) trains without this comparison."
    )


def _compare_batches(model: torch.nn.Module, cp: ContextParallel) -> list[Difference]:
    """The differences on this rank, of each batch that the model takes.

    Raises:
        ValueError: if it takes none.
    """
    differences, refusal = [], None
    for batch in _batches(model, cp):
        try:
            records = _Whole(model, batch).run()
            differences += _Sharded(model, batch, records).run(cp)
        except ValueError as error:  # some models take no packed rows, or no padding
            refusal = error
    if not differences:
        raise refusal or ValueError(f"{type(model).__name__} has no layer that could be compared.")
    return differences


# The batches


@dataclass
class _Batch:
    """A batch as one process would give it to the model, and which of its tokens are this rank's.

    Args:
        kind: what it is called.
        inputs: of `[B, S]`.
        pieces: the columns that one process would give the model at a time: documents, or all.
        real: `[B, S]`, False at padding.
        columns: `[S_local]`, those of this rank; with sequence parallelism, its share of the shard's.
    """

    kind: str
    inputs: dict[str, torch.Tensor]
    pieces: list[slice]
    real: torch.Tensor
    columns: torch.Tensor
    _drawn: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)

    def draw(self, like: torch.Tensor, piece: slice, columns: torch.Tensor | None = None) -> torch.Tensor:
        """Random numbers for each token of a piece, the same in every call; of some columns of the piece if given.

        They are 0 at padding, whose outputs mean nothing.

        Args:
            like: `[B, S, ...]`, of the shape, dtype and device wanted.
        """
        shape = (*self.real.shape, *like.shape[2:])
        if shape not in self._drawn:
            numbers = torch.randn(shape, generator=torch.Generator().manual_seed(1))
            self._drawn[shape] = numbers * self.real.view(*self.real.shape, *[1] * (like.dim() - 2))
        numbers = self._drawn[shape][:, piece]
        return (numbers if columns is None else numbers[:, columns]).to(like)

    def mine(self, piece: slice) -> torch.Tensor:
        """The columns of a piece that are this rank's, counted from its first."""
        inside = (self.columns >= piece.start) & (self.columns < piece.stop)
        return self.columns[inside] - piece.start


def _batches(model: torch.nn.Module, cp: ContextParallel) -> list[_Batch]:
    """Several documents in a row; and two shorter rows with padding, one on the left and one on the right."""
    inner = transformers_model(model)
    device = next(inner.parameters()).device
    device = cp.groups.device if device.type == "meta" else device  # offloaded, and moved when they are used
    short, long = _lengths(inner, cp)

    odd = long // 4 | 1
    documents = [slice(0, odd), slice(odd, odd + 1), slice(odd + 1, long)]
    position_ids = torch.cat([torch.arange(document.stop - document.start) for document in documents])[None]
    mask = torch.ones(2, short, dtype=torch.long)
    mask[0, : short // 8 | 1] = mask[1, -(short // 5 | 1) :] = 0
    packed = {"input_ids": _tokens(inner, 1, long), "position_ids": position_ids}
    padded = {"input_ids": _tokens(inner, 2, short), "attention_mask": mask}
    batches = []
    for kind, inputs, pieces, real, rows in (
        ("packed", packed, documents, torch.ones(1, long), masks.from_position_ids(position_ids)),
        ("padded", padded, [slice(0, short)], mask, masks.from_attention_mask(mask)),
    ):
        dealt = [document for row in rows for document in row]
        columns = padded_layout(cp.config.layout, real.shape[1], cp.size, dealt).positions(cp.rank)
        if cp.config.sequence_parallel:  # of which layers and mixers see a share
            columns = columns[Shares(cp.groups.tensor, len(columns)).mine]
        inputs = {name: value.to(device) for name, value in inputs.items()}
        batches.append(_Batch(kind, inputs, pieces, real.bool(), columns))
    return batches


def _lengths(model: PreTrainedModel, cp: ContextParallel) -> tuple[int, int]:
    """Tokens of a row of which all ranks have some, and of one that the longest window that fits is half of."""
    config = model.config.get_text_config()
    windows = [getattr(config, name, None) for name in WINDOWS]
    doubled = [2 * window for window in windows if isinstance(window, int) and 0 < 2 * window <= LONGEST]
    # So that all layouts deal rows, and sequence parallelism shards, without padding them.
    step = (
        (8 if cp.config.layout == "balanced" else 2)
        * cp.size
        * (cp.groups.tensor.size if cp.config.sequence_parallel else 1)
    )
    most = getattr(config, "max_position_embeddings", None) or LONGEST
    short = -(-TOKENS_A_RANK * cp.size // step) * step
    long = max([short, *(-(-window // step) * step for window in doubled)])
    return tuple(max(step, min(length, most // step * step)) for length in (short, long))


def _tokens(model: PreTrainedModel, rows: int, length: int) -> torch.Tensor:
    """Random tokens `[rows, length]`, none of those that have a meaning of their own."""
    config = model.config.get_text_config()
    vocabulary = getattr(model.get_input_embeddings(), "num_embeddings", None) or config.vocab_size
    named = [value for name, value in config.to_dict().items() if name.endswith(("token_id", "token_index"))]
    special = {value for value in tree_leaves(named) if isinstance(value, int)}
    usable = torch.tensor([token for token in range(vocabulary) if token not in special])
    drawn = torch.randint(len(usable), (rows, length), generator=torch.Generator().manual_seed(rows))
    return usable[drawn]


# The runs


@dataclass
class _Record:
    """A call of a module on whole sequences: this rank's share of what went in and came out.

    Args:
        shares: by tensor, for each piece of the batch, `[B, S_piece_local, ...]`.
        rounding: by tensor, for each piece, by how much each token's entries differ between two implementations.
        largest: by tensor, its largest entry.
        epsilon: of the dtype that it is computed in.
    """

    shares: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    rounding: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)
    epsilon: float = 0.0

    def share(self, name: str) -> torch.Tensor | None:
        """`[B, S_local, ...]`, or None if there is no such tensor."""
        return torch.cat(self.shares[name], dim=1) if name in self.shares else None


class _Watch(ABC):
    """A run of the model in which each mixer and each layer is looked at when it is done.

    Args:
        model: as the caller has it.
        batch: what it is given.
    """

    def __init__(self, model: torch.nn.Module, batch: _Batch):
        self.model, self.batch = model, batch
        self.inner = transformers_model(model)
        self.resharded = set(mixers(self.inner))
        hidden = {part for module in self.resharded for part in module.modules()} - self.resharded
        self.hidden = hidden
        # What sees whole sequences is one thing, whatever is inside.
        self.layers = [
            module
            for module in self.inner.modules()
            if isinstance(module, GradientCheckpointingLayer) and module not in hidden | self.resharded
        ]
        self._busy = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks that are there for a run."""
        with ExitStack() as stack:
            hooks = [module.register_forward_pre_hook(self._begun, with_kwargs=True) for module in self.layers]
            hooks.append(register_module_forward_hook(self._done, with_kwargs=True))
            for hook in hooks:
                stack.callback(hook.remove)
            yield

    def _begun(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        return None if self._busy else self.begun(module, args, kwargs)

    def _done(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if self._busy or not self.is_watched(module):
            return
        self._busy = True  # what runs inside of what is run again
        try:
            self.done(module, args, kwargs, output)
        finally:
            self._busy = False

    @abstractmethod
    def is_watched(self, module: torch.nn.Module) -> bool:
        """Whether `done` is to be called for a module."""

    @abstractmethod
    def begun(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        """Look at the arguments of a layer that begins; returns those that it gets instead, or None."""

    @abstractmethod
    def done(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Look at a mixer or a layer that is done."""


class _Whole(_Watch):
    """The run on whole sequences, one document at a time, as one process would have it."""

    def __init__(self, model: torch.nn.Module, batch: _Batch):
        super().__init__(model, batch)
        self._mixers = set(self.resharded)
        self._records: dict[torch.nn.Module, list[_Record]] = {}

    def run(self) -> dict[torch.nn.Module, list[_Record]]:
        """What each module did, call by call. Modules come in the order in which they were done."""
        with self.watching(), heard_by(self._hear), _stock_forwards(self.resharded):
            for piece in self.batch.pieces:
                self._piece, self._begun_calls, self._done_calls = piece, {}, {}
                with torch.no_grad():
                    self.model(**self._inputs())
        return self._records

    def _inputs(self) -> dict[str, Any]:
        """What the model is given of a piece: of what it may not take, what it takes."""
        inputs = {name: value[:, self._piece] for name, value in self.batch.inputs.items()} | {"use_cache": False}
        refused = {"position_ids", "use_cache"} - set(accepted(self.inner, ("position_ids", "use_cache")))
        return {name: value for name, value in inputs.items() if name not in refused}

    def _hear(self, module: torch.nn.Module) -> None:
        if module not in self.hidden:
            self._mixers.add(module)

    def is_watched(self, module):
        return module in self._mixers or module in self.layers

    def begun(self, module, args, kwargs):
        hidden = _hidden_states(args, kwargs, self._shape)
        if hidden is not None:
            self._keep(self._record(module, self._begun_calls), {INPUT: _take(args, kwargs, hidden)})

    def done(self, module, args, kwargs, output):
        record = self._record(module, self._done_calls)
        hidden = _hidden_states(args, kwargs, self._shape)
        is_layer = module in self.layers
        if hidden is not None and not is_layer:
            self._keep(record, {INPUT: _take(args, kwargs, hidden)})
        weigh = None if is_layer else self._weigh
        if is_layer:
            result = _hidden_output(output, self._shape)
            first = {} if result is None else {OUTPUT: result}
        else:
            first = _run(module, args, kwargs, hidden, self._shape, weigh)
        x = None if hidden is None else _take(args, kwargs, hidden)
        tensors = [*first.values()] if x is None else [*first.values(), x]
        record.epsilon = max([0.0, *(torch.finfo(tensor.dtype).eps for tensor in tensors)])
        if x is not None and (is_layer or module in self.resharded):
            # These are the same code on a shard; what is before them may differ in its last bit.
            signs = self.batch.draw(x, self._piece).sign()
            args, kwargs = _replaced(args, kwargs, hidden, x + record.epsilon * signs * x)
        with computed_otherwise():
            second = _run(module, args, kwargs, hidden, self._shape, weigh)
        self._keep(record, first)
        real = self.batch.real[:, self._piece]
        for name in first.keys() & second.keys():
            record.rounding.setdefault(name, []).append(_by_token(first[name], second[name], real))

    @property
    def _shape(self) -> tuple[int, int]:
        return len(self.batch.real), self._piece.stop - self._piece.start

    def _weigh(self, output: torch.Tensor) -> torch.Tensor:
        return self.batch.draw(output, self._piece)

    def _record(self, module: torch.nn.Module, calls: dict[torch.nn.Module, int]) -> _Record:
        """That of the call which this is."""
        number = calls[module] = calls.get(module, -1) + 1
        records = self._records.setdefault(module, [])
        if number == len(records):
            records.append(_Record())
        return records[number]

    def _keep(self, record: _Record, tensors: dict[str, torch.Tensor]) -> None:
        mine, real = self.batch.mine(self._piece), self.batch.real[:, self._piece]
        for name, tensor in tensors.items():
            record.shares.setdefault(name, []).append(tensor[:, mine.to(tensor.device)])
            entries = tensor[real.to(tensor.device)]
            record.largest[name] = max(record.largest.get(name, 0.0), float(entries.abs().max()))


class _Sharded(_Watch):
    """The run on shards, in which each layer and each mixer gets what it got in the run on whole sequences."""

    def __init__(self, model: torch.nn.Module, batch: _Batch, records: dict[torch.nn.Module, list[_Record]]):
        super().__init__(model, batch)
        self._records = records
        self._names = {module: name for name, module in self.inner.named_modules()}
        self._begun_calls: dict[torch.nn.Module, int] = {}
        self._done_calls: dict[torch.nn.Module, int] = {}
        self._differences: list[Difference] = []
        self._shape = len(batch.real), len(batch.columns)

    def run(self, cp: ContextParallel) -> list[Difference]:
        """What differs on this rank."""
        with torch.no_grad(), cp.shard(self.batch.inputs, self.model) as local, self.watching():
            self.model(**local)
        for module, records in self._records.items():
            if self._done_calls.get(module, -1) + 1 != len(records):
                raise RuntimeError(
                    f"{self._names[module]} runs {len(records)} times of whole sequences and "
                    f"{self._done_calls.get(module, -1) + 1} times of shards."
                )
        return self._differences

    def is_watched(self, module):
        return module in self._records

    def begun(self, module, args, kwargs):
        is_first = not self._begun_calls
        record = self._record(module, self._begun_calls)
        hidden, expected = _hidden_states(args, kwargs, self._shape), record.share(INPUT)
        if hidden is None or expected is None:
            return None
        if is_first:
            self._compare(module, record, {INPUT: _take(args, kwargs, hidden)})
        return _replaced(args, kwargs, hidden, expected)

    def done(self, module, args, kwargs, output):
        record = self._record(module, self._done_calls)
        if module in self.layers:
            self._compare(module, record, {OUTPUT: _hidden_output(output, self._shape)})
            return
        hidden, x = _hidden_states(args, kwargs, self._shape), record.share(INPUT)
        if x is not None:
            args, kwargs = _replaced(args, kwargs, hidden, x)
        self._compare(module, record, _run(module, args, kwargs, hidden, self._shape, self._weigh))

    def _weigh(self, output: torch.Tensor) -> torch.Tensor:
        return self.batch.draw(output, slice(None), self.batch.columns)

    def _record(self, module: torch.nn.Module, calls: dict[torch.nn.Module, int]) -> _Record:
        number = calls[module] = calls.get(module, -1) + 1
        records = self._records.get(module, [])
        if number >= len(records):
            raise RuntimeError(f"{self._names[module]} runs more often of shards than of whole sequences.")
        return records[number]

    def _compare(self, module: torch.nn.Module, record: _Record, found: Mapping[str, torch.Tensor | None]) -> None:
        """Note by how much tensors of this shard differ from the whole's."""
        real = self.batch.real[:, self.batch.columns]
        share = MOST if module in self.layers and _is_routed(module) else 1.0
        for name, tensor in found.items():
            expected = record.share(name)
            if tensor is None or expected is None:
                continue
            rounding = _worst(torch.cat(record.rounding[name]), share) if name in record.rounding else 0.0
            largest = max(record.largest[name], torch.finfo(torch.float32).tiny)
            bound = max(MARGIN * rounding / largest, FLOOR * record.epsilon)
            error = _worst(_by_token(tensor, expected, real), share) / largest
            self._differences.append(
                Difference(self._names[module], name, self.batch.kind, error, bound),
            )


def _is_routed(module: torch.nn.Module) -> bool:
    return any(ROUTED.fullmatch(type(part).__name__) for part in module.modules())


# One module


@contextmanager
def _stock_forwards(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Modules that see whole sequences find the names of stock attention in their configurations, as on a shard.

    Some ask for the name. Elsewhere it stays ours, by which attention is heard of.
    """
    replacement = _StockForwards()
    try:
        for module in modules:
            replacement.replace(module)
        with told_otherwise():
            yield
    finally:
        replacement.restore()


class _StockForwards(Replacement):
    def run(self, module: torch.nn.Module, forward: Callable, turn: int, *args, **kwargs) -> Any:
        with stock_attention(module):
            return forward(*args, **kwargs)


def _run(
    module: torch.nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
    hidden: int | str | None,
    shape: tuple[int, int],
    weigh: Callable[[torch.Tensor], torch.Tensor] | None,
) -> dict[str, torch.Tensor]:
    """A module's output, and with `weigh` the gradient of its hidden states, for `weigh(output)` as the output's.

    The module's hooks stay out of it: its parameters are gathered, and its inputs as they should be.

    Args:
        hidden: where its arguments have the hidden states; None if they do not.
        shape: rows and tokens of its output.
    """
    args, kwargs = tree_map(_detached, (args, kwargs))
    leaf = None
    if hidden is not None and weigh is not None:
        leaf = _take(args, kwargs, hidden).requires_grad_()
    with nullcontext() if leaf is None else torch.enable_grad():
        if hidden is not None:  # a copy: modules may write into it
            args, kwargs = _replaced(args, kwargs, hidden, _take(args, kwargs, hidden).clone())
        output = _hidden_output(module.forward(*args, **kwargs), shape)
    if output is None:
        return {}
    result = {OUTPUT: output.detach()}
    if leaf is not None and output.requires_grad:
        (gradient,) = torch.autograd.grad(output, leaf, weigh(output), allow_unused=True)
        result |= {} if gradient is None else {GRADIENT: gradient}
    return result


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf


def _hidden_states(args: tuple, kwargs: dict[str, Any], shape: tuple[int, int]) -> int | str | None:
    """Which argument is the hidden states, by its index or name: the first `[B, S, ...]`, or the one called so."""
    if _is_hidden(kwargs.get("hidden_states"), shape):
        return "hidden_states"
    places = (*enumerate(args), *kwargs.items())
    return next((place for place, value in places if _is_hidden(value, shape)), None)


def _is_hidden(value: Any, shape: tuple[int, int]) -> bool:
    is_tensor = isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter)
    return is_tensor and value.is_floating_point() and value.dim() >= 3 and tuple(value.shape[:2]) == shape


def _hidden_output(output: Any, shape: tuple[int, int]) -> torch.Tensor | None:
    """The first of a module's outputs that is `[B, S, ...]`."""
    leaves = tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    return next((leaf for leaf in leaves if _is_hidden(leaf, shape)), None)


def _take(args: tuple, kwargs: dict[str, Any], place: int | str) -> torch.Tensor:
    return args[place] if isinstance(place, int) else kwargs[place]


def _replaced(args: tuple, kwargs: dict[str, Any], place: int | str, value: torch.Tensor) -> tuple[tuple, dict]:
    """The arguments with another value in one place."""
    if isinstance(place, int):
        return (*args[:place], value, *args[place + 1 :]), kwargs
    return args, {**kwargs, place: value}


def _by_token(found: torch.Tensor, expected: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """The largest difference of each token that is not padding: `[tokens]`."""
    real = real.to(found.device)
    return (found[real].double() - expected[real].double()).flatten(1).abs().amax(1)


def _worst(errors: torch.Tensor, share: float) -> float:
    """The largest of a share of the errors, the smallest ones."""
    if not len(errors):
        return 0.0
    return float(errors.max() if share == 1.0 else errors.nan_to_num(nan=float("inf")).quantile(share))


# What stays as it is


@contextmanager
def _summed(model: torch.nn.Module, cp: ContextParallel) -> Iterator[None]:
    """Whole sequences too run without the hooks that Transformers would leave on replicated parameters."""
    replacement = ReplicatedParameters(cp.groups.tensor.group)
    if cp.groups.tensor.size > 1:
        replacement.replace_all(styles_of(transformers_model(model)))
    try:
        yield
    finally:
        replacement.restore()


@contextmanager
def _untouched(model: torch.nn.Module) -> Iterator[None]:
    """The model runs in evaluation mode and leaves no trace: on itself, or on random numbers."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, *_kept(buffer)) for module in model.modules() for name, buffer in module._buffers.items()
    ]
    ropes = [(module, dict(vars(module))) for module in model.modules() if follows_length(module)]
    numbers = random.getstate(), numpy.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    # Dynamo would compile the model with our hooks in it.
    compiler = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    model.eval()
    try:
        with torch.random.fork_rng(devices), compiler:
            yield
    finally:
        for module, training in modes:
            module.training = training
        for module, state in ropes:
            vars(module).update(state)
        for module, name, buffer, content in buffers:
            if content is not None:
                buffer.copy_(content)
            module._buffers[name] = buffer
        for module in model.modules():
            if isinstance(module, FSDPModule):  # the outermost stays gathered after a pass without gradients
                module.reshard()
        random.setstate(numbers[0])
        numpy.random.set_state(numbers[1])


def _kept(buffer: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """A buffer and its content. That of integers is not written to: it may be all of a quantised model."""
    return buffer, buffer.clone() if buffer is not None and buffer.is_floating_point() else None
