"""A real S3 server on loopback for the tests of whole programs."""

import pytest

from tests import servers
from tests.end_to_end.jobs import Jobs


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory):
    """The endpoint of a running server with one empty bucket, `pairs`."""
    with servers.seaweed(tmp_path_factory.mktemp("seaweed")) as server:
        yield server.endpoint


@pytest.fixture
def s3_environment(seaweed, monkeypatch):
    """What a user sets: endpoint and credentials by environment, never in a URI."""
    import s3fs

    environment = servers.environment(seaweed)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    yield environment
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def jobs(tmp_path):
    """`generate` as real processes; what they said shows if a test fails."""
    started = Jobs(tmp_path / "jobs.log")
    yield started
    started.end()
    if started.log.exists():
        print(started.told())
