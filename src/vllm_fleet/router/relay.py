"""One client's answer, over all the instances that write it. Sans-IO: bytes in, bytes out."""

from __future__ import annotations

from vllm_fleet.core import limits
from vllm_fleet.router import resume
from vllm_fleet.router.openai import GenerateRequest, Route
from vllm_fleet.router.request_rules import Resume
from vllm_fleet.router.resume import Resumption
from vllm_fleet.router.resume_events import ErrorBody
from vllm_fleet.router.resume_join import Join, ending
from vllm_fleet.router.resume_track import Tracker


class Relay:
    """What the client has, and what comes of it when an instance stops in the middle.

    Requests that are not streamed, or cannot be resumed, pass unread and unchanged.
    """

    __slots__ = (
        "_client",
        "_join",
        "_mode",
        "_resumption",
        "_tracker",
        "avoid",
        "complete",
        "request",
        "resumes",
        "streaming",
    )

    def __init__(self, request: GenerateRequest, mode: Resume) -> None:
        self._client, self._mode = request, mode
        followed = None if mode == "off" else resume.wanted(request)
        self.request = request if followed is None else followed
        """What instances are sent: the client's request, and perhaps the wish to be told token ids."""
        self.streaming = followed is not None or bytes(request.fields.get("stream", b"")) == b"true"
        self._tracker: Tracker | None = None
        self._join: Join | None = None
        self._resumption: Resumption | None = None
        self.complete = False
        """The end of the stream is on its way to the client: whatever happens now is no failure."""
        self.resumes = 0
        self.avoid: list[str] = []
        """Instances that broke it off."""

    def begin(self) -> None:
        """An instance is asked. Whatever another one said since the last plan, the client has got nothing of it."""
        if self._resumption is not None:
            assert self._tracker is not None, "a plan was made without a tracker"
            self._join = Join(self._resumption, self._tracker)
        elif self.request is not self._client:
            strip = not resume.asked_for_ids(self._client)
            self._tracker = Tracker(chat=self._client.route is Route.CHAT, strip=strip)

    def take(self, events: bytes) -> bytes:
        """Some whole events of an instance; those for the client.

        Raises:
            Mismatch: they do not continue what the client has.
        """
        if self._join is not None:
            events = self._join.take(events)
        return events if self._tracker is None else self._tracker.take(events)

    @property
    def followed(self) -> bool:
        """Whether it is known what the client has."""
        return self._tracker is not None

    @property
    def error(self) -> ErrorBody | None:
        """The instance's own error, which ended its part."""
        return None if self._tracker is None else self._tracker.error

    def plan(self) -> Resumption | str:
        """How to go on; else why that cannot be, in a word."""
        if self._tracker is None:
            return "off" if self._mode == "off" else "not_followed"
        if self.resumes >= limits.RESUMES_MAX:
            return "too_often"
        return resume.plan(self._client, self._tracker, self._mode)

    def resume(self, resumption: Resumption, lost: str) -> None:
        """Take what comes from now on for the rest; ``lost`` broke it off."""
        assert self._tracker is not None, "a plan was made without a tracker"
        self._tracker.error = None
        self._resumption = resumption
        self.resumes += 1
        self.avoid.append(lost)

    def ending(self) -> bytes:
        """What is left of a stream whose answer is complete."""
        assert self._tracker is not None, "a plan was made without a tracker"
        return ending(self._tracker, usage=b'"include_usage":true' in _compact(self._client))


def _compact(request: GenerateRequest) -> bytes:
    return bytes(request.fields.get("stream_options", b"")).replace(b" ", b"").replace(b"\n", b"")
