"""The daemon: what it runs and how, how it stops, and how it is told and heard."""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import json
import os
import pty
import re
import resource
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import GRACE, LIMIT, Place, alive, need, shell, until

FOREVER = "while :; do sleep 0.1; done"


def children_of(pid: int) -> list[tuple[int, str]]:
    """The children of a process with their states, zombies included."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, IndexError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split() if entry.name.isdigit() else []
            if fields and int(fields[1]) == pid:
                found.append((int(entry.name), fields[0]))
    return found


def written(path: Path) -> str:
    return str(until(lambda: path.exists() and path.read_text().strip(), f"something in {path.name}"))


def pids_in(path: Path, count: int = 1) -> list[int]:
    return [int(word) for word in until(lambda: path.exists() and len(path.read_text().split()) >= count and path.read_text().split(), f"pids in {path.name}")]


def attempts(place: Place, task_id: str) -> list[dict[str, Any]]:
    return list(place.json("task", "explain", task_id)["attempts"])


def finished(process: subprocess.Popen[bytes]) -> int:
    return process.wait(LIMIT)


def release(place: Place, name: str = "go") -> None:
    (place.folder / name).touch()


WAIT_FOR_GO = "until [ -e go ]; do sleep 0.05; done"


# ---- running


def test_a_handler_gets_its_payload_and_its_output_is_kept(place: Place) -> None:
    """Payload on stdin, facts in the environment, result from GRACE_RESULT, both outputs in order in one log."""
    text = 'cat > told; env | grep "^GRACE_" | sort > environment; echo one; echo two >&2; echo three; echo \'{"n": 3}\' > "$GRACE_RESULT"'
    shell(place, "work", text)
    intent_id, task_id = place.submit("tell me", "--handler", "work", "--sla", "1m", "--context", '{"a": [1, "ü"]}', "--expected-outcome", "told")
    place.ok("daemon", "--once")
    task, told = place.task(task_id), json.loads((place.folder / "told").read_text())
    environment = dict(line.split("=", 1) for line in (place.folder / "environment").read_text().splitlines())
    assert (task["status"], task["success"], task["exit_status"], task["result"], task["attempt_number"]) == ("completed", True, 0, {"n": 3}, 1)
    assert place.intent(intent_id)["result"] == {"n": 3}
    assert told["context"] == {"a": [1, "ü"]} and told["attempt"] == 1 and told["sla_deadline"] == task["sla_deadline"]
    assert (told["task_id"], told["intent_id"], told["goal"], told["expected_outcome"]) == (task_id, intent_id, "tell me", "told")
    assert (environment["GRACE_TASK_ID"], environment["GRACE_INTENT_ID"], environment["GRACE_ATTEMPT"]) == (task_id, intent_id, "1")
    assert environment["GRACE_ATTEMPT_ID"] == attempts(place, task_id)[0]["attempt_id"]
    assert (environment["GRACE_DEADLINE"], environment["GRACE_DB"]) == (task["sla_deadline"], str(place.db))
    assert place.ok("task", "log", task_id).out == "one\ntwo\nthree\n"


def test_arguments_are_filled_in_without_a_shell(place: Place) -> None:
    """An item that is exactly a placeholder is replaced by the task's own text, as one argument; other items stay."""
    place.handler("work", "--", "printf", "%s|", "{goal}", "{context.folder}", "{context.list}", "x{goal}")
    place.handler("lacking", "--backoff", "1ms", "--", "echo", "{context.missing}")
    _, task_id = place.submit("$(touch oops); `x`", "--handler", "work", "--context", '{"folder": "a b\'c", "list": [1, 2]}')
    _, lacking = place.submit("lacks a key", "--handler", "lacking")
    place.ok("daemon", "--once")
    assert place.ok("task", "log", task_id).out == "$(touch oops); `x`|a b'c|[1,2]|x{goal}|"
    assert not (place.folder / "oops").exists()
    task = place.task(lacking)
    assert (task["status"], len(attempts(place, lacking))) == ("failed", 1), "a missing key is not retried"
    assert "context.missing" in task["error"]


def test_long_output_keeps_its_head_and_its_tail(place: Place) -> None:
    """Beyond log.max_bytes the middle is dropped, and the log says how many bytes."""
    place.ok("config", "set", "log.max_bytes", "4096")
    shell(place, "chatty", "i=0; while [ $i -lt 5000 ]; do echo line $i; i=$((i+1)); done")
    _, task_id = place.submit("talk", "--handler", "chatty")
    place.ok("daemon", "--once")
    log = place.ok("task", "log", task_id).out
    whole = "".join(f"line {number}\n" for number in range(5000))
    found = re.search(r"(\d+) bytes dropped", log)
    assert found and log.startswith("line 0\nline 1\n") and log.endswith("line 4998\nline 4999\n")
    assert len(log) < 4096 + 100
    head, tail = log[: found.start()].rpartition("\n")[0], log[found.end() :].partition("\n")[2]
    assert whole.startswith(head) and whole.endswith(tail)
    assert int(found[1]) == attempts(place, task_id)[0]["log_dropped"] == len(whole) - len(head) - len(tail)
    assert attempts(place, task_id)[0]["log_bytes"] == len(whole)


