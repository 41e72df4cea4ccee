"""The command line as people and scripts meet it: every command's help and JSON, shapes, exit codes, terminals, pipes, `run`, logs, the demo."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import pty
import re
import resource
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import GRACE, LIMIT, ROOT, Place, load_module, until

INSTANT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
NUMBER = (int, float)
TASK = {
    "task_id": str, "intent_id": str, "parent_task_id": None, "retry_of": None, "task_type": str, "domain": str, "handler": str, "goal": str, "status": str,
    "reason": None, "priority": str, "payload": dict, "attempt_number": int, "max_attempts": int, "created_at": INSTANT, "queued_at": INSTANT,
    "assigned_at": INSTANT, "started_at": INSTANT, "finished_at": INSTANT, "assigned_worker": str, "sla_ms": int, "sla_deadline": INSTANT, "sla_met": bool,
    "sla_buffer_ms": int, "escalation_level": int, "elapsed_ms": int, "urgency_ratio": NUMBER, "queue_time_ms": int, "execution_time_ms": int,
    "total_time_ms": int, "progress": None, "result": dict, "error": None, "exit_status": int, "success": bool,
}  # fmt: skip
NULL_WHILE_QUEUED = {"assigned_at", "started_at", "finished_at", "assigned_worker", "sla_met", "sla_buffer_ms", "queue_time_ms", "execution_time_ms",
                     "total_time_ms",
                     "result", "exit_status", "success"}  # fmt: skip
INTENT = {
    "intent_id": str, "htm_task_id": str, "goal": str, "expected_outcome": str, "domain": str, "priority": str, "status": str, "sla_ms": int, "sla_met": bool,
    "success": bool, "confidence": NUMBER, "risk_level": str, "context": dict, "result": dict, "created_at": INSTANT, "dispatched_at": INSTANT,
    "completed_at": INSTANT, "actual_execution_ms": int, "created_by": str, "learned_from": bool,
}  # fmt: skip
VIOLATION = {
    "task_id": str, "intent_id": str, "task_type": str, "domain": str, "handler": str, "priority": str, "sla_ms": int, "elapsed_ms": int, "overdue_ms": int,
    "overdue_percent": NUMBER, "escalation_level": int, "level": str, "assigned_worker": None, "status": str, "rescue_task_id": str, "created_at": INSTANT,
}  # fmt: skip
COUNTERS = {
    "total_tasks": int, "active_tasks": int, "queued_tasks": int, "blocked_tasks": int, "completed_tasks": int, "failed_tasks": int, "cancelled_tasks": int,
    "sla_compliance_rate": NUMBER, "active_violations": int, "total_violations": int, "avg_buffer_ms": NUMBER, "avg_queue_time_ms": NUMBER,
    "avg_execution_time_ms": NUMBER, "avg_total_time_ms": NUMBER, "queue_depths": dict, "longest_queued_ms": None, "active_workers": int,
    "worker_utilization": None, "warnings_issued": int, "escalations_triggered": int, "sub_agents_spawned": int, "queue_reprioritizations": int,
    "tasks_rescued": int, "tasks_recovered": int,
}  # fmt: skip


@contextlib.contextmanager
def softened(module: Any) -> Iterator[None]:
    """Vault commands close the process to others for the rest of its life: this process is open again afterwards."""
    mask, core = os.umask(0o022), resource.getrlimit(resource.RLIMIT_CORE)
    os.umask(mask)
    try:
        yield
    finally:
        module.soften((mask, core))
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(module.PR_SET_DUMPABLE, 1, 0, 0, 0)


@pytest.fixture
def inside(place: Place, module: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Call the program in this process, which is the same code and many times faster; it has to end with 0 and without a word on stderr."""
    monkeypatch.setenv("GRACE_DB", str(place.db))
    monkeypatch.setenv("HOME", str(place.folder))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(place.folder)

    def run(*words: str) -> str:
        capsys.readouterr()
        with softened(module):
            status = module.call(list(words))
        out, err = capsys.readouterr()
        assert (status, err) == (0, ""), words
        return str(out)

    return run


def all_commands() -> list[str]:
    """Every command and group, as the program itself declares them."""
    module = load_module()
    found = {" ".join(word for word in (group, name) if word) for group, members in module.COMMANDS.items() for name in members}
    return sorted(found | set(module.GROUPS))


def check_shape(document: dict[str, Any], shape: dict[str, Any], null: frozenset[str] | set[str] = frozenset()) -> None:
    """Each field is there and of its type; None stands for a null."""
    for name, kind in shape.items():
        assert name in document, f"{name} is missing"
        value = document[name]
        if kind is None or name in null:
            assert value is None, (name, value)
        elif kind is INSTANT:
            assert INSTANT.fullmatch(value), (name, value)
        elif kind is bool:
            assert isinstance(value, bool), (name, value)
        else:
            assert isinstance(value, kind) and not isinstance(value, bool), (name, value)


def check_keys(document: Any, free: tuple[str, ...] = ("context", "result", "payload", "env", "message")) -> None:
    """All keys are snake_case, and what ends in _at is an instant; what people put in themselves is free."""
    if isinstance(document, list):
        for item in document:
            check_keys(item, free)
    elif isinstance(document, dict):
        for key, value in document.items():
            assert re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", key), key
            if (key.endswith("_at") and key not in ("warn_at", "critical_at")) or key == "sla_deadline":
                assert value is None or INSTANT.fullmatch(value), (key, value)
            if key not in free:
                check_keys(value, free)


def work_of_all_kinds(place: Place) -> dict[str, str]:
    """A database with a handler of each sort and a task in most states; the ids by name."""
    place.handler("work", "--sla", "1h", "--", "sh", "-c", 'echo out; echo \'{"n": 1}\' > "$GRACE_RESULT"')
    place.handler("broken", "--max-attempts", "1", "--", "false")
    place.handler("outside", "--external")
    ids: dict[str, str] = {}
    ids["done_intent"], ids["done"] = place.submit("do it", "--handler", "work", "--expected-outcome", "it is done", "--confidence", "0.9", "--risk-level",
                                                   "low",
                                                   "--context", '{"folder": "/srv"}')  # fmt: skip
    ids["failed_intent"], ids["failed"] = place.submit("break it", "--handler", "broken")
    place.ok("daemon", "--once")
    ids["queued_intent"], ids["queued"] = place.submit("for later", "--handler", "work", "--in", "1h")
    ids["outside_intent"], ids["outside"] = place.submit("for others", "--handler", "outside")
    ids["blocked_intent"], ids["blocked"] = place.submit("after that", "--handler", "work", "--after", ids["queued_intent"])
    return ids


# ---- every command


@pytest.mark.parametrize("path", ["", *all_commands()])
def test_help(path: str, place: Place, inside: Callable[..., str]) -> None:
    """Every command and group explains itself, by --help and -h, in lines that fit; as JSON in one document. No database is made."""
    shown = inside(*path.split(), "--help")
    assert f"Usage: grace {path}".rstrip() in shown and len(shown.splitlines()) > 3
    assert max(map(len, shown.splitlines())) <= 80
    assert not re.search(r"^ {4,}[A-Z]", shown.partition("Commands:")[2], re.MULTILINE), "a command without a name is listed"
    assert json.loads(inside("--json", *path.split(), "-h"))["help"]
    assert json.loads(inside(*path.split(), "--help", "--json"))["help"].startswith("Usage: grace")
    assert not place.db.exists()


def test_help_of_the_process(place: Place) -> None:
    """The installed command does the same."""
    assert place.ok("--help").out.startswith("Usage: grace [OPTIONS]")
    assert place.ok("task", "claim", "--help", "--json").json["help"].startswith("Usage: grace task claim")


