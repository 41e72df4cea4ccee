"""What must never happen, tried: everything is killed at any moment, clocks jump, disks fill, and no work is lost or doubled.

INVARIANTS are queries that must return no row, whatever was done to a database before.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import GRACE, LIMIT, Place, alive, shell, until

FOREVER = "while :; do sleep 0.1; done"
LEVELS = ["htm.sla.warning", "htm.sla.violated", "htm.sla.critical"]
FINAL = "('completed', 'failed', 'timeout', 'cancelled')"

INVARIANTS = {
    "at most one open attempt a task": "SELECT task_id FROM htm_task_attempts WHERE finished_at IS NULL GROUP BY task_id HAVING COUNT(*) > 1",
    "an active task's attempt is open and its worker's": """SELECT t.task_id FROM htm_tasks t LEFT JOIN htm_task_attempts a USING (attempt_id)
        WHERE t.status IN ('assigned', 'running') AND (a.attempt_id IS NULL OR a.finished_at IS NOT NULL OR a.task_id <> t.task_id
          OR a.worker_id <> t.assigned_worker)""",
    "an active task's worker is known and not stopped": """SELECT t.task_id FROM htm_tasks t JOIN htm_task_attempts a USING (attempt_id)
        LEFT JOIN workers w ON w.worker_id = a.worker_id WHERE a.lease_ms IS NULL AND (w.worker_id IS NULL OR w.stopped_at IS NOT NULL)""",
    "a worker that has stopped has no open attempt": """SELECT a.attempt_id FROM htm_task_attempts a JOIN workers w USING (worker_id)
        WHERE a.finished_at IS NULL AND w.stopped_at IS NOT NULL""",
    "intent and task agree": f"""SELECT i.intent_id FROM intent_records i LEFT JOIN htm_tasks t ON t.task_id = i.htm_task_id
        WHERE t.task_id IS NULL OR t.intent_id IS NOT i.intent_id OR i.status <> CASE WHEN t.status IN {FINAL} THEN t.status
          WHEN t.status = 'running' THEN 'executing' ELSE 'dispatched' END""",
    "a final intent says how it ended and is learned from": f"""SELECT intent_id FROM intent_records WHERE status IN {FINAL}
        AND (learned_from <> 1 OR success IS NOT (status = 'completed'))""",
    "one outcome for each final task that is no rescue": """SELECT t.task_id FROM htm_tasks t LEFT JOIN outcome_records o USING (task_id)
        GROUP BY t.task_id HAVING COUNT(o.seq) <> (t.finished_at IS NOT NULL AND t.task_type <> 'rescue')""",
    "every outcome has its task": "SELECT task_id FROM outcome_records WHERE task_id NOT IN (SELECT task_id FROM htm_tasks)",
    "the live counts are right": """SELECT handler, status, priority, level, SUM(n) AS off FROM (
          SELECT handler, status, priority, level, n FROM task_counts UNION ALL
          SELECT COALESCE(handler, ''), status, priority, escalation_level, -1 FROM htm_tasks)
        GROUP BY handler, status, priority, level HAVING SUM(n) <> 0""",
    "each level at most once": f"""SELECT subject, topic FROM events WHERE topic IN {tuple(LEVELS)} GROUP BY subject, topic HAVING COUNT(*) > 1""",
    "levels up to the task's own, and no more": f"""SELECT t.task_id FROM htm_tasks t LEFT JOIN events e
        ON e.subject = t.task_id AND e.topic IN {tuple(LEVELS)} GROUP BY t.task_id HAVING COUNT(e.seq) <> t.escalation_level""",
    "levels in order": """SELECT a.subject FROM events a JOIN events b ON a.subject = b.subject AND a.seq > b.seq
        WHERE (a.topic, b.topic) IN (VALUES ('htm.sla.warning', 'htm.sla.violated'), ('htm.sla.warning', 'htm.sla.critical'),
          ('htm.sla.violated', 'htm.sla.critical'))""",
    "nothing fires after the end": f"""SELECT e.subject FROM events e JOIN events f ON f.subject = e.subject AND f.seq < e.seq
        WHERE e.topic IN {tuple(LEVELS)} AND f.topic IN ('htm.task.completed', 'htm.task.failed', 'htm.task.timeout', 'htm.task.cancelled')""",
    "a task ends once": """SELECT subject FROM events WHERE topic IN ('htm.task.completed', 'htm.task.failed', 'htm.task.timeout', 'htm.task.cancelled')
        GROUP BY subject HAVING COUNT(*) > 1""",
    "counters equal the events": """SELECT c.name FROM (SELECT 'warnings_issued' AS name, 'htm.sla.warning' AS topic
          UNION ALL SELECT 'escalations_triggered', 'htm.sla.violated') c
        WHERE COALESCE((SELECT value FROM counters WHERE name = c.name), 0) <> (SELECT COUNT(*) FROM events WHERE topic = c.topic)""",
    "at most one rescue a task": "SELECT parent_task_id FROM htm_tasks WHERE task_type = 'rescue' GROUP BY parent_task_id HAVING COUNT(*) > 1",
    "a rescue is never rescued": """SELECT r.task_id FROM htm_tasks r JOIN htm_tasks p ON p.task_id = r.parent_task_id
        WHERE r.task_type = 'rescue' AND p.task_type = 'rescue'""",
    "no rescue outlives its original": f"""SELECT r.task_id FROM htm_tasks r JOIN htm_tasks p ON p.task_id = r.parent_task_id
        WHERE r.task_type = 'rescue' AND r.finished_at IS NULL AND p.status IN {FINAL}
          AND r.status NOT IN ('assigned', 'running')""",
    "a final task has no next step": f"SELECT task_id FROM htm_tasks WHERE status IN {FINAL} AND (next_at IS NOT NULL OR attempt_id IS NOT NULL)",
    "an open task with steps before it has a next look": """SELECT task_id FROM htm_tasks WHERE finished_at IS NULL AND set_aside IS NULL
        AND next_at IS NULL AND (available_at IS NOT NULL OR (sla_ms IS NOT NULL AND escalation_level < CASE task_type WHEN 'rescue' THEN 2 ELSE 3 END))""",
    "nothing is asked twice at once": """SELECT task_id FROM secret_consent_records WHERE mode = 'collect' AND task_id IS NOT NULL
        AND consent_status IN ('pending', 'approved') GROUP BY task_id, secret_key, json(request) -> 'claimed' ->> 'action' HAVING COUNT(*) > 1""",
    "nothing is asked for a task that has ended": f"""SELECT c.consent_id FROM secret_consent_records c JOIN htm_tasks t USING (task_id)
        WHERE c.mode = 'collect' AND c.consent_status IN ('pending', 'approved') AND t.status IN {FINAL}""",
    "a blocked task waits for something": """SELECT t.task_id FROM htm_tasks t WHERE t.status = 'blocked' AND t.reason <> 'waiting_consent' AND NOT EXISTS (
        SELECT 1 FROM task_dependencies d JOIN intent_records i USING (intent_id) WHERE d.task_id = t.task_id AND i.completed_at IS NULL)""",
    "attempts of one task do not overlap": """SELECT a.task_id FROM htm_task_attempts a JOIN htm_task_attempts b ON a.task_id = b.task_id
        AND a.rowid < b.rowid WHERE b.created_at < COALESCE(a.finished_at, 9e15)""",
    "every event of a task has its task": """SELECT seq FROM events WHERE topic LIKE 'htm.task.%' AND subject NOT IN (SELECT task_id FROM htm_tasks)""",
}  # fmt: skip


def check_invariants(place: Place) -> None:
    """The database satisfies every invariant, and SQLite finds it whole."""
    broken = {name: rows for name, query in INVARIANTS.items() if (rows := place.sql(query))}
    assert broken == {}
    assert place.sql("PRAGMA integrity_check") == [["ok"]]
    assert place.sql("PRAGMA foreign_key_check") == []


def written_pid(path: Path) -> int:
    return int(until(lambda: path.exists() and path.read_text().strip(), f"a pid in {path.name}"))


def kill(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait(LIMIT)


def quiet_daemon(place: Place, *options: str) -> subprocess.Popen[bytes]:
    return place.start("daemon", *options, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def counts(place: Place) -> dict[str, int]:
    return {str(row[0]): int(row[1]) for row in place.sql("SELECT status, COUNT(*) AS n FROM htm_tasks WHERE task_type <> 'rescue' GROUP BY status")}


def sla_topics(place: Place, task_id: str) -> list[str]:
    return [event["topic"] for event in place.events("htm.sla.*") if event["payload"].get("task_id") == task_id]


EXCLUSIVE = """#!/usr/bin/env python3
# Runs a moment, and tells when another copy of the same task runs at that moment.
import fcntl, os, sys, time
folder, task = sys.argv[1], os.environ["GRACE_TASK_ID"]
lock = os.open(os.path.join(folder, task + ".lock"), os.O_CREAT | os.O_RDWR, 0o600)
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    with open(os.path.join(folder, "overlaps"), "a") as file:
        file.write(task + "\\n")
