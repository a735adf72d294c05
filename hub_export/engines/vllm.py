"""Serve an exported folder with vLLM's own OpenAI-compatible server, on the model's remote code.

    python -m hub_export serve vllm outputs/smoldriver --port 8000 --python vllm-env/bin/python

Requests look as in `transformers_server.py`, and pictures come from where they may there; that an allowed host has no
private address, vLLM does not check. vLLM pins other versions than training does: `--python` names the
interpreter of its own environment. There a plugin (`vllm_plugin.py`) makes the camera a part of an image's identity:
vLLM's cache knows images by their content and would hand one camera's visual tokens to another.
"""

import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from hub_export.engines.server import ServerArguments

NO_HOST = "none.invalid"  # a name that no host can have: without any vLLM fetches from everywhere
PLUGIN = Path(__file__).with_name("vllm_plugin.py")


@dataclass
class VllmArguments(ServerArguments):
    num_queries: int | None = field(default=None, metadata={"help": "Budget per camera.", "aliases": ["--budget"]})
    python: str = field(default=sys.executable, metadata={"help": "Interpreter that has vLLM."})


def plugin_folder(parent: Path) -> Path:
    """A folder that, on PYTHONPATH, is a distribution with an entry point in `vllm.general_plugins`."""
    (parent / PLUGIN.name).write_bytes(PLUGIN.read_bytes())
    metadata = parent / "smoldriver_vllm-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: smoldriver-vllm\nVersion: 0.1.0\n")
    (metadata / "entry_points.txt").write_text("[vllm.general_plugins]\nsmoldriver = vllm_plugin:register\n")
    return parent


def vllm_command(args: VllmArguments) -> list[str]:
    """vLLM's own server on the model's remote code, at most one image per camera."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(args.folder, trust_remote_code=True)
    command = [args.python, "-m", "vllm.entrypoints.openai.api_server", "--model", args.folder]
    command += ["--trust-remote-code", "--model-impl", "transformers", "--dtype", args.dtype]
    command += ["--limit-mm-per-prompt", f'{{"image": {len(config.cameras)}}}']
    command += ["--host", args.host, "--port", str(args.port)]
    command += ["--allowed-media-domains", *(args.allow_urls or [NO_HOST])]  # of its own disk it opens nothing
    if args.num_queries is not None:
        command += ["--hf-overrides", f'{{"num_queries": {args.num_queries}}}']
        command += ["--mm-processor-kwargs", f'{{"num_queries": {args.num_queries}}}']
    return command


def main(args: VllmArguments) -> None:
    """Serve until interrupted.

    Raises:
        ValueError: vLLM is not where `--python` points, or it failed.
    """
    if subprocess.run([args.python, "-c", "import vllm"], capture_output=True).returncode:
        raise ValueError(
            f"{args.python} has no vLLM: install it into an environment of its own and name it (--python)"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = os.pathsep.join([str(plugin_folder(Path(folder))), os.environ.get("PYTHONPATH", "")])
        limits = {"VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0"}  # an allowed host could lead anywhere
        server = subprocess.Popen(vllm_command(args), env={**os.environ, **limits, "PYTHONPATH": path})
        signal.signal(signal.SIGTERM, lambda *_: server.terminate())  # or it would go on without us
        with suppress(KeyboardInterrupt):  # it got the same signal from the terminal
            server.wait()
        status = server.wait()
    if status not in (0, 128 + signal.SIGTERM, -signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGINT):
        raise ValueError(f"vLLM ended with exit status {status}; its own output is above")
