"""One camera image → pixel_values, with PIL and NumPy only (torchvision is not needed)."""

import base64
import io
import os
import urllib.request
from contextlib import ExitStack
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    PILImageResampling,
    SizeDict,
)
from transformers.utils import TensorType, is_torch_tensor

MAX_PIXELS = 64_000_000  # forty times a nuScenes frame; more is taken for a decompression bomb
MAX_BYTES = 256_000_000  # of what a URL gives
URL_SECONDS = 30
# PIL reads more, but shows black for some cut JPEG 2000 files, and starts a PostScript interpreter for EPS.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # an MPO is read as a JPEG
DRAFT_FACTOR = 2  # JPEGs are decoded at 1/2, 1/4 or 1/8 scale as long as twice the wanted size is left


class SmolDriverImageProcessor(PilBackend):
    """Decodes, upright and in RGB, resizes once and normalises camera images.

    Takes paths, URLs, base64, PIL images, NumPy arrays and torch tensors: uint8, uint16 or floats in [0, 1].
    Greyscale, RGBA (over white), CMYK and palette images are converted; EXIF rotation is applied. 16-bit pictures with
    no pixel above 4095 are taken for 12-bit ones, as cars' cameras make them. JPEG files given as paths are decoded at
    a reduced scale where that leaves at least twice the wanted size; on nuScenes frames the result differs from full
    decoding by 0.2 of 255 on average, and by 9 at most.
    """

    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"height": 224, "width": 224}
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    model_input_names = ["pixel_values"]

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> list:
        """Flatten nested lists; files stay unopened until their size is wanted."""
        if isinstance(images, list | tuple):
            return [image for item in images for image in self._prepare_images_structure(item)]
        if isinstance(images, np.ndarray) or is_torch_tensor(images):
            return list(images) if images.ndim == 4 else [images]
        return [images]

    def process_image(
        self, image: Any, size: SizeDict | None = None, do_resize: bool = True, resample: Any = None, **kwargs
    ) -> np.ndarray:
        """One image of any accepted kind → (3, height, width) uint8.

        Raises:
            ValueError: not an image, broken or truncated data, no pixels, too many, or a URL that gives none.
        """
        target = (size.width, size.height) if do_resize and size is not None else None
        is_file = isinstance(image, os.PathLike) or (isinstance(image, str) and os.path.exists(image))
        where = f"image {os.fspath(image)!r}" if is_file else f"image of type {type(image).__name__}"
        try:
            # Opening a pipe would wait for somebody to write into it.
            if is_file and os.path.exists(image) and not os.path.isfile(image):
                raise ValueError("expected a file")
            with ExitStack() as files:
                picture = files.enter_context(Image.open(image, formats=FORMATS)) if is_file else _as_picture(image)
                if min(picture.size) < 1 or picture.width * picture.height > MAX_PIXELS:
                    raise ValueError(f"expected 1 to {MAX_PIXELS} pixels, got {picture.width}x{picture.height}")
                if is_file and target:  # never on a caller's own object: draft() changes it
                    picture.draft(None, (DRAFT_FACTOR * max(target), DRAFT_FACTOR * max(target)))
                rgb = _to_rgb(ImageOps.exif_transpose(picture))
        except UnidentifiedImageError as error:
            raise ValueError(f"{where}: expected a picture in one of the formats {', '.join(FORMATS)}") from error
        except Image.DecompressionBombError as error:
            raise ValueError(f"{where}: expected at most {MAX_PIXELS} pixels: {error}") from error
        except Exception as error:  # broken files and dead URLs make PIL's parsers and httpx raise almost anything
            raise ValueError(f"{where}: cannot be read as a camera image: {error or type(error).__name__}") from error
        if target and rgb.size != target:
            rgb = rgb.resize(target, resample=resample)
        return np.asarray(rgb).transpose(2, 0, 1)  # (3, height, width)

    def _standardize_kwargs(self, **kwargs) -> dict:
        given = kwargs.get("size")
        if isinstance(given, list | tuple) and len(given) != 2:
            raise ValueError(f"size must give height and width in pixels; got {given}")
        kwargs = super()._standardize_kwargs(**kwargs)
        size = kwargs["size"]
        if kwargs.get("do_resize") and size is not None:
            if not (size.height and size.width):
                raise ValueError(f"size must give height and width in pixels; got {dict(size)}")
            if min(size.height, size.width) < 1 or size.height * size.width > MAX_PIXELS:
                raise ValueError(f"size must be 1 to {MAX_PIXELS} pixels; got {size.width}x{size.height}")
        return kwargs

    def _preprocess(
        self,
        images: list[np.ndarray],
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: tuple[float, ...],
        image_std: tuple[float, ...],
        return_tensors: str | TensorType | None,
        **kwargs,
    ) -> BatchFeature:
        """Rescale and normalise in one pass: pixel · scale + shift."""
        if not images:
            raise ValueError("expected at least one image, got none")
        shapes = {image.shape for image in images}
        if len(shapes) > 1:
            raise ValueError(f"without do_resize all images must have one shape; got {sorted(shapes)}")
        scale = np.full((3, 1, 1), rescale_factor if do_rescale else 1.0, dtype=np.float32)
        shift = np.zeros((3, 1, 1), dtype=np.float32)
        if do_normalize:
            mean = np.asarray(image_mean, dtype=np.float32).reshape(-1, 1, 1)
            std = np.asarray(image_std, dtype=np.float32).reshape(-1, 1, 1)
            if not {len(mean), len(std)} <= {1, 3} or not np.isfinite([*mean, *std]).all() or std.min() <= 0:
                raise ValueError(
                    "image_mean and image_std must be one number or three, the latter above zero; "
                    f"got {image_mean} and {image_std}"
                )
            shift = -mean / std
            scale = scale / std
        pixel_values = np.stack(images).astype(np.float32)  # (images, 3, height, width)
        pixel_values *= scale
        pixel_values += shift
        return BatchFeature(data={"pixel_values": pixel_values}, tensor_type=return_tensors)


