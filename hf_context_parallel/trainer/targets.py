"""Checks that there is something to learn: labels that fit their tokens, and steps with targets."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from transformers import DataCollatorForLanguageModeling, PreTrainedModel

from ..data.batch import IGNORED
from ..distributed.agreement import agreed_error
from ..distributed.mesh import world

logger = logging.getLogger(__name__)

STOCK = ("transformers", "trl")
"""Packages whose collators pad or join tokens and labels apart from each other."""
MOST = 1 << 20
"""Most samples that are read before training."""
PATIENCE = 10
"""Steps after which training ends if none has had a target."""

Row = tuple[int, int, Callable[[], Sequence[int]]]
"""Numbers of tokens and of labels of a sample, and a function that reads its labels."""


def check_samples(
    samples: Any, collator: Any, model: torch.nn.Module, shifts: bool = True, stock_loss: bool = True
) -> None:
    """Refuse samples whose labels are longer or shorter than their tokens, and samples without any target.

    A collator of Transformers or TRL would pad short labels with -100, and let long ones run into the next sample.
    Before another collator, or a loss of the user, this is a warning, as they may use such labels. Read are lists and
    data sets of `datasets`, whose samples need no computing.

    Args:
        samples: the data set.
        collator: the collator of the samples.
        model: the model. Labels of models without a language-model head are not read.
        shifts: True if the label of a token is predicted from the token before it, so that the first is not learnt.
        stock_loss: True if the loss is that of the model.

    Raises:
        ValueError: on this rank, naming the first such sample, and their number.
    """
    if not _has_head(model) or isinstance(collator, DataCollatorForLanguageModeling):  # which makes the labels
        return
    # That of a function, or of the class of an object.
    refuses = stock_loss and str(getattr(collator, "__module__", "")).split(".")[0] in STOCK
    complaint = ""
    number, wrong, first, learnt = 0, 0, "", False
    for number, (tokens, labels, read) in enumerate(islice(_rows(samples), MOST), start=1):
        if tokens != labels:
            wrong += 1
            first = first or f"sample {number - 1} of the data set has {tokens} input_ids and {labels} labels"
        learnt = learnt or any(label != IGNORED for label in read()[1 if shifts else 0 :])
    if wrong:
        complaint = (
            f"{first}, and {wrong:,} of {number:,} samples are so. Give each token a label, {IGNORED} where it is not "
            "to be learnt."
        )
    elif number and not learnt and number < MOST:
        complaint = (
            f"all labels of the {number:,} samples of the data set are {IGNORED}{' behind the first token' * shifts}, "
            "so that there is nothing to learn. Give labels to tokens that are to be predicted."
        )
    if complaint and refuses:
        raise ValueError(complaint)
    if complaint:
        logger.warning(complaint)


def _has_head(model: torch.nn.Module) -> bool:
    """Return whether a model has a language-model head."""
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    return inner is not None and inner.get_output_embeddings() is not None


def _rows(samples: Any) -> Iterator[Row]:
    """Measure the samples that have a list of integers for tokens, and one for labels."""
    if isinstance(samples, list):
        for sample in samples:
            found = [sample.get(name) if isinstance(sample, Mapping) else None for name in ("input_ids", "labels")]
            tokens, labels = (x.tolist() if isinstance(x, torch.Tensor) else x for x in found)
            if all(isinstance(x, Sequence) and (not x or isinstance(x[0], int)) for x in (tokens, labels)):
                yield len(tokens), len(labels), lambda labels=labels: labels
        return
    datasets = sys.modules.get("datasets")  # the Trainer does without it
    if datasets is None or not isinstance(samples, datasets.Dataset):
        return
    if {"input_ids", "labels"} <= {*samples.column_names}:
        yield from _arrow_rows(samples.select_columns(["input_ids", "labels"]).with_format("arrow"))


def _arrow_rows(samples: Any) -> Iterator[Row]:
    """Measure the samples of a table of Arrow. Of the columns, only the ends of their lists are read."""
    import pyarrow as pa  # datasets needs it

    for table in samples.iter(1000):
        columns = [table.column(name) for name in ("input_ids", "labels")]
        kinds = [column.type for column in columns]
        if not all(
            (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_integer(kind.value_type)
            for kind in kinds
        ):
            return
        lengths = [pa.compute.list_value_length(column).to_pylist() for column in columns]
        for tokens, labels, read in zip(*lengths, columns[1], strict=True):
            yield tokens or 0, labels or 0, lambda read=read: read.as_py() or []


class StepTargets:
    """Count of the targets of the steps since the last check.

    Example: training whose labels are made by a collator, which masks all of them.
    """

    def __init__(self) -> None:
        self._count: torch.Tensor | None = None
        self._steps = 0
        self._without = 0
        self._ever = False

    def add(self, count: torch.Tensor) -> None:
        """Add the targets of a step. The device is not waited for."""
        self._count = count if self._count is None else self._count + count
        self._steps += 1

    def check(self, gather: Callable[[torch.Tensor], torch.Tensor], step: int, ended: bool = False) -> None:
        """Warn of steps without a target on any rank. All ranks call this together.

        Args:
            gather: a function that gathers a tensor from all ranks.
            step: the number of the last step.
            ended: True at the end of training.

        Raises:
            ValueError: on all ranks, if `PATIENCE` steps, or all of a shorter training, had no target.
        """
        if self._count is not None:
            found, steps = int(gather(self._count.reshape(1)).sum()), self._steps
            self._count, self._steps = None, 0
            self._ever = self._ever or found > 0
            if not found:
                self._without += steps
                level = logging.WARNING if not dist.is_initialized() or dist.get_rank() == 0 else logging.DEBUG
                logger.log(
                    level,
                    "Step %d and the %d before it had no target on any rank: all labels are %d, so that nothing was "
                    "learnt.",
                    step,
                    steps - 1,
                    IGNORED,
                )
        if not self._ever and self._without and (ended or self._without >= PATIENCE):
            raise agreed_error(
                f"none of the first {self._without} steps had a target on any rank: all labels are {IGNORED}, so that "
                "nothing was learnt. Look at the labels that the data collator makes.",
                world(),
            )
