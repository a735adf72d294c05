"""What weather, night, dirt and cables do to camera images, at severities 1 to 5.

Noise, JPEG and fog have the formulas and parameters of ImageNet-C (Hendrycks and Dietterich, "Benchmarking Neural
Network Robustness to Common Corruptions and Perturbations", 2019), fog with less open sky; night, rain, snow, motion
blur and lens dirt are written for driving cameras in the same five steps. Random fields are drawn at `FIELD_WIDTH` and
enlarged, so a severity means the same at 400 and at 1600 pixels. The packages for ImageNet-C (imagecorruptions) need
an old scikit-image and put a second OpenCV over the one that nuscenes-devkit installs.

All functions take and return RGB pictures of unchanged size and depend on their arguments only.
"""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

SEVERITIES = (1, 2, 3, 4, 5)
FIELD_WIDTH = 320

Pixels = NDArray[np.float32]  # (height, width, 3) or, for fields, (height, width), in [0, 1]

_NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)  # standard deviation
_JPEG = (25, 18, 15, 10, 7)  # quality
_FOG = ((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))  # density, smoothness
_NIGHT = ((0.65, 1.2, 0.01), (0.5, 1.4, 0.02), (0.36, 1.7, 0.03), (0.25, 2.0, 0.04), (0.17, 2.4, 0.05))
_BLUR = (0.02, 0.035, 0.05, 0.08, 0.12)  # way of a pixel during the exposure, as share of the width
_RAIN = ((0.005, 0.95), (0.010, 0.88), (0.018, 0.80), (0.028, 0.72), (0.042, 0.62))  # drops per pixel, brightness
_SNOW = ((0.003, 0.9), (0.006, 0.82), (0.010, 0.74), (0.016, 0.66), (0.024, 0.58))  # flakes per pixel, contrast
_DIRT = (0.05, 0.10, 0.18, 0.28, 0.40)  # share of the lens
_DIRT_COLOUR = np.array([0.20, 0.16, 0.11], dtype=np.float32)
_NIGHT_COLOUR = np.array([0.85, 0.92, 1.0], dtype=np.float32)


def corrupt_image(image: Image.Image, name: str, severity: int, seed: int) -> Image.Image:
    """A picture of any mode, as RGB, after one of `IMAGE_CORRUPTIONS` with severity 1 (mild) to 5.

    Raises:
        ValueError: unknown name or severity.
    """
    if name not in IMAGE_CORRUPTIONS:
        raise ValueError(f"unknown corruption {name!r}; known: {', '.join(IMAGE_CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise ValueError(f"a corruption's severity is 1 to 5; got {severity}")
    image = image.convert("RGB")
    if name == "jpeg":
        return _jpeg(image, severity)
    pixels = np.asarray(image, dtype=np.float32) / 255  # (height, width, 3)
    changed = _PIXEL_FUNCTIONS[name](pixels, severity, np.random.default_rng(seed))
    return Image.fromarray((changed.clip(0, 1) * 255).round().astype(np.uint8))


def _jpeg(image: Image.Image, severity: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=_JPEG[severity - 1])
    return Image.open(buffer).convert("RGB")


def _noise(pixels: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    return pixels + _grain(pixels, _NOISE[severity - 1], rng)


def _fog(pixels: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    density, smoothness = _FOG[severity - 1]
    # Fog has no holes: nowhere thinner than 0.4 of its thickest.
    cloud = 0.4 + 0.6 * _enlarged(_cloud(_field_shape(pixels), smoothness, rng), pixels)[..., None]
    brightest = pixels.max()
    return (pixels + density * cloud) * brightest / (brightest + density)


def _night(pixels: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    gain, gamma, noise = _NIGHT[severity - 1]
    return pixels**gamma * gain * _NIGHT_COLOUR + _grain(pixels, noise, rng)


def _motion_blur(pixels: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    length = 1 + 2 * max(1, round(_BLUR[severity - 1] * pixels.shape[1] / 2))  # odd, or the picture would move
    return ndimage.uniform_filter1d(pixels, length, axis=1, mode="nearest")


def _rain(pixels: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    density, brightness = _RAIN[severity - 1]
    drops = (rng.random(_field_shape(pixels), dtype=np.float32) < density).astype(np.float32)
    streaks = ndimage.uniform_filter1d(drops, 15, axis=0, mode="wrap") * 15 * 0.45
    return pixels * brightness + 0.12 * (1 - brightness) + _enlarged(streaks.clip(0, 0.6), pixels)[..., None]


def _snow(pixels: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    density, contrast = _SNOW[severity - 1]
    flakes = (rng.random(_field_shape(pixels), dtype=np.float32) < density).astype(np.float32)
    flakes = (ndimage.gaussian_filter(flakes, 0.8) * 4).clip(0, 1)
    white = pixels.mean(axis=2, keepdims=True) * 0.5 + 0.5
    return contrast * pixels + (1 - contrast) * np.maximum(pixels, white) + _enlarged(flakes, pixels)[..., None]


def _lens_dirt(pixels: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    shape = _field_shape(pixels)
    blobs = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), FIELD_WIDTH / 40)
    covered = np.quantile(blobs, 1 - _DIRT[severity - 1])
    soft = 0.25 * blobs.std()
    opacity: Pixels = (((blobs - covered) / soft + 0.5).clip(0, 1) * 0.9).astype(np.float32)
    opacity = _enlarged(opacity, pixels)[..., None]
    return pixels * (1 - opacity) + _DIRT_COLOUR * opacity


_PIXEL_FUNCTIONS = {
    "night": _night,
    "fog": _fog,
    "rain": _rain,
    "snow": _snow,
    "motion_blur": _motion_blur,
    "lens_dirt": _lens_dirt,
    "noise": _noise,
}
IMAGE_CORRUPTIONS = (*_PIXEL_FUNCTIONS, "jpeg")


def _field_shape(pixels: Pixels) -> tuple[int, int]:
    height, width = pixels.shape[:2]
    return max(8, round(FIELD_WIDTH * height / width)), FIELD_WIDTH


def _enlarged(field: Pixels, pixels: Pixels) -> Pixels:
    height, width = pixels.shape[:2]
    image = Image.fromarray(field).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image, dtype=np.float32)


def _grain(pixels: Pixels, deviation: float, rng: np.random.Generator) -> Pixels:
    shape = _field_shape(pixels)
    planes = [rng.standard_normal(shape, dtype=np.float32) * np.float32(deviation) for _ in range(3)]
    return np.stack([_enlarged(plane, pixels) for plane in planes], axis=2)


def _cloud(shape: tuple[int, int], smoothness: float, rng: np.random.Generator) -> Pixels:
    """Fractal noise in [0, 1]: amplitudes fall with frequency to the power of `smoothness`."""
    rows, columns = np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])[None]
    frequency = np.hypot(rows, columns)
    frequency[0, 0] = np.inf  # no constant part
    phases = np.exp(2j * np.pi * rng.random(frequency.shape))
    cloud = np.fft.irfft2(phases / frequency**smoothness, s=shape)
    return ((cloud - cloud.min()) / (cloud.max() - cloud.min())).astype(np.float32)
