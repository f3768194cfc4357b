"""The same fit on one process and on many: started by the real torchrun, over gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

from limbeck.storage_schemas.errors import UsageError
from limbeck.trainer.options import ComputeConfig
from limbeck.trainer.planning.start import check_launch
from limbeck.trainer.ranks import LostRank, _report_once, alone, join_ranks
from limbeck.trainer.runs.trees import read_tree, write_tree
from tests.trainer.on_ranks import ROWS, run_case, student, tensors

REPOSITORY = Path(__file__).parents[2]
ALONE = alone(torch.device("cpu"))
ORDERS = [torch.randperm(ROWS, generator=torch.Generator().manual_seed(seed)).tolist() for seed in range(4)]
OBJECTIVES = ("knowledge", "progressive", "denoising")


Cases = dict[str, dict[str, Any]]


def on_ranks(folder: Path, number: int, cases: Cases, *, device: str = "cpu") -> Cases:
    """What the cases give on so many processes."""
    folder.mkdir(exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(number), "-m", "tests.trainer.on_ranks"]
    done = subprocess.run(
        [sys.executable, "-m", *command, str(folder / "cases.json"), str(folder / "told.pt"), device],
        cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "told.pt", weights_only=True)


def the_cases(folder: Path) -> Cases:
    """Each objective spread both ways, micro-batches, a second stage; and saving in the middle."""
    cases: Cases = {}
    for way, sharded in (("ddp", False), ("fsdp", True)):
        for objective in OBJECTIVES:
            cases[f"{way} {objective}"] = {"sharded": sharded, "objective": objective}
        cases[f"{way} micro"] = {"sharded": sharded, "options": {"micro_batch": 4}}
        cases[f"{way} stages"] = {"sharded": sharded, "restart": 3}
        cases[f"{way} no average"] = {"sharded": sharded, "options": {"ema": 0.0}, "restart": 3}
    cases["save"] = {"sharded": True, "save": str(folder), "save_at": 3}
    return cases


def check_whole(folder: Path) -> None:
    """What ranks wrote together, read by this process alone."""
    whole = read_tree(folder)["t"]
    assert whole.keys() == tensors().keys()
    for name, there in tensors().items():
        assert (whole[name].dtype, whole[name].shape) == (there.dtype, there.shape), name
        assert torch.equal(whole[name], there), name


def reference(case: dict[str, Any]) -> dict[str, Any]:
    """The case on this process alone."""
    return run_case({key: value for key, value in case.items() if key not in ("sharded", "save", "save_at")}, ALONE)


def rounding(case: dict[str, Any]) -> float:
    """What summing in another order changes, at most: the same rows in other orders, on one process.

    Relative to the largest loss or norm of the fit, or what was seen, or to the largest weight.
    """
    want = reference(case)
    return max(distance(reference({**case, "order": order}), want) for order in ORDERS)


def distance(found: dict[str, Any], want: dict[str, Any]) -> float:
    pairs = [(torch.tensor(found[name]), torch.tensor(want[name])) for name in ("losses", "norms", "seen")]
    for name in ("student", "served"):
        assert found[name].keys() == want[name].keys()
        pairs.append(tuple(torch.cat([one[name][key].flatten() for key in want[name]]) for one in (found, want)))
    return max(((here - there).abs().max() / there.abs().max()).item() for here, there in pairs if len(here))


def check_same(folder: Path, number: int) -> None:
    """Every case on so many ranks against one process, to 8 times what another order of one process's sums changes."""
    cases = the_cases(folder / "saved")
    trees = folder / "trees"
    trees.mkdir(parents=True)
    told = on_ranks(folder / "run", number, {**cases, "trees": {"write": str(trees), "read": [str(trees)]}})
    assert told["trees"]["wrong"] == []
    check_whole(trees)
    check_told(told["told"]["answers"], number)
    for name, case in cases.items():
        found, want, tolerance = told[name], reference(case), 8 * rounding(case)
        assert found["alike"], name
        assert min(want["norms"]) > 0.05  # so that every step is clipped
        assert 0 < tolerance < 2e-4, (name, tolerance)  # and the tolerance tells a wrong mean from a right one
        assert distance(found, want) <= tolerance, (name, distance(found, want), tolerance)
    whole = sum(parameter.numel() for parameter in student(0).parameters())
    assert whole / number <= told["fsdp knowledge"]["held"] <= 1.1 * whole / number


def check_told(answers: list[dict[str, Any]], number: int) -> None:
    everyone, first = [{"rank": rank} for rank in range(number)], {"rank": 0}
    total = sum(range(1, number + 1))
    same = {"gather": everyone, "broadcast": first, "found": 7, "any": (True, False)}
    figures = {"sum": total, "mean": total / number}
    assert answers == [{**same, **figures, "first": rank == 0} for rank in range(number)]


def test_two_ranks_fit_as_one_process_does(tmp_path):
    check_same(tmp_path, 2)


@pytest.mark.faults
@pytest.mark.parametrize("number", [1, 4])
def test_one_and_four_ranks_fit_as_one_process_does(tmp_path, number):
    check_same(tmp_path, number)


