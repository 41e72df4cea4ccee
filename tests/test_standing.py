"""Standing consents and templates, and attacks on them: they open what they were signed for, so long and so often, and nothing else.

As in test_consent.py: real commands and real processes, or the program's own functions on the real file; the attacker
edits that file with all triggers out of his way. A month passes by moving the program's clock.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import GRACE, Place, shell
from tests.test_cli import Terminal
from tests.test_consent import Elsewhere, Row, World, byte_changed, copied, copy_rows, dying, put_row, steps_of, word_file

DAY = 86_400_000
PEOPLE = {"anna": ("user", "governance"), "test_user": ("user",), "gov": ("governance",), "ben": ("user", "governance")}
VALUES = {"job": b"JOB-value-2pf61-canary", "second": b"SECOND-value-8sd07-canary", "high": b"HIGH-value-3kq92-canary",
          "stern": b"STERN-value-5vb38-canary", "critical": b"CRITICAL-value-9ng14-canary", "pair": b"PAIR-value-7rt56-canary",
          "rot": b"ROT-value-1xc83-canary", "low": b"LOW-value-4wm29-canary"}  # fmt: skip
OPTIONS = {"job": ("--service", "test", "--action-risk", "push=high", "--action-risk", "delete=critical"), "second": (),
           "high": ("--risk", "high", "--allow-standing"), "stern": ("--risk", "high"), "critical": ("--risk", "critical", "--allow-standing"),
           "pair": ("--policy", "user:2of3"), "rot": ("--rotate-every", "30d", "--rotate-with", "renew"), "low": ("--risk", "low")}  # fmt: skip
GRANTS = "SELECT * FROM consent_grants WHERE consent_id = :id ORDER BY seq"
BOTH = (("test_user", "user"), ("gov", "governance"))
GROUNDS: list[Place] = []


class Standing(World):
    """A vault in which standing consents are given and used."""

    def query(self, key: str = "job", action: str = "backup", by: str = "nightly", user: str | None = None, risk: str | None = None,
              mode: str = "once", program: str | None = None, **reported: Any) -> Any:  # fmt: skip
        """A request of this process, as `secret get` files it; `reported` are changes of what it says of itself."""
        spec = self.m.ask_spec(key, action, "a test", by, user, risk, "{}", 60_000, mode)
        spec["reported"] = {**spec["reported"], **({"exe": program} if program else {}), **reported}
        return self.m.ask_for(self.vault(), spec)

    def use(self, key: str = "job", action: str = "backup", by: str = "nightly", **more: Any) -> bytes:
        """The value, of which nobody was asked."""
        asking = self.query(key, action, by, **more)
        assert asking.answered, "a person was asked"
        return bytes(asking.value())

    def asks(self, key: str = "job", action: str = "backup", by: str = "nightly", **more: Any) -> bool:
        """Whether a person is asked; the question is taken back."""
        asking = self.query(key, action, by, **more)
        if not asking.answered:
            assert self.status(asking.consent_id) == "pending"
            self.store.write(lambda tx: self.m.withdraw(tx, asking.consent_id))
        return not asking.answered

    def file(self, key: str = "job", action: str = "backup", by: str = "nightly", days: float = 31, user: str | None = None, risk: str | None = None,
             **terms: Any) -> str:  # fmt: skip
        """A request for a standing consent; its id."""
        vault, wish = self.vault(), {"uses": None, "action": "exact", "by": "exact", "follow": False, "template": None, "origin": None, "until": None, **terms}
        spec = self.m.standing_spec(vault, self.m.ask_spec(key, action, "a test", by, user, risk, "{}", 600_000), int(days * DAY), wish)
        return str(self.store.write(lambda tx: self.m.file_standing(tx, vault, spec))["consent_id"])

    def stand(self, *of: str, people: tuple[tuple[str, str | None], ...] = (("anna", None),), **more: Any) -> str:
        """A standing consent, approved; its id."""
        standing_id = self.file(*of, **more)
        for name, group in people:
            self.approve(standing_id, name, group)
        assert self.status(standing_id) == "approved"
        return standing_id

    def uses_of(self, standing_id: str) -> list[Row]:
        """The leaves of the uses under a standing consent."""
        return [leaf for leaf in self.leaves() if leaf["kind"] == "secret.used" and leaf["facts"].get("standing") == standing_id]

    def shut(self, cause: str, act: Callable[[], Any] | None = None, exit_code: int = 5) -> None:
        """The act (a use of `job`, if none is named) is refused, gives nothing, and the log has the cause."""
        before = len(self.leaves())
        with pytest.raises(self.m.GraceError) as error:
            (act or self.use)()
        assert error.value.exit_code == exit_code, f"{error.value.exit_code}: {error.value}"
        new = self.leaves()[before:]
        assert "secret.used" not in [leaf["kind"] for leaf in new]
        causes = [str(leaf["facts"]["cause"]) for leaf in new if leaf["kind"] == "vault.refused"]
        assert causes and cause in causes[-1], f"the log says {causes}, not {cause!r}"

    def signed(self, consent_id: str, name: str, group: str | None = None) -> tuple[list[Row], Row]:
        """What an approver signs for a request, not recorded yet."""
        review, seen = self.review(consent_id, name)
        return [review.sign(one, self.m.clock()) for one in review.groups(group)], seen

    def rows(self, standing_id: str) -> dict[str, list[Row]]:
        """All rows of a standing consent."""
        return {"secret_consent_records": [self.row(standing_id)], "consent_grants": self.store.all(GRANTS, id=standing_id),
                "standing_parts": self.store.all("SELECT * FROM standing_parts WHERE consent_id = :id", id=standing_id)}  # fmt: skip

    def put_back(self, rows: dict[str, list[Row]], **changed: Any) -> None:
        """The attacker writes rows that he had copied over what there is now."""
        put_row(self, "secret_consent_records", {**rows["secret_consent_records"][0], **changed})
        for grant in rows["consent_grants"]:
            put_row(self, "consent_grants", grant)
        self.attack("DELETE FROM standing_parts WHERE consent_id = :id", id=rows["secret_consent_records"][0]["consent_id"])
        for part in rows["standing_parts"]:
            self.attack(f"INSERT INTO standing_parts ({', '.join(part)}) VALUES ({', '.join(':' + name for name in part)})", **part)

    def set(self, key: str, value: bytes, *words: str, owner: str = "anna") -> Row:
        """A new version by its owner; what approvers have unlocked here sees it."""
        return dict(self.json("secret", "set", key, "--owner", owner, "--passphrase-file", word_file(self.place.folder, owner), *words, stdin=value))

    def rotate(self, key: str, value: bytes, owner: str = "anna") -> Row:
        return dict(self.json("secret", "rotate", key, "--owner", owner, "--passphrase-file", word_file(self.place.folder, owner), stdin=value))

    def delegated(self, key: str, value: bytes) -> Row:
        """A rotation as a handler makes it."""
        return dict(self.json("secret", "rotate", key, "--delegated", stdin=value))

    def approval(self, standing_id: str, *words: str, name: str = "anna") -> Any:
        return self.call("consent", "approve", standing_id, *self.as_(name), *words, "--json")

    def lasting(self) -> list[str]:
        """The standing consents that are approved."""
        return [row[0] for row in self.fetch("SELECT consent_id FROM secret_consent_records WHERE mode = 'standing' AND consent_status = 'approved'")]


def standing_ground(folder: Path) -> Place:
    """The vault that all tests here copy: four approvers, eight secrets, a handler for rotations; made once."""
    if GROUNDS:
        return GROUNDS[0]
    place = Place(folder)
    word = word_file(folder, "anna")
    place.ok("config", "set", "vault.argon2_memory", "67108864")
    place.ok("init", "--name", "anna", "--passphrase-file", word)
    shell(place, "renew", f'printf RENEWED-%s-canary "$GRACE_ATTEMPT" | {GRACE} secret rotate rot --delegated', "--max-attempts", "1")
    for name, roles in list(PEOPLE.items())[1:]:
        words = [word for role in roles for word in ("--role", role)]
        place.ok("approver", "add", name, *words, "--new-passphrase-file", word_file(folder, name), "--approver", "anna", "--passphrase-file", word)
    for key, options in OPTIONS.items():
        place.ok("secret", "set", key, *options, *(() if key == "low" else ("--owner", "anna", "--passphrase-file", word)), stdin=VALUES[key])
    GROUNDS.append(place)
    return place


@pytest.fixture
def world(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, module: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Standing]:
    """A copy of the vault; functions called in this process find its keys."""
    ground = GROUNDS[0] if GROUNDS else standing_ground(tmp_path_factory.mktemp("ground"))
    place = copied(ground, tmp_path / "standing")
    monkeypatch.setenv("HOME", str(place.folder))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    here = Standing(place, module)
    yield here
    here.close()
    place.close()


@pytest.fixture
def later(module: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Moves the program's clock on by so many milliseconds, in this process and in those forked off it."""
    real, moved = module.clock, [0]
    monkeypatch.setattr(module, "clock", lambda: real() + moved[0])

    def move(ms: float) -> None:
        moved[0] += int(ms)

    return move


