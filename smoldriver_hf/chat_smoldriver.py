"""Prompts that name cameras: the chat template, the user's message about a frame, and its token ids.

The prompt names every camera in front of its visual tokens, `CAM_FRONT: <image>`; the label right before a placeholder
says which camera's image belongs there. SmolVLM's language model gets visual tokens in the frame that it knows,
`<fake_token_around_image><global-img><image>…<fake_token_around_image>`: without it, it does not find the image in
question any more, however well the tokens stand in for SmolVLM's own.

What a user writes is text: control tokens inside it are broken up, in the chat template itself, so engines that render
the template on their own are covered too.
"""

import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .budgets_smoldriver import Budget

SMOLVLM_FRAME = ("<fake_token_around_image>", "<global-img>")  # the first one also closes it

# Fast tokenizers fail with "Already borrowed" when a thread changes their padding while another one encodes.
TOKENIZING = threading.Lock()

# Filled in by `chat_template_for`; `plain` writes user text, in which no control token can survive. Neighbouring texts
# are joined before it sees them (or "<ima", "ge>" would be one), and a text before an image ends in a line break (or
# its last word would be taken for part of the camera's label).
CHAT_TEMPLATE = """\
{%- set control_tokens = @CONTROL@ -%}
{%- set cameras = @CAMERAS@ -%}
{%- set seen = namespace(images=0, total=0, unnamed=0) -%}
{%- for message in messages -%}
{%- for part in message.content if message.content is not string and part.type in ['image', 'image_url'] -%}
{%- set seen.total = seen.total + 1 -%}
{%- set seen.unnamed = seen.unnamed + (0 if part.camera else 1) -%}
{%- endfor -%}
{%- endfor -%}
{%- macro plain(text) -%}
{%- set safe = namespace(text=text) -%}
{%- for token in control_tokens -%}
{%- set safe.text = safe.text | replace(token, token[0] + ' ' + token[1:]) -%}
{%- endfor -%}
{{- safe.text -}}
{%- endmacro -%}
{%- macro body(content) -%}
{%- if content is string -%}
{{- plain(content) -}}
{%- else -%}
{%- set pending = namespace(text='') -%}
{%- for part in content -%}
{%- if part.type == 'text' -%}
{%- set pending.text = pending.text ~ part.text -%}
{%- elif part.type in ['image', 'image_url'] -%}
{%- if pending.text -%}
{{- plain(pending.text) ~ '\n' -}}
{%- set pending.text = '' -%}
{%- endif -%}
{%- if not part.camera and not seen.unnamed == seen.total == cameras | length -%}
{{- raise_exception(('more than ' ~ cameras | length ~ ' images' if seen.unnamed > cameras | length else 'an image')
 ~ ' without a camera; this model knows ' ~ cameras | join(', ')) -}}
{%- endif -%}
{%- set camera = part.camera if part.camera else cameras[seen.images] -%}
{%- if camera not in cameras -%}
{{- raise_exception('unknown camera ' ~ camera ~ '; this model knows ' ~ cameras | join(', ')) -}}
{%- endif -%}
{%- set seen.images = seen.images + 1 -%}
{{- camera ~ ': ' ~ @IMAGE@ ~ '\n' -}}
{%- else -%}
{{- raise_exception('a message part is an image or a text, not ' ~ part.type) -}}
{%- endif -%}
{%- endfor -%}
{{- plain(pending.text) -}}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{- @ASSISTANT@ -}}
{%- generation -%}
{{- body(message.content) + @END@ -}}
{%- endgeneration -%}
{{- @AFTER@ -}}
{%- elif message.role == 'system' -%}
{{- @SYSTEM@ + body(message.content) + @END@ + @AFTER@ -}}
{%- elif message.role == 'user' -%}
{{- @USER@ + body(message.content) + @END@ + @AFTER@ -}}
{%- else -%}
{{- raise_exception('a role is system, user or assistant, not ' ~ message.role) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- @ASSISTANT@ -}}
{%- endif -%}
"""


