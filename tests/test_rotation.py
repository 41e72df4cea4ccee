"""New values: standing consents that follow them, rotations that a handler makes with a key that can seal and not read, and
attacks by whoever holds that key. Then approvers who come and go, from key file to value.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import GRACE, LIMIT, alive, shell, until
from tests.test_consent import Row, byte_changed, dying, end_of, put_row, steps_of, word_file
from tests.test_standing import BOTH, DAY, VALUES, Standing, barred, later, rewritten, world

__all__ = ["later", "world"]  # fixtures
NEW = [f"NEW-value-{number}-6bd44-canary".encode() for number in range(10)]


def sealed(here: Standing, key: str, value: bytes, **options: Any) -> None:
    """A new secret of anna's, sealed in this process."""
    vault, person = here.vault(), here.person("anna")
    entry = here.store.one(here.m.NEWEST_VERSION, key=key)
    before = vault.current(here.store, key)[1] if entry else None
    fields = here.m.next_header(vault.id, vault.roster, key, before, entry["version"] + 1 if entry else 1, options, here.m.clock())
    made = here.m.seal(person.keys, fields, value, vault.roster)
    here.store.write(lambda tx: here.m.store_version(tx, made, "stored", person, vault))
    vault.learn_head(made["header"])


def opened(here: Standing, key: str, name: str = "anna", group: str | None = None, action: str = "read") -> bytes:
    """The value, approved by one person."""
    asking = here.query(key, action, "reader", mode="collect")
    here.approve(asking.consent_id, name, group)
    return here.collect(asking.consent_id)


# ---- standing consents and new values


def test_a_new_value_ends_a_standing_consent(world: Standing) -> None:
    """Unless it was given to follow: a person is asked, and the row says why."""
    standing_id = world.stand()
    world.rotate("job", NEW[0])
    assert world.asks() and (world.status(standing_id), world.row(standing_id)["revocation_reason"]) == ("revoked", "the secret was changed")
    assert world.rows(standing_id)["consent_grants"][0]["wrap"] is None


def test_one_that_follows_opens_each_new_value(world: Standing, later: Callable[[float], None]) -> None:
    """Two delegated rotations in a row, one by hand, one more: the same consent, its uses counted on, its end where it was."""
    standing_id = world.stand("rot", follow=True, uses=6, days=30)
    end = world.row(standing_id)["grant_expires_at"]
    assert world.use("rot") == VALUES["rot"]
    for number, rotate in enumerate((world.delegated, world.delegated, world.rotate, world.delegated)):
        later(DAY)
        rotate("rot", NEW[number])
        assert world.use("rot") == NEW[number]
        versions = world.fetch("SELECT DISTINCT version FROM standing_parts WHERE consent_id = ?", standing_id)
        assert versions == [(number + 2,)], "parts of older versions are gone"
    assert (world.row(standing_id)["used_count"], len(world.uses_of(standing_id)), world.row(standing_id)["grant_expires_at"]) == (5, 5, end)
    assert world.use("rot") == NEW[3] and world.asks("rot") and world.status(standing_id) == "used"
    assert world.fetch("SELECT COUNT(*) FROM standing_parts") == [(0,)]
    assert world.json("audit", "verify")["ok"] is True


@pytest.mark.parametrize("key", ["high", "pair", "push"])
def test_following_with_several_people(world: Standing, key: str) -> None:
    """Parts of two groups, of two of three people, and a signature without a part are carried over."""
    if key == "push":
        world.set("job", NEW[9], "--allow-standing")
        world.people.clear()
        world.stand("job", "push", follow=True, people=BOTH)
        use: Callable[[], bytes] = lambda: world.use("job", "push")  # noqa: E731
        key = "job"
    else:
        world.stand(key, follow=True, people=BOTH if key == "high" else (("anna", None), ("test_user", None)))
        use = lambda: world.use(key)  # noqa: E731
    use()
    for number in range(2):
        world.rotate(key, NEW[number])
        assert use() == NEW[number]


CHANGES = {"risk": ("--risk", "high"), "policy": ("--policy", "user:2of3"), "members": ("--policy", "user:1(anna,ben)"), "username": ("--username", "bob"),
           "service": ("--service", "other"), "expiry": ("--expires", "9d"), "type": ("--type", "token"), "standing": ("--allow-standing",),
           "interval": ("--rotate-every", "9d"), "an action's risk": ("--action-risk", "other=high")}  # fmt: skip


