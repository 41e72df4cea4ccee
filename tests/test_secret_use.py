"""Secrets in use: `grace run --secret` with its log, what takes values out of output, doctor, and the demo's act."""

from __future__ import annotations

import base64
import json
import os
import random
import subprocess
import tempfile
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import GRACE, Place, need, until
from tests.test_cli import Terminal

VALUE = "canary-31b7/+=&x"
FLOOR = str(64 << 20)


@pytest.fixture
def vault(tmp_path: Path) -> Iterator[Place]:
    """A place with a vault, a medium secret `shop_token` and a low one `motd`."""
    place = Place(tmp_path)
    (tmp_path / "passphrase").write_text("correct horse\n")
    (tmp_path / "passphrase").chmod(0o600)
    place.ok("config", "set", "vault.argon2_memory", FLOOR)
    place.ok("init", "--name", "anna", "--passphrase-file", str(tmp_path / "passphrase"))
    place.ok("secret", "set", "shop_token", "--service", "shop", "--passphrase-file", str(tmp_path / "passphrase"), stdin=VALUE.encode())
    place.ok("secret", "set", "motd", "--risk", "low", stdin=b"hello world")
    yield place
    place.close()


def answer(place: Place, *words: str) -> None:
    """Answer the one request that waits."""
    (waiting,) = until(lambda: place.json("consent", "pending"), "a request")
    place.ok("consent", words[0], waiting["consent_id"], *words[1:])


def approve(place: Place) -> None:
    answer(place, "approve", "--passphrase-file", str(place.folder / "passphrase"))


def end_of(place: Place, process: Any) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out.decode(), err.decode()


def test_run_gets_its_secret_after_consent(vault: Place) -> None:
    """The command has the value, its output passes through unchanged, and the log shows the name of the variable instead."""
    process = vault.start("run", "--sla", "1m", "--secret", "TOKEN=shop_token:upload", "--", "sh", "-c", 'echo "it is $TOKEN"; echo "$TOKEN" | base64; exit 3')
    (waiting,) = until(lambda: vault.json("consent", "pending"), "a request")
    (task,) = vault.json("task", "list")
    status = vault.json("status")
    assert status["pending_consents"] == 1 and "consent" in {problem["code"] for problem in status["problems"]}
    assert (task["status"], task["reason"], waiting["task_id"], waiting["requested_action"]) == ("assigned", "waiting_consent", task["task_id"], "upload")
    approve(vault)
    status, out, _ = end_of(vault, process)
    task = vault.task(task["task_id"])
    assert status == 3 and f"it is {VALUE}\n" in out
    assert (task["status"], task["reason"], task["exit_status"]) == ("failed", None, 3)
    log = vault.ok("task", "log", task["task_id"]).out
    assert "it is [secret TOKEN]" in log and VALUE not in log
    encoded = base64.b64encode(VALUE.encode())[:-4].decode()
    stored = b"".join(path.read_bytes() for path in vault.folder.rglob("*") if path.is_file())
    assert VALUE.encode() not in stored and encoded.encode() not in stored


def test_run_without_consent_never_starts(vault: Place) -> None:
    """A denial ends the task, reason consent_denied, with 125; the command did not run."""
    process = vault.start("run", "--secret", "TOKEN=shop_token", "--", "touch", str(vault.folder / "ran"))
    answer(vault, "deny", "--reason", "not on a Sunday")
    status, _, err = end_of(vault, process)
    (task,) = vault.json("task", "list")
    assert status == 125 and "not on a Sunday" in err
    assert (task["status"], task["reason"], task["success"]) == ("failed", "consent_denied", False)
    assert not (vault.folder / "ran").exists()


def test_the_ladder_climbs_while_a_run_waits(vault: Place) -> None:
    """Waiting for consent stops no clock: the warning and the breach come while nobody answers."""
    process = vault.start("run", "--sla", "500ms", "--secret", "TOKEN=shop_token", "--", "true")
    until(lambda: len(vault.events("htm.sla.*")) >= 3, "three steps of the ladder")
    approve(vault)
    status, _, _ = end_of(vault, process)
    (task,) = [task for task in vault.json("task", "list") if task["task_type"] == "command"]
    assert status == 0 and task["status"] == "completed" and task["sla_met"] is False


def test_a_run_that_is_interrupted_while_it_waits(vault: Place) -> None:
    """TERM ends the waiting, takes the request back, and the task has failed as interrupted."""
    process = vault.start("run", "--secret", "TOKEN=shop_token", "--", "true")
    until(lambda: vault.json("consent", "pending"), "a request")
    process.terminate()
    status, _, _ = end_of(vault, process)
    (task,) = vault.json("task", "list")
    (consent,) = vault.json("consent", "history")
    assert (status, task["status"], task["reason"], consent["consent_status"]) == (125, "failed", "interrupted", "revoked")


