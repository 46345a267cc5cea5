"""What people write first over MQTT: paho and the OpenAI SDK. It keeps nothing, and acknowledges first."""

import json
import sys

import paho.mqtt.client as paho
from openai import OpenAI

llm = OpenAI(base_url=f"http://127.0.0.1:{sys.argv[2]}/v1", api_key="none")


def on_connect(client, *_):
    client.subscribe("maze/user_input/#", qos=1)


def on_message(client, _data, message):
    session = message.topic.rsplit("/", 1)[1]
    text = json.loads(message.payload)["message"]
    answer = llm.chat.completions.create(model="mock", messages=[{"role": "user", "content": text}])
    client.publish(f"maze/assistant_response/{session}", answer.choices[0].message.content, qos=1)


client = paho.Client(paho.CallbackAPIVersion.VERSION2)
client.on_connect, client.on_message = on_connect, on_message
client.connect("127.0.0.1", int(sys.argv[1]))
client.loop_forever()
