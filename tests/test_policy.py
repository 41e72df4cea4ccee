"""Governance rules: what they decide, how they are laid down, and that they are obeyed where a request is filed, approved and used.

The decision itself is a pure function and tested as one. The rest happens on the real file with the program's own functions
and its real command; the attacker edits that file with all triggers out of his way, or runs a program that asks no rules.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from tests.conftest import Place
from tests.test_consent import World, copied, end_of, refused, refused_with_cause, word_file

Row = dict[str, Any]
PEOPLE = {"olga": ("user", "governance"), "anna": ("user",), "gov": ("governance",), "ben": ("user", "governance")}
VALUES = {"mid": b"MID-value-4ck81-canary", "low": b"LOW-value-7vd32-canary", "high": b"HIGH-value-9wq05-canary"}
ANY: Row = dict.fromkeys(("group", "secret", "service", "action", "by", "risk", "hours")) | {"zone": "UTC"}
USE: Row = {"secret": "prod_db", "service": "shop", "action": "deploy-web", "by": "cron@root", "risk": "medium"}
MIDDAY = 1_795_348_800_000  # 2026-11-22T12:00:00Z
DAY = 86_400_000


def rule(name: str, effect: str, **match: Any) -> Row:
    return {**ANY, "name": name, "effect": effect, **({"group": "governance"} if effect == "require" else {}), **match}


def at(zone: str, *when: int) -> int:
    return int(datetime(*when, tzinfo=ZoneInfo(zone)).timestamp() * 1000)  # type: ignore[misc,arg-type]


# ---- what is decided


@pytest.mark.parametrize(("rules", "effect", "by", "requires"), [
    ([], "default", None, {}),
    ([rule("a", "allow", secret="other")], "default", None, {}),
    ([rule("a", "allow", secret="prod_db")], "allow", "a", {}),
    ([rule("a", "allow", secret="prod_db"), rule("r", "require")], "require", "r", {"governance": 1}),
    ([rule("a", "allow", secret="prod_db"), rule("r", "require"), rule("d", "deny")], "deny", "d", {}),
    ([rule("d", "deny", action="other"), rule("r", "require", group="user"), rule("s", "require")], "require", "r", {"governance": 1, "user": 1}),
    ([rule("one", "deny"), rule("two", "deny")], "deny", "one", {}),
    ([rule("both", "deny", secret="prod_db", action="read")], "default", None, {}),
    ([rule("both", "deny", secret="prod_db", action="deploy-web", service="shop", by="cron@root", risk="low")], "deny", "both", {}),
], ids=range(9))  # fmt: skip
def test_deny_goes_before_require_before_allow(rules: list[Row], effect: str, by: str | None, requires: Row, module: Any) -> None:
    """The order within the set does not matter; what requires adds up; all that a rule names must fit."""
    for _ in range(3):
        assert module.decision(rules, USE, MIDDAY) == {"effect": effect, "rule": by, "requires": requires}
        if len({one["effect"] for one in rules}) == len(rules):
            random.shuffle(rules)


@pytest.mark.parametrize(("match", "fits"), [
    ({"secret": "prod*"}, True), ({"secret": "prod_db*"}, True), ({"secret": "prod_db"}, True), ({"secret": "prod"}, False), ({"secret": "PROD*"}, False),
    ({"secret": "prod_db2*"}, False), ({"service": "shop*"}, True), ({"action": "deploy-*"}, True), ({"action": "deploy_*"}, False), ({"by": "cron@*"}, True),
    ({"by": "root"}, False), ({"risk": "low"}, True), ({"risk": "medium"}, True), ({"risk": "high"}, False), ({"secret": "prod*", "by": "other"}, False),
])  # fmt: skip
def test_what_a_rule_names(match: Row, fits: bool, module: Any) -> None:
    """An exact text, or its beginning; this risk or a higher one."""
    assert (module.decision([rule("x", "deny", **match)], USE, MIDDAY)["effect"] == "deny") is fits


def test_a_secret_without_a_service_fits_no_service(module: Any) -> None:
    assert module.decision([rule("x", "deny", service="shop")], {**USE, "service": None}, MIDDAY)["effect"] == "default"


def minutes_denied(module: Any, hours: str, zone: str, day: int) -> list[int]:
    """At which minutes of 24 hours a rule with these hours holds."""
    rules = [rule("x", "deny", hours=hours, zone=zone)]
    return [minute for minute in range(1440) if module.decision(rules, USE, day + minute * 60_000)["effect"] == "deny"]


def test_hours(module: Any) -> None:
    """From the first minute to before the last; past midnight; in a zone, where the clocks go forward and back."""
    midnight = MIDDAY - DAY // 2
    assert minutes_denied(module, "08:00-18:00", "UTC", midnight) == list(range(480, 1080))
    assert minutes_denied(module, "22:00-06:00", "UTC", midnight) == [*range(360), *range(1320, 1440)]
    assert minutes_denied(module, "18:00-00:00", "UTC", midnight) == list(range(1080, 1440))
    assert minutes_denied(module, "08:00-18:00", "Asia/Kathmandu", midnight) == list(range(135, 735))  # 5:45 ahead
    assert minutes_denied(module, "00:00-01:00", "Pacific/Kiritimati", midnight) == list(range(600, 660))
    berlin = "Europe/Berlin"
    assert minutes_denied(module, "02:00-03:00", berlin, at(berlin, 2026, 3, 28)) == list(range(120, 180))
    assert minutes_denied(module, "02:00-03:00", berlin, at(berlin, 2026, 3, 29)) == []  # that hour did not happen
    assert minutes_denied(module, "02:00-03:00", berlin, at(berlin, 2026, 10, 25)) == list(range(120, 240))  # and that one twice
    assert module.decision([rule("x", "deny", hours="08:00-18:00")], USE, midnight + 18 * 3_600_000 - 1)["effect"] == "deny"


def test_hours_in_a_zone_that_nobody_knows(module: Any) -> None:
    """What forbids or asks for more holds at any time then, what allows at none."""
    for zone in ("Mars/Olympus", "Europe", "a" * 32):
        got = [module.decision([rule("x", effect, hours="08:00-08:01", zone=zone)], USE, MIDDAY)["effect"] for effect in module.EFFECTS]
        assert got == ["deny", "require", "default"]


def test_instants_at_the_edges_of_the_calendar(module: Any) -> None:
    for instant in (-(10**15), 0, module.MAX_INSTANT, 10**18):
        for zone in ("UTC", "Pacific/Kiritimati", "America/New_York"):
            assert module.decision([rule("x", "deny", hours="00:00-23:59", zone=zone)], USE, instant)["effect"] in ("deny", "default")


def test_low_risk_under_a_requirement_is_decided_as_medium(module: Any) -> None:
    """A rule that begins at medium risk then counts as well, and may forbid it."""
    low = {**USE, "risk": "low"}
    asks, more, no = rule("a", "require", group="user"), rule("m", "require", risk="medium"), rule("d", "deny", risk="medium")
    assert module.decision_with_risk([asks], low, MIDDAY) == ({"effect": "require", "rule": "a", "requires": {"user": 1}}, "medium")
    assert module.decision_with_risk([asks, more], low, MIDDAY)[0]["requires"] == {"governance": 1, "user": 1}
    assert module.decision_with_risk([asks, no], low, MIDDAY)[0]["effect"] == "deny"
    for rules in ([more, no], [rule("w", "allow", secret="prod*")], []):
        assert module.decision_with_risk(rules, low, MIDDAY)[1] == "low"
    assert module.decision_with_risk([asks], {**USE, "risk": "high"}, MIDDAY)[1] == "high"


def test_no_rule_lowers_anything(module: Any) -> None:
    """Against any set, a further rule never takes a deny or a signature away; only a rule that denies makes signatures needless."""
    dice, rank = random.Random(7), {"default": 0, "allow": 0, "require": 1, "deny": 2}
    choices: Row = {"secret": [None, "prod*", "other"], "action": [None, "deploy-web", "read"], "by": [None, "cron*"], "risk": [None, "low", "high"],
                    "hours": [None, "08:00-13:00", "13:00-08:00"], "zone": ["UTC", "Asia/Tokyo"]}  # fmt: skip
    for _ in range(2000):
        rules = [rule(str(n), dice.choice(module.EFFECTS), **{what: dice.choice(values) for what, values in choices.items()}) for n in range(5)]
        for one in rules:
            one["group"] = dice.choice(["user", "governance"]) if one["effect"] == "require" else None
        before, after = module.decision(rules[:-1], USE, MIDDAY), module.decision(rules, USE, MIDDAY)
        assert rank[after["effect"]] >= rank[before["effect"]]
        assert after["effect"] == "deny" or set(before["requires"]) <= set(after["requires"])


# ---- the vault that the tests share, and copies of it


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Four approvers and three secrets."""
    place = Place(tmp_path_factory.mktemp("policy"))
    olga = ("--passphrase-file", word_file(place.folder, "olga"))
    place.ok("config", "set", "vault.argon2_memory", "67108864")
    place.ok("init", "--name", "olga", *olga)
    for name, roles in list(PEOPLE.items())[1:]:
        words = [word for role in roles for word in ("--role", role)]
        place.ok("approver", "add", name, *words, "--new-passphrase-file", word_file(place.folder, name), "--approver", "olga", *olga)
    for key, risk in (("mid", "medium"), ("low", "low"), ("high", "high")):
        signer = () if key == "low" else ("--owner", "olga", *olga)
        place.ok("secret", "set", key, "--risk", risk, "--service", "shop", *signer, stdin=VALUES[key])
    yield place
    place.close()


