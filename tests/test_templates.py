"""Templates: signed beforehand for named secrets, limited in time and uses, and gone when they are removed. And what all
standing consents share: that only what was shown is signed, six processes at once, what doctor says, and no value on the disk.
"""

from __future__ import annotations

import base64
import json
import os
import re
import signal
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import LIMIT
from tests.test_cli import Terminal
from tests.test_consent import FORK
from tests.test_standing import BOTH, DAY, GRANTS, VALUES, Standing, barred, later, rewritten, world

__all__ = ["later", "world"]  # fixtures
TERMS = {"--action": "backup", "--by": "nightly", "--for": "30d", "--uses": "5"}


def words(name: str, *keys: str, **terms: str) -> list[str]:
    """`consent template add` with the usual terms, or others."""
    options = {**TERMS, **{f"--{option.rstrip('_')}": text for option, text in terms.items()}}
    return ["consent", "template", "add", name, *(word for key in keys for word in ("--secret", key)), *(word for item in options.items() for word in item)]


def add(here: Standing, name: str, *keys: str, people: tuple[str, ...] = ("anna",), **terms: str) -> Any:
    return here.json(*words(name, *keys, **terms), *(word for person in people for word in here.as_(person)))


def template(here: Standing, name: str = "t") -> Any:
    """A template as `list` shows it, or None."""
    return next((one for one in here.json("consent", "template", "list") if one["template"] == name), None)


def refresh(here: Standing, name: str, *more: str, people: tuple[str, ...] = ("anna",)) -> Any:
    return here.call("consent", "template", "refresh", name, *more, *(word for person in people for word in here.as_(person)), "--json")


# ---- adding


def test_a_template_opens_what_it_names(world: Standing) -> None:
    """Two secrets, one yes: requests that fit are approved by the template, each use counted with its secret."""
    made = add(world, "t", "job", "second", uses="2")
    assert {(one["secret_key"], one["consent_status"], one["max_uses"]) for one in made["secrets"]} == {("job", "approved", 2), ("second", "approved", 2)}
    assert (made["template"], made["action"], made["requested_by"]) == ("t", "backup", "nightly")
    asking = world.query()
    assert asking.value() == VALUES["job"] and world.row(asking.consent_id)["approval_method"] == "template"
    assert world.use() == VALUES["job"] and world.asks(), "two uses of job are spent"
    assert world.use("second") == VALUES["second"], "those of the other are its own"
    counts = {one["secret_key"]: (one["consent_status"], one["used_count"]) for one in template(world)["secrets"]}
    assert counts == {"job": ("used", 2), "second": ("approved", 1)}
    for one in made["secrets"]:
        assert len(world.uses_of(one["consent_id"])) == counts[one["secret_key"]][1]


def test_a_template_ends_with_its_time(world: Standing, later: Callable[[float], None]) -> None:
    """On the last day it opens, on the next a person is asked."""
    add(world, "t", "job")
    later(30 * DAY - 3_600_000)
    assert world.use() == VALUES["job"]
    later(2 * 3_600_000)
    assert world.asks() and template(world)["secrets"][0]["consent_status"] == "expired"
    assert refresh(world, "t").status == 4


PATTERNS = ["", "*", "a*", "ab*", "**", "abc**", "a*b", "*abc", "?", "ab?", "abc?*", "x" * 10_000, "x" * 10_000 + "*"]


@pytest.mark.parametrize("option", ["--action", "--by"])
def test_odd_patterns_are_refused(world: Standing, option: str) -> None:
    """A star only at the end and behind three characters, no other wildcard, no flood of text."""
    for text in PATTERNS:
        done = world.call(*words("t", "job", **{option.strip("-"): text}), *world.as_("anna"))
        assert done.status == 2 and len(done.err) < 1000, (text[:20], done.err[:200])
    assert world.fetch("SELECT COUNT(*) FROM secret_consent_records") == [(0,)] and world.json("consent", "template", "list") == []


def test_an_action_that_is_no_name_is_refused(world: Standing) -> None:
    """Control characters, spaces, more than 64 characters: a usage error in one line."""
    for text in ("two words", "bell\x07x", "two\nlines", "esc\x1b[31m*", "x" * 65, "\u202ebackup"):
        done = world.place.call(*words("t", "job", action=text), *world.as_("anna"))
        assert done.status == 2 and "internal" not in done.err and not re.search("[\x07\x1b\u202e]", done.err), (text, done.err)


