"""When will it be done: the play of the queue by itself, what it rests on, and forecasts beside what then really happens."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import subprocess
from collections.abc import Callable, Iterator
from datetime import datetime
from itertools import pairwise
from typing import Any

import pytest

from tests.conftest import GRACE, LIMIT, Place, load_module, shell, until
from tests.test_cli import Terminal

NOW = 1_900_000_000_000
BLOCK = 'until test -e "$0/go"; do sleep 0.05; done'


# ---- the play


def learned(ms: float, spread: float = 0.0) -> dict[str, Any]:
    return {"runs": 50, "mean_ms": ms, "sd_ms": spread, "p50_ms": ms, "p90_ms": ms, "p95_ms": ms, "histogram": "[]", "enough": True}


def handler(name: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "concurrency": None, "paused": 0, "external": 0, "secrets": "[]", **fields}


def world_of(slots: list[float], means: dict[str, float | None], **limits: int) -> dict[str, Any]:
    """One daemon with slots that are free at these instants; None for a handler of which nothing is known."""
    known = {name: learned(ms) if ms is not None else {"runs": 0, "enough": False} for name, ms in means.items()}
    return {"now": NOW, "handlers": {name: handler(name, concurrency=limits.get(name)) for name in means}, "learned": known, "counts": {},
            "serving": {}, "unlearned": set(), "unknown_ms": math.inf, "age_every": 600_000, "active": [],
            "pools": [{"only": None, "external": None, "slots": [(NOW + at, 0.0, None) for at in slots]}]}  # fmt: skip


def waiting(task_id: str, name: str = "work", rank: int = 2, **fields: Any) -> dict[str, Any]:
    number = int(re.sub(r"\D", "", task_id) or 0)
    return {"task_id": task_id, "handler": name, "rank": rank, "order_at": NOW + number, "seq": number, "aged_at": NOW, "available_at": None, "queued_at": NOW,
            "sla_ms": None, "sla_deadline": None, "set_aside": None, "status": "queued", **fields}  # fmt: skip


def starts(module: Any, world: dict[str, Any], line: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds from now until each starts."""
    return {task_id: at - NOW for task_id, (at, _) in module.Play(world, line).run().items()}


@pytest.mark.parametrize(("slots", "means", "limits", "line", "expected"), [
    ([0], {"work": 100}, {}, ["t1", "t2", "t3"], {"t1": 0, "t2": 100, "t3": 200}),
    ([0, 0], {"work": 100}, {}, ["t1", "t2", "t3"], {"t1": 0, "t2": 0, "t3": 100}),
    ([70, 30], {"work": 100}, {}, ["t1", "t2", "t3"], {"t1": 30, "t2": 70, "t3": 130}),
    ([0, 0], {"work": 100}, {"work": 1}, ["t1", "t2"], {"t1": 0, "t2": 100}),
    ([], {"work": 100}, {}, ["t1"], {}),
    ([math.inf], {"work": 100}, {}, ["t1"], {}),
    ([math.inf, 0], {"work": 100}, {}, ["t1", "t2"], {"t1": 0, "t2": 100})])  # fmt: skip
def test_slots_take_the_first_in_line(module: Any, slots: list[float], means: Any, limits: Any, line: list[str], expected: Any) -> None:
    """One after another, side by side, as slots become free, within a limit; a slot that nobody can say anything of takes nothing."""
    assert starts(module, world_of(slots, means, **limits), [waiting(name) for name in line]) == expected


def test_a_handler_at_its_limit_is_passed_by(module: Any) -> None:
    """Its tasks come first, but others take the slot that they may not."""
    line = [waiting("t1", "slow", 1), waiting("t2", "slow", 1), waiting("t3", "quick", 2)]
    assert starts(module, world_of([0, 0], {"slow": 500, "quick": 100}, slow=1), line) == {"t1": 0, "t3": 0, "t2": 500}


def test_classes_come_before_deadlines_and_deadlines_before_arrival(module: Any) -> None:
    """The order of claims."""
    line = [waiting("t1"), waiting("t2", order_at=NOW - 5), waiting("t3", rank=0), waiting("t4", rank=3, order_at=0)]
    assert starts(module, world_of([0], {"work": 10}), line) == {"t3": 0, "t2": 10, "t1": 20, "t4": 30}


def test_tasks_climb_while_they_wait(module: Any) -> None:
    """At half of its SLA a low task passes normal ones, and one without an SLA ages; else both would be last."""
    others = [waiting(f"t{n}") for n in range(1, 30)]
    urgent = waiting("t90", rank=3, sla_ms=1000, sla_deadline=NOW + 1000)
    found = starts(module, world_of([0], {"work": 100}), [*others, urgent])
    assert found["t90"] == 500 and found["t6"] == 600
    aged = starts(module, {**world_of([0], {"work": 100}), "age_every": 1000}, [*others, waiting("t91", rank=3, order_at=NOW - 9, aged_at=NOW - 500)])
    assert aged["t91"] == 500


def test_when_a_waiting_task_climbs(module: Any) -> None:
    """With an SLA at half and at four fifths of it, without one a class each time, up to the first; one that is set aside never."""
    assert module.climbs_of(waiting("t1", rank=3, sla_ms=1000), 10) == [(NOW + 500, 1), (NOW + 800, 0)]
    assert module.climbs_of(waiting("t1", rank=1, sla_ms=1000), 10) == [(NOW + 800, 0)] and module.climbs_of(waiting("t1", rank=0, sla_ms=1000), 10) == []
    assert module.climbs_of(waiting("t1", rank=3), 10) == [(NOW + 10, 2), (NOW + 20, 1), (NOW + 30, 0)]
    assert module.climbs_of(waiting("t1", rank=3, set_aside="odd"), 10) == module.climbs_of(waiting("t1", rank=0), 10) == []


def test_what_is_far_off_is_less_sure(module: Any) -> None:
    """Each run that a start waits for adds its own variance; by when nine of ten are done allows for those, and for the run itself."""
    world = world_of([0], {"work": 1000})
    world["learned"]["work"] = {**learned(1000, 300), "p90_ms": 1400, "enough": True}
    line = [waiting(f"t{n}", sla_ms=10_000, sla_deadline=NOW + 10_000) for n in range(1, 5)]
    found = module.played(world, line)
    assert [round(found[f"t{n}"][1]) for n in range(1, 5)] == [0, 90_000, 180_000, 270_000]
    late = [module.forecast_of(world, task, found[task["task_id"]]) for task in line]
    assert [seen["finish_by_at"] - seen["finish_at"] for seen in late] == [
        pytest.approx(math.sqrt(1.28**2 * 90_000 * n + 400**2), abs=1) for n in range(4)]  # fmt: skip


def test_how_many_are_ahead_is_counted_only_so_far(place: Place, module: Any) -> None:
    """Beyond that it is reckoned from the live counts and the place in the class; who climbs passes those with more time, of the classes below too."""
    shell(place, "work", "true")
    spans = [*(("high", "9h") for _ in range(5)), *(("normal", f"{n + 1}h") for n in range(20)), ("low", "290m")]
    batch = "".join(json.dumps({"goal": "g", "handler": "work", "priority": name, "sla": sla}) + "\n" for name, sla in spans)
    last = place.ok("submit-intent", "--json", "--batch", "-", stdin=batch.encode()).lines[-1]["task_id"]
    with contextlib.closing(module.Store(str(place.db))) as store:
        task, world = module.get_task(store, last), module.gather(store, module.clock())
        world.update(serving={}, pools=[{"only": None, "external": None, "slots": [(float(world["now"]), 0.0, None)]}])
        assert module.ahead_of(store, world, task, 100) == {"work": 25} == module.ahead_of(store, world, task, 3)
        assert module.ahead_of(store, world, {**task, "rank": 2}, 100) == {"work": 5 + 4}
        assert 7 <= module.ahead_of(store, world, {**task, "rank": 2}, 6)["work"] <= 11
        assert module.ahead_when_climbed(store, world, task, 1, 100) == {"work": 4}


def test_what_becomes_available_later_takes_its_turn_then(module: Any) -> None:
    """Not before its instant, however early its place."""
    line = [waiting("t1"), waiting("t2"), waiting("t3"), waiting("t0", rank=0, available_at=NOW + 150)]
    assert starts(module, world_of([0], {"work": 100}), line) == {"t1": 0, "t2": 100, "t0": 200, "t3": 300}


def test_work_that_nothing_is_known_of_keeps_its_slot(module: Any) -> None:
    """What stands behind it gets two forecasts: as if it lasted for ever, and as if it were over at once."""
    world = world_of([0, 0], {"work": 100, "new": None})
    line = [waiting("t1", "new"), *(waiting(f"t{n}", sla_ms=sla, sla_deadline=NOW + sla) for n, sla in ((2, 90), (3, 150), (4, 700)))]
    found = module.played(world, line)
    assert [(found[f"t{n}"][0] - NOW, found[f"t{n}"][2] - NOW) for n in (1, 2, 3, 4)] == [(0, 0), (0, 0), (100, 0), (200, 100)]
    misses = [module.forecast_of(world, task, found[task["task_id"]])["miss"] for task in line[1:]]
    assert misses == [True, None, False], "said only where it is so whatever the unknown one takes"
    alone = module.played(world_of([0], {"work": 100, "new": None}), line[:2])
    certain = module.forecast_of(world, line[1], alone["t2"])
    assert alone["t2"][0] == math.inf and (certain["start_at"], certain["finish_at"], certain["miss"]) == (None, None, True)
    assert module.forecast_of(world, line[2], (math.inf, 0.0, alone["t2"][2])) is None, "whether that one is late hangs on the unknown one"


