"""Signals that ask a run to finish its update, save and leave."""

import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

REQUEUE = signal.SIGUSR2
SIGNALS = (
    *(signal.SIGTERM, signal.SIGINT),
    signal.SIGHUP,  # the terminal or the connection is gone
    signal.SIGXCPU,  # the limit on processor time is near
    *(signal.SIGUSR1, REQUEUE),  # clusters send these before they take a machine away
)
Handler = Callable[[int, FrameType | None], None]


class Interruption:
    """Notes the first of ``SIGNALS`` instead of dying of it; a second SIGINT kills at once.

    A signal that somebody handles or ignores already is left alone, such as SIGHUP under nohup.

    A job launcher (submitit) handles SIGUSR2 by putting the job back into the queue, and ignores
    SIGTERM. Under such a launcher:

    - SIGUSR2 is noted. The run saves, and ``hand_over`` then calls the launcher's handler.
    - SIGTERM calls the launcher's handler at once. It may be the only warning of a cluster that
      sends no SIGUSR2, so ``warned`` asks for a checkpoint.

    Use it as a context manager. Outside the main thread it does nothing, since Python has no
    signals there.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.warned = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is not threading.main_thread():
            return self
        under_launcher = callable(signal.getsignal(REQUEUE))
        for number in SIGNALS:
            if _is_unhandled(number):
                self._handle(number, self._note)
        if under_launcher:
            self._handle(REQUEUE, self._note)
            if callable(signal.getsignal(signal.SIGTERM)):
                self._handle(signal.SIGTERM, self._warn)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def hand_over(self) -> None:
        """Call the launcher's handler of SIGUSR2, if that signal came.

        The handler ends the process on the primary rank. On the other ranks it returns, and they
        exit here with status 0. A failed task could take the primary rank with it before that has
        put the job back into the queue.
        """
        handler = self._previous.get(REQUEUE)
        if self.received is REQUEUE and callable(handler):
            handler(REQUEUE, None)
            sys.exit(0)

    def _handle(self, number: signal.Signals, handler: Handler) -> None:
        self._previous[number] = signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def _warn(self, number: int, frame: FrameType | None) -> None:
        self.warned = True
        self._previous[signal.SIGTERM](number, frame)


def _is_unhandled(number: signal.Signals) -> bool:
    return signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
