"""What the repository says of itself holds: the README's commands, code, links and tables, and who imports what."""

import itertools
import random
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from packaging.version import Version

from limbeck.pipeline.__main__ import COMMANDS as PIPELINE
from limbeck.storage_schemas.command_line import main, parse
from limbeck.storage_schemas.dataset import open_dataset
from limbeck.storage_schemas.program import COMMANDS
from limbeck.storage_schemas.record import from_storage
from limbeck.storage_schemas.store import Store
from tests.reference import TEACHERS, option_rows, with_reference

ROOT = Path(__file__).parents[1]
README, SECURITY = ((ROOT / name).read_text() for name in ("README.md", "SECURITY.md"))


def code_blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def readme_commands(text=README):
    """The words of every `limbeck ...` line of a README."""
    lines = re.sub(r"\\\n\s*", " ", "\n".join(code_blocks("bash", text))).splitlines()
    found = [re.match(r"limbeck (.*)", line.split("  #")[0]) for line in lines]
    return [match[1].split() for match in found if match]


DEPLOY = (ROOT / "deploy" / "README.md").read_text()


@pytest.mark.parametrize(
    "words",
    readme_commands() + readme_commands(DEPLOY) + readme_commands(TEACHERS.read_text()),
    ids=lambda words: words[0],
)
def test_a_command_of_the_readme_parses(words, tmp_path):
    (rounds,) = code_blocks("yaml")
    (tmp_path / "rounds.yaml").write_text(rounds)
    command, *options = [str(tmp_path / word) if word == "rounds.yaml" else word for word in words]
    parse(COMMANDS[command].config, options, program=command)


@pytest.mark.parametrize("turn", [1, 2])
def test_a_test_draws_the_same_whichever_ran_before_it(turn):
    assert random.random() == random.Random(0).random()
    assert np.random.rand() == np.random.RandomState(0).rand()
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0)))
    assert hypothesis.settings.default.derandomize


def test_the_readme_shows_every_part_of_the_main_job():
    assert {words[0] for words in readme_commands()} >= {
        "generate",
        "verify",
        "inspect",
        "fit",
        "evaluate",
        "sample",
    }


@pytest.mark.parametrize("name", PIPELINE)
def test_help_is_made_of_sentences(name):
    helps = [help for _, _, help in option_rows(PIPELINE[name].config)]
    assert not [help for help in helps if not re.fullmatch(r"[A-Z].*\.", help)]


def test_the_readmes_options_and_objectives_are_the_programs():
    assert with_reference(README) == README, "run python -m tests.reference"


def test_the_network_of_the_page_about_teachers_is_a_denoiser():
    """Of a flow whose data is 3 everywhere."""
    names = {}
    exec(code_blocks("py", TEACHERS.read_text())[0], names)
    x_0 = names["teacher"]()(torch.randn(2, 3, 32, 32), torch.tensor(0.5, dtype=torch.float64))
    assert torch.allclose(x_0, torch.tensor(3.0), atol=1e-5)


def test_the_page_about_teachers_has_the_schedulers_that_there_are():
    assert with_reference(TEACHERS.read_text()) == TEACHERS.read_text(), "run python -m tests.reference"


@pytest.mark.parametrize("path", re.findall(r"\]\((?!https?:)([^)#]+)\)", TEACHERS.read_text()))
def test_a_file_that_the_page_about_teachers_names_is_there(path):
    assert (TEACHERS.parent / path).exists()


