"""The schema's law, tried by the system's own sqlite3 shell: each CHECK, trigger and view once, all transitions, and upgrades."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import apsw
import pytest

from tests.conftest import LIMIT, ROOT, Place, load_module

SCHEMA = (ROOT / "schema.sql").read_text(encoding="utf-8")
PROSE = re.compile(r"--[^\n]*")
pytestmark = pytest.mark.skipif(not shutil.which("sqlite3"), reason="is about the sqlite3 shell, which is not installed")
FINAL = ("completed", "failed", "timeout", "cancelled")
TASK_STATUSES = ("queued", "blocked", "assigned", "running", *FINAL)
INTENT_STATUSES = ("created", "dispatched", "executing", *FINAL)


def shell(db: Path, text: str) -> subprocess.CompletedProcess[str]:
    """What the sqlite3 shell says to some statements; it stops at the first that is refused."""
    return subprocess.run(["sqlite3", "-json", str(db), text], capture_output=True, text=True, timeout=LIMIT, check=False)


def rows(db: Path, text: str) -> list[dict[str, Any]]:
    """The rows of the last statement of `text`, which is taken back afterwards; fails when anything is refused."""
    done = shell(db, f"BEGIN; {text}; ROLLBACK;")
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout)) if done.stdout.strip() else []


def refusal(db: Path, text: str) -> str:
    """Why the shell's statements were refused; fails when they were not."""
    done = shell(db, f"BEGIN; {text}; ROLLBACK;")
    assert done.returncode != 0, f"accepted: {text}"
    return done.stderr


ENTRY = "INSERT INTO secret_entries (secret_key, version, header, sealed, sealed_hash, signature, created_at) " \
        "VALUES ('{key}', {version}, '{{}}', x'00', hex(zeroblob(32)), zeroblob(64), 1)"  # fmt: skip
CONSENT = "INSERT INTO secret_consent_records (consent_id, secret_key, secret_version, consent_status, mode, request, requester, pid, boot_id, max_uses, " \
          "used_count, requested_at, expires_at, grant_expires_at, observed) " \
          "VALUES ('{id}', 'key', 1, '{status}', 'standing', '{{}}', 'r', 1, 'b', 2, {used}, 1, 2, 3, '[]')"  # fmt: skip
GRANT = "INSERT INTO consent_grants (consent_id, group_name, approver, document, wrap, wrap_hash, signature, created_at) " \
        "VALUES ('pending', 'user', 'a', '{}', x'00', 'h', zeroblob(64), 1)"  # fmt: skip