@pytest.mark.parametrize("change", [*CHANGES, "owner", "reshare", "remove"])
def test_any_other_change_ends_one_that_follows(world: Standing, change: str) -> None:
    """What was approved was this risk, policy and all the rest of the header, with another value at most."""
    standing_id = world.stand(follow=True)
    if change in CHANGES:
        world.set("job", NEW[0], *CHANGES[change])
    elif change == "owner":
        world.rotate("job", NEW[0], owner="ben")
    elif change == "reshare":
        world.ok("secret", "reshare", "job", "--policy", "user:1(anna,ben)", *world.as_("anna"))
    else:
        world.ok("secret", "remove", "job")
    assert world.status(standing_id) == "revoked" and world.fetch("SELECT COUNT(*) FROM standing_parts") == [(0,)]
    assert world.fetch("SELECT COUNT(*) FROM consent_grants WHERE wrap IS NOT NULL") == [(0,)]
    if change == "remove":
        with pytest.raises(world.m.GraceError):
            world.query()
        world.set("job", NEW[1])
    assert world.asks()


def test_parts_for_a_version_are_bound_to_it(world: Standing) -> None:
    """Changed, deleted, of another version, of another consent, signed by another key: refused with the cause."""
    one, other = world.stand("rot", follow=True), world.stand("rot", "read", follow=True)
    world.delegated("rot", NEW[0])
    (older,) = world.rows(one)["standing_parts"]
    world.delegated("rot", NEW[1])
    (part,), (theirs,) = world.rows(one)["standing_parts"], world.rows(other)["standing_parts"]
    assert world.use("rot") == NEW[1]
    rows = world.rows(one)
    stranger = world.m.Keys.new()
    grant = json.loads(rows["consent_grants"][0]["document"])
    text = world.m.statement("standing-signature", [grant, world.m.sha256(bytes(part["wrap"]))])
    changes = [{name: byte_changed(part[name])} for name in ("wrap", "signature", "approver", "version")]
    changes += [{"group_name": "governance"}, {"wrap": older["wrap"]}, {"signature": older["signature"]}, {"wrap": theirs["wrap"]}]
    changes += [{name: other_part[name] for name in ("wrap", "signature")} for other_part in (older, theirs)]
    changes += [{"signature": stranger.sign(text)}, {"signature": world.vault().machine.sign(text)}]
    for change in changes:
        world.put_back({**rows, "standing_parts": [{**part, **change}]})
        assert barred(world, key="rot") not in ("asked", "exit 4"), change
    world.put_back({**rows, "standing_parts": []})
    assert "missing" in barred(world, key="rot")
    world.put_back(rows)
    assert world.use("rot") == NEW[1]


def test_whoever_holds_the_machine_key_cannot_make_one_follow_that_does_not(world: Standing) -> None:
    """He seals the next version himself, puts the old consent's row under it, and signs parts: the terms say that it ends."""
    standing_id = world.stand("rot")
    rows = world.rows(standing_id)
    made = forged(world)
    world.store.write(lambda tx: world.m.put_version(tx, made, "rotated"))
    grant, header = json.loads(rows["consent_grants"][0]["document"]), made["header"]
    info = world.m.statement("standing-part", [grant, world.m.hash_of("header", header), world.m.sha256(made["sealed"])])
    wrap = world.m.wrap_to(world.vault().machine.public, made["pieces"]["user", grant["index"]], info)
    signature = made["sign"](world.m.statement("standing-signature", [grant, world.m.sha256(wrap)]))
    world.attack(world.m.PUT_STANDING_PART, id=standing_id, version=2, group="user", approver=grant["approver"], wrap=wrap, signature=signature)
    world.shut("was changed after the standing consent was given", lambda: world.use("rot"))


def test_a_new_machine_key_ends_what_the_old_one_could_open(world: Standing) -> None:
    """`init --machine`: the standing consent and the delegation, made for the old key, open and sign no more, and say so plainly."""
    world.stand("rot", follow=True)
    world.ok("init", "--machine", "--name", "anna", "--passphrase-file", word_file(world.place.folder, "anna"))
    world.people.clear()
    assert barred(world, key="rot") not in ("exit 4", "exit 1")
    done = world.call("secret", "rotate", "rot", "--delegated", "--json", stdin=NEW[0])
    assert done.status in (5, 7) and set(done.error) == {"code", "message", "hint"}
    assert opened(world, "rot") == VALUES["rot"], "the value itself is as it was"
    world.rotate("rot", NEW[1])
    world.people.clear()
    world.delegated("rot", NEW[2])
    assert opened(world, "rot", "test_user") == NEW[2]


def test_after_a_new_machine_key_a_person_is_asked_again(world: Standing) -> None:
    """The nightly job asks, as on its first day."""
    world.stand()
    world.ok("init", "--machine", "--name", "anna", "--passphrase-file", word_file(world.place.folder, "anna"))
    world.people.clear()
    assert barred(world) == "asked"


