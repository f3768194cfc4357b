"""Every option of both programs that names a place follows the same rules, from flags and from YAML."""

import re
from pathlib import Path

import pytest

from limbeck.storage_schemas.command_line import parse, ungrouped
from limbeck.storage_schemas.errors import UsageError
from limbeck.storage_schemas.program import COMMANDS

JOB = "--teacher builtin:digits --count 8"
GENERATE = f"generate {JOB} --store s"
DENOISE = "fit --out r --objective.name denoising"
DMD = "fit --out r --data p --objective.name dmd"
LPIPS = "fit --out r --data p --objective.distance lpips"
EVALUATE = "evaluate run --data p"

STORES = [
    (f"generate {JOB}", "--store"),
    (f"regenerate {JOB}", "--store"),
    (f"plan {JOB}", "--store"),
    (f"progressive {JOB} --out r", "--store"),
    *((f"{name}", "store") for name in ("verify", "inspect", "status", "prune")),
    ("convert --to parquet", "store"),
    ("reproduce --sample 1", "store"),
    ("submit", "--working-dir"),
    ("fit --out r", "--data"),
    ("fit --out r --data p", "--checkpoints"),
    ("evaluate run", "--data"),
    ("shuffle", "--data"),
]
SOURCES = [
    ("generate --count 8 --store s", "--teacher"),
    ("calibrate", "--teacher"),
    ("progressive --count 8 --store s --out r", "--teacher"),
    ("verify s --audit 4", "--teacher"),
    ("reproduce s --sample 1", "--teacher"),
    (DENOISE, "--images"),
    ("fit --out r --data p", "--init"),
    (DMD, "--teacher.uri"),
    (EVALUATE, "--images"),
    (EVALUATE, "--teacher"),
    ("classifier --out c", "--images"),
]
LOCAL = [
    (f"progressive {JOB} --store s", "--out"),
    (GENERATE, "--calibration"),
    ("calibrate --teacher builtin:digits", "--out"),
    ("calibrate --teacher builtin:digits", "--picture"),
    ("inspect s", "--picture"),
    ("inspect s --lineage", "--student"),
    ("fit --data p", "--out"),
    ("fit --data p --out r", "--cache-folder"),
    (LPIPS, "--objective.lpips"),
    ("sample --nfe 1 --out a.png", "run"),
    ("sample run --nfe 1", "--out"),
    ("sample run --nfe 1", "--tensors"),
    ("evaluate --data p", "runs"),
    (EVALUATE, "--out"),
    (EVALUATE, "--classifier"),
    ("report e", "--out"),
    ("report --out r", "evaluations"),
    ("classifier", "--out"),
]


def read(line, option, value):
    name, *words = line.split()
    given = [f"{option}={value}", *words] if option.startswith("--") else [value, *words]
    config = parse(COMMANDS[name].config, given, program=name)
    first, *inner = option.removeprefix("--").replace("-", "_").split(".")
    found = ungrouped(type(config), dict(config))[first]
    for part in inner:
        found = getattr(found, part)
    return found


def refused(line, option, value):
    with pytest.raises(UsageError) as told:
        read(line, option, value)
    assert "\n" not in str(told.value)
    return str(told.value)


@pytest.fixture(autouse=True)
def home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")


@pytest.mark.parametrize(("line", "option"), [*STORES, *SOURCES, *LOCAL])
def test_a_tilde_is_the_home_folder(line, option):
    found = read(line, option, "~/x/y")
    assert found in ("/home/ada/x/y", Path("/home/ada/x/y"), (Path("/home/ada/x/y"),))


@pytest.mark.parametrize(("line", "option"), [STORES[0], (f"progressive {JOB} --store s", "--out")])
def test_a_tilde_in_yaml_is_the_home_folder(line, option, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "job.yaml").write_text(f"{option.removeprefix('--')}: ~/x/y\n")
    name, *words = line.split()
    found = parse(COMMANDS[name].config, [*words, "--config=~/job.yaml"], program=name)
    assert str(getattr(found, option.removeprefix("--"))) == str(tmp_path / "x/y")


@pytest.mark.parametrize("kind", ["npz:", "idx:", "emoji:", "diffusers:"])
def test_a_tilde_behind_a_kind_is_the_home_folder(kind):
    assert read(*SOURCES[0], f"{kind}~/x@32") == f"{kind}/home/ada/x@32"


def test_segments_begin_at_images_in_the_home_folder():
    line = f"{GENERATE} --solver.name ddim"
    assert read(line, "--start", "data:npz:~/x.npz") == "data:npz:/home/ada/x.npz"


@pytest.mark.parametrize("value", ["s3:bucket/x", "s3:/bucket/x", "S3://bucket/x"])
@pytest.mark.parametrize(("line", "option"), STORES)
def test_a_misspelt_bucket_is_no_folder(line, option, value):
    assert "write s3://bucket/x" in refused(line, option, value)


@pytest.mark.parametrize("value", ["s3:bucket/x", "s3:/bucket/x", "S3://bucket/x", "gs://bucket/x", "memory://x"])
@pytest.mark.parametrize(("line", "option"), LOCAL)
def test_a_bucket_is_no_local_path(line, option, value):
    scheme, rest = re.split(":/{0,2}", value)
    told = refused(line, option, value)
    assert f"{scheme}://{rest} is not on this machine: give a local file or folder" in told


@pytest.mark.parametrize("value", ["s3://bucket/x", "s3:/bucket/x", "https://x.org/model"])
@pytest.mark.parametrize(("line", "option"), SOURCES)
def test_a_bucket_is_no_source(line, option, value):
    assert f"{value} is not on this machine: copy it" in refused(line, option, value)


def test_a_kind_behind_which_is_a_bucket_is_refused_too():
    assert "copy it" in refused(f"{GENERATE} --solver.name ddim", "--start", "data:npz:s3://bucket/x.npz")


@pytest.mark.parametrize("value", ["run:1", "a:b/c", "C:\\x", "C:/x", "s3"])
def test_a_colon_alone_makes_no_scheme(value):
    assert read(*LOCAL[6], value) == Path(value)
    assert read(*STORES[0], value) == value


def test_what_is_refused_shows_no_credentials():
    assert "secret" not in refused(*STORES[0], "s3:/key:secret@bucket/x")
