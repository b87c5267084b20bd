"""Parts of the memory of a rank in a step, in bytes, and the peak of their sum.

Parts peak at different times: what the loss needs is gone when the first layer is computed again, and the MLP of a
layer has no memory left when its attention runs backward. So bytes are counted for each phase, and the peak is the
largest sum.

Counted are the tensors of a layer of Llama's kind: two norms, attention, and a gated MLP, or a mixture of experts.
Other layers differ by some hidden states for each token.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from ..attention.peak_memory import peak_of_backward, peak_of_document
from ..attention.prepared import LONG
from ..attention.ring_steps import most_owners
from ..distributed.messages import accumulation_dtype
from .job import OPTIMIZER_STATES, Job
from .tower_parts import TowerParts

WIDE = 4
"""Bytes of a number in float32, in which norms, losses and LSE are computed."""
NORM_BACKWARD, HALF_NORM_BACKWARD = 5, 12
"""Memory that Llama's norm needs in backward, in multiples of its input, beyond its input and the gradient of its
result; and the same for an input of 16 bits. Counted are the tensors that PyTorch allocates."""
JOINED = 4
"""Hidden states that are there at once where modules run on tiles: outputs of an MLP or a norm, and gradients of
their inputs, in pieces and joined. It is fitted to the peaks of `benchmarks/memory.py`."""
OF_TILE = 18 * 2**10
"""Bytes of the host that a module takes for each tile until backward: a state of random numbers, and Python objects.
They are fitted to the same peaks."""
TILED_MODULES = 3
"""Modules of a layer that run on tiles: two norms and an MLP."""
IN_FLIGHT = 2
"""Layers whose offloaded tensors are on the device: one is used while the next one arrives."""


@dataclass(frozen=True)
class Phase:
    """Bytes that are held at the same time.

    Args:
        weights: parameters of the rank, and those that FSDP2 has gathered.
        gradients: gradients of parameters, and buckets of DDP.
        optimizer: states of the optimizer.
        checkpoints: inputs of layers; without checkpointing, all that the layers keep for backward.
        attention: outputs of attention that are kept, and their LSE.
        layer: what one layer needs beyond these while it is computed again and backward.
        messages: keys/values of other ranks, and sums of gradients that travel.
        loss: logits of a chunk, and hidden states and their gradients around the loss.
        tower: pixels, activations of the vision tower, and its features.
    """

    weights: float = 0
    gradients: float = 0
    optimizer: float = 0
    checkpoints: float = 0
    attention: float = 0
    layer: float = 0
    messages: float = 0
    loss: float = 0
    tower: float = 0

    @property
    def total(self) -> float:
        """Sum of all."""
        return sum(float(getattr(self, field.name)) for field in fields(self))


@dataclass(frozen=True)
class Parts:
    """Bytes of a rank in each phase of a step.

    Args:
        phases: by name: `loss`, `mlp of the last layer` and `attention of the last layer` (where backward begins), the
            same of the first layer (where it ends), and `optimizer`. With images there are three more: `tower`, where
            images are encoded, `forward of the last layer`, when the features are still there, and `backward of the
            tower`.
        host: bytes in pinned memory of the host, for what is offloaded.
    """

    phases: dict[str, Phase]
    host: float = 0

    @property
    def peak(self) -> str:
        """Name of the phase that needs most."""
        return max(self.phases, key=lambda name: self.phases[name].total)

    @property
    def at_peak(self) -> Phase:
        """Parts at the peak."""
        return self.phases[self.peak]

    @property
    def total(self) -> float:
        """Bytes at the peak."""
        return self.at_peak.total


def parts_of(job: Job) -> Parts:
    """Count the bytes of the rank that needs most, by phase and part."""
    facts, size, tokens = job.facts, job.dtype.itemsize, job.rank_tokens
    share = job.tp * job.fsdp
    hidden = tokens * facts.hidden * size
    saved = size - facts.quantized_bits / 8  # bytes that quantization takes off a parameter
    one = (facts.layer_parameters * size - facts.quantized_parameters / facts.layers * saved) / job.tp
    ends = facts.head_parameters * (1 if facts.tied else 2) / job.tp * size  # input and output embeddings
    of_tower = facts.tower_parameters * size  # which tensor parallelism does not shard
    weights = ((facts.parameters - facts.tower_parameters) * size - facts.quantized_parameters * saved) / share
    weights += of_tower / job.fsdp
    trains_all = facts.lora_parameters is None
    tower_gradients = facts.trained_of_tower / job.fsdp * size
    gradients = (facts.trained_parameters - facts.trained_of_tower) / share * size + tower_gradients
    of_head = facts.head_parameters / share * size if trains_all else 0
    if job.fsdp > 1:
        # FSDP2 gathers a layer while the one before computes, and keeps the outer weights, those of towers among them.
        weights += 2 * one + ends + of_tower
    weights += facts.dequantized * size
    gathered = one if job.fsdp > 1 and trains_all else 0.0  # whole gradients of a layer, until they are scattered
    buckets = gradients if job.ddp else 0.0
    states = OPTIMIZER_STATES[job.optimizer] * gradients
    layer, tower = _Layer(job), TowerParts(job)

    kept, of_attention, host = _kept(job, layer)
    embeddings = _positions(job)
    before = gradients if job.accumulates else 0.0  # a step of the optimizer has set all others to None
    held = tower.pixels + tower.kept
    common = Phase(weights=weights, gradients=buckets, optimizer=states, checkpoints=embeddings, tower=held)
    every = replace(common, checkpoints=embeddings + facts.layers * kept, attention=facts.layers * of_attention)
    last = replace(every, gradients=buckets + max(before, of_head + gathered))
    first = replace(
        common,
        gradients=buckets + max(before, gradients - tower_gradients) + gathered,
        checkpoints=embeddings + kept,
        attention=of_attention,
        tower=held + tower.gradients,
    )
    phases = {
        "loss": replace(
            every,
            gradients=buckets + before,
            loss=_loss(job, hidden),
            messages=layer.idle_messages,
            layer=layer.idle,
            tower=held + tower.features,
        )
    }
    for name, phase in (("last", last), ("first", first)):
        mlp = replace(phase, layer=layer.mlp, messages=layer.idle_messages)
        phases[f"mlp of the {name} layer"] = mlp
        phases[f"attention of the {name} layer"] = replace(phase, layer=layer.attention, messages=layer.messages)
    if job.image_tokens and facts.tower is not None:
        begun = replace(common, gradients=buckets + before, layer=layer.idle, messages=layer.idle_messages)
        phases["tower"] = replace(begun, checkpoints=0, tower=held + tower.forward)
        forward = replace(begun, checkpoints=every.checkpoints, attention=every.attention)
        phases["forward of the last layer"] = replace(
            forward, layer=layer.idle + layer.forward, tower=held + tower.features + tower.joined
        )
        whole = of_tower if job.fsdp > 1 and facts.tower.trained else tower_gradients
        phases["backward of the tower"] = replace(
            begun,
            gradients=buckets + max(before, gradients - tower_gradients) + whole,
            checkpoints=0,
            tower=held + tower.backward,
        )
    phases["optimizer"] = replace(common, gradients=buckets + gradients, checkpoints=0, tower=tower.pixels)
    return Parts(phases, host)


class _Layer:
    """Working set of one layer, beyond what is kept of it from forward until backward.

    On the CPU, ranks that share sequences copy tiles to buffers. Where rows are not long, these are held for the next
    layer (`distributed/buffers.py`), and so are there in all phases.

    Attributes:
        saved: bytes that the layer saves for backward, without checkpointing.
        output: bytes of the output of attention, with its LSE.
        mlp, attention: bytes while the MLP, and while attention, runs backward.
        forward: bytes while the layer runs forward.
        messages: bytes of buffers for other ranks, while attention runs backward.
        idle, idle_messages: bytes of buffers, and of those for messages, that are held at all times.
        calls: bytes that modules on tiles hold for their calls until backward, on the CPU.
    """

    def __init__(self, job: Job):
        facts, shape, size, tokens = job.facts, job.shape, job.dtype.itemsize, job.rank_tokens
        hidden, wide = tokens * facts.hidden * size, tokens * facts.hidden * WIDE
        query, value = (tokens * shape.heads * dim * size for dim in (shape.query_dim, shape.value_dim))
        keys = tokens * shape.key_value_numbers * size
        width = facts.intermediate * facts.active_experts / job.tp
        inner, tile = (count * width * size for count in (tokens, job.mlp_tokens))
        pooled = job.kernel == "cpu" and not job.is_alone and job.tokens < 2 * LONG  # taken as one causal row
        self.output = value + tokens * shape.heads * WIDE
        in_attention = query + keys + self.output
        # A norm saves its input in float32, the normed states if its weight is trained, and its result. On tiles it
        # saves its input and its result, and the input of the first one is that of the layer.
        norm = wide + hidden * (1 + (facts.lora_parameters is None))
        first, second = (hidden, 2 * hidden) if job.is_tiled else (norm, norm)
        # The MLP saves the results of two projections and of the activation, and their product.
        self.saved = first + second + job.is_tiled * hidden + in_attention + 4 * inner
        # The gradients of the product and of its factors join them, when the product itself is freed.
        self.mlp = first + second + in_attention + hidden + 6 * tile
        if job.is_tiled:
            self.mlp += JOINED * hidden
            if facts.lora_parameters is None and size < WIDE:
                # A copy of the weights in float32, one that is cast for a tile, and the sum of their gradients.
                self.mlp += facts.layer_parameters / job.tp * (2 * WIDE + size)
        # Hidden states, those that are normed, and either those of attention or three tensors of the MLP.
        self.forward = 0.0 if not job.checkpointing else wide + 2 * hidden + max(in_attention + keys, 3 * tile)
        own = _peak_of_attention(job, 1)
        # There are the gradients of the residual and of the output; keys are among those of `own`.
        self.attention = first + in_attention - keys + hidden + value + own
        self.messages = _peak_of_attention(job, job.cp) - own
        self.idle = self.idle_messages = 0.0
        if pooled:
            self.idle = WIDE * tokens * (3 * shape.heads * shape.query_dim + 2 * shape.key_value_numbers)
            # Memory of messages is used again when they have been read, so it also holds what left and arrived before.
            self.messages += 2 * keys * most_owners(job.cp - 1, tokens, shape)
            self.idle_messages = self.messages
            self.mlp += self.idle
        self.calls = 0.0
        if job.kernel == "cpu" and job.is_tiled:  # whose memory is that of the host
            self.calls = TILED_MODULES * -(-tokens // job.mlp_tokens) * OF_TILE
        kept = (hidden if size == WIDE and not job.is_tiled else 0) if job.checkpointing else self.saved
        self.mlp, self.attention = self.mlp - kept, max(0.0, self.attention - kept)
        if job.keeps_attention:
            self.mlp, self.attention = self.mlp - self.output, self.attention - self.output


def _kept(job: Job, layer: _Layer) -> tuple[float, float, float]:
    """Count what a layer keeps for backward: inputs, outputs of attention, and bytes on the host for all layers."""
    hidden: float = job.rank_tokens * job.facts.hidden * job.dtype.itemsize
    if not job.checkpointing:
        return layer.saved + layer.calls, 0.0, 0.0
    layers, host, attention = job.facts.layers, 0.0, 0.0
    attending = (layers - job.facts.linear_layers) / layers
    if job.keeps_attention:
        attention = layer.output * attending
    on_device = min(1.0, IN_FLIGHT / layers)
    if job.attention_checkpoints == "host":
        host += attention * layers
        attention *= on_device
    if job.offload:
        host += hidden * layers
        hidden *= on_device
    return hidden + layer.calls, attention, host


def _positions(job: Job) -> float:
    """Bytes of the cosines and sines of rotary embeddings, which all layers share."""
    return 2 * job.rank_tokens * job.facts.query_dim * job.dtype.itemsize


def _loss(job: Job, hidden: float) -> float:
    """Bytes around the loss: the last norm, the logits of a chunk, and the gradients that are made with them."""
    facts, tokens, chunk = job.facts, job.rank_tokens, job.chunk_tokens
    # In float32: the logarithms of probabilities, their gradients, and the gradients of logits.
    logits = 3 * chunk * facts.vocabulary * WIDE
    trains_head = facts.lora_parameters is None
    head = trains_head * facts.head_parameters / job.tp * accumulation_dtype(job.dtype).itemsize
    # The norm saves what those of layers do. Then come the hidden states of the tokens that have labels.
    norm = JOINED * hidden if job.is_tiled else tokens * facts.hidden * WIDE + hidden * (2 + trains_head)
    pieces = hidden * (1 - chunk / tokens)  # gradients of the chunks before, which are joined when all are made
    joined = hidden + (hidden if chunk < tokens else 0)
    of_loss = norm + max(logits + pieces + (2 if chunk < tokens else 1) * head, joined + head)
    norm_backward = HALF_NORM_BACKWARD if job.dtype.itemsize < WIDE else NORM_BACKWARD
    # Backward of the norm holds its input and the gradient of its result beside what it computes.
    return of_loss if job.is_tiled else max(of_loss, (2 + norm_backward) * hidden + head)


def _peak_of_attention(job: Job, cp: int) -> float:
    """Bytes of attention at the peak of its backward, beyond its inputs, on one of `cp` ranks."""
    shape, tokens = job.shape, job.rank_tokens
    if job.is_alone:  # one call, whose results are the gradients. That of the CPU copies nothing
        kernel = "" if job.kernel == "cpu" else job.kernel
        sums = tokens * shape.heads * shape.query_dim * accumulation_dtype(job.dtype).itemsize
        return peak_of_backward(shape, kernel, tokens, tokens, 1, tokens, 0, 0) - sums
    inner = min(cp, job.inner)
    return peak_of_document(shape, job.kernel, job.comm_type, cp, inner, tokens, job.groups, job.keeps_attention)