# ---- what it is for


def nightly(world: Standing, night: int) -> Any:
    return world.call("secret", "get", "job", "--action", "backup", "--for", f"night {night}", "--by", "nightly", "--no-wait")


def test_a_month_of_nights_on_one_approval(world: Standing, later: Callable[[float], None]) -> None:
    """One yes, thirty nights, thirty uses in the log; on the night after the end a person is asked again."""
    first = world.query(mode="collect")
    done = world.approval(first.consent_id, "--for", "30d")
    assert done.status == 0, done.err
    standing_id = done.json["consent_id"]
    assert (done.json["mode"], done.json["consent_status"], done.json["max_uses"], done.json["used_count"]) == ("standing", "approved", None, 0)
    assert world.collect(first.consent_id) == VALUES["job"], "the first request was approved as well"
    for night in range(30):
        later(DAY / 2 if night == 0 else DAY)
        got = nightly(world, night)
        assert (got.status, got.raw_out) == (0, VALUES["job"]), f"night {night}: {got.err}"
    uses = world.uses_of(standing_id)
    assert len(uses) == 30 == world.row(standing_id)["used_count"] == len({leaf["subject"] for leaf in uses})
    for leaf in uses:
        run = world.json("consent", "show", leaf["subject"]) if leaf is uses[0] else world.row(leaf["subject"])
        assert (run["consent_status"], run["approval_method"], run["standing_id"], run["used_count"]) == ("used", "standing", standing_id, 1)
        assert world.kinds(leaf["subject"]) == ["consent.requested", "consent.approved", "secret.used"]
    events = [event["payload"] for event in world.store.all("SELECT * FROM events WHERE topic = 'secrets.consent.used' AND payload LIKE '%nightly%'")]
    assert sum(json.loads(payload)["standing_id"] == standing_id for payload in events) == 30
    later(DAY)
    assert nightly(world, 31).status == 75
    assert (world.status(standing_id), world.row(standing_id)["expired_reason"]) == ("expired", "grant_ended")
    assert world.store.one(GRANTS, id=standing_id)["wrap"] is None, "what the machine's key could open is gone"
    assert world.row(standing_id)["used_count"] == 30 and world.json("audit", "verify")["ok"] is True


def test_a_revoked_one_stops_the_next_run(world: Standing) -> None:
    """Revoked by its id: no passphrase, final; a person is asked again, and the secret is marked."""
    standing_id = world.stand()
    assert world.use() == VALUES["job"]
    done = world.json("consent", "revoke", standing_id, "--reason", "no more")
    assert (done["consent_status"], done["revocation_reason"]) == ("revoked", "no more")
    assert nightly(world, 1).status == 75 and len(world.uses_of(standing_id)) == 1
    assert "revoked" in world.json("secret", "show", "job")["rotate_reason"]
    assert world.call("consent", "revoke", standing_id, "--reason", "again").status == 4
    assert [grant["wrap"] for grant in world.rows(standing_id)["consent_grants"]] == [None]


def test_revoking_by_secret_and_action(world: Standing) -> None:
    """--secret with --action takes back that action only; without, all of the secret, and of no other."""
    ids = {name: world.stand(*of) for name, of in {"backup": ("job", "backup"), "read": ("job", "read"), "other": ("second", "backup")}.items()}
    assert [row["consent_id"] for row in world.json("consent", "revoke", "--secret", "job", "--action", "read", "--reason", "x")] == [ids["read"]]
    assert world.asks("job", "read") and world.use() == VALUES["job"]
    world.ok("consent", "revoke", "--secret", "job", "--reason", "x")
    assert world.asks() and world.use("second") == VALUES["second"]
    assert world.lasting() == [ids["other"]]


def test_spent_uses_stop_it(world: Standing) -> None:
    """Three uses, then a person is asked; its rows keep nothing that opens."""
    standing_id = world.stand(uses=3)
    assert [world.use() for _ in range(3)] == [VALUES["job"]] * 3
    assert world.asks() and (world.status(standing_id), world.row(standing_id)["used_count"]) == ("used", 3)
    assert len(world.uses_of(standing_id)) == 3 and world.rows(standing_id)["consent_grants"][0]["wrap"] is None
    assert world.call("consent", "revoke", standing_id, "--reason", "late").status == 4


def test_a_use_that_is_not_collected_spends_nothing(world: Standing) -> None:
    """A request approved by it and never redeemed leaves the count alone, and ends with its own time."""
    standing_id = world.stand(uses=1)
    left = world.query(mode="collect")
    assert left.answered and world.row(standing_id)["used_count"] == 0
    assert world.use() == VALUES["job"]
    with pytest.raises(world.m.GraceError):
        world.collect(left.consent_id)
    assert len(world.uses_of(standing_id)) == 1


