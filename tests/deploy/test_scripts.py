"""Container files and Slurm scripts, each by its own linter; and that the images are what the Makefile installs."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.deploy.manifests import DEPLOY, ROOT

DOCKERFILES = sorted(DEPLOY.glob("containers/*.Dockerfile"))
SCRIPTS = sorted(DEPLOY.glob("slurm/*.sbatch"))
BIN = Path(sys.executable).parent


def lint(*command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def instruction(path, name):
    """The arguments of a Dockerfile's last such instruction."""
    return re.findall(rf"^{name} (.*)$", path.read_text(), flags=re.MULTILINE)[-1]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_has_nothing_to_say(path):
    lint(BIN / "hadolint", path)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(path):
    lint(BIN / "shellcheck", path)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_images_bases_are_pinned(path):
    bases = [line.split()[0] for line in re.findall(r"^FROM (.*)$", path.read_text(), flags=re.MULTILINE)]
    cpu, cuda, chosen = bases
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", cpu)
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu\d+\.\d+", cuda)
    assert chosen == "base-${FLAVOUR}"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_runs_as_nobody_special_and_stays_offline(path):
    text = path.read_text()
    assert instruction(path, "USER") == "1000:1000"
    assert "HF_HUB_OFFLINE=1" in text
    assert json.loads(instruction(path, "ENTRYPOINT")) == ["tini", "--"]
    assert json.loads(instruction(path, "CMD")) == ["limbeck", "--help"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_has_the_makefiles_torch_and_the_programs_extra(path):
    (torch,) = re.findall(r"^TORCH \?= (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert f"ARG TORCH={torch}\n" in path.read_text()
    assert f"{torch}\n" in (DEPLOY / "containers" / "constraints.txt").read_text()
    assert re.search(rf"^ARG EXTRAS={path.stem},s3,diffusers$", path.read_text(), flags=re.MULTILINE)
    assert "--editable" not in path.read_text()


def test_what_is_built_from_is_let_through_to_the_image():
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    folders = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"].values())
    assert kept == folders | {"pyproject.toml", "README.md", "LICENSE", "deploy/containers/constraints.txt"}
    assert all((ROOT / name).exists() for name in kept)
