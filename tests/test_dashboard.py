"""The dashboard: every figure as counted by hand over the raw tasks, health, watching, metrics, and counting anew."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import pty
import random
import re
import select
import signal
import stat
import struct
import subprocess
import termios
from collections import Counter
from collections.abc import Callable, Iterator
from fcntl import ioctl
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import GRACE, LIMIT, Place, shell, until
from tests.test_queue import Machine, brute_force

MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000
FINAL = ("completed", "failed", "timeout", "cancelled")


# ---- random histories, and the same figures by brute force


class History(Machine):
    """Machine over hours and days: several domains, runs of any length, a clock that steps back, runs that were imported."""

    def write(self, work: Callable[[Any], Any]) -> Any:
        self.now = max(self.now, 1_780_000_000_000)
        return super().write(work)

    def submit(self) -> None:
        spec = {"goal": "g", "handler": self.chance.choice(["work", "slow", "stoic"]), "priority": self.chance.choice(self.g.PRIORITIES),
                "domain": self.chance.choice(["shop", "mail", "general"]), "sla_ms": self.chance.choice([None, 10_000, MINUTE, HOUR])}  # fmt: skip
        self.expected[self.write(lambda tx: self.g.submit(tx, [spec]))[0]["task_id"]] = "queued"

    def end(self) -> None:
        self.now += self.chance.choice([0, 1, 7, round(self.chance.lognormvariate(8, 2.5))])
        super().end()

    def pass_time(self) -> None:
        """Mostly minutes and hours; now and then days, or back."""
        self.now += self.chance.choice([100, 5000, 20_000, 600_000, HOUR, 3 * HOUR, 30 * HOUR, -2 * HOUR, -40 * MINUTE])
        self.write(lambda tx: (self.g.recover_expired(tx), self.g.sweep(tx)))

    def bring_in(self) -> None:
        """A run from elsewhere, as an import records it: no task of ours, and no part of our figures."""
        at, ms, good = self.now - self.chance.randrange(3 * DAY), self.chance.randrange(100_000), int(self.chance.random() < 0.8)
        run = {"name": "old", "domain": "shop", "start": at - ms, "end": at, "success": bool(good), "confidence": None, "attempts": 2, "goal": None,
               "reason": None}  # fmt: skip
        run["id"] = self.g.past_id(run)

        def record(tx: Any) -> None:
            self.g.import_run(tx, run, self.g.fold_hours(tx, tx.now - tx.now % HOUR))

        self.write(record)

    def go(self, n: int) -> None:
        for _ in range(n):
            self.step()
            if self.chance.random() < 0.05:
                self.bring_in()


def ended_since(store: Any, since: int) -> list[dict[str, Any]]:
    """The raw tasks that ended in the full hour of `since` or later."""
    return list(store.all("SELECT * FROM htm_tasks WHERE finished_at IS NOT NULL AND finished_at >= :at ORDER BY seq", at=since - since % HOUR))


def ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def figures_by_hand(tasks: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts, ratios and averages of ended tasks."""
    status = Counter(task["status"] for task in tasks)
    failed, met = status["failed"] + status["timeout"], Counter(task["sla_met"] for task in tasks)
    runs = [task for task in tasks if task["status"] == "completed" and task["execution_time_ms"] is not None]
    buffers = [task["sla_buffer_ms"] for task in tasks if task["status"] == "completed" and task["sla_buffer_ms"] is not None]
    return {"completed": status["completed"], "failed": failed, "cancelled": status["cancelled"],
            "success": ratio(status["completed"], status["completed"] + failed), "compliance": ratio(met[1], met[1] + met[0]),
            "runs": sorted(task["execution_time_ms"] for task in runs), "buffer": ratio(sum(buffers), len(buffers)),
            **{name: ratio(sum(task[f"{name}_time_ms"] or 0 for task in runs), len(runs)) for name in ("queue", "execution", "total")}}  # fmt: skip


def check_percentile(found: float | None, runs: list[int], part: float) -> None:
    """Within 2.5 % of the exact nearest-rank percentile."""
    if not runs:
        assert found is None
        return
    exact = runs[math.ceil(part * len(runs) - 1e-9) - 1]
    assert found is not None and abs(found - exact) <= 0.025 * exact, (part, found, exact)


def check_window(g: Any, store: Any, now: int, window: int) -> None:
    found = store.read(lambda reader: g.queue_counters(reader, now, window))
    wanted = figures_by_hand(ended_since(store, now - window))
    shown = {"completed": "window_completed", "failed": "window_failed", "cancelled": "window_cancelled", "success": "window_success_rate",
             "compliance": "window_sla_compliance_rate", "buffer": "avg_buffer_ms", "queue": "avg_queue_time_ms", "execution": "avg_execution_time_ms",
             "total": "avg_total_time_ms"}  # fmt: skip
    assert {name: found[key] for name, key in shown.items()} == {name: wanted[name] for name in shown}, window
    for part in (50, 95, 99):
        check_percentile(found[f"p{part}_execution_ms"], wanted["runs"], part / 100)


def check_hours(g: Any, store: Any, since: int) -> None:
    by_hand: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for task in ended_since(store, since):
        by_hand.setdefault((task["finished_at"] - task["finished_at"] % HOUR, task["domain"]), []).append(task)
    found = {(row["starts_at"], row["domain"]): row for row in store.read(lambda reader: g.hourly_figures(reader, since - since % HOUR))}
    assert list(found) == sorted(by_hand)
    for key, tasks in by_hand.items():
        wanted, row = figures_by_hand(tasks), found[key]
        assert (row["total"], row["completed"], row["failed"], row["cancelled"]) == (len(tasks), wanted["completed"], wanted["failed"], wanted["cancelled"])
        assert (row["avg_execution_ms"], row["sla_compliance_rate"], row["success_rate"]) == (wanted["execution"], wanted["compliance"], wanted["success"])
        check_percentile(row["p95_execution_ms"], wanted["runs"], 0.95)


def check_slow(g: Any, store: Any, now: int, window: int) -> None:
    tasks = [task for task in ended_since(store, now - window) if task["status"] == "completed" and task["execution_time_ms"] is not None]
    wanted = sorted((task["execution_time_ms"] for task in tasks if task["task_type"] != "rescue"), reverse=True)[:5]
    assert [row["execution_time_ms"] for row in store.read(lambda reader: g.slowest_tasks(reader, now - window, 5))] == wanted


def check_metrics(g: Any, place: Place, store: Any) -> None:
    """What is counted for all time, by handler and by domain, as the parser of Prometheus reads it."""
    samples = metrics(g.prometheus_text(store, DAY))
    tasks = store.all("SELECT * FROM htm_tasks WHERE finished_at IS NOT NULL")
    assert {label[1]: value for (name, label), value in samples.items() if name == "grace_tasks_ended_total"} == {
        status: sum(task["status"] == status for task in tasks) for status in FINAL}  # fmt: skip
    for what in ("handler", "domain"):
        column = "task_type" if what == "handler" else what
        wanted = Counter((task[column], task["status"]) for task in tasks)
        found = {(label[1], label[3]): value for (name, label), value in samples.items() if name == f"grace_{what}_tasks_ended_total"}
        assert {key: value for key, value in found.items() if value} == wanted
    runs = [task for task in tasks if task["status"] == "completed" and task["execution_time_ms"] is not None]
    assert samples[("grace_execution_seconds_count", ())] == len(runs) == samples[("grace_execution_seconds_bucket", ("le", "+Inf"))]
    assert samples[("grace_execution_seconds_sum", ())] == pytest.approx(sum(task["execution_time_ms"] for task in runs) / 1000)
    for bound in (0.1, 5.0, 600.0):
        below = samples[("grace_execution_seconds_bucket", ("le", f"{bound:g}"))]
        assert sum(task["execution_time_ms"] < 980 * bound for task in runs) <= below <= sum(task["execution_time_ms"] <= 1020 * bound for task in runs)
    assert place.db.exists()