def test_a_request_left_for_later_is_collected_under_it(world: Standing) -> None:
    """`consent request` is approved at once, `secret get --consent` opens it; after a revocation in between it does not."""
    standing_id = world.stand()
    words = ("job", "--action", "backup", "--for", "x", "--by", "nightly")
    filed = world.json("consent", "request", *words)
    assert (filed["consent_status"], filed["approval_method"], filed["standing_id"]) == ("approved", "standing", standing_id)
    assert world.call("secret", "get", *words, "--consent", filed["consent_id"]).raw_out == VALUES["job"]
    filed = world.json("consent", "request", *words)
    world.ok("consent", "revoke", standing_id, "--reason", "x")
    done = world.call("secret", "get", *words, "--consent", filed["consent_id"])
    assert done.status == 5 and done.raw_out == b"" and len(world.uses_of(standing_id)) == 1


def test_exec_under_a_standing_consent(world: Standing) -> None:
    """A command gets its secrets, and nobody is asked; one secret that is not covered and it waits."""
    world.stand("job", "backup", "tool")
    world.stand("second", "use", "tool")
    words = ("exec", "--by", "tool", "--for", "x", "--timeout", "1s", "--secret", "A=job:backup")
    done = world.place.call(*words, "--secret", "B=second", "--", "sh", "-c", 'printf "%s %s" "$A" "$B"')
    assert (done.status, done.raw_out) == (0, VALUES["job"] + b" " + VALUES["second"]), done.err
    done = world.place.call(*words, "--secret", "B=pair", "--", "echo", "ran")
    assert (done.status, done.raw_out) == (125, b""), done.err


def test_the_shape_of_a_standing_consent(world: Standing) -> None:
    """What programs see of it, and that the person was shown its terms before."""
    first = world.query(mode="collect")
    done = world.call("consent", "approve", first.consent_id, *world.as_("anna"), "--for", "7d", "--uses", "5", "--follow-rotation")
    assert done.status == 0, done.err
    for part in ("STANDING for 7d", "at most 5 times", "goes on when the secret gets a new value", 'action    "backup"', 'by        "nightly"',
                 f"user id {os.geteuid()}"):  # fmt: skip
        assert part in done.err, part
    (standing_id,) = world.lasting()
    shown = world.json("consent", "show", standing_id)
    assert shown["terms"] == {"uses": 5, "action": "exact", "by": "exact", "follow": True, "template": None, "origin": first.consent_id, "until": None}
    assert (shown["max_uses"], shown["single_use"], shown["approval_method"]) == (5, False, "approver")
    row = world.row(standing_id)
    assert abs(row["grant_expires_at"] - row["approved_at"] - 7 * DAY) < 60_000


# ---- who is not meant by it


CONFUSED: dict[str, Row] = {
    "another action": {"action": "restore"}, "the action in capitals": {"action": "Backup"}, "a longer action": {"action": "backup2"},
    "another requester": {"by": "daily"}, "a longer requester": {"by": "nightly2"}, "the requester in capitals": {"by": "Nightly"},
    "a space more": {"by": "nightly "}, "a task of that name": {"by": "nightly", "action": "use", "task": "task-nightly"},
    "another user id": {"uid": 54321}, "another user": {"user": "test_user"}, "a higher risk": {"risk": "high"}, "the highest risk": {"risk": "critical"},
    "an action of higher risk": {"action": "push"}, "another secret": {"key": "second"},
}  # fmt: skip


def test_confused_requesters_are_not_covered(world: Standing) -> None:
    """Whatever differs in secret, action, requester, user, user id or risk: a person is asked, and the grant is not touched."""
    standing_id = world.stand()
    for number, (what, differs) in enumerate(CONFUSED.items()):
        assert world.asks(program=f"program {number}", **differs), what
    assert world.row(standing_id)["used_count"] == 0
    assert world.use(task="task-1") == VALUES["job"], "which task it is for does not matter"


def test_a_standing_consent_for_one_user_is_not_for_others(world: Standing) -> None:
    """Given for requests that name test_user: one that names nobody, or anna, is asked about."""
    world.stand(user="test_user", people=(("test_user", None),))
    assert world.use(user="test_user") == VALUES["job"]
    assert world.asks() and world.asks(user="anna")


def test_an_action_whose_risk_was_raised_is_asked_about(world: Standing) -> None:
    """Its owner raises the action's risk: the standing consent ends, even one that follows new values."""
    world.stand(follow=True)
    world.set("job", VALUES["job"], "--action-risk", "backup=high")
    assert world.asks() and world.lasting() == []


def test_prefixes_only_where_a_star_was_given(world: Standing) -> None:
    """A template for backup* by nightly: longer actions are covered, longer requesters are not."""
    world.ok("consent", "template", "add", "t", "--secret", "job", "--action", "back*", "--by", "nightly", "--for", "7d", "--uses", "9", *world.as_("anna"))
    assert world.use(action="backup") == world.use(action="back") == world.use(action="back-2") == VALUES["job"]
    for differs in ({"action": "bac"}, {"action": "xback"}, {"by": "nightly2"}, {"by": "nightl"}, {"by": "nightly*"}):
        assert world.asks(**differs), differs
    world.ok("consent", "template", "add", "u", "--secret", "second", "--action", "backup", "--by", "job-*", "--for", "7d", "--uses", "9", *world.as_("anna"))
    assert world.use("second", by="job-7") == world.use("second", by="job-") == VALUES["second"]
    for differs in ({"by": "job"}, {"by": "a-job-7"}, {"by": "job-7", "action": "backup2"}):
        assert world.asks("second", **differs), differs


# ---- what there is none for


def test_no_standing_consent_at_critical_or_unmarked_high_risk(world: Standing) -> None:
    """Critical never, high only where the seal allows it: exit 2, and nothing is filed."""
    for key, action in (("critical", "use"), ("stern", "use"), ("job", "push"), ("job", "delete"), ("low", "use")):
        done = world.call("consent", "request", key, "--action", action, "--for", "x", "--by", "j", "--standing", "1d")
        assert done.status == 2, (key, action, done.err)
    assert world.call("consent", "request", "job", "--action", "backup", "--for", "x", "--risk", "critical", "--standing", "1d").status == 2
    asking = world.query("stern", mode="collect")
    done = world.approval(asking.consent_id, "--for", "1d", "--as", "user", name="test_user")
    assert done.status == 2 and "--allow-standing" in done.error["message"]
    waiting = world.query("critical")
    assert world.approval(waiting.consent_id, "--for", "1d", "--as", "user", name="test_user").status == 2
    assert world.fetch("SELECT COUNT(*) FROM secret_consent_records WHERE mode = 'standing'") == [(0,)]
    assert world.fetch("SELECT COUNT(*) FROM consent_grants") == [(0,)]


