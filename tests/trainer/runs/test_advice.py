import json

import pytest

from limbeck.trainer.runs.advice import advice, advice_of


@pytest.mark.parametrize(
    ("train", "holdout", "earlier", "told"),
    [
        (0.0045, 0.0197, 0.02, "wants more pairs"),
        (0.0045, 0.0197, None, "wants more pairs"),
        (0.0100, 0.0126, 0.05, "wants more pairs"),
        (0.0100, 0.0124, 0.05, "falling yet"),
        (0.0100, 0.0100, 0.0104, "or a larger student"),
        (0.0100, 0.0100, None, "or a larger student"),
        (0.0, 0.0, 0.0, "or a larger student"),
    ],
)
def test_what_would_lower_the_error(train, holdout, earlier, told):
    line = advice(train_error=train, holdout_error=holdout, earlier=earlier)
    assert told in line
    assert f"{holdout:.4g} against {train:.4g}" in line
    assert "\n" not in line
    assert line.count(". ") == 1  # two sentences


def lines(*figures):
    return "".join(json.dumps(dict(zip(("step", "stage", "holdout_error", "train_error"), each, strict=False))) + "\n"
                   for each in figures)  # fmt: skip


def test_a_runs_last_stage_is_judged_by_its_own_steps(tmp_path):
    # Stage b is steps 101 to 200: its error at 180 is the last with a fifth to come; 0.1 was the other stage's.
    (tmp_path / "metrics.jsonl").write_text(
        lines((100, "a", 0.1), (150, "b", 0.2), (180, "b", 0.02), (190, "b", 0.0101), (200, "b", 0.01, 0.01))
    )
    assert "falling yet" in advice_of(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(
        lines((100, "a", 0.1), (150, "b", 0.2), (180, "b", 0.0102), (190, "b", 0.2), (200, "b", 0.01, 0.01))
    )
    assert "or a larger student" in advice_of(tmp_path)


@pytest.mark.parametrize("text", [None, "", lines((100, "a", 0.1)), lines((100, "a", 0.1, 0.1), (150, "b", 0.1))])
def test_a_run_that_was_not_measured_to_its_end_is_not_judged(tmp_path, text):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    assert advice_of(tmp_path) is None
