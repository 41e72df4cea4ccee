"""The SLA ladder: its levels fire once, in order, for work in whatever state, and its rescues do what they say.

Instants that matter to the millisecond are tried with the store's own functions and a transaction whose `now` is set;
everything else with real daemons and short deadlines.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import GRACE, Place, alive, shell, until

START = 1_900_000_000_000
LEVELS = ["htm.sla.warning", "htm.sla.violated", "htm.sla.critical"]
PAYLOAD = {
    "task_id", "intent_id", "task_type", "domain", "level", "due_at", "noticed_at", "lag_ms", "late", "sla_ms", "elapsed_ms", "elapsed_percent",
    "overdue_ms", "overdue_percent", "assigned_worker", "action", "rescue_task_id", "message",
}  # fmt: skip
FOREVER = "while :; do sleep 0.1; done"


class Bench:
    """The store's own functions at instants of our choice."""

    def __init__(self, module: Any, path: Path):
        self.module, self.store = module, module.Store(str(path), "bench")

    def at(self, now: int, work: Callable[[Any], Any]) -> Any:
        def inside(tx: Any) -> Any:
            tx.now = now
            return work(tx)

        return self.store.write(inside)

    def handler(self, name: str, **options: Any) -> None:
        self.at(START, lambda tx: self.module.put_handler(tx, {"name": name, "argv": '["true"]', "cwd": "/", "rescue": None, **options}, False))

    def submit(self, now: int = START, **spec: Any) -> str:
        done = self.at(now, lambda tx: self.module.submit(tx, [{"goal": "exact work", "handler": "work", **spec}]))
        return str(done[0]["task_id"])

    def sweep(self, now: int) -> int:
        return int(self.at(now, self.module.sweep))

    def begin(self, task_id: str, now: int) -> str:
        def work(tx: Any) -> str:
            taken = self.module.take(tx, task_id, "bench")
            self.module.start(tx, taken, os.getpid(), None, None)
            return str(taken["attempt_id"])

        return str(self.at(now, work))

    def end(self, task_id: str, attempt_id: str, now: int, **ending: Any) -> None:
        self.at(now, lambda tx: self.module.end_attempt(tx, task_id, attempt_id, {"outcome": "completed", "ended_by": "exit", **ending}))

    def task(self, task_id: str) -> dict[str, Any]:
        return dict(self.store.one("SELECT * FROM htm_tasks WHERE task_id = :id", id=task_id))

    def events(self, task_id: str, topic: str = "%") -> list[tuple[str, dict[str, Any]]]:
        rows = self.store.all("SELECT topic, payload FROM events WHERE subject = :id AND topic LIKE :topic ORDER BY seq", id=task_id, topic=topic)
        return [(row["topic"], json.loads(row["payload"])) for row in rows]

    def levels(self, task_id: str) -> list[str]:
        return [topic for topic, _ in self.events(task_id, "htm.sla.%")]

    def total(self, name: str) -> int:
        return int(self.store.value("SELECT value FROM counters WHERE name = :name", name=name) or 0)

    def rescues(self, task_id: str) -> list[dict[str, Any]]:
        return list(self.store.all("SELECT * FROM htm_tasks WHERE parent_task_id = :id", id=task_id))


@pytest.fixture
def bench(module: Any, place: Place) -> Iterator[Bench]:
    here = Bench(module, place.db)
    yield here
    here.store.close()


def sla_events(place: Place, task_id: str) -> list[dict[str, Any]]:
    return [event for event in place.events("htm.sla.*") if event["payload"].get("task_id") == task_id]


def until_level(place: Place, task_id: str, level: int) -> dict[str, Any]:
    def reached() -> dict[str, Any] | None:
        task = place.task(task_id)
        return task if task["escalation_level"] >= level else None

    return dict(until(reached, f"{task_id} to reach level {level}"))


def rescue_of(place: Place, task_id: str) -> dict[str, Any]:
    """The one rescue of a task, once it is final."""
    def final() -> dict[str, Any] | None:
        found = [task for task in place.json("task", "list") if task["parent_task_id"] == task_id]
        assert len(found) <= 1, "a task has at most one rescue"
        return place.task(found[0]["task_id"]) if found and found[0]["finished_at"] else None

    return dict(until(final, f"the rescue of {task_id} to end"))


def written_pid(path: Path) -> int:
    return int(until(lambda: path.exists() and path.read_text().strip(), f"a pid in {path.name}"))


# ---- exact instants


def test_each_level_fires_at_its_instant_once_and_in_order(bench: Bench) -> None:
    """80, 100 and 200 percent: not a millisecond early, and never twice."""
    bench.handler("work")
    task_id = bench.submit(sla_ms=1000, priority="critical")
    for offset, expected in ((799, 0), (800, 1), (800, 1), (999, 1), (1000, 2), (1001, 2), (1999, 2), (2000, 3), (2000, 3), (900_000, 3)):
        bench.sweep(START + offset)
        assert bench.levels(task_id) == LEVELS[:expected], offset
        assert bench.task(task_id)["escalation_level"] == expected
    assert len(bench.rescues(task_id)) == 1


