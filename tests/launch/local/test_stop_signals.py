"""Signals ask for a stop, and nothing is left behind."""

from __future__ import annotations

import os
import signal

import pytest

from nearfar.launch.local.stop_signals import SIGNALS, StopFlag


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_raises_the_flag_and_nothing_else(number: signal.Signals) -> None:
    with StopFlag() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop() and stop.received == number


def test_preemption_signals_are_all_heard() -> None:
    assert {signal.SIGTERM, signal.SIGINT, signal.SIGUSR2} == set(SIGNALS)


def test_the_handlers_before_it_come_back_even_after_an_error() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    flag = StopFlag()
    flag.__enter__()
    assert [signal.getsignal(number) for number in SIGNALS] != before
    flag.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_second_ctrl_c_stops_at_once() -> None:
    with StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_second_sigterm_does_not() -> None:
    with StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()


def test_a_forked_child_does_not_answer() -> None:
    with StopFlag() as stop:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(1 if stop() else 0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert not stop()