def test_a_low_secret_asks_nobody(vault: Place) -> None:
    """Low risk runs at once and is recorded."""
    done = vault.ok("run", "--secret", "TEXT=motd:read", "--", "sh", "-c", 'echo "$TEXT"')
    assert done.out == "hello world\n"
    (consent,) = vault.json("consent", "history")
    assert (consent["consent_status"], consent["approval_method"], consent["risk_level"]) == ("used", "auto", "low")


def test_nobody_is_asked_in_the_name_of_a_stranger(vault: Place) -> None:
    """--user names an approver, also where nobody has to answer."""
    for key in ("motd", "shop_token"):
        done = vault.call("secret", "get", key, "--action", "read", "--for", "a test", "--user", "nobody", "--timeout", "1s")
        assert done.status == 3 and "anna" in done.err
    assert vault.json("consent", "history") == []


def test_unknown_secrets_and_words(vault: Place) -> None:
    """A secret that is not there fails the run with 125, a malformed --secret is a usage error."""
    assert vault.call("run", "--secret", "A=nothing", "--", "true").status == 125
    assert vault.call("run", "--secret", "nothing", "--", "true").status == 2
    assert vault.call("run", "--secret", "GRACE_X=motd", "--", "true").status == 2


def test_no_piece_of_output_hides_a_secret_from_the_scrubber(module: Any) -> None:
    """However output is cut into pieces, a value is found in it, in each of its spellings, and nothing else is touched."""
    rnd = random.Random(7)
    value = VALUE.encode()
    spellings = [value, base64.b64encode(b"u:" + value), base64.b64encode(b"us:" + value), base64.b64encode(b"use:" + value),
                 base64.urlsafe_b64encode(value), urllib.parse.quote(value, safe="").encode(), json.dumps(VALUE)[1:-1].encode()]  # fmt: skip
    hidden = [value, base64.b64encode(b"xxx" + value)[4:-4], base64.b64encode(b"x" + value)[3:-4], base64.b64encode(b"xx" + value)[4:-4]]
    for _ in range(300):
        text = b"before " + b" and ".join(rnd.sample(spellings, 3)) + b" after"
        scrubber, out, at = module.Scrubber({"TOKEN": value}), b"", 0
        while at < len(text):
            step = rnd.randint(1, 9)
            out += scrubber.feed(text[at : at + step])
            at += step
        out += scrubber.feed(b"", last=True)
        assert out.startswith(b"before ") and out.endswith(b" after") and out.count(b"[secret TOKEN]") == 3
        assert not any(form in out for form in hidden)


def test_output_that_begins_no_secret_is_not_held_back(module: Any) -> None:
    """The last words of a command that hangs are in its log: only what may become a secret, in any spelling, waits for more."""
    scrubber = module.Scrubber({"TOKEN": b"kindergarten-2291"})
    assert scrubber.feed(b"opening the door?\n") == b"opening the door?\n"
    assert scrubber.feed(b"a kind word, and then? kinder") == b"a kind word, and then? "
    assert scrubber.feed(b" people?") == b"kinder people?"
    assert scrubber.feed(b"kinderg") == b"" and scrubber.feed(b"arten-2291!") == b"[secret TOKEN]!"


def test_secrets_that_overlap_are_taken_out_whole(module: Any) -> None:
    """However they overlap, and wherever the output is cut."""
    values = {"A": b"abcd-efgh-ijkl", "B": b"ijkl-mnop-qrst"}
    data = b"x abcd-efgh-ijkl-mnop-qrst y"
    for cut in range(len(data)):
        scrubber = module.Scrubber(values)
        out = scrubber.feed(data[:cut]) + scrubber.feed(data[cut:]) + scrubber.feed(b"", last=True)
        assert out.startswith(b"x [secret") and out.endswith(b"] y") and b"mnop" not in out and b"efgh" not in out, (cut, out)


def test_plain_output_passes_the_scrubber_unchanged(module: Any) -> None:
    """What holds no secret is passed on byte for byte, whatever the pieces."""
    data = os.urandom(20_000)
    scrubber = module.Scrubber({"TOKEN": b"a value that is not there"})
    pieces = [data[at : at + 77] for at in range(0, len(data), 77)]
    assert b"".join([*map(scrubber.feed, pieces), scrubber.feed(b"", last=True)]) == data


