"""Handlers with secrets: their tasks wait for consent without a worker, and run behind a guard that keeps the values to itself."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Place, alive, shell, until
from tests.test_cli import Terminal
from tests.test_crash import EXCLUSIVE, check_invariants, counts, kill, quiet_daemon

VALUE = "canary-31b7/+=&x"
SECOND = "another-canary-5c90"
PHRASE = "correct horse"
FORMS = (VALUE, base64.b64encode(VALUE.encode()).decode()[:-4], urllib.parse.quote(VALUE, safe=""), SECOND)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vault made once: `shop_token` and `second` of medium risk, `motd` low, `vip` high, `crown` critical, `broken` with a NUL."""
    place = Place(tmp_path_factory.mktemp("vault"))
    phrase = place.folder / "passphrase"
    phrase.write_text(f"{PHRASE}\n")
    phrase.chmod(0o600)
    place.ok("config", "set", "vault.argon2_memory", str(64 << 20))
    place.ok("init", "--name", "anna", "--passphrase-file", str(phrase))
    secrets = {"shop_token": (VALUE, "medium"), "second": (SECOND, "medium"), "motd": ("hello world", "low"), "vip": ("a very long word", "high"),
               "crown": ("the only one", "critical"), "broken": ("a\0b", "low")}  # fmt: skip
    for key, (value, risk) in secrets.items():
        place.ok("secret", "set", key, "--risk", risk, *(() if risk == "low" else ("--passphrase-file", str(phrase))), stdin=value.encode())
    place.close()
    return place.folder


@pytest.fixture
def vault(template: Path, tmp_path: Path) -> Iterator[Place]:
    """A place of its own with that vault."""
    folder = tmp_path / "place"
    shutil.copytree(template, folder, ignore=shutil.ignore_patterns("*-sockets"))
    place = Place(folder)
    yield place
    place.close()


def secret_handler(place: Place, text: str, *options: str, name: str = "work", secrets: tuple[str, ...] = ("TOKEN=shop_token:upload",)) -> None:
    """A handler of a few words of sh with these secrets."""
    shell(place, name, text, *[word for secret in secrets for word in ("--secret", secret)], "--backoff", "50ms", *options)


def pending(place: Place) -> list[dict[str, Any]]:
    return list(place.json("consent", "pending"))


def asked(place: Place, task_id: str, n: int = 1) -> list[dict[str, Any]]:
    """The n requests of a task, once they wait."""
    def there() -> list[dict[str, Any]]:
        rows = [row for row in pending(place) if row["task_id"] == task_id]
        return rows if len(rows) >= n else []

    rows: list[dict[str, Any]] = until(there, f"{n} requests of {task_id}")
    assert len(rows) == n
    return rows


def approve(place: Place, consent_id: str, *more: str) -> str:
    """Say yes; what the prompt said."""
    return place.ok("consent", "approve", consent_id, "--passphrase-file", str(place.folder / "passphrase"), *more).err


def history(place: Place) -> list[dict[str, Any]]:
    """All consents, oldest first."""
    return list(place.json("consent", "history", "--limit", "1000"))[::-1]


def states(place: Place) -> list[str]:
    return [row["consent_status"] for row in history(place)]


def rescues_of(place: Place, task_id: str) -> list[dict[str, Any]]:
    """The completed rescues of a task, once there are any."""
    def there() -> list[dict[str, Any]]:
        return [task for task in place.json("task", "list", "--status", "completed") if task["parent_task_id"] == task_id]

    rows: list[dict[str, Any]] = until(there, "the rescue")
    return rows


def log_of(place: Place, task_id: str) -> str:
    return place.ok("task", "log", task_id).out


def memory_of(pid: int) -> bytes:
    """All that a process could write to; best effort."""
    found = []
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb") as memory:
        for line in maps:
            area, mode = line.split()[:2]
            if mode.startswith("rw"):
                start, end = (int(part, 16) for part in area.split("-"))
                with contextlib.suppress(OSError, ValueError, OverflowError):
                    memory.seek(start)
                    found.append(memory.read(end - start))
    return b"".join(found)


def attempt_pid(place: Place, task_id: str) -> int:
    """The process of a task's open attempt: its guard."""
    sql = f"SELECT pid FROM htm_task_attempts WHERE task_id = '{task_id}' AND finished_at IS NULL AND pid IS NOT NULL"
    return int(until(lambda: place.sql(sql), "the attempt's process")[0][0])


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def assert_nowhere(place: Place, but: tuple[str, ...] = ()) -> None:
    """No value is in any file below the place."""
    for path in place.folder.rglob("*"):
        if path.is_file() and path.name not in but:
            data = path.read_bytes()
            assert not [form for form in FORMS if form.encode() in data], path


# ---- the way from a task to a value

NOISY = r"""
import base64, json, os, sys, time, urllib.parse
told, value = json.load(sys.stdin), os.environ["TOKEN"]
open("facts", "w").write(json.dumps([told["task_id"], os.getcwd(), os.environ["GRACE_TASK_ID"], os.environ["OWN"], len(value)]))
for text in (f"plain {value}.", f"base64 {base64.b64encode(value.encode()).decode()}.", f"percent {urllib.parse.quote(value, safe='')}."):
    for letter in text + "\n":
        os.write(1, letter.encode())
        time.sleep(0.001)
print(f"on stderr {value}", file=sys.stderr, flush=True)
open(os.environ["GRACE_RESULT"], "w").write(json.dumps({"value": value, value: [1.5, f"x{value}y"]}))
while not os.path.exists("go"):
    time.sleep(0.02)
"""


