"""The conversion of a LLaMA from GGUF, against its network written out in NumPy."""

import json
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from language_cases import jit
from tokenizers.pre_tokenizers import ByteLevel

from fedqsn_jax.data.text.tokenization import load_tokenizer
from fedqsn_jax.models.language.families import make_language_model
from fedqsn_jax.models.language.pretrained import load_pretrained
from fedqsn_jax.tools import convert_gguf

WIDTH, HEADS, KV_HEADS, INNER, LAYERS, BASE, EPSILON = 32, 4, 2, 64, 2, 100.0, 1e-5
SIZE = WIDTH // HEADS
BYTES = sorted(ByteLevel.alphabet())
TOKENS = ["<end>", *BYTES, "ab", "Ġab"]


def drawn() -> dict[str, np.ndarray]:
    """Tensors by GGUF's names, matrices ``[outputs, inputs]``."""
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (len(TOKENS), WIDTH), "output_norm": (WIDTH,)}
    for layer in range(LAYERS):
        names = {
            "attn_norm": (WIDTH,),
            "attn_q": (WIDTH, WIDTH),
            "attn_k": (KV_HEADS * SIZE, WIDTH),
            "attn_v": (KV_HEADS * SIZE, WIDTH),
            "attn_output": (WIDTH, WIDTH),
            "ffn_norm": (WIDTH,),
            "ffn_gate": (INNER, WIDTH),
            "ffn_up": (INNER, WIDTH),
            "ffn_down": (WIDTH, INNER),
        }
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in names.items()}
    return {
        f"{name}.weight": rng.normal(1.0 if len(shape) == 1 else 0.0, 0.3, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def write(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a GGUF file; one matrix in codes of 8 bits."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_vocab_size(len(TOKENS))
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_rope_freq_base(BASE)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] + [1] * (len(TOKENS) - 1))
    writer.add_token_merges(["a b", "Ġ ab"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    for name, array in tensors.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if name == "blk.1.ffn_up.weight" else None
        stored = array if kind is None else gguf.quantize(array, kind)
        writer.add_tensor(name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def in_codes_of_8_bits(array: np.ndarray) -> np.ndarray:
    """Blocks of 32 numbers, each with a float16 scale, the largest size over 127."""
    blocks = array.reshape(-1, 32)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / 127
    return (np.round(blocks / scale) * scale.astype(np.float16)).reshape(array.shape)


def logits_of(tensors: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """LLaMA's logits ``[tokens, vocabulary]``, where pairs that turn together are neighbours."""

    def weight(name):
        return tensors[f"{name}.weight"].astype(np.float64)

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * weight(name)

    def turned(x):
        pairs = x.reshape(*x.shape[:-1], SIZE // 2, 2)
        pairs = pairs[..., 0] + 1j * pairs[..., 1]
        frequencies = BASE ** (-2 * np.arange(SIZE // 2) / SIZE)
        turn = np.exp(1j * np.arange(len(tokens))[:, None] * frequencies)
        return pairs * turn[:, None]

    x, length = weight("token_embd")[tokens], len(tokens)
    for layer in range(LAYERS):
        name = f"blk.{layer}"
        read = norm(x, f"{name}.attn_norm")
        query, key, value = (
            (read @ weight(f"{name}.attn_{part}").T).reshape(length, -1, SIZE) for part in "qkv"
        )
        query, key = turned(query), turned(key)
        attended = []
        for head in range(HEADS):
            shared = head // (HEADS // KV_HEADS)
            scores = (query[:, head] @ key[:, shared].conj().T).real / np.sqrt(SIZE)
            scores[np.triu_indices(length, 1)] = -np.inf
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            attended.append(shares / shares.sum(-1, keepdims=True) @ value[:, shared])
        x = x + np.concatenate(attended, axis=-1) @ weight(f"{name}.attn_output").T
        read = norm(x, f"{name}.ffn_norm")
        gate = read @ weight(f"{name}.ffn_gate").T
        inner = gate / (1 + np.exp(-gate)) * (read @ weight(f"{name}.ffn_up").T)
        x = x + inner @ weight(f"{name}.ffn_down").T
    return norm(x, "output_norm") @ weight("token_embd").T


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The tensors, and the directory that the conversion of their file has made."""
    place, tensors = tmp_path_factory.mktemp("gguf"), drawn()
    write(place / "model.gguf", tensors)
    convert_gguf.convert(place / "model.gguf", place / "out")
    return tensors, place / "out"


def test_the_converted_model_computes_what_the_file_says(converted):
    tensors, directory = converted
    rounded = "blk.1.ffn_up.weight"
    tensors = tensors | {rounded: in_codes_of_8_bits(tensors[rounded])}
    tokens = np.random.default_rng(1).integers(0, len(TOKENS), 11)
    pretrained = load_pretrained(directory, jax.random.key(0))
    assert (pretrained.config.tied, pretrained.fresh) == (True, ())
    model = make_language_model(pretrained.config)
    batch = {"tokens": jnp.asarray(tokens, jnp.int32)[None], "mask": jnp.ones((1, 11), bool)}
    found = jit(lambda params: model.apply_fn(params, batch, None))(pretrained.params)
    expected = logits_of(tensors, tokens)
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_the_converted_tokenizer_merges_and_takes_digits_apart(converted):
    _, directory = converted
    tokenizer = load_tokenizer(directory, len(TOKENS), 64, 0, (0,))
    found = [TOKENS[token] for token in tokenizer.tokenizer.encode("ab ab 12b<end>").ids]
    assert found == ["ab", "Ġab", "Ġ", "1", "2", "b", "<end>"]


def test_its_command_line(converted, tmp_path, capsys, monkeypatch):
    _, directory = converted
    file, out = directory.parent / "model.gguf", tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["convert_gguf.py", f"--gguf={file}", f"--out={out}"])
    assert convert_gguf.main() == 0
    assert json.loads((out / "config.json").read_text())["num_key_value_heads"] == KV_HEADS
    monkeypatch.setattr("sys.argv", ["convert_gguf.py", "--package=nowhere", f"--out={out}"])
    assert convert_gguf.main() == 2
    assert "convert_gguf.py: --package=nowhere: no such file" in capsys.readouterr().err
