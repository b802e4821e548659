"""FedQSN on data-to-text and summaries with GPT-2, LLaMA or T5, the paper's set-up.

  pip install 'fedqsn_jax[language]' huggingface_hub
  python -m fedqsn_jax.main --config=configs/nlg.py:e2e,gpt2-medium --workdir=DIR

After the file's name stand the task (e2e, dart, viggo, dialogsum), the model (gpt2, gpt2-medium,
gpt2-large, gpt2-xl, llama-3.2-1b, t5-base; any other name on the Hugging Face hub) and, if it is
not FedQSN, the algorithm: ``nlg.py:dart,gpt2-xl,fedavg``, or ``released``: FedQSN with the choices
of the authors' code. A model that is already on disk:
``--config.model.pretrained=DIR``. E2E and DART are TFDS's, prepared once in an environment with
TensorFlow (``tfds build e2e_cleaned --file_format=array_record``); ViGGO and DialogSum are files
that the user names: ``--config.data.train=jsonl:train.jsonl --config.data.test=jsonl:test.jsonl``.

25 clients, 5 a round, 10 rounds, 1 epoch are all that the authors' code shows; AdamW with warm-up
of 6% and label smoothing 0.1 are the paper's too. Dropout is 0, though GPT-2's and T5's own
configurations have 0.1 (LLaMA's has 0); ``--config.client.dropout=0.1`` and
``--config.pretraining.dropout=0.1`` set it for clients and server. At the end every view answers
the first 630 prompts by a beam search of 10; ``--config.generation.prompts=0`` leaves that out.

A GPU with room for the model is wanted: with random weights a round of 2 clients, 16 steps of 8
rows of 128 tokens each, takes 74.3 GiB and 2.24 s for GPT-2 XL, 53.2 GiB and 1.38 s for the shape
of LLaMA 3.2 1B (one H200, JAX 0.11.2, 2026-11-25). Neither scores nor the time of a whole run were
measured.
"""

from fedqsn_jax.config import as_released, default_config
from fedqsn_jax.config.file_argument import FileArgument, read_file_argument

SOURCES = {"e2e": "tfds:e2e_cleaned", "dart": "tfds:dart", "viggo": "", "dialogsum": ""}
HUB_NAMES = {
    **{f"gpt2{size}": f"openai-community/gpt2{size}" for size in ("", "-medium", "-large", "-xl")},
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "t5-base": "google-t5/t5-base",
}


def get_config(argument: str = "e2e"):
    """Returns the configuration that the words after the file's name ask for."""
    default = FileArgument("e2e", HUB_NAMES["gpt2-medium"])
    chosen = read_file_argument(argument, default, SOURCES, HUB_NAMES)
    config = default_config()
    config.algorithm = chosen.algorithm
    config.data.name = "text"
    config.data.task = chosen.task
    config.model.name = "language"
    config.model.pretrained = chosen.model
    config.data.train = SOURCES[config.data.task]
    config.data.private_rows = 500
    config.data.clients = 25
    config.data.partition = "iid"
    config.rounds = 10
    config.rounds_per_call = 1
    config.cohort.size = 5
    config.client.epochs = 1
    config.client.compute_dtype = "bfloat16"
    config.client.label_smoothing = 0.1
    config.pretraining.steps = 64
    for training in (config.pretraining, config.client):
        training.batch_size = 8
        training.optimizer = "adamw"
        training.learning_rate = 5e-5
        training.weight_decay = 0.01
        training.schedule = "linear"
    config.evaluation.every = 5
    config.evaluation.attackers = (1, 5)
    config.evaluation.proxy_samples = 2
    config.evaluation.batch_size = 16
    config.generation.prompts = 630
    config.generation.batch_size = 63
    config.checkpoint.every = 5
    config.checkpoint.keep_best = 0
    config.p1 = config.p2 = 0.1
    config.bits = 4
    config.block_size = 64
    config.sites = "residual"
    if chosen.released:
        as_released(config)
    return config
