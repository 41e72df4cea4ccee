"""The queue from outside: submitting, claiming, finishing, retrying, waiting for one another; and that its counts are right."""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import LIMIT, Place, load_module, until

HOUR = 3_600_000


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with the external handler `work`, made once and copied for each test."""
    place = Place(tmp_path_factory.mktemp("queue"))
    place.handler("work", "--external", "--backoff", "1h")
    place.sql("PRAGMA wal_checkpoint(TRUNCATE)")
    return place.db


@pytest.fixture
def queue(place: Place, prepared: Path) -> Place:
    """A database with the external handler `work`: tests claim its tasks themselves."""
    shutil.copy(prepared, place.db)
    return place


def claim(place: Place, *options: str, worker: str = "w", handler: str = "work") -> dict[str, Any]:
    """The next task, which must be there."""
    return dict(place.json("task", "claim", "--handler", handler, "--worker", worker, *options))


def nothing_to_claim(place: Place, *options: str) -> None:
    done = place.call("--json", "task", "claim", "--handler", "work", "--worker", "w", *options)
    assert (done.status, done.out, done.err) == (6, "null\n", "")


def conflict(place: Place, *words: str) -> str:
    """The message of a call that the state does not allow."""
    done = place.call("--json", *words)
    assert (done.status, done.out, done.error["code"]) == (4, "", "conflict")
    return done.error["message"]


def states(place: Place) -> dict[str, tuple[str, str | None, str]]:
    """For each intent: its current task's status and reason, and its own status."""
    rows = place.sql("SELECT i.intent_id, t.status AS task, t.reason, i.status FROM intent_records i JOIN htm_tasks t ON t.task_id = i.htm_task_id")
    return {name: (status, reason, intent) for name, status, reason, intent in rows}


# ---- submitting


def test_a_submission_with_every_option_is_recorded_whole(queue: Place) -> None:
    """Each option is found again in the intent, the task, or its payload."""
    queue.submit("first", "--handler", "work", "--intent-id", "first")
    intent_id, task_id = queue.submit(
        "Back up the shop", "--handler", "work", "--sla", "1h30m", "--priority", "high", "--domain", "shop", "--context", '{"folder": "/srv", "n": [1, null]}',
        "--expected-outcome", "a file", "--confidence", "0.75", "--risk-level", "medium", "--created-by", "anna", "--intent-id", "my:own.id-1",
        "--key", "k1", "--in", "2h", "--after", "first", "--max-attempts", "7", "--timeout", "90s")  # fmt: skip
    assert intent_id == "my:own.id-1"
    intent, task = queue.intent(intent_id), queue.task(task_id)
    context = {"folder": "/srv", "n": [1, None]}
    expected = {"htm_task_id": task_id, "goal": "Back up the shop", "expected_outcome": "a file", "domain": "shop", "priority": "high", "status": "dispatched",
                "sla_ms": 5_400_000, "sla_met": None, "success": None, "confidence": 0.75, "risk_level": "medium", "context": context, "result": None,
                "completed_at": None, "created_by": "anna", "learned_from": False}  # fmt: skip
    assert {key: intent[key] for key in expected} == expected
    expected = {"intent_id": intent_id, "task_type": "work", "handler": "work", "domain": "shop", "priority": "high", "status": "blocked", "attempt_number": 0,
                "reason": "waiting_dependency", "max_attempts": 7, "sla_ms": 5_400_000, "success": None, "escalation_level": 0, "retry_of": None}  # fmt: skip
    assert {key: task[key] for key in expected} == expected
    payload = {"intent_id": intent_id, "task_id": task_id, "goal": "Back up the shop", "expected_outcome": "a file", "context": context}
    assert {key: task["payload"][key] for key in payload} == payload
    assert queue.sql(f"SELECT timeout_ms, queued_at - created_at, sla_deadline - queued_at FROM htm_tasks WHERE task_id = '{task_id}'")[0][0] == 90_000
    assert queue.sql(f"SELECT queued_at - created_at AS pause FROM htm_tasks WHERE task_id = '{task_id}'") == [[2 * HOUR]]


def test_what_is_not_given_comes_from_the_handler_or_is_left_out(place: Place) -> None:
    """The handler named like the domain, its SLA, its attempts; no SLA anywhere is no clock."""
    place.handler("general", "--external", "--sla", "5m", "--max-attempts", "4")
    place.handler("plain", "--external")
    task = place.task(place.submit("a goal")[1])
    assert (task["handler"], task["sla_ms"], task["max_attempts"], task["priority"], task["payload"]["context"]) == ("general", 300_000, 4, "normal", {})
    task = place.task(place.submit("a goal", "--domain", "plain")[1])
    assert (task["handler"], task["sla_ms"], task["sla_deadline"], task["urgency_ratio"], task["sla_met"]) == ("plain", None, None, None, None)


def test_a_context_comes_from_a_file_or_stdin(queue: Place) -> None:
    """So that private or big input never has to be an argument."""
    (queue.folder / "c.json").write_text('{"from": "file"}')
    assert queue.intent(queue.submit("g", "--handler", "work", "--context", f"@{queue.folder}/c.json")[0])["context"] == {"from": "file"}
    done = queue.json("submit-intent", "g", "--handler", "work", "--context", "-", stdin=b'{"from": "stdin"}')
    assert queue.intent(done["intent_id"])["context"] == {"from": "stdin"}


def test_the_same_key_again_returns_the_first_intent(queue: Place) -> None:
    """Once, twice, and from eight processes at the same moment."""
    first = queue.json("submit-intent", "a goal", "--handler", "work", "--key", "daily")
    again = queue.json("submit-intent", "another goal", "--handler", "nonexistent", "--key", "daily")
    assert (first["duplicate"], again["duplicate"]) == (False, True)
    assert (again["intent_id"], again["task_id"]) == (first["intent_id"], first["task_id"])
    crowd = [queue.start("--json", "submit-intent", "a goal", "--handler", "work", "--key", "shared") for _ in range(8)]
    results = [json.loads(process.communicate(timeout=LIMIT)[0]) for process in crowd]
    assert sorted(result["duplicate"] for result in results) == [False] + [True] * 7
    assert len({(result["intent_id"], result["task_id"]) for result in results}) == 1
    assert queue.sql("SELECT COUNT(*) FROM htm_tasks") == [[2]]


