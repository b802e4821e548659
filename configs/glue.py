"""FedQSN on GLUE with RoBERTa, the paper's set-up: 25 clients, 5 a round, 10 rounds, 1 epoch.

  pip install 'fedqsn_jax[language]' huggingface_hub
  python -m fedqsn_jax.main --config=configs/glue.py:sst2,roberta-base --workdir=DIR

After the file's name stand the task (rte, sst2, mrpc, qqp, qnli, mnli), the model (roberta-base,
roberta-large; any other name on the Hugging Face hub) and, if it is not FedQSN, the algorithm:
``glue.py:rte,roberta-large,fedavg``, or ``released``: FedQSN with the choices of the authors' code.
A model that is already on disk: ``--config.model.pretrained=DIR``. The rows are TFDS's, prepared
once in an environment with TensorFlow (``tfds build glue/sst2 --file_format=array_record``), or the
user's own files: ``--config.data.train=tsv:train.tsv --config.data.test=tsv:dev.tsv``.

Numbers of clients, rounds and epochs are all that the authors' code shows; rate and batch are those
usual for RoBERTa on GLUE. Dropout is 0.1, for server and clients, as in RoBERTa's own
configuration. A GPU is wanted: with that dropout and random weights a step of RoBERTa-base on 64
rows of 128 tokens takes 11.2 ms on an H200 (JAX 0.11.2, 2026-11-30). Neither the accuracy nor the
time of a whole run was measured.
"""

from fedqsn_jax.config import as_released, default_config
from fedqsn_jax.config.file_argument import FileArgument, read_file_argument

TASKS = ("rte", "sst2", "mrpc", "qqp", "qnli", "mnli")
HUB_NAMES = {"roberta-base": "FacebookAI/roberta-base", "roberta-large": "FacebookAI/roberta-large"}


def get_config(argument: str = "sst2"):
    """Returns the configuration that the words after the file's name ask for."""
    default = FileArgument("sst2", HUB_NAMES["roberta-base"])
    chosen = read_file_argument(argument, default, TASKS, HUB_NAMES)
    config = default_config()
    config.algorithm = chosen.algorithm
    config.data.name = "text"
    config.data.task = chosen.task
    config.model.name = "language"
    config.model.pretrained = chosen.model
    config.data.train = f"tfds:glue/{config.data.task}"
    config.data.private_rows = 500
    config.data.clients = 25
    config.data.partition = "dirichlet"
    config.data.alpha = 1.0
    config.rounds = 10
    config.rounds_per_call = 1
    config.cohort.size = 5
    config.client.epochs = 1
    config.client.compute_dtype = "bfloat16"
    config.pretraining.steps = 64
    for training in (config.pretraining, config.client):
        training.batch_size = 32
        training.optimizer = "adamw"
        training.learning_rate = 2e-5
        training.weight_decay = 0.01
        training.schedule = "linear"
        training.dropout = 0.1
    config.model.unroll = 12
    config.evaluation.attackers = (1, 5)
    config.evaluation.proxy_samples = 2
    config.evaluation.batch_size = 64
    config.checkpoint.every = 5
    config.p1 = config.p2 = 0.1
    config.bits = 4
    config.block_size = 64
    config.sites = "residual"
    if chosen.released:
        as_released(config)
    return config