def test_the_event_of_a_step_says_all(bench: Bench) -> None:
    """The payload of each level holds the fields of the contract with the figures as of the step."""
    bench.handler("work")
    task_id = bench.submit(sla_ms=1000, domain="shop")
    bench.begin(task_id, START + 10)
    for offset in (850, 1000, 2000):
        bench.sweep(START + offset)
    warning, violated, critical = (payload for _, payload in bench.events(task_id, "htm.sla.%"))
    for payload in (warning, violated, critical):
        assert set(payload) >= PAYLOAD
        assert (payload["task_id"], payload["task_type"], payload["domain"], payload["sla_ms"]) == (task_id, "work", "shop", 1000)
        assert payload["intent_id"] == bench.task(task_id)["intent_id"] and payload["assigned_worker"] == "bench"
        assert "exact work" in payload["message"]
    names = ("level", "due_at", "noticed_at", "lag_ms", "late", "elapsed_ms", "elapsed_percent", "overdue_ms", "overdue_percent", "action")
    assert [warning[name] for name in names] == ["warning", START + 800, START + 850, 50, False, 800, 80, 0, 0, "warned"]
    assert [violated[name] for name in names] == ["violated", START + 1000, START + 1000, 0, False, 1000, 100, 0, 0, "escalated"]
    assert [critical[name] for name in names] == ["critical", START + 2000, START + 2000, 0, False, 2000, 200, 1000, 100, "rescue_spawned"]
    assert warning["rescue_task_id"] is None and violated["rescue_task_id"] is None
    assert critical["rescue_task_id"] == bench.rescues(task_id)[0]["task_id"]


@pytest.mark.parametrize(("priority", "after"), [("low", "high"), ("normal", "high"), ("high", "high"), ("critical", "critical")])
def test_a_violation_raises_the_priority_to_high_and_never_lowers_it(bench: Bench, priority: str, after: str) -> None:
    """At 100 percent a running task becomes at least high and has missed its SLA."""
    bench.handler("work")
    task_id = bench.submit(sla_ms=1000, priority=priority)
    attempt_id = bench.begin(task_id, START)
    bench.sweep(START + 999)
    assert (bench.task(task_id)["priority"], bench.task(task_id)["sla_met"]) == (priority, None)
    bench.sweep(START + 1000)
    assert (bench.task(task_id)["priority"], bench.task(task_id)["sla_met"]) == (after, 0)
    changes = [payload for _, payload in bench.events(task_id, "htm.task.update") if "previous_priority" in payload]
    assert [change["reason"] for change in changes] == (["sla_violated"] if priority != after else [])
    bench.end(task_id, attempt_id, START + 1500)
    assert (bench.task(task_id)["sla_met"], bench.task(task_id)["sla_buffer_ms"]) == (0, -500)


def test_a_handler_sets_its_own_thresholds(bench: Bench) -> None:
    """--warn-at and --critical-at of the handler move the first and the last level."""
    bench.handler("work", warn_at=0.25, critical_at=3.5)
    task_id = bench.submit(sla_ms=1000)
    bench.begin(task_id, START)
    for offset, expected in ((249, 0), (250, 1), (999, 1), (1000, 2), (3499, 2), (3500, 3)):
        bench.sweep(START + offset)
        assert len(bench.levels(task_id)) == expected, offset


def test_levels_passed_unseen_fire_each_in_order_and_late(bench: Bench) -> None:
    """Nobody looked until 250 percent: three events, each with its true instant, marked late; one rescue."""
    bench.handler("work")
    task_id = bench.submit(sla_ms=1000)
    bench.begin(task_id, START)
    bench.sweep(START + 2501)
    payloads = [payload for _, payload in bench.events(task_id, "htm.sla.%")]
    assert bench.levels(task_id) == LEVELS
    assert [payload["due_at"] - START for payload in payloads] == [800, 1000, 2000]
    assert [payload["lag_ms"] for payload in payloads] == [1701, 1501, 501]
    assert [payload["late"] for payload in payloads] == [True, True, True]
    assert len(bench.rescues(task_id)) == 1


def test_late_begins_beyond_half_a_second_or_before_the_noticing_process(bench: Bench) -> None:
    """A lag of 500 ms is not late yet; a step due before the noticing daemon started is late at any lag."""
    bench.handler("work")
    first, second = bench.submit(sla_ms=1000), bench.submit(sla_ms=1000)
    bench.begin(first, START)
    bench.begin(second, START)
    bench.at(START + 1300, lambda tx: bench.module.take_due_steps(tx, bench.task(first), 600_000))
    assert [payload["late"] for _, payload in bench.events(first, "htm.sla.%")] == [False, False]
    bench.store.since = START + 900
    bench.sweep(START + 1300)
    assert [payload["late"] for _, payload in bench.events(second, "htm.sla.%")] == [True, False]


