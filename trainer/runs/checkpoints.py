"""A run's checkpoints in a folder or bucket: files first, then the marker that makes them a checkpoint.

    checkpoints/step-00000500-<attempt>/tree.json, tensors.safetensors     or a shard of each rank, of a sharded run
    checkpoints/step-00000500.json                                         the marker: files, bytes, xxh3

A writer that is killed leaves a folder that no marker names, which the writer of the next checkpoint removes. A place
is one run's: the record beside the folder says whose. Every rank calls every method; rank 0 decides.

What is read may be anybody's. A marker names a folder of its own step and files of our own names in it, whose sizes are
held against what is there before a byte is fetched; nothing is read, written or removed through a link.
"""

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import xxhash
from pydantic import Field, field_validator, model_validator
from safetensors import SafetensorError

from limbeck.storage_schemas import paths
from limbeck.storage_schemas.backends import sync_path
from limbeck.storage_schemas.documents import Document
from limbeck.storage_schemas.errors import StoreError, UserError
from limbeck.storage_schemas.names import Count, Positive, Xxh3
from limbeck.storage_schemas.store import Store
from limbeck.trainer.ranks import Ranks
from limbeck.trainer.runs.shards import NAME
from limbeck.trainer.runs.trees import TENSORS, TREE, count_tensors, read_plain, read_tree, write_tree

FOLDER = "checkpoints"
_PIECE = 64 << 20  # bytes of a file that are read at a time
_MARKER, _OURS = re.compile(r"step-[0-9]{8,12}\.json"), re.compile(r"step-[0-9]{8,12}-[0-9a-f]{16}")
_EARLIER = re.compile(r"step-[0-9]{8,}")
_UNFINISHED = re.compile(r"\.step-[0-9]{8,12}\.json\.[0-9a-f]{1,32}\.tmp")
_TORCHS_OWN = re.compile(r"\.metadata|__[0-9]+_[0-9]+\.distcp")
"""Files of a sharded checkpoint of release 0.1: reading them would run what they hold."""


class EarlierRelease(UserError):
    """A checkpoint that only the release which wrote it can read."""


class File(Document):
    """A file of a checkpoint."""

    name: Annotated[str, Field(max_length=99)]
    bytes: Annotated[int, Field(ge=0, lt=1 << 50)]
    xxh3: Xxh3

    @field_validator("name")
    @classmethod
    def _is_ours(cls, name: str) -> str:
        if name not in (TREE, TENSORS) and not NAME.fullmatch(name) and not _TORCHS_OWN.fullmatch(name):
            raise ValueError(f"{name!r} is no file of a checkpoint")
        return name


class Marker(Document):
    """Makes a checkpoint exist. holdout_error: where it was measured; the best is the least of its stage."""

    format: Literal[1] = 1
    step: Annotated[int, Field(ge=0, lt=10**12)]
    stage: Count
    folder: str
    files: tuple[File, ...]
    holdout_error: float | None
    world_size: Positive

    @model_validator(mode="after")
    def _names_its_own(self) -> Self:
        folder = self.folder.removeprefix(f"{FOLDER}/")
        if not _OURS.fullmatch(folder) or not folder.startswith(f"step-{self.step:08d}-"):
            raise ValueError(f"{self.folder!r} is no folder of step {self.step}")
        if len({file.name for file in self.files}) < len(self.files):
            raise ValueError("it names a file twice")
        return self

    @property
    def name(self) -> str:
        """Name of its file."""
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

    @property
    def holds(self) -> tuple[int, int]:
        """Upper bounds (tensors, numbers) of a network, by its files alone."""
        return count_tensors(self.folder), sum(file.bytes for file in self.marker.files)

    @contextmanager
    def store_errors(self) -> Iterator[None]:
        """Raise StoreError, in one line, for what a tree lacks of a fit's state or holds of another shape or kind."""
        try:
            yield
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if "gloo" in str(error):  # another rank is lost
                raise
            reason = " ".join(str(error).split())[:200]
            problem = f"checkpoint {self.marker.folder} holds no state of this fit ({type(error).__name__}: {reason})"
            raise StoreError(f"{problem}: restore it, or start again by --no-resume") from error


