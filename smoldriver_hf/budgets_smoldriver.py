"""A budget: how many queries are in use, one number for all cameras or one for each by name."""

from collections.abc import Mapping, Sequence

Budget = int | Mapping[str, int]
"""`16`, or `{"CAM_FRONT": 16, "CAM_BACK": 2}`: cameras that it does not name have the default."""


def parse_budget(written: str | Budget | None) -> Budget | None:
    """A budget as people write it, `16` or `CAM_FRONT=16,CAM_BACK=2`; one that is no text stays as it is.

    Raises:
        ValueError: neither a number nor cameras with numbers, or a camera twice.
    """
    if not isinstance(written, str):
        return written
    if written.strip().isdecimal():
        return int(written)
    budget: dict[str, int] = {}
    for pair in written.split(","):
        camera, _, number = (word.strip() for word in pair.partition("="))
        if not camera or not number.isdecimal() or camera in budget:
            raise ValueError(f"a budget is a number or CAMERA=NUMBER,CAMERA=NUMBER,… with each once; got {written!r}")
        budget[camera] = int(number)
    return budget


def argument(written: str | int | None) -> str | int | None:
    """A budget among a command's arguments: a number, or cameras as they were written.

    Raises:
        ValueError: see `parse_budget`.
    """
    budget = parse_budget(written)
    return budget if isinstance(budget, int) else written


def queries_by_camera(budget: Budget | None, cameras: Sequence[str], default: int) -> dict[str, int]:
    """The queries that a budget leaves each camera.

    Raises:
        ValueError: it names an unknown camera.
    """
    if not isinstance(budget, Mapping):
        return dict.fromkeys(cameras, default if budget is None else budget)
    unknown = [name for name in budget if name not in cameras]
    if unknown:
        raise ValueError(f"num_queries names an unknown camera {unknown[0]!r}; this model knows {list(cameras)}")
    return {camera: budget.get(camera, default) for camera in cameras}


def budget_for_each(budget: Budget | Sequence[Budget] | None, samples: int) -> list[Budget | None]:
    """The budget of each sample of a batch.

    Raises:
        ValueError: a list that has not one for each sample.
    """
    if budget is None or isinstance(budget, int | Mapping):
        return [budget] * samples
    if len(budget) != samples:
        raise ValueError(f"a list of num_queries has one budget for each sample; got {len(budget)} for {samples}")
    return list(budget)


__all__ = ["Budget", "argument", "budget_for_each", "parse_budget", "queries_by_camera"]
