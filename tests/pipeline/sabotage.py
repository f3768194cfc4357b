"""What stops a process of a job at a step of the protocol, from inside it: no hook in the programs knows of this.

`strange_teachers.sabotaged_teacher` calls `sabotage`, in the planning process and in every worker. The environment says
STRANGE_STEPS (names below, with commas) and STRANGE_SIGNAL (KILL or STOP). Whoever is the first to reach a step writes
its pid to STRANGE_MARKER-<step> and signals itself; nobody is struck there again.
"""

import multiprocessing
import os
import signal
from functools import partial
from pathlib import Path

from limbeck.storage_schemas import backends, formats
from limbeck.storage_schemas.store import Store


def marker_of(step, marker=None):
    return Path(f"{marker or os.environ['STRANGE_MARKER']}-{step.replace(' ', '-')}")


def strike(step):
    """Signal this process, if it is the first to get here."""
    finished = marker_of(step).with_suffix(f".{os.getpid()}")
    finished.write_text(str(os.getpid()))
    try:
        os.link(finished, marker_of(step))  # whole at once: the test waits for it and reads it
    except FileExistsError:
        return
    os.kill(os.getpid(), getattr(signal, f"SIG{os.environ.get('STRANGE_SIGNAL', 'KILL')}"))


def around(owner, name, step, *, before=None, after=None):
    """Strike before or after those calls of `owner.name` whose path has the given text."""
    real = getattr(owner, name)

    def call(*args, **options):
        path = next((str(arg) for arg in args[1:] if isinstance(arg, str)), "")
        if before is not None and before in path:
            strike(step)
        result = real(*args, **options)
        if after is not None and after in path:
            strike(step)
        return result

    setattr(owner, name, call)


def half_way(step):
    """Half of the shard is in its place when the blow comes."""
    real = backends.copy_local

    def copy(source, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        data = Path(source).read_bytes()
        path.write_bytes(data[: len(data) // 2])
        strike(step)
        real(source, path)

    backends.copy_local = copy


put = partial(around, Store, "put_if_absent")
STEPS_OF_A_WORKER = {
    "while it encodes": partial(around, formats, "encode_shard", after=""),
    "before the upload": partial(around, Store, "upload", before=""),
    "during the upload": half_way,
    "after the upload": partial(put, before="/records/"),
    "after the commit": partial(put, after="/commits/"),
}
STEPS_OF_A_DRIVER = {
    "after the job document": partial(around, Store, "write", after="/job.json"),
    "after all commits": partial(put, before=".parquet"),
    "after the shard table": partial(put, after=".parquet"),
    "before the manifest": partial(put, before="/manifests/000001.json"),
    "after the manifest": partial(put, after="/manifests/000001.json"),
}


def sabotage():
    """Lay the traps that the environment names, in the kind of process that they are for."""
    steps = STEPS_OF_A_WORKER if multiprocessing.parent_process() else STEPS_OF_A_DRIVER
    for step in os.environ.get("STRANGE_STEPS", "").split(","):
        lay = steps.pop(step, None)  # once: a process may load its teacher twice
        if lay:
            lay(step)