def test_an_own_id_is_taken_once(queue: Place) -> None:
    """A second time is a conflict, and what is no id is a usage error; nothing is recorded."""
    queue.submit("a goal", "--handler", "work", "--intent-id", "mine")
    conflict(queue, "submit-intent", "a goal", "--handler", "work", "--intent-id", "mine")
    for bad in ("", "two words", "x" * 129, "ä", "a/b"):
        assert queue.call("submit-intent", "a goal", "--handler", "work", "--intent-id", bad).status == 2
    assert queue.sql("SELECT intent_id FROM intent_records") == [["mine"]]


def test_an_unknown_handler_is_refused_with_the_nearest_names(queue: Place) -> None:
    """Exit 3, a hint that helps, and nothing recorded."""
    queue.handler("backup_shop", "--", "true")
    done = queue.call("--json", "submit-intent", "a goal", "--handler", "backup_shp")
    assert (done.status, done.error["code"]) == (3, "not_found")
    assert "backup_shop" in done.error["hint"]
    assert queue.call("submit-intent", "a goal").status == 3
    assert queue.json("intent", "list") == []


def test_a_batch_is_submitted_line_by_line(queue: Place) -> None:
    """All keys, blank lines, a key that stands twice, a line that waits for an earlier one; one result a line."""
    full = {"goal": "two", "handler": "work", "domain": "shop", "sla": "5m", "priority": "low", "expected_outcome": "x", "risk_level": "high",
            "created_by": "anna", "intent_id": "two", "key": "k", "in": "1h", "timeout": "9s", "context": {"a": 1}, "after": ["one"],
            "confidence": 1, "max_attempts": 2}  # fmt: skip
    lines = [{"goal": "one", "handler": "work", "intent_id": "one"}, full, {"goal": "again", "handler": "work", "key": "k"}]
    text = "\n\n".join(json.dumps(line) for line in lines)
    done = queue.ok("--json", "submit-intent", "--batch", "-", stdin=text.encode()).lines
    assert [(row["intent_id"], row["status"], row["duplicate"]) for row in done] == [
        ("one", "queued", False), ("two", "blocked", False), ("two", "blocked", True)]  # fmt: skip
    intent = queue.intent("two")
    expected = {"domain": "shop", "sla_ms": 300_000, "priority": "low", "expected_outcome": "x", "risk_level": "high", "created_by": "anna",
                "context": {"a": 1}, "confidence": 1.0, "htm_task_id": done[1]["task_id"]}  # fmt: skip
    assert {key: intent[key] for key in expected} == expected
    assert queue.task(done[1]["task_id"])["max_attempts"] == 2


def test_a_large_batch_of_many_shapes_keeps_every_line_apart(queue: Place) -> None:
    """More lines than are written at once and more shapes than are remembered; each has its own rows, payload and event."""
    lines = [{"goal": f'goal "{n}"', "handler": "work", "sla": f"{1000 + n % 130}s", "priority": ("high", "low")[n % 2], "context": {"n": n}}
             for n in range(333)]  # fmt: skip
    lines[200] |= {"intent_id": "needed"}
    lines[205] |= {"after": ["needed"]}
    done = queue.ok("--json", "submit-intent", "--batch", "-", stdin="\n".join(map(json.dumps, lines)).encode()).lines
    rows = queue.sql("SELECT t.task_id, t.intent_id, t.goal, t.priority, t.sla_ms, t.status, t.next_at - t.queued_at, t.payload, e.payload AS heard "
                     "FROM htm_tasks t JOIN events e ON e.subject = t.task_id AND e.topic = 'agentic.intent.created' ORDER BY t.seq")  # fmt: skip
    assert [(row[0], row[1]) for row in rows] == [(one["task_id"], one["intent_id"]) for one in done]
    for n, (line, (task_id, intent_id, goal, priority, sla, status, step, payload, event)) in enumerate(zip(lines, rows, strict=True)):
        blocked = n == 205
        first_step = round(sla * 0.8) if blocked or priority == "high" else sla // 2
        assert (goal, priority, sla, status, step) == (line["goal"], line["priority"], (1000 + n % 130) * 1000, "blocked" if blocked else "queued", first_step)
        told, heard = json.loads(payload), json.loads(event)
        assert (told["goal"], told["task_id"], told["intent_id"], told["context"], told["sla_ms"]) == (goal, task_id, intent_id, {"n": n}, sla)
        assert (heard["goal"], heard["task_id"], heard["intent_id"], heard["sla_ms"]) == (goal, task_id, intent_id, sla)
    assert queue.sql("SELECT SUM(n) FROM task_counts WHERE status = 'queued'") == [[332]]


@pytest.mark.parametrize(("line", "status", "word"), [
    ('{"goal": "x"', 2, ""), ("[]", 2, "object"), ('{"handler": "work"}', 2, "goal"), ('{"goal": "x", "handler": "work", "colour": 1}', 2, "colour"),
    ('{"goal": "x", "handler": "work", "sla": 300}', 2, "sla"), ('{"goal": "x", "handler": "work", "sla": "5"}', 2, "sla"),
    ('{"goal": "x", "handler": "work", "context": "{}"}', 2, "context"), ('{"goal": "x", "goal": "y", "handler": "work"}', 2, "goal"),
    ('{"goal": "", "handler": "work"}', 2, "goal"), ('{"goal": "x", "handler": "wrok"}', 3, "wrok"),
    ('{"goal": "x", "handler": "work", "intent_id": "good"}', 4, "good"), ('{"goal": "x", "handler": "work", "after": ["nobody"]}', 3, "nobody"),
    ('{"goal": "x", "handler": "work", "at": "2030-01-01T00:00:00Z", "in": "1h"}', 2, "exclude"), ("\udcff", 2, "UTF-8")])  # fmt: skip