# ---- delegated rotations


def test_a_delegated_rotation(world: Standing) -> None:
    """No passphrase: a new version in its owner's name that people open as before, with nothing but the value changed."""
    before = world.json("secret", "show", "rot")
    done = world.delegated("rot", NEW[0])
    changed = {name for name in done if done[name] != before[name]}
    assert changed <= {"version", "created_at", "rotate_at", "delegated"} and (done["version"], done["delegated"], done["owner"]) == (2, True, "anna")
    assert done["verified"] is True and opened(world, "rot", "ben") == NEW[0]
    assert world.json("audit", "verify")["ok"] is True and "secret.rotated" in world.kinds("rot")


def test_what_cannot_be_rotated_without_its_owner(world: Standing) -> None:
    """No delegation: exit 7 with a hint; low risk, an owner or a passphrase with it: exit 2; removed or unknown: exit 3. The values stay."""
    done = world.call("secret", "rotate", "job", "--delegated", "--json", stdin=NEW[0])
    assert done.status == 7 and "--rotate-with" in done.error["hint"]
    assert world.call("secret", "rotate", "low", "--delegated", stdin=NEW[0]).status == 2
    assert world.call("secret", "rotate", "rot", "--delegated", "--owner", "anna", stdin=NEW[0]).status == 2
    assert world.call("secret", "rotate", "rot", "--delegated", *world.as_("anna")[2:], stdin=NEW[0]).status == 2
    assert world.call("secret", "rotate", "never", "--delegated", stdin=NEW[0]).status == 3
    assert world.call("secret", "rotate", "rot", "--delegated", stdin=b"").status == 2
    assert opened(world, "rot") == VALUES["rot"] and opened(world, "job") == VALUES["job"]
    world.ok("secret", "remove", "rot")
    assert world.call("secret", "rotate", "rot", "--delegated", stdin=NEW[0]).status == 3
    assert world.fetch("SELECT COUNT(*) FROM secret_delegations WHERE private IS NOT NULL") == [(0,)]


def test_a_delegation_ends_with_its_time(world: Standing, later: Callable[[float], None]) -> None:
    """After 366 days nothing is sealed under it; a new value by the owner begins it anew."""
    later(365 * DAY)
    world.delegated("rot", NEW[0])
    later(2 * DAY)
    done = world.call("secret", "rotate", "rot", "--delegated", stdin=NEW[1])
    assert done.status == 5 and opened(world, "rot") == NEW[0], done.err
    world.rotate("rot", NEW[2])
    world.people.clear()
    world.delegated("rot", NEW[3])
    assert opened(world, "rot") == NEW[3]


def delegation(here: Standing, key: str = "rot") -> Row:
    row: Row = here.store.one(here.m.NEWEST_DELEGATION, key=key)
    return row


def forged(here: Standing, row: Row | None = None, value: bytes = b"FORGED", version: int = 0, **fields: Any) -> Row:
    """A version as whoever holds the machine's key and the delegated one can seal it, by the program's own functions."""
    vault, row = here.vault(), row or delegation(here)
    entry = here.store.one(here.m.NEWEST_VERSION, key=fields.get("key", "rot"))
    header = json.loads(entry["header"])
    keys = here.m.Keys(vault.machine.unwrap(bytes(row["private"]), here.m.statement("delegation-key", json.loads(row["document"]))))
    kept = {name: field for name, field in header.items() if name not in ("suite", "commitment")}
    made: Row = here.m.seal(keys, {**kept, "version": version or header["version"] + 1, "created": here.m.clock(), **fields}, value, vault.roster, row)
    return made


def planted(here: Standing, made: Row) -> None:
    """It is put where the newest version is, whatever the program's functions think of it."""
    here.store.write(lambda tx: here.m.put_version(tx, made, "rotated"))


def test_the_rotator_of_these_tests_can_do_what_he_may(world: Standing) -> None:
    """The same way, with nothing changed but the value: it opens. So the refusals below are for what is changed."""
    planted(world, forged(world))
    assert opened(world, "rot") == b"FORGED"


FORGED = {"risk": {"risk": "high"}, "low risk": {"risk": "low"}, "service": {"service": "evil"}, "username": {"username": "evil"}, "expiry": {"expires": 1},
          "type": {"type": "x"}, "no action risks": {"action_risks": {"a": "high"}}, "standing": {"allow_standing": True}, "one person": {"same_person": True},
          "handler": {"rotate_with": "evil"}, "interval": {"rotate_every": None}, "another secret": {"key": "second"}, "owner": {"owner": "ben"},
          "machine as owner": {"owner": "machine"}, "a member more": {"policy": "governor"}, "the machine as a member": {"policy": "machine"},
          "fewer members": {"policy": "anna"}, "no owner any more": {"owner": "0" * 64}, "an older instant": {"created": 1}}  # fmt: skip