def chat_template_for(tokenizer: Any, cameras: list[str], image_token: str, framed: bool = True) -> str:
    """The chat template of a SmolDriver processor, in the turn format that the language model was tuned on.

    SmolVLM's (`<|im_start|>User: … <end_of_utterance>`) where its end-of-utterance token exists, else ChatML where
    `<|im_end|>` does, else plain "User:" and "Assistant:" lines closed by the end-of-sequence token. Where SmolVLM's
    frame tokens exist they stand around each placeholder, unless something else writes them (`framed=False`).
    """
    control_tokens = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    if "<end_of_utterance>" in control_tokens:
        turns = {"SYSTEM": "System: ", "USER": "User: ", "ASSISTANT": "Assistant:", "END": "<end_of_utterance>"}
        start = "<|im_start|>"
    elif "<|im_end|>" in control_tokens:
        turns = {role: f"<|im_start|>{role.lower()}\n" for role in ("SYSTEM", "USER", "ASSISTANT")}
        turns["END"], start = "<|im_end|>", ""
    else:
        turns = {"SYSTEM": "System: ", "USER": "User: ", "ASSISTANT": "Assistant:", "END": tokenizer.eos_token}
        start = ""
    template = CHAT_TEMPLATE
    # Some tokenizers add runs of spaces as tokens: they are no control, and a space inside would not break them.
    control_tokens = [token for token in {*control_tokens, image_token} if token.strip()]
    # Shortest first: the space that breaks a token makes it longer, perhaps into another one, broken in its turn.
    control_tokens.sort(key=lambda token: (len(token), token))
    around, opening = SMOLVLM_FRAME if framed and set(SMOLVLM_FRAME) <= set(control_tokens) else ("", "")
    image = f"{around}{opening}{image_token}{around}"
    values = {**turns, "AFTER": "\n", "CONTROL": control_tokens, "CAMERAS": list(cameras), "IMAGE": image}
    for name, value in values.items():
        template = template.replace(f"@{name}@", json.dumps(value, ensure_ascii=False))
    return (f"{{{{- {json.dumps(start)} -}}}}\n" if start else "") + template


class RenderedPrompt(str):
    """A prompt that `apply_chat_template` rendered: its placeholders are control, not something a user wrote."""


def user_message(question: str, cameras: Sequence[str]) -> dict[str, Any]:
    """A user's message: an image of each of `cameras`, in this order, and a question about them."""
    images = [{"type": "image", "camera": camera} for camera in cameras]
    return {"role": "user", "content": [*images, {"type": "text", "text": question}]}


class CameraPrompts:
    """Questions about camera images → prompts and token ids, for a processor that has what is named here."""

    tokenizer: Any
    cameras: Sequence[str]
    image_token: str
    apply_chat_template: Callable[..., Any]
    num_image_tokens: Callable[..., int]  # of a budget: placeholders per camera

    def prompt(self, question: str, cameras: Sequence[str]) -> str:
        """The prompt of one user question about images of `cameras`, ready for the answer; one placeholder each."""
        return self.apply_chat_template([user_message(question, cameras)], add_generation_prompt=True)

    def prompt_ids(self, question: str, cameras: Sequence[str], num_queries: Budget | None = None) -> list[int]:
        """Token ids of `prompt`, with as many placeholders per camera as `num_queries`, or the default, asks for.

        Raises:
            ValueError: a budget that this model does not have.
        """
        return self.ids_of(self.prompt(question, cameras), num_queries)

    def ids_of(self, prompt: str, num_queries: Budget | None = None) -> list[int]:
        """As `prompt_ids`, of a prompt that is rendered already."""
        texts = str(prompt).split(self.image_token)
        if isinstance(num_queries, Mapping):
            counts = [self.num_image_tokens(num_queries, camera) for camera in self.labels_in(prompt)]
        else:
            counts = [self.num_image_tokens(num_queries)] * (len(texts) - 1)
        with TOKENIZING:
            parts = zip(texts, [*counts, 0], strict=True)
            return self.tokenizer("".join(text + self.image_token * count for text, count in parts))["input_ids"]

    def labels_in(self, prompt: str) -> list[str]:
        """The camera that is named right before each placeholder, or its frame; "" where none is.

        Raises:
            ValueError: a label that is no camera's name, or a camera named in a way that may be no label.
        """
        return [camera_before(text, self.cameras) for text in str(prompt).split(self.image_token)[:-1]]