BAD_WORDS = [("--for", "30d", "--once"), ("--uses", "3"), ("--follow-rotation",), ("--for", "0s"), ("--for", "-1d"), ("--for", "soon"), ("--for", ""),
             ("--for", "1d", "--uses", "0"), ("--for", "1d", "--uses", "-1"), ("--for", "1d", "--uses", "many"), ("--for", "1d", "--uses", "1.5")]  # fmt: skip


def test_nonsense_on_the_command_line_is_refused(world: Standing) -> None:
    """Exit 2 before anything is signed or filed; the same for what `consent request` takes."""
    asking = world.query(mode="collect")
    for words in BAD_WORDS:
        assert world.approval(asking.consent_id, *words).status == 2, words
    for words in (("--uses", "3"), ("--follow-rotation",), ("--standing", "0s"), ("--standing", "x"), ("--standing", "1d", "--uses", "0")):
        assert world.call("consent", "request", "job", "--action", "a", "--for", "x", *words).status == 2, words
    assert world.approval("--for", "1d").status == 2 and world.approval(asking.consent_id, "--for", "1d", "--in", "x").status == 2
    assert world.status(asking.consent_id) == "pending" and len(world.fetch("SELECT 1 FROM secret_consent_records")) == 1


def test_no_standing_consent_lasts_longer_than_366_days(world: Standing, later: Callable[[float], None]) -> None:
    """A longer wish is cut, in what is signed."""
    asking = world.query(mode="collect")
    done = world.approval(asking.consent_id, "--for", "3000d")
    assert done.status == 0, done.err
    row = world.row(done.json["consent_id"])
    assert abs(row["grant_expires_at"] - row["approved_at"] - 366 * DAY) < 60_000
    later(366 * DAY - 3_600_000)
    assert world.use() == VALUES["job"]
    later(2 * 3_600_000)
    assert world.asks()


def test_a_standing_request_of_a_longer_time_written_by_hand_is_cut(world: Standing) -> None:
    """An approver's own program cuts it, whatever the request says."""
    standing_id = world.file()
    request = {**json.loads(world.row(standing_id)["request"]), "grant_for": 5000 * DAY}
    assert world.m.lasts(request) == 366 * DAY


def test_an_expired_secret_does_not_open(world: Standing, later: Callable[[float], None]) -> None:
    """The end of the secret comes before that of the standing consent."""
    world.set("job", VALUES["job"], "--expires", "1h")
    world.people.clear()
    standing_id = world.stand()
    assert world.use() == VALUES["job"]
    later(3_700_000)
    assert barred(world) == "exit 5" and len(world.uses_of(standing_id)) == 1


# ---- a person at the terminal


@pytest.mark.parametrize(("typed", "status"), [("no\n", 5), ("\n", 5), ("\x03", 130)])
def test_without_a_yes_no_standing_consent_is_left(world: Standing, typed: str, status: int) -> None:
    """Anything but yes: the request stays pending, the standing consent is withdrawn, nothing is signed."""
    asking = world.query(mode="collect")
    terminal = Terminal(world.place, "consent", "approve", asking.consent_id, "--approver", "anna", "--for", "30d", columns=200)
    terminal.until("Passphrase of")
    terminal.type("the sentence of anna\n")
    terminal.until("Type yes")
    assert "STANDING for 30d" in terminal.text
    terminal.type(typed)
    assert terminal.end()[0] == status
    assert world.status(asking.consent_id) == "pending" and "consent.signed" not in world.kinds()
    assert [row[0] for row in world.fetch("SELECT consent_status FROM secret_consent_records WHERE mode = 'standing'")] == ["revoked"]


def test_a_yes_at_the_terminal_signs_both(world: Standing) -> None:
    """One yes: the request and the standing consent are approved."""
    asking = world.query(mode="collect")
    terminal = Terminal(world.place, "consent", "approve", asking.consent_id, "--approver", "anna", "--for", "30d", columns=200)
    terminal.until("Passphrase of")
    terminal.type("the sentence of anna\n")
    terminal.until("Type yes")
    terminal.type("yes\n")
    status, text = terminal.end()
    assert status == 0, text
    assert world.status(asking.consent_id) == "approved" and len(world.lasting()) == 1 and world.use() == VALUES["job"]


def test_an_approver_killed_between_the_parts(world: Standing) -> None:
    """At any step: the request is approved or not, and a standing consent opens only when it is signed."""
    person = world.person("anna")

    def approve_dying(number: int) -> int:
        asking = world.query(action=f"a{number}", mode="collect", program=f"program {number}")

        def approve(here: World) -> None:
            vault, row = here.vault(), here.row(asking.consent_id)
            review, seen = here.m.judge(vault, person, row)
            app = type("Quiet", (), {"json": True, "show": lambda *_: None})()
            here.m.approve_from_now_on(app, vault, (review, seen, review.groups(None)), {"grant_for": DAY, "uses": None, "follow": False}, None, None,
                                       word_file(here.place.folder, "anna"))  # fmt: skip

        status = dying(world, number, approve)
        rows = world.fetch("SELECT consent_id, consent_status FROM secret_consent_records WHERE mode = 'standing' AND request LIKE ?", f'%"a{number}"%')
        for standing_id, state in rows:
            signatures = len(world.store.all(GRANTS, id=standing_id))
            assert (state, signatures) in (("pending", 0), ("approved", 1)), (state, signatures)
        opens = [state for _, state in rows] == ["approved"]
        assert opens != world.asks(action=f"a{number}", program=f"again {number}"), rows
        if opens:
            assert world.status(asking.consent_id) == "approved"
        for row in world.store.all(world.m.PENDING):
            world.store.write(lambda tx, open_id=row["consent_id"]: world.m.withdraw(tx, open_id))
        return status

    moments = steps_of(approve_dying, 24)
    died = [approve_dying(moment + 1) for moment in moments]
    assert died.count(9) > 12
    assert world.json("audit", "verify")["ok"] is True


# ---- several people


def test_two_of_three_people(world: Standing) -> None:
    """Both name the same terms, in turn; one alone opens nothing, and the second one's other terms are refused."""
    asking = world.query("pair", mode="collect")
    one = world.approval(asking.consent_id, "--for", "30d", "--uses", "9", name="anna")
    assert one.status == 0 and one.json["consent_status"] == "pending", one.err
    assert world.status(asking.consent_id) == "pending" and world.asks("pair", program="other")
    again = world.approval(asking.consent_id, "--for", "30d", "--uses", "9", name="anna")
    assert again.status == 4, "one person counts once"
    for other in (("--for", "31d", "--uses", "9"), ("--for", "30d", "--uses", "10"), ("--for", "30d"), ("--for", "30d", "--uses", "9", "--follow-rotation")):
        done = world.approval(asking.consent_id, *other, name="ben")
        assert done.status == 4 and "other terms" in done.error["message"], other
    assert world.asks("pair", program="another")
    two = world.approval(asking.consent_id, "--for", "30d", "--uses", "9", name="ben")
    assert (two.status, two.json["consent_status"], two.json["consent_id"]) == (0, "approved", one.json["consent_id"]), two.err
    assert world.collect(asking.consent_id) == world.use("pair") == VALUES["pair"]
    assert len(two.json["approvals"]) == 2 and world.row(two.json["consent_id"])["used_count"] == 1


