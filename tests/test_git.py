"""git's credential helper: a real git, a real remote over HTTP that wants a token, and the protocol taken at its word.

The remote is git's own `http-backend` behind a small server on the loopback. Whether a value has leaked is looked for where it
could be seen: in files, in git's own traces, and in the command lines and environments of all processes meanwhile.
"""

from __future__ import annotations

import base64
import contextlib
import http.server
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import GRACE, LIMIT, Place, Result, need, until
from tests.test_cli import Terminal

TOKEN = "canary-8d41f7a2"
FLOOR = str(64 << 20)
LOGIN = base64.b64encode(f"shop:{TOKEN}".encode()).decode()
HELPER = f"!'{GRACE}' credential git"
Fields = dict[str, str]


# ---- a remote that wants a token


class Backend(http.server.BaseHTTPRequestHandler):
    """git http-backend as a CGI program, for whoever has the token."""

    server: Remote

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != f"Basic {self.server.login}":
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="a test"')
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        path, _, query = self.path.partition("?")
        variables = {
            "GIT_PROJECT_ROOT": str(self.server.root), "GIT_HTTP_EXPORT_ALL": "1", "PATH_INFO": path, "QUERY_STRING": query, "REMOTE_USER": "shop",
            "REQUEST_METHOD": self.command, "CONTENT_TYPE": self.headers.get("Content-Type", ""), "CONTENT_LENGTH": str(len(body)),
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""), "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
            "PATH": os.environ["PATH"], "GIT_CONFIG_NOSYSTEM": "1", "HOME": str(self.server.root),
        }  # fmt: skip
        done = subprocess.run(["git", "http-backend"], input=body, env=variables, capture_output=True, check=True, timeout=LIMIT)
        head, _, answer = done.stdout.partition(b"\r\n\r\n")
        headers = [line.split(": ", 1) for line in head.decode().splitlines()]
        self.send_response(next((int(value[:3]) for name, value in headers if name == "Status"), 200))
        for name, value in headers:
            if name != "Status":
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_POST = do_GET

    def log_message(self, *words: Any) -> None:
        pass


class Remote(http.server.ThreadingHTTPServer):
    """The bare repositories below `root`, on a port of the loopback."""

    daemon_threads = True

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), Backend)
        self.root, self.login = root, LOGIN
        self.host = f"127.0.0.1:{self.server_address[1]}"
        self.url = f"http://{self.host}"


