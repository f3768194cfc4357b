"""A real S3 server on loopback: SeaweedFS from its PyPI wheel, killed by its own pid at the end."""

import json
import socket
import subprocess
import time
from contextlib import closing

import pytest

KEY, SECRET = "limbeck", "only-for-tests"


def free_ports(count):
    """Ports that nobody listens on, and whose +10000 neighbours (SeaweedFS takes them for gRPC) are free too."""
    found = []
    while len(found) < count:
        with closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        if port + 10000 < 65536 and _free(port + 10000) and port not in found:
            found.append(port)
    return found


def _free(port):
    with closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory):
    """The endpoint of a running server with one empty bucket, `pairs`."""
    folder = tmp_path_factory.mktemp("seaweed")
    identity = {"name": "tests", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    master, volume, filer, s3 = free_ports(4)
    command = (
        f"weed server -ip=127.0.0.1 -ip.bind=127.0.0.1 -dir={folder}/data -master.telemetry=false"
        f" -master.volumeSizeLimitMB=128 -volume.max=50 -master.port={master} -volume.port={volume} -filer"
        f" -filer.port={filer} -s3 -s3.port={s3} -s3.config={folder}/s3.json -s3.port.iceberg=0 -s3.port.lance=0"
    )
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(_found(command.split()), stdout=log, stderr=subprocess.STDOUT, cwd=folder)
    try:
        _wait_until_writable(f"http://127.0.0.1:{s3}", server)
        yield f"http://127.0.0.1:{s3}"
    finally:
        server.kill()
        server.wait()


def _found(command):
    """The command with the path of the wheel's binary, which lies beside the interpreter."""
    import sys
    from pathlib import Path

    return [str(Path(sys.executable).with_name(command[0])), *command[1:]]


def _wait_until_writable(endpoint, server, seconds=60):
    import s3fs

    deadline = time.monotonic() + seconds
    while True:
        try:
            fs = s3fs.S3FileSystem(key=KEY, secret=SECRET, endpoint_url=endpoint, skip_instance_cache=True)
            if not fs.exists("pairs"):
                fs.mkdir("pairs")
            fs.pipe_file("pairs/.ready", b"")
            return
        except Exception:
            if server.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.5)


@pytest.fixture
def s3_environment(seaweed, monkeypatch):
    """What a user sets: endpoint and credentials by environment, never in a URI."""
    import s3fs

    environment = {
        "AWS_ENDPOINT_URL": seaweed,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    yield environment
    s3fs.S3FileSystem.clear_instance_cache()
