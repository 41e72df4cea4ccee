"""The bridge between intents and tasks: linked both ways, in step in every transaction, and mended when somebody has broken it."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import apsw
import pytest

from tests.conftest import Place, until

OUT_OF_STEP = """SELECT i.intent_id, i.status, t.status AS task FROM intent_records i LEFT JOIN htm_tasks t ON t.task_id = i.htm_task_id
  WHERE t.task_id IS NULL OR t.intent_id IS NULL OR t.intent_id <> i.intent_id
    OR i.status <> CASE WHEN t.status IN ('queued', 'blocked', 'assigned') THEN 'dispatched' WHEN t.status = 'running' THEN 'executing' ELSE t.status END
    OR (t.finished_at IS NOT NULL) <> (i.learned_from = 1)
    OR (t.finished_at IS NOT NULL) <> EXISTS (SELECT 1 FROM outcome_records o WHERE o.task_id = t.task_id)
    OR (t.finished_at IS NULL) <> (i.completed_at IS NULL) OR COALESCE(t.result, '') <> COALESCE(i.result, '')"""
WITHOUT_INTENT = """SELECT task_id FROM htm_tasks WHERE intent_id IS NULL OR intent_id NOT IN (SELECT intent_id FROM intent_records)"""
NEW_INTENT = ("INSERT INTO intent_records (intent_id, goal, domain, handler, priority, status, sla_ms, context, created_at, created_by) "
              "VALUES ('new', 'a new goal', 'general', '{handler}', 'high', 'created', 60000, '{{\"a\": 1}}', 1, 'a person')")  # fmt: skip
NEW_TASK = """INSERT INTO htm_tasks (task_id, task_type, domain, handler, goal, payload, status, priority, order_at, aged_at, warn_at, critical_at,
    max_attempts, created_at, queued_at, updated_at, updated_by)
  VALUES ('{id}', 'work', 'general', 'work', 'a new goal', '{payload}', 'queued', 'low', 1, 1, 0.8, 2, 1, 1, 1, 1, 'a person')"""
PAIR = "htm_tasks SET {} WHERE task_id = (SELECT htm_task_id FROM intent_records WHERE intent_id = 'pair')"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The database of `pair`, made once and copied for each test."""
    place = Place(tmp_path_factory.mktemp("bridge"))
    place.handler("work", "--external")
    place.submit("bystander", "--handler", "work", "--intent-id", "bystander", "--priority", "low")
    place.submit("the goal", "--handler", "work", "--intent-id", "pair", "--context", '{"folder": "/srv", "n": [1, null]}', "--expected-outcome", "a file",
                 "--confidence", "0.5", "--risk-level", "low", "--created-by", "anna", "--sla", "1h")  # fmt: skip
    place.sql("PRAGMA wal_checkpoint(TRUNCATE)")
    return place.db


@pytest.fixture
def pair(place: Place, prepared: Path) -> Place:
    """An intent `pair` with its queued task, for the external handler `work`, beside one that nobody touches."""
    shutil.copy(prepared, place.db)
    return place


def break_it(place: Place, statements: str) -> None:
    """As a person with the system's sqlite3 shell does, who knows nothing of links."""
    place.sql(statements)


def mend(place: Place) -> list[dict[str, Any]]:
    """One round of the daemon; what it says it has repaired."""
    place.ok("daemon", "--once")
    return [json.loads(row[0]) for row in place.sql("SELECT payload FROM events WHERE topic = 'bridge.repaired' ORDER BY seq")]


def whole(place: Place) -> None:
    """Every link leads somewhere and back, and both sides are in step."""
    assert place.sql(OUT_OF_STEP) == []
    assert place.sql(WITHOUT_INTENT) == []
    assert place.sql("PRAGMA foreign_key_check") == []
    assert place.sql("SELECT * FROM bridge_suspects") == []


def finish(place: Place, *options: str) -> dict[str, Any]:
    """Claim the pair's task and complete it."""
    task = place.json("task", "claim", "--handler", "work", "--worker", "w")
    return dict(place.json("task", "complete", task["task_id"], "--worker", "w", *options))


