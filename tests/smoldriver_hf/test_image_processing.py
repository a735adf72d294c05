"""Every kind of image becomes the same upright RGB picture; what is no image is refused with one clear error."""

import base64
import http.server
import io
import os
import struct
import threading
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import picture

from smoldriver_hf import SmolDriverImageProcessor
from smoldriver_hf.image_processing_smoldriver import MAX_PIXELS

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
RAW = {"do_resize": False, "do_rescale": False, "do_normalize": False}


def pixels(image, **options) -> np.ndarray:
    """(height, width, 3) uint8 as the processor decodes it."""
    output = SmolDriverImageProcessor()(image, **{**RAW, **options}, return_tensors="np")["pixel_values"]
    return output[0].transpose(1, 2, 0).astype(np.uint8)


def difference(first: np.ndarray, second: np.ndarray) -> int:
    return int(np.abs(first.astype(int) - second.astype(int)).max())


def test_values_are_rescaled_normalised_and_resized():
    processor = SmolDriverImageProcessor(size={"height": 20, "width": 30})
    image = picture()
    output = processor([image, image], return_tensors="pt")["pixel_values"]
    assert output.shape == (2, 3, 20, 30) and output.dtype == torch.float32
    resized = np.asarray(image.resize((30, 20), Image.Resampling.BICUBIC), dtype=np.float64) / 255
    expected = (resized - processor.image_mean) / processor.image_std
    np.testing.assert_allclose(output[0].numpy(), expected.transpose(2, 0, 1), atol=1e-5)


def test_rescale_and_normalise_can_be_left_out():
    image = np.full((4, 4, 3), 255, np.uint8)
    assert (SmolDriverImageProcessor()(image, **RAW, return_tensors="np")["pixel_values"] == 255).all()
    rescaled = SmolDriverImageProcessor()(image, do_resize=False, do_normalize=False, return_tensors="np")
    np.testing.assert_allclose(rescaled["pixel_values"], 1.0)


def test_settings_survive_save_and_load(tmp_path):
    processor = SmolDriverImageProcessor(size={"height": 20, "width": 30}, image_mean=[0.1, 0.2, 0.3])
    processor.save_pretrained(tmp_path)
    loaded = SmolDriverImageProcessor.from_pretrained(tmp_path)
    image = picture()
    assert torch.equal(
        loaded(image, return_tensors="pt")["pixel_values"], processor(image, return_tensors="pt")["pixel_values"]
    )


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "1", "P", "CMYK", "YCbCr", "HSV", "LA", "PA", "RGBX", "RGBa"])
def test_every_mode_looks_the_same(mode):
    image = picture(size=(24, 16))
    if mode == "RGBa":
        converted = image.convert("RGBA").convert(mode)
    elif mode == "PA":
        converted = image.convert("P").convert(mode)
    else:
        converted = image.convert(mode)
    assert converted.mode == mode
    back = {"LA": "L", "PA": "P", "RGBX": "RGB", "RGBa": "RGB"}.get(mode, mode)
    expected = np.asarray(image.convert(back).convert("RGB"))
    assert difference(pixels(converted), expected) == 0


def test_transparency_is_seen_over_white():
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (255, 0, 0, 255)
    rgba[1, 1] = (0, 0, 0, 128)
    for image in (Image.fromarray(rgba), rgba, rgba.transpose(2, 0, 1)):
        output = pixels(image)
        assert output[0, 0].tolist() == [255, 0, 0]
        assert output[0, 1].tolist() == [255, 255, 255]  # transparent: white, whatever colour lies beneath
        assert output[1, 1].tolist() == [127, 127, 127]
    grey = Image.fromarray(np.array([[0, 0], [0, 255]], np.uint8)).convert("LA")
    grey.putalpha(Image.fromarray(np.array([[255, 0], [255, 255]], np.uint8)))
    assert pixels(grey)[..., 0].tolist() == [[0, 255], [0, 255]]