def test_every_command_is_in_the_readme() -> None:
    """The README names each command and group as one types it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [path for path in all_commands() if f"grace {path}" not in text]
    assert not missing


def test_json_of_every_command(place: Place, module: Any, inside: Callable[..., str]) -> None:
    """--json before or after the name: one document on stdout, nothing on stderr, snake_case keys and instants in one form."""
    ids = work_of_all_kinds(place)
    (place.folder / "past.jsonl").write_text("".join(f'{{"name": "past", "start": {at}, "end": {at + 5}, "success": true}}\n' for at in range(100, 120)))
    calls: dict[str, list[list[str]]] = {
        "status": [[]], "violations": [[], ["--all"]], "intent list": [[]], "task list": [[]], "handler list": [[]], "config list": [[]], "events": [[]],
        "intent show": [[ids["done_intent"]]], "task show": [[ids["done"]]], "task explain": [[ids["done"]], [ids["blocked"]]], "task log": [[ids["done"]]],
        "handler show": [["work"]], "config get": [["log.max_bytes"]], "config set": [["log.max_bytes", "65536"]], "config unset": [["log.max_bytes"]],
        "handler pause": [["broken"]], "handler resume": [["broken"]], "handler add": [["other", "--", "true", "--json"]], "handler remove": [["other"]],
        "events publish": [["my.topic", '{"someKey": 1}']], "intent wait": [[ids["done_intent"]], [ids["done_intent"], ids["done_intent"]]],
        "submit-intent": [["again", "--handler", "work"]], "intent retry": [[ids["failed_intent"]]], "task retry": [[ids["queued"]]],
        "task priority": [[ids["blocked"], "high"], [ids["blocked_intent"], "low"]],
        "task claim": [["--handler", "outside", "--worker", "w"]], "task heartbeat": [[ids["outside"], "--worker", "w"]],
        "task progress": [[ids["outside"], "1", "2", "--note", "half", "--worker", "w"]], "task complete": [[ids["outside"], "--worker", "w", "--result",
                                                                                                             '{"n": 1}']],
        "dashboard queued": [[], ["--priority", "low"], ["--handler", "outside", "--limit", "1"]],
        "intent cancel": [[ids["queued_intent"]]], "learn import": [["past.jsonl"]], "learn stats": [[], ["--handler", "past"]],
        "learn outcomes": [[], ["--failed"]], "learn suggest-sla": [[], ["--handler", "past"]], "learn backtest": [[], ["--handler", "work"]],
        "sla rehearse": [[], ["--sla", "1s"]],
        "dashboard stats": [[], ["--window", "1h"]], "dashboard violations": [[], ["--all"]],
        "dashboard slow": [[], ["--limit", "1"]], "dashboard hourly": [[], ["--hours", "1"]], "dashboard health": [[]],
    }  # fmt: skip
    elsewhere = {"run", "daemon", "demo", "task cancel", "task fail", "completion", "credential git", *VAULT_CALLS}
    names = {path for path in all_commands() if path not in module.GROUPS or module.COMMANDS[path].get("")}
    assert not names - set(calls) - elsewhere, "commands without a call here"
    twice = {"handler add", "handler remove", "intent retry", "task retry", "task claim", "task complete", "intent cancel"}
    for path, argvs in calls.items():
        for argv in argvs:
            documents = [inside("--json", *path.split(), *argv)]
            if path not in twice:
                documents.append(inside(*path.split(), "--json", *argv))
            for document in documents:
                assert document.endswith("\n") and document.count("\n") == 1, path
                check_keys(json.loads(document), free=("context", "result", "payload", "env", "queue_depths", "next_steps"))
    fresh = place.submit("to fail", "--handler", "outside")[1]
    claimed = place.json("task", "claim", "--handler", "outside", "--worker", "w")
    assert claimed["task_id"] == fresh and INSTANT.fullmatch(claimed["lease_expires_at"]) and claimed["attempt_id"]
    assert place.json("task", "fail", fresh, "--worker", "w", "--error", "no", "--no-retry")["status"] == "failed"
    other = place.submit("to cancel", "--handler", "outside")[1]
    assert place.json("task", "cancel", other)["status"] == "cancelled"


SIGNED = ("--passphrase-file", "anna.word")
VAULT_CALLS: dict[str, list[tuple[str, ...]]] = {  # in this order on one vault; what stands in braces is taken from an earlier answer
    "init": [("--name", "anna", *SIGNED)],
    "secret set": [("open", "--risk", "low", "--value-file", "value"), ("shop", "--value-file", "value", "--service", "shop", "--expires", "1d", *SIGNED),
                   ("second", "--value-file", "value", *SIGNED)],
    "secret rotate": [("shop", "--value-file", "value", *SIGNED)], "secret reshare": [("shop", *SIGNED)],
    "secret get": [("open", "--action", "use", "--for", "a test", "--reveal")], "exec": [("--secret", "TOKEN=open", "--", "true")],
    "policy add": [("night", "require", "--group", "user", "--hours", "22:00-06:00", "--tz", "Europe/Berlin", *SIGNED),
                   ("deploys", "allow", "--action", "deploy*", "--service", "shop", *SIGNED)],
    "policy list": [()], "policy test": [("shop", "--action", "use"), ("open", "--action", "use", "--at", "2026-11-22T12:00:00Z")],
    "policy remove": [("deploys", *SIGNED)],
    "consent request": [("shop", "--action", "use", "--for", "a test", "--context", '{"someKey": 1}')] * 4, "consent pending": [()],
    "consent show": [("{1}",)], "consent export": [("{0}",), ("{1}", "--out", "case")],
    "consent approve": [("--in", "case", "--out", "approval", *SIGNED), ("{0}", "--note", "yes", *SIGNED)], "consent import": [("approval",)],
    "consent wait": [("{1}",)], "consent deny": [("{2}", "--reason", "no")], "consent withdraw": [("{3}",)],
    "consent revoke": [("{1}", "--reason", "no"), ("--secret", "shop", "--reason", "no")], "consent history": [()], "consent stats": [()],
    "secret list": [()], "secret show": [("shop",)], "secret history": [("shop",), ("open",)], "secret remove": [("open",)],
    "approver add": [("ben", "--role", "user", "--role", "governance", "--new-passphrase-file", "ben.word", *SIGNED)],
    "approver list": [()], "approver export": [("ben", "--out", "bundle"), ("anna",)], "approver import": [("bundle",)],
    "approver passwd": [("anna", "--new-passphrase-file", "anna.word", *SIGNED)], "approver remove": [("ben", "--approver", "anna", *SIGNED)],
    "audit list": [()], "audit verify": [(), SIGNED], "audit export": [()], "audit anchor": [SIGNED], "doctor": [()],
    "consent watch": [()],
    "consent template add": [("early", "--secret", "shop", "--action", "tidy*", "--by", "cron", "--for", "1d", "--uses", "3", "--approver", "anna", *SIGNED)],
    "consent template list": [()], "consent template show": [("early",)],
    "consent template refresh": [("early", "--secret", "second", "--approver", "anna", *SIGNED)], "consent template remove": [("early",)],
}  # fmt: skip


def vault_files(folder: Path) -> None:
    """Passphrases and a value, readable for nobody else."""
    for name in ("anna.word", "ben.word", "value"):
        (folder / name).write_text(f"what is in {name}\n")
        (folder / name).chmod(0o600)


def test_json_of_every_vault_command(place: Place) -> None:
    """One document each, NDJSON for `audit export`: snake_case keys, instants in one form, null and no passphrase or value that nobody asked for."""
    vault_files(place.folder)
    place.ok("config", "set", "vault.argon2_memory", "67108864")
    asked: list[str] = []
    for path, argvs in VAULT_CALLS.items():
        if path == "consent watch":  # goes on until it is told to stop: tests/test_consent.py
            continue
        if path == "approver import":
            for file in place.folder.glob(".config/grace/*/ben.*"):
                file.unlink()
        for number, words in enumerate(argvs):
            words = tuple(asked[int(word[1])] if re.fullmatch(r"\{\d\}", word) else word for word in words)
            wanted = (0, 1) if path == "doctor" else (0,)
            done = place.call(*path.split(), "--json", *words) if number % 2 and "--" not in words else place.call("--json", *path.split(), *words)
            assert done.status in wanted, (path, done.status, done.err)
            assert done.err == "" or path == "consent approve", (path, done.err)
            assert "what is in anna" not in done.out + done.err and ("what is in value" not in done.out or path == "secret get"), path
            documents = done.lines if path == "audit export" else [done.json]
            assert done.out.endswith("\n") and done.out.count("\n") == len(documents) > 0, path
            free = ("context", "by_secret", "by_requester", "facts", "action_risks", "kdf", "earlier", "requires", "needs")
            check_keys(documents, free)
            asked += [documents[0]["consent_id"]] if path == "consent request" else []
    assert place.json("secret", "list")[0]["verified"] is True and place.json("audit", "verify")["ok"] is True


def test_exit_codes_of_the_vault(place: Place) -> None:
    """5 denied, 6 unanswered, 7 no vault or no passphrase, 75 asked: each as the contract says, with and without --json."""
    vault_files(place.folder)
    use = ("--action", "use", "--for", "a test")
    assert place.call("secret", "list", "--json").error["code"] == "locked" and place.call("secret", "list").status == 7
    assert place.call("init", "--name", "anna", "--json").error["code"] == "locked" and not place.sql("SELECT * FROM vault_rosters")
    place.ok("config", "set", "vault.argon2_memory", "67108864")
    place.ok("init", "--name", "anna", *SIGNED)
    place.ok("secret", "set", "shop", "--value-file", "value", *SIGNED)
    waiting = place.call("secret", "get", "shop", *use, "--no-wait", "--json")
    assert (waiting.status, waiting.json["consent_status"], waiting.err) == (75, "pending", "")
    consent = waiting.json["consent_id"]
    calls: list[tuple[int, str, tuple[str, ...]]] = [
        (2, "usage", ("secret", "get", "shop", *use)), (2, "usage", ("consent", "approve")), (3, "not_found", ("secret", "show", "shpo")),
        (3, "not_found", ("consent", "show", "consent_none")), (4, "conflict", ("init", "--name", "ben", *SIGNED)),
        (5, "denied", ("consent", "approve", consent, "--passphrase-file", "ben.word")),
        (5, "denied", ("consent", "approve", consent, "--code", "0000", *SIGNED)), (6, "timeout", ("secret", "get", "shop", *use, "--timeout", "50ms")),
        (7, "locked", ("consent", "approve", consent)), (7, "locked", ("secret", "rotate", "shop", "--value-file", "value")),
    ]  # fmt: skip
    for status, code, words in calls:
        more = ["--reveal"] if words[:2] == ("secret", "get") and status == 6 else []
        done = place.call("--json", *words, *more)
        assert (done.status, done.out) == (status, ""), (words, done.status, done.err)
        assert done.error["code"] == code, words
        if code != "usage":
            plain = place.call(*words)
            said, wanted = (re.sub(r"consent_[0-9a-z]+", "ID", text) for text in (plain.err, done.error["message"]))
            assert (plain.status, plain.out) == (status, "") and f"grace: {wanted}" in said.splitlines(), (words, plain.err)
    late = place.call("consent", "wait", consent, "--timeout", "50ms", "--json")
    assert (late.status, late.json["consent_status"], late.err) == (6, "pending", "")
    place.ok("consent", "deny", consent, "--reason", "no")
    for words in (("consent", "wait", consent), ("secret", "get", "shop", *use, "--consent", consent, "--reveal")):
        denied = place.call("--json", *words)
        assert (denied.status, denied.out, denied.error["code"]) == (5, "", "denied"), words


def test_empty_lists(place: Place, inside: Callable[..., str]) -> None:
    """A list of nothing is [], and in words for people."""
    for words in (["intent", "list"], ["task", "list"], ["handler", "list"], ["violations"], ["events"]):
        assert inside(*words, "--json") == "[]\n"
        assert len(inside(*words).splitlines()) <= 1
    place.handler("outside", "--external")
    nothing = place.call("task", "claim", "--handler", "outside", "--worker", "w", "--json")
    assert (nothing.status, nothing.out, nothing.err) == (6, "null\n", "")


def test_ndjson_where_lines_come_one_by_one(place: Place) -> None:
    """A batch, a followed log and a daemon write one object a line."""
    place.handler("work", "--", "sh", "-c", "echo hello; echo world")
    batch = place.ok("submit-intent", "--batch", "-", "--json", stdin=b'{"goal":"one","handler":"work"}\n{"goal":"two","handler":"work"}\n')
    assert [set(line) >= {"intent_id", "task_id"} for line in batch.lines] == [True, True]
    daemon = place.ok("daemon", "--once", "--json")
    assert len(daemon.lines) >= 4 and all(INSTANT.fullmatch(line["at"]) for line in daemon.lines)
    log = place.ok("task", "log", "-f", batch.lines[0]["task_id"], "--json")
    assert "".join(line["text"] for line in log.lines) == "hello\nworld\n"


# ---- shapes


def test_shapes_of_tasks_and_intents(place: Place) -> None:
    """All promised fields of a task and an intent, null as long as they are not known."""
    ids = work_of_all_kinds(place)
    task, queued = place.task(ids["done"]), place.task(ids["queued"])
    check_shape(task, TASK)
    check_shape(queued, TASK, NULL_WHILE_QUEUED)
    assert (task["status"], task["task_type"], task["attempt_number"], task["exit_status"], task["result"]) == ("completed", "work", 1, 0, {"n": 1})
    assert task["success"] is True and task["sla_met"] is True and 0 < task["sla_buffer_ms"] <= 3_600_000
    assert (queued["elapsed_ms"], queued["urgency_ratio"]) == (0, 0)
    check_shape(place.intent(ids["done_intent"]), INTENT)
    open_intent = {"sla_met", "success", "result", "completed_at", "actual_execution_ms", "expected_outcome", "confidence", "risk_level"}
    check_shape(place.intent(ids["queued_intent"]), INTENT, open_intent)
    for document in place.json("task", "list"):
        assert set(document) >= set(TASK)
    for document in place.json("intent", "list"):
        assert set(document) >= set(INTENT)
    failed = place.task(ids["failed"])
    assert failed["success"] is False and failed["exit_status"] == 1
    assert failed["sla_ms"] is None and failed["urgency_ratio"] is None and failed["sla_met"] is None


def test_shapes_of_violations_events_and_status(place: Place) -> None:
    """A violation, an event and the counters have their promised fields."""
    place.handler("outside", "--external", "--sla", "50ms")
    task_id = place.submit("too late", "--handler", "outside")[1]
    with place.daemon():
        found = until(lambda: [row for row in place.json("violations") if row["task_id"] == task_id and row["rescue_task_id"]], "the violation")[0]
        check_shape(found, VIOLATION)
        assert (found["level"], found["escalation_level"], found["handler"], found["sla_ms"]) == ("critical", 3, "outside", 50)
        assert found["overdue_ms"] == found["elapsed_ms"] - 50 and found["overdue_percent"] > 99
        place.handler("work", "--sla", "1h", "--", "true")
        place.until_status(place.submit("in time", "--handler", "work")[1], "completed")
        status = place.json("status")
        check_shape(status, {**COUNTERS, "longest_queued_ms": int, "worker_utilization": NUMBER})
        assert set(status["queue_depths"]) == {"critical", "high", "normal", "low"} and 0 < status["sla_compliance_rate"] <= 1
        assert status["daemon_alive"] is True and status["active_workers"] == 1
        assert {"violations"} <= {problem["code"] for problem in status["problems"]} and all(problem["hint"] for problem in status["problems"])
    for event in place.events():
        assert set(event) == {"id", "topic", "source", "created_at", "payload"} and INSTANT.fullmatch(event["created_at"]) and not event["id"].isdigit()
    assert place.json("status")["daemon_alive"] is False


# ---- exit codes and errors


def test_exit_codes(place: Place) -> None:
    """Each exit code with its error object on stderr and nothing on stdout, or with its document where the work itself is the answer."""
    place.handler("work", "--", "false")
    place.handler("outside", "--external")
    intent, _ = place.submit("fails", "--handler", "work", "--max-attempts", "1")
    other, _ = place.submit("waits", "--handler", "outside")
    place.ok("daemon", "--once")
    notes = place.folder / "notes.txt"
    notes.write_text("this is no database, whatever its name\n" * 50)
    for status, code, words in ((2, "usage", ["task", "show"]), (2, "usage", ["submit-intent", "x", "--handler", "work", "--sla", "5"]),
                                (2, "usage", ["events", "publish", "htm.task.x"]),
                                (3, "not_found", ["task", "show", "task_none"]), (3, "not_found", ["submit-intent", "x", "--handler", "wrok"]),
                                (3, "not_found", ["config", "get", "nothing"]), (4, "conflict", ["intent", "cancel", intent]),
                                (4, "conflict", ["handler", "add", "work", "--", "true"]), (2, "usage", ["handler", "add", "rescue", "--", "true"]),
                                (2, "usage", ["handler", "add", "command", "--external"]), (4, "conflict", ["handler", "remove", "outside"]),
                                (8, "database", ["--db", str(notes), "status"]), (8, "database", ["--db", str(place.folder), "status"])):  # fmt: skip
        done = place.call(*words, "--json") if "--" not in words else place.call("--json", *words)
        assert (done.status, done.error["code"], done.out) == (status, code, ""), words
        assert set(done.error) == {"code", "message", "hint"} and done.error["message"] and done.err.count("\n") == 1
        plain = place.call(*words)
        lines = plain.err.splitlines()
        assert plain.status == status and plain.out == "" and lines[0] == f"grace: {done.error['message']}"
        assert lines[1:] == ([f"hint: {done.error['hint']}"] if done.error["hint"] else [])
    assert "work" in place.call("submit-intent", "x", "--handler", "wrok").err
    failed = place.call("intent", "wait", intent, "--json")
    assert (failed.status, failed.err, failed.json["status"]) == (1, "", "failed")
    late = place.call("intent", "wait", other, "--timeout", "50ms", "--json")
    assert (late.status, late.err, late.json["status"]) == (6, "", "dispatched")
    assert place.call("intent", "wait", intent, other, "--timeout", "50ms").status == 6


def test_intent_wait(place: Place) -> None:
    """0 when all completed, 1 when one did not, and it waits for the last of them; a removed or unknown id is 3."""
    place.handler("outside", "--external")
    first, second = (place.submit("one", "--handler", "outside"), place.submit("two", "--handler", "outside"))
    waiting = place.start("intent", "wait", first[0], second[0], "--json")
    for task_id in (first[1], second[1]):
        assert waiting.poll() is None
        claimed = place.json("task", "claim", "--handler", "outside", "--worker", "w")
        assert claimed["task_id"] == task_id
        place.ok("task", "complete", task_id, "--worker", "w")
    out, err = waiting.communicate(timeout=LIMIT)
    assert (waiting.returncode, err) == (0, b"") and [row["status"] for row in json.loads(out)] == ["completed", "completed"]
    third, task_id = place.submit("three", "--handler", "outside")
    place.ok("task", "cancel", task_id)
    assert place.call("intent", "wait", first[0], third).status == 1
    assert place.call("intent", "wait", first[0], "int_none").status == 3


def test_submit_and_wait(place: Place) -> None:
    """--wait prints the end and exits 0, 1 or 6; with --wait-timeout alone it is a usage error."""
    place.handler("work", "--", "sh", "-c", 'echo 5 > "$GRACE_RESULT"')
    place.handler("broken", "--max-attempts", "1", "--", "false")
    place.handler("outside", "--external")
    with place.daemon():
        done = place.call("submit-intent", "a", "--handler", "work", "--wait", "--json", "--key", "k")
        assert done.status == 0 and done.json["status"] == "completed" and done.json["result"] == 5 and done.json["task_id"].startswith("task_")
        assert place.call("submit-intent", "a", "--handler", "broken", "--wait").status == 1
    late = place.call("submit-intent", "a", "--handler", "outside", "--wait", "--wait-timeout", "100ms", "--json")
    assert (late.status, late.json["status"], late.err) == (6, "dispatched", "")
    assert place.call("submit-intent", "a", "--handler", "work", "--wait-timeout", "1s").status == 2
    again = place.ok("submit-intent", "a", "--handler", "work", "--wait", "--json", "--key", "k")
    assert again.json["intent_id"] == done.json["intent_id"] and again.json["duplicate"] is True


def test_a_key_is_submitted_once(place: Place) -> None:
    """The same key again returns the first intent and changes nothing."""
    place.handler("work", "--", "true")
    first = place.json("submit-intent", "a", "--handler", "work", "--key", "nightly")
    again = place.json("submit-intent", "another goal", "--handler", "work", "--key", "nightly")
    assert (first["duplicate"], again["duplicate"]) == (False, True) and again["task_id"] == first["task_id"]
    assert len(place.json("task", "list")) == 1
    assert first["intent_id"] in place.ok("submit-intent", "a", "--handler", "work", "--key", "nightly").out


def test_version_and_no_command(place: Place) -> None:
    """--version in both forms; no command shows the help, and with --json is a usage error."""
    assert re.fullmatch(r"grace \d+\.\d+\.\d+\n", place.ok("--version").out)
    assert re.fullmatch(r"\d+\.\d+\.\d+", place.json("--version")["version"])
    assert place.ok().out.startswith("Usage: grace")
    nothing = place.call("--json")
    assert nothing.status == 2 and nothing.out == "" and nothing.error["code"] == "usage"


@pytest.mark.parametrize("words", [["intent", "wait", "one"], ["events", "--follow"], ["task", "log", "-f"], ["task", "claim", "--handler", "outside",
                                                                                                              "--worker", "w", "--wait", "1h"]])
def test_ctrl_c_is_130(words: list[str], place: Place) -> None:
    """An interrupted wait ends with 130 and without a word of Python's."""
    place.handler("outside", "--external")
    _, task_id = place.submit("never", "--handler", "outside", "--intent-id", "one", "--in", "1h")
    process = place.start(*words, *([task_id] if words[1] == "log" else []))
    listening = (lambda: place.sql("SELECT pid FROM waiters")) if words[1] != "log" else (lambda: waits_in_kernel(process.pid))
    until(listening, "the command to wait")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 130 and b"Traceback" not in err
    assert place.sql("SELECT pid FROM waiters") == []


