"""A teacher that no solve could go on with ends in one line, before any work where its first call shows it."""

import json

import pytest

AT_THE_FIRST_CALL = {
    "exiting_at_the_first_call": "calls sys.exit(None): raise an exception there",
    "nan_weights": "answers what is not finite",
    "integers": "answers int64: return x_0 as a tensor of real numbers",
    "complex_numbers": "answers complex64",
    "no_tensor": "answers list",
    "more_channels": "answers [2, 4] for [2, 2]",
    "Changing": "changes x_t, which the solver goes on with",
}


@pytest.mark.parametrize("name", AT_THE_FIRST_CALL)
def test_the_first_call_refuses_what_it_shows(generate, tmp_path, name):
    code, out, err = generate(tmp_path / "s", teacher=f"python:strange_teachers:{name}")
    assert (code, out, err.count("\n")) == (1, "", 1), err
    assert err.startswith(f"limbeck: teacher python:strange_teachers:{name} ")
    assert AT_THE_FIRST_CALL[name] in err
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("command", ["generate", "calibrate"])
def test_a_factory_that_ends_the_program_is_told(pipeline, tmp_path, command):
    words = ["--store", tmp_path / "s", "--count", 8] if command == "generate" else ["--count", 8]
    code, _, err = pipeline(command, "--teacher", "python:strange_teachers:exit_at_once", "--runner", "local", *words)
    assert (code, err.count("\n"), "strange_teachers:exit_at_once calls sys.exit(0)" in err) == (2, 1, True), err


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.faults)])
def test_a_teacher_that_ends_the_program_later_fails_its_task(generate, tmp_path, workers):
    code, out, _ = generate(tmp_path, "--workers", workers, teacher="python:strange_teachers:exiting_teacher")
    assert (code, out.startswith("nothing sealed: 1 tasks are missing")) == (1, True), out
    (failure,) = tmp_path.glob("jobs/*/failures/*.json")
    assert "calls sys.exit(0)" in json.loads(failure.read_bytes())["error"]


@pytest.fixture
def clipped(tmp_path):
    """A pipeline as diffusers saves one by default."""
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,),
        norm_num_groups=4, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler()).save_pretrained(tmp_path / "pipeline")
    return f"diffusers:{tmp_path / 'pipeline'}"


def test_a_pipeline_that_clips_is_solved_only_where_the_user_says_so(clipped, generate, pipeline, tmp_path):
    few = ["--samples-per-shard", 8, "--micro-batch", 8, "--solver.name", "ddim", "--with-weights"]
    given = {"teacher": clipped, "count": 8, "holdout": 0}
    code, _, err = generate(tmp_path / "s", *few, **given)
    assert (code, err.count("\n"), "clip_sample: True" in err, "--ignore clip_sample" in err) == (2, 1, True, True), err
    assert generate(tmp_path / "s", *few, "--ignore", "clip_sample", **given)[0] == 0
    assert pipeline("verify", tmp_path / "s", "--audit", 2, "--teacher", clipped)[0] == 0, "the recipe stands for it"
    words = ["--teacher", clipped, "--runner", "local", "--count", 8, "--steps", 2, "--solvers", "ddim"]
    assert pipeline("calibrate", *words)[0] == 2
    assert pipeline("calibrate", *words, "--ignore", "clip_sample", "--reference-factor", 2)[0] != 2
