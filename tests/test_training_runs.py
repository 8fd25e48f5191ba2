"""Waiting for a training in the tests times out."""

from __future__ import annotations

import time
from functools import partial

import pytest
import training_runs


def test_a_run_that_hangs_fails_its_test_and_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_runs, "PATIENCE", 2)
    process = training_runs.start(before=partial(time.sleep, 600))
    with pytest.raises(AssertionError, match=r"(?s)still ran after 2 s.* in _run"):
        process.join()
    process.join(30)
    assert not process.is_alive()
