"""A run's checkpoints in a folder or bucket: files first, then the marker that makes them a checkpoint.

    checkpoints/step-00000500-<attempt>/tree.json, tensors.safetensors     or torch's own shards, of a sharded run
    checkpoints/step-00000500.json                                         the marker: files, bytes, xxh3

A writer that is killed leaves a folder that no marker names, which the writer of the next checkpoint removes. A place
is one run's: the record beside the folder says whose. Every rank calls every method; rank 0 decides.
"""

import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import xxhash
from safetensors import SafetensorError

from storage_schemas import paths
from storage_schemas.backends import sync_path
from storage_schemas.documents import Document
from storage_schemas.errors import StoreError
from storage_schemas.store import Store
from trainer.parallel import Ranks
from trainer.saving.trees import read_plain, read_tree, write_tree

FOLDER = "checkpoints"
_PIECE = 64 << 20  # bytes of a file that are read at a time
_MARKER, _OURS = re.compile(r"step-\d{8,}\.json"), re.compile(r"step-\d{8,}-[0-9a-f]{16}")
_EARLIER = re.compile(r"step-\d{8,}")


class File(Document):
    """A file of a checkpoint."""

    name: str
    bytes: int
    xxh3: str


class Marker(Document):
    """What makes a checkpoint exist. holdout_error: where it was measured; the best is the least of its stage."""

    format: Literal[1] = 1
    step: int
    stage: int
    folder: str
    files: tuple[File, ...]
    holdout_error: float | None
    world_size: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"step-{self.step:08d}.json"


@dataclass(frozen=True)
class Found:
    """A checkpoint whose files are all there and match. refused: a line on each newer one that isn't so."""

    marker: Marker
    folder: Path
    refused: tuple[str, ...]

    def read(self, like: Any = None) -> Any:
        """The tree that was saved; see `read_tree` for `like`, which a sharded one needs."""
        return read_tree(self.folder, like=like)

    @property
    def plain(self) -> Any:
        """The same tree with None for tensors."""
        return read_plain(self.folder)


class Checkpoints:
    """The checkpoints of one run in one place."""

    def __init__(self, place: Store, ranks: Ranks, *, keep_last: int = 2, keep_best: bool = True) -> None:
        self.place, self._ranks = place, ranks
        self._keep_last, self._keep_best = keep_last, keep_best

    def save(self, step: int, tree: Any, *, stage: int = 0, holdout_error: float | None = None) -> None:
        """`tree` (see trees.py) as checkpoint `step`; then those that are no longer kept go."""
        name = self._ranks.broadcast(f"step-{step:08d}-{paths.new_attempt()}")
        folder, rank = f"{FOLDER}/{name}", self._ranks.rank
        with _to_fill(self.place, folder) as local:
            write_tree(tree, local, rank=rank)
            mine = [_published(self.place, path, folder) for path in sorted(local.iterdir()) if _writes(rank, path)]
        files = tuple(file for part in self._ranks.gather(mine) for file in part)
        marker = Marker(
            step=step, stage=stage, folder=folder, files=files, holdout_error=holdout_error,
            world_size=self._ranks.world_size,
        )  # fmt: skip
        if self._ranks.is_first:
            self.place.write(f"{FOLDER}/{marker.name}", marker.to_bytes())
            self._tidy(marker)
        self._ranks.barrier()  # no rank goes on before the checkpoint is there

    def would_be_best(self, stage: int, holdout_error: float) -> bool:
        """Whether no checkpoint of this stage has as small an error."""
        if not self._ranks.is_first:
            return bool(self._ranks.broadcast(None))
        known = [marker.holdout_error for marker in self._markers().values() if marker.stage == stage]
        return bool(self._ranks.broadcast(all(error is None or holdout_error < error for error in known)))

    @contextmanager
    def newest(self) -> Iterator[Found | None]:
        """The newest whole checkpoint, its files here for as long as it lasts; None where there is none at all."""
        names = self._ranks.broadcast(self._names())
        refused: list[str] = []
        for name in reversed(names):
            with tempfile.TemporaryDirectory(prefix="limbeck-checkpoint-") as scratch:
                found, problem = self._fetched(name, Path(scratch), tuple(refused))
                problems = [told for told in self._ranks.gather(problem) if told]
                if found and not problems:
                    yield found
                    return
            refused.append(f"{problems[0]}: going on from the checkpoint before")
        if refused:
            raise StoreError(f"{refused[0].rpartition(': ')[0]}, and no other is whole: start anew by --no-resume")
        yield None

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self._names())

    def _fetched(self, name: str, scratch: Path, refused: tuple[str, ...]) -> tuple[Found | None, str | None]:
        """(the checkpoint of a marker, None) or (None, what is wrong with it)."""
        path = f"{FOLDER}/{name}"
        try:
            marker = Marker.from_bytes(self.place.read(path) or b"", f"{self.place.uri}/{path}")
            local = self.place.local_path(marker.folder)
            folder = Path(local) if local else scratch
            for file in marker.files:
                if not local:
                    _download(self.place, f"{marker.folder}/{file.name}", file.bytes, folder / file.name)
                _check(folder / file.name, file, f"{self.place.uri}/{marker.folder}/{file.name}")
        except StoreError as error:
            return None, str(error)
        return Found(marker, folder, refused), None

    def _names(self) -> list[str]:
        """Names of the markers, by their steps."""
        names = self.place.list(FOLDER)
        for name in filter(_EARLIER.fullmatch, names):
            told = f"{self.place.uri}/{FOLDER}/{name} was written by an earlier release"
            raise StoreError(f"{told}: go on with that one, or start anew by --no-resume")
        return sorted(filter(_MARKER.fullmatch, names), key=lambda name: int(name[5:-5]))

    def _markers(self) -> dict[str, Marker]:
        """Those that can be read, by their names."""
        names, found = self._names(), {}
        for name, data in zip(names, self.place.read_many([f"{FOLDER}/{name}" for name in names]), strict=True):
            try:
                found[name] = Marker.from_bytes(data or b"", name)
            except StoreError:
                continue
        return found

    def _tidy(self, newest: Marker) -> None:
        """Remove what isn't kept, markers first, and what killed writers left."""
        kept = {marker.name: marker for marker in self._kept(newest)}
        listed = self.place.list(FOLDER)
        left = [one.name for one in self.place.list_details(FOLDER, unfinished=True) if one.name.startswith(".step-")]
        for name in [name for name in listed if _MARKER.fullmatch(name) and name not in kept] + left:
            self.place.remove(f"{FOLDER}/{name}")
        named = {marker.folder for marker in kept.values()}
        for name in filter(_OURS.fullmatch, listed):
            if f"{FOLDER}/{name}" not in named:
                remove_folder(self.place, f"{FOLDER}/{name}")

    def _kept(self, newest: Marker) -> list[Marker]:
        """The last few and the best. One past the newest was refused when the run went on from before it."""
        markers = sorted(self._markers().values(), key=lambda marker: marker.step)
        markers = [marker for marker in markers if marker.step <= newest.step]
        kept = markers[-self._keep_last :]
        told = [(marker.holdout_error, marker.step, marker) for marker in markers if marker.stage == newest.stage]
        errors = [(error, step, marker) for error, step, marker in told if error is not None]
        return [*kept, min(errors)[2]] if errors and self._keep_best else kept


