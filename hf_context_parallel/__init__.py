"""Context parallelism for Hugging Face Transformers.

Importing this package registers `attn_implementation="context_parallel"`.
"""

from .config import ContextParallelConfig
from .context_parallel import ContextParallel
from .data import ContextParallelDataCollator
from .distributed.mesh import mesh_of
from .integration import attention, masks
from .trainer import ContextParallelMixin, ContextParallelTrainer
from .verification import verify

attention.register()
masks.register()

__all__ = [
    "ContextParallel",
    "ContextParallelConfig",
    "ContextParallelDataCollator",
    "ContextParallelMixin",
    "ContextParallelTrainer",
    "mesh_of",
    "verify",
]
