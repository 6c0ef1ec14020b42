"""Ctrl-C and SIGTERM: noted when they come, followed at the end of an update."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from hflit.ranks import total

BOTH = (signal.SIGINT, signal.SIGTERM)
logger = logging.getLogger(__name__)


class Stop(BaseException):
    """Raised where a run is safe to leave, once a signal has asked for it."""


class Stops:
    """Notes SIGINT and SIGTERM while a run is on.

    The first signal is noted; a second Ctrl-C stops the run where it is.

    Attributes:
        received: The signal that came.
        agreed: Of several processes, the one that all know of since an update.
    """

    received: signal.Signals | None = None
    agreed: signal.Signals | None = None

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note signals inside, then leave as they asked and put the old handlers back.

        Raises:
            KeyboardInterrupt: After Ctrl-C.
            SystemExit: With code 143 after SIGTERM.
        """
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may handle signals
            return
        self.process = os.getpid()
        before = {each: signal.getsignal(each) for each in BOTH}
        self.listen()
        where: BaseException | None = None  # it hung, if it took a second Ctrl-C
        try:
            yield
        except (Stop, KeyboardInterrupt, SystemExit) as error:
            if self.received is None:
                raise
            where = None if isinstance(error, Stop) else error
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt from where
        if self.received == signal.SIGTERM:
            raise SystemExit(143) from where

    def listen(self) -> None:
        """Take both signals, and take them back from Lightning 2.6.

        It answers SIGTERM with a broadcast in the middle of whatever the processes of a run are
        telling each other; and it ends a run by itself, before a checkpoint is written, if the
        signal comes between our look at the end of an update and its own.
        """
        if threading.current_thread() is threading.main_thread():
            for each in BOTH:
                signal.signal(each, self._note)

    def agree(self, tokens: Any, device: torch.device, world: int) -> int:
        """Tell each other, after an update, of signals and of tokens; the tokens of all processes.

        Args:
            tokens: Of this process, a number.
            device: What the processes tell each other goes through it.
            world: How many they are.
        """
        if world == 1:
            return int(tokens)
        came = [self.received == each for each in BOTH]
        told = total(torch.tensor([int(tokens), *came], device=device), world)
        seen, interrupted, terminated = told.tolist()
        if interrupted or terminated:
            self.agreed = self.received = signal.SIGINT if interrupted else signal.SIGTERM
        return int(seen)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a process that loads data, and inherits this
            if number == signal.SIGTERM:
                os._exit(143)
            return
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        logger.warning("%s: stopping at the end of this update.", self.received.name)