def check_everything(g: Any, place: Place, store: Any, now: int) -> None:
    for window in (1, HOUR, 5 * HOUR, DAY, 3 * DAY, 40 * DAY, g.MAX_DURATION):
        check_window(g, store, now, window)
        check_slow(g, store, now, window)
    for hours in (1, 24, 744):
        check_hours(g, store, now - (hours - 1) * HOUR)
    check_metrics(g, place, store)
    assert store.read(lambda reader: list(g.figure_findings(reader))) == []
    expected = brute_force(place.sql)
    counters = store.read(lambda reader: g.queue_counters(reader, now, g.MAX_DURATION))
    assert {name: counters[name] for name in expected} == expected


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_every_figure_is_as_counted_by_hand(place: Place, module: Any, seed: int) -> None:
    """After any history, and after counting anew, with and without damage: counts, hours, windows, percentiles, the slowest, the metrics."""
    history = History(module, place, seed)
    for _ in range(4):
        history.go(120)
        check_everything(module, place, history.store, history.now)
    store, before = history.store, history.now
    clean = store.write(module.recount_all)
    assert (clean["differences"], sum(clean["rows_changed"].values()), clean["only_raised"]) == ([], 0, False), "a sound database stays as it is"
    tallies = store.all("SELECT * FROM outcome_tallies ORDER BY starts_at, task_type, domain, kind, word")
    assert len({row["kind"] for row in tallies}) >= 2
    damage(store, history.chance)
    told = store.write(module.recount_all)
    assert store.all("SELECT * FROM outcome_tallies ORDER BY starts_at, task_type, domain, kind, word") == tallies
    assert told["differences"] and all(row["before"] != row["after"] for row in told["differences"]) and min(told["rows_changed"].values()) > 0
    check_everything(module, place, store, before)
    assert store.write(module.recount_all)["differences"] == []
    history.go(60)
    check_everything(module, place, store, history.now)
    store.close()


def damage(store: Any, chance: random.Random) -> None:
    """What a person with the sqlite3 shell could do to what is counted."""
    def spoil(tx: Any) -> None:
        for table, key in (("htm_metrics", "completed"), ("htm_durations", "n"), ("htm_histograms", "runs"), ("task_counts", "n"), ("outcome_tallies", "n")):
            tx.run(f"UPDATE {table} SET {key} = {key} + 3 WHERE rowid % 3 = {chance.randrange(3)}")
            tx.run(f"DELETE FROM {table} WHERE rowid % 4 = {chance.randrange(4)}")
        tx.run(f"UPDATE htm_histograms SET histogram = '[3, 7]', p95_ms = 1.0, longest = 3 WHERE rowid % 5 = {chance.randrange(5)}")
        tx.run("UPDATE counters SET value = value + 5 WHERE name IN ('sla_met', 'warnings_issued', 'sub_agents_spawned')")
        tx.run("DELETE FROM counters WHERE name IN ('sla_missed', 'tasks_recovered')")
        tx.run("INSERT INTO task_counts VALUES ('nobody', 'running', 'low', 0, 9)")

    store.write(spoil)


DAMAGED = ["5", "[]", "[3]", "{}", "[[1, 2]]", "[0, -5]", "[-300000000, 1]", "[100000, 1]", "[1, 2.5]", '[1, "2"]', "[1, 1e400]", f"[1, {'9' * 400}]"]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_histogram_is_named_keeps_nothing_from_ending_and_is_made_anew(place: Place, module: Any, text: str) -> None:
    """Whoever reads it is told what to do; doctor finds it; tasks go on to end; counting anew mends it."""
    history = History(module, place, 5)
    history.go(200)
    store = history.store

    def doctor_says() -> set[str]:
        return {row["code"] for row in place.call("doctor", "--json").json["findings"]}

    assert store.value("SELECT COUNT(*) AS n FROM htm_histograms") > 5 and "figures" not in doctor_says()
    store.write(lambda tx: tx.run("UPDATE htm_histograms SET histogram = :text", text=text))
    for words in (("stats", "--window", "3650d"), ("stats", "--prometheus"), ("slow", "--window", "3650d")):
        refused = place.call("dashboard", *words)
        assert refused.status == 8 and "histogram" in refused.err and "grace doctor --recount" in refused.err, words
    assert place.call("doctor").status == 1 and "figures" in doctor_says()
    ended = store.value("SELECT COUNT(*) AS n FROM htm_tasks WHERE finished_at IS NOT NULL")
    history.go(100)
    assert store.value("SELECT COUNT(*) AS n FROM htm_tasks WHERE finished_at IS NOT NULL") > ended
    assert "figures" in doctor_says()
    place.ok("doctor", "--recount")
    check_everything(module, place, store, history.now)
    assert "figures" not in doctor_says()
    store.close()


def test_counting_anew_never_lowers_what_may_be_gone(place: Place, module: Any) -> None:
    """Once finished tasks have been deleted, what they were counted in stays, and what is missing is still raised."""
    history = History(module, place, 9)
    history.go(300)
    store = history.store
    before = store.read(lambda reader: module.queue_counters(reader, history.now, module.MAX_DURATION))
    hours = store.read(lambda reader: module.hourly_figures(reader, 0))
    store.con.execute("PRAGMA foreign_keys = OFF")
    store.write(lambda tx: tx.run("DELETE FROM htm_tasks WHERE finished_at IS NOT NULL AND seq % 2 = 0"))
    store.write(lambda tx: tx.run("UPDATE counters SET value = 0 WHERE name = 'warnings_issued'"))
    told = store.write(module.recount_all)
    assert told["only_raised"] is True and {row["figure"] for row in told["differences"]} == {"total warnings_issued"}
    after = store.read(lambda reader: module.queue_counters(reader, history.now, module.MAX_DURATION))
    assert 0 < after.pop("warnings_issued") <= before.pop("warnings_issued")
    assert after == before and store.read(lambda reader: module.hourly_figures(reader, 0)) == hours
    store.close()