@pytest.mark.parametrize("path", re.findall(r"\]\((?!https?:)([^)#]+)\)", README))
def test_a_file_that_the_readme_names_is_there(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize(("said", "path"), re.findall(r"\[(.+?)\]\((.+?)\)", SECURITY))
def test_what_holds_a_rule_of_security_is_there(said, path):
    name = said.strip("`")
    assert name == path or re.search(rf"^ *(?:class|def) {name}\b", (ROOT / path).read_text(), re.MULTILINE)


def test_the_security_page_says_it_in_short_sentences():
    table = re.findall(r"^\| (.+?) \|", SECURITY, re.MULTILINE)
    prose = re.sub(r"^(?:#.*|\|.*)$", "", SECURITY, flags=re.MULTILINE)
    for text in (*table, *re.split(r"\n(?:- |\n)", prose)):
        for sentence in re.split(r"[.:;] ", " ".join(text.split())):
            assert len(sentence.split()) <= 30, sentence


def run_blocks(*languages: str, teacher: str, dtype: str = "float16") -> dict[str, object]:
    """What the README's blocks of code define, run in a folder with the stores that they read."""
    small = f"--teacher {teacher} --count 60 --holdout 20 --solver.steps 2 --samples-per-shard 32 --micro-batch 32"
    small = f"{small} --dtype {dtype}"
    for store in ("pairs", "pairs-tar --format webdataset"):
        assert main(COMMANDS, f"generate --runner local {small} --store {store}".split()) == 0
    names: dict[str, object] = {}
    for language in languages:
        for block in code_blocks(language):
            Path("block.py").write_text(block)
            names |= runpy.run_path("block.py", init_globals=names)
    return names


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_readmes_python_reads_our_shards(tmp_path, monkeypatch, dtype):
    monkeypatch.chdir(tmp_path)
    names = run_blocks("python", teacher="builtin:gaussian", dtype=dtype)
    assert names["x_T"].shape == names["x_0"].shape == (2,)
    assert names["output"].shape == (32, 2)
    assert names["noise"].shape == (20, 2)
    assert names["state"]["consumed"] == 100 * 256
    # The last sample of the tars and of the Parquet files, as numbers.
    whose = {"pairs-tar": ("train", names["x_0"], -1), "pairs": ("holdout", names["output"], slice(None))}
    for store, (split, found, rows) in whose.items():
        dataset = open_dataset(Store.open(store))
        shard = dataset.shards(split)[-1]
        expected = from_storage(dataset.read(shard, ["output"])["output"], dtype)[rows]
        assert found.dtype == (np.float16 if dtype == "float16" else np.float32)
        np.testing.assert_array_equal(found, expected)
    assert np.abs(names["noise"]).max() > 80  # of a VE process


@pytest.mark.faults
def test_ray_data_and_datasets_read_our_shards_as_the_readme_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_blocks("python", "py", teacher="builtin:digits")
    try:
        rows = {row["sample_id"]: row["output"] for row in names["samples"]}
        assert sorted(rows) == list(range(60))
        assert np.array(rows[7]).shape == (1, 8, 8)
        assert names["pairs"].count() == 60
    finally:
        names["ray"].shutdown()


@pytest.mark.parametrize(
    "package", ["limbeck.diffusion", "limbeck.storage_schemas", "limbeck.trainer.stream", "limbeck.trainer.fit"]
)
def test_the_trainer_needs_no_ray(package):
    program = f"import sys; sys.modules.update({{'ray': None, 'limbeck.pipeline': None}}); import {package}"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_importing_the_pipeline_does_not_import_ray():
    program = "import sys, limbeck.pipeline.__main__; sys.exit('ray' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_every_lower_bound_is_a_version_that_make_oldest_installs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = (project["optional-dependencies"][name] for name in ("pipeline", "trainer", "s3", "diffusers"))
    named = itertools.chain(project["dependencies"], *extras)
    bounds = {re.sub(r"\[.*]", "", each).replace(">=", " ") for each in named}
    pins = re.findall(r"^(.+)==(.+)$", (ROOT / "tests/oldest.txt").read_text(), flags=re.MULTILINE)
    oldest = {name: Version(version) for name, version in pins}
    assert {name: Version(version) for name, version in map(str.split, bounds)} == oldest


def test_the_shipped_models_are_small():
    weights = list(ROOT.glob("[a-z]*/**/builtin/*/model.safetensors"))
    assert len(weights) == 2
    assert all(path.stat().st_size < 3 * 10**6 for path in weights)
