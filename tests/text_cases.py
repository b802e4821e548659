"""A tiny tokenizer, and text files, for tests of text data."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from fedqsn_jax.data.text.tokenization import load_tokenizer

MARKS = ("<pad>", "<start>", "<end>", "<unknown>")
_SENTENCE = """good bad film a the of is not eats food name Type area price pub cheap centre
    Blue Spice Output : | . , ( )"""
WORDS = tuple(_SENTENCE.split())


def write_tokenizer(directory: Path, marked: str = "pair") -> Path:
    """Writes a word-level ``tokenizer.json``; ids are positions in ``MARKS + WORDS``.

    ``marked``: ``pair`` surrounds texts as BERT does, with types; ``none`` adds nothing, as GPT-2.
    """
    vocabulary = {token: index for index, token in enumerate((*MARKS, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    if marked == "pair":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<start> $A <end>",
            pair="<start> $A <end> $B:1 <end>:1",
            special_tokens=[("<start>", 1), ("<end>", 2)],
        )
    file = directory / "tokenizer.json"
    tokenizer.save(str(file))
    return file


def tiny_tokenizer(directory: Path, marked: str = "pair", max_length: int | None = 64):
    """Writes and loads the tokenizer."""
    return load_tokenizer(
        write_tokenizer(directory, marked), len(MARKS) + len(WORDS), max_length, 0, (2,)
    )


def ids(text: str) -> list[int]:
    """Ids of words that stand between spaces, looked up one by one."""
    return [
        (*MARKS, *WORDS).index(word) if word in (*MARKS, *WORDS) else 3 for word in text.split()
    ]
