class_name PortalClient
extends Node
## Talks to Prompt Portal over MQTT WebSockets (Godot 4). Add it to a scene and set [member url]; then
##
## [codeblock]
## portal.hint_received.connect(func(id, hint): print(hint.hint, hint.get("function_calls", [])))
## portal.piece_received.connect(func(id, text): label.text += text)
## portal.send_state({"player": {"x": 1, "y": 1}})
## portal.say("Which way is out?")
## [/codeblock]
##
## Each request is repeated, with the same id, until it is answered: the portal does it once, and tells the same
## answer each time. Never do what function_calls ask for without checking it: a model wrote it.

signal state_changed(connected: bool)
signal hint_received(request_id: String, hint: Dictionary)
signal piece_received(request_id: String, text: String)
signal restarted(request_id: String)
signal reply_received(request_id: String, reply: Dictionary)
signal notice_received(text: String)

@export var url := "ws://localhost:9001"
@export var project := "maze"
@export var session := "godot-1"
@export var device := ""
@export var username := ""
@export var password := ""

const REPEAT_MS := 6000
const PING_MS := 15000
const DEAF_MS := 40000
const ENDINGS := ["final", "cancelled", "superseded", "expired", "error"]

var _socket: WebSocketPeer
var _received := PackedByteArray()
var _greeted := false
var _connected := false
var _retry_at := 0
var _pause_ms := 500
var _ping_at := 0
var _heard_at := 0
var _packet_id := 0
var _waiting := {} # request id -> {topic, text, due, next}


## Sends a game state; its hint comes by [signal hint_received]. Returns the request's id.
func send_state(state: Dictionary) -> String:
	return _request("state", state)


## Sends a message; the reply comes by [signal piece_received], and whole by [signal reply_received].
func say(message: String) -> String:
	return _request("user_input", {"message": message, "stream": true, "format": "json"})


func _request(kind: String, body: Dictionary) -> String:
	var id := "%08x%08x" % [randi(), randi()]
	var text := JSON.stringify(body.merged({"requestId": id}))
	_waiting[id] = {"topic": _topic(kind), "text": text, "due": 0, "next": 0}
	return id


func _topic(kind: String) -> String:
	var root := project if device.is_empty() else "%s/device/%s" % [project, device]
	return "%s/%s/%s" % [root, kind, session]


# --- the connection ---

func _process(_delta: float) -> void:
	var now := Time.get_ticks_msec()
	if _socket == null:
		if now >= _retry_at:
			_open()
		return
	_socket.poll()
	match _socket.get_ready_state():
		WebSocketPeer.STATE_OPEN:
			_talk(now)
		WebSocketPeer.STATE_CLOSED:
			_lost(now)


func _open() -> void:
	_socket = WebSocketPeer.new()
	_socket.supported_protocols = PackedStringArray(["mqtt"])
	_received = PackedByteArray()
	_greeted = false
	if _socket.connect_to_url(url) != OK:
		_lost(Time.get_ticks_msec())


func _lost(now: int) -> void:
	_socket = null
	_retry_at = now + _pause_ms
	_pause_ms = mini(_pause_ms * 2, 15000)
	if _connected:
		_connected = false
		state_changed.emit(false)


func _talk(now: int) -> void:
	if not _greeted:
		_greeted = true
		_heard_at = now
		_send_connect()
	while _socket.get_available_packet_count() > 0:
		_received.append_array(_socket.get_packet())
		_heard_at = now
	_read_packets()
	if now - _heard_at > DEAF_MS:
		_socket.close()
	elif _connected:
		_repeat(now)
		if now >= _ping_at:
			_ping_at = now + PING_MS
			_socket.send(PackedByteArray([0xC0, 0])) # PINGREQ


func _repeat(now: int) -> void:
	for id: String in _waiting:
		var request: Dictionary = _waiting[id]
		if now >= request.due:
			request.due = now + REPEAT_MS
			_publish(request.topic, request.text)


# --- MQTT 3.1.1 ---

func _send_connect() -> void:
	var flags := 0x02 # a clean session
	var names := PackedByteArray()
	if not username.is_empty():
		flags |= 0xC0
		names = _string(username) + _string(password)
	var body := _string("MQTT") + PackedByteArray([4, flags, 0, 30]) + _string("godot-%08x" % randi()) + names
	_send(0x10, body)


