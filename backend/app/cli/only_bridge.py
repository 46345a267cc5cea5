"""Sees to it that no bridge starts beside another one of the same project on the same broker: both would
answer every message."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import msgspec

from app.cli.console import Failure
from app.config import Settings
from app.logs import get_logger
from app.mqtt.connection import Broker, request_once, retained
from app.mqtt.topics import NEW_SESSION, status_topic

RETAINED_S = 1.0
PROBE_S = 2.0

log = get_logger(__name__)


def check_alone(settings: Settings) -> None:
    """Raises `Failure` when another bridge answers on a project's topics, or the broker refuses the user;
    blocks. A broker that cannot be reached is told in the log and lets pass: the bridge waits for it."""
    broker = Broker.of(settings)
    topics = {status_topic(project): project for project in settings.mqtt_projects}
    try:
        kept = retained(broker, list(topics), timeout=RETAINED_S)
    except PermissionError as error:
        raise Failure(
            f"The broker {settings.mqtt_broker_url} does not let the portal in: {error}.",
            "Check MQTT_USERNAME and MQTT_PASSWORD, or --mqtt_username and --mqtt_password.",
        ) from None
    except OSError as error:
        log.warning("the broker cannot be asked for other bridges", reason=str(error) or type(error).__name__)
        return
    claimed = [project for topic, project in topics.items() if _claims_to_run(kept.get(topic, b""))]
    with ThreadPoolExecutor(max(1, len(claimed))) as pool:
        found = pool.map(lambda project: _answers(broker, project), claimed)
        served = [project for project, answered in zip(claimed, found, strict=True) if answered]
    if served:
        raise Failure(
            f"Another bridge serves {' and '.join(served)} on {settings.mqtt_broker_url}.",
            "Stop that one first, or name other projects with --projects: both would answer each message.",
        )
    for project in claimed:
        log.warning("the broker keeps the status of a bridge that does not answer; going on", project=project)


def _claims_to_run(payload: bytes) -> bool:
    try:
        status = msgspec.json.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return isinstance(status, dict) and status.get("state") in {"online", "degraded"}


def _answers(broker: Broker, project: str) -> bool:
    """Whether a bridge hands out session ids there."""
    try:
        request_once(broker, f"{project}/session", f"{project}/{NEW_SESSION}", b"probe", timeout=PROBE_S)
    except OSError:  # also a TimeoutError
        return False
    return True