@pytest.mark.parametrize("change", [*FORGED])
def test_a_rotator_changes_nothing_but_the_value(world: Standing, change: str) -> None:
    """Each field of the header that the owner has signed; for whoever asks, and for the approver."""
    roster = world.vault().roster
    prints = {person["name"]: world.m.fingerprint(person) for person in roster["approvers"]} | {"machine": world.m.fingerprint(roster["machine"])}
    fields = dict(FORGED[change])
    if fields.get("owner") in prints:
        fields["owner"] = prints[fields["owner"]]
    if "policy" in fields:
        header = json.loads(world.store.one(world.m.NEWEST_VERSION, key="rot")["header"])
        (group,) = header["policy"]["all"]
        members = [prints["anna"]] if fields["policy"] == "anna" else [*group["members"], prints["gov" if fields["policy"] == "governor" else "machine"]]
        fields["policy"] = {"all": [{**group, "members": sorted(members)}]}
    made = forged(world, **fields)
    key = made["header"]["key"]
    asking = world.query(key, mode="collect")
    planted(world, made)
    said = barred(world, key=key)
    assert said not in ("asked", "exit 4"), said
    with pytest.raises(world.m.GraceError):
        world.approve(asking.consent_id, "anna")
    assert world.json("secret", "show", key)["verified"] is False
    assert world.call("secret", "rotate", key, "--delegated", stdin=NEW[0]).status in (2, 5, 7)


def test_a_rotator_signs_nothing_under_a_delegation_that_has_ended(world: Standing, later: Callable[[float], None]) -> None:
    """After its time."""
    later(367 * DAY)
    planted(world, forged(world))
    assert "does not hold at that time" in barred(world, key="rot")


@pytest.mark.parametrize("between", ["by hand", "by hand and delegated", "by another user", "reshared"])
def test_a_rotator_signs_nothing_under_a_delegation_from_before(world: Standing, between: str) -> None:
    """Its key was kept; its owner has sealed a newer version since: refused to whoever asks, and by an approver who has seen less."""
    old = delegation(world)
    if between == "reshared":
        world.ok("secret", "reshare", "rot", *world.as_("anna"))
    else:
        world.rotate("rot", NEW[0], owner="ben" if between == "by another user" else "anna")
    if between == "by hand and delegated":
        world.delegated("rot", NEW[1])
    assert world.store.one(world.m.GET_DELEGATION, seq=old["seq"])["private"] is None
    owner = json.loads(world.store.one(world.m.GET_VERSION, key="rot", version=1)["header"])["owner"]
    asking = world.query("rot", mode="collect")
    planted(world, forged(world, old, owner=owner))
    assert "delegation that had ended" in barred(world, key="rot")
    pretended(world, asking.consent_id)
    case = world.store.write(lambda tx: world.m.build_case(tx, asking.consent_id, "test_user"))
    with pytest.raises(world.m.GraceError) as error:
        world.m.Review(world.person("test_user"), case, world.m.clock())
    assert "delegation that had ended" in str(error.value)


def pretended(here: Standing, consent_id: str) -> None:
    """The attacker moves a request that was filed for the version before to the newest one, and the log with it."""
    new = entry(here, "rot")
    request = json.loads(here.row(consent_id)["request"])
    request |= {"version": new["version"], "header": here.m.hash_of("header", json.loads(new["header"])), "sealed": new["sealed_hash"]}
    here.attack("UPDATE secret_consent_records SET secret_version = :version WHERE consent_id = :id", version=new["version"], id=consent_id)
    rewritten(here, consent_id, request)


def test_a_rotator_brings_no_removed_secret_back(world: Standing) -> None:
    """The secret was removed, which the log holds: the next version comes from an approver."""
    old = delegation(world)
    world.ok("secret", "remove", "rot")
    planted(world, forged(world, old))
    assert barred(world, key="rot") not in ("asked", "exit 4")