def test_a_failing_attempt_is_tried_again_after_a_pause(place: Place) -> None:
    """Each failure waits longer; the third attempt completes; each one's log and status are kept."""
    shell(place, "flaky", 'echo attempt $GRACE_ATTEMPT; [ "$GRACE_ATTEMPT" -ge 3 ]', "--backoff", "300ms")
    with place.daemon("--grace-period", "1ms"):
        _, task_id = place.submit("third time lucky", "--handler", "flaky")
        task = place.until_status(task_id, "completed", "failed")
    assert (task["status"], task["attempt_number"]) == ("completed", 3)
    rows = place.sql(f"SELECT attempt_number, outcome, exit_status, started_at, finished_at FROM htm_task_attempts WHERE task_id = '{task_id}' "
                     "ORDER BY created_at")  # fmt: skip
    assert [row[:3] for row in rows] == [[1, "failed", 1], [2, "failed", 1], [3, "completed", 0]]
    first, second = rows[1][3] - rows[0][4], rows[2][3] - rows[1][4]
    assert first >= 224 and second >= 449, "300 and 600 ms, a quarter less at most"
    assert place.ok("task", "log", task_id, "--attempt", "2").out == "attempt 2\n"
    assert [event["payload"]["reason"] for event in place.events("htm.task.update") if event["payload"]["status"] == "queued"] == ["backoff", "backoff"]


def test_the_last_failure_ends_the_task(place: Place) -> None:
    """After max-attempts the task and its intent have failed, with the exit status and the last line."""
    shell(place, "broken", "echo the reason; exit 7", "--backoff", "1ms", "--max-attempts", "2")
    with place.daemon():
        intent_id, task_id = place.submit("fails", "--handler", "broken", "--sla", "1m")
        task = place.until_status(task_id, "failed", "completed")
    assert (task["status"], task["exit_status"], task["attempt_number"], task["sla_met"], task["success"]) == ("failed", 7, 2, False, False)
    assert "the reason" in task["error"]
    assert place.intent(intent_id)["status"] == "failed"


@pytest.mark.parametrize(("command", "status"), [(["/nonexistent/program"], 127), (["/etc/passwd"], 126), (["/etc"], 126), (["no-such-word"], 127)])
def test_a_command_that_cannot_run_fails_with_the_shells_status(place: Place, command: list[str], status: int) -> None:
    """127 for what is not there, 126 for what may not be executed; and the daemon goes on."""
    place.handler("broken", "--max-attempts", "1", "--", *command)
    shell(place, "work", "true")
    _, task_id = place.submit("cannot", "--handler", "broken")
    _, other = place.submit("can", "--handler", "work")
    place.ok("daemon", "--once")
    task = place.task(task_id)
    assert (task["status"], task["exit_status"]) == ("failed", status)
    assert command[0] in task["error"]
    assert place.task(other)["status"] == "completed"


@pytest.mark.parametrize(("trap", "ended_by", "exit_status"), [("", "TERM", 143), ("trap '' TERM; ", "KILL", 137)])
def test_timeout_ends_first_gently_then_surely(place: Place, trap: str, ended_by: str, exit_status: int) -> None:
    """--timeout sends TERM, and KILL after --kill-after; an earlier attempt is retried, the last one ends as timeout."""
    shell(place, "slow", f"{trap}echo $$ >> pids; {FOREVER}", "--timeout", "400ms", "--kill-after", "500ms", "--max-attempts", "2", "--backoff", "1ms")
    with place.daemon():
        intent_id, task_id = place.submit("takes too long", "--handler", "slow")
        task = place.until_status(task_id, "timeout", "failed", "completed")
    assert (task["status"], task["attempt_number"], task["exit_status"]) == ("timeout", 2, exit_status)
    assert place.intent(intent_id)["status"] == "timeout"
    assert [(row["outcome"], row["ended_by"]) for row in attempts(place, task_id)] == [("timeout", ended_by)] * 2
    assert f"SIG{ended_by}" in task["error"]
    assert not [pid for pid in pids_in(place.folder / "pids", 2) if alive(pid)]


FAMILY = f"""echo $$ >> pids
sh -c 'echo $$ >> pids; {FOREVER}' &
setsid sh -c 'echo $$ >> pids; sh -c "echo \\$\\$ >> pids; {FOREVER}" & {FOREVER}' &
{FOREVER}
"""


def test_cancel_ends_the_whole_family(place: Place) -> None:
    """Children, grandchildren, and those that made a session of their own are ended with a cancelled task; no zombie stays."""
    shell(place, "family", FAMILY, "--kill-after", "2s")
    with place.daemon() as daemon:
        intent_id, task_id = place.submit("has children", "--handler", "family")
        pids = pids_in(place.folder / "pids", 4)
        assert all(alive(pid) for pid in pids)
        place.ok("task", "cancel", task_id)
        assert (place.task(task_id)["status"], place.intent(intent_id)["status"]) == ("cancelled", "cancelled")
        until(lambda: not any(alive(pid) for pid in pids), "the family to end")
        until(lambda: attempts(place, task_id)[0]["outcome"] == "cancelled", "the attempt to be closed")
        assert children_of(daemon.pid) == []


def test_survivors_of_a_failed_attempt_are_ended_before_the_next(place: Place) -> None:
    """The leader fails and leaves a child in a session of its own: it is gone before the second attempt starts."""
    text = f"""[ -e survivor ] && {{ grep "^State:.[^ZX]" /proc/$(cat survivor)/status 2>/dev/null; exit 0; }}
setsid sh -c 'echo $$ > survivor; {FOREVER}' & until [ -s survivor ]; do sleep 0.05; done; exit 1"""
    shell(place, "leaves", text, "--backoff", "1ms", "--kill-after", "1s")
    with place.daemon():
        _, task_id = place.submit("leaves something", "--handler", "leaves")
        task = place.until_status(task_id, "completed", "failed")
    assert (task["status"], task["attempt_number"]) == ("completed", 2)
    assert place.ok("task", "log", task_id).out == ""
    assert not alive(int(written(place.folder / "survivor")))


