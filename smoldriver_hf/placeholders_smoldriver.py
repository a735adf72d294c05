"""Which tokens of a prompt belong to which image.

Every run of placeholders is one image's, in the order of the images, and its length is that image's budget; text
stands between runs. Nothing is found by dividing a total.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from .configuration_smoldriver import SmolDriverConfig


def given_images(pixel_values: torch.Tensor | None, vision_features: torch.Tensor | None) -> torch.Tensor:
    """The one of the two that was given; its first dimension counts the images."""
    if pixel_values is not None and vision_features is None:
        if pixel_values.ndim != 4:
            raise ValueError(
                "pixel_values must be flat, (images in the batch, 3, height, width), with camera_ids beside it; "
                f"got shape {tuple(pixel_values.shape)}"
            )
        return pixel_values
    if vision_features is not None and pixel_values is None:
        return vision_features
    raise ValueError("pass either pixel_values or vision_features, not both and not neither")


def expect(holds: torch.Tensor, message: Callable[[], str]) -> None:
    """Raise a ValueError where something does not hold; under the compiler, which waits for no value, let it be an
    error of the running graph."""
    if torch.compiler.is_compiling():
        torch._assert_async(holds, "the runs of placeholders in the prompt do not fit the images or their budget")
    elif not holds:
        raise ValueError(message())


def image_runs(placeholders: torch.Tensor) -> torch.Tensor:
    """(batch, sequence): the number of the run, over the whole batch, that a placeholder is in; elsewhere the one
    before it, from -1 on."""
    before = torch.nn.functional.pad(placeholders[:, :-1], (1, 0))
    return (placeholders & ~before).flatten().cumsum(0).view_as(placeholders) - 1


def tokens_of_images(placeholders: torch.Tensor, num_images: int) -> torch.Tensor:
    """(images,): how many placeholders each image has.

    Raises:
        ValueError: not one run for each image.
    """
    runs = image_runs(placeholders)
    found = runs[-1, -1] + 1
    expect(
        found == num_images,
        lambda: (
            f"every image needs one run of placeholders, with text between two; got {int(placeholders.sum())} "
            f"placeholders for {num_images} images, in {int(found)} runs"
        ),
    )
    counts = torch.zeros(num_images, dtype=torch.long, device=placeholders.device)
    return counts.index_add(0, runs.clamp(0, num_images - 1).flatten(), placeholders.flatten().long())


def images_of_rows(placeholders: torch.Tensor) -> list[int]:
    """How many images each row of the batch has."""
    last = image_runs(placeholders)[:, -1].tolist()
    return [end - start for start, end in zip([-1, *last], last, strict=False)]


def each_its_own(tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Visual tokens (images, most, hidden), each image's cut to its own length and put one behind the other.

    Returns:
        (tokens of all images, hidden); under the compiler, whose shapes cannot depend on lengths, with the tokens that
        were cut off at the end.
    """
    kept = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]  # (images, most)
    if torch.compiler.is_compiling():
        return tokens.flatten(0, 1)[(~kept).flatten().long().argsort(stable=True)]
    return tokens[kept]


def cameras_of_labels(
    input_ids: torch.Tensor, placeholders: torch.Tensor, labels: Mapping[str, Sequence[int]]
) -> list[str] | None:
    """The camera of each image by the tokens right before its run, or None where one has no label.

    Args:
        input_ids, placeholders: (batch, sequence).
        labels: {camera: the token ids that its label ends in}; the longest that fits counts.
    """
    by_length = sorted(labels.items(), key=lambda label: -len(label[1]))
    before = torch.nn.functional.pad(placeholders[:, :-1], (1, 0))
    found = []
    for row, start in (placeholders & ~before).nonzero().tolist():
        text = input_ids[row, max(0, start - len(by_length[0][1])) : start].tolist()
        named = (camera for camera, ids in by_length if text[len(text) - len(ids) :] == list(ids))
        found.append(next(named, None))
    return None if None in found else [camera for camera in found if camera is not None]


def camera_ids_of_prompt(
    input_ids: torch.Tensor | None, placeholders: torch.Tensor, num_images: int, config: SmolDriverConfig
) -> torch.Tensor | None:
    """`camera_ids` (images,) by the labels in a prompt whose images come without; None: whole scenes in order.

    Raises:
        ValueError: no labels, and a sample that has not all cameras.
    """
    if torch.compiler.is_compiling():
        return None
    if input_ids is not None and config.camera_labels:
        named = cameras_of_labels(input_ids, placeholders, config.camera_labels)
        if named is not None and len(named) == num_images:
            return torch.tensor([config.cameras.index(name) for name in named], device=placeholders.device)
    counts = images_of_rows(placeholders)
    whole = len(config.cameras)
    if num_images % whole or (sum(counts) == num_images and not set(counts) <= {0, whole}):
        raise ValueError(
            f"without camera_ids every sample has all {whole} cameras, in the order {config.cameras}; got "
            f"{num_images} images, {counts} in the samples of the batch"
        )
    return None


__all__ = [
    "camera_ids_of_prompt",
    "cameras_of_labels",
    "each_its_own",
    "expect",
    "given_images",
    "image_runs",
    "images_of_rows",
    "tokens_of_images",
]
