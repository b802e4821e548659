"""FedQSN on CIFAR-10: a CNN of three convolutions or ResNet-18, 100 clients with label skew.

  python -m fedqsn_jax.main --config=configs/cifar10.py --workdir=DIR

The data must have been prepared once, in an environment with TensorFlow
(``pip install 'fedqsn_jax[prepare]'``):

  tfds build cifar10 --data_dir=DATA --file_format=array_record

and is then read without TensorFlow, from TFDS's default directory or ``--config.data.directory``.
``:fedavg``, ``:fedsn`` and ``:fedq`` after the file's name run the same with another algorithm,
``:resnet18`` with ResNet-18 with group norm; ``:fedavg,resnet18`` does both.
Neither the accuracy nor the time of a run has been measured yet.

60000 images of 32x32 colour pixels: the 10000 of the test split are for testing, 5000 of the
others are the server's own, the rest is dealt to 100 clients by Dirichlet(0.5) label skew. Images
are not augmented.
"""

from fedqsn_jax.config import default_config
from fedqsn_jax.config.schema import MODELS


def get_config(variant: str = "fedqsn"):
    """Returns the configuration of a variant: an algorithm, a model, or both with a comma."""
    config = default_config()
    config.model.name = "cnn"
    for choice in variant.split(","):
        if choice in MODELS:
            config.model.name = choice
        else:
            config.algorithm = choice
    config.rounds = 300
    config.data.name = "cifar10"
    config.data.clients = 100
    config.data.partition = "dirichlet"
    config.data.alpha = 0.5
    config.data.private_rows = 5000
    config.model.channels = (32, 64, 128)
    config.model.dense = 256
    config.pretraining.steps = 2000
    config.pretraining.batch_size = 64
    config.pretraining.learning_rate = 0.05
    config.pretraining.dropout = 0.3
    config.cohort.size = 10
    config.client.epochs = 1
    config.client.batch_size = 32
    config.client.learning_rate = 0.05
    config.evaluation.every = 10
    config.p1 = config.p2 = 0.2
    config.bits = 4
    config.block_size = 64
    return config
