"""Consent from asking to use, and attacks on it: what is released is only what was approved, once, and the log says so.

Requests, answers and uses go through the real command and real processes, or through the program's own functions on the
real file. The attacker edits that file with all triggers out of his way. (With apsw, since this process uses it too: two
SQLite libraries in one process would undo each other's locks.)
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import hashlib
import json
import multiprocessing
import os
import random
import re
import select
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest

from tests.conftest import GRACE, LIMIT, Place, Result, until
from tests.test_cli import Terminal

Row = dict[str, Any]
PEOPLE = {"anna": ("user", "governance"), "test_user": ("user",), "gov": ("governance",), "ben": ("user", "governance")}
VALUES = {"test_api_key": b"TEST-value-7hq20-canary", "low": b"LOW-value-1zt55-canary", "high": b"HIGH-value-6ry83-canary",
          "critical": b"CRITICAL-value-0pk47-canary", "pair": b"PAIR-value-4mv19-canary"}  # fmt: skip
CONSENT_KEYS = set("""consent_id secret_key secret_version secret_type service requested_by requested_for requested_action user_id risk_level mode code
    consent_status single_use used_count max_uses governance_approval_required governance_approved approvals requested_at expires_at approved_at denied_at
    revoked_at grant_expires_at expired_reason approval_method denial_reason revocation_reason context observed""".split())  # noqa: SIM905
REQUEST_EVENT_KEYS = set("""consent_id secret_key secret_type service requested_by requested_for requested_action user_id risk_level context
    expires_in_seconds prompt_message""".split())  # noqa: SIM905
INSTANT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
FORCE = "UPDATE secret_consent_records SET consent_status = 'approved', approved_at = 1, grant_expires_at = 9000000000000 WHERE consent_id = :id"
UNLOCKED: dict[tuple[str, str], Any] = {}  # by vault and name, since every copy of a vault has the same keys
STATES = "SELECT consent_id, consent_status, used_count FROM secret_consent_records"
FORK = multiprocessing.get_context("fork")


# ---- the world that the tests share, and copies of it


def word_file(folder: Path, name: str) -> str:
    """The file with an approver's passphrase."""
    path = folder / f"{name}.word"
    if not path.exists():
        path.write_text(f"the sentence of {name}\n")
        path.chmod(0o600)
    return str(path)


def copy_rows(source: Path, target: Path) -> None:
    """A consistent copy of a database in one file, as a backup program makes it."""
    with contextlib.closing(apsw.Connection(str(source))) as old, contextlib.closing(apsw.Connection(str(target))) as new:
        with new.backup("main", old, "main") as work:
            work.step()
        new.pragma("journal_mode", "wal")
    target.chmod(0o600)


def copied(source: Place, folder: Path) -> Place:
    """The same vault, database and key files, to be changed at will."""
    folder.mkdir(mode=0o700, exist_ok=True)
    shutil.copytree(source.folder / ".config", folder / ".config")
    for file in source.folder.glob("*.word"):
        shutil.copy2(file, folder)
    copy_rows(source.db, folder / "grace.db")
    return Place(folder)


class World:
    """One vault: its place for real commands, and the program's own functions on the same file."""

    def __init__(self, place: Place, module: Any):
        self.place, self.m = place, module
        self.db = place.db
        self.people: dict[str, Any] = {}
        self._stores: list[Any] = []

    # -- functions in this process

    @property
    def store(self) -> Any:
        if not self._stores:
            self._stores.append(self.m.Store(str(self.db), "test"))
        return self._stores[0]

    def vault(self) -> Any:
        """The vault as a command that starts now sees it."""
        with self.m.refusals(self.store, "vault", plain=False):
            return self.m.Vault(self.store)

    def close(self) -> None:
        for store in self._stores:
            store.close()
        self._stores.clear()

    def ask(self, key: str = "test_api_key", action: str = "test_action", mode: str = "once", by: str | None = "tester", user: str | None = None,
            risk: str | None = None, ms: int = 60_000, purpose: str = "a test", program: str | None = None) -> Any:  # fmt: skip
        """A request of this process, filed as the commands file it."""
        spec = self.m.ask_spec(key, action, purpose, by, user, risk, "{}", ms, mode)
        spec["reported"]["exe"] = program or spec["reported"]["exe"]
        return self.m.ask_for(self.vault(), spec)

    def person(self, name: str) -> Any:
        """An unlocked approver, who has seen what his record says in this copy; stretching the passphrase is done once for all copies."""
        if name not in self.people:
            vault, key = self.vault(), (self.db.parent.name, name)
            path = os.path.join(vault.folder, f"{name}.seen")
            if key not in UNLOCKED:
                UNLOCKED[key] = self.m.unlock(vault, name, word_file(self.place.folder, name))
            person = copy.copy(UNLOCKED[key])
            person.seen = self.m.Seen.of(path, vault.id, name, UNLOCKED[key].seen.key)
            self.people[name] = person.meet(self.store.all(self.m.ROSTERS))
        return self.people[name]

    def review(self, consent_id: str, name: str) -> tuple[Any, Any]:
        row = self.m.still_pending(self.m.get_consent(self.store, consent_id), self.m.clock())
        review, seen = self.m.judge(self.vault(), self.person(name), row)
        return review, seen

    def approve(self, consent_id: str, name: str, group: str | None = None) -> Row:
        """An approval as `consent approve` makes it; the consent's row afterwards."""
        review, seen = self.review(consent_id, name)
        row: Row = self.m.sign_and_record(self.vault(), review, review.groups(group), seen, None, word_file(self.place.folder, name))
        return row

    def collect(self, consent_id: str) -> bytes:
        return bytes(self.m.redeem(self.vault(), consent_id, None, None))

    def row(self, consent_id: str) -> Row:
        row: Row = self.m.get_consent(self.store, consent_id)
        return row

    def status(self, consent_id: str) -> str:
        return str(self.row(consent_id)["consent_status"])

    def leaves(self, subject: str | None = None) -> list[Row]:
        rows = [json.loads(row["leaf"]) for row in self.store.all("SELECT leaf FROM audit_log ORDER BY seq")]
        return [leaf for leaf in rows if subject in (None, leaf["subject"])]

    def kinds(self, subject: str | None = None) -> list[str]:
        return [leaf["kind"] for leaf in self.leaves(subject)]

    # -- commands

    def call(self, *words: str, stdin: bytes | None = None, env: dict[str, str] | None = None) -> Result:
        """What `grace WORDS…` does, in a process of its own that is forked off this one: the program need not be loaded again."""
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            given.write(stdin or b"")
            given.seek(0)
            pid = os.fork()
            if pid == 0:
                self._become(list(words), [given.fileno(), out.fileno(), err.fileno()], {**self.place.environment, **(env or {})})
            if not select.select([watched := os.pidfd_open(pid)], [], [], LIMIT)[0]:
                os.kill(pid, signal.SIGKILL)
            os.close(watched)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            texts = [(file.seek(0), file.read())[1] for file in (out, err)]
        return Result(subprocess.CompletedProcess(words, status, *texts))

    def _become(self, words: list[str], files: list[int], environment: dict[str, str]) -> None:
        status = 70
        try:
            for target, fd in enumerate(files):
                os.dup2(fd, target)
            sys.stdin, sys.stdout, sys.stderr = open(0, closefd=False), open(1, "w", closefd=False), open(2, "w", closefd=False)
            os.environ.clear()
            os.environ.update(environment)
            os.chdir(self.place.folder)
            self.m._last_id[:] = 0, "", 0
            sys.argv = ["grace", *words]
            status = self.m.call(words)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)

    def ok(self, *words: str, stdin: bytes | None = None) -> Result:
        done = self.call(*words, stdin=stdin)
        assert done.status == 0, f"grace {' '.join(words)} ended {done.status}: {done.err}"
        return done

    def json(self, *words: str, stdin: bytes | None = None) -> Any:
        return self.ok("--json", *words, stdin=stdin).json

    def as_(self, name: str) -> tuple[str, ...]:
        return "--approver", name, "--passphrase-file", word_file(self.place.folder, name)

    def get(self, key: str, *words: str, action: str = "test_action") -> subprocess.Popen[bytes]:
        """`secret get` in the background."""
        return self.place.start("secret", "get", key, "--action", action, "--for", "a test", *words)

    def pending(self, number: int = 1) -> list[str]:
        """The ids of the pending requests, oldest first, once there are so many."""
        query = "SELECT consent_id FROM secret_consent_records WHERE consent_status = 'pending' ORDER BY seq"
        rows = until(lambda: len(found := self.store.all(query)) >= number and found, f"{number} pending requests")
        return [row["consent_id"] for row in rows]

    def fetch(self, sql: str, *params: Any) -> list[tuple[Any, ...]]:
        return list(self.store.con.execute(sql, params))

    def attack(self, *statements: str, **params: Any) -> None:
        """Edit rows with all triggers and checks out of the way; the triggers are there again afterwards."""
        with contextlib.closing(apsw.Connection(str(self.db))) as con:
            con.set_busy_timeout(20_000)
            con.execute("PRAGMA ignore_check_constraints = ON")
            con.execute("BEGIN IMMEDIATE")
            triggers = con.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'").fetchall()
            for name, _ in triggers:
                con.execute(f"DROP TRIGGER {name}")
            for text in statements:
                con.execute(text, params)
            for _, text in triggers:
                con.execute(text)
            con.execute("COMMIT")


def end_of(process: subprocess.Popen[bytes]) -> tuple[int, bytes, str]:
    """Status, stdout and stderr of a process in the background."""
    out, err = process.communicate(timeout=LIMIT)
    return process.returncode, out, err.decode(errors="replace")


@pytest.fixture(scope="module")
def team_ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Four approvers and five secrets."""
    place = Place(tmp_path_factory.mktemp("team"))
    place.ok("config", "set", "vault.argon2_memory", "67108864")
    place.ok("init", "--name", "anna", "--passphrase-file", word_file(place.folder, "anna"))
    for name, roles in list(PEOPLE.items())[1:]:
        words = [word for role in roles for word in ("--role", role)]
        place.ok("approver", "add", name, *words, "--new-passphrase-file", word_file(place.folder, name), "--approver", "anna",
                 "--passphrase-file", word_file(place.folder, "anna"))  # fmt: skip
    more = {"test_api_key": ("--service", "test", "--type", "api_key", "--action-risk", "push=high", "--action-risk", "delete=critical"),
            "low": ("--risk", "low", "--action-risk", "push=high"), "high": ("--risk", "high"), "critical": ("--risk", "critical"),
            "pair": ("--policy", "user:2of3")}  # fmt: skip
    for key, words in more.items():
        signer = () if key == "low" else ("--owner", "anna", "--passphrase-file", word_file(place.folder, "anna"))
        place.ok("secret", "set", key, *words, *signer, stdin=VALUES[key])
    yield place
    place.close()


@pytest.fixture(scope="module")
def solo_ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One person who is all approvers, with a medium and a high secret."""
    place = Place(tmp_path_factory.mktemp("solo"))
    place.ok("config", "set", "vault.argon2_memory", "67108864")
    place.ok("init", "--name", "anna", "--passphrase-file", word_file(place.folder, "anna"))
    for key, risk in (("test_api_key", "medium"), ("high", "high")):
        place.ok("secret", "set", key, "--risk", risk, "--owner", "anna", "--passphrase-file", word_file(place.folder, "anna"), stdin=VALUES[key])
    yield place
    place.close()


