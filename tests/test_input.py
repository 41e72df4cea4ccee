"""Bad input, whatever it is: refused in one clear line that names the field and changes nothing, or accepted and shown escaped.

Most calls go through the module's own `call`, the very code of the command, because there are thousands of them; what needs a
standard input, bytes in argv or limits of its own is a real process.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest

from tests.conftest import GRACE, LIMIT, Place, load_module, until
from tests.test_cli import softened

TABLES = ("intent_records", "htm_tasks", "htm_task_attempts", "handlers", "settings", "events", "event_cursors", "task_dependencies", "outcome_records")
HIDDEN = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
VAULT_TABLES = ("vault_rosters", "governance_rules", "secret_entries", "secret_shares", "secret_consent_records", "consent_grants", "audit_anchors")
NOT_HERE = {"daemon", "demo", "run"}  # they change signal handlers or descriptors, so they are called as processes


class Answer(NamedTuple):
    status: int
    out: str
    err: str


Caller = Callable[..., Answer]


@functools.lru_cache(1000)
def stretched(passphrase: bytes, kdf: str) -> bytes:
    """The key of a passphrase; each is worked out once, since that is meant to take long."""
    return bytes(STRETCH[0](passphrase, json.loads(kdf)))


STRETCH: list[Callable[..., bytes]] = []


def never(*words: Any) -> None:
    """In the place of what would replace this very process."""
    pytest.fail(f"a command would have been executed: {words}")


@pytest.fixture
def inside(place: Place, module: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Caller]:
    """Call the program in this process on the place's database; stores that a call leaves open are closed after it."""
    for name in [name for name in os.environ if name.startswith(("GRACE_", "XDG_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GRACE_DB", str(place.db))
    monkeypatch.setenv("HOME", str(place.folder))
    monkeypatch.chdir(place.folder)
    opened: list[Any] = []
    open_store = module.App.store

    def open_and_remember(app: Any) -> Any:
        opened.append(open_store(app))
        return opened[-1]

    monkeypatch.setattr(module.App, "store", open_and_remember)
    if not STRETCH:
        STRETCH.append(module.stretch)
    monkeypatch.setattr(module, "stretch", lambda passphrase, kdf: stretched(passphrase, json.dumps(kdf)))
    for name in ("execve", "posix_spawn"):
        monkeypatch.setattr(os, name, never)

    def run(*words: str | bytes) -> Answer:
        capsys.readouterr()
        try:
            with softened(module):
                status = module.call([os.fsdecode(word) for word in words])
        finally:
            for store in opened:
                store.close()
            opened.clear()
        out, err = capsys.readouterr()
        return Answer(status, out, err)

    yield run


def commands(module: Any) -> Iterator[tuple[str, ...]]:
    """The words of every command, the groups' own included."""
    for group, members in module.COMMANDS.items():
        for name in members:
            yield (*group.split(), *name.split())


def built(module: Any, words: tuple[str, ...]) -> click.Command:
    group, name = (" ".join(words), "") if " ".join(words) in module.GROUPS else (" ".join(words[:-1]), words[-1])
    command: click.Command = module.build_command(name, *module.COMMANDS[group][name])
    return command


def rows(place: Place) -> dict[str, int]:
    """How many rows each table has."""
    with contextlib.closing(sqlite3.connect(place.db)) as con:
        return {table: con.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0] for table in TABLES}


def vault_state(place: Place) -> dict[str, Any]:
    """All that the vault's rows and key files hold; of the log the kinds of its leaves."""
    state: dict[str, Any] = {}
    with contextlib.closing(sqlite3.connect(place.db)) as con:
        for table in VAULT_TABLES:
            state[table] = hashlib.sha256(repr(con.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall()).encode()).hexdigest()
        state["log"] = [kind for (kind,) in con.execute("SELECT json_extract(leaf, '$.kind') FROM audit_log ORDER BY seq")]
    for file in sorted((place.folder / ".config").rglob("*")):
        if file.is_file() and file.name != ".lock":  # which says who held it last
            state[file.name] = file.read_bytes()
    return state


MAY_BE_TOLD = {"vault.refused", "approver.refused", "consent.shown"}


def check_vault_unchanged(before: dict[str, Any], after: dict[str, Any], what: str) -> None:
    """A refused call changes nothing, but the log may tell of it: what does not verify, a wrong passphrase, what an approver was shown before he was refused.

    That a key is copied is in the log (and this machine has seen it there) before the copy is written, perhaps in vain."""
    size, exported = len(before["log"]), what.startswith("approver export with out = ")
    told = set(after["log"][size:])
    assert after["log"][:size] == before["log"] and told <= MAY_BE_TOLD | ({"approver.exported"} if exported else set()), f"{what}: {told}"
    mayhap = {"log", "machine.seen"} if exported else {"log"}
    changed = [name for name in {*before, *after} - mayhap if before.get(name) != after.get(name)]
    assert not changed, f"{what} was refused and yet changed {changed}"


def message_of(err: str, as_json: bool) -> str:
    """The error's message, after checking its shape."""
    if as_json:
        error = json.loads(err)["error"]
        assert set(error) == {"code", "message", "hint"}
        return str(error["message"])
    lines = err.splitlines()
    assert lines and lines[0].startswith("grace: "), err
    assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("hint: ")), err
    assert not HIDDEN.search(err), ascii(err)
    return lines[0].removeprefix("grace: ")


def names_of(param: click.Parameter) -> set[str]:
    """How a message may name a parameter."""
    if isinstance(param, click.Option):
        return {*param.opts, *param.secondary_opts}
    name = param.name or ""
    return {name.upper(), f"'{name}", (param.metavar or name).rstrip("…").upper(), f"no {name} ", f"an {name}", f"a {name}"} | (
        {"is not an id", "is no id", "there is no intent", "there is no task"} if name in ("id", "ids") else set()
    )


HOSTILE: dict[str, str | bytes] = {
    "empty": "", "blank": " ", "five thousand": "x" * 5000, "not UTF-8": b"\xff\xfe", "half a character": b"caf\xc3", "control": "a\x01\x02\x7fb",
    "lines": "one\ntwo\r\nthree", "ANSI": "\x1b[31mred\x1b[0m\x1b]0;title\x07", "bidi": "abc\u202edef\u2066", "invisible": "a\u200bb\u00ad\ufeff",
    "line separator": "a\u2028b", "separator": "--", "negative": "-1", "zero": "0", "huge number": "99999999999999999999", "other digits": "١٢٣",
    "not a number": "NaN", "infinite": "1e999", "path": "../../etc/passwd", "emoji": "🏃‍♀️ naïve", "quotes": "'; DROP TABLE htm_tasks; --",
    "template": "{context.x}%s${HOME}", "at nothing": "@", "at missing": "@/nonexistent", "at directory": "@/", "wild": "*%_!?", "json": '{"a":1}',
    "surrogate": '{"a":"\\ud800"}', "nul": '{"a":"\\u0000"}', "twice": '{"a":1,"a":2}', "astral digits": "𝟏𝟐s", "sign": "+5m", "minus": "-",
}  # fmt: skip


@pytest.fixture
def ground(place: Place, inside: Caller) -> dict[str, str]:
    """Good values for what commands require: there is one of everything."""
    for words in (["handler", "add", "work", "--sla", "1h", "--", "true"], ["handler", "add", "outside", "--external"],
                  ["handler", "add", "spare", "--", "true"]):  # fmt: skip
        assert inside(*words).status == 0
    (place.folder / "past.jsonl").write_text('{"name": "past", "start": 100, "end": 120, "success": true}\n')
    made = json.loads(inside("submit-intent", "a first goal", "--handler", "work", "--json").out)
    assert inside("submit-intent", "for others", "--handler", "outside").status == 0
    return {"id": made["task_id"], "ids": made["intent_id"], "goal": "a goal", "name": "work", "worker": "w1", "handler": "work", "done": "1", "total": "2",
            "error": "it broke", "cmd": "true", "operation": "get", "topic": "mine.own", "payload": "{}", "value": "1m", "file": "past.jsonl",
            "intent": made["intent_id"], "priority": "low"}  # fmt: skip


# ---- a vault for the commands that need one