def test_an_approved_task_runs_with_its_value_and_nothing_else_holds_it(vault: Place) -> None:
    """The handler has it in its environment; the log and the result have not, nor any file, nor the daemon's memory, nor the guard's environment."""
    (vault.folder / "noisy.py").write_text(NOISY)
    vault.handler("work", "--secret", "TOKEN=shop_token:upload", "--env", "OWN=mine", "--cwd", str(vault.folder), "--", sys.executable, "noisy.py")
    intent_id, task_id = vault.submit("put the prices online", "--handler", "work", "--sla", "1h")
    with vault.daemon() as daemon:
        (waiting,) = asked(vault, task_id)
        task = vault.task(task_id)
        assert (task["status"], task["reason"], task["attempt_number"]) == ("blocked", "waiting_consent", 0)
        assert (waiting["requested_by"], waiting["requested_for"], waiting["requested_action"], waiting["mode"]) == (
            "handler:work", "put the prices online", "upload", "collect")  # fmt: skip
        assert waiting["context"] == {"task_id": task_id, "intent_id": intent_id, "handler": "work", "goal": "put the prices online"}
        prompt = approve(vault, waiting["consent_id"])
        sealed, _, reported = prompt.partition("REPORTED")
        reported, _, claimed = reported.partition("CLAIMED")
        assert task_id in reported and intent_id in claimed and '"work"' in claimed and task_id not in sealed
        until(lambda: "percent" in log_of(vault, task_id), "the output")
        guard = attempt_pid(vault, task_id)
        (handler,) = children_of(guard)
        assert f"TOKEN={VALUE}".encode() in Path(f"/proc/{handler}/environ").read_bytes().split(b"\0")
        for pid in (daemon.pid, guard):
            for name in ("environ", "cmdline"):
                with contextlib.suppress(PermissionError):  # a guard is closed to all but root
                    assert VALUE.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()
        assert b"work" in memory_of(daemon.pid) and VALUE.encode() not in memory_of(daemon.pid)
        assert os.getpgid(guard) == os.getpgid(handler) == guard
        assert "cryptography" not in Path(f"/proc/{daemon.pid}/maps").read_text()
        (vault.folder / "go").touch()
        done = vault.until_status(task_id, "completed")
    assert json.loads((vault.folder / "facts").read_text()) == [task_id, str(vault.folder), task_id, "mine", len(VALUE)]
    log = log_of(vault, task_id)
    assert all(f"{name} [secret TOKEN]." in log for name in ("plain", "base64", "percent")) and log.count("[secret TOKEN]") == 4
    assert done["result"] == {"value": "[secret TOKEN]", "[secret TOKEN]": [1.5, "x[secret TOKEN]y"]}
    assert states(vault) == ["used"] and vault.json("task", "show", task_id)["consents"][0]["consent_status"] == "used"
    assert_nowhere(vault)
    assert vault.json("audit", "verify")["ok"]


def test_a_handler_with_secrets_is_started_like_any_other(vault: Place) -> None:
    """The same limits, mask of signals, group, standard input and variables as one without."""
    text = 'umask; ulimit -c; grep -E "^Sig(Blk|Ign)" /proc/self/status; env | grep -o "^[A-Z_]*=" | grep -v TEXT | sort; ls /proc/self/fd; wc -l'
    shell(vault, "plain", text)
    secret_handler(vault, text, name="secret", secrets=("TEXT=motd",))
    tasks = [vault.submit("the same goal", "--handler", name, "--domain", "d")[1] for name in ("plain", "secret")]
    vault.ok("daemon", "--once")
    logs = [log_of(vault, task_id) for task_id in tasks]
    assert logs[0] == logs[1] and "SigIgn" in logs[0]


@pytest.mark.parametrize("how", ["deny", "revoke", "withdraw"])
def test_a_no_ends_the_task_with_its_reason(how: str, vault: Place) -> None:
    """Denied, revoked or withdrawn: failed, consent_denied, with the words of whoever said no, and not tried again."""
    secret_handler(vault, "touch ran", secrets=("TOKEN=shop_token", "OTHER=second"))
    intent_id, task_id = vault.submit("a goal", "--handler", "work")
    with vault.daemon():
        rows = asked(vault, task_id, 2)
        vault.ok("consent", how, rows[0]["consent_id"], *(() if how == "withdraw" else ("--reason", "not on a Sunday")))
        task = vault.until_status(task_id, "failed")
    assert (task["reason"], task["attempt_number"], task["success"]) == ("consent_denied", 0, False)
    assert ("withdrawn" if how == "withdraw" else "not on a Sunday") in task["error"] and rows[0]["consent_id"] in task["error"]
    assert vault.intent(intent_id)["status"] == "failed" and not (vault.folder / "ran").exists()
    assert pending(vault) == [] and states(vault)[1] == "revoked"
    changes = [event["payload"] for event in vault.events("htm.task.*") if event["payload"].get("previous_status")]
    assert [change["reason"] for change in changes] == ["waiting_consent", "consent_denied"]


