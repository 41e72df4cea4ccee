"""What SQLite and the disk alone would allow: the rows, events and index entries of a submission, a claim and an end, and nothing else.

Written with bare apsw into the same tables, in as many commits of the same durability, but with no decision taken, no row read, no
trigger, CHECK or foreign key tried, and each row written once where grace changes it twice. What no queue with these rows can beat.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import rig as r

OPENING = ("PRAGMA synchronous = FULL", "PRAGMA foreign_keys = OFF", "PRAGMA ignore_check_constraints = ON", "PRAGMA temp_store = MEMORY")
SUBMITTED = ("htm.task.created", "agentic.intent.created")
ENDED = ("htm.task.completed", "agentic.intent.completed", "learning.outcome")
COUNT = "UPDATE task_counts SET n = n + ? WHERE handler = 'bench' AND status = ? AND priority = 'normal' AND level = 0"
CLAIM = """UPDATE htm_tasks SET status = 'running', attempt_number = 1, attempt_id = ?, assigned_worker = 'bench', assigned_at = ?,
  started_at = ?, queue_time_ms = 5, updated_at = ? WHERE seq = ?"""
END = """UPDATE htm_tasks SET status = 'completed', attempt_id = NULL, next_at = NULL, finished_at = ?, sla_met = 1, sla_buffer_ms = 5,
  exit_status = 0, execution_time_ms = 5, total_time_ms = 5, updated_at = ? WHERE seq = ?"""
END_ATTEMPT = """UPDATE htm_task_attempts SET finished_at = ?, outcome = 'completed', ended_by = 'exit', exit_status = 0
  WHERE task_id = ? AND attempt_id = ?"""
EXECUTING = "UPDATE intent_records SET status = 'executing' WHERE seq = ?"
COMPLETED = "UPDATE intent_records SET status = 'completed', completed_at = ?, success = 1, sla_met = 1, learned_from = 1 WHERE seq = ?"
Statement = Callable[[int], tuple[str, tuple[Any, ...]]]


class Floor:
    """A database that has seen one task through in earnest; its rows are the patterns for all others."""

    def __init__(self, rig: r.Rig):
        path = rig.new_database("floor")
        store = rig.store(path)
        store.write(lambda tx: rig.end_tasks(tx, rig.start_tasks(tx, [rig.g.HOUR])))
        rig.submit(store, 1)
        self.con = store.con
        self.first = self.next = 3
        for (name,) in self.con.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'").fetchall():
            self.con.execute(f'DROP TRIGGER "{name}"')
        for pragma in OPENING:
            self.con.execute(pragma)
        self.store = store  # keeps the connection
        self.now = rig.g.clock()
        self.intent = self._pattern("intent_records", "seq = 2", "intent_id", "htm_task_id")
        self.task = self._pattern("htm_tasks", "seq = 2", "task_id", "intent_id")
        self.attempt = self._pattern("htm_task_attempts", "task_id IS NOT NULL", "attempt_id", "task_id", finished_at=None, outcome=None)
        self.outcome = self._pattern("outcome_records", "seq = 1", "task_id", "intent_id")
        topics = (*SUBMITTED, *ENDED, "htm.task.update")
        self.events = {topic: self._pattern("events", f"topic = '{topic}'", "subject") for topic in topics}

    def _pattern(self, table: str, where: str, *ids: str, **changed: Any) -> Statement:
        """An INSERT like the row that was written in earnest, with the ids of the n-th."""
        cursor = self.con.execute(f"SELECT * FROM {table} WHERE {where} LIMIT 1")
        names = [column[0] for column in cursor.get_description()]
        row = {**dict(zip(names, next(cursor), strict=True)), **changed}
        kept = [name for name in names if name not in ("seq", "rank")]
        cursor.close()
        sql = f"INSERT INTO {table} ({', '.join(kept)}) VALUES ({', '.join('?' * len(kept))})"
        return lambda n: (sql, tuple(f"{name[:3]}_{n:019d}" if name in ids else row[name] for name in kept))

    def _write(self, statements: list[tuple[str, list[tuple[Any, ...]]]], durable: bool = True) -> None:
        self.con.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
        self.con.execute("BEGIN IMMEDIATE")
        for sql, rows in statements:
            self.con.executemany(sql, rows)
        self.con.execute("COMMIT")

    @staticmethod
    def _each(pattern: Statement, numbers: range) -> tuple[str, list[tuple[Any, ...]]]:
        made = [pattern(n) for n in numbers]
        return made[0][0], [row for _, row in made]

    def submission(self, size: int) -> list[tuple[str, list[tuple[Any, ...]]]]:
        """The statements of one transaction; made before the clock runs."""
        numbers = range(self.next, self.next + size)
        self.next += size
        patterns = [self.intent, self.task, *(self.events[topic] for topic in SUBMITTED)]
        return [*(self._each(pattern, numbers) for pattern in patterns), (COUNT, [(size, "queued")])]

    def submit(self, n: int) -> float:
        """Seconds of one durable submission."""
        work = [self.submission(1) for _ in range(n)]
        return r.timed(lambda: [self._write(statements) for statements in work]) / n

    def work(self, batches: int, size: int) -> float:
        """Claim and start so many in one transaction, end them in a durable one; seconds for each task."""
        self._write(self.submission(batches * size), durable=False)
        work = []
        for batch in range(batches):
            numbers = range(self.first + batch * size, self.first + (batch + 1) * size)
            work.append((self._claims(numbers), self._ends(numbers)))
        self.first += batches * size

        def run() -> None:
            for claims, ends in work:
                self._write(claims, durable=False)
                self._write(ends)

        return r.timed(run) / (batches * size)

    def _claims(self, numbers: range) -> list[tuple[str, list[tuple[Any, ...]]]]:
        now, update = self.now, self._each(self.events["htm.task.update"], numbers)
        return [(CLAIM, [(f"att_{n:019d}", now, now, now, n) for n in numbers]), self._each(self.attempt, numbers), update, update,
                (EXECUTING, [(n,) for n in numbers]), (COUNT, [(-len(numbers), "queued"), (len(numbers), "running")])]  # fmt: skip

    def _ends(self, numbers: range) -> list[tuple[str, list[tuple[Any, ...]]]]:
        now = self.now
        return [(END, [(now, now, n) for n in numbers]), (END_ATTEMPT, [(now, f"tas_{n:019d}", f"att_{n:019d}") for n in numbers]),
                (COMPLETED, [(now, n) for n in numbers]), self._each(self.outcome, numbers),
                *(self._each(self.events[topic], numbers) for topic in ENDED),
                (COUNT, [(-len(numbers), "running"), (len(numbers), "completed")])]  # fmt: skip

    def close(self) -> None:
        self.store.close()