VAULT_GOOD: dict[str, dict[str, str]] = {  # what makes each vault command succeed; what stands in braces is from `vaulted`
    "init": {"name": "anna", "passphrase_file": "{anna}"}, "doctor": {}, "exec": {"secrets": "A=open", "cmd": "/no/such/program"},
    "approver list": {}, "approver add": {"name": "carl", "role": "user", "new_passphrase_file": "{carl}", "approver": "anna", "passphrase_file": "{anna}"},
    "approver remove": {"name": "ben", "approver": "anna", "passphrase_file": "{anna}"}, "approver export": {"name": "anna"},
    "approver passwd": {"name": "anna", "new_passphrase_file": "{carl}", "passphrase_file": "{anna}"}, "approver import": {"file": "{bundle}"},
    "secret set": {"key": "fresh", "value_file": "{value}", "owner": "anna", "passphrase_file": "{anna}"}, "secret list": {}, "secret show": {"key": "shop"},
    "secret rotate": {"key": "shop", "value_file": "{value}", "owner": "anna", "passphrase_file": "{anna}"}, "secret history": {"key": "open"},
    "secret reshare": {"key": "shop", "approver": "anna", "passphrase_file": "{anna}"}, "secret remove": {"key": "shop"},
    "secret get": {"key": "open", "action": "use", "purpose": "a test", "reveal": "yes"}, "consent pending": {}, "consent stats": {}, "consent history": {},
    "consent request": {"key": "shop", "action": "use", "purpose": "a test", "user": "anna"}, "consent show": {"id": "{pending}"},
    "consent approve": {"id": "{pending}", "approver": "anna", "passphrase_file": "{anna}"}, "consent export": {"id": "{pending}"},
    "consent import": {"file": "{approval}"}, "consent deny": {"id": "{pending}", "reason": "no"}, "consent withdraw": {"id": "{pending}"},
    "consent revoke": {"id": "{approved}", "reason": "no"}, "consent wait": {"id": "{approved}"}, "audit list": {}, "audit export": {},
    "consent template add": {"name": "other", "keys": "shop", "action": "tidy", "by": "cron", "grant_for": "1d", "uses": "3", "approver": "anna",
                             "passphrase_file": "{anna}"}, "consent template list": {}, "consent template show": {"name": "night"},
    "consent template remove": {"name": "night"},
    "consent template refresh": {"name": "night", "keys": "shop", "approver": "anna", "passphrase_file": "{anna}"},
    "consent watch": {"approver": "anna", "passphrase_file": "{anna}"}, "audit verify": {"approver": "anna", "passphrase_file": "{anna}"},
    "audit anchor": {"approver": "anna", "passphrase_file": "{anna}"},
    "policy add": {"name": "other", "effect": "deny", "by": "nobody", "approver": "anna", "passphrase_file": "{anna}"}, "policy list": {},
    "policy remove": {"name": "quiet", "approver": "anna", "passphrase_file": "{anna}"}, "policy test": {"key": "shop", "action": "use"},
}  # fmt: skip


@pytest.fixture(scope="module")
def safe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A vault of two approvers, one of them elsewhere, three secrets, and requests in several states; its `ids` are in a file."""
    place = Place(tmp_path_factory.mktemp("safe"))
    for name in ("anna", "ben", "carl", "value"):
        (place.folder / name).write_text(f"what is in {name}\n")
        (place.folder / name).chmod(0o600)
    anna = ("--passphrase-file", "anna")
    place.ok("config", "set", "vault.argon2_memory", "67108864")
    place.handler("work", "--", "true")
    place.ok("init", "--name", "anna", *anna)
    for key, risk in (("open", "low"), ("shop", "medium"), ("grave", "high")):
        place.ok("secret", "set", key, "--risk", risk, "--value-file", "value", *(anna if risk != "low" else ()))
    ids = {what: place.json("consent", "request", key, "--action", "use", "--for", what, "--timeout", "1d")["consent_id"]
           for what, key in (("pending", "shop"), ("approved", "shop"), ("serious", "grave"))}  # fmt: skip
    place.ok("consent", "export", ids["pending"], "--out", "case")
    place.ok("consent", "approve", "--in", "case", "--out", "approval", *anna)
    place.ok("consent", "approve", ids["approved"], *anna)
    place.ok("secret", "set", "second", "--value-file", "value", *anna)
    place.ok("consent", "template", "add", "night", "--secret", "second", "--action", "tidy", "--by", "cron", "--for", "1d", "--uses", "3", *anna)
    place.ok("policy", "add", "quiet", "allow", "--by", "nobody at all", *anna)
    place.ok("approver", "add", "ben", "--role", "user", "--role", "governance", "--new-passphrase-file", "ben", *anna)
    place.ok("approver", "export", "ben", "--out", "bundle")
    for file in place.folder.glob(".config/grace/*/ben.*"):
        file.unlink()
    (place.folder / "ids").write_text(json.dumps(ids))
    yield place
    place.close()


def put_vault(source: Place, place: Place) -> None:
    """The vault of `safe`, as it was made, in the place of whatever is there. Nobody may have the database open."""
    for file in place.folder.glob("grace.db*"):
        if file.is_file():
            file.unlink()
    for file in source.folder.glob("grace.db*"):
        if not file.name.endswith("-shm"):
            shutil.copy2(file, place.folder)
    shutil.rmtree(place.folder / ".config", ignore_errors=True)
    shutil.copytree(source.folder / ".config", place.folder / ".config")


@pytest.fixture
def vaulted(place: Place, safe: Place, inside: Caller) -> dict[str, str]:
    """A copy of that vault, and what the good values of its commands are."""
    put_vault(safe, place)
    names = ("anna", "ben", "carl", "value", "case", "approval", "bundle")
    for name in names:
        shutil.copy2(safe.folder / name, place.folder)
    (place.folder / "below" / "this").mkdir(parents=True)
    os.chdir(place.folder / "below" / "this")  # so that ../../etc/passwd is a file of the test's own
    return {**json.loads((safe.folder / "ids").read_text()), **{name: str(place.folder / name) for name in names}}


def vault_call(words: tuple[str, ...], ground: dict[str, str], name: str | None = None) -> dict[str, list[Any]]:
    """The values with which a vault command succeeds; without those that the parameter `name` excludes."""
    values = {key: [ground.get(value[1:-1], value) if value.startswith("{") else value] for key, value in VAULT_GOOD[" ".join(words)].items()}
    if words == ("consent", "approve") and name in ("in_file", "out"):
        values = {**values, "in_file": [ground.get("case", "case")]}
    if (words == ("consent", "approve") and name in ("in_file", "out")) or (words == ("consent", "revoke") and name in ("key", "action")):
        del values["id"]
    if words == ("consent", "revoke") and name == "action":
        values["key"] = ["shop"]
    return values


def good_call(words: tuple[str, ...], command: click.Command, ground: dict[str, str]) -> dict[str, list[Any]]:
    """The values of the required parameters of a command, by name."""
    if " ".join(words) in VAULT_GOOD:
        return vault_call(words, ground)
    values: dict[str, list[Any]] = {}
    for param in command.params:
        name = param.name or ""
        if param.required or (words[0] == "submit-intent" and name == "goal"):
            value = ground[name]
            if words[0] == "intent" and name == "id":
                value = ground["intent"]
            if words[0] == "config" and name == "name":
                value = "queue.age_every"
            values[name] = [value]
    if words == ("handler", "add"):
        values.update(name=["new"], cmd=["true"])
    if words == ("intent", "wait"):
        values["timeout"] = ["1ms"]
    return values


def argv_of(words: tuple[str, ...], command: click.Command, values: dict[str, list[Any]]) -> list[str | bytes]:
    """The call with these values: options first, then the arguments."""
    argv: list[str | bytes] = [*words]
    for param in command.params:
        if isinstance(param, click.Option):
            for value in values.get(param.name or "", []):
                argv += [param.opts[-1]] if param.is_flag else [param.opts[-1], value]
    for param in command.params:
        if isinstance(param, click.Argument):
            argv += (["--"] if param.name == "cmd" and values.get("cmd") else []) + list(values.get(param.name or "", []))
    return argv


def hostile_parameters(command: click.Command) -> Iterator[click.Parameter]:
    """Those that need a value; --watch, which does not, goes on for ever: tests/test_dashboard.py."""
    for param in command.params:
        if not getattr(param, "is_flag", False) and param.name != "watch":
            yield param


def check_refusal(answer: Answer, as_json: bool, what: str, statuses: tuple[int, ...] = (2, 3, 4)) -> str:
    """An error's message, after checking that it is one."""
    assert answer.status in statuses, f"{what}: {answer}"
    assert answer.out == "", what
    message = message_of(answer.err, as_json)
    assert message.strip(), what
    return message


def check_unchanged(place: Place, before: dict[str, int], answer: Answer, what: str) -> str:
    """A plain error's message, after checking that nothing has changed."""
    message = check_refusal(answer, False, what)
    assert rows(place) == before, f"{what} was refused and yet changed something"
    return message


def command_names() -> list[str]:
    return [" ".join(words) for words in commands(load_module()) if words[0] not in NOT_HERE and " ".join(words) not in VAULT_GOOD]


def vault_command_names() -> list[str]:
    """Those that open the vault or ask for something in it: all that this round of commands has."""
    groups = ("approver", "secret", "consent", "policy", "audit")
    return [" ".join(words) for words in commands(load_module()) if words[0] in (*groups, "init", "doctor", "exec")]


