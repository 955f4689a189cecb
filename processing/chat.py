"""Conversations, as transformers' chat templates have them, to a question and its medium.

The Predictor reads one question about one medium, so a conversation is one user turn:

    [{"role": "user", "content": [{"type": "video", "video": "a.mp4"},
                                  {"type": "text", "text": "what happens?"}]}]
"""

from collections.abc import Mapping
from dataclasses import dataclass

from .texts import check_text

# The question alone. A language model's own template would add turns that the Predictor has not
# been trained to read.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
    "{% endif %}"
    "{% endfor %}"
)
LAYOUT = 'a list with one message, {"role": "user", "content": [...]}'


@dataclass(frozen=True)
class Turn:
    """A user turn: a question, empty if there is none, and a medium.

    Attributes:
        question: the text.
        part: the processor's argument for the medium, "images" or "videos"; `None` without one.
        medium: one image or one clip; `None` if the message names none.
    """

    question: str = ""
    part: str | None = None
    medium: object = None

    def messages(self) -> list[dict]:
        """Return the turn as a template gets it: without the medium, which it cannot read."""
        text = {"type": "text", "text": self.question}
        media = [{"type": self.part.removesuffix("s")}] if self.part else []
        return [{"role": "user", "content": [*media, text]}]


def read_content(name: str, content: object) -> Turn:
    """Return the question and the medium of a message."""
    if isinstance(content, str):
        return Turn(check_text(name, content))
    if not isinstance(content, list | tuple):
        raise ValueError(f"{name} is a {type(content).__name__}: give a string or a list of parts")
    questions, media = [], []
    for index, part in enumerate(content):
        where = f"{name}[{index}]"
        if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
            raise ValueError(f'{where} has no type: give {{"type": "text", "text": ...}}')
        kind, values = part["type"], {key: part[key] for key in part if key != "type"}
        values = {key: value for key, value in values.items() if value is not None}
        if kind == "image_url":  # OpenAI's layout: the address itself, or a dictionary around it
            kind, values = "image", {"url": values.get("image_url")}
            if isinstance(values["url"], Mapping):
                values = {"url": values["url"].get("url")}
        if kind not in ("text", "image", "video"):
            raise ValueError(f"{where} is of type {ascii(kind)[:40]}: give text, image or video")
        keys = {"text"} if kind == "text" else {kind, "url", "path"}
        is_placeholder = not values and kind != "text"  # the medium is given elsewhere
        if not is_placeholder and (len(values) != 1 or not keys.issuperset(values)):
            found = ", ".join(ascii(key)[:40] for key in values) or "nothing"
            raise ValueError(f"{where} has {found}: give its type and one of {sorted(keys)}")
        value = next(iter(values.values()), None)
        if kind == "text":
            questions.append(check_text(f"{where}, a text,", value))
        else:
            media.append((f"{kind}s", value))
    if len(questions) > 1 or len(media) > 1:
        raise ValueError(
            f"{name} has {len(questions)} texts and {len(media)} images and videos: give at most "
            "one of each"
        )
    return Turn("".join(questions), *(media[0] if media else ()))


def read_conversation(name: str, messages: object) -> Turn:
    """Return the user turn of one conversation.

    Raises: `ValueError` for any other turns: the Predictor has no input for them.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"{name} is not a list of messages: give {LAYOUT}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"{name}[{index}] is not a message with a role: give {LAYOUT}")
    roles = [message["role"] for message in messages]
    if roles != ["user"]:
        turns = ", ".join(ascii(role)[:20] for role in roles[:4])
        raise ValueError(
            f"{name} has the turns {turns}: give one user turn, because the Predictor reads one "
            "question and no other text"
        )
    return read_content(f"{name}[0]['content']", messages[0].get("content"))


def read_conversations(conversation: object) -> tuple[list[Turn], bool]:
    """Return the user turns of one conversation or several, and whether there are several."""
    several = isinstance(conversation, list | tuple) and any(
        isinstance(each, list | tuple) for each in conversation
    )
    if not several:
        return [read_conversation("conversation", conversation)], False
    return [
        read_conversation(f"conversation[{index}]", each) for index, each in enumerate(conversation)
    ], True


__all__ = ["CHAT_TEMPLATE", "Turn", "read_conversations"]
