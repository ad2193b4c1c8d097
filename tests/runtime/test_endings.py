"""Asking a run to end, and ending what may not answer: without Ray."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from distml.runtime.endings import StopSignals, close_all, close_within


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_before_training_a_signal_raises_and_in_it_a_signal_asks(number):
    asked, before = [], signal.getsignal(number)
    signals = StopSignals(lambda: asked.append(True))
    with signals.handled(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)
    assert signals.asked
    assert not asked
    signals = StopSignals(lambda: asked.append(True))
    signals.is_training = True
    with signals.handled():
        os.kill(os.getpid(), number)
    assert (signals.asked, asked) == (True, [True])
    assert signal.getsignal(number) is before


def test_what_does_not_end_is_left_behind_and_said(capsys):
    answers = threading.Event()
    close_within(lambda: answers.wait(30), 0.05)
    assert "Ray did not end within 0.05 s; leaving it behind" in capsys.readouterr().err
    answers.set()
    close_within(lambda: None, 30)
    assert not capsys.readouterr().err


def test_one_that_cannot_be_closed_does_not_keep_the_others_open():
    closed = []

    def breaks():
        raise OSError("gone")

    close_all(breaks, lambda: closed.append("files"))
    assert closed == ["files"]