@pytest.mark.parametrize("path", command_names())
def test_any_value_for_any_parameter(path: str, place: Place, module: Any, inside: Caller, ground: dict[str, str]) -> None:
    """Each parameter of each command takes each bad value: one clear line and no change, or an answer with nothing hidden in it."""
    words = tuple(path.split())
    command = built(module, words)
    assert inside(*words, "--help").status == 0
    after = rows(place)
    for param in hostile_parameters(command):
        for number, (title, value) in enumerate(HOSTILE.items()):
            as_json = number % 2 == 1 and param.name != "consumer" and words[0] != "credential"  # git's protocol is no JSON
            values: dict[str, list[Any]] = {**good_call(words, command, ground), param.name or "": [value]}
            if param.name == "batch":
                values.pop("goal", None)
            argv = argv_of(words, command, values)
            what = f"{' '.join(words)} with {param.name} = {title}"
            before = after
            answer = inside(*(["--json", *argv] if as_json else argv))
            after = rows(place)
            if answer.status in (0, 1, 6):
                if as_json:
                    json.loads(answer.out)
                assert not HIDDEN.search(answer.out), f"{what}: {answer.out!a}"
                assert answer.err == "", what
                continue
            assert after == before, f"{what} was refused and yet changed something"
            message = check_refusal(answer, as_json, what)
            if answer.status == 2 and value not in ("--", "-1", "-"):
                assert any(name in message for name in names_of(param)), f"{what}: the field is not named in {message!r}"


@pytest.mark.parametrize("path", command_names())
def test_missing_and_superfluous_words(path: str, place: Place, module: Any, inside: Caller, ground: dict[str, str]) -> None:
    """Without its required words, with an unknown option, an option without its value, or one word too many, nothing happens."""
    words = tuple(path.split())
    command = built(module, words)
    before = rows(place)
    good = good_call(words, command, ground)
    required = [param for param in command.params if param.required]
    wrong: list[list[str | bytes]] = [[*argv_of(words, command, good), "--nonsense"], [*argv_of(words, command, good), "--json=5"]]
    wrong += [argv_of(words, command, {name: value for name, value in good.items() if name != param.name}) for param in required]
    if not any(param.nargs == -1 for param in command.params):
        few = len([param for param in command.params if isinstance(param, click.Argument)])
        wrong.append([*words, *(["1"] * (few + 1))])
    wrong += [[*words, param.opts[-1]] for param in command.params if isinstance(param, click.Option) and not param.is_flag and param.name != "watch"]
    for argv in wrong:
        if words == ("handler", "add"):
            argv = [word for word in argv if word not in ("--", "true")]
        answer = inside(*argv)
        assert answer.status == 2, (argv, answer)
        check_unchanged(place, before, answer, str(argv))
        answer = inside("--json", *argv)
        assert answer.status == 2 and json.loads(answer.err)["error"]["code"] == "usage", argv


REFUSED = (2, 3, 4, 5, 7)  # a vault command may also be denied, or lack a passphrase


def parted(err: str, as_json: bool) -> tuple[str, str]:
    """What an approver is shown, and the error that comes after it."""
    place = err.find('{"error": ' if as_json else "grace: ") if not err.startswith("grace: ") else 0
    return (err, "") if place < 0 else (err[:place], err[place:])


def check_shown(shown: str, as_json: bool, what: str) -> None:
    """The prompt is printable ASCII, and the notes before an answer are clean; with --json there is no such thing."""
    assert not HIDDEN.search(shown), f"{what}: {shown!a}"
    assert not as_json or not shown, f"{what}: with --json stderr holds {shown!r}"


def vault_ground(path: str, request: pytest.FixtureRequest, place: Place, safe: Place, inside: Caller) -> tuple[dict[str, str], Callable[[], None]]:
    """The good values, and a way back to the beginning; `init` begins without a vault."""
    ground: dict[str, str] = request.getfixturevalue("vaulted")

    def again() -> None:
        put_vault(safe, place)
        if path == "init":
            for file in [*place.folder.glob("grace.db*")]:
                file.unlink()
            shutil.rmtree(place.folder / ".config")
            assert inside("config", "set", "vault.argon2_memory", "67108864").status == 0

    again()
    return ground, again


@pytest.mark.parametrize("path", vault_command_names())
def test_any_value_for_any_parameter_of_the_vault(path: str, place: Place, safe: Place, module: Any, inside: Caller, request: pytest.FixtureRequest) -> None:
    """Each parameter of each vault command takes each bad value, every time on the same vault: one clear line and nothing half-done, or a clean answer."""
    words = tuple(path.split())
    command = built(module, words)
    assert inside(*words, "--help").status == 0
    ground, again = vault_ground(path, request, place, safe, inside)
    before, counts = vault_state(place), rows(place)
    for param in hostile_parameters(command):
        name = param.name or ""
        for number, (title, value) in enumerate(HOSTILE.items()):
            as_json = (number + len(name)) % 2 == 1 and path != "consent watch"  # with --json it would go on for ever
            argv = argv_of(words, command, {**vault_call(words, ground, name), name: [value]})
            what = f"{path} with {name} = {title}"
            answer = inside(*(["--json", *argv] if as_json else argv))
            if answer.status in (0, 1) or (path, answer.status) == ("consent wait", 6):
                if as_json:
                    json.loads(answer.out)
                assert not HIDDEN.search(answer.out), f"{what}: {answer.out!a}"
                check_shown(answer.err, as_json, what)
                again()
                before, counts = vault_state(place), rows(place)
                continue
            shown, error = parted(answer.err, as_json)
            check_shown(shown, as_json, what)
            message = check_refusal(Answer(answer.status, answer.out, error), as_json, what, (*REFUSED, 126, 127) if path == "exec" else REFUSED)
            check_vault_unchanged(before, after := vault_state(place), what)
            assert rows(place) == counts, f"{what} was refused and yet changed something"
            before = after
            if answer.status == 2 and value not in ("--", "-1", "-"):
                assert any(text in message for text in names_of(param)), f"{what}: the field is not named in {message!r}"


@pytest.mark.parametrize("path", vault_command_names())
def test_missing_and_superfluous_words_of_the_vault(path: str, place: Place, safe: Place, module: Any, inside: Caller, request: pytest.FixtureRequest) -> None:
    """Without its required words, with an unknown option, an option without its value, or one word too many, nothing happens."""
    words = tuple(path.split())
    command = built(module, words)
    ground, _ = vault_ground(path, request, place, safe, inside)
    before, counts = vault_state(place), rows(place)
    good = vault_call(words, ground)
    options = [param for param in command.params if isinstance(param, click.Option)]
    wrong: list[list[str | bytes]] = [[*words, "--nonsense", *argv_of(words, command, good)[len(words):]], [*words, "--json=5"]]
    wrong += [argv_of(words, command, {name: value for name, value in good.items() if name != param.name}) for param in command.params if param.required]
    if not any(param.nargs == -1 for param in command.params):
        wrong.append([*argv_of(words, command, good), *(["1"] * (len(command.params) - len(options) + 1))])
    wrong += [[*words, param.opts[-1]] for param in options if not param.is_flag]
    for argv in wrong:
        for call in (argv, ["--json", *argv]):
            answer = inside(*call)
            assert answer.status == 2, (call, answer)
            check_refusal(answer, call is not argv, str(call))
    check_vault_unchanged({**before, "log": vault_state(place)["log"]}, vault_state(place), path)
    assert vault_state(place)["log"] == before["log"] and rows(place) == counts


@pytest.mark.parametrize("path", [path for path, values in VAULT_GOOD.items() if "passphrase_file" in values and path != "audit verify"])
def test_without_a_passphrase(path: str, place: Place, safe: Place, module: Any, inside: Caller, request: pytest.FixtureRequest) -> None:
    """Where neither a terminal nor a file gives it: exit 7, what to do about it, and nothing changed. A wrong one is 5."""
    words = tuple(path.split())
    command = built(module, words)
    ground, _ = vault_ground(path, request, place, safe, inside)
    before = vault_state(place)
    good = vault_call(words, ground)
    for as_json in (False, True) if path != "consent watch" else (False,):
        argv = argv_of(words, command, {name: value for name, value in good.items() if name != "passphrase_file"})
        answer = inside(*(["--json"] if as_json else []), *argv)
        assert answer.status == 7, answer
        check_refusal(answer, as_json, path, (7,))
        assert ("hint" in answer.err) and (json.loads(answer.err)["error"]["hint"] if as_json else answer.err.count("\n") == 2)
    if path not in ("init", "consent watch"):
        answer = inside(*argv_of(words, command, {**good, "passphrase_file": [ground["ben"]]}))
        assert "passphrase" in check_refusal(answer, False, path, (5,))
    if "new_passphrase_file" in good:
        answer = inside(*argv_of(words, command, {name: value for name, value in good.items() if name != "new_passphrase_file"}))
        check_refusal(answer, False, path, (7,))
    check_vault_unchanged(before, vault_state(place), path)