def test_a_wish_that_is_cut_is_the_same_for_the_second_person(world: Standing) -> None:
    """Two people say --for 400d, which is cut to 366 for the one as for the other."""
    asking = world.query("pair", mode="collect")
    assert world.approval(asking.consent_id, "--for", "400d", name="anna").status == 0
    done = world.approval(asking.consent_id, "--for", "400d", name="ben")
    assert (done.status, len(world.lasting())) == (0, 1), done.err


def test_user_and_governance_for_high_risk(world: Standing) -> None:
    """Both sign the request and the standing consent; each alone opens nothing, and one person is not both."""
    asking = world.query("high", mode="collect")
    one = world.approval(asking.consent_id, "--for", "30d", "--as", "user", name="ben")
    assert (one.status, one.json["consent_status"]) == (0, "pending"), one.err
    both = world.approval(asking.consent_id, "--for", "30d", "--as", "governance", name="ben")
    assert both.status == 5, both.err
    assert world.approval(asking.consent_id, "--for", "30d", "--as", "governance", name="test_user").status == 5
    assert world.asks("high", program="other")
    two = world.approval(asking.consent_id, "--for", "30d", name="gov")
    assert (two.status, two.json["consent_status"], two.json["governance_approved"]) == (0, "approved", True), two.err
    assert world.collect(asking.consent_id) == world.use("high") == VALUES["high"]
    assert {(a["group"], a["approver"]) for a in two.json["approvals"]} == {("user", "ben"), ("governance", "gov")}


def test_one_person_who_is_all_approvers_signs_twice(world: Standing) -> None:
    """While there is one approver: at high risk each role by its own name, the first alone opens nothing."""
    world.ok("secret", "remove", "pair")
    for name in ("test_user", "gov", "ben"):
        world.ok("approver", "remove", name, *world.as_("anna"))
    world.ok("secret", "set", "alone", "--risk", "high", "--allow-standing", *("--owner", *world.as_("anna")[1:]), stdin=b"ALONE")
    asking = world.query("alone", mode="collect")
    assert world.approval(asking.consent_id, "--for", "7d").status == 2, "he has to say for which role"
    assert world.approval(asking.consent_id, "--for", "7d", "--as", "user").status == 0
    assert world.asks("alone", program="other") and world.lasting() == []
    done = world.approval(asking.consent_id, "--for", "7d", "--as", "governance")
    assert (done.status, len(world.lasting())) == (0, 1), done.err
    assert world.use("alone") == world.collect(asking.consent_id) == b"ALONE"


def test_a_first_signature_without_a_second_opens_nothing(world: Standing) -> None:
    """Governance approves the request only: it opens once, and the standing consent that a user began stays without effect."""
    asking = world.query("high", mode="collect")
    began = world.approval(asking.consent_id, "--for", "30d", "--as", "user", name="ben").json["consent_id"]
    assert world.approval(asking.consent_id, name="gov").status == 0
    assert world.collect(asking.consent_id) == VALUES["high"]
    assert world.status(began) == "pending" and world.asks("high", program="other")
    world.attack("UPDATE secret_consent_records SET consent_status = 'approved', approved_at = 1, grant_expires_at = 9e15 WHERE consent_id = :id", id=began)
    world.shut("signatures of governance are missing", lambda: world.use("high", program="again"))


def test_one_person_in_two_roles_names_each(world: Standing) -> None:
    """ben may not sign for both groups of a secret with more than one approver, whichever comes first."""
    standing_id = world.file("high")
    world.approve(standing_id, "ben", "governance")
    with pytest.raises(world.m.GraceError) as error:
        world.approve(standing_id, "ben", "user")
    assert error.value.exit_code == 5 and world.status(standing_id) == "pending"
    world.approve(standing_id, "test_user", "user")
    assert world.use("high") == VALUES["high"]


def test_a_standing_request_goes_to_another_machine_and_back(world: Standing) -> None:
    """Exported, approved there with the terms shown, imported; from then on it opens. The text holds nothing that opens it."""
    there = Elsewhere(world)
    filed = world.json("consent", "request", "job", "--action", "backup", "--for", "x", "--by", "nightly", "--standing", "30d", "--uses", "4")
    assert (filed["mode"], filed["consent_status"], filed["max_uses"]) == ("standing", "pending", 4)
    case, answer = str(there.folder / "case"), str(there.folder / "answer")
    world.ok("consent", "export", filed["consent_id"], "--approver", "test_user", "--out", case)
    done = there.call("consent", "approve", "--in", case, "--out", answer, "--code", filed["code"])
    assert done.status == 0 and "STANDING for 30d, at most 4 times" in done.err, done.err
    assert there.call("consent", "approve", "--in", case, "--for", "1d").status == 2
    assert VALUES["job"] not in Path(case).read_bytes() + Path(answer).read_bytes()
    assert world.asks()
    assert world.json("consent", "import", answer)["consent_status"] == "approved"
    assert [world.use() for _ in range(4)] == [VALUES["job"]] * 4 and world.asks()
    assert world.call("consent", "import", answer).status == 4


def test_a_changed_exported_standing_request_is_refused(world: Standing) -> None:
    """Any other terms in the text than in the database: the approval is not taken in."""
    there = Elsewhere(world)
    standing_id = world.file(uses=4)
    case = world.json("consent", "export", standing_id, "--approver", "test_user")
    request = json.loads(case["request"])
    for number, change in enumerate(({"uses": 40}, {"action": "prefix"}, {"follow": True}, {"by": "prefix"}, {"template": "t"})):
        text = world.m.canonical({**request, "standing": {**request["standing"], **change}}).decode()
        path, out = there.file("case", {**case, "request": text}), str(there.folder / f"answer-{number}")
        assert there.call("consent", "approve", "--in", path, "--out", out).status == 5, change
        leaf = {**json.loads(case["leaf"])}
        leaf["facts"] = {**leaf["facts"], "request": world.m.hash_of("request", json.loads(text))}
        path = there.file("case", {**case, "request": text, "leaf": world.m.canonical(leaf).decode()})
        done = there.call("consent", "approve", "--in", path, "--out", out)
        assert done.status in (0, 5), done.err
        if done.status == 0:
            assert world.call("consent", "import", out).status == 5, change
    assert world.status(standing_id) == "pending" and world.asks()


# ---- rows put back, forced and forged


