"""The pure rules: durations, instants, ids, JSON, the ladder's steps, back-off, rescues, clocks. No database, no clock."""

from __future__ import annotations

import json
import random
import time
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

NOW = 1_790_000_000_000
MINUTE = 60_000
SOON = 20.0  # seconds; a generous bound for what must not hang


def task(**fields: Any) -> dict[str, Any]:
    """An open task as the rules see it."""
    return {"status": "queued", "task_type": "work", "priority": "normal", "sla_ms": 100_000, "queued_at": NOW, "sla_deadline": NOW + 100_000,
            "warn_at": 0.8, "critical_at": 2.0, "escalation_level": 0, "available_at": None, "aged_at": NOW, "set_aside": None,
            "goal": "the goal", **fields}  # fmt: skip


# ---- durations and instants


@pytest.mark.parametrize(("text", "ms"), [
    ("500ms", 500), ("30s", 30_000), ("5m", 300_000), ("2h", 7_200_000), ("1d", 86_400_000), ("1h30m", 5_400_000), ("1.5s", 1500),
    ("1d2h3m4s5ms", 93_784_005), ("3650d", 315_360_000_000), ("1ms", 1), ("0h1s", 1000), ("0.5h", 1_800_000)])  # fmt: skip
def test_durations_are_read(module: Any, text: str, ms: int) -> None:
    """Numbers with units, alone and combined."""
    assert module.parse_duration(text) == ms


@pytest.mark.parametrize("text", [
    "", "5", "0", "0s", "0ms", "-5m", "+5m", "5 m", " 5m", "5m ", "5x", "m", "1e3s", "1,5s", "infs", "nans", "5M", "1h30", "3651d", "999999999999999d",
    "3650d1ms", "٣s", "1..5s", ".5s", "5m\n", "1w", "0.0001ms", "9" * 400 + "s"])  # fmt: skip
def test_bad_durations_are_refused_with_an_example(module: Any, text: str) -> None:
    """No unit, zero, a negative, more than ten years, or nonsense: the message shows a right one."""
    with pytest.raises(ValueError, match="30s"):
        module.parse_duration(text)


def test_durations_survive_being_shown(module: Any) -> None:
    """What is shown for a duration reads back as the same one, but for what its two leading units cannot say."""
    chance = random.Random(7)
    for _ in range(2000):
        ms = chance.choice([chance.randrange(1, 1000), chance.randrange(1, 3600) * 1000, chance.randrange(1, 10**11)])
        shown = module.format_duration(ms)
        again = module.parse_duration(shown)
        finest = 1 if ms < 1000 else 100 if ms < MINUTE else 1000 if ms < 60 * MINUTE else MINUTE if ms < 1440 * MINUTE else 60 * MINUTE
        assert abs(again - ms) < finest, (ms, shown, again)
        assert module.format_duration(-ms) == f"-{shown}"


@pytest.mark.parametrize(("ms", "text"), [
    (None, "-"), (0, "0ms"), (40, "40ms"), (2500, "2.5s"), (30_000, "30s"), (300_000, "5m"), (5_400_000, "1h30m"), (86_400_000, "1d"),
    (90_000_000, "1d1h"), (999.6, "1s")])  # fmt: skip
def test_durations_are_shown(module: Any, ms: float | None, text: str) -> None:
    """Two units at most."""
    assert module.format_duration(ms) == text


@pytest.mark.parametrize(("text", "same"), [
    ("2026-11-22T07:08:19.123Z", "2026-11-22T07:08:19.123Z"), ("2026-11-22T08:08:19+01:00", "2026-11-22T07:08:19.000Z"),
    ("2026-11-22t07:08:19z", "2026-11-22T07:08:19.000Z"), ("2026-11-21 23:38:19-0730", "2026-11-22T07:08:19.000Z"),
    ("2026-11-22T07:08Z", "2026-11-22T07:08:00.000Z"), ("1970-01-01T00:00:00Z", "1970-01-01T00:00:00.000Z"),
    ("2024-02-29T00:00:00Z", "2024-02-29T00:00:00.000Z"), ("9999-12-31T23:59:59.999Z", "9999-12-31T23:59:59.999Z")])  # fmt: skip