# ---- in step


def test_intent_and_task_name_each_other_and_the_payload_says_all(pair: Place) -> None:
    """Both ids on both sides, and the full context in what the handler is told."""
    intent = pair.intent("pair")
    task = pair.task(intent["htm_task_id"])
    assert task["intent_id"] == "pair"
    told = {"intent_id": "pair", "task_id": task["task_id"], "goal": "the goal", "expected_outcome": "a file", "context": {"folder": "/srv", "n": [1, None]},
            "confidence": 0.5, "risk_level": "low", "created_by": "anna", "priority": "normal", "domain": "general", "sla_ms": 3_600_000,
            "sla_deadline": task["sla_deadline"]}  # fmt: skip
    assert task["payload"] == told
    whole(pair)


def test_what_the_payload_says_reaches_the_handler(place: Place) -> None:
    """On its stdin, byte for byte the context that was submitted, with the attempt's facts added."""
    place.handler("echo", "--", "cat")
    context = {"text": "ünïcode 😀 \u2028 \t\n\"\\", "big": 2**60, "list": [[], {}, [None, True, 1.5]], "key with space": ""}
    _, task_id = place.submit("a goal", "--handler", "echo", "--context", json.dumps(context))
    place.ok("daemon", "--once")
    told = json.loads(place.ok("task", "log", task_id).out)
    assert told["context"] == context
    assert (told["task_id"], told["attempt"]) == (task_id, 1)
    assert place.task(task_id)["status"] == "completed"


def test_nobody_ever_sees_intent_and_task_out_of_step(place: Place, module: Any) -> None:
    """A reader that looks all the while that a daemon runs thirty tasks finds each state whole."""
    place.handler("quick", "--max-attempts", "1", "--", "sh", "-c", 'exit $(($(cat | wc -c) % 2))')
    lines = [{"goal": "x" * n, "handler": "quick", "intent_id": f"i{n}"} for n in range(1, 31)] + [{"goal": "last", "handler": "quick", "after": ["i1", "i2"]}]
    place.ok("submit-intent", "--batch", "-", stdin="\n".join(map(json.dumps, lines)).encode())
    daemon = place.start("daemon", "--once", "--workers", "4")
    reader = apsw.Connection(str(place.db), flags=apsw.SQLITE_OPEN_READONLY)
    reader.set_busy_timeout(60_000)
    looks, seen = 0, set()
    while daemon.poll() is None:
        assert reader.execute(OUT_OF_STEP).fetchall() == []
        seen.update(row[0] for row in reader.execute("SELECT DISTINCT status FROM intent_records"))
        looks += 1
    reader.close()
    assert daemon.wait() == 0
    assert looks > 1
    assert "dispatched" in seen
    whole(place)
    assert place.sql("SELECT COUNT(*) FROM intent_records WHERE completed_at IS NULL") == [[0]]


def test_an_outcome_is_recorded_once_and_learned_from(pair: Place) -> None:
    """With the intent's confidence, the measures, and the event; a later round adds nothing."""
    done = finish(pair, "--result", '{"n": 1}')
    rows = pair.sql("SELECT task_id, intent_id, action_type, handler, domain, success, confidence_score, context FROM outcome_records")
    assert [row[:7] for row in rows] == [[done["task_id"], "pair", "intent_general", "work", "general", 1, 0.5]]
    context = json.loads(rows[0][7])
    assert (context["intent_id"], context["goal"], context["sla_met"]) == ("pair", "the goal", True)
    assert context["metrics"] == {name: done[name] for name in ("queue_time_ms", "execution_time_ms", "total_time_ms", "attempt_number", "sla_buffer_ms")}
    intent = pair.intent("pair")
    assert (intent["learned_from"], intent["completed_at"], intent["result"]) == (True, done["finished_at"], {"n": 1})
    pair.ok("daemon", "--once")
    assert pair.sql("SELECT COUNT(*) FROM outcome_records") == [[1]]
    assert len(pair.events("learning.outcome")) == 1


