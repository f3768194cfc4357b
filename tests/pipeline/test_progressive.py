"""Progressive distillation as a pipeline: each round's teacher is the student before it, whatever is killed when."""

import json
import signal
import sys
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from limbeck.diffusion.flow_map import FlowMap
from limbeck.diffusion.models import checkpoint
from limbeck.diffusion.models.checkpoint import pack
from limbeck.diffusion.models.spec import model_from_spec
from limbeck.diffusion.models.teachers import builtin_checkpoint
from limbeck.pipeline.config import GenerateConfig
from limbeck.pipeline.rounds import launch
from limbeck.pipeline.rounds.config import ProgressiveConfig
from limbeck.pipeline.rounds.launch import TrainerFailed
from limbeck.pipeline.rounds.plan import direct_of, rounds_of
from limbeck.pipeline.rounds.progressive import Progressive
from limbeck.pipeline.rounds.record import Record, only_run
from limbeck.storage_schemas.command_line import main, parse
from limbeck.storage_schemas.dataset import latest_number, open_dataset
from limbeck.storage_schemas.errors import UsageError, UserError
from limbeck.storage_schemas.program import COMMANDS
from limbeck.storage_schemas.store import Store
from tests.guided import told_digits
from tests.pipeline.exact_trainer import SPEC, ExactTrainer, sampled
from tests.pipeline.test_drain import wait_until

SMALL = ["--count", 64, "--holdout", 32, "--samples-per-shard", 32, "--micro-batch", 32, "--runner", "local"]
EXACT = ["--dtype", "float32", "--solve-dtype", "float64", "--steps", 8]
DEFECT = 0.01


@pytest.fixture
def progressive(pipeline, tmp_path):
    def run(*words, out="out", store="store", teacher="builtin:gaussian"):
        where = ["--teacher", teacher, "--store", tmp_path / store, "--out", tmp_path / out]
        return pipeline("progressive", *where, *SMALL, *EXACT, *words)

    return run


def record_of(folder):
    return json.loads((folder / "progressive.json").read_text())


def told(*words):
    given = ["--teacher", "builtin:digits", "--store", "s", "--out", "o", "--count", "100", *map(str, words)]
    return parse(ProgressiveConfig, given, program="progressive")


def ddim_line(times):
    """(A, B) with x_N = A x_T + B by the first teacher's ddim, and those of each of its steps."""
    steps = []
    for s, t in pairwise(times):
        gain = 0.25 / (0.25 + s**2)
        keep, pull = t / s, 1 - t / s
        steps.append((keep + pull * gain, pull * 0.5 * (1 - gain)))
    return steps


def after(first, second):
    return second[0] * first[0], second[0] * first[1] + second[1]


def test_errors_pile_up_from_student_to_student_as_the_recursion_says(progressive, tmp_path, monkeypatch):
    """Each student is its teacher's two steps and a defect in x_0, on which the next one builds: known to the end."""
    ExactTrainer(monkeypatch, defect=DEFECT)
    code, out, err = progressive()
    assert code == 0, err
    times = open_dataset(Store.open(str(tmp_path / "store")), "progressive-4").recipe.times
    assert [record_of(tmp_path / "out")["rounds"][n]["calls"] for n in ("4", "2", "1")] == [64 * 8, 64 * 4, 64 * 2]
    steps, teacher = ddim_line(times), (1.0, 0.0)
    for step in steps:
        teacher = after(teacher, step)
    for n in (4, 2, 1):
        times, coarse = times[::2], []
        for pair, s, t in zip(zip(steps[::2], steps[1::2], strict=True), times, times[1:], strict=False):
            gain, shift = after(*pair)
            coarse.append((gain, shift + (1 - t / s) * DEFECT))
        steps, whole = coarse, (1.0, 0.0)
        for step in steps:
            whole = after(whole, step)
        student = checkpoint.load(tmp_path / f"out/{n}-step/model")
        assert student.grids == {n: pytest.approx(times)}
        x_T = np.array([[80.0, -40.0], [3.0, 0.0]], dtype=np.float32)
        assert sampled(student, x_T, times) == pytest.approx(whole[0] * x_T + whole[1], abs=2e-5)
        found = record_of(tmp_path / "out")["rounds"][str(n)]
        error = expected_error(tmp_path / "store", whole, teacher)
        assert found["error"] == pytest.approx(error, rel=1e-2)
    assert error > 3 * DEFECT**2  # more than any one student's own
    assert f"{found['error']:.4g}" in out