def test_with_the_key_of_somebody_elsewhere(place: Place, vaulted: dict[str, str], inside: Caller) -> None:
    """An approver whose key is on another machine cannot act here: exit 7, and the log does not say that he did."""
    before, word = vault_state(place), ("--passphrase-file", vaulted["ben"])
    for words in (("approver", "export", "ben"), ("approver", "passwd", "ben", "--new-passphrase-file", vaulted["carl"], *word),
                  ("audit", "anchor", "--approver", "ben", *word),
                  ("consent", "approve", vaulted["pending"], "--approver", "ben", *word), ("audit", "verify", "--approver", "ben", *word),
                  ("secret", "rotate", "shop", "--value-file", vaulted["value"], "--owner", "ben", *word),
                  ("secret", "reshare", "shop", "--approver", "ben", *word),
                  ("approver", "add", "dan", "--role", "user", "--approver", "ben", *word)):  # fmt: skip
        answer = inside(*words)
        assert "ben" in check_refusal(answer, False, str(words), (7,)), answer
        assert vault_state(place) == before, words


@pytest.mark.parametrize("path", [path for path in VAULT_GOOD if path not in ("init", "doctor", "approver import")])
def test_without_a_vault(path: str, place: Place, module: Any, vaulted: dict[str, str], inside: Caller) -> None:
    """Every vault command says that there is none, and how to make one; nothing is made, and nothing asked before."""
    for file in [*place.folder.glob("grace.db*")]:
        file.unlink()
    shutil.rmtree(place.folder / ".config")
    words = tuple(path.split())
    argv = argv_of(words, built(module, words), {**vault_call(words, vaulted), **({"cmd": ["true"]} if path == "exec" else {})})
    for as_json in (False, True):
        answer = inside(*(["--json"] if as_json else []), *argv)
        assert answer.status == (125 if path == "exec" else 7), answer
        check_refusal(answer, as_json, path, (7, 125))
        assert "no vault" in answer.err and "grace init" in answer.err
    assert not (place.folder / ".config").exists()
    with contextlib.closing(sqlite3.connect(place.db)) as con:
        assert [con.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0] for table in (*VAULT_TABLES, "audit_log")] == [0] * 8


@pytest.mark.parametrize("path", [path for path in VAULT_GOOD if path != "approver import"])
def test_vault_commands_on_a_file_that_is_no_database(path: str, place: Place, module: Any, vaulted: dict[str, str], inside: Caller) -> None:
    """Exit 8 in one line, and neither that file nor a key is touched."""
    notes = place.folder / "notes.txt"
    notes.write_text("this is no database, whatever its name\n" * 50)
    words = tuple(path.split())
    argv = argv_of(words, built(module, words), {**vault_call(words, vaulted), **({"cmd": ["true"]} if path == "exec" else {})})
    before = vault_state(place)
    for as_json in (False, True):
        answer = inside("--db", str(notes), *(["--json"] if as_json else []), *argv)
        assert answer.status == (125 if path == "exec" else 8), answer
        check_refusal(answer, as_json, path, (8, 125))
    assert notes.read_text().startswith("this is no database") and vault_state(place) == before


