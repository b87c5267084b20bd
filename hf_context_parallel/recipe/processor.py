"""Processor of an image-text model: its tokenizer, the processor of its images, and its chat template."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import AutoProcessor, PreTrainedConfig, ProcessorMixin

from hf_context_parallel.compat import processor_classes
from hf_context_parallel.recipe.errors import RecipeError
from hf_context_parallel.recipe.model import BYTES, load_config, tokenizer_with_marks
from hf_context_parallel.recipe.schema import ModelSection

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE\n{% else %}{{ part.text }}{% endif %}{% endfor %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""Chat template with text between images, without which Qwen's types would count two images as one."""


def load_processor(section: ModelSection) -> ProcessorMixin:
    """Load the processor of an image-text model. With `tokenizer: bytes` it is made, without a file.

    Raises:
        RecipeError: if the processor cannot be loaded or made, or has no chat template.
    """
    source = section.tokenizer or section.name
    try:
        if source == BYTES:
            return _processor_of_bytes(load_config(section))
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=section.trust_remote_code)
    except RecipeError:
        raise
    except Exception as error:  # processors raise exceptions of many kinds
        raise RecipeError(
            f"model.tokenizer: {source!r} gives no processor of images ({error}). Give a folder or a hub id with a "
            "processor, and install what it names."
        ) from error
    if not isinstance(processor, ProcessorMixin) or processor.chat_template is None:
        raise RecipeError(
            f"model.tokenizer: {source!r} has no processor of images with a chat template, which data.images needs. "
            "Name another."
        )
    return processor


def _processor_of_bytes(config: PreTrainedConfig) -> ProcessorMixin:
    """Make the processor of a model type with ByT5's tokenizer, and without videos."""
    stock, images = processor_classes(config)
    sizes = _sizes(config)
    parameters = inspect.signature(stock.__init__).parameters
    # Processors of videos need torchvision, and `__init__` refuses None for one.
    parts = classmethod(lambda cls: ["image_processor", "tokenizer"])
    made = type(stock.__name__, (stock,), {"get_attributes": parts})
    processor = made(
        images(**{name: value for name, value in sizes.items() if hasattr(images, name)}),
        tokenizer_with_marks(),
        **{name: value for name, value in sizes.items() if name in parameters},
    )
    processor.chat_template = CHAT_TEMPLATE.replace("IMAGE", processor.image_token)
    return processor


def _sizes(config: PreTrainedConfig) -> dict[str, Any]:
    """Collect the sizes of images, patches and their merging, under the names that processors use."""
    vision = config.vision_config
    found = {name: getattr(vision, name, None) for name in ("patch_size", "temporal_patch_size")}
    found["merge_size"] = getattr(vision, "spatial_merge_size", None)
    found["image_seq_length"] = getattr(config, "mm_tokens_per_image", None)
    side = getattr(vision, "image_size", None)  # types without it take images of any size
    found["size"] = None if side is None else {"height": side, "width": side}
    return {name: value for name, value in found.items() if value is not None}