LEAF = "INSERT INTO audit_log VALUES ({seq}, '{{}}', hex(zeroblob(32)))"
VAULT = ";".join([LEAF.format(seq=1), LEAF.format(seq=2), "INSERT INTO audit_anchors VALUES (1, '{}', zeroblob(64))",
                  "INSERT INTO vault_rosters VALUES (1, '{}', zeroblob(64))", "INSERT INTO governance_rules VALUES (1, '{}', zeroblob(64))",
                  ENTRY.format(key="key", version=1), "INSERT INTO secret_delegations VALUES (1, 'key', '{}', zeroblob(64), x'00', 1)",
                  "INSERT INTO secret_shares VALUES (1, 'key', 1, 'user', 'm', 1, x'00')",
                  CONSENT.format(id="pending", status="pending", used=0), GRANT])  # fmt: skip


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file the command made: one intent queued, one blocked, one running, one completed, by their own ids; and rows of a vault.

    Tests take back what they do."""
    place = Place(tmp_path_factory.mktemp("schema"))
    place.handler("work", "--external")
    kinds = [("completed", "critical"), ("running", "high"), ("queued", "normal"), ("blocked", "low", "--after", "queued")]
    ids = {name: place.submit(f"the goal {name}", "--handler", "work", "--intent-id", name, "--sla", "1h", "--priority", priority, *more)[1]
           for name, priority, *more in kinds}  # fmt: skip
    for name in ("completed", "running"):
        assert place.json("task", "claim", "--handler", "work", "--worker", "w")["task_id"] == ids[name]
        if name == "completed":
            place.ok("task", "complete", ids[name], "--worker", "w", "--result", "[1]")
    done = shell(place.db, VAULT)
    assert (done.returncode, done.stderr) == (0, "")
    yield place.db
    place.close()


def task(name: str) -> str:
    return f"task_id = (SELECT htm_task_id FROM intent_records WHERE intent_id = '{name}')"


def new_task(**fields: str) -> str:
    """The statement that inserts a task as small as the schema allows, with these columns as they are written."""
    row = {"task_id": "'t'", "task_type": "'work'", "domain": "'d'", "goal": "'g'", "payload": "'{}'", "status": "'queued'", "priority": "'low'",
           "order_at": "1", "aged_at": "1", "warn_at": "0.8", "critical_at": "2", "max_attempts": "1", "created_at": "1", "queued_at": "1",
           "updated_at": "777", "updated_by": "'me'", **fields}  # fmt: skip
    return f"INSERT INTO htm_tasks ({', '.join(row)}) VALUES ({', '.join(row.values())})"


# ---- the file as the shell sees it


def test_the_shell_of_the_system_reads_the_file(db: Path) -> None:
    """Whole, with intact links, marked as ours."""
    assert rows(db, "PRAGMA integrity_check") == [{"integrity_check": "ok"}]
    assert rows(db, "PRAGMA foreign_key_check") == []
    module = load_module()
    assert rows(db, "PRAGMA application_id") == [{"application_id": module.APPLICATION_ID}] == [{"application_id": 0x67726163}]
    assert rows(db, "PRAGMA user_version") == [{"user_version": module.SCHEMA_VERSION}]
    assert rows(db, "PRAGMA journal_mode") == [{"journal_mode": "wal"}]
    for kind in ("table", "view"):
        for row in rows(db, f"SELECT name FROM sqlite_schema WHERE type = '{kind}' ORDER BY name"):
            rows(db, f"SELECT * FROM {row['name']}")


def test_the_shell_of_the_system_makes_the_schema(tmp_path: Path, db: Path) -> None:
    """The text is plain SQLite: the shell alone makes of it what the command makes."""
    fresh = tmp_path / "fresh.db"
    done = subprocess.run(["sqlite3", str(fresh)], input=SCHEMA, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    question = "SELECT type, name, tbl_name, sql FROM sqlite_schema ORDER BY type, name"
    assert rows(fresh, question) == rows(db, question)


def test_all_tables_are_strict_and_have_rowids(db: Path) -> None:
    """A wrong type is refused, whoever writes."""
    tables = rows(db, "SELECT name, strict, wr FROM pragma_table_list WHERE schema = 'main' AND type = 'table' AND name NOT LIKE 'sqlite!_%' ESCAPE '!'")
    assert len(tables) > 10
    assert [row["name"] for row in tables if not row["strict"] or row["wr"]] == []
    assert "cannot store TEXT value in INTEGER column" in refusal(db, "UPDATE htm_tasks SET updated_at = 'yesterday'")


# ---- CHECKs

QUEUED, RUNNING, COMPLETED = task("queued"), task("running"), task("completed")
ATTEMPT = "INSERT INTO htm_task_attempts (attempt_id, task_id, attempt_number, worker_id, token, created_at, {more}) " \
          "SELECT 'a', task_id, 1, 'w', 't', 1, {values} FROM htm_tasks WHERE " + QUEUED  # fmt: skip
WORKER = "INSERT INTO workers VALUES ('w', '{kind}', 1, '/l', 'b', 1, '{state}', 1, 1, {stopped}, NULL)"
METRICS = "INSERT INTO htm_metrics (level, starts_at, task_type, domain, imported, completed, failed, timed_out, cancelled, sla_met, sla_missed, " \
          "retried, runs, queue_ms, execution_ms, total_ms, buffers, buffer_ms) " \
          "VALUES ('{level}', 0, '', '', {imported}, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)"  # fmt: skip
CHECKS = {
    "handler_name": "UPDATE handlers SET name = ''",
    "handler_argv": "UPDATE handlers SET argv = '[]', external = 0",
    "handler_env": "UPDATE handlers SET env = '{'",
    "handler_secrets": "UPDATE handlers SET secrets = '['",
    "handler_external": "UPDATE handlers SET external = 2",
    "handler_paused": "UPDATE handlers SET paused = 2",
    "handler_sla": "UPDATE handlers SET sla_ms = 0",
    "handler_adapted_sla": "UPDATE handlers SET adapted_sla_ms = 0",
    "handler_timeout": "UPDATE handlers SET timeout_ms = 0",
    "handler_kill_after": "UPDATE handlers SET kill_after_ms = 0",
    "handler_attempts": "UPDATE handlers SET max_attempts = 0",
    "handler_recoveries": "UPDATE handlers SET max_recoveries = -1",
    "handler_backoff": "UPDATE handlers SET backoff_ms = 0",
    "handler_concurrency": "UPDATE handlers SET concurrency = 0",
    "handler_warn_at": "UPDATE handlers SET warn_at = 1.1",
    "handler_critical_at": "UPDATE handlers SET critical_at = 0.9",
    "handler_on_critical": "UPDATE handlers SET on_critical = 'panic'",
    "handler_has_command_or_is_external": "UPDATE handlers SET external = 0",
    "intent_id_length": "UPDATE intent_records SET intent_id = ''",
    "intent_goal": "UPDATE intent_records SET goal = ''",
    "intent_priority": "UPDATE intent_records SET priority = 'urgent'",
    "intent_status": "DROP TRIGGER intent_transition; UPDATE intent_records SET status = 'sleeping'",
    "intent_sla": "UPDATE intent_records SET sla_ms = 0",
    "intent_sla_met": "UPDATE intent_records SET sla_met = 2",
    "intent_success": "UPDATE intent_records SET success = 2",
    "intent_confidence": "UPDATE intent_records SET confidence = 1.1",
    "intent_risk": "UPDATE intent_records SET risk_level = 'none'",
    "intent_context": "UPDATE intent_records SET context = '{a: 1}'",
    "intent_result": "UPDATE intent_records SET result = 'done'",
    "intent_learned_from": "UPDATE intent_records SET learned_from = 2",
    "intent_final_has_end": "UPDATE intent_records SET completed_at = 1 WHERE intent_id = 'queued'",
    "intent_success_is_completed": "UPDATE intent_records SET success = 1 WHERE intent_id = 'queued'",
    "task_goal": "UPDATE htm_tasks SET goal = ''",
    "task_payload": "UPDATE htm_tasks SET payload = ''",
    "task_status": "DROP TRIGGER task_transition; DROP TRIGGER task_final_stays; UPDATE htm_tasks SET status = 'sleeping'",
    "task_priority": "UPDATE htm_tasks SET priority = 'urgent'",
    "task_sla": "UPDATE htm_tasks SET sla_ms = 0",
    "task_warn_at": "UPDATE htm_tasks SET warn_at = 0",
    "task_critical_at": "UPDATE htm_tasks SET critical_at = 0",
    "task_sla_met": f"UPDATE htm_tasks SET sla_met = 2 WHERE {QUEUED}",
    "task_timeout": "UPDATE htm_tasks SET timeout_ms = 0",
    "task_max_attempts": "UPDATE htm_tasks SET max_attempts = 0",
    "task_attempt_number": f"UPDATE htm_tasks SET attempt_number = -1 WHERE {QUEUED}",
    "task_recoveries": "UPDATE htm_tasks SET recoveries = -1",
    "task_deaths": "UPDATE htm_tasks SET deaths = -1",
    "task_queue_time": "UPDATE htm_tasks SET queue_time_ms = -1",
    "task_execution_time": "UPDATE htm_tasks SET execution_time_ms = -1",
    "task_total_time": "UPDATE htm_tasks SET total_time_ms = -1",
    "task_progress": "UPDATE htm_tasks SET progress = 'half'",
    "task_result": f"UPDATE htm_tasks SET result = '{{' WHERE {QUEUED}",
    "task_final_has_end": f"UPDATE htm_tasks SET finished_at = 1, next_at = NULL WHERE {QUEUED}",
    "task_owned_when_active": f"UPDATE htm_tasks SET attempt_id = 'a', assigned_worker = 'w' WHERE {QUEUED}",
    "task_active_has_worker": f"UPDATE htm_tasks SET assigned_worker = NULL WHERE {RUNNING}",
    "task_final_has_no_next_step": f"UPDATE htm_tasks SET next_at = 1 WHERE {COMPLETED}",
    "task_sla_has_deadline": "UPDATE htm_tasks SET sla_deadline = NULL",
    "task_rescue_has_parent": "UPDATE htm_tasks SET task_type = 'rescue'",
    "attempt_lease": ATTEMPT.format(more="lease_ms", values=0),
    "attempt_outcome": ATTEMPT.format(more="finished_at, outcome", values="1, 'vanished'"),
    "attempt_end_has_outcome": ATTEMPT.format(more="outcome", values="'completed'"),
    "outcome_success": "INSERT INTO outcome_records (task_id, action_type, domain, success, context, created_at) VALUES ('t', 'a', 'd', 2, '{}', 1)",
    "outcome_context": "INSERT INTO outcome_records (task_id, action_type, domain, success, context, created_at) VALUES ('t', 'a', 'd', 1, '{', 1)",
    "event_topic": "INSERT INTO events (topic, source, created_at, payload) VALUES ('', 's', 1, '{}')",
    "event_payload": "INSERT INTO events (topic, source, created_at, payload) VALUES ('a.b', 's', 1, 'text')",
    "outcome_imported": "INSERT INTO outcome_records (task_id, action_type, domain, success, context, created_at, imported) "
                        "VALUES ('t', 'a', 'd', 1, '{}', 1, 2)",
    "metrics_level": METRICS.format(level="week", imported=0),
    "metrics_imported": METRICS.format(level="day", imported=2),
    "durations_level": "INSERT INTO htm_durations (level, starts_at, task_type, domain, imported, bucket, n) VALUES ('week', 0, '', '', 0, 1, 1)",
    "durations_imported": "INSERT INTO htm_durations (level, starts_at, task_type, domain, imported, bucket, n) VALUES ('day', 0, '', '', 2, 1, 1)",
    "histograms_level": "INSERT INTO htm_histograms VALUES ('day', 0, '', '', '[1, 1]', 1, 1.0, 1)",
    "histograms_histogram": "INSERT INTO htm_histograms VALUES ('ever', 0, 'work', '', '[[', 1, 1.0, 1)",
    "tally_kind": "INSERT INTO outcome_tallies VALUES (0, 'work', 'd', 'mood', 'good', 1, 1, 1, 1)",
    "suspension_length": "INSERT INTO suspensions (woke_at, asleep_ms) VALUES (1, 0)",
    "forecast_runs": "INSERT INTO handler_forecasts (handler, runs, histogram, completed, made_at) VALUES ('h', -1, '[]', 0, 1)",
    "forecast_histogram": "INSERT INTO handler_forecasts (handler, runs, histogram, completed, made_at) VALUES ('h', 0, '[', 0, 1)",
    "forecast_has_figures": "INSERT INTO handler_forecasts (handler, runs, histogram, completed, made_at) VALUES ('h', 12, '[[1, 12]]', 0, 1)",
    "worker_handlers": WORKER.format(kind="daemon", state="running", stopped="NULL").replace("NULL, NULL)", "NULL, '[]')"),
    "worker_kind": WORKER.format(kind="person", state="running", stopped="NULL"),
    "worker_state": WORKER.format(kind="daemon", state="asleep", stopped="NULL"),
    "worker_stop_has_instant": WORKER.format(kind="daemon", state="stopped", stopped="NULL"),
    "audit_seq": "DROP TRIGGER audit_grows_by_one; " + LEAF.format(seq=0),
    "audit_leaf": LEAF.format(seq=3).replace("'{}'", "'{'"),
    "audit_hash": LEAF.format(seq=3).replace("(32)", "(31)"),
    "anchor_document": "INSERT INTO audit_anchors VALUES (2, '{', zeroblob(64))",
    "anchor_signature": "INSERT INTO audit_anchors VALUES (2, '{}', zeroblob(63))",
    "rules_number": "DROP TRIGGER rules_grow_by_one; INSERT INTO governance_rules VALUES (0, '{}', zeroblob(64))",
    "rules_document": "INSERT INTO governance_rules VALUES (2, '{', zeroblob(64))",
    "rules_signature": "INSERT INTO governance_rules VALUES (2, '{}', zeroblob(65))",
    "roster_number": "DROP TRIGGER roster_grows_by_one; INSERT INTO vault_rosters VALUES (0, '{}', zeroblob(64))",
    "roster_document": "INSERT INTO vault_rosters VALUES (2, '{', zeroblob(64))",
    "roster_signature": "INSERT INTO vault_rosters VALUES (2, '{}', zeroblob(65))",
    "secret_key_length": ENTRY.format(key="", version=1),
    "secret_version": ENTRY.format(key="other", version=0),
    "secret_header": ENTRY.format(key="other", version=1).replace("'{}'", "'{'"),
    "secret_sealed_hash": ENTRY.format(key="other", version=1).replace("(32)", "(31)"),
    "secret_signature": ENTRY.format(key="other", version=1).replace("(64)", "(63)"),
    "secret_removed_is_empty": "UPDATE secret_entries SET sealed = NULL",
    "share_group": "UPDATE secret_shares SET group_name = 'boss'",
    "share_index": "UPDATE secret_shares SET share_index = 0",
    "consent_status": "DROP TRIGGER consent_transition; UPDATE secret_consent_records SET consent_status = 'maybe'",
    "consent_mode": "DROP TRIGGER consent_stays; UPDATE secret_consent_records SET mode = 'always'",
    "consent_request": "DROP TRIGGER consent_stays; UPDATE secret_consent_records SET request = '{'",
    "consent_method": "UPDATE secret_consent_records SET approval_method = 'guess'",
    "delegation_document": "INSERT INTO secret_delegations VALUES (2, 'key', '{', zeroblob(64), x'00', 1)",
    "delegation_signature": "INSERT INTO secret_delegations VALUES (2, 'key', '{}', zeroblob(63), x'00', 1)",
    "standing_signature": "INSERT INTO standing_parts VALUES ('pending', 1, 'user', 'a', x'00', zeroblob(63))",
    "consent_approved_has_end": "UPDATE secret_consent_records SET consent_status = 'approved', grant_expires_at = NULL",
    "consent_many_uses_are_standing": "DROP TRIGGER consent_stays; UPDATE secret_consent_records SET mode = 'once'",
    "consent_max_uses": "DROP TRIGGER consent_stays; UPDATE secret_consent_records SET max_uses = 0",
    "consent_used": "UPDATE secret_consent_records SET used_count = 3",
    "consent_expired_reason": "UPDATE secret_consent_records SET consent_status = 'expired', expired_reason = 'weary'",
    "consent_observed": "UPDATE secret_consent_records SET observed = '{'",
    "consent_spent_is_used": "UPDATE secret_consent_records SET used_count = 2",
    "consent_expired_has_reason": "UPDATE secret_consent_records SET consent_status = 'expired'",
    "consent_denied_has_instant": "UPDATE secret_consent_records SET consent_status = 'denied'",
    "consent_revoked_has_instant": "UPDATE secret_consent_records SET revoked_at = 1",
    "grant_group": GRANT.replace("'user', 'a'", "'machine', 'b'"),
    "grant_document": GRANT.replace("'a'", "'b'").replace("'{}'", "'{'"),
    "grant_signature": GRANT.replace("'a'", "'b'").replace("(64)", "(0)"),
}


def test_every_check_of_the_schema_is_tried_here() -> None:
    """No CHECK without a name, none without a case below."""
    text = PROSE.sub("", SCHEMA)
    named = re.findall(r"CONSTRAINT\s+(\w+)\s+CHECK", text)
    assert len(named) == len(re.findall(r"\bCHECK\b", text))
    assert sorted(named) == sorted(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_refuses_what_must_never_be(db: Path, name: str) -> None:
    """The refusal names the CHECK that was broken."""
    assert re.search(rf"CHECK constraint failed: {name}\b", refusal(db, CHECKS[name]))


# ---- triggers and unique indexes

REFUSING = {  # trigger -> (what it refuses, its words)
    "task_starts_open": (new_task(status="'failed'", finished_at="1"), "starts queued or blocked"),
    "task_transition": (f"UPDATE htm_tasks SET status = 'running', attempt_id = 'a', assigned_worker = 'w' WHERE {QUEUED}", "illegal task transition"),
    "task_final_stays": (f"UPDATE htm_tasks SET result = '2' WHERE {COMPLETED}", "a final task never changes"),
    "task_identity": ("UPDATE htm_tasks SET created_at = 1", "identity of a task never changes"),
    "intent_transition": ("UPDATE intent_records SET status = 'created' WHERE intent_id = 'queued'", "illegal intent transition"),
    "attempt_ends_once": ("UPDATE htm_task_attempts SET outcome = 'failed' WHERE outcome = 'completed'", "an attempt ends once"),
    "event_never_changes": ("UPDATE events SET topic = 'other' WHERE seq = 1", "append-only"),
    "event_never_replaced": ("INSERT OR REPLACE INTO events (seq, topic, source, created_at, payload) VALUES (1, 'a', 's', 1, '{}')", "append-only"),
    "outcome_never_replaced": ("REPLACE INTO outcome_records SELECT * FROM outcome_records", "recorded once"),
    "task_never_replaced": (new_task(task_id="(SELECT htm_task_id FROM intent_records WHERE intent_id = 'completed')").replace("INSERT", "REPLACE"),
                            "never replaced"),
    "attempt_never_replaced": ("REPLACE INTO htm_task_attempts SELECT * FROM htm_task_attempts WHERE outcome = 'completed'", "never replaced"),
    "event_leaves_below_floor": ("DELETE FROM events WHERE seq = 1", "append-only above the retention floor"),
    "outcome_never_changes": ("UPDATE outcome_records SET success = 0", "recorded once"),
    "audit_never_changes": ("UPDATE audit_log SET leaf = '{\"a\":1}' WHERE seq = 1", "append-only"),
    "audit_never_shrinks": ("DELETE FROM audit_log WHERE seq = 2", "append-only"),
    "audit_grows_by_one": (LEAF.format(seq=4), "grows by one leaf at its end"),
    "anchor_never_changes": ("UPDATE audit_anchors SET document = '{\"a\":1}'", "append-only"),
    "anchor_never_deleted": ("DELETE FROM audit_anchors", "append-only"),
    "anchor_never_replaced": ("REPLACE INTO audit_anchors VALUES (1, '{\"a\":1}', zeroblob(64))", "append-only"),
    "rules_never_change": ("UPDATE governance_rules SET document = '{\"a\":1}'", "append-only"),
    "rules_never_deleted": ("DELETE FROM governance_rules", "append-only"),
    "rules_grow_by_one": ("REPLACE INTO governance_rules VALUES (1, '{\"a\":1}', zeroblob(64))", "grow by one at their end"),
    "roster_never_changes": ("UPDATE vault_rosters SET document = '{\"a\":1}'", "append-only"),
    "roster_never_deleted": ("DELETE FROM vault_rosters", "append-only"),
    "roster_grows_by_one": ("REPLACE INTO vault_rosters VALUES (1, '{\"a\":1}', zeroblob(64))", "grow by one at their end"),
    "secret_stays": ("UPDATE secret_entries SET header = '{\"a\":1}'", "a version of a secret never changes"),
    "delegation_stays": ("UPDATE secret_delegations SET document = '{\"a\":1}'", "a delegation never changes"),
    "delegation_never_refilled": ("UPDATE secret_delegations SET private = x'01'", "only ever emptied"),
    "delegation_never_deleted": ("DELETE FROM secret_delegations", "never deleted"),
    "delegation_never_replaced": ("REPLACE INTO secret_delegations VALUES (1, 'key', '{\"a\":1}', zeroblob(64), x'00', 1)", "never changes"),
    "secret_never_deleted": ("DELETE FROM secret_entries", "the header of a secret stays"),
    "secret_never_refilled": ("UPDATE secret_entries SET sealed = x'01'", "only ever emptied"),
    "secret_never_replaced": (ENTRY.format(key="key", version=1).replace("INSERT", "REPLACE"), "only gets newer versions"),
    "consent_starts_pending": (CONSENT.format(id="new", status="approved", used=0), "a consent starts pending"),
    "consent_transition": ("UPDATE secret_consent_records SET consent_status = 'used', used_count = 2", "illegal consent transition"),
    "consent_stays": ("UPDATE secret_consent_records SET request = '{\"a\":1}'", "what was asked never changes"),
    "consent_uses_only_grow": ("UPDATE secret_consent_records SET used_count = 1; UPDATE secret_consent_records SET used_count = 0",
                               "cannot be taken back"),
    "consent_never_deleted": ("DELETE FROM secret_consent_records", "never deleted"),
    "consent_never_replaced": (CONSENT.format(id="pending", status="pending", used=0).replace("INSERT", "REPLACE"), "never replaced"),
    "grant_stays": ("UPDATE consent_grants SET signature = randomblob(64)", "a grant never changes"),
    "grant_never_refilled": ("UPDATE consent_grants SET wrap = x'01'", "only ever emptied"),
    "grant_never_deleted": ("DELETE FROM consent_grants", "never deleted"),
    "grant_never_replaced": (GRANT.replace("INSERT", "REPLACE"), "never replaced"),
}  # fmt: skip
SUSPECTS = "SELECT task_id, intent_id FROM bridge_suspects"
EVENT = "SELECT topic, source, created_at, json(payload) AS payload FROM events ORDER BY seq DESC LIMIT 1"
RECORDING = {  # trigger -> (what it records, where that is seen, what is seen at least)
    "task_created": (new_task(intent_id="'queued'"),
                     EVENT, {"topic": "htm.task.created", "source": "me", "created_at": 777, "task_id": "t", "intent_id": "queued", "status": "queued"}),
    "task_changed": (f"UPDATE htm_tasks SET status = 'blocked', reason = 'a whim', updated_at = 777, updated_by = 'me' WHERE {QUEUED}",
                     EVENT, {"topic": "htm.task.update", "source": "me", "created_at": 777, "previous_status": "queued", "reason": "a whim"}),
    "task_recovered": (f"UPDATE htm_tasks SET recoveries = 1, updated_at = 777, updated_by = 'me' WHERE {RUNNING}",
                       EVENT, {"topic": "htm.task.recovered", "source": "me", "created_at": 777, "recoveries": 1, "lost_worker": "w"}),
    "task_reprioritised": (f"UPDATE htm_tasks SET priority = 'critical', priority_reason = 'a whim', updated_at = 777, updated_by = 'me' WHERE {QUEUED}",
                           EVENT, {"topic": "htm.task.update", "created_at": 777, "previous_priority": "normal", "priority": "critical", "reason": "a whim"}),
    "task_set_aside": (f"UPDATE htm_tasks SET set_aside = 'odd', updated_at = 777, updated_by = 'me' WHERE {QUEUED}",
                       EVENT, {"topic": "htm.task.invalid", "source": "me", "created_at": 777, "reason": "odd"}),
    "task_without_intent": (new_task(), SUSPECTS, {"task_id": "t", "intent_id": None}),
    "task_unlinked": (f"UPDATE htm_tasks SET intent_id = NULL WHERE {QUEUED}", SUSPECTS, {"intent_id": "queued"}),
    "task_deleted": (f"DELETE FROM htm_tasks WHERE {QUEUED}", SUSPECTS, {"intent_id": "queued"}),
    "intent_without_task": ("INSERT INTO intent_records (intent_id, goal, domain, priority, status, context, created_at, created_by) "
                            "VALUES ('i', 'g', 'd', 'low', 'created', '{}', 1, 'me')", SUSPECTS, {"task_id": None, "intent_id": "i"}),
    "intent_unlinked": ("UPDATE intent_records SET htm_task_id = 'gone' WHERE intent_id = 'queued'", SUSPECTS, {"intent_id": "queued"}),
    "intent_deleted": ("DELETE FROM intent_records WHERE intent_id = 'queued'", SUSPECTS, {"intent_id": "queued"}),
}  # fmt: skip


def test_every_trigger_of_the_schema_is_tried_here() -> None:
    """None without a case, and all of them in the half that is made again."""
    names = re.findall(r"CREATE TRIGGER (\w+)", SCHEMA)
    assert sorted(names) == sorted([*REFUSING, *RECORDING])
    tables, derived = load_module().schema_halves(SCHEMA)
    assert not re.search(r"CREATE (UNIQUE )?(INDEX|TRIGGER|VIEW)", tables)
    assert "CREATE TABLE" not in derived


@pytest.mark.parametrize("name", REFUSING)
def test_a_trigger_refuses(db: Path, name: str) -> None:
    """With its words; and it is this trigger that does it, since without it the same is accepted."""
    act, words = REFUSING[name]
    assert words in refusal(db, act)
    rows(db, f"DROP TRIGGER {name}; {act}; SELECT 1")


@pytest.mark.parametrize("name", RECORDING)
def test_a_trigger_records(db: Path, name: str) -> None:
    """The fact, with the time and the actor that the statement wrote; and it is this trigger that does it."""
    act, question, expected = RECORDING[name]
    before = len(rows(db, question.replace("LIMIT 1", "")))
    found = rows(db, f"{act}; {question}")[0]
    found = {**found, **json.loads(found.get("payload", "{}"))}
    assert {key: found[key] for key in expected} == expected
    assert len(rows(db, f"DROP TRIGGER {name}; {act}; {question.replace('LIMIT 1', '')}")) < len(rows(db, f"{act}; {question.replace('LIMIT 1', '')}"))
    assert len(rows(db, f"{act}; {question.replace('LIMIT 1', '')}")) > before


def test_events_leave_only_below_the_floor_of_retention(db: Path) -> None:
    """What lies below it goes, what lies on or above it stays."""
    floor = "INSERT INTO settings VALUES ('_events_floor', '3', 1)"
    assert rows(db, f"{floor}; DELETE FROM events WHERE seq < 3; SELECT MIN(seq) AS first FROM events") == [{"first": 3}]
    assert "append-only" in refusal(db, f"{floor}; DELETE FROM events WHERE seq = 3")
    assert "append-only" in refusal(db, "UPDATE OR REPLACE events SET seq = 1 WHERE seq = 2")
    assert "append-only" in refusal(db, "REPLACE INTO events SELECT * FROM events")


@pytest.mark.parametrize("column", ["status = 'queued'", "reason = 'x'", "finished_at = finished_at + 1", "result = NULL", "sla_met = 0",
                                    "escalation_level = 3", "exit_status = 1", "attempt_number = 9"])  # fmt: skip
def test_nothing_that_counts_changes_in_a_final_task(db: Path, column: str) -> None:
    """How it ended is written once."""
    assert re.search("final task never changes|illegal task transition", refusal(db, f"UPDATE htm_tasks SET {column} WHERE {COMPLETED}"))


@pytest.mark.parametrize(("table", "which", "change"), [
    ("outcome_records", "task_id IS NOT NULL", {"seq": "NULL", "success": "0"}),
    ("htm_tasks", COMPLETED, {"seq": "NULL", "status": "'queued'", "finished_at": "NULL", "result": "NULL"}),
    ("htm_task_attempts", "outcome = 'completed'", {"outcome": "'failed'"})], ids=["outcome", "final task", "ended attempt"])  # fmt: skip
def test_history_is_not_rewritten_by_replacing_its_rows(db: Path, table: str, which: str, change: dict[str, str]) -> None:
    """INSERT OR REPLACE is no way around the triggers that guard updates."""
    columns = [row["name"] for row in rows(db, f"PRAGMA table_info({table})")]
    values = [change.get(name, name) for name in columns]
    refusal(db, f"INSERT OR REPLACE INTO {table} ({', '.join(columns)}) SELECT {', '.join(values)} FROM {table} WHERE {which}")


@pytest.mark.parametrize(("table", "column", "value"), [
    *(("secret_entries", name, value) for name, value in (("secret_key", "'x'"), ("version", "2"), ("sealed_hash", "'x'"), ("signature", "randomblob(64)"),
                                                          ("created_at", "2"))),
    *(("secret_consent_records", name, value) for name, value in (("consent_id", "'x'"), ("secret_key", "'x'"), ("secret_version", "2"), ("mode", "'once'"),
                                                                  ("max_uses", "3"), ("requested_at", "2"))),
    *(("consent_grants", name, value) for name, value in (("consent_id", "'x'"), ("group_name", "'governance'"), ("approver", "'x'"), ("document", "'[]'"),
                                                          ("wrap_hash", "NULL"))),
    ("audit_log", "hash", "hex(randomblob(32))"), ("audit_log", "seq", "seq + 10"), ("audit_anchors", "signature", "randomblob(64)"),
    ("vault_rosters", "number", "2"), ("vault_rosters", "signature", "randomblob(64)"),
    ("governance_rules", "number", "2"), ("governance_rules", "signature", "randomblob(64)")])  # fmt: skip
def test_nothing_that_was_signed_or_asked_changes(db: Path, table: str, column: str, value: str) -> None:
    """Each column that a signature or a decision rests on."""
    assert re.search("never changes|append-only", refusal(db, f"UPDATE {table} SET {column} = {value}"))


def test_a_version_and_a_grant_are_emptied_and_that_is_all(db: Path) -> None:
    """The value goes and does not come back; a newer version comes after, never an older one."""
    emptied = "UPDATE secret_entries SET sealed = NULL, removed_at = 2"
    assert rows(db, f"{emptied}; SELECT sealed, removed_at FROM secret_entries") == [{"sealed": None, "removed_at": 2}]
    assert "only ever emptied" in refusal(db, f"{emptied}; UPDATE secret_entries SET sealed = x'00', removed_at = NULL")
    assert "only gets newer versions" in refusal(db, f"{ENTRY.format(key='key', version=3)}; {ENTRY.format(key='key', version=2)}")
    assert rows(db, "UPDATE consent_grants SET wrap = NULL; SELECT wrap FROM consent_grants") == [{"wrap": None}]
    assert "only ever emptied" in refusal(db, "UPDATE consent_grants SET wrap = NULL; UPDATE consent_grants SET wrap = x'00'")


def test_a_task_has_one_open_attempt_and_a_key_one_intent(db: Path) -> None:
    """The partial unique indexes refuse a second one."""
    double = "INSERT INTO htm_task_attempts (attempt_id, task_id, attempt_number, worker_id, token, created_at) " \
             f"SELECT 'b', task_id, 1, 'w', 't', 1 FROM htm_tasks WHERE {RUNNING}"  # fmt: skip
    assert "UNIQUE constraint failed: htm_task_attempts.task_id" in refusal(db, double)
    assert "UNIQUE constraint failed: intent_records.idempotency_key" in refusal(db, "UPDATE intent_records SET idempotency_key = 'k'")


def test_an_unknown_level_of_the_ladder_is_refused_and_a_known_one_is_a_row(db: Path) -> None:
    """Levels are an open set: a row more is a level more."""
    act = f"UPDATE htm_tasks SET escalation_level = 4 WHERE {QUEUED}"
    done = shell(db, f"PRAGMA foreign_keys = ON; BEGIN; {act}; ROLLBACK;")
    assert "FOREIGN KEY constraint failed" in done.stderr
    done = shell(db, f"PRAGMA foreign_keys = ON; BEGIN; INSERT INTO sla_levels VALUES (4, 'hopeless', NULL); {act}; ROLLBACK;")
    assert (done.returncode, done.stderr) == (0, "")


# ---- transitions


def task_step(to: str) -> str:
    """The statement that leads the queued task to a status, with all that the status demands."""
    attempt = "'a'" if to in ("assigned", "running") else "NULL"
    return (f"UPDATE htm_tasks SET status = '{to}', attempt_id = {attempt}, assigned_worker = 'w', next_at = NULL, "
            f"finished_at = {777 if to in FINAL else 'NULL'}, updated_at = 777, updated_by = 'me' WHERE {QUEUED}")  # fmt: skip


def intent_step(to: str) -> str:
    return (f"UPDATE intent_records SET status = '{to}', completed_at = {777 if to in FINAL else 'NULL'}, "
            f"success = {'NULL' if to not in FINAL else int(to == 'completed')} WHERE intent_id = 'i'")  # fmt: skip


TASK_WAY = {"queued": (), "blocked": ("blocked",), "assigned": ("assigned",), "running": ("assigned", "running"),
            "completed": ("assigned", "running", "completed"), "failed": ("blocked", "failed"),
            "timeout": ("assigned", "running", "timeout"), "cancelled": ("cancelled",)}  # fmt: skip
INTENT_WAY = {"created": (), "dispatched": ("dispatched",), "executing": ("dispatched", "executing"), **{end: ("dispatched", end) for end in FINAL}}
NEW_INTENT = RECORDING["intent_without_task"][0]


def tried(db: Path, begin: str, way: tuple[str, ...], to: str, step: Any) -> str:
    """What is said to one further step after a legal way; empty when it was accepted."""
    opening = "; ".join([begin, *map(step, way)])
    rows(db, opening)
    done = shell(db, f"BEGIN; {opening}; {step(to)}; ROLLBACK;")
    return done.stderr if done.returncode else ""


@pytest.mark.parametrize("before", TASK_STATUSES)
def test_the_legal_steps_of_a_task_and_no_others(db: Path, module: Any, before: str) -> None:
    """From each status, exactly the steps of the program's own table; each leaves its event."""
    for to in TASK_STATUSES:
        answer = tried(db, "SELECT 1", TASK_WAY[before], to, task_step) if to != before else ""
        if to in module.TASK_TRANSITIONS.get(before, ()):
            assert answer == "", f"{before} to {to} was refused: {answer}"
            story = [*map(task_step, TASK_WAY[before]), task_step(to)]
            event = rows(db, f"{'; '.join(story)}; {EVENT}")[0]
            assert (event["topic"], event["source"], event["created_at"]) == (f"htm.task.{to}" if to in FINAL else "htm.task.update", "me", 777)
            assert (json.loads(event["payload"])["previous_status"], json.loads(event["payload"])["status"]) == (before, to)
        elif to != before:
            assert re.search("illegal task transition|a final task never changes", answer), f"{before} to {to}: {answer!r}"


