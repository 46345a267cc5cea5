"""Masks personal data in text: what can be told by its form."""

from __future__ import annotations

import re
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Any

_EMAIL = re.compile(r"[A-Za-z0-9._%+-]+@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?\b")
_CARD = re.compile(r"\b\d(?:[ -]?\d){12,18}\b")
_PHONE = re.compile(r"(?<![\w.])(?:\+\d{1,3}[ /-]?|0)(?:\(?\d{1,5}\)?[ /-]?)(?:\d[ /-]?){5,12}\d\b")
_ADDRESS = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w.])")


def redact(text: str) -> str:
    """The text with a mark such as `[email]` in place of email addresses, IBANs, card numbers, telephone
    numbers and IP addresses."""
    text = _EMAIL.sub("[email]", text)
    text = _IBAN.sub("[iban]", text)
    text = _CARD.sub(lambda found: "[card]" if _is_card(found[0]) else found[0], text)
    text = _ADDRESS.sub(lambda found: "[address]" if _is_address(found[0]) else found[0], text)
    return _PHONE.sub("[phone]", text)


def _is_card(digits: str) -> bool:
    """Whether the check digit is right (ISO/IEC 7812-1)."""
    numbers = [int(digit) for digit in digits if digit.isdigit()][::-1]
    doubled = [sum(divmod(2 * number, 10)) for number in numbers[1::2]]
    return (sum(numbers[::2]) + sum(doubled)) % 10 == 0


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def redacted_message(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A chat message, its text masked: a plain one, or the text parts of one in parts."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": redact(content)}
    if isinstance(content, list):
        return {**message, "content": [_masked_part(part) for part in content]}
    return message


def _masked_part(part: Any) -> Any:
    is_text = isinstance(part, dict) and isinstance(part.get("text"), str)
    return {**part, "text": redact(part["text"])} if is_text else part