def test_an_outcome_tells_of_time_asleep_and_of_interruptions(place: Place, module: Any) -> None:
    """What the machine slept while the task was open, once for one sleep whoever noticed it; and starts that came to nothing."""
    place.handler("work", "--external")
    place.submit("slept through", "--handler", "work", "--sla", "1h")
    with contextlib.closing(module.Store(str(place.db))) as store:
        task = store.write(lambda tx: module.claim_external(tx, ["work"], "w", 60_000))
        before = module.clocks()
        after = (before[0] + 9000, before[1] + 2000, before[2] + 9000)  # 9 s by the wall, of which the machine was awake for 2
        for worker in ("first", "second"):
            store.write(lambda tx, worker=worker: module.record_clock_jump(tx, worker, before, after))
        store.write(lambda tx: module.end_attempt(tx, task["task_id"], task["attempt_id"], {"outcome": "interrupted"}))
        task = store.write(lambda tx: module.claim_external(tx, ["work"], "w", 60_000))
        store.write(lambda tx: module.end_attempt(tx, task["task_id"], task["attempt_id"], {"outcome": "completed"}))
    metrics = json.loads(place.sql("SELECT context FROM outcome_records")[0][0])["metrics"]
    assert (metrics["asleep_ms"], metrics["interruptions"], metrics["attempt_number"]) == (7000, 1, 1)
    assert "asleep_running_ms" not in metrics and len(place.events("daemon.suspended")) == 1


def test_an_outcome_that_was_lost_is_recorded_again_and_one_that_was_not_is_not(pair: Place) -> None:
    """Whoever resets `learned_from` makes nothing happen twice."""
    task_id = finish(pair)["task_id"]
    break_it(pair, "UPDATE intent_records SET learned_from = 0 WHERE intent_id = 'pair'")
    mend(pair)
    assert pair.intent("pair")["learned_from"] is True
    assert len(pair.events("learning.outcome")) == 1
    break_it(pair, "DELETE FROM outcome_records; UPDATE intent_records SET learned_from = 0 WHERE intent_id = 'pair'")
    mend(pair)
    assert pair.sql("SELECT task_id, success FROM outcome_records") == [[task_id, 1]]
    whole(pair)


# ---- broken and mended

