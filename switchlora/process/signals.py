"""Signals that ask a run to finish its update, save and leave."""

import signal
import sys
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
REQUEUE = signal.SIGUSR2


class Interruption:
    """Notes the first SIGTERM or SIGINT instead of dying of it; a second SIGINT kills at once.

    Where a job launcher (submitit) handles SIGUSR2, which a cluster sends before it takes the
    machine away, its handler, which puts the job back into the queue, is called by ``hand_over``
    after the run has saved. Its handler of SIGTERM, which ignores it, is called at once; a cluster
    that sends no SIGUSR2 gives its warning with SIGTERM, so ``warned`` asks for a checkpoint.
    A context manager; outside the main thread, where Python has no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.warned = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in (*SIGNALS, REQUEUE):
                if self._is_ours(number):
                    self._previous[number] = signal.signal(number, self._note)
            if REQUEUE in self._previous and callable(signal.getsignal(signal.SIGTERM)):
                self._previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._warn)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def hand_over(self) -> None:
        """Let the launcher's handler of SIGUSR2 have it, if it came; it ends the primary rank.

        On the others it returns; they end here, as if all were well, because a failed task can
        take the primary one with it before that has put the job back.
        """
        handler = self._previous.get(self.received) if self.received else None
        if self.received is REQUEUE and callable(handler):
            handler(self.received, None)
            sys.exit(0)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def _warn(self, number: int, frame: FrameType | None) -> None:
        self.warned = True
        self._previous[signal.SIGTERM](number, frame)

    @staticmethod
    def _is_ours(number: signal.Signals) -> bool:
        handler = signal.getsignal(number)
        if handler is None:
            return False
        unhandled = handler in (signal.SIG_DFL, signal.default_int_handler)
        return not unhandled if number is REQUEUE else unhandled
