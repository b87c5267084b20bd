"""Places of the shipped recipes, and a recipe with what must be given alone."""

from pathlib import Path

RECIPES = Path(__file__).parents[2] / "recipes"
MEGATRON = ("megatron_quick_start_cpu", "megatron_quick_start")
MINIMAL = """
model: {type: qwen3, tokenizer: bytes}
data: {path: text, max_length: 128}
"""


def length(completions: list[str], **kwargs) -> list[float]:
    """Reward for length."""
    return [float(len(text)) for text in completions]
