"""A real S3-compatible object store on loopback: OpenStack Swift with its s3api, one process per service.

Account, container and object servers keep their files below one folder; the proxy speaks S3. Nothing outside of that
folder is read or written, and the processes end with the ``with`` block.
"""

from __future__ import annotations

import getpass
import hashlib
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from socket import create_connection, create_server

REGION = "eu-north-1"
_START_S = 60.0
_SERVICE = """
import ctypes, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # it ends with the tests, however they end (Linux, as Swift)
from swift.{package}.server import main
sys.exit(main())
"""
# Nothing of Swift is imported here: its eventlet would have every later fork of the tests warn.
_RING = """
import sys
from swift.common.ring import RingBuilder
builder = RingBuilder(part_power=2, replicas=1, min_part_hours=0)
device = {"region": 1, "zone": 1, "ip": "127.0.0.1", "port": int(sys.argv[2]), "device": "disk", "weight": 1.0}
builder.add_dev(device)
builder.rebalance(seed=1)
builder.get_ring().save(sys.argv[1])
"""

# One replica on one device. A listing is up to date when a put is answered, however busy the machine is, and comes in
# pages of 50, so that a few objects make several pages.
_STORAGE = """[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {folder}
devices = {folder}/devices
user = {user}
workers = 0
mount_check = false
fallocate_reserve = 0
container_update_timeout = 60
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
"""
_PROXY = """[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {folder}
user = {user}
workers = 0
[pipeline:main]
pipeline = catch_errors s3api tempauth slo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
node_timeout = 60
conn_timeout = 10
error_suppression_limit = 1000000
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:s3api]
use = egg:swift#s3api
location = {region}
max_bucket_listing = 50
[filter:tempauth]
use = egg:swift#tempauth
user_archive_owner = {secret} .admin
user_archive_guest = {guest_secret}
[filter:slo]
use = egg:swift#slo
"""


@dataclass(frozen=True)
class S3Server:
    """Where the store is and who may use it: ``owner`` everything, ``guest`` nothing."""

    port: int
    secret: str = field(repr=False)
    guest_secret: str = field(repr=False)

    @property
    def url(self) -> str:
        """The endpoint."""
        return f"http://127.0.0.1:{self.port}"

    def environment(self, url: str | None = None, *, guest: bool = False, region: str = REGION) -> dict[str, str]:
        """The usual variables for a client; ``url`` for one that goes through a proxy."""
        return {
            "AWS_ENDPOINT_URL": url or self.url,
            "AWS_REGION": region,
            "AWS_DEFAULT_REGION": region,
            "AWS_ACCESS_KEY_ID": "archive:guest" if guest else "archive:owner",
            "AWS_SECRET_ACCESS_KEY": self.guest_secret if guest else self.secret,
        }


@contextmanager
def swift_server(folder: Path) -> Iterator[S3Server]:
    """Start the store with its files in ``folder`` (which must keep extended attributes) and wait until it answers."""
    ports = dict(zip(("account", "container", "object", "proxy"), _free_ports(4), strict=True))
    secret, guest_secret = (hashlib.sha256(f"{folder} {who}".encode()).hexdigest() for who in ("owner", "guest"))
    (folder / "devices" / "disk").mkdir(parents=True)
    (folder / "swift.conf").write_text("[swift-hash]\nswift_hash_path_suffix = tests\n")
    for kind, port in ports.items():
        text = (_PROXY if kind == "proxy" else _STORAGE).format(
            kind=kind, port=port, folder=folder, user=getpass.getuser(), region=REGION, secret=secret,
            guest_secret=guest_secret,
        )  # fmt: skip
        (folder / f"{kind}.conf").write_text(text)
        if kind != "proxy":
            _ring(folder / f"{kind}.ring.gz", port)
    server = S3Server(ports["proxy"], secret, guest_secret)
    with ExitStack() as stack:
        processes = {kind: stack.enter_context(_process(folder, kind)) for kind in ports}
        _wait(ports, folder, processes)
        yield server


def _free_ports(count: int) -> list[int]:
    sockets = [create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _ring(path: Path, port: int) -> None:
    command = [sys.executable, "-W", "ignore", "-c", _RING, str(path), str(port)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


@contextmanager
def _process(folder: Path, kind: str) -> Iterator[subprocess.Popen[bytes]]:
    start = _SERVICE.format(package="obj" if kind == "object" else kind)
    with (folder / f"{kind}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", start, str(folder / f"{kind}.conf"), "--verbose"],
            stdout=log, stderr=log, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _wait(ports: dict[str, int], folder: Path, processes: dict[str, subprocess.Popen[bytes]]) -> None:
    """Until every service listens."""
    end = time.monotonic() + _START_S
    for kind, port in ports.items():
        while True:
            try:
                create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError as error:
                ended = processes[kind].poll()
                if ended is not None or time.monotonic() > end:
                    log = (folder / f"{kind}.log").read_text()[-2000:]
                    raise RuntimeError(f"Swift's {kind} server does not start (exit {ended}):\n{log}") from error
                time.sleep(0.1)
