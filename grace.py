"""grace: tasks, intents and their deadlines in one local SQLite database.

People and programs submit *intents* (a goal with a deadline). Each becomes a *task* in the queue (the HTM, the
hierarchical task manager), run by a *handler* under its SLA: a warning at 80 %, an escalation at 100 %, a rescue at
200 %. Everything that happens is an event in the same transaction as the change that it tells of.

A vault keeps credentials sealed. Requesters get one only with the *consent* of people, whose passphrases unlock the keys
that open it; what happens there is in an audit log chained by hash.

The file reads downwards; a section uses only those above it (`grep -n '^# ===' grace.py` prints this map):

    words         version, exit codes, errors, the closed sets
    rules         pure decisions: durations, ids, deadlines, ladder steps, back-off, retries
    prediction    how long runs take: quantiles online, a suggested SLA, the replay of a history
    store         opening, upgrading, transactions, the writers' queue, driver errors into ours
    settings      what the owner may tune
    events        writing and reading the bus, the bell that wakes waiting processes
    system        what the kernel says about processes
    audit         leaves chained by hash
    vault         keys, lists of approvers and of rules, sealed values, delegations
    consent       rules applied, asking, approving, opening; standing consents
    doctor        what is wrong or weak on this machine
    queue         rows of handlers, tasks and attempts
    ladder        what is due, and the steps
    statistics    what ended by the hour, histograms, percentiles, counting anew
    learning      outcomes, past runs, SLAs that follow from them
    forecast      when a task will start and be done, and what would save it
    intents       rows, links to tasks
    lifecycle     submit, start, finish, cancel, retry, recover, repair: the functions that write across sections
    processes     logs, starting, watching and ending process groups
    daemon        the loop, the foreground runner, signals
    output        rows to tables or JSON
    command line  the commands, and main()

To add
    a command   a function under "command line" with @command; its work belongs in the section that owns the rows
    an event    emit(tx, topic, …) where the change is made; the topics of tasks are written by triggers in schema.sql
    a level     a row in sla_levels, a step in ladder_steps(), its effect in take_step()
    a table     in the upper half of schema.sql, with a numbered step in MIGRATIONS once a release has been made
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import gc
import itertools
import json
import math
import operator
import os
import re
import signal
import stat
import sys
import time
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import apsw
import click

# =====================================================================================================================
# words
# The names that everything else uses: version, exit codes, errors, the closed sets. An error carries its exit code, a
# word for programs, one line for people, and where there is something to do, a hint.

__version__ = "0.1.0"

Row = dict[str, Any]

PRIORITIES = ("critical", "high", "normal", "low")  # in rank order
RISK_LEVELS = ("low", "medium", "high", "critical")
CONSENT_STATUS = ("pending", "approved", "denied", "expired", "revoked", "used")
FINAL = ("completed", "failed", "timeout", "cancelled")
LEVELS = ("none", "warning", "violated", "critical")
TASK_TRANSITIONS = {
    "queued": ("assigned", "blocked", "cancelled"),
    "blocked": ("queued", "failed", "cancelled"),
    "assigned": ("running", "queued", "failed", "cancelled"),
    "running": ("queued", "completed", "failed", "timeout", "cancelled"),
}
INTENT_TRANSITIONS = {
    "created": ("dispatched", "cancelled"),
    "dispatched": ("executing", *FINAL),
    "executing": ("dispatched", *FINAL),
    "failed": ("dispatched",),
    "timeout": ("dispatched",),
    "cancelled": ("dispatched",),
}
OWN_TOPICS = ("agentic.", "htm.", "bridge.", "secrets.", "governance.", "learning.", "daemon.", "alert.")

SECOND, MINUTE, HOUR, DAY = 1000, 60_000, 3_600_000, 86_400_000
YEAR = 365 * DAY
MAX_DURATION = 10 * YEAR
MAX_INSTANT = 253_402_300_799_999  # 9999-12-31T23:59:59.999Z
MAX_JSON = 1 << 20
MAX_DEPTH = 64
MAX_LINE = MAX_JSON + 100_000  # of a batch: a full context and the rest
LATE_MS = 500  # a step noticed later than this is marked late
UNHURRIED_MS = HOUR  # within its class, a task without an SLA is placed as if it had this one
CLAIM_BATCH = 64
SWEEP_BATCH = 500
HANDLER_DEFAULTS: Row = {
    "argv": None, "cwd": None, "env": "{}", "secrets": "[]", "external": 0, "paused": 0, "sla_ms": None, "adapted_sla_ms": None, "timeout_ms": None,
    "kill_after_ms": 10 * SECOND, "max_attempts": 3, "max_recoveries": 5, "backoff_ms": 5 * SECOND, "concurrency": None,
    "rescue": None, "warn_at": 0.8, "critical_at": 2.0, "on_critical": "rescue",
}  # fmt: skip


class GraceError(Exception):
    """What the caller is told: exit code, code word, one line, and a hint where there is something to do."""

    exit_code, code = 1, "failed"

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.message, self.hint = message, hint


class UsageError(GraceError):
    exit_code, code = 2, "usage"


class NotFoundError(GraceError):
    exit_code, code = 3, "not_found"


class ConflictError(GraceError):
    exit_code, code = 4, "conflict"


class DeniedError(GraceError):
    exit_code, code = 5, "denied"


class WaitTimeoutError(GraceError):
    exit_code, code = 6, "timeout"


class LockedError(GraceError):
    exit_code, code = 7, "locked"


class DatabaseError(GraceError):
    exit_code, code = 8, "database"


# =====================================================================================================================
# rules
# Pure decisions: values in, a value out. No clock, no database, no print; what the time is, the caller says. What is
# decided here is done elsewhere, so that a decision can be tested without waiting for it.

DURATION_UNITS = {"ms": 1, "s": SECOND, "m": MINUTE, "h": HOUR, "d": DAY}
DURATION = re.compile(r"(?:[0-9]{1,15}(?:\.[0-9]{1,6})?(?:ms|s|m|h|d))+")
DURATION_PART = re.compile(r"([0-9.]+)(ms|s|m|h|d)")
INSTANT = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,9})?)?([Zz]|[+-][0-9]{2}:?[0-9]{2})")
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
OWN_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
TOPIC = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
ESCAPED_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")  # not a backslash that is itself escaped
EVENT_ID = re.compile(r"evt_[0-9]{1,18}")
ID_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base32, in sorting order


def parse_duration(text: str) -> int:
    """Milliseconds from `1h30m`, `500ms`, `2d`; ValueError for anything else, zero, or more than ten years."""
    if not DURATION.fullmatch(text):
        raise ValueError("write a duration with its unit, such as 30s, 5m, 2h, 1h30m or 500ms")
    ms = round(sum(float(n) * DURATION_UNITS[unit] for n, unit in DURATION_PART.findall(text)))
    if not 1 <= ms <= MAX_DURATION:
        raise ValueError("a duration lies between 1ms and 3650d, such as 30s or 2h")
    return ms


def format_duration(ms: float | None) -> str:
    """`1h30m`, `2.5s`, `40ms` for people; `-` where there is none."""
    if ms is None:
        return "-"
    sign, ms = ("-" if ms < 0 else ""), abs(round(ms))
    if ms < SECOND:
        return f"{sign}{ms}ms"
    if ms < MINUTE:
        return f"{sign}{ms / SECOND:.1f}".removesuffix(".0") + "s"
    for unit, size, lower, small in (("m", MINUTE, "s", SECOND), ("h", HOUR, "m", MINUTE), ("d", DAY, "h", HOUR)):
        if ms < size * (24 if unit == "h" else 60) or unit == "d":
            rest = ms % size // small
            return f"{sign}{ms // size}{unit}" + (f"{rest}{lower}" if rest else "")
    raise AssertionError("unreachable")


def parse_instant(text: str) -> int:
    """Milliseconds since 1970 from RFC 3339 with an offset; ValueError otherwise."""
    if not INSTANT.fullmatch(text):
        raise ValueError("write an instant with its offset, such as 2026-11-22T07:08:19Z or 2026-11-22T08:08:19+01:00")
    from datetime import datetime

    try:
        return round(datetime.fromisoformat(text.upper()).timestamp() * 1000)
    except ValueError:
        raise ValueError(f"{text[:40]!r} is no instant that there is: look at the day, the time and the offset") from None


def format_instant(ms: int | None) -> str | None:
    """RFC 3339 UTC with milliseconds; None stays None, what lies outside the calendar is shown at its edge."""
    if ms is None:
        return None
    seconds, rest = divmod(max(0, min(ms, MAX_INSTANT)), 1000)
    return f"{_format_second(seconds)}{rest:03d}Z"


@functools.lru_cache(64)
def _format_second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.", time.gmtime(seconds))


ID_PAIRS = [a + b for a in ID_ALPHABET for b in ID_ALPHABET]  # two characters for ten bits
_last_id: list[Any] = [0, "", 0]


def _base32(number: int) -> str:
    """Nine characters for the lower 45 bits."""
    pairs = ID_PAIRS
    return f"{pairs[number >> 35 & 1023]}{pairs[number >> 25 & 1023]}{pairs[number >> 15 & 1023]}{pairs[number >> 5 & 1023]}{ID_ALPHABET[number & 31]}"


def new_id(kind: str, now: int) -> str:
    """An id such as task_1k2m3n4p5q6r7s8t9: nine characters of time, nine random ones; rising within a process."""
    if now > _last_id[0]:
        _last_id[:] = now, _base32(now), int.from_bytes(os.urandom(6), "big") >> 4
    else:
        _last_id[2] += 1
    return f"{kind}_{_last_id[1]}{_base32(_last_id[2])}"


def counted(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def first_line(text: str) -> str:
    return text.splitlines()[0] if text.splitlines() else text


def _refuse_constant(word: str) -> float:
    raise ValueError(f"{word} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text[:20]} is out of range")
    return number


def _no_duplicates(pairs: list[tuple[str, Any]]) -> Row:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {json.dumps(double)[:60]} stands twice")
    return result


def json_depth(value: Any) -> int:
    """How deeply lists and objects are nested; a plain value has depth 0. Stops counting past the limit."""
    depth, level = 0, [value]
    while True:
        level = [node for node in level if isinstance(node, (dict, list))]
        if not level or depth > MAX_DEPTH:
            return depth
        depth += 1
        level = [item for node in level for item in (node.values() if isinstance(node, dict) else node)]


def parse_json(text: str) -> Any:
    """Strict JSON: at most 1 MiB and 64 levels, no duplicate keys, NaN, infinities, NUL or lone surrogates."""
    if len(text) > MAX_JSON or (not text.isascii() and len(text.encode("utf-8", "surrogatepass")) > MAX_JSON):
        raise ValueError("larger than 1 MiB")
    try:
        value = STRICT_DECODER.decode(text)
    except RecursionError:
        raise ValueError("nested deeper than 64 levels") from None
    except ValueError as error:
        if "int_max_str_digits" not in str(error):
            raise
        raise ValueError("holds a number with thousands of digits") from None
    if text.count("{") + text.count("[") > MAX_DEPTH and json_depth(value) > MAX_DEPTH:
        raise ValueError("nested deeper than 64 levels")
    if "\\u" in text or not text.isascii():
        _refuse_no_text(to_json(value))
    return value


def _refuse_no_text(plain: str) -> None:
    """ValueError when compact JSON holds what no text may hold."""
    if ESCAPED_NUL.search(plain):
        raise ValueError("holds a NUL character")
    try:
        plain.encode()
    except UnicodeEncodeError:
        raise ValueError("holds a lone surrogate, which is not text") from None


STRICT_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_no_duplicates)
COMPACT_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), check_circular=False)


def to_json(value: Any) -> str:
    """Compact JSON text; characters outside ASCII stay as they are."""
    return COMPACT_ENCODER.encode(value)


def check_text(text: str, what: str, longest: int) -> str:
    """The text itself; ValueError when empty, too long, with NUL, or not valid UTF-8."""
    if not 1 <= len(text) <= longest:
        raise ValueError(f"{what} has 1 to {longest} characters, not {len(text)}")
    if "\0" in text:
        raise ValueError(f"{what} holds a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} is not valid UTF-8 text") from None
    return text


UNPRINTABLE = (
    "[\x00-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    "\u3164\ud800-\udfff\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


def printable(text: str) -> str:
    r"""Text from outside, safe to show: what a terminal would obey or hide stands as \u{…}."""
    return re.sub(UNPRINTABLE, lambda match: f"\\u{{{ord(match[0]):x}}}", text)


def raised(priority: str, to: str) -> str:
    """The higher of two priorities."""
    return PRIORITIES[min(PRIORITIES.index(priority), PRIORITIES.index(to))]


Step = tuple[int, str]  # the instant at which it is due, and its name


def odd_row(task: Row) -> str | None:
    """Why the ladder cannot reckon with this row, or None. It is set aside then, so that it stops nothing else."""
    sla = task["sla_ms"]
    if sla is not None and not 0 < sla <= MAX_DURATION:
        return "sla_out_of_range"
    if any(task[name] is not None and not 0 <= task[name] <= MAX_INSTANT for name in ("queued_at", "sla_deadline", "available_at")):
        return "instant_out_of_range"
    if not 0 < task["warn_at"] <= 1 <= task["critical_at"] <= 1000:
        return "thresholds_out_of_order"
    return None


def ladder_steps(task: Row) -> list[Step]:
    """The steps of the SLA that this open task has still to take, in order."""
    sla, start = task["sla_ms"], task["queued_at"]
    if sla is None or task["set_aside"]:
        return []
    levels = [
        (start + round(sla * task["warn_at"]), "warning"),
        (start + sla, "violated"),
        (start + round(sla * task["critical_at"]), "critical"),
    ]
    last = 2 if task["task_type"] == "rescue" else 3  # a rescue is never rescued
    return levels[task["escalation_level"] : last]


def urgency_steps(task: Row, age_every: int) -> list[Step]:
    """The steps that move a queued task forward: by its SLA, or by its age where it has none."""
    if task["status"] != "queued" or task["set_aside"]:
        return []
    if task["sla_ms"] is None:
        return [(task["aged_at"] + age_every, "ageing")] if task["priority"] != "critical" else []
    rank, start, sla = PRIORITIES.index(task["priority"]), task["queued_at"], task["sla_ms"]
    steps = [(start + sla // 2, "urgency_half")] if rank > 1 else []
    return steps + ([(start + sla * 4 // 5, "urgency_four_fifths")] if rank > 0 else [])


def waking_step(task: Row) -> list[Step]:
    """When a queued task that may not be claimed yet may be."""
    return [(task["available_at"], "available")] if task["available_at"] is not None and task["status"] == "queued" else []


def next_steps(task: Row, age_every: int) -> list[Step]:
    """All that an open task has before it, soonest first; at one instant: waking, urgency, ladder."""
    return sorted(waking_step(task) + urgency_steps(task, age_every) + ladder_steps(task), key=lambda step: step[0])


def next_step_at(task: Row, age_every: int) -> int | None:
    """The instant at which this open task needs the next look."""
    firsts = [steps[0][0] for steps in (waking_step(task), urgency_steps(task, age_every), ladder_steps(task)) if steps]
    return min(firsts) if firsts else None


def sla_verdict(status: str, deadline: int | None, level: int, now: int) -> int | None:
    """sla_met of a task that ends now: None without an SLA or when cancelled."""
    if deadline is None or status == "cancelled":
        return None
    return int(status == "completed" and now <= deadline and level < 2)


def backoff_ms(base: int, attempt: int, spread: float) -> int:
    """The pause before the next attempt: doubling, at most an hour, within a quarter either way (spread 0 to 1)."""
    pause: float = min(HOUR, base * 2 ** min(attempt - 1, 30))
    return max(1, round(pause * (0.75 + spread / 2)))


def adapted_sla(own: int, now_ms: int, suggested: int, low: float, high: float) -> int | None:
    """What an SLA of `now_ms` that follows its runs becomes, within these multiples of the person's own; None when that is within 5 % of it."""
    wanted = max(1, min(max(suggested, round(own * low)), round(own * high)))
    return wanted if abs(wanted - now_ms) >= now_ms / 20 else None


def message_of(level: str, task: Row, elapsed: int) -> str:
    """The one line that a person reads about a step of the ladder."""
    percent = round(100 * elapsed / task["sla_ms"])
    state = {"warning": "nears its deadline", "violated": "has passed its deadline", "critical": "is critically late"}[level]
    return f"{task['goal'][:80]!r} {state}: {percent} % of its SLA of {format_duration(task['sla_ms'])}, {task['status']}"


def rescue_plan(task: Row, handler: Row | None, active: int, worker: str, on_critical: str, served: bool, now: int) -> tuple[str, str]:
    """What the built-in rescue does with a stuck task: (what it found, what it does: run, recover, retry, report)."""
    status = task["status"]
    if status in FINAL:
        return "the task has ended", "report"
    if status == "blocked":
        return f"the task waits for {'consent to use secrets' if task.get('reason') == 'waiting_consent' else 'other intents'}", "report"
    if status in ("assigned", "running"):
        if worker == "external":
            return "an external worker holds the task and renews its lease", "report"
        if worker == "dead":
            return "the worker of the task is dead", "recover"
        return "the task is still running", "retry" if on_critical == "retry" else "report"
    if task["available_at"] is not None and task["available_at"] > now:
        return f"the task is not to start before {format_instant(task['available_at'])}", "report"
    if task["task_type"] == "command":
        return "the command waits for its own process to start it again", "report"
    if handler is None:
        return "the handler of the task does not exist", "report"
    if handler["paused"]:
        return f"the handler {handler['name']} is paused", "report"
    if handler["external"]:
        return f"no external worker has claimed the task from {handler['name']}", "report"
    if handler["concurrency"] is not None and active >= handler["concurrency"]:
        return f"all {handler['concurrency']} places of {handler['name']} are taken (--concurrency)", "report"
    if not served:
        return f"this daemon does not serve {handler['name']}", "report"
    return "the task never started although it could run", "run"


# ---- rules of the vault: what is signed, who must agree, and the parts of a key


def canonical(value: Any) -> bytes:
    """The one spelling of a value that is signed or hashed: sorted keys, ASCII, no spaces, whole numbers only."""
    _refuse_fractions(value)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def _refuse_fractions(value: Any) -> None:
    if isinstance(value, float) or not isinstance(value, (dict, list, str, int, type(None))):
        raise ValueError("only whole numbers can be signed")
    for item in (*value.keys(), *value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ():
        _refuse_fractions(item)


def parse_canonical(text: str | bytes) -> Row:
    """An object from its canonical spelling; ValueError for any other spelling of it."""
    data = text.encode() if isinstance(text, str) else text
    value = parse_json(data.decode())
    if not isinstance(value, dict) or canonical(value) != data:
        raise ValueError("is not in canonical form")
    return value


def statement(label: str, value: Any) -> bytes:
    """The bytes that are signed, hashed or bound for one purpose; no two purposes share a label."""
    return f"grace/{label}/1\n".encode() + canonical(value)


def hash_of(label: str, value: Any) -> str:
    return sha256(statement(label, value))


def sha256(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


def code_of(request_hash: str, bits: int = 60) -> str:
    """What requester and approver compare: the first bits of a request's hash, in groups of four characters."""
    number = int(request_hash, 16) >> (256 - bits)
    text = "".join(ID_ALPHABET[number >> shift & 31] for shift in range(bits - 5, -1, -5)).upper()
    return "-".join(text[n : n + 4] for n in range(0, len(text), 4))


def same_code(typed: str, code: str) -> bool:
    """Whether a person has typed this code, however grouped; O, I and L are read as Crockford's base32 reads them."""
    plain = re.sub(r"[\s-]", "", typed).upper().translate(str.maketrans("OIL", "011"))
    return plain == code.replace("-", "")


RISK_NEEDS: dict[str, tuple[str, ...]] = {"low": (), "medium": ("user",), "high": ("user", "governance"), "critical": ("user", "governance")}
ROLES = ("user", "governance")
POLICY_PART = r"\s*(user|governance)\s*:\s*([0-9]{1,3})\s*(?:of\s*([0-9]{1,3})|\(([^()]*)\))?\s*"
MAX_MEMBERS = 32


def highest_risk(*levels: str | None) -> str:
    """The highest of several risk levels; a word that nobody knows counts as critical."""
    ranks = [RISK_LEVELS.index(level) if level in RISK_LEVELS else 3 for level in levels if level is not None]
    return RISK_LEVELS[max(ranks, default=3)]


def parse_policy(text: str) -> list[Row]:
    """`user:1 & governance:2of3`, `user:1(alice,bob)`: groups with thresholds and, where given, sizes or names; ValueError."""
    parts = []
    for part in text.split("&"):
        match = re.fullmatch(POLICY_PART, part)
        if not match:
            raise ValueError(f"{part.strip()[:60]!r} is no part of a policy; write something like 'user:1 & governance:1' or 'user:2of3'")
        group, threshold, of, names = match[1], int(match[2]), match[3], match[4]
        listed = [name.strip() for name in names.split(",")] if names is not None else None
        if listed is not None and not all(listed):
            raise ValueError(f"{part.strip()!r}: a name is empty")
        if threshold < 1 or (of is not None and threshold > int(of)) or (listed is not None and threshold > len(set(listed))):
            raise ValueError(f"{part.strip()!r}: the threshold lies between 1 and the number of members")
        parts.append({"group": group, "threshold": threshold, "of": int(of) if of else None, "names": listed})
    if len({part["group"] for part in parts}) != len(parts):
        raise ValueError("each group stands once in a policy")
    return parts


def default_policy(risk: str) -> str:
    return "user:1 & governance:1" if risk in ("high", "critical") else "user:1"


def odd_policy(policy: Any) -> str | None:
    """Why the policy of a header cannot be obeyed, or None."""
    groups = policy.get("all") if isinstance(policy, dict) and set(policy) == {"all"} else None
    if not isinstance(groups, list) or not groups:
        return "the policy is empty"
    for group in groups:
        if not isinstance(group, dict) or set(group) != {"group", "threshold", "members"} or group["group"] not in ("machine", *ROLES):
            return "the policy has an unknown part"
        members, threshold = group["members"], group["threshold"]
        if not isinstance(members, list) or not 1 <= len(members) <= MAX_MEMBERS or not all(isinstance(member, str) for member in members):
            return "a group of the policy has no members, or too many"
        if len(set(members)) != len(members):
            return "a group of the policy names a member twice"
        if type(threshold) is not int or not 1 <= threshold <= len(members):
            return "a threshold of the policy lies outside its group"
    names = [group["group"] for group in groups]
    return "the policy names a group twice" if len(set(names)) != len(names) else None


def policy_text(policy: Row) -> str:
    return " & ".join(f"{g['group']}:{g['threshold']}" + (f"of{len(g['members'])}" if len(g["members"]) > 1 else "") for g in policy["all"])


EFFECTS = ("deny", "require", "allow")  # in the order in which they are tried
RULE_TEXTS = {"secret": 128, "service": 200, "action": 64, "by": 128}  # what a rule may name, and how long that is at most
RULE_HOURS = r"([01][0-9]|2[0-3]):([0-5][0-9])-([01][0-9]|2[0-3]):([0-5][0-9])"
RULE_ZONE = r"[A-Za-z0-9_+-]{1,32}(/[A-Za-z0-9_+-]{1,32}){0,2}"
MAX_RULES, MAX_RULES_BYTES = 200, 128 << 10
LAST_SURE_DAY = MAX_INSTANT - 2 * DAY  # later, the calendar ends before some zones' day does


def rule_text(what: str, text: str) -> str:
    """What a rule compares with: the exact text, or its first three or more characters and one `*` at the end; ValueError."""
    check_text(text, f"the {what} of a rule", RULE_TEXTS[what])
    if printable(text) != text:
        raise ValueError(f"the {what} of a rule holds a character that nobody sees: {printable(text)[:60]}")
    if "*" in text and not 3 <= text.index("*") == len(text) - 1:
        raise ValueError(f"{text[:60]!r}: one * stands at the end only, after three characters or more, such as deploy-*")
    return text


def rule_hours(text: str) -> str:
    """`08:00-18:00`, or past midnight `22:00-06:00`; ValueError for anything else."""
    match = re.fullmatch(RULE_HOURS, text)
    if not match or match.group(1, 2) == match.group(3, 4):
        raise ValueError(f"{text[:40]!r} are no hours; write something like 08:00-18:00, or 22:00-06:00 past midnight")
    return text


def odd_rule(rule: Row) -> str | None:
    """Why a rule whose fields have the right types cannot be obeyed, or None."""
    if not NAME.fullmatch(rule["name"]) or rule["effect"] not in EFFECTS or (rule["group"] in ROLES) != (rule["effect"] == "require"):
        return "has no proper name, effect or group"
    if rule["risk"] not in (None, *RISK_LEVELS) or not re.fullmatch(RULE_ZONE, rule["zone"]):
        return "names an unknown risk or zone"
    try:
        for what in RULE_TEXTS:
            rule_text(what, rule[what]) if rule[what] is not None else None
        rule_hours(rule["hours"]) if rule["hours"] is not None else None
    except ValueError as error:
        return str(error)
    return "would allow everything" if rule["effect"] == "allow" and all(rule[what] is None for what in (*RULE_TEXTS, "risk", "hours")) else None


def minute_of_day(at_ms: int, zone: str) -> int | None:
    """The minute of the day that clocks show in a zone; None where this machine does not know the zone."""
    import zoneinfo
    from datetime import datetime, timezone

    try:
        local = datetime.fromtimestamp(max(DAY, min(at_ms, LAST_SURE_DAY)) // 1000, timezone.utc if zone == "UTC" else zoneinfo.ZoneInfo(zone))
    except (KeyError, ValueError, OSError):
        return None
    return local.hour * 60 + local.minute


def in_hours(rule: Row, at_ms: int) -> bool:
    """Whether an instant lies in the hours of a rule. In an unknown zone what forbids or asks for more holds at any time, what allows never."""
    if rule["hours"] is None:
        return True
    now = minute_of_day(at_ms, rule["zone"])
    if now is None:
        return bool(rule["effect"] != "allow")
    a, b, c, d = (int(part) for part in re.split("[:-]", rule["hours"]))
    start, end = a * 60 + b, c * 60 + d
    return start <= now < end if start < end else now >= start or now < end


def matches(rule: Row, facts: Row, at_ms: int) -> bool:
    for what in RULE_TEXTS:
        wanted, said = rule[what], facts[what]
        if wanted is not None and (said is None or not (said.startswith(wanted[:-1]) if wanted.endswith("*") else said == wanted)):
            return False
    risky = rule["risk"] is None or RISK_LEVELS.index(facts["risk"]) >= RISK_LEVELS.index(rule["risk"])
    return risky and in_hours(rule, at_ms)


def in_order(rules: list[Row]) -> list[Row]:
    """Rules as they are tried: what denies, what asks for more, what allows."""
    return sorted(rules, key=lambda rule: EFFECTS.index(rule["effect"]))


def decision(rules: list[Row], facts: Row, at_ms: int) -> Row:
    """What rules say of a use (facts: secret, service, action, by, risk): its effect, the first rule that says so, the groups that must sign.

    `default`, when no rule matches, and `allow` leave it to the risk: no rule lowers what that asks for."""
    found = [rule for rule in in_order(rules) if matches(rule, facts, at_ms)]
    first = found[0] if found else {"effect": "default", "name": None}
    groups = {rule["group"] for rule in found if rule["effect"] == "require"} if first["effect"] == "require" else ()
    return {"effect": first["effect"], "rule": first["name"], "requires": dict.fromkeys(sorted(groups), 1)}


def decision_with_risk(rules: list[Row], facts: Row, at_ms: int) -> tuple[Row, str]:
    """The decision, and the risk that it leads to: low risk for which somebody must sign is decided, and goes on, as medium."""
    first = decision(rules, facts, at_ms)
    if facts["risk"] != "low" or not first["requires"]:
        return first, facts["risk"]
    return decision(rules, {**facts, "risk": "medium"}, at_ms), "medium"


FIELD = 2**256 + 297  # the smallest prime above 2^256: a 32-byte part is an element


def split_part(part: bytes, threshold: int, members: int) -> list[bytes]:
    """One share for each member, of which `threshold` give the part again: copies, XOR, or Shamir's polynomials.

    A. Shamir, How to share a secret, Communications of the ACM 22 (1979), 612-613."""
    if threshold == 1:
        return [part] * members
    if threshold == members:
        shares = [os.urandom(32) for _ in range(members - 1)]
        return [*shares, functools.reduce(xor_bytes, shares, part)]
    factors = [int.from_bytes(part, "big"), *(int.from_bytes(os.urandom(48), "big") % FIELD for _ in range(threshold - 1))]
    return [(sum(factor * pow(x, power, FIELD) for power, factor in enumerate(factors)) % FIELD).to_bytes(33, "big") for x in range(1, members + 1)]


def join_part(shares: dict[int, bytes], threshold: int, members: int) -> bytes:
    """The part from shares by index (1 and up); ValueError when they are too few or do not belong together."""
    chosen = dict(sorted(shares.items())[:threshold])
    if len(chosen) < threshold or not all(1 <= index <= members for index in chosen):
        raise ValueError("too few shares")
    if threshold in (1, members):
        if any(len(share) != 32 for share in chosen.values()):
            raise ValueError("a share of another kind")
        return next(iter(chosen.values())) if threshold == 1 else functools.reduce(xor_bytes, chosen.values(), bytes(32))
    total = 0
    for x, share in chosen.items():
        above = below = 1
        for other in chosen:
            if other != x:
                above, below = above * -other % FIELD, below * (x - other) % FIELD
        total = (total + int.from_bytes(share, "big") * above * pow(below, -1, FIELD)) % FIELD
    if total >> 256:
        raise ValueError("shares that do not belong together")
    return total.to_bytes(32, "big")


def xor_bytes(a: bytes, b: bytes) -> bytes:
    return bytes(x ^ y for x, y in zip(a, b, strict=True))


def pad(value: bytes) -> bytes:
    """The value behind its length, filled up to a multiple of 256 bytes, so that its length tells little."""
    framed = len(value).to_bytes(4, "big") + value
    return framed + bytes(-len(framed) % 256)


def unpad(padded: bytes) -> bytes:
    return padded[4 : 4 + int.from_bytes(padded[:4], "big")]


def ascii_only(text: str, longest: int = 200) -> str:
    r"""Text from outside on one line of a prompt: printable ASCII, the rest as \u{…}, the end of a long one cut and counted."""
    shown = "".join(c if " " <= c <= "~" else f"\\u{{{ord(c):x}}}" for c in text[:longest])
    return shown + (f" ... ({len(text)} characters)" if len(text) > longest else "")


# ---- rules of git's credential protocol: what it asks for, which secret answers, and what the calling git is doing

MAX_CREDENTIAL = 64 << 10
SERVICE_URL = r"([A-Za-z]+)://([^/?#@\\\s]+)/*([^?#]*)"
GIT_READS = ("clone", "fetch", "ls-remote", "pull")
GIT_VALUES = ("-C", "-c", "--attr-source", "--config-env", "--exec-path", "--git-dir", "--namespace", "--super-prefix", "--work-tree")
GIT_FLAGS = (  # of those that take no value the common ones
    "-a", "-d", "-f", "-n", "-p", "-q", "-t", "-u", "-v", "--all", "--atomic", "--bare", "--delete", "--dry-run", "--ff-only", "--follow-tags", "--force",
    "--force-with-lease", "--init", "--mirror", "--no-tags", "--porcelain", "--progress", "--prune", "--quiet", "--rebase", "--recurse-submodules",
    "--recursive", "--set-upstream", "--tags", "--verbose",
)  # fmt: skip
GIT_WORD = r"[+:]?[A-Za-z0-9_./][A-Za-z0-9_./:+^~*%-]{0,199}"


def parse_credential(data: bytes) -> dict[str, str]:
    """What git says of a credential (git-credential(1)), up to a blank line: the last value of each name, `url` taken apart; ValueError."""
    if len(data) > MAX_CREDENTIAL:
        raise ValueError("is larger than 64 KiB")
    if b"\0" in data or b"\r" in data:
        raise ValueError("holds a NUL or a carriage return")
    try:
        lines = data.decode().split("\n")
    except UnicodeDecodeError:
        raise ValueError("is not valid UTF-8 text") from None
    said: dict[str, str] = {}
    for number, line in enumerate(lines[: lines.index("")] if "" in lines else lines, 1):
        name, separator, value = line.partition("=")
        if not separator:
            raise ValueError(f"has no = in line {number}")  # the line itself may be a password
        if name == "url":
            said = url_parts(value)
        elif not name.endswith("[]"):
            said[name] = value
    return said


def url_parts(url: str) -> dict[str, str]:
    """A URL as git takes it apart: protocol, host, and where they are given, path and username; ValueError."""
    from urllib.parse import unquote

    match = re.fullmatch(r"([^:/?#]+)://([^/?#]*)(.*)", url, re.DOTALL)
    if not match:
        raise ValueError("holds a url without a protocol")
    login, at, host = match[2].partition("@")
    parts = {"protocol": match[1], "host": unquote(host if at else match[2], errors="strict")}
    if at:
        parts["username"] = unquote(login.partition(":")[0], errors="strict")
    if path := match[3].strip("/"):
        parts["path"] = unquote(path, errors="strict")
    if any(re.search("[\x00-\x1f]", part) for part in parts.values()):
        raise ValueError("holds a url with a control character")
    return parts


def service_parts(service: str | None) -> tuple[str, str, str] | None:
    """Protocol, host (with its port) and path of a --service that is a URL of http or https without a login; None for any other."""
    from urllib.parse import unquote

    match = re.fullmatch(SERVICE_URL, service or "")
    if not match or match[1].lower() not in ("http", "https"):
        return None
    return match[1].lower(), same_host(match[2]), unquote(match[3].rstrip("/"))


def same_host(host: str) -> str:
    """The one spelling of a host; only A to Z have two, since folding other letters could make two hosts one."""
    return host.lower() if host.isascii() else host


def service_fit(service: str | None, username: str | None, said: dict[str, str]) -> int:
    """How exactly a secret answers to what git says: 0 not at all, 1 for its host, 2 for its host and path."""
    parts = service_parts(service)
    if parts is None or parts[:2] != (said.get("protocol", "").lower(), same_host(said.get("host", ""))):
        return 0
    if username is not None and said.get("username", username) != username:
        return 0
    if not parts[2]:
        return 1
    return 2 if said.get("path", "").strip("/") == parts[2] else 0


def git_words(argv: list[str]) -> list[str]:
    """The subcommand in a command line of git, and what follows it; empty for another program."""
    program = argv[0].rpartition("/")[2] if argv else ""
    if program.startswith("git-"):
        return [program.removeprefix("git-"), *argv[1:]]
    rest = argv[1:] if program == "git" else []
    while rest and rest[0].startswith("-"):
        rest = rest[2 if rest[0] in GIT_VALUES else 1 :]
    return rest


def git_action(words: list[str]) -> str:
    """The action that a command of git stands for: git_push, git_fetch, or git where it does not tell."""
    if words[:1] == ["push"]:
        return "git_push"
    reads = words[:1] and (words[0] in GIT_READS or (words[0] in ("remote", "submodule") and "update" in words))
    return "git_fetch" if reads else "git"


def shown_git(words: list[str]) -> str:
    """A command of git for people: what may hold a secret (logins in URLs, values of options) is left out."""
    shown, hidden = ["git"], False
    for word in words:
        if word.startswith("-"):
            hidden = word not in GIT_FLAGS
            plain = word if not hidden else "-..."
        else:
            plain = re.sub("[?#].*", "", re.sub("^([a-z]+://)[^/?#]*@", r"\1", word), flags=re.DOTALL)
            plain = "..." if hidden or not re.fullmatch(GIT_WORD, plain) else plain
            hidden = False
        shown.append(plain)
    return " ".join(shown)[:300]


# =====================================================================================================================
# prediction
# How long the next run keeps to, from the runs before it. Durations are looked at as logarithms, so that ratios count (above what
# the clock that took them can tell apart):
# a few experts follow their level at different speeds, and each keeps the scores (distances from its level) of its last
# runs, whose quantile it adds. Which of them answers, the pinball loss says; adaptive conformal inference holds the
# coverage; hours of the day count as far as they explain more than chance would. A run is (ended_at, duration), in ms.

Run = tuple[int, int]

MIN_RUNS = 10  # below this nothing is guessed
MAX_RUNS = 2000  # older ones are not looked at
EXPERTS = ((0.0, MAX_RUNS, 1.0), (1 / 40, 300, 1.03), (1 / 6, 300, 1.06))  # least step of the level, scores kept, handicap
LOSS_MEMORY = 300  # runs over which losses are compared
USUAL_RATE = 0.95
DRIFT_RUNS = 25  # a quarter of fewer has no middle to compare
SETTLED = 100  # runs after which the level of an expert without a least step rests: its scores then are the plain durations
CONFORMAL_STEP = 0.0005
REACH = 1.25  # no quantile lies further beyond the longest run seen: few runs, or two kinds of them, say nothing of what is there
FINE, COARSE = 10, 1000  # ms added before the logarithm is taken: shorter ones are all alike; the latter where a clock told whole seconds only
SHIFT_SLACK, SHIFT_ALARM = 0.2, 2.5  # of the sums that notice a change of level, in ranks from -0.5 to 0.5
HOUR_MEMORY = 0.995  # what an hour's past weighs at its next run
HOUR_NOISE = 2.0  # how far beyond chance (an F ratio) the hours must differ
CONFIDENCE = 1.28  # standard errors of an order statistic: nine times in ten


def _check_rate(rate: float) -> None:
    if not 0 < rate < 1:
        raise ValueError("a rate lies between 0 and 1, such as 0.95")


def pinball_loss(actual: float, predicted: float, rate: float) -> float:
    """What a predicted quantile costs, in the unit of its arguments; least on average at the true one (Koenker & Bassett 1978)."""
    return rate * (actual - predicted) if actual >= predicted else (1 - rate) * (predicted - actual)


def plain_quantile(durations: Iterable[int], rate: float) -> int:
    """The least of the durations that at least the share `rate` of them does not exceed; ValueError when there are none."""
    ordered = sorted(durations)
    if not ordered:
        raise ValueError("a quantile needs durations")
    return ordered[max(0, math.ceil(rate * len(ordered) - 1e-9) - 1)]


def score_quantile(ordered: list[float], rate: float) -> float:
    """The quantile that the next score keeps (the (n+1)-th counts too); past the largest, an exponential tail is drawn on."""
    place = rate * (len(ordered) + 1) - 1
    below = max(0, int(place))
    if below + 1 < len(ordered):
        return ordered[below] + max(0.0, place - below) * (ordered[below + 1] - ordered[below])
    top = max(2, len(ordered) // 10)
    if len(ordered) <= top:
        return ordered[-1]
    excess = sum(ordered[-top:]) / top - ordered[-top - 1]  # the mean excess is an exponential's scale; in logarithms, Hill's (1975)
    return ordered[-1] + excess * math.log(1 / ((len(ordered) + 1) * (1 - rate)))


class _Expert:
    """One speed of following the level, with the sorted window of its scores and its discounted pinball loss."""

    __slots__ = ("handicap", "level", "loss", "ordered", "runs", "scores", "step", "window")

    def __init__(self, step: float, window: int, handicap: float):
        self.step, self.window, self.handicap = step, window, handicap
        self.level, self.loss, self.runs = 0.0, 0.0, 0
        self.scores: deque[float] = deque()
        self.ordered: list[float] = []

    def cost(self) -> float:
        return self.loss * self.handicap

    def predict(self, rate: float) -> float:
        return self.level + score_quantile(self.ordered, rate)

    def learn(self, log_ms: float) -> None:
        """Keep the score of a run, then follow it: as a running mean at first, later by the step."""
        self.level = self.level if self.runs else log_ms
        score = log_ms - self.level
        self.scores.append(score)
        insort(self.ordered, score)
        if len(self.scores) > self.window:
            self._drop(self.scores.popleft())
        self.runs += 1
        if self.step or self.runs <= SETTLED:
            self.level += max(1 / self.runs, self.step) * score

    def move(self, level: float, runs: int) -> None:
        """Take up a new level that so many learnt runs, and the present one, have shown; their scores, from the old level, are dropped."""
        for _ in range(min(runs, len(self.scores) - 1)):
            self._drop(self.scores.pop())
        self.level, self.runs = level, runs

    def _drop(self, score: float) -> None:
        del self.ordered[bisect_left(self.ordered, score)]


class _Hours:
    """How much longer each hour of the day (UTC) makes a run, in logarithms, shrunk towards nothing by what chance alone would do."""

    __slots__ = ("factors", "first", "last", "level", "noise", "runs", "sums", "weights")

    def __init__(self) -> None:
        self.factors, self.sums, self.weights = [0.0] * 24, [0.0] * 24, [0.0] * 24
        self.level, self.noise, self.runs = 0.0, 0.0, 0
        self.first = self.last = 0

    def factor(self, at: int) -> float:
        return self.factors[at // HOUR % 24]

    def learn(self, at: int, log_ms: float) -> None:
        """Compare a run with the level of the last days, cleared of what the hours explain already."""
        hour = at // HOUR % 24
        if not self.runs:
            self.first, self.last, self.level = at, at, log_ms
        self.runs += 1
        clear = log_ms - self.factors[hour] - self.level
        self.level += max(1 / (self.runs + 1), min(1 / 48, (at - self.last) / (2 * DAY))) * clear
        self.last = max(at, self.last)
        self._count(hour, clear + self.factors[hour])
        if self.runs % 24 == 0 and self.last - self.first >= 2 * DAY:
            self._fit()

    def _count(self, hour: int, excess: float) -> None:
        self.weights[hour] = self.weights[hour] * HOUR_MEMORY + 1
        self.sums[hour] = self.sums[hour] * HOUR_MEMORY + excess
        within = excess - self.sums[hour] / self.weights[hour]
        self.noise += max(1 / self.runs, 1 / 500) * (within * within - self.noise)

    def _fit(self) -> None:
        """The means of the hours, shrunk as James and Stein (1961) do by their F ratio; all zero where that is no better than chance."""
        means = {hour: self.sums[hour] / self.weights[hour] for hour in range(24) if self.weights[hour] >= 2}
        if len(means) < 2:
            return
        centre = sum(means.values()) / len(means)
        between = sum(self.weights[hour] * (mean - centre) ** 2 for hour, mean in means.items()) / (len(means) - 1)
        keep = max(0.0, 1 - HOUR_NOISE * self.noise / between) if between > 1e-12 else 0.0
        self.factors = [keep * (means[hour] - centre) if hour in means else 0.0 for hour in range(24)]


class Predictor:
    """Online quantiles of a handler's durations. Show it runs in the order of their ends; ValueError unless 0 < rate < 1.

    `aim` is the level asked of the scores: it rises with each miss and sinks with each run kept, within bounds, so that the share
    of runs kept tends to `rate` (adaptive conformal inference: Gibbs & Candès 2021, https://arxiv.org/abs/2106.00170).
    """

    def __init__(self, rate: float):
        _check_rate(rate)
        self.rate = rate
        self.grain = COARSE  # until a run shows better
        self._kept: deque[Run] = deque(maxlen=MAX_RUNS)  # as started_at and ms, while that is so
        self._begin()

    def _begin(self) -> None:
        self.aim, self.runs, self.longest = self.rate, 0, 0
        self._hours = _Hours()
        self._experts = [_Expert(*kind) for kind in EXPERTS]
        self._recent: deque[float] = deque(maxlen=64)
        self._sums, self._counts = [0.0, 0.0], [0, 0]  # of ranks above and below the middle, and of the runs in them

    def observe(self, started_at: int, ms: int) -> None:
        """Learn from a run that has ended; a duration below 0 counts as 0."""
        if self.grain == COARSE:
            self._kept.append((started_at, ms))
            if ms % COARSE:
                self._look_closer()
                return
        self.longest = max(self.longest, ms)
        log_ms = self.logarithm(ms)
        clear = log_ms - self._hours.factor(started_at)
        self._recent.append(clear)
        if self.runs:
            self._judge(clear)
        for expert in self._experts:
            expert.learn(clear)
        self._hours.learn(started_at, log_ms)
        self.runs += 1

    def _look_closer(self) -> None:
        """These are not whole seconds after all: learn anew from what was seen so far."""
        self.grain = FINE
        self._begin()
        for started_at, ms in self._kept:
            self.observe(started_at, ms)
        self._kept.clear()

    def logarithm(self, ms: float) -> float:
        return math.log(max(ms, 0) + self.grain)

    def duration(self, log_ms: float) -> float:
        """The milliseconds of a logarithm, at least 0 and at most REACH times the longest run."""
        return min(max(0.0, math.exp(min(log_ms, 40.0)) - self.grain), REACH * max(1.0, self.longest))

    def quantile(self, at: int) -> int:
        """The milliseconds that a run beginning at `at` keeps with probability `rate`; 0 while nothing has been observed."""
        return _whole_ms(self.duration(self._log_quantile() + self._hours.factor(at))) if self.runs else 0

    def median(self, at: int) -> int:
        """The milliseconds that a run beginning at `at` takes as often as not; 0 while nothing has been observed."""
        return _whole_ms(self.duration(self._log_quantile(0.5) + self._hours.factor(at))) if self.runs else 0

    def worst_quantile(self, rate: float) -> float:
        """The milliseconds kept with probability `rate` in the worst hour of the day; 0 while nothing has been observed."""
        return self.duration(self._log_quantile(rate) + max(self._hours.factors)) if self.runs else 0.0

    def _log_quantile(self, rate: float | None = None) -> float:
        """What the expert says that has lost least lately."""
        return min(self._experts, key=_Expert.cost).predict(self.aim if rate is None else rate)

    def _judge(self, clear: float) -> None:
        """Compare a run, cleared of its hour, with what was said of it: the aim, the losses and the level learn from that."""
        self._correct(clear - self._log_quantile())
        for expert in self._experts:
            expert.loss += (pinball_loss(clear, expert.predict(self.rate), self.rate) - expert.loss) / min(self.runs, LOSS_MEMORY)
        if self.runs >= MIN_RUNS and (since := self._notice(self._rank(clear))):
            after = sorted([*self._recent][-since:])
            for expert in self._experts:
                expert.move(after[len(after) // 2], since - 1)

    def _correct(self, excess: float) -> None:
        """One step of conformal inference; a run right at its prediction says nothing, and the aim stays within reach of the rate."""
        if abs(excess) > 1e-9:
            aim = self.aim + CONFORMAL_STEP * ((excess > 0) - (1 - self.rate))
            self.aim = min(max(aim, 1 - 2 * (1 - self.rate), self.rate / 2), 1 - (1 - self.rate) / 5)

    def _notice(self, rank: float) -> int:
        """The number of runs since a change of level, or 0: two one-sided cumulative sums of ranks (Page 1954)."""
        for side, sign in enumerate((1, -1)):
            self._sums[side] = max(0.0, self._sums[side] + sign * rank - SHIFT_SLACK)
            self._counts[side] = self._counts[side] + 1 if self._sums[side] else 0
        if max(self._sums) <= SHIFT_ALARM:
            return 0
        since = self._counts[self._sums.index(max(self._sums))]
        self._sums, self._counts = [0.0, 0.0], [0, 0]
        return since

    def _rank(self, clear: float) -> float:
        """Where a run stands among the scores of the steadiest expert, from -0.5 to 0.5."""
        steady = self._experts[0]
        score, ordered = clear - steady.level, steady.ordered
        return (bisect_left(ordered, score) + bisect_right(ordered, score)) / (2 * len(ordered)) - 0.5


def _whole_ms(ms: float) -> int:
    """Rounded up but for the noise of floating point; at least 1, since nothing is done in no time, and at most the longest duration there is."""
    return min(MAX_DURATION, max(1, math.ceil(ms - 1e-9 - 1e-12 * ms)))


def _latest(runs: Iterable[Run]) -> list[Run]:
    """The runs that are looked at, in the order of their ends; no duration is below 0."""
    from heapq import nlargest

    return [(end, max(0, ms)) for end, ms in reversed(nlargest(MAX_RUNS, runs))]


def predict_duration(runs: Iterable[Run], rate: float, at: int) -> int | None:
    """The milliseconds that a run beginning at `at` keeps with probability `rate`, by all these runs; None for fewer than MIN_RUNS."""
    predictor, latest = Predictor(rate), _latest(runs)
    for end, ms in latest:
        predictor.observe(end - ms, ms)
    return predictor.quantile(at) if len(latest) >= MIN_RUNS else None


def cautious_rate(rate: float, runs: int) -> float:
    """The upper confidence bound of an order statistic: what to ask of so few runs for the rate to hold nine times in ten."""
    return min(rate + CONFIDENCE * math.sqrt(rate * (1 - rate) / runs), 1 - (1 - rate) / 5)


def round_up(ms: float) -> int:
    """The next duration with two significant digits, at least 1 and at most the longest there is."""
    unit: int = 10 ** max(0, math.floor(math.log10(max(ms, 1))) - 1)
    return min(MAX_DURATION, max(1, math.ceil(ms / unit - 1e-9) * unit))


def _last_day(said: list[tuple[int, float]]) -> float:
    """The height that what was said over the last day (of so many instants, in ms) seldom exceeded: nine times in ten."""
    since = said[-1][0] - DAY
    day = sorted(value for at, value in said[bisect_left(said, (since, -math.inf)) :])
    return day[math.ceil(0.9 * len(day)) - 1]


def _drift(latest: list[Run], quarter: int, logarithm: Callable[[float], float]) -> float:
    """By how much a quarter of the runs used to lie above the quarter before it, as logarithm, or 0; one change of level does not count."""
    places = range(quarter, len(latest) - quarter + 1, max(1, quarter // 4))

    def middle(runs: list[Run]) -> float:
        return logarithm(plain_quantile((ms for _, ms in runs), 0.5))

    rises = sorted(middle(latest[at : at + quarter]) - middle(latest[at - quarter : at]) for at in places)
    return max(0.0, rises[len(rises) // 3]) if quarter >= DRIFT_RUNS else 0.0


def suggest_sla(runs: Iterable[Run], rate: float, now: int) -> Row | None:
    """One constant SLA that coming runs keep at `rate`, in the worst hour too; None for fewer than MIN_RUNS.

    It is the quantile at a cautious rate, as high as the last day asked for, lengthened by what the past shows that drift adds in
    another quarter of the time. A stricter rate never gives a shorter one, since which expert speaks is judged at the same rate for
    all. `quantile_ms` is the plain quantile of the runs, `margin` the ratio of the SLA to it. A run that seems to end after `now`,
    because the clock was set back, counts as ending now.
    """
    _check_rate(rate)
    predictor, latest = Predictor(USUAL_RATE), _latest((min(end, now), ms) for end, ms in runs)
    if len(latest) < MIN_RUNS:
        return None
    said: list[tuple[int, float]] = []
    for end, ms in latest:
        predictor.observe(end - ms, ms)
        said.append((end, predictor.worst_quantile(cautious_rate(rate, len(latest)))))
    plain = plain_quantile((ms for _, ms in latest), rate)
    quarter = len(latest) // 4
    recent = [ms for _, ms in latest[-max(MIN_RUNS, quarter) :]]
    needed = max(_last_day(said), plain_quantile(recent, cautious_rate(rate, len(recent))))
    sla = round_up(needed + (needed + predictor.grain) * math.expm1(_drift(latest, quarter, predictor.logarithm)))
    first, last = latest[0][0], latest[-1][0]
    return {"sla_ms": sla, "runs": len(latest), "percentile": round(100 * rate, 6), "quantile_ms": plain, "margin": round(sla / max(plain, 1), 3),
            "span_ms": last - first, "first_at": first, "last_at": last}  # fmt: skip


def replay(runs: list[Run]) -> Iterator[tuple[Run, list[Run]]]:
    """Each run in the order of their starts, with the runs that have ended since the one before and by its start."""
    ended, upcoming = deque[Run](), sorted(runs, key=lambda run: run[0] - run[1])
    ended.extend(sorted(runs, key=lambda run: (run[0], -run[1])))
    for end, ms in upcoming:
        news = []
        while ended and ended[0][0] <= end - ms and ended[0][0] - ended[0][1] < end - ms:  # one without duration does not precede itself
            news.append(ended.popleft())
        yield (end, ms), news


def backtest(runs: Iterable[Run], rate: float, fixed_ms: int | None = None) -> Row | None:
    """How grace, a fixed SLA and the mean of the last ten runs would have fared: mean pinball loss in ms, and share of runs kept.

    Each run is predicted at its start from the runs that had ended by then. Without `fixed_ms` the fixed SLA is what a person
    would have set after the first fifth, its quantile; all are then judged on the runs that began later. None where no run is left
    to be judged: at least MIN_RUNS only train.
    """
    history = [run if run[1] >= 0 else (run[0], 0) for run in runs]
    training = MIN_RUNS if fixed_ms is not None else max(MIN_RUNS, len(history) // 5)
    predictor, last_ten, early = Predictor(rate), deque[int](maxlen=10), list[int]()
    names = ("grace", "fixed", "mean_of_last_ten")
    loss, kept, judged = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0), 0
    for (end, ms), news in replay(history):
        for known_end, known_ms in news:
            predictor.observe(known_end - known_ms, known_ms)
            last_ten.append(known_ms)
        early += [known_ms for _, known_ms in news[: training - len(early)]]
        if len(early) < training:
            continue
        fixed_ms = plain_quantile(early, rate) if fixed_ms is None else fixed_ms
        judged += 1
        for name, predicted in zip(names, (predictor.quantile(end - ms), fixed_ms, sum(last_ten) / len(last_ten)), strict=True):
            loss[name] += pinball_loss(ms, predicted, rate)
            kept[name] += ms <= predicted
    if not judged:
        return None
    ways = {name: {"pinball_loss": loss[name] / judged, "coverage": kept[name] / judged} for name in names}
    return {"runs": judged, "rate": rate, "fixed_ms": fixed_ms, **ways}


# =====================================================================================================================
# store
# One SQLite file. Every write passes through Store.write: a place in the writers' queue (an flock on a file beside the
# database, so that nobody starves), BEGIN IMMEDIATE, the function, COMMIT, and a knock at the door of whoever waits.
# Nothing outside this section sees a driver's error.

APPLICATION_ID = 0x67726163  # 'grac'
SCHEMA_VERSION = 1
MIGRATIONS: dict[int, list[str]] = {}  # version reached -> the statements that lead to it from the one before
STANDSTILL = 30  # seconds without progress after which a writer gives up
NETWORK_FILESYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre", "fuse.sshfs", "fuse.s3fs", "fuse.rclone"}


PAGE_SIZE = 2048  # a change touches a dozen pages of a few rows each: smaller pages make a commit a tenth cheaper
LONGEST_PATH = 500  # SQLite's own limit is 512, with what it adds to the name


def clock() -> int:
    """Now, in milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def schema_text() -> str:
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "schema.sql"), encoding="utf-8") as file:
        return file.read()


def schema_halves(text: str) -> tuple[str, str]:
    """The durable and the derived half of a schema."""
    cut = re.search(r"^-- =+ DERIVED$", text, re.MULTILINE)
    if cut is None:
        raise DatabaseError("schema.sql has lost the line that separates TABLES from DERIVED")
    return text[: cut.start()], text[cut.start() :]


class Reader:
    """Asking a connection: `one` row or None, `all` rows, each a dict."""

    def __init__(self, con: apsw.Connection, columns: dict[str, tuple[str, ...]]):
        self.con, self._columns = con, columns

    def all(self, sql: str, **params: Any) -> list[Row]:
        try:
            cursor = self.con.execute(sql, params)
            names = self._columns.get(sql)
            if names is None:
                try:
                    names = self._columns[sql] = tuple(column[0] for column in cursor.get_description())
                except apsw.ExecutionCompleteError:  # no row, so no names to remember
                    return []
            return [dict(zip(names, row)) for row in cursor]  # noqa: B905 (as long as each other by construction)
        except apsw.Error as error:
            raise explain(error) from error

    def one(self, sql: str, **params: Any) -> Row | None:
        rows = self.all(sql, **params)
        return rows[0] if rows else None

    def value(self, sql: str, **params: Any) -> Any:
        """The first column of the first row, or None."""
        row = self.one(sql, **params)
        return next(iter(row.values())) if row else None


class Tx(Reader):
    """One write transaction: the connection, `now` (read once it has begun) and the actor. Counts are written at its end."""

    def __init__(self, store: Store):
        super().__init__(store.con, store.columns)
        self.now, self.actor, self.since = clock(), store.actor, store.since
        self.show_life = store.show_life  # for what takes long without a statement that does
        self._tallies: dict[str, dict[tuple[Any, ...], tuple[int, ...]]] = {}
        self.settings: dict[str, int] = {}  # as read in this transaction

    def run(self, sql: str, **params: Any) -> int:
        """Execute; the number of rows changed."""
        try:
            self.con.execute(sql, params)
        except apsw.Error as error:
            raise explain(error) from error
        return self.con.changes()

    def many(self, sql: str, rows: Iterable[Row | tuple[Any, ...]]) -> None:
        try:
            self.con.executemany(sql, rows)
        except apsw.Error as error:
            raise explain(error) from error

    def insert(self, sql: str, rows: list[Row]) -> None:
        """Like many() for an INSERT, with ten rows in each statement: what a statement costs to begin is shared."""
        several, names = rows_at_once(sql)
        whole = len(rows) - len(rows) % ROWS_AT_ONCE
        try:
            for first in range(0, whole, ROWS_AT_ONCE):
                self.con.execute(several, [row[name] for row in rows[first : first + ROWS_AT_ONCE] for name in names])
        except apsw.Error as error:
            raise explain(error) from error
        self.many(sql, rows[whole:])

    def paced(self, items: Iterable[Any], every: int = 2000) -> Iterator[Any]:
        """The items; each few thousand, those who wait for their turn are told that this goes on."""
        for number, item in enumerate(items):
            if number % every == 0:
                self.show_life()
            yield item

    def tally(self, sql: str, key: tuple[Any, ...], *amounts: int) -> None:
        """Add to sums that are written once, at the transaction's end: `sql` takes the key's values, then the amounts, in this order."""
        sums = self._tallies.setdefault(sql, {})
        before = sums.get(key)
        sums[key] = amounts if before is None else tuple(map(operator.add, before, amounts))

    def count(self, old: Row | None, new: Row | None) -> None:
        """A task has come, gone or changed: keep the live counts right."""
        for row, by in ((old, -1), (new, 1)):
            if row is not None:
                self.tally(COUNT_TASKS, (row["handler"] or "", row["status"], row["priority"], row["escalation_level"]), by)

    def total(self, name: str, by: int = 1) -> None:
        self.tally(COUNT_TOTAL, (name,), by)

    @contextlib.contextmanager
    def savepoint(self) -> Iterator[None]:
        """A part that may be taken back by itself."""
        tallies = {sql: dict(sums) for sql, sums in self._tallies.items()}
        self.run("SAVEPOINT part")
        try:
            yield
        except BaseException:
            self._tallies = tallies
            self.settings.clear()  # read anew: some may have been written
            self.run("ROLLBACK TO part")
            raise
        finally:
            self.run("RELEASE part")

    def flush(self) -> None:
        """Write what was tallied so far. Called before COMMIT, and in between by what tallies very much."""
        for sql, sums in self._tallies.items():
            self.many(sql, (key + amounts for key, amounts in sums.items() if any(amounts)))
        self._tallies.clear()


ROWS_AT_ONCE = 10
STEPS_OF_LIFE = 20_000_000  # of SQLite's machine: about a second


@functools.cache
def rows_at_once(sql: str) -> tuple[str, list[str]]:
    """The INSERT of many rows made from that of one, and the names of one row's values in their order."""
    head, _, values = sql.partition("VALUES")
    row = re.sub(r":\w+", "?", values)
    return f"{head} VALUES {', '.join([row] * ROWS_AT_ONCE)}", re.findall(r":(\w+)", values)


COUNT_TASKS = """INSERT INTO task_counts (handler, status, priority, level, n) VALUES (:h, :s, :p, :l, :n)
  ON CONFLICT (handler, status, priority, level) DO UPDATE SET n = task_counts.n + excluded.n"""
COUNT_TOTAL = """INSERT INTO counters (name, value) VALUES (:name, :by)
  ON CONFLICT (name) DO UPDATE SET value = counters.value + excluded.value"""
DOORS = "SELECT path FROM waiters"


class Store(Reader):
    """An open database. `actor` names who writes; `since` is when the noticing process started (for `late`)."""

    def __init__(self, path: str, actor: str = "grace"):
        self.path, self.actor, self.since = os.path.realpath(path), actor, 0
        self.columns: dict[str, tuple[str, ...]] = {}
        self.own_door: str | None = None
        self.while_waiting: tuple[float, Callable[[], None]] | None = None  # for a turn to write: see wait_for_lock()
        self._ticket = -1
        self._durable = True
        check_place(self.path)
        super().__init__(self._connect(), self.columns)
        try:
            self._ensure_schema()
        except apsw.Error as error:
            raise explain(error) from error

    def _connect(self) -> apsw.Connection:
        try:
            con = apsw.Connection(self.path, flags=apsw.SQLITE_OPEN_READWRITE)
            con.set_busy_timeout(STANDSTILL * 1000)
            con.config(apsw.SQLITE_DBCONFIG_ENABLE_QPSG, 1)  # else a statement may be planned anew for each value bound to it
            con.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)  # the last one out need not pay for three syncs
            for pragma in ("foreign_keys = ON", "recursive_triggers = ON", "synchronous = FULL", "temp_store = MEMORY"):
                con.execute(f"PRAGMA {pragma}")
        except apsw.Error as error:
            raise explain(error) from error
        if con.readonly("main"):
            raise DatabaseError(f"{self.path} cannot be written", "check its permissions, or name another file with --db")
        return con

    def _ensure_schema(self) -> None:
        version = self._version()
        if version != SCHEMA_VERSION:
            with self._turn():
                upgrade(self.con, self.path, self._version(), schema_text(), SCHEMA_VERSION, MIGRATIONS)

    def _version(self) -> int:
        """The file's schema version, 0 for a fresh one; anything that is not ours is refused."""
        owner, version = self.con.pragma("application_id"), self.con.pragma("user_version")
        if owner == APPLICATION_ID and version > SCHEMA_VERSION:
            raise DatabaseError(f"{self.path} was written by a newer grace (schema {version}; this one knows {SCHEMA_VERSION})",
                                "install the newer grace")  # fmt: skip
        if owner == APPLICATION_ID:
            return int(version)
        if owner == 0 and not self.con.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchall():
            return 0
        raise DatabaseError(f"{self.path} belongs to another program (application id {owner})", "name another file with --db")

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """This process's turn to write, in the order of asking."""
        if self._ticket < 0:
            try:
                self._ticket = os.open(self.path + "-ticket", os.O_RDWR | os.O_CREAT, 0o600)
            except OSError as error:
                raise DatabaseError(f"cannot open {self.path}-ticket: {error.strerror}") from error
        wait_for_lock(self._ticket, moving=self.while_waiting)
        try:
            self.show_life()
            yield
        finally:
            fcntl.flock(self._ticket, fcntl.LOCK_UN)

    def show_life(self) -> None:
        """Tell those who wait for their turn that this process works on; a long transaction repeats it."""
        with contextlib.suppress(OSError):  # a full disk must not keep anybody from freeing room
            os.pwrite(self._ticket, f"{os.getpid()} {time.monotonic_ns()} {self.actor}".ljust(120)[:120].encode() + b"\n", 0)

    @contextlib.contextmanager
    def showing_life(self) -> Iterator[None]:
        """Within it, long statements tell those who wait that they go on."""

        def go_on() -> bool:
            self.show_life()
            return False  # do not stop

        self.con.set_progress_handler(go_on, STEPS_OF_LIFE)
        try:
            yield
        finally:
            self.con.set_progress_handler(None)

    def write(self, fn: Callable[[Tx], Any], durable: bool = True, knock: bool = True) -> Any:
        """Run `fn` in one transaction and wake whoever waits. `fn` touches nothing but the database.

        Without `durable` a power cut (not a crash) may take the change back; submissions and ends are always durable."""
        doors: list[Row] = []
        with self._turn():
            try:
                if durable != self._durable:
                    self.con.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
                    self._durable = durable
                self.con.execute("BEGIN IMMEDIATE")
                try:
                    self._check_version()
                    tx = Tx(self)
                    result = fn(tx)
                    tx.flush()
                    doors = self.all(DOORS) if knock else []
                    self.con.execute("COMMIT")
                except BaseException:
                    if self.con.in_transaction:
                        self.con.execute("ROLLBACK")
                    raise
            except apsw.Error as error:
                raise explain(error) from error
        paths = [row["path"] for row in doors if row["path"] != self.own_door]
        if paths:
            knock_at(paths)
        return result

    def _check_version(self) -> None:
        if self.con.pragma("user_version") != SCHEMA_VERSION:
            raise UpgradedError("the database was upgraded by a newer grace meanwhile", "run the command again")

    def read(self, fn: Callable[[Reader], Any]) -> Any:
        """Run `fn` on one consistent state of the database."""
        try:
            self.con.execute("BEGIN")
            try:
                return fn(self)
            finally:
                self.con.execute("COMMIT")
        except apsw.Error as error:
            raise explain(error) from error

    def changed(self) -> int:
        """A number that differs from the last one when another process has committed."""
        return int(self.con.pragma("data_version"))

    def overwrite_deleted(self) -> None:
        """From now on, what this connection deletes is overwritten with zeros."""
        self.con.execute("PRAGMA secure_delete = ON")

    def truncate_log(self) -> bool:
        """Bring the write-ahead log into the file and cut it to nothing, so that no older page is left there; False while others read."""
        try:
            self.con.set_busy_timeout(100)
            self.con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        except apsw.Error:
            return False
        finally:
            self.con.set_busy_timeout(STANDSTILL * 1000)
        return True

    def close(self) -> None:
        self.con.close()
        if self._ticket >= 0:
            os.close(self._ticket)


class UpgradedError(DatabaseError):
    """The schema is newer than this process: a daemon stops claiming and ends, to be started again."""


def upgrade(con: apsw.Connection, path: str, version: int, schema: str, target: int, steps: dict[int, list[str]]) -> None:
    """Bring a file from `version` (0: fresh) to `target`: one transaction, the derived half made again, links checked."""
    if version == target:  # another process was faster
        return
    tables, derived = schema_halves(schema)
    if version == 0:
        con.pragma("page_size", PAGE_SIZE)
        con.pragma("journal_mode", "wal")
    elif any(re.search(r"\b(DROP|RENAME|INSERT INTO \w+ SELECT)\b", sql) for n in range(version + 1, target + 1) for sql in steps.get(n, [])):
        back_up(con, f"{path}-before-{target}")
    con.execute("PRAGMA foreign_keys = OFF")  # a table that is rewritten must not take its children along
    con.execute("BEGIN IMMEDIATE")
    try:
        if version == 0:
            execute_script(con, tables)
            con.execute("INSERT INTO settings (name, value, updated_at) VALUES ('_instance_id', ?, ?)", (os.urandom(16).hex(), clock()))
        else:
            drop_derived(con)
            for number in range(version + 1, target + 1):
                for sql in steps.get(number, []):
                    execute_script(con, sql)
        execute_script(con, derived)
        if con.execute("PRAGMA foreign_key_check").fetchall():
            raise DatabaseError(f"{path} has broken links between its tables; the upgrade was taken back")
        con.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        con.execute(f"PRAGMA user_version = {target}")
        con.execute("COMMIT")
    except BaseException:
        if con.in_transaction:
            con.execute("ROLLBACK")
        raise
    finally:
        con.execute("PRAGMA foreign_keys = ON")


def execute_script(con: apsw.Connection, text: str) -> None:
    """Run each statement of a script by itself, since a second one in the same call may silently not run."""
    statement = ""
    for line in text.splitlines(keepends=True):
        statement += line
        if line.rstrip().split("--")[0].rstrip().endswith(";") and apsw.complete(statement):
            con.execute(statement)
            statement = ""
    if re.sub(r"--[^\n]*", "", statement).strip():
        raise DatabaseError(f"the schema has a statement without an end: {statement.strip()[:60]}")


def drop_derived(con: apsw.Connection) -> None:
    kinds = "SELECT type, name FROM sqlite_schema WHERE type IN ('trigger', 'view', 'index') AND sql IS NOT NULL ORDER BY type DESC"
    for kind, name in con.execute(kinds).fetchall():
        con.execute(f'DROP {kind} "{name}"')


def back_up(con: apsw.Connection, target: str) -> None:
    """A consistent copy beside the database, made before a step that rewrites a table."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(target)
    os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    con.execute("VACUUM INTO ?", (target,))


def check_place(path: str) -> None:
    """The database's file, made empty where there was none; a clear refusal where there can be none."""
    folder = os.path.dirname(path)
    if len(os.fsencode(path)) > LONGEST_PATH:
        raise DatabaseError(f"the database's path has more than {LONGEST_PATH} bytes, which is too long for SQLite", "name another file with --db")
    try:
        path.encode()
        os.makedirs(folder, mode=0o700, exist_ok=True)
        if os.path.isdir(path):
            raise DatabaseError(f"{path} is a directory, not a database", "name a file with --db")
        kind = filesystem_of(folder)
        if kind in NETWORK_FILESYSTEMS:
            raise DatabaseError(f"{path} lies on a network file system ({kind}), where SQLite's locks cannot be trusted",
                                "name a file on a local disk with --db")  # fmt: skip
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    except UnicodeEncodeError:
        raise UsageError("the database's path is not valid UTF-8 text") from None
    except OSError as error:
        raise DatabaseError(f"cannot use {path}: {error.strerror}", "name another file with --db") from error


def filesystem_of(folder: str) -> str:
    """The type of the file system that holds a folder; empty where it is a plain disk or cannot be told."""
    device = os.stat(folder).st_dev
    if os.major(device):  # only file systems without a disk of their own have major number 0
        return ""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
            return mount_type(file.read(), f"{os.major(device)}:{os.minor(device)}")
    except OSError:
        return ""


def mount_type(mountinfo: str, device: str) -> str:
    """The type of the mount of `device` (major:minor) in the text of /proc/self/mountinfo (see proc_pid_mountinfo(5))."""
    for line in mountinfo.splitlines():
        fields, _, rest = line.partition(" - ")
        if fields.split()[2:3] == [device]:
            return rest.split()[0]
    return ""


class _StoodStillError(Exception):
    pass


def _on_alarm(signum: int, frame: Any) -> None:
    raise _StoodStillError


def wait_for_lock(fd: int, what: str = "the writers' queue", moving: tuple[float, Callable[[], None]] | None = None) -> None:
    """Take the flock, however long the queue, as long as it moves; DatabaseError once it stood still for 30 s.

    `moving`: how often (seconds) to look whether it does, and what to call when it did."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise DatabaseError(f"cannot lock {what}: {error.strerror}") from error
    previous = signal.signal(signal.SIGALRM, _on_alarm)
    seen, since = os.pread(fd, 120, 0), time.monotonic()
    every, moved = moving or (STANDSTILL, lambda: None)
    try:
        while True:
            try:
                signal.setitimer(signal.ITIMER_REAL, min(every, STANDSTILL))
                fcntl.flock(fd, fcntl.LOCK_EX)
                return
            except _StoodStillError:
                holder = os.pread(fd, 120, 0)
                if holder != seen:
                    seen, since = holder, time.monotonic()
                    moved()
                elif time.monotonic() - since > 0.99 * STANDSTILL:
                    who = holder.decode(errors="replace").split()
                    raise DatabaseError(f"{what} has stood still for {STANDSTILL} s, held by process {' '.join(who[:1] + who[2:]) or '?'}",
                                        "see what that process is doing; end it if it hangs") from None  # fmt: skip
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def explain(error: apsw.Error) -> GraceError:
    """A driver's error in our words."""
    text = first_line(str(error))
    if isinstance(error, apsw.BusyError):
        return DatabaseError(f"another program has held the database's write lock for {STANDSTILL} s", "end its transaction, then try again")
    if isinstance(error, apsw.FullError):
        return DatabaseError("the disk is full; nothing was changed", "free some space, then try again")
    if isinstance(error, apsw.NotADBError):
        return DatabaseError("the file is not an SQLite database", "name another file with --db")
    if isinstance(error, apsw.CorruptError):
        return DatabaseError(f"the database is damaged: {text}", "restore a backup, or rescue what is left with sqlite3's .recover")
    if isinstance(error, (apsw.ReadOnlyError, apsw.PermissionsError, apsw.CantOpenError)):
        return DatabaseError(f"the database cannot be written: {text}", "check the permissions of the file and its directory")
    if isinstance(error, apsw.ConstraintError):
        return ConflictError(f"the database refuses this: {text}")
    return DatabaseError(f"the database failed: {text}")


def knock_at(paths: Iterable[str]) -> None:
    """A datagram to each waiting process's socket; whoever is gone or has a full box needs none."""
    import _socket  # the C half alone: `import socket` costs a command a tenth of its time

    try:
        sender = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM)
    except OSError:  # no descriptor left: the commit stands, and waiters look by themselves within a second
        return
    with contextlib.closing(sender):
        sender.setblocking(False)
        for path in paths:
            with contextlib.suppress(OSError), socket_address(path) as address:
                sender.sendto(b"!", address)


@contextlib.contextmanager
def socket_address(path: str) -> Iterator[str]:
    """The path itself, or where it is too long for a socket's address, a short way to it."""
    if len(os.fsencode(path)) < 104:
        yield path
        return
    folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{os.path.basename(path)}"
    finally:
        os.close(folder)


# =====================================================================================================================
# settings
# What the owner may tune, each typed, with a default and a sentence. They are rows, so that every process on the file
# obeys the same ones. Names with an underscore in front are grace's own.

SETTINGS: dict[str, tuple[str, int, str]] = {
    "queue.age_every": ("duration", 10 * MINUTE, "A queued task without an SLA moves up one priority class each time this long has passed."),
    "log.max_bytes": ("bytes", 1 << 20, "How much of one attempt's output is kept: the first half and the last half of this."),
    "bridge.repair_every": ("duration", MINUTE, "How often a daemon looks for broken links between intents and tasks."),
    "consent.grant_for": ("duration", 10 * MINUTE, "How long an approval waits to be used."),
    "consent.pause": ("duration", 5 * MINUTE, "How long a program that was denied three times in a row may not ask."),
    "consent.task_answer": ("duration", DAY, "How long a daemon's question for one of its tasks waits for an answer."),
    "vault.argon2_memory": ("memory", 256 << 20, "Memory that unlocking a new key file costs (64 MiB to 1 GiB)."),
    "forecast.every": ("duration", 10 * SECOND, "How often, at most, a daemon looks whether tasks are going to miss their SLA."),
    "daemon.heartbeat_every": ("duration", 10 * SECOND, "How often a daemon writes that its loop goes on."),
    "learn.rate": ("ratio", 9500, "The share of runs that a suggested SLA is to hold for."),
    "learn.adapt": ("switch", 0, "Whether daemons let the SLAs of handlers follow their runs."),
    "learn.adapt_every": ("duration", HOUR, "How often they look."),
    "learn.adapt_low": ("ratio", 5000, "How far down an SLA may follow: this part of the one that a person has set."),
    "learn.adapt_high": ("ratio", 20_000, "How far up it may follow: this multiple of the one that a person has set."),
    "health.window": ("duration", HOUR, "The time that compliance, failures and recoveries are judged over, in whole hours."),
    "health.least_ended": ("count", 10, "Compliance and failures are judged only when so many tasks have ended in the window."),
    "health.no_daemon": ("duration", 5 * MINUTE, "Critical: work for a daemon has waited, and no daemon was there, for longer."),
    "health.lost_tasks": ("count", 0, "Critical: more tasks are held by workers that died, and no daemon puts them back."),
    "health.daemon_silent": ("duration", MINUTE, "Critical: a daemon lives but has said nothing for longer (at least three heartbeats)."),
    "health.disk_free": ("bytes", 256 << 20, "Critical: less room is left on the disk of the database."),
    "health.open_violations": ("count", 0, "Degraded: more open tasks are past their SLA."),
    "health.sla_compliance": ("ratio", 9500, "Degraded: a smaller part of what ended in the window met its SLA."),
    "health.failure_rate": ("ratio", 1000, "Degraded: a larger part of what ended in the window has failed."),
    "health.recoveries": ("count", 0, "Degraded: more tasks were put back in the window because their worker was lost."),
    "health.queue_age": ("duration", HOUR, "Warning: the oldest queued task has waited for longer."),
    "health.queue_depth": ("count", 10_000, "Warning: more tasks are queued."),
    "health.utilization": ("ratio", 9500, "Warning: as large a part of the slots is busy while tasks wait for longer than health.busy_wait."),
    "health.busy_wait": ("duration", 10 * MINUTE, "How long tasks may wait for a slot before health.utilization matters."),
    "health.wal_bytes": ("bytes", 256 << 20, "Warning: the write-ahead log beside the database is larger."),
    "health.set_aside": ("count", 0, "Warning: more open tasks are set aside for impossible times."),
    "health.paused_tasks": ("count", 0, "Warning: more tasks are queued for paused handlers."),
    "health.waiting_consent": ("count", 0, "Warning: more tasks wait for consent."),
}
RATIO_PARTS = 10_000  # ratios are kept in ten-thousandths
RATIO_RANGES = {"learn.rate": (0.5, 0.999), "learn.adapt_low": (0.01, 1.0), "learn.adapt_high": (1.0, 100.0)}  # others: 0 to 1
SWITCH = ("off", "on")
GET_SETTING = "SELECT value FROM settings WHERE name = :name"
SET_SETTING = """INSERT INTO settings (name, value, updated_at) VALUES (:name, :value, :now)
  ON CONFLICT (name) DO UPDATE SET value = excluded.value, updated_at = excluded.updated_at"""


def setting(reader: Reader, name: str) -> int:
    """A setting's value; within one transaction it is read once."""
    known = reader.settings.get(name) if isinstance(reader, Tx) else None
    if known is None:
        value = reader.value(GET_SETTING, name=name)
        known = SETTINGS[name][1] if value is None else int(value)
        if isinstance(reader, Tx):
            reader.settings[name] = known
    return known


def ratio_setting(reader: Reader, name: str) -> float:
    return setting(reader, name) / RATIO_PARTS


def parse_setting(name: str, text: str) -> int:
    """The value of a setting as people write it; ValueError with an example when it is not of its type."""
    kind = SETTINGS[name][0]
    if kind == "duration":
        return parse_duration(text)
    if kind == "switch":
        if text not in SWITCH:
            raise ValueError("write on or off")
        return SWITCH.index(text)
    if kind == "ratio":
        least, most = RATIO_RANGES.get(name, (0.0, 1.0))
        if not re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,4})?", text) or not least <= float(text) <= most:
            raise ValueError(f"write a ratio from {least:g} to {most:g}, such as {SETTINGS[name][1] / RATIO_PARTS:g}")
        return round(float(text) * RATIO_PARTS)
    if kind == "count":
        if not re.fullmatch(r"[0-9]{1,9}", text):
            raise ValueError("write a whole number from 0 to 999999999, such as 10")
        return int(text)
    low, high = (64 << 20, 1 << 30) if kind == "memory" else (1024, 1 << 40)
    if not re.fullmatch(r"[0-9]{1,13}", text) or not low <= int(text) <= high:
        raise ValueError(f"write a number of bytes between {low} and {high}, such as {max(low, 1 << 20)}")
    return int(text)


def known_setting(name: str) -> str:
    if name not in SETTINGS:
        raise NotFoundError(f"there is no setting {name!r}", "see them with: grace config list")
    return name


def setting_document(reader: Reader, name: str) -> Row:
    kind, default, sentence = SETTINGS[name]
    value = setting(reader, name)
    return {"name": name, "value": shown_setting(kind, value), "default": shown_setting(kind, default),
            "type": kind, "is_default": value == default, "description": sentence}  # fmt: skip


def shown_setting(kind: str, value: int) -> Any:
    """A setting's value as people write it."""
    if kind == "duration":
        return format_duration(value)
    return SWITCH[bool(value)] if kind == "switch" else value / RATIO_PARTS if kind == "ratio" else value


def set_setting(tx: Tx, name: str, value: int) -> None:
    tx.run(SET_SETTING, name=name, value=str(value), now=tx.now)


def unset_setting(tx: Tx, name: str) -> None:
    tx.run("DELETE FROM settings WHERE name = :name", name=name)


# =====================================================================================================================
# events
# The durable bus. What happens is written in the transaction of the change and read by cursor, in order. The triggers
# in schema.sql write htm.task.*, everything else passes through emit(). A Bell is how a process waits: a socket of its
# own, recorded in the database, that every commit knocks at.

INSERT_EVENT = """INSERT INTO events (topic, source, subject, created_at, payload)
  VALUES (:topic, :source, :subject, :now, :payload)"""
EVENTS_AFTER = """SELECT seq, topic, source, created_at, payload FROM events
  WHERE seq > :after AND created_at >= :since AND topic LIKE :like ESCAPE '!' ORDER BY seq LIMIT :n"""
EVENTS_NEWEST = """SELECT seq, topic, source, created_at, payload FROM events
  WHERE topic LIKE :like ESCAPE '!' ORDER BY seq DESC LIMIT :n"""
EVENTS_OF = "SELECT seq, topic, source, created_at, payload FROM events WHERE subject = :subject ORDER BY seq LIMIT :n"
LAST_EVENT = "SELECT COALESCE(MAX(seq), 0) AS seq FROM events"
GET_CURSOR = "SELECT seq FROM event_cursors WHERE name = :name"
SET_CURSOR = """INSERT INTO event_cursors (name, seq, updated_at) VALUES (:name, :seq, :now)
  ON CONFLICT (name) DO UPDATE SET seq = excluded.seq, updated_at = excluded.updated_at"""


def emit(tx: Tx, topic: str, subject: str | None, payload: Row) -> None:
    """Write an event of grace's own. Those of tasks come from triggers, so that they cannot disagree with the rows."""
    if topic.startswith("htm.task."):
        raise AssertionError(f"{topic} is written by a trigger")
    tx.run(INSERT_EVENT, topic=topic, source=tx.actor, subject=subject, now=tx.now, payload=to_json(payload))


def publish(tx: Tx, topic: str, payload: Any) -> int:
    """Put a fact of the user's own on the bus; its number."""
    tx.run(INSERT_EVENT, topic=topic, source=tx.actor, subject=None, now=tx.now, payload=to_json(payload))
    return int(tx.con.last_insert_rowid())


def event_id(seq: int) -> str:
    return f"evt_{seq:012d}"


def event_document(row: Row) -> Row:
    """An event as it is shown: the instants in grace's own payloads as RFC 3339."""
    payload = json.loads(row["payload"])
    if row["topic"].startswith(OWN_TOPICS):
        for key in [key for key in payload if key.endswith("_at") or key == "sla_deadline"]:
            payload[key] = format_instant(payload[key])
        for one in payload.get("advice", ()):
            one["predicted_finish_at"] = format_instant(one["predicted_finish_at"])
    return {"id": event_id(row["seq"]), "topic": row["topic"], "source": row["source"],
            "created_at": format_instant(row["created_at"]), "payload": payload}  # fmt: skip


def topic_pattern(glob: str) -> str:
    """A LIKE pattern (escape character '!') from a glob with * and ?."""
    escaped = re.sub(r"([!%_])", r"!\1", glob)
    return escaped.replace("*", "%").replace("?", "_")


def events_after(reader: Reader, after: int, since: int, glob: str, n: int) -> list[Row]:
    return reader.all(EVENTS_AFTER, after=after, since=since, like=topic_pattern(glob), n=n)


def events_newest(reader: Reader, glob: str, n: int) -> list[Row]:
    return reader.all(EVENTS_NEWEST, like=topic_pattern(glob), n=n)[::-1]


def runtime_folder(store: Store) -> str:
    """Where sockets live: the user's runtime directory, else one of our own beside the database."""
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    if base and os.path.isdir(base) and os.stat(base).st_uid == os.geteuid() and os.access(base, os.W_OK):
        folder = os.path.join(base, "grace")
    else:
        folder = store.path + "-sockets"
    os.makedirs(folder, mode=0o700, exist_ok=True)
    return folder


class Bell:
    """Waiting for a commit of another process: a socket that each commit knocks at, and a look once a second."""

    def __init__(self, store: Store):
        import socket

        self.store = store
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        self.path = os.path.join(runtime_folder(store), f"{os.getpid()}-{os.urandom(4).hex()}.sock")
        with socket_address(self.path) as address:
            self.socket.bind(address)
        store.write(lambda tx: tx.run("INSERT INTO waiters (path, pid, created_at) VALUES (:path, :pid, :now)",
                                      path=self.path, pid=os.getpid(), now=tx.now), durable=False, knock=False)  # fmt: skip
        store.own_door = self.path
        self._seen = store.changed()

    def fileno(self) -> int:
        return self.socket.fileno()

    def answer(self) -> None:
        """Empty the box."""
        with contextlib.suppress(BlockingIOError):
            while self.socket.recv(16):
                pass

    def rang(self) -> bool:
        """Whether another process has committed since the last call."""
        seen, self._seen = self._seen, self.store.changed()
        return self._seen != seen

    def wait(self, seconds: float) -> None:
        """Until something was committed, or for that long; never more than a second at once."""
        import select

        select.select([self.socket], [], [], max(0.0, min(seconds, 1.0)))
        self.answer()

    def close(self) -> None:
        self.store.own_door = None
        self.socket.close()
        with contextlib.suppress(OSError):
            os.unlink(self.path)
        with contextlib.suppress(GraceError):
            self.store.write(lambda tx: tx.run("DELETE FROM waiters WHERE path = :path", path=self.path), durable=False, knock=False)


def sweep_doors(store: Store) -> None:
    """Forget the sockets of processes that ended without saying so."""
    gone = [row["path"] for row in store.all(DOORS) if not someone_listens(row["path"])]
    if gone:
        store.write(lambda tx: tx.many("DELETE FROM waiters WHERE path = :path", [{"path": path} for path in gone]), durable=False, knock=False)


def someone_listens(path: str) -> bool:
    import socket

    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as caller:
        try:
            with socket_address(path) as address:
                caller.connect(address)
        except OSError:
            with contextlib.suppress(OSError):
                if stat.S_ISSOCK(os.lstat(path).st_mode):
                    os.unlink(path)
            return False
    return True


# =====================================================================================================================
# system
# What the kernel says about processes, and how this process hides its own memory. Linux tells through /proc; elsewhere
# what cannot be known is None.

PR_SET_DUMPABLE = 4  # prctl(2)
MAX_PROGRAM = 64 << 20  # of a program's file, to be hashed


@functools.cache
def boot_id() -> str:
    """Which boot of this machine this is."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return "unknown"


def processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def stat_fields(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on (proc_pid_stat(5), field 3 and up); empty when it is gone."""
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY)
    except OSError:
        return []
    try:
        return os.read(fd, 4096).decode(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
    finally:
        os.close(fd)


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot."""
    fields = stat_fields(pid)
    return int(fields[19]) if fields else None


def lives(pid: int, ticks: int) -> bool:
    """Whether the process that started then is still there, and no zombie."""
    fields = stat_fields(pid)
    return bool(fields) and int(fields[19]) == ticks and fields[0] not in "ZX"


def all_pids() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return []


def parent_of(pid: int) -> int:
    """The process above; 0 when it cannot be told."""
    fields = stat_fields(pid)
    return int(fields[1]) if fields else 0


def ancestors_of(pid: int, most: int) -> Iterator[int]:
    """The processes above, nearest first, without init."""
    while most and (pid := parent_of(pid)) > 1:
        yield pid
        most -= 1


def arguments_of(pid: int) -> list[str]:
    """The command line of a process, the first 64 KiB of it; empty where it may not be seen."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read(64 << 10).decode(errors="replace").removesuffix("\0").split("\0")
    except OSError:
        return []


def owner_of(pid: int) -> int | None:
    """The effective user id of a process."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
            return next((int(line.split()[2]) for line in file if line.startswith("Uid:")), None)
    except OSError:
        return None


def program_name(pid: int) -> str:
    """What a process calls itself; for a script with a #! line its own name."""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return "?"


def program_path(pid: int) -> str | None:
    """The file that a process executes; None where that may not be seen."""
    try:
        return os.fsencode(os.readlink(f"/proc/{pid}/exe")).decode(errors="backslashreplace")
    except OSError:
        return None


def program_hash(pid: int) -> str | None:
    """SHA-256 of the file that a process executes; None where it may not be read."""
    import hashlib

    try:
        with open(f"/proc/{pid}/exe", "rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_PROGRAM:
                return None
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


Softness = tuple[int, tuple[int, int]]


def harden() -> Softness:
    """Before a key is unlocked or a value opened: no core dumps, no reading of our memory by other programs of this user.

    What soften() takes, to give a command that is started in our place what we were given."""
    import resource

    before = os.umask(0o077), resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, before[1][1]))
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    return before


def soften(before: Softness) -> None:
    import resource

    os.umask(before[0])
    resource.setrlimit(resource.RLIMIT_CORE, before[1])


BURIED = b"dead"  # in the lock file of a worker that somebody else has found dead and holds the lock of


def is_alive(worker: Row) -> bool:
    """Whether a worker still holds the lock on its file."""
    lock = seize(worker)
    if lock is None:
        with contextlib.suppress(OSError), open(worker["lock_path"], "rb") as file:
            return file.read(len(BURIED)) != BURIED
        return True
    if lock >= 0:
        os.close(lock)
    return False


def seize(worker: Row) -> int | None:
    """The lock of a dead worker, now ours; None while it lives, -1 when the file is gone and so is the process."""
    try:
        fd = os.open(worker["lock_path"], os.O_RDWR)
    except OSError:
        return None if worker["boot_id"] == boot_id() and "grace" in command_of(worker["pid"]) else -1
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return fd
    except OSError:
        os.close(fd)
        return None


def command_of(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().decode(errors="replace")
    except OSError:
        return ""


# =====================================================================================================================
# audit
# What happened to the vault: leaves of metadata, chained by hash, each written in the transaction of its change. What
# approvers sign names the size and head of this chain, so that a part that somebody has seen cannot be rewritten unseen.

PUT_LEAF = "INSERT INTO audit_log (seq, leaf, hash) VALUES (:seq, :leaf, :hash)"
AUDIT_HEAD = "SELECT seq, hash FROM audit_log ORDER BY seq DESC LIMIT 1"
GET_LEAF = "SELECT seq, leaf, hash FROM audit_log WHERE seq = :seq"
LEAVES_AFTER = "SELECT seq, leaf, hash FROM audit_log WHERE seq > :after ORDER BY seq LIMIT :n"
LEAVES_NEWEST = "SELECT seq, leaf, hash FROM audit_log ORDER BY seq DESC LIMIT :n"
ALL_ANCHORS = "SELECT document, signature FROM audit_anchors ORDER BY seq"
NO_HEAD: tuple[int, str] = (0, "0" * 64)
LEAVES_OF = "SELECT seq, leaf, hash FROM audit_log WHERE json(leaf) ->> 'subject' = :subject ORDER BY seq LIMIT :n"
AUDIT_PAGE = 1000
AUDIT_LABEL = b"grace/audit/1\n"  # what statement() puts before a leaf


def audit_head(reader: Reader) -> tuple[int, str]:
    """How many leaves there are, and the hash of the last."""
    row = reader.one(AUDIT_HEAD)
    return (row["seq"], row["hash"]) if row else NO_HEAD


def to_shred(tx: Tx) -> None:
    """Something secret is dropped in this transaction: to be remembered until shred() has done its work."""
    tx.run(SET_SETTING, name="_shred_due", value="1", now=tx.now)


def shred(store: Store) -> None:
    """After something secret was dropped: no old page of it in the log. Best effort: while others read, it stays to be done."""
    if store.truncate_log() and store.value(GET_SETTING, name="_shred_due") is not None:
        store.write(lambda tx: unset_setting(tx, "_shred_due"), durable=False, knock=False)


def shred_if_due(store: Store) -> None:
    if store.value(GET_SETTING, name="_shred_due") is not None:
        shred(store)


def record(tx: Tx, kind: str, subject: str, facts: Row) -> tuple[int, str]:
    """Append a leaf; the size and head of the chain with it."""
    size, head = audit_head(tx)
    leaf = {"seq": size + 1, "at": tx.now, "kind": kind, "actor": tx.actor, "subject": subject, "facts": facts, "previous": head}
    new = hash_of("audit", leaf)
    tx.run(PUT_LEAF, seq=size + 1, leaf=canonical(leaf).decode(), hash=new)
    return size + 1, new


def extends(reader: Reader, seen: tuple[int, str]) -> bool:
    """Whether the chain still holds what somebody has seen of it."""
    row = reader.one(GET_LEAF, seq=seen[0])
    return seen[0] == 0 or (row is not None and row["hash"] == seen[1])


def all_leaves(reader: Reader, after: int = 0) -> Iterator[Row]:
    while rows := reader.all(LEAVES_AFTER, after=after, n=AUDIT_PAGE):
        yield from rows
        after = rows[-1]["seq"]


LEAF_FIELDS = {"seq": int, "at": int, "kind": str, "actor": str, "subject": str, "facts": dict, "previous": str}


def odd_leaf(row: Row, size: int, head: str) -> str | None:
    """What is wrong with the leaf that should follow `size` leaves ending in `head`, or None."""
    try:
        leaf = parse_canonical(row["leaf"])
    except ValueError as error:
        return f"leaf {row['seq']} {error}"
    if set(leaf) != set(LEAF_FIELDS) or not all(type(leaf[name]) is kind for name, kind in LEAF_FIELDS.items()):
        return f"leaf {row['seq']} has not the shape of one"
    if row["seq"] != size + 1 or leaf.get("seq") != size + 1:
        return f"leaf {size + 1} is missing"
    if leaf.get("previous") != head:
        return f"leaf {row['seq']} does not follow the one before it"
    if hash_of("audit", leaf) != row["hash"]:
        return f"leaf {row['seq']} was changed"
    return None


def stored_object(text: str) -> Row:
    """A stored JSON text for a listing, where nothing is verified; empty when somebody has put something else there."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def leaf_document(row: Row) -> Row:
    """A leaf as it is shown, whatever it holds."""
    leaf = stored_object(row["leaf"])
    at, facts = leaf.get("at"), leaf.get("facts")
    said = {name: str(leaf.get(name, "?")) for name in ("kind", "actor", "subject")}
    return {"seq": row["seq"], "at": format_instant(at) if type(at) is int else None, **said,
            "facts": facts if isinstance(facts, dict) else {}, "previous": leaf.get("previous"), "hash": row["hash"]}  # fmt: skip


# =====================================================================================================================
# vault
# Keys, signed lists of people, sealed values. What is read from the database counts for nothing until a signature by
# somebody on the roster says so, and the roster until it follows from the one that a key file outside the database was
# made with. Every primitive is the library's, which is imported only here, where it is used.

KEY_FILE, MACHINE_FILE, SEEN_FILE = "grace-approver-key/1", "grace-machine-key/1", "grace-seen/1"
SUITE = "MLKEM768-X25519,HKDF-SHA256,ChaCha20-Poly1305"
KDF_FLOOR, KDF_CEILING = 64 << 10, 1 << 20  # KiB of memory for Argon2id
KDF_TURNS, KDF_LANES = 3, 4
MAX_SECRET = 64 << 10
MAX_KEY_FILE = 1 << 20
VAULT_ID = r"[0-9a-f]{16}"
SECRET_KEY = r"[A-Za-z0-9_.-]{1,128}"
GET_VAULT = "SELECT value FROM settings WHERE name = '_vault_id'"
ROSTERS = "SELECT number, document, signature FROM vault_rosters ORDER BY number"
PUT_ROSTER = "INSERT INTO vault_rosters (number, document, signature) VALUES (:number, :document, :signature)"
RULE_SETS = "SELECT number, document, signature FROM governance_rules ORDER BY number"
RULE_SETS_NEWEST = "SELECT number, document, signature FROM governance_rules ORDER BY number DESC LIMIT :n"
PUT_RULES = "INSERT INTO governance_rules (number, document, signature) VALUES (:number, :document, :signature)"
PUT_ANCHOR = "INSERT INTO audit_anchors (document, signature) VALUES (:document, :signature)"
NEWEST_VERSION = "SELECT * FROM secret_entries WHERE secret_key = :key ORDER BY version DESC LIMIT 1"
GET_VERSION = "SELECT * FROM secret_entries WHERE secret_key = :key AND version = :version"
VERSIONS_OF = "SELECT * FROM secret_entries WHERE secret_key = :key ORDER BY version"
CURRENT_SECRETS = "SELECT * FROM secret_entries WHERE sealed IS NOT NULL ORDER BY secret_key"
SHARES_OF = "SELECT * FROM secret_shares WHERE secret_key = :key AND version = :version ORDER BY seq"
VERSIONS_BEFORE = "SELECT * FROM secret_entries WHERE secret_key = :key AND version < :version ORDER BY version DESC LIMIT :n"
PUT_SECRET = """INSERT INTO secret_entries (secret_key, version, header, sealed, sealed_hash, signature, delegation, rotate_at,
    created_at) VALUES (:key, :version, :header, :sealed, :sealed_hash, :signature, :delegation, :rotate_at, :now)"""
PUT_SHARE = """INSERT INTO secret_shares (secret_key, version, group_name, member, share_index, wrap)
  VALUES (:key, :version, :group, :member, :index, :wrap)"""
EMPTY_VERSIONS = """UPDATE secret_entries SET sealed = NULL, removed_at = :now, rotate_at = NULL, rotate_task = NULL
  WHERE secret_key = :key AND sealed IS NOT NULL"""
REMOVED_SINCE = """SELECT 1 FROM audit_log WHERE json(leaf) ->> 'subject' = :key AND json(leaf) ->> 'kind' = 'secret.removed'
  AND CAST(json(leaf) -> 'facts' ->> 'version' AS INTEGER) >= :version LIMIT 1"""
GET_DELEGATION = "SELECT * FROM secret_delegations WHERE seq = :seq"
NEWEST_DELEGATION = "SELECT * FROM secret_delegations WHERE secret_key = :key AND private IS NOT NULL ORDER BY seq DESC LIMIT 1"
PUT_DELEGATION = """INSERT INTO secret_delegations (secret_key, document, signature, private, created_at)
  VALUES (:key, :document, :signature, :private, :now)"""
END_ALL_DELEGATIONS = "UPDATE secret_delegations SET private = NULL WHERE private IS NOT NULL"
END_DELEGATIONS = "UPDATE secret_delegations SET private = NULL WHERE secret_key = :key AND private IS NOT NULL"
DROP_SHARES = "DELETE FROM secret_shares WHERE secret_key = :key"
MARK_ROTATION = "UPDATE secret_entries SET rotate_reason = :reason WHERE secret_key = :key AND sealed IS NOT NULL"


class WrongPassphraseError(DeniedError):
    """A passphrase that does not unlock its key."""


class RefusedError(DeniedError):
    """Something stored does not verify."""

    def __init__(self, cause: str, hint: str = ""):
        restored = "after a restored copy: grace audit anchor --accept" if cause.startswith("rolled back") else ""
        super().__init__(f"refused: {cause}", hint or restored or "see what happened: grace audit list")
        self.cause = cause


class RuledOutError(DeniedError):
    """A rule of governance forbids what was asked for; `told` is the decision as the log takes it."""

    def __init__(self, told: Row):
        super().__init__(f"the rule {told['rule']} forbids this use of {told['secret_key']}", "see the rules: grace policy list")
        self.told = told


def record_decision(tx: Tx, subject: str, told: Row) -> None:
    """What the rules of governance have decided, on the bus and in the log."""
    emit(tx, "governance.decision", subject, told)
    record(tx, "governance.decision", subject, told)


@contextlib.contextmanager
def refusals(store: Store, subject: str, plain: bool) -> Iterator[None]:
    """What does not verify ends here: its exact cause goes into the audit log; a requester (`plain`) is not told it. So does what a rule forbids."""
    try:
        yield
    except RuledOutError as denial:
        told = denial.told
        store.write(lambda tx: record_decision(tx, told["secret_key"], told))
        raise
    except WrongPassphraseError:
        store.write(lambda tx: record(tx, "approver.refused", subject, {"cause": "a wrong passphrase", "uid": os.geteuid()}))
        raise
    except RefusedError as refusal:
        cause = refusal.cause
        store.write(lambda tx: record(tx, "vault.refused", subject, {"cause": cause}))
        if plain:
            raise DeniedError(f"{subject} is refused", "the reason is in the audit log, and what to do in: grace doctor") from None
        raise


def b64(data: bytes) -> str:
    import base64

    return base64.b64encode(data).decode()


def from_b64(text: Any, what: str) -> bytes:
    import base64

    try:
        data = base64.b64decode(text, validate=True)
    except (ValueError, TypeError):
        data = None
    if data is None or b64(data) != text:  # the last letter has spare bits: only one spelling is accepted
        raise RefusedError(f"{what} is not in base64")
    return data


def suite() -> Any:
    """HPKE (RFC 9180) with the hybrid of ML-KEM-768 and X25519."""
    from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

    return Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)


class Keys:
    """A key pair that decrypts and one that signs."""

    def __init__(self, private: bytes):
        from cryptography.hazmat.primitives.asymmetric import ed25519, mlkem, x25519
        from cryptography.hazmat.primitives.hpke import MLKEM768X25519PrivateKey

        if len(private) != 128:
            raise RefusedError("a private key has the wrong length")
        self.private = private
        lattice = mlkem.MLKEM768PrivateKey.from_seed_bytes(private[:64])
        curve = x25519.X25519PrivateKey.from_private_bytes(private[64:96])
        self._opens = MLKEM768X25519PrivateKey(lattice, curve)
        self._signs = ed25519.Ed25519PrivateKey.from_private_bytes(private[96:])
        self.public: dict[str, str] = {"hpke": b64(lattice.public_key().public_bytes_raw() + curve.public_key().public_bytes_raw()),
                                       "sign": b64(self._signs.public_key().public_bytes_raw())}  # fmt: skip
        self.fingerprint = fingerprint(self.public)

    @staticmethod
    def new() -> Keys:
        return Keys(os.urandom(128))

    def sign(self, data: bytes) -> bytes:
        return self._signs.sign(data)

    def unwrap(self, wrap: bytes, info: bytes) -> bytes:
        """What was wrapped to this key with the same info; RefusedError otherwise."""
        from cryptography.exceptions import InvalidTag

        try:
            return bytes(suite().decrypt(wrap, self._opens, info=info))
        except (InvalidTag, ValueError):
            raise RefusedError("a wrapped part does not open") from None


def fingerprint(public: Row) -> str:
    return hash_of("key", {"hpke": public["hpke"], "sign": public["sign"]})


def wrap_to(public: Row, plain: bytes, info: bytes) -> bytes:
    """Encrypt to a public key; only its private key and the same info open it."""
    from cryptography.hazmat.primitives.asymmetric import mlkem, x25519
    from cryptography.hazmat.primitives.hpke import MLKEM768X25519PublicKey

    raw = from_b64(public["hpke"], "a public key")
    try:
        key = MLKEM768X25519PublicKey(mlkem.MLKEM768PublicKey.from_public_bytes(raw[:-32]), x25519.X25519PublicKey.from_public_bytes(raw[-32:]))
    except ValueError:
        raise RefusedError("a public key is malformed") from None
    return bytes(suite().encrypt(plain, key, info=info))


def signed_by(public: Row, signature: bytes, data: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(from_b64(public["sign"], "a public key")).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def derived(key: bytes, label: str) -> bytes:
    """A key for one purpose from another key (HKDF, RFC 5869)."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(hashes.SHA256(), 32, None, f"grace/{label}/1".encode()).derive(key)


def encrypted(key: bytes, plain: bytes, bound: bytes) -> bytes:
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    nonce = os.urandom(12)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, plain, bound)


def decrypted(key: bytes, sealed: bytes, bound: bytes) -> bytes:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    try:
        return ChaCha20Poly1305(key).decrypt(sealed[:12], sealed[12:], bound)
    except (InvalidTag, ValueError):
        raise RefusedError("a sealed text does not open") from None


# ---- files beside the database


def vault_folder(vault_id: str) -> str:
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    return os.path.join(base, "grace", vault_id)


STALE = 600  # seconds after which a file half written counts as left behind


def write_private(path: str, document: Row) -> None:
    """Write a file that only its owner reads, whole or not at all."""
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, mode=0o700, exist_ok=True)
    beside = f"{path}.{os.urandom(8).hex()}.new"
    for left in os.listdir(folder):  # by a process that was killed here
        with contextlib.suppress(OSError):
            if re.search(r"\.[0-9a-f]{16}\.new$", left) and os.stat(os.path.join(folder, left)).st_mtime < time.time() - STALE:
                os.unlink(os.path.join(folder, left))
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(canonical(document) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise
    sync_folder(folder)


def sync_folder(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_private(path: str, what: str) -> Row:
    """A key file; refused when it is a link, somebody else's, readable by others, or not what it should be."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise LockedError(f"{what} is missing: {path}") from None
    except OSError as error:
        why = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror
        raise DeniedError(f"{what} {path} is not used: {why}") from None
    try:
        for kind, facts in ((what, os.fstat(fd)), ("its directory", os.stat(os.path.dirname(path)))):
            if (problem := wide_open(facts)) or (kind == what and not stat.S_ISREG(facts.st_mode)):
                raise DeniedError(f"{what} {path} is not used: {kind + ' ' + problem if problem else 'it is no plain file'}",
                                  f"chmod 600 {path}; chmod 700 {os.path.dirname(path)}" if problem else "")  # fmt: skip
        with open(fd, "rb", closefd=False) as file:
            data = file.read(MAX_KEY_FILE + 1)
    finally:
        os.close(fd)
    try:
        return parse_canonical(data.removesuffix(b"\n"))
    except ValueError as error:
        raise DeniedError(f"{what} {path} is damaged: {error}") from None


def wide_open(facts: os.stat_result) -> str | None:
    """Why a file or directory is not private to us, or None."""
    if facts.st_uid != os.geteuid():
        return f"belongs to user {facts.st_uid}, not to you"
    return f"is open to others (mode {stat.S_IMODE(facts.st_mode):o})" if facts.st_mode & 0o077 else None


@contextlib.contextmanager
def folder_lock(folder: str) -> Iterator[None]:
    """One process at a time in a vault's directory."""
    fd = os.open(os.path.join(folder, ".lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        wait_for_lock(fd, f"the lock of {folder}")
        with contextlib.suppress(OSError):  # for whoever waits, and in vain; a full disk is no reason to wait
            os.pwrite(fd, f"{os.getpid()} {time.monotonic_ns()} vault".ljust(120)[:120].encode() + b"\n", 0)
        yield
    finally:
        os.close(fd)


class Seen:
    """What one key's owner has seen: the highest roster, set of rules, versions and audit head. It only ever grows.

    Authenticated with a key that only the owner has, so that an older state of the database can be told."""

    def __init__(self, path: str, vault_id: str, name: str, key: bytes):
        self.path, self.key = path, key
        self._bound = statement("seen", {"vault_id": vault_id, "name": name})
        self._frame = {"format": SEEN_FILE, "vault_id": vault_id, "name": name}
        self.roster: tuple[int, str] = (0, "")
        self.audit: tuple[int, str] = NO_HEAD
        self.rules: tuple[int, str] = (0, "")
        self.secrets: dict[str, list[Any]] = {}  # key -> [version, hash of its header, whether an approver had sealed it]

    @classmethod
    def of(cls, path: str, vault_id: str, name: str, key: bytes) -> Seen:
        """The record as it is on the disk."""
        seen = cls(path, vault_id, name, key)
        seen.load()
        return seen

    @classmethod
    def begin(cls, path: str, vault_id: str, name: str, key: bytes, roster: tuple[int, str], audit: tuple[int, str] = NO_HEAD,
              rules: tuple[int, str] = (0, "")) -> Seen:  # fmt: skip
        """A new record."""
        seen = cls(path, vault_id, name, key)
        seen.roster, seen.audit, seen.rules = roster, audit, rules
        seen.save()
        return seen

    def load(self) -> None:
        document = read_private(self.path, "the record of what was seen")
        if {key: document.get(key) for key in self._frame} != self._frame:
            raise DeniedError(f"{self.path} belongs to another vault or key")
        data = json.loads(decrypted(self.key, from_b64(document.get("data"), "the record"), self._bound))
        self.roster, self.audit, self.secrets = tuple(data["roster"]), tuple(data["audit"]), data["secrets"]
        self.rules = tuple(data.get("rules", (0, "")))  # a record from before there were rules has none

    def _data(self) -> bytes:
        return canonical({"roster": list(self.roster), "audit": list(self.audit), "rules": list(self.rules), "secrets": self.secrets})

    def save(self) -> None:
        write_private(self.path, {**self._frame, "data": b64(encrypted(self.key, self._data(), self._bound))})

    def learn(self, roster: tuple[int, str] | None = None, audit: tuple[int, str] | None = None, header: Row | None = None, machine: str = "",
              rules: tuple[int, str] | None = None) -> None:  # fmt: skip
        """Remember what is newer than what was seen, whoever else is writing.

        What is learned is learned after the fact: a lock that nobody gives back must not turn what has happened into a failure."""
        try:
            with folder_lock(os.path.dirname(self.path)):
                self.load()
                before = self._data()
                self.roster = max(self.roster, roster or self.roster)
                self.audit = max(self.audit, audit or self.audit)
                self.rules = max(self.rules, rules or self.rules)
                if header:
                    known = self.secrets.get(header["key"], [0, "", False])
                    if header["version"] > known[0]:
                        self.secrets[header["key"]] = [header["version"], hash_of("header", header), known[2] or header["owner"] != machine]
                if self._data() != before:
                    self._save_if_possible()
        except DatabaseError as error:
            sys.stderr.write(f"grace: what was seen could not be written to {self.path}: {error.message}\n")

    def _save_if_possible(self) -> None:
        """The same for a disk without room."""
        try:
            self.save()
        except OSError as error:
            sys.stderr.write(f"grace: what was seen could not be written to {self.path}: {error.strerror}\n")

    def accept(self, roster: tuple[int, str], audit: tuple[int, str], headers: dict[str, Row], machine: str, rules: tuple[int, str]) -> None:
        """Take the database as it is for what was seen: after a restored copy, and only when its owner says so."""
        with folder_lock(os.path.dirname(self.path)):
            self.load()
            self.roster, self.audit, self.rules = roster, audit, rules
            self.secrets = {key: [0, "", owned] for key, (_, _, owned) in self.secrets.items()}
            for key, header in headers.items():
                owned = self.secrets.get(key, [0, "", False])[2] or header["owner"] != machine
                self.secrets[key] = [header["version"], hash_of("header", header), owned]
            self.save()

    def version_of(self, key: str) -> int:
        """The highest version of a secret that was seen; 0 for none."""
        return int(self.secrets.get(key, [0])[0])

    def ahead_of(self, key: str, entry: Row | None) -> bool:
        """Whether a version was seen that is newer than the newest row."""
        return self.version_of(key) > (entry["version"] if entry else 0)

    def odd_version(self, header: Row) -> str | None:
        """Why this version of a secret cannot be the newest, after what was seen; or None."""
        version, known, _ = self.secrets.get(header["key"], [0, "", False])
        if header["version"] < version:
            return f"version {header['version']} of {header['key']} is older than the version {version} seen before"
        if header["version"] == version and hash_of("header", header) != known:
            return f"version {version} of {header['key']} is another one than the one seen before"
        return None


def stretch(passphrase: bytes, kdf: Row) -> bytes:
    """The key that a passphrase gives (Argon2id, RFC 9106); costs outside the bounds are refused before they are paid."""
    from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

    memory, turns, lanes = kdf.get("memory_kib"), kdf.get("iterations"), kdf.get("lanes")
    if (kdf.get("name") != "argon2id" or type(memory) is not int or not KDF_FLOOR <= memory <= KDF_CEILING or type(turns) is not int
            or not KDF_TURNS <= turns <= 10 or type(lanes) is not int or not 1 <= lanes <= 16):  # fmt: skip
        raise DeniedError("the key file asks for a key derivation outside what grace accepts (64 MiB to 1 GiB, 3 to 10 turns)")
    salt = from_b64(kdf.get("salt"), "the salt of a key file")
    if not 16 <= len(salt) <= 64:
        raise DeniedError("the key file has no proper salt")
    return Argon2id(salt=salt, length=32, iterations=turns, lanes=lanes, memory_cost=memory).derive(passphrase)


def kdf_for(memory: int) -> Row:
    """The costs for a new key file, with a fresh salt; fewer where memory is short."""
    memory_kib = max(KDF_FLOOR, min(memory >> 10, KDF_CEILING))
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/meminfo", encoding="ascii") as file:
        available = int(next(line for line in file if line.startswith("MemAvailable:")).split()[1])
        memory_kib = KDF_FLOOR if available < 4 * memory_kib else memory_kib
    return {"name": "argon2id", "memory_kib": memory_kib, "iterations": KDF_TURNS, "lanes": KDF_LANES, "salt": b64(os.urandom(16))}


def locked_keys(keys: Keys, seen_key: bytes, passphrase: bytes, facts: Row, memory: int) -> Row:
    """The document of a key file: the keys, and the one of the record beside it, under a passphrase."""
    head = {"format": KEY_FILE, **facts, "public": keys.public, "kdf": kdf_for(memory)}
    return {**head, "private": b64(encrypted(stretch(passphrase, head["kdf"]), keys.private + seen_key, statement("key-file", head)))}


def unlocked_keys(document: Row, passphrase: bytes) -> tuple[Keys, bytes]:
    """The keys of a key file, and the key of the record beside it; DeniedError for the wrong passphrase."""
    if document.get("format") != KEY_FILE or not isinstance(document.get("kdf"), dict):
        raise DeniedError("this is no key file of an approver")
    head = {key: value for key, value in document.items() if key != "private"}
    secret = stretch(passphrase, document["kdf"])
    try:
        private = decrypted(secret, from_b64(document.get("private"), "the key"), statement("key-file", head))
        keys = Keys(private[:128])
    except RefusedError:
        raise WrongPassphraseError("the passphrase is wrong, or the key file was changed", "try again") from None
    if keys.public != document.get("public") or len(private) != 160:
        raise DeniedError("the key file was changed")
    return keys, private[128:]


# ---- the roster


def rosters_until(rows: list[Row], vault_id: str, root: str, seen: tuple[int, str]) -> list[Row]:
    """All lists of approvers, each signed by an approver of the one before, from the root on; RefusedError.

    `root` is the hash of the first list; `seen` the newest number and hash known to whoever asks."""
    current: Row | None = None
    verified: list[Row] = []
    for number, row in enumerate(rows, 1):
        try:
            roster = parse_canonical(row["document"])
        except ValueError as error:
            raise RefusedError(f"the roster {number} {error}") from None
        this = hash_of("roster", roster)
        if roster.get("vault_id") != vault_id or not number == roster.get("number") == row["number"] or (current is None and this != root):
            raise RefusedError(f"the roster {number} belongs to another vault")
        if current is not None and roster.get("previous") != hash_of("roster", current):
            raise RefusedError(f"the roster {number} does not follow the one before it")
        signer = next((person for person in active(current or roster) if fingerprint(person) == roster.get("signer")), None)
        if signer is None or not signed_by(signer, bytes(row["signature"]), statement("roster-signature", this)):
            raise RefusedError(f"the roster {number} is not signed by an approver")
        if number == seen[0] and this != seen[1]:
            raise RefusedError(f"the roster {number} is another one than the one seen before")
        if current is not None and (problem := odd_change(current, roster, signer)):
            raise RefusedError(f"the roster {number} {problem}")
        current = roster
        verified.append(roster)
    if not verified or len(verified) < seen[0]:
        raise RefusedError("rolled back: a newer list of approvers was seen before")
    return verified


def odd_change(before: Row, after: Row, signer: Row) -> str | None:
    """Why an approver may not have changed the list so, or None: nobody hands out a role that he does not hold himself."""
    if after["machine"] != before["machine"] and set(signer["roles"]) != set(ROLES):
        return f"names another machine, which takes both roles, and {signer['name']} holds one"
    names = [person["name"].lower() for person in active(after)]
    if len(set(names)) != len(names):
        return "gives one name to two approvers"
    known = {fingerprint(person): person for person in before["approvers"]}
    for person in after["approvers"]:
        old = known.pop(fingerprint(person), None)
        if old is None and not set(person["roles"]) <= set(signer["roles"]):
            return f"gives a role that {signer['name']} does not hold"
        if old is not None and (old["name"], old["roles"], old["added"]) != (person["name"], person["roles"], person["added"]):
            return f"changes {old['name']}"
        if old is not None and old["removed"] is not None and (old["removed"], old["keeps"]) != (person["removed"], person["keeps"]):
            return f"brings {old['name']} back"
    return "drops somebody" if known else None


def active(roster: Row) -> list[Row]:
    return [person for person in roster["approvers"] if person["removed"] is None]


def person_of(roster: Row, print_: str) -> Row | None:
    return next((person for person in roster["approvers"] if fingerprint(person) == print_), None)


def person_named(roster: Row, name: str) -> Row | None:
    return next((person for person in active(roster) if person["name"] == name), None)


def members_of(roster: Row, role: str) -> list[str]:
    return sorted(fingerprint(person) for person in active(roster) if role in person["roles"])


def new_roster(before: Row | None, approvers: list[Row], machine: Row, vault_id: str, signer: str, now: int) -> Row:
    return {"format": "grace-roster/1", "vault_id": vault_id, "number": before["number"] + 1 if before else 1,
            "previous": hash_of("roster", before) if before else None, "created": now, "signer": signer, "machine": machine,
            "approvers": approvers}  # fmt: skip


def put_roster(tx: Tx, roster: Row, keys: Keys) -> None:
    tx.run(PUT_ROSTER, number=roster["number"], document=canonical(roster).decode(),
           signature=keys.sign(statement("roster-signature", hash_of("roster", roster))))  # fmt: skip


# ---- the rules of governance


NO_RULES: Row = {"number": 0, "signer": None, "created": None, "rules": []}


def rules_of(text: str, vault_id: str) -> Row:
    """A set of rules that can be obeyed; RefusedError for anything else."""
    try:
        found = shaped(parse_canonical(text), RULES_SHAPE, "a set of rules")
    except ValueError as error:
        raise RefusedError(f"a set of rules {error}") from None
    if found["format"] != "grace-rules/1" or found["vault_id"] != vault_id:
        raise RefusedError(f"the set of rules {found['number']} belongs to another vault")
    names = [shaped(rule, RULE_SHAPE, "a rule")["name"] for rule in found["rules"]]
    if len(set(names)) != len(names) or len(names) > MAX_RULES:
        raise RefusedError(f"the set of rules {found['number']} holds a name twice, or too many rules")
    for rule in found["rules"]:
        if problem := odd_rule(rule):
            raise RefusedError(f"the rule {printable(rule['name'])} {problem}")
    return found


def rules_until(rows: list[Row], vault_id: str, rosters: list[Row], seen: tuple[int, str] | None, whole: bool = True) -> Row:
    """The newest set of rules, each signed by an approver with the role governance and naming the one before; NO_RULES, RefusedError.

    `seen` is the newest number and hash known to whoever asks, None when he accepts any; without `whole` the first sets may be left out."""
    people = {fingerprint(person): person for roster in rosters for person in roster["approvers"]}
    newest, this = NO_RULES, ""
    for row in rows:
        found, last = rules_of(row["document"], vault_id), this
        number, this = found["number"], hash_of("rules", found)
        follows = newest["number"] + 1 if newest["number"] or whole else number
        if not follows == number == row["number"] > 0:
            raise RefusedError(f"the set of rules {follows} is missing")
        if (last or number == 1) and found["previous"] != (last or None):
            raise RefusedError(f"the set of rules {number} does not follow the one before it")
        signer = people.get(found["signer"], {"roles": ()})
        if "governance" not in signer["roles"] or not signed_by(signer, bytes(row["signature"]), statement("rules-signature", this)):
            raise RefusedError(f"the set of rules {number} is not signed by an approver with the role governance")
        if seen is not None and number == seen[0] and this != seen[1]:
            raise RefusedError(f"rolled back: the set of rules {number} is another one than the one seen before")
        newest = found
    if seen is not None and newest["number"] < seen[0]:
        raise RefusedError("rolled back: a newer set of rules was seen before")
    if seen is not None and newest["number"] > seen[0] and people[newest["signer"]]["removed"] is not None:
        raise RefusedError("the newest set of rules is signed by somebody who is not an approver any more",
                           "let an approver with the role governance sign another one: grace policy add, or grace policy remove")  # fmt: skip
    return newest


def rules_mark(rules: Row) -> tuple[int, str]:
    """What is remembered of a verified set."""
    return (rules["number"], hash_of("rules", rules)) if rules["number"] else (0, "")


def put_rules(tx: Tx, before: Row, rules: list[Row], signer: Approver, kind: str, name: str) -> Row:
    """The next set of rules, signed and anchored, with its leaf. ConflictError when somebody was faster."""
    if (tx.value("SELECT MAX(number) AS n FROM governance_rules") or 0) != before["number"]:
        raise ConflictError("the rules were changed meanwhile", "try again")
    made = {"format": "grace-rules/1", "vault_id": signer.vault_id, "number": before["number"] + 1, "previous": rules_mark(before)[1] or None,
            "created": tx.now, "signer": signer.keys.fingerprint, "rules": rules}  # fmt: skip
    this, text = hash_of("rules", made), canonical(made).decode()
    if len(rules) > MAX_RULES or len(text) > MAX_RULES_BYTES:
        raise ConflictError(f"the rules would be too many: at most {MAX_RULES}, and {MAX_RULES_BYTES >> 10} KiB of text", "remove some: grace policy remove")
    tx.run(PUT_RULES, number=made["number"], document=text, signature=signer.keys.sign(statement("rules-signature", this)))
    record(tx, "policy.changed", name, {"by": signer.name, "change": kind, "rules": this, "number": made["number"]})
    anchor(tx, signer)
    return made


class Vault:
    """An open database's vault: its id, this machine's keys and what they have seen, and the roster that holds.

    LockedError before `grace init`, and where the machine's key is missing."""

    def __init__(self, store: Store):
        self.store = store
        store.overwrite_deleted()
        self.id = store.value(GET_VAULT) or ""
        if not self.id:
            raise LockedError("there is no vault yet", "make one: grace init")
        if not re.fullmatch(VAULT_ID, self.id):
            raise RefusedError("the vault's id is none")
        self.folder = vault_folder(self.id)
        try:
            document = read_private(os.path.join(self.folder, "machine.key"), "the machine's key")
        except LockedError as error:
            raise LockedError(error.message, "put it back, or let an approver make a new one: grace init --machine") from None
        if document.get("format") != MACHINE_FILE or document.get("vault_id") != self.id:
            raise DeniedError("the machine's key file belongs to another vault")
        self.machine = Keys(from_b64(document.get("private"), "the machine's key"))
        self.root = str(document.get("root"))
        try:
            self.seen = Seen.of(os.path.join(self.folder, "machine.seen"), self.id, "machine", derived(self.machine.private, "seen"))
        except RefusedError:
            raise DeniedError("the machine's record of what it has seen is not of its key", "let an approver make both anew: grace init --machine") from None
        self.rosters = rosters_until(store.all(ROSTERS), self.id, self.root, (0, ""))
        self.roster = self.rosters[-1]
        number, known = self.seen.roster
        self.older = number > len(self.rosters) or (number > 0 and hash_of("roster", self.rosters[number - 1]) != known)
        if not self.older:
            self.seen.learn(roster=self.roster_mark)
        self._rules: tuple[Any, Row] = (None, NO_RULES)

    @property
    def roster_mark(self) -> tuple[int, str]:
        return self.roster["number"], hash_of("roster", self.roster)

    def rolled_back(self, reader: Reader) -> bool:
        """Whether the log or the list of approvers is not what this machine has seen: only low-risk secrets open then."""
        return self.older or not extends(reader, self.seen.audit)

    def learn_head(self, header: Row | None = None) -> None:
        if not self.rolled_back(self.store):
            self.seen.learn(None, audit_head(self.store), header, self.machine.fingerprint, self.known_rules())

    def rules(self, reader: Reader) -> Row:
        """The newest set of governance rules; RefusedError when one does not verify, or a newer one was seen."""
        known = reader.all(RULE_SETS), self.seen.rules
        if known != self._rules[0]:
            self._rules = known, rules_until(known[0], self.id, self.rosters, known[1])
        return self._rules[1]

    def known_rules(self) -> tuple[int, str]:
        """What there is to be remembered of the rules: nothing new when they do not verify."""
        try:
            return rules_mark(self.rules(self.store))
        except RefusedError:
            return self.seen.rules

    def current(self, reader: Reader, key: str) -> tuple[Row, Row]:
        """The newest version of a secret and its verified header; NotFoundError, RefusedError."""
        entry = reader.one(NEWEST_VERSION, key=key)
        if entry is None or entry["sealed"] is None:
            known = [row["secret_key"] for row in reader.all(CURRENT_SECRETS)]
            raise NotFoundError(f"there is no secret {key!r}", nearest_hint(key, known, "grace secret list"))
        header = self.checked(reader, entry)
        if problem := self.seen.odd_version(header):
            raise RefusedError(f"rolled back: {problem}")
        delegation = received_delegation(carried_delegation(reader, entry))
        if delegation is not None and reader.one(REMOVED_SINCE, key=key, version=json.loads(delegation["document"])["version"]):
            raise RefusedError(f"{key} was removed after its owner had allowed rotations")
        before = past_versions(reader, header, self.seen.version_of(key)) if header["version"] > self.seen.version_of(key) else []
        if problem := odd_succession(header, delegation, before, self.seen, self.id, self.rosters):
            raise RefusedError(problem)
        return entry, header

    def checked(self, reader: Reader, entry: Row) -> Row:
        """The header of a version whose seal holds; RefusedError otherwise."""
        delegation = reader.one(GET_DELEGATION, seq=entry["delegation"]) if entry["delegation"] is not None else None
        if entry["delegation"] is not None and delegation is None:
            raise RefusedError(f"the delegation under which {entry['secret_key']} was sealed is missing")
        header = check_seal(entry["header"], sha256(bytes(entry["sealed"] or b"")), bytes(entry["signature"]), self.id, self.roster, delegation)
        if (header["key"], header["version"]) != (entry["secret_key"], entry["version"]):
            raise RefusedError(f"the row of {entry['secret_key']} holds another secret")
        if header["owner"] == fingerprint(self.roster["machine"]) and self.was_owned(reader, header["key"]):
            raise RefusedError(f"{header['key']} is sealed by the machine, although an approver had sealed it before")
        return header

    def was_owned(self, reader: Reader, key: str) -> bool:
        """Whether a version of a secret was ever sealed by an approver."""
        machines = {fingerprint(roster["machine"]) for roster in self.rosters}
        owners = {str(stored_object(row["header"]).get("owner")) for row in reader.all(VERSIONS_OF, key=key)}
        return bool(owners - machines) or bool(self.seen.secrets.get(key, [0, "", False])[2])


def nearest_hint(word: str, known: Iterable[str], see: str) -> str:
    import difflib

    near = difflib.get_close_matches(word, list(known), 3, 0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"see them with: {see}"


Fields = dict[str, tuple[type, ...]]
TEXT, NUMBER, MAYBE_TEXT, MAYBE_NUMBER = (str,), (int,), (str, type(None)), (int, type(None))
HEADER_SHAPE: Fields = {
    "format": TEXT, "vault_id": TEXT, "key": TEXT, "service": MAYBE_TEXT, "type": MAYBE_TEXT, "username": MAYBE_TEXT, "version": NUMBER, "risk": TEXT,
    "action_risks": (dict,), "owner": TEXT, "created": NUMBER, "suite": TEXT, "commitment": TEXT, "same_person": (bool,), "allow_standing": (bool,),
    "expires": MAYBE_NUMBER, "rotate_every": MAYBE_NUMBER, "rotate_with": MAYBE_TEXT, "policy": (dict,),
}  # fmt: skip


RULES_SHAPE: Fields = {"format": TEXT, "vault_id": TEXT, "number": NUMBER, "previous": MAYBE_TEXT, "created": NUMBER, "signer": TEXT, "rules": (list,)}
RULE_SHAPE: Fields = {"name": TEXT, "effect": TEXT, "group": MAYBE_TEXT, "secret": MAYBE_TEXT, "service": MAYBE_TEXT, "action": MAYBE_TEXT, "by": MAYBE_TEXT,
                      "risk": MAYBE_TEXT, "hours": MAYBE_TEXT, "zone": TEXT}  # fmt: skip


def fitting(header: Row) -> Row:
    """Of an unverified header what a listing can show."""
    shown = {name: value for name, value in header.items() if type(value) in HEADER_SHAPE.get(name, ())}
    return {name: value for name, value in shown.items() if type(value) is not int or abs(value) < MAX_INSTANT}


def shaped(value: Any, shape: Fields, what: str) -> Row:
    """The value itself when it is an object with exactly these fields of these types; RefusedError otherwise."""
    if not isinstance(value, dict) or set(value) != set(shape) or not all(type(value[name]) in kinds for name, kinds in shape.items()):
        raise RefusedError(f"{what} has not the shape that it should have")
    return value


def check_seal(text: str, sealed_hash: str, signature: bytes, vault_id: str, roster: Row, delegation: Row | None = None, past: Iterable[Row] = ()) -> Row:
    """The header that an approver, or for low risk the machine, has signed together with its sealed value; RefusedError.

    `delegation`: document and signature of what its owner allowed, when a rotation sealed it in his name. `past`, all lists
    of approvers, is for a version that was replaced: its owner may have left since."""
    try:
        header = shaped(parse_canonical(text), HEADER_SHAPE, "a header")
    except ValueError as error:
        raise RefusedError(f"a header {error}") from None
    if header["format"] != "grace-secret/1" or header["vault_id"] != vault_id or header["suite"] != SUITE:
        raise RefusedError("a header is not of this vault")
    if problem := odd_policy(header["policy"]):
        raise RefusedError(f"{header['key']}: {problem}")
    this = hash_of("header", header)
    machine = next((known["machine"] for known in (roster, *past) if fingerprint(known["machine"]) == header["owner"]), None)
    by_machine = machine is not None
    owner = machine or person_of(roster, header["owner"])
    if owner is None or (not by_machine and not past and owner["removed"] is not None and this not in owner["keeps"]):
        raise RefusedError(f"{header['key']} is sealed by a stranger")
    signer, text_signed = owner, statement("seal", [this, sealed_hash])
    if delegation is not None:
        signer = check_delegation(delegation, header, owner)
        text_signed = statement("delegated-seal", [this, sealed_hash, hash_of("delegation", signer)])
    if not signed_by(signer, signature, text_signed):
        raise RefusedError(f"the seal of {header['key']} is broken")
    if by_machine != (header["risk"] == "low") or by_machine != (header["policy"]["all"][0]["group"] == "machine"):
        raise RefusedError(f"{header['key']} is sealed by the machine, which may seal low risk only" if by_machine else f"{header['key']}: an odd policy")
    return header


DELEGATION_SHAPE: Fields = {"format": TEXT, "vault_id": TEXT, "key": TEXT, "version": NUMBER, "base": TEXT, "fields": TEXT, "risk": TEXT, "policy": TEXT,
                           "handler": TEXT, "sign": TEXT, "created": NUMBER, "expires": NUMBER}  # fmt: skip
DELEGATED_FOR = 366 * DAY


def sealed_fields(header: Row) -> str:
    """The hash of all of a header that a mere new value leaves as it is."""
    return hash_of("fields", {name: value for name, value in header.items() if name not in ("version", "created", "commitment")})


def check_delegation(delegation: Row, header: Row, owner: Row) -> Row:
    """The document by which an owner lets a rotation seal new values; RefusedError when it does not allow this header."""
    try:
        document = shaped(parse_canonical(delegation["document"]), DELEGATION_SHAPE, "a delegation")
    except ValueError as error:
        raise RefusedError(f"a delegation {error}") from None
    if document["format"] != "grace-delegation/1" or not signed_by(owner, bytes(delegation["signature"]), statement("delegation-signature", document)):
        raise RefusedError(f"the delegation for {header['key']} is not signed by its owner")
    if (document["vault_id"], document["key"], document["fields"]) != (header["vault_id"], header["key"], sealed_fields(header)):
        raise RefusedError(f"a rotation changed more of {header['key']} than its value")
    if header["risk"] == "low" or not document["created"] <= header["created"] < document["expires"]:
        raise RefusedError(f"the delegation for {header['key']} does not hold at that time")
    return document


def new_delegation(owner: Keys, header: Row, machine: Row, now: int) -> Row:
    """A signing key for rotations of this secret, wrapped to the machine, and the owner's signature under what it may do."""
    key = Keys.new()
    document = {"format": "grace-delegation/1", "vault_id": header["vault_id"], "key": header["key"], "version": header["version"],
                "base": hash_of("header", header), "fields": sealed_fields(header), "risk": header["risk"],
                "policy": hash_of("policy", header["policy"]), "handler": header["rotate_with"], "sign": key.public["sign"], "created": now,
                "expires": now + DELEGATED_FOR}  # fmt: skip
    return {"document": canonical(document).decode(), "signature": owner.sign(statement("delegation-signature", document)),
            "private": wrap_to(machine, key.private, statement("delegation-key", document))}  # fmt: skip


PAST_VERSIONS = 200  # that are carried to an approver elsewhere


def past_versions(reader: Reader, header: Row, since: int | None = None) -> list[Row]:
    """The versions before this one, newest first, with what their owners have signed: back to version `since`, or the newest only."""
    n = PAST_VERSIONS if since is None else header["version"] - max(since, 1)
    return [{"header": row["header"], "sealed": row["sealed_hash"], "seal": b64(bytes(row["signature"])), "delegation": carried_delegation(reader, row)}
            for row in reader.all(VERSIONS_BEFORE, key=header["key"], version=header["version"], n=n)]  # fmt: skip


def carried_delegation(reader: Reader, entry: Row) -> Row | None:
    """The delegation under which a version was sealed, as a text carries it."""
    row = reader.one(GET_DELEGATION, seq=entry["delegation"]) if entry["delegation"] is not None else None
    return {"document": row["document"], "signature": b64(bytes(row["signature"]))} if row else None


def received_delegation(carried: Row | None) -> Row | None:
    return {**carried, "signature": from_b64(carried["signature"], "a signature")} if carried is not None else None


def delegation_lasts(delegation: Row | None, before: Row | None, last: Row) -> bool:
    """Whether a delegation was given with the version `last`, or that one was sealed under the same."""
    if delegation is None or (before is not None and before["document"] == delegation["document"]):
        return True
    return bool(parse_canonical(delegation["document"])["base"] == hash_of("header", last))


def odd_succession(header: Row, delegation: Row | None, before: list[Row], seen: Seen, vault_id: str, rosters: list[Row]) -> str | None:
    """Why this version may not follow those before it, back to the one that was seen; or None.

    The next version comes from the owner of the one before, or from one of its users; after low risk from any approver. One that
    was sealed under a delegation follows the version that this was given with, or another one under the same."""
    after, pinned = header, seen.secrets.get(header["key"], [0, "", False])
    machines = {fingerprint(roster["machine"]) for roster in rosters}
    for row in before:
        if after["version"] <= max(pinned[0], 1):
            return None
        try:
            under = received_delegation(row["delegation"])
            last = check_seal(row["header"], row["sealed"], from_b64(row["seal"], "a seal"), vault_id, rosters[-1], under, rosters)
        except RefusedError as error:
            return f"the version before version {after['version']} of {header['key']} does not hold: {error.cause}"
        if (last["key"], last["version"]) != (header["key"], after["version"] - 1):
            break
        if last["version"] == pinned[0] and hash_of("header", last) != pinned[1]:
            return f"version {last['version']} of {header['key']} is another one than the one seen before"
        if last["owner"] not in machines and after["owner"] != last["owner"] and after["owner"] not in holders(last, "user"):
            return f"version {after['version']} of {header['key']} is by somebody who neither owned the one before nor was one of its users"
        if not delegation_lasts(delegation, under, last):
            return f"version {after['version']} of {header['key']} was sealed under a delegation that had ended"
        after, delegation = last, under
    return None if after["version"] <= max(pinned[0], 1) else f"the version before version {after['version']} of {header['key']} is missing"


def build_policy(parts: list[Row], roster: Row) -> Row:
    """The policy of a header from its words: each group with its members as they are on the roster now; ValueError."""
    groups = []
    for part in parts:
        members = members_of(roster, part["group"])
        if part["names"] is not None:
            people = {name: person_named(roster, name) for name in part["names"]}
            wrong = [name for name, person in people.items() if person is None or part["group"] not in person["roles"]]
            if wrong:
                raise ValueError(f"{', '.join(wrong)}: no approver with the role {part['group']}")
            members = sorted(fingerprint(person) for person in people.values() if person is not None)
        if part["of"] is not None and part["of"] != len(members):
            raise ValueError(f"{part['group']}: there are {len(members)} approvers with this role, not {part['of']}")
        if part["threshold"] > len(members):
            raise ValueError(f"{part['group']}:{part['threshold']} asks for more approvers than the {len(members)} there are")
        groups.append({"group": part["group"], "threshold": part["threshold"], "members": members})
    return {"all": groups}


def low_policy(roster: Row) -> Row:
    """Low risk: this machine, and each approver, so that losing the machine's key loses nothing."""
    return {"all": [{"group": "machine", "threshold": 1, "members": sorted({fingerprint(roster["machine"]), *members_of(roster, "user")})}]}


def without_removed(policy: Row, roster: Row) -> Row:
    """The same policy among those who are still approvers."""
    here = {fingerprint(person) for person in active(roster)}
    return {"all": [{**group, "members": [member for member in group["members"] if member in here]} for group in policy["all"]]}


def reshared_policy(before: Row, roster: Row) -> Row:
    """The groups of a header among the approvers that there are now; a group that left out somebody by name stays as it is."""
    groups = []
    for group in without_removed(before["policy"], roster)["all"]:
        everybody = members_of(roster, group["group"])
        known = {fingerprint(person) for person in active(roster) if person["added"] < before["created"]}
        named = known & set(everybody) - set(group["members"])
        groups.append(group if named else {**group, "members": everybody})
    return {"all": groups}


NEW_SECRET: Row = {"service": None, "type": None, "username": None, "risk": "medium", "action_risks": {}, "allow_standing": False, "expires": None,
                   "rotate_every": None, "rotate_with": None}  # fmt: skip


def next_header(vault_id: str, roster: Row, key: str, before: Row | None, version: int, options: Row, now: int) -> Row:
    """The fields of a new version's header: what was said now, else what held before, else the defaults; ValueError."""
    kept = {name: before[name] for name in NEW_SECRET} if before else NEW_SECRET
    fields = {**kept, **{name: value for name, value in options.items() if name in kept and value is not None}}
    if fields["risk"] == "low":
        if options.get("policy"):
            raise ValueError("a secret of low risk is opened by this machine; a policy would mean nothing")
        policy = low_policy(roster)
    elif options.get("policy") or before is None or before["risk"] == "low":
        policy = build_policy(options.get("policy") or parse_policy(default_policy(fields["risk"])), roster)
    else:  # a higher risk may add a group, and takes none away
        kept_groups = without_removed(before["policy"], roster)["all"]
        added = [part for part in parse_policy(default_policy(fields["risk"])) if part["group"] not in {group["group"] for group in kept_groups}]
        policy = {"all": [*kept_groups, *build_policy(added, roster)["all"]]}
    return {"format": "grace-secret/1", "vault_id": vault_id, "key": key, "version": version, "created": now, **fields, "policy": policy,
            "same_person": len(active(roster)) == 1}  # fmt: skip


def commitment(dek: bytes) -> str:
    return derived(dek, "commitment").hex()


def share_info(header_hash: str, sealed_hash: str, group: str, member: str, index: int) -> bytes:
    return statement("share", [header_hash, sealed_hash, group, member, index])


def seal(keys: Keys, fields: Row, value: bytes, roster: Row, delegation: Row | None = None) -> Row:
    """A new version: header, sealed value, signature and shares. `fields` is the header without what is made here.

    Under a delegation, whose key then signs, the owner is who he was. `pieces`, the parts in clear, and `sign` are for
    standing consents that follow, and are stored nowhere."""
    parts = {group["group"]: os.urandom(32) for group in fields["policy"]["all"]}
    dek = functools.reduce(xor_bytes, parts.values(), bytes(32))
    header = {**fields, "owner": fields["owner"] if delegation else keys.fingerprint, "suite": SUITE, "commitment": commitment(dek)}
    sealed = encrypted(dek, pad(value), canonical(header))
    this, sealed_hash = hash_of("header", header), sha256(sealed)
    people = {fingerprint(person): person for person in [roster["machine"], *roster["approvers"]]}
    shares, pieces = [], {}
    for group in header["policy"]["all"]:
        split = split_part(parts[group["group"]], group["threshold"], len(group["members"]))
        for index, (member, piece) in enumerate(zip(group["members"], split, strict=True), 1):
            wrap = wrap_to(people[member], piece, share_info(this, sealed_hash, group["group"], member, index))
            shares.append({"group": group["group"], "member": member, "index": index, "wrap": wrap})
            pieces[group["group"], index] = piece
    under = json.loads(delegation["document"]) if delegation else None
    text = statement("delegated-seal", [this, sealed_hash, hash_of("delegation", under)]) if delegation else statement("seal", [this, sealed_hash])
    may_rotate = header["rotate_with"] and header["risk"] != "low" and delegation is None
    delegate = new_delegation(keys, header, roster["machine"], header["created"]) if may_rotate else None
    return {"header": header, "sealed": sealed, "signature": keys.sign(text), "shares": shares, "delegation": delegation["seq"] if delegation else None,
            "delegate": delegate, "pieces": pieces, "sign": keys.sign}  # fmt: skip


def put_version(tx: Tx, made: Row, kind: str) -> tuple[int, str]:
    """Store a new version in the place of the one before it, whose value goes; open requests for that one are void."""
    header = made["header"]
    newest = tx.one(NEWEST_VERSION, key=header["key"])
    if header["version"] != (newest["version"] if newest else 0) + 1:
        raise ConflictError(f"{header['key']} was changed meanwhile", "try again")
    tx.run(DROP_SHARES, key=header["key"])
    if tx.run(EMPTY_VERSIONS, key=header["key"], now=tx.now):
        to_shred(tx)
    tx.run(PUT_SECRET, key=header["key"], version=header["version"], header=canonical(header).decode(), sealed=made["sealed"],
           sealed_hash=sha256(made["sealed"]), signature=made["signature"], delegation=made["delegation"],
           rotate_at=tx.now + header["rotate_every"] if header["rotate_every"] else None, now=tx.now)  # fmt: skip
    if made["delegation"] is None:
        tx.run(END_DELEGATIONS, key=header["key"])
    if made["delegate"]:
        tx.run(PUT_DELEGATION, key=header["key"], now=tx.now, **made["delegate"])
    tx.many(PUT_SHARE, [{"key": header["key"], "version": header["version"], **share} for share in made["shares"]])
    emit(tx, "secrets.secret.rotated" if kind == "rotated" else "secrets.secret.stored", header["key"],
         {"secret_key": header["key"], "version": header["version"], "risk_level": header["risk"], "service": header["service"]})  # fmt: skip
    return record(tx, f"secret.{kind}", header["key"], {"version": header["version"], "risk": header["risk"], "owner": header["owner"],
                                                        "policy": policy_text(header["policy"]), "header": hash_of("header", header)})  # fmt: skip


def open_value(header: Row, sealed: bytes, shares: dict[str, dict[int, bytes]]) -> bytes:
    """The value from enough shares of each group; RefusedError when they do not give the key that was committed to."""
    dek = bytes(32)
    for group in header["policy"]["all"]:
        try:
            dek = xor_bytes(dek, join_part(shares.get(group["group"], {}), group["threshold"], len(group["members"])))
        except ValueError as error:
            raise RefusedError(f"the group {group['group']}: {error}") from None
    if commitment(dek) != header["commitment"]:
        raise RefusedError("the parts do not give the key of this secret")
    return unpad(decrypted(dek, sealed, canonical(header)))


def own_shares(keys: Keys, entry: Row, header: Row, shares: list[Row]) -> dict[str, dict[int, bytes]]:
    """What one key can open of a version: by group, by index."""
    this, sealed_hash = hash_of("header", header), sha256(bytes(entry["sealed"]))
    opened: dict[str, dict[int, bytes]] = {}
    for share in shares:
        if share["member"] == keys.fingerprint:
            info = share_info(this, sealed_hash, share["group_name"], share["member"], share["share_index"])
            opened.setdefault(share["group_name"], {})[share["share_index"]] = keys.unwrap(bytes(share["wrap"]), info)
    return opened


def make_vault(store: Store, name: str, passphrase: bytes) -> Row:
    """A new vault: its id, the machine's key, and the first approver, who holds both roles. ConflictError when there is one.

    The files come first: a process that dies before the last step leaves a directory that nothing refers to."""
    vault_id, machine, seen_key = os.urandom(8).hex(), Keys.new(), os.urandom(32)
    first, folder = Keys.new(), vault_folder(vault_id)
    roster = new_roster(None, [new_person(name, ROLES, first.public, clock())], machine.public, vault_id, first.fingerprint, clock())
    root = hash_of("roster", roster)
    facts = {"vault_id": vault_id, "name": name, "root": root}
    os.makedirs(folder, mode=0o700)
    write_private(os.path.join(folder, f"{name}.key"), locked_keys(first, seen_key, passphrase, facts, setting(store, "vault.argon2_memory")))
    write_private(os.path.join(folder, "machine.key"), {"format": MACHINE_FILE, "vault_id": vault_id, "root": root, "private": b64(machine.private)})
    for owner, key in ((name, seen_key), ("machine", derived(machine.private, "seen"))):
        Seen.begin(os.path.join(folder, f"{owner}.seen"), vault_id, owner, key, (1, root))

    def put(tx: Tx) -> None:
        if tx.value(GET_VAULT):
            raise ConflictError("this database has a vault already", "see its approvers: grace approver list")
        tx.run(SET_SETTING, name="_vault_id", value=vault_id, now=tx.now)
        put_roster(tx, roster, first)
        record(tx, "vault.created", vault_id, {"approver": name, "fingerprint": first.fingerprint, "roster": root})

    store.write(put)
    return {"vault_id": vault_id, "approver": name, "roles": list(ROLES), "fingerprint": first.fingerprint, "key_file": os.path.join(folder, f"{name}.key"),
            "machine_key_file": os.path.join(folder, "machine.key")}  # fmt: skip


def new_person(name: str, roles: Iterable[str], public: Row, now: int) -> Row:
    return {"name": name, "roles": sorted(roles), **public, "added": now, "removed": None, "keeps": []}


class Approver:
    """An approver whose key is unlocked, and what he has seen. `roster` is the newest one that he trusts."""

    def __init__(self, name: str, folder: str, vault_id: str, passphrase: bytes):
        """Unlock the key of an approver. LockedError when it is not here, DeniedError for the wrong passphrase."""
        path = os.path.join(folder, f"{name}.key")
        document = read_private(path, f"the key of {name}")
        if document.get("vault_id") != vault_id or document.get("name") != name:
            raise DeniedError(f"{path} belongs to another vault or approver")
        self.name, self.root = name, str(document.get("root"))
        self.keys, key = unlocked_keys(document, passphrase)
        self.seen = Seen.of(os.path.join(folder, f"{name}.seen"), vault_id, name, key)
        self.vault_id = vault_id
        self.roster: Row = {}
        self.rosters: list[Row] = []

    def meet(self, rosters: list[Row], accepting: bool = False) -> Approver:
        """Follow the lists of approvers from the first on; DeniedError when this key is not on the newest."""
        self.rosters = rosters_until(rosters, self.vault_id, self.root, (0, "") if accepting else self.seen.roster)
        self.roster = self.rosters[-1]
        person = person_of(self.roster, self.keys.fingerprint)
        if person is None or person["removed"] is not None:
            raise DeniedError(f"{self.name} is not an approver any more")
        return self

    def learn(self, audit: tuple[int, str] | None, header: Row | None = None, rules: tuple[int, str] | None = None) -> None:
        self.seen.learn((self.roster["number"], hash_of("roster", self.roster)), audit, header, fingerprint(self.roster["machine"]), rules)


def anchor(tx: Tx, approver: Approver) -> None:
    """An approver's signature under the audit log as it is now."""
    size, head = audit_head(tx)
    document = {"format": "grace-anchor/1", "vault_id": approver.vault_id, "approver": approver.keys.fingerprint, "size": size, "head": head, "at": tx.now}
    tx.run(PUT_ANCHOR, document=canonical(document).decode(), signature=approver.keys.sign(statement("anchor", document)))


def holders(header: Row, group: str) -> list[str]:
    """The members of a group who hold parts of the data key, in order; empty when it only signs."""
    return next((list(part["members"]) for part in header["policy"]["all"] if part["group"] == group), [])


def gone_header(vault: Vault, entry: Row | None, options: Row) -> Row | None:
    """The header of a value that was removed, if it is the one that was seen last: a new value is not sealed with less than it had."""
    if entry is None or not vault.was_owned(vault.store, entry["secret_key"]):
        return None
    with contextlib.suppress(RefusedError, ValueError):
        header = shaped(parse_canonical(entry["header"]), HEADER_SHAPE, "a header")
        if not odd_policy(header["policy"]) and vault.seen.secrets.get(entry["secret_key"], [0, ""])[:2] == [entry["version"], hash_of("header", header)]:
            return header
    if options.get("risk") and options.get("policy"):
        return None
    raise UsageError(f"what {entry['secret_key']} was sealed with before it was removed is not known any more", "say it anew: --risk and --policy")


def refuse_takeover(approver: Approver, before: Row | None) -> None:
    """A new version comes from whoever sealed the last one, or from one of its users."""
    mine = approver.keys.fingerprint
    if before is not None and before["risk"] != "low" and mine != before["owner"] and mine not in holders(before, "user"):
        raise DeniedError(f"{approver.name} neither owns {before['key']} nor is one of its users", "let one of them store it: --owner NAME")


def resealed_low(store: Store, entry: Row, person: Approver, machine: Keys, roster: Row) -> Row:
    """A secret of low risk, opened with the approver's own part and sealed by another machine key."""
    header = check_seal(entry["header"], sha256(bytes(entry["sealed"])), bytes(entry["signature"]), person.vault_id, person.roster)
    shares = store.all(SHARES_OF, key=entry["secret_key"], version=entry["version"])
    value = open_value(header, bytes(entry["sealed"]), own_shares(person.keys, entry, header, shares))
    return seal(machine, next_header(person.vault_id, roster, header["key"], header, entry["version"] + 1, {}, clock()), value, roster)


def delegated_version(vault: Vault, key: str, value: bytes) -> Row:
    """A new value sealed in its owner's name, as he has allowed it to rotations; with keys that can read none. DeniedError, LockedError."""
    store = vault.store
    if vault.rolled_back(store):
        raise RefusedError("rolled back: the audit log or the list of approvers is not the one that this machine has seen")
    entry, header = vault.current(store, key)
    row = store.one(NEWEST_DELEGATION, key=key)
    hint = f"let its owner seal it anew: grace secret rotate {key}"
    if row is None:
        raise LockedError(f"the owner of {key} has not allowed rotations without him", f"he allows them with: grace secret set {key} --rotate-with HANDLER")
    now = clock()
    document = check_delegation(row, {**header, "created": now}, person_of(vault.roster, header["owner"]) or {"sign": ""})
    if entry["delegation"] != row["seq"] and document["base"] != hash_of("header", header):
        raise RefusedError(f"the delegation for {key} was given with another version", hint)
    people = {header["owner"], *(member for group in header["policy"]["all"] for member in group["members"])}
    if gone := people - {fingerprint(person) for person in active(vault.roster)}:
        names = [str((person_of(vault.roster, member) or {"name": "?"})["name"]) for member in sorted(gone)]
        raise DeniedError(f"{key} belongs to or is shared with {', '.join(names)}, who was removed", hint)
    keys = Keys(vault.machine.unwrap(bytes(row["private"]), statement("delegation-key", document)))
    fields = {name: field for name, field in header.items() if name not in ("suite", "commitment")}
    made = seal(keys, {**fields, "version": header["version"] + 1, "created": now}, value, vault.roster, row)
    text = canonical(made["header"]).decode()
    check_seal(text, sha256(made["sealed"]), made["signature"], vault.id, vault.roster, row)  # before it takes the old one's place
    return made


def secret_document(vault: Vault, entry: Row) -> Row:
    """A version of a secret without its value."""
    try:
        header = vault.checked(vault.store, entry)
        verified = not (vault.seen.odd_version(header) or vault.seen.ahead_of(header["key"], vault.store.one(NEWEST_VERSION, key=header["key"])))
    except RefusedError:
        header, verified = fitting(stored_object(entry["header"])), False
    owner = (
        "machine"
        if header.get("owner") == fingerprint(vault.roster["machine"])
        else (person_of(vault.roster, str(header.get("owner"))) or {"name": None})["name"]
    )
    return {
        "secret_key": entry["secret_key"], "version": entry["version"], "secret_type": header.get("type"), "service": header.get("service"),
        "username": header.get("username"), "risk_level": header.get("risk"), "action_risks": header.get("action_risks"), "owner": owner,
        "policy": policy_text(header["policy"]) if not odd_policy(header.get("policy")) else None, "same_person": header.get("same_person"),
        "allow_standing": header.get("allow_standing"), "verified": verified if entry["sealed"] is not None else None,
        "rotate_reason": entry["rotate_reason"], "rotate_at": format_instant(entry["rotate_at"]), "rotate_task": entry["rotate_task"],
        "delegated": entry["delegation"] is not None, "rotate_every_ms": header.get("rotate_every"), "rotate_with": header.get("rotate_with"),
        "created_at": format_instant(entry["created_at"]), "expires_at": format_instant(header.get("expires")),
        "removed_at": format_instant(entry["removed_at"]),
    }  # fmt: skip


# =====================================================================================================================
# consent
# One request to use one secret for one action, and what becomes of it. Approvers sign the request as its requester wrote
# it, and wrap their parts of the data key to the key that it names. Whoever opens checks all of it again, claims the use
# in the same transaction, and only then decrypts. What the program alone enforces is here too: limits, clocks, roles.

GET_CONSENT = "SELECT * FROM secret_consent_records WHERE consent_id = :id"
GRANTS_OF = "SELECT * FROM consent_grants WHERE consent_id = :id ORDER BY seq"
ALL_GRANTS = "SELECT * FROM consent_grants ORDER BY seq"
PENDING = "SELECT * FROM secret_consent_records WHERE consent_status = 'pending' ORDER BY seq"
OPEN_CONSENTS_OF = "SELECT * FROM secret_consent_records WHERE secret_key = :key AND consent_status IN ('pending', 'approved') ORDER BY seq"
CONSENTS_OVER = """SELECT * FROM secret_consent_records
  WHERE consent_status IN ('pending', 'approved') AND COALESCE(grant_expires_at, expires_at) <= :now"""
NEXT_CONSENT_END = """SELECT COALESCE(grant_expires_at, expires_at) AS at FROM secret_consent_records
  WHERE consent_status IN ('pending', 'approved') ORDER BY COALESCE(grant_expires_at, expires_at) LIMIT 1"""
LAST_ANSWERS = """SELECT consent_status, denied_at FROM secret_consent_records WHERE requester = :requester
  AND (denied_at IS NOT NULL OR (approved_at IS NOT NULL AND approval_method = 'approver')) ORDER BY seq DESC LIMIT 3"""
PUT_CONSENT = """INSERT INTO secret_consent_records (consent_id, secret_key, secret_version, consent_status, mode, request, requester, pid,
    pid_started, boot_id, ephemeral, task_id, standing_id, max_uses, requested_at, expires_at, observed)
  VALUES (:consent_id, :key, :version, 'pending', :mode, :request, :requester, :pid, :started, :boot, :ephemeral, :task_id, :standing_id, :max_uses, :now,
    :expires_at, '[]')"""
APPROVE = """UPDATE secret_consent_records SET consent_status = 'approved', approved_at = :now, grant_expires_at = :until,
    approval_method = :method WHERE consent_id = :id AND consent_status = 'pending'"""
CLAIM_USE = """UPDATE secret_consent_records SET consent_status = 'used', used_count = used_count + 1, used_at = :now, ephemeral = NULL
  WHERE consent_id = :id AND consent_status = 'approved' AND used_count < max_uses"""
USE_STANDING = """UPDATE secret_consent_records SET used_count = used_count + 1, used_at = :now,
    consent_status = CASE WHEN used_count + 1 = max_uses THEN 'used' ELSE consent_status END
  WHERE consent_id = :id AND mode = 'standing' AND consent_status = 'approved' AND (max_uses IS NULL OR used_count < max_uses)"""
STANDING_OF = """SELECT * FROM secret_consent_records WHERE secret_key = :key AND mode = 'standing' AND consent_status = 'approved'
  AND grant_expires_at IS NOT NULL ORDER BY seq"""
UNDER_STANDING = """SELECT * FROM secret_consent_records WHERE standing_id = :id AND consent_status = 'approved' ORDER BY seq"""
OPEN_CONSENTS = "SELECT * FROM secret_consent_records WHERE consent_status IN ('pending', 'approved') ORDER BY seq"
OPEN_FOR_MACHINE = """SELECT * FROM secret_consent_records WHERE mode IN ('standing', 'collect')
  AND consent_status IN ('pending', 'approved') ORDER BY seq"""
STANDING_FROM = """SELECT * FROM secret_consent_records WHERE mode = 'standing' AND consent_status = 'pending'
  AND json(request) -> 'standing' ->> 'origin' = :id ORDER BY seq LIMIT 20"""
PUT_STANDING_PART = """INSERT INTO standing_parts (consent_id, version, group_name, approver, wrap, signature)
  VALUES (:id, :version, :group, :approver, :wrap, :signature)"""
STANDING_PARTS_OF = "SELECT * FROM standing_parts WHERE consent_id = :id AND version = :version"
DROP_STANDING_PARTS = "DELETE FROM standing_parts WHERE consent_id = :id"
EXPIRE = """UPDATE secret_consent_records SET consent_status = 'expired', expired_reason = :reason, ephemeral = NULL
  WHERE consent_id = :id AND consent_status IN ('pending', 'approved')"""
DENY = """UPDATE secret_consent_records SET consent_status = 'denied', denied_at = :now, denial_reason = :reason, ephemeral = NULL
  WHERE consent_id = :id AND consent_status = 'pending'"""
REVOKE = """UPDATE secret_consent_records SET consent_status = 'revoked', revoked_at = :now, revocation_reason = :reason, ephemeral = NULL
  WHERE consent_id = :id AND consent_status IN ('pending', 'approved')"""
OBSERVE = "UPDATE secret_consent_records SET observed = :observed WHERE consent_id = :id"
PUT_GRANT = """INSERT INTO consent_grants (consent_id, group_name, approver, document, wrap, wrap_hash, signature, created_at)
  VALUES (:id, :group, :approver, :document, :wrap, :wrap_hash, :signature, :now)"""
DROP_WRAPS = "UPDATE consent_grants SET wrap = NULL WHERE consent_id = :id AND wrap IS NOT NULL"
EARLIER = """SELECT consent_status AS status, COUNT(*) AS n FROM secret_consent_records
  WHERE secret_key = :key AND json(request) -> 'claimed' ->> 'by' = :by AND consent_id <> :id GROUP BY consent_status"""
USED_VERSION = "SELECT 1 FROM secret_consent_records WHERE secret_key = :key AND secret_version = :version AND used_count > 0 LIMIT 1"
MAX_PENDING, MAX_PENDING_EACH, DENIALS = 20, 5, 3
PENDING_OF_EACH = "SELECT requester, COUNT(*) AS n FROM secret_consent_records WHERE consent_status = 'pending' GROUP BY requester"
CONSENTS_OF_TASK = """SELECT consent_id, secret_key, consent_status, mode, standing_id, grant_expires_at, expired_reason, denial_reason, revocation_reason,
    request, json(request) -> 'claimed' ->> 'action' AS action
  FROM secret_consent_records WHERE task_id = :id AND mode = 'collect' ORDER BY seq"""
TASK_WAITS = "SELECT 1 AS waits FROM htm_tasks WHERE task_id = :id AND status = 'blocked' AND reason = 'waiting_consent'"
SECRET_CHANGED, MACHINE_CHANGED, RULES_CHANGED = "the secret was changed", "this machine has a new key", "the rules were changed"
SIGNER_GONE = ", who signed it, was removed"  # behind a name
LONGEST_GRANT = DAY  # whatever a request asks for
LONGEST_STANDING = 366 * DAY
CONSENT_ID = rf"consent_[{ID_ALPHABET}]{{18}}"
SHORTEST_PREFIX = 3  # of what a template names with a star
REQUEST_SHAPE: Fields = {
    "format": TEXT, "vault_id": TEXT, "consent_id": TEXT, "key": TEXT, "version": NUMBER, "header": TEXT, "sealed": TEXT, "mode": TEXT,
    "ephemeral": (dict, type(None)), "claimed": (dict,), "reported": (dict,), "risk": TEXT, "user": MAYBE_TEXT, "created": NUMBER, "answer_by": NUMBER,
    "grant_for": NUMBER, "together": (list,), "nonce": TEXT, "requires": (dict,),
}  # fmt: skip
STANDING_SHAPE: Fields = {**REQUEST_SHAPE, "standing": (dict,)}
TERMS_SHAPE: Fields = {"uses": MAYBE_NUMBER, "action": TEXT, "by": TEXT, "follow": (bool,), "template": MAYBE_TEXT, "origin": MAYBE_TEXT,
                       "until": MAYBE_NUMBER}  # fmt: skip
CLAIMED_SHAPE: Fields = {"by": TEXT, "for": TEXT, "action": TEXT, "user": MAYBE_TEXT, "context": TEXT}
REPORTED_SHAPE: Fields = {"pid": NUMBER, "started": MAYBE_NUMBER, "boot": TEXT, "uid": NUMBER, "program": TEXT, "exe": MAYBE_TEXT, "argv": TEXT, "cwd": TEXT,
                          "task": MAYBE_TEXT}  # fmt: skip
PUBLIC_SHAPE: Fields = {"hpke": TEXT, "sign": TEXT}
GRANT_SHAPE: Fields = {
    "format": TEXT, "request": TEXT, "group": TEXT, "approver": TEXT, "index": NUMBER, "mode": TEXT, "expires": NUMBER, "max_uses": NUMBER, "leaf": TEXT,
    "size": NUMBER, "head": TEXT, "nonce": TEXT,
}  # fmt: skip
CASE_SHAPE: Fields = {
    "format": TEXT, "consent_id": TEXT, "request": TEXT, "header": TEXT, "sealed": TEXT, "seal": TEXT, "delegation": (dict, type(None)),
    "before": (list,), "leaf": TEXT, "rosters": (list,), "rules": (list,), "shares": (list,), "grants": (list,), "earlier": (dict,),
}  # fmt: skip
CASE_PARTS: dict[str, Fields] = {
    "before": {"header": TEXT, "sealed": TEXT, "seal": TEXT, "delegation": (dict, type(None))},
    "rosters": {"number": NUMBER, "document": TEXT, "signature": TEXT}, "rules": {"number": NUMBER, "document": TEXT, "signature": TEXT},
    "shares": {"group": TEXT, "member": TEXT, "index": NUMBER, "wrap": TEXT},
    "grants": {"document": TEXT, "signature": TEXT, "wrap_hash": MAYBE_TEXT},
}  # fmt: skip
RULES_CARRIED, RULES_CARRIED_BYTES = 50, MAX_RULES_BYTES  # to an approver elsewhere, the newest first
EXPORT_ANEW = "export it anew: grace consent export ID"
SIGNED_SHAPE: Fields = {"document": TEXT, "wrap": MAYBE_TEXT, "signature": TEXT}


class NoRoomError(DeniedError):
    """As many requests wait for an answer as may."""


class NeedlessError(ConflictError):
    """A task does not wait for this any more, or somebody has asked for it already."""


def required_groups(header: Row, request: Row) -> dict[str, int]:
    """How many of each group must sign: as the header's policy says, and what the risk and the rules ask for besides."""
    needed = {group["group"]: group["threshold"] for group in header["policy"]["all"] if group["group"] != "machine"}
    return {**dict.fromkeys(RISK_NEEDS[request["risk"]], 1), **request["requires"], **needed}


def may_sign(header: Row, request: Row, roster: Row, group: str) -> list[str]:
    """The fingerprints of those whose signature counts for a group of this request."""
    candidates = holders(header, group) or members_of(roster, group)
    here = {fingerprint(person): person["name"] for person in active(roster)}
    if group == "user" and request["user"] and required_groups(header, request)[group] == 1:
        candidates = [member for member in candidates if member == request["user"]]
    return [member for member in candidates if member in here and here[member].lower() != request["claimed"]["by"].lower()]


def request_of(text: str) -> Row:
    """A request as it was written, with the shape of one; RefusedError otherwise."""
    try:
        parsed = parse_canonical(text)
        standing = parsed.get("format") == "grace-standing/1"
        request = shaped(parsed, STANDING_SHAPE if standing else REQUEST_SHAPE, "a request")
        shaped(request["claimed"], CLAIMED_SHAPE, "a request")
        shaped(request["reported"], REPORTED_SHAPE, "a request")
        parse_json(request["claimed"]["context"])
    except ValueError as error:
        raise RefusedError(f"a request {error}") from None
    if standing and odd_terms(shaped(request["standing"], TERMS_SHAPE, "a request"), request["claimed"]):
        raise RefusedError("a standing request has odd terms")
    if not re.fullmatch(CONSENT_ID, request["consent_id"]):
        raise RefusedError("a request has an odd id")
    if request["risk"] not in RISK_LEVELS or (request["ephemeral"] is None) != (request["risk"] == "low"):
        raise RefusedError("a request has no known risk, or no key to answer to")
    if not set(request["requires"]) <= set(ROLES) or any(type(n) is not int or n != 1 for n in request["requires"].values()) \
            or (request["requires"] and request["risk"] == "low"):  # fmt: skip
        raise RefusedError("a request asks for odd signatures")
    if request["ephemeral"] is not None:
        shaped(request["ephemeral"], PUBLIC_SHAPE, "a request")
    return request


def odd_terms(terms: Row, claimed: Row) -> bool:
    """Whether a standing request asks for more than any may: free words, short beginnings, or a template without limits."""
    kinds, template = {terms["action"], terms["by"]}, terms["template"] is not None
    short = any(len(claimed[name]) < (SHORTEST_PREFIX if terms[name] == "prefix" else 1) for name in ("action", "by"))
    endless = terms["uses"] is not None and terms["uses"] < 1
    loose = (terms["uses"] is None or terms["follow"]) if template else "prefix" in kinds
    return not kinds <= {"exact", "prefix"} or short or endless or loose or not NAME.fullmatch(claimed["action"])


NO_REQUEST: Row = {"claimed": {"by": "?", "for": "?", "action": "?", "user": None, "context": "{}"}, "reported": {}, "risk": "critical", "user": None,
                   "requires": {}}  # fmt: skip


def listed_request(row: Row) -> Row:
    """The request of a row for a listing: what is none any more is shown as unknown and stops no list."""
    try:
        return request_of(row["request"])
    except RefusedError:
        return NO_REQUEST


def grant_of(text: str) -> Row:
    try:
        return shaped(parse_canonical(text), GRANT_SHAPE, "a grant")
    except ValueError as error:
        raise RefusedError(f"a grant {error}") from None


def filed_request(reader: Reader, row: Row, header: Row, sealed_hash: str, vault_id: str) -> Row:
    """The request of a consent's row: it fits the row, the header and the log; RefusedError otherwise."""
    request = checked_request(row["request"], header, sealed_hash, vault_id)
    reported = request["reported"]
    names = ("consent_id", "secret_key", "secret_version", "mode", "max_uses", "pid", "pid_started", "boot_id", "task_id")
    columns = tuple(row[name] for name in names)
    told = (reported.get(name) for name in ("pid", "started", "boot", "task"))
    said = (request["consent_id"], request["key"], request["version"], request["mode"], uses_of(request) or None, *told)
    if columns != said:
        raise RefusedError("the row of the request says something else than the request")
    check_story(reader, row, request)
    return request


def uses_of(request: Row) -> int:
    """How often it may be used; 0: as often as it comes, while it lasts."""
    return (request["standing"]["uses"] or 0) if request["mode"] == "standing" else 1


def lasts(request: Row) -> int:
    """For how long an approval holds, in milliseconds."""
    return min(int(request["grant_for"]), LONGEST_STANDING if request["mode"] == "standing" else LONGEST_GRANT)


def ends(request: Row, now: int) -> int:
    """Until when an approval of this instant holds."""
    until = request["standing"]["until"] if request["mode"] == "standing" else None
    return now + lasts(request) if until is None else min(now + lasts(request), int(until))


def checked_request(text: str, header: Row, sealed_hash: str, vault_id: str) -> Row:
    """A request that fits the header it names; RefusedError otherwise."""
    request = request_of(text)
    standing = request["mode"] == "standing"
    if request["format"] != ("grace-standing/1" if standing else "grace-request/1") or request["vault_id"] != vault_id:
        raise RefusedError("a request is not of this vault")
    if (request["header"], request["sealed"]) != (hash_of("header", header), sealed_hash):
        raise RefusedError(f"{header['key']} was changed after this was asked for")
    if (request["key"], request["version"]) != (header["key"], header["version"]):
        raise RefusedError("the request names another secret than its header")
    if request["risk"] != highest_risk(header["risk"], header["action_risks"].get(request["claimed"]["action"]), request["risk"]):
        raise RefusedError("the request says too low a risk")
    if request["mode"] not in ("once", "collect", "standing") or (request["risk"] == "critical" and request["mode"] != "once"):
        raise RefusedError("the mode of the request is not allowed for its risk")
    if standing and (problem := no_standing(header, request["risk"], request["standing"]["template"] is not None)):
        raise RefusedError(problem)
    return request


def no_standing(header: Row, risk: str, template: bool) -> str | None:
    """Why there is no standing consent for a use of this risk, or None."""
    if risk == "medium" or (risk == "high" and header["allow_standing"] and not template):
        return None
    if risk == "high" and not template:
        return f"{header['key']} is not sealed with --allow-standing, which a standing consent at high risk takes"
    return f"a {'template' if template else 'standing consent'} is not for {risk} risk"


def checked_grant(header: Row, request: Row, roster: Row, row: Row) -> Row:
    """The document of a grant that counts for this request; RefusedError otherwise. `row`: document, signature, wrap_hash."""
    grant = grant_of(row["document"])
    if grant["format"] != "grace-grant/1" or grant["request"] != hash_of("request", request):
        raise RefusedError("a grant belongs to another request")
    if (grant["mode"], grant["max_uses"]) != (request["mode"], uses_of(request)) or grant["group"] not in required_groups(header, request):
        raise RefusedError("a grant says something else than was asked for")
    if (row.get("group_name", grant["group"]), row.get("approver", grant["approver"])) != (grant["group"], grant["approver"]):
        raise RefusedError("a grant is filed under another group or approver")
    if grant["approver"] not in may_sign(header, request, roster, grant["group"]):
        raise RefusedError("a grant is by somebody who may not sign for this")
    members = holders(header, grant["group"])
    if grant["index"] != (members.index(grant["approver"]) + 1 if members else 0) or (not members) != (row["wrap_hash"] is None):
        raise RefusedError("a grant carries another part than its approver's")
    person = person_of(roster, grant["approver"])
    if person is None or not signed_by(person, bytes(row["signature"]), statement("grant-signature", [grant, row["wrap_hash"]])):
        raise RefusedError("the signature of a grant does not hold")
    return grant


def checked_grants(header: Row, request: Row, roster: Row, rows: list[Row]) -> list[Row]:
    """All grants of a request, each by another person within its group, and across groups unless one person may be both."""
    if request["mode"] == "standing" and request["ephemeral"] != {name: roster["machine"][name] for name in PUBLIC_SHAPE}:
        raise RefusedError("a standing request names another key than this machine's")
    grants = [checked_grant(header, request, roster, row) for row in rows]
    if len({(grant["group"], grant["approver"]) for grant in grants}) != len(grants):
        raise RefusedError("one approver signed twice for a group")
    if not header["same_person"] and len({grant["approver"] for grant in grants}) != len(grants):
        raise RefusedError("one person signed for two groups")
    return grants


def missing_groups(header: Row, request: Row, grants: list[Row]) -> list[str]:
    return [group for group, threshold in required_groups(header, request).items() if sum(g["group"] == group for g in grants) < threshold]


ENDS = {"secret.used": "used", "consent.denied": "denied", "consent.revoked": "revoked", "consent.expired": "expired"}


def check_story(reader: Reader, row: Row, request: Row) -> None:
    """The log holds this request as it was filed, no end of it, and no more uses than its row: what somebody has put back or changed is refused."""
    consent_id = row["consent_id"]
    first = next(iter(reader.all(LEAVES_OF, subject=consent_id, n=1)), None)
    filed = stored_object(first["leaf"]) if first else {}
    if first is None or odd_leaf(first, first["seq"] - 1, str(filed.get("previous"))) or filed.get("kind") != "consent.requested":
        raise RefusedError("the log does not hold the request")
    if filed["facts"].get("request") != hash_of("request", request):
        raise RefusedError("the log says that something else was asked for")
    uses = 0
    for leaf in story_after(reader, first):
        if leaf["subject"] == consent_id and leaf["kind"] in ENDS:
            raise RefusedError(f"the log says that it was {ENDS[leaf['kind']]} already")
        uses += leaf["kind"] == "secret.used" and leaf["facts"].get("standing") == consent_id
    if request["mode"] == "standing" and uses != row["used_count"]:
        raise RefusedError(f"the log says that it was used {uses} times, and its row {row['used_count']}")


def story_after(reader: Reader, row: Row) -> Iterator[Row]:
    """The leaves after this one, each shown to follow the one before it by the hash of its very bytes."""
    size, head = row["seq"], row["hash"]
    for other in all_leaves(reader, size):
        leaf = stored_object(other["leaf"])
        whole = sha256(AUDIT_LABEL + other["leaf"].encode()) == other["hash"] and other["seq"] == size + 1 and leaf.get("previous") == head
        if not whole or not {"kind", "subject", "facts"} <= set(leaf) or not isinstance(leaf["facts"], dict):
            raise RefusedError(f"the log is broken: {odd_leaf(other, size, head) or f'leaf {size + 1} has not the shape of one'}")
        size, head = other["seq"], other["hash"]
        yield leaf


# ---- rules


def rule_facts(header: Row, claimed: Row, risk: str) -> Row:
    """What the rules are asked about a request."""
    return {"secret": header["key"], "service": header["service"], "action": claimed["action"], "by": claimed["by"], "risk": risk}


def told_decision(rules: Row, header: Row, claimed: Row, risk: str, at_ms: int) -> Row:
    """What a set of rules says of a request, as events and leaves tell it, with the risk that it leads to."""
    said, leads_to = decision_with_risk(rules["rules"], rule_facts(header, claimed, risk), at_ms)
    return {"consent_id": None, "secret_key": header["key"], "action": claimed["action"], "requested_by": claimed["by"], "risk_level": leads_to, **said,
            "number": rules["number"]}  # fmt: skip


def rule_on(tx: Tx, vault: Vault, header: Row, claimed: Row, risk: str) -> Row:
    """What the rules say of a request that is about to be filed; RuledOutError when they forbid it.

    Where they do not verify nothing above low risk is filed, RefusedError; low stays open, as after anything that was rolled back."""
    try:
        rules = vault.rules(tx)
    except RefusedError:
        if risk != "low":
            raise
        rules = NO_RULES
    told = told_decision(rules, header, claimed, risk, tx.now)
    if told["effect"] == "deny":
        raise RuledOutError(told)
    return told


def put_decision(tx: Tx, request: Row, told: Row) -> None:
    """Record what a rule has decided of a request that was filed; where none matched there is nothing to record."""
    if told["effect"] != "default":
        record_decision(tx, request["consent_id"], {**told, "consent_id": request["consent_id"]})


def ruled_out(rules: Row, header: Row, request: Row, at_ms: int, standing: Row | None = None) -> str | None:
    """Why the rules stop a request that was filed, or None: they forbid it, or want signatures that it (or the standing one behind it) does not ask for."""
    told = told_decision(rules, header, request["claimed"], request["risk"], at_ms)
    if told["effect"] == "deny":
        return f"the rule {told['rule']} forbids this use of {header['key']}"
    for asked in (request, standing or request):
        if missing := set(told["requires"]) - set(required_groups(header, asked)):
            return f"the rules were changed after this was asked for, or their hours began: {' and '.join(sorted(missing))} would have to sign, too"
    return None


# ---- asking


def reported_facts(task_id: str | None) -> Row:
    """What this process says of itself and of the program that called it."""
    parent = os.getppid()
    try:
        cwd = os.getcwd()
    except OSError:
        cwd = ""
    return {"pid": os.getpid(), "started": start_ticks(os.getpid()), "boot": boot_id(), "uid": os.geteuid(), "program": program_name(parent),
            "exe": program_hash(parent), "argv": sha256(repr(sys.argv).encode()), "cwd": os.fsencode(cwd).decode(errors="replace"),
            "task": task_id}  # fmt: skip


def choose_user(roster: Row, header: Row, wanted: str | None, login: str) -> str | None:
    """The fingerprint of the one who signs for `user`: as named, else the login user, else anybody of the group."""
    members = holders(header, "user") or members_of(roster, "user")
    if wanted is not None:
        person = person_named(roster, wanted)
        if person is None or fingerprint(person) not in members:
            names = [p["name"] for p in active(roster) if fingerprint(p) in members]
            raise NotFoundError(f"{wanted!r} is not an approver who may answer for {header['key']}", f"there is {', '.join(names) or 'nobody'}")
        return fingerprint(person)
    person = person_named(roster, login)
    return fingerprint(person) if person and fingerprint(person) in members else None


def asked_at_once(specs: Iterable[Row]) -> list[list[str]]:
    """What a request says of the others that are made with it: [key, action] of each, so that nobody else can join them."""
    named = sorted({(spec["key"], spec["action"]) for spec in specs})
    return [list(one) for one in named] if len(named) > 1 else []


class Asking:
    """One request of this process: its consent's id, and the private key that its grants will be wrapped to."""

    def __init__(self, vault: Vault, spec: Row):
        """File the request; low risk is approved, and unless it is for a task, used at once. UsageError, NotFoundError, DeniedError."""
        self.vault, self.spec = vault, spec
        self.for_task = spec["mode"] == "collect" and spec["reported"]["task"] is not None  # a daemon's, which starts the task later
        vault.store.write(expire_consents)
        self.entry, self.header = vault.current(vault.store, spec["key"])
        if spec.get("service") and spec["service"] != self.header["service"]:
            raise NotFoundError(f"{spec['key']} belongs to the service {self.header['service'] or '-'}, not to {spec['service']}")
        self.risk = "critical"  # until the rules were asked
        self.keys: Keys | None = None
        if self.header["expires"] is not None and clock() >= self.header["expires"]:
            raise DeniedError(f"{spec['key']} has expired", f"store a new value: grace secret rotate {spec['key']}")
        self.consent_id = ""
        self.request: Row = {}
        self.answered = False
        self.opened: bytes | None = None
        vault.store.write(self._file)
        vault.learn_head(self.header)
        if self.risk == "low" and not self.for_task:
            shares = own_shares(vault.machine, self.entry, self.header, vault.store.all(SHARES_OF, key=spec["key"], version=self.header["version"]))
            self.opened = open_value(self.header, bytes(self.entry["sealed"]), shares)

    def _decide(self, tx: Tx, claimed: Row) -> Row:
        """What the rules say, and with it the risk, which says how this request is filed."""
        spec, header = self.spec, self.header
        told = rule_on(tx, self.vault, header, claimed, highest_risk(header["risk"], header["action_risks"].get(spec["action"]), spec["risk"]))
        self.risk = told["risk_level"]
        if self.risk != "low" and self.vault.rolled_back(tx):
            raise RefusedError("rolled back: the audit log is not the one that this machine has seen")
        if self.risk == "low" and spec["hidden"]:
            raise UsageError("a value inside --json is only shown with --reveal")
        if self.risk == "critical" and spec["mode"] != "once":
            raise UsageError("a critical use needs a process that waits for it", "leave --no-wait out")
        self.keys = Keys.new() if self.risk != "low" else None
        self.answered = self.risk == "low"  # nobody has to be asked
        return told

    def _file(self, tx: Tx) -> None:
        spec, header, reported = self.spec, self.header, self.spec["reported"]
        entry = tx.one(NEWEST_VERSION, key=spec["key"])
        if entry is None or entry["version"] != header["version"] or entry["sealed"] != self.entry["sealed"]:
            raise ConflictError(f"{spec['key']} was changed meanwhile", "try again")
        if self.for_task:
            refuse_needless(tx, reported["task"], header["key"], spec["action"])
        self.consent_id = new_id("consent", tx.now)
        claimed = {"by": spec["by"], "for": spec["purpose"], "action": spec["action"], "user": spec["user"], "context": spec["context"]}
        told = self._decide(tx, claimed)
        self.request = {
            "format": "grace-request/1", "vault_id": self.vault.id, "consent_id": self.consent_id, "key": header["key"], "version": header["version"],
            "header": hash_of("header", header), "sealed": sha256(bytes(entry["sealed"])), "mode": spec["mode"],
            "ephemeral": self.keys.public if self.keys else None, "claimed": claimed, "reported": reported, "risk": self.risk,
            "user": choose_user(self.vault.roster, header, spec["user"], spec["login"]), "created": tx.now, "answer_by": tx.now + spec["timeout_ms"],
            "grant_for": setting(tx, "consent.grant_for"), "together": spec.get("together", []), "nonce": os.urandom(16).hex(), "requires": told["requires"],
        }  # fmt: skip
        standing = standing_for(tx, self.vault, self.request) if self.risk != "low" else None
        if self.risk != "low" and standing is None:
            refuse_floods(tx, requester_of(self.request))
        put_request(tx, self.request, header, self._kept_key(), standing)
        put_decision(tx, self.request, told)
        if self.risk == "low":
            approve_low(tx, self.consent_id, self.request, self.for_task)
        elif standing is not None:
            self.answered = True
            approve_by_standing(tx, self.request, standing)

    def _kept_key(self) -> bytes | None:
        """For a request that nobody waits for: the private key, wrapped to this machine and bound to the request."""
        if self.spec["mode"] != "collect" or self.keys is None:
            return None
        return wrap_to(self.vault.machine.public, self.keys.private, statement("ephemeral", hash_of("request", self.request)))

    def value(self) -> bytes:
        """The secret's value, once: after approval. DeniedError, ConflictError, WaitTimeoutError."""
        if self.opened is not None:
            value, self.opened = self.opened, None
            return value
        assert self.keys is not None
        return redeem(self.vault, self.consent_id, self.keys, canonical(self.request).decode())


def requester_of(request: Row) -> str:
    """User id and program, or for a daemon's task its handler, by which floods are counted."""
    reported = request["reported"]
    if request.get("mode") == "collect" and reported["task"]:
        return task_requester(request["claimed"]["by"])
    return f"{reported['uid']}:{reported['exe'] or reported['program']}"


def put_request(tx: Tx, request: Row, header: Row, kept_key: bytes | None, standing: Row | None = None) -> None:
    """Write a request with its leaf and its event. `standing` is the consent that is going to approve it."""
    reported = request["reported"]
    tx.run(PUT_CONSENT, consent_id=request["consent_id"], key=request["key"], version=request["version"], mode=request["mode"],
           request=canonical(request).decode(), requester=requester_of(request), pid=reported["pid"], started=reported["started"], boot=reported["boot"],
           ephemeral=kept_key, task_id=reported["task"], standing_id=standing["consent_id"] if standing else None, max_uses=uses_of(request) or None,
           now=tx.now, expires_at=request["answer_by"])  # fmt: skip
    record(tx, "consent.requested", request["consent_id"], {"key": request["key"], "version": request["version"], "risk": request["risk"],
                                                            "mode": request["mode"], "action": request["claimed"]["action"],
                                                            "request": hash_of("request", request)})  # fmt: skip
    emit(tx, "secrets.consent.request", request["consent_id"], request_event(request, header))


def fits(request: Row, name: str, text: str) -> bool:
    """Whether an action or a requester is the one that a request names, or begins as its terms allow."""
    known = str(request["claimed"][name])
    return text.startswith(known) if request.get("standing", {}).get(name) == "prefix" else text == known


def covers(standing: Row, request: Row) -> bool:
    """Whether a standing request, once approved, speaks for this one: the same secret, user and user id, an action and a requester that fit."""
    asked = request["claimed"]
    same = (standing["key"], standing["user"], standing["reported"].get("uid")) == (request["key"], request["user"], request["reported"].get("uid"))
    same = same and {*request["requires"]} <= {*standing["requires"], *RISK_NEEDS[standing["risk"]]}
    alike = fits(standing, "action", asked["action"]) and fits(standing, "by", asked["by"])
    return same and alike and RISK_LEVELS.index(request["risk"]) <= RISK_LEVELS.index(standing["risk"])


def asks_himself(tx: Tx, vault: Vault, row: Row, request: Row) -> bool:
    """Whether a request is made in the name of one who has signed the standing consent: nobody approves his own."""
    signers = (person_of(vault.roster, grant["approver"]) for grant in tx.all(GRANTS_OF, id=row["consent_id"]))
    return any(person is not None and person["name"].lower() == request["claimed"]["by"].lower() for person in signers)


def standing_for(tx: Tx, vault: Vault, request: Row) -> Row | None:
    """The approved standing consent that covers a request and still lasts; the one that ends first, when there are several."""
    rows = [row for row in tx.all(STANDING_OF, key=request["key"]) if tx.now < row["grant_expires_at"]]
    for row in sorted(rows, key=lambda row: int(row["grant_expires_at"])):
        with contextlib.suppress(RefusedError):
            if covers(request_of(row["request"]), request) and not asks_himself(tx, vault, row, request):
                return row
    return None


def end_signed(tx: Tx, approver: str, reason: str) -> None:
    """End what is open and an approver has signed, or was to sign, whose signature counts no more."""
    for row in tx.all(OPEN_CONSENTS):
        signed = any(grant["approver"] == approver for grant in tx.all(GRANTS_OF, id=row["consent_id"]))
        if signed or listed_request(row)["user"] == approver:
            close_consent(tx, row, REVOKE, "revoked", reason, now=tx.now)


def end_ruled_out(tx: Tx, rules: Row) -> None:
    """End what is open and a changed set of rules would not let through as it was asked for; it can be asked for anew."""
    for row in tx.all(OPEN_CONSENTS):
        entry = tx.one(GET_VERSION, key=row["secret_key"], version=row["secret_version"])
        with contextlib.suppress(RefusedError, KeyError):
            header, request = parse_header(entry), request_of(row["request"])
            if row["mode"] != "standing" and ruled_out(rules, header, request, tx.now):
                close_consent(tx, row, REVOKE, "revoked", RULES_CHANGED, now=tx.now)


def parse_header(entry: Row | None) -> Row:
    """The header of a row, with the shape of one, its seal not looked at; RefusedError."""
    return shaped(stored_object(entry["header"]) if entry else {}, HEADER_SHAPE, "a header")


def approve_by_standing(tx: Tx, request: Row, standing: Row) -> None:
    """What a standing consent covers is approved in the transaction that asks; it is looked at again, whole, when it is used."""
    method = "template" if request_of(standing["request"])["standing"]["template"] else "standing"
    until = min(tx.now + lasts(request), standing["grant_expires_at"])
    tx.run(APPROVE, id=request["consent_id"], now=tx.now, until=until, method=method)
    emit(tx, "secrets.consent.approved", request["consent_id"], {"consent_id": request["consent_id"], "secret_key": request["key"],
                                                                 "approval_method": method, "standing_id": standing["consent_id"]})  # fmt: skip
    record(tx, "consent.approved", request["consent_id"], {"key": request["key"], "method": method, "standing": standing["consent_id"]})


def file_standing(tx: Tx, vault: Vault, spec: Row) -> Row:
    """File a request for a standing consent; its row. It names this machine's key, which will open the secret while it lasts.

    `spec`: key, claimed, reported, risk, user, timeout_ms, grant_for (ms), the terms, and `limited` where a requester files it
    himself. UsageError where there can be none."""
    if vault.rolled_back(tx):
        raise RefusedError("rolled back: the audit log is not the one that this machine has seen")
    entry, header = vault.current(tx, spec["key"])
    told = rule_on(tx, vault, header, spec["claimed"], highest_risk(header["risk"], header["action_risks"].get(spec["claimed"]["action"]), spec["risk"]))
    risk = told["risk_level"]
    if problem := no_standing(header, risk, spec["terms"]["template"] is not None):
        raise UsageError(problem)
    if spec.get("limited"):
        refuse_floods(tx, requester_of(spec))
    request = {
        "format": "grace-standing/1", "vault_id": vault.id, "consent_id": new_id("consent", tx.now), "key": header["key"], "version": header["version"],
        "header": hash_of("header", header), "sealed": entry["sealed_hash"], "mode": "standing", "ephemeral": vault.machine.public,
        "claimed": spec["claimed"], "reported": spec["reported"], "risk": risk, "user": spec["user"], "created": tx.now,
        "answer_by": tx.now + spec["timeout_ms"], "grant_for": min(spec["grant_for"], LONGEST_STANDING), "together": [], "nonce": os.urandom(16).hex(),
        "requires": told["requires"], "standing": spec["terms"],
    }  # fmt: skip
    put_request(tx, request, header, None)
    put_decision(tx, request, told)
    return get_consent(tx, request["consent_id"])


def waiting_line(asking: Asking) -> str:
    """For the requester's side: what to compare, and how to answer."""
    code = code_of(hash_of("request", asking.request))
    return f"grace: waiting for consent, code {code}; to answer: grace consent approve {asking.consent_id}"


def refuse_floods(tx: Tx, requester: str) -> None:
    pending = tx.all(PENDING)
    if len(pending) >= MAX_PENDING:
        raise NoRoomError(f"{MAX_PENDING} requests are waiting for an answer", "answer or withdraw some: grace consent pending")
    if sum(row["requester"] == requester for row in pending) >= MAX_PENDING_EACH:
        raise NoRoomError(f"{MAX_PENDING_EACH} requests of this program are waiting for an answer", "answer or withdraw some: grace consent pending")
    answers = tx.all(LAST_ANSWERS, requester=requester)
    pause = setting(tx, "consent.pause")
    if len(answers) == DENIALS and all(row["consent_status"] == "denied" for row in answers) and tx.now < answers[0]["denied_at"] + pause:
        raise DeniedError(f"this program was denied {DENIALS} times in a row and has to pause until {format_instant(answers[0]['denied_at'] + pause)}")


def task_requester(by: str) -> str:
    """By what the requests of a handler's tasks are counted."""
    return f"{os.geteuid()}:{by}"


def undecided(reason: str | None) -> bool:
    """Whether a consent was ended by something that happened, and by no person's no: it may be asked for again."""
    return reason is not None and (reason in (SECRET_CHANGED, MACHINE_CHANGED, RULES_CHANGED) or reason.endswith(SIGNER_GONE))


def wishes_of(secrets: list[list[str]]) -> list[tuple[str, str]]:
    """Key and action of each secret of a handler, once."""
    return list(dict.fromkeys((key, action) for _, key, action in secrets))


def wish_state(consents: list[Row], key: str, action: str, now: int) -> tuple[str, Row | None]:
    """What has become of one secret that a task needs: ready, waiting, missing or refused; and the newest consent for it."""
    row = next((row for row in reversed(consents) if (row["secret_key"], row["action"]) == (key, action)), None)
    over = row is not None and (row["consent_status"] == "used" or row["expired_reason"] == "grant_ended")
    if row is None or over or undecided(row["revocation_reason"]):
        return "missing", row
    if row["consent_status"] == "approved" and now < (row["grant_expires_at"] or 0):
        return "ready", row
    return ("waiting" if row["consent_status"] in ("pending", "approved") else "refused"), row


def refuse_needless(tx: Tx, task_id: str, key: str, action: str) -> None:
    """Whoever is second to ask for a task, or asks for one that goes on or has ended, asks nobody."""
    if not tx.one(TASK_WAITS, id=task_id) or wish_state(tx.all(CONSENTS_OF_TASK, id=task_id), key, action, tx.now)[0] != "missing":
        raise NeedlessError(f"{task_id} does not need to ask for {key} any more")


def asks_nobody(reader: Reader, key: str, action: str) -> bool:
    """Whether a use seems to be of low risk: a guess from what is not verified, which only saves a look."""
    header = stored_object((reader.one(NEWEST_VERSION, key=key) or {"header": "{}"})["header"])
    risks, rules = header.get("action_risks"), reader.one(RULE_SETS_NEWEST, n=1)
    if rules is not None and '"effect":"require"' in rules["document"]:
        return False  # a rule may raise it
    return header.get("risk") == "low" and (risks.get(action) if isinstance(risks, dict) else None) in (None, "low")


def seems_granted(reader: Reader, by: str, key: str, action: str, uses: int, now: int) -> bool:
    """Whether nobody would be asked for so many uses by one requester: low risk, or a standing consent for them. A guess as above, for forecasts."""
    rules = reader.one(RULE_SETS_NEWEST, n=1)
    if rules is not None and ('"effect":"require"' in rules["document"] or '"effect":"deny"' in rules["document"]):
        return False
    if asks_nobody(reader, key, action):
        return True
    rows = [row for row in reader.all(STANDING_OF, key=key) if now < row["grant_expires_at"] and uses <= (row["max_uses"] or MAX_INSTANT) - row["used_count"]]
    return any(fits(request, "action", action) and fits(request, "by", by) for request in map(listed_request, rows))


def open_consents_of(reader: Reader, task_id: str) -> list[str]:
    """The ids of the requests of a task that wait for an answer or for the others."""
    return [row["consent_id"] for row in reader.all(CONSENTS_OF_TASK, id=task_id) if row["consent_status"] in ("pending", "approved")]


def withdraw_for_task(tx: Tx, task_id: str, statuses: tuple[str, ...] = ("pending", "approved")) -> None:
    """Void what was asked for a task and is not needed any more; when it has ended, also what was approved and not used."""
    rows = [row for row in tx.all(CONSENTS_OF_TASK, id=task_id) if row["consent_status"] in statuses]
    if rows:
        tx.run("PRAGMA secure_delete = ON")
        tx.run(SET_SETTING, name="_shred_due", value="1", now=tx.now)
    for row in rows:
        close_consent(tx, row, REVOKE, "revoked", "withdrawn", now=tx.now)


def request_event(request: Row, header: Row) -> Row:
    claimed = request["claimed"]
    service = header["service"] or header["key"]
    return {"consent_id": request["consent_id"], "secret_key": header["key"], "secret_type": header["type"], "service": header["service"],
            "requested_by": claimed["by"], "requested_for": claimed["for"], "requested_action": claimed["action"], "user_id": claimed["user"],
            "risk_level": request["risk"], "context": json.loads(claimed["context"]), "code": code_of(hash_of("request", request)),
            "expires_in_seconds": (request["answer_by"] - request["created"]) // 1000,
            "prompt_message": f"Grace wants to use your {service} credentials to {claimed['for']}. Allow?"}  # fmt: skip


def approve_low(tx: Tx, consent_id: str, request: Row, later: bool) -> None:
    """Low risk: approved by the machine in the transaction that asks, and used there too unless that is to come `later`."""
    tx.run(APPROVE, id=consent_id, now=tx.now, until=tx.now + request["grant_for"], method="auto")
    emit(tx, "secrets.consent.approved", consent_id, {"consent_id": consent_id, "secret_key": request["key"], "approval_method": "auto"})
    record(tx, "consent.approved", consent_id, {"key": request["key"], "method": "auto"})
    if not later:
        spend(tx, consent_id, request)


def spend(tx: Tx, consent_id: str, request: Row, standing_id: str | None = None) -> None:
    """Claim the use, and that of the standing consent behind it; whoever comes second is refused."""
    if tx.run(CLAIM_USE, id=consent_id, now=tx.now) != 1:
        raise ConflictError(f"{consent_id} has been used already", "ask again")
    if standing_id is not None and tx.run(USE_STANDING, id=standing_id, now=tx.now) != 1:
        raise ConflictError(f"the uses of {standing_id} are spent", "ask again")
    if tx.run(DROP_WRAPS, id=consent_id):
        to_shred(tx)
    if standing_id is not None and get_consent(tx, standing_id)["consent_status"] == "used":
        drop_standing(tx, standing_id)
        for row in tx.all(UNDER_STANDING, id=standing_id):  # approved by it, and too late
            close_consent(tx, row, EXPIRE, "expired", "grant_ended")
    emit(tx, "secrets.consent.used", consent_id, {"consent_id": consent_id, "secret_key": request["key"], "version": request["version"],
                                                  "requested_by": request["claimed"]["by"], "requested_action": request["claimed"]["action"],
                                                  "standing_id": standing_id})  # fmt: skip
    record(tx, "secret.used", consent_id, {"key": request["key"], "version": request["version"], "action": request["claimed"]["action"],
                                           **({"standing": standing_id} if standing_id else {})})  # fmt: skip


def drop_standing(tx: Tx, consent_id: str) -> None:
    """What the machine's key could open for a standing consent goes."""
    if tx.run(DROP_WRAPS, id=consent_id) + tx.run(DROP_STANDING_PARTS, id=consent_id):
        to_shred(tx)


# ---- answering


def get_consent(reader: Reader, consent_id: str) -> Row:
    """A consent by its id or an unambiguous beginning of it."""
    row = reader.one(GET_CONSENT, id=consent_id)
    if row is None:
        rows = reader.all("SELECT * FROM secret_consent_records WHERE consent_id >= :id AND consent_id < :end ORDER BY consent_id LIMIT 6",
                          id=consent_id, end=consent_id + "\U0010ffff")  # fmt: skip
        if len(rows) > 1:
            raise UsageError(f"{consent_id!r} is the beginning of several ids", ", ".join(row["consent_id"] for row in rows))
        if not rows:
            raise NotFoundError(f"there is no consent {consent_id!r}", "see them with: grace consent history")
        row = rows[0]
    return row


def still_pending(row: Row, now: int) -> Row:
    """The row itself when it can still be answered; ConflictError otherwise."""
    if row["consent_status"] != "pending":
        raise ConflictError(f"{row['consent_id']} is {row['consent_status']} already")
    if now >= row["expires_at"]:
        raise ConflictError(f"{row['consent_id']} has expired unanswered")
    if not asker_lives(row):
        raise ConflictError(f"the process that asked for {row['consent_id']} has ended, and the request with it")
    return row


def asker_lives(row: Row) -> bool:
    """Whether a request that dies with its process still has one; a collected one needs none."""
    if row["mode"] != "once" or row["pid_started"] is None:
        return True
    return bool(row["boot_id"] == boot_id() and lives(row["pid"], row["pid_started"]))


def build_case(tx: Tx, consent_id: str, who: str, member: str | None = None, seen: Seen | None = None) -> Row:
    """All that an approver needs, here or elsewhere, to judge a request and to sign; recorded before anything is signed.

    With `member`, a fingerprint, only that approver's parts; with what he has `seen`, all versions since."""
    row = still_pending(get_consent(tx, consent_id), tx.now)
    entry = tx.one(GET_VERSION, key=row["secret_key"], version=row["secret_version"])
    newest = tx.one(NEWEST_VERSION, key=row["secret_key"])
    if entry is None or entry["sealed"] is None or newest is None or newest["version"] != entry["version"]:
        raise ConflictError(f"{row['secret_key']} was changed after {row['consent_id']} was asked for")
    request = request_of(row["request"])
    check_story(tx, row, request)
    size, _ = record(tx, "consent.shown", row["consent_id"], {"key": row["secret_key"], "request": hash_of("request", request), "to": who})
    leaf, claimed = tx.value("SELECT leaf FROM audit_log WHERE seq = :seq", seq=size), request["claimed"]
    since = seen.version_of(row["secret_key"]) if seen else None
    return {
        "format": "grace-case/1", "consent_id": row["consent_id"], "request": row["request"], "header": entry["header"],
        "sealed": sha256(bytes(entry["sealed"])), "seal": b64(bytes(entry["signature"])), "leaf": leaf,
        "delegation": carried_delegation(tx, entry), "before": past_versions(tx, {"key": row["secret_key"], "version": row["secret_version"]}, since),
        "rosters": [{"number": r["number"], "document": r["document"], "signature": b64(bytes(r["signature"]))} for r in tx.all(ROSTERS)],
        "rules": carried_rules(tx),
        "shares": [{"group": s["group_name"], "member": s["member"], "index": s["share_index"], "wrap": b64(bytes(s["wrap"]))}
                   for s in tx.all(SHARES_OF, key=row["secret_key"], version=row["secret_version"]) if member in (None, s["member"])],
        "grants": [{"document": g["document"], "signature": b64(bytes(g["signature"])), "wrap_hash": g["wrap_hash"]}
                   for g in tx.all(GRANTS_OF, id=row["consent_id"])],
        "earlier": {r["status"]: r["n"] for r in tx.all(EARLIER, key=row["secret_key"], by=claimed["by"], id=row["consent_id"])},
    }  # fmt: skip


def carried_rules(tx: Tx) -> list[Row]:
    """The newest sets of rules, oldest first, for an approver who has his own memory of them."""
    carried: list[Row] = []
    for row in tx.all(RULE_SETS_NEWEST, n=RULES_CARRIED):
        if carried and sum(len(known["document"]) for known in carried) + len(row["document"]) > RULES_CARRIED_BYTES:
            break
        carried.append({"number": row["number"], "document": row["document"], "signature": b64(bytes(row["signature"]))})
    return carried[::-1]


def wrap_hash(wrap: bytes | None) -> str | None:
    return None if wrap is None else sha256(bytes(wrap))


def parse_case(text: str) -> Row:
    """A case from the text that another machine exported; RefusedError when it is none."""
    try:
        case = shaped(parse_json(text), CASE_SHAPE, "this text")
    except ValueError as error:
        raise RefusedError(f"this is no exported request: {error}", EXPORT_ANEW) from None
    for name, shape in CASE_PARTS.items():
        for item in case[name]:
            shaped(item, shape, "this text")
    for carrier in (case, *case["before"]):
        if carrier["delegation"] is not None:
            shaped(carrier["delegation"], {"document": TEXT, "signature": TEXT}, "this text")
    counts = case["earlier"].items()
    if case["format"] != "grace-case/1" or not all(status in CONSENT_STATUS and type(n) is int and n >= 0 for status, n in counts):
        raise RefusedError("this is no exported request", EXPORT_ANEW)
    return case


class Review:
    """A request as an approver may trust it: everything verified with his own key and what he has seen."""

    def __init__(self, approver: Approver, case: Row, now: int):
        """RefusedError when anything does not hold; ConflictError when it is too late."""
        self.approver, self.case = approver, case
        rosters = [{**row, "signature": from_b64(row["signature"], "a signature")} for row in case["rosters"]]
        self.roster = approver.meet(rosters).roster
        under = received_delegation(case["delegation"])
        self.header = check_seal(case["header"], case["sealed"], from_b64(case["seal"], "a seal"), approver.vault_id, self.roster, under)
        if problem := approver.seen.odd_version(self.header):
            raise RefusedError(f"rolled back: {problem}")
        if problem := odd_succession(self.header, under, case["before"], approver.seen, approver.vault_id, approver.rosters):
            raise RefusedError(problem, "when he has not looked for very long: let him approve once where the database is")
        self.request = checked_request(case["request"], self.header, case["sealed"], approver.vault_id)
        if self.request["consent_id"] != case["consent_id"]:
            raise RefusedError("the request belongs to another consent")
        sets = [{**row, "signature": from_b64(row["signature"], "a signature")} for row in case["rules"]]
        self.rules = rules_until(sets, approver.vault_id, approver.rosters, approver.seen.rules, whole=False)
        if problem := ruled_out(self.rules, self.header, self.request, self.request["created"]):
            raise RefusedError(problem)
        self.audit = self._place_in_log()
        if self.audit[0] < approver.seen.audit[0] or (self.audit[0] == approver.seen.audit[0] and self.audit != approver.seen.audit):
            raise RefusedError("rolled back: the audit log is not the one seen before", f"if it was only exported too long ago, {EXPORT_ANEW}")
        if now >= self.request["answer_by"]:
            raise ConflictError(f"{case['consent_id']} has expired unanswered")
        given = [{**row, "signature": from_b64(row["signature"], "a signature")} for row in case["grants"]]
        self.grants = checked_grants(self.header, self.request, self.roster, given)
        self.hash = hash_of("request", self.request)
        self.code = code_of(self.hash)

    def _place_in_log(self) -> tuple[int, str]:
        """Size and head of the log with the leaf that says that this very request is shown."""
        try:
            leaf = parse_canonical(self.case["leaf"])
        except ValueError as error:
            raise RefusedError(f"a leaf {error}") from None
        facts = leaf.get("facts")
        if (leaf.get("kind"), leaf.get("subject")) != ("consent.shown", self.request["consent_id"]) or type(leaf.get("seq")) is not int:
            raise RefusedError("the leaf belongs to something else")
        if not isinstance(facts, dict) or facts.get("request") != hash_of("request", self.request):
            raise RefusedError("the leaf names another request")
        return leaf["seq"], hash_of("audit", leaf)

    @property
    def risk(self) -> str:
        return str(self.request["risk"])

    def groups(self, wanted: str | None) -> list[str]:
        """The groups to sign for; DeniedError, ConflictError or UsageError when there is none."""
        mine = self.approver.keys.fingerprint
        if self.request["claimed"]["by"].lower() == self.approver.name.lower():
            raise DeniedError(f"{self.approver.name} asked for this and may not approve it", "another approver has to")
        open_ones = missing_groups(self.header, self.request, self.grants)
        signed = {grant["group"] for grant in self.grants if grant["approver"] == mine}
        eligible = [group for group in required_groups(self.header, self.request) if mine in may_sign(self.header, self.request, self.roster, group)]
        if wanted is not None and wanted not in eligible:
            raise DeniedError(f"{self.approver.name} may not sign for {wanted} here")
        if not eligible:
            raise DeniedError(f"{self.approver.name} may not sign for this request")
        chosen = [group for group in eligible if group in open_ones and group not in signed and wanted in (None, group)]
        if not chosen:
            raise ConflictError(f"{self.approver.name} has signed already, or no signature is missing there")
        if not self.header["same_person"]:
            if signed:
                raise DeniedError("one person may not sign for two groups of this secret", "another approver has to")
            if len(chosen) > 1:
                raise UsageError(f"{self.approver.name} may sign for {' or '.join(chosen)}, not for both", f"name one: --as {chosen[0]}")
        if len(chosen) > 1 and self.risk in ("high", "critical"):
            raise UsageError(f"one person in two roles has to name the one for which he signs at {self.risk} risk", f"name one: --as {chosen[0]}")
        return chosen

    def sign(self, group: str, now: int) -> Row:
        """One signed grant: this approver's part of the data key, where he holds one, wrapped to the requester."""
        keys, (size, head) = self.approver.keys, self.audit
        share = next((s for s in self.case["shares"] if s["group"] == group and s["member"] == keys.fingerprint), None)
        if (share is None) == bool(holders(self.header, group)):
            raise RefusedError(f"the part of {self.approver.name} is missing")
        grant = {"format": "grace-grant/1", "request": self.hash, "group": group, "approver": keys.fingerprint, "index": share["index"] if share else 0,
                 "mode": self.request["mode"], "expires": ends(self.request, now), "max_uses": uses_of(self.request),
                 "leaf": head, "size": size, "head": head, "nonce": os.urandom(16).hex()}  # fmt: skip
        wrap = None
        if share is not None:
            info = share_info(self.request["header"], self.case["sealed"], group, keys.fingerprint, share["index"])
            part = keys.unwrap(from_b64(share["wrap"], "a part"), info)
            wrap = wrap_to(self.request["ephemeral"], part, statement("grant", grant))
        signature = keys.sign(statement("grant-signature", [grant, wrap_hash(wrap)]))
        return {"document": canonical(grant).decode(), "wrap": b64(wrap) if wrap is not None else None, "signature": b64(signature)}

    def learn(self, elsewhere: bool = False) -> None:
        """What this approver has now seen; where there is no log to look at, nothing of it."""
        self.approver.learn(None if elsewhere else self.audit, self.header, rules_mark(self.rules))


def record_grants(tx: Tx, vault: Vault, consent_id: str, signed: list[Row], observed: Row) -> Row:
    """Store signed grants and, when nothing is missing any more, approve; the consent's row. ConflictError when too late."""
    row = still_pending(get_consent(tx, consent_id), tx.now)
    entry, header = vault.current(tx, row["secret_key"])
    request = filed_request(tx, row, header, sha256(bytes(entry["sealed"])), vault.id)
    if tx.now >= request["answer_by"]:
        raise ConflictError(f"{row['consent_id']} has expired unanswered")
    if problem := ruled_out(vault.rules(tx), header, request, request["created"]):
        raise RefusedError(problem)
    for item in signed:
        grant = grant_of(item["document"])
        if not leaf_is_there(tx, grant, row["consent_id"]):
            raise RefusedError("a grant names a leaf that is not in the audit log")
        wrap = from_b64(item["wrap"], "a part") if item["wrap"] is not None else None
        if tx.one("SELECT seq FROM consent_grants WHERE consent_id = :id AND group_name = :group AND approver = :approver",
                  id=row["consent_id"], group=grant["group"], approver=grant["approver"]):  # fmt: skip
            raise ConflictError("this approver has signed for this group already")
        tx.run(PUT_GRANT, id=row["consent_id"], group=grant["group"], approver=grant["approver"], document=item["document"], wrap=wrap,
               wrap_hash=wrap_hash(wrap), signature=from_b64(item["signature"], "a signature"), now=tx.now)  # fmt: skip
    grants = checked_grants(header, request, vault.roster, tx.all(GRANTS_OF, id=row["consent_id"]))
    tx.run(OBSERVE, id=row["consent_id"], observed=to_json([*json.loads(row["observed"]), observed]))
    missing = missing_groups(header, request, grants)
    for item in signed:
        grant = grant_of(item["document"])
        person = person_of(vault.roster, grant["approver"]) or {"name": "?"}
        record(tx, "consent.signed", row["consent_id"], {"key": header["key"], "group": grant["group"], "approver": grant["approver"], "name": person["name"],
                                                         "requester_is_approver_uid": observed.get("requester_is_approver_uid")})  # fmt: skip
    if not missing:
        tx.run(APPROVE, id=row["consent_id"], now=tx.now, until=min(grant["expires"] for grant in grants), method="approver")
        emit(tx, "secrets.consent.approved", row["consent_id"], {"consent_id": row["consent_id"], "secret_key": header["key"], "approval_method": "approver"})
        record(tx, "consent.approved", row["consent_id"], {"key": header["key"], "method": "approver"})
    return get_consent(tx, row["consent_id"])


def leaf_is_there(reader: Reader, grant: Row, consent_id: str) -> bool:
    """Whether the audit log holds, at the place that the grant names, the record that this request was shown."""
    row = reader.one(GET_LEAF, seq=grant["size"])
    if row is None or not row["hash"] == grant["head"] == grant["leaf"]:
        return False
    try:
        leaf = parse_canonical(row["leaf"])
    except ValueError:
        return False
    return hash_of("audit", leaf) == row["hash"] and (leaf["kind"], leaf["subject"]) == ("consent.shown", consent_id)


def close_consent(tx: Tx, row: Row, sql: str, kind: str, reason: str | None, **more: Any) -> bool:
    """End a consent by one guarded UPDATE, with its event and leaf; whether it was still open."""
    params = {"id": row["consent_id"], "reason": reason, **more}
    if tx.run(sql, **params) != 1:
        return False
    drop_standing(tx, row["consent_id"])
    if row["mode"] == "standing" and row["consent_status"] == "approved" and kind == "revoked" and not undecided(reason):
        tx.many(MARK_ROTATION, [{"key": row["secret_key"], "reason": "a standing consent to use it was revoked; old copies may still open"}])
    for covered in tx.all(UNDER_STANDING, id=row["consent_id"]):
        close_consent(tx, covered, sql, kind, reason, **more)
    emit(tx, f"secrets.consent.{kind}", row["consent_id"], {"consent_id": row["consent_id"], "secret_key": row["secret_key"], "reason": reason})
    record(tx, f"consent.{kind}", row["consent_id"], {"key": row["secret_key"], "reason": reason, "uid": os.geteuid(), "signed": False})
    return True


def withdraw_open(store: Store, ids: list[str]) -> None:
    """Take back those requests that nobody has answered."""
    for consent_id in ids:
        with contextlib.suppress(GraceError):
            store.write(functools.partial(withdraw, consent_id=consent_id))


def deny(tx: Tx, consent_id: str, reason: str) -> Row:
    row = still_pending(get_consent(tx, consent_id), tx.now)
    close_consent(tx, row, DENY, "denied", reason, now=tx.now)
    return get_consent(tx, row["consent_id"])


def withdraw(tx: Tx, consent_id: str) -> Row:
    """The requester's own no: a pending request is revoked."""
    row = get_consent(tx, consent_id)
    if row["consent_status"] != "pending":
        raise ConflictError(f"{row['consent_id']} is {row['consent_status']} already")
    close_consent(tx, row, REVOKE, "revoked", "withdrawn", now=tx.now)
    return get_consent(tx, row["consent_id"])


def revoke(tx: Tx, consent_id: str, reason: str) -> Row:
    row = get_consent(tx, consent_id)
    if not close_consent(tx, row, REVOKE, "revoked", reason, now=tx.now):
        hint = f"the value has been given out; only a new one helps: grace secret rotate {row['secret_key']}" if row["consent_status"] == "used" else ""
        raise ConflictError(f"{row['consent_id']} is {row['consent_status']} already", hint)
    return get_consent(tx, row["consent_id"])


def revoke_all(tx: Tx, key: str, action: str | None, reason: str) -> list[Row]:
    """Revoke what is open for a secret, or for one action with it."""
    if tx.one(NEWEST_VERSION, key=key) is None:
        raise NotFoundError(f"there is no secret {key!r}", "see them with: grace secret list")
    wanted = [row for row in tx.all(OPEN_CONSENTS_OF, key=key) if action is None or fits(listed_request(row), "action", action)]
    return [revoke(tx, row["consent_id"], reason) for row in wanted]


def void_open_consents(tx: Tx, key: str, reason: str, but: Iterable[str] = ()) -> None:
    """What was asked for an older version, or for a secret that is gone, can no longer be granted or used."""
    for row in tx.all(OPEN_CONSENTS_OF, key=key):
        if row["consent_id"] not in but:
            close_consent(tx, row, REVOKE, "revoked", reason, now=tx.now)


def store_version(tx: Tx, made: Row, kind: str, approver: Approver | None, vault: Vault | None = None) -> Row:
    """A new version in the place of the one before, anchored by the approver who sealed it. Given the vault, standing consents may follow."""
    put_version(tx, made, kind)
    void_open_consents(tx, made["header"]["key"], SECRET_CHANGED, follow_standing(tx, vault, made) if vault else ())
    if approver is not None:
        anchor(tx, approver)
    return tx.one(NEWEST_VERSION, key=made["header"]["key"]) or {}


def remove_secret(tx: Tx, key: str) -> Row:
    """Drop a secret's value and parts; its headers stay for the history."""
    newest = tx.one(NEWEST_VERSION, key=key)
    if newest is None or newest["sealed"] is None:
        raise NotFoundError(f"there is no secret {key!r}", "see them with: grace secret list")
    void_open_consents(tx, key, "the secret was removed")
    tx.run(DROP_SHARES, key=key)
    tx.run(END_DELEGATIONS, key=key)
    tx.run(EMPTY_VERSIONS, key=key, now=tx.now)
    to_shred(tx)
    emit(tx, "secrets.secret.removed", key, {"secret_key": key, "version": newest["version"]})
    record(tx, "secret.removed", key, {"version": newest["version"], "uid": os.geteuid(), "signed": False})
    return tx.one(NEWEST_VERSION, key=key) or {}


def suspect(tx: Tx, entry: Row, reason: str) -> bool:
    """Say of a version that was used before why it should be replaced; whether that is news. It takes no passphrase, and changes no value."""
    newest = tx.one(NEWEST_VERSION, key=entry["secret_key"]) or entry
    known = newest["rotate_reason"] or ""
    used = tx.one(USED_VERSION, key=entry["secret_key"], version=entry["version"])
    if newest["version"] != entry["version"] or newest["sealed"] is None or used is None or reason in known.split("; "):
        return False
    tx.run(MARK_ROTATION, key=entry["secret_key"], reason=f"{known}; {reason}" if known else reason)
    record(tx, "secret.suspect", entry["secret_key"], {"version": entry["version"], "reason": reason, "uid": os.geteuid(), "signed": False})
    return True


def answerable(reader: Reader, now: int) -> list[Row]:
    """The requests that can still be answered."""
    return [row for row in reader.all(PENDING) if now < row["expires_at"] and asker_lives(row)]


def expire_consents(tx: Tx) -> int:
    """End what nobody answered or used in time, and what has lost its process; how many."""
    over = tx.all(CONSENTS_OVER, now=tx.now)
    lost = [row for row in tx.all(PENDING) if row["expires_at"] > tx.now and not asker_lives(row)]
    for row in over + lost:
        close_consent(tx, row, EXPIRE, "expired", "grant_ended" if row["consent_status"] == "approved" else "unanswered")
    return len(over) + len(lost)


# ---- opening


def redeem(vault: Vault, consent_id: str, keys: Keys | None, own_request: str | None) -> bytes:
    """Open the secret that a consent is for, with the waiting process's key or, when collected, the one kept for it.

    The use is spent before anything is decrypted; what does not verify is refused, and the log says why."""
    with refusals(vault.store, consent_id, plain=True):
        header, sealed, parts = vault.store.write(lambda tx: claim_parts(tx, vault, consent_id, keys, own_request))
        value = open_value(header, sealed, parts)
    vault.learn_head(header)
    shred(vault.store)
    return value


def claim_parts(tx: Tx, vault: Vault, consent_id: str, keys: Keys | None, own_request: str | None) -> tuple[Row, bytes, dict[str, dict[int, bytes]]]:
    """Check everything in one state of the database, spend the use, and hand out the parts of the data key."""
    row = get_consent(tx, consent_id)
    refuse_closed(row)
    entry, header = vault.current(tx, row["secret_key"])
    if own_request is not None and row["request"] != own_request:
        raise RefusedError("the request was changed after it was filed")
    request = filed_request(tx, row, header, sha256(bytes(entry["sealed"])), vault.id)
    if request["risk"] != "low" and vault.rolled_back(tx):
        raise RefusedError("rolled back: the audit log is not the one that this machine has seen")
    if header["expires"] is not None and tx.now >= header["expires"]:
        raise RefusedError(f"{header['key']} has expired")
    parts: dict[str, dict[int, bytes]] = {}
    if request["risk"] == "low":
        with contextlib.suppress(RefusedError):  # where the rules do not verify, low stays open: as when it is asked for
            held = vault.rules(tx)
            if problem := ruled_out(held, header, request, tx.now):
                raise DeniedError(problem)
    if row["standing_id"] is not None:
        parts = standing_parts(tx, vault, row["standing_id"], entry, header, request)
    elif request["ephemeral"] is not None:
        if problem := ruled_out(vault.rules(tx), header, request, tx.now):
            raise RefusedError(problem)
        if keys is None:
            keys = Keys(vault.machine.unwrap(bytes(row["ephemeral"] or b""), statement("ephemeral", hash_of("request", request))))
        if keys.public != request["ephemeral"]:
            raise RefusedError("the request names the key of somebody else")
        parts = unwrapped(checked_all(tx, vault, row, header, request), keys)
    if holders(header, "machine"):  # a secret of low risk; when asked for at a higher one, the program alone holds it back
        parts.update(own_shares(vault.machine, entry, header, tx.all(SHARES_OF, key=header["key"], version=header["version"])))
    spend(tx, consent_id, request, row["standing_id"])
    return header, bytes(entry["sealed"]), parts


def checked_all(tx: Tx, vault: Vault, row: Row, header: Row, request: Row) -> list[tuple[Row, Row]]:
    """The grants of a consent with their rows, when they all hold, suffice and last; RefusedError otherwise."""
    rows = tx.all(GRANTS_OF, id=row["consent_id"])
    grants = checked_grants(header, request, vault.roster, rows)
    if missing := missing_groups(header, request, grants):
        raise RefusedError(f"signatures of {' and '.join(missing)} are missing")
    if any(tx.now >= grant["expires"] for grant in grants):
        raise RefusedError("a grant has expired")
    if not all(leaf_is_there(tx, grant, row["consent_id"]) for grant in grants):
        raise RefusedError("a grant names a leaf that is not in the audit log")
    return list(zip(grants, rows, strict=True))


def unwrapped(granted: list[tuple[Row, Row]], keys: Keys) -> dict[str, dict[int, bytes]]:
    """The parts of the data key in grants that were checked."""
    parts: dict[str, dict[int, bytes]] = {}
    for grant, stored in granted:
        if stored["wrap_hash"] is not None:
            if wrap_hash(stored["wrap"]) != stored["wrap_hash"]:
                raise RefusedError("the part in a grant was changed")
            parts.setdefault(grant["group"], {})[grant["index"]] = keys.unwrap(bytes(stored["wrap"]), statement("grant", grant))
    return parts


def standing_terms(tx: Tx, vault: Vault, row: Row, header: Row) -> tuple[Row, Row]:
    """The request behind a standing consent and the header that it was approved for; RefusedError when it does not hold for this one."""
    if row["mode"] != "standing" or row["secret_key"] != header["key"]:
        raise RefusedError("the standing consent is for something else")
    first = tx.one(GET_VERSION, key=row["secret_key"], version=row["secret_version"])
    if first is None:
        raise RefusedError("the version that the standing consent was given for is missing")
    under = received_delegation(carried_delegation(tx, first))
    sealed_as = check_seal(first["header"], first["sealed_hash"], bytes(first["signature"]), vault.id, vault.roster, under, vault.rosters)
    terms = filed_request(tx, row, sealed_as, first["sealed_hash"], vault.id)
    followed = sealed_as["version"] != header["version"]
    if followed and (not terms["standing"]["follow"] or sealed_fields(sealed_as) != sealed_fields(header)):
        raise RefusedError(f"{header['key']} was changed after the standing consent was given")
    return terms, sealed_as


def standing_parts(tx: Tx, vault: Vault, standing_id: str, entry: Row, header: Row, request: Row) -> dict[str, dict[int, bytes]]:
    """The parts of the data key under a standing consent that covers this request, for the version that there is now."""
    row = get_consent(tx, standing_id)
    refuse_closed(row)
    terms, sealed_as = standing_terms(tx, vault, row, header)
    if not covers(terms, request) or asks_himself(tx, vault, row, request):
        raise RefusedError("the standing consent does not cover this request")
    if problem := ruled_out(vault.rules(tx), header, request, tx.now, terms):
        raise RefusedError(problem)
    granted = checked_all(tx, vault, row, sealed_as, terms)
    if sealed_as["version"] == header["version"]:
        return unwrapped(granted, vault.machine)
    under = carried_delegation(tx, entry)
    sealer = json.loads(under["document"]) if under else person_of(vault.roster, header["owner"]) or {}
    parts: dict[str, dict[int, bytes]] = {}
    stored = {(part["group_name"], part["approver"]): part for part in tx.all(STANDING_PARTS_OF, id=standing_id, version=header["version"])}
    for grant, _ in granted:
        if grant["index"]:
            part = stored.get((grant["group"], grant["approver"]))
            info = statement("standing-part", [grant, hash_of("header", header), entry["sealed_hash"]])
            if part is None or not signed_by(sealer, bytes(part["signature"]), statement("standing-signature", [grant, sha256(bytes(part["wrap"]))])):
                raise RefusedError("a part of the standing consent for this version is missing, or not signed by whoever sealed it")
            parts.setdefault(grant["group"], {})[grant["index"]] = vault.machine.unwrap(bytes(part["wrap"]), info)
    return parts


def follow_standing(tx: Tx, vault: Vault, made: Row) -> set[str]:
    """Carry standing consents that follow a rotation over to the version just stored; the ids of those that go on."""
    header, kept = made["header"], set()
    for row in tx.all(STANDING_OF, key=header["key"]):
        try:
            terms, sealed_as = standing_terms(tx, vault, row, header)
            granted = checked_all(tx, vault, row, sealed_as, terms)
        except RefusedError:
            continue  # it ends with the version that it was for
        drop_standing(tx, row["consent_id"])
        for grant, _ in granted:
            if grant["index"]:
                info = statement("standing-part", [grant, hash_of("header", header), sha256(made["sealed"])])
                wrap = wrap_to(vault.machine.public, made["pieces"][grant["group"], grant["index"]], info)
                tx.run(PUT_STANDING_PART, id=row["consent_id"], version=header["version"], group=grant["group"], approver=grant["approver"], wrap=wrap,
                       signature=made["sign"](statement("standing-signature", [grant, sha256(wrap)])))  # fmt: skip
        kept.add(row["consent_id"])
    return kept


def refuse_closed(row: Row) -> None:
    """The error for a consent that opens nothing (any more), or nothing when it is approved."""
    status, name = row["consent_status"], row["consent_id"]
    if status == "pending":
        raise ConflictError(f"{name} is not approved yet", f"wait for it: grace consent wait {name}")
    if status in ("denied", "revoked"):
        reason = row["denial_reason"] if status == "denied" else row["revocation_reason"]
        raise DeniedError(f"{name} was {status}" + (f": {reason}" if reason else ""))
    if status == "expired" and row["standing_id"] is not None and clock() < row["grant_expires_at"]:
        raise ConflictError(f"the uses of {row['standing_id']}, which had approved {name}, are spent", "ask again")
    if status == "expired":
        raise WaitTimeoutError(f"{name} has expired: " + ("nobody answered in time" if row["expired_reason"] == "unanswered" else "it was not used in time"))
    if status == "used":
        raise ConflictError(f"{name} has been used already", "ask again")


# ---- what an approver's own process can see


def observe(reported: Row, approver_uid: int) -> Row:
    """What /proc says now about the process that asked and about the programs above it."""
    pid, started = reported.get("pid"), reported.get("started")
    if reported.get("boot") != boot_id() or not isinstance(pid, int) or not isinstance(started, int) or not lives(pid, started):
        return {"alive": False, "uid": None, "requester_is_approver_uid": None, "ancestors": []}
    uid = owner_of(pid)
    ancestors = [{"pid": above, "program": program_name(above), "path": program_path(above), "exe": program_hash(above), "uid": owner_of(above)}
                 for above in ancestors_of(pid, 8)]  # fmt: skip
    return {"alive": True, "uid": uid, "requester_is_approver_uid": uid == approver_uid, "ancestors": ancestors}


def quoted_lines(name: str, text: str) -> list[str]:
    """A claimed text in quotes, in pieces that no terminal of 80 columns wraps, each marked as a part of it."""
    shown = re.sub(r" {2,}", lambda match: f" \\u{{20}}x{len(match[0]) - 1} ", ascii_only(text).replace('"', '\\"'))
    cut = [shown[at : at + 62] for at in range(0, len(shown), 62)]
    return [f'  {"" if number else name:<9} {" " if number else chr(34)}{piece}{chr(34) if number == len(cut) - 1 else " .."}'
            for number, piece in enumerate(cut)]  # fmt: skip


def mode_lines(request: Row) -> list[str]:
    """How long and how often an approval holds; a standing one with all that it is bound to, and what it is worth."""
    span = format_duration(lasts(request))
    if request["mode"] != "standing":
        return [f"  mode      {request['mode']}, used within {span}"]
    terms, claimed = request["standing"], request["claimed"]
    often = f"at most {terms['uses']} times" if terms["uses"] else "as often as it comes"
    star = {name: " and whatever begins so" if terms[name] == "prefix" else "" for name in ("action", "by")}
    follows = "goes on when the secret gets a new value" if terms["follow"] else "ends when the secret gets a new value"
    return [f"  mode      STANDING for {span}, {often};", f"            it {follows}, and is for this{star['action']}:",
            *quoted_lines("action", claimed["action"]),
            f"            asked under this name{star['by']}, by user id {request['reported']['uid']}:", *quoted_lines("by", claimed["by"]),
            "            nobody is asked again: this machine's key opens it meanwhile"]  # fmt: skip


def context_lines(request: Row) -> list[str]:
    """The claimed context: of a daemon's task its intent and handler, where it says nothing else that is not shown already."""
    claimed, context = request["claimed"], json.loads(request["claimed"]["context"])
    shown = {"task_id": request["reported"].get("task"), "goal": claimed["for"]}
    if isinstance(context, dict) and set(context) == {"task_id", "intent_id", "handler", "goal"} and all(context[name] == shown[name] for name in shown):
        return [line for name in ("intent_id", "handler") for line in quoted_lines(name.removesuffix("_id"), str(context[name]))]
    return quoted_lines("context", claimed["context"]) if claimed["context"] != "{}" else []


def sealed_lines(review: Review) -> list[str]:
    """What the owner has signed of the secret, and the code of the request."""
    header, request, now_risk = review.header, review.request, review.risk
    owner = person_of(review.roster, header["owner"]) or {"name": "this machine"}
    asks = " and ".join(f"{group}:{n}" for group, n in sorted(request["requires"].items()))
    return [f"  secret    {header['key']}  version {header['version']}" + (f"  service {ascii_only(header['service'])}" if header["service"] else ""),
            f"  owner     {owner['name']}",
            f"  risk      {now_risk}" + (f"  (sealed as {header['risk']})" if now_risk != header["risk"] else ""),
            f"  policy    {policy_text(header['policy'])}", *([f"  rules     asked for {asks} besides"] if asks else []),
            *mode_lines(request), f"  code      {review.code}"]  # fmt: skip


def prompt_lines(review: Review, seen: Row, elsewhere: bool) -> list[str]:
    """What an approver is shown, in the order of its worth: sealed, verified now, reported, claimed, and what was before."""
    request, claimed, reported = review.request, review.request["claimed"], review.request["reported"]
    lines = ["SEALED (signed by the owner, verified)", *sealed_lines(review), "VERIFIED NOW by this process"]
    if elsewhere:
        lines += ["  nothing: the request comes from another machine"]
    elif not seen["alive"]:
        lines += ["  the process that asked is not running" + (" (it left its request to be collected)" if request["mode"] == "collect" else "")]
    else:
        lines += [f"  process   {reported['pid']} of user {seen['uid']} runs" + (" (your own)" if seen["requester_is_approver_uid"] else "")
                  + "; did it ask? compare the code"]  # fmt: skip
        for above in seen["ancestors"]:
            known = f"sha256 {above['exe'][:16]}" if above["exe"] else "(its program may not be read)"
            lines += [f"  below     {above['pid']} {ascii_only(above['path'] or above['program'], 40)} {known}"]
    lines += ["REPORTED by the requester's own process, not verified", f"  program   {ascii_only(str(reported.get('program')), 60)}",
              *quoted_lines("folder", reported["cwd"])]  # fmt: skip
    lines += [f"  task      {ascii_only(str(reported['task']))}"] if reported.get("task") else []
    lines += ["CLAIMED by the requester, anything may stand here"]
    lines += [line for name in ("by", "action", "for", "user") if claimed.get(name) for line in quoted_lines(name, str(claimed[name]))]
    lines += context_lines(request)
    earlier = review.case["earlier"]
    history = ", ".join(f"{n} {ascii_only(status)}" for status, n in sorted(earlier.items()))
    history = history or "the first time that this requester asks for it"
    teller = "the other machine" if elsewhere else "the database"
    return [*lines, f"BEFORE, as {teller} says", f"  {history}", f"  answer until {format_instant(request['answer_by'])}"]


# ---- answers that are always the same


STREAK, PATTERN_SHOWS = 3, 5  # approvals in a row that are worth a line, and a suggestion


def answer_ms(row: Row, request: Row) -> int | None:
    """How long a person took to say yes or no; None where nobody did, or where the approver himself had filed it."""
    at = row["approved_at"] if row["approval_method"] == "approver" else row["denied_at"]
    terms = request.get("standing", {"origin": None, "template": None})
    return None if at is None or terms["origin"] or terms["template"] else max(0, at - row["requested_at"])


def same_answers(asked: Iterable[tuple[Row, Row]]) -> list[Row]:
    """What was approved again and again, with no denial between: by secret, action and requester, longest first."""
    runs: dict[tuple[str, str, str], list[tuple[int, str]]] = {}
    for row, request in asked:
        took, key = answer_ms(row, request), (row["secret_key"], request["claimed"]["action"], request["claimed"]["by"])
        if row["denied_at"] is not None:
            runs[key] = []
        elif took is not None and row["mode"] != "standing":
            runs.setdefault(key, []).append((took, request["risk"]))
    found = [{"secret_key": key, "action": action, "requested_by": by, "approvals": len(run), "risk_level": run[-1][1],
              "median_answer_ms": sorted(took for took, _ in run)[len(run) // 2]} for (key, action, by), run in runs.items() if len(run) >= STREAK]  # fmt: skip
    return sorted(found, key=lambda streak: -streak["approvals"])


def suggestion(streak: Row) -> str | None:
    """The template that would have answered, for medium risk and words that a template can name."""
    import shlex

    if streak["approvals"] < PATTERN_SHOWS or streak["risk_level"] != "medium" or not re.fullmatch("[ -)+->@-~]{1,128}", streak["requested_by"]):
        return None
    name = re.sub("[^A-Za-z0-9_.-]", "-", f"{streak['secret_key']}-{streak['action']}")[:64]
    return (f"grace consent template add {name} --secret {streak['secret_key']} --action {streak['action']} "
            f"--by {shlex.quote(streak['requested_by'])} --for 30d --uses {2 * streak['approvals']}")  # fmt: skip


# ---- shown to programs and people


def newest_roster(reader: Reader) -> Row:
    """The newest list of approvers, unverified: for names in listings."""
    row = reader.one("SELECT document FROM vault_rosters ORDER BY number DESC LIMIT 1")
    if row is None:
        raise LockedError("there is no vault yet", "make one: grace init")
    roster = stored_object(row["document"])
    people = roster.get("approvers")
    if not isinstance(people, list) or not all(isinstance(person, dict) and {"name", "hpke", "sign"} <= set(person) for person in people):
        raise RefusedError("the list of approvers is damaged")
    return roster


def consent_document(reader: Reader, row: Row) -> Row:
    """A consent as programs see it."""
    request, roster = listed_request(row), newest_roster(reader)
    header = stored_object((reader.one(GET_VERSION, key=row["secret_key"], version=row["secret_version"]) or {"header": "{}"})["header"])
    claimed, names = request["claimed"], {fingerprint(person): person["name"] for person in roster["approvers"]}
    grants = reader.all(GRANTS_OF, id=row["consent_id"])
    needed = required_groups(header, request) if request["risk"] != "low" and not odd_policy(header.get("policy")) else {}
    governance = sum(grant["group_name"] == "governance" for grant in grants)
    return {
        "consent_id": row["consent_id"], "secret_key": row["secret_key"], "secret_version": row["secret_version"], "secret_type": header.get("type"),
        "service": header.get("service"), "requested_by": claimed["by"], "requested_for": claimed["for"], "requested_action": claimed["action"],
        "user_id": names.get(request["user"], claimed["user"]), "risk_level": request["risk"], "mode": row["mode"],
        "code": code_of(hash_of("request", request)) if request is not NO_REQUEST else None,
        "consent_status": row["consent_status"], "single_use": row["max_uses"] == 1, "standing_id": row["standing_id"],
        "terms": request.get("standing"), "requires": request["requires"],
        "used_count": row["used_count"], "max_uses": row["max_uses"], "governance_approval_required": "governance" in needed,
        "governance_approved": governance >= needed["governance"] if "governance" in needed else None,
        "approvals": [{"group": grant["group_name"], "approver": names.get(grant["approver"], grant["approver"]),
                       "approved_at": format_instant(grant["created_at"])} for grant in grants],
        **{name: format_instant(row[name]) for name in ("requested_at", "expires_at", "approved_at", "denied_at", "revoked_at", "used_at", "grant_expires_at")},
        "expired_reason": row["expired_reason"], "approval_method": row["approval_method"], "denial_reason": row["denial_reason"],
        "revocation_reason": row["revocation_reason"], "context": json.loads(claimed["context"]), "task_id": row["task_id"],
        "observed": {"reported": request["reported"], "verified": json.loads(row["observed"])},
    }  # fmt: skip


ANCHOR_SHAPE: Fields = {"format": TEXT, "vault_id": TEXT, "approver": TEXT, "size": NUMBER, "head": TEXT, "at": NUMBER}


def signed_heads(store: Store) -> Iterator[Row]:
    """What approvers have signed of the log: size, head, fingerprint, and the bytes and signature to check.

    What has not the shape of a signed statement comes as one that nobody has signed."""
    stored = [(row, "anchor", ANCHOR_SHAPE) for row in store.all(ALL_ANCHORS)] + [(row, "grant-signature", GRANT_SHAPE) for row in store.all(ALL_GRANTS)]
    for row, label, shape in stored:
        try:
            document = shaped(parse_canonical(row["document"]), shape, "a signed statement")
        except (ValueError, RefusedError):
            document = {"size": 0, "head": NO_HEAD[1], "approver": ""}
        text = statement(label, document if label == "anchor" else [document, row["wrap_hash"]])
        yield {"size": document["size"], "head": document["head"], "approver": document["approver"], "text": text, "signature": bytes(row["signature"])}


def verify_log(store: Store, roster: Row, pins: dict[str, tuple[int, str]]) -> Row:
    """Every leaf against the one before it, and the chain against what was signed or seen; the findings in words."""
    findings, size, head, hashes = [], 0, NO_HEAD[1], {}
    for row in all_leaves(store):
        if problem := odd_leaf(row, size, head):
            findings.append(problem)
        size, head = row["seq"], row["hash"]
        hashes[size] = head
    anchored = 0
    people = {fingerprint(person): person for person in roster["approvers"]}
    for signed in signed_heads(store):
        person = people.get(signed["approver"])
        if person is None or not signed_by(person, signed["signature"], signed["text"]):
            findings.append(f"the signature under size {signed['size']} does not hold")
        elif hashes.get(signed["size"]) != signed["head"]:
            findings.append(f"the log was cut or rewritten: {person['name']} has signed another leaf {signed['size']}")
        else:
            anchored = max(anchored, signed["size"])
    for name, (seen_size, seen_head) in pins.items():
        if seen_size and hashes.get(seen_size) != seen_head:
            findings.append(f"the log was cut or rewritten: {name} has seen another leaf {seen_size}")
        else:
            anchored = max(anchored, seen_size)
    return {"ok": not findings, "size": size, "head": head, "anchored": anchored, "checked_against": ["signed grants and anchors", *pins], "findings": findings}


# =====================================================================================================================
# doctor
# What is wrong or weak on this machine, found by looking: who can change the program, what the kernel lets others see,
# where keys and database lie, and whether what is stored still holds. Each finding says what to do.

GUARANTEES = (
    ("mathematics", "which people, and how many of each group, must take part before a secret of medium risk or above opens"),
    ("mathematics", "that a value, its risk, its policy, its version and its owner are as the owner signed them"),
    ("mathematics", "that a single-use approval dies with the process that asked, and names exactly that request"),
    ("the program", "time-outs, uses, expiry, raised risk, governance rules, and that the audit leaf is there: code that anyone with the file can go round"),
    ("the program", "who a requester says that he is, and the rollback of single rows that nobody has seen newer"),
    ("nothing", "against a program running as you that lies in wait for your passphrase, against root, or against a guessable passphrase"),
    ("nothing", "against whoever has been given a value: only a new one helps"),
    ("nothing", "an approval against going to whoever wrote the request, unless the code is compared"),
    ("nothing", "for secrets of low risk, approvals left to be collected, and standing consents: the machine's key on this disk opens them"),
)
SYNCED = r"(?i)/(dropbox|onedrive|google ?drive|gdrive|nextcloud|owncloud|icloud[^/]*|mobile documents|syncthing|pcloud)(/|$)"
Finding = tuple[str, str, str, str]  # level (problem, risk, note), code, message, hint


def program_findings() -> Iterator[Finding]:
    """Who besides you and root could change the program that asks for your passphrase."""
    for start in (os.path.abspath(__file__), os.path.realpath(sys.executable), os.path.abspath(sys.argv[0])):
        yield from path_findings(start)


def path_findings(path: str) -> Iterator[Finding]:
    """Who may write a file, or any directory above it."""
    while True:
        with contextlib.suppress(OSError):
            facts = os.stat(path)
            if facts.st_uid not in (0, os.geteuid()):
                yield ("problem", "program_of_another", f"{path} belongs to user {facts.st_uid}, who can replace what asks for your passphrase",
                       "install grace for yourself, or as root")  # fmt: skip
            elif facts.st_mode & 0o022 and not facts.st_mode & stat.S_ISVTX:
                yield "problem", "program_writable", f"{path} can be written by others (mode {stat.S_IMODE(facts.st_mode):o})", f"chmod go-w {path}"
        if path == os.path.dirname(path):
            return
        path = os.path.dirname(path)


def machine_findings() -> Iterator[Finding]:
    """What this system lets other programs see."""
    if os.geteuid() == 0:
        yield "risk", "runs_as_root", "you are root, and so is every program of yours: nothing is hidden from them", "use an account of your own"
    for path, bad, code, message, hint in (
        ("/proc/sys/kernel/yama/ptrace_scope", "0", "ptrace", "a program of yours may read the memory of another one that does not protect itself",
         "sysctl kernel.yama.ptrace_scope=1"),
        ("/proc/sys/fs/suid_dumpable", "1", "core_dumps", "the kernel dumps the memory of protected programs, too", "sysctl fs.suid_dumpable=0"),
    ):
        with contextlib.suppress(OSError), open(path, encoding="ascii") as file:
            if file.read().strip() == bad:
                yield "risk", code, message, hint
    with contextlib.suppress(OSError), open("/proc/swaps", encoding="utf-8") as file:
        if len(file.read().splitlines()) > 1:
            yield "note", "swap", "memory may be written to swap, and stay there", "encrypt the swap space"


def place_findings(store: Store, vault: Vault) -> Iterator[Finding]:
    """Where keys and database lie, and what lies beside them."""
    here = [person["name"] for person in active(vault.roster) if os.path.exists(os.path.join(vault.folder, f"{person['name']}.key"))]
    if here:
        yield ("risk", "keys_with_database", f"the key of {' and '.join(here)} lies on the machine and under the user that the requests come from",
               "keep it elsewhere: grace approver export NAME, then grace consent export ID and grace consent import FILE")  # fmt: skip
    for what, path in (("the database", store.path), ("the key files", vault.folder)):
        if re.search(SYNCED, path):
            yield ("problem", "synced_folder", f"{what} lies in a folder that is copied to other machines: {path}",
                   "move it, or leave it out of the synchronisation")  # fmt: skip
    home = os.path.expanduser("~") + os.sep
    if store.path.startswith(home) and vault.folder.startswith(home):
        yield ("risk", "one_backup_set", "database and machine key lie below the same home: a backup of both opens low risk and what waits to be collected",
               f"leave {vault.folder} out of the backup, and keep it by itself")  # fmt: skip
    for folder in {os.path.dirname(store.path), vault.folder}:
        for name in sorted(os.listdir(folder)):
            if re.search(r"(?i)pass(word|phrase|wd)", name):
                yield "risk", "passphrase_file", f"{os.path.join(folder, name)} looks like a passphrase file", "delete it, or keep it on another medium"


def vault_findings(store: Store, vault: Vault) -> Iterator[Finding]:
    if vault.older:
        yield "problem", "rolled_back", "this machine has seen a newer list of approvers", "after a restored copy: grace audit anchor --accept"
    try:
        vault.rules(store)
    except RefusedError as refusal:
        mend = "put back a copy of the database from before, then: grace audit anchor --accept"
        yield ("problem", "rules", f"the rules of governance do not hold, so only low risk opens: {refusal.cause}",
               mend if refusal.hint == RefusedError("").hint else refusal.hint)  # fmt: skip
    log = verify_log(store, vault.roster, {"this machine": vault.seen.audit})
    for finding in log["findings"]:
        yield "problem", "audit", finding, "if a copy was restored: grace audit anchor --accept"
    if len(active(vault.roster)) == 1:
        name = active(vault.roster)[0]["name"]
        yield ("risk", "one_person", f"{name} is all approvers in one person: a lost passphrase is a lost vault, and nobody else has to agree",
               "add one: grace approver add NAME --role user --role governance, then grace secret reshare KEY")  # fmt: skip
    for entry in store.all(CURRENT_SECRETS):
        document = secret_document(vault, entry)
        if not document["verified"] and not vault.rolled_back(store):
            yield "problem", "seal", f"{document['secret_key']} does not verify: somebody has changed it", "store it anew, with a new value"
        for row in store.all(STANDING_OF, key=entry["secret_key"]):
            request = listed_request(row)
            left = "as often as it comes" if row["max_uses"] is None else f"{row['max_uses'] - row['used_count']} more times"
            yield ("note", "standing_consent", f"this machine's key opens {entry['secret_key']} without asking, {left} until "
                   f"{format_instant(row['grant_expires_at'])}: {request['claimed']['action']} by {request['claimed']['by']}",
                   f"take it back: grace consent revoke {row['consent_id']} --reason TEXT")  # fmt: skip
        if entry["rotate_reason"]:
            key = document["secret_key"]
            yield "risk", "rotate", f"{key} should get a new value: {entry['rotate_reason']}", f"grace secret rotate {key}"


def secret_outlook(store: Store, document: Row, keys_here: bool) -> Row:
    """What stands between one secret and a program of the same user, on this machine."""
    low, standing = document["risk_level"] == "low", len(store.all(STANDING_OF, key=document["secret_key"]))
    by_people = f"approvers' passphrases ({document['policy']})" + (f", and the machine's key under {standing} standing" if standing else "")
    return {"secret_key": document["secret_key"], "risk_level": document["risk_level"], "policy": document["policy"], "standing_consents": standing,
            "opened_by": "the machine's key, which lies on this disk" if low else by_people,
            "best_step": "nothing; store it at medium risk if that is too little" if low else "keep the approver's key on another machine or under another user"
            if keys_here else "nothing more here"}  # fmt: skip


# =====================================================================================================================
# queue
# Rows of handlers, tasks and attempts. A task changes by one guarded UPDATE that names the state it is in and, where
# somebody owns it, the attempt; it changes one row or none, and the caller is told. A claim takes the task that comes
# first by priority class, then by deadline, in an order that an index holds.

GET_HANDLER = "SELECT * FROM handlers WHERE name = :name"
LIST_HANDLERS = "SELECT * FROM handlers ORDER BY name"
PUT_HANDLER = """INSERT INTO handlers (name, argv, cwd, env, secrets, external, paused, sla_ms, timeout_ms, kill_after_ms, max_attempts,
    max_recoveries, backoff_ms, concurrency, rescue, warn_at, critical_at, on_critical, created_at, updated_at)
  VALUES (:name, :argv, :cwd, :env, :secrets, :external, :paused, :sla_ms, :timeout_ms, :kill_after_ms, :max_attempts,
    :max_recoveries, :backoff_ms, :concurrency, :rescue, :warn_at, :critical_at, :on_critical, :now, :now)
  ON CONFLICT (name) DO UPDATE SET argv = excluded.argv, cwd = excluded.cwd, env = excluded.env, secrets = excluded.secrets,
    external = excluded.external, sla_ms = excluded.sla_ms, timeout_ms = excluded.timeout_ms, kill_after_ms = excluded.kill_after_ms,
    max_attempts = excluded.max_attempts, max_recoveries = excluded.max_recoveries, backoff_ms = excluded.backoff_ms,
    concurrency = excluded.concurrency, rescue = excluded.rescue, warn_at = excluded.warn_at,
    critical_at = excluded.critical_at, on_critical = excluded.on_critical, adapted_sla_ms = NULL, updated_at = excluded.updated_at"""
SET_SLA = "UPDATE handlers SET sla_ms = :sla_ms, adapted_sla_ms = NULL, updated_at = :now WHERE name = :name"
ADAPT_SLA = """UPDATE handlers SET adapted_sla_ms = :new_ms WHERE name = :name AND sla_ms = :own_ms
  AND COALESCE(adapted_sla_ms, sla_ms) = :old_ms"""
ADAPTED_HANDLERS = "SELECT * FROM handlers WHERE adapted_sla_ms IS NOT NULL"
PAUSE_HANDLER = "UPDATE handlers SET paused = :paused, updated_at = :now WHERE name = :name"
OPEN_OF_HANDLER = """SELECT COALESCE(SUM(n), 0) AS n FROM task_counts
  WHERE handler = :name AND status IN ('queued', 'blocked', 'assigned', 'running')"""

INSERT_TASK = """INSERT INTO htm_tasks (task_id, intent_id, parent_task_id, retry_of, task_type, domain, handler, goal, payload,
    status, reason, priority, order_at, available_at, next_at, aged_at, sla_ms, sla_deadline, warn_at, critical_at, timeout_ms,
    max_attempts, created_at, queued_at, updated_at, updated_by)
  VALUES (:task_id, :intent_id, :parent_task_id, :retry_of, :task_type, :domain, :handler, :goal, :payload,
    :status, :reason, :priority, :order_at, :available_at, :next_at, :queued_at, :sla_ms, :sla_deadline, :warn_at, :critical_at,
    :timeout_ms, :max_attempts, :now, :queued_at, :now, :actor)"""
GET_TASK = "SELECT * FROM htm_tasks WHERE task_id = :id"
RUNNABLE = """SELECT h.name, h.concurrency, h.secrets FROM handlers h WHERE h.paused = 0 AND h.external = 0
  AND EXISTS (SELECT 1 FROM htm_tasks t WHERE t.handler = h.name AND t.status = 'queued' AND t.available_at IS NULL)"""
CLAIMABLE_BY_NAME = "SELECT name, concurrency FROM handlers WHERE name = :name AND paused = 0"
OPEN_ATTEMPTS_OF_HANDLER = """SELECT COUNT(*) AS n FROM htm_task_attempts a CROSS JOIN htm_tasks t -- CROSS so that the few open attempts come first
  WHERE t.task_id = a.task_id AND a.finished_at IS NULL AND t.handler = :name"""
HEADS = """SELECT rank, order_at, seq, task_id FROM htm_tasks t
  WHERE handler = :name AND status = 'queued' AND available_at IS NULL
    AND (retry_of IS NULL OR NOT EXISTS (SELECT 1 FROM htm_task_attempts a WHERE a.task_id = t.retry_of AND a.finished_at IS NULL))
  ORDER BY rank, order_at, seq LIMIT :n"""
TAKE = """UPDATE htm_tasks SET status = 'assigned', reason = NULL, attempt_number = attempt_number + 1, attempt_id = :attempt_id,
    assigned_worker = :worker, assigned_at = :now, updated_at = :now, updated_by = :actor
  WHERE task_id = :task_id AND status = 'queued' AND available_at IS NULL RETURNING *"""
INSERT_ATTEMPT = """INSERT INTO htm_task_attempts (attempt_id, task_id, attempt_number, worker_id, token, lease_ms,
    lease_expires_at, created_at)
  VALUES (:attempt_id, :task_id, :attempt_number, :worker, :token, :lease_ms, :lease_expires_at, :now)"""
START = """UPDATE htm_tasks SET status = 'running', started_at = :now, updated_at = :now, updated_by = :actor,
    queue_time_ms = COALESCE(queue_time_ms, CASE WHEN :now > queued_at THEN :now - queued_at ELSE 0 END)
  WHERE task_id = :task_id AND status = 'assigned' AND attempt_id = :attempt_id
  RETURNING status, started_at, queue_time_ms, updated_at, updated_by, -- and what others may have changed since the claim
    intent_id, priority, priority_reason, next_at, aged_at, escalation_level, sla_met, set_aside"""
START_ATTEMPT = """UPDATE htm_task_attempts SET started_at = :now, pid = :pid, pid_started = :pid_started, boot_id = :boot_id
  WHERE task_id = :task_id AND attempt_id = :attempt_id"""
REQUEUE = """UPDATE htm_tasks SET status = 'queued', reason = :reason, attempt_number = :attempt_number, attempt_id = NULL,
    available_at = :available_at, next_at = :next_at, recoveries = recoveries + :recovered, deaths = deaths + :died, error = :error,
    exit_status = COALESCE(:exit_status, exit_status), execution_time_ms = COALESCE(:execution_ms, execution_time_ms),
    updated_at = :now, updated_by = :actor
  WHERE task_id = :task_id AND status IN ('assigned', 'running') AND attempt_id = :attempt_id RETURNING *"""
UNBLOCK = """UPDATE htm_tasks SET status = 'queued', reason = NULL, next_at = :next_at, updated_at = :now, updated_by = :actor
  WHERE task_id = :task_id AND status = 'blocked' RETURNING *"""
PARK = """UPDATE htm_tasks SET status = 'blocked', reason = 'waiting_consent', next_at = :next_at, updated_at = :now, updated_by = :actor
  WHERE task_id = :task_id AND status = 'queued' AND available_at IS NULL RETURNING *"""
FINISH = """UPDATE htm_tasks SET status = :status, reason = :reason, result = COALESCE(:result, result), error = :error,
    exit_status = COALESCE(:exit_status, exit_status), finished_at = :now, attempt_id = NULL, next_at = NULL, available_at = NULL,
    sla_met = :sla_met, sla_buffer_ms = sla_deadline - :now, execution_time_ms = :execution_ms,
    total_time_ms = CASE WHEN :now > queued_at THEN :now - queued_at ELSE 0 END, updated_at = :now, updated_by = :actor
  WHERE task_id = :task_id AND status = :was AND COALESCE(attempt_id, '') = :attempt_id
  RETURNING status, reason, result, error, exit_status, finished_at, attempt_id, next_at, available_at, sla_met, sla_buffer_ms,
    execution_time_ms, total_time_ms, updated_at, updated_by"""
RAISE_PRIORITY = """UPDATE htm_tasks SET priority = :priority, priority_reason = :why, aged_at = :aged_at, next_at = :next_at,
    updated_at = :now, updated_by = :actor
  WHERE task_id = :task_id AND finished_at IS NULL RETURNING *"""
RAISE_LEVEL = """UPDATE htm_tasks SET escalation_level = :level, priority = :priority, priority_reason = :why, sla_met = :sla_met,
    next_at = :next_at, updated_at = :now, updated_by = :actor
  WHERE task_id = :task_id AND escalation_level = :level - 1 AND finished_at IS NULL RETURNING *"""
SET_PRIORITY = """UPDATE htm_tasks SET priority = :priority, priority_reason = 'command', aged_at = :aged_at, next_at = :next_at,
    updated_at = :now, updated_by = :actor
  WHERE task_id = :task_id AND finished_at IS NULL AND priority <> :priority RETURNING *"""
WAKE = """UPDATE htm_tasks SET available_at = NULL, next_at = :next_at, updated_at = :now, updated_by = :actor
  WHERE task_id = :task_id AND finished_at IS NULL RETURNING *"""
SET_NEXT = "UPDATE htm_tasks SET next_at = :next_at WHERE task_id = :task_id AND finished_at IS NULL"
SET_ASIDE = """UPDATE htm_tasks SET set_aside = :why, next_at = NULL, updated_at = :now, updated_by = :actor
  WHERE task_id = :task_id AND finished_at IS NULL AND set_aside IS NULL"""
SET_PROGRESS = """UPDATE htm_tasks SET progress = :progress WHERE task_id = :task_id AND status = 'running'"""

ATTEMPTS_OF = "SELECT * FROM htm_task_attempts WHERE task_id = :id ORDER BY created_at, attempt_id"
OPEN_ATTEMPT = "SELECT * FROM htm_task_attempts WHERE task_id = :id AND finished_at IS NULL"
OPEN_ATTEMPTS = "SELECT * FROM htm_task_attempts WHERE worker_id = :worker AND finished_at IS NULL ORDER BY created_at"
END_ATTEMPT = """UPDATE htm_task_attempts SET finished_at = :now, outcome = :outcome, ended_by = :ended_by, exit_status = :exit_status,
    error = :error, log_bytes = :log_bytes, log_dropped = :log_dropped
  WHERE task_id = :task_id AND attempt_id = :attempt_id AND finished_at IS NULL"""
STOP_ATTEMPT = """UPDATE htm_task_attempts SET stop_requested = :why
  WHERE task_id = :task_id AND attempt_id = :attempt_id AND finished_at IS NULL"""
RENEW_LEASE = """UPDATE htm_task_attempts SET lease_expires_at = :now + lease_ms
  WHERE task_id = :task_id AND attempt_id = :attempt_id AND finished_at IS NULL AND lease_ms IS NOT NULL RETURNING lease_expires_at"""
EXPIRED_LEASES = """SELECT * FROM htm_task_attempts WHERE finished_at IS NULL AND lease_ms IS NOT NULL AND lease_expires_at <= :now
  ORDER BY lease_expires_at LIMIT :n"""
EXTEND_LEASES = """UPDATE htm_task_attempts SET lease_expires_at = lease_expires_at + :by
  WHERE finished_at IS NULL AND lease_ms IS NOT NULL"""
NEXT_INSTANT = """SELECT MIN(at) AS at FROM (SELECT MIN(next_at) AS at FROM htm_tasks WHERE next_at IS NOT NULL
  UNION ALL SELECT MIN(lease_expires_at) FROM htm_task_attempts WHERE finished_at IS NULL AND lease_ms IS NOT NULL) AS instants"""
ID_LIKE = {
    "task": "SELECT task_id AS id FROM htm_tasks WHERE task_id >= :low AND task_id < :high ORDER BY task_id LIMIT 6",
    "intent": "SELECT intent_id AS id FROM intent_records WHERE intent_id >= :low AND intent_id < :high ORDER BY intent_id LIMIT 6",
}


def find_id(reader: Reader, kind: str, text: str) -> str:
    """The id of a task or an intent from itself or an unambiguous prefix."""
    if not OWN_ID.fullmatch(text):
        raise UsageError(f"{text[:60]!r} is not an id", f"see ids with: grace {kind} list")
    ids = [row["id"] for row in reader.all(ID_LIKE[kind], low=text, high=text[:-1] + chr(ord(text[-1]) + 1))]
    if text in ids or len(ids) == 1:
        return text if text in ids else str(ids[0])
    if ids:
        raise UsageError(f"{text!r} is ambiguous: {', '.join(ids[:5])}{', …' if len(ids) > 5 else ''}", "write more of the id")
    raise NotFoundError(f"there is no {kind} {text!r}", f"see them with: grace {kind} list")


def find_handler(reader: Reader, name: str) -> Row:
    """The handler's row; NotFoundError with the nearest names."""
    row = reader.one(GET_HANDLER, name=name)
    if row is None:
        import difflib

        near = difflib.get_close_matches(name, [other["name"] for other in reader.all(LIST_HANDLERS)], 3, 0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"make it with: grace handler add {name} -- CMD ARGS…"
        raise NotFoundError(f"there is no handler {name!r}", hint)
    return row


def put_handler(tx: Tx, handler: Row, replace: bool) -> Row:
    old = tx.one(GET_HANDLER, name=handler["name"])
    if old and not replace:
        raise ConflictError(f"the handler {handler['name']!r} exists already", "change it with --replace")
    if handler["rescue"]:
        find_handler(tx, handler["rescue"])
    tx.run(PUT_HANDLER, **{**HANDLER_DEFAULTS, **handler}, now=tx.now)
    if old and old["adapted_sla_ms"]:
        tell_adapted(tx, old, handler["sla_ms"], "a person has changed the handler", None)
    return find_handler(tx, handler["name"])


def sla_in_force(handler: Row) -> int | None:
    """What a new task of this handler gets (ms) where nothing else is said."""
    sla: int | None = handler["adapted_sla_ms"] or handler["sla_ms"]
    return sla


def tell_adapted(tx: Tx, handler: Row, new_ms: int | None, reason: str, basis: Row | None) -> None:
    """The event of an SLA that followed its runs, or no longer does. `handler` is its row before the change."""
    emit(tx, "learning.adapted", None, {"handler": handler["name"], "own_sla_ms": handler["sla_ms"], "old_sla_ms": sla_in_force(handler),
                                        "new_sla_ms": new_ms, "reason": reason, "basis": basis})  # fmt: skip


def begin_adaptation(tx: Tx) -> None:
    """Let the next daemon that looks begin at once."""
    unset_setting(tx, "_adapted_at")


def end_adaptation(tx: Tx) -> None:
    """Give all handlers back the SLAs that people have set."""
    for handler in tx.all(ADAPTED_HANDLERS):
        tx.run(SET_SLA, name=handler["name"], sla_ms=handler["sla_ms"], now=tx.now)
        tell_adapted(tx, handler, handler["sla_ms"], "learn.adapt was turned off", None)


def remove_handler(tx: Tx, name: str) -> Row:
    row = find_handler(tx, name)
    if tx.value(OPEN_OF_HANDLER, name=name):
        raise ConflictError(f"the handler {name!r} still has unfinished tasks", f"cancel them, or keep them waiting with: grace handler pause {name}")
    if rescued := tx.value("SELECT name FROM handlers WHERE rescue = :name", name=name):
        raise ConflictError(f"the handler {rescued!r} names {name!r} as its rescue", f"change it first: grace handler add {rescued} --replace …")
    tx.run("DELETE FROM handlers WHERE name = :name", name=name)
    return row


def pause_handler(tx: Tx, name: str, paused: bool) -> Row:
    find_handler(tx, name)
    tx.run(PAUSE_HANDLER, name=name, paused=int(paused), now=tx.now)
    return find_handler(tx, name)


def get_task(reader: Reader, task_id: str) -> Row:
    row = reader.one(GET_TASK, id=task_id)
    if row is None:
        raise NotFoundError(f"there is no task {task_id!r}", "see them with: grace task list")
    return row


def changed_task(tx: Tx, old: Row, sql: str, **params: Any) -> Row:
    """Run one guarded UPDATE … RETURNING on a task and keep the counts; its row, or ConflictError when the task has moved on.

    Of a long row a statement need only return what it changes."""
    changes = tx.one(sql, task_id=old["task_id"], now=tx.now, actor=tx.actor, **params)
    if changes is None:
        raise ConflictError(f"the task {old['task_id']} has changed meanwhile")
    new = {**old, **changes}
    if (old["status"], old["priority"], old["escalation_level"]) != (new["status"], new["priority"], new["escalation_level"]):
        tx.count(old, new)
    return new


def task_row(tx: Tx, **fields: Any) -> Row:
    """What INSERT_TASK needs, with the derived places: order, deadline, first step."""
    row: Row = {
        "intent_id": None, "parent_task_id": None, "retry_of": None, "status": "queued", "reason": None, "available_at": None,
        "warn_at": 0.8, "critical_at": 2.0, "timeout_ms": None, "queued_at": tx.now, "now": tx.now, "actor": tx.actor,
        "escalation_level": 0, "set_aside": None, **fields,
    }  # fmt: skip
    sla, start = row["sla_ms"], row["queued_at"]
    row["sla_deadline"] = None if sla is None else start + sla
    row["order_at"] = start + (UNHURRIED_MS if sla is None else sla)
    row["aged_at"] = start
    return row


def insert_tasks(tx: Tx, rows: list[Row]) -> None:
    age_every = setting(tx, "queue.age_every")
    for row in rows:
        if "next_at" not in row:
            row["next_at"] = next_step_at(row, age_every)
        tx.count(None, row)
    tx.insert(INSERT_TASK, rows)


def first_in_line(tx: Tx, handlers: list[Row], n: int) -> list[str]:
    """The ids of the n tasks that come first among these handlers' tasks, within each one's concurrency."""
    heads: list[Row] = []
    for handler in handlers:
        limit = n
        if handler["concurrency"] is not None:
            limit = min(n, handler["concurrency"] - tx.value(OPEN_ATTEMPTS_OF_HANDLER, name=handler["name"]))
        if limit > 0:
            heads += tx.all(HEADS, name=handler["name"], n=limit)
    heads.sort(key=lambda row: (row["rank"], row["order_at"], row["seq"]))
    return [row["task_id"] for row in heads[:n]]


def take(tx: Tx, task_id: str, worker: str, lease_ms: int | None = None) -> Row | None:
    """Make a queued task this worker's, with a new attempt: the task's row with `attempt_id`, `token`, `lease_expires_at`."""
    attempt: Row = {
        "attempt_id": new_id("att", tx.now), "task_id": task_id, "worker": worker, "token": os.urandom(16).hex(), "lease_ms": lease_ms,
        "lease_expires_at": None if lease_ms is None else tx.now + lease_ms, "now": tx.now,
    }  # fmt: skip
    row = tx.one(TAKE, task_id=task_id, attempt_id=attempt["attempt_id"], worker=worker, now=tx.now, actor=tx.actor)
    if row is None:
        return None
    tx.run(INSERT_ATTEMPT, attempt_number=row["attempt_number"], **attempt)
    tx.count({**row, "status": "queued"}, row)
    return {**row, "token": attempt["token"], "lease_expires_at": attempt["lease_expires_at"]}


def end_attempt_row(tx: Tx, task_id: str, attempt_id: str, ending: Row) -> None:
    tx.run(END_ATTEMPT, task_id=task_id, attempt_id=attempt_id, now=tx.now, outcome=ending["outcome"], ended_by=ending.get("ended_by", "command"),
           exit_status=ending.get("exit_status"), error=ending.get("error"), log_bytes=ending.get("log_bytes", 0),
           log_dropped=ending.get("log_dropped", 0))  # fmt: skip


def next_instant(reader: Reader) -> int | None:
    """When the next step, wake-up or lease is due."""
    instant: int | None = reader.value(NEXT_INSTANT)
    return instant


# =====================================================================================================================
# ladder
# Each open task holds the instant of its next step, so a sweep costs what is due. A step commits together with its
# effect and its event, guarded by the level before it: it happens once, whoever notices it, and in order.

DUE = "SELECT * FROM htm_tasks WHERE next_at <= :now ORDER BY next_at LIMIT :n"
RESCUE_OF = "SELECT * FROM htm_tasks WHERE parent_task_id = :id AND task_type = 'rescue' ORDER BY seq DESC LIMIT 1"
WAITING_RESCUES = """SELECT * FROM htm_tasks WHERE task_type = 'rescue' AND handler IS NULL AND finished_at IS NULL
    AND (status = 'queued' OR (status = 'running' AND assigned_worker = :worker)) ORDER BY seq LIMIT 20"""


def sweep(tx: Tx) -> int:
    """Take all steps that are due now; the number of tasks looked at. A row the ladder cannot reckon with is set aside."""
    due = tx.all(DUE, now=tx.now, n=SWEEP_BATCH)
    age_every = setting(tx, "queue.age_every") if due else 0
    for task in due:
        take_due_steps(tx, task, age_every)
    return len(due)


def take_due_steps(tx: Tx, task: Row, age_every: int, ending: bool = False) -> Row:
    """Bring one open task up to `tx.now`; its row afterwards. A task that is ending gets no rescue any more."""
    why = odd_row(task)
    if why and not task["set_aside"]:
        tx.run(SET_ASIDE, task_id=task["task_id"], why=why, now=tx.now, actor=tx.actor)
        return get_task(tx, task["task_id"])
    for _ in range(100):
        steps = next_steps(task, age_every)
        if not steps or steps[0][0] > tx.now:
            break
        task = take_step(tx, task, steps[0], age_every, ending)
    if not ending:
        tx.run(SET_NEXT, task_id=task["task_id"], next_at=next_step_at(task, age_every))
    return task


def take_step(tx: Tx, task: Row, step: Step, age_every: int, ending: bool) -> Row:
    """One step with its effect and its event; the task's row afterwards."""
    due_at, name = step
    if name == "available":
        return changed_task(tx, task, WAKE, next_at=due_at)
    if name == "ageing":
        above = PRIORITIES[PRIORITIES.index(task["priority"]) - 1]
        return raise_priority(tx, task, above, name, due_at)
    if name.startswith("urgency"):
        return raise_priority(tx, task, "high" if name == "urgency_half" else "critical", name, task["aged_at"])
    return raise_level(tx, task, LEVELS.index(name), due_at, ending)


def raise_priority(tx: Tx, task: Row, priority: str, why: str, aged_at: int) -> Row:
    tx.total("queue_reprioritizations")
    return changed_task(tx, task, RAISE_PRIORITY, priority=raised(task["priority"], priority), why=why, aged_at=aged_at, next_at=tx.now)


def raise_level(tx: Tx, task: Row, level: int, due_at: int, ending: bool) -> Row:
    """Warning, violation or critical: the escalation, the rescue, the event."""
    priority = raised(task["priority"], "high") if level == 2 else task["priority"]
    was_raised = priority != task["priority"]
    task = changed_task(tx, task, RAISE_LEVEL, level=level, priority=priority, next_at=tx.now,
                        why="sla_violated" if was_raised else task["priority_reason"], sla_met=0 if level >= 2 else task["sla_met"])  # fmt: skip
    tx.total(("", "warnings_issued", "escalations_triggered", "criticals_reached")[level])
    if was_raised and task["status"] == "queued":
        tx.total("queue_reprioritizations")
    rescue = None if level < 3 or ending else spawn_rescue(tx, task)
    action = {1: "warned", 2: "escalated", 3: "rescue_spawned" if rescue else "recorded"}[level]
    emit(tx, f"htm.sla.{LEVELS[level]}", task["task_id"], step_payload(tx, task, level, due_at, action, rescue))
    return task


def step_payload(tx: Tx, task: Row, level: int, due_at: int, action: str, rescue_id: str | None) -> Row:
    """What a step's event says. Elapsed and overdue are as of the step itself; lag is how much later it was noticed."""
    elapsed, lag = due_at - task["queued_at"], max(0, tx.now - due_at)
    return {
        "task_id": task["task_id"], "intent_id": task["intent_id"], "task_type": task["task_type"], "domain": task["domain"],
        "level": LEVELS[level], "due_at": due_at, "noticed_at": tx.now, "lag_ms": lag, "late": lag > LATE_MS or due_at < tx.since,
        "sla_ms": task["sla_ms"], "elapsed_ms": elapsed, "elapsed_percent": round(100 * elapsed / task["sla_ms"], 1),
        "overdue_ms": max(0, elapsed - task["sla_ms"]), "overdue_percent": max(0.0, round(100 * elapsed / task["sla_ms"] - 100, 1)),
        "assigned_worker": task["assigned_worker"] if task["attempt_id"] else None, "action": action, "rescue_task_id": rescue_id,
        "message": message_of(LEVELS[level], task, elapsed),
    }  # fmt: skip


def spawn_rescue(tx: Tx, task: Row) -> str | None:
    """The one rescue of a task that has become critical; None where its handler wants none."""
    handler = tx.one(GET_HANDLER, name=task["handler"]) or HANDLER_DEFAULTS
    if handler["on_critical"] == "none":
        return None
    rescuer = tx.one(GET_HANDLER, name=handler["rescue"]) if handler["rescue"] else None
    task_id, goal = new_id("task", tx.now), f"Rescue {task['task_id']}: {task['goal']}"[:2000]
    payload = {"intent_id": task["intent_id"], "task_id": task_id, "goal": goal, "expected_outcome": None,
               "context": {"stuck_task_id": task["task_id"], "stuck_status": task["status"], "stuck_attempt_id": task["attempt_id"],
                           "stuck_worker": task["assigned_worker"], "stuck_payload": json.loads(task["payload"])}}  # fmt: skip
    row = task_row(tx, task_id=task_id, intent_id=task["intent_id"], parent_task_id=task["task_id"], task_type="rescue",
                   domain=task["domain"], handler=rescuer["name"] if rescuer else None, goal=goal, payload=to_json(payload),
                   priority="critical", sla_ms=max(1, task["sla_ms"] // 2),
                   timeout_ms=rescuer["timeout_ms"] if rescuer else None, max_attempts=rescuer["max_attempts"] if rescuer else 1)  # fmt: skip
    insert_tasks(tx, [row])
    tx.total("sub_agents_spawned")
    return task_id


# =====================================================================================================================
# statistics
# Figures that stay fast: what ended is added to its hour in the transaction that ended it, with a histogram of how long
# it took. Hours that are over are summed up once, into days and over kinds and domains, so that a month's percentiles
# cost as little as a day's, however much has happened, and into one sum over all time, which programs that scrape it
# every few seconds can afford to read. `recount` makes all of it again from the tasks.

LOG_BUCKET = math.log(1.04)
ENDED = ("completed", "failed", "timed_out", "cancelled")
METRIC_SUMS = (*ENDED, "sla_met", "sla_missed", "retried", "runs", "queue_ms", "execution_ms", "total_ms", "buffers", "buffer_ms")
ADD_METRICS = f"""INSERT INTO htm_metrics (level, starts_at, task_type, domain, imported, {', '.join(METRIC_SUMS)})
  VALUES (:level, :starts_at, :task_type, :domain, :imported, {', '.join(f':{name}' for name in METRIC_SUMS)})
  ON CONFLICT (level, starts_at, task_type, domain, imported)
  DO UPDATE SET {', '.join(f'{name} = htm_metrics.{name} + excluded.{name}' for name in METRIC_SUMS)}"""
ADD_DURATION = """INSERT INTO htm_durations (level, starts_at, task_type, domain, imported, bucket, n)
  VALUES (:level, :starts_at, :task_type, :domain, :imported, :bucket, :n)
  ON CONFLICT (level, starts_at, task_type, domain, imported, bucket) DO UPDATE SET n = htm_durations.n + excluded.n"""
FOLDED_UNTIL = "SELECT value FROM counters WHERE name = 'metrics_folded_until'"
SET_FOLDED_UNTIL = """INSERT INTO counters (name, value) VALUES ('metrics_folded_until', :at)
  ON CONFLICT (name) DO UPDATE SET value = excluded.value"""
HOURS_OVER = "SELECT * FROM htm_metrics WHERE level = 'hour' AND starts_at >= :since AND starts_at < :until"
DURATIONS_OVER = "SELECT * FROM htm_durations WHERE level = 'hour' AND starts_at >= :since AND starts_at < :until"
HISTOGRAM_OF = """SELECT histogram FROM htm_histograms
  WHERE level = :level AND starts_at = :starts_at AND task_type = :task_type AND domain = :domain"""
SET_HISTOGRAM = """INSERT INTO htm_histograms (level, starts_at, task_type, domain, histogram, runs, p95_ms, longest)
  VALUES (:level, :starts_at, :task_type, :domain, :histogram, :runs, :p95_ms, :longest)
  ON CONFLICT (level, starts_at, task_type, domain)
  DO UPDATE SET histogram = excluded.histogram, runs = excluded.runs, p95_ms = excluded.p95_ms, longest = excluded.longest"""
Histogram = list[tuple[int, int]]  # bucket and how many, in ascending order
MOST_BUCKETS = 1200  # the greatest number that SQLite has lies in the 1113th


def bucket_of(ms: int) -> int:
    """The bucket of a duration: 4 % wide, so that its middle is within 2 % of all that is in it."""
    return int(math.log(ms) / LOG_BUCKET) if ms > 0 else -1


@functools.cache
def bucket_middle(bucket: int) -> float:
    """The duration (ms) that stands for a bucket: of the whole numbers in it, the geometric mean of the least and the greatest."""
    if bucket < 0:
        return 0.0
    low, high = math.ceil(math.exp(bucket * LOG_BUCKET) - 1e-9), math.ceil(math.exp((bucket + 1) * LOG_BUCKET) - 1e-9) - 1
    return round(math.sqrt(low * max(low, high)), 1)


def add_metrics(tx: Tx, task: Row) -> None:
    """Add a task that has just ended to its hour, and to the all-time totals."""
    if task["sla_met"] is not None:
        tx.total("sla_met" if task["sla_met"] else "sla_missed")
    hour = tx.now - tx.now % HOUR
    folded = fold_hours(tx, hour)
    add_sums(tx, hour, task["task_type"], task["domain"], 0, metric_sums(task), folded)
    if task["status"] == "completed" and task["execution_time_ms"] is not None:
        add_duration(tx, hour, task["task_type"], task["domain"], 0, bucket_of(task["execution_time_ms"]), 1, folded)


def metric_sums(task: Row) -> tuple[int, ...]:
    """What one ended task adds, in the order of METRIC_SUMS."""
    status, done = task["status"], task["status"] == "completed"
    ran, buffered = done and task["execution_time_ms"] is not None, done and task["sla_buffer_ms"] is not None
    met = task["sla_met"]
    return (int(done), int(status == "failed"), int(status == "timeout"), int(status == "cancelled"), int(met == 1), int(met == 0),
            int(task["attempt_number"] > 1), int(ran), (task["queue_time_ms"] or 0) if ran else 0, task["execution_time_ms"] if ran else 0,
            (task["total_time_ms"] or 0) if ran else 0, int(buffered), task["sla_buffer_ms"] if buffered else 0)  # fmt: skip


def levels_of(hour: int, task_type: str, domain: str, imported: int, folded: int) -> Iterator[tuple[str, int, str, str, int]]:
    """The rows that something in this hour belongs to now: its hour's, and those of the coarser levels once the hour has been summed up."""
    yield "hour", hour, task_type, domain, imported
    if hour >= folded:
        return
    day = hour - hour % DAY
    yield "day", day, task_type, domain, imported
    yield "ever", 0, task_type, domain, imported
    if not imported:
        yield "hour_domain", hour, "", domain, 0
        yield "hour_all", hour, "", "", 0
        yield "day_all", day, "", "", 0


def add_sums(tx: Tx, hour: int, task_type: str, domain: str, imported: int, sums: tuple[int, ...], folded: int) -> None:
    for key in levels_of(hour, task_type, domain, imported, folded):
        tx.tally(ADD_METRICS, key, *sums)


def add_duration(tx: Tx, hour: int, task_type: str, domain: str, imported: int, bucket: int, n: int, folded: int) -> None:
    tx.tally(ADD_DURATION, ("hour", hour, task_type, domain, imported, bucket), n)
    if hour < folded:
        add_to_day(tx, hour, task_type, domain, imported, bucket, n)
        for key in [] if imported else histograms_of(hour, task_type, domain):
            add_histogram(tx, key, {bucket: n})


def add_to_day(tx: Tx, hour: int, task_type: str, domain: str, imported: int, bucket: int, n: int) -> None:
    tx.tally(ADD_DURATION, ("day", hour - hour % DAY, task_type, domain, imported, bucket), n)


def histograms_of(hour: int, task_type: str, domain: str) -> tuple[tuple[str, int, str, str], ...]:
    """The histograms that a run in this hour belongs to once the hour has been summed up."""
    day = hour - hour % DAY
    return (("ever", 0, task_type, ""), ("day_kind", day, task_type, ""), ("day_all", day, "", ""), ("hour_domain", hour, "", domain),
            ("hour_all", hour, "", ""))  # fmt: skip


def add_histogram(tx: Tx, key: tuple[str, int, str, str], more: dict[int, int]) -> None:
    """Add counts by bucket to a histogram that is kept in one row.

    One that somebody has damaged begins anew: no task may be kept from ending by it, and doctor sees that it is too low."""
    which = dict(zip(("level", "starts_at", "task_type", "domain"), key, strict=True))
    found = tx.value(HISTOGRAM_OF, **which)
    with contextlib.suppress(DatabaseError):
        more = dict(merge_histograms([found] if found else [], more.items()))
    merged = sorted(more.items())
    if merged:
        first, last = merged[0][0], merged[-1][0]
        counts = [0] * (last - first + 1)
        for bucket, n in merged:
            counts[bucket - first] = n
        tx.run(SET_HISTOGRAM, **which, histogram=to_json([first, *counts]), runs=sum(counts), p95_ms=percentile(merged, 0.95), longest=last)


def counts_in(row: str) -> tuple[int, list[int]]:
    """The first bucket of a histogram that is kept in a row, and the counts from it on; DatabaseError when it is none."""
    value = json.loads(row)
    if isinstance(value, list) and 1 < len(value) <= MOST_BUCKETS and set(map(type, value)) == {int}:
        first, *counts = value
        if -1 <= first <= MOST_BUCKETS and min(counts) >= 0 and max(counts) < 1 << 53:
            return first, counts
    raise DatabaseError("a histogram of the statistics has been damaged", "make all figures anew from the tasks: grace doctor --recount")


def merge_histograms(rows: Iterable[str], more: Iterable[tuple[int, int]] = ()) -> Histogram:
    """The sum of histograms that are kept in rows of their own, and of counts by bucket."""
    found, new = [counts_in(row) for row in rows], list(more)
    low = min([*(first for first, _ in found), *(bucket for bucket, _ in new)], default=0)
    sums = [0] * (max([*(first + len(counts) for first, counts in found), *(bucket + 1 for bucket, _ in new)], default=low) - low)
    for first, counts in found:
        span = slice(first - low, first - low + len(counts))
        sums[span] = map(operator.add, sums[span], counts)
    for bucket, n in new:
        sums[bucket - low] += n
    return [(bucket, n) for bucket, n in enumerate(sums, low) if n]


def fold_hours(tx: Tx, hour: int) -> int:
    """Sum up the hours before this one that are not in the coarser levels yet; the instant up to which they are."""
    folded = tx.settings.get("_metrics_folded_until")
    if folded is None:
        folded = tx.settings["_metrics_folded_until"] = int(tx.value(FOLDED_UNTIL) or 0)
    if hour <= folded:
        return folded
    for row in tx.all(HOURS_OVER, since=folded, until=hour):
        for key in levels_of(row["starts_at"], row["task_type"], row["domain"], row["imported"], hour):
            if key[0] != "hour":
                tx.tally(ADD_METRICS, key, *(row[name] for name in METRIC_SUMS))
    durations = tx.all(DURATIONS_OVER, since=folded, until=hour)
    for row in durations:
        add_to_day(tx, row["starts_at"], row["task_type"], row["domain"], row["imported"], row["bucket"], row["n"])
    fold_histograms(tx, durations)
    tx.run(SET_FOLDED_UNTIL, at=hour)
    tx.settings["_metrics_folded_until"] = hour
    return hour


def fold_histograms(tx: Tx, durations: list[Row]) -> None:
    """Add what is counted in rows to the histograms that are kept in one row each."""
    sums: dict[tuple[str, int, str, str], dict[int, int]] = {}
    for row in durations:
        bucket, n = row["bucket"], row["n"]
        for key in () if row["imported"] else histograms_of(row["starts_at"], row["task_type"], row["domain"]):
            counts = sums.setdefault(key, {})
            counts[bucket] = counts.get(bucket, 0) + n
    for key, counts in sums.items():
        add_histogram(tx, key, counts)


SUMMED_UP = """(level = 'day_all' AND starts_at >= :day AND starts_at < :last_day)
  OR (level = 'hour_all' AND starts_at >= :since AND starts_at < :day) OR (level = 'hour_all' AND starts_at >= :last_day AND starts_at < :folded)"""
WINDOW_SUMS = f"""SELECT {', '.join(f'COALESCE(SUM({name}), 0) AS {name}' for name in METRIC_SUMS)} FROM htm_metrics
  WHERE {SUMMED_UP} OR (level = 'hour' AND imported = 0 AND starts_at >= :folded)"""
WINDOW_HISTOGRAMS = f"SELECT histogram FROM htm_histograms WHERE {SUMMED_UP}"
NEW_DURATIONS = """SELECT bucket, SUM(n) AS n FROM htm_durations WHERE level = 'hour' AND imported = 0 AND starts_at >= :folded
  GROUP BY bucket ORDER BY bucket"""


def window_bounds(reader: Reader, since: int) -> dict[str, int]:
    """Which rows make up the time from the full hour `since` on: whole days where there are, hours around them, and what is not summed up yet."""
    since -= since % HOUR
    folded = max(since, int(reader.value(FOLDED_UNTIL) or 0))
    last_day = folded - folded % DAY
    day = since + -since % DAY
    if day >= last_day:  # no whole day in it
        day = last_day = since
    return {"since": since, "day": day, "last_day": last_day, "folded": folded}


def window_histogram(reader: Reader, bounds: dict[str, int]) -> Histogram:
    """How long what completed within the bounds took."""
    rows, new = reader.all(WINDOW_HISTOGRAMS, **bounds), reader.all(NEW_DURATIONS, folded=bounds["folded"])
    return merge_histograms([row["histogram"] for row in rows], [(row["bucket"], row["n"]) for row in new])


def percentile(histogram: Histogram, part: float) -> float | None:
    """The nearest-rank percentile (ms, within 2 %); None where nothing was counted."""
    running = list(itertools.accumulate([n for _, n in histogram]))
    if not running or not running[-1]:
        return None
    return bucket_middle(histogram[bisect_left(running, max(1, math.ceil(part * running[-1] - 1e-9)))][0])


def window_figures(reader: Reader, since: int) -> Row:
    """Averages and percentiles (ms) of what has been completed since then, counted in whole hours; null where nothing was."""
    bounds = window_bounds(reader, since)
    sums = reader.one(WINDOW_SUMS, **bounds) or {}
    durations = window_histogram(reader, bounds)
    runs, buffers, failed = sums["runs"], sums["buffers"], sums["failed"] + sums["timed_out"]
    return {
        "avg_buffer_ms": sums["buffer_ms"] / buffers if buffers else None,
        **{f"avg_{name}_time_ms": sums[f"{name}_ms"] / runs if runs else None for name in ("queue", "execution", "total")},
        **{f"p{part}_execution_ms": percentile(durations, part / 100) for part in (50, 95, 99)},
        "window_since_at": format_instant(bounds["since"]), "window_completed": sums["completed"], "window_failed": failed,
        "window_cancelled": sums["cancelled"], "window_sla_judged": sums["sla_met"] + sums["sla_missed"],
        "window_sla_compliance_rate": part_of(sums["sla_met"], sums["sla_met"] + sums["sla_missed"]),
        "window_success_rate": part_of(sums["completed"], sums["completed"] + failed),
    }  # fmt: skip


def part_of(part: float, whole: float) -> float | None:
    """A ratio, None of nothing."""
    return part / whole if whole else None


HOURLY_NAMES = (*ENDED, "sla_met", "sla_missed", "runs", "execution_ms")
HOURLY_SUMS = f"""SELECT starts_at, domain, {', '.join(HOURLY_NAMES)} FROM htm_metrics
  WHERE level = 'hour_domain' AND starts_at >= :since AND starts_at < :folded ORDER BY starts_at, domain"""
HOURLY_P95 = """SELECT starts_at, domain, p95_ms FROM htm_histograms
  WHERE level = 'hour_domain' AND starts_at >= :since AND starts_at < :folded"""
HOURLY_NEW_SUMS = f"""SELECT starts_at, domain, {', '.join(f'SUM({name}) AS {name}' for name in HOURLY_NAMES)} FROM htm_metrics
  WHERE level = 'hour' AND imported = 0 AND starts_at >= :folded GROUP BY starts_at, domain ORDER BY starts_at, domain"""
HOURLY_NEW = """SELECT starts_at, domain, bucket, SUM(n) AS n FROM htm_durations WHERE level = 'hour' AND imported = 0 AND starts_at >= :folded
  GROUP BY starts_at, domain, bucket ORDER BY starts_at, domain, bucket"""


def hourly_figures(reader: Reader, since: int) -> list[Row]:
    """What ended in each full hour (UTC) from `since` on, by domain; hours in which nothing did are left out."""
    folded = max(since, int(reader.value(FOLDED_UNTIL) or 0))
    p95 = {(row["starts_at"], row["domain"]): row["p95_ms"] for row in reader.all(HOURLY_P95, since=since, folded=folded)}
    new: dict[tuple[int, str], Histogram] = {}
    for row in reader.all(HOURLY_NEW, folded=folded):
        new.setdefault((row["starts_at"], row["domain"]), []).append((row["bucket"], row["n"]))
    p95.update({key: percentile(histogram, 0.95) for key, histogram in new.items()})
    sums = reader.all(HOURLY_SUMS, since=since, folded=folded) + reader.all(HOURLY_NEW_SUMS, folded=folded)
    return [hour_document(row, p95.get((row["starts_at"], row["domain"]))) for row in sums if any(row[name] for name in ENDED)]


def hour_document(row: Row, p95: float | None) -> Row:
    """An hour's figures of a domain, from its sums."""
    failed = row["failed"] + row["timed_out"]
    return {"starts_at": row["starts_at"], "domain": row["domain"], "total": row["completed"] + failed + row["cancelled"], "completed": row["completed"],
            "failed": failed, "cancelled": row["cancelled"], "avg_execution_ms": part_of(row["execution_ms"], row["runs"]),
            "p95_execution_ms": p95, "sla_compliance_rate": part_of(row["sla_met"], row["sla_met"] + row["sla_missed"]),
            "success_rate": part_of(row["completed"], row["completed"] + failed)}  # fmt: skip


USUAL_DAYS = 7
USUAL_HISTOGRAMS = f"""SELECT histogram FROM htm_histograms WHERE level = 'day_kind' AND task_type = :kind AND domain = ''
  AND starts_at IN ({', '.join(f':day - {DAY * n}' for n in range(USUAL_DAYS + 1))})"""
USUAL_NEW = """SELECT bucket, SUM(n) AS n FROM htm_durations WHERE level = 'hour' AND starts_at >= :folded AND task_type = :kind AND imported = 0
  GROUP BY bucket ORDER BY bucket"""


def usual_p95(reader: Reader, kind: str, now: int) -> float | None:
    """The p95 (ms) of what a kind of task took in the last week; None below ten runs."""
    new = reader.all(USUAL_NEW, kind=kind, folded=int(reader.value(FOLDED_UNTIL) or 0))
    week = reader.all(USUAL_HISTOGRAMS, kind=kind, day=now - now % DAY)
    histogram = merge_histograms([row["histogram"] for row in week], [(row["bucket"], row["n"]) for row in new])
    return percentile(histogram, 0.95) if sum(n for _, n in histogram) >= MIN_RUNS else None


LONG_HOURS = """SELECT starts_at, longest FROM htm_histograms WHERE level = 'hour_all' AND starts_at >= :since AND starts_at < :folded AND longest >= :bucket
  UNION ALL SELECT starts_at, MAX(bucket) AS longest FROM htm_durations WHERE level = 'hour' AND starts_at >= :folded AND imported = 0 AND bucket >= :bucket
    GROUP BY starts_at ORDER BY longest DESC"""
LONG_KINDS = """SELECT m.task_type FROM htm_metrics m WHERE m.level = 'hour' AND m.starts_at = :hour AND m.imported = 0 AND m.task_type <> 'rescue'
  AND EXISTS (SELECT 1 FROM htm_durations d WHERE d.level = 'hour' AND d.starts_at = :hour AND d.task_type = m.task_type
    AND d.domain = m.domain AND d.imported = 0 AND d.bucket >= :bucket) GROUP BY m.task_type"""
SLOWEST_OF = f"""SELECT t.* FROM outcome_records o CROSS JOIN htm_tasks t -- CROSS so that the few long outcomes come first
  WHERE t.task_id = o.task_id AND o.handler = :kind AND o.created_at >= :hour AND o.created_at < :hour + {HOUR} AND o.success = 1
    AND o.execution_time >= :seconds ORDER BY o.execution_time DESC LIMIT :n"""
SLOWEST_COMMANDS = SLOWEST_OF.replace("o.handler = :kind", "o.handler IS NULL AND CAST(:kind AS TEXT) = 'command'")


def slowest_tasks(reader: Reader, since: int, n: int) -> list[Row]:
    """The completed tasks that took longest since the full hour of `since`, longest first.

    No index holds tasks by what they took. The histograms tell how long the n-th longest was, in which hours and of which kinds there were
    such runs, and only the outcomes of those kinds in those hours are read."""
    bounds = window_bounds(reader, since)
    histogram = window_histogram(reader, bounds)[::-1]
    total, found = sum(count for _, count in histogram), []
    for wanted in (n, 10 * n, 100 * n):  # there may be fewer than counted: rescues are left out, and rows may have been deleted
        found = longer_tasks(reader, bounds, bucket_of_rank(histogram, wanted), n) if total else []
        if len(found) >= n or wanted >= total:
            break
    return found


def bucket_of_rank(histogram: Histogram, rank: int) -> int:
    """The bucket of the rank-th entry of a histogram, the last one when there are fewer."""
    for bucket, count in histogram:
        rank -= count
        if rank <= 0:
            return bucket
    return histogram[-1][0]


def longer_tasks(reader: Reader, bounds: dict[str, int], bucket: int, n: int) -> list[Row]:
    found: list[Row] = []
    least = math.floor(math.exp(bucket * LOG_BUCKET)) if bucket >= 0 else 0
    for hour in reader.all(LONG_HOURS, bucket=bucket, since=bounds["since"], folded=bounds["folded"]):
        for kind in reader.all(LONG_KINDS, bucket=bucket, hour=hour["starts_at"]):
            sql = SLOWEST_COMMANDS if kind["task_type"] == "command" else SLOWEST_OF
            found += reader.all(sql, kind=kind["task_type"], hour=hour["starts_at"], seconds=least / 1000, n=n)
    return sorted(found, key=lambda row: (-row["execution_time_ms"], row["seq"]))[:n]


EVER_NAMES = (*ENDED, "execution_ms")
EVER_SUMS = f"""SELECT task_type, domain, {', '.join(EVER_NAMES)} FROM htm_metrics WHERE level = 'ever' AND imported = 0
  UNION ALL SELECT task_type, domain, {', '.join(f'SUM({name}) AS {name}' for name in EVER_NAMES)} FROM htm_metrics
    WHERE level = 'hour' AND imported = 0 AND starts_at >= :folded GROUP BY task_type, domain"""
EVER_HISTOGRAMS = "SELECT task_type, histogram FROM htm_histograms WHERE level = 'ever' ORDER BY task_type"
EVER_NEW = """SELECT task_type, bucket, SUM(n) AS n FROM htm_durations WHERE level = 'hour' AND imported = 0 AND starts_at >= :folded
  GROUP BY task_type, bucket ORDER BY task_type, bucket"""


def ever_figures(reader: Reader) -> tuple[list[Row], dict[str, Histogram]]:
    """Of all time: sums by kind and domain, the newest by themselves, and the histogram of each kind. They only ever grow, whatever retention takes away."""
    folded = int(reader.value(FOLDED_UNTIL) or 0)
    rows = {row["task_type"]: [row["histogram"]] for row in reader.all(EVER_HISTOGRAMS)}
    new: dict[str, Histogram] = {}
    for row in reader.all(EVER_NEW, folded=folded):
        new.setdefault(row["task_type"], []).append((row["bucket"], row["n"]))
    histograms = {kind: merge_histograms(rows.get(kind, []), new.get(kind, [])) for kind in {**rows, **new}}
    return reader.all(EVER_SUMS, folded=folded), histograms


TOTALS = "SELECT name, value FROM counters"
STATUS_TOTALS = "SELECT status, n FROM status_totals"
DEPTHS = "SELECT priority, n FROM queue_depths"
OPEN_VIOLATIONS = """SELECT COALESCE(SUM(n), 0) AS n FROM task_counts
  WHERE level >= 2 AND status IN ('queued', 'blocked', 'assigned', 'running')"""
OLDEST_QUEUED = "SELECT MIN(queued_at) AS at FROM htm_tasks WHERE status = 'queued' AND available_at IS NULL"


def queue_counters(reader: Reader, now: int, window: int = DAY) -> Row:
    """The dashboard's counters, all of them kept as they change; averages and percentiles are those of the window."""
    totals = {row["name"]: row["value"] for row in reader.all(TOTALS)}
    status = {row["status"]: row["n"] for row in reader.all(STATUS_TOTALS)}
    met, missed = totals.get("sla_met", 0), totals.get("sla_missed", 0)
    oldest = reader.value(OLDEST_QUEUED)
    return {
        "total_tasks": sum(status.values()), "active_tasks": status.get("assigned", 0) + status.get("running", 0),
        "queued_tasks": status.get("queued", 0), "blocked_tasks": status.get("blocked", 0), "completed_tasks": status.get("completed", 0),
        "failed_tasks": status.get("failed", 0) + status.get("timeout", 0), "cancelled_tasks": status.get("cancelled", 0),
        "sla_compliance_rate": met / (met + missed) if met + missed else None, "active_violations": reader.value(OPEN_VIOLATIONS),
        "total_violations": totals.get("escalations_triggered", 0),
        **window_figures(reader, now - window),
        "queue_depths": {**dict.fromkeys(PRIORITIES, 0), **{row["priority"]: row["n"] for row in reader.all(DEPTHS)}},
        "longest_queued_ms": None if oldest is None else max(0, now - oldest),
        **{name: totals.get(name, 0) for name in ("warnings_issued", "escalations_triggered", "sub_agents_spawned",
                                                  "queue_reprioritizations", "tasks_rescued", "tasks_recovered")},
    }  # fmt: skip


TALLY_TASKS = """SELECT COALESCE(handler, '') AS handler, status, priority, escalation_level AS level, COUNT(*) AS n FROM htm_tasks"""
TALLIED_BY = "GROUP BY COALESCE(handler, ''), status, priority, escalation_level"
RECOUNT_OPEN = f"INSERT INTO task_counts (handler, status, priority, level, n) {TALLY_TASKS} WHERE finished_at IS NULL {TALLIED_BY}"
RECOUNT_ALL = f"INSERT INTO task_counts (handler, status, priority, level, n) {TALLY_TASKS} {TALLIED_BY}"
RECOUNT_HOURS = f"""INSERT INTO htm_metrics (level, starts_at, task_type, domain, imported, {', '.join(METRIC_SUMS)})
  SELECT 'hour', finished_at - finished_at % {HOUR}, task_type, domain, 0, COUNT(*) FILTER (WHERE status = 'completed'),
    COUNT(*) FILTER (WHERE status = 'failed'), COUNT(*) FILTER (WHERE status = 'timeout'), COUNT(*) FILTER (WHERE status = 'cancelled'),
    COUNT(*) FILTER (WHERE sla_met = 1), COUNT(*) FILTER (WHERE sla_met = 0), COUNT(*) FILTER (WHERE attempt_number > 1),
    COUNT(execution_time_ms) FILTER (WHERE status = 'completed'),
    COALESCE(SUM(queue_time_ms) FILTER (WHERE status = 'completed' AND execution_time_ms IS NOT NULL), 0),
    COALESCE(SUM(execution_time_ms) FILTER (WHERE status = 'completed'), 0),
    COALESCE(SUM(total_time_ms) FILTER (WHERE status = 'completed' AND execution_time_ms IS NOT NULL), 0),
    COUNT(sla_buffer_ms) FILTER (WHERE status = 'completed'), COALESCE(SUM(sla_buffer_ms) FILTER (WHERE status = 'completed'), 0)
  FROM htm_tasks WHERE finished_at IS NOT NULL GROUP BY finished_at - finished_at % {HOUR}, task_type, domain"""
RECOUNT_IMPORTED = f"""INSERT INTO htm_metrics (level, starts_at, task_type, domain, imported, {', '.join(METRIC_SUMS)})
  SELECT 'hour', created_at - created_at % {HOUR}, COALESCE(handler, ''), domain, 1, COUNT(*) FILTER (WHERE success = 1), COUNT(*) FILTER (WHERE success = 0),
    0, 0, 0, 0, COUNT(*) FILTER (WHERE CAST(json(context) -> 'metrics' ->> 'attempt_number' AS INTEGER) > 1),
    COUNT(execution_time) FILTER (WHERE success = 1), 0,
    COALESCE(SUM(CAST(ROUND(execution_time * 1000) AS INTEGER)) FILTER (WHERE success = 1), 0),
    COALESCE(SUM(CAST(ROUND(execution_time * 1000) AS INTEGER)) FILTER (WHERE success = 1), 0), 0, 0
  FROM outcome_records WHERE imported = 1 GROUP BY created_at - created_at % {HOUR}, COALESCE(handler, ''), domain"""
RECOUNT_DURATIONS = f"""INSERT INTO htm_durations (level, starts_at, task_type, domain, imported, bucket, n)
  SELECT 'hour', finished_at - finished_at % {HOUR}, task_type, domain, 0, duration_bucket(execution_time_ms), COUNT(*) FROM htm_tasks
  WHERE status = 'completed' AND execution_time_ms IS NOT NULL
  GROUP BY finished_at - finished_at % {HOUR}, task_type, domain, duration_bucket(execution_time_ms)
  UNION ALL SELECT 'hour', created_at - created_at % {HOUR}, COALESCE(handler, ''), domain, 1,
    duration_bucket(CAST(ROUND(execution_time * 1000) AS INTEGER)), COUNT(*)
  FROM outcome_records WHERE imported = 1 AND success = 1 AND execution_time IS NOT NULL
  GROUP BY created_at - created_at % {HOUR}, COALESCE(handler, ''), domain, duration_bucket(CAST(ROUND(execution_time * 1000) AS INTEGER))"""
RECOUNT_TOTALS = """SELECT COUNT(*) FILTER (WHERE finished_at IS NOT NULL AND sla_met = 1) AS sla_met,
    COUNT(*) FILTER (WHERE finished_at IS NOT NULL AND sla_met = 0) AS sla_missed, COUNT(*) FILTER (WHERE escalation_level >= 1) AS warnings_issued,
    COUNT(*) FILTER (WHERE escalation_level >= 2) AS escalations_triggered, COUNT(*) FILTER (WHERE escalation_level >= 3) AS criticals_reached,
    COUNT(*) FILTER (WHERE task_type = 'rescue') AS sub_agents_spawned, COALESCE(SUM(recoveries), 0) AS tasks_recovered,
    COUNT(*) FILTER (WHERE status = 'completed' AND escalation_level >= 3 AND EXISTS (SELECT 1 FROM htm_tasks r
      WHERE r.parent_task_id = t.task_id AND r.task_type = 'rescue')) AS tasks_rescued
  FROM htm_tasks t"""
GAPS_IN_TASKS = "SELECT COUNT(*) < COALESCE(MAX(seq), 0) AS gaps FROM htm_tasks"
GAPS_IN_OUTCOMES = "SELECT COUNT(*) < COALESCE(MAX(seq), 0) AS gaps FROM outcome_records"
COUNTED = ("task_counts", "htm_metrics", "htm_durations", "htm_histograms", "counters")
KIND_OF_ROW = ("level", "starts_at", "task_type", "domain", "imported")
ROWS_COUNTED = {
    "task_counts": (("handler", "status", "priority", "level"), ("n",)), "htm_metrics": (KIND_OF_ROW, METRIC_SUMS),
    "htm_durations": ((*KIND_OF_ROW, "bucket"), ("n",)), "htm_histograms": (KIND_OF_ROW[:4], ("histogram", "runs", "p95_ms", "longest")),
}  # fmt: skip
KEEP_HOURS = f"""SELECT o.starts_at, o.task_type, o.domain, o.imported FROM old_htm_metrics o LEFT JOIN htm_metrics m ON m.level = 'hour'
    AND m.starts_at = o.starts_at AND m.task_type = o.task_type AND m.domain = o.domain AND m.imported = o.imported
  WHERE o.level = 'hour' AND ((o.imported = 0 AND :tasks = 1) OR (o.imported = 1 AND :outcomes = 1))
    AND {' + '.join(f'o.{name}' for name in ENDED)} > COALESCE({' + '.join(f'm.{name}' for name in ENDED)}, 0)"""
SAME_HOUR = "level = 'hour' AND starts_at = :starts_at AND task_type = :task_type AND domain = :domain AND imported = :imported"
KEEP_ENDED = """INSERT INTO task_counts (handler, status, priority, level, n) SELECT handler, status, priority, level, n FROM old_task_counts
  WHERE status IN ('completed', 'failed', 'timeout', 'cancelled')
  ON CONFLICT (handler, status, priority, level) DO UPDATE SET n = excluded.n WHERE excluded.n > task_counts.n"""
SET_TOTAL = """INSERT INTO counters (name, value) VALUES (:name, :value)
  ON CONFLICT (name) DO UPDATE SET value = excluded.value WHERE :gaps = 0 OR excluded.value > counters.value"""
DAYS_COUNTED = "SELECT starts_at FROM htm_metrics WHERE level = 'day_all'"
DAY_OF = f"starts_at - starts_at % {DAY}"
RECOUNT_DAYS = f"""INSERT INTO htm_durations (level, starts_at, task_type, domain, imported, bucket, n)
  SELECT 'day', {DAY_OF}, task_type, domain, imported, bucket, SUM(n) FROM htm_durations
  WHERE level = 'hour' AND starts_at < :folded GROUP BY {DAY_OF}, task_type, domain, imported, bucket"""
COARSER = {  # what the hours are summed up into: its start, its kind, and what tells its rows from each other
    "day": (DAY_OF, "task_type, domain, imported", f"{DAY_OF}, task_type, domain, imported"),
    "ever": ("0", "task_type, domain, imported", "task_type, domain, imported"),
    "hour_domain": ("starts_at", "'', domain, imported", "starts_at, domain, imported"),
    "hour_all": ("starts_at", "'', '', imported", "starts_at, imported"),
    "day_all": (DAY_OF, "'', '', imported", f"{DAY_OF}, imported"),
}


def recount_open(tx: Tx) -> None:
    """Count the open tasks anew."""
    tx.run("DELETE FROM task_counts WHERE status IN ('queued', 'blocked', 'assigned', 'running')")
    tx.run(RECOUNT_OPEN)


def recount(tx: Tx) -> Row:
    """Make counts, rollups and totals again from the tasks and imported outcomes; what differed, with the figures before and after.

    Where rows have been deleted, what they were counted in is only ever raised: it cannot be told from what is wrong."""
    gaps = {"tasks": int(tx.value(GAPS_IN_TASKS)), "outcomes": int(tx.value(GAPS_IN_OUTCOMES))}
    for table in COUNTED:
        tx.run(f"CREATE TEMPORARY TABLE old_{table} AS SELECT * FROM {table}")
    before = counted_figures(tx)
    tx.run("DELETE FROM task_counts")
    tx.run(RECOUNT_ALL)
    recount_rollups(tx, gaps)
    if gaps["tasks"]:
        tx.run(KEEP_ENDED)
    for name, value in (tx.one(RECOUNT_TOTALS) or {}).items():
        tx.run(SET_TOTAL, name=name, value=value, gaps=gaps["tasks"])
    after = counted_figures(tx)
    rows = {table: different_rows(tx, table) for table in ROWS_COUNTED}
    for table in COUNTED:
        tx.run(f"DROP TABLE old_{table}")
    return {"tasks": sum(value for name, value in after.items() if name.startswith("tasks ")), "only_raised": any(gaps.values()), "rows_changed": rows,
            "differences": [{"figure": name, "before": before.get(name, 0), "after": after.get(name, 0)}
                            for name in sorted({*before, *after}) if before.get(name, 0) != after.get(name, 0)]}  # fmt: skip


def recount_rollups(tx: Tx, gaps: dict[str, int]) -> None:
    """The hours from the rows, then the coarser levels from the hours that are over."""
    tx.run("DELETE FROM htm_metrics")
    tx.run("DELETE FROM htm_durations")
    tx.run("DELETE FROM htm_histograms")
    tx.run(RECOUNT_HOURS)
    tx.run(RECOUNT_IMPORTED)
    try:
        tx.con.create_scalar_function("duration_bucket", bucket_in_sql, 1, deterministic=True)
        tx.run(RECOUNT_DURATIONS)
    finally:
        tx.con.create_scalar_function("duration_bucket", None)
    if any(gaps.values()):
        for hour in tx.all(KEEP_HOURS, **gaps):
            for table in ("htm_metrics", "htm_durations"):
                tx.run(f"DELETE FROM {table} WHERE {SAME_HOUR}", **hour)
                tx.run(f"INSERT INTO {table} SELECT * FROM old_{table} WHERE {SAME_HOUR}", **hour)
    folded = int(tx.value(FOLDED_UNTIL) or 0)
    for level, (start, kind, rows) in COARSER.items():
        which = " AND imported = 0" if level.startswith(("hour_", "day_")) else ""
        tx.run(f"""INSERT INTO htm_metrics (level, starts_at, task_type, domain, imported, {', '.join(METRIC_SUMS)})
          SELECT '{level}', {start}, {kind}, {', '.join(f'SUM({name})' for name in METRIC_SUMS)} FROM htm_metrics
          WHERE level = 'hour' AND starts_at < :folded{which} GROUP BY {rows}""", folded=folded)  # fmt: skip
    tx.run(RECOUNT_DAYS, folded=folded)
    for day in tx.all(DAYS_COUNTED):
        fold_histograms(tx, tx.all(DURATIONS_OVER, since=day["starts_at"], until=min(folded, day["starts_at"] + DAY)))


RUNS_COUNTED = """SELECT 'rollup' AS level, COALESCE(SUM(runs), 0) AS n FROM htm_metrics WHERE level = 'ever' AND imported = 0
  UNION ALL SELECT level, SUM(runs) AS n FROM htm_histograms GROUP BY level"""


def figure_findings(reader: Reader) -> Iterator[Finding]:
    """Whether what the statistics are made of holds together."""
    rows = {row["level"]: row["n"] for row in reader.all(RUNS_COUNTED)}
    with contextlib.suppress(DatabaseError):
        merge_histograms(row["histogram"] for row in reader.all(EVER_HISTOGRAMS))
        if len(set(rows.values())) == 1 and (len(rows) == 6 or not rows["rollup"]):  # the rollup's and those of five levels
            return
    yield "problem", "figures", "the statistics do not add up: somebody or something has changed them", "make them anew from the tasks: grace doctor --recount"


def bucket_in_sql(*values: Any) -> int:
    return bucket_of(values[0])


def counted_figures(reader: Reader) -> dict[str, int]:
    """All that is counted, in figures that a person can compare: tasks by status and priority, totals by name, sums of each level of the rollups."""
    figures = {f"tasks {row['status']} {row['priority']} level {row['level']}": row["n"] for row in reader.all(
        "SELECT status, priority, level, SUM(n) AS n FROM task_counts GROUP BY status, priority, level")}  # fmt: skip
    figures.update((f"total {row['name']}", row["value"]) for row in reader.all(TOTALS) if row["name"] != "metrics_folded_until")
    for row in reader.all(f"SELECT level, imported, {', '.join(f'SUM({name}) AS {name}' for name in METRIC_SUMS)} FROM htm_metrics GROUP BY level, imported"):
        figures.update((f"rollup {row['level']}{' imported' if row['imported'] else ''} {name}", row[name]) for name in METRIC_SUMS)
    for row in reader.all("SELECT level, imported, SUM(n) AS n FROM htm_durations GROUP BY level, imported"):
        figures[f"histogram {row['level']}{' imported' if row['imported'] else ''} runs"] = row["n"]
    figures.update((f"histogram {row['level']} runs", row["n"]) for row in reader.all("SELECT level, SUM(runs) AS n FROM htm_histograms GROUP BY level"))
    return figures


def different_rows(reader: Reader, table: str) -> int:
    """How many rows of a table are not as they were: gone, new or changed."""
    key, values = ROWS_COUNTED[table]
    which = " WHERE n <> 0" if values == ("n",) else ""
    both, same = " AND ".join(f"t.{name} = o.{name}" for name in key), " AND ".join(f"t.{name} = o.{name}" for name in values)
    row = reader.one(f"""SELECT (SELECT COUNT(*) FROM {table}{which}) + (SELECT COUNT(*) FROM old_{table}{which}) - COUNT(*)
      - COUNT(*) FILTER (WHERE {same}) AS n FROM (SELECT * FROM old_{table}{which}) o CROSS JOIN {table} t WHERE {both}{' AND t.n <> 0' if which else ''}""")
    return int(row["n"]) if row else 0


# =====================================================================================================================
# learning
# What came of each task, written once, in the transaction that ended it, and of runs elsewhere that were imported. What
# later decisions about deadlines rest on: suggested and adapted SLAs, statistics, and what other thresholds would do.

INSERT_OUTCOME = """INSERT INTO outcome_records (task_id, intent_id, action_type, handler, domain, success, confidence_score,
    execution_time, context, created_at)
  VALUES (:task_id, :intent_id, :action_type, :handler, :domain, :success,
    (SELECT confidence FROM intent_records WHERE intent_id = :intent_id), :execution_time, :context, :now) RETURNING confidence_score"""
STARTS_OF = "SELECT COUNT(*) AS n FROM htm_task_attempts WHERE task_id = :id"
NOTE_SLEEP = "INSERT INTO suspensions (woke_at, asleep_ms) VALUES (:now, :asleep)"
HAS_DEPENDENCIES = "SELECT 1 AS known FROM task_dependencies WHERE task_id = :id LIMIT 1"
UNBLOCKED_AT = """SELECT created_at FROM events WHERE subject = :id AND topic = 'htm.task.update'
  AND json(payload) ->> 'previous_status' = 'blocked' ORDER BY seq LIMIT 1"""
LAST_WOKE = "SELECT COALESCE(MAX(woke_at), 0) AS at FROM suspensions"
ASLEEP_SINCE = "SELECT COALESCE(SUM(asleep_ms), 0) AS ms FROM suspensions WHERE woke_at >= :since"
OUTCOME_OF = "SELECT 1 AS known FROM outcome_records WHERE task_id = :id"


def as_truth(value: int | None) -> bool | None:
    return None if value is None else bool(value)


def unusual_metrics(tx: Tx, task: Row) -> Row:
    """What most runs have none of, and is not asked for where the row tells: starts that came to nothing, time (ms) asleep, and time that it waited
    for other intents."""
    found: Row = {}
    if task["attempt_number"] != 1 or task["started_at"] is None or task["started_at"] - task["queued_at"] != task["queue_time_ms"]:
        found["interruptions"] = tx.value(STARTS_OF, id=task["task_id"]) - task["attempt_number"]
    if (task["queue_time_ms"] or 0) >= SECOND and tx.one(HAS_DEPENDENCIES, id=task["task_id"]):
        found["blocked_ms"] = max(0, int(tx.value(UNBLOCKED_AT, id=task["task_id"]) or 0) - task["queued_at"])
    if "_woke_at" not in tx.settings:
        tx.settings["_woke_at"] = tx.value(LAST_WOKE)
    if tx.settings["_woke_at"] >= task["queued_at"]:
        found["asleep_ms"] = tx.value(ASLEEP_SINCE, since=task["queued_at"])
        found["asleep_running_ms"] = tx.value(ASLEEP_SINCE, since=task["started_at"]) if task["started_at"] else 0
    return {name: value for name, value in found.items() if value > 0}


TALLY_OUTCOME = """INSERT INTO outcome_tallies (starts_at, task_type, domain, kind, word, n, succeeded, total, squared)
  VALUES (:hour, :task_type, :domain, :kind, :word, :n, :succeeded, :total, :squared)
  ON CONFLICT (starts_at, task_type, domain, kind, word) DO UPDATE SET n = outcome_tallies.n + excluded.n,
    succeeded = outcome_tallies.succeeded + excluded.succeeded, total = outcome_tallies.total + excluded.total,
    squared = outcome_tallies.squared + excluded.squared"""
MILLION = 1_000_000


def context_of(text: str) -> Row:
    """The context of an outcome, with its measures as whole numbers; of one that somebody else has written anything may be missing."""
    value = json.loads(text)
    context: Row = value if isinstance(value, dict) else {}
    metrics = context.get("metrics")
    named = metrics.items() if isinstance(metrics, dict) else ()
    numbers = {name: round(n) for name, n in named if isinstance(n, (int, float)) and abs(n) <= MAX_INSTANT}
    return {"goal": None, "reason": None, **context, "metrics": numbers}


def tally_outcome(tx: Tx, hour: int, task_type: str, domain: str, confidence: float | None, context: Row) -> None:
    """Count what is out of the ordinary about an outcome; a success in one go, without stated confidence, is not."""
    metrics, status, success = context["metrics"], context["status"], int(context["status"] == "completed")
    key = (hour, task_type, domain)
    if status == "cancelled":
        return
    if not success:
        tx.tally(TALLY_OUTCOME, (*key, "failure", failure_word(context)), 1, 0, 0, 0)
    if confidence is not None:
        error = round((confidence - success) ** 2 * MILLION)
        tx.tally(TALLY_OUTCOME, (*key, "confidence", str(min(9, int(confidence * 10)))), 1, success, round(confidence * MILLION), error)
    if metrics.get("attempt_number", 1) != 1:
        tx.tally(TALLY_OUTCOME, (*key, "attempts", str(metrics["attempt_number"])), 1, success, metrics["attempt_number"], 0)
    if success and metrics.get("execution_time_ms") is not None:
        correct_durations(tx, key, metrics)


OLD_TALLIES = "CREATE TEMPORARY TABLE old_outcome_tallies AS SELECT * FROM outcome_tallies"
ODD_OUTCOMES = """SELECT seq, success, COALESCE(handler, 'command') AS task_type, domain, created_at, confidence_score, context FROM outcome_records
  WHERE seq > :seq AND (success = 0 OR confidence_score IS NOT NULL OR CAST(json(context) -> 'metrics' ->> 'attempt_number' AS INTEGER) <> 1
    OR json(context) -> 'metrics' ->> 'interruptions' IS NOT NULL OR json(context) -> 'metrics' ->> 'asleep_running_ms' IS NOT NULL)
  ORDER BY seq LIMIT :n"""
CHANGED_TALLIES = """SELECT COUNT(*) AS n FROM (SELECT * FROM (SELECT * FROM outcome_tallies EXCEPT SELECT * FROM old_outcome_tallies) AS added
  UNION ALL SELECT * FROM (SELECT * FROM old_outcome_tallies EXCEPT SELECT * FROM outcome_tallies) AS gone) AS changed"""


def retally(tx: Tx) -> int:
    """Make the tallies again from the outcomes, unless some of these are gone; how many rows were changed."""
    if tx.value(GAPS_IN_OUTCOMES):
        return 0
    tx.run(OLD_TALLIES)
    tx.run("DELETE FROM outcome_tallies")
    seq = 0
    while page := tx.all(ODD_OUTCOMES, seq=seq, n=PAGE):
        for row in page:
            context = {"status": "completed" if row["success"] else "failed", **context_of(row["context"])}
            tally_outcome(tx, row["created_at"] - row["created_at"] % HOUR, row["task_type"], row["domain"], row["confidence_score"], context)
        tx.flush()
        seq = page[-1]["seq"]
    changed = int(tx.value(CHANGED_TALLIES))
    tx.run("DROP TABLE old_outcome_tallies")
    return changed


def recount_all(tx: Tx) -> Row:
    """All that is counted, made again from what it was counted from; what differed."""
    told = recount(tx)
    told["rows_changed"]["outcome_tallies"] = retally(tx)
    tx.run("DELETE FROM handler_forecasts")  # summed up again when they are next asked for
    return told


def failure_word(context: Row) -> str:
    """Why something did not succeed: the reason, else the exit status, else the status."""
    return str(context.get("reason") or (f"exit {context['exit_status']}" if context.get("exit_status") else context.get("status", "failed")))


def correct_durations(tx: Tx, key: tuple[int, str, str], metrics: Row) -> None:
    """Note what execution statistics are to leave out of htm_durations: runs that were interrupted, and time asleep."""
    ran, asleep, interrupted = metrics["execution_time_ms"], metrics.get("asleep_running_ms", 0), metrics.get("interruptions", 0)
    if asleep or interrupted:
        tx.tally(TALLY_OUTCOME, (*key, "duration", str(bucket_of(ran))), -1, 0, -ran, 0)
    if asleep and not interrupted:
        awake = max(0, ran - asleep)
        tx.tally(TALLY_OUTCOME, (*key, "duration", str(bucket_of(awake))), 1, 0, awake, 0)


def record_outcome(tx: Tx, task: Row) -> None:
    """The outcome of a task that has just ended, and its event."""
    metrics = {name: task[name] for name in ("queue_time_ms", "execution_time_ms", "total_time_ms", "attempt_number", "sla_buffer_ms")}
    metrics.update(unusual_metrics(tx, task))
    context = {"intent_id": task["intent_id"], "goal": task["goal"], "status": task["status"], "reason": task["reason"],
               "sla_met": as_truth(task["sla_met"]), "metrics": metrics}  # fmt: skip
    context.update({name: task[name] for name in ("escalation_level", "exit_status") if task[name]})
    success, seconds = int(task["status"] == "completed"), task["execution_time_ms"] and task["execution_time_ms"] / 1000
    confidence = tx.value(INSERT_OUTCOME, task_id=task["task_id"], intent_id=task["intent_id"], action_type=f"intent_{task['domain']}",
                          handler=task["handler"], domain=task["domain"], success=success, context=to_json(context), now=tx.now,
                          execution_time=seconds)  # fmt: skip
    tally_outcome(tx, tx.now - tx.now % HOUR, task["task_type"], task["domain"], confidence, context)
    emit(tx, "learning.outcome", task["task_id"], {
        "task_id": task["task_id"], "intent_id": task["intent_id"], "handler": task["handler"], "domain": task["domain"],
        "success": bool(success), "sla_met": as_truth(task["sla_met"]), **metrics})  # fmt: skip


# What counts as a run for learning is decided here, and nowhere else: sla_time() for deadlines, correct_durations() above
# for the statistics of execution times.

RUNS_LOOKED_AT = 10_000  # outcomes among which the latest runs are looked for: of handlers failed ones, too
HISTORY_PAGE = """SELECT seq, created_at, domain, success, execution_time, context FROM outcome_records
  WHERE handler = :handler AND created_at <= :at AND (created_at < :at OR seq < :seq)
  ORDER BY created_at DESC, seq DESC LIMIT :n"""
COMMAND_OUTCOMES = """SELECT created_at, success, execution_time, context FROM outcome_records
  WHERE handler IS NULL AND domain = :domain AND json(context) ->> 'goal' = :goal AND created_at >= :since AND success = 1
  ORDER BY created_at DESC, seq DESC LIMIT :n"""
NEXT_NAME = "SELECT MIN(handler) AS name FROM outcome_records WHERE handler > :after"
PAGE = 2000


def sla_time(outcome: Row) -> int | None:
    """What a recorded run says about deadlines (ms): the time that its SLA clock measured, less what the machine slept of it.

    None for what says nothing: one that failed, that a shutdown or a crash interrupted, or whose time is not known. Imported runs
    have no queue, so that theirs is the time that they ran."""
    metrics = context_of(outcome["context"])["metrics"]
    if not outcome["success"] or metrics.get("interruptions"):
        return None
    total = metrics.get("total_time_ms")
    if total is None and outcome["execution_time"] is not None:
        total = (metrics.get("queue_time_ms") or 0) + round(outcome["execution_time"] * 1000)
    return None if total is None else max(0, round(total - metrics.get("asleep_ms", 0) - metrics.get("blocked_ms", 0)))


def outcomes_of(reader: Reader, handler: str, most: int) -> Iterator[Row]:
    """The outcomes of a handler, newest first, a page at a time."""
    at, seq = MAX_INSTANT + 1, 0
    while most > 0:
        page = reader.all(HISTORY_PAGE, handler=handler, at=at, seq=seq, n=min(PAGE, most))
        yield from page
        if len(page) < min(PAGE, most):
            return
        most -= len(page)
        at, seq = page[-1]["created_at"], page[-1]["seq"]


def latest_runs(outcomes: Iterable[Row], n: int) -> list[Run]:
    """The n latest runs among outcomes that come newest first, in the order of their ends."""
    runs: list[Run] = []
    for outcome in outcomes:
        if len(runs) == n:
            break
        ms = sla_time(outcome)
        if ms is not None:
            runs.append((outcome["created_at"], ms))
    runs.reverse()
    return runs


def runs_of(reader: Reader, handler: str) -> list[Run]:
    """The runs that decisions about a handler's deadlines rest on."""
    return latest_runs(outcomes_of(reader, handler, RUNS_LOOKED_AT), MAX_RUNS)


def runs_of_command(reader: Reader, domain: str, goal: str) -> list[Run]:
    """Those for a command in the foreground, which has no name: earlier ones of the same domain and goal, which by default is its own words."""
    return latest_runs(reader.all(COMMAND_OUTCOMES, domain=domain, goal=goal, since=0, n=RUNS_LOOKED_AT), MAX_RUNS)


def recorded_names(reader: Reader) -> Iterator[str]:
    """The handlers that have outcomes, those that are gone by now included."""
    name = reader.value(NEXT_NAME, after="")
    while name is not None:
        yield name
        name = reader.value(NEXT_NAME, after=name)


def refuse_commands(name: str) -> None:
    """UsageError for the kind that all commands in the foreground have: they are learned from by what they do."""
    if name == "command":
        raise UsageError("commands of `grace run` are told apart by their domain and goal, not by a handler", "let grace find it: grace run --sla auto -- CMD")


def sla_suggestion(reader: Reader, name: str, rate: float, now: int) -> Row:
    """The SLA that a handler's runs ask for, with its basis; sla_ms is null and `missing_runs` above 0 where they are too few."""
    runs = runs_of(reader, name)
    handler = reader.one(GET_HANDLER, name=name)
    basis = suggest_sla(runs, rate, now) or {"sla_ms": None, "runs": len(runs), "percentile": round(100 * rate, 6), "quantile_ms": None, "margin": None,
                                             "span_ms": None, "first_at": None, "last_at": None}  # fmt: skip
    return {"handler": name, **basis, "missing_runs": max(0, MIN_RUNS - len(runs)), "current_sla_ms": handler and sla_in_force(handler),
            "is_handler": handler is not None}  # fmt: skip


def auto_sla(runs: list[Run], rate: float, at: int) -> Row | None:
    """The SLA for one submission that begins at `at`: what a run at that time of the day keeps, at a rate as cautious as the runs are few."""
    cautious = cautious_rate(rate, max(1, len(runs)))
    ms = predict_duration(runs, cautious, at)
    if ms is None:
        return None
    return {"sla_ms": round_up(ms), "runs": len(runs), "percentile": round(100 * rate, 6), "cautious_percentile": round(100 * cautious, 2),
            "span_ms": runs[-1][0] - runs[0][0], "hour": at // HOUR % 24}  # fmt: skip


def apply_suggestion(tx: Tx, basis: Row, rate: float) -> Row:
    """Make a suggested SLA the handler's own; its row."""
    handler = find_handler(tx, basis["handler"])
    tx.run(SET_SLA, name=handler["name"], sla_ms=basis["sla_ms"], now=tx.now)
    emit(tx, "learning.applied", None, {"handler": handler["name"], "old_sla_ms": sla_in_force(handler), "new_sla_ms": basis["sla_ms"],
                                        "reason": adapted_reason(basis, rate), "basis": basis_facts(basis)})  # fmt: skip
    return find_handler(tx, handler["name"])


BASIS = ("sla_ms", "runs", "percentile", "quantile_ms", "margin", "span_ms", "first_at", "last_at")


def basis_facts(basis: Row) -> Row:
    """What an event says of a suggestion, with instants as text, since they lie deeper than those that are shown so."""
    return {name: format_instant(basis[name]) if name.endswith("_at") else basis[name] for name in BASIS}


def adapted_reason(basis: Row, rate: float) -> str:
    return f"{basis['runs']} runs in {format_duration(basis['span_ms'])}, of which {100 * rate:g} % kept {format_duration(basis['quantile_ms'])}"


HANDLERS_WITH_SLA = "SELECT * FROM handlers WHERE sla_ms IS NOT NULL ORDER BY name"


def adaptation_due(reader: Reader, now: int) -> bool:
    """Whether handlers' SLAs are to be compared with their runs; a clock that was set back does not put it off."""
    if not setting(reader, "learn.adapt"):
        return False
    last = int(reader.value(GET_SETTING, name="_adapted_at") or 0)
    return not last <= now < last + setting(reader, "learn.adapt_every")


def begin_adapting(tx: Tx) -> list[str]:
    """The handlers to look at now, if nobody else has begun to meanwhile."""
    if not adaptation_due(tx, tx.now):
        return []
    set_setting(tx, "_adapted_at", tx.now)
    return [row["name"] for row in tx.all(HANDLERS_WITH_SLA)]


def wanted_adaptation(reader: Reader, name: str, now: int) -> Row | None:
    """The handler's row with new_ms, the reason and the basis when its SLA is to change. It takes a while: not for a transaction."""
    rate, low, high = (ratio_setting(reader, f"learn.{word}") for word in ("rate", "adapt_low", "adapt_high"))
    handler, basis = reader.one(GET_HANDLER, name=name), sla_suggestion(reader, name, rate, now)
    before = None if handler is None else sla_in_force(handler)
    if handler is None or before is None or handler["sla_ms"] is None or basis["sla_ms"] is None:
        return None
    new = adapted_sla(handler["sla_ms"], before, basis["sla_ms"], low, high)
    if new is None:
        return None
    held = "" if new == basis["sla_ms"] else f"; held at {new / handler['sla_ms']:g} times the SLA of {format_duration(handler['sla_ms'])}"
    return {**handler, "new_ms": new, "why": adapted_reason(basis, rate) + held, "basis": basis_facts(basis)}


def adapt(tx: Tx, change: Row) -> bool:
    """Put a change into force if it still fits what is there, with its event."""
    if not setting(tx, "learn.adapt") or not tx.run(ADAPT_SLA, name=change["name"], own_ms=change["sla_ms"], old_ms=sla_in_force(change),
                                                    new_ms=change["new_ms"]):  # fmt: skip
        return False
    tell_adapted(tx, change, change["new_ms"], change["why"], change["basis"])
    return True


# ---- runs from elsewhere

IMPORT_OUTCOME = """INSERT INTO outcome_records (task_id, intent_id, action_type, handler, domain, success, confidence_score, execution_time,
    context, created_at, imported)
  SELECT CAST(:task_id AS TEXT), NULL, :action_type, :name, :domain, CAST(:success AS INTEGER), CAST(:confidence AS REAL), CAST(:seconds AS REAL),
    CAST(:context AS TEXT), CAST(:end AS INTEGER), 1
  WHERE NOT EXISTS (SELECT 1 FROM outcome_records WHERE task_id = :task_id)"""
IMPORT_KEYS = ("name", "start", "end", "success", "domain", "goal", "confidence", "reason", "attempts")
IMPORT_PIECE = 5000  # runs after which sums are written, so that memory stays bounded, and a sign of life is given


def parse_moment(what: str, value: Any) -> int:
    """Milliseconds since 1970 from RFC 3339 with an offset, or from a number of seconds; ValueError otherwise."""
    if isinstance(value, str):
        try:
            at = parse_instant(value)
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from None
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MAX_INSTANT / 1000:
        at = round(value * 1000)
    else:
        raise ValueError(f"{what} is an instant with its offset, such as \"2026-11-22T07:08:19Z\", or a number of seconds since 1970")
    if at < 0 or (not isinstance(value, str) and value < 0):
        raise ValueError(f"{what} lies before 1970")
    return at


def past_run(values: Any, domain: str, now: int) -> Row:
    """One past run from a line of a log; ValueError that says what is wrong with it. `domain` is for lines that name none."""
    if not isinstance(values, dict):
        raise ValueError("is not a JSON object")
    if unknown := next((key for key in values if key not in IMPORT_KEYS), None):
        raise ValueError(f"the key {unknown[:60]!r} is unknown; there are {', '.join(IMPORT_KEYS)}")
    if missing := next((key for key in IMPORT_KEYS[:4] if key not in values), None):
        raise ValueError(f"has no {missing}")
    run: Row = {"name": past_name("name", values["name"]), "domain": past_name("domain", values.get("domain", domain)),
                "start": parse_moment("start", values["start"]), "end": parse_moment("end", values["end"])}  # fmt: skip
    if run["name"] in ("command", "rescue"):
        raise ValueError(f"name: {run['name']!r} is a kind of task of grace's own")
    if run["end"] < run["start"]:
        raise ValueError(f"ends ({format_instant(run['end'])}) before it starts ({format_instant(run['start'])})")
    if run["end"] > now:
        raise ValueError(f"ends in the future ({format_instant(run['end'])}); is its offset right?")
    if run["end"] - run["start"] > MAX_DURATION:
        raise ValueError("takes longer than ten years")
    return {**run, **past_facts(values)}


def past_name(key: str, value: Any) -> str:
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise ValueError(f"{key} is 1 to 64 of A–Z a–z 0–9 _ . -, not {str(value)[:60]!r}")
    return value


def past_facts(values: Row) -> Row:
    """What a line says of a run besides its name and times."""
    success, confidence, attempts = values["success"], values.get("confidence"), values.get("attempts", 1)
    if not isinstance(success, bool):
        raise ValueError("success is true or false")
    if confidence is not None and (isinstance(confidence, bool) or not isinstance(confidence, (int, float)) or not 0 <= confidence <= 1):
        raise ValueError("confidence is a number from 0 to 1")
    if isinstance(attempts, bool) or not isinstance(attempts, int) or not 1 <= attempts <= 1000:
        raise ValueError("attempts is a whole number from 1 to 1000")
    texts = {key: values.get(key) for key in ("goal", "reason")}
    for key, text in texts.items():
        if text is not None:
            if not isinstance(text, str):
                raise ValueError(f"the {key} is a text")
            check_text(text, f"the {key}", 2000 if key == "goal" else 200)
    return {"success": success, "confidence": None if confidence is None else float(confidence), "attempts": attempts, **texts}


def past_id(run: Row) -> str:
    """A run's id from what it says, so that it is known again; sortable by its end."""
    import hashlib

    return f"run_{_base32(run['end'])}{hashlib.sha256(to_json([run[key] for key in IMPORT_KEYS]).encode()).hexdigest()[:20]}"


def import_runs(tx: Tx, runs: Iterable[Row], note: Callable[[int], None]) -> Row:
    """Add past runs to outcomes and sums, each once whatever was imported before; how many were added, and how many known."""
    folded, added, known, names, edges = fold_hours(tx, tx.now - tx.now % HOUR), 0, 0, dict[str, int](), [MAX_INSTANT, 0]
    for number, run in enumerate(runs, 1):
        if import_run(tx, run, folded):
            added += 1
            names[run["name"]] = names.get(run["name"], 0) + 1
            edges = [min(edges[0], run["start"]), max(edges[1], run["end"])]
        else:
            known += 1
        if number % IMPORT_PIECE == 0:
            tx.flush()
            note(number)
    most = sorted(names, key=lambda name: -names[name])[:20]
    report = {"added": added, "known": known, "names": len(names), "largest": [{"name": name, "runs": names[name]} for name in most],
              "first_at": edges[0] if added else None, "last_at": edges[1] if added else None}  # fmt: skip
    if added:
        emit(tx, "learning.imported", None, report)
    return report


def import_run(tx: Tx, run: Row, folded: int) -> bool:
    """Whether it was new."""
    ms, success = run["end"] - run["start"], int(run["success"])
    context = {"intent_id": None, "goal": run["goal"] or run["name"], "status": "completed" if success else "failed", "reason": run["reason"], "sla_met": None,
               "metrics": {"execution_time_ms": ms, "attempt_number": run["attempts"]}}  # fmt: skip
    if not tx.run(IMPORT_OUTCOME, task_id=run["id"], action_type=f"intent_{run['domain']}", name=run["name"], domain=run["domain"], success=success,
                  confidence=run["confidence"], seconds=ms / 1000, context=to_json(context), end=run["end"]):  # fmt: skip
        return False
    hour = run["end"] - run["end"] % HOUR
    ended = {"status": context["status"], "sla_met": None, "sla_buffer_ms": None, "attempt_number": run["attempts"], "queue_time_ms": 0,
             "execution_time_ms": ms, "total_time_ms": ms}  # fmt: skip
    add_sums(tx, hour, run["name"], run["domain"], 1, metric_sums(ended), folded)
    if success:
        add_duration(tx, hour, run["name"], run["domain"], 1, bucket_of(ms), 1, folded)
    tally_outcome(tx, hour, run["name"], run["domain"], run["confidence"], context)
    return True


# ---- what the outcomes say

KIND_FILTER = """ AND task_type <> 'rescue' AND (CAST(:handler AS TEXT) IS NULL OR task_type = :handler)
  AND (CAST(:domain AS TEXT) IS NULL OR domain = :domain)"""
HOUR_SUMS = ("completed", "failed", "timed_out", "cancelled", "runs", "execution_ms")
STATS_HOURS = f"""SELECT task_type, domain, (starts_at / {HOUR} + 72) % 168 AS slot, imported, MIN(starts_at) AS first_at, MAX(starts_at) AS last_at,
    {', '.join(f'SUM({name}) AS {name}' for name in HOUR_SUMS)}
  FROM htm_metrics WHERE level = 'hour' AND starts_at >= :since{KIND_FILTER} GROUP BY task_type, domain, slot, imported"""
STATS_DURATIONS = f"""WITH spans AS MATERIALIZED (SELECT task_type AS name, (MIN(starts_at) + MAX(starts_at)) / 2 AS middle FROM htm_metrics
    WHERE level = 'hour' AND starts_at >= :since{KIND_FILTER} GROUP BY task_type)
  SELECT task_type, domain, bucket, CASE WHEN starts_at > middle THEN 1 ELSE 0 END AS late, SUM(n) AS n
  FROM htm_durations JOIN spans ON name = task_type
  WHERE ((level = 'day' AND starts_at >= :day AND starts_at < :last_day) OR (level = 'hour' AND starts_at >= :since AND starts_at < :day)
    OR (level = 'hour' AND starts_at >= :last_day)){KIND_FILTER} GROUP BY task_type, domain, bucket, late"""
STATS_TALLIES = f"""SELECT task_type, domain, kind, word, SUM(n) AS n, SUM(succeeded) AS succeeded, SUM(total) AS total, SUM(squared) AS squared
  FROM outcome_tallies WHERE starts_at >= :since AND kind <> 'duration'{KIND_FILTER} GROUP BY task_type, domain, kind, word"""
STATS_CORRECTIONS = f"""SELECT starts_at, task_type, domain, word, n, total FROM outcome_tallies
  WHERE starts_at >= :since AND kind = 'duration'{KIND_FILTER}"""
WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
TREND_RUNS = 5  # in each half, below which no trend is told


class Facts:
    """The sums for one line of statistics, filled from rows and read by stats_document()."""

    def __init__(self) -> None:
        self.slots: dict[int, dict[str, int]] = {}  # by hour of the week, from Monday 0:00 UTC
        self.durations: dict[tuple[int, int], int] = {}  # by half of the time and bucket
        self.tallies: dict[tuple[str, str], list[int]] = {}
        self.imported, self.first_at, self.last_at = 0, MAX_INSTANT, 0

    def add_slot(self, row: Row) -> None:
        sums = self.slots.setdefault(row["slot"], dict.fromkeys(HOUR_SUMS, 0))
        for name in HOUR_SUMS:
            sums[name] += row[name]
        if row["imported"]:
            self.imported += row["completed"] + row["failed"]
        self.first_at, self.last_at = min(self.first_at, row["first_at"]), max(self.last_at, row["last_at"])

    def add_duration(self, late: int, bucket: int, n: int) -> None:
        self.durations[late, bucket] = self.durations.get((late, bucket), 0) + n

    def add_tally(self, row: Row) -> None:
        before = self.tallies.setdefault((row["kind"], row["word"]), [0, 0, 0, 0])
        before[:] = [a + row[name] for a, name in zip(before, ("n", "succeeded", "total", "squared"), strict=True)]

    def correct(self, row: Row, late: int) -> None:
        sums = self.slots.setdefault((row["starts_at"] // HOUR + 72) % 168, dict.fromkeys(HOUR_SUMS, 0))
        sums["runs"] += row["n"]
        sums["execution_ms"] += row["total"]
        self.add_duration(late, int(row["word"]), row["n"])

    def histogram(self, half: int | None = None) -> Histogram:
        """(bucket, count) in ascending order, of one half of the time or of both."""
        buckets: dict[int, int] = {}
        for (late, bucket), n in self.durations.items():
            if half is None or late == half:
                buckets[bucket] = buckets.get(bucket, 0) + n
        return sorted((bucket, n) for bucket, n in buckets.items() if n > 0)


def learning_facts(reader: Reader, since: int, handler: str | None, domain: str | None, merge: bool) -> dict[tuple[str, str | None], Facts]:
    """What ended since then (in full hours) by handler and domain; merged: by handler alone. Commands in the foreground are `command`."""
    found: dict[tuple[str, str | None], Facts] = {}
    chosen, bounds = {"handler": handler, "domain": domain}, window_bounds(reader, since)
    del bounds["folded"]

    def of(row: Row) -> Facts:
        return found.setdefault((row["task_type"], None if merge else row["domain"]), Facts())

    for row in reader.all(STATS_HOURS, since=bounds["since"], **chosen):
        of(row).add_slot(row)
    for row in reader.all(STATS_DURATIONS, **bounds, **chosen):
        of(row).add_duration(row["late"], row["bucket"], row["n"])
    for row in reader.all(STATS_TALLIES, since=bounds["since"], **chosen):
        of(row).add_tally(row)
    spans: dict[str, tuple[int, int]] = {}
    for (name, _), one in found.items():
        first, last = spans.get(name, (one.first_at, one.last_at))
        spans[name] = min(first, one.first_at), max(last, one.last_at)
    for row in reader.all(STATS_CORRECTIONS, since=bounds["since"], **chosen):
        whole = bounds["day"] <= row["starts_at"] < bounds["last_day"]
        at = row["starts_at"] - (row["starts_at"] % DAY if whole else 0)
        of(row).correct(row, int(at > sum(spans.get(row["task_type"], (0, 0))) // 2))
    return dict(sorted(found.items(), key=lambda item: (item[0][0], item[0][1] or "")))


def slot_document(slots: list[dict[str, int]]) -> Row:
    """One line of a pattern: what ended at that hour or weekday."""
    sums = {name: sum(slot[name] for slot in slots) for name in HOUR_SUMS}
    tried = sums["completed"] + sums["failed"] + sums["timed_out"]
    return {"ended": tried + sums["cancelled"], "success_rate": part_of(sums["completed"], tried),
            "avg_execution_ms": round(sums["execution_ms"] / sums["runs"], 1) if sums["runs"] else None}  # fmt: skip


def trend_ratio(facts: Facts) -> float | None:
    """The median of the later half of the time that is covered, divided by that of the earlier one: 1.2 means a fifth longer."""
    halves = [facts.histogram(half) for half in (0, 1)]
    if min(sum(n for _, n in half) for half in halves) < TREND_RUNS:
        return None
    early, late = (percentile(half, 0.5) or 0.0 for half in halves)
    return round(late / early, 3) if early else None


def calibration(facts: Facts) -> Row:
    """Stated confidence by tenths against what was achieved, and the Brier score (Brier 1950): 0 is perfect, 0.25 what a coin would get."""
    bins = [(int(word), sums) for (kind, word), sums in sorted(facts.tallies.items()) if kind == "confidence"]
    n, squared = sum(sums[0] for _, sums in bins), sum(sums[3] for _, sums in bins)
    return {"brier_score": round(squared / MILLION / n, 4) if n else None, "calibration": [
        {"stated_from": tenth / 10, "stated_to": (tenth + 1) / 10, "runs": sums[0], "stated_rate": round(sums[2] / MILLION / sums[0], 4),
         "achieved_rate": round(sums[1] / sums[0], 4)} for tenth, sums in bins]}  # fmt: skip


def stats_document(name: str, domain: str | None, facts: Facts) -> Row:
    """All that is known of one kind of work in the window; a domain of None stands for all of them."""
    sums = {key: sum(slot[key] for slot in facts.slots.values()) for key in HOUR_SUMS}
    tried = sums["completed"] + sums["failed"] + sums["timed_out"]
    odd = [sums_of for (kind, _), sums_of in facts.tallies.items() if kind == "attempts"]
    failures = sorted(((word, one[0]) for (kind, word), one in facts.tallies.items() if kind == "failure"), key=lambda pair: (-pair[1], pair[0]))
    retried = sum(one[0] for (kind, word), one in facts.tallies.items() if kind == "attempts" and word != "0")
    histogram = facts.histogram()
    return {
        "handler": name, "domain": domain, "ended": tried + sums["cancelled"], "completed": sums["completed"], "failed": sums["failed"] + sums["timed_out"],
        "cancelled": sums["cancelled"], "imported": facts.imported, "success_rate": part_of(sums["completed"], tried), "runs": sums["runs"],
        "avg_execution_ms": round(sums["execution_ms"] / sums["runs"], 1) if sums["runs"] > 0 else None,
        **{f"p{part}_execution_ms": percentile(histogram, part / 100) for part in (50, 95, 99)}, "trend_ratio": trend_ratio(facts),
        "retry_rate": part_of(retried, tried), "avg_attempts": part_of(tried - sum(one[0] for one in odd) + sum(one[2] for one in odd), tried),
        "failures": [{"reason": word, "n": n} for word, n in failures[:20]], **calibration(facts),
        "by_hour": [{"hour": hour, **slot_document([slot for n, slot in facts.slots.items() if n % 24 == hour])} for hour in range(24)],
        "by_weekday": [{"weekday": day, **slot_document([slot for n, slot in facts.slots.items() if n // 24 == at])} for at, day in enumerate(WEEKDAYS)],
        "first_at": facts.first_at if facts.slots else None, "last_at": facts.last_at if facts.slots else None,
    }  # fmt: skip


# ---- other thresholds

REHEARSE = """SELECT COUNT(*) AS tasks, COUNT(*) FILTER (WHERE level >= 1) AS warnings, COUNT(*) FILTER (WHERE level >= 2) AS violations,
    COUNT(*) FILTER (WHERE level >= 3) AS criticals, COUNT(*) FILTER (WHERE total >= ROUND(sla * :warn_at)) AS new_warnings,
    COUNT(*) FILTER (WHERE total >= sla) AS new_violations, COUNT(*) FILTER (WHERE total >= ROUND(sla * :critical_at)) AS new_criticals,
    COALESCE(SUM(sla) FILTER (WHERE total >= sla), 0) AS late_sla
  FROM (SELECT total, level, CAST(COALESCE(CAST(:sla AS INTEGER), total + buffer) AS REAL) AS sla FROM (
    SELECT CAST(COALESCE(json(context) -> 'metrics' ->> 'total_time_ms', json(context) -> 'metrics' ->> 'execution_time_ms') AS INTEGER) AS total,
      CAST(json(context) -> 'metrics' ->> 'sla_buffer_ms' AS INTEGER) AS buffer,
      COALESCE(CAST(json(context) ->> 'escalation_level' AS INTEGER), 0) AS level
    FROM outcome_records WHERE handler IS NOT DISTINCT FROM :handler AND created_at >= :since) AS times) AS tasks
  WHERE total IS NOT NULL AND sla > 0"""


def rehearse(reader: Reader, handler: str | None, since: int, warn_at: float, critical_at: float, sla_ms: int | None) -> Row:
    """What the ladder did with the tasks of a handler (None: commands in the foreground), and what these thresholds would have done.

    A warning is useful when its task then passed its deadline; `lead_ms` is how long before that it would have come, on average."""
    found = reader.one(REHEARSE, handler=handler, since=since, warn_at=warn_at, critical_at=critical_at, sla=sla_ms) or {}
    late = found["new_violations"]
    useful = min(found["new_warnings"], late)
    return {"handler": handler, "warn_at": warn_at, "critical_at": critical_at, "sla_ms": sla_ms, "tasks": found["tasks"],
            "fired": {name: found[name] for name in ("warnings", "violations", "criticals")},
            "rehearsed": {name: found[f"new_{name}"] for name in ("warnings", "violations", "criticals")},
            "useful_warnings": useful, "false_warnings": found["new_warnings"] - useful, "useful_rate": part_of(useful, found["new_warnings"]),
            "lead_ms": round(found["late_sla"] / late * (1 - warn_at)) if late else None}  # fmt: skip


# =====================================================================================================================
# forecast
# When a task will start and be done: free slots, what is left of the running work, what is ahead of it, and how long runs
# of each handler have taken, played through. The same play with one thing changed says what would save a task from missing
# its SLA. Where something that this rests on is not known, there is no forecast but the reason.

ENOUGH_RUNS = 200  # of more, the newest say it
LOOK_BACK, LOOK_FAR_BACK = 7 * DAY, 90 * DAY  # where these have too few runs, those
LEARNED_FOR = 10 * MINUTE
WINDOW = 200  # how much of the queue is played through; what is further back is reckoned from the numbers ahead of it
PLAYED = 2000  # of a batch with all that waits
NEAR, CLOSER = 64, 1000  # how many ahead are counted while somebody waits for his submission; when that seems to be late
COUNTED_AHEAD = 10_000  # how many are counted otherwise; beyond that, live counts
COUNTED_LATER = 200  # of all work for later; where there is more, what waits now is counted
CAUTIOUS = 1.28  # standard deviations: nine of ten end earlier
KNOWN_DURATIONS = """SELECT f.*, (SELECT COALESCE(SUM(n), 0) FROM task_counts WHERE handler = :handler AND status = 'completed') AS completed_now
  FROM handler_forecasts f WHERE f.handler = :handler"""
COMPLETED_OF = "SELECT COALESCE(SUM(n), 0) AS n FROM task_counts WHERE handler = :handler AND status = 'completed'"
DURATIONS_OF = """WITH RECURSIVE spans (at) AS (SELECT :newest UNION ALL SELECT at - :span FROM spans WHERE at > :oldest)
  SELECT s.at, d.bucket, SUM(d.n) AS n FROM spans s CROSS JOIN htm_durations d -- CROSS so that each span is found by the key
  WHERE d.level = :level AND d.starts_at = s.at AND d.task_type = :kind GROUP BY s.at, d.bucket ORDER BY s.at DESC, d.bucket"""
CORRECTIONS_OF = f"""WITH RECURSIVE hours (at) AS (SELECT :newest UNION ALL SELECT at - {HOUR} FROM hours WHERE at > :oldest)
  SELECT h.at - h.at % :span AS at, CAST(c.word AS INTEGER) AS bucket, SUM(c.n) AS n FROM hours h CROSS JOIN outcome_tallies c
  WHERE c.starts_at = h.at AND c.task_type = :kind AND c.kind = 'duration' GROUP BY h.at - h.at % :span, c.word"""
KEEP_DURATIONS = """INSERT INTO handler_forecasts (handler, runs, mean_ms, sd_ms, p50_ms, p90_ms, p95_ms, histogram, completed, made_at)
  VALUES (:handler, :runs, :mean_ms, :sd_ms, :p50_ms, :p90_ms, :p95_ms, :histogram, :completed, :made_at)
  ON CONFLICT (handler) DO UPDATE SET runs = excluded.runs, mean_ms = excluded.mean_ms, sd_ms = excluded.sd_ms, p50_ms = excluded.p50_ms,
    p90_ms = excluded.p90_ms, p95_ms = excluded.p95_ms, histogram = excluded.histogram, completed = excluded.completed, made_at = excluded.made_at"""
HANDLERS_AND_COUNTS = """SELECT h.name, h.concurrency, h.paused, h.external, h.secrets, c.priority, SUM(c.n) AS n
  FROM handlers h LEFT JOIN task_counts c ON c.handler = h.name AND c.status = 'queued' AND c.n > 0 GROUP BY h.name, c.priority"""
CLAIMING_DAEMONS = "SELECT worker_id, pid, lock_path, boot_id, slots, handlers FROM workers WHERE stopped_at IS NULL AND kind = 'daemon' AND state = 'running'"
ACTIVE_NOW = """SELECT t.task_id, t.intent_id, t.handler, t.task_type, t.goal, t.domain, t.status, t.priority, t.queued_at, t.sla_ms, t.sla_deadline,
    t.warn_at, t.escalation_level, t.set_aside, t.forecast_at, t.started_at, t.finished_at, t.reason, a.worker_id, a.lease_ms
  FROM htm_task_attempts a CROSS JOIN htm_tasks t WHERE t.task_id = a.task_id AND a.finished_at IS NULL"""
EXTERNAL_SEEN = """SELECT t.assigned_worker AS worker FROM outcome_records o JOIN htm_tasks t ON t.task_id = o.task_id
  WHERE o.handler = :name AND o.created_at >= :since AND t.assigned_worker IS NOT NULL ORDER BY o.created_at DESC LIMIT 50"""
IN_LINE = """SELECT task_id, intent_id, handler, task_type, goal, domain, status, priority, rank, order_at, seq, aged_at, available_at, queued_at,
    sla_ms, sla_deadline, warn_at, escalation_level, set_aside, forecast_at, started_at, finished_at, reason
  FROM htm_tasks WHERE handler = :name AND status = 'queued' AND available_at IS NULL ORDER BY rank, order_at, seq LIMIT :n"""
IN_CLASS = IN_LINE.replace(" ORDER BY", " AND rank = :rank ORDER BY")
NOT_BEFORE = IN_LINE.partition("FROM htm_tasks")[0] + """FROM htm_tasks WHERE available_at IS NOT NULL AND status = 'queued' AND handler IS NOT NULL
  ORDER BY available_at LIMIT :n"""
PARKED_LINE = IN_LINE.partition("FROM htm_tasks")[0] + """FROM htm_tasks WHERE status = 'blocked' AND reason = 'waiting_consent'
  ORDER BY rank, order_at, seq LIMIT :n"""
AHEAD_OF = """SELECT COUNT(*) AS n FROM (SELECT 1 FROM htm_tasks WHERE handler = :name AND status = 'queued' AND available_at IS NULL
  AND (rank, order_at, seq) < (:rank, :order_at, :seq) LIMIT :n) AS ahead"""
AHEAD_IN_CLASS = """SELECT COUNT(*) AS n FROM (SELECT 1 FROM htm_tasks WHERE handler = :name AND status = 'queued' AND available_at IS NULL
  AND rank = :rank AND (order_at, seq) < (:order_at, :seq) LIMIT :n) AS ahead"""
ENDS_OF_CLASS = """SELECT (SELECT order_at FROM htm_tasks WHERE handler = :name AND status = 'queued' AND available_at IS NULL AND rank = :rank
    ORDER BY order_at LIMIT 1) AS first,
  (SELECT order_at FROM htm_tasks WHERE handler = :name AND status = 'queued' AND available_at IS NULL AND rank = :rank
    ORDER BY order_at DESC LIMIT 1) AS last"""
FOR_LATER = """SELECT handler, priority, COUNT(*) AS n FROM (SELECT handler, priority FROM htm_tasks
    WHERE available_at IS NOT NULL AND status = 'queued' AND seq <= :seq ORDER BY available_at LIMIT :n) AS later GROUP BY handler, priority"""
WAITING_IN_CLASS = """SELECT COUNT(*) AS n FROM (SELECT 1 FROM htm_tasks
  WHERE handler = :name AND status = 'queued' AND available_at IS NULL AND rank = :rank AND seq <= :seq LIMIT :n) AS waiting"""
LAST_TASK = "SELECT MAX(seq) AS seq FROM htm_tasks"
FORETELL = """UPDATE htm_tasks SET forecast_at = :now
  WHERE task_id = :task_id AND forecast_at IS NULL AND escalation_level = 0 AND finished_at IS NULL RETURNING task_id"""


# ---- what was learned


def learned_durations(reader: Reader, handler: str, now: int) -> Row:
    """What the newest runs of a handler took; summed up afresh when that is old, and kept where we may write."""
    known = reader.one(KNOWN_DURATIONS, handler=handler)
    if known is not None:
        fresh, more = known["completed_now"] - known["completed"], known["runs"] if says_enough(known) else MIN_RUNS - known["runs"]
        if 0 <= now - known["made_at"] < LEARNED_FOR and 0 <= fresh < more:
            return known
    made = {"handler": handler, **summed_up(recent_durations(reader, handler, now)), "made_at": now,
            "completed": known["completed_now"] if known else reader.value(COMPLETED_OF, handler=handler)}  # fmt: skip
    if isinstance(reader, Tx):
        reader.run(KEEP_DURATIONS, **made)
    return made


def recent_durations(reader: Reader, kind: str, now: int) -> Histogram:
    """The histogram of the newest runs of a kind of task: about two hundred of the last week, or where that has hardly any, of ninety days.

    Runs that were interrupted are left out, and what the machine slept is taken off."""
    hour, day = now - now % HOUR, now - now % DAY
    rows = corrected_durations(reader, kind, "hour", hour + DAY, hour - LOOK_BACK)  # a day more: clocks step back
    if sum(row["n"] for row in rows) < MIN_RUNS:
        folded = int(reader.value(FOLDED_UNTIL) or 0)
        rows = [row for row in rows if row["at"] >= folded]
        if day - LOOK_FAR_BACK <= folded < hour - LOOK_BACK:  # nothing has ended since that hour, which is in no day yet
            rows += corrected_durations(reader, kind, "hour", folded, folded)
        rows += corrected_durations(reader, kind, "day", day + DAY, day - LOOK_FAR_BACK, folded)
    histogram: dict[int, int] = {}
    last = None
    for row in sorted(rows, key=lambda row: -int(row["at"])):
        if row["at"] != last and sum(histogram.values()) >= ENOUGH_RUNS:
            break
        last = row["at"]
        histogram[row["bucket"]] = histogram.get(row["bucket"], 0) + row["n"]
    return sorted((bucket, n) for bucket, n in histogram.items() if n > 0)


def command_durations(reader: Reader, domain: str, goal: str, now: int) -> Histogram:
    """The same of a command in the foreground, which is known by its domain and goal: of its newest outcomes."""
    histogram: dict[int, int] = {}
    for row in reader.all(COMMAND_OUTCOMES, domain=domain, goal=goal, since=now - LOOK_FAR_BACK, n=ENOUGH_RUNS):
        metrics = context_of(row["context"])["metrics"]
        if metrics.get("execution_time_ms") is not None and not metrics.get("interruptions"):
            bucket = bucket_of(max(0, round(metrics["execution_time_ms"] - metrics.get("asleep_running_ms", 0))))
            histogram[bucket] = histogram.get(bucket, 0) + 1
    return sorted(histogram.items())


def corrected_durations(reader: Reader, kind: str, level: str, newest: int, oldest: int, until: int = MAX_INSTANT) -> list[Row]:
    """Runs of each hour or day by bucket, with what is to be taken away again; of days only the hours before `until` are in them."""
    span = HOUR if level == "hour" else DAY
    rows = reader.all(DURATIONS_OF, level=level, span=span, newest=newest, oldest=oldest, kind=kind)
    if not rows:
        return rows
    last_hour = min(rows[0]["at"] + span, until) - HOUR
    return rows + reader.all(CORRECTIONS_OF, span=span, newest=last_hour, oldest=rows[-1]["at"], kind=kind)


def summed_up(histogram: Histogram) -> Row:
    """The figures (ms) of a histogram that forecasts go by; null where it is empty."""
    runs = sum(n for _, n in histogram)
    mean = sum(bucket_middle(bucket) * n for bucket, n in histogram) / runs if runs else None
    spread = math.sqrt(sum((bucket_middle(bucket) - mean) ** 2 * n for bucket, n in histogram) / runs) if mean is not None else None
    return {"runs": runs, "mean_ms": mean, "sd_ms": spread, "histogram": to_json(histogram),
            **{f"p{part}_ms": percentile(histogram, part / 100) for part in (50, 90, 95)}}  # fmt: skip


def says_enough(learned: Row | None) -> bool:
    return learned is not None and bool(learned["runs"] >= MIN_RUNS)


def remaining_ms(histogram: Histogram, elapsed: int, part: float = 0.5) -> float:
    """What is left of a run that has taken so long already: as in those that took longer; half as long again when none did.

    (The longer something has lasted beyond all experience, the longer it will; a tenth more, say, would never be foretold before 80 % of an SLA.)"""
    longer = [(bucket, n) for bucket, n in histogram if bucket_middle(bucket) > elapsed]
    whole = percentile(longer, part)
    return whole - elapsed if whole is not None else max(1.0, elapsed / 2)


# ---- the world as it is: slots, running work, handlers


def gather(reader: Reader, now: int, own: dict[str, int] | None = None, learned: dict[str, Row] | None = None) -> Row:
    """All that a forecast rests on but the queue itself: handlers, their live counts, slots, and running work with what is left of it.

    `own` are handlers that are asked about, with how many new tasks of each, which are not counted yet; `learned` is what is known of some already."""
    world: Row = {"now": now, "handlers": {}, "learned": {}, "counts": {}, "serving": {}, "unlearned": set(), "unknown_ms": math.inf,
                  "granted": {}, "own": own or {}, "ready": set(), "age_every": setting(reader, "queue.age_every")}  # fmt: skip
    for row in reader.all(HANDLERS_AND_COUNTS):
        world["handlers"][row["name"]] = row
        if row["n"]:
            world["counts"].setdefault(row["name"], {})[row["priority"]] = row["n"]
    for name in world["own"]:
        world["counts"].setdefault(name, {})
    for name, figures in (learned or {}).items():
        world["learned"][name] = {**figures, "enough": says_enough(figures)}
    for name in world["counts"]:
        learn_of(reader, world, name)
        granted_of(reader, world, name)
    add_active(reader, world)
    return world


Kind = str | tuple[str, str] | None


def kind_of(task: Row) -> Kind:
    """What the usual time of a task is known by: its handler, or of a command in the foreground domain and goal; None for a built-in rescue."""
    return task["handler"] if task["handler"] is not None or task["task_type"] != "command" else (task["domain"], task["goal"])


def learn_of(reader: Reader, world: Row, name: Kind) -> Row | None:
    """What is known of the durations of a kind, and None where too little is."""
    if name is None:
        return None
    if name not in world["learned"]:
        now = world["now"]
        learned = learned_durations(reader, name, now) if isinstance(name, str) else summed_up(command_durations(reader, *name, now))
        world["learned"][name] = {**learned, "enough": says_enough(learned)}
    return world["learned"][name] if world["learned"][name]["enough"] else None


def granted_of(reader: Reader, world: Row, name: str) -> frozenset[tuple[str, str]]:
    """Of the secrets of a handler, those for which nobody would be asked, by all that is queued and new; the world keeps them."""
    if name not in world["granted"]:
        handler = world["handlers"].get(name) or HANDLER_DEFAULTS
        uses = sum(world["counts"].get(name, {}).values()) + world["own"].get(name, 1)
        world["granted"][name] = frozenset(wish for wish in wishes_of(json.loads(handler["secrets"]))
                                           if seems_granted(reader, f"handler:{name}", *wish, uses, world["now"]))  # fmt: skip
    found: frozenset[tuple[str, str]] = world["granted"][name]
    return found


def note_ready(reader: Reader, world: Row, tasks: Iterable[Row]) -> None:
    """Note those tasks that have consent for all secrets of their handlers, or would have it at once."""
    for task in tasks:
        wishes = wishes_of(json.loads((world["handlers"].get(task["handler"]) or HANDLER_DEFAULTS)["secrets"]))
        if wishes and task["status"] in ("queued", "blocked"):
            granted, consents = granted_of(reader, world, task["handler"]), reader.all(CONSENTS_OF_TASK, id=task["task_id"])
            states = {wish: wish_state(consents, *wish, world["now"])[0] for wish in wishes}
            if all(state == "ready" or (state == "missing" and wish in granted) for wish, state in states.items()):
                world["ready"].add(task["task_id"])


def add_active(reader: Reader, world: Row) -> None:
    """The slots of living daemons, each with the instant when it is free, and one for each external worker seen within the last hour."""
    active = reader.all(ACTIVE_NOW)
    for row in active:
        row["end"] = end_of(learn_of(reader, world, row["handler"]), row, world["now"])
        if row["end"][0] == math.inf and row["task_type"] != "command":  # which takes no slot
            world["unlearned"].add(row["handler"] or "a rescue")
    world["active"] = active
    world["pools"] = [pool_of(row["slots"], [one for one in active if one["worker_id"] == row["worker_id"]],
                              frozenset(json.loads(row["handlers"])) if row["handlers"] else None, None, world["now"])
                      for row in reader.all(CLAIMING_DAEMONS) if alive_lately(row)]  # fmt: skip
    for name in world["counts"]:
        if (world["handlers"].get(name) or HANDLER_DEFAULTS)["external"]:
            mine = [row for row in active if row["handler"] == name and row["lease_ms"] is not None]
            seen = {row["worker_id"] for row in mine} | {row["worker"] for row in reader.all(EXTERNAL_SEEN, name=name, since=world["now"] - HOUR)}
            world["pools"].append(pool_of(len(seen), mine, None, name, world["now"]))


def alive_lately(worker: Row) -> bool:
    """Whether a worker lives, asked of the kernel once a second: whoever submits much would spend a third of a forecast on that."""
    second = int(time.monotonic())
    asked = _asked.get(worker["lock_path"])
    if asked is None or asked[0] != second:
        asked = _asked[worker["lock_path"]] = second, is_alive(worker)
    return asked[1]


_asked: dict[str, tuple[int, bool]] = {}


def end_of(learned: Row | None, active: Row, now: int) -> tuple[float, float]:
    """When an active run will probably be over, and the variance of that; infinity where nothing was learned."""
    if learned is None:
        return math.inf, 0.0
    elapsed = max(0, now - active["started_at"]) if active["status"] == "running" and active["started_at"] else 0
    return now + remaining_ms(json.loads(learned["histogram"]), elapsed), learned["sd_ms"] ** 2


def pool_of(slots: int, active: list[Row], only: frozenset[str] | None, external: str | None, now: int) -> Row:
    """Slots that serve the same handlers: for each when it is free, with what variance, and whose run it ends with. A rescue's extra slot is none."""
    busy = sorted(((*row["end"], row["handler"]) for row in active), key=lambda slot: slot[0])[-slots:] if slots else []
    return {"only": only, "external": external, "slots": [(float(now), 0.0, None)] * (slots - len(busy)) + busy}


def serving(world: Row, name: str | None) -> list[int]:
    """The pools whose slots take tasks of this handler."""
    if name not in world["serving"]:
        world["serving"][name] = [number for number, pool in enumerate(world["pools"]) if takes(pool, name, world["handlers"].get(name))]
    found: list[int] = world["serving"][name]
    return found


def takes(pool: Row, name: str | None, handler: Row | None) -> bool:
    if handler is None:
        return False
    if handler["external"]:
        return bool(pool["external"] == name)
    return pool["external"] is None and (pool["only"] is None or name in pool["only"])


CONSENT_IS_OPEN = "waiting_consent", "when it has consent to use its secrets is for people to say"


def no_forecast(world: Row, task: Row) -> tuple[str, str] | None:
    """Code and sentence for why nothing can be said of an open task; None when something can."""
    name, handler, kind = task["handler"], world["handlers"].get(task["handler"]), kind_of(task)
    if kind is None:
        return "rescue", "a built-in rescue has no kind of its own to learn from"
    if handler is None and name is not None:
        return "no_handler", f"there is no handler {name}"
    if task["status"] == "blocked":
        return CONSENT_IS_OPEN if task["reason"] == "waiting_consent" else (task["reason"] or "blocked", "it cannot start before what it waits for has come")
    if task["status"] == "assigned" and task.get("reason") == "waiting_consent":
        return CONSENT_IS_OPEN
    if task["status"] == "queued" and handler is not None and (why := cannot_start(world, task, handler)):
        return why
    learned = world["learned"].get(kind)
    if learned is None or not learned["enough"]:
        has = learned["runs"] if learned else 0
        return "nothing_learned", f"nothing learned yet of {name or 'this command'}: needs {MIN_RUNS} completed runs that nothing interrupted, has {has}"
    return None


def cannot_start(world: Row, task: Row, handler: Row) -> tuple[str, str] | None:
    """What keeps a queued task from starting."""
    if handler["paused"]:
        return "handler_paused", f"its handler {handler['name']} is paused"
    if not has_consent(world, handler) and task["task_id"] not in world["ready"]:
        return CONSENT_IS_OPEN
    if not any(world["pools"][number]["slots"] for number in serving(world, handler["name"])):
        return no_worker(world, handler["name"], bool(handler["external"]))
    return None


def has_consent(world: Row, handler: Row) -> bool:
    """Whether tasks of a handler need no consent that somebody would have to give."""
    return handler["secrets"] == "[]" or len(world["granted"].get(handler["name"], ())) == len(wishes_of(json.loads(handler["secrets"])))


def no_worker(world: Row, name: str, external: bool) -> tuple[str, str]:
    if external:
        return "external", f"no external worker of {name} was seen within the last hour"
    if any(pool["external"] is None for pool in world["pools"]):
        return "not_served", f"no running daemon serves {name}"
    return "no_daemon", "no daemon runs"


# ---- the play


def head_of_queue(reader: Reader, world: Row, n: int) -> list[Row]:
    """The head of the queue in the order of claims: at most n tasks of all handlers that could start, and those that become available soonest."""
    names = [name for name in world["counts"] if goes_ahead(world, name)]
    line = [row for name in names for row in reader.all(IN_LINE, name=name, n=n)]
    held = [row for name in world["counts"] if not has_consent(world, world["handlers"].get(name) or HANDLER_DEFAULTS)
            for row in reader.all(IN_LINE, name=name, n=n)]  # fmt: skip
    note_ready(reader, world, held)
    line += [row for row in held if row["task_id"] in world["ready"] and cannot_start(world, row, world["handlers"][row["handler"]]) is None]
    line.sort(key=claim_order)
    later = [row for row in reader.all(NOT_BEFORE, n=n // 5) if row["handler"] in names]
    return line[:n] + later


def claim_order(task: Row) -> tuple[int, int, int]:
    return task["rank"], task["order_at"], task["seq"]


def goes_ahead(world: Row, name: str) -> bool:
    """Whether tasks of this handler take slots at all."""
    handler = world["handlers"].get(name)
    return handler is not None and not handler["paused"] and has_consent(world, handler) and bool(serving(world, name))


def climbs_of(task: Row, age_every: int) -> list[tuple[int, int]]:
    """The instants at which a queued task moves up, and to which rank."""
    if task["set_aside"]:
        return []
    if task["sla_ms"] is None:
        return [(task["aged_at"] + step * age_every, task["rank"] - step) for step in range(1, task["rank"] + 1)]
    start, sla = task["queued_at"], task["sla_ms"]
    return [(at, rank) for at, rank in ((start + sla // 2, 1), (start + sla * 4 // 5, 0)) if rank < task["rank"]]


class Play:
    """The queue played through: runs end, tasks become available and climb, and whatever slot is free takes the first that it may."""

    def __init__(self, world: Row, line: list[Row]):
        self.world, self.line, self.ranks = world, line, [task["rank"] for task in line]
        self.starts: dict[str, tuple[float, float]] = {}
        self.heaps: dict[str, list[tuple[int, int, int, int]]] = {}
        self.idle: list[list[float]] = [[] for _ in world["pools"]]
        self.room = {name: row["concurrency"] for name, row in world["handlers"].items() if row["concurrency"] is not None}
        self.events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.added = 0  # events that are due at one instant happen in this order
        self.pools = {name: serving(world, name) for name in {task["handler"] for task in line}}
        self._seat_active()
        self._line_up()

    def _at(self, instant: float, what: Callable[..., None], *facts: Any) -> None:
        from heapq import heappush

        if instant < math.inf:
            self.added += 1
            heappush(self.events, (instant, self.added, what, facts))

    def _seat_active(self) -> None:
        for row in self.world["active"]:
            if row["handler"] in self.room:
                self.room[row["handler"]] -= 1
                self._at(row["end"][0], self._make_room, row["handler"])
        for number, pool in enumerate(self.world["pools"]):
            for at, variance, _ in pool["slots"]:
                self._at(at, self._free, number, variance)

    def _line_up(self) -> None:
        from heapq import heapify

        for number, task in enumerate(self.line):
            if task["available_at"] is not None:
                self._at(task["available_at"], self._enter, number)
            else:
                self.heaps.setdefault(task["handler"], []).append((task["rank"], task["order_at"], task["seq"], number))
            for at, rank in climbs_of(task, self.world["age_every"]):
                self._at(at, self._climb, number, rank)
        for heap in self.heaps.values():
            heapify(heap)

    def _make_room(self, name: str) -> None:
        if name in self.room:
            self.room[name] += 1

    def _free(self, pool: int, variance: float) -> None:
        self.idle[pool].append(variance)

    def _enter(self, number: int) -> None:
        from heapq import heappush

        task = self.line[number]
        heappush(self.heaps.setdefault(task["handler"], []), (self.ranks[number], task["order_at"], task["seq"], number))

    def _climb(self, number: int, rank: int) -> None:
        if rank < self.ranks[number] and self.line[number]["task_id"] not in self.starts:
            self.ranks[number] = rank
            if self.line[number]["available_at"] is None:
                self._enter(number)

    def _end(self, pool: int, variance: float, name: str) -> None:
        self._free(pool, variance)
        self._make_room(name)

    def run(self, until: str | None = None) -> dict[str, tuple[float, float]]:
        """When each task starts (ms since 1970), and the variance of that; one that never would is not in it. `until` that task has started."""
        from heapq import heappop

        while self.events and until not in self.starts and len(self.starts) < len(self.line):
            now = self.events[0][0]
            while self.events and self.events[0][0] <= now:
                _, _, what, facts = heappop(self.events)
                what(*facts)
            self._claim(max(now, self.world["now"]))
        return self.starts

    def _claim(self, now: float) -> None:
        from heapq import heappop

        while (first := self._first()) is not None:
            entry, name, pool = first
            heappop(self.heaps[name])
            variance = self.idle[pool].pop()
            self.starts[self.line[entry[3]]["task_id"]] = now, variance
            self._occupy(now, name, pool, variance)

    def _occupy(self, now: float, name: str, pool: int, variance: float) -> None:
        learned = self.world["learned"].get(name)
        if name in self.room:
            self.room[name] -= 1
        if learned is not None and learned["enough"]:
            self._at(now + learned["mean_ms"], self._end, pool, variance + learned["sd_ms"] ** 2, name)
        else:
            self._at(now + self.world["unknown_ms"], self._end, pool, variance, name)

    def _first(self) -> tuple[tuple[int, int, int, int], str, int] | None:
        """The task that a free slot takes next, with its handler and the slot's pool."""
        from heapq import heappop

        best: tuple[tuple[int, int, int, int], str, int] | None = None
        for name, heap in self.heaps.items():
            pool = next((number for number in self.pools[name] if self.idle[number]), None)
            if pool is None or self.room.get(name, 1) <= 0:
                continue
            while heap and (heap[0][0] != self.ranks[heap[0][3]] or self.line[heap[0][3]]["task_id"] in self.starts):
                heappop(heap)
            if heap and (best is None or heap[0] < best[0]):
                best = heap[0], name, pool
        return best


def played(world: Row, line: list[Row], until: str | None = None) -> dict[str, tuple[float, float, float]]:
    """For each task that will start: when, the variance of that, and when at the earliest if what has no history took no time at all."""
    starts = Play(world, line).run(until)
    unlearned = world["unlearned"] | {task["handler"] for task in line if learned_here(world, task["handler"]) is None}
    hopeful = Play(hopefully(world), line).run(until) if unlearned else starts
    late = (math.inf, 0.0)
    return {task_id: (*starts.get(task_id, late), at) for task_id, (at, _) in hopeful.items()}


def learned_here(world: Row, name: Kind) -> Row | None:
    learned: Row | None = world["learned"].get(name)
    return learned if learned is not None and learned["enough"] else None


def hopefully(world: Row) -> Row:
    """The same world in which work that nothing is known of is over at once."""
    soon = {"end": (world["now"], 0.0)}
    active = [{**row, **(soon if row["end"][0] == math.inf else {})} for row in world["active"]]
    pools = [{**pool, "slots": [(world["now"], *slot[1:]) if slot[0] == math.inf else slot for slot in pool["slots"]]} for pool in world["pools"]]
    return {**world, "active": active, "pools": pools, "unknown_ms": 0.0}


def waiting(reader: Reader, world: Row, name: str, rank: int) -> int:
    """How many of a handler's tasks of a class wait and are not for later: by the live counts, or counted up to ten thousand where much is for later.

    Where even more wait then, that which could not be counted counts as waiting, too."""
    counts, seq, known = world["counts"][name].get(PRIORITIES[rank], 0), world.get("seq", MAX_INSTANT), world.setdefault("waiting", {})
    if counts and (name, rank) not in known:
        if "later" not in world:
            world["later"] = {(row["handler"], row["priority"]): row["n"] for row in reader.all(FOR_LATER, seq=seq, n=COUNTED_LATER)}
        n = max(0, counts - world["later"].get((name, PRIORITIES[rank]), 0))
        if sum(world["later"].values()) >= COUNTED_LATER:
            seen = int(reader.value(WAITING_IN_CLASS, name=name, rank=rank, seq=seq, n=COUNTED_AHEAD))
            n = seen if seen < COUNTED_AHEAD else max(n, seen)
        known[name, rank] = n
    return int(known.get((name, rank), 0))


def all_waiting(reader: Reader, world: Row) -> int:
    return sum(waiting(reader, world, name, rank) for name in world["counts"] for rank in range(len(PRIORITIES)))


def ahead_of(reader: Reader, world: Row, task: Row, most: int) -> dict[str, int]:
    """How many tasks of each handler are claimed before this one: counted up to `most` of each, beyond that by its place in its class."""
    ahead = {}
    for name, counts in world["counts"].items():
        if not counts or not shares_slots(world, name, task["handler"]):
            continue
        n = reader.value(AHEAD_OF, name=name, rank=task["rank"], order_at=task["order_at"], seq=task["seq"], n=most)
        if n >= most:
            n = max(n, sum(waiting(reader, world, name, rank) for rank in range(task["rank"]))
                    + round(share_ahead(reader, name, task, task["rank"]) * waiting(reader, world, name, task["rank"])))  # fmt: skip
        if n:
            ahead[name] = n
    return ahead


def ahead_when_climbed(reader: Reader, world: Row, task: Row, rank: int, most: int) -> dict[str, int]:
    """The same once this task has climbed to a class: what is before it there, and of the classes below what has less time, which climbs as well."""
    ahead = ahead_of(reader, world, {**task, "rank": rank}, most)
    for name, counts in world["counts"].items():
        for below in [below for below in range(rank + 1, len(PRIORITIES)) if counts.get(PRIORITIES[below]) and shares_slots(world, name, task["handler"])]:
            n = reader.value(AHEAD_IN_CLASS, name=name, rank=below, order_at=task["order_at"], seq=task["seq"], n=most)
            n = n if n < most else max(n, round(share_ahead(reader, name, task, below) * waiting(reader, world, name, below)))
            ahead[name] = ahead.get(name, 0) + n
    return ahead


def share_ahead(reader: Reader, name: str, task: Row, rank: int) -> float:
    """Which part of a handler's tasks of a class has less time than this one, as if they lay evenly between the first and the last."""
    ends = reader.one(ENDS_OF_CLASS, name=name, rank=rank) or {"first": None}
    if ends["first"] is None:
        return 0.0
    share: float = (task["order_at"] - ends["first"]) / max(1, ends["last"] - ends["first"])
    return min(1.0, max(0.0, share))


def shares_slots(world: Row, name: str, other: str | None) -> bool:
    return goes_ahead(world, name) and bool(set(serving(world, name)) & set(serving(world, other)))


def reckoned(world: Row, name: str, ahead: dict[str, int]) -> tuple[float, float]:
    """When a task starts that has so many of each handler ahead of it, and the variance of that: as if those ahead took their mean each."""
    slots = sorted((at, variance) for number in serving(world, name) for at, variance, _ in world["pools"][number]["slots"])
    frees = [at for at, _ in slots if at < math.inf]
    limits = {other: room for other in ahead if (room := world["handlers"][other]["concurrency"]) is not None}
    while frees and (held := slowest(world, {other: ahead[other] for other in limits if other != name and other in ahead}, limits, ahead, len(frees))):
        frees, ahead = frees[: max(1, len(frees) - limits[held])], {other: n for other, n in ahead.items() if other != held}
    start, variance = nth_start(world, frees, ahead)
    if world["handlers"][name]["concurrency"] is not None:
        places = world["handlers"][name]["concurrency"]
        busy = sorted(row["end"][0] for row in world["active"] if row["handler"] == name)[-places:]
        own = [float(world["now"])] * (places - len(busy)) + [at for at in busy if at < math.inf]
        start, variance = max((start, variance), nth_start(world, own, {name: ahead.get(name, 0)}))
    return start, variance + (slots[0][1] if slots else 0.0)


def slowest(world: Row, waiting: dict[str, int], limits: dict[str, int], ahead: dict[str, int], slots: int) -> str | None:
    """A handler whose own limit keeps it busy longer than all that is ahead takes: it holds its places throughout, and the rest passes it by."""
    means = {other: (learned_here(world, other) or {"mean_ms": world["unknown_ms"]})["mean_ms"] for other in ahead}
    work = sum(n * means[other] for other, n in ahead.items())
    alone = {other: n * means[other] / limits[other] for other, n in waiting.items()}
    held = max(alone, key=alone.__getitem__, default=None)
    return held if held is not None and limits[held] < slots and alone[held] > work / slots else None


def nth_start(world: Row, frees: list[float], ahead: dict[str, int]) -> tuple[float, float]:
    """When the first slot is free after `ahead` have been given to slots that are free at these instants; those of unknown length keep theirs."""
    from heapq import heapify, heapreplace

    known = [(learned, n) for name, n in ahead.items() if (learned := learned_here(world, name))]
    if world["unknown_ms"]:
        frees = sorted(frees)[sum(n for name, n in ahead.items() if not learned_here(world, name)) :]
    if not frees:
        return math.inf, 0.0
    n = sum(n for _, n in known)
    mean = sum(n * learned["mean_ms"] for learned, n in known) / n if n else 0.0
    variance = sum(n * learned["sd_ms"] ** 2 for learned, n in known) / len(frees) ** 2
    heapify(frees)
    for _ in range(min(n, 2 * len(frees))):
        heapreplace(frees, frees[0] + mean)
    rounds, rest = divmod(max(0, n - 2 * len(frees)), len(frees))
    return max(world["now"], sorted(frees)[rest] + rounds * mean), variance


def forecast_of(world: Row, task: Row, start: tuple[float, float, float]) -> Row | None:
    """Start, probable and cautious finish of a queued task, and whether it misses its SLA: null where that hangs on what is not known.

    None where nothing can be said; where it is late at the soonest (`soonest_at`), that is said without knowing when it starts."""
    learned, (at, variance, hopeful) = world["learned"][kind_of(task)], start
    middle, deadline = learned["p50_ms"], task["sla_deadline"]
    if at == math.inf:
        certain = deadline is not None and deadline < hopeful + middle < math.inf
        return {"start_at": None, "finish_at": None, "finish_by_at": None, "soonest_at": round(hopeful + middle), "miss": True} if certain else None
    margin = math.sqrt(CAUTIOUS**2 * variance + (learned["p90_ms"] - middle) ** 2)
    misses = None if deadline is None else True if hopeful + middle > deadline else False if at + middle <= deadline else None
    return {"start_at": round(at), "finish_at": round(at + middle), "finish_by_at": round(at + middle + margin), "miss": misses}


def forecast_of_running(world: Row, task: Row) -> Row:
    """The same of a task that runs: what is left is what was left of those runs that took as long."""
    learned, deadline, now = world["learned"][kind_of(task)], task["sla_deadline"], world["now"]
    started = task["started_at"] if task["status"] == "running" else now
    histogram, elapsed = json.loads(learned["histogram"]), max(0, now - started)
    finish, by = (now + remaining_ms(histogram, elapsed, part) for part in (0.5, 0.9))
    return {"start_at": started, "finish_at": round(finish), "finish_by_at": round(by), "miss": None if deadline is None else finish > deadline}


NEVER = (math.inf, 0.0, math.inf)
WAYS = (1, 2, 4, 8, 16)  # so many workers or places more are tried


def start_of(reader: Reader, world: Row, line: list[Row], task: Row, most: int, counted: dict[int, dict[str, int]]) -> tuple[float, float, float]:
    """When a queued task will start: played through where it stands in the line, else reckoned from the numbers ahead of it, which `counted` keeps."""
    if any(row["task_id"] == task["task_id"] for row in line):
        return played(world, [task if row["task_id"] == task["task_id"] else row for row in line], task["task_id"]).get(task["task_id"], NEVER)
    if task["rank"] not in counted:
        counted[task["rank"]] = ahead_of(reader, world, task, most)
    start = reckoned_start(world, task, counted[task["rank"]])
    for at, rank in climbs_of(task, world["age_every"]) if task["sla_ms"] is not None else ():
        if start[0] > at:
            climbed = reckoned_start(world, task, ahead_when_climbed(reader, world, task, rank, most))
            start = min(start, (max(at, climbed[0]), climbed[1], max(at, climbed[2])))
    return start


def reckoned_start(world: Row, task: Row, ahead: dict[str, int]) -> tuple[float, float, float]:
    at, variance = reckoned(world, task["handler"], ahead)
    unlearned = bool(world["unlearned"]) or any(learned_here(world, name) is None for name in ahead)
    hopeful = reckoned(hopefully(world), task["handler"], ahead)[0] if unlearned else at
    soonest = task["available_at"] or 0
    return max(at, soonest), variance, max(hopeful, soonest)


def foresee(reader: Reader, world: Row, line: list[Row], task: Row, most: int = COUNTED_AHEAD) -> Row:
    """All that can be said of an open task: `start_at`, `finish_at`, `finish_by_at`, `miss`, `basis`, and `reason` with `text` where there is no forecast."""
    learn_of(reader, world, kind_of(task))
    note_ready(reader, world, [task])
    if task["status"] == "blocked" and task["task_id"] in world["ready"]:  # until somebody sees that
        task = {**task, "status": "queued", "reason": None}
    blank: Row = {"start_at": None, "finish_at": None, "finish_by_at": None, "miss": None, "reason": None, "text": None, "basis": None, "advice": []}
    if why := no_forecast(world, task):
        return {**blank, "reason": why[0], "text": why[1], **hopeless(world, task, soonest_start(reader, world, task, most))}
    ahead = ahead_of(reader, world, task, most) if task["status"] == "queued" and task["handler"] is not None else {}
    blank["basis"] = basis_of(world, task, sum(ahead.values()))
    if task["status"] != "queued":
        forecast: Row | None = forecast_of_running(world, task)
    elif task["handler"] is None:
        forecast = forecast_of(world, task, as_soon_as_may_be(world, task))
    else:
        forecast = forecast_of(world, task, start_of(reader, world, line, task, most, {task["rank"]: ahead}))
    if forecast is None or forecast["start_at"] is None:
        blank.update(reason="nothing_learned_ahead", text=unlearned_text(world, task, ahead))
    if forecast is None:
        return blank
    advice = advice_for(reader, world, line, task, forecast["finish_at"], most) if forecast["miss"] and task["status"] == "queued" else []
    return {**blank, **forecast, "advice": advice}


def as_soon_as_may_be(world: Row, task: Row) -> tuple[float, float, float]:
    """The start of what waits for nothing but its instant."""
    at = max(world["now"], task["available_at"] or 0)
    return at, 0.0, at


def soonest_start(reader: Reader, world: Row, task: Row, most: int) -> float:
    """When a task would start if what keeps it from starting were over this instant."""
    least = as_soon_as_may_be(world, task)[0] if task["status"] in ("queued", "blocked") else world["now"]
    waits = task["handler"] is not None and learned_here(world, task["handler"]) and task["status"] in ("queued", "blocked")
    if not waits or not any(world["pools"][number]["slots"] for number in serving(world, task["handler"])):
        return least
    hopeful = start_of(reader, world, [], {**task, "status": "queued"}, most, {})[2]
    return max(least, hopeful) if hopeful < math.inf else least


def hopeless(world: Row, task: Row, start: float) -> Row:
    """What is said of a task that cannot start yet: that it misses its SLA, where it does even if it starts then."""
    learned = learned_here(world, kind_of(task))
    if learned is None or task["sla_deadline"] is None or start + learned["p50_ms"] <= task["sla_deadline"]:
        return {}
    return {"miss": True, "soonest_at": round(start + learned["p50_ms"]), "basis": basis_of(world, task, 0)}


def unlearned_text(world: Row, task: Row, ahead: Iterable[str]) -> str:
    """What keeps the slots of a task for nobody knows how long: of the tasks ahead of it, and of the runs that hold one."""
    held = {name or "a rescue" for number in serving(world, task["handler"]) for at, _, name in world["pools"][number]["slots"] if at == math.inf}
    names = sorted(held | {name for name in ahead if learned_here(world, name) is None and shares_slots(world, name, task["handler"])})
    return f"nothing learned yet of {', '.join(names)}, which it waits for" if names else "no slot becomes free for it"


def basis_of(world: Row, task: Row, ahead: int) -> Row:
    learned = world["learned"][kind_of(task)]
    slots = sum(len(world["pools"][number]["slots"]) for number in serving(world, task["handler"])) if task["handler"] is not None else 1
    return {"runs": learned["runs"], "p50_ms": round(learned["p50_ms"]), "p95_ms": round(learned["p95_ms"]), "slots": slots, "ahead": ahead}


def queue_forecasts(reader: Reader, now: int, priority: str | None, name: str | None, limit: int) -> list[tuple[Row, Row]]:
    """The queue in the order of claims, those not yet available last: each task with what is foreseen of it."""
    world = gather(reader, now)
    shown = queued_tasks(reader, world, priority, name, limit)
    line = head_of_queue(reader, world, WINDOW)
    note_ready(reader, world, shown)
    near = {row["task_id"] for row in line}
    starts = played(world, line) if any(row["task_id"] in near for row in shown) else {}
    found: list[tuple[Row, Row]] = []
    ahead: dict[str, dict[str, int]] = {}  # of those that lie too far back to be played through: counted for each handler's first, then added to
    for row in shown:
        if row["task_id"] not in near and no_forecast(world, row) is None:
            mine = ahead.setdefault(row["handler"], {}) or ahead_of(reader, world, row, COUNTED_AHEAD)
            starts[row["task_id"]] = start_of(reader, world, [], row, NEAR, {row["rank"]: mine})
            ahead[row["handler"]] = mine
            for counted_ahead in ahead.values():
                counted_ahead[row["handler"]] = counted_ahead.get(row["handler"], 0) + 1
        found.append((row, queue_forecast(reader, world, row, starts.get(row["task_id"], NEVER))))
    return found


def queued_tasks(reader: Reader, world: Row, priority: str | None, name: str | None, limit: int) -> list[Row]:
    names = [other for other in world["counts"] if name in (None, other)]
    if priority is None:
        rows = [row for other in names for row in reader.all(IN_LINE, name=other, n=limit)]
    else:
        rows = [row for other in names for row in reader.all(IN_CLASS, name=other, rank=PRIORITIES.index(priority), n=limit)]
    rows.sort(key=claim_order)
    if len(rows) < limit:
        rows += [row for row in reader.all(NOT_BEFORE, n=limit) if name in (None, row["handler"]) and priority in (None, row["priority"])]
    return rows[:limit]


def queue_forecast(reader: Reader, world: Row, task: Row, start: tuple[float, float, float]) -> Row:
    """What is foreseen of one task of the queue that is to start then; advice is reckoned, since a play for each would take too long."""
    why = no_forecast(world, task)
    forecast = None if why else forecast_of(world, task, start)
    code, text = why or (None, None)
    if why is None and (forecast is None or forecast["start_at"] is None):
        code, text = "nothing_learned_ahead", unlearned_text(world, task, world["counts"])
    if forecast is None:
        return {"start_at": None, "finish_at": None, "miss": None, "reason": code, "text": text, "advice": [],
                **(hopeless(world, task, as_soon_as_may_be(world, task)[0]) if why else {})}  # fmt: skip
    advice = advice_for(reader, world, [], task, forecast["finish_at"], NEAR) if forecast["miss"] else []
    return {**forecast, "reason": code, "text": text, "advice": advice}


# ---- what would save it


def advice_for(reader: Reader, world: Row, line: list[Row], task: Row, finish: int | None, most: int) -> list[Row]:
    """What would let a task meet its SLA, each by itself, as forecast with that change; else the best there is, and the SLA that would be met.

    Where a run alone takes longer than the SLA, nothing but another SLA helps."""
    if task["sla_ms"] is not None and runs_too_long(world["learned"][kind_of(task)], task):
        return [] if finish is None else [longer_sla(task, finish)]
    if task["handler"] is None:
        return []
    best: list[Row] = []
    counted: dict[int, dict[str, int]] = {}
    for action, variants in ways_out(world, task):
        tried = []
        for text, changed, moved in variants:
            forecast = forecast_of(changed, moved, start_of(reader, changed, line, moved, most, counted))
            if forecast is not None and forecast["finish_at"] is not None and (finish is None or forecast["finish_at"] < finish):
                tried.append({"action": action, "text": text, "predicted_finish_at": forecast["finish_at"], "saves": forecast["miss"] is not True})
                if tried[-1]["saves"]:
                    break
        best += [min(tried, key=lambda one: one["predicted_finish_at"])] if tried else []
    return chosen_advice(best, task, finish)


def chosen_advice(best: list[Row], task: Row, finish: int | None) -> list[Row]:
    """Of the best of each kind those that save a task; else the very best, with the SLA that would be met."""
    saving = [one for one in best if one["saves"]]
    if saving or finish is None:
        return saving or best
    least = sorted(best, key=lambda one: one["predicted_finish_at"])[:1]
    return [*least, longer_sla(task, finish)]


def runs_too_long(figures: Row, task: Row) -> bool:
    """Whether a usual run takes longer than the whole SLA."""
    return bool(figures["p50_ms"] > task["sla_ms"])


def longer_sla(task: Row, finish: int) -> Row:
    """An SLA that the forecast meets, with a fifth to spare, in units that people use."""
    need = (finish - task["queued_at"]) * 6 / 5
    unit = SECOND if need < HOUR else MINUTE if need < DAY else HOUR
    sla = max(unit, math.ceil(need / unit) * unit)
    return {"action": "sla", "text": f"an SLA of {format_duration(sla)} would be met", "predicted_finish_at": finish, "saves": True}


Way = tuple[str, Row, Row]  # how it is said, the world and the task with that change


def ways_out(world: Row, task: Row) -> Iterator[tuple[str, Iterator[Way]]]:
    """Changes that somebody could make, by kind, the smallest first."""
    name = task["handler"]
    handler = world["handlers"][name]
    if handler["paused"]:
        yield "resume", iter([(f"grace handler resume {name}", {**world, "handlers": {**world["handlers"], name: {**handler, "paused": 0}}}, task)])
        return
    if not handler["external"] and not any(pool["external"] is None for pool in world["pools"]):
        yield "start_daemon", iter([("grace daemon", more_workers(world, name, processors()), task)])
        return
    yield "priority", ((f"grace task priority {task['task_id']} {word}", world, {**task, "priority": word, "rank": rank})
                       for rank, word in ((1, "high"), (0, "critical")) if rank < task["rank"])  # fmt: skip
    yield "workers", ((several_workers(n, bool(handler["external"])), more_workers(world, name, n), task) for n in WAYS)
    if handler["concurrency"] is not None:
        yield "concurrency", ((*more_places(world, name, n), task) for n in WAYS)


def more_places(world: Row, name: str, n: int) -> tuple[str, Row]:
    """How a higher limit of a handler is said, and the world with it."""
    handler = world["handlers"][name]
    places = handler["concurrency"] + n
    return f"--concurrency {places} for {name}", {**world, "handlers": {**world["handlers"], name: {**handler, "concurrency": places}}}


def several_workers(n: int, external: bool) -> str:
    more = f"{'one' if n == 1 else n} more {'external ' if external else ''}worker{'' if n == 1 else 's'}"
    return more if external else f"{more} (grace daemon --workers {n})"


def more_workers(world: Row, name: str, n: int) -> Row:
    external = name if world["handlers"][name]["external"] else None
    return {**world, "serving": {}, "pools": [*world["pools"], {"only": None, "external": external, "slots": [(float(world["now"]), 0.0, None)] * n}]}


# ---- said once


def may_be_foretold(task: Row, now: int) -> bool:
    """Whether a forecast would still be news: not told yet, not ended, and before the ladder's first word."""
    return (task["sla_ms"] is not None and task["forecast_at"] is None and task["escalation_level"] == 0 and task["finished_at"] is None
            and not task["set_aside"] and now < task["queued_at"] + round(task["sla_ms"] * task["warn_at"]))  # fmt: skip


def foretell(tx: Tx, task: Row, forecast: Row) -> bool:
    """Write that a task is going to miss its SLA, unless that was written before or is too late; whether it was."""
    if not may_be_foretold(task, tx.now) or not tx.run(FORETELL, task_id=task["task_id"], now=tx.now):
        return False
    emit(tx, "htm.sla.forecast", task["task_id"], told_of(task, forecast))
    return True


def told_of(task: Row, forecast: Row) -> Row:
    """The payload of the event of a miss to come."""
    basis, finish = forecast["basis"], forecast["finish_at"] or forecast["soonest_at"]
    return {
        "task_id": task["task_id"], "intent_id": task["intent_id"], "task_type": task["task_type"], "handler": task["handler"],
        "domain": task["domain"], "predicted_start_at": forecast["start_at"], "predicted_finish_at": forecast["finish_at"],
        "sla_deadline": task["sla_deadline"], "sla_ms": task["sla_ms"], "overdue_ms": finish - task["sla_deadline"],
        "ahead": basis["ahead"], "workers": basis["slots"], "basis": basis, "advice": forecast["advice"],
        "message": f"{task['goal'][:80]!r} {miss_sentence(task, forecast)}"}  # fmt: skip


def miss_sentence(task: Row, forecast: Row) -> str:
    """What a person is told of a miss to come, without its subject."""
    known = forecast["finish_at"] is not None
    late = format_duration((forecast["finish_at"] if known else forecast["soonest_at"]) - task["sla_deadline"])
    return (f"will {'likely ' if known else ''}miss its SLA of {format_duration(task['sla_ms'])} by {late}{'' if known else ' at least'}: "
            + miss_reason(task, forecast) + advice_sentence(forecast["advice"]))  # fmt: skip


def miss_reason(task: Row, forecast: Row) -> str:
    """Why it will be late: the length of its run, what is ahead of it, its wait for a worker; each only where it makes it late."""
    basis, start = forecast["basis"], forecast["start_at"]
    takes = f"a run takes {format_duration(basis['p50_ms'])}"
    if task["status"] == "running":
        return takes if runs_too_long(basis, task) else f"its run takes longer than the {format_duration(basis['p50_ms'])} that is usual"
    ahead = f"{counted(basis['ahead'], 'task')} {'is' if basis['ahead'] == 1 else 'are'} ahead of it on {counted(basis['slots'], 'worker')}"
    if runs_too_long(basis, task):
        return f"{takes}, and {ahead}" if basis["ahead"] and start is not None and start > task["sla_deadline"] else takes
    if basis["ahead"]:
        return ahead
    wait = (start or forecast["soonest_at"] - basis["p50_ms"]) - task["queued_at"]
    return (f"it waits {format_duration(wait)} {WAITS_FOR.get(forecast.get('reason') or '', 'for a worker')}, and " if wait >= SECOND // 10 else "") + takes


WAITS_FOR = {"waiting_consent": "for consent", "waiting_dependency": "for other intents", "handler_paused": "for its handler"}


def advice_sentence(advice: list[Row]) -> str:
    """What would help, as the end of a sentence."""
    saving = [one["text"] for one in advice if one["saves"] and one["action"] != "sla"]
    if saving:
        return f"; in time with {', or '.join(saving)}"
    if not advice:
        return ""
    hardly = [one for one in advice if not one["saves"]]
    best = f"; not even with {hardly[0]['text']}" if hardly else ""
    return best + "".join(f"; {one['text']}" for one in advice if one["action"] == "sla")


def foresee_submission(tx: Tx, task: Row) -> Row:
    """What is foreseen of a task that has just been written; a miss is told at once, in the same transaction."""
    kind = kind_of(task)
    learned = learned_durations(tx, kind, tx.now) if isinstance(kind, str) else summed_up(command_durations(tx, task["domain"], task["goal"], tx.now))
    if not says_enough(learned):
        return submission_forecast(None, None)
    task = {**task, "rank": PRIORITIES.index(task["priority"]), "seq": tx.value(LAST_TASK), "forecast_at": None, "started_at": None, "finished_at": None}
    if task["handler"] is None:
        world: Row = {"now": tx.now, "handlers": {}, "ready": set(), "learned": {kind: {**learned, "enough": True}}}
        forecast = foresee(tx, world, [], task)
    else:
        world = gather(tx, tx.now, {task["handler"]: 1}, {task["handler"]: learned})
        forecast = foresee(tx, world, [], task, NEAR)
        if forecast["miss"]:
            line = head_of_queue(tx, world, NEAR) if all_waiting(tx, world) < NEAR else []
            forecast = foresee(tx, world, line, task, CLOSER)
    if forecast["miss"]:
        foretell(tx, task, forecast)
    return submission_forecast(task, forecast)


def submission_forecast(task: Row | None, forecast: Row | None) -> Row:
    """The part of a submission's document that is about the future."""
    seen = forecast or {"start_at": None, "finish_at": None, "miss": None, "advice": []}
    return {"predicted_start_at": format_instant(seen["start_at"]), "predicted_finish_at": format_instant(seen["finish_at"]),
            "predicted_miss": seen["miss"], "advice": advice_document(seen["advice"]),
            **({"warning": f"this {miss_sentence(task, seen)}"} if task is not None and seen["miss"] else {})}  # fmt: skip


def advice_document(advice: list[Row]) -> list[Row]:
    return [{**one, "predicted_finish_at": format_instant(one["predicted_finish_at"])} for one in advice]


# ---- the lines of a batch
# Nobody asks the store for each of them. What waits and what is new is walked through once in the order of claims, each taking the slot that is
# free first, for the mean of its handler: what reckoned() says of one task, of all. Where tasks climb, the orders of the higher classes are walked as well;
# that others climb past them is only seen where all is few enough to be played.

EXACTLY, PARTS = 200, 100  # so many of a class are placed where they stand; more are taken to lie evenly, in so many parts
ADVISED, WAYS_OF = 200, 3  # so many misses get advice; so many handlers, where a change is for one only and takes walks of its own
WALKED, PLAY_COSTS = 1_000_000, 25  # lines: after so many no further change is tried; one that is played takes as long as so many
TOLD_AT_ONCE = 1000
NOTHING_FORESEEN: Row = {"predicted_start_at": None, "predicted_finish_at": None, "predicted_miss": None, "advice": []}  # whose list nobody may change
STANDING_IN_CLASS = """SELECT order_at FROM htm_tasks WHERE handler = :name AND status = 'queued' AND available_at IS NULL AND rank = :rank
  AND seq <= :seq ORDER BY order_at, seq LIMIT :n"""
LAST_IN_CLASS = """SELECT order_at FROM htm_tasks WHERE handler = :name AND status = 'queued' AND available_at IS NULL AND rank = :rank
  AND seq <= :seq ORDER BY order_at DESC, seq DESC LIMIT 1"""
FORETELL_LINES = """UPDATE htm_tasks SET forecast_at = :now WHERE seq >= :first AND seq <= :last AND forecast_at IS NULL AND escalation_level = 0
  AND finished_at IS NULL"""
Entry = tuple[int, int, int, str, int]  # class, place in it, number of the line (-1: it was there before), handler, how many


FACTS = ("task_type", "handler", "domain", "priority", "order_at", "available_at", "queued_at", "sla_ms", "sla_deadline", "warn_at")
facts_of = operator.itemgetter(*FACTS)  # of a task, what lines have in common that differ in their ids and their goal only
BatchLine = tuple[Row, tuple[Any, ...], str, str, str | None]  # the document that is printed, the facts, goal, status, reason


def foresee_batch(tx: Tx, lines: list[BatchLine]) -> None:
    """Add to the document of each line what is foreseen of its task; misses are told, in the same transaction. `lines` are those that were written last.

    The first miss gets its `warning`, the first two hundred advice."""
    own: dict[str, int] = {}
    for _, facts, *_ in lines:
        own[facts[1]] = own.get(facts[1], 0) + 1
    learned = {name: learned_durations(tx, name, tx.now) for name in own}
    if not any(says_enough(figures) for figures in learned.values()):
        return
    world, first = gather(tx, tx.now, own, learned), int(tx.value(LAST_TASK)) - len(lines) + 1
    world["seq"] = first - 1  # what came before them
    few = len(lines) + all_waiting(tx, world) <= PLAYED and all(facts[5] is None for _, facts, *_ in lines)
    batch = Batch(world, lines, list(standing_before(tx, world)), head_of_queue(tx, world, PLAYED) if few else None, tx.show_life)
    misses = {}
    for number, forecast in tx.paced(batch.forecasts()):
        done = lines[number][0]
        done["predicted_start_at"], done["predicted_finish_at"] = format_instant(forecast["start_at"]), format_instant(forecast["finish_at"])
        done["predicted_miss"] = forecast["miss"]
        if forecast["miss"]:
            misses[number] = forecast
    batch.advise(misses)
    for number in itertools.islice(misses, ADVISED):
        lines[number][0]["advice"] = advice_document(misses[number]["advice"])
    for number in itertools.islice(misses, 1):
        lines[number][0]["warning"] = miss_sentence(batch.task(number), misses[number])
    told = [number for number in misses if may_be_foretold(batch.tasks[number], tx.now)]
    for at in range(0, len(told), TOLD_AT_ONCE):
        tx.show_life()
        foretell_lines(tx, batch, {number: misses[number] for number in told[at : at + TOLD_AT_ONCE]}, first)


def foretell_lines(tx: Tx, batch: Batch, misses: dict[int, Row], first: int) -> None:
    """Write that lines are going to miss their SLA; `first` is the place of the batch's first task."""
    tx.insert(INSERT_EVENT, [{"topic": "htm.sla.forecast", "source": tx.actor, "subject": batch.lines[number][0]["task_id"], "now": tx.now,
                              "payload": to_json(told_of(batch.task(number), forecast))} for number, forecast in misses.items()])  # fmt: skip
    for start, end in unbroken(list(misses)):
        tx.run(FORETELL_LINES, first=first + start, last=first + end, now=tx.now)


def unbroken(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """The first and the last of each unbroken row of ascending numbers."""
    start = 0
    for at, number in enumerate(numbers):
        if number - numbers[start] != at - start:
            yield numbers[start], numbers[at - 1]
            start = at
    if numbers:
        yield numbers[start], numbers[-1]


def standing_before(reader: Reader, world: Row) -> Iterator[Entry]:
    """What has waited before a batch came."""
    for name in [name for name in world["counts"] if has_seats(world, name)]:
        for rank in [rank for rank in range(len(PRIORITIES)) if waiting(reader, world, name, rank)]:
            places = [row["order_at"] for row in reader.all(STANDING_IN_CLASS, name=name, rank=rank, seq=world["seq"], n=EXACTLY)]
            if len(places) < EXACTLY:
                yield from ((rank, at, -1, name, 1) for at in places)
            else:
                span = int(reader.value(LAST_IN_CLASS, name=name, rank=rank, seq=world["seq"])) - places[0]
                n = waiting(reader, world, name, rank)
                shares = [n * (part + 1) // PARTS - n * part // PARTS for part in range(PARTS)]
                yield from ((rank, places[0] + span * part // PARTS, -1, name, share) for part, share in enumerate(shares) if share)


def has_seats(world: Row, name: str) -> bool:
    """Whether tasks of a handler get slots, as things are."""
    return goes_ahead(world, name) and any(world["pools"][number]["slots"] for number in serving(world, name))


class Seats:
    """Slots that are given to tasks in an order: for each of a pool, when it is free next; and the places of handlers with a limit."""

    def __init__(self, world: Row):
        pools: dict[tuple[Any, ...], list[float]] = {}  # ascending, as the places are; of those that take the same, one
        for pool in world["pools"]:
            pools.setdefault((pool["only"], pool["external"]), []).extend(at for at, _, _ in pool["slots"])
        for slots in pools.values():
            slots.sort()
        self.pools, self.places = dict[str, list[list[float]]](), dict[str, list[float]]()
        for name, handler in world["handlers"].items():
            taking = [world["pools"][number] for number in serving(world, name)]
            self.pools[name] = [slots for kind in dict.fromkeys((pool["only"], pool["external"]) for pool in taking) if (slots := pools[kind])]
            if handler["concurrency"] is not None:
                busy = sorted(row["end"][0] for row in world["active"] if row["handler"] == name)[-handler["concurrency"] :]
                self.places[name] = [float(world["now"])] * (handler["concurrency"] - len(busy)) + busy

    def pool(self, name: str) -> list[float]:
        """The slots of those that take a handler's task first."""
        pools = self.pools[name]
        return pools[0] if len(pools) == 1 else min(pools, key=operator.itemgetter(0))

    def start(self, name: str) -> float:
        """When a task of the handler would start."""
        at = self.pool(name)[0]
        return max(at, self.places[name][0]) if name in self.places else at

    def take(self, name: str, ms: float) -> float:
        """The same, and it does: it holds its slot for so long."""
        pools = self.pools[name]
        free = pools[0] if len(pools) == 1 else self.pool(name)
        start, slot = free[0], 0
        if name in self.places:  # it follows another of its handler, on the slot that this one leaves; those in between were free for others
            places = self.places[name]
            place = places.pop(0)
            if place > start:
                start, slot = place, bisect_right(free, place) - 1
            insort(places, start + ms)
        del free[slot]
        insort(free, start + ms)
        return start

    def take_many(self, name: str, ms: float, n: int) -> None:
        """Let n tasks take their slots, those after the first few in rounds of longer ones."""
        seats = len(self.places[name]) if name in self.places else len(self.pool(name))
        rounds = max(0, n - 2 * seats) // seats
        for _ in range(n - rounds * seats):
            self.take(name, ms)
        for _ in range(seats if rounds else 0):
            self.take(name, rounds * ms)


class Batch:
    """Tasks that are submitted together, and what is foreseen of each."""

    def __init__(self, world: Row, lines: list[BatchLine], before: list[Entry], line: list[Row] | None = None,
                 show_life: Callable[[], None] = lambda: None):  # fmt: skip
        """`before` is what waited before they came; `line` is the whole queue with them, where that is short enough to be played through.

        `show_life` is called at least each second."""
        self.show_life = show_life
        self.world, self.lines, self.line, kinds = world, lines, line, dict[Any, Row]()
        self.tasks = [kinds.get(kind) or kinds.setdefault(kind, line_task(*kind)) for line in lines for kind in ((line[1], *line[3:]),)]
        for task in kinds.values():
            task["obstacle"] = no_forecast(world, task)
        self.startable = [number for number, task in enumerate(self.tasks) if task["status"] == "queued" and has_seats(world, task["handler"])]
        entries = before + [(task["rank"], task["order_at"], number, task["handler"], int(task["available_at"] is None))
                            for number in self.startable for task in (self.tasks[number],)]  # fmt: skip
        self.orders = {len(PRIORITIES): sorted(entries)}
        self.unlearned = bool(world["unlearned"]) or any(learned_here(world, name) is None for name in {entry[3] for entry in entries})
        self.places: dict[str, list[tuple[Entry, float]]] = {}  # of each handler, its entries in their order, with their starts
        self.ahead = [0] * (len(lines) + 1)  # as in walk()
        self.walked = 0  # entries, in all walks

    def task(self, number: int) -> Row:
        """A line's task with what it has of its own."""
        done, _, goal, *_ = self.lines[number]
        return {**self.tasks[number], "task_id": done["task_id"], "intent_id": done["intent_id"], "goal": goal}

    def order(self, rank: int) -> list[Entry]:
        """The order of claims, were no class below this one."""
        if rank not in self.orders:
            self.orders[rank] = sorted(self.orders[len(PRIORITIES)], key=lambda entry: (min(entry[0], rank), entry[1], entry[2]))
            if self.orders[rank] == self.orders[len(PRIORITIES)]:  # as in most batches
                self.orders[rank] = self.orders[len(PRIORITIES)]
        return self.orders[rank]

    def walk(self, world: Row, rank: int, first: bool = False) -> list[float]:
        """When each line starts, were no class below this one; noted with what is ahead of it where this is the first walk."""
        self.show_life()
        seats, passed = Seats(world), 0
        starts = [math.inf] * (len(self.lines) + 1)  # one more, which what was there before falls on
        means = {name: figures["mean_ms"] if figures["enough"] else world["unknown_ms"] for name, figures in world["learned"].items()}
        for entry in self.order(rank):
            _, _, number, name, n = entry
            at = seats.take(name, means[name]) if n == 1 else seats.start(name)
            if n > 1:
                seats.take_many(name, means[name], n)
            starts[number] = at
            if first:
                self.ahead[number] = passed
                self.places.setdefault(name, []).append((entry, at))
            passed += n
        self.walked += len(self.order(rank))
        starts.pop()
        return starts

    def starts(self, world: Row, first: bool = False, asked: Iterable[int] = ()) -> list[float]:
        """When each line starts: not before it may, and as it climbs; that only of those `asked` for, where any are."""
        starts = self.walk(world, len(PRIORITIES), first) if first or self.line is None else []
        if self.line is not None:
            self.show_life()
            self.walked += PLAY_COSTS * len(self.line)
            found = Play(world, self.line).run()
            return [found.get(done["task_id"], NEVER)[0] for done, *_ in self.lines]
        for rank, share in ((1, (1, 2)), (0, (4, 5))):
            late = [(number, at) for number in asked or self.startable for task in (self.tasks[number],) if task["sla_ms"] and rank < task["rank"]
                    and starts[number] > (at := task["queued_at"] + task["sla_ms"] * share[0] // share[1])]  # fmt: skip
            climbed = self.walk(world, rank) if late and self.order(rank) is not self.orders[len(PRIORITIES)] else starts
            for number, at in late:
                starts[number] = min(starts[number], max(at, climbed[number]))
        return starts

    def forecasts(self) -> Iterator[tuple[int, Row]]:
        """The numbers of the lines of which something can be said, with that."""
        starts = self.starts(self.world, first=True)
        hopeful = self.starts(hopefully(self.world)) if self.unlearned else starts
        for number, task in enumerate(self.tasks):
            if learned_here(self.world, task["handler"]) is None:
                continue
            least = task["available_at"] or self.world["now"]
            start = (max(least, starts[number]), 0.0, max(least, hopeful[number]))
            forecast = forecast_of(self.world, task, start) if task["obstacle"] is None else hopeless(self.world, task, least)
            if forecast:
                yield number, {"start_at": None, "finish_at": None, "reason": task["obstacle"][0], **forecast} if task["obstacle"] else forecast

    def advise(self, misses: dict[int, Row]) -> None:
        """Add to the forecasts of the first misses what would save each: as advice_for() does, with a walk or a play of all for each change.

        Where the first change of a kind helps none of a handler, no larger one is tried for it; nor is any more where all walks get too long."""
        figures = self.world["learned"]
        for number, forecast in misses.items():
            forecast.update(basis=basis_of(self.world, self.tasks[number], self.ahead[number]), advice=[])
        misses = dict(itertools.islice(misses.items(), ADVISED))
        long = {number for number in misses if runs_too_long(figures[self.tasks[number]["handler"]], self.tasks[number])}
        tried: dict[int, list[Row]] = {number: [] for number, forecast in misses.items() if number not in long and forecast["finish_at"] is not None}
        for number in tried:
            tried[number] += self.raised(number, misses[number])
        for action, names, variants in self.ways({self.tasks[number]["handler"] for number in tried}):
            best: dict[int, tuple[float, str, bool]] = {}
            left = [number for number in tried if self.tasks[number]["handler"] in names]
            for text, changed in variants if left else ():
                if self.walked > WALKED:
                    break
                starts = self.starts(changed, asked=left)
                for number in left:
                    task = self.tasks[number]
                    finish = max(starts[number], task["available_at"] or 0) + figures[task["handler"]]["p50_ms"]
                    if finish < (best[number][0] if number in best else misses[number]["finish_at"]):
                        best[number] = finish, text, finish <= task["sla_deadline"]
                helped = {self.tasks[number]["handler"] for number in best}
                left = [number for number in left if self.tasks[number]["handler"] in helped and not (number in best and best[number][2])]
                if not left:
                    break
            for number, (finish, text, saves) in best.items():
                tried[number].append({"action": action, "text": text, "predicted_finish_at": round(finish), "saves": saves})
        for number, forecast in misses.items():
            task = self.tasks[number]
            if forecast["finish_at"] is not None:
                forecast["advice"] = [longer_sla(task, forecast["finish_at"])] if number in long else chosen_advice(tried[number], task, forecast["finish_at"])

    def raised(self, number: int, forecast: Row) -> Iterator[Row]:
        """A higher class, if that helps: it then starts at the latest when the one of its handler would that it comes before."""
        task, best = self.tasks[number], None
        for rank, word in ((1, "high"), (0, "critical")):
            places = self.places[task["handler"]]
            at = bisect_left(places, ((rank, task["order_at"], number, "", 0), 0.0)) if rank < task["rank"] else len(places)
            finish = places[at][1] + self.world["learned"][task["handler"]]["p50_ms"] if at < len(places) else math.inf
            if finish < (best["predicted_finish_at"] if best else forecast["finish_at"]):
                best = {"action": "priority", "text": f"grace task priority {self.lines[number][0]['task_id']} {word}",
                        "predicted_finish_at": round(finish), "saves": finish <= task["sla_deadline"]}  # fmt: skip
                if best["saves"]:
                    break
        if best:
            yield best

    def ways(self, names: set[str]) -> Iterator[tuple[str, set[str], Iterator[tuple[str, Row]]]]:
        """Changes that somebody could make, by kind, with the handlers that they are for, the smallest first; of the first few handlers."""
        handlers, inside = self.world["handlers"], sorted(name for name in names if not self.world["handlers"][name]["external"])
        for whom in [inside, *([name] for name in sorted(names.difference(inside))[:WAYS_OF])]:
            if whom:
                yield "workers", set(whom), ((several_workers(n, whom != inside), more_workers(self.world, whom[0], n)) for n in WAYS)
        for name in [name for name in sorted(names) if handlers[name]["concurrency"] is not None][:WAYS_OF]:
            yield "concurrency", {name}, (more_places(self.world, name, n) for n in WAYS)


def line_task(facts: tuple[Any, ...], status: str, reason: str | None) -> Row:
    """What forecasts need of a task that has just been submitted, but what it has of its own."""
    return {**dict(zip(FACTS, facts, strict=True)), "rank": PRIORITIES.index(facts[3]), "status": status, "reason": reason, "task_id": None,
            "forecast_at": None, "escalation_level": 0, "set_aside": None, "started_at": None, "finished_at": None}  # fmt: skip


# ---- looked at again

FORETOLD_AT_ONCE = 50  # by a daemon that looks again


def misses_to_come(reader: Reader, now: int) -> list[tuple[Row, Row]]:
    """The tasks that run, that wait for consent, and at the head of the queue, which are going to miss their SLA and were not said to; with forecasts."""
    world = gather(reader, now)
    held = world["active"] + reader.all(PARKED_LINE, n=WINDOW)
    found = [(row, foresee(reader, world, [], row, NEAR)) for row in held if may_be_foretold(row, now) and learn_of(reader, world, kind_of(row))]
    found = [(row, forecast) for row, forecast in found if forecast["miss"]]
    line = head_of_queue(reader, world, WINDOW)
    starts = played(world, line) if any(may_be_foretold(row, now) for row in line) else {}
    for row in line:
        if may_be_foretold(row, now) and row["task_id"] in starts and no_forecast(world, row) is None and len(found) < FORETOLD_AT_ONCE:
            forecast = forecast_of(world, row, starts[row["task_id"]])
            if forecast and forecast["miss"]:
                found.append((row, foresee(reader, world, line, row, NEAR)))
    return [(row, forecast) for row, forecast in found if forecast["miss"]]


# =====================================================================================================================
# intents
# The goal's own row. Its status follows its current task in the same transaction, and it learns from the outcome once.
# Rescues and tasks that were replaced move no intent.

INSERT_INTENT = """INSERT INTO intent_records (intent_id, htm_task_id, goal, expected_outcome, domain, handler, priority, status,
    sla_ms, confidence, risk_level, context, created_at, dispatched_at, created_by, idempotency_key)
  VALUES (:intent_id, :task_id, :goal, :expected_outcome, :domain, :handler, :priority, 'dispatched',
    :sla_ms, :confidence, :risk_level, :context, :now, :now, :created_by, :key)"""
GET_INTENT = "SELECT * FROM intent_records WHERE intent_id = :id"
INTENT_BY_KEY = "SELECT * FROM intent_records WHERE idempotency_key = :key"
FOLLOW_OPEN = """UPDATE intent_records SET status = :status
  WHERE intent_id = :intent_id AND htm_task_id = :task_id AND status IN ('dispatched', 'executing')"""
FOLLOW_FINAL = """UPDATE intent_records SET status = :status, completed_at = :now, success = :success, sla_met = :sla_met,
    result = :result, actual_execution_ms = :execution_ms, learned_from = 1
  WHERE intent_id = :intent_id AND htm_task_id = :task_id AND status IN ('dispatched', 'executing')"""
DISPATCH_AGAIN = """UPDATE intent_records SET status = 'dispatched', htm_task_id = :task_id, dispatched_at = :now, completed_at = NULL,
    success = NULL, sla_met = NULL, result = NULL, actual_execution_ms = NULL, learned_from = 0
  WHERE intent_id = :intent_id AND status <> 'completed'"""
INTENT_OF_TASK = {"queued": "dispatched", "blocked": "dispatched", "assigned": "dispatched", "running": "executing"}


def get_intent(reader: Reader, intent_id: str) -> Row:
    row = reader.one(GET_INTENT, id=intent_id)
    if row is None:
        raise NotFoundError(f"there is no intent {intent_id!r}", "see them with: grace intent list")
    return row


def find_task_id(reader: Reader, text: str) -> str:
    """The id of a task from itself or an unambiguous prefix; of an intent's, its current task's."""
    try:
        return find_id(reader, "task", text)
    except NotFoundError as error:
        try:
            task_id = get_intent(reader, find_id(reader, "intent", text))["htm_task_id"]
        except NotFoundError:
            raise error from None
        if task_id is None:
            raise
        return str(task_id)


def follow(tx: Tx, task: Row) -> None:
    """The intent's status after its task's. A rescue, or a task that has been replaced, moves no intent."""
    if task["task_type"] != "rescue":
        tx.run(FOLLOW_OPEN, intent_id=task["intent_id"], task_id=task["task_id"], status=INTENT_OF_TASK[task["status"]])


def follow_final(tx: Tx, task: Row) -> bool:
    """Close the intent with its task; whether it was this task's to close."""
    closed = tx.run(FOLLOW_FINAL, intent_id=task["intent_id"], task_id=task["task_id"], status=task["status"], now=task["finished_at"],
                    success=int(task["status"] == "completed"), sla_met=task["sla_met"], result=task["result"],
                    execution_ms=task["execution_time_ms"])  # fmt: skip
    if closed:
        emit(tx, f"agentic.intent.{task['status']}", task["task_id"], {
            "intent_id": task["intent_id"], "task_id": task["task_id"], "goal": task["goal"], "domain": task["domain"],
            "status": task["status"], "reason": task["reason"], "sla_met": as_truth(task["sla_met"]), "error": task["error"],
            "execution_time_ms": task["execution_time_ms"]})  # fmt: skip
    return bool(closed)


# =====================================================================================================================
# lifecycle
# The functions that write across sections: submit, start, finish, cancel, retry, block and unblock, recover, repair.
# Each runs inside the caller's transaction and leaves nothing half-done.

DEPENDANTS = """SELECT * FROM htm_tasks WHERE status = 'blocked'
  AND task_id IN (SELECT task_id FROM task_dependencies WHERE intent_id = :intent_id)"""
WAITS_STILL = """SELECT COUNT(*) AS n FROM task_dependencies d JOIN intent_records i ON i.intent_id = d.intent_id
  WHERE d.task_id = :task_id AND i.status <> 'completed'"""
INSERT_DEPENDENCY = """INSERT INTO task_dependencies (task_id, intent_id) VALUES (:task_id, :intent_id)
  ON CONFLICT (task_id, intent_id) DO NOTHING"""
SPEC_DEFAULTS: Row = {
    "handler": None, "domain": "general", "priority": "normal", "sla_ms": None, "context": "{}", "expected_outcome": None,
    "confidence": None, "risk_level": None, "created_by": "grace", "intent_id": None, "key": None, "at": None, "after": (),
    "max_attempts": None, "timeout_ms": None, "command": False,
}  # fmt: skip
SHAPE = operator.itemgetter("handler", "domain", "priority", "sla_ms", "expected_outcome", "confidence", "risk_level", "created_by", "at",
                            "max_attempts", "timeout_ms", "command")  # fmt: skip
SHAPES_KEPT = PAIRS_AT_ONCE = 100  # of a batch: the memory for more would cost more than it saves
PARKED_OF_HANDLER = "SELECT COUNT(*) AS n FROM htm_tasks WHERE status = 'blocked' AND reason = 'waiting_consent' AND handler = :name"
PARKED_CONSENTS = """SELECT t.task_id, t.handler, h.secrets, h.paused, c.consent_id, c.secret_key, c.consent_status, c.mode, c.standing_id,
    c.grant_expires_at, c.expired_reason, c.denial_reason, c.revocation_reason, json(c.request) -> 'claimed' ->> 'action' AS action
  FROM htm_tasks t JOIN handlers h ON h.name = t.handler
  LEFT JOIN secret_consent_records c ON c.task_id = t.task_id AND c.mode = 'collect'
  WHERE t.status = 'blocked' AND t.reason = 'waiting_consent' ORDER BY t.rank, t.order_at, t.seq, c.seq"""
PARKED_AT_ONCE = 1000  # of one handler: what is parked is looked at each time that a consent changes


def submit(tx: Tx, specs: Iterable[Row]) -> list[Row]:
    """Record intents with their tasks; for each the document that is printed of it. All of them, or an error and none.

    Each with its forecast, too; a miss that is foreseen is told in the same transaction.
    A spec has `goal` and the keys of SPEC_DEFAULTS; `command` True means that the caller itself runs it."""
    done: list[Row] = []
    made: list[tuple[Row, Row]] = []
    keys: dict[str, Row] = {}
    shapes: dict[Any, Shape] = {}
    taken: set[str] = set()
    lines: list[BatchLine] = []
    for given in specs:
        spec = {**SPEC_DEFAULTS, **given}
        first = keys.get(spec["key"]) or duplicate_of(tx, spec["key"]) if spec["key"] else None
        if first:
            done.append({**first, "duplicate": True, **NOTHING_FORESEEN, "advice": []})
            continue
        try:
            intent, task = intent_and_task(tx, spec, shapes, taken)
            if spec["after"]:  # what came before in this batch must be findable
                insert_pairs(tx, made)
                block(tx, task, spec["after"])
        except GraceError as error:
            error.message = f"--batch: line {spec['line']}: {error.message}" if "line" in spec else error.message
            raise
        made.append((intent, task))
        done.append({"intent_id": intent["intent_id"], "task_id": task["task_id"], "status": task["status"],
                     "sla_deadline": format_instant(task["sla_deadline"]), "duplicate": False, **NOTHING_FORESEEN, "advice": [],
                     **({"sla_basis": spec["sla_basis"]} if "sla_basis" in spec else {})})  # fmt: skip
        lines.append((done[-1], task["facts"], spec["goal"], task["status"], task["reason"]))
        if spec["key"]:
            keys[spec["key"]] = done[-1]
        if spec["after"] or len(made) == PAIRS_AT_ONCE:
            insert_pairs(tx, made)
            tx.show_life()
        if spec["after"]:
            tx.many(INSERT_DEPENDENCY, ({"task_id": task["task_id"], "intent_id": needed} for needed in task["needs"]))
    alone = made[0][1] if len(made) == 1 and len(done) == 1 and "line" not in spec else None
    insert_pairs(tx, made)
    if alone is not None:
        done[0].update(foresee_submission(tx, alone))
    elif lines:
        foresee_batch(tx, lines)
    return done


def settle_auto(reader: Reader, specs: Iterable[Row], now: int) -> Iterator[Row]:
    """Submissions with the SLAs that grace was asked to find itself, each reckoned once for a kind of work and an hour of the day.

    ConflictError where there are too few runs; it names the line of a batch. Called before the transaction, for it takes a while."""
    rate, known = ratio_setting(reader, "learn.rate"), dict[Any, Row]()
    for spec in specs:
        if spec.get("sla_ms") != "auto":
            yield spec
            continue
        if spec.get("key") and reader.one(INTENT_BY_KEY, key=spec["key"]):  # submitted before: nothing of this is looked at
            yield {**spec, "sla_ms": None}
            continue
        domain, at = spec.get("domain") or "general", max(now, spec.get("at") or 0)
        name = None if spec.get("command") else spec.get("handler") or domain
        key = name, (domain, spec["goal"]) if name is None else None, at // HOUR % 24
        try:
            known[key] = known.get(key) or auto_or_refuse(reader, name, domain, spec["goal"], rate, at)
        except GraceError as error:
            error.message = f"--batch: line {spec['line']}: {error.message}" if "line" in spec else error.message
            raise
        yield {**spec, "sla_ms": known[key]["sla_ms"], "sla_basis": known[key]}


def auto_or_refuse(reader: Reader, name: str | None, domain: str, goal: str, rate: float, at: int) -> Row:
    if name is not None:
        find_handler(reader, name)
    runs = runs_of_command(reader, domain, goal) if name is None else runs_of(reader, name)
    basis = auto_sla(runs, rate, at)
    if basis is None:
        whose = f"of this goal in the domain {domain}" if name is None else f"of {name}"
        raise ConflictError(f"no SLA can be found: there are {len(runs)} successful runs {whose}, and {MIN_RUNS} are needed",
                            "name one until then, such as --sla 5m" + (", and keep the same --goal" if name is None else ""))  # fmt: skip
    return basis


def duplicate_of(tx: Tx, key: str) -> Row | None:
    row = tx.one(INTENT_BY_KEY, key=key)
    if row is None:
        return None
    task = tx.one(GET_TASK, id=row["htm_task_id"])
    return {"intent_id": row["intent_id"], "task_id": row["htm_task_id"], "status": task["status"] if task else None,
            "sla_deadline": format_instant(task["sla_deadline"]) if task else None}  # fmt: skip


class Shape:
    """What all submissions have in common that differ in their ids, goal and context only: the rows, and the ends of two JSON texts."""

    def __init__(self, intent: Row, task: Row, payload: str, event: str):
        self.intent, self.task, self.payload, self.event = intent, task, payload, event


def shape_of(tx: Tx, spec: Row) -> Shape:
    name = None if spec["command"] else spec["handler"] or spec["domain"]
    try:
        handler = find_handler(tx, name) if name else HANDLER_DEFAULTS
    except NotFoundError as error:
        if not spec["handler"]:
            error.message += " (the domain's name stands for the handler where --handler is not given)"
        raise
    start = max(tx.now, spec["at"] or 0)
    sla = spec["sla_ms"] if spec["sla_ms"] is not None else sla_in_force(handler)
    intent = {**spec, "handler": name, "sla_ms": sla, "now": tx.now}
    task = task_row(tx, task_type=name or "command", domain=spec["domain"], handler=name, priority=spec["priority"], sla_ms=sla, queued_at=start,
                    available_at=start if start > tx.now else None, warn_at=handler["warn_at"], critical_at=handler["critical_at"],
                    timeout_ms=spec["timeout_ms"] or handler["timeout_ms"],
                    max_attempts=spec["max_attempts"] or (1 if spec["command"] else handler["max_attempts"]))  # fmt: skip
    task["next_at"] = next_step_at(task, setting(tx, "queue.age_every"))
    task["facts"] = facts_of(task)
    told = to_json({name: intent[name] for name in ("domain", "handler", "priority", "sla_ms", "created_by")})
    return Shape(intent, task, payload_end(intent, task), told[1:])


def intent_and_task(tx: Tx, spec: Row, shapes: dict[Any, Shape], taken: set[str]) -> tuple[Row, Row]:
    """The two rows of one submission, not yet written."""
    key = SHAPE(spec)
    if key not in shapes:
        if len(shapes) == SHAPES_KEPT:
            shapes.clear()
        shapes[key] = shape_of(tx, spec)
    shape = shapes[key]
    intent_id = spec["intent_id"] or new_id("int", tx.now)
    if spec["intent_id"] and (intent_id in taken or tx.one(GET_INTENT, id=intent_id)):
        raise ConflictError(f"the intent {intent_id!r} exists already", "to make a repeated call harmless, use --key")
    taken.add(intent_id)
    task_id, goal = new_id("task", tx.now), spec["goal"]
    start = payload_start(intent_id, task_id, goal)
    intent = {**shape.intent, "intent_id": intent_id, "task_id": task_id, "goal": goal, "context": spec["context"], "key": spec["key"],
              "event": start + shape.event}  # fmt: skip
    task = {**shape.task, "task_id": task_id, "intent_id": intent_id, "goal": goal,
            "payload": f"{start}{shape.payload}{spec['context']}}}"}  # fmt: skip
    return intent, task


def payload_start(intent_id: str, task_id: str, goal: str) -> str:
    return f'{{"intent_id":{to_json(intent_id)},"task_id":{to_json(task_id)},"goal":{to_json(goal)},'


def payload_end(intent: Row, task: Row) -> str:
    """Of a payload, what follows the goal, up to the context."""
    facts = {**{name: intent[name] for name in ("expected_outcome", "domain", "priority", "risk_level", "confidence", "created_by")},
             "sla_ms": task["sla_ms"], "sla_deadline": format_instant(task["sla_deadline"])}  # fmt: skip
    return f'{to_json(facts)[1:-1]},"context":'


def payload_of(intent: Row, task: Row) -> str:
    """What the handler is told, with the full context; the context's text goes in as it is."""
    return f"{payload_start(task['intent_id'], task['task_id'], intent['goal'])}{payload_end(intent, task)}{intent['context']}}}"


def insert_pairs(tx: Tx, pairs: list[tuple[Row, Row]]) -> None:
    """Write the rows and the events of submissions, and empty the list."""
    if not pairs:
        return
    tx.insert(INSERT_INTENT, [intent for intent, _ in pairs])
    insert_tasks(tx, [task for _, task in pairs])
    tx.insert(INSERT_EVENT, [{"topic": "agentic.intent.created", "source": tx.actor, "subject": intent["task_id"], "now": tx.now,
                              "payload": intent["event"]} for intent, _ in pairs])  # fmt: skip
    pairs.clear()


def block(tx: Tx, task: Row, after: Iterable[str]) -> None:
    """Let a task that is about to be written wait for intents. `needs` are their full ids."""
    task["needs"] = [find_id(tx, "intent", text) for text in after]
    states = {needed: get_intent(tx, needed)["status"] for needed in task["needs"]}
    for needed, status in states.items():
        if status in FINAL and status != "completed":
            raise ConflictError(f"the intent {needed} has ended {status}, so waiting for it would never end",
                                f"run it again first: grace intent retry {needed}")  # fmt: skip
    if any(status != "completed" for status in states.values()):
        task["status"], task["reason"] = "blocked", "waiting_dependency"
        del task["next_at"]  # a blocked task has other steps


def claim(tx: Tx, worker: str, n: int, only: Iterable[str] = ()) -> list[Row]:
    """Up to n queued tasks become this daemon's, best first; `only` restricts the handlers. Those that need consent first are parked."""
    handlers = tx.all(RUNNABLE)
    if only:
        handlers = [row for row in handlers if row["name"] in set(only)]
    held = [row for row in handlers if row["secrets"] != "[]"]
    for handler in held:
        park_unready(tx, handler)
    line = (task_id for task_id in first_in_line(tx, handlers, n) if not held or is_ready(tx, task_id))
    taken = (take(tx, task_id, worker) for task_id in line)
    return [row for row in taken if row is not None]


def is_ready(reader: Reader, task_id: str) -> bool:
    """Whether a task has consent for all secrets of its handler; one of a handler without secrets needs none."""
    task = get_task(reader, task_id)
    secrets = (reader.one(GET_HANDLER, name=task["handler"]) or HANDLER_DEFAULTS)["secrets"]
    consents, now = reader.all(CONSENTS_OF_TASK, id=task_id) if secrets != "[]" else [], clock()
    return all(wish_state(consents, key, action, now)[0] == "ready" for key, action in wishes_of(json.loads(secrets)))


def park_unready(tx: Tx, handler: Row) -> None:
    """Let the tasks at the head of a handler's line that have no consent yet wait apart from it, until one that has comes first."""
    if handler["concurrency"] is not None and tx.value(OPEN_ATTEMPTS_OF_HANDLER, name=handler["name"]) >= handler["concurrency"]:
        return
    room = PARKED_AT_ONCE - tx.value(PARKED_OF_HANDLER, name=handler["name"])
    while room > 0:
        heads = tx.all(HEADS, name=handler["name"], n=min(room, CLAIM_BATCH))
        unready = [head["task_id"] for head in heads if not is_ready(tx, head["task_id"])]
        for task_id in unready:
            park(tx, get_task(tx, task_id))
        room -= len(unready)
        if not unready or len(unready) < len(heads):
            return


def park(tx: Tx, task: Row) -> Row:
    """A queued task waits for consent: no attempt is made and no worker is held, while its SLA clock goes on."""
    ahead = {**task, "status": "blocked"}
    return changed_task(tx, task, PARK, next_at=next_step_at(ahead, setting(tx, "queue.age_every")))


def parked_tasks(reader: Reader, only: Iterable[str] = ()) -> list[Row]:
    """The tasks that wait for consent, best first: each with its handler, and for each of its wishes the state and the consent."""
    tasks: dict[str, list[Row]] = {}
    for row in reader.all(PARKED_CONSENTS):
        if not only or row["handler"] in set(only):
            tasks.setdefault(row["task_id"], []).append(row)
    now, parked = clock(), []
    for task_id, rows in tasks.items():
        states = {wish: wish_state(rows, *wish, now) for wish in wishes_of(json.loads(rows[0]["secrets"]))}
        parked.append({"task_id": task_id, "handler": rows[0]["handler"], "paused": rows[0]["paused"], "wishes": states})
    return parked


def settle_parked(tx: Tx, only: Iterable[str] = ()) -> int:
    """Let the parked tasks go on that have all they need, and end those that were refused; how many."""
    moved = 0
    for parked in parked_tasks(tx, only):
        states = dict(parked["wishes"].values())  # of two in one state, one will do
        if "refused" in states:
            refuse_parked(tx, parked["task_id"], why_refused(states["refused"]))
        elif states.keys() <= {"ready"}:
            task = get_task(tx, parked["task_id"])
            changed_task(tx, task, UNBLOCK, next_at=next_step_at({**task, "status": "queued"}, setting(tx, "queue.age_every")))
            withdraw_for_task(tx, task["task_id"], ("pending",))  # the handler may have been given other secrets meanwhile
        else:
            continue
        moved += 1
    return moved


def why_refused(consent: Row) -> str:
    """The sentence that whoever asked is told."""
    try:
        refuse_closed(consent)
    except GraceError as error:
        return error.message
    return f"{consent['consent_id']} is {consent['consent_status']}"


def refuse_parked(tx: Tx, task_id: str, error: str) -> None:
    """A task that may not have what it needs has failed, and is not tried again."""
    task = get_task(tx, task_id)
    if (task["status"], task["reason"]) == ("blocked", "waiting_consent"):
        finish(tx, task, "failed", "consent_denied", {"error": error})


def claim_external(tx: Tx, names: Iterable[str], worker: str, lease_ms: int) -> Row | None:
    """One task for a program that is not grace, running under a lease from now; expired leases go back first."""
    recover_expired(tx)
    sweep(tx)
    handlers = [row for name in names for row in tx.all(CLAIMABLE_BY_NAME, name=name)]
    for task_id in first_in_line(tx, handlers, 1):
        taken = take(tx, task_id, worker, lease_ms)
        if taken:
            return {**taken, **start(tx, taken, None, None, None)}
    return None


def start(tx: Tx, task: Row, pid: int | None, pid_started: int | None, boot_id: str | None) -> Row:
    """The attempt's process runs; ConflictError when the task was taken away meanwhile."""
    tx.run(START_ATTEMPT, task_id=task["task_id"], attempt_id=task["attempt_id"], now=tx.now, pid=pid, pid_started=pid_started, boot_id=boot_id)
    changes = tx.one(START, task_id=task["task_id"], attempt_id=task["attempt_id"], now=tx.now, actor=tx.actor)
    if changes is None:
        raise ConflictError(f"the task {task['task_id']} has changed meanwhile")
    row = {**task, **changes}
    tx.count({**row, "status": "assigned"}, row)  # `task` is as of the claim; it may have climbed since
    follow(tx, row)
    return row


def end_attempt(tx: Tx, task_id: str, attempt_id: str, ending: Row) -> Row | None:
    """An attempt has ended: close its row and decide what becomes of the task; the task's row afterwards.

    `ending`: outcome, ended_by, exit_status, error, result, retry (False: no further attempt), log_bytes, log_dropped.
    A task that the attempt no longer owns is left as it is; one that somebody has deleted is None."""
    task = tx.one(GET_TASK, id=task_id)
    end_attempt_row(tx, task_id, attempt_id, ending)
    if task is None or task["attempt_id"] != attempt_id:
        return task
    outcome = ending["outcome"]
    if outcome == "completed":
        return finish(tx, task, "completed", None, ending)
    if outcome in ("interrupted", "rescued"):
        return requeue(tx, task, outcome, ending, task["attempt_number"] - 1)
    if outcome in ("failed", "timeout") and ending.get("retry", True) and task["attempt_number"] < task["max_attempts"]:
        handler = tx.one(GET_HANDLER, name=task["handler"]) or HANDLER_DEFAULTS
        pause = backoff_ms(handler["backoff_ms"], task["attempt_number"], os.urandom(1)[0] / 255)
        return requeue(tx, task, "backoff", ending, task["attempt_number"], tx.now + pause)
    return finish(tx, task, outcome, ending.get("reason"), ending)


def requeue(tx: Tx, task: Row, reason: str, ending: Row, attempt_number: int, available_at: int | None = None, died: bool = False) -> Row:
    recovered = int(reason == "recovered")
    ahead = {**task, "status": "queued", "available_at": available_at}
    row = changed_task(tx, task, REQUEUE, reason=reason, attempt_number=attempt_number, available_at=available_at,
                       next_at=next_step_at(ahead, setting(tx, "queue.age_every")), recovered=recovered, died=int(died),
                       error=ending.get("error"), exit_status=ending.get("exit_status"), attempt_id=task["attempt_id"],
                       execution_ms=execution_ms(task, tx.now))  # fmt: skip
    tx.total("tasks_recovered", recovered)
    follow(tx, row)
    return row


def execution_ms(task: Row, now: int) -> int | None:
    """How long the attempt has run that ends now, or else the last one did."""
    last: int | None = task["execution_time_ms"]
    return max(0, now - int(task["started_at"])) if task["status"] == "running" else last


def finish(tx: Tx, task: Row, status: str, reason: str | None, ending: Row, cause: str | None = None) -> Row:
    """End a task for good, with all that hangs on it: missed steps, intent, outcome, rescue, dependants.

    `cause` is the rescue by whose own command it ends, which then goes on."""
    row, closed = finish_one(tx, task, status, reason, ending, cause)
    if closed:
        settle_dependants(tx, row)
    return row


def finish_one(tx: Tx, task: Row, status: str, reason: str | None, ending: Row, cause: str | None = None) -> tuple[Row, bool]:
    """End one task and its rescue; its row, and whether its intent has ended with it."""
    task = take_due_steps(tx, task, setting(tx, "queue.age_every"), ending=True)
    result = ending.get("result")
    row = changed_task(tx, task, FINISH, status=status, reason=reason, result=None if result is None else to_json(result),
                       error=ending.get("error"), exit_status=ending.get("exit_status"), was=task["status"],
                       sla_met=sla_verdict(status, task["sla_deadline"], task["escalation_level"], tx.now),
                       execution_ms=execution_ms(task, tx.now), attempt_id=task["attempt_id"] or "")  # fmt: skip
    add_metrics(tx, row)
    end_rescue_of(tx, row, cause)
    if status != "completed" or reason is not None:  # else it has used what it was given
        withdraw_for_task(tx, row["task_id"])
    if row["task_type"] == "rescue":
        return row, False
    record_outcome(tx, row)
    return row, follow_final(tx, row)


def end_rescue_of(tx: Tx, task: Row, cause: str | None) -> None:
    if task["escalation_level"] < 3:
        return
    rescue = tx.one(RESCUE_OF, id=task["task_id"])
    if rescue is None:
        return
    if task["status"] == "completed":
        tx.total("tasks_rescued")
    if rescue["status"] not in FINAL and rescue["task_id"] != cause:
        finish(tx, rescue, "cancelled", "original_finished", {})


def settle_dependants(tx: Tx, task: Row) -> None:
    """Free the tasks that waited for this task's intent; when it did not complete, cancel them and all that waits for those."""
    ended = [task]
    while ended:
        last = ended.pop()
        for waiting in tx.all(DEPENDANTS, intent_id=last["intent_id"]):
            if last["status"] != "completed":
                error = f"the intent {last['intent_id']} ended {last['status']}"
                row, closed = finish_one(tx, waiting, "cancelled", "dependency_failed", {"error": error})
                ended += [row] if closed else []
            elif not tx.value(WAITS_STILL, task_id=waiting["task_id"]):
                ahead = {**waiting, "status": "queued"}
                changed_task(tx, waiting, UNBLOCK, next_at=next_step_at(ahead, setting(tx, "queue.age_every")))


def cancel(tx: Tx, task: Row, reason: str = "cancelled", cause: str | None = None) -> Row:
    """End an open task as cancelled. Its process, if any, is ended by whoever runs it, and until then owns the attempt."""
    if task["status"] in FINAL:
        raise ConflictError(f"the task {task['task_id']} has ended already ({task['status']})")
    close_unseen_attempt(tx, task, "cancelled")
    return finish(tx, task, "cancelled", reason, {}, cause)


def set_priority(tx: Tx, task: Row, priority: str) -> tuple[Row, bool]:
    """Give an open task another place in the queue; its row, and whether that changed anything. What was asked at submission stays in the intent.

    ConflictError when it has ended, or when so much of its SLA is gone that the ladder would raise it again at once."""
    if task["status"] in FINAL:
        raise ConflictError(f"the task {task['task_id']} has ended already ({task['status']})")
    if task["priority"] == priority:
        return task, False
    aged_at = task["aged_at"] if task["sla_ms"] is not None else max(tx.now, task["queued_at"])  # ageing counts from where it is put
    moved, age_every = {**task, "priority": priority, "aged_at": aged_at}, setting(tx, "queue.age_every")
    due = [name for at, name in urgency_steps(moved, age_every) if at <= tx.now]
    if due and PRIORITIES.index(priority) > PRIORITIES.index(task["priority"]):
        least = "critical" if due[-1] == "urgency_four_fifths" else "high"
        raise ConflictError(f"the task {task['task_id']} has used so much of its SLA that it stays at least {least}")
    next_at = None if task["set_aside"] else next_step_at(moved, age_every)
    return changed_task(tx, task, SET_PRIORITY, priority=priority, aged_at=aged_at, next_at=next_at), True


def close_unseen_attempt(tx: Tx, task: Row, outcome: str) -> None:
    """An external worker's attempt ends with its task: there is no process of ours to wait for."""
    attempt = tx.one(OPEN_ATTEMPT, id=task["task_id"])
    if attempt and attempt["lease_ms"] is not None:
        end_attempt_row(tx, attempt["task_id"], attempt["attempt_id"], {"outcome": outcome})


def retry(tx: Tx, task: Row, cause: str | None = None) -> Row:
    """A new task in place of this one, with a new SLA window; an open original is ended by it."""
    intent = tx.one(GET_INTENT, id=task["intent_id"])
    if task["task_type"] == "rescue" or intent is None:
        raise ConflictError(f"{task['task_id']} is a rescue, which is not retried", f"retry what it rescues: grace task retry {task['parent_task_id']}")
    if intent["htm_task_id"] != task["task_id"]:
        raise ConflictError(f"{task['task_id']} was replaced already", f"its intent's current task is {intent['htm_task_id']}")
    if task["status"] == "completed":
        raise ConflictError(f"the task {task['task_id']} has completed", "submit the goal again to do it once more")
    if task["handler"] is None:
        raise ConflictError("a command of `grace run` lives in its own process and cannot be retried here", "run it again with: grace run … -- CMD")
    handler = find_handler(tx, task["handler"])
    row = task_row(tx, task_id=new_id("task", tx.now), intent_id=task["intent_id"], retry_of=task["task_id"], task_type=task["task_type"],
                   domain=task["domain"], handler=task["handler"], goal=task["goal"], payload="", priority=intent["priority"],
                   sla_ms=intent["sla_ms"], warn_at=handler["warn_at"], critical_at=handler["critical_at"],
                   timeout_ms=task["timeout_ms"], max_attempts=task["max_attempts"])  # fmt: skip
    row["payload"] = payload_of(intent, row)
    insert_tasks(tx, [row])
    tx.run(DISPATCH_AGAIN, intent_id=task["intent_id"], task_id=row["task_id"], now=tx.now)
    if task["status"] not in FINAL:
        cancel(tx, task, "rescued" if cause else "retried", cause)
    return get_task(tx, row["task_id"])


def own_attempt(tx: Tx, task_id: str, worker: str | None, attempt_id: str | None) -> Row:
    """The running task, if this worker (and attempt, where named) owns it; ConflictError otherwise."""
    task = get_task(tx, task_id)
    if task["status"] != "running" or (worker is not None and task["assigned_worker"] != worker) or \
            (attempt_id is not None and task["attempt_id"] != attempt_id):  # fmt: skip
        owner = f"is owned by {task['assigned_worker']}" if task["attempt_id"] else f"is {task['status']}"
        raise ConflictError(f"the task {task_id} {owner}: this worker does not own that attempt any more", "claim the next task")
    return task


def heartbeat(tx: Tx, task_id: str, worker: str, attempt_id: str | None) -> int | None:
    """Renew an external worker's lease; the instant at which it runs out now."""
    task = own_attempt(tx, task_id, worker, attempt_id)
    row = tx.one(RENEW_LEASE, task_id=task_id, attempt_id=task["attempt_id"], now=tx.now)
    return row["lease_expires_at"] if row else None


def progress(tx: Tx, task_id: str, worker: str | None, attempt_id: str | None, done: float, total: float, note: str | None) -> None:
    own_attempt(tx, task_id, worker, attempt_id)
    tx.run(SET_PROGRESS, task_id=task_id, progress=to_json({"done": done, "total": total, "note": note, "at": format_instant(tx.now)}))


def rescue_for(reader: Reader, task_id: str, worker: str | None, attempt_id: str | None, rescue_id: str | None) -> str | None:
    """The open rescue of this task in whose name the caller speaks: by its attempt, its own id, or its worker."""
    rescue = reader.one(RESCUE_OF, id=task_id)
    if rescue is None or rescue["status"] not in ("assigned", "running"):
        return None
    speaks: bool = attempt_id == rescue["attempt_id"] or rescue_id == rescue["task_id"] or (worker is not None and worker == rescue["assigned_worker"])
    return str(rescue["task_id"]) if speaks else None


def complete_by_command(tx: Tx, task_id: str, worker: str, attempt_id: str | None, rescue_id: str | None, ending: Row) -> Row:
    """An external worker's end of its attempt; or a rescue's command that the original is done."""
    task = get_task(tx, task_id)
    cause = rescue_for(tx, task_id, None if task["assigned_worker"] == worker else worker, attempt_id, rescue_id)
    if cause is None:
        end_attempt(tx, task_id, own_attempt(tx, task_id, worker, attempt_id)["attempt_id"], ending)
        return get_task(tx, task_id)
    if task["status"] in FINAL:
        raise ConflictError(f"the task {task_id} has ended already ({task['status']})")
    return finish(tx, reach_running(tx, task, worker), ending["outcome"], "rescued", ending, cause)


def reach_running(tx: Tx, task: Row, worker: str) -> Row:
    """Lead an open task to `running` by legal steps, in the hands of the rescue that is about to end it."""
    if task["status"] == "blocked":
        task = changed_task(tx, task, UNBLOCK, next_at=None)
    if task["status"] == "queued":
        task = changed_task(tx, task, WAKE, next_at=None)
        taken = take(tx, task["task_id"], worker)
        assert taken is not None  # queued and available in this very transaction
        end_attempt_row(tx, taken["task_id"], taken["attempt_id"], {"outcome": "rescued"})
        task = taken
    else:
        close_unseen_attempt(tx, task, "rescued")
    return changed_task(tx, task, START, attempt_id=task["attempt_id"]) if task["status"] == "assigned" else task


def recover(tx: Tx, attempt: Row, rebooted: bool = False) -> Row | None:
    """The worker of this attempt is gone, and so are its processes: back to the queue, or the end of it.

    The task's row afterwards; None when somebody has deleted the task."""
    task = tx.one(GET_TASK, id=attempt["task_id"])
    end_attempt_row(tx, attempt["task_id"], attempt["attempt_id"], {"outcome": "lost", "ended_by": "recovery", "error": "its worker died"})
    if task is None or task["attempt_id"] != attempt["attempt_id"]:
        return task
    if task["task_type"] == "command":
        return finish(tx, task, "failed", "runner_died", {"error": "the process of `grace run` died"})
    died = not rebooted  # its process may have run, even when nobody came to record that
    limit = (tx.one(GET_HANDLER, name=task["handler"]) or HANDLER_DEFAULTS)["max_recoveries"]
    if died and task["deaths"] >= limit:
        return finish(tx, task, "failed", "poison", {"error": f"its worker died {task['deaths'] + 1} times while it ran"})
    return requeue(tx, task, "recovered", {"error": "its worker died"}, task["attempt_number"] - 1, died=died)


def recover_expired(tx: Tx) -> int:
    """External leases that have run out go back to the queue; how many."""
    expired = tx.all(EXPIRED_LEASES, now=tx.now, n=SWEEP_BATCH)
    for attempt in expired:
        recover(tx, attempt)
    return len(expired)


ROTATIONS_DUE = """SELECT secret_key, version, header, rotate_at FROM secret_entries WHERE rotate_at <= :now AND sealed IS NOT NULL
  ORDER BY rotate_at LIMIT 20"""
ROTATIONS_OVER = """SELECT e.secret_key, e.version, e.header, e.rotate_task, t.status, t.error FROM secret_entries e
  JOIN htm_tasks t ON t.task_id = e.rotate_task WHERE e.rotate_task IS NOT NULL AND t.finished_at IS NOT NULL"""
SET_ROTATION = """UPDATE secret_entries SET rotate_at = :at, rotate_task = :task_id, rotate_reason = :reason
  WHERE secret_key = :key AND version = :version AND sealed IS NOT NULL"""
ROTATE_AGAIN = DAY  # after a rotation that failed, or sooner where the secret's own interval is shorter


def rotations_wait(reader: Reader, now: int) -> bool:
    return bool(reader.one(ROTATIONS_DUE, now=now) or reader.one(ROTATIONS_OVER))


def look_after_rotations(tx: Tx) -> None:
    """Begin what is due, as a task where a handler makes the new value; what has ended without one has failed."""
    for row in tx.all(ROTATIONS_OVER):
        why = row["error"] or ("the handler stored no new value" if row["status"] == "completed" else f"its task ended {row['status']}")
        rotation_failed(tx, row, row["rotate_task"], why)
    for row in tx.all(ROTATIONS_DUE, now=tx.now):
        handler = fitting(stored_object(row["header"])).get("rotate_with")
        facts = {"secret_key": row["secret_key"], "version": row["version"], "due_at": row["rotate_at"], "handler": handler}
        emit(tx, "secrets.secret.due", row["secret_key"], facts)
        record(tx, "secret.due", row["secret_key"], {"version": row["version"], "handler": handler})
        try:
            spec = {"goal": f"Give {row['secret_key']} a new value", "handler": handler, "domain": "rotation",
                    "context": to_json({name: facts[name] for name in ("secret_key", "version")})}  # fmt: skip
            task_id = submit(tx, [spec])[0]["task_id"] if handler else None
        except GraceError as error:
            rotation_failed(tx, row, None, error.message)
            continue
        tx.run(SET_ROTATION, key=row["secret_key"], version=row["version"], at=None, task_id=task_id, reason="a new value is due")


def rotation_failed(tx: Tx, row: Row, task_id: str | None, why: str) -> None:
    """The old value stays, and it is tried again."""
    every = fitting(stored_object(row["header"])).get("rotate_every") or ROTATE_AGAIN
    emit(tx, "secrets.secret.rotation_failed", row["secret_key"], {"secret_key": row["secret_key"], "version": row["version"], "task_id": task_id,
                                                                   "error": why, "again_at": tx.now + min(every, ROTATE_AGAIN)})  # fmt: skip
    record(tx, "secret.rotation_failed", row["secret_key"], {"version": row["version"], "task": task_id})
    tx.run(SET_ROTATION, key=row["secret_key"], version=row["version"], at=tx.now + min(every, ROTATE_AGAIN), task_id=None,
           reason=f"its rotation failed: {why}"[:500])  # fmt: skip


SUSPECTS = "SELECT * FROM bridge_suspects ORDER BY seq LIMIT 200"
TASK_FOR_INTENT = """SELECT * FROM htm_tasks WHERE intent_id = :id AND task_type <> 'rescue' ORDER BY seq DESC LIMIT 1"""
INTENT_FOR_TASK = "SELECT * FROM intent_records WHERE htm_task_id = :id"
LINK_TASK = "UPDATE htm_tasks SET intent_id = :intent_id WHERE task_id = :task_id"
LINK_INTENT = "UPDATE intent_records SET htm_task_id = :task_id WHERE intent_id = :intent_id"
RECREATE_INTENT = """INSERT INTO intent_records (intent_id, htm_task_id, goal, expected_outcome, domain, handler, priority, status, sla_ms,
    sla_met, success, confidence, risk_level, context, result, created_at, dispatched_at, completed_at, actual_execution_ms,
    created_by, learned_from)
  VALUES (:intent_id, :task_id, :goal, :expected_outcome, :domain, :handler, :priority, :status, :sla_ms, :sla_met, :success,
    :confidence, :risk_level, :context, :result, :created_at, :created_at, :finished_at, :execution_ms, :created_by, :learned)"""
DISPATCH_ORPHAN = "UPDATE intent_records SET status = 'dispatched', htm_task_id = :task_id, dispatched_at = :now WHERE intent_id = :intent_id"
ABANDON_INTENT = """UPDATE intent_records SET status = 'cancelled', completed_at = :now, success = 0 WHERE intent_id = :intent_id"""
NOT_LEARNED = """SELECT t.* FROM intent_records i JOIN htm_tasks t ON t.task_id = i.htm_task_id
  WHERE i.learned_from = 0 AND i.completed_at IS NOT NULL AND t.finished_at IS NOT NULL ORDER BY i.seq LIMIT 200"""


def repair(tx: Tx) -> int:
    """Mend the links between intents and tasks that somebody has broken; the number mended, each with an event."""
    suspects = tx.all(SUSPECTS)
    if suspects:  # somebody has written by hand
        recount_open(tx)
    mended = sum(mend(tx, suspect) for suspect in suspects)
    for task in tx.all(NOT_LEARNED):
        if not tx.one(OUTCOME_OF, id=task["task_id"]):
            record_outcome(tx, task)
        tx.run("UPDATE intent_records SET learned_from = 1 WHERE intent_id = :id", id=task["intent_id"])
    return mended


def mend(tx: Tx, suspect: Row) -> int:
    """Look at one suspect and mend what is broken; one that cannot be mended is recorded so and stops nothing."""
    done: list[str | None] = []
    try:
        with tx.savepoint():
            done += [mend_task(tx, suspect["task_id"])] if suspect["task_id"] else []
            done += [mend_intent(tx, suspect["intent_id"])] if suspect["intent_id"] else []
    except GraceError as error:
        done = [f"impossible: {error.message}"]
    tx.run("DELETE FROM bridge_suspects WHERE seq = :seq", seq=suspect["seq"])
    repairs = [what for what in done if what]
    for what in repairs:
        emit(tx, "bridge.repaired", suspect["intent_id"] or suspect["task_id"],
             {"task_id": suspect["task_id"], "intent_id": suspect["intent_id"], "repair": what})  # fmt: skip
    return len(repairs)


def mend_task(tx: Tx, task_id: str) -> str | None:
    """A task whose intent is gone or not named gets it back, or a new one made from its payload."""
    task = tx.one(GET_TASK, id=task_id)
    if task is None or (task["intent_id"] and tx.one(GET_INTENT, id=task["intent_id"])):
        return None
    named = tx.one(INTENT_FOR_TASK, id=task_id)
    if named:
        link(tx, named, task)
        return "task_relinked"
    if task["task_type"] == "rescue":
        parent = tx.one(GET_TASK, id=task["parent_task_id"])
        if parent and parent["intent_id"]:
            tx.run(LINK_TASK, task_id=task_id, intent_id=parent["intent_id"])
        return "rescue_relinked" if parent else None
    told = usable_payload(task["payload"])
    intent = tx.one(GET_INTENT, id=told.get("intent_id"))
    if intent and not tx.one(GET_TASK, id=intent["htm_task_id"]):
        link(tx, intent, task)
        return "task_relinked"
    intent_id = task["intent_id"] or (told.get("intent_id") if intent is None else None) or new_id("int", tx.now)
    recreate_intent(tx, task, intent_id, told)
    tx.run(LINK_TASK, task_id=task_id, intent_id=intent_id)
    return "intent_recreated"


def usable_payload(text: str) -> Row:
    """Of a payload that anybody may have written, what an intent can be made of."""
    told = json.loads(text)
    if not isinstance(told, dict):
        return {}
    usable: dict[str, Callable[[Any], Any]] = {
        "intent_id": lambda value: isinstance(value, str) and OWN_ID.fullmatch(value),
        "expected_outcome": lambda value: isinstance(value, str) and 1 <= len(value) <= 2000,
        "confidence": lambda value: isinstance(value, (int, float)) and 0 <= value <= 1,
        "risk_level": lambda value: value in RISK_LEVELS,
        "created_by": lambda value: isinstance(value, str) and 1 <= len(value) <= 128,
        "context": lambda value: isinstance(value, dict),
    }
    return {name: told[name] for name, fits in usable.items() if name in told and fits(told[name])}


def recreate_intent(tx: Tx, task: Row, intent_id: str, told: Row) -> None:
    final = task["finished_at"] is not None
    tx.run(RECREATE_INTENT, intent_id=intent_id, task_id=task["task_id"], goal=task["goal"], expected_outcome=told.get("expected_outcome"),
           domain=task["domain"], handler=task["handler"], priority=task["priority"],
           status=INTENT_OF_TASK.get(task["status"], task["status"]), sla_ms=task["sla_ms"], sla_met=task["sla_met"],
           success=int(task["status"] == "completed") if final else None, confidence=told.get("confidence"),
           risk_level=told.get("risk_level"), context=to_json(told.get("context", {})), result=task["result"],
           created_at=task["created_at"], finished_at=task["finished_at"], execution_ms=task["execution_time_ms"],
           created_by=told.get("created_by", "bridge"), learned=int(final))  # fmt: skip


def link(tx: Tx, intent: Row, task: Row) -> None:
    """Tie the two together again, and bring the intent to where its task is."""
    tx.run(LINK_INTENT, intent_id=intent["intent_id"], task_id=task["task_id"])
    tx.run(LINK_TASK, task_id=task["task_id"], intent_id=intent["intent_id"])
    if intent["status"] == "created":
        tx.run(DISPATCH_ORPHAN, intent_id=intent["intent_id"], task_id=task["task_id"], now=tx.now)
    linked = get_task(tx, task["task_id"])
    if linked["finished_at"] is None:
        follow(tx, linked)
    elif follow_final(tx, linked):
        settle_dependants(tx, linked)


def mend_intent(tx: Tx, intent_id: str) -> str | None:
    """An intent whose current task is gone or not named gets it back, or a new one, or is given up."""
    intent = tx.one(GET_INTENT, id=intent_id)
    if intent is None:
        orphan = tx.one(TASK_FOR_INTENT, id=intent_id)
        return mend_task(tx, orphan["task_id"]) if orphan else None
    if intent["htm_task_id"] and tx.one(GET_TASK, id=intent["htm_task_id"]):
        return None
    task = tx.one(TASK_FOR_INTENT, id=intent_id)
    if task:
        link(tx, intent, task)
        return "intent_relinked"
    if intent["status"] in FINAL:
        tx.run(LINK_INTENT, intent_id=intent_id, task_id=None)
        return "link_cleared" if intent["htm_task_id"] else None
    handler = tx.one(GET_HANDLER, name=intent["handler"] or intent["domain"])
    if handler is None:
        tx.run(ABANDON_INTENT, intent_id=intent_id, now=tx.now)
        emit(tx, "agentic.intent.cancelled", intent_id, {"intent_id": intent_id, "task_id": None, "goal": intent["goal"],
                                                         "status": "cancelled", "reason": "no_handler"})  # fmt: skip
        return "intent_given_up"
    row = task_row(tx, task_id=new_id("task", tx.now), intent_id=intent_id, task_type=handler["name"], domain=intent["domain"],
                   handler=handler["name"], goal=intent["goal"], payload="", priority=intent["priority"], sla_ms=intent["sla_ms"],
                   warn_at=handler["warn_at"], critical_at=handler["critical_at"], timeout_ms=handler["timeout_ms"],
                   max_attempts=handler["max_attempts"])  # fmt: skip
    row["payload"] = payload_of(intent, row)
    insert_tasks(tx, [row])
    tx.run(DISPATCH_ORPHAN, intent_id=intent_id, task_id=row["task_id"], now=tx.now)
    return "intent_dispatched"


# =====================================================================================================================
# processes
# Running other programs: each attempt is a session of its own with one pipe for its output, which a log keeps capped.
# A process is only ever signalled when it carries the attempt's token in its environment or is in the attempt's own
# group. Linux tells the rest through /proc; elsewhere survivors of a dead daemon cannot be found.

MARKER = "\n[grace: {:015d} bytes dropped here]\n"
MARKER_LENGTH = len(MARKER.format(0))
PIPE_CHUNK = 1 << 16


class SpawnError(Exception):
    """A program could not be started: why, and the exit status a shell would give (126 cannot run, 127 not found)."""

    def __init__(self, message: str, exit_status: int, retry: bool = True):
        super().__init__(message)
        self.exit_status, self.retry = exit_status, retry


def own_command() -> list[str]:
    """How to call this very program again."""
    if __name__ == "__main__":
        return [sys.executable, os.path.abspath(__file__)]
    return [sys.executable, "-P", "-m", __name__]


def mark_of(token: str) -> str:
    """What tells an attempt's processes: in their environment, and of a guard, whose environment is closed, among its arguments."""
    return f"GRACE_TOKEN={token}"


def processes_of(tokens: Iterable[str], group: int | None = None) -> list[int]:
    """The living processes that carry one of these tokens in their environment, or belong to the group."""
    marks = [mark_of(token).encode() for token in tokens]
    found = []
    for pid in all_pids():
        if pid == os.getpid():
            continue
        fields = stat_fields(pid)
        if not fields or fields[0] in "ZX":
            continue
        if (group is not None and int(fields[2]) == group) or carries(pid, marks):
            found.append(pid)
    return found


def carries(pid: int, marks: list[bytes]) -> bool:
    """Whether a process has one of these in its environment, or, where that is closed, among the arguments of one of our own."""
    for name in ("environ", "cmdline"):
        try:
            with open(f"/proc/{pid}/{name}", "rb") as file:
                words = file.read().split(b"\0")
        except PermissionError:
            continue
        except OSError:
            return False
        return any(mark in words for mark in marks) and (name == "environ" or owner_of(pid) == os.geteuid())
    return False


def send(pid: int, signum: int, group: bool = False) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        (os.killpg if group else os.kill)(pid, signum)


class Victims:
    """Processes on their way out: TERM now, KILL once their time is over. `done` when none is left."""

    def __init__(self, pids: list[int], kill_after_ms: int):
        self.pids = pids
        self.left = {pid: ticks for pid in pids if (ticks := start_ticks(pid)) is not None}
        self.kill_at = time.monotonic() + kill_after_ms / 1000
        self.killed = False
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)

    def _signal(self, signum: int) -> None:
        for pid in self.left:
            send(pid, signum)

    def step(self) -> bool:
        """Look again; whether all are gone."""
        self.left = {pid: ticks for pid, ticks in self.left.items() if lives(pid, ticks)}
        if self.left and not self.killed and time.monotonic() >= self.kill_at:
            self.killed = True
            self._signal(signal.SIGKILL)
        return not self.left

    def watch(self) -> list[int]:
        """Descriptors that become readable when one of them ends; the caller closes them."""
        if not hasattr(os, "pidfd_open"):
            return []
        descriptors = []
        for pid in self.left:
            with contextlib.suppress(OSError):
                descriptors.append(os.pidfd_open(pid))
        return descriptors


def attempt_path(store_path: str, attempt_id: str, kind: str) -> str:
    """Where an attempt's log or result lies: a folder for each few hours, so that none grows without bound."""
    return f"{store_path}-logs/{attempt_id[:8]}/{attempt_id}.{kind}"


def make_attempt_folder(path: str) -> None:
    """The private folder of a log or result, and the one above it."""
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        os.makedirs(os.path.dirname(folder), mode=0o700, exist_ok=True)
        os.makedirs(folder, mode=0o700, exist_ok=True)


class Log:
    """One attempt's output: the first and the last half of `limit` bytes, and between them how many were dropped.

    A disk without room costs output, never the attempt."""

    def __init__(self, path: str, limit: int):
        self.path, self.head, self.tail = path, limit // 2, limit - limit // 2
        self.total = self.lost = self.size = self.cut = 0
        self.last = b""
        self._fd = -1

    def write(self, data: bytes) -> None:
        self.total += len(data)
        self.last = (self.last + data)[-400:]
        try:
            if self._fd < 0:
                make_attempt_folder(self.path)
                self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            written = os.write(self._fd, data)
            self.size += written
            self.lost += len(data) - written
            if self.size > self.head + MARKER_LENGTH + 2 * self.tail:
                self._shorten()
        except OSError:
            self.lost += len(data)

    def _shorten(self) -> None:
        """Drop the middle: the file is rewritten in place, which needs no room."""
        end = os.pread(self._fd, self.tail, self.size - self.tail)
        self.cut += self.size - self.head - self.tail - (MARKER_LENGTH if self.cut else 0)
        os.ftruncate(self._fd, self.head)
        os.write(self._fd, MARKER.format(self.dropped).encode() + end)
        self.size = self.head + MARKER_LENGTH + self.tail

    @property
    def dropped(self) -> int:
        return self.cut + self.lost

    def close(self) -> None:
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                if self.size > self.head + self.tail + MARKER_LENGTH:
                    self._shorten()
            os.close(self._fd)
            self._fd = -1

    def state(self) -> Row:
        return {name: getattr(self, name) for name in ("total", "lost", "size", "cut")}

    def restore(self, state: Row) -> None:
        """Go on where an earlier image of this process stopped."""
        self.__dict__.update(state)


class Scrubber:
    """Takes secrets out of a stream of output: as they are, in base64, and percent-encoded, also across pieces and lines of it.

    A value shorter than four bytes is left alone: it would be found everywhere."""

    def __init__(self, values: dict[str, bytes]):
        self._forms = {form.translate(None, LINE_ENDS): f"[secret {name}]".encode() for name, value in values.items() for form in spellings(value)}
        self._longest = max(map(len, self._forms), default=1)
        self._rest = b""

    def feed(self, data: bytes, last: bool = False) -> bytes:
        """What can be passed on: all but an end that could be the beginning of a secret, which waits for more."""
        import bisect

        data = self._rest + data
        plain = data.translate(None, LINE_ENDS)  # a tool may have wrapped its output anywhere
        settled = len(plain) if last else self._open_end(plain)
        found = self._found(plain, settled)
        if found and found[-1][1] > settled:  # another one may begin within it: both are taken out together
            settled = found.pop()[0]
        ends = [match.start() for match in re.finditer(rb"[\r\n]", data)]
        shifts = [at - number for number, at in enumerate(ends)]
        out, at = [], 0
        for start, end, label in found:
            out += [data[at : start + bisect.bisect_right(shifts, start)], label]
            at = end + bisect.bisect_right(shifts, end - 1)
        cut = len(data) if last else max(at, settled + bisect.bisect_right(shifts, settled))
        self._rest = data[cut:]
        return b"".join([*out, data[at:cut]])

    def _open_end(self, plain: bytes) -> int:
        """Where the first text begins that may go on to be a secret: what stands before it need not wait."""
        first = max(0, len(plain) - self._longest + 1)
        best, tail = len(plain), plain[first:]
        for form in self._forms:
            at = tail.find(form[:1])
            while 0 <= at < best - first:
                if form.startswith(tail[at:]):
                    best = first + at
                at = tail.find(form[:1], at + 1)
        return best

    def _found(self, plain: bytes, settled: int) -> list[tuple[int, int, bytes]]:
        """Where secrets stand that begin before `settled`; those that overlap or touch are one."""
        spans = []
        for form, label in self._forms.items():
            at = plain.find(form)
            while 0 <= at < settled:
                spans.append((at, at + len(form), label))
                at = plain.find(form, at + 1)
        merged: list[tuple[int, int, bytes]] = []
        for start, end, label in sorted(spans, key=lambda span: (span[0], -span[1])):
            if merged and start <= merged[-1][1] and (start < merged[-1][1] or label == merged[-1][2]):
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]), merged[-1][2])
            else:
                merged.append((start, end, label))
        return merged

    def text(self, value: Any) -> Any:
        """A document with the secrets taken out of each text in it."""
        if isinstance(value, str):
            return self.plain(value.encode(errors="surrogateescape")).decode(errors="replace")
        if isinstance(value, dict):
            return {self.text(key): self.text(item) for key, item in value.items()}
        return [self.text(item) for item in value] if isinstance(value, list) else value

    def plain(self, data: bytes) -> bytes:
        """A whole text of its own, whatever is held back of the stream."""
        before, self._rest = self._rest, b""
        done = self.feed(data, last=True)
        self._rest = before
        return done


LINE_ENDS = b"\r\n"
PIECE = 512  # a longer spelling is looked for in pieces of this, so that no more than that is held back


def spellings(value: bytes) -> set[bytes]:
    """A value as it may stand in output: plain, line by line, in base64 at each of three alignments, percent-encoded, in JSON."""
    import urllib.parse

    forms = {value.rstrip(b"\r\n"), *(line for line in value.splitlines() if len(line) >= 16)}
    for text in (value, value.rstrip(b"\r\n")):
        forms |= {json.dumps(text.decode(errors="replace"))[1:-1].encode(), *in_base64(text), urllib.parse.quote_plus(text).encode()}
        forms |= {urllib.parse.quote(text, safe=safe).encode() for safe in ("", "/")}
    forms |= {re.sub(rb"%[0-9A-F]{2}", lambda match: match[0].lower(), form) for form in forms if b"%" in form}
    return {piece for form in forms if len(form) >= 4 for piece in pieces(form)}


def in_base64(value: bytes) -> set[bytes]:
    """The letters that only the value decides, whatever stands before and after it."""
    import base64

    forms = {base64.b64encode(value)}
    for shift in range(3):
        text = base64.b64encode(bytes(shift) + value)
        forms.add(text[(0, 2, 3)[shift] : len(text) - (0, 3, 2)[(len(value) + shift) % 3]])
    return forms | {form.translate(bytes.maketrans(b"+/", b"-_")) for form in forms}


def pieces(form: bytes) -> list[bytes]:
    """A long spelling in pieces of about the same length."""
    n = -(-len(form) // PIECE)
    size = -(-len(form) // n)
    return [form[at : at + size] for at in range(0, len(form), size)]


class Copy:
    """What a foreground command wrote and our own output has not yet taken; a slow reader must not hold up the loop."""

    def __init__(self, target: int):
        self.target, self.rest, self.broken, self.watched = target, bytearray(), False, False

    def flush(self) -> None:
        """Write what can be written without waiting: a pipe that polls as writable has room for 4 KiB (pipe(7))."""
        import select

        poll = select.poll()
        poll.register(self.target, select.POLLOUT)
        try:
            while self.rest and poll.poll(0):
                del self.rest[: os.write(self.target, self.rest[:4096])]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self.broken = True
            self.rest.clear()
        except OSError:
            self.rest.clear()  # a full disk behind our output: the log still has it


class Child:
    """One running attempt: its process group, its pipes and its log, and why it is being ended, if it is."""

    def __init__(self, task: Row, handler: Row, log: Log):
        self.task, self.log = task, log
        self.task_id, self.attempt_id, self.token = task["task_id"], task["attempt_id"], task["token"]
        self.kill_after_ms = handler["kill_after_ms"]
        self.pid, self.ticks, self.exit_status = 0, None, None  # type: tuple[int, int | None, int | None]
        self.pipes: list[int] = []  # our ends
        self.scrubbers: dict[int, Scrubber] = {}  # our end -> what takes secrets out of its bytes before the log
        self.copies: dict[int, Copy] = {}  # our end -> where else its bytes go, for a foreground command
        self.timeout_at = float("inf")
        self.kill_at = float("inf")
        self.why: str | None = None  # timeout, cancelled, interrupted, rescued
        self.ended_by = "exit"
        self.signal = 0  # that ended the process, whoever sent it
        self.victims: Victims | None = None
        self.extra = False  # does not count against the slots
        self.marked = False  # recorded as running
        self.has_terminal = False  # is the foreground group of our terminal

    def facts(self) -> Row:
        """What must survive when the daemon executes itself anew."""
        plain = ("pid", "ticks", "timeout_at", "kill_at", "why", "ended_by", "extra", "marked", "kill_after_ms")
        return {"task": {k: self.task[k] for k in ("task_id", "attempt_id", "token", "handler", "timeout_ms")}, "log": self.log.state(),
                "pipes": self.pipes, **{name: getattr(self, name) for name in plain}}  # fmt: skip


def fill_argv(argv: list[str], payload: Row) -> list[str]:
    """The command with {goal}, {task_id} or {context.key} replaced where an item is exactly that; never through a shell."""
    return [filled(item, payload) if re.fullmatch(r"\{[A-Za-z0-9_.-]+\}", item) else item for item in argv]


def filled(item: str, payload: Row) -> str:
    value: Any = payload
    for key in item[1:-1].split("."):
        if not isinstance(value, dict) or key not in value:
            raise SpawnError(f"the payload has no {item[1:-1]!r}, which the handler's command asks for", 125, retry=False)
        value = value[key]
    return value if isinstance(value, str) else to_json(value)


def find_program(name: str, path: str) -> str:
    """The file to execute; SpawnError with 127 or 126 when there is none or it may not be run."""
    candidates = [name] if "/" in name else [os.path.join(folder or ".", name) for folder in path.split(":")]
    existing = [candidate for candidate in candidates if os.path.isfile(candidate)]
    for candidate in existing:
        if os.access(candidate, os.X_OK):
            return candidate
    if existing or ("/" in name and os.path.exists(name)):
        raise SpawnError(f"{name!r} may not be executed", 126)
    raise SpawnError(f"{name!r} was not found", 127)


def payload_file(text: str) -> int:
    """A descriptor to read the payload from, without a name in any directory."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("grace-payload")
    else:
        import tempfile

        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    data = text.encode()
    while data:
        data = data[os.write(fd, data) :]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


STEERING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # what tells a supervisor to stop or to renew itself
GUARD_JOB = 3  # the descriptor on which a guard is told what to do
GUARD_TRIES = 64  # pieces that are read after the handler has ended


class Supervisor:
    """The running attempts of this process, and one selector for all that may wake it: pipes, signals, the bell."""

    def __init__(self, store: Store, worker: str):
        import selectors

        self.store, self.worker = store, worker
        self.children: dict[int, Child] = {}
        self.signals: list[int] = []
        self.selector = selectors.DefaultSelector()
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith("GRACE_")}
        self.log_limit = setting(store, "log.max_bytes")
        self.secrets: dict[str, bytes] = {}  # variables of the command that no log may show
        self.helpers: dict[int, int | None] = {}  # processes of ours that run no attempt -> their exit code, once they have ended
        self._read_end, self._write_end = os.pipe()
        for fd in (self._read_end, self._write_end):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self.selector.register(self._read_end, selectors.EVENT_READ, self._hear)
        for signum in (signal.SIGCHLD, *STEERING):
            signal.signal(signum, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STEERING)
        self._watched: list[int] = []
        self._home = os.open(".", os.O_RDONLY)

    def _on_signal(self, signum: int, frame: Any) -> None:
        if signum != signal.SIGCHLD:
            self.signals.append(signum)

    def _hear(self, fd: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(fd, 4096)

    def watch(self, fileobj: Any, react: Callable[[int], Any]) -> None:
        self.selector.register(fileobj, 1, react)  # 1: selectors.EVENT_READ

    def spawn(self, task: Row, handler: Row, foreground: list[str] | None = None) -> Child:
        """Start an attempt whose row is committed. `foreground`: a command that shares our input and output."""
        child = Child(task, handler, Log(attempt_path(self.store.path, task["attempt_id"], "log"), self.log_limit))
        result = attempt_path(self.store.path, task["attempt_id"], "result")
        told = json.loads(task["payload"])
        if not isinstance(told, dict):
            raise SpawnError("the payload is not a JSON object", 125, retry=False)
        payload = {**told, "attempt": task["attempt_number"], "attempt_id": task["attempt_id"],
                   "sla_deadline": format_instant(task["sla_deadline"])}  # fmt: skip
        payload.update(task.get("payload_facts", {}))
        argv = foreground or fill_argv(json.loads(handler["argv"]), payload)
        own = {} if foreground else json.loads(handler["env"])
        environment, job = self._environment_of(task, own, result), None
        try:
            make_attempt_folder(result)
            if not foreground:
                os.chdir(handler["cwd"] or "/")
            program = find_program(argv[0], environment.get("PATH", os.defpath))
            if handler["secrets"] != "[]":  # neither we nor any list of processes is to hold a value: see Guard
                job = to_json({"task_id": task["task_id"], "program": program, "argv": argv, "env": own, "secrets": json.loads(handler["secrets"])})
                argv, environment = [*own_command(), "_guard", mark_of(task["token"])], self._environment_of(task, {}, result)
                program = argv[0]
            self._start(child, program, argv, environment, None if foreground else to_json(payload), job)
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise SpawnError(f"cannot use the directory {error.filename}: {error.strerror}", 126) from error
        finally:
            if not foreground:
                os.fchdir(self._home)
        if task["timeout_ms"]:
            child.timeout_at = time.monotonic() + task["timeout_ms"] / 1000
        return child

    def _environment_of(self, task: Row, own: dict[str, str], result: str) -> dict[str, str]:
        """This process's environment without its GRACE_*, the handler's variables, and the attempt's facts."""
        return {**self.environment, **own, **{name: os.fsdecode(value) for name, value in self.secrets.items()},
                "GRACE_TASK_ID": task["task_id"], "GRACE_INTENT_ID": task["intent_id"] or "", "GRACE_ATTEMPT": str(task["attempt_number"]),
                "GRACE_ATTEMPT_ID": task["attempt_id"], "GRACE_DEADLINE": format_instant(task["sla_deadline"]) or "",
                "GRACE_DB": self.store.path, "GRACE_RESULT": result, "GRACE_TOKEN": task["token"], "GRACE_WORKER": self.worker}  # fmt: skip

    def _start(self, child: Child, program: str, argv: list[str], environment: dict[str, str], payload: str | None, job: str | None = None) -> None:
        """One pipe for a handler's output, two for a foreground command's; all our ends are closed on exec. `job`: what a guard is told."""
        ends = [os.pipe() for _ in range(1 if payload is not None else 2)]
        source, told = (payload_file(text) if text is not None else -1 for text in (payload, job))
        actions = [(os.POSIX_SPAWN_DUP2, source, 0)] if payload is not None else []
        actions += [(os.POSIX_SPAWN_DUP2, ends[0][1], 1), (os.POSIX_SPAWN_DUP2, ends[-1][1], 2)]
        actions += [(os.POSIX_SPAWN_DUP2, told, GUARD_JOB)] if job is not None else []
        terminal = payload is None and owns_terminal()
        own: Row = {"setpgroup": 0} if terminal else {"setsid": True}
        try:
            child.pid = os.posix_spawn(program, argv, environment, file_actions=actions, setsigmask=[],
                                       setsigdef=[signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGHUP], **own)  # fmt: skip
        except (OSError, ValueError) as error:
            for read_end, _ in ends:
                os.close(read_end)
            why = "has no #! line and is no program" if getattr(error, "errno", 0) == errno.ENOEXEC else str(error)
            raise SpawnError(f"{argv[0]!r} cannot be executed: {why}", 126) from error
        finally:
            for fd in [source, told, *(write_end for _, write_end in ends)]:
                if fd >= 0:
                    os.close(fd)
        if terminal:
            child.has_terminal = True
            give_terminal(child.pid)
        for number, (read_end, _) in enumerate(ends, 1):
            if payload is None:
                child.copies[read_end] = Copy(number)
            self._adopt_pipe(child, read_end)
        self.children[child.pid] = child

    def _adopt_pipe(self, child: Child, fd: int) -> None:
        os.set_blocking(fd, False)
        child.pipes.append(fd)
        if self.secrets:
            child.scrubbers[fd] = Scrubber(self.secrets)
        self.watch(fd, lambda fd: self._read(child, fd))

    def start_helper(self, words: list[str]) -> int:
        """Start a command of this very program, which says what is wrong on our stderr; its process id."""
        argv = [*own_command(), "--db", self.store.path, *words]
        quiet = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1)]
        pid = os.posix_spawn(argv[0], argv, {**os.environ}, file_actions=quiet, setsigmask=[], setsigdef=[*STEERING, signal.SIGPIPE, signal.SIGXFSZ])
        self.helpers[pid] = None
        return pid

    def adopt(self, facts: Row, handler: Row) -> None:
        """Take back a child that an earlier image of this process has started."""
        log = Log(attempt_path(self.store.path, facts["task"]["attempt_id"], "log"), self.log_limit)
        log.restore(facts["log"])
        child = Child(facts["task"], handler, log)
        for name in ("pid", "ticks", "timeout_at", "kill_at", "why", "ended_by", "extra", "marked", "kill_after_ms"):
            setattr(child, name, facts[name])
        for fd in facts["pipes"]:
            os.set_inheritable(fd, False)
            self._adopt_pipe(child, fd)
        self.children[child.pid] = child

    def _read(self, child: Child, fd: int) -> bool:
        """Move what a pipe holds into the log; whether there may be more."""
        try:
            data = os.read(fd, PIPE_CHUNK)
        except BlockingIOError:
            return False
        if not data:
            self._close_pipe(child, fd)
            return False
        child.log.write(child.scrubbers[fd].feed(data) if fd in child.scrubbers else data)
        if fd in child.copies:
            return self._pass_on(child, fd, data)
        return True

    def _pass_on(self, child: Child, fd: int, data: bytes) -> bool:
        """Copy output to our own; while the reader is slow, the command's pipe is left to fill. Whether to read on."""
        copy = child.copies[fd]
        copy.rest += data
        copy.flush()
        if copy.broken:
            self._close_pipe(child, fd)  # nobody reads our output: the command is to find that out too
        elif copy.rest and not copy.watched and child.exit_status is None:
            self.selector.unregister(fd)
            self._watch_copy(child, fd, copy)
        return not copy.rest and not copy.broken

    def _watch_copy(self, child: Child, fd: int, copy: Copy) -> None:
        copy.watched = True
        self.selector.register(copy.target, 2, lambda _: self._resume(child, fd, copy))  # 2: selectors.EVENT_WRITE

    def _resume(self, child: Child, fd: int, copy: Copy) -> None:
        """Our output takes bytes again."""
        copy.flush()
        if copy.rest:
            return
        self.selector.unregister(copy.target)
        copy.watched = False
        if fd in child.pipes:
            self.watch(fd, lambda fd: self._read(child, fd))
            if copy.broken:
                self._close_pipe(child, fd)

    def _close_pipe(self, child: Child, fd: int) -> None:
        with contextlib.suppress(KeyError):  # not watched while a slow reader holds it up
            self.selector.unregister(fd)
        os.close(fd)
        child.pipes.remove(fd)
        if fd in child.scrubbers:
            child.log.write(child.scrubbers.pop(fd).feed(b"", last=True))

    def stop(self, child: Child, why: str, at_once: bool = False) -> None:
        """Begin to end an attempt: TERM to its group, KILL when its time is over, or KILL at once."""
        child.why = child.why or why
        if child.exit_status is not None and child.victims is None:
            return
        if at_once:
            child.kill_at = 0.0
        elif child.ended_by == "exit":
            child.ended_by = "TERM"
            child.kill_at = time.monotonic() + child.kill_after_ms / 1000
            send(child.pid, signal.SIGTERM, group=True)
            send(child.pid, signal.SIGCONT, group=True)

    def next_at(self) -> float:
        """The monotonic instant at which an attempt has to be ended or killed."""
        instants: list[float] = []
        for child in self.children.values():
            if child.exit_status is None:
                instants += [child.kill_at] if child.why else [child.timeout_at, child.kill_at]
            elif child.victims and not child.victims.killed:
                instants.append(child.victims.kill_at)
        return min(instants, default=float("inf"))

    def wait(self, seconds: float) -> None:
        """Sleep until something happens, at most so long."""
        for key, _ in self.selector.select(max(0.0, seconds)):
            key.data(key.fd)

    def ended(self) -> list[Child]:
        """Step all attempts on; those that are over: process reaped, output read, survivors gone."""
        now = time.monotonic()
        for child in list(self.children.values()):
            if now >= child.timeout_at and child.why is None and child.exit_status is None:
                self.stop(child, "timeout")
            if now >= child.kill_at and child.exit_status is None:
                child.kill_at, child.ended_by = float("inf"), "KILL"
                send(child.pid, signal.SIGKILL, group=True)
        self._reap()
        self._unwatch()
        over = [child for child in self.children.values() if child.exit_status is not None and self._survivors_gone(child)]
        for child in over:
            del self.children[child.pid]
            child.log.close()
        return over

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
            except ChildProcessError:
                return
            if not pid:
                return
            child = self.children.get(pid)
            if pid in self.helpers and not os.WIFSTOPPED(status):
                self.helpers[pid] = os.waitstatus_to_exitcode(status)
            elif child is not None and os.WIFSTOPPED(status):
                if child.has_terminal and os.WSTOPSIG(status) not in (signal.SIGTTIN, signal.SIGTTOU):
                    stop_together(child.pid)
                elif child.has_terminal:  # it asked for the terminal before it was given it
                    give_terminal(child.pid)
                    send(child.pid, signal.SIGCONT, group=True)
            elif child is not None:
                code = os.waitstatus_to_exitcode(status)
                child.exit_status, child.signal = (code, 0) if code >= 0 else (128 - code, -code)
                self._drain(child)
                if child.why or child.exit_status:
                    child.victims = Victims(processes_of([child.token], child.pid), child.kill_after_ms)

    def _drain(self, child: Child) -> None:
        """What the pipes still hold; a grandchild that keeps them open, or goes on writing, delays nothing."""
        for fd in list(child.pipes):
            for _ in range(64):
                if fd not in child.pipes or not (self._read(child, fd) or (fd in child.copies and child.copies[fd].rest)):
                    break
            if fd in child.pipes:
                self._close_pipe(child, fd)
        for fd, copy in child.copies.items():
            if copy.rest and not copy.watched:
                self._watch_copy(child, fd, copy)

    def undelivered(self, child: Child) -> bool:
        """Whether our own output has not yet taken all that a command wrote."""
        return any(copy.rest for copy in child.copies.values())

    def _survivors_gone(self, child: Child) -> bool:
        if child.victims is None:
            return True
        if child.kill_at <= time.monotonic():
            child.victims.kill_at = 0.0
        if child.victims.step():
            return True
        if child.victims.killed:
            child.ended_by = "KILL"
        self.watch_victims(child.victims)
        return False

    def watch_victims(self, victims: Victims) -> None:
        for fd in victims.watch():
            self._watched.append(fd)
            self.watch(fd, lambda fd: None)

    def _unwatch(self) -> None:
        for fd in self._watched:
            self.selector.unregister(fd)
            os.close(fd)
        self._watched.clear()

    def close(self) -> None:
        signal.set_wakeup_fd(-1)
        self.selector.close()
        for fd in (self._read_end, self._write_end, self._home):
            os.close(fd)


class Guard:
    """Between the daemon and a handler with secrets: opens them, starts the handler with them, and takes them out of what it writes.

    It is the attempt's own process, in the group that signals go to; the handler is its child. The daemon never holds a value."""

    def __init__(self, store: Store, job: Row):
        self.store, self.job = store, job
        self.heard: list[int] = []
        self.pid, self.status = 0, None  # type: int, int | None
        self._wake, self._woken = os.pipe()
        for fd in (self._wake, self._woken):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)
        for signum in (signal.SIGCHLD, *STEERING):
            signal.signal(signum, lambda number, frame: self.heard.append(number))

    def run(self) -> int:
        """The handler's exit status, or minus the signal that ended it; 125 when there is no value for it. GraceError, SpawnError."""
        softness = harden()
        values = self._open_secrets()
        scrubber = Scrubber(values)
        self._relay(self._start(values, softness), scrubber)
        hide_in_result(os.environ.get("GRACE_RESULT", ""), scrubber)
        return int(self.status or 0)

    def _open_secrets(self) -> dict[str, bytes]:
        """The values by their variables; each consent of this task is spent once."""
        task_id, now = self.job["task_id"], clock()
        with refusals(self.store, task_id, plain=True):
            vault = Vault(self.store)
        consents, chosen = self.store.all(CONSENTS_OF_TASK, id=task_id), {}
        for key, action in wishes_of(self.job["secrets"]):
            state, row = wish_state(consents, key, action, now)
            if state != "ready" or row is None:
                raise DeniedError(f"there is no consent for this attempt to use {key} ({action})", "it is asked for anew when the task is tried again")
            chosen[key, action] = row
        opened = {wish: redeem(vault, row["consent_id"], None, row["request"]) for wish, row in chosen.items()}
        values = {variable: opened[key, action] for variable, key, action in self.job["secrets"]}
        if name := next((name for name, value in values.items() if b"\0" in value), None):
            raise DeniedError(f"the value for {name} holds a NUL byte, which no environment can")
        return values

    def _start(self, values: dict[str, bytes], softness: Softness) -> int:
        """Start the handler as any other is started, but with its output to us; our end of the pipe."""
        source, target = os.pipe()
        os.set_blocking(source, False)
        environment = {**os.environ, **self.job["env"], **{name: os.fsdecode(value) for name, value in values.items()}}
        if any(signum in STEERING for signum in self.heard):
            raise SpawnError("ended before it was started", 143)
        soften(softness)
        try:
            self.pid = os.posix_spawn(self.job["program"], self.job["argv"], environment, setsigmask=[],
                                      file_actions=[(os.POSIX_SPAWN_DUP2, target, 1), (os.POSIX_SPAWN_DUP2, target, 2)],
                                      setsigdef=[signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD, *STEERING])  # fmt: skip
        except (OSError, ValueError) as error:
            said = getattr(error, "strerror", None) or type(error).__name__  # never the text, which could hold a value
            why = "has no #! line and is no program" if getattr(error, "errno", 0) == errno.ENOEXEC else said
            raise SpawnError(f"{self.job['argv'][0]!r} cannot be executed: {why}", 126) from None
        finally:
            os.close(target)
        for signum in self.heard:  # it may not have been in the group yet
            if signum in STEERING:
                send(self.pid, signum)
        return source

    def _relay(self, source: int, scrubber: Scrubber) -> None:
        """Pass the output on until the handler has ended; a grandchild that keeps the pipe open, or goes on writing, delays nothing."""
        import select

        sources = [source]
        while self.status is None:
            select.select([self._wake, *sources], [], [])
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake, 4096)
            if sources and not self._pass_on(source, scrubber):
                os.close(sources.pop())  # where nobody reads our output, the handler is to find that out too
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        for _ in range(GUARD_TRIES):
            if not sources or not select.select(sources, [], [], 0)[0] or not self._pass_on(source, scrubber):
                break
        write_whole(1, scrubber.feed(b"", last=True))

    def _pass_on(self, source: int, scrubber: Scrubber) -> bool:
        """Move one piece; whether there may be more."""
        try:
            data = os.read(source, PIPE_CHUNK)
        except BlockingIOError:
            return True
        return bool(data) and write_whole(1, scrubber.feed(data))


def write_whole(fd: int, data: bytes) -> bool:
    """Write all of it; False when nobody reads any more."""
    try:
        while data:
            data = data[os.write(fd, data) :]
    except OSError:
        return False
    return True


def hide_in_result(path: str, scrubber: Scrubber) -> None:
    """Take secrets out of what a handler has left at GRACE_RESULT; where that cannot be done, nothing is left."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return
        data = file.read(MAX_JSON + MAX_LINE)
    try:
        clean = to_json(scrubber.text(parse_json(data.decode()))).encode()
    except ValueError:  # not usable as a result: kept for whoever looks what was wrong with it
        clean = scrubber.plain(data)[: MAX_JSON + 1]
    with contextlib.suppress(OSError):
        os.unlink(path)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(clean)


def owns_terminal() -> bool:
    """Whether our input is a terminal and we are in its foreground."""
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False


def give_terminal(group: int) -> None:
    """Make a process group the terminal's foreground, as a shell does, so that it may read and be interrupted."""
    previous = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.tcsetpgrp(0, group)
    signal.signal(signal.SIGTTOU, previous)


def stop_together(group: int) -> None:
    """Ctrl-Z in a foreground command: stop as well, so that the shell takes over; go on together when it says so."""
    give_terminal(os.getpgrp())
    os.kill(os.getpid(), signal.SIGSTOP)
    give_terminal(group)
    send(group, signal.SIGCONT, group=True)


def ending_of(child: Child, store_path: str) -> Row:
    """What end_attempt() is told of a child that is over."""
    ending: Row = {"ended_by": child.ended_by, "exit_status": child.exit_status, "log_bytes": child.log.total, "log_dropped": child.log.dropped}
    if child.why == "timeout":
        limit = format_duration(child.task["timeout_ms"])
        return {**ending, "outcome": "timeout", "error": f"ended after --timeout {limit} by SIG{child.ended_by}"}
    if child.why:
        return {**ending, "outcome": child.why, "error": f"{child.why}, ended by SIG{child.ended_by}" if child.ended_by != "exit" else child.why}
    if child.exit_status:
        last = child.log.last.decode(errors="replace").strip().splitlines()
        end = f"ended by {signal_name(child.signal)}" if child.signal else f"exit status {child.exit_status}"
        return {**ending, "outcome": "failed", "error": end + (f": {last[-1][:200]}" if last else "")}
    result, error = read_result(attempt_path(store_path, child.attempt_id, "result"))
    return {**ending, "outcome": "completed", "result": result, "error": error}


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def read_result(path: str) -> tuple[Any, str | None]:
    """What a handler has left at GRACE_RESULT, and what is wrong with it; an unusable file is left where it is."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None, None
    except OSError as error:
        return None, f"the result file {path} is not usable: {error.strerror}"
    try:
        with os.fdopen(fd, encoding="utf-8") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ValueError("not a plain file")
            return parse_json(file.read(MAX_JSON + 1)), None
    except (ValueError, OSError) as error:
        return None, f"the result file {path} is not usable: {error}"


def forget_result(store_path: str, attempt_id: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(attempt_path(store_path, attempt_id, "result"))


def diagnose(pid: int | None, log_path: str) -> Row:
    """What a process tree is doing: state, CPU seconds and open files of each process, and the last output."""
    parents = {other: int(fields[1]) for other in all_pids() if (fields := stat_fields(other))}
    tree = [pid] if pid in parents else []
    for member in tree:
        tree += [other for other, parent in parents.items() if parent == member]
    return {"processes": [process_facts(member) for member in tree[:50]], "last_output": last_output(log_path)}


def process_facts(pid: int | None) -> Row:
    fields = stat_fields(pid or 0) or ["?"] * 20
    tick = os.sysconf("SC_CLK_TCK")
    cpu = (int(fields[11]) + int(fields[12])) / tick if fields[11] != "?" else None
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            command = file.read(400).replace(b"\0", b" ").decode(errors="replace").strip()
        files = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")[:20]]
    except OSError:
        command, files = "", []
    return {"pid": pid, "state": fields[0], "cpu_seconds": cpu, "command": command, "open_files": sorted(files)}


def last_output(log_path: str) -> str:
    try:
        with open(log_path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 1000))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


# =====================================================================================================================
# daemon
# One loop, in one thread: settle what has ended, take steps that are due, claim, start, sleep until the nearest instant
# or a knock. A daemon is alive exactly while it holds the lock on its own file; whoever finds that lock free first ends
# what is left of the dead one's attempts, and only then puts them back. `grace run` is the same with one command.

PUT_WORKER = """INSERT INTO workers (worker_id, kind, pid, lock_path, boot_id, slots, state, started_at, heartbeat_at, handlers)
  VALUES (:worker, :kind, :pid, :lock_path, :boot_id, :slots, :state, :now, :now, :handlers)"""
BEAT = "UPDATE workers SET heartbeat_at = :now, state = :state, slots = :slots WHERE worker_id = :worker"
STOP_WORKER = "UPDATE workers SET state = 'stopped', stopped_at = :now WHERE worker_id = :worker AND stopped_at IS NULL"
OTHER_WORKERS = "SELECT * FROM workers WHERE stopped_at IS NULL AND worker_id <> :worker"
GET_WORKER = "SELECT * FROM workers WHERE worker_id = :worker"
LIVE_WORKERS = "SELECT * FROM workers WHERE stopped_at IS NULL ORDER BY started_at"
TAKEN_AWAY = """SELECT a.attempt_id, a.stop_requested, t.status FROM htm_task_attempts a LEFT JOIN htm_tasks t ON t.task_id = a.task_id
  WHERE a.worker_id = :worker AND a.finished_at IS NULL
    AND (a.stop_requested IS NOT NULL OR t.attempt_id IS NULL OR t.attempt_id <> a.attempt_id)"""
BUSY = "SELECT COALESCE(SUM(n), 0) AS n FROM task_counts WHERE status IN ('assigned', 'running')"
SAY_WHY = """UPDATE htm_tasks SET reason = :reason, updated_at = :now, updated_by = :actor
  WHERE task_id = :task_id AND status = 'assigned' RETURNING *"""
RESUME = "GRACE_RESUME"
CHECKPOINT_PAGES = 4000  # a daemon writes much: fewer, longer checkpoints save it a third of its syncs
WAITING_MARK = """SELECT COUNT(*) AS n, MAX(seq) AS newest, (SELECT MAX(seq) FROM audit_log) AS leaves FROM htm_tasks
  WHERE status = 'blocked' AND reason = 'waiting_consent'"""
NO_ROOM, ASK_AGAIN = 75, 10  # an asker's exit code when some have to wait for room; seconds before one that failed is started anew


def notify_systemd(text: str) -> None:
    """Tell the service manager (sd_notify(3)); nothing happens where there is none."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    import socket

    with contextlib.suppress(OSError), contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as sender:
        sender.sendto(text.encode(), "\0" + address[1:] if address.startswith("@") else address)


def has_controlling_terminal() -> bool:
    """Whether this process has a controlling terminal that is still there."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def drop_dead_streams() -> None:
    """Put /dev/null where output went to a terminal or a reader that is gone, so that it can go on being written."""
    import select

    poll = select.poll()
    for fd in (1, 2):
        poll.register(fd, 0)
    dead = [fd for fd, _ in poll.poll(0)]  # hung up, or in error
    null = os.open(os.devnull, os.O_RDWR)
    for fd in dead:
        os.dup2(null, fd)
    os.close(null)


def unfailing(say: Callable[[str, Row], None]) -> Callable[[str, Row], None]:
    """Lines for whoever reads them: work does not end because nobody can any more."""

    def heard(what: str, facts: Row) -> None:
        try:
            say(what, facts)
        except OSError:
            drop_dead_streams()

    return heard


def clocks() -> tuple[int, int, int]:
    """Wall, monotonic, and boot clock (which goes on while the machine sleeps), in milliseconds."""
    boot = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return clock(), time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1_000_000, time.clock_gettime_ns(boot) // 1_000_000


def clock_jump(before: tuple[int, int, int], after: tuple[int, int, int]) -> tuple[int, int]:
    """Between two readings of clocks(): how long the machine slept, and by how much the wall clock was set (ms)."""
    wall, monotonic, boot = (b - a for a, b in zip(before, after, strict=True))
    return boot - monotonic, wall - boot


def record_clock_jump(tx: Tx, worker: str, before: tuple[int, int, int], now: tuple[int, int, int]) -> None:
    """The machine slept or its clock was set between two readings of clocks(): an event, and the leases moved along; once, whoever notices it."""
    asleep, step = clock_jump(before, now)
    known = (tx.value(GET_SETTING, name="_clock_jump") or " 0").split()
    if known[0] == boot_id() and int(known[-1]) > before[2]:
        return  # another worker has seen the same jump
    tx.run(SET_SETTING, name="_clock_jump", value=f"{boot_id()} {now[2]}", now=tx.now)
    tx.run(EXTEND_LEASES, by=asleep + step)
    if asleep + step >= SECOND:
        tx.run(NOTE_SLEEP, now=tx.now, asleep=asleep + step)
    emit(tx, "daemon.suspended", worker, {"worker_id": worker, "asleep_ms": asleep, "clock_step_ms": step})


class Burial:
    """A dead worker's last things: its processes are ended first, then its attempts go back, then it is struck off."""

    def __init__(self, store: Store, worker: Row, lock: int):
        self.store, self.worker, self.lock, self.over = store, worker, lock, False
        if lock >= 0:
            os.pwrite(lock, BURIED, 0)
        self.rebooted = worker["boot_id"] != boot_id()
        attempts = store.all(OPEN_ATTEMPTS, worker=worker["worker_id"])
        self.tokens = [] if self.rebooted else [row["token"] for row in attempts]
        self.kill_after_ms = max((self._kill_after(row) for row in attempts), default=0)
        self.victims = Victims(processes_of(self.tokens) if self.tokens else [], self.kill_after_ms)

    def _kill_after(self, attempt: Row) -> int:
        task = self.store.one(GET_TASK, id=attempt["task_id"]) or {"handler": None}
        return int((self.store.one(GET_HANDLER, name=task["handler"]) or HANDLER_DEFAULTS)["kill_after_ms"])

    def step(self) -> bool:
        """Whether it is over."""
        if self.over or not self.victims.step():
            return self.over
        if self.victims.pids and (born := processes_of(self.tokens)):  # started by one of them since
            self.victims = Victims(born, self.kill_after_ms)
            return False
        self.store.write(self._settle)
        self.over = True
        with contextlib.suppress(OSError):
            os.unlink(self.worker["lock_path"])
        if self.lock >= 0:
            os.close(self.lock)
            self.lock = -1
        return True

    def _settle(self, tx: Tx) -> None:
        for attempt in tx.all(OPEN_ATTEMPTS, worker=self.worker["worker_id"]):
            recover(tx, attempt, self.rebooted)
        if tx.run(STOP_WORKER, worker=self.worker["worker_id"], now=tx.now):
            emit(tx, "daemon.stopped", self.worker["worker_id"], {"worker_id": self.worker["worker_id"], "kind": self.worker["kind"],
                                                                  "reason": "died", "pid": self.worker["pid"]})  # fmt: skip


def worker_figures(store: Store) -> tuple[list[Row], Row]:
    """The workers that have not stopped, each with `alive`; and what the dashboard says of them."""
    workers = [{**row, "alive": is_alive(row)} for row in store.all(LIVE_WORKERS)]
    daemons = [row for row in workers if row["kind"] == "daemon" and row["alive"]]
    slots = sum(row["slots"] for row in daemons)
    busy = sum(len(store.all(OPEN_ATTEMPTS, worker=row["worker_id"])) for row in daemons)
    return workers, {"active_workers": sum(row["alive"] for row in workers), "worker_slots": slots, "busy_slots": busy,
                     "worker_utilization": round(busy / slots, 4) if slots else None}  # fmt: skip


def statistics_of(store: Store, window: int) -> Row:
    """All counters of the dashboard, the workers' among them; averages and percentiles are those of the window."""
    now = clock()
    counters: Row = store.read(lambda reader: queue_counters(reader, now, window))
    return {**counters, **worker_figures(store)[1], "window_ms": window, "last_updated_at": format_instant(now)}


STATS_MARK = "_stats_mark"  # of the last event: when it was written, and the checksum of its figures


def tell_statistics(store: Store, every: int) -> bool:
    """Write the event htm.sla.stats when some figure has changed since the last one; False when that one is too young.

    All daemons on the file go by one mark, so that together they write one in each interval."""
    figures = {name: value for name, value in statistics_of(store, DAY).items() if not name.endswith("_at")}
    import zlib

    checksum = str(zlib.crc32(to_json({**figures, "longest_queued_ms": None}).encode()))  # which grows by itself

    def tell(tx: Tx) -> bool:
        if not (due := stats_due(tx, tx.now, every, checksum)):
            return due is None
        emit(tx, "htm.sla.stats", None, {**figures, "message": statistics_line(figures)})
        tx.run(SET_SETTING, name=STATS_MARK, value=f"{tx.now} {checksum}", now=tx.now)
        return True

    due = stats_due(store, clock(), every, checksum)
    return due is None or (due and bool(store.write(tell, durable=False)))


def stats_due(reader: Reader, now: int, every: int, checksum: str) -> bool | None:
    """Whether an event is due; None when nothing has changed. A tenth of the interval is forgiven, since daemons do not keep time with each other."""
    at, told = (reader.value(GET_SETTING, name=STATS_MARK) or f"{now - every} -").split()
    return None if told == checksum else not 0 <= now - int(at) < every * 9 // 10


def statistics_line(figures: Row) -> str:
    """The figures in one line for people."""
    rate = figures["sla_compliance_rate"]
    return (f"{figures['active_tasks']} running, {figures['queued_tasks']} queued, {counted(figures['active_violations'], 'open task')} past the SLA, "
            f"{'no SLA judged yet' if rate is None else f'{100 * rate:.1f} % of SLAs met'}, p95 {format_duration(figures['p95_execution_ms'])}")  # fmt: skip


def find_dead(store: Store, own: str = "", kind: str | None = None) -> list[Burial]:
    """A burial for each worker whose lock is free."""
    found = []
    for worker in store.all(OTHER_WORKERS, worker=own):
        if kind is None or worker["kind"] == kind:
            lock = seize(worker)
            if lock is not None:
                found.append(Burial(store, worker, lock))
    return found


def bury_runners(store: Store) -> None:
    """End the tasks of foreground runs whose process died, for commands that show or use tasks without a daemon."""
    import select

    burials = find_dead(store, kind="runner")
    while burials := [burial for burial in burials if not burial.step()]:
        descriptors = [fd for burial in burials for fd in burial.victims.watch()]
        select.select(descriptors, [], [], max(0.0, min(1.0, min(burial.victims.kill_at for burial in burials) - time.monotonic())))
        for fd in descriptors:
            os.close(fd)


def program_starts() -> bool:
    """Whether the program on the disk, perhaps a newer one, comes up at all."""
    argv = [*own_command(), "--version"]
    quiet = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
    pid = os.posix_spawn(argv[0], argv, os.environ, file_actions=quiet, setsigmask=[])
    return os.waitpid(pid, 0)[1] == 0


class Enlistment:
    """A worker's place in the database and the lock that proves that it lives."""

    def __init__(self, store: Store, kind: str, slots: int, resumed: Row | None = None, state: str = "running",
                 only: list[str] | None = None):  # fmt: skip
        self.store, self.kind = store, kind
        if resumed:
            self.worker, self.lock = resumed["worker"], resumed["lock"]
            self.path = f"{store.path}-{self.worker}.lock"
            os.set_inheritable(self.lock, False)
            return
        self.worker = new_id(kind, clock())
        self.path = f"{store.path}-{self.worker}.lock"
        try:
            self.lock = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DatabaseError(f"cannot lock {self.path}: {error.strerror}", "check the permissions of the database's directory") from error
        store.write(lambda tx: tx.run(PUT_WORKER, worker=self.worker, kind=kind, pid=os.getpid(), lock_path=self.path, boot_id=boot_id(),
                                      slots=slots, state=state, handlers=to_json(only) if only else None, now=tx.now), knock=False)  # fmt: skip

    def discharge(self) -> None:
        """Struck off in good order."""
        self.store.write(lambda tx: tx.run(STOP_WORKER, worker=self.worker, now=tx.now))
        with contextlib.suppress(OSError):
            os.unlink(self.path)
        os.close(self.lock)


def stuck_facts(store: Store, task_id: str) -> Row:
    """For a rescuer: where the stuck task's log is and what its processes do."""
    attempts = store.all(ATTEMPTS_OF, id=task_id)
    if not attempts:
        return {"log_path": None, "diagnosis": diagnose(None, "")}
    path = attempt_path(store.path, attempts[-1]["attempt_id"], "log")
    return {"log_path": path, "diagnosis": diagnose(attempts[-1]["pid"] if attempts[-1]["finished_at"] is None else None, path)}


def perform_rescue(store: Store, rescue: Row, worker: str, only: Iterable[str] = ()) -> Row | None:
    """Do one built-in rescue and record what it found and did; the original, taken, when it is to be run now.

    One that is running already is ours, and could not be concluded before."""
    mine = rescue if rescue["status"] == "running" else store.write(lambda tx: begin_rescue(tx, rescue, worker))
    if mine is None:
        return None
    stuck = store.one(GET_TASK, id=rescue["parent_task_id"]) or {"handler": None}
    attempt = store.one(OPEN_ATTEMPT, id=rescue["parent_task_id"])
    state, facts = "none", {}
    if attempt is not None:
        owner = store.one(GET_WORKER, worker=attempt["worker_id"])
        state = "external" if attempt["lease_ms"] else "alive" if attempt["worker_id"] == worker or (owner and is_alive(owner)) else "dead"
        facts = {"diagnosis": diagnose(attempt["pid"], attempt_path(store.path, attempt["attempt_id"], "log"))} if state == "alive" else {}
    served = not only or stuck["handler"] in set(only)
    taken: Row | None = store.write(lambda tx: conclude_rescue(tx, mine, worker, state, facts, served))
    return taken


def begin_rescue(tx: Tx, rescue: Row, worker: str) -> Row | None:
    taken = take(tx, rescue["task_id"], worker)
    return start(tx, taken, os.getpid(), None, None) if taken else None


def conclude_rescue(tx: Tx, rescue: Row, worker: str, state: str, facts: Row, served: bool) -> Row | None:
    """Decide on the stuck task as it is now, act, and end the rescue with a result that says so."""
    if (tx.one(GET_TASK, id=rescue["task_id"]) or {}).get("attempt_id") != rescue["attempt_id"]:  # the original has ended meanwhile
        end_attempt_row(tx, rescue["task_id"], rescue["attempt_id"], {"outcome": "cancelled"})
        return None
    stuck = tx.one(GET_TASK, id=rescue["parent_task_id"])
    if stuck is None:
        end_attempt(tx, rescue["task_id"], rescue["attempt_id"], {"outcome": "completed", "result": {"found": "the task was deleted", "did": "nothing"}})
        return None
    handler = tx.one(GET_HANDLER, name=stuck["handler"])
    active = tx.value(OPEN_ATTEMPTS_OF_HANDLER, name=stuck["handler"])
    found, plan = rescue_plan(stuck, handler, active, state, (handler or HANDLER_DEFAULTS)["on_critical"], served, tx.now)
    taken, did = None, "recorded it"
    if plan == "run" and stuck["available_at"] is not None:
        stuck = changed_task(tx, stuck, WAKE, next_at=tx.now)
    if plan == "run" and not is_ready(tx, stuck["task_id"]):
        stuck = park(tx, stuck)
        found, plan = rescue_plan(stuck, handler, active, state, "none", served, tx.now)
    if stuck["reason"] == "waiting_consent":
        facts = {**facts, "consent_ids": open_consents_of(tx, stuck["task_id"])}
    if plan == "run":
        taken = take(tx, stuck["task_id"], worker)
        did = "started it at once in an extra slot"
    elif plan == "recover":
        did = "its processes are being ended, then it goes back to the queue"
    elif plan == "retry":
        tx.run(STOP_ATTEMPT, task_id=stuck["task_id"], attempt_id=stuck["attempt_id"], why="rescued")
        did = "asked its worker to end this attempt and start another"
    result = {"stuck_task_id": stuck["task_id"], "found": found, "did": did, "action": plan, "stuck_status": stuck["status"], **facts}
    end_attempt(tx, rescue["task_id"], rescue["attempt_id"], {"outcome": "completed", "ended_by": "exit", "result": result})
    return taken


def missing_wishes(reader: Reader, parked: list[Row]) -> Iterator[tuple[str, str, str]]:
    """What is to be asked for parked tasks, in their order, as far as there seems to be room for it: task, key, action."""
    pending = {row["requester"]: row["n"] for row in reader.all(PENDING_OF_EACH)}
    total, silent = sum(pending.values()), functools.cache(lambda key, action: asks_nobody(reader, key, action))
    for task in parked:
        mine = pending.get(task_requester(handler_name(task)), 0)
        for (key, action), (state, _) in task["wishes"].items():
            if state == "missing" and not task["paused"] and (silent(key, action) or (total < MAX_PENDING and mine < MAX_PENDING_EACH)):
                yield task["task_id"], key, action


def handler_name(task: Row) -> str:
    """In whose name is asked for a task."""
    return f"handler:{task['handler']}"


def task_spec(task: Row, key: str, action: str, timeout_ms: int, login: str, together: list[list[str]]) -> Row:
    """What Asking takes, for a secret of a parked task."""
    context = {name: task[name] for name in ("task_id", "intent_id", "handler", "goal")}
    return {"key": key, "action": action, "purpose": task["goal"], "by": handler_name(task), "user": None, "risk": None, "context": to_json(context),
            "timeout_ms": timeout_ms, "mode": "collect", "hidden": False, "login": login, "reported": reported_facts(task["task_id"]),
            "together": together}  # fmt: skip


def ask_for_tasks(store: Store, only: Iterable[str], login: str) -> int:
    """File the requests that parked tasks need; the exit status. A task that may not have what it needs has failed."""
    status, parked, vault, timeout = 0, parked_tasks(store, only), None, setting(store, "consent.task_answer")
    done: set[tuple[str, str, str]] = set()
    while wish := next((wish for wish in missing_wishes(store, parked) if wish not in done), None):
        done.add(wish)
        task_id, key, action = wish
        try:
            with refusals(store, key, plain=True):
                vault = vault or Vault(store)
                task = next(row for row in parked if row["task_id"] == task_id)
                together = asked_at_once({"key": wanted[0], "action": wanted[1]} for wanted in task["wishes"])
                Asking(vault, task_spec(get_task(store, task_id), key, action, timeout, login, together))
        except NeedlessError:
            continue
        except (NoRoomError, ConflictError):  # somebody was faster, or has just changed the secret
            status = NO_ROOM
        except DatabaseError:
            raise
        except GraceError as error:
            store.write(functools.partial(refuse_parked, task_id=task_id, error=error.message))
    return status


class Daemon:
    """The supervisor of the queue: run() goes on until it is told to stop, or with `once` until nothing is runnable."""

    def __init__(self, store: Store, slots: int, only: list[str], grace_ms: int, once: bool, drain: bool, say: Callable[[str, Row], None],
                 stats_every: int = MINUTE):  # fmt: skip
        resumed = resumed_state()
        self.store, self.slots, self.only, self.grace_ms, self.once, self.drain = store, slots, only, grace_ms, once, drain
        self.say = unfailing(say)
        self.terminal = bool(resumed.get("terminal")) if resumed else has_controlling_terminal() and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
        store.since = resumed["since"] if resumed else clock()
        self.enlistment = Enlistment(store, "daemon", slots, resumed, "draining" if drain else "running", only)
        self.worker = self.enlistment.worker
        store.actor = self.worker
        self.sup = Supervisor(store, self.worker)
        self.bell = Bell(store)
        self.sup.watch(self.bell, lambda fd: self.bell.answer())
        store.con.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        self.claimed: list[Row] = []  # ours, and not started yet
        self.ended: list[Child] = []
        self.failed_starts: list[tuple[Row, SpawnError]] = []
        self.burials: list[Burial] = []
        self.stop_at: float | None = None  # when the grace period is over
        self.look = True  # whether there may be something to claim or to mend
        self.orders = False  # whether attempts of ours may have been taken away
        self.idle = self.acted = False  # the last round found nothing to do; it did something
        self.last_clocks = clocks()
        self.beat_at = self.repair_at = self.check_at = 0.0
        self.to_adapt: list[str] = []  # handlers whose SLAs are still to be compared with their runs
        self.stats_every, self.stats_at, self.told_up_to = stats_every, time.monotonic() + stats_every / 1000, 0
        self.forecast_at, self.stirred = 0.0, True  # when to look ahead next; whether anything has happened since the last look
        self.waiting_mark: Row | None = None  # what was there when the tasks that wait for consent were last looked at
        self.consents_at = self.ask_at = 0.0  # when to look at them in any case; not to ask before
        self.asker = 0  # the process that asks for them
        self.reload = False  # to execute itself anew
        watchdog = int(os.environ.get("WATCHDOG_USEC") or 0) if os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()) else 0
        self.watchdog_every, self.watchdog_at = (watchdog / 2e6 if watchdog else float("inf")), 0.0
        if watchdog:  # others may count a large database anew meanwhile
            self.store.while_waiting = self.watchdog_every, lambda: notify_systemd("WATCHDOG=1")
        for facts in resumed["children"] if resumed else []:
            self.sup.adopt(facts, {"kill_after_ms": facts["kill_after_ms"]})

    def run(self) -> None:
        self._announce()
        while not self._over():
            try:
                self._turn()
            except UpgradedError as error:
                self._leave_to_newer(error)
                raise
            except DatabaseError as error:
                self.say("trouble", {"message": error.message})
                self.sup.wait(1.0)
            except Exception as error:  # the loop must outlive a defect of its own; the fact becomes an event
                self._confess(error)
                self.sup.wait(1.0)
        self._leave()

    def _announce(self) -> None:
        def begin(tx: Tx) -> int:
            emit(tx, "daemon.started", self.worker, {"worker_id": self.worker, "pid": os.getpid(), "slots": self.slots, "version": __version__,
                                                     "handlers": self.only or None, "children_kept": len(self.sup.children)})  # fmt: skip
            emit(tx, "bridge.ready", self.worker, {"worker_id": self.worker, "repaired": (mended := repair(tx))})
            return mended

        self.store.write(begin)
        notify_systemd(f"READY=1\nSTATUS={counted(self.slots, 'slot')}\nMAINPID={os.getpid()}")
        self.say("started", {"worker_id": self.worker, "slots": self.slots, "database": self.store.path})

    def _turn(self) -> None:
        """One round: hear, look after things, act, sleep."""
        self._hear_signals()
        self._watch_clocks()
        self._keep_house()
        self.ended += self.sup.ended()
        if self.bell.rang():
            self.look = self.orders = self.stirred = True
        self._take_due_steps()
        self._heed_consents()
        self.acted = self._settle()
        self._look_ahead()
        self.idle = not self.acted and not self.burials
        if self.orders:
            self.orders = False
            self._heed_orders()
        if self.reload:
            self._execute_anew()
        if not self._over():
            self.sup.wait(self._sleep_for())

    def _over(self) -> bool:
        if self.sup.children or self.ended or self.failed_starts or self.claimed:
            return False
        if self.stop_at is not None:
            return True
        if self.drain:
            return self.idle and not self.store.value(BUSY)
        return self.once and self.idle and not (self.look or self.asker or self._consents_changed())

    def _hear_signals(self) -> None:
        while self.sup.signals:
            signum = self.sup.signals.pop(0)
            if signum == signal.SIGHUP and (self.stop_at is not None or not self._terminal_is_gone()):
                self.reload = self.stop_at is None
            elif self.stop_at is None:
                self.reload = False
                self.stop_at = time.monotonic() + self.grace_ms / 1000
                notify_systemd("STOPPING=1\nSTATUS=waiting for handlers to finish")
                self.say("stopping", {"running": len(self.sup.children)})
            else:
                for child in self.sup.children.values():
                    self.sup.stop(child, "interrupted", at_once=True)
        if self.stop_at is not None and time.monotonic() >= self.stop_at:
            for child in self.sup.children.values():
                self.sup.stop(child, "interrupted")

    def _terminal_is_gone(self) -> bool:
        """Whether this HUP says that the terminal from which we were started was closed, and not that there is a newer version."""
        return self.terminal and not has_controlling_terminal()

    def _watch_clocks(self) -> None:
        """Notice sleep and steps of the clock: recorded once, leases moved along, the ladder looked at afresh."""
        before, now = self.last_clocks, clocks()
        asleep, step = clock_jump(before, now)
        self.last_clocks = now
        if asleep < SECOND and abs(step) < SECOND:
            return
        self.store.write(lambda tx: record_clock_jump(tx, self.worker, before, now))
        self.look = True
        self.say("clock", {"asleep_ms": asleep, "clock_step_ms": step})

    def _keep_house(self) -> None:
        now = time.monotonic()
        if now >= self.watchdog_at:
            notify_systemd("WATCHDOG=1")
            self.watchdog_at = now + self.watchdog_every
        if now >= self.check_at:
            self.check_at = now + 1
            known = {burial.worker["worker_id"] for burial in self.burials}
            self.burials += [burial for burial in find_dead(self.store, self.worker) if burial.worker["worker_id"] not in known]
            if not self.drain and self.stop_at is None and rotations_wait(self.store, clock()):
                self.store.write(look_after_rotations)
                self.look = True
            if not self.drain and self.stop_at is None and adaptation_due(self.store, clock()):
                self.to_adapt = self.store.write(begin_adapting)
        waiting = [burial for burial in self.burials if not burial.step()]
        self.look = self.look or len(waiting) < len(self.burials)
        self.burials = waiting
        if now >= self.repair_at:
            self.repair_at = now + setting(self.store, "bridge.repair_every") / 1000
            if self.store.one(SUSPECTS) or self.store.one(NOT_LEARNED):
                mended = self.store.write(repair)
                self.look = True
                self.say("repaired", {"links": mended})
            sweep_doors(self.store)
            shred_if_due(self.store)
        while self.to_adapt:
            self._adapt(self.to_adapt.pop())
            if not self.once:  # one a round: each takes as long as some tasks do
                break
        over = self.store.value(NEXT_CONSENT_END)
        if over is not None and over <= clock():
            self.store.overwrite_deleted()
            self.store.write(expire_consents)
        if now >= self.beat_at:
            self.beat_at = now + setting(self.store, "daemon.heartbeat_every") / 1000
            self._beat()
        if now >= self.stats_at:
            self.stats_at = now + self.stats_every / 1000
            self._tell_statistics()

    def _tell_statistics(self) -> None:
        """One event with all counters. Whatever changes a task is an event, so an idle daemon learns from the newest one's number that there is no news."""
        newest = self.store.value(LAST_EVENT)
        if newest != self.told_up_to and tell_statistics(self.store, self.stats_every):
            self.told_up_to = self.store.value(LAST_EVENT)

    def _adapt(self, name: str) -> None:
        """Let a handler's SLA follow its runs: reckoned first, then put into force in one short transaction."""
        change = self.store.read(lambda reader: wanted_adaptation(reader, name, clock()))
        if change and self.store.write(lambda tx: adapt(tx, change)):
            self.say("adapted", {"handler": name, "sla_ms": change["new_ms"], "reason": change["why"]})

    def _beat(self) -> None:
        state = "stopping" if self.stop_at is not None else "draining" if self.drain else "running"
        self.store.write(lambda tx: tx.run(BEAT, worker=self.worker, now=tx.now, state=state, slots=self.slots), durable=False, knock=False)

    def _look_ahead(self) -> None:
        """Foretell misses that nobody could see when the tasks were submitted; nothing is looked at while nothing happens."""
        self.stirred = self.stirred or self.acted or bool(self.sup.children) or bool((self.waiting_mark or {"n": 0})["n"])
        if not self.stirred or time.monotonic() < self.forecast_at or self.drain or self.stop_at is not None:
            return
        self.forecast_at, self.stirred = time.monotonic() + setting(self.store, "forecast.every") / 1000, False
        misses = self.store.read(lambda reader: misses_to_come(reader, clock()))
        if misses:
            told = self.store.write(lambda tx: sum(foretell(tx, task, forecast) for task, forecast in misses))
            self.say("foretold", {"misses": told})

    def _heed_orders(self) -> None:
        """End the attempts of ours that were cancelled, retried or are to be replaced."""
        if not self.sup.children:
            return
        orders = {row["attempt_id"]: row["stop_requested"] or "cancelled" for row in self.store.all(TAKEN_AWAY, worker=self.worker)}
        for child in self.sup.children.values():
            if child.attempt_id in orders and child.why is None:
                self.sup.stop(child, orders[child.attempt_id])

    def _take_due_steps(self) -> None:
        due = next_instant(self.store)
        while due is not None and due <= clock():
            self.store.write(lambda tx: (recover_expired(tx), sweep(tx)))
            self.look = self.orders = True
            due = next_instant(self.store)
        if self.drain or self.stop_at is not None:
            return
        for rescue in self.store.all(WAITING_RESCUES, worker=self.worker):
            original = perform_rescue(self.store, rescue, self.worker, self.only)
            self.orders = True
            if original:
                self._start(original, extra=True)

    def _consents_changed(self) -> bool:
        """Whether tasks wait for consent, and something has happened to one of both since the last look."""
        if self.drain or self.reload or self.stop_at is not None:
            return False
        mark = self.store.one(WAITING_MARK) or {"n": 0}
        return mark["n"] > 0 and mark != self.waiting_mark

    def _heed_consents(self) -> None:
        """Let tasks go on that have the consent they waited for, end those that were refused, and have somebody ask for the others."""
        self._hear_asker()
        if not self._consents_changed() and time.monotonic() < self.consents_at:
            return
        self.waiting_mark, self.consents_at = self.store.one(WAITING_MARK), time.monotonic() + 1
        if self.drain or self.reload or self.stop_at is not None or not (self.waiting_mark or {"n": 0})["n"]:
            return
        parked = parked_tasks(self.store, self.only)
        states = [{state for state, _ in one["wishes"].values()} for one in parked]
        if any("refused" in state or state <= {"ready"} for state in states):
            self.store.write(lambda tx: settle_parked(tx, self.only))
            self.look = self.orders = True
        if not self.asker and time.monotonic() >= self.ask_at and next(missing_wishes(self.store, parked), None):
            self.asker = self.sup.start_helper(["_ask", *self.only])

    def _hear_asker(self) -> None:
        """Whether the asker has ended, and how."""
        code = self.sup.helpers.get(self.asker)
        if code is None:
            return
        del self.sup.helpers[self.asker]
        self.asker = 0
        self.consents_at = 0.0
        self.ask_at = time.monotonic() + {0: 0, NO_ROOM: 1}.get(code, ASK_AGAIN)
        if code not in (0, NO_ROOM):
            self.say("trouble", {"message": f"asking for consent failed with exit status {code}; tried again in {ASK_AGAIN} s"})

    def _settle(self) -> bool:
        """Record what has started and ended, claim for the free slots, start what was claimed; whether anything was done."""
        free = 0 if self.drain or self.reload or self.stop_at is not None else self._free_slots()
        unmarked = [child for child in self.sup.children.values() if not child.marked]
        for child in unmarked:
            child.ticks = child.ticks or start_ticks(child.pid)  # here, since /proc answers only after the program was loaded
        urgent = bool(self.ended or self.failed_starts or unmarked or self.claimed)
        if not urgent and not (free > 0 and self.look):
            return False
        if not urgent and not self.store.one(RUNNABLE):
            self.look = False
            return False
        ended, failures = list(self.ended), list(self.failed_starts)
        endings = [(child, ending_of(child, self.store.path)) for child in ended]
        claimed, lost, rescued = self.store.write(lambda tx: self._record(tx, unmarked, endings, failures, free), durable=bool(ended or failures))
        for child in unmarked + ended:
            child.marked = True
        for child in lost:
            self.sup.stop(child, "cancelled")
        del self.ended[: len(ended)], self.failed_starts[: len(failures)]
        for child in ended:
            forget_result(self.store.path, child.attempt_id)
            self.say("ended", {"task_id": child.task_id, "attempt_id": child.attempt_id, "exit_status": child.exit_status, "why": child.why})
        self.orders = self.orders or rescued
        self.look = bool(ended or failures or len(claimed) == free)
        self.claimed += claimed
        while self.claimed:
            self._start(self.claimed[0])
            del self.claimed[0]
        return True

    def _free_slots(self) -> int:
        return self.slots - len(self.claimed) - sum(not child.extra for child in self.sup.children.values())

    def _record(self, tx: Tx, unmarked: list[Child], endings: list[tuple[Child, Row]], failures: list[tuple[Row, SpawnError]],
                free: int) -> tuple[list[Row], list[Child], bool]:  # fmt: skip
        """What was claimed, which children were taken away before they ran, and whether a task with a rescue, maybe ours, has ended."""
        rescued = False
        lost = [child for child in unmarked if not self._mark(tx, child)]
        for child, ending in endings:
            if not child.marked:
                self._mark(tx, child)
            row = end_attempt(tx, child.task_id, child.attempt_id, ending)
            rescued = rescued or (row is not None and row["escalation_level"] >= 3)
        for task, error in failures:
            end_attempt(tx, task["task_id"], task["attempt_id"], {"outcome": "failed", "ended_by": "exit", "error": str(error),
                                                                 "exit_status": error.exit_status, "retry": error.retry})  # fmt: skip
        return (claim(tx, self.worker, min(free, CLAIM_BATCH), self.only) if free > 0 else []), lost, rescued

    def _mark(self, tx: Tx, child: Child) -> bool:
        """Record that the process runs; False when the task was taken away before."""
        try:
            start(tx, child.task, child.pid, child.ticks, boot_id())
        except ConflictError:
            return False
        return True

    def _start(self, task: Row, extra: bool = False) -> None:
        handler = self.store.one(GET_HANDLER, name=task["handler"]) or {**HANDLER_DEFAULTS, "argv": "[]", "name": task["handler"]}
        if task["task_type"] == "rescue":
            context = json.loads(task["payload"]).get("context", {})
            task["payload_facts"] = {"context": {**context, **stuck_facts(self.store, task["parent_task_id"])}}
        try:
            if handler["argv"] in (None, "[]"):
                raise SpawnError(f"the handler {task['handler']!r} has no command", 127)
            child = self.sup.spawn(task, handler)
        except (SpawnError, OSError, ValueError) as error:
            known = error if isinstance(error, SpawnError) else SpawnError(f"cannot be started: {error}", 126)
            self.failed_starts.append((task, known))
            self.say("not started", {"task_id": task["task_id"], "handler": task["handler"], "error": str(known)})
            return
        child.extra = extra
        self.say("started task", {"task_id": task["task_id"], "attempt_id": task["attempt_id"], "handler": task["handler"],
                                  "attempt": task["attempt_number"], "pid": child.pid, "extra_slot": extra})  # fmt: skip

    def _sleep_for(self) -> float:
        """Seconds until the nearest instant, at most one: then the database is looked at without a knock."""
        unfinished = self.ended or self.failed_starts or any(not child.marked for child in self.sup.children.values())
        if self.sup.signals or self.orders or unfinished or (self.once and self.acted) or self._consents_changed():
            return 0.0
        due = next_instant(self.store)
        seconds = [1.0, self.sup.next_at() - time.monotonic(), self.watchdog_at - time.monotonic()]
        seconds += [(due - clock()) / 1000] if due is not None else []
        seconds += [self.forecast_at - time.monotonic()] if self.sup.children and not self.drain and self.stop_at is None else []
        seconds += [self.stop_at - time.monotonic()] if self.stop_at is not None and any(c.why is None for c in self.sup.children.values()) else []
        for burial in self.burials:
            self.sup.watch_victims(burial.victims)
            seconds += [] if burial.victims.killed else [burial.victims.kill_at - time.monotonic()]
        return max(0.0, min(seconds))

    def _execute_anew(self) -> None:
        """Replace this program by its newest version, with the same pid, lock and children."""
        if self._settle() or self.ended or any(child.exit_status is not None for child in self.sup.children.values()):
            return  # soon: what is over is recorded by this image
        signal.pthread_sigmask(signal.SIG_BLOCK, STEERING)  # until the new image listens
        if self.sup.signals or not program_starts():
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STEERING)
            if self.sup.signals:
                return  # these come first
            self.reload = False
            self.say("trouble", {"message": "the program does not start any more; going on with the old one"})
            return
        notify_systemd(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        self.say("executing anew", {"children": len(self.sup.children)})
        self.bell.close()
        self._dismiss_asker()
        fds = [self.enlistment.lock, *(fd for child in self.sup.children.values() for fd in child.pipes)]
        state = {"worker": self.worker, "lock": self.enlistment.lock, "since": self.store.since, "terminal": self.terminal,
                 "children": [child.facts() for child in self.sup.children.values()]}  # fmt: skip
        signal.set_wakeup_fd(-1)
        handover = payload_file(to_json(state))
        for fd in [*fds, handover]:
            os.set_inheritable(fd, True)
        os.environ[RESUME] = str(handover)
        self.store.close()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

    def _confess(self, error: Exception) -> None:
        """A defect of the loop itself, as an event and a line."""
        text = f"{type(error).__name__}: {error}"
        self.say("trouble", {"message": text})
        with contextlib.suppress(GraceError):
            self.store.write(lambda tx: emit(tx, "daemon.trouble", self.worker, {"worker_id": self.worker, "error": text}))

    def _leave_to_newer(self, error: UpgradedError) -> None:
        """The database is ahead of this program: end what runs; the newer daemon puts it back."""
        self.say("trouble", {"message": error.message})
        for child in self.sup.children.values():
            self.sup.stop(child, "interrupted")
        while self.sup.children:
            self.sup.ended()
            self.sup.wait(min(1.0, max(0.0, self.sup.next_at() - time.monotonic())))
        self._close()

    def _dismiss_asker(self) -> None:
        """What it has filed stays; the rest is asked later."""
        if self.asker and self.sup.helpers.get(self.asker) is None:
            send(self.asker, signal.SIGTERM)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.asker, 0)
        self.asker = 0

    def _leave(self) -> None:
        self._dismiss_asker()
        if self.once:  # others have told in time, or leave it to the next one
            tell_statistics(self.store, self.stats_every)
        self.store.write(lambda tx: emit(tx, "daemon.stopped", self.worker, {"worker_id": self.worker, "kind": "daemon", "reason": "asked" if
                         self.stop_at is not None else "done", "pid": os.getpid()}))  # fmt: skip
        self.enlistment.discharge()
        notify_systemd("STOPPING=1")
        self.say("stopped", {"worker_id": self.worker})
        self._close()

    def _close(self) -> None:
        self.bell.close()
        self.sup.close()
        with contextlib.suppress(apsw.Error):  # whoever opens the file next need not read a long log
            self.store.con.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def resumed_state() -> Row | None:
    """What the image of this process before SIGHUP has left for this one."""
    handover = os.environ.pop(RESUME, "")
    if not handover:
        return None
    with os.fdopen(int(handover), "rb") as file:
        file.seek(0)
        state: Row = json.loads(file.read())
    return state


class Runner:
    """`grace run`: one command in the foreground, as a task with its own ladder, log and events."""

    def __init__(self, store: Store, spec: Row, argv: list[str], complain: Callable[[str], None], tell: Callable[[str], None],
                 wishes: list[tuple[str, Row]], vault: Vault | None):  # fmt: skip
        """`wishes`: for each secret of the command its variable and what Asking takes; `tell` reaches whoever is to answer."""
        self.store, self.argv, self.spec, self.complain, self.tell = store, argv, spec, complain, tell
        self.wishes, self.vault = wishes, vault
        store.since = clock()
        self.enlistment = Enlistment(store, "runner", 1)
        self.worker = self.enlistment.worker
        self.sup = Supervisor(store, self.worker)
        self.stopped_by = 0
        self.unrecorded = False  # the database took no more
        self.task: Row = {}
        self.foreseen = NOTHING_FORESEEN

    def run(self) -> Row:
        """Until the task is final; its row, with `command_status` to exit with, and what was `foreseen` at its start."""
        done: Row = self.store.write(self._submit)
        if done["duplicate"]:
            self._close()
            return done
        if not self.wishes or done["predicted_miss"]:  # when there will be consent, nobody knows
            self.foreseen = {name: done[name] for name in NOTHING_FORESEEN}
        if "warning" in done and sys.stderr.isatty():
            self.tell(f"grace: {printable(done['warning'])}")
        bell = Bell(self.store)
        self.sup.watch(bell, lambda fd: bell.answer())
        status = 0 if self._obtain_secrets() else 125
        while True:
            status = self._attempt(status)
            self.task = get_task(self.store, done["task_id"])
            if self.unrecorded or self.task["status"] in FINAL or not self._pause():
                break
        bell.close()
        self._close()
        return {**get_task(self.store, done["task_id"]), "duplicate": False, "command_status": status, "foreseen": self.foreseen}

    def _submit(self, tx: Tx) -> Row:
        """Record the intent and take its task in one transaction, so that nobody else ever sees it unclaimed."""
        done: Row = submit(tx, [{**self.spec, "command": True}])[0]
        if not done["duplicate"]:
            taken = take(tx, done["task_id"], self.worker)
            assert taken is not None  # submitted in this very transaction
            self.task = taken
        return done

    def _obtain_secrets(self) -> bool:
        """Ask for the command's secrets and wait, while the SLA clock runs; without them the task has failed."""
        askings: list[Asking] = []
        if self.vault is None or not self.wishes:
            return True
        try:
            self.store.write(lambda tx: changed_task(tx, self.task, SAY_WHY, reason="waiting_consent"))
            with refusals(self.store, self.task["task_id"], plain=True):
                together = asked_at_once(spec for _, spec in self.wishes)
                for _, spec in self.wishes:
                    spec["together"], spec["reported"]["task"] = together, self.task["task_id"]
                    askings.append(Asking(self.vault, spec))
                    if not askings[-1].answered:
                        self.tell(waiting_line(askings[-1]))
            self._await_answers([asking.consent_id for asking in askings])
            self.sup.secrets = {name: asking.value() for (name, _), asking in zip(self.wishes, askings, strict=True)}
            if name := next((name for name, value in self.sup.secrets.items() if b"\0" in value), None):
                raise DeniedError(f"the value for {name} holds a NUL byte, which no environment can")
        except GraceError as error:
            withdraw_open(self.store, [asking.consent_id for asking in askings])
            self.complain(error.message)
            reason = "interrupted" if self.stopped_by else "consent_denied"
            ending = {"outcome": "failed", "ended_by": "exit", "error": error.message, "retry": False, "reason": reason}
            self._record(lambda tx: end_attempt(tx, self.task["task_id"], self.task["attempt_id"], ending))
            return False
        self.task = self.store.write(lambda tx: {**self.task, **changed_task(tx, get_task(tx, self.task["task_id"]), SAY_WHY, reason=None)})
        return True

    def _await_answers(self, ids: list[str]) -> None:
        """Wait until all are approved; GraceError as soon as one is not, or when we are to stop."""
        while True:
            self.store.write(expire_consents)
            rows = [get_consent(self.store, consent_id) for consent_id in ids]
            for row in rows:
                if row["consent_status"] not in ("pending", "approved", "used"):
                    refuse_closed(row)
            if all(row["consent_status"] != "pending" for row in rows):
                return
            for signum in self._signals():
                self.stopped_by = self.stopped_by or signum
            if self.stopped_by or get_task(self.store, self.task["task_id"])["attempt_id"] != self.task["attempt_id"]:
                raise DeniedError("stopped while it waited for consent")
            first = min(row["expires_at"] for row in rows if row["consent_status"] == "pending")
            self.sup.wait(max(0.0, min(1.0, (first - clock()) / 1000, self._climb_if_possible())))

    def _attempt(self, status: int) -> int:
        """One start of the command; the status to exit with."""
        if get_task(self.store, self.task["task_id"])["status"] in FINAL:
            return status
        if self.task["status"] == "queued":
            taken = self.store.write(lambda tx: take(tx, self.task["task_id"], self.worker))
            if taken is None:
                return status
            self.task = taken
        try:
            child = self.sup.spawn(self.task, HANDLER_DEFAULTS, self.argv)
        except SpawnError as error:
            self.complain(str(error))
            ending = {"outcome": "failed", "ended_by": "exit", "error": str(error), "exit_status": error.exit_status, "retry": False}
            self._record(lambda tx: end_attempt(tx, self.task["task_id"], self.task["attempt_id"], ending))
            return error.exit_status
        child.ticks = start_ticks(child.pid)
        self._record(lambda tx: self._mark(tx, child))
        self._watch(child)
        if child.has_terminal:
            give_terminal(os.getpgrp())
        ending = Scrubber(self.sup.secrets).text(ending_of(child, self.store.path))
        if self.stopped_by:
            ending = {**ending, "outcome": "failed", "retry": False, "reason": "interrupted", "error": f"interrupted by {signal_name(self.stopped_by)}"}
        self._record(lambda tx: end_attempt(tx, child.task_id, child.attempt_id, ending))
        forget_result(self.store.path, child.attempt_id)
        while self.sup.undelivered(child) and not child.why and not self._signals():
            self.sup.wait(1.0)
        return 124 if child.why == "timeout" else int(child.exit_status or 0)

    def _record(self, fn: Callable[[Tx], Any]) -> None:
        """Write what has happened, again and again while the database cannot take it; in the end say so."""
        deadline = time.monotonic() + STANDSTILL
        while True:
            try:
                self.store.write(fn)
                return
            except UpgradedError:
                raise
            except DatabaseError as error:
                if time.monotonic() >= deadline:
                    self.unrecorded = True
                    self.complain(f"this could not be recorded: {error.message}")
                    return
                self.sup.wait(1.0)

    def _mark(self, tx: Tx, child: Child) -> None:
        with contextlib.suppress(ConflictError):  # cancelled meanwhile; _watch will see it
            start(tx, child.task, child.pid, child.ticks, boot_id())

    def _watch(self, child: Child) -> None:
        """Its ladder, its orders and its signals, until the command has ended."""
        before = clocks()
        while not self.sup.ended():
            before, last = clocks(), before
            if max(map(abs, clock_jump(last, before))) >= SECOND:
                self._record(functools.partial(record_clock_jump, worker=self.worker, before=last, now=before))
            for signum in self._signals():
                self.sup.stop(child, "interrupted", at_once=bool(self.stopped_by))
                self.stopped_by = self.stopped_by or signum
            for order in self.store.all(TAKEN_AWAY, worker=self.worker):
                self.sup.stop(child, order["stop_requested"] or "cancelled")
            self.sup.wait(min(1.0, self.sup.next_at() - time.monotonic(), self._climb_if_possible()))

    def _climb_if_possible(self) -> float:
        """The ladder of a running command; a database that takes no more must not end the command."""
        try:
            return self._climb()
        except UpgradedError:
            raise
        except DatabaseError:
            return 1.0

    def _climb(self) -> float:
        """Take the due steps of our own task and do its rescue; the seconds until the next one."""
        task = get_task(self.store, self.task["task_id"])
        if task["next_at"] is not None and task["next_at"] <= clock():
            task = self.store.write(lambda tx: take_due_steps(tx, get_task(tx, task["task_id"]), setting(tx, "queue.age_every")))
            rescue = self.store.one(RESCUE_OF, id=task["task_id"])
            if rescue and rescue["status"] == "queued" and rescue["handler"] is None:
                perform_rescue(self.store, rescue, self.worker, only=["-"])
        return (task["next_at"] - clock()) / 1000 if task["next_at"] is not None else 1.0

    def _pause(self) -> bool:
        """Wait out the back-off; whether there is another attempt to make."""
        while True:
            self._climb()
            self.task = get_task(self.store, self.task["task_id"])
            if self.task["status"] != "queued" or self.task["available_at"] is None:
                return bool(self.task["status"] == "queued")
            if self._signals():
                self.store.write(lambda tx: cancel(tx, get_task(tx, self.task["task_id"]), "interrupted"))
                return False
            self.sup.wait(min(1.0, (self.task["available_at"] - clock()) / 1000))

    def _signals(self) -> list[int]:
        heard, self.sup.signals[:] = list(self.sup.signals), []
        return heard

    def _close(self) -> None:
        with contextlib.suppress(DatabaseError):  # somebody else will find the lock free
            self.enlistment.discharge()
        self.sup.close()


# =====================================================================================================================
# output
# Rows to what is shown: documents for programs, aligned lines for people. Text that came from outside is escaped in
# every listing. Plain lists are aligned here, because the library for it costs more than the whole command.

TASK_FIELDS = (
    "task_id", "intent_id", "parent_task_id", "retry_of", "task_type", "domain", "handler", "goal", "status", "reason", "priority",
    "payload", "attempt_number", "max_attempts", "created_at", "queued_at", "assigned_at", "started_at", "finished_at", "assigned_worker",
    "sla_ms", "sla_deadline", "sla_met", "sla_buffer_ms", "escalation_level", "elapsed_ms", "urgency_ratio", "queue_time_ms",
    "execution_time_ms", "total_time_ms", "progress", "result", "error", "exit_status", "success", "available_at", "recoveries",
)  # fmt: skip
INTENT_FIELDS = (
    "intent_id", "htm_task_id", "goal", "expected_outcome", "domain", "handler", "priority", "status", "sla_ms", "sla_met", "success",
    "confidence", "risk_level", "context", "result", "created_at", "dispatched_at", "completed_at", "actual_execution_ms", "created_by",
    "learned_from",
)  # fmt: skip
COLOURS = {"completed": "32", "running": "36", "assigned": "36", "failed": "31", "timeout": "31", "critical": "31", "violated": "33",
           "warning": "33", "blocked": "33", "dead": "31", "alive": "32", "paused": "33", "healthy": "32", "degraded": "33"}  # fmt: skip


def shown_fields(row: Row, names: tuple[str, ...]) -> Row:
    """The named fields as programs see them: instants as text, truths as booleans, JSON as values."""
    document = {name: row.get(name) for name in names}
    for name, value in document.items():
        if value is None:
            continue
        if name.endswith("_at") or name == "sla_deadline":
            document[name] = format_instant(value)
        elif name in ("payload", "result", "progress", "context"):
            document[name] = json.loads(value)
        elif name in ("sla_met", "success", "learned_from"):
            document[name] = bool(value)
    return document


def task_document(row: Row, now: int) -> Row:
    elapsed = max(0, (row["finished_at"] or now) - row["queued_at"])
    ratio = None if row["sla_ms"] is None else round(elapsed / row["sla_ms"], 4)
    success = None if row["finished_at"] is None else row["status"] == "completed"
    return shown_fields({**row, "elapsed_ms": elapsed, "urgency_ratio": ratio, "success": success}, TASK_FIELDS)


def intent_document(row: Row) -> Row:
    return shown_fields(row, INTENT_FIELDS)


def attempt_document(row: Row) -> Row:
    names = ("attempt_id", "attempt_number", "worker_id", "pid", "created_at", "started_at", "finished_at", "outcome", "ended_by",
             "exit_status", "error", "lease_expires_at", "log_bytes", "log_dropped")  # fmt: skip
    return shown_fields(row, names)


def handler_document(row: Row) -> Row:
    document = {key: value for key, value in row.items() if key not in ("created_at", "updated_at")}
    document.update(argv=json.loads(row["argv"]) if row["argv"] else None, env=json.loads(row["env"]),
                    secrets=[{"env": name, "secret_key": key, "action": action} for name, key, action in json.loads(row["secrets"])],
                    external=bool(row["external"]), paused=bool(row["paused"]), created_at=format_instant(row["created_at"]),
                    updated_at=format_instant(row["updated_at"]))  # fmt: skip
    return document


def outcome_document(row: Row) -> Row:
    names = ("task_id", "intent_id", "action_type", "handler", "domain", "success", "confidence_score", "execution_time", "context", "created_at")
    return {**shown_fields(row, names), "imported": bool(row["imported"])}


def basis_document(row: Row) -> Row:
    """A suggested SLA with its instants as text."""
    return {key: format_instant(value) if key.endswith("_at") else value for key, value in row.items()}


def violation_document(row: Row, now: int) -> Row:
    elapsed = max(0, (row["finished_at"] or now) - row["queued_at"])
    over = elapsed - row["sla_ms"]
    return {
        "task_id": row["task_id"], "intent_id": row["intent_id"], "task_type": row["task_type"], "domain": row["domain"],
        "handler": row["handler"], "priority": row["priority"], "sla_ms": row["sla_ms"], "elapsed_ms": elapsed,
        "overdue_ms": max(0, over), "overdue_percent": max(0.0, round(100 * over / row["sla_ms"], 1)),
        "escalation_level": row["escalation_level"], "level": row["level"], "assigned_worker": row["assigned_worker"],
        "status": row["status"], "rescue_task_id": row["rescue_task_id"], "created_at": format_instant(row["created_at"]),
    }  # fmt: skip


def text_width(text: str) -> int:
    """Columns on a terminal."""
    if text.isascii():
        return len(text)
    import unicodedata

    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def cut_text(text: str, width: int) -> str:
    if text_width(text) <= width:
        return text
    while text and text_width(text) > width - 1:
        text = text[:-1]
    return text + "…"


def align(header: tuple[str, ...], rows: list[tuple[str, ...]], width: int | None) -> Iterator[str]:
    """Lines of a table; with a width, cells are cut to fit."""
    widths = [max(text_width(line[n]) for line in [header, *rows]) for n in range(len(header))]
    if width is not None:
        shrink(widths, width - 2 * (len(widths) - 1))
    for row in [header, *rows]:
        cells = [cut_text(cell, size) if width is not None else cell for cell, size in zip(row, widths, strict=True)]
        yield "  ".join(cell + " " * (size - text_width(cell)) for cell, size in zip(cells, widths, strict=True)).rstrip()


def shrink(widths: list[int], room: int) -> None:
    """Make columns fit: the last one first, down to twelve, then always the widest; the first, which names things, only when nothing else is left."""
    widths[-1] = max(min(widths[-1], 12), min(widths[-1], room - sum(widths[:-1])))
    while sum(widths) > room and max(widths) > 4:
        widest = max(range(1, len(widths)), key=widths.__getitem__, default=0)
        widths[widest if widths[widest] > 4 else 0] -= 1


def colour(line: str) -> str:
    """The words of a state in their colours."""
    return re.sub(rf"\b({'|'.join(COLOURS)})\b", lambda match: f"\033[{COLOURS[match[0]]}m{match[0]}\033[0m", line, count=1)


def write_out(text: str) -> None:
    sys.stdout.write(text + "\n")


def write_folded(text: str, indent: int) -> None:
    """Prose, on a terminal broken between words, the further lines set in."""
    import textwrap

    width = terminal_width()
    write_out(textwrap.fill(text, max(40, width - 1), subsequent_indent=" " * indent, break_on_hyphens=False) if width else text)


def write_json(document: Any) -> None:
    write_out(json.dumps(document))


def on_terminal() -> bool:
    return sys.stdout.isatty()


def terminal_width() -> int | None:
    """Columns of the terminal, None when the output goes elsewhere and nothing is to be cut."""
    if not on_terminal():
        return None
    with contextlib.suppress(OSError):
        return os.get_terminal_size(sys.stdout.fileno()).columns or 80
    return 80


def show_table(header: tuple[str, ...], rows: Iterable[tuple[Any, ...]], empty: str) -> None:
    rows = list(rows)
    if not rows:
        write_out(empty)
        return
    paint = on_terminal() and not os.environ.get("NO_COLOR")
    for number, line in enumerate(align(header, rows, terminal_width())):
        write_out(colour(line) if paint and number else line)


def show_record(document: Row) -> None:
    """One thing, a field a line; what is not known is left out."""
    lines = [(name, plain_value(name, value)) for name, value in document.items() if value is not None and value not in ([], {})]
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        write_out(f"{name:<{width}}  {text}")


def plain_value(name: str, value: Any) -> str:
    if name.endswith("_ms") and isinstance(value, int):
        return format_duration(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def sla_cell(document: Row) -> str:
    if document["sla_ms"] is None:
        return "-"
    return f"{round(100 * document['elapsed_ms'] / document['sla_ms'])}% of {format_duration(document['sla_ms'])}"


def task_cells(document: Row) -> tuple[str, ...]:
    return (document["task_id"], document["status"], document["priority"], sla_cell(document), printable(document["goal"]))


def intent_cells(document: Row) -> tuple[str, ...]:
    return (document["intent_id"], document["status"], document["priority"], document["domain"], printable(document["goal"]))


QUEUED_HANDLERS = """SELECT c.handler, SUM(c.n) AS n, MAX(h.paused) AS paused, MAX(h.external) AS external
  FROM task_counts c LEFT JOIN handlers h ON h.name = c.handler
  WHERE c.status = 'queued' AND c.handler <> '' GROUP BY c.handler HAVING SUM(c.n) > 0"""
SET_ASIDE_COUNT = "SELECT COUNT(*) AS n FROM htm_tasks WHERE set_aside IS NOT NULL AND finished_at IS NULL"
PARKED_COUNT = "SELECT COUNT(*) AS n FROM htm_tasks WHERE status = 'blocked' AND reason = 'waiting_consent'"
PARKED_PENDING = """SELECT c.consent_id FROM htm_tasks t JOIN secret_consent_records c ON c.task_id = t.task_id AND c.consent_status = 'pending'
  WHERE t.status = 'blocked' AND t.reason = 'waiting_consent' ORDER BY c.seq"""


def status_document(store: Store) -> Row:
    """One screen's worth: daemons, depths, violations, and what is wrong with a hint for each."""
    now = clock()
    counters = store.read(lambda reader: queue_counters(reader, now))
    workers, figures = worker_figures(store)
    daemons = [row for row in workers if row["kind"] == "daemon" and row["alive"]]
    shown = [shown_fields(row, ("worker_id", "kind", "pid", "slots", "state", "started_at", "heartbeat_at", "alive")) for row in workers]
    return {"database": store.path, "daemon_alive": bool(daemons), "workers": shown, **figures, **counters, "pending_consents": len(answerable(store, now)),
            "problems": problems(store, counters, daemons, workers, now)}  # fmt: skip


def problems(store: Store, counters: Row, daemons: list[Row], workers: list[Row], now: int) -> list[Row]:
    """What needs a person, each with a hint."""
    found: list[tuple[str, str, str]] = []
    queued = store.all(QUEUED_HANDLERS)
    waiting, parked = sum(row["n"] for row in queued if not row["external"] and not row["paused"]), store.value(PARKED_COUNT)
    if parked:
        found.append(("waiting_consent", f"{counted(parked, 'task')} waiting for consent"
                      + "".join(f" {row['consent_id']}" for row in store.all(PARKED_PENDING)), "answer: grace consent approve ID" if daemons
                      else "answer: grace consent approve ID; and start a daemon, which goes on with them: grace daemon"))  # fmt: skip
    if waiting and not daemons:
        found.append(("no_daemon", f"{counted(waiting, 'task')} queued and no daemon runs", "start one: grace daemon"))
    for row in queued:
        if row["paused"]:
            found.append(("handler_paused", f"{counted(row['n'], 'task')} queued for the paused handler {row['handler']}",
                          f"grace handler resume {row['handler']}"))  # fmt: skip
    if asked := len(answerable(store, now)):
        found.append(("consent", f"{counted(asked, 'request')} for a secret waiting for an answer", "see them: grace consent pending"))
    if counters["active_violations"]:
        found.append(("violations", f"{counted(counters['active_violations'], 'open task')} past the SLA", "see them: grace violations"))
    allowed = 3 * setting(store, "daemon.heartbeat_every") + 5 * SECOND
    for row in daemons:
        if now - row["heartbeat_at"] > allowed:
            found.append(("daemon_stuck", f"the daemon {row['pid']} lives but has been silent for {format_duration(now - row['heartbeat_at'])}",
                          "see what it is doing, then restart it"))  # fmt: skip
    dead = [row for row in workers if not row["alive"]]
    if dead:
        found.append(("worker_died", f"{counted(len(dead), 'worker')} died; what they ran goes back when a daemon runs", "start one: grace daemon"))
    if aside := store.value(SET_ASIDE_COUNT):
        found.append(("set_aside", f"{counted(aside, 'task')} set aside for impossible times", "see them: grace events --topic htm.task.invalid"))
    return [{"code": code, "message": message, "hint": hint} for code, message, hint in found]


HEALTH_LEVELS = ("healthy", "warning", "degraded", "critical")
HEALTH_CHECKS = (  # code, which is its setting's name too; level, unit; what is wrong, and what to do
    ("no_daemon", "critical", "ms", "work waits for a daemon, and none has been there for {}", "start one: grace daemon"),
    ("lost_tasks", "critical", "tasks", "{} held by a worker that died, and no daemon is there to put back what was lost", "start one: grace daemon"),
    ("daemon_silent", "critical", "ms", "a daemon lives but has said nothing for {}", "see what it is doing, then restart it"),
    ("disk_free", "critical", "bytes", "only {} are left on the disk of the database", "free some space, or nothing can be recorded any more"),
    ("open_violations", "degraded", "tasks", "{} past the SLA", "see them: grace dashboard violations"),
    ("sla_compliance", "degraded", "ratio", "only {} of what ended met its SLA", "see when: grace dashboard hourly; and what took long: grace dashboard slow"),
    ("failure_rate", "degraded", "ratio", "{} of what ended has failed", "see them: grace task list --status failed --status timeout"),
    ("recoveries", "degraded", "tasks", "{} put back because their worker was lost", "see them: grace events --topic htm.task.recovered"),
    ("queue_age", "warning", "ms", "the oldest queued task has waited for {}", "see why: grace task explain, with an id of grace task list --status queued"),
    ("queue_depth", "warning", "tasks", "{} queued", "run more at once: grace daemon --workers N; or submit less"),
    ("utilization", "warning", "ratio", "{} of the slots are busy while tasks wait", "run more at once: grace daemon --workers N"),
    ("wal_bytes", "warning", "bytes", "the write-ahead log has grown to {}", "end what has read the database for hours; it shrinks when the last daemon stops"),
    ("set_aside", "warning", "tasks", "{} set aside for impossible times", "see them: grace events --topic htm.task.invalid"),
    ("paused_tasks", "warning", "tasks", "{} queued for paused handlers", "let them go on: grace handler resume NAME"),
    ("waiting_consent", "warning", "tasks", "{} waiting for consent", "answer: grace consent pending"),
)
AT_LEAST = ("disk_free", "sla_compliance")  # what must not be below its threshold; the others must not be above
UP_TO = ("utilization",)  # what must not even be at it
LAST_STOP = "SELECT MAX(stopped_at) AS at FROM workers WHERE kind = 'daemon' AND stopped_at IS NOT NULL"
LAST_BEAT = "SELECT MAX(heartbeat_at) AS at FROM workers WHERE kind = 'daemon' AND stopped_at IS NULL"
OLDEST_OURS = """SELECT MIN(q.queued_at) AS at FROM (SELECT queued_at, handler FROM htm_tasks
  WHERE status = 'queued' AND available_at IS NULL AND queued_at <= :now ORDER BY queued_at LIMIT 10000) AS q
  JOIN handlers h ON h.name = q.handler WHERE h.paused = 0 AND h.external = 0"""
NEXT_OF_HANDLER = """SELECT queued_at AS at FROM htm_tasks WHERE handler = :name AND status = 'queued' AND available_at IS NULL
  ORDER BY rank, order_at, seq LIMIT 1"""
LOST_TASKS = """SELECT COUNT(*) AS n FROM htm_task_attempts a CROSS JOIN htm_tasks t
  WHERE a.worker_id = :worker AND a.finished_at IS NULL AND t.task_id = a.task_id AND t.attempt_id = a.attempt_id"""
OVERDUE = """SELECT next_at FROM (SELECT next_at, sla_ms, available_at FROM htm_tasks WHERE next_at <= :now ORDER BY next_at LIMIT 1000) AS due
  WHERE sla_ms IS NOT NULL OR available_at IS NOT NULL ORDER BY next_at LIMIT 1"""
RECOVERED_SINCE = "SELECT COUNT(*) AS n FROM events WHERE topic = 'htm.task.recovered' AND created_at >= :since"


def health_document(store: Store) -> Row:
    """How things are in one word, and each figure that says otherwise with its threshold and what to do."""
    now = clock()
    workers, facts = worker_figures(store)
    daemons = [row for row in workers if row["kind"] == "daemon" and row["alive"]]
    counters: Row = store.read(lambda reader: queue_counters(reader, now, setting(reader, "health.window")))
    figures = health_figures(store, {**counters, **facts}, daemons, now)
    thresholds = {code: threshold_of(store, code) for code, *_ in HEALTH_CHECKS}
    checks = [{"code": code, "level": level, "figure": figures[code], "threshold": thresholds[code], "unit": unit, "setting": f"health.{code}",
               "ok": not is_beyond(code, figures[code], thresholds[code]), "message": text.format(shown_figure(figures[code], unit)), "advice": advice}
              for code, level, unit, text, advice in HEALTH_CHECKS]  # fmt: skip
    alerts = [{name: value for name, value in check.items() if name != "ok"} for check in checks if not check["ok"]]
    worst = max((HEALTH_LEVELS.index(alert["level"]) for alert in alerts), default=0)
    return {"status": HEALTH_LEVELS[worst], "alerts": alerts, "uptime_ms": max((max(0, now - row["started_at"]) for row in daemons), default=None),
            "last_updated_at": format_instant(now), "window_since_at": counters["window_since_at"],
            "checks": [{name: check[name] for name in ("code", "level", "figure", "threshold", "unit", "ok")} for check in checks]}  # fmt: skip


def is_beyond(code: str, figure: float | None, threshold: float) -> bool:
    """Whether a figure is on the wrong side of its threshold; one that does not apply never is."""
    return figure is not None and (figure < threshold if code in AT_LEAST else figure >= threshold if code in UP_TO else figure > threshold)


def threshold_of(reader: Reader, code: str) -> float:
    value = setting(reader, f"health.{code}")
    if code == "daemon_silent":  # a daemon that is to speak seldom is not silent
        return max(value, 3 * setting(reader, "daemon.heartbeat_every"))
    return value / RATIO_PARTS if SETTINGS[f"health.{code}"][0] == "ratio" else value


def health_figures(store: Store, counters: Row, daemons: list[Row], now: int) -> dict[str, float | None]:
    """The figure of each check; None where it does not apply."""
    queued, ended, least = store.all(QUEUED_HANDLERS), counters["window_completed"] + counters["window_failed"], setting(store, "health.least_ended")
    oldest, compliance = counters["longest_queued_ms"], counters["window_sla_compliance_rate"]
    waited = longest_of_ours(store, [row["handler"] for row in queued if not row["external"] and not row["paused"]], now)
    disk, waits = os.statvfs(os.path.dirname(store.path)), waited > setting(store, "health.busy_wait")
    return {
        "no_daemon": None if daemons else without_daemon(store, waited, now), "lost_tasks": None if daemons else lost_tasks(store),
        "daemon_silent": max((max(0, now - row["heartbeat_at"]) for row in daemons), default=None),
        "disk_free": disk.f_bavail * disk.f_frsize, "open_violations": counters["active_violations"],
        "sla_compliance": compliance if counters["window_sla_judged"] >= least else None,
        "failure_rate": counters["window_failed"] / ended if ended and ended >= least else None,
        "recoveries": store.value(RECOVERED_SINCE, since=now - setting(store, "health.window")), "queue_age": oldest,
        "queue_depth": counters["queued_tasks"], "utilization": counters["worker_utilization"] if waits else None,
        "wal_bytes": os.path.getsize(store.path + "-wal") if os.path.exists(store.path + "-wal") else 0, "set_aside": store.value(SET_ASIDE_COUNT),
        "paused_tasks": sum(row["n"] for row in queued if row["paused"]), "waiting_consent": store.value(PARKED_COUNT),
    }  # fmt: skip


def longest_of_ours(store: Store, handlers: list[str], now: int) -> int:
    """For how long (ms) a task that a daemon may run has waited; with very many of others before it, how long the next of ours has."""
    if not handlers:
        return 0
    at = store.value(OLDEST_OURS, now=now)
    known = [at] if at is not None else [at for name in handlers if (at := store.value(NEXT_OF_HANDLER, name=name)) is not None]
    return max(0, now - min(known, default=now))


def lost_tasks(store: Store) -> int:
    """How many tasks a worker holds that has died."""
    return sum(store.value(LOST_TASKS, worker=row["worker_id"]) for row in store.all(LIVE_WORKERS) if not is_alive(row))


def without_daemon(store: Store, waited: int, now: int) -> int | None:
    """For how long (ms) work or a due step has waited while no daemon was there; None when nothing waits. Ageing alone may wait."""
    due = store.value(OVERDUE, now=now)
    last = max((at for at in (store.value(LAST_STOP), store.value(LAST_BEAT)) if at is not None), default=None)
    waited = max(waited, now - due if due is not None else 0)
    return None if waited <= 0 else max(0, min(waited, now - last) if last is not None else waited)


def shown_figure(value: float | None, unit: str) -> str:
    """A figure for people."""
    if value is None:
        return "-"
    if unit == "tasks":
        return counted(round(value), "task")
    if unit == "bytes":
        return f"{value / (1 << 20):.1f} MiB" if value < 1 << 30 else f"{value / (1 << 30):,.1f} GiB"
    return format_duration(value) if unit == "ms" else f"{100 * value:.1f} %"


def hourly_documents(store: Store, hours: int) -> list[Row]:
    now = clock()
    rows = store.read(lambda reader: hourly_figures(reader, now - now % HOUR - (hours - 1) * HOUR))
    return [{"starts_at": format_instant(row.pop("starts_at")), **row} for row in rows]


RUNNING_LONGEST = """SELECT t.* FROM htm_task_attempts a CROSS JOIN htm_tasks t -- CROSS so that the few open attempts come first
  WHERE t.task_id = a.task_id AND t.attempt_id = a.attempt_id AND a.finished_at IS NULL AND a.started_at IS NOT NULL AND t.status = 'running'
  ORDER BY a.started_at LIMIT :n"""


def slow_document(store: Store, window: int, limit: int) -> Row:
    """The tasks that run longest now, and the completed ones of the window that took longest, each beside what is usual for its kind."""
    now = clock()
    usual = functools.cache(lambda kind: usual_p95(store, kind, now))

    def shown(row: Row) -> Row:
        took = row["execution_time_ms"] if row["finished_at"] is not None else max(0, now - row["started_at"])
        p95 = usual(row["task_type"])
        names = ("task_id", "intent_id", "task_type", "domain", "handler", "goal", "status", "started_at", "finished_at")
        return {**shown_fields(row, names), "execution_time_ms": took, "usual_p95_ms": p95, "times_usual": round(took / p95, 2) if p95 else None}

    found: Row = store.read(lambda reader: {
        "running": [shown(row) for row in reader.all(RUNNING_LONGEST, n=limit)],
        "completed": [shown(row) for row in slowest_tasks(reader, now - window, limit)],
        "window_since_at": format_instant(window_bounds(reader, now - window)["since"]), "last_updated_at": format_instant(now)})  # fmt: skip
    return found


# Metrics in Prometheus' text format, version 0.0.4: seconds and ratios, counters in _total. What a name can be is bounded, or a label could grow
# without end: handlers are those that exist, domains those fifty in which most has ended.

Sample = tuple[str, dict[str, str], float | None]  # the name's end, labels, value
EXECUTION_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 600, 1800, 3600, 21600, 86400)  # seconds
MOST_DOMAINS = 50
OPEN_OF_HANDLERS = """SELECT handler, status, SUM(n) AS n FROM task_counts
  WHERE status IN ('queued', 'blocked', 'assigned', 'running') GROUP BY handler, status ORDER BY handler, status"""


def prometheus_family(name: str, kind: str, help_text: str, samples: Iterable[Sample]) -> str:
    """One metric with its help, type and samples; empty when there is none to tell."""
    lines = []
    for end, labels, value in samples:
        if value is not None:
            inner = ",".join(f'{key}="{escaped_label(text)}"' for key, text in labels.items())
            lines.append(f"{name}{end}{{{inner}}} {value!r}" if inner else f"{name}{end} {value!r}")
    head = f"# HELP {name} {help_text}\n# TYPE {name} {kind}\n"
    return head + "\n".join(lines) + "\n" if lines else ""


def escaped_label(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def histogram_samples(labels: dict[str, str], histogram: Histogram, sum_ms: int) -> Iterator[Sample]:
    """The cumulative buckets of what was measured; each of our finer buckets counts whole, by its middle."""
    counts = [0] * (len(EXECUTION_BOUNDS) + 1)
    for bucket, n in histogram:
        counts[bisect_left(EXECUTION_BOUNDS, bucket_middle(bucket) / 1000)] += n
    *within, count = itertools.accumulate(counts)
    for bound, n in zip(EXECUTION_BOUNDS, within, strict=True):
        yield "_bucket", {**labels, "le": f"{bound:g}"}, n
    yield from (("_bucket", {**labels, "le": "+Inf"}, count), ("_sum", labels, sum_ms / 1000), ("_count", labels, count))


def in_seconds(ms: float | None) -> float | None:
    return None if ms is None else ms / 1000


def live_families(document: Row) -> Iterator[tuple[str, str, str, list[Sample]]]:
    """What the document of `dashboard stats` says, as metrics."""
    for name, key, text in (
        ("grace_sla_warnings_total", "warnings_issued", "Tasks that were warned of."),
        ("grace_sla_violations_total", "total_violations", "Tasks that passed their SLA."),
        ("grace_rescues_total", "sub_agents_spawned", "Rescues that were spawned."),
        ("grace_tasks_rescued_total", "tasks_rescued", "Tasks completed after a rescue."),
        ("grace_tasks_recovered_total", "tasks_recovered", "Times that a task was put back because its worker was lost."),
        ("grace_reprioritizations_total", "queue_reprioritizations", "Times that a queued task was moved forward."),
    ):
        yield name, "counter", text, [("", {}, document[key])]
    for name, key, text in (
        ("grace_tasks_active", "active_tasks", "Tasks assigned or running."), ("grace_tasks_queued", "queued_tasks", "Tasks in the queue."),
        ("grace_tasks_blocked", "blocked_tasks", "Tasks that wait for others or for consent."),
        ("grace_sla_violations_open", "active_violations", "Open tasks past their SLA."),
        ("grace_sla_compliance_ratio", "sla_compliance_rate", "Of all that ended with an SLA, the part that met it."),
        ("grace_workers", "active_workers", "Daemons and foreground runs alive."), ("grace_worker_slots", "worker_slots", "Slots of all daemons."),
        ("grace_worker_slots_busy", "busy_slots", "Slots in use."), ("grace_worker_utilization_ratio", "worker_utilization", "Slots in use by slots."),
        ("grace_window_sla_compliance_ratio", "window_sla_compliance_rate", "Within the window: of what ended with an SLA, the part that met it."),
        ("grace_window_success_ratio", "window_success_rate", "Within the window: completed by completed and failed."),
    ):
        yield name, "gauge", text, [("", {}, document[key])]
    yield "grace_queue_depth", "gauge", "Tasks in each class of the queue.", [("", {"priority": name}, n) for name, n in document["queue_depths"].items()]
    yield "grace_queue_oldest_seconds", "gauge", "How long the oldest queued task has waited; 0 when there is none.", [
        ("", {}, in_seconds(document["longest_queued_ms"]) or 0)]  # fmt: skip
    yield "grace_window_seconds", "gauge", "The window of the averages and quantiles, counted in whole hours.", [("", {}, document["window_ms"] / 1000)]
    yield "grace_window_execution_seconds", "gauge", "Within the window: how long completed tasks ran, within 2 %.", [
        ("", {"quantile": f"{part / 100:g}"}, in_seconds(document[f"p{part}_execution_ms"])) for part in (50, 95, 99)]  # fmt: skip
    for what in ("buffer", "queue_time", "execution_time", "total_time"):
        yield f"grace_window_average_{what}_seconds", "gauge", f"Within the window: the average {what.replace('_', ' ')} of completed tasks.", [
            ("", {}, in_seconds(document[f"avg_{what}_ms"]))]  # fmt: skip


def ended_samples(label: str, rows: Iterable[Row], names: Iterable[str]) -> list[Sample]:
    """What has ever ended, by status, for each of these names."""
    sums = {name: dict.fromkeys(FINAL, 0) for name in names}
    for row in rows:
        if row[label] in sums:
            for status in FINAL:
                sums[row[label]][status] += row["timed_out" if status == "timeout" else status]
    return [("", {"handler" if label == "task_type" else label: name, "status": status}, n) for name, by in sums.items() for status, n in by.items()]


def ever_families(reader: Reader) -> Iterator[tuple[str, str, str, list[Sample]]]:
    """What is counted for all time, by status, handler and domain."""
    rows, histograms = ever_figures(reader)
    totals = {row["name"]: row["value"] for row in reader.all(TOTALS)}
    status = {row["status"]: row["n"] for row in reader.all(STATUS_TOTALS)}
    handlers = [row["name"] for row in reader.all(LIST_HANDLERS)]
    kinds = [*handlers, *(kind for kind in ("command", "rescue") if kind not in handlers)]
    by_domain: dict[str, int] = {}
    took: dict[str, int] = {}
    for row in rows:
        by_domain[row["domain"]] = by_domain.get(row["domain"], 0) + sum(row[name] for name in ENDED)
        took[row["task_type"]] = took.get(row["task_type"], 0) + row["execution_ms"]
    domains = sorted(sorted(by_domain, key=lambda name: (-by_domain[name], name))[:MOST_DOMAINS])
    whole: dict[int, int] = {}
    for bucket, n in (pair for one in histograms.values() for pair in one):
        whole[bucket] = whole.get(bucket, 0) + n
    yield "grace_tasks_ended_total", "counter", "Tasks that ended.", [("", {"status": name}, status.get(name, 0)) for name in FINAL]
    yield "grace_sla_judged_total", "counter", "Tasks that ended with an SLA, by whether they met it.", [
        ("", {"met": "true"}, totals.get("sla_met", 0)), ("", {"met": "false"}, totals.get("sla_missed", 0))]  # fmt: skip
    yield "grace_handler_tasks_ended_total", "counter", "Tasks that ended, by handler.", ended_samples("task_type", rows, kinds)
    yield "grace_domain_tasks_ended_total", "counter", "Tasks that ended, by domain.", ended_samples("domain", rows, domains)
    yield "grace_handler_tasks", "gauge", "Open tasks, by handler.", [
        ("", {"handler": row["handler"], "status": row["status"]}, row["n"]) for row in reader.all(OPEN_OF_HANDLERS) if row["handler"] in handlers]  # fmt: skip
    yield "grace_execution_seconds", "histogram", "How long completed tasks ran.", list(
        histogram_samples({}, sorted(whole.items()), sum(took.values())))  # fmt: skip
    yield "grace_handler_execution_seconds", "histogram", "How long completed tasks ran, by handler.", [
        sample for kind in kinds if kind in histograms for sample in
        histogram_samples({"handler": kind}, histograms[kind], took[kind])]  # fmt: skip


def prometheus_text(store: Store, window: int) -> str:
    """All metrics in the text format."""
    document = statistics_of(store, window)
    families = [*live_families(document), *store.read(lambda reader: list(ever_families(reader)))]
    return "".join(prometheus_family(*family) for family in families)


NEEDS = """SELECT i.intent_id, i.status FROM task_dependencies d JOIN intent_records i ON i.intent_id = d.intent_id
  WHERE d.task_id = :id ORDER BY i.intent_id"""


def explain_task(store: Store, task: Row) -> Row:
    """Why a task is where it is, what comes next, and its whole story in order."""
    now = clock()
    story = [event_document(row) for row in store.all(EVENTS_OF, subject=task["task_id"], n=1000)]
    steps = next_steps(task, setting(store, "queue.age_every")) if task["status"] not in FINAL else []
    return {
        "task_id": task["task_id"], "intent_id": task["intent_id"], "goal": task["goal"], "status": task["status"], "reason": task["reason"],
        "why": [{"code": code, "text": text} for code, text in reasons(store, task, now)],
        "next_steps": [{"step": name, "due_at": format_instant(at)} for at, name in steps],
        "predicted": predicted_of(store, task, now) if task["status"] not in FINAL else None,
        "consents": consents_of_task(store, task["task_id"]),
        "attempts": [attempt_document(row) for row in store.all(ATTEMPTS_OF, id=task["task_id"])],
        "story": [{"at": event["created_at"], "topic": event["topic"], "text": story_line(event)} for event in story],
    }  # fmt: skip


def past_deadline(task: Row, now: int) -> bool:
    return task["sla_deadline"] is not None and bool(now > task["sla_deadline"])


def predicted_of(store: Store, task: Row, now: int) -> Row:
    """What is foreseen of an open task, for programs."""

    def look(reader: Reader) -> Row:
        world = gather(reader, now, {task["handler"]: 1} if task["handler"] else None)
        line = head_of_queue(reader, world, WINDOW) if task["status"] == "queued" else []
        seen = foresee(reader, world, line, task)
        if seen["reason"] in ("handler_paused", "no_daemon", "not_served", "external") and learned_here(world, task["handler"]):
            seen["advice"] = advice_for(reader, world, line, task, None, COUNTED_AHEAD)
        return seen

    forecast = store.read(look)
    return {**{name: format_instant(forecast[name]) for name in ("start_at", "finish_at", "finish_by_at")},
            "miss": past_deadline(task, now) or forecast["miss"],
            "reason": forecast["reason"], "text": forecast["text"], "basis": forecast["basis"], "advice": advice_document(forecast["advice"]),
            "summary": None if not forecast["miss"] else late_words(task, now) if past_deadline(task, now) else miss_sentence(task, forecast)}  # fmt: skip


def late_words(task: Row, now: int) -> str:
    return f"is late: {format_duration(now - task['sla_deadline'])} past its SLA of {format_duration(task['sla_ms'])}"


def reasons(store: Store, task: Row, now: int) -> list[tuple[str, str]]:
    """Code and sentence for each thing that keeps an open task where it is, or that ended it."""
    if task["status"] in FINAL:
        return [(task["reason"] or task["status"], f"it ended {task['status']}" + (f": {task['error']}" if task["error"] else ""))]
    if (task["status"], task["reason"]) == ("blocked", "waiting_consent"):
        return consent_reasons(store, task, now)
    if task["status"] == "blocked":
        return [("waiting_dependency", f"it waits for the intent {row['intent_id']} ({row['status']})") for row in store.all(NEEDS, id=task["task_id"])]
    if task["status"] in ("assigned", "running"):
        return active_reasons(store, task)
    handler = store.one(GET_HANDLER, name=task["handler"])
    if handler is None:
        return [("no_handler", f"there is no handler {task['handler']!r}")]
    found = []
    if task["available_at"] is not None and task["available_at"] > now:
        found.append((task["reason"] or "scheduled", f"it is not to start before {format_instant(task['available_at'])}"))
    if handler["paused"]:
        found.append(("handler_paused", f"its handler {handler['name']} is paused"))
    if handler["external"]:
        found.append(("external", f"no external worker has claimed it from {handler['name']}"))
    elif not any(row["kind"] == "daemon" and is_alive(row) for row in store.all(LIVE_WORKERS)):
        found.append(("no_daemon", "no daemon runs"))
    if handler["concurrency"] is not None and store.value(OPEN_ATTEMPTS_OF_HANDLER, name=handler["name"]) >= handler["concurrency"]:
        found.append(("concurrency", f"all {handler['concurrency']} places of {handler['name']} are taken"))
    if task["retry_of"] and store.one(OPEN_ATTEMPT, id=task["retry_of"]):
        found.append(("original_ending", f"the task it replaces, {task['retry_of']}, is still being ended"))
    if found:
        return found
    ahead = store.value(AHEAD_OF, name=task["handler"], rank=task["rank"], order_at=task["order_at"], seq=task["seq"], n=COUNTED_AHEAD)
    more = "more than " if ahead == COUNTED_AHEAD else ""
    first = f"{more}{counted(ahead, 'task')} of its handler {'is' if ahead == 1 else 'are'} ahead of it" if ahead else "it is the first of its handler"
    return [("queued", f"{first}; it waits for a free worker")]


def active_reasons(store: Store, task: Row) -> list[tuple[str, str]]:
    """Who has an active task; and that nobody runs it any more, when that worker has died."""
    found = [(task["status"], f"it is {task['status']} on {task['assigned_worker']}")]
    worker = store.one(GET_WORKER, worker=task["assigned_worker"])
    if worker is None or is_alive(worker):
        return found
    found = [("worker_died", f"{task['assigned_worker']}, which had it {task['status']}, is dead; the next daemon ends what is left of its processes "
              "and puts it back, unless it was lost too often")]  # fmt: skip
    if not any(row["kind"] == "daemon" and is_alive(row) for row in store.all(LIVE_WORKERS)):
        found.append(("no_daemon", "no daemon runs"))
    return found


def consent_reasons(store: Store, task: Row, now: int) -> list[tuple[str, str]]:
    """For each secret that a parked task needs, what it waits for."""
    handler, consents = store.one(GET_HANDLER, name=task["handler"]) or HANDLER_DEFAULTS, store.all(CONSENTS_OF_TASK, id=task["task_id"])
    found = []
    for key, action in wishes_of(json.loads(handler["secrets"])):
        state, row = wish_state(consents, key, action, now)
        text = {"ready": "it has consent", "missing": "it has not asked yet for consent", "refused": "it was refused consent"}.get(state)
        if state == "waiting" and row is not None:
            text = f"it waits for consent {row['consent_id']}"
        found.append(("waiting_consent", f"{text} to use {key} ({action})"))
    if handler["paused"]:
        found.append(("handler_paused", f"its handler {handler['name']} is paused"))
    if not any(row["kind"] == "daemon" and is_alive(row) for row in store.all(LIVE_WORKERS)):
        found.append(("no_daemon", "no daemon runs"))
    return found


def consents_of_task(reader: Reader, task_id: str) -> list[Row]:
    """What was asked for a task of a daemon, in order."""
    names = ("consent_id", "secret_key", "consent_status")
    return [{**{name: row[name] for name in names}, "requested_action": row["action"]} for row in reader.all(CONSENTS_OF_TASK, id=task_id)]


def story_line(event: Row) -> str:
    """One event of a task for people."""
    payload, topic = event["payload"], event["topic"]
    if not topic.startswith("htm."):
        return str(topic)
    if topic == "htm.sla.forecast":
        return f"forecast: {payload['message']}"
    if topic.startswith("htm.sla.") and "level" not in payload:
        return str(payload.get("message", topic))
    if topic.startswith("htm.sla."):
        return f"{payload['level']}: {payload['message']}" + (" (noticed late)" if payload["late"] else "")
    if topic == "htm.task.created":
        return f"created, {payload['status']}, priority {payload['priority']}"
    if "previous_priority" in payload:
        return f"priority {payload['previous_priority']} → {payload['priority']} ({payload['reason']})"
    if "previous_status" in payload:
        over = payload["reason"] == "backoff" if payload["status"] == "queued" else payload["status"] in FINAL and payload["reason"] != "cancelled"
        notes = [payload["reason"], payload["error"] if over else None, payload["assigned_worker"] if payload["status"] in ("assigned", "running") else None]
        return f"{payload['previous_status']} → {payload['status']}" + "".join(f", {note}" for note in notes if note)
    return str(topic)


# =====================================================================================================================
# command line
# A command parses, opens the store, calls one function, shows the result. Commands are declared as plain records and
# made into click's objects only when they are called, since making all of them would cost more than most commands do.
# main() is the only place where exceptions become exit codes.

Parameter = Callable[[], click.Parameter]
COMMANDS: dict[str, dict[str, tuple[Callable[..., int | None], tuple[Parameter, ...]]]] = {"": {}}
HELPERS: dict[str, tuple[Callable[..., int | None], tuple[Parameter, ...]]] = {}  # what grace starts for itself; in no list
GROUPS: dict[str, str] = {}


class Checked(click.ParamType):  # type: ignore[type-arg]
    """A value from text by a function of ours; its ValueError becomes the usage error."""

    def __init__(self, name: str, parse: Callable[[str], Any]):
        self.name, self.parse = name, parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self.parse(value)
        except ValueError as error:
            raise UsageError(f"{label_of(param)}: {error}", usage_hint(ctx)) from None


def label_of(param: click.Parameter | None) -> str:
    if param is None:
        return "value"
    return param.opts[0] if isinstance(param, click.Option) else (param.metavar or param.name or "").rstrip("…").upper()


def usage_hint(ctx: click.Context | None) -> str:
    return f"see: {ctx.command_path} --help" if ctx else "see: grace --help"


def named(what: str, text: str) -> str:
    if not NAME.fullmatch(text):
        raise ValueError(f"{text[:60]!r} is no name for {what}: 1 to 64 of A–Z a–z 0–9 _ . -")
    return text


def whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,12}", text) or not low <= int(text) <= high:
            raise ValueError(f"{text[:40]!r} is not a whole number from {low} to {high}")
        return int(text)

    return parse


def fraction(low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        if not re.fullmatch(r"[0-9]{0,6}(\.[0-9]{1,9})?", text) or text in ("", ".") or not low <= float(text) <= high:
            raise ValueError(f"{text[:40]!r} is not a number from {low:g} to {high:g}")
        return float(text)

    return parse


def quantity(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,15}(\.[0-9]{1,6})?", text):
        raise ValueError(f"{text[:40]!r} is not a number such as 3 or 2.5")
    return float(text)


def one_of(words: Iterable[str]) -> Callable[[str], str]:
    words = tuple(words)

    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(f"{text[:40]!r} is not one of {', '.join(words)}")
        return text

    return parse


def text_of(what: str, longest: int) -> Callable[[str], str]:
    return lambda text: check_text(text, what, longest)


def parse_object(text: str) -> str:
    """A context's compact text from JSON, @FILE or - for stdin; it must be an object."""
    value = parse_json(read_argument(text, MAX_JSON))
    if not isinstance(value, dict):
        raise ValueError("must be a JSON object such as '{\"folder\": \"/srv/in\"}'")
    return to_json(value)


def parse_result(text: str) -> Any:
    return parse_json(read_argument(text, MAX_JSON))


def read_argument(text: str, longest: int) -> str:
    """The text itself, or what @FILE or - (stdin) holds."""
    if text != "-" and not text.startswith("@"):
        return text
    try:
        with open(0 if text == "-" else text[1:], "rb", closefd=text != "-") as file:
            data = file.read(longest + 1)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {'stdin' if text == '-' else repr(printable(text[1:]))}: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > longest:
        raise ValueError(f"larger than {longest >> 20} MiB")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ValueError("is not valid UTF-8 text") from None


def parse_workers(text: str) -> int:
    if ".." in text:
        raise ValueError("a range of workers is not available yet; write one number")
    return whole(1, 256)(text)


def own_topic(text: str) -> str:
    if not TOPIC.fullmatch(text) or len(text) > 128:
        raise ValueError(f"{text[:60]!r} is no topic: words of a–z 0–9 _ - joined by dots, such as backup.done")
    if text.startswith(OWN_TOPICS):
        raise ValueError(f"{text!r} is a topic of grace's own; choose another first word")
    return text


def glob_of(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9_.*?-]{1,128}", text):
        raise ValueError(f"{text[:60]!r} is no topic pattern; write something like htm.sla.*")
    return text


def parse_since(text: str) -> tuple[str, int]:
    """('event', seq), ('at', instant) or ('ago', duration)."""
    if EVENT_ID.fullmatch(text):
        return "event", int(text[4:])
    if INSTANT.fullmatch(text):
        return "at", parse_instant(text)
    if DURATION.fullmatch(text):
        return "ago", parse_duration(text)
    raise ValueError(f"{text[:40]!r} is neither an event's id (evt_…), an instant (2026-11-22T07:08:19Z) nor a duration (2h)")


def instant_since(value: tuple[str, int] | None, now: int) -> int:
    """The instant that --since means where only times make sense."""
    if value is None:
        return 0
    if value[0] == "event":
        raise UsageError("--since: an event's id means nothing here", "write an instant or a duration, such as 2h")
    return value[1] if value[0] == "at" else now - value[1]


def parse_variable(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or name.startswith("GRACE_"):
        raise ValueError(f"{text[:60]!r} is not NAME=VALUE (names beginning with GRACE_ are grace's own)")
    return name, check_text(value or " ", "the value", 100_000) if value else ""


DURATION_TYPE = Checked("duration", parse_duration)
CONVERTERS: dict[str, Checked] = {
    "duration": DURATION_TYPE,
    "sla": Checked("duration|auto", lambda text: text if text == "auto" else parse_duration(text)),
    "instant": Checked("instant", parse_instant),
    "name": Checked("name", lambda text: named("this", text)),
    "id": Checked("id", text_of("an id", 128)),
    "own_id": Checked("id", lambda text: text if OWN_ID.fullmatch(text) else _refuse(f"{text[:60]!r} is no id: 1 to 128 of A–Z a–z 0–9 _ . : -")),
    "key": Checked("key", text_of("a key", 200)),
    "goal": Checked("text", text_of("a goal", 2000)),
    "outcome": Checked("text", text_of("an expected outcome", 2000)),
    "person": Checked("name", text_of("a creator", 128)),
    "worker": Checked("id", text_of("a worker's id", 128)),
    "note": Checked("text", text_of("a note", 2000)),
    "error": Checked("text", text_of("an error", 10_000)),
    "object": Checked("json", parse_object),
    "json": Checked("json", parse_result),
    "priority": Checked("priority", one_of(PRIORITIES)),
    "risk": Checked("risk", one_of(RISK_LEVELS)),
    "unit": Checked("number", fraction(0, 1)),
    "attempts": Checked("number", whole(1, 1000)),
    "limit": Checked("number", whole(1, 1_000_000)),
    "since": Checked("since", parse_since),
}


def _refuse(message: str) -> str:
    raise ValueError(message)


def opt(*names: str, kind: str | Checked | None = None, **settings: Any) -> Parameter:
    """An option, made when its command is called. `kind` names a converter."""
    checked = CONVERTERS[kind] if isinstance(kind, str) else kind
    return lambda: click.Option(names, type=checked, **settings)


def arg(name: str, kind: str | Checked | None = None, **settings: Any) -> Parameter:
    checked = CONVERTERS[kind] if isinstance(kind, str) else kind
    return lambda: click.Argument([name], type=checked, **settings)


def command(path: str, *parameters: Parameter) -> Callable[[Callable[..., int | None]], Callable[..., int | None]]:
    """Declare `grace PATH`; the function gets the App and the parameters, and returns an exit status or None for 0."""

    def declare(fn: Callable[..., int | None]) -> Callable[..., int | None]:
        group, _, name = path.rpartition(" ")
        COMMANDS.setdefault(group, {})[name] = (fn, parameters)
        return fn

    return declare


def helper(name: str, *parameters: Parameter) -> Callable[[Callable[..., int | None]], Callable[..., int | None]]:
    """Declare a command that only grace itself starts."""

    def declare(fn: Callable[..., int | None]) -> Callable[..., int | None]:
        HELPERS[name] = (fn, parameters)
        return fn

    return declare


class App:
    """What a command needs of its surroundings: the database's path, the format, the store."""

    def __init__(self, asked_for_json: bool = False) -> None:
        self.path, self.json, self.asked_for_json = "", False, asked_for_json

    def store(self) -> Store:
        return Store(self.path or default_path(), f"cli:{login_name()}")

    def show(self, document: Any, plain: Callable[[], None]) -> None:
        """One document for programs, or plain lines for people."""
        if self.json:
            write_json(document)
        else:
            plain()


def default_path() -> str:
    if path := os.environ.get("GRACE_DB"):
        return path
    base = os.environ.get("XDG_STATE_HOME") or os.path.join(os.path.expanduser("~"), ".local", "state")
    return os.path.join(base, "grace", "grace.db")


def login_name() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def set_json(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        ctx.ensure_object(App).json = True


def show_help(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        text = ctx.get_help()
        if ctx.ensure_object(App).asked_for_json:
            write_json({"help": text})
        else:
            write_out(text)
        ctx.exit(0)


def common_options() -> list[click.Parameter]:
    return [click.Option(["--json"], is_flag=True, is_eager=True, expose_value=False, callback=set_json, help="One JSON document on stdout."),
            click.Option(["-h", "--help"], is_flag=True, is_eager=True, expose_value=False, callback=show_help, help="Show this text.")]  # fmt: skip


def build_command(name: str, fn: Callable[..., int | None], parameters: tuple[Parameter, ...]) -> click.Command:
    made = [parameter() for parameter in parameters]

    def call(**values: Any) -> int | None:
        return fn(click.get_current_context().ensure_object(App), **values)

    return click.Command(name, callback=call, params=[*made, *common_options()], help=fn.__doc__, add_help_option=False)


class LazyGroup(click.Group):
    """A group whose commands are made from their declarations when they are asked for."""

    def __init__(self, path: str, **settings: Any):
        super().__init__(path.rpartition(" ")[2] or "grace", add_help_option=False, **settings)
        self.path = path
        self.params += common_options()

    def list_commands(self, ctx: click.Context) -> list[str]:
        groups = (name.rpartition(" ") for name in GROUPS)
        return sorted({name for name in (*COMMANDS[self.path], *(name for above, _, name in groups if above == self.path)) if name})

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        path = f"{self.path} {name}".strip()
        if name and path in GROUPS:
            fn, parameters = COMMANDS[path].get("", (None, ()))
            if fn is None:
                return LazyGroup(path, help=GROUPS[path], no_args_is_help=False)
            main_command = build_command(name, fn, parameters)
            return LazyGroup(path, help=GROUPS[path], params=main_command.params[:-2], callback=unless_sub(main_command.callback), invoke_without_command=True)
        declared = (COMMANDS[self.path].get(name) or (None if self.path else HELPERS.get(name))) if name else None
        return build_command(name, *declared) if declared else None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], self.list_commands(ctx), 3, 0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else usage_hint(ctx)
            raise UsageError(f"there is no command {' '.join([ctx.command_path, args[0][:60]])!r}", hint)
        return super().resolve_command(ctx, args)


def unless_sub(callback: Any) -> Callable[..., int | None]:
    """The group's own command, when no subcommand was named."""

    def call(**values: Any) -> int | None:
        return None if click.get_current_context().invoked_subcommand else callback(**values)

    return call


def root(db: str | None, version: bool) -> int | None:
    app = click.get_current_context().ensure_object(App)
    app.path = db or ""
    if db == "":
        raise UsageError("--db: the path is empty", "leave the option out for the default database")
    if version:
        app.show({"version": __version__}, lambda: write_out(f"grace {__version__}"))
        click.get_current_context().exit(0)
    if click.get_current_context().invoked_subcommand is None:
        if app.json:
            raise UsageError("no command was given", "see: grace --help")
        write_out(click.get_current_context().get_help())
    return None


def root_group() -> LazyGroup:
    return LazyGroup("", help=ROOT_HELP, callback=root, invoke_without_command=True, params=[
        click.Option(["--db"], metavar="PATH", help="The database [default: $GRACE_DB, else ~/.local/state/grace/grace.db]."),
        click.Option(["--version"], is_flag=True, help="Show the version.")])  # fmt: skip


ROOT_HELP = """Intents with deadlines: run them, warn, escalate, rescue, remember.

A first use: `grace handler add NAME -- CMD`, `grace submit-intent "GOAL" --handler NAME --sla 5m`, `grace daemon --once`.
`grace demo` shows all of it on a throw-away database."""
GROUPS.update({
    "approver": "Who may approve the use of secrets.",
    "audit": "The chained record of what happened to the vault.",
    "config": "The settings, each with a default and a sentence.",
    "consent": "Requests to use secrets, and the answers.",
    "consent template": "Pre-approvals for named secrets, signed and limited.",
    "credential": "Secrets for programs that ask in a protocol of their own.",
    "dashboard": "How things are: figures, what is late or slow, each hour, and whether all is well.",
    "events": "The event bus: what happened, in order.",
    "handler": "The commands that do the work, by name.",
    "intent": "Goals and how they went.",
    "learn": "What came of the work, how long it takes, and which SLA it should have.",
    "policy": "The rules of governance: what is denied, or takes more than the risk asks for.",
    "secret": "Sealed values, and asking for them.",
    "sla": "The ladder's thresholds, tried on what has happened.",
    "task": "The units of work behind intents, and the protocol for workers that are not grace.",
})  # fmt: skip

SUBMIT_OPTIONS = (
    opt("--domain", kind=Checked("name", lambda text: named("a domain", text)), default="general", show_default=True, help="What the goal belongs to."),
    opt("--sla", "sla_ms", kind="sla", help="The deadline, from now, such as 30s or 2h; auto: what earlier runs ask for [default: the handler's]."),
    opt("--priority", kind="priority", default="normal", show_default=True, help="critical, high, normal or low."),
    opt("--context", kind="object", default="{}", metavar="JSON", help="An object for the handler: JSON, @FILE, or - for stdin."),
    opt("--expected-outcome", kind="outcome", help="What should be true afterwards."),
    opt("--confidence", kind="unit", metavar="0..1", help="How sure the submitter is that it will work."),
    opt("--risk-level", kind="risk", help="low, medium, high or critical."),
    opt("--created-by", kind="person", help="Who submits [default: the login name]."),
    opt("--intent-id", kind="own_id", help="An id of your own."),
    opt("--key", kind="key", help="The same key again returns the first intent and changes nothing."),
    opt("--max-attempts", kind="attempts", help="How often it is tried [default: the handler's]."),
    opt("--timeout", "timeout_ms", kind="duration", help="End an attempt after this long [default: the handler's]."),
)
LIST_OPTIONS = (
    opt("--status", multiple=True, help="Only these (repeatable)."),
    opt("--domain", kind="name", help="Only this domain."),
    opt("--since", kind="since", help="Only those created since then: an instant or a duration such as 2h."),
    opt("--limit", kind="limit", default=50, show_default=True, help="At most so many."),
)


# ---- submitting


@command("submit-intent", arg("goal", "goal", required=False), opt("--handler", kind="name", help="Who does it [default: the handler named like the domain]."),
         *SUBMIT_OPTIONS, opt("--at", kind="instant", help="Start then, not before (RFC 3339 with an offset)."),
         opt("--in", "in_ms", kind="duration", help="Start after this long."),
         opt("--after", kind="id", multiple=True, metavar="INTENT", help="Start when that intent has completed (repeatable)."),
         opt("--batch", metavar="FILE", help="One JSON object a line, all or none; - for stdin."),
         opt("--wait", is_flag=True, help="Wait for the end: 0 completed, 1 not."),
         opt("--wait-timeout", kind="duration", help="Wait at most so long (exit 6)."))  # fmt: skip
def submit_command(app: App, goal: str | None, batch: str | None, wait: bool, wait_timeout: int | None, **options: Any) -> int | None:
    """Record GOAL as an intent, with its task, and print both ids."""
    if (goal is None) == (batch is None):
        raise UsageError("write a GOAL, or --batch FILE", 'such as: grace submit-intent "Back up the shop" --handler backup --sla 1h')
    if wait_timeout is not None and not wait:
        raise UsageError("--wait-timeout goes with --wait")
    if batch is not None:
        return submit_batch(app, batch, wait)
    store = app.store()
    if options["sla_ms"] == "auto":
        (settled,) = settle_auto(store, [spec_of(goal, options, clock())], clock())
        options.update(sla_ms=settled["sla_ms"], sla_basis=settled.get("sla_basis"))
    done = store.write(lambda tx: submit(tx, [spec_of(goal, options, tx.now)]))[0]
    warning = done.pop("warning", None)
    if warning and not app.json:
        sys.stderr.write(f"grace: {printable(warning)}\n")
    if wait:
        return show_waited(app, store, [done["intent_id"]], wait_timeout, {"duplicate": done["duplicate"]})
    app.show({**done, **submission_forecast(None, None), **done},
             lambda: write_out(f"{done['intent_id']}  {done['task_id']}" + submission_note(done)))  # fmt: skip
    return None


def submission_note(done: Row) -> str:
    """What people are told of a submission besides its ids."""
    if done["duplicate"]:
        return "  (submitted before)"
    basis = done.get("sla_basis")
    return f"  (SLA {format_duration(basis['sla_ms'])}, from {basis['runs']} runs)" if basis else ""


def spec_of(goal: str | None, options: Row, now: int) -> Row:
    """What submit() takes, from the command's options."""
    if options.get("at") is not None and options.get("in_ms") is not None:
        raise UsageError("--at and --in exclude each other")
    spec = {key: value for key, value in options.items() if key in (*SPEC_DEFAULTS, "sla_basis") and value is not None}
    if options.get("in_ms") is not None:
        spec["at"] = now + options["in_ms"]
    return {**spec, "goal": goal, "created_by": options.get("created_by") or login_name()}


BATCH_KEYS: dict[str, tuple[str, str]] = {  # the key in a line -> (the spec's key, its converter)
    "goal": ("goal", "goal"), "handler": ("handler", "name"), "domain": ("domain", "name"), "sla": ("sla_ms", "sla"),
    "priority": ("priority", "priority"), "expected_outcome": ("expected_outcome", "outcome"), "risk_level": ("risk_level", "risk"),
    "created_by": ("created_by", "person"), "intent_id": ("intent_id", "own_id"), "key": ("key", "key"), "at": ("at", "instant"),
    "in": ("in_ms", "duration"), "timeout": ("timeout_ms", "duration"),
}  # fmt: skip


def submit_batch(app: App, source: str, wait: bool) -> int | None:
    if wait:
        raise UsageError("--wait does not go with --batch", "wait for the printed ids: grace intent wait ID…")
    gc.disable()  # a hundred thousand small objects that are all needed to the end: looking for garbage costs a tenth
    creator = login_name()
    specs = list(batch_specs(batch_lines(source), creator))
    store = app.store()
    if any(spec.get("sla_ms") == "auto" for spec in specs):
        specs = list(settle_auto(store, specs, clock()))

    def put(tx: Tx) -> list[Row]:
        for spec in specs:
            if "in_ms" in spec:
                spec["at"] = tx.now + spec.pop("in_ms")
        return submit(tx, specs)

    done = store.write(put)
    tell_misses(app, done)
    if done:  # in one piece: an unbuffered stdout would take a write for each line
        write_out("\n".join(map(json.dumps, done) if app.json else (f"{one['intent_id']}  {one['task_id']}" for one in done)))
    return None


def tell_misses(app: App, done: list[Row]) -> None:
    """Say to people how many lines are going to miss their SLA, and of the first why."""
    first = next((one for one in done if "warning" in one), None)
    if first is None:
        return
    warning, misses = first.pop("warning"), sum(bool(one["predicted_miss"]) for one in done)
    if not app.json:
        sys.stderr.write(f"grace: {misses} of {counted(len(done), 'line')} {'is' if misses == 1 else 'are'} going to miss the SLA; "
                         f"the first, {first['task_id']}, {printable(warning)}\n")  # fmt: skip


def batch_lines(source: str, what: str = "--batch", undone: str = "nothing was submitted") -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank. `what` names the file in errors, `undone` says that nothing has happened."""
    try:
        with open(0 if source == "-" else source, "rb", closefd=source != "-") as file:
            number = 0
            while line := file.readline(MAX_LINE + 1):
                number += 1
                if len(line) > MAX_LINE:
                    raise UsageError(f"{what}: line {number}: larger than 1 MiB", undone)
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark, as some editors leave it
                if line.strip():
                    yield number, line
    except (OSError, ValueError) as error:
        raise UsageError(f"{what}: cannot read {printable(source)}: {getattr(error, 'strerror', None) or error}") from None


def batch_specs(lines: Iterable[tuple[int, bytes]], creator: str) -> Iterator[Row]:
    for number, line in lines:
        try:
            yield {"created_by": creator, **batch_spec(line), "line": number}
        except (ValueError, UsageError) as error:
            raise UsageError(f"--batch: line {number}: {error}", "nothing was submitted") from None


def batch_spec(line: bytes) -> Row:
    try:
        values = parse_json(line.decode())
    except UnicodeDecodeError:
        raise ValueError("is not valid UTF-8 text") from None
    if not isinstance(values, dict):
        raise ValueError("is not a JSON object")
    if "goal" not in values:
        raise ValueError("has no goal")
    if "at" in values and "in" in values:
        raise ValueError("at and in exclude each other")
    return dict(batch_value(key, value) for key, value in values.items())


@functools.lru_cache(4096)
def parsed(kind: str, text: str) -> Any:
    """What a converter makes of a text; the lines of a batch have most of theirs in common."""
    return CONVERTERS[kind].parse(text)


def batch_value(key: str, value: Any) -> tuple[str, Any]:
    """One entry of a line as submit() takes it; ValueError that names the key."""
    if key in BATCH_KEYS:
        name, kind = BATCH_KEYS[key]
        if not isinstance(value, str):
            raise ValueError(f"{key} is a text, such as \"30s\" or \"high\"")
        try:
            return name, parsed(kind, value)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    if key == "context" and isinstance(value, dict):
        return key, to_json(value)
    if key == "after" and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return key, value
    if key == "confidence" and isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1:
        return key, float(value)
    if key == "max_attempts" and isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 1000:
        return key, value
    if key in ("context", "after", "confidence", "max_attempts"):
        kinds = {"context": "an object", "after": "a list of intents' ids", "confidence": "a number from 0 to 1",
                 "max_attempts": "a whole number from 1 to 1000"}  # fmt: skip
        raise ValueError(f"{key} is {kinds[key]}")
    raise ValueError(f"the key {key[:60]!r} is unknown; there are {', '.join(sorted([*BATCH_KEYS, 'context', 'after', 'confidence', 'max_attempts']))}")


def parse_secret_use(text: str) -> tuple[str, str, str]:
    variable, _, rest = text.partition("=")
    key, _, action = rest.partition(":")
    if (
        not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable)
        or variable.startswith("GRACE_")
        or not re.fullmatch(SECRET_KEY, key)
        or not NAME.fullmatch(action or "use")
    ):
        raise ValueError(f"{text[:80]!r} is not ENV=KEY or ENV=KEY:ACTION")
    return variable, key, action or "use"


def secret_use(required: bool) -> Parameter:
    return opt("--secret", "secrets", kind=Checked("secret", parse_secret_use), multiple=True, required=required, metavar="ENV=KEY[:ACTION]",
               help="A secret for the command (repeatable).")  # fmt: skip


CONSENT_WAIT = 5 * MINUTE


def ask_spec(key: str, action: str, purpose: str, by: str | None, user: str | None, risk: str | None, context: str, timeout_ms: int, mode: str = "once",
             hidden: bool = False, task: str | None = None) -> Row:  # fmt: skip
    """What Asking takes, from the options of a command."""
    login = login_name()
    by = by or f"{program_name(os.getppid()).replace('handler:', 'handler_')}@{login}"[:128]  # a program may call itself anything
    return {"key": key, "action": action, "purpose": purpose, "by": by, "user": user, "risk": risk, "context": context, "timeout_ms": timeout_ms,
            "mode": mode, "hidden": hidden, "login": login, "reported": reported_facts(task)}  # fmt: skip


def requester(text: str) -> str:
    """Who asks, as --by names him; only a daemon asks in the name of a handler."""
    if text.strip().casefold().startswith("handler:"):
        raise ValueError("names beginning with handler: are for the tasks that a daemon asks for")
    return check_text(text, "a requester", 128)


@command("run", *SUBMIT_OPTIONS, opt("--goal", kind="goal", help="What it is for [default: the command itself]."),
         opt("--handler", hidden=True), opt("--template", hidden=True), opt("--batch", hidden=True), opt("--wait", is_flag=True, hidden=True),
         opt("--at", hidden=True), opt("--in", "in_", hidden=True), opt("--after", multiple=True, hidden=True),
         secret_use(False), opt("--by", kind=Checked("name", requester), help="Who asks for secrets [default: PROGRAM@LOGIN of the caller]."),
         arg("cmd", nargs=-1, required=True, metavar="CMD ARGS…"))  # fmt: skip
def run_command(app: App, cmd: tuple[str, ...], secrets: tuple[tuple[str, str, str], ...], by: str | None, goal: str | None, handler: Any, template: Any,
                batch: Any, wait: Any, at: Any, in_: Any, after: Any, **options: Any) -> int | None:  # fmt: skip
    """Run CMD here and now under an SLA of its own; ends with its exit status.

    A line for cron: grace run --sla 10m -- tar czf /backup/etc.tgz /etc"""
    refused = {"--handler": handler, "--template": template, "--batch": batch, "--wait": wait, "--at": at, "--in": in_, "--after": after}
    for name, value in refused.items():
        if value:
            raise UsageError(f"{name} does not go with run, which runs its command here and now", "use submit-intent for work in the background")
    text = goal or printable(" ".join(os.fsencode(word).decode(errors="backslashreplace") for word in cmd))[:2000].strip() or "command"
    try:
        wishes = [(name, ask_spec(key, action, text, by=by, user=None, risk=None, context="{}", timeout_ms=CONSENT_WAIT)) for name, key, action in secrets]
        softness = harden() if wishes else None
        store = app.store()
        vault = Vault(store) if wishes else None
        if softness:
            soften(softness)  # the command gets what we were given; our memory stays closed
        bury_runners(store)
        if app.json:
            kept = os.dup(1)
            os.dup2(2, 1)
        def tell(line: str) -> None:
            if not app.json:
                sys.stderr.write(line + "\n")

        (spec,) = settle_auto(store, [{**spec_of(text, options, 0), "command": True}], clock())
        done = Runner(store, spec, list(cmd), lambda message: report(GraceError(message), app.json), tell, wishes, vault).run()
    except GraceError as error:
        report(error, app.json)
        return 125
    if app.json:
        sys.stdout.flush()
        os.dup2(kept, 1)
    return show_run(app, done)


def show_run(app: App, done: Row) -> int:
    if done["duplicate"]:
        sys.stderr.write(f"grace: submitted before: {done['intent_id']}  {done['task_id']}\n")
        if app.json:
            write_json(done)
        return 0
    if app.json:
        write_json({**task_document(done, clock()), **done["foreseen"]})
    return int(done["command_status"])


# ---- intents


def filtered(store: Store, table: str, key: str, status: tuple[str, ...], known: tuple[str, ...], domain: str | None,
             since: tuple[str, int] | None, limit: int) -> list[Row]:  # fmt: skip
    """Rows of a table, newest first, by the options that lists share."""
    for word in status:
        if word not in known:
            raise UsageError(f"--status: {word[:40]!r} is not one of {', '.join(known)}")
    wanted = f",{','.join(status or known)},"
    return store.all(f"""SELECT * FROM {table} WHERE CAST(:wanted AS TEXT) LIKE '%,' || status || ',%'
      AND (CAST(:domain AS TEXT) IS NULL OR domain = :domain) AND created_at >= :since ORDER BY seq DESC LIMIT :n""",
                     wanted=wanted, domain=domain, since=instant_since(since, clock()), n=limit)  # fmt: skip


@command("intent list", *LIST_OPTIONS)
def intent_list(app: App, status: tuple[str, ...], domain: str | None, since: tuple[str, int] | None, limit: int) -> None:
    """Intents, newest first."""
    store = app.store()
    known = ("created", "dispatched", "executing", *FINAL)
    documents = [intent_document(row) for row in filtered(store, "intent_records", "intent_id", status, known, domain, since, limit)]
    app.show(documents, lambda: show_table(("INTENT", "STATUS", "PRIORITY", "DOMAIN", "GOAL"), [intent_cells(d) for d in documents], "no intents"))


@command("intent show", arg("id", "id"))
def intent_show(app: App, id: str) -> None:
    """All that is known of an intent."""
    store = app.store()
    bury_runners(store)
    document = intent_document(get_intent(store, find_id(store, "intent", id)))
    app.show(document, lambda: show_record(document))


@command("intent wait", arg("ids", "id", nargs=-1, required=True, metavar="ID…"), opt("--timeout", kind="duration", help="Wait at most so long (exit 6)."))
def intent_wait(app: App, ids: tuple[str, ...], timeout: int | None) -> int:
    """Wait until the intents have ended: 0 all completed, 1 one did not, 6 time is over."""
    store = app.store()
    full = [find_id(store, "intent", text) for text in ids]
    if len(full) == 1:
        return show_waited(app, store, full, timeout)
    rows = wait_for(store, full, timeout)
    documents = [intent_document(row) for row in rows]
    app.show(documents, lambda: show_table(("INTENT", "STATUS", "PRIORITY", "DOMAIN", "GOAL"), [intent_cells(d) for d in documents], "no intents"))
    return waited_status(rows)


def wait_for(store: Store, ids: list[str], timeout: int | None) -> list[Row]:
    """The intents' rows once all are final or the time is over."""
    deadline = time.monotonic() + timeout / 1000 if timeout is not None else float("inf")
    with contextlib.closing(Bell(store)) as bell:
        while True:
            bury_runners(store)
            rows = [get_intent(store, intent_id) for intent_id in ids]
            left = deadline - time.monotonic()
            if left <= 0 or all(row["status"] in FINAL for row in rows):
                return rows
            bell.wait(left)


def waited_status(rows: list[Row]) -> int:
    if any(row["status"] not in FINAL for row in rows):
        return WaitTimeoutError.exit_code
    return 0 if all(row["status"] == "completed" for row in rows) else 1


def show_waited(app: App, store: Store, ids: list[str], timeout: int | None, more: Row | None = None) -> int:
    rows = wait_for(store, ids, timeout)
    document = {**intent_document(rows[0]), "task_id": rows[0]["htm_task_id"], **(more or {})}
    app.show(document, lambda: write_out(f"{document['intent_id']}  {document['task_id']}  {document['status']}"))
    return waited_status(rows)


@command("intent cancel", arg("id", "id"))
def intent_cancel(app: App, id: str) -> None:
    """End an open intent and its task."""
    store = app.store()

    def work(tx: Tx) -> Row:
        intent = get_intent(tx, find_id(tx, "intent", id))
        if intent["status"] in FINAL:
            raise ConflictError(f"the intent {intent['intent_id']} has ended already ({intent['status']})")
        cancel(tx, get_task(tx, intent["htm_task_id"] or ""), cause=calling_rescue(tx, intent["htm_task_id"]))
        return get_intent(tx, intent["intent_id"])

    document = intent_document(store.write(work))
    app.show(document, lambda: write_out(f"{document['intent_id']}  {document['status']}"))


@command("intent retry", arg("id", "id"))
def intent_retry(app: App, id: str) -> None:
    """Run an intent again: a new task with a new SLA window."""
    store = app.store()

    def work(tx: Tx) -> Row:
        intent = get_intent(tx, find_id(tx, "intent", id))
        return retry(tx, get_task(tx, intent["htm_task_id"] or ""), calling_rescue(tx, intent["htm_task_id"]))

    document = task_document(store.write(work), clock())
    app.show(document, lambda: write_out(f"{document['intent_id']}  {document['task_id']}"))


def calling_rescue(reader: Reader, task_id: str | None) -> str | None:
    """The rescue in whose process this command runs, if it is this task's."""
    if task_id is None:
        return None
    return rescue_for(reader, task_id, None, os.environ.get("GRACE_ATTEMPT_ID") or "-", os.environ.get("GRACE_TASK_ID"))


# ---- tasks


@command("task list", *LIST_OPTIONS)
def task_list(app: App, status: tuple[str, ...], domain: str | None, since: tuple[str, int] | None, limit: int) -> None:
    """Tasks, newest first, rescues included."""
    store = app.store()
    bury_runners(store)
    now = clock()
    known = ("queued", "blocked", "assigned", "running", *FINAL)
    documents = [task_document(row, now) for row in filtered(store, "htm_tasks", "task_id", status, known, domain, since, limit)]
    app.show(documents, lambda: show_table(("TASK", "STATUS", "PRIORITY", "SLA", "GOAL"), [task_cells(d) for d in documents], "no tasks"))


@command("task show", arg("id", "id"))
def task_show(app: App, id: str) -> None:
    """All that is known of a task."""
    store = app.store()
    bury_runners(store)
    task = get_task(store, find_task_id(store, id))
    document = {**task_document(task, clock()), "consents": consents_of_task(store, task["task_id"])}
    app.show(document, lambda: show_record(document))


@command("task explain", arg("id", "id"))
def task_explain(app: App, id: str) -> None:
    """Why a task waits, what comes next, and its story."""
    store = app.store()
    bury_runners(store)
    document = explain_task(store, get_task(store, find_task_id(store, id)))

    def plain() -> None:
        write_out(f"{document['task_id']}  {document['status']}  {printable(document['goal'])}")
        for why in document["why"]:
            write_out(f"  because {printable(why['text'])}")
        for step in document["next_steps"]:
            write_out(f"  next    {step['due_at']}  {step['step']}")
        for line in predicted_lines(document["predicted"]):
            write_folded(f"  {printable(line)}", 4)
        for entry in document["story"]:
            write_out(f"  {entry['at']}  {printable(entry['text'])}")

    app.show(document, plain)


def predicted_lines(predicted: Row | None) -> Iterator[str]:
    """The forecast for people: when it starts and is done, or why nobody can say."""
    if predicted is None:
        return
    if predicted["start_at"] is None:
        yield f"no forecast: {predicted['text']}"
    else:
        basis = predicted["basis"]
        yield (f"foreseen  start {predicted['start_at']}, done {predicted['finish_at']}, nine of ten times by {predicted['finish_by_at']}")
        yield (f"because {counted(basis['runs'], 'run')} took {format_duration(basis['p50_ms'])} (one in twenty {format_duration(basis['p95_ms'])} or more), "
               f"{counted(basis['slots'], 'worker')}, {counted(basis['ahead'], 'task')} ahead")  # fmt: skip
    if predicted["summary"]:
        yield f"it {predicted['summary']}"
    elif predicted["advice"]:
        first = predicted["advice"][0]
        yield f"with {first['text']} it would be done {first['predicted_finish_at']}"


@command("task log", arg("id", "id"), opt("-f", "--follow", is_flag=True, help="Go on until the task has ended."),
         opt("--attempt", kind="attempts", help="All starts with this number [default: the last]."))  # fmt: skip
def task_log(app: App, id: str, follow: bool, attempt: int | None) -> None:
    """What a task's attempts wrote."""
    store = app.store()
    task_id = find_task_id(store, id)
    attempts = store.all(ATTEMPTS_OF, id=task_id)
    number = attempt if attempt is not None else attempts[-1]["attempt_number"] if attempts else None
    chosen = [row for row in attempts if row["attempt_number"] == number]
    if attempt is not None and not chosen:
        raise NotFoundError(f"the task {task_id} has no attempt {attempt}")
    if follow:
        follow_log(app, store, task_id, chosen)
    elif app.json:
        write_json({"task_id": task_id, "attempts": [{**attempt_document(row), "text": read_log(store, row).decode(errors="replace")} for row in chosen]})
    else:
        for row in chosen:
            write_log(read_log(store, row))


def read_log(store: Store, attempt: Row, start: int = 0) -> bytes:
    try:
        with open(attempt_path(store.path, attempt["attempt_id"], "log"), "rb") as file:
            file.seek(start)
            return file.read()
    except FileNotFoundError:
        return b""


ANSI_COLOUR = r"(\033\[[0-9;]*m)"


def write_log(data: bytes) -> None:
    """Raw when piped; on a terminal escaped, with colours, tabs and line ends kept."""
    if not on_terminal():
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    for line in data.decode(errors="replace").splitlines(keepends=True):
        body = line.rstrip("\r\n")
        parts = [part if number % 2 else "\t".join(map(printable, part.split("\t"))) for number, part in enumerate(re.split(ANSI_COLOUR, body))]
        sys.stdout.write("".join(parts) + ("\n" if line != body else ""))
    sys.stdout.flush()


def follow_log(app: App, store: Store, task_id: str, attempts: list[Row]) -> None:
    """Write what is there and what comes, over all further attempts, until the task is final."""
    seen: dict[str, int] = {}
    first = attempts[0]["created_at"] if attempts else 0
    while True:
        final = get_task(store, task_id)["status"] in FINAL and not store.one(OPEN_ATTEMPT, id=task_id)
        for row in [row for row in store.all(ATTEMPTS_OF, id=task_id) if row["created_at"] >= first]:
            data = read_log(store, row, seen.get(row["attempt_id"], 0))
            seen[row["attempt_id"]] = seen.get(row["attempt_id"], 0) + len(data)
            if data and app.json:
                write_json({"task_id": task_id, "attempt_id": row["attempt_id"], "attempt": row["attempt_number"], "text": data.decode(errors="replace")})
            elif data:
                write_log(data)
        sys.stdout.flush()
        if final:
            return
        time.sleep(0.5)


@command("task cancel", arg("id", "id"))
def task_cancel(app: App, id: str) -> None:
    """End an open task; its process is ended too."""
    change_task(app, lambda tx: cancel(tx, get_task(tx, task_id := find_id(tx, "task", id)), cause=calling_rescue(tx, task_id)))


@command("task retry", arg("id", "id"))
def task_retry(app: App, id: str) -> None:
    """A new task in place of this one, with a new SLA window."""
    change_task(app, lambda tx: retry(tx, get_task(tx, task_id := find_id(tx, "task", id)), calling_rescue(tx, task_id)))


@command("task priority", arg("id", "id"), arg("priority", "priority"))
def task_priority(app: App, id: str, priority: str) -> None:
    """Give an open task another priority: critical, high, normal or low. Its intent keeps the one that was asked for at submission.

    A task goes on to climb by its SLA or its age; it cannot be put below where its SLA has brought it."""
    task, changed = app.store().write(lambda tx: set_priority(tx, get_task(tx, find_task_id(tx, id)), priority))
    document = {**task_document(task, clock()), "changed": changed}
    app.show(document, lambda: write_out(f"{task['task_id']}  {task['status']}  {task['priority']}" + ("" if changed else "  (as it was)")))


def change_task(app: App, work: Callable[[Tx], Row]) -> None:
    """One transaction that ends in a task; show it."""
    document = task_document(app.store().write(work), clock())
    app.show(document, lambda: write_out(f"{document['task_id']}  {document['status']}"))


WORKER_OPTIONS = (
    opt("--worker", kind="worker", envvar="GRACE_WORKER", required=True, help="Your worker's id."),
    opt("--attempt-id", kind="id", envvar="GRACE_ATTEMPT_ID", help="Refuse unless this attempt still owns the task."),
)


@command("task claim", opt("--handler", kind="name", multiple=True, required=True, help="Whose tasks (repeatable)."),
         opt("--worker", kind="worker", required=True, help="Your worker's id."),
         opt("--lease", kind="duration", default=MINUTE, help="How long without a heartbeat [default: 60s]."),
         opt("--wait", kind="duration", help="Wait so long for a task."))  # fmt: skip
def task_claim(app: App, handler: tuple[str, ...], worker: str, lease: int, wait: int | None) -> int | None:
    """Take the next task of these handlers, for a worker that is not grace."""
    store = app.store()
    for name in handler:
        if find_handler(store, name)["secrets"] != "[]":
            raise UsageError(f"--handler: the tasks of {name!r} need secrets, which only a daemon hands over", "start one: grace daemon")
    bury_runners(store)
    task = store.write(lambda tx: claim_external(tx, handler, worker, lease))
    if task is None and wait is not None:
        task = wait_to_claim(store, handler, worker, lease, wait)
    if task is None:
        app.show(None, lambda: write_out("nothing to claim"))
        return WaitTimeoutError.exit_code
    document = {**task_document(task, clock()), "attempt_id": task["attempt_id"], "lease_expires_at": format_instant(task["lease_expires_at"])}
    if task["task_type"] == "rescue":
        document["payload"]["context"].update(stuck_facts(store, task["parent_task_id"]))
    app.show(document, lambda: show_record(document))
    return None


def wait_to_claim(store: Store, handlers: tuple[str, ...], worker: str, lease: int, wait: int) -> Row | None:
    deadline = time.monotonic() + wait / 1000
    with contextlib.closing(Bell(store)) as bell:
        while True:
            task: Row | None = store.write(lambda tx: claim_external(tx, handlers, worker, lease), durable=True, knock=False)
            left = deadline - time.monotonic()
            if task is not None or left <= 0:
                return task
            due = next_instant(store)
            bell.wait(min(left, max(0.001, (due - clock()) / 1000)) if due is not None else left)


@command("task heartbeat", arg("id", "id"), *WORKER_OPTIONS)
def task_heartbeat(app: App, id: str, worker: str, attempt_id: str | None) -> None:
    """Renew the lease of a claimed task."""
    store = app.store()

    def work(tx: Tx) -> Row:
        task_id = find_id(tx, "task", id)
        return {"task_id": task_id, "lease_expires_at": format_instant(heartbeat(tx, task_id, worker, attempt_id))}

    document = store.write(work, durable=False, knock=False)
    app.show(document, lambda: write_out(f"{document['task_id']}  lease until {document['lease_expires_at'] or '-'}"))


@command("task progress", arg("id", "id"), arg("done", Checked("number", quantity)), arg("total", Checked("number", quantity)),
         opt("--note", kind="note", help="What it is doing."), opt("--worker", kind="worker", envvar="GRACE_WORKER", help="Your worker's id."),
         opt("--attempt-id", kind="id", envvar="GRACE_ATTEMPT_ID", help="Refuse unless this attempt still owns the task."))  # fmt: skip
def task_progress(app: App, id: str, done: float, total: float, note: str | None, worker: str | None, attempt_id: str | None) -> None:
    """Say how far a running task has come: DONE of TOTAL."""
    if done > total:
        raise UsageError("DONE is larger than TOTAL")

    def work(tx: Tx) -> Row:
        task_id = find_id(tx, "task", id)
        progress(tx, task_id, worker, attempt_id, done, total, note)
        return get_task(tx, task_id)

    document = task_document(app.store().write(work, durable=False), clock())
    app.show(document, lambda: write_out(f"{document['task_id']}  {done:g} of {total:g}"))


@command("task complete", arg("id", "id"), *WORKER_OPTIONS, opt("--result", kind="json", metavar="JSON", help="JSON, @FILE, or - for stdin."))
def task_complete(app: App, id: str, worker: str, attempt_id: str | None, result: Any) -> None:
    """A claimed task is done."""
    end_by_command(app, id, worker, attempt_id, {"outcome": "completed", "result": result})


@command("task fail", arg("id", "id"), *WORKER_OPTIONS, opt("--error", kind="error", required=True, help="What went wrong."),
         opt("--no-retry", is_flag=True, help="Do not try again."))  # fmt: skip
def task_fail(app: App, id: str, worker: str, attempt_id: str | None, error: str, no_retry: bool) -> None:
    """An attempt at a claimed task has failed."""
    end_by_command(app, id, worker, attempt_id, {"outcome": "failed", "error": error, "retry": not no_retry})


def end_by_command(app: App, text: str, worker: str, attempt_id: str | None, ending: Row) -> None:
    def work(tx: Tx) -> Row:
        task_id = find_id(tx, "task", text)
        tx.actor = f"worker:{worker}"
        return complete_by_command(tx, task_id, worker, attempt_id, os.environ.get("GRACE_TASK_ID"), ending)

    change_task(app, work)


# ---- handlers


@command("handler add", arg("name", Checked("name", lambda text: named("a handler", text))), arg("cmd", nargs=-1, metavar="[-- CMD ARGS…]"),
         opt("--sla", "sla_ms", kind="duration", help="The deadline of its tasks where none is given."),
         opt("--timeout", "timeout_ms", kind="duration", help="End an attempt after this long."),
         opt("--kill-after", "kill_after_ms", kind="duration", default=10 * SECOND, help="From TERM to KILL [default: 10s]."),
         opt("--max-attempts", kind="attempts", default=3, show_default=True, help="How often a task is tried."),
         opt("--max-recoveries", kind=Checked("number", whole(0, 1000)), default=5, show_default=True, help="How often it is put back after its worker died."),
         opt("--backoff", "backoff_ms", kind="duration", default=5 * SECOND, help="Pause before the second attempt, doubling [default: 5s]."),
         opt("--concurrency", kind=Checked("number", whole(1, 10_000)), help="How many of its tasks may run at once."),
         opt("--rescue", kind="name", help="The handler that rescues its stuck tasks [default: built in]."),
         opt("--warn-at", kind=Checked("ratio", fraction(0.01, 1)), default=0.8, show_default=True, help="Warning at this part of the SLA."),
         opt("--critical-at", kind=Checked("ratio", fraction(1, 1000)), default=2.0, show_default=True, help="Rescue at this part of the SLA."),
         opt("--on-critical", kind=Checked("word", one_of(("rescue", "retry", "none"))), default="rescue", show_default=True, help="rescue, retry or none."),
         opt("--cwd", help="Where it runs [default: here]."),
         opt("--env", kind=Checked("K=V", parse_variable), multiple=True, help="A variable for it (repeatable)."),
         secret_use(False),
         opt("--external", is_flag=True, help="No command: other programs claim its tasks."),
         opt("--replace", is_flag=True, help="Change one that exists."))  # fmt: skip
def handler_add(app: App, name: str, cmd: tuple[str, ...], external: bool, replace: bool, cwd: str | None, env: tuple[tuple[str, str], ...],
                secrets: tuple[tuple[str, str, str], ...], **options: Any) -> None:  # fmt: skip
    """Name a command that does work, or with --external a queue for other programs.

    An argument that is exactly {goal}, {task_id} or {context.KEY} is replaced by the task's own. Its tasks wait for consent to use its secrets."""
    if external == bool(cmd):
        raise UsageError("write the command after --, or --external", f"such as: grace handler add {name} --sla 5m -- /usr/local/bin/work {{context.folder}}")
    if name in ("command", "rescue"):
        raise UsageError(f"{name!r} is what grace itself calls a kind of task", "choose another name")
    if options["rescue"] == name:
        raise UsageError("--rescue: a handler cannot rescue itself, or its work would run twice at once")
    if options["warn_at"] >= options["critical_at"]:
        raise UsageError("--warn-at must lie below --critical-at")
    refuse_odd_secrets([variable for variable, _, _ in secrets], external, [variable for variable, _ in env])
    try:
        for word in cmd:
            check_text(word or " ", "an argument of the command", 100_000)
        folder = check_text(os.path.abspath(cwd or os.getcwd()), "--cwd", 4000)
    except (ValueError, OSError) as error:
        raise UsageError(f"CMD: {error}") from None
    if cwd and not os.path.isdir(folder):
        raise UsageError(f"--cwd: {cwd!r} is not a directory")
    row = {"name": name, "argv": to_json(list(cmd)) if cmd else None, "external": int(external), "cwd": folder, "env": to_json(dict(env)),
           "secrets": to_json(secrets), **options}  # fmt: skip
    change_handler(app, lambda tx: put_handler(tx, row, replace))


def refuse_odd_secrets(variables: list[str], external: bool, others: list[str]) -> None:
    """UsageError for secrets that nothing could hand over, or that would hide each other."""
    if variables and external:
        raise UsageError("--secret: a handler without a command can be given none", "let the program ask: grace exec --secret ENV=KEY -- CMD")
    if twice := next((name for number, name in enumerate(variables) if name in variables[:number] or name in others), None):
        raise UsageError(f"--secret: {twice} is given twice")


def change_handler(app: App, work: Callable[[Tx], Row]) -> None:
    document = handler_document(app.store().write(work))
    app.show(document, lambda: write_out(f"{document['name']}  " + ("external" if document["external"] else printable(" ".join(document["argv"])))
                                         + ("  paused" if document["paused"] else "")))  # fmt: skip


@command("handler list")
def handler_list(app: App) -> None:
    """All handlers."""
    store = app.store()
    documents = [handler_document(row) for row in store.all(LIST_HANDLERS)]
    rows = [(d["name"], format_duration(sla_in_force(d)) + (" (adapted)" if d["adapted_sla_ms"] else ""), "paused" if d["paused"] else "ready",
             " ".join(one["secret_key"] for one in d["secrets"]) or "-",
             "(external)" if d["external"] else printable(" ".join(d["argv"]))) for d in documents]  # fmt: skip
    app.show(documents, lambda: show_table(("HANDLER", "SLA", "STATE", "SECRETS", "COMMAND"), rows, "no handlers; make one: grace handler add NAME -- CMD"))


@command("handler show", arg("name", "name"))
def handler_show(app: App, name: str) -> None:
    """One handler with all its options."""
    document = handler_document(find_handler(app.store(), name))
    app.show(document, lambda: show_record(document))


@command("handler remove", arg("name", "name"))
def handler_remove(app: App, name: str) -> None:
    """Forget a handler that has no unfinished tasks."""
    change_handler(app, lambda tx: remove_handler(tx, name))


@command("handler pause", arg("name", "name"))
def handler_pause(app: App, name: str) -> None:
    """Start none of its tasks; their SLA clocks run on."""
    change_handler(app, lambda tx: pause_handler(tx, name, True))


@command("handler resume", arg("name", "name"))
def handler_resume(app: App, name: str) -> None:
    """Start its tasks again."""
    change_handler(app, lambda tx: pause_handler(tx, name, False))


# ---- daemon and what it shows


@command("daemon", opt("--workers", kind=Checked("number", parse_workers), metavar="N", help="Slots [default: the processors]."),
         opt("--handler", kind="name", multiple=True, help="Only these handlers (repeatable)."),
         opt("--grace-period", kind="duration", default=30 * SECOND, help="How long handlers may finish when it stops [default: 30s]."),
         opt("--stats-every", kind="duration", default=MINUTE, help="How often the figures become an event, when they have changed [default: 60s]."),
         opt("--once", is_flag=True, help="Run what is runnable now, then end."),
         opt("--drain", is_flag=True, help="Claim nothing, wait for what runs, then end."))  # fmt: skip
def daemon_command(app: App, workers: int | None, handler: tuple[str, ...], grace_period: int, stats_every: int, once: bool, drain: bool) -> None:
    """Run the queue: ladder, bridge, workers, rescues. TERM or Ctrl-C stops it in good order, HUP renews it in place."""
    if once and drain:
        raise UsageError("--once and --drain exclude each other")
    signal.pthread_sigmask(signal.SIG_BLOCK, STEERING)  # until the daemon listens
    store = app.store()
    for name in handler:
        find_handler(store, name)
    Daemon(store, workers or processors(), list(handler), grace_period, once, drain, say_json if app.json else say_plain, stats_every).run()


@helper("_ask", arg("handlers", "name", nargs=-1))
def ask_helper(app: App, handlers: tuple[str, ...]) -> int:
    """Ask for the secrets that parked tasks need: a process of its own, since the daemon holds no key and no value."""
    harden()
    store = app.store()
    store.actor = "asker"
    return ask_for_tasks(store, handlers, login_name())


@helper("_guard", arg("mark"))
def guard_helper(app: App, mark: str) -> int:
    """Run one attempt of a handler with secrets, as the daemon tells on a descriptor."""
    try:
        with os.fdopen(GUARD_JOB, "rb") as file:
            job = json.loads(file.read())
    except (OSError, ValueError):
        raise UsageError("only a daemon starts this") from None
    try:
        status = Guard(app.store(), job).run()
    except (GraceError, SpawnError) as error:
        report(GraceError(str(error)), False)  # one line, which becomes the attempt's error
        return error.exit_status if isinstance(error, SpawnError) else 125
    if status < 0:
        with contextlib.suppress(OSError):  # KILL and STOP have no handlers
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status if status >= 0 else 128 - status


def say_json(what: str, facts: Row) -> None:
    write_json({"at": format_instant(clock()), "what": what, **facts})
    sys.stdout.flush()


def say_plain(what: str, facts: Row) -> None:
    shown = "  ".join(f"{name}={printable(str(value))}" for name, value in facts.items() if value is not None and value is not False)
    write_out(f"{format_instant(clock())}  {what}  {shown}")
    sys.stdout.flush()


VIOLATION_OPTIONS = (
    opt("--level", kind=Checked("level", one_of(LEVELS[1:])), default="violated", show_default=True, help="This level and above."),
    opt("--all", "everything", is_flag=True, help="Finished tasks too."),
    opt("--limit", kind="limit", default=50, show_default=True, help="At most so many."),
)


@command("violations", *VIOLATION_OPTIONS)
def violations_command(app: App, level: str, everything: bool, limit: int) -> None:
    """Tasks that are past a threshold of their SLA."""
    documents = violation_documents(app.store(), level, everything, limit)
    app.show(documents, lambda: show_violations(documents))


def violation_documents(store: Store, level: str, everything: bool, limit: int) -> list[Row]:
    now = clock()
    return [violation_document(row, now) for row in store.all(VIOLATIONS, level=LEVELS.index(level), everything=int(everything), n=limit)]


def show_violations(documents: list[Row]) -> None:
    cells = [(d["task_id"], d["level"], d["status"], f"{format_duration(d['overdue_ms'])} (+{d['overdue_percent']:.0f}%)", d["task_type"]) for d in documents]
    show_table(("TASK", "LEVEL", "STATUS", "OVERDUE", "TYPE"), cells, "no violations")


VIOLATIONS = """SELECT * FROM violations WHERE escalation_level >= :level AND (:everything = 1 OR finished_at IS NULL)
  ORDER BY escalation_level DESC, sla_deadline, seq LIMIT :n"""


@command("status")
def status_command(app: App) -> None:
    """One screen: daemons, depths, violations, what is wrong."""
    store = app.store()
    bury_runners(store)
    document = status_document(store)
    app.show(document, lambda: show_status(document))


def show_status(document: Row) -> None:
    from tabulate import tabulate

    daemons = [row for row in document["workers"] if row["kind"] == "daemon"]
    rate = document["sla_compliance_rate"]
    left = [("daemon", ", ".join(f"{'alive' if row['alive'] else 'dead'} (pid {row['pid']}, {counted(row['slots'], 'slot')})" for row in daemons) or "none"),
            ("active", document["active_tasks"]),
            ("queued", f"{document['queued_tasks']}  ({', '.join(f'{name} {n}' for name, n in document['queue_depths'].items())})"),
            ("oldest queued", format_duration(document["longest_queued_ms"])), ("blocked", document["blocked_tasks"]),
            ("completed", document["completed_tasks"]), ("failed", document["failed_tasks"]), ("cancelled", document["cancelled_tasks"]),
            ("SLA met", "-" if rate is None else f"{100 * rate:.1f} %"),
            ("violations", f"{document['active_violations']} now, {document['total_violations']} ever"),
            ("rescues", f"{document['sub_agents_spawned']} spawned, {counted(document['tasks_rescued'], 'task')} completed after one"),
            ("recovered", document["tasks_recovered"]), ("consents waiting", document["pending_consents"])]  # fmt: skip
    write_out(tabulate(left, tablefmt="plain", disable_numparse=True))
    for problem in document["problems"]:
        write_out(f"! {printable(problem['message'])}\n  {printable(problem['hint'])}")


# ---- dashboard

WATCH = opt("--watch", kind="duration", is_flag=False, flag_value="2s", metavar="[DUR]", help="Again and again, every DUR [2s], until Ctrl-C.")
FASTEST_WATCH = 100  # ms


def show_dashboard(app: App, watch: int | None, look: Callable[[Store], Any], plain: Callable[[Any], None]) -> Any:
    """What `look` finds, once, or with --watch until told to stop; the last document. It only ever reads."""
    store = app.store()
    if watch is None:
        document = look(store)
        app.show(document, lambda: plain(document))
        return document
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):  # the way to end it, as in top(1)
        show_again_and_again(app, store, max(watch, FASTEST_WATCH), look, plain)
    return None


def show_again_and_again(app: App, store: Store, every: int, look: Callable[[Store], Any], plain: Callable[[Any], None]) -> None:
    screen = on_terminal() and not app.json
    if screen:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGWINCH])  # it ends the pause below
        sys.stdout.write("\n" * terminal_size().lines)  # what was on the screen stays above it
    opened = file_identity(store.path)
    while True:
        document = look(store)
        if file_identity(store.path) != opened:
            raise DatabaseError(f"{store.path} was deleted or replaced meanwhile", "start this command anew to see the one that is there now")
        if screen:
            redraw(plain, document, every)
        else:
            app.show(document, lambda: plain(document))  # noqa: B023 (called at once)
            sys.stdout.write("" if app.json else "\n")
        sys.stdout.flush()
        pause(every / 1000)


def file_identity(path: str) -> tuple[int, int] | None:
    """Which file a path leads to; None when there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def pause(seconds: float) -> None:
    """Wait so long, or until the terminal has another size."""
    if hasattr(signal, "sigtimedwait"):
        signal.sigtimedwait([signal.SIGWINCH], seconds)
    else:
        time.sleep(seconds)


def terminal_size() -> os.terminal_size:
    try:
        return os.get_terminal_size(sys.stdout.fileno())
    except OSError:
        return os.terminal_size((80, 24))


def redraw(plain: Callable[[Any], None], document: Any, every: int) -> None:
    """One frame, in one piece and without erasing first, so that nothing flickers; what does not fit is left out, and said."""
    import io

    terminal = sys.stdout
    frame = io.StringIO()
    frame.isatty, frame.fileno = terminal.isatty, terminal.fileno  # type: ignore[method-assign]
    with contextlib.redirect_stdout(frame):
        plain(document)
    lines, room = frame.getvalue().splitlines(), max(2, terminal_size().lines - 2)
    head = f"grace, every {format_duration(every)}: {format_instant(clock())}"
    if len(lines) > room:
        lines = [*lines[: room - 1], f"… {len(lines) - room + 1} more lines"]
    terminal.write("\033[H\033[?7l" + "".join(f"{line}\033[K\n" for line in [head, *lines]) + "\033[J\033[?7h")


PROMETHEUS_OPTIONS = (
    opt("--prometheus", is_flag=True, help="Metrics in Prometheus' text format."),
    opt("--output", metavar="FILE", help="With --prometheus: replace FILE by them, all at once; a pipe or a device is written to."),
)


@command("dashboard stats", opt("--window", kind="duration", default=DAY, help="Of averages and percentiles, in whole hours [default: 24h]."),
         WATCH, *PROMETHEUS_OPTIONS)  # fmt: skip
def dashboard_stats(app: App, window: int, watch: int | None, prometheus: bool, output: str | None) -> None:
    """All counters, and how long things take."""
    if output is not None and not prometheus:
        raise UsageError("--output: it is for metrics", "write: grace dashboard stats --prometheus --output FILE.prom")
    if not prometheus:
        show_dashboard(app, watch, lambda store: statistics_of(store, window), show_statistics)
        return
    if app.json:
        raise UsageError("--prometheus has a format of its own, so --json has no place beside it", "leave one of them out")
    if watch is not None and output is None:
        raise UsageError("--prometheus with --watch: one text after another is in no format", "add --output FILE.prom, which is replaced again and again")
    if output and not output.endswith(".prom"):
        sys.stderr.write("note: node exporter's textfile collector reads only names that end in .prom\n")

    def put(text: str) -> None:
        if output is None:
            sys.stdout.write(text)
        else:
            replace_file(output, text)

    show_dashboard(app, watch, lambda store: prometheus_text(store, window), put)


def replace_file(path: str, text: str) -> None:
    """Put a text in the place of a file, whole or not at all, readable for everybody."""
    beside = ""
    try:
        check_text(path, "--output", 4000)
        if os.path.isdir(path):
            raise ValueError(f"{path!r} is a directory")
        if is_special(path):
            append_whole(path, text)
            return
        path = os.path.realpath(path)
        beside = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{os.getpid()}-{os.urandom(4).hex()}")  # a name that no *.prom fits
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        kind = DatabaseError if full else UsageError
        raise kind(f"--output: cannot write {path[:200]!r}: {getattr(error, 'strerror', None) or error}", "free some space" if full else "") from None
    finally:
        with contextlib.suppress(OSError, ValueError):
            os.unlink(beside)


def is_special(path: str) -> bool:
    """Whether a path leads to a pipe, a device, or an open file by its number: written to, and never replaced."""
    try:
        return not stat.S_ISREG(os.stat(path).st_mode) or path.startswith(("/dev/fd/", "/dev/std", "/proc/"))
    except FileNotFoundError:
        return False


def append_whole(path: str, text: str) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_APPEND), "w", encoding="utf-8") as file:
        file.write(text)


def shown_rate(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.1f} %"


def show_statistics(d: Row) -> None:
    """The figures in a dozen lines, which fit 80 columns."""
    depths = ", ".join(f"{name} {n:,}" for name, n in d["queue_depths"].items())
    oldest = f"; the oldest for {format_duration(d['longest_queued_ms'])}" if d["longest_queued_ms"] is not None else ""
    spent = [format_duration(d[f"avg_{name}_ms"]) for name in ("queue_time", "execution_time", "total_time", "buffer")]
    runs = [format_duration(d[f"p{part}_execution_ms"]) for part in (50, 95, 99)]
    show_labelled([
        ("tasks", f"{d['total_tasks']:,} ever: {d['completed_tasks']:,} completed, {d['failed_tasks']:,} failed, {d['cancelled_tasks']:,} cancelled"),
        ("now", f"{d['active_tasks']:,} active, {d['queued_tasks']:,} queued, {d['blocked_tasks']:,} blocked"), ("queue", f"{depths}{oldest}"),
        ("workers", f"{d['active_workers']} alive" + (f", {d['busy_slots']} of {counted(d['worker_slots'], 'slot')} busy" if d["worker_slots"] else "")),
        ("SLA", f"{shown_rate(d['sla_compliance_rate'])} met ever, {many(d['active_violations'], 'violation')} now, {d['total_violations']:,} ever"),
        ("ladder", f"{d['warnings_issued']:,} warned, {d['escalations_triggered']:,} escalated, {many(d['sub_agents_spawned'], 'rescue')} "
                   f"({many(d['tasks_rescued'], 'task')} completed after one)"),
        ("moved", f"{d['queue_reprioritizations']:,} times forward, {d['tasks_recovered']:,} times back after a worker was lost"),
        ("", ""), ("window", f"since {d['window_since_at']}, {format_duration(d['window_ms'])} in whole hours"),
        ("ended", f"{d['window_completed']:,} completed, {d['window_failed']:,} failed, {d['window_cancelled']:,} cancelled "
                  f"({shown_rate(d['window_success_rate'])} success, SLA {shown_rate(d['window_sla_compliance_rate'])})"),
        ("average", f"waited {spent[0]}, ran {spent[1]}, took {spent[2]}, {spent[3]} before the deadline"),
        ("ran", f"p50 {runs[0]}, p95 {runs[1]}, p99 {runs[2]}")])  # fmt: skip


def many(n: int, what: str) -> str:
    return f"{n:,} {what}" + ("" if n == 1 else "s")


def show_labelled(lines: list[tuple[str, str]]) -> None:
    """A word and what it says, a line each; on a terminal folded under itself."""
    width = max(len(label) for label, _ in lines) + 2
    for label, text in lines:
        write_folded(f"{label:<{width}}{text}" if text else "", width)


@command("dashboard violations", *VIOLATION_OPTIONS, WATCH)
def dashboard_violations(app: App, level: str, everything: bool, limit: int, watch: int | None) -> None:
    """Tasks that are past a threshold of their SLA."""
    show_dashboard(app, watch, lambda store: violation_documents(store, level, everything, limit), show_violations)


@command("dashboard slow", opt("--limit", kind="limit", default=10, show_default=True, help="At most so many of each."),
         opt("--window", kind="duration", default=DAY, help="Completed since then, in whole hours [default: 24h]."), WATCH)  # fmt: skip
def dashboard_slow(app: App, limit: int, window: int, watch: int | None) -> None:
    """What runs longest now, and what took longest, beside the usual."""
    show_dashboard(app, watch, lambda store: slow_document(store, window, limit), show_slow)


def show_slow(document: Row) -> None:
    header = ("TASK", "KIND", "RAN", "USUAL P95", "TIMES", "GOAL")
    for title, rows, empty in (("running now", document["running"], "nothing runs"),
                               (f"completed since {document['window_since_at']}", document["completed"], "nothing has completed")):  # fmt: skip
        cells = [(d["task_id"], printable(d["task_type"]), format_duration(d["execution_time_ms"]), format_duration(d["usual_p95_ms"]),
                  "-" if d["times_usual"] is None else f"{d['times_usual']:.1f}", printable(d["goal"])) for d in rows]  # fmt: skip
        write_out(f"{title}:")
        show_table(header, cells, f"  {empty}")
    if any(d["usual_p95_ms"] is None for part in ("running", "completed") for d in document[part]):
        write_folded(f"USUAL P95 -: not known before {MIN_RUNS} of the kind have completed within {USUAL_DAYS} days", 0)


@command("dashboard hourly", opt("--hours", kind=Checked("number", whole(1, 744)), default=24, show_default=True, help="So many, this one included."), WATCH)
def dashboard_hourly(app: App, hours: int, watch: int | None) -> None:
    """What ended in each hour and domain, and how it went."""
    show_dashboard(app, watch, lambda store: hourly_documents(store, hours), functools.partial(show_hourly, hours=hours))


def show_hourly(documents: list[Row], hours: int) -> None:
    """A line for each hour and domain, the newest first, and one for each hour without; on a terminal with a bar as long as the number that ended."""
    header = ("HOUR (UTC)", "DOMAIN", "ENDED", "FAILED", "AVG", "P95", "SLA", "OK")
    this_hour = clock() // HOUR * HOUR
    by_hour: dict[str, list[Row]] = {str(format_instant(this_hour - HOUR * n)): [] for n in range(hours - 1, -1, -1)}
    for d in documents:
        by_hour.setdefault(d["starts_at"], []).append(d)
    shown: list[tuple[str, Row]] = [(hour, d) for hour, rows in sorted(by_hour.items(), reverse=True) for d in rows or [{}]]
    cells = [(hour[5:16].replace("T", " "), *hour_cells(d)) for hour, d in shown]
    width = terminal_width()
    lines = list(align(header, cells, None if width is None else width - 12 if width >= 70 else width))
    edge = max(text_width(line) for line in lines)
    if width is None or width - edge < 6:
        write_out("\n".join(lines))
        return
    most = max((d["total"] for d in documents), default=0)
    write_out(lines[0])
    for line, (_, d) in zip(lines[1:], shown, strict=True):
        write_out(line + " " * (edge - text_width(line) + 2) + (hour_bar(d, most, width - edge - 3) if d else ""))


def hour_cells(d: Row) -> tuple[str, ...]:
    if not d:
        return ("", "0", "", "", "", "", "")
    return (printable(d["domain"]), f"{d['total']}", f"{d['failed']}", format_duration(d["avg_execution_ms"]), format_duration(d["p95_execution_ms"]),
            whole_percent(d["sla_compliance_rate"]), whole_percent(d["success_rate"]))  # fmt: skip


def whole_percent(rate: float | None) -> str:
    return "-" if rate is None else f"{math.floor(100 * rate)}%"  # 100 only when it is all


def hour_bar(d: Row, most: int, room: int) -> str:
    """As long as what ended, at least one sign; what did not complete at its end, and in its colour."""
    long = max(1, round(int(d["total"]) * room / most))
    bad = min(long, math.ceil((int(d["total"]) - int(d["completed"])) * long / int(d["total"])))
    full, light = ("█", "░") if getattr(sys.__stdout__, "encoding", "utf-8").lower().startswith("utf") else ("#", "-")
    if os.environ.get("NO_COLOR"):
        return full * (long - bad) + light * bad
    return f"\033[32m{full * (long - bad)}\033[31m{light * bad}\033[0m"


@command("dashboard health", WATCH)
def dashboard_health(app: App, watch: int | None) -> int:
    """Whether all is well: healthy, warning, degraded, or critical (exit 1)."""
    document = show_dashboard(app, watch, health_document, show_health)
    return 1 if document is not None and document["status"] == "critical" else 0


def show_health(document: Row) -> None:
    paint = on_terminal() and not os.environ.get("NO_COLOR")
    uptime = f"a daemon has run for {format_duration(document['uptime_ms'])}" if document["uptime_ms"] is not None else "no daemon runs"
    write_out((colour(document["status"]) if paint else document["status"]) + f"  ({uptime}, {counted(len(document['checks']), 'check')})")
    for alert in document["alerts"]:
        level = colour(alert["level"]) if paint else alert["level"]
        write_folded(f"{level}: {alert['message']} (allowed: {shown_figure(alert['threshold'], alert['unit'])}, {alert['setting']})", 4)
        write_folded(f"    {alert['advice']}", 4)


# ---- forecasts


@command("dashboard queued", opt("--priority", kind="priority", help="Only this class."), opt("--handler", kind="name", help="Only this handler's."),
         opt("--limit", kind="limit", default=50, show_default=True, help="At most so many."), WATCH)  # fmt: skip
def dashboard_queued(app: App, priority: str | None, handler: str | None, limit: int, watch: int | None) -> None:
    """The queue in the order of claims: what waits how long, when it will start and be done, and what is going to miss its SLA."""
    store = app.store()
    if handler is not None:
        find_handler(store, handler)
    show_dashboard(app, watch, lambda store: queue_documents(store, priority, handler, limit), lambda documents: show_queue(store, documents))


def queue_documents(store: Store, priority: str | None, handler: str | None, limit: int) -> list[Row]:
    now = clock()
    return [queued_document(task, forecast, now) for task, forecast in store.read(lambda reader: queue_forecasts(reader, now, priority, handler, limit))]


def queued_document(task: Row, forecast: Row, now: int) -> Row:
    """A queued task with what is foreseen of it; one that is past its deadline misses it, whatever is foreseen."""
    names = ("task_id", "intent_id", "goal", "handler", "domain", "priority", "queued_at", "available_at", "sla_ms", "sla_deadline")
    return {**shown_fields(task, names), "waiting_ms": max(0, now - task["queued_at"]), "predicted_start_at": format_instant(forecast["start_at"]),
            "predicted_finish_at": format_instant(forecast["finish_at"]), "predicted_miss": past_deadline(task, now) or forecast["miss"],
            "reason": forecast["reason"], "text": forecast["text"], "advice": advice_document(forecast["advice"])}  # fmt: skip


SHOWN_ID = 16  # characters of a task's id at least, where there is no room for all of it
NAMED_LATE = 3


def show_queue(store: Store, documents: list[Row]) -> None:
    """The table, and below it why there are no forecasts where there are none, and what would save what is going to be late."""
    now, ids = clock(), shown_ids(store, [d["task_id"] for d in documents])
    header, rows = ("TASK", "CLASS", "WAITS", "SLA", "STARTS", "DONE IN", "GOAL"), [queued_cells(d, ids[d["task_id"]], now) for d in documents]
    if width := terminal_width():  # only the goal is cut: half a figure is a wrong one
        others = sum(max(map(len, column)) + 2 for column in zip(*(row[:-1] for row in [header, *rows]), strict=True))
        rows = [(*row[:-1], cut_text(row[-1], max(4, width - others))) for row in rows]
    show_table(header, rows, "nothing is queued")
    for text in dict.fromkeys(d["text"] for d in documents if d["text"]):
        write_folded(f"! no forecast: {printable(text)}", 2)
    late = [d for d in documents if d["predicted_miss"]]
    for d in late[:NAMED_LATE]:
        write_folded(f"! {printable(late_sentence(d, now))}", 2)
    if len(late) > NAMED_LATE:
        write_out(f"! and {len(late) - NAMED_LATE} more")


def shown_ids(store: Store, ids: list[str]) -> dict[str, str]:
    """How tasks are named in a table: on a terminal by the shortest beginnings of one length that no other task has."""
    if terminal_width() is None or not ids:
        return {task_id: task_id for task_id in ids}
    for length in range(SHOWN_ID, max(map(len, ids))):
        if all(is_one_of_a_kind(store, task_id[:length]) for task_id in ids):
            return {task_id: task_id[:length] for task_id in ids}
    return {task_id: task_id for task_id in ids}


def is_one_of_a_kind(store: Store, beginning: str) -> bool:
    try:
        return bool(find_id(store, "task", beginning))
    except UsageError:
        return False


def late_sentence(document: Row, now: int) -> str:
    """What a person is told of a queued task that is late, or is going to be."""
    deadline = parse_instant(document["sla_deadline"])
    if now > deadline:
        return f"{document['goal'][:40]!r} is late: {format_duration(now - deadline)} past its SLA of {format_duration(document['sla_ms'])}"
    return f"{document['goal'][:40]!r} is going to be late{advice_sentence(document['advice'])}"


def queued_cells(document: Row, shown_id: str, now: int) -> tuple[str, ...]:
    used = "-" if document["sla_ms"] is None else f"{100 * document['waiting_ms'] // document['sla_ms']}%"
    start, finish = (None if document[name] is None else max(0, parse_instant(document[name]) - now) for name in ("predicted_start_at", "predicted_finish_at"))
    done = format_duration(finish) + (" LATE" if document["predicted_miss"] else "")
    return shown_id, document["priority"], format_duration(document["waiting_ms"]), used, format_duration(start), done, printable(document["goal"])


# ---- events


@command("events ", opt("--topic", kind=Checked("glob", glob_of), default="*", help="Only topics like this, such as htm.sla.*"),
         opt("--since", kind="since", help="After an event's id, an instant, or a duration ago."),
         opt("--limit", kind="limit", help="At most so many [default: 100]."), opt("--follow", "-f", is_flag=True, help="Go on with what comes."),
         opt("--consumer", kind="name", help="Go on where this reader stopped; its place is kept."))  # fmt: skip
def events_command(app: App, topic: str, since: tuple[str, int] | None, limit: int | None, follow: bool, consumer: str | None) -> None:
    """What happened, in order: the newest, or from a place on."""
    store = app.store()
    if consumer or follow:
        stream_events(app, store, topic, since, limit, follow, consumer)
        return
    if since is None:
        rows = events_newest(store, topic, limit or 100)
    else:
        after = since[1] if since[0] == "event" else 0
        rows = events_after(store, after, instant_since(since, clock()) if since[0] != "event" else 0, topic, limit or 100)
    documents = [event_document(row) for row in rows]

    def plain() -> None:
        for document in documents:
            write_out(event_line(document))

    app.show(documents, plain)


def event_line(event: Row) -> str:
    """An event for people: what it is about, and its message or its payload; on a terminal cut to the width."""
    payload, told = event["payload"], story_line(event)
    if told == event["topic"]:
        plain = {key: value for key, value in payload.items() if value is not None} if isinstance(payload, dict) else payload
        told = json.dumps(plain, ensure_ascii=False)
    about = payload.get("task_id") if event["topic"].startswith("htm.") else None
    line = printable("  ".join(part for part in (event["id"], event["created_at"], event["topic"], about, told) if part))
    width = terminal_width()
    return line if width is None else cut_text(line, width)


def stream_events(app: App, store: Store, topic: str, since: tuple[str, int] | None, limit: int | None, follow: bool, consumer: str | None) -> None:
    """Event by event; a consumer's cursor moves after each line that was written out."""
    place, moment = place_to_start(store, topic, since, limit, consumer)
    left = limit if limit is not None and (consumer or since) else 1 << 60
    bell = Bell(store) if follow else None
    one_document = app.json and not follow
    separator = "["
    try:
        while left:
            rows = events_after(store, place, moment, topic, min(500, left))
            for row in rows:
                document = event_document(row)
                text = json.dumps(document) if app.json else event_line(document)
                sys.stdout.write(f"{separator}{text}" if one_document else f"{text}\n")
                sys.stdout.flush()
                separator, place = ",\n", row["seq"]
                if consumer:
                    keep_place(store, consumer, place)
            left -= len(rows)
            if not rows and bell is None:
                break
            if not rows and bell is not None:
                bell.wait(1.0)
    finally:
        if bell is not None:
            bell.close()
    if one_document:
        write_out("[]" if separator == "[" else "]")


def place_to_start(store: Store, topic: str, since: tuple[str, int] | None, limit: int | None, consumer: str | None) -> tuple[int, int]:
    """After which event, and from which instant on, a stream begins: the consumer's place, --since, or the newest few."""
    place = store.value(GET_CURSOR, name=consumer) if consumer else None
    if place is not None:
        return place, 0
    if since is not None:
        return (since[1], 0) if since[0] == "event" else (0, instant_since(since, clock()))
    return (0 if consumer else first_of_newest(store, topic, limit or 100)), 0


def keep_place(store: Store, consumer: str, place: int) -> None:
    store.write(lambda tx: tx.run(SET_CURSOR, name=consumer, seq=place, now=tx.now), durable=False, knock=False)


def first_of_newest(store: Store, topic: str, n: int) -> int:
    rows = events_newest(store, topic, n)
    return rows[0]["seq"] - 1 if rows else int(store.value(LAST_EVENT))


@command("events publish", arg("topic", Checked("topic", own_topic)), arg("payload", "json", required=False, default="{}"))
def events_publish(app: App, topic: str, payload: Any) -> None:
    """Put a fact of your own on the bus: TOPIC and JSON (or @FILE, or - for stdin)."""
    seq = app.store().write(lambda tx: publish(tx, topic, payload))
    app.show({"id": event_id(seq), "topic": topic}, lambda: write_out(event_id(seq)))


# ---- learning

WHOSE_OPTIONS = (
    opt("--handler", kind="name", help="Only this handler; command: what grace run has run."),
    opt("--domain", kind="name", help="Only this domain."),
)
RATE = Checked("ratio", fraction(0.5, 0.999))
BARS = "▁▂▃▄▅▆▇█"


def bar(part: float, width: int) -> str:
    """A line as long as this part (0 to 1) of the width; at least a trace of what is not nothing."""
    return "█" * round(part * width) or ("▏" if part > 0 else "")


def spark(values: list[float]) -> str:
    """One character for each value, as high as it is against the highest."""
    top = max(values, default=0)
    return "".join(BARS[min(7, int(8 * value / top))] if value > 0 else "·" for value in values)


def trend_cell(ratio: float | None) -> str:
    return "-" if ratio is None else f"{100 * ratio - 100:+.0f}%"


@command("learn stats", *WHOSE_OPTIONS, opt("--since", kind="since", default="30d", help="What ended since then: an instant or a duration [default: 30d]."))
def learn_stats(app: App, handler: str | None, domain: str | None, since: tuple[str, int]) -> None:
    """How the work went, by handler and domain; one handler in detail.

    Counted in full hours (UTC). Times are those of execution, without time asleep and interrupted runs."""
    store = app.store()
    begin = max(0, instant_since(since, clock()))
    found = store.read(lambda reader: learning_facts(reader, begin, handler, domain, merge=False))
    documents = [basis_document(stats_document(name, part, facts)) for (name, part), facts in found.items()]
    if handler is None:
        cells = [(d["handler"], d["domain"], str(d["ended"]), shown_rate(d["success_rate"]),
                  *(format_duration(d[f"p{part}_execution_ms"]) for part in (50, 95, 99)), trend_cell(d["trend_ratio"]), shown_rate(d["retry_rate"]))
                 for d in documents]  # fmt: skip
        header = ("HANDLER", "DOMAIN", "ENDED", "SUCCESS", "P50", "P95", "P99", "TREND", "RETRIED")
        app.show(documents, lambda: show_table(header, cells, "nothing has ended in this time"))
        return
    if not documents:
        refuse_unknown_name(store, handler)
    whole = store.read(lambda reader: learning_facts(reader, begin, handler, domain, merge=True)).get((handler, None), Facts())
    document = {**basis_document(stats_document(handler, domain, whole)), "domains": documents}
    app.show(document, lambda: show_stats(document))


def refuse_unknown_name(reader: Reader, name: str) -> None:
    """NotFoundError for a name that is no handler and that no outcome bears."""
    if name != "command" and not reader.all(HISTORY_PAGE, handler=name, at=MAX_INSTANT, seq=0, n=1):
        find_handler(reader, name)


def show_stats(document: Row) -> None:
    """One handler on a page of 80 columns."""
    write_out(f"{document['handler']}" + (f"  ({document['domain']})" if document["domain"] else ""))
    if not document["ended"]:
        write_out("  nothing has ended in this time")
        return
    write_out(f"  ended      {document['ended']}: {document['completed']} completed, {document['failed']} failed, {document['cancelled']} cancelled"
              + (f"; {document['imported']} of them imported" if document["imported"] else ""))  # fmt: skip
    write_out(f"  success    {shown_rate(document['success_rate'])}")
    parts = ", ".join(f"p{part} {format_duration(document[f'p{part}_execution_ms'])}" for part in (50, 95, 99))
    write_out(f"  execution  mean {format_duration(document['avg_execution_ms'])}, {parts}")
    trend = document["trend_ratio"]
    write_out("  trend      " + ("too few runs to tell" if trend is None else f"{trend_cell(trend)}: the median of the later half against that of the earlier"))
    write_out(f"  attempts   {shown_rate(document['retry_rate'])} took more than one; {document['avg_attempts'] or '-'} on average")
    show_patterns(document)
    show_judgements(document)
    if len(document["domains"]) > 1:
        cells = [(f"  {d['domain']}", str(d["ended"]), shown_rate(d["success_rate"]),
                  *(format_duration(d[f"p{part}_execution_ms"]) for part in (50, 95))) for d in document["domains"]]  # fmt: skip
        write_out("")
        show_table(("  DOMAIN", "ENDED", "SUCCESS", "P50", "P95"), cells, "")


def show_patterns(document: Row) -> None:
    hours, days = document["by_hour"], document["by_weekday"]
    write_out("\n  by hour (UTC)   0     6     12    18")
    write_out(f"  ended           {spark([hour['ended'] for hour in hours])}")
    means = [hour["avg_execution_ms"] or 0 for hour in hours]
    write_out(f"  mean time       {spark(means)}   up to {format_duration(max(means))}\n")
    top = max(day["ended"] for day in days)
    for day in days:
        mean, rate = format_duration(day["avg_execution_ms"]), shown_rate(day["success_rate"])
        write_out(f"  {day['weekday']:<10} {day['ended']:>8}  {bar(day['ended'] / top, 20):<20}  {mean:>8}  {rate:>6}")


def show_judgements(document: Row) -> None:
    if document["calibration"]:
        write_out(f"\n  stated confidence against what came of it (Brier score {document['brier_score']:.3f}; 0 is perfect)")
        for row in document["calibration"]:
            stated, achieved = shown_rate(row["stated_rate"]), shown_rate(row["achieved_rate"])
            write_out(f"  stated {stated:>6}  achieved {achieved:>6}  {bar(row['achieved_rate'], 20):<20}  {counted(row['runs'], 'run')}")
    if document["failures"]:
        write_out("\n  failures by reason")
        for failure in document["failures"]:
            write_out(f"  {failure['n']:>8}  {bar(failure['n'] / document['failures'][0]['n'], 20):<20}  {printable(failure['reason'])[:40]}")


NEWEST_OUTCOMES = """SELECT * FROM outcome_records WHERE handler IS NOT DISTINCT FROM :handler AND created_at >= :since
    AND (CAST(:domain AS TEXT) IS NULL OR domain = :domain) AND (CAST(:success AS INTEGER) IS NULL OR success = :success)
  ORDER BY created_at DESC, seq DESC LIMIT :n"""


@command("learn outcomes", *WHOSE_OPTIONS, opt("--success/--failed", "success", default=None, help="Only what succeeded, or what did not."),
         opt("--since", kind="since", help="Only what ended since then: an instant or a duration such as 2h."),
         opt("--limit", kind="limit", default=50, show_default=True, help="At most so many."))  # fmt: skip
def learn_outcomes(app: App, handler: str | None, domain: str | None, success: bool | None, since: tuple[str, int] | None, limit: int) -> None:
    """What came of each task and imported run, newest first."""
    store = app.store()
    names: list[str | None] = [*recorded_names(store), None] if handler is None else [handler] + ([None] if handler == "command" else [])
    chosen = {"domain": domain, "success": None if success is None else int(success), "since": instant_since(since, clock()), "n": limit}
    rows = [row for name in names for row in store.all(NEWEST_OUTCOMES, handler=name, **chosen)]
    rows.sort(key=lambda row: (row["created_at"], row["seq"]), reverse=True)
    if handler is not None and not rows:
        refuse_unknown_name(store, handler)
    documents = [outcome_document(row) for row in rows[:limit]]
    cells = [(d["created_at"], d["handler"] or "-", d["domain"], "ok" if d["success"] else printable(failure_word(context)),
              format_duration(None if d["execution_time"] is None else 1000 * d["execution_time"]), printable(str(context["goal"] or "-")))
             for d, context in zip(documents, (context_of(row["context"]) for row in rows), strict=False)]  # fmt: skip
    app.show(documents, lambda: show_table(("ENDED", "HANDLER", "DOMAIN", "RESULT", "TOOK", "GOAL"), cells, "no outcomes"))


@command("learn suggest-sla", opt("--handler", kind="name", help="Whose [default: all handlers]."),
         opt("--rate", kind=RATE, help="The share of runs that it is to hold for [default: the setting learn.rate, 0.95]."),
         opt("--apply", "put", is_flag=True, help="Make it the handler's SLA."))  # fmt: skip
def learn_suggest(app: App, handler: str | None, rate: float | None, put: bool) -> None:
    """Which SLA a handler should have, by its runs, and what that rests on."""
    store, now = app.store(), clock()
    if put and handler is None:
        raise UsageError("--apply goes with --handler", "see what it would be: grace learn suggest-sla")
    aim = rate if rate is not None else ratio_setting(store, "learn.rate")
    if handler is None:
        names = sorted({*recorded_names(store), *(row["name"] for row in store.all(LIST_HANDLERS))})
        documents = [basis_document(sla_suggestion(store, name, aim, now)) for name in names]
        cells = [(d["handler"], format_duration(d["sla_ms"]), str(d["runs"]), format_duration(d["quantile_ms"]), format_duration(d["current_sla_ms"]),
                  f"{d['missing_runs']} more runs needed" if d["missing_runs"] else "" if d["is_handler"] else "no such handler")
                 for d in documents]  # fmt: skip
        header = ("HANDLER", "SLA", "RUNS", f"P{100 * aim:g}", "NOW", "NOTE")
        app.show(documents, lambda: show_table(header, cells, "no handlers and no outcomes"))
        return
    refuse_commands(handler)
    basis = sla_suggestion(store, handler, aim, now)
    if not basis["runs"]:
        refuse_unknown_name(store, handler)
    if basis["sla_ms"] is None:
        raise ConflictError(f"{handler}: {counted(basis['runs'], 'successful run')} so far, and {MIN_RUNS} are needed; below that any SLA would be a guess",
                            "wait for more, or import earlier ones: grace learn import FILE")  # fmt: skip
    if put:
        row = store.write(lambda tx: apply_suggestion(tx, basis, aim))
        basis = {**basis, "previous_sla_ms": basis["current_sla_ms"], "current_sla_ms": row["sla_ms"]}
    document = {**basis_document(basis), "previous_sla_ms": basis.get("previous_sla_ms"), "rate": aim, "applied": put}
    app.show(document, lambda: show_suggestion(document))


def show_suggestion(document: Row) -> None:
    name, rate = document["handler"], f"{document['percentile']:g} %"
    write_folded(f"{name} should have an SLA of {format_duration(document['sla_ms'])}, to be kept by {rate} of its runs.", 0)
    more = ("the rest is for what these runs do not show" if document["margin"] >= 1 else "of late they were shorter, and the SLA follows them")
    write_folded(f"{rate} of {document['runs']} runs from {document['first_at'][:10]} to {document['last_at'][:10]} took at most "
                 f"{format_duration(document['quantile_ms'])}; {more} (times {document['margin']:g}).", 2)  # fmt: skip
    if document["applied"]:
        write_out(f"It has that SLA now; before, it was {format_duration(document['previous_sla_ms'])}.")
    elif document["is_handler"]:
        write_out(f"now: {format_duration(document['current_sla_ms'])}; set it: grace learn suggest-sla --handler {name} --apply")


@command("learn backtest", opt("--handler", kind="name", help="Whose history [default: each handler's]."),
         opt("--rate", kind=RATE, help="The share of runs to be kept [default: the setting learn.rate, 0.95]."),
         opt("--fixed", "fixed_ms", kind="duration", help="The fixed SLA to compare with [default: the handler's, else one from its first runs]."),
         opt("--limit", kind="limit", default=100_000, show_default=True, help="At most so many of each handler's latest runs."))  # fmt: skip
def learn_backtest(app: App, handler: str | None, rate: float | None, fixed_ms: int | None, limit: int) -> None:
    """Replay the recorded runs: would grace have predicted them better than a fixed SLA, or than the mean of the last ten?

    Each run is predicted from those before it. The pinball loss is what wrong predictions cost, in time; less is better. Coverage is the share kept."""
    store = app.store()
    aim = rate if rate is not None else ratio_setting(store, "learn.rate")
    if handler is not None:
        refuse_commands(handler)
    names = [handler] if handler is not None else list(recorded_names(store))
    documents = [tested for name in names if (tested := backtest_of(store, name, aim, fixed_ms, limit))["runs"] or handler is not None]
    if handler is not None and not documents[0]["runs"]:
        refuse_unknown_name(store, handler)
    if handler is not None:
        app.show(documents[0], lambda: show_backtest(documents, aim))
    else:
        app.show(documents, lambda: show_backtest(documents, aim))


def backtest_of(store: Store, name: str, rate: float, fixed_ms: int | None, limit: int) -> Row:
    """The replay of one handler's history; without figures where that is too short."""
    handler = store.one(GET_HANDLER, name=name)
    history = latest_runs(shown_progress(outcomes_of(store, name, limit), f"reading {name}"), limit)
    fixed = fixed_ms if fixed_ms is not None else handler["sla_ms"] if handler else None
    result = backtest(history, rate, fixed)
    if result is None:
        ways: Row = {way: {"pinball_loss_ms": None, "coverage_rate": None} for way in ("grace", "fixed", "mean_of_last_ten")}
        return {"handler": name, "recorded_runs": len(history), "runs": 0, "rate": rate, "fixed_ms": fixed, **ways}
    ways = {way: {"pinball_loss_ms": round(result[way]["pinball_loss"], 1), "coverage_rate": round(result[way]["coverage"], 4)}
            for way in ("grace", "fixed", "mean_of_last_ten")}  # fmt: skip
    return {"handler": name, "recorded_runs": len(history), "runs": result["runs"], "rate": rate, "fixed_ms": result["fixed_ms"], **ways}


def backtest_verdict(document: Row) -> str:
    """What would have served best: the least loss among those that kept the rate within two points."""
    ways = {"grace": "grace", "fixed": f"the fixed {format_duration(document['fixed_ms'])}", "mean_of_last_ten": "the mean of the last ten"}
    kept = [way for way in ways if document[way]["coverage_rate"] >= document["rate"] - 0.02]
    best = min(kept, key=lambda way: document[way]["pinball_loss_ms"], default=None)
    return f"{ways[best]} did best" if best else f"none kept {shown_rate(document['rate'])}"


def show_backtest(documents: list[Row], rate: float) -> None:
    cells = []
    for document in documents:
        if not document["runs"]:
            write_out(f"{document['handler']}: {counted(document['recorded_runs'], 'successful run')}, which is too few to test on; "
                      f"more than {MIN_RUNS} are needed")  # fmt: skip
            continue
        for way, label in (("grace", "grace"), ("fixed", f"fixed {format_duration(document['fixed_ms'])}"), ("mean_of_last_ten", "mean of last ten")):
            cells.append((document["handler"] if way == "grace" else "", label, format_duration(document[way]["pinball_loss_ms"]),
                          shown_rate(document[way]["coverage_rate"]), str(document["runs"]) if way == "grace" else ""))  # fmt: skip
    if cells or not documents:
        show_table(("HANDLER", "PREDICTED BY", "PINBALL LOSS", "COVERAGE", "RUNS"), cells, "no outcomes to test on")
    if cells:
        write_out(f"aim: {shown_rate(rate)} kept, at the least loss")
    for document in documents:
        if document["runs"]:
            write_folded(f"{document['handler']}: {backtest_verdict(document)}", 2)


def shown_progress(items: Iterable[Any], what: str) -> Iterator[Any]:
    """The items; on a terminal, stderr counts every fifty thousand."""
    telling = sys.stderr.isatty()
    number = 0
    for number, item in enumerate(items, 1):
        if telling and number % 50_000 == 0:
            sys.stderr.write(f"\r{what}: {number} …")
            sys.stderr.flush()
        yield item
    if telling and number >= 50_000:
        sys.stderr.write("\r" + " " * (len(what) + 20) + "\r")


class _OnlyTriedError(Exception):
    """Takes back an import that was only to be tried."""


@command("learn import", arg("file", metavar="FILE"), opt("--domain", kind="name", default="general", show_default=True, help="For lines that name none."),
         opt("--dry-run", is_flag=True, help="Check and count only."))  # fmt: skip
def learn_import(app: App, file: str, domain: str, dry_run: bool) -> None:
    """Learn from past runs: one JSON object a line, all or none; - for stdin.

    Keys: name, start, end, success; if you like: domain, goal, confidence, reason, attempts. start and end are RFC 3339 with an offset, or seconds
    since 1970. A run that was imported before is known again and not counted twice: whatever its line says makes its identity."""
    store = app.store()
    try:
        report = import_checked(store, past_runs(file, domain, clock()), dry_run)
    except OSError as error:
        raise DatabaseError(f"cannot keep what is to be imported beside the database: {error.strerror}; nothing was imported") from None
    if report["added"] > IMPORT_PIECE:
        store.truncate_log()  # else each command to come reads all of it again
    document = {**basis_document(report), "dry_run": dry_run}
    app.show(document, lambda: show_imported(document))


def import_checked(store: Store, runs: Iterable[Row], dry_run: bool) -> Row:
    """Import the runs in one transaction; all are checked, and kept in a file, before anybody has to wait for the write lock.

    OSError where that file has no room, even from closing it, which tries to write once more."""
    import tempfile

    report: Row = {}
    with tempfile.TemporaryFile(dir=os.path.dirname(store.path)) as spool:
        spool.writelines(to_json(run).encode() + b"\n" for run in shown_progress(runs, "checking"))
        spool.flush()

        def put(tx: Tx) -> None:
            spool.seek(0)
            report.clear()
            report.update(import_runs(tx, shown_progress(map(json.loads, spool), "importing"), lambda number: store.show_life()))
            if dry_run:
                raise _OnlyTriedError

        with contextlib.suppress(_OnlyTriedError):
            store.write(put)
    return report


def past_runs(source: str, domain: str, now: int) -> Iterator[Row]:
    """The runs of a file, each with its id; UsageError that names the line of the first that is none."""
    for number, line in batch_lines(source, "FILE", "nothing was imported"):
        try:
            run = past_run(parse_json(line.decode()), domain, now)
        except UnicodeDecodeError:
            raise UsageError(f"FILE: line {number}: is not valid UTF-8 text", "nothing was imported") from None
        except ValueError as error:
            raise UsageError(f"FILE: line {number}: {error}", "nothing was imported") from None
        yield {**run, "id": past_id(run)}


def show_imported(document: Row) -> None:
    would = "would be " if document["dry_run"] else ""
    write_out(f"{counted(document['added'], 'run')} {would}added, {document['known']} known before")
    show_names = [f"{one['name']} {one['runs']}" for one in document["largest"]]
    if show_names:
        write_folded(f"  {', '.join(show_names)}" + (", …" if document["names"] > len(show_names) else ""), 2)


@command("sla rehearse", opt("--warn-at", kind=Checked("ratio", fraction(0.01, 1)), help="Warning at this part of the SLA [default: the handler's, else 0.8]."),
         opt("--critical-at", kind=Checked("ratio", fraction(1, 1000)), help="Critical at this part of the SLA [default: the handler's, else 2]."),
         opt("--since", kind="since", default="30d", help="Tasks that ended since then: an instant or a duration [default: 30d]."),
         opt("--handler", kind="name", help="Only this handler; command: what grace run has run."),
         opt("--sla", "sla_ms", kind="duration", help="As if they all had had this SLA, imported runs too."))  # fmt: skip
def sla_rehearse(app: App, warn_at: float | None, critical_at: float | None, since: tuple[str, int], handler: str | None, sla_ms: int | None) -> None:
    """What other thresholds would have fired on the tasks that ended."""
    store, begin = app.store(), instant_since(since, clock())
    names: list[str | None] = [*recorded_names(store), None] if handler is None else [None if handler == "command" else handler]
    found = []
    for name in names:
        own = (store.one(GET_HANDLER, name=name) if name else None) or HANDLER_DEFAULTS
        warn, critical = warn_at or own["warn_at"], critical_at or own["critical_at"]
        if warn >= critical:
            raise UsageError("--warn-at must lie below --critical-at")
        found.append({**rehearse(store, name, begin, warn, critical, sla_ms), "handler": name or "command"})
    if handler is not None and not found[0]["tasks"]:
        refuse_unknown_name(store, handler)
    rows = [row for row in found if row["tasks"]]
    document = {"since_at": format_instant(begin), "total": rehearsed_total(rows), "handlers": rows}
    app.show(document, lambda: show_rehearsal(document))


def rehearsed_total(rows: list[Row]) -> Row:
    """All handlers together."""
    fired, rehearsed = ({name: sum(row[part][name] for row in rows) for name in ("warnings", "violations", "criticals")} for part in ("fired", "rehearsed"))
    useful = sum(row["useful_warnings"] for row in rows)
    return {"tasks": sum(row["tasks"] for row in rows), "fired": fired, "rehearsed": rehearsed, "useful_warnings": useful,
            "false_warnings": rehearsed["warnings"] - useful, "useful_rate": part_of(useful, rehearsed["warnings"])}  # fmt: skip


def show_rehearsal(document: Row) -> None:
    rows = [*document["handlers"], {**document["total"], "handler": "all", "lead_ms": None}] if len(document["handlers"]) > 1 else document["handlers"]
    cells = [(row["handler"], str(row["tasks"]), *(f"{row['fired'][name]} → {row['rehearsed'][name]}" for name in ("warnings", "violations", "criticals")),
              str(row["useful_warnings"]), str(row["false_warnings"]), format_duration(row["lead_ms"])) for row in rows]  # fmt: skip
    show_table(("HANDLER", "TASKS", "WARNED", "VIOLATED", "CRITICAL", "USEFUL", "FALSE", "LEAD"), cells, "no task with an SLA has ended in this time")
    if cells:
        write_folded("fired then → would be fired. useful: its task was then late; lead: how long before", 0)


# ---- settings


@command("config list")
def config_list(app: App) -> None:
    """All settings."""
    store = app.store()
    documents = [setting_document(store, name) for name in SETTINGS]

    def plain() -> None:
        for document in documents:
            write_out(f"{document['name']}  {document['value']}" + ("" if document["is_default"] else "  (set)"))
            write_folded(f"    {document['description']}", 4)

    app.show(documents, plain)


@command("config get", arg("name"))
def config_get(app: App, name: str) -> None:
    """One setting's value."""
    document = setting_document(app.store(), known_setting(name))
    app.show(document, lambda: write_out(str(document["value"])))


@command("config set", arg("name"), arg("value"))
def config_set(app: App, name: str, value: str) -> None:
    """Change a setting."""
    try:
        parsed = parse_setting(known_setting(name), value)
    except ValueError as error:
        raise UsageError(f"VALUE: {error}") from None
    show_changed_setting(app, name, lambda tx: set_setting(tx, name, parsed), parsed)


@command("config unset", arg("name"))
def config_unset(app: App, name: str) -> None:
    """Back to the default."""
    show_changed_setting(app, known_setting(name), lambda tx: unset_setting(tx, name), None)


def show_changed_setting(app: App, name: str, change: Callable[[Tx], None], value: Any) -> None:
    """Change it and show it; a change of what consent and vault go by is in the audit log."""

    def put(tx: Tx) -> None:
        change(tx)
        tx.settings.clear()
        if name == "learn.adapt":
            begin_adaptation(tx) if setting(tx, name) else end_adaptation(tx)
        if name.startswith(("consent.", "vault.")) and tx.value(GET_VAULT):
            record(tx, "setting.changed", name, {"value": None if value is None else str(value), "uid": os.geteuid()})

    store = app.store()
    store.write(put)
    if store.value(GET_VAULT):
        pin_head(store)
    document = setting_document(store, name)
    app.show(document, lambda: write_out(f"{name}  {document['value']}"))


# ---- vault: people and keys


PASSPHRASE = opt("--passphrase-file", metavar="FILE", help="The passphrase is this file's first line; - for stdin [default: asked on the terminal].")
APPROVER_NAME = Checked("name", lambda text: named("an approver", text) if text.lower() != "machine" else _refuse("'machine' is the machine's own name"))
SECRET_NAME = Checked("key", lambda text: text if re.fullmatch(SECRET_KEY, text) else _refuse(f"{text[:60]!r} is no key: 1 to 128 of A–Z a–z 0–9 _ . -"))


def has_terminal() -> bool:
    """Whether a person can be asked: standard input or standard error is a terminal, and it opens."""
    if not (os.isatty(0) or os.isatty(2)):
        return False
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def passphrase(source: str | None, whose: str, new: bool = False, option: str = "--passphrase-file") -> bytes:
    """A passphrase from a private file, stdin or the terminal; a new one is asked for twice. LockedError when there is no way."""
    if source is not None:
        return passphrase_file(source, option)
    if not has_terminal():
        raise LockedError(f"the passphrase of {whose} is needed, and there is no terminal to ask on", "name a file with --passphrase-file")
    typed = hidden_line(f"Passphrase of {whose}: ")
    if not typed:
        raise DeniedError("no passphrase was given")
    if new and hidden_line("The same again: ") != typed:
        raise UsageError("the two passphrases differ", "nothing was changed; try again")
    if new and len(typed) < SHORT_PASSPHRASE:
        sys.stderr.write(f"grace: {len(typed)} characters can be guessed once the key file was copied; change it with: grace approver passwd\n")
    return typed.encode(errors="surrogateescape")


SHORT_PASSPHRASE = 12  # characters, below which a person is warned


def hidden_line(prompt: str) -> str:
    """What a person types without seeing it; empty at the end of input."""
    import getpass

    try:
        return getpass.getpass(prompt)
    except EOFError:
        sys.stderr.write("\n")
        return ""
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        raise


def passphrase_file(source: str, option: str) -> bytes:
    try:
        with open(0 if source == "-" else source, "rb", closefd=source != "-") as file:
            facts = os.fstat(file.fileno())
            if source != "-" and stat.S_ISREG(facts.st_mode) and facts.st_mode & 0o077:
                raise UsageError(
                    f"{option}: {printable(source)} is open to others (mode {stat.S_IMODE(facts.st_mode):o})", f"chmod 600 {printable(source)}"
                )
            line = file.readline(4097)
    except (OSError, ValueError) as error:
        raise UsageError(f"{option}: cannot read {printable(source)}: {getattr(error, 'strerror', None) or error}") from None
    line = line.removesuffix(b"\n")
    if not 1 <= len(line) <= 4096:
        raise UsageError(f"{option}: the first line holds 1 to 4096 bytes")
    return line


def refuse_two_from_stdin(*sources: str | None) -> None:
    if sources.count("-") > 1:
        raise UsageError("two passphrases cannot both come from stdin", "name a file for one of them")


def choose_approver(vault: Vault, name: str | None) -> str:
    """Who acts: as named, else the login user, else the only one whose key is here."""
    known = [person["name"] for person in active(vault.roster)]
    if name is None:
        here = [other for other in known if os.path.exists(os.path.join(vault.folder, f"{other}.key"))]
        name = login_name() if login_name() in known else here[0] if len(here) == 1 else None
        if name is None:
            raise UsageError("several approvers could act here", f"name one with --approver: {', '.join(known)}")
    if name not in known:
        raise NotFoundError(f"there is no approver {name!r}", nearest_hint(name, known, "grace approver list"))
    return name


def unlock(vault: Vault, name: str, source: str | None) -> Approver:
    """An approver of this vault, unlocked, who has seen no newer state of it than this one."""
    if not os.path.exists(os.path.join(vault.folder, f"{name}.key")):
        raise LockedError(f"the key of {name} is not on this machine", "carry the request there: grace consent export ID")
    typed = passphrase(source, name)
    with refusals(vault.store, name, plain=False):
        approver = Approver(name, vault.folder, vault.id, typed)
        approver.meet(vault.store.all(ROSTERS))
        if not extends(vault.store, approver.seen.audit):
            raise RefusedError("rolled back: the audit log is not the one that this approver has seen")
        if hash_of("roster", approver.roster) != vault.roster_mark[1]:
            raise RefusedError("this machine knows another list of approvers")
    return approver


def unlock_all(vault: Vault, names: tuple[str, ...], sources: tuple[str, ...]) -> list[Approver]:
    """Several approvers, each with his own passphrase; a file for each, or the terminal."""
    if len(sources) > max(1, len(names)) or len(set(names)) < len(names):
        raise UsageError("name each approver once, and a passphrase file for each")
    refuse_two_from_stdin(*sources)
    chosen = names or (choose_approver(vault, None),)
    return [unlock(vault, choose_approver(vault, name), sources[number] if number < len(sources) else None) for number, name in enumerate(chosen)]


def open_vault(app: App) -> tuple[Store, Vault]:
    harden()
    store = app.store()
    return store, vault_in(store)


def vault_in(store: Store) -> Vault:
    with refusals(store, "vault", plain=False):
        vault = Vault(store)
    shred_if_due(store)
    return vault


@command("init", opt("--name", kind=APPROVER_NAME, help="The first approver [default: the login name]."),
         opt("--machine", is_flag=True, help="Make a new machine key for the vault that there is: when it was lost or stolen."), PASSPHRASE)  # fmt: skip
def init_command(app: App, name: str | None, machine: bool, passphrase_file: str | None) -> None:
    """Make the vault: its id, this machine's key, and you as the first approver."""
    harden()
    store = app.store()
    if machine:
        document = renew_machine(store, name, passphrase_file)
        app.show(document, lambda: write_out(f"a new machine key; sealed anew for it: {', '.join(document['resealed']) or 'nothing'}"))
        return
    if store.value(GET_VAULT):
        raise ConflictError("this database has a vault already", "see its approvers: grace approver list")
    first = name or APPROVER_NAME.convert(login_name(), None, None)
    done = make_vault(store, first, passphrase(passphrase_file, first, new=True))

    def plain() -> None:
        show_record({key: value for key, value in done.items() if key != "roles"})
        write_out(f"\n{first} is user and governance in one person: high and critical risk\nask twice, but nobody else. "
                  "A lost passphrase is a lost vault, unless there is\na second approver: grace approver add NAME --role user --role governance\n"
                  "Store a first secret: grace secret set KEY")  # fmt: skip

    app.show(done, plain)


def keys_here(folder: str, roster: Row) -> list[str]:
    """The approvers of a list, verified later, whose key files lie in a folder."""
    people = roster.get("approvers")
    names = {str(person.get("name")) for person in people if isinstance(person, dict) and person.get("removed") is None} if isinstance(people, list) else set()
    return sorted(name for name in names if NAME.fullmatch(name) and os.path.exists(os.path.join(folder, f"{name}.key")))


def check_entry(store: Store, entry: Row, person: Approver) -> Row:
    """The verified header of a version as an approver may trust it; RefusedError."""
    delegation = received_delegation(carried_delegation(store, entry))
    header = check_seal(entry["header"], sha256(bytes(entry["sealed"])), bytes(entry["signature"]), person.vault_id, person.roster, delegation)
    if problem := person.seen.odd_version(header):
        raise RefusedError(f"rolled back: {problem}")
    before = past_versions(store, header, person.seen.version_of(header["key"])) if header["version"] > person.seen.version_of(header["key"]) else []
    if problem := odd_succession(header, delegation, before, person.seen, person.vault_id, person.rosters):
        raise RefusedError(problem)
    return header


def renew_machine(store: Store, name: str | None, source: str | None) -> Row:
    """A new key for this machine, on a list signed by an approver of both roles; what the old one had sealed is sealed anew."""
    vault_id = store.value(GET_VAULT) or ""
    if not re.fullmatch(VAULT_ID, vault_id):
        raise LockedError("there is no vault yet", "make one: grace init")
    folder = vault_folder(vault_id)
    here = keys_here(folder, newest_roster(store))
    if name is None and len(here) != 1:
        raise UsageError("which approver?" if here else f"no approver's key is in {folder}",
                         "name one with --name" if here else "install it: grace approver import FILE")  # fmt: skip
    who = name or here[0]
    typed = passphrase(source, who)
    with refusals(store, who, plain=False):
        person = Approver(who, folder, vault_id, typed).meet(store.all(ROSTERS))
        if not extends(store, person.seen.audit):
            raise RefusedError("rolled back: the audit log is not the one that this approver has seen")
        before, keys = person.roster, Keys.new()
        headers = [check_entry(store, entry, person) for entry in store.all(CURRENT_SECRETS)]
        roster = new_roster(before, before["approvers"], keys.public, vault_id, person.keys.fingerprint, clock())
        if problem := odd_change(before, roster, person_named(before, who) or {}):
            raise DeniedError(f"the new list {problem}", "let an approver with both roles do it: --name NAME")
        resealed = [resealed_low(store, entry, person, keys, roster) for entry in store.all(CURRENT_SECRETS)
                    if stored_object(entry["header"]).get("owner") == fingerprint(before["machine"])]  # fmt: skip

    def put(tx: Tx) -> None:
        if tx.value("SELECT MAX(number) AS n FROM vault_rosters") != before["number"]:
            raise ConflictError("the approvers were changed meanwhile", "try again")
        put_roster(tx, roster, person.keys)
        record(tx, "machine.replaced", vault_id, {"by": who, "fingerprint": keys.fingerprint})
        for made in resealed:
            store_version(tx, made, "reshared", None)
        for row in tx.all(OPEN_FOR_MACHINE):  # what the old key was to open
            close_consent(tx, row, REVOKE, "revoked", MACHINE_CHANGED, now=tx.now)
        tx.run(END_ALL_DELEGATIONS)
        anchor(tx, person)

    store.write(put)
    mark, head = (roster["number"], hash_of("roster", roster)), audit_head(store)
    write_private(os.path.join(folder, "machine.key"), {"format": MACHINE_FILE, "vault_id": vault_id, "root": person.root, "private": b64(keys.private)})
    seen = Seen.begin(os.path.join(folder, "machine.seen"), vault_id, "machine", derived(keys.private, "seen"), mark, head, person.seen.rules)
    seen.secrets = {**person.seen.secrets}
    seen.save()
    for header in headers:
        seen.learn(header=header, machine=fingerprint(before["machine"]))
    person.seen.learn(mark, head)
    for made in resealed:
        seen.learn(header=made["header"], machine=keys.fingerprint)
    return {"vault_id": vault_id, "machine": keys.fingerprint, "signed_by": who, "resealed": [made["header"]["key"] for made in resealed],
            "machine_key_file": os.path.join(folder, "machine.key")}  # fmt: skip


def person_document(vault: Vault, person: Row) -> Row:
    return {"name": person["name"], "roles": person["roles"], "fingerprint": fingerprint(person), "added_at": format_instant(person["added"]),
            "removed_at": format_instant(person["removed"]), "key_here": os.path.exists(os.path.join(vault.folder, f"{person['name']}.key"))}  # fmt: skip


@command("approver list")
def approver_list(app: App) -> None:
    """Who may approve, with their roles, and who could once."""
    _, vault = open_vault(app)
    documents = [person_document(vault, person) for person in vault.roster["approvers"]]
    rows = [
        (d["name"], " ".join(d["roles"]), d["fingerprint"][:16], "removed" if d["removed_at"] else "here" if d["key_here"] else "elsewhere") for d in documents
    ]
    app.show(documents, lambda: show_table(("NAME", "ROLES", "FINGERPRINT", "KEY"), rows, "nobody"))


SIGNER = opt("--approver", kind="name", help="Which approver signs for this [default: the login name].")


@command("approver add", arg("name", APPROVER_NAME),
         opt("--role", kind=Checked("role", one_of(ROLES)), multiple=True, required=True, help="user or governance (repeatable)."),
         opt("--new-passphrase-file", metavar="FILE", help="The new approver's passphrase [default: asked on the terminal]."), SIGNER, PASSPHRASE)  # fmt: skip
def approver_add(app: App, name: str, role: tuple[str, ...], new_passphrase_file: str | None, approver: str | None, passphrase_file: str | None) -> None:
    """Add an approver. Secrets that exist are not affected until `secret reshare`."""
    store, vault = open_vault(app)
    if any(person["name"].lower() == name.lower() for person in active(vault.roster)):
        raise ConflictError(f"there is an approver {name} already")
    refuse_two_from_stdin(passphrase_file, new_passphrase_file)
    signer = unlock(vault, choose_approver(vault, approver), passphrase_file)
    held = (person_named(vault.roster, signer.name) or {"roles": []})["roles"]
    if not set(role) <= set(held):
        raise DeniedError(f"{signer.name} does not hold the role {' or '.join(sorted(set(role) - set(held)))}, and cannot hand it on")
    keys, seen_key = Keys.new(), os.urandom(32)
    roster = new_roster(vault.roster, [*vault.roster["approvers"], new_person(name, set(role), keys.public, clock())], vault.roster["machine"], vault.id,
                        signer.keys.fingerprint, clock())  # fmt: skip
    facts = {"vault_id": vault.id, "name": name, "root": vault.root}
    document = locked_keys(keys, seen_key, passphrase(new_passphrase_file, name, True, "--new-passphrase-file"), facts, setting(store, "vault.argon2_memory"))
    write_private(os.path.join(vault.folder, f"{name}.key"), document)
    Seen.begin(os.path.join(vault.folder, f"{name}.seen"), vault.id, name, seen_key, (roster["number"], hash_of("roster", roster)), audit_head(store),
               vault.seen.rules)  # fmt: skip
    change_roster(vault, signer, roster, "approver.added", name)
    added = person_named(roster, name)
    assert added is not None
    app.show(
        person_document(vault, added),
        lambda: write_out(f"{name} is an approver ({', '.join(sorted(set(role)))}); share secrets with: grace secret reshare KEY"),
    )


def change_roster(vault: Vault, signer: Approver, roster: Row, kind: str, name: str, to_rotate: dict[str, str] | None = None) -> None:
    """Put the next list of approvers, signed, and let this machine and the signer know it. `to_rotate`: secrets, each with a reason."""

    def put(tx: Tx) -> None:
        if tx.value("SELECT MAX(number) AS n FROM vault_rosters") != roster["number"] - 1:
            raise ConflictError("the approvers were changed meanwhile", "try again")
        put_roster(tx, roster, signer.keys)
        record(tx, kind, name, {"by": signer.name, "roster": hash_of("roster", roster), "number": roster["number"]})
        tx.many(MARK_ROTATION, [{"key": key, "reason": reason} for key, reason in (to_rotate or {}).items()])
        for person in roster["approvers"]:
            if person["name"] == name and person["removed"] is not None:
                end_signed(tx, fingerprint(person), f"{name}{SIGNER_GONE}")
        anchor(tx, signer)

    vault.store.write(put)
    signer.roster = vault.roster = roster
    vault.rosters.append(roster)
    signer.learn(audit_head(vault.store))
    vault.seen.learn(roster=vault.roster_mark)
    vault.learn_head()


def change_rules(vault: Vault, signer: Approver, before: Row, rules: list[Row], kind: str, name: str) -> None:
    """Put the next set of rules, signed, and let this machine and the signer know it."""

    def put(tx: Tx) -> Row:
        made = put_rules(tx, before, rules, signer, kind, name)
        end_ruled_out(tx, made)
        return made

    mark = rules_mark(vault.store.write(put))
    signer.learn(audit_head(vault.store), rules=mark)
    vault.seen.learn(rules=mark)
    vault.learn_head()


def keep_rules(vault: Vault, signer: Approver, left: str, name: str) -> None:
    """Rules that somebody signed who has left are signed anew: whoever has not seen them yet would not believe his signature any more."""
    with contextlib.suppress(RefusedError):
        rules = vault.rules(vault.store)
        if rules["signer"] == left and signer.keys.fingerprint in members_of(vault.roster, "governance"):
            change_rules(vault, signer, rules, rules["rules"], "signed anew", name)


@command("approver remove", arg("name", "name"), SIGNER, PASSPHRASE)
def approver_remove(app: App, name: str, approver: str | None, passphrase_file: str | None) -> None:
    """Take an approver off the list, and say what that key can still open until those secrets change."""
    store, vault = open_vault(app)
    person = person_named(vault.roster, name)
    if person is None:
        raise NotFoundError(f"there is no approver {name!r}", "see them with: grace approver list")
    mine, opens, keeps = fingerprint(person), [], []
    with refusals(store, name, plain=False):
        headers = [vault.checked(store, entry) for entry in store.all(CURRENT_SECRETS)]
    for header in headers:
        keeps += [hash_of("header", header)] if header["owner"] == mine else []
        groups = [group for group in header["policy"]["all"] if mine in group["members"]]
        opens += [header["key"]] if groups else []
        left = {fingerprint(other) for other in active(vault.roster)} - {mine}
        for group in groups:
            if group["group"] != "machine" and len(left & set(group["members"])) < group["threshold"]:
                raise ConflictError(f"without {name}, {header['key']} could not be opened any more ({policy_text(header['policy'])})",
                                    f"share it with others first: grace secret reshare {header['key']}")  # fmt: skip
    for role in person["roles"]:
        if members_of(vault.roster, role) == [mine]:
            raise ConflictError(f"{name} is the only approver with the role {role}", "add another one first: grace approver add")
    signer = unlock(vault, choose_approver(vault, approver), passphrase_file)
    if signer.name == name:
        raise ConflictError("nobody removes himself", "let another approver sign: --approver NAME")
    people = [{**other, "removed": clock(), "keeps": sorted(keeps)} if other is person else other for other in vault.roster["approvers"]]
    roster = new_roster(vault.roster, people, vault.roster["machine"], vault.id, signer.keys.fingerprint, clock())
    change_roster(vault, signer, roster, "approver.removed", name, dict.fromkeys(opens, f"{name} was removed and could open it"))
    keep_rules(vault, signer, mine, name)
    document = {"name": name, "removed": True, "can_still_open": opens}

    def plain() -> None:
        write_out(f"{name} is not an approver any more")
        for key in opens:
            write_out(f"  that key still opens its part of {key}, also in copies: grace secret rotate {key}")

    app.show(document, plain)


@command(
    "approver passwd",
    arg("name", "name", required=False),
    opt("--new-passphrase-file", metavar="FILE", help="The new passphrase [default: asked on the terminal]."),
    PASSPHRASE,
)
def approver_passwd(app: App, name: str | None, new_passphrase_file: str | None, passphrase_file: str | None) -> None:
    """Change an approver's passphrase. Copies of the old key file still open with the old one."""
    store, vault = open_vault(app)
    name = choose_approver(vault, name)
    refuse_two_from_stdin(passphrase_file, new_passphrase_file)
    path = os.path.join(vault.folder, f"{name}.key")
    document = read_private(path, f"the key of {name}")
    typed = passphrase(passphrase_file, name)
    with refusals(store, name, plain=False):
        keys, seen_key = unlocked_keys(document, typed)
    facts = {"vault_id": vault.id, "name": name, "root": document["root"]}
    new = passphrase(new_passphrase_file, f"{name} from now on", True, "--new-passphrase-file")
    locked = locked_keys(keys, seen_key, new, facts, setting(store, "vault.argon2_memory"))
    store.write(lambda tx: record(tx, "approver.passwd", name, {}))  # before: a leaf without a change is an attempt, a change without a leaf would be none
    write_private(path, locked)
    app.show({"name": name, "changed": True}, lambda: write_out(f"the passphrase of {name} was changed"))


@command("approver export", arg("name", "name"), opt("--out", metavar="FILE", help="Write there instead of to stdout."))
def approver_export(app: App, name: str, out: str | None) -> None:
    """The key file of an approver, still locked by his passphrase, and what he has seen: to carry to another machine."""
    _, vault = open_vault(app)
    name = choose_approver(vault, name)
    bundle = {"format": "grace-approver/1", "key": read_private(os.path.join(vault.folder, f"{name}.key"), f"the key of {name}"),
              "seen": read_private(os.path.join(vault.folder, f"{name}.seen"), f"the record of {name}")}  # fmt: skip
    vault.store.write(lambda tx: record(tx, "approver.exported", name, {"uid": os.geteuid()}))
    vault.learn_head()
    write_text(app, out, bundle)


@command("approver import", arg("file", metavar="FILE"))
def approver_import(app: App, file: str) -> None:
    """Install what `approver export` wrote on another machine; no database is needed here."""
    try:
        bundle = parse_json(read_argument("-" if file == "-" else f"@{file}", MAX_JSON))
    except ValueError as error:
        raise UsageError(f"FILE: {error}") from None
    known = isinstance(bundle, dict) and bundle.get("format") == "grace-approver/1"
    parts: list[Row] = [part for part in (bundle.get("key"), bundle.get("seen")) if isinstance(part, dict)] if known else []
    if len(parts) != 2:
        raise UsageError("FILE: this is no exported approver")
    vault_id, name = str(parts[0].get("vault_id")), str(parts[0].get("name"))
    if [part.get("format") for part in parts] != [KEY_FILE, SEEN_FILE] or name.lower() == "machine":
        raise UsageError("FILE: this is no exported approver")
    if not re.fullmatch(VAULT_ID, vault_id) or not NAME.fullmatch(name) or (parts[1].get("vault_id"), parts[1].get("name")) != (vault_id, name):
        raise UsageError("FILE: this is no exported approver")
    try:
        for part in parts:
            canonical(part)
        texts = (parts[0].get("root"), parts[0].get("private"), parts[1].get("data"))
        if not all(isinstance(text, str) for text in texts) or not isinstance(parts[0].get("kdf"), dict):
            raise ValueError("this is no exported approver")
        shaped(parts[0].get("public"), PUBLIC_SHAPE, "the key")
    except (ValueError, RefusedError) as error:
        raise UsageError(f"FILE: {error}") from None
    folder = vault_folder(vault_id)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    if os.path.exists(os.path.join(folder, f"{name}.key")):
        raise ConflictError(f"the key of {name} is here already: {folder}")
    for part, ending in zip(reversed(parts), ("seen", "key"), strict=True):  # the key comes last: it is what counts as being here
        write_private(os.path.join(folder, f"{name}.{ending}"), part)
    document = {"name": name, "vault_id": vault_id, "key_file": os.path.join(folder, f"{name}.key")}
    app.show(document, lambda: write_out(f"the key of {name} is in {folder}"))


def write_text(app: App, out: str | None, document: Row) -> None:
    """A document for another machine: to a private file, or to stdout."""
    if out is None:
        write_json(document)
        return
    try:
        if os.path.exists(out) and not os.path.isfile(out):  # a pipe, such as a shell's >(…)
            with open(out, "w", encoding="ascii") as file:
                file.write(json.dumps(document) + "\n")
        else:
            write_private(out, document)
    except OSError as error:
        raise UsageError(f"--out: cannot write {printable(out)}: {error.strerror}") from None
    app.show({"file": out}, lambda: write_out(f"written: {printable(out)}"))


# ---- vault: secrets


def parse_action_risk(text: str) -> tuple[str, str]:
    action, separator, risk = text.partition("=")
    if not separator or risk not in RISK_LEVELS or not NAME.fullmatch(action):
        raise ValueError(f"{text[:60]!r} is not ACTION=RISK, such as delete=critical")
    return action, risk


SECRET_OPTIONS = (
    opt("--type", kind="name", help="What it is, such as api_key or password."),
    opt("--service", kind=Checked("text", text_of("a service", 200)), help="Whose it is, such as github or https://git.example.org/shop."),
    opt("--risk", kind="risk", help="low, medium, high or critical [default: medium]."),
    opt("--allow-standing/--no-allow-standing", default=None, help="Whether a standing consent may be given at high risk [default: no]."),
    opt("--action-risk", kind=Checked("risk", parse_action_risk), multiple=True, metavar="ACTION=RISK", help="A higher risk for one action (repeatable)."),
    opt("--policy", kind=Checked("policy", parse_policy), help="Who must take part: 'user:1 & governance:1', 'user:2of3', 'user:1(anna,ben)'."),
    opt("--owner", kind="name", help="The approver who seals it [default: the login name]."),
    opt("--username", kind=Checked("text", text_of("a user name", 200)), help="The login that goes with it."),
    opt("--expires", "expires_ms", kind="duration", help="Refuse to open it after this long."),
    opt("--rotate-every", "rotate_every", kind="duration", help="A new value is due after this long, again and again."),
    opt("--rotate-with", "rotate_with", kind="name", help="The handler that then makes it, with a key that can seal a new value and read none."),
)
VALUE_OPTIONS = (opt("--value-file", metavar="FILE", help="Where the value is [default: stdin, or a hidden prompt]."),
                 opt("--raw", is_flag=True, help="Keep a trailing newline."))  # fmt: skip


def read_value(source: str | None, raw: bool, passphrase_source: str | None, key: str) -> bytes:
    """A secret's value from a file, stdin or a hidden prompt; never from an argument."""
    if source in (None, "-") and passphrase_source == "-":
        raise UsageError("the value and the passphrase cannot both come from stdin", "name a file for one of them")
    if source is None and os.isatty(0):
        value = hidden_line(f"Value of {key}: ").encode(errors="surrogateescape")
    else:
        try:
            with open(0 if source in (None, "-") else source, "rb", closefd=source not in (None, "-")) as file:
                value = file.read(MAX_SECRET + 2)
        except (OSError, ValueError) as error:
            raise UsageError(f"--value-file: cannot read {printable(str(source))}: {getattr(error, 'strerror', None) or error}") from None
    value = value if raw else value.removesuffix(b"\n")
    if not 1 <= len(value) <= MAX_SECRET:
        raise UsageError(
            f"a value has 1 byte to 64 KiB, not {len(value) if len(value) <= MAX_SECRET else 'more'}", "it is read from stdin, --value-file or a prompt"
        )
    return value


def say_holders(app: App, vault: Vault, fields: Row) -> None:
    """Tell a person who will hold parts of the key, before it is sealed for them."""
    if app.json:
        return
    for group in fields["policy"]["all"]:
        names = [str((person_of(vault.roster, member) or {"name": "this machine"})["name"]) for member in group["members"]]
        sys.stderr.write(f"grace: {fields['key']} ({fields['risk']}) is sealed for {group['group']}, {group['threshold']} of: {', '.join(names)}\n")


def seal_next(app: App, vault: Vault, key: str, value: bytes, options: Row, owner: str | None, source: str | None, kind: str) -> Row:
    """Seal a new version: low risk by the machine, anything else by an approver, whose passphrase that takes."""
    store = vault.store
    entry = store.one(NEWEST_VERSION, key=key)
    with refusals(store, key, plain=False):
        if vault.seen.ahead_of(key, entry):
            raise RefusedError(f"rolled back: a newer version of {key} was seen before")
        before = vault.current(store, key)[1] if entry and entry["sealed"] is not None else gone_header(vault, entry, options)
    try:
        fields = next_header(vault.id, vault.roster, key, before, entry["version"] + 1 if entry else 1, options, clock())
    except ValueError as error:
        raise UsageError(f"--policy: {error}") from None
    if fields["risk"] == "low" and vault.was_owned(store, key):
        raise ConflictError(f"{key} was sealed by an approver before and cannot become low risk", "store it under another name")
    if fields["risk"] == "low":
        made = seal(vault.machine, fields, value, vault.roster)
        stored: Row = store.write(lambda tx: store_version(tx, made, kind, None))
    else:
        approver = unlock(vault, choose_approver(vault, owner), source)
        with refusals(store, key, plain=False):
            if approver.seen.ahead_of(key, entry) or (before and approver.seen.odd_version(before)):
                if (store.one(NEWEST_VERSION, key=key) or {"version": 0})["version"] > (entry or {"version": 0})["version"]:
                    raise ConflictError(f"{key} was changed meanwhile", "try again")
                raise RefusedError(f"rolled back: {approver.name} has seen another version of {key}")
        refuse_takeover(approver, before)
        say_holders(app, vault, fields)
        made = seal(approver.keys, fields, value, vault.roster)
        stored = store.write(lambda tx: store_version(tx, made, kind, approver, vault))
        approver.learn(audit_head(store), made["header"])
    vault.learn_head(made["header"])
    shred(store)
    return secret_document(vault, stored)


def show_secret(app: App, document: Row) -> None:
    app.show(document, lambda: show_record(document))


@command("secret set", arg("key", SECRET_NAME), *SECRET_OPTIONS, *VALUE_OPTIONS, PASSPHRASE)
def secret_set(app: App, key: str, value_file: str | None, raw: bool, owner: str | None, passphrase_file: str | None, action_risk: tuple[tuple[str, str], ...],
               expires_ms: int | None, **options: Any) -> None:  # fmt: skip
    """Store a value under KEY, or a new version of it; what is not said again stays as it was."""
    _, vault = open_vault(app)
    if options["rotate_with"]:
        find_handler(vault.store, options["rotate_with"])
    value = read_value(value_file, raw, passphrase_file, key)
    options.update(action_risks=dict(action_risk) or None, expires=clock() + expires_ms if expires_ms else None)
    show_secret(app, seal_next(app, vault, key, value, options, owner, passphrase_file, "stored"))


@command(
    "secret rotate",
    arg("key", SECRET_NAME),
    opt("--owner", kind="name", help="The approver who seals it [default: the login name]."),
    opt("--delegated", is_flag=True, help="Seal it as its owner has allowed rotations to, without a passphrase."),
    *VALUE_OPTIONS,
    PASSPHRASE,
)
def secret_rotate(app: App, key: str, owner: str | None, delegated: bool, value_file: str | None, raw: bool, passphrase_file: str | None) -> None:
    """Give a secret a new value; everything else stays."""
    if delegated and (owner or passphrase_file):
        raise UsageError("--delegated takes no owner and no passphrase")
    store, vault = open_vault(app)
    if delegated:
        value = read_value(value_file, raw, None, key)
        with refusals(store, key, plain=False):
            if stored_object(entry_of(store, key)["header"]).get("risk") == "low":
                raise UsageError(f"{key} is of low risk, which this machine seals by itself", "leave --delegated out")
            made = delegated_version(vault, key, value)
        stored = store.write(lambda tx: store_version(tx, made, "rotated", None, vault))
        vault.learn_head(made["header"])
        shred(store)
        show_secret(app, secret_document(vault, stored))
        return
    with refusals(store, key, plain=False):
        vault.current(store, key)
    show_secret(app, seal_next(app, vault, key, read_value(value_file, raw, passphrase_file, key), {}, owner, passphrase_file, "rotated"))


@command("secret reshare", arg("key", SECRET_NAME), opt("--policy", kind=Checked("policy", parse_policy), help="Another policy from now on."),
         opt("--approver", kind="name", multiple=True, help="Who opens it, the first one seals (repeatable) [default: the login name]."),
         opt("--passphrase-file", metavar="FILE", multiple=True, help="Their passphrases, in the same order."))  # fmt: skip
def secret_reshare(app: App, key: str, policy: list[Row] | None, approver: tuple[str, ...], passphrase_file: tuple[str, ...]) -> None:
    """Seal the same value anew for the approvers that there are now; takes the passphrases that opening takes."""
    store, vault = open_vault(app)
    with refusals(store, key, plain=False):
        entry, before = vault.current(store, key)
        people = unlock_all(vault, approver, passphrase_file)
        shares = store.all(SHARES_OF, key=key, version=before["version"])
        parts: dict[str, dict[int, bytes]] = {}
        for person in people:
            for group, opened in own_shares(person.keys, entry, before, shares).items():
                parts.setdefault(group, {}).update(opened)
        short = [g["group"] for g in before["policy"]["all"] if len(parts.get(g["group"], {})) < g["threshold"]]
        if short:
            raise DeniedError(f"{key} needs more approvers of {' and '.join(short)} to be opened", "name them: --approver NAME --approver NAME")
        opened_by = {"version": before["version"], "by": [person.name for person in people], "for": "reshare"}
        store.write(lambda tx: record(tx, "secret.opened", key, opened_by))
        value = open_value(before, bytes(entry["sealed"]), parts)
    low = before["risk"] == "low"
    try:
        fields = next_header(vault.id, vault.roster, key, before, before["version"] + 1, {"policy": policy}, clock())
    except ValueError as error:
        raise UsageError(f"--policy: {error}") from None
    if not low and not policy:
        fields["policy"] = reshared_policy(before, vault.roster)
    refuse_takeover(people[0], before)
    say_holders(app, vault, fields)
    made = seal(vault.machine if low else people[0].keys, fields, value, vault.roster)
    stored = store.write(lambda tx: store_version(tx, made, "reshared", people[0], vault))
    people[0].learn(audit_head(store), made["header"])
    vault.learn_head(made["header"])
    shred(store)
    show_secret(app, secret_document(vault, stored))


@command("secret list")
def secret_list(app: App) -> None:
    """All secrets, without their values."""
    store, vault = open_vault(app)
    documents = [secret_document(vault, entry) for entry in store.all(CURRENT_SECRETS)]
    rows = [(d["secret_key"], str(d["version"]), d["risk_level"] or "-", printable(d["service"] or "-"), d["policy"] or "-",
             "" if d["verified"] else "DOES NOT VERIFY") for d in documents]  # fmt: skip
    app.show(documents, lambda: show_table(("KEY", "VERSION", "RISK", "SERVICE", "POLICY", ""), rows, "no secrets; store one: grace secret set KEY"))


def entry_of(store: Store, key: str) -> Row:
    entry = store.one(NEWEST_VERSION, key=key)
    if entry is None:
        raise NotFoundError(f"there is no secret {key!r}", nearest_hint(key, [row["secret_key"] for row in store.all(CURRENT_SECRETS)], "grace secret list"))
    return entry


@command("secret show", arg("key", SECRET_NAME))
def secret_show(app: App, key: str) -> None:
    """One secret, without its value."""
    store, vault = open_vault(app)
    show_secret(app, secret_document(vault, entry_of(store, key)))


USES_OF = """SELECT * FROM secret_consent_records WHERE secret_key = :key AND used_count > 0 AND mode <> 'standing' ORDER BY used_at, seq"""


@command("secret history", arg("key", SECRET_NAME))
def secret_history(app: App, key: str) -> None:
    """The versions of a secret, and who has held each."""
    store, vault = open_vault(app)
    entry_of(store, key)
    used = [
        consent_document(store, row)
        for row in store.all(USES_OF, key=key)
    ]
    facts = ("consent_id", "requested_by", "requested_action", "requested_for", "used_at")
    held = [(doc["secret_version"], {name: doc[name] for name in facts}) for doc in used]
    documents = [{**secret_document(vault, entry), "held_by": [use for version, use in held if version == entry["version"]]}
                 for entry in store.all(VERSIONS_OF, key=key)]  # fmt: skip

    def plain() -> None:
        for d in documents:
            write_out(
                f"version {d['version']}  {d['created_at']}  sealed by {d['owner'] or '?'}" + (f"  gone since {d['removed_at']}" if d["removed_at"] else "")
            )
            for use in d["held_by"]:
                write_out(f"  {use['used_at']}  {printable(use['requested_by'])}  {printable(use['requested_action'])}: {printable(use['requested_for'])}")

    app.show(documents, plain)


@command("secret remove", arg("key", SECRET_NAME))
def secret_remove(app: App, key: str) -> None:
    """Drop a secret's value for good; its history stays."""
    store, vault = open_vault(app)
    stored = store.write(lambda tx: remove_secret(tx, key))
    shred(store)
    vault.learn_head()
    app.show(secret_document(vault, stored), lambda: write_out(f"{key} was removed; whoever has been given it still has it"))


# ---- vault: asking for secrets and using them


ASK_OPTIONS = (
    opt("--by", kind=Checked("name", requester), help="Who asks [default: PROGRAM@LOGIN of the caller]."),
    opt("--user", kind="name", help="The approver who is to answer."),
    opt("--risk", kind="risk", help="A higher risk than the secret's own."),
    opt("--context", kind="object", default="{}", metavar="JSON", help="An object for whoever answers: JSON, @FILE, or - for stdin."),
    opt("--timeout", "timeout_ms", kind="duration", default="5m", show_default=True, help="How long the question stands."),
)
USE_OPTIONS = (
    opt("--action", kind=Checked("name", lambda text: named("an action", text)), required=True, help="What is to be done with it, in one word."),
    opt("--for", "purpose", kind=Checked("text", text_of("a purpose", 2000)), required=True, help="Why, in a sentence for the person who answers."),
    *ASK_OPTIONS,
)


def ask_for(vault: Vault, spec: Row) -> Asking:
    with refusals(vault.store, spec["key"], plain=True):
        return Asking(vault, spec)


def await_answers(store: Store, ids: list[str], say: Callable[[str], None] = lambda text: None) -> list[Row]:
    """Wait until each of these consents is answered or over; their rows. Interrupted, the open ones are withdrawn."""
    bell = Bell(store)
    try:
        while True:
            store.write(expire_consents, durable=False, knock=False) if any_over(store, ids) else None
            rows = [get_consent(store, consent_id) for consent_id in ids]
            if all(row["consent_status"] != "pending" for row in rows):
                return rows
            bell.wait((min(row["expires_at"] for row in rows if row["consent_status"] == "pending") - clock()) / 1000)
    except KeyboardInterrupt:
        withdraw_open(store, ids)
        raise
    finally:
        bell.close()


def any_over(store: Store, ids: list[str]) -> bool:
    now = clock()
    return any(row["consent_status"] == "pending" and row["expires_at"] <= now for row in (get_consent(store, consent_id) for consent_id in ids))


def announce(app: App, asking: Asking) -> None:
    """Tell the person at the requester's side which request to look for."""
    if not app.json:
        sys.stderr.write(waiting_line(asking) + "\n")


def obtain(app: App, vault: Vault, specs: list[Row]) -> list[tuple[Asking, bytes]]:
    """Ask for several secrets at once, wait for all answers, open them all; whatever is open is withdrawn when one fails."""
    askings: list[Asking] = []
    together = asked_at_once(specs)
    try:
        for spec in specs:
            askings.append(ask_for(vault, {**spec, "together": together}))
        waiting = [asking for asking in askings if not asking.answered]
        for asking in waiting:
            announce(app, asking)
        for row in await_answers(vault.store, [asking.consent_id for asking in waiting]) if waiting else []:
            refuse_closed(row)
        return [(asking, asking.value()) for asking in askings]
    except GraceError:
        withdraw_open(vault.store, [asking.consent_id for asking in askings])
        vault.learn_head()
        raise


@command("secret get", arg("key", SECRET_NAME), *USE_OPTIONS,
         opt("--no-wait", is_flag=True, help="File the request and go (exit 75); collect it later with --consent."),
         opt("--consent", kind="id", help="Collect what this consent was approved for."),
         opt("--reveal", is_flag=True, help="Show the value on a terminal, or inside --json."))  # fmt: skip
def secret_get(app: App, key: str, no_wait: bool, consent: str | None, reveal: bool, **options: Any) -> int | None:
    """Ask for consent where it is needed, wait for it, and write the value to stdout."""
    if not reveal and not no_wait and (app.json or on_terminal()):
        raise UsageError("a value is shown on a terminal or inside --json only with --reveal")
    if consent is not None and no_wait:
        raise UsageError("--consent and --no-wait exclude each other")
    spec = ask_spec(key, mode="collect" if no_wait else "once", hidden=(app.json or on_terminal()) and not reveal, **options)
    store, vault = open_vault(app)
    if consent is not None:
        row = collected(store, consent, key, options["action"], options["timeout_ms"])
        show_value(app, store, row["consent_id"], redeem(vault, row["consent_id"], None, None))
        return None
    if not no_wait:
        asking, value = obtain(app, vault, [spec])[0]
        show_value(app, store, asking.consent_id, value)
        return None
    asking = ask_for(vault, spec)
    if asking.answered:
        show_value(app, store, asking.consent_id, asking.value())
        return None
    show_consent(app, store, get_consent(store, asking.consent_id))
    return 75


def collected(store: Store, consent: str, key: str, action: str, timeout_ms: int) -> Row:
    """The approved consent that is to be collected, waited for if need be; it must be for this secret and action."""
    store.write(expire_consents)
    row = get_consent(store, consent)
    if (row["secret_key"], request_of(row["request"])["claimed"]["action"]) != (key, action):
        raise ConflictError(f"{row['consent_id']} is for another secret or action")
    if row["consent_status"] in ("pending", "approved"):
        if row["mode"] != "collect":
            raise DeniedError(f"only the process that asked for {row['consent_id']} can use it")
        if row["task_id"] is not None:
            raise DeniedError(f"{row['consent_id']} is for the task {row['task_id']} alone")
    if row["consent_status"] == "pending":
        row = await_answer(store, row["consent_id"], timeout_ms)
    refuse_closed(row)
    return row


def show_value(app: App, store: Store, consent_id: str, value: bytes) -> None:
    if not app.json:
        sys.stdout.flush()
        sys.stdout.buffer.write(value)
        sys.stdout.buffer.flush()
        return
    document = consent_document(store, get_consent(store, consent_id))
    try:
        write_json({**document, "value": value.decode()})
    except UnicodeDecodeError:
        write_json({**document, "value": None, "value_base64": b64(value)})


@command("exec", secret_use(True),
         opt("--via", kind=Checked("way", one_of(("env", "fd", "stdin", "file"))), default="env", show_default=True,
             help="env: the value; fd: a descriptor's number; file: a path; stdin."),
         opt("--for", "purpose", kind=Checked("text", text_of("a purpose", 2000)), help="Why [default: the command]."), *ASK_OPTIONS,
         arg("cmd", nargs=-1, required=True, metavar="CMD ARGS…"))  # fmt: skip
def exec_command(app: App, cmd: tuple[str, ...], secrets: tuple[tuple[str, str, str], ...], via: str, purpose: str | None, **options: Any) -> int | None:
    """Run CMD with secrets, after consent; ends with its exit status.

    Other programs of the same user can read a process's environment: --via fd, stdin or file keep the value out of it."""
    if via == "stdin" and len(secrets) != 1:
        raise UsageError("--via stdin hands over one secret")
    purpose = purpose or "run " + printable(" ".join(os.fsencode(word).decode(errors="backslashreplace") for word in cmd))[:500]
    specs = [ask_spec(key, action, purpose, **options) for _, key, action in secrets]
    before = harden()
    try:
        program = find_program(cmd[0], os.environ.get("PATH", os.defpath))
        if via != "env":
            os.close(memory_file(b""))  # before anybody is asked
        store, vault = open_vault(app)
        obtained = obtain(app, vault, specs)
        environment = dict(os.environ)
        actions = hand_over({variable: value for (variable, _, _), (_, value) in zip(secrets, obtained, strict=True)}, via, environment)
    except SpawnError as error:
        report(GraceError(str(error)), app.json)
        return error.exit_status
    except GraceError as error:
        report(error, app.json)
        return 125
    soften(before)
    for signum in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(signum, signal.SIG_DFL)
    if app.json:
        status = run_beside(program, cmd, environment, actions)
        write_json({"command": list(cmd), "exit_status": status, "consents": [consent_document(store, get_consent(store, a.consent_id)) for a, _ in obtained]})
        return status
    if actions:
        os.dup2(actions[0], 0)
    sys.stderr.flush()
    try:
        os.execve(program, list(cmd), environment)
    except OSError as error:
        report(GraceError(f"{cmd[0]!r} cannot be executed: {error.strerror}"), app.json)
        return 126


def hand_over(values: dict[str, bytes], via: str, environment: dict[str, str]) -> list[int]:
    """Put the values where the command finds them; the descriptor that is to become its stdin, if any."""
    if via == "env":
        for name, value in values.items():
            if b"\0" in value:
                raise UsageError(f"the value for {name} holds a NUL byte, which no environment can", "hand it over with --via fd, stdin or file")
            environment[name] = os.fsdecode(value)
        return []
    for name, value in values.items():
        fd = memory_file(value) if via == "file" else filled_pipe(value)
        if via == "stdin":
            return [fd]
        os.set_inheritable(fd, True)
        environment[name] = str(fd) if via == "fd" else f"/proc/self/fd/{fd}"
    return []


def memory_file(value: bytes) -> int:
    """A file without a name that never reaches a disk; UsageError where there is no place for one."""
    try:
        fd = os.memfd_create("grace-secret")
    except (OSError, AttributeError):
        fd = nameless_file(os.environ.get("XDG_RUNTIME_DIR", ""))
    os.write(fd, value)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def nameless_file(folder: str) -> int:
    """A file of mode 0600 without a name on a file system in memory, for kernels that make none otherwise (open(2), O_TMPFILE)."""
    if folder and in_memory(folder):
        with contextlib.suppress(OSError, AttributeError):
            return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_EXCL, 0o600)
    raise UsageError("there is no place in memory for a file: neither the kernel's own kind nor a tmpfs at XDG_RUNTIME_DIR", "use --via env")


def in_memory(folder: str) -> bool:
    """Whether a directory lies on a file system that has no disk (proc_mounts(5))."""
    try:
        with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as file:
            mounts = [line.split() for line in file]
        here = os.stat(folder).st_dev
        kinds = [kind for _, place, kind, *_ in mounts if os.path.exists(place) and os.stat(place).st_dev == here]
    except (OSError, ValueError):
        return False
    return bool(kinds) and set(kinds) <= {"tmpfs", "ramfs"}


def filled_pipe(value: bytes) -> int:
    """A descriptor that gives the value once, and nobody again; a file in memory where the pipe is too small for it."""
    source, target = os.pipe()
    os.set_blocking(target, False)
    try:
        whole = os.write(target, value) == len(value)
    except BlockingIOError:
        whole = False
    os.close(target)
    if whole:
        return source
    os.close(source)
    return memory_file(value)


def run_beside(program: str, cmd: tuple[str, ...], environment: dict[str, str], stdin: list[int]) -> int:
    """Run a command with its stdout on our stderr, so that ours holds one document; its exit status as a shell gives it."""
    actions = [(os.POSIX_SPAWN_DUP2, 2, 1), *((os.POSIX_SPAWN_DUP2, fd, 0) for fd in stdin)]
    pid = os.posix_spawn(program, list(cmd), environment, file_actions=actions)
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda number, frame: send(pid, number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the command as well
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code if code >= 0 else 128 - code


# ---- vault: git's credential helper


GIT_REFUSED = "git was refused with it"


@command("credential git", opt("--by", kind=Checked("name", text_of("a requester", 128)), help="Who asks [default: git@LOGIN]."),
         opt("--user", kind="name", help="The approver who is to answer."),
         opt("--timeout", "timeout_ms", kind="duration", default="5m", show_default=True, help="How long the question stands."),
         arg("operation", metavar="get|store|erase"))  # fmt: skip
def credential_git(app: App, operation: str, **options: Any) -> None:
    """Answer git, which calls this itself: git config credential.helper 'grace credential git'.

    A secret answers for the exact host, and path, of its --service https://HOST[/PATH], after consent."""
    if app.json:
        raise UsageError("--json means nothing here: git's credential protocol has a format of its own")
    harden()
    if operation == "store":
        while os.read(0, 1 << 16):  # what git has found to be right; nothing of it is kept
            pass
    elif operation == "get":
        give_to_git(app, read_credential(), options)
    elif operation == "erase":
        doubt(app, read_credential())


def read_credential() -> dict[str, str]:
    """What git writes to a helper's standard input."""
    data = b""
    try:
        while len(data) <= MAX_CREDENTIAL and b"\n\n" not in data and not data.startswith(b"\n") and (more := os.read(0, 1 << 16)):
            data += more
        return parse_credential(data)
    except (OSError, ValueError) as error:
        raise UsageError(f"standard input {getattr(error, 'strerror', None) or error}", "see: git help credential") from None


def secrets_for(app: App, said: dict[str, str]) -> tuple[Store | None, list[Row]]:
    """The secrets that answer most exactly to what git says. Nothing is verified here: whoever asks for one does that."""
    if not os.path.exists(app.path or default_path()):
        return None, []
    store = app.store()
    fits: dict[int, list[Row]] = {}
    for entry in store.all(CURRENT_SECRETS) if store.value(GET_VAULT) else []:
        header = fitting(stored_object(entry["header"]))
        fits.setdefault(service_fit(header.get("service"), header.get("username"), said), []).append(entry)
    return store, fits.get(2) or fits.get(1) or []


def give_to_git(app: App, said: dict[str, str], options: Row) -> None:
    """Write user name and value for git, after consent; nothing when no secret answers. When that fails, git is told to ask nobody else."""
    store, found = secrets_for(app, said)
    if store is None or not found:
        return
    if on_terminal():
        raise UsageError("a value is not shown on a terminal; git calls this by itself", "see it: grace secret get KEY --reveal")
    try:
        username, value = obtain_for_git(app, store, found, said, options)
    except (GraceError, KeyboardInterrupt):
        sys.stdout.write("quit=1\n")
        sys.stdout.flush()
        raise
    sys.stdout.buffer.write((b"username=" + username.encode() + b"\n" if username is not None else b"") + b"password=" + value + b"\n")
    sys.stdout.buffer.flush()


def obtain_for_git(app: App, store: Store, found: list[Row], said: dict[str, str], options: Row) -> tuple[str | None, bytes]:
    """The user name and the value of the one secret that answers, after consent."""
    keys = [str(entry["secret_key"]) for entry in found]
    if len(keys) > 1:
        raise ConflictError(f"several secrets answer for {git_url(said)}: {', '.join(keys)}", "put one's user name into the remote's URL, or remove the others")
    header = fitting(stored_object(found[0]["header"]))
    refuse_line_breaks(keys[0], "user name", str(header.get("username")).encode())
    asking, value = obtain(app, vault_in(store), [{**git_spec(keys[0], said, **options), "service": header["service"]}])[0]
    username = asking.header["username"]
    if username != header.get("username"):
        raise ConflictError(f"{keys[0]} was changed meanwhile", "try again")
    refuse_line_breaks(keys[0], "value", value)
    return username, value


def refuse_line_breaks(key: str, what: str, data: bytes) -> None:
    """What git would take for more lines than one is never written to it."""
    if re.search(rb"[\0\r\n]", data):
        raise DeniedError(f"the {what} of {key} holds a line break or a NUL, which git's protocol cannot carry", f"store it anew: grace secret set {key}")


def git_spec(key: str, said: dict[str, str], by: str | None, user: str | None, timeout_ms: int) -> Row:
    """What to ask for on behalf of the git that calls, as far as it and its own children's command lines tell.

    That git is reported as the program, and not the shell in between, by which all scripts would be counted as one."""
    calls = [(pid, words) for pid in ancestors_of(os.getpid(), 32) if (words := git_words(arguments_of(pid)))]
    pid, words = next((call for call in calls if git_action(call[1]) != "git"), calls[-1] if calls else (os.getppid(), []))
    url, action = git_url(said, [words for _, words in calls]), git_action(words)
    reading = f"git {words[0]} update" if words[:1] in (["remote"], ["submodule"]) else f"git {' '.join(words[:1])}"
    purpose = {"git_push": f"git push to {url}", "git_fetch": f"{reading} from {url}", "git": f"use git with {url}"}[action]
    spec = ask_spec(key, action, purpose, by or f"git@{login_name()}"[:128], user, None, "{}", timeout_ms)
    context = {"url": url, "folder": printable(spec["reported"]["cwd"]), "command": shown_git(words) if words else None}
    return {**spec, "context": to_json(context), "reported": {**spec["reported"], "program": program_name(pid), "exe": program_hash(pid)}}


def git_url(said: dict[str, str], calls: Iterable[list[str]] = ()) -> str:
    """The URL that is asked for, without a login; where git does not say the path, its own program for the protocol does."""
    protocol, host, path = said["protocol"].lower(), same_host(said["host"]), said.get("path", "")
    for words in calls:
        if words[0] in ("remote-http", "remote-https") and not path:
            parts = service_parts(re.sub("[?#].*|(?<=://)[^/?#]*@", "", words[-1], flags=re.DOTALL))
            path = parts[2] if parts and parts[:2] == (protocol, host) else ""
    return printable(f"{protocol}://{host}/{re.sub('[?#].*', '', path, flags=re.DOTALL)}".rstrip("/")[:500])


def doubt(app: App, said: dict[str, str]) -> None:
    """Mark the secret that git was refused with, if it was ever used; it is neither changed nor removed."""
    store, found = secrets_for(app, said)
    if store is not None and len(found) == 1 and store.write(lambda tx: suspect(tx, found[0], GIT_REFUSED)):
        pin_head(store)


# ---- consent


def show_consent(app: App, store: Store, row: Row) -> None:
    document = consent_document(store, row)
    app.show(
        document,
        lambda: write_out(
            f"{printable(document['consent_id'])}  {document['consent_status']}  {document['risk_level']}  {document['secret_key']}  code {document['code']}"
        ),
    )


def pin_head(store: Store) -> None:
    """Let this machine remember the log as it is now, so that an older copy is noticed."""
    harden()
    with contextlib.suppress(GraceError):
        Vault(store).learn_head()


def with_star(document: Row, name: str) -> str:
    """The action or requester of a consent, with a star where it stands for all that begin so."""
    return str(document[f"requested_{name}"]) + ("*" if (document["terms"] or {}).get(name) == "prefix" else "")


def show_consents(app: App, store: Store, rows: list[Row], empty: str, statuses: bool = True) -> None:
    documents = [consent_document(store, row) for row in rows]
    lines = [(printable(d["consent_id"]), *([d["consent_status"]] if statuses else []), "standing" if d["mode"] == "standing" else d["risk_level"],
              d["secret_key"], printable(with_star(d, "by")), printable(with_star(d, "action")), printable(d["requested_for"])) for d in documents]  # fmt: skip
    app.show(documents, lambda: show_table(("ID", *(["STATUS"] if statuses else []), "RISK", "SECRET", "BY", "ACTION", "FOR"), lines, empty))


def consent_store(app: App) -> Store:
    """The store of a database that has a vault, with what is over ended."""
    store = app.store()
    if not store.value(GET_VAULT):
        raise LockedError("there is no vault yet", "make one: grace init")
    store.overwrite_deleted()
    shred_if_due(store)
    if (store.one(CONSENTS_OVER, now=clock()) or not all(map(asker_lives, store.all(PENDING)))) and store.write(expire_consents):
        shred(store)
        pin_head(store)
    return store


@command("consent request", arg("key", SECRET_NAME), *USE_OPTIONS,
         opt("--standing", "grant_for", kind="duration", help="Ask for a standing consent: from its approval on, for so long, nobody is asked."),
         opt("--uses", kind="limit", help="With --standing: at most so many uses."),
         opt("--follow-rotation", "follow", is_flag=True, help="With --standing: also after the secret has got a new value."))  # fmt: skip
def consent_request(app: App, key: str, grant_for: int | None, uses: int | None, follow: bool, **options: Any) -> None:
    """File a request that is collected later: secret get KEY --consent ID."""
    if (uses or follow) and not grant_for:
        raise UsageError("--uses and --follow-rotation go with --standing")
    spec = ask_spec(key, mode="collect", hidden=False, **options)
    store, vault = open_vault(app)
    if grant_for is None:
        show_consent(app, store, get_consent(store, ask_for(vault, spec).consent_id))
        return
    terms = {"uses": uses, "action": "exact", "by": "exact", "follow": follow, "template": None, "origin": None, "until": None}
    with refusals(store, key, plain=True):
        standing = {**standing_spec(vault, spec, grant_for, terms), "limited": True}
        row = store.write(lambda tx: file_standing(tx, vault, standing))
    vault.learn_head()
    show_consent(app, store, row)


def standing_spec(vault: Vault, spec: Row, grant_for: int, terms: Row) -> Row:
    """What file_standing() takes, from the options of a command."""
    _, header = vault.current(vault.store, spec["key"])
    claimed = {"by": spec["by"], "for": spec["purpose"], "action": spec["action"], "user": spec["user"], "context": spec["context"]}
    return {"key": spec["key"], "claimed": claimed, "reported": spec["reported"], "risk": spec["risk"], "timeout_ms": spec["timeout_ms"],
            "user": choose_user(vault.roster, header, spec["user"], spec["login"]), "grant_for": grant_for, "terms": terms}  # fmt: skip


@command("consent pending")
def consent_pending(app: App) -> None:
    """The requests that can still be answered."""
    store = consent_store(app)
    show_consents(app, store, store.all(PENDING), "nobody is waiting for an answer", statuses=False)


@command("consent show", arg("id", "id"))
def consent_show(app: App, id: str) -> None:
    """One consent: what was asked, by whom, and what became of it."""
    store = consent_store(app)
    document = consent_document(store, get_consent(store, id))
    app.show(document, lambda: show_record(document))


@command("consent history", opt("--secret", "key", kind=SECRET_NAME, help="Only of this secret."),
         opt("--status", kind=Checked("status", one_of(CONSENT_STATUS)), help="Only in this status."),
         opt("--limit", kind="limit", default="50", show_default=True, help="At most so many, newest first."))  # fmt: skip
def consent_history(app: App, key: str | None, status: str | None, limit: int) -> None:
    """All consents, newest first."""
    store = consent_store(app)
    rows = store.all("""SELECT * FROM secret_consent_records WHERE (CAST(:key AS TEXT) IS NULL OR secret_key = :key)
      AND (CAST(:status AS TEXT) IS NULL OR consent_status = :status) ORDER BY seq DESC LIMIT :n""", key=key, status=status, n=limit)  # fmt: skip
    show_consents(app, store, rows, "nobody has asked for anything yet")


@command("consent stats")
def consent_stats(app: App) -> None:
    """How many were asked and answered, by whom, and how long answers took."""
    store = consent_store(app)
    rows = store.all("SELECT * FROM secret_consent_records ORDER BY seq")
    asked = [(row, listed_request(row)) for row in rows]
    answers = sorted(ms for row, request in asked if (ms := answer_ms(row, request)) is not None)
    streaks = same_answers(asked)

    def tally(values: Iterable[str]) -> dict[str, int]:
        counts: dict[str, int] = {}
        for value in values:
            counts[value] = counts.get(value, 0) + 1
        return dict(sorted(counts.items()))

    document = {"total": len(rows), "by_status": {**dict.fromkeys(CONSENT_STATUS, 0), **tally(row["consent_status"] for row in rows)},
                "by_risk": {**dict.fromkeys(RISK_LEVELS, 0), **tally(request["risk"] for _, request in asked)},
                "by_method": tally(row["approval_method"] for row in rows if row["approval_method"]),
                "automatic": sum(row["approval_method"] == "auto" for row in rows),
                "by_secret": tally(row["secret_key"] for row in rows), "by_requester": tally(request["claimed"]["by"] for _, request in asked),
                "median_answer_ms": answers[len(answers) // 2] if answers else None, "slowest_answer_ms": answers[-1] if answers else None,
                "streaks": streaks, "suggestions": [text for streak in streaks if (text := suggestion(streak))]}  # fmt: skip

    def plain() -> None:
        for name in ("total", "by_status", "by_risk", "by_method", "by_secret", "by_requester"):
            parts = document[name]
            told = ", ".join(f"{printable(word)} {n}" for word, n in parts.items() if n) if isinstance(parts, dict) else str(parts)
            write_folded(f"{name.replace('_', ' '):<15} {told or '-'}", 16)
        for name in ("median", "slowest"):
            write_out(f"{name + ' answer':<15} {format_duration(document[name + '_answer_ms'])}")
        lines = [(str(s["approvals"]), s["secret_key"], printable(s["action"]), printable(s["requested_by"]), format_duration(s["median_answer_ms"]))
                 for s in streaks]  # fmt: skip
        if lines:
            write_out("")
            show_table(("APPROVED IN A ROW", "SECRET", "ACTION", "BY", "ANSWERED WITHIN"), lines, "")
        for text in document["suggestions"]:
            write_out(f"\nalways the same answer? approve it beforehand, for as long and as often as you like:\n  {text}")

    app.show(document, plain)


def ask_person(question: str, until_ms: int) -> str:
    """A line typed on the terminal; what was typed ahead is thrown away, and no answer in time is an empty one."""
    import select
    import termios

    fd = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY)
    try:
        termios.tcflush(fd, termios.TCIFLUSH)
        os.write(fd, question.encode())
        ready, _, _ = select.select([fd], [], [], max(0.0, (until_ms - clock()) / 1000))
        typed = os.read(fd, 1000).decode(errors="replace") if ready else ""
        os.write(fd, b"" if typed.endswith("\n") else b"\n")
        return typed.strip()
    except KeyboardInterrupt:
        os.write(fd, b"\n")
        raise
    finally:
        os.close(fd)


def confirmed(review: Review, code: str | None, source: str | None) -> None:
    """The person's yes: the code where one was given, or at high and critical risk; otherwise a word. DeniedError for anything else."""
    if code is not None:
        if not same_code(code, review.code):
            raise DeniedError("the code is not the one of this request", "compare it with what the requester shows; nothing was approved")
        return
    if not has_terminal():
        return  # the command itself, with a passphrase file, is the answer
    until, waits = review.request["answer_by"], f"it still waits; to refuse it: grace consent deny {review.request['consent_id']} --reason TEXT"
    if review.risk in ("high", "critical"):
        if not same_code(ask_person("Type the code that the requester shows, to approve: ", until), review.code):
            raise DeniedError("that is not the code; nothing was approved", waits)
    elif source is None and ask_person("Type yes to approve: ", until).lower() != "yes":
        raise DeniedError("nothing was approved", waits)


def default_approver(vault: Vault, row: Row, name: str | None, group: str | None) -> str:
    """Who answers: as named, else the one whom the request names, else whoever acts here."""
    wanted = request_of(row["request"])["user"]
    person = person_of(vault.roster, wanted) if wanted and group in (None, "user") else None
    if name is None and person and os.path.exists(os.path.join(vault.folder, f"{person['name']}.key")):
        return str(person["name"])
    if name is None and group is not None:
        here = [p["name"] for p in active(vault.roster) if group in p["roles"] and os.path.exists(os.path.join(vault.folder, f"{p['name']}.key"))]
        name = here[0] if len(here) == 1 else None
    return choose_approver(vault, name)


def judge(vault: Vault, approver: Approver, row: Row) -> tuple[Review, Row]:
    """A pending request as this approver may trust it, and what this machine sees of its process."""

    def show(tx: Tx) -> Row:
        if not extends(tx, approver.seen.audit):
            raise RefusedError("rolled back: the audit log is not the one that this approver has seen")
        return build_case(tx, row["consent_id"], approver.name, seen=approver.seen)

    with refusals(vault.store, row["consent_id"], plain=False):
        case = vault.store.write(show)
        review = Review(approver, case, clock())
    return review, observe(review.request["reported"], os.geteuid())


Judged = tuple[Review, Row, list[str]]  # verified, observed, and the groups to sign for


TWINS_SHARE = ("header", "sealed", "claimed", "risk", "mode", "user", "grant_for", "requires", "together")
SIBLINGS_SHARE = ("risk", "mode", "user", "grant_for", "together")


def same_fields(one: Row, other: Row, names: Iterable[str]) -> bool:
    return all(one.get(name) == other.get(name) for name in names)


def named_with(request: Row, other: Row) -> bool:
    """Whether a request names another one as asked together with it."""
    return [other.get("key"), other["claimed"]["action"]] in request["together"]


def twins(vault: Vault, first: Judged, row: Row, group: str | None) -> list[Judged]:
    """Pending requests that ask the same in the same words, from the same running program: judged before the person is asked."""
    review, seen, _ = first
    found: list[Judged] = []
    for other in vault.store.all(PENDING):
        if other["consent_id"] == row["consent_id"] or not same_fields(listed_request(other), review.request, TWINS_SHARE):
            continue
        with contextlib.suppress(GraceError):
            twin, its = judge(vault, review.approver, other)
            same = same_fields(twin.request, review.request, TWINS_SHARE)
            processes = {(one["reported"].get("pid"), one["reported"].get("started")) for one in (review.request, *(known.request for known, _, _ in found))}
            another = (twin.request["reported"].get("pid"), twin.request["reported"].get("started")) not in processes
            if same and another and its["alive"] and its["ancestors"][:1] == seen["ancestors"][:1]:
                found.append((twin, its, twin.groups(group)))
    return found


def siblings(vault: Vault, first: Judged, row: Row, group: str | None) -> list[Judged]:
    """The other pending requests of the same task or running process, for the same purpose: judged before the person is asked."""
    review, seen, _ = first
    together, found = asked_together(review.request), []  # type: tuple[Any, ...] | None, list[Judged]
    for other in vault.store.all(PENDING):
        listed = listed_request(other)
        if other["consent_id"] == row["consent_id"] or together is None or asked_together(listed) != together or \
                not same_fields(listed, review.request, SIBLINGS_SHARE) or not named_with(review.request, listed):  # fmt: skip
            continue
        with contextlib.suppress(GraceError):
            sibling, its = judge(vault, review.approver, other)
            claims = [{**one.request["claimed"], "action": None} for one in (review, sibling)]
            same = same_fields(sibling.request, review.request, SIBLINGS_SHARE) and claims[0] == claims[1] and named_with(review.request, sibling.request)
            new = all((sibling.request["key"], sibling.request["claimed"]["action"]) != (known.request["key"], known.request["claimed"]["action"])
                      for known in (review, *(one for one, _, _ in found)))  # fmt: skip
            if same and new and its["alive"] == seen["alive"] and asked_together(sibling.request) == together:
                found.append((sibling, its, sibling.groups(group)))
    return found


def asked_together(request: Row) -> tuple[Any, ...] | None:
    """What requests have in common that belong together: a daemon's task, or the process that waits for them; None for any other."""
    reported = request["reported"]
    if request.get("mode") == "collect":
        return ("task", reported["task"]) if reported.get("task") else None
    return ("process", reported.get("pid"), reported.get("started"), reported.get("boot")) if request.get("mode") == "once" else None


def along_with(vault: Vault, judged: Judged, row: Row, group: str | None) -> list[Judged]:
    """What one yes answers besides: only at medium risk, what was asked together, or the same again from a running program."""
    review, seen, _ = judged
    if review.risk != "medium" or review.request["mode"] == "standing":
        return []
    together = siblings(vault, judged, row, group)
    return together or (twins(vault, judged, row, group) if seen["alive"] else [])


def sign_and_record(vault: Vault, review: Review, groups: list[str], seen: Row, note: str | None, source: str | None) -> Row:
    """Sign for each group, with the passphrase once more for each further one, and record the grants."""
    name, signed = review.approver.name, []
    observed = {**seen, "approver": name, **({"note": note} if note else {})}
    with refusals(vault.store, review.case["consent_id"], plain=False):
        for number, group in enumerate(groups):
            if number and source != "-":
                unlock(vault, name, source)
            signed.append(review.sign(group, clock()))
        row: Row = vault.store.write(lambda tx: record_grants(tx, vault, review.case["consent_id"], signed, observed))
    review.learn()
    vault.learn_head(review.header)
    return row


@command("consent approve", arg("id", "id", required=False),
         opt("--as", "group", kind=Checked("group", one_of(ROLES)), help="Sign for this group: user or governance."),
         opt("--once", is_flag=True, help="For this one use (the default)."),
         opt("--for", "grant_for", kind="duration", help="This one, and from now on for so long whatever asks the same; nobody is asked then."),
         opt("--uses", kind="limit", help="With --for: at most so many further uses."),
         opt("--follow-rotation", "follow", is_flag=True, help="With --for: also after the secret has got a new value."),
         opt("--code", kind=Checked("code", text_of("a code", 40)), help="The code that the requester shows."),
         opt("--note", kind="note", help="A remark for the record."),
         opt("--in", "in_file", metavar="FILE", help="A request that was exported on another machine; - for stdin."),
         opt("--out", metavar="FILE", help="Where the approval goes [default: stdout]."), SIGNER, PASSPHRASE)  # fmt: skip
def consent_approve(app: App, id: str | None, group: str | None, once: bool, grant_for: int | None, uses: int | None, follow: bool, code: str | None,
                    note: str | None, in_file: str | None, out: str | None, approver: str | None, passphrase_file: str | None) -> None:  # fmt: skip
    """Say yes to a request, with the key that only your passphrase unlocks."""
    if (once or in_file) and grant_for:
        raise UsageError(f"--for does not go with {'--once' if once else '--in'}", "" if once else "file it with: grace consent request KEY --standing DUR")
    if (uses or follow) and not grant_for:
        raise UsageError("--uses and --follow-rotation go with --for")
    if (id is None) == (in_file is None):
        raise UsageError("name a consent's ID, or --in FILE")
    if (out is not None and in_file is None) or (note is not None and in_file is not None):
        raise UsageError("--out goes with --in FILE, and --note does not")
    if in_file is not None:
        approve_elsewhere(app, in_file, out, group, code, approver, passphrase_file)
        return
    store, vault = open_vault(app)
    store.write(expire_consents)
    row = still_pending(get_consent(store, str(id)), clock())
    person = unlock(vault, default_approver(vault, row, approver, group), passphrase_file)
    review, seen = judge(vault, person, row)
    groups = review.groups(group)
    if grant_for:
        approve_from_now_on(app, vault, (review, seen, groups), {"grant_for": grant_for, "uses": uses, "follow": follow}, code, note, passphrase_file)
        return
    same = along_with(vault, (review, seen, groups), row, group) if code is None else []
    show_prompt(app, review, seen, False, [twin for twin, _, _ in same])
    confirmed(review, code, passphrase_file)
    done = sign_and_record(vault, review, groups, seen, note, passphrase_file)
    for twin, its, signing in same:
        try:
            sign_and_record(vault, twin, signing, its, note, passphrase_file)
        except GraceError as error:
            sys.stderr.write(f"grace: {twin.request['consent_id']} was not approved: {error.message}\n")
    show_consent(app, store, done)


def approve_from_now_on(app: App, vault: Vault, judged: Judged, wish: Row, code: str | None, note: str | None, source: str | None) -> None:
    """Sign a request, and a standing consent for whatever asks the same; the person sees both and says yes once."""
    review, seen, groups = judged
    with refusals(vault.store, review.case["consent_id"], plain=False):
        filed = vault.store.write(lambda tx: standing_from(tx, vault, review.request, wish))
    try:
        standing, its = judge(vault, review.approver, filed)
        if problem := odd_standing(standing.request, review.request, wish):
            raise RefusedError(problem, f"what it asks for is not this: grace consent show {filed['consent_id']}")
        signing = standing.groups(groups[0] if len(groups) == 1 else None)
        show_prompt(app, review, seen, False, terms=mode_lines(standing.request))
        confirmed(review, code, source)
    except BaseException:
        if not vault.store.all(GRANTS_OF, id=filed["consent_id"]):
            withdraw_open(vault.store, [filed["consent_id"]])
        raise
    sign_and_record(vault, review, groups, seen, note, source)
    try:
        done = sign_and_record(vault, standing, signing, its, note, source)
    except GraceError as error:
        withdraw_open(vault.store, [filed["consent_id"]])
        raise ConflictError(f"{review.case['consent_id']} was approved, this once only: {error.message}", error.hint) from error
    show_consent(app, vault.store, done)


def standing_from(tx: Tx, vault: Vault, request: Row, wish: Row) -> Row:
    """The standing consent that goes with this request: as another approver has begun it on the same terms, or a new one."""
    if request["mode"] == "standing":
        raise UsageError("this is a standing consent already", "leave --for out")
    for begun in tx.all(STANDING_FROM, id=request["consent_id"]):
        with contextlib.suppress(RefusedError):
            known = request_of(begun["request"])
            if tx.all(GRANTS_OF, id=begun["consent_id"]) and not odd_standing(known, request, {**terms_of(known), "grant_for": known["grant_for"]}):
                if problem := odd_standing(known, request, wish):
                    raise ConflictError(problem, f"another approver has begun it: grace consent show {begun['consent_id']}")
                return begun
    terms = {"action": "exact", "by": "exact", "template": None, "origin": request["consent_id"], "until": None,
             "uses": wish["uses"], "follow": wish["follow"]}  # fmt: skip
    return file_standing(tx, vault, {**{name: request[name] for name in ("key", "claimed", "reported", "risk", "user")}, "grant_for": wish["grant_for"],
                                     "timeout_ms": max(MINUTE, request["answer_by"] - tx.now), "terms": terms})  # fmt: skip


def terms_of(standing: Row) -> Row:
    return {name: standing["standing"][name] for name in ("uses", "follow")}


def odd_standing(standing: Row, request: Row, wish: Row) -> str | None:
    """Why a standing request is not the one that goes with this request and this wish, or None."""
    same = ("vault_id", "key", "version", "header", "sealed", "claimed", "reported", "risk", "user", "requires")
    terms = {"action": "exact", "by": "exact", "template": None, "origin": request["consent_id"], "until": None,
             "uses": wish["uses"], "follow": wish["follow"]}  # fmt: skip
    if any(standing[name] != request[name] for name in same):
        return "the standing consent is for something else than the request"
    if standing["standing"] != terms or standing["grant_for"] != min(wish["grant_for"], LONGEST_STANDING):
        return "the standing consent has other terms"
    return None


def show_prompt(app: App, review: Review, seen: Row, elsewhere: bool, others: Iterable[Review] = (), terms: Iterable[str] = ()) -> None:
    """On the terminal where there is a person, whatever stderr is; else on stderr, unless it is to hold an error object only."""
    lines = prompt_lines(review, seen, elsewhere) + (["AND from now on, whatever asks the same", *terms] if terms else [])
    for other in others:
        if other.request["header"] == review.request["header"] and other.request["claimed"] == review.request["claimed"]:
            lines += [f"AND the same in the same words, answered with this one; compare its code, too: {other.code}"]
        else:
            lines += ["AND asked together with it, answered with this one; compare its code, too:", *sealed_lines(other)]
            lines += quoted_lines("action", other.request["claimed"]["action"])
    show_lines(app, lines)


def show_lines(app: App, lines: list[str]) -> None:
    text = "\n".join(lines) + "\n"
    if has_terminal():
        with open("/dev/tty", "w", encoding="utf-8", errors="backslashreplace") as terminal:
            terminal.write(text)
    elif not app.json:
        sys.stderr.write(text)
        sys.stderr.flush()


def approve_elsewhere(app: App, source: str, out: str | None, group: str | None, code: str | None, name: str | None, passphrase_source: str | None) -> None:
    """Approve an exported request with nothing but the own key file; the approval is a text to be imported."""
    if source == "-" and passphrase_source == "-":
        raise UsageError("the request and the passphrase cannot both come from stdin")
    try:
        case = parse_case(read_argument("-" if source == "-" else f"@{source}", MAX_JSON))
    except ValueError as error:
        raise UsageError(f"--in: {error}") from None
    harden()
    vault_id = request_of(case["request"])["vault_id"]
    if not re.fullmatch(VAULT_ID, vault_id):
        raise RefusedError("this is no exported request", EXPORT_ANEW)
    folder = vault_folder(vault_id)
    here = keys_here(folder, stored_object(case["rosters"][-1]["document"]) if case["rosters"] else {})
    if name is None and len(here) != 1:
        raise UsageError(
            "which approver?" if here else "no key of this vault is on this machine",
            "name one with --approver" if here else "install it: grace approver import FILE",
        )
    who = name or here[0]
    person = Approver(who, folder, os.path.basename(folder), passphrase(passphrase_source, who))
    review = Review(person, case, clock())
    groups = review.groups(group)
    show_prompt(app, review, {}, True)
    confirmed(review, code, passphrase_source)
    signed = [review.sign(one, clock()) for one in groups]
    review.learn(elsewhere=True)
    write_text(app, out, {"format": "grace-approval/1", "consent_id": case["consent_id"], "approver": who, "grants": signed})


@command("consent export", arg("id", "id"), opt("--approver", kind="name", help="Only the parts of this one [default: all who may answer]."),
         opt("--out", metavar="FILE", help="Write there instead of to stdout."))
def consent_export(app: App, id: str, approver: str | None, out: str | None) -> None:
    """A pending request as text, for an approver on another machine."""
    store = consent_store(app)
    row = still_pending(get_consent(store, id), clock())
    person = person_named(newest_roster(store), approver) if approver else None
    if approver and person is None:
        raise NotFoundError(f"there is no approver {approver!r}", "see them with: grace approver list")
    member = fingerprint(person) if person else None
    write_text(app, out, store.write(lambda tx: build_case(tx, row["consent_id"], approver or "export", member)))


@command("consent import", arg("file", metavar="FILE"))
def consent_import(app: App, file: str) -> None:
    """Take in an approval that was made on another machine."""
    store, vault = open_vault(app)
    try:
        block = parse_json(read_argument("-" if file == "-" else f"@{file}", MAX_JSON))
    except ValueError as error:
        raise UsageError(f"FILE: {error}") from None
    with refusals(store, "import", plain=False):
        shaped(block, {"format": TEXT, "consent_id": TEXT, "approver": TEXT, "grants": (list,)}, "this text")
        signed = [shaped(item, SIGNED_SHAPE, "this text") for item in block["grants"]]
        if block["format"] != "grace-approval/1" or not signed:
            raise RefusedError("this is no approval")
        row = get_consent(store, block["consent_id"])
        done = store.write(
            lambda tx: record_grants(
                tx, vault, row["consent_id"], signed, {"elsewhere": True, "requester_is_approver_uid": None}
            )
        )
    vault.learn_head()
    show_consent(app, store, done)


TEMPLATE_ROWS = """SELECT * FROM secret_consent_records WHERE mode = 'standing' AND json(request) -> 'standing' ->> 'template' IS NOT NULL
  ORDER BY seq"""
SAY_REMOVED = "UPDATE secret_consent_records SET revocation_reason = :why WHERE consent_id = :id"
TEMPLATE_INCOMPLETE = "it was not signed by all"
TEMPLATE_ANSWER = HOUR  # to sign one, from the command on
TEMPLATE_REMOVED = "the template was removed"
TEMPLATE_SIGNERS = (opt("--approver", kind="name", multiple=True, help="Who signs (repeatable) [default: the login name]."),
                    opt("--passphrase-file", metavar="FILE", multiple=True, help="Their passphrases, in the same order."))  # fmt: skip


def parse_pattern(text: str) -> tuple[str, str]:
    """('exact', text), or ('prefix', text) for one that ends in a star behind at least three characters."""
    stem = text.removesuffix("*")
    if not stem or "*" in stem or "?" in stem or (stem != text and len(stem) < SHORTEST_PREFIX):
        raise ValueError(f"{text[:60]!r} is neither an exact text nor at least three characters and a star at the end, such as backup*")
    return ("exact" if stem == text else "prefix"), check_text(stem, "it", 128)


def parse_action_pattern(text: str) -> tuple[str, str]:
    kind, stem = parse_pattern(text)
    return kind, named("an action", stem)


PATTERN, ACTION_PATTERN = Checked("pattern", parse_pattern), Checked("pattern", parse_action_pattern)


def templates_of(reader: Reader, holds: Callable[[Row], bool] = lambda row: True) -> dict[str, dict[str, Row]]:
    """The templates that were not removed: by name, of each secret the newest standing consent that was ever approved.

    Unverified, unless `holds` looks at each row."""
    found: dict[str, dict[str, dict[str, Row]]] = {}
    for row in reader.all(TEMPLATE_ROWS):
        terms = listed_request(row).get("standing", {})
        if row["approved_at"] is not None and row["grant_expires_at"] is not None and holds(row) and row["revocation_reason"] != TEMPLATE_INCOMPLETE:
            found.setdefault(str(terms.get("template")), {}).setdefault(str(terms.get("origin")), {})[row["secret_key"]] = row
    last = {name: list(added.values())[-1] for name, added in found.items()}  # a name that was used again is another template
    return {name: rows for name, rows in last.items() if any(row["revocation_reason"] != TEMPLATE_REMOVED for row in rows.values())}


def open_template_rows(reader: Reader, name: str) -> list[Row]:
    return [row for row in reader.all(TEMPLATE_ROWS)
            if row["consent_status"] in ("pending", "approved") and listed_request(row).get("standing", {}).get("template") == name]  # fmt: skip


def refuse_rivals(tx: Tx, name: str, alone: Iterable[str] = ()) -> None:
    """Nobody else is signing this template, and it is not there, or not for these secrets; what a killed command left behind goes."""
    for row in open_template_rows(tx, name):
        if row["consent_status"] == "pending" and not lives(row["pid"], row["pid_started"] or 0):
            close_consent(tx, row, REVOKE, "revoked", "withdrawn", now=tx.now)
        elif row["consent_status"] == "pending" or not alone or row["secret_key"] in alone:
            raise ConflictError(f"there is a template {name} already, or somebody is signing one", f"see: grace consent template list, or remove {name}")


def template_document(reader: Reader, name: str, rows: dict[str, Row]) -> Row:
    now, some = clock(), next(iter(rows.values()))
    request = listed_request(some)
    terms = request.get("standing", {"action": "exact", "by": "exact"})
    bound = {what: request["claimed"][what] + ("*" if terms[what] == "prefix" else "") for what in ("action", "by")}
    ended = {key: str(row["revocation_reason"]) for key, row in rows.items() if row["consent_status"] == "revoked" and row["grant_expires_at"] > now}
    stale = [key for key, why in ended.items() if undecided(why)]
    return {"template": name, "action": bound["action"], "requested_by": bound["by"],
            "expires_at": format_instant(max(row["grant_expires_at"] for row in rows.values())), "needs_refresh": stale,
            "secrets": [{"secret_key": key, "secret_version": row["secret_version"], "consent_id": row["consent_id"], "consent_status": row["consent_status"],
                         "used_count": row["used_count"], "max_uses": row["max_uses"]} for key, row in rows.items()]}  # fmt: skip


def show_templates(app: App, documents: list[Row], one: bool = False) -> None:
    rows = [(printable(d["template"]), s["secret_key"], s["consent_status"] + (" (needs a refresh)" if s["secret_key"] in d["needs_refresh"] else ""),
             printable(d["action"]), printable(d["requested_by"]), f"{s['used_count']}/{s['max_uses']}", d["expires_at"] or "-")
            for d in documents for s in d["secrets"]]  # fmt: skip
    headings = ("TEMPLATE", "SECRET", "STATUS", "ACTION", "BY", "USED", "UNTIL")
    app.show(documents[0] if one else documents, lambda: show_table(headings, rows, "no templates; make one: grace consent template add NAME …"))


def sign_templates(app: App, vault: Vault, people: list[Approver], specs: list[Row], source: str | None, check: Callable[[Tx], None]) -> None:
    """File standing consents, show them all, and after one yes sign them. When one is not complete, none of them stays."""
    store = vault.store

    def put(tx: Tx) -> list[str]:
        check(tx)
        return [file_standing(tx, vault, spec)["consent_id"] for spec in specs]

    with refusals(store, "template", plain=False):
        filed = store.write(put)
    try:
        shown: dict[str, str] = {}
        reviews = [judge(vault, people[0], get_consent(store, consent_id))[0] for consent_id in filed]
        shown.update((review.request["consent_id"], review.hash) for review in reviews)
        show_lines(app, template_lines(reviews))
        confirmed(reviews[0], None, source)
        for consent_id in filed:
            for person in people:
                sign_template(vault, person, consent_id, shown[consent_id], source)
            row = get_consent(store, consent_id)
            if row["consent_status"] != "approved":
                raise DeniedError(f"{row['secret_key']} takes more approvers", "name them: --approver NAME --approver NAME")
    except BaseException:
        for consent_id in filed:
            with contextlib.suppress(GraceError):
                store.write(functools.partial(revoke, consent_id=consent_id, reason=TEMPLATE_INCOMPLETE))
        raise


def template_lines(reviews: list[Review]) -> list[str]:
    """What an approver is shown of a template that he makes himself: the secrets, and the terms, which are the same for all but the uses."""
    lines = ["SEALED (signed by the owners, verified)"]
    for review in reviews:
        header = review.header
        lines += [f"  secret    {header['key']}  version {header['version']}  {review.risk}  policy {policy_text(header['policy'])}",
                  f"            at most {review.request['standing']['uses']} times"]  # fmt: skip
    return [*lines, "APPROVED BEFOREHAND with your signature", *mode_lines(reviews[0].request)]


def sign_template(vault: Vault, person: Approver, consent_id: str, shown: str, source: str | None) -> None:
    """One approver's signature under what was shown, where one of his is missing."""
    row = get_consent(vault.store, consent_id)
    if row["consent_status"] != "pending":
        return
    review, seen = judge(vault, person, row)
    if review.hash != shown:
        raise RefusedError("the request was changed after it was shown")
    mine = person.keys.fingerprint
    for group in missing_groups(review.header, review.request, review.grants):
        if mine in may_sign(review.header, review.request, review.roster, group):
            with contextlib.suppress(DeniedError, ConflictError):
                sign_and_record(vault, review, review.groups(group), seen, None, source)
                return


@command("consent template add", arg("name", "name"),
         opt("--secret", "keys", kind=SECRET_NAME, multiple=True, required=True, help="For this one (repeatable)."),
         opt("--action", kind=ACTION_PATTERN, required=True, help="For this action; backup* for all that begin so."),
         opt("--by", kind=PATTERN, required=True, help="For this requester; nightly-* for all that begin so."),
         opt("--for", "grant_for", kind="duration", required=True, help="For so long."),
         opt("--uses", kind="limit", required=True, help="At most so many uses of each secret."),
         opt("--user", kind="name", help="Only for requests that name this approver."), *TEMPLATE_SIGNERS)  # fmt: skip
def consent_template_add(app: App, name: str, keys: tuple[str, ...], action: tuple[str, str], by: tuple[str, str], grant_for: int, uses: int, user: str | None,
                         approver: tuple[str, ...], passphrase_file: tuple[str, ...]) -> None:  # fmt: skip
    """Approve beforehand what asks for these secrets of medium risk in this way; nobody is asked then."""
    store, vault = open_vault(app)
    people = unlock_all(vault, approver, passphrase_file)
    terms = {"uses": uses, "action": action[0], "by": by[0], "follow": False, "template": name, "origin": os.urandom(8).hex(), "until": None}
    asked: Row = {"purpose": f"template {name}", "by": by[1], "user": user, "risk": None, "context": "{}", "timeout_ms": TEMPLATE_ANSWER}
    specs = [standing_spec(vault, ask_spec(key, action[1], **asked), grant_for, terms) for key in dict.fromkeys(keys)]

    def check(tx: Tx) -> None:
        refuse_rivals(tx, name)
        if name in templates_of(tx):
            raise ConflictError(f"there is a template {name} already", f"grace consent template refresh {name}, or remove {name}")

    sign_templates(app, vault, people, specs, passphrase_file[0] if passphrase_file else None, check)
    show_templates(app, [template_document(store, name, templates_of(store)[name])], one=True)


def was_signed(vault: Vault, row: Row) -> bool:
    """Whether a standing consent, over or not, was filed and signed as it stands in its row."""
    store = vault.store
    first = store.one(GET_VERSION, key=row["secret_key"], version=row["secret_version"])
    filed = store.one(LEAVES_OF, subject=row["consent_id"], n=1)
    try:
        under = received_delegation(carried_delegation(store, first)) if first else None
        entry = first or {"header": "", "sealed_hash": "", "signature": b""}
        header = check_seal(entry["header"], entry["sealed_hash"], bytes(entry["signature"]), vault.id, vault.roster, under, vault.rosters)
        request = checked_request(row["request"], header, entry["sealed_hash"], vault.id)
        grants = checked_grants(header, request, vault.roster, store.all(GRANTS_OF, id=row["consent_id"]))
    except RefusedError:
        return False
    told = stored_object(filed["leaf"]).get("facts", {}) if filed else {}
    same = (request["consent_id"], told.get("request")) == (row["consent_id"], hash_of("request", request))
    ends_by = min((grant["expires"] for grant in grants), default=0)
    return same and not missing_groups(header, request, grants) and row["grant_expires_at"] <= ends_by


def known_template(reader: Reader, name: str, holds: Callable[[Row], bool] = lambda row: True) -> dict[str, Row]:
    templates = templates_of(reader, holds)
    if name not in templates and name in templates_of(reader):
        raise ConflictError(f"the template {name} is not signed by approvers of today", f"grace consent template remove {name}, and add it anew")
    if name not in templates:
        raise NotFoundError(f"there is no template {name!r}", nearest_hint(name, templates, "grace consent template list"))
    return templates[name]


@command("consent template list")
def consent_template_list(app: App) -> None:
    """The templates, how often each was used, and until when it holds."""
    store = consent_store(app)
    show_templates(app, [template_document(store, name, rows) for name, rows in templates_of(store).items()])


@command("consent template show", arg("name", "name"))
def consent_template_show(app: App, name: str) -> None:
    """One template: its secrets, and how often each was used."""
    store = consent_store(app)
    show_templates(app, [template_document(store, name, known_template(store, name))], one=True)


@command("consent template remove", arg("name", "name"))
def consent_template_remove(app: App, name: str) -> None:
    """Take a template back. It takes no passphrase, and is final."""
    store = consent_store(app)

    def remove(tx: Tx) -> None:
        rows = [] if open_template_rows(tx, name) else list(known_template(tx, name).values())
        for row in open_template_rows(tx, name):
            close_consent(tx, row, REVOKE, "revoked", TEMPLATE_REMOVED, now=tx.now)
        for row in [*rows, *templates_of(tx).get(name, {}).values()]:
            tx.run(SAY_REMOVED, why=TEMPLATE_REMOVED, id=row["consent_id"])
        record(tx, "template.removed", name, {"uid": os.geteuid(), "signed": False})

    store.write(remove)
    shred(store)
    pin_head(store)
    app.show({"template": name, "removed": True}, lambda: write_out(f"the template {name} was removed"))


@command("consent template refresh", arg("name", "name"), opt("--secret", "keys", kind=SECRET_NAME, multiple=True, help="Add this secret (repeatable)."),
         *TEMPLATE_SIGNERS)  # fmt: skip
def consent_template_refresh(app: App, name: str, keys: tuple[str, ...], approver: tuple[str, ...], passphrase_file: tuple[str, ...]) -> None:
    """Sign a template anew for secrets that have a new value, or were added; its end and the uses that are left stay."""
    store, vault = open_vault(app)
    rows, now = known_template(store, name, functools.partial(was_signed, vault)), clock()
    until = max(row["grant_expires_at"] for row in rows.values())
    if until <= now:
        raise ConflictError(f"the template {name} has ended", f"grace consent template remove {name}, and add it anew")
    wanted = {key: rows[key]["max_uses"] - rows[key]["used_count"] for key in template_document(store, name, rows)["needs_refresh"]}
    wanted |= {key: max(row["max_uses"] for row in rows.values()) for key in keys if key not in rows}
    if not wanted:
        raise ConflictError(f"nothing of the template {name} needs a refresh")
    request = request_of(next(iter(rows.values()))["request"])
    asked: Row = {"purpose": request["claimed"]["for"], "by": request["claimed"]["by"], "user": request["claimed"]["user"], "risk": None, "context": "{}",
                  "timeout_ms": TEMPLATE_ANSWER}  # fmt: skip
    specs = [standing_spec(vault, ask_spec(key, request["claimed"]["action"], **asked), until - now, {**request["standing"], "uses": uses, "until": until})
             for key, uses in wanted.items()]  # fmt: skip
    people = unlock_all(vault, approver, passphrase_file)
    sign_templates(app, vault, people, specs, passphrase_file[0] if passphrase_file else None, lambda tx: refuse_rivals(tx, name, wanted))
    show_templates(app, [template_document(store, name, templates_of(store)[name])], one=True)


def reason(text: str) -> str:
    """A person's reason; grace's own mean something else to it."""
    if undecided(text) or text in (TEMPLATE_REMOVED, TEMPLATE_INCOMPLETE):
        raise ValueError("these are grace's own words for an end that nobody has decided; say it in others")
    return check_text(text, "a note", 2000)


REASON = opt("--reason", kind=Checked("text", reason), required=True, help="Why, for whoever asked.")


@command("consent deny", arg("id", "id"), REASON)
def consent_deny(app: App, id: str, reason: str) -> None:
    """Say no. It takes no passphrase, and is final."""
    store = consent_store(app)
    row = store.write(lambda tx: deny(tx, id, reason))
    shred(store)
    pin_head(store)
    show_consent(app, store, row)


@command("consent withdraw", arg("id", "id"))
def consent_withdraw(app: App, id: str) -> None:
    """Take back a request of your own that nobody has answered."""
    store = consent_store(app)
    row = store.write(lambda tx: withdraw(tx, id))
    shred(store)
    pin_head(store)
    show_consent(app, store, row)


@command("consent revoke", arg("id", "id", required=False), opt("--secret", "key", kind=SECRET_NAME, help="All that is open for this secret."),
         opt("--action", kind="name", help="Of it only this action."), REASON)  # fmt: skip
def consent_revoke(app: App, id: str | None, key: str | None, action: str | None, reason: str) -> None:
    """Take back what was approved and not used yet. It takes no passphrase, and is final."""
    if (id is None) == (key is None) or (action is not None and key is None):
        raise UsageError("name a consent's ID, or --secret KEY with or without --action")
    store = consent_store(app)
    rows = store.write(lambda tx: [revoke(tx, id, reason)] if id is not None else revoke_all(tx, str(key), action, reason))
    shred(store)
    pin_head(store)
    if id is not None:
        show_consent(app, store, rows[0])
    else:
        show_consents(app, store, rows, "nothing was open for it")


def await_answer(store: Store, consent_id: str, timeout_ms: int | None) -> Row:
    """Wait for an answer to a request of anybody, at most so long; the row, perhaps still pending."""
    deadline = clock() + timeout_ms if timeout_ms is not None else None
    bell = Bell(store)
    try:
        while True:
            if any_over(store, [consent_id]):
                store.write(expire_consents)
            row = get_consent(store, consent_id)
            if row["consent_status"] != "pending" or (deadline is not None and clock() >= deadline):
                return row
            bell.wait((min(row["expires_at"], deadline or row["expires_at"]) - clock()) / 1000)
    finally:
        bell.close()


@command("consent wait", arg("id", "id"), opt("--timeout", "timeout_ms", kind="duration", help="Wait at most so long (exit 6)."))
def consent_wait(app: App, id: str, timeout_ms: int | None) -> int:
    """Wait for the answer: 0 approved or used, 5 denied or revoked, 6 unanswered."""
    store = consent_store(app)
    row = await_answer(store, get_consent(store, id)["consent_id"], timeout_ms)
    if row["consent_status"] in ("denied", "revoked"):
        refuse_closed(row)
    show_consent(app, store, row)
    return 0 if row["consent_status"] in ("approved", "used") else WaitTimeoutError.exit_code


@command("consent watch", SIGNER, PASSPHRASE)
def consent_watch(app: App, approver: str | None, passphrase_file: str | None) -> None:
    """Each request as it comes: approve, deny, skip or quit. With --json: one object for each, and no questions."""
    store, vault = open_vault(app)
    if not app.json and not has_terminal():
        raise LockedError("there is no terminal to ask on", "answer with: grace consent approve ID")
    name = choose_approver(vault, approver)
    watch = Watch(app, store, vault, name, passphrase_file)
    bell = Bell(store)
    try:
        while watch.look():
            bell.wait(1.0)
    finally:
        bell.close()


UNLOCKED_FOR = 10 * MINUTE


class Watch:
    """A person who answers requests as they come. One unlock serves low and medium risk for ten minutes."""

    def __init__(self, app: App, store: Store, vault: Vault, name: str, source: str | None):
        self.app, self.store, self.vault, self.name, self.source = app, store, vault, name, source
        self.done: set[str] = set()
        self.person: Approver | None = None
        self.until = 0

    def look(self) -> bool:
        """Go through what is new; whether to go on."""
        if self.store.one(PENDING):
            self.store.write(expire_consents)
        for row in self.store.all(PENDING):
            if row["consent_id"] not in self.done:
                self.done.add(row["consent_id"])
                if self.app.json:
                    self.app.show(consent_document(self.store, row), lambda: None)
                    sys.stdout.flush()
                elif not self._answer(row):
                    return False
        return True

    def _judged(self, row: Row) -> tuple[Review, Row]:
        """The request as verified; above medium risk with the passphrase asked afresh."""
        stale = self.person is None or clock() >= self.until
        if self.person is None or stale:
            self.person, self.until = unlock(self.vault, self.name, self.source), clock() + UNLOCKED_FOR
        judged = judge(self.vault, self.person, row)
        if judged[0].risk in ("high", "critical") and not stale:
            self.person = unlock(self.vault, self.name, self.source)
            judged = judge(self.vault, self.person, row)
        return judged

    def _answer(self, row: Row) -> bool:
        try:
            review, seen = self._judged(row)
            group = self._group(review)
            others = along_with(self.vault, (review, seen, []), row, group)
            ids = [row["consent_id"], *(other.case["consent_id"] for other, _, _ in others)]
            self.done.update(ids)
            show_prompt(self.app, review, seen, False, [other for other, _, _ in others])
            word = self._word(review.request["answer_by"])
            if word in ("a", "approve"):
                if review.risk in ("high", "critical"):
                    confirmed(review, None, self.source)
                self._sign([(review, seen, review.groups(group)), *others])
            elif word in ("d", "deny"):
                reason = ask_person("Why not? ", review.request["answer_by"]) or "denied"
                for consent_id in ids:
                    with self._each(consent_id):
                        self.store.write(functools.partial(deny, consent_id=consent_id, reason=reason[:2000]))
                        write_out(f"{consent_id}  denied")
            return word not in ("q", "quit")
        except RefusedError as error:
            report(error, False)
        except DeniedError as error:
            self.done.discard(row["consent_id"])  # a mistyped passphrase or code: shown again
            report(error, False)
        except (ConflictError, NotFoundError, UsageError) as error:
            report(error, False)
        return True

    def _word(self, until: int) -> str:
        """One of the four answers, or none in time; anything else is asked for again."""
        while True:
            word = ask_person("[a]pprove, [d]eny, [s]kip, [q]uit: ", until).lower()
            if word in ("", "a", "approve", "d", "deny", "s", "skip", "q", "quit") or clock() >= until:
                return word
            write_out(f"{printable(word)[:20]} is none of the four")

    def _sign(self, judged: list[Judged]) -> None:
        """What was shown together is signed together."""
        for review, seen, groups in judged:
            with self._each(review.case["consent_id"]):
                done = sign_and_record(self.vault, review, groups, seen, None, self.source)
                if done["consent_status"] == "pending":
                    self.done.discard(done["consent_id"])  # another signature is missing, perhaps from the same person
                write_out(f"{done['consent_id']}  {done['consent_status']}")

    @contextlib.contextmanager
    def _each(self, consent_id: str) -> Iterator[None]:
        """One of several: when it cannot be answered that is said, and the others go on."""
        try:
            yield
        except RefusedError as error:
            report(error, False)
        except (DeniedError, ConflictError) as error:
            if (self.store.one(GET_CONSENT, id=consent_id) or {}).get("consent_status") == "pending":
                self.done.discard(consent_id)
            report(error, False)

    def _group(self, review: Review) -> str | None:
        """Above medium risk the first group for which this person may still sign."""
        if review.risk not in ("high", "critical"):
            return None
        mine = self.person.keys.fingerprint if self.person else ""
        groups = missing_groups(review.header, review.request, review.grants)
        return next((group for group in groups if mine in may_sign(review.header, review.request, review.roster, group)), None)


# ---- governance rules


def compared(what: str, letters: str = r"[^*]+") -> Checked:
    """What a rule names: in full, or the beginning with a * behind it."""

    def parse(text: str) -> str:
        if not re.fullmatch(letters + r"\*?", rule_text(what, text)):
            raise ValueError(f"{text[:60]!r} fits no {what}: A–Z a–z 0–9 _ . - and at most one * at the end")
        return text

    return Checked("text", parse)


def known_zone(text: str) -> str:
    import zoneinfo

    if text != "UTC" and text not in zoneinfo.available_timezones() - {"localtime", "Factory"}:
        raise ValueError(f"{printable(text)[:40]!r} is no time zone that this machine knows, such as Europe/Berlin")
    return text


def rules_signer(vault: Vault, name: str | None, source: str | None) -> Approver:
    """An unlocked approver who may sign rules, and who has seen no newer ones."""
    who = choose_approver(vault, name)
    if "governance" not in (person_named(vault.roster, who) or {"roles": ()})["roles"]:
        raise DeniedError(f"{who} does not hold the role governance, which signs the rules", "let one who does: --approver NAME")
    signer = unlock(vault, who, source)
    with refusals(vault.store, who, plain=False):
        rules_until(vault.store.all(RULE_SETS)[: signer.seen.rules[0]], vault.id, vault.rosters, signer.seen.rules)  # what follows, this machine has seen
    return signer


def held_rules(vault: Vault) -> Row:
    with refusals(vault.store, "policy", plain=False):
        return vault.rules(vault.store)


def policy_document(vault: Vault) -> Row:
    """The newest set of rules as programs see it, in the order in which they are tried; what does not verify is marked so."""
    problem, rules = None, NO_RULES
    try:
        rules = vault.rules(vault.store)
    except RefusedError as refusal:
        problem = refusal.cause
        with contextlib.suppress(RefusedError):
            rules = next((rules_of(row["document"], vault.id) for row in vault.store.all(RULE_SETS_NEWEST, n=1)), NO_RULES)
    signer = person_of(vault.roster, str(rules["signer"])) or {"name": None}
    return {"number": rules["number"], "signer": signer["name"], "verified": problem is None, "problem": problem,
            "created_at": format_instant(rules["created"]), "rules": in_order(rules["rules"])}  # fmt: skip


def rule_condition(rule: Row) -> str:
    """What a rule is about, in words; nothing named is any use."""
    parts = [f"{what} {printable(rule[what])}" for what in RULE_TEXTS if rule[what]]
    parts += [f"risk {rule['risk']} or higher"] if rule["risk"] else []
    parts += [f"{rule['hours']} {rule['zone']}"] if rule["hours"] else []
    return ", ".join(parts) or "any use"


def show_policy(app: App, document: Row) -> None:
    lines = [(rule["name"], f"{rule['effect']} {rule['group'] or ''}".strip(), rule_condition(rule)) for rule in document["rules"]]

    def plain() -> None:
        if document["number"]:
            verified = "verified" if document["verified"] else "NOT VERIFIED"
            write_out(f"set {document['number']}, signed by {printable(document['signer'] or 'a stranger')}, {verified}")
        if document["problem"]:
            write_out(f"not in force, and only low risk opens: {printable(document['problem'])}")
        show_table(("RULE", "EFFECT", "WHEN"), lines, "no rules: the risk of each use decides")

    app.show(document, plain)


@command("policy list")
def policy_list(app: App) -> None:
    """The rules of governance, in the order in which they are tried."""
    _, vault = open_vault(app)
    show_policy(app, policy_document(vault))


RULE_NAME = Checked("name", lambda text: named("a rule", text))


@command("policy add", arg("name", RULE_NAME), arg("effect", Checked("effect", one_of(EFFECTS))),
         opt("--group", kind=Checked("group", one_of(ROLES)), help="With require: who has to sign, besides whom the risk asks for [default: governance]."),
         opt("--secret", kind=compared("secret", r"[A-Za-z0-9_.-]+"), help="Only this secret, or those that begin so: shop_*."),
         opt("--service", kind=compared("service"), help="Only secrets of this service, or of those that begin so."),
         opt("--action", kind=compared("action", r"[A-Za-z0-9_.-]+"), help="Only this action, or those that begin so."),
         opt("--by", kind=compared("by"), help="Only this requester, as he calls himself, or those that begin so."),
         opt("--risk", kind="risk", help="Only at this risk or a higher one."),
         opt("--hours", kind=Checked("hours", rule_hours), help="Only from then until then: 08:00-18:00, or past midnight 22:00-06:00."),
         opt("--tz", "zone", kind=Checked("zone", known_zone), help="The time zone of --hours, such as Europe/Berlin [default: UTC]."),
         opt("--all", "everything", is_flag=True, help="Every use of every secret, for deny and require: nothing is named then."),
         SIGNER, PASSPHRASE)  # fmt: skip
def policy_add(app: App, name: str, effect: str, group: str | None, zone: str | None, everything: bool, approver: str | None, passphrase_file: str | None,
               **match: str | None) -> None:  # fmt: skip
    """Add a rule: deny before require before allow; no rule ever lowers what the risk asks for."""
    if group is not None and effect != "require":
        raise UsageError("--group goes with require")
    if zone is not None and match["hours"] is None:
        raise UsageError("--tz goes with --hours")
    if everything and (effect == "allow" or any(match.values())):
        raise UsageError("--all stands for every use: it goes with deny and require, and with nothing that is named")
    if not everything and not any(match.values()):
        raise UsageError("say what the rule is about: --secret, --service, --action, --by, --risk or --hours",
                         "" if effect == "allow" else f"to {effect} every use: --all")  # fmt: skip
    _, vault = open_vault(app)
    before = held_rules(vault)
    if any(rule["name"] == name for rule in before["rules"]):
        raise ConflictError(f"there is a rule {name} already", f"take it out first: grace policy remove {name}")
    rule = {"name": name, "effect": effect, "group": (group or "governance") if effect == "require" else None, **match, "zone": zone or "UTC"}
    change_rules(vault, rules_signer(vault, approver, passphrase_file), before, [*before["rules"], rule], f"added {effect}", name)
    show_policy(app, policy_document(vault))


@command("policy remove", arg("name", RULE_NAME), SIGNER, PASSPHRASE)
def policy_remove(app: App, name: str, approver: str | None, passphrase_file: str | None) -> None:
    """Take a rule out."""
    _, vault = open_vault(app)
    before = held_rules(vault)
    rest = [rule for rule in before["rules"] if rule["name"] != name]
    if len(rest) == len(before["rules"]):
        raise NotFoundError(f"there is no rule {name!r}", nearest_hint(name, [rule["name"] for rule in rest], "grace policy list"))
    change_rules(vault, rules_signer(vault, approver, passphrase_file), before, rest, "removed", name)
    show_policy(app, policy_document(vault))


@command("policy test", arg("key", SECRET_NAME),
         opt("--action", kind=Checked("name", lambda text: named("an action", text)), required=True, help="What is to be done with it."),
         opt("--by", kind=Checked("name", text_of("a requester", 128)), help="Who asks [default: PROGRAM@LOGIN of the caller]."),
         opt("--risk", kind="risk", help="A higher risk than the secret's own."),
         opt("--at", "at_ms", kind="instant", help="When [default: now]."))  # fmt: skip
def policy_test(app: App, key: str, action: str, by: str | None, risk: str | None, at_ms: int | None) -> int:
    """What the rules would say of a use, and who would have to sign. Nothing is filed or recorded; exit 1 when it would be denied."""
    store, vault = open_vault(app)
    _, header = vault.current(store, key)
    at = clock() if at_ms is None else at_ms
    claimed = ask_spec(key, action, "a test", by, None, risk, "{}", 1)
    told = told_decision(vault.rules(store), header, claimed, highest_risk(header["risk"], header["action_risks"].get(action), risk), at)
    denied = told["effect"] == "deny"
    needs = {} if denied else required_groups(header, {"risk": told["risk_level"], "requires": told["requires"]})
    document = {**{name: value for name, value in told.items() if name != "consent_id"}, "denied": denied, "needs": needs, "tested_at": format_instant(at)}

    def plain() -> None:
        show_record(document)
        write_out("denied" if denied else f"needs {' & '.join(f'{group}:{n}' for group, n in needs.items()) or 'nobody: this machine opens it'}")

    app.show(document, plain)
    return int(denied)


# ---- audit


FACT_WIDTH = 60  # characters of a fact in a listing; hashes are longer, and whole with --json


@command("audit list", opt("--limit", kind="limit", default="50", show_default=True, help="The newest so many."))
def audit_list(app: App, limit: int) -> None:
    """What happened to the vault, in order."""
    store = consent_store(app)
    documents = [leaf_document(row) for row in store.all(LEAVES_NEWEST, n=limit)[::-1]]

    def plain() -> None:
        for d in documents:
            write_out(f"{d['seq']:>5}  {d['at'] or '?'}  {printable(d['kind']):<18} {printable(d['subject'])}")
            if said := ", ".join(f"{name} {plain_value(name, fact)[:FACT_WIDTH]}" for name, fact in d["facts"].items() if fact is not None):
                write_folded(" " * 7 + printable(said), 7)
        if not documents:
            write_out("nothing yet")

    app.show(documents, plain)


def exported_heads(source: str) -> tuple[int, str]:
    """The newest size and head of the log that an earlier `audit export`, or the document of `audit anchor --json`, holds."""
    heads = []
    try:
        with open(0 if source == "-" else source, "rb", closefd=source != "-") as file:
            for number, line in enumerate(file, 1):
                fact = parse_json(line.decode())
                if not isinstance(fact, dict):
                    raise ValueError(f"line {number} is no object")
                size, head = fact.get("size", fact.get("seq")), fact.get("head", fact.get("hash"))
                if type(size) is int and isinstance(head, str):
                    heads.append((size, head))
    except (OSError, ValueError) as error:
        raise UsageError(f"--against: {printable(source)} is no export of an audit log: {getattr(error, 'strerror', None) or error}") from None
    if not heads:
        raise UsageError(f"--against: {printable(source)} holds no head of an audit log", "keep one with: grace audit export, or grace audit anchor --json")
    return max(heads)


@command("audit verify", SIGNER, PASSPHRASE,
         opt("--against", metavar="FILE", multiple=True, help="An earlier `audit export`, or `audit anchor --json`, kept elsewhere (repeatable)."))  # fmt: skip
def audit_verify(app: App, approver: str | None, passphrase_file: str | None, against: tuple[str, ...]) -> int:
    """Check the whole log against itself, what approvers have signed, and what this machine has seen."""
    heads = {printable(source): exported_heads(source) for source in against}
    store, vault = open_vault(app)
    pins = {"this machine": vault.seen.audit, **heads}
    if passphrase_file is not None:
        name = choose_approver(vault, approver)
        harden()
        with refusals(store, name, plain=False):
            pins[name] = Approver(name, vault.folder, vault.id, passphrase(passphrase_file, name)).seen.audit
    done = verify_log(store, vault.roster, pins)

    def plain() -> None:
        for finding in done["findings"]:
            write_out(finding)
        leaves = "1 leaf" if done["size"] == 1 else f"{done['size']} leaves"
        write_out(f"{leaves}, anchored {done['anchored']} of {done['size']}, checked against {', '.join(done['checked_against'])}"
                  + ("" if done["findings"] else ": all in order"))  # fmt: skip

    app.show(done, plain)
    return 0 if done["ok"] else 1


@command("audit export")
def audit_export(app: App) -> None:
    """The log as JSON lines, with what was signed of it and the public keys: for verifiers that are not grace."""
    store = consent_store(app)
    roster = newest_roster(store)
    for person in roster["approvers"]:
        write_json({"type": "approver", **{name: person[name] for name in ("name", "hpke", "sign")}})
    for row in all_leaves(store):
        write_json({"type": "leaf", "seq": row["seq"], "leaf": row["leaf"], "hash": row["hash"]})
    for signed in signed_heads(store):
        write_json(
            {
                "type": "signed",
                "size": signed["size"],
                "head": signed["head"],
                "approver": signed["approver"],
                "text": signed["text"].decode(),
                "signature": b64(signed["signature"]),
            }
        )


def show_accepted(store: Store, vault: Vault, before: dict[str, list[Any]]) -> None:
    """What was seen, and what would count from now on."""
    size, head = audit_head(store)
    for who, (seen_size, seen_head, number, rules) in before.items():
        sys.stderr.write(f"{who} has seen a log of {seen_size} leaves ending in {seen_head[:16]}, list {number} of approvers and set {rules} of rules\n")
    rules = store.value("SELECT MAX(number) AS n FROM governance_rules") or 0
    sys.stderr.write(f"here is one of {size} leaves ending in {head[:16]}, list {vault.roster['number']} of approvers and set {rules} of rules\n")
    for entry in store.all(CURRENT_SECRETS):
        seen = vault.seen.secrets.get(entry["secret_key"], [0, "", False])[0]
        if entry["version"] != seen:
            sys.stderr.write(f"  {entry['secret_key']}: version {entry['version']} here, {seen} seen\n")


@command("audit anchor", SIGNER, PASSPHRASE, opt("--accept", is_flag=True, help="Even when the log is not the one seen before, as after a restored copy."))
def audit_anchor(app: App, approver: str | None, passphrase_file: str | None, accept: bool) -> None:
    """Sign the log as it is now. After a restored copy of the database, --accept makes it the one that counts."""
    harden()
    store = app.store()
    with refusals(store, "vault", plain=False):
        vault = Vault(store)
    name = choose_approver(vault, approver)
    typed = passphrase(passphrase_file, name)
    with refusals(store, name, plain=False):
        person = Approver(name, vault.folder, vault.id, typed).meet(store.all(ROSTERS), accept)
        before = {who: [*seen.audit, seen.roster[0], seen.rules[0]] for who, seen in (("machine", vault.seen), (name, person.seen))}
        known = all(extends(store, seen.audit) and seen.roster[0] <= vault.roster["number"] for seen in (vault.seen, person.seen))
        if not known and not accept:
            raise RefusedError("rolled back: the audit log is not the one seen before; --accept would make it the one that counts")
        headers = {row["secret_key"]: vault.checked(store, row) for row in store.all(CURRENT_SECRETS)} if accept else {}
        for seen in (vault.seen, person.seen):
            rules = rules_until(store.all(RULE_SETS), vault.id, vault.rosters, None if accept else seen.rules)

    if accept and not app.json:
        show_accepted(store, vault, before)
        if passphrase_file is None and ask_person("Type yes to accept this state: ", clock() + 5 * MINUTE).lower() != "yes":
            raise DeniedError("nothing was accepted")

    def put(tx: Tx) -> None:
        record(tx, "audit.accepted" if accept else "audit.anchored", name, {"seen": before} if accept else {})
        anchor(tx, person)

    store.write(put)
    head = audit_head(store)
    for seen in (person.seen, vault.seen):
        if accept:
            seen.accept(vault.roster_mark, head, headers, vault.machine.fingerprint, rules_mark(rules))
        seen.learn(vault.roster_mark, head, rules=rules_mark(rules))
    document = {"size": head[0], "head": head[1], "approver": name, "accepted": accept, "seen_before": before}
    app.show(document, lambda: write_out(f"{name} has signed the log of {head[0]} leaves, head {head[1][:16]}"))


# ---- doctor


@command("doctor", opt("--recount", "anew", is_flag=True, help="Count all figures anew from the tasks, and say what differed."))
def doctor_command(app: App, anew: bool) -> int:
    """What is wrong or weak here, what it means, and what to do; exit 1 when something is wrong."""
    store = app.store()
    if anew:
        with store.showing_life():
            document = store.write(recount_all)
        app.show(document, lambda: show_recount(document))
        return 0
    findings, secrets = [*program_findings(), *machine_findings(), *store.read(lambda reader: list(figure_findings(reader)))], []
    if not store.value(GET_VAULT):
        findings.append(("note", "no_vault", "there is no vault yet", "make one: grace init"))
    else:
        try:
            _, vault = open_vault(app)
            findings += [*place_findings(store, vault), *vault_findings(store, vault)]
            keys_here = any(finding[1] == "keys_with_database" for finding in findings)
            secrets = [secret_outlook(store, secret_document(vault, entry), keys_here) for entry in store.all(CURRENT_SECRETS)]
        except (DeniedError, LockedError) as error:
            findings.append(("problem", "vault", error.message, error.hint))
    findings = list(dict.fromkeys(findings))
    findings.sort(key=lambda finding: ("problem", "risk", "note").index(finding[0]))
    document = {"ok": all(finding[0] != "problem" for finding in findings),
                "findings": [dict(zip(("level", "code", "message", "hint"), finding, strict=True)) for finding in findings],
                "guarantees": [{"enforced_by": by, "what": what} for by, what in GUARANTEES], "secrets": secrets}  # fmt: skip
    app.show(document, lambda: show_findings(document))
    return 0 if document["ok"] else 1


def show_recount(document: Row) -> None:
    for row in document["differences"]:
        write_out(f"{row['figure']}: was {row['before']:,}, is {row['after']:,}")
    rows = sum(document["rows_changed"].values())
    write_out(f"{counted(document['tasks'], 'task')} counted; " + (f"{counted(rows, 'row')} of counts and rollups differed" if rows or document["differences"]
                                                                   else "all figures were right"))  # fmt: skip
    if document["only_raised"]:
        write_out("some rows have been deleted, so that their part of the figures was only raised, never lowered")


def show_findings(document: Row) -> None:
    for finding in document["findings"]:
        write_folded(f"{finding['level']}: {printable(finding['message'])}", 4)
        write_folded(f"    {printable(finding['hint'])}", 4)
    if document["secrets"]:
        write_out("\nwhat the vault is worth:")
        for guarantee in document["guarantees"]:
            write_folded(f"  {guarantee['enforced_by']:<12} {guarantee['what']}", 15)
        write_out("")
        for secret in document["secrets"]:
            write_folded(f"{secret['secret_key']} ({secret['risk_level']}) is opened by {secret['opened_by']}", 4)
            write_folded(f"    the best step: {secret['best_step']}", 4)


# ---- demo


@command("demo")
def demo_command(app: App) -> None:
    """A tour of half a minute with real processes on a throw-away database."""
    import shutil
    import tempfile

    folder = tempfile.mkdtemp(prefix="grace-demo-")
    tour = Tour(app, os.path.join(folder, "demo.db"))
    try:
        tour.walk()
    finally:
        tour.stop()
        shutil.rmtree(folder, ignore_errors=True)
    if app.json:
        write_json({"database": tour.path, "steps": tour.steps})


class Tour:
    """The demo: commands as one would type them, their real output, and a real daemon in the background."""

    def __init__(self, app: App, path: str):
        self.app, self.path, self.steps, self.daemon = app, path, [], None  # type: tuple[App, str, list[Row], Any]
        self.asking: Any = None
        self.stopped = False
        for signum in STEERING:  # to be heeded between two steps, so that nothing is left behind
            signal.signal(signum, self._on_signal)

    def _on_signal(self, signum: int, frame: Any) -> None:
        self.stopped = True

    def _start(self, *words: str) -> Any:
        import subprocess

        return subprocess.Popen([*own_command(), "--db", self.path, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                text=True, env={**os.environ, "XDG_CONFIG_HOME": os.path.dirname(self.path)})  # fmt: skip

    def _call(self, *words: str) -> tuple[int, str]:
        """Exit status and output of one command; KeyboardInterrupt when the tour was told to stop meanwhile."""
        import subprocess

        process = self._start(*words)
        while True:
            try:
                output, _ = process.communicate(timeout=0.1)
            except subprocess.TimeoutExpired:
                if self.stopped:
                    process.terminate()
                continue
            if self.stopped:
                raise KeyboardInterrupt
            return process.returncode, output

    def say(self, text: str) -> None:
        if not self.app.json:
            write_out(text)
            sys.stdout.flush()

    def type(self, *words: str) -> Row:
        """Call grace with these words, show both, and keep them."""
        import shlex

        self.say(f"$ grace {shlex.join(words)}")
        status, output = self._call(*words)
        step: Row = {"command": ["grace", *words], "exit_status": status, "output": output}
        self.steps.append(step)
        self.say("".join(f"  {line}\n" for line in output.splitlines()))
        return step

    def walk(self) -> None:
        text = os.path.join(os.path.dirname(os.path.abspath(__file__)), "schema.sql")
        self.say("An intent is a goal with a deadline. A handler is the command that does it; a daemon runs the queue.\n")
        self.type("handler", "add", "count_words", "--", "wc", "-w", "{context.file}")
        self.type("handler", "add", "hold_the_slot", "--", "sleep", "8")
        self.daemon = self._start("daemon", "--workers", "1", "--grace-period", "1s")
        done = self.type("submit-intent", "Count the words of the schema", "--handler", "count_words", "--sla", "10s", "--context",
                         json.dumps({"file": text}), "--wait", "--wait-timeout", "20s")  # fmt: skip
        self.type("task", "log", done["output"].split()[1])
        self.say("Now the only slot is taken for eight seconds, and a second intent has an SLA of one: it will be late.\n")
        self.type("submit-intent", "Something long", "--handler", "hold_the_slot")
        late = self.type("submit-intent", "Count them again, soon", "--handler", "count_words", "--sla", "1s", "--context", json.dumps({"file": text}))
        self._until_critical(late["output"].split()[1])
        self.type("violations", "--all")
        self.type("task", "explain", late["output"].split()[1])
        self.type("events", "--topic", "htm.sla.*", "--limit", "3")
        self.say("At 80 % it was warned of, at 100 % escalated, at 200 % a rescue found that it never started and ran it in an\n"
                 "extra slot. All of it is in the database, with the instants at which each step was due.\n")  # fmt: skip
        self._consent()
        self.say("What to type next:\n"
                 "  grace handler add backup --sla 10m -- tar czf /tmp/etc.tgz /etc\n"
                 '  grace submit-intent "Back up /etc" --handler backup\n'
                 "  grace daemon --once\n"
                 "  grace status\n"
                 "  grace init\n")  # fmt: skip

    def _consent(self) -> None:
        """A secret, a command that asks for it, and a person's yes, with a throw-away passphrase."""
        import shlex

        folder = os.path.dirname(self.path)
        for name, text in (("passphrase", os.urandom(12).hex()), ("token", os.urandom(12).hex())):
            with open(os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT, 0o600), "w", encoding="ascii") as file:
                file.write(text)
        key = ("--passphrase-file", os.path.join(folder, "passphrase"))
        self.say("And a command that needs somebody's token. Its value is sealed; what opens it is the passphrase of a person.\n")
        self._call("config", "set", "vault.argon2_memory", str(KDF_FLOOR << 10))
        self.type("init", "--name", "you", *key)
        self.type("secret", "set", "shop_token", "--service", "shop", "--value-file", os.path.join(folder, "token"), *key)
        words = ("exec", "--secret", "TOKEN=shop_token:upload", "--for", "put the new prices online", "--",
                 "sh", "-c", 'echo "a token of ${#TOKEN} characters"')  # fmt: skip
        self.say(f"$ grace {shlex.join(words)} &")
        self.asking = self._start(*words)
        waiting: list[Row] = []
        while not waiting and self.asking.poll() is None:
            waiting = json.loads(self._call("consent", "pending", "--json")[1])
        self.type("consent", "pending")
        if waiting:
            self.type("consent", "approve", waiting[0]["consent_id"], *key)
        output, _ = self.asking.communicate(timeout=20)
        self.steps.append({"command": ["grace", *words], "exit_status": self.asking.returncode, "output": output})
        self.say("".join(f"  {line}\n" for line in output.splitlines()))
        self.type("audit", "verify")

    def _until_critical(self, task_id: str) -> None:
        for _ in range(150):
            if json.loads(self._call("task", "show", task_id, "--json")[1])["status"] in FINAL:
                return
            time.sleep(0.1)

    def stop(self) -> None:
        for process in (self.daemon, self.asking):
            if process is not None and process.poll() is None:
                process.terminate()
                process.communicate()


# ---- the end of every command


def before_separator(argv: list[str]) -> list[str]:
    return argv[: argv.index("--")] if "--" in argv else argv


def report(error: GraceError, as_json: bool) -> None:
    """The one line, and the hint, that an error leaves on stderr."""
    message = printable(error.message)
    if as_json:
        text = json.dumps({"error": {"code": error.code, "message": message, "hint": error.hint}})
    else:
        text = f"grace: {message}" + (f"\nhint: {printable(error.hint)}" if error.hint else "")
    with contextlib.suppress(OSError):
        sys.stderr.write(text + "\n")


def usage_error(error: click.UsageError) -> UsageError:
    """click's complaint in our shape."""
    return UsageError(first_line(error.format_message()), usage_hint(error.ctx))


def call(argv: list[str]) -> int:
    """Run one command; its exit status. Exceptions end here."""
    as_json = "--json" in before_separator(argv)
    try:
        group = root_group()
        with group.make_context("grace", list(argv), obj=App(as_json)) as context:
            result = group.invoke(context)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as end:
        sys.stdout.flush()
        return end.exit_code
    except GraceError as error:
        report(error, as_json)
        return error.exit_code
    except click.UsageError as error:
        report(usage_error(error), as_json)
        return UsageError.exit_code
    except (KeyboardInterrupt, click.Abort):
        return 130
    except BrokenPipeError:
        return 141  # as a shell shows a program that SIGPIPE has ended
    except OSError as error:
        report(GraceError(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")), as_json)
        return GraceError.exit_code


def open_standard_streams() -> None:
    """Put /dev/null where a standard stream was closed, before a file of ours gets its number."""
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(fd, mode, closefd=False))


def confess(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """A defect of grace itself, in one line; with GRACE_DEBUG set, the whole of it."""
    if os.environ.get("GRACE_DEBUG"):
        sys.__excepthook__(kind, error, trace)
    report(GraceError(f"internal error: {kind.__name__}: {error}", "please report it, with what GRACE_DEBUG=1 shows"), False)


def main() -> None:
    """The console script. The process ends at once: unwinding the interpreter would cost a tenth of a command's time."""
    open_standard_streams()
    sys.excepthook = confess
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    status = call(sys.argv[1:])
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
