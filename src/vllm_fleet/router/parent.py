"""The process that starts, watches and stops the workers of one router. It serves nothing itself."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from msgspec.structs import replace

from vllm_fleet.core import limits, log
from vllm_fleet.core.errors import ConfigError
from vllm_fleet.net.sockets import listen
from vllm_fleet.router.settings import RouterSettings
from vllm_fleet.router.siblings import ask_health
from vllm_fleet.router.worker import Worker, check_folder

_POLL_S = 0.5
_CONFIG_ERROR = 2  # a worker's exit status that no restart mends


@dataclass(slots=True)
class Backoff:
    """How long to wait before a worker is started again. Pure: time is passed in."""

    deaths: int = 0

    def pause_s(self, lived_s: float) -> float:
        """It died after ``lived_s``; one that lived long enough begins anew."""
        self.deaths = 1 if lived_s >= limits.WORKER_STEADY_S else self.deaths + 1
        return float(min(limits.WORKER_BACKOFF_S * 2.0 ** min(self.deaths - 1, 16), limits.WORKER_BACKOFF_MAX_S))


@dataclass(slots=True)
class Watched:
    """What is known of one worker's answers. Pure: time is passed in."""

    started: float
    answered: float | None = None

    def hung(self, now: float) -> bool:
        """Whether it has not answered for too long."""
        if self.answered is None:
            return now - self.started > limits.WORKER_START_S
        return now - self.answered > limits.WORKER_HUNG_S


@dataclass(slots=True)
class _Child:
    index: int
    process: asyncio.subprocess.Process | None = None
    watched: Watched = field(default_factory=lambda: Watched(0.0))


class Parent:
    """``command``: what starts a worker, without the words that say which; ``stop_s``: how long it may take to end."""

    def __init__(self, command: Sequence[str], count: int, folder: Path, stop_s: float) -> None:
        self._command, self._folder, self._stop_s = tuple(command), folder, stop_s
        self._children = [_Child(index) for index in range(count)]
        self._stopping = asyncio.Event()
        self.failed = asyncio.Event()
        """A worker says that its settings are wrong."""

    async def run(self, stop: asyncio.Event, url: str) -> None:
        """Keep all workers running until ``stop``."""
        loop = asyncio.get_running_loop()
        keeping = [loop.create_task(self._keep(child)) for child in self._children]
        watching = loop.create_task(self._watch(url))
        ends = [loop.create_task(event.wait()) for event in (stop, self.failed)]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._stopping.set()
            for task in (watching, *ends):
                task.cancel()
            await self._end_all()
            await asyncio.wait([watching, *ends, *keeping])

    def tell(self, number: int) -> None:
        """Pass a signal on to every worker."""
        for child in self._children:
            if child.process is not None:
                with contextlib.suppress(ProcessLookupError):
                    child.process.send_signal(number)

    async def _keep(self, child: _Child) -> None:
        """Start a worker, again and again."""
        backoff, loop = Backoff(), asyncio.get_running_loop()
        worker = Worker(child.index, len(self._children), self._folder)
        words = ("--worker", str(worker.index))
        while not self._stopping.is_set():
            began = loop.time()
            child.watched = Watched(began)
            # The pipe is how a worker learns that this process is gone.
            process = await asyncio.create_subprocess_exec(*self._command, *words, stdin=asyncio.subprocess.PIPE)
            child.process = process
            if self._stopping.is_set():  # it was set while the process was being started: nobody else ends this one
                process.terminate()
            status = await process.wait()
            child.process = None
            if status == _CONFIG_ERROR:
                self.failed.set()
                return
            if not self._stopping.is_set():
                pause_s = backoff.pause_s(loop.time() - began)
                log.warn("worker.exit", worker=child.index, status=status, pause_s=pause_s)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause_s):
                        await self._stopping.wait()

    async def _watch(self, url: str) -> None:
        """Say when all serve; kill who does not answer."""
        loop, told = asyncio.get_running_loop(), False
        while True:
            for child in self._children:
                process, watched = child.process, child.watched
                if process is None:
                    continue
                path = Worker(child.index, len(self._children), self._folder).own_socket
                if await ask_health(path):
                    watched.answered = loop.time()
                elif watched.hung(loop.time()) and process is child.process:
                    log.warn("worker.hung", worker=child.index, pid=process.pid)
                    with contextlib.suppress(ProcessLookupError):
                        process.kill()
            if not told and all(child.watched.answered is not None for child in self._children):
                told = True
                log.event("router.start", url=url, workers=len(self._children))
            await asyncio.sleep(_POLL_S if told else _POLL_S / 10)

    async def _end_all(self) -> None:
        """Ask all to stop, and kill who does not in time."""
        running = [child.process for child in self._children if child.process is not None]
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._stop_s + limits.WORKER_STOP_S):
                await asyncio.gather(*(process.wait() for process in running))
        for process in running:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()


async def serve_with_workers(settings: RouterSettings, settings_file: str, stop: asyncio.Event) -> int:
    """Run ``settings.workers`` processes on one port until ``stop``; the exit status.

    Raises:
        ConfigError: the address cannot be used.
    """
    front = settings.front
    with contextlib.ExitStack() as stack:
        port = _share(stack, settings.host, settings.port, "router.host, router.port")
        if front.admin_port is not None:
            setting = "router.admin_host, router.admin_port"
            front = replace(front, admin_port=_share(stack, front.admin_host, front.admin_port, setting))
        folder = _make_folder(settings_file, replace(settings, port=port, front=front))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        command = (sys.executable, "-m", "vllm_fleet.router", "--settings", str(folder / "settings.json"))
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        parent = Parent(command, settings.workers, folder, settings.stop_s)
        # Whoever moved the access log away tells the process that it started.
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, parent.tell, signal.SIGHUP)
        await parent.run(stop, f"{'http' if front.cert_file is None else 'https'}://{host}:{port}")
        return _CONFIG_ERROR if parent.failed.is_set() else 0


def _share(stack: contextlib.ExitStack, host: str, port: int, setting: str) -> int:
    """Take a port for the workers to share, for as long as ``stack`` is open; its number."""
    # Alone first: a shared port would not say that another router of this user has it already.
    with listen(host, port, setting=setting, silent=True) as alone:
        port = int(alone.getsockname()[1])
    stack.enter_context(listen(host, port, setting=setting, shared=True, silent=True))
    return port


def _make_folder(settings_file: str, settings: RouterSettings) -> Path:
    """A folder for the workers' sockets and their settings, beside the router's own where that is possible."""
    folder = Path(tempfile.mkdtemp(prefix="w-", dir=_short_enough(Path(settings_file).absolute().parent)))
    check_folder(folder)
    (folder / "settings.json").write_bytes(msgspec.json.encode(settings))
    return folder


def _short_enough(folder: Path) -> Path | None:
    """``folder``, or None (the system's own for temporary files) where sockets in it would have too long names."""
    try:
        check_folder(folder / "w-01234567")
    except ConfigError:
        return None
    return folder