def test_a_grandchild_that_keeps_the_pipe_open_delays_nothing(place: Place) -> None:
    """The task completes with its leader, however long something else holds its output open."""
    shell(place, "daemonises", "sleep 300 & echo $! > pid; echo done")
    _, task_id = place.submit("lets go", "--handler", "daemonises")
    place.ok("daemon", "--once")
    pid = int(written(place.folder / "pid"))
    try:
        assert alive(pid), "a successful handler may leave something behind"
        task = place.task(task_id)
        assert (task["status"], place.ok("task", "log", task_id).out) == ("completed", "done\n")
    finally:
        os.kill(pid, signal.SIGKILL)


def test_no_zombie_is_left(place: Place) -> None:
    """After many short handlers the daemon has reaped every one."""
    shell(place, "short", "true & exit 0")
    with place.daemon("--workers", "4") as daemon:
        tasks = [place.submit(f"short {number}", "--handler", "short")[1] for number in range(12)]
        for task_id in tasks:
            place.until_status(task_id, "completed")
        assert [child for child in children_of(daemon.pid) if child[1] == "Z"] == []


def test_the_retry_of_a_running_task_waits_for_the_old_process(place: Place) -> None:
    """The replacement starts only when the old process is gone, though that one takes its time."""
    text = f"""if [ -e first ]; then kill -0 $(cat first) 2>/dev/null && echo overlap; exit 0; fi
echo $$ > first; trap '' TERM; {FOREVER}"""
    shell(place, "stubborn", text, "--kill-after", "1500ms")
    with place.daemon("--workers", "3"):
        intent_id, task_id = place.submit("again", "--handler", "stubborn")
        old = int(written(place.folder / "first"))
        new = place.json("task", "retry", task_id)["task_id"]
        task = place.until_status(new, "completed", "failed")
    assert not alive(old)
    original = place.task(task_id)
    assert (task["status"], task["retry_of"], place.ok("task", "log", new).out) == ("completed", task_id, "")
    assert (original["status"], original["reason"]) == ("cancelled", "retried")
    assert (place.intent(intent_id)["status"], place.intent(intent_id)["htm_task_id"]) == ("completed", new)
    assert place.sql("SELECT COUNT(*) AS n FROM htm_task_attempts a JOIN htm_task_attempts b ON a.attempt_id < b.attempt_id "
                     "AND b.started_at < a.finished_at") == [[0]]  # fmt: skip


def test_concurrency_and_workers_bound_what_runs_at_once(place: Place) -> None:
    """Never more of one handler than its --concurrency, never more in all than --workers, while all get done."""
    shell(place, "narrow", "sleep 0.15", "--concurrency", "2")
    shell(place, "wide", "sleep 0.15")
    tasks = [place.submit(f"{name} {number}", "--handler", name)[1] for number in range(6) for name in ("narrow", "wide")]
    place.ok("daemon", "--once", "--workers", "3")
    assert {place.task(task_id)["status"] for task_id in tasks} == {"completed"}
    rows = place.sql("SELECT t.handler, a.created_at, a.finished_at FROM htm_task_attempts a JOIN htm_tasks t USING (task_id)")
    for handler, limit in (("narrow", 2), (None, 3)):
        spans = [(start, end) for name, start, end in rows if handler in (None, name)]
        assert max(sum(start <= instant < end for start, end in spans) for instant, _ in spans) <= limit, handler


def test_a_daemon_may_serve_some_handlers_only(place: Place) -> None:
    """With --handler the others' tasks stay where they are; an unknown name is refused."""
    for name in ("one", "two", "three"):
        shell(place, name, "true")
    tasks = {name: place.submit(name, "--handler", name)[1] for name in ("one", "two", "three")}
    place.ok("daemon", "--once", "--handler", "one", "--handler", "three")
    assert {name: place.task(task_id)["status"] for name, task_id in tasks.items()} == {"one": "completed", "two": "queued", "three": "completed"}
    assert place.call("daemon", "--once", "--handler", "none").status == 3


def test_tasks_start_by_priority_then_deadline_then_arrival(place: Place) -> None:
    """One worker takes critical before low, and within a class the earlier deadline first."""
    place.handler("work", "--", "sh", "-c", 'echo "$1" >> order', "sh", "{goal}")
    for goal, options in (("low", ["--priority", "low"]), ("normal", []), ("normal later", []), ("normal 20m", ["--sla", "20m"]),
                          ("normal 10m", ["--sla", "10m"]), ("high", ["--priority", "high"]), ("critical", ["--priority", "critical"])):  # fmt: skip
        place.submit(goal, "--handler", "work", *options)
    place.ok("daemon", "--once", "--workers", "1")
    order = (place.folder / "order").read_text().splitlines()
    assert order == ["critical", "high", "normal 10m", "normal 20m", "normal", "normal later", "low"]