def barred(world: Standing, **of: Any) -> str:
    """The value is not had: "asked" where a person is asked, else the cause that the log has."""
    before = len(world.leaves())
    try:
        asking = world.query(**of)
        if not asking.answered:
            world.store.write(lambda tx: world.m.withdraw(tx, asking.consent_id))
            return "asked"
        asking.value()
    except world.m.GraceError as error:
        new = world.leaves()[before:]
        assert "secret.used" not in [leaf["kind"] for leaf in new]
        return str(next((leaf["facts"]["cause"] for leaf in new if leaf["kind"] == "vault.refused"), f"exit {error.exit_code}"))
    return pytest.fail(f"it opened: {of}")


@pytest.mark.parametrize("follow", [False, True])
@pytest.mark.parametrize("end", ["used", "revoked", "expired"])
def test_rows_of_an_ended_one_put_back_are_refused(world: Standing, later: Callable[[float], None], end: str, follow: bool) -> None:
    """Copied while it held, written back after its end, with its parts: the log knows how often it was used and that it ended."""
    standing_id = world.stand(uses=2, follow=follow)
    value = VALUES["job"]
    if follow:
        value = b"JOB-value-after-5hk20-canary"
        world.rotate("job", value)
        assert world.rows(standing_id)["standing_parts"]
    rows = world.rows(standing_id)
    assert world.use() == value
    if end == "used":
        world.use()
    elif end == "revoked":
        world.ok("consent", "revoke", standing_id, "--reason", "x")
    else:
        later(32 * DAY)
    assert world.asks() and world.status(standing_id) == end
    used = world.row(standing_id)["used_count"]
    assert used == len(world.uses_of(standing_id)) == (2 if end == "used" else 1)
    for count in (0, used):
        world.put_back(rows, grant_expires_at=9_000_000_000_000, used_count=count)
        assert world.status(standing_id) == "approved" and any(grant["wrap"] for grant in world.rows(standing_id)["consent_grants"]) != follow
        said = barred(world)
        expected = {"revoked": "it was revoked already", "expired": "it was expired already", "used": f"used {used} times, and its row {count}"}[end]
        assert expected in said or (end == "used" and count == used and said == "exit 4"), said
    assert len(world.uses_of(standing_id)) == used


def test_a_later_end_written_into_the_row_is_not_had(world: Standing, later: Callable[[float], None]) -> None:
    """Before anybody swept it up, the attacker moves the end of its row: the end is in what was signed."""
    standing_id = world.stand(days=2)
    world.attack("UPDATE secret_consent_records SET grant_expires_at = 9000000000000")
    later(DAY)
    assert world.use() == VALUES["job"]
    later(DAY)
    assert barred(world) == "a grant has expired" and len(world.uses_of(standing_id)) == 1


def test_the_whole_database_put_back(world: Standing) -> None:
    """A copy from before the last use, or before the revocation: rolled back, and nothing above low opens."""
    standing_id = world.stand(uses=2)
    world.use()
    copy = world.place.folder / "copy.db"
    copy_rows(world.db, copy)
    world.ok("consent", "revoke", standing_id, "--reason", "x")
    world.close()
    for name in ("grace.db-wal", "grace.db-shm"):
        (world.place.folder / name).unlink(missing_ok=True)
    shutil.copyfile(copy, world.db)
    assert "rolled back" in barred(world)
    assert world.query("low", "use").value() == VALUES["low"]


def test_a_log_without_the_end_is_a_log_that_was_cut(world: Standing) -> None:
    """The row put back and the leaves from the revocation on deleted: the machine has seen more."""
    standing_id = world.stand()
    rows, size = world.rows(standing_id), world.m.audit_head(world.store)[0]
    world.ok("consent", "revoke", standing_id, "--reason", "x")
    world.put_back(rows)
    world.attack("DELETE FROM audit_log WHERE seq > :size", size=size)
    assert "rolled back" in barred(world)


@pytest.mark.parametrize("key", ["job", "high", "pair"])
def test_a_status_forced_by_hand_opens_nothing(world: Standing, key: str) -> None:
    """A standing request that nobody, or one of two, has signed, made approved in its row."""
    standing_id = world.file(key)
    forced = "UPDATE secret_consent_records SET consent_status = 'approved', approved_at = 1, grant_expires_at = 9000000000000 WHERE consent_id = :id"
    world.attack(forced, id=standing_id)
    world.shut("signatures of", lambda: world.use(key))
    pending = "UPDATE secret_consent_records SET consent_status = 'pending', approved_at = NULL, grant_expires_at = NULL WHERE consent_id = :id"
    world.attack(pending, id=standing_id)
    if key != "job":
        world.approve(standing_id, "test_user", "user")
        world.attack(forced, id=standing_id)
        world.shut("signatures of", lambda: world.use(key))


def test_a_denied_one_forced_by_hand_opens_nothing(world: Standing) -> None:
    """The log holds the denial."""
    standing_id = world.file()
    signed, _ = world.signed(standing_id, "anna")
    world.ok("consent", "deny", standing_id, "--reason", "no")
    insert_grants(world, standing_id, signed)
    world.attack("UPDATE secret_consent_records SET consent_status = 'approved', denied_at = NULL, approved_at = 1, grant_expires_at = 9000000000000")
    world.shut("it was denied already")


def test_a_grant_that_names_a_leaf_which_is_not_there(world: Standing) -> None:
    """What was shown to the approver is cut off the log before anybody else has seen it: his signature alone opens nothing."""
    standing_id = world.file()
    signed, _ = world.signed(standing_id, "anna")
    world.attack("DELETE FROM audit_log WHERE seq = (SELECT MAX(seq) FROM audit_log)")
    insert_grants(world, standing_id, signed)
    world.attack("UPDATE secret_consent_records SET consent_status = 'approved', approved_at = 1, grant_expires_at = 9000000000000")
    world.shut("names a leaf that is not in the audit log")


def insert_grants(world: Standing, consent_id: str, signed: list[Row]) -> None:
    for item in signed:
        grant, wrap = json.loads(item["document"]), world.m.from_b64(item["wrap"], "x") if item["wrap"] is not None else None
        world.attack(world.m.PUT_GRANT, id=consent_id, group=grant["group"], approver=grant["approver"], document=item["document"], wrap=wrap,
                     wrap_hash=world.m.wrap_hash(wrap), signature=world.m.from_b64(item["signature"], "x"), now=1)  # fmt: skip


