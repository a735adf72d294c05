"""Serve an exported folder with transformers' own OpenAI-compatible server (5.23).

    python -m hub_export serve transformers outputs/smoldriver --port 8000

The request names each image's camera beside its URL; images without a name are taken in the model's camera order:

    {"model": "outputs/smoldriver", "max_tokens": 64, "messages": [{"role": "user", "content": [
        {"type": "image_url", "camera": "CAM_BACK", "image_url": {"url": "data:image/jpeg;base64,..."}},
        {"type": "text", "text": "Is there a car behind the ego car?"}]}]}

A request for another budget adds `"chat_template_kwargs": {"processor_kwargs": {"num_queries": 16}}`. Needs the
packages of the extra `serve`.
"""

import logging
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from hub_export.engines.server import ServerArguments

LOG = logging.getLogger(__name__)


@dataclass
class TransformersServerArguments(ServerArguments):
    device: str = field(default="auto", metadata={"help": "cpu, cuda:0, …"})


def with_cameras(messages: list[dict], parsed: list[dict]) -> list[dict]:
    """`parsed`, what the server made of `messages`, with the cameras that it dropped.

    Raises:
        ValueError: the server did not keep one part per image.
    """
    for message, result in zip(messages, parsed, strict=True):
        if not isinstance(message.get("content"), list):
            continue
        cameras = [part.get("camera") for part in message["content"] if part["type"] in ("image_url", "input_image")]
        images = [part for part in result["content"] if part["type"] == "image"]
        for camera, part in zip(cameras, images, strict=True):
            if camera is not None:
                part["camera"] = camera
    return parsed


def start(args: TransformersServerArguments, non_blocking: bool = False) -> Any:
    """transformers' server, taught a class that is not its own, the names of cameras, and to say what is wrong."""
    import transformers
    from fastapi import HTTPException
    from jinja2 import TemplateError
    from transformers.cli.serve import Serve
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.utils import BaseHandler
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.models.auto import modeling_auto

    # The server looks a model's class up by its name in transformers, and its modality by the name in this table.
    name = "SmolDriverForConditionalGeneration"
    setattr(transformers, name, get_class_from_dynamic_module(f"modeling_smoldriver.{name}", args.folder))
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["smoldriver"] = name

    parse = BaseHandler.get_processor_inputs_from_messages
    BaseHandler.get_processor_inputs_from_messages = staticmethod(
        lambda messages, modality: with_cameras(messages, parse(messages, modality))
    )
    answer = ChatCompletionHandler.handle_request

    async def answer_or_explain(handler: Any, body: dict, request_id: str) -> Any:
        try:
            return await answer(handler, body, request_id)
        except (TemplateError, ValueError) as error:  # an unknown camera, one that comes twice, a budget beyond all
            LOG.warning("request %s is answered by 400: %s", request_id, error, exc_info=error)
            raise HTTPException(status_code=400, detail=str(error)) from error

    ChatCompletionHandler.handle_request = answer_or_explain
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