@pytest.mark.parametrize("folder", ["/dev/null/x", "/proc/nothing", "{place}/file", "{place}/" + "x" * 300, "{place}/link"])
def test_a_vault_whose_keys_have_no_place(folder: str, place: Place, inside: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the key files cannot be written, `init` says which file, and makes nothing; afterwards it works elsewhere."""
    (place.folder / "file").write_text("")
    (place.folder / "link").symlink_to("/dev/null/nowhere")
    (place.folder / "word").write_text("some words\n")
    (place.folder / "word").chmod(0o600)
    assert inside("config", "set", "vault.argon2_memory", "67108864").status == 0
    monkeypatch.setenv("XDG_CONFIG_HOME", folder.format(place=place.folder))
    for as_json in (False, True):
        answer = inside(*(["--json"] if as_json else []), "init", "--name", "anna", "--passphrase-file", "word")
        message = check_refusal(answer, as_json, folder, (1, 2, 5, 7))
        assert re.search(r"Not a directory|No such file|exists|too long|Permission|Invalid", message), message
    with contextlib.closing(sqlite3.connect(place.db)) as con:
        assert not con.execute("SELECT * FROM vault_rosters").fetchall() and not con.execute("SELECT * FROM settings WHERE name = '_vault_id'").fetchall()
        assert not con.execute("SELECT * FROM audit_log").fetchall()
    monkeypatch.delenv("XDG_CONFIG_HOME")
    assert inside("init", "--name", "anna", "--passphrase-file", "word").status == 0


def test_every_vault_command_is_walked() -> None:
    """The tables above know all of them."""
    assert sorted(VAULT_GOOD) == sorted(vault_command_names())


# ---- files that vault commands read


PASSPHRASES: dict[str, tuple[bytes | None, int, tuple[int, ...]]] = {  # content or None for what is no plain file, mode, statuses
    "empty": (b"", 0o600, (2,)), "only a line end": (b"\nanna\n", 0o600, (2,)), "binary": (bytes(range(256)), 0o600, (5,)), "NUL": (b"\0", 0o600, (5,)),
    "not UTF-8": (b"\xff\xfe\n", 0o600, (5,)), "a line without an end": (b"x" * 3_000_000, 0o600, (2,)), "too long": (b"x" * 4097 + b"\n", 0o600, (2,)),
    "Windows line end": (b"what is in anna\r\n", 0o600, (5,)), "open to all": (b"what is in anna\n", 0o644, (2,)),
    "open to the group": (b"what is in anna\n", 0o640, (2,)), "writable for all": (b"what is in anna\n", 0o602, (2,)),
}  # fmt: skip


@pytest.mark.parametrize("title", PASSPHRASES)
def test_odd_passphrase_files(title: str, place: Place, vaulted: dict[str, str], inside: Caller) -> None:
    """A file that holds no passphrase, another one, or that others may read: one line that never shows what is in it, and no change."""
    data, mode, statuses = PASSPHRASES[title]
    file = place.folder / "odd"
    file.write_bytes(data or b"")
    file.chmod(mode)
    before = vault_state(place)
    for words in (("consent", "approve", vaulted["pending"]), ("secret", "rotate", "shop", "--value-file", vaulted["value"]), ("audit", "anchor")):
        answer = inside(*words, *(("--owner",) if words[0] == "secret" else ("--approver",)), "anna", "--passphrase-file", str(file))
        message = check_refusal(answer, False, title, statuses)
        assert "what is in" not in answer.err and (answer.status == 5 or message.startswith("--passphrase-file: ")) and len(message) < 300
        check_vault_unchanged(before, vault_state(place), title)


@pytest.mark.parametrize("option, words", [
    ("--passphrase-file", ("consent", "approve", "{pending}", "--approver", "anna")), ("--passphrase-file", ("audit", "anchor", "--approver", "anna")),
    ("--new-passphrase-file", ("approver", "passwd", "anna", "--passphrase-file", "{anna}")),
    ("--value-file", ("secret", "set", "fresh", "--owner", "anna", "--passphrase-file", "{anna}")),
    ("--value-file", ("secret", "set", "fresh", "--risk", "low")), ("FILE", ("approver", "import")), ("FILE", ("consent", "import")),
    ("--in", ("consent", "approve", "--approver", "anna", "--passphrase-file", "{anna}")),
])  # fmt: skip
def test_files_of_the_vault_that_cannot_be_read(option: str, words: tuple[str, ...], place: Place, vaulted: dict[str, str], inside: Caller) -> None:
    """Missing, a directory, a device without an end, a socket's name, no name at all: the usage error names the field; it takes neither long nor much."""
    argv = [vaulted[word[1:-1]] if word.startswith("{") else word for word in words]
    locked = place.folder / "locked"
    locked.write_text("{}")
    locked.chmod(0)
    names = [str(place.folder / "missing"), str(place.folder), "/proc/self/mem", "x" * 300, "a\u202eb\x1b[31m", "", "/dev/null", "/dev/zero"]
    names += [str(locked)] if os.geteuid() else []
    before, began = vault_state(place), time.monotonic()
    for name in names:
        answer = inside(*argv, *([option] if option.startswith("--") else []), name)
        message = check_refusal(answer, False, name, (2, 5) if name == "/dev/null" else (2,))  # an empty text is no exported request
        assert message.startswith((f"{option}: ", "a value has", "refused: ")) and len(message) < 500, message
        assert name.startswith("/dev/") or re.search(r"No such file|s a directory|Input/output|too long|Permission", message), message
        check_vault_unchanged(before, vault_state(place), name)
    assert time.monotonic() - began < LIMIT / 2


VALUES: dict[str, tuple[bytes, tuple[str, ...], bytes | None]] = {  # content, options, what is stored (None: refused)
    "nothing": (b"", (), None), "a line end": (b"\n", (), None), "a kept line end": (b"\n", ("--raw",), b"\n"), "one byte": (b"x", (), b"x"),
    "binary": (bytes(range(256)), (), bytes(range(256))), "NUL": (b"\0", (), b"\0"), "two line ends": (b"a\n\n", (), b"a\n"),
    "Windows": (b"a\r\n", (), b"a\r"), "full": (b"x" * 65536, (), b"x" * 65536), "full and a line end": (b"x" * 65536 + b"\n", (), b"x" * 65536),
    "full and a kept line end": (b"x" * 65536 + b"\n", ("--raw",), None), "too much": (b"x" * 65537, (), None), "far too much": (b"x" * 3_000_000, (), None),
    "two line ends too many": (b"x" * 65536 + b"\n\n", (), None),
}  # fmt: skip


@pytest.mark.parametrize("title", VALUES)
def test_odd_values(title: str, place: Place, vaulted: dict[str, str], inside: Caller) -> None:
    """1 byte to 64 KiB of anything come back byte for byte, one line end dropped unless --raw; anything else is refused and nothing kept."""
    data, options, stored = VALUES[title]
    file = place.folder / "odd"
    file.write_bytes(data)
    before = vault_state(place)
    answer = inside("secret", "set", "fresh", "--risk", "low", "--value-file", str(file), *options)
    if stored is None:
        message = check_refusal(answer, False, title, (2,))
        assert "64 KiB" in message
        check_vault_unchanged(before, vault_state(place), title)
        return
    assert answer.status == 0, answer
    read = place.call("secret", "get", "fresh", "--action", "use", "--for", "a test")
    assert (read.status, read.raw_out, read.err) == (0, stored, "")
    shown = place.json("secret", "get", "fresh", "--action", "use", "--for", "a test", "--reveal")
    assert shown.get("value") == stored.decode() if stored.isascii() else shown["value"] is None and "value_base64" in shown


TEXTS: dict[str, bytes] = {
    "empty": b"", "blank": b" \n", "binary": bytes(range(256)) * 16, "not UTF-8": b'{"format":"\xff"}', "UTF-16": "{}".encode("utf-16"), "a list": b"[]",
    "null": b"null", "a number": b"1", "nothing in it": b"{}", "deep lists": b"[" * 100_000, "deep objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "another format": b'{"format":"grace-other/9"}', "huge": b'{"a":"' + b"x" * 3_000_000 + b'"}', "NaN": b'{"format":NaN}', "twice": b'{"a":1,"a":2}',
    "two documents": b"{}{}", "a surrogate": b'{"format":"\\ud800"}', "NUL": b'{"format":"\\u0000"}', "control": b'{"format":"\\u001b[2J"}',
    "half a bundle": b'{"format":"grace-approver/1","key":{}}', "an empty bundle": b'{"format":"grace-approver/1","key":{},"seen":{}}',
    "half a case": b'{"format":"grace-case/1","consent_id":"x"}', "half an approval": b'{"format":"grace-approval/1","grants":[{}]}',
    "no grants": b'{"format":"grace-approval/1","consent_id":"x","approver":"anna","grants":[]}',
}  # fmt: skip
READERS = (("approver", "import"), ("consent", "import"), ("consent", "approve", "--approver", "anna", "--passphrase-file", "{anna}", "--in"))


@pytest.mark.parametrize("title", TEXTS)
def test_texts_that_are_no_export(title: str, place: Place, vaulted: dict[str, str], inside: Caller) -> None:
    """Any file in the place of an exported approver, request or approval: one short line, at once, and nothing of it is kept."""
    file = place.folder / "odd"
    file.write_bytes(TEXTS[title])
    before, began = vault_state(place), time.monotonic()
    for words in READERS:
        for as_json in (False, True):
            answer = inside(*(["--json"] if as_json else []), *(word.format(**vaulted) for word in words), str(file))
            message = check_refusal(answer, as_json, f"{words}: {title}", (2, 5))
            assert len(message) < 300, message
    assert time.monotonic() - began < LIMIT / 2
    check_vault_unchanged(before, vault_state(place), title)


ODD_PARTS: tuple[Any, ...] = (None, True, 0, -1, 10**30, 1.5, "", "x", "\x1b[2J\u202e", "A" * 5000, [], {}, [None], {"x": None})


def altered(document: Any) -> Iterator[tuple[str, Any]]:
    """The document with each of its parts replaced by something else, left out, or joined by a stranger; signed texts within it, too."""
    if isinstance(document, dict):
        yield "+", {**document, "stranger": 1}
        for key, value in document.items():
            yield f"-{key}", {name: part for name, part in document.items() if name != key}
            for other in ODD_PARTS:
                if other != value:
                    yield f"{key}={other!r:.20}", {**document, key: other}
            for where, part in altered(value):
                yield f"{key}.{where}", {**document, key: part}
    elif isinstance(document, list) and document:
        for where, part in altered(document[0]):
            yield f"0.{where}", [part, *document[1:]]
        yield "twice", [*document, document[0]]
    elif isinstance(document, str) and document.startswith("{"):
        inner = json.loads(document)
        for number, (where, part) in enumerate(altered(inner)):
            if number % 7 == 0:  # these are signed, so that a few tell as much as all
                yield f"({where})", json.dumps(part, separators=(",", ":"), sort_keys=True)


@pytest.mark.parametrize("words, name", [(words, name) for words, name in zip(READERS, ("bundle", "approval", "case"), strict=True)], ids=["bundle", "approval",
                                                                                                                                       "case"])  # fmt: skip
def test_exports_with_a_part_changed(words: tuple[str, ...], name: str, place: Place, safe: Place, vaulted: dict[str, str], inside: Caller) -> None:
    """Whatever stands in the place of a part of an exported text, it is refused in one line, or is no part that matters; never a traceback."""
    good = json.loads(Path(vaulted[name]).read_text())
    file = place.folder / "odd"
    before = vault_state(place)
    for where, document in altered(good):
        file.write_text(json.dumps(document))
        answer = inside(*(word.format(**vaulted) for word in words), str(file))
        shown, error = parted(answer.err, False)
        check_shown(shown, False, where)
        assert shown.isascii()
        if answer.status == 0:
            if name == "bundle":  # what is in it shows when it is unlocked
                answer = inside("audit", "anchor", "--approver", "ben", "--passphrase-file", vaulted["ben"])
                assert answer.status == 0 or check_refusal(answer, False, f"unlocking {where}", REFUSED)
            elif name == "approval":  # who signed is in the signature, whatever the text around it says
                shown = inside("consent", "show", vaulted["pending"], "--json").out
                assert {one.get("approver", "anna") for one in json.loads(shown)["observed"]["verified"]} == {"anna"}, where
            put_vault(safe, place)
            before = vault_state(place)
            continue
        check_refusal(Answer(answer.status, answer.out, error), False, f"{name}: {where}", REFUSED)
        check_vault_unchanged(before, after := vault_state(place), f"{name}: {where}")
        before = after


def rests(pid: int) -> bool:
    """Whether a process sleeps, and has done nothing for a moment. (What it waits for, a hardened process tells nobody.)"""
    before = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    time.sleep(0.3)
    after = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return before[0] == after[0] == "S" and before[11:13] == after[11:13] and int(after[11]) + int(after[12]) > 0


@pytest.mark.parametrize("option", ["--passphrase-file", "--value-file"])
def test_a_pipe_that_nobody_writes_to(option: str, place: Place, vaulted: dict[str, str]) -> None:
    """Reading from it waits, as with any program, and Ctrl-C ends that."""
    pipe = place.folder / "pipe"
    os.mkfifo(pipe, 0o600)
    words = ("secret", "set", "fresh", "--owner", "anna", "--value-file", vaulted["value"], "--passphrase-file", vaulted["anna"])
    process = place.start(*(str(pipe) if before == option else word for before, word in zip(("", *words), words, strict=False)))
    until(lambda: rests(process.pid), "the command to wait")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 130 and b"Traceback" not in err
    assert place.call("secret", "show", "fresh").status == 3


@pytest.mark.parametrize("title", HOSTILE)
def test_hostile_text_in_the_vault_is_shown_escaped(title: str, place: Place, vaulted: dict[str, str], inside: Caller) -> None:
    """Who asks, for what, whose service it is and why not, in any characters: listings escape them, prompts are ASCII, JSON has them as they were."""
    text, anna = HOSTILE[title], ("--passphrase-file", vaulted["anna"])
    stored = inside("secret", "set", "odd", "--owner", "anna", "--value-file", vaulted["value"], *anna, f"--service={os.fsdecode(text)}",
                    f"--username={os.fsdecode(text)}", "--json")  # fmt: skip
    if stored.status == 2:
        assert title in ("empty", "five thousand", "not UTF-8", "half a character"), stored
        return
    shown = inside("secret", "show", "odd", "--json")
    assert json.loads(shown.out)["service"] == text == json.loads(shown.out)["username"]
    ids = []
    for _ in range(2):
        asked = inside("consent", "request", "odd", "--action", "use", f"--for={os.fsdecode(text)}", f"--by={os.fsdecode(text)}", "--json")
        assert asked.status == 0, asked
        ids.append(json.loads(asked.out)["consent_id"])
        assert json.loads(inside("consent", "show", ids[-1], "--json").out)["requested_for"] == text
    assert inside("consent", "deny", ids[0], f"--reason={os.fsdecode(text)}").status == 0
    for words in ("consent pending", "consent history", "consent stats", f"consent show {ids[0]}", "secret list", "secret show odd", "secret history odd",
                  "audit list", "doctor", "events", "status", "approver list"):  # fmt: skip
        listed = inside(*words.split())
        assert listed.status in (0, 1) and not HIDDEN.search(listed.out) and listed.err == "", (words, listed)
    answer = inside("consent", "approve", ids[1], "--approver", "anna", f"--note={os.fsdecode(text)}", *anna)
    assert answer.status == 0 and answer.err.isascii() and not HIDDEN.search(answer.err), answer
    for words in ("consent history", f"consent show {ids[1]}", "audit list"):
        assert not HIDDEN.search(inside(*words.split()).out), words


@pytest.mark.parametrize("argv", [["nonsense"], [""], ["--nonsense"], ["handler"], ["handler", "nonsense"], ["handler", ""], ["events", "nonsense"],
                                  ["events", ""],
                                  ["--", "--"], ["--db"], ["task", "--", "list", "x"], ["submit-intnet", "x"], ["\x1b[31m"], [b"\xff"], ["-x"],
                                  ["x" * 5000]])  # fmt: skip
def test_commands_that_are_not_there(argv: list[str | bytes], place: Place, inside: Caller) -> None:
    """An unknown command or option is a usage error in one line, plain and as JSON."""
    assert inside("status").status == 0
    before = rows(place)
    answer = inside(*argv)
    assert answer.status == 2, answer
    check_unchanged(place, before, answer, str(argv))
    answer = inside("--json", *argv)
    assert answer.status == 2 and json.loads(answer.err)["error"]["code"] == "usage"


def test_a_mistyped_command_gets_a_suggestion(inside: Caller) -> None:
    """The nearest command is in the hint."""
    assert "submit-intent" in inside("submit-intnet", "x").err.splitlines()[1]
    assert "list" in inside("task", "lits").err.splitlines()[1]


DURATIONS = ["5", "0", "0s", "-5m", "-1", "", " ", "5 m", "1 year", "1w", "3651d", "99999999999999999999d", "1e3s", "NaN", "inf", "0x10s", "٥m", "5M",
             "1h30", "m", ".5s",
             "0.0001ms", "5m\n", "5m\0"[:2] + "\u200b"]  # fmt: skip


def duration_options(module: Any) -> Iterator[tuple[tuple[str, ...], click.Option]]:
    for words in commands(module):
        for param in built(module, words).params:
            if isinstance(param, click.Option) and getattr(param.type, "name", "") == "duration":
                yield words, param


def test_durations_want_a_unit(place: Place, module: Any, inside: Caller, ground: dict[str, str]) -> None:
    """Every duration: a bare number, zero, a negative, more than ten years or no number is refused with a right example."""
    found = list(duration_options(module))
    assert {"submit-intent", "handler", "intent", "task", "daemon", "secret", "consent", "exec"} <= {words[0] for words, _ in found}
    before = rows(place)
    for words, option in found:
        command = built(module, words)
        for text in DURATIONS:
            values: dict[str, list[Any]] = {**good_call(words, command, ground), option.name or "": [text]}
            if option.name == "watch" and text.startswith("-"):
                continue  # it can stand without a value, so that this would be an option of its own
            answer = inside(*argv_of(words, command, values))
            message = check_unchanged(place, before, answer, f"{words} {option.opts[-1]} {text!r}")
            assert answer.status == 2 and option.opts[0] in message
            assert re.search(r"\b(30s|5m|2h|1h30m)\b", message), f"no example in {message!r}"


@pytest.mark.parametrize("text, ms", [("500ms", 500), ("30s", 30_000), ("5m", 300_000), ("2h", 7_200_000), ("1d", 86_400_000), ("1h30m", 5_400_000),
                                      ("1.5s", 1500),
                                      ("3650d", 315_360_000_000)])  # fmt: skip
def test_good_durations(text: str, ms: int, place: Place, inside: Caller, ground: dict[str, str]) -> None:
    """What a person may write, and what it comes to."""
    done = json.loads(inside("submit-intent", "a goal", "--handler", "work", "--sla", text, "--json").out)
    assert json.loads(inside("task", "show", done["task_id"], "--json").out)["sla_ms"] == ms


@pytest.mark.parametrize("text", ["2026-11-22", "2026-11-22T07:08:19", "yesterday", "1763795299", "2026-13-40T07:08:19Z", "2026-11-22T25:00:00Z",
                                  "2026-11-22T07:08:19+99:99",
                                  "", "٢٠٢٦-11-22T07:08:19Z", "2026-11-22T07:08:19Z\n", "0000-00-00T00:00:00Z", "99999-01-01T00:00:00Z"])  # fmt: skip
def test_bad_instants(text: str, place: Place, inside: Caller, ground: dict[str, str]) -> None:
    """An instant without its offset or outside the calendar is refused, and nothing is submitted."""
    before = rows(place)
    answer = inside("submit-intent", "a goal", "--handler", "work", "--at", text)
    assert answer.status == 2
    assert "--at" in check_unchanged(place, before, answer, text)


@pytest.mark.parametrize("text", ["2020-01-01T00:00:00Z", "0001-01-01T00:00:00+23:59", "2026-11-22t07:08:19.123456789z", "9999-12-31T23:59:59-23:59",
                                  "1970-01-01T00:00:00Z"])
def test_instants_at_the_edge(text: str, place: Place, inside: Caller, ground: dict[str, str]) -> None:
    """The past means now, the far future is shown within the calendar, and every list goes on working."""
    answer = inside("submit-intent", "a goal", "--handler", "work", "--sla", "3650d", "--at", text, "--json")
    assert answer.status == 0, answer
    task = json.loads(inside("task", "show", json.loads(answer.out)["task_id"], "--json").out)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", task["queued_at"]) and task["elapsed_ms"] >= 0
    if text.startswith(("0001", "1970", "2020")):
        assert task["queued_at"] >= task["created_at"]
    for words in (["status"], ["task", "list"], ["task", "explain", task["task_id"]], ["violations"], ["events"]):
        assert inside(*words).status == 0


@pytest.mark.parametrize("title", HOSTILE)
def test_a_goal_survives_as_it_is(title: str, place: Place, inside: Caller, ground: dict[str, str]) -> None:
    """A goal that is accepted comes back unchanged in JSON and harmless in every listing."""
    goal = HOSTILE[title]
    answer = inside("submit-intent", "--handler", "work", "--json", "--", goal)
    if answer.status == 2:
        assert title in ("empty", "five thousand", "not UTF-8", "half a character"), answer
        return
    done = json.loads(answer.out)
    assert json.loads(inside("intent", "show", done["intent_id"], "--json").out)["goal"] == goal
    for words in (["intent", "list"], ["task", "list"], ["intent", "show", done["intent_id"]], ["task", "show", done["task_id"]], ["task", "explain",
                                                                                                                                   done["task_id"]],
                  ["events"], ["intent", "cancel", done["intent_id"]], ["status"]):  # fmt: skip
        shown = inside(*words)
        assert shown.status == 0 and not HIDDEN.search(shown.out), words
    if title in ("ANSI", "bidi", "invisible", "line separator"):
        assert "\\u{" in inside("task", "list").out


CONTEXTS = {
    "ten megabytes": (b'{"a":"' + b"x" * 10_000_000 + b'"}', "1 MiB"),
    "just over one": (b'{"a":"' + b"x" * (1 << 20) + b'"}', "1 MiB"),
    "deep lists": (b'{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}", "64 levels"),
    "deep objects": (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "64 levels"),
    "hardly too deep": (b'{"a":' + b"[" * 64 + b"]" * 64 + b"}", "64 levels"),
    "NaN": (b'{"a":NaN}', "NaN"),
    "Infinity": (b'{"a":[-Infinity]}', "Infinity"),
    "out of range": (b'{"a":1e999}', "1e999"),
    "long number": (b'{"a":' + b"9" * 5000 + b"}", "digits"),
    "duplicate keys": (b'{"a":1,"b":{"c":1,"c":2}}', "twice"),
    "lone surrogate": (b'{"a":"\\ud800"}', "surrogate"),
    "surrogate in a key": (b'{"\\udfff":1}', "surrogate"),
    "NUL": (b'{"a":"x\\u0000y"}', "NUL"),
    "NUL in a key": (b'{"\\u0000":1}', "NUL"),
    "a raw NUL": (b'{"a":"\0"}', ""),
    "not UTF-8": (b'{"a":"\xff"}', "UTF-8"),
    "UTF-16": '{"a":1}'.encode("utf-16"),
    "a byte order mark": (b'\xef\xbb\xbf{"a":1}', ""),
    "a list": (b"[1,2]", "object"),
    "a text": (b'"x"', "object"),
    "null": (b"null", "object"),
    "nothing": (b"", ""),
    "blank": (b" \n", ""),
    "two documents": (b"{}{}", ""),
    "a comma too many": (b'{"a":1,}', ""),
    "a comment": (b"{} // x", ""),
    "binary": (bytes(range(256)) * 16, ""),
}


@pytest.mark.parametrize("way", ["file", "stdin"])
@pytest.mark.parametrize("title", CONTEXTS)
def test_bad_contexts(title: str, way: str, place: Place, inside: Caller, ground: dict[str, str]) -> None:
    """A context that is no plain, small, unambiguous object is refused, and the message says what is wrong."""
    given = CONTEXTS[title]
    data, said = given if isinstance(given, tuple) else (given, "UTF-8")
    file = place.folder / "context.json"
    file.write_bytes(data)
    before = rows(place)
    began = time.monotonic()
    if way == "file":
        answer = inside("submit-intent", "a goal", "--handler", "work", "--context", f"@{file}")
    elif len(data) > 100_000 or title in ("NUL", "lone surrogate", "not UTF-8", "deep lists", "nothing"):
        done = place.call("submit-intent", "a goal", "--handler", "work", "--context", "-", stdin=data)
        answer = Answer(done.status, done.out, done.err)
    else:
        answer = inside_with_stdin(inside, file, "submit-intent", "a goal", "--handler", "work", "--context", "-")
    assert time.monotonic() - began < LIMIT / 2
    assert answer.status == 2, answer
    message = check_unchanged(place, before, answer, title)
    assert message.startswith("--context: ") and said in message and len(message) < 400


def inside_with_stdin(inside: Caller, file: Path, *words: str) -> Answer:
    """The call with that file as standard input."""
    kept = os.dup(0)
    with open(file, "rb") as source:
        os.dup2(source.fileno(), 0)
    try:
        return inside(*words)
    finally:
        os.dup2(kept, 0)
        os.close(kept)


GOOD_CONTEXTS = [b"{}", b' {"a": [1, 2.5, true, null, "\\u00e9"]}\n', '{"ключ":"значение 🏃"}'.encode(), b'{"a":"\\\\u0000"}', b'{"pair":"\\ud83d\\ude00"}',
                 b'{"a":' + b"[" * 63 + b"]" * 63 + b"}", b'{"a":"' + b"x" * 1_000_000 + b'"}', b'{"a":123456789012345678901234567890,"b":-0.0,"c":1e308}',
                 b'{"bidi":"\\u202e\\u200b"}']  # fmt: skip


@pytest.mark.parametrize("number", range(len(GOOD_CONTEXTS)))
def test_good_contexts(number: int, place: Place, inside: Caller, ground: dict[str, str]) -> None:
    """What is allowed arrives whole at the intent and in the task's payload."""
    file = place.folder / "context.json"
    file.write_bytes(GOOD_CONTEXTS[number])
    done = json.loads(inside("submit-intent", "a goal", "--handler", "work", "--context", f"@{file}", "--json").out)
    expected = json.loads(GOOD_CONTEXTS[number])
    assert json.loads(inside("intent", "show", done["intent_id"], "--json").out)["context"] == expected
    assert json.loads(inside("task", "show", done["task_id"], "--json").out)["payload"]["context"] == expected
    assert not HIDDEN.search(inside("intent", "show", done["intent_id"]).out)


JSON_OPTIONS = [("submit-intent", "a goal", "--handler", "work", "--context"), ("events", "publish", "my.topic"),
                ("task", "complete", "task_", "--worker", "w", "--result"), ("submit-intent", "--batch")]  # fmt: skip


@pytest.mark.parametrize("words", JSON_OPTIONS, ids=" ".join)
def test_files_that_cannot_be_read(words: tuple[str, ...], place: Place, inside: Caller, ground: dict[str, str]) -> None:
    """A missing file, a directory, one that may not be read, or no name at all: the usage error names the field and what is wrong."""
    locked = place.folder / "locked.json"
    locked.write_text("{}")
    locked.chmod(0)
    names = [str(place.folder / "missing.json"), str(place.folder), "/proc/self/mem", "x" * 300, "a\u202eb\x1b[31m"]
    names += [str(locked)] if os.geteuid() else []
    before = rows(place)
    for name in names:
        answer = inside(*words, name if words[-1] == "--batch" else f"@{name}")
        message = check_unchanged(place, before, answer, name)
        field = words[-1] if words[-1].startswith("--") else "PAYLOAD"
        assert answer.status == 2 and message.startswith(f"{field}: cannot read "), message
        assert "stdin" not in message, message
        assert re.search(r"No such file|Is a directory|Input/output|too long|Permission", message), message


def test_a_file_without_a_name(place: Place, inside: Caller, ground: dict[str, str]) -> None:
    """`@` alone is not standard input, and is not called so."""
    before = rows(place)
    for words in JSON_OPTIONS[:3]:
        answer = inside(*words, "@")
        assert answer.status == 2 and "stdin" not in check_unchanged(place, before, answer, str(words))


def test_closed_stdin(place: Place, inside: Caller, ground: dict[str, str]) -> None:
    """`-` with a closed standard input submits nothing: it is an error, or an empty batch."""
    before = rows(place)
    for words, status in (("submit-intent a --handler work --context -", 2), ("submit-intent --batch -", 0), ("events publish my.topic -", 2)):
        done = shell(place, f"grace {words} <&-")
        assert done.status in (status, 2) and done.out == "" and "Traceback" not in done.err
    assert rows(place) == before


def shell(place: Place, line: str, limit: int | None = None) -> Answer:
    """A line for sh, with the command on its path, and perhaps at most so many bytes of memory."""
    def confine() -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    environment = {**place.environment, "PATH": f"{Path(GRACE).parent}:{place.environment['PATH']}"}
    done = subprocess.run(["sh", "-c", line], env=environment, cwd=place.folder, capture_output=True, timeout=LIMIT, check=False,
                          stdin=subprocess.DEVNULL, preexec_fn=confine)  # fmt: skip
    return Answer(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))


def test_endless_input_is_refused(place: Place, inside: Caller, ground: dict[str, str]) -> None:
    """Input without an end costs neither all memory nor a traceback."""
    before = rows(place)
    for words in ("--context @/dev/zero", "--context - </dev/zero"):
        done = shell(place, f"grace submit-intent a --handler work {words}", limit=1 << 30)
        assert done.status == 2 and done.out == "" and "1 MiB" in done.err, done
    done = shell(place, "head -c 2000000000 /dev/zero | grace submit-intent --batch -", limit=1 << 30)
    assert done.status == 2 and done.out == "" and "line 1" in done.err and "Traceback" not in done.err, done
    assert rows(place) == before


BAD_LINES: list[tuple[bytes, str]] = [
    (b"not json", ""), (b"[]", "object"), (b"null", "object"), (b"{}", "goal"), (b'{"goal":""}', "goal"), (b'{"goal":5}', "goal"), (b'{"goal":null}', "goal"),
    (b'{"goal":"' + b"x" * 2001 + b'"}', "goal"), (b'{"goal":"a","goal":"b"}', "twice"), (b'{"goal":"a","color":"red"}', "color"),
    (b'{"goal":"a","sla":5}', "sla"), (b'{"goal":"a","sla":"5"}', "sla"), (b'{"goal":"a","sla_ms":5}', "sla_ms"), (b'{"goal":"a","context":"x"}', "context"),
    (b'{"goal":"a","context":[]}', "context"), (b'{"goal":"a","priority":"urgent"}', "priority"), (b'{"goal":"a","confidence":2}', "confidence"),
    (b'{"goal":"a","confidence":true}', "confidence"), (b'{"goal":"a","confidence":"1"}', "confidence"), (b'{"goal":"a","max_attempts":0}', "max_attempts"),
    (b'{"goal":"a","max_attempts":1.5}', "max_attempts"), (b'{"goal":"a","max_attempts":10000000000000000000000}', "max_attempts"),
    (b'{"goal":"a","after":"int_1"}', "after"), (b'{"goal":"a","after":[5]}', "after"), (b'{"goal":"a","after":[""]}', ""),
    (b'{"goal":"a","after":["int_none"]}', "int_none"),
    (b'{"goal":"a","in":"1h","at":"2030-01-01T00:00:00Z"}', "exclude"), (b'{"goal":"a","at":"tomorrow"}', "at"), (b'{"goal":"a","in":"0s"}', "in"),
    (b'{"goal":"a","intent_id":"a b"}', "intent_id"), (b'{"goal":"a","key":""}', "key"), (b'{"goal":"a","handler":"../x"}', "handler"),
    (b'{"goal":"a","handler":"nobody"}', "nobody"), (b'{"goal":"a","domain":""}', "domain"), (b'{"goal":"a","risk_level":"none"}', "risk_level"),
    (b'{"goal":"a","timeout":"-1s"}', "timeout"), (b'{"goal":"a","created_by":["me"]}', "created_by"), (b'{"goal":"a","intent_id":"taken"}', "taken"),
    (b'{"goal":"a\\u0000"}', ""), (b'{"goal":"\\ud800"}', ""), (b'{"goal":"\xff"}', "UTF-8"), (b'{"goal":"a","confidence":NaN}', "NaN"),
    (b'{"goal":"a","context":{"b":' + b"[" * 10_000 + b"]" * 10_000 + b"}}", "levels"), (b"\x00\x01\x02\xff" * 50, ""),
    (b'{"goal":"a","context":{"b":"' + b"x" * 1_200_000 + b'"}}', "1 MiB"), (b'{"\\u202egoal":"a"}', ""), (b'\xef\xbb\xbf{"goal":"a"}', ""),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(BAD_LINES)))