def test_a_delegation_of_the_rotators_own_making(world: Standing) -> None:
    """Signed by the machine, by the delegated key, by a stranger, or for another secret: refused."""
    row, m = delegation(world), world.m
    document = json.loads(row["document"])
    vault = world.vault()
    mine = m.Keys(vault.machine.unwrap(bytes(row["private"]), m.statement("delegation-key", document)))
    for number, signer in enumerate((vault.machine, mine, m.Keys.new())):
        wider = {**document, "sign": mine.public["sign"], "expires": 9_000_000_000_000, "created": number}
        text = m.canonical(wider).decode()
        world.attack("""INSERT INTO secret_delegations (secret_key, document, signature, private, created_at) VALUES ('rot', :text, :signature, :private, 1)""",
                     text=text, signature=signer.sign(m.statement("delegation-signature", wider)),
                     private=m.wrap_to(vault.machine.public, mine.private, m.statement("delegation-key", wider)))  # fmt: skip
        done = world.call("secret", "rotate", "rot", "--delegated", "--json", stdin=NEW[0])
        assert done.status == 5, done.err
        made = forged(world)
        if number == 0:
            copy = world.store.all("SELECT * FROM secret_entries WHERE secret_key = 'rot'"), world.store.all(m.SHARES_OF, key="rot", version=1)
        planted(world, made)
        assert "not signed by its owner" in barred(world, key="rot")
        world.attack("DELETE FROM secret_shares WHERE secret_key = 'rot'", "DELETE FROM secret_entries WHERE secret_key = 'rot' AND version = 2")
        put_row(world, "secret_entries", copy[0][0])
        for share in copy[1]:
            world.attack(f"INSERT INTO secret_shares ({', '.join(share)}) VALUES ({', '.join(':' + name for name in share)})", **share)
        assert opened(world, "rot", action=f"read{number}") == VALUES["rot"]


def test_every_field_of_a_delegation_is_bound(world: Standing) -> None:
    """Changed in its row, before or after it was used: refused, and the old value or the newest opens again when it is put right."""
    row = delegation(world)
    document = json.loads(row["document"])
    for after in (False, True):
        if after:
            world.delegated("rot", NEW[0])
            row = world.store.one(world.m.GET_DELEGATION, seq=row["seq"])
        for name in document:
            put_row(world, "secret_delegations", {**row, "document": world.m.canonical({**document, name: byte_changed(document[name])}).decode()})
            done = world.call("secret", "rotate", "rot", "--delegated", stdin=NEW[1])
            assert done.status == 5, (name, done.err)
        put_row(world, "secret_delegations", {**row, "signature": byte_changed(row["signature"])})
        assert world.call("secret", "rotate", "rot", "--delegated", stdin=NEW[1]).status == 5
        put_row(world, "secret_delegations", row)
        assert opened(world, "rot", action=f"read{after}") == (NEW[0] if after else VALUES["rot"])


def test_a_rotator_reads_no_value_that_he_did_not_write(world: Standing) -> None:
    """The machine's key and the delegated one open no part of it, before and after a rotation, nor by a grant of another secret."""
    world.stand("second", follow=True)
    m, row = world.m, delegation(world)
    mine = m.Keys(world.vault().machine.unwrap(bytes(row["private"]), m.statement("delegation-key", json.loads(row["document"]))))
    for version in (1, 2):
        entry = world.store.one(m.NEWEST_VERSION, key="rot")
        header, shares = json.loads(entry["header"]), world.store.all(m.SHARES_OF, key="rot", version=version)
        assert entry["version"] == version and len(shares) == 3
        for keys in (world.vault().machine, mine):
            assert m.own_shares(keys, entry, header, shares) == {}
            for share in shares:
                info = m.share_info(m.hash_of("header", header), m.sha256(bytes(entry["sealed"])), share["group_name"], share["member"], share["share_index"])
                with pytest.raises(m.RefusedError):
                    keys.unwrap(bytes(share["wrap"]), info)
        with pytest.raises(m.RefusedError):
            m.open_value(header, bytes(entry["sealed"]), {})
        world.delegated("rot", NEW[0])
    assert world.fetch("SELECT COUNT(*) FROM standing_parts") == [(0,)]


def test_a_member_who_was_removed_stops_rotations_until_its_owner_acts(world: Standing) -> None:
    """Refused with the hint what to do; the old value opens; sealed anew by its owner it goes on without him."""
    world.ok("approver", "remove", "ben", *world.as_("anna"))
    world.people.clear()
    done = world.call("secret", "rotate", "rot", "--delegated", "--json", stdin=NEW[0])
    assert done.status == 5 and "ben" in done.error["message"] and "grace secret rotate rot" in done.error["hint"]
    assert opened(world, "rot") == VALUES["rot"]
    world.rotate("rot", NEW[1])
    world.people.clear()
    world.delegated("rot", NEW[2])
    assert opened(world, "rot", "test_user") == NEW[2]