def naive(slots: int, means: dict[str, int], limits: dict[str, int], line: list[dict[str, Any]]) -> dict[str, int]:
    """The same in steps of a millisecond, by looking at everything."""
    running: list[tuple[int, str]] = []
    found: dict[str, int] = {}
    for at in range(20_000):
        running = [(end, name) for end, name in running if end > at]
        for task in sorted(line, key=lambda one: (one["rank"], one["order_at"], one["seq"])):
            busy = [name for _, name in running].count(task["handler"])
            ready = (task["available_at"] or 0) - NOW <= at and busy < limits.get(task["handler"], 99)
            if task["task_id"] not in found and len(running) < slots and ready:
                found[task["task_id"]] = at
                running.append((at + means[task["handler"]], task["handler"]))
        if len(found) == len(line):
            return found
    raise AssertionError("never done")


@pytest.mark.parametrize("seed", range(12))
def test_the_play_agrees_with_a_naive_one(module: Any, seed: int) -> None:
    """Random queues, limits and durations."""
    chance = random.Random(seed)
    means = {name: chance.randrange(5, 120) for name in ("a", "b", "c")}
    limits = {name: chance.randrange(1, 4) for name in ("a", "b") if chance.random() < 0.6}
    slots = chance.randrange(1, 5)
    line = [waiting(f"t{n}", chance.choice("abc"), chance.randrange(4), order_at=NOW + chance.randrange(50),
                    available_at=NOW + chance.randrange(300) if chance.random() < 0.2 else None) for n in range(40)]  # fmt: skip
    assert starts(module, world_of([0] * slots, dict(means), **limits), line) == naive(slots, means, limits, line)


@pytest.mark.parametrize("slots", [1, 2, 3, 8])
def test_reckoning_agrees_with_the_play_where_runs_are_alike(module: Any, slots: int) -> None:
    """However many are ahead; with a limit of its own too."""
    free = [37.0 * n for n in range(slots)]
    for n in (0, 1, 5, 100):
        line = [waiting(f"t{number}") for number in range(n + 1)]
        world = world_of(free, {"work": 300.0})
        assert module.reckoned(world, "work", {"work": n})[0] == pytest.approx(module.Play(world, line).run()[f"t{n}"][0], abs=1)
    narrow = world_of([0] * slots, {"work": 300.0}, work=1)
    assert module.reckoned(narrow, "work", {"work": 10})[0] - NOW == 3000


def test_a_busy_handler_with_a_limit_does_not_keep_others_waiting(module: Any) -> None:
    """A thousand of its tasks are ahead, but they take one place of three."""
    world = world_of([0, 0, 0], {"slow": 1000.0, "quick": 100.0}, slow=1)
    at = module.reckoned(world, "quick", {"slow": 1000, "quick": 20})[0] - NOW
    assert 900 <= at <= 1100
    assert module.Play(world, [*(waiting(f"t{n}", "slow", 1) for n in range(200)), *(waiting(f"t{n}", "quick") for n in range(300, 321))]).run()[
        "t320"][0] - NOW == at  # fmt: skip


def test_what_is_left_of_a_run_depends_on_how_long_it_took(module: Any) -> None:
    """Of the runs that took longer, the middle one; of one that outlived all, half as long again."""
    histogram = [(module.bucket_of(100), 90), (module.bucket_of(1000), 10)]
    assert module.remaining_ms(histogram, 0) == pytest.approx(100, rel=0.02)
    assert module.remaining_ms(histogram, 300) == pytest.approx(700, rel=0.04)
    assert module.remaining_ms(histogram, 5000) == 2500
    assert module.remaining_ms([], 0) >= 1


def test_when_a_running_task_is_done(module: Any) -> None:
    """As half of those that took as long already, nine of ten times as nine tenths of them; late only when that half is."""
    world = world_of([0], {"work": 100})
    world["learned"]["work"]["histogram"] = json.dumps([(module.bucket_of(ms), n) for ms, n in ((100, 50), (1000, 30), (3000, 20))])
    for elapsed, finish, by in ((10, 100, 3000), (500, 1000, 3000), (2000, 3000, 3000)):
        for spare, miss in ((1.05, False), (0.95, True)):
            deadline = round(NOW - elapsed + finish * spare)
            seen = module.forecast_of_running(world, waiting("t1", status="running", started_at=NOW - elapsed, sla_deadline=deadline))
            assert (seen["start_at"], seen["miss"]) == (NOW - elapsed, miss)
            assert [seen[name] - NOW + elapsed for name in ("finish_at", "finish_by_at")] == [pytest.approx(ms, rel=0.025) for ms in (finish, by)]
    assert module.forecast_of_running(world, waiting("t1", status="assigned", started_at=None))["miss"] is None


@pytest.mark.parametrize(("wait", "ahead", "takes", "said"), [
    (50, 0, 900, "a run takes 900ms"), (None, 0, 900, "a run takes 900ms"), (200, 0, 900, "it waits 200ms for a worker, and a run takes 900ms"),
    (800, 1, 900, "1 task is ahead of it on 2 workers"), (800, 1, 1200, "a run takes 1.2s"),
    (1500, 3, 1200, "a run takes 1.2s, and 3 tasks are ahead of it on 2 workers")])  # fmt: skip
def test_the_reason_for_a_miss(module: Any, wait: int | None, ahead: int, takes: int, said: str) -> None:
    """What makes it late, and nothing that does not."""
    task = waiting("t1", sla_ms=1000, sla_deadline=NOW + 1000)
    forecast = {"start_at": None if wait is None else NOW + wait, "soonest_at": NOW + takes, "basis": {"p50_ms": takes, "ahead": ahead, "slots": 2}}
    assert module.miss_reason(task, forecast) == said


def test_the_figures_of_a_histogram(module: Any) -> None:
    """Mean, spread and percentiles; identical runs have no spread, and nothing has no figures."""
    made = module.summed_up([(module.bucket_of(200), 10)])
    assert made["runs"] == 10 and made["sd_ms"] == 0 and made["mean_ms"] == made["p50_ms"] == made["p95_ms"] == pytest.approx(200, rel=0.02)
    assert module.summed_up([]) == {"runs": 0, "mean_ms": None, "sd_ms": None, "histogram": "[]", "p50_ms": None, "p90_ms": None, "p95_ms": None}


# ---- a batch


def batch_of(module: Any, world: dict[str, Any], line: list[dict[str, Any]], before: Any = ()) -> Any:
    """These tasks as the lines of one batch."""
    made = []
    for task in line:
        facts = {"task_type": task["handler"], "domain": "general", "priority": module.PRIORITIES[task["rank"]], "warn_at": 0.8, **task}
        made.append(({"task_id": task["task_id"], "intent_id": "int_1"}, module.facts_of(facts), "a goal", "queued", None))
    return module.Batch(world, made, list(before))


@pytest.mark.parametrize("seed", range(12))
def test_a_batch_is_foreseen_as_its_play(module: Any, seed: int) -> None:
    """In the order of claims, however mixed it is submitted; exactly so where no handler has a limit, and with limits all but."""
    chance = random.Random(seed)
    means = {name: chance.randrange(5, 120) for name in ("a", "b", "c")}
    limits = {"a": chance.randrange(1, 3)} if seed % 2 else {}
    world = world_of([float(chance.randrange(100)) for _ in range(chance.randrange(2, 5))], dict(means), **limits)
    line = [waiting(f"t{n}", chance.choice("abc"), chance.randrange(4), order_at=NOW + 10**12 + chance.randrange(50), seq=n) for n in range(40)]
    for name in means:
        world["counts"][name] = {}
    found = batch_of(module, world, line).starts(world, first=True)
    played = module.Play(world, line).run()
    for number, task in enumerate(line):
        assert found[number] == pytest.approx(played[task["task_id"]][0], abs=1 if not limits else 0.25 * sum(means[one["handler"]] for one in line))


def test_lines_of_a_batch_climb_past_what_was_there(module: Any) -> None:
    """Behind a thousand without an SLA, they start when half of theirs is over, as their play has it."""
    world = world_of([0.0], {"work": 100})
    world["counts"]["work"] = {"normal": 1000}
    before = [(2, NOW + 10**11 + n, -1, "work", 10) for n in range(100)]
    line = [waiting(f"t{n}", rank=3, sla_ms=20_000, sla_deadline=NOW + 20_000, order_at=NOW + 20_000) for n in range(3)]
    found = [at - NOW for at in batch_of(module, world, line, before).starts(world, first=True)]
    others = [waiting(f"t{n}", order_at=NOW + 10**11 + n) for n in range(100, 1100)]
    assert found == pytest.approx([starts(module, world, [*line, *others])[f"t{n}"] for n in range(3)], abs=301)
    assert 10_000 <= found[0] <= 10_300


@pytest.mark.parametrize("numbers", [[], [0], [0, 1, 2], [5, 6, 8, 9, 12], [1, 3, 5]])
def test_unbroken_rows(module: Any, numbers: list[int]) -> None:
    """They hold each number once, and none in between."""
    rows = list(module.unbroken(numbers))
    assert [n for first, last in rows for n in range(first, last + 1)] == numbers and len(rows) == sum(n - 1 not in numbers for n in numbers)


# ---- what was learned


class Past:
    """The store's own functions, for a history at instants of our choice."""

    def __init__(self, place: Place, module: Any):
        self.place, self.module = place, module

    def run(self, name: str, ms: int, n: int = 12, ago: int = 0, asleep: int = 0, lost: bool = False) -> None:
        """n completed runs of a handler, each so long, the last of which ended that long ago; during which the machine slept, or after a lost start."""
        def work(tx: Any) -> None:
            real = tx.now
            for _ in range(n):
                tx.now = real - ago - ms
                task_id = self.module.submit(tx, [{"goal": "the past", "handler": name, "line": 1}])[0]["task_id"]
                tx.flush()
                tx._tallies.clear()
                if lost:
                    taken = self.module.take(tx, task_id, "past")
                    self.module.start(tx, taken, os.getpid(), None, None)
                    tx.now += 10
                    self.module.end_attempt(tx, task_id, taken["attempt_id"], {"outcome": "interrupted", "ended_by": "exit"})
                taken = self.module.take(tx, task_id, "past")
                self.module.start(tx, taken, os.getpid(), None, None)
                tx.now = real - ago
                if asleep:
                    tx.run(self.module.NOTE_SLEEP, now=tx.now - 1, asleep=asleep)
                self.module.end_attempt(tx, task_id, taken["attempt_id"], {"outcome": "completed", "ended_by": "exit"})
            tx.now = real
            tx.run("DELETE FROM handler_forecasts")  # nobody has asked in between

        with contextlib.closing(self.module.Store(str(self.place.db), "past")) as store:
            store.write(work)

    def learned(self, name: str, later: int = 0) -> dict[str, Any]:
        with contextlib.closing(self.module.Store(str(self.place.db), "past")) as store:
            return dict(store.write(lambda tx: self.module.learned_durations(tx, name, tx.now + later)))