def test_bad_batch_lines(number: int, place: Place, inside: Caller, ground: dict[str, str]) -> None:
    """One bad line among good ones: named by its number, and none of them is submitted."""
    line, said = BAD_LINES[number]
    file = place.folder / "batch.ndjson"
    file.write_bytes(b'{"goal":"good","handler":"work","intent_id":"taken"}\n\n' + line + b'\n{"goal":"good","handler":"work"}\n')
    if b'"handler"' not in line and b'"goal":"a' in line:
        file.write_bytes(file.read_bytes().replace(b'"goal":"a', b'"handler":"work","goal":"a', 1))
    before = rows(place)
    answer = inside("submit-intent", "--batch", str(file))
    message = check_unchanged(place, before, answer, ascii(line[:60]))
    assert "line 3" in message and said in message and len(message) < 500, message
    answer = inside("submit-intent", "--batch", str(file), "--json")
    assert answer.out == "" and "line 3" in json.loads(answer.err)["error"]["message"]


@pytest.mark.parametrize("data", [b"", b"\n", b"  \n\t\n"])
def test_an_empty_batch_submits_nothing(data: bytes, place: Place, inside: Caller, ground: dict[str, str]) -> None:
    """A file without a line is a batch of none."""
    file = place.folder / "batch.ndjson"
    file.write_bytes(data)
    before = rows(place)
    answer = inside("submit-intent", "--batch", str(file), "--json")
    assert answer.status == 0 and answer.out == "" and rows(place) == before


