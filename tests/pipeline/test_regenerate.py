"""`regenerate` moves the window by its policy, once a tick, however its runs overlap."""

import json
import threading
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from limbeck.pipeline.config import RegenerateConfig
from limbeck.pipeline.generate import carry_out
from limbeck.pipeline.regenerate import decide
from limbeck.pipeline.windows import Nothing, Wanted
from limbeck.storage_schemas.dataset import latest_manifest, latest_number, read_manifest
from limbeck.storage_schemas.errors import UsageError
from limbeck.storage_schemas.store import Store
from tests.pipeline.handmade import LAYOUT, OTHER, RECIPE, SIZE, Stepper, check_served, new_run, solve_by_hand
from tests.pipeline.test_plan import manifest

NOW = datetime(2026, 11, 22, 3, tzinfo=UTC)


@pytest.fixture(autouse=True)
def by_hand(request, monkeypatch):
    """Drivers of stores by hand solve by hand."""
    if "command" not in request.node.name:
        monkeypatch.setattr("limbeck.pipeline.generate.solve_missing", solve_by_hand)


@pytest.fixture
def uri(tmp_path):
    Store.create(str(tmp_path / "store"))
    return str(tmp_path / "store")


def config(**options):
    given = {"teacher": "builtin:gaussian", "store": "s", "count": 40, "holdout": 0}
    return RegenerateConfig(**given | {"samples_per_shard": SIZE, "micro_batch": SIZE} | options)


def regenerate(store, *, recipe=RECIPE, now=NOW, count=40, **options):
    wish = config(count=count, **options)
    aim = lambda parent, recipe_id: decide(wish, parent, recipe_id, now)  # noqa: E731
    return carry_out(new_run(store, count, recipe=recipe), aim, wish.policy)


def window(store):
    return latest_manifest(store, "main").window.train


def test_each_policy_moves_the_window_in_its_way(uri):
    store = Store(uri)
    assert regenerate(store, policy="refresh").what == "sealed"
    assert window(store) == (0, 40), "nobody had begun it"
    regenerate(store, policy="refresh", refresh=0.1)
    assert window(store) == (4, 44)
    assert regenerate(store, policy="grow").what == "nothing"
    regenerate(store, policy="grow", count=50)
    assert window(store) == (4, 54)
    regenerate(store, policy="grow", count=50, grow_by=6)
    assert window(store) == (4, 60)
    outcome = regenerate(store, policy="recipe")
    assert (outcome.what, outcome.why, latest_number(store, "main")) == ("nothing", "the recipe is the same", 4)
    assert regenerate(store, policy="recipe", recipe=OTHER).what == "sealed"
    assert (window(store), latest_manifest(store, "main").recipe_id) == ((0, 40), OTHER.id)
    check_served(store)


@pytest.mark.parametrize("policy", ["grow", "refresh"])
def test_a_changed_recipe_is_for_its_own_policy(uri, policy):
    store = Store(uri)
    regenerate(store)
    with pytest.raises(UsageError, match=r"holds another recipe: noise.seed 0, you ask for 1; .* --policy recipe"):
        regenerate(store, policy=policy, recipe=OTHER, tick="2026-11-22")


def test_a_tick_is_served_once(uri):
    store = Store(uri)
    assert regenerate(store, tick="2026-11-22T03").manifest.ticks == {"refresh": "2026-11-22T03"}
    outcome = regenerate(store, tick="2026-11-22T03")
    assert (outcome.what, outcome.exit_code) == ("nothing", 0)
    assert outcome.why == "tick 2026-11-22T03 is served: refresh has served 2026-11-22T03 by now"
    assert regenerate(store, tick="2026-11-22T02").what == "nothing"
    assert regenerate(store, tick="2026-11-22T04").what == "sealed"
    # Another policy's schedule has ticks of its own, and both are carried on.
    assert regenerate(store, policy="grow", grow_by=4, tick="2026-11-22T03").what == "sealed"
    assert latest_manifest(store, "main").ticks == {"refresh": "2026-11-22T04", "grow": "2026-11-22T03"}
    with pytest.raises(UsageError, match="tick 9 is not written like the last one, 2026-11-22T04"):
        regenerate(store, tick="9")


