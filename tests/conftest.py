"""What all tests share: a database of their own, the installed command, daemons that are always ended, and patience.

Nothing here is mocked: `grace` is the installed console script, called as a user calls it. Conditions are waited for by
polling with a generous limit; no test sleeps for a guess.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what it puts in the background; commands would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # as nohup(1) starts what it is given
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

GRACE = str(Path(sys.executable).parent / "grace")
ROOT = Path(__file__).resolve().parent.parent
LIMIT = 60.0


def load_module() -> Any:
    """The module behind the command, for tests of its functions: installed it is grace.grace."""
    return importlib.import_module("grace.grace")


def until(condition: Callable[[], Any], what: str = "the condition", limit: float = LIMIT) -> Any:
    """The first true value of `condition`; fails when it stays false."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    pytest.fail(f"waited {limit:g} s in vain for {what}")


def own_environment() -> dict[str, str]:
    """Ours without what would lead grace elsewhere; the command may keep its bytecode, as it does for a user."""
    unwanted = ("GRACE_", "XDG_", "NOTIFY_", "WATCHDOG_", "PYTHONDONTWRITEBYTECODE")
    return {key: value for key, value in os.environ.items() if not key.startswith(unwanted)}


def by_library(db: Path, text: str) -> list[list[Any]]:
    """Run statements as a stranger to grace would, and return the rows of the last."""
    rows: list[list[Any]] = []
    with contextlib.closing(sqlite3.connect(db, timeout=LIMIT, isolation_level=None)) as con:
        statement = ""
        for piece in re.split(r"(?<=;)", text.rstrip().rstrip(";") + ";"):
            statement += piece
            if statement.strip() and sqlite3.complete_statement(statement):
                rows, statement = [list(row) for row in con.execute(statement)], ""
    return rows


def need(*tools: str) -> None:
    """Skip a test that is about programs which this machine does not have."""
    for tool in tools:
        if not shutil.which(tool):
            pytest.skip(f"needs {tool}, which is not installed")


def shell(place: Place, name: str, text: str, *options: str) -> None:
    """A handler that is a few words of sh."""
    place.handler(name, *options, "--", "sh", "-c", text)


def alive(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


class Result:
    """What a call of the command left: status, stdout, stderr."""

    def __init__(self, done: subprocess.CompletedProcess[bytes]):
        self.status = done.returncode
        self.raw_out, self.raw_err = done.stdout, done.stderr
        self.out, self.err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def error(self) -> dict[str, str]:
        """The error object of a call with --json."""
        return dict(json.loads(self.err)["error"])


class Place:
    """A database of its own in a temporary directory, and the ways to use it."""

    def __init__(self, folder: Path):
        self.folder, self.db = folder, folder / "grace.db"
        self.environment = {**own_environment(), "GRACE_DB": str(self.db), "HOME": str(folder)}
        self.processes: list[subprocess.Popen[bytes]] = []

    def call(self, *words: str | bytes, stdin: bytes | None = None, env: dict[str, str] | None = None, cwd: Path | None = None,
             timeout: float = LIMIT) -> Result:  # fmt: skip
        """Run `grace WORDS…` to its end, whatever its status."""
        return Result(subprocess.run([GRACE, *words], input=stdin if stdin is not None else b"", capture_output=True, timeout=timeout,
                                     env={**self.environment, **(env or {})}, cwd=cwd or self.folder, check=False))  # fmt: skip

    def ok(self, *words: str, stdin: bytes | None = None, env: dict[str, str] | None = None) -> Result:
        """Run it and insist on exit 0."""
        done = self.call(*words, stdin=stdin, env=env)
        assert done.status == 0, f"grace {' '.join(words)} ended {done.status}: {done.err}"
        return done

    def json(self, *words: str, stdin: bytes | None = None) -> Any:
        """The document of `grace WORDS… --json`."""
        return self.ok("--json", *words, stdin=stdin).json

    def handler(self, name: str, *options_and_command: str) -> None:
        self.ok("handler", "add", name, *options_and_command)

    def submit(self, goal: str, *options: str) -> tuple[str, str]:
        """The ids of a new intent and its task."""
        done = self.json("submit-intent", goal, *options)
        return done["intent_id"], done["task_id"]

    def task(self, task_id: str) -> dict[str, Any]:
        return dict(self.json("task", "show", task_id))

    def intent(self, intent_id: str) -> dict[str, Any]:
        return dict(self.json("intent", "show", intent_id))

    def events(self, topic: str = "*", limit: int = 10_000) -> list[dict[str, Any]]:
        """All events so far, in order."""
        return list(self.json("events", "--topic", topic, "--since", "1d", "--limit", str(limit)))

    def until_status(self, task_id: str, *statuses: str) -> dict[str, Any]:
        """The task once it has one of these statuses."""
        def reached() -> dict[str, Any] | None:
            task = self.task(task_id)
            return task if task["status"] in statuses else None

        return dict(until(reached, f"{task_id} to be {' or '.join(statuses)}"))

    def start(self, *words: str, env: dict[str, str] | None = None, **settings: Any) -> subprocess.Popen[bytes]:
        """Start `grace WORDS…` in the background; it is killed at the end of the test if it still runs."""
        process = subprocess.Popen([GRACE, *words], env={**self.environment, **(env or {})}, cwd=self.folder,
                                   **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **settings})  # fmt: skip
        self.processes.append(process)
        return process

    @contextlib.contextmanager
    def daemon(self, *options: str, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
        """A daemon that is ready, and stopped with TERM at the end."""
        with open(self.folder / "daemon.log", "ab") as log:
            process = self.start("daemon", *options, env=env, stdout=log, stderr=log)
        until(lambda: any(row["pid"] == process.pid for row in self.json("status")["workers"]), "the daemon to be ready")
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(LIMIT)

    def sql(self, text: str) -> list[list[Any]]:
        """What the system's own sqlite3 shell says; where there is none, Python's library in its place."""
        if not shutil.which("sqlite3"):
            return by_library(self.db, text)
        done = subprocess.run(["sqlite3", "-json", str(self.db), text], capture_output=True, check=True, text=True)
        return [list(row.values()) for row in json.loads(done.stdout)] if done.stdout.strip() else []

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream:
                    stream.close()
        self.end_leftovers()

    def end_leftovers(self) -> None:
        """What a failed test has left running on its own database: its handlers and their children."""
        mark = f"GRACE_DB={self.folder}/".encode()
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if any(variable.startswith(mark) for variable in (entry / "environ").read_bytes().split(b"\0")):
                    os.kill(int(entry.name), signal.SIGKILL)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A fresh database; whatever was started on it is ended."""
    here = Place(tmp_path)
    yield here
    here.close()


@pytest.fixture(scope="session")
def module() -> Any:
    return load_module()