def expected_error(store, student, teacher):
    dataset = open_dataset(Store.open(str(store)))
    noise = dataset.read(dataset.shards("holdout")[0])["noise"].astype(np.float64)
    return float(np.square((student[0] - teacher[0]) * noise + student[1] - teacher[1]).mean())


def test_a_round_solves_the_student_before_it_on_its_own_grid_and_keeps_it(
    progressive, pipeline, tmp_path, monkeypatch
):
    ExactTrainer(monkeypatch)
    assert progressive()[0] == 0
    store = Store.open(str(tmp_path / "store"))
    record, seeds = record_of(tmp_path / "out"), set()
    for n, before in ((2, 4), (1, 2)):
        recipe = open_dataset(store, f"progressive-{n}").recipe
        promoted = checkpoint.load(tmp_path / f"out/{before}-step/model")
        assert recipe.teacher.weights_sha256 == promoted.weights_sha256 == record["rounds"][str(before)]["student"]
        assert recipe.times == promoted.grids[before]
        assert recipe.solver.grid == {"name": "own"}
        assert recipe.states == tuple(range(before + 1))
        assert store.read(f"recipes/{recipe.id}/teacher/model.safetensors") == promoted.weights
        seeds.add(recipe.noise.seed)
    assert seeds == {2, 3}
    code, out, _ = pipeline("verify", tmp_path / "store", "--dataset", "progressive-1", "--audit", 32)
    assert code == 0, out
    assert "against its own steps" in out


def test_the_lineage_leads_from_a_student_to_the_first_teacher_and_says_what_is_lost(
    progressive, pipeline, tmp_path, monkeypatch
):
    ExactTrainer(monkeypatch)
    progressive()
    record, store = record_of(tmp_path / "out"), tmp_path / "store"
    words = ["inspect", store, "--lineage", "--json", "--student", tmp_path / "out/1-step/model"]
    links = json.loads(pipeline(*words)[1])
    models, data = links[::2], links[1::2]
    promoted = [record["rounds"][n]["student"] for n in ("1", "2", "4")]
    first = checkpoint.Checkpoint({}, b"").weights_sha256
    assert [link["weights_sha256"] for link in models] == [*promoted, first]
    assert [link["recipe"] for link in data] == [record["rounds"][n]["recipe"] for n in ("1", "2", "4")]
    assert [link["dataset"] for link in data] == ["progressive-1", "progressive-2", "progressive-4"]
    assert models[-1]["uri"] == "builtin:gaussian"
    from_data = json.loads(pipeline("inspect", store, "--lineage", "--json", "--dataset", "progressive-1")[1])
    assert from_data == links[1:]
    (store / "recipes" / data[1]["recipe"] / "teacher/model.json").unlink()
    lines = pipeline("inspect", store, "--lineage", "--dataset", "progressive-1")[1].splitlines()
    assert [line.startswith(" ") for line in lines] == [True, False, True, False]
    assert "not kept: generate --with-weights" in lines[-1]
    (store / "recipes" / data[1]["recipe"] / "recipe.json").unlink()
    assert "the recipe is not in this store" in pipeline(*words[:3], *words[4:])[1].splitlines()[-1]


@pytest.mark.parametrize("killed", ["fit 2-step", "fitted 2-step", "evaluate 2-step"])
def test_a_run_that_is_killed_goes_on_in_that_round_and_does_nothing_twice(progressive, tmp_path, monkeypatch, killed):
    trainer = ExactTrainer(monkeypatch, killed=killed)
    with pytest.raises(SystemExit):
        progressive()
    assert set(record_of(tmp_path / "out")["rounds"]) == {"4", "2"}
    assert progressive()[0] == 0
    twice = {"fit 2-step": 1, "fitted 2-step": 2, "evaluate 2-step": 1}[killed]
    assert [trainer.log.count(f"fit {n}-step") for n in (4, 2, 1)] == [1, 1 + (killed != "evaluate 2-step"), 1]
    assert [trainer.log.count(f"fitted {n}-step") for n in (4, 2, 1)] == [1, twice, 1]
    assert trainer.log.count("evaluate 4-step") == 1
    store = Store.open(str(tmp_path / "store"))
    assert [latest_number(store, name) for name in ("main", "progressive-4", "progressive-2", "progressive-1")] == [
        1
    ] * 4
    done = list(trainer.log)
    assert progressive()[0] == 0
    assert trainer.log == done