def test_once_does_what_is_runnable_and_leaves_the_rest(place: Place) -> None:
    """--once ends although tasks wait for a time, a back-off, an intent, a paused handler, or another program."""
    shell(place, "work", "true")
    shell(place, "failing", "exit 1", "--backoff", "1h")
    shell(place, "paused", "true")
    place.ok("handler", "pause", "paused")
    place.handler("outside", "--external")
    needed = place.submit("never", "--handler", "paused")[0]
    first, done = place.submit("first", "--handler", "work")
    tasks = {
        "future": place.submit("later", "--handler", "work", "--in", "1h")[1], "back-off": place.submit("fails", "--handler", "failing")[1],
        "blocked": place.submit("blocked", "--handler", "work", "--after", needed)[1], "paused": place.submit("paused", "--handler", "paused")[1],
        "external": place.submit("outside", "--handler", "outside")[1], "freed": place.submit("freed", "--handler", "work", "--after", first)[1],
    }  # fmt: skip
    place.ok("daemon", "--once")
    assert place.task(done)["status"] == "completed"
    assert {name: place.task(task_id)["status"] for name, task_id in tasks.items()} == {
        "future": "queued", "back-off": "queued", "blocked": "blocked", "paused": "queued", "external": "queued", "freed": "completed"}  # fmt: skip
    assert place.task(tasks["back-off"])["reason"] == "backoff"
    assert place.json("status")["workers"] == []


def test_drain_claims_nothing_and_waits_for_what_runs(place: Place) -> None:
    """--drain waits for a task that another daemon runs, and leaves the queued one alone."""
    shell(place, "work", WAIT_FOR_GO)
    with place.daemon("--workers", "1"):
        running = place.submit("runs", "--handler", "work")[1]
        place.until_status(running, "running")
        waiting = place.submit("waits", "--handler", "work", "--in", "1h")[1]
        with place.daemon("--drain") as drain:
            assert drain.poll() is None
            release(place)
            assert finished(drain) == 0
        assert place.task(running)["status"] == "completed"
    assert place.task(waiting)["status"] == "queued"


def test_several_daemons_share_one_file_and_run_each_task_once(place: Place) -> None:
    """Three daemons, forty tasks: each is run by exactly one of them, and each daemon ends well."""
    shell(place, "work", 'echo "$GRACE_TASK_ID" >> done; sleep 0.02')
    batch = "".join(json.dumps({"goal": f"share {number}", "handler": "work"}) + "\n" for number in range(40)).encode()
    tasks = {done["task_id"] for done in place.ok("submit-intent", "--batch", "-", "--json", stdin=batch).lines}
    daemons = [place.start("daemon", "--once", "--workers", "2", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(3)]
    assert [finished(daemon) for daemon in daemons] == [0, 0, 0]
    ran = (place.folder / "done").read_text().split()
    assert sorted(ran) == sorted(tasks)
    assert place.sql("SELECT status, COUNT(*) AS n FROM htm_tasks GROUP BY status") == [["completed", 40]]
    assert place.sql("SELECT COUNT(*) AS n FROM htm_task_attempts") == [[40]]


def test_running_out_of_descriptors_loses_no_task(place: Place) -> None:
    """A daemon that may open few files starts what it can, and in the end every task has been run."""
    shell(place, "work", "sleep 0.3", "--max-attempts", "20", "--backoff", "50ms")
    batch = "".join(json.dumps({"goal": f"many {number}", "handler": "work"}) + "\n" for number in range(40)).encode()
    tasks = [done["task_id"] for done in place.ok("submit-intent", "--batch", "-", "--json", stdin=batch).lines]
    limited = place.start("daemon", "--workers", "40", "--grace-period", "1ms", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32)))  # fmt: skip
    until(lambda: place.sql("SELECT COUNT(*) AS n FROM htm_tasks WHERE status = 'completed'") == [[len(tasks)]], "all tasks to complete", limit=40)
    limited.terminate()
    assert finished(limited) == 0


def test_an_idle_daemon_starts_what_is_submitted(place: Place) -> None:
    """It needs no signal and no restart: the commit itself wakes it."""
    shell(place, "work", "true")
    with place.daemon() as daemon:
        for number in range(3):
            _, task_id = place.submit(f"wake up {number}", "--handler", "work")
            place.until_status(task_id, "completed")
        assert daemon.poll() is None


# ---- stopping


def test_term_lets_handlers_finish_within_the_grace_period(place: Place) -> None:
    """What runs completes, what waits stays queued, the daemon ends with 0 and says goodbye."""
    shell(place, "work", WAIT_FOR_GO)
    with place.daemon("--workers", "1") as daemon:
        running = place.submit("runs", "--handler", "work")[1]
        waiting = place.submit("waits", "--handler", "work")[1]
        place.until_status(running, "running")
        daemon.terminate()
        until(lambda: "stopping" in (place.folder / "daemon.log").read_text(), "the daemon to hear it")
        release(place)
        assert finished(daemon) == 0
    assert place.task(running)["status"] == "completed"
    assert place.task(waiting)["status"] == "queued" and attempts(place, waiting) == []
    assert place.events("daemon.stopped")[-1]["payload"]["reason"] == "asked"
    assert place.json("status")["workers"] == []


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_what_is_interrupted_goes_back_with_its_attempt_restored(place: Place, signum: signal.Signals) -> None:
    """After the grace period TERM ends the handler; the task is queued, reason interrupted, attempt 0, and runs again later."""
    shell(place, "work", f"[ -e go ] && exit 0; echo $$ > pid; {FOREVER}", "--max-attempts", "1")
    intent_id, task_id = place.submit("interrupted", "--handler", "work")
    with place.daemon("--grace-period", "200ms") as daemon:
        place.until_status(task_id, "running")
        pid = int(written(place.folder / "pid"))
        daemon.send_signal(signum)
        assert finished(daemon) == 0
    task = place.task(task_id)
    assert not alive(pid)
    assert (task["status"], task["reason"], task["attempt_number"]) == ("queued", "interrupted", 0)
    assert place.intent(intent_id)["status"] == "dispatched"
    assert place.sql(f"SELECT recoveries, deaths FROM htm_tasks WHERE task_id = '{task_id}'") == [[0, 0]]
    release(place)
    place.ok("daemon", "--once")
    assert (place.task(task_id)["status"], place.task(task_id)["attempt_number"]) == ("completed", 1)
    assert [row["outcome"] for row in attempts(place, task_id)] == ["interrupted", "completed"]