def test_control_characters_in_a_requester_are_shown_as_such(world: Standing) -> None:
    """They are matched as they are, and never reach a terminal."""
    by = "bell\x07 esc\x1b[31m \u202eyln"
    done = world.call(*words("t", "job", by=by + "*"), *world.as_("anna"))
    assert done.status == 0 and not re.search("[\x07\x1b\u202e]", done.err + done.out), done.err
    assert world.use(by=by + "x") == VALUES["job"] and world.asks(by="bell")
    assert not re.search("[\x07\x1b\u202e]", world.ok("consent", "template", "list").out + world.ok("doctor").out)


def test_what_a_template_is_not_for(world: Standing) -> None:
    """High, critical and low risk, an action of higher risk, an unknown secret, no end, no uses: nothing is left of it."""
    for keys, terms, status in (
        (("high",), {}, 2), (("stern",), {}, 2), (("critical",), {}, 2), (("low",), {}, 2), (("job",), {"action": "push"}, 2), (("job", "high"), {}, 2),
        (("job", "nothing"), {}, 3), ((), {}, 2), (("job",), {"user": "nobody"}, 3), (("job",), {"uses": "0"}, 2), (("job",), {"for_": "0s"}, 2),
        (("job",), {"for_": "soon"}, 2),
    ):  # fmt: skip
        options = {name.rstrip("_"): text for name, text in terms.items()}
        done = world.call(*words("t", *keys, **options), *world.as_("anna"))
        assert done.status == status, (keys, terms, done.err)
    for missing in TERMS:
        line = words("t", "job")
        at = line.index(missing)
        assert world.call(*line[:at], *line[at + 2 :], *world.as_("anna")).status == 2, missing
    assert world.lasting() == [] and world.json("consent", "template", "list") == [] and world.asks()


def test_one_name_one_template(world: Standing) -> None:
    """The same name again is a conflict, for other secrets, too, until it was removed."""
    add(world, "t", "job")
    for key in ("job", "second"):
        assert world.call(*words("t", key), *world.as_("anna")).status == 4
    assert len(world.lasting()) == 1 and world.asks("second")
    world.ok("consent", "template", "remove", "t")
    add(world, "t", "second")
    assert world.use("second") == VALUES["second"] and world.asks()


def test_a_template_that_lacks_a_signature_leaves_nothing(world: Standing) -> None:
    """user:2of3 signed by one: refused, also for the secret that one would do for; by two it holds."""
    done = world.call(*words("t", "job", "pair"), *world.as_("anna"))
    assert done.status == 5 and "pair" in done.err, done.err
    assert world.lasting() == [] and template(world) is None and world.asks() and world.asks("pair")
    assert world.fetch("SELECT COUNT(*) FROM consent_grants WHERE wrap IS NOT NULL") == [(0,)]
    add(world, "t", "pair", people=("anna", "ben"))
    assert world.use("pair") == VALUES["pair"]


def test_a_template_over_secrets_with_different_policies(world: Standing) -> None:
    """One secret takes one of its users, the other two: both people sign, and both secrets open."""
    done = world.call(*words("t", "job", "pair"), *world.as_("anna"), *world.as_("ben"))
    assert done.status == 0, done.err
    assert (world.use(), world.use("pair")) == (VALUES["job"], VALUES["pair"])


def test_the_wrong_people_and_words_leave_nothing(world: Standing) -> None:
    """By governance alone, by one person twice, with a wrong passphrase, with a no at the terminal."""
    wrong = world.place.folder / "wrong.txt"
    wrong.write_text("another sentence\n")
    wrong.chmod(0o600)
    for more, status in ((world.as_("gov"), 5), ((*world.as_("anna"), *world.as_("anna")), 2), (("--approver", "anna", "--passphrase-file", str(wrong)), 5),
                         (("--approver", "nobody", "--passphrase-file", str(wrong)), 3)):  # fmt: skip
        assert world.call(*words("t", "job"), *more).status == status, more
    terminal = Terminal(world.place, *words("t", "job", "second"), "--approver", "anna", columns=200)
    terminal.until("Passphrase of")
    terminal.type("the sentence of anna\n")
    terminal.until("Type yes")
    shown = terminal.text
    assert "secret    job " in shown and "secret    second " in shown and "STANDING for 30d, at most 5 times" in shown, "both are shown before the one yes"
    terminal.type("no\n")
    assert terminal.end()[0] == 5
    assert world.lasting() == [] and template(world) is None and world.asks()
    assert "consent.signed" not in world.kinds()