def test_changed_settings_and_changed_students_are_refused_in_one_line(progressive, tmp_path, monkeypatch):
    ExactTrainer(monkeypatch)
    progressive("--fit.lr", "1e-3")
    for words, line in (
        (["--fit.lr", "1e-4"], "holds rounds with fit.lr 1e-3, not 1e-4: choose another --out"),
        ([], "holds rounds with fit.lr 1e-3, not unset"),
        (["--fit.lr", "1e-3", "--seed", 1], "holds rounds with seed 0, not 1"),
    ):
        code, _, err = progressive(*words)
        assert (code, line in err) == (2, True), err
    how = ["--fit.threads", 1, "--threads", 2, "--workers", 2]
    assert progressive("--fit.lr", "1e-3", *how)[0] == 0
    checkpoint.save(checkpoint.load(tmp_path / "out/1-step/model"), tmp_path / "out/2-step/model")
    code, _, err = progressive("--fit.lr", "1e-3")
    assert (code, "2-step/model is not the student that was promoted" in err) == (1, True), err


def test_before_a_student_is_promoted_what_was_told_wrong_is_told_anew(progressive, monkeypatch):
    trainer = ExactTrainer(monkeypatch, killed="fit 4-step")
    code, _, err = progressive("--start", "data:no:where")
    assert (code, "image source 'no:where' is unknown" in err) == (2, True), err
    with pytest.raises(SystemExit):
        progressive("--fit.stpes", 10)
    assert "seed 0, not 1" in progressive("--seed", 1)[2]
    trainer.killed = "fit 2-step"
    with pytest.raises(SystemExit):
        progressive("--fit.steps", 10)
    assert "fit.steps 10, not 20" in progressive("--fit.steps", 20)[2]
    assert progressive("--fit.steps", 10)[0] == 0


def test_recipes_name_students_so_their_folder_keeps_its_name_until_all_are_done(progressive, tmp_path, monkeypatch):
    ExactTrainer(monkeypatch, killed="fitted 2-step")
    with pytest.raises(SystemExit):
        progressive()
    (tmp_path / "out").rename(tmp_path / "moved")
    code, _, err = progressive(out="moved")
    assert (code, f"run it in the same folder with --out {tmp_path}/out" in err) == (2, True), err
    (tmp_path / "moved").rename(tmp_path / "out")
    assert progressive()[0] == 0
    (tmp_path / "out").rename(tmp_path / "moved")
    assert progressive(out="moved")[0] == 0
    code, _, err = progressive(out="second")
    assert (code, "progressive-2" in err, "choose another --dataset" in err) == (2, True, True), err
    assert progressive("--dataset", "others", out="second")[0] == 0


@pytest.mark.parametrize(
    ("teacher", "words", "line"),
    [
        ("builtin:gaussian", [], "/store has teacher "),
        ("builtin:digits", ["--guidance", 2], "has guidance 1, errors are measured at 2: give another --reference"),
        ("builtin:digits", ["--condition", "none"], "has condition uniform_labels, errors are measured at none"),
        ("builtin:digits", ["--solver.r-max", 40], "has first time 80.0, errors are measured at 40.0"),
    ],
)
def test_a_reference_that_is_no_measure_is_refused(progressive, digits_store, teacher, words, line):
    code, _, err = progressive(*words, teacher=teacher)
    assert (code, line in err) == (2, True), err


@pytest.fixture(scope="module")
def small_store(tmp_path_factory):
    """32 samples of digits, which nothing here adds to."""
    store = tmp_path_factory.mktemp("digits") / "store"
    words = ["--teacher", "builtin:digits", "--store", store, "--solver.steps", 2, *SMALL, "--count", 32]
    assert main(COMMANDS, [str(word) for word in ["generate", *words]]) == 0
    return store


@pytest.fixture
def digits_store(small_store, tmp_path):
    (tmp_path / "store").symlink_to(small_store)


