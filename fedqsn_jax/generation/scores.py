"""How good generated texts are: BLEU and ROUGE-L, each against all references of an input."""

from collections.abc import Sequence
from typing import Any

from fedqsn_jax.config.schema import ConfigError
from fedqsn_jax.generation.words import with_spaces, words_of

_HINT = "scores of texts need sacrebleu and rouge-score: pip install 'fedqsn_jax[language]'"


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU by sacrebleu (its tokenization 13a, case kept), 0 to 100.

    In scripts without spaces between words, such as Chinese, Japanese or Thai, each character
    counts as a word, as sacrebleu's own tokenization of Chinese has it.

    Args:
      texts: One text an input; at least one.
      references: For each input one reference or more; their number may differ.

    Raises:
      ValueError: The lengths differ, there is no input, or one has no reference.
      ConfigError: The library is not installed.
    """
    _check(texts, references)
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise ConfigError(_HINT) from error
    most = max(map(len, references))
    # The library wants the first references of all inputs, then the second ones, and so on.
    streams: list[list[Any]] = [
        [with_spaces(some[index]) if index < len(some) else None for some in references]
        for index in range(most)
    ]
    # Data sets such as E2E are tokenized already, of which the library would warn.
    return float(BLEU(force=True).corpus_score(list(map(with_spaces, texts)), streams).score)


def rouge_l(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """ROUGE-L by rouge-score, 0 to 100: the best F-measure of an input's references, averaged.

    Words are not stemmed. Latin words are those of rouge-score, which leaves out letters with
    accents; `words.words_of` finds those of other scripts. Arguments and errors are those of
    `bleu`.
    """
    _check(texts, references)
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ConfigError(_HINT) from error
    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    each = [
        scorer.score_multi(list(some), text)["rougeL"].fmeasure
        for text, some in zip(texts, references, strict=True)
    ]
    return 100 * sum(each) / len(each)


class _Words:
    """Words of texts in any script, as rouge-score wants to be given them."""

    def tokenize(self, text: str) -> list[str]:
        """Returns the words of a text."""
        from rouge_score.tokenize import tokenize

        return words_of(text, lambda part: list(tokenize(part, None)))


def _check(texts: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(texts) != len(references):
        raise ValueError(f"{len(texts)} texts, but references of {len(references)} inputs")
    if not texts:
        raise ValueError("no texts: at least one is needed")
    for index, some in enumerate(references):
        if not some:
            raise ValueError(f"input {index} has no reference")