with open(os.path.join(folder, "starts"), "a") as file:
    file.write(task + "\\n")
time.sleep(0.05 + int.from_bytes(os.urandom(1), "big") / 600)
with open(os.path.join(folder, "ends"), "a") as file:
    file.write(task + "\\n")
"""


@pytest.fixture
def exclusive(place: Place) -> Path:
    """A handler `work` whose copies of one task may never run at once; the folder where they write."""
    folder = place.folder / "marks"
    folder.mkdir()
    script = place.folder / "exclusive"
    script.write_text(EXCLUSIVE)
    script.chmod(0o755)
    place.handler("work", "--max-recoveries", "100", "--kill-after", "2s", "--max-attempts", "1", "--", str(script), str(folder))
    return folder


# ---- killing


@pytest.mark.parametrize("seed", [1, 2])
def test_a_daemon_killed_at_any_moment_loses_and_doubles_nothing(place: Place, exclusive: Path, seed: int) -> None:
    """Daemons are killed again and again while tasks are queued, assigned, running and finishing; in the end each task is done."""
    chance = random.Random(seed)
    batch = "".join(json.dumps({"goal": f"survive {number}", "handler": "work", "sla": ["1s", "3s", "1h"][number % 3]}) + "\n" for number in range(40))
    tasks = [done["task_id"] for done in place.ok("submit-intent", "--batch", "-", "--json", stdin=batch.encode()).lines]
    for _ in range(7):
        daemon = quiet_daemon(place, "--workers", "3")
        with contextlib.suppress(subprocess.TimeoutExpired):
            daemon.wait(chance.uniform(0.12, 0.6))
        kill(daemon)
        check_invariants(place)
    assert len(place.sql("SELECT worker_id FROM workers WHERE stopped_at IS NULL OR stopped_at > 0")) >= 3, "some daemons came as far as to work"
    with place.daemon("--workers", "3"):
        until(lambda: counts(place) == {"completed": len(tasks)}, "all tasks to complete")
        until(lambda: place.sql("SELECT COUNT(*) AS n FROM htm_tasks WHERE finished_at IS NULL") == [[0]], "all rescues to end")
    check_invariants(place)
    assert not (exclusive / "overlaps").exists(), "two copies ran at once"
    ends = (exclusive / "ends").read_text().split()
    assert set(ends) == set(tasks)
    assert place.sql("SELECT COUNT(*) AS n FROM htm_tasks WHERE attempt_number > 1") == [[0]], "a lost attempt does not count"
    recovered = sum(row[0] for row in place.sql("SELECT recoveries FROM htm_tasks"))
    assert recovered == len(place.events("htm.task.recovered")) == place.json("status")["tasks_recovered"] > 0
    assert sum(1 for event in place.events("daemon.stopped") if event["payload"]["reason"] == "died") >= 3


def test_several_daemons_killed_in_turn(place: Place, exclusive: Path) -> None:
    """Of three daemons on one file one is killed and replaced now and then; the others recover its work while they go on."""
    chance = random.Random(7)
    batch = "".join(json.dumps({"goal": f"share {number}", "handler": "work"}) + "\n" for number in range(60))
    tasks = [done["task_id"] for done in place.ok("submit-intent", "--batch", "-", "--json", stdin=batch.encode()).lines]
    daemons = [quiet_daemon(place, "--workers", "2") for _ in range(3)]
    for _ in range(6):
        victim = chance.randrange(3)
        with contextlib.suppress(subprocess.TimeoutExpired):
            daemons[victim].wait(chance.uniform(0.2, 0.5))
        kill(daemons[victim])
        daemons[victim] = quiet_daemon(place, "--workers", "2")
    until(lambda: counts(place) == {"completed": len(tasks)}, "all tasks to complete")
    for daemon in daemons:
        daemon.terminate()
    assert [daemon.wait(LIMIT) for daemon in daemons] == [0, 0, 0]
    assert not (exclusive / "overlaps").exists()
    assert set((exclusive / "ends").read_text().split()) == set(tasks)
    check_invariants(place)


def test_levels_fire_once_across_crashes(place: Place) -> None:
    """The daemon is killed around every step of the ladder: each level still fires exactly once, with one rescue."""
    chance = random.Random(3)
    shell(place, "paused", "true")
    place.ok("handler", "pause", "paused")
    tasks = [place.submit(f"climb {number}", "--handler", "paused", "--sla", f"{600 + 100 * number}ms")[1] for number in range(6)]
    begin = time.monotonic()
    while time.monotonic() - begin < 3:
        daemon = quiet_daemon(place)
        with contextlib.suppress(subprocess.TimeoutExpired):
            daemon.wait(chance.uniform(0.15, 0.5))
        kill(daemon)
    with place.daemon():
        until(lambda: all(sla_topics(place, task_id) == LEVELS for task_id in tasks), "all levels")
        until(lambda: place.sql("SELECT COUNT(*) AS n FROM htm_tasks WHERE task_type = 'rescue' AND status = 'completed'") == [[6]], "all rescues to end")
    check_invariants(place)
    assert place.json("status")["sub_agents_spawned"] == 6


def test_a_killed_handler_is_a_failed_attempt(place: Place) -> None:
    """SIGKILL of the handler from outside: exit status 137, then the next attempt."""
    shell(place, "work", f"[ -e again ] && exit 0; touch again; echo $$ > pid; {FOREVER}", "--backoff", "1ms")
    with place.daemon():
        _, task_id = place.submit("is shot", "--handler", "work")
        place.until_status(task_id, "running")
        os.kill(written_pid(place.folder / "pid"), signal.SIGKILL)
        task = place.until_status(task_id, "completed", "failed")
    assert (task["status"], task["attempt_number"]) == ("completed", 2)
    rows = place.sql(f"SELECT outcome, exit_status FROM htm_task_attempts WHERE task_id = '{task_id}' ORDER BY created_at")
    assert rows == [["failed", 137], ["completed", 0]]
    assert place.events("htm.task.recovered") == []
    check_invariants(place)


def test_leftovers_of_a_killed_daemon_end_before_the_task_runs_again(place: Place) -> None:
    """A handler and its child in another session survive their daemon, ignoring TERM: they are ended first, then the task goes back."""
    text = f"""if [ -e pids ]; then for p in $(cat pids); do grep "^State:.[^ZX]" /proc/$p/status 2>/dev/null; done; exit 0; fi
