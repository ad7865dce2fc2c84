"Alerts against real receivers: a webhook, a mail server with STARTTLS, issues as GitHub keeps them; and against kill -9."

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import os
import signal
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import numpy as np
import pytest
from serving import encoded, running, tiny_model, until
from typer.testing import CliRunner

from celestial_ml.cli.app import app
from celestial_ml.core.errors import CelestialError
from celestial_ml.core.files import DamagedFile, read_json, write_json
from celestial_ml.core.params import AlertRule, Alerts, Params
from celestial_ml.core.testing import TemporaryHome
from celestial_ml.monitor.sinks import notify, read_alerts, standing_alerts
from celestial_ml.monitor.snapshot import Snapshot

SECRET, TOKEN, PASSWORD = "whsec-6b1f", "ghp-88aa", "mail-77cc"
RULE = AlertRule(name="unknown", metric="unknown_share", above=0.2, recovery=0.1)


@pytest.fixture
def home() -> Iterator[TemporaryHome]:
    with TemporaryHome(CELESTIAL_WEBHOOK_SECRET=SECRET, GITHUB_TOKEN=TOKEN) as home:
        yield home


def params(*sinks: str, rules: tuple[AlertRule, ...] = (RULE,), **more: Any) -> Params:
    "Parameters with one rule, and little patience."
    return Params(alerts=Alerts(rules=list(rules), sinks=list(sinks), **({"attempts": 1, "timeout": 2.0} | more)))


def look(p: Params, minute: int, share: float | None, model: str = "celestial/3") -> list[tuple[str, str]]:
    "Notify of a snapshot at a minute."
    metrics = {} if share is None else {"unknown_share": share}
    about = {"begin": 0.0, "end": 0.0, "answers": 100, "alarms": [], "reasons": []}
    alerts = notify(Snapshot(time=60.0 * minute, model=model, metrics=metrics, **about), p)
    return [(one.rule, one.state) for one in alerts]


@contextmanager
def http(answer: Any) -> Iterator[str]:
    "A server whose `answer(handler, body)` returns a status, headers and JSON; yields its URL."

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, headers, value = answer(self, body)
            content = json.dumps(value).encode()
            self.send_response(status)
            for name, text in ({"Content-Type": "application/json", "Content-Length": len(content)} | headers).items():
                self.send_header(name, str(text))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_PATCH = do_POST

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Webhook:
    "A receiver that checks signatures, and answers what it is set to."

    def __init__(self) -> None:
        self.taken: list[dict[str, Any]] = []
        self.answers: list[int] = []  # statuses of the next requests; then 200
        self.seen = 0

    def __call__(self, handler: BaseHTTPRequestHandler, body: bytes) -> tuple[int, dict[str, Any], Any]:
        self.seen += 1
        fields = dict(part.split("=") for part in handler.headers["Celestial-Signature"].split(","))
        expected = hmac.new(SECRET.encode(), fields["t"].encode() + b"." + body, hashlib.sha256).hexdigest()
        assert hmac.compare_digest(expected, fields["v1"]) and abs(time.time() - int(fields["t"])) < 60
        status = self.answers.pop(0) if self.answers else 200
        if status == 200:
            self.taken.append(json.loads(body))
        return status, {"Location": "/elsewhere"} if status in (302, 307) else {}, {}


# ----------------------------------------------------------------------------------------------------------- webhook


def test_a_webhook_gets_each_change_once_signed(home: TemporaryHome) -> None:
    hook = Webhook()
    with http(hook) as url:
        p = params("webhook", webhook=url)
        assert look(p, 1, 0.1) == [] and look(p, 2, 0.3) == look(p, 3, 0.15) == [("unknown", "firing")]
        assert look(p, 4, 0.05) == [("unknown", "resolved")] and look(p, 5, 0.05) == []
    assert [one["state"] for one in hook.taken] == ["firing", "resolved"] and hook.seen == 2
    assert hook.taken[0]["value"] == 0.3 and hook.taken[0]["id"] != hook.taken[1]["id"]
    history = (home.path / "monitor/alert_history.jsonl").read_text().splitlines()
    assert [json.loads(line)["state"] for line in history] == ["firing", "resolved"]