BROKEN = {
    "the task's link is null": f"UPDATE {PAIR.format('intent_id = NULL')}",
    "the task's link leads nowhere": f"""UPDATE {PAIR.format("intent_id = 'gone'")}""",
    "the intent's link is null": "UPDATE intent_records SET htm_task_id = NULL WHERE intent_id = 'pair'",
    "the intent's link leads nowhere": "UPDATE intent_records SET htm_task_id = 'gone' WHERE intent_id = 'pair'",
    "both links are null": f"UPDATE {PAIR.format('intent_id = NULL')}; UPDATE intent_records SET htm_task_id = NULL WHERE intent_id = 'pair'",
    "the intent is gone": "DELETE FROM intent_records WHERE intent_id = 'pair'",
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_link_is_mended_once(pair: Place, what: str) -> None:
    """The same two belong together again, with one event; a second round finds nothing to do."""
    task_id, before = pair.intent("pair")["htm_task_id"], pair.sql("SELECT * FROM htm_tasks")
    known = {key: value for key, value in pair.intent("pair").items() if key != "dispatched_at"}
    break_it(pair, BROKEN[what])
    repairs = mend(pair)
    whole(pair)
    assert {key: value for key, value in pair.intent("pair").items() if key != "dispatched_at"} == known
    assert pair.sql("SELECT * FROM htm_tasks") == before
    assert len(repairs) == 1 and repairs[0]["task_id"] in (task_id, None) and repairs[0]["intent_id"] in ("pair", None)
    assert mend(pair) == repairs
    finish(pair)
    assert pair.intent("pair")["status"] == "completed"
    whole(pair)


def test_a_deleted_task_is_made_again_for_its_intent(pair: Place) -> None:
    """A new one, with the same goal, context and SLA, which can be claimed; the counts do not remember the old one."""
    old = pair.task(pair.intent("pair")["htm_task_id"])
    break_it(pair, f"DELETE FROM htm_tasks WHERE task_id = '{old['task_id']}'")
    repairs = mend(pair)
    assert [(repair["intent_id"]) for repair in repairs] == ["pair"]
    whole(pair)
    new = pair.task(pair.intent("pair")["htm_task_id"])
    assert new["task_id"] != old["task_id"]
    kept = ("goal", "handler", "domain", "priority", "sla_ms", "status")
    assert {key: new[key] for key in kept} == {key: old[key] for key in kept}
    assert new["payload"]["context"] == old["payload"]["context"]
    assert mend(pair) == repairs
    assert finish(pair)["task_id"] == new["task_id"]
    assert pair.intent("pair")["status"] == "completed"


def test_deleting_tasks_leaves_no_ghosts_in_the_counts(pair: Place) -> None:
    """After the repair, status counts what is there, and the handler without tasks can be removed."""
    finish(pair)
    break_it(pair, "DELETE FROM htm_tasks WHERE status = 'queued'; DELETE FROM intent_records WHERE intent_id = 'bystander'")
    mend(pair)
    status = pair.json("status")
    assert (status["total_tasks"], status["queued_tasks"], status["completed_tasks"]) == (1, 0, 1)
    pair.ok("handler", "remove", "work")


@pytest.mark.parametrize("what", ["task", "intent"])
def test_half_of_a_finished_pair_that_is_deleted(pair: Place, what: str) -> None:
    """A final intent without its task keeps how it ended; a final task gets its intent back, ended as it did."""
    done = finish(pair, "--result", "[1]")
    break_it(pair, f"DELETE FROM htm_tasks WHERE task_id = '{done['task_id']}'" if what == "task" else "DELETE FROM intent_records WHERE intent_id = 'pair'")
    repairs = mend(pair)
    assert len(repairs) == 1
    intent = pair.intent("pair")
    assert (intent["status"], intent["success"], intent["result"], intent["completed_at"]) == ("completed", True, [1], done["finished_at"])
    assert intent["htm_task_id"] == (None if what == "task" else done["task_id"])
    assert mend(pair) == repairs
    assert pair.sql("SELECT COUNT(*) FROM outcome_records") == [[1]]
    assert pair.sql("SELECT COUNT(*) FROM htm_tasks WHERE finished_at IS NULL") == [[1]]


def test_an_intent_and_its_task_deleted_together_stay_away(pair: Place) -> None:
    """There is nothing to mend."""
    break_it(pair, "DELETE FROM htm_tasks WHERE intent_id = 'pair'; DELETE FROM intent_records WHERE intent_id = 'pair'")
    assert mend(pair) == []
    assert pair.sql("SELECT intent_id FROM intent_records") == [["bystander"]]
    whole(pair)


def test_an_intent_that_somebody_wrote_gets_a_task(pair: Place) -> None:
    """Created without one, by the shell: it is dispatched, with its context in the payload."""
    break_it(pair, NEW_INTENT.format(handler="work"))
    repairs = mend(pair)
    assert [repair["intent_id"] for repair in repairs] == ["new"]
    whole(pair)
    intent = pair.intent("new")
    task = pair.task(intent["htm_task_id"])
    assert (intent["status"], task["status"], task["priority"], task["sla_ms"]) == ("dispatched", "queued", "high", 60_000)
    assert task["payload"]["context"] == {"a": 1}
    assert mend(pair) == repairs


def test_an_intent_that_nobody_can_do_is_given_up(pair: Place) -> None:
    """Its handler does not exist: it ends cancelled, and the event says why."""
    break_it(pair, NEW_INTENT.format(handler="nobody"))
    repairs = mend(pair)
    assert len(repairs) == 1
    assert pair.intent("new")["status"] == "cancelled"
    assert [event["payload"]["reason"] for event in pair.events("agentic.intent.cancelled")] == ["no_handler"]
    assert mend(pair) == repairs


ODD = '{"intent_id": 5, "confidence": "high", "risk_level": "none", "context": [1], "expected_outcome": 7, "created_by": {}}'


@pytest.mark.parametrize("payload", ['{"context": {"a": 1}, "expected_outcome": "x"}', "{}", "[]", '{"intent_id": "pair"}', ODD])
def test_a_task_that_somebody_wrote_gets_an_intent(pair: Place, payload: str) -> None:
    """Whatever its payload says; an odd one keeps nobody else's link from being mended."""
    break_it(pair, NEW_TASK.format(id="task_new", payload=payload))
    break_it(pair, BROKEN["the task's link is null"])
    repairs = mend(pair)
    whole(pair)
    task = pair.task("task_new")
    assert task["status"] == "queued"
    intent = pair.intent(task["intent_id"])
    assert (intent["goal"], intent["htm_task_id"], intent["status"], intent["handler"]) == ("a new goal", "task_new", "dispatched", "work")
    assert isinstance(intent["context"], dict)
    assert len(repairs) == 2
    assert mend(pair) == repairs


@pytest.mark.parametrize("what", ["the intent's link is null", "the task's link is null", "the intent is gone"])
def test_a_task_that_ends_while_its_link_is_broken_ends_its_intent_when_mended(pair: Place, what: str) -> None:
    """The worker is not disturbed; the repair brings the intent up to where its task is, and one outcome stands."""
    task = pair.json("task", "claim", "--handler", "work", "--worker", "w")
    break_it(pair, BROKEN[what])
    done = pair.json("task", "complete", task["task_id"], "--worker", "w", "--result", "[1]")
    assert done["status"] == "completed"
    repairs = mend(pair)
    assert len(repairs) == 1
    intent = pair.intent("pair")
    assert (intent["status"], intent["success"], intent["result"], intent["htm_task_id"]) == ("completed", True, [1], task["task_id"])
    whole(pair)
    assert pair.sql("SELECT COUNT(*) FROM outcome_records") == [[1]]


def test_a_running_task_that_is_deleted_stops_nobody(pair: Place) -> None:
    """Its open attempt leads nowhere; claims, daemons and the new task go on all the same."""
    task = pair.json("task", "claim", "--handler", "work", "--worker", "w", "--lease", "1ms")
    assert task["intent_id"] == "pair"
    break_it(pair, f"DELETE FROM htm_tasks WHERE task_id = '{task['task_id']}'")
    other = pair.json("task", "claim", "--handler", "work", "--worker", "w")
    assert other["intent_id"] == "bystander"
    assert len(mend(pair)) == 1
    again = pair.json("task", "claim", "--handler", "work", "--worker", "w")
    assert again["intent_id"] == "pair"
    pair.ok("task", "complete", again["task_id"], "--worker", "w")
    assert pair.events("daemon.trouble") == []


def test_a_running_daemon_mends_links_as_often_as_it_is_told(pair: Place) -> None:
    """Without being started again; each break leaves one event."""
    pair.ok("config", "set", "bridge.repair_every", "1s")
    task_id = pair.intent("pair")["htm_task_id"]
    with pair.daemon("--workers", "1"):
        assert [event["payload"]["repaired"] for event in pair.events("bridge.ready")] == [0]
        for number, what in enumerate(["the task's link is null", "the intent's link leads nowhere", "the intent is gone"], 1):
            break_it(pair, BROKEN[what])
            until(lambda number=number: pair.sql("SELECT COUNT(*) FROM events WHERE topic = 'bridge.repaired'") == [[number]], f"the repair after {what}")
            until(lambda: pair.sql("SELECT * FROM bridge_suspects") == [], "nothing to be left to look at")
            whole(pair)
            assert pair.intent("pair")["htm_task_id"] == task_id
    assert len(pair.events("bridge.repaired")) == 3
