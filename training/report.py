"""One page about one or more evaluations, to be opened in any browser, without network.

    python -m training.report --runs outputs/eval-smoldriver outputs/eval-smolvlm --data outputs/data \\
        --losses outputs/finetuned/metrics.jsonl --output report.html

Tables, figures and a gallery of frames with every model's answers; all of it comes from the files that
`training.evaluate` and `training.finetune` wrote, and the last section holds every number of each metrics.json. The
page is one file: style, script, figures and thumbnails are inside. Without JavaScript only the filters are missing.
"""

from dataclasses import dataclass, field
from pathlib import Path

import jinja2

from training.evaluation.controls import Control
from training.evaluation.curves import make_plots, named_losses
from training.evaluation.gallery import gallery
from training.evaluation.results import load_runs
from training.evaluation.tables import (
    calibration_table,
    controls_table,
    flat,
    hallucination_table,
    headline_table,
    kinds_table,
    looking_table,
)
from training.stages.command_line import run
from training.stages.files import write_text

TEMPLATE = Path(__file__).with_name("templates") / "report.html.jinja"


@dataclass
class ReportArguments:
    runs: list[str] = field(metadata={"help": "Folders written by training.evaluate, best known first."})
    output: str = field(metadata={"help": "The HTML file to write."})
    data: str | None = field(default=None, metadata={"help": "Prepared folder of the runs, for the gallery."})
    losses: list[str] = field(default_factory=list, metadata={"help": "metrics.jsonl of training runs, or NAME=FILE."})
    title: str = field(default="Does it look?", metadata={"help": "Heading of the page."})
    gallery_frames: int = field(default=8, metadata={"help": "Frames in the gallery; 0 for none."})
    questions_per_frame: int = field(default=40, metadata={"help": "Questions per frame in the gallery, at most."})


def in_controls_table(control: Control) -> bool:
    """Absent objects have a table of their own: their questions are others."""
    return control.group in ("blind", "cameras") or control.kind == "paraphrase"


def main(args: ReportArguments) -> Path:
    """Write the page; returns its path.

    Raises:
        ValueError: see `load_runs`, `named_losses` and `gallery`.
    """
    runs = load_runs(args.runs)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    frames = gallery(runs, args.data, args.gallery_frames, args.questions_per_frame) if args.data else []
    questions = [question for frame in frames for question in frame["questions"]]
    page = template.render(
        title=args.title,
        runs=runs,
        headline=headline_table(runs),
        looking={run.name: looking_table(run) for run in runs},
        categories=kinds_table(runs, "by_category"),
        types=kinds_table(runs, "by_type"),
        figures=make_plots(runs, named_losses(args.losses)),
        controls={run.name: controls_table(run, in_controls_table) for run in runs},
        corruptions={run.name: controls_table(run, lambda control: control.group == "corruptions") for run in runs},
        hallucination=hallucination_table(runs),
        calibration=calibration_table(runs),
        frames=frames,
        kinds=sorted({question["type"] for question in questions}),
        categories_shown=sorted({question["category"] for question in questions}),
        attentive=[run.name for run in runs if (run.folder / "attention.npz").is_file()],
        everything={run.name: flat(run.metrics) for run in runs},
    )
    output = Path(args.output)
    write_text(output, page)
    print(f"{output}: {len(runs)} runs, {len(frames)} frames, {output.stat().st_size / 1e6:.1f} MB")
    return output


if __name__ == "__main__":
    run(main, ReportArguments)