@pytest.fixture
def past(place: Place, module: Any) -> Past:
    return Past(place, module)


def test_ten_runs_are_needed_and_the_newest_count(place: Place, past: Past) -> None:
    """Nine say nothing; of many, those of the newest hours; where a week has hardly any, those of ninety days."""
    shell(place, "work", "true")
    past.run("work", 1000, 9)
    assert past.learned("work")["runs"] == 9 and not load_module().says_enough(past.learned("work"))
    past.run("work", 1000, 1)
    assert past.learned("work")["runs"] == 10, "seen at once, although nine were summed up a moment before"
    shell(place, "changed", "true")
    past.run("changed", 60_000, 100, ago=20 * 3_600_000)
    past.run("changed", 60_000, 150, ago=9 * 3_600_000)
    past.run("changed", 5_000, 210)
    assert past.learned("changed")["p95_ms"] == pytest.approx(5000, rel=0.02), "it has become quicker"
    shell(place, "rare", "true")
    for day in range(11):
        past.run("rare", 7_000, 1, ago=(day + 1) * 4 * 86_400_000)
    assert past.learned("rare")["runs"] == 11
    shell(place, "ancient", "true")
    past.run("ancient", 7_000, 20, ago=200 * 86_400_000)
    assert past.learned("ancient")["runs"] == 0


def test_what_was_learned_survives_steps_of_the_clock(place: Place, past: Past) -> None:
    """History that lies ahead of a clock that was set back is still history, and a summary from the future is made again."""
    shell(place, "work", "true")
    past.run("work", 1000)
    assert past.learned("work", later=3_600_000)["made_at"] > past.learned("work")["made_at"]
    back = past.learned("work", later=-3 * 3_600_000)
    assert back["runs"] == 12 and back["p50_ms"] == pytest.approx(1000, rel=0.02)
    assert past.learned("work", later=-30 * 86_400_000)["runs"] == 0
    assert past.learned("work")["runs"] == 12


@pytest.mark.parametrize("days", [0, 30])
def test_runs_during_which_the_machine_slept_or_that_were_lost_teach_what_is_right(place: Place, past: Past, days: int) -> None:
    """Of a run of eight hours asleep only its time awake counts, one that had been interrupted not at all; of last month too."""
    shell(place, "work", "true")
    ago = days * 86_400_000
    past.run("work", 28_800_100, 1, ago=ago + 3_600_000, asleep=28_800_000)
    past.run("work", 100, 11, ago=ago)
    past.run("work", 50_000, 3, ago=ago, lost=True)
    seen = past.learned("work")
    assert seen["runs"] == 12 and seen["mean_ms"] == pytest.approx(100, rel=0.02) and seen["p95_ms"] == pytest.approx(100, rel=0.02)


# ---- what people and programs are told


@contextlib.contextmanager
def one_worker_busy(place: Place) -> Iterator[dict[str, Any]]:
    """A daemon with one worker, which has a critical task of `work` to run first; that task."""
    with place.daemon("--workers", "1"):
        yield place.until_status(place.submit("runs", "--handler", "work", "--priority", "critical")[1], "running")


def predicted(place: Place, task_id: str) -> dict[str, Any]:
    return dict(place.json("task", "explain", task_id)["predicted"])