def test_nobody_approves_beforehand_what_is_asked_in_his_name(world: Standing) -> None:
    """anna cannot approve a request by anna; a template whose prefix takes in her name does not do it for her."""
    assert world.call(*words("t", "job", by="anna"), *world.as_("anna")).status == 5
    world.call(*words("u", "job", by="ann*"), *world.as_("anna"))
    assert barred(world, by="anna") != "exit 4"


# ---- removing


def test_removing_stops_the_next_use_and_takes_no_passphrase(world: Standing) -> None:
    """All its secrets at once; final; unknown and removed names are exit 3."""
    add(world, "t", "job", "second")
    add(world, "u", "pair", people=("anna", "ben"))
    assert world.use() == VALUES["job"]
    world.ok("consent", "template", "remove", "t")
    assert world.asks() and world.asks("second") and world.use("pair") == VALUES["pair"]
    assert template(world) is None and template(world, "u") is not None
    assert world.call("consent", "template", "remove", "t").status == 3 == world.call("consent", "template", "remove", "never").status
    assert refresh(world, "t").status == 3
    assert "template.removed" in world.kinds("t") and world.json("audit", "verify")["ok"] is True
    assert world.fetch("SELECT COUNT(*) FROM consent_grants WHERE wrap IS NOT NULL") == [(2,)], "only those of the other template"


def test_revoking_one_secret_of_a_template(world: Standing) -> None:
    """`consent revoke` of one: the other goes on, and a refresh does not bring it back unasked."""
    ids = {one["secret_key"]: one["consent_id"] for one in add(world, "t", "job", "second")["secrets"]}
    world.ok("consent", "revoke", ids["job"], "--reason", "x")
    assert world.asks() and world.use("second") == VALUES["second"]
    assert refresh(world, "t").status == 4 and world.asks()