def test_nothing_happens_while_the_window_is_young(uri):
    store = Store(uri)
    regenerate(store)
    changed = datetime.fromisoformat(latest_manifest(store, "main").train_changed_at)
    for policy in ("grow", "refresh"):
        young = regenerate(store, policy=policy, count=44, max_age="20h", now=changed + timedelta(hours=19))
        assert (young.what, young.why[:24]) == ("nothing", "the train window changed")
    assert regenerate(store, max_age="20h", now=changed + timedelta(hours=20)).what == "sealed"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_age": "7 days"}, "no length of time"),
        ({"max_age": "1.5h"}, "no length of time"),
        ({"tick": "a b"}, "tick"),
        ({"grow_by": 3}, "grow-by 3 needs --policy grow"),
        ({"policy": "recipe", "max_age": "7d"}, "max-age is for"),
        ({"new_recipe": True}, "new-recipe is for generate"),
    ],
)
def test_what_can_not_be_meant_is_refused(options, told):
    with pytest.raises(ValueError, match=told):
        config(**options)


# Overlaps. Each run in turns with another, and all at once.


def grows(store):
    return regenerate(store, policy="grow", grow_by=8, tick="2026-11-23")


def refreshes(store):
    return regenerate(store, policy="refresh", refresh=0.2, tick="2026-11-23")


@pytest.mark.parametrize(
    ("first", "second"), [(grows, refreshes), pytest.param(refreshes, grows, marks=pytest.mark.faults)]
)
def test_a_grow_and_a_refresh_at_once_both_happen(uri, first, second):
    """The second runs whole after each number of store operations of the first."""
    for steps in range(1, 40):
        place = f"{uri}-{steps}"
        store = Store.create(place)
        regenerate(store)
        one = Stepper(place, first)
        unfinished = one.advance(steps)
        assert second(Store(place)).what == "sealed"
        assert one.finish().what == "sealed"
        start, stop = window(store)
        assert (start in (8, 10), stop - start) == (True, 48)
        assert latest_manifest(store, "main").ticks == {"grow": "2026-11-23", "refresh": "2026-11-23"}
        assert latest_number(store, "main") == 3
        if not unfinished:
            break
    assert steps > 10
    check_served(store)


def test_what_a_refresh_has_solved_it_keeps_when_it_plans_again(uri, monkeypatch):
    store = Store(uri)
    regenerate(store)
    solved = []

    def beaten(run, tasks):
        solved.append([task.index for task in tasks])
        solve_by_hand(run, tasks)
        if len(solved) == 1:
            monkeypatch.setattr("limbeck.pipeline.generate.solve_missing", solve_by_hand)
            regenerate(store, policy="grow", count=42)
            monkeypatch.setattr("limbeck.pipeline.generate.solve_missing", beaten)

    monkeypatch.setattr("limbeck.pipeline.generate.solve_missing", beaten)
    regenerate(store, refresh=0.2)
    # [0, 40) -> [8, 48) was solved when [0, 42) was there: [8, 50) lacks but one task more.
    assert (window(store), solved) == ((8, 50), [[10, 11], [12]])


