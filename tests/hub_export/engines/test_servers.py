import asyncio
import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest
from exported import save_checkpoint
from tiny import CAMERAS, scene

from hub_export.engines import transformers_server, vllm
from hub_export.engines.gate import Gate
from hub_export.engines.transformers_server import (
    TransformersServerArguments,
    guard,
    with_cameras,
    with_pictures,
)
from hub_export.engines.vllm import VllmArguments, plugin_folder, vllm_command
from smoldriver_hf import SmolDriverForConditionalGeneration, SmolDriverProcessor

ROOT = Path(__file__).resolve().parents[3]
QUESTION = "Is there a car behind the ego car?"


def data_url(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def message(images, named=True):
    parts = [
        {"type": "image_url", "image_url": {"url": data_url(image)}, **({"camera": camera} if named else {})}
        for camera, image in images.items()
    ]
    return {"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}


def ask(port, model, images, named=True, **options):
    body = {"model": model, "messages": [message(images, named)], "max_tokens": 6, "temperature": 0, **options}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)["choices"][0]["message"]["content"]


def refusal(port, model, images, **options):
    """What a server says to a request that it cannot answer."""
    with pytest.raises(urllib.error.HTTPError) as raised:
        ask(port, model, images, **options)
    assert raised.value.code == 400
    error = json.load(raised.value)["error"]
    assert error["type"] == "invalid_request_error"
    return error["message"]


def wait_for(port, process, path="health"):
    while process.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=5)
            return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"the server ended with {process.returncode}")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def expected(folder, images, num_queries=None):
    """What `generate` answers, with the images in the order of the prompt."""
    model = SmolDriverForConditionalGeneration.from_pretrained(folder).eval()
    processor = SmolDriverProcessor.from_pretrained(folder)
    prompt = processor.prompt(QUESTION, list(images))
    budget = {} if num_queries is None else {"num_queries": num_queries}
    inputs = processor(images=list(images.values()), text=prompt, return_tensors="pt", **budget)
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(output, skip_special_tokens=True)


def scenes():
    """Requests that a cache by content, or a guess by position, would answer wrongly."""
    whole = scene(3)
    one = next(iter(whole.values()))
    return {
        "whole": whole,
        "reordered": dict(reversed(whole.items())),
        "swapped": {**whole, "CAM_FRONT": whole["CAM_BACK"], "CAM_BACK": whole["CAM_FRONT"]},
        "partly cached": {**scene(4), "CAM_FRONT": whole["CAM_FRONT"], "CAM_BACK_RIGHT": whole["CAM_BACK_RIGHT"]},
        "identical": dict.fromkeys(CAMERAS, one),
        "two cameras": {camera: whole[camera] for camera in ("CAM_BACK", "CAM_FRONT_LEFT")},
    }


def test_the_answers_that_servers_are_compared_with_differ(tmp_path):
    folder = str(save_checkpoint(tmp_path / "smoldriver"))
    answers = [expected(folder, images, budget) for images in scenes().values() for budget in (None, 2)]
    assert len(set(answers)) == len(answers) and all(map(str.isalnum, answers))