@pytest.fixture
def world(ground: Place, tmp_path: Path, module: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A copy of that vault; functions called in this process find its keys."""
    place = copied(ground, tmp_path / "copy")
    monkeypatch.setenv("HOME", str(tmp_path / "copy"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    world = World(place, module)
    yield world
    world.close()
    place.close()


def add(world: World, name: str, effect: str, signer: str = "gov", **match: Any) -> None:
    """A rule, as `policy add` puts it."""
    before = world.vault().rules(world.store)
    world.m.change_rules(world.vault(), world.person(signer), before, [*before["rules"], rule(name, effect, **match)], f"added {effect}", name)


def take_out(world: World, name: str) -> None:
    before = world.vault().rules(world.store)
    world.m.change_rules(world.vault(), world.person("gov"), before, [one for one in before["rules"] if one["name"] != name], "removed", name)


def sets(world: World) -> list[Row]:
    return list(world.store.all(world.m.RULE_SETS))


def decisions(world: World) -> list[Row]:
    """The decisions that the log and the bus hold, which say the same."""
    leaves = [leaf["facts"] for leaf in world.leaves() if leaf["kind"] == "governance.decision"]
    assert leaves == [event["payload"] for event in world.place.events("governance.decision")]
    return leaves


def low_opens(world: World) -> bool:
    done = world.call("secret", "get", "low", "--action", "read", "--for", "a test")
    return (done.status, done.raw_out) == (0, VALUES["low"])


def doctor_says(world: World) -> list[str]:
    """What doctor finds wrong with the rules."""
    return [finding["message"] for finding in world.call("--json", "doctor").json["findings"] if finding["code"] == "rules"]


def unguarded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the requester's program asks no rules."""
    def ask_none(tx: Any, vault: Any, header: Row, claimed: Row, risk: str) -> Row:
        return dict(world.m.told_decision(world.m.NO_RULES, header, claimed, risk, tx.now))

    monkeypatch.setattr(world.m, "rule_on", ask_none)


# ---- the commands


def test_adding_listing_and_removing(world: World) -> None:
    """Each change is a further set, signed and in the log; the list is in the order in which rules are tried."""
    assert world.json("policy", "list") == {"number": 0, "signer": None, "verified": True, "problem": None, "created_at": None, "rules": []}
    assert "no rules" in world.ok("policy", "list").out
    gov, olga = world.as_("gov"), world.as_("olga")
    world.ok("policy", "add", "backups", "allow", "--by", "backup@*", *gov)
    world.ok("policy", "add", "two", "require", "--group", "user", "--risk", "high", *olga)
    done = world.json("policy", "add", "nights", "deny", "--secret", "mid*", "--hours", "22:00-06:00", "--tz", "Europe/Berlin", *gov)
    assert (done["number"], done["signer"], done["verified"], done["problem"]) == (3, "gov", True, None) and done["created_at"]
    assert [one["name"] for one in done["rules"]] == ["nights", "two", "backups"]
    assert done["rules"][0] == rule("nights", "deny", secret="mid*", hours="22:00-06:00", zone="Europe/Berlin")
    assert done["rules"][1] == rule("two", "require", group="user", risk="high") and done == world.json("policy", "list")
    shown = world.ok("policy", "list").out
    assert "set 3, signed by gov, verified" in shown and "require user" in shown and "22:00-06:00 Europe/Berlin" in shown
    done = world.json("policy", "remove", "two", *olga)
    assert (done["number"], done["signer"], [one["name"] for one in done["rules"]]) == (4, "olga", ["nights", "backups"])
    leaves = [leaf for leaf in world.leaves() if leaf["kind"] == "policy.changed"]
    assert [(leaf["subject"], leaf["facts"]["change"], leaf["facts"]["number"], leaf["facts"]["by"]) for leaf in leaves] == [
        ("backups", "added allow", 1, "gov"), ("two", "added require", 2, "olga"), ("nights", "added deny", 3, "gov"),
        ("two", "removed", 4, "olga")]  # fmt: skip
    assert world.json("audit", "verify")["ok"] and world.json("audit", "verify")["anchored"] == len(world.leaves())
    assert world.vault().seen.rules[0] == 4 and not doctor_says(world)


@pytest.mark.parametrize(("status", "words"), [
    (2, ("deny",)), (2, ("require",)), (2, ("allow",)), (2, ("allow", "--all")), (2, ("deny", "--all", "--secret", "mid")), (2, ("forbid", "--all")),
    *((2, ("deny", option, value)) for option in ("--secret", "--service", "--action", "--by")
      for value in ("", "*", "**", "ab*", "ab**", "a*b", "abc*d", "abc**", "*abc", "x" * 10_240, "abc\x01", "abc\n", "a\u202eb", "x\u200by")),
    *((2, ("deny", option, value)) for option in ("--secret", "--action") for value in ("a b", "naïve", "a/b", "-*")),
    *((2, ("deny", "--hours", value))
      for value in ("", "8-18", "08:00", "08:00-24:00", "08:60-09:00", "25:00-26:00", "08:00-08:00", "٠٨:00-18:00", "x" * 10_240)),
    *((2, ("deny", "--hours", "08:00-18:00", "--tz", value))
      for value in ("", "Mars/Olympus", "Europe", "../../etc/passwd", "/etc/localtime", "localtime", "utc ", "x" * 10_240, "Europe/\x1b[31m")),
    (2, ("deny", "--secret", "mid", "--tz", "UTC")), (2, ("deny", "--risk", "huge")), (2, ("deny", "--secret", "mid", "--group", "user")),
    (2, ("allow", "--secret", "mid", "--group", "governance")), (2, ("require", "--secret", "mid", "--group", "machine")),
])  # fmt: skip
def test_a_rule_that_says_nothing_or_nonsense(status: int, words: tuple[str, ...], ground: Place, module: Any, capsys: pytest.CaptureFixture[str],
                                              monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """A usage error before anything is asked, in one short line."""
    for name, value in ground.environment.items():
        monkeypatch.setenv(name, value)
    assert module.call(["policy", "add", "x", *words, "--approver", "gov", "--passphrase-file", "/nonexistent"]) == status
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("grace: ") and len(err) < 500 and "\x1b" not in err and "/nonexistent" not in err


def test_who_may_sign_rules(world: World) -> None:
    """Only the role governance; a second rule of a name, and one that is not there, are refused; so is a wrong passphrase."""
    assert world.call("policy", "add", "x", "deny", "--all", *world.as_("anna")).status == 5
    world.ok("policy", "add", "x", "deny", "--action", "never", *world.as_("gov"))
    assert world.call("policy", "add", "x", "deny", "--all", *world.as_("gov")).status == 4
    done = world.call("--json", "policy", "remove", "y", *world.as_("gov"))
    assert done.status == 3 and done.error["code"] == "not_found"
    assert world.call("policy", "remove", "x", *world.as_("anna")).status == 5
    assert world.call("policy", "remove", "x", "--approver", "gov", "--passphrase-file", word_file(world.place.folder, "anna")).status == 5
    assert world.call("policy", "remove", "x", "--approver", "nobody").status == 3 and world.call("policy", "remove", "x", "--approver", "gov").status == 7
    assert [row["number"] for row in sets(world)] == [1]
    for words in (("a b",), ("",), ("x" * 65,)):
        assert world.call("policy", "add", *words, "deny", "--all").status == 2


def test_two_changes_at_once(world: World) -> None:
    """Whoever comes second is told to look again."""
    before = world.vault().rules(world.store)
    add(world, "first", "deny", action="never")
    with pytest.raises(world.m.ConflictError):
        world.m.change_rules(world.vault(), world.person("olga"), before, [rule("second", "deny")], "added deny", "second")
    assert [one["name"] for one in world.vault().rules(world.store)["rules"]] == ["first"]


def test_at_most_two_hundred(world: World) -> None:
    """The set before stays in force; long texts fill it earlier."""
    vault, person = world.vault(), world.person("gov")
    full = [rule(f"r{n}", "deny", action=f"never{n}") for n in range(200)]
    world.m.change_rules(vault, person, vault.rules(world.store), full, "added deny", "r199")
    done = world.call("policy", "add", "more", "deny", "--action", "never", *world.as_("gov"))
    assert done.status == 4 and "200" in done.err
    with pytest.raises(world.m.ConflictError):
        world.m.change_rules(vault, person, vault.rules(world.store), [rule(f"r{n}", "deny", by="\U0001f600" * 128) for n in range(100)], "x", "x")
    assert (world.json("policy", "list")["number"], len(world.json("policy", "list")["rules"])) == (1, 200)
    asking = world.ask("mid", mode="collect")
    world.approve(asking.consent_id, "anna")
    assert world.collect(asking.consent_id) == VALUES["mid"]


def test_trying_a_use(world: World) -> None:
    """What would be decided and who would have to sign, at any instant; nothing is filed, and the log does not grow."""
    add(world, "night", "deny", hours="22:00-06:00", secret="mid")
    add(world, "deploys", "require", action="deploy*")
    add(world, "calm", "allow", by="calm one")
    before = len(world.leaves())

    def tried(status: int, *words: str) -> Row:
        done = world.call("--json", "policy", "test", *words)
        assert done.status == status, done.err
        return dict(done.json)

    noon = ("--at", "2026-11-22T12:00:00Z")
    got = tried(0, "mid", "--action", "deploy-web", "--by", "cron", *noon)
    assert got == {"secret_key": "mid", "action": "deploy-web", "requested_by": "cron", "risk_level": "medium", "effect": "require", "rule": "deploys",
                   "requires": {"governance": 1}, "number": 3, "denied": False, "needs": {"user": 1, "governance": 1},
                   "tested_at": "2026-11-22T12:00:00.000Z"}  # fmt: skip
    got = tried(1, "mid", "--action", "deploy-web", "--at", "2026-11-22T23:00:00+01:00")
    assert (got["effect"], got["rule"], got["denied"], got["needs"]) == ("deny", "night", True, {})
    got = tried(0, "low", "--action", "deploy-web")
    assert (got["risk_level"], got["needs"]) == ("medium", {"user": 1, "governance": 1})
    got = tried(0, "low", "--action", "read")
    assert (got["effect"], got["rule"], got["risk_level"], got["needs"]) == ("default", None, "low", {})
    got = tried(0, "mid", "--action", "read", "--by", "calm one", "--risk", "high", *noon)
    assert (got["effect"], got["rule"], got["needs"]) == ("allow", "calm", {"user": 1, "governance": 1})
    assert "denied" in world.call("policy", "test", "mid", "--action", "read", "--at", "2026-11-22T23:00:00Z").out
    assert tried(0, "mid", "--action", "read", *noon)["requested_by"]
    for status, words in ((3, ("none",)), (2, ("mid", "--at", "noon")), (2, ("mid", "--by", "")), (2, ("mid", "--risk", "huge")), (2, ("a b",))):
        assert world.call("policy", "test", *words, "--action", "read").status == status
    assert world.call("policy", "test", "mid").status == 2
    assert len(world.leaves()) == before and not world.fetch("SELECT 1 FROM secret_consent_records") and not decisions(world)


# ---- obeyed where a request is filed


@pytest.mark.parametrize("key", ["mid", "low", "high"])
def test_what_is_denied_is_refused_and_recorded(key: str, world: World) -> None:
    """Exit 5 and the rule's name at once, also at low risk and for a standing consent; nothing is filed."""
    add(world, "no-deploys", "deny", action="deploy*", secret=f"{key}*")
    words = ("--action", "deploy-web", "--for", "a test", "--by", "cron")
    done = world.call("secret", "get", key, *words)
    assert done.status == 5 and "no-deploys" in done.err and done.raw_out == b""
    told = {"consent_id": None, "secret_key": key, "action": "deploy-web", "requested_by": "cron", "risk_level": {"mid": "medium"}.get(key, key),
            "effect": "deny", "rule": "no-deploys", "requires": {}, "number": 1}  # fmt: skip
    assert decisions(world) == [told]
    if key == "mid":
        assert world.call("consent", "request", key, *words, "--standing", "30d").status == 5
        assert world.call("exec", "--secret", "A=mid:deploy-web", "--", "true").status == 125
        assert world.call("run", "--secret", "A=mid:deploy-web", "--", "true").status == 125
        assert [one["rule"] for one in decisions(world)] == ["no-deploys"] * 4
    assert not world.fetch("SELECT 1 FROM secret_consent_records") and world.json("audit", "verify")["ok"]
    assert low_opens(world) and len(decisions(world)) in (1, 4)


def test_a_required_signature_at_medium_risk(world: World) -> None:
    """User and governance, by two people; the prompt, the request and the record say so."""
    add(world, "deploys", "require", action="deploy*")
    asking = world.get("mid", "--by", "cron", action="deploy-web")
    (consent_id,) = world.pending()
    document = world.json("consent", "show", consent_id)
    assert (document["requires"], document["risk_level"], document["governance_approval_required"]) == ({"governance": 1}, "medium", True)
    assert decisions(world) == [{"consent_id": consent_id, "secret_key": "mid", "action": "deploy-web", "requested_by": "cron", "risk_level": "medium",
                                 "effect": "require", "rule": "deploys", "requires": {"governance": 1}, "number": 1}]  # fmt: skip
    shown = world.ok("consent", "approve", consent_id, *world.as_("olga"), "--as", "user").err
    assert "  rules     asked for governance:1 besides" in shown.splitlines() and world.status(consent_id) == "pending"
    assert world.call("consent", "approve", consent_id, *world.as_("olga"), "--as", "governance").status == 5
    assert world.call("consent", "approve", consent_id, *world.as_("anna"), "--as", "governance").status == 5
    world.ok("consent", "approve", consent_id, *world.as_("gov"))
    assert end_of(asking)[:2] == (0, VALUES["mid"])
    other = world.ask("mid", "read", mode="collect")
    assert world.row(other.consent_id)["consent_id"] not in {one["consent_id"] for one in decisions(world)} and other.request["requires"] == {}
    world.approve(other.consent_id, "anna")
    assert world.collect(other.consent_id) == VALUES["mid"]


def test_a_low_secret_under_a_requirement_asks(world: World) -> None:
    """It is filed at medium risk, with a key to answer to, and opens when both have signed."""
    add(world, "deploys", "require", action="deploy*")
    done = world.call("--json", "secret", "get", "low", "--action", "deploy-web", "--for", "a test", "--no-wait")
    assert (done.status, done.json["risk_level"], done.json["consent_status"]) == (75, "medium", "pending")
    consent_id = done.json["consent_id"]
    world.approve(consent_id, "anna")
    refused(world, lambda: world.collect(consent_id), 4)
    world.approve(consent_id, "gov")
    assert world.collect(consent_id) == VALUES["low"] and low_opens(world)
    add(world, "ask-me", "require", group="user", action="ask")
    asking = world.ask("low", "ask", mode="collect")
    world.approve(asking.consent_id, "anna")
    assert world.collect(asking.consent_id) == VALUES["low"]


def test_what_is_allowed_is_recorded_and_not_lowered(world: World) -> None:
    """The risk table stands; the log and the bus name the rule."""
    add(world, "calm", "allow", by="tester")
    asking = world.ask("high", mode="collect")
    assert [(one["effect"], one["rule"], one["consent_id"]) for one in decisions(world)] == [("allow", "calm", asking.consent_id)]
    world.approve(asking.consent_id, "anna")
    assert world.status(asking.consent_id) == "pending"
    world.approve(asking.consent_id, "gov")
    assert world.collect(asking.consent_id) == VALUES["high"]
    assert world.ask("low").value() == VALUES["low"] and decisions(world)[-1]["risk_level"] == "low"


def test_a_rule_that_was_removed(world: World) -> None:
    """Is obeyed no more; what was filed under it still takes what it was filed with."""
    add(world, "deploys", "require", action="deploy")
    before = world.ask("mid", "deploy", mode="collect")
    world.ok("policy", "remove", "deploys", *world.as_("gov"))
    after = world.ask("mid", "deploy", mode="collect")
    for asking in (before, after):
        world.approve(asking.consent_id, "anna")
    assert [world.status(asking.consent_id) for asking in (before, after)] == ["pending", "approved"] and len(decisions(world)) == 1
    assert world.collect(after.consent_id) == VALUES["mid"]
    world.approve(before.consent_id, "gov")
    assert world.collect(before.consent_id) == VALUES["mid"]


# ---- obeyed where it is used


@pytest.fixture
def kept_open(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is open stays so when rules change, as after an edit of its row: the opening itself looks at the rules."""
    monkeypatch.setattr(world.m, "end_ruled_out", lambda tx, rules: None)


@pytest.mark.parametrize("effect", ["deny", "require"])
def test_a_changed_rule_ends_what_it_would_not_let_through(effect: str, world: World) -> None:
    """What waits or was approved and fits no longer is void, so that it is asked for anew under the new rules; the rest goes on."""
    pending, approved, other = world.ask("mid", mode="collect"), world.ask("mid", mode="collect"), world.ask("high", mode="collect")
    world.approve(approved.consent_id, "anna")
    add(world, "late", effect, secret="mid")
    for asking in (pending, approved):
        row = world.row(asking.consent_id)
        assert (row["consent_status"], row["revocation_reason"]) == ("revoked", "the rules were changed")
    assert world.status(other.consent_id) == "pending"
    if effect == "require":
        anew = world.ask("mid", mode="collect")
        assert world.approve(anew.consent_id, "anna")["consent_status"] == "pending"
        assert world.approve(anew.consent_id, "gov")["consent_status"] == "approved" and world.collect(anew.consent_id) == VALUES["mid"]



@pytest.mark.parametrize(("effect", "cause"), [("deny", "the rule late forbids"), ("require", "the rules were changed after this was asked for")])
def test_a_rule_between_approval_and_use(effect: str, cause: str, world: World, kept_open: None) -> None:
    """Stops the use; a signature that was given anyhow is not asked for twice."""
    asking, serious = world.ask("mid", mode="collect"), world.ask("high", mode="collect")
    world.approve(asking.consent_id, "anna")
    for name in ("anna", "gov"):
        world.approve(serious.consent_id, name)
    add(world, "late", effect)
    refused_with_cause(world, lambda: world.collect(asking.consent_id), cause)
    if effect == "require":
        assert world.collect(serious.consent_id) == VALUES["high"]
    take_out(world, "late")
    assert world.collect(asking.consent_id) == VALUES["mid"]


def test_the_process_that_waits_is_stopped_as_well(world: World, kept_open: None) -> None:
    asking = world.ask("mid")
    world.approve(asking.consent_id, "anna")
    add(world, "late", "deny", secret="mid")
    refused_with_cause(world, asking.value, "the rule late forbids")


def test_hours_that_begin_between_approval_and_use(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock that counts is the one at the use."""
    now = datetime.fromtimestamp(world.m.clock() / 1000, timezone.utc)
    later = f"{(now.hour + 2) % 24:02}:00-{(now.hour + 6) % 24:02}:00"
    add(world, "evening", "deny", hours=later)
    asking = world.ask("mid", mode="collect")
    world.approve(asking.consent_id, "anna")
    real = world.m.told_decision
    with monkeypatch.context() as patch:
        patch.setattr(world.m, "told_decision", lambda rules, header, claimed, risk, at_ms: real(rules, header, claimed, risk, at_ms + 4 * 3_600_000))
        refused_with_cause(world, lambda: world.collect(asking.consent_id), "the rule evening forbids")
    assert world.collect(asking.consent_id) == VALUES["mid"]


def standing_by_request(world: World, *names: str) -> str:
    row = world.json("consent", "request", "mid", "--action", "test_action", "--for", "a test", "--by", "tester", "--standing", "30d")
    for name in names:
        world.approve(row["consent_id"], name)
    return str(row["consent_id"])


def standing_by_approval(world: World, *names: str) -> str:
    asking = world.ask("mid", mode="collect")
    for name in names:
        done = world.json("consent", "approve", asking.consent_id, "--for", "30d", *world.as_(name))
    assert world.collect(asking.consent_id) == VALUES["mid"]
    return str(done["consent_id"])


@pytest.mark.parametrize("effect", ["deny", "require"])
@pytest.mark.parametrize("give", [standing_by_request, standing_by_approval])
def test_a_later_rule_stops_a_standing_consent(give: Callable[..., str], effect: str, world: World, kept_open: None) -> None:
    """What it has approved but not opened is refused; what comes then is denied, or asks people again."""
    standing = give(world, "anna")
    assert world.ask("mid").value() == VALUES["mid"]
    covered = world.ask("mid", mode="collect")
    assert world.status(standing) == world.status(covered.consent_id) == "approved"
    add(world, "late", effect, secret="mid")
    refused_with_cause(world, lambda: world.collect(covered.consent_id), "the rule late" if effect == "deny" else "the rules were changed")
    if effect == "deny":
        refused(world, lambda: world.ask("mid"))
    else:
        assert world.status(world.ask("mid").consent_id) == "pending"
    take_out(world, "late")
    assert world.ask("mid").value() == VALUES["mid"]


@pytest.mark.parametrize("give", [standing_by_request, standing_by_approval])
def test_a_standing_consent_under_a_requirement(give: Callable[..., str], world: World) -> None:
    """Takes the signature of governance itself, and then covers what comes."""
    add(world, "both", "require", secret="mid")
    standing = give(world, "anna", "gov")
    assert json.loads(world.row(standing)["request"])["requires"] == {"governance": 1} and world.status(standing) == "approved"
    assert world.ask("mid").value() == VALUES["mid"]


def test_a_standing_consent_for_one_use_does_not_cover_what_a_rule_asks_more_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even when the requester's program has said nothing of the rule."""
    standing = standing_by_request(world, "anna")
    add(world, "both", "require", secret="mid")
    unguarded(world, monkeypatch)
    asking = world.ask("mid", mode="collect")
    assert world.row(asking.consent_id)["standing_id"] == standing
    refused_with_cause(world, lambda: world.collect(asking.consent_id), "the rules were changed")


# ---- and where it is approved


def test_an_approver_checks_the_rules_himself(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request whose program has asked no rules is signed by nobody."""
    add(world, "both", "require", action="deploy")
    add(world, "never", "deny", action="leak")
    unguarded(world, monkeypatch)
    for action, cause in (("deploy", "the rules were changed after this was asked for"), ("leak", "the rule never forbids")):
        asking = world.ask("mid", action, mode="collect")
        refused_with_cause(world, lambda asking=asking: world.approve(asking.consent_id, "anna"), cause)  # type: ignore[misc]


@pytest.mark.parametrize("wrong", [{"governance": 0}, {"governance": 2}, {"governance": True}, {"machine": 1}, {"user": "1"}, [], None, "governance"])
def test_a_request_with_odd_requirements(wrong: Any, world: World) -> None:
    """Is none, for whoever reads it."""
    asking = world.ask("mid", mode="collect")
    request = {**asking.request, "requires": wrong}
    with pytest.raises(world.m.RefusedError):
        world.m.request_of(world.m.canonical(request).decode())
    with pytest.raises(world.m.RefusedError):
        world.m.request_of(world.m.canonical({name: value for name, value in asking.request.items() if name != "requires"}).decode())
    low = world.ask("low")
    with pytest.raises(world.m.RefusedError):
        world.m.request_of(world.m.canonical({**low.request, "requires": {"governance": 1}}).decode())


def elsewhere(world: World, case: Row, name: str) -> Any:
    """`consent approve --in` on another machine."""
    path = world.place.folder / "case"
    path.write_text(json.dumps(case))
    return world.call("consent", "approve", "--in", str(path), "--out", "approval", *world.as_(name))


def test_approval_elsewhere_goes_by_the_approvers_own_memory(world: World) -> None:
    """With the newest set it is signed; without it, or with an older one, he refuses once he has seen it."""
    add(world, "both", "require", action="deploy")
    old = sets(world)
    add(world, "other", "deny", action="leak")
    asking = world.ask("mid", "deploy", mode="collect")
    assert world.call("consent", "export", asking.consent_id, "--out", "out").status == 0
    case = json.loads((world.place.folder / "out").read_text())
    assert [row["number"] for row in case["rules"]] == [1, 2]
    for name in ("anna", "gov"):
        done = elsewhere(world, case, name)
        assert done.status == 0, done.err
        world.ok("consent", "import", "approval")
    assert world.collect(asking.consent_id) == VALUES["mid"]
    assert world.person("anna").seen.rules[0] == 2
    other = world.ask("mid", "read", mode="collect")
    assert world.call("consent", "export", other.consent_id, "--out", "out").status == 0
    case = json.loads((world.place.folder / "out").read_text())
    document = json.loads(case["rules"][1]["document"])
    edited = {**case["rules"][1], "document": world.m.canonical({**document, "rules": []}).decode()}
    for cut in ([], case["rules"][:1], [edited], [case["rules"][0], edited], case["rules"][::-1], [{**case["rules"][1], "number": 3}]):
        done = elsewhere(world, {**case, "rules": cut}, "anna")
        assert done.status == 5 and "refused" in done.err, cut
    assert len(old) == 1 and elsewhere(world, {**case, "rules": case["rules"][1:]}, "anna").status == 0
    assert elsewhere(world, {name: value for name, value in case.items() if name != "rules"}, "anna").status == 5


def test_an_export_carries_no_more_than_it_must(world: World) -> None:
    """The newest fifty sets, or those that fit; an approver whose memory is older takes the signatures for it."""
    vault = world.vault()
    for n in range(55):
        world.m.change_rules(vault, world.person("gov"), vault.rules(world.store), [rule(f"r{n}", "deny", action="never")], "x", "x")
    person = world.person("ben")
    assert person.seen.rules == (0, "")
    asking = world.ask("mid", mode="collect")
    case = world.store.write(lambda tx: world.m.build_case(tx, asking.consent_id, "export"))
    assert [row["number"] for row in case["rules"]] == list(range(6, 56))
    review = world.m.Review(person, case, world.m.clock())
    review.learn()
    assert person.seen.rules[0] == 55
    big = [rule(f"b{n}", "deny", by="x" * 128, service="y" * 200) for n in range(190)]
    for n in range(2):
        world.m.change_rules(vault, world.person("gov"), vault.rules(world.store), [*big, rule(str(n), "deny", by="nobody")], "x", "x")
    case = world.store.write(lambda tx: world.m.build_case(tx, asking.consent_id, "export"))
    assert [row["number"] for row in case["rules"]] == [57] and world.m.Review(person, case, world.m.clock()).rules["number"] == 57


# ---- sets that somebody has tampered with


def forged(world: World, keys: Any, rules: list[Row], **changes: Any) -> tuple[str, bytes]:
    """A further set with changed fields, signed by any key."""
    before = world.vault().rules(world.store)
    made = {"format": "grace-rules/1", "vault_id": world.vault().id, "number": before["number"] + 1, "previous": world.m.rules_mark(before)[1] or None,
            "created": world.m.clock(), "signer": keys.fingerprint, "rules": rules, **changes}  # fmt: skip
    return world.m.canonical(made).decode(), keys.sign(world.m.statement("rules-signature", world.m.hash_of("rules", made)))


PUT = "INSERT INTO governance_rules VALUES (:number, :document, :signature)"


def put_forged(world: World, keys: Any, rules: list[Row], **changes: Any) -> None:
    document, signature = forged(world, keys, rules, **changes)
    world.attack(PUT, number=len(sets(world)) + 1, document=document, signature=signature)


def by_user(world: World) -> None:
    put_forged(world, world.person("anna").keys, [])


def by_stranger(world: World) -> None:
    put_forged(world, world.m.Keys.new(), [])


def by_stranger_in_her_name(world: World) -> None:
    put_forged(world, world.m.Keys.new(), [], signer=world.person("gov").keys.fingerprint)


def by_machine(world: World) -> None:
    put_forged(world, world.vault().machine, [])


def of_another_vault(world: World) -> None:
    put_forged(world, world.person("gov").keys, [], vault_id="0" * 16)


def after_nothing(world: World) -> None:
    put_forged(world, world.person("gov").keys, [], previous="0" * 64)


def with_a_gap(world: World) -> None:
    put_forged(world, world.person("gov").keys, [], number=9)


def of_another_format(world: World) -> None:
    put_forged(world, world.person("gov").keys, [], format="grace-rules/2")


def with_an_odd_rule(world: World) -> None:
    put_forged(world, world.person("gov").keys, [{**rule("x", "deny"), "secret": "*"}])


def allowing_everything(world: World) -> None:
    put_forged(world, world.person("gov").keys, [rule("x", "allow")])


def with_a_name_twice(world: World) -> None:
    put_forged(world, world.person("gov").keys, [rule("x", "deny"), rule("x", "deny")])


def with_a_missing_field(world: World) -> None:
    put_forged(world, world.person("gov").keys, [{"name": "x", "effect": "deny"}])


def edited(world: World) -> None:
    world.attack("UPDATE governance_rules SET document = replace(document, '\"leak\"', '\"lead\"')")


def spelled_otherwise(world: World) -> None:
    world.attack("UPDATE governance_rules SET document = document || ' ' WHERE number = 1")


def deleted(world: World) -> None:
    world.attack("DELETE FROM governance_rules WHERE number = 2")


def all_deleted(world: World) -> None:
    world.attack("DELETE FROM governance_rules")


def first_deleted(world: World) -> None:
    world.attack("DELETE FROM governance_rules WHERE number = 1")


def reordered(world: World) -> None:
    world.attack("UPDATE governance_rules SET number = 5 - number", "UPDATE governance_rules SET number = number - 2")


def older_in_its_place(world: World) -> None:
    world.attack("UPDATE governance_rules SET document = (SELECT document FROM governance_rules WHERE number = 1), "
                 "signature = (SELECT signature FROM governance_rules WHERE number = 1) WHERE number = 2")  # fmt: skip


def no_signature(world: World) -> None:
    world.attack("UPDATE governance_rules SET signature = zeroblob(64) WHERE number = 2")


def another_second(world: World) -> None:
    """Properly signed by governance, but not the one that was seen."""
    gov = world.person("gov").keys
    made = {**json.loads(sets(world)[1]["document"]), "rules": [], "signer": gov.fingerprint}
    signature = gov.sign(world.m.statement("rules-signature", world.m.hash_of("rules", made)))
    world.attack("UPDATE governance_rules SET document = :document, signature = :signature WHERE number = 2",
                 document=world.m.canonical(made).decode(), signature=signature)  # fmt: skip


def junk(world: World) -> None:
    world.attack(PUT, number=3, document="[]", signature=bytes(64))


TAMPERED: dict[Callable[[World], None], str] = {
    by_user: "not signed by an approver with the role governance", by_stranger: "not signed", by_stranger_in_her_name: "not signed", by_machine: "not signed",
    of_another_vault: "belongs to another vault", after_nothing: "does not follow", with_a_gap: "is missing", of_another_format: "another vault",
    with_an_odd_rule: "one * stands at the end only", allowing_everything: "would allow everything", with_a_name_twice: "a name twice",
    with_a_missing_field: "not the shape", edited: "", spelled_otherwise: "canonical", deleted: "rolled back: a newer set of rules was seen before",
    all_deleted: "rolled back", first_deleted: "is missing", reordered: "is missing", older_in_its_place: "is missing", no_signature: "not signed",
    another_second: "rolled back: the set of rules 2 is another one than the one seen before", junk: "canonical",
}  # fmt: skip


@pytest.mark.parametrize("tamper", TAMPERED, ids=lambda tamper: tamper.__name__)
def test_sets_that_were_tampered_with(tamper: Callable[[World], None], world: World) -> None:
    """Nothing above low risk is filed, approved or opened; low is; doctor and the list say why."""
    add(world, "leaks", "deny", action="leak")
    waiting, approved = world.ask("mid", mode="collect"), world.ask("mid", mode="collect")
    world.approve(approved.consent_id, "anna")
    add(world, "both", "require", action="deploy")
    tamper(world)
    cause = TAMPERED[tamper]
    refused_with_cause(world, lambda: world.ask("mid"), cause)
    refused_with_cause(world, lambda: world.collect(approved.consent_id), cause)
    found = doctor_says(world)
    assert len(found) == 1 and cause in found[0] and world.call("doctor").status == 1
    listed = world.json("policy", "list")
    assert listed["verified"] is False and cause in listed["problem"] and "not in force" in world.ok("policy", "list").out
    assert world.call("policy", "add", "x", "deny", "--all", *world.as_("gov")).status == 5
    assert world.call("policy", "test", "mid", "--action", "use").status == 5
    assert low_opens(world) and world.ask("low", "deploy").value() == VALUES["low"]
    refused_with_cause(world, lambda: world.approve(waiting.consent_id, "anna"), cause)
    assert world.status(waiting.consent_id) == "pending"


def test_after_a_restored_copy_an_approver_accepts_the_rules_that_there_are(world: World) -> None:
    """As he accepts the log and the list of approvers; from then on they can be changed again."""
    add(world, "leaks", "deny", action="leak")
    add(world, "both", "require", action="deploy", signer="olga")
    deleted(world)
    assert world.call("audit", "anchor", *world.as_("olga")).status == 5
    done = world.ok("audit", "anchor", "--accept", *world.as_("olga"))
    assert "set 2 of rules" in done.err and "set 1 of rules" in done.err
    assert not doctor_says(world) and world.json("policy", "list")["number"] == 1
    assert world.status(world.ask("mid").consent_id) == "pending"
    assert world.json("policy", "add", "again", "deny", "--action", "again", *world.as_("olga"))["number"] == 2
    edited(world)
    assert world.call("audit", "anchor", "--accept", *world.as_("olga")).status == 5


def test_somebody_who_has_left_signs_no_rules(world: World) -> None:
    """His last set is signed anew when he leaves; a further one of his counts for nobody, though his signature holds."""
    add(world, "leaks", "deny", action="leak")
    gov = world.person("gov").keys
    world.ok("approver", "remove", "gov", *world.as_("olga"))
    assert [(row["number"], json.loads(row["document"])["signer"]) for row in sets(world)] == [(1, gov.fingerprint), (2, world.person("olga").keys.fingerprint)]
    assert [leaf["facts"]["change"] for leaf in world.leaves() if leaf["kind"] == "policy.changed"][-1] == "signed anew"
    asking = world.ask("mid", mode="collect")
    world.approve(asking.consent_id, "anna")
    assert world.collect(asking.consent_id) == VALUES["mid"]
    put_forged(world, gov, [], created=0)
    refused_with_cause(world, lambda: world.ask("mid"), "not an approver any more")
    assert doctor_says(world) and low_opens(world)


def test_his_last_set_stands_for_whoever_has_seen_it(world: World) -> None:
    """Where he who takes him off the list may sign no rules; who has not seen it waits for the next one."""
    add(world, "leaks", "deny", action="leak")
    world.ok("approver", "remove", "gov", *world.as_("anna"))
    assert len(sets(world)) == 1 and not doctor_says(world)
    asking = world.ask("mid", mode="collect")
    refused_with_cause(world, lambda: world.approve(asking.consent_id, "anna"), "not an approver any more")
    assert world.person("olga").seen.rules[0] == 0
    world.ok("policy", "add", "more", "deny", "--action", "never", *world.as_("olga"))
    world.approve(asking.consent_id, "anna")
    assert world.collect(asking.consent_id) == VALUES["mid"]


def test_a_new_approver_and_a_new_machine_know_the_rules(world: World) -> None:
    """They begin with what whoever made them has seen."""
    add(world, "leaks", "deny", action="leak", signer="olga")
    world.ok("approver", "add", "dora", "--role", "user", "--new-passphrase-file", word_file(world.place.folder, "dora"), *world.as_("olga"))
    assert world.person("dora").seen.rules[0] == 1
    world.ok("init", "--machine", "--name", "olga", "--passphrase-file", word_file(world.place.folder, "olga"))
    assert world.vault().seen.rules[0] == 1
    all_deleted(world)
    refused_with_cause(world, lambda: world.ask("mid"), "rolled back")


def test_a_record_from_before_there_were_rules(world: World) -> None:
    """Reads as one that has seen none, and grows from there."""
    seen = world.vault().seen
    data = {"roster": list(seen.roster), "audit": list(seen.audit), "secrets": seen.secrets}
    frame = {"format": world.m.SEEN_FILE, "vault_id": world.vault().id, "name": "machine"}
    sealed = world.m.encrypted(seen.key, world.m.canonical(data), seen._bound)
    world.m.write_private(seen.path, {**frame, "data": world.m.b64(sealed)})
    assert world.vault().seen.rules == (0, "")
    add(world, "leaks", "deny", action="leak")
    mark = world.vault().seen.rules
    assert mark[0] == 1
    seen.learn(rules=(0, ""))
    assert world.vault().seen.rules == mark and os.stat(seen.path).st_mode & 0o777 == 0o600