def test_a_second_signal_skips_the_waiting(place: Place) -> None:
    """With an hour of grace and a handler that ignores TERM, the second signal ends all at once."""
    shell(place, "stubborn", f"trap '' TERM; echo $$ > pid; {FOREVER}", "--kill-after", "1h")
    _, task_id = place.submit("stubborn", "--handler", "stubborn")
    with place.daemon("--grace-period", "1h") as daemon:
        pid = int(written(place.folder / "pid"))
        place.until_status(task_id, "running")
        daemon.terminate()
        until(lambda: "stopping" in (place.folder / "daemon.log").read_text(), "the daemon to hear it")
        assert daemon.poll() is None and alive(pid)
        daemon.terminate()
        assert finished(daemon) == 0
    assert not alive(pid)
    assert (place.task(task_id)["status"], place.task(task_id)["reason"]) == ("queued", "interrupted")
    assert attempts(place, task_id)[0]["ended_by"] == "KILL"


# ---- renewing in place


def reloaded(place: Place, before: int) -> bool:
    return len(place.events("daemon.started")) > before


def renew(place: Place, daemon: subprocess.Popen[bytes]) -> None:
    """SIGHUP, and wait until the daemon has announced itself anew."""
    before = len(place.events("daemon.started"))
    daemon.send_signal(signal.SIGHUP)
    until(lambda: reloaded(place, before), "the daemon to come back")


def test_hup_keeps_pid_lock_and_children(place: Place) -> None:
    """A running handler notices nothing: its output before and after is in one log, its end is recorded by the same worker."""
    shell(place, "work", f"echo before; {WAIT_FOR_GO}; echo after; exit 0")
    with place.daemon("--workers", "2") as daemon:
        _, task_id = place.submit("goes on", "--handler", "work")
        worker = place.until_status(task_id, "running")["assigned_worker"]
        until(lambda: place.ok("task", "log", task_id).out == "before\n", "the first line")
        renew(place, daemon)
        assert daemon.poll() is None
        (row,) = place.json("status")["workers"]
        assert (row["pid"], row["worker_id"], row["alive"]) == (daemon.pid, worker, True)
        assert place.task(task_id)["status"] == "running"
        release(place)
        task = place.until_status(task_id, "completed", "failed")
        place.until_status(place.submit("afterwards", "--handler", "work")[1], "completed")
    assert task["status"] == "completed" and place.ok("task", "log", task_id).out == "before\nafter\n"
    assert [row["outcome"] for row in attempts(place, task_id)] == ["completed"]
    assert place.events("htm.task.recovered") == []


def test_hup_keeps_a_timeout_running(place: Place) -> None:
    """A --timeout that began before the renewal still ends the attempt after it."""
    shell(place, "slow", f"echo $$ > pid; {FOREVER}", "--timeout", "2s", "--max-attempts", "1", "--kill-after", "1s")
    with place.daemon() as daemon:
        _, task_id = place.submit("too long", "--handler", "slow")
        place.until_status(task_id, "running")
        renew(place, daemon)
        assert place.until_status(task_id, "timeout", "failed", "completed")["status"] == "timeout"
    assert not alive(int(written(place.folder / "pid")))


def test_hup_while_survivors_are_being_ended(place: Place) -> None:
    """The leader has failed and a child ignores TERM when the renewal comes: the attempt still ends."""
    text = f"sh -c \"trap '' TERM; echo \\$\\$ > pid; {FOREVER}\" & until [ -s pid ]; do sleep 0.05; done; touch leaving; exit 1"
    shell(place, "leaves", text, "--max-attempts", "1", "--kill-after", "3s")
    with place.daemon("--grace-period", "1ms") as daemon:
        _, task_id = place.submit("leaves a child", "--handler", "leaves")
        place.until_status(task_id, "running")
        until(lambda: (place.folder / "leaving").exists() and len(children_of(daemon.pid)) == 0, "the leader to be reaped")
        renew(place, daemon)
        task = until(lambda: (now := place.task(task_id))["finished_at"] and now, "the task to end", limit=20)
        assert (task["status"], task["exit_status"]) == ("failed", 1)
    assert not alive(int(written(place.folder / "pid")))


def test_many_hups_at_once_do_no_harm(place: Place) -> None:
    """However fast reloads follow one another, the daemon lives and its handler too."""
    shell(place, "work", WAIT_FOR_GO)
    with place.daemon() as daemon:
        _, task_id = place.submit("goes on", "--handler", "work")
        place.until_status(task_id, "running")
        for _ in range(40):
            with contextlib.suppress(ProcessLookupError):
                daemon.send_signal(signal.SIGHUP)
            time.sleep(0.02)  # not a wait: the spacing of the signals is what is tried
        assert daemon.poll() is None, "the daemon was ended by a reload"
        release(place)
        assert place.until_status(task_id, "completed", "failed")["status"] == "completed"
    assert len(attempts(place, task_id)) == 1


