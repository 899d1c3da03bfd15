"""Being asked to end: Ctrl-C (SIGINT), SIGTERM, and SIGHUP when the terminal is closed.

A command that is asked to end unwinds at once, so that nothing half-written looks whole, says one
line and exits with 130 (Ctrl-C) or 75 (the others: call it again). A training takes the signals
over after its first step, when there is something to save (``runs/preemption.py``).
"""

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from kava_jax.errors import PreemptedError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# An exception cannot reach code that is not Python, such as the compiler, and some libraries
# swallow it. What has not ended this many seconds after the signal is ended then.
PATIENCE = 3.0
_SHOW_CURSOR = "\x1b[?25h"


class Ending:
    """A context manager around a command; signals that were ignored before it stay ignored.

    Only the main thread may set handlers; elsewhere nothing is heard.
    """

    def __init__(self) -> None:
        self._asked: int | None = None
        self._again = self._over = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Ending":
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in SIGNALS:
            # So it is under nohup, and for what a script starts in the background.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._notice)
        self._unraisable, sys.unraisablehook = sys.unraisablehook, self._swallowed
        self._uncaught, sys.excepthook = sys.excepthook, self._printed
        # Unlike a handler, which waits until Python code runs again, this is written to at once.
        heard, self._wakes = os.pipe()
        # Python demands this: a signal must not wait until a full pipe has room.
        os.set_blocking(self._wakes, False)
        self._woke = signal.set_wakeup_fd(self._wakes, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=[heard], daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._asked is not None:  # whatever a library has made of the exception on its way
            self._end(self._asked)
        self._over = True
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        sys.unraisablehook, sys.excepthook = self._unraisable, self._uncaught
        signal.set_wakeup_fd(self._woke)
        # The thread that watches reads the end of the pipe, and ends.
        os.close(self._wakes)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: raises once, so that a second signal does not disturb the unwinding."""
        del frame
        if self._asked is None or self._again:
            self._asked, self._again = number, False
            raise KeyboardInterrupt

    def _swallowed(self, unraisable: "sys.UnraisableHookArgs") -> None:
        """Raise again, a moment later, what came up where Python lets nothing be raised.

        JAX runs code of its own at every garbage collection, which is such a place.
        """
        if self._asked is None or not isinstance(unraisable.exc_value, KeyboardInterrupt):
            self._unraisable(unraisable)
            return
        self._again = True
        # Whichever thread raises a signal, Python calls its handler in the main thread.
        again = threading.Timer(0.05, signal.raise_signal, [self._asked])
        again.daemon = True
        again.start()

    def _printed(
        self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        """Say nothing of the interrupt where it is printed and dropped, as C modules do."""
        if self._asked is None or not issubclass(kind, KeyboardInterrupt):
            self._uncaught(kind, error, traceback)

    def _watch(self, heard: int) -> None:
        with open(heard, "rb", buffering=0) as numbers:
            while byte := numbers.read(1):
                number = byte[0]
                if signal.getsignal(number) != self._notice:
                    continue  # a training listens
                time.sleep(PATIENCE)
                if self._over:
                    return
                # A training may have begun to listen before the handler could be called.
                if self._asked is not None or signal.getsignal(number) == self._notice:
                    self._end(number)

    def _end(self, number: int) -> None:
        """Say so and exit, whatever other threads still do."""
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        words = f"interrupted ({name}): what was complete stays; the same command starts again\n"
        with suppress(OSError):  # the terminal is closed
            # The progress display hides the cursor.
            # Not print, which could wait for a lock of stderr that the main thread holds.
            os.write(2, ((_SHOW_CURSOR if os.isatty(2) else "") + words).encode())
        # Not sys.exit, which ends only the calling thread, and that may be the watching one.
        os._exit(130 if number == signal.SIGINT else PreemptedError.exit_code)