@pytest.mark.parametrize(("offset", "expected", "met"), [(799, 0, 1), (800, 1, 1), (1000, 2, 0), (2600, 3, 0)])
def test_a_task_that_finishes_first_gets_the_missing_events_with_its_end(bench: Bench, offset: int, expected: int, met: int) -> None:
    """Steps that nobody had noticed are written by the finishing transaction, before its own event, without a rescue."""
    bench.handler("work")
    task_id = bench.submit(sla_ms=1000, priority="high")
    attempt_id = bench.begin(task_id, START)
    bench.end(task_id, attempt_id, START + offset)
    topics = [topic for topic, _ in bench.events(task_id)]
    assert bench.levels(task_id) == LEVELS[:expected]
    assert topics.index("htm.task.completed") > max([topics.index(topic) for topic in LEVELS[:expected]], default=0)
    task = bench.task(task_id)
    assert (task["escalation_level"], task["sla_met"]) == (expected, met)
    assert bench.rescues(task_id) == []
    assert all(payload["rescue_task_id"] is None for _, payload in bench.events(task_id, "htm.sla.%"))
    bench.sweep(START + 99_000)
    assert bench.levels(task_id) == LEVELS[:expected], "nothing fires after a final state"


@pytest.mark.parametrize("outcome", ["failed", "timeout", "cancelled"])
def test_nothing_fires_after_any_final_state(bench: Bench, outcome: str) -> None:
    """A task that ended in whatever way before its first step stays silent."""
    bench.handler("work", max_attempts=1)
    task_id = bench.submit(sla_ms=1000, max_attempts=1)
    if outcome == "cancelled":
        bench.at(START + 100, lambda tx: bench.module.cancel(tx, bench.task(task_id)))
    else:
        bench.end(task_id, bench.begin(task_id, START + 50), START + 100, outcome=outcome)
    assert bench.task(task_id)["status"] == outcome
    assert bench.sweep(START + 10_000) == 0
    assert bench.levels(task_id) == [] and bench.rescues(task_id) == []


@pytest.mark.parametrize(("given", "half", "four_fifths", "steps"), [
    ("low", "high", "critical", 2), ("normal", "high", "critical", 2), ("high", "high", "critical", 1), ("critical", "critical", "critical", 0),
])  # fmt: skip
def test_urgency_moves_a_queued_task_forward(bench: Bench, given: str, half: str, four_fifths: str, steps: int) -> None:
    """Half the SLA gone: at least high; four fifths gone: critical; with an event and the counter for each change."""
    bench.handler("work")
    task_id = bench.submit(sla_ms=1000, priority=given)
    for offset, expected in ((499, given), (500, half), (799, half), (800, four_fifths), (5000, "critical")):
        bench.sweep(START + offset)
        assert bench.task(task_id)["priority"] == expected, offset
    changes = [payload for _, payload in bench.events(task_id, "htm.task.update") if "previous_priority" in payload]
    assert [change["reason"] for change in changes] == ["urgency_half", "urgency_four_fifths"][2 - steps :]
    assert bench.total("queue_reprioritizations") == steps


def test_urgency_leaves_running_tasks_alone(bench: Bench) -> None:
    """Only what waits is moved forward."""
    bench.handler("work")
    task_id = bench.submit(sla_ms=1000, priority="low")
    bench.begin(task_id, START)
    bench.sweep(START + 900)
    assert bench.task(task_id)["priority"] == "low"
    assert bench.levels(task_id) == LEVELS[:1]


def test_a_task_without_an_sla_ages_up_one_class_at_a_time(bench: Bench) -> None:
    """Every ten minutes one class, up to critical, then nothing; never an event of the SLA."""
    bench.handler("work")
    task_id = bench.submit(priority="low")
    minute = 60_000
    for offset, expected in ((10 * minute - 1, "low"), (10 * minute, "normal"), (20 * minute - 1, "normal"), (20 * minute, "high"),
                             (30 * minute, "critical"), (90 * minute, "critical")):  # fmt: skip
        bench.sweep(START + offset)
        assert bench.task(task_id)["priority"] == expected, offset
    changes = [payload for _, payload in bench.events(task_id, "htm.task.update")]
    assert [(change["reason"], change["priority"]) for change in changes] == [("ageing", "normal"), ("ageing", "high"), ("ageing", "critical")]
    assert bench.total("queue_reprioritizations") == 3
    assert bench.levels(task_id) == []


def test_a_rescue_has_a_warning_and_a_violation_but_is_never_rescued(bench: Bench) -> None:
    """However late a rescue is, it stays at level 2 and gets no rescue of its own."""
    bench.handler("saviour", sla_ms=1)
    bench.handler("work", rescue="saviour")
    task_id = bench.submit(sla_ms=1000)
    bench.sweep(START + 2000)
    (rescue,) = bench.rescues(task_id)
    assert (rescue["sla_ms"], rescue["priority"], rescue["handler"], rescue["task_type"]) == (500, "critical", "saviour", "rescue")
    assert rescue["intent_id"] == bench.task(task_id)["intent_id"]
    for offset, expected in ((399, 0), (400, 1), (500, 2), (1000, 2), (600_000, 2)):
        bench.sweep(START + 2000 + offset)
        assert bench.levels(rescue["task_id"]) == LEVELS[:expected], offset
    assert bench.rescues(rescue["task_id"]) == []
    assert bench.total("sub_agents_spawned") == 1


