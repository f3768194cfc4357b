"""The digest of a factory's code: of its own file alone, or with what that imports of its own tree."""

import hashlib
import importlib
import sys

import pytest

from limbeck.diffusion.models.source import source_digest

FILES = {
    "alone.py": "import json, torch\nfrom limbeck.diffusion.process import VE\nmake = VE\n",
    "teacher.py": "import net\ndef make():\n    from pack import inner\n    return net, inner\n",
    "net.py": "from deeper import SCALE\n",
    "deeper.py": "import teacher\nSCALE = 1\n",  # a circle
    "pack/__init__.py": "",
    "pack/inner.py": "from . import beside\nfrom .sub.leaf import X\n",
    "pack/beside.py": "B = 1\n",
    "pack/sub/leaf.py": "X = 1\n",
    "unrelated.py": "U = 1\n",
}


@pytest.fixture
def digest(tmp_path, monkeypatch):
    """The digest of a module of the tree with these changes, loaded for the first time."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def of(name, **changed):
        for path, text in (FILES | changed).items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        roots = {path.split("/")[0].removesuffix(".py") for path in FILES}
        for loaded in [one for one in sys.modules if one.split(".")[0] in roots]:
            del sys.modules[loaded]
        importlib.invalidate_caches()
        sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
        try:
            return source_digest(importlib.import_module(name))
        finally:
            sys.dont_write_bytecode = before

    yield of
    for loaded in ("alone", "teacher", "net", "deeper", "pack", "pack.inner", "pack.beside", "pack.sub.leaf"):
        sys.modules.pop(loaded, None)


def test_a_module_that_imports_nothing_of_its_tree_is_its_own_source(digest):
    assert digest("alone") == hashlib.sha256(FILES["alone.py"].encode()).hexdigest()
    assert digest("alone", **{"unrelated.py": "U = 2\n"}) == digest("alone")


@pytest.mark.parametrize(
    ("module", "path", "counts"),
    [
        ("teacher", "teacher.py", True),
        ("teacher", "net.py", True),
        ("teacher", "deeper.py", True),
        ("teacher", "pack/inner.py", True),  # imported within a function, whether that ran or not
        ("teacher", "pack/beside.py", True),
        ("teacher", "pack/sub/leaf.py", True),
        ("teacher", "pack/__init__.py", True),
        ("teacher", "unrelated.py", False),
        ("pack.inner", "pack/beside.py", True),
        ("pack.inner", "net.py", False),
    ],
)
def test_what_it_imports_of_its_tree_counts(digest, module, path, counts):
    before = digest(module)
    assert digest(module) == before
    assert (digest(module, **{path: FILES[path] + "CHANGED = 1\n"}) != before) == counts