def test_long_counting_tells_that_it_goes_on(place: Place, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for a turn to write sees a sign of life, and does not take a long statement for one that hangs."""
    monkeypatch.setattr(module, "STEPS_OF_LIFE", 1000)
    with contextlib.closing(module.Store(str(place.db))) as store:
        store.write(lambda tx: None)
        ticket = place.folder / "grace.db-ticket"
        before = ticket.read_bytes()
        with store.showing_life():
            store.con.execute("WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 5000) SELECT SUM(i) FROM n").fetchall()
        assert before != ticket.read_bytes() and ticket.read_bytes().split()[0] == str(os.getpid()).encode()


def test_an_empty_database_has_figures(place: Place) -> None:
    """Zeros and nulls, no division by nothing; every dashboard, as JSON, as text, and as metrics."""
    stats = place.json("dashboard", "stats", "--window", "3650d")
    assert (stats["total_tasks"], stats["sla_compliance_rate"], stats["p95_execution_ms"], stats["longest_queued_ms"]) == (0, None, None, None)
    assert place.json("dashboard", "hourly") == [] == place.json("dashboard", "violations")
    slow = place.json("dashboard", "slow")
    assert (slow["running"], slow["completed"]) == ([], [])
    health = place.json("dashboard", "health")
    assert (health["status"], health["alerts"], health["uptime_ms"]) == ("healthy", [], None)
    for name in ("stats", "violations", "slow", "hourly", "health"):
        assert place.ok("dashboard", name).out.strip()
    assert len(place.ok("dashboard", "hourly", "--hours", "5").out.splitlines()) == 6
    assert metrics(place.ok("dashboard", "stats", "--prometheus").out)[("grace_tasks_queued", ())] == 0
    assert place.json("doctor", "--recount")["differences"] == []


def test_what_is_to_come_is_not_old(place: Place, module: Any) -> None:
    """The oldest queued task is the oldest that could run; a clock that was set back makes none younger than nothing."""
    place.handler("work", "--external")
    place.submit("later", "--handler", "work", "--in", "1h")
    assert (place.json("dashboard", "stats")["queued_tasks"], place.json("dashboard", "stats")["longest_queued_ms"]) == (1, None)
    place.submit("now", "--handler", "work")
    with contextlib.closing(module.Store(str(place.db))) as store:
        oldest = store.value(module.OLDEST_QUEUED)
        told = [store.read(lambda reader, now=oldest + ms: module.queue_counters(reader, now))["longest_queued_ms"] for ms in (-5000, 0, 70)]
    assert told == [0, 0, 70]


# ---- metrics


def metrics(text: str) -> dict[tuple[str, tuple[str, ...]], float]:
    """Each sample by its name and its labels, names and values in turn; the parser of prometheus-client reads the text."""
    found: dict[tuple[str, tuple[str, ...]], float] = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation and family.type in ("counter", "gauge", "histogram")
        for sample in family.samples:
            key = (sample.name, tuple(word for pair in sorted(sample.labels.items()) for word in pair))
            assert key not in found, f"{key} stands twice"
            found[key] = sample.value
            assert sample.name.startswith("grace_") and (family.type != "counter" or sample.name.endswith("_total"))
    assert found
    return found


def lively(place: Place) -> None:
    """Tasks that completed, failed, were cancelled, run, and wait."""
    place.handler("work", "--external", "--sla", "1h")
    for number in range(8):
        place.submit(f"goal {number}", "--handler", "work", "--domain", ("shop", "mail")[number % 2], "--priority", ("high", "low")[number % 2])
    for number in range(5):
        task = place.json("task", "claim", "--handler", "work", "--worker", "w")["task_id"]
        if number < 3:
            place.ok("task", "complete", task, "--worker", "w")
        elif number == 3:
            place.ok("task", "fail", task, "--worker", "w", "--error", "x", "--no-retry")
    place.ok("task", "cancel", place.submit("never", "--handler", "work")[1])


def test_metrics_say_what_the_json_says(place: Place) -> None:
    """The parser of prometheus-client accepts the text, and each figure of it is the document's, in base units."""
    lively(place)
    document, samples = place.json("dashboard", "stats"), metrics(place.ok("dashboard", "stats", "--prometheus").out)
    for metric, key in (("grace_tasks_active", "active_tasks"), ("grace_tasks_queued", "queued_tasks"), ("grace_sla_violations_total", "total_violations"),
                        ("grace_sla_compliance_ratio", "sla_compliance_rate"), ("grace_workers", "active_workers"),
                        ("grace_rescues_total", "sub_agents_spawned"), ("grace_window_success_ratio", "window_success_rate")):  # fmt: skip
        assert samples[(metric, ())] == document[key], metric
    assert {priority: samples[("grace_queue_depth", ("priority", priority))] for priority in document["queue_depths"]} == document["queue_depths"]
    assert document["queue_depths"] == {"critical": 0, "high": 0, "normal": 0, "low": 3}
    for status, n in (("completed", 3), ("failed", 1), ("cancelled", 1), ("timeout", 0)):
        assert samples[("grace_tasks_ended_total", ("status", status))] == n
    for part in (50, 95, 99):
        assert samples[("grace_window_execution_seconds", ("quantile", f"{part / 100:g}"))] == document[f"p{part}_execution_ms"] / 1000
    assert samples[("grace_window_average_total_time_seconds", ())] == document["avg_total_time_ms"] / 1000
    assert samples[("grace_handler_tasks", ("handler", "work", "status", "queued"))] == 3
    assert samples[("grace_queue_oldest_seconds", ())] >= document["longest_queued_ms"] / 1000


def test_label_values_are_escaped(place: Place, module: Any) -> None:
    """A domain with quotes, backslashes and newlines, as another program may have written it, comes back as it is; no more than fifty are told."""
    odd = 'a "quoted"\\ one\nand \\n more'
    place.handler("work", "--external")
    place.submit("g", "--handler", "work")
    with contextlib.closing(module.Store(str(place.db))) as store:
        for number in range(80):
            store.write(lambda tx, number=number: tx.run(
                module.ADD_METRICS, level="hour", starts_at=0, task_type="work", domain=odd if number == 79 else f"d{number}", imported=0,
                **{**dict.fromkeys(module.METRIC_SUMS, 0), "completed": number}))  # fmt: skip
    samples = metrics(place.ok("dashboard", "stats", "--prometheus").out)
    domains = {labels[1] for name, labels in samples if name == "grace_domain_tasks_ended_total"}
    assert odd in domains and len(domains) == 50
    assert samples[("grace_domain_tasks_ended_total", ("domain", odd, "status", "completed"))] == 79


def test_metrics_of_handlers_are_of_those_that_exist(place: Place, module: Any) -> None:
    """A label that anything else could fill would grow without end; commands in the foreground have no handler."""
    lively(place)
    with contextlib.closing(module.Store(str(place.db))) as store:
        store.write(lambda tx: tx.run("INSERT INTO task_counts VALUES ('', 'running', 'normal', 0, 1), ('gone', 'queued', 'normal', 0, 2)"))
        samples = metrics(module.prometheus_text(store, DAY))
    assert {labels[1] for name, labels in samples if name == "grace_handler_tasks"} == {"work"}


def test_metrics_are_written_to_a_file_whole_or_not_at_all(place: Place) -> None:
    """Readable for the collector, replaced in one step, and nothing left beside it; a file that cannot be written is one clear line."""
    lively(place)
    folder = place.folder / "collector"
    folder.mkdir()
    target = folder / "grace.prom"
    target.write_text("old")
    old = os.umask(0o077)
    try:
        with open(target, encoding="utf-8") as reader:
            assert place.ok("dashboard", "stats", "--prometheus", "--output", str(target)).out == ""
            assert reader.read() == "old", "whoever was reading it goes on with the old one"
    finally:
        os.umask(old)
    assert stat.S_IMODE(target.stat().st_mode) == 0o644 and metrics(target.read_text())[("grace_tasks_queued", ())] == 3
    assert [path.name for path in folder.iterdir()] == ["grace.prom"]
    plain = place.ok("dashboard", "stats", "--prometheus", "--output", str(folder / "metrics.txt"))
    assert ".prom" in plain.err and metrics((folder / "metrics.txt").read_text())
    for words in (["--output", str(target)], ["--prometheus", "--output", str(folder)], ["--prometheus", "--output", str(folder / "no" / "such.prom")],
                  ["--prometheus", "--json"]):  # fmt: skip
        done = place.call("dashboard", "stats", *words)
        assert (done.status, done.out) == (2, "") and ("grace: " in done.err or "error" in done.err)
    assert sorted(path.name for path in folder.iterdir()) == ["grace.prom", "metrics.txt"]


def test_metrics_are_written_to_what_is_no_file_and_through_a_link(place: Place) -> None:
    """A pipe is written to and stays a pipe, a link stays a link to what is replaced, stdout is stdout; a full disk is no wrong call."""
    lively(place)
    words = ("dashboard", "stats", "--prometheus", "--output")
    pipe, real, link = place.folder / "pipe.prom", place.folder / "real.prom", place.folder / "link.prom"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)  # else a file in its place would be waited for without end
    assert place.start(*words, str(pipe)).wait(LIMIT) == 0 and stat.S_ISFIFO(pipe.lstat().st_mode)
    assert metrics(os.read(reader, 1 << 20).decode())[("grace_tasks_queued", ())] == 3
    os.close(reader)
    real.write_text("old")
    link.symlink_to(real.name)
    place.ok(*words, str(link))
    assert link.is_symlink() and not real.is_symlink() and metrics(real.read_text())[("grace_tasks_queued", ())] == 3
    assert metrics(place.ok(*words, "/dev/stdout").out)[("grace_tasks_queued", ())] == 3
    log = place.folder / "log"
    log.write_text("before\n")
    with open(log, "ab") as out:
        assert place.start(*words, "/dev/stdout", stdout=out).wait(LIMIT) == 0
    assert log.read_text().startswith("before\n# HELP")
    full = place.folder / "full.prom"
    full.symlink_to("/dev/full")
    done = place.call(*words, str(full))
    assert (done.status, done.out) == (8, "") and "No space left" in done.err and "Traceback" not in done.err and full.is_symlink()


