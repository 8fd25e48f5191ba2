"""Waiting for a training of the tests ends."""

from __future__ import annotations

import time
from functools import partial

import pytest
import training_runs


def test_a_run_that_hangs_fails_its_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_runs, "PATIENCE", 1)
    process = training_runs.start(before=partial(time.sleep, 600))
    with pytest.raises(AssertionError, match="still ran after 1 s"):
        process.join()
    process.join(30)
    assert not process.is_alive()