@pytest.mark.parametrize("before", INTENT_STATUSES)
def test_the_legal_steps_of_an_intent_and_no_others(db: Path, module: Any, before: str) -> None:
    """From each status, exactly the steps of the program's own table."""
    for to in INTENT_STATUSES:
        if to != before:
            answer = tried(db, NEW_INTENT, INTENT_WAY[before], to, intent_step)
            if to in module.INTENT_TRANSITIONS.get(before, ()):
                assert answer == "", f"{before} to {to} was refused: {answer}"
            else:
                assert "illegal intent transition" in answer, f"{before} to {to}: {answer!r}"


CONSENT_STEPS = {"pending": {"approved", "denied", "expired", "revoked"}, "approved": {"used", "expired", "revoked"}}
CONSENT_WAY: dict[str, tuple[str, ...]] = {"pending": (), "approved": ("approved",), "used": ("approved", "used"), "denied": ("denied",),
                                           "expired": ("expired",), "revoked": ("revoked",)}  # fmt: skip


def consent_step(to: str) -> str:
    """The statement that leads the pending consent to a status, with all that the status demands."""
    return (f"UPDATE secret_consent_records SET consent_status = '{to}', used_count = max(used_count, {2 if to == 'used' else 0}), "
            f"denied_at = {7 if to == 'denied' else 'NULL'}, revoked_at = {7 if to == 'revoked' else 'NULL'}, "
            f"expired_reason = {chr(39) + 'unanswered' + chr(39) if to == 'expired' else 'NULL'} WHERE consent_id = 'pending'")  # fmt: skip