def test_the_clock_of_a_delayed_task_starts_with_its_instant(bench: Bench) -> None:
    """With --at nothing counts before that instant comes, and the levels are reckoned from it."""
    bench.handler("work")
    task_id = bench.submit(sla_ms=1000, at=START + 50_000)
    bench.sweep(START + 49_999)
    assert bench.levels(task_id) == []
    for offset, expected in ((799, 0), (800, 1), (1000, 2), (2000, 3)):
        bench.sweep(START + 50_000 + offset)
        assert len(bench.levels(task_id)) == expected, offset


def test_an_unblocked_task_keeps_its_clock(bench: Bench) -> None:
    """Waiting for another intent counts: what it needs ends at 90 percent, the violation comes at 100."""
    bench.handler("work")
    first = bench.submit()
    second = bench.submit(sla_ms=1000, after=[bench.task(first)["intent_id"]])
    assert bench.task(second)["status"] == "blocked"
    bench.sweep(START + 850)
    assert bench.levels(second) == LEVELS[:1] and bench.task(second)["priority"] == "normal"
    bench.end(first, bench.begin(first, START + 860), START + 900)
    assert bench.task(second)["status"] == "queued"
    bench.sweep(START + 901)
    assert bench.task(second)["priority"] == "critical", "now that it is queued, its urgency counts"
    bench.sweep(START + 1000)
    assert bench.levels(second) == LEVELS[:2]


def test_a_step_between_claim_and_start_keeps_the_counts_right(bench: Bench) -> None:
    """A task climbs after it was claimed and before its process runs: the live counts still equal the rows."""
    bench.handler("work")
    task_id = bench.submit(sla_ms=1000)
    taken = bench.at(START + 10, lambda tx: bench.module.take(tx, task_id, "bench"))
    bench.sweep(START + 1000)
    bench.at(START + 1001, lambda tx: bench.module.start(tx, taken, os.getpid(), None, None))
    counts = bench.store.all("SELECT status, priority, level, n FROM task_counts WHERE n <> 0")
    assert [tuple(row.values()) for row in counts] == [("running", "high", 2, 1)]


def test_a_rescue_cancelled_while_it_looks_leaves_no_open_attempt(bench: Bench) -> None:
    """The original ends between the begin and the end of its built-in rescue: the rescue is over with all that belongs to it."""
    bench.handler("work", paused=1)
    task_id = bench.submit(sla_ms=1000)
    bench.sweep(START + 2000)
    (rescue,) = bench.rescues(task_id)
    begun = bench.at(START + 2001, lambda tx: bench.module.begin_rescue(tx, rescue, "bench"))
    bench.at(START + 2002, lambda tx: bench.module.cancel(tx, bench.task(task_id)))
    assert bench.module.perform_rescue(bench.store, begun, "bench") is None
    assert (bench.task(rescue["task_id"])["status"], bench.task(rescue["task_id"])["reason"]) == ("cancelled", "original_finished")
    assert bench.store.all("SELECT attempt_id FROM htm_task_attempts WHERE finished_at IS NULL") == []


# ---- real daemons


def test_the_ladder_climbs_for_work_that_never_starts_or_never_ends(place: Place) -> None:
    """Queued, delayed by back-off, blocked, paused, external and running tasks all get each level exactly once, in order."""
    shell(place, "endless", FOREVER)
    shell(place, "paused", "true")
    place.ok("handler", "pause", "paused")
    place.handler("outside", "--external")
    shell(place, "failing", "exit 1", "--backoff", "1h")
    shell(place, "narrow", FOREVER, "--concurrency", "1")
    with place.daemon("--workers", "3", "--grace-period", "1ms"):
        needed, _ = place.submit("needed", "--handler", "paused")
        place.until_status(place.submit("holds the only place", "--handler", "narrow")[1], "running")
        tasks = {
            "running": place.submit("runs on", "--handler", "endless", "--sla", "1s")[1],
            "paused": place.submit("paused", "--handler", "paused", "--sla", "1s")[1],
            "external": place.submit("outside", "--handler", "outside", "--sla", "1s")[1],
            "blocked": place.submit("blocked", "--handler", "endless", "--sla", "1s", "--after", needed)[1],
            "back-off": place.submit("fails", "--handler", "failing", "--sla", "1s")[1],
            "concurrency": place.submit("has no place", "--handler", "narrow", "--sla", "1s")[1],
        }
        for task_id in tasks.values():
            until_level(place, task_id, 3)
        found = {name: rescue_of(place, task_id) for name, task_id in tasks.items()}
    for name, task_id in tasks.items():
        events = sla_events(place, task_id)
        assert [event["topic"] for event in events] == LEVELS, name
        assert events[2]["payload"]["rescue_task_id"] == found[name]["task_id"], name
        assert all(event["payload"]["noticed_at"] >= event["payload"]["due_at"] for event in events), name
        rescue = found[name]
        assert (rescue["status"], rescue["priority"], rescue["sla_ms"], rescue["task_type"]) == ("completed", "critical", 500, "rescue"), name
    words = {"running": "running", "paused": "paused", "external": "external", "blocked": "waits for other intents", "back-off": "not to start before",
             "concurrency": "--concurrency"}  # fmt: skip
    for name, word in words.items():
        result = found[name]["result"]
        assert word in result["found"], name
        assert (result["action"], result["stuck_task_id"]) == ("report", tasks[name]), name
        assert result["did"], name
    assert place.task(tasks["paused"])["status"] == "queued", "a rescue that only reports leaves the task alone"


