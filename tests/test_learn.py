"""The learning loop: outcomes and imported runs, statistics against brute force, suggested, automatic and adapted SLAs, replays and rehearsals."""

from __future__ import annotations

import contextlib
import json
import math
import random
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import GRACE, LIMIT, ROOT, Place, need, until
from tests.test_cli import Terminal

HOUR, DAY = 3_600_000, 86_400_000
WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")


def lines(*runs: dict[str, Any]) -> bytes:
    return "".join(json.dumps(run) + "\n" for run in runs).encode()


def run_of(end: float, seconds: float, name: str = "backup", success: bool = True, **more: Any) -> dict[str, Any]:
    """A line for `learn import`, in seconds since 1970."""
    return {"name": name, "start": round(end - seconds, 3), "end": round(end, 3), "success": success, **more}


def steady(now: float, n: int, seconds: float = 60.0, name: str = "backup") -> list[dict[str, Any]]:
    """n runs, one an hour up to an hour ago, that took between 0.9 and 1.1 times so long."""
    chance = random.Random(n)
    return [run_of(now - 3600 * (n - number), seconds * chance.uniform(0.9, 1.1), name) for number in range(n)]


def now_of(module: Any) -> float:
    return float(module.clock() // 1000)


class Past:
    """Tasks that happened at instants of the test's choosing, through the program's own functions."""

    def __init__(self, module: Any, place: Place):
        self.g, self.store = module, module.Store(str(place.db))

    def task(self, queued_at: int, total: int, wait: int = 0, handler: str = "work", status: str = "completed", attempts: int = 1, **spec: Any) -> str:
        """A task that ended; its id. Attempts before the last one fail at once."""
        g = self.g

        def live(tx: Any) -> str:
            tx.now = queued_at
            task_id = str(g.submit(tx, [{"goal": "a goal", "handler": handler, **spec}])[0]["task_id"])
            for number in range(1, attempts + 1):
                if status == "cancelled":
                    tx.now = queued_at + total
                    g.cancel(tx, g.get_task(tx, task_id))
                    break
                tx.now = queued_at + wait
                tx.run("UPDATE htm_tasks SET available_at = NULL WHERE task_id = :id", id=task_id)
                taken = g.take(tx, task_id, "w")
                g.start(tx, taken, 1, None, None)
                tx.now = queued_at + (total if number == attempts else wait)
                g.end_attempt(tx, task_id, taken["attempt_id"], {"outcome": status if number == attempts else "failed", "exit_status": 3})
            return task_id

        return str(self.store.write(live))


@pytest.fixture
def past(place: Place, module: Any) -> Any:
    place.handler("work", "--max-attempts", "3", "--", "true")
    made = Past(module, place)
    yield made
    made.store.close()


# ---- importing


def test_runs_are_imported_once_whatever_the_order_and_the_overlap(place: Place, module: Any) -> None:
    """Files may overlap and lie out of order; what was there before is known again, also when its instants are written otherwise."""
    runs = steady(now_of(module), 20)
    assert place.json("learn", "import", "-", stdin=lines(*runs[10:0:-1]))["added"] == 10
    again = place.json("learn", "import", "-", stdin=lines(*runs, runs[3]))
    assert (again["added"], again["known"]) == (10, 11)
    written = {**runs[5], "start": module.format_instant(round(runs[5]["start"] * 1000)), "end": module.format_instant(round(runs[5]["end"] * 1000))}
    assert place.json("learn", "import", "-", stdin=lines(written))["known"] == 1
    assert len(place.json("learn", "outcomes", "--limit", "100")) == 20
    assert place.json("learn", "stats", "--handler", "backup")["completed"] == 20
    assert [event["payload"]["added"] for event in place.events("learning.*")] == [10, 10]


def test_a_dry_run_counts_and_changes_nothing(place: Place, module: Any) -> None:
    """The same figures, and no outcome, sum or event."""
    runs = steady(now_of(module), 5)
    place.ok("learn", "import", "-", stdin=lines(*runs[:2]))
    assert {"added": 3, "known": 2, "dry_run": True}.items() <= place.json("learn", "import", "-", "--dry-run", stdin=lines(*runs)).items()
    assert place.sql("SELECT (SELECT COUNT(*) FROM outcome_records), (SELECT SUM(completed) FROM htm_metrics WHERE level = 'hour')") == [[2, 2]]
    assert len(place.events("learning.*")) == 1


GOOD = {"name": "backup", "start": "2026-01-05T10:00:00Z", "end": "2026-01-05T10:00:09+00:00", "success": True}


@pytest.mark.parametrize(("change", "said"), [
    ({"end": "2026-01-05T09:59:59Z"}, "before it starts"), ({"end": "2090-01-05T10:00:00Z"}, "in the future"), ({"start": "yesterday"}, "start: write"),
    ({"start": "2026-01-05 10:00:00"}, "with its offset"), ({"start": True}, "start is an instant"), ({"start": -5}, "before 1970"),
    ({"start": -0.0001}, "before 1970"), ({"start": "2026-02-30T10:00:00Z"}, "no instant that there is"),
    ({"start": "2026-01-05T10:00:00+99:00"}, "no instant"),
    ({"start": 1e300}, "start is"),
    ({"name": 'a "b"'}, "name is 1 to 64"), ({"name": "a\nb"}, "name is 1 to 64"), ({"name": 7}, "name is 1 to 64"), ({"name": "rescue"}, "grace's own"),
    ({"domain": "no such/name"}, "domain is 1 to 64"), ({"success": "yes"}, "true or false"), ({"confidence": 1.5}, "confidence is a number"),
    ({"attempts": 0}, "attempts is a whole number"), ({"attempts": 1001}, "from 1 to 1000"), ({"reason": ""}, "the reason"),
    ({"goal": ["x"]}, "the goal is a text"), ({"speed": 3}, "'speed' is unknown"),
    ({"start": "1970-01-01T00:00:00Z"}, "longer than ten years")])  # fmt: skip
def test_a_bad_line_is_named_and_nothing_is_imported(place: Place, change: dict[str, Any], said: str) -> None:
    """All or nothing: the line's number, what is wrong with it, exit 2."""
    done = place.call("learn", "import", "-", stdin=lines(GOOD, {**GOOD, **change}, GOOD))
    assert done.status == 2 and "line 2: " in done.err and said in done.err, done.err
    assert "nothing was imported" in done.err and place.json("learn", "outcomes") == []


def test_lines_without_a_domain_get_the_one_that_is_named(place: Place) -> None:
    """For all of a file; a line's own comes first."""
    place.ok("learn", "import", "-", "--domain", "shop", stdin=lines(GOOD, {**GOOD, "domain": "mail"}))
    assert sorted(row["domain"] for row in place.json("learn", "outcomes")) == ["mail", "shop"]
    assert place.json("learn", "import", "-", stdin=lines(GOOD))["added"] == 1, "in the domain general it is another run"


@pytest.mark.parametrize("bad", [b'{"name": "a", "start": 1, "end": 2}', b"{", b"[]", b"\xff", b'{"name": "a"}', b'"text"', b'{"name": "a", "name": "b"}'])
def test_what_is_no_run_is_refused_by_its_line(place: Place, bad: bytes) -> None:
    """Broken JSON, other values than objects, missing and doubled keys."""
    done = place.call("learn", "import", "-", stdin=lines(GOOD) + b"\n" + bad + b"\n")
    assert done.status == 2 and "line 3: " in done.err, done.err
    assert place.json("learn", "outcomes") == []


def test_files_that_cannot_be_read_and_empty_ones(place: Place) -> None:
    """A missing file is a wrong call; an empty one imports nothing."""
    assert place.call("learn", "import", "missing.jsonl").status == 2
    assert place.json("learn", "import", "-", stdin=b"\n\n")["added"] == 0
    assert place.events("learning.*") == []


def test_an_import_that_is_killed_leaves_nothing_and_others_only_wait(place: Place, module: Any) -> None:
    """All or nothing also for a process that dies in its midst; a submission meanwhile takes its turn afterwards."""
    place.handler("work", "--external")
    now, size = now_of(module), 20_000
    path = place.folder / "many.jsonl"
    path.write_bytes(lines(*[run_of(now - number * 60, 30, f"h{number % 7}", goal=str(number)) for number in range(size)]))
    log = Path(f"{place.db}-wal")
    importing = place.start("learn", "import", str(path))
    until(lambda: importing.poll() is not None or log.stat().st_size > 2_000_000, "the import to write")
    importing.kill()
    importing.wait(LIMIT)
    assert place.sql("SELECT COUNT(*) FROM outcome_records") in ([[0]], [[size]])
    importing = place.start("learn", "import", str(path))
    submitted = [place.submit(f"goal {number}", "--handler", "work")[1] for number in range(5)]
    assert importing.wait(LIMIT) == 0
    assert place.sql("SELECT COUNT(*) FROM outcome_records") == [[size]]
    assert place.sql("SELECT SUM(completed) FROM htm_metrics WHERE level = 'hour'") == [[size]]
    assert {row["task_id"] for row in place.json("task", "list")} == set(submitted)
    assert place.json("learn", "import", str(path), "--dry-run")["known"] == size


def test_hostile_text_in_a_run_is_shown_escaped(place: Place) -> None:
    """A goal and a reason with quotes, newlines and colours reach a terminal harmlessly, and programs unchanged."""
    text = 'say "hi"\n\x1b[31mred'
    place.ok("learn", "import", "-", stdin=lines({**GOOD, "success": False, "goal": text, "reason": text}))
    for words in (("learn", "outcomes"), ("learn", "stats", "--handler", "backup", "--since", "3000d")):
        assert "\x1b" not in place.ok(*words).out
    (outcome,) = place.json("learn", "outcomes")
    assert (outcome["context"]["goal"], outcome["imported"], outcome["handler"]) == (text, True, "backup")


def test_whatever_a_line_says_makes_the_run(place: Place, module: Any) -> None:
    """Two that differ in anything are two; what was added is told with its span, whatever the order of the lines."""
    now = now_of(module)
    one = run_of(now - 3600, 60, goal="a", domain="shop")
    changes: tuple[dict[str, Any], ...] = ({"goal": "b"}, {"domain": "mail"}, {"reason": "r"}, {"attempts": 2}, {"confidence": 0.5}, {"success": False})
    others = [{**one, **change} for change in changes]
    report = place.json("learn", "import", "-", stdin=lines(run_of(now - 9000, 60), run_of(now, 60), one, *others, run_of(now - 5000, 60)))
    assert (report["added"], report["known"]) == (10, 0)
    assert (report["first_at"], report["last_at"]) == (module.format_instant(round(now - 9060) * 1000), module.format_instant(round(now) * 1000))
    assert report["largest"] == [{"name": "backup", "runs": 10}]


def test_a_long_history_is_read_in_pages(place: Place, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """None is lost or read twice at their edges, though many ended in one instant; the latest come last, and no more than asked for."""
    now = now_of(module)
    runs = [run_of(now - 3600 * (number // 4), 10 + number, goal=str(number)) for number in range(13)]
    place.ok("learn", "import", "-", stdin=lines(*runs))
    with contextlib.closing(module.Store(str(place.db))) as store:
        for page in (1, 2, 3, 4, 5, 2000):
            monkeypatch.setattr(module, "PAGE", page)
            taught = module.runs_of(store, "backup")
            assert sorted(ms for _, ms in taught) == [1000 * (10 + number) for number in range(13)] and taught == sorted(taught, key=lambda run: run[0])
            for most in (1, 5, 6, 12, 50):
                first, every = ([row["seq"] for row in module.outcomes_of(store, "backup", n)] for n in (most, 50))
                assert first == every[:most]
        assert module.latest_runs(module.outcomes_of(store, "backup", 50), 4) == taught[-4:]


def test_a_large_import_leaves_no_long_log_behind(place: Place, module: Any) -> None:
    """Else each command to come would read all of it again, as long as somebody has the database open."""
    runs = [run_of(now_of(module) - number * 60, 30, goal=str(number)) for number in range(6000)]
    with contextlib.closing(module.Store(str(place.db))):
        assert place.json("learn", "import", "-", stdin=lines(*runs))["added"] == 6000
        assert Path(f"{place.db}-wal").stat().st_size < 100_000


def test_an_import_that_has_no_room_is_one_clear_line(place: Place, module: Any) -> None:
    """What is checked lies beside the database before anything is written; where that does not fit, nothing is imported."""
    place.ok("status")
    runs = lines(*[run_of(now_of(module) - number * 60, 30, goal="x" * 1000 + str(number)) for number in range(1000)])
    limited = ["sh", "-c", 'ulimit -f 200; exec "$@"', "sh", GRACE, "learn", "import", "-"]  # a file may have 100 or 200 KiB
    done = subprocess.run(limited, input=runs, env=place.environment, cwd=place.folder, capture_output=True, timeout=LIMIT, check=False)
    assert (done.returncode, done.stdout) == (8, b"") and b"nothing was imported" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert place.json("learn", "outcomes") == []


ODD_CONTEXTS = ("{}", "[]", "5", "null", '"x"', '{"metrics": 5}', '{"metrics": null}', '{"metrics": {"total_time_ms": "long"}}',
                '{"metrics": {"total_time_ms": 1e999, "execution_time_ms": -1e999, "asleep_running_ms": 1}}', '{"metrics": {"execution_time_ms": true}}',
                '{"metrics": {"attempt_number": 2.5}}', '{"goal": 5, "reason": {"a": [1]}, "metrics": {"total_time_ms": 1500.4, "asleep_running_ms": 0.5}}',
                '{"status": 7, "exit_status": "x", "metrics": {"execution_time_ms": 1e300, "asleep_running_ms": 3}}')  # fmt: skip


def test_outcomes_that_somebody_else_has_written_break_nothing(place: Place, module: Any) -> None:
    """By the sqlite3 shell, with any JSON as context: shown, counted anew, and not believed where they make no sense."""
    place.handler("work", "--sla", "5m", "--", "true")
    place.ok("learn", "import", "-", stdin=lines(*steady(now_of(module), 11, 1.5, "work")))
    for number, context in enumerate(ODD_CONTEXTS):
        for success in (0, 1):
            place.sql(f"""INSERT INTO outcome_records (task_id, action_type, handler, domain, success, execution_time, confidence_score, context, created_at)
              VALUES ('odd{number}-{success}', 'intent_d', 'work', 'd{number}-{success}', {success}, 1.5, 0.5, '{context}', {module.clock() - 1000})""")
    told = place.json("learn", "outcomes", "--since", "50m")
    assert [row["context"] for row in told] == [json.loads(context) for context in ODD_CONTEXTS[::-1] for _ in (1, 0)]
    assert len(place.ok("learn", "outcomes", "--since", "50m", "--success").out.splitlines()) == 1 + len(ODD_CONTEXTS)
    assert place.json("doctor", "--recount")["rows_changed"]["outcome_tallies"] > 0
    assert place.json("doctor", "--recount")["rows_changed"]["outcome_tallies"] == 0
    basis = place.json("learn", "suggest-sla", "--handler", "work")
    assert basis["runs"] == 11 + len(ODD_CONTEXTS) and 1000 < basis["sla_ms"] < 5000
    for words in (("learn", "stats", "--handler", "work"), ("learn", "backtest"), ("sla", "rehearse", "--sla", "1s")):
        place.ok(*words)


# ---- statistics


def rank(values: list[int], part: float) -> int:
    return sorted(values)[math.ceil(part * len(values) - 1e-9) - 1]


@pytest.mark.parametrize("seed", range(4))
def test_statistics_agree_with_brute_force(past: Past, place: Place, module: Any, seed: int) -> None:
    """On random tasks and imported runs: counts exactly, means exactly, percentiles within 2.5 %, patterns, failures, confidence, retries."""
    chance, now = random.Random(seed), module.clock()
    records: list[dict[str, Any]] = []
    for _ in range(60):
        queued_at, total, wait = now - chance.randrange(DAY // 2, 20 * DAY), round(chance.lognormvariate(8, 1)) + 1, chance.randrange(2)
        status, confidence = chance.choices(["completed", "failed", "timeout", "cancelled"], [8, 2, 1, 1])[0], chance.choice([None, 0.3, 0.75, 1.0])
        attempts = chance.choice([1, 1, 1, 2]) if status in ("completed", "cancelled") else 3
        past.task(queued_at, total + wait, wait, status=status, attempts=attempts, confidence=confidence, domain=chance.choice(["shop", "wiki"]))
        records.append({"end": queued_at + total + wait, "ms": total, "status": status, "confidence": confidence, "attempts": attempts,
                        "reason": "cancelled" if status == "cancelled" else "exit 3"})  # fmt: skip
    runs = []
    for _ in range(60):
        end, ms, ok = now - chance.randrange(20 * DAY), round(chance.lognormvariate(8, 1)), chance.random() < 0.8
        runs.append({"name": "work", "start": (end - ms) / 1000, "end": end / 1000, "success": ok, "domain": "old", "attempts": 2, "goal": str(len(runs)),
                     "reason": None if ok else "disk full"})  # fmt: skip
        records.append({"end": end, "ms": ms, "status": "completed" if ok else "failed", "confidence": None, "attempts": 2, "reason": "disk full"})
    place.ok("learn", "import", "-", stdin=lines(*runs))
    said = place.json("learn", "stats", "--handler", "work", "--since", "30d")
    tried = [record for record in records if record["status"] != "cancelled"]
    done = [record for record in tried if record["status"] == "completed"]
    assert (said["ended"], said["completed"], said["cancelled"], said["imported"]) == (len(records), len(done), len(records) - len(tried), 60)
    assert said["success_rate"] == pytest.approx(len(done) / len(tried), abs=1e-4)
    assert said["avg_execution_ms"] == pytest.approx(sum(record["ms"] for record in done) / len(done), abs=0.1)
    for part in (50, 95, 99):
        assert said[f"p{part}_execution_ms"] == pytest.approx(rank([record["ms"] for record in done], part / 100), rel=0.025, abs=1)
    assert {row["reason"]: row["n"] for row in said["failures"]} == Counter(record["reason"] for record in tried if record["status"] != "completed")
    assert said["retry_rate"] == pytest.approx(sum(record["attempts"] > 1 for record in tried) / len(tried), abs=1e-4)
    assert said["avg_attempts"] == pytest.approx(sum(record["attempts"] for record in tried) / len(tried), abs=1e-4)
    stated = [(record["confidence"], record["status"] == "completed") for record in tried if record["confidence"] is not None]
    assert said["brier_score"] == pytest.approx(sum((c - ok) ** 2 for c, ok in stated) / len(stated), abs=1e-4)
    assert {row["stated_rate"]: row["runs"] for row in said["calibration"]} == Counter(c for c, _ in stated)
    hours, days = (Counter(record["end"] // HOUR % 24 for record in records), Counter((record["end"] // DAY + 3) % 7 for record in records))
    assert [row["ended"] for row in said["by_hour"]] == [hours[hour] for hour in range(24)]
    assert [row["ended"] for row in said["by_weekday"]] == [days[day] for day in range(7)]
    parts = place.json("learn", "stats")
    assert [(row["handler"], row["domain"]) for row in parts] == [("work", "old"), ("work", "shop"), ("work", "wiki")]
    assert sum(row["ended"] for row in parts) == len(records)


def test_a_trend_and_a_window(place: Place, module: Any) -> None:
    """Twice as long in the later half is +100 %; too few runs tell none; a window longer than history shows all, a shorter one less."""
    now = now_of(module)
    runs = [run_of(now - 86400 * (20 - day) - minute, 200 if day >= 10 else 100) for day in range(20) for minute in (300, 900)]
    place.ok("learn", "import", "-", stdin=lines(*runs))
    whole = place.json("learn", "stats", "--handler", "backup", "--since", "3650d")
    assert whole["completed"] == 40 and whole["trend_ratio"] == pytest.approx(2, rel=0.05)
    assert place.json("learn", "stats", "--handler", "backup", "--since", "5d")["completed"] in (8, 9, 10)  # whole hours
    assert "+10" in place.ok("learn", "stats").out.splitlines()[1] or "+9" in place.ok("learn", "stats").out
    place.ok("learn", "import", "-", stdin=lines(*runs[:3], *[{**run, "name": "rare"} for run in runs[:4]]))
    assert place.json("learn", "stats", "--handler", "rare")["trend_ratio"] is None


def test_time_asleep_and_interrupted_runs_are_left_out(past: Past, place: Place, module: Any) -> None:
    """A run that slept counts without that; one that a shutdown interrupted counts as done, but its time nowhere."""
    g, now = module, module.clock() - DAY
    for number in range(12):
        past.task(now + number * 100_000, 10_000)
    past.store.write(lambda tx: tx.run(g.NOTE_SLEEP, now=now + 2_005_000, asleep=90_000))
    past.task(now + 2_000_000 - 95_000, 110_000)

    def interrupted(tx: Any) -> None:
        tx.now = now + 3_000_000
        task_id = g.submit(tx, [{"goal": "g", "handler": "work"}])[0]["task_id"]
        for ms, outcome in ((500_000, "interrupted"), (700_000, "completed")):
            taken = g.take(tx, task_id, "w")
            g.start(tx, taken, 1, None, None)
            tx.now += ms
            g.end_attempt(tx, task_id, taken["attempt_id"], {"outcome": outcome})

    past.store.write(interrupted)
    said = place.json("learn", "stats", "--handler", "work")
    assert (said["completed"], said["runs"]) == (14, 13)
    assert said["avg_execution_ms"] == pytest.approx((12 * 10_000 + 20_000) / 13, abs=0.1)
    assert said["p99_execution_ms"] == pytest.approx(20_000, rel=0.025)
    basis = place.json("learn", "suggest-sla", "--handler", "work")
    assert (basis["runs"], basis["quantile_ms"]) == (13, 20_000)


def test_sleep_is_taken_from_what_it_delayed(past: Past, place: Place, module: Any) -> None:
    """Asleep while it waited: the run took what it took, but the SLA's clock is cleared of it; in the half of the handler's history where it happened."""
    g, hour = module, module.clock() // HOUR * HOUR

    def slept(at: int, total: int, wait: int, domain: str) -> None:
        past.store.write(lambda tx: tx.run(g.NOTE_SLEEP, now=at + 95_000, asleep=90_000))
        past.task(at, total, wait, domain=domain)

    for day in range(20, 15, -1):
        past.task(hour - day * DAY, 10_000, domain="a")
    for number in range(5):  # late in the history of the handler, but long before all of the domain b
        slept(hour - 8 * DAY + number * 600_000, 100_000, 0, "a")
    for number in (3, 2):
        past.task(hour - number * DAY, 10_000, domain="b")
    said = place.json("learn", "stats", "--handler", "work")
    assert said["domains"][0]["trend_ratio"] == pytest.approx(1, rel=0.05), "its halves are the handler's"
    assert said["runs"] == 12 and said["avg_execution_ms"] == pytest.approx(10_000) and said["trend_ratio"] == pytest.approx(1, rel=0.05)
    day = next(row for row in said["by_weekday"] if row["weekday"] == WEEKDAYS[(hour // DAY - 8 + 3) % 7])
    assert day["avg_execution_ms"] == pytest.approx(10_000) and said["p99_execution_ms"] == pytest.approx(10_000, rel=0.025)
    slept(hour - DAY, 110_000, 100_000, "b")
    assert place.json("learn", "stats", "--handler", "work")["avg_execution_ms"] == pytest.approx(10_000)
    assert place.json("learn", "suggest-sla", "--handler", "work")["quantile_ms"] == 20_000


def test_a_run_that_slept_and_was_interrupted_counts_nowhere(past: Past, place: Place, module: Any) -> None:
    """Its time says nothing, not even without the sleep."""
    g, now = module, module.clock() - DAY
    past.task(now - HOUR, 10_000)

    def interrupted(tx: Any) -> None:
        tx.now = now
        task_id = g.submit(tx, [{"goal": "g", "handler": "work"}])[0]["task_id"]
        for ms, outcome in ((500_000, "interrupted"), (700_000, "completed")):
            taken = g.take(tx, task_id, "w")
            g.start(tx, taken, 1, None, None)
            tx.now += ms
            if outcome == "completed":
                tx.run(g.NOTE_SLEEP, now=tx.now - 1000, asleep=90_000)
            g.end_attempt(tx, task_id, taken["attempt_id"], {"outcome": outcome})

    past.store.write(interrupted)
    said = place.json("learn", "stats", "--handler", "work")
    assert (said["completed"], said["runs"], said["avg_execution_ms"]) == (2, 1, 10_000)


def test_statistics_are_of_one_domain_when_asked_and_never_of_rescues(past: Past, place: Place, module: Any) -> None:
    """The same figures as its line among all; a rescue is nobody's outcome."""
    hour = module.clock() // HOUR * HOUR
    for number in range(8):
        past.task(hour - number * HOUR - 60_000, 1000 * (number + 1), domain=("shop", "mail")[number % 2], confidence=1.0)
    past.store.write(lambda tx: module.add_sums(tx, hour, "rescue", "shop", 0, (1,) * len(module.METRIC_SUMS), 0))
    found = place.json("learn", "stats")
    assert [(row["handler"], row["domain"]) for row in found] == [("work", "mail"), ("work", "shop")]
    since = module.format_instant(hour - 3 * HOUR - 5000)
    assert sum(row["ended"] for row in place.json("learn", "stats", "--since", since)) == 4, "the hour of that instant counts as a whole"
    rows = {row["domain"]: row for row in found}
    for domain, row in rows.items():
        only = place.json("learn", "stats", "--handler", "work", "--domain", domain)
        assert {name: only[name] for name in row} == row and row["ended"] == 4 and only["domains"] == [row]
    assert rows["shop"]["avg_execution_ms"] == 4000 and rows["mail"]["avg_execution_ms"] == 5000
    assert [(row["stated_from"], row["stated_to"], row["runs"]) for row in rows["shop"]["calibration"]] == [(0.9, 1.0, 4)]


def test_a_trend_needs_five_runs_in_each_half(module: Any) -> None:
    """The later median by the earlier one."""
    facts = module.Facts()
    facts.add_duration(0, module.bucket_of(100), 5)
    facts.add_duration(1, module.bucket_of(300), 4)
    assert module.trend_ratio(facts) is None
    facts.add_duration(1, module.bucket_of(300), 1)
    assert module.trend_ratio(facts) == pytest.approx(3, rel=0.05)


def test_stated_confidence_falls_into_its_tenth(past: Past, place: Place, module: Any) -> None:
    """On the edge it belongs to the upper one, but for 1."""
    stated = (0.0, 0.05, 0.1, 0.29, 0.3, 0.6, 0.7, 0.99, 1.0)
    for number, confidence in enumerate(stated):
        past.task(module.clock() - (number + 1) * 60_000, 1000, confidence=confidence)
    rows = place.json("learn", "stats", "--handler", "work")["calibration"]
    assert [(row["stated_from"], row["runs"]) for row in rows] == [(0.0, 2), (0.1, 1), (0.2, 1), (0.3, 1), (0.6, 1), (0.7, 1), (0.9, 2)]


def test_one_handler_is_a_page_of_eighty_columns(past: Past, place: Place, module: Any) -> None:
    """With failures, confidence, patterns and domains, each line fits; and a handler without history says so."""
    for number in range(20):
        past.task(module.clock() - number * 7 * HOUR - 20_000, 9_000, status="completed" if number % 4 else "failed", attempts=1 if number % 4 else 3,
                  confidence=0.9, domain="a" * 20 if number % 2 else "b")  # fmt: skip
    shown = place.ok("learn", "stats", "--handler", "work").out
    assert max(map(len, shown.splitlines())) <= 80
    for word in ("success    75.0 %", "by hour", "monday", "Brier", "exit 3", "p95"):
        assert word in shown
    place.handler("idle", "--", "true")
    assert "nothing has ended" in place.ok("learn", "stats", "--handler", "idle").out
    assert place.call("learn", "stats", "--handler", "nobody").status == 3


def test_foreground_commands_are_told_as_command(place: Place) -> None:
    """What `grace run` ran is in the statistics, in the outcomes, and in a rehearsal."""
    place.ok("run", "--sla", "1m", "--", "true")
    assert place.call("run", "--sla", "1m", "--", "false").status == 1
    said = place.json("learn", "stats", "--handler", "command")
    assert (said["completed"], said["failed"], said["failures"]) == (1, 1, [{"reason": "exit 1", "n": 1}])
    assert [row["handler"] for row in place.json("learn", "outcomes", "--handler", "command")] == [None, None]
    assert place.json("sla", "rehearse", "--handler", "command")["handlers"][0]["tasks"] == 2


def test_outcomes_are_filtered_and_newest_first(past: Past, place: Place, module: Any) -> None:
    """By handler, domain, success and time, over handlers with and without a name, in one order."""
    now = module.clock()
    place.ok("learn", "import", "-", stdin=lines(*[run_of((now - n * HOUR) / 1000, 5, f"h{n % 2}", n % 3 > 0, domain=f"d{n % 2}") for n in range(1, 10)]))
    place.ok("run", "--", "true")
    past.task(now - 90 * 60_000, 1000)
    every = place.json("learn", "outcomes")
    assert [row["created_at"] for row in every] == sorted((row["created_at"] for row in every), reverse=True) and len(every) == 11
    assert set(every[0]) == {"task_id", "intent_id", "action_type", "handler", "domain", "success", "confidence_score", "execution_time", "context",
                             "created_at", "imported"}  # fmt: skip
    assert [event["payload"]["success"] is True for event in place.events("learning.outcome")] == [True, True]
    assert {row["handler"]: row["execution_time"] for row in every if row["handler"]} == {"h0": 5, "h1": 5, "work": 1}, "in seconds"
    assert len(place.json("learn", "outcomes", "--failed")) == 3 and len(place.json("learn", "outcomes", "--success")) == 8
    assert {row["handler"] for row in place.json("learn", "outcomes", "--domain", "d1")} == {"h1"}
    assert len(place.json("learn", "outcomes", "--since", "100m")) == 3
    assert place.json("learn", "outcomes", "--limit", "2") == every[:2]


# ---- suggested SLAs


def test_below_ten_runs_nothing_is_guessed(place: Place, module: Any) -> None:
    """The refusal says how many there are; the list shows every handler with what is missing; failures do not count."""
    runs = steady(now_of(module), 10)
    place.handler("backup", "--sla", "5m", "--", "true")
    place.ok("learn", "import", "-", stdin=lines(*runs[:9], *[{**run, "success": False, "goal": "failed"} for run in runs]))
    refused = place.call("learn", "suggest-sla", "--handler", "backup", "--json")
    assert refused.status == 4 and refused.out == "" and "9 successful runs" in refused.error["message"]
    (row,) = place.json("learn", "suggest-sla")
    assert (row["handler"], row["sla_ms"], row["runs"], row["missing_runs"], row["current_sla_ms"]) == ("backup", None, 9, 1, 300_000)
    assert place.call("learn", "suggest-sla", "--handler", "backup", "--apply").status == 4
    place.ok("learn", "import", "-", stdin=lines(runs[9]))
    basis = place.json("learn", "suggest-sla", "--handler", "backup")
    assert basis["runs"] == 10 and basis["missing_runs"] == 0 and basis["sla_ms"] >= basis["quantile_ms"] > 50_000


def test_a_suggestion_is_applied_with_its_reason(place: Place, module: Any) -> None:
    """--apply changes the SLA and nothing else of the handler, new tasks have it, and an event tells why."""
    place.handler("backup", "--sla", "5m", "--max-attempts", "7", "--env", "A=b", "--", "true")
    place.ok("learn", "import", "-", stdin=lines(*steady(now_of(module), 200)))
    basis = place.json("learn", "suggest-sla", "--handler", "backup")
    shown = place.ok("learn", "suggest-sla", "--handler", "backup").out
    assert "95 % of its runs" in shown and "grace learn suggest-sla --handler backup --apply" in shown
    before = place.json("handler", "show", "backup")
    place.ok("learn", "suggest-sla", "--handler", "backup", "--apply")
    after = place.json("handler", "show", "backup")
    assert {name for name in before if before[name] != after[name]} == {"sla_ms", "updated_at"} and after["sla_ms"] == basis["sla_ms"]
    (event,) = place.events("learning.applied")
    assert (event["payload"]["old_sla_ms"], event["payload"]["new_sla_ms"]) == (300_000, basis["sla_ms"]) and "200 runs" in event["payload"]["reason"]
    assert place.task(place.submit("now", "--handler", "backup")[1])["sla_ms"] == basis["sla_ms"]
    assert place.call("learn", "suggest-sla", "--apply").status == 2


def test_the_promise_is_that_of_the_option_or_the_setting(place: Place, module: Any) -> None:
    """For suggestions, automatic SLAs and replays alike."""
    place.handler("backup", "--", "true")
    chance = random.Random(1)
    runs = [run_of(now_of(module) - 3600 * n, 60 * math.exp(chance.gauss(0, 0.7)), goal=str(n)) for n in range(200)]
    place.ok("learn", "import", "-", stdin=lines(*runs))
    place.ok("config", "set", "learn.rate", "0.8")
    found = {}
    for rate in (0.6, 0.8, 0.99):
        option = () if rate == 0.8 else ("--rate", str(rate))
        basis = place.json("learn", "suggest-sla", "--handler", "backup", *option)
        (row,) = place.json("learn", "suggest-sla", *option)
        assert (basis["rate"], basis["percentile"], row["percentile"], row["sla_ms"]) == (rate, 100 * rate, 100 * rate, basis["sla_ms"])
        assert place.json("learn", "backtest", "--handler", "backup", *option)["rate"] == rate
        found[rate] = basis["sla_ms"]
    assert found[0.6] < found[0.8] < found[0.99]
    assert place.json("submit-intent", "x", "--handler", "backup", "--sla", "auto")["sla_basis"]["percentile"] == 80


def test_a_handler_that_is_gone_keeps_its_history(place: Place, module: Any) -> None:
    """Its outcomes, statistics and suggestion stay under its name; only what needs the handler itself is refused."""
    place.handler("backup", "--", "true")
    place.ok("learn", "import", "-", stdin=lines(*steady(now_of(module), 50)))
    place.ok("handler", "remove", "backup")
    assert place.json("learn", "suggest-sla", "--handler", "backup")["runs"] == 50
    assert len(place.json("learn", "outcomes", "--handler", "backup")) == 50
    assert place.json("learn", "stats", "--handler", "backup")["completed"] == 50
    assert place.call("learn", "suggest-sla", "--handler", "backup", "--apply").status == 3
    assert place.call("submit-intent", "x", "--handler", "backup", "--sla", "auto").status == 3
    assert place.call("learn", "suggest-sla", "--handler", "backups").status == 3


@pytest.mark.parametrize("seconds", [0, 0.001, 5, 86400 * 300])
def test_identical_durations(place: Place, module: Any, seconds: float) -> None:
    """Whatever they are, the suggestion keeps them all, and statistics stand."""
    now = now_of(module)
    place.ok("learn", "import", "-", stdin=lines(*[run_of(now - number, seconds, goal=str(number)) for number in range(30)]))
    basis = place.json("learn", "suggest-sla", "--handler", "backup")
    assert basis["sla_ms"] >= max(1, seconds * 1000) and basis["quantile_ms"] == seconds * 1000
    said = place.json("learn", "stats", "--handler", "backup")
    assert said["p99_execution_ms"] == pytest.approx(seconds * 1000, rel=0.025)
    if seconds < 1:  # else all began before the first had ended, and there is nothing to predict from
        assert place.json("learn", "backtest", "--handler", "backup")["grace"]["coverage_rate"] == 1


def test_a_suggestion_below_what_the_runs_took_says_why(place: Place, module: Any) -> None:
    """Of late they are shorter: the rest is no reserve then, and is not called so."""
    now = now_of(module)
    place.handler("backup", "--", "true")
    place.ok("learn", "import", "-", stdin=lines(*[run_of(now - 3600 * (400 - n), 600 if n < 200 else 60 + n % 5) for n in range(400)]))
    assert place.json("learn", "suggest-sla", "--handler", "backup")["margin"] < 1
    assert "of late they were shorter" in " ".join(place.ok("learn", "suggest-sla", "--handler", "backup").out.split())
    shown = place.ok("learn", "suggest-sla", "--handler", "backup", "--apply").out
    assert "before, it was -" in shown
    again = place.json("learn", "suggest-sla", "--handler", "backup", "--apply")
    assert again["previous_sla_ms"] == again["current_sla_ms"] == again["sla_ms"] and again["applied"] is True


# ---- --sla auto


def test_an_automatic_sla_is_a_number_with_its_basis(place: Place, module: Any) -> None:
    """Intent and task carry it, the answer says how it came about, in a batch for each line; without a basis nothing is submitted."""
    place.handler("backup", "--", "true")
    place.handler("fresh", "--", "true")
    refused = place.call("submit-intent", "x", "--handler", "backup", "--sla", "auto", "--json")
    assert refused.status == 4 and "0 successful runs of backup" in refused.error["message"] and "--sla" in refused.error["hint"]
    place.ok("learn", "import", "-", stdin=lines(*steady(now_of(module), 300)))
    done = place.json("submit-intent", "x", "--handler", "backup", "--sla", "auto")
    assert 60_000 < done["sla_basis"]["sla_ms"] < 120_000 and done["sla_basis"]["runs"] == 300
    assert place.task(done["task_id"])["sla_ms"] == place.intent(done["intent_id"])["sla_ms"] == done["sla_basis"]["sla_ms"]
    batch = [{"goal": str(number), "handler": "backup", "sla": "auto"} for number in range(3)] + [{"goal": "own", "handler": "backup", "sla": "5s"}]
    answers = place.ok("submit-intent", "--batch", "-", "--json", stdin=lines(*batch)).lines
    assert [answer.get("sla_basis", {}).get("runs") for answer in answers] == [300, 300, 300, None]
    known = place.sql("SELECT COUNT(*) FROM intent_records")
    refused = place.call("submit-intent", "--batch", "-", stdin=lines(batch[0], {"goal": "x", "handler": "fresh", "sla": "auto"}))
    assert refused.status == 4 and "line 2" in refused.err and place.sql("SELECT COUNT(*) FROM intent_records") == known
    assert place.call("submit-intent", "x", "--handler", "nobody", "--sla", "auto").status == 3
    first = place.json("submit-intent", "x", "--handler", "fresh", "--key", "once")
    again = place.json("submit-intent", "x", "--handler", "fresh", "--key", "once", "--sla", "auto")
    assert again["duplicate"] and again["intent_id"] == first["intent_id"]


def test_a_foreground_command_learns_from_its_own_runs(place: Place) -> None:
    """Runs of the same goal are the basis, however many others there were since; another goal has none yet, and is refused before anything runs."""
    for _ in range(10):
        place.ok("run", "--", "true")
    place.sql("""WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 12000)
      INSERT INTO outcome_records (task_id, action_type, domain, success, execution_time, context, created_at)
      SELECT 'other' || i, 'intent_general', 'general', 1, 5.0, '{"goal":"other"}', (SELECT MAX(created_at) FROM outcome_records) FROM n""")
    task = json.loads(place.ok("run", "--sla", "auto", "--json", "--", "true").out)
    assert task["sla_ms"] is not None and task["status"] == "completed"
    assert place.call("run", "--sla", "auto", "--domain", "other", "--", "true").status == 125
    assert place.call("run", "--sla", "auto", "--goal", "completed", "--", "true").status == 125, "a word of every outcome, and no goal so far"
    refused = place.call("run", "--sla", "auto", "--", "touch", "never")
    assert refused.status == 125 and "0 successful runs of this goal" in refused.err and not (place.folder / "never").exists()


def test_an_automatic_sla_is_for_the_hour_of_its_start(place: Place, module: Any) -> None:
    """Nights are slow: who submits for the night gets more, in one batch too, where each kind of work has its own."""
    noon = module.clock() // DAY * DAY // 1000 - 43_200
    for name, factor in (("backup", 1), ("quick", 0.1)):
        place.handler(name, "--", "true")
        runs = [run_of(noon - 3600 * n, factor * (500 if (noon // 3600 - n) % 24 in (1, 2, 3) else 50) * (1 + n % 7 / 20), name) for n in range(600)]
        place.ok("learn", "import", "-", stdin=lines(*runs))
    day = module.clock() // DAY * DAY + 2 * DAY
    wanted = [(name, hour) for name in ("backup", "quick") for hour in (2, 14)]
    batch = [{"goal": "g", "handler": name, "sla": "auto", "at": module.format_instant(day + hour * HOUR)} for name, hour in wanted]
    bases = [answer["sla_basis"] for answer in place.ok("submit-intent", "--batch", "-", "--json", stdin=lines(*batch)).lines]
    assert [basis["hour"] for basis in bases] == [2, 14, 2, 14]
    night, noon_ms, quick_night, quick_noon = (basis["sla_ms"] for basis in bases)
    assert night > 3 * noon_ms and quick_night > 3 * quick_noon and noon_ms > 3 * quick_noon
    alone = place.json("submit-intent", "g", "--handler", "backup", "--sla", "auto", "--at", module.format_instant(day + 2 * HOUR))
    assert alone["sla_basis"] == bases[0]


def test_an_automatic_sla_is_as_cautious_as_it_says(module: Any) -> None:
    """Of few runs more is asked than of many."""
    chance = random.Random(3)
    runs = [(1_790_000_000_000 + n * HOUR, round(60_000 * math.exp(chance.gauss(0, 0.5)))) for n in range(40)]
    basis = module.auto_sla(runs, 0.8, runs[-1][0])
    assert basis["percentile"] == 80 and 85 < basis["cautious_percentile"] < 95
    assert basis["sla_ms"] == module.round_up(module.predict_duration(runs, basis["cautious_percentile"] / 100, runs[-1][0]))
    assert basis["sla_ms"] > module.round_up(module.predict_duration(runs, 0.8, runs[-1][0]))


# ---- SLAs that follow


def adapted(place: Place) -> dict[str, Any]:
    return dict(place.json("handler", "show", "backup"))


def test_a_handlers_sla_follows_within_bounds(place: Place, module: Any) -> None:
    """With learn.adapt a daemon moves it, beside the person's own; new tasks have it; an event gives old, new and reason; off ends it."""
    place.handler("backup", "--sla", "10m", "--external")
    place.handler("without", "--external")
    runs = steady(now_of(module), 100)
    place.ok("learn", "import", "-", stdin=lines(*runs, *[{**run, "name": "without"} for run in runs]))
    place.ok("daemon", "--once")
    assert adapted(place)["adapted_sla_ms"] is None
    place.ok("config", "set", "learn.adapt", "on")
    place.ok("daemon", "--once")
    assert (adapted(place)["sla_ms"], adapted(place)["adapted_sla_ms"]) == (600_000, 300_000)
    (event,) = place.events("learning.adapted")
    assert event["payload"]["handler"] == "backup" and (event["payload"]["old_sla_ms"], event["payload"]["new_sla_ms"]) == (600_000, 300_000)
    assert "100 runs" in event["payload"]["reason"] and "0.5 times" in event["payload"]["reason"] and event["payload"]["basis"]["runs"] == 100
    assert place.task(place.submit("now", "--handler", "backup")[1])["sla_ms"] == 300_000
    assert place.json("handler", "show", "without")["adapted_sla_ms"] is None
    place.ok("daemon", "--once")
    assert len(place.events("learning.adapted")) == 1
    place.ok("config", "set", "learn.adapt", "off")
    assert (adapted(place)["sla_ms"], adapted(place)["adapted_sla_ms"]) == (600_000, None)
    assert "turned off" in place.events("learning.adapted")[-1]["payload"]["reason"]
    assert place.task(place.submit("then", "--handler", "backup")[1])["sla_ms"] == 600_000


def test_a_running_daemon_adapts_again_after_its_interval(place: Place, module: Any) -> None:
    """Once the bounds allow more, the SLA moves on; --replace brings the person's own back."""
    place.handler("backup", "--sla", "10m", "--external")
    place.ok("learn", "import", "-", stdin=lines(*steady(now_of(module), 100)))
    for name, value in (("learn.adapt", "on"), ("learn.adapt_every", "100ms"), ("bridge.repair_every", "100ms")):
        place.ok("config", "set", name, value)
    with place.daemon():
        until(lambda: adapted(place)["adapted_sla_ms"] == 300_000, "the first change")
        place.ok("config", "set", "learn.adapt_low", "0.01")
        until(lambda: adapted(place)["adapted_sla_ms"] < 120_000, "the second change")
        place.ok("config", "set", "learn.adapt_every", "1d")
    suggested = place.json("learn", "suggest-sla", "--handler", "backup")
    assert suggested["current_sla_ms"] == suggested["sla_ms"]
    place.ok("handler", "add", "backup", "--sla", "20m", "--external", "--replace")
    assert (adapted(place)["sla_ms"], adapted(place)["adapted_sla_ms"]) == (1_200_000, None)
    assert place.events("learning.adapted")[-1]["payload"]["new_sla_ms"] == 1_200_000


def test_a_daemon_that_runs_once_adapts_all_handlers(place: Place, module: Any) -> None:
    """Where another daemon would take one a round, and each only once in the interval, whoever comes first."""
    names = [f"backup{n}" for n in range(3)]
    for name in names:
        place.handler(name, "--sla", "10m", "--external")
    place.ok("learn", "import", "-", stdin=lines(*[{**run, "name": name} for name in names for run in steady(now_of(module), 30)]))
    place.ok("config", "set", "learn.adapt", "on")
    place.ok("daemon", "--drain")
    assert place.events("learning.adapted") == [], "one that only lets work finish begins nothing new"
    place.ok("daemon", "--once")
    assert [row["adapted_sla_ms"] for row in place.json("handler", "list")] == [300_000] * 3
    assert sorted(event["payload"]["handler"] for event in place.events("learning.adapted")) == names


def test_a_change_is_put_into_force_only_if_it_still_fits(place: Place, module: Any) -> None:
    """What was reckoned before the transaction: not when somebody has begun meanwhile, turned it off, adapted it, or set another SLA; no event then."""
    place.handler("backup", "--sla", "10m", "--external")
    place.ok("learn", "import", "-", stdin=lines(*steady(now_of(module), 30)))
    with contextlib.closing(module.Store(str(place.db))) as store:
        assert store.write(module.begin_adapting) == [], "it is off"
        place.ok("config", "set", "learn.adapt", "on")
        assert store.write(module.begin_adapting) == ["backup"]
        assert store.write(module.begin_adapting) == [], "another has begun"
        change = store.read(lambda reader: module.wanted_adaptation(reader, "backup", module.clock()))
        assert change["new_ms"] == 300_000

        def put() -> bool:
            return bool(store.write(lambda tx: module.adapt(tx, change)))

        place.ok("config", "set", "learn.adapt", "off")
        assert not put()
        place.ok("config", "set", "learn.adapt", "on")
        place.ok("handler", "add", "backup", "--sla", "20m", "--external", "--replace")
        assert not put() and place.json("handler", "show", "backup")["adapted_sla_ms"] is None
        place.ok("handler", "add", "backup", "--sla", "10m", "--external", "--replace")
        assert put() and not put(), "it is the other one's now"
        assert store.read(lambda reader: module.wanted_adaptation(reader, "backup", module.clock())) is None, "half of the person's own is the end"
        change = {**change, "adapted_sla_ms": 300_000, "new_ms": 400_000}
        place.ok("handler", "add", "backup", "--sla", "5m", "--external", "--replace")
        assert not put(), "what is in force is the same, but it is a person's, with other bounds"
    assert place.json("handler", "show", "backup")["adapted_sla_ms"] is None
    assert [event["payload"]["new_sla_ms"] for event in place.events("learning.adapted")] == [300_000, 300_000], "the second: a person's"


def test_a_clock_that_was_set_back_does_not_put_adapting_off(place: Place, module: Any) -> None:
    """The last look lies in the future then: the next one is due at once."""
    with contextlib.closing(module.Store(str(place.db))) as store:
        place.ok("config", "set", "learn.adapt", "on")
        store.write(module.begin_adapting)
        last = int(store.value(module.GET_SETTING, name="_adapted_at"))
        due = [module.adaptation_due(store, last + ms) for ms in (0, HOUR - 1, HOUR, -1, -DAY)]
        for value in ("off", "on"):
            place.ok("config", "set", "learn.adapt", value)
        assert module.adaptation_due(store, last) is True, "whoever turns it on does not wait for the interval"
    assert due == [False, False, True, True, True]


@pytest.mark.parametrize(("own", "before", "suggested", "after"), [
    (100, 100, 120, 120), (100, 100, 104, None), (100, 100, 96, None), (100, 100, 95, 95), (100, 100, 900, 200), (100, 100, 1, 50), (100, 200, 900, None),
    (100, 50, 60, 60), (1, 1, 1, None), (3, 3, 1, 2)])  # fmt: skip
def test_how_far_an_sla_follows(module: Any, own: int, before: int, suggested: int, after: int | None) -> None:
    """Within half and twice of the person's own, and not for less than 5 %."""
    assert module.adapted_sla(own, before, suggested, 0.5, 2.0) == after


@pytest.mark.parametrize(("name", "value"), [("learn.rate", "1"), ("learn.rate", "95"), ("learn.rate", "x"), ("learn.adapt", "yes"), ("learn.adapt_low", "1.5"),
                                             ("learn.adapt_high", "0.5"), ("learn.adapt_every", "5")])  # fmt: skip
def test_settings_of_learning_refuse_what_they_cannot_be(place: Place, name: str, value: str) -> None:
    """With a right example."""
    done = place.call("config", "set", name, value)
    assert done.status == 2 and "write" in done.err
    place.ok("config", "set", "learn.rate", "0.9")
    assert place.json("config", "get", "learn.rate")["value"] == 0.9 and place.json("config", "get", "learn.adapt")["value"] == "off"


# ---- replays and rehearsals


def test_a_byte_order_mark_is_no_part_of_the_first_line(place: Place, module: Any) -> None:
    """Some editors leave one."""
    place.ok("learn", "import", "-", stdin=b"\xef\xbb\xbf" + lines(*steady(now_of(module), 3)))
    assert len(place.json("learn", "outcomes")) == 3


def test_time_that_it_waited_for_another_intent_teaches_nothing(place: Place, module: Any) -> None:
    """A task that was blocked for long counts from when it could start."""
    g = module
    place.handler("work", "--external")
    first, _ = place.submit("first", "--handler", "work")
    place.submit("second", "--handler", "work", "--after", first)
    with contextlib.closing(g.Store(str(place.db))) as store:
        start = g.clock()

        def later(ms: int, act: Any) -> Any:
            def run(tx: Any) -> Any:
                tx.now = start + ms
                return act(tx)

            return store.write(run)

        for ms in (600_000, 605_000):
            task = later(ms, lambda tx: g.claim_external(tx, ["work"], "w", 60_000))
            later(ms + 2000, lambda tx, task=task: g.end_attempt(tx, task["task_id"], task["attempt_id"], {"outcome": "completed"}))
        taught = [run[1] for run in g.runs_of(store, "work")]
    assert 600_000 <= taught[0] < 603_000 and 4000 <= taught[1] < 6000


def test_time_that_it_waited_for_consent_teaches(past: Past, module: Any) -> None:
    """The next one has to wait for people, too: its SLA is to allow for that."""
    g, start = module, module.clock() - DAY

    def lived(tx: Any) -> None:
        tx.now = start
        task_id = g.submit(tx, [{"goal": "g", "handler": "work"}])[0]["task_id"]
        parked = g.park(tx, g.get_task(tx, task_id))
        tx.now = start + 600_000
        g.changed_task(tx, parked, g.UNBLOCK, next_at=None)
        taken = g.take(tx, task_id, "w")
        g.start(tx, taken, 1, None, None)
        tx.now = start + 605_000
        g.end_attempt(tx, task_id, taken["attempt_id"], {"outcome": "completed"})

    past.store.write(lived)
    assert [ms for _, ms in g.runs_of(past.store, "work")] == [605_000]


def test_commands_have_no_suggestion_of_their_own(place: Place) -> None:
    """They are told apart by what they do; whoever asks is told how."""
    for words in (("suggest-sla",), ("backtest",)):
        done = place.call("learn", *words, "--handler", "command")
        assert done.status == 2 and "--sla auto" in done.err


def test_a_replay_says_whether_it_would_have_predicted(place: Place, module: Any) -> None:
    """Three ways side by side, the fixed one from the option, the handler, or the first runs; too little history is said in words."""
    place.ok("learn", "import", "-", stdin=lines(*steady(now_of(module), 400), run_of(now_of(module) - 5, 1, "single")))
    said = place.json("learn", "backtest", "--handler", "backup")
    assert 0.9 <= said["grace"]["coverage_rate"] <= 1 and said["grace"]["pinball_loss_ms"] < said["mean_of_last_ten"]["pinball_loss_ms"]
    assert place.json("learn", "backtest", "--handler", "backup", "--fixed", "10m")["fixed"]["coverage_rate"] == 1
    assert [row["handler"] for row in place.json("learn", "backtest")] == ["backup"]
    place.handler("backup", "--sla", "7m", "--", "true")
    assert place.json("learn", "backtest", "--handler", "backup")["fixed_ms"] == 420_000
    shown = place.ok("learn", "backtest").out
    assert "mean of last ten" in shown and "fixed 7m" in shown and max(map(len, shown.splitlines())) <= 80
    assert "too few" in place.ok("learn", "backtest", "--handler", "single").out
    assert place.call("learn", "backtest", "--handler", "nobody").status == 3


@pytest.mark.parametrize(("kept", "losses", "said"), [
    ((0.95, 0.95, 0.95), (3, 2, 1), "the mean of the last ten did best"), ((0.94, 0.93, 0.5), (2, 3, 1), "grace did best"),
    ((0.929, 0.93, 0.9), (1, 3, 2), "the fixed 5s did best"), ((0.9, 0.92, 0.1), (1, 2, 3), "none kept 95.0 %")])  # fmt: skip
def test_the_verdict_of_a_replay(module: Any, kept: tuple[float, ...], losses: tuple[int, ...], said: str) -> None:
    """The least loss, among those that kept the promise within two points."""
    ways = zip(("grace", "fixed", "mean_of_last_ten"), kept, losses, strict=True)
    document = {"fixed_ms": 5000, "rate": 0.95, **{way: {"coverage_rate": rate, "pinball_loss_ms": loss} for way, rate, loss in ways}}
    assert module.backtest_verdict(document) == said


def test_a_replay_takes_as_many_runs_as_asked(place: Place, module: Any) -> None:
    """More than a prediction looks at; the verdict stands below."""
    place.ok("learn", "import", "-", stdin=lines(*steady(now_of(module), 2100)))
    assert place.json("learn", "backtest", "--handler", "backup")["recorded_runs"] == 2100
    assert place.json("learn", "backtest", "--handler", "backup", "--limit", "60")["recorded_runs"] == 60
    assert re.search(r"^backup: .* did best$", place.ok("learn", "backtest", "--limit", "60").out, re.MULTILINE)
    (row,) = place.json("learn", "suggest-sla")
    assert (row["runs"], row["missing_runs"]) == (2000, 0)


def test_replays_of_nothing(place: Place) -> None:
    """An empty history has clear words everywhere."""
    for words in (("learn", "stats"), ("learn", "outcomes"), ("learn", "suggest-sla"), ("learn", "backtest"), ("sla", "rehearse")):
        assert place.ok(*words).out.startswith("no"), words
    assert place.json("learn", "backtest") == place.json("learn", "outcomes") == place.json("learn", "stats") == []


@pytest.mark.parametrize("seed", range(3))
def test_a_rehearsal_counts_what_the_ladder_would_have_done(past: Past, place: Place, module: Any, seed: int) -> None:
    """Against a count by hand; what was fired is what the events say."""
    chance, now = random.Random(seed), module.clock()
    tasks = [(chance.choice([10_000, 20_000, None]), chance.randrange(1000, 50_000)) for _ in range(60)]
    for sla, total in tasks:
        past.task(now - chance.randrange(HOUR, 10 * DAY), total, sla_ms=sla, status=chance.choice(["completed", "completed", "cancelled"]))
    (row,) = place.json("sla", "rehearse", "--warn-at", "0.5", "--critical-at", "1.25")["handlers"]
    ours = [(sla, total) for sla, total in tasks if sla]
    late, warned = sum(total >= sla for sla, total in ours), sum(total >= 0.5 * sla for sla, total in ours)
    assert row["tasks"] == len(ours)
    assert row["rehearsed"] == {"warnings": warned, "violations": late, "criticals": sum(total >= 1.25 * sla for sla, total in ours)}
    assert (row["useful_warnings"], row["false_warnings"]) == (late, warned - late)
    events = Counter(topic for (topic,) in place.sql("SELECT topic FROM events WHERE topic LIKE 'htm.sla.%'"))
    assert row["fired"] == {"warnings": events["htm.sla.warning"], "violations": events["htm.sla.violated"], "criticals": events["htm.sla.critical"]}
    tried = place.json("sla", "rehearse", "--sla", "30s", "--handler", "work")["handlers"][0]
    assert tried["tasks"] == 60 and tried["rehearsed"]["violations"] == sum(total >= 30_000 for _, total in tasks)
    assert place.json("sla", "rehearse", "--since", "10m")["handlers"] == []
    assert place.call("sla", "rehearse", "--warn-at", "1", "--critical-at", "1").status == 2


def test_rehearsals_and_settings_are_read_in_eighty_columns(past: Past, place: Place, module: Any) -> None:
    """No line is broken in the middle of a word by the terminal."""
    for number in range(5):
        past.task(module.clock() - (number + 1) * HOUR, 3000 * number, sla_ms=10_000)
    for words in (("sla", "rehearse"), ("config", "list")):
        status, text = Terminal(place, *words).end()
        assert status == 0 and 60 < max(map(len, text.splitlines())) <= 80, text


def test_what_happens_at_a_threshold_itself(past: Past, place: Place, module: Any) -> None:
    """Counted as the ladder does: at it, not behind it. The lead is what a warning would have come before the deadline, on average."""
    now = module.clock() // 1000 * 1000 - DAY
    for number, total in enumerate((4999, 5000, 9999, 10_000, 14_999, 15_000)):
        past.task(now - number * HOUR, total, sla_ms=10_000)
    (row,) = place.json("sla", "rehearse", "--warn-at", "0.5", "--critical-at", "1.5", "--handler", "work")["handlers"]
    assert row["rehearsed"] == {"warnings": 5, "violations": 3, "criticals": 1}
    assert (row["useful_warnings"], row["false_warnings"], row["useful_rate"], row["lead_ms"]) == (3, 2, 0.6, 5000)
    (row,) = place.json("sla", "rehearse", "--warn-at", "0.9", "--critical-at", "1.5")["handlers"]
    assert row["lead_ms"] == 1000 and row["fired"] == {"warnings": 4, "violations": 3, "criticals": 0}


def test_a_rehearsal_of_several_handlers_and_of_imported_runs(past: Past, place: Place, module: Any) -> None:
    """By their own thresholds where none are named, with a line for all; an SLA can be tried on runs that had none."""
    now = module.clock() - DAY
    place.handler("keen", "--warn-at", "0.2", "--critical-at", "4", "--", "true")
    for number in range(4):
        past.task(now - number * HOUR, 3000 + 3000 * number, sla_ms=10_000)
        past.task(now - number * HOUR, 3000 + 3000 * number, sla_ms=10_000, handler="keen")
    place.ok("learn", "import", "-", stdin=lines(*[run_of(now / 1000 - n, 5 + n, "elsewhere") for n in range(10)]))
    document = place.json("sla", "rehearse")
    assert [(row["handler"], row["warn_at"], row["critical_at"], row["rehearsed"]["warnings"]) for row in document["handlers"]] == [
        ("keen", 0.2, 4, 4), ("work", 0.8, 2, 2)]  # fmt: skip
    total = document["total"]
    assert (total["tasks"], total["rehearsed"]["warnings"], total["useful_warnings"], total["false_warnings"]) == (8, 6, 2, 4)
    assert total["useful_rate"] == pytest.approx(2 / 6) and "all" in place.ok("sla", "rehearse").out
    (row,) = place.json("sla", "rehearse", "--sla", "10s", "--handler", "elsewhere")["handlers"]
    assert (row["tasks"], row["rehearsed"]["violations"]) == (10, 5)
    assert place.call("sla", "rehearse", "--warn-at", "0.9", "--critical-at", "0.9").status == 2


def test_a_clock_that_was_set_back_breaks_nothing(past: Past, place: Place, module: Any) -> None:
    """Tasks that end before they began count as taking no time; outcomes of the future do not stop a suggestion."""
    now = module.clock()
    for number in range(12):
        past.task(now - 1000 * number, -5000)
        past.task(now + DAY + number, 2000)
    assert place.json("learn", "suggest-sla", "--handler", "work")["runs"] == 24
    assert place.json("learn", "stats", "--handler", "work")["completed"] == 24
    for words in (("learn", "backtest"), ("sla", "rehearse"), ("submit-intent", "x", "--handler", "work", "--sla", "auto")):
        place.ok(*words)


# ---- real input


def test_the_readmes_log_becomes_outcomes_whose_sla_holds(place: Place, tmp_path: Path) -> None:
    """The README's own command on what dpkg wrote; an SLA fitted on the first four fifths keeps the promised share of the last."""
    need("bash", "awk")
    readme = (ROOT / "README.md").read_text()
    (block,) = [text for text in re.findall(r"^```sh\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL) if "/var/log/dpkg.log" in text]
    command = block.replace("/var/log/dpkg.log", str(ROOT / "tests" / "data" / "dpkg.log"))
    environment = {**place.environment, "PATH": f"{Path(GRACE).parent}:{place.environment['PATH']}"}
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", command], env=environment, cwd=place.folder, capture_output=True, text=True,
                          timeout=LIMIT, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "dpkg-unpacked" in done.stdout and "dpkg-installed" in done.stdout
    for name in ("dpkg-unpacked", "dpkg-installed"):
        history = place.json("learn", "outcomes", "--handler", name, "--limit", "100000")[::-1]
        assert len(history) > 700
        fitted = len(history) * 4 // 5
        other = Place(tmp_path / name)
        other.folder.mkdir()
        first = [{"name": name, "goal": row["context"]["goal"], "start": start_of(row), "end": row["created_at"], "success": True} for row in history[:fitted]]
        other.ok("learn", "import", "-", stdin=lines(*first))
        sla = other.json("learn", "suggest-sla", "--handler", name)["sla_ms"]
        rest = [row["execution_time"] * 1000 for row in history[fitted:]]
        assert sum(ms <= sla for ms in rest) >= 0.95 * len(rest)
        other.close()


def start_of(row: dict[str, Any]) -> str:
    from datetime import datetime, timedelta

    return (datetime.fromisoformat(row["created_at"]) - timedelta(seconds=row["execution_time"])).isoformat(timespec="milliseconds")