def waits_in_kernel(pid: int) -> bool:
    """Whether a process sleeps with the database open."""
    with contextlib.suppress(OSError):
        files = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        return any(name.endswith("grace.db-wal") for name in files) and Path(f"/proc/{pid}/syscall").read_text().split()[0] in ("230", "115", "35")
    return False


# ---- terminals and pipes


class Terminal:
    """A process on a pseudo-terminal of a given width."""

    def __init__(self, place: Place, *words: str, columns: int = 80, env: dict[str, str] | None = None, program: str = GRACE):
        self.own_end, child_end = pty.openpty()
        fcntl.ioctl(child_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        environment = {**place.environment, "TERM": "xterm", **(env or {})}
        environment.pop("COLUMNS", None)
        if "NO_COLOR" not in (env or {}):
            environment.pop("NO_COLOR", None)
        self.process = subprocess.Popen([program, *words], stdin=child_end, stdout=child_end, stderr=child_end, env=environment, cwd=place.folder,
                                        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))  # noqa: PLW1509  # fmt: skip
        place.processes.append(self.process)
        os.close(child_end)
        self.text = ""

    def type(self, text: str) -> None:
        os.write(self.own_end, text.encode())

    def read(self) -> bool:
        """Take what has come; whether the other end is still open."""
        try:
            if select.select([self.own_end], [], [], 0.05)[0]:
                self.text += os.read(self.own_end, 65536).decode(errors="replace")
            return True
        except OSError:
            return False

    def until(self, part: str) -> None:
        until(lambda: self.read() and part in self.text, f"{part!r} on the terminal", 30)

    def end(self) -> tuple[int, str]:
        """Its exit status and all it wrote, with plain line ends."""
        deadline = time.monotonic() + LIMIT
        while self.read() and time.monotonic() < deadline:
            pass
        status = self.process.wait(LIMIT)
        os.close(self.own_end)
        return status, self.text.replace("\r\n", "\n")