def made(ground: Place, folder: Path, module: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    place = copied(ground, folder)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    world = World(place, module)
    yield world
    world.close()
    place.close()


@pytest.fixture
def team(team_ground: Place, tmp_path: Path, module: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A copy of the team's vault; functions called in this process find its keys."""
    yield from made(team_ground, tmp_path / "team", module, monkeypatch)


@pytest.fixture
def solo(solo_ground: Place, tmp_path: Path, module: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A copy of the vault of one person."""
    yield from made(solo_ground, tmp_path / "solo", module, monkeypatch)


def refused(world: World, act: Callable[[], Any], exit_code: int = 5) -> str:
    """`act` is refused with that exit code, and releases nothing; what the log says of the cause, if it does."""
    before = len(world.leaves())
    with pytest.raises(world.m.GraceError) as error:
        act()
    assert error.value.exit_code == exit_code, f"{error.value.exit_code}: {error.value}"
    new = world.leaves()[before:]
    assert not any(leaf["kind"] in ("secret.used", "consent.signed", "consent.approved") for leaf in new), new
    causes = [str(leaf["facts"]["cause"]) for leaf in new if leaf["kind"] == "vault.refused"]
    return causes[-1] if causes else ""


def refused_with_cause(world: World, act: Callable[[], Any], cause: str = "") -> None:
    """Refused with exit 5, and the log holds the cause."""
    said = refused(world, act)
    assert said and cause in said, f"the log says {said!r}, not {cause!r}"


# ---- the first users' test


def test_an_approved_request_returns_the_value(team: World) -> None:
    """A request for test_api_key of the service test, approved meanwhile by test_user, returns approved and the value."""
    asking = team.get("test_api_key", "--user", "test_user", "--timeout", "5s", "--json", "--reveal")
    (consent_id,) = team.pending()
    (document,) = team.json("consent", "pending")
    facts = (document["service"], document["requested_action"], document["user_id"], document["consent_status"])
    assert facts == ("test", "test_action", "test_user", "pending")
    approved = team.json("consent", "approve", consent_id, *team.as_("test_user"))
    assert approved["consent_status"] in ("approved", "used") and [a["approver"] for a in approved["approvals"]] == ["test_user"]
    status, out, err = end_of(asking)
    assert status == 0, err
    got = json.loads(out)
    assert (got["value"], got["approval_method"], got["consent_status"]) == (VALUES["test_api_key"].decode(), "approver", "used")
    assert got["approved_at"] and set(got) >= CONSENT_KEYS


def test_an_unanswered_request_expires_and_releases_nothing(team: World) -> None:
    """Nobody answers for its time-out: exit 6, status expired, no value anywhere."""
    begin = time.monotonic()
    status, out, err = end_of(team.get("test_api_key", "--user", "test_user", "--timeout", "1s"))
    assert status == 6 and out == b"" and "expired" in err and time.monotonic() - begin >= 1
    (document,) = team.json("consent", "history")
    assert (document["consent_status"], document["expired_reason"], document["used_count"]) == ("expired", "unanswered", 0)
    assert team.kinds(document["consent_id"]) == ["consent.requested", "consent.expired"]
    assert team.call("consent", "approve", document["consent_id"], *team.as_("test_user")).status == 4


# ---- the four risks


def test_low_risk_is_automatic_and_recorded(team: World) -> None:
    """Nobody is asked; the consent, its events and its leaves are there."""
    done = team.ok("secret", "get", "low", "--action", "read", "--for", "a test")
    assert done.raw_out == VALUES["low"]
    (document,) = team.json("consent", "history")
    assert (document["consent_status"], document["approval_method"], document["risk_level"], document["used_count"]) == ("used", "auto", "low", 1)
    assert document["approvals"] == [] and document["governance_approval_required"] is False
    assert team.kinds(document["consent_id"]) == ["consent.requested", "consent.approved", "secret.used"]
    topics = [event["topic"] for event in team.place.events("secrets.consent.*")]
    assert topics == ["secrets.consent.request", "secrets.consent.approved", "secrets.consent.used"]


def test_medium_takes_the_user_alone(team: World) -> None:
    """Governance may not answer for the user; the named user may, another user may not."""
    asking = team.ask(user="test_user")
    for name in ("gov", "ben", "anna"):
        assert refused(team, lambda name=name: team.approve(asking.consent_id, name)) == ""
    assert team.approve(asking.consent_id, "test_user")["consent_status"] == "approved"
    assert asking.value() == VALUES["test_api_key"]
    assert team.kinds(asking.consent_id).count("secret.used") == 1
    assert team.kinds(asking.consent_id).count("consent.signed") == 1


@pytest.mark.parametrize("order", [("test_user", "gov"), ("gov", "test_user")])
def test_high_takes_user_and_governance_in_any_order(team: World, order: tuple[str, str]) -> None:
    """After the first signature nothing opens; after the second the value is released, once."""
    asking = team.ask("high", user="test_user")
    assert team.approve(asking.consent_id, order[0])["consent_status"] == "pending"
    assert refused(team, asking.value, 4) == ""
    document = team.m.consent_document(team.store, team.row(asking.consent_id))
    assert document["governance_approval_required"] is True and document["governance_approved"] is (order[0] == "gov")
    assert team.approve(asking.consent_id, order[1])["consent_status"] == "approved"
    assert team.m.consent_document(team.store, team.row(asking.consent_id))["governance_approved"] is True
    assert asking.value() == VALUES["high"]
    assert refused(team, asking.value, 4) == ""
    assert team.kinds(asking.consent_id).count("secret.used") == 1


def test_one_person_in_two_roles_names_the_role(solo: World) -> None:
    """At high risk `approve` without --as is a usage error; each role is signed for by itself."""
    asking = solo.get("high")
    (consent_id,) = solo.pending()
    assert solo.call("consent", "approve", consent_id, *solo.as_("anna")).status == 2
    assert solo.json("consent", "approve", consent_id, "--as", "governance", *solo.as_("anna"))["consent_status"] == "pending"
    again = solo.call("consent", "approve", consent_id, "--as", "governance", *solo.as_("anna"))
    assert again.status == 4 and again.out == ""
    solo.ok("consent", "approve", consent_id, "--as", "user", *solo.as_("anna"))
    assert end_of(asking)[:2] == (0, VALUES["high"])


def test_two_roles_are_two_people_once_there_are_two(team: World) -> None:
    """ben holds both roles, but a secret sealed when there were several people takes two of them."""
    asking = team.ask("high")
    assert refused(team, lambda: team.approve(asking.consent_id, "ben"), 2) == ""
    team.approve(asking.consent_id, "ben", "governance")
    assert refused(team, lambda: team.approve(asking.consent_id, "ben", "user")) == ""
    assert refused(team, asking.value, 4) == ""
    team.approve(asking.consent_id, "test_user")
    assert asking.value() == VALUES["high"]


def test_critical_is_for_one_waiting_process(team: World) -> None:
    """--no-wait and `consent request` are usage errors; waited for, it takes both signatures and serves once."""
    calls = (("secret", "get", "critical", "--no-wait"), ("consent", "request", "critical"),
             ("secret", "get", "test_api_key", "--risk", "critical", "--no-wait"))  # fmt: skip
    for words in calls:
        done = team.call(*words, "--action", "a", "--for", "a test")
        assert done.status == 2 and done.out == "" and "process" in done.err, done.err
    asking = team.ask("critical")
    team.approve(asking.consent_id, "gov")
    team.approve(asking.consent_id, "ben", "user")
    document = team.m.consent_document(team.store, team.row(asking.consent_id))
    assert (document["single_use"], document["max_uses"], document["mode"]) == (True, 1, "once")
    assert asking.value() == VALUES["critical"]
    assert refused(team, asking.value, 4) == ""


@pytest.mark.parametrize(("key", "action", "risk", "wanted"), [
    ("test_api_key", "test_action", None, "medium"), ("test_api_key", "push", None, "high"), ("test_api_key", "delete", None, "critical"),
    ("test_api_key", "test_action", "high", "high"), ("test_api_key", "test_action", "low", "medium"), ("test_api_key", "delete", "low", "critical"),
    ("critical", "read", "low", "critical"), ("high", "read", "critical", "critical"), ("high", "read", "medium", "high"),
])  # fmt: skip
def test_actions_and_requests_only_raise_the_risk(team: World, key: str, action: str, risk: str | None, wanted: str) -> None:
    """The highest of the secret's, the action's and the request's risk holds."""
    asking = team.ask(key, action, risk=risk)
    assert asking.request["risk"] == wanted == team.m.consent_document(team.store, team.row(asking.consent_id))["risk_level"]


def test_a_raised_medium_secret_needs_governance_too(team: World) -> None:
    """--risk high on a medium secret: the user's part opens nothing until governance has signed, which holds no part."""
    asking = team.ask(risk="high")
    assert team.approve(asking.consent_id, "test_user")["consent_status"] == "pending"
    assert refused(team, asking.value, 4) == ""
    team.attack(FORCE, id=asking.consent_id)
    refused_with_cause(team, asking.value, "governance")
    team.attack("UPDATE secret_consent_records SET consent_status = 'pending', approved_at = NULL, grant_expires_at = NULL WHERE consent_id = :id",
                id=asking.consent_id)  # fmt: skip
    team.approve(asking.consent_id, "gov")
    wraps = dict(team.fetch("SELECT group_name, wrap IS NOT NULL FROM consent_grants WHERE consent_id = ?", asking.consent_id))
    assert wraps == {"user": 1, "governance": 0}
    assert asking.value() == VALUES["test_api_key"]


def test_a_low_secret_with_a_raised_action_is_not_automatic(team: World) -> None:
    """The action makes it high: it asks, nothing is released before both have signed, and then it is."""
    asking = team.ask("low", "push")
    assert asking.opened is None and team.status(asking.consent_id) == "pending"
    assert refused(team, asking.value, 4) == ""
    team.approve(asking.consent_id, "gov")
    team.approve(asking.consent_id, "test_user")
    assert asking.value() == VALUES["low"]


def test_an_unknown_risk_counts_as_critical(team: World) -> None:
    """A word that nobody knows, on the command line a usage error, in a signed header makes a use critical."""
    assert team.call("secret", "get", "low", "--action", "a", "--for", "b", "--risk", "harmless").status == 2
    assert team.m.highest_risk("low", "harmless") == team.m.highest_risk("Low") == team.m.highest_risk() == "critical"
    vault, anna = team.vault(), team.person("anna")
    fields = {**team.m.next_header(vault.id, vault.roster, "odd", None, 1, {}, team.m.clock()), "risk": "harmless"}
    team.store.write(lambda tx: team.m.store_version(tx, team.m.seal(anna.keys, fields, b"odd value", vault.roster), "stored", anna))
    assert refused(team, lambda: team.ask("odd", mode="collect"), 2) == ""
    asking = team.ask("odd")
    assert asking.request["risk"] == "critical"
    team.approve(asking.consent_id, "test_user")
    assert refused(team, asking.value, 4) == ""
    team.approve(asking.consent_id, "gov")
    assert asking.value() == b"odd value"


# ---- answers, and what they look like


def test_deny_is_final_and_ends_the_waiting(team: World) -> None:
    """The requester exits 5 with the reason; no later approval or denial counts."""
    asking = team.get("test_api_key", "--json", "--reveal")
    (consent_id,) = team.pending()
    denied = team.json("consent", "deny", consent_id, "--reason", "not today")
    assert (denied["consent_status"], denied["denial_reason"]) == ("denied", "not today") and denied["denied_at"]
    status, out, err = end_of(asking)
    assert status == 5 and out == b"" and json.loads(err)["error"]["code"] == "denied" and "not today" in err
    for words in (("approve", consent_id, *team.as_("anna")), ("deny", consent_id, "--reason", "again"), ("withdraw", consent_id),
                  ("revoke", consent_id, "--reason", "again")):  # fmt: skip
        done = team.call("consent", *words)
        assert done.status == 4 and done.out == "", words
    waited = team.call("consent", "wait", consent_id)
    assert waited.status == 5 and waited.out == ""
    assert team.kinds(consent_id) == ["consent.requested", "consent.denied"]
    leaf = team.leaves(consent_id)[-1]
    assert leaf["facts"]["signed"] is False and leaf["facts"]["uid"] == os.geteuid()


def test_wait_tells_how_it_ended(team: World) -> None:
    """0 approved or used, 5 denied or revoked, 6 unanswered or waited in vain."""
    first, second, third, fourth = (team.ask(mode="collect", ms=60_000 if n < 3 else 400) for n in range(4))
    done = team.call("--json", "consent", "wait", first.consent_id, "--timeout", "100ms")
    assert done.status == 6 and done.json["consent_status"] == "pending"
    waiting = team.place.start("--json", "consent", "wait", first.consent_id)
    team.approve(first.consent_id, "anna")
    status, out, _ = end_of(waiting)
    assert status == 0 and json.loads(out)["consent_status"] == "approved"
    team.collect(first.consent_id)
    assert team.json("consent", "wait", first.consent_id)["consent_status"] == "used"
    team.ok("consent", "withdraw", second.consent_id)
    assert team.call("consent", "wait", second.consent_id).status == 5
    team.ok("consent", "revoke", third.consent_id, "--reason", "no")
    assert team.call("consent", "wait", third.consent_id).status == 5
    done = team.call("--json", "consent", "wait", fourth.consent_id)
    assert done.status == 6 and done.json["expired_reason"] == "unanswered"
    assert team.call("consent", "wait", "consent_none").status == 3


def test_revoke_by_secret_and_action(team: World) -> None:
    """What is open for the secret, or for one action with it, ends; other secrets' and spent consents stay."""
    one, two, other = team.ask(action="read", mode="collect"), team.ask(action="write", mode="collect"), team.ask("pair", mode="collect")
    spent = team.ask(action="write", mode="collect")
    for asking in (one, two, spent):
        team.approve(asking.consent_id, "anna")
    team.collect(spent.consent_id)
    documents = team.json("consent", "revoke", "--secret", "test_api_key", "--action", "write", "--reason", "leaked")
    assert [d["consent_id"] for d in documents] == [two.consent_id] and documents[0]["revocation_reason"] == "leaked" and documents[0]["revoked_at"]
    done = team.call("secret", "get", "test_api_key", "--action", "write", "--for", "a test", "--consent", two.consent_id)
    assert done.status == 5 and done.out == ""
    assert team.fetch("SELECT COUNT(*) FROM consent_grants WHERE consent_id = ? AND wrap IS NOT NULL", two.consent_id) == [(0,)]
    assert [d["consent_id"] for d in team.json("consent", "revoke", "--secret", "test_api_key", "--reason", "all")] == [one.consent_id]
    assert [team.status(a.consent_id) for a in (one, two, other, spent)] == ["revoked", "revoked", "pending", "used"]
    assert team.json("consent", "revoke", "--secret", "test_api_key", "--reason", "all") == []
    assert team.call("consent", "revoke", "--secret", "nothing", "--reason", "all").status == 3
    assert team.call("consent", "revoke", spent.consent_id, "--reason", "late").status == 4
    for words in ((), (one.consent_id, "--secret", "pair"), (one.consent_id, "--action", "read")):
        assert team.call("consent", "revoke", *words, "--reason", "x").status == 2


def test_withdraw_takes_back_only_what_is_pending(team: World) -> None:
    """A withdrawn request is revoked, its waiter exits 5; an approved one is not withdrawn but revoked."""
    asking = team.get("test_api_key")
    (consent_id,) = team.pending()
    assert team.json("consent", "withdraw", consent_id)["consent_status"] == "revoked"
    status, out, _ = end_of(asking)
    assert (status, out) == (5, b"")
    assert team.call("consent", "approve", consent_id, *team.as_("anna")).status == 4
    other = team.ask(mode="collect")
    team.approve(other.consent_id, "anna")
    assert team.call("consent", "withdraw", other.consent_id).status == 4
    assert team.status(other.consent_id) == "approved"


def test_an_interrupted_requester_takes_its_request_back(team: World) -> None:
    """Ctrl-C while waiting: exit 130, the request is over, and nobody can approve it."""
    asking = team.get("test_api_key")
    (consent_id,) = team.pending()
    until(lambda: Path(f"/proc/{asking.pid}/stat").read_text().rpartition(")")[2].split()[0] == "S", "it to wait")
    asking.send_signal(signal.SIGINT)
    status, out, _ = end_of(asking)
    assert (status, out) == (130, b"")
    assert team.status(consent_id) in ("revoked", "pending")
    assert team.call("consent", "approve", consent_id, *team.as_("anna")).status == 4
    assert team.json("consent", "pending") == []


def test_pending_lists_only_what_can_be_answered(team: World) -> None:
    """Not what expired, was denied, or lost its process; a collected request needs no process."""
    killed = team.get("test_api_key")
    (once_id,) = team.pending()
    collect_id = team.call("--json", "secret", "get", "test_api_key", "--action", "a", "--for", "b", "--no-wait").json["consent_id"]
    brief = team.ask(ms=1, mode="collect")
    denied = team.ask(mode="collect")
    team.ok("consent", "deny", denied.consent_id, "--reason", "no")
    assert [d["consent_id"] for d in team.json("consent", "pending")] == [once_id, collect_id]
    killed.kill()
    killed.wait()
    assert [d["consent_id"] for d in team.json("consent", "pending")] == [collect_id]
    assert team.call("consent", "approve", once_id, *team.as_("anna")).status == 4
    assert team.status(once_id) == "expired" and team.status(brief.consent_id) == "expired"
    assert team.call("consent", "export", once_id).status == 4


def test_the_shape_of_a_consent(team: World) -> None:
    """All keys of the contract, snake_case, instants in RFC 3339, one document or array on stdout."""
    asking = team.ask(mode="collect", user="test_user")
    team.approve(asking.consent_id, "test_user")
    shown = team.json("consent", "show", asking.consent_id)
    assert shown == team.json("consent", "history")[0] == team.json("consent", "show", asking.consent_id[:-1])
    assert set(shown) >= CONSENT_KEYS
    for name, value in shown.items():
        assert re.fullmatch(r"[a-z][a-z0-9_]*", name)
        if name.endswith("_at"):
            assert value is None or INSTANT.fullmatch(value), name
    assert (shown["secret_version"], shown["secret_type"], shown["service"], shown["mode"]) == (1, "api_key", "test", "collect")
    assert (shown["requested_by"], shown["requested_for"], shown["requested_action"]) == ("tester", "a test", "test_action")
    assert shown["context"] == {} and shown["single_use"] is True and (shown["used_count"], shown["max_uses"]) == (0, 1)
    assert [(a["group"], a["approver"]) for a in shown["approvals"]] == [("user", "test_user")]
    assert re.fullmatch(r"([0-9A-HJKMNP-TV-Z]{4}-){2}[0-9A-HJKMNP-TV-Z]{4}", shown["code"])
    assert shown["grant_expires_at"] > shown["approved_at"] and shown["denied_at"] is None
    verified = shown["observed"]["verified"][0]
    assert verified["requester_is_approver_uid"] is True and shown["observed"]["reported"]["pid"] == os.getpid()
    assert team.call("consent", "show", "consent_zzz").status == 3
    ids = [asking.consent_id, team.ask(mode="collect").consent_id]
    done = team.call("consent", "show", "consent_")
    assert done.status == 2 and done.out == "" and all(one in done.err for one in ids)


def test_history_and_stats(team: World) -> None:
    """History filters by secret and status, newest first; stats count what happened."""
    assert team.json("consent", "history") == [] == team.json("consent", "pending")
    assert team.json("consent", "stats")["total"] == 0
    low = [team.ask("low") for _ in range(2)]
    denied, pending = team.ask(mode="collect", by="Eve"), team.ask(mode="collect")
    team.store.write(lambda tx: team.m.deny(tx, denied.consent_id, "no"))
    assert [d["consent_id"] for d in team.json("consent", "history")] == [a.consent_id for a in (pending, denied, *low[::-1])]
    assert [d["consent_id"] for d in team.json("consent", "history", "--secret", "low", "--limit", "1")] == [low[1].consent_id]
    assert [d["consent_id"] for d in team.json("consent", "history", "--status", "denied")] == [denied.consent_id]
    stats = team.json("consent", "stats")
    assert (stats["total"], stats["automatic"]) == (4, 2)
    assert stats["by_status"] == {"pending": 1, "approved": 0, "denied": 1, "expired": 0, "revoked": 0, "used": 2}
    assert stats["by_risk"] == {"low": 2, "medium": 2, "high": 0, "critical": 0} and stats["by_secret"] == {"low": 2, "test_api_key": 2}
    assert stats["by_requester"] == {"Eve": 1, "tester": 3} and stats["median_answer_ms"] >= 0


def test_stats_show_what_is_always_answered_alike(team: World) -> None:
    """Approvals in a row of the same secret, action and requester are counted, a denial begins anew, and five of medium risk suggest a template."""
    def answered(number: int, **asking: Any) -> None:
        for _ in range(number):
            team.approve(team.ask(mode="collect", **asking).consent_id, "test_user")

    answered(2, by="rare")
    answered(4, by="job's own")
    stats = team.json("consent", "stats")
    assert [(s["requested_by"], s["approvals"]) for s in stats["streaks"]] == [("job's own", 4)] and stats["suggestions"] == []
    answered(1, by="job's own")
    stats = team.json("consent", "stats")
    (line,) = stats["suggestions"]
    assert shlex.split(line)[:4] == ["grace", "consent", "template", "add"] and shlex.split(line)[shlex.split(line).index("--by") + 1] == "job's own"
    assert "ANSWERED WITHIN" in team.ok("consent", "stats").out and line in team.ok("consent", "stats").out
    denied = team.ask(mode="collect", by="job's own")
    team.store.write(lambda tx: team.m.deny(tx, denied.consent_id, "no"))
    answered(1, by="job's own")
    assert team.json("consent", "stats")["streaks"] == []
    assert "test_api_key" in line and team.ok(*shlex.split(line)[1:], *team.as_("test_user")).status == 0


def test_events_carry_what_the_contract_names(team: World) -> None:
    """One event a step; the request's with all that a reader needs to act."""
    asking = team.get("test_api_key", "--user", "test_user", "--context", '{"branch": "main"}', "--timeout", "90s")
    (consent_id,) = team.pending()
    team.approve(consent_id, "test_user")
    assert end_of(asking)[0] == 0
    denied, revoked, brief = team.ask(mode="collect"), team.ask(mode="collect"), team.ask(mode="collect", ms=1)
    team.ok("consent", "deny", denied.consent_id, "--reason", "no")
    team.ok("consent", "revoke", revoked.consent_id, "--reason", "no")
    team.json("consent", "pending")
    events = {(e["payload"]["consent_id"], e["topic"].rpartition(".")[2]): e["payload"] for e in team.place.events("secrets.consent.*")}
    assert len(events) == len(team.place.events("secrets.consent.*")) == 9
    request = events[consent_id, "request"]
    assert set(request) >= REQUEST_EVENT_KEYS
    assert request["prompt_message"] == "Grace wants to use your test credentials to a test. Allow?"
    assert (request["expires_in_seconds"], request["context"], request["user_id"]) == (90, {"branch": "main"}, "test_user")
    assert {topic for some_id, topic in events if some_id == consent_id} == {"request", "approved", "used"}
    ends = [(denied.consent_id, "denied"), (revoked.consent_id, "revoked"), (brief.consent_id, "expired")]
    assert all(events[end]["secret_key"] == "test_api_key" for end in ends)
    assert VALUES["test_api_key"].decode() not in json.dumps(team.place.events())


def test_each_step_leaves_one_leaf(team: World) -> None:
    """Requested, shown and signed for each approver, approved, used; the log verifies afterwards."""
    asking = team.ask("high")
    team.approve(asking.consent_id, "gov")
    team.approve(asking.consent_id, "test_user")
    asking.value()
    assert team.kinds(asking.consent_id) == ["consent.requested", "consent.shown", "consent.signed", "consent.shown", "consent.signed", "consent.approved",
                                             "secret.used"]  # fmt: skip
    signed = [(leaf["facts"]["group"], leaf["facts"]["name"]) for leaf in team.leaves(asking.consent_id) if leaf["kind"] == "consent.signed"]
    assert signed == [("governance", "gov"), ("user", "test_user")]
    assert team.json("audit", "verify")["ok"] is True


# ---- left to be collected


def test_no_wait_files_the_request_and_goes(team: World) -> None:
    """Exit 75 with the consent on stdout; collected once with --consent; a second time refused."""
    done = team.call("--json", "secret", "get", "test_api_key", "--action", "a", "--for", "b", "--no-wait")
    assert done.status == 75 and done.err == "" and (done.json["consent_status"], done.json["mode"]) == ("pending", "collect")
    consent_id = done.json["consent_id"]
    words = ("secret", "get", "test_api_key", "--action", "a", "--for", "b", "--consent", consent_id)
    early = team.call(*words, "--timeout", "100ms")
    assert early.status in (4, 6) and early.out == ""
    team.approve(consent_id, "ben")
    for other in (("secret", "get", "pair", "--action", "a"), ("secret", "get", "test_api_key", "--action", "b")):
        wrong = team.call(*other, "--for", "b", "--consent", consent_id)
        assert wrong.status == 4 and wrong.out == ""
    assert team.ok(*words).raw_out == VALUES["test_api_key"]
    again = team.call(*words)
    assert again.status == 4 and again.out == ""
    assert team.call(*words, "--no-wait").status == 2
    assert team.kinds(consent_id).count("secret.used") == 1
    assert team.fetch("SELECT ephemeral FROM secret_consent_records WHERE consent_id = ?", consent_id) == [(None,)]


def test_no_wait_of_a_low_secret_answers_at_once(team: World) -> None:
    """Nothing is pending then: the value comes, exit 0."""
    assert team.ok("secret", "get", "low", "--action", "a", "--for", "b", "--no-wait").raw_out == VALUES["low"]


def test_a_request_is_filed_and_collected(team: World) -> None:
    """`consent request` prints its document; whoever collects waits for the answer."""
    document = team.json("consent", "request", "test_api_key", "--action", "a", "--for", "b")
    collector = team.place.start("secret", "get", "test_api_key", "--action", "a", "--for", "b", "--consent", document["consent_id"])
    team.approve(document["consent_id"], "ben")
    assert end_of(collector)[:2] == (0, VALUES["test_api_key"])


def test_only_its_own_process_can_use_a_once_request(team: World) -> None:
    """--consent with the id of a request that a process waits for is denied, before and after its approval."""
    asking = team.ask()
    words = ("secret", "get", "test_api_key", "--action", "test_action", "--for", "b", "--consent", asking.consent_id)
    assert team.call(*words).status == 5
    team.approve(asking.consent_id, "ben")
    assert team.call(*words).status == 5
    refused_with_cause(team, lambda: team.collect(asking.consent_id))
    assert asking.value() == VALUES["test_api_key"]


def test_a_grant_ends_unused(team: World) -> None:
    """After consent.grant_for the approval opens nothing: exit 6, expired, grant_ended; its parts are gone."""
    team.ok("config", "set", "consent.grant_for", "300ms")
    asking = team.ask(mode="collect")
    row = team.approve(asking.consent_id, "ben")
    until(lambda: team.m.clock() > row["grant_expires_at"], "the grant to end")
    done = team.call("secret", "get", "test_api_key", "--action", "test_action", "--for", "b", "--consent", asking.consent_id)
    assert done.status == 6 and done.out == ""
    shown = team.json("consent", "show", asking.consent_id)
    assert (shown["consent_status"], shown["expired_reason"], shown["used_count"]) == ("expired", "grant_ended", 0)
    assert team.fetch("SELECT ephemeral FROM secret_consent_records") == [(None,)] == team.fetch("SELECT wrap FROM consent_grants")


def test_a_grant_that_has_ended_does_not_open_though_its_row_says_so(team: World) -> None:
    """Whoever moves the row's clocks gains nothing: the end stands in the signed text."""
    team.ok("config", "set", "consent.grant_for", "300ms")
    asking = team.ask(mode="collect")
    row = team.approve(asking.consent_id, "ben")
    team.attack(FORCE, id=asking.consent_id)
    until(lambda: team.m.clock() > row["grant_expires_at"], "the grant to end")
    refused_with_cause(team, lambda: team.collect(asking.consent_id), "expired")


def test_a_setting_cannot_stretch_a_grant_beyond_a_day(team: World) -> None:
    """Whatever a request asks for, no approval waits longer than a day."""
    team.ok("config", "set", "consent.grant_for", "3000d")
    asking = team.ask(mode="collect")
    row = team.approve(asking.consent_id, "ben")
    assert row["grant_expires_at"] - row["approved_at"] <= 86_400_000


# ---- refusals: too late, and things that changed meanwhile


def test_approval_after_the_end_is_refused(team: World) -> None:
    """Expired, denied and withdrawn requests take no approval, also when it was begun before: nothing opens, no grant is stored."""
    ends: dict[str, Callable[[str], Any]] = {
        "expired": lambda one: until(lambda: team.m.clock() > team.row(one)["expires_at"], "the end of the time to answer"),
        "denied": lambda one: team.store.write(lambda tx: team.m.deny(tx, one, "no")),
        "revoked": lambda one: team.store.write(lambda tx: team.m.withdraw(tx, one)),
    }
    for wanted, end in ends.items():
        asking = team.ask(mode="collect", ms=1500 if wanted == "expired" else 60_000)
        review, seen = team.review(asking.consent_id, "anna")
        end(asking.consent_id)
        groups = review.groups(None)
        late = (lambda r=review, s=seen, g=groups: team.m.sign_and_record(team.vault(), r, g, s, None, None),  # the prompt stood open meanwhile
                lambda one=asking.consent_id: team.approve(one, "anna"))  # fmt: skip
        for act in late:
            assert refused(team, act, 4) == ""
        assert team.fetch("SELECT COUNT(*) FROM consent_grants WHERE consent_id = ?", asking.consent_id) == [(0,)]
        refused(team, lambda one=asking.consent_id: team.collect(one), 4 if wanted == "expired" and team.status(asking.consent_id) == "pending" else
                6 if wanted == "expired" else 5)  # fmt: skip
        team.store.write(team.m.expire_consents)
        assert team.status(asking.consent_id) == wanted


def test_moving_the_end_of_a_request_in_its_row_gains_nothing(team: World) -> None:
    """The time to answer stands in the request: a later instant in the row revives nothing, neither before nor at signing."""
    asking = team.ask(mode="collect", ms=700)
    review, seen = team.review(asking.consent_id, "anna")
    team.attack("UPDATE secret_consent_records SET expires_at = expires_at + 3600000 WHERE consent_id = :id", id=asking.consent_id)
    until(lambda: team.m.clock() > asking.request["answer_by"], "the end of the time to answer")
    with pytest.raises(team.m.GraceError):
        team.approve(asking.consent_id, "anna")
    with pytest.raises(team.m.GraceError):
        team.m.sign_and_record(team.vault(), review, review.groups(None), seen, None, None)
    assert team.status(asking.consent_id) != "approved"


@pytest.mark.parametrize("change", ["value", "policy", "reshare", "remove"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_change_of_the_secret_ends_what_was_asked_for_it(team: World, change: str, moment: str) -> None:
    """A new value, a new policy, a reshare or a removal, before or after the approval: nothing opens, the consent is revoked."""
    asking = team.ask(mode="collect")
    review, seen = team.review(asking.consent_id, "anna")
    if moment == "after":
        team.approve(asking.consent_id, "anna")
    signer = ("--owner", "anna", "--passphrase-file", word_file(team.place.folder, "anna"))
    words = {"value": ("secret", "set", "test_api_key", *signer), "policy": ("secret", "set", "test_api_key", "--policy", "governance:1", *signer),
             "reshare": ("secret", "reshare", "test_api_key", *team.as_("anna")), "remove": ("secret", "remove", "test_api_key")}[change]  # fmt: skip
    team.ok(*words, stdin=b"another value")
    assert team.row(asking.consent_id)["revocation_reason"].startswith("the secret was")
    refused(team, lambda: team.m.sign_and_record(team.vault(), review, review.groups(None), seen, None, None), 4)
    refused(team, lambda: team.approve(asking.consent_id, "anna"), 4)
    assert refused(team, lambda: team.collect(asking.consent_id), 5) == ""
    team.attack("UPDATE secret_consent_records SET consent_status = 'approved', revoked_at = NULL, grant_expires_at = 9000000000000 WHERE consent_id = :id",
                id=asking.consent_id)  # fmt: skip
    refused(team, lambda: team.collect(asking.consent_id), 3 if change == "remove" else 5)


def test_an_old_version_put_back_under_an_approval_is_refused(team: World) -> None:
    """Approved for version 1; version 2 comes; the attacker puts version 1 back, with all rows as they were: nothing opens."""
    asking = team.ask(mode="collect")
    team.approve(asking.consent_id, "anna")
    early = team.place.folder / "early.db"
    copy_rows(team.db, early)
    team.ok("secret", "set", "test_api_key", "--owner", "anna", "--passphrase-file", word_file(team.place.folder, "anna"), stdin=b"second")
    team.close()
    for name in ("grace.db", "grace.db-wal", "grace.db-shm"):
        (team.place.folder / name).unlink(missing_ok=True)
    copy_rows(early, team.db)
    refused_with_cause(team, lambda: team.collect(asking.consent_id), "rolled back")
    refused_with_cause(team, lambda: team.ask(mode="collect"), "rolled back")


# ---- refusals: who may not approve


@pytest.mark.parametrize("by", ["test_user", "TEST_USER", "Test_User"])
def test_nobody_approves_what_is_asked_in_his_name(team: World, by: str) -> None:
    """--by HIS-NAME, in any case: refused to him, open to another member; a signature of his own making does not count either."""
    asking = team.ask(mode="collect", by=by)
    assert refused(team, lambda: team.approve(asking.consent_id, "test_user")) == ""
    done = team.call("consent", "approve", asking.consent_id, *team.as_("test_user"))
    assert done.status == 5 and done.out == "", done.err
    review, seen = team.review(asking.consent_id, "test_user")
    forced = review.sign("user", team.m.clock())
    refused_with_cause(team, lambda: recorded(team, asking.consent_id, [forced], seen), "may not sign")
    team.approve(asking.consent_id, "ben")
    assert team.collect(asking.consent_id) == VALUES["test_api_key"]


def recorded(world: World, consent_id: str, signed: list[Row], seen: Row) -> Row:
    """Grants stored as `consent approve` and `import` store them, without what their makers check before."""
    vault = world.vault()
    with world.m.refusals(world.store, consent_id, plain=False):
        for item in signed:
            world.m.shaped(item, world.m.SIGNED_SHAPE, "this text")
        row: Row = world.store.write(lambda tx: world.m.record_grants(tx, vault, consent_id, signed, seen))
    return row


def test_a_second_key_of_the_same_name_does_not_help(team: World) -> None:
    """test_user is removed and added again with another key: still his name, still refused; the old key's grants are void."""
    old = team.ask(mode="collect", user="test_user")
    team.approve(old.consent_id, "test_user")
    asking = team.ask(mode="collect", by="test_user", user="anna")
    keys = next((team.place.folder / ".config" / "grace").iterdir())
    for ending in ("key", "seen"):
        shutil.copy2(keys / f"test_user.{ending}", team.place.folder / f"old.{ending}")
    team.ok("approver", "remove", "test_user", *team.as_("anna"))
    (keys / "test_user.key").unlink()
    team.ok("approver", "add", "test_user", "--role", "user", "--new-passphrase-file", word_file(team.place.folder, "test_user"), *team.as_("anna"))
    team.ok("secret", "reshare", "pair", *team.as_("anna"), *team.as_("ben"))
    done = team.call("consent", "approve", asking.consent_id, *team.as_("test_user"))
    assert done.status == 5 and done.out == ""
    assert refused(team, lambda: team.collect(old.consent_id), 5) == "" and team.status(old.consent_id) == "revoked"
    other = team.ask("pair", mode="collect", by="TEST_USER")
    done = team.call("consent", "approve", other.consent_id, *team.as_("test_user"))
    assert done.status == 5 and done.out == ""
    for ending in ("key", "seen"):
        shutil.copy2(team.place.folder / f"old.{ending}", keys / f"test_user.{ending}")
    third = team.ask(mode="collect")
    done = team.call("consent", "approve", third.consent_id, *team.as_("test_user"))
    assert done.status == 5 and done.out == ""


def test_one_approver_counts_once_in_a_group(team: World) -> None:
    """Of user:2of3 one signs twice: refused; copied in the database: refused; with another's it opens."""
    asking = team.ask("pair", mode="collect")
    assert team.approve(asking.consent_id, "anna")["consent_status"] == "pending"
    assert refused(team, lambda: team.approve(asking.consent_id, "anna"), 4) == ""
    review, _ = team.review(asking.consent_id, "anna")
    team.attack("""INSERT INTO consent_grants (consent_id, group_name, approver, document, wrap, wrap_hash, signature, created_at)
        SELECT consent_id, group_name, 'x' || approver, document, wrap, wrap_hash, signature, created_at FROM consent_grants""")
    team.attack(FORCE, id=asking.consent_id)
    refused_with_cause(team, lambda: team.collect(asking.consent_id))
    team.attack("DELETE FROM consent_grants WHERE approver LIKE 'x%'")
    second = review.sign("user", team.m.clock())  # a second grant of the same approver, rightly signed, with another nonce
    team.attack("""INSERT INTO consent_grants (consent_id, group_name, approver, document, wrap, wrap_hash, signature, created_at)
        VALUES (:id, 'user', 'y', :document, :wrap, :hash, :signature, 1)""", id=asking.consent_id, document=second["document"],
        wrap=team.m.from_b64(second["wrap"], ""), hash=team.m.sha256(team.m.from_b64(second["wrap"], "")),
        signature=team.m.from_b64(second["signature"], ""))  # fmt: skip
    refused_with_cause(team, lambda: team.collect(asking.consent_id))
    team.attack("DELETE FROM consent_grants WHERE approver = 'y'",
                "UPDATE secret_consent_records SET consent_status = 'pending', approved_at = NULL, grant_expires_at = NULL")
    assert team.approve(asking.consent_id, "ben")["consent_status"] == "approved"
    assert team.collect(asking.consent_id) == VALUES["pair"]


def test_user_must_name_an_approver_who_may_answer(team: World) -> None:
    """--user with a stranger, with governance alone, or empty: no request is filed."""
    for name, status in (("nobody", 3), ("gov", 3), ("", 2), ("a/b", 2)):
        done = team.call("secret", "get", "test_api_key", "--action", "a", "--for", "b", "--user", name)
        assert done.status == status and done.out == "", (name, done.err)
    assert team.json("consent", "history") == []


def test_a_wrong_code_approves_nothing(team: World) -> None:
    """--code of another request, or cut short: exit 5, still pending; the right one in other spelling is taken."""
    asking, other = team.ask(mode="collect"), team.ask(mode="collect")
    code, wrong = (team.m.code_of(team.m.hash_of("request", a.request)) for a in (asking, other))
    for typed in (wrong, code[:-1], code[:4], code + "0", "0" * 12, "----"):
        done = team.call("consent", "approve", asking.consent_id, "--code", typed, *team.as_("anna"))
        assert done.status == 5 and done.out == "", typed
    assert team.status(asking.consent_id) == "pending" and "consent.signed" not in team.kinds(asking.consent_id)
    sloppy = code.replace("-", " ").lower().replace("0", "o").replace("1", "l")
    team.ok("consent", "approve", asking.consent_id, "--code", sloppy, *team.as_("anna"))
    assert team.status(asking.consent_id) == "approved"


# ---- refusals: an attacker edits requests and grants


def swapped(world: World, asking: Any, **fields: Any) -> tuple[Row, str]:
    """The attacker's request with other fields in the pending row, in canonical form; and its hash."""
    request = {**asking.request, **fields}
    text = world.m.canonical(request).decode()
    world.attack("UPDATE secret_consent_records SET request = :request WHERE consent_id = :id", request=text, id=asking.consent_id)
    return request, world.m.hash_of("request", request)


def test_an_ephemeral_key_swapped_in_a_pending_request(team: World) -> None:
    """The attacker puts his own key into the row: the code differs, the approval is refused, and what he gets opens nothing."""
    asking, thief = team.ask(), team.m.Keys.new()
    code = team.m.code_of(team.m.hash_of("request", asking.request))
    request, new_hash = swapped(team, asking, ephemeral=thief.public)
    assert team.m.code_of(new_hash) != code
    done = team.call("consent", "approve", asking.consent_id, "--code", code, *team.as_("anna"))
    assert done.status == 5 and done.out == ""
    refused_with_cause(team, lambda: team.approve(asking.consent_id, "anna"))  # without comparing: the log knows what was filed
    assert team.fetch("SELECT COUNT(*) FROM consent_grants") == [(0,)]
    for keys, own in ((thief, None), (thief, team.m.canonical(request).decode()), (None, None)):
        with pytest.raises(team.m.GraceError):
            team.m.redeem(team.vault(), asking.consent_id, keys, own)
    with pytest.raises(team.m.GraceError):
        asking.value()
    assert "secret.used" not in team.kinds()


def test_a_nonce_ground_to_the_same_short_code_does_not_pass(team: World) -> None:
    """With a code of 20 bits the attacker finds a nonce in seconds; the real code of 60 bits still differs, and is not taken."""
    asking, thief = team.ask(), team.m.Keys.new()
    old_hash = team.m.hash_of("request", asking.request)
    wanted = team.m.code_of(old_hash, bits=20)
    mark = "0123456789abcdef" * 2
    text = team.m.statement("request", {**asking.request, "ephemeral": thief.public, "nonce": mark})
    before, _, after = text.partition(mark.encode())
    begun = hashlib.sha256(before)
    target, nonce = bytes.fromhex(old_hash)[:3], 0
    while True:
        attempt = begun.copy()
        attempt.update(b"%032x" % nonce + after)
        digest = attempt.digest()
        if digest[:2] == target[:2] and digest[2] >> 4 == target[2] >> 4:
            break
        nonce += 1
    _, new_hash = swapped(team, asking, ephemeral=thief.public, nonce=f"{nonce:032x}")
    assert team.m.code_of(new_hash, bits=20) == wanted and new_hash != old_hash
    assert team.m.code_of(new_hash) != team.m.code_of(old_hash) and team.m.code_of(new_hash)[:4] == wanted
    for typed in (wanted, team.m.code_of(old_hash)):
        done = team.call("consent", "approve", asking.consent_id, "--code", typed, *team.as_("anna"))
        assert done.status == 5 and done.out == ""
    with pytest.raises(team.m.GraceError):
        asking.value()
    assert team.fetch("SELECT COUNT(*) FROM consent_grants") == [(0,)] and "secret.used" not in team.kinds()


def byte_changed(value: Any) -> Any:
    """The value with one byte (or bit of meaning) changed, of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, str):
        return ("A" if value[:1] != "A" else "B") + value[1:]
    if isinstance(value, bytes):
        return value[:-1] + bytes([value[-1] ^ 1])
    if isinstance(value, dict):
        name = sorted(value)[-1] if value else "x"
        return {**value, name: byte_changed(value.get(name))}
    return "x" if value is None else None


def approved_pair(world: World) -> tuple[Any, Any]:
    """Two high requests to be collected, approved by the same two people, differing in action and words."""
    askings = [world.ask("high", action, mode="collect", by=by, purpose=f"to {action}") for action, by in (("read", "tester"), ("write", "other"))]
    for asking in askings:
        world.approve(asking.consent_id, "gov")
        world.approve(asking.consent_id, "test_user")
    return askings[0], askings[1]


def table_rows(world: World, consent_id: str) -> tuple[Row, list[Row]]:
    return world.row(consent_id), world.store.all("SELECT * FROM consent_grants WHERE consent_id = :id ORDER BY seq", id=consent_id)


def put_row(world: World, table: str, row: Row) -> None:
    names = [name for name in row if name != "seq"]
    world.attack(f"UPDATE {table} SET {', '.join(f'{name} = :{name}' for name in names)} WHERE seq = :seq", **row)


def documents_changed(world: World, mine: Row, other: Row) -> Iterator[tuple[str, str]]:
    """A document with each field changed, swapped with another's or dropped, always in canonical form; and some forms that are not."""
    for name in mine:
        variants = {"changed": {**mine, name: byte_changed(mine[name])}, "dropped": {key: value for key, value in mine.items() if key != name}}
        if other[name] != mine[name]:
            variants["swapped"] = {**mine, name: other[name]}
        for how, document in variants.items():
            yield f"{name} {how}", world.m.canonical(document).decode()
    for part in ("claimed", "reported"):
        for name in mine.get(part, {}):
            yield f"{part}.{name} changed", world.m.canonical({**mine, part: {**mine[part], name: byte_changed(mine[part][name])}}).decode()
    plain = world.m.canonical(mine).decode()
    yield "a space", plain.replace(":", ": ", 1)
    yield "another field", world.m.canonical({**mine, "zzz": 1}).decode()
    yield "a field twice", plain[:-1] + f',"zzz":1,{plain[1:plain.index(",")]}' + "}"
    yield "a list", "[]"
    yield "the other's", world.m.canonical(other).decode()


def test_every_field_of_a_request_is_bound(team: World) -> None:
    """Each field changed, dropped, or swapped with another row's: refused with exit 5, unused, with the cause in the log."""
    one, two = approved_pair(team)
    row, _ = table_rows(team, one.consent_id)
    tried = 0
    for what, text in documents_changed(team, one.request, two.request):
        put_row(team, "secret_consent_records", {**row, "request": text})
        assert refused(team, lambda: team.collect(one.consent_id)), what
        tried += 1
    assert tried > 50
    put_row(team, "secret_consent_records", row)
    assert team.collect(one.consent_id) == VALUES["high"]


def test_every_field_of_a_grant_is_bound(team: World) -> None:
    """Each field of each grant's document, its part, its hash and its signature: refused with exit 5, with the cause in the log."""
    one, two = approved_pair(team)
    _, mine = table_rows(team, one.consent_id)
    _, others = table_rows(team, two.consent_id)
    tried = 0
    for row, other in [*zip(mine, others, strict=True), *zip(mine, mine[::-1], strict=True)]:
        documents = documents_changed(team, json.loads(row["document"]), json.loads(other["document"]))
        for what, text in documents:
            put_row(team, "consent_grants", {**row, "document": text})
            assert refused(team, lambda: team.collect(one.consent_id)), what
            tried += 1
        for name in ("wrap", "wrap_hash", "signature"):
            for value in (byte_changed(row[name]), other[name], None if name != "signature" else bytes(64)):
                put_row(team, "consent_grants", {**row, name: value})
                assert refused(team, lambda: team.collect(one.consent_id)), name
        put_row(team, "consent_grants", {**row, "wrap": other["wrap"], "wrap_hash": other["wrap_hash"]})
        assert refused(team, lambda: team.collect(one.consent_id))
        put_row(team, "consent_grants", row)
    assert tried > 100
    assert team.collect(one.consent_id) == VALUES["high"]


def test_grants_of_another_request_do_not_count(team: World) -> None:
    """Whole grant rows of another request, copied or moved under this one, in any number: refused with the cause in the log."""
    one, two = approved_pair(team)
    bare = team.ask("high", "read", mode="collect")
    team.attack(FORCE, id=bare.consent_id)
    assert refused(team, lambda: team.collect(bare.consent_id))
    team.attack("""INSERT INTO consent_grants (consent_id, group_name, approver, document, wrap, wrap_hash, signature, created_at)
        SELECT :to, group_name, approver, document, wrap, wrap_hash, signature, created_at FROM consent_grants WHERE consent_id = :from""",
        **{"to": bare.consent_id, "from": one.consent_id})  # fmt: skip
    refused_with_cause(team, lambda: team.collect(bare.consent_id), "another request")
    team.attack("UPDATE consent_grants SET consent_id = 'tmp' WHERE consent_id = :a", "UPDATE consent_grants SET consent_id = :a WHERE consent_id = :b",
                "UPDATE consent_grants SET consent_id = :b WHERE consent_id = 'tmp'", a=one.consent_id, b=two.consent_id)  # fmt: skip
    for asking in (one, two):
        refused_with_cause(team, lambda asking=asking: team.collect(asking.consent_id), "another request")
    assert "secret.used" not in team.kinds()


@pytest.mark.parametrize("edit", ["group_name = CASE group_name WHEN 'user' THEN 'governance' ELSE 'user' END", "approver = 'x' || approver",
                                  "group_name = 'user'", "approver = '{gov}'"])  # fmt: skip
def test_grants_moved_between_groups_and_people(team: World, edit: str) -> None:
    """A grant's columns say something else than its signed text: refused, with the cause in the log."""
    one, _ = approved_pair(team)
    team.attack(f"UPDATE consent_grants SET {edit.format(gov=team.person('gov').keys.fingerprint)} WHERE consent_id = :id", id=one.consent_id)
    refused_with_cause(team, lambda: team.collect(one.consent_id))


def test_columns_of_a_consent_changed_or_swapped(team: World) -> None:
    """What a row says beside the signed text: a forged status, another id, secret or version release nothing."""
    one, two = approved_pair(team)
    row, _ = table_rows(team, one.consent_id)
    for fields in ({"secret_key": "pair"}, {"secret_version": 7}, {"ephemeral": two.keys.private}, {"ephemeral": byte_changed(row["ephemeral"])},
                   {"ephemeral": None}, {"ephemeral": team.row(two.consent_id)["ephemeral"]}, {"mode": "once"}):  # fmt: skip
        put_row(team, "secret_consent_records", {**row, **fields})
        assert refused(team, lambda: team.collect(one.consent_id)), fields
        put_row(team, "secret_consent_records", row)
    team.attack("UPDATE secret_consent_records SET consent_id = CASE consent_id WHEN :a THEN 'tmp' ELSE :a END WHERE consent_id IN (:a, :b)",
                "UPDATE secret_consent_records SET consent_id = :b WHERE consent_id = 'tmp'", a=one.consent_id, b=two.consent_id)  # fmt: skip
    for asking in (one, two):
        assert refused(team, lambda asking=asking: team.collect(asking.consent_id))
    assert "secret.used" not in team.kinds()


def test_more_uses_written_into_a_row_are_not_had(team: World) -> None:
    """max_uses and used_count edited: still one use at most."""
    asking = team.ask(mode="collect")
    team.approve(asking.consent_id, "anna")
    team.attack("UPDATE secret_consent_records SET max_uses = 5")
    values = []
    for _ in range(3):
        with contextlib.suppress(team.m.GraceError):
            values.append(team.collect(asking.consent_id))
        team.attack("UPDATE secret_consent_records SET consent_status = 'approved', used_count = 0")
    assert len(values) <= 1 and team.kinds(asking.consent_id).count("secret.used") == len(values)


@pytest.mark.parametrize("end", ["used", "revoked", "expired"])
def test_rows_of_an_ended_consent_put_back_are_refused(team: World, end: str) -> None:
    """The attacker kept the rows of an approved consent and puts them back after its use or its end: the log knows better."""
    if end == "expired":
        team.ok("config", "set", "consent.grant_for", "600ms")
    asking = team.ask(mode="collect")
    team.approve(asking.consent_id, "anna")
    row, grants = table_rows(team, asking.consent_id)
    if end == "used":
        assert team.collect(asking.consent_id) == VALUES["test_api_key"]
    elif end == "revoked":
        team.store.write(lambda tx: team.m.revoke(tx, asking.consent_id, "no"))
    else:
        until(lambda: team.m.clock() > row["grant_expires_at"], "the grant to end")
        team.store.write(team.m.expire_consents)
    assert team.status(asking.consent_id) == end
    put_row(team, "secret_consent_records", {**row, "grant_expires_at": 9_000_000_000_000})
    for grant in grants:
        put_row(team, "consent_grants", grant)
    refused_with_cause(team, lambda: team.collect(asking.consent_id))
    assert team.kinds(asking.consent_id).count("secret.used") == (end == "used")


def test_a_denied_request_put_back_is_not_approved(team: World) -> None:
    """A denial is final: with the row pending again, the log still knows of it."""
    asking = team.ask(mode="collect")
    row = team.row(asking.consent_id)
    team.store.write(lambda tx: team.m.deny(tx, asking.consent_id, "no"))
    put_row(team, "secret_consent_records", row)
    assert team.status(asking.consent_id) == "pending"
    refused_with_cause(team, lambda: team.approve(asking.consent_id, "anna"))


def test_a_consent_without_its_leaves_is_refused(team: World) -> None:
    """The leaf that a grant names is cut off or rewritten: the log is rolled back, and nothing above low opens."""
    asking = team.ask(mode="collect")
    team.approve(asking.consent_id, "anna")
    team.attack("DELETE FROM audit_log WHERE seq > (SELECT MIN(seq) FROM audit_log WHERE leaf LIKE '%consent.requested%')")
    refused_with_cause(team, lambda: team.collect(asking.consent_id), "rolled back")
    assert team.ask("low").value() == VALUES["low"]


def test_a_request_of_the_attackers_own_making(team: World) -> None:
    """Rows inserted as approved, as automatic, with low risk written into the request: nothing opens."""
    asking = team.ask(mode="collect")
    for fields in ({}, {"risk": "low"}, {"user": None, "risk": "low", "mode": "collect"}, {"grant_for": 10**12}):
        swapped(team, asking, **fields)
        team.attack(FORCE, "UPDATE secret_consent_records SET approval_method = 'auto'", id=asking.consent_id)
        refused_with_cause(team, lambda: team.collect(asking.consent_id))
    assert "secret.used" not in team.kinds()


def test_the_command_refuses_in_one_plain_line(team: World) -> None:
    """The requester learns that it was refused, exit 5, and not why; the log has the cause."""
    one, _ = approved_pair(team)
    team.attack("UPDATE consent_grants SET signature = zeroblob(64) WHERE consent_id = :id", id=one.consent_id)
    done = team.call("secret", "get", "high", "--action", "read", "--for", "b", "--consent", one.consent_id, "--json", "--reveal")
    assert done.status == 5 and done.out == "" and set(done.error) == {"code", "message", "hint"}
    assert "signature" not in done.err and "audit" in done.error["hint"]
    leaf = team.leaves(one.consent_id)[-1]
    assert leaf["kind"] == "vault.refused" and "signature" in leaf["facts"]["cause"]
    assert team.call("audit", "verify").status == 1


# ---- six at once, and kills at any moment


def racing(world: World, begin: Any, tasks: Any, results: Any) -> None:
    """A process that redeems each consent it is given at the same instant as its rivals."""
    store = world.m.Store(str(world.db), "racer")
    vault = world.m.Vault(store)
    while (consent_id := tasks.get()) is not None:
        begin.wait()
        try:
            results.put(bytes(world.m.redeem(vault, consent_id, None, None)))
        except world.m.GraceError as error:
            results.put(error.exit_code)
    os._exit(0)


def test_of_six_processes_on_one_grant_one_gets_the_value(team: World) -> None:
    """Thirty grants, six processes on each at once: one value and five conflicts each time, one leaf each."""
    begin, results, tasks = FORK.Barrier(6), FORK.Queue(), [FORK.Queue() for _ in range(6)]
    team.vault()
    team.close()  # no connection is carried over into a child
    racers = [FORK.Process(target=racing, args=(team, begin, queue, results), daemon=True) for queue in tasks]
    for racer in racers:
        racer.start()
    try:
        for _ in range(30):
            asking = team.ask(mode="collect")
            team.approve(asking.consent_id, "anna")
            for queue in tasks:
                queue.put(asking.consent_id)
            got = [results.get(timeout=LIMIT) for _ in racers]
            assert sorted(map(str, got)) == sorted(map(str, [VALUES["test_api_key"], 4, 4, 4, 4, 4]))
            assert team.kinds(asking.consent_id).count("secret.used") == 1
        for queue in tasks:
            queue.put(None)
    finally:
        for racer in racers:
            racer.join(1)
            racer.kill()
    assert team.json("audit", "verify")["ok"] is True


def test_of_six_commands_on_one_grant_one_gets_the_value(team: World) -> None:
    """The same with the real command."""
    asking = team.ask(mode="collect")
    team.approve(asking.consent_id, "anna")
    words = ("secret", "get", "test_api_key", "--action", "test_action", "--for", "b", "--consent", asking.consent_id)
    ends = [end_of(process) for process in [team.place.start(*words) for _ in range(6)]]
    assert sorted(status for status, _, _ in ends) == [0, 4, 4, 4, 4, 4]
    assert sorted(out for _, out, _ in ends) == [b""] * 5 + [VALUES["test_api_key"]]


class Dying:
    """Kills its own process at the n-th call of a function of grace; where it never comes so far, the process ends by itself."""

    def __init__(self, module: Any, number: int):
        self.file, self.left = module.__file__, number

    def __call__(self, frame: Any, event: str, arg: Any) -> None:
        if event in ("call", "return") and frame.f_code.co_filename == self.file:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def dying(world: World, number: int, act: Callable[[World], Any]) -> int:
    """Run `act` in a child with a store of its own that dies at its n-th step; 9 when it did, 0 when it came to the end."""
    world.close()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            world.m._last_id[:] = 0, "", 0
            world.store  # noqa: B018 (opened before the steps are counted)
            sys.setprofile(Dying(world.m, number))
            act(world)
            status = 0
        finally:
            sys.setprofile(None)
            os._exit(status)
    waited = os.waitpid(pid, 0)[1]
    return os.WTERMSIG(waited) if os.WIFSIGNALED(waited) else os.WEXITSTATUS(waited)


def steps_of(act: Callable[[int], int], points: int) -> list[int]:
    """Moments spread over all the steps that an act takes: found by letting it die ever later until it no longer does."""
    high = 64
    while act(high) == 9:
        high *= 2
    low = high // 2
    for _ in range(4):
        middle = (low + high) // 2
        low, high = (middle, high) if act(middle) == 9 else (low, middle)
    return sorted({max(1, high * n // points) for n in range(1, points + 1)})


CONSISTENT = {
    "a status has its approvals": """SELECT consent_id FROM secret_consent_records c
        WHERE consent_status IN ('approved', 'used') AND approval_method = 'approver'
          AND NOT EXISTS (SELECT 1 FROM consent_grants g WHERE g.consent_id = c.consent_id)""",
    "one leaf for each grant": """SELECT c.consent_id FROM secret_consent_records c
        WHERE (SELECT COUNT(*) FROM consent_grants g WHERE g.consent_id = c.consent_id) <>
        (SELECT COUNT(*) FROM audit_log WHERE json(leaf) ->> 'subject' = c.consent_id AND json(leaf) ->> 'kind' = 'consent.signed')""",
    "one leaf and one event for each use": """SELECT c.consent_id FROM secret_consent_records c WHERE mode <> 'standing' AND (used_count <>
        (SELECT COUNT(*) FROM audit_log WHERE json(leaf) ->> 'subject' = c.consent_id AND json(leaf) ->> 'kind' = 'secret.used')
        OR used_count <> (SELECT COUNT(*) FROM events WHERE subject = c.consent_id AND topic = 'secrets.consent.used'))""",
    "a standing one is counted where it was used": """SELECT c.consent_id FROM secret_consent_records c WHERE mode = 'standing' AND used_count <>
        (SELECT COUNT(*) FROM audit_log WHERE json(leaf) ->> 'kind' = 'secret.used' AND json(leaf) -> 'facts' ->> 'standing' = c.consent_id)""",
    "one leaf for each approval": """SELECT c.consent_id FROM secret_consent_records c WHERE (approved_at IS NOT NULL) <>
        (SELECT COUNT(*) FROM audit_log WHERE json(leaf) ->> 'subject' = c.consent_id AND json(leaf) ->> 'kind' = 'consent.approved')""",
    "what is over keeps no key": """SELECT consent_id FROM secret_consent_records c WHERE consent_status IN ('used', 'denied', 'revoked', 'expired') AND
        (ephemeral IS NOT NULL OR EXISTS (SELECT 1 FROM consent_grants g WHERE g.consent_id = c.consent_id AND wrap IS NOT NULL))""",
    "the status is the one of its last leaf": """SELECT c.consent_id FROM secret_consent_records c
        WHERE consent_status NOT IN ('pending', 'approved', 'used') AND NOT EXISTS (SELECT 1 FROM audit_log
          WHERE json(leaf) ->> 'subject' = c.consent_id AND json(leaf) ->> 'kind' = 'consent.' || consent_status)""",
}  # fmt: skip


def consistent(world: World) -> None:
    """Rows, events and log agree, and the log verifies against what was signed and seen."""
    broken = {name: rows for name, query in CONSISTENT.items() if (rows := world.fetch(query))}
    assert broken == {}
    vault = world.vault()
    assert world.m.verify_log(world.store, vault.roster, {"this machine": vault.seen.audit})["findings"] == []


def test_an_approver_killed_at_any_step(team: World) -> None:
    """Afterwards the approval is there, with its leaf, or it is not; then another one counts, and the value is released once."""
    team.person("anna")
    last: list[Any] = []

    def approve_dying(number: int) -> int:
        asking = team.ask(mode="collect", ms=3_600_000, program=f"program {number}")
        last[:] = [asking.consent_id]
        status = dying(team, number, lambda world: world.approve(asking.consent_id, "anna"))
        if team.status(asking.consent_id) == "pending":
            assert team.fetch("SELECT COUNT(*) FROM consent_grants WHERE consent_id = ?", asking.consent_id) == [(0,)]
            team.approve(asking.consent_id, "anna")
        assert team.collect(asking.consent_id) == VALUES["test_api_key"]
        return status

    moments = steps_of(approve_dying, 25)
    died = [approve_dying(moment) for moment in moments]
    assert died.count(9) > 15
    consistent(team)


def test_a_redeemer_killed_at_any_step(team: World) -> None:
    """Afterwards the use is spent, with its leaf, or it is not, and then it can be had, once."""
    spent: list[bool] = []

    def redeem_dying(number: int) -> int:
        asking = team.ask(mode="collect", program=f"program {number}")
        team.approve(asking.consent_id, "anna")
        status = dying(team, number, lambda world: world.collect(asking.consent_id))
        spent.append(team.status(asking.consent_id) == "used")
        assert team.kinds(asking.consent_id).count("secret.used") == spent[-1]
        if spent[-1]:
            refused(team, lambda: team.collect(asking.consent_id), 4)
        else:
            assert team.collect(asking.consent_id) == VALUES["test_api_key"]
        return status

    died = [redeem_dying(moment) for moment in steps_of(redeem_dying, 20)]
    assert died.count(9) > 12 and True in spent and False in spent
    consistent(team)


def test_a_requester_killed_at_any_step(team: World) -> None:
    """Its request is there or not; with its process dead it is neither pending nor approvable, and nothing opens."""
    def ask_dying(number: int) -> int:
        before = {row[0] for row in team.fetch("SELECT consent_id FROM secret_consent_records")}
        status = dying(team, number, lambda world: world.ask(program=f"program {number}", mode="once"))
        for (consent_id,) in team.fetch("SELECT consent_id FROM secret_consent_records"):
            if consent_id not in before:
                assert refused(team, lambda one=consent_id: team.approve(one, "anna"), 4) == ""
        return status

    died = [ask_dying(moment) for moment in steps_of(ask_dying, 15)]
    assert died.count(9) > 10
    team.store.write(team.m.expire_consents)
    assert team.fetch("SELECT COUNT(*) FROM secret_consent_records WHERE consent_status = 'pending'") == [(0,)]
    assert team.fetch("SELECT COUNT(*) FROM consent_grants") == [(0,)]
    consistent(team)


def test_a_stopped_process_that_holds_the_vaults_lock_stops_nobody_for_ever(team: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """After half a minute (here less) others go on, say who holds it, and what they had opened is not lost."""
    monkeypatch.setattr(team.m, "STANDSTILL", 1)
    held = os.open(Path(team.vault().folder) / ".lock", os.O_RDWR)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = team.call("secret", "get", "low", "--action", "read", "--for", "a test")
        assert (done.status, done.raw_out) == (0, VALUES["low"]) and f"held by process {os.getpid()}" in done.err
    finally:
        os.close(held)


def stop_without_the_lock(team: World, process: subprocess.Popen[bytes]) -> None:
    """Stop a process at a moment when it is not writing, so that others can."""

    def stopped() -> bool:
        process.send_signal(signal.SIGSTOP)
        until(lambda: Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T", "it to be stopped")
        with open(f"{team.place.db}-ticket", "rb") as ticket, contextlib.suppress(BlockingIOError):
            fcntl.flock(ticket, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        process.send_signal(signal.SIGCONT)
        return False

    until(stopped, "a moment without the lock")


def test_a_requester_killed_before_and_after_its_approval(team: World) -> None:
    """Killed before: not approvable. Killed after: nobody else gets the value; the grant ends unused."""
    for approved in (False, True):
        asking = team.get("test_api_key")
        (consent_id,) = team.pending()
        assert asking.stderr and b"waiting for consent" in asking.stderr.readline()  # it holds no lock any more
        stop_without_the_lock(team, asking)  # so that it does not notice
        if approved:
            team.approve(consent_id, "anna")
        asking.kill()
        assert end_of(asking)[1] == b""
        if not approved:
            assert refused(team, lambda one=consent_id: team.approve(one, "anna"), 4) == ""
        done = team.call("secret", "get", "test_api_key", "--action", "test_action", "--for", "b", "--consent", consent_id)
        assert done.status in (5, 6) and done.out == ""
        assert team.status(consent_id) == ("approved" if approved else "expired")
        assert refused(team, lambda one=consent_id: team.collect(one), 5 if approved else 6) or not approved
    assert "secret.used" not in team.kinds()
    consistent(team)


def test_the_real_approver_killed_at_random_moments(team: World) -> None:
    """`consent approve` killed in the middle, again and again: the request stays answerable and is used once."""
    chance = random.Random(3)
    outcomes = []
    for number in range(8):
        asking = team.ask(mode="collect", program=f"program {number}")
        process = team.place.start("consent", "approve", asking.consent_id, *team.as_("anna"))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1 + chance.random() * 0.3)
        process.kill()
        process.wait()
        outcomes.append(team.status(asking.consent_id))
        if outcomes[-1] == "pending":
            team.approve(asking.consent_id, "anna")
        assert team.collect(asking.consent_id) == VALUES["test_api_key"]
    assert set(outcomes) <= {"pending", "approved"}
    consistent(team)


# ---- random sequences against a small model


class Requester:
    """A process that has asked, and waits to be told to use its approval."""

    def __init__(self, world: World, key: str, risk: str | None, number: int):
        world.close()
        self.ours, theirs = FORK.Pipe()
        self.process = FORK.Process(target=self._live, args=(world, theirs, key, risk, number), daemon=True)
        self.process.start()
        theirs.close()
        assert self.ours.poll(LIMIT), "it never asked"
        self.consent_id = self.ours.recv()

    @staticmethod
    def _live(world: World, pipe: Any, key: str, risk: str | None, number: int) -> None:
        world.m._last_id[:] = 0, "", 0  # a forked process must not go on counting where its parent stands
        asking = world.ask(key, risk=risk, program=f"program {number}", ms=3_600_000)
        pipe.send(asking.consent_id)
        while pipe.recv():
            try:
                pipe.send(asking.value())
            except world.m.GraceError as error:
                pipe.send(error.exit_code)

    def use(self) -> Any:
        self.ours.send(True)
        assert self.ours.poll(LIMIT)
        return self.ours.recv()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


class Model:
    """What should be: for each consent its status and who has signed."""

    def __init__(self, consent_id: str, key: str, risk: str, requester: Requester | None):
        self.consent_id, self.key, self.risk, self.requester = consent_id, key, risk, requester
        self.status, self.signed, self.dead = "pending", set[str](), False

    def may_sign(self, name: str, group: str) -> bool:
        return self.status == "pending" and not self.dead and group in PEOPLE[name] and group not in self.signed and group in self.needed

    @property
    def needed(self) -> set[str]:
        return {"medium": {"user"}, "high": {"user", "governance"}}[self.risk]


@pytest.mark.parametrize("seed", range(3))
def test_random_sequences_release_only_what_the_model_allows(team: World, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: PLR0915
    """Asking, approving, denying, withdrawing, revoking, using, time passing and kills: values come only out of approved consents, once."""
    chance, offset, real = random.Random(seed), FORK.Value("q", 0, lock=False), team.m.clock
    monkeypatch.setattr(team.m, "clock", lambda: real() + offset.value)
    models: list[Model] = []
    used: dict[str, int] = {}

    def ask() -> None:
        key, risk = chance.choice([("test_api_key", "medium"), ("test_api_key", "high"), ("high", "high")])
        number = len(models)
        if sum(m.status == "pending" for m in models) >= 15:
            return
        if chance.random() < 0.5:
            requester = Requester(team, key, risk, number)
            models.append(Model(requester.consent_id, key, risk, requester))
        else:
            asking = team.ask(key, risk=risk, mode="collect", program=f"program {number}", ms=3_600_000)
            models.append(Model(asking.consent_id, key, risk, None))

    def sign(model: Model) -> None:
        name, group = chance.choice([("test_user", "user"), ("anna", "user"), ("gov", "governance"), ("anna", "governance")])
        allowed = model.may_sign(name, group) and not (name == "anna" and "anna" in model.signed)
        try:
            team.approve(model.consent_id, name, group)
            assert allowed, (model.__dict__, name, group)
            model.signed |= {group} | ({"anna"} if name == "anna" else set())
            if model.needed <= model.signed:
                model.status = "approved"
        except team.m.GraceError as error:
            assert not allowed, (error, model.__dict__, name, group)

    def end(model: Model) -> None:
        what = chance.choice(["deny", "withdraw", "revoke"])
        act = {"deny": lambda tx: team.m.deny(tx, model.consent_id, "no"), "withdraw": lambda tx: team.m.withdraw(tx, model.consent_id),
               "revoke": lambda tx: team.m.revoke(tx, model.consent_id, "no")}[what]  # fmt: skip
        allowed = (model.status == "pending" and not (what == "deny" and model.dead)) or (what == "revoke" and model.status == "approved")
        try:
            team.store.write(act)
            assert allowed, (what, model.__dict__)
            model.status = "denied" if what == "deny" else "revoked"
        except team.m.GraceError as error:
            assert not allowed, (error, what, model.__dict__)

    def use(model: Model) -> None:
        if model.requester is not None and model.dead:
            return
        try:
            got = model.requester.use() if model.requester else team.collect(model.consent_id)
        except team.m.GraceError as error:
            got = error.exit_code
        if model.status == "approved":
            assert got == VALUES[model.key], model.__dict__
            model.status, used[model.consent_id] = "used", used.get(model.consent_id, 0) + 1
        else:
            assert got in (4, 5, 6), (got, model.__dict__)

    def kill(model: Model) -> None:
        if model.requester is not None and not model.dead:
            model.requester.kill()
            model.dead = True

    def pass_time() -> None:
        minutes = chance.choice([1, 11])
        offset.value += minutes * 60_000
        team.store.write(team.m.expire_consents)
        for model in models:
            over = {"pending": model.dead or real() + offset.value >= team.row(model.consent_id)["expires_at"],
                    "approved": real() + offset.value >= (team.row(model.consent_id)["grant_expires_at"] or 0)}  # fmt: skip
            model.status = "expired" if over.get(model.status, False) else model.status

    try:
        for _ in range(45):
            act = chance.choice([ask] * 4 + [sign] * 8 + [use] * 4 + [end, kill, pass_time])
            some = chance.choice(models) if models else None
            if act in (ask, pass_time):
                act()  # type: ignore[operator]
            elif some is not None:
                act(some)  # type: ignore[operator]
        for model in models:
            assert team.status(model.consent_id) in ({model.status} | ({"expired"} if model.dead and model.status == "pending" else set()))
            assert team.kinds(model.consent_id).count("secret.used") == used.get(model.consent_id, 0) <= 1
        assert used
        consistent(team)
    finally:
        for model in models:
            kill(model)


# ---- limits


def test_at_most_twenty_requests_wait(team: World) -> None:
    """The 21st is refused with exit 5 and files nothing; low risk still opens; after an answer there is room."""
    asked = [team.ask(mode="collect", program=f"program {number // 4}") for number in range(20)]
    assert refused(team, lambda: team.ask(mode="collect", program="another")) == ""
    done = team.call("secret", "get", "test_api_key", "--action", "a", "--for", "b", "--no-wait")
    assert done.status == 5 and done.out == "" and "20" in done.err
    assert team.ask("low").value() == VALUES["low"]
    assert len(team.fetch("SELECT 1 FROM secret_consent_records WHERE consent_status = 'pending'")) == 20
    team.ok("consent", "withdraw", asked[0].consent_id)
    team.ask(mode="collect", program="another")


def test_at_most_five_of_one_program_wait(team: World) -> None:
    """The sixth of the same user and program is refused, another program's is not."""
    for _ in range(5):
        assert team.call("secret", "get", "test_api_key", "--action", "a", "--for", "b", "--no-wait").status == 75
    done = team.call("consent", "request", "test_api_key", "--action", "a", "--for", "b")
    assert done.status == 5 and done.out == "" and "5" in done.err
    assert len(team.json("consent", "pending")) == 5
    team.ask(mode="collect", program="another")


def test_three_denials_in_a_row_are_a_pause_for_that_program(team: World) -> None:
    """It has to wait for consent.pause; another program may ask; an approval in between resets it."""
    team.ok("config", "set", "consent.pause", "1h")
    deny = lambda asking: team.store.write(lambda tx: team.m.deny(tx, asking.consent_id, "no"))  # noqa: E731
    deny(team.ask())
    deny(team.ask())
    team.approve(team.ask(mode="collect").consent_id, "anna")
    for _ in range(3):
        deny(team.ask())
    assert refused(team, team.ask) == ""
    team.ask(program="another")
    assert team.ask("low").value() == VALUES["low"]
    team.ok("config", "set", "consent.pause", "1ms")
    team.ask()


def test_identical_requests_are_answered_together(team: World) -> None:
    """Of living processes of one program: one approval, each code shown, one grant for each; what differs in a word stays pending."""
    askers = [team.get("test_api_key") for _ in range(3)]
    alike = team.pending(3)
    other = team.get("test_api_key", "--by", "another")
    (differs,) = set(team.pending(4)) - set(alike)
    codes = [team.json("consent", "show", one)["code"] for one in (*alike, differs)]
    done = team.call("consent", "approve", alike[1], *team.as_("anna"))
    assert done.status == 0 and [code in done.err for code in codes] == [True] * 3 + [False], done.err
    assert [end_of(asker)[:2] for asker in askers] == [(0, VALUES["test_api_key"])] * 3
    assert team.status(differs) == "pending" and other.poll() is None
    assert len({row[0] for row in team.fetch("SELECT document FROM consent_grants")}) == 3
    for one in alike:
        assert team.kinds(one).count("consent.signed") == 1 == team.kinds(one).count("secret.used")
    consistent(team)


# ---- approval elsewhere


class Elsewhere:
    """Another machine: a home of its own with test_user's key file, and no database."""

    def __init__(self, world: World, name: str = "test_user"):
        self.world, self.folder = world, world.place.folder / "elsewhere"
        self.folder.mkdir(mode=0o700)
        self.environment = {"HOME": str(self.folder), "GRACE_DB": str(self.folder / "none" / "grace.db")}
        world.ok("approver", "export", name, "--out", str(self.folder / "bundle"))
        done = world.call("--json", "approver", "import", str(self.folder / "bundle"), env=self.environment)
        assert done.status == 0 and done.json["name"] == name
        self.word = word_file(world.place.folder, name)

    def call(self, *words: str, stdin: bytes | None = None) -> Result:
        return self.world.call(*words, "--passphrase-file", self.word, stdin=stdin, env=self.environment)

    def file(self, name: str, content: Any) -> str:
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return str(path)


def test_approval_on_another_machine(team: World) -> None:
    """The key file and the text suffice: export, approve there, import here, and the waiting process gets its value."""
    there = Elsewhere(team)
    asking = team.get("test_api_key", "--user", "test_user")
    (consent_id,) = team.pending()
    code = team.json("consent", "show", consent_id)["code"]
    case, answer = str(there.folder / "case"), str(there.folder / "answer")
    team.ok("consent", "export", consent_id, "--out", case)
    assert stat.S_IMODE(os.stat(case).st_mode) == 0o600
    wrong = there.call("consent", "approve", "--in", case, "--out", answer, "--code", "0000-0000-0000")
    assert wrong.status == 5 and not Path(answer).exists()
    done = there.call("consent", "approve", "--in", case, "--out", answer, "--code", code)
    assert done.status == 0 and "another machine" in done.err, done.err
    assert VALUES["test_api_key"] not in Path(case).read_bytes() + Path(answer).read_bytes()
    assert not (there.folder / "none").exists(), "no database is needed there"
    assert team.json("consent", "import", answer)["consent_status"] == "approved"
    assert end_of(asking)[:2] == (0, VALUES["test_api_key"])
    again = team.call("consent", "import", answer)
    assert again.status == 4 and again.out == ""
    assert team.kinds(consent_id).count("consent.signed") == 1 and team.json("audit", "verify")["ok"] is True
    consistent(team)


def test_pipes_carry_request_and_approval(team: World) -> None:
    """Without --out the texts go to stdout, and - reads them from stdin."""
    there = Elsewhere(team)
    asking = team.ask(mode="collect")
    case = team.ok("consent", "export", asking.consent_id).raw_out
    answer = there.call("consent", "approve", "--in", "-", stdin=case)
    assert answer.status == 0 and answer.json["format"]
    assert team.ok("consent", "import", "-", stdin=answer.raw_out)
    assert team.collect(asking.consent_id) == VALUES["test_api_key"]
    both = team.call("consent", "approve", "--in", "-", "--passphrase-file", "-", stdin=case, env=there.environment)
    assert both.status == 2 and both.out == ""


def test_an_approval_for_another_consent_is_refused(team: World) -> None:
    """The block of one request under the id of another: exit 5, the cause in the log, nothing approved."""
    there = Elsewhere(team)
    one, two = team.ask(mode="collect"), team.ask(mode="collect", purpose="something else")
    case = team.ok("consent", "export", one.consent_id).json
    answer = there.call("consent", "approve", "--in", there.file("case", case)).json
    done = team.call("consent", "import", there.file("other", {**answer, "consent_id": two.consent_id}))
    assert done.status == 5 and done.out == ""
    assert "vault.refused" in team.kinds()
    assert (team.status(one.consent_id), team.status(two.consent_id)) == ("pending", "pending")
    mixed = there.call("consent", "approve", "--in", there.file("mixed", {**case, "consent_id": two.consent_id}))
    assert mixed.status == 5 and mixed.out == ""
    late = team.ask(mode="collect", purpose="a third")
    answer = there.call("consent", "approve", "--in", there.file("late", team.ok("consent", "export", late.consent_id).json))
    team.ok("consent", "deny", late.consent_id, "--reason", "no")
    done = team.call("consent", "import", there.file("answer", answer.raw_out))
    assert done.status == 4 and team.status(late.consent_id) == "denied"


def nested_changes(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """A document with each of its values changed, one at a time, down to the leaves of lists and objects, and its texts that hold JSON."""
    if isinstance(value, dict):
        for name in value:
            yield from ((where, {**value, name: new}) for where, new in nested_changes(value[name], f"{path}.{name}"))
            yield f"{path} without {name}", {key: item for key, item in value.items() if key != name}
    elif isinstance(value, list):
        yield from [(f"{path} empty", [])] if value else [(f"{path} filled", [{}])]
        for number, item in enumerate(value[:3]):
            yield from ((where, [*value[:number], new, *value[number + 1 :]]) for where, new in nested_changes(item, f"{path}[{number}]"))
    elif isinstance(value, str) and value.startswith("{"):
        yield f"{path} no JSON", value[1:]
        for where, new in nested_changes(json.loads(value), f"{path}:"):
            yield where, json.dumps(new, sort_keys=True, separators=(",", ":"))
    else:
        yield path, byte_changed(value)


def test_every_field_of_an_exported_request_is_bound(team: World) -> None:
    """Whatever is changed in the text (but the counts of what was before): refused there or at the import, never an approval or a traceback."""
    asking = team.ask("high", mode="collect")
    team.approve(asking.consent_id, "gov")
    case = team.ok("consent", "export", asking.consent_id).json
    person, tried = team.person("test_user"), 0
    for what, changed in nested_changes(case):
        if what.startswith(".earlier.") or ".shares[" in what or what == ".grants empty":  # counts, others' parts, and what this signature does not rest on
            continue
        try:
            review = team.m.Review(person, team.m.parse_case(json.dumps(changed)), team.m.clock())
            signed = [review.sign(group, team.m.clock()) for group in review.groups("user")]
            recorded(team, asking.consent_id, signed, {})
            pytest.fail(f"approved with {what} changed")
        except team.m.GraceError:
            tried += 1
    assert tried > 100
    mine = next(number for number, share in enumerate(case["shares"]) if share["member"] == person.keys.fingerprint)
    for name in case["shares"][mine]:
        shares = [{**share, name: byte_changed(share[name])} if number == mine else share for number, share in enumerate(case["shares"])]
        with pytest.raises(team.m.GraceError):
            review = team.m.Review(person, team.m.parse_case(json.dumps({**case, "shares": shares})), team.m.clock())
            review.sign("user", team.m.clock())
    assert team.status(asking.consent_id) == "pending"
    review = team.m.Review(person, team.m.parse_case(json.dumps(case)), team.m.clock())
    assert recorded(team, asking.consent_id, [review.sign("user", team.m.clock())], {})["consent_status"] == "approved"
    assert team.collect(asking.consent_id) == VALUES["high"]


def test_every_field_of_an_approval_is_bound(team: World) -> None:
    """Whatever is changed in the text that comes back: the import refuses, or the value does not open; the true one still counts."""
    there = Elsewhere(team)
    asking = team.ask(mode="collect")
    case = team.ok("consent", "export", asking.consent_id).json
    answer = there.call("consent", "approve", "--in", there.file("case", case)).json
    tried = 0
    for what, changed in nested_changes(answer["grants"]):
        if changed:
            with pytest.raises(team.m.GraceError):
                recorded(team, asking.consent_id, changed, {})
        assert team.status(asking.consent_id) == "pending", what
        tried += 1
    assert tried > 15
    for name in ("format", "consent_id", "grants"):
        for block in ({**answer, name: byte_changed(answer[name])}, {key: value for key, value in answer.items() if key != name}):
            done = team.call("consent", "import", there.file("changed", block))
            assert done.status in (2, 3, 5) and done.out == "" and "Traceback" not in done.err, (name, done.err)
    assert team.json("consent", "import", there.file("true", answer))["consent_status"] == "approved"


SHAPED = {"format": "grace-approval/1", "consent_id": "x", "approver": "y", "grants": [{"document": "{", "wrap": "*", "signature": ""}]}
GARBAGE = {"nothing": b"", "binary": bytes(range(256)), "no object": b"[1, 2]", "deep": b'{"format":' * 5000 + b"1" + b"}" * 5000,
           "huge": b'"' + b"x" * (2 << 20) + b'"', "a number": b"9" * 9000, "twice": b'{"format": "grace-case/1", "format": "grace-case/1"}',
           "lone": b'"\\ud800"', "other": b'{"format": "grace-approval/1"}', "shaped": json.dumps(SHAPED).encode()}  # fmt: skip


@pytest.mark.parametrize("title", GARBAGE)
def test_texts_of_garbage_are_refused(title: str, solo: World) -> None:
    """Neither `approve --in`, nor `import`, nor `approver import` takes it, shows a traceback, or changes anything but the log."""
    path = solo.place.folder / "garbage"
    path.write_bytes(GARBAGE[title])
    for words in (("consent", "import", str(path)), ("consent", "approve", "--in", str(path), *solo.as_("anna")), ("approver", "import", str(path))):
        done = solo.call(*words, "--json")
        assert done.status in (2, 3, 5) and done.out == "" and "Traceback" not in done.err, (words, done.err)
        assert done.error["message"]
    assert solo.fetch("SELECT COUNT(*) FROM consent_grants") == [(0,)]


# ---- using


@pytest.mark.parametrize(("via", "script"), [("env", 'printf %s "$S"'), ("fd", "cat <&$S"), ("stdin", "cat"), ("file", 'cat "$S"')])
def test_a_command_gets_the_value(team: World, via: str, script: str) -> None:
    """By each way, binary-safe but for env; with --json the document comes last and the output on stderr."""
    done = team.place.ok("exec", "--secret", "S=low", "--via", via, "--", "sh", "-c", script)
    assert done.raw_out == VALUES["low"]
    done = team.place.ok("--json", "exec", "--secret", "S=low", "--via", via, "--", "sh", "-c", script)
    assert done.raw_err == VALUES["low"] and done.json["exit_status"] == 0 and done.json["consents"][0]["consent_status"] == "used"
    assert VALUES["low"].decode() not in done.out
    big = bytes(range(256)) * 256
    team.ok("secret", "set", "big", "--risk", "low", "--raw", stdin=big)
    done = team.place.call("exec", "--secret", "S=big", "--via", via, "--", "sh", "-c", script)
    if via == "env":
        assert done.status == 125 and done.out == "" and "NUL" in done.err
    else:
        assert done.status == 0 and done.raw_out == big


def test_several_secrets_and_their_actions(team: World) -> None:
    """Each variable has its own secret; each secret its own consent, with its own action; one --via stdin only."""
    process = team.place.start("exec", "--secret", "A=low", "--secret", "B=test_api_key:deploy", "--", "sh", "-c", 'printf "%s %s" "$A" "$B"')
    (consent_id,) = team.pending()
    shown = team.json("consent", "show", consent_id)
    assert shown["requested_action"] == "deploy" and shown["requested_for"].startswith("run sh -c")
    team.approve(consent_id, "anna")
    assert end_of(process)[:2] == (0, VALUES["low"] + b" " + VALUES["test_api_key"])
    assert {d["requested_action"] for d in team.json("consent", "history")} == {"deploy", "use"}
    assert team.call("exec", "--secret", "A=low", "--secret", "B=low", "--via", "stdin", "--", "cat").status == 2
    for odd in ("A", "1A=low", "GRACE_X=low", "A=", "A=low:", "A=lo w", "A=low:a b"):
        done = team.call("exec", "--secret", odd, "--", "true")
        assert done.status == (0 if odd == "A=low:" else 2), odd


def test_one_denied_secret_of_two_and_the_command_never_runs(team: World) -> None:
    """125; the other request is withdrawn; no value was released."""
    process = team.place.start("exec", "--secret", "A=test_api_key", "--secret", "B=pair", "--", "touch", "ran")
    first, second = team.pending(2)
    team.ok("consent", "deny", first, "--reason", "no")
    until(lambda: process.poll() is not None or team.status(second) != "pending" or team.call("consent", "deny", second, "--reason", "no"), "its end")
    status, out, _ = end_of(process)
    assert (status, out) == (125, b"") and not (team.place.folder / "ran").exists()
    assert team.status(second) in ("denied", "revoked") and "secret.used" not in team.kinds()
    assert team.json("consent", "pending") == []


def test_exit_statuses_of_exec(team: World) -> None:
    """The command's own, 128+n by a signal with --json, 125 for grace's own failures, 126 and 127 before anything is asked."""
    (team.place.folder / "plain").write_text("no program")
    for words, status in ((("sh", "-c", "exit 7"), 7), (("sh", "-c", "exit 125"), 125), (("no-such-program",), 127), (("./plain",), 126), (("/",), 126)):
        for json_ in ((), ("--json",)):
            done = team.call("exec", *json_, "--secret", "S=low", "--", *words)
            assert done.status == status, (words, done.err)
            assert not json_ or status in (126, 127) or done.json["exit_status"] == status
    asked = len(team.json("consent", "history"))
    assert team.call("exec", "--secret", "S=test_api_key", "--", "no-such-program").status == 127
    assert len(team.json("consent", "history")) == asked
    assert team.call("--json", "exec", "--secret", "S=low", "--", "sh", "-c", "kill -TERM $$").status == 143
    assert team.call("exec", "--secret", "S=low", "--", "sh", "-c", "kill -TERM $$").status in (-15, 143)
    for words in (("S=nothing",), ("S=test_api_key", "--timeout", "50ms")):
        done = team.call("exec", "--secret", *words, "--", "touch", "ran")
        assert done.status == 125 and done.out == "" and done.err.startswith("grace: ")
    assert not (team.place.folder / "ran").exists()
    assert team.call("exec", "--secret", "S=low").status == 2


def test_a_value_is_in_no_argument_and_not_in_the_environment_of_grace(team: World) -> None:
    """Looked for by the command itself, as root: in its parent's environment and arguments, in its own arguments, and without env in its own environment."""
    script = """V=$(cat); for f in /proc/$PPID/environ /proc/$PPID/cmdline /proc/$$/cmdline /proc/$$/environ; do
        grep -qF -- "$V" $f && echo "found in $f"; done; printf %s "${#V}\""""
    done = team.ok("--json", "exec", "--secret", "S=low", "--via", "stdin", "--", "sh", "-c", script)
    assert done.err == str(len(VALUES["low"])), done.err
    script = 'grep -qF -- "$S" /proc/$PPID/environ /proc/$PPID/cmdline /proc/$$/cmdline; echo $?'
    assert team.ok("--json", "exec", "--secret", "S=low", "--", "sh", "-c", script).err == "1\n"


def test_a_value_inside_json_needs_reveal(team: World) -> None:
    """Without --reveal a usage error before anything is asked; binary values come in base64."""
    done = team.call("--json", "secret", "get", "low", "--action", "a", "--for", "b")
    assert done.status == 2 and done.out == "" and team.json("consent", "history") == []
    assert team.json("secret", "get", "low", "--action", "a", "--for", "b", "--reveal")["value"] == VALUES["low"].decode()
    team.ok("secret", "set", "binary", "--risk", "low", "--raw", stdin=b"\xff\x00\n")
    document = team.json("secret", "get", "binary", "--action", "a", "--for", "b", "--reveal")
    assert (document["value"], document["value_base64"]) == (None, "/wAK")
    assert team.ok("secret", "get", "binary", "--action", "a", "--for", "b").raw_out == b"\xff\x00\n"


# ---- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m,mode=700", "tmpfs", str(folder)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"a file system may not be mounted here: {done.stderr.decode(errors='replace').strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def filled(folder: Path) -> Path:
    """Use up all that is free, to the last block."""
    ballast = folder / "ballast"
    with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 4096):
            pass
    return ballast


def no_room(world: World) -> bool:
    """Write the smallest change; whether even that is refused."""
    try:
        world.store.write(lambda tx: world.m.record(tx, "test", "no room", {}))
    except world.m.DatabaseError:
        return True
    return False


@pytest.mark.parametrize("step", ["ask", "approve", "collect", "deny", "revoke", "export", "import"])
def test_each_step_on_a_full_disk_fails_whole(team_ground: Place, small_disk: Path, step: str, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit 8 (125 for exec), no traceback, no value; afterwards nothing is half-done, and with room again the step succeeds."""
    for world in made(team_ground, small_disk / "world", module, monkeypatch):
        asking, other = world.ask(mode="collect"), world.ask(mode="collect", purpose="another")
        answer = b""
        if step == "import":
            case = world.ok("consent", "export", asking.consent_id).raw_out
            answer = world.call("consent", "approve", "--in", "-", *world.as_("anna"), stdin=case).raw_out
        if step == "collect":
            world.approve(asking.consent_id, "anna")
        words = {"ask": ("consent", "request", "test_api_key", "--action", "a", "--for", "b"),
                 "approve": ("consent", "approve", asking.consent_id, *world.as_("anna")),
                 "collect": ("secret", "get", "test_api_key", "--action", "test_action", "--for", "b", "--consent", asking.consent_id),
                 "deny": ("consent", "deny", asking.consent_id, "--reason", "no"), "revoke": ("consent", "revoke", asking.consent_id, "--reason", "no"),
                 "export": ("consent", "export", other.consent_id), "import": ("consent", "import", "-")}[step]  # fmt: skip
        before = world.fetch(STATES)
        ballast = filled(small_disk)
        while not no_room(world):
            pass
        done = world.call(*words, stdin=answer)
        assert done.status == 8 and done.out == "" and "Traceback" not in done.err, (done.status, done.err)
        assert [line[:7] for line in done.err.splitlines()[-2:]] == ["grace: ", "hint: f"]
        ballast.unlink()
        assert world.fetch(STATES) == before
        consistent(world)
        world.close()
        again = world.call(*words, stdin=answer)
        assert again.status == 0, again.err
        assert (again.raw_out == VALUES["test_api_key"]) == (step == "collect")
        consistent(world)


@pytest.mark.parametrize("step", ["ask", "approve", "collect", "low"])
def test_a_full_disk_under_the_key_files(team: World, small_disk: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was seen cannot be written down, while the database could: the step is done whole, or not at all with exit 8; a use is not spent for nothing."""
    asking = team.ask(mode="collect")
    if step == "collect":
        team.approve(asking.consent_id, "anna")
    shutil.move(team.place.folder / ".config" / "grace", small_disk / "grace")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(small_disk))
    team.place.environment["XDG_CONFIG_HOME"] = str(small_disk)
    words = {"ask": ("consent", "request", "test_api_key", "--action", "a", "--for", "b"),
             "approve": ("consent", "approve", asking.consent_id, *team.as_("anna")),
             "collect": ("secret", "get", "test_api_key", "--action", "test_action", "--for", "b", "--consent", asking.consent_id),
             "low": ("secret", "get", "low", "--action", "a", "--for", "b")}[step]  # fmt: skip
    before = team.fetch(STATES)
    ballast = filled(small_disk)
    done = team.place.call(*words)
    ballast.unlink()
    assert "Traceback" not in done.err
    if done.status == 0:
        assert team.fetch(STATES) != before and done.raw_out
    else:
        assert done.status == 8 and done.out == "" and team.fetch(STATES) == before, (done.status, done.err)
    consistent(team)
    if step in ("collect", "low") and done.status:
        assert team.place.call(*words).raw_out == VALUES["test_api_key" if step == "collect" else "low"]


# ---- the person at the terminal

PARTS = ["SEALED", "VERIFIED NOW", "REPORTED", "CLAIMED", "BEFORE"]


def prompted(world: World, consent_id: str, *words: str, name: str = "anna", ask: str = "Type yes") -> Any:
    """`consent approve` on a terminal, after the passphrase was typed, at its question."""
    terminal = Terminal(world.place, "consent", "approve", consent_id, "--approver", name, *words, columns=200)
    terminal.until("Passphrase of")
    terminal.type(f"the sentence of {name}\n")
    terminal.until(ask)
    return terminal


def test_the_prompt_shows_what_is_worth_most_first(team: World) -> None:
    """Sealed, verified, reported, claimed, before; a typed yes approves; the passphrase is not echoed."""
    asking = team.ask(mode="collect", user="anna")
    terminal = prompted(team, asking.consent_id)
    terminal.type("yes\n")
    status, text = terminal.end()
    assert status == 0 and team.status(asking.consent_id) == "approved", text
    places = [text.index(part) for part in PARTS]
    assert places == sorted(places) and "the sentence of" not in text
    sealed, verified, reported, claimed, before = (text[a:b] for a, b in zip(places, [*places[1:], None]))  # noqa: B905
    assert "test_api_key" in sealed and "medium" in sealed and team.m.code_of(team.m.hash_of("request", asking.request)) in sealed
    assert f"process   {os.getpid()} of user {os.geteuid()}" in verified
    assert "not verified" in reported and "program" in reported
    assert '"tester"' in claimed and '"a test"' in claimed and '"test_action"' in claimed
    assert "first time" in before
    assert "first time" not in prompted_text(team, team.ask(mode="collect").consent_id)


def prompted_text(world: World, consent_id: str, name: str = "anna") -> str:
    """What the prompt says where there is no terminal, on stderr."""
    done = world.call("consent", "approve", consent_id, *world.as_(name))
    assert done.status == 0, done.err
    return done.err


@pytest.mark.parametrize(("typed", "status"), [("no\n", 5), ("\n", 5), ("y\n", 5), ("yes please\n", 5), ("\x04", 5), ("\x03", 130)])
def test_anything_but_yes_is_a_no(team: World, typed: str, status: int) -> None:
    """Another word, an empty line, Ctrl-D, Ctrl-C: nothing is signed, the request stays pending."""
    asking = team.ask(mode="collect")
    terminal = prompted(team, asking.consent_id)
    terminal.type(typed)
    assert terminal.end()[0] == status
    assert team.status(asking.consent_id) == "pending" and "consent.signed" not in team.kinds()


def test_what_was_typed_ahead_is_thrown_away(team: World) -> None:
    """"yes" before the prompt, at the start and together with the passphrase, answers nothing."""
    asking = team.ask(mode="collect")
    terminal = Terminal(team.place, "consent", "approve", asking.consent_id, "--approver", "anna", columns=200)
    terminal.type("yes\nyes\n")
    terminal.until("Passphrase of")
    terminal.type("the sentence of anna\nyes\nyes\n")
    terminal.until("Type yes")
    terminal.type("no\n")
    assert terminal.end()[0] == 5
    assert team.status(asking.consent_id) == "pending" and "consent.signed" not in team.kinds()


def test_time_out_at_the_prompt_and_a_vanished_terminal_are_a_no(team: World) -> None:
    """Nobody types until the request is over: nothing approved. The terminal is closed: nothing approved."""
    asking = team.ask(mode="collect", ms=1500)
    terminal = prompted(team, asking.consent_id)
    assert terminal.end()[0] in (4, 5)
    assert team.fetch("SELECT COUNT(*) FROM consent_grants") == [(0,)]
    other = team.ask(mode="collect")
    terminal = prompted(team, other.consent_id)
    os.close(terminal.own_end)
    assert terminal.process.wait(LIMIT) != 0
    assert team.status(other.consent_id) == "pending"


def test_high_risk_asks_for_the_code(team: World) -> None:
    """"yes" is no answer there, nor a wrong code, also with a passphrase file; the code is."""
    asking = team.ask("high", mode="collect")
    code = team.m.code_of(team.m.hash_of("request", asking.request))
    for typed in ("yes\n", "\n", f"{code[:-1]}{'0' if code[-1] != '0' else '1'}\n", "\x04"):
        terminal = Terminal(team.place, "consent", "approve", asking.consent_id, *team.as_("gov"), columns=200)
        terminal.until("Type the code")
        terminal.type(typed)
        assert terminal.end()[0] == 5
    assert team.status(asking.consent_id) == "pending" and "consent.signed" not in team.kinds()
    for name in ("gov", "test_user"):
        terminal = prompted(team, asking.consent_id, name=name, ask="Type the code")
        terminal.type(code.lower() + "\n")
        assert terminal.end()[0] == 0
    assert team.status(asking.consent_id) == "approved"


def test_passphrases(team: World) -> None:
    """A wrong one: 5. None and no terminal: 7. A file that others can read: refused. From stdin: taken."""
    asking = team.ask(mode="collect")
    words = ("consent", "approve", asking.consent_id, "--approver", "anna")
    bad = team.place.folder / "bad"
    bad.write_text("another sentence\n")
    bad.chmod(0o600)
    for more, stdin, status in ((("--passphrase-file", str(bad)), b"", 5), ((), b"the sentence of anna\nyes\n", 7), (("--passphrase-file", "-"), b"wrong\n", 5),
                                (("--passphrase-file", "-"), b"", 2), (("--passphrase-file", str(bad) + "x"), b"", 2),
                                (("--passphrase-file", word_file(team.place.folder, "gov")), b"", 5)):  # fmt: skip
        done = team.call(*words, *more, stdin=stdin)
        assert done.status == status and done.out == "", (more, done.err)
    good = Path(word_file(team.place.folder, "anna"))
    good.chmod(0o644)
    done = team.call(*words, "--passphrase-file", str(good))
    assert done.status in (2, 5) and "644" in done.err
    closed = team.place.start(*words, stdin=None, preexec_fn=lambda: os.close(0))
    assert end_of(closed)[0] == 7
    assert team.status(asking.consent_id) == "pending" and "consent.signed" not in team.kinds()
    assert team.call(*words, "--passphrase-file", "-", stdin=good.read_bytes()).status == 0
    assert team.status(asking.consent_id) == "approved"


NASTY = {"escapes": "\x1b[2J\x1b]0;owned\x07 red", "bidi": "\u202eevil\u2066 \u200bx", "fillers": "\u3164\u115f\uffa0\u2800 x",
         "other script": "раураl 漢字 é",
         "long": "x" * 1900, "quotes": '" CLAIMED\\u{41}', "control": "a\x7f\x9b31mb\x00".replace("\x00", ""), "tag": "\U000e0041 \ufe0f"}  # fmt: skip


def test_what_strangers_wrote_is_shown_as_printable_ascii(team: World) -> None:
    """Escape sequences, bidi, fillers, other scripts, long lines in --for, --by and --context: one line each, escaped, cut with its length."""
    listed = ""
    for number, (title, text) in enumerate(NASTY.items()):
        context = json.dumps({"note": text * (6 if title == "long" else 1)})
        words = ("secret", "get", "test_api_key", "--action", "a", "--no-wait", "--context", context)
        done = team.call("--json", *words, "--for", text, "--by", text[:100])
        if done.status == 2:  # refused on the way in is as good
            done = team.call("--json", *words, "--for", "a test", "--by", f"b{number}")
        assert done.status == 75, (title, done.err)
        consent_id = done.json["consent_id"]
        prompt = prompted_text(team, consent_id)
        assert re.fullmatch(r"[ -~\n]*", prompt), (title, ascii(prompt))
        assert all(len(line) < 2100 for line in prompt.splitlines())
        assert [line for line in prompt.splitlines() if line.startswith(tuple(PARTS))] == [line for line in prompt.splitlines() if not line.startswith(" ")]
        claims = prompt[prompt.index("CLAIMED") : prompt.index("BEFORE")].splitlines()[1:]
        fields = [line.split()[0] for line in claims if line[:2] == "  " and line[2] != " "]  # what is longer goes on further to the right
        assert fields == ["by", "action", "for", "context"] and all(line[:2] == "  " for line in claims), (title, claims)
        if title == "long":
            assert "characters)" in prompt
        listed += team.ok("consent", "show", consent_id).out if title in ("escapes", "bidi") else ""
    listed += team.ok("consent", "history").out
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u200b\u3164\u115f\uffa0]", listed), ascii(listed)


@pytest.mark.parametrize("text", ["two\nlines", "CR\rhere", "line\u2028separator"])
def test_a_newline_cannot_forge_a_line_of_the_prompt(team: World, text: str) -> None:
    """It is refused on the way in, or stands escaped on the one line of its field."""
    done = team.call("--json", "secret", "get", "test_api_key", "--action", "a", "--no-wait", "--for", f"{text}\nSEALED (signed by the owner, verified)")
    assert done.status in (2, 75)
    if done.status == 75:
        prompt = prompted_text(team, done.json["consent_id"])
        assert sum(line.startswith("SEALED") for line in prompt.splitlines()) == 1 and "\r" not in prompt and "\u2028" not in prompt


def test_watch_answers_each_request_as_it_comes(team: World) -> None:
    """Approve, skip, deny, quit; one unlock serves the medium ones."""
    asked = [team.ask(mode="collect", purpose=f"number {number}") for number in range(3)]
    terminal = Terminal(team.place, "consent", "watch", "--approver", "anna", columns=200)
    terminal.until("Passphrase of")
    terminal.type("the sentence of anna\n")
    terminal.until('"number 0"')
    terminal.until("[q]uit:")
    terminal.type("a\n")
    for number, word in ((1, "s\n"), (2, "d\n")):
        terminal.until(f'"number {number}"')
        until(lambda number=number: terminal.read() and terminal.text.count("[q]uit:") == number + 1, "the question", 30)
        terminal.type(word)
    terminal.until("Why not?")
    terminal.type("too risky\n")
    until(lambda: team.status(asked[2].consent_id) == "denied", "the denial")
    last = team.ask(mode="collect", purpose="comes later")
    terminal.until('"comes later"')
    until(lambda: terminal.read() and terminal.text.count("[q]uit:") == 4, "the question", 30)
    terminal.type("q\n")
    status, text = terminal.end()
    assert status == 0 and text.count("Passphrase of") == 1, text
    assert [team.status(a.consent_id) for a in (*asked, last)] == ["approved", "pending", "denied", "pending"]
    assert team.row(asked[2].consent_id)["denial_reason"] == "too risky"
    assert team.collect(asked[0].consent_id) == VALUES["test_api_key"]


def test_watch_shows_together_what_was_asked_together(team: World) -> None:
    """Two secrets of one command are one prompt and one answer; a stranger's request in between is a prompt of its own."""
    both = ("exec", "--secret", "A=test_api_key", "--secret", "B=test_api_key:other", "--by", "both", "--user", "anna", "--", "sh", "-c", 'echo "${#A} ${#B}"')
    process = team.place.start(*both)
    team.pending(2)
    stranger = team.place.start("exec", "--secret", "A=test_api_key", "--by", "stranger", "--user", "anna", "--", "sh", "-c", 'echo "${#A}"')
    team.pending(3)
    terminal = Terminal(team.place, "consent", "watch", "--approver", "anna", columns=200)
    terminal.until("Passphrase of anna")
    terminal.type("the sentence of anna\n")
    terminal.until("[q]uit")
    assert "AND asked together with it" in terminal.text and '"other"' in terminal.text and "stranger" not in terminal.text
    terminal.type("a\n")
    terminal.until('"stranger"')
    assert end_of(process)[:2] == (0, b"23 23\n")
    shown = terminal.text.count("SEALED")
    terminal.until("[q]uit: " if terminal.text.count("[q]uit") > 1 else "stranger")
    until(lambda: terminal.read() and terminal.text.count("[q]uit") == 2, "the second question")
    terminal.type("d\n")
    terminal.until("Why not?")
    terminal.type("no\n")
    assert end_of(stranger)[0] == 125 and shown == 2
    terminal.type("\x03")
    terminal.end()


def test_watch_answers_the_rest_when_one_of_several_is_gone(team: World) -> None:
    """Of two requests in one prompt the first is denied elsewhere meanwhile: that is said, and the yes counts for the other. A slip of the key asks again."""
    process = team.place.start("exec", "--secret", "A=test_api_key", "--secret", "B=test_api_key:other", "--user", "anna", "--", "true")
    first, second = team.pending(2)
    terminal = Terminal(team.place, "consent", "watch", "--approver", "anna", columns=200)
    terminal.until("Passphrase of anna")
    terminal.type("the sentence of anna\n")
    terminal.until("[q]uit: ")
    terminal.type("x\n")
    terminal.until("none of the four")
    team.ok("consent", "deny", first, "--reason", "not this one")
    terminal.until("[q]uit: ")
    terminal.type("a\n")
    terminal.until(f"{first} is denied already")
    terminal.until(f"{second}  approved")
    assert end_of(process)[0] == 125
    terminal.type("\x03")
    terminal.end()


def test_an_approver_who_leaves_takes_his_signature_with_him(team: World) -> None:
    """A request that he has signed is void, and can be made anew; his own reason is no word of grace's."""
    waiting = team.ask("high", mode="collect")
    team.approve(waiting.consent_id, "ben", "governance")
    team.ok("approver", "remove", "ben", *team.as_("anna"))
    row = team.row(waiting.consent_id)
    assert row["consent_status"] == "revoked" and row["revocation_reason"] == "ben, who signed it, was removed"
    asking = team.ask(mode="collect")
    for word in ("the secret was changed", "x, who signed it, was removed"):
        done = team.call("consent", "revoke", asking.consent_id, "--reason", word)
        assert done.status == 2 and team.status(asking.consent_id) == "pending"


def test_watch_asks_for_passphrase_and_code_at_high_risk(solo: World) -> None:
    """Unlocked for a medium request, high risk still takes the passphrase afresh and the code, for each of the two roles."""
    medium, high = solo.ask(mode="collect"), solo.ask("high", mode="collect")
    code = solo.m.code_of(solo.m.hash_of("request", high.request))
    terminal = Terminal(solo.place, "consent", "watch", columns=200, env={"LOGNAME": "anna"})
    deadline = time.monotonic() + 30
    seen = {"Passphrase of": 0, "[q]uit:": 0, "Type the code": 0}

    def answer(part: str, text: str) -> None:
        seen[part] += 1
        while terminal.read() and terminal.text.count(part) < seen[part]:
            assert time.monotonic() < deadline, terminal.text
        assert terminal.text.count(part) >= seen[part], terminal.text
        terminal.type(text)

    answer("Passphrase of", "the sentence of anna\n")
    answer("[q]uit:", "a\n")
    until(lambda: solo.status(medium.consent_id) == "approved", "the medium one")
    for _ in range(2):
        answer("Passphrase of", "the sentence of anna\n")
        answer("[q]uit:", "a\n")
        answer("Type the code", f"{code}\n")
    until(lambda: solo.status(high.consent_id) == "approved", "the high one")
    terminal.type("\x03")
    assert terminal.end()[0] == 130
    assert solo.collect(high.consent_id) == VALUES["high"]


def test_watch_without_a_terminal(team: World) -> None:
    """Exit 7 for people; for programs one object a request, and no questions."""
    done = team.call("consent", "watch", *team.as_("anna"))
    assert done.status == 7 and done.out == ""
    process = team.place.start("--json", "consent", "watch", "--approver", "anna")
    asking = team.ask(mode="collect")
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["consent_id"] == asking.consent_id
    process.terminate()
    process.wait(LIMIT)
    assert team.status(asking.consent_id) == "pending"


def test_a_value_is_shown_on_a_terminal_only_with_reveal(team: World) -> None:
    """Without it a usage error, before anything is asked; and the same while --json writes to one."""
    for words in ((), ("--json",)):
        status, text = Terminal(team.place, *words, "secret", "get", "low", "--action", "a", "--for", "b").end()
        assert status == 2 and VALUES["low"].decode() not in text and "--reveal" in text
    assert team.json("consent", "history") == []
    status, text = Terminal(team.place, "secret", "get", "low", "--action", "a", "--for", "b", "--reveal").end()
    assert status == 0 and text == VALUES["low"].decode()


# ---- as a plain user


def test_all_of_it_as_a_plain_user(module: Any) -> None:
    """With nothing of root's view of /proc: ask, approve, use, deny, and a killed requester; other users' key files are refused."""
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("needs root and setpriv, to become somebody else")
    folder = Path(tempfile.mkdtemp(prefix="grace-plain-", dir="/tmp"))
    place = Place(folder)
    plain = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", GRACE)

    def call(*words: str, stdin: bytes = b"") -> Result:
        return Result(subprocess.run([*plain, *words], input=stdin, capture_output=True, env=place.environment, cwd=folder, check=False, timeout=LIMIT))

    def start(*words: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([*plain, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=place.environment,
                                   cwd=folder)  # fmt: skip
        place.processes.append(process)
        return process

    try:
        os.chown(folder, 65534, 65534)
        word = Path(word_file(folder, "anna"))
        os.chown(word, 65534, 65534)
        if call("--version").status != 0:
            pytest.skip("another user cannot run grace from here")
        signer = ("--approver", "anna", "--passphrase-file", str(word))
        assert call("config", "set", "vault.argon2_memory", "67108864").status == 0
        assert call("init", "--name", "anna", *signer[2:]).status == 0
        assert call("secret", "set", "token", "--owner", "anna", *signer[2:], stdin=VALUES["test_api_key"]).status == 0
        script = 'for f in /proc/$PPID/environ /proc/$PPID/mem; do cat $f >/dev/null 2>&1 && echo "$f can be read"; done; printf %s "$T"'
        command = start("--json", "exec", "--secret", "T=token", "--", "sh", "-c", script)
        (one,) = until(lambda: call("--json", "consent", "pending").json, "the request")
        done = call("--json", "consent", "approve", one["consent_id"], *signer)
        assert done.status == 0, done.err
        status, out, err = end_of(command)
        assert status == 0 and json.loads(out)["exit_status"] == 0, err
        assert VALUES["test_api_key"].decode() in err and "can be read" not in err
        seen = call("--json", "consent", "show", one["consent_id"]).json["observed"]
        assert seen["reported"]["uid"] == 65534 == seen["verified"][0]["uid"] and seen["verified"][0]["requester_is_approver_uid"] is True
        killed = start("secret", "get", "token", "--action", "a", "--for", "b")
        (two,) = until(lambda: call("--json", "consent", "pending").json, "the request")
        killed.kill()
        assert end_of(killed)[1] == b""
        assert call("--json", "consent", "pending").json == []
        assert call("consent", "approve", two["consent_id"], *signer).status == 4
        assert call("audit", "verify").status == 0
        (vault,) = (folder / ".config" / "grace").iterdir()
        os.chown(vault / "anna.key", 0, 0)
        os.chmod(vault / "anna.key", 0o644)
        filed = call("--json", "consent", "request", "token", "--action", "a", "--for", "b").json
        done = call("consent", "approve", filed["consent_id"], *signer)
        assert done.status == 5 and done.out == "" and "belongs to user 0" in done.err
        os.chown(vault / "machine.key", 0, 0)
        assert call("consent", "request", "token", "--action", "a", "--for", "b").status == 5
    finally:
        place.close()
        shutil.rmtree(folder)
