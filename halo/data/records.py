"""The text of a record: a string, or a chat through the tokenizer's chat template."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from halo.data.formats import CHAT_KEYS, type_name
from halo.settings import HaloError

_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


class Unusable(Exception):
    """A record without text; the message is the reason."""


def record_text(record: dict[str, Any], field: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of a record.

    Args:
        record: A row of a dataset or a JSON object.
        field: Key of the text; its value may also be a chat. Without it, a chat is looked for in CHAT_KEYS.
        tokenizer: Its chat template turns a chat into text.

    Raises:
        Unusable: If the record holds no text.
        HaloError: If the record is a chat and the tokenizer has no chat template.
    """
    key = field if field in record else next((key for key in CHAT_KEYS if key in record), None)
    if key is None:
        raise Unusable(f'has no key "{field}", only {", ".join(sorted(map(str, record)))[:80] or "none"}')
    value = record[key]
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise Unusable(f'"{key}" is {type_name(value)}, not a string or a chat')
    if not getattr(tokenizer, "chat_template", None):
        raise HaloError(f'teacher: its tokenizer must have a chat template for records with "{key}", got none')
    tools = record.get("tools")
    tools = tools if isinstance(tools, list) else None
    try:
        chat = [_message(message) for message in value]
        return str(tokenizer.apply_chat_template(chat, tools=tools, tokenize=False))
    except Unusable:
        raise
    except Exception as error:  # a template may raise anything about messages that it does not allow
        raise Unusable(f'"{key}" is refused by the chat template ({type(error).__name__})') from None


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with the keys that templates know; ShareGPT calls them "from" and "value"."""
    plain = {key: value for key, value in message.items() if key not in ("from", "value") and value is not None}
    if "from" in message:
        plain.setdefault("role", message["from"])
    if "value" in message:
        plain.setdefault("content", message["value"])
    if not isinstance(plain.get("role"), str):
        raise Unusable("a message of its chat has no role")
    if not isinstance(plain.get("content"), (str, list)) and "tool_calls" not in plain:
        raise Unusable("a message of its chat has no content")
    plain["role"] = _ROLES.get(plain["role"], plain["role"])
    return plain