def test_no_answer_is_a_no(vault: Place) -> None:
    """A question that nobody answers in consent.task_answer ends the task."""
    vault.ok("config", "set", "consent.task_answer", "1s")
    secret_handler(vault, "true")
    _, task_id = vault.submit("a goal", "--handler", "work")
    with vault.daemon():
        task = vault.until_status(task_id, "failed")
    assert (task["reason"], states(vault)) == ("consent_denied", ["expired"]) and "nobody answered" in task["error"]


def test_an_approval_that_was_not_used_in_time_is_asked_for_anew(vault: Place) -> None:
    """Its ten minutes over before anything could start, a task does not fail."""
    vault.ok("config", "set", "consent.grant_for", "1s")
    secret_handler(vault, "true")
    _, task_id = vault.submit("a goal", "--handler", "work")
    vault.ok("daemon", "--once")
    approve(vault, asked(vault, task_id)[0]["consent_id"])
    until(lambda: states(vault) == ["expired"], "the approval to end")
    vault.ok("config", "unset", "consent.grant_for")
    with vault.daemon():
        approve(vault, asked(vault, task_id)[0]["consent_id"])
        vault.until_status(task_id, "completed")
    assert states(vault) == ["expired", "used"]


def test_waiting_holds_no_worker_and_stops_no_clock(vault: Place) -> None:
    """With one worker other work goes on; the ladder climbs to its end, and rescue, explain and status say what is waited for."""
    secret_handler(vault, "true", "--sla", "400ms")
    shell(vault, "other", "true")
    _, task_id = vault.submit("a goal", "--handler", "work")
    with vault.daemon("--workers", "1"):
        (waiting,) = asked(vault, task_id)
        vault.until_status(vault.submit("other work", "--handler", "other")[1], "completed")
        until(lambda: len(vault.events("htm.sla.*")) >= 3, "the ladder")
        rescues = rescues_of(vault, task_id)
        assert "consent" in rescues[0]["result"]["found"] and rescues[0]["result"]["consent_ids"] == [waiting["consent_id"]]
        assert rescues[0]["result"]["action"] == "report"
        (why,) = vault.json("task", "explain", task_id)["why"]
        assert why["code"] == "waiting_consent" and waiting["consent_id"] in why["text"]
        problems = {problem["code"]: problem["message"] for problem in vault.json("status")["problems"]}
        assert waiting["consent_id"] in problems["waiting_consent"]
        assert vault.task(task_id)["escalation_level"] == 3
        approve(vault, waiting["consent_id"])
        assert vault.until_status(task_id, "completed")["sla_met"] is False


def test_a_rescue_starts_nothing_without_consent(vault: Place) -> None:
    """A queued task that becomes critical before a worker was free is parked by its rescue, not run."""
    secret_handler(vault, "true", "--sla", "300ms")
    shell(vault, "slow", "sleep 3")
    vault.submit("in the way", "--handler", "slow", "--priority", "critical")
    with vault.daemon("--workers", "1"):
        until(lambda: vault.json("status")["active_tasks"], "the worker to be taken")
        _, task_id = vault.submit("a goal", "--handler", "work")
        assert vault.until_status(task_id, "blocked")["reason"] == "waiting_consent"
        (rescue,) = rescues_of(vault, task_id)
        assert rescue["result"]["action"] == "report" and "consent" in rescue["result"]["found"]
        approve(vault, asked(vault, task_id)[0]["consent_id"])
        vault.until_status(task_id, "completed")


# ---- one yes


def test_one_yes_for_all_secrets_of_a_task(vault: Place) -> None:
    """The prompt shows each with its sealed facts, action and code; other tasks, and higher risks, are not answered along."""
    secret_handler(vault, 'test "${#TOKEN}$OTHER" = "16another-canary-5c90"', secrets=("TOKEN=shop_token:upload", "OTHER=second:read"))
    secret_handler(vault, "true", name="mixed", secrets=("A=shop_token", "B=vip"))
    first, second, mixed = (vault.submit(name, "--handler", handler)[1] for name, handler in (("first", "work"), ("second", "work"), ("third", "mixed")))
    with vault.daemon():
        rows = asked(vault, first, 2)
        prompt = approve(vault, rows[0]["consent_id"])
        assert all(row["code"] in prompt and f"secret    {row['secret_key']}" in prompt and f'"{row["requested_action"]}"' in prompt for row in rows)
        vault.until_status(first, "completed")
        rows = asked(vault, second, 2)
        approve(vault, rows[0]["consent_id"], "--code", rows[0]["code"])
        assert [row["consent_id"] for row in pending(vault) if row["task_id"] == second] == [rows[1]["consent_id"]]
        approve(vault, rows[1]["consent_id"])
        vault.until_status(second, "completed")
        by_key = {row["secret_key"]: row for row in asked(vault, mixed, 2)}
        approve(vault, by_key["shop_token"]["consent_id"])
        for group in ("user", "governance"):
            approve(vault, by_key["vip"]["consent_id"], "--as", group)
        vault.until_status(mixed, "completed")


