"""Prints the AsyncAPI document of the MQTT door: `python -m app.asyncapi`."""

from __future__ import annotations

import json
import sys

from app.config import load_settings
from app.mqtt.asyncapi import document

if __name__ == "__main__":
    sys.stdout.write(json.dumps(document(load_settings().mqtt_projects), indent=1))