def columns_of(text: str, module: Any) -> int:
    return max((module.text_width(line) for line in ESCAPE.sub("", text).splitlines()), default=0)


def wide_content(place: Place) -> None:
    """Names and goals as long as they may be, in wide and in combining characters, too."""
    place.handler("h" * 64, "--sla", "1ms", "--", "sleep", "x" * 300)
    place.handler("outside", "--external", "--sla", "1ms")
    place.submit("g" * 2000, "--handler", "h" * 64, "--domain", "d" * 64, "--intent-id", "i" * 128)
    place.submit("漢字" * 200, "--handler", "outside")
    place.submit("e\u0301" * 200, "--handler", "outside", "--priority", "critical")


def test_tables_fit_the_terminal(place: Place, module: Any) -> None:
    """On a terminal of 80 columns no line of a table is wider, whatever is in it; piped, nothing is cut."""
    wide_content(place)
    place.ok("task", "claim", "--handler", "outside", "--worker", "w")
    for words in (["task", "list"], ["intent", "list"], ["handler", "list"], ["violations"], ["status"]):
        status, text = Terminal(place, *words).end()
        assert status == 0 and text.strip()
        assert columns_of(text, module) <= 80, f"{words}: {text}"
    piped = place.ok("intent", "list").out
    assert "g" * 2000 in piped and "漢字" * 200 in piped and "i" * 128 in piped and "\x1b" not in piped


