"""The readers that ours is held against, in a venv of their own: `.venv-peers`.

    python -m tests.benchmarks.peers

Two of them ask for torchvision, a CUDA build of torch and an older numpy, and use none of it to read arrays. So they
are installed without what they ask for, beside a link to this environment's packages: torch, numpy, pyarrow, Ray and
webdataset are the ones that our reader is measured with.
"""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

FOLDER = Path(".venv-peers")
PYTHON = FOLDER / "bin" / "python"
PINNED = """
    mosaicml-streaming==0.13.0 python-snappy==0.7.3 cramjam==2.14.0 Brotli==1.2.1 zstd==1.5.7.2 catalogue==2.0.10
    litdata==0.2.76 tifffile==2026.3.3 obstore==0.12.1
    spdl-core==0.8.0 pylance==14.0.2 lance-namespace==0.13.0
    datasets==5.2.0 pandas==3.1.1 dill==0.4.1 multiprocess==0.70.19
"""


def install() -> None:
    """Make the venv, anew where its pins have changed; half a minute and 300 MB."""
    marker = FOLDER / "installed"
    if marker.is_file() and marker.read_text() == PINNED:
        return
    venv.create(FOLDER, clear=True)
    site = sysconfig.get_path("purelib", vars={"base": str(FOLDER.resolve())})
    (Path(site) / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(PYTHON), "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, *PINNED.split()], check=True)
    marker.write_text(PINNED)


if __name__ == "__main__":
    install()