def test_hup_while_stopping_does_not_undo_the_stop(place: Place) -> None:
    """TERM, then HUP: the daemon still ends once its handler has."""
    shell(place, "work", WAIT_FOR_GO)
    with place.daemon() as daemon:
        _, task_id = place.submit("goes on", "--handler", "work")
        place.until_status(task_id, "running")
        daemon.terminate()
        until(lambda: "stopping" in (place.folder / "daemon.log").read_text(), "the daemon to hear it")
        daemon.send_signal(signal.SIGHUP)
        until(lambda: "executing anew" in (place.folder / "daemon.log").read_text() or daemon.poll() is not None or place.json("status"), "a round")
        release(place)
        place.until_status(task_id, "completed")
        assert daemon.wait(15) == 0


def test_term_right_after_hup_stops_the_daemon(place: Place) -> None:
    """A stop asked for while the daemon renews itself is not forgotten, at whatever moment of the renewal it comes."""
    for pause in (0.0, 0.03, 0.08, 0.15, 0.25, 0.4):
        with place.daemon() as daemon:
            daemon.send_signal(signal.SIGHUP)
            time.sleep(pause)  # not a wait: the moment is what is tried
            daemon.terminate()
            assert daemon.wait(20) == 0, pause


def daemon_on_terminal(place: Place, *before: str) -> tuple[subprocess.Popen[bytes], int]:
    """A daemon that a terminal of its own controls, and the terminal's other end."""
    outer, inner = pty.openpty()
    on_it = f'exec "$@" < {os.ttyname(inner)} > {os.ttyname(inner)} 2>&1'  # the leader of a session gets the terminal that it opens
    words = ["sh", "-c", on_it, "sh", *before, GRACE, "daemon", "--workers", "1"]
    process = subprocess.Popen(words, env=place.environment, cwd=place.folder, start_new_session=True)
    place.processes.append(process)
    until(lambda: any(row["pid"] == process.pid for row in place.json("status")["workers"]), "the daemon to be ready")
    os.close(inner)
    return process, outer


@pytest.mark.parametrize("renewed", [False, True])
def test_a_daemon_whose_terminal_is_closed_stops_in_order(place: Place, renewed: bool) -> None:
    """Its handler may finish, nothing is lost or left behind, and the stop is an event; so too after it has renewed itself."""
    shell(place, "work", WAIT_FOR_GO)
    daemon, outer = daemon_on_terminal(place)
    _, task_id = place.submit("finishes", "--handler", "work")
    place.until_status(task_id, "running")
    if renewed:
        renew(place, daemon)
    os.close(outer)
    until(lambda: place.json("status")["workers"][0]["state"] == "stopping", "the daemon to heed that its terminal is gone")
    release(place)
    assert daemon.wait(LIMIT) == 0
    assert place.task(task_id)["status"] == "completed"
    assert [event["payload"]["reason"] for event in place.events("daemon.stopped")] == ["asked"]
    assert place.json("status")["workers"] == []


def test_a_daemon_under_nohup_outlives_its_terminal(place: Place) -> None:
    """HUP renews it even then, and it goes on working though its output can go nowhere."""
    need("nohup")
    shell(place, "work", "exit 0")
    daemon, outer = daemon_on_terminal(place, "nohup")
    started = len(place.events("daemon.started"))
    os.close(outer)
    until(lambda: reloaded(place, started), "the daemon to renew itself")
    place.until_status(place.submit("afterwards", "--handler", "work")[1], "completed")
    daemon.terminate()
    assert daemon.wait(LIMIT) == 0


def test_a_daemon_goes_on_when_nobody_reads_what_it_says(place: Place) -> None:
    """The reader of its output has gone: work is done all the same, HUP renews it, and TERM stops it in order."""
    shell(place, "work", "exit 0")
    daemon = place.start("daemon")
    assert daemon.stdout is not None and daemon.stderr is not None and b"started" in daemon.stdout.readline()
    daemon.stdout.close()
    daemon.stderr.close()
    place.until_status(place.submit("unheard", "--handler", "work")[1], "completed")
    renew(place, daemon)
    place.until_status(place.submit("afterwards", "--handler", "work")[1], "completed")
    daemon.terminate()
    assert daemon.wait(LIMIT) == 0
    assert place.json("status")["workers"] == []


def test_slas_are_adapted_as_often_as_set(place: Place) -> None:
    """learn.adapt_every counts, however seldom links are looked at."""
    place.ok("config", "set", "learn.adapt", "on")
    place.ok("config", "set", "bridge.repair_every", "1h")
    place.handler("work", "--sla", "10m", "--external")
    last = "SELECT value FROM settings WHERE name = '_adapted_at'"
    with place.daemon("--workers", "1"):
        first = until(lambda: place.sql(last), "the first look")
        place.ok("config", "set", "learn.adapt_every", "500ms")
        until(lambda: place.sql(last) != first, "the next look, long before the hour is over")


def test_hup_finds_the_same_database_by_a_relative_path(place: Place) -> None:
    """--db was relative and handlers run elsewhere: after the renewal it is still the same file."""
    elsewhere = place.folder / "elsewhere"
    elsewhere.mkdir()
    place.handler("work", "--cwd", str(elsewhere), "--", "sh", "-c", f"until [ -e {place.folder}/go ]; do sleep 0.05; done")
    with place.daemon("--workers", "1", env={"GRACE_DB": "grace.db"}) as daemon:
        _, task_id = place.submit("goes on", "--handler", "work")
        place.until_status(task_id, "running")
        daemon.send_signal(signal.SIGHUP)
        until(lambda: (place.folder / "daemon.log").read_text().count("started  worker_id") == 2, "the daemon to come back")
        release(place)
        assert place.until_status(task_id, "completed", "failed")["status"] == "completed"
    assert list(elsewhere.iterdir()) == []