def test_one_bad_line_spoils_the_batch_and_is_named_by_number(queue: Place, line: str, status: int, word: str) -> None:
    """Nothing of it is recorded."""
    text = '{"goal": "good", "handler": "work", "intent_id": "good"}\n\n' + line + "\n"
    done = queue.call("--json", "submit-intent", "--batch", "-", stdin=text.encode(errors="surrogateescape"))
    assert (done.status, done.out) == (status, "")
    assert "line 3" in done.error["message"]
    assert word in done.error["message"]
    assert queue.sql("SELECT COUNT(*) FROM intent_records") == [[0]]


# ---- waiting for one another, and for a time


def test_a_chain_runs_in_its_order(queue: Place) -> None:
    """Each waits for the one before; whoever needs two waits for both; the SLA clock runs meanwhile."""
    for name, *after in (["a"], ["b", "a"], ["c", "b"], ["d", "a", "c"]):
        queue.submit(name, "--handler", "work", "--intent-id", name, "--sla", "1h", *(word for needed in after for word in ("--after", needed)))
    assert queue.sql("SELECT COUNT(*) FROM htm_tasks WHERE status = 'blocked' AND queued_at = created_at") == [[3]]
    done = []
    for _ in range(4):
        task = claim(queue)
        assert {name: state for name, (state, *_) in states(queue).items() if state == "queued"} == {}
        nothing_to_claim(queue)
        queue.ok("task", "complete", task["task_id"], "--worker", "w")
        done.append(task["intent_id"])
    assert done == ["a", "b", "c", "d"]
    queue.submit("e", "--handler", "work", "--intent-id", "e", "--after", "a")
    assert states(queue)["e"] == ("queued", None, "dispatched")


@pytest.mark.parametrize("end", ["fail", "cancel"])
def test_a_prerequisite_that_does_not_complete_cancels_all_that_depends_on_it(queue: Place, end: str) -> None:
    """Transitively, tasks and intents, with the reason; what does not depend goes on."""
    for name, *after in (["a"], ["free"], ["b", "a"], ["c", "a", "b"], ["d", "c", "free"]):
        queue.submit(name, "--handler", "work", "--intent-id", name, "--priority", "high" if name == "a" else "normal",
                     *(word for needed in after for word in ("--after", needed)))  # fmt: skip
    task = claim(queue)
    if end == "fail":
        queue.ok("task", "fail", task["task_id"], "--worker", "w", "--error", "no luck", "--no-retry")
    else:
        queue.ok("intent", "cancel", "a")
    lost = ("cancelled", "dependency_failed", "cancelled")
    found = states(queue)
    assert {name: found[name] for name in "bcd"} == dict.fromkeys("bcd", lost)
    assert found["a"][2] == ("failed" if end == "fail" else "cancelled")
    assert found["free"] == ("queued", None, "dispatched")
    assert found["a"][2] in conflict(queue, "submit-intent", "e", "--handler", "work", "--after", "a")


def test_a_long_chain_ends_as_a_whole(queue: Place) -> None:
    """Five hundred, each after the one before: cancelling the first cancels all in the same moment."""
    lines = [{"goal": "x", "handler": "work", "intent_id": f"i{n}", "after": [f"i{n - 1}"] if n else []} for n in range(500)]
    queue.ok("submit-intent", "--batch", "-", stdin="\n".join(map(json.dumps, lines)).encode())
    queue.ok("intent", "cancel", "i0")
    found = queue.sql("SELECT status, reason, COUNT(*) AS n, COUNT(DISTINCT finished_at) AS ends FROM htm_tasks GROUP BY status, reason")
    assert sorted(found) == [["cancelled", "cancelled", 1, 1], ["cancelled", "dependency_failed", 499, 1]]


def test_retrying_a_prerequisite_keeps_its_dependants_waiting(queue: Place) -> None:
    """The intent is what they wait for, not one of its tasks."""
    _, first = queue.submit("a", "--handler", "work", "--intent-id", "a")
    queue.submit("b", "--handler", "work", "--intent-id", "b", "--after", "a")
    again = queue.json("task", "retry", first)["task_id"]
    assert states(queue)["b"] == ("blocked", "waiting_dependency", "dispatched")
    assert claim(queue)["task_id"] == again
    queue.ok("task", "complete", again, "--worker", "w")
    assert states(queue)["b"] == ("queued", None, "dispatched")


def test_who_waits_for_nobody_is_refused(queue: Place) -> None:
    """An intent that does not exist."""
    assert queue.call("submit-intent", "a", "--handler", "work", "--after", "nobody").status == 3
    assert queue.json("intent", "list") == []


def test_a_task_for_later_is_not_claimed_before_its_time(queue: Place) -> None:
    """Its clock stands still until then; a time in the past means now; both options at once are refused."""
    _, later = queue.submit("later", "--handler", "work", "--at", "2100-01-01T00:00:00+01:00", "--sla", "1h", "--priority", "critical")
    task = queue.task(later)
    assert (task["status"], task["queued_at"], task["elapsed_ms"], task["urgency_ratio"]) == ("queued", "2099-12-31T23:00:00.000Z", 0, 0)
    assert task["sla_deadline"] == "2100-01-01T00:00:00.000Z"
    nothing_to_claim(queue)
    _, past = queue.submit("past", "--handler", "work", "--at", "2001-01-01T00:00:00Z", "--sla", "1h")
    task = claim(queue)
    assert task["task_id"] == past
    assert task["queued_at"] == task["created_at"]
    _, soon = queue.submit("soon", "--handler", "work", "--in", "400ms")
    assert claim(queue, "--wait", "60s")["task_id"] == soon
    soon_row = queue.sql(f"SELECT started_at >= queued_at AS waited, queued_at - created_at AS pause FROM htm_tasks WHERE task_id = '{soon}'")
    assert soon_row == [[1, 400]]
    assert queue.call("submit-intent", "x", "--handler", "work", "--in", "1h", "--at", "2100-01-01T00:00:00Z").status == 2


# ---- claiming


