"""What the parts of consent do to each other: rules and tasks, rotations and lists of approvers that were put back, a new machine
key and what the old one was to open, and requests that programs plant beside those of others.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.test_consent import Row, end_of, word_file
from tests.test_standing import DAY, VALUES, Standing, later, world

__all__ = ["later", "world"]  # fixtures
NEW = [f"NEW-value-{number}-2hb71-canary".encode() for number in range(5)]
ANY = dict.fromkeys(("secret", "service", "action", "by", "risk", "hours", "group"))


def parked(world: Standing, *secrets: str) -> tuple[str, dict[str, Row]]:
    """A task of a handler with these secrets, after a daemon has asked for them; its id, and the consents by secret."""
    world.place.handler("work", *(word for number, secret in enumerate(secrets) for word in ("--secret", f"S{number}={secret}:upload")), "--", "true")
    task_id = world.place.submit("put it online", "--handler", "work")[1]
    world.place.ok("daemon", "--once")
    rows = world.store.all("SELECT * FROM secret_consent_records WHERE task_id = :id", id=task_id)
    assert sorted(row["secret_key"] for row in rows) == sorted(secrets) and world.place.task(task_id)["reason"] == "waiting_consent"
    return task_id, {row["secret_key"]: row for row in rows}


def planted(world: Standing, like: str, key: str, **changed: Any) -> str:
    """A request that a program files with grace's own functions, made from that of another process; its id."""
    entry, header = world.vault().current(world.store, key)
    request = {**json.loads(world.row(like)["request"]), "consent_id": world.m.new_id("consent", world.m.clock()), "nonce": "00" * 16, "key": key,
               "version": header["version"], "header": world.m.hash_of("header", header), "sealed": entry["sealed_hash"], **changed}  # fmt: skip
    world.store.write(lambda tx: world.m.put_request(tx, request, header, None))
    return str(request["consent_id"])


def rule(world: Standing, name: str, effect: str, **match: str) -> None:
    vault = world.vault()
    made = {**ANY, "name": name, "effect": effect, "zone": "UTC", **({"group": "governance"} if effect == "require" else {}), **match}
    world.m.change_rules(vault, world.person("gov"), vault.rules(world.store), [made], f"added {effect}", name)


# ---- rules and tasks


def test_a_rule_stops_a_low_secret_that_was_let_through_for_a_task(world: Standing, monkeypatch: pytest.MonkeyPatch) -> None:
    """Low risk asks nobody; it is looked at again when it is opened, also where its row was kept open by force."""
    monkeypatch.setattr(world.m, "end_ruled_out", lambda tx, rules: None)
    _, rows = parked(world, "low", "job")
    low = rows["low"]["consent_id"]
    assert world.status(low) == "approved" and world.status(rows["job"]["consent_id"]) == "pending"
    rule(world, "no", "deny", secret="low")
    with pytest.raises(world.m.GraceError, match="the rule no forbids"):
        world.collect(low)
    assert world.row(low)["used_count"] == 0


@pytest.mark.parametrize("happens", ["rule", "signer", "machine"])
def test_a_task_is_asked_for_anew_when_what_was_asked_can_be_answered_no_more(happens: str, world: Standing) -> None:
    """A rule that wants another signature, an approver who had signed and leaves, a new machine key: the old question is void, a new one is put."""
    task_id, rows = parked(world, "pair")
    old = rows["pair"]["consent_id"]
    if happens == "rule":
        rule(world, "two", "require", secret="pair")
    elif happens == "signer":
        world.approve(old, "ben")
        world.ok("approver", "remove", "ben", *world.as_("anna"))
    else:
        world.ok("init", "--machine", "--name", "anna", "--passphrase-file", word_file(world.place.folder, "anna"))
    assert world.status(old) == "revoked"
    world.place.ok("daemon", "--once")
    assert world.place.task(task_id)["reason"] == "waiting_consent"
    (again,) = world.fetch("SELECT consent_id FROM secret_consent_records WHERE task_id = ? AND consent_status = 'pending'", task_id)
    assert again[0] != old


