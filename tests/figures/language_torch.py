"""Measures the step of ``language.py step`` in PyTorch with transformers, for comparison.

  python tests/figures/language_torch.py    RoBERTa-base, batch 64, length 128, random weights

Needs a GPU, torch and transformers, which this project does not depend on otherwise. The model is
`RobertaForSequenceClassification` with its default attention (``sdpa``), the optimizer fused AdamW;
nothing is compiled, as in the released code of FedQSN. ``float32`` is exact: without TF32.
"""

import argparse
import statistics

import torch
from transformers import RobertaConfig, RobertaForSequenceClassification


def step_seconds(dropout: float, dtype: str, batch: int, length: int) -> float:
    """Time of one training step: the median of 5 times 8 steps, after 5."""
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=50265,
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=2,
    )
    config._attn_implementation = "sdpa"
    model = RobertaForSequenceClassification(config).to("cuda").train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=2e-5, eps=1e-6, weight_decay=0.01, fused=True
    )
    tokens = torch.randint(5, 50265, (batch, length), device="cuda")
    mask = torch.ones_like(tokens)
    labels = torch.randint(0, 2, (batch,), device="cuda")

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()

    for _ in range(5):
        step()
    times = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(8):
            step()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 8e3)
    return statistics.median(times)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    for dtype in options.dtypes:
        for dropout in (0.0, 0.1):
            took = step_seconds(dropout, dtype, options.batch, options.length)
            print(f"  RoBERTa-base, {dtype}, dropout {dropout}: {1e3 * took:.2f} ms", flush=True)


if __name__ == "__main__":
    main()