def instant(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def forecasts(place: Place, task_id: str | None = None) -> list[dict[str, Any]]:
    return [event["payload"] for event in place.events("htm.sla.forecast") if task_id in (None, event["payload"]["task_id"])]


def reason(place: Place, task_id: str) -> str:
    """Why nothing is foreseen of a task, as explain and the dashboard say alike; all else is null."""
    seen = predicted(place, task_id)
    assert [seen[name] for name in ("start_at", "finish_at", "finish_by_at", "miss")] == [None] * 4
    assert f"no forecast: {seen['text']}" in place.ok("task", "explain", task_id).out
    rows = [row for row in place.json("dashboard", "queued") if row["task_id"] == task_id]
    assert all((row["reason"], row["text"], row["predicted_start_at"], row["predicted_miss"]) == (seen["reason"], seen["text"], None, None) for row in rows)
    return str(seen["reason"])


def test_nothing_is_guessed(place: Place, past: Past) -> None:
    """No history, no daemon, a pause, a wait for others, no external worker, a daemon that serves others only: null, and the reason."""
    shell(place, "work", "true")
    shell(place, "new", "true")
    place.handler("outside", "--external")
    _, fresh = place.submit("a", "--handler", "new", "--sla", "1h")
    assert reason(place, fresh) == "no_daemon", "the obstacle that matters comes before what is not known"
    assert reason(place, place.submit("e", "--handler", "outside")[1]) == "external"
    place.ok("handler", "pause", "new")
    assert reason(place, fresh) == "handler_paused"
    place.ok("handler", "resume", "new")
    past.run("work", 1000)
    past.run("outside", 1000)
    past.run("new", 1000, 8)
    past.run("new", 1000, 5, lost=True)
    place.ok("task", "cancel", fresh)
    with blocked_daemon(place):
        _, fresh = place.submit("f", "--handler", "new")
        assert reason(place, fresh) == "nothing_learned" and "needs 10 completed runs that nothing interrupted, has 8" in predicted(place, fresh)["text"]
        place.ok("task", "cancel", fresh)
    done = place.json("submit-intent", "b", "--handler", "work", "--sla", "1h")
    assert [done[name] for name in ("predicted_start_at", "predicted_finish_at", "predicted_miss", "advice")] == [None, None, None, []]
    assert reason(place, done["task_id"]) == "no_daemon" and [one["action"] for one in predicted(place, done["task_id"])["advice"]] == ["start_daemon"]
    _, later = place.submit("c", "--handler", "work", "--after", done["intent_id"])
    assert reason(place, later) == "waiting_dependency"
    with place.daemon("--handler", "new", "--workers", "1"):
        assert reason(place, done["task_id"]) == "not_served"
    with place.daemon("--workers", "1"):
        place.until_status(done["task_id"], "completed")
        assert place.json("task", "explain", done["task_id"])["predicted"] is None
        place.ok("handler", "pause", "work")
        _, paused = place.submit("d", "--handler", "work", "--sla", "1h")
        assert reason(place, paused) == "handler_paused" and [one["action"] for one in predicted(place, paused)["advice"]] == ["resume"]
        place.ok("handler", "resume", "work")
        place.until_status(paused, "completed")
    assert forecasts(place) == []


@pytest.mark.parametrize(("change", "pools", "code"), [
    ({}, 1, None), ({"paused": 1}, 1, "handler_paused"), ({"secrets": '[["TOKEN", "key", "use"]]'}, 1, "waiting_consent"), ({}, 0, "no_daemon"),
    ({"external": 1}, 1, "external")])  # fmt: skip
def test_what_keeps_all_tasks_of_a_handler_from_starting(module: Any, change: dict[str, Any], pools: int, code: str | None) -> None:
    """When people will consent is for them to say, however well its runs are known."""
    world = {**world_of([0], {"work": 100}), "granted": {}, "ready": set()}
    world["handlers"]["work"].update(change)
    world["pools"] = world["pools"][:pools]
    why = module.no_forecast(world, waiting("t1"))
    assert (why and why[0]) == code


def test_the_queue_of_a_class_or_a_handler_is_only_that(place: Place) -> None:
    """Of what is to come later, too."""
    for name in ("work", "other"):
        place.handler(name, "--external")
        place.submit("later", "--handler", name, "--in", "1h")
        place.submit("now", "--handler", name, "--priority", "low")
    for options, found in (([], 4), (["--priority", "low"], 2), (["--priority", "normal"], 2), (["--priority", "high"], 0), (["--handler", "work"], 2),
                           (["--handler", "other", "--priority", "normal"], 1)):  # fmt: skip
        rows = place.json("dashboard", "queued", *options)
        assert len(rows) == found and all(row[option[2:]] == value for option, value in zip(options[::2], options[1::2], strict=True) for row in rows), options


def test_a_clock_that_was_set_back_lets_nothing_wait_less_than_not_at_all(place: Place) -> None:
    """A task that seems to have been queued in the future."""
    place.handler("work", "--external")
    _, task_id = place.submit("g", "--handler", "work", "--sla", "1h")
    place.sql(f"UPDATE htm_tasks SET queued_at = queued_at + 3600000 WHERE task_id = '{task_id}'")
    (row,) = place.json("dashboard", "queued")
    assert (row["waiting_ms"], row["predicted_miss"]) == (0, None) and " 0%" in place.ok("dashboard", "queued").out


def test_external_workers_are_counted_by_who_was_seen(place: Place, past: Past) -> None:
    """None seen, nothing foreseen; one that holds a task is one slot, and what is left of its task is waited for."""
    place.handler("outside", "--external")
    past.run("outside", 100_000, ago=7_200_000)
    _, lonely = place.submit("z", "--handler", "outside")
    assert reason(place, lonely) == "external"
    place.ok("task", "cancel", lonely)
    _, first = place.submit("a", "--handler", "outside")
    _, second = place.submit("b", "--handler", "outside")
    assert place.json("task", "claim", "--handler", "outside", "--worker", "w")["task_id"] == first
    seen = predicted(place, second)
    assert seen["basis"]["slots"] == 1 and instant(seen["start_at"]) - instant(place.task(first)["started_at"]) == pytest.approx(100, rel=0.05)
    assert instant(predicted(place, first)["finish_at"]) - instant(place.task(first)["started_at"]) == pytest.approx(100, rel=0.05)


def test_a_future_start_is_foreseen_for_then(place: Place, past: Past) -> None:
    """--in: not before its instant, with its clock from there."""
    shell(place, "work", "true")
    past.run("work", 1000)
    with place.daemon("--workers", "1"):
        done = place.json("submit-intent", "later", "--handler", "work", "--in", "1h", "--sla", "5s")
        task = place.task(done["task_id"])
        assert done["predicted_start_at"] == task["queued_at"] and done["predicted_miss"] is False
        assert instant(done["predicted_finish_at"]) - instant(done["predicted_start_at"]) == pytest.approx(1, rel=0.02)
        assert predicted(place, done["task_id"])["start_at"] == task["queued_at"]
        assert [row["task_id"] for row in place.json("dashboard", "queued")] == [done["task_id"]]


@contextlib.contextmanager
def blocked_daemon(place: Place, *options: str, workers: int = 1) -> Iterator[None]:
    """A daemon whose slots are all taken by tasks that go on until they are let go."""
    place.handler("held", "--", "sh", "-c", BLOCK, str(place.folder))
    with place.daemon("--workers", str(workers), *options):
        for _ in range(workers):
            place.until_status(place.submit("held", "--handler", "held", "--priority", "critical")[1], "running")
        try:
            yield
        finally:
            (place.folder / "go").touch()


def test_the_forecast_of_a_held_queue(place: Place, past: Past) -> None:
    """Behind a running task: its usual rest, then one after another; concurrency, explain, dashboard and submission agree."""
    shell(place, "work", "true")
    past.run("work", 10_000)
    place.handler("held", "--", "true")
    past.run("held", 60_000)
    place.ok("handler", "remove", "held")
    with blocked_daemon(place):
        ids = [place.submit(f"number {n}", "--handler", "work", "--sla", f"{n + 1}h")[1] for n in range(3)]
        queue = place.json("dashboard", "queued")
        assert [row["task_id"] for row in queue] == ids and all(row["predicted_miss"] is False and row["reason"] is None for row in queue)
        at = [instant(row["predicted_start_at"]) for row in queue]
        running = place.task(place.json("task", "list", "--status", "running")[0]["task_id"])
        assert at[0] - instant(running["started_at"]) == pytest.approx(60, rel=0.1)
        assert [b - a for a, b in pairwise(at)] == [pytest.approx(10, rel=0.05)] * 2
        assert instant(predicted(place, ids[2])["start_at"]) == pytest.approx(at[2], abs=5)
        last = place.json("submit-intent", "the last", "--handler", "work", "--sla", "9h")
        assert instant(last["predicted_start_at"]) == pytest.approx(at[2] + 10, abs=5)
        basis = predicted(place, last["task_id"])["basis"]
        assert (basis["runs"], basis["slots"], basis["ahead"]) == (12, 1, 3) and basis["p50_ms"] == pytest.approx(10_000, rel=0.02)
        text = place.ok("task", "explain", last["task_id"]).out
        assert "foreseen  start" in text and "12 runs took 10s" in text.replace("9.9s", "10s").replace("10.1s", "10s") and "3 tasks ahead" in text
        assert [row["task_id"] for row in place.json("dashboard", "queued", "--limit", "2")] == ids[:2]
        assert place.json("dashboard", "queued", "--handler", "held") == [] == place.json("dashboard", "queued", "--priority", "low")
        assert len(place.json("dashboard", "queued", "--priority", "normal", "--handler", "work")) == 4


def test_one_place_is_one_after_another(place: Place, past: Past) -> None:
    """--concurrency 1 on three workers; the advice is a place more."""
    shell(place, "work", BLOCK.replace("$0", str(place.folder)), "--concurrency", "1")
    past.run("work", 10_000)
    with place.daemon("--workers", "3"):
        first = place.submit("first", "--handler", "work")[1]
        place.until_status(first, "running")
        second = place.json("submit-intent", "second", "--handler", "work", "--sla", "14s")
        assert second["predicted_miss"] is True and "concurrency" in [one["action"] for one in second["advice"] if one["saves"]]
        assert "workers" not in [one["action"] for one in second["advice"]]
        (place.folder / "go").touch()


def test_forecasts_come_true(place: Place, past: Past) -> None:
    """One worker, real sleeps: they start in the foreseen order, each within half a run of the foreseen instant."""
    shell(place, "nap", "sleep 1.5")
    past.run("nap", 1530)
    with place.daemon("--workers", "1"):
        ids = [place.submit(f"nap {n}", "--handler", "nap", "--priority", priority)[1]
               for n, priority in enumerate(["normal", "low", "normal", "high"])]  # fmt: skip
        place.until_status(ids[0], "running", "completed")
        queue = {row["task_id"]: row for row in place.json("dashboard", "queued")}
        assert list(queue) == [ids[3], ids[2], ids[1]]
        for task_id, row in queue.items():
            task = place.until_status(task_id, "completed")
            assert abs(instant(task["started_at"]) - instant(row["predicted_start_at"])) < 0.75, row["goal"]
            assert abs(instant(task["finished_at"]) - instant(row["predicted_finish_at"])) < 0.75


# ---- a miss to come


def test_advice_that_is_given_saves_it(place: Place, past: Past) -> None:
    """Critical work is ahead: as submitted it is late, and each thing that is advised, once done, lets it be in time."""
    shell(place, "nap", "sleep 1")
    past.run("nap", 1030)
    wanted = ("--handler", "nap", "--sla", "7s")
    with place.daemon("--workers", "1"):
        lines = "".join(json.dumps({"goal": f"nap {n}", "handler": "nap", "priority": "critical", "sla": "3s"}) + "\n" for n in range(20))
        place.ok("submit-intent", "--batch", "-", stdin=lines.encode())
        done = place.call("submit-intent", "as it is", *wanted, "--json")
        document = done.json
        assert document["predicted_miss"] is True and done.err == ""
        actions = {one["action"]: one for one in document["advice"] if one["saves"]}
        assert set(actions) == {"workers"}, "before all that critical work it cannot come by any priority"
        assert re.search(r"\d+ more workers", actions["workers"]["text"])
        told = place.call("submit-intent", "as it is, for people", *wanted)
        assert told.status == 0 and re.match(r"grace: this will likely miss its SLA of 7s by .*: \d+ tasks are ahead of it on 1 worker; in time with", told.err)
        many = re.search(r"--workers (\d+)", actions["workers"]["text"])
        assert many
        with place.daemon("--workers", many[1]):
            assert place.until_status(document["task_id"], "completed")["sla_met"] is True
    (event,) = forecasts(place, document["task_id"])
    assert event["overdue_ms"] > 0 and event["ahead"] >= 15 and event["workers"] == 1 and event["advice"] == document["advice"]
    assert any("forecast: " in entry["text"] for entry in place.json("task", "explain", document["task_id"])["story"])


def test_a_higher_priority_that_is_advised_saves_it(place: Place, past: Past) -> None:
    """Many with less time are ahead in its class; the command that is advised, as it stands there, lets the task itself pass them."""
    shell(place, "nap", "sleep 1")
    past.run("nap", 1030)
    with place.daemon("--workers", "1"):
        lines = "".join(json.dumps({"goal": f"nap {n}", "handler": "nap", "sla": "5s"}) + "\n" for n in range(30))
        place.ok("submit-intent", "--batch", "-", stdin=lines.encode())
        late = place.json("submit-intent", "as it is", "--handler", "nap", "--sla", "6s")
        assert late["predicted_miss"] is True
        saving = {one["action"]: one["text"] for one in late["advice"] if one["saves"]}
        said = re.fullmatch(rf"grace (task priority {late['task_id']} (high|critical))", saving["priority"])
        assert said and saving["priority"] in place.ok("task", "explain", late["task_id"]).out
        assert saving["priority"] in forecasts(place, late["task_id"])[0]["message"]
        place.ok(*said[1].split())
        assert predicted(place, late["task_id"])["miss"] is False
        task = place.until_status(late["task_id"], "completed")
        assert task["sla_met"] is True and place.intent(late["intent_id"])["priority"] == "normal"
        for row in place.json("task", "list", "--status", "queued"):
            place.call("task", "cancel", row["task_id"])


def test_the_priority_of_a_task_that_exists(place: Place) -> None:
    """Any open task, by its id or its intent's, up and down, each time with an event; but not below where its SLA has brought it."""
    shell(place, "work", "true")
    intent_id, first = place.submit("first", "--handler", "work")
    _, second = place.submit("second", "--handler", "work", "--priority", "high")
    assert place.json("task", "priority", intent_id, "critical")["changed"] is True
    assert [row["task_id"] for row in place.json("dashboard", "queued")] == [first, second]
    document = place.json("task", "priority", first, "critical")
    assert document["changed"] is False and document["priority"] == "critical" and "(as it was)" in place.ok("task", "priority", first, "critical").out
    place.ok("task", "priority", first, "low")
    assert [row["task_id"] for row in place.json("dashboard", "queued")] == [second, first]
    assert place.json("status")["queue_depths"] == {"critical": 0, "high": 1, "normal": 0, "low": 1}
    told = [event["payload"] for event in place.events("htm.task.update") if "previous_priority" in event["payload"]]
    assert [(one["task_id"], one["previous_priority"], one["priority"], one["reason"]) for one in told] == [
        (first, "normal", "critical", "command"), (first, "critical", "low", "command")]  # fmt: skip
    (step,) = place.json("task", "explain", first)["next_steps"]
    assert step["step"] == "ageing" and instant(step["due_at"]) - instant(place.events("htm.task.update")[-1]["created_at"]) == pytest.approx(600)
    _, pressed = place.submit("pressed", "--handler", "work", "--sla", "10ms", "--priority", "critical")
    until(lambda: place.task(pressed)["elapsed_ms"] > 10, "its SLA to be over")
    refused = place.call("task", "priority", pressed, "low")
    assert refused.status == 4 and "stays at least critical" in refused.err and place.task(pressed)["priority"] == "critical"
    place.ok("task", "cancel", second)
    for priority in ("low", "high"):
        ended = place.call("task", "priority", second, priority)
        assert ended.status == 4 and "has ended already (cancelled)" in ended.err
    assert place.call("task", "priority", "task_zzz", "low").status == 3 and place.call("task", "priority", first, "urgent").status == 2


def test_an_intents_id_stands_for_its_current_task(place: Place) -> None:
    """Where one looks at a task: show, explain, log; after a retry, the new one."""
    shell(place, "work", "echo seen; exit 1", "--max-attempts", "1")
    intent_id, first = place.submit("look at me", "--handler", "work", "--intent-id", "mine")
    place.ok("daemon", "--once")
    assert place.json("task", "show", "mine")["task_id"] == place.json("task", "explain", intent_id)["task_id"] == first
    assert place.ok("task", "log", intent_id).out == "seen\n"
    second = place.json("intent", "retry", intent_id)["task_id"]
    assert second != first and place.json("task", "show", "min")["task_id"] == second
    refused = place.call("task", "explain", "yours")
    assert refused.status == 3 and "there is no task 'yours'" in refused.err


def test_a_run_longer_than_the_sla_cannot_be_saved(place: Place, past: Past) -> None:
    """Nothing but a longer SLA is advised, and that one is foreseen to hold."""
    shell(place, "work", "true")
    past.run("work", 60_000)
    with place.daemon("--workers", "1"):
        done = place.json("submit-intent", "too short", "--handler", "work", "--sla", "30s")
        assert done["predicted_miss"] is True
        (advice,) = done["advice"]
        assert advice["action"] == "sla"
        longer = re.search(r"an SLA of (\S+) would be met", advice["text"])
        assert longer and place.json("submit-intent", "longer", "--handler", "work", "--sla", longer[1])["predicted_miss"] is False


def test_why_it_is_late_is_what_makes_it_late(place: Place, past: Past) -> None:
    """A run that is too long by itself: its length, and who is ahead only where that alone would make it late."""
    shell(place, "work", BLOCK.replace("$0", str(place.folder)))
    past.run("work", 540_000)
    with place.daemon("--workers", "2"):
        place.until_status(place.submit("runs", "--handler", "work")[1], "running")
        alone = place.call("submit-intent", "alone", "--handler", "work", "--sla", "10s").err
        assert re.search(r"of 10s by \d+m(\d+s)?: a run takes (8m5\d|9m\d?)s?; an SLA of \S+ would be met", alone), alone
        place.until_status(place.json("task", "list")[0]["task_id"], "running")
        place.submit("first", "--handler", "work", "--priority", "critical")
        last = place.call("submit-intent", "last", "--handler", "work", "--sla", "10s").err
        assert re.search(r"of 10s by 1\dm(\d+s)?: a run takes (8m5\d|9m\d?)s?, and 1 task is ahead of it on 2 workers; an SLA of \S+ would be met", last), last
        (place.folder / "go").touch()


def test_a_miss_that_is_certain_is_said_though_the_start_is_not_known(place: Place, past: Past) -> None:
    """All slots are held by work of which nothing is known, but a run alone exceeds the SLA; what takes no slot of a daemon is not named."""
    shell(place, "rep", "true")
    past.run("rep", 300_000)
    place.handler("gpu", "--external")
    place.submit("elsewhere", "--handler", "gpu")
    place.ok("task", "claim", "--handler", "gpu", "--worker", "w")
    place.submit("elsewhere, later", "--handler", "gpu")
    with blocked_daemon(place):
        told = place.call("submit-intent", "too short", "--handler", "rep", "--sla", "10s")
        assert re.match(r"grace: this will miss its SLA of 10s by 4m\d+s at least: a run takes (4m5\d|5m\d?)s?$", told.err.strip()), told.err
        (event,) = forecasts(place)
        task_id = event["task_id"]
        assert event["predicted_finish_at"] is None and event["overdue_ms"] == pytest.approx(290_000, rel=0.03)
        seen = predicted(place, task_id)
        assert (seen["start_at"], seen["miss"], seen["text"]) == (None, True, "nothing learned yet of held, which it waits for")
        text = place.ok("task", "explain", task_id).out
        assert "it will miss its SLA of 10s" in text and "it is the first of its handler" in text
        row = next(row for row in place.json("dashboard", "queued") if row["task_id"] == task_id)
        assert (row["predicted_start_at"], row["predicted_miss"], row["text"]) == (None, True, seen["text"])
        assert "'too short' is going to be late" in place.ok("dashboard", "queued").out
        document = place.json("submit-intent", "long enough", "--handler", "rep", "--sla", "10h")
        assert document["predicted_miss"] is None and list(document)[:2] == ["intent_id", "task_id"]


def submitted(place: Place, *lines: dict[str, Any]) -> list[dict[str, Any]]:
    """The documents of a batch."""
    return place.ok("submit-intent", "--json", "--batch", "-", stdin="".join(json.dumps(line) + "\n" for line in lines).encode()).lines


def test_the_lines_of_a_batch_are_foreseen(place: Place, past: Past) -> None:
    """Each at once, as the dashboard has it then, behind what was there; those of which nothing is known with null; a known key too."""
    shell(place, "work", BLOCK.replace("$0", str(place.folder)))
    shell(place, "new", "true")
    past.run("work", 10_000)
    with place.daemon("--workers", "2"):
        held = [row["task_id"] for row in submitted(place, *({"goal": "held", "handler": "work", "priority": "critical"} for _ in range(4)))]
        for task_id in held[:2]:
            place.until_status(task_id, "running")
        done = submitted(place, *({"goal": f"number {n}", "handler": "work", "sla": f"{40 - 5 * n}m", "key": f"key {n}"} for n in range(5)),
                         {"goal": "later", "handler": "work", "in": "1h", "sla": "1m"}, {"goal": "unknown", "handler": "new"},
                         {"goal": "waits", "handler": "work", "sla": "1h", "key": "key 1"})  # fmt: skip
        queue = {row["task_id"]: row for row in place.json("dashboard", "queued")}
        for document in done[:6]:
            seen = queue[document["task_id"]]
            assert document["predicted_miss"] is seen["predicted_miss"] is False and document["advice"] == []
            for name in ("predicted_start_at", "predicted_finish_at"):
                assert instant(document[name]) == pytest.approx(instant(seen[name]), abs=3), "five lines later it is the same"
        assert instant(done[0]["predicted_finish_at"]) - instant(done[4]["predicted_finish_at"]) == pytest.approx(20, abs=1)
        assert done[5]["predicted_start_at"] == place.task(done[5]["task_id"])["queued_at"]
        for document in done[6:]:
            assert [document[name] for name in ("predicted_start_at", "predicted_finish_at", "predicted_miss", "advice")] == [None, None, None, []]
        assert done[7]["duplicate"] is True and done[7]["task_id"] == done[1]["task_id"] and forecasts(place) == []
        (place.folder / "go").touch()


def test_a_short_batch_is_foreseen_with_all_that_climbs_past_it(place: Place, past: Past) -> None:
    """What was there has a little less time and climbs: the lines wait for it, and the dashboard has the same."""
    shell(place, "work", BLOCK.replace("$0", str(place.folder)))
    shell(place, "lone", "true", "--concurrency", "1")
    past.run("work", 30_000)
    past.run("lone", 30_000)
    with one_worker_busy(place):
        submitted(place, *({"goal": "was there", "handler": "work", "sla": "5m"} for _ in range(20)))
        done = submitted(place, *({"goal": f"lone {n}", "handler": "lone", "sla": "5m", "priority": "high"} for n in range(8)))
        queue = {row["task_id"]: row for row in place.json("dashboard", "queued")}
        for document in done:
            assert instant(document["predicted_start_at"]) == pytest.approx(instant(queue[document["task_id"]]["predicted_start_at"]), abs=5)
        assert [one["predicted_miss"] for one in done[:4] + done[6:]] == [False] * 4 + [True] * 2, "when half of its time is over, what was there goes before"
        (place.folder / "go").touch()


def test_misses_in_a_batch_are_told_once_each(place: Place, past: Past) -> None:
    """In the transaction that submits them, with what would save each; nobody tells them again, and people hear of the first."""
    shell(place, "work", BLOCK.replace("$0", str(place.folder)))
    shell(place, "long", "true")
    past.run("work", 10_000)
    past.run("long", 60_000)
    place.ok("config", "set", "forecast.every", "100ms")
    with one_worker_busy(place):
        mixed = [{"goal": f"number {n}", "handler": "work", "sla": "5m" if n % 2 else "9h"} for n in range(300)]
        done = submitted(place, *mixed)
        late = [one for one in done if one["predicted_miss"]]
        assert [one["task_id"] for one in late] == [one["task_id"] for one in done[59:300:2]], "behind one, twenty-nine fit into five minutes"
        events = {event["task_id"]: event for event in forecasts(place)}
        assert list(events) == [one["task_id"] for one in late] and all(events[one["task_id"]]["advice"] == one["advice"] for one in late)
        saving = {one["action"]: one for one in late[0]["advice"]}
        assert saving["workers"]["text"].startswith("one more worker") and saving["priority"]["text"] == f"grace task priority {late[0]['task_id']} high"
        assert "4 more workers" in late[-2]["advice"][-1]["text"] and "29 tasks are ahead of it on 1 worker" in events[late[0]["task_id"]]["message"]
        assert place.sql("SELECT COUNT(*) FROM htm_tasks WHERE forecast_at IS NOT NULL") == [[len(late)]]
        stamped = place.sql("SELECT task_id FROM htm_tasks WHERE forecast_at IS NOT NULL ORDER BY seq")
        assert [one[0] for one in stamped] == [one["task_id"] for one in late]
        lines = "".join(json.dumps({"goal": "two more", "handler": "long", "sla": sla}) + "\n" for sla in ("30s", "10h", "40s"))
        told = place.ok("submit-intent", "--batch", "-", stdin=lines.encode())
        assert re.match(r"grace: 2 of 3 lines are going to miss the SLA; the first, task_\w+, will likely miss its SLA of 30s by ", told.err), told.err
        assert re.search(r"a run takes (59\S+|60s|1m); an SLA of \S+ would be met", told.err), told.err
        until(lambda: len(forecasts(place)) >= len(late) + 2 + 12, "the daemon to tell of those that the two long ones go before")
        told_of = [event["task_id"] for event in forecasts(place)]
        assert len(told_of) == len(set(told_of)) and told_of[: len(late)] == [one["task_id"] for one in late]
        (place.folder / "go").touch()


def test_a_batch_of_mixed_classes_is_foreseen_with_all_that_climbs(place: Place, past: Past) -> None:
    """Low ones climb past normal ones when half of their time is over: seventy of each are in time, and the rest is not; a walk would see no miss."""
    shell(place, "work", BLOCK.replace("$0", str(place.folder)))
    past.run("work", 10_000)
    with one_worker_busy(place):
        pair = {"goal": "normal", "handler": "work", "sla": "1750s"}, {"goal": "low", "handler": "work", "sla": "1400s", "priority": "low"}
        done = submitted(place, *(pair * 110))
        assert [sum(one["predicted_miss"] for one in some) for some in (done[::2], done[1::2])] == [pytest.approx(40, abs=2)] * 2
        assert {one["predicted_miss"] for one in done[:130]} == {False} and {one["predicted_miss"] for one in done[150:]} == {True}
        (place.folder / "go").touch()


def test_only_the_first_misses_of_a_large_batch_get_advice(place: Place, past: Past) -> None:
    """Two hundred; the others are told without."""
    shell(place, "work", BLOCK.replace("$0", str(place.folder)))
    past.run("work", 10_000)
    with one_worker_busy(place):
        done = submitted(place, *({"goal": f"number {n}", "handler": "work", "sla": "1m"} for n in range(260)))
        late = [one for one in done if one["predicted_miss"]]
        assert len(late) == 255 and [bool(one["advice"]) for one in late] == [True] * 200 + [False] * 55
        events = {event["task_id"]: event for event in forecasts(place)}
        assert list(events) == [one["task_id"] for one in late] and [event["advice"] for event in events.values()] == [one["advice"] for one in late]
        assert re.search(r"will likely miss its SLA of 1m by \S+: 259 tasks are ahead of it on 1 worker$", events[late[-1]["task_id"]]["message"])
        (place.folder / "go").touch()


def test_a_large_batch_shows_that_it_goes_on(place: Place, past: Past, module: Any) -> None:
    """Those who wait for their turn to write are told again and again: while lines come, while they are foreseen, while misses are written."""
    shell(place, "work", BLOCK.replace("$0", str(place.folder)))
    past.run("work", 10_000)
    ticket, seen, told = place.folder / f"{place.db.name}-ticket", set[bytes](), []

    def lines(n: int) -> Iterator[dict[str, Any]]:
        for number in range(n):
            yield {"goal": f"number {number}", "handler": "work", "sla_ms": 60_000, "line": number + 1}
            seen.add(ticket.read_bytes())

    def put(tx: Any) -> list[dict[str, Any]]:
        show = tx.show_life

        def life() -> None:
            show()
            told.append((ticket.read_bytes(), tx.value("SELECT COUNT(*) FROM events WHERE topic = 'htm.sla.forecast'")))

        tx.show_life = life
        return module.submit(tx, lines(3000))  # type: ignore[no-any-return]

    with place.daemon("--workers", "2"), contextlib.closing(module.Store(str(place.db), "test")) as store:
        done = store.write(put)
        (place.folder / "go").touch()
    assert len(seen) >= 20 and len({text for text, _ in told}) == len(told)
    misses = sum(one["predicted_miss"] for one in done)
    assert misses > 2900 and len({n for _, n in told if 0 < n < misses}) == 2, "between thousands of events"
    assert len([n for _, n in told if n == 0]) >= 30 + 2 + 5, "lines, forecasts, walks"


@pytest.mark.parametrize("daemons", [1, 2])
def test_a_daemon_foretells_once_what_has_changed_for_the_worse(place: Place, past: Past, daemons: int) -> None:
    """Fine when submitted, overtaken since: one event, before the warning, with two daemons too, and none more after a restart."""
    shell(place, "work", BLOCK.replace("$0", str(place.folder)))
    past.run("work", 10_000)
    place.ok("config", "set", "forecast.every", "100ms")
    with contextlib.ExitStack() as stack:
        for _ in range(daemons):
            stack.enter_context(place.daemon("--workers", "1", "--grace-period", "100ms"))
        held = [place.submit("first", "--handler", "work", "--priority", "critical")[1] for _ in range(daemons)]
        for task_id in held:
            place.until_status(task_id, "running")
        fine = place.json("submit-intent", "fine", "--handler", "work", "--priority", "low", "--sla", "10m")
        assert fine["predicted_miss"] is False and forecasts(place, fine["task_id"]) == []
        batch = "".join(json.dumps({"goal": f"before it {n}", "handler": "work", "priority": "critical", "sla": "9m"}) + "\n" for n in range(150))
        place.ok("submit-intent", "--batch", "-", stdin=batch.encode())
        until(lambda: forecasts(place, fine["task_id"]), "the forecast")
    assert place.task(fine["task_id"])["escalation_level"] == 0
    with contextlib.ExitStack() as stack:
        for _ in range(daemons):
            stack.enter_context(place.daemon("--workers", "1", "--grace-period", "100ms"))
        probe = json.dumps({"goal": "seen after the restart", "handler": "work", "priority": "critical", "sla": "15s"}) + "\n" + json.dumps(
            {"goal": "and this", "handler": "work", "priority": "critical", "sla": "16s"}) + "\n" + json.dumps(
            {"goal": "and that", "handler": "work", "priority": "critical", "sla": "17s"})  # fmt: skip
        ids = [row["task_id"] for row in place.ok("submit-intent", "--json", "--batch", "-", stdin=probe.encode()).lines]
        until(lambda: any(forecasts(place, task_id) for task_id in ids), "a forecast after the restart")
    (event,) = forecasts(place, fine["task_id"])
    assert instant(event["predicted_finish_at"]) > instant(event["sla_deadline"]) and event["message"].startswith("'fine' will likely miss")
    told = [event["task_id"] for event in forecasts(place)]
    assert len(told) == len(set(told))
    (place.folder / "go").touch()


def test_a_run_that_takes_longer_than_usual_is_foretold(place: Place, past: Past) -> None:
    """While it runs, before the warning; nothing is advised, since nothing would help."""
    shell(place, "work", BLOCK.replace("$0", str(place.folder)))
    past.run("work", 2000)
    place.ok("config", "set", "forecast.every", "100ms")
    with place.daemon("--workers", "1"):
        done = place.json("submit-intent", "hangs", "--handler", "work", "--sla", "12s")
        assert done["predicted_miss"] is False
        (event,) = until(lambda: forecasts(place, done["task_id"]), "the forecast")
        assert event["advice"] == [] and "takes longer than the" in event["message"]
        until(lambda: place.events("htm.sla.warning"), "the warning")
        (place.folder / "go").touch()
        place.until_status(done["task_id"], "completed")
    topics = [event["topic"] for event in place.events("htm.sla.*")]
    assert topics[0] == "htm.sla.forecast" and topics.count("htm.sla.forecast") == 1


def test_nothing_is_foretold_too_late(place: Place, past: Past, module: Any) -> None:
    """Neither after the warning's instant, nor twice, nor of a task that has ended or has no SLA."""
    shell(place, "work", "true")
    ids = [place.submit(str(n), "--handler", "work", *options)[1] for n, options in enumerate([("--sla", "30s"), ("--sla", "30s"), ()])]
    place.ok("task", "cancel", ids[1])
    told: dict[str, list[bool]] = {}
    with contextlib.closing(module.Store(str(place.db), "past")) as store:

        def tell(tx: Any) -> None:
            for task_id in ids:
                task = module.get_task(tx, task_id)
                seen = {"start_at": tx.now, "finish_at": tx.now + 60_000, "basis": {"runs": 12, "p50_ms": 60_000, "p95_ms": 60_000, "slots": 1, "ahead": 0},
                        "advice": []}  # fmt: skip
                stale = {**task, "finished_at": None}
                now, tx.now = tx.now, task["queued_at"] + 24_000
                late = module.foretell(tx, stale, seen)
                tx.now = now
                told[task_id] = [late, module.foretell(tx, stale, seen), module.foretell(tx, stale, seen)]

        store.write(tell)
    assert told == {ids[0]: [False, True, False], ids[1]: [False, False, False], ids[2]: [False, False, False]}
    assert [event["task_id"] for event in forecasts(place)] == [ids[0]]


def test_many_submissions_at_once_each_get_their_forecast(place: Place, past: Past) -> None:
    """Thirty-two processes, all doomed: each is told, and one event each."""
    shell(place, "work", BLOCK.replace("$0", str(place.folder)))
    past.run("work", 60_000)
    with place.daemon("--workers", "1"):
        words = [GRACE, "--json", "submit-intent", "doomed", "--handler", "work", "--sla", "20s"]
        started = [subprocess.Popen(words, env=place.environment, stdout=subprocess.PIPE) for _ in range(32)]
        documents = [json.loads(process.communicate(timeout=LIMIT)[0]) for process in started]
        assert all(document["predicted_miss"] is True and document["advice"] for document in documents)
        told = sorted(event["task_id"] for event in forecasts(place))
        assert told == sorted(document["task_id"] for document in documents)
        (place.folder / "go").touch()


# ---- work that waits for people


@pytest.fixture
def vault(place: Place) -> Place:
    """With a secret of medium risk and one of low, and a handler for each."""
    phrase = place.folder / "phrase"
    phrase.write_text("correct horse\n")
    phrase.chmod(0o600)
    place.ok("config", "set", "vault.argon2_memory", str(64 << 20))
    place.ok("init", "--name", "anna", "--passphrase-file", "phrase")
    place.ok("secret", "set", "token", "--passphrase-file", "phrase", stdin=b"abc")
    place.ok("secret", "set", "motd", "--risk", "low", stdin=b"abc")
    shell(place, "sealed", BLOCK.replace("$0", str(place.folder)), "--secret", "T=token")
    shell(place, "quiet", "true", "--secret", "M=motd")
    return place


def test_consent_that_is_missing_is_not_foreseen_but_a_certain_miss_is(vault: Place, past: Past) -> None:
    """Nothing is promised; what is late even with consent this instant is said: at submission, by explain and, when waiting has made it so, by a daemon."""
    past.run("sealed", 8_000)
    vault.ok("config", "set", "forecast.every", "100ms")
    with vault.daemon("--workers", "1"):
        short = vault.call("submit-intent", "too short", "--handler", "sealed", "--sla", "1s")
        assert re.match(r"grace: this will miss its SLA of 1s by [67]\S*s at least: a run takes (7\.[89]|8)\S*s$", short.err.strip()), short.err
        done = vault.json("submit-intent", "waits", "--handler", "sealed", "--sla", "12s")
        assert (done["predicted_start_at"], done["predicted_miss"]) == (None, None)
        until(lambda: len(vault.json("consent", "pending")) == 2, "two requests")
        seen = predicted(vault, done["task_id"])
        assert (seen["start_at"], seen["reason"], seen["advice"]) == (None, "waiting_consent", []) and "is for people to say" in seen["text"]
        (event,) = until(lambda: forecasts(vault, done["task_id"]), "the daemon's word once the wait has made it late")
        assert re.search(r"will miss its SLA of 12s by \S+ at least: it waits [3-8]\S*s for consent, and a run takes (7\.[89]|8)\S*s$", event["message"]), event
        assert event["predicted_finish_at"] is None and vault.task(done["task_id"])["escalation_level"] == 0
        text = " ".join(vault.ok("task", "explain", done["task_id"]).out.split())
        assert "no forecast: when it has consent" in text and "it will miss its SLA of 12s" in text
        first = next(event["task_id"] for event in forecasts(vault))
        assert re.search(r"it is late: \S+ past its SLA of 1s", vault.ok("task", "explain", first).out)
        (vault.folder / "go").touch()


def test_where_consent_stands_work_is_foreseen_as_any_other(vault: Place, past: Past) -> None:
    """Low risk asks nobody, nor does a template; what was approved for one task, and what runs, is foreseen too."""
    past.run("sealed", 60_000)
    past.run("quiet", 60_000)
    with vault.daemon("--workers", "1"):
        _, first = vault.submit("first", "--handler", "sealed")
        (request,) = until(lambda: vault.json("consent", "pending"), "the request")
        vault.ok("consent", "approve", request["consent_id"], "--passphrase-file", "phrase")
        started = instant(vault.until_status(first, "running")["started_at"])
        assert instant(predicted(vault, first)["finish_at"]) - started == pytest.approx(60, rel=0.03)
        low = vault.json("submit-intent", "nobody is asked", "--handler", "quiet", "--sla", "90s")
        assert low["predicted_miss"] is True and instant(low["predicted_finish_at"]) - started == pytest.approx(120, rel=0.03)
        asked = vault.json("submit-intent", "somebody is", "--handler", "sealed", "--sla", "1h")
        assert asked["predicted_miss"] is None and predicted(vault, asked["task_id"])["reason"] == "waiting_consent"
        vault.ok("consent", "template", "add", "nightly", "--secret", "token", "--action", "use", "--by", "handler:sealed", "--for", "7d", "--uses", "9",
                 "--passphrase-file", "phrase")  # fmt: skip
        covered = vault.json("submit-intent", "nobody now", "--handler", "sealed", "--sla", "1h")
        assert instant(covered["predicted_finish_at"]) - started == pytest.approx(240, rel=0.03), "the one before it needs nobody either now"
        batch = submitted(vault, {"goal": "nobody now", "handler": "sealed", "sla": "1h"})[0]
        assert instant(batch["predicted_finish_at"]) > instant(covered["predicted_finish_at"]) and batch["predicted_miss"] is False
        rows = vault.json("dashboard", "queued")
        assert len(rows) == 4 and all(row["predicted_start_at"] and row["reason"] is None for row in rows)
        (vault.folder / "go").touch()


def test_a_batch_with_more_lines_than_uses_left_is_not_foreseen(vault: Place, past: Past) -> None:
    """One use each is needed; whose lines would be asked about is not guessed."""
    past.run("sealed", 60_000)
    with vault.daemon("--workers", "1"):
        vault.ok("consent", "template", "add", "nightly", "--secret", "token", "--action", "use", "--by", "handler:sealed", "--for", "7d", "--uses", "3",
                 "--passphrase-file", "phrase")  # fmt: skip
        few = submitted(vault, *({"goal": "few", "handler": "sealed", "sla": "1h"} for _ in range(2)))
        assert [one["predicted_miss"] for one in few] == [False, False]
        many = submitted(vault, *({"goal": "many", "handler": "sealed", "sla": "1h"} for _ in range(4)))
        assert [(one["predicted_start_at"], one["predicted_miss"]) for one in many] == [(None, None)] * 4
        (vault.folder / "go").touch()


# ---- commands in the foreground


def test_a_command_is_foreseen_from_its_own_runs(place: Place, past: Past) -> None:
    """From ten completed runs of the same domain and goal on; what it says at its start stands in its document, a miss is told once."""
    for n in range(10):
        document = place.json("run", "--sla", "20s", "--domain", "d", "--goal", "nap", "--", "sleep", "0.2")
        assert [document[name] for name in ("predicted_start_at", "predicted_finish_at", "predicted_miss", "advice")] == [None, None, None, []], n
    for other in (("--domain", "e", "--goal", "nap"), ("--domain", "d", "--goal", "another")):
        assert place.json("run", *other, "--", "true")["predicted_start_at"] is None
    fine = place.json("run", "--sla", "20s", "--domain", "d", "--goal", "nap", "--", "sleep", "0.2")
    assert fine["predicted_miss"] is False and fine["advice"] == [] and forecasts(place) == []
    assert instant(fine["predicted_finish_at"]) - instant(fine["predicted_start_at"]) == pytest.approx(0.2, abs=0.15)
    late = place.json("run", "--sla", "100ms", "--domain", "d", "--goal", "nap", "--", "sleep", "0.2")
    assert late["predicted_miss"] is True and [one["action"] for one in late["advice"]] == ["sla"]
    (event,) = forecasts(place)
    assert event["task_id"] == late["task_id"] and re.match(r"'nap' will likely miss its SLA of 100ms by \S+: a run takes 2\d\dms; an SLA of", event["message"])
    done = place.call("run", "--sla", "100ms", "--domain", "d", "--goal", "nap", "--", "sleep", "0.2")
    assert done.err == "", "what it prints is the command's; on a terminal it says so"
    status, text = Terminal(place, "run", "--sla", "100ms", "--domain", "d", "--goal", "nap", "--", "sleep", "0.2").end()
    assert status == 0 and "grace: this will likely miss its SLA of 100ms" in text


def test_a_command_that_runs_is_foreseen_and_a_daemon_looks_at_it(place: Place, past: Past) -> None:
    """While it runs: when it ends; when it takes longer than it usually does, the event before the warning."""
    for _ in range(10):
        place.ok("run", "--goal", "nap", "--", "sleep", "0.2")
    place.ok("config", "set", "forecast.every", "100ms")
    shell(place, "busy", BLOCK.replace("$0", str(place.folder)))
    command = ("--goal", "nap", "--", "sh", "-c", BLOCK, str(place.folder))
    place.start("run", "--sla", "10h", *command)
    (running,) = until(lambda: place.json("task", "list", "--status", "running"), "the command to run")
    seen = predicted(place, running["task_id"])
    assert seen["start_at"] and seen["miss"] is False and seen["basis"]["runs"] == 10 and (seen["basis"]["slots"], seen["basis"]["ahead"]) == (1, 0)
    assert "because 10 runs took" in place.ok("task", "explain", running["task_id"]).out
    place.start("run", "--goal", "first of its kind", "--", "sh", "-c", BLOCK, str(place.folder))
    other = until(lambda: [task for task in place.json("task", "list", "--status", "running") if task["goal"] != "nap"], "the other")[0]
    assert predicted(place, other["task_id"])["reason"] == "nothing_learned" and "this command: needs 10" in predicted(place, other["task_id"])["text"]
    hanging = place.start("run", "--sla", "9s", *command)
    with place.daemon("--workers", "1"):
        place.submit("keeps the daemon looking", "--handler", "busy")
        (event,) = until(lambda: forecasts(place), "the forecast")
        assert event["handler"] is None and "its run takes longer than the" in event["message"] and event["advice"] == []
        until(lambda: place.events("htm.sla.warning"), "the warning")
        assert len(forecasts(place)) == 1
        (place.folder / "go").touch()
    assert hanging.wait(LIMIT) == 0


# ---- the queue on the screen


def test_the_queue_on_the_screen(place: Place, past: Past) -> None:
    """Who waits, what is late with what would help, why there is nothing to say; in 80 columns, and escaped."""
    shell(place, "work", BLOCK.replace("$0", str(place.folder)))
    shell(place, "new", "true")
    past.run("work", 60_000)
    assert place.ok("dashboard", "queued").out == "nothing is queued\n"
    with place.daemon("--workers", "1"):
        place.until_status(place.submit("runs", "--handler", "work")[1], "running")
        late = place.json("submit-intent", "evil \x1b[2J\u202e goal", "--handler", "work", "--sla", "70s")["task_id"]
        _, fresh = place.submit("first of its kind", "--handler", "new")
        out = place.ok("dashboard", "queued").out
        assert "LATE" in out and "goal' is going to be late; in time with" in out and "one more worker" in out
        assert "! no forecast: nothing learned yet of new: needs 10 completed runs that nothing interrupted, has 0" in out
        assert "\x1b" not in out and "\u202e" not in out and "\\u{1b}[2J" in out
        (row,) = [row for row in place.json("dashboard", "queued") if row["task_id"] == late]
        assert row["predicted_miss"] is True and row["waiting_ms"] >= 0 and any(one["saves"] for one in row["advice"])
        assert place.call("dashboard", "queued", "--handler", "nobody").status == 3
        assert place.call("dashboard", "queued", "--priority", "urgent").status == 2
        place.ok("task", "cancel", fresh)
        place.ok("task", "cancel", late)
        shell(place, "left", "true", "--on-critical", "none")
        _, over = place.submit("over already", "--handler", "left", "--sla", "10ms")
        until(lambda: place.task(over)["elapsed_ms"] > 10, "its SLA to be over")
        (row,) = place.json("dashboard", "queued")
        assert row["predicted_miss"] is True and row["predicted_start_at"] is None and predicted(place, over)["miss"] is True
        out = place.ok("dashboard", "queued").out
        assert re.search(r"^task_\S+ .* - LATE +over already$", out, re.MULTILINE)
        assert re.search(r"^! 'over already' is late: \S+ past its SLA of 10ms", out, re.MULTILINE)
        (place.folder / "go").touch()


def test_no_figure_is_cut_in_eighty_columns(place: Place, past: Past) -> None:
    """With the longest words in every column the goal gives way, not a figure; the shortened id is one that commands take."""
    shell(place, "work", BLOCK.replace("$0", str(place.folder)))
    past.run("work", 750_000)
    with one_worker_busy(place):
        ids = [place.submit(f"the archive of the shop, part {n}", "--handler", "work", "--sla", "20m", "--priority", "critical")[1] for n in range(5)]
        status, text = Terminal(place, "dashboard", "queued", env={"NO_COLOR": "1"}).end()
        lines = text.splitlines()
        assert status == 0 and max(map(len, lines)) <= 80, text
        figure = r"\d[\d.dhms]*[dhms]"
        rows = [re.fullmatch(rf"(task_\w+) +critical +{figure} +\d+% +{figure} +{figure} LATE +the arc.*", line) for line in lines[1:6]]
        shown = [row[1] for row in rows if row]
        assert len(shown) == 5, text
        assert [place.task(one)["task_id"] for one in shown] == ids and len(shown[0]) < len(ids[0])
        assert sum(line.startswith("! ") for line in lines) == 4 and lines[-1] == "! and 2 more"
        width = lines[1].index("the arc") + 5
        narrow = Terminal(place, "dashboard", "queued", env={"NO_COLOR": "1"}, columns=width).end()[1].splitlines()
        rows = [re.fullmatch(rf"(task_\w+) +critical +{figure} +\d+% +{figure} +{figure} LATE +\S.*", line) for line in narrow[1:6]]
        assert [row[1] for row in rows if row] == shown and max(map(len, narrow)) <= width, narrow
        for task_id in ids:
            place.ok("task", "cancel", task_id)
        text = "".join(json.dumps({"goal": f"part {n}", "handler": "work"}) + "\n" for n in range(3))
        alike = [row["task_id"] for row in place.ok("submit-intent", "--json", "--batch", "-", stdin=text.encode()).lines]
        named = [line.split()[0] for line in Terminal(place, "dashboard", "queued", env={"NO_COLOR": "1"}).end()[1].splitlines()[1:4]]
        assert [place.task(one)["task_id"] for one in named] == alike, "made in one instant, they begin alike, and more of each is shown"
        (place.folder / "go").touch()


def test_a_long_queue_is_reckoned(place: Place, past: Past) -> None:
    """Behind thousands: by how many are ahead, the further the later, without a play of all."""
    shell(place, "work", BLOCK.replace("$0", str(place.folder)))
    past.run("work", 1000)
    with one_worker_busy(place):
        lines = "".join(json.dumps({"goal": f"number {n}", "handler": "work", "priority": "normal"}) + "\n" for n in range(3000))
        place.ok("submit-intent", "--batch", "-", stdin=lines.encode())
        low = [place.submit(f"low {n}", "--handler", "work", "--priority", "low")[1] for n in range(3)]
        rows = place.json("dashboard", "queued", "--priority", "low")
        assert [row["task_id"] for row in rows] == low
        at = [instant(row["predicted_start_at"]) for row in rows]
        assert at[0] - instant(rows[0]["queued_at"]) == pytest.approx(3000, rel=0.05)
        assert [b - a for a, b in pairwise(at)] == [pytest.approx(1, rel=0.1)] * 2
        seen = predicted(place, low[0])
        assert seen["basis"]["ahead"] == 3000 and instant(seen["start_at"]) == pytest.approx(at[0], abs=30)
        assert "3000 tasks of its handler are ahead" in place.ok("task", "explain", low[0]).out
        for options in ([], ["--limit", "1000"]):
            rows = place.json("dashboard", "queued", *options)
            assert len(rows) == (1000 if options else 50) and [row["predicted_start_at"] for row in rows] == sorted(row["predicted_start_at"] for row in rows)
        (place.folder / "go").touch()


@pytest.mark.parametrize("later", [150, 400])
def test_work_for_later_is_not_ahead_of_what_waits_now(place: Place, past: Past, later: int) -> None:
    """However much of it there is: a line of a batch, and one more, start when what waits now is done."""
    shell(place, "work", BLOCK.replace("$0", str(place.folder)))
    past.run("work", 1000)
    with one_worker_busy(place) as running:
        started = instant(running["started_at"])
        submitted(place, *({"goal": "next month", "handler": "work", "in": "30d"} for _ in range(later)))
        submitted(place, *({"goal": "now", "handler": "work"} for _ in range(250)))
        line, _ = submitted(place, {"goal": "line", "handler": "work", "sla": "10m", "priority": "low"}, {"goal": "in an hour", "handler": "work", "in": "1h"})
        one = place.json("submit-intent", "one", "--handler", "work", "--sla", "11m", "--priority", "low")
        assert [line["predicted_miss"], one["predicted_miss"], line["advice"]] == [False, False, []]
        assert instant(line["predicted_start_at"]) - started == pytest.approx(251, rel=0.05)
        assert instant(one["predicted_start_at"]) - started == pytest.approx(252, rel=0.05)
        rows = place.json("dashboard", "queued", "--priority", "low")
        assert [instant(row["predicted_start_at"]) - started for row in rows] == [pytest.approx(251, rel=0.05), pytest.approx(252, rel=0.05)]
        (place.folder / "go").touch()


def test_a_task_far_back_that_will_climb_is_not_foretold_to_be_late(place: Place, past: Past) -> None:
    """Behind thousands of others without an SLA, but at half of its own it passes them."""
    shell(place, "work", BLOCK.replace("$0", str(place.folder)))
    past.run("work", 10_000)
    with one_worker_busy(place):
        lines = "".join(json.dumps({"goal": f"number {n}", "handler": "work"}) + "\n" for n in range(2000))
        place.ok("submit-intent", "--batch", "-", stdin=lines.encode())
        climbs = place.json("submit-intent", "climbs", "--handler", "work", "--priority", "low", "--sla", "20m")
        at = instant(climbs["predicted_start_at"]) - instant(place.task(climbs["task_id"])["queued_at"])
        assert climbs["predicted_miss"] is False and at == pytest.approx(600, abs=15)
        (row,) = place.json("dashboard", "queued", "--priority", "low")
        assert row["predicted_miss"] is False and instant(row["predicted_start_at"]) == pytest.approx(instant(climbs["predicted_start_at"]), abs=15)
        (place.folder / "go").touch()


@pytest.fixture
def hostile(place: Place) -> Callable[[str], Place]:
    """A database whose summary of durations somebody has spoilt."""
    def spoil(text: str) -> Place:
        shell(place, "work", "true")
        place.sql(f"INSERT INTO handler_forecasts (handler, runs, mean_ms, sd_ms, p50_ms, p90_ms, p95_ms, histogram, completed, made_at) VALUES {text}")
        return place

    return spoil


def test_counting_anew_makes_summaries_again(hostile: Callable[[str], Place], module: Any) -> None:
    """What forecasts go by is summed up from what was counted, and is no longer believed when that is counted anew."""
    place = hostile(f"('work', 99, 5.0, 0.0, 5.0, 5.0, 5.0, '[[41, 99]]', 0, {module.clock()})")
    place.ok("doctor", "--recount")
    assert place.sql("SELECT COUNT(*) FROM handler_forecasts") == [[0]]


def test_a_summary_from_elsewhere_is_made_again_when_it_is_old(hostile: Callable[[str], Place]) -> None:
    """Ten minutes old, or from the future: it is not believed."""
    place = hostile("('work', 99, 5.0, 0.0, 5.0, 5.0, 5.0, '[[41, 99]]', 0, 1)")
    with place.daemon("--workers", "1"):
        assert place.json("submit-intent", "a", "--handler", "work")["predicted_start_at"] is None
    assert place.sql("SELECT runs FROM handler_forecasts WHERE handler = 'work'") == [[0]]