def test_removing_a_name_ends_all_of_that_name(world: Standing, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one `template add` waits for its passphrase, another one makes the template: whatever holds afterwards, `remove` ends it."""
    unlock = world.m.unlock_all

    def other_first(*given: Any) -> Any:
        monkeypatch.setattr(world.m, "unlock_all", unlock)
        add(world, "t", "job")
        return unlock(*given)

    monkeypatch.setattr(world.m, "unlock_all", other_first)
    world.close()
    world.call(*words("t", "job"), *world.as_("anna"))
    assert world.use() == VALUES["job"]
    world.ok("consent", "template", "remove", "t")
    assert world.lasting() == [] and world.asks()


# ---- refreshing


def test_refresh_after_a_new_value(world: Standing) -> None:
    """A new value ends it for that secret, and is told; a refresh goes on with the uses that were left."""
    before = add(world, "t", "job", "second")
    assert [world.use() for _ in range(2)] == [VALUES["job"]] * 2
    world.rotate("job", b"NEW-value-6bd44-canary")
    world.people.clear()
    assert world.asks() and world.use("second") == VALUES["second"]
    assert template(world)["needs_refresh"] == ["job"]
    done = refresh(world, "t")
    assert done.status == 0 and done.json["needs_refresh"] == [], done.err
    assert {one["secret_key"]: one["max_uses"] for one in done.json["secrets"]} == {"job": 3, "second": 5}
    assert [world.use() for _ in range(3)] == [b"NEW-value-6bd44-canary"] * 3 and world.asks()
    assert abs(instant(template(world)["expires_at"]) - instant(before["expires_at"])) < 60_000
    assert refresh(world, "t").status == 4


def instant(text: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp() * 1000


def test_a_refresh_never_moves_the_end(world: Standing, monkeypatch: pytest.MonkeyPatch) -> None:
    """The person reads for an hour before the yes: the end is the one that was signed first."""
    add(world, "t", "job")
    (first,) = world.fetch("SELECT grant_expires_at FROM secret_consent_records WHERE mode = 'standing'")
    world.rotate("job", b"NEW-value-6bd44-canary")
    real, confirmed = world.m.clock, world.m.confirmed

    def slowly(*given: Any) -> None:
        monkeypatch.setattr(world.m, "clock", lambda: real() + 3_000_000)
        confirmed(*given)

    monkeypatch.setattr(world.m, "confirmed", slowly)
    assert refresh(world, "t").status == 0
    (last,) = world.fetch("SELECT MAX(grant_expires_at) FROM secret_consent_records WHERE mode = 'standing'")
    assert last[0] <= first[0] + 1000


def test_refresh_adds_a_secret(world: Standing) -> None:
    """On the same terms until the same end; one of high risk, or unknown, is refused and changes nothing."""
    add(world, "t", "job")
    for key, status in (("high", 2), ("nothing", 3)):
        assert refresh(world, "t", "--secret", key).status == status
    done = refresh(world, "t", "--secret", "second")
    assert done.status == 0 and {one["secret_key"] for one in done.json["secrets"]} == {"job", "second"}, done.err
    assert world.use("second") == VALUES["second"] and world.asks("second", "restore")
    ends = [row[0] for row in world.fetch("SELECT grant_expires_at FROM secret_consent_records WHERE mode = 'standing'")]
    assert max(ends) - min(ends) < 60_000
    assert template(world)["secrets"][1]["max_uses"] == 5 and world.use() == VALUES["job"]


def test_a_secret_that_became_high_is_not_refreshed(world: Standing) -> None:
    """Its owner raised the risk: the template ends for it."""
    add(world, "t", "job", "second")
    world.set("job", VALUES["job"], "--risk", "high")
    assert world.asks() and refresh(world, "t").status == 2 and world.asks(program="again")
    assert world.use("second") == VALUES["second"]


def test_a_refresh_that_failed_can_be_made_again(world: Standing) -> None:
    """One of two people signs the refresh: refused; then both: it goes on."""
    add(world, "t", "pair", people=("anna", "ben"))
    world.set("pair", b"NEW-value-6bd44-canary")
    world.people.clear()
    assert refresh(world, "t", people=("anna",)).status == 5
    assert template(world) is not None and template(world)["needs_refresh"] == ["pair"]
    done = refresh(world, "t", people=("anna", "ben"))
    assert done.status == 0, done.err
    assert world.use("pair") == b"NEW-value-6bd44-canary"


def test_a_refresh_that_was_killed_can_be_made_again(world: Standing, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at the prompt; the next one signs."""
    add(world, "t", "job", "second")
    world.rotate("job", b"NEW-value-6bd44-canary")
    confirmed = world.m.confirmed
    monkeypatch.setattr(world.m, "confirmed", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    assert refresh(world, "t").status == -9
    monkeypatch.setattr(world.m, "confirmed", confirmed)
    done = refresh(world, "t")
    assert done.status == 0, done.err
    assert world.use() == b"NEW-value-6bd44-canary"


def test_a_refresh_knows_nothing_of_a_removed_template(world: Standing) -> None:
    """A template is removed, another one of its name made for fewer secrets and another action: a refresh signs the terms of the new one."""
    add(world, "t", "second", "job", action="restore", by="old-job", uses="100", **{"for": "300d"})
    world.ok("consent", "template", "remove", "t")
    add(world, "t", "job", uses="5", **{"for": "1d"})
    assert template(world)["action"] == "backup"
    world.rotate("job", b"NEW-value-6bd44-canary")
    done = refresh(world, "t")
    assert done.status == 0, done.err
    assert world.asks(action="restore", by="old-job") and world.use() == b"NEW-value-6bd44-canary"


# ---- attacks


def test_a_template_written_by_hand_opens_nothing(world: Standing) -> None:
    """A standing consent's request with another template name, a prefix and more uses, made approved in its row."""
    add(world, "t", "job")
    row = world.store.one("SELECT * FROM secret_consent_records WHERE mode = 'standing'")
    request = json.loads(row["request"])
    for change in ({"action": "prefix"}, {"by": "prefix"}, {"uses": 500}, {"template": "u"}, {"template": None}, {"follow": True}):
        text = world.m.canonical({**request, "standing": {**request["standing"], **change}}).decode()
        world.attack("UPDATE secret_consent_records SET request = :text, max_uses = :uses", text=text, uses=change.get("uses", 5))
        said = barred(world)  # a template that follows is none that there can be: a person is asked, as if it were not there
        assert said == "asked" if "follow" in change else said not in ("asked", "exit 4"), change
    world.attack("UPDATE secret_consent_records SET request = :text, max_uses = 5", text=row["request"])


def test_a_removed_template_put_back_is_refused(world: Standing) -> None:
    """Its rows, with the wraps, written back: the log holds the end."""
    (one,) = add(world, "t", "job")["secrets"]
    rows = world.rows(one["consent_id"])
    world.ok("consent", "template", "remove", "t")
    world.put_back(rows)
    assert "revoked already" in barred(world)


# ---- what the person was shown


def test_only_a_standing_consent_like_the_request_is_signed_with_it(world: Standing) -> None:
    """A program has filed a standing request of its own that says it began with this one, for another secret: --for does not sign it."""
    asking = world.query("job", mode="collect")
    planted = world.file("second", days=30, origin=asking.consent_id)
    done = world.call("consent", "approve", asking.consent_id, *world.as_("anna"), "--for", "30d")
    assert "second" not in done.err, "the person was not shown the other secret"
    assert world.store.all(GRANTS, id=planted) == [] and world.asks("second")


def waiting_standing(world: Standing, out: Any, **of: Any) -> int:
    """A process that files a standing request and stays."""
    pid = os.fork()
    if pid == 0:
        try:
            world.m._last_id[:] = 0, "", 0
            out.put(world.file(**of))
            signal.pause()
        finally:
            os._exit(0)
    return pid


def test_standing_requests_on_other_terms_are_not_answered_together(world: Standing) -> None:
    """Two processes of one program ask in the same words, one for an hour and one use, one for a year: a yes to the first is none to the second."""
    world.close()
    ids, pids = FORK.Queue(), []
    try:
        pids.append(waiting_standing(world, ids, days=1 / 24, uses=1))
        short = ids.get(timeout=LIMIT)
        pids.append(waiting_standing(world, ids, days=366, follow=True))
        long = ids.get(timeout=LIMIT)
        done = world.call("consent", "approve", short, *world.as_("anna"))
        assert done.status == 0 and world.status(short) == "approved", done.err
        assert "STANDING for 366d" not in done.err, "the person was not shown the other terms"
        assert world.status(long) == "pending"
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def test_a_template_signs_what_was_shown(world: Standing, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the person reads, a program writes another requester and more uses into the filed request: that is not what is signed."""
    shown = world.m.confirmed

    def swapping(review: Any, code: str | None, source: str | None) -> None:
        (row,) = [row for row in world.store.all(world.m.PENDING) if row["mode"] == "standing"]
        request = json.loads(row["request"])
        rewritten(world, row["consent_id"], {**request, "claimed": {**request["claimed"], "by": "attacker"}})
        shown(review, code, source)

    monkeypatch.setattr(world.m, "confirmed", swapping)
    world.close()
    done = world.call("consent", "template", "add", "t", "--secret", "job", "--action", "backup", "--by", "nightly", "--for", "7d", "--uses", "9",
                      *world.as_("anna"))  # fmt: skip
    assert "attacker" not in done.err
    assert world.asks(by="attacker")


def test_an_approver_is_not_held_up_by_the_limit_on_requesters(world: Standing) -> None:
    """A job that asked five times: the answer to the first can be a standing consent."""
    askings = [world.query(mode="collect", action=f"a{number}") for number in range(5)]
    done = world.approval(askings[0].consent_id, "--for", "1d")
    assert (done.status, len(world.lasting())) == (0, 1), done.err


def test_watch_shows_the_terms_before_the_question(world: Standing) -> None:
    """A standing request comes up like any other, with its time, its uses and that nobody is asked again."""
    standing_id = world.file(uses=7, days=30)
    terminal = Terminal(world.place, "consent", "watch", "--approver", "anna", columns=200)
    terminal.until("Passphrase of")
    terminal.type("the sentence of anna\n")
    terminal.until("[q]uit")
    for part in ("STANDING for 30d, at most 7 times", "nobody is asked again", "nobody is asked again"):
        assert part in terminal.text, part
    terminal.type("a\n")
    terminal.until(f"{standing_id}  approved")
    terminal.type("\x03")
    terminal.end()
    assert world.use() == VALUES["job"]


def test_a_program_cannot_flood_with_standing_requests(world: Standing) -> None:
    """Five may wait, as of any other request; and one that is answered by a standing consent waits for nobody."""
    line = ("consent", "request", "job", "--for", "x", "--by", "j", "--standing", "1d")
    assert [world.call(*line, "--action", f"a{number}").status for number in range(6)] == [0, 0, 0, 0, 0, 5]


# ---- six at once


def racing(here: Standing, begin: Any, tasks: Any, results: Any) -> None:
    """A process that asks, with its rivals, for each action that it is given."""
    here.m._last_id[:] = 0, "", 0
    number = 0
    while (action := tasks.get()) is not None:
        begin.wait()
        try:
            asking, number = here.query(action=action, program=f"{os.getpid()} {number}"), number + 1
            if asking.answered:
                results.put(bytes(asking.value()))
            else:
                here.store.write(lambda tx, one=asking.consent_id: here.m.withdraw(tx, one))
                results.put("asked")
        except here.m.GraceError as error:
            results.put(error.exit_code)
    os._exit(0)


def test_of_six_processes_as_many_as_there_are_uses_get_the_value(world: Standing) -> None:
    """Twelve standing consents of one to five uses, six processes on each at once: exactly so many values, the others are asked or told to."""
    begin, results, tasks = FORK.Barrier(6), FORK.Queue(), [FORK.Queue() for _ in range(6)]
    world.vault()
    world.close()  # no connection is carried over into a child
    racers = [FORK.Process(target=racing, args=(world, begin, queue, results), daemon=True) for queue in tasks]
    for racer in racers:
        racer.start()
    try:
        for turn in range(12):
            uses = turn % 5 + 1
            standing_id = world.stand(action=f"a{turn}", uses=uses)
            for queue in tasks:
                queue.put(f"a{turn}")
            got = [results.get(timeout=LIMIT) for _ in racers]
            assert got.count(VALUES["job"]) == uses and all(one in (VALUES["job"], "asked", 4) for one in got), got
            row = world.row(standing_id)
            assert (row["used_count"], row["consent_status"], len(world.uses_of(standing_id))) == (uses, "used", uses)
        for queue in tasks:
            queue.put(None)
    finally:
        for racer in racers:
            racer.join(5)
            racer.kill()
    assert world.json("audit", "verify")["ok"] is True


# ---- what is said of it, and what lies on the disk


def test_doctor_lists_what_the_machine_opens_without_asking(world: Standing) -> None:
    """Each standing consent with its secret, action, requester, uses left and how to take it back; nothing more once it is revoked."""
    standing_id = world.stand(uses=5)
    world.stand("high", "read", "reader", people=BOTH)
    world.use()

    def said() -> list[str]:
        return [json.dumps(finding) for finding in json.loads(world.call("doctor", "--json").out)["findings"] if "standing_consent" in json.dumps(finding)]

    job, high = sorted(said(), key=lambda text: "high" in text)
    for part in ("job", "4 more times", "backup by nightly", f"consent revoke {standing_id}"):
        assert part in job, part
    assert "high" in high and "as often as it comes" in high and "read by reader" in high
    world.ok("consent", "revoke", standing_id, "--reason", "x")
    assert [("high" in text) for text in said()] == [True]


def test_values_are_nowhere_on_the_disk(world: Standing) -> None:
    """After standing consents, templates, uses and rotations no file below holds a value, plain, in base64 or in hex."""
    standing_id = world.stand(follow=True)
    add(world, "t", "second")
    new = b"NEW-value-6bd44-canary"
    assert world.use() == VALUES["job"] and world.use("second") == VALUES["second"]
    world.rotate("job", new)
    assert world.use() == new
    world.ok("consent", "revoke", standing_id, "--reason", "x")
    files = [file for file in world.place.folder.rglob("*") if file.is_file()]
    assert any(file.name == "grace.db" for file in files)
    for value in (*VALUES.values(), new):
        code = base64.b64encode(value).rstrip(b"=")[:-1]
        for file in files:
            data = file.read_bytes()
            assert value not in data and code not in data and value.hex().encode() not in data, (value, file)


def test_statistics_of_answers_leave_out_what_nobody_answered(world: Standing, later: Callable[[float], None]) -> None:
    """How long people took says nothing of requests that a standing consent approved."""
    standing_id = world.file()
    later(60_000)
    world.approve(standing_id, "anna")
    for _ in range(5):
        world.use()
    stats = world.json("consent", "stats")
    assert stats["by_status"]["used"] == 5 and stats["median_answer_ms"] >= 60_000