def test_metrics_for_a_reader_that_has_gone_end_quietly(place: Place) -> None:
    """As any output does: it is no wrong call."""
    link = place.folder / "link.prom"
    link.symlink_to("/dev/stdout")
    process = place.start("dashboard", "stats", "--prometheus", "--output", str(link))
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(LIMIT) == 141 and process.stderr.read() == b""


def test_metrics_that_do_not_fit_leave_nothing_behind(place: Place, module: Any) -> None:
    """The old file stays as it was, and nothing lies beside it."""
    lively(place)
    folder = place.folder / "collector"
    folder.mkdir()
    target = folder / "grace.prom"
    target.write_text("old")
    with contextlib.closing(module.Store(str(place.db))) as store:
        assert store.value("SELECT COUNT(*) FROM handlers") == 1  # so that the log and its index are there already
        limited = ["sh", "-c", 'ulimit -f 2; exec "$@"', "sh", GRACE, "dashboard", "stats", "--prometheus", "--output", str(target)]
        done = subprocess.run(limited, env=place.environment, cwd=place.folder, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert (done.returncode, done.stdout) == (2, "") and "cannot write" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert [path.name for path in folder.iterdir()] == ["grace.prom"] and target.read_text() == "old"


def test_metrics_again_and_again_go_to_a_file_only(place: Place) -> None:
    """Texts one after another are in no format; a file is replaced by the newer one."""
    lively(place)
    done = place.call("dashboard", "stats", "--prometheus", "--watch", "100ms")
    assert (done.status, done.out) == (2, "") and "--output" in done.err
    target = place.folder / "again.prom"
    process = place.start("dashboard", "stats", "--prometheus", "--watch", "100ms", "--output", str(target))
    first = until(lambda: target.exists() and target.stat().st_ino, "the first text")
    until(lambda: target.stat().st_ino != first, "the next one")
    process.terminate()
    assert process.wait(LIMIT) == 0


# ---- health


def test_health_names_each_finding_with_figure_threshold_and_advice(place: Place) -> None:
    """From healthy to warning, degraded and critical, by settings; critical is exit 1 with the document on stdout all the same."""
    place.handler("work", "--external")
    place.submit("for others", "--handler", "work")
    assert place.json("dashboard", "health")["status"] == "healthy"
    place.ok("config", "set", "health.queue_depth", "0")
    health = place.json("dashboard", "health")
    alert = health["alerts"][0]
    assert (health["status"], [a["code"] for a in health["alerts"]]) == ("warning", ["queue_depth"])
    assert (alert["figure"], alert["threshold"], alert["unit"], alert["level"], alert["setting"]) == (1, 0, "tasks", "warning", "health.queue_depth")
    assert alert["advice"] and alert["message"]
    place.ok("task", "cancel", place.submit("late", "--handler", "work", "--sla", "10ms")[1])
    late = place.submit("late", "--handler", "work", "--sla", "10ms")[1]
    until(lambda: place.call("task", "claim", "--handler", "work", "--worker", "w").status == 0 and place.task(late)["escalation_level"] >= 2, "a violation")
    health = place.json("dashboard", "health")
    assert health["status"] == "degraded" and "open_violations" in {alert["code"] for alert in health["alerts"]}
    place.ok("config", "set", "health.disk_free", str(1 << 40))
    done = place.call("--json", "dashboard", "health")
    assert (done.status, done.err, done.json["status"]) == (1, "", "critical")
    plain = place.call("dashboard", "health")
    assert plain.status == 1 and plain.err == "" and plain.out.startswith("critical") and "health.disk_free" in plain.out


def test_health_misses_a_daemon_only_when_work_waits_for_one(place: Place) -> None:
    """External work and an empty queue need none; work of ours does, and so does a step that is overdue; a living daemon has an uptime."""
    place.handler("work", "--", "true")
    place.handler("outside", "--external")
    place.ok("config", "set", "health.no_daemon", "1ms")
    place.submit("for others", "--handler", "outside")

    def codes() -> set[str]:
        return {alert["code"] for alert in json.loads(place.call("--json", "dashboard", "health").out)["alerts"]}

    place.ok("config", "set", "queue.age_every", "1ms")
    place.submit("for others, and growing old", "--handler", "outside")
    assert "no_daemon" not in codes()
    for words in (["--handler", "work"], ["--handler", "outside", "--sla", "10ms"], ["--handler", "work", "--in", "10ms"]):
        task_id = place.submit("for us", *words)[1]
        until(lambda: "no_daemon" in codes(), "the missing daemon to be noticed")
        place.ok("task", "cancel", task_id)
        assert "no_daemon" not in codes()
    place.submit("for us", "--handler", "work")
    with place.daemon():
        assert "no_daemon" not in codes()
        assert place.json("dashboard", "health")["uptime_ms"] > 0
        place.ok("config", "set", "daemon.heartbeat_every", "1h")
        assert "daemon_silent" not in codes()


def alerts_of(place: Place) -> dict[str, dict[str, Any]]:
    return {alert["code"]: alert for alert in json.loads(place.call("--json", "dashboard", "health").out)["alerts"]}


def test_health_counts_the_time_without_any_daemon(place: Place) -> None:
    """The one that stopped last counts, not the one that started last; and before the work came nothing waited."""
    place.handler("work", "--", "true")
    place.ok("config", "set", "health.no_daemon", "1ms")
    with place.daemon(), place.daemon() as second:
        second.terminate()
        assert second.wait(LIMIT) == 0
    first, _ = place.sql("SELECT worker_id FROM workers ORDER BY worker_id")
    place.sql(f"UPDATE workers SET stopped_at = stopped_at - 3600000 WHERE worker_id <> '{first[0]}'")
    task_id = place.submit("g", "--handler", "work")[1]
    place.sql(f"UPDATE htm_tasks SET queued_at = queued_at - 1800000 WHERE task_id = '{task_id}'")
    assert 0 < until(lambda: alerts_of(place).get("no_daemon"), "the missing daemon to be noticed")["figure"] < LIMIT * 1000
    place.ok("task", "cancel", task_id)
    place.sql("UPDATE workers SET stopped_at = stopped_at - 7200000")
    place.submit("came long after", "--handler", "work")
    assert 0 < until(lambda: alerts_of(place).get("no_daemon"), "the missing daemon to be noticed")["figure"] < LIMIT * 1000


def test_health_asks_for_more_workers_only_when_they_would_help(place: Place) -> None:
    """Tasks of external and of paused handlers wait for no slot of ours; `as large a part` begins at the threshold itself."""
    shell(place, "long", "until test -e go; do sleep 0.05; done")
    place.handler("outside", "--external")
    place.handler("paused", "--", "true")
    place.ok("handler", "pause", "paused")
    for name, value in (("busy_wait", "1ms"), ("utilization", "1")):
        place.ok("config", "set", f"health.{name}", value)
    with place.daemon("--workers", "1"):
        place.until_status(place.submit("fills the slot", "--handler", "long")[1], "running")
        for name in ("outside", "paused"):
            place.submit("waits for others", "--handler", name)
        assert "utilization" not in alerts_of(place)
        place.submit("waits for us", "--handler", "long")
        alert = until(lambda: alerts_of(place).get("utilization"), "the lack of slots to be noticed")
        assert (alert["figure"], alert["threshold"]) == (1, 1)
        (place.folder / "go").touch()


def test_health_and_explain_say_that_a_worker_has_died(place: Place, module: Any) -> None:
    """Its task still shows as running; what it waits for is said, and is over once a daemon has looked after it."""
    shell(place, "long", "until test -e go; do sleep 0.05; done")
    with place.daemon("--workers", "1") as daemon:
        task_id = place.submit("is lost", "--handler", "long")[1]
        place.until_status(task_id, "running")
        daemon.kill()
        daemon.wait(LIMIT)
    health = place.call("--json", "dashboard", "health")
    assert health.status == 1 and alerts_of(place)["lost_tasks"]["figure"] == 1 and "grace daemon" in alerts_of(place)["lost_tasks"]["advice"]
    with contextlib.closing(module.Store(str(place.db))) as store:
        figures = [module.health_figures(store, module.statistics_of(store, DAY), daemons, module.clock())["lost_tasks"]
                   for daemons in ([], [{"heartbeat_at": module.clock()}])]  # fmt: skip
    assert figures == [1, None], "a daemon that lives puts it back"
    told = place.json("task", "explain", task_id)
    assert (told["status"], [why["code"] for why in told["why"]]) == ("running", ["worker_died", "no_daemon"])
    (place.folder / "go").touch()
    with place.daemon("--workers", "1"):
        place.until_status(task_id, "completed")
    alert = alerts_of(place)["recoveries"]
    assert "lost_tasks" not in alerts_of(place) and (alert["figure"], alert["threshold"], alert["level"]) == (1, 0, "degraded")


def test_the_story_tells_an_error_where_it_happened(place: Place) -> None:
    """Steps after a failed attempt do not repeat its error."""
    shell(place, "broken", "echo no such host >&2; exit 3", "--max-attempts", "2", "--backoff", "1ms")
    task_id = place.submit("fails twice", "--handler", "broken")[1]
    with place.daemon("--workers", "1"):
        place.until_status(task_id, "failed")
    story = [step["text"] for step in place.json("task", "explain", task_id)["story"]]
    steps = [text.split(",")[0] for text in story if "exit status 3" in text]
    assert steps == ["running → queued", "running → failed"], story


def test_health_looks_at_each_figure(place: Place, module: Any) -> None:
    """A paused handler's queue, an old queue, a long log, impossible times, consent that is waited for: each by its own setting, warnings all."""
    place.handler("paused", "--external")
    place.submit("waits", "--handler", "paused")
    place.ok("handler", "pause", "paused")
    alert = alerts_of(place)["paused_tasks"]
    assert (alert["figure"], alert["threshold"], alert["level"]) == (1, 0, "warning") and "resume" in alert["advice"]
    place.ok("config", "set", "health.queue_age", "1ms")
    assert 1 < alerts_of(place)["queue_age"]["figure"] < LIMIT * 1000
    with contextlib.closing(module.Store(str(place.db))):
        assert "wal_bytes" not in alerts_of(place)
        place.ok("config", "set", "health.wal_bytes", "1024")
        assert alerts_of(place)["wal_bytes"]["figure"] == (place.folder / "grace.db-wal").stat().st_size > 1024
    task_id = place.submit("odd", "--handler", "paused", "--sla", "1h")[1]
    place.sql(f"UPDATE htm_tasks SET set_aside = 'odd' WHERE task_id = '{task_id}'")
    assert alerts_of(place)["set_aside"]["figure"] == 1
    place.sql(f"UPDATE htm_tasks SET status = 'blocked', reason = 'waiting_consent' WHERE task_id = '{task_id}'")
    assert alerts_of(place)["waiting_consent"]["figure"] == 1
    health = place.json("dashboard", "health")
    assert health["status"] == "warning" and {alert["code"] for alert in health["alerts"]} == {
        "paused_tasks", "queue_age", "set_aside", "waiting_consent", *({"wal_bytes"} & {alert["code"] for alert in health["alerts"]})}  # fmt: skip


def test_health_hears_that_a_daemon_says_nothing(place: Place) -> None:
    """Longer than the setting, and than three of its heartbeats; how long it runs is told all the same."""
    place.ok("config", "set", "daemon.heartbeat_every", "1h")
    with place.daemon("--workers", "1"):
        place.sql("UPDATE workers SET heartbeat_at = heartbeat_at - 10000000, started_at = started_at - 20000000")
        health = place.json("dashboard", "health")
        assert health["status"] == "healthy" and 20_000_000 < health["uptime_ms"] < 20_000_000 + LIMIT * 1000
        place.sql("UPDATE workers SET heartbeat_at = heartbeat_at - 1000000")
        alert = alerts_of(place)["daemon_silent"]
    assert (alert["threshold"], alert["level"]) == (3 * HOUR, "critical") and 11_000_000 < alert["figure"] < 11_000_000 + LIMIT * 1000


def test_health_counts_the_wait_of_what_a_daemon_may_run(place: Place, module: Any) -> None:
    """An older task of an external or a paused handler makes ours no older, whether a daemon is missing or its slots are."""
    for name, words in (("outside", ["--external"]), ("paused", ["--", "true"]), ("work", ["--", "true"])):
        place.handler(name, *words)
        task_id = place.submit("g", "--handler", name)[1]
        if name != "work":
            place.sql(f"UPDATE htm_tasks SET queued_at = queued_at - 3600000 WHERE task_id = '{task_id}'")
    place.ok("handler", "pause", "paused")
    place.ok("config", "set", "health.no_daemon", "1ms")
    assert 0 < until(lambda: alerts_of(place).get("no_daemon"), "the missing daemon to be noticed")["figure"] < LIMIT * 1000
    with contextlib.closing(module.Store(str(place.db))) as store:
        now = module.clock()
        assert module.longest_of_ours(store, ["work"], now) < LIMIT * 1000 and module.longest_of_ours(store, [], now) == 0
        assert module.longest_of_ours(store, ["work"], now - DAY) == 0, "a clock that was set back"


def test_health_counts_from_the_last_sign_of_a_daemon_that_died(place: Place) -> None:
    """It never said that it stopped: while it lived, old work did not wait for a daemon."""
    place.handler("paused", "--", "true")
    place.ok("handler", "pause", "paused")
    place.ok("config", "set", "health.no_daemon", "1ms")
    with place.daemon("--workers", "1") as daemon:
        task_id = place.submit("g", "--handler", "paused")[1]
        place.sql(f"UPDATE htm_tasks SET queued_at = queued_at - 3600000 WHERE task_id = '{task_id}'")
        daemon.kill()
        daemon.wait(LIMIT)
    place.ok("handler", "resume", "paused")
    assert 0 < until(lambda: alerts_of(place).get("no_daemon"), "the missing daemon to be noticed")["figure"] < LIMIT * 1000


def test_health_judges_failures_only_when_enough_has_ended(place: Place) -> None:
    """One failure of one tells nothing; of two, when two are enough."""
    place.handler("broken", "--max-attempts", "1", "--", "false")
    for count, expected in ((1, False), (2, True)):
        place.submit("g", "--handler", "broken", "--sla", "1h")
        place.ok("daemon", "--once")
        place.ok("config", "set", "health.least_ended", "2")
        health = place.json("dashboard", "health")
        codes = {alert["code"] for alert in health["alerts"]}
        assert ({"failure_rate", "sla_compliance"} <= codes) is expected, count
        assert health["status"] == ("degraded" if expected else "healthy")


def test_thresholds_are_settings_of_their_types(place: Place) -> None:
    """A ratio, a count, a duration, bytes: shown as written, refused with an example otherwise."""
    for name, good, bad in (("health.failure_rate", "0.25", "25%"), ("health.queue_depth", "12", "some"), ("health.queue_age", "2h", "2"),
                            ("health.disk_free", "4096", "4k"), ("health.sla_compliance", "1", "1.5")):  # fmt: skip
        place.ok("config", "set", name, good)
        assert str(place.json("config", "get", name)["value"]) in (good, f"{good}.0")
        refused = place.call("config", "set", name, bad)
        assert refused.status == 2 and "such as" in refused.err
        assert place.json("config", "unset", name)["is_default"] is True


# ---- slow, hourly


def test_slow_compares_with_what_is_usual(place: Place, module: Any) -> None:
    """The longest of now and of the window, each beside the p95 of its kind, which takes ten runs to be known."""
    history = History(module, place, 3)
    history.now = module.clock() - 2 * HOUR
    for number in range(12):
        history.write(lambda tx: module.submit(tx, [{"goal": f"goal {number}", "handler": "work"}]))  # noqa: B023 (called at once)
        task = history.write(lambda tx: module.claim_external(tx, ["work"], "w", DAY))
        history.now += 1000 + number if number < 11 else 60_000
        history.write(lambda tx: module.end_attempt(tx, task["task_id"], task["attempt_id"], {"outcome": "completed"}))  # noqa: B023
    history.write(lambda tx: module.submit(tx, [{"goal": "stays", "handler": "slow"}]))
    history.write(lambda tx: module.claim_external(tx, ["slow"], "w", DAY))
    history.now += 1000
    history.write(lambda tx: module.submit(tx, [{"goal": "came later", "handler": "slow"}]))
    history.write(lambda tx: module.claim_external(tx, ["slow"], "w", DAY))
    history.store.close()
    assert [row["goal"] for row in place.json("dashboard", "slow", "--limit", "1")["running"]] == ["stays"]
    slow = place.json("dashboard", "slow", "--limit", "2")
    assert [(row["goal"], row["status"], row["usual_p95_ms"], row["times_usual"]) for row in slow["running"]] == [
        ("stays", "running", None, None), ("came later", "running", None, None)]  # fmt: skip
    assert place.json("dashboard", "slow", "--window", "30m")["completed"] == [], "all of it was earlier"
    first, second = slow["completed"]
    assert (first["goal"], first["execution_time_ms"], second["execution_time_ms"], first["handler"]) == ("goal 11", 60_000, 1010, "work")
    assert first["usual_p95_ms"] == pytest.approx(60_000, rel=0.025) and first["times_usual"] == pytest.approx(1, rel=0.025)
    assert second["usual_p95_ms"] == first["usual_p95_ms"]
    assert "goal 11" in place.ok("dashboard", "slow").out and "stays" in place.ok("dashboard", "slow").out
    place.sql("DELETE FROM outcome_records WHERE execution_time > 50")
    (left,) = place.json("dashboard", "slow", "--limit", "1")["completed"]
    assert left["execution_time_ms"] == 1010, "of what is left, though more was counted"


def test_the_window_is_what_was_asked_for(place: Place, module: Any) -> None:
    """Of the figures by an option, of health by a setting, in whole hours each."""
    place.ok("config", "set", "health.window", "7h")
    begin = module.clock()
    told = [place.json("dashboard", "stats")["window_since_at"], place.json("dashboard", "stats", "--window", "3h")["window_since_at"],
            place.json("dashboard", "slow", "--window", "5h")["window_since_at"], place.json("dashboard", "health")["window_since_at"]]  # fmt: skip
    for since, span in zip(told, (DAY, 3 * HOUR, 5 * HOUR, 7 * HOUR), strict=True):
        assert since in {module.format_instant((now - span) // HOUR * HOUR) for now in (begin, module.clock())}
    with contextlib.closing(module.Store(str(place.db))) as store:
        for ago in (2, 6):
            store.write(lambda tx, at=begin // HOUR * HOUR - ago * HOUR: module.add_sums(tx, at, "work", "shop", 0, (1,) * len(module.METRIC_SUMS), 0))
    assert [place.json("dashboard", "stats", "--window", window)["window_completed"] for window in ("1h", "3h", "1d")] == [0, 1, 2]


def test_so_many_hours_with_this_one(place: Place, module: Any) -> None:
    """The rows of just those, for programs; a line for each, for people."""
    hour = module.clock() // HOUR * HOUR
    with contextlib.closing(module.Store(str(place.db))) as store:
        for number in range(6):
            store.write(lambda tx, at=hour - number * HOUR: module.add_sums(tx, at, "work", "shop", 0, (1,) * len(module.METRIC_SUMS), 0))
    for hours in (1, 2, 4):
        wanted = {module.format_instant(at - number * HOUR) for at in (hour, hour + HOUR) for number in range(hours)}  # another may begin meanwhile
        found = [row["starts_at"] for row in place.json("dashboard", "hourly", "--hours", str(hours))]
        assert hours - 1 <= len(found) <= hours and set(found) <= wanted
        assert len(place.ok("dashboard", "hourly", "--hours", str(hours)).out.splitlines()) == 1 + hours


def test_what_is_usual_rests_on_ten_runs_of_the_last_week(place: Place, module: Any) -> None:
    """Of ours: imported ones were measured elsewhere. The table says why there is none."""
    history, real = History(module, place, 5), module.clock()
    for number in range(20):
        history.now = real - 6 * DAY if number < 10 else real - 8 * DAY - HOUR * number
        history.write(lambda tx: module.submit(tx, [{"goal": "g", "handler": "work"}]))
        task = history.write(lambda tx: module.claim_external(tx, ["work"], "w", DAY))
        history.now += 1000 if number < 10 else 90_000
        history.write(lambda tx: module.end_attempt(tx, task["task_id"], task["attempt_id"], {"outcome": "completed"}))  # noqa: B023 (called at once)
        if number in (8, 9):
            usual = history.store.read(lambda reader: module.usual_p95(reader, "work", real))
            assert usual == (None if number == 8 else pytest.approx(1000, rel=0.025)), number
    runs = "".join(json.dumps({"name": "work", "start": real / 1000 - 7000 - n, "end": real / 1000 - 60 - n, "success": True}) + "\n" for n in range(30))
    place.ok("learn", "import", "-", stdin=runs.encode())
    history.now = real
    history.write(lambda tx: module.fold_hours(tx, tx.now - tx.now % HOUR))
    assert history.store.read(lambda reader: module.usual_p95(reader, "work", real)) == pytest.approx(1000, rel=0.025)
    assert history.store.read(lambda reader: module.usual_p95(reader, "stoic", real)) is None
    history.store.close()
    shown = place.ok("dashboard", "slow", "--window", "7d").out
    assert "USUAL P95 -" not in shown
    place.submit("new", "--handler", "slow")
    place.ok("task", "claim", "--handler", "slow", "--worker", "w")
    assert "USUAL P95 -: not known before 10 of the kind have completed within 7 days" in " ".join(place.ok("dashboard", "slow").out.split())


@pytest.mark.parametrize(("total", "completed", "most", "bar"), [
    (10, 10, 10, "##########"), (10, 9, 10, "#########-"), (1000, 999, 1000, "#########-"), (5, 0, 10, "-----"), (1, 1, 1000, "#"), (1, 0, 1000, "-")])
def test_the_bar_of_an_hour_shows_every_failure(module: Any, monkeypatch: pytest.MonkeyPatch, total: int, completed: int, most: int, bar: str) -> None:
    """As long as what ended, at least one sign; whatever failed is seen, and 100 % is said only when all is well."""
    monkeypatch.setenv("NO_COLOR", "1")
    shown = module.hour_bar({"total": total, "completed": completed}, most, 10)
    assert shown.replace("█", "#").replace("░", "-") == bar
    assert (module.whole_percent(completed / total) == "100%") is (completed == total)


# ---- watching


class Terminal:
    """A command on a terminal of its own, whose size can change."""

    def __init__(self, place: Place, *words: str, rows: int = 20, columns: int = 80):
        self.fd, inner = pty.openpty()
        self.seen = b""
        self.resize(rows, columns)
        on_it = f'exec "$@" < {os.ttyname(inner)} > {os.ttyname(inner)} 2>&1'  # the leader of a session gets the terminal that it opens
        self.process = subprocess.Popen(["sh", "-c", on_it, "sh", GRACE, *words], env={**place.environment, "TERM": "xterm"}, start_new_session=True)
        place.processes.append(self.process)
        until(lambda: self.read() or self.process.poll() is not None, "the terminal to be in use")
        os.close(inner)

    def resize(self, rows: int, columns: int) -> None:
        ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def read(self) -> bytes:
        while select.select([self.fd], [], [], 0.02)[0]:
            try:
                self.seen += os.read(self.fd, 65536)
            except OSError:
                break
        return self.seen

    def frames(self) -> list[list[str]]:
        """The lines of each whole frame so far, without their control sequences."""
        whole = self.read().decode(errors="replace").split("\x1b[H")[1:]
        return [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", frame).split("\r\n")[:-1] for frame in whole if frame.endswith("\x1b[J\x1b[?7h")]

    def type(self, text: bytes) -> None:
        os.write(self.fd, text)


@pytest.fixture
def watched(place: Place) -> Iterator[Place]:
    lively(place)
    yield place


def test_watching_redraws_the_screen_and_follows_its_size(watched: Place) -> None:
    """Frames that fit, drawn over each other and never erased first; another size is heeded at once; Ctrl-C ends it with 0."""
    terminal = Terminal(watched, "dashboard", "hourly", "--watch", "1h", rows=12)
    until(terminal.frames, "the first frame")
    first = terminal.frames()[0]
    assert len(first) < 12 and "more lines" in first[-1] and max(map(len, first)) <= 80
    terminal.resize(40, 100)
    until(lambda: len(terminal.frames()) > 1, "a frame of the new size, long before the hour is over")
    assert len(terminal.frames()[-1]) > len(first) and "█" in "".join(terminal.frames()[-1])
    terminal.type(b"\x03")
    assert terminal.process.wait(LIMIT) == 0
    assert b"\x1b[2J" not in terminal.seen and b"Traceback" not in terminal.seen


def test_watching_without_a_terminal_writes_one_object_or_block_a_time(watched: Place) -> None:
    """NDJSON with --json, blocks without; INT and TERM end it with 0, a reader that has gone ends it quietly; nothing is written to the database."""
    before = watched.db.read_bytes(), len(watched.events())
    for words in (["--json", "--watch", "100ms"], ["--watch=100ms", "--json"]):
        process = watched.start("dashboard", "stats", *words)
        assert process.stdout is not None
        lines = [json.loads(process.stdout.readline()) for _ in range(3)]
        assert [line["queued_tasks"] for line in lines] == [3, 3, 3] and lines[0]["last_updated_at"] < lines[2]["last_updated_at"]
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT) == 0
    process = watched.start("dashboard", "health", "--watch")
    assert process.stdout is not None and process.stdout.readline().startswith(b"healthy")
    process.terminate()
    assert process.wait(LIMIT) == 0
    process = watched.start("dashboard", "violations", "--watch", "100ms")
    assert process.stdout is not None and process.stderr is not None and process.stdout.readline()
    process.stdout.close()
    assert process.wait(LIMIT) == 141 and process.stderr.read() == b""
    assert (watched.db.read_bytes(), len(watched.events())) == before


@pytest.mark.parametrize("replaced", [False, True])
def test_watching_ends_when_the_database_is_another(watched: Place, replaced: bool) -> None:
    """Figures of a file that is no longer there are shown no more."""
    process = watched.start("dashboard", "stats", "--watch", "100ms", "--json")
    assert process.stdout is not None and process.stderr is not None and process.stdout.readline()
    copy = watched.folder / "copy.db"
    watched.sql(f"VACUUM INTO '{copy}'")
    if replaced:
        copy.replace(watched.db)
    else:
        watched.db.unlink()
    assert process.wait(LIMIT) == 8
    assert json.loads(process.stderr.read())["error"]["code"] == "database"


def test_a_span_for_watching_is_a_duration(place: Place) -> None:
    """Bare numbers, nothing and nonsense are refused before anything is shown."""
    for value in ("5", "", "abc", "0s", "11y"):
        done = place.call("dashboard", "stats", "--watch", value)
        assert (done.status, done.out) == (2, "") and "--watch" in done.err


# ---- the figures as an event


def statistics_events(place: Place) -> list[dict[str, Any]]:
    return [event["payload"] for event in place.events("htm.sla.stats")]


def test_daemons_tell_the_figures_once_when_they_change(place: Place) -> None:
    """Two daemons at a quick pace write one event for each change together, none while nothing changes; its figures are the dashboard's."""
    shell(place, "work", "exit 0")
    with place.daemon("--stats-every", "200ms", "--workers", "1"), place.daemon("--stats-every", "200ms", "--workers", "1"):
        until(lambda: statistics_events(place) and statistics_events(place)[-1]["active_workers"] == 2, "the event of the second daemon")
        place.submit("g", "--handler", "work", "--sla", "1h")
        until(lambda: statistics_events(place)[-1]["completed_tasks"] == 1, "the event of the change")
        told = statistics_events(place)
        shown = place.json("dashboard", "stats")
        assert {name: told[-1][name] for name in shown if not name.endswith("_at")} == {name: shown[name] for name in shown if not name.endswith("_at")}
        until(lambda: place.json("dashboard", "health")["uptime_ms"] > 3000, "some more intervals")
        assert statistics_events(place) == told, "nothing has changed"
        assert all(one != other for one, other in itertools.pairwise(told)) and told[-1]["message"]
    lines = place.ok("events", "--topic", "htm.sla.stats").out.splitlines()
    assert len(lines) == len(statistics_events(place)) >= len(told), "the second daemon may have told that the first has stopped"
    assert "queued" in lines[-1]


def test_when_the_figures_are_told(place: Place, module: Any) -> None:
    """When nine tenths of the interval are over and something has changed; the time that the oldest task waits, which grows by itself, is no news."""
    lively(place)
    with contextlib.closing(module.Store(str(place.db))) as store:
        assert module.tell_statistics(store, MINUTE) is True and module.tell_statistics(store, 1) is True
        assert len(statistics_events(place)) == 1, "nothing has changed but the clock"
        at, told = store.value(module.GET_SETTING, name=module.STATS_MARK).split()
        due = [store.read(lambda reader, ms=ms: module.stats_due(reader, int(at) + ms, MINUTE, "other")) for ms in (0, 53_999, 54_000, -1)]
        assert due == [False, False, True, True], "a mark in the future is of a clock that was set back"
        assert store.read(lambda reader: module.stats_due(reader, int(at) + DAY, MINUTE, told)) is None
        place.ok("task", "cancel", place.submit("changes it", "--handler", "work")[1])
        assert module.tell_statistics(store, HOUR) is False and len(statistics_events(place)) == 1
        assert module.tell_statistics(store, 1) is True and len(statistics_events(place)) == 2


def test_a_daemon_that_runs_once_tells_them_at_its_end(place: Place) -> None:
    """What was done is in the event; another run that changes nothing tells nothing, and neither does one too soon."""
    shell(place, "work", "exit 0")
    place.submit("g", "--handler", "work")
    place.ok("daemon", "--once", "--workers", "1")
    assert [payload["completed_tasks"] for payload in statistics_events(place)] == [1]
    place.ok("daemon", "--once", "--workers", "1", "--stats-every", "1ms")
    assert len(statistics_events(place)) == 1
    place.submit("g", "--handler", "work")
    place.ok("daemon", "--once", "--workers", "1")
    assert len(statistics_events(place)) == 1, "the last one is younger than a minute"
    place.ok("daemon", "--once", "--workers", "1", "--stats-every", "1ms")
    assert [payload["completed_tasks"] for payload in statistics_events(place)] == [1, 2]


def test_failures_whose_outcomes_are_gone_stay_counted(place: Place) -> None:
    """Counting anew makes the tallies again only where all that they were counted from is there."""
    lines = "".join(json.dumps({"name": "work", "start": 1000.0 + n, "end": 1001.0 + n, "success": False, "reason": "disk full"}) + "\n" for n in range(3))
    place.ok("learn", "import", "-", stdin=lines.encode())
    place.sql("DELETE FROM outcome_records WHERE seq = 1")
    told = place.json("doctor", "--recount")
    assert told["only_raised"] is True and told["rows_changed"]["outcome_tallies"] == 0
    said = place.json("learn", "stats", "--handler", "work", "--since", "1970-01-01T00:00:00Z")
    assert (said["failed"], said["failures"]) == (3, [{"reason": "disk full", "n": 3}])


def test_counts_that_are_too_low_are_raised_to_what_is_left(place: Place) -> None:
    """Where tasks have been deleted and a count is damaged as well."""
    lively(place)
    (task_id,) = place.sql("SELECT task_id FROM htm_tasks WHERE status = 'completed' LIMIT 1")[0]
    place.sql(f"DELETE FROM htm_task_attempts WHERE task_id = '{task_id}'; DELETE FROM htm_tasks WHERE task_id = '{task_id}'")
    place.sql("UPDATE task_counts SET n = CASE status WHEN 'completed' THEN 1 ELSE n END")
    place.ok("doctor", "--recount")
    stats = place.json("dashboard", "stats")
    assert (stats["completed_tasks"], stats["failed_tasks"], stats["cancelled_tasks"], stats["queued_tasks"]) == (2, 1, 1, 3)


def test_one_is_not_called_many(place: Place) -> None:
    """In the lines for people."""
    place.handler("work", "--external", "--on-critical", "none")
    place.submit("late", "--handler", "work", "--sla", "10ms")
    until(lambda: place.call("task", "claim", "--handler", "work", "--worker", "w").status == 6 and place.json("dashboard", "violations"), "a violation")
    shown = place.ok("dashboard", "stats").out
    assert re.search(r"\b1 violation now, 1 ever", shown) and not re.search(r"\b1 \w+s now", shown)
    place.handler("keen", "--external", "--warn-at", "0.01")
    place.submit("is warned of", "--handler", "keen", "--sla", "1m")
    until(lambda: place.call("task", "claim", "--handler", "work", "--worker", "w") and place.json("dashboard", "stats")["warnings_issued"] == 2, "a warning")
    assert place.json("dashboard", "stats")["active_violations"] == 1, "a warning is none"
    assert [len(place.json("dashboard", "violations", "--level", level)) for level in ("warning", "violated")] == [2, 1]


def test_doctor_says_what_differed(place: Place) -> None:
    """Figures before and after, for people and for programs; then all is right."""
    lively(place)
    place.sql("UPDATE task_counts SET n = n + 10 WHERE status = 'queued' AND priority = 'low'; UPDATE counters SET value = 0 WHERE name = 'sla_met'")
    assert place.json("dashboard", "stats")["queued_tasks"] == 13
    told = place.json("doctor", "--recount")
    assert {"figure": "tasks queued low level 0", "before": 13, "after": 3} in told["differences"]
    assert {"figure": "total sla_met", "before": 0, "after": 3} in told["differences"]
    assert place.json("dashboard", "stats")["queued_tasks"] == 3
    assert "all figures were right" in place.ok("doctor", "--recount").out
