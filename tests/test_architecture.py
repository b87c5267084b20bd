"""Imports between the files of the package, read from the source: they go down only, and in no circle."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_context_parallel"
LEVELS = (
    "config",
    "compat",
    "planning",
    "distributed",
    "data",
    "attention",
    "calibration.rates",
    "cp_group",
    "memory",
    "integration.switches",
    "integration.model_registry",
    "integration.active_batch",
    "integration.outer_call",
    "integration.deferred",
    "integration.patches",
    "integration.interfaces",
    "integration.mixers",
    "integration.tensor_parallel",
    "integration.tiles",
    "integration.installation",
    "integration.kept_attention",
    "integration.checks",
    "integration.towers",
    "integration.border",
    "integration.sharded_batch",
    "functional",
    "context_parallel",
    "calibration",
    "dynamic",
    "verification.layers",
    "verification.whole_model",
    "verification.verify",
    "verification.types",
    "trainer",
    "trl",
    "verification.trainers",
    "recipe",
    "sizing",
    "train",
    "cli",
    "__init__",
)
"""Files and folders from the bottom up. Each may import from itself and from those before it."""
MOST_AT_THE_TOP = 9


def name_of(path: Path) -> str:
    """Make the dotted name of a file within the package, which ends with `__init__` for the file of a folder."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


def imports(source: str, module: str, modules: set[str]) -> Iterator[str]:
    """List the modules of the package that a file imports anywhere, imports for types alone included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = [PACKAGE.name, *module.split(".")][: -node.level] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            names = [(base, alias.name) for alias in node.names]
        else:
            continue
        for base, name in names:
            if base.split(".")[0] != PACKAGE.name:
                continue
            inner = base.removeprefix(PACKAGE.name).removeprefix(".")
            candidates = [inner, f"{inner}.__init__".removeprefix(".")]
            if name is not None:
                candidates.insert(0, f"{inner}.{name}".removeprefix("."))
            yield next(candidate for candidate in candidates if candidate in modules)


ARROWS = {module: set(imports(path.read_text(), module, MODULES.keys())) for module, path in MODULES.items()}


def level(module: str) -> int:
    """Find the level of a module in `LEVELS`."""
    found = [number for number, name in enumerate(LEVELS) if f"{module}.".startswith(f"{name}.")]
    assert found, f"{module} has no place in LEVELS"
    return found[0]


def is_empty(module: str) -> bool:
    """Return True for the `__init__` of a folder that holds only a docstring."""
    return module.endswith(".__init__") and len(ast.parse(MODULES[module].read_text()).body) == 1


@pytest.mark.parametrize("module", sorted(module for module in MODULES if not is_empty(module)))
def test_nothing_imports_from_above(module):
    above = sorted(other for other in ARROWS[module] if level(other) > level(module))
    assert not above, f"{module} imports from above: {', '.join(above)}"


def test_no_circle():
    try:
        TopologicalSorter(ARROWS).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


def test_folders_import_nothing_by_themselves():
    """Assert that importing a file of a folder runs no other file."""
    assert [module for module in MODULES if module.endswith(".__init__") and not is_empty(module)] == []


def test_few_files_at_the_top():
    at_the_top = sorted(path.name for path in PACKAGE.glob("*.py"))
    assert len(at_the_top) <= MOST_AT_THE_TOP, at_the_top


def test_all_ways_to_import_are_seen():
    source = """
from typing import TYPE_CHECKING
import hf_context_parallel.config
from . import masks
from ..planning import plan as plans
if TYPE_CHECKING:
    from ...context_parallel import ContextParallel
def late():
    from hf_context_parallel import verify
"""
    modules = {"config", "context_parallel", "integration.interfaces.masks", "integration.planning.plan", "__init__"}
    found = list(imports(source, "integration.interfaces.attention", modules))
    assert found == [
        "config",
        "integration.interfaces.masks",
        "integration.planning.plan",
        "context_parallel",
        "__init__",
    ]
