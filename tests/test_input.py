"""Bad input, whatever it is: refused in one clear line that names the field and changes nothing, or accepted and shown escaped.

Most calls go through the module's own `call`, the very code of the command, because there are thousands of them; what needs a
standard input, bytes in argv or limits of its own is a real process.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest

from tests.conftest import GRACE, LIMIT, Place, load_module

TABLES = ("intent_records", "htm_tasks", "htm_task_attempts", "handlers", "settings", "events", "event_cursors", "task_dependencies", "outcome_records")
HIDDEN = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
NOT_HERE = {"daemon", "demo", "run"}  # they change signal handlers or descriptors, so they are called as processes


class Answer(NamedTuple):
    status: int
    out: str
    err: str


Caller = Callable[..., Answer]


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

    def run(*words: str | bytes) -> Answer:
        capsys.readouterr()
        try:
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
            yield tuple(word for word in (group, name) if word)


def built(module: Any, words: tuple[str, ...]) -> click.Command:
    group, name = (words[0], words[1]) if len(words) == 2 else (words[0], "") if words[0] in module.GROUPS else ("", words[0])
    command: click.Command = module.build_command(name, *module.COMMANDS[group][name])
    return command


def rows(place: Place) -> dict[str, int]:
    """How many rows each table has."""
    with contextlib.closing(sqlite3.connect(place.db)) as con:
        return {table: con.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0] for table in TABLES}


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
    made = json.loads(inside("submit-intent", "a first goal", "--handler", "work", "--json").out)
    assert inside("submit-intent", "for others", "--handler", "outside").status == 0
    return {"id": made["task_id"], "ids": made["intent_id"], "goal": "a goal", "name": "work", "worker": "w1", "handler": "work", "done": "1", "total": "2",
            "error": "it broke", "cmd": "true", "topic": "mine.own", "payload": "{}", "value": "1m", "intent": made["intent_id"]}  # fmt: skip


def good_call(words: tuple[str, ...], command: click.Command, ground: dict[str, str]) -> dict[str, list[Any]]:
    """The values of the required parameters of a command, by name."""
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
                argv += [param.opts[-1], value]
    for param in command.params:
        if isinstance(param, click.Argument):
            argv += (["--"] if param.name == "cmd" and values.get("cmd") else []) + list(values.get(param.name or "", []))
    return argv


def hostile_parameters(command: click.Command) -> Iterator[click.Parameter]:
    """Those that take a value."""
    for param in command.params:
        if not getattr(param, "is_flag", False):
            yield param


def check_refusal(answer: Answer, as_json: bool, what: str) -> str:
    """An error's message, after checking that it is one."""
    assert answer.status in (2, 3, 4), f"{what}: {answer}"
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
    return [" ".join(words) for words in commands(load_module()) if words[0] not in NOT_HERE]


@pytest.mark.parametrize("path", command_names())
def test_any_value_for_any_parameter(path: str, place: Place, module: Any, inside: Caller, ground: dict[str, str]) -> None:
    """Each parameter of each command takes each bad value: one clear line and no change, or an answer with nothing hidden in it."""
    words = tuple(path.split())
    command = built(module, words)
    assert inside(*words, "--help").status == 0
    after = rows(place)
    for param in hostile_parameters(command):
        for number, (title, value) in enumerate(HOSTILE.items()):
            as_json = number % 2 == 1 and param.name != "consumer"
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
    wrong += [[*words, param.opts[-1]] for param in command.params if isinstance(param, click.Option) and not param.is_flag]
    for argv in wrong:
        if words == ("handler", "add"):
            argv = [word for word in argv if word not in ("--", "true")]
        answer = inside(*argv)
        assert answer.status == 2, (argv, answer)
        check_unchanged(place, before, answer, str(argv))
        answer = inside("--json", *argv)
        assert answer.status == 2 and json.loads(answer.err)["error"]["code"] == "usage", argv


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
    assert {"submit-intent", "handler", "intent", "task", "daemon"} <= {words[0] for words, _ in found}
    before = rows(place)
    for words, option in found:
        command = built(module, words)
        for text in DURATIONS:
            values: dict[str, list[Any]] = {**good_call(words, command, ground), option.name or "": [text]}
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