@pytest.mark.parametrize("before", CONSENT_WAY)
def test_the_legal_steps_of_a_consent_and_no_others(db: Path, before: str) -> None:
    """From each status: denied, expired, revoked and used are the end."""
    for to in CONSENT_WAY:
        if to != before:
            answer = tried(db, "SELECT 1", CONSENT_WAY[before], to, consent_step)
            if to in CONSENT_STEPS.get(before, ()):
                assert answer == "", f"{before} to {to} was refused: {answer}"
            else:
                assert "illegal consent transition" in answer, f"{before} to {to}: {answer!r}"


@pytest.mark.parametrize(("trigger", "table", "statuses"), [("task_transition", "TASK_TRANSITIONS", TASK_STATUSES),
                                                            ("intent_transition", "INTENT_TRANSITIONS", INTENT_STATUSES)])  # fmt: skip
def test_the_trigger_and_the_programs_table_hold_the_same_steps(db: Path, module: Any, trigger: str, table: str, statuses: tuple[str, ...]) -> None:
    """Both texts are read, and they agree word for word."""
    text = rows(db, f"SELECT sql FROM sqlite_schema WHERE name = '{trigger}'")[0]["sql"]
    written = re.findall(r"'(\w+)>(\w+)'", text)
    assert len(set(written)) == len(written)
    assert set(written) == {(before, to) for before, steps in getattr(module, table).items() for to in steps}
    assert set(written) < set(permutations(statuses, 2))