def test_a_webhook_that_fails_gets_all_at_the_next_look(home: TemporaryHome) -> None:
    hook = Webhook()
    with http(hook) as url:
        hook.answers = [500, 500, 503]
        assert look(params("webhook", webhook=url, attempts=2), 1, 0.3) and not hook.taken and hook.seen == 2
        assert "answered 500" in read_alerts()["failures"]["webhook"]
        assert look(params("webhook", webhook=url, attempts=2), 2, 0.0)  # 503, then 200: waits a second between
    assert [one["state"] for one in hook.taken] == ["firing", "resolved"], "nothing is lost, and in order"
    assert read_alerts()["failures"] == {} and read_alerts()["waiting"] == {"webhook": []}


@pytest.mark.parametrize("status", [302, 307, 401, 404])
def test_a_refusal_is_not_repeated_and_a_redirect_not_followed(home: TemporaryHome, status: int) -> None:
    hook = Webhook()
    with http(hook) as url:
        hook.answers = [status] * 9
        assert look(params("webhook", webhook=f"{url}/hook", attempts=3), 1, 0.3)
    assert hook.seen == 1 and f"answered {status}" in read_alerts()["failures"]["webhook"]


def test_no_sink_blocks_the_look_or_the_others(home: TemporaryHome) -> None:
    hook, go = Webhook(), threading.Event()

    def stuck(handler: BaseHTTPRequestHandler, body: bytes) -> tuple[int, dict[str, Any], Any]:
        handler.send_response(200)
        handler.end_headers()
        while not go.wait(0.1):  # a byte now and then: no timeout of a socket ends that
            handler.wfile.write(b" ")
        return 200, {}, {}

    with http(hook) as good, http(stuck) as bad:
        p = params("webhook", "github", webhook=good, github_api=bad, github_repository="a/b", timeout=0.5)
        began = time.monotonic()
        assert look(p, 1, 0.3) == [("unknown", "firing")] and time.monotonic() - began < 20
        go.set()
    assert len(hook.taken) == 1 and read_alerts()["failures"].keys() == {"github"}
    assert len(read_alerts()["waiting"]["github"]) == 1


def test_a_look_that_is_killed_while_it_sends_loses_nothing(home: TemporaryHome) -> None:
    hook, arrived, go = Webhook(), threading.Event(), threading.Event()

    def slow(handler: BaseHTTPRequestHandler, body: bytes) -> tuple[int, dict[str, Any], Any]:
        arrived.set()
        go.wait(30)
        return 503, {}, {}

    with http(slow) as url:
        child = os.fork()
        if not child:
            try:
                look(params("webhook", webhook=url, timeout=60.0), 1, 0.3)
            finally:
                os._exit(0)
        assert arrived.wait(30)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        go.set()
    with http(hook) as url:
        assert look(params("webhook", webhook=url), 2, 0.3) == [("unknown", "firing")]
    assert [one["time"] for one in hook.taken] == [60.0] and standing_alerts()[0].time == 120.0


def test_secrets_are_nowhere(home: TemporaryHome, caplog: pytest.LogCaptureFixture) -> None:
    def echo(handler: BaseHTTPRequestHandler, body: bytes) -> tuple[int, dict[str, Any], Any]:
        return 403, {}, {"message": str(handler.headers)}

    with http(echo) as url, caplog.at_level(logging.DEBUG):
        os.environ["HOOK"] = f"{url}/services/T0/pa55"
        p = params("log", "webhook", "github", webhook="$HOOK", github_api=url, github_repository="a/b")
        assert look(p, 1, 0.3)
        os.environ["HOOK"] = "http://user:pa55@exa mple/\n"
        look(p, 2, 0.3)
        os.environ["HOOK"] = "http://hooks.example.org/pa55"
        look(p, 3, 0.3)
        assert "without TLS" in read_alerts()["failures"]["webhook"]
        del os.environ["GITHUB_TOKEN"]
        look(p, 4, 0.3)
        assert "GITHUB_TOKEN" in read_alerts()["failures"]["github"]
    text = caplog.text + "".join(path.read_text() for path in (home.path / "monitor").iterdir())
    assert "unknown_share" in text and not any(one in text for one in (SECRET, TOKEN, "pa55"))


@pytest.mark.parametrize("sinks", [["webhok"], ["nothing.here.sink"]])
def test_an_unknown_sink_is_an_error(home: TemporaryHome, sinks: list[str]) -> None:
    with pytest.raises(CelestialError, match="sink"):
        look(params(*sinks), 1, 0.3)