# ---- being told and heard


class Manager:
    """A stand-in for the service manager: a datagram socket that remembers what it was told."""

    def __init__(self, path: str):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(path)
        self.socket.setblocking(False)
        self.heard: list[str] = []

    def listen(self) -> list[str]:
        with contextlib.suppress(BlockingIOError):
            while True:
                self.heard += self.socket.recv(65536).decode().splitlines()
        return self.heard

    def until(self, line: str, count: int = 1) -> None:
        until(lambda: self.listen().count(line) >= count, f"{line} {count} times")


@pytest.fixture
def manager(place: Place) -> Iterator[Manager]:
    here = Manager(str(place.folder / "notify"))
    yield here
    here.socket.close()


def test_the_service_manager_is_told(place: Place, manager: Manager) -> None:
    """READY and STATUS at the start, WATCHDOG again and again, RELOADING and READY around SIGHUP, STOPPING at the end."""
    with place.daemon(env={"NOTIFY_SOCKET": str(place.folder / "notify"), "WATCHDOG_USEC": "1000000"}) as daemon:
        manager.until("READY=1")
        assert any(line.startswith("STATUS=") for line in manager.listen())
        manager.until("WATCHDOG=1", 4)
        daemon.send_signal(signal.SIGHUP)
        manager.until("RELOADING=1")
        manager.until("READY=1", 2)
        assert any(re.fullmatch(r"MONOTONIC_USEC=\d+", line) for line in manager.listen())
        count = manager.listen().count("WATCHDOG=1")
        manager.until("WATCHDOG=1", count + 2)
        assert "STOPPING=1" not in manager.listen()
    manager.until("STOPPING=1")
    assert manager.heard.index("READY=1") < manager.heard.index("RELOADING=1") < manager.heard.index("STOPPING=1")


def test_the_watchdog_is_fed_while_another_process_writes_for_long(place: Place, manager: Manager) -> None:
    """A daemon that waits for its turn does not hang, as long as whoever has the turn shows signs of life; then it goes on."""
    shell(place, "work", WAIT_FOR_GO)
    with place.daemon(env={"NOTIFY_SOCKET": str(place.folder / "notify"), "WATCHDOG_USEC": "400000"}) as daemon:
        task_id = place.submit("work", "--handler", "work")[1]
        place.until_status(task_id, "running")
        with open(f"{place.db}-ticket", "r+b", buffering=0) as ticket:
            fcntl.flock(ticket, fcntl.LOCK_EX)
            release(place)
            until(lambda: re.search(rf"-> FLOCK .* {daemon.pid} ", Path("/proc/locks").read_text()), "the daemon to wait for its turn")
            fed = manager.listen().count("WATCHDOG=1")

            def works_on() -> bool:
                os.pwrite(ticket.fileno(), f"{os.getpid()} {time.monotonic_ns()} somebody".ljust(120).encode(), 0)
                return manager.listen().count("WATCHDOG=1") >= fed + 5

            until(works_on, "the watchdog to be fed")
            assert place.task(task_id)["status"] == "running"
        place.until_status(task_id, "completed")


def test_a_watchdog_meant_for_another_process_is_left_alone(place: Place, manager: Manager) -> None:
    """WATCHDOG_PID names somebody else: the daemon is ready, but does not play its part of feeding twice a second."""
    with place.daemon(env={"NOTIFY_SOCKET": str(place.folder / "notify"), "WATCHDOG_USEC": "100000", "WATCHDOG_PID": "1"}):
        manager.until("READY=1")
        shell(place, "work", "sleep 1")
        place.until_status(place.submit("work", "--handler", "work")[1], "completed")
        assert manager.listen().count("WATCHDOG=1") <= 1


