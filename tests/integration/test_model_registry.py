"""The warning that model types were compared in another version of Transformers."""

from __future__ import annotations

import pytest

from hf_context_parallel.integration import model_registry
from hf_context_parallel.integration.model_registry import known_states


@pytest.mark.parametrize(("version", "rank", "warnings"), [("4.0.0", 0, 1), ("4.0.0", 1, 0), (None, 0, 0)])
def test_another_version_is_told_once_by_rank_0(version, rank, warnings, monkeypatch):
    told = []
    monkeypatch.setattr(model_registry.logger, "warning", told.append)
    if version is not None:
        monkeypatch.setattr(model_registry.transformers, "__version__", version)
    monkeypatch.setenv("RANK", str(rank))
    known_states.cache_clear()
    known_states()
    known_states()
    assert len(told) == warnings and all("compared with one process" in message for message in told)