# ---- views


def test_the_views_say_what_the_tables_hold(db: Path) -> None:
    """Totals by status, depths of the queue by class, and violations with their rescue."""
    assert sorted(re.findall(r"CREATE VIEW (\w+)", SCHEMA)) == ["queue_depths", "status_totals", "violations"]
    count = "SELECT {0}, COUNT(*) AS n FROM htm_tasks {1} GROUP BY {0} ORDER BY {0}"
    assert rows(db, "SELECT * FROM status_totals WHERE n > 0 ORDER BY status") == rows(db, count.format("status", ""))
    assert rows(db, "SELECT * FROM queue_depths WHERE n > 0 ORDER BY priority") == rows(db, count.format("priority", "WHERE status = 'queued'"))
    assert rows(db, "SELECT * FROM violations") == []
    late = f"UPDATE htm_tasks SET escalation_level = 2 WHERE {QUEUED}"
    rescue = new_task(task_id="'r'", task_type="'rescue'", parent_task_id="(SELECT htm_task_id FROM intent_records WHERE intent_id = 'queued')")
    found = rows(db, f"{late}; {rescue}; SELECT intent_id, level, status, rescue_task_id, task_id = (SELECT htm_task_id FROM intent_records "
                     "WHERE intent_id = 'queued') AS same FROM violations")  # fmt: skip
    assert found == [{"intent_id": "queued", "level": "violated", "status": "queued", "rescue_task_id": "r", "same": 1}]