def test_a_running_task_past_its_sla_is_high_and_counted_as_an_escalation(place: Place) -> None:
    """A running task with --sla 1s: after 1.5 s its priority is high and escalations_triggered has grown."""
    shell(place, "endless", FOREVER)
    with place.daemon("--grace-period", "1ms"):
        before = place.json("status")["escalations_triggered"]
        _, task_id = place.submit("runs on", "--handler", "endless", "--sla", "1s", "--priority", "low")
        place.until_status(task_id, "running")
        task = until(lambda: (now := place.task(task_id))["elapsed_ms"] >= 1500 and now, "1.5 s to pass")
        assert task["priority"] == "high" and task["sla_met"] is False and task["status"] == "running"
        status = place.json("status")
        assert status["escalations_triggered"] == before + 1
        assert status["active_violations"] >= 1
        assert task_id in [row["task_id"] for row in place.json("violations")]


def test_an_intent_and_its_task_are_linked_and_learned_from_once(place: Place) -> None:
    """Both name each other, the intent completes with its task, is learned from, and has exactly one outcome."""
    shell(place, "work", "true")
    intent_id, task_id = place.submit("learn from me", "--handler", "work", "--sla", "1m", "--confidence", "0.75", "--domain", "lessons")
    place.ok("daemon", "--once")
    intent, task = place.intent(intent_id), place.task(task_id)
    assert (intent["htm_task_id"], task["intent_id"]) == (task_id, intent_id)
    assert (intent["status"], task["status"], intent["success"], intent["learned_from"], intent["sla_met"]) == ("completed", "completed", True, True, True)
    rows = place.sql(f"SELECT intent_id, success, action_type, confidence_score, context FROM outcome_records WHERE task_id = '{task_id}'")
    assert [row[:4] for row in rows] == [[intent_id, 1, "intent_lessons", 0.75]]
    assert json.loads(rows[0][4])["sla_met"] is True
    assert [event["payload"]["task_id"] for event in place.events("learning.outcome")] == [task_id]
    place.ok("daemon", "--once")
    assert place.sql("SELECT COUNT(*) AS n FROM outcome_records") == [[1]]


def test_a_task_past_twice_its_sla_gets_exactly_one_rescue(place: Place) -> None:
    """One child task: parent_task_id, priority critical, half the SLA; and the ladder goes on looking without a second one."""
    shell(place, "endless", FOREVER)
    with place.daemon("--grace-period", "1ms"):
        intent_id, task_id = place.submit("stuck", "--handler", "endless", "--sla", "500ms")
        until_level(place, task_id, 3)
        rescue = rescue_of(place, task_id)
        until(lambda: place.task(task_id)["elapsed_ms"] >= 2500, "five times the SLA")
    rescues = [task for task in place.json("task", "list") if task["task_type"] == "rescue"]
    assert [task["task_id"] for task in rescues] == [rescue["task_id"]]
    assert (rescue["parent_task_id"], rescue["intent_id"], rescue["priority"], rescue["sla_ms"]) == (task_id, intent_id, "critical", 250)
    assert place.intent(intent_id)["htm_task_id"] == task_id, "a rescue is never the intent's own task"
    assert place.json("status")["sub_agents_spawned"] == 1
    assert place.sql(f"SELECT COUNT(*) AS n FROM outcome_records WHERE task_id = '{rescue['task_id']}'") == [[0]]
    (violation,) = [row for row in place.json("violations", "--level", "critical", "--all") if row["task_id"] == task_id]
    assert violation["rescue_task_id"] == rescue["task_id"]


def test_steps_due_while_no_daemon_ran_are_caught_up_and_marked_late(place: Place) -> None:
    """A daemon that starts after 200 percent fires all three levels in order, late, and rescues at once."""
    shell(place, "work", "true")
    _, task_id = place.submit("left alone", "--handler", "work", "--sla", "500ms")
    until(lambda: place.task(task_id)["elapsed_ms"] > 1600, "three times the SLA")
    assert sla_events(place, task_id) == []
    place.ok("daemon", "--once")
    events = sla_events(place, task_id)
    assert [event["topic"] for event in events] == LEVELS
    assert all(event["payload"]["late"] is True and event["payload"]["lag_ms"] > 500 for event in events)
    assert place.task(task_id)["status"] == "completed"
    assert rescue_of(place, task_id)["status"] in ("completed", "cancelled")


def test_ageing_by_a_daemon_follows_the_setting(place: Place) -> None:
    """With queue.age_every at 300 ms a waiting task without an SLA climbs to critical, an event for each class."""
    shell(place, "paused", "true")
    place.ok("handler", "pause", "paused")
    place.ok("config", "set", "queue.age_every", "300ms")
    with place.daemon():
        _, task_id = place.submit("ages", "--handler", "paused", "--priority", "low")
        until(lambda: place.task(task_id)["priority"] == "critical", "it to age to critical")
        updates = [event["payload"] for event in place.events("htm.task.update") if event["payload"]["task_id"] == task_id]
        assert [(update["reason"], update["previous_priority"], update["priority"]) for update in updates] == [
            ("ageing", "low", "normal"), ("ageing", "normal", "high"), ("ageing", "high", "critical")]  # fmt: skip
        assert place.json("status")["queue_reprioritizations"] == 3


