"""The README's own commands, run as a newcomer would type them."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import GRACE, LIMIT, ROOT, Place, need, until

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


def typed(command: str, place: Place, answers: dict[str, str]) -> tuple[int, str]:
    """Run a command of the README on a terminal of its own, answering its prompts; its status and what it showed."""
    environment = {**place.environment, "PATH": f"{Path(GRACE).parent}:{place.environment['PATH']}", "USER": "root", "TOKEN": "canary-7781"}
    pid, fd = pty.fork()
    if pid == 0:
        os.chdir(place.folder)
        os.execvpe("bash", ["bash", "-euo", "pipefail", "-c", command], environment)
    shown, answered, deadline = b"", 0, time.monotonic() + LIMIT
    with contextlib.suppress(OSError):  # the terminal is gone when the command is
        while time.monotonic() < deadline:
            if not select.select([fd], [], [], 1.0)[0]:
                continue
            data = os.read(fd, 4096)
            if not data:
                break
            shown += data
            for prompt, answer in answers.items():
                at = shown.find(prompt.encode(), answered)
                if at >= 0:
                    answered = at + len(prompt)
                    os.write(fd, answer.encode() + b"\n")
    os.close(fd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown.decode(errors="replace")


PHRASES = {"Passphrase of root: ": "correct horse", "The same again: ": "correct horse", "Type yes to approve: ": "yes"}


def test_living_with_it(place: Place) -> None:
    """One approval at a terminal lets the crontab's line run night after night; a template does it for two secrets; taken back, they ask again."""
    need("bash", "jq")
    (setup,), (standing,), (template,) = ([block for block in blocks("sh") if word in block] for word in ("grace init", "--standing", "template add"))
    line = next(line for line in README.splitlines() if line.startswith("15 3 * * *")).removeprefix("15 3 * * *").strip()
    nightly = shlex.split(line.replace("/srv/shop/upload.sh", "sh -c 'test \"$SHOP_TOKEN\" = canary-7781'"))[1:]
    assert typed(setup, place, PHRASES)[0] == 0
    status, shown = typed(standing, place, PHRASES)
    assert status == 0 and "STANDING for 30d, at most 40 times" in shown and "nobody is asked again" in shown, shown
    for _ in range(3):
        place.ok(*nightly)
    (given,) = [consent for consent in place.json("consent", "history") if consent["mode"] == "standing"]
    assert (given["used_count"], given["max_uses"]) == (3, 40)
    assert sum(leaf["kind"] == "secret.used" for leaf in place.json("audit", "list", "--limit", "1000")) == 3
    assert "standing_consent" in {finding["code"] for finding in place.json("doctor")["findings"]}
    place.ok("consent", "revoke", given["consent_id"], "--reason", "it is over")
    asking = place.start(*nightly)
    until(lambda: place.json("consent", "pending"), "the question after it was taken back")
    asking.terminate()
    asking.wait(LIMIT)
    assert typed("printf %s other | grace secret set cdn_token", place, PHRASES)[0] == 0
    assert typed(template, place, PHRASES)[0] == 0
    done = place.ok("exec", "--by", "ci-7", "--secret", "A=shop_token:upload-all", "--secret", "B=cdn_token:upload", "--", "sh", "-c", 'echo "$A $B"')
    assert done.out == "canary-7781 other\n"


def test_from_init_to_an_approved_exec(place: Place) -> None:
    """The README alone leads from nothing to a command that gets a secret because a person at a terminal said yes."""
    need("bash", "jq")
    setup, ask, answer = [block for block in blocks("sh") if "grace init" in block or "grace exec" in block or "consent pending" in block]
    status, shown = typed(setup, place, PHRASES)
    assert status == 0 and "canary-7781" not in shown, shown
    environment = {**place.environment, "PATH": f"{Path(GRACE).parent}:{place.environment['PATH']}"}
    with subprocess.Popen(["bash", "-c", ask], cwd=place.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        until(lambda: place.json("consent", "pending"), "the request")
        status, shown = typed(answer, place, PHRASES)
        out, err = process.communicate(timeout=LIMIT)
    assert status == 0, shown
    assert (process.returncode, out) == (0, "11 characters\n"), err
    code = re.search(r"code (\S+);", err)
    assert code and code[1] in shown
    order = [shown.index(word) for word in ("SEALED", "VERIFIED NOW", "REPORTED", "CLAIMED", "BEFORE")]
    assert order == sorted(order)
    check_log(place)


def check_log(place: Place) -> None:
    """The README's verifier agrees with an untouched log, and finds a leaf that was changed or cut, and a forged signature."""
    (script,) = [block for block in blocks("python") if "Ed25519PublicKey" in block]
    assert len(script.splitlines()) <= 60
    (place.folder / "verify.py").write_text(script)
    lines = place.ok("audit", "export").out.splitlines()

    def verify(changed: list[str]) -> tuple[int, str]:
        (place.folder / "log.jsonl").write_text("\n".join(changed) + "\n")
        done = subprocess.run([sys.executable, "verify.py", "log.jsonl"], cwd=place.folder, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout

    leaves = [n for n, line in enumerate(lines) if '"leaf"' in line[:20]]
    status, said = verify(lines)
    assert status == 0 and f"{len(leaves)} leaves, anchored" in said
    edited = [line.replace("shop_token", "shop_t0ken") for line in lines]
    cut = [line for n, line in enumerate(lines) if n not in leaves[2:]]
    forged = [line.replace('"signature": "', '"signature": "A') for line in lines]
    for changed, finding in ((edited, "was changed"), (cut, "cut or rewritten"), (forged, "does not hold")):
        status, said = verify(changed)
        assert status == 1 and finding in said, said


def test_every_setting_and_topic_is_real(module: object) -> None:
    """Settings and topics that the README names exist in the program or the schema."""
    source = (ROOT / "grace.py").read_text() + (ROOT / "schema.sql").read_text()
    for name in re.findall(r"config set ([a-z_.]+)", README):
        assert name in module.SETTINGS  # type: ignore[attr-defined]
    for prefix in ("bridge.ready", "bridge.repaired", "learning.outcome", "daemon.suspended", "daemon.trouble"):
        assert prefix in source
