"""Language scores: COCO BLEU-1..4, ROUGE-L and CIDEr, sacrebleu, the seed's BLEU, BERTScore.

Scores of one name are not comparable across tokenizers or models, so every function says which one it used.
All take predictions and references of one length and raise a ValueError for other lengths and for none.
"""

import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pycocoevalcap.tokenizer.ptbtokenizer as coco_tokenizer
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from sacrebleu.metrics.bleu import BLEU

from training.metrics.ptb import COCO_PUNCTUATION, one_line, ptb_tokenize

if TYPE_CHECKING:
    from bert_score import BERTScorer

Tokenizer = Literal["java", "python"]


@cache
def available_tokenizer() -> Tokenizer:
    """`"java"` (Stanford's PTBTokenizer, which ships with pycocoevalcap) where Java runs it, else `"python"`."""
    try:
        return "java" if coco_tokens(["Yes."], "java") == ["yes"] else "python"
    except ValueError:
        return "python"


def coco_tokens(texts: Sequence[str], tokenizer: Tokenizer) -> list[str]:
    """The texts as the COCO caption scores see them: lower-case Penn Treebank tokens without punctuation.

    Args:
        texts: one document, a text per line: the end of a text can depend on the beginning of the next one.
        tokenizer: see `available_tokenizer`; both give the same tokens.

    Returns:
        one string per text, tokens separated by single spaces; empty where nothing is left.

    Raises:
        ValueError: `tokenizer` is none of the two, there is no Java, or its program failed.
    """
    if tokenizer == "java":
        lines = [line.rstrip().split(" ") for line in _java_lines([one_line(text) for text in texts])]
    elif tokenizer == "python":
        lines = ptb_tokenize(texts)
    else:
        raise ValueError(f'tokenizer must be "java" or "python", got {tokenizer!r}')
    return [" ".join(token for token in tokens if token not in COCO_PUNCTUATION) for tokens in lines]


def coco_scores(
    predictions: Sequence[str], references: Sequence[str], tokenizer: Tokenizer | None = None
) -> dict[str, Any]:
    """BLEU-1..4, ROUGE-L and CIDEr of COCO captions (pycocoevalcap), one reference per prediction.

    CIDEr weighs n-grams by how few of *these* references hold them: it changes with the set of questions, and is 0
    for a single one.

    Returns:
        `bleu_1` ... `bleu_4` and `rouge_l` in [0, 1], `cider` in [0, 10], `tokenizer`, of None the available one.
    """
    check_pairs(predictions, references)
    tokenizer = tokenizer or available_tokenizer()
    reference_tokens = coco_tokens(references, tokenizer)
    truth = {index: [text] for index, text in enumerate(reference_tokens)}
    answers = {index: [text] for index, text in enumerate(coco_tokens(predictions, tokenizer))}
    bleu, _ = Bleu(4).compute_score(truth, answers, verbose=0)
    rouge, _ = Rouge().compute_score(truth, answers)
    # With no token in any reference there are no document frequencies and pycocoevalcap fails.
    cider = Cider().compute_score(truth, answers)[0] if any(reference_tokens) else 0.0
    return {
        **{f"bleu_{order}": float(score) for order, score in enumerate(bleu, start=1)},
        "rouge_l": float(rouge),
        "cider": float(cider),
        "tokenizer": tokenizer,
    }


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """The share of answers that are their reference, letter by letter."""
    check_pairs(predictions, references)
    return sum(map(str.__eq__, predictions, references)) / len(predictions)


