"""The event bus as its readers see it: globs, places to begin at, limits, following, durable cursors, facts of one's own, and the order of it all."""

from __future__ import annotations

import json
import re
import select
import signal
import subprocess
from typing import Any

import pytest

from tests.conftest import LIMIT, Place, until

SLA_KEYS = {"task_id", "intent_id", "task_type", "domain", "level", "due_at", "noticed_at", "lag_ms", "late", "sla_ms", "elapsed_ms", "elapsed_percent",
            "overdue_ms", "overdue_percent", "assigned_worker", "action", "rescue_task_id", "message"}  # fmt: skip
INSTANT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


def publish_many(place: Place, n: int, topic: str = "my.count") -> list[str]:
    """Put n facts on the bus with numbers for payloads; their ids."""
    return [place.json("events", "publish", topic, json.dumps({"n": number}))["id"] for number in range(n)]


def numbers(events: list[dict[str, Any]]) -> list[int]:
    return [event["payload"]["n"] for event in events]


def next_line(process: subprocess.Popen[bytes]) -> Any:
    """The next line of a process whose unbuffered output is JSON lines; fails when none comes."""
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], LIMIT)[0], "no line came"
    return json.loads(process.stdout.readline())


def test_topic_globs(place: Place) -> None:
    """A star stands for anything, a question mark for one character, and all else for itself."""
    topics = ["shop.order.new", "shop.order.paid", "shop.stock", "shopper.order.new", "a_b.c", "axb.c", "x-y"]
    for topic in topics:
        place.ok("events", "publish", topic)
    for glob, wanted in (("*", topics), ("shop.*", topics[:3]), ("shop.order.*", topics[:2]), ("*.new", ["shop.order.new", "shopper.order.new"]),
                         ("shop.stock", ["shop.stock"]),
                         ("a_b.c", ["a_b.c"]), ("a?b.c", ["a_b.c", "axb.c"]), ("shop", []), ("x-?", ["x-y"]), ("*order*", ["shop.order.new",
                                                                                                                           "shop.order.paid",
                                                                                                                           "shopper.order.new"])):
        assert [event["topic"] for event in place.json("events", "--topic", glob)] == wanted, glob
    for glob in ("shop,*", "[a-z]"):
        assert place.call("events", "--topic", glob).status == 2, glob


def test_limit_alone_means_the_newest(place: Place) -> None:
    """--limit alone shows the newest N in ascending order; a hundred is the default; with --since it is the first N."""
    place.ok("status")
    ids = publish_many(place, 6)
    assert numbers(place.json("events", "--limit", "3")) == [3, 4, 5]
    assert numbers(place.json("events", "--limit", "3", "--topic", "my.*")) == [3, 4, 5]
    assert numbers(place.json("events", "--since", "1h", "--limit", "3")) == [0, 1, 2]
    assert numbers(place.json("events", "--since", ids[1], "--limit", "2")) == [2, 3]
    assert numbers(place.json("events", "--since", ids[5])) == []
    assert numbers(place.json("events", "--since", ids[0])) == [1, 2, 3, 4, 5]
    place.handler("work", "--", "true")
    place.ok("submit-intent", "--batch", "-", stdin=b'{"goal":"a","handler":"work"}\n' * 60)
    newest, everything = place.json("events"), place.events()
    assert len(everything) == 126 and newest == everything[-100:]
    assert place.json("events", "--limit", "1000") == everything


def test_since_takes_ids_instants_and_durations(place: Place) -> None:
    """From an event's id (without it), an instant, or a duration ago; anything else is a usage error that names the ways."""
    ids = publish_many(place, 3)
    created = place.json("events")[1]["created_at"]
    assert numbers(place.json("events", "--since", ids[0])) == [1, 2]
    assert {1, 2} <= set(numbers(place.json("events", "--since", created)))
    assert numbers(place.json("events", "--since", "2000-01-01T00:00:00+02:00")) == [0, 1, 2]
    assert numbers(place.json("events", "--since", "2999-01-01T00:00:00Z")) == []
    assert numbers(place.json("events", "--since", "1h30m")) == [0, 1, 2]
    for wrong in ("5", "0", "-1", "", "yesterday", "evt", "evt_", "evt_x", "evt_-1", "2026-11-22", "2026-11-22T00:00:00", "task_1", ids[0] + "x",
                  "1763795299", "1 h"):
        done = place.call("events", "--since", wrong, "--json")
        assert done.status == 2 and done.error["code"] == "usage" and "--since" in done.error["message"] and done.out == "", wrong


