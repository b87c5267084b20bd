"""Trainers of TRL that split each sequence over the ranks of a CP group.

    from hf_context_parallel.trl import SFTTrainer

Each is the class of TRL with `ContextParallelMixin` before it, and takes `context_parallel=ContextParallelConfig(...)`
as one more argument. The mixin does the same for a subclass of yours: `class Mine(ContextParallelMixin, MyTrainer)`.

Trainers of `trl.experimental` are made on request, by their names: `from hf_context_parallel.trl import ORPOTrainer`.

Raises:
    ImportError: if TRL is not installed, or is older than `OLDEST`.
    ValueError: if TRL lacks a method that the mixin overrides.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
from typing import Any

from packaging.version import Version
from transformers import Trainer, TrainingArguments

from .compat import require
from .trainer.mixin import ContextParallelMixin

OLDEST, NEWEST = "1.16", "1.16"
"""Versions of TRL between which the trainers were compared with one process."""

try:
    import trl
except ImportError as error:
    raise ImportError(f"hf_context_parallel.trl needs TRL: `pip install 'trl>={OLDEST}'`.") from error
if Version(trl.__version__) < Version(OLDEST):
    raise ImportError(f"TRL {trl.__version__} is older than {OLDEST}. Upgrade it: `pip install 'trl>={OLDEST}'`.")
GENERATING = (trl.GRPOTrainer, trl.RLOOTrainer, trl.DistillationTrainer)
require(dict.fromkeys(GENERATING, ("_generate_single_turn",)), "hf_context_parallel.trl")
if Version(trl.__version__).release[:2] > Version(NEWEST).release:
    logging.getLogger(__name__).warning(
        "TRL %s is newer than %s, with which trainers were compared. Compare yours: hf-context-parallel check "
        "--trainers SFT",
        trl.__version__,
        NEWEST,
    )


class SFTTrainer(ContextParallelMixin, trl.SFTTrainer):
    """Supervised fine-tuning."""


class DPOTrainer(ContextParallelMixin, trl.DPOTrainer):
    """Direct preference optimization."""


class KTOTrainer(ContextParallelMixin, trl.KTOTrainer):
    """Kahneman-Tversky optimization."""


class RewardTrainer(ContextParallelMixin, trl.RewardTrainer):
    """Training of reward models."""


class GRPOTrainer(ContextParallelMixin, trl.GRPOTrainer):
    """Group relative policy optimization."""


class RLOOTrainer(ContextParallelMixin, trl.RLOOTrainer):
    """REINFORCE leave-one-out."""


class DistillationTrainer(ContextParallelMixin, trl.DistillationTrainer):
    """On-policy distillation from a teacher."""


def stock_class(made: type[Trainer]) -> type[Trainer]:
    """Return the class of TRL that a class with the mixin was made of."""
    return next(base for base in made.__mro__ if base.__module__.startswith("trl."))


def arguments_class(made: type[Trainer]) -> type[TrainingArguments]:
    """Return the class of the arguments of a trainer with the mixin, which lies beside the trainer in TRL."""
    stock = stock_class(made)
    folder = importlib.import_module(stock.__module__.rsplit(".", 1)[0])
    found: type[TrainingArguments] = getattr(folder, stock.__name__.removesuffix("Trainer") + "Config")
    return found


def __getattr__(name: str) -> Any:
    """Make the class of an experimental trainer of TRL."""
    if name.endswith("Trainer"):
        experimental = importlib.import_module("trl.experimental")
        for folder in pkgutil.iter_modules(experimental.__path__):
            if name.removesuffix("Trainer").lower() == folder.name.replace("_", ""):
                stock = getattr(importlib.import_module(f"trl.experimental.{folder.name}"), name)
                made = type(name, (ContextParallelMixin, stock), {"__module__": __name__, "__doc__": stock.__doc__})
                globals()[name] = made
                return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