def test_claims_go_by_priority_then_deadline_then_arrival(queue: Place) -> None:
    """Whatever the order of submission."""
    wanted = [("critical", "5h"), ("high", "2h"), ("high", "3h"), ("normal", "2h"), ("normal", "20h"), ("normal", "20h"), ("low", "1h"), ("low", "30h")]
    order = random.Random(2).sample(range(len(wanted)), len(wanted))
    lines = [{"goal": str(n), "handler": "work", "priority": wanted[n][0], "sla": wanted[n][1]} for n in order]
    queue.ok("submit-intent", "--batch", "-", stdin="\n".join(map(json.dumps, lines)).encode())
    claimed = [wanted[int(claim(queue)["goal"])] for _ in wanted]
    assert claimed == wanted
    nothing_to_claim(queue)


def test_a_claim_serves_only_the_handlers_it_names(queue: Place) -> None:
    """Several may be named; an unknown one is refused."""
    queue.handler("other", "--external")
    _, mine = queue.submit("x", "--handler", "other", "--priority", "low")
    nothing_to_claim(queue)
    assert queue.json("task", "claim", "--handler", "work", "--handler", "other", "--worker", "w")["task_id"] == mine
    assert queue.call("task", "claim", "--handler", "nobody", "--worker", "w").status == 3


def test_the_protocol_of_an_external_worker(queue: Place) -> None:
    """Claim, heartbeat, progress, complete: each seen in the task, and the intent follows."""
    intent_id, task_id = queue.submit("a goal", "--handler", "work", "--sla", "1h", "--context", '{"deep": {"er": [1]}}')
    task = claim(queue, "--lease", "10m")
    assert (task["task_id"], task["status"], task["attempt_number"], task["assigned_worker"]) == (task_id, "running", 1, "w")
    assert task["payload"]["context"] == {"deep": {"er": [1]}}
    assert task["attempt_id"].startswith("att_")
    assert queue.intent(intent_id)["status"] == "executing"
    until(lambda: queue.json("task", "heartbeat", task_id, "--worker", "w")["lease_expires_at"] > task["lease_expires_at"], "a longer lease")
    progress = queue.json("task", "progress", task_id, "3", "10", "--note", "third file", "--worker", "w")["progress"]
    assert (progress["done"], progress["total"], progress["note"]) == (3, 10, "third file")
    done = queue.json("task", "complete", task_id, "--worker", "w", "--attempt-id", task["attempt_id"], "--result", '{"files": 10}')
    assert (done["status"], done["success"], done["sla_met"], done["result"], done["finished_at"] is not None) == ("completed", True, True, {"files": 10}, True)
    intent = queue.intent(intent_id)
    assert (intent["status"], intent["success"], intent["sla_met"], intent["result"], intent["learned_from"]) == ("completed", True, True, {"files": 10}, True)
    topics = [event["topic"] for event in queue.events() if event["payload"].get("task_id") == task_id]
    assert topics == ["htm.task.created", "agentic.intent.created", "htm.task.update", "htm.task.update", "htm.task.completed", "learning.outcome",
                      "agentic.intent.completed"]  # fmt: skip


def test_a_result_that_is_no_json_leaves_the_task_running(queue: Place) -> None:
    """The worker may try again."""
    _, task_id = queue.submit("a goal", "--handler", "work")
    claim(queue)
    assert queue.call("task", "complete", task_id, "--worker", "w", "--result", "{nope").status == 2
    assert queue.call("task", "progress", task_id, "11", "10", "--worker", "w").status == 2
    assert queue.task(task_id)["status"] == "running"
    queue.ok("task", "complete", task_id, "--worker", "w", "--result", "-", stdin=b"[1]")
    assert queue.task(task_id)["result"] == [1]


OWNER_WORDS = (("heartbeat",), ("progress", "1", "2"), ("complete", "--result", '"late"'), ("fail", "--error", "late"))


def test_who_lost_the_lease_can_change_nothing(queue: Place) -> None:
    """After its lease ran out and another took over; nor the same worker by its old attempt, nor a stranger."""
    _, task_id = queue.submit("a goal", "--handler", "work")
    first = claim(queue, "--lease", "1ms", worker="one")
    second = claim(queue, worker="two")
    assert (second["task_id"], second["attempt_number"]) == (task_id, 1), "a lost attempt does not count"
    before = queue.sql("SELECT * FROM htm_tasks") + queue.sql("SELECT * FROM htm_task_attempts")
    for word, *rest in OWNER_WORDS:
        for who in (["--worker", "one"], ["--worker", "one", "--attempt-id", first["attempt_id"]], ["--worker", "two", "--attempt-id", first["attempt_id"]],
                    ["--worker", "stranger"]):  # fmt: skip
            conflict(queue, "task", word, task_id, *rest, *who)
    assert queue.sql("SELECT * FROM htm_tasks") + queue.sql("SELECT * FROM htm_task_attempts") == before
    queue.ok("task", "complete", task_id, "--worker", "two", "--attempt-id", second["attempt_id"])
    for word, *rest in OWNER_WORDS:
        conflict(queue, "task", word, task_id, *rest, "--worker", "two")
    task = queue.task(task_id)
    assert (task["status"], task["recoveries"], task["result"]) == ("completed", 1, None)
    assert queue.sql("SELECT outcome FROM htm_task_attempts ORDER BY created_at") == [["lost"], ["completed"]]


def test_a_failed_attempt_waits_out_its_pause_and_the_last_one_fails_the_task(place: Place) -> None:
    """Until --max-attempts; then task and intent are failed, with the last error."""
    place.handler("work", "--external", "--backoff", "300ms", "--max-attempts", "2")
    intent_id, task_id = place.submit("a goal", "--handler", "work")
    claim(place)
    task = place.json("task", "fail", task_id, "--worker", "w", "--error", "first trouble")
    assert (task["status"], task["reason"], task["attempt_number"], task["error"], task["finished_at"]) == ("queued", "backoff", 1, "first trouble", None)
    assert place.intent(intent_id)["status"] == "dispatched"
    again = claim(place, "--wait", "60s")
    assert (again["task_id"], again["attempt_number"]) == (task_id, 2)
    assert place.sql("SELECT started_at - finished_at >= 200 AS paused FROM (SELECT MAX(started_at) AS started_at, MIN(finished_at) AS finished_at "
                     "FROM htm_task_attempts)") == [[1]]  # fmt: skip
    task = place.json("task", "fail", task_id, "--worker", "w", "--error", "last trouble")
    assert (task["status"], task["error"], task["success"]) == ("failed", "last trouble", False)
    intent = place.intent(intent_id)
    assert (intent["status"], intent["success"], intent["learned_from"]) == ("failed", False, True)
    assert place.sql("SELECT outcome, error FROM htm_task_attempts ORDER BY created_at") == [["failed", "first trouble"], ["failed", "last trouble"]]


