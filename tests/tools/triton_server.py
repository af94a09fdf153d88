"""The real Triton server, with its Python backend: the binaries of `nvidia-pytriton`, which `make test` installs.

They lie in .venv/triton with the numpy that they are built for, 1.26, apart from the packages that samq runs with.
Nothing of pytriton itself is imported.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

import tritonclient.http
from packaging.requirements import Requirement

START_TIMEOUT = 60.0  # seconds


@dataclass(frozen=True)
class Server:
    """A running server, on loopback.

    Args:
        process: its process.
        http, grpc: "127.0.0.1:port".
        log: file of what it writes.
    """

    process: subprocess.Popen[bytes]
    http: str
    grpc: str
    log: Path

    def pids(self) -> list[int]:
        """The server's process and those of its Python backend."""
        children = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [self.process.pid, *(int(pid) for path in children for pid in path.read_text().split())]


@cache
def server_folder() -> Path:
    """The wheel's `tritonserver` folder.

    Raises:
        FileNotFoundError: it is not installed, or its Python backend does not run with this Python; says why.
    """
    places = [Path(sys.prefix) / "triton", *map(Path, sys.path)]
    folder = next((p / "pytriton" / "tritonserver" for p in places if (p / "pytriton" / "tritonserver").is_dir()), None)
    if folder is None:
        raise FileNotFoundError("no Triton server: `make test` installs it on Linux x86_64 with glibc 2.35 or newer")
    stub = _stub(folder)
    if not stub.is_file():
        raise FileNotFoundError(f"Triton's Python backend has no stub for Python {stub.parent.name}")
    linked = subprocess.run(["ldd", stub], capture_output=True, text=True, check=False, env=_environment(folder)).stdout
    missing = [line.split()[0] for line in linked.splitlines() if "not found" in line]
    if missing:
        raise FileNotFoundError(f"Triton's Python backend needs {', '.join(missing)}, which this Python comes without")
    return folder


@contextmanager
def serving(repository: Path, scratch: Path, *options: str, wait: bool = True) -> Iterator[Server]:
    """A server on free ports, ended afterwards.

    Args:
        repository: of the models.
        scratch: folder of what the server needs; further backends may lie in `backends/` there.
        wait: until it is ready.
    """
    folder = server_folder()
    backend, packages = scratch / "backends" / "python", scratch / "packages"
    shutil.copytree(folder / "backends" / "python", backend)
    (backend / "triton_python_backend_stub").symlink_to(_stub(folder))
    packages.mkdir(parents=True)
    for name in ("numpy", "numpy.libs"):  # numpy 1, which this Triton is built for
        (packages / name).symlink_to(folder.parents[1] / name)
    _link_packages((repository / "requirements.txt").read_text().split(), packages)
    http, grpc = _free_ports(2)
    command = [
        folder / "bin" / "tritonserver",
        f"--model-repository={repository}",
        f"--backend-directory={backend.parent}",
        *(f"--{kind}-address=127.0.0.1" for kind in ("http", "grpc")),
        f"--http-port={http}",
        f"--grpc-port={grpc}",
        "--allow-metrics=false",
        "--disable-auto-complete-config",
        "--exit-timeout-secs=10",
        *options,
    ]
    log = scratch / "server.log"
    with log.open("wb") as written:
        process = subprocess.Popen(
            command, stdout=written, stderr=subprocess.STDOUT, env=_environment(folder), cwd=packages
        )
    server = Server(process, f"127.0.0.1:{http}", f"127.0.0.1:{grpc}", log)
    try:
        if wait:
            _wait(server)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(server: Server) -> None:
    until = time.monotonic() + START_TIMEOUT
    while time.monotonic() < until and server.process.poll() is None:
        with contextlib.suppress(OSError), tritonclient.http.InferenceServerClient(server.http) as client:
            if client.is_server_ready():
                return
        time.sleep(0.1)
    raise AssertionError(f"the server did not get ready:\n{server.log.read_text(errors='replace')}")


def _stub(folder: Path) -> Path:
    return folder / "python_backend_stubs" / "{}.{}".format(*sys.version_info) / "triton_python_backend_stub"


def _environment(folder: Path) -> dict[str, str]:
    """The stub embeds Python, whose library may lie with the interpreter."""
    libraries = [str(folder.parents[1] / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR")]
    return {"PATH": os.environ["PATH"], "LD_LIBRARY_PATH": os.pathsep.join(libraries), "OMP_NUM_THREADS": "1"}


def _link_packages(requirements: Sequence[str], folder: Path) -> None:
    """Link installed distributions, and all that they need, into a folder.

    The stub is blind to PYTHONPATH and virtual environments, but it finds what lies where the server was started.
    """
    waiting, seen = [Requirement(line) for line in requirements], set()
    while waiting:
        requirement = waiting.pop()
        if requirement.name in seen or not (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(requirement.name)
        installed = distribution(requirement.name)
        waiting += [Requirement(line) for line in installed.requires or ()]
        for name in {file.parts[0] for file in installed.files or () if file.parts[0] != ".."}:
            if not (folder / name).exists():
                (folder / name).symlink_to(Path(str(installed.locate_file(name))))


def _free_ports(count: int) -> Sequence[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