trap '' TERM; setsid sh -c "trap '' TERM; echo \\$\\$ >> pids; {FOREVER}" & until [ -s pids ]; do sleep 0.05; done; echo $$ >> pids; touch ready; {FOREVER}"""
    shell(place, "stubborn", text, "--kill-after", "700ms")
    with place.daemon() as daemon:
        _, task_id = place.submit("stubborn", "--handler", "stubborn")
        until((place.folder / "ready").exists, "both processes")
        place.until_status(task_id, "running")
        kill(daemon)
    pids = [int(word) for word in (place.folder / "pids").read_text().split()]
    assert len(pids) == 2 and all(alive(pid) for pid in pids)
    place.ok("daemon", "--once")
    assert not any(alive(pid) for pid in pids)
    assert (place.task(task_id)["status"], place.ok("task", "log", task_id).out) == ("completed", "")
    check_invariants(place)


def test_a_process_that_is_gone_already_is_not_waited_for(module: Any) -> None:
    """A leftover that ends by itself just before it is signalled holds nothing up."""
    process = subprocess.Popen(["true"])
    process.wait()
    victims = module.Victims([process.pid], 60_000)
    assert victims.step()


def test_a_killed_run_ends_failed_and_takes_its_command_along(place: Place) -> None:
    """`grace run` is killed: whoever looks next ends its command and finds the task failed, reason runner_died."""
    runner = place.start("run", "--sla", "1h", "--", "sh", "-c", f"echo $$ > pid; {FOREVER}", stdout=subprocess.DEVNULL)
    pid = written_pid(place.folder / "pid")
    task_id = until(lambda: place.json("task", "list", "--status", "running"), "the run")[0]["task_id"]
    kill(runner)
    assert alive(pid)
    task = place.task(task_id)
    assert (task["status"], task["reason"]) == ("failed", "runner_died")
    assert not alive(pid)
    assert place.intent(task["intent_id"])["status"] == "failed"
    assert place.json("status")["workers"] == []
    check_invariants(place)


def test_a_killed_run_is_noticed_by_a_daemon(place: Place) -> None:
    """The same when it is a daemon that looks; it does not try the command again."""
    with place.daemon():
        runner = place.start("run", "--", "sh", "-c", f"echo $$ > pid; {FOREVER}", stdout=subprocess.DEVNULL)
        pid = written_pid(place.folder / "pid")
        kill(runner)
        until(lambda: not alive(pid), "the command to be ended")
        until(lambda: place.sql("SELECT status, reason FROM htm_tasks") == [["failed", "runner_died"]], "the end")
    check_invariants(place)


def test_a_run_killed_at_any_moment_leaves_one_whole_record_or_none(place: Place) -> None:
    """However early or late it is killed: no task stays open, nothing half there, no process left."""
    chance = random.Random(11)
    for number in range(12):
        runner = place.start("run", "--goal", f"run {number}", "--", "sh", "-c", f"echo $$ >> pids; {FOREVER}", stdout=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            runner.wait(chance.uniform(0.05, 0.25))
        kill(runner)
    tasks = place.json("task", "list")
    assert {(task["status"], task["reason"]) for task in tasks} <= {("failed", "runner_died")}
    pids = [int(word) for word in (place.folder / "pids").read_text().split()] if (place.folder / "pids").exists() else []
    assert not [pid for pid in pids if alive(pid)]
    check_invariants(place)


def test_a_killed_submission_is_there_or_not_but_never_half(place: Place) -> None:
    """submit-intent killed at random moments: what was acknowledged is there, a batch is whole or absent."""
    shell(place, "work", "true")
    place.sql("SELECT 1")
    batch = place.folder / "batch"
    chance, acknowledged = random.Random(5), []
    for number in range(24):
        batch.write_text("".join(json.dumps({"goal": f"{number}", "handler": "work", "intent_id": f"b{number}.{line}"}) + "\n" for line in range(30)))
        process = place.start("submit-intent", "--batch", str(batch), stderr=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(chance.uniform(0.06, 0.16))
        kill(process)
        assert process.stdout is not None
        if process.stdout.read():
            acknowledged.append(str(number))
    found = {str(row[0]): row[1] for row in place.sql("SELECT goal, COUNT(*) AS n FROM intent_records GROUP BY goal")}
    assert set(found.values()) <= {30}
    assert set(acknowledged) <= set(found)
    check_invariants(place)
    place.ok("submit-intent", "afterwards", "--handler", "work")
    place.ok("daemon", "--once", "--workers", "8")
    assert counts(place) == {"completed": 30 * len(found) + 1}
    check_invariants(place)


def test_a_task_that_kills_its_daemon_is_given_up_as_poison(place: Place) -> None:
    """With --max-recoveries 2 the third death of its worker ends the task; recovery is at once, without a back-off."""
    shell(place, "poison", "echo ran >> ran; kill -9 $PPID; sleep 60", "--max-recoveries", "2", "--kill-after", "1s", "--backoff", "1h")
    _, task_id = place.submit("kills", "--handler", "poison")
    for _ in range(3):
        daemon = quiet_daemon(place)
        assert daemon.wait(LIMIT) == -signal.SIGKILL
    shell(place, "work", "true")
    _, other = place.submit("others go on", "--handler", "work")
    place.ok("daemon", "--once")
    task = place.task(task_id)
    assert (task["status"], task["reason"], task["success"]) == ("failed", "poison", False)
    assert place.task(other)["status"] == "completed"
    assert (place.folder / "ran").read_text() == "ran\n" * 3
    assert place.sql(f"SELECT recoveries, deaths, attempt_number FROM htm_tasks WHERE task_id = '{task_id}'")[0][:2] == [2, 2]
    assert len(place.events("htm.task.recovered")) == 2
    check_invariants(place)


def test_shutdowns_do_not_count_as_crashes(place: Place) -> None:
    """However often a task is interrupted by a shutdown, it is no poison; a crash is counted apart, and both restore the attempt."""
    shell(place, "work", f"[ -e go ] && exit 0; {FOREVER}", "--max-recoveries", "1", "--max-attempts", "1")
    _, task_id = place.submit("interrupted", "--handler", "work")
    for _ in range(3):
        with place.daemon("--grace-period", "1ms"):
            place.until_status(task_id, "running")
    task = place.task(task_id)
    assert (task["status"], task["reason"], task["attempt_number"]) == ("queued", "interrupted", 0)
    assert place.sql("SELECT recoveries, deaths FROM htm_tasks") == [[0, 0]]
    assert place.events("htm.task.recovered") == []
    with place.daemon() as daemon:
        place.until_status(task_id, "running")
        kill(daemon)
    (place.folder / "go").touch()
    place.ok("daemon", "--once")
    assert place.sql("SELECT status, recoveries, deaths, attempt_number FROM htm_tasks") == [["completed", 1, 1, 1]]
    assert place.sql("SELECT outcome FROM htm_task_attempts ORDER BY created_at") == [["interrupted"]] * 3 + [["lost"], ["completed"]]
    check_invariants(place)


# ---- leases


def test_an_expired_lease_goes_back_to_the_queue(place: Place) -> None:
    """An external worker that falls silent loses its task; without any daemon the next claim finds it, and the late one is refused."""
    place.handler("outside", "--external")
    intent_id, task_id = place.submit("outside", "--handler", "outside")
    first = place.json("task", "claim", "--handler", "outside", "--worker", "w1", "--lease", "600ms")
    assert first["task_id"] == task_id and place.intent(intent_id)["status"] == "executing"
    second = until(lambda: place.call("--json", "task", "claim", "--handler", "outside", "--worker", "w2").json, "the lease to expire")
    assert (second["task_id"], second["attempt_number"]) == (task_id, 1) and second["attempt_id"] != first["attempt_id"]
    for words in (["complete", task_id], ["fail", task_id, "--error", "late"], ["heartbeat", task_id]):
        assert place.call("task", *words, "--worker", "w1").status == 4, words
    assert place.call("task", "complete", task_id, "--worker", "w2", "--attempt-id", first["attempt_id"]).status == 4
    place.ok("task", "complete", task_id, "--worker", "w2", "--result", '{"by": "w2"}')
    assert (place.task(task_id)["status"], place.task(task_id)["result"]) == ("completed", {"by": "w2"})
    assert len(place.events("htm.task.recovered")) == 1
    check_invariants(place)


def test_a_daemon_returns_expired_leases_and_heartbeats_prevent_it(place: Place) -> None:
    """A lease that is renewed lives on beyond its length; once the heartbeats end, the daemon puts the task back."""
    place.handler("outside", "--external")
    _, task_id = place.submit("outside", "--handler", "outside")
    with place.daemon():
        place.json("task", "claim", "--handler", "outside", "--worker", "w1", "--lease", "2s")
        begin = time.monotonic()
        while time.monotonic() - begin < 3:
            place.ok("task", "heartbeat", task_id, "--worker", "w1")
            time.sleep(0.3)  # the rhythm of the heartbeats
        assert place.task(task_id)["status"] == "running"
        assert place.until_status(task_id, "queued")["reason"] == "recovered"
    check_invariants(place)


# ---- clocks


@pytest.fixture
def faketime(place: Place) -> Iterator[Any]:
    """Sets the wall clock of the daemons started with its environment: call it with an offset such as +1h."""
    library = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))), None)
    if library is None:
        pytest.skip("libfaketime is not installed")
    offset = place.folder / "offset"
    offset.write_text("+0\n")

    def step(text: str) -> None:
        spare = place.folder / "offset.new"
        spare.write_text(f"{text}\n")
        spare.replace(offset)

    step.environment = {"LD_PRELOAD": str(library), "FAKETIME_TIMESTAMP_FILE": str(offset), "FAKETIME_NO_CACHE": "1",  # type: ignore[attr-defined]
                        "FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1"}  # fmt: skip
    yield step


def test_a_forward_jump_of_the_clock_is_recorded_once_and_bursts_nothing(place: Place, faketime: Any) -> None:
    """An hour is skipped: one daemon.suspended, leases moved along, each level once, no attempt lost."""
    place.handler("outside", "--external")
    shell(place, "work", "until [ -e go ]; do sleep 0.05; done")
    with place.daemon("--workers", "2", env=faketime.environment):
        external = place.submit("outside", "--handler", "outside")[1]
        lease = place.json("task", "claim", "--handler", "outside", "--worker", "w1", "--lease", "5m")["lease_expires_at"]
        _, task_id = place.submit("runs through it", "--handler", "work", "--sla", "10m")
        place.until_status(task_id, "running")
        faketime("+3600")
        until(lambda: place.events("daemon.suspended"), "the jump to be noticed")
        until(lambda: sla_topics(place, task_id) == LEVELS, "the levels")
        (place.folder / "go").touch()
        place.until_status(task_id, "completed")
        faketime("+3601")
        until(lambda: len(place.events("daemon.started")) == 1 and place.json("status")["workers"], "a further look")
        suspended = [event["payload"] for event in place.events("daemon.suspended")]
        assert abs(suspended[0]["clock_step_ms"] - 3_600_000) < 60_000 and abs(suspended[0]["asleep_ms"]) < 1000
        assert sum(event["clock_step_ms"] > 60_000 for event in suspended) == 1
        assert place.task(external)["status"] == "running", "its lease was moved along with the clock"
        moved = place.sql("SELECT lease_expires_at FROM htm_task_attempts WHERE lease_ms IS NOT NULL")[0][0]
        assert moved > 0 and lease
    assert sla_topics(place, task_id) == LEVELS
    assert place.sql(f"SELECT COUNT(*) AS n FROM htm_task_attempts WHERE task_id = '{task_id}'") == [[1]]
    assert place.sql("SELECT COUNT(*) AS n FROM htm_tasks WHERE task_type = 'rescue'") == [[1]]
    check_invariants(place)


def test_two_daemons_move_a_lease_along_only_once(place: Place, faketime: Any) -> None:
    """Both notice the same jump of an hour; the lease is an hour later, not two."""
    place.handler("outside", "--external")
    place.ok("config", "set", "daemon.heartbeat_every", "200ms")
    with place.daemon(env=faketime.environment), place.daemon(env=faketime.environment):
        place.submit("outside", "--handler", "outside")
        place.json("task", "claim", "--handler", "outside", "--worker", "w1", "--lease", "5m")
        query = "SELECT lease_expires_at FROM htm_task_attempts WHERE lease_ms IS NOT NULL"
        before = place.sql(query)[0][0]
        faketime("+3600")
        beyond = f"SELECT COUNT(*) AS n FROM workers WHERE heartbeat_at > {before}"
        until(lambda: place.sql(beyond) == [[2]], "both to have seen the new time")
        assert place.events("daemon.suspended")
        assert abs(place.sql(query)[0][0] - before - 3_600_000) < 60_000


def test_a_backward_step_of_the_clock_stops_nothing(place: Place, faketime: Any) -> None:
    """The clock goes back an hour: the daemon goes on running and finishing tasks."""
    shell(place, "work", "until [ -e go ]; do sleep 0.05; done")
    with place.daemon("--workers", "2", env=faketime.environment):
        _, task_id = place.submit("runs through it", "--handler", "work", "--sla", "10m")
        place.until_status(task_id, "running")
        faketime("-3600")
        until(lambda: place.events("daemon.suspended"), "the step to be noticed")
        (place.folder / "go").touch()
        assert place.until_status(task_id, "completed", "failed")["status"] == "completed"
        _, another = place.submit("after it", "--handler", "work", "--sla", "10m")
        place.until_status(another, "completed")
    task = place.task(task_id)
    assert task["total_time_ms"] >= 0 and task["execution_time_ms"] >= 0
    assert sla_topics(place, task_id) == []
    assert place.events("daemon.suspended")[0]["payload"]["clock_step_ms"] < -3_000_000


# ---- a full disk


@pytest.fixture
def small_disk(place: Place) -> Iterator[Path]:
    """A file system of four megabytes with the place's database on it."""
    folder = place.folder / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=700", "tmpfs", str(folder)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"a file system may not be mounted here: {done.stderr.decode(errors='replace').strip()}")
    place.db = folder / "grace.db"
    place.environment["GRACE_DB"] = str(place.db)
    try:
        yield folder
    finally:
        place.close()
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Use up all that is free, to the last block."""
    ballast = folder / "ballast"
    with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 4096):
            pass
    assert os.statvfs(folder).f_bavail == 0
    return ballast


def until_refused(place: Place, folder: Path) -> Path:
    """Fill the disk, and submit until what was free inside the files is used up too; the ballast."""
    ballast = fill(folder)

    def refused() -> bool:
        done = place.call("submit-intent", "x" * 1500, "--handler", "paused")
        if done.status == 0:
            return False
        assert done.status == 8 and "Traceback" not in done.err and "full" in done.err.lower(), done.err
        assert done.out == ""
        return True

    until(refused, "a submission to be refused")
    return ballast


def test_a_daemon_on_a_full_disk_goes_on_when_there_is_room_again(place: Place, small_disk: Path) -> None:
    """A task ends while the disk is full: nothing is lost, the daemon says so, lives, and records it after room is made."""
    go, over = place.folder / "go", place.folder / "over"
    shell(place, "work", f"until [ -e {go} ]; do sleep 0.05; done; head -c 100000 /dev/zero | tr '\\0' x; touch {over}", "--kill-after", "1s")
    shell(place, "paused", "true")
    place.ok("handler", "pause", "paused")
    with place.daemon("--workers", "2") as daemon:
        intent_id, task_id = place.submit("ends on a full disk", "--handler", "work", "--sla", "1h")
        place.until_status(task_id, "running")
        ballast = until_refused(place, small_disk)
        accepted = place.sql("SELECT COUNT(*) AS n FROM intent_records")[0][0]
        go.touch()
        until(over.exists, "the handler to be over")
        until(lambda: "trouble" in (place.folder / "daemon.log").read_text(), "the daemon to say so")
        assert daemon.poll() is None
        ballast.unlink()
        task = place.until_status(task_id, "completed", "failed")
        assert (task["status"], place.intent(intent_id)["status"]) == ("completed", "completed")
        assert place.sql(f"SELECT log_bytes FROM htm_task_attempts WHERE task_id = '{task_id}'") == [[100_000]]
        place.until_status(place.submit("afterwards", "--handler", "work")[1], "completed")
    assert place.sql("SELECT COUNT(*) AS n FROM intent_records") == [[accepted + 1]]
    check_invariants(place)


def test_levels_due_on_a_full_disk_fire_once_there_is_room(place: Place, small_disk: Path) -> None:
    """The ladder could not be written for a while: afterwards every level is there, once, and marked late."""
    shell(place, "paused", "true")
    place.ok("handler", "pause", "paused")
    with place.daemon() as daemon:
        _, task_id = place.submit("climbs", "--handler", "paused", "--sla", "4s")
        ballast = until_refused(place, small_disk)
        until(lambda: place.task(task_id)["elapsed_ms"] > 8700, "twice the SLA and more")
        assert daemon.poll() is None
        ballast.unlink()
        until(lambda: len(sla_topics(place, task_id)) == 3, "all levels")
        rescues = until(lambda: [task for task in place.json("task", "list", "--status", "completed") if task["parent_task_id"] == task_id], "its rescue")
        assert len(rescues) == 1
    assert sla_topics(place, task_id) == LEVELS
    check_invariants(place)


def test_a_run_on_a_disk_that_fills_up_keeps_its_command(place: Place, small_disk: Path) -> None:
    """The disk fills while the command runs: it runs to its end, and its end is recorded once there is room."""
    shell(place, "paused", "true")
    place.ok("handler", "pause", "paused")
    text = f"touch {place.folder}/begun; until [ -e {place.folder}/go ]; do sleep 0.05; done; touch {place.folder}/over; exit 5"
    runner = place.start("run", "--sla", "1h", "--goal", "the run", "--", "sh", "-c", text, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: place.json("task", "list", "--status", "running"), "the run")
    ballast = until_refused(place, small_disk)
    (place.folder / "go").touch()
    until((place.folder / "over").exists, "the command to be over")
    with contextlib.suppress(subprocess.TimeoutExpired):
        runner.wait(1.5)
    ballast.unlink()
    assert runner.wait(LIMIT) == 5
    (task,) = [task for task in place.json("task", "list") if task["task_type"] == "command"]
    assert (task["status"], task["reason"], task["exit_status"]) == ("failed", None, 5)
    check_invariants(place)


# ---- everything at once


def test_random_trouble_leaves_a_sound_database(place: Place) -> None:
    """A fixed sequence of random commands, kills and reloads beside two daemons; afterwards nothing is open and all agrees."""
    chance = random.Random(20)
    shell(place, "work", "sleep 0.0$((GRACE_ATTEMPT + 2)); [ $(($(cksum < /proc/sys/kernel/random/uuid | cut -c1-4) % 4)) -ne 0 ]", "--backoff", "20ms",
          "--max-recoveries", "100", "--kill-after", "500ms")  # fmt: skip
    shell(place, "slow", FOREVER, "--timeout", "800ms", "--kill-after", "300ms", "--max-attempts", "2", "--backoff", "20ms", "--on-critical", "retry")
    place.handler("outside", "--external")
    daemons = [quiet_daemon(place, "--workers", "2") for _ in range(2)]
    intents: list[str] = []
    for _ in range(45):
        what = chance.choice(["submit"] * 5 + ["after", "cancel", "retry", "kill", "hup", "claim"])
        some = chance.choice(intents) if intents else "int_none"
        if what == "submit":
            words = ["--handler", chance.choice(["work", "work", "slow", "outside"]), "--sla", chance.choice(["300ms", "2s", "1h"])]
            intents.append(place.submit("random", *words)[0])
        elif what == "after":
            done = place.call("--json", "submit-intent", "after", "--handler", "work", "--after", some)
            intents += [done.json["intent_id"]] if done.status == 0 else []
            assert done.status in (0, 3, 4), done.err
        elif what in ("cancel", "retry"):
            done = place.call("intent", what, some)
            assert done.status in (0, 3, 4), done.err
        elif what == "claim":
            done = place.call("--json", "task", "claim", "--handler", "outside", "--worker", "w", "--lease", "300ms")
            if done.status == 0 and chance.random() < 0.6:
                assert place.call("task", "complete", done.json["task_id"], "--worker", "w").status in (0, 4)
        else:
            victim = chance.randrange(2)
            if what == "kill" or daemons[victim].poll() is not None:
                kill(daemons[victim])
                daemons[victim] = quiet_daemon(place, "--workers", "2")
            else:
                daemons[victim].send_signal(signal.SIGHUP)
    for number, daemon in enumerate(daemons):
        if daemon.poll() is not None:
            daemons[number] = quiet_daemon(place, "--workers", "2")

    def settled() -> bool:
        while place.call("task", "complete", *open_external(place), "--worker", "w").status == 0:
            pass
        return place.sql("SELECT COUNT(*) AS n FROM htm_tasks WHERE finished_at IS NULL") == [[0]]

    until(settled, "everything to end")
    for daemon in daemons:
        daemon.terminate()
    assert [daemon.wait(LIMIT) for daemon in daemons] == [0, 0]
    check_invariants(place)
    assert place.sql("SELECT COUNT(*) AS n FROM htm_task_attempts WHERE finished_at IS NULL") == [[0]]
    assert place.sql("SELECT COUNT(*) AS n FROM intent_records") == [[len(intents)]]
    assert place.events("daemon.trouble") == []


def open_external(place: Place) -> list[str]:
    """The id of one external task, claimed for this worker; a name that is no task where there is none."""
    done = place.call("--json", "task", "claim", "--handler", "outside", "--worker", "w", "--lease", "1m")
    return [done.json["task_id"]] if done.status == 0 else ["task_none"]


def test_the_invariants_would_notice(place: Place) -> None:
    """A database broken on purpose breaks them: what this file relies on is not blind."""
    shell(place, "work", "true")
    place.submit("fine", "--handler", "work")
    place.ok("daemon", "--once")
    check_invariants(place)
    place.sql("UPDATE intent_records SET learned_from = 0; UPDATE task_counts SET n = n + 1; DELETE FROM outcome_records")
    names = {name for name, query in INVARIANTS.items() if place.sql(query)}
    assert names == {"a final intent says how it ended and is learned from", "the live counts are right", "one outcome for each final task that is no rescue"}


def test_grace_is_the_installed_command() -> None:
    """What is killed here is what a user runs."""
    assert subprocess.run([GRACE, "--version"], capture_output=True, check=True).stdout
