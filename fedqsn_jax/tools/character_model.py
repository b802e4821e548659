"""Makes a small language model of characters, with random weights, for ``model.pretrained``.

  python -m fedqsn_jax.tools.character_model --out=characters

writes ``config.json`` (a LLaMA), ``model.safetensors`` and ``tokenizer.json``, which has a token
for each printable character of ASCII, the newline and the long dash, whatever the texts are: a
server and its clients agree on it without telling each other of their rows.
"""

import argparse
import json
import string
import sys
from pathlib import Path
from typing import Any

import jax

from fedqsn_jax.core.errors import UserError
from fedqsn_jax.models.language.families import make_language_model
from fedqsn_jax.models.language.llama import LlamaConfig
from fedqsn_jax.models.language.pretrained import save_pretrained

MARKS = ("<pad>", "<end>", "<unknown>")
CHARACTERS = "\n " + string.digits + string.ascii_letters + string.punctuation + "\N{EM DASH}"
POSITIONS = 256


def main(arguments: list[str] | None = None) -> int:
    """Makes one model."""
    parser = argparse.ArgumentParser(
        prog="python -m fedqsn_jax.tools.character_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="the new directory")
    parser.add_argument("--width", type=int, default=96, help="of the hidden states")
    parser.add_argument("--layers", type=int, default=2, help="number of layers")
    parser.add_argument("--heads", type=int, default=4, help="attention heads a layer")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    options = parser.parse_args(arguments)
    try:
        config = make_config(options.width, options.layers, options.heads)
        params = make_language_model(config).init(jax.random.key(options.seed))
        save_pretrained(options.out, config, params)
        write_tokenizer(options.out / "tokenizer.json")
    except (UserError, ValueError, OSError) as error:
        print(f"character_model.py: {error}", file=sys.stderr)
        return 2
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{options.out}: {count:,} parameters, {config.vocab_size} tokens")
    return 0


def make_config(width: int, layers: int, heads: int) -> LlamaConfig:
    """Returns the architecture.

    Raises:
      ValueError: The sizes do not fit each other.
    """
    if min(width, layers, heads) < 1 or width % (2 * heads):
        raise ValueError(
            f"--width={width}, --heads={heads}, --layers={layers}: allowed are numbers of 1 or "
            f"more, the width a multiple of twice the heads"
        )
    return LlamaConfig(
        "llama",
        len(MARKS) + len(CHARACTERS),
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_size=width // heads,
        inner=8 * width // 3,
        positions=POSITIONS,
        tied=True,
        pad_token_id=MARKS.index("<pad>"),
        bos_token_id=MARKS.index("<end>"),
        eos_token_ids=(MARKS.index("<end>"),),
    )


def write_tokenizer(file: Path) -> None:
    """Writes the tokenizer: a token a character, as the library tokenizers reads it."""
    tokens = [*MARKS, *CHARACTERS]
    marks = [
        {
            "id": index,
            "content": mark,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for index, mark in enumerate(MARKS)
    ]
    # Every character by itself, the newline too.
    split: dict[str, Any] = {"type": "Split", "pattern": {"Regex": "[\\s\\S]"}}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": marks,
        "normalizer": None,
        "pre_tokenizer": split | {"behavior": "Isolated", "invert": False},
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "WordLevel",
            "vocab": {token: index for index, token in enumerate(tokens)},
            "unk_token": "<unknown>",
        },
    }
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
