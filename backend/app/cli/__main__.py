"""`./setup_llm.sh`: one command that sets everything up and runs it."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.table import Table
from rich.text import Text

from app.cli import devices, install, models, page, people, servers, up
from app.cli.broker import Certificate
from app.cli.checks import run_benchmarks, run_checks
from app.cli.console import Failure, Step, console, done, failures_shown
from app.cli.portal import Portal, url_of
from app.cli.stack import DEFAULT_STATE, HOST, Stack
from app.cli.supervisor import StackState, process, read_state, stop_leftovers
from app.logs import configure_logging

NOT_RUNNING = 3
"""Exit code of `status` when nothing runs, as service managers have it."""

DOWN_TIMEOUT_S = 15.0
"""Beyond what the parts have to end."""

LOG_POLL_S = 0.3

app = typer.Typer(
    help="Sets up and runs Prompt Portal with a local model and an MQTT broker. Without a command: up.",
    add_completion=False,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

audit_app = typer.Typer(help="The audit log.", no_args_is_help=True)
app.add_typer(audit_app, name="audit")
app.add_typer(devices.app, name="devices")
app.add_typer(servers.app, name="servers")
app.add_typer(models.app, name="models")

Port = Annotated[int, typer.Option("--port", help="Port of the portal", min=1, max=65535)]
LlmPort = Annotated[
    int | None, typer.Option("--llm-port", help="Port of the LLM server (8080)", min=1, max=65535)
]
MqttPort = Annotated[
    int | None, typer.Option("--mqtt-port", help="Port of the MQTT broker (1883)", min=1, max=65535)
]
MqttWsPort = Annotated[
    int | None,
    typer.Option("--mqtt-ws-port", help="Port of the broker's WebSockets (9001); 0: none", min=0, max=65535),
]
MqttListen = Annotated[
    str | None,
    typer.Option(
        "--mqtt-listen", help="Let devices reach the broker at this address of the machine", metavar="ADDRESS"
    ),
]
MqttCert = Annotated[
    Path | None,
    typer.Option("--mqtt-cert", help="The broker's certificate: TLS for it", exists=True, dir_okay=False),
]
MqttKey = Annotated[
    Path | None, typer.Option("--mqtt-key", help="The key of that certificate", exists=True, dir_okay=False)
]
State = Annotated[
    Path,
    typer.Option("--state", help="Where model, logs and, for a second portal, settings lie", metavar="DIR"),
]
LlmUrl = Annotated[
    str | None, typer.Option("--llm-url", help="Use this LLM server and start none", metavar="URL")
]
Broker = Annotated[
    str | None, typer.Option("--broker", help="Use this MQTT broker and start none", metavar="URL")
]
Model = Annotated[
    Path | None,
    typer.Option("--model", help="Serve this GGUF instead of the starter model", exists=True, dir_okay=False),
]
Context = Annotated[
    int | None,
    typer.Option("--ctx", help="Context of each generation, in tokens (4096)", min=256, metavar="TOKENS"),
]
Detach = Annotated[bool, typer.Option("--detach", "-d", help="Run in the background")]


def _arguments(stack: Stack) -> list[str]:
    """The options that make this stack."""
    options = {
        "--port": stack.port,
        "--llm-port": stack.llm_port if stack.own_llm else None,
        "--mqtt-port": stack.mqtt_port if stack.own_broker else None,
        "--mqtt-ws-port": stack.mqtt_ws_port if stack.own_broker else None,
        "--mqtt-listen": stack.mqtt_listen if stack.own_broker else None,
        "--mqtt-cert": stack.mqtt_certificate.file if stack.mqtt_certificate else None,
        "--mqtt-key": stack.mqtt_certificate.key if stack.mqtt_certificate else None,
        "--state": stack.state,
        "--llm-url": stack.llm_url,
        "--broker": stack.broker_url,
        "--model": stack.model,
        "--ctx": stack.context,
    }
    return [text for name, value in options.items() if value is not None for text in (name, str(value))]


@app.command("up")
def up_command(
    port: Port = 8000,
    llm_port: LlmPort = None,
    mqtt_port: MqttPort = None,
    mqtt_ws_port: MqttWsPort = None,
    mqtt_listen: MqttListen = None,
    mqtt_cert: MqttCert = None,
    mqtt_key: MqttKey = None,
    state: State = DEFAULT_STATE,
    llm_url: LlmUrl = None,
    broker: Broker = None,
    model: Model = None,
    ctx: Context = None,
    detach: Detach = False,
    background: Annotated[bool, typer.Option(hidden=True, help="The background side of --detach")] = False,
) -> None:
    """Installs what is missing, starts everything, proves it by a chat, and keeps it running."""
    with failures_shown():
        certificate = _certificate(mqtt_cert, mqtt_key)
        stack = Stack(
            state.resolve(),
            port,
            llm_port or 8080,
            mqtt_port or (8883 if certificate else 1883),
            llm_url,
            broker,
            model.resolve() if model else None,
            context=ctx,
            own_llm=any(given is not None for given in (model, ctx, llm_port)),
            own_broker=any(given is not None for given in (mqtt_port, mqtt_ws_port, mqtt_listen, mqtt_cert)),
            mqtt_ws_port=9001 if mqtt_ws_port is None else mqtt_ws_port,
            mqtt_listen=mqtt_listen or HOST,
            mqtt_certificate=certificate,
        )
        if detach:
            sys.exit(0 if up.detach(stack, ["up", "--background", *_arguments(stack)]) else 1)
        else:
            up.run(stack, introduce=not background)


def _certificate(file: Path | None, key: Path | None) -> Certificate | None:
    if file is None and key is None:
        return None
    if file is None or key is None:
        raise Failure("--mqtt-cert and --mqtt-key belong together: the certificate, and its key.")
    return Certificate(file.resolve(), key.resolve())


@app.command()
def down(state: State = DEFAULT_STATE) -> None:
    """Stops everything that `up` started."""
    stack = replace(Stack(), state=state.resolve())
    with failures_shown():
        found = read_state(stack)
        supervisor = process(found.pid, found.created) if found else None
        if found is not None and supervisor is not None:
            supervisor.terminate()
            with Step("Stopping"):
                supervisor.wait(DOWN_TIMEOUT_S + sum(part.stop_s for part in found.parts.values()))
            done("Stopped")
        elif (left := stop_leftovers(stack)) > 0:
            done(f"Stopped {left} programs that a killed supervisor had left behind")
        else:
            console.print("It is not running.")


@app.command()
def status(
    state: State = DEFAULT_STATE,
    as_json: Annotated[bool, typer.Option("--json", help="For programs")] = False,
) -> None:
    """Shows how every part is. The exit code is 0 when all are ready, 3 when nothing runs, else 1."""
    with failures_shown():
        found = read_state(replace(Stack(), state=state.resolve()))
    if found is None or not found.is_running:
        console.print('{"running": false}' if as_json else "It is not running. Start it with `up`.")
        sys.exit(NOT_RUNNING)
    if as_json:
        print(msgspec.json.encode(found).decode())
    else:
        console.print(_table(found))
    sys.exit(0 if all(part.state == "ready" for part in found.parts.values()) else 1)


def _table(found: StackState) -> Table:
    table = Table("Part", "State", "Process", "Up for", "Restarts", "Address", box=None, pad_edge=False)
    for part in found.parts.values():
        seconds = max(0, round(time.time() - part.since))
        lasted = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        table.add_row(
            part.title,
            Text(part.state, style="green" if part.state == "ready" else "yellow"),
            str(part.pid or "-"),
            lasted,
            str(part.restarts),
            part.address,
        )
    return table


@app.command()
def logs(
    part: Annotated[
        str | None, typer.Argument(help="llm, broker, portal, supervisor; all when left out")
    ] = None,
    state: State = DEFAULT_STATE,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines are written")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", help="How many of the last lines", min=0)] = 50,
) -> None:
    """Shows what the parts have written."""
    directory = replace(Stack(), state=state.resolve()).logs
    files = sorted(file for file in directory.glob("*.log") if ".old" not in file.name)
    chosen = [file for file in files if part in {None, file.stem}]
    with failures_shown():
        if not chosen:
            known = ", ".join(file.stem for file in files) or "none yet"
            raise Failure("There is no such log.", f"There are: {known}.")
    ends = [_show_end(file, lines, with_name=len(chosen) > 1) for file in chosen]
    try:
        while follow:
            time.sleep(LOG_POLL_S)
            ends = [_show_new(file, end) for file, end in zip(chosen, ends, strict=True)]
    except KeyboardInterrupt:
        pass


def _show_end(file: Path, lines: int, *, with_name: bool) -> int:
    content = file.read_bytes()
    if with_name:
        console.rule(file.stem, align="left")
    last = content.decode(errors="replace").splitlines()[-lines:] if lines else []
    print("\n".join(last))
    return len(content)


def _show_new(file: Path, end: int) -> int:
    if not file.exists():
        return 0
    size = file.stat().st_size
    if size == end:
        return end
    with file.open("rb") as log:
        log.seek(end if size > end else 0)
        print(log.read().decode(errors="replace"), end="", flush=True)
        return log.tell()


@app.command("install")
def install_command(
    state: State = DEFAULT_STATE, llm_url: LlmUrl = None, broker: Broker = None, model: Model = None
) -> None:
    """Installs and fetches everything that `up` needs, and starts nothing."""
    with failures_shown():
        stack = Stack(state.resolve(), llm_url=llm_url, broker_url=broker, model=model)
        up.prepare(stack)
        done("Everything is there; start it with `up`")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def test(context: typer.Context, state: State = DEFAULT_STATE) -> None:
    """Runs every check and test, installing what they need. Further words go to pytest."""
    with failures_shown():
        stack = Stack(state.resolve())
        stack.state.mkdir(parents=True, exist_ok=True)
        install.install_packages(stack, "requirements-dev.txt", "what the tests need")
        install.test_programs(stack)
        install.starter_model(stack)
        page.build_page(stack)
        sys.exit(run_checks(stack, context.args))


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
def bench(context: typer.Context) -> None:
    """Measures what the portal costs, beside what it is compared with; `bench --help` tells its options."""
    with failures_shown():
        if {"-h", "--help"}.isdisjoint(context.args):
            stack = Stack()
            stack.state.mkdir(parents=True, exist_ok=True)
            install.install_packages(stack, "requirements-dev.txt", "what the tests need")
            install.mosquitto(stack)
        sys.exit(run_benchmarks(context.args))


@app.command()
def invite(
    role: Annotated[str, typer.Option("--role", help="The role of the new account")] = "author",
    days: Annotated[float, typer.Option("--days", help="How long the link is good", min=0.01, max=365)] = 7,
    url: Annotated[
        str | None, typer.Option("--url", help="Where people reach the portal", metavar="URL")
    ] = None,
    portal: Portal = DEFAULT_STATE,
) -> None:
    """Prints a link with which one account can be made, such as the first admin's (--role admin)."""
    with failures_shown():
        print((url or url_of(portal)).rstrip("/") + people.invite(portal, role, days).path)


@audit_app.command()
def verify(
    head: Annotated[
        str | None, typer.Option("--head", help="A head (seq:hash) that was noted before", metavar="HEAD")
    ] = None,
    portal: Portal = DEFAULT_STATE,
) -> None:
    """Checks that no row of the audit log was changed, taken out or put in. The exit code is 1 if so."""
    with failures_shown():
        verdict = people.verify_audit(portal, head)
        if verdict.problem is not None:
            raise Failure(
                f"The audit log is broken: {verdict.problem}.", f"{verdict.rows} rows before it fit."
            )
        done(f"The audit log is whole: {verdict.rows} rows")
        print(verdict.head)


def main() -> None:
    """The program. No word means `up`, also before its options."""
    arguments = sys.argv[1:]
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in {"-h", "--help"}):
        arguments = ["up", *arguments]
    configure_logging("info")
    app(arguments, prog_name="setup_llm.bat" if sys.platform == "win32" else "./setup_llm.sh")


if __name__ == "__main__":
    main()