# What may stand before an image that has no name.
NO_NAME = re.compile(r"(user|human|system|assistant|(the )?(image|picture|photo|view|frame|camera)s?)?[\W\d_]*", re.I)


def camera_before(text: str, cameras: Sequence[str]) -> str:
    """The camera that the end of `text`, which stands before an image, names in whatever case; "" where none.

    Raises:
        ValueError: see `CameraPrompts.labels_in`.
    """
    known = {name.lower(): name for name in cameras}
    text = re.sub(r"<\|[^<>|]*\|>", "\n", text.removesuffix("".join(SMOLVLM_FRAME))).rstrip()
    line = re.sub(r"^\s*(user|human|system|assistant)\s*:", "", text.rpartition("\n")[2], flags=re.I)
    words = re.findall(r"\w+", line)
    last = re.search(r"(\w+)[^\w.?!]*$", line)
    for label in ([last[1]] if last else []) + ["_".join(words)]:
        if label.lower() in known:
            return known[label.lower()]
    named = [name for name in cameras if re.search(rf"\b{re.escape(name)}\b", text, re.I)]
    if named:
        raise ValueError(
            f"is {named[-1]} the camera of the image behind {_brief(text[-60:])}? Write '{named[-1]}: <image>'"
        )
    if line.endswith((":", "]", ")", "=")) and 0 < len(words) <= 3 and not NO_NAME.fullmatch(line):
        raise ValueError(f"unknown camera {' '.join(words)!r}; this model knows {list(cameras)}")
    return ""


def named_conversation(conversation: Any, cameras: Sequence[str]) -> Any:
    """A conversation, or a list of them, that the chat template can read without guessing: `image_url` parts are
    image parts, which keep their camera.

    Raises:
        ValueError: anything else than conversations, or images of which some or too few have no camera.
    """
    check_conversation(conversation)
    if isinstance(conversation[0], list | tuple):
        return [named_conversation(messages, cameras) for messages in conversation]
    messages = [
        message
        if isinstance(message["content"], str)
        else {**message, "content": [_image_part(part) for part in message["content"]]}
        for message in conversation
    ]
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    given = [part.get("camera") for part in parts if part["type"] == "image"]
    if None in given and len(given) <= len(cameras) and (any(given) or len(given) != len(cameras)):
        raise ValueError(
            f"images without a camera are all of {list(cameras)} in this order; got {given}: add the camera's name to "
            'each part, {"type": "image", "camera": …}'
        )
    return messages


def _image_part(part: Mapping[str, Any]) -> Mapping[str, Any]:
    """OpenAI's image part as one of transformers'; others as they are."""
    if part["type"] != "image_url":
        return part
    given = part.get("image_url")
    inner = given if isinstance(given, Mapping) else {"url": given}
    camera = part.get("camera") or inner.get("camera")
    return {"type": "image", "url": inner.get("url"), **({"camera": camera} if camera else {})}


def check_conversation(conversation: Any) -> None:
    """Whether this is a conversation, or a list of them, that the chat template can read without guessing."""
    batched = isinstance(conversation, list | tuple) and conversation and isinstance(conversation[0], list | tuple)
    for messages in conversation if batched else [conversation]:
        if not isinstance(messages, list | tuple) or not messages:
            raise ValueError(f"a conversation must be a list of messages; got {_brief(messages)}")
        for message in messages:
            if not isinstance(message, Mapping) or not isinstance(message.get("content"), str | list | tuple):
                raise ValueError(
                    "a message must be a dict with a role and, as content, a text or a list of parts; "
                    f"got {_brief(message)}"
                )
            for part in () if isinstance(message["content"], str) else message["content"]:
                if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
                    raise ValueError(f"a part of a message must be a dict with a type; got {_brief(part)}")
                if part["type"] == "text" and not isinstance(part.get("text"), str):
                    raise ValueError(f"a part of type text must have a string as text; got {_brief(part)}")
                if part["type"] in ("image", "image_url") and not isinstance(part.get("camera"), str | None):
                    raise ValueError(f"a camera must be named by a string; got {_brief(part)}")


def _brief(value: Any) -> str:
    """The beginning of what was given."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


__all__ = ["TOKENIZING", "CameraPrompts", "RenderedPrompt", "chat_template_for", "named_conversation", "user_message"]
