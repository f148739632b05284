import os
import signal
import threading

from timm_spinal.errors import StopRequested
from timm_spinal.training.distributed import SignalFlag


def test_flag_takes_the_first_signal_and_gives_the_handlers_back():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *args: seen.append(1))
    try:
        with SignalFlag() as flag:
            assert flag.signum == 0
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            assert flag.signum == signal.SIGTERM and not seen
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [1]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_outside_the_main_thread_signals_are_left_alone():
    before, flags = signal.getsignal(signal.SIGTERM), []

    def enter():
        with SignalFlag() as flag:
            flags.append((flag.signum, signal.getsignal(signal.SIGTERM) is before))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert flags == [(0, True)]


def test_stop_requested_names_the_signal():
    assert str(StopRequested(signal.SIGINT)) == 'stopped by SIGINT' and StopRequested(2).signum == 2