def test_a_pause_is_kept_and_no_retry_ends_at_once(queue: Place) -> None:
    """With an hour of back-off nothing is there to claim; --no-retry fails the task for good."""
    _, task_id = queue.submit("a goal", "--handler", "work", "--max-attempts", "9")
    claim(queue)
    queue.ok("task", "fail", task_id, "--worker", "w", "--error", "x")
    nothing_to_claim(queue)
    assert queue.json("task", "explain", task_id)["why"][0]["code"] == "backoff"
    _, other = queue.submit("another", "--handler", "work")
    claim(queue)
    assert queue.json("task", "fail", other, "--worker", "w", "--error", "x", "--no-retry")["status"] == "failed"


def test_a_waiting_claim_is_woken_by_a_submission(queue: Place) -> None:
    """It gets the task that comes while it waits; one that waits in vain says so."""
    nothing_to_claim(queue, "--wait", "50ms")
    waiting = queue.start("--json", "task", "claim", "--handler", "work", "--worker", "patient", "--wait", "10m")
    until(lambda: queue.sql("SELECT COUNT(*) FROM waiters") == [[1]], "the claim to wait")
    _, task_id = queue.submit("a goal", "--handler", "work")
    out, err = waiting.communicate(timeout=LIMIT)
    assert (waiting.returncode, err) == (0, b"")
    assert json.loads(out)["task_id"] == task_id
    assert queue.sql("SELECT COUNT(*) FROM waiters") == [[0]]


def test_one_task_is_never_given_to_two_claims(queue: Place) -> None:
    """Twelve at once for five tasks: five different ones, and seven times nothing."""
    queue.ok("submit-intent", "--batch", "-", stdin=b'{"goal": "x", "handler": "work"}\n' * 5)
    crowd = [queue.start("--json", "task", "claim", "--handler", "work", "--worker", f"w{n}") for n in range(12)]
    results = [(json.loads(process.communicate(timeout=LIMIT)[0]), process.returncode) for process in crowd]
    assert sorted(status for _, status in results) == [0] * 5 + [6] * 7
    assert len({task["task_id"] for task, status in results if status == 0}) == 5


# ---- handlers


def test_a_paused_handlers_tasks_wait(queue: Place) -> None:
    """They stay queued, explain says why, and resuming lets them go."""
    assert queue.json("handler", "pause", "work")["paused"] is True
    _, task_id = queue.submit("a goal", "--handler", "work")
    nothing_to_claim(queue)
    assert "handler_paused" in [why["code"] for why in queue.json("task", "explain", task_id)["why"]]
    assert "handler_paused" in [problem["code"] for problem in queue.json("status")["problems"]]
    queue.ok("handler", "add", "work", "--external", "--replace")
    assert queue.json("handler", "show", "work")["paused"] is True, "a change of its options does not set it going"
    assert queue.json("handler", "resume", "work")["paused"] is False
    assert claim(queue)["task_id"] == task_id


def test_a_handler_is_changed_only_on_purpose(queue: Place) -> None:
    """A second `add` needs --replace; what cannot work is refused."""
    conflict(queue, "handler", "add", "work", "--", "true")
    queue.ok("handler", "add", "work", "--sla", "5m", "--replace", "--", "cat", "{goal}")
    handler = queue.json("handler", "show", "work")
    assert (handler["argv"], handler["external"], handler["sla_ms"], handler["backoff_ms"]) == (["cat", "{goal}"], False, 300_000, 5000)
    for words in (["x"], ["x", "--external", "--", "true"], ["x", "--rescue", "x", "--", "true"], ["x y", "--external"],
                  ["x", "--max-attempts", "0", "--external"], ["x", "--warn-at", "1.2", "--external"], ["x", "--env", "GRACE_DB=1", "--", "true"]):  # fmt: skip
        assert queue.call("handler", "add", *words).status == 2, words
    assert queue.call("handler", "add", "x", "--rescue", "nobody", "--external").status == 3
    assert [row["name"] for row in queue.json("handler", "list")] == ["work"]


def test_a_handler_with_unfinished_tasks_or_a_charge_is_not_removed(queue: Place) -> None:
    """Afterwards it goes, and its finished tasks stay readable."""
    _, task_id = queue.submit("a goal", "--handler", "work")
    conflict(queue, "handler", "remove", "work")
    queue.ok("task", "cancel", task_id)
    queue.handler("rescued", "--external", "--rescue", "work")
    assert "rescued" in conflict(queue, "handler", "remove", "work")
    queue.ok("handler", "remove", "rescued")
    queue.ok("handler", "remove", "work")
    assert queue.json("handler", "list") == []
    assert queue.call("handler", "remove", "work").status == 3
    assert queue.task(task_id)["handler"] == "work"
    assert queue.call("task", "retry", task_id).status == 3


# ---- cancelling and retrying


def test_cancelling_ends_task_and_intent_once(queue: Place) -> None:
    """Queued or running; a second time is refused, and so is the worker that comes too late."""
    waiting, running = queue.submit("waiting", "--handler", "work", "--priority", "low"), queue.submit("running", "--handler", "work", "--sla", "1h")
    claim(queue)
    assert queue.json("intent", "cancel", waiting[0])["status"] == "cancelled"
    task = queue.json("task", "cancel", running[1])
    assert (task["status"], task["sla_met"], task["success"]) == ("cancelled", None, False)
    for intent_id, task_id in (waiting, running):
        assert states(queue)[intent_id][::2] == ("cancelled", "cancelled")
        conflict(queue, "task", "cancel", task_id)
        conflict(queue, "intent", "cancel", intent_id)
    conflict(queue, "task", "complete", running[1], "--worker", "w")
    assert queue.sql("SELECT outcome FROM htm_task_attempts") == [["cancelled"]]