@pytest.mark.parametrize(("typed", "status", "left"), [("yes", 0, 0), ("no", 5, 2)])
def test_one_word_on_a_terminal(typed: str, status: int, left: int, vault: Place) -> None:
    """The passphrase and the word are typed once; anything but yes signs nothing."""
    secret_handler(vault, "true", secrets=("TOKEN=shop_token", "OTHER=second"))
    _, task_id = vault.submit("a goal", "--handler", "work")
    vault.ok("daemon", "--once")
    rows = asked(vault, task_id, 2)
    terminal = Terminal(vault, "consent", "approve", rows[0]["consent_id"], columns=200)
    terminal.until("Passphrase of")
    terminal.type(f"{PHRASE}\n")
    terminal.until("Type yes")
    terminal.type(f"{typed}\n")
    ended, text = terminal.end()
    assert ended == status and all(row["code"] in text for row in rows) and text.count("Type yes") == text.count("Passphrase of") == 1
    assert len(pending(vault)) == left


def test_a_request_that_only_says_it_is_of_the_task_is_not_answered_along(vault: Place) -> None:
    """What is signed counts, not the column."""
    secret_handler(vault, "true")
    _, task_id = vault.submit("a goal", "--handler", "work")
    vault.ok("daemon", "--once")
    (real,) = asked(vault, task_id)
    vault.ok("consent", "request", "second", "--action", "use", "--for", "a goal")
    vault.sql(f"DROP TRIGGER consent_stays; UPDATE secret_consent_records SET task_id = '{task_id}'")
    assert "second" not in approve(vault, real["consent_id"])
    assert [row["secret_key"] for row in pending(vault)] == ["second"]


# ---- low risk


def test_a_low_secret_asks_nobody(vault: Place) -> None:
    """--once parks the task, waits for its asker, and runs it."""
    secret_handler(vault, 'echo "it says $TEXT"', secrets=("TEXT=motd:read",))
    tasks = [vault.submit("a goal", "--handler", "work")[1] for _ in range(8)]
    vault.ok("daemon", "--once")
    assert [vault.task(task_id)["status"] for task_id in tasks] == ["completed"] * 8
    assert all(log_of(vault, task_id) == "it says [secret TEXT]\n" for task_id in tasks)
    assert [(row["consent_status"], row["approval_method"], row["mode"]) for row in history(vault)] == [("used", "auto", "collect")] * 8


def test_drain_asks_nobody(vault: Place) -> None:
    """--drain starts nothing new, and no daemon moves nothing."""
    secret_handler(vault, "true")
    _, task_id = vault.submit("a goal", "--handler", "work")
    vault.ok("daemon", "--drain")
    assert vault.task(task_id)["status"] == "queued" and history(vault) == []


# ---- many


def test_thirty_tasks_wait_for_one_secret(vault: Place) -> None:
    """Never more than five questions are open at once; the others wait for room, and all end."""
    secret_handler(vault, "true")
    lines = "".join(json.dumps({"goal": f"goal {n}", "handler": "work"}) + "\n" for n in range(30))
    vault.ok("submit-intent", "--batch", "-", stdin=lines.encode())
    most, answered = 0, 0
    with vault.daemon("--workers", "2"):
        until(lambda: len(pending(vault)) == 5, "as many requests as may be open")
        while answered < 30:
            rows = until(lambda: pending(vault), "a further request")
            most = max(most, len(rows))
            for row in rows:
                approve(vault, row["consent_id"])
                (open_now,) = vault.sql("SELECT COUNT(*) AS n FROM secret_consent_records WHERE consent_status = 'pending'")
                most, answered = max(most, *open_now), answered + 1
        until(lambda: vault.json("status")["completed_tasks"] == 30, "all to complete")
    assert most == 5 and states(vault) == ["used"] * 30
    assert len({row["task_id"] for row in history(vault)}) == 30


