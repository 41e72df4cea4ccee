"""What the measurements stand on: the machine's facts, timed processes, daemons, filled databases, and medians.

Everything lives in one temporary directory on a real disk and is removed at the end. Only processes that were started
here are ever ended, by their own pid.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib
import importlib.util
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apsw

GRACE = str(Path(sys.executable).parent / "grace")
UNIT = [sys.executable, "-c", "import click, apsw"]
TABLE_OF_D = "CREATE TABLE t (id INTEGER PRIMARY KEY, name TEXT, body TEXT) STRICT"
INSERT_OF_D = "INSERT INTO t (name, body) VALUES (?, ?)"
STAMP_C = r"""
#include <fcntl.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>
int main(int argc, char **argv) {
  struct timespec t;
  char text[32];
  clock_gettime(CLOCK_REALTIME, &t);
  if (argc < 2) return 0;
  int fd = open(argv[1], O_WRONLY | O_CLOEXEC);
  int n = snprintf(text, sizeof text, "%lld\n", t.tv_sec * 1000000000LL + t.tv_nsec);
  return fd < 0 || write(fd, text, n) != n;
}
"""
STAMP_PYTHON = "import sys, time; now = time.time_ns(); len(sys.argv) > 1 and open(sys.argv[1], 'w').write(f'{now}\\n')"


def say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def load_module() -> Any:
    """The installed module; the measurements of an editable install or of a loose file would be those of another program."""
    sys.path[:] = [folder for folder in sys.path if not os.path.exists(os.path.join(folder or ".", "grace.py"))]
    try:
        module = importlib.import_module("grace.grace")
    except ImportError:
        raise SystemExit("grace is not installed for this interpreter; run: pip install .") from None
    if not str(module.__file__).startswith(sys.prefix):
        raise SystemExit(f"grace is installed editable ({module.__file__}); run: pip install .")
    return module


def environment() -> dict[str, str]:
    """Ours, without what would lead grace elsewhere."""
    unwanted = ("GRACE_", "XDG_", "NOTIFY_", "WATCHDOG_", "PYTHON")
    return {key: value for key, value in os.environ.items() if not key.startswith(unwanted)}


def median(values: list[float]) -> float:
    return statistics.median(values)


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def digits(value: Any) -> Any:
    """Numbers to four digits, in whatever they are nested."""
    if isinstance(value, dict):
        return {key: digits(item) for key, item in value.items()}
    if isinstance(value, list):
        return [digits(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return value


def interleaved(rounds: int, what: str, measures: dict[str, Callable[[], Any]]) -> dict[str, list[Any]]:
    """Each measure once a round, so that the machine's moods fall on all of them; one unrecorded round before."""
    results: dict[str, list[Any]] = {name: [] for name in measures}
    for number in range(rounds + 1):
        for name, measure in measures.items():
            value = measure()
            if number:
                results[name].append(value)
    say(f"  {what}: {rounds} rounds")
    return results