ROW = """INSERT INTO htm_tasks (task_id, task_type, domain, handler, goal, payload, status, priority, order_at, next_at, aged_at, sla_ms, sla_deadline,
    warn_at, critical_at, max_attempts, created_at, queued_at, updated_at, updated_by%s)
  VALUES ('task_odd', 'paused', 'general', 'paused', 'odd', '{}', 'queued', 'normal', 0, 1, 0, %s, %s, %s, %s, 3, 1, %s, 1, 'somebody'%s)"""


def test_a_row_written_with_the_sqlite3_shell_climbs_like_any_other(place: Place) -> None:
    """A task inserted past the program, without the columns that may be NULL, gets its levels and an intent."""
    shell(place, "paused", "true")
    place.ok("handler", "pause", "paused")
    place.sql(ROW % ("", "1000", "1001", "0.8", "2.0", "1", ""))
    with place.daemon():
        until_level(place, "task_odd", 3)
    assert [event["topic"] for event in sla_events(place, "task_odd")] == LEVELS
    assert place.intent(place.task("task_odd")["intent_id"])["htm_task_id"] == "task_odd"


@pytest.mark.parametrize(("sla", "deadline", "warn", "critical", "queued"), [
    ("9000000000000000000", "9000000000000000000", "0.8", "2.0", "1"),
    ("1000", "9000000000000000000", "0.8", "2.0", "8999999999999999000"),
    ("1000", "-4000", "0.8", "2.0", "-5000"),
    ("1000", "1001", "5.0", "2.0", "1"),
    ("1000", "1001", "0.8", "9e99", "1"),
])  # fmt: skip
def test_an_odd_row_is_set_aside_with_one_event_and_stops_nothing(place: Place, sla: str, deadline: str, warn: str, critical: str, queued: str) -> None:
    """A row with impossible times, written past the program, costs one htm.task.invalid; other tasks climb and finish."""
    shell(place, "paused", "true")
    place.ok("handler", "pause", "paused")
    shell(place, "work", "true")
    place.sql(ROW % (", progress, result", sla, deadline, warn, critical, queued, ", 'null', 'null'"))
    with place.daemon():
        until(lambda: place.events("htm.task.invalid"), "the odd row to be set aside")
        _, late = place.submit("climbs", "--handler", "paused", "--sla", "300ms")
        _, done = place.submit("works", "--handler", "work", "--sla", "1m")
        until_level(place, late, 3)
        place.until_status(done, "completed")
    place.ok("daemon", "--once")
    invalid = place.events("htm.task.invalid")
    assert [event["payload"]["task_id"] for event in invalid] == ["task_odd"]
    assert invalid[0]["payload"]["reason"]
    assert [event["topic"] for event in sla_events(place, late)] == LEVELS
    assert sla_events(place, "task_odd") == []
    assert "task_odd" in [task["task_id"] for task in place.json("task", "list")], "it is still shown"
    assert place.events("daemon.trouble") == []


def test_a_payload_that_is_no_object_fails_its_own_task_only(place: Place) -> None:
    """A row whose payload was overwritten with a list ends; what was claimed beside it still runs."""
    shell(place, "work", "true")
    odd = place.submit("odd", "--handler", "work")[1]
    others = [place.submit(f"good {number}", "--handler", "work")[1] for number in range(3)]
    place.sql(f"UPDATE htm_tasks SET payload = '[1]' WHERE task_id = '{odd}'")
    with place.daemon("--workers", "4", "--grace-period", "1ms"):
        for task_id in others:
            place.until_status(task_id, "completed")
        task = place.until_status(odd, "failed", "completed", "queued")
        assert task["status"] != "assigned"


# ---- rescues


def test_a_task_that_never_started_runs_at_once_in_an_extra_slot(place: Place) -> None:
    """The only worker is busy: at 200 percent the rescue starts the waiting task beside it, and says so."""
    shell(place, "endless", FOREVER)
    shell(place, "quick", "echo done")
    with place.daemon("--workers", "1", "--grace-period", "1ms"):
        _, busy = place.submit("busy", "--handler", "endless")
        place.until_status(busy, "running")
        _, task_id = place.submit("starved", "--handler", "quick", "--sla", "500ms")
        task = place.until_status(task_id, "completed", "failed")
        assert place.task(busy)["status"] == "running", "the busy one was left alone"
        rescue = rescue_of(place, task_id)
    assert (task["status"], task["sla_met"], task["escalation_level"]) == ("completed", False, 3)
    assert (rescue["status"], rescue["result"]["action"]) == ("completed", "run")
    assert "never started" in rescue["result"]["found"] and "extra slot" in rescue["result"]["did"]
    assert place.json("status")["tasks_rescued"] == 1
    assert place.ok("task", "log", task_id).out == "done\n"
    assert place.sql(f"SELECT COUNT(*) AS n FROM htm_task_attempts WHERE task_id = '{task_id}'") == [[1]]


