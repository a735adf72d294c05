"""Ask a checkpoint about camera images.

    python -m smoldriver_hf ask --checkpoint DIR --image CAM_FRONT=front.jpg --image CAM_BACK=back.jpg "Is it safe?"
    python -m smoldriver_hf ask --checkpoint DIR --folder FRAME "What is ahead?" "Are there pedestrians?" --json
    python -m smoldriver_hf ask --folder FRAME "What is ahead?"   # the default model, which the repository ships
    python -m smoldriver_hf default [--blind]                     # its folder, or its blind twin's

`--folder` takes the images whose file names hold a camera's name, as nuScenes' do. A mistake of the user's is one line
on stderr and exit status 2; `--traceback` shows where it was found. This file also runs on its own, wherever
transformers is: with `--trust-remote-code` all code comes from the checkpoint.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="smoldriver", description="A six-camera driving vision-language model.")
    commands = top.add_subparsers(dest="command", required=True)
    whole = commands.add_parser("default", help="make the default model whole, once, and print its folder")
    whole.add_argument("--blind", action="store_true", help="its twin, trained alike without images")
    ask = commands.add_parser("ask", help="answer questions about one scene")
    ask.add_argument("--checkpoint", help="folder or Hub id; default: the model that the repository ships")
    ask.add_argument("--revision", help="revision of a Hub checkpoint")
    ask.add_argument(
        "--image", action="append", default=[], metavar="CAMERA=FILE", help="one camera's image; repeatable"
    )
    ask.add_argument("--folder", type=Path, help="folder of one frame, camera names in the file names")
    ask.add_argument(
        "--num_queries", "--budget", help="queries per camera, or CAM_FRONT=16,CAM_BACK=2; default: the checkpoint's"
    )
    ask.add_argument("--max-new-tokens", type=int, default=64)
    how = ask.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="one JSON object per question")
    how.add_argument("--stream", action="store_true", help="print each answer as it is written")
    ask.add_argument("--trust-remote-code", action="store_true", help="run the code that lies in the checkpoint")
    ask.add_argument("questions", nargs="+", metavar="QUESTION")
    for command in (whole, ask):
        command.add_argument("--traceback", action="store_true", help="show where an error was found")
    return top


def named_images(pairs: list[str], folder: Path | None, cameras: list[str]) -> dict[str, str]:
    """{camera: file} from CAMERA=FILE pairs and from a folder's file names.

    Raises:
        ValueError: a malformed pair, an unknown camera or one twice, a file that is not there, or no image at all.
    """
    found: list[tuple[str, str]] = []
    known = {camera.lower(): camera for camera in cameras}  # people write names in any case
    for pair in pairs:
        camera, equals, file = pair.partition("=")
        if not equals or not file:
            raise ValueError(f"--image expects CAMERA=FILE, got {pair!r}")
        found.append((camera, file))
    if folder is not None:
        if not folder.is_dir():
            raise ValueError(f"--folder {folder} is not a folder")
        # Longest name first, and no letter around it: CAM_FRONT must not be found in CAM_FRONT_LEFT.
        names = "|".join(sorted(map(re.escape, cameras), key=len, reverse=True))
        pattern = re.compile(rf"(?<![A-Z])({names})(?![_-]?[A-Z])", re.IGNORECASE)
        for picture in sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES):
            match = pattern.search(picture.stem)
            if match:
                found.append((match.group(1), str(picture)))
            else:
                print(f"smoldriver: left out, its name holds no camera's: {picture}", file=sys.stderr)
    images: dict[str, str] = {}
    for name, file_name in found:
        camera = known.get(name.lower(), name)
        if camera not in cameras:
            raise ValueError(f"unknown camera {camera!r}; this checkpoint knows {', '.join(cameras)}")
        if camera in images:
            raise ValueError(f"two images for {camera}: {images[camera]} and {file_name}")
        if not Path(file_name).is_file():
            raise ValueError(f"{camera}: no such file: {file_name}")
        images[camera] = file_name
    if not images:
        raise ValueError(
            f"no image given; name them with --image CAMERA=FILE or --folder. Cameras: {', '.join(cameras)}"
        )
    return images


def default_folder(model: str = "smoldriver") -> str:
    """The default model's folder, made whole first where it is not yet.

    Raises:
        ValueError, OSError: this file runs on its own, or `fetch_default` cannot.
    """
    if not __package__:
        raise ValueError("smoldriver_hf is not installed: name a checkpoint with --checkpoint")
    from .default import fetch_default

    return str(fetch_default(model))


def strict_door(args: argparse.Namespace) -> Any:
    """`load` of `loading_smoldriver.py`: the package's, or the checkpoint's where this file runs on its own.

    Raises:
        ValueError, OSError: on its own, without leave to run the checkpoint's code, or there is none.
    """
    if __package__:
        from .loading_smoldriver import load

        return load
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    if not args.trust_remote_code:
        raise ValueError("smoldriver_hf is not installed: the checkpoint's own code needs --trust-remote-code")
    return get_class_from_dynamic_module("loading_smoldriver.load", args.checkpoint, revision=args.revision)


def ask(args: argparse.Namespace) -> None:
    """Load, look once, answer every question.

    Raises:
        ValueError, OSError: a checkpoint, image or question that cannot be used.
    """
    from transformers import TextStreamer
    from transformers.utils import logging

    logging.disable_progress_bar()
    args.checkpoint = args.checkpoint or default_folder()
    if not Path(args.checkpoint).is_dir():
        print(f"smoldriver: {args.checkpoint} is no folder here: taken for a Hub id", file=sys.stderr)
    model, processor = strict_door(args)(
        args.checkpoint, precision=None, revision=args.revision, trust_remote_code=args.trust_remote_code
    )
    images = named_images(args.image, args.folder, processor.cameras)
    # Written with cameras it is read by the scene; checkpoints of before take a number only.
    number = args.num_queries is not None and args.num_queries.isdecimal()
    budget = int(args.num_queries) if number else args.num_queries
    scene = model.encode_scene(images, processor, num_queries=budget)
    if args.stream:
        streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        for question in args.questions:
            scene.ask(question, max_new_tokens=args.max_new_tokens, streamer=streamer)
        return
    for answer in scene.ask_all(args.questions, max_new_tokens=args.max_new_tokens):
        if answer.error is not None:
            raise ValueError(f"{answer.question!r}: {answer.error}") from answer.error
        line = {"question": answer.question, "answer": answer.text, "cameras": sorted(images)}
        print(json.dumps(line, ensure_ascii=False) if args.json else answer.text, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = parser().parse_args(argv)
    try:
        if args.command == "default":
            print(default_folder("blind" if args.blind else "smoldriver"))
        else:
            ask(args)
    except (ValueError, OSError) as error:
        if args.traceback:
            raise
        print(f"smoldriver: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