def test_a_batch_without_a_last_line_end(place: Place, inside: Caller, ground: dict[str, str]) -> None:
    """Windows line ends and a missing last one are no matter."""
    file = place.folder / "batch.ndjson"
    file.write_bytes(b'{"goal":"one","handler":"work"}\r\n{"goal":"two","handler":"work"}')
    answer = inside("submit-intent", "--batch", str(file), "--json")
    assert answer.status == 0 and [json.loads(line)["duplicate"] for line in answer.out.splitlines()] == [False, False]


PROCESSES: list[list[str | bytes]] = [
    ["run", "--sla", "x", "--", "true"], ["run", "--context", "[]", "--", "true"], ["run", "--priority", "urgent", "--", "true"],
    ["run", "--max-attempts", "0", "--", "true"],
    ["run"], ["run", "--"], ["run", "--nonsense", "--", "true"], ["run", "--goal", "", "--", "true"], ["run", "--key", "", "--", "true"],
    ["daemon", "--workers", "0"], ["daemon", "--workers", "٣"], ["daemon", "--workers", "99999999999999999999"], ["daemon", "--grace-period", "5"],
    ["daemon", "--handler", "a b", "--once"], ["daemon", "--handler", "nobody", "--once"], ["daemon", "--once", "--drain"], ["daemon", "x"],
    ["demo", "x"], ["run", "--intent-id", b"\xff", "--", "true"], ["daemon", "--handler", b"\xff"],
    ["run", "--secret", "x", "--", "true"], ["run", "--secret", "A=b:c d", "--", "true"], ["run", "--secret", "GRACE_DB=b", "--", "true"],
    ["run", "--secret", "=b", "--", "true"], ["run", "--secret", b"A=\xff", "--", "true"], ["exec", "--secret", "A=b"], ["exec", "--", "true"],
    ["exec", "--secret", "A=b", "--via", "mail", "--", "true"], ["exec", "--secret", "A=b", "--secret", "B=b", "--via", "stdin", "--", "true"],
    ["exec", "--secret", "1A=b", "--", "true"], ["exec", "--secret", "A=../b", "--", "true"], ["exec", "--secret", "A=b", "--for", "", "--", "true"],
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(PROCESSES)))
def test_bad_calls_of_the_long_running_commands(number: int, place: Place, inside: Caller, ground: dict[str, str]) -> None:
    """`run`, `daemon` and `demo` refuse as the others do, before anything has started."""
    before = rows(place)
    done = place.call("--json", *PROCESSES[number])
    assert done.status in (2, 3) and done.out == ""
    assert done.error["code"] in ("usage", "not_found") and done.error["message"]
    assert rows(place) == before


