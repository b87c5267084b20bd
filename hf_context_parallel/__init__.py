"""Context parallelism for Hugging Face Transformers.

Importing this package registers `attn_implementation="context_parallel"`.
"""

from .config import ContextParallelConfig
from .context_parallel import ContextParallel
from .data.collator import ContextParallelDataCollator
from .distributed.mesh import mesh_of
from .integration.border.parallelize import parallelize
from .integration.interfaces import attention as attention_interface
from .integration.interfaces import masks as mask_interface
from .trainer.enable import enable_accelerate
from .trainer.mixin import ContextParallelMixin, ContextParallelTrainer
from .verification.verify import verify

__version__ = "0.1.0"

attention_interface.register()
mask_interface.register()

__all__ = [
    "ContextParallel",
    "ContextParallelConfig",
    "ContextParallelDataCollator",
    "ContextParallelMixin",
    "ContextParallelTrainer",
    "enable_accelerate",
    "mesh_of",
    "parallelize",
    "verify",
]
