"""Tells decode workers of KV that a step has computed, once it is in memory."""

from __future__ import annotations

import queue
import threading

import torch

from vllm_fleet.connector.holder import Holder
from vllm_fleet.connector.jobs import GrowJob


class Publisher:
    """One worker's. On a GPU a step's kernels still run when it returns: a thread waits for them."""

    def __init__(self, holder: Holder, device: int | None) -> None:
        self._holder = holder
        self._device = device
        self._queue: queue.SimpleQueue[tuple[torch.cuda.Event, list[GrowJob]] | None] = queue.SimpleQueue()
        if device is not None:
            threading.Thread(target=self._work, name="fleet-publish", daemon=True).start()

    def after_step(self, grows: list[GrowJob]) -> None:
        """The step that computes this KV has been carried out, or put on the current stream of the GPU."""
        if self._device is None:
            self._holder.publish(grows)
            return
        done = torch.cuda.Event(blocking=True)
        done.record(torch.cuda.current_stream(self._device))
        self._queue.put((done, grows))

    def close(self) -> None:
        """Stop the thread."""
        self._queue.put(None)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            done, grows = item
            done.synchronize()
            self._holder.publish(grows)
