"""Search of the source for what SECURITY.md says that the package never does with what it reads."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from pathlib import Path

import pytest

import hf_context_parallel
from hf_context_parallel import cli
from hf_context_parallel.recipe.schema import ModelSection
from hf_context_parallel.sizing.command import Asked

PACKAGE = Path(hf_context_parallel.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
UNPICKLING = {"pickle", "dill", "marshal", "shelve", "cloudpickle", "joblib"}
PICKLES_FOR_ITS_WORKERS = "data/ahead.py"
"""The one module that unpickles: what this process or a worker of its loader has pickled, from their memory."""
REFUSED_CALLS = {"eval", "exec", "compile", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}


def called(call: ast.Call) -> str:
    """Name of a function that is called, such as `os.system`."""
    return ast.unparse(call.func)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_nothing_that_is_read_is_run(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            unpickling = UNPICKLING & {name.partition(".")[0] for name in names}
            assert not unpickling or path.relative_to(PACKAGE).as_posix() == PICKLES_FOR_ITS_WORKERS
        if isinstance(node, ast.Call):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert called(node) not in REFUSED_CALLS
            assert called(node) != "torch.load" or keywords.get("weights_only") == "True"
            assert keywords.get("shell", "False") == "False"
            assert keywords.get("trust_remote_code") != "True"


def test_code_of_others_is_off_until_asked_for():
    defaults = [
        next(field.default for field in dataclasses.fields(section) if field.name == "trust_remote_code")
        for section in (ModelSection, Asked)
    ]
    defaults += [
        inspect.signature(command).parameters["trust_remote_code"].default for command in (cli.check, cli.plan)
    ]
    assert defaults == [False] * 4
