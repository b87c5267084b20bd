"""Context parallelism for Hugging Face Transformers.

Importing this package registers `attn_implementation="context_parallel"`.
"""

from .config import ContextParallelConfig
from .context_parallel import ContextParallel
from .data import ContextParallelDataCollator
from .integration.attention import register
from .trainer import ContextParallelMixin, ContextParallelTrainer

register()

__all__ = [
    "ContextParallel",
    "ContextParallelConfig",
    "ContextParallelDataCollator",
    "ContextParallelMixin",
    "ContextParallelTrainer",
]
