import json
import random
import shutil
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.metrics.language import coco_tokens
from training.metrics.ptb import COCO_PUNCTUATION, one_line, ptb_tokenize

SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "drivelm"
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="compares with the Java program")

FRAGMENTS = """
<c1,CAM_FRONT,714.3,503.6> <c2,CAM_BACK_LEFT,8.0,5.5> car Cars the The is it's don't can't I'm we'll they've
isn't 1 12 3.5 1,000 10:30 50% $5 US$5 etc. e.g. i.e. U.S. Mr. No. Inc. Jan. Co. Ltd. vs. p. Fig. Ph.D. a.m. A.
B. C. x - -- --- ... .... . , ! ? ?! ; : ( ) [ ] { } ' " ` `` '' / \\ & @ # $ % ^ * + = < > ~ | _ well-known
and/or km/h 5km/h 2D 1st \u2019 \u2018 \u201c \u201d \u2013 \u2014 \u2026 \u00e9 na\u00efve \u00bd \u00b0C
\u20ac http://a.b/c?d=e www.x.com a@b.co :) ^_^ 'em '90s o'clock cannot Gonna O'Brien yes No. front-left
CAM_FRONT n't 's 1/2 3-4 -5 +7 12-11-2020 555-1234 &amp; &lt; &quot; <b> </s> <image> A&B a_b file.txt .5 1.Stop
[(traffic light,green,1.0,2.0)]
""".split()
ALPHABET = (
    string.printable[:95]
    + "\u00e9\u00ef\u00df\u0416\u03b1\u4e2d\u2019\u2018\u201c\u201d\u2013\u2026\u00a0\u00bd\u00b5"
)

KNOWN = [
    ("", ""),
    ("   ", ""),
    ("There is a car.", "there is a car ."),
    ("<c1,CAM_FRONT,714.3,503.6> is red.", "< c1 , cam_front ,714.3,503.6 > is red ."),
    ("[(traffic light, green, 13.19)]", "-lsb- -lrb- traffic light , green , 13.19 -rrb- -rsb-"),
    ("It's John's dogs' bone, isn't it? I can't.", "it 's john 's dogs ' bone , is n't it ? i ca n't ."),
    ("We cannot, they're gonna", "we can not , they 're gon na"),
    ("rock 'n' roll o'clock O'Brien '90s", "rock 'n' roll o'clock o'brien '90s"),
    ("\"quoted\" 'single' \u201ccurly\u201d", "`` quoted '' ` single ' `` curly ''"),
    ("1,000 cars, 3.5 m at 10:30, 50% for $5.", "1,000 cars , 3.5 m at 10:30 , 50 % for $ 5 ."),
    ("1.Maintain a gap.2.Stop", "1 . maintain a gap .2 . stop"),
    ("well-known and/or CAM_FRONT_LEFT 5km/h", "well-known and/or cam_front_left 5km/h"),
    ("Mr. Smith etc. and the U.S. Army. The U.S. The end", "mr. smith etc. and the u.s. army . the u.s. . the end"),
    ("No. 5 is no. Fig. 3, fig. a", "no. 5 is no . fig. 3 , fig . a"),
    ("Wait... what?! --- a--b", "wait ... what ?! -- a -- b"),
    ("http://a.com/x?y=1, me@x.org :-) x", "http://a.com/x?y=1 , me@x.org :--rrb- x"),
    ("A&B &amp; AT&T <b>bold</b> \u00bd \u2013 \u20ac5", "a&b & at&t <b> bold </b> 1/2 -- $ 5"),
    ("\U0001f600 hi", "hi"),
]


@pytest.mark.parametrize(("text", "tokens"), KNOWN)
def test_known_tokens(text: str, tokens: str) -> None:
    assert ptb_tokenize([text]) == [tokens.split()]


def test_end_of_a_text_is_judged_by_the_next_one() -> None:
    # At the end of everything and before a capital the full stop is a token of its own, before a small letter not.
    assert ptb_tokenize(["cars etc."]) == [["cars", "etc.", "."]]
    assert ptb_tokenize(["cars etc.", "The"]) == [["cars", "etc.", "."], ["the"]]
    assert ptb_tokenize(["cars etc.", "the"]) == [["cars", "etc."], ["the"]]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\u2028", "\u0085", "\x0b"])
def test_line_ends_within_a_text_do_not_shift_the_others(end: str) -> None:
    assert ptb_tokenize([f"a{end}b", "c"]) == [["a", "b"], ["c"]]


@given(st.lists(st.text(), max_size=5))
@settings(deadline=None, derandomize=True, max_examples=200)
def test_any_text_gives_one_line_of_tokens_each(texts: list[str]) -> None:
    tokens = ptb_tokenize(texts)
    assert len(tokens) == len(texts)
    assert all(token and " " not in token and "\n" not in token for line in tokens for token in line)


def test_punctuation_is_removed_but_lower_case_brackets_stay() -> None:
    assert coco_tokens(["Yes, (a car): 'red'."], "python") == ["yes -lrb- a car -rrb- red"]
    assert "-LRB-" in COCO_PUNCTUATION


def test_unknown_tokenizer_is_an_error() -> None:
    with pytest.raises(ValueError, match='"java" or "python", got'):
        coco_tokens(["a"], "perl")  # type: ignore[arg-type]


def assert_like_java(texts: list[str]) -> None:
    expected, given_ = coco_tokens(texts, "java"), coco_tokens(texts, "python")
    different = [(text, a, b) for text, a, b in zip(texts, expected, given_, strict=True) if a != b]
    assert not different, f"{len(different)} of {len(texts)}, first: {different[:3]}"


@needs_java
def test_like_java_on_known_and_assembled_texts() -> None:
    rng = random.Random(0)
    assembled = [
        "".join(rng.choice(FRAGMENTS) + rng.choice([" ", " ", ""]) for _ in range(rng.randint(1, 9)))
        for _ in range(4000)
    ]
    assert_like_java([text for text, _ in KNOWN] + assembled)


@needs_java
@given(st.lists(st.text(ALPHABET, max_size=20), min_size=100, max_size=100))
@settings(deadline=None, derandomize=True, max_examples=5)
def test_like_java_on_generated_texts(texts: list[str]) -> None:
    assert_like_java(texts)


@needs_java
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared DriveLM files")
def test_like_java_on_drivelm() -> None:
    texts = [entry["answer"] for entry in json.loads((SHARED / "output.json").read_text())]
    for name in ("drivelm_9frames.json", "test_eval.json"):
        for scene in json.loads((SHARED / name).read_text()).values():
            for frame in scene["key_frames"].values():
                texts += [text for qa in frame["QA"].values() for entry in qa for text in (entry["Q"], entry["A"])]
    assert len(texts) > 1700
    assert_like_java(texts)
    assert all("\n" not in one_line(text) for text in texts)
