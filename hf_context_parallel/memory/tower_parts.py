"""Bytes of a vision tower on a rank, which encodes its share of images and takes the features of its own tokens."""

from __future__ import annotations

from .job import Job

WIDE = 4
"""Bytes of a number in float32, in which pixels arrive and positions are rotated."""


class TowerParts:
    """Bytes of the activations of a tower. Without images, all are 0.

    Counted are layers of two norms, attention with rotated queries and keys, and an MLP of two matrices.

    Attributes:
        pixels: pixels of all batches of a step. A rank has those of all images of its group.
        kept: what the tower keeps until its backward; 0 if it has no graph.
        forward: bytes beside `pixels` and `kept` while the tower runs forward, or features are exchanged.
        features: features that this rank has encoded. The output of the model holds them until the loss is computed.
        joined: features that the tokens of this rank take, while the decoder runs.
        gradients: gradients of the features of DeepStack, when backward has reached the first layer.
        backward: bytes while a layer runs backward, or gradients of features are exchanged, beyond `kept`.
    """

    def __init__(self, job: Job):
        self.pixels = self.kept = self.forward = self.features = self.joined = self.gradients = self.backward = 0.0
        tower, size = job.facts.tower, job.dtype.itemsize
        if tower is None or not job.image_tokens:
            return
        width, inner, layers = tower.sizes[:3]
        patches = -(-job.image_tokens * tower.merge // job.cp)
        one, mlp = patches * width, patches * inner
        # One feature of each image token of this rank.
        level = job.image_tokens / job.cp * job.facts.hidden * size
        levels = tower.levels
        self.pixels = job.batches * job.image_tokens * tower.merge * tower.numbers * WIDE
        of_rank = (patches * tower.numbers * WIDE if job.cp > 1 else 0) + levels * level
        positions = one * WIDE * (1 + 2 / tower.heads)  # embedded, and their cosines and sines
        # A layer has hidden states, queries, keys and values, and then either terms of the rotation in float32, or
        # the outputs of attention, or the MLP.
        rotating = 5 * one * size + 4 * one * WIDE + (2 * one * WIDE if size < WIDE else 0)
        encoding = of_rank + positions + max(rotating, 10 * one * size, (3 * one + 2 * mlp) * size)
        # Features encoded here, features taken, and the buffers in which one level is sent and received.
        exchanging = (2 * (levels + 1) + 2) * level if job.cp > 1 else 0.0
        self.forward = max(encoding, exchanging)
        self.features = self.joined = (levels + 1) * level
        if not tower.trained and not (tower.woken and job.checkpointing):
            return
        # A layer saves its input, both normed states, queries, keys and values, those that are rotated, the output of
        # attention twice, the sum with it, and two tensors of the MLP.
        saved = (11 * one + 2 * mlp) * size
        merger = 3 * one * size  # which is not checkpointed: its norm, and two tensors of its MLP
        self.kept = (layers + 1) * one * size if job.checkpointing else layers * saved + one * size
        self.kept += (levels + 1) * merger + 2 / tower.heads * one * WIDE
        if tower.trained and size < WIDE:
            self.kept += patches * tower.numbers * size  # pixels, cast
        self.gradients = levels * level
        summing = (levels + 1) * level + ((levels + 3) * level if job.cp > 1 else 0.0)
        # The merger has freed what it saved. Of the MLP's tensors one is freed when the gradients of both are there.
        again = saved if job.checkpointing else 0.0
        self.backward = max(summing, again + (mlp + one) * size - merger)