def shop_vault(place: Place, service: str = "shop", who: str = "bot", purpose: str = "see the figures", requests: int = 1) -> list[str]:
    """A vault with one secret, and requests for it; their ids."""
    vault_files(place.folder)
    place.ok("config", "set", "vault.argon2_memory", "67108864")
    place.ok("init", "--name", "anna", *SIGNED)
    place.ok("secret", "set", "shop_token", "--service", service, "--value-file", "value", *SIGNED)
    asked = ("consent", "request", "shop_token", "--action", "read", "--by", who, "--for", purpose, "--timeout", "1h")
    return [place.json(*asked)["consent_id"] for _ in range(requests)]


LONG_TEXTS = [("漢字" * 100, "w" * 128, "p" * 2000), ("e\u0301" * 100, "漢" * 128, "字" * 2000),
              ("https://git.example.org/" + "x" * 150, "bot", "look " * 199 + "look")]


@pytest.mark.parametrize("service, who, purpose", LONG_TEXTS, ids=["wide", "combining", "long"])
def test_tables_of_the_vault_fit_the_terminal(service: str, who: str, purpose: str, place: Place, module: Any) -> None:
    """On a terminal of 80 columns no line is wider, and ids, which people have to type, are whole."""
    (consent,) = shop_vault(place, service, who, purpose)
    for words in ("secret list", "consent pending", "consent history", "audit list", "approver list"):
        status, text = Terminal(place, *words.split()).end()
        assert status == 0 and text.strip() and columns_of(text, module) <= 80, f"{words}: {text}"
        assert consent in text or not words.startswith("consent"), f"{words}: {text}"
    assert purpose in place.ok("consent", "pending").out


def test_a_value_that_cannot_be_written(place: Place) -> None:
    """A full disk behind `secret get` is an error in one line; on a terminal the value is not shown unless --reveal."""
    shop_vault(place, requests=0)
    place.ok("secret", "set", "open", "--risk", "low", "--value-file", "value")
    words = ("secret", "get", "open", "--action", "read", "--for", "a test")
    with open("/dev/full", "wb") as full:
        process = place.start(*words, stdout=full)
        _, err = process.communicate(timeout=LIMIT)
    assert process.returncode not in (0, None) and b"No space" in err and b"Traceback" not in err
    status, text = Terminal(place, *words).end()
    assert status == 2 and "--reveal" in text and "what is in value" not in text
    status, text = Terminal(place, *words, "--reveal").end()
    assert status == 0 and "what is in value" in text


def test_ordinary_tables_keep_their_ids_whole(place: Place, module: Any) -> None:
    """With ordinary names a table at 80 columns shows whole ids, cuts the goal with an ellipsis, and uses a wider terminal."""
    place.handler("work", "--sla", "1h30m", "--", "true")
    intent_id, task_id = place.submit("A goal that is a good deal longer than what is left of a line of eighty columns on a terminal", "--handler", "work")
    for words, wanted in ((["task", "list"], task_id), (["intent", "list"], intent_id)):
        text = ESCAPE.sub("", Terminal(place, *words).end()[1])
        assert wanted in text and "…" in text and columns_of(text, module) <= 80
        assert "on a terminal" in Terminal(place, *words, columns=200).end()[1]


def test_colour_only_where_it_belongs(place: Place) -> None:
    """Colour on a terminal; none with NO_COLOR, in a pipe or in JSON."""
    place.handler("work", "--", "false")
    place.submit("a", "--handler", "work", "--max-attempts", "1")
    place.ok("daemon", "--once")
    assert "\x1b[31mfailed\x1b[0m" in Terminal(place, "task", "list").end()[1]
    assert "\x1b" not in Terminal(place, "task", "list", env={"NO_COLOR": "1"}).end()[1]
    assert "\x1b" not in Terminal(place, "task", "list", "--json").end()[1]
    assert "\x1b" not in place.ok("task", "list").out


def sh(place: Place, line: str, shell: str = "sh") -> subprocess.CompletedProcess[bytes]:
    """A line of shell with the command on its path."""
    environment = {**place.environment, "PATH": f"{Path(GRACE).parent}:{place.environment['PATH']}"}
    return subprocess.run([shell, "-c", line], env=environment, cwd=place.folder, capture_output=True, timeout=LIMIT, check=False, stdin=subprocess.DEVNULL)


def test_pipes_that_close_early(place: Place) -> None:
    """`| head -1` gets its line and no traceback follows, for long output too."""
    place.handler("work", "--", "true")
    place.ok("submit-intent", "--batch", "-", stdin=b"".join(b'{"goal":"%s","handler":"work"}\n' % (b"x" * 1500) for _ in range(200)))
    for words in ("task list", "events --limit 400", "task list --json", "--help", "events --follow --limit 400", "run -- seq 100000"):
        done = sh(place, f"grace {words} | head -1")
        assert done.returncode == 0 and done.stdout.count(b"\n") == 1, words
        assert b"Traceback" not in done.stderr and b"Broken pipe" not in done.stderr and b"Exception" not in done.stderr, done.stderr


