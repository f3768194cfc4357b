"""Whole jobs on SeaweedFS behind a proxy that injects faults: each kind into each operation, then all at random."""

import pytest

from limbeck.storage_schemas.dataset import latest_number
from limbeck.storage_schemas.store import Store
from tests import servers
from tests.end_to_end.jobs import COUNT, HOLDOUT
from tests.exactly_once import assert_exactly_once
from tests.proxy import KINDS, Proxy, Rule

s3fs = pytest.importorskip("s3fs")

pytestmark = pytest.mark.faults

IMPATIENT = '{"config_kwargs": {"read_timeout": 2}}'
"""What a user of fsspec sets: the tests' hanging server is not worth a cloud's 15 s."""

CREATES = {"commit": ("create", "/commits/"), "manifest": ("create", r"/manifests/\d+\.json")}
OTHERS = {"upload": ("put", "/shards/"), "read": ("range", ""), "list": ("list", "")}


ONLY_CREATES = ("conflict", "precondition", "precondition_after")


def faults(kind):
    """A rule for every operation that can meet the kind; reads and lists meet it after the store was opened, too."""
    wanted = CREATES if kind in ONLY_CREATES else CREATES | OTHERS
    return {name: Rule(kind, operation, path, times=2) for name, (operation, path) in wanted.items()}


@pytest.fixture(scope="module")
def proxy(seaweed):
    with Proxy(seaweed) as running:
        yield running


@pytest.fixture
def job(jobs, proxy, s3_environment):
    """A job that reaches the server through the proxy; the tests themselves reach it directly."""

    def start(store, *words, **options):
        through = s3_environment | {"AWS_ENDPOINT_URL": proxy.endpoint, "FSSPEC_S3": IMPATIENT}
        return jobs.start(store, *words, **options, **through)

    proxy.rules = []
    proxy.injected.clear()
    return start


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_in_every_operation_of_a_whole_job(job, proxy, kind):
    wanted = faults(kind)
    proxy.rules = list(wanted.values())
    store = f"s3://{servers.BUCKET}/{kind}"
    assert job(store, "--workers", 2).wait() == 0
    assert all(rule.fired for rule in wanted.values()), wanted
    assert_exactly_once(store, count=COUNT, holdout=HOLDOUT)
    assert latest_number(Store.open(store), "main") == 1


@pytest.mark.timeout(300)
@pytest.mark.parametrize("probability", [0.1, 0.2])
def test_faults_at_random_in_all_requests(job, proxy, probability):
    """Two drivers at once, and something is wrong with 10 or 20 % of all requests, conditional or not."""
    everywhere = [kind for kind in KINDS if kind not in ONLY_CREATES]
    proxy.rules = [
        *(Rule(kind, "create", probability=probability / 3, seed=seed) for seed, kind in enumerate(ONLY_CREATES)),
        *(Rule(kind, probability=probability / len(everywhere), seed=seed) for seed, kind in enumerate(everywhere)),
    ]
    store = f"s3://{servers.BUCKET}/random-{probability}"
    beside = [job(store, "--workers", 2) for _ in range(2)]
    assert [driver.wait() for driver in beside] == [0, 0]
    assert len({kind for kind, _ in proxy.injected}) >= len(KINDS) // 2, proxy.injected
    assert_exactly_once(store, count=COUNT, holdout=HOLDOUT)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("drivers", [2, 3])
def test_drivers_at_once_on_one_bucket(job, drivers):
    store = f"s3://{servers.BUCKET}/drivers-{drivers}"
    beside = [job(store, "--workers", 2) for _ in range(drivers)]
    assert [driver.wait() for driver in beside] == [0] * drivers
    assert_exactly_once(store, count=COUNT, holdout=HOLDOUT)