def test_ids_rise_and_are_no_bare_numbers(place: Place) -> None:
    """Ids sort as text in the order of the events, and nobody takes one for a number."""
    publish_many(place, 4)
    ids = [event["id"] for event in place.events()]
    assert ids == sorted(ids) and len(set(ids)) == 4 and all(re.fullmatch(r"[a-z]+_[0-9a-z]+", name) for name in ids)


@pytest.mark.parametrize("payload", ['{"a": [1, 2.5, null, true, {"b": "c"}]}', "[1, 2]", '"text"', "5", "null", "false", "-1.5", '{"ключ": "🏃\\u202e"}',
                                     '{"created_at": 5, "sla_deadline": "x"}', "{}"])
def test_any_json_is_a_payload(payload: str, place: Place) -> None:
    """What was published comes back as it was, in JSON and in a listing, from an argument, a file or stdin."""
    (place.folder / "payload.json").write_text(payload, encoding="utf-8")
    place.ok("events", "publish", "my.fact", "--", payload)
    place.ok("events", "publish", "my.fact", "@payload.json")
    place.ok("events", "publish", "my.fact", "-", stdin=payload.encode())
    events = place.json("events")
    assert [event["payload"] for event in events] == [json.loads(payload)] * 3
    assert all(set(event) == {"id", "topic", "source", "created_at", "payload"} and INSTANT.fullmatch(event["created_at"]) for event in events)
    plain = place.ok("events").out
    assert plain.count("\n") == 3 and "\u202e" not in plain and events[0]["id"] in plain


def test_publishing_tells_the_id(place: Place) -> None:
    """The new event's id is printed; the payload is {} where none is given."""
    assert place.ok("events", "publish", "backup.done").out.strip() == place.json("events")[0]["id"]
    assert place.json("events")[0]["payload"] == {}
    assert place.json("events", "publish", "backup.done")["topic"] == "backup.done"


@pytest.mark.parametrize("topic", ["htm.task.completed", "agentic.intent.created", "secrets.consent.approved", "governance.decision", "learning.outcome",
                                   "daemon.started",
                                   "bridge.ready", "alert.failed", "htm.anything"])  # fmt: skip
def test_graces_own_topics_are_refused(topic: str, place: Place) -> None:
    """Nobody forges what grace says."""
    place.ok("status")
    done = place.call("events", "publish", topic, "{}", "--json")
    assert done.status == 2 and done.error["code"] == "usage" and place.events() == []


@pytest.mark.parametrize("topic", ["", ".", "a.", ".a", "a..b", "A.b", "a b", "a/b", "ä", "x" * 129, "htm.*", "a\nb"])
def test_odd_topics_are_refused(topic: str, place: Place) -> None:
    """A topic is words joined by dots."""
    place.ok("status")
    assert place.call("events", "publish", topic, "{}").status == 2 and place.events() == []


def test_follow_shows_what_comes(place: Place) -> None:
    """--follow goes on: first the newest, then each event as it is committed, one JSON object a line."""
    publish_many(place, 3)
    process = place.start("events", "--follow", "--json", "--topic", "my.*", "--limit", "2", bufsize=0)
    assert [next_line(process)["payload"]["n"] for _ in range(2)] == [1, 2]
    for number in range(5):
        place.ok("events", "publish", "my.count", json.dumps({"n": 10 + number}))
        place.ok("events", "publish", "other.count")
        assert next_line(process)["payload"]["n"] == 10 + number
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=LIMIT)
    assert (process.returncode, out, err.strip()) == (130, b"", b"")


def test_follow_from_a_place(place: Place) -> None:
    """With --since it begins after that event, and with --limit it ends after so many."""
    ids = publish_many(place, 4)
    process = place.start("events", "--follow", "--json", "--since", ids[1], "--limit", "3", bufsize=0)
    assert [next_line(process)["payload"]["n"] for _ in range(2)] == [2, 3]
    assert process.poll() is None
    publish_many(place, 2)
    out, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0 and numbers([json.loads(line) for line in out.splitlines()]) == [0]


def test_followers_see_all_of_many_writers(place: Place) -> None:
    """With several writers at once a follower misses none, and sees them in the order of the bus."""
    place.ok("status")
    process = place.start("events", "--follow", "--json", "--since", "1h", bufsize=0)
    writers = [place.start("events", "publish", "my.count", json.dumps({"n": n})) for n in range(12)]
    seen = [next_line(process) for _ in writers]
    assert all(writer.wait(LIMIT) == 0 for writer in writers)
    assert sorted(numbers(seen)) == list(range(12)) and [event["id"] for event in seen] == [event["id"] for event in place.events()]


def consumed(place: Place, *options: str) -> list[dict[str, Any]]:
    """What a consumer is told now, one call."""
    return list(place.json("events", "--consumer", "reader", *options))