@pytest.mark.parametrize("width", [16, 64, 76])
def test_a_long_secret_in_wrapped_output(module: Any, width: int) -> None:
    """A key of several lines is found plain, indented line by line, without its last line end, and in base64 of any width."""
    body = base64.b64encode(random.Random(3).randbytes(1200)).decode()
    value = "-----BEGIN KEY-----\n" + "\n".join(body[n : n + 64] for n in range(0, len(body), 64)) + "\n-----END KEY-----\n"
    encoded = base64.b64encode(b"ab" + value.encode()).decode()
    wrapped = "\n".join(encoded[n : n + width] for n in range(0, len(encoded), width))
    indented = "".join(f"    {line}\n" for line in value.splitlines())
    scrubber = module.Scrubber({"KEY": value.encode()})
    data = f"{value}|{value.strip()}|{indented}|{wrapped}|the end\n".encode()
    out = b"".join([*(scrubber.feed(data[at : at + 100]) for at in range(0, len(data), 100)), scrubber.feed(b"", last=True)]).decode()
    assert out.endswith("|the end\n") and "[secret KEY]" in out
    plain = "".join(out.split())
    assert not any(body[n : n + 12] in plain or encoded[n + 8 : n + 20] in plain for n in range(0, 1100, 4))


def test_a_secret_that_begins_like_another_one(module: Any) -> None:
    """Of two values that begin alike the longer one is taken out whole."""
    scrubber = module.Scrubber({"SHORT": b"abcd-1234", "LONG": b"abcd-1234-5678-9012"})
    out = b"".join(scrubber.feed(bytes([byte])) for byte in b"x abcd-1234-5678-9012 y abcd-1234 z") + scrubber.feed(b"", last=True)
    assert out == b"x [secret LONG] y [secret SHORT] z"


# ---- a file in memory


