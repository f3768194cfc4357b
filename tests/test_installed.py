"""The wheel is one package, which no folder with a `trainer.py` or `pipeline/` of its own hides."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
GENERATE = "generate --teacher builtin:digits --store pairs --count 64 --holdout 64 --solver.steps 2 --runner local"
FIT = "fit --data pairs --out run --steps 2 --batch-size 16 --device cpu"
EVALUATE = "evaluate run --data pairs --nfe 1 --count 64 --device cpu"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder in which pip installed a wheel of this clone."""
    build, target = tmp_path_factory.mktemp("build"), tmp_path_factory.mktemp("installed")
    for name in (*SETUPTOOLS["package-dir"].values(), "pyproject.toml", "README.md", "LICENSE"):
        (build / name).symlink_to(ROOT / name)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(target), str(build)], check=True, cwd=build)
    return target


@pytest.fixture
def run(installed, tmp_path):
    """Run a command of the wheel in a folder that has modules of a stranger's under our old names."""
    (tmp_path / "trainer.py").write_text("raise SystemExit('a trainer of mine')\n")
    for name in ("pipeline", "diffusion"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('a module of mine')\n")

    def run(*command, path=installed):
        environment = os.environ | {"PYTHONPATH": f"{path}", "RAY_AUTH_MODE": "disabled"}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    return run


def test_every_package_is_installed():
    folders = {
        str(path.parent.relative_to(ROOT)).replace(os.sep, ".")
        for part in SETUPTOOLS["package-dir"].values()
        for path in (ROOT / part).rglob("__init__.py")
    }
    assert {f"limbeck.{name}" for name in folders} == set(SETUPTOOLS["packages"])


def test_the_wheel_holds_one_package_its_types_and_its_data(installed):
    assert {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} == {"limbeck", "bin"}
    files = {path.relative_to(installed / "limbeck").as_posix() for path in (installed / "limbeck").rglob("*")}
    assert {f"{part}/py.typed" for part in SETUPTOOLS["package-dir"].values()} <= files
    assert "diffusion/models/builtin/digits/model.safetensors" in files
    assert "trainer/builtin/digits_classifier/model.safetensors" in files


def test_the_wheel_runs_beside_modules_of_its_old_names(run, installed, tmp_path):
    where = "import limbeck.trainer, limbeck.pipeline; print(limbeck.trainer.__file__, limbeck.pipeline.__file__)"
    assert run(sys.executable, "-c", where).stdout.count(str(installed)) == 2
    limbeck = (sys.executable, str(installed / "bin" / "limbeck"))
    for words in (GENERATE, FIT, EVALUATE, "status pairs", "verify pairs"):
        done = run(*limbeck, *words.split())
        assert done.returncode == 0, done.stdout + done.stderr
    assert run(*limbeck, "--version").stdout == f"limbeck {PYPROJECT['project']['version']}\n"
    for program in ("pipeline", "trainer"):
        done = run(sys.executable, "-m", f"limbeck.{program}", "--help")
        assert "usage: limbeck COMMAND" in done.stdout, done.stderr


@pytest.mark.faults
def test_workers_of_ray_have_the_wheel(run, installed):
    done = run(sys.executable, str(installed / "bin" / "limbeck"), *GENERATE.replace("local", "ray").split())
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("program", "words"), [("pipeline", "plan --help"), ("trainer", "fit --help")])
def test_the_programs_run_by_their_folders_in_a_clone(program, words):
    command = [sys.executable, "-m", program, *words.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert f"usage: limbeck {words.split()[0]}" in done.stdout, done.stderr


def test_debug_before_a_command_runs_it_as_its_program_does(tmp_path):
    """With the program's own way out, also where a thread still solves."""
    code = "import sys; sys.argv = ['limbeck', '--debug', 'status', 'nowhere']\n"
    code += "import limbeck.pipeline.__main__ as p; p.run = lambda words: sys.exit(f'ran {words}')\n"
    code += "from limbeck.storage_schemas.program import main; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stderr == "ran ['--debug', 'status', 'nowhere']\n"


def test_a_command_imports_no_other(tmp_path):
    code = "import sys; sys.argv = ['limbeck', 'shuffle', '--rows', 'x']\n"
    code += "from limbeck.storage_schemas.program import main\ntry: main()\nexcept SystemExit: pass\n"
    code += "print(sorted(name for name in sys.modules if name.startswith('limbeck.') and name.count('.') == 2))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    for module in ("limbeck.trainer.fit", "limbeck.trainer.evaluate", "limbeck.pipeline.generate"):
        assert repr(module) not in done.stdout
    assert "limbeck.trainer.shuffle" in done.stdout