class Desk:
    """A person's place with a vault, a working copy with a commit, and its remote `shop.git`."""

    def __init__(self, place: Place, remote: Remote):
        self.place, self.remote, self.work, self.bare = place, remote, place.folder / "work", remote.root / "shop.git"
        self.phrase = ("--passphrase-file", str(place.folder / "phrase"))
        self.environment = {name: value for name, value in place.environment.items() if not name.startswith("GIT_")} | {"GIT_CONFIG_NOSYSTEM": "1"}

    def start(self, *words: str, cwd: Path | None = None, **variables: str) -> subprocess.Popen[bytes]:
        """git in the background, with no terminal to ask on unless it makes one its own."""
        process = subprocess.Popen(["git", *words], cwd=cwd or self.work, env={"GIT_TERMINAL_PROMPT": "0", **self.environment, **variables},
                                   stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
        self.place.processes.append(process)
        return process

    def git(self, *words: str, cwd: Path | None = None, status: int = 0, **variables: str) -> tuple[str, str]:
        """git to its end; stdout and stderr."""
        process = self.start(*words, cwd=cwd, **variables)
        out, err = process.communicate(timeout=LIMIT)
        assert process.returncode == status, err.decode()
        return out.decode(), err.decode()

    def secret(self, key: str, *options: str, service: str | None = None, value: str | bytes = TOKEN, username: str | None = "shop") -> None:
        """Store a secret for the remote; of low risk with `--risk low`."""
        low = "low" in options
        who = () if username is None else ("--username", username)
        self.place.ok("secret", "set", key, "--service", service or self.remote.url, *who, *options, *(() if low else self.phrase),
                      stdin=value if isinstance(value, bytes) else value.encode())  # fmt: skip

    def waiting(self) -> dict[str, Any]:
        """The one request that waits."""
        (waiting,) = until(lambda: self.place.json("consent", "pending"), "a request")
        return dict(waiting)

    def approve(self) -> None:
        self.place.ok("consent", "approve", self.waiting()["consent_id"], *self.phrase)

    def head(self) -> str:
        """The commit that the remote's main is at; empty before the first push."""
        done = subprocess.run(["git", "-C", str(self.bare), "rev-parse", "--verify", "-q", "main"], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    def ask(self, operation: str, given: bytes | Fields, *options: str) -> Result:
        """Call the helper as git does."""
        data = given if isinstance(given, bytes) else "".join(f"{name}={value}\n" for name, value in given.items()).encode() + b"\n"
        return self.place.call("credential", "git", *options, operation, stdin=data)

    def given(self, **more: str) -> Fields:
        return {"protocol": "http", "host": self.remote.host, **more}

    def history(self) -> list[dict[str, Any]]:
        return list(self.place.json("consent", "history"))

    def leaves(self, kind: str) -> list[dict[str, Any]]:
        return [leaf for leaf in self.place.json("audit", "list") if leaf["kind"] == kind]


@pytest.fixture
def desk(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    need("git")
    execs = subprocess.run(["git", "--exec-path"], capture_output=True, text=True, check=True).stdout.strip()
    if not (Path(execs) / "git-http-backend").exists():
        pytest.skip("needs git http-backend, which is not installed")
    (place.folder / "phrase").write_text("correct horse\n")
    (place.folder / "phrase").chmod(0o600)
    with Remote(tmp_path_factory.mktemp("remote")) as remote:
        threading.Thread(target=remote.serve_forever, args=(0.05,), daemon=True).start()
        made = Desk(place, remote)
        made.git("init", "-q", "--bare", "-b", "main", str(made.bare), cwd=place.folder)
        made.git("config", "--file", str(made.bare / "config"), "http.receivepack", "true", cwd=place.folder)
        made.git("init", "-q", "-b", "main", str(made.work), cwd=place.folder)
        for name, value in (("user.name", "Anna"), ("user.email", "anna@example.org"), ("credential.helper", HELPER)):
            made.git("config", "--global", name, value)
        made.git("remote", "add", "origin", f"{remote.url}/shop.git")
        (made.work / "prices").write_text("1 2 3\n")
        made.git("add", ".")
        made.git("commit", "-q", "-m", "Prices")
        place.ok("config", "set", "vault.argon2_memory", FLOOR)
        place.ok("init", "--name", "anna", *made.phrase)
        yield made
        place.close()
        remote.shutdown()


# ---- pushing with a person's consent


class Lookout:
    """Looks through the command lines and environments of all processes as long as it is open."""

    def __init__(self, *words: str):
        self.words, self.found, self.rounds = [word.encode() for word in words], set[str](), 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._over.is_set():
            for entry in Path("/proc").glob("[0-9]*"):
                for name in ("cmdline", "environ"):
                    with contextlib.suppress(OSError):
                        data = (entry / name).read_bytes()
                        self.found |= {f"{entry}/{name}" for word in self.words if word in data}
            self.rounds += 1

    def __enter__(self) -> Lookout:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join(LIMIT)


def test_a_push_asks_and_pushes_and_leaves_no_token(desk: Desk) -> None:
    """A person approves in another process, the commit arrives, and the token is nowhere: no file, trace, command line or environment."""
    desk.secret("shop_token")
    trace = {"GIT_TRACE": str(desk.place.folder / "trace"), "GIT_TRACE_CURL": str(desk.place.folder / "curl"), "GIT_TRACE_PACKET": "1"}
    with Lookout(TOKEN, LOGIN) as lookout, Lookout("git-remote-http") as control:
        process = desk.start("push", "origin", "main", **trace)
        waiting = desk.waiting()
        until(lambda: lookout.rounds > 2, "a look at all processes")
        assert desk.head() == ""
        desk.approve()
        out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err.decode()
    assert desk.head() == desk.git("rev-parse", "main")[0].strip()
    assert (waiting["requested_action"], waiting["secret_key"], waiting["mode"]) == ("git_push", "shop_token", "once")
    assert waiting["requested_by"].startswith("git@") and waiting["requested_for"] == f"git push to {desk.remote.url}/shop.git"
    assert waiting["context"] == {"url": f"{desk.remote.url}/shop.git", "folder": str(desk.work), "command": "git push origin main"}
    assert f"code {waiting['code']};" in err.decode() and b"trace" not in out
    assert waiting["observed"]["reported"]["program"] == "git"
    assert [row["consent_status"] for row in desk.history()] == ["used"]
    assert control.found and not lookout.found and TOKEN not in (out + err).decode() and LOGIN not in (out + err).decode()
    assert b"Authorization: Basic <redacted>" in (desk.place.folder / "curl").read_bytes()
    for path in [*desk.place.folder.rglob("*"), *desk.remote.root.rglob("*")]:
        data = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        assert TOKEN.encode() not in data and LOGIN.encode() not in data, path


def test_the_helper_without_a_shell(desk: Desk) -> None:
    """`credential.helper = grace credential git`, as git itself looks for helpers, does the same when grace is in the PATH."""
    desk.secret("shop_token")
    path = f"{Path(GRACE).parent}:{desk.environment['PATH']}"
    process = desk.start("-c", "credential.helper=", "-c", "credential.helper=grace credential git", "push", "origin", "main", PATH=path)
    waiting = desk.waiting()
    assert waiting["requested_action"] == "git_push" and waiting["observed"]["reported"]["program"] == "git"
    desk.approve()
    _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0 and desk.head() == desk.git("rev-parse", "main")[0].strip(), err.decode()


def test_under_a_standing_consent_a_push_asks_nobody(desk: Desk) -> None:
    """What is asked once and approved for a month is pushed again and again; a fetch, or a push after it was taken back, asks."""
    desk.secret("shop_token")
    process = desk.start("push", "origin", "main")
    desk.place.ok("consent", "approve", desk.waiting()["consent_id"], "--for", "30d", "--uses", "9", *desk.phrase)
    process.communicate(timeout=LIMIT)
    assert process.returncode == 0
    for number in range(2):
        desk.git("commit", "--allow-empty", "-m", f"change {number}")
        _, err = desk.git("push", "origin", "main")
        assert desk.head() == desk.git("rev-parse", "main")[0].strip() and "waiting" not in err
    (standing,) = [row for row in desk.history() if row["mode"] == "standing"]
    assert (standing["used_count"], standing["consent_status"], len(desk.leaves("secret.used"))) == (2, "approved", 3)
    asking = desk.start("fetch", "origin")
    assert desk.waiting()["requested_action"] == "git_fetch"
    desk.place.ok("consent", "deny", desk.waiting()["consent_id"], "--reason", "only pushes")
    assert asking.wait(LIMIT) != 0
    desk.place.ok("consent", "revoke", standing["consent_id"], "--reason", "the month is over")
    desk.git("commit", "--allow-empty", "-m", "one more")
    asking = desk.start("push", "origin", "main")
    assert desk.waiting()["requested_action"] == "git_push"
    desk.place.ok("consent", "deny", desk.waiting()["consent_id"], "--reason", "no more")
    assert asking.wait(LIMIT) != 0 and desk.head() != desk.git("rev-parse", "main")[0].strip()


def test_a_denied_push_ends_with_the_reason(desk: Desk) -> None:
    """git stops, says why on stderr, and pushes nothing."""
    desk.secret("shop_token")
    process = desk.start("push", "origin", "main")
    desk.place.ok("consent", "deny", desk.waiting()["consent_id"], "--reason", "not on a Sunday")
    _, err = process.communicate(timeout=LIMIT)
    assert process.returncode != 0 and "grace: " in err.decode() and "was denied: not on a Sunday" in err.decode() and "quit" in err.decode()
    assert desk.head() == "" and desk.leaves("secret.suspect") == []


def test_a_denied_push_asks_nothing_on_a_terminal(desk: Desk) -> None:
    """Where git could ask for a password itself, a no is a no all the same."""
    desk.secret("shop_token")
    terminal = Terminal(desk.place, "-C", str(desk.work), "push", "origin", "main", program="git", env={"GIT_CONFIG_NOSYSTEM": "1"})
    terminal.until("waiting for consent")
    assert desk.waiting()["requested_action"] == "git_push"
    desk.place.ok("consent", "deny", desk.waiting()["consent_id"], "--reason", "not on a Sunday")
    status, text = terminal.end()
    assert status != 0 and "not on a Sunday" in text and "Username" not in text and "Password" not in text


def test_three_noes_to_git_do_not_silence_every_script(desk: Desk) -> None:
    """git has to pause, but not what else was started by the shell that it calls helpers with."""
    desk.secret("shop_token")
    for _ in range(3):
        process = desk.start("push", "origin", "main")
        desk.place.ok("consent", "deny", desk.waiting()["consent_id"], "--reason", "no")
        process.communicate(timeout=LIMIT)
    assert "has to pause" in desk.git("push", "origin", "main", status=128)[1]
    asked = ("consent", "request", "shop_token", "--action", "read", "--for", "a test")
    subprocess.run(["sh", "-c", '"$@"; true', "sh", GRACE, *asked], env=desk.environment, check=True, capture_output=True, timeout=LIMIT)
    assert desk.waiting()["requested_action"] == "read"


def test_a_push_that_nobody_answers(desk: Desk) -> None:
    """After --timeout git stops as after a no; the helper itself ends with 6."""
    desk.secret("shop_token")
    _, err = desk.git("-c", "credential.helper=", "-c", f"credential.helper={HELPER} --timeout 300ms", "push", "origin", "main", status=128)
    assert "nobody answered in time" in err and desk.head() == ""
    done = desk.ask("get", desk.given(), "--timeout", "50ms")
    assert (done.status, done.out) == (6, "quit=1\n") and done.err.splitlines()[-1].startswith("grace: consent_")


def test_an_interrupted_helper_takes_its_question_back(desk: Desk) -> None:
    """Ctrl-C while it waits: git is told to stop, and the request is withdrawn."""
    desk.secret("shop_token")
    process = desk.place.start("credential", "git", "get", stdin=subprocess.PIPE)
    assert process.stdin
    process.stdin.write(f"protocol=http\nhost={desk.remote.host}\n\n".encode())
    process.stdin.flush()
    desk.waiting()
    process.send_signal(2)
    assert process.stdout and process.stdout.read() == b"quit=1\n" and process.wait(LIMIT) == 130
    assert [row["consent_status"] for row in desk.history()] == ["revoked"]


def test_who_asks_and_who_answers(desk: Desk) -> None:
    """--by and --user go into the request; a stranger as --user is refused, and git told to stop."""
    desk.secret("shop_token")
    process = desk.start("-c", "credential.helper=", "-c", f"credential.helper={HELPER} --by deploy-bot --user anna", "push", "origin", "main")
    waiting = desk.waiting()
    assert (waiting["requested_by"], waiting["user_id"]) == ("deploy-bot", "anna")
    desk.approve()
    process.communicate(timeout=LIMIT)
    assert process.returncode == 0
    done = desk.ask("get", desk.given(), "--user", "nobody")
    assert (done.status, done.out) == (3, "quit=1\n") and "anna" in done.err


# ---- reading


def test_a_clone_asks_with_another_action(desk: Desk) -> None:
    """clone is git_fetch, and nothing of the token stays in the clone."""
    desk.git("push", "-q", str(desk.bare), "main")
    desk.secret("shop_token")
    process = desk.start("clone", "-q", f"{desk.remote.url}/shop.git", "copy", cwd=desk.place.folder)
    waiting = desk.waiting()
    desk.approve()
    _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err.decode()
    assert (waiting["requested_action"], waiting["requested_for"]) == ("git_fetch", f"git clone from {desk.remote.url}/shop.git")
    copy = desk.place.folder / "copy"
    assert (copy / "prices").read_text() == "1 2 3\n"
    assert not any(TOKEN.encode() in path.read_bytes() for path in copy.rglob("*") if path.is_file())


def test_every_command_of_git_has_its_action(desk: Desk) -> None:
    """What git itself runs below a command is told by the command; a secret of low risk is used without a question, and recorded."""
    desk.git("push", "-q", str(desk.bare), "main")
    desk.secret("open", "--risk", "low")
    desk.git("submodule", "--quiet", "add", f"{desk.remote.url}/shop.git", "part")
    desk.git("commit", "-q", "-m", "A part")
    desk.git("clone", "-q", str(desk.work), "other", cwd=desk.place.folder)
    desk.git("config", "alias.send", "push -q origin")
    seen = {row["consent_id"] for row in desk.history()}
    assert seen
    for words, action, where in (
        (("fetch", "-q", "origin"), "git_fetch", desk.work), (("ls-remote", "-q", "origin"), "git_fetch", desk.work),
        (("remote", "update"), "git_fetch", desk.work), (("pull", "-q", "origin", "main"), "git_fetch", desk.work),
        (("submodule", "update", "--init"), "git_fetch", desk.place.folder / "other"), (("-c", "x.y=z", "push", "-q", "origin", "main"), "git_push", desk.work),
        (("send", "main:more"), "git_push", desk.work),
    ):  # fmt: skip
        desk.git(*words, cwd=where)
        new = [row for row in desk.history() if row["consent_id"] not in seen]
        seen |= {row["consent_id"] for row in new}
        assert new and {row["requested_action"] for row in new} == {action}, (words, new)
        assert {(row["consent_status"], row["approval_method"]) for row in new} == {("used", "auto")}
    fill = subprocess.run(["git", "credential", "fill"], input=f"url={desk.remote.url}/shop.git\n\n".encode(), env=desk.environment, cwd=desk.work,
                          capture_output=True, check=True, timeout=LIMIT)  # fmt: skip
    assert f"username=shop\npassword={TOKEN}\n".encode() in fill.stdout
    (last,) = [row for row in desk.history() if row["consent_id"] not in seen]
    assert (last["requested_action"], last["context"]["command"]) == ("git", "git credential fill")


def test_what_a_command_line_hides_stays_hidden(desk: Desk) -> None:
    """Logins in URLs and headers given as options are in no request, event or leaf."""
    need("bash")
    desk.secret("open", "--risk", "low")
    url = f"http://shop:{TOKEN}x@{desk.remote.host}/shop.git"
    desk.git("-c", f"http.extraHeader=X-Key: {TOKEN}y", "push", "-q", f"http://shop@{desk.remote.host}/shop.git", "main")
    desk.remote.login = base64.b64encode(b"shop:another").decode()
    desk.git("push", url, "main", status=128)
    script = """exec -a git bash -c '"$1" credential git get <<< "url=$2"; true' push "$@" """  # a git, as far as its command line tells
    done = subprocess.run(["bash", "-c", script, "bash", GRACE, url, "-o", f"key={TOKEN}z", "main"], env=desk.environment, cwd=desk.work,
                          capture_output=True, check=True, timeout=LIMIT)  # fmt: skip
    assert done.stdout == f"username=shop\npassword={TOKEN}\n".encode(), done.stderr
    last, first = desk.history()
    assert first["context"]["command"] == f"git push -q {desk.remote.url}/shop.git main"
    assert last["context"]["command"] == f"git push {GRACE} {desk.remote.url}/shop.git -... ... main"
    stored = b"".join(path.read_bytes() for path in desk.place.folder.glob("grace.db*") if path.is_file())
    assert TOKEN.encode() not in stored and b"@127.0.0.1" not in stored


# ---- a token that is not right any more


def test_a_refused_token_is_suspect_once(desk: Desk) -> None:
    """git erases what was refused: the secret is marked and a leaf tells it, once; the value stays, a new version is free of it."""
    desk.secret("open", "--risk", "low", value="too old")
    for _ in range(2):
        _, err = desk.git("push", "origin", "main", status=128)
        assert "Authentication failed" in err
    shown = desk.place.json("secret", "show", "open")
    assert (shown["rotate_reason"], shown["version"], shown["verified"]) == ("git was refused with it", 1, True)
    (leaf,) = desk.leaves("secret.suspect")
    assert leaf["subject"] == "open" and leaf["facts"]["version"] == 1 and leaf["facts"]["reason"] == "git was refused with it"
    findings = {finding["code"]: finding["message"] for finding in desk.place.json("doctor")["findings"]}
    assert "open" in findings["rotate"] and "git was refused" in findings["rotate"] and "audit" not in findings
    assert desk.place.json("audit", "verify")["ok"]
    desk.place.ok("secret", "rotate", "open", stdin=TOKEN.encode())
    assert desk.place.json("secret", "show", "open")["rotate_reason"] is None
    desk.git("push", "-q", "origin", "main")
    assert desk.head() and len(desk.leaves("secret.suspect")) == 1


def test_only_a_used_secret_becomes_suspect(desk: Desk) -> None:
    """A value that was never given out cannot have been refused; nor one for another user, or one of several."""
    desk.secret("open", "--risk", "low")
    refused = desk.given(username="shop", password="wrong")
    assert desk.ask("erase", refused).status == 0 and desk.place.json("secret", "show", "open")["rotate_reason"] is None
    desk.place.ok("secret", "get", "open", "--action", "read", "--for", "a test")
    for given in (desk.given(username="ben"), desk.given(host="example.org"), {"protocol": "http"}, {}):
        done = desk.ask("erase", {**given, "password": "wrong"})
        assert (done.status, done.out, done.err) == (0, "", "")
    assert desk.place.json("secret", "show", "open")["rotate_reason"] is None
    desk.place.sql("UPDATE secret_entries SET rotate_reason = 'ben was removed and could open it'")
    done = desk.ask("erase", refused)
    assert (done.status, done.out, done.err) == (0, "", "")
    assert desk.place.json("secret", "show", "open")["rotate_reason"] == "ben was removed and could open it; git was refused with it"
    assert len(desk.leaves("secret.suspect")) == 1


# ---- which secret answers


def test_what_nothing_answers_to_is_left_to_others(desk: Desk) -> None:
    """Another host, port, protocol, path or user, or no word of them: no output, no question, exit 0."""
    desk.secret("open", "--risk", "low")
    desk.secret("path", "--risk", "low", service=f"{desk.remote.url}:1/a.git")
    desk.secret("name", "--risk", "low", service="127.0.0.1")
    strangers: list[Fields] = [
        {"protocol": "http", "host": "127.0.0.1"}, {"protocol": "http", "host": f"{desk.remote.host}0"}, {"protocol": "http", "host": f"{desk.remote.host}."},
        {"protocol": "https", "host": desk.remote.host}, {"protocol": "ssh", "host": desk.remote.host}, {"protocol": "http", "host": f"x@{desk.remote.host}"},
        desk.given(username="ben"), desk.given(username=""), {"host": desk.remote.host}, {"protocol": "http"}, {}, desk.given(host=f"{desk.remote.host}:1"),
        desk.given(host=f"{desk.remote.host}:1", path="a"), desk.given(host=f"{desk.remote.host}:1", path="a.git/x"), {"url": f"http://{desk.remote.host}1/"},
    ]  # fmt: skip
    for given in strangers:
        done = desk.ask("get", given)
        assert (done.status, done.out, done.err) == (0, "", ""), given
    assert desk.history() == []
    assert desk.ask("get", desk.given(username="shop")).out == f"username=shop\npassword={TOKEN}\n"


def test_without_a_vault_it_is_silent_and_makes_none(place: Place) -> None:
    """No database, or one without a vault: nothing said, nothing made."""
    for _ in range(2):
        for operation in ("get", "store", "erase"):
            done = place.call("credential", "git", operation, stdin=b"protocol=http\nhost=example.org\nusername=a\npassword=b\n\n")
            assert (done.status, done.out, done.err) == (0, "", "")
        if not place.db.exists():
            assert list(place.folder.iterdir()) == []
            place.ok("task", "list")
    assert place.sql("SELECT * FROM audit_log") == []


def test_the_longest_exact_match_wins(desk: Desk) -> None:
    """With useHttpPath the secret of the path answers, for other paths and without it the host's."""
    desk.git("push", "-q", str(desk.bare), "main")
    desk.secret("host", "--risk", "low")
    desk.secret("path", "--risk", "low", service=f"{desk.remote.url}/shop.git/")
    for setting, key in (("true", "path"), ("false", "host")):
        desk.git("-c", f"credential.useHttpPath={setting}", "ls-remote", "-q", "origin")
        assert desk.history()[0]["secret_key"] == key
    for path, key in (("shop.git", "path"), ("/shop.git/", "path"), ("shop.git/more", "host"), ("Shop.git", "host")):
        assert desk.ask("get", desk.given(path=path)).out
        assert desk.history()[0]["secret_key"] == key, path


def test_several_secrets_for_one_place(desk: Desk) -> None:
    """An error that names them, and git is told to stop; a user name tells them apart."""
    desk.secret("one", "--risk", "low")
    desk.secret("two", "--risk", "low", username="ben", value="for-ben")
    done = desk.ask("get", desk.given())
    assert (done.status, done.out) == (4, "quit=1\n") and "one, two" in done.err and len(done.err.splitlines()) == 2
    assert desk.ask("get", desk.given(username="ben")).out == "username=ben\npassword=for-ben\n"
    desk.secret("three", "--risk", "low", username=None)
    assert desk.ask("get", desk.given(username="carl")).out == f"password={TOKEN}\n"
    assert desk.ask("erase", desk.given(password="x")).status == 0 and desk.leaves("secret.suspect") == []


@pytest.mark.parametrize("service, said, fit", [
    ("https://git.example.org", {"protocol": "https", "host": "git.example.org"}, 1),
    ("HTTPS://Git.Example.org/", {"protocol": "https", "host": "gIT.example.org", "path": "a.git"}, 1),
    ("https://git.example.org:8443", {"protocol": "https", "host": "git.example.org"}, 0),
    ("https://git.example.org", {"protocol": "https", "host": "git.example.org:443"}, 0),
    ("https://git.example.org/a/b.git", {"protocol": "https", "host": "git.example.org", "path": "a/b.git"}, 2),
    ("https://git.example.org/a%20b.git", {"protocol": "https", "host": "git.example.org", "path": "a b.git"}, 2),
    ("https://git.example.org/a", {"protocol": "https", "host": "git.example.org", "path": "a/b"}, 0),
    ("https://git.example.org/a", {"protocol": "https", "host": "git.example.org"}, 0),
    ("https://git.example.org", {"protocol": "https", "host": "evil.example.org"}, 0),
    ("https://git.example.org", {"protocol": "https", "host": "git.example.org.evil.com"}, 0),
    ("https://kit.example.org", {"protocol": "https", "host": "\u212ait.example.org"}, 0),
    ("https://me@git.example.org", {"protocol": "https", "host": "git.example.org"}, 0),
    ("https://git.example.org?x=1", {"protocol": "https", "host": "git.example.org"}, 0),
    ("git.example.org", {"protocol": "https", "host": "git.example.org"}, 0), (None, {"protocol": "https", "host": ""}, 0),
    ("ssh://git.example.org", {"protocol": "ssh", "host": "git.example.org"}, 0), ("https://", {"protocol": "https", "host": ""}, 0),
    ("https://a\\@b", {"protocol": "https", "host": "b"}, 0), ("https://a b", {"protocol": "https", "host": "a b"}, 0),
])  # fmt: skip
def test_how_a_service_fits(service: str | None, said: Fields, fit: int, module: Any) -> None:
    """Protocol, host and port, and path if there is one, are the same or nothing is; only A to Z have two spellings."""
    assert module.service_fit(service, None, said) == fit
    assert module.service_fit(service, "shop", {**said, "username": "shop"}) == fit
    assert module.service_fit(service, None, {**said, "username": "shop"}) == fit
    assert module.service_fit(service, "shop", {**said, "username": "Shop"}) == 0


# ---- the protocol


@pytest.mark.parametrize("argv, words, action, shown", [
    (["git", "push"], ["push"], "git_push", "git push"),
    (["/usr/bin/git", "-C", "/push", "-c", "a=push", "--no-pager", "fetch", "origin"], ["fetch", "origin"], "git_fetch", "git fetch origin"),
    (["git", "--git-dir", "push", "status"], ["status"], "git", "git status"),
    (["/usr/lib/git-core/git-remote-http", "origin", "http://x"], ["remote-http", "origin", "http://x"], "git", "git remote-http origin http://x"),
    (["git", "remote", "-v", "update"], ["remote", "-v", "update"], "git_fetch", "git remote -v update"),
    (["git", "remote", "show"], ["remote", "show"], "git", "git remote show"), (["git"], [], "git", "git"), ([], [], "git", "git"), ([""], [], "git", "git"),
    (["git", "submodule", "update", "--init"], ["submodule", "update", "--init"], "git_fetch", "git submodule update --init"),
    (["sh", "-c", "git push"], [], "git", "git"), (["gitk", "push"], [], "git", "git"), (["git", "-C"], [], "git", "git"),
    (["git", "push", "-o", "sesame", "--repo", "-f", "origin"], None, "git_push", "git push -... ... -... -f origin"),
    (["git", "push", "-f", "-o", "key=1", "https://u:p@h.org/a?k=1#f", "+a:b"], None, "git_push", "git push -f -... ... https://h.org/a +a:b"),
    (["git", "push", "--push-option=k", "-okey", "--", "u:p@h.org:x", "a b", "https://u:p/x@h"], None, "git_push", "git push -... -... -... ... ... ..."),
])  # fmt: skip
def test_what_a_command_line_of_git_says(argv: list[str], words: list[str] | None, action: str, shown: str, module: Any) -> None:
    """The subcommand after git's own options, its action, and what of it may be shown."""
    found = module.git_words(argv)
    assert found == (argv[1:] if words is None else words)
    assert (module.git_action(found), module.shown_git(found)) == (action, shown)


GOOD = [
    (b"protocol=https\nhost=h\n\nhost=other\n", {"protocol": "https", "host": "h"}), (b"", {}), (b"\n", {}), (b"host=h", {"host": "h"}),
    (b"capability[]=authtype\ncapability[]=state\nwwwauth[]=Basic realm=\"x\"\nhost=h\nnew-thing=1\n", {"host": "h", "new-thing": "1"}),
    (b"host=a\nhost=b=c\n", {"host": "b=c"}), (b"=x\nhost=h\n", {"": "x", "host": "h"}),
    (b"host=old\nusername=old\nurl=https://me:pw@h:8/a%20b.git/\n", {"protocol": "https", "host": "h:8", "username": "me", "path": "a b.git"}),
    (b"url=https://h\nusername=me\n", {"protocol": "https", "host": "h", "username": "me"}),
    (b"url=cert:///x\n", {"protocol": "cert", "host": "", "path": "x"}),
    (b"url=https://a@b@c/x\n", {"protocol": "https", "host": "b@c", "username": "a", "path": "x"}),
]  # fmt: skip
BAD = [b"host", b"host=h\nnonsense\n", b"host=h\0\n", b"host=a\r\nprotocol=https\r\n", b"host=\xff\n", b"url=h/x\n", b"url=://h\n", b"url=https://h%0ahost=evil/\n",
       b"url=https://h/a%00b\n", b"url=https://%ff/\n", b"host=" + b"x" * (64 << 10) + b"\n", b"x" * (1 << 20)]  # fmt: skip


@pytest.mark.parametrize("data, said", GOOD)
def test_what_git_says(data: bytes, said: Fields, module: Any) -> None:
    """The last of each single attribute, up to a blank line; a url in its parts, as git takes it apart."""
    assert module.parse_credential(data) == said


def test_hostile_input(desk: Desk) -> None:
    """What is no credential is a usage error in one line that repeats nothing of it; nobody is asked."""
    desk.secret("open", "--risk", "low")
    for data in BAD:
        for operation in ("get", "erase"):
            done = desk.ask(operation, data.replace(b"host=h", b"password=hunter2\nhost=h"))
            assert (done.status, done.out) == (2, "") and done.err.startswith("grace: standard input "), (data[:40], done.err)
            assert len(done.err.splitlines()) == 2 and "hunter2" not in done.err and "nonsense" not in done.err
    assert desk.history() == []
    assert desk.ask("store", b"\0\xff" * (1 << 20)).status == 0
    huge = f"protocol=http\nhost={desk.remote.host}\npath={'p' * 60_000}\n\n".encode()
    assert desk.ask("get", huge).out == f"username=shop\npassword={TOKEN}\n"
    assert len(desk.history()[0]["requested_for"]) < 600


@pytest.mark.parametrize("value, username", [(b"a\nquit=1", "shop"), (b"a\r", "shop"), (b"a\0b", "shop"), (b"a", "shop\npassword=b"), (b"a", "shop\r")])
def test_no_value_becomes_two_lines(desk: Desk, value: bytes, username: str) -> None:
    """A value or a user name that git would take for more than one line is refused; an odd user name before anybody is asked."""
    desk.secret("open", "--risk", "low", "--raw", value=value, username=username)
    done = desk.ask("get", desk.given())
    assert (done.status, done.out) == (5, "quit=1\n") and "line break" in done.err and "open" in done.err
    assert len(desk.history()) == (1 if username == "shop" else 0)


def test_any_other_bytes_reach_git(desk: Desk) -> None:
    """A value is written as it is, text or not."""
    value = bytes(set(range(256)) - {0, 10, 13})
    desk.secret("open", "--risk", "low", "--raw", value=value, username="ann\u00e4 = x")
    assert desk.ask("get", desk.given()).raw_out == "username=ann\u00e4 = x\n".encode() + b"password=" + value + b"\n"


def test_a_secret_that_somebody_has_changed(desk: Desk) -> None:
    """A service written into the row by a stranger does not lead the value to his host: refused, and git told to stop."""
    desk.secret("open", "--risk", "low")
    desk.place.sql("DROP TRIGGER secret_stays; UPDATE secret_entries SET header = replace(header, '127.0.0.1', 'example.org')")
    host = desk.remote.host.replace("127.0.0.1", "example.org")
    done = desk.ask("get", {"protocol": "http", "host": host})
    assert (done.status, done.out) == (5, "quit=1\n") and TOKEN not in done.err
    assert [leaf["subject"] for leaf in desk.leaves("vault.refused")] == ["open"]


def test_without_the_machine_key_git_is_told_to_stop(desk: Desk) -> None:
    """A secret would answer, but nothing can be asked here: the reason, exit 7."""
    desk.secret("open", "--risk", "low")
    for path in desk.place.folder.glob(".config/grace/*/machine.key"):
        path.unlink()
    done = desk.ask("get", desk.given())
    assert (done.status, done.out) == (7, "quit=1\n") and "grace init --machine" in done.err


def test_an_expired_secret_is_not_given(desk: Desk) -> None:
    """A secret past its --expires is refused with the way to a new one."""
    desk.secret("open", "--risk", "low", "--expires", "1ms")
    done = desk.ask("get", desk.given())
    assert (done.status, done.out) == (5, "quit=1\n") and "has expired" in done.err


def test_operations_and_options(desk: Desk) -> None:
    """Unknown operations are for a later git: ignored. --json is a usage error wherever it stands; store keeps nothing."""
    desk.secret("open", "--risk", "low")
    before = desk.place.sql("SELECT COUNT(*) FROM audit_log")
    for operation in ("capability", "fill", "GET", "", "\u202e"):
        done = desk.ask(operation, desk.given())
        assert (done.status, done.out, done.err) == (0, "", ""), operation
    done = desk.ask("store", desk.given(username="shop", password="hunter2"))
    assert (done.status, done.out, done.err) == (0, "", "")
    assert b"hunter2" not in b"".join(path.read_bytes() for path in desk.place.folder.glob("grace.db*") if path.is_file())
    for words in (["--json", "credential", "git", "get"], ["credential", "--json", "git", "get"], ["credential", "git", "--json", "get"],
                  ["credential", "git", "get", "--json"], ["credential", "git", "store", "--json"], ["credential", "git", "later", "--json"]):  # fmt: skip
        done = desk.place.call(*words, stdin=b"protocol=http\n")
        assert (done.status, done.out, done.error["code"]) == (2, "", "usage"), words
    for words in ([], ["get", "get"], ["--timeout", "5", "get"], ["--user", "a b", "get"], ["--by", "", "get"]):
        done = desk.place.call("credential", "git", *words)
        assert (done.status, done.out) == (2, ""), words
    assert desk.history() == [] and desk.place.sql("SELECT COUNT(*) FROM audit_log") == before


def test_on_a_terminal_no_value_is_shown(desk: Desk) -> None:
    """Called by hand, it says that it is git's, and asks nobody."""
    desk.secret("open", "--risk", "low")
    terminal = Terminal(desk.place, "credential", "git", "get")
    terminal.type(f"protocol=http\nhost={desk.remote.host}\n\n")
    status, text = terminal.end()
    assert status == 2 and TOKEN not in text and "--reveal" in text and desk.history() == []


def test_the_request_as_events_tell_it(desk: Desk) -> None:
    """The event of the request carries what a person needs to answer, and no login."""
    desk.secret("open", "--risk", "low")
    assert desk.ask("get", {"url": f"http://shop:{TOKEN}@{desk.remote.host}/shop.git?key={TOKEN}"}).status == 0
    (event,) = desk.place.events("secrets.consent.request")
    assert event["payload"]["requested_action"] == "git" and event["payload"]["context"]["url"] == f"{desk.remote.url}/shop.git"
    assert TOKEN not in json.dumps(event)