# ---- upgrades


@pytest.fixture
def old(db: Path, tmp_path: Path) -> Path:
    """A copy of the file, to be upgraded."""
    copy = tmp_path / "old.db"
    done = shell(db, f"VACUUM INTO '{copy}'")
    assert done.returncode == 0, done.stderr
    return copy


@contextlib.contextmanager
def connected(path: Path) -> Iterator[apsw.Connection]:
    con = apsw.Connection(str(path))
    try:
        yield con
    finally:
        con.close()


def upgraded(path: Path, schema: str, target: int, steps: dict[int, list[str]]) -> None:
    with connected(path) as con:
        con.pragma("foreign_keys", 1)
        load_module().upgrade(con, str(path), con.pragma("user_version"), schema, target, steps)
        assert con.pragma("foreign_keys") == 1


def contents(path: Path) -> str:
    """All of a file as text, its version included."""
    done = subprocess.run(["sqlite3", str(path), "PRAGMA application_id", "PRAGMA user_version", ".dump"], capture_output=True, text=True, check=True)
    assert "the goal queued" in done.stdout
    return done.stdout


ADD_COLUMN = "ALTER TABLE handlers ADD COLUMN note TEXT;"
NEXT_SCHEMA = SCHEMA.replace("CREATE VIEW queue_depths", "CREATE VIEW depths") + "\nCREATE INDEX handler_note ON handlers (note);\n"


