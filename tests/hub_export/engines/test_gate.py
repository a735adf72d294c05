"""What clients may send: nothing opens the server's disk or its network, and nothing is answered other than asked."""

import base64
import io
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from PIL import Image
from tiny import picture

from hub_export.engines.gate import Gate

GATE = Gate((), most_images=2, most_bytes=100_000, most_pixels=1000)
WEB = Gate(("pictures.example",), most_images=2, most_bytes=2000, most_pixels=1000)


def url_of(image, kind="PNG", head="data:image/png;base64,"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return head + base64.b64encode(buffer.getvalue()).decode()


SMALL = url_of(Image.new("RGB", (20, 10), "red"))
TEXT = {"type": "text", "text": "What is ahead?"}


def image(url=SMALL):
    return {"type": "image_url", "camera": "CAM_FRONT", "image_url": {"url": url}}


def body(*parts, **more):
    return {"messages": [{"role": "user", "content": list(parts)}], **more}


def test_a_data_url_is_a_picture():
    assert GATE.picture(SMALL).getpixel((0, 0)) == (255, 0, 0)
    GATE.check(body(image(), TEXT))


@pytest.mark.parametrize("exists", [True, False])
def test_no_file_is_opened_and_none_is_told_from_a_missing_one(tmp_path, exists):
    file = tmp_path / "secret.png"
    if exists:
        picture(1).save(file)
    told = set()
    for url in (
        str(file),
        f"file://{file}",
        f"FILE://{file}",
        f"data:image/png;base64,/..{file}",
        f"/proc/self{file}",
    ):
        with pytest.raises(ValueError, match=r"an image must be a data:image|is no base64|holds no picture") as error:
            GATE.picture(url)
        told.add(str(error.value).replace(str(tmp_path)[:40], "").split("; got")[0])
    assert not any("exist" in text for text in told)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1/a.png", "must be a data:image"),
        ("https://pictures.example/a.png", "got host 'pictures.example'"),
        ("data:image/png,abc", "must be in base64"),
        ("data:image/png;base64,###", "is no base64"),
        ("data:image/png;base64,AAAA", "holds no picture of the formats"),
        ("data:text/html;base64,AAAA", "must be a data:image"),
        (url_of(Image.new("RGB", (200, 100))), "may have 1000 pixels.*200 x 100"),
        (SMALL[:-40], "holds (a broken|no) picture|is no base64"),
        (url_of(Image.new("RGB", (9, 9)), "PDF"), "holds no picture"),
        (None, "must be a string; got NoneType"),
        ({"url": SMALL}, "must be a string; got dict"),
    ],
)
def test_other_pictures_are_refused(url, message):
    with pytest.raises(ValueError, match=message):
        GATE.picture(url)


@pytest.mark.parametrize(
    ("request_body", "message"),
    [
        ({}, "messages must be a list"),
        ({"messages": "Hello"}, "messages must be a list"),
        ({"messages": [{"content": "Hello"}]}, "needs a role"),
        ({"messages": [{"role": "user", "content": 7}]}, "a text or a list of parts"),
        (
            body({"type": "video_url", "video_url": {"url": "/a.mp4"}}),
            "must be text or image_url; got type 'video_url'",
        ),
        (body({"type": "image", "url": "/etc/hostname"}), "got type 'image'"),
        (body({"type": "image", "path": "/etc/hostname"}), "got type 'image'"),
        (body({"type": "image_url"}), "needs image_url"),
        (body({"type": "text"}), "needs text"),
        (body(image(), image(), image()), "may have 2 images, one for each camera; it has 3"),
        (body(TEXT, logprobs=True), "logprobs is not supported"),
        (body(TEXT, top_logprobs=3), "top_logprobs is not supported"),
        (body(TEXT, n=2), "n is not supported; got 2"),
        (body(TEXT, response_format={"type": "json_object"}), "response_format is not supported"),
        (body(TEXT, chat_template_kwargs={"chat_template": "{{ 1 }}"}), "chat_template_kwargs may hold"),
        (
            body(TEXT, chat_template_kwargs={"processor_kwargs": {"images": ["/a.png"]}}),
            "chat_template_kwargs may hold",
        ),
        (body(TEXT, chat_template_kwargs=[1]), "chat_template_kwargs may hold"),
    ],
)
def test_requests_that_would_be_answered_otherwise_are_refused(request_body, message):
    with pytest.raises(ValueError, match=message):
        GATE.check(request_body)


def test_images_of_all_messages_count():
    request = body(image(), image())
    GATE.check(request)
    request["messages"].append({"role": "user", "content": [image()]})
    with pytest.raises(ValueError, match="it has 3"):
        GATE.check(request)


def test_what_changes_nothing_is_let_through():
    GATE.check(
        body(TEXT, logprobs=False, n=1, response_format={"type": "text"}, presence_penalty=0, top_logprobs=None)
    )
    GATE.check(body(TEXT, chat_template_kwargs={"processor_kwargs": {"num_queries": 2}}))
    GATE.check({"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello."}]})


@pytest.fixture
def web(monkeypatch):
    """A host `pictures.example` with a public address; behind it, a server of this machine."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", "http://127.0.0.1/secret")
                self.end_headers()
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"x" * 5000 if self.path == "/long" else base64.b64decode(SMALL.partition(",")[2]))

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    addresses = ["93.184.216.34"]
    connect, resolve = socket.create_connection, socket.getaddrinfo

    def found(host, *given, **options):
        if host != "pictures.example":
            return resolve(host, *given, **options)
        return [(0, 0, 0, "", (address, 80)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", found)
    monkeypatch.setattr(
        "hub_export.engines.gate.socket.create_connection",
        lambda address, timeout: connect(server.server_address, timeout) if address[0] in addresses else 1 / 0,
    )
    yield addresses
    server.shutdown()
    server.server_close()


def test_an_allowed_host_is_asked(web):
    assert WEB.picture("http://pictures.example/a.png?size=2").size == (20, 10)
    assert WEB.picture("http://PICTURES.example/a.png").size == (20, 10)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://elsewhere.example/a.png", "or come from pictures.example; got host 'elsewhere.example'"),
        ("http://pictures.example@elsewhere.example/a.png", "got host 'elsewhere.example'"),
        ("http://pictures.example.elsewhere.example/", "got host"),
        ("http://pictures.example/moved", "cannot be fetched: status 302"),
        ("http://pictures.example/long", "over 2000 bytes"),
        ("ftp://pictures.example/a.png", "must be a data:image"),
    ],
)
def test_nothing_else_is_asked(web, url, message):
    with pytest.raises(ValueError, match=message):
        WEB.picture(url)


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "::1", "fe80::1%eth0", "::ffff:127.0.0.1"]
)
def test_an_allowed_host_with_a_private_address_is_not(web, address):
    web.append(address)
    with pytest.raises(ValueError, match="pictures.example has a private address"):
        WEB.picture("http://pictures.example/a.png")