def test_no_more_are_parked_than_can_be_looked_after(place: Place, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest stay in their line and are not claimed either; a task of another handler is."""
    monkeypatch.setattr(module, "PARKED_AT_ONCE", 3)
    secret_handler(place, "true")
    shell(place, "other", "true")
    for _ in range(5):
        place.submit("a goal", "--handler", "work", "--priority", "critical")
    _, other = place.submit("a goal", "--handler", "other")
    store = module.Store(str(place.db))
    for expected in ([other], []):
        claimed = store.write(lambda tx: module.claim(tx, "w", 4))
        assert [task["task_id"] for task in claimed] == expected
        assert (len(place.json("task", "list", "--status", "blocked")), len(place.json("task", "list", "--status", "queued"))) == (3, 2)
    store.close()


def test_two_daemons_ask_once(vault: Place) -> None:
    """Whoever is second finds the question asked."""
    secret_handler(vault, "true")
    with vault.daemon(), vault.daemon():
        tasks = [vault.submit("a goal", "--handler", "work")[1] for _ in range(5)]
        for task_id in tasks:
            approve(vault, asked(vault, task_id)[0]["consent_id"])
        for task_id in tasks:
            vault.until_status(task_id, "completed")
    assert states(vault) == ["used"] * 5


# ---- a daemon that comes and goes


def test_waiting_outlives_every_daemon(vault: Place) -> None:
    """Killed, renewed, stopped and started again while tasks wait: each is asked once, and runs once."""
    secret_handler(vault, 'echo x >> "$GRACE_TASK_ID.runs"')
    tasks = [vault.submit("a goal", "--handler", "work")[1] for _ in range(4)]
    for turn, signum in enumerate((signal.SIGKILL, signal.SIGHUP, signal.SIGKILL, signal.SIGHUP, signal.SIGTERM)):
        with vault.daemon() as daemon:
            if turn > 1:
                until(lambda: len(pending(vault)) == 4, "all to be asked")
            started = len(vault.events("daemon.started"))
            daemon.send_signal(signum)
            if signum == signal.SIGHUP:
                until(lambda n=started: len(vault.events("daemon.started")) > n, "the new image")
            else:
                daemon.wait(60)
    assert len(history(vault)) == 4
    with vault.daemon():
        for task_id in tasks:
            approve(vault, asked(vault, task_id)[0]["consent_id"])
        for task_id in tasks:
            vault.until_status(task_id, "completed")
    assert states(vault) == ["used"] * 4 and all((vault.folder / f"{task_id}.runs").read_text() == "x\n" for task_id in tasks)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_daemon_killed_at_any_moment_loses_and_doubles_nothing(vault: Place, seed: int) -> None:
    """While it parks, asks, starts guards and ends them; each task is done in the end, and never twice at the same time."""
    chance = random.Random(seed)
    script = vault.folder / "exclusive"
    script.write_text(EXCLUSIVE)
    script.chmod(0o755)
    vault.handler("work", "--secret", "TEXT=motd", "--max-recoveries", "100", "--kill-after", "2s", "--max-attempts", "1", "--", str(script), str(vault.folder))
    batch = "".join(json.dumps({"goal": f"survive {number}", "handler": "work", "sla": ["2s", "5s", "1h"][number % 3]}) + "\n" for number in range(20))
    tasks = [done["task_id"] for done in vault.ok("submit-intent", "--batch", "-", "--json", stdin=batch.encode()).lines]
    for _ in range(7):
        daemon = quiet_daemon(vault, "--workers", "3")
        with contextlib.suppress(subprocess.TimeoutExpired):
            daemon.wait(chance.uniform(0.3, 1.5))
        kill(daemon)
        check_invariants(vault)
    with vault.daemon("--workers", "3"):
        until(lambda: counts(vault) == {"completed": len(tasks)}, "all tasks to complete")
        until(lambda: vault.sql("SELECT COUNT(*) AS n FROM htm_tasks WHERE finished_at IS NULL") == [[0]], "all rescues to end")
    check_invariants(vault)
    assert not (vault.folder / "overlaps").exists(), "two copies ran at once"
    assert set((vault.folder / "ends").read_text().split()) == set(tasks)
    attempts = vault.sql("SELECT COUNT(*) AS n FROM htm_task_attempts WHERE started_at IS NOT NULL")[0][0]
    assert len(tasks) <= len(history(vault)) <= attempts + len(tasks), "asked once for each start"


def test_a_killed_daemons_guard_and_handler_end_before_the_task_waits_again(vault: Place) -> None:
    """No two copies: what is left is ended first, and the next start needs a new consent."""
    secret_handler(vault, "trap '' HUP; echo on >> started; sleep 60", "--kill-after", "300ms")
    _, task_id = vault.submit("a goal", "--handler", "work")
    with vault.daemon() as daemon:
        approve(vault, asked(vault, task_id)[0]["consent_id"])
        guard = attempt_pid(vault, task_id)
        until((vault.folder / "started").exists, "the handler")
        processes = [guard, *children_of(guard)]
        daemon.kill()
        daemon.wait()
    with vault.daemon():
        task = vault.until_status(task_id, "blocked")
        assert not any(alive(pid) for pid in processes)
        assert (task["reason"], task["attempt_number"], task["recoveries"]) == ("waiting_consent", 0, 1)
        asked(vault, task_id)
    assert states(vault) == ["used", "pending"]


def test_a_shutdown_interrupts_and_the_next_start_asks_again(vault: Place) -> None:
    """Stopping is not failing: the attempt is restored."""
    secret_handler(vault, "echo on > started; sleep 60")
    _, task_id = vault.submit("a goal", "--handler", "work")
    with vault.daemon("--grace-period", "100ms"):
        approve(vault, asked(vault, task_id)[0]["consent_id"])
        until((vault.folder / "started").exists, "the handler")
    task = vault.task(task_id)
    assert (task["status"], task["reason"], task["attempt_number"]) == ("queued", "interrupted", 0)
    vault.ok("daemon", "--once")
    assert states(vault) == ["used", "pending"]


def test_a_renewed_daemon_keeps_guard_and_handler(vault: Place) -> None:
    """SIGHUP while a handler with secrets runs: it goes on, and its output is still clean."""
    secret_handler(vault, 'echo on > started; while [ ! -e go ]; do sleep 0.05; done; echo "late $TOKEN"', "--cwd", str(vault.folder))
    _, task_id = vault.submit("a goal", "--handler", "work")
    with vault.daemon() as daemon:
        approve(vault, asked(vault, task_id)[0]["consent_id"])
        until((vault.folder / "started").exists, "the handler")
        daemon.send_signal(signal.SIGHUP)
        until(lambda: len(vault.events("daemon.started")) == 2, "the new image")
        (vault.folder / "go").touch()
        vault.until_status(task_id, "completed")
    assert log_of(vault, task_id) == "late [secret TOKEN]\n"


# ---- ends


def test_a_retry_asks_anew(vault: Place) -> None:
    """Each attempt has a consent of its own."""
    secret_handler(vault, 'echo "try $GRACE_ATTEMPT"; test "$GRACE_ATTEMPT" = 2')
    _, task_id = vault.submit("a goal", "--handler", "work")
    with vault.daemon():
        first = asked(vault, task_id)[0]["consent_id"]
        approve(vault, first)
        second = until(lambda: [row for row in pending(vault) if row["consent_id"] != first], "the second request")[0]["consent_id"]
        assert vault.task(task_id)["attempt_number"] == 1
        approve(vault, second)
        task = vault.until_status(task_id, "completed")
    assert task["attempt_number"] == 2 and states(vault) == ["used", "used"]


def test_retry_by_command_is_a_new_task_that_asks_for_itself(vault: Place) -> None:
    """The replaced task's question is taken back."""
    secret_handler(vault, "true")
    _, task_id = vault.submit("a goal", "--handler", "work")
    with vault.daemon():
        asked(vault, task_id)
        again = vault.json("task", "retry", task_id)["task_id"]
        approve(vault, asked(vault, again)[0]["consent_id"])
        vault.until_status(again, "completed")
    assert states(vault) == ["revoked", "used"] and vault.task(task_id)["status"] == "cancelled"


@pytest.mark.parametrize("stubborn", [False, True])
@pytest.mark.parametrize("how", ["timeout", "cancel"])
def test_timeout_and_cancel_end_handler_and_guard(how: str, stubborn: bool, vault: Place) -> None:
    """TERM reaches the handler once, KILL both; nothing is left, and the last words are in the log."""
    trap = "trap 'echo TERM >> heard' TERM; " if stubborn else "trap 'echo TERM >> heard; echo \"bye $TOKEN\"; exit 3' TERM; "
    secret_handler(vault, f"cd {vault.folder}; {trap} echo on > started; while :; do sleep 0.05; done", "--kill-after", "500ms", "--max-attempts", "1")
    _, task_id = vault.submit("a goal", "--handler", "work", *(("--timeout", "2s") if how == "timeout" else ()))
    with vault.daemon():
        approve(vault, asked(vault, task_id)[0]["consent_id"])
        guard = attempt_pid(vault, task_id)
        until((vault.folder / "started").exists, "the handler")
        processes = [guard, *children_of(guard)]
        if how == "cancel":
            vault.ok("task", "cancel", task_id)
        vault.until_status(task_id, "timeout" if how == "timeout" else "cancelled")
        until(lambda: not vault.sql("SELECT 1 AS n FROM htm_task_attempts WHERE finished_at IS NULL"), "the attempt to end")
        assert not any(alive(pid) for pid in processes)
    assert (vault.folder / "heard").read_text() == "TERM\n"
    assert stubborn or log_of(vault, task_id).endswith("bye [secret TOKEN]\n")


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGUSR1])
def test_a_handler_that_a_signal_ends(signum: signal.Signals, vault: Place) -> None:
    """Its attempt ends as if there were no guard: 128 and the signal's number."""
    secret_handler(vault, f"echo out; kill -{signum.value} $$", "--max-attempts", "1", secrets=("TEXT=motd",))
    _, task_id = vault.submit("a goal", "--handler", "work")
    vault.ok("daemon", "--once")
    task = vault.task(task_id)
    assert (task["status"], task["exit_status"]) == ("failed", 128 + signum) and task["error"].startswith(f"ended by {signum.name}: out")