def test_an_upgrade_takes_all_its_steps_and_makes_the_derived_half_again(old: Path) -> None:
    """Data stays, indexes and views are those of the new text, triggers guard as before, the version is the new one."""
    tasks = rows(old, "SELECT * FROM htm_tasks ORDER BY seq")
    upgraded(old, NEXT_SCHEMA, 3, {2: [ADD_COLUMN], 3: ["UPDATE handlers SET note = 'seen';", "CREATE TABLE extra (n INTEGER) STRICT;"]})
    assert rows(old, "SELECT * FROM htm_tasks ORDER BY seq") == tasks
    assert rows(old, "SELECT name, note FROM handlers") == [{"name": "work", "note": "seen"}]
    assert rows(old, "PRAGMA user_version") == [{"user_version": 3}]
    names = {row["name"] for row in rows(old, "SELECT name FROM sqlite_schema WHERE type IN ('index', 'view', 'trigger')")}
    assert {"handler_note", "depths", "task_transition", "task_claim_order"} < names
    assert "queue_depths" not in names
    assert "illegal task transition" in refusal(old, REFUSING["task_transition"][0])
    assert rows(old, "PRAGMA integrity_check") == [{"integrity_check": "ok"}]
    assert not Path(f"{old}-before-3").exists(), "nothing was rewritten, so no backup was due"


