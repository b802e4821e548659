"""Tiny pre-trained language models in directories, with texts, and flags that run on them."""

from pathlib import Path

import jax
import numpy as np
from text_cases import MARKS, WORDS, write_tokenizer

from fedqsn_jax.models.language.encoder import EncoderConfig
from fedqsn_jax.models.language.families import LanguageConfig, make_language_model
from fedqsn_jax.models.language.gpt2 import GPT2Config
from fedqsn_jax.models.language.pretrained import save_pretrained

VOCABULARY = len(MARKS) + len(WORDS)
BERT = EncoderConfig("bert", VOCABULARY, 16, 2, 2, 16, positions=16, classes=0)
GPT2 = GPT2Config("gpt2", VOCABULARY, 16, 2, 2, 16, positions=32, eos_token_ids=(2,))
FLAGS = [
    "--config=configs/sst2_minilm.py",
    "--config.data.train_rows=0",
    "--config.data.private_rows=8",
    "--config.data.clients=4",
    "--config.data.length=8",
    "--config.cohort.size=2",
    "--config.rounds=2",
    "--config.rounds_per_call=2",
    "--config.evaluation.every=2",
    "--config.evaluation.proxy_samples=2",
    "--config.evaluation.attackers=(2,)",
    "--config.evaluation.batch_size=8",
    "--config.pretraining.steps=60",
    "--config.pretraining.batch_size=8",
    "--config.pretraining.learning_rate=0.02",
    "--config.client.steps=2",
    "--config.client.batch_size=4",
    "--config.block_size=16",
]


def sentences(count: int) -> str:
    """Rows of a task that one word decides."""
    rng = np.random.default_rng(3)
    rows = ["sentence\tlabel"]
    for _ in range(count):
        label = int(rng.integers(2))
        rows.append(f"{rng.choice(['a', 'the'])} film is {['bad', 'good'][label]}\t{label}")
    return "\n".join(rows) + "\n"


def restaurants(count: int) -> str:
    """Rows in E2E's notation; a prompt has two references."""
    rng = np.random.default_rng(4)
    rows = []
    for _ in range(count):
        name, price = rng.choice(["Blue", "Spice"]), rng.choice(["cheap", "good"])
        for verb in ("is", "of"):
            rows.append(f"name : {name} | price : {price}||{name} {verb} {price}")
    return "\n".join(rows) + "\n"


def write_model(place: Path, config: LanguageConfig, seed: int = 1) -> Path:
    """Writes random parameters, a tokenizer and the texts that `classify` or `write` read."""
    save_pretrained(place, config, make_language_model(config).init(jax.random.key(seed)))
    if isinstance(config, EncoderConfig):
        write_tokenizer(place)
        (place / "train.tsv").write_text(sentences(40))
        (place / "test.tsv").write_text(sentences(16))
    else:
        write_tokenizer(place, "none")
        (place / "train.txt").write_text(restaurants(20))
        (place / "test.txt").write_text(restaurants(4))
    return place


def _flags(place: Path, source: str, suffix: str) -> list[str]:
    return [
        *FLAGS,
        f"--config.model.pretrained={place}",
        f"--config.data.train={source}:{place}/train.{suffix}",
        f"--config.data.test={source}:{place}/test.{suffix}",
        f"--config.data.cache={place}/cache",
    ]


def classify(place: Path) -> list[str]:
    """Returns the flags of a run that classifies sentences."""
    return _flags(place, "tsv", "tsv")


def write(place: Path) -> list[str]:
    """Returns the flags of a run that writes about restaurants."""
    return [
        *_flags(place, "e2e", "txt"),
        "--config.data.task=e2e",
        "--config.data.length=24",
        "--config.generation.prompts=3",
        "--config.generation.beams=2",
        "--config.generation.new_tokens=6",
        "--config.client.label_smoothing=0.1",
    ]