def test_instants_are_read_and_shown_in_utc(module: Any, text: str, same: str) -> None:
    """Any offset goes in, UTC with milliseconds comes out."""
    assert module.format_instant(module.parse_instant(text)) == same


@pytest.mark.parametrize("text", [
    "", "now", "2026-11-22", "2026-11-22T07:08:19", "1790000000", "2026-13-01T00:00:00Z", "2026-02-29T00:00:00Z", "2026-11-22T25:00:00Z",
    "2026-11-22T07:08:19 Z", "2026-11-22T07:08:19+25:99", "22.11.2026 07:08", "0000-01-01T00:00:00Z", "2026-11-22T07:08:19Z\n"])  # fmt: skip
def test_bad_instants_are_refused(module: Any, text: str) -> None:
    """No offset, no such day, or another notation."""
    with pytest.raises(ValueError):
        module.parse_instant(text)


def test_instants_go_round(module: Any) -> None:
    """Every millisecond of four millennia reads back as itself, whatever offset it is written with."""
    chance = random.Random(11)
    for _ in range(2000):
        ms = chance.randrange(0, module.MAX_INSTANT)
        assert module.parse_instant(module.format_instant(ms)) == ms
        zone = timezone(timedelta(minutes=chance.randrange(-14 * 60, 14 * 60)))
        day = ms % (2 * 10**12)
        written = datetime.fromtimestamp(day // 1000, zone).isoformat(timespec="seconds")
        assert module.parse_instant(written) == day // 1000 * 1000


def test_an_instant_outside_the_calendar_is_shown_at_its_edge(module: Any) -> None:
    """An odd row must not stop a listing."""
    assert module.format_instant(-5) == "1970-01-01T00:00:00.000Z"
    assert module.format_instant(10**18) == "9999-12-31T23:59:59.999Z"
    assert module.format_instant(None) is None


# ---- ids


def test_ids_of_a_burst_are_unique_and_sort_by_age(module: Any) -> None:
    """Thousands in one millisecond, and over milliseconds, and when the clock steps back."""
    times = [NOW] * 3000 + [NOW + n // 3 for n in range(3000)] + [NOW - 5000] * 100 + [NOW + 10_000]
    ids = [module.new_id("task", now) for now in times]
    assert ids == sorted(ids)
    assert len(set(ids)) == len(ids)
    assert all(module.OWN_ID.fullmatch(text) and text.startswith("task_") for text in ids)


def test_ids_of_two_processes_sort_by_their_millisecond(module: Any) -> None:
    """The time part alone decides between two different milliseconds."""
    chance = random.Random(3)
    for _ in range(300):
        early = module._last_id[0] + 1 + chance.randrange(10**6)
        late = early + 1 + chance.randrange(10**6)
        first = module.new_id("int", early)
        module._last_id[:] = 0, 0  # another process
        second = module.new_id("int", late)
        assert first < second


# ---- JSON


@pytest.mark.parametrize("text", [
    '{"a": 1, "a": 2}', '{"x": {"a": 1, "a": 1}}', "[NaN]", "[Infinity]", "[-Infinity]", "[1e999]", "[-1e999]", '["\\u0000"]', '{"\\u0000": 1}',
    '["\\\\\\u0000"]', '["\\ud800"]', '["\\udc00\\ud800"]', '{"\\udfff": 1}', "", "{", "{} {}", "[1,]", "{'a': 1}", "[01]", "\ufeff{}", '["\n"]',
    "nope", "[" * 65 + "]" * 65, '{"a":' * 65 + "1" + "}" * 65])  # fmt: skip
def test_json_that_is_not_strict_is_refused(module: Any, text: str) -> None:
    """Duplicate keys, NaN, infinities, NUL, lone surrogates, too deep, or no JSON at all."""
    with pytest.raises(ValueError):
        module.parse_json(text)


@pytest.mark.parametrize("text", [
    "{}", "null", '"text"', '{"a": {"b": [1, 2.5, true, null]}}', '["\\ud83d\\ude00"]', '["\\\\u0000"]', '["\\\\\\\\u0000 is only text"]',
    "[" * 64 + "]" * 64, '{"a":' * 64 + "1" + "}" * 64, '{"a": 1, "A": 2}', "[1e308]", '["😀 ünïcode \u2028"]',
    "[123456789012345678901234567890]"])  # fmt: skip
def test_strict_json_is_read(module: Any, text: str) -> None:
    """Up to 64 levels, any text that is text; and it comes back the same."""
    value = module.parse_json(text)
    assert value == json.loads(text)
    assert module.parse_json(module.to_json(value)) == value


@pytest.mark.parametrize("text", [
    "[" * 10_000 + "]" * 10_000, '{"a":' * 10_000 + "1" + "}" * 10_000, "[" * 1_000_000, '{"a": "' + "x" * 10_000_000 + '"}', "[" + "1," * 5_000_000 + "1]",
    '["' + "ü" * 600_000 + '"]', "9" * 10_000_000, '["' + "\\\\" * 400_000 + '\\u0000"]'],
    ids=["nested lists", "nested objects", "open brackets", "10 MB text", "10 MB list", "1.2 MB in UTF-8", "10 MB number", "backslashes"])  # fmt: skip
def test_monstrous_json_is_refused_without_hanging(module: Any, text: str) -> None:
    """Ten megabytes or ten thousand levels end as an ordinary refusal."""
    begin = time.monotonic()
    with pytest.raises(ValueError) as caught:
        module.parse_json(text)
    assert time.monotonic() - begin < SOON
    assert len(str(caught.value)) < 200


def test_a_number_with_very_many_digits_is_refused_in_words(module: Any) -> None:
    """Half a megabyte of digits is no number that anything can hold."""
    begin = time.monotonic()
    with pytest.raises(ValueError) as caught:
        module.parse_json("[" + "9" * 500_000 + "]")
    assert "sys." not in str(caught.value), "advice for programmers, shown to whoever typed the number"
    assert time.monotonic() - begin < SOON


def test_json_that_was_made_at_random_is_read_as_the_plain_reader_reads_it(module: Any) -> None:
    """Whatever is within the limits comes through whole."""
    chance = random.Random(19)

    def some(depth: int) -> Any:
        kind = chance.randrange(7 if depth < 5 else 5)
        plain = (None, chance.random() < 0.5, chance.randrange(-(10**6), 10**6), chance.uniform(-1e9, 1e9), "".join(chance.choices('aü"\\/\n\t😀 u0', k=5)))
        if kind < 5:
            return plain[kind]
        if kind == 5:
            return [some(depth + 1) for _ in range(chance.randrange(4))]
        return {f"k{n}": some(depth + 1) for n in range(chance.randrange(4))}

    for _ in range(500):
        value = some(0)
        assert module.parse_json(json.dumps(value, ensure_ascii=chance.random() < 0.5)) == value


def test_depth_is_counted_by_levels_of_lists_and_objects(module: Any) -> None:
    """A plain value has none."""
    assert [module.json_depth(value) for value in (1, "x", [], {}, [[]], {"a": [1]}, [1, [2, [3]]])] == [0, 0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("text", ["", "x" * 11, "a\0b", "\ud800"])
def test_text_that_cannot_be_kept_is_refused_by_name(module: Any, text: str) -> None:
    """Empty, too long, NUL, or no UTF-8."""
    with pytest.raises(ValueError, match="the label"):
        module.check_text(text, "the label", 10)
    assert module.check_text("x" * 10, "the label", 10) == "x" * 10


# ---- the ladder


def test_the_ladder_has_three_rungs_at_their_instants(module: Any) -> None:
    """80 %, 100 % and 200 % of the SLA, counted from the start of its clock."""
    assert module.ladder_steps(task()) == [(NOW + 80_000, "warning"), (NOW + 100_000, "violated"), (NOW + 200_000, "critical")]
    assert module.ladder_steps(task(escalation_level=2)) == [(NOW + 200_000, "critical")]
    assert module.ladder_steps(task(escalation_level=3)) == []
    assert module.ladder_steps(task(sla_ms=None)) == []
    assert module.ladder_steps(task(warn_at=0.5, critical_at=1.5))[::2] == [(NOW + 50_000, "warning"), (NOW + 150_000, "critical")]


def test_a_rescue_is_warned_and_violated_but_never_rescued(module: Any) -> None:
    """Its ladder ends at the second rung."""
    assert [name for _, name in module.ladder_steps(task(task_type="rescue"))] == ["warning", "violated"]
    assert module.ladder_steps(task(task_type="rescue", escalation_level=2)) == []


def test_urgency_moves_a_queued_task_forward(module: Any) -> None:
    """At half and at four fifths of the SLA, as far as there is a higher class; only while it is queued."""
    half, late = (NOW + 50_000, "urgency_half"), (NOW + 80_000, "urgency_four_fifths")
    assert module.urgency_steps(task(), 1) == [half, late]
    assert module.urgency_steps(task(priority="low"), 1) == [half, late]
    assert module.urgency_steps(task(priority="high"), 1) == [late]
    assert module.urgency_steps(task(priority="critical"), 1) == []
    assert all(module.urgency_steps(task(status=status), 1) == [] for status in ("blocked", "assigned", "running"))


def test_a_task_without_an_sla_ages(module: Any) -> None:
    """One class each time the setting's span has passed since the last, up to the highest."""
    assert module.urgency_steps(task(sla_ms=None, aged_at=NOW + 7), 10 * MINUTE) == [(NOW + 7 + 10 * MINUTE, "ageing")]
    assert module.urgency_steps(task(sla_ms=None, priority="critical"), MINUTE) == []


def test_the_next_step_is_the_soonest_of_all(module: Any) -> None:
    """Urgency, ladder and the end of a pause in one order; a row that was set aside keeps only its pause."""
    names = [name for _, name in module.next_steps(task(available_at=NOW + 90_000), MINUTE)]
    assert names == ["urgency_half", "urgency_four_fifths", "warning", "available", "violated", "critical"]
    assert module.next_step_at(task(), MINUTE) == NOW + 50_000
    assert module.next_steps(task(set_aside="odd", available_at=NOW + 5), MINUTE) == [(NOW + 5, "available")]
    assert module.next_step_at(task(sla_ms=None, priority="critical"), MINUTE) is None
    assert module.next_step_at(task(sla_ms=None, status="running"), MINUTE) is None


def test_steps_of_any_task_are_in_order_and_within_its_window(module: Any) -> None:
    """Whatever the thresholds: sorted, after the start, the rungs in their order, none of them skipped."""
    chance = random.Random(23)
    for _ in range(3000):
        sla = chance.choice([None, chance.randrange(1, 10), chance.randrange(1, 10**9)])
        row = task(sla_ms=sla, sla_deadline=None if sla is None else NOW + sla, warn_at=chance.uniform(0.01, 1), critical_at=chance.uniform(1, 5),
                   escalation_level=chance.randrange(4), status=chance.choice(["queued", "blocked", "assigned", "running"]),
                   priority=chance.choice(module.PRIORITIES), available_at=chance.choice([None, NOW + chance.randrange(10**6)]),
                   task_type=chance.choice(["work", "rescue"]))  # fmt: skip
        steps = module.next_steps(row, 10 * MINUTE)
        assert [at for at, _ in steps] == sorted(at for at, _ in steps)
        assert all(at >= NOW for at, _ in steps)
        rungs = [name for _, name in steps if name in module.LEVELS]
        assert rungs == [name for name in module.LEVELS[row["escalation_level"] + 1 :] if sla and (name != "critical" or row["task_type"] != "rescue")]
        assert module.next_step_at(row, 10 * MINUTE) == (steps[0][0] if steps else None)


@pytest.mark.parametrize(("status", "finished", "level", "verdict"), [
    ("completed", NOW, 0, 1), ("completed", NOW + 100_000, 1, 1), ("completed", NOW + 100_001, 1, 0), ("completed", NOW + 5, 2, 0), ("failed", NOW, 0, 0),
    ("timeout", NOW, 0, 0), ("cancelled", NOW, 0, None), ("cancelled", NOW + 10**7, 3, None)])  # fmt: skip
def test_the_verdict_on_an_sla(module: Any, status: str, finished: int, level: int, verdict: int | None) -> None:
    """Met only on completion in time; false for good after a breach; none when cancelled or without an SLA."""
    assert module.sla_verdict(status, NOW + 100_000, level, finished) == verdict
    assert module.sla_verdict(status, None, level, finished) is None


def test_a_priority_is_raised_and_never_lowered(module: Any) -> None:
    """The higher of the two, whichever comes first."""
    for first in module.PRIORITIES:
        for second in module.PRIORITIES:
            higher = min(first, second, key=module.PRIORITIES.index)
            assert module.raised(first, second) == higher == module.raised(second, first)


@pytest.mark.parametrize(("fields", "why"), [
    ({}, None), ({"sla_ms": None, "sla_deadline": None}, None), ({"sla_ms": 0}, "sla"), ({"sla_ms": -1}, "sla"), ({"sla_ms": 10**15}, "sla"),
    ({"queued_at": -1}, "instant"), ({"sla_deadline": 10**17}, "instant"), ({"available_at": 2**62}, "instant"), ({"warn_at": 0.0}, "thresholds"),
    ({"warn_at": 1.5}, "thresholds"), ({"critical_at": 0.9}, "thresholds"), ({"critical_at": 1e9}, "thresholds")])  # fmt: skip
def test_a_row_that_cannot_be_reckoned_with_is_told_apart(module: Any, fields: dict[str, Any], why: str | None) -> None:
    """Zero, negative and far values name what is odd; an ordinary row names nothing."""
    found = module.odd_row(task(**fields))
    assert found is None if why is None else found.startswith(why)


# ---- back-off


def test_backoff_doubles_within_a_quarter_and_ends_at_an_hour(module: Any) -> None:
    """For every base, attempt and throw of the dice; whole milliseconds, at least one."""
    chance = random.Random(29)
    for _ in range(5000):
        base, attempt, spread = chance.randrange(1, 10**7), chance.randrange(1, 2000), chance.random()
        pause = module.backoff_ms(base, attempt, spread)
        exact = min(3_600_000, base * 2 ** min(attempt - 1, 30))
        assert isinstance(pause, int)
        assert max(1, 0.75 * exact - 1) <= pause <= 1.25 * exact + 1
    assert [module.backoff_ms(5000, attempt, 0.5) for attempt in (1, 2, 3, 20)] == [5000, 10_000, 20_000, 3_600_000]


# ---- the built-in rescue


@pytest.mark.parametrize(("fields", "handler", "active", "worker", "on_critical", "served", "plan"), [
    ({}, {}, 0, "none", "rescue", True, "run"), ({}, {}, 0, "none", "retry", True, "run"), ({}, {"concurrency": 2}, 1, "none", "rescue", True, "run"),
    ({"available_at": NOW}, {}, 0, "none", "rescue", True, "run"), ({"available_at": NOW + 1}, {}, 0, "none", "rescue", True, "report"),
    ({}, None, 0, "none", "rescue", True, "report"), ({}, {"paused": 1}, 0, "none", "rescue", True, "report"),
    ({}, {"external": 1}, 0, "none", "rescue", True, "report"), ({}, {"concurrency": 2}, 2, "none", "rescue", True, "report"),
    ({}, {}, 0, "none", "rescue", False, "report"), ({"status": "blocked"}, {}, 0, "none", "rescue", True, "report"),
    ({"status": "blocked", "reason": "waiting_consent"}, {}, 0, "none", "rescue", True, "report"),
    ({"status": "running"}, {}, 1, "alive", "rescue", True, "report"), ({"status": "running"}, {}, 1, "alive", "retry", True, "retry"),
    ({"status": "running"}, {}, 1, "dead", "rescue", True, "recover"), ({"status": "assigned"}, {}, 1, "dead", "retry", True, "recover"),
    ({"status": "running"}, {}, 1, "external", "retry", True, "report"), ({"status": "completed"}, {}, 0, "none", "retry", True, "report"),
    ({"status": "failed"}, {}, 0, "dead", "rescue", True, "report")])  # fmt: skip
def test_what_a_rescue_does_depends_on_what_is_wrong(module: Any, fields: dict[str, Any], handler: dict[str, Any] | None, active: int, worker: str,
                                                     on_critical: str, served: bool, plan: str) -> None:  # fmt: skip
    """Run what could run, recover from the dead, retry on demand, else say what was found."""
    row = {"name": "work", "paused": 0, "external": 0, "concurrency": None, **handler} if handler is not None else None
    found, did = module.rescue_plan(task(**fields), row, active, worker, on_critical, served, NOW)
    assert did == plan
    assert found.strip()


# ---- clocks and mounts


def test_a_clock_that_was_set_and_a_machine_that_slept_are_told_apart(module: Any) -> None:
    """Sleep stops the monotonic clock alone; setting the clock moves the wall alone."""
    before = (NOW, 5000, 9000)
    assert module.clock_jump(before, (NOW + 250, 5250, 9250)) == (0, 0)
    assert module.clock_jump(before, (NOW + 3_600_250, 5250, 3_609_250)) == (3_600_000, 0)
    assert module.clock_jump(before, (NOW - 60_000 + 250, 5250, 9250)) == (0, -60_000)
    assert module.clock_jump(before, (NOW + 7_200_250, 5250, 3_609_250)) == (3_600_000, 3_600_000)


MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,errors=remount-ro
36 22 0:32 / /run rw,nosuid master:2 shared:7 propagate_from:2 - tmpfs tmpfs rw,size=400k
41 22 0:45 /export /srv/with\\040space rw,relatime shared:9 - nfs4 server:/export rw,vers=4.2,addr=10.0.0.1
42 22 0:46 / /mnt/old rw - nfs 10.0.0.2:/ rw
43 22 0:47 / /home/me/remote rw,nosuid,nodev - fuse.sshfs me@host:/ rw,user_id=1000
44 22 0:3 / /proc/0:99 rw - proc proc rw
"""


@pytest.mark.parametrize(("device", "kind", "network"), [
    ("0:45", "nfs4", True), ("0:46", "nfs", True), ("0:47", "fuse.sshfs", True), ("0:32", "tmpfs", False), ("8:1", "ext4", False), ("0:99", "", False),
    ("0:4", "", False)])  # fmt: skip
def test_the_file_system_of_a_device_is_found_among_the_mounts(module: Any, device: str, kind: str, network: bool) -> None:
    """Optional fields, spaces in paths and look-alike numbers do not mislead it; network file systems are known."""
    assert module.mount_type(MOUNTS, device) == kind
    assert (kind in module.NETWORK_FILESYSTEMS) is network