class Checkpoints:
    """The checkpoints of one run in one place.

    check: raises where the place is another's by now. It is asked after files are written, which may take long, and
    again before any are removed.
    """

    def __init__(
        self,
        place: Store,
        ranks: Ranks,
        *,
        keep_last: int = 2,
        keep_best: bool = True,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.place, self._ranks, self._check = place, ranks, check
        self._keep_last, self._keep_best = keep_last, keep_best

    def save(self, step: int, tree: Any, *, stage: int = 0, holdout_error: float | None = None) -> None:
        """Save `tree` (see trees.py) as checkpoint `step`; then remove those that are no longer kept."""
        name = self._ranks.broadcast(f"step-{step:08d}-{paths.new_attempt()}")
        folder, rank = f"{FOLDER}/{name}", self._ranks.rank
        with _to_fill(self.place, folder) as local:
            write_tree(tree, local, rank=rank, world_size=self._ranks.world_size)
            mine = [_published(self.place, path, folder) for path in sorted(local.iterdir()) if _writes(rank, path)]
        files = tuple(file for part in self._ranks.gather(mine) for file in part)
        marker = Marker(
            step=step, stage=stage, folder=folder, files=files, holdout_error=holdout_error,
            world_size=self._ranks.world_size,
        )  # fmt: skip
        if self._ranks.is_first:
            self._check()
            self.place.write(f"{FOLDER}/{marker.name}", marker.to_bytes())
            self._check()
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
                problems = [each for each in self._ranks.gather(problem) if each]
                if found and not problems:
                    yield found
                    return
            refused.append(f"{problems[0]}: going on from the checkpoint before")
        if refused:
            raise StoreError(f"{refused[0].rpartition(': ')[0]}, and no other is whole: start again by --no-resume")
        yield None

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self._names())

    def _fetched(self, name: str, scratch: Path, refused: tuple[str, ...]) -> tuple[Found | None, str | None]:
        """(the checkpoint of a marker, None) or (None, what is wrong with it)."""
        path = f"{FOLDER}/{name}"
        try:
            marker = self._read(name, self.place.read(path) or b"")
            _refuse_torchs_own(marker, f"{self.place.uri}/{marker.folder}")
            local = own_folder(self.place, marker.folder)
            folder = local or scratch
            for file in marker.files:
                source = f"{self.place.uri}/{marker.folder}/{file.name}"
                if not local:
                    _download(self.place, f"{marker.folder}/{file.name}", file, folder / file.name)
                _check(folder / file.name, file, source)
            _check_no_others(folder, marker, f"{self.place.uri}/{marker.folder}")
        except OSError as error:
            return None, f"{self.place.uri}/{path} can't be fetched ({error})"
        except StoreError as error:
            return None, str(error)
        return Found(marker, folder, refused), None

    def _read(self, name: str, data: bytes) -> Marker:
        """The marker in a file. StoreError for what is no marker, or that of another step."""
        source = f"{self.place.uri}/{FOLDER}/{name}"
        marker = Marker.from_bytes(data, source)
        if marker.name != name:
            raise StoreError(f"{source} is the marker of step {marker.step}: restore it")
        return marker

    def _names(self) -> list[str]:
        """Names of the markers, by their steps."""
        names = self.place.list(FOLDER)
        for name in filter(_EARLIER.fullmatch, names):
            problem = f"{self.place.uri}/{FOLDER}/{name} was written by an earlier release"
            raise StoreError(f"{problem}: go on with that one, or start again by --no-resume")
        return sorted(filter(_MARKER.fullmatch, names), key=lambda name: int(name[5:-5]))

    def _markers(self) -> dict[str, Marker]:
        """The markers that can be read, by their names."""
        names, found = self._names(), {}
        for name, data in zip(names, self.place.read_many([f"{FOLDER}/{name}" for name in names]), strict=True):
            try:
                found[name] = self._read(name, data or b"")
            except StoreError:
                continue
        return found

    def _tidy(self, newest: Marker) -> None:
        """Remove what isn't kept, markers first, and what killed writers left."""
        kept = {marker.name: marker for marker in self._kept(newest)}
        listed = self.place.list(FOLDER)
        hidden = [one.name for one in self.place.list_details(FOLDER, unfinished=True)]
        left = list(filter(_UNFINISHED.fullmatch, hidden))
        for name in [name for name in listed if _MARKER.fullmatch(name) and name not in kept] + left:
            self.place.remove(f"{FOLDER}/{name}")
        named = {marker.folder for marker in kept.values()}
        for name in filter(_OURS.fullmatch, listed):
            if f"{FOLDER}/{name}" not in named:
                remove_folder(self.place, f"{FOLDER}/{name}")

    def _kept(self, newest: Marker) -> list[Marker]:
        """Markers of the last few and the best. One past the newest was refused when the run went on from before it."""
        markers = sorted(self._markers().values(), key=lambda marker: marker.step)
        markers = [marker for marker in markers if marker.step <= newest.step]
        kept = markers[-self._keep_last :]
        staged = [(marker.holdout_error, marker.step, marker) for marker in markers if marker.stage == newest.stage]
        errors = [(error, step, marker) for error, step, marker in staged if error is not None]
        return [*kept, min(errors)[2]] if errors and self._keep_best else kept