# ------------------------------------------------------------------------------------------------------------ e-mail


def certificate(folder: Path) -> Path:
    "A certificate for localhost, and its key, in one file."
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(days=1), now + timedelta(days=1))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    signed = builder.sign(key, hashes.SHA256())
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = folder / "localhost.pem"
    path.write_bytes(signed.public_bytes(serialization.Encoding.PEM) + key.private_bytes(*form))
    return path


class MailServer:
    "SMTP with STARTTLS and AUTH PLAIN, as RFC 5321, 3207 and 4954 have it."

    def __init__(self, pem: Path | None):
        self.pem, self.mails, self.logins, self.tls = pem, list[Any](), list[str](), list[bool]()

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        secure = False

        def say(text: str) -> None:
            writer.write(text.encode() + b"\r\n")

        say("220 localhost")
        while line := (await reader.readline()).decode().strip():
            verb = line.split()[0].upper()
            if verb == "EHLO":
                offers = ["250-localhost", *(["250-AUTH PLAIN"] if secure or not self.pem else [])]
                say("\r\n".join([*offers, "250 STARTTLS" if self.pem and not secure else "250 HELP"]))
            elif verb == "STARTTLS":
                say("220 go")
                context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
                context.load_cert_chain(self.pem)
                await writer.start_tls(context)
                secure = True
            elif verb == "AUTH":
                self.logins.append(base64.b64decode(line.split()[2]).decode())
                good = self.logins[-1] == f"\0anna\0{PASSWORD}"
                say("235 welcome" if good else f"535 no: {self.logins[-1][1:]!r}")  # it echoes what it got
            elif verb == "DATA":
                say("354 go on")
                self.mails.append(message_from_bytes((await reader.readuntil(b"\r\n.\r\n"))[:-5]))
                self.tls.append(secure)
                say("250 taken")
            elif verb == "QUIT":
                say("221 bye")
                break
            else:
                say("250 fine")
        writer.close()


@contextmanager
def mail_server(pem: Path | None) -> Iterator[tuple[MailServer, int]]:
    "A mail server on a port of its own."
    server, loop = MailServer(pem), asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    listening = asyncio.run_coroutine_threadsafe(asyncio.start_server(server.talk, "localhost", 0, family=2), loop)
    try:
        yield server, listening.result(10).sockets[0].getsockname()[1]
    finally:
        loop.call_soon_threadsafe(loop.stop)


def mailing(port: int) -> Params:
    return params("email", smtp=f"localhost:{port}", email_to=["anna@example.org", "bert@example.org"], timeout=5.0)


def test_an_e_mail_goes_out_with_tls_and_a_login(home: TemporaryHome, tmp_path: Path) -> None:
    pem = certificate(tmp_path)
    os.environ |= {"SSL_CERT_FILE": str(pem), "CELESTIAL_SMTP_USER": "anna", "CELESTIAL_SMTP_PASSWORD": PASSWORD}
    with mail_server(pem) as (server, port):
        look(mailing(port), 1, 0.3)
        look(mailing(port), 2, 0.0)
    assert server.tls == [True, True] and read_alerts()["failures"] == {}
    first, second = server.mails
    assert first["To"] == "anna@example.org, bert@example.org" and "unknown_share is 0.3" in first.get_payload()
    assert second["In-Reply-To"] == first["Message-ID"] and "resolved" in second.get_payload()


def test_no_password_goes_out_in_the_clear_or_to_a_stranger(home: TemporaryHome, tmp_path: Path) -> None:
    os.environ |= {"CELESTIAL_SMTP_USER": "anna", "CELESTIAL_SMTP_PASSWORD": PASSWORD}
    with mail_server(None) as (server, port):
        look(mailing(port), 1, 0.3)
        assert "STARTTLS" in read_alerts()["failures"]["email"] and not server.mails + server.logins
        del os.environ["CELESTIAL_SMTP_USER"]
        look(mailing(port), 2, 0.3)
        assert len(server.mails) == 1, "a mail server of this machine needs no TLS for what has no password"
    os.environ |= {"CELESTIAL_SMTP_USER": "anna"}
    with mail_server(certificate(tmp_path)) as (server, port):  # of nobody whom this machine trusts
        look(mailing(port), 3, 0.0)
        assert "certificate" in read_alerts()["failures"]["email"].lower() and not server.mails + server.logins