def test_an_owner_who_was_removed_stops_rotations_as_well(world: Standing) -> None:
    """ben owns it, and is none of its users: refused when he is gone, and the old value opens."""
    word = word_file(world.place.folder, "ben")
    world.ok("secret", "set", "bens", "--policy", "user:1(anna)", "--rotate-with", "renew", "--owner", "ben", "--passphrase-file", word, stdin=NEW[0])
    world.delegated("bens", NEW[1])
    world.ok("approver", "remove", "ben", *world.as_("anna"))
    world.people.clear()
    assert world.call("secret", "rotate", "bens", "--delegated", stdin=NEW[2]).status in (5, 7)
    assert opened(world, "bens") == NEW[1]


def test_an_approver_follows_many_rotations(world: Standing) -> None:
    """A secret that is rotated every hour, and an approver who is asked again after nine days."""
    assert opened(world, "rot", "test_user") == VALUES["rot"]
    vault, m = world.vault(), world.m
    for _ in range(m.PAST_VERSIONS + 5):
        made = m.delegated_version(vault, "rot", NEW[0])
        world.store.write(lambda tx, one=made: m.store_version(tx, one, "rotated", None, vault))
        vault.learn_head(made["header"])
    assert opened(world, "rot", "test_user") == NEW[0]


def test_a_rotation_killed_at_any_step(world: Standing) -> None:
    """The new version is there whole, with the parts for the standing consent that follows, or the old one is as it was."""
    standing_id = world.stand("rot", follow=True)
    values = [VALUES["rot"]]

    def rotate_dying(number: int) -> int:
        value, before = f"KILLED-{len(values)}-{number}".encode(), entry(world, "rot")["version"]

        def rotate(here: Any) -> None:
            vault = here.vault()
            made = here.m.delegated_version(vault, "rot", value)
            here.store.write(lambda tx: here.m.store_version(tx, made, "rotated", None, vault))
            vault.learn_head(made["header"])
            here.m.shred(here.store)

        status = dying(world, number, rotate)
        version = entry(world, "rot")["version"]
        assert version in (before, before + 1) and (status == 9 or version == before + 1)
        values.extend([value] if version > before else [])
        assert world.use("rot") == values[-1]
        assert world.kinds("rot").count("secret.rotated") == version - 1
        return status

    moments = steps_of(rotate_dying, 20)
    assert [rotate_dying(moment) for moment in moments].count(9) > 10
    assert world.row(standing_id)["used_count"] == len(world.uses_of(standing_id)) and world.json("audit", "verify")["ok"] is True


# ---- the daemon, and handlers


def due(here: Standing, *keys: str) -> None:
    """Their new values are due now."""
    for key in keys:
        here.attack("UPDATE secret_entries SET rotate_at = 1 WHERE secret_key = :key AND sealed IS NOT NULL", key=key)


def topics(here: Standing, key: str) -> list[str]:
    rows = here.fetch("SELECT topic FROM events WHERE subject = ? AND topic LIKE 'secrets.secret.%' ORDER BY seq", key)
    return [topic.rpartition(".")[2] for (topic,) in rows]


def entry(here: Standing, key: str) -> Row:
    row: Row = here.store.one(here.m.NEWEST_VERSION, key=key)
    return row


def test_a_daemon_has_a_due_value_renewed(world: Standing) -> None:
    """Event, task, new version by the handler, and no event more; the standing consent that follows opens it; no log holds it."""
    standing_id = world.stand("rot", follow=True)
    due(world, "rot")
    with world.place.daemon():
        until(lambda: entry(world, "rot")["version"] == 2, "the new version")
        until(lambda: world.fetch("SELECT status FROM htm_tasks WHERE handler = 'renew'") == [("completed",)], "the task to end")
    assert topics(world, "rot")[-2:] == ["due", "rotated"] and "rotation_failed" not in topics(world, "rot")
    assert world.use("rot") == b"RENEWED-1-canary" and len(world.uses_of(standing_id)) == 1
    row = entry(world, "rot")
    assert (row["rotate_task"], row["rotate_reason"]) == (None, None) and abs(row["rotate_at"] - world.m.clock() - 30 * DAY) < 120_000
    assert world.kinds("rot")[-2:] == ["secret.due", "secret.rotated"] and world.json("audit", "verify")["ok"] is True


