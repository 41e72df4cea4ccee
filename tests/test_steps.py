"""Killed at each step: whatever a command of the vault was doing, it has been done or it has not, and all goes on from there.

strace ends the process with SIGKILL as it enters a system call, so that the call has no effect any more: each write into the
database's log, each sync, rename, truncation and print of a command in turn. One run that is only watched tells which steps
there are; no number of them is written down here. The process is forked off this one, which has loaded the program already
and remembers what it has once stretched a passphrase to; of what is on the disk nothing is remembered.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import json
import os
import re
import select
import shutil
import signal
import stat
import subprocess
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import LIMIT, Place, until
from tests.test_consent import VALUES, Row, World, consistent, copy_rows, word_file

CALLS = ("fsync", "fdatasync", "rename", "renameat", "renameat2", "unlink", "unlinkat", "ftruncate", "pwrite64", "write", "sendto", "mkdir", "flock",
         "execve", "exit_group")  # fmt: skip
SYNCS = ("fsync", "fdatasync")
COMMIT = ("pwrite64", "fdatasync", "flock")  # enough where the rest of an act is that of another one
FILES = (*COMMIT, "rename", "exit_group")  # the same for an act on key files, each step of which takes long
LOOKS = (("consent", "pending", "--json"), ("secret", "list", "--json"), ("audit", "verify", "--json"), ("doctor", "--json"))
NEW_VALUE = b"NEW-value-3ws71-canary"
CANARIES = [*VALUES.values(), NEW_VALUE, *(f"the sentence of {name}".encode() for name in ("anna", "ben", "carl", "new"))]
PR_SET_PTRACER = 0x59616D61
Step = tuple[str, int]


# ---- a process that dies at a given step


class Ended:
    """How a traced process ended, and what it had said."""

    def __init__(self, step: Step | None, status: int, out: bytes, err: bytes, log: str):
        self.step, self.status, self.out, self.err, self.log = step, status, out, err, log

    @property
    def died(self) -> bool:
        return self.status == -signal.SIGKILL


class Traced:
    """`grace WORDS…` in a process that begins once it is traced, and is killed as it enters its n-th call of a name."""

    def __init__(self, world: World, words: tuple[str, ...], given: bytes | None, step: Step | None):
        world.close()
        self.step, self.files = step, [tempfile.TemporaryFile() for _ in range(3)]
        self.files[0].write(given or b"")
        self.files[0].seek(0)
        gate, opener = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            ctypes.CDLL(None).prctl(PR_SET_PTRACER, ctypes.c_ulong(-1))  # where only a parent may trace
            os.read(gate, 1)
            os.close(gate)
            os.close(opener)
            world._become(list(words), [file.fileno() for file in self.files], world.place.environment)
        os.close(gate)
        self.end = os.pidfd_open(self.pid)
        self.log = tempfile.NamedTemporaryFile("r")
        inject = [] if step is None else ["-e", f"inject={step[0]}:signal=SIGKILL:when={step[1]}"]
        command = ["strace", "-f", "-s", "0", "-o", self.log.name, "-e", f"trace={','.join(CALLS)}", *inject, "-p", str(self.pid)]
        self.tracer = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert self.tracer.stderr
        self.said = self.tracer.stderr.readline()
        if "attached" not in self.said:
            os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(BrokenPipeError):
            os.write(opener, b"!")
        os.close(opener)

    def over(self, limit: float = 0) -> bool:
        return bool(select.select([self.end], [], [], limit)[0])

    def wait(self) -> Ended:
        in_time = self.over(LIMIT)
        if not in_time:
            os.kill(self.pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.end)
        self.tracer.communicate(timeout=LIMIT)
        out, err = ((file.seek(0), file.read())[1] for file in self.files[1:])
        for file in self.files:
            file.close()
        with self.log as file:
            log = file.read()
        assert in_time, f"{self.step} did not end in time"
        return Ended(self.step, status, out, err, log)


def steps_in(log: str) -> list[Step]:
    """What the first process of a trace did, as the names of its calls with their numbers.

    Of pages written in a row the first, one between and the last; of the index's growing one; no calls that changed nothing;
    and no sync that goes before a rename, a page or a sync, since to die before the next call leaves the same files."""
    main = log.split(maxsplit=1)[0]
    lines = [line.partition(" ")[2].strip() for line in log.splitlines() if line.startswith(main + " ")]
    calls = [(match[1], line) for line in lines if (match := re.match(r"(\w+)\(", line))]
    counted: dict[str, int] = {}
    steps: list[Step] = []
    row: list[Step] = []
    for number, (name, line) in enumerate([*calls, ("", "")]):
        counted[name] = counted.get(name, 0) + 1
        if name == "pwrite64":
            row += [(name, counted[name])]
            if calls[number + 1][0] == name:
                continue
            steps += [row[0]] if line.endswith(" = 1") else sorted({row[0], row[len(row) // 2], row[-1]})
            row = []
        elif name in SYNCS and calls[number + 1][0] in (*SYNCS, "pwrite64", "rename"):
            continue
        elif name and "= -1" not in line and "LOCK_EX" not in line:
            steps.append((name, counted[name]))
    return steps


@pytest.fixture(scope="module")
def tracing(module: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skip where there is no strace, or where it may not trace."""
    if not shutil.which("strace"):
        pytest.skip("needs strace, which is not installed")
    traced = Traced(World(Place(tmp_path_factory.mktemp("probe")), module), ("--version",), None, ("exit_group", 1))
    if not traced.wait().died or "attached" not in traced.said:
        pytest.skip(f"strace cannot trace here: {traced.said.strip()}")