def test_a_task_whose_standing_consent_is_spent_is_asked_for(world: Standing) -> None:
    """Two tasks, one use: the first has it, the second waits for a person instead of failing."""
    first, rows = parked(world, "job")
    world.ok("consent", "approve", rows["job"]["consent_id"], "--for", "1d", "--uses", "1", *world.as_("anna"))
    second, third = (world.place.submit(goal, "--handler", "work")[1] for goal in ("a second", "a third"))
    world.place.ok("daemon", "--once", "--workers", "1")
    states = sorted(world.place.task(task)["status"] for task in (second, third))
    assert world.place.task(first)["status"] == "completed" and states == ["blocked", "completed"]


def test_no_command_speaks_in_the_name_of_a_handler(world: Standing) -> None:
    """A standing consent made from a task's request is for the daemon's tasks."""
    for words in (("run", "--secret", "J=job:upload"), ("exec", "--secret", "J=job:upload")):
        assert world.place.call(*words, "--by", "handler:work", "--", "true").status == 2
    for words in (("secret", "get", "job"), ("consent", "request", "job")):
        assert world.place.call(*words, "--action", "upload", "--for", "a test", "--by", " Handler:work").status == 2


# ---- lists that were put back, and a new machine key


def test_a_delegated_rotation_obeys_no_older_list_of_approvers(world: Standing) -> None:
    """With the newest list deleted it would seal the value for somebody who was removed: refused, and standing requests as well."""
    world.ok("approver", "remove", "ben", *world.as_("anna"))
    world.attack("DELETE FROM vault_rosters WHERE number = (SELECT MAX(number) FROM vault_rosters)")
    done = world.call("secret", "rotate", "rot", "--delegated", stdin=NEW[0])
    assert done.status == 5 and "rolled back" in done.err
    assert world.fetch("SELECT MAX(version) FROM secret_entries WHERE secret_key = 'rot'") == [(1,)]
    done = world.call("consent", "request", "job", "--action", "backup", "--for", "a test", "--standing", "1d")
    assert done.status == 5 and world.store.all("SELECT 1 FROM secret_consent_records") == []


def test_a_new_machine_key_knows_what_the_old_one_had_seen(world: Standing) -> None:
    """Versions that no approver has looked at stay pinned, and the rotations' keys of the old one are of no use."""
    for value in NEW[:3]:
        world.delegated("rot", value)
    world.ok("init", "--machine", "--name", "anna", "--passphrase-file", word_file(world.place.folder, "anna"))
    assert world.vault().seen.version_of("rot") == 4 and world.vault().seen.secrets["low"][2] is False
    done = world.call("secret", "rotate", "rot", "--delegated", stdin=NEW[3])
    assert done.status == 7 and "--rotate-with" in done.err
    world.attack("DELETE FROM secret_shares WHERE secret_key = 'rot'", "DELETE FROM secret_entries WHERE secret_key = 'rot' AND version > 2",
                 "UPDATE secret_entries SET sealed = x'00', removed_at = NULL WHERE secret_key = 'rot' AND version = 2")  # fmt: skip
    assert world.call("secret", "get", "rot", "--action", "use", "--for", "a test", "--no-wait").status == 5


# ---- what programs plant beside the requests of others


