"""The vault as its user sees it, and as somebody attacks who holds its files: keys, seals, people, the audit log.

The attacker here writes to the real file, drops the triggers that stand in his way, and has the program's own functions.
What he changes must be refused with exit 5, leave nothing of a value in any output, and be in the log. (He opens the file
with apsw because this process does: two SQLite libraries in one process would undo each other's locks.)
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import stat
import tempfile
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest

from tests.conftest import Place, Result, until

Row = dict[str, Any]
WORDS = {"olga": b"olga's quiet sentence", "anna": b"anna counts the geese", "ben": b"ben walks to the mill"}
LATER = {"dora": b"dora mends the roof"}
VALUES = {"open": b"LOW-value-3fq81-canary", "mid": b"MID-value-9zk27-canary", "grave": b"HIGH-value-5tr63-canary", "pair": b"PAIR-value-8xw14-canary"}
OLD_MID = b"OLD-value-2hb90-canary"
ALL_VALUES = (*VALUES.values(), OLD_MID)


# ---- the vault that the tests share, and fresh copies of it


def word_file(place: Place, name: str) -> str:
    """The file with an approver's passphrase."""
    path = place.folder / f"{name}.word"
    if not path.exists():
        path.write_bytes({**WORDS, **LATER}[name] + b"\n")
        path.chmod(0o600)
    return str(path)


def as_olga(place: Place) -> tuple[str, ...]:
    return ("--owner", "olga", "--passphrase-file", word_file(place, "olga"))


def signed_as(place: Place, name: str) -> tuple[str, ...]:
    return ("--approver", name, "--passphrase-file", word_file(place, name))


def copy_rows(source: Path, target: Path) -> None:
    """A consistent copy of a database in one file, as a backup program makes it."""
    with contextlib.closing(apsw.Connection(str(source))) as old, contextlib.closing(apsw.Connection(str(target))) as new:
        with new.backup("main", old, "main") as work:
            work.step()
        new.pragma("journal_mode", "wal")
    target.chmod(0o600)


def fetch(db: Path, sql: str, *params: Any) -> list[tuple[Any, ...]]:
    with contextlib.closing(apsw.Connection(str(db))) as con:
        return list(con.execute(sql, params))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Three approvers, four secrets of several risks, and beside them `early.db`: a backup before `mid` got its second value."""
    place = Place(tmp_path_factory.mktemp("vault"))
    place.ok("config", "set", "vault.argon2_memory", "67108864")
    place.ok("init", "--name", "olga", "--passphrase-file", word_file(place, "olga"))
    for name, roles in (("anna", ("user",)), ("ben", ("user", "governance"))):
        place.ok("approver", "add", name, *(word for role in roles for word in ("--role", role)), "--new-passphrase-file", word_file(place, name),
                 *signed_as(place, "olga"))  # fmt: skip
    place.ok("secret", "set", "open", "--risk", "low", "--service", "weather", stdin=VALUES["open"] + b"\n")
    place.ok("secret", "set", "mid", "--service", "shop", *as_olga(place), stdin=OLD_MID)
    copy_rows(place.db, place.folder / "early.db")
    place.ok("secret", "set", "mid", *as_olga(place), stdin=VALUES["mid"])
    place.ok("secret", "set", "grave", "--risk", "high", "--action-risk", "delete=critical", *as_olga(place), stdin=VALUES["grave"])
    place.ok("secret", "set", "pair", "--policy", "user:2of3", *as_olga(place), stdin=VALUES["pair"])
    yield place
    place.close()


@pytest.fixture
def vault_place(world: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A copy of that vault to be changed at will: database and key files. Functions called in this process find its keys."""
    folder = tmp_path / "copy"
    shutil.copytree(world.folder, folder, symlinks=True, ignore=shutil.ignore_patterns("grace.db*", "grace"))
    shutil.copytree(world.folder / ".config", folder / ".config", dirs_exist_ok=True)
    copy_rows(world.db, folder / "grace.db")
    place = Place(folder)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    yield place
    place.close()


def keys_folder(place: Place) -> Path:
    """Where this vault's key files are."""
    (folder,) = (place.folder / ".config" / "grace").iterdir()
    return folder


@contextlib.contextmanager
def opened(module: Any, place: Place) -> Iterator[Any]:
    """The real store on the real file, in this process."""
    store = module.Store(str(place.db), "test")
    try:
        yield store
    finally:
        store.close()


def asked(module: Any, store: Any, key: str, action: str = "use", risk: str | None = None, mode: str = "once") -> Any:
    """A request for a secret, filed as `secret get` files it; what does not verify is refused and recorded."""
    with module.refusals(store, "vault", plain=False):
        vault = module.Vault(store)
    return module.ask_for(vault, module.ask_spec(key, action, "a test", "tester", None, risk, "{}", 60_000, mode))


def leaves(store: Any, kind: str = "") -> list[Row]:
    return [json.loads(row["leaf"]) for row in store.all("SELECT leaf FROM audit_log ORDER BY seq") if kind in row["leaf"]]


def cause_of(module: Any, place: Place, key: str, risk: str | None = None) -> str:
    """Why a request for a secret is refused: the cause in the newest leaf. Fails when it is not refused, or tells the requester why."""
    with opened(module, place) as store:
        before = store.value("SELECT MAX(seq) FROM audit_log")
        with pytest.raises(module.DeniedError) as refusal:
            asked(module, store, key, risk=risk)
        assert refusal.value.exit_code == 5
        new = [json.loads(row["leaf"]) for row in store.all("SELECT leaf FROM audit_log WHERE seq > :seq ORDER BY seq", seq=before)]
        assert [leaf["kind"] for leaf in new][-1:] == ["vault.refused"], new
        assert key == "open" or not any(leaf["kind"] == "consent.approved" for leaf in new)
        return str(new[-1]["facts"]["cause"])


def low_still_opens(module: Any, place: Place) -> None:
    with opened(module, place) as store:
        assert asked(module, store, "open").value() == VALUES["open"]