def at_once(jobs: list[Callable[[], None]]) -> None:
    """Do these in as many processes as there are processors; fails with what went wrong in any."""
    count = min(len(jobs), os.cpu_count() or 1)
    reports = [tempfile.TemporaryFile("w+") for _ in range(count)]
    children = []
    for number, report in enumerate(reports):
        pid = os.fork()
        if pid == 0:
            gc.freeze()  # else each collection would copy the pages of all that is shared with this process
            for job in jobs[number::count]:
                try:
                    job()
                except BaseException:
                    report.write(traceback.format_exc(limit=-6) + "\n")
            report.write("all done")
            report.flush()
            os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
    texts = [(report.seek(0), report.read())[1] for report in reports]
    failures = "\n".join(text.removesuffix("all done") or "a process ended before its time" for text in texts if text != "all done")
    if failures:
        pytest.fail(failures, pytrace=False)


# ---- an act, and what is looked at after each kill


@dataclasses.dataclass
class Act:
    """A command, and what it should leave. Words in braces are filled in by what `prepare` has made."""

    words: str
    logs: list[list[str]]  # the kinds of leaves that it may have left: none, those of an attempt, and last all of them; empty: it leaves none
    there: Callable[[World, Row], bool]  # whether it is done, as other commands see it
    prepare: Callable[[World], Row] = lambda world: {}
    given: bytes | None = None
    again: int = 0  # how it ends when it is called again though it was done
    prints: bytes | None = None  # what is printed only when it was done
    beside: Callable[[World, Traced], None] | None = None  # what somebody else does meanwhile; it may change the steps
    after: Callable[[World, Row, bool], None] | None = None  # in place of calling it again; told whether it was done
    opens: tuple[str, bytes] | None = ("test_api_key", VALUES["test_api_key"])  # what is released in the end, with fresh consent
    least: int = 10  # steps, at the least
    only: tuple[str, ...] = ()  # the calls to die at; none: at all of them
    whole: bool = True  # other commands work at any time, not only when it has been called again
    bystander: bool = False  # somebody else has the database open all the time


def filled(words: str, world: World, facts: Row) -> tuple[str, ...]:
    names = {name: word_file(world.place.folder, name) for name in ("anna", "ben", "carl", "new")}
    return tuple(word.format(**names, **facts) for word in words.split())


def problems(doctor: Any) -> list[str]:
    """What doctor calls a problem here."""
    return [finding["code"] for finding in doctor["findings"] if finding["level"] == "problem"]


def sound(world: World, usual: list[str]) -> None:
    """Every plain command works, finds nothing wrong, and nothing secret lies about."""
    said: Row = {}
    for words in LOOKS:
        done = world.call(*words)
        assert done.status == 0 or (words[0] == "doctor" and usual), f"{words} ended {done.status}: {done.out} {done.err}"
        assert not re.search(r"rolled back|Traceback|internal error|DOES NOT VERIFY", done.out + done.err), f"{words}: {done.out} {done.err}"
        said[words[0]] = done.json
    assert said["audit"]["ok"] and not said["audit"]["findings"]
    assert all(secret["verified"] for secret in said["secret"])
    assert problems(said["doctor"]) == usual
    settled(world)


def settled(world: World) -> None:
    """Rows, log and what was seen agree, and nothing secret lies about."""
    consistent(world)
    world.close()
    clean(world)


def clean(world: World) -> None:
    """No value and no passphrase in any file, and none of them open to others."""
    for path in world.place.folder.rglob("*"):
        if path.is_file() and path.suffix != ".word":
            data = path.read_bytes()
            assert not any(canary in data for canary in CANARIES), f"{path} holds a secret"
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 or path.suffix == ".out", path


def released(world: World, key: str, value: bytes) -> None:
    """With fresh consent the value comes out."""
    asking = world.ask(key, mode="collect", program="afterwards")
    if asking.risk == "low":
        assert asking.value() == value
    else:
        world.approve(asking.consent_id, "anna")
        assert world.collect(asking.consent_id) == value
    consistent(world)
    world.close()


