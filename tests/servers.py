"""Real S3 servers on loopback, killed by their own pid: SeaweedFS from its PyPI wheel, moto as the quick second.

python -m tests.servers seaweed|moto       starts one with an empty bucket `pairs` and prints what to export
"""

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

KEY, SECRET = "limbeck", "only-for-tests"
BUCKET = "pairs"


@dataclass(frozen=True)
class Server:
    """A running server: its address and its own process."""

    endpoint: str
    process: subprocess.Popen

    @property
    def environment(self):
        return environment(self.endpoint)


def environment(endpoint):
    """What a user sets: endpoint and credentials by environment, never in a URI."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@contextlib.contextmanager
def seaweed(folder):
    """Checks signatures and conditions; ready in 4 to 10 s."""
    folder = Path(folder)
    identity = {"name": "tests", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    master, volume, filer, s3 = free_ports(4)
    command = (
        f"weed server -ip=127.0.0.1 -ip.bind=127.0.0.1 -dir={folder}/data -master.telemetry=false"
        f" -master.volumeSizeLimitMB=128 -volume.max=50 -master.port={master} -volume.port={volume} -filer"
        f" -filer.port={filer} -s3 -s3.port={s3} -s3.config={folder}/s3.json -s3.port.iceberg=0 -s3.port.lance=0"
    )
    with _running(command, folder, f"http://127.0.0.1:{s3}") as server:
        yield server


@contextlib.contextmanager
def moto(folder):
    """Honours conditions, checks no signature; ready in 1 to 2 s."""
    (port,) = free_ports(1)
    with _running(f"moto_server -H 127.0.0.1 -p {port}", Path(folder), f"http://127.0.0.1:{port}") as server:
        yield server


@contextlib.contextmanager
def _running(command, folder, endpoint):
    words = command.split()
    words[0] = str(Path(sys.executable).with_name(words[0]))  # beside the interpreter, where its wheel put it
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
    try:
        _wait_until_writable(endpoint, process)
        yield Server(endpoint, process)
    finally:
        process.kill()
        process.wait()


def _wait_until_writable(endpoint, process, seconds=60):
    import s3fs

    deadline = time.monotonic() + seconds
    while True:
        try:
            fs = s3fs.S3FileSystem(key=KEY, secret=SECRET, endpoint_url=endpoint, skip_instance_cache=True)
            fs.connect_timeout, fs.retries = 1, 1
            if not fs.exists(BUCKET):
                fs.mkdir(BUCKET)
            fs.pipe_file(f"{BUCKET}/.ready", b"")
            return
        except Exception:
            if process.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.25)


def free_ports(count):
    """Ports that nobody listens on, and whose +10000 neighbours (SeaweedFS takes them for gRPC) are free too."""
    found = []
    while len(found) < count:
        with contextlib.closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        if port + 10000 < 65536 and _free(port + 10000) and port not in found:
            found.append(port)
    return found


def _free(port):
    with contextlib.closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


SERVERS = {"seaweed": seaweed, "moto": moto}


def main():
    """Run one server until Ctrl-C."""
    if len(sys.argv) != 2 or sys.argv[1] not in SERVERS:
        sys.exit(f"usage: python -m tests.servers {'|'.join(SERVERS)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill ends the server, too
    folder = tempfile.mkdtemp(prefix="limbeck-s3-")
    try:
        with SERVERS[sys.argv[1]](folder) as server:
            print(
                f"# {sys.argv[1]} (process {server.process.pid}) serves s3://{BUCKET} until Ctrl-C; in another shell:"
            )
            print("\n".join(f"export {name}={value}" for name, value in server.environment.items()), flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                server.process.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
