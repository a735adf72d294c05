"""Bad inputs for property tests: how many of them, how long each may take, and JSON and bytes broken in every way."""

import copy
import json
import os
import signal
import struct
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisWarning

FEW = int(os.environ.get("BAD_INPUTS", 200))  # of each kind, in the default tests
MANY = 10_000  # in the slow ones
SECONDS = 30  # for one input; longer is taken for a hang

amounts = pytest.mark.parametrize("amount", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
costly_amounts = pytest.mark.parametrize("amount", [FEW // 3, pytest.param(MANY, marks=pytest.mark.slow)])

HUGE_TEXT = "no end " * 5_000
NUMBERS: list[Any] = [0, -1, 1, 2, 7, 2**31, -(2**31), 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")]
TEXTS = ["", " ", "\0", "\ud800", "CAM_FRONT", "../../../etc/passwd", "/", "<image>", "<|im_end|>", "NaN", HUGE_TEXT]

scalars = st.one_of(
    st.none(), st.booleans(), st.sampled_from(NUMBERS), st.integers(), st.floats(), st.sampled_from(TEXTS), st.text()
)


def nested(depth: int) -> Any:
    """A list in a list in a list …"""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


junk = st.one_of(
    scalars,
    st.sampled_from([[], {}, [[]], [{}], {"": None}]),
    st.lists(scalars, max_size=3),
    st.dictionaries(st.text(max_size=3), scalars, max_size=3),
    st.builds(nested, st.integers(1, 100)),
)


def places(value: Any, depth: int = 0) -> Iterator[tuple[int, Any, Any]]:
    """(depth, container, key) of everything inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield depth, value, key
        yield from places(item, depth + 1)


@st.composite
def mutated(draw: Callable[[Any], Any], document: Any, most: int = 3, values: st.SearchStrategy[Any] = junk) -> Any:
    """A JSON document with one to `most` changes, as likely at its root as deep inside."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, most))):
        by_depth = defaultdict(list)
        for depth, container, key in places(document):
            by_depth[depth].append((container, key))
        if not by_depth:
            return copy.deepcopy(draw(values))
        container, key = draw(st.sampled_from(by_depth[draw(st.sampled_from(sorted(by_depth)))]))
        match draw(st.sampled_from(["replace", "replace", "remove", "wrap", "move", "rename", "add"])):
            case "replace":
                container[key] = copy.deepcopy(draw(values))  # drawn objects may be shared
            case "remove":
                del container[key]
            case "wrap":
                container[key] = [container[key]]
            case "move":  # something of the document where it does not belong
                _, other, name = draw(st.sampled_from(list(places(document))))
                container[key] = copy.deepcopy(other[name])
            case "rename" if isinstance(container, dict):
                container[draw(st.sampled_from([*TEXTS, f"{key}s"]))] = container.pop(key)
            case _ if isinstance(container, dict):
                container[draw(st.sampled_from([*TEXTS, f"{key}2"]))] = copy.deepcopy(draw(values))
            case _:
                container.insert(draw(st.integers(0, len(container))), copy.deepcopy(draw(values)))
    return document


def to_bytes(document: Any) -> bytes:
    """JSON as a file holds it, half surrogate pairs as escapes."""
    return json.dumps(document).encode()


@st.composite
def broken_bytes(draw: Callable[[Any], Any], data: bytes) -> bytes:
    """Cut, changed, lengthened or exchanged."""
    match draw(st.sampled_from(["cut", "cut", "change", "change", "insert", "drop", "other"])):
        case "cut":
            return data[: draw(st.integers(0, len(data)))]
        case "change":
            changed = bytearray(data)
            head = draw(st.booleans())  # where formats keep their sizes
            for _ in range(draw(st.integers(1, 6))):
                changed[draw(st.integers(0, min(len(data) - 1, 200) if head else len(data) - 1))] = draw(
                    st.integers(0, 255)
                )
            return bytes(changed)
        case "insert":
            place = draw(st.integers(0, len(data)))
            return data[:place] + draw(st.binary(min_size=1, max_size=40)) + data[place:]
        case "drop":
            place = draw(st.integers(0, len(data)))
            return data[:place] + data[place + draw(st.integers(1, 40)) :]
        case _:
            return draw(st.one_of(st.binary(max_size=60), st.sampled_from([b"", b"\0" * 1000, b"[" * 100_000])))


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fail where something takes longer; a process that was stopped for a while gets as long again."""
    rings = 0

    def hang(*_: Any) -> None:
        nonlocal rings
        rings += 1
        if rings > 1:
            raise AssertionError(f"took longer than {2 * seconds} seconds")
        signal.alarm(seconds)

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def for_each(amount: int, cases: st.SearchStrategy[Any], check: Callable[[Any], bool]) -> None:
    """Check `amount` cases: the same ones in each run of the default tests, new ones in the slow tests.

    `check` says whether an input was taken; inputs that are all refused, or all taken, test little.
    """
    taken: Counter[bool] = Counter()

    @settings(max_examples=amount, deadline=None, derandomize=amount != MANY, suppress_health_check=list(HealthCheck))
    @given(cases)
    def run(case: Any) -> None:
        with within(SECONDS):
            taken[check(case)] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HypothesisWarning)  # of long texts and large documents
        run()
    print(f"{sum(taken.values())} inputs: {taken[True]} taken, {taken[False]} refused")
    assert taken[True] and taken[False], taken


def bomb() -> bytes:
    """A PNG of a few bytes that claims 60,000 pixels a side."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