def test_what_a_mail_server_echoes_is_no_secret(home: TemporaryHome, tmp_path: Path) -> None:
    pem = certificate(tmp_path)
    os.environ |= {"SSL_CERT_FILE": str(pem), "CELESTIAL_SMTP_USER": "bert", "CELESTIAL_SMTP_PASSWORD": PASSWORD}
    with mail_server(pem) as (_, port):
        look(mailing(port), 1, 0.3)
    assert "535" in read_alerts()["failures"]["email"] and PASSWORD not in json.dumps(read_alerts())


# ------------------------------------------------------------------------------------------------------------ GitHub


class Issues:
    "Issues, as GitHub's REST API keeps them."

    def __init__(self, others: int = 0):
        body = "of another kind"
        self.all: list[dict[str, Any]] = [{"number": i + 1, "state": "open", "body": body} for i in range(others)]
        self.posts = 0

    def __call__(self, handler: BaseHTTPRequestHandler, body: bytes) -> tuple[int, dict[str, Any], Any]:
        if handler.headers["Authorization"] != f"Bearer {TOKEN}":
            return 401, {}, {"message": "Bad credentials"}
        parts, value = urlsplit(handler.path), json.loads(body) if body else {}
        assert parts.path.startswith("/repos/anna/planets/issues")
        if handler.command == "GET":
            asked = {name: values[0] for name, values in parse_qs(parts.query).items()}
            page, size = int(asked["page"]), int(asked["per_page"])
            assert size <= 100
            found = [one for one in self.all[::-1] if one["state"] == asked["state"]]
            return 200, {}, found[(page - 1) * size : page * size]
        if handler.command == "POST":
            self.posts += 1
            self.all.append(
                {"number": len(self.all) + 1, "state": "open", "title": value["title"], "body": value["body"]}
            )
            return 201, {}, self.all[-1]
        one = self.all[int(parts.path.rpartition("/")[2]) - 1]
        one |= value
        return 200, {}, one


def test_an_alert_is_one_issue_from_start_to_end(home: TemporaryHome) -> None:
    issues = Issues(others=230)
    with http(issues) as url:
        p = params("github", github_api=url, github_repository="anna/planets")
        look(p, 1, 0.3)
        [issue] = issues.all[230:]
        assert issue["state"] == "open" and "unknown" in issue["title"] and "0.3" in issue["body"]
        for i in range(150):  # it's on the third page now
            issues.all.append({"number": 232 + i, "state": "open", "body": None})
        quotes = {"number": 382, "state": "open", "body": issue["body"], "pull_request": {}}
        issues.all.append(dict(quotes))
        look(p, 2, 0.45)
        assert "0.45" in issue["body"] and issue["state"] == "open" and issues.posts == 1
        look(p, 3, 0.05)
        assert issue["state"] == "closed" and "resolved" in issue["body"]
        look(p, 4, 0.05)
        look(p, 5, 0.5)
        assert issues.posts == 2 and issues.all[-1]["state"] == "open", "the next time is an issue of its own"
        issues.all[-1]["state"] = "closed"
        look(p, 6, 0.5)
        assert issues.posts == 2 and issues.all[-1]["state"] == "closed", "a person has closed it"
    assert all(one["state"] == "open" for one in issues.all[:230]) and issues.all[381] == quotes


def test_an_issue_is_not_opened_twice_where_the_answer_got_lost(home: TemporaryHome) -> None:
    issues = Issues()

    def loses(handler: BaseHTTPRequestHandler, body: bytes) -> tuple[int, dict[str, Any], Any]:
        answer = issues(handler, body)
        return (502, {}, {}) if handler.command == "POST" else answer

    with http(loses) as url:
        look(params("github", github_api=url, github_repository="anna/planets", attempts=2), 1, 0.3)
    assert issues.posts == 1 and read_alerts()["failures"] == {}


# ----------------------------------------------------------------------------------------------------------- command


def test_the_command_shows_what_stands(home: TemporaryHome, tmp_path: Path) -> None:
    def call(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["monitor", "alerts", *arguments])
        return done.exit_code, done.stdout

    assert call()[0] == 0
    look(params("webhook", webhook="http://127.0.0.1:1"), 1, 0.3)
    code, shown = call()
    assert code == 1 and "unknown_share" in shown and "webhook" in shown
    code, shown = call("--json")
    about = json.loads(shown)
    assert code == 1 and [one["rule"] for one in about["standing"]] == ["unknown"]
    assert about["waiting"] == {"webhook": 1} and about["failures"].keys() == {"webhook"}


