"""Serve an exported folder with an OpenAI-compatible API.

    python -m hub_export serve transformers outputs/smoldriver --port 8000
    python -m hub_export serve vllm outputs/smoldriver --port 8000

The request names each image's camera beside its URL; images without a name are taken in the model's camera order:

    {"model": "outputs/smoldriver", "max_tokens": 64, "messages": [{"role": "user", "content": [
        {"type": "image_url", "camera": "CAM_BACK", "image_url": {"url": "data:image/jpeg;base64,..."}},
        {"type": "text", "text": "Is there a car behind the ego car?"}]}]}

`transformers` needs the extra `serve` (fastapi, openai, uvicorn) and serves with transformers' own server (5.23). A
request for another budget adds `"chat_template_kwargs": {"processor_kwargs": {"num_queries": 16}}`.

`vllm` needs an environment with vLLM, which pins other versions than training does: name its interpreter with
`--python`. There a plugin (`vllm_plugin.py`) makes the camera a part of an image's identity: vLLM's cache knows images
by their content and would hand one camera's visual tokens to another.
"""

import logging
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

LOG = logging.getLogger(__name__)
ENGINES = ("transformers", "vllm")
PLUGIN = Path(__file__).with_name("vllm_plugin.py")


@dataclass
class ServeArguments:
    engine: str = field(metadata={"help": "transformers or vllm."})
    folder: str = field(metadata={"help": "Exported folder or Hub repository."})
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on."})
    port: int = field(default=8000, metadata={"help": "Port to listen on."})
    device: str = field(default="auto", metadata={"help": "transformers only: cpu, cuda:0, …"})
    dtype: str = field(default="auto", metadata={"help": "float32, bfloat16, or auto: as the weights are."})
    num_queries: int | None = field(default=None, metadata={"help": "vllm only: budget per camera of all requests."})
    python: str = field(default=sys.executable, metadata={"help": "vllm only: interpreter that has vLLM."})


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


def serve_with_transformers(args: ServeArguments, non_blocking: bool = False) -> Any:
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
    return Serve(
        force_model=args.folder,
        trust_remote_code=True,
        device=args.device,
        dtype=args.dtype,
        host=args.host,
        port=args.port,
        non_blocking=non_blocking,
    )


def plugin_folder(parent: Path) -> Path:
    """A folder that, on PYTHONPATH, is a distribution with an entry point in `vllm.general_plugins`."""
    (parent / PLUGIN.name).write_bytes(PLUGIN.read_bytes())
    metadata = parent / "smoldriver_vllm-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: smoldriver-vllm\nVersion: 0.1.0\n")
    (metadata / "entry_points.txt").write_text("[vllm.general_plugins]\nsmoldriver = vllm_plugin:register\n")
    return parent


def vllm_command(args: ServeArguments) -> list[str]:
    """vLLM's own server on the model's remote code, at most one image per camera."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(args.folder, trust_remote_code=True)
    command = [args.python, "-m", "vllm.entrypoints.openai.api_server", "--model", args.folder]
    command += ["--trust-remote-code", "--model-impl", "transformers", "--dtype", args.dtype]
    command += ["--limit-mm-per-prompt", f'{{"image": {len(config.cameras)}}}']
    command += ["--host", args.host, "--port", str(args.port)]
    if args.num_queries is not None:
        command += ["--hf-overrides", f'{{"num_queries": {args.num_queries}}}']
        command += ["--mm-processor-kwargs", f'{{"num_queries": {args.num_queries}}}']
    return command


def main(args: ServeArguments) -> None:
    """Serve until interrupted.

    Raises:
        ValueError: an unknown engine, a package of the extra `serve` is missing, vLLM is not where `--python` points,
            or it failed.
    """
    if args.engine not in ENGINES:
        raise ValueError(f"engine must be one of {ENGINES}; got {args.engine!r}")
    if args.engine == "transformers":
        missing = [name for name in ("fastapi", "openai", "uvicorn") if find_spec(name) is None]
        if missing:
            raise ValueError(f"transformers' server needs {', '.join(missing)}: pip install {' '.join(missing)}")
        serve_with_transformers(args)
        return
    if subprocess.run([args.python, "-c", "import vllm"], capture_output=True).returncode:
        raise ValueError(
            f"{args.python} has no vLLM: install it into an environment of its own and name it (--python)"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = os.pathsep.join([str(plugin_folder(Path(folder))), os.environ.get("PYTHONPATH", "")])
        server = subprocess.Popen(vllm_command(args), env={**os.environ, "PYTHONPATH": path})
        signal.signal(signal.SIGTERM, lambda *_: server.terminate())  # or it would go on without us
        try:
            status = server.wait()
        except KeyboardInterrupt:  # it got the same signal from the terminal
            status = server.wait()
    if status not in (0, 128 + signal.SIGTERM, -signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGINT):
        raise ValueError(f"vLLM ended with exit status {status}; its own output is above")