def sacrebleu_score(predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """Corpus BLEU of sacrebleu with its defaults.

    Returns:
        `score` in [0, 100] and sacrebleu's `signature`, which names tokenizer, smoothing and version.
    """
    check_pairs(predictions, references)
    metric = BLEU(force=True)
    score = metric.corpus_score(list(predictions), [list(references)]).score
    return {"score": float(score), "signature": str(metric.get_signature())}


def seed_bleu(predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """The BLEU that the seed reports: `evaluate.load("bleu")` with one reference per prediction.

    That metric is Google NMT's `compute_bleu` over mteval-13a tokens, without smoothing, and must be fetched from the
    Hub. sacrebleu with the same tokenizer and no smoothing counts the same n-grams and gives the same figures; only
    where every prediction is empty `evaluate` divides by zero and this is 0.

    Returns:
        `bleu`, `brevity_penalty` and the four `precisions`, all in [0, 1].
    """
    check_pairs(predictions, references)
    result = BLEU(smooth_method="none", tokenize="13a", force=True).corpus_score(list(predictions), [list(references)])
    return {
        "bleu": float(result.score) / 100,
        "brevity_penalty": float(result.bp),
        "precisions": [float(precision) / 100 for precision in result.precisions],
    }


def load_bert_scorer(model: str, device: str | None = None) -> "BERTScorer":
    """A BERTScore model that has scored a short and a long text, to be loaded once and used for many conditions.

    Longer texts than the encoder reads are cut, also where its tokenizer does not say how long that is.

    Args:
        model: Hub name or local folder of an encoder with its tokenizer. Compared are the states of the layer that
            bert_score chooses for a Hub name that it knows, of the last one of any other.
        device: None takes the accelerator where there is one.

    Raises:
        ValueError: it cannot be loaded, or does not score.
    """
    from bert_score import BERTScorer  # brings torch: the other scores must not wait for it
    from bert_score.utils import model2layers
    from transformers import AutoConfig

    try:
        num_layers = None if model in model2layers else AutoConfig.from_pretrained(model).num_hidden_layers
        scorer = BERTScorer(model_type=model, num_layers=num_layers, device=device)
        longest = _longest_text(scorer._model)
        scorer._tokenizer.model_max_length = min(scorer._tokenizer.model_max_length, longest)
        bert_scores(["Yes.", "there are cars " * longest], ["No.", "No."], scorer)
    except Exception as error:  # any encoder's own: of its files, its tokenizer, its layers
        raise ValueError(f"{model} is no encoder for BERTScore: {type(error).__name__}: {error}") from error
    return scorer


def _longest_text(encoder: Any) -> int:
    """How many tokens an encoder reads: its table of positions says it, of which some models leave out the first."""
    tables = [
        module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        for name, module in encoder.named_modules()
        if name.endswith("position_embeddings") and hasattr(module, "num_embeddings")
    ]
    said = getattr(encoder.config, "max_position_embeddings", None) or 0
    return min(tables) if tables else said if said > 0 else 512


def bert_scores(predictions: Sequence[str], references: Sequence[str], scorer: "BERTScorer") -> dict[str, Any]:
    """BERTScore: mean precision, recall and F1, without baseline rescaling.

    An empty text has no tokens to compare: that pair counts 0 and never reaches the model (bert_score crashes on it
    under transformers 5).

    Returns:
        `precision`, `recall`, `f1`, `model`, `num_layers`.
    """
    check_pairs(predictions, references)
    scored = [(hyp, ref) for hyp, ref in zip(predictions, references, strict=True) if hyp.strip() and ref.strip()]
    means = [0.0, 0.0, 0.0]
    if scored:
        with warnings.catch_warnings(action="ignore"):
            parts = scorer.score(*map(list, zip(*scored, strict=True)))
        means = [float(part.double().sum()) / len(predictions) for part in parts]
    figures = dict(zip(("precision", "recall", "f1"), means, strict=True))
    return {**figures, "model": scorer.model_type, "num_layers": scorer.num_layers}


def _java_lines(texts: Sequence[str]) -> list[str]:
    """The lines that Stanford's PTBTokenizer writes for a document with a text per line."""
    jar = Path(coco_tokenizer.__file__).with_name(coco_tokenizer.STANFORD_CORENLP_3_4_1_JAR)
    with tempfile.TemporaryDirectory() as folder:
        document = Path(folder, "document.txt")
        document.write_bytes("\n".join(texts).encode())
        command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
        try:
            run = subprocess.run([*command, str(document)], capture_output=True)
        except OSError as error:
            raise ValueError(f"tokenizer java needs Java, use tokenizer python, the same tokens: {error}") from None
    if run.returncode:
        said = run.stderr.decode(errors="replace")[-500:]
        raise ValueError(f"Stanford's PTBTokenizer failed, use tokenizer python, the same tokens: {said}")
    lines = run.stdout.decode().split("\n")[: len(texts)]
    if len(lines) != len(texts):
        raise ValueError(f"Stanford's PTBTokenizer wrote {len(lines)} lines for {len(texts)} texts")
    return lines


def check_pairs(predictions: Sequence[str], references: Sequence[str]) -> None:
    """Raise a ValueError unless there are as many predictions as references, and at least one."""
    if len(predictions) != len(references) or not predictions:
        raise ValueError(
            "expected as many predictions as references and at least one, "
            f"got {len(predictions)} predictions and {len(references)} references"
        )