def test_full_stdout(place: Place) -> None:
    """A full disk behind stdout is an error in one line."""
    place.handler("work", "--", "true")
    place.submit("a" * 2000, "--handler", "work")
    for words in ("status", "status --json", "task list --limit 1", "--help", "events --limit 5", "submit-intent x --handler work", "config list"):
        done = sh(place, f"grace {words} >/dev/full")
        assert done.returncode not in (0, 2, 130) and done.stderr.startswith((b"grace: ", b'{"error"')) and done.stderr.count(b"\n") <= 2, words
        assert b"Traceback" not in done.stderr and b"No space left" in done.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_descriptors(closed: str, place: Place) -> None:
    """Without stdin, stdout or stderr (cron, nohup, supervisors) a command does its work and ends as ever."""
    place.handler("work", "--", "true")
    for number, (words, status) in enumerate((("status", 0), ("submit-intent a --handler work --key {0}", 0), ("task show task_none", 3), ("run -- true", 0),
                                              ("run -- sh -c 'exit 3'", 3), ("run --json -- sh -c 'echo x'", 0), ("daemon --once", 0))):  # fmt: skip
        done = sh(place, f"grace {words.format(number)} {closed}")
        assert done.returncode == status, (words, done)
        assert b"Traceback" not in done.stderr
    assert {row["status"] for row in place.json("task", "list")} == {"completed", "failed"}
    assert place.sql("PRAGMA integrity_check") == [["ok"]]


def test_a_closed_stdout_is_not_given_to_others(place: Place) -> None:
    """With stdout closed, what a command prints lands in no file of the database."""
    done = sh(place, "grace run -- echo stray-words >&- <&-; grace status --json >&-")
    assert b"Traceback" not in done.stderr
    for file in place.folder.rglob("*"):
        if file.is_file() and not file.name.endswith(".log"):
            head = file.read_bytes()[:16]
            assert b"stray" not in head and not head.startswith(b"{")
    assert len(place.json("task", "list")) == 1


# ---- run


def test_run_ends_with_its_commands_status(place: Place) -> None:
    """The command's own status; 128+n for a signal; 124, 126, 127 as with timeout and env; 125 for grace's own trouble."""
    script = place.folder / "no-rights"
    script.write_text("#!/bin/sh\n")
    notes = place.folder / "notes.txt"
    notes.write_text("this is no database\n" * 100)
    for words, status in ((["sh", "-c", "exit 3"], 3), (["true"], 0), (["sh", "-c", "kill -9 $$"], 137), (["sh", "-c", "kill -TERM $$"], 143),
                          (["no-such-command-here"], 127),
                          ([str(script)], 126), ([str(place.folder)], 126), ([str(place.folder / "none" / "x")], 127)):  # fmt: skip
        done = place.call("run", "--", *words)
        assert done.status == status, (words, done.err)
        assert "Traceback" not in done.err and done.out == ""
        newest = place.json("task", "list", "--limit", "1")[0]
        assert newest["exit_status"] == status and newest["status"] == ("completed" if status == 0 else "failed")
        assert newest["handler"] is None and newest["task_type"] == "command"
    assert place.call("run", "--timeout", "200ms", "--", "sleep", "60").status == 124
    assert place.json("task", "list", "--limit", "1")[0]["status"] == "timeout"
    for bad in (str(notes), str(place.folder), "/proc/none/x.db"):
        done = place.call("--db", bad, "run", "--", "touch", "ran")
        assert done.status == 125 and done.err.startswith("grace: ")
    assert not (place.folder / "ran").exists()


def test_run_json(place: Place) -> None:
    """The command's stdout goes to stderr, and the task's document comes last and alone on stdout, whatever the end."""
    done = place.call("run", "--json", "--sla", "1h", "--", "sh", "-c", "echo words; exit 3")
    assert done.status == 3 and done.err == "words\n"
    check_shape({**done.json, "handler": "", "result": {}, "error": None}, TASK)
    assert (done.json["status"], done.json["exit_status"], done.json["success"]) == ("failed", 3, False)
    missing = place.call("--json", "run", "--", "no-such-command-here")
    assert missing.status == 127 and missing.json["status"] == "failed" and "no-such-command-here" in missing.err
    bad = place.call("--json", "--db", str(place.folder), "run", "--", "true")
    assert bad.status == 125 and bad.out == "" and bad.error["code"] == "database"
    plain = place.call("run", "--", "echo", "--json")
    assert plain.out == "--json\n"


@pytest.mark.parametrize("option", ["--handler=x", "--template=x", "--batch=x", "--wait", "--at=2030-01-01T00:00:00Z", "--in=1h", "--after=int_1"])
def test_run_refuses_what_is_for_the_background(option: str, place: Place) -> None:
    """Options that make no sense in the foreground are usage errors, and nothing runs."""
    done = place.call("run", option, "--", "touch", "ran")
    assert done.status == 2 and option.partition("=")[0] in done.err and done.out == ""
    assert not (place.folder / "ran").exists() and not place.db.exists()


def test_run_with_a_known_key(place: Place) -> None:
    """The second run of a key runs nothing, prints the first ids on stderr, and exits 0."""
    line = ["run", "--key", "nightly", "--", "sh", "-c", "echo once >> ran; exit 4"]
    assert place.call(*line).status == 4
    first = place.json("task", "list")[0]
    again = place.call(*line)
    assert (again.status, again.out) == (0, "") and first["intent_id"] in again.err and first["task_id"] in again.err
    assert (place.folder / "ran").read_text() == "once\n"
    document = place.call("--json", *line)
    assert document.status == 0 and document.json["intent_id"] == first["intent_id"] and document.json["duplicate"] is True


def test_run_streams(place: Place) -> None:
    """Output comes as it is written, both streams apart; input reaches the command; the log has both."""
    process = place.start("run", "--", "sh", "-c", "echo first; echo aside >&2; read line; echo got $line", stdin=subprocess.PIPE)
    assert process.stdin and process.stdout
    assert process.stdout.readline() == b"first\n"
    out, err = process.communicate(b"hello\n", timeout=LIMIT)
    assert (process.returncode, out, err) == (0, b"got hello\n", b"aside\n")
    log = place.ok("task", "log", place.json("task", "list")[0]["task_id"]).out
    assert sorted(log.splitlines()) == ["aside", "first", "got hello"]


def test_run_passes_large_input_and_output(place: Place) -> None:
    """Megabytes through stdin and stdout arrive byte for byte."""
    data = bytes(range(256)) * 8000
    done = place.call("run", "--", "cat", stdin=data)
    assert done.status == 0 and done.raw_out == data


