"""Serve an exported folder with transformers' own OpenAI-compatible server (5.23).

    python -m hub_export serve transformers outputs/smoldriver --port 8000

The request names each image's camera beside its URL; without any name they are all of the model's cameras in order:

    {"model": "outputs/smoldriver", "max_tokens": 64, "messages": [{"role": "user", "content": [
        {"type": "image_url", "camera": "CAM_BACK", "image_url": {"url": "data:image/jpeg;base64,..."}},
        {"type": "text", "text": "Is there a car behind the ego car?"}]}]}

A request for another budget adds `"chat_template_kwargs": {"processor_kwargs": {"num_queries": 16}}`, or in place of
16 `{"CAM_FRONT": 16, "CAM_BACK": 2}`. Needs the packages of the extra `serve`.

What clients may send, `gate.py` says: pictures as data: URLs, `--allow_urls HOST` for others, one for each camera, in
requests of at most `--max_request_mb`. It serves this one model: what would load another is closed. An error is
`{"error": {"message": ...}}`, as OpenAI's clients read it.
"""

import logging
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from hub_export.engines.gate import IMAGES, Gate
from hub_export.engines.server import ServerArguments

LOG = logging.getLogger(__name__)
NAME = "SmolDriverForConditionalGeneration"
OPEN = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/health")


@dataclass
class TransformersServerArguments(ServerArguments):
    device: str = field(default="auto", metadata={"help": "cpu, cuda:0, …"})
    max_request_mb: int = field(default=64, metadata={"help": "Largest request, and largest picture of a host."})


def with_cameras(messages: list[dict], parsed: list[dict]) -> list[dict]:
    """`parsed`, what the server made of `messages`, with the cameras that it dropped.

    Raises:
        ValueError: the server did not keep one part per image.
    """
    for message, result in zip(messages, parsed, strict=True):
        if not isinstance(message.get("content"), list):
            continue
        cameras = [part.get("camera") for part in message["content"] if part["type"] in IMAGES]
        images = [part for part in result["content"] if part["type"] == "image"]
        for camera, part in zip(cameras, images, strict=True):
            if camera is not None:
                part["camera"] = camera
    return parsed


def with_pictures(messages: list[dict], gate: Gate) -> list[dict]:
    """The messages with pictures in the place of their URLs, none of which the server then opens.

    Raises:
        ValueError: see `Gate.picture`.
    """
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else ():
            if part["type"] == "image":
                part["image"] = gate.picture(part.pop("url"))
    return messages


class RequestLimit:
    """ASGI: a request is read whole before anything looks at it, or refused where it is too long."""

    def __init__(self, app: Any, most_bytes: int):
        self.app, self.most_bytes = app, most_bytes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body, more = bytearray(), True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.most_bytes:
                response = _error(413, f"a request may have {self.most_bytes} bytes")
                await response(scope, receive, send)
                return
        whole = iter([{"type": "http.request", "body": bytes(body), "more_body": False}])

        async def replay() -> Any:
            return next(whole, None) or await receive()

        await self.app(scope, replay, send)


def _error(status: int, message: str) -> Any:
    from fastapi.responses import JSONResponse

    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": error}, status_code=status)


def guard(app: Any, most_bytes: int) -> Any:
    """The server's app, with what loads other models closed, requests of limited length and one form of error."""
    from fastapi.exceptions import RequestValidationError
    from jinja2 import TemplateError
    from starlette.exceptions import HTTPException

    app.router.routes = [route for route in app.router.routes if route.path in OPEN]

    def explained(request: Any, error: Exception) -> Any:
        LOG.warning("%s is answered by 400: %s", request.url.path, error, exc_info=error)
        return _error(400, str(error))

    for kind in (ValueError, TemplateError):  # an unknown camera, one that comes twice, a budget beyond all
        app.add_exception_handler(kind, explained)
    app.add_exception_handler(
        RequestValidationError, lambda request, _: _error(400, "a request must be a JSON object")
    )
    app.add_exception_handler(HTTPException, lambda _, error: _error(error.status_code, str(error.detail)))
    app.add_exception_handler(Exception, lambda _, error: _error(500, f"{type(error).__name__}: see the server's log"))
    app.add_middleware(RequestLimit, most_bytes=most_bytes)
    return app


def start(args: TransformersServerArguments, non_blocking: bool = False) -> Any:
    """transformers' server, taught a class that is not its own, the names of cameras, and what clients may send."""
    import transformers
    from transformers.cli.serve import Serve
    from transformers.cli.serving import server
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.utils import BaseHandler
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.models.auto import modeling_auto

    # The server looks a model's class up by its name in transformers, and its modality by the name in this table.
    setattr(transformers, NAME, get_class_from_dynamic_module(f"modeling_smoldriver.{NAME}", args.folder))
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["smoldriver"] = NAME

    config = transformers.AutoConfig.from_pretrained(args.folder, trust_remote_code=True)
    hosts = tuple(host.lower() for host in args.allow_urls)
    gate = Gate(hosts, most_images=len(config.cameras), most_bytes=args.max_request_mb * 1_000_000)
    parse, validate, build = (
        BaseHandler.get_processor_inputs_from_messages,
        BaseHandler._validate_request,
        server.build_server,
    )

    def validated(handler: Any, body: dict) -> None:
        validate(handler, body)
        if "prompt" not in body:  # of the text-only endpoint
            gate.check(body)

    BaseHandler._validate_request = validated
    BaseHandler.get_processor_inputs_from_messages = staticmethod(
        lambda messages, modality: with_pictures(with_cameras(messages, parse(messages, modality)), gate)
    )
    # Its own looks into the Hub's cache, where a folder is not, and which may not be there.
    served = {"id": args.folder, "object": "model", "created": int(time.time()), "owned_by": "local"}
    ModelManager.get_gen_models = staticmethod(lambda cache_dir=None: [served])
    server.build_server = lambda *given, **options: guard(build(*given, **options), gate.most_bytes)
    where = {"device": args.device, "dtype": args.dtype, "host": args.host, "port": args.port}
    return Serve(force_model=args.folder, trust_remote_code=True, non_blocking=non_blocking, **where)


def main(args: TransformersServerArguments) -> None:
    """Serve until interrupted.

    Raises:
        ValueError: a package of the extra `serve` is missing.
    """
    missing = [name for name in ("fastapi", "openai", "uvicorn") if find_spec(name) is None]
    if missing:
        raise ValueError(f"transformers' server needs {', '.join(missing)}: pip install {' '.join(missing)}")
    start(args)