def test_a_request_pointed_at_a_grant_that_does_not_cover_it(world: Standing) -> None:
    """standing_id and the status of a pending request set by hand: another action, risk, secret, requester, or no standing consent at all."""
    grants = {"job": world.stand(), "second": world.stand("second")}
    once = world.query("pair", mode="collect").consent_id
    pending = world.file("second", "read")
    for number, (differs, standing_id, cause) in enumerate((
        ({"action": "restore"}, grants["job"], "does not cover"), ({"action": "push"}, grants["job"], "does not cover"),
        ({"by": "daily"}, grants["job"], "does not cover"), ({"risk": "high"}, grants["job"], "does not cover"), ({"uid": 7}, grants["job"], "does not cover"),
        ({"action": "restore"}, grants["second"], "for something else"), ({"key": "pair", "action": "read"}, once, "was not approved"),
        ({"key": "second", "action": "read"}, pending, "was not approved"),
    )):  # fmt: skip
        asking = world.query(mode="collect", program=f"program {number}", **differs)
        world.attack("""UPDATE secret_consent_records SET consent_status = 'approved', approval_method = 'standing', approved_at = 1,
            grant_expires_at = 9000000000000, standing_id = :standing_id WHERE consent_id = :id""", id=asking.consent_id, standing_id=standing_id)  # fmt: skip
        if cause == "was not approved":
            with pytest.raises(world.m.GraceError):
                world.collect(asking.consent_id)
            assert "secret.used" not in world.kinds(asking.consent_id)
        else:
            world.shut(cause, lambda one=asking.consent_id: world.collect(one))
    assert world.use() == VALUES["job"], "the grants themselves still hold"
    assert not world.uses_of(grants["second"])


