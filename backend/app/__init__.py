"""Prompt Portal: one session-based chat with a local LLM, over HTTP and MQTT."""

__version__ = "0.1.0"