def test_nobody_joins_what_another_process_has_asked(world: Standing) -> None:
    """A request for another secret that says it comes from the same process is no part of the prompt, and is not signed with it."""
    process = world.place.start("exec", "--secret", "A=job", "--by", "deploy", "--for", "a release", "--", "sh", "-c", 'echo "${#A}"')
    (asked,) = world.pending()
    forged = planted(world, asked, "second", ephemeral=world.m.Keys.new().public, together=[["job", "use"], ["second", "use"]])
    copy = planted(world, asked, "second", ephemeral=world.m.Keys.new().public)
    done = world.call("consent", "approve", asked, *world.as_("anna"))
    assert done.status == 0 and "second" not in done.err
    assert world.status(forged) == world.status(copy) == "pending" and end_of(process)[:2] == (0, f"{len(VALUES['job'])}\n".encode())
    assert not any(leaf["kind"] == "consent.shown" for leaf in world.leaves(forged) + world.leaves(copy)), "what was not shown is not said to be"


@pytest.mark.parametrize("standing", [False, True])
def test_an_id_that_is_none_reaches_no_terminal(standing: bool, world: Standing) -> None:
    """Nothing of it is shown as it is, and it is not approved."""
    like = world.file() if standing else world.query(mode="collect").consent_id
    odd = planted(world, like, "job", consent_id="consent_\x1b[2Jx")
    for words in (("pending",), ("history",), ("show", odd), ("approve", odd, *world.as_("anna"))):
        done = world.call("consent", *words)
        assert "\x1b" not in done.out + done.err, words
    assert world.status(odd) == "pending"


def test_a_refresh_takes_nothing_from_a_row_that_nobody_signed(world: Standing) -> None:
    """A row within all CHECKs and triggers, of the template's name and on terms of its own: the true terms are signed anew."""
    words = ("consent", "template", "add", "t", "--secret", "job", "--action", "backup", "--by", "nightly", "--for", "7d", "--uses", "10")
    world.ok(*words, *world.as_("anna"))
    (true,) = world.lasting()
    world.rotate("job", NEW[0])
    world.people.clear()
    known = json.loads(world.row(true)["request"])
    fake = planted(world, true, "job", claimed={**known["claimed"], "by": "evil", "action": "steal"},
                   standing={**known["standing"], "origin": "f" * 16, "uses": 999})  # fmt: skip
    now = world.m.clock()
    world.store.write(lambda tx: tx.run("UPDATE secret_consent_records SET consent_status = 'approved', approved_at = :now, grant_expires_at = :end "
                                        "WHERE consent_id = :id", id=fake, now=now, end=now + 300 * DAY))  # fmt: skip
    world.store.write(lambda tx: tx.run("UPDATE secret_consent_records SET consent_status = 'revoked', revoked_at = :now, "
                                        "revocation_reason = 'the secret was changed' WHERE consent_id = :id", id=fake, now=now))  # fmt: skip
    done = world.call("consent", "template", "refresh", "t", *world.as_("anna"))
    assert done.status == 0, done.err
    assert world.use() == NEW[0] and world.asks(action="steal", by="evil")


def test_a_standing_row_without_an_end_stops_no_request(world: Standing) -> None:
    """The schema refuses it; put there by force, it is passed over, and people are asked."""
    standing_id = world.stand()
    world.attack("UPDATE secret_consent_records SET grant_expires_at = NULL WHERE consent_id = :id", id=standing_id)
    assert world.asks() and world.call("consent", "template", "list").status == 0 and world.call("doctor").status in (0, 1)


def test_a_half_of_approve_from_now_on_that_fails_says_what_holds(world: Standing, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request is approved, for this once, and no standing consent is left waiting."""
    asking = world.query(mode="collect")
    real: Callable[..., Row] = world.m.sign_and_record

    def fail_for_standing(vault: Any, review: Any, *more: Any) -> Row:
        if review.request["mode"] == "standing":
            raise world.m.RefusedError("the rules were changed")
        return real(vault, review, *more)

    monkeypatch.setattr(world.m, "sign_and_record", fail_for_standing)
    done = world.call("consent", "approve", asking.consent_id, "--for", "30d", *world.as_("anna"))
    assert done.status == 4 and "was approved, this once only" in done.err
    assert world.status(asking.consent_id) == "approved" and world.lasting() == [] and world.json("consent", "pending") == []