def canonical_changes(world: Standing, document: Row, parts: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """A document with each field changed or dropped, and each field of these parts of it."""
    for name in document:
        yield f"{name} changed", world.m.canonical({**document, name: byte_changed(document[name])}).decode()
        yield f"{name} dropped", world.m.canonical({key: value for key, value in document.items() if key != name}).decode()
    for part in parts:
        for name, value in document[part].items():
            yield f"{part}.{name} changed", world.m.canonical({**document, part: {**document[part], name: byte_changed(value)}}).decode()


def test_every_field_of_a_standing_request_is_bound(world: Standing) -> None:
    """Each field, and each term, changed in the row of an approved one: asked about or refused with the cause; never opened."""
    standing_id = world.stand(uses=5)
    rows, said = world.rows(standing_id), []
    request = json.loads(rows["secret_consent_records"][0]["request"])
    changes = dict(canonical_changes(world, request, ("claimed", "reported", "standing", "ephemeral")))
    for name, value in {"uses": 50, "action": "prefix", "by": "prefix", "follow": True, "template": "t", "origin": standing_id, "until": 1}.items():
        changes[f"term {name}"] = world.m.canonical({**request, "standing": {**request["standing"], name: value}}).decode()
    for what, text in changes.items():
        world.put_back(rows, request=text, **({"max_uses": 50} if what == "term uses" else {}))
        said.append((what, barred(world)))
    assert len(said) > 50
    silent = {what for what, cause in said if cause == "asked"}
    terms = {f"term {name}" for name in ("uses", "follow", "template", "origin")}  # others are none that a request can have
    assert not silent & {*terms, "grant_for changed", "nonce changed"}, silent
    world.put_back(rows)
    assert world.use() == VALUES["job"]


def test_the_columns_of_a_standing_row_are_bound(world: Standing) -> None:
    """Uses, version, mode and process written into the row only."""
    standing_id = world.stand(uses=3)
    world.use()
    rows = world.rows(standing_id)
    for change in ({"max_uses": 4}, {"max_uses": None}, {"used_count": 0}, {"used_count": 2}, {"secret_version": 2}, {"mode": "collect"}, {"pid": 1},
                   {"boot_id": "x"}, {"secret_key": "second"}):  # fmt: skip
        world.put_back(rows, **change)
        said = barred(world)
        assert said == "asked" if set(change) & {"mode", "secret_key"} else said not in ("asked", "exit 4"), (change, said)
    world.put_back(rows)
    assert world.use() == VALUES["job"]


def test_every_field_of_a_standing_grant_is_bound(world: Standing) -> None:
    """Each field of what was signed, the wrap, its hash and the signature."""
    standing_id = world.stand("high", people=BOTH)
    rows = world.rows(standing_id)
    grants = rows["consent_grants"]
    for number, grant in enumerate(grants):
        changes = [(what, {"document": text}) for what, text in canonical_changes(world, json.loads(grant["document"]))]
        other = grants[1 - number]
        mine = [name for name in ("signature", "wrap", "wrap_hash", "approver") if grant[name] is not None]
        changes += [(f"{name} changed", {name: byte_changed(grant[name])}) for name in mine]
        changes += [(f"the other's {name}", {name: other[name]}) for name in ("signature", "document", "wrap")]
        changes += [("no wrap", {"wrap": None}), ("no hash", {"wrap_hash": None}), ("neither", {"wrap": None, "wrap_hash": None})]
        for what, change in changes:
            put_row(world, "consent_grants", {**grant, **change})
            assert barred(world, key="high") not in ("asked", "exit 4"), what
        put_row(world, "consent_grants", grant)
    assert world.use("high") == VALUES["high"]
    world.attack("DELETE FROM consent_grants WHERE seq = :seq", seq=grants[1]["seq"])
    assert "missing" in barred(world, key="high")


def test_wraps_of_one_do_not_open_under_another(world: Standing) -> None:
    """What a grant for one action holds, copied into the row of another whose own was removed, or whose uses are spent."""
    one, other = world.stand(action="backup"), world.stand(action="read", uses=1)
    world.use(action="read")
    mine, theirs = world.rows(one)["consent_grants"][0], world.rows(other)["consent_grants"][0]
    assert theirs["wrap"] is None
    fresh = world.stand(action="write")
    goal = world.rows(fresh)["consent_grants"][0]
    for names in (("wrap",), ("wrap", "wrap_hash"), ("wrap", "wrap_hash", "document"), ("wrap", "wrap_hash", "document", "signature")):
        put_row(world, "consent_grants", {**goal, **{name: mine[name] for name in names}})
        assert barred(world, action="write") not in ("asked", "exit 4"), names
    put_row(world, "consent_grants", goal)
    assert world.use(action="write") == VALUES["job"]


def rewritten(world: Standing, consent_id: str, request: Row) -> None:
    """The attacker writes another request into a pending row, and the log anew from there on, before anybody has seen it."""
    text = world.m.canonical(request).decode()
    world.attack("UPDATE secret_consent_records SET request = :text WHERE consent_id = :id", text=text, id=consent_id)
    rows = world.store.all("SELECT seq, leaf, hash FROM audit_log ORDER BY seq")
    head, changed = "", False
    for row in rows:
        leaf = json.loads(row["leaf"])
        if leaf["subject"] == consent_id and leaf["kind"] in ("consent.requested", "consent.shown"):
            leaf["facts"]["request"], changed = world.m.hash_of("request", request), True
        if changed:
            leaf["previous"] = head
            world.attack("UPDATE audit_log SET leaf = :leaf, hash = :hash WHERE seq = :seq", leaf=world.m.canonical(leaf).decode(),
                         hash=world.m.hash_of("audit", leaf), seq=row["seq"])  # fmt: skip
        head = world.m.hash_of("audit", leaf)


def test_another_key_in_the_request_is_never_wrapped_to(world: Standing) -> None:
    """The attacker's own key in the place of the machine's, with the log rewritten to match: no approver signs that."""
    standing_id = world.file()
    request = json.loads(world.row(standing_id)["request"])
    rewritten(world, standing_id, {**request, "ephemeral": world.m.Keys.new().public})
    world.shut("another key than this machine's", lambda: world.approve(standing_id, "anna"))
    rewritten(world, standing_id, request)
    world.approve(standing_id, "anna")
    assert world.use() == VALUES["job"]


@pytest.mark.parametrize("change", [{"mode": "collect"}, {"mode": "once"}, {"format": "grace-request/1"}, {"risk": "low"}, {"risk": "critical"}])
def test_an_odd_standing_request_is_not_signed(world: Standing, change: Row) -> None:
    """Another mode, format or risk, with the log rewritten to match."""
    standing_id = world.file()
    rewritten(world, standing_id, {**json.loads(world.row(standing_id)["request"]), **change})
    with pytest.raises(world.m.GraceError) as error:
        world.approve(standing_id, "anna")
    assert error.value.exit_code == 5 and "consent.signed" not in world.kinds()


ODD_TERMS: dict[str, tuple[Row, Row]] = {
    "all actions of all requesters": ({"action": "prefix", "by": "prefix", "template": "t", "uses": 5}, {"action": "", "by": ""}),
    "a short stem": ({"action": "prefix", "template": "t", "uses": 5}, {"action": "b"}), "a template without uses": ({"template": "t"}, {}),
    "a template that follows": ({"template": "t", "uses": 5, "follow": True}, {}), "a prefix outside a template": ({"action": "prefix"}, {}),
}  # fmt: skip


@pytest.mark.parametrize("what", [*ODD_TERMS])
def test_terms_that_no_command_writes_are_not_signed(world: Standing, what: str) -> None:
    """A program files them with the log to match: prefixes of nothing, outside of templates, templates without uses, or that follow."""
    terms, claimed = ODD_TERMS[what]
    standing_id = world.file()
    request = json.loads(world.row(standing_id)["request"])
    wide = {**request, "standing": {**request["standing"], **terms}, "claimed": {**request["claimed"], **claimed}}
    rewritten(world, standing_id, wide)
    world.attack("UPDATE secret_consent_records SET max_uses = :uses WHERE consent_id = :id", uses=terms.get("uses"), id=standing_id)
    world.shut("", lambda: world.approve(standing_id, "anna"))


def test_signatures_of_the_wrong_people_do_not_count(world: Standing) -> None:
    """By a user-only approver for governance, by a stranger, by the machine, by one person twice: refused with the cause."""
    standing_id = world.file("high")
    (by_user,), _ = world.signed(standing_id, "test_user", "user")
    grant = json.loads(by_user["document"])
    keys = world.person("test_user").keys
    header = json.loads(world.store.one(world.m.NEWEST_VERSION, key="high")["header"])
    gov = next(group for group in header["policy"]["all"] if group["group"] == "governance")
    for signer, approver in ((keys, keys.fingerprint), (keys, gov["members"][0]), (world.m.Keys.new(), gov["members"][0]),
                             (world.vault().machine, gov["members"][0]), (world.vault().machine, world.vault().machine.fingerprint)):  # fmt: skip
        wrap = world.m.from_b64(by_user["wrap"], "x")
        forged = {**grant, "group": "governance", "approver": approver, "index": 1}
        text = world.m.statement("grant-signature", [forged, world.m.wrap_hash(wrap)])
        signed = {"document": world.m.canonical(forged).decode(), "wrap": by_user["wrap"], "signature": world.m.b64(signer.sign(text))}
        world.attack("DELETE FROM consent_grants")
        insert_grants(world, standing_id, [by_user, signed])
        world.attack("UPDATE secret_consent_records SET consent_status = 'approved', approved_at = 1, grant_expires_at = 9000000000000")
        assert re.search("may not sign|signature of a grant|another part", barred(world, key="high"))


def test_an_approver_who_was_removed_signs_no_more(world: Standing) -> None:
    """What he signed before does not open after he is gone."""
    world.stand(people=(("ben", None),))
    assert world.use() == VALUES["job"]
    world.ok("approver", "remove", "ben", *world.as_("anna"))
    world.people.clear()
    assert barred(world) == "asked" and world.lasting() == []


def test_after_its_approver_is_gone_a_person_is_asked_again(world: Standing) -> None:
    """It has ended: the nightly job asks, as on its first day, and nothing lists it as open."""
    world.stand(people=(("ben", None),))
    world.ok("approver", "remove", "ben", *world.as_("anna"))
    world.people.clear()
    assert barred(world) == "asked"


def test_what_one_covers_ends_with_it(world: Standing) -> None:
    """Two requests approved by a standing consent of one use: the second ends with the use of the first; taken back, it takes all with it."""
    standing_id = world.stand(uses=1)
    first, second = (world.query("job", mode="collect").consent_id for _ in range(2))
    assert world.status(first) == world.status(second) == "approved" and world.collect(first) == VALUES["job"]
    assert (world.status(standing_id), world.status(second), world.row(second)["expired_reason"]) == ("used", "expired", "grant_ended")
    assert world.asks()
    again = world.stand()
    covered = world.query("job", mode="collect").consent_id
    world.ok("consent", "revoke", again, "--reason", "it is over")
    assert (world.status(covered), world.row(covered)["revocation_reason"]) == ("revoked", "it is over")


def test_a_made_up_user_id_is_no_line_of_the_prompt(world: Standing) -> None:
    """What a program reports of itself has its types: text in the place of a number is refused, and nothing of it is shown."""
    vault, m = world.vault(), world.m
    terms = {"uses": None, "action": "exact", "by": "exact", "follow": False, "template": None, "origin": None, "until": None}
    spec = m.standing_spec(vault, m.ask_spec("job", "backup", "a test", "nightly", None, None, "{}", 600_000), DAY, terms)
    spec["reported"]["uid"] = "0\x1b[2J\n  code      AAAA-AAAA-AAAA"
    planted = world.store.write(lambda tx: m.file_standing(tx, vault, spec))["consent_id"]
    done = world.call("consent", "approve", planted, *world.as_("anna"))
    assert done.status == 5 and "AAAA" not in done.err + done.out and "\x1b" not in done.err
    assert world.store.all(GRANTS, id=planted) == []


def test_no_requester_writes_lines_of_its_own_into_the_prompt(world: Standing) -> None:
    """Blanks up to the edge of the terminal and a made-up code behind them: every line has its mark and fits into eighty columns."""
    by = "nightly" + " " * 60 + "  code      AAAA-BBBB-CCCC" + " " * 20 + "x"
    done = world.call("consent", "approve", world.file("job", "backup", by), *world.as_("anna"))
    assert done.status == 0, done.err
    lines = done.err.splitlines()
    assert [line for line in lines if len(line) > 80 and not line.startswith("  below ")] == []
    assert not [line for line in lines if line.startswith("  code      AAAA")]