def _writes(rank: int, path: Path) -> bool:
    """Whether a file is this rank's: torch names a rank's shards __<rank>_<n>.distcp."""
    return path.name.startswith(f"__{rank}_") or (rank == 0 and not path.name.startswith("__"))


@contextmanager
def _to_fill(place: Store, folder: str) -> Iterator[Path]:
    """Where to write the files of a folder: the folder itself, or one to upload from."""
    local = place.local_path(folder)
    with tempfile.TemporaryDirectory(prefix="limbeck-checkpoint-") as scratch:
        target = Path(local) if local else Path(scratch)
        target.mkdir(parents=True, exist_ok=True)
        try:
            yield target
        except (OSError, SafetensorError) as error:
            shutil.rmtree(target, ignore_errors=True)
            raise StoreError(f"{target}: the checkpoint can't be written: {error}") from error


def _published(place: Store, path: Path, folder: str) -> File:
    """A written file, once it lasts in its place."""
    file = File(name=path.name, bytes=path.stat().st_size, xxh3=_xxh3(path))
    if place.local_path(folder):
        sync_path(path)
        sync_path(path.parent)
    else:
        place.upload(path, f"{folder}/{path.name}")
    return file


def _check(path: Path, file: File, told: str) -> None:
    if not path.is_file():
        raise StoreError(f"{told} is missing")
    if path.stat().st_size != file.bytes:
        raise StoreError(f"{told} has {path.stat().st_size} bytes, its marker says {file.bytes}")
    if _xxh3(path) != file.xxh3:
        raise StoreError(f"{told} does not match its checksum")


def _xxh3(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _download(place: Store, path: str, size: int, target: Path) -> None:
    with open(target, "wb") as file:
        for start in range(0, size, _PIECE):
            file.write(place.read_range(path, start, min(_PIECE, size - start)))


def remove_folder(place: Store, folder: str) -> None:
    """Remove a folder's files, and in a local place the folder with all that it holds."""
    local = place.local_path(folder)
    if local:
        shutil.rmtree(local, ignore_errors=True)
        return
    names: Sequence[str] = [*place.list(folder), *(one.name for one in place.list_details(folder, unfinished=True))]
    for name in names:
        place.remove(f"{folder}/{name}")