@pytest.mark.parametrize("command", ["task", "intent"])
def test_a_retry_takes_the_place_of_an_open_task(queue: Place, command: str) -> None:
    """A new task with a new window; the original ends in the same transaction, and its worker has lost it."""
    intent_id, old = queue.submit("a goal", "--handler", "work", "--sla", "1h", "--context", '{"a": 1}', "--priority", "high")
    attempt = claim(queue)
    new = queue.json(command, "retry", old if command == "task" else intent_id)
    assert (new["retry_of"], new["intent_id"], new["status"], new["attempt_number"], new["priority"]) == (old, intent_id, "queued", 0, "high")
    assert new["payload"] == {**attempt["payload"], "task_id": new["task_id"], "sla_deadline": new["sla_deadline"]}
    assert new["sla_deadline"] > attempt["sla_deadline"]
    ended = queue.task(old)
    assert (ended["status"], ended["reason"], ended["finished_at"]) == ("cancelled", "retried", new["created_at"])
    intent = queue.intent(intent_id)
    assert (intent["status"], intent["htm_task_id"], intent["completed_at"]) == ("dispatched", new["task_id"], None)
    conflict(queue, "task", "complete", old, "--worker", "w")
    assert new["task_id"] in queue.call("--json", "task", "retry", old).error["hint"]
    conflict(queue, "task", "retry", old)
    assert claim(queue)["task_id"] == new["task_id"]
    queue.ok("task", "complete", new["task_id"], "--worker", "w")
    assert queue.intent(intent_id)["status"] == "completed"
    assert len(queue.events("agentic.intent.*")) == 2, "created and completed, once each"


def test_a_retry_reopens_what_failed_but_never_what_completed(queue: Place) -> None:
    """Failed and cancelled intents go back to dispatched; a completed one stays."""
    intent_id, task_id = queue.submit("a goal", "--handler", "work")
    claim(queue)
    queue.ok("task", "fail", task_id, "--worker", "w", "--error", "x", "--no-retry")
    second = queue.json("intent", "retry", intent_id)["task_id"]
    intent = queue.intent(intent_id)
    assert (intent["status"], intent["success"], intent["completed_at"], intent["learned_from"]) == ("dispatched", None, None, False)
    queue.ok("task", "cancel", second)
    third = queue.json("task", "retry", second)["task_id"]
    claim(queue)
    queue.ok("task", "complete", third, "--worker", "w")
    for words in (["intent", "retry", intent_id], ["task", "retry", third], ["task", "retry", task_id]):
        conflict(queue, *words)
    assert [queue.task(name)["status"] for name in (task_id, second, third)] == ["failed", "cancelled", "completed"]
    assert queue.sql("SELECT COUNT(*) FROM outcome_records") == [[3]]


# ---- ids


def test_an_id_may_be_shortened_as_long_as_it_is_clear(queue: Place) -> None:
    """An exact match wins; an ambiguous prefix lists the candidates; an unknown one is not found."""
    tasks = {name: queue.submit("g", "--handler", "work", "--intent-id", name)[1] for name in ("alpha", "alpha-1", "alpha-2")}
    queue.submit("g", "--handler", "work", "--intent-id", "beta-long-name")
    assert queue.intent("alpha")["intent_id"] == "alpha"
    assert queue.intent("b")["intent_id"] == "beta-long-name"
    done = queue.call("--json", "intent", "show", "alpha-")
    assert (done.status, done.error["code"]) == (2, "usage")
    assert "alpha-1" in done.error["message"] and "alpha-2" in done.error["message"]
    assert queue.call("intent", "show", "gamma").status == 3
    assert queue.call("intent", "show", "alp%").status == 2
    assert queue.task(tasks["alpha"])["task_id"] == tasks["alpha"]
    shortest = next(n for n in range(6, 30) if sum(task.startswith(tasks["alpha-1"][:n]) for task in tasks.values()) == 1)
    assert queue.task(tasks["alpha-1"][: shortest + 2])["intent_id"] == "alpha-1"
    assert queue.call("task", "show", "task_").status == 2
    assert queue.call("task", "cancel", "task_zzz").status == 3
    for text in ("", " ", "a b", "x" * 200):
        assert queue.call("intent", "show", text).status == 2


# ---- the counts, after anything