func _subscribe() -> void:
	var body := _next_id()
	for filter: String in [_topic("hint"), _topic("assistant_response"), _topic("stream") + "/+"]:
		body += _string(filter) + PackedByteArray([1])
	_send(0x82, body)


func _publish(topic: String, text: String) -> void:
	_send(0x32, _string(topic) + _next_id() + text.to_utf8_buffer()) # QoS 1


func _send(head: int, body: PackedByteArray) -> void:
	var packet := PackedByteArray([head])
	var rest := body.size()
	while true:
		packet.append((rest & 127) | (128 if rest > 127 else 0))
		rest >>= 7
		if rest == 0:
			break
	_socket.send(packet + body)


func _string(text: String) -> PackedByteArray:
	var bytes := text.to_utf8_buffer()
	return PackedByteArray([bytes.size() >> 8, bytes.size() & 255]) + bytes


func _next_id() -> PackedByteArray:
	_packet_id = _packet_id % 65535 + 1
	return PackedByteArray([_packet_id >> 8, _packet_id & 255])


# A frame of the WebSocket may hold half a packet, or several.
func _read_packets() -> void:
	while true:
		var length := 0
		var at := 1
		var shift := 0
		while at < _received.size() and _received[at] > 127:
			length |= (_received[at] & 127) << shift
			shift += 7
			at += 1
		if at >= _received.size():
			return
		length |= _received[at] << shift
		if _received.size() < at + 1 + length:
			return
		var head := _received[0]
		var body := _received.slice(at + 1, at + 1 + length)
		_received = _received.slice(at + 1 + length)
		_handle(head, body)


func _handle(head: int, body: PackedByteArray) -> void:
	match head >> 4:
		2: # CONNACK
			if body[1] != 0:
				push_warning("The broker refuses the connection: code %d" % body[1])
				_socket.close()
				return
			_subscribe()
		9: # SUBACK
			if body.slice(2).has(0x80):
				push_warning("The broker refuses the topics of %s: check project and device" % _topic("*"))
				_socket.close()
				return
			_pause_ms = 500
			_connected = true
			for request: Dictionary in _waiting.values():
				request.due = 0 # answers that came meanwhile are lost to this client: ask again
			state_changed.emit(true)
		3: # PUBLISH
			var end := 2 + body[0] * 256 + body[1]
			var topic := body.slice(2, end).get_string_from_utf8()
			if head & 0x06:
				_socket.send(PackedByteArray([0x40, 2, body[end], body[end + 1]])) # PUBACK
				end += 2
			_message(topic, body.slice(end).get_string_from_utf8())


# --- answers ---

func _message(topic: String, text: String) -> void:
	var parser := JSON.new()
	if parser.parse(text) != OK or not parser.data is Dictionary:
		notice_received.emit(text)
		return
	var body: Dictionary = parser.data
	var streams := _topic("stream") + "/"
	if topic.begins_with(streams):
		_event(topic.trim_prefix(streams), body)
	elif body.has("requestId"):
		_answered(str(body.requestId), body, topic == _topic("hint"))
	else:
		notice_received.emit(str(body.get("hint", text)))


# Events have numbers, from 0 again after `restarted`: what comes twice is left out.
func _event(id: String, event: Dictionary) -> void:
	if not _waiting.has(id):
		return
	var request: Dictionary = _waiting[id]
	request.due = Time.get_ticks_msec() + REPEAT_MS # it is being worked on
	var type := str(event.get("type", ""))
	if type == "restarted":
		request.next = 0
		restarted.emit(id)
	elif type in ENDINGS:
		_answered(id, event, false)
	elif int(event.get("seq", 0)) >= request.next:
		request.next = int(event.get("seq", 0)) + 1
		if type == "token":
			piece_received.emit(id, str(event.get("content", "")))


func _answered(id: String, body: Dictionary, is_hint: bool) -> void:
	if not _waiting.has(id):
		return # the second answer to a repeated request
	var error: Variant = body.get("error")
	if error is Dictionary and error.get("retryable", false):
		_waiting[id].due = Time.get_ticks_msec() + int(1000 * float(error.get("retry_after", 5)))
		return
	_waiting.erase(id)
	if is_hint:
		hint_received.emit(id, body)
	else:
		reply_received.emit(id, body)