def test_the_command_tries_a_sink(home: TemporaryHome, tmp_path: Path) -> None:
    hook = Webhook()
    with http(hook) as url:
        arguments = [
            *("monitor", "alerts", "--test", "webhook"),
            "--set",
            f"alerts.webhook={url}",
            "--set",
            "alerts.attempts=1",
        ]
        assert CliRunner().invoke(app, arguments).exit_code == 0
        assert [one["state"] for one in hook.taken] == ["firing", "resolved"]
        hook.answers = [500]
        assert CliRunner().invoke(app, arguments).exit_code == 2
    assert read_alerts() == {} and not (home.path / "monitor/alert_history.jsonl").exists(), "a test is no alert"


@pytest.mark.parametrize(
    "state",
    [
        [],
        {"rules": 3},
        {"rules": {"unknown": "firing"}},
        {"rules": {"unknown": {"alert": {"rule": "unknown"}}}},
        {"rules": {"unknown": {"alert": None}}},
        {"rules": {"unknown": {"looks": "1"}}},
        {"rules": {}, "waiting": {"log": [{}]}},
        {"rules": {}, "metrics": 1},
    ],
)
def test_a_state_that_was_edited_is_named(home: TemporaryHome, state: Any) -> None:
    file = home.path / "monitor/alerts.json"
    assert look(params("log"), 1, 0.5) == [("unknown", "firing")] and standing_alerts()
    kept = read_json(file)
    write_json(file, state if isinstance(state, list) else kept | state)
    for function in (standing_alerts, lambda: look(params("log"), 2, 0.5)):
        with pytest.raises(DamagedFile, match=str(file)):
            function()
    write_json(file, kept)
    assert look(params("log"), 3, 0.05) == [("unknown", "resolved")]


def test_two_looks_at_once_send_each_change_once(home: TemporaryHome) -> None:
    hook, children = Webhook(), []
    with http(hook) as url:
        for _ in range(4):
            children.append(os.fork())
            if not children[-1]:
                code = 1
                try:
                    look(params("webhook", webhook=url, timeout=20.0), 1, 0.3)
                    code = 0
                finally:
                    os._exit(code)
        assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert [one["state"] for one in hook.taken] == ["firing"]


def test_from_answers_of_a_server_to_a_webhook_and_back_to_its_metrics(home: TemporaryHome, tmp_path: Path) -> None:
    hook, model, state = Webhook(), tiny_model(tmp_path / "model"), tmp_path / "home"
    with http(hook) as url, running(model, tmp_path / "err", demo=False) as service:
        for picture in [np.zeros((32, 32, 3), np.uint8)] * 6:  # nearly black is unknown
            answer = httpx.post(f"{service}/predict", files={"image": encoded(picture)}, timeout=60).json()
            assert not answer["known"]
        os.environ["CELESTIAL_HOME"] = str(state)
        until(lambda: "celestial_log_written 6.0" in httpx.get(f"{service}/metrics", timeout=60).text)
        rule = "{name: unknown, metric: unknown_share, above: 0.2, severity: critical}"
        settings = {"rules": f"[{rule}]", "sinks": "[webhook]", "webhook": url}
        options = [text for name, value in settings.items() for text in ("--set", f"alerts.{name}={value}")]
        done = CliRunner().invoke(app, ["monitor", "check", "--model", str(model), *options])
        assert done.exit_code == 1 and "alert: critical: unknown" in done.stdout, done.output
        assert [(one["rule"], one["value"], one["state"]) for one in hook.taken] == [("unknown", 1.0, "firing")]
        page = httpx.get(f"{service}/metrics", timeout=60).text
        assert 'celestial_alert{rule="unknown",severity="critical"} 1.0' in page
        assert "celestial_monitor_unknown_share{" in page
        settings = ["--set", "alerts.rules=[{name: a, metric: unknown_shar, above: 1}]"]
        done = CliRunner().invoke(app, ["monitor", "check", "--model", str(model), *settings])
        assert done.exit_code == 2 and "did you mean 'unknown_share'?" in done.stderr
