"""A real etcd of its own for tests: Debian's etcd-server, in a folder and at ports of the test's."""

from __future__ import annotations

import os
import shutil
import signal
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from vllm_fleet.net.sockets import free_port

ETCD = shutil.which("etcd")
MISSING = "not run: etcd is not installed (apt-get install etcd-server)"
START_S = 15.0


class Tls:
    """A certificate authority of the test's own, and one certificate that server and clients share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "names").write_text("subjectAltName=IP:127.0.0.1\n")
        made = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")
        self._openssl(*made, "-subj", "/CN=ca", "-keyout", "ca.key", "-out", "ca.pem")
        self._openssl(*made[:1], *made[2:7], "-subj", "/CN=both", "-keyout", "both.key", "-out", "both.csr")
        signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names")
        self._openssl("x509", "-req", "-in", "both.csr", *signed, "-out", "both.pem")

    def settings(self) -> dict[str, str]:
        """As a fleet is told."""
        files = {"ca_file": "ca.pem", "cert_file": "both.pem", "key_file": "both.key"}
        return {setting: str(self.folder / name) for setting, name in files.items()}

    def context(self) -> ssl.SSLContext:
        found = ssl.create_default_context(cafile=str(self.folder / "ca.pem"))
        found.load_cert_chain(self.folder / "both.pem", self.folder / "both.key")
        return found

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self.folder, check=True, capture_output=True)


class EtcdServer:
    """One etcd on loopback. It can be killed, stopped and started again, with what it had on its disk."""

    def __init__(self, folder: Path, tls: Tls | None = None) -> None:
        self._folder, self._tls = folder, tls
        self.port, self._peer_port = free_port("127.0.0.1"), free_port("127.0.0.1")
        self.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it, and return when it answers."""
        assert ETCD is not None
        peer = f"http://127.0.0.1:{self._peer_port}"
        argv = [ETCD, "--data-dir", str(self._folder / "data"), "--name", "test", "--log-level", "error"]
        argv += ["--listen-client-urls", self.url, "--advertise-client-urls", self.url, "--listen-peer-urls", peer]
        argv += ["--initial-advertise-peer-urls", peer, "--initial-cluster", f"test={peer}"]
        if self._tls is not None:
            files = {"--trusted-ca-file": "ca.pem", "--cert-file": "both.pem", "--key-file": "both.key"}
            argv += ["--client-cert-auth", *(f"{flag}={self._tls.folder / name}" for flag, name in files.items())]
        self._folder.mkdir(exist_ok=True, parents=True)
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(argv, stdout=log, stderr=log)
        until = time.monotonic() + START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > until:
                self.kill()
                raise AssertionError(f"etcd did not start: {(self._folder / 'log').read_text()[-2000:]}")
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL; its disk stays."""
        if self._process is not None:
            if self._process.poll() is None:
                os.kill(self.pid, signal.SIGKILL)
            self._process.wait(10)
        self._process = None

    def _answers(self) -> bool:
        try:
            context = None if self._tls is None else self._tls.context()
            with urllib.request.urlopen(f"{self.url}/health", timeout=1, context=context) as answer:
                return b'"true"' in answer.read()
        except (urllib.error.URLError, OSError):
            return False