def test_rotations_that_fail_leave_the_old_value_and_are_tried_again(world: Standing) -> None:
    """A handler that fails, one that stores nothing, one that is gone, one without a delegation that holds, and none at all."""
    shell(world.place, "fails", "exit 3", "--max-attempts", "1")
    shell(world.place, "idle", "true", "--max-attempts", "1")
    shell(world.place, "gone", "true")
    shell(world.place, "other", f'printf x | {GRACE} secret rotate bens --delegated', "--max-attempts", "1")
    for name in ("fails", "idle", "gone"):
        sealed(world, f"s-{name}", NEW[0], rotate_every=2 * DAY if name == "idle" else 3_600_000, rotate_with=name)
    sealed(world, "bens", NEW[0], rotate_every=DAY, rotate_with="other")
    world.attack("UPDATE secret_delegations SET signature = zeroblob(64) WHERE secret_key = 'bens'")
    sealed(world, "nobody", NEW[0], rotate_every=DAY)
    world.ok("handler", "remove", "gone")
    failing = ("s-fails", "s-idle", "s-gone", "bens")
    due(world, *failing, "nobody")
    begin = world.m.clock()
    with world.place.daemon():
        until(lambda: all("rotation_failed" in topics(world, key) for key in failing), "all four to fail")
        until(lambda: "due" in topics(world, "nobody"), "the fifth to be due")
        due(world, "s-idle")
        until(lambda: topics(world, "s-idle").count("rotation_failed") == 2, "another try")
    for key in failing:
        row = entry(world, key)
        assert (row["version"], row["rotate_task"]) == (1, None) and "rotation failed" in row["rotate_reason"], key
        again = row["rotate_at"] - begin
        assert (0 < again - (DAY if key in ("s-idle", "bens") else 3_600_000) < 120_000), key
        assert opened(world, key) == NEW[0]
        assert topics(world, key).count("due") == topics(world, key).count("rotation_failed") == (2 if key == "s-idle" else 1)
    why = {json.loads(payload)["secret_key"]: json.loads(payload)["error"]
           for (payload,) in world.fetch("SELECT payload FROM events WHERE topic = 'secrets.secret.rotation_failed'")}  # fmt: skip
    assert "stored no new value" in why["s-idle"] and "gone" in why["s-gone"] and why["s-fails"]
    assert topics(world, "nobody") == ["stored", "due"] and entry(world, "nobody")["rotate_at"] is None
    assert "due" in world.json("secret", "show", "nobody")["rotate_reason"]
    world.rotate("nobody", NEW[1])
    row = entry(world, "nobody")
    assert row["rotate_reason"] is None and row["rotate_at"] > begin + DAY


def test_a_daemon_killed_during_a_rotation(world: Standing) -> None:
    """The next daemon ends it: at least one new version, the last one opens, no failure left behind."""
    folder = world.place.folder
    wait = f"touch {folder}/begun; while [ ! -e {folder}/go ]; do sleep 0.05; done"
    shell(world.place, "slow", f"{wait}; printf SLOW | {GRACE} secret rotate s-slow --delegated")
    sealed(world, "s-slow", NEW[0], rotate_every=DAY, rotate_with="slow")
    due(world, "s-slow")
    with world.place.daemon() as daemon:
        until((folder / "begun").exists, "the handler to begin")
        daemon.send_signal(signal.SIGKILL)
        daemon.wait(LIMIT)
    assert not alive(daemon.pid) and opened(world, "s-slow") == NEW[0]
    (folder / "go").touch()
    with world.place.daemon():
        until(lambda: entry(world, "s-slow")["version"] >= 2, "the new version")
        until(lambda: world.fetch("SELECT status FROM htm_tasks WHERE handler = 'slow'") == [("completed",)], "the task to end")
    assert topics(world, "s-slow").count("due") == 1 and "rotation_failed" not in topics(world, "s-slow")
    assert opened(world, "s-slow", action="again") == b"SLOW" and entry(world, "s-slow")["rotate_task"] is None


def test_many_are_due_at_once(world: Standing) -> None:
    """Sixty without a handler and six with one: each is told once, and each that can be renewed is, once."""
    script = f'printf EACH | {GRACE} secret rotate "$0" --delegated'
    world.place.handler("each", "--max-attempts", "1", "--", "sh", "-c", script, "{context.secret_key}")
    plain, renewed = [f"plain-{number}" for number in range(60)], [f"each-{number}" for number in range(6)]
    for key in plain + renewed:
        sealed(world, key, NEW[0], rotate_every=DAY, **({"rotate_with": "each"} if key in renewed else {}))
    due(world, *plain, *renewed)
    with world.place.daemon("--workers", "2"):
        until(lambda: all(entry(world, key)["version"] == 2 for key in renewed), "all six")
        until(lambda: all("due" in topics(world, key) for key in plain), "all sixty")
    assert all(topics(world, key).count("due") == 1 for key in plain + renewed)
    assert {entry(world, key)["version"] for key in renewed} == {2}
    assert opened(world, renewed[-1]) == b"EACH"


# ---- approvers who come and go


