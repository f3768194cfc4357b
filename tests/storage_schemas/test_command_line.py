"""Flags and YAML mean the same, flags win, and a mistake is one line."""

import io
import sys
from typing import Annotated, Literal

import pytest
import tyro
from pydantic import Field, model_validator

from limbeck.storage_schemas.command_line import Command, Config, Unprefixed, grouped, main, parse, ungrouped
from limbeck.storage_schemas.errors import StoreError, UsageError


class Solver(Config):
    """How to solve."""

    name: Literal["ddim", "heun"] = Field("heun", description="The solver.")
    steps: int = Field(16, gt=0, description="Steps of the grid.")


class Pace(Config):
    """How fast."""

    workers: int = Field(2, gt=0, description="Workers at a time.")
    low_power: bool = Field(False, description="Save power.")

    @model_validator(mode="after")
    def _low_power_is_one_worker(self):
        if self.low_power and self.workers > 1:
            raise ValueError(f"low_power is for 1 worker, not {self.workers}")
        return self


class Job(Config):
    """Do the job.

    At length.
    """

    store: tyro.conf.Positional[str] = Field(description="Where to.")
    states: tuple[int, ...] = Field((), description="Grid indices to keep.")
    solver: Solver = Solver()
    pace: Unprefixed[Pace] = Pace()
    with_weights: bool = Field(False, description="Keep the weights.")
    max_missing: int = Field(0, description="How many may be missing.")
    as_few: Annotated[int, tyro.conf.arg(name="few")] = Field(0, ge=0, description="How few may be there.")

    @model_validator(mode="after")
    def _states_are_on_the_grid(self):
        if self.states and max(self.states) > self.solver.steps:
            raise ValueError(f"state {max(self.states)} is past the {self.solver.steps} steps; leave it out")
        return self


class Adam(Config):
    """Update the weights."""

    beta1: float = Field(0.9, lt=1, description="The first beta.")


def read(*words):
    return parse(Job, words, program="python -m job")


@pytest.fixture
def yaml_file(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("states: [2, 4]\nsolver:\n  name: ddim\n  steps: 8\nwith_weights: true\nmax_missing: 3\n")
    return str(path)


def test_yaml_is_flags(yaml_file):
    flags = read(
        "s",
        "--states",
        "2",
        "4",
        "--solver.name",
        "ddim",
        "--solver.steps",
        "8",
        "--with-weights",
        "--max-missing",
        "3",
    )
    assert read("s", "--config", yaml_file) == flags == read(f"--config={yaml_file}", "s")


def test_the_options_of_an_unprefixed_group_have_their_own_names(tmp_path):
    (tmp_path / "job.yaml").write_text("workers: 1\nlow_power: true\n")
    job = read("s", "--workers", "1", "--low-power")
    assert job.pace == Pace(workers=1, low_power=True)
    assert read("s", "--config", str(tmp_path / "job.yaml")) == job
    flat = ungrouped(Job, dict(job))
    assert (flat["store"], flat["workers"], flat["solver"], "pace" in flat) == ("s", 1, Solver(), False)
    assert Job.model_validate(grouped(Job, flat)) == job


def test_flags_win_over_yaml(yaml_file):
    job = read(
        "s", "--config", yaml_file, "--states", "6", "--solver.steps=9", "--no-with-weights", "--max_missing", "1"
    )
    assert (job.states, job.solver, job.with_weights, job.max_missing) == ((6,), Solver(name="ddim", steps=9), False, 1)


def test_yaml_may_fill_a_place(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("store: here\nmax_missing: 3\n")
    assert read("--config", str(path)) == read("here", "--max-missing", "3")
    assert read("there", "--config", str(path)) == read("there", "--max-missing", "3")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["s", "--solver.nme", "heun"], "Unrecognized options: --solver.nme"),
        (["s", "--solver.name", "euler"], "--solver.name"),
        (["s", "--solver.steps", "0"], "--solver.steps: should be greater than 0, got 0"),
        (["s", "--solver.steps", "many"], "'many'"),
        (["s", "--workers", "0"], "--workers: should be greater than 0, got 0; python -m job --help"),
        (["s", "--low-power"], "low_power is for 1 worker, not 2; python -m job --help"),
        (["s", "--pace.workers", "1"], "Unrecognized options: --pace.workers"),
        (["s", "--few", "-1"], "--few: should be greater than or equal to 0, got -1; python -m job --help"),
        (["s", "--states", "20"], "state 20 is past the 16 steps; leave it out"),
        ([], "STR"),
        (["s", "--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_a_mistake_is_one_line(words, said):
    with pytest.raises(UsageError) as raised:
        read(*words)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
    assert "│" not in str(raised.value)


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "UTF-8"])
def test_a_mistake_is_told_the_same_whatever_stdout_can_draw(monkeypatch, encoding):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    with pytest.raises(UsageError) as error:
        read("s", "--states", "20")
    assert str(error.value) == "state 20 is past the 16 steps; leave it out; python -m job --help lists every option"


def test_a_refused_option_with_a_digit_in_its_name_is_named():
    with pytest.raises(UsageError, match=r"^--beta1: should be less than 1, got 2"):
        parse(Adam, ["--beta1", "2"], program="fit")


def test_an_unknown_yaml_field_is_refused(tmp_path):
    (tmp_path / "job.yaml").write_text("solver: {nme: heun}\n")
    with pytest.raises(UsageError, match=r"--solver\.nme"):
        read("s", "--config", str(tmp_path / "job.yaml"))


def succeed(job):
    return 0


def refuse(job):
    raise StoreError(f"{job.store}\nis no store")


JOBS = {"ok": Command(__name__, "Job", "succeed"), "no": Command(__name__, "Job", "refuse")}


def test_exit_codes(capsys):
    assert main(JOBS, ["ok", "s"]) == 0
    assert main(JOBS, ["no", "s"]) == 1
    assert capsys.readouterr().err == "limbeck: s is no store\n"
    assert main(JOBS, ["maybe"]) == 2
    assert capsys.readouterr().err == "limbeck: 'maybe' is no command of limbeck: use one of ok, no\n"
    assert main(JOBS, ["ok", "s", "--bogus"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    with pytest.raises(StoreError):
        main(JOBS, ["no", "s", "--debug"])


def test_help_lists_commands_and_fields(capsys):
    assert main(JOBS, ["--help"]) == 0
    assert "ok  Do the job." in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(JOBS, ["ok", "--help"])
    helped = capsys.readouterr().out
    assert "Steps of the grid." in helped
    assert "--config FILE.yaml" in helped
