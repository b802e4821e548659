"""FedQSN on EMNIST (by class): a small CNN, 500 clients that know few of the 62 characters each.

  python -m fedqsn_jax.main --config=configs/emnist.py --workdir=DIR

The data must have been prepared once, in an environment with TensorFlow
(``pip install 'fedqsn_jax[prepare]'``):

  tfds build emnist/byclass --data_dir=DATA --file_format=array_record

and is then read without TensorFlow, from TFDS's default directory or ``--config.data.directory``.
``:fedavg``, ``:fedsn`` and ``:fedq`` after the file's name run the same with another algorithm.
Neither the accuracy nor the time of a run has been measured yet.

814255 images of 28x28 grey pixels: the 116323 of the test split are for testing, 10000 of the
others are the server's own, the rest is sorted by label, cut into 2500 shards, and dealt to 500
clients. TFDS's version does not say who wrote what, so the natural partition is refused for it;
data that was prepared with a feature ``client_id`` or ``writer_id`` allows it.
"""

from fedqsn_jax.config import default_config


def get_config(algorithm: str = "fedqsn"):
    """Returns the configuration."""
    config = default_config()
    config.algorithm = algorithm
    config.rounds = 200
    config.data.name = "emnist"
    config.data.clients = 500
    config.data.partition = "shards"
    config.data.shards_per_client = 5
    config.data.private_rows = 10000
    config.model.name = "cnn"
    config.model.channels = (32, 64)
    config.model.dense = 256
    config.pretraining.steps = 2000
    config.pretraining.batch_size = 64
    config.pretraining.learning_rate = 0.05
    config.pretraining.dropout = 0.3
    config.cohort.size = 20
    config.client.steps = 40
    config.client.batch_size = 32
    config.client.learning_rate = 0.05
    config.evaluation.every = 10
    config.p1 = config.p2 = 0.2
    config.bits = 4
    config.block_size = 64
    return config