def approved_value(here: Standing, key: str, *people: tuple[str, ...], refused: tuple[tuple[str, ...], ...] = ()) -> bytes:
    """`secret get` in a process that waits, answered by commands with real key files, one after the other."""
    asking = here.get(key, "--timeout", "50s")
    (consent_id,) = here.pending()
    for name, *more in refused:
        assert here.call("consent", "approve", consent_id, *here.as_(name), *more).status == 5, (name, more)
    for number, (name, *more) in enumerate(people, 1):
        done = here.call("--json", "consent", "approve", consent_id, *here.as_(name), *more)
        assert done.status == 0, done.err
        assert (done.json["consent_status"] == "pending") == (number < len(people))
        assert number == len(people) or asking.poll() is None
    status, out, err = end_of(asking)
    assert status == 0, err
    return out


def test_people_open_it_together(world: Standing) -> None:
    """Two of three users, in any pair; a user and somebody of governance; never one of them in both parts."""
    for pair in (("anna", "ben"), ("test_user", "anna")):
        assert approved_value(world, "pair", *((name,) for name in pair), refused=(("gov",),)) == VALUES["pair"]
    assert approved_value(world, "stern", ("gov",), ("test_user",), refused=(("gov", "--as", "user"),)) == VALUES["stern"]
    assert approved_value(world, "critical", ("ben", "--as", "user"), ("anna", "--as", "governance"), refused=()) == VALUES["critical"]


def test_one_leaves_and_another_comes(world: Standing) -> None:
    """What the one who leaves can still open is listed and marked; the new one opens nothing before the secret is shared with him."""
    gone = world.json("approver", "remove", "ben", *world.as_("anna"))
    assert set(gone["can_still_open"]) == set(VALUES)
    assert "ben was removed" in world.json("secret", "show", "pair")["rotate_reason"]
    asking = world.query("pair", mode="collect")
    assert world.call("consent", "approve", asking.consent_id, *world.as_("ben")).status in (3, 5)
    word = word_file(world.place.folder, "cora")
    world.ok("approver", "add", "cora", "--role", "user", "--new-passphrase-file", word, *world.as_("anna"))
    assert world.call("consent", "approve", asking.consent_id, *world.as_("cora")).status == 5
    assert approved_value_of(world, asking, "anna", "test_user") == VALUES["pair"]
    alone = world.call("secret", "reshare", "pair", "--policy", "user:2of3", *world.as_("anna"))
    assert alone.status == 5, "two open it, one does not"
    world.ok("secret", "reshare", "pair", "--policy", "user:2of3", *world.as_("anna"), *world.as_("test_user"))
    world.people.clear()
    assert world.json("secret", "show", "pair")["rotate_reason"] is None
    assert approved_value(world, "pair", ("cora",), ("test_user",)) == VALUES["pair"]
    assert world.call("approver", "remove", "ben", *world.as_("anna")).status == 3


def approved_value_of(here: Standing, asking: Any, *names: str) -> bytes:
    for name in names:
        here.ok("consent", "approve", asking.consent_id, *here.as_(name))
    return here.collect(asking.consent_id)


def test_a_recovery_approver_takes_over(world: Standing) -> None:
    """anna's passphrase is lost: ben opens what is his, removes her, seals anew; her key file opens nothing of that any more."""
    folder = next((world.place.folder / ".config" / "grace").iterdir())
    kept = (folder / "anna.key").read_bytes()
    (folder / "anna.key").unlink()
    assert approved_value(world, "job", ("ben",)) == VALUES["job"]
    done = world.json("approver", "remove", "anna", *world.as_("ben"))
    assert "job" in done["can_still_open"]
    for key in ("job", "stern", "rot"):
        people = world.as_("ben") if key != "stern" else (*world.as_("ben"),)
        shown = world.json("secret", "reshare", key, *people)
        assert (shown["owner"], shown["verified"], shown["rotate_reason"]) == ("ben", True, None), key
    (folder / "anna.key").write_bytes(kept)
    os.chmod(folder / "anna.key", 0o600)
    world.people.clear()
    asking = world.query("job", mode="collect")
    assert world.call("consent", "approve", asking.consent_id, *world.as_("anna")).status in (3, 5)
    assert approved_value_of(world, asking, "ben") == VALUES["job"]
    assert approved_value(world, "stern", ("gov",), ("ben", "--as", "user")) == VALUES["stern"]
    anna = next(person for person in world.vault().roster["approvers"] if person["name"] == "anna")
    shares = world.fetch("SELECT COUNT(*) FROM secret_shares WHERE secret_key IN ('job', 'stern', 'rot') AND member = ?", world.m.fingerprint(anna))
    assert shares == [(0,)]
    world.delegated("rot", NEW[0])
    assert opened(world, "rot", "ben", action="last") == NEW[0]
    assert world.json("audit", "verify")["ok"] is True