def test_exit_status_and_what_cannot_be_executed(vault: Place) -> None:
    """As for any handler; where nothing can start, no consent is spent."""
    secret_handler(vault, "exit 7", "--max-attempts", "1", name="seven", secrets=("TEXT=motd",))
    vault.handler("nothing", "--secret", "TEXT=motd", "--max-attempts", "1", "--", "/no/such/program")
    seven, nothing = (vault.submit("a goal", "--handler", name)[1] for name in ("seven", "nothing"))
    vault.ok("daemon", "--once")
    assert vault.task(seven)["exit_status"] == 7 and vault.task(nothing)["exit_status"] == 127
    assert sorted(states(vault)) == ["revoked", "used"]


def test_a_grandchild_that_keeps_the_pipe_delays_nothing(vault: Place) -> None:
    """The attempt ends with the handler."""
    secret_handler(vault, f"echo first; (cd {vault.folder}; echo $$ > grandchild; sleep 30) & exit 0", secrets=("TEXT=motd",))
    _, task_id = vault.submit("a goal", "--handler", "work")
    with vault.daemon():
        task = vault.until_status(task_id, "completed")
    assert task["execution_time_ms"] < 20_000 and log_of(vault, task_id) == "first\n"


def test_a_lot_of_output_passes_the_guard(vault: Place) -> None:
    """Byte for byte but for the value."""
    vault.ok("config", "set", "log.max_bytes", str(8 << 20))
    program = 'import os; print(("0123456789" * 20 + os.environ["TEXT"] + chr(10)) * 20000, end="")'
    secret_handler(vault, f"{sys.executable} -c '{program}'", secrets=("TEXT=motd",))
    _, task_id = vault.submit("a goal", "--handler", "work")
    vault.ok("daemon", "--once")
    assert log_of(vault, task_id) == ("0123456789" * 20 + "[secret TEXT]\n") * 20000