@pytest.mark.parametrize("word", [b"\xff\xfe", b"\x1b[31m\x07", "\u202e".encode(), b"caf\xc3", b"a\nb"])
def test_bytes_as_the_command_of_run(word: bytes, place: Place) -> None:
    """Any bytes may be an argument of the command; its goal shows them escaped, and they reach the command as they are."""
    done = place.call("run", "--", "printf", "%s", word)
    assert done.status == 0 and done.raw_out == word and done.err == ""
    listed = place.ok("task", "list")
    assert listed.raw_out.decode() and not HIDDEN.search(listed.out)


def test_bytes_in_a_real_argv(place: Place) -> None:
    """Bytes that are no text are refused in a real process as well, whatever the locale."""
    place.handler("work", "--", "true")
    for locale in ("C", "POSIX", "C.UTF-8"):
        done = place.call("submit-intent", b"\xff\xfe", "--handler", "work", env={"LC_ALL": locale})
        assert done.status == 2 and done.err.startswith("grace: GOAL: ") and "Traceback" not in done.err
        done = place.call("submit-intent", "naïve 🏃", "--handler", "work", "--json", env={"LC_ALL": locale, "PYTHONIOENCODING": "ascii"})
        assert done.status == 0
        assert place.intent(done.json["intent_id"])["goal"] == "naïve 🏃"
        assert place.call("task", "list", env={"LC_ALL": locale, "PYTHONIOENCODING": "ascii"}).status == 0


def test_handler_commands_with_any_bytes(place: Place, inside: Caller) -> None:
    """A command's words are text; spaces, quotes and escapes arrive, what is no text is refused."""
    answer = inside("handler", "add", "bad", "--", "printf", b"\xff")
    assert answer.status == 2 and "CMD" in answer.err
    assert inside("handler", "add", "odd", "--", "printf", "%s", "a b'\"\\n$HOME\u202e\x1b[31m", "").status == 0
    assert json.loads(inside("handler", "show", "odd", "--json").out)["argv"][2] == "a b'\"\\n$HOME\u202e\x1b[31m"
    for words in (["handler", "list"], ["handler", "show", "odd"]):
        assert not HIDDEN.search(inside(*words).out)


def test_an_ambiguous_id_lists_the_candidates(place: Place, inside: Caller, ground: dict[str, str]) -> None:
    """A prefix of several ids is a usage error with the candidates; one of a single id, or a whole id that is also a prefix, is enough."""
    for own in ("backup", "backup-1", "backup-2"):
        assert inside("submit-intent", "a", "--handler", "work", "--intent-id", own).status == 0
    answer = inside("intent", "show", "backup-")
    assert answer.status == 2 and "backup-1" in answer.err and "backup-2" in answer.err and answer.out == ""
    assert json.loads(inside("intent", "show", "backup", "--json").out)["intent_id"] == "backup"
    assert json.loads(inside("intent", "cancel", "backup-2", "--json").out)["status"] == "cancelled"
    task = json.loads(inside("intent", "show", "backup-1", "--json").out)["htm_task_id"]
    assert json.loads(inside("task", "show", task[:-1] if task[-1] == "0" else task, "--json").out)["task_id"] == task
    assert inside("intent", "show", "backup-3").status == 3


@pytest.mark.parametrize("path, said", [("", ""), ("x" * 5000, "too long"), ("/dev/null/x", ""), ("/proc/nothing/here.db", ""),
                                        ("y" * 200 + "/" + "y" * 200 + "/" + "y" * 200, "long"), (".", "directory"), (b"\xff.db", "UTF-8")])
def test_bad_database_names(path: str | bytes, said: str, place: Place) -> None:
    """A database that cannot be: one line that says why, exit 8 or 2, and nothing is made."""
    before = sorted(place.folder.iterdir())
    done = place.call("--db", path, "status")
    assert done.status in (2, 8) and done.out == "" and said in done.err, (done.status, done.err)
    message_of(done.err, False)
    assert sorted(place.folder.iterdir()) == before


def test_a_database_with_an_odd_name_works(place: Place) -> None:
    """Spaces, question marks, percent signs, other scripts and a folder that is not there yet are nothing special."""
    for name in ("a b.db", "x?mode=ro.db", "50%.db", "file:x.db", "база 🏃.db", ":memory:", "d" * 100 + "/deep.db"):
        assert place.call("--db", name, "handler", "add", "work", "--", "true").status == 0, name
        assert (place.folder / name).is_file()
        assert place.call("--db", name, "run", "--", "true").status == 0
        assert len(place.call("--db", name, "task", "list", "--json").json) == 1