class Machine:
    """Random operations on a real file at times of our own, beside a small model of what must come of each."""

    def __init__(self, module: Any, place: Place, seed: int):
        self.g, self.chance, self.now = module, random.Random(seed), 1_790_000_000_000
        self.store = module.Store(str(place.db), "machine")
        self.expected: dict[str, str] = {}
        for name, more in (("work", {}), ("slow", {"backoff_ms": HOUR, "max_attempts": 2}), ("stoic", {"on_critical": "none"})):
            self.write(lambda tx, name=name, more=more: module.put_handler(tx, {**module.HANDLER_DEFAULTS, "name": name, "external": 1, **more}, False))

    def write(self, work: Callable[[Any], Any]) -> Any:
        def at_our_time(tx: Any) -> Any:
            tx.now = self.now
            return work(tx)

        return self.store.write(at_our_time)

    def some(self, *statuses: str) -> dict[str, Any] | None:
        rows = self.store.all("SELECT * FROM htm_tasks WHERE task_type <> 'rescue' ORDER BY seq")
        rows = [row for row in rows if row["status"] in statuses]
        return self.chance.choice(rows) if rows else None

    def submit(self) -> None:
        hopeful = "SELECT intent_id FROM intent_records WHERE status NOT IN ('failed', 'timeout', 'cancelled')"
        open_intents = [row["intent_id"] for row in self.store.all(hopeful)]
        after = self.chance.sample(open_intents, min(len(open_intents), 2)) if self.chance.random() < 0.3 else []
        spec = {"goal": "g", "handler": self.chance.choice(["work", "slow", "stoic"]), "priority": self.chance.choice(self.g.PRIORITIES), "after": after,
                "sla_ms": self.chance.choice([None, 10_000, 60_000, HOUR]), "at": self.chance.choice([None, None, self.now + 20_000])}  # fmt: skip
        done = self.write(lambda tx: self.g.submit(tx, [spec]))[0]
        finished = {row["intent_id"] for row in self.store.all("SELECT intent_id FROM intent_records WHERE status = 'completed'")}
        self.expected[done["task_id"]] = "queued" if set(after) <= finished else "blocked"

    def claim(self) -> None:
        names = self.chance.sample(["work", "slow", "stoic"], 2)
        task = self.write(lambda tx: self.g.claim_external(tx, names, "w", 30_000))
        if task is not None:
            assert task["handler"] in names
            self.expected[task["task_id"]] = "running"

    def end(self) -> None:
        task = self.some("running")
        if task is not None:
            outcome, again = self.chance.choice(["completed", "completed", "failed"]), self.chance.random() < 0.7
            self.write(lambda tx: self.g.end_attempt(tx, task["task_id"], task["attempt_id"], {"outcome": outcome, "retry": again}))
            left = outcome == "failed" and again and task["attempt_number"] < task["max_attempts"]
            self.expected[task["task_id"]] = "queued" if left else outcome

    def cancel(self) -> None:
        task = self.some("queued", "blocked", "running")
        if task is not None:
            self.write(lambda tx: self.g.cancel(tx, self.g.get_task(tx, task["task_id"])))
            self.expected[task["task_id"]] = "cancelled"

    def cancel_final(self) -> None:
        task = self.some(*self.g.FINAL)
        if task is not None:
            with pytest.raises(self.g.ConflictError):
                self.write(lambda tx: self.g.cancel(tx, self.g.get_task(tx, task["task_id"])))
            self.expected[task["task_id"]] = task["status"]

    def retry(self) -> None:
        task = self.some("queued", "blocked", "running", "failed", "cancelled")
        current = task and self.store.one("SELECT 1 AS n FROM intent_records WHERE htm_task_id = :id", id=task["task_id"])
        if task is not None and current:
            new = self.write(lambda tx: self.g.retry(tx, self.g.get_task(tx, task["task_id"])))
            self.expected[new["task_id"]] = new["status"]
            self.expected[task["task_id"]] = task["status"] if task["status"] in self.g.FINAL else "cancelled"

    def reprioritise(self) -> None:
        task = self.some("queued", "blocked", "running")
        if task is not None:
            with contextlib.suppress(self.g.ConflictError):  # below what its SLA has brought it to
                moved, changed = self.write(lambda tx: self.g.set_priority(tx, task, self.chance.choice(self.g.PRIORITIES)))
                assert changed == (moved["priority"] != task["priority"])
            self.expected[task["task_id"]] = task["status"]

    def pass_time(self) -> None:
        self.now += self.chance.choice([100, 5000, 20_000, 600_000])
        self.write(lambda tx: (self.g.recover_expired(tx), self.g.sweep(tx)))

    def step(self) -> None:
        """One operation; what it acted on is then in the status that the model expects."""
        self.expected.clear()
        weights = {self.submit: 5, self.claim: 5, self.end: 4, self.cancel: 1, self.cancel_final: 1, self.retry: 1, self.reprioritise: 2, self.pass_time: 3}
        self.chance.choices(list(weights), list(weights.values()))[0]()
        self.now += 1
        for task_id, status in self.expected.items():
            assert self.store.value("SELECT status FROM htm_tasks WHERE task_id = :id", id=task_id) == status


NO_SUCH_ROWS = {
    "live counts differ from the rows": """SELECT handler, status, priority, level, SUM(n) AS n FROM (
        SELECT handler, status, priority, level, n FROM task_counts
        UNION ALL SELECT COALESCE(handler, ''), status, priority, escalation_level, -1 FROM htm_tasks)
      GROUP BY handler, status, priority, level HAVING SUM(n) <> 0""",
    "an intent is not where its task is": """SELECT i.intent_id, i.status, t.status AS task FROM intent_records i JOIN htm_tasks t ON t.task_id = i.htm_task_id
      WHERE i.status <> CASE WHEN t.status IN ('queued', 'blocked', 'assigned') THEN 'dispatched'
        WHEN t.status = 'running' THEN 'executing' ELSE t.status END""",
    "an intent without its task": "SELECT intent_id FROM intent_records WHERE htm_task_id IS NULL OR htm_task_id NOT IN (SELECT task_id FROM htm_tasks)",
    "a final task without its one outcome": """SELECT task_id FROM htm_tasks WHERE (finished_at IS NOT NULL AND task_type <> 'rescue')
      <> (task_id IN (SELECT task_id FROM outcome_records))""",
    "an intent that did not learn, or too early": "SELECT intent_id FROM intent_records WHERE (completed_at IS NOT NULL) <> (learned_from = 1)",
    "an open attempt of a task that is not active": """SELECT a.attempt_id FROM htm_task_attempts a JOIN htm_tasks t ON t.task_id = a.task_id
      WHERE a.finished_at IS NULL AND COALESCE(t.attempt_id, '') <> a.attempt_id""",
    "a level without its one event": """SELECT t.task_id, l.level FROM htm_tasks t JOIN sla_levels l ON l.level BETWEEN 1 AND t.escalation_level
      WHERE (SELECT COUNT(*) FROM events e WHERE e.topic = l.topic AND e.subject = t.task_id) <> 1""",
    "an event above the level": """SELECT e.seq FROM events e JOIN sla_levels l ON l.topic = e.topic JOIN htm_tasks t ON t.task_id = e.subject
      WHERE t.escalation_level < l.level""",
    "an open rescue of a final task": """SELECT r.task_id FROM htm_tasks r JOIN htm_tasks t ON t.task_id = r.parent_task_id
      WHERE r.finished_at IS NULL AND t.finished_at IS NOT NULL""",
    "a blocked task that waits for nothing": """SELECT task_id FROM htm_tasks t WHERE status = 'blocked' AND NOT EXISTS (SELECT 1 FROM task_dependencies d
      JOIN intent_records i ON i.intent_id = d.intent_id WHERE d.task_id = t.task_id AND i.status <> 'completed')""",
}


