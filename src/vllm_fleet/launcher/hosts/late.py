"""Words in a ProcessSpec that are replaced where the process runs, as its addresses are only known there. Pure."""

from __future__ import annotations

from dataclasses import replace

from msgspec import Struct

from vllm_fleet.launcher.spec import ProcessSpec

HOST = "{fleet.host}"
PORT = "{fleet.port}"
URL = "{fleet.url}"
SIDE = "{fleet.side}"
"""The first of the consecutive ports it needs beside its own."""
FOLDER = "{fleet.folder}"
"""A folder of its own, mode 0700, removed after its end."""
CACHE = "{fleet.cache}"
"""Folder of the user there for what may be kept between runs."""
PYTHON = "{fleet.python}"


class Site(Struct, frozen=True):
    """Where one process runs."""

    host: str
    port: int
    side: int
    folder: str
    cache: str
    python: str

    @property
    def url(self) -> str:
        """``http://host:port``, with brackets around an IPv6 address."""
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"


def settle(text: str, site: Site) -> str:
    """``text`` with the words replaced."""
    if "{fleet." not in text:
        return text
    if ":" in site.host:
        text = text.replace(f"//{HOST}:", f"//[{site.host}]:")
    words = (
        (HOST, site.host), (PORT, str(site.port)), (URL, site.url), (SIDE, str(site.side)), (FOLDER, site.folder),
        (CACHE, site.cache), (PYTHON, site.python),
    )  # fmt: skip
    for word, meaning in words:
        text = text.replace(word, meaning)
    return text


def settled(spec: ProcessSpec, site: Site) -> ProcessSpec:
    """``spec`` as it runs at ``site``."""
    return replace(
        spec,
        argv=tuple(settle(word, site) for word in spec.argv),
        env={name: settle(text, site) for name, text in spec.env.items()},
        url=settle(spec.url, site),
        tmp=None if spec.tmp is None else settle(spec.tmp, site),
    )