def test_run_writes_to_a_pipe_that_does_not_block(place: Place) -> None:
    """A stdout that somebody has set to non-blocking loses nothing."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    process = place.start("run", "--", "head", "-c", "1000000", "/dev/zero", stdout=write_end)
    os.close(write_end)
    until(lambda: readable_bytes(read_end) >= 65536 or process.poll() is not None, "a full pipe")
    total = 0
    while data := os.read(read_end, 65536):
        total += len(data)
    os.close(read_end)
    assert process.wait(LIMIT) == 0 and total == 1_000_000


def readable_bytes(fd: int) -> int:
    return int(struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"\0" * 4))[0])


def test_a_reader_that_stands_still_stops_no_clock(place: Place) -> None:
    """When nobody reads the output of `run`, its time limit and its ladder go on."""
    read_end, write_end = os.pipe()
    process = place.start("run", "--timeout", "1s", "--sla", "300ms", "--", "yes", stdout=write_end)
    os.close(write_end)
    try:
        until(lambda: place.db.exists() and place.events("htm.sla.violated"), "the violation", 20)
        assert process.poll() is None
        until(lambda: [t for t in place.json("task", "list") if (t["task_type"], t["status"]) == ("command", "timeout")], "the time limit")
    finally:
        os.close(read_end)
    assert process.wait(LIMIT) == 124


def test_run_tries_again_when_asked(place: Place) -> None:
    """--max-attempts runs the command again after a pause; the last status counts."""
    done = place.call("run", "--max-attempts", "2", "--", "sh", "-c", "echo try; test -e again || { touch again; exit 9; }")
    assert (done.status, done.out) == (0, "try\ntry\n")
    task = place.json("task", "list")[0]
    assert (task["status"], task["attempt_number"], task["max_attempts"]) == ("completed", 2, 2)
    assert place.ok("task", "log", task["task_id"], "--attempt", "1").out == "try\n"


def test_run_interrupted(place: Place) -> None:
    """TERM ends the command and what it has started; the task says that it was interrupted."""
    process = place.start("run", "--", "sh", "-c", "sleep 600 & echo $!; wait")
    assert process.stdout
    sleeper = int(process.stdout.readline())
    process.send_signal(signal.SIGTERM)
    assert process.wait(LIMIT) == 143
    task = place.json("task", "list")[0]
    assert (task["status"], task["reason"], task["exit_status"]) == ("failed", "interrupted", 143)
    until(lambda: not Path(f"/proc/{sleeper}").exists(), "the grandchild to be gone")


def test_run_on_a_terminal(place: Place) -> None:
    """The command owns the terminal: it may read it, and Ctrl-C ends it with 130."""
    terminal = Terminal(place, "run", "--", "sh", "-c", "echo ready; read line; echo got $line; sleep 600")
    terminal.until("ready")
    terminal.type("hello\n")
    terminal.until("got hello")
    terminal.type("\x03")
    status, text = terminal.end()
    assert status == 130 and "Traceback" not in text


def test_run_records_no_environment(place: Place) -> None:
    """What stands in the environment of the caller reaches the command, and nothing that grace keeps or shows."""
    done = place.call("run", "--", "sh", "-c", "test ${#SHOP_PASSWORD} = 19", env={"SHOP_PASSWORD": "hunter2-not-for-you"})
    assert done.status == 0
    place.handler("work", "--", "sh", "-c", "exit 1")
    _, task_id = place.submit("a", "--handler", "work", "--max-attempts", "1")
    place.call("daemon", "--once", env={"SHOP_PASSWORD": "hunter2-not-for-you"})
    assert "hunter2" not in place.ok("events", "--json").out + place.ok("task", "explain", task_id, "--json").out + place.ok("status", "--json").out
    for file in place.folder.rglob("*"):
        assert not file.is_file() or b"hunter2" not in file.read_bytes(), file


# ---- handlers


def test_what_a_handler_gets(place: Place) -> None:
    """The payload on stdin, the facts in the environment, nothing else of GRACE_*; its own environment and folder; the result from a file."""
    told = place.folder / "told"
    told.mkdir()
    script = place.folder / "handler.sh"
    script.write_text(f"#!/bin/sh\ncd {told}; cat > payload; env > env; printf '%s\\n' \"$@\" > argv; printf '%s' \"$PWD\" > pwd\n"
                      'echo \'{"ok": [1]}\' > "$GRACE_RESULT"\n')  # fmt: skip
    script.chmod(0o755)
    place.handler("work", "--sla", "1h", "--cwd", str(told), "--env", "MINE=own value", "--", str(script), "{goal}", "{task_id}", "{context.folder}",
                  "{context.list}", "x{goal}",
                  "{context.deep.n}", "$HOME")  # fmt: skip
    context = {"folder": "a b; touch /tmp/no 'q'", "list": [1, None], "deep": {"n": 5}}
    intent_id, task_id = place.submit("A goal; $(exit 3)", "--handler", "work", "--context", json.dumps(context), "--expected-outcome", "all well")
    place.call("daemon", "--once", env={"GRACE_SECRET": "x", "KEPT": "yes"})
    task = place.task(task_id)
    assert (task["status"], task["result"], task["error"]) == ("completed", {"ok": [1]}, None)
    assert place.intent(intent_id)["result"] == {"ok": [1]}
    payload = json.loads((told / "payload").read_text())
    assert payload.items() >= {"intent_id": intent_id, "task_id": task_id, "goal": "A goal; $(exit 3)", "expected_outcome": "all well", "context": context,
                               "attempt": 1,
                               "sla_deadline": task["sla_deadline"]}.items()  # fmt: skip
    assert payload.items() >= task["payload"].items()
    environment = dict(line.split("=", 1) for line in (told / "env").read_text().splitlines() if "=" in line)
    assert environment.items() >= {"GRACE_TASK_ID": task_id, "GRACE_INTENT_ID": intent_id, "GRACE_ATTEMPT": "1", "GRACE_DEADLINE": task["sla_deadline"],
                                   "GRACE_DB": str(place.db), "MINE": "own value", "KEPT": "yes"}.items()  # fmt: skip
    assert environment["GRACE_ATTEMPT_ID"] == place.json("task", "explain", task_id)["attempts"][0]["attempt_id"]
    assert "GRACE_SECRET" not in environment and not Path(environment["GRACE_RESULT"]).exists()
    assert (told / "pwd").read_text().strip() == str(told)
    assert (told / "argv").read_text().splitlines() == ["A goal; $(exit 3)", task_id, context["folder"], "[1,null]", "x{goal}", "5", "$HOME"]


def test_a_missing_key_fails_at_once(place: Place) -> None:
    """A placeholder that the context does not have fails the task without a second try, and says which."""
    place.handler("work", "--", "touch", "{context.folder}")
    _, task_id = place.submit("a", "--handler", "work")
    place.ok("daemon", "--once")
    task = place.task(task_id)
    assert (task["status"], task["attempt_number"], task["max_attempts"]) == ("failed", 1, 3) and "context.folder" in task["error"]


@pytest.mark.parametrize("left", ["echo not json", "echo '[1,'", "printf ''", "printf '\\377'", "echo NaN", 'printf \'{"a":"\\\\u0000"}\'',
                                  "head -c 2000000 /dev/zero | tr '\\0' 1"])
def test_an_unusable_result_does_not_undo_the_work(left: str, place: Place) -> None:
    """The task completes, and its error says that the result file was not usable."""
    done = place.call("run", "--json", "--", "sh", "-c", f'{left} > "$GRACE_RESULT"')
    assert done.status == 0
    assert (done.json["status"], done.json["result"], done.json["success"]) == ("completed", None, True) and "result" in done.json["error"]


@pytest.mark.parametrize("left", ['mkdir "$GRACE_RESULT"', 'mkfifo "$GRACE_RESULT"', 'ln -s /dev/zero "$GRACE_RESULT"',
                                  'ln -s "$GRACE_RESULT" "$GRACE_RESULT"'])
def test_a_result_that_is_no_file(left: str, place: Place) -> None:
    """A directory, a pipe or a link in its place neither stops the runner nor undoes the work."""
    process = place.start("run", "--json", "--", "sh", "-c", left)
    out, _ = process.communicate(timeout=LIMIT / 3)
    assert process.returncode == 0
    document = json.loads(out)
    assert document["status"] == "completed" and document["result"] is None and "result" in document["error"]


# ---- logs and explanations


def test_task_log(place: Place) -> None:
    """Raw when piped, by attempt, as JSON; unknown attempts are not found; a task that never ran has an empty one."""
    raw = b"\x1b[31mred\x1b[0m \x07bell\xff\r\n"
    (place.folder / "output").write_bytes(raw)
    place.handler("work", "--backoff", "1ms", "--max-attempts", "2", "--", "sh", "-c",
                  f'echo attempt $GRACE_ATTEMPT; cat {place.folder}/output; test "$GRACE_ATTEMPT" = 2')
    _, task_id = place.submit("a", "--handler", "work")
    with place.daemon():
        place.until_status(task_id, "completed")
    assert place.ok("task", "log", task_id).raw_out == b"attempt 2\n" + raw
    assert place.ok("task", "log", task_id, "--attempt", "1").raw_out == b"attempt 1\n" + raw
    document = place.json("task", "log", task_id, "--attempt", "1")
    assert document["task_id"] == task_id and document["attempts"][0]["text"].startswith("attempt 1\n") and document["attempts"][0]["outcome"] == "failed"
    assert place.call("task", "log", task_id, "--attempt", "7").status == 3
    assert place.ok("task", "log", task_id, "-f").raw_out.endswith(raw)
    _, other = place.submit("b", "--handler", "work", "--in", "1h")
    assert place.ok("task", "log", other).out == "" and place.json("task", "log", other)["attempts"] == []


def test_task_log_on_a_terminal(place: Place) -> None:
    """Colours are kept there, and everything else that a terminal would obey is shown escaped."""
    (place.folder / "output").write_bytes("\x1b[31mred\x1b[0m\ttab \x1b]0;title\x07 \u202ebidi \x1b[2J\x9b5n back\rover\r\nend".encode() + b"\xff")
    done = place.call("run", "--", "cat", "output")
    assert done.status == 0
    _, text = Terminal(place, "task", "log", place.json("task", "list")[0]["task_id"], columns=200).end()
    assert "\x1b[31mred\x1b[0m" in text and "end" in text
    rest = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert "\x1b" not in rest and "\x07" not in rest and "\u202e" not in rest and "\x9b" not in rest
    assert "\\u{1b}]0;title\\u{7}" in rest and "\\u{202e}" in rest


def test_task_log_follows(place: Place) -> None:
    """-f shows lines as they come, over all attempts, and ends with the task."""
    place.handler("work", "--backoff", "1ms", "--max-attempts", "2", "--", "sh", "-c",
                  "echo begin $GRACE_ATTEMPT; until test -e go; do sleep 0.05; done; echo end; exit $((2 - GRACE_ATTEMPT))")
    _, task_id = place.submit("a", "--handler", "work")
    with place.daemon():
        place.until_status(task_id, "running")
        process = place.start("task", "log", "-f", task_id)
        assert process.stdout and process.stdout.readline() == b"begin 1\n"
        assert process.poll() is None
        (place.folder / "go").touch()
        out, _ = process.communicate(timeout=LIMIT)
    assert (process.returncode, out) == (0, b"end\nbegin 2\nend\n")


def why(place: Place, task_id: str) -> set[str]:
    document = place.json("task", "explain", task_id)
    assert {"task_id", "status", "why", "story"} <= set(document) and document["story"][0]["topic"] == "htm.task.created"
    assert [entry["at"] for entry in document["story"]] == sorted(entry["at"] for entry in document["story"])
    text = place.ok("task", "explain", task_id).out
    assert text.startswith(task_id) and all(reason["text"] in text for reason in document["why"])
    return {reason["code"] for reason in document["why"]}


def test_task_explain(place: Place) -> None:
    """The reason for each state a task may wait in, and the story of one that has ended."""
    place.handler("work", "--", "sh", "-c", "until test -e go; do sleep 0.05; done")
    place.handler("broken", "--backoff", "1h", "--", "false")
    place.handler("paused", "--", "true")
    place.handler("outside", "--external")
    place.ok("handler", "pause", "paused")
    intent, queued = place.submit("a", "--handler", "work", "--sla", "1h")
    assert why(place, queued) == {"no_daemon"}
    assert {step["step"] for step in place.json("task", "explain", queued)["next_steps"]} >= {"warning", "violated", "critical"}
    _, blocked = place.submit("b", "--handler", "work", "--after", intent)
    assert why(place, blocked) == {"waiting_dependency"} and intent in place.ok("task", "explain", blocked).out
    _, paused = place.submit("c", "--handler", "paused")
    assert "handler_paused" in why(place, paused)
    _, outside = place.submit("d", "--handler", "outside")
    assert why(place, outside) == {"external"}
    _, later = place.submit("e", "--handler", "work", "--in", "1h")
    assert len(why(place, later)) >= 1 and "not to start before" in place.ok("task", "explain", later).out
    _, failing = place.submit("f", "--handler", "broken")
    with place.daemon("--workers", "2"):
        until(lambda: place.task(failing)["reason"] == "backoff", "the back-off")
        assert "backoff" in why(place, failing)
        place.until_status(queued, "running")
        assert why(place, queued) == {"running"}
        (place.folder / "go").touch()
        place.until_status(queued, "completed")
        place.until_status(blocked, "completed")
    assert why(place, queued) == {"completed"}
    story = [entry["text"] for entry in place.json("task", "explain", queued)["story"]]
    assert any("queued → assigned" in line for line in story) and any("running → completed" in line for line in story)
    place.ok("task", "cancel", failing)
    assert why(place, failing) == {"cancelled"}


# ---- demo


def leftovers(folder: Path) -> list[int]:
    """Processes that mention a folder in their command or environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if str(folder).encode() in (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes():
                    found.append(int(entry.name))
    return found


@pytest.fixture
def scratch(place: Place) -> Iterator[Path]:
    folder = place.folder / "scratch"
    folder.mkdir()
    yield folder
    try:
        until(lambda: not leftovers(folder), "the demo's processes to be gone", 20)
        assert list(folder.iterdir()) == []
    finally:
        for pid in leftovers(folder):
            os.kill(pid, signal.SIGKILL)


def test_demo(place: Place, scratch: Path) -> None:
    """The tour shows a completed task, a ladder and a rescue, and leaves nothing behind, neither here nor in the own database."""
    done = place.call("demo", env={"TMPDIR": str(scratch)})
    assert done.status == 0 and done.err == "", done.err
    for part in ("$ grace handler add", "$ grace submit-intent", "completed", "htm.sla.critical", "What to type next"):
        assert part in done.out, part
    notes = re.compile(r"  grace: (waiting for consent, code |\S+ \(\w+\) is sealed for )")
    complaints = [line for line in done.out.splitlines() if "grace: " in line and not notes.match(line)]
    assert "Traceback" not in done.out and not complaints and not place.db.exists()


def test_demo_json(place: Place, scratch: Path) -> None:
    """As JSON the tour is one document with each step's command, status and output."""
    document = place.call("demo", "--json", env={"TMPDIR": str(scratch)}).json
    assert len(document["steps"]) > 5 and all(step["exit_status"] == 0 and step["command"][0] == "grace" for step in document["steps"])


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_demo_stopped_early(signum: signal.Signals, place: Place, scratch: Path) -> None:
    """Stopped in the middle, it cleans up as well."""
    process = place.start("demo", env={"TMPDIR": str(scratch)})
    assert process.stdout
    for line in process.stdout:
        if b"submit-intent" in line:
            break
    process.send_signal(signum)
    _, err = process.communicate(timeout=LIMIT)
    assert process.returncode in (130, 143, -15) and b"Traceback" not in err


def test_demo_into_a_closed_pipe(place: Place, scratch: Path) -> None:
    """`grace demo | head -1` ends and cleans up."""
    done = sh(place, f"TMPDIR={scratch} grace demo | head -1")
    assert done.returncode == 0 and b"Traceback" not in done.stderr