def brute_force(sql: Callable[[str], list[list[Any]]]) -> dict[str, Any]:
    """The counters of `status`, counted from the rows and the events."""
    columns = "status, priority, escalation_level, finished_at, recoveries, sla_ms, sla_met, queue_time_ms, execution_time_ms, total_time_ms, task_type"
    tasks = [dict(zip(columns.split(", "), row, strict=True)) for row in sql(f"SELECT {columns} FROM htm_tasks")]
    status = Counter(task["status"] for task in tasks)
    queued = Counter(task["priority"] for task in tasks if task["status"] == "queued")
    judged = [task["sla_met"] for task in tasks if task["finished_at"] and task["sla_ms"] and task["status"] != "cancelled"]
    topics = Counter(row[0] for row in sql("SELECT topic FROM events WHERE topic LIKE 'htm.sla.%'"))
    moved = sql("SELECT COUNT(*) FROM events WHERE json_extract(payload, '$.previous_priority') IS NOT NULL AND json_extract(payload, '$.status') = 'queued'"
                " AND json_extract(payload, '$.reason') <> 'command'")  # what people move is not what the queue has moved

    def mean(name: str, which: Callable[[dict[str, Any]], bool]) -> float | None:
        values = [task[name] or 0 for task in tasks if which(task)]
        return sum(values) / len(values) if values else None

    return {
        "total_tasks": len(tasks), "active_tasks": status["assigned"] + status["running"], "queued_tasks": status["queued"],
        "blocked_tasks": status["blocked"], "completed_tasks": status["completed"], "failed_tasks": status["failed"] + status["timeout"],
        "cancelled_tasks": status["cancelled"], "sla_compliance_rate": sum(judged) / len(judged) if judged else None,
        "queue_depths": {name: queued[name] for name in ("critical", "high", "normal", "low")},
        "active_violations": sum(not task["finished_at"] and task["escalation_level"] >= 2 for task in tasks),
        "total_violations": topics["htm.sla.violated"],
        "warnings_issued": topics["htm.sla.warning"], "escalations_triggered": topics["htm.sla.violated"],
        "sub_agents_spawned": sum(task["task_type"] == "rescue" for task in tasks), "tasks_recovered": sum(task["recoveries"] for task in tasks),
        "queue_reprioritizations": moved[0][0], "avg_execution_time_ms": mean("execution_time_ms", lambda task: task["status"] == "completed"),
        "avg_queue_time_ms": mean("queue_time_ms", lambda task: task["status"] == "completed"),
        "avg_total_time_ms": mean("total_time_ms", lambda task: task["status"] == "completed"),
    }  # fmt: skip


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_counts_and_links_are_right_after_anything(place: Place, module: Any, seed: int) -> None:
    """Some hundred random operations: every step legal, every invariant kept, every counter as counted from the rows."""
    machine = Machine(module, place, seed)
    for number in range(300):
        machine.step()
        if number % 20 == 0:
            for what, question in NO_SUCH_ROWS.items():
                assert machine.store.all(question) == [], f"{what} after {number} operations"
    machine.store.close()
    for what, question in NO_SUCH_ROWS.items():
        assert place.sql(question) == [], what
    steps = place.sql("SELECT DISTINCT json_extract(payload, '$.previous_status') AS a, json_extract(payload, '$.status') AS b FROM events "
                      "WHERE topic LIKE 'htm.task.%' AND json_extract(payload, '$.previous_status') IS NOT NULL")  # fmt: skip
    assert len(steps) > 6
    assert [step for step in steps if step[1] not in module.TASK_TRANSITIONS.get(step[0], ())] == []
    expected = brute_force(place.sql)
    assert min(expected["completed_tasks"], expected["cancelled_tasks"], expected["tasks_recovered"], expected["sub_agents_spawned"]) > 0
    with contextlib.closing(module.Store(str(place.db))) as store:
        counters = store.read(lambda reader: module.queue_counters(reader, module.clock(), module.MAX_DURATION))
    assert {name: counters[name] for name in expected} == expected
    assert place.sql("PRAGMA foreign_key_check") == []


# ---- what a statement may cost


def test_no_statement_reads_a_large_table_from_end_to_end(queue: Place) -> None:
    """Tasks, intents, attempts, events and rollups may be a million each: all but counting anew and the newest events go by an index."""
    g = load_module()
    large = {"htm_tasks", "t", "intent_records", "i", "htm_task_attempts", "a", "outcome_records", "events", "htm_metrics", "htm_durations", "htm_histograms"}
    statements = {name: value for name, value in vars(g).items()
                  if name.isupper() and isinstance(value, str) and re.match(r"(SELECT|UPDATE|DELETE|INSERT|WITH)\b", value)}  # fmt: skip
    assert len(statements) > 80
    store = g.Store(str(queue.db))
    store.con.create_scalar_function("duration_bucket", g.bucket_in_sql, 1)  # as in recount()
    for table in (*g.COUNTED, "outcome_tallies"):
        store.con.execute(f"CREATE TEMPORARY TABLE old_{table} AS SELECT * FROM {table}")
    scans = set()
    for name, sql in statements.items():
        plan = store.con.execute(f"EXPLAIN QUERY PLAN {sql}", dict.fromkeys(re.findall(r":(\w+)", sql))).fetchall()
        scans |= {name for line in plan if re.fullmatch(r"SCAN (\w+)", line[-1]) and line[-1].split()[1] in large}
    store.close()
    anew = {"RECOUNT_OPEN", "RECOUNT_ALL", "RECOUNT_HOURS", "RECOUNT_IMPORTED", "RECOUNT_DURATIONS", "RECOUNT_TOTALS"}
    assert scans == {*anew, "TALLY_TASKS", "EVENTS_NEWEST"}
