"""Context parallelism for Hugging Face Transformers.

Importing this package registers `attn_implementation="context_parallel"`.
"""

from .config import ContextParallelConfig
from .context_parallel import ContextParallel
from .data import ContextParallelDataCollator
from .integration import attention, masks
from .mesh import mesh_of
from .trainer import ContextParallelMixin, ContextParallelTrainer
from .verification import verify

__version__ = "0.1.0"

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