@pytest.mark.slow
def test_transformers_own_server_answers_as_generate_does(tmp_path):
    pytest.importorskip("openai")
    folder = str(save_checkpoint(tmp_path / "smoldriver"))
    port = free_port()
    command = [sys.executable, "-m", "hub_export", "serve", "transformers", folder, "--port", str(port)]
    server = subprocess.Popen([*command, "--device", "cpu"], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        wait_for(port, server)
        for name, images in scenes().items():
            assert ask(port, folder, images) == expected(folder, images), name
        assert ask(port, folder, scene(3), named=False) == expected(folder, scene(3))
        budget = {"chat_template_kwargs": {"processor_kwargs": {"num_queries": 2}}}
        assert ask(port, folder, scene(3), **budget) == expected(folder, scene(3), num_queries=2)
        assert "unknown camera CAM_TOP; this model knows" in refusal(port, folder, {"CAM_TOP": scene()["CAM_FRONT"]})
        too_many = {"chat_template_kwargs": {"processor_kwargs": {"num_queries": 99}}}
        assert "num_queries" in refusal(port, folder, scene(3), **too_many)
        assert "logprobs is not supported" in refusal(port, folder, scene(3), logprobs=True)
        assert "Server is pinned" in refusal(port, "another/model", scene(3))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as response:
            assert [model["id"] for model in json.load(response)["data"]] == [folder]
        for body in (b'{"model": "a/b"}', b"{}"):
            with pytest.raises(urllib.error.HTTPError) as closed:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/load_model", body)
            assert closed.value.code == 404
        scene(3)["CAM_FRONT"].save(tmp_path / "there.png")
        for name in ("there", "gone"):
            part = {"type": "image_url", "image_url": {"url": str(tmp_path / f"{name}.png")}}
            request = {"model": folder, "messages": [{"role": "user", "content": [part]}]}
            body = json.dumps(request).encode()
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/chat/completions", body)
            assert "an image must be a data:image" in json.load(refused.value)["error"]["message"]
    finally:
        server.terminate()
        server.wait(timeout=60)


def call(app, path, body=b"", method="POST"):
    """(status, content) of an ASGI app; the body comes in pieces."""
    pieces = [body[start : start + 100] for start in range(0, len(body), 100)] or [b""]
    given = iter([{"body": piece, "more_body": number + 1 < len(pieces)} for number, piece in enumerate(pieces)])
    sent = []

    async def receive():
        return {"type": "http.request", **next(given)}

    async def send(message):
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": method, "path": path, "headers": headers, "query_string": b"", "asgi": {}}
    with suppress(KeyError):  # told to the log as well
        asyncio.run(
            app({**scope, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2), "scheme": "http"}, receive, send)
        )
    content = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"], json.loads(content)


@pytest.fixture
def app():
    fastapi = pytest.importorskip("fastapi")
    app = fastapi.FastAPI()

    @app.post("/v1/chat/completions")
    async def chat(body: dict):
        if body["kind"] == "unknown":
            raise fastapi.HTTPException(status_code=422, detail="Unexpected fields")
        if body["kind"] == "wrong":
            raise ValueError('a camera "CAM_TOP" is unknown')
        return {"length": len(body["text"])}

    for path in ("/load_model", "/reset", "/v1/audio/transcriptions"):
        app.post(path)(lambda: {"done": True})
    return guard(app, most_bytes=1000)


def test_errors_have_the_one_form_that_clients_read(app):
    def error(path, **body):
        status, content = call(app, path, json.dumps(body).encode())
        assert set(content) == {"error"} and set(content["error"]) == {"message", "type", "param", "code"}
        return status, content["error"]["message"], content["error"]["type"]

    path = "/v1/chat/completions"
    assert call(app, path, b'{"kind": "fine", "text": "abc"}') == (200, {"length": 3})
    assert error(path, kind="wrong") == (400, 'a camera "CAM_TOP" is unknown', "invalid_request_error")
    assert error(path, kind="unknown") == (422, "Unexpected fields", "invalid_request_error")
    assert error(path, kind="fine")[::2] == (500, "server_error")
    assert "secret" not in error(path, secret=1)[1]
    assert error("/v1/nothing")[0] == 404
    assert call(app, path, b"[1]")[0] == call(app, path, b"{")[0] == 400


def test_what_loads_or_drops_models_is_closed(app):
    for path in ("/load_model", "/reset", "/v1/audio/transcriptions"):
        assert call(app, path)[0] == 404


def test_a_long_request_is_refused_before_it_is_read(app):
    path = "/v1/chat/completions"
    assert call(app, path, json.dumps({"kind": "fine", "text": "a" * 900}).encode()) == (200, {"length": 900})
    status, content = call(app, path, json.dumps({"kind": "fine", "text": "a" * 100_000}).encode())
    assert status == 413 and content["error"]["message"] == "a request may have 1000 bytes"


def test_the_server_is_handed_pictures_and_no_urls(tmp_path):
    gate = Gate((), most_images=6, most_bytes=1000)
    parsed = [{"role": "system", "content": "Be brief."}]
    parsed += [{"role": "user", "content": [{"type": "image", "url": data_url(scene()["CAM_BACK"])}]}]
    (part,) = with_pictures(parsed, gate)[1]["content"]
    assert part.keys() == {"type", "image"} and part["image"].size == scene()["CAM_BACK"].size
    with pytest.raises(ValueError, match="must be a data:image"):
        with_pictures([{"role": "user", "content": [{"type": "image", "url": str(tmp_path)}]}], gate)


