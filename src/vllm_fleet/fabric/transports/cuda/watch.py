"""Notices that peers hang up, also while nothing is sent: one thread for all connections of a transport."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass

_HUNG_UP = select.POLLRDHUP | select.POLLHUP | select.POLLERR | select.POLLNVAL


def hung_up(connection: socket.socket) -> bool:
    """Whether the peer has closed the connection, as far as this side has heard; does not wait."""
    if connection.fileno() < 0:
        return True
    poller = select.poll()
    poller.register(connection.fileno(), select.POLLRDHUP)
    return bool(poller.poll(0))


@dataclass(frozen=True)
class _Watched:
    connection: socket.socket
    callback: Callable[[], None]


class Hangups:
    """Calls back, once and on its own thread, when a watched connection's peer has closed it or died.

    What the peer sent stays unread. The thread lives from the first watch() to close().
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._watched: dict[int, _Watched] = {}
        self._thread: threading.Thread | None = None
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._closed = False

    def watch(self, connection: socket.socket, callback: Callable[[], None]) -> None:
        """Watch until the peer hangs up or forget()."""
        with self._lock:
            self._watched[connection.fileno()] = _Watched(connection, callback)
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
        self._poke()

    def forget(self, connection: socket.socket) -> None:
        """Watch no more; before the connection is closed. A callback that has begun is not waited for."""
        with self._lock:
            for number, entry in list(self._watched.items()):
                if entry.connection is connection:
                    del self._watched[number]
        self._poke()

    def close(self) -> None:
        """End the thread. Safe to call twice."""
        with self._lock:
            already, self._closed = self._closed, True
            self._watched.clear()
        self._poke()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        if not already:
            self._wake.close()
            self._woken.close()

    def _poke(self) -> None:
        with contextlib.suppress(OSError):  # full: the thread will wake anyway; closed: there is no thread
            self._wake.send(b"\0")

    def _run(self) -> None:
        while True:
            with self._lock:
                if self._closed:
                    return
                polled = dict(self._watched)
            poller = select.poll()
            poller.register(self._woken.fileno(), select.POLLIN)
            for number in polled:
                poller.register(number, select.POLLRDHUP)
            for number, events in poller.poll():
                if number == self._woken.fileno():
                    self._woken.recv(4096)
                elif events & _HUNG_UP:
                    self._tell(number, polled[number])

    def _tell(self, number: int, entry: _Watched) -> None:
        with self._lock:
            if self._watched.get(number) is not entry:
                return
            del self._watched[number]
        entry.callback()
