"""Proofs: models that `verify` or `hf-context-parallel check` found exact, and that no table of the package has.

A proof is kept in the cache of the user. It is for the source of all modules of a decoder, for a configuration without
its sizes, and for the versions of Transformers and of this package.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import re
import sys
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from ...distributed.mesh import world
from ...distributed.user_cache import FOLDER, keep, kept
from ..patches.module_patch import inside_patches

PROOFS = FOLDER / "proofs.json"
"""File with the digests of proven models, each with the name of its class."""

UNRELATED = re.compile(
    r"_.*|(torch_)?dtype|transformers_version|architectures|auto_map|name_or_path|id2label|label2id|problem_type"
    r"|.*_token_id|use_cache|output_.*|return_dict|distributed_config"
)
"""Names of fields of a configuration that do not change how a decoder computes."""

_proven: set[str] = set()
"""Digests of the models that were proven in this process."""


class Unproven(ValueError):
    """Error for a model that may be exact and has not been compared with itself on whole sequences."""


def is_proven(decoder: PreTrainedModel) -> bool:
    """Return whether a decoder was found exact before. Every process of the world must call this."""
    digest = identity(decoder)
    known = digest in _proven or digest in kept(PROOFS)
    ranks = world()
    if ranks.size > 1:  # machines have caches of their own
        agreed = torch.tensor(int(known), device=ranks.device)
        dist.all_reduce(agreed, dist.ReduceOp.MAX, group=ranks.group)
        known = bool(agreed)
    return known


def keep_proof(decoder: PreTrainedModel) -> None:
    """Remember that a decoder was found exact, in this process and in the cache of the user."""
    digest = identity(decoder)
    _proven.add(digest)
    if digest in kept(PROOFS) or int(os.environ.get("LOCAL_RANK", 0)):
        return
    try:
        keep(PROOFS, {digest: type(decoder).__qualname__})
    except OSError:
        return  # without a cache, the proof is made again


def identity(decoder: PreTrainedModel) -> str:
    """Compute the digest of a decoder: the code of its modules, its configuration without sizes, and versions."""
    code = {_source(kind) for kind in {_class_of(module) for module in decoder.modules()}}
    replaced = {module: inside_patches(module.forward) for module in decoder.modules() if "forward" in vars(module)}
    stock = (type(module).forward for module in replaced)
    code |= {
        _source(own) for own, theirs in zip(replaced.values(), stock) if getattr(own, "__func__", own) is not theirs
    }
    parts = (
        sorted(code),
        _without_sizes(decoder.config.to_dict()),
        transformers.__version__,
        _own_version(),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _own_version() -> str:
    """Return the version of this package, which is read where it is defined, since it may run without metadata."""
    package = sys.modules[__name__.partition(".")[0]]  # to import it here would be a circle
    found: str = package.__version__
    return found


def _class_of(module: torch.nn.Module) -> type:
    """Return the class of a module, without what `fully_shard` makes of it."""
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))


def _source(code: Any) -> str:
    """Return the source of a class or a function, or its name where there is no source."""
    code = inspect.unwrap(getattr(code, "__func__", code))
    try:
        return inspect.getsource(code)
    except (OSError, TypeError):
        return str(getattr(code, "__qualname__", type(code).__qualname__))


def _without_sizes(value: Any) -> Any:
    """Return the parts of a configuration that are no numbers, in a fixed order. None stands for any number."""
    if isinstance(value, dict):
        names = (name for name in value if not UNRELATED.fullmatch(str(name)))
        return sorted((str(name), _without_sizes(value[name])) for name in names)
    if isinstance(value, (list, tuple)):
        return sorted({repr(_without_sizes(x)) for x in value})
    is_size = value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
    return "a number" if is_size else repr(value)
