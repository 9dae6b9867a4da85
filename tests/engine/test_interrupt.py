from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from detfamily.engine.interrupt import Interruption, signals_later


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_wish(number):
    with Interruption() as interruption:
        assert not interruption.wanted
        os.kill(os.getpid(), number)
        assert interruption.wanted and interruption.exit_code == 128 + number


def test_the_second_ctrl_c_acts_at_once(listening):
    with Interruption(grace=0) as interruption, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        while not interruption.wanted:  # two signals that come before Python looks count as one
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)


def test_signals_that_come_together_are_one_wish():
    """A batch system and torchrun both send it."""
    with Interruption(grace=60) as interruption:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
            while interruption.signal is None:
                time.sleep(0.001)
        assert interruption.exit_code == 128 + signal.SIGTERM


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_the_second_sigterm_ends_the_process():
    child = os.fork()
    if child == 0:
        with Interruption(grace=0) as interruption:
            os.kill(os.getpid(), signal.SIGTERM)
            while not interruption.wanted:
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM


def test_handlers_are_put_back():
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    with Interruption():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before


def test_it_may_be_entered_in_a_thread_that_gets_no_signals():
    wanted = []

    def work():
        with Interruption() as interruption:
            wanted.append(interruption.wanted)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert wanted == [False]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize(("number", "ended_by"), [(signal.SIGINT, None), (signal.SIGTERM, signal.SIGTERM)])
def test_a_forked_worker_survives_ctrl_c_only(number, ended_by):
    with Interruption() as interruption:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), number)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert not interruption.wanted
    assert (os.WTERMSIG(status) if os.WIFSIGNALED(status) else None) == ended_by


@pytest.fixture
def child_handler():
    """What torch's loader does: an error out of the line that runs when a child has ended."""

    def handler(number, frame):
        raise RuntimeError("a child has ended")

    before = signal.signal(signal.SIGCHLD, handler)
    yield handler
    signal.signal(signal.SIGCHLD, before)


@pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="there are no signals of children here")
def test_a_raising_handler_waits_for_the_end_of_the_block(child_handler):
    done = []
    with pytest.raises(RuntimeError, match="a child has ended"), signals_later():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGCHLD)
            time.sleep(0.001)  # time for Python to look
        done.append("the whole block")
    assert done and signal.getsignal(signal.SIGCHLD) is child_handler


def test_ctrl_c_waits_for_the_end_of_the_block(listening):
    done = []
    with pytest.raises(KeyboardInterrupt), signals_later():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.001)
        done.append("the whole block")
    assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_of_the_block_goes_before_a_signal(listening):
    with pytest.raises(ZeroDivisionError), signals_later():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.001)
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_is_not_handled_by_python_is_left_alone():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals_later():
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_has_no_handlers_to_hold_back():
    entered = []

    def enter():
        with signals_later():
            entered.append(True)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered
