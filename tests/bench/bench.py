"""The benchmarks of grace: one JSON object on stdout, progress on stderr.

    pip install .                                       (not editable: bytecode must come from the cache)
    python tests/bench/bench.py [--quick] [--fills DIR] [ROW …]

Every figure stands beside a baseline of the same run, interleaved with it: U is the whole process `python -c 'import
click, apsw'`, D one durable single-row insert with apsw. Databases are made in a temporary directory below
$GRACE_BENCH_DIR, or else below the current directory. `--quick` is for trying out; `--fills` keeps the large databases
for the next run. No figure is asserted: `reached` says whether the target was met in this run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import rig as r
from floor import Floor

Result = dict[str, Any]
ROWS: dict[str, Callable[[r.Rig], list[Result]]] = {}
COMPLETED = {"outcome": "completed", "ended_by": "exit", "exit_status": 0}


def row(name: str) -> Callable[[Callable[[r.Rig], list[Result]]], Callable[[r.Rig], list[Result]]]:
    """Declare a row of the table; the function returns one result for each line of it."""

    def declare(fn: Callable[[r.Rig], list[Result]]) -> Callable[[r.Rig], list[Result]]:
        ROWS[name] = fn
        return fn

    return declare


def result(name: str, values: Result, baseline: Result | None, ratio: float | None, target: str, reached: bool) -> Result:
    return {"name": name, "values": values, "baseline": baseline, "ratio": ratio, "target": target, "reached": bool(reached)}


# ---- whole processes


def against_unit(rig: r.Rig, name: str, most: float, argv: list[str]) -> Result:
    """A command's whole process against U: elapsed time, and CPU time, which a busy machine disturbs less."""
    times = r.interleaved(rig.starts, name, {"unit": lambda: r.process_times(r.UNIT), "command": lambda: r.process_times(argv)})
    (unit, unit_cpu), (command, cpu) = ([r.median(list(column)) for column in zip(*times[key], strict=True)] for key in ("unit", "command"))
    return result(name, {"ms": 1000 * command, "cpu_ms": 1000 * cpu, "cpu_ratio": cpu / unit_cpu}, {"U_ms": 1000 * unit, "U_cpu_ms": 1000 * unit_cpu},
                  command / unit, f"≤ {most} U", command / unit <= most)  # fmt: skip


@row("submit")
def submit_process(rig: r.Rig) -> list[Result]:
    path = rig.new_database("submit")
    argv = [r.GRACE, "--db", path, "submit-intent", "Back up the shop", "--handler", "bench", "--sla", "1h"]
    return [against_unit(rig, "submit-intent, whole process", 1.2, argv)]


@row("lists")
def list_processes(rig: r.Rig) -> list[Result]:
    """Lists of a database with fifty tasks, twenty of them past their deadline, and a vault with five requests that wait."""
    path = rig.new_database("lists", on_critical="none")
    store = rig.store(path)
    rig.submit(store, 30)
    store.write(lambda tx: rig.start_tasks(tx, [1] * 20))
    time.sleep(0.02)
    store.write(rig.g.sweep)
    vault, _ = rig.vault(store)
    for _ in range(5):
        rig.g.Asking(vault, rig.wish("bench"))
    store.close()
    found = []
    for words in ("task list", "violations", "consent pending"):
        for most, form in ((1.3, ["--json"]), (1.7, [])):
            name = f"{words}{' --json' if form else ', table'}, whole process"
            found.append(against_unit(rig, name, most, [r.GRACE, "--db", path, *words.split(), *form]))
    return found


@row("consent")
def consent_protocol(rig: r.Rig) -> list[Result]:
    """Sealing, approving and opening with the hybrid suite: the mathematics alone, without passphrase and database."""
    g, store = rig.g, rig.store(rig.new_database("consent"))
    vault, approver = rig.vault(store)
    fields = g.next_header(vault.id, vault.roster, "measured", None, 1, {}, 1)
    value = os.urandom(40)
    asking = g.Asking(vault, rig.wish("bench"))
    case = store.write(lambda tx: g.build_case(tx, asking.consent_id, "bench"))
    review = g.Review(approver, case, g.clock())
    signed = [review.sign("user", g.clock())]
    grant = g.grant_of(signed[0]["document"])

    def open_one() -> None:
        shares = {"user": {1: asking.keys.unwrap(g.from_b64(signed[0]["wrap"], "a part"), g.statement("grant", grant))}}
        g.open_value(asking.header, bytes(asking.entry["sealed"]), shares)

    def approve_one() -> None:
        g.Review(approver, case, g.clock()).sign("user", g.clock())

    steps = {"seal": lambda: g.seal(approver.keys, fields, value, vault.roster), "approve": approve_one, "open": open_one}
    times = {name: 1000 * r.median([r.timed(step) for _ in range(50 if rig.quick else 300)]) for name, step in steps.items()}
    store.close()
    return [result(f"consent: {name}", {"ms": ms}, None, None, "≤ 2 ms", ms <= 2) for name, ms in times.items()]


@row("batch")
def batch_process(rig: r.Rig) -> list[Result]:
    """A batch against a bare script that parses the same lines and inserts a row for each in one durable transaction."""
    n = 5_000 if rig.quick else 50_000
    lines = rig.path("lines")
    with open(lines, "w", encoding="utf-8") as file:
        for number in range(n):
            file.write(json.dumps({"goal": f"Thumbnail picture {number}", "handler": "bench", "sla": "2h", "priority": "low",
                                   "context": {"folder": "/srv/pictures", "number": number}}) + "\n")  # fmt: skip
    bare = (f"import sys, json, apsw\ncon = apsw.Connection(sys.argv[1])\ncon.pragma('journal_mode', 'wal')\n"
            f"con.execute('PRAGMA synchronous = FULL')\ncon.execute({r.TABLE_OF_D!r})\n"
            f"with con: con.executemany({r.INSERT_OF_D!r}, ((v['goal'], json.dumps(v)) for v in map(json.loads, sys.stdin)))\n")  # fmt: skip

    def settled(argv: list[str]) -> float:
        os.sync()  # what the run before has left to write is not this one's
        return r.timed_process(argv, lines)

    times = r.interleaved(rig.rounds, "batch", {
        "bare": lambda: settled([sys.executable, "-c", bare, rig.path("bare.db")]),
        "grace": lambda: settled([r.GRACE, "--db", rig.new_database("batch"), "submit-intent", "--batch", "-"])})  # fmt: skip
    rate, bare_rate = n / r.median(times["grace"]), n / r.median(times["bare"])
    return [result(f"submit-intent --batch - with {n:,} lines, whole process", {"intents_per_s": rate}, {"bare_rows_per_s": bare_rate},
                   rate / bare_rate, "≥ 25,000 intents/s", rate >= 25_000)]  # fmt: skip


# ---- in process


@row("submit-in-process")
def submit_in_process(rig: r.Rig) -> list[Result]:
    n = 100 if rig.quick else 300
    store = rig.store(rig.new_database("in-process"))
    spec = rig.specs(1)

    def submit_all() -> None:
        for _ in range(n):
            store.write(lambda tx: rig.g.submit(tx, spec))

    floor = Floor(rig)
    times = r.interleaved(rig.rounds, "submit in process", {"d": lambda: rig.d_seconds(n), "submit": lambda: r.timed(submit_all) / n,
                                                            "floor": lambda: floor.submit(n)})  # fmt: skip
    store.close()
    floor.close()
    d, submit, bare = (r.median(times[name]) for name in ("d", "submit", "floor"))
    values = {"per_s": 1 / submit, "ms": 1000 * submit, "floor_ms": 1000 * bare, "floor_ratio": d / bare}
    return [result("submit in process", values, {"D_per_s": 1 / d, "D_ms": 1000 * d}, d / submit, "≥ 0.7 of D's rate", d / submit >= 0.7)]


def submitter(path: str, start: float, seconds: float) -> None:
    """One of many writers, in a process of its own: submits until the time is over, then tells how it went."""
    g = r.load_module()
    store = g.Store(path, "bench")
    spec = [{"goal": "one of many", "handler": "bench", "sla_ms": g.HOUR}]
    done, longest, errors = 0, 0.0, []
    time.sleep(max(0.0, start - time.time()))
    while time.time() < start + seconds:
        before = time.perf_counter()
        try:
            store.write(lambda tx: g.submit(tx, spec))
            done += 1
        except g.GraceError as error:
            errors.append(error.message)
        longest = max(longest, time.perf_counter() - before)
    print(json.dumps({"done": done, "longest": longest, "errors": errors}))


@row("writers")
def many_writers(rig: r.Rig) -> list[Result]:
    """All at once for ten seconds; D before and after."""
    writers, seconds = (8, 3.0) if rig.quick else (32, 10.0)
    path = rig.new_database("writers")
    before = rig.d_seconds()
    start = time.time() + 2 + writers * 0.15
    argv = [sys.executable, os.path.abspath(__file__), "--submitter", path, str(start), str(seconds)]
    processes = [subprocess.Popen(argv, env=r.environment(), stdout=subprocess.PIPE) for _ in range(writers)]
    reports = [json.loads(process.communicate()[0]) for process in processes]
    d = (before + rig.d_seconds()) / 2
    r.say("  writers: done")
    counts = [report["done"] for report in reports]
    errors = [error for report in reports for error in report["errors"]]
    mean, longest = sum(counts) / writers, max(report["longest"] for report in reports)
    values = {"errors": len(errors), "first_error": errors[0] if errors else None, "longest_wait_s": longest,
              "slowest_to_mean": min(counts) / mean if mean else 0.0, "per_s": sum(counts) / seconds}  # fmt: skip
    reached = not errors and longest < 0.5 and values["slowest_to_mean"] >= 0.5
    return [result(f"{writers} processes submitting for {seconds:g} s", values, {"D_per_s": 1 / d}, values["per_s"] * d,
                   "no error, longest wait < 0.5 s, slowest ≥ half the mean", reached)]  # fmt: skip


class Queue:
    """Claiming and completing as the daemon does, but without a process in between."""

    def __init__(self, rig: r.Rig, path: str):
        self.rig, self.g, self.store = rig, rig.g, rig.store(path)

    def _claim(self, tx: Any, n: int) -> list[Any]:
        claimed = self.g.claim(tx, "bench", n)
        if len(claimed) != n:
            raise SystemExit(f"claimed {len(claimed)} tasks instead of {n}")
        return [self.g.start(tx, task, 1, 1, "boot") for task in claimed]

    def _end(self, tx: Any, tasks: list[Any]) -> None:
        for task in tasks:
            self.g.end_attempt(tx, task["task_id"], task["attempt_id"], COMPLETED)

    def work(self, batches: int, size: int) -> float:
        """Claim and start so many in one transaction, end them in a durable one; seconds for each task."""

        def work() -> None:
            for _ in range(batches):
                tasks = self.store.write(lambda tx: self._claim(tx, size), durable=False)
                self.store.write(lambda tx: self._end(tx, tasks))  # noqa: B023 (called at once)

        seconds = r.timed(work) / (batches * size)
        self.rig.submit(self.store, batches * size, durable=False)  # the depth stays what it was
        return seconds

    def chain(self, n: int) -> float:
        """One by one as a busy daemon does: ending one and claiming the next in one durable transaction; seconds for each."""

        def next_one(tx: Any, ended: list[Any]) -> list[Any]:
            self._end(tx, ended)
            return self._claim(tx, 1)

        def work() -> None:
            tasks: list[Any] = []
            for _ in range(n):
                tasks = self.store.write(lambda tx: next_one(tx, tasks))  # noqa: B023 (called at once)
            self.store.write(lambda tx: self._end(tx, tasks))

        seconds = r.timed(work) / n
        self.rig.submit(self.store, n, durable=False)
        return seconds


@row("claim")
def claim_and_complete(rig: r.Rig) -> list[Result]:
    few, many = Queue(rig, rig.queued(1_000)), Queue(rig, rig.queued(rig.million))
    singles, batches = (50, 2) if rig.quick else (200, 10)
    measures: dict[str, Callable[[], float]] = {"d": rig.d_seconds}
    for name, queue in (("few", few), ("many", many)):
        measures[f"single_{name}"] = lambda queue=queue: queue.work(singles, 1)
        measures[f"batch_{name}"] = lambda queue=queue: queue.work(batches, rig.g.CLAIM_BATCH)
        measures[f"chain_{name}"] = lambda queue=queue: queue.chain(singles)
    floor = Floor(rig)
    measures["single_floor"] = lambda: floor.work(singles, 1)
    measures["batch_floor"] = lambda: floor.work(batches, rig.g.CLAIM_BATCH)
    times = {name: r.median(values) for name, values in r.interleaved(rig.rounds, "claim and complete", measures).items()}
    few.store.close()
    many.store.close()
    floor.close()
    found = []
    for kind, least, how in (("single", 0.5, "one by one"), ("batch", 5.0, f"in batches of {rig.g.CLAIM_BATCH}")):
        small, large, d = times[f"{kind}_few"], times[f"{kind}_many"], times["d"]
        values = {"per_s_at_1,000": 1 / small, f"per_s_at_{rig.million:,}": 1 / large, "flatness": large / small,
                  "floor_ms": 1000 * times[f"{kind}_floor"], "floor_ratio": d / times[f"{kind}_floor"]}  # fmt: skip
        if kind == "single":
            values["one_transaction_each_to_D_at_1,000"] = d / times["chain_few"]
            values[f"one_transaction_each_to_D_at_{rig.million:,}"] = d / times["chain_many"]
        ratio = d / max(small, large)  # the slower of both
        found.append(result(f"claim + complete without a process, {how}", values, {"D_per_s": 1 / d}, ratio,
                            f"≥ {least:g} D, flat within 1.5× from 1,000 queued on", ratio >= least and large / small <= 1.5))  # fmt: skip
    return found


# ---- figures

EXACT = "SELECT execution_time_ms AS ms FROM htm_tasks WHERE status = 'completed' AND finished_at >= :since ORDER BY execution_time_ms"


def percentile_error(rig: r.Rig, store: Any, window: int) -> float:
    """How far, at most, a percentile of the dashboard is from the exact one of the raw rows."""
    since = (rig.g.clock() - window) // rig.g.HOUR * rig.g.HOUR
    exact, found = [row["ms"] for row in store.all(EXACT, since=since)], rig.g.statistics_of(store, window)
    return max(abs(found[f"p{part}_execution_ms"] / exact[-(-part * len(exact) // 100) - 1] - 1) for part in (50, 95, 99))


@row("stats")
def statistics_in_process(rig: r.Rig) -> list[Result]:
    """`dashboard stats` with many queued, and with many more finished in ninety days of twenty handlers and ten domains."""
    g, found = rig.g, []
    cases = [("queued", rig.million, rig.queued), ("finished", rig.million, rig.finished)]
    cases += [] if rig.quick else [("finished", 10 * rig.million, rig.finished)]
    for kind, n, fill in cases:
        store = rig.store(fill(n))
        windows = {"1d": g.DAY, "30d": 30 * g.DAY, "90d": 90 * g.DAY}
        measures: dict[str, Callable[[], Any]] = {"d": rig.d_seconds}
        for name, window in windows.items():
            measures[name] = lambda store=store, window=window: r.median([r.timed(lambda: g.statistics_of(store, window)) for _ in range(20)])
        measures["health"] = lambda store=store: r.median([r.timed(lambda: g.health_document(store)) for _ in range(20)])
        measures["metrics"] = lambda store=store: r.median([r.timed(lambda: g.prometheus_text(store, g.DAY)) for _ in range(5)])
        measures["hourly"] = lambda store=store: r.median([r.timed(lambda: g.hourly_documents(store, 24)) for _ in range(5)])
        measures["slow"] = lambda store=store: r.median([r.timed(lambda: g.slow_document(store, g.DAY, 10)) for _ in range(5)])
        times = {name: r.median(values) for name, values in r.interleaved(rig.rounds, f"stats, {n:,} {kind}", measures).items()}
        values = {"ms": 1000 * times["1d"], "ms_30d": 1000 * times["30d"], "ms_90d": 1000 * times["90d"], "health_ms": 1000 * times["health"],
                  "metrics_ms": 1000 * times["metrics"], "hourly_ms": 1000 * times["hourly"], "slow_ms": 1000 * times["slow"]}  # fmt: skip
        errors = {name: percentile_error(rig, store, window) for name, window in windows.items()} if kind == "finished" else {}
        values.update({f"percentile_error_{name}": error for name, error in errors.items()})
        store.close()
        found.append(result(f"dashboard stats in process, {n:,} {kind}", values, {"D_ms": 1000 * times["d"]}, times["1d"] / times["d"],
                            "≤ 10 ms, percentile error ≤ 2.5 %", times["1d"] <= 0.01 and max(errors.values(), default=0) <= 0.025))  # fmt: skip
    return found


# ---- latency


@row("latency")
def start_latency(rig: r.Rig) -> list[Result]:
    """From the call that submits to the handler's first instruction, one at a time, with a daemon at rest."""
    n = 40 if rig.quick else 200
    fifo = rig.path("fifo")
    os.mkfifo(fifo)
    path = rig.new_database("latency", [*rig.stamp_program(), fifo])
    reader = os.open(fifo, os.O_RDWR)
    whole, after_commit, d = [], [], []
    with rig.daemon(path):
        store = rig.store(path)
        for number in range(n + 5):
            spec = rig.specs(1)
            before = time.time_ns()
            done = store.write(lambda tx: rig.g.submit(tx, spec))  # noqa: B023 (called at once)
            committed = time.time_ns()
            started = int(os.read(reader, 64))
            while rig.g.get_task(store, done[0]["task_id"])["status"] != "completed":
                time.sleep(0.005)
            if number >= 5:
                whole.append((started - before) / 1e6)
                after_commit.append((started - committed) / 1e6)
                d.append(1000 * rig.d_seconds(1))
            time.sleep(random.uniform(0.02, 0.06))
        store.close()
    os.close(reader)
    r.say(f"  latency: {n} submissions")
    p50, p99 = r.median(whole), r.percentile(whole, 0.99)
    values = {"p50_ms": p50, "p99_ms": p99, "p50_ms_after_commit": r.median(after_commit), "p99_ms_after_commit": r.percentile(after_commit, 0.99),
              "handler": "compiled" if len(rig.stamp_program()) == 1 else "python"}  # fmt: skip
    return [result("submit → handler's first instruction, idle daemon", values, {"D_ms_p50": r.median(d), "D_ms_p99": r.percentile(d, 0.99)},
                   p50 / r.median(d), "p50 ≤ 5 ms, p99 ≤ 25 ms", p50 <= 5 and p99 <= 25)]  # fmt: skip


def ladder_lags(rig: r.Rig, path: str, tasks: int) -> tuple[list[float], list[float]]:
    """Milliseconds from the instant of each step to its noticing, and to its event in a follower's hands."""
    g = rig.g
    noticed, observed = [], []
    with rig.daemon(path):
        store = rig.store(path)
        bell = g.Bell(store)
        seen = store.value(g.LAST_EVENT)
        store.write(lambda tx: rig.start_tasks(tx, [2000 + 29 * number for number in range(tasks)]))
        give_up = time.monotonic() + 30 + 0.058 * tasks
        while len(observed) < 3 * tasks and time.monotonic() < give_up:
            bell.wait(0.5)
            events = g.events_after(store, seen, 0, "*", 10_000)
            now = time.time_ns()
            for event in events:
                seen = event["seq"]
                if event["topic"].startswith("htm.sla."):
                    payload = json.loads(event["payload"])
                    noticed.append(float(payload["noticed_at"] - payload["due_at"]))
                    observed.append(now / 1e6 - payload["due_at"])
        bell.close()
        store.close()
    if len(observed) < 3 * tasks:
        raise SystemExit(f"only {len(observed)} of {3 * tasks} steps were taken")
    return noticed, observed


@row("ladder")
def ladder_latency(rig: r.Rig) -> list[Result]:
    """Warning, violation and critical of a hundred tasks that come due one after the other, seen by a follower of the bus."""
    found = []
    for active in (1_000, rig.million):
        path = rig.active(active)
        d = 1000 * rig.d_seconds()
        noticed, observed = ladder_lags(rig, path, 30 if rig.quick else 100)
        r.say(f"  ladder: {len(observed)} steps with {active:,} active")
        p50, p99 = r.median(observed), r.percentile(observed, 0.99)
        values = {"p50_ms": p50, "p99_ms": p99, "p50_ms_noticed": r.median(noticed), "p99_ms_noticed": r.percentile(noticed, 0.99), "steps": len(observed)}
        found.append(result(f"SLA step → event committed and seen, {active:,} active", values, {"D_ms": d}, p50 / d, "p50 ≤ 5 ms, p99 ≤ 50 ms",
                            p50 <= 5 and p99 <= 50))  # fmt: skip
    return found


@row("sweep")
def sweep(rig: r.Rig) -> list[Result]:
    """Ten tasks come due at once; the same with a thousand and with a million others active."""
    g = rig.g
    stores = {"few": rig.store(rig.active(1_000)), "many": rig.store(rig.active(rig.million))}
    times: dict[str, list[float]] = {f"{what}_{name}": [] for what in ("instant", "find", "commit") for name in stores}
    d = []
    for number in range(2 * rig.rounds + 1):
        tasks = {name: store.write(lambda tx: rig.start_tasks(tx, [2000] * 10)) for name, store in stores.items()}
        time.sleep(1.62)
        for name, store in stores.items():
            instant = [r.timed(lambda store=store: g.next_instant(store)) for _ in range(20)]
            find = [r.timed(lambda store=store: store.con.execute(g.DUE, {"now": g.clock(), "n": g.SWEEP_BATCH}).fetchall()) for _ in range(20)]
            commit = r.timed(lambda store=store: store.write(lambda tx: (g.recover_expired(tx), g.sweep(tx))))
            if number:
                times[f"instant_{name}"].append(1000 * r.median(instant))
                times[f"find_{name}"].append(1000 * r.median(find))
                times[f"commit_{name}"].append(1000 * commit)
        for name, store in stores.items():
            levels = {g.get_task(store, task["task_id"])["escalation_level"] for task in tasks[name]}
            if levels != {1}:
                raise SystemExit(f"the sweep brought its tasks to the levels {levels} instead of 1")
            store.write(lambda tx, name=name: rig.end_tasks(tx, tasks[name]))  # noqa: B023 (called at once)
        d.append(1000 * rig.d_seconds(20))
    for store in stores.values():
        store.close()
    r.say(f"  sweep: {2 * rig.rounds} rounds")
    medians = {f"{name}_ms": r.median(values) for name, values in times.items()}
    growth = max(medians[f"{what}_many_ms"] / medians[f"{what}_few_ms"] for what in ("find", "commit"))
    reached = medians["find_many_ms"] <= 0.1 and medians["commit_many_ms"] <= 3 and growth <= 2
    return [result(f"sweep with {rig.million:,} active, 10 due", {**medians, "many_to_few": growth}, {"D_ms": r.median(d)},
                   medians["commit_many_ms"] / r.median(d), "≤ 0.1 ms to find, ≤ 3 ms with commit, within 2× of 1,000 active", reached)]  # fmt: skip


# ---- processes


def drain_seconds(rig: r.Rig, filled: str, workers: int, n: int) -> tuple[float, float]:
    """The whole process of a daemon that empties a queue; and the part from the first claim to the last end."""
    path = rig.path("drain.db")
    r.shutil.copyfile(filled, path)
    os.sync()
    seconds = r.timed_process([r.GRACE, "--db", path, "daemon", "--once", "--workers", str(workers)])
    store = rig.store(path)
    facts = store.one("SELECT COUNT(*) AS n, MAX(finished_at) - MIN(assigned_at) AS ms FROM htm_tasks WHERE status = 'completed'")
    store.close()
    if facts["n"] != n:
        raise SystemExit(f"{facts['n']} of {n} tasks completed")
    r.shutil.rmtree(path + "-logs", ignore_errors=True)
    return seconds, facts["ms"] / 1000


@row("drain")
def drain(rig: r.Rig) -> list[Result]:
    n = 300 if rig.quick else 2_000
    programs = {"silent": ["/bin/true"]}
    if not rig.quick:
        programs.update(talking=["/bin/echo", "one line"], tiny=rig.stamp_program())
    found = []
    for name, program in programs.items():
        filled = rig.new_database(f"drain-{name}", program)
        store = rig.store(filled)
        rig.submit(store, n)
        r.settle_file(store)
        for workers in (2, 4):
            times = r.interleaved(rig.rounds, f"drain, {name}, {workers} slots", {
                "bare": lambda: r.spawn_and_wait(program, n, workers),  # noqa: B023 (called at once)
                "alone": lambda: r.spawn_and_wait(program, n // 4, 1) * 4,  # noqa: B023
                "grace": lambda: drain_seconds(rig, filled, workers, n)})  # fmt: skip # noqa: B023
            bare, whole = r.median(times["bare"]), r.median([both[0] for both in times["grace"]])
            inner = r.median([both[1] for both in times["grace"]])
            alone = r.median(times["alone"])
            values = {"per_s": n / whole, "per_s_without_start_and_stop": n / inner, "ratio_without_start_and_stop": alone / inner,
                      "ratio_to_as_many_at_once": bare / whole}  # fmt: skip
            baseline = {"spawn_and_wait_per_s": n / alone, "as_many_at_once_per_s": n / bare}
            found.append(result(f"drain {n:,} of {os.path.basename(program[0])} ({name}), {workers} slots", values, baseline, alone / whole,
                                "≥ 0.75 of a bare spawn + wait loop", alone / whole >= 0.75))  # fmt: skip
    return found


@row("idle")
def idle_daemon(rig: r.Rig) -> list[Result]:
    """CPU time of a daemon with nothing to do, and its memory."""
    seconds = 15 if rig.quick else 120
    path = rig.new_database("idle")
    with rig.daemon(path) as daemon:
        time.sleep(3)
        memory = r.memory_mb(daemon.pid)
        before, start = r.cpu_seconds(daemon.pid), time.monotonic()
        time.sleep(seconds)
        used = (r.cpu_seconds(daemon.pid) - before) / (time.monotonic() - start) * 3600
        after = r.memory_mb(daemon.pid)
    r.say(f"  idle: {seconds} s")
    values = {"cpu_s_per_hour": used, "rss_mb": memory["rss"], "rss_mb_after": after["rss"], "peak_mb": after["peak"], "pss_mb": after.get("pss")}
    return [result("idle daemon", values, None, None, "≤ 2 CPU s an hour, ≤ 24 MB", used <= 2 and after["rss"] <= 24)]


def main() -> None:
    if sys.argv[1:2] == ["--submitter"]:
        submitter(sys.argv[2], float(sys.argv[3]), float(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], epilog=f"rows: {', '.join(ROWS)}")
    parser.add_argument("--quick", action="store_true", help="smaller sizes and fewer rounds")
    parser.add_argument("--fills", metavar="DIR", help="keep the large databases here for the next run")
    parser.add_argument("rows", nargs="*", metavar="ROW", help="only these")
    options = parser.parse_args()
    if unknown := [name for name in options.rows if name not in ROWS]:
        parser.error(f"unknown row {unknown[0]!r}; there are {', '.join(ROWS)}")
    rig = r.Rig(r.load_module(), options.quick, options.fills)
    for name in [name for name in os.environ if name not in r.environment()]:
        del os.environ[name]
    try:
        report: Result = {"machine": rig.machine(), "rows": []}
        for name in options.rows or ROWS:
            r.say(name)
            report["rows"] += ROWS[name](rig)
        report["machine"]["load_after"] = os.getloadavg()[0]
        print(json.dumps(r.digits(report), indent=1, ensure_ascii=False))
    finally:
        rig.close()


if __name__ == "__main__":
    main()