@contextlib.contextmanager
def reader(world: World, wanted: bool) -> Iterator[None]:
    """Another process that has the database open, so that what a killed one has left is not tidied up by the next."""
    if not wanted:
        yield
        return
    with subprocess.Popen(["sqlite3", str(world.db)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout
        process.stdin.write(b"SELECT COUNT(*) FROM audit_log;\n")
        process.stdin.flush()
        process.stdout.readline()
        yield


class Walk:
    """An act on a ground of its own, killed at each step on a copy of it."""

    def __init__(self, ground: Place, module: Any, folder: Path, act: Act):
        self.module, self.folder, self.act = module, folder, act
        self.ground = self.copy(ground.folder, "ground")
        os.environ["HOME"] = str(self.ground.place.folder)
        self.usual = problems(self.ground.call("doctor", "--json").json)
        self.facts = act.prepare(self.ground)
        self.before = len(self.ground.leaves())
        self.ground.close()

    def copy(self, source: Path, name: str) -> World:
        """The same files, as they lie there; the index of the write-ahead log is made anew by whoever opens it."""
        target = self.folder / name / source.name
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("*-shm"))
        return World(Place(target), self.module)

    def run(self, world: World, step: Step | None) -> Ended:
        os.environ["HOME"] = str(world.place.folder)
        if self.act.beside:
            world.person("anna")
        traced = Traced(world, filled(self.act.words, world, self.facts), self.act.given, step)
        if self.act.beside:
            self.act.beside(world, traced)
            world.close()
        return traced.wait()

    def unharmed(self) -> list[Step]:
        """The steps of a run that nobody kills; it does all that it should."""
        world = self.copy(self.ground.place.folder, "unharmed")
        with reader(world, self.act.bystander):
            ended = self.run(world, None)
            assert ended.status == 0, ended.err
            assert self.looked_at(world, ended) is True
        return steps_in(ended.log)

    def looked_at(self, world: World, ended: Ended) -> bool:
        """What holds after any end; whether the act was done."""
        if not self.act.whole:
            clean(world)
            return self.act.there(world, self.facts)
        sound(world, self.usual)
        kinds = [kind for kind in world.kinds()[self.before :] if kind != "consent.expired"]
        done = self.act.there(world, self.facts)
        assert kinds in (self.act.logs or [[]]), f"the log holds {kinds}"
        assert not self.act.logs or done == (kinds == self.act.logs[-1]), f"the log says {kinds}, and it was {'' if done else 'not '}done"
        if self.act.prints is not None:
            assert ended.out in (b"", self.act.prints)
        assert done or ended.out == b"", f"it was not done, but it said {ended.out!r}"
        world.close()
        assert not any(canary in ended.err for canary in CANARIES)
        return done

    def killed(self, step: Step) -> None:
        world = self.copy(self.ground.place.folder, f"{step[0]}-{step[1]}")
        try:
            with reader(world, self.act.bystander):
                ended = self.run(world, step)
                if ended.died:
                    (self.folder / "deaths" / world.place.folder.parent.name).touch()
                assert ended.died or self.act.beside, f"it was to die and ended {ended.status}: {ended.err!r}"
                self.aftermath(world, ended)
        except BaseException as error:
            error.add_note(f"killed at call {step[1]} of {step[0]}")
            raise
        shutil.rmtree(world.place.folder)

    def aftermath(self, world: World, ended: Ended) -> None:
        done = self.looked_at(world, ended)
        if self.act.after:
            self.act.after(world, self.facts, done)
        else:
            again = world.call(*filled(self.act.words, world, self.facts), stdin=self.act.given)
            assert again.status == (self.act.again if done else 0), f"again, after done {done}: {again.status}, {again.err}"
            assert done or self.act.prints in (None, again.raw_out)
            assert self.act.there(world, self.facts)
        settled(world) if self.act.whole else sound(world, self.usual)
        if self.act.opens:
            released(world, *self.act.opens)

    def all(self) -> list[Step]:
        """Kill it at every step; the steps."""
        steps = self.unharmed()
        assert len(steps) >= self.act.least and {"rename", "exit_group"} <= {name for name, _ in steps}, steps
        steps = [step for step in steps if not self.act.only or step[0] in self.act.only]
        (self.folder / "deaths").mkdir()
        at_once([lambda step=step: self.killed(step) for step in steps])
        deaths = len(list((self.folder / "deaths").iterdir()))
        assert deaths == len(steps) or (self.act.beside and deaths > len(steps) / 2), f"{deaths} deaths in {len(steps)} steps"
        return steps


@pytest.fixture(scope="module")
def ground(tracing: None, module: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Two approvers and three secrets. A passphrase is stretched once for each key file, not in each process anew."""
    folder = tmp_path_factory.mktemp("steps") / "duo"
    folder.mkdir(mode=0o700)
    place = Place(folder)
    anna = ("--passphrase-file", word_file(folder, "anna"))
    place.ok("config", "set", "vault.argon2_memory", "67108864")
    place.ok("init", "--name", "anna", *anna)
    place.ok("approver", "add", "ben", "--role", "user", "--role", "governance", "--approver", "anna", *anna,
             "--new-passphrase-file", word_file(folder, "ben"))  # fmt: skip
    for key, risk in (("test_api_key", "medium"), ("high", "high"), ("low", "low")):
        place.ok("secret", "set", key, "--risk", risk, *(() if risk == "low" else ("--owner", "anna", *anna)), stdin=VALUES[key])
    stretched: dict[tuple[bytes, str], bytes] = {}
    stretch = module.stretch

    def remembered(passphrase: bytes, kdf: Row) -> bytes:
        known = passphrase, json.dumps(kdf)
        if known not in stretched:
            stretched[known] = stretch(passphrase, kdf)
        return stretched[known]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        patch.delenv("XDG_CONFIG_HOME", raising=False)
        patch.setattr(module, "stretch", remembered)
        world = World(place, module)
        for name in ("anna", "ben"):
            world.person(name)
        world.close()
        yield place
    place.close()


Walker = Callable[[Act], list[Step]]


@pytest.fixture
def walk(ground: Place, module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Walker:
    """Kills an act at each of its steps, on copies of the ground."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    return lambda act: Walk(ground, module, tmp_path, act).all()


def asked(key: str = "test_api_key", *approved_by: tuple[str, str]) -> Callable[[World], Row]:
    """Prepares a request that is left to be collected, signed by some."""

    def prepare(world: World) -> Row:
        consent_id = world.ask(key, mode="collect", ms=3_600_000).consent_id
        for name, group in approved_by:
            world.approve(consent_id, name, group)
        return {"id": consent_id}

    return prepare


def status_is(*statuses: str) -> Callable[[World, Row], bool]:
    return lambda world, facts: world.status(facts["id"]) in statuses


def newest(key: str) -> Callable[[World], int]:
    return lambda world: max((row[0] for row in world.fetch("SELECT version FROM secret_entries WHERE secret_key = ?", key)), default=0)


def is_secret(key: str, version: int) -> Callable[[World, Row], bool]:
    return lambda world, facts: newest(key)(world) >= version


def grants(world: World, facts: Row) -> int:
    return int(world.fetch("SELECT COUNT(*) FROM consent_grants WHERE consent_id = ?", facts["id"])[0][0])


# ---- secrets

SEALED = "--owner anna --passphrase-file {anna} --json"


def test_a_first_value(walk: Walker) -> None:
    """`secret set` of a new key at medium risk."""
    walk(Act(f"secret set fresh {SEALED}", [[], ["secret.stored"]], is_secret("fresh", 1), given=NEW_VALUE, opens=("fresh", NEW_VALUE)))


def test_a_low_value(walk: Walker) -> None:
    """`secret set` by the machine alone."""
    walk(Act("secret set fresh --risk low --json", [[], ["secret.stored"]], is_secret("fresh", 1), given=NEW_VALUE, opens=("fresh", NEW_VALUE)))


def test_a_next_value(walk: Walker) -> None:
    """`secret set` over a version that somebody waits for: that request ends with it, or neither does."""
    walk(Act(f"secret set test_api_key {SEALED}", [[], ["secret.stored", "consent.revoked"]],
             lambda world, facts: newest("test_api_key")(world) > 1 and status_is("revoked")(world, facts), asked(), NEW_VALUE,
             opens=("test_api_key", NEW_VALUE)))  # fmt: skip


def test_a_rotated_value(walk: Walker) -> None:
    """`secret rotate`."""
    walk(Act(f"secret rotate test_api_key {SEALED}", [[], ["secret.rotated"]], is_secret("test_api_key", 2), given=NEW_VALUE,
             opens=("test_api_key", NEW_VALUE), only=COMMIT))  # fmt: skip


def standing(world: World) -> Row:
    """A handler, a secret that it may rotate, and a standing consent that follows; the id of that."""
    world.ok("handler", "add", "renew", "--", "true")
    world.ok(*filled(f"secret set test_api_key --rotate-with renew {SEALED}", world, {}), stdin=VALUES["test_api_key"])
    done = world.json(*filled("consent request test_api_key --action backup --for nights --by nightly --standing 30d --follow-rotation", world, {}))
    world.ok(*filled("consent approve {id} --approver anna --passphrase-file {anna}", world, {"id": done["consent_id"]}))
    return {"id": done["consent_id"]}


def test_a_delegated_rotation(walk: Walker) -> None:
    """`secret rotate --delegated`: the old value opens or the new one, also for the standing consent that follows it."""

    def follows(world: World, facts: Row, done: bool) -> None:
        assert world.status(facts["id"]) == "approved"
        got = world.ok(*filled("secret get test_api_key --action backup --for nights --by nightly", world, {}))
        assert got.raw_out == (NEW_VALUE if done else VALUES["test_api_key"])
        world.ok("secret", "rotate", "test_api_key", "--delegated", stdin=NEW_VALUE)

    walk(Act("secret rotate test_api_key --delegated --json", [[], ["secret.rotated"]], is_secret("test_api_key", 3), standing, NEW_VALUE,
             after=follows, opens=("test_api_key", NEW_VALUE)))  # fmt: skip


def test_a_use_under_a_standing_consent(walk: Walker) -> None:
    """`secret get` that nobody is asked for: what is printed is counted and in the log; what is counted may be lost, and is asked for again."""
    before = ["consent.requested", "consent.approved"]
    walk(Act("secret get test_api_key --action backup --for nights --by nightly", [[], before, [*before, "secret.used"]],
             lambda world, facts: world.row(facts["id"])["used_count"] >= 1, standing, prints=VALUES["test_api_key"]))  # fmt: skip


def test_a_reshared_value(walk: Walker) -> None:
    """`secret reshare`: that it was opened for it is in the log, though it may not have come to it."""
    walk(Act("secret reshare test_api_key --approver anna --passphrase-file {anna} --json",
             [[], ["secret.opened"], ["secret.opened", "secret.reshared"]], is_secret("test_api_key", 2)))  # fmt: skip


def test_a_removed_value(walk: Walker) -> None:
    """`secret remove`: gone with what was asked for it, or neither; a new value can be stored."""

    def stored_again(world: World, facts: Row, done: bool) -> None:
        assert world.call("secret", "remove", "test_api_key").status == (3 if done else 0)
        world.ok(*filled(f"secret set test_api_key {SEALED}", world, facts), stdin=NEW_VALUE)

    walk(Act("secret remove test_api_key --json", [[], ["consent.revoked", "secret.removed"]], lambda world, facts: not world.fetch(
        "SELECT 1 FROM secret_entries WHERE secret_key = 'test_api_key' AND sealed IS NOT NULL"), asked(), after=stored_again,
        opens=("test_api_key", NEW_VALUE)))  # fmt: skip


# ---- asking and answering

USE = "--action test_action --for testing"


def test_a_request(walk: Walker) -> None:
    """`consent request`: it can be answered, or there is none."""

    def answered(world: World, facts: Row, done: bool) -> None:
        if not done:
            world.ok(*filled(f"consent request test_api_key {USE}", world, facts))
        (consent_id,) = world.pending()
        world.approve(consent_id, "anna")
        assert world.collect(consent_id) == VALUES["test_api_key"]

    walk(Act(f"consent request test_api_key {USE} --json", [[], ["consent.requested"]], lambda world, facts: len(world.json("consent", "pending")) == 1,
             after=answered))  # fmt: skip


def test_an_approval(walk: Walker) -> None:
    """`consent approve` at medium risk: shown at most, or signed and approved; then the value can be had once."""

    def used(world: World, facts: Row, done: bool) -> None:
        again = world.call(*filled("consent approve {id} --approver anna --passphrase-file {anna} --json", world, facts))
        assert again.status == (4 if done else 0), again.err
        assert world.collect(facts["id"]) == VALUES["test_api_key"]

    walk(Act("consent approve {id} --approver anna --passphrase-file {anna} --json",
             [[], ["consent.shown"], ["consent.shown", "consent.signed", "consent.approved"]],
             lambda world, facts: status_is("approved", "used")(world, facts) and grants(world, facts) == 1, asked(), after=used))  # fmt: skip


@pytest.mark.parametrize("second", [False, True])
def test_each_of_two_approvals(walk: Walker, second: bool) -> None:
    """`consent approve` at high risk: the user's signature leaves it pending, the one of governance approves it."""
    name, group = ("ben", "governance") if second else ("anna", "user")
    words = f"consent approve {{id}} --as {group} --approver {name} --passphrase-file {{{name}}} --json"
    signed = ["consent.shown", "consent.signed", *(["consent.approved"] if second else [])]

    def used(world: World, facts: Row, done: bool) -> None:
        assert world.call(*filled(words, world, facts)).status == (4 if done else 0)
        if not second:
            assert world.call("secret", "get", "high", *USE.split(), "--timeout", "1ms", "--consent", facts["id"]).status in (4, 6)
            world.approve(facts["id"], "ben", "governance")
        assert world.collect(facts["id"]) == VALUES["high"]

    walk(Act(words, [[], ["consent.shown"], signed], lambda world, facts: grants(world, facts) == 1 + second and status_is(
        "approved" if second else "pending")(world, facts), asked("high", *([("anna", "user")] if second else [])), after=used,
             only=() if second else COMMIT))  # fmt: skip


def test_an_import(walk: Walker) -> None:
    """`consent import` of an approval from elsewhere: the text can be brought again, until it was taken."""

    def elsewhere(world: World) -> Row:
        facts = asked()(world)
        case = world.ok("consent", "export", facts["id"], "--approver", "anna").raw_out
        yes = world.ok("consent", "approve", "--in", "-", *world.as_("anna"), stdin=case)
        (world.place.folder / "yes.out").write_bytes(yes.raw_out)
        return facts

    def used(world: World, facts: Row, done: bool) -> None:
        assert world.call("consent", "import", "yes.out").status == (4 if done else 0)
        assert world.collect(facts["id"]) == VALUES["test_api_key"]

    walk(Act("consent import yes.out --json", [[], ["consent.signed", "consent.approved"]], status_is("approved", "used"), elsewhere, after=used))


@pytest.mark.parametrize(("words", "status", "approved"), [
    ("consent deny {id} --reason no", "denied", False), ("consent withdraw {id}", "revoked", False), ("consent revoke {id} --reason no", "revoked", True)],
    ids=["deny", "withdraw", "revoke"])  # fmt: skip
def test_a_no(walk: Walker, words: str, status: str, approved: bool) -> None:
    """It is final once it is there, and before that it can be said again; nothing opens afterwards."""

    def refused(world: World, facts: Row, done: bool) -> None:
        assert world.call(*filled(words, world, facts)).status == (4 if done else 0)
        assert world.status(facts["id"]) == status
        collecting = world.call("secret", "get", "test_api_key", *USE.split(), "--consent", facts["id"])
        assert (collecting.status, collecting.raw_out) == (5, b"")

    walk(Act(words + " --json", [[], [f"consent.{status}"]], status_is(status), asked("test_api_key", *([("anna", "user")] if approved else [])),
             after=refused))  # fmt: skip


# ---- using


@pytest.mark.parametrize("bystander", [False, True])
def test_a_use_is_spent_or_not(walk: Walker, bystander: bool) -> None:
    """`secret get --consent`: what was printed is spent; what is not spent can be had; never twice."""

    def once(world: World, facts: Row, done: bool) -> None:
        got = world.call(*filled(words, world, facts))
        assert (got.status, got.raw_out) == ((4, b"") if done else (0, VALUES["test_api_key"]))
        assert world.call(*filled(words, world, facts)).status == 4
        assert world.row(facts["id"])["used_count"] == 1

    if bystander and not shutil.which("sqlite3"):
        pytest.skip("needs sqlite3, which is not installed")
    words = f"secret get test_api_key {USE} --consent {{id}}"
    steps = walk(Act(words, [[], ["secret.used"]], lambda world, facts: world.row(facts["id"])["used_count"] == 1, asked("test_api_key", ("anna", "user")),
                     prints=VALUES["test_api_key"], after=once, bystander=bystander))  # fmt: skip
    assert "write" in [name for name, _ in steps[-2:]]


def sealed_bytes(world: World, consent_id: str) -> list[str]:
    """What a value's removal drops, and what a use drops: the sealed value, its parts, and the parts in grants."""
    queries = ("SELECT hex(sealed) FROM secret_entries WHERE secret_key = 'test_api_key'",
               "SELECT hex(wrap) FROM secret_shares WHERE secret_key = 'test_api_key'",
               f"SELECT hex(wrap) FROM consent_grants WHERE consent_id = '{consent_id}'")  # fmt: skip
    return [row[0][:400] for query in queries for row in world.fetch(query) if row[0]]


@pytest.mark.parametrize("words", [f"secret get test_api_key {USE} --consent {{id}}", "secret remove test_api_key --json"], ids=["get", "remove"])
def test_what_was_dropped_leaves_the_files(walk: Walker, words: str) -> None:
    """What a use or a removal drops is in no file any more once other commands have run, also when it was killed before it had tidied up."""

    def prepare(world: World) -> Row:
        facts = asked("test_api_key", ("anna", "user"))(world)
        return {**facts, "dropped": sealed_bytes(world, facts["id"])}

    def gone(world: World, facts: Row, done: bool) -> None:
        left = sealed_bytes(world, facts["id"])
        world.close()
        files = [path.read_bytes() for path in world.place.folder.glob("grace.db*")]
        for text in set(facts["dropped"]) - set(left):
            assert not any(bytes.fromhex(text)[:100] in data for data in files), "what was dropped is still in a file"

    logs = ["secret.used"] if "get" in words else ["consent.revoked", "secret.removed"]
    walk(Act(words, [[], logs], lambda world, facts: world.status(facts["id"]) in ("used", "revoked"), prepare, after=gone, only=COMMIT, opens=None))


def test_a_low_use(walk: Walker) -> None:
    """`secret get` at low risk: recorded before it is printed."""
    walk(Act(f"secret get low {USE}", [[], ["consent.requested", "consent.approved", "secret.used"]],
             lambda world, facts: len(world.json("consent", "history", "--status", "used")) > 0, prints=VALUES["low"]))  # fmt: skip


def test_a_command_with_a_low_secret(walk: Walker) -> None:
    """`exec`: the command begins only after its use was recorded."""
    steps = walk(Act("exec --secret V=low -- env", [[], ["consent.requested", "consent.approved", "secret.used"]],
                     lambda world, facts: len(world.json("consent", "history", "--status", "used")) > 0, opens=("low", VALUES["low"])))  # fmt: skip
    assert ("execve", 1) in steps


def yes_to_what_comes(world: World, traced: Traced) -> None:
    """An approver at work, who answers the request when it comes."""
    query = "SELECT consent_id FROM secret_consent_records WHERE consent_status = 'pending'"
    asking = until(lambda: world.fetch(query) or traced.over(), "a request, or the end of whoever makes it")
    if asking is not True:
        with contextlib.suppress(world.m.GraceError):  # it may be dead by now
            world.approve(asking[0][0], "anna")


@pytest.mark.parametrize("words", [f"secret get test_api_key {USE}", "exec --secret V=test_api_key -- printenv V"], ids=["get", "exec"])
def test_a_process_that_waits_for_its_consent(walk: Walker, words: str) -> None:
    """Killed before it was answered, it leaves nothing to answer; later, an approval that nobody else can use, or a spent one."""

    def nothing_left(world: World, facts: Row, done: bool) -> None:
        assert world.json("consent", "pending") == []
        rows = world.json("consent", "history")
        assert len(rows) <= 1 and {row["consent_status"] for row in rows} <= {"expired", "approved", "used"}
        for row in rows:
            assert row["used_count"] == (row["consent_status"] == "used") == done
            get = world.call("secret", "get", "test_api_key", "--action", row["requested_action"], "--for", "x", "--consent", row["consent_id"])
            assert get.status == {"expired": 6, "approved": 5, "used": 4}[row["consent_status"]] and get.raw_out == b"", get.err

    all_of_it = ["consent.requested", "consent.shown", "consent.signed", "consent.approved", "secret.used"]
    walk(Act(words, [all_of_it[:length] for length in range(6) if length != 3],
             lambda world, facts: bool(world.fetch("SELECT 1 FROM secret_consent_records WHERE used_count = 1")),
             prints=VALUES["test_api_key"] + (b"\n" if "exec" in words else b""), beside=yes_to_what_comes, after=nothing_left,
             only=("fdatasync", "flock", "write", "execve", "exit_group") if "exec" in words else ()))  # fmt: skip


# ---- people and keys


def test_an_added_approver(walk: Walker) -> None:
    """`approver add`: he can approve, or he can be added again."""
    words = "approver add carl --role user --approver anna --passphrase-file {anna} --new-passphrase-file {carl} --json"

    def approves(world: World, facts: Row, done: bool) -> None:
        assert world.call(*filled(words, world, facts)).status == (4 if done else 0)
        world.ok(*filled("secret reshare test_api_key --approver anna --passphrase-file {anna}", world, facts))
        consent_id = world.ask(mode="collect").consent_id
        world.ok(*filled(f"consent approve {consent_id} --approver carl --passphrase-file {{carl}} --json", world, facts))
        assert world.collect(consent_id) == VALUES["test_api_key"]

    walk(Act(words, [[], ["approver.added"]], lambda world, facts: "carl" in [person["name"] for person in world.json("approver", "list")],
             after=approves, only=FILES))  # fmt: skip


def test_a_key_left_behind_is_nobodys(walk: Walker) -> None:
    """Where one approver's key is, and another's adding was killed, an exported request is still answered without naming him."""

    def alone(world: World) -> Row:
        for path in world.place.folder.glob(".config/grace/*/ben.*"):
            path.unlink()
        facts = asked()(world)
        world.ok("consent", "export", facts["id"], "--out", "case.out")
        return facts

    def answered(world: World, facts: Row, done: bool) -> None:
        if not done:
            world.ok(*filled("consent approve --in case.out --passphrase-file {anna} --out yes.out", world, facts))

    walk(Act("approver add carl --role user --approver anna --passphrase-file {anna} --new-passphrase-file {carl} --json", [[], ["approver.added"]],
             lambda world, facts: "carl" in [person["name"] for person in world.json("approver", "list")], alone, after=answered,
             only=("fdatasync", "pwrite64")))  # fmt: skip


PASSWD = "approver passwd anna --passphrase-file {anna} --new-passphrase-file {new} --json"


def unlocks(world: World, name: str, word: str) -> bool:
    """Whether this is the passphrase of an approver."""
    try:
        world.m.unlock(world.vault(), name, word_file(world.place.folder, word))
    except world.m.DeniedError:
        return False
    finally:
        world.close()
    return True


def test_a_changed_passphrase(walk: Walker) -> None:
    """`approver passwd`: one of the two opens the key, and from that one it can be changed."""

    def one_holds(world: World, facts: Row, done: bool) -> None:
        old = unlocks(world, "anna", "anna")
        assert old or (done and unlocks(world, "anna", "new"))
        assert world.call(*filled(PASSWD, world, facts)).status == (0 if old else 5)
        assert unlocks(world, "anna", "new")

    walk(Act(PASSWD, [[], ["approver.passwd"]], lambda world, facts: "approver.passwd" in world.kinds(), after=one_holds))


def test_a_changed_passphrase_is_in_the_log(walk: Walker) -> None:
    """`approver passwd`: no passphrase is another one without a leaf that says so."""

    def told(world: World, facts: Row, done: bool) -> None:
        assert unlocks(world, "anna", "anna") or "approver.passwd" in world.kinds()

    walk(Act(PASSWD, [[], ["approver.passwd"]], lambda world, facts: "approver.passwd" in world.kinds(), after=told,
             only=COMMIT))  # fmt: skip


def carried(world: World) -> Row:
    """ben's key was carried away, and is to come back."""
    world.ok("approver", "export", "ben", "--out", "ben.out")
    for path in world.place.folder.glob(".config/grace/*/ben.*"):
        path.unlink()
    return {}


def comes_back(world: World, facts: Row, done: bool) -> None:
    assert world.call("approver", "import", "ben.out").status == (4 if done else 0)
    consent_id = world.ask(mode="collect").consent_id
    world.ok(*filled(f"consent approve {consent_id} --approver ben --passphrase-file {{ben}} --json", world, facts))
    assert world.collect(consent_id) == VALUES["test_api_key"]


def test_an_imported_approver(walk: Walker) -> None:
    """`approver import`: he can approve, or be brought in again."""
    walk(Act("approver import ben.out --json", [], lambda world, facts: world.call(*filled(
        "audit verify --approver ben --passphrase-file {ben}", world, facts)).status == 0, carried, after=comes_back, least=7))  # fmt: skip


def test_an_approval_elsewhere(walk: Walker) -> None:
    """`consent approve --in --out`: the text is there whole, or it can be made again."""
    words = "consent approve --in case.out --out yes.out --approver anna --passphrase-file {anna} --json"

    def exported(world: World) -> Row:
        facts = asked()(world)
        world.ok("consent", "export", facts["id"], "--out", "case.out")
        return facts

    def imported(world: World, facts: Row, done: bool) -> None:
        if not done:
            world.ok(*filled(words, world, facts))
        world.ok("consent", "import", "yes.out")
        assert world.collect(facts["id"]) == VALUES["test_api_key"]

    walk(Act(words, [], lambda world, facts: (world.place.folder / "yes.out").exists(), exported, after=imported, least=4))


def test_a_new_machine_key(walk: Walker) -> None:
    """`init --machine`: killed at any step it can be called again, and then low risk opens, and all that is above."""
    walk(Act("init --machine --name anna --passphrase-file {anna} --json", [], lambda world, facts: world.kinds()[-1] != facts["kind"],
             lambda world: {"kind": world.kinds()[-1]}, whole=False, opens=("low", VALUES["low"])))  # fmt: skip


def test_half_a_new_machine_key_is_explained(walk: Walker) -> None:
    """`init --machine`: other commands work after a kill, or say that it is to be called again."""

    def explained(world: World, facts: Row, done: bool) -> None:
        for words in (("secret", "list", "--json"), ("audit", "verify", "--json")):
            looked = world.call(*words)
            assert looked.status == 0 or "grace init --machine" in looked.err, looked.err
        world.ok(*filled("init --machine --name anna --passphrase-file {anna}", world, facts))

    walk(Act("init --machine --name anna --passphrase-file {anna} --json", [], lambda world, facts: world.kinds()[-1] != facts["kind"],
             lambda world: {"kind": world.kinds()[-1]}, after=explained, whole=False, only=("rename",)))  # fmt: skip


def test_a_removed_approver(walk: Walker) -> None:
    """`approver remove`: he is off the list and doctor says which secrets need a new value, or he can be removed again."""
    words = "approver remove ben --approver anna --passphrase-file {anna} --json"

    def to_be_rotated(world: World, facts: Row, done: bool) -> None:
        assert world.call(*filled(words, world, facts)).status == (3 if done else 0)
        codes = [finding["code"] for finding in world.call("doctor", "--json").json["findings"]]
        assert codes.count("rotate") == 3, f"ben could open three secrets, and doctor says {codes}"

    walk(Act(words, [[], ["approver.removed"]], lambda world, facts: all(person["removed_at"] for person in world.json("approver", "list")
                                                                       if person["name"] == "ben"), after=to_be_rotated, only=FILES))  # fmt: skip


def test_an_older_copy_accepted(walk: Walker) -> None:
    """`audit anchor --accept` after a restored copy: killed at any step it can be called again, and then all is in order."""

    def restored(world: World) -> Row:
        copy_rows(world.db, world.place.folder / "copy.out")
        world.ok(*filled(f"secret rotate test_api_key {SEALED}", world, {}), stdin=NEW_VALUE)
        world.close()
        for path in world.place.folder.glob("grace.db*"):
            path.unlink()
        copy_rows(world.place.folder / "copy.out", world.db)
        return {}

    walk(Act("audit anchor --accept --approver anna --passphrase-file {anna} --json", [], lambda world, facts: world.kinds()[-1] == "audit.accepted",
             restored, whole=False))  # fmt: skip


# ---- the beginning


class Beginning(Walk):
    """A vault that is only being made."""

    def __init__(self, module: Any, folder: Path, act: Act):
        self.module, self.folder, self.act, self.facts = module, folder, act, {}
        (folder / "ground" / "new").mkdir(parents=True, mode=0o700)
        self.ground = World(Place(folder / "ground" / "new"), module)
        act.prepare(self.ground)
        self.usual = problems(self.ground.call("doctor", "--json").json)
        self.ground.close()

    def looked_at(self, world: World, ended: Ended) -> bool:
        """Without a vault every command says so; with one all of them work."""
        done = bool(world.fetch("SELECT 1 FROM settings WHERE name = '_vault_id'")) if world.call("status").status == 0 else None
        world.close()
        for words in LOOKS:
            assert world.call(*words).status == (self.usual != [] if words == ("doctor", "--json") else 0 if done else 7), words
        assert done is not None and world.kinds() == (["vault.created"] if done else [])
        assert done or b"vault_id" not in ended.out
        settled(world) if done else clean(world)
        world.close()
        return done

    def aftermath(self, world: World, ended: Ended) -> None:
        done = self.looked_at(world, ended)
        for status in (4 if done else 0, 4):
            assert world.call(*filled(INIT, world, {})).status == status
        assert problems(world.call("doctor", "--json").json) == self.usual
        assert unlocks(world, "anna", "anna")
        world.close()
        world.ok(*filled(f"secret set test_api_key {SEALED}", world, {}), stdin=NEW_VALUE)
        consent_id = world.ask(mode="collect").consent_id
        world.ok(*filled(f"consent approve {consent_id} --approver anna --passphrase-file {{anna}} --json", world, {}))
        assert world.collect(consent_id) == NEW_VALUE
        settled(world)


INIT = "init --name anna --passphrase-file {anna} --json"
CHEAP = ("config", "set", "vault.argon2_memory", "67108864")


def test_a_new_vault(ground: Place, module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`init`: the vault is there, or it can be made; keys that nothing refers to do no harm."""
    monkeypatch.setenv("HOME", str(tmp_path))
    Beginning(module, tmp_path, Act(INIT, [], lambda world, facts: True, lambda world: world.ok(*CHEAP) and {}, only=FILES)).all()


def test_the_log_signed(walk: Walker) -> None:
    """`audit anchor`."""
    walk(Act("audit anchor --approver anna --passphrase-file {anna} --json", [[], ["audit.anchored"]],
             lambda world, facts: len(world.fetch("SELECT 1 FROM audit_anchors")) > facts["anchors"],
             lambda world: {"anchors": len(world.fetch("SELECT 1 FROM audit_anchors"))}))  # fmt: skip
