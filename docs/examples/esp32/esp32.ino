// A device that asks Prompt Portal and shows the answer piece by piece. For an ESP32 with the libraries
// PubSubClient (2.8) and ArduinoJson (7).
//
// PubSubClient subscribes at QoS 1 but publishes at QoS 0 only: a question may get lost on its way. So it is
// asked again, with the same requestId, until its answer is complete; the portal answers it once, and tells the
// same answer each time.

#include <ArduinoJson.h>
#include <PubSubClient.h>
#include <WiFi.h>

const char *WIFI_NAME = "...";
const char *WIFI_PASSWORD = "...";
const char *BROKER = "192.168.1.10";
const uint16_t PORT = 1883;
// A device has topics of its own: PROJECT/device/NAME/... Without one: ROOT "maze", USER and PASSWORD nullptr.
const char *USER = "cab-7";
const char *PASSWORD = "...";
const String ROOT = "maze/device/cab-7";
const String SESSION = "s1";

// PubSubClient's buffer holds a whole packet, topic and payload together; what does not fit, it drops without a
// word. So the portal is asked for packets of the stream that fit into the 256 bytes that the buffer has by default.
// The event that ends the stream then comes without the reply's text, which the pieces have told, but with its length.
const uint16_t BUFFER_BYTES = 256;
const int MAX_TOKENS = 300;

const unsigned long SILENCE_MS = 8000;  // then the question is asked again
const unsigned long RECONNECT_MS = 3000;

WiFiClient network;
PubSubClient mqtt(network);

String requestId;           // of the question that waits for its answer; empty: none
String question;            // its payload, the same each time it is sent
String answer;              // what there is of its answer
int nextPiece = 0;          // its number in the stream
unsigned long heardAt = 0;  // when there was a sign of it last
unsigned long triedAt = 0;  // when the broker was tried last

void ask(const String &message) {
  requestId = String(esp_random(), HEX) + String(esp_random(), HEX);
  JsonDocument body;
  body["message"] = message;
  body["requestId"] = requestId;
  body["stream"] = true;
  body["format"] = "json";
  body["maxTokens"] = MAX_TOKENS;
  body["maxChunkBytes"] = BUFFER_BYTES;
  question = "";
  serializeJson(body, question);
  answer = "";
  nextPiece = 0;
  sendQuestion();
}

void sendQuestion() {
  heardAt = millis();
  // Written piece by piece: a question may be longer than the buffer.
  mqtt.beginPublish((ROOT + "/user_input/" + SESSION).c_str(), question.length(), false);
  mqtt.print(question);
  mqtt.endPublish();
}

void ended(const char *how) {
  requestId = "";
  Serial.printf("\n[%s] %u bytes\n", how, answer.length());
}

// The events have numbers, and with 0 the answer begins: the first time, when the portal begins it anew, and when it
// was asked for again, where the pieces may be cut otherwise. After one that is missing, nothing is taken until then.
void takeEvent(JsonDocument &event) {
  const char *type = event["type"] | "";
  int number = event["seq"] | -1;
  heardAt = millis();
  if (number == 0) {
    answer = "";
    nextPiece = 0;
  }
  if (number != nextPiece) return;
  nextPiece = number + 1;
  if (strcmp(type, "token") == 0) {
    const char *piece = event["content"] | "";
    answer += piece;
    Serial.print(piece);
  } else if (strcmp(type, "final") == 0 || strcmp(type, "cancelled") == 0 || strcmp(type, "expired") == 0 ||
             strcmp(type, "superseded") == 0) {
    ended(type);  // where `response` is left out, `response_bytes` equals answer.length() now
  } else if (strcmp(type, "error") == 0 && !(event["error"]["retryable"] | false)) {
    ended(event["error"]["message"] | "error");
  }  // after a retryable error: silence, and then the question again
}

void received(char *topic, byte *payload, unsigned int length) {
  JsonDocument body;
  if (deserializeJson(body, payload, length)) {
    Serial.printf("\n[%s] %.*s\n", topic, (int)length, (const char *)payload);  // a notice as text
    return;
  }
  if (requestId.isEmpty()) return;
  if (String(topic) == ROOT + "/stream/" + SESSION + "/" + requestId) {
    takeEvent(body);
  } else if (requestId == (body["requestId"] | "") && body["type"].isNull()) {
    // Not even begun: refused. The reply as a whole comes here too, if it fits; the stream has told it already.
    if (!(body["error"]["retryable"] | false)) ended(body["error"]["message"] | "error");
  }
}

void connectToBroker() {
  if (mqtt.connected() || (triedAt && millis() - triedAt < RECONNECT_MS)) return;
  triedAt = millis();
  String client = "esp32-" + String((uint32_t)ESP.getEfuseMac(), HEX);
  if (!mqtt.connect(client.c_str(), USER, PASSWORD)) {
    Serial.printf("no connection to the broker: %d\n", mqtt.state());
    return;
  }
  mqtt.subscribe((ROOT + "/stream/" + SESSION + "/+").c_str(), 1);
  mqtt.subscribe((ROOT + "/assistant_response/" + SESSION).c_str(), 1);
  if (!requestId.isEmpty()) sendQuestion();
}

void setup() {
  Serial.begin(115200);
  WiFi.mode(WIFI_STA);
  WiFi.begin(WIFI_NAME, WIFI_PASSWORD);  // it connects again by itself
  mqtt.setServer(BROKER, PORT);
  mqtt.setCallback(received);
  mqtt.setBufferSize(BUFFER_BYTES);
}

void loop() {
  if (WiFi.status() != WL_CONNECTED) return;
  connectToBroker();
  mqtt.loop();
  if (!requestId.isEmpty() && mqtt.connected() && millis() - heardAt > SILENCE_MS) sendQuestion();
  if (requestId.isEmpty() && Serial.available()) ask(Serial.readStringUntil('\n'));  // type a question
}
