"""The one file and what may stand in its way: places, permissions, foreign and broken files, full disks, crowds, crashes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import GRACE, LIMIT, Place, Result, need, until

COMMANDS = (("status",), ("submit-intent", "a goal", "--handler", "work"), ("task", "list"), ("daemon", "--once"))
WRONG_COUNTS = """SELECT handler, status, priority, level, SUM(n) AS n FROM (
    SELECT handler, status, priority, level, n FROM task_counts
    UNION ALL SELECT COALESCE(handler, ''), status, priority, escalation_level, -1 FROM htm_tasks)
  GROUP BY handler, status, priority, level HAVING SUM(n) <> 0"""


def driver(place: Place, text: str, *words: str) -> subprocess.Popen[bytes]:
    """A process that works with the program's functions on this place's file; `g` is the module, `store` the open file."""
    start = "import sys, os; import grace.grace as g; store = g.Store(os.environ['GRACE_DB'], 'driver')\n"
    process = subprocess.Popen([sys.executable, "-P", "-c", start + text, *words], env=place.environment, cwd=place.folder,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    place.processes.append(process)
    return process


def refused(done: Result, *words: str) -> None:
    """Exit 8 with one line that holds these words and a hint; no traceback, nothing on stdout."""
    lines = done.err.splitlines()
    assert (done.status, done.out, len(lines)) == (8, "", 2), done.err
    assert lines[0].startswith("grace: ")
    assert re.match(r"hint: \S", lines[1])
    for word in words:
        assert word in done.err


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def settle(place: Place) -> None:
    """All of the file in one file, and nothing beside it."""
    place.sql("PRAGMA wal_checkpoint(TRUNCATE)")
    for tail in ("-wal", "-shm", "-ticket"):
        Path(f"{place.db}{tail}").unlink(missing_ok=True)


# ---- where it lies


def test_the_file_is_made_for_its_owner_alone(place: Place) -> None:
    """Directory 0700 and all files 0600, even where the caller's mask would allow everything."""
    path = place.folder / "some" / "where" / "own.db"
    done = subprocess.run([GRACE, "--db", str(path), "handler", "add", "work", "--", "true"], env=place.environment, capture_output=True, umask=0, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    files = list(path.parent.iterdir())
    assert path in files
    assert {file.name: oct(stat.S_IMODE(file.stat().st_mode)) for file in files} == dict.fromkeys((file.name for file in files), "0o600")


def test_the_default_place_follows_xdg_and_home(place: Place) -> None:
    """$XDG_STATE_HOME, else ~/.local/state; --db before $GRACE_DB before both."""
    state, home = place.folder / "state", place.folder / "home"
    environment = {"GRACE_DB": "", "XDG_STATE_HOME": str(state), "HOME": str(home)}
    cases = {state / "grace" / "grace.db": ({}, []), home / ".local" / "state" / "grace" / "grace.db": ({"XDG_STATE_HOME": ""}, []),
             place.folder / "variable.db": ({"GRACE_DB": str(place.folder / "variable.db")}, []),
             place.folder / "option.db": ({"GRACE_DB": str(place.folder / "other.db")}, ["--db", str(place.folder / "option.db")])}  # fmt: skip
    for path, (more, words) in cases.items():
        assert not path.exists()
        done = place.call(*words, "--json", "status", env={**environment, **more})
        assert done.json["database"] == str(path.resolve())
        assert path.is_file()
    assert stat.S_IMODE((state / "grace").stat().st_mode) == 0o700
    assert not (place.folder / "other.db").exists()


def test_a_link_and_the_file_behind_it_are_one_place(place: Place) -> None:
    """The writers' queue lies beside the real file, whatever way leads to it."""
    real = place.folder / "real"
    real.mkdir()
    (place.folder / "link").symlink_to(real)
    place.ok("--db", str(place.folder / "link" / "x.db"), "handler", "add", "work", "--external")
    assert json.loads(place.call("--db", str(real / "x.db"), "--json", "handler", "list").out)[0]["name"] == "work"
    assert (real / "x.db-ticket").exists()


def test_an_empty_file_is_taken_as_a_fresh_one(place: Place) -> None:
    """As mktemp leaves it."""
    place.db.touch()
    place.handler("work", "--external")
    assert [row["name"] for row in place.json("handler", "list")] == ["work"]


# ---- what it must not touch


def make_foreign(place: Place) -> None:
    place.sql("PRAGMA application_id = 77; CREATE TABLE songs (title TEXT); INSERT INTO songs VALUES ('x');")


def make_unmarked(place: Place) -> None:
    place.sql("CREATE TABLE songs (title TEXT); INSERT INTO songs VALUES ('x');")


def make_text(place: Place) -> None:
    place.db.write_text("these are my notes, do not touch\n" * 200)


def make_short_text(place: Place) -> None:
    place.db.write_text("my notes\n")


def make_scribbled(place: Place) -> None:
    place.handler("work", "--external")
    settle(place)
    size = place.db.stat().st_size
    with open(place.db, "r+b") as file:
        file.seek(4096)
        file.write(random.Random(5).randbytes(size - 4096))


def make_truncated(place: Place) -> None:
    place.handler("work", "--external")
    settle(place)
    os.truncate(place.db, 8192)


def make_newer(place: Place) -> None:
    place.handler("work", "--external")
    place.sql("PRAGMA user_version = 47")
    settle(place)


@pytest.mark.parametrize(("make", "word"), [(make_foreign, "another program"), (make_unmarked, "another program"), (make_text, "not an SQLite database"),
                                            (make_short_text, "not an SQLite database"), (make_scribbled, "damaged"), (make_truncated, "damaged"),
                                            (make_newer, "47")])  # fmt: skip
def test_a_file_that_is_not_ours_or_not_whole_is_refused_and_left_alone(place: Place, make: object, word: str) -> None:
    """Every command ends with exit 8, says what the file is and what to do, and changes no byte of it."""
    make(place)  # type: ignore[operator]
    before = place.db.read_bytes()
    for words in COMMANDS:
        refused(place.call(*words), word)
        assert place.db.read_bytes() == before
    error = place.call("--json", "status").error
    assert (error["code"], bool(error["hint"])) == ("database", True)
    if make in (make_foreign, make_unmarked, make_text):
        assert [path.name for path in place.folder.iterdir()] == [place.db.name], "a foreign file gets no neighbours"


def test_a_directory_is_refused(place: Place) -> None:
    """And nothing is put into it."""
    place.db.mkdir()
    refused(place.call("status"), "is a directory")
    refused(place.call("submit-intent", "a goal"), "is a directory")
    assert list(place.db.iterdir()) == []


@pytest.mark.parametrize("path", ["/dev/null", "/dev/null/grace.db", "/proc/nowhere/grace.db"])
def test_a_place_where_no_file_can_be_is_refused(place: Place, path: str) -> None:
    """A device, a folder below a file, a folder that nobody can make."""
    done = place.call("--db", path, "status")
    assert (done.status, done.out) == (8, "")
    assert done.err.startswith("grace: ")
    assert "Traceback" not in done.err


def test_a_file_that_may_not_be_written_is_refused(place: Place) -> None:
    """An immutable file stays as it is."""
    place.handler("work", "--external")
    settle(place)
    if not shutil.which("chattr") or subprocess.run(["chattr", "+i", str(place.db)], capture_output=True, check=False).returncode:
        pytest.skip("files cannot be made immutable here")
    try:
        before = place.db.read_bytes()
        for words in COMMANDS:
            refused(place.call(*words), str(place.db))
        assert place.db.read_bytes() == before
    finally:
        subprocess.run(["chattr", "-i", str(place.db)], check=True)
    place.ok("status")


# ---- disks


class Disk:
    """A small disk of its own, mounted where only its own processes see it; it goes away with the process that holds it."""

    def __init__(self, place: Place, size: str):
        self.place, self.folder = place, place.folder / "disk"
        self.folder.mkdir()
        script = f"mount -t tmpfs -o size={size},mode=700 none '{self.folder}' && echo mounted && exec cat"
        self.holder = subprocess.Popen(["unshare", "-m", "--propagation", "private", "sh", "-c", script], stdin=subprocess.PIPE,
                                       stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)  # fmt: skip
        place.processes.append(self.holder)
        if self.holder.stdout is None or self.holder.stdout.readline() != b"mounted\n":
            pytest.skip("a file system cannot be mounted here")
        self.inside = Path(f"/proc/{self.holder.pid}/root") / str(self.folder).lstrip("/")

    def run(self, *words: str) -> Result:
        enter = ["nsenter", "-t", str(self.holder.pid), "-m", "--", *words]
        return Result(subprocess.run(enter, env={**self.place.environment, "GRACE_DB": str(self.folder / "grace.db")}, input=b"", capture_output=True,
                                     timeout=LIMIT, check=False))  # fmt: skip

    def grace(self, *words: str) -> Result:
        return self.run(GRACE, *words)

    def fill(self) -> None:
        """Use up all room, to the last byte."""
        with open(self.inside / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"x" * 512)

    def free(self) -> None:
        (self.inside / "filler").unlink()


@pytest.fixture
def disk(place: Place) -> Disk:
    if not (shutil.which("unshare") and shutil.which("nsenter")):
        pytest.skip("there are no mount namespaces here")
    return Disk(place, "3m")


def test_a_full_disk_refuses_a_submission_whole_and_goes_on_when_there_is_room(disk: Disk) -> None:
    """Exit 8 with words, nothing half-done, reading goes on, and with room again so does writing."""
    need("sqlite3")
    assert disk.grace("handler", "add", "work", "--external").status == 0
    assert disk.grace("submit-intent", "the first", "--handler", "work").status == 0
    big = disk.place.folder / "big.json"
    big.write_text(json.dumps({"text": "x" * 600_000}))
    lines = disk.place.folder / "lines"
    lines.write_text("".join(json.dumps({"goal": f"line {n}", "handler": "work", "context": {"text": "x" * 2000}}) + "\n" for n in range(300)))
    disk.fill()
    refused(disk.grace("submit-intent", "too big", "--handler", "work", "--context", f"@{big}"), "full")
    refused(disk.grace("submit-intent", "--batch", str(lines)), "full")
    assert [row["goal"] for row in disk.grace("--json", "intent", "list").json] == ["the first"]
    assert disk.grace("status").status == 0
    disk.free()
    assert disk.grace("submit-intent", "the second", "--handler", "work", "--context", f"@{big}").status == 0
    assert [row["goal"] for row in disk.grace("--json", "intent", "list").json] == ["the second", "the first"]
    check = disk.run("sqlite3", str(disk.folder / "grace.db"), "PRAGMA integrity_check; PRAGMA foreign_key_check;" + WRONG_COUNTS)
    assert (check.out, check.err) == ("ok\n", "")


def test_a_file_cannot_be_made_on_a_full_disk_until_there_is_room(disk: Disk) -> None:
    """The attempt leaves nothing that would be in the way."""
    disk.fill()
    for _ in range(2):
        refused(disk.grace("handler", "add", "work", "--external"), "full")
    disk.free()
    assert disk.grace("handler", "add", "work", "--external").status == 0


def test_a_disk_that_is_mounted_read_only_is_refused(disk: Disk) -> None:
    """With a file and without one; afterwards the file is the same."""
    assert disk.grace("handler", "add", "work", "--external").status == 0
    before = snapshot(disk.inside)
    assert disk.run("mount", "-o", "remount,ro", str(disk.folder)).status == 0
    for words in COMMANDS:
        refused(disk.grace(*words), "grace.db")
    refused(disk.grace("--db", str(disk.folder / "new.db"), "status"), "new.db")
    assert snapshot(disk.inside) == before
    assert disk.run("mount", "-o", "remount,rw", str(disk.folder)).status == 0
    assert disk.grace("submit-intent", "a goal", "--handler", "work").status == 0


# ---- crowds


def test_many_processes_make_the_same_file_at_once(place: Place) -> None:
    """32 first uses: all succeed, each one's row is there."""
    crowd = [place.start("handler", "add", f"work{n}", "--external") for n in range(32)]
    ends = [(process.communicate(timeout=2 * LIMIT)[1].decode(), process.returncode) for process in crowd]
    assert ends == [("", 0)] * 32
    assert len(place.json("handler", "list")) == 32
    assert place.sql("PRAGMA integrity_check") == [["ok"]]


CROWD = """
import time
sys.stdout.write("ready\\n"); sys.stdout.flush(); sys.stdin.readline()
end, number, made = time.monotonic() + 3, 0, []
while time.monotonic() < end or not made:
    number += 1
    spec = {"goal": f"{sys.argv[1]} {number}", "handler": "work", "priority": g.PRIORITIES[number % 4], "sla_ms": 3600_000}
    made += [done["intent_id"] for done in store.write(lambda tx: g.submit(tx, [spec] * (1 + number % 2)))]
    if number % 3 == 0:
        task = store.write(lambda tx: g.claim_external(tx, ["work"], sys.argv[1], 60_000))
        outcome = {"outcome": "completed" if number % 2 else "failed", "retry": number % 4 == 0}
        if task:
            store.write(lambda tx: g.end_attempt(tx, task["task_id"], task["attempt_id"], outcome))
print(*made, sep="\\n")
"""


def test_a_crowd_of_writers_loses_nothing_and_counts_right(place: Place) -> None:
    """32 processes for some seconds, and commands among them: no error, each intent once, live counts as a count of the rows."""
    place.handler("work", "--external")
    crowd = [driver(place, CROWD, f"writer{n}") for n in range(32)]
    for process in crowd:
        assert process.stdout and process.stdin
        assert process.stdout.readline() == b"ready\n"
    for process in crowd:
        assert process.stdin
        process.stdin.write(b"go\n")
        process.stdin.flush()
    made = [place.submit(f"by command {n}", "--handler", "work")[0] for n in range(5)]
    for process in crowd:
        out, err = process.communicate(timeout=2 * LIMIT)
        assert (err.decode(), process.returncode) == ("", 0)
        ids = out.decode().split()
        assert ids, "a writer that never had its turn"
        made += ids
    assert len(set(made)) == len(made)
    assert sorted(made) == sorted(row[0] for row in place.sql("SELECT intent_id FROM intent_records"))
    assert place.sql("SELECT COUNT(*) FROM htm_tasks") == [[len(made)]]
    assert place.sql(WRONG_COUNTS) == []
    assert place.sql("SELECT COUNT(*) FROM events WHERE topic = 'htm.task.created'") == [[len(made)]]
    assert place.sql("PRAGMA foreign_key_check") == []


def test_a_batch_is_all_or_nothing_under_kill(place: Place) -> None:
    """Killed at any moment, a batch of a thousand is there whole or not at all; what exited 0 is there."""
    place.handler("work", "--external")
    chance = random.Random(41)
    for number in range(10):
        path = place.folder / f"batch{number}"
        path.write_text("".join(json.dumps({"goal": "one of many", "handler": "work", "domain": f"batch{number}"}) + "\n" for _ in range(1000)))
        process = place.start("submit-intent", "--batch", str(path), stdout=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(chance.uniform(0.05, 0.6))
        process.send_signal(signal.SIGKILL)
        ended = process.wait(LIMIT)
        counts = [f"(SELECT COUNT(*) FROM {table} WHERE domain = 'batch{number}') AS {table}" for table in ("intent_records", "htm_tasks")]
        found = place.sql(f"SELECT {', '.join(counts)}")
        assert found in ([[0, 0]], [[1000, 1000]])
        assert found == [[1000, 1000]] or ended != 0
    assert place.sql(WRONG_COUNTS) == []


IN_THE_MIDDLE = """
def work(tx):
    g.submit(tx, [{"goal": "never committed", "handler": "work"}] * 50)
    tx.flush()
    print("inside", flush=True)
    sys.stdin.readline()
store.write(work)
"""


def test_a_writer_killed_inside_its_transaction_leaves_nothing_and_holds_nobody_up(place: Place) -> None:
    """The next writer goes on at once, and only its own work is there."""
    place.handler("work", "--external")
    process = driver(place, IN_THE_MIDDLE)
    assert process.stdout and process.stdout.readline() == b"inside\n"
    process.kill()
    process.wait(LIMIT)
    place.submit("the next", "--handler", "work")
    assert [row["goal"] for row in place.json("intent", "list")] == ["the next"]
    assert place.sql(WRONG_COUNTS) == []


@contextlib.contextmanager
def person_with_a_shell(place: Place) -> Iterator[subprocess.Popen[bytes]]:
    """The sqlite3 shell, in the middle of a transaction that it has begun."""
    need("sqlite3")
    process = subprocess.Popen(["sqlite3", str(place.db)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    place.processes.append(process)
    assert process.stdin and process.stdout
    process.stdin.write(b"BEGIN IMMEDIATE;\nUPDATE handlers SET updated_at = updated_at + 1;\nSELECT 'held';\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"held\n"
    yield process


def test_a_foreign_transaction_is_waited_for(place: Place) -> None:
    """Somebody's shell holds the write lock: readers go on, the writer waits and then succeeds."""
    place.handler("work", "--external")
    with person_with_a_shell(place) as person:
        writer = place.start("submit-intent", "a goal", "--handler", "work")
        until(lambda: Path(f"{place.db}-ticket").read_bytes().startswith(b"%d " % writer.pid), "the writer to have its turn")
        assert place.json("intent", "list") == []
        assert writer.poll() is None
        assert person.stdin
        person.stdin.write(b"COMMIT;\n")
        person.stdin.close()
        assert writer.wait(LIMIT) == 0
        person.wait(LIMIT)
    assert [row["goal"] for row in place.json("intent", "list")] == ["a goal"]


IMPATIENT = "import sys; import grace.grace as g; g.STANDSTILL = 1; sys.exit(g.call(sys.argv[1:]))"


def impatient(place: Place, *words: str) -> subprocess.Popen[bytes]:
    """The command, with a second of patience where the real one has thirty."""
    process = subprocess.Popen([sys.executable, "-P", "-c", IMPATIENT, *words], env=place.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    place.processes.append(process)
    return process


def test_a_foreign_transaction_that_never_ends_is_given_up(place: Place) -> None:
    """Exit 8 in words, never the driver's `database is locked`."""
    place.handler("work", "--external")
    with person_with_a_shell(place) as person:
        done = impatient(place, "submit-intent", "a goal", "--handler", "work")
        out, err = done.communicate(timeout=LIMIT)
        assert (done.returncode, out) == (8, b"")
        assert re.fullmatch(r"grace: .*write lock.*\nhint: .+\n", err.decode())
        person.kill()


def test_a_writer_that_stands_still_is_named(place: Place) -> None:
    """Whoever waits for it gives up with exit 8, its pid, and what to do; when it is gone all goes on."""
    place.handler("work", "--external")
    holder = driver(place, IN_THE_MIDDLE)
    assert holder.stdout and holder.stdout.readline() == b"inside\n"
    waiting = impatient(place, "--json", "submit-intent", "a goal", "--handler", "work")
    out, err = waiting.communicate(timeout=LIMIT)
    error = json.loads(err)["error"]
    assert (waiting.returncode, out, error["code"]) == (8, b"", "database")
    assert re.search(rf"\b{holder.pid}\b", error["message"])
    assert error["hint"]
    assert place.json("intent", "list") == [], "reading needs no turn"
    holder.kill()
    holder.wait(LIMIT)
    place.submit("a goal", "--handler", "work")


def test_a_queue_that_moves_is_waited_for_however_long(place: Place) -> None:
    """Three times the patience, but always another holder: nobody gives up."""
    place.handler("work", "--external")
    with open(f"{place.db}-ticket", "r+b", buffering=0) as ticket:
        fcntl.flock(ticket, fcntl.LOCK_EX)
        waiting = impatient(place, "submit-intent", "a goal", "--handler", "work")
        for turn in range(15):
            os.pwrite(ticket.fileno(), f"{os.getpid()} {turn} somebody".ljust(120).encode() + b"\n", 0)
            with contextlib.suppress(subprocess.TimeoutExpired):
                waiting.wait(0.25)
        assert waiting.poll() is None
        fcntl.flock(ticket, fcntl.LOCK_UN)
    out, err = waiting.communicate(timeout=LIMIT)
    assert (waiting.returncode, err) == (0, b"")
    assert out