def test_vllm_fetches_from_allowed_hosts_only(tmp_path):
    folder = str(save_checkpoint(tmp_path / "smoldriver"))
    for hosts, told in (([], ["none.invalid"]), (["a.example", "b.example"], ["a.example", "b.example"])):
        command = vllm_command(VllmArguments(folder, allow_urls=hosts))
        place = command.index("--allowed-media-domains")
        assert command[place + 1 : place + 1 + len(told)] == told and "--allowed-local-media-path" not in command


def test_cameras_survive_the_servers_parsing():
    images = {"CAM_BACK": scene()["CAM_BACK"], "CAM_FRONT": scene()["CAM_FRONT"]}
    asked = [{"role": "system", "content": "Be brief."}, message(images)]
    parsed = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": QUESTION}]},
    ]
    content = with_cameras(asked, parsed)[1]["content"]
    assert [part.get("camera") for part in content] == ["CAM_BACK", "CAM_FRONT", None]
    assert "camera" not in with_cameras([message(images, named=False)], [{"content": [{"type": "image"}] * 2}])[0]


def test_the_plugin_is_found_as_an_entry_point(tmp_path):
    folder = plugin_folder(tmp_path)
    (entry,) = PathDistribution(folder / "smoldriver_vllm-0.1.0.dist-info").entry_points
    assert (entry.group, entry.value) == ("vllm.general_plugins", "vllm_plugin:register")
    assert (folder / "vllm_plugin.py").is_file()


def test_vllm_is_told_the_budget_and_the_number_of_cameras(tmp_path):
    folder = str(save_checkpoint(tmp_path / "smoldriver"))
    command = vllm_command(VllmArguments(folder, num_queries=2))
    assert command[command.index("--limit-mm-per-prompt") + 1] == '{"image": 6}'
    assert command[command.index("--mm-processor-kwargs") + 1] == '{"num_queries": 2}'
    assert command[command.index("--hf-overrides") + 1] == '{"num_queries": 2}'


def test_an_engine_that_is_missing_is_a_clear_error(tmp_path):
    empty = tmp_path / "python"
    empty.write_text("#!/bin/sh\nexit 1\n")
    empty.chmod(0o755)
    with pytest.raises(ValueError, match="has no vLLM"):
        vllm.main(VllmArguments(str(tmp_path), python=str(empty)))


def test_a_stopped_server_takes_vllm_with_it(tmp_path):
    folder = save_checkpoint(tmp_path / "smoldriver")
    engine = tmp_path / "python"
    engine.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit 0\necho $$ > "{tmp_path}/pid"\nexec sleep 600\n')
    engine.chmod(0o755)
    command = [sys.executable, "-m", "hub_export", "serve", "vllm", str(folder), "--python", str(engine)]
    server = subprocess.Popen(command, cwd=ROOT)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
        assert server.poll() is None
        time.sleep(0.1)
    server.terminate()
    assert server.wait(timeout=60) == 0
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.slow
@pytest.mark.skipif("SMOLDRIVER_VLLM_PYTHON" not in os.environ, reason="needs an environment with vLLM")
@pytest.mark.parametrize("num_queries", [None, 2])
def test_vllm_answers_as_generate_does_in_any_order_and_out_of_its_cache(tmp_path, num_queries):
    folder = str(save_checkpoint(tmp_path / "smoldriver"))
    port = free_port()
    command = [sys.executable, "-m", "hub_export", "serve", "vllm", folder, "--port", str(port), "--dtype", "float32"]
    command += ["--python", os.environ["SMOLDRIVER_VLLM_PYTHON"]]
    command += [] if num_queries is None else ["--num_queries", str(num_queries)]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        wait_for(port, server)
        for _ in range(2):  # the second time everything is in the cache
            for name, images in scenes().items():
                assert ask(port, folder, images) == expected(folder, images, num_queries), name
        assert ask(port, folder, scene(3), named=False) == expected(folder, scene(3), num_queries)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=60)


def test_a_package_that_the_server_lacks_is_named(monkeypatch):
    monkeypatch.setattr(transformers_server, "find_spec", lambda name: None if name == "openai" else object())
    with pytest.raises(ValueError, match="needs openai: pip install openai"):
        transformers_server.main(TransformersServerArguments("anywhere"))
