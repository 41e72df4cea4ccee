"""The README's own commands, run as a newcomer would type them."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import GRACE, LIMIT, ROOT, Place, need

README = (ROOT / "README.md").read_text()


def blocks(kind: str) -> list[str]:
    """The fenced blocks of one kind."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def two_commands() -> list[str]:
    return [block.strip() for block in blocks("") if block.startswith("python3 -m venv")]


def test_ci_runs_the_second_command_as_printed() -> None:
    """What .ci/run runs is what the README tells a newcomer to run."""
    first, second = two_commands()
    assert first.endswith("grace demo") and second.endswith("pytest -q")
    assert second in (ROOT / ".ci" / "run").read_text().splitlines()


def test_first_use(place: Place) -> None:
    """The handler and the commands of the first use index a real folder, and both sides tell the same."""
    need("bash", "jq")
    folder = Path("/usr/share/common-licenses")
    if not folder.is_dir():
        pytest.skip("this machine has no /usr/share/common-licenses")
    (script,) = [block for block in blocks("python") if "GRACE_RESULT" in block]
    (commands,) = [block for block in blocks("sh") if "handler add ingestion_worker" in block]
    (place.folder / "index_folder.py").write_text(script)
    environment = {**place.environment, "PATH": f"{Path(GRACE).parent}:{place.environment['PATH']}"}
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", commands], cwd=place.folder, env=environment, capture_output=True, text=True,
                          timeout=LIMIT, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (intent,) = place.json("intent", "list")
    task = place.task(intent["htm_task_id"])
    texts = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert (intent["status"], intent["sla_met"], intent["learned_from"], intent["domain"]) == ("completed", True, True, "ingestion")
    assert (task["intent_id"], task["status"], task["priority"]) == (intent["intent_id"], "completed", "high")
    assert intent["result"] == task["result"]
    assert task["result"]["documents"] == len(texts) and task["result"]["bytes"] == sum(map(len, texts))
    index = json.loads(Path(task["result"]["index"]).read_text())
    assert len(index) == task["result"]["words"] and "GPL-3" in index["license"]


def test_external_worker(place: Place) -> None:
    """The loop for workers that are not grace works as printed."""
    need("bash", "jq")
    (commands,) = [block for block in blocks("sh") if "task claim" in block]
    setup, work = commands.split("\n", 1)
    environment = {**place.environment, "PATH": f"{Path(GRACE).parent}:{place.environment['PATH']}"}
    subprocess.run(["bash", "-eu", "-c", setup], cwd=place.folder, env=environment, check=True, capture_output=True)
    _, task_id = place.submit("Transcribe", "--handler", "transcribe")
    subprocess.run(["bash", "-eu", "-c", work], cwd=place.folder, env=environment, check=True, capture_output=True)
    task = place.task(task_id)
    assert (task["status"], task["result"], task["sla_ms"]) == ("completed", {"words": 812}, 600_000)


def test_every_setting_and_topic_is_real(module: object) -> None:
    """Settings and topics that the README names exist in the program or the schema."""
    source = (ROOT / "grace.py").read_text() + (ROOT / "schema.sql").read_text()
    for name in re.findall(r"config set ([a-z_.]+)", README):
        assert name in module.SETTINGS  # type: ignore[attr-defined]
    for prefix in ("bridge.ready", "bridge.repaired", "learning.outcome", "daemon.suspended", "daemon.trouble"):
        assert prefix in source