def timed(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def timed_process(argv: list[str], stdin: str = os.devnull) -> float:
    return process_times(argv, stdin)[0]


def process_times(argv: list[str], stdin: str = os.devnull) -> tuple[float, float]:
    """Seconds from the start of a process to its end, its output read from a pipe as in a pipeline; and its CPU seconds."""
    read_end, write_end = os.pipe()
    actions = [(os.POSIX_SPAWN_OPEN, 0, stdin, os.O_RDONLY, 0), (os.POSIX_SPAWN_DUP2, write_end, 1)]
    surroundings = environment()
    start = time.perf_counter()
    pid = os.posix_spawn(argv[0], argv, surroundings, file_actions=actions)
    os.close(write_end)
    while os.read(read_end, 1 << 16):
        pass
    _, status, usage = os.wait4(pid, 0)
    seconds = time.perf_counter() - start
    os.close(read_end)
    if status:
        raise SystemExit(f"{' '.join(argv)} ended with status {os.waitstatus_to_exitcode(status)}")
    return seconds, usage.ru_utime + usage.ru_stime


def spawn_and_wait(program: list[str], n: int, parallel: int) -> float:
    """The bare loop: n processes of the same program, so many at once, nothing captured or recorded; seconds."""
    surroundings = environment()
    actions = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    running = 0
    start = time.perf_counter()
    for _ in range(n):
        if running == parallel:
            os.wait()
            running -= 1
        os.posix_spawn(program[0], program, surroundings, file_actions=actions)
        running += 1
    for _ in range(running):
        os.wait()
    return time.perf_counter() - start


class Rig:
    """The directory of one run, the module, and the sizes."""

    def __init__(self, module: Any, quick: bool, fills: str | None):
        import tempfile

        self.g, self.quick = module, quick
        self.folder = tempfile.mkdtemp(prefix="grace-bench-", dir=os.environ.get("GRACE_BENCH_DIR") or os.getcwd())
        self.fills = os.path.abspath(fills) if fills else os.path.join(self.folder, "fills")
        os.makedirs(self.fills, exist_ok=True)
        self.million = 100_000 if quick else 1_000_000
        self.rounds = 3 if quick else 5
        self.starts = 7 if quick else 30
        self.daemons: list[subprocess.Popen[bytes]] = []
        self._names = 0
        self._stamp: list[str] = []
        self._d: apsw.Connection | None = None

    def close(self) -> None:
        for daemon in self.daemons:
            end(daemon)
        shutil.rmtree(self.folder, ignore_errors=True)

    def vault(self, store: Any) -> tuple[Any, Any]:
        """A vault of one approver with one secret of medium risk, `bench`; the vault, and the approver unlocked."""
        g, passphrase = self.g, b"of this run alone"
        os.environ["XDG_CONFIG_HOME"] = os.path.join(self.folder, "config")
        store.write(lambda tx: g.set_setting(tx, "vault.argon2_memory", g.KDF_FLOOR << 10))
        g.make_vault(store, "bench", passphrase)
        vault = g.Vault(store)
        approver = g.Approver("bench", vault.folder, vault.id, passphrase).meet(store.all(g.ROSTERS))
        made = g.seal(approver.keys, g.next_header(vault.id, vault.roster, "bench", None, 1, {}, g.clock()), b"a value to open", vault.roster)
        store.write(lambda tx: g.store_version(tx, made, "stored", approver))
        return vault, approver

    def wish(self, key: str) -> dict[str, Any]:
        """What a request for a secret takes."""
        return dict(self.g.ask_spec(key, "use", "to be measured", None, None, None, "{}", 600_000))

    def path(self, name: str) -> str:
        """A new name in the directory of this run."""
        self._names += 1
        return os.path.join(self.folder, f"{self._names}-{name}")

    # ---- the baseline

    def d_connection(self) -> apsw.Connection:
        if self._d is None:
            self._d = apsw.Connection(self.path("d.db"))
            self._d.pragma("journal_mode", "wal")
            self._d.execute("PRAGMA synchronous = FULL")
            self._d.execute(TABLE_OF_D)
        return self._d

    def d_seconds(self, n: int = 200) -> float:
        """Seconds of one durable single-row insert, the mean of n."""
        con = self.d_connection()
        row = ("a name", "x" * 100)

        def insert() -> None:
            for _ in range(n):
                con.execute(INSERT_OF_D, row)

        return timed(insert) / n

    def fdatasync_ms(self, n: int = 200) -> float:
        """The median of writing a page and syncing it."""
        path = self.path("sync")
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.pwrite(fd, bytes(1 << 20), 0)
        os.fsync(fd)
        page = os.urandom(4096)
        times = []
        for number in range(n):
            os.pwrite(fd, page, number % 256 * 4096)
            times.append(timed(lambda: os.fdatasync(fd)))
        os.close(fd)
        os.unlink(path)
        return 1000 * median(times)

    # ---- databases

    def store(self, path: str) -> Any:
        return self.g.Store(path, "bench")

    def new_database(self, name: str, argv: list[str] | None = None, **handler: Any) -> str:
        """A fresh database with one handler called bench."""
        path = self.path(f"{name}.db")
        self.prepare(path, argv, **handler)
        return path

    def prepare(self, path: str, argv: list[str] | None, **handler: Any) -> None:
        store = self.store(path)
        row = {**self.g.HANDLER_DEFAULTS, "name": "bench", "argv": self.g.to_json(argv or ["/bin/true"]), "cwd": "/", **handler}
        store.write(lambda tx: self.g.put_handler(tx, row, True))
        settle_file(store)

    def specs(self, n: int) -> list[dict[str, Any]]:
        """Submissions as they come in practice: a context, a deadline, mixed priorities."""
        return [{"goal": f"bench goal number {number}", "handler": "bench", "sla_ms": 10 * self.g.HOUR + number,
                 "priority": ("normal", "high", "low", "normal")[number % 4], "context": '{"folder":"/srv/in","number":17}',
                 "created_by": "bench"} for number in range(n)]  # fmt: skip

    def submit(self, store: Any, n: int, durable: bool = True) -> Any:
        return store.write(lambda tx: self.g.submit(tx, self.specs(n)), durable=durable)

    def filled(self, kind: str, n: int, fill: Callable[[Any, int], None]) -> str:
        """A copy of a database with n tasks. The filled file is made once for each size and schema."""
        mark = hashlib.sha256((self.g.schema_text() + self.g.INSERT_TASK).encode()).hexdigest()[:8]
        kept = os.path.join(self.fills, f"{kind}-{n}-{mark}.db")
        if not os.path.exists(kept):
            say(f"  filling {n:,} {kind} tasks")
            self.prepare(kept + ".part", None, on_critical="none")
            store = self.store(kept + ".part")
            seconds = timed(lambda: fill(store, n))
            settle_file(store)
            for extra in Path(self.fills).glob(os.path.basename(kept) + ".part-*"):
                extra.unlink()
            os.rename(kept + ".part", kept)
            say(f"  filled in {seconds:.0f} s, {os.path.getsize(kept) >> 20} MiB")
        path = self.path(f"{kind}.db")
        shutil.copyfile(kept, path)
        os.sync()
        return path

    def queued(self, n: int) -> str:
        """A database with n queued tasks that were submitted the ordinary way, in large transactions."""
        return self.filled("queued", n, self._fill_queued)

    def _fill_queued(self, store: Any, n: int) -> None:
        for first in range(0, n, 10_000):
            self.submit(store, min(10_000, n - first), durable=False)

    def active(self, n: int) -> str:
        """A database with n running tasks far from their deadlines, their rows written directly."""
        return self.filled("active", n, self._fill_active)

    def _fill_active(self, store: Any, n: int) -> None:
        triggers = store.all("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger' AND tbl_name = 'htm_tasks'")
        for trigger in triggers:  # they refuse rows that start running, rightly
            store.con.execute(f'DROP TRIGGER "{trigger["name"]}"')
        for first in range(0, n, 10_000):
            store.write(lambda tx, first=first: self._insert_running(tx, first, min(10_000, n - first)), durable=False)
        for trigger in triggers:
            store.con.execute(trigger["sql"])

    def _insert_running(self, tx: Any, first: int, n: int) -> None:
        rows = []
        for number in range(first, first + n):
            row = self.g.task_row(tx, task_id=f"task_bench{number:012d}", task_type="bench", domain="general", handler="bench",
                                  goal=f"bench goal number {number}", payload="{}", priority="normal", max_attempts=3,
                                  sla_ms=100 * self.g.DAY + number)  # fmt: skip
            row["next_at"] = self.g.next_step_at({**row, "status": "running"}, self.g.MINUTE)
            tx.count(None, {**row, "status": "running"})
            rows.append(row)
        tx.many(self.g.INSERT_TASK, rows)
        tx.run("""UPDATE htm_tasks SET status = 'running', attempt_id = 'att_bench' || seq, assigned_worker = 'bench', attempt_number = 1,
          assigned_at = created_at, started_at = created_at, queue_time_ms = 0 WHERE status = 'queued'""")  # fmt: skip

    def finished(self, n: int) -> str:
        """A database with n tasks that ended in the last 90 days, by 20 handlers in 10 domains, their rows written directly; the rollups counted from them."""
        today = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d")  # they age
        return self.filled(f"finished-{today}", n, self._fill_finished)

    def _fill_finished(self, store: Any, n: int) -> None:
        triggers = store.all("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger' AND tbl_name = 'htm_tasks'")
        for trigger in triggers:  # they refuse rows that start ended, rightly
            store.con.execute(f'DROP TRIGGER "{trigger["name"]}"')
        chance = random.Random(n)
        for first in range(0, n, 50_000):
            store.write(lambda tx, first=first: self._insert_finished(tx, chance, first, min(50_000, n - first), n), durable=False)
        for trigger in triggers:
            store.con.execute(trigger["sql"])
        hour = self.g.clock() // self.g.HOUR * self.g.HOUR
        store.write(lambda tx: tx.run(self.g.SET_FOLDED_UNTIL, at=hour))
        say(f"  counted anew in {timed(lambda: store.write(self.g.recount_all)):.1f} s")

    def _insert_finished(self, tx: Any, chance: random.Random, first: int, n: int, total: int) -> None:
        """Busy at noon, quiet at night; each handler has a span of its own, with a long tail."""
        day, rows = self.g.DAY, []
        for number in range(first, first + n):
            kind, at = chance.randrange(20), tx.now - 90 * day + 90 * day * number // total
            at += -(at % day) + int(day * chance.triangular(0, 1, 0.55))
            at = at if at <= tx.now else chance.randrange(tx.now - tx.now % day, tx.now + 1)  # of today, what has been
            status = ("completed", "failed", "cancelled", "timeout")[chance.choices(range(4), (90, 6, 3, 1))[0]]
            ms, waited = int(chance.lognormvariate(5 + kind / 3, 1.2)), int(chance.expovariate(1 / 3000))
            met = None if status == "cancelled" else int(status == "completed" and waited + ms < 3_600_000)
            rows.append((f"task_bench{number:012d}", f"handler{kind}", f"domain{chance.randrange(10)}", f"handler{kind}", status, at - ms - waited, met,
                         at, ms, waited))  # fmt: skip
        tx.many("""INSERT INTO htm_tasks (task_id, task_type, domain, handler, status, created_at, queued_at, order_at, aged_at, sla_ms, sla_deadline, sla_met,
            sla_buffer_ms, finished_at, started_at, execution_time_ms, queue_time_ms, total_time_ms, goal, payload, priority, warn_at, critical_at,
            max_attempts, attempt_number, updated_at, updated_by)
          VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?6, ?6, ?6, 3600000, ?6 + 3600000, ?7, ?6 + 3600000 - ?8, ?8, ?8 - ?9, ?9, ?10, ?9 + ?10, 'a goal of the bench',
            '{"context":{"folder":"/srv/in"}}', 'normal', 0.8, 2.0, 3, 1, ?8, 'bench')""", rows)  # fmt: skip
        tx.many("""INSERT INTO outcome_records (task_id, action_type, handler, domain, success, execution_time, context, created_at)
          SELECT ?1, 'intent_' || ?3, ?2, ?3, ?5 = 'completed', ?9 / 1000.0, CASE ?5 WHEN 'completed' THEN '{"status":"completed","goal":"a goal of the bench"}'
            ELSE '{"status":"' || ?5 || '","reason":"' || ?5 || '","goal":"a goal of the bench"}' END, ?8""",
            [(*row[:5], None, None, row[7], row[8]) for row in rows])  # fmt: skip

    def start_tasks(self, tx: Any, slas: list[int]) -> list[dict[str, Any]]:
        """Submit a task for each SLA and have it running in the same transaction, so that only its ladder is left to a daemon."""
        done = self.g.submit(tx, [{"goal": "a task with a ladder", "handler": "bench", "sla_ms": sla} for sla in slas])
        return [self.g.start(tx, self.g.take(tx, one["task_id"], "bench"), None, None, None) for one in done]

    def end_tasks(self, tx: Any, tasks: list[dict[str, Any]]) -> None:
        for task in tasks:
            self.g.end_attempt(tx, task["task_id"], task["attempt_id"], {"outcome": "completed", "ended_by": "exit", "exit_status": 0})

    # ---- processes

    @contextlib.contextmanager
    def daemon(self, path: str, workers: int = 2) -> Iterator[subprocess.Popen[bytes]]:
        """A daemon that has reported ready and come to rest."""
        argv = [GRACE, "--db", path, "daemon", "--workers", str(workers)]
        daemon = subprocess.Popen(argv, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.daemons.append(daemon)
        try:
            store = self.store(path)
            give_up = time.monotonic() + 60
            while not store.one("SELECT 1 AS yes FROM workers WHERE pid = :pid AND stopped_at IS NULL", pid=daemon.pid):
                if daemon.poll() is not None or time.monotonic() > give_up:
                    raise SystemExit(f"the daemon did not start: {' '.join(argv)}")
                time.sleep(0.05)
            store.close()
            time.sleep(2)
            yield daemon
        finally:
            end(daemon)
            self.daemons.remove(daemon)

    def stamp_program(self) -> list[str]:
        """A small program that writes the time of its first instruction to the FIFO in its argument."""
        if not self._stamp:
            source, target = self.path("stamp.c"), self.path("stamp")
            Path(source).write_text(STAMP_C, encoding="ascii")
            compiler = shutil.which("gcc") or shutil.which("cc")
            flags = (["-static"], [])
            made = compiler and any(not subprocess.run([compiler, "-O2", *flag, "-o", target, source], capture_output=True, check=False).returncode
                                    for flag in flags)  # fmt: skip
            self._stamp = [target] if made else [sys.executable, "-S", "-c", STAMP_PYTHON]
            if not made:
                say("  no C compiler: the handler is Python, whose start-up is part of the figure")
        return self._stamp

    # ---- the machine

    def machine(self) -> dict[str, Any]:
        return {
            "cpu": cpu_model(), "cores": len(os.sched_getaffinity(0)), "kernel": platform.release(), "python": platform.python_version(),
            "apsw": apsw.apsw_version(), "sqlite": apsw.sqlite_lib_version(), "filesystem": filesystem_of(self.folder),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "load_before": os.getloadavg()[0],
            "fdatasync_median_ms": self.fdatasync_ms(), "grace": self.g.__version__, "quick": self.quick,
        }  # fmt: skip


def settle_file(store: Any) -> None:
    """Close a database with everything in its main file, ready to be copied."""
    busy, _, _ = store.con.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()[0]
    if busy:
        raise SystemExit("the write-ahead log could not be emptied")
    store.close()


def end(process: subprocess.Popen[bytes]) -> None:
    """TERM, and KILL for whoever does not hear it."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(45)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def cpu_model() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def filesystem_of(folder: str) -> str:
    """The type of the file system that holds a folder, from the longest mount point that leads to it."""
    best = ("", "unknown")
    with contextlib.suppress(OSError), open("/proc/self/mounts", encoding="utf-8") as file:
        for line in file:
            _, point, kind, *_ = line.split()
            inside = point in ("/", folder) or folder.startswith(point + "/")
            if inside and len(point) >= len(best[0]):
                best = (point, kind)
    if best[1] == "tmpfs":
        say("  the directory lies on tmpfs, where a sync costs nothing: set GRACE_BENCH_DIR to a directory on a disk")
    return best[1]


def cpu_seconds(pid: int) -> float:
    """CPU time of a process, to the nanosecond, all its threads together."""
    total = 0
    for thread in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{thread}/schedstat", encoding="ascii") as file:
            total += int(file.read().split()[0])
    return total / 1e9


def memory_mb(pid: int) -> dict[str, float]:
    """Resident, peak and proportional memory in millions of bytes."""
    found = {}
    for source, names in (("status", {"VmRSS": "rss", "VmHWM": "peak"}), ("smaps_rollup", {"Pss": "pss"})):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/{source}", encoding="ascii") as file:
            for line in file:
                name, _, rest = line.partition(":")
                if name in names:
                    found[names[name]] = int(rest.split()[0]) * 1024 / 1e6
    return found