def test_the_rescue_of_a_running_task_records_what_it_is_doing(place: Place) -> None:
    """The result holds state, CPU time, command and open files of each process, and the last output."""
    shell(place, "endless", f"exec 7<schedule; echo starting to hang; {FOREVER}")
    (place.folder / "schedule").write_text("x")
    with place.daemon("--grace-period", "1ms"):
        _, task_id = place.submit("hangs", "--handler", "endless", "--sla", "500ms")
        rescue = rescue_of(place, task_id)
        assert place.task(task_id)["status"] == "running"
        pid = place.sql(f"SELECT pid FROM htm_task_attempts WHERE task_id = '{task_id}'")[0][0]
    assert "still running" in rescue["result"]["found"] and rescue["result"]["action"] == "report"
    diagnosis = rescue["result"]["diagnosis"]
    assert "starting to hang" in diagnosis["last_output"]
    leader = next(process for process in diagnosis["processes"] if process["pid"] == pid)
    assert leader["state"] in "RSD" and leader["cpu_seconds"] >= 0 and leader["command"].startswith("sh -c")
    assert str(place.folder / "schedule") in leader["open_files"]


def test_on_critical_retry_ends_the_attempt_and_starts_another(place: Place) -> None:
    """The hanging attempt is ended, its processes too, and the second one completes the task."""
    shell(place, "twice", f"[ -e second ] && exit 0; touch second; echo $$ > pid; {FOREVER}", "--on-critical", "retry", "--kill-after", "1s")
    with place.daemon("--grace-period", "1ms"):
        _, task_id = place.submit("hangs once", "--handler", "twice", "--sla", "700ms")
        first = written_pid(place.folder / "pid")
        task = place.until_status(task_id, "completed", "failed")
        rescue = rescue_of(place, task_id)
        assert not alive(first)
    assert (task["status"], task["escalation_level"]) == ("completed", 3)
    assert (rescue["status"], rescue["result"]["action"]) == ("completed", "retry")
    attempts = place.sql(f"SELECT outcome, attempt_number FROM htm_task_attempts WHERE task_id = '{task_id}' ORDER BY created_at")
    assert [row[0] for row in attempts] == ["rescued", "completed"]
    assert [event["topic"] for event in sla_events(place, task_id)] == LEVELS


def test_on_critical_none_spawns_no_rescue(place: Place) -> None:
    """The event still comes and says that nothing was done."""
    shell(place, "endless", FOREVER, "--on-critical", "none")
    with place.daemon("--grace-period", "1ms"):
        _, task_id = place.submit("stuck", "--handler", "endless", "--sla", "400ms")
        until_level(place, task_id, 3)
        until(lambda: place.task(task_id)["elapsed_ms"] > 1500, "some time to pass")
        assert [task for task in place.json("task", "list") if task["task_type"] == "rescue"] == []
    critical = sla_events(place, task_id)[2]["payload"]
    assert critical["rescue_task_id"] is None and critical["action"] == "recorded"
    assert place.json("status")["sub_agents_spawned"] == 0


def test_a_rescue_finds_the_worker_dead_while_its_leftovers_are_ended(place: Place) -> None:
    """The daemon was killed, its handler ignores TERM: at 200 percent the worker counts as dead, and the task goes back."""
    text = f"[ -e again ] && exit 0; touch again; trap '' TERM; echo $$ > pid; {FOREVER}"
    shell(place, "stubborn", text, "--kill-after", "5s")
    with place.daemon("--workers", "1") as first:
        _, task_id = place.submit("outlives its daemon", "--handler", "stubborn", "--sla", "1500ms")
        place.until_status(task_id, "running")
        left = written_pid(place.folder / "pid")
        first.send_signal(signal.SIGKILL)
        first.wait()
    with place.daemon("--workers", "1"):
        rescue = rescue_of(place, task_id)
        place.until_status(task_id, "completed")
    assert not alive(left)
    assert "worker of the task is dead" in rescue["result"]["found"]
    assert rescue["result"]["action"] == "recover"
    attempts = place.sql(f"SELECT outcome FROM htm_task_attempts WHERE task_id = '{task_id}' ORDER BY created_at")
    assert attempts == [["lost"], ["completed"]]


RESCUER = """#!/bin/sh
cat > told
stuck=$(python3 -c 'import json; print(json.load(open("told"))["context"]["stuck_task_id"])')
{command}
echo $? > commanded
sleep 0.5
echo "the rescue went on" > after
"""


