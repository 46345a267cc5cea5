"""Home Assistant's MQTT discovery: each project shows itself as a device with sensors, and an entity to send
messages to (https://www.home-assistant.io/integrations/mqtt/#mqtt-discovery)."""

from __future__ import annotations

from typing import Any

import msgspec

from app import __version__
from app.mqtt.connection import Outgoing
from app.mqtt.topics import ASSISTANT_RESPONSE, status_topic

PREFIX = "homeassistant"
SESSION = "home-assistant"
"""The session of what is sent from there."""

LONGEST_STATE = 255
"""Characters of a state in Home Assistant, at most."""


def discovery(project: str, database_id: str) -> Outgoing:
    """The retained message that announces a project."""
    node = f"prompt_portal_{database_id}_{project}"
    body = {
        "device": {"identifiers": [node], "name": f"Prompt Portal {project}", "sw_version": __version__},
        "origin": {"name": "Prompt Portal", "sw_version": __version__},
        "availability": {
            "topic": status_topic(project),
            "value_template": "{{ 'offline' if value_json.state == 'offline' else 'online' }}",
        },
        "components": {
            name: {**part, "unique_id": f"{node}_{name}"} for name, part in _parts(project).items()
        },
    }
    return Outgoing(f"{PREFIX}/device/{node}/config", msgspec.json.encode(body), retain=True)


def _parts(project: str) -> dict[str, dict[str, Any]]:
    replies = f"{project}/{ASSISTANT_RESPONSE}/{SESSION}"
    return {
        "status": _sensor(project, "Status", "state", icon="mdi:robot-outline"),
        "queue": _sensor(project, "Queue", "queue", state_class="measurement", icon="mdi:tray-full"),
        "wait": _sensor(project, "Wait", "eta_s", unit_of_measurement="s", device_class="duration"),
        "model": _sensor(project, "Model", "model", icon="mdi:brain", entity_category="diagnostic"),
        "message": {
            "platform": "notify",
            "name": "Message",
            "command_topic": f"{project}/user_input/{SESSION}",
            "qos": 1,
        },
        "reply": {
            "platform": "sensor",
            "name": "Reply",
            "state_topic": replies,
            "value_template": f"{{{{ value[:{LONGEST_STATE}] }}}}",
            "icon": "mdi:message-reply-text",
        },
    }


def _sensor(project: str, name: str, key: str, **more: str) -> dict[str, Any]:
    template = f"{{{{ value_json.{key} }}}}"
    return {
        "platform": "sensor",
        "name": name,
        "state_topic": status_topic(project),
        "value_template": template,
        **more,
    }
