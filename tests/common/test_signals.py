"""Termination signals that end a command, and those that it was started to ignore."""

from __future__ import annotations

import os
import signal
import time

import pytest

from backbones.common.signals import exit_on_signals, stop_on_signals


def test_an_inherited_ignore_is_kept(default_signals):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as by nohup
    with exit_on_signals():
        os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_second_ctrl_c_stops_at_once(default_signals):
    with stop_on_signals() as request:
        signal.raise_signal(signal.SIGINT)
        assert request.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