@pytest.mark.parametrize(("schema", "steps"), [
    (SCHEMA, [ADD_COLUMN, "INSERT INTO nowhere VALUES (1);"]), (SCHEMA, [ADD_COLUMN, "UPDATE handlers SET name = '';"]),
    (SCHEMA, [ADD_COLUMN, "UPDATE htm_tasks SET intent_id = 'gone';"]), (SCHEMA + "\nCREATE INDEX broken ON nowhere (n);", [ADD_COLUMN]),
    (SCHEMA + "\nCREATE VIEW unfinished AS SELECT 1", [ADD_COLUMN]), (SCHEMA.replace("= DERIVED", "= REST"), [ADD_COLUMN])],
    ids=["no such table", "a CHECK", "a broken link", "derived half fails", "no end", "no halves"])  # fmt: skip
def test_an_upgrade_that_fails_leaves_the_file_as_it_was(old: Path, module: Any, schema: str, steps: list[str]) -> None:
    """Whichever part of it fails."""
    before = contents(old)
    with pytest.raises((apsw.Error, module.GraceError)):
        upgraded(old, schema, 2, {2: steps})
    assert contents(old) == before
    assert rows(old, "PRAGMA foreign_key_check") == []


def test_a_step_that_rewrites_a_table_makes_a_backup_first(old: Path) -> None:
    """A private, whole copy of the old version beside the file; the rewritten table's links are kept."""
    before = contents(old)
    table = re.search(r"CREATE TABLE intent_records \(.*?\) STRICT;", SCHEMA, re.DOTALL)
    assert table is not None
    steps = [table[0].replace("intent_records", "rewritten"), "INSERT INTO rewritten SELECT * FROM intent_records;", "DROP TABLE intent_records;",
             "ALTER TABLE rewritten RENAME TO intent_records;"]  # fmt: skip
    attempts = rows(old, "SELECT * FROM htm_task_attempts")
    upgraded(old, SCHEMA, 2, {2: steps})
    copy = Path(f"{old}-before-2")
    assert contents(copy) == before
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert rows(old, "SELECT COUNT(*) AS n FROM intent_records JOIN htm_tasks USING (intent_id)") == [{"n": 4}]
    assert rows(old, "SELECT * FROM htm_task_attempts") == attempts


def test_a_file_that_is_up_to_date_is_left_alone(old: Path, module: Any) -> None:
    """Another process may have been faster."""
    before = contents(old)
    upgraded(old, NEXT_SCHEMA, module.SCHEMA_VERSION, {})
    assert contents(old) == before


NEWER = f"import sys; import grace.grace as g; g.SCHEMA_VERSION = 2; g.MIGRATIONS = {{2: ['{ADD_COLUMN}']}}; sys.exit(g.call(sys.argv[1:]))"


def test_a_newer_program_upgrades_on_opening_once_and_an_older_one_refuses_then(db: Path, old: Path) -> None:
    """Six at once: all succeed, one of them adds the column; the older program names both versions and touches nothing."""
    place = Place(old.parent)
    shutil.copy(old, place.db)
    command = [sys.executable, "-P", "-c", NEWER, "submit-intent", "a goal", "--handler", "work"]
    crowd = [subprocess.Popen(command, env=place.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(6)]
    ends = [(process.communicate(timeout=LIMIT), process.returncode) for process in crowd]
    assert [(err.decode(), status) for (_, err), status in ends] == [("", 0)] * 6
    assert rows(place.db, "SELECT COUNT(*) AS n FROM htm_tasks") == [{"n": 10}]
    before = contents(place.db)
    for words in (["status"], ["submit-intent", "another goal", "--handler", "work"], ["--json", "task", "list"]):
        done = place.call(*words)
        assert (done.status, done.out) == (8, "")
        assert re.search(r"\b2\b.*\b1\b", done.err.replace(str(place.db), ""))
    assert place.call("--json", "status").error["code"] == "database"
    assert contents(place.db) == before