@pytest.mark.parametrize("length", [0, 240])
@pytest.mark.parametrize("with_runtime_folder", [True, False])
def test_the_bell_works_whatever_the_path(place: Place, length: int, with_runtime_folder: bool) -> None:
    """With and without a runtime directory, and with a path too long for a socket's name: started, woken, stopped, nothing left."""
    folder = place.folder / ("x" * (length // 2) or "short") / ("y" * (length // 2) or "path")
    folder.mkdir(parents=True)
    place.db = folder / "grace.db"
    place.environment["GRACE_DB"] = str(place.db)
    runtime = place.folder / "run"
    runtime.mkdir(mode=0o700)
    if with_runtime_folder:
        place.environment["XDG_RUNTIME_DIR"] = str(runtime)
    shell(place, "work", "true")
    with place.daemon():
        sockets = [Path(row[0]) for row in place.sql("SELECT path FROM waiters")]
        assert len(sockets) == 1 and sockets[0].is_socket()
        assert sockets[0].is_relative_to(runtime if with_runtime_folder else folder)
        assert sockets[0].parent.stat().st_mode & 0o777 == 0o700
        done = place.ok("submit-intent", "wake", "--handler", "work", "--wait", "--wait-timeout", "50s", "--json").json
        assert done["status"] == "completed"
    assert place.sql("SELECT COUNT(*) AS n FROM waiters") == [[0]]
    assert not sockets[0].exists()


# ---- whole examples


INDEXER = '''#!/usr/bin/env python3
"""Index the text files of a folder: words and bytes of each."""
import json, os, sys

context = json.load(sys.stdin)["context"]
index = {}
for name in sorted(os.listdir(context["folder"])):
    path = os.path.join(context["folder"], name)
    if name.endswith("." + context["format"]) and os.path.isfile(path):
        with open(path, "rb") as file:
            data = file.read()
        index[name] = {"bytes": len(data), "words": len(data.split()), "lines": data.count(b"\\n")}
with open(os.path.join(context["folder"], "index.json"), "w") as file:
    json.dump(index, file)
result = {"documents": len(index), "bytes": sum(entry["bytes"] for entry in index.values()), "words": sum(entry["words"] for entry in index.values())}
with open(os.environ["GRACE_RESULT"], "w") as file:
    json.dump(result, file)
print("indexed", len(index), "documents")
'''


def test_a_folder_of_documents_is_indexed(place: Place) -> None:
    """The first example of all: real documents, one submission, one pass of the daemon; the figures are right on both sides."""
    uploads = place.folder / "uploads"
    uploads.mkdir()
    source = Path("/usr/share/common-licenses")
    for path in sorted(source.iterdir()) if source.is_dir() else []:
        if path.is_file():
            shutil.copyfile(path, uploads / f"{path.name}.txt")
    for number in range(5):
        (uploads / f"note {number} – ü.txt").write_text(f"some words in document {number}\n" * (number + 1))
    (uploads / "not a document.bin").write_bytes(b"\0" * 1000)
    script = place.folder / "indexer"
    script.write_text(INDEXER)
    script.chmod(0o755)
    place.handler("ingestion_worker", "--", str(script))
    context = json.dumps({"folder": str(uploads), "format": "txt"})
    done = place.json("submit-intent", "Index new documents in uploads folder", "--handler", "ingestion_worker", "--domain", "ingestion", "--sla", "30s",
                      "--priority", "high", "--context", context, "--expected-outcome", "documents_indexed")  # fmt: skip
    place.ok("daemon", "--once")
    counted = subprocess.run(["sh", "-c", "ls *.txt | wc -l; cat *.txt | wc -c; cat *.txt | LC_ALL=C wc -w"], cwd=uploads, capture_output=True, check=True)
    documents, size, _ = map(int, counted.stdout.split())
    intent, task = place.intent(done["intent_id"]), place.task(done["task_id"])
    assert documents >= 5
    for side in (intent, task):
        assert (side["status"], side["sla_met"], side["domain"], side["sla_ms"]) == ("completed", True, "ingestion", 30_000)
        assert (side["result"]["documents"], side["result"]["bytes"]) == (documents, size)
    assert (intent["expected_outcome"], intent["htm_task_id"], intent["priority"]) == ("documents_indexed", task["task_id"], "high")
    index = json.loads((uploads / "index.json").read_text())
    assert len(index) == documents and sum(entry["bytes"] for entry in index.values()) == size
    assert place.ok("task", "log", task["task_id"]).out == f"indexed {documents} documents\n"


def running_cron() -> bool:
    return any(path.read_text().strip() in ("cron", "crond") for path in Path("/proc").glob("[0-9]*/comm") if path.exists())


@pytest.fixture
def crontab() -> Iterator[Any]:
    """Sets this user's crontab and puts the previous one back; a cron daemon runs meanwhile."""
    if not (shutil.which("cron") and shutil.which("crontab")):
        pytest.skip("cron is not installed")
    if not running_cron() and os.geteuid() != 0:
        pytest.skip("no cron daemon runs and only root may start one")
    previous = subprocess.run(["crontab", "-l"], capture_output=True, check=False)
    own = None if running_cron() else subprocess.Popen(["cron", "-f"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def put(text: str) -> None:
        done = subprocess.run(["crontab", "-"], input=text.encode(), capture_output=True, check=False)
        if done.returncode:
            pytest.skip(f"this user may not have a crontab: {done.stderr.decode(errors='replace').strip()}")

    try:
        yield put
    finally:
        if previous.returncode == 0:
            subprocess.run(["crontab", "-"], input=previous.stdout, check=True)
        else:
            subprocess.run(["crontab", "-r"], capture_output=True, check=False)
        if own is not None:
            own.terminate()
            own.wait(LIMIT)


def test_a_line_in_a_real_crontab(place: Place, crontab: Any) -> None:
    """`grace run --sla 10m -- tar czf …` as cron runs it: the archive is there, the task completed, the log holds the output."""
    (place.folder / "etc").mkdir()
    (place.folder / "etc" / "motd").write_text("hello\n")
    run = f"{GRACE} --db {place.db} run --sla 10m --domain backup -- tar czvf {place.folder}/etc.tgz -C {place.folder} etc"
    crontab(f'MAILTO=""\n* * * * * {run} > {place.folder}/cron.out 2>&1\n')
    tasks = until(lambda: place.db.exists() and place.json("task", "list", "--status", "completed"), "cron to run it", limit=100)
    crontab("")
    task = tasks[-1]
    assert (task["task_type"], task["handler"], task["domain"], task["sla_met"]) == ("command", None, "backup", True)
    assert place.ok("task", "log", task["task_id"]).out.splitlines() == ["etc/", "etc/motd"]
    listed = subprocess.run(["tar", "tzf", str(place.folder / "etc.tgz")], capture_output=True, check=True, text=True)
    assert listed.stdout.splitlines() == ["etc/", "etc/motd"]
    intent = place.intent(task["intent_id"])
    assert (intent["status"], intent["created_by"]) == ("completed", getpass.getuser())