def test_an_odd_result_is_cleaned_too(vault: Place) -> None:
    """A result that is no JSON does not undo the work, and holds no value."""
    secret_handler(vault, 'printf "no json %s" "$TOKEN" > "$GRACE_RESULT"; cp "$GRACE_RESULT" /dev/null; exit 0')
    _, task_id = vault.submit("a goal", "--handler", "work")
    with vault.daemon():
        approve(vault, asked(vault, task_id)[0]["consent_id"])
        task = vault.until_status(task_id, "completed")
    assert task["result"] is None and "not usable" in task["error"]
    assert_nowhere(vault)


def test_a_value_that_no_environment_can_hold(vault: Place) -> None:
    """Said clearly, and the handler is not started."""
    secret_handler(vault, f"touch {vault.folder}/ran", "--max-attempts", "1", secrets=("TEXT=broken",))
    _, task_id = vault.submit("a goal", "--handler", "work")
    vault.ok("daemon", "--once")
    task = vault.task(task_id)
    assert (task["status"], task["exit_status"]) == ("failed", 125) and "NUL" in task["error"] and not (vault.folder / "ran").exists()


# ---- what cannot be asked for


@pytest.mark.parametrize(("secret", "text"), [("A=nothing", "no secret 'nothing'"), ("A=crown", "waits for it"), ("A=shop_tokn", "did you mean")])
def test_what_cannot_be_asked_for_fails_the_task(secret: str, text: str, vault: Place) -> None:
    """No such secret, or one that only a waiting process may use."""
    secret_handler(vault, "true", secrets=("OTHER=second", secret))
    _, task_id = vault.submit("a goal", "--handler", "work")
    with vault.daemon():
        task = vault.until_status(task_id, "failed")
        assert task["reason"] == "consent_denied"
        assert text in task["error"] or text == "did you mean"
        assert pending(vault) == []


def test_without_a_vault(place: Place) -> None:
    """A handler may be added before there is one; its tasks fail and say so."""
    secret_handler(place, "true")
    _, task_id = place.submit("a goal", "--handler", "work")
    place.ok("daemon", "--once")
    task = place.task(task_id)
    assert (task["status"], task["reason"]) == ("failed", "consent_denied") and "no vault" in task["error"]


def test_after_three_noes_the_next_task_fails(vault: Place) -> None:
    """A handler that was denied three times in a row has to pause like any program."""
    secret_handler(vault, "true")
    with vault.daemon():
        for _ in range(3):
            _, task_id = vault.submit("a goal", "--handler", "work")
            vault.ok("consent", "deny", asked(vault, task_id)[0]["consent_id"], "--reason", "no")
            vault.until_status(task_id, "failed")
        task = vault.until_status(vault.submit("a goal", "--handler", "work")[1], "failed")
    assert task["reason"] == "consent_denied" and "pause" in task["error"]


def test_a_secret_that_is_rotated_while_a_task_waits_is_asked_for_anew(vault: Place) -> None:
    """The open question is void; the next one is for the new value."""
    secret_handler(vault, 'echo "${#TOKEN}"')
    _, task_id = vault.submit("a goal", "--handler", "work")
    with vault.daemon():
        (first,) = asked(vault, task_id)
        vault.ok("secret", "rotate", "shop_token", "--passphrase-file", str(vault.folder / "passphrase"), stdin=b"new")
        (second,) = until(lambda: [row for row in pending(vault) if row["consent_id"] != first["consent_id"]], "a new request")
        assert (second["secret_version"], second["task_id"]) == (2, task_id)
        approve(vault, second["consent_id"])
        vault.until_status(task_id, "completed")
    assert log_of(vault, task_id) == "3\n" and states(vault) == ["revoked", "used"]


# ---- cancelled, and hands in the database


@pytest.mark.parametrize("what", ["task", "intent"])
def test_cancelling_takes_the_questions_back(what: str, vault: Place) -> None:
    """In the same transaction, daemon or not; an approval that was not used yet as well."""
    secret_handler(vault, "true", secrets=("TOKEN=shop_token", "OTHER=vip"))
    intent_id, task_id = vault.submit("a goal", "--handler", "work")
    vault.ok("daemon", "--once")
    approve(vault, next(row for row in asked(vault, task_id, 2) if row["secret_key"] == "shop_token")["consent_id"])
    vault.ok(what, "cancel", task_id if what == "task" else intent_id)
    assert {(row["consent_status"], row["revocation_reason"]) for row in history(vault)} == {("revoked", "withdrawn")} and len(history(vault)) == 2
    assert vault.task(task_id)["status"] == "cancelled"
    assert vault.json("audit", "verify")["ok"]


def test_a_consent_that_was_moved_to_another_task_is_refused(vault: Place) -> None:
    """The column counts only where it says what was signed."""
    secret_handler(vault, f"touch {vault.folder}/ran", "--max-attempts", "1")
    first, second = (vault.submit(name, "--handler", "work")[1] for name in ("first", "second"))
    vault.ok("daemon", "--once")
    (mine,), (other,) = asked(vault, first), asked(vault, second)
    approve(vault, mine["consent_id"])
    vault.ok("consent", "withdraw", other["consent_id"])
    vault.sql(f"DROP TRIGGER consent_stays; UPDATE secret_consent_records SET task_id = NULL WHERE task_id = '{second}';"
              f"UPDATE secret_consent_records SET task_id = '{second}' WHERE consent_id = '{mine['consent_id']}'")  # fmt: skip
    with vault.daemon():
        task = vault.until_status(second, "failed")
    assert task["exit_status"] == 125 and "refused" in task["error"] and not (vault.folder / "ran").exists()
    assert "something else than the request" in json.dumps(vault.json("audit", "list"))