def test_direct_progressive_learns_of_the_first_teacher_alone_and_goes_on_after_a_kill(
    progressive, tmp_path, monkeypatch
):
    trainer = ExactTrainer(monkeypatch, killed="fitted direct")
    with pytest.raises(SystemExit):
        progressive("--compare-direct")
    code, out, _ = progressive()
    assert (code, "direct" in out) == (0, False)  # of a comparison that was stopped nothing is told
    assert progressive("--compare-direct", "--json")[0] == 0
    direct = record_of(tmp_path / "out")["direct"]
    recipe = open_dataset(Store.open(str(tmp_path / "store")), "progressive-direct").recipe
    assert (recipe.teacher.uri, recipe.num_steps, direct["calls"]) == ("builtin:gaussian", 8, 112 * 8)
    assert direct["errors"].keys() == {"4", "2", "1"}
    assert direct["errors"]["4"] < 1e-8 < direct["errors"]["2"]  # a step is a line, and so its student is exact
    assert "direct" in progressive("--compare-direct")[1]
    assert trainer.log[-2:] == ["fitted direct", "evaluate direct"]


def test_the_plan_of_rounds_follows_from_the_options():
    config = told("--steps", 16, "--guidance", 2, "--fit.steps", 10, "--fit.init", "scratch", "--fit.ema", 0.9)
    rounds = rounds_of(config)
    assert [part.steps for part in rounds] == [8, 4, 2, 1]
    # The students of a guided teacher are guided already, but for those that are told at which scale.
    assert [part.data.guidance for part in rounds] == [(2.0,), (1.0,), (1.0,), (1.0,)]
    assert [part.data.guidance for part in rounds_of(config, takes_guidance=True)] == [(2.0,)] * 4
    direct = direct_of(config, count=7)
    assert (direct.data.count, direct.data.guidance) == (7, (2.0,))
    assert direct.fit[-8:] == ("--init", "scratch", "--out", "o/direct", "--steps", "10", "--ema", "0.9")
    assert ["--init" in part.fit and part.fit[part.fit.index("--init") + 1] for part in rounds] == [
        "scratch", "teacher", "teacher", "teacher"
    ]  # fmt: skip
    same = rounds_of(told("--steps", 4, "--no-fresh-noise", "--seed", 5))
    assert [part.data.seed for part in same] == [5, 5]
    places = rounds_of(told("--steps", 4, "--fit.checkpoints", "s3://b/c/"))
    assert [part.fit[part.fit.index("--checkpoints") + 1] for part in places] == ["s3://b/c/2-step", "s3://b/c/1-step"]


class ToldTrainer:
    """Whatever is fitted becomes `student`, at half the steps."""

    def __init__(self, monkeypatch, student):
        self.student = student
        monkeypatch.setattr("limbeck.pipeline.rounds.launch.fit", self.fit)
        monkeypatch.setattr("limbeck.pipeline.rounds.launch.evaluate", self.evaluate)

    def fit(self, config, part, *, lock):
        times = open_dataset(Store.open(part.data.store), part.data.dataset).recipe.times
        checkpoint.save(replace(self.student, grids={part.steps: times[::2]}), part.student)

    def evaluate(self, words):
        (steps,) = checkpoint.load(f"{words[0]}/model").grids
        return {
            "rows": [{"kind": "student", "name": words[0], "steps": steps, "holdout_error": 0.0}],
            "output_variance": 1.0,
        }


@pytest.mark.parametrize("teacher_is_told", [False, True])
def test_students_that_are_told_their_guidance_are_solved_at_it_in_one_call_a_step(
    progressive, tmp_path, monkeypatch, teacher_is_told
):
    ToldTrainer(monkeypatch, told_digits())
    checkpoint.save(told_digits(), tmp_path / "teacher")
    teacher = str(tmp_path / "teacher") if teacher_is_told else "builtin:digits"
    code, _, err = progressive("--schedule", 4, 2, "--guidance", 3, teacher=teacher)
    assert code == 0, err
    found = record_of(tmp_path / "out")["rounds"]
    assert [found[steps]["calls"] for steps in ("4", "2")] == [64 * (8 if teacher_is_told else 16), 64 * 4]
    dataset = open_dataset(Store.open(str(tmp_path / "store")), "progressive-2")
    columns, student = dataset.read(dataset.shards("train")[0]), FlowMap(told_digits().build())
    x_T, labels = torch.from_numpy(columns["noise"]), torch.from_numpy(columns["condition"])
    times = torch.tensor(dataset.recipe.times, dtype=torch.float64)
    with torch.no_grad():
        own, plain = (student.sample(x_T, times, labels, guidance=torch.tensor(w).double()).numpy() for w in (3, 1))
    assert columns["output"] == pytest.approx(own, abs=1e-3)
    assert np.abs(columns["output"] - plain).max() > 0.01


