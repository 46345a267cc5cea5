"""A game client in Python: sends a message or a game's state over MQTT, and prints what comes back.

pip install paho-mqtt
python python_client.py --message "Which way is out?"
python python_client.py --state '{"player": {"x": 1, "y": 1}, "exit": {"x": 9, "y": 9}}'
"""

import argparse
import json
import queue
import secrets
import sys
import threading
import time

import paho.mqtt.client as mqtt

FIRST_REPEAT_S, LONGEST_REPEAT_S = 5.0, 30.0
ENDINGS = {"final", "cancelled", "superseded", "expired", "error"}


class Portal:
    """One session at the portal. Every request has an id, and is repeated with it until there is an answer:
    however often it arrives, the portal does it once, and tells its answer each time."""

    def __init__(self, options: argparse.Namespace) -> None:
        root = f"{options.project}/device/{options.device}" if options.device else options.project
        self.root, self.session = root, options.session
        self.inbox: queue.Queue[tuple[str, dict]] = queue.Queue()
        self.client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
        self.client.username_pw_set(options.username, options.password)
        self.client.on_connect, self.client.on_message = self.connected, self.received
        self.client.on_subscribe = self.subscribed
        self.answered, self.may_listen = threading.Event(), False
        self.client.connect(options.broker, options.port)
        self.client.loop_start()  # paho connects again by itself
        if not self.answered.wait(15):
            sys.exit("The broker does not let this client in.")
        if not self.may_listen:
            sys.exit(f"The broker does not let this client listen to {root}/… (--project, --device).")

    def connected(self, client, _data, _flags, reason, _properties) -> None:
        """Subscribes, on every connection."""
        if reason.is_failure:
            print(f"The broker refuses: {reason}", file=sys.stderr)
            return
        topics = [f"{self.root}/{kind}/{self.session}" for kind in ("hint", "assistant_response", "stream")]
        topics[2] += "/+"  # one for each request
        client.subscribe([(topic, 1) for topic in topics])

    def subscribed(self, _client, _data, _id, reasons, _properties) -> None:
        """Notes whether the broker has granted all topics."""
        self.may_listen = not any(reason.is_failure for reason in reasons)
        self.answered.set()

    def received(self, _client, _data, message) -> None:
        """Hands a message to the main thread."""
        try:
            body = json.loads(message.payload)
        except ValueError:
            body = None  # text for people: a notice, or an error
        if isinstance(body, dict):
            self.inbox.put((message.topic, body))
        else:
            print(f"({message.payload.decode(errors='replace')})")

    def ask(self, kind: str, body: dict) -> dict:
        """Sends a request to the topic of that kind; returns its answer, and prints a stream as it comes."""
        request_id = secrets.token_hex(8)
        payload = json.dumps({**body, "requestId": request_id})  # the same bytes each time
        pause, self.next_piece = FIRST_REPEAT_S, 0
        while True:
            self.client.publish(f"{self.root}/{kind}/{self.session}", payload, qos=1)
            answer = self.wait(request_id, pause)
            if answer is not None:
                return answer
            pause = min(pause * 1.5, LONGEST_REPEAT_S)

    def wait(self, request_id: str, pause: float) -> dict | None:
        """The answer, unless nothing is heard of the request for `pause` seconds."""
        deadline = time.monotonic() + pause
        while (left := deadline - time.monotonic()) > 0:
            try:
                topic, body = self.inbox.get(timeout=left)
            except queue.Empty:
                return None
            if request_id not in {body.get("requestId"), topic.rpartition("/")[2]}:
                continue  # a notice, or the answer to an earlier request
            error = body.get("error") or {}
            if error.get("retryable"):
                deadline = time.monotonic() + error.get("retry_after", pause)
            elif "/stream/" in topic and body.get("type") not in ENDINGS:
                deadline = time.monotonic() + pause
                self.show(body)
            else:
                return body
        return None

    def show(self, event: dict) -> None:
        """Prints an event of a stream. What a repeated request brings again is left out."""
        if event["type"] == "restarted":
            self.next_piece = 0
            print("\n(it begins again)")
        elif event.get("seq", 0) >= self.next_piece:
            self.next_piece = event.get("seq", 0) + 1
            if event["type"] == "token":
                print(event["content"], end="", flush=True)
            elif event["type"] == "queued":
                print(f"(place {event['position']}, about {event['eta_s']} s)")


def main() -> None:
    """Asks once or twice, and ends."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--broker", default="localhost", help="the MQTT broker's host (%(default)s)")
    parser.add_argument("--port", type=int, default=1883, help="its port (%(default)s)")
    parser.add_argument("--username", help="user name at the broker, for devices the device's name")
    parser.add_argument("--password", help="and its password")
    parser.add_argument("--device", help="use the topics of this device")
    parser.add_argument("--project", default="maze", help="the project (%(default)s)")
    parser.add_argument("--session", default=f"py-{secrets.token_hex(4)}", help="its history (a new one)")
    parser.add_argument("--state", type=json.loads, metavar="JSON", help="a game state, answered by a hint")
    parser.add_argument("--message", help="a message, answered piece by piece")
    options = parser.parse_args()
    if options.state is None and options.message is None:
        parser.error("give a --message, a --state, or both")
    portal = Portal(options)
    if options.state is not None:
        answer = portal.ask("state", options.state)
        print(json.dumps(answer, indent=2, ensure_ascii=False))
    if options.message is not None:
        answer = portal.ask("user_input", {"message": options.message, "stream": True, "format": "json"})
        print(f"\n({answer.get('type', 'error')}) {answer.get('response') or answer.get('error', '')}")
    portal.client.disconnect()


if __name__ == "__main__":
    main()