def canonical(value: Any) -> str:
    """Canonical JSON, written without grace."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def statement(label: str, value: Any) -> bytes:
    return f"grace/{label}/1\n{canonical(value)}".encode()


def hash_of(label: str, value: Any) -> str:
    return hashlib.sha256(statement(label, value)).hexdigest()


@contextlib.contextmanager
def attacking(db: Path, put_back: bool = True) -> Iterator[apsw.Connection]:
    """A stranger's connection to the file without the triggers, which are there again afterwards."""
    with contextlib.closing(apsw.Connection(str(db))) as con:
        triggers = [(str(name), str(text)) for name, text in con.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'")]
        con.execute("BEGIN")
        for name, _ in triggers:
            con.execute(f"DROP TRIGGER {name}")
        yield con
        for _, text in triggers if put_back else ():
            con.execute(text)
        con.execute("COMMIT")


def header_of(place: Place, key: str, version: int | None = None) -> Row:
    rows = fetch(place.db, "SELECT header FROM secret_entries WHERE secret_key = ? AND version = COALESCE(?, version) ORDER BY version DESC", key, version)
    return dict(json.loads(rows[0][0]))


def put_header(place: Place, key: str, header: Row, signature: bytes | None = None, sealed: bytes | None = None) -> None:
    """Replace the header of a secret's newest version, and its signature and sealed value where given."""
    with attacking(place.db) as con:
        con.execute("UPDATE secret_entries SET header = ?, signature = COALESCE(?, signature), sealed = COALESCE(?, sealed) "
                    "WHERE secret_key = ? AND sealed IS NOT NULL", (canonical(header), signature, sealed, key))  # fmt: skip


# ---- pure parts: sharing a key, policies, canonical text


@pytest.mark.parametrize("members", range(1, 8))
def test_any_subset_that_is_large_enough_gives_the_part_and_no_smaller_one(module: Any, members: int) -> None:
    """For each threshold and each subset of up to seven members; too few are refused, and so is an index outside the group."""
    for threshold in range(1, members + 1):
        for part in (os.urandom(32), bytes(32), b"\xff" * 32):
            shares = dict(enumerate(module.split_part(part, threshold, members), 1))
            assert len(shares) == members
            for size in range(members + 1):
                for chosen in itertools.combinations(shares, size):
                    some = {index: shares[index] for index in chosen}
                    if size >= threshold:
                        assert module.join_part(some, threshold, members) == part
                    else:
                        with pytest.raises(ValueError, match="too few"):
                            module.join_part(some, threshold, members)
        moved = {index + members: share for index, share in shares.items()}
        with pytest.raises(ValueError, match="too few"):
            module.join_part(moved, threshold, members)


def test_fewer_shares_than_the_threshold_tell_nothing_of_the_part(module: Any) -> None:
    """Whatever part there is, some polynomial or pad explains the shares that one member short holds: two parts, same look."""
    for threshold, members in ((2, 3), (3, 5), (4, 7), (3, 3)):
        rounds = [module.split_part(bytes(32), threshold, members) for _ in range(40)]
        for index in range(members):
            assert len({shares[index] for shares in rounds}) == 40, "a share repeats although the part is the same"
            assert bytes(32) not in {shares[index][-32:] for shares in rounds}


@pytest.mark.parametrize(("text", "expected"), [
    ("user:1", [("user", 1, None, None)]), ("user:2of3", [("user", 2, 3, None)]),
    ("  user : 1 &governance : 2 of 3 ", [("user", 1, None, None), ("governance", 2, 3, None)]),
    ("user:1(anna,ben)", [("user", 1, None, ["anna", "ben"])]), ("governance:2( anna , ben )", [("governance", 2, None, ["anna", "ben"])]),
    ("user:32of32", [("user", 32, 32, None)])])  # fmt: skip
def test_policies_are_read(module: Any, text: str, expected: list[tuple[Any, ...]]) -> None:
    """Groups with thresholds, sizes and names, however spaced."""
    assert [(p["group"], p["threshold"], p["of"], p["names"]) for p in module.parse_policy(text)] == expected


@pytest.mark.parametrize("text", [
    "", " ", "user", "user:", "user:0", "user:-1", "user:true", "user:1.0", "user:2of1", "user:0of3", "user:1 & user:1", "boss:1", "machine:1", "user:1 &",
    "& user:1", "user:1 governance:1", "user:1, governance:1", "user:3(anna,ben)", "user:2(anna,anna)", "user:1of", "user:1of2of3", "USER:1",
    "user:1 | governance:1", "user:٣", "user:1(anna", "user:1000", "user:1()"])  # fmt: skip
def test_words_that_are_no_policy_are_refused(module: Any, text: str) -> None:
    """With the part that is wrong, never read as something else."""
    with pytest.raises(ValueError, match=r"\S"):
        module.parse_policy(text)


def group(threshold: Any = 1, members: Any = ("a", "b"), name: Any = "user", **more: Any) -> Row:
    return {"group": name, "threshold": threshold, "members": list(members) if isinstance(members, tuple) else members, **more}


ODD_POLICIES: list[Any] = [
    None, [], "user:1", {}, {"all": []}, {"all": None}, {"all": {}}, {"any": [group()]}, {"all": [group()], "more": 1}, {"all": ["user"]}, {"all": [None]},
    {"all": [group(0)]}, {"all": [group(-1)]}, {"all": [group(True)]}, {"all": [group(False)]}, {"all": [group(3)]},
    {"all": [group(1.0)]}, {"all": [group("1")]},
    {"all": [group(None)]}, {"all": [group([1])]}, {"all": [group(10**30)]}, {"all": [group(1, ())]}, {"all": [group(1, "ab")]}, {"all": [group(1, None)]},
    {"all": [group(1, ("a", "a"))]}, {"all": [group(2, ("a", "b", "a"))]}, {"all": [group(1, ("a", 1))]}, {"all": [group(1, ("a", None))]},
    {"all": [group(1, ("a", ["b"]))]}, {"all": [group(1, tuple(f"m{n}" for n in range(33)))]}, {"all": [group(name="boss")]}, {"all": [group(name="")]},
    {"all": [group(name=None)]}, {"all": [group(name="User")]}, {"all": [group(), group()]}, {"all": [group(), group(name="governance", threshold=0)]},
    {"all": [group(weight=2)]}, {"all": [{"group": "user", "threshold": 1}]}]  # fmt: skip


@pytest.mark.parametrize("policy", ODD_POLICIES, ids=[str(n) for n in range(len(ODD_POLICIES))])
def test_a_policy_that_cannot_be_obeyed_is_called_odd(module: Any, policy: Any) -> None:
    """Thresholds of 0, below, true or above the members, empty or double groups, doubles in them, unknown parts, no part."""
    assert module.odd_policy(policy)


def test_a_plain_policy_is_not_odd(module: Any) -> None:
    """So that the test before this one can fail."""
    for policy in ({"all": [group()]}, {"all": [group(2)]}, {"all": [group(), group(name="governance", members=("a",))]}, {"all": [group(name="machine")]}):
        assert module.odd_policy(policy) is None


def test_the_highest_risk_counts_and_an_unknown_word_is_critical(module: Any) -> None:
    """Of several levels the highest; nothing known, an unknown word, another case: critical."""
    levels = ["low", "medium", "high", "critical"]
    for chosen in itertools.product([None, *levels], repeat=3):
        known = [level for level in chosen if level is not None]
        assert module.highest_risk(*chosen) == (max(known, key=levels.index) if known else "critical")
    odd_words: list[Any] = ["", "none", "LOW", "low ", "0", "trivial", 0, True, [], {"low": 1}]
    for odd in odd_words:
        assert module.highest_risk("low", odd) == "critical"
    assert module.highest_risk() == "critical"


def test_canonical_text_has_one_spelling(module: Any) -> None:
    """Sorted, ASCII, without spaces, the same as the one written here without grace; and it is read back as it was."""
    for value in ({}, {"b": 1, "a": [True, None, -5, "ä\u2028\x01\"\\/"], "ä": {"z": {}, "y": []}}, {"n": 10**30}, {"a": "\U0001f9a2"}):
        assert module.canonical(value) == canonical(value).encode()
        assert module.parse_canonical(canonical(value)) == value


@pytest.mark.parametrize("value", [1.0, {"a": 0.5}, [{"a": [1, 2.0]}], {"a": float("nan")}, {"a": (1,)}, {"a": b"x"}, {"a": {1}}, {1.5: 1}])
def test_what_has_no_single_spelling_cannot_be_signed(module: Any, value: Any) -> None:
    """Fractions, tuples, bytes, sets: refused, however deep."""
    with pytest.raises(ValueError, match="whole numbers"):
        module.canonical(value)


@pytest.mark.parametrize("text", [
    "", "{", "[]", "1", "null", '{"a":1.0}', '{"a":1e2}', '{"a":-0}', '{"a":01}', '{"b":1,"a":2}', '{"a":1,"a":1}', '{"a": 1}', '{"a":1} ', '\n{"a":1}',
    '{"a":"ä"}', '{"a":"\\/"}', '{"a":"\\u0041"}', '{"a":"\\u00E4"}', '{"a":NaN}', '{"a":Infinity}', '{"a":"\\ud800"}', '{"a":1}{}', "\ufeff{}",
    b'{"a":"\xff"}'])  # fmt: skip
def test_another_spelling_is_refused(module: Any, text: str | bytes) -> None:
    """So that nothing that was signed can be written in two ways."""
    with pytest.raises(ValueError, match=r"\S"):
        module.parse_canonical(text)


def test_a_padded_value_comes_back_whole_and_tells_little_of_its_length(module: Any) -> None:
    """Multiples of 256 bytes, also for values that end in zeros."""
    for length in (1, 2, 251, 252, 253, 256, 1000, 65536):
        for value in (bytes(length), b"\xff" * length):
            padded = module.pad(value)
            assert len(padded) % 256 == 0
            assert module.unpad(padded) == value
    assert len(module.pad(b"a")) == len(module.pad(b"a" * 200))


# ---- seals


def changes_of(header: Row) -> list[tuple[str, Any]]:
    """For each field of a header, values that it did not have when it was signed."""
    user = header["policy"]["all"][0]
    other = {name: [*user["members"]] for name in ("members",)}["members"][::-1]
    changed: list[tuple[str, Any]] = [
        ("format", "grace-secret/2"), ("vault_id", "0" * 16), ("key", "mie"), ("service", "shoq"), ("service", None), ("type", "password"),
        ("username", "root"), ("version", header["version"] + 1), ("version", header["version"] - 1), ("risk", "low"), ("risk", "high"), ("risk", "none"),
        ("action_risks", {"use": "low"}), ("owner", "0" * 64), ("created", header["created"] + 1), ("suite", header["suite"][:-1]), ("suite", "X25519"),
        ("commitment", "0" * 64), ("same_person", not header["same_person"]), ("allow_standing", not header["allow_standing"]), ("expires", 1),
        ("expires", 2**62), ("rotate_every", 1), ("rotate_with", "work"), ("policy", {"all": []}), ("policy", {"all": [{**user, "threshold": 0}]}),
        ("policy", {"all": [{**user, "threshold": True}]}), ("policy", {"all": [{**user, "threshold": 9}]}), ("policy", {"all": [{**user, "members": other}]}),
        ("policy", {"all": [{**user, "members": user["members"][:1]}]}), ("policy", {"all": [{**user, "group": "machine"}]}),
        ("policy", {"all": [user, {**user, "group": "governance"}]})]  # fmt: skip
    others: list[Any] = [[], {"a": 1}, None, 7, "7", True]
    for name, value in header.items():
        changed += [(name, odd) for odd in others if type(odd) is not type(value) and not (name == "policy" and odd == [])]
    return changed


def test_each_field_of_a_header_is_under_its_seal(module: Any, vault_place: Place) -> None:
    """Any other value, re-spelled canonically: refused, with the cause in the log; low risk is untouched by it."""
    header = header_of(vault_place, "mid")
    changed = [(name, value) for name, value in changes_of(header) if header[name] != value]
    assert {name for name, _ in changed} == set(header)
    words = "the seal of|not of this vault|stranger|policy|threshold|shape|member|machine|group|older than|another one"
    for name, value in changed:
        put_header(vault_place, "mid", {**header, name: value})
        assert re.search(words, cause_of(module, vault_place, "mid")), (name, value)
    low_still_opens(module, vault_place)
    put_header(vault_place, "mid", header)
    with opened(module, vault_place) as store:
        assert asked(module, store, "mid").consent_id, "the header as it was signed is taken"


def test_a_field_more_or_less_or_another_spelling_is_refused(module: Any, vault_place: Place) -> None:
    """A header has exactly its fields, in one spelling."""
    header = header_of(vault_place, "mid")
    for name in header:
        put_header(vault_place, "mid", {key: value for key, value in header.items() if key != name})
        assert "shape" in cause_of(module, vault_place, "mid")
    put_header(vault_place, "mid", {**header, "note": None})
    assert "shape" in cause_of(module, vault_place, "mid")
    backwards = json.dumps(dict(reversed(header.items())), separators=(",", ":"))
    for text in (json.dumps(header), canonical(header) + " ", backwards, "[]", "7", "null", '"text"', "{}"):
        with attacking(vault_place.db) as con:
            con.execute("UPDATE secret_entries SET header = ? WHERE secret_key = 'mid' AND sealed IS NOT NULL", (text,))
        assert re.search("canonical|shape", cause_of(module, vault_place, "mid")), text


def test_fields_swapped_with_another_secrets_are_refused(module: Any, vault_place: Place) -> None:
    """One field after the other, then header, sealed value and signature in all combinations."""
    header, other = header_of(vault_place, "mid"), header_of(vault_place, "grave")
    for name in header:
        if header[name] != other[name]:
            put_header(vault_place, "mid", {**header, name: other[name]})
            assert re.search("the seal of|holds another secret|policy", cause_of(module, vault_place, "mid")), name
    get = "SELECT header, sealed, signature FROM secret_entries WHERE secret_key = ? ORDER BY version DESC"
    mine, theirs = fetch(vault_place.db, get, "mid")[0], fetch(vault_place.db, get, "grave")[0]
    mine = (canonical(header), *mine[1:])
    for choice in itertools.product((0, 1), repeat=3):
        if any(choice):
            mixed = [(mine, theirs)[which][column] for column, which in enumerate(choice)]
            with attacking(vault_place.db) as con:
                con.execute("UPDATE secret_entries SET header = ?, sealed = ?, signature = ? WHERE secret_key = 'mid' AND sealed IS NOT NULL", mixed)
            cause = cause_of(module, vault_place, "mid")
            assert ("holds another secret" if all(choice) else "the seal of") in cause, choice
    low_still_opens(module, vault_place)


def test_a_changed_byte_of_value_or_signature_is_refused(module: Any, vault_place: Place) -> None:
    """First, last, middle, cut off, added; low risk as well."""
    for key in ("mid", "open"):
        row = fetch(vault_place.db, "SELECT sealed, signature FROM secret_entries WHERE secret_key = ? AND sealed IS NOT NULL", key)[0]
        for column, data in zip(("sealed", "signature"), row, strict=True):
            odd = [bytes([*data[:n], data[n] ^ 1, *data[n + 1 :]]) for n in (0, 11, 12, 31, 32, len(data) // 2, len(data) - 1)]
            odd += [data[:-1], data + b"\0", b"x"] if column == "sealed" else [bytes(64)]
            for changed in odd:
                with attacking(vault_place.db) as con:
                    con.execute(f"UPDATE secret_entries SET {column} = ? WHERE secret_key = ? AND sealed IS NOT NULL", (changed, key))
                assert "the seal of" in cause_of(module, vault_place, key)
            with attacking(vault_place.db) as con:
                con.execute(f"UPDATE secret_entries SET {column} = ? WHERE secret_key = ? AND sealed IS NOT NULL", (data, key))
    low_still_opens(module, vault_place)


def stolen(module: Any, place: Place) -> tuple[Any, Row]:
    """What somebody has who reads the machine's key: its keys, and the newest roster."""
    document = json.loads((keys_folder(place) / "machine.key").read_bytes())
    roster = json.loads(fetch(place.db, "SELECT document FROM vault_rosters ORDER BY number DESC")[0][0])
    return module.Keys(base64.b64decode(document["private"])), roster


def forge(module: Any, place: Place, keys: Any, name: str, following: bool = False, **fields: Any) -> None:
    """Seal a value of the attacker's choice with his keys and put it in the place of a secret's newest version, whole, or after it."""
    _, roster = stolen(module, place)
    header = {**header_of(place, name), **fields}
    made = module.seal(keys, {field: value for field, value in header.items() if field not in ("owner", "suite", "commitment")}, b"forged", roster)
    header = {**made["header"], **{field: fields[field] for field in ("owner",) if field in fields}}
    signature = keys.sign(statement("seal", [hash_of("header", header), hashlib.sha256(made["sealed"]).hexdigest()]))
    with attacking(place.db) as con:
        row = (header["version"], canonical(header), made["sealed"], hashlib.sha256(made["sealed"]).hexdigest(), signature)
        if following:
            con.execute("UPDATE secret_entries SET sealed = NULL, removed_at = 1 WHERE secret_key = ? AND sealed IS NOT NULL", (name,))
            con.execute("INSERT INTO secret_entries (secret_key, version, header, sealed, sealed_hash, signature, created_at) VALUES (?, ?, ?, ?, ?, ?, 1)",
                        (name, *row))  # fmt: skip
        else:
            con.execute("UPDATE secret_entries SET version = ?, header = ?, sealed = ?, sealed_hash = ?, signature = ? "
                        "WHERE secret_key = ? AND sealed IS NOT NULL", (*row, name))  # fmt: skip
        con.execute("DELETE FROM secret_shares WHERE secret_key = ?", (name,))
        for share in made["shares"]:
            con.execute("INSERT INTO secret_shares (secret_key, version, group_name, member, share_index, wrap) VALUES (?, ?, ?, ?, ?, ?)",
                        (name, header["version"], share["group"], share["member"], share["index"], share["wrap"]))  # fmt: skip


def test_a_seal_by_an_attackers_own_key_is_refused(module: Any, vault_place: Place) -> None:
    """Under his own name or the owner's, for the same version or a newer one, for a known secret."""
    own, owner = module.Keys.new(), header_of(vault_place, "mid")["owner"]
    tries: list[tuple[Row, str]] = [({}, "stranger"), ({"owner": owner}, "the seal of"), ({"version": 3}, "stranger"),
                                    ({"version": 3, "owner": owner}, "the seal of")]  # fmt: skip
    for fields, expected in tries:
        forge(module, vault_place, own, "mid", **fields)
        assert expected in cause_of(module, vault_place, "mid")
    low_still_opens(module, vault_place)


def machine_policy(place: Place) -> Row:
    return dict(header_of(place, "open")["policy"])


@pytest.mark.parametrize("risk", ["medium", "high", "critical", "none", "LOW"])
def test_the_machine_seals_low_risk_only(module: Any, vault_place: Place, risk: str) -> None:
    """Whoever has the machine's key cannot put a value of his under a name of higher risk, whatever policy he writes."""
    machine, _ = stolen(module, vault_place)
    for policy in (header_of(vault_place, "mid")["policy"], machine_policy(vault_place)):
        forge(module, vault_place, machine, "mid", risk=risk, policy=policy)
        assert re.search("low risk only|odd policy", cause_of(module, vault_place, "mid"))


def test_the_machine_cannot_take_over_a_name_that_an_owner_had_sealed(module: Any, vault_place: Place) -> None:
    """No downgrade to low: not with older versions there, not with all of them deleted, not for the same version."""
    machine, _ = stolen(module, vault_place)
    low = {"risk": "low", "policy": machine_policy(vault_place)}
    forge(module, vault_place, machine, "mid", **low, version=3)
    assert "although an approver had sealed it" in cause_of(module, vault_place, "mid")
    with attacking(vault_place.db) as con:
        con.execute("DELETE FROM secret_entries WHERE secret_key = 'mid' AND version < 3")
    assert "although an approver had sealed it" in cause_of(module, vault_place, "mid")


def test_nor_after_the_secret_was_removed(module: Any, vault_place: Place) -> None:
    """What an owner once sealed never becomes a low-risk name: neither by its user's mistake nor by a stranger's row."""
    vault_place.ok("secret", "remove", "mid")
    again = vault_place.call("secret", "set", "mid", "--risk", "low", stdin=b"value")
    assert again.status == 4, again.err
    machine, _ = stolen(module, vault_place)
    for version in (3, 1):
        forge(module, vault_place, machine, "open", risk="low", key="mid", version=version)
        with attacking(vault_place.db) as con:
            con.execute("DELETE FROM secret_entries WHERE secret_key = 'mid'")
            con.execute("UPDATE secret_entries SET secret_key = 'mid' WHERE secret_key = 'open'")
            con.execute("UPDATE secret_shares SET secret_key = 'mid' WHERE secret_key = 'open'")
        assert re.search("although an approver had sealed it", cause_of(module, vault_place, "mid"))
        with attacking(vault_place.db) as con:
            con.execute("UPDATE secret_entries SET secret_key = 'open' WHERE secret_key = 'mid'")
            con.execute("UPDATE secret_shares SET secret_key = 'open' WHERE secret_key = 'mid'")


def test_a_low_secret_can_be_forged_by_the_machines_key_but_not_by_another(module: Any, vault_place: Place) -> None:
    """The limit that the documentation admits: who has the machine's key, has low risk. Nobody else has."""
    machine, _ = stolen(module, vault_place)
    forge(module, vault_place, machine, "open", following=True, version=2)
    with opened(module, vault_place) as store:
        assert asked(module, store, "open").value() == b"forged"
    forge(module, vault_place, module.Keys.new(), "open", following=True, version=3)
    assert "stranger" in cause_of(module, vault_place, "open")


def test_an_owners_header_with_a_machine_part_or_low_risk_is_refused(module: Any, vault_place: Place) -> None:
    """Such a seal is made by no program of ours, even when its signature is right."""
    with opened(module, vault_place) as store:
        owner = module.unlock(module.Vault(store), "olga", word_file(vault_place, "olga"))
    for fields in ({"risk": "low"}, {"policy": machine_policy(vault_place)}, {"risk": "low", "policy": machine_policy(vault_place)}):
        forge(module, vault_place, owner.keys, "mid", version=3, **fields)
        assert "odd policy" in cause_of(module, vault_place, "mid")


def test_rows_of_another_vault_are_refused(module: Any, vault_place: Place, tmp_path: Path) -> None:
    """A secret of the same name, sealed by an approver of the same name with the same passphrase, copied over whole."""
    (tmp_path / "other").mkdir()
    other = Place(tmp_path / "other")
    other.ok("config", "set", "vault.argon2_memory", "67108864")
    other.ok("init", "--name", "olga", "--passphrase-file", word_file(other, "olga"))
    for _ in range(3):
        other.ok("secret", "set", "mid", *as_olga(other), stdin=b"foreign")
    entry = fetch(other.db, "SELECT version, header, sealed, signature FROM secret_entries WHERE sealed IS NOT NULL")[0]
    shares = fetch(other.db, "SELECT secret_key, version, group_name, member, share_index, wrap FROM secret_shares")
    with attacking(vault_place.db) as con:
        con.execute("UPDATE secret_entries SET version = ?, header = ?, sealed = ?, signature = ? WHERE secret_key = 'mid' AND sealed IS NOT NULL", entry)
        con.execute("DELETE FROM secret_shares WHERE secret_key = 'mid'")
        con.executemany("INSERT INTO secret_shares (secret_key, version, group_name, member, share_index, wrap) VALUES (?, ?, ?, ?, ?, ?)", shares)
    assert "not of this vault" in cause_of(module, vault_place, "mid")
    with attacking(vault_place.db) as con:  # and its vault's id with it: then this vault's machine key is not the one
        con.execute("UPDATE settings SET value = (SELECT json_extract(?, '$.vault_id')) WHERE name = '_vault_id'", (entry[1],))
    done = vault_place.call("secret", "get", "open", "--action", "use", "--for", "a test")
    assert (done.status, done.out) == (7, "")


def sealed_by(module: Any, store: Any, approver: Any, name: str, roster: Row) -> Row:
    """The next version of a secret, rightly sealed by an approver, whoever may be its owner."""
    entry = store.one(module.NEWEST_VERSION, key=name)
    fields = {**json.loads(entry["header"]), "version": entry["version"] + 1, "created": module.clock()}
    return dict(module.seal(approver.keys, {field: fields[field] for field in fields if field not in ("owner", "suite", "commitment")}, b"planted", roster))


def test_a_version_by_an_approver_who_neither_owned_nor_used_the_one_before_is_refused(module: Any, vault_place: Place) -> None:
    """Another approver's key signs well, and still plants no value: nor with a version of his own between, nor with the older ones gone."""
    vault_place.ok("secret", "set", "mine", "--policy", "user:1(olga)", *as_olga(vault_place), stdin=b"olga's own")
    with opened(module, vault_place) as store:
        vault = module.Vault(store)
        ben = module.unlock(vault, "ben", word_file(vault_place, "ben"))
        for _ in range(2):
            made = sealed_by(module, store, ben, "mine", vault.roster)
            store.write(lambda tx, made=made: module.store_version(tx, made, "stored", ben))
            assert "neither owned the one before" in cause_of(module, vault_place, "mine")
    with attacking(vault_place.db) as con:
        con.execute("DELETE FROM secret_shares WHERE secret_key = 'mine' AND version < 3")
        con.execute("DELETE FROM secret_entries WHERE secret_key = 'mine' AND version < 3")
    assert "is missing" in cause_of(module, vault_place, "mine")


def test_an_approver_elsewhere_follows_the_versions_from_the_one_that_he_has_seen(module: Any, vault_place: Place) -> None:
    """Anna, who has seen the first version only, approves the fourth when each came from an owner or user of the one before, and not otherwise."""
    vault_place.ok("secret", "set", "shared", "--policy", "user:1(olga,anna)", *as_olga(vault_place), stdin=b"first")
    first = vault_place.call("consent", "request", "shared", "--action", "use", "--for", "a test", "--json").json["consent_id"]
    vault_place.ok("consent", "approve", first, *signed_as(vault_place, "anna"))
    for owner in ("anna", "olga", "anna"):
        vault_place.ok("secret", "rotate", "shared", "--owner", owner, "--passphrase-file", word_file(vault_place, owner), stdin=b"next")
    asked_now = vault_place.call("consent", "request", "shared", "--action", "use", "--for", "a test", "--json").json["consent_id"]
    with opened(module, vault_place) as store:
        anna = module.unlock(module.Vault(store), "anna", word_file(vault_place, "anna"))
        case = store.write(lambda tx: module.build_case(tx, asked_now, "anna"))
    assert len(case["before"]) == 3
    anna.seen.secrets["shared"] = [1, hash_of("header", json.loads(case["before"][-1]["header"])), True]
    assert module.Review(anna, case, module.clock()).header["version"] == 4
    newest, *older = case["before"]
    for odd in ([newest], [], [older[0], *older], [{**newest, "seal": older[0]["seal"]}, *older]):
        with pytest.raises(module.RefusedError):
            module.Review(anna, {**case, "before": odd}, module.clock())


# ---- rollback of single rows


VERSION_COLUMNS = "seq, secret_key, version, header, sealed, sealed_hash, signature, created_at"


def put_early_rows_back(place: Place) -> None:
    """The first version of `mid` from the backup, in the place of all that there is of it now."""
    early = place.folder / "early.db"
    entry = fetch(early, f"SELECT {VERSION_COLUMNS} FROM secret_entries WHERE secret_key = 'mid'")[0]
    shares = fetch(early, "SELECT secret_key, version, group_name, member, share_index, wrap FROM secret_shares WHERE secret_key = 'mid'")
    with attacking(place.db) as con:
        con.execute("DELETE FROM secret_shares WHERE secret_key = 'mid'")
        con.execute("DELETE FROM secret_entries WHERE secret_key = 'mid'")
        con.execute(f"INSERT INTO secret_entries ({VERSION_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", entry)
        con.executemany("INSERT INTO secret_shares (secret_key, version, group_name, member, share_index, wrap) VALUES (?, ?, ?, ?, ?, ?)", shares)


def test_an_older_version_put_back_behind_a_pin_is_refused(module: Any, vault_place: Place) -> None:
    """Whole and rightly signed as it is: the machine has seen a newer one. Other secrets are not touched by it."""
    put_early_rows_back(vault_place)
    assert "older than the version 2 seen before" in cause_of(module, vault_place, "mid")
    low_still_opens(module, vault_place)
    with opened(module, vault_place) as store:
        assert asked(module, store, "grave").consent_id
    done = vault_place.call("secret", "get", "mid", "--action", "use", "--for", "a test", "--timeout", "5s")
    assert (done.status, done.out) == (5, "")
    assert "older" not in done.err, "the requester is told no more than that it is refused"


@pytest.mark.parametrize("words", [("rotate", "mid"), ("set", "mid"), ("reshare", "mid", "--approver", "olga")], ids=["rotate", "set", "reshare"])
def test_a_new_value_is_not_sealed_on_top_of_rows_that_were_put_back(vault_place: Place, words: tuple[str, ...]) -> None:
    """The new version would inherit risk and policy of the old one, and the pin would be overwritten."""
    put_early_rows_back(vault_place)
    passphrase = ("--passphrase-file", word_file(vault_place, "olga"))
    done = vault_place.call("secret", *words, *(passphrase if words[0] == "reshare" else as_olga(vault_place)), stdin=b"newer")
    assert (done.status, done.out) == (5, ""), done.err
    assert vault_place.sql("SELECT MAX(version) FROM secret_entries WHERE secret_key = 'mid'") == [[1]]


def test_a_new_value_is_not_sealed_where_all_versions_were_deleted(vault_place: Place) -> None:
    """A name that was seen at version 2 cannot begin again at 1 with the default policy."""
    with attacking(vault_place.db) as con:
        con.execute("DELETE FROM secret_shares WHERE secret_key = 'grave'")
        con.execute("DELETE FROM secret_entries WHERE secret_key = 'grave'")
    done = vault_place.call("secret", "set", "grave", *as_olga(vault_place), stdin=b"newer")
    assert (done.status, done.out) == (5, ""), done.out


def test_an_approvers_own_pin_holds_where_the_machines_is_gone(module: Any, vault_place: Place) -> None:
    """Whoever rolls back the machine's record with the database meets the approver who has seen the newer version."""
    with opened(module, vault_place) as store:
        vault = module.Vault(store)
        vault.seen.secrets.pop("mid")
        vault.seen.save()
    put_early_rows_back(vault_place)
    with opened(module, vault_place) as store:
        asking = asked(module, store, "mid")
        approved = vault_place.call("consent", "approve", asking.consent_id, *signed_as(vault_place, "olga"))
        assert (approved.status, approved.out) == (5, ""), approved.err
        assert "older than the version 2 seen before" in leaves(store, "vault.refused")[-1]["facts"]["cause"]
        assert store.value("SELECT COUNT(*) FROM consent_grants") == 0


def test_another_header_under_a_version_that_was_seen_is_refused(module: Any, vault_place: Place) -> None:
    """An owner's second seal under the same number, made from a copy: pinned is the one that was seen."""
    with opened(module, vault_place) as store:
        owner = module.unlock(module.Vault(store), "olga", word_file(vault_place, "olga"))
    forge(module, vault_place, owner.keys, "mid")
    assert "another one than the one seen before" in cause_of(module, vault_place, "mid")


# ---- parts


def share_rows(place: Place, key: str) -> list[Row]:
    names = ("seq", "group_name", "member", "share_index", "wrap")
    return [dict(zip(names, row, strict=True)) for row in fetch(place.db, f"SELECT {', '.join(names)} FROM secret_shares WHERE secret_key = ?", key)]


def put_wrap(place: Place, seq: int, wrap: bytes) -> None:
    with attacking(place.db) as con:
        con.execute("UPDATE secret_shares SET wrap = ? WHERE seq = ?", (wrap, seq))


def test_a_low_secrets_part_is_bound_to_its_place(module: Any, vault_place: Place) -> None:
    """The machine's part changed by a byte, or another's in its place: refused when it is opened, and recorded."""
    rows = share_rows(vault_place, "open")
    machine, _ = stolen(module, vault_place)
    mine = next(row for row in rows if row["member"] == machine.fingerprint)
    others = [row["wrap"] for row in rows if row is not mine] + [share_rows(vault_place, "mid")[0]["wrap"]]
    own = module.wrap_to(machine.public, bytes(32), b"grace/share/1\n[]")
    cut = [mine["wrap"][:-1], mine["wrap"][:100], b"", mine["wrap"] + b"\0"]
    flipped = [bytes([*mine["wrap"][:n], mine["wrap"][n] ^ 128, *mine["wrap"][n + 1 :]]) for n in (0, 500, 1100, len(mine["wrap"]) - 2)]
    for wrap in [*others, own, *cut, *flipped]:
        put_wrap(vault_place, mine["seq"], wrap)
        assert "does not open" in cause_of(module, vault_place, "open")
    right = module.wrap_to(machine.public, bytes(32), module.share_info(hash_of("header", header_of(vault_place, "open")), hashlib.sha256(
        sealed_of(vault_place, "open")).hexdigest(), "machine", machine.fingerprint, mine["share_index"]))  # fmt: skip
    put_wrap(vault_place, mine["seq"], right)
    assert "do not give the key" in cause_of(module, vault_place, "open")
    with attacking(vault_place.db) as con:
        con.execute("DELETE FROM secret_shares WHERE secret_key = 'open'")
    assert "too few" in cause_of(module, vault_place, "open")


def sealed_of(place: Place, key: str) -> bytes:
    return bytes(fetch(place.db, "SELECT sealed FROM secret_entries WHERE secret_key = ? AND sealed IS NOT NULL", key)[0][0])


def test_an_approvers_part_swapped_or_changed_is_refused_before_anything_is_signed(module: Any, vault_place: Place) -> None:
    """Between members, groups, secrets and versions, or by a byte: no grant comes of it, and the log says why."""
    with opened(module, vault_place) as store:
        vault = module.Vault(store)
        olga, ben = (module.unlock(vault, name, word_file(vault_place, name)) for name in ("olga", "ben"))
        rows = share_rows(vault_place, "grave")
        mine = next(row for row in rows if row["member"] == olga.keys.fingerprint and row["group_name"] == "user")
        old = fetch(vault_place.folder / "early.db", "SELECT wrap FROM secret_shares WHERE secret_key = 'mid' AND member = ?", olga.keys.fingerprint)[0][0]
        wraps = [row["wrap"] for row in rows if row is not mine] + [row["wrap"] for row in share_rows(vault_place, "mid")]
        wraps += [old, b"", mine["wrap"][:-1] + b"x"]
        row = store.one("SELECT * FROM secret_consent_records WHERE consent_id = :id", id=asked(module, store, "grave", mode="collect").consent_id)
        for wrap in wraps:
            put_wrap(vault_place, mine["seq"], wrap)
            review, seen = module.judge(vault, olga, row)
            with pytest.raises(module.RefusedError, match="does not open"):
                module.sign_and_record(vault, review, ["user"], seen, None, word_file(vault_place, "olga"))
        assert store.value("SELECT COUNT(*) FROM consent_grants") == 0
        done = vault_place.call("consent", "approve", row["consent_id"], "--as", "user", *signed_as(vault_place, "olga"))
        assert (done.status, done.out) == (5, ""), done.err
        assert "does not open" in leaves(store)[-1]["facts"].get("cause", ""), "the refusal is not in the log"
        put_wrap(vault_place, mine["seq"], mine["wrap"])
        with attacking(vault_place.db) as con:  # his index and another's name
            con.execute("UPDATE secret_shares SET share_index = 9 WHERE seq = ?", (mine["seq"],))
        done = vault_place.call("consent", "approve", row["consent_id"], "--as", "user", *signed_as(vault_place, "olga"))
        assert (done.status, done.out) == (5, "")
        assert ben.name == "ben"


# ---- key files


def key_of(place: Place, name: str = "olga") -> Path:
    return keys_folder(place) / f"{name}.key"


def anchored(place: Place, name: str = "olga") -> Result:
    """A command that takes an approver's passphrase."""
    return place.call("audit", "anchor", *signed_as(place, name))


def entered(module: Any, place: Place, name: str = "olga") -> Any:
    """An approver, unlocked as the commands do it: the machine's key, its record, the approver's key, his record."""
    with opened(module, place) as store:
        with module.refusals(store, "vault", plain=False):
            vault = module.Vault(store)
        return module.unlock(vault, name, word_file(place, name))


def not_entered(module: Any, place: Place, words: str, name: str = "olga") -> None:
    """It is refused with exit 5 and such words."""
    with pytest.raises(module.DeniedError, match=words) as refusal:
        entered(module, place, name)
    assert refusal.value.exit_code == 5


def test_key_files_are_private(vault_place: Place) -> None:
    """Directory 0700, each file 0600, and nothing in them that could be read without the passphrase."""
    folder = keys_folder(vault_place)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert (folder.parent.stat().st_mode | folder.parent.parent.stat().st_mode) & 0o022 == 0, "others could put another directory in its place"
    files = {path.name: path for path in folder.iterdir()}
    assert {f"{name}.{end}" for name in (*WORDS, "machine") for end in ("key", "seen")} <= set(files)
    assert {stat.S_IMODE(path.stat().st_mode) for path in files.values()} == {0o600}
    for name in WORDS:
        document = json.loads(files[f"{name}.key"].read_bytes())
        assert document["kdf"] == {**document["kdf"], "name": "argon2id", "memory_kib": 65536, "iterations": 3}
        assert len(base64.b64decode(document["private"])) == 12 + 160 + 16
        assert files[f"{name}.key"].read_bytes() == (canonical(document) + "\n").encode()


def test_a_wrong_passphrase_opens_nothing(module: Any, vault_place: Place) -> None:
    """Exit 5 and the same words for any; an empty one or none at all is no passphrase."""
    file = Path(word_file(vault_place, "olga"))
    for data in (b"olga's quiet sentencE\n", b"olga's quiet sentence \n", b" olga's quiet sentence\n", b"olga's quiet sentence\r\n", WORDS["anna"], b"\0"):
        file.write_bytes(data)
        not_entered(module, vault_place, "^the passphrase is wrong, or the key file was changed$")
    done = anchored(vault_place)
    assert (done.status, done.out) == (5, "")
    for data in (b"", b"\n", b"\nolga's quiet sentence\n", b"x" * 4097):
        file.write_bytes(data)
        with pytest.raises(module.UsageError):
            entered(module, vault_place)
    file.write_bytes(WORDS["olga"])
    assert entered(module, vault_place).name == "olga"
    file.chmod(0o640)
    with pytest.raises(module.UsageError, match="open to others"):
        entered(module, vault_place)
    assert vault_place.call("audit", "anchor", "--approver", "olga").status == 7
    assert vault_place.call("audit", "anchor", "--approver", "olga", "--passphrase-file", "-", stdin=WORDS["olga"] + b"\nmore").status == 0


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o610, 0o601, 0o620, 0o602, 0o777])
def test_a_key_that_others_may_read_or_write_is_not_used(module: Any, vault_place: Place, mode: int) -> None:
    """The approver's, the machine's, and their records; and their directory."""
    for name in ("olga.key", "machine.key", "olga.seen", "machine.seen", "."):
        path = keys_folder(vault_place) / name
        path.chmod(mode | (0o100 if name == "." else 0))
        not_entered(module, vault_place, "open to others")
        path.chmod(0o700 if name == "." else 0o600)
    assert entered(module, vault_place)


def test_a_key_that_is_open_to_others_is_named_with_what_mends_it(vault_place: Place) -> None:
    """By every command that needs it, low risk included, with exit 5."""
    key_of(vault_place, "machine").chmod(0o644)
    done = vault_place.call("secret", "get", "open", "--action", "use", "--for", "a test")
    assert (done.status, done.out) == (5, "")
    assert "open to others (mode 644)" in done.err
    assert "chmod 600" in done.err


@pytest.mark.parametrize("name", ["olga.key", "olga.seen", "machine.key", "machine.seen"])
def test_a_link_or_a_device_in_place_of_a_key_is_not_used(module: Any, vault_place: Place, name: str) -> None:
    """Symbolic links, also to the right file; a directory; a FIFO, which must not hang either."""
    path, aside = keys_folder(vault_place) / name, vault_place.folder / "aside"
    path.rename(aside)
    ways: list[Callable[[], None]] = [lambda: path.symlink_to(aside), lambda: path.symlink_to("/dev/zero"), lambda: os.mkfifo(path, 0o600),
                                      lambda: path.mkdir(mode=0o700)]  # fmt: skip
    for make in ways:
        make()
        not_entered(module, vault_place, "is not used")
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    aside.rename(path)
    assert entered(module, vault_place)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a file away")
@pytest.mark.parametrize("name", ["olga.key", "olga.seen", "machine.key", "machine.seen", "."])
def test_a_key_of_another_owner_is_not_used(module: Any, vault_place: Place, name: str) -> None:
    """Also for root, who could read it: whoever owns it can change it."""
    os.chown(keys_folder(vault_place) / name, 65534, 65534)
    not_entered(module, vault_place, "belongs to user 65534")


def put_key(path: Path, change: Callable[[Row], Any]) -> None:
    document = json.loads(path.read_bytes())
    change(document)
    path.write_text(canonical(document) + "\n")


@pytest.mark.parametrize("kdf", [
    {"memory_kib": 2**40}, {"memory_kib": (1 << 20) + 1}, {"memory_kib": (64 << 10) - 1}, {"memory_kib": 8}, {"memory_kib": 0}, {"memory_kib": -65536},
    {"memory_kib": "65536"}, {"memory_kib": True}, {"memory_kib": None}, {"memory_kib": [65536]}, {"iterations": 2}, {"iterations": 10**9}, {"iterations": 11},
    {"iterations": True}, {"iterations": 0}, {"lanes": 0}, {"lanes": 17}, {"lanes": 2**31}, {"lanes": -1},
    {"name": "argon2i"}, {"name": "scrypt"}, {"name": None},
    {"salt": ""}, {"salt": "AAAA"}, {"salt": "A" * 1000}, {"salt": None}, {"salt": 5}, {"salt": "no base64!"}])  # fmt: skip
def test_absurd_costs_of_a_key_file_are_refused_before_they_are_paid(module: Any, vault_place: Place, kdf: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the ceiling, below the floor, of another type, with another function or salt: nothing is ever derived."""
    import cryptography.hazmat.primitives.kdf.argon2 as library

    def fail(*args: Any, **options: Any) -> None:
        raise AssertionError("a key was derived")

    put_key(key_of(vault_place), lambda document: document["kdf"].update(kdf))
    monkeypatch.setattr(library, "Argon2id", fail)
    with pytest.raises(module.DeniedError):
        module.Approver("olga", str(keys_folder(vault_place)), keys_folder(vault_place).name, WORDS["olga"])


def test_a_key_file_that_asks_for_a_terabyte_is_refused_at_once(vault_place: Place) -> None:
    """By the command, with exit 5 and in words."""
    put_key(key_of(vault_place), lambda document: document["kdf"].update(memory_kib=2**30))
    done = anchored(vault_place)
    assert (done.status, done.out) == (5, "")
    assert "1 GiB" in done.err


def test_any_changed_byte_of_a_key_file_is_refused(module: Any, vault_place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, from the first to the last; also one more, one less, and another order of its fields."""
    path, folder = key_of(vault_place), str(keys_folder(vault_place))
    data, real = path.read_bytes(), module.stretch
    module.Approver("olga", folder, keys_folder(vault_place).name, WORDS["olga"])  # as it is, it opens
    remembered = functools.cache(lambda words, kdf: real(words, json.loads(kdf)))  # the same derivation once, not three thousand times
    monkeypatch.setattr(module, "stretch", lambda words, kdf: remembered(words, canonical(kdf)))
    start = data.index(b'"kdf"')
    costs = range(start, data.index(b"}", start))
    variants = {f"bit of byte {n}": data[:n] + bytes([data[n] ^ (1 if n not in costs or data[n] not in b"0123456789" else 4)]) + data[n + 1 :]
                for n in range(len(data)) if n not in costs or n % 6 == 0}  # fmt: skip
    end = data.index(b'="', data.index(b'"private"')) - 1  # the last letter of the base64 text: two of its bits mean nothing
    alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    twins = [alphabet[alphabet.index(data[end]) & ~3 | n] for n in range(4)]
    variants |= {f"the same key in other letters, {n}": data[:end] + bytes([letter]) + data[end + 1 :] for n, letter in enumerate(twins) if letter != data[end]}
    variants |= {"longer": data + b"\n", "shorter": data[:-9], "empty": b"", "spaces": json.dumps(json.loads(data)).encode()}
    taken = []
    for what, variant in variants.items():
        path.write_bytes(variant)
        try:
            module.Approver("olga", folder, keys_folder(vault_place).name, WORDS["olga"])
            taken.append(what)
        except module.GraceError as error:
            assert error.exit_code == 5, what
    assert taken == [], f"accepted {taken} of a file of {len(data)} bytes, its end {data[-60:]!r}"


def test_the_records_beside_the_keys_cannot_be_changed_or_exchanged(module: Any, vault_place: Place) -> None:
    """Of an approver and of the machine: a byte, another one's, another name, the data of another: exit 5, and in the log."""
    folder = keys_folder(vault_place)
    for mine, theirs in (("olga", "anna"), ("olga", "machine"), ("machine", "olga")):
        path = folder / f"{mine}.seen"
        right, other = path.read_bytes(), (folder / f"{theirs}.seen").read_bytes()
        renamed = (canonical({**json.loads(other), "name": mine}) + "\n").encode()
        position = right.index(b'"data":"') + 100
        flipped = right[:position] + (b"A" if right[position : position + 1] != b"A" else b"B") + right[position + 1 :]
        others = (right.replace(mine.encode(), mine.upper().encode()), b"{}\n", b"", b"[]\n", right[:-20], right + b"x") if theirs != "machine" else ()
        for data in (other, *others, renamed, flipped):
            path.write_bytes(data)
            not_entered(module, vault_place, r"\S")
            if data in (renamed, flipped):
                with opened(module, vault_place) as store:
                    assert leaves(store)[-1]["kind"] == "vault.refused", f"{mine}.seen was tampered with, and the log does not say so"
        path.unlink()
        with pytest.raises(module.LockedError, match="missing"):
            entered(module, vault_place)
        assert not path.exists(), "a missing record is not made anew"
        path.touch(mode=0o600)
        path.write_bytes(right)
    assert entered(module, vault_place)


def test_an_older_copy_of_a_record_knows_less_but_what_it_knows_holds(module: Any, vault_place: Place) -> None:
    """The limit of a pin in a file: rolled back together with the database it is silent, but one of the two alone is not."""
    folder = keys_folder(vault_place)
    early = {name: (folder / f"{name}.seen").read_bytes() for name in ("olga", "machine")}
    vault_place.ok("secret", "rotate", "mid", *as_olga(vault_place), stdin=b"third")
    with opened(module, vault_place) as store:
        assert module.Vault(store).seen.secrets["mid"][0] == 3
    (folder / "machine.seen").write_bytes(early["machine"])
    with opened(module, vault_place) as store:
        assert asked(module, store, "mid").header["version"] == 3, "newer than what was seen is no harm"
        assert module.Vault(store).seen.secrets["mid"][0] == 3, "and is seen from then on"
    put_early_rows_back(vault_place)
    (folder / "machine.seen").write_bytes(early["machine"])
    assert "older than the version 2" in cause_of(module, vault_place, "mid")
    (folder / "olga.seen").write_bytes(early["olga"])
    with opened(module, vault_place) as store:
        assert module.Approver("olga", str(folder), folder.name, WORDS["olga"]).seen.secrets["mid"][0] == 2


def test_the_machines_key_changed_or_missing_stops_everything(module: Any, vault_place: Place) -> None:
    """Another private key, another root, another vault's, none: exit 5 or 7, and nothing comes out, low risk included."""
    path = key_of(vault_place, "machine")
    right = path.read_bytes()
    root, other = json.loads(right)["root"], base64.b64encode(os.urandom(128)).decode()
    for change in ({"root": "0" * 64}, {"root": root[::-1]}, {"root": None}, {"private": other}, {"private": "AAAA"}, {"private": 7}, {"private": "?"},
                   {"private": None}, {"vault_id": "0" * 16}, {"format": "grace-machine-key/2"}):  # fmt: skip
        put_key(path, lambda document, change=change: document.update(change))  # type: ignore[misc]
        with opened(module, vault_place) as store, pytest.raises(module.DeniedError):
            asked(module, store, "open")
        path.write_bytes(right)
    low_still_opens(module, vault_place)
    path.unlink()
    done = vault_place.call("secret", "get", "open", "--action", "use", "--for", "a test")
    assert (done.status, done.out) == (7, "")


def test_a_vaults_id_leads_nowhere_else(vault_place: Place) -> None:
    """A path in its place, with a vault's files where it leads, is refused: the directory of the keys is not the database's to choose."""
    away = vault_place.folder / "away"
    shutil.copytree(keys_folder(vault_place), away)
    put_key(away / "machine.key", lambda document: document.update(vault_id="../../away"))
    with attacking(vault_place.db) as con:
        con.execute("UPDATE settings SET value = '../../away' WHERE name = '_vault_id'")
    for words in (("secret", "list"), ("secret", "get", "open", "--action", "use", "--for", "a test")):
        done = vault_place.call(*words)
        assert (done.status, done.out) == (5, ""), done.err
        assert "away" not in done.err.replace("'../../away'", ""), "it went there and looked"


# ---- the roster


def all_refused(module: Any, place: Place, words: str, low_opens: bool = False) -> None:
    """Nothing opens without a roster that holds, and with an older one only low risk; the cause is in the log."""
    assert re.search(words, cause_of(module, place, "mid"))
    if low_opens:
        assert place.call("secret", "get", "open", "--action", "read", "--for", "a test").status == 0
    else:
        assert re.search(words, cause_of(module, place, "open"))


def rosters(place: Place) -> list[tuple[int, Row, bytes]]:
    rows = fetch(place.db, "SELECT number, document, signature FROM vault_rosters ORDER BY number")
    return [(number, json.loads(text), bytes(signature)) for number, text, signature in rows]


def put_rosters(place: Place, rows: Iterable[tuple[int, Row, bytes]]) -> None:
    with attacking(place.db) as con:
        con.execute("DELETE FROM vault_rosters")
        for number, document, signature in rows:
            con.execute("INSERT INTO vault_rosters (number, document, signature) VALUES (?, ?, ?)", (number, canonical(document), signature))


def test_a_changed_list_of_approvers_is_refused(module: Any, vault_place: Place) -> None:
    """Each field of each list, a member's name, role or key, and each signature."""
    right = rosters(vault_place)
    assert [number for number, _, _ in right] == [1, 2, 3]
    own = module.Keys.new().public
    for which, (number, document, signature) in enumerate(right):
        people = document["approvers"]
        fields: tuple[tuple[str, Any], ...] = (
                  ("format", "x"), ("vault_id", "0" * 16), ("number", 9), ("number", True), ("previous", "0" * 64), ("created", 1), ("signer", "0" * 64),
                  ("machine", own), ("approvers", people[:-1]), ("approvers", []), ("approvers", [*people, people[0]]))  # fmt: skip
        changed = [{**document, name: value} for name, value in fields if document[name] is not value]
        changed += [{**document, "approvers": [*people[:-1], {**people[-1], **odd}]} for odd in (
            {"name": "eve"}, {"roles": ["governance", "user", "x"]}, own, {"removed": 1}, {"keeps": ["0" * 64]}, {"added": 1})]  # fmt: skip
        for odd in changed:
            put_rosters(vault_place, [*right[:which], (number, odd, signature), *right[which + 1 :]])
            assert re.search("another vault|follow|not signed|another one", cause_of(module, vault_place, "mid")), odd
        put_rosters(vault_place, [*right[:which], (number, document, signature[:-1] + bytes([signature[-1] ^ 1])), *right[which + 1 :]])
        all_refused(module, vault_place, "not signed")
    put_rosters(vault_place, right)
    low_still_opens(module, vault_place)


def test_lists_in_another_order_or_number_are_refused(module: Any, vault_place: Place) -> None:
    """Missing, doubled, swapped; rolled back to an older one; none at all."""
    one, two, three = rosters(vault_place)
    for rows, words in (([one, two], "rolled back"), ([one], "rolled back"), ([], "rolled back"), ([two, three], "another vault"),
                        ([one, three], "another vault|follow"),
                        ([one, (2, three[1], three[2]), (3, two[1], two[2])], "another vault"),
                        ([one, two, three, (4, three[1], three[2])], "another vault|follow"),
                        ([one, two, (3, two[1], two[2])], "another vault|follow")):  # fmt: skip
        put_rosters(vault_place, rows)
        all_refused(module, vault_place, words, low_opens=rows in ([one, two], [one]))


def longer(module: Any, place: Place, signer: Any, people: list[Row], signature_by: Any = None) -> list[tuple[int, Row, bytes]]:
    """The lists with a further one, in the name of `signer`."""
    right = rosters(place)
    newest = right[-1][1]
    document = {**newest, "number": newest["number"] + 1, "previous": hash_of("roster", newest), "signer": signer.fingerprint, "approvers": people}
    return [*right, (document["number"], document, (signature_by or signer).sign(statement("roster-signature", hash_of("roster", document))))]


def test_a_list_extended_by_somebody_who_is_not_on_it_is_refused(module: Any, vault_place: Place) -> None:
    """By an attacker's key, by the machine's, by an approver's name with another key, and by somebody it brings itself."""
    newest, own = rosters(vault_place)[-1][1], module.Keys.new()
    machine, _ = stolen(module, vault_place)
    eve = module.new_person("eve", ("user", "governance"), own.public, 1)

    class Olga:
        fingerprint = newest["signer"]

    for signer, by in ((own, None), (machine, None), (Olga, own), (Olga, machine)):
        put_rosters(vault_place, longer(module, vault_place, signer, [*newest["approvers"], eve], by))
        all_refused(module, vault_place, "not signed by an approver")
        put_rosters(vault_place, rosters(vault_place)[:-1])
    low_still_opens(module, vault_place)


def test_a_removed_approver_can_sign_no_further_list_and_seal_nothing(module: Any, vault_place: Place) -> None:
    """What he had sealed is kept by name; a new seal of his, though his key is on the list still, is a stranger's."""
    anna = entered(module, vault_place, "anna")
    vault_place.ok("secret", "set", "annas", "--owner", "anna", "--passphrase-file", word_file(vault_place, "anna"), stdin=b"kept")
    refused = vault_place.call("approver", "remove", "olga", *signed_as(vault_place, "olga"))
    assert (refused.status, "nobody removes himself" in refused.err) == (4, True)
    done = vault_place.json("approver", "remove", "anna", *signed_as(vault_place, "olga"))
    assert done["can_still_open"] == ["annas", "grave", "mid", "open", "pair"]
    with opened(module, vault_place) as store:
        assert asked(module, store, "annas").header["owner"] == anna.keys.fingerprint, "what she had sealed still counts"
        with pytest.raises(module.DeniedError, match="not an approver any more"):
            anna.meet(store.all(module.ROSTERS))
        newest = json.loads(store.value("SELECT document FROM vault_rosters ORDER BY number DESC"))
    forge(module, vault_place, anna.keys, "annas", version=2)
    assert "stranger" in cause_of(module, vault_place, "annas")
    put_rosters(vault_place, longer(module, vault_place, anna.keys, [{**person, "removed": None} for person in newest["approvers"]]))
    all_refused(module, vault_place, "not signed by an approver")


def test_an_approver_without_a_share_holds_nothing_of_older_secrets(module: Any, vault_place: Place) -> None:
    """Who is added later signs, but opens nothing until the secret is shared anew; then he does."""
    before = {row["member"] for row in share_rows(vault_place, "mid")}
    words = ("--role", "user", "--new-passphrase-file", word_file(vault_place, "dora"), *signed_as(vault_place, "ben"))
    added = vault_place.json("approver", "add", "dora", *words)
    assert (added["name"], added["roles"], added["key_here"]) == ("dora", ["user"], True)
    assert vault_place.call("approver", "add", "DORA", *words).status == 4
    assert vault_place.call("approver", "add", "Machine", "--role", "user").status == 2
    assert {row["member"] for row in share_rows(vault_place, "mid")} == before
    assert added["fingerprint"] not in before
    shared = vault_place.json("secret", "reshare", "mid", *signed_as(vault_place, "olga"))
    assert (shared["version"], shared["policy"]) == (3, "user:1of4")
    assert {row["member"] for row in share_rows(vault_place, "mid")} == {*before, added["fingerprint"]}
    assert released(vault_place, "mid", "dora") == VALUES["mid"]


def released(place: Place, key: str, *names: str, options: tuple[str, ...] = (), groups: tuple[str, ...] = ()) -> bytes:
    """The value as a waiting requester gets it, once these approvers have approved."""
    waiting = place.start("secret", "get", key, "--action", "use", "--for", "a test", *options)
    (pending,) = until(lambda: place.json("consent", "pending"), "the request")
    for name, role in itertools.zip_longest(names, groups):
        place.ok("consent", "approve", pending["consent_id"], *(("--as", role) if role else ()), *signed_as(place, name))
    out, err = waiting.communicate(timeout=60)
    assert waiting.returncode == 0, err
    return bytes(out)


def test_two_of_three_open_and_one_does_not(vault_place: Place) -> None:
    """A policy with a threshold, from the request to the value; and sharing it anew takes two passphrases as well."""
    alone = vault_place.call("secret", "reshare", "pair", *signed_as(vault_place, "ben"))
    assert (alone.status, alone.out) == (5, "")
    assert "needs more approvers of user" in alone.err
    twice = vault_place.call("secret", "reshare", "pair", *signed_as(vault_place, "ben"), *signed_as(vault_place, "ben"))
    assert (twice.status, twice.out) == (2, "")
    assert "name each approver once" in twice.err
    both = (*signed_as(vault_place, "ben"), *signed_as(vault_place, "anna"))
    shown = vault_place.json("secret", "reshare", "pair", *both, "--policy", "user:2of3 & governance:1")
    assert (shown["policy"], shown["owner"], shown["version"], shown["risk_level"]) == ("user:2of3 & governance:1of2", "ben", 2, "medium")
    assert released(vault_place, "pair", "anna", "ben", "olga", groups=("user", "user", "governance")) == VALUES["pair"]
    with_one = vault_place.start("secret", "get", "pair", "--action", "use", "--for", "a test")
    (pending,) = until(lambda: vault_place.json("consent", "pending"), "the request")
    assert vault_place.json("consent", "approve", pending["consent_id"], "--as", "user", *signed_as(vault_place, "anna"))["consent_status"] == "pending"
    assert with_one.poll() is None, "one of two is not enough"
    vault_place.ok("consent", "deny", pending["consent_id"], "--reason", "a test")
    out, _ = with_one.communicate(timeout=60)
    assert (with_one.returncode, out) == (5, b"")


def test_nobody_goes_whose_going_would_lock_a_secret(vault_place: Place) -> None:
    """Below a threshold, or as the last one of a role; and what a key still opens is said."""
    vault_place.ok("secret", "set", "trio", "--policy", "user:3of3", *as_olga(vault_place), stdin=b"x")
    done = vault_place.call("approver", "remove", "anna", *signed_as(vault_place, "olga"))
    assert (done.status, "trio could not be opened any more (user:3of3)" in done.err) == (4, True)
    assert "anna" in {person["name"] for person in vault_place.json("approver", "list") if person["removed_at"] is None}
    vault_place.ok("secret", "remove", "trio")
    vault_place.ok("secret", "set", "hers", "--policy", "user:1(anna)", *as_olga(vault_place), stdin=b"x")
    assert "hers could not be opened" in vault_place.call("approver", "remove", "anna", *signed_as(vault_place, "olga")).err
    vault_place.ok("secret", "remove", "hers")
    assert vault_place.json("approver", "remove", "ben", *signed_as(vault_place, "olga"))["can_still_open"] == ["grave", "mid", "open", "pair"]
    assert "ben was removed" in vault_place.json("secret", "show", "mid")["rotate_reason"]
    last = vault_place.call("approver", "remove", "olga", *signed_as(vault_place, "anna"))
    assert (last.status, "grave could not be opened" in last.err or "only approver with the role governance" in last.err) == (4, True)
    assert vault_place.call("secret", "set", "x", "--policy", "user:3", *as_olga(vault_place), stdin=b"x").status == 2
    assert vault_place.call("secret", "set", "x", "--policy", "user:1(ben)", *as_olga(vault_place), stdin=b"x").status == 2


def test_a_changed_passphrase_counts_and_the_old_one_does_not(module: Any, vault_place: Place) -> None:
    """The keys stay the same; a copy of the old key file still opens with the old one, as the command says."""
    before, old = entered(module, vault_place), key_of(vault_place).read_bytes()
    new = vault_place.folder / "new.word"
    new.write_bytes(b"another sentence of olga\n")
    new.chmod(0o600)
    done = vault_place.call("approver", "passwd", "olga", "--passphrase-file", word_file(vault_place, "anna"), "--new-passphrase-file", str(new))
    assert (done.status, key_of(vault_place).read_bytes()) == (5, old)
    vault_place.ok("approver", "passwd", "olga", "--passphrase-file", word_file(vault_place, "olga"), "--new-passphrase-file", str(new))
    not_entered(module, vault_place, "passphrase is wrong")
    Path(word_file(vault_place, "olga")).write_bytes(new.read_bytes())
    after = entered(module, vault_place)
    assert (after.keys.private, after.seen.key) == (before.keys.private, before.seen.key)
    assert stat.S_IMODE(key_of(vault_place).stat().st_mode) == 0o600
    assert json.loads(old)["kdf"]["salt"] != json.loads(key_of(vault_place).read_bytes())["kdf"]["salt"]
    with opened(module, vault_place) as store:
        assert [leaf["kind"] for leaf in leaves(store)][-2:] == ["approver.passwd", "approver.refused"]


def test_an_approvers_key_travels_locked_and_is_not_installed_over_another(module: Any, vault_place: Place, tmp_path: Path, capfd: pytest.CaptureFixture[str],
                                                                           unhardened: None, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Export and import: private files, the same key, nothing overwritten, and nothing but an approver's key is taken."""
    out = tmp_path / "olga.export"
    vault_place.ok("approver", "export", "olga", "--out", str(out))
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    (tmp_path / "far").mkdir()
    far = Place(tmp_path / "far")
    far.ok("approver", "import", str(out))
    assert (keys_folder(far) / "olga.key").read_bytes() == key_of(vault_place).read_bytes()
    assert {(path.name, stat.S_IMODE(path.stat().st_mode)) for path in keys_folder(far).iterdir()} == {("olga.key", 0o600), ("olga.seen", 0o600)}
    assert far.call("approver", "import", str(out)).status == 4
    assert vault_place.call("approver", "import", str(out)).status == 4
    bundle = json.loads(out.read_bytes())
    machine = json.loads((keys_folder(vault_place) / "machine.key").read_bytes())
    odd: list[Any] = [[], {}, {**bundle, "format": "x"}, {**bundle, "seen": None}, {**bundle, "key": [1]}]
    for vault_id, name in (("../../x", "olga"), ("0" * 15, "olga"), ("0" * 16, "../olga"), ("0" * 16, ""), ("0" * 16, "machine"), ("0" * 16, "Machine")):
        odd.append({**bundle, "key": {**bundle["key"], "vault_id": vault_id, "name": name}, "seen": {**bundle["seen"], "vault_id": vault_id, "name": name}})
    odd.append({**bundle, "key": {**machine, "name": "machine"}, "seen": {**bundle["seen"], "name": "machine"}})
    odd.append({**bundle, "key": {**machine, "name": "eve"}, "seen": {**bundle["seen"], "name": "eve"}})
    before = sorted(str(path) for path in far.folder.rglob("*"))
    monkeypatch.setenv("HOME", str(far.folder))
    for number, document in enumerate(odd):
        (tmp_path / "odd").write_text(json.dumps(document))
        status, said, err = in_process(module, far, capfd, "approver", "import", str(tmp_path / "odd"))
        assert (status, said) == (2, ""), (number, err, document)
    assert sorted(str(path) for path in far.folder.rglob("*")) == before


def test_an_exported_key_is_private_also_in_a_file_that_was_there(vault_place: Place, tmp_path: Path) -> None:
    """--out over a file that others may read does not show them the key."""
    out = tmp_path / "out"
    out.write_text("old")
    out.chmod(0o644)
    done = vault_place.call("approver", "export", "olga", "--out", str(out))
    assert stat.S_IMODE(out.stat().st_mode) == 0o600 or (done.status == 2 and out.read_text() == "old")


# ---- what a new version takes over


def test_a_higher_risk_never_lowers_a_threshold(vault_place: Place) -> None:
    """What is not said again stays: two of three stay two of three when governance comes in."""
    shown = vault_place.json("secret", "set", "pair", "--risk", "high", *as_olga(vault_place), stdin=b"newer")
    assert shown["risk_level"] == "high"
    assert shown["policy"].startswith("user:2of3"), shown["policy"]
    assert "governance:1" in shown["policy"]


def test_sharing_anew_does_not_widen_a_policy_that_names_people(module: Any, vault_place: Place) -> None:
    """Only anna may: then nobody else gets a part because the secret is sealed anew."""
    vault_place.ok("secret", "set", "hers", "--policy", "user:1(anna)", *as_olga(vault_place), stdin=b"x")
    anna = entered(module, vault_place, "anna").keys.fingerprint
    assert {row["member"] for row in share_rows(vault_place, "hers")} == {anna}
    vault_place.ok("secret", "reshare", "hers", *signed_as(vault_place, "anna"))
    assert {row["member"] for row in share_rows(vault_place, "hers")} == {anna}


def test_low_risk_asked_at_a_higher_one_needs_approval_and_then_opens(vault_place: Place) -> None:
    """An action or a request can raise the risk of a low secret; its key is the machine's still."""
    assert released(vault_place, "open", "anna", options=("--risk", "medium")) == VALUES["open"]
    assert released(vault_place, "open", "anna", "ben", options=("--risk", "high"), groups=("user", "governance")) == VALUES["open"]


# ---- what is shown, and what an attacker without any key can bring about


def test_a_secret_that_does_not_verify_is_listed_as_such(vault_place: Place) -> None:
    """A changed header, and rows that were put back behind a pin; the others are not touched by it."""
    assert {row["secret_key"]: row["verified"] for row in vault_place.json("secret", "list")} == dict.fromkeys(VALUES, True)
    put_header(vault_place, "grave", {**header_of(vault_place, "grave"), "risk": "medium"})
    put_early_rows_back(vault_place)
    expected = {"open": True, "pair": True, "grave": False, "mid": False}
    assert {row["secret_key"]: row["verified"] for row in vault_place.json("secret", "list")} == expected
    assert vault_place.ok("secret", "list").out.count("DOES NOT VERIFY") == 2
    assert vault_place.json("secret", "show", "mid")["verified"] is False


def test_an_emptied_row_does_not_lower_what_the_next_value_is_sealed_with(vault_place: Place) -> None:
    """Removing a value takes no key and no dropped trigger; storing it again must not silently make high risk medium."""
    with contextlib.closing(apsw.Connection(str(vault_place.db))) as con:
        con.execute("UPDATE secret_entries SET sealed = NULL, removed_at = 1 WHERE secret_key = 'grave' AND sealed IS NOT NULL")
    done = vault_place.call("--json", "secret", "set", "grave", *as_olga(vault_place), stdin=b"newer")
    if done.status == 0:
        assert (done.json["risk_level"], done.json["policy"]) == ("high", "user:1of3 & governance:1of2")
    else:
        assert done.status in (2, 4, 5)
    told = vault_place.json("secret", "set", "grave", "--risk", "medium", *as_olga(vault_place), stdin=b"newer")
    assert told["risk_level"] == "medium", "said in so many words, it may be lowered"


def test_a_changed_secret_is_recorded_also_when_an_approver_is_to_be_removed(module: Any, vault_place: Place) -> None:
    """What that key can open cannot be told from a header that does not verify: refused, exit 5, with its leaf."""
    put_header(vault_place, "mid", {**header_of(vault_place, "mid"), "service": "shoq"})
    done = vault_place.call("approver", "remove", "anna", *signed_as(vault_place, "olga"))
    assert (done.status, done.out) == (5, ""), done.err
    with opened(module, vault_place) as store:
        assert [leaf["kind"] for leaf in leaves(store)][-1] == "vault.refused"


def test_many_processes_that_seal_at_once_leave_one_line_of_versions(module: Any, vault_place: Place) -> None:
    """Each new version follows the one before it, or its process is told to try again; pins and log hold."""
    crowd = [vault_place.start("secret", "rotate", "mid", *as_olga(vault_place), "--value-file", word_file(vault_place, "ben")) for _ in range(6)]
    ends = [(process.communicate(timeout=60)[1], process.returncode) for process in crowd]
    assert {status for _, status in ends} <= {0, 4}, ends
    done = sum(status == 0 for _, status in ends)
    assert done >= 1
    counts = fetch(vault_place.db, "SELECT MAX(version), COUNT(*), SUM(sealed IS NOT NULL) FROM secret_entries WHERE secret_key = 'mid'")
    assert counts == [(2 + done, 2 + done, 1)]
    assert findings(module, vault_place, entered(module, vault_place)) == []
    with opened(module, vault_place) as store:
        assert asked(module, store, "mid").header["version"] == 2 + done
        assert module.Vault(store).seen.secrets["mid"][0] == 2 + done


def test_the_costs_of_a_passphrase_are_bounded_and_high_by_default(module: Any, tmp_path: Path) -> None:
    """256 MiB unless it is said otherwise; whatever is said, a key file gets 64 MiB at least and 1 GiB at most, and each its own salt."""
    assert Place(tmp_path).json("config", "get", "vault.argon2_memory")["value"] == 268435456
    for said, got in ((1024, 65536), (64 << 20, 65536), (65 << 20, 66560), (1 << 40, 1 << 20)):
        kdf = module.kdf_for(said)
        assert kdf["memory_kib"] in (got, 65536), "the floor where memory is short"
        assert (kdf["name"], kdf["iterations"], len(base64.b64decode(kdf["salt"]))) == ("argon2id", 3, 16)
    assert len({module.kdf_for(1024)["salt"] for _ in range(20)}) == 20


def test_a_second_vault_is_not_made_over_the_first(module: Any, vault_place: Place) -> None:
    """Neither by a second init, nor after somebody has taken the vault's id away: what there is stays, and works again with it."""
    again = vault_place.call("init", "--name", "eve", "--passphrase-file", word_file(vault_place, "ben"))
    assert (again.status, again.out) == (4, "")
    vault_id = keys_folder(vault_place).name
    with attacking(vault_place.db) as con:
        con.execute("DELETE FROM settings WHERE name = '_vault_id'")
    assert vault_place.call("secret", "get", "open", "--action", "use", "--for", "a test").status == 7
    before = rosters(vault_place), fetch(vault_place.db, "SELECT * FROM secret_entries"), fetch(vault_place.db, "SELECT * FROM audit_log")
    done = vault_place.call("init", "--name", "eve", "--passphrase-file", word_file(vault_place, "ben"))
    assert (done.status in (4, 5, 8), done.out, "Traceback" in done.err) == (True, "", False), done.err
    assert before == (rosters(vault_place), fetch(vault_place.db, "SELECT * FROM secret_entries"), fetch(vault_place.db, "SELECT * FROM audit_log"))
    with attacking(vault_place.db) as con:
        con.execute("INSERT INTO settings (name, value, updated_at) VALUES ('_vault_id', ?, 1)", (vault_id,))
    low_still_opens(module, vault_place)


def test_an_expired_secret_is_not_asked_for(module: Any, vault_place: Place) -> None:
    """Its own expiry is in the signed header; low risk as well."""
    vault_place.ok("secret", "set", "brief", "--risk", "low", "--expires", "1ms", stdin=b"x")
    vault_place.ok("secret", "set", "short", "--expires", "1ms", *as_olga(vault_place), stdin=b"x")
    with opened(module, vault_place) as store:
        for key in ("brief", "short"):
            until(lambda key=key: module.clock() > header_of(vault_place, key)["expires"], "its end")  # type: ignore[misc]
            with pytest.raises(module.DeniedError, match="has expired"):
                asked(module, store, key)
        assert store.value("SELECT COUNT(*) FROM secret_consent_records") == 0


@pytest.mark.parametrize("value", [b"\0", b"\xff\xfe\n\n", "\u00e4\u2028".encode(), bytes(65536)], ids=["NUL", "newlines", "no ASCII", "longest"])
def test_any_value_comes_back_byte_for_byte(vault_place: Place, value: bytes) -> None:
    """One byte to 64 KiB of anything; one newline at the end is the shell's, unless --raw says otherwise."""
    file = vault_place.folder / "value"
    file.write_bytes(value)
    vault_place.ok("secret", "set", "any", "--risk", "low", "--raw", "--value-file", str(file))
    assert vault_place.ok("secret", "get", "any", "--action", "use", "--for", "a test").raw_out == value
    if value.endswith(b"\n"):
        vault_place.ok("secret", "set", "any", "--risk", "low", stdin=value)
        assert vault_place.ok("secret", "get", "any", "--action", "use", "--for", "a test").raw_out == value[:-1]


def test_a_value_of_no_byte_or_too_many_is_refused(vault_place: Place) -> None:
    """Usage errors that store nothing; a value is never an argument."""
    for stdin, options in ((b"", ()), (b"\n", ()), (bytes(65537), ("--raw",)), (bytes(70000), ())):
        done = vault_place.call("secret", "set", "none", "--risk", "low", *options, stdin=stdin)
        assert (done.status, done.out) == (2, "")
    assert vault_place.call("secret", "set", "none", "the value", "--risk", "low").status == 2
    assert vault_place.call("secret", "show", "none").status == 3


# ---- the audit log


def verified(place: Place, *words: str) -> tuple[int, Row]:
    """Exit status and document of `audit verify`."""
    done = place.call("--json", "audit", "verify", *words)
    assert done.err == "", done.err
    return done.status, dict(done.json)


def findings(module: Any, place: Place, approver: Any = None) -> list[str]:
    """What `audit verify` finds, with the machine's pin and, where given, an approver's."""
    with opened(module, place) as store:
        vault = module.Vault(store)
        pins = {"this machine": vault.seen.audit, **({approver.name: approver.seen.audit} if approver else {})}
        return list(module.verify_log(store, vault.roster, pins)["findings"])


def all_leaves(place: Place) -> list[tuple[int, str, str]]:
    return [(seq, leaf, hash_) for seq, leaf, hash_ in fetch(place.db, "SELECT seq, leaf, hash FROM audit_log ORDER BY seq")]


def put_leaves(place: Place, rows: Iterable[tuple[int, str, str]]) -> None:
    with attacking(place.db) as con:
        con.execute("DELETE FROM audit_log")
        con.executemany("INSERT INTO audit_log (seq, leaf, hash) VALUES (?, ?, ?)", list(rows))


def rewritten(rows: list[tuple[int, str, str]], start: int, change: Callable[[Row], Any]) -> list[tuple[int, str, str]]:
    """The log with leaf `start` changed and all hashes from there on computed anew, as a careful forger does it."""
    done = rows[: start - 1]
    for _, text, _ in rows[start - 1 :]:
        leaf = json.loads(text)
        if leaf["seq"] == start:
            change(leaf)
        leaf["previous"] = done[-1][2] if done else "0" * 64
        leaf["seq"] = len(done) + 1
        done.append((leaf["seq"], canonical(leaf), hash_of("audit", leaf)))
    return done


def test_an_intact_log_is_in_order_and_says_how_far_it_is_anchored(vault_place: Place) -> None:
    """Exit 0; the size is that of the log; the machine has seen it all; a passphrase file adds the approver's word."""
    size = len(all_leaves(vault_place))
    status, done = verified(vault_place)
    assert (status, done["ok"], done["findings"], done["size"], done["anchored"]) == (0, True, [], size, size)
    assert done["checked_against"] == ["signed grants and anchors", "this machine"]
    status, done = verified(vault_place, *signed_as(vault_place, "olga"))
    assert (status, done["checked_against"][-1]) == (0, "olga")
    plain = vault_place.ok("audit", "verify").out
    assert f"anchored {size} of {size}" in plain
    wrong = vault_place.folder / "wrong"
    wrong.write_bytes(b"x")
    wrong.chmod(0o600)
    assert vault_place.call("audit", "verify", "--approver", "olga", "--passphrase-file", str(wrong)).status == 5


def test_any_edit_gap_or_reordering_is_found(module: Any, vault_place: Place) -> None:
    """A changed word in each leaf, a missing one, two in each other's place, one twice, another spelling, other hashes."""
    rows = all_leaves(vault_place)
    assert findings(module, vault_place) == []
    for index, (seq, text, hash_) in enumerate(rows):
        leaf = json.loads(text)
        others = [{**leaf, name: value} for name, value in (("kind", "secret.read"), ("actor", "eve"), ("subject", "x"), ("at", leaf["at"] + 1), ("facts", {}),
                                                            ("previous", "f" * 64), ("seq", seq + 1)) if leaf[name] != value]  # fmt: skip
        for odd in (*map(canonical, others), json.dumps(leaf), "{}", "[]", "7", canonical({**leaf, "more": 1})):
            put_leaves(vault_place, [*rows[:index], (seq, odd, hash_), *rows[index + 1 :]])
            assert any(f"leaf {seq}" in finding for finding in findings(module, vault_place)), (seq, odd)
        put_leaves(vault_place, [*rows[:index], (seq, text, hash_[:-1] + ("0" if hash_[-1] != "0" else "1")), *rows[index + 1 :]])
        assert findings(module, vault_place)
        put_leaves(vault_place, [*rows[:index], *rows[index + 1 :]])
        assert findings(module, vault_place), f"the leaf {seq} is gone and nobody noticed"
        if index:
            before = rows[index - 1]
            put_leaves(vault_place, [*rows[: index - 1], (before[0], text, hash_), (seq, before[1], before[2]), *rows[index + 1 :]])
            assert findings(module, vault_place)
            put_leaves(vault_place, [*rows[:index], (seq, before[1], before[2]), *rows[index + 1 :]])
            assert findings(module, vault_place)
    put_leaves(vault_place, [])
    assert findings(module, vault_place)


def test_what_verify_finds_ends_it_with_1_in_words_and_in_json(vault_place: Place) -> None:
    """A finding is no error: the document is on stdout."""
    rows = all_leaves(vault_place)
    put_leaves(vault_place, [*rows[:3], (4, canonical({**json.loads(rows[3][1]), "actor": "eve"}), rows[3][2]), *rows[4:]])
    status, done = verified(vault_place)
    assert (status, done["ok"]) == (1, False)
    assert done["findings"] == ["leaf 4 was changed"]
    plain = vault_place.call("audit", "verify")
    assert (plain.status, "leaf 4 was changed" in plain.out, "all in order" in plain.out) == (1, True, False)


def test_a_cut_or_rewritten_log_is_found_up_to_the_newest_head_that_was_seen(module: Any, vault_place: Place) -> None:
    """With all hashes made anew it is a chain again, but not the one that the machine, an anchor or an approver has seen."""
    rows, anchors = all_leaves(vault_place), fetch(vault_place.db, "SELECT document, signature FROM audit_anchors ORDER BY seq")
    olga = entered(module, vault_place)
    for start in (1, 2, len(rows) // 2, len(rows)):
        put_leaves(vault_place, rewritten(rows, start, lambda leaf: leaf.update(actor="nobody")))
        assert any("this machine has seen another leaf" in finding for finding in findings(module, vault_place))
    for start in (1, olga.seen.audit[0]):
        put_leaves(vault_place, rewritten(rows, start, lambda leaf: leaf.update(facts={"nothing": True})))
        assert any("olga has signed another leaf" in finding for finding in findings(module, vault_place)), "the anchor in the database"
        with attacking(vault_place.db) as con:
            con.execute("DELETE FROM audit_anchors")
        assert any("olga has seen another leaf" in finding for finding in findings(module, vault_place, olga)), "her own record"
        with attacking(vault_place.db) as con:
            con.executemany("INSERT INTO audit_anchors (document, signature) VALUES (?, ?)", anchors)
    for size in range(len(rows)):
        put_leaves(vault_place, rows[:size])
        assert any("cut or rewritten" in finding for finding in findings(module, vault_place)), size
    put_leaves(vault_place, rows)
    assert findings(module, vault_place) == []


def test_beyond_the_newest_head_a_rewritten_end_is_not_noticed_and_not_called_anchored(module: Any, vault_place: Place) -> None:
    """The limit that the documentation admits, and why `anchored N of M` is printed."""
    with opened(module, vault_place) as store:
        seen = module.Vault(store).seen.audit
        for number in range(3):
            store.write(lambda tx, number=number: module.record(tx, "test.leaf", str(number), {}))
    rows = all_leaves(vault_place)
    assert len(rows) == seen[0] + 3
    put_leaves(vault_place, rewritten(rows, seen[0] + 1, lambda leaf: leaf.update(actor="nobody"))[:-1])
    status, done = verified(vault_place)
    assert (status, done["size"], done["anchored"]) == (0, seen[0] + 2, seen[0])
    put_leaves(vault_place, rewritten(rows, seen[0], lambda leaf: leaf.update(actor="nobody")))
    assert verified(vault_place)[0] == 1


def test_an_exported_head_kept_elsewhere_shows_what_no_record_here_has_seen(vault_place: Place) -> None:
    """Whoever rewrites the log and takes the machine's record back with it is found by an export, or one head, kept elsewhere."""
    record = keys_folder(vault_place) / "machine.seen"
    before = record.read_bytes()
    for _ in range(2):
        vault_place.ok("secret", "get", "open", "--action", "read", "--for", "a test")
    elsewhere = vault_place.folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "whole").write_bytes(vault_place.ok("audit", "export").raw_out)
    last = vault_place.ok("audit", "export").lines
    newest = max((line for line in last if line["type"] == "leaf"), key=lambda line: line["seq"])
    (elsewhere / "head").write_text(json.dumps({"size": newest["seq"], "head": newest["hash"]}))
    for name in ("whole", "head"):
        status, done = verified(vault_place, "--against", str(elsewhere / name))
        assert (status, done["anchored"], done["checked_against"][-1]) == (0, newest["seq"], str(elsewhere / name))
    rows = all_leaves(vault_place)
    put_leaves(vault_place, rows[:-2])
    record.write_bytes(before)
    assert verified(vault_place)[0] == 0, "nothing here can tell"
    for name in ("whole", "head"):
        status, done = verified(vault_place, "--against", str(elsewhere / name))
        assert status == 1 and any("has seen another leaf" in finding for finding in done["findings"])


@pytest.mark.parametrize("text", ["", "{}", "[1]\n", "no json", "\x00\xff", '{"size": "3", "head": "x"}'])
def test_what_is_no_export_is_refused(vault_place: Place, text: str) -> None:
    """A usage error that names the option; a file that is not there as well."""
    (vault_place.folder / "odd").write_text(text, encoding="latin-1")
    for name in ("odd", "not-there"):
        done = vault_place.call("audit", "verify", "--against", str(vault_place.folder / name))
        assert (done.status, done.out) == (2, "") and "--against" in done.err


def test_a_wrong_passphrase_leaves_a_leaf(module: Any, vault_place: Place) -> None:
    """Whoever guesses at a passphrase here is in the log, whichever command he tries it with."""
    wrong = vault_place.folder / "guess.word"
    wrong.write_text("a guess\n")
    wrong.chmod(0o600)
    tries = (("audit", "anchor", "--approver", "olga"), ("approver", "passwd", "olga", "--new-passphrase-file", str(wrong)),
             ("audit", "verify", "--approver", "olga"), ("secret", "set", "mid", "--owner", "olga", "--value-file", str(wrong)))  # fmt: skip
    for number, words in enumerate(tries, 1):
        assert vault_place.call(*words, "--passphrase-file", str(wrong)).status == 5
        with opened(module, vault_place) as store:
            told = leaves(store, "approver.refused")
        assert len(told) == number and (told[-1]["subject"], told[-1]["facts"]["cause"]) == ("olga", "a wrong passphrase")


def test_a_changed_setting_of_the_vault_leaves_a_leaf(module: Any, vault_place: Place) -> None:
    """What consent and vault go by is not changed unseen; other settings are nobody's business."""
    for words in (("set", "consent.grant_for", "1h"), ("unset", "consent.grant_for"), ("set", "vault.argon2_memory", "67108864")):
        vault_place.ok("config", *words)
    vault_place.ok("config", "set", "queue.age_every", "5m")
    with opened(module, vault_place) as store:
        told = [(leaf["subject"], leaf["facts"]["value"]) for leaf in leaves(store, "setting.changed")]
    assert told == [("consent.grant_for", "3600000"), ("consent.grant_for", None), ("vault.argon2_memory", "67108864")]
    assert verified(vault_place)[0] == 0


def test_forged_or_changed_anchors_are_found(module: Any, vault_place: Place) -> None:
    """By a stranger's key, with another size or head, of another vault, or nonsense: findings, never a crash."""
    text, signature = fetch(vault_place.db, "SELECT document, signature FROM audit_anchors ORDER BY seq")[-1]
    document = json.loads(text)
    own = module.Keys.new()
    mine = {**document, "approver": own.fingerprint}
    odd = [({**document, "size": 1}, signature), ({**document, "head": "0" * 64}, signature), ({**document, "at": 1}, signature), (mine, signature),
           (mine, own.sign(statement("anchor", mine))), (document, own.sign(statement("anchor", document))), (document, bytes(64)), ({}, signature),
           ({**document, "approver": 7}, signature), ({**document, "size": "9"}, signature), ({**document, "size": [1]}, signature)]  # fmt: skip
    for changed, signed in odd:
        with attacking(vault_place.db) as con:
            con.execute("UPDATE audit_anchors SET document = ?, signature = ? WHERE seq = 1", (canonical(changed), signed))
        assert findings(module, vault_place), changed
    for text in ("[]", "7", "null", json.dumps(document)):
        with attacking(vault_place.db) as con:
            con.execute("UPDATE audit_anchors SET document = ?, signature = ? WHERE seq = 1", (text, signature))
        done = vault_place.call("--json", "audit", "verify")
        assert (done.status, "Traceback" in done.err) == (1, False), (text, done.err)


def test_an_odd_grant_is_a_finding_and_stops_no_listing(module: Any, vault_place: Place) -> None:
    """Whatever somebody writes into a grant, a request or a leaf, each command ends with a status of the contract."""
    with opened(module, vault_place) as store:
        consent = asked(module, store, "mid", mode="collect").consent_id
    vault_place.ok("consent", "approve", consent, *signed_as(vault_place, "olga"))
    right = fetch(vault_place.db, "SELECT document FROM consent_grants")[0][0]
    for text in ("{}", "[]", "7", canonical({**json.loads(right), "size": "1"}), canonical({**json.loads(right), "more": 1})):
        with attacking(vault_place.db) as con:
            con.execute("UPDATE consent_grants SET document = ?", (text,))
        done = vault_place.call("--json", "audit", "verify")
        assert (done.status, done.out != "") == (1, True), (text, done.err)
    with attacking(vault_place.db) as con:
        con.execute("UPDATE consent_grants SET document = ?", (right,))


def in_process(module: Any, place: Place, capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Status, stdout and stderr of a command in this process, for many small calls; one that hides memory or limits must not be among them."""
    capfd.readouterr()
    status = module.call(["--db", str(place.db), *words])
    said = capfd.readouterr()
    assert "Traceback" not in said.err
    return status, said.out, said.err


@pytest.fixture
def unhardened(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process goes on after the commands that it calls: they leave its umask and limits alone."""
    monkeypatch.setattr(module, "harden", lambda: (0o077, (0, 0)))


LISTINGS = (("secret", "list"), ("secret", "show", "mid"), ("secret", "history", "mid"), ("consent", "pending"), ("consent", "history"), ("consent", "stats"),
            ("audit", "list"), ("audit", "export"), ("approver", "list"), ("audit", "verify"))  # fmt: skip


@pytest.mark.parametrize(("table", "column", "readers"), [
    ("secret_entries", "header", "secret"), ("secret_consent_records", "request", "consent|history"), ("secret_consent_records", "observed", "consent"),
    ("audit_log", "leaf", "audit"), ("vault_rosters", "document", "approver|pending|export"), ("audit_anchors", "document", "export|verify")])  # fmt: skip
def test_nonsense_in_a_column_never_ends_in_a_traceback(module: Any, vault_place: Place, table: str, column: str, readers: str,
                                                       capfd: pytest.CaptureFixture[str], unhardened: None) -> None:  # fmt: skip
    """JSON of another shape, depth or size, in any row: each listing says something and ends with a status of the contract."""
    with opened(module, vault_place) as store:
        asked(module, store, "mid", mode="collect")
    count = fetch(vault_place.db, f"SELECT COUNT(*) FROM {table}")[0][0]
    assert count > 0
    (right,) = fetch(vault_place.db, f"SELECT {column} FROM {table} ORDER BY rowid DESC")[0]
    fields = json.loads(right)
    wrong: list[str] = []
    odd: list[Any] = [None, 7, -1, 10**40, "\ud800", "\x1b[31m", [], {"a": {}}, True, [1]]
    bent = [json.dumps({**fields, name: odd[number % len(odd)]}) for number, name in enumerate(fields)] if isinstance(fields, dict) else []
    bent += [json.dumps(dict.fromkeys(fields, value)) for value in odd] if isinstance(fields, dict) else []
    for text in ("{}", "[]", "7", '"text"', "null", "[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900, "1e400", *bent):
        with attacking(vault_place.db) as con:
            con.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = (SELECT MAX(rowid) FROM {table})", (text,))
        for words in (words for words in LISTINGS if re.search(readers, " ".join(words))):
            for option in ((), ("--json",)):
                try:
                    status, _, err = in_process(module, vault_place, capfd, *option, *words)
                    assert status in (0, 1, 3, 5), (text, words, status, err)
                except Exception as error:
                    wrong.append(f"{' '.join((*option, *words))} ends in {error!r} with {text[:200]}")
    assert not wrong, "\n".join(wrong)


def test_when_the_log_was_rewritten_only_low_risk_opens(module: Any, vault_place: Place) -> None:
    """Rolled back, says the refusal in the log; new requests, and the approvers too, stop; low risk goes on."""
    rows = all_leaves(vault_place)
    for changed in (rows[:-4], rewritten(rows, 3, lambda leaf: leaf.update(actor="nobody"))):
        put_leaves(vault_place, changed)
        for key in ("mid", "grave", "pair"):
            assert "rolled back" in cause_of(module, vault_place, key)
        with opened(module, vault_place) as store, pytest.raises(module.RefusedError, match="rolled back"):
            module.unlock(module.Vault(store), "olga", word_file(vault_place, "olga"))
        low_still_opens(module, vault_place)
        put_leaves(vault_place, rows)


def independently(lines: list[Row], trusted: set[str]) -> list[str]:
    """What somebody without grace finds in an exported log: hashlib for the chain, Ed25519 for what was signed of it."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    found: list[str] = []
    size, head, heads = 0, "0" * 64, {}
    for line in (line for line in lines if line["type"] == "leaf"):
        if hashlib.sha256(b"grace/audit/1\n" + line["leaf"].encode()).hexdigest() != line["hash"]:
            found.append(f"leaf {line['seq']}")
        elif (line["seq"], json.loads(line["leaf"])["seq"], json.loads(line["leaf"])["previous"]) != (size + 1, size + 1, head):
            found.append(f"place of leaf {line['seq']}")
        size, head = line["seq"], line["hash"]
        heads[size] = head
    people = [line for line in lines if line["type"] == "approver"]
    keys = {hash_of("key", {"hpke": line["hpke"], "sign": line["sign"]}): line["sign"] for line in people}
    for line in (line for line in lines if line["type"] == "signed"):
        try:
            assert line["approver"] in trusted & set(keys)
            Ed25519PublicKey.from_public_bytes(base64.b64decode(keys[line["approver"]])).verify(base64.b64decode(line["signature"]), line["text"].encode())
            label, _, text = line["text"].partition("\n")
            signed = json.loads(text)
            signed = signed[0] if label == "grace/grant-signature/1" else signed
            assert label in ("grace/anchor/1", "grace/grant-signature/1")
            assert (signed["size"], signed["head"]) == (line["size"], line["head"])
            assert heads.get(signed["size"]) == signed["head"]
        except (AssertionError, InvalidSignature):
            found.append(f"signature under {line['size']}")
    return found


def test_the_exported_log_is_verified_without_grace(module: Any, vault_place: Place) -> None:
    """JSON lines with all leaves, the approvers' keys and what they signed; any change in them is found by others too."""
    olga = entered(module, vault_place)
    with opened(module, vault_place) as store:
        consent = asked(module, store, "mid", mode="collect").consent_id
    vault_place.ok("consent", "approve", consent, *signed_as(vault_place, "olga"))
    lines = vault_place.ok("audit", "export").lines
    assert [line["seq"] for line in lines if line["type"] == "leaf"] == list(range(1, len(all_leaves(vault_place)) + 1))
    assert {line["name"] for line in lines if line["type"] == "approver"} == set(WORDS)
    kinds = {line["text"].partition("\n")[0] for line in lines if line["type"] == "signed"}
    assert kinds == {"grace/anchor/1", "grace/grant-signature/1"}
    trusted = {olga.keys.fingerprint}
    assert independently(lines, trusted) == []
    for index, line in enumerate(lines):
        for name, value in line.items():
            if name not in ("type", "name", "approver") and line.get("name") not in ("anna", "ben"):  # the two have signed nothing
                odd = value + 1 if isinstance(value, int) else ("A" if value[-9] != "A" else "B").join((value[:-9], value[-8:]))
                assert independently([*lines[:index], {**line, name: odd}, *lines[index + 1 :]], trusted), (line["type"], name)
    assert not any(value in json.dumps(lines).encode() for value in ALL_VALUES)


# ---- after a restored copy


def restore_early(place: Place) -> None:
    """The database as the backup has it; the key files stay as they are."""
    for name in ("grace.db", "grace.db-wal", "grace.db-shm"):
        (place.folder / name).unlink(missing_ok=True)
    copy_rows(place.folder / "early.db", place.db)


def test_a_restored_copy_opens_low_risk_only_until_an_approver_accepts_it(module: Any, vault_place: Place) -> None:
    """It is told from an attack by nobody but the approver, who is shown both heads; then it counts, and the log says so."""
    restore_early(vault_place)
    low_still_opens(module, vault_place)
    with opened(module, vault_place) as store, pytest.raises(module.DeniedError):
        asked(module, store, "mid")
    assert verified(vault_place)[0] == 1
    refused = vault_place.call("audit", "anchor", *signed_as(vault_place, "olga"))
    assert (refused.status, "rolled back" in refused.err) == (5, True)
    done = vault_place.json("audit", "anchor", "--accept", *signed_as(vault_place, "olga"))
    assert done["accepted"]
    assert done["seen_before"]["machine"][0] > 0
    assert verified(vault_place)[0] == 0
    with opened(module, vault_place) as store:
        (leaf,) = leaves(store, "audit.accepted")
        assert leaf["facts"]["seen"] == done["seen_before"]
    assert released(vault_place, "mid", "olga", options=("--user", "olga")) == OLD_MID
    ben = vault_place.call("audit", "anchor", *signed_as(vault_place, "ben"))
    assert ben.status == 0 or "rolled back" in ben.err, "another approver has to accept it for himself"


def test_after_a_restored_copy_every_name_can_be_used_again(module: Any, vault_place: Place) -> None:
    """Also one that the copy does not hold, and one that it holds at an older version: stored, opened, at any version."""
    vault_place.ok("secret", "rotate", "grave", *as_olga(vault_place), stdin=b"second")
    restore_early(vault_place)
    vault_place.ok("audit", "anchor", "--accept", *signed_as(vault_place, "olga"))
    for key in ("mid", "grave"):
        vault_place.ok("secret", "set", key, *as_olga(vault_place), stdin=b"after the copy")
        assert released(vault_place, key, "olga", options=("--user", "olga")) == b"after the copy"


def test_a_restored_copy_from_before_an_approver_was_added_can_be_accepted_too(module: Any, vault_place: Place) -> None:
    """A lost newer list of approvers must not lock everybody out for good; without --accept it is refused."""
    copy_rows(vault_place.db, vault_place.folder / "early.db")
    vault_place.ok("approver", "add", "dora", "--role", "user", "--new-passphrase-file", word_file(vault_place, "dora"), *signed_as(vault_place, "olga"))
    restore_early(vault_place)
    all_refused(module, vault_place, "rolled back", low_opens=True)
    refused = vault_place.call("audit", "anchor", *signed_as(vault_place, "olga"))
    assert (refused.status, refused.out) == (5, "")
    done = vault_place.call("audit", "anchor", "--accept", *signed_as(vault_place, "olga"))
    assert done.status == 0, done.err
    assert verified(vault_place)[0] == 0
    assert released(vault_place, "mid", "olga", options=("--user", "olga")) == VALUES["mid"]


# ---- what somebody opens who has the files


def everything_openable(module: Any, db: Path, owned: list[Any]) -> Row:
    """Try to open all that a database file holds with these keys, with the program's own functions and without its checks.

    Every wrapped thing (parts of secrets, parts in grants, kept keys of requests) is tried with every key and the text it was
    bound to; keys that come out are tried as well; then every version's key is put together from whatever parts came out."""
    store = module.Store(str(db), "thief")
    keys, unwrapped = list(owned), 0
    values: dict[str, list[str]] = {}
    parts: dict[int, dict[str, dict[int, bytes]]] = {}
    entries = store.all("SELECT * FROM secret_entries")
    consents = store.all("SELECT * FROM secret_consent_records")

    def tried(key: Any, wrap: bytes | None, info: bytes) -> bytes | None:
        with contextlib.suppress(module.RefusedError):
            return bytes(key.unwrap(bytes(wrap or b""), info))
        return None

    for row in consents:
        request = json.loads(row["request"])
        for key in list(keys):
            if private := tried(key, row["ephemeral"], statement("ephemeral", hash_of("request", request))):
                keys.append(module.Keys(private))
                unwrapped += 1
    for entry in entries:
        header = json.loads(entry["header"])
        sealed = bytes(entry["sealed"] or b"")
        for share in store.all("SELECT * FROM secret_shares WHERE secret_key = :key AND version = :version", key=entry["secret_key"], version=entry["version"]):
            info = module.share_info(hash_of("header", header), hashlib.sha256(sealed).hexdigest(), share["group_name"], share["member"], share["share_index"])
            for key in keys:
                if part := tried(key, share["wrap"], info):
                    parts.setdefault(entry["seq"], {}).setdefault(share["group_name"], {})[share["share_index"]] = part
    for grant in store.all("SELECT g.*, c.secret_key, c.secret_version FROM consent_grants g JOIN secret_consent_records c USING (consent_id)"):
        document = json.loads(grant["document"])
        (entry,) = (entry for entry in entries if (entry["secret_key"], entry["version"]) == (grant["secret_key"], grant["secret_version"]))
        for key in keys:
            if part := tried(key, grant["wrap"], statement("grant", document)):
                parts.setdefault(entry["seq"], {}).setdefault(document["group"], {})[document["index"]] = part
    for entry in entries:
        header = json.loads(entry["header"])
        with contextlib.suppress(module.RefusedError):
            value = module.open_value(header, bytes(entry["sealed"] or b""), parts.get(entry["seq"], {}))
            values.setdefault(entry["secret_key"], []).append(value.decode())
    store.close()
    return {"values": values, "parts": sum(len(group) for of in parts.values() for group in of.values()), "kept_keys": unwrapped}


def as_plain_user(work: Callable[[], Any]) -> Any:
    """What `work` returns in a child process under user id 65534; what it raises fails the test."""
    source, sink = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            answer = json.dumps({"uid": os.geteuid(), "value": work()})
        except BaseException as error:
            answer = json.dumps({"error": repr(error)})
        os.write(sink, answer.encode())
        os._exit(0)
    os.close(sink)
    with os.fdopen(source, "rb") as stream:
        said = json.loads(stream.read())
    os.waitpid(pid, 0)
    assert said.get("uid") == 65534, said
    return said["value"]


@pytest.fixture(scope="module")
def loot(world: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A busy vault's database with WAL, and backups of several moments: before, between and after the approval of a collect request,
    with a waiting process's request, approved and used; the machine's key beside them."""
    folder = tmp_path_factory.mktemp("busy")
    shutil.copytree(world.folder, folder, symlinks=True, ignore=shutil.ignore_patterns("grace.db*", "grace"), dirs_exist_ok=True)
    shutil.copytree(world.folder / ".config", folder / ".config", dirs_exist_ok=True)
    copy_rows(world.db, folder / "grace.db")
    place = Place(folder)
    target = folder / "loot"
    target.mkdir()
    copy_rows(folder / "early.db", target / "early.db")
    consent = place.json("consent", "request", "mid", "--action", "use", "--for", "a test")["consent_id"]
    grave = place.json("consent", "request", "grave", "--action", "use", "--for", "a test")["consent_id"]
    place.ok("consent", "approve", grave, "--as", "user", *signed_as(place, "anna"))
    waiting = place.start("secret", "get", "pair", "--action", "use", "--for", "a test", "--user", "anna")
    (pair,) = until(lambda: [row for row in place.json("consent", "pending") if row["secret_key"] == "pair"], "the request")
    place.ok("consent", "approve", pair["consent_id"], *signed_as(place, "anna"))
    for suffix in ("", "-wal"):
        shutil.copy(f"{place.db}{suffix}", target / f"torn.db{suffix}")
    copy_rows(place.db, target / "before.db")
    place.ok("consent", "approve", pair["consent_id"], *signed_as(place, "ben"))
    assert waiting.wait(60) == 0
    place.ok("consent", "approve", consent, *signed_as(place, "olga"))
    copy_rows(place.db, target / "between.db")
    assert place.ok("secret", "get", "mid", "--action", "use", "--for", "a test", "--consent", consent).raw_out == VALUES["mid"]
    assert place.ok("secret", "get", "open", "--action", "use", "--for", "a test").raw_out == VALUES["open"]
    for suffix in ("", "-wal"):
        shutil.copy(f"{place.db}{suffix}", target / f"now.db{suffix}")
    copy_rows(place.db, target / "after.db")
    shutil.copy(keys_folder(place) / "machine.key", target / "machine.key")
    yield target
    place.close()


COPIES = ("early", "before", "torn", "between", "after", "now")


def robbed(module: Any, loot: Path, name: str, with_machine: bool) -> Row:
    """What comes out of one copy of the database; as root also for a plain user who owns the copy, and then it is the same."""
    guessed = [module.Keys(bytes(128)), module.Keys.new()]
    machine = [module.Keys(base64.b64decode(json.loads((loot / "machine.key").read_bytes())["private"]))] if with_machine else []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy.db"
        for suffix in ("", "-wal"):
            if (loot / f"{name}.db{suffix}").exists():
                shutil.copy(loot / f"{name}.db{suffix}", f"{copy}{suffix}")
        found = everything_openable(module, copy, [*guessed, *machine])
        if os.geteuid() == 0:
            for path in (Path(folder), *Path(folder).iterdir()):
                os.chown(path, 65534, 65534)
            assert as_plain_user(lambda: everything_openable(module, copy, [*guessed, *machine])) == found
    return found


def test_database_wal_and_backups_open_nothing_by_themselves(module: Any, loot: Path) -> None:
    """Of each copy: no part, no kept key, no value; as root and as a plain user."""
    for name in COPIES:
        assert robbed(module, loot, name, False) == {"values": {}, "parts": 0, "kept_keys": 0}, name


def test_with_the_machines_key_too_nothing_above_low_risk_opens(module: Any, loot: Path) -> None:
    """But for what a collect request had released in a copy made between its approval and its use, as the documentation says."""
    low = {"open": [VALUES["open"].decode()]}
    for name in COPIES:
        found = robbed(module, loot, name, True)
        expected = {**low, "mid": [VALUES["mid"].decode()]} if name == "between" else low
        assert found["values"] == expected, name
        if name in ("before", "torn"):
            assert found["kept_keys"] == 2, "the kept keys are the machine's to open"
            assert found["parts"] == 2, "the low secret's part, and the one that anna has given of `grave`, which is not enough"


def test_a_request_whose_status_was_written_by_hand_releases_nothing(module: Any, vault_place: Place) -> None:
    """Approved by UPDATE, without or with forged grants: refused, not used, and low risk goes on."""
    with opened(module, vault_place) as store:
        asking = asked(module, store, "mid", mode="collect")
    with attacking(vault_place.db) as con:
        con.execute("UPDATE secret_consent_records SET consent_status = 'approved', approved_at = 1, grant_expires_at = 1 << 50, "
                    "approval_method = 'approver'")  # fmt: skip
    done = vault_place.call("secret", "get", "mid", "--action", "use", "--for", "a test", "--consent", asking.consent_id)
    assert (done.status, done.out) == (5, "")
    assert "signatures of user are missing" in vault_place.json("audit", "list")[-1]["facts"]["cause"]
    with attacking(vault_place.db) as con:
        con.execute("UPDATE secret_consent_records SET approval_method = 'auto', mode = 'once'")
    done = vault_place.call("secret", "get", "mid", "--action", "use", "--for", "a test", "--consent", asking.consent_id)
    assert (done.status, done.out) == (5, "")
    low_still_opens(module, vault_place)


def raw_files(place: Place) -> bytes:
    """All bytes of the database and its WAL, also those that no query shows any more."""
    return b"".join(path.read_bytes() for path in (place.db, Path(f"{place.db}-wal")) if path.exists())


def test_what_was_used_up_is_gone_from_the_bytes_of_the_files(vault_place: Place) -> None:
    """Wraps and kept key of a used or revoked consent, read raw from database and WAL: nobody else reads there, so nothing is left."""
    used, revoked = (vault_place.json("consent", "request", "mid", "--action", "use", "--for", f"test {n}")["consent_id"] for n in range(2))
    for consent in (used, revoked):
        vault_place.ok("consent", "approve", consent, *signed_as(vault_place, "olga"))
    kept = [bytes(row[0]) for row in fetch(vault_place.db, "SELECT wrap FROM consent_grants UNION ALL SELECT ephemeral FROM secret_consent_records")]
    assert len(kept) == 4
    vault_place.ok("consent", "show", used)
    assert all(wrap[-64:] in raw_files(vault_place) for wrap in kept), "as long as they count, they are there"
    assert vault_place.ok("secret", "get", "mid", "--action", "use", "--for", "a test", "--consent", used).raw_out == VALUES["mid"]
    vault_place.ok("consent", "revoke", revoked, "--reason", "a test")
    left = raw_files(vault_place)
    assert [len(wrap) for wrap in kept if wrap[-64:] in left or wrap[:64] in left] == []


def test_what_was_replaced_or_removed_is_gone_from_the_bytes_of_the_files(vault_place: Place) -> None:
    """The sealed value and the parts of an old version, so that a key that is stolen later opens nothing old."""
    old = [sealed_of(vault_place, key) for key in ("mid", "grave")]
    parts = [bytes(row["wrap"]) for key in ("mid", "grave") for row in share_rows(vault_place, key)]
    vault_place.ok("secret", "rotate", "mid", *as_olga(vault_place), stdin=b"newer")
    vault_place.ok("secret", "remove", "grave")
    left = raw_files(vault_place)
    assert [len(data) for data in (*old, *parts) if data[-64:] in left or data[:64] in left] == []


def test_a_user_without_the_machines_key_gets_nothing_from_the_command(vault_place: Place, tmp_path: Path) -> None:
    """The database copied to where the key files are not: exit 7, low risk included."""
    thief = Place(tmp_path)
    copy_rows(vault_place.db, thief.db)
    for words in (("get", "open", "--action", "use", "--for", "a test"), ("get", "mid", "--action", "use", "--for", "a test"), ("list",)):
        done = thief.call("secret", *words)
        assert (done.status, done.out) == (7, "")


# ---- a value is nowhere but where it was asked for


def spellings(value: bytes) -> dict[str, bytes]:
    """How a value may hide in other text: plain, base64 at each of its three alignments, hex, percent signs, JSON, backwards."""
    found = {"plain": value, "hex": value.hex().encode(), "HEX": value.hex().upper().encode(), "backwards": value[::-1],
             "utf-16": value.decode().encode("utf-16-le"), "percent": "".join(f"%{byte:02x}" for byte in value).encode(),
             "quoted": urllib.parse.quote(value, safe="").encode()}  # fmt: skip
    for shift in range(3):
        text = base64.b64encode(bytes(shift) + value)
        start = (8 * shift + 5) // 6
        end = 4 * ((shift + len(value)) // 3)
        found[f"base64 at {shift}"] = text[start:end]
        found[f"base64url at {shift}"] = text[start:end].replace(b"+", b"-").replace(b"/", b"_")
    assert all(len(spelling) >= 20 for spelling in found.values())
    return found


def traces(data: bytes, secrets: Iterable[bytes]) -> list[str]:
    return [f"{name} of {value!r}" for value in secrets for name, spelling in spellings(value).items() if spelling in data]


def test_the_search_for_a_value_finds_it_in_each_spelling() -> None:
    """So that the test after this one can fail."""
    value = VALUES["mid"]
    for shift in range(3):
        hidden = base64.b64encode(b"xyz"[:shift] + value + b"and more")
        assert any("base64" in trace for trace in traces(hidden, [value])), shift
    for data in (b"a" + value, value.hex().encode(), urllib.parse.quote(value, safe="").encode(), b"".join(b"%%%02x" % byte for byte in value)):
        assert traces(data, [value])
    assert traces(value[:-1], [value]) == []


def files_below(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink() and path.suffix != ".word"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_value_is_in_no_output_file_or_process_but_the_one_that_asked(module: Any, vault_place: Place, capfd: pytest.CaptureFixture[str],
                                                                        unhardened: None) -> None:  # fmt: skip
    """While a request waits, when it is approved, used, refused, rotated and removed: neither it nor a passphrase is anywhere else."""
    secrets = [*ALL_VALUES, *WORDS.values()]
    said: dict[str, bytes] = {}

    def run(*words: str, stdin: bytes | None = None, status: int = 0) -> Result:
        done = vault_place.call(*words, stdin=stdin)
        assert done.status == status, (words, done.err)
        said[f"{len(said)}: {' '.join(words)}"] = done.raw_out + done.raw_err
        return done

    def look(moment: str) -> None:
        for name, data in {**files_below(vault_place.folder), **said}.items():
            assert traces(data, secrets) == [], f"{moment}: {name}"

    waiting = vault_place.start("secret", "get", "mid", "--action", "use", "--for", "a test")
    (pending,) = until(lambda: run("--json", "consent", "pending").json, "the request")
    process = Path(f"/proc/{waiting.pid}")
    for name in ("environ", "cmdline", "comm"):
        assert traces((process / name).read_bytes(), secrets) == []
    look("waiting")
    run("consent", "approve", pending["consent_id"], *signed_as(vault_place, "anna"))
    out, err = waiting.communicate(timeout=60)
    assert (waiting.returncode, out) == (0, VALUES["mid"])
    assert traces(err, secrets) == []
    look("used")
    run("--json", "secret", "get", "open", "--action", "use", "--for", "a test", status=2)
    run("secret", "get", "mid", "--action", "use", "--for", "a test", "--timeout", "100ms", status=6)
    run("secret", "set", "mid", *as_olga(vault_place), stdin=VALUES["mid"] * 3000, status=2)
    run("secret", "set", "mid", "--policy", "user:9", *as_olga(vault_place), stdin=VALUES["mid"], status=2)
    run("secret", "set", "mid", "--owner", "olga", stdin=VALUES["mid"], status=7)
    run("secret", "set", "mid", "--owner", "olga", "--passphrase-file", word_file(vault_place, "anna"), stdin=VALUES["mid"], status=5)
    run("secret", "rotate", "mid", *as_olga(vault_place), stdin=VALUES["mid"])
    run("secret", "reshare", "mid", *signed_as(vault_place, "anna"))
    for words in (*LISTINGS, ("events", "--since", "1d"), ("status",), ("secret", "show", "grave"), ("consent", "show", pending["consent_id"])):
        for option in ((), ("--json",)):
            status, out_text, err_text = in_process(module, vault_place, capfd, *option, *words)
            assert status == 0, err_text
            said[f"{len(said)}: {' '.join(words)}"] = (out_text + err_text).encode()
    with attacking(vault_place.db) as con:
        con.execute("UPDATE secret_shares SET wrap = x'00'")
    run("secret", "get", "open", "--action", "use", "--for", "a test", status=5)
    run("secret", "remove", "mid")
    look("at the end")
    machine = base64.b64decode(json.loads(key_of(vault_place, "machine").read_bytes())["private"])
    database = {name: data for name, data in files_below(vault_place.folder).items() if "grace.db" in name}
    assert database
    for part in (machine[:64], machine[64:96], machine[96:]):
        for data in (*database.values(), *said.values()):
            assert part not in data
            assert part.hex().encode() not in data


def test_a_running_command_with_a_secret_shows_it_only_where_it_was_handed_over(vault_place: Place) -> None:
    """exec --via fd: neither environment nor command line nor what grace says has it; the command itself does."""
    words = ("exec", "--secret", "TOKEN=mid", "--via", "fd", "--for", "a test", "--", "sh", "-c", "cat <&$TOKEN; read line")
    running = vault_place.start(*words, stdin=-1)
    (pending,) = until(lambda: vault_place.json("consent", "pending"), "the request")
    vault_place.ok("consent", "approve", pending["consent_id"], *signed_as(vault_place, "olga"))
    assert running.stdout is not None
    assert running.stdout.read(len(VALUES["mid"])) == VALUES["mid"]
    for entry in Path("/proc").glob("[0-9]*"):
        for name in ("environ", "cmdline"):
            with contextlib.suppress(OSError):
                assert traces((entry / name).read_bytes(), ALL_VALUES) == [], f"{entry.name} {name}"
    out, err = running.communicate(b"\n", timeout=60)
    assert (running.returncode, out, traces(err, ALL_VALUES)) == (0, b"", [])


# ---- properties


class People:
    """A roster in memory with many approvers, for the pure functions that seal and open."""

    def __init__(self, module: Any, count: int):
        self.keys = [module.Keys.new() for _ in range(count)]
        self.machine = module.Keys.new()
        people = [module.new_person(f"p{n}", ("user", "governance"), keys.public, 1) for n, keys in enumerate(self.keys)]
        self.roster = module.new_roster(None, people, self.machine.public, "0" * 16, self.keys[0].fingerprint, 1)

    def sealed(self, module: Any, policy: Row, value: bytes, **fields: Any) -> Row:
        header = {"format": "grace-secret/1", "vault_id": "0" * 16, "key": "k", "version": 1, "created": 1, **module.NEW_SECRET, **fields, "policy": policy,
                  "same_person": False}  # fmt: skip
        return dict(module.seal(self.keys[0], header, value, self.roster))


def entry_of(made: Row) -> tuple[Row, list[Row]]:
    """A version as its rows would be."""
    shares = [{"group_name": share["group"], "member": share["member"], "share_index": share["index"], "wrap": share["wrap"]} for share in made["shares"]]
    return {"sealed": made["sealed"]}, shares


@pytest.fixture(scope="module")
def people(module: Any) -> People:
    return People(module, 6)


def random_policy(dice: random.Random, prints: list[str]) -> Row:
    groups = []
    for name in dice.choice((["user"], ["governance"], ["user", "governance"], ["governance", "user"])):
        members = dice.sample(prints, dice.randint(1, len(prints)))
        groups.append({"group": name, "threshold": dice.randint(1, len(members)), "members": members})
    return {"all": groups}


def test_exactly_those_open_whom_the_policy_names(module: Any, people: People) -> None:
    """For random policies, every set of approvers with all that their keys open: as a count by hand says."""
    dice = random.Random(20_261_122)
    prints = [keys.fingerprint for keys in people.keys]
    both = {True: 0, False: 0}
    for round_ in range(70):
        policy, value = random_policy(dice, prints), dice.randbytes(dice.randint(1, 600))
        assert module.odd_policy(policy) is None
        made = people.sealed(module, policy, value)
        entry, shares = entry_of(made)
        held = {keys.fingerprint: module.own_shares(keys, entry, made["header"], shares) for keys in people.keys}
        for size in range(len(prints) + 1):
            for chosen in itertools.combinations(prints, size):
                parts: dict[str, dict[int, bytes]] = {}
                for member in chosen:
                    for name, mine in held[member].items():
                        parts.setdefault(name, {}).update(mine)
                expected = all(len(set(chosen) & set(part["members"])) >= part["threshold"] for part in policy["all"])
                both[expected] += 1
                if expected:
                    assert module.open_value(made["header"], made["sealed"], parts) == value, (round_, policy, chosen)
                else:
                    with pytest.raises(module.RefusedError):
                        module.open_value(made["header"], made["sealed"], parts)
    assert min(both.values()) > 500


def test_parts_of_another_secret_or_group_open_nothing(module: Any, people: People) -> None:
    """The same people and the same policy, sealed twice: a part of the one among those of the other, or of the other group."""
    prints = [keys.fingerprint for keys in people.keys]
    for threshold in (1, 2, 3):
        policy = {"all": [{"group": name, "threshold": threshold, "members": prints[:3]} for name in ("user", "governance")]}
        one, two = (people.sealed(module, policy, b"value") for _ in range(2))
        held = []
        for made in (one, two):
            parts: dict[str, dict[int, bytes]] = {}
            for keys in people.keys[:3]:
                entry, shares = entry_of(made)
                for name, mine in module.own_shares(keys, entry, made["header"], shares).items():
                    parts.setdefault(name, {}).update(mine)
            held.append(parts)
        assert module.open_value(one["header"], one["sealed"], held[0]) == b"value"
        mixed = [held[1], {"user": held[0]["user"], "governance": held[1]["governance"]}, {**held[0], "user": held[0]["governance"]},
                 {"user": {**held[0]["user"], 1: held[1]["user"][1]}, "governance": held[0]["governance"]}, {"user": held[0]["user"]}, {}]  # fmt: skip
        for parts in mixed:
            with pytest.raises(module.RefusedError):
                module.open_value(one["header"], one["sealed"], parts)


def mutated(dice: random.Random, value: Any) -> Any:
    """The same with one byte or character changed, removed or added."""
    position, kind = dice.randrange(len(value)), dice.randrange(8)
    new: Any
    if isinstance(value, bytes):
        new = bytes([value[position] ^ 1 << dice.randrange(8)])
    else:
        new = dice.choice([c for c in '0123456789abcdefxyzAZ{}[]",: \\é' if c != value[position]])
    middle = new if kind > 1 else value[:0] if kind == 0 else new + value[position : position + 1]
    return value[:position] + middle + value[position + 1 :]


def test_any_mutation_of_anything_that_is_signed_or_wrapped_is_refused(module: Any, vault_place: Place) -> None:
    """Header, sealed value, seal, part, request, grant, its wrap and signature: a changed byte or character, anywhere, at random."""
    dice = random.Random(11_221_963)
    with opened(module, vault_place) as store:
        asking = asked(module, store, "grave")
        vault = module.Vault(store)
        for name, group_ in (("olga", "user"), ("ben", "governance")):
            approver = module.unlock(vault, name, word_file(vault_place, name))
            review, seen = module.judge(vault, approver, store.one("SELECT * FROM secret_consent_records WHERE consent_id = :id", id=asking.consent_id))
            module.sign_and_record(vault, review, [group_], seen, None, word_file(vault_place, name))
        entry, header = vault.current(store, "grave")
        shares = store.all(module.SHARES_OF, key="grave", version=1)
        consent = store.one("SELECT * FROM secret_consent_records WHERE consent_id = :id", id=asking.consent_id)
        grants = store.all(module.GRANTS_OF, id=asking.consent_id)
        olga = module.unlock(vault, "olga", word_file(vault_place, "olga"))

    def opens(header_text: str, sealed: bytes, seal: bytes, request_text: str, document: str, wrap: bytes, signature: bytes) -> bytes:
        """What claim_parts and redeem check, in their order, with the first grant given in pieces."""
        sealed_hash = hashlib.sha256(sealed).hexdigest()
        read = module.check_seal(header_text, sealed_hash, seal, vault.id, vault.roster)
        request = module.checked_request(request_text, read, sealed_hash, vault.id)
        rows = [{"document": document, "signature": signature, "wrap": wrap, "wrap_hash": hashlib.sha256(wrap).hexdigest()}, *grants[1:]]
        checked = module.checked_grants(read, request, vault.roster, rows)
        assert module.missing_groups(read, request, checked) == []
        parts: dict[str, dict[int, bytes]] = {}
        for grant, row in zip(checked, rows, strict=True):
            parts.setdefault(grant["group"], {})[grant["index"]] = asking.keys.unwrap(bytes(row["wrap"]), module.statement("grant", grant))
        return bytes(module.open_value(read, sealed, parts))

    right = [entry["header"], bytes(entry["sealed"]), bytes(entry["signature"]), consent["request"], grants[0]["document"], bytes(grants[0]["wrap"]),
             bytes(grants[0]["signature"])]  # fmt: skip
    assert opens(*right) == VALUES["grave"]
    for which in range(len(right)):
        for _ in range(240):
            changed = [*right[:which], mutated(dice, right[which]), *right[which + 1 :]]
            if changed != right:
                with pytest.raises(module.RefusedError):
                    opens(*changed)
    mine = next(share for share in shares if share["member"] == olga.keys.fingerprint)
    assert module.own_shares(olga.keys, entry, header, [mine])
    for _ in range(240):
        with pytest.raises(module.RefusedError):
            module.own_shares(olga.keys, entry, header, [{**mine, "wrap": mutated(dice, bytes(mine["wrap"]))}])
    for other in ({**mine, "group_name": "governance"}, {**mine, "share_index": mine["share_index"] + 1}):
        with pytest.raises(module.RefusedError):
            module.own_shares(olga.keys, entry, header, [other])