@pytest.mark.parametrize(
    ("words", "is_told", "each"), [([], False, 16), (["--guidance", 2], False, 32), (["--guidance", 2], True, 16)]
)
def test_direct_progressive_is_given_as_many_calls_as_the_rounds_took(tmp_path, words, is_told, each):
    checkpoint.save(told_digits(), tmp_path / "teacher")
    teacher = str(tmp_path / "teacher") if is_told else "builtin:digits"
    config = told("--steps", 16, "--out", tmp_path, *words).model_copy(update={"teacher": teacher})
    record = Record(config)
    for steps, calls in zip(config.schedule, (3200, 800, 400, 200), strict=True):
        record.note_round(steps, calls=calls)
    assert Progressive(config, record, 0).direct().data.count == round(4600 / each)


def test_options_of_the_trainer_come_from_flags_and_yaml_alike(tmp_path):
    (tmp_path / "rounds.yaml").write_text("fit:\n  steps: 100\n  keep_best: false\n  network: {dropout: 0.1}\n")
    config = told("--config", tmp_path / "rounds.yaml", "--fit.steps", 50, "--fit.lr=1e-3", "--seed", 1)
    assert config.fit_options == {"steps": ("50",), "lr": ("1e-3",), "no-keep-best": (), "network.dropout": ("0.1",)}
    assert config.seed == 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--steps", 6], None),
        (["--steps", 7], "does not halve 7 steps"),
        (["--steps", 8, "--schedule", 4, 1], "does not halve 8 steps"),
        (["--steps", 8, "--schedule", 2, 1], "does not halve 8 steps"),
        (["--fit", "steps"], "fit 'steps' is no option"),
        (["--fit.", "5"], "fit. is no option"),
        (["--fit.config", "x.yaml"], "fit.config is a file that may change"),
        (["--steps", 4, "--seed", 2**63 - 2], "leaves no seed"),
        (["--fit.out", "x"], "fit.out is what progressive itself says"),
        (["--fit.no-resume"], "fit.no-resume is what progressive itself says"),
        (["--guidance", 1, 2], "give one scale"),
        (["--holdout", 1], "give 2 samples or more"),
        (["--store", "memory://x", "--runner", "local"], "the trainer is another"),
    ],
)
def test_what_can_not_be_meant_is_refused(words, line):
    if line is None:
        assert told(*words).schedule == (3,)
        return
    with pytest.raises(UsageError, match=line):
        told(*words)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--solver.steps", 2, "--states", 1], "has no own grid of 2 steps, it serves 4: choose another"),
        (["--solver.rho", 7], "the own grid has no rho (given 7.0): leave it out"),
    ],
)
def test_a_grid_that_a_student_does_not_serve_is_refused(generate, tmp_path, words, line):
    grids = {4: (80.0, 3.0, 1.0, 0.1, 0.0)}
    checkpoint.save(checkpoint.Checkpoint(SPEC, pack(model_from_spec(SPEC)), grids), tmp_path / "student")
    code, _, err = generate(tmp_path, "--solver.grid", "own", *words, teacher=str(tmp_path / "student"))
    assert (code, line in err) == (2, True), err


def test_workers_take_the_weights_that_the_store_keeps(generate, tmp_path, monkeypatch, hashes):
    """As on another machine: the driver's folder is not there."""
    checkpoint.save(builtin_checkpoint("digits"), tmp_path / "teacher")
    monkeypatch.setattr(
        "limbeck.diffusion.recipes.teacher.load_teacher", lambda *given, **named: pytest.fail("the uri was asked")
    )
    given = {"teacher": str(tmp_path / "teacher"), "count": 64, "holdout": 0}
    assert generate(tmp_path / "kept", "--with-weights", **given)[0] == 0
    monkeypatch.undo()
    assert generate(tmp_path / "plain", **given)[0] == 0
    assert hashes(tmp_path / "kept") == hashes(tmp_path / "plain")


TRAINER = """
import os, pathlib, signal, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(parents=True)
def end(number, frame):
    time.sleep(0.5)
    (out / "saved").touch()
    os._exit(143)
signal.signal(signal.SIGTERM, end)
(out / "begun").touch()
time.sleep(60)
"""