@pytest.mark.faults
@pytest.mark.parametrize(("sharded", "number", "others"), [(False, 4, (1, 2)), (True, 2, (1, 4))])
def test_a_checkpoint_goes_on_bit_for_bit_on_as_many_ranks_and_to_rounding_on_others(tmp_path, sharded, number, others):
    saving = {"sharded": sharded, "save": str(tmp_path / "saved"), "save_at": 3}
    whole = on_ranks(tmp_path / "whole", number, {"": saving})[""]
    going_on = {"sharded": sharded, "load": saving["save"], "seed": 5, "steps": (3, 6)}
    rest = {**whole, "losses": whole["losses"][3:], "norms": whole["norms"][3:]}
    for other, tolerance in [(number, 0.0), *((other, 8 * rounding(saving)) for other in others)]:
        found = on_ranks(tmp_path / f"on {other}", other, {"": going_on})[""]
        assert distance(found, rest) <= tolerance, other


@pytest.mark.faults
def test_shards_are_read_by_any_number_of_ranks_and_so_is_a_whole_tree(tmp_path):
    whole, by_four = tmp_path / "whole", tmp_path / "by four"
    for folder in (whole, by_four):
        folder.mkdir()
    write_tree({"t": tensors()}, whole)
    on_ranks(tmp_path / "four", 4, {"trees": {"write": str(by_four), "read": []}})
    names = [f"shard-{rank + 1:05d}-of-00004.safetensors" for rank in range(4)]
    assert sorted(path.name for path in by_four.iterdir()) == [*names, "tree.json"]
    check_whole(by_four)
    for number in (1, 2, 3, 4):
        told = on_ranks(tmp_path / f"on {number}", number, {"trees": {"read": [str(by_four), str(whole)]}})
        assert told["trees"]["wrong"] == [], number


@pytest.mark.faults
def test_an_overflow_on_one_rank_is_skipped_by_all(tmp_path):
    spoilt = {"options": {"autocast": "float16"}, "spoilt": {"2": ROWS - 1}}
    told = on_ranks(tmp_path, 2, {"ddp": spoilt, "fsdp": {**spoilt, "sharded": True}})
    want = reference(spoilt)["scales"]
    assert want[2] == want[1] / 2
    assert told["ddp"]["scales"] == told["fsdp"]["scales"] == want
    assert told["ddp"]["alike"]
    assert told["fsdp"]["alike"]


@pytest.mark.gpu
@pytest.mark.parametrize("network", ["residual_mlp", "diffusers_unet2d"])
@pytest.mark.parametrize("autocast", ["none", "bfloat16", "float16"])
def test_one_rank_on_a_gpu_fits_as_one_process_does(tmp_path, network, autocast):
    check_ways_on_a_device(tmp_path, "cuda", {"network": network, "options": {"autocast": autocast}, "steps": (0, 3)})


def check_ways_on_a_device(folder: Path, device: str, case: dict[str, Any]) -> None:
    """Both ways on one rank against the plain step, to 8 times what another order of its sums changes."""
    plain = {f"plain {i}": {**case, "plain": True, "order": order} for i, order in enumerate([None, *ORDERS])}
    cases = {**plain, "ddp": case, "fsdp": {**case, "sharded": True}}
    told = on_ranks(folder, 1, cases, device=device)
    want = told["plain 0"]
    tolerance = 8 * max(distance(told[name], want) for name in plain)
    assert 0 < tolerance < 0.2
    for way in ("ddp", "fsdp"):
        assert distance(told[way], want) <= tolerance, way
        assert told[way]["scales"] == want["scales"]


def test_restarts_that_may_hang_are_refused(monkeypatch):
    for name, value in {"WORLD_SIZE": 1, "LOCAL_RANK": 0, "MAX_RESTARTS": 3, "USE_AGENT_STORE": True}.items():
        monkeypatch.setenv(name if name in ("WORLD_SIZE", "LOCAL_RANK") else f"TORCHELASTIC_{name}", str(value))
    with pytest.raises(ValueError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"), join_ranks("cpu"):
        pass


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_to_be_spread_without_torchrun_is_refused(way):
    with pytest.raises(ValueError, match=f"parallel {way} spreads a fit over processes; start it by torchrun"):
        check_launch(ComputeConfig(parallel=way), ALONE, resume=True)


def test_an_error_is_told_once_and_a_lost_rank_where_nobody_has_said_why():
    store, lost = dist.HashStore(), RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    with pytest.raises(UsageError, match="wrong"), _report_once(store):
        raise UsageError("wrong")
    for error, code in [(UsageError("wrong"), 2), (lost, 1)]:
        with pytest.raises(SystemExit) as silent, _report_once(store):
            raise error
        assert silent.value.code == code
    with pytest.raises(UsageError, match="another"), _report_once(store):
        raise UsageError("another")
    killed = dist.HashStore()
    with pytest.raises(LostRank, match="was lost"), _report_once(killed):
        raise lost
    with pytest.raises(SystemExit), _report_once(killed):
        raise lost
    with pytest.raises(RuntimeError, match="our own"), _report_once(killed):
        raise RuntimeError("our own")
