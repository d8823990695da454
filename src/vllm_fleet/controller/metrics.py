"""The fleet's counters: what every instance's connector counts, summed over the instances."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Sequence

import aiohttp

from vllm_fleet.core import limits
from vllm_fleet.wire.control import Member

PREFIX = "vllm:fleet_"
_SAMPLE = re.compile(r'^(vllm:fleet_\w+)(?:\{((?:\w+="(?:[^"\\]|\\.)*",?)*)\})? (\S+)$')
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)",?')
_DROPPED = frozenset({"engine", "model_name"})
_MEANINGLESS = ("_created", "vllm:fleet_recompute_below_tokens")  # not to be added up


async def fleet_metrics(members: Sequence[Member]) -> str:
    """The metrics of these instances, summed; in Prometheus's text format.

    Asks them all; one that does not answer within METRICS_S is counted as unreachable.
    """
    asked = [member for member in members if member.state in ("ready", "draining")]
    turns = asyncio.Semaphore(limits.METRICS_AT_ONCE)
    timeout = aiohttp.ClientTimeout(total=limits.METRICS_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:

        async def one(member: Member) -> str | None:
            async with turns:
                try:
                    async with session.get(f"{member.url}/metrics", allow_redirects=False) as answer:
                        page = bytearray()
                        async for chunk in answer.content.iter_any():
                            page += chunk
                            if len(page) > limits.METRICS_BODY_BYTES_MAX:
                                return None
                        return page.decode(errors="replace") if answer.status == 200 else None
                except (TimeoutError, aiohttp.ClientError, OSError):
                    return None

        pages = await asyncio.gather(*(one(member) for member in asked))
    answered = [page for page in pages if page is not None]
    return (
        f"{summed(answered)}# TYPE vllm_fleet_instances_asked gauge\nvllm_fleet_instances_asked {len(asked)}\n"
        f"# TYPE vllm_fleet_instances_silent gauge\nvllm_fleet_instances_silent {len(asked) - len(answered)}\n"
    )


def summed(pages: Iterable[str]) -> str:
    """Pages of /metrics added up, sample by sample, without what tells instances apart."""
    heads: dict[str, None] = {}
    sums: dict[str, float] = {}
    for page in pages:
        for line in page.splitlines():
            if line.startswith((f"# HELP {PREFIX}", f"# TYPE {PREFIX}")):
                if not line.split(" ", 3)[2].endswith(_MEANINGLESS):
                    heads.setdefault(line)
                continue
            found = _SAMPLE.match(line)
            if found is None or found[1].endswith(_MEANINGLESS):
                continue
            try:
                value = float(found[3])
            except ValueError:
                continue
            labels = [f'{name}="{text}"' for name, text in _LABEL.findall(found[2] or "") if name not in _DROPPED]
            sample = found[1] + (f"{{{','.join(labels)}}}" if labels else "")
            sums[sample] = sums.get(sample, 0.0) + value
    return _page(list(heads), sums)


def _page(heads: Sequence[str], sums: dict[str, float]) -> str:
    """Each family's head, then its samples."""
    lines = []
    left = dict(sums)
    families = dict.fromkeys(head.split(" ", 3)[2] for head in heads)
    for family in families:
        lines += [head for head in heads if head.split(" ", 3)[2] == family]
        stem = family.removesuffix("_total")
        allowed = {family, stem, *(f"{stem}{end}" for end in ("_total", "_bucket", "_sum", "_count"))}
        for sample in [name for name in left if name.partition("{")[0] in allowed]:
            lines.append(f"{sample} {left.pop(sample)!r}")
    lines += [f"{sample} {value!r}" for sample, value in left.items()]
    return "".join(f"{line}\n" for line in lines)