@pytest.mark.faults
@pytest.mark.skipif(sys.platform != "linux", reason="nobody else tells a child of its parent's death")
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGTERM])
def test_a_trainer_is_told_to_end_and_waited_for_when_its_driver_dies(start, tmp_path, blow):
    (tmp_path / "trainer.py").write_text(TRAINER)
    out = tmp_path / "out"
    launched = ["--launch", f"python {tmp_path / 'trainer.py'}"]
    where = ["--teacher", "builtin:gaussian", "--store", tmp_path / "store", "--out", out]
    driver = start("progressive", *where, *SMALL, *EXACT, *launched)
    wait_until((out / "4-step/begun").exists)
    driver.send_signal(blow)
    said, _ = driver.communicate(timeout=60)
    if blow == signal.SIGTERM:
        assert (out / "4-step/saved").exists()
        assert driver.returncode == 143
        assert "stopped by SIGTERM: what is done is kept" in said
    with only_run(out):  # free once the trainer has ended
        assert (out / "4-step/saved").exists()


def test_a_folder_is_one_run_s_at_a_time(tmp_path):
    with (
        only_run(tmp_path),
        pytest.raises(UsageError, match="another run is still at work"),
        only_run(tmp_path, patience=0),
    ):
        pass


@pytest.mark.parametrize(
    ("trainer", "line"),
    [
        ("raise SystemExit(7)", "4-step: the trainer ended with exit code 7; the same command goes on there"),
        (
            "import os; os.kill(os.getpid(), 9)",
            "4-step: the trainer was ended by SIGKILL; the same command goes on there",
        ),
        ("raise SystemExit(2)", "4-step: the trainer ended with exit code 2; mend --fit"),
        ("", "the trainer has ended, but there is no o/4-step/model"),
        (None, "no-such-launcher can't be started"),
    ],
)
def test_a_trainer_that_fails_is_told_in_one_line(tmp_path, trainer, line):
    (tmp_path / "trainer.py").write_text(trainer or "")
    config = told("--steps", 8, "--launch", "no-such-launcher" if trainer is None else f"python {tmp_path}/trainer.py")
    with open(tmp_path / "lock", "w") as lock, pytest.raises(UserError, match=line):
        launch.fit(config, rounds_of(config)[0], lock=lock.fileno())


class JobServer:
    """Ray's, to the extent that is asked of it: a job is done as soon as it is known."""

    def __init__(self, student):
        self.student, self.jobs = student, {}

    def submit_job(self, *, entrypoint, submission_id, runtime_env):
        if submission_id in self.jobs:
            raise RuntimeError(f"{submission_id} already exists")
        self.jobs[submission_id] = entrypoint
        self.student.mkdir(parents=True)
        (self.student / "model.json").touch()

    def get_job_info(self, job_id):
        return SimpleNamespace(status="SUCCEEDED", driver_exit_code=0)

    def get_job_logs(self, job_id):
        return "fitted\n"


def test_a_fit_as_a_ray_job_is_submitted_once_and_found_again(tmp_path, monkeypatch, capsys):
    config = told("--steps", 8, "--out", tmp_path, "--launch", "ray-job torchrun -m limbeck.trainer", "--fit.steps", 9)
    part = rounds_of(config)[0]
    server = JobServer(part.student)
    monkeypatch.setattr("limbeck.pipeline.workers.ray_runner.job_client", lambda dashboard: server)
    for _ in range(2):
        launch.fit(config, part, lock=0)
    ((name, entrypoint),) = server.jobs.items()
    assert name.startswith("limbeck-progressive-4-")
    assert entrypoint.startswith(
        "torchrun -m limbeck.trainer fit --data s --dataset progressive-4 --objective.name progressive"
    )
    assert "fitted" in capsys.readouterr().err
    (part.student / "model.json").unlink()
    with pytest.raises(TrainerFailed, match=f"`ray job delete {name}` if it was removed since"):
        launch.fit(config, part, lock=0)


def test_what_is_measured_here_does_not_run_on_a_device_of_the_cluster(tmp_path):
    assert launch.device_of(told("--fit.device", "cuda:1")) == ["--device", "cuda:1"]
    assert launch.device_of(told("--fit.device", "cuda:1", "--launch", "ray-job")) == []


def test_generate_configs_of_rounds_are_those_that_generate_takes():
    """Whatever is shared goes over; a later option can't be forgotten silently."""
    config = told("--steps", 4, "--tf32", "--format", "webdataset", "--max-missing", 3, "--ray.num-cpus", 2)
    data = rounds_of(config)[1].data
    assert isinstance(data, GenerateConfig)
    assert (data.tf32, data.format, data.max_missing, data.ray.num_cpus, data.with_weights) == (
        True, "webdataset", 3, 2.0, True
    )  # fmt: skip
