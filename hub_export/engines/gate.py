"""What a server takes from its clients: pictures out of the request itself, so many and so large, and nothing else.

A client could otherwise have the server open any file on its disk, tell which ones exist, ask services that only the
server reaches, or fill its memory. Pictures come as `data:` URLs; from the web only where a host was allowed, never
from a private address, and never behind a redirect.
"""

import base64
import binascii
import http.client
import io
import ipaddress
import socket
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

from PIL import Image

from smoldriver_hf.image_processing_smoldriver import FORMATS, MAX_PIXELS

SECONDS = 20.0  # that a picture from the web may take
TEXTS = ("text", "input_text", "output_text")
IMAGES = ("image_url", "input_image")
# What transformers' server would ignore, with the values that change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "logprobs": (False,),
    "top_logprobs": (0,),
    "n": (1,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tool_choice": ("none", "auto"),
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "prediction": (),
    "web_search_options": (),
}


@dataclass(frozen=True)
class Gate:
    """What is let in.

    Attributes:
        hosts: names of hosts from which pictures may be fetched.
        most_images: in a request, of all its messages.
        most_bytes: of a request, and of a picture from the web.
        most_pixels: of a picture.
    """

    hosts: tuple[str, ...]
    most_images: int
    most_bytes: int
    most_pixels: int = MAX_PIXELS

    def check(self, body: Mapping[str, Any]) -> None:
        """Refuse a request that would be answered other than asked.

        Raises:
            ValueError: no list of messages, a part that is neither text nor image, too many images, or an option that
                the server does not have.
        """
        for name, neutral in NEUTRAL.items():
            if body.get(name) is not None and body[name] not in neutral:
                raise ValueError(f"{name} is not supported; got {body[name]!r:.80}")
        messages = body.get("messages", body.get("input"))
        if isinstance(messages, str) and "input" in body:  # of the responses API
            return
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise ValueError(f"messages must be a list of objects with role and content; got {messages!r:.80}")
        if "messages" in body and not all(isinstance(message.get("role"), str) for message in messages):
            raise ValueError("each message needs a role: system, user or assistant")
        images = sum(kind in IMAGES for message in messages for kind in _kinds(message.get("content")))
        if images > self.most_images:
            raise ValueError(f"a request may have {self.most_images} images, one for each camera; it has {images}")
        options = body.get("chat_template_kwargs") or {}
        inner = options.get("processor_kwargs") or {} if isinstance(options, dict) else None
        if not isinstance(inner, dict) or set(options) - {"processor_kwargs"} or set(inner) - {"num_queries"}:
            raise ValueError(
                'chat_template_kwargs may hold {"processor_kwargs": {"num_queries": ...}} and nothing else; '
                f"got {options!r:.80}"
            )

    def picture(self, url: Any) -> Image.Image:
        """The picture of an image part.

        Raises:
            ValueError: neither a `data:` URL nor one of an allowed host, no picture, or too large a one.
        """
        if not isinstance(url, str):
            raise ValueError(f"the URL of an image must be a string; got {type(url).__name__}")
        parts = urlsplit(url) if url.startswith(("http://", "https://")) else None
        if parts is not None:
            content = self._fetched(parts)
        elif url.startswith("data:image/"):
            content = _decoded(url)
        else:
            raise ValueError(f"an image must be a data:image/...;base64,... URL{self._or_hosts()}; got {url[:40]!r}")
        try:
            picture = Image.open(io.BytesIO(content), formats=FORMATS)
        except Exception:  # broken headers make Pillow's parsers raise almost anything
            raise ValueError(f"{url[:40]!r} holds no picture of the formats {', '.join(FORMATS)}") from None
        if picture.width * picture.height > self.most_pixels:
            raise ValueError(
                f"a picture may have {self.most_pixels} pixels; {url[:40]!r} has {picture.width} x {picture.height}"
            )
        try:
            picture.load()
        except Exception:
            raise ValueError(f"{url[:40]!r} holds a broken picture") from None
        return picture

    def _fetched(self, parts: SplitResult) -> bytes:
        """The answer of an allowed host, which must have none but public addresses."""
        host, https = parts.hostname or "", parts.scheme == "https"
        if host not in self.hosts:
            raise ValueError(f"an image must be a data:image/...;base64,... URL{self._or_hosts()}; got host {host!r}")
        try:
            port = parts.port or (443 if https else 80)
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            addresses = [str(one[4][0]) for one in found]
            if not all(ipaddress.ip_address(address.partition("%")[0]).is_global for address in addresses):
                raise ValueError(f"the host {host} has a private address: no image is fetched from there")
            # To the address that was checked: the name could mean another one a moment later.
            stream = socket.create_connection((addresses[0], port), timeout=SECONDS)
            with (
                stream if not https else ssl.create_default_context().wrap_socket(stream, server_hostname=host) as line
            ):
                return self._answer(line, parts, port)
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(f"the image at {host} cannot be fetched: {type(error).__name__}") from None

    def _answer(self, line: socket.socket, parts: SplitResult, port: int) -> bytes:
        connection = http.client.HTTPConnection(parts.hostname or "", port)
        connection.sock = line
        connection.request("GET", f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}")
        response = connection.getresponse()
        if response.status != 200:  # a redirect too: it could lead anywhere
            raise ValueError(f"the image at {parts.hostname} cannot be fetched: status {response.status}")
        content, end = b"", time.monotonic() + SECONDS
        while piece := response.read1(1 << 16):
            content += piece
            if len(content) > self.most_bytes or time.monotonic() > end:
                raise ValueError(f"the image at {parts.hostname} has over {self.most_bytes} bytes, or takes too long")
        return content

    def _or_hosts(self) -> str:
        return f", or come from {' or '.join(self.hosts)}" if self.hosts else ""


def _kinds(content: Any) -> Sequence[str]:
    """The types of a message's parts.

    Raises:
        ValueError: a part that is no text and no image: the server would open it, or leave it out.
    """
    if content is None or isinstance(content, str):
        return []
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise ValueError(f"content must be a text or a list of parts; got {content!r:.80}")
    kinds = [str(part.get("type")) for part in content]
    for part, kind in zip(content, kinds, strict=True):
        if kind not in (*TEXTS, *IMAGES):
            raise ValueError(f"a part must be text or image_url; got type {kind!r:.40}")
        if kind in TEXTS and not isinstance(part.get("text"), str) or kind in IMAGES and "image_url" not in part:
            raise ValueError(f"a part of type {kind} needs {'text' if kind in TEXTS else 'image_url'}")
    return kinds


def _decoded(url: str) -> bytes:
    head, _, data = url.partition(",")
    if not head.endswith(";base64"):
        raise ValueError(f"the data of an image must be in base64: data:image/jpeg;base64,...; got {head[:40]!r}")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error:
        raise ValueError(f"{url[:40]!r} is no base64") from None