def exec_without_memfd(vault: Place, runtime: Path, command: str) -> tuple[int, str, str]:
    """`exec --via file` on a kernel that makes no memfd, as far as this process can tell."""
    need("strace")
    inject = ("strace", "-f", "-qq", "-o", os.devnull, "-e", "trace=memfd_create", "-e", "inject=memfd_create:error=ENOSYS")
    done = subprocess.run([*inject, GRACE, "exec", "--via", "file", "--secret", "WHERE=motd", "--", "sh", "-c", command], capture_output=True, text=True,
                          env={**vault.environment, "XDG_RUNTIME_DIR": str(runtime)}, timeout=60, check=False)  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_a_file_without_memfd_lies_on_a_tmpfs_and_has_no_name(vault: Place) -> None:
    """Where the kernel makes no file in memory, the runtime directory does, if it is on a tmpfs; nothing stays there."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as runtime:
        status, out, err = exec_without_memfd(vault, Path(runtime), 'stat -L -c %a "$WHERE"; cat "$WHERE"')
        assert (status, out) == (0, "600\nhello world"), err
        assert not any(path.is_file() for path in Path(runtime).rglob("*"))


def test_no_file_on_a_disk_instead(vault: Place) -> None:
    """Without a place in memory the command is not run, nobody is asked, and the value is used up by nobody."""
    if os.stat(vault.folder).st_dev == os.stat("/dev/shm").st_dev:
        pytest.skip("needs a temporary directory on a disk")
    status, out, err = exec_without_memfd(vault, vault.folder, "echo ran")
    assert (status, out) == (125, "") and "no place in memory" in err and "--via env" in err
    assert vault.json("consent", "history") == []


# ---- doctor


def findings(place: Place, status: int) -> dict[str, dict[str, str]]:
    done = place.call("doctor", "--json")
    assert done.status == status, done.out
    return {finding["code"]: finding for finding in done.json["findings"]}


def test_doctor_without_a_vault(place: Place) -> None:
    """Nothing is wrong, and the way to a vault is named."""
    found = findings(place, 0)
    assert "grace init" in found["no_vault"]["hint"]


def test_doctor_tells_what_a_vault_is_worth_here(vault: Place) -> None:
    """One person, his key beside the database, and a passphrase file are said; each secret has its line."""
    found = findings(vault, 0)
    assert {"one_person", "keys_with_database", "passphrase_file", "one_backup_set"} <= set(found)
    document = vault.json("doctor")
    outlook = {row["secret_key"]: row for row in document["secrets"]}
    assert "machine" in outlook["motd"]["opened_by"] and "passphrase" in outlook["shop_token"]["opened_by"]
    assert {row["enforced_by"] for row in document["guarantees"]} == {"mathematics", "the program", "nothing"}
    shown = vault.ok("doctor").out
    assert "not" in shown and "shop_token" in shown


def test_doctor_sees_a_changed_secret_and_a_changed_log(vault: Place) -> None:
    """A header and a leaf edited by hand are problems, and the exit status is 1."""
    vault.sql("DROP TRIGGER secret_stays; DROP TRIGGER audit_never_changes;"
              "UPDATE secret_entries SET header = replace(header, 'medium', 'low') WHERE secret_key = 'shop_token';"
              "UPDATE audit_log SET leaf = replace(leaf, 'medium', 'low') WHERE seq = 2")  # fmt: skip
    found = findings(vault, 1)
    assert found["seal"]["level"] == found["audit"]["level"] == "problem"


def test_doctor_sees_a_synced_folder(vault: Place) -> None:
    """Key files in a folder that is copied to other machines are a problem."""
    target = vault.folder / "Dropbox"
    target.mkdir(mode=0o700)
    (vault.folder / ".config").rename(target / "config")
    done = vault.call("doctor", "--json", env={"XDG_CONFIG_HOME": str(target / "config")})
    assert done.status == 1 and "synced_folder" in {finding["code"] for finding in done.json["findings"]}


def test_the_demo_has_a_consent_act(place: Place) -> None:
    """The demo seals a token, asks for it, approves it with a throw-away passphrase, and checks the log."""
    done = place.call("demo", "--json", timeout=120)
    assert done.status == 0, done.err
    steps = {" ".join(step["command"][1:3]): step for step in done.json["steps"]}
    assert steps["exec --secret"]["exit_status"] == 0 and "a token of 24 characters" in steps["exec --secret"]["output"]
    assert steps["consent approve"]["exit_status"] == steps["audit verify"]["exit_status"] == 0


# ---- another machine key


def test_a_lost_machine_key_loses_nothing(vault: Place) -> None:
    """Without machine.key everything says how to go on; an approver makes a new one, and all secrets open again."""
    phrase = ("--passphrase-file", str(vault.folder / "passphrase"))
    (keys,) = (vault.folder / ".config" / "grace").iterdir()
    for name in ("machine.key", "machine.seen"):
        (keys / name).unlink()
    lost = vault.call("secret", "get", "motd", "--action", "read", "--for", "a test")
    assert lost.status == 7 and "grace init --machine" in lost.err
    assert vault.call("doctor", "--json").status == 1
    assert vault.json("init", "--machine", *phrase)["resealed"] == ["motd"]
    assert vault.ok("secret", "get", "motd", "--action", "read", "--for", "a test").out == "hello world"
    process = vault.start("exec", "--secret", "TOKEN=shop_token", "--", "sh", "-c", 'echo "${#TOKEN}"')
    approve(vault)
    assert end_of(vault, process)[:2] == (0, f"{len(VALUE)}\n")
    assert vault.json("audit", "verify", *phrase)["ok"]


def test_a_stolen_machine_key_opens_nothing_new(vault: Place) -> None:
    """After a new machine key was made, the old key file put back is of no use."""
    (keys,) = (vault.folder / ".config" / "grace").iterdir()
    old = {name: (keys / name).read_bytes() for name in ("machine.key", "machine.seen")}
    vault.ok("init", "--machine", "--passphrase-file", str(vault.folder / "passphrase"))
    vault.ok("secret", "rotate", "motd", stdin=b"another text")
    for name, data in old.items():
        (keys / name).write_bytes(data)
    assert "another text" not in vault.call("secret", "get", "motd", "--action", "read", "--for", "a test").out
    assert vault.call("secret", "get", "motd", "--action", "read", "--for", "a test").status == 5


# ---- at the prompt


@pytest.mark.parametrize("key", ["\x04", "\x03", "\n"])
def test_no_passphrase_at_the_prompt(place: Place, key: str) -> None:
    """End of input, Ctrl-C and an empty line make no vault; the message stands on a line of its own."""
    terminal = Terminal(place, "init", "--name", "anna")
    terminal.until("Passphrase of anna: ")
    terminal.type(key)
    status, text = terminal.end()
    assert status == (130 if key == "\x03" else 5) and "internal" not in text and "Traceback" not in text
    assert ("\ngrace: no passphrase was given" in text) == (key != "\x03")
    assert place.call("approver", "list").status == 7


def test_a_short_passphrase_is_warned_of(place: Place) -> None:
    """It is taken, and said to be weak; what init says fits into eighty columns."""
    place.ok("config", "set", "vault.argon2_memory", FLOOR)
    terminal = Terminal(place, "init", "--name", "anna")
    for prompt in ("Passphrase of anna: ", "The same again: "):
        terminal.until(prompt)
        terminal.type("short\n")
    status, text = terminal.end()
    assert status == 0 and "5 characters can be guessed" in text and "grace secret set KEY" in text
    assert max(len(line) for line in text.splitlines() if "key_file" not in line and "fingerprint" not in line) <= 110
