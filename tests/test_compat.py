"""Imports from other packages: documented names on import, and undocumented ones where they are needed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer

import hf_context_parallel
from hf_context_parallel import compat
from hf_context_parallel.integration.active_batch import entered
from hf_context_parallel.integration.model_registry import sees_whole
from hf_context_parallel.trainer.refusals import UNDOCUMENTED, check_versions
from hf_context_parallel.verification.types import tiny
from tests.helpers.trainer import make_trainer

PACKAGE = Path(hf_context_parallel.__file__).parent
OTHERS = ("accelerate", "peft", "transformers")
DOCUMENTED = {
    "accelerate",
    "accelerate.data_loader",
    "accelerate.scheduler",
    "accelerate.state",
    "accelerate.utils",
    "peft",
    "transformers",
    "transformers.utils",
}
"""Modules of other packages whose public names are documented."""


def undocumented(node: ast.AST) -> Iterator[str]:
    """Yield the undocumented names that a statement imports from other packages."""
    if isinstance(node, ast.Import):
        found = [(alias.name, "") for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
        found = [(node.module, alias.name) for alias in node.names]
    else:
        return
    for module, name in found:
        if module.split(".")[0] in OTHERS and (module not in DOCUMENTED or name.startswith("_")):
            yield f"{module} {name}"
        if module.split(".")[0] == "torch" and any(part.startswith("_") for part in (*module.split("."), name)):
            yield f"{module} {name}"


def test_undocumented_names_are_imported_nowhere():
    """Check imports inside functions too: `compat.lookup` is to be used there, as its error names the missing name."""
    found = {
        f"{path.relative_to(PACKAGE)}: {name}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for name in undocumented(node)
    }
    assert not found


def test_a_name_that_is_gone_refuses_what_needs_it(monkeypatch):
    from transformers.models.bloom import modeling_bloom

    monkeypatch.delattr(modeling_bloom, "build_alibi_tensor")
    with pytest.raises(ValueError, match=r"has no build_alibi_tensor in .*, and model type 'bloom' needs it"):
        compat.bloom_alibi()
    monkeypatch.delattr(torch.utils._pytree, "tree_leaves")
    with pytest.raises(ValueError, match=r"torch .* has no tree_leaves in torch\.utils\._pytree, and a model whose"):
        compat.tree_leaves([])
    monkeypatch.delattr(torch._C, "_ForceDispatchKeyGuard")
    with (
        pytest.raises(ValueError, match=r"has no _ForceDispatchKeyGuard in .*, and .* a compiled model needs it"),
        compat.recording_gradients(),
    ):
        pass
    with pytest.raises(ValueError, match=r"has no gone in transformers\.models\.gone, and it needs it"):
        compat.lookup("transformers.models.gone", "gone", "it")


@pytest.mark.parametrize("kind", UNDOCUMENTED)
def test_a_member_that_is_gone_is_named(kind, monkeypatch):
    name = UNDOCUMENTED[kind][-1]
    monkeypatch.delattr(kind, name)
    with pytest.raises(ValueError, match=rf"has no {kind.__name__}.{name}, and ContextParallelTrainer needs it"):
        check_versions()


def test_a_trainer_without_a_hook_is_refused(monkeypatch, tmp_path):
    monkeypatch.delattr(Trainer, "_get_num_items_in_batch")
    with pytest.raises(ValueError, match=r"has no Trainer\._get_num_items_in_batch"):
        make_trainer(1, tmp_path)


def test_an_attention_in_a_table_of_its_own_runs_outside_of_shards_alone():
    config = tiny.tiny_config("git")
    model = AutoModelForCausalLM.from_config(config, attn_implementation="context_parallel")
    ids = torch.tensor([[5, 6, 7]])
    assert torch.isfinite(model(input_ids=ids).logits).all()
    attention = next(part for part in model.modules() if type(part).__name__ == "GitSelfAttention")
    refused = pytest.raises(ValueError, match="GitSelfAttention was chosen from GIT_SELF_ATTENTION_CLASSES")
    with refused, entered(object()):
        attention(torch.zeros(1, 3, config.hidden_size))


@pytest.mark.parametrize("model_type", ["falcon", "gpt_neo", "gptj", "codegen"])
def test_an_attention_sees_whole_sequences_unless_it_asks_the_interface(model_type):
    config = tiny.tiny_config(model_type)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="context_parallel")
    attentions = {type(part) for part in model.modules() if re.search("Attention$", type(part).__name__)}
    assert attentions
    assert any(sees_whole(kind) for kind in attentions) == (not any(map(compat.asks_interface, attentions)))