def test_a_consumer_goes_on_where_it_stopped(place: Place) -> None:
    """Its first call begins at the beginning, each further one after the last line; another name has a place of its own."""
    publish_many(place, 5)
    assert numbers(consumed(place, "--limit", "2")) == [0, 1]
    assert numbers(consumed(place, "--limit", "2")) == [2, 3]
    publish_many(place, 1)
    assert numbers(consumed(place)) == [4, 0]
    assert consumed(place) == []
    assert place.ok("events", "--consumer", "another").out.count("\n") == 6


def test_a_consumer_in_json_is_one_document(place: Place) -> None:
    """Without --follow a consumer's events are one array, as every list; [] when there is nothing new."""
    publish_many(place, 3)
    assert numbers(place.json("events", "--consumer", "reader")) == [0, 1, 2]
    assert place.json("events", "--consumer", "reader") == []


def test_a_killed_consumer_loses_nothing(place: Place) -> None:
    """Killed in the middle again and again, it goes on after the last line that it wrote: nothing is lost, at most that line comes twice."""
    total = 400
    place.handler("work", "--", "true")
    place.ok("submit-intent", "--batch", "-", stdin=b'{"goal":"a","handler":"work"}\n' * (total // 2))
    wanted = [event["id"] for event in place.events()]
    assert len(wanted) == total
    seen: list[str] = []
    repeated = 0
    for kill_after in (1, 7, 40, 90):
        process = place.start("events", "--consumer", "reader", "--follow", "--json", bufsize=0)
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(min(kill_after, total - len(seen)))]  # the one before may have come far
        process.send_signal(signal.SIGKILL)
        rest, _ = process.communicate(timeout=LIMIT)
        told = [json.loads(line)["id"] for line in [*lines, *rest.splitlines(keepends=True)] if line.endswith(b"\n")]
        if seen and told and told[0] == seen[-1]:
            repeated += 1
            told = told[1:]
        seen += told
        assert seen == wanted[: len(seen)], "lost or out of order"
    last = [event["id"] for event in consumed(place)]
    seen += last[1:] if last and last[0] == seen[-1] else last
    assert seen == wanted and repeated <= 4


def test_a_consumers_reader_that_goes_away(place: Place) -> None:
    """A pipe that closes early ends the consumer without a traceback, and what it had not written comes later."""
    publish_many(place, 5)
    process = place.start("events", "--consumer", "reader", "--json", "--follow", bufsize=0)
    assert next_line(process)["payload"]["n"] == 0
    for _ in range(3):
        next_line(process)
    assert next_line(process)["payload"]["n"] == 4
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    publish_many(place, 2)
    assert process.wait(LIMIT) not in (0, 1, 2) and b"Traceback" not in process.stderr.read()
    assert numbers(consumed(place))[-1] == 1


def changes(events: list[dict[str, Any]], task_id: str) -> list[tuple[str, str]]:
    """The steps of a task's status as its events tell them."""
    return [(event["payload"]["previous_status"], event["payload"]["status"]) for event in events
            if event["topic"].startswith("htm.task.") and event["payload"]["task_id"] == task_id and "previous_status" in event["payload"]]  # fmt: skip


def test_every_change_of_a_task_is_an_event(place: Place) -> None:
    """From its creation over a retry to its end: each step once, in order, with the topic of the final state; the intent's too."""
    place.handler("work", "--max-attempts", "2", "--backoff", "1ms", "--", "sh", "-c", "exit $((2 - GRACE_ATTEMPT))")
    place.handler("broken", "--max-attempts", "1", "--", "false")
    place.handler("slow", "--max-attempts", "1", "--timeout", "100ms", "--", "sleep", "60")
    good_intent, good = place.submit("a", "--handler", "work")
    bad_intent, bad = place.submit("b", "--handler", "broken")
    _, late = place.submit("c", "--handler", "slow")
    _, behind = place.submit("d", "--handler", "work", "--after", bad_intent)
    _, waits = place.submit("e", "--handler", "work", "--after", good_intent, "--in", "1h")
    _, dropped = place.submit("f", "--handler", "work", "--in", "1h")
    with place.daemon("--workers", "2"):
        for task_id in (good, bad, late, behind):
            place.until_status(task_id, "completed", "failed", "timeout", "cancelled")
    place.ok("task", "cancel", dropped)
    events = place.events()
    run = [("queued", "assigned"), ("assigned", "running")]
    assert changes(events, good) == [*run, ("running", "queued"), *run, ("running", "completed")]
    assert changes(events, bad) == [*run, ("running", "failed")]
    assert changes(events, late) == [*run, ("running", "timeout")]
    assert changes(events, behind) == [("blocked", "cancelled")]
    assert changes(events, waits) == [("blocked", "queued")]
    assert changes(events, dropped) == [("queued", "cancelled")]
    for task_id, end in ((good, "completed"), (bad, "failed"), (late, "timeout"), (behind, "cancelled"), (dropped, "cancelled")):
        own = [event["topic"] for event in events if event["payload"].get("task_id") == task_id and event["topic"].startswith("htm.task.")]
        assert own[0] == "htm.task.created" and own[-1] == f"htm.task.{end}" and set(own[1:-1]) <= {"htm.task.update"}
        assert place.task(task_id)["status"] == end
    for intent_id, end in ((good_intent, "completed"), (bad_intent, "failed")):
        own = [event["topic"] for event in events if event["payload"].get("intent_id") == intent_id and event["topic"].startswith("agentic.")]
        assert own == ["agentic.intent.created", f"agentic.intent.{end}"]
    assert [event["created_at"] for event in events] == sorted(event["created_at"] for event in events)
    assert {"daemon.started", "daemon.stopped", "learning.outcome"} <= {event["topic"] for event in events}


def test_a_raised_priority_is_an_event(place: Place) -> None:
    """Urgency that moves a task forward is told with its reason, before and after."""
    place.handler("outside", "--external")
    _, task_id = place.submit("a", "--handler", "outside", "--sla", "400ms", "--priority", "low")
    with place.daemon():
        place_of = until(lambda: [event["payload"] for event in place.events("htm.task.update") if event["payload"].get("priority") == "critical"],
                         "the urgency")[0]
    told = [event["payload"] for event in place.events("htm.task.update") if "previous_priority" in event["payload"] and event["payload"]["task_id"] == task_id]
    assert [(row["previous_priority"], row["priority"]) for row in told] == [("low", "high"), ("high", "critical")] and place_of["task_id"] == task_id
    assert all(row["reason"] for row in told)


def test_payloads_of_the_ladder(place: Place) -> None:
    """Warning, violation and critical step carry all that a reader needs, with the true instants."""
    place.handler("outside", "--external")
    intent_id, task_id = place.submit("Feed the cat", "--handler", "outside", "--sla", "500ms", "--domain", "pets")
    with place.daemon():
        until(lambda: [event for event in place.events("htm.sla.critical") if event["payload"]["task_id"] == task_id], "the critical step")
        task = place.task(task_id)
    steps = [event for event in place.events("htm.sla.*") if event["payload"]["task_id"] == task_id]
    assert [event["topic"] for event in steps] == ["htm.sla.warning", "htm.sla.violated", "htm.sla.critical"]
    for event, level, at in zip(steps, ("warning", "violated", "critical"), (400, 500, 1000), strict=True):
        payload = event["payload"]
        assert set(payload) >= SLA_KEYS
        assert (payload["intent_id"], payload["task_type"], payload["domain"], payload["level"], payload["sla_ms"]) == (intent_id, "outside", "pets", level,
                                                                                                                        500)
        assert payload["elapsed_ms"] == at and payload["elapsed_percent"] == at / 5 and payload["overdue_ms"] == max(0, at - 500)
        assert payload["overdue_percent"] == max(0, at / 5 - 100)
        assert INSTANT.fullmatch(payload["due_at"]) and INSTANT.fullmatch(payload["noticed_at"])
        assert payload["noticed_at"] == event["created_at"] >= payload["due_at"]
        assert payload["lag_ms"] >= 0 and isinstance(payload["late"], bool) and payload["assigned_worker"] is None
        assert "Feed the cat" in payload["message"] and payload["action"]
    assert steps[1]["payload"]["due_at"] == task["sla_deadline"]
    rescue = place.task(steps[2]["payload"]["rescue_task_id"])
    assert rescue["parent_task_id"] == task_id and [event["payload"]["rescue_task_id"] for event in steps[:2]] == [None, None]


def test_events_of_one_task_in_order_of_time(place: Place) -> None:
    """The story of a task is told without gaps, and by those who wrote it."""
    place.handler("work", "--sla", "1h", "--", "true")
    intent_id, task_id = place.submit("a", "--handler", "work")
    place.ok("daemon", "--once")
    own = [event for event in place.events() if event["payload"].get("task_id") == task_id or event["payload"].get("intent_id") == intent_id]
    assert [event["topic"] for event in own if not event["topic"].startswith("learning")] == [
        "htm.task.created", "agentic.intent.created", "htm.task.update", "htm.task.update", "htm.task.completed", "agentic.intent.completed"]  # fmt: skip
    assert own[0]["source"].startswith("cli:") and all(event["source"] for event in own)
    done = own[-1]["payload"]
    assert (done["sla_met"], done["status"], done["goal"]) == (True, "completed", "a") and done["execution_time_ms"] >= 0
    assert INSTANT.fullmatch(own[0]["payload"]["sla_deadline"])