def test_only_the_task_collects_what_was_approved_for_it(vault: Place) -> None:
    """`secret get --consent` is refused, and takes nothing from the task."""
    secret_handler(vault, "true")
    _, task_id = vault.submit("a goal", "--handler", "work")
    vault.ok("daemon", "--once")
    (waiting,) = asked(vault, task_id)
    approve(vault, waiting["consent_id"])
    done = vault.call("secret", "get", "shop_token", "--action", "upload", "--for", "x", "--consent", waiting["consent_id"])
    assert (done.status, done.out) == (5, "") and task_id in done.err
    vault.ok("daemon", "--once")
    assert vault.task(task_id)["status"] == "completed"


@pytest.mark.parametrize("by", ["handler:work", "Handler:work", " handler:x"])
def test_nobody_asks_in_the_name_of_a_handler(by: str, vault: Place) -> None:
    """--by refuses it, and so does a program that calls itself so."""
    assert vault.call("secret", "get", "motd", "--action", "a", "--for", "x", "--by", by).status == 2
    assert vault.call("consent", "request", "motd", "--action", "a", "--for", "x", "--by", by).status == 2
    assert vault.call("exec", "--secret", "A=motd", "--by", by, "--", "true").status == 2


# ---- the handler's options


def test_the_secrets_of_a_handler_are_shown_and_replaced(place: Place) -> None:
    """No vault is needed; --replace sets them anew like every option."""
    secret_handler(place, "true", secrets=("TOKEN=shop_token:upload", "OTHER=second"))
    assert place.json("handler", "show", "work")["secrets"] == [{"env": "TOKEN", "secret_key": "shop_token", "action": "upload"},
                                                                 {"env": "OTHER", "secret_key": "second", "action": "use"}]  # fmt: skip
    assert "shop_token second" in place.ok("handler", "list").out
    place.handler("work", "--replace", "--", "true")
    assert place.json("handler", "show", "work")["secrets"] == []


def test_a_handler_that_gets_other_secrets_while_its_task_waits(vault: Place) -> None:
    """What it needs now counts, and the question that is moot is taken back."""
    secret_handler(vault, "true")
    _, task_id = vault.submit("a goal", "--handler", "work")
    with vault.daemon():
        asked(vault, task_id)
        secret_handler(vault, 'echo "$TEXT"', "--replace", secrets=("TEXT=motd",))
        vault.until_status(task_id, "completed")
    assert states(vault) == ["revoked", "used"]


def test_nobody_is_asked_for_a_paused_handler(vault: Place) -> None:
    """An approval would end before it could be used."""
    secret_handler(vault, "true")
    _, task_id = vault.submit("a goal", "--handler", "work")
    vault.ok("daemon", "--once")
    vault.ok("handler", "pause", "work")
    vault.ok("secret", "rotate", "shop_token", "--passphrase-file", str(vault.folder / "passphrase"), stdin=b"new")
    vault.ok("daemon", "--once")
    assert pending(vault) == [] and "handler_paused" in {why["code"] for why in vault.json("task", "explain", task_id)["why"]}
    vault.ok("handler", "resume", "work")
    vault.ok("daemon", "--once")
    assert len(asked(vault, task_id)) == 1


@pytest.mark.parametrize("words", [("--external", "--secret", "A=k"), ("--secret", "A=k", "--secret", "A=l", "--", "true"), ("--secret", "A", "--", "true"),
                                   ("--secret", "A=k", "--env", "A=1", "--", "true"), ("--secret", "GRACE_A=k", "--", "true")])  # fmt: skip
def test_secrets_that_no_handler_can_have(words: tuple[str, ...], place: Place) -> None:
    """Usage errors, and nothing is added."""
    assert place.call("handler", "add", "work", *words).status == 2
    assert place.json("handler", "list") == []


def test_a_program_outside_claims_no_task_with_secrets(place: Place) -> None:
    """It could be handed none."""
    secret_handler(place, "true")
    place.submit("a goal", "--handler", "work")
    assert place.call("task", "claim", "--handler", "work", "--worker", "w").status == 2


def test_the_helpers_are_in_no_list(place: Place) -> None:
    """What grace starts for itself is not offered, and does nothing for people."""
    assert "_ask" not in place.ok("--help").out and "_guard" not in place.ok("--help").out
    assert place.call("_guard", "x").status == 2 and place.call("_ask").status == 0


def test_a_guard_is_found_by_its_mark(module: Any) -> None:
    """Also where its environment may not be read: by its arguments, and only among the processes of the same user."""
    text = """
import os, sys
from grace import grace
grace.harden()  # loads what another user may not read
if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
read_end, write_end = os.pipe()
child = os.fork()
if child == 0:
    os.close(write_end)
    os.read(read_end, 1)
    os._exit(0)
try:
    open(f"/proc/{child}/environ", "rb").read()
    print("readable")
except PermissionError:
    print("closed")
print(grace.processes_of(["some-token"]) == [child], grace.processes_of(["another"]))
"""
    done = subprocess.run([sys.executable, "-P", "-c", text, module.mark_of("some-token")], capture_output=True, text=True, cwd="/", timeout=60, check=False)
    assert done.stdout == "closed\nTrue []\n", done.stderr