def at_once(*acts):
    """Each in a thread, all begun together."""
    barrier, found = threading.Barrier(len(acts)), []

    def run(act):
        barrier.wait()
        found.append(act())

    threads = [threading.Thread(target=run, args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(acts)
    return sorted(outcome.what for outcome in found)


def test_a_grow_and_a_refresh_truly_at_once(uri):
    store = Store(uri)
    regenerate(store)
    assert at_once(lambda: grows(Store(uri)), lambda: refreshes(Store(uri))) == ["sealed", "sealed"]
    start, stop = window(store)
    assert (start in (8, 10), stop - start) == (True, 48)
    check_served(store)


def test_one_tick_three_times_at_once_moves_the_window_once(uri):
    store = Store(uri)
    regenerate(store)
    told = at_once(*[lambda: regenerate(Store(uri), tick="2026-11-23") for _ in range(3)])
    assert told == ["nothing", "nothing", "sealed"]
    assert (window(store), latest_number(store, "main")) == ((4, 44), 2)


def test_five_missed_ticks_at_once(uri):
    """The last is served, each moves the window once at the most, and none that comes late moves it."""
    store = Store(uri)
    regenerate(store)
    ticks = [f"2026-11-2{day}" for day in range(3, 8)]
    told = at_once(*[lambda tick=tick: regenerate(Store(uri), tick=tick) for tick in reversed(ticks)])
    slides = told.count("sealed")
    assert (1 <= slides <= 5, window(store)) == (True, (4 * slides, 40 + 4 * slides))
    sealed = [read_manifest(store, "main", number).ticks["refresh"] for number in range(2, slides + 2)]
    assert (sealed, sealed[-1]) == (sorted(set(sealed)), ticks[-1])
    assert all(regenerate(store, tick=tick).what == "nothing" for tick in ticks)
    check_served(store)


ACTS = st.lists(
    st.tuples(
        st.sampled_from(["grow", "refresh", "recipe"]),
        st.integers(1, 60),
        st.integers(0, 9),
        st.sampled_from([None, *(f"2026-{month:02d}" for month in range(1, 7))]),
        st.booleans(),
    ),
    max_size=30,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ACTS)
def test_windows_never_move_back(acts):
    """Any sequence of policies: starts and stops only rise within a recipe, sizes follow, no tick is served twice."""
    parent = None
    for policy, count, extra, tick, other in acts:
        recipe_id = (OTHER if other else RECIPE).id
        if parent and policy != "recipe" and parent.recipe_id != recipe_id:
            recipe_id = parent.recipe_id  # any other is refused before it is asked
        options = {"grow_by": extra} if policy == "grow" else {}
        wanted = decide(
            config(policy=policy, count=count, refresh=0.1 + extra / 10, tick=tick, **options), parent, recipe_id, NOW
        )
        served = parent.ticks.get(policy) if parent else None
        if isinstance(wanted, Nothing):
            same = policy == "recipe" and parent.recipe_id == recipe_id
            assert same or (tick and served and tick <= served)
            continue
        assert isinstance(wanted, Wanted)
        start, stop = wanted.window.train
        assert stop - start >= count
        if parent and parent.recipe_id == recipe_id:
            before = parent.window.train
            assert (start >= before[0], stop >= before[1]) == (True, True)
            assert start == before[0] or policy == "refresh"
            size = max(count, before[1] - before[0])
            assert stop - start == size + (extra if policy == "grow" else 0)
            assert policy != "refresh" or start > before[0]
        else:
            assert (start, stop) == (0, count)
        assert tick is None or served is None or tick > served
        ticks = (parent.ticks if parent else {}) | wanted.ticks
        parent = manifest((start, stop), recipe_id=recipe_id, layout=LAYOUT, ticks=ticks)


# The command itself.


def test_the_command_says_what_happened(pipeline, generate, tmp_path):
    small = ["--solver.steps", 4, "--states", 2, "--samples-per-shard", 64, "--micro-batch", 32]
    words = ["--teacher", "builtin:gaussian", "--store", tmp_path, "--count", 160, "--holdout", 40, *small]
    words += ["--runner", "local", "--refresh", 0.5, "--tick", "2026-11-22T03", "--json"]
    found = []
    for _ in range(2):
        code, out, _ = pipeline("regenerate", *words)
        found.append(json.loads(out))
        assert code == 0
    assert [it["what"] for it in found] == ["sealed", "nothing"]
    assert [it["window"]["train"] for it in found] == [[0, 160], [0, 160]]
    assert [it["tick"] for it in found] == ["2026-11-22T03"] * 2
    words[words.index("2026-11-22T03")] = "2026-11-22T04"
    told = json.loads(pipeline("regenerate", *words)[1])
    assert (told["what"], told["window_before"]["train"], told["window"]["train"]) == ("sealed", [0, 160], [80, 240])
    code, out, err = pipeline("regenerate", *words[:-3], "--seed", 1)
    assert (code, out, "--policy recipe to begin a new window" in err) == (2, "", True)
    code, out, _ = pipeline("regenerate", *words[:-5], "--seed", 1, "--policy", "recipe")
    assert (code, "train [0, 160)" in out) == (0, True)