def test_transparent_palettes(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "palette.png", transparency=1)
    assert pixels(tmp_path / "palette.png").tolist() == [[[255, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bits_are_scaled_not_clipped(mode, tmp_path):
    values = np.array([[0, 256, 32768, 65535]], np.uint16)
    expected = [[0, 1, 128, 255]]
    dtype = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]
    image = Image.frombytes(mode, (4, 1), values.astype(dtype).tobytes())
    assert pixels(image)[..., 0].tolist() == expected
    assert pixels(values)[..., 0].tolist() == expected
    if mode == "I;16":
        image.save(tmp_path / "deep.png")
        assert pixels(tmp_path / "deep.png")[..., 0].tolist() == expected
        assert pixels(str(tmp_path / "deep.png"))[..., 2].tolist() == expected


def test_twelve_bits_in_sixteen_are_scaled_by_their_range(tmp_path):
    """As cars' cameras write them: by 16 bits they would be all but black."""
    values = np.array([[0, 16, 2048, 4095]], np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    for source in (tmp_path / "deep.png", Image.open(tmp_path / "deep.png"), values, torch.from_numpy(values)):
        assert pixels(source)[0, :, 0].tolist() == [0, 1, 128, 255]
    deeper = np.array([[0, 16, 2048, 4096]], np.uint16)  # one is above 12 bits
    assert pixels(deeper)[0, :, 0].tolist() == [0, 0, 8, 16]


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def address(tmp_path):
    """Of a server that gives the files of `tmp_path`."""
    handler = partial(QuietHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("mode", ["I;16", "RGBA", "LA", "L", "CMYK", "turned"])
def test_a_picture_behind_a_url_is_that_of_the_file(mode, tmp_path, address):
    name, options = "picture.tiff" if mode == "CMYK" else "picture.png", {}
    if mode == "I;16":
        image = Image.fromarray(np.linspace(0, 40000, 24 * 16).reshape(16, 24).astype(np.uint16))
    elif mode == "turned":
        image, exif = picture(size=(24, 16)), Image.Exif()
        exif[0x0112], options = 6, {"exif": exif}
    else:
        image = picture(size=(24, 16)).convert(mode)
        if mode in ("RGBA", "LA"):
            image.putalpha(60)
    image.save(tmp_path / name, **options)
    assert np.array_equal(pixels(f"{address}/{name}"), pixels(tmp_path / name))


def test_urls_without_a_picture_are_refused(tmp_path, address):
    (tmp_path / "page.html").write_text("<html>")
    for url in (f"{address}/page.html", f"{address}/nothing.png", "http://127.0.0.1:9/picture.png"):
        with pytest.raises(ValueError, match="image of type str"):
            pixels(url)


def test_arrays_and_tensors_of_any_layout():
    image = np.asarray(picture(size=(24, 16)))
    layouts = [
        image,
        image.transpose(2, 0, 1),
        np.ascontiguousarray(image.transpose(2, 0, 1)),
        image / 255,
        (image / 255).astype(np.float32),
        torch.from_numpy(image.copy()),
        torch.from_numpy(image.transpose(2, 0, 1) / 255),
    ]
    for layout in layouts:
        assert difference(pixels(layout), image) == 0
    low = [(image / 255).astype(np.float16), torch.from_numpy(image.transpose(2, 0, 1) / 255).bfloat16()]
    for layout in low:
        assert difference(pixels(layout), image) <= 1
    grey = image[..., 0]
    for layout in (grey, grey[..., None], grey[None], grey.astype(np.uint16) << 8, torch.from_numpy(grey.copy())):
        assert difference(pixels(layout), np.repeat(grey[..., None], 3, -1)) == 0


def test_batches_and_nested_lists_are_flattened():
    processor = SmolDriverImageProcessor(size={"height": 4, "width": 4})
    images = np.stack([np.asarray(picture(seed)) for seed in range(4)])
    batch = processor(images, return_tensors="pt")["pixel_values"]
    assert batch.shape == (4, 3, 4, 4)
    nested = processor([[images[0], images[1]], (images[2],), Image.fromarray(images[3])], return_tensors="pt")
    assert torch.equal(nested["pixel_values"], batch)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("source", ["path", "object"])
def test_exif_rotation_is_undone(orientation, source, tmp_path):
    upright = picture(size=(64, 32))
    stored = {  # how a camera held that way stores the upright picture: the inverse of what a viewer applies
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = upright if stored is None else upright.transpose(stored)
    image.save(tmp_path / "turned.png", exif=exif)
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95, subsampling=0)
    for name, tolerance in (("turned.png", 0), ("turned.jpg", 6)):
        file = tmp_path / name
        output = pixels(file if source == "path" else Image.open(file))
        assert output.shape == (32, 64, 3)
        assert difference(output, np.asarray(upright)) <= tolerance


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF", "MPO"])
def test_file_formats(format, tmp_path):
    image = picture(size=(64, 32))
    file = tmp_path / f"picture.{format.lower()}"
    if format == "MPO":  # two pictures in one JPEG file, as stereo cameras write: the first counts
        image.save(file, "MPO", save_all=True, append_images=[picture(1, (64, 32))], quality=95)
        assert Image.open(file).format == "MPO"
    else:
        image.save(file, format, **({"quality": 95} if format in ("JPEG", "WEBP") else {}))
    tolerance = {"PNG": 0, "BMP": 0, "TIFF": 0, "GIF": 64}.get(format, 16)
    assert difference(pixels(file), np.asarray(image)) <= tolerance
    resized = {"do_resize": True, "size": {"height": 8, "width": 8}}
    assert difference(pixels(file, **resized), pixels(image, **resized)) <= tolerance


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_jpegs_of_other_modes(mode, tmp_path):
    image = picture(size=(160, 96)).convert(mode)
    image.save(tmp_path / "picture.jpg", quality=95)
    expected = np.asarray(image.convert("RGB"))
    assert difference(pixels(tmp_path / "picture.jpg"), expected) <= 16
    small = {"do_resize": True, "size": {"height": 12, "width": 12}}
    assert difference(pixels(tmp_path / "picture.jpg", **small), pixels(image.convert("RGB"), **small)) <= 6


def test_base64_and_data_urls():
    image = picture(size=(24, 16)).convert("RGBA")
    image.putalpha(100)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    text = base64.b64encode(buffer.getvalue()).decode()
    for source in (text, f"data:image/png;base64,{text}"):
        assert difference(pixels(source), pixels(image)) == 0


def test_draft_decoding_stays_close_to_the_plain_path_on_smooth_pictures(tmp_path):
    options = {"do_resize": True, "size": {"height": 32, "width": 32}}
    for seed in range(4):
        picture(seed, (320, 180)).save(tmp_path / "large.jpg", quality=92)
        opened = Image.open(tmp_path / "large.jpg")
        opened.load()
        drafted, plain = pixels(tmp_path / "large.jpg", **options), pixels(opened, **options)
        distance = np.abs(drafted.astype(int) - plain.astype(int))
        assert distance.max() <= 4 and distance.mean() <= 0.5  # of 255; measured 2 and 0.2
    assert opened.size == (320, 180)


def test_draft_decoding_is_used_and_leaves_twice_the_wanted_size(tmp_path, monkeypatch):
    sizes = []
    original = Image.Image.resize

    def spy(self, size, *args, **kwargs):
        sizes.append(self.size)
        return original(self, size, *args, **kwargs)

    picture(0, (1600, 900)).save(tmp_path / "large.jpg")
    monkeypatch.setattr(Image.Image, "resize", spy)
    pixels(tmp_path / "large.jpg", do_resize=True, size={"height": 224, "width": 224})
    pixels(tmp_path / "large.jpg", do_resize=True, size={"height": 112, "width": 112})
    pixels(tmp_path / "large.jpg", do_resize=True, size={"height": 112, "width": 300})
    assert sizes == [(800, 450), (400, 225), (1600, 900)]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the optional real frames are not here")
def test_draft_decoding_stays_close_to_the_plain_path_on_real_frames():
    options = {"do_resize": True, "size": {"height": 224, "width": 224}}
    for file in sorted((SHARED / "drivelm" / "nuscenes" / "samples").glob("*/*.jpg"))[::9]:
        opened = Image.open(file)
        opened.load()
        distance = np.abs(pixels(file, **options).astype(int) - pixels(opened, **options).astype(int))
        assert distance.max() <= 16 and distance.mean() <= 0.5  # of 255; measured 9 and 0.2


def test_a_callers_own_picture_is_left_as_it_is(tmp_path):
    picture(0, (640, 360)).save(tmp_path / "large.jpg")
    opened = Image.open(tmp_path / "large.jpg")
    SmolDriverImageProcessor(size={"height": 16, "width": 16})(opened)
    assert opened.size == (640, 360)
    array = np.asarray(picture()).copy()
    kept = array.copy()
    SmolDriverImageProcessor()(array)
    assert np.array_equal(array, kept)


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims a huge size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(8001, 8000), (12_000, 12_000), (60_000, 60_000)])
def test_decompression_bombs_are_refused_before_decoding(width, height, tmp_path, monkeypatch):
    def never(self, *args):
        raise AssertionError("a bomb was decoded")

    bomb = png_header(width, height)
    file = tmp_path / "bomb.png"
    file.write_bytes(bomb)
    assert len(bomb) < 200 and width * height > MAX_PIXELS
    monkeypatch.setattr(Image.Image, "load", never)
    for source in (file, str(file), base64.b64encode(bomb).decode()):
        with pytest.raises(ValueError, match=f"expected (at most|1 to) {MAX_PIXELS} pixels"):
            pixels(source)


def test_the_largest_allowed_picture_is_allowed(tmp_path):
    Image.new("L", (8000, 8000)).save(tmp_path / "large.png")
    assert pixels(tmp_path / "large.png", do_resize=True, size={"height": 4, "width": 4}).shape == (4, 4, 3)


@pytest.mark.parametrize("keep", [0, 1, 20, 200, 0.5, 0.9])
def test_truncated_jpegs(keep, tmp_path):
    buffer = io.BytesIO()
    picture(0, (320, 180)).save(buffer, "JPEG")
    data = buffer.getvalue()
    file = tmp_path / "cut.jpg"
    file.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    for options in ({}, {"do_resize": True, "size": {"height": 16, "width": 16}}):
        with pytest.raises(ValueError, match="cut.jpg"):
            pixels(file, **options)


@pytest.mark.filterwarnings("ignore:::PIL")
def test_scrambled_files_raise_value_errors_only(tmp_path):
    """Bytes changed at random: a picture, or one ValueError, and nothing else."""
    random = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    refused = 0
    for format in ("JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP"):
        buffer = io.BytesIO()
        picture(0, (40, 24)).save(buffer, format, **({"exif": exif} if format in ("JPEG", "PNG", "WEBP") else {}))
        for _ in range(40):
            data = np.frombuffer(buffer.getvalue(), np.uint8).copy()
            places = random.integers(0, min(len(data), 200), 6)
            data[places] = random.integers(0, 256, 6)
            (tmp_path / "file").write_bytes(data.tobytes())
            try:
                assert pixels(tmp_path / "file", do_resize=True, size={"height": 8, "width": 8}).shape == (8, 8, 3)
            except ValueError:
                refused += 1
    assert refused > 20


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "type NoneType.*expected a path, URL, PIL image, NumPy array or torch tensor"),
        (3, "type int"),
        ({"path": "a.jpg"}, "type dict"),
        (b"\xff\xd8", "type bytes"),
        (Path("no_such_file.jpg"), "no_such_file.jpg.*No such file"),
        ("no_such_file.jpg", "'no_such_file.jpg' is no file, URL or base64 data"),
        ("", "is no file, URL or base64 data"),
        (".", "cannot be read as a camera image"),
        (__file__, "expected a picture in one of the formats BMP, GIF, JPEG, "),
        (Image.new("RGB", (0, 5)), "expected 1 to .* pixels, got 0x5"),
        (np.zeros((0, 4, 3), np.uint8), r"got \(0, 4, 3\)"),
        (np.zeros((5, 4, 2), np.uint8), r"got \(5, 4, 2\)"),
        (np.zeros(4, np.uint8), r"got \(4,\)"),
        (np.zeros((4, 4, 3), np.int64), "got int64"),
        (np.zeros((4, 4, 3), bool), "got bool"),
        (np.zeros((4, 4, 3), object), "got object"),
        (np.full((4, 4, 3), 255.0), r"floats in \[0, 1\]; got values from 255.0 to 255.0"),
        (np.full((4, 4, 3), -0.1), r"floats in \[0, 1\]"),
        (np.full((4, 4, 3), np.nan), r"floats in \[0, 1\]"),
        (torch.zeros(4, 4, 3, dtype=torch.int32), "got int32"),
        (Image.new("F", (4, 4)), "floating-point pictures have no agreed range"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_image_is_refused(image, message):
    with pytest.raises(ValueError, match=message):
        pixels(image)


def test_no_image_and_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match="at least one image"):
        pixels([])
    with pytest.raises(ValueError, match="one shape; got"):
        pixels([picture(0, (4, 4)), picture(0, (4, 5))])
    with pytest.raises(ValueError, match="height and width in pixels; got"):
        SmolDriverImageProcessor(size={"shortest_edge": 20})(picture())


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are counted the way Linux lists them")
def test_files_are_closed_even_if_they_are_broken(tmp_path):
    picture(0, (320, 180)).save(tmp_path / "file.jpg")
    data = (tmp_path / "file.jpg").read_bytes()
    (tmp_path / "file.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="file.jpg") as error:  # the error keeps what was opened alive
        pixels(tmp_path / "file.jpg")
    opened = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists()]
    assert error is not None and str(tmp_path / "file.jpg") not in opened
