"""The code behind a factory: its own file, and what that imports of the tree that it lies in."""

import ast
import hashlib
import inspect
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

_INSTALLED = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")}


def source_digest(module: ModuleType) -> str:
    """sha256 of a module's source; with files of its own tree that it imports, of all of them by their places.

    The tree is the folder from which the module's name begins. Of a module among installed packages it is its own
    package alone. Files are found by the import statements in the source, so every process finds the same ones;
    imports that are made up at run time, and files that are no Python, are not seen.
    """
    own = inspect.getsource(module)
    files = _imported(module)
    if not files:
        return hashlib.sha256(own.encode()).hexdigest()
    parts = {place: hashlib.sha256(text.encode()).hexdigest() for place, text in files.items()}
    whole = [hashlib.sha256(own.encode()).hexdigest(), parts]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def _imported(module: ModuleType) -> dict[str, str]:
    """Sources by their places in the tree, the module's own left out."""
    assert module.__file__
    file, parts = Path(module.__file__).resolve(), module.__name__.split(".")
    root = file.parents[len(parts) - (file.name != "__init__.py")]
    inside = root / parts[0] if _is_installed(root) else root
    found: dict[Path, str] = {}
    waiting = [file, *_files_of(root, module.__name__)]
    while waiting:
        path = waiting.pop()
        if path in found or not path.is_relative_to(inside):
            continue
        found[path] = path.read_text(encoding="utf-8")
        for name in _names_in(found[path], _package_of(root, path)):
            waiting += _files_of(root, name)
    return {path.relative_to(root).as_posix(): text for path, text in found.items() if path != file and text.strip()}


def _is_installed(root: Path) -> bool:
    return root in _INSTALLED or root.name in ("site-packages", "dist-packages")


def _package_of(root: Path, path: Path) -> tuple[str, ...]:
    """Where a file's relative imports begin."""
    return path.relative_to(root).parts[:-1]


def _files_of(root: Path, name: str) -> Iterator[Path]:
    """The module of a dotted name and the packages above it, as far as they are files below the root."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        folder = root.joinpath(*parts[:depth])
        yield from (path for path in (folder / "__init__.py", folder.with_name(f"{folder.name}.py")) if path.is_file())


def _names_in(source: str, package: tuple[str, ...]) -> Iterator[str]:
    """Every dotted name that the source imports, wherever in it; of `from a import b` also a.b, which may be a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from filter(None, [base])
            yield from (f"{base}.{alias.name}" if base else alias.name for alias in node.names)