def _writes(rank: int, path: Path) -> bool:
    """Whether a file is this rank's: shards are named by their rank, the rest is the first one's."""
    shard = NAME.fullmatch(path.name)
    return int(shard[1]) == rank + 1 if shard else rank == 0


@contextmanager
def _to_fill(place: Store, folder: str) -> Iterator[Path]:
    """Where to write the files of a folder: the folder itself, or one to upload from."""
    local = own_folder(place, folder)
    with tempfile.TemporaryDirectory(prefix="limbeck-checkpoint-") as scratch:
        target = local or Path(scratch)
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


def own_folder(place: Store, folder: str) -> Path | None:
    """A folder's own path in a local place, None elsewhere. StoreError where a link is on the way to it."""
    local = place.local_path(folder)
    if local is None:
        return None
    for path in (Path(local), *Path(local).parents[: folder.count("/")]):
        if path.is_symlink():
            raise StoreError(f"{path} is a link, which a run's files are not kept behind: name its target itself")
    return Path(local)


def _refuse_torchs_own(marker: Marker, source: str) -> None:
    if any(_TORCHS_OWN.fullmatch(file.name) for file in marker.files):
        raise EarlierRelease(
            f"{source} holds shards as release 0.1 wrote them, which may run code when they are read: go on with that "
            "release, or start again by --no-resume"
        )


def _check(path: Path, file: File, source: str) -> None:
    if path.is_symlink() or not path.is_file():
        raise StoreError(f"{source} is missing")
    if path.stat().st_size != file.bytes:
        raise StoreError(f"{source} has {path.stat().st_size} bytes, its marker says {file.bytes}")
    if _xxh3(path) != file.xxh3:
        raise StoreError(f"{source} does not match its checksum")


def _check_no_others(folder: Path, marker: Marker, source: str) -> None:
    """Refuse a file that would be read with the others, though nothing says what it should hold."""
    named = {file.name for file in marker.files}
    for path in sorted(folder.iterdir()):
        if path.name not in named and (path.name in (TREE, TENSORS) or NAME.fullmatch(path.name)):
            raise StoreError(f"{source}/{path.name} is not in its marker")


def _xxh3(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _download(place: Store, path: str, expected: File, target: Path) -> None:
    size = place.size(path)
    if size != expected.bytes:
        has = "is missing" if size is None else f"has {size} bytes, its marker says {expected.bytes}"
        raise StoreError(f"{place.uri}/{path} {has}")
    with open(target, "wb") as file:
        for start in range(0, size, _PIECE):
            file.write(place.read_range(path, start, min(_PIECE, size - start)))


def remove_folder(place: Store, folder: str) -> None:
    """Remove a folder's files, and in a local place the folder with all that it holds. What is behind a link stays."""
    try:
        local = own_folder(place, folder)
    except StoreError:
        return
    if local:
        shutil.rmtree(local, ignore_errors=True)  # which follows no link
        return
    names: Sequence[str] = [*place.list(folder), *(one.name for one in place.list_details(folder, unfinished=True))]
    for name in names:
        place.remove(f"{folder}/{name}")