@pytest.mark.parametrize(("command", "status"), [
    ("{grace} task complete $stuck --result '{{\"by\": \"rescue\"}}'", "completed"), ("{grace} task cancel $stuck", "cancelled"),
    ("{grace} task retry $stuck", "cancelled"),
])  # fmt: skip
def test_a_rescue_handler_ends_the_original_by_command_and_goes_on(place: Place, command: str, status: str) -> None:
    """It is told id, payload, log and diagnosis of the stuck task; complete, cancel and retry work, and it ends itself as completed."""
    script = place.folder / "rescuer"
    script.write_text(RESCUER.format(command=command.format(grace=GRACE)))
    script.chmod(0o755)
    place.handler("rescuer", "--", str(script))
    shell(place, "hangs", f"[ -e again ] && exit 0; touch again; echo so far; echo $$ > pid; {FOREVER}", "--rescue", "rescuer", "--kill-after", "1s")
    with place.daemon("--workers", "2", "--grace-period", "1ms"):
        intent_id, task_id = place.submit("stuck", "--handler", "hangs", "--sla", "600ms", "--context", '{"colour": "blue"}')
        pid = written_pid(place.folder / "pid")
        rescue = rescue_of(place, task_id)
        until(lambda: not alive(pid), "the stuck process to end")
        intent = until(lambda: (now := place.intent(intent_id))["completed_at"] and now, "the intent to end")
    assert (place.folder / "commanded").read_text().strip() == "0"
    assert (place.folder / "after").exists() and rescue["status"] == "completed"
    task, told = place.task(task_id), json.loads((place.folder / "told").read_text())["context"]
    assert task["status"] == status
    assert told["stuck_task_id"] == task_id and told["stuck_payload"]["context"] == {"colour": "blue"}
    assert Path(told["log_path"]).read_text() == "so far\n"
    assert pid in [process["pid"] for process in told["diagnosis"]["processes"]]
    assert "so far" in told["diagnosis"]["last_output"]
    if "complete" in command:
        assert (task["result"], intent["status"]) == ({"by": "rescue"}, "completed")
    elif "cancel" in command:
        assert intent["status"] == "cancelled"
    else:
        assert (task["reason"], intent["status"]) == ("rescued", "completed")
        assert place.task(intent["htm_task_id"])["retry_of"] == task_id


def test_a_rescue_handler_completes_a_task_that_never_started(place: Place) -> None:
    """The original of a paused handler is done by its rescue, without ever having been started."""
    script = place.folder / "rescuer"
    script.write_text(RESCUER.format(command=f"{GRACE} task complete $stuck"))
    script.chmod(0o755)
    place.handler("rescuer", "--", str(script))
    shell(place, "paused", "true", "--rescue", "rescuer")
    place.ok("handler", "pause", "paused")
    with place.daemon("--grace-period", "1ms"):
        intent_id, task_id = place.submit("waits", "--handler", "paused", "--sla", "300ms")
        rescue = rescue_of(place, task_id)
    assert (rescue["status"], place.task(task_id)["status"], place.intent(intent_id)["status"]) == ("completed",) * 3
    assert (place.folder / "after").exists()


def test_the_end_of_the_original_cancels_its_open_rescue(place: Place) -> None:
    """The original ends by itself: its rescue is cancelled as original_finished and the rescue's process is ended."""
    shell(place, "rescuer", f"echo $$ > rescuer.pid; {FOREVER}", "--kill-after", "1s")
    shell(place, "slow", "until [ -e enough ]; do sleep 0.05; done", "--rescue", "rescuer")
    with place.daemon("--workers", "2", "--grace-period", "1ms"):
        _, task_id = place.submit("slow", "--handler", "slow", "--sla", "400ms")
        pid = written_pid(place.folder / "rescuer.pid")
        (place.folder / "enough").touch()
        rescue = rescue_of(place, task_id)
        assert place.task(task_id)["status"] == "completed"
        assert (rescue["status"], rescue["reason"]) == ("cancelled", "original_finished")
        until(lambda: not alive(pid), "the rescue's process to be ended", limit=20)
    assert place.json("status")["tasks_rescued"] == 1


# ---- grace run


def test_grace_run_carries_its_own_ladder(place: Place) -> None:
    """Without any daemon a foreground command gets its three levels and a rescue that says what it is doing."""
    done = place.call("run", "--sla", "500ms", "--", "sh", "-c", "echo still here; sleep 2; exit 3")
    assert done.status == 3 and done.out == "still here\n"
    (task,) = [task for task in place.json("task", "list") if task["task_type"] == "command"]
    assert (task["status"], task["sla_met"], task["escalation_level"], task["priority"]) == ("failed", False, 3, "high")
    events = sla_events(place, task["task_id"])
    assert [event["topic"] for event in events] == LEVELS
    rescue = rescue_of(place, task["task_id"])
    assert rescue["status"] == "completed" and "still running" in rescue["result"]["found"]
    assert "still here" in rescue["result"]["diagnosis"]["last_output"]
    assert place.intent(task["intent_id"])["status"] == "failed"


def test_the_rescue_of_a_run_between_two_attempts_tells_of_the_pause(place: Place) -> None:
    """A foreground command that waits out its back-off at 200 percent is not said to lack a handler."""
    place.call("run", "--sla", "500ms", "--max-attempts", "2", "--", "false")
    (task,) = [task for task in place.json("task", "list") if task["task_type"] == "command"]
    assert (task["status"], task["attempt_number"], task["escalation_level"]) == ("failed", 2, 3)
    assert "not to start before" in rescue_of(place, task["task_id"])["result"]["found"]