def _as_picture(image: Any) -> Image.Image:
    """A PIL image from what is in memory, or behind a URL or in base64."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, str):
        if image.startswith(("http://", "https://")):  # not transformers' load_image: it clips 16 bits and drops alpha
            request = urllib.request.Request(image, headers={"User-Agent": "SmolDriver"})
            with urllib.request.urlopen(request, timeout=URL_SECONDS) as answer:
                return Image.open(io.BytesIO(answer.read(MAX_BYTES)), formats=FORMATS)
        data = image.partition(",")[2] if image.startswith("data:") else image
        try:
            return Image.open(io.BytesIO(base64.b64decode(data, validate=True)), formats=FORMATS)
        except (ValueError, UnidentifiedImageError) as error:
            raise ValueError(f"{image[:80]!r} is no file, URL or base64 data of a picture") from error
    if is_torch_tensor(image):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()  # NumPy has no bfloat16
    if not isinstance(image, np.ndarray):
        raise ValueError("expected a path, URL, PIL image, NumPy array or torch tensor")
    if image.ndim == 3 and image.shape[0] in (1, 3, 4) and image.shape[-1] not in (1, 3, 4):
        image = image.transpose(1, 2, 0)
    if image.ndim == 3 and image.shape[-1] == 1:
        image = image[..., 0]
    if image.size == 0 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[-1] in (3, 4))):
        raise ValueError(f"expected an array of (height, width[, 1, 3 or 4]) or channels first; got {image.shape}")
    if image.dtype == np.uint16:
        image = _eight_bits(image)
    elif np.issubdtype(image.dtype, np.floating):
        if not (np.isfinite(image).all() and image.min() >= 0 and image.max() <= 1):
            raise ValueError(f"expected floats in [0, 1]; got values from {image.min()} to {image.max()}")
        image = np.rint(image * 255)
    elif image.dtype != np.uint8:
        raise ValueError(f"expected uint8, uint16 or floats in [0, 1]; got {image.dtype}")
    return Image.fromarray(image.astype(np.uint8))


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
    """Pixels of 16 bits, or of 12 in 16, by their range: shown as 16 the latter would be all but black."""
    return pixels >> (4 if pixels.max() < 1 << 12 else 8)


def _to_rgb(picture: Image.Image) -> Image.Image:
    """Any PIL mode → RGB, so that the picture looks the same."""
    if picture.mode.startswith("I"):  # 16 bits a pixel; PIL's own conversion would clip, not scale
        pixels = np.asarray(picture).astype(np.int64).clip(0, 65535)
        return Image.fromarray(_eight_bits(pixels).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise ValueError("floating-point pictures have no agreed range; convert to 8 or 16 bits first")
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return picture.convert("RGB")


__all__ = ["SmolDriverImageProcessor"]
