"""Writes the goldens of pretrained_parity_test.py: tiny models of the transformers library.

  pip install torch==2.13.0 transformers
  python tests/models/language/make_parity_goldens.py [tests/goldens/language [NAME ...]]

Each directory holds a model as that library saves it (``config.json`` and safetensors) and
``golden.npz``: inputs, what the model computes of them, and what it generates greedily. All weights
are random, norms and biases too, so that none of them can be left out unnoticed.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

VOCAB, LENGTH, NEW_TOKENS = 40, 9, 5
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Padding on the right, on the left, and none.
RIGHT = [[1] * 9, [1] * 6 + [0] * 3, [1] * 4 + [0] * 5]
LEFT = [[1] * 9, [0] * 3 + [1] * 6, [0] * 5 + [1] * 4]


def models() -> dict[str, Callable[[], Any]]:
    """Returns makers of the models by directory."""
    t = transformers
    t5 = {
        "vocab_size": VOCAB,
        "d_model": 16,
        "d_kv": 6,
        "num_heads": 4,
        "d_ff": 24,
        "num_layers": 2,
        "num_decoder_layers": 3,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 12,
        "decoder_start_token_id": 0,
    }
    gpt2 = {
        "vocab_size": VOCAB,
        "n_embd": 16,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 32,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return {
        "bert": lambda: t.BertForSequenceClassification(t.BertConfig(**SIZES, num_labels=3)),
        "bert_base": lambda: t.BertModel(t.BertConfig(**SIZES)),
        "roberta": lambda: t.RobertaForSequenceClassification(
            t.RobertaConfig(**SIZES, type_vocab_size=1, layer_norm_eps=1e-5, num_labels=2)
        ),
        "xlm_roberta": lambda: t.XLMRobertaForSequenceClassification(
            t.XLMRobertaConfig(
                **SIZES | {"num_hidden_layers": 1}, type_vocab_size=1, num_labels=3
            )
        ),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**gpt2)),
        "gpt2_untied": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(**gpt2, n_inner=20, tie_word_embeddings=False)
        ),
        "llama": lambda: t.LlamaForCausalLM(
            t.LlamaConfig(**SIZES, num_key_value_heads=2, rope_parameters=LLAMA3)
        ),
        "llama_tied": lambda: t.LlamaForCausalLM(
            t.LlamaConfig(
                **SIZES,
                num_key_value_heads=1,
                head_dim=6,
                attention_bias=True,
                mlp_bias=True,
                tie_word_embeddings=True,
            )
        ),
        "qwen2": lambda: t.Qwen2ForCausalLM(
            t.Qwen2Config(
                **SIZES, num_key_value_heads=2, rope_parameters={"rope_theta": 1e6} | {
                    "rope_type": "default"
                },
            )
        ),
        **{
            f"llama_{kind}": lambda kind=kind: t.LlamaForCausalLM(
                t.LlamaConfig(
                    **SIZES | {"num_hidden_layers": 1},
                    head_dim=8,
                    rope_parameters={"rope_type": kind, "rope_theta": 100.0, "factor": 4.0}
                    | ({"original_max_position_embeddings": 8} if kind == "yarn" else {}),
                )
            )
            for kind in ("linear", "dynamic", "yarn")
        },
        # Windows shorter than the rows: in all layers, and in all but the first.
        "mistral": lambda: t.MistralForCausalLM(
            t.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4)
        ),
        "qwen3": lambda: t.Qwen3ForCausalLM(
            t.Qwen3Config(
                **SIZES,
                num_key_value_heads=2,
                head_dim=6,
                use_sliding_window=True,
                sliding_window=3,
                max_window_layers=1,
                attention_bias=True,
            )
        ),
        "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(**t5)),
        "t5_v1_1": lambda: t.T5ForConditionalGeneration(
            t.T5Config(**t5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
        ),
        # Half of each head turns, and longer sequences would turn otherwise.
        "phi3": lambda: t.Phi3ForCausalLM(
            t.Phi3Config(
                **SIZES | {"hidden_size": 32},
                num_key_value_heads=2,
                sliding_window=5,
                pad_token_id=0,
                original_max_position_embeddings=16,
                rope_parameters={
                    "rope_type": "longrope",
                    "rope_theta": 100.0,
                    "partial_rotary_factor": 0.5,
                    "short_factor": [1.0, 1.7],
                    "long_factor": [2.0, 9.0],
                    "original_max_position_embeddings": 16,
                },
            )
        ),
        # Caps that are felt, windows shorter than the rows, and layers of both kinds.
        "gemma2": lambda: t.Gemma2ForCausalLM(
            t.Gemma2Config(
                **SIZES,
                num_key_value_heads=2,
                head_dim=6,
                query_pre_attn_scalar=5,
                attn_logit_softcapping=2.0,
                final_logit_softcapping=3.0,
                sliding_window=3,
                attn_implementation="eager",
            )
        ),
        "gemma3": lambda: t.Gemma3ForCausalLM(
            t.Gemma3TextConfig(
                **SIZES,
                num_key_value_heads=2,
                head_dim=6,
                query_pre_attn_scalar=5,
                sliding_window=3,
                layer_types=["sliding_attention", "full_attention", "sliding_attention"],
                rope_parameters={
                    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
                    "full_attention": {
                        "rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0
                    },
                },
            )
        ),
        "distilbert": lambda: t.DistilBertForSequenceClassification(
            t.DistilBertConfig(
                vocab_size=VOCAB, dim=16, n_layers=2, n_heads=4, hidden_dim=24,
                max_position_embeddings=32, num_labels=3,
            )
        ),
    }  # fmt: skip


def randomize(model: Any, seed: int) -> None:
    """Draws every parameter, norms around one."""
    generator = torch.Generator().manual_seed(seed)
    if getattr(model.config, "scale_decoder_outputs", True) is False:
        # This version of the library ties the output layer of T5 1.1, which is its own.
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm = "norm" in name.lower() or ".ln_" in name
        around = 1.0 if is_norm and name.endswith("weight") else 0.0
        with torch.no_grad():
            parameter.copy_(around + 0.25 * noise)


def outputs_of(model: Any) -> dict[str, np.ndarray]:
    """Returns inputs and what the model makes of them."""
    rng = np.random.default_rng(0)
    # Ids from 2 on: 0 and 1 are paddings, of which some models know by the id alone.
    tokens = torch.tensor(rng.integers(2, VOCAB, (3, LENGTH)))
    target = torch.tensor(rng.integers(2, VOCAB, (3, 6)))
    right, left = torch.tensor(RIGHT), torch.tensor(LEFT)
    kind = model.config.model_type
    if kind in ("bert", "roberta", "xlm-roberta", "distilbert"):
        pad = model.config.pad_token_id
        tokens = torch.where(right == 1, tokens, pad)
        found = {"tokens": tokens, "mask": right}
        inputs = {"input_ids": tokens, "attention_mask": right}
        if kind != "distilbert":
            types = torch.tensor(rng.integers(0, model.config.type_vocab_size, (3, LENGTH)))
            inputs["token_type_ids"] = found["types"] = types
        result = model(**inputs, output_hidden_states=True)
        found |= {"hidden": result.hidden_states[-1]}
        return found | ({"logits": result.logits} if "logits" in result else {})
    found = {"tokens": tokens, "mask": right, "mask_left": left}
    generation = {
        "do_sample": False,
        "max_new_tokens": NEW_TOKENS,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    if kind == "t5":
        logits = model(input_ids=tokens, attention_mask=right, labels=target).logits
        # Its cache has room for as many layers as the encoder has, so without.
        generated = model.generate(
            input_ids=tokens, attention_mask=right, use_cache=False, **generation
        )
        return found | {"target": target, "logits": logits, "generated": generated[:, 1:]}
    found["logits"] = model(input_ids=tokens, attention_mask=right).logits
    positions = (left.cumsum(1) - 1).clamp(min=0)
    found["logits_left"] = model(
        input_ids=tokens, attention_mask=left, position_ids=positions
    ).logits
    generated = model.generate(input_ids=tokens, attention_mask=left, **generation)
    return found | {"generated": generated[:, LENGTH:]}


def main() -> None:
    """Writes all of them."""
    transformers.utils.logging.disable_progress_bar()
    default = Path(__file__).parents[2] / "goldens" / "language"
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    wanted = sys.argv[2:]
    for seed, (name, make) in enumerate(models().items()):
        if wanted and name not in wanted:
            continue
        torch.manual_seed(0)
        model = make().eval()
        randomize(model, seed)
        place = directory / name
        shutil.rmtree(place, ignore_errors=True)
        # One of them in several files.
        model.save_pretrained(place, max_shard_size="16KB" if name == "llama" else "1GB")
        (place / "generation_config.json").unlink(missing_ok=True)
        with torch.no_grad():
            found = {key: value.numpy() for key, value in outputs_of(model).items()}
        for key, value in found.items():
            found[key] = value.astype(np.float32 if value.dtype.kind == "f" else np.int32)
        np.savez_compressed(place / "golden.npz", **found)
        size = sum(file.stat().st_size for file in place.iterdir())
        kind = json.loads((place / "config.json").read_text())["model_type"]
        print(f"{name}: {kind}, {size} bytes")


if __name__ == "__main__":
    main()
