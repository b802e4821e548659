"""FedQSN on scikit-learn's handwritten digits: no download, half a minute on two CPU cores.

  python -m fedqsn_jax.main --config=configs/digits.py --workdir=runs/digits

``:fedavg``, ``:fedsn`` (masks only), ``:fedq`` (quantizer only) and ``:fedlpp`` (quantized adapters
of rank 8 on a public model) after the file's name run the same with another algorithm, and
``--config.lora.rank=8`` with adapters; ``:released`` with the choices of the released code of
FedQSN, of which blocks that mix columns let hidden values show. What to expect is in the README,
with the figures' spread.

1797 images of 8x8 pixels: 360 rows are held out for testing, 200 are the server's own, the rest is
dealt to 20 clients by Dirichlet(0.5) label skew.
"""

from fedqsn_jax.config import as_released, default_config


def get_config(algorithm: str = "fedqsn"):
    """Returns the configuration."""
    config = default_config()
    config.algorithm = "fedqsn" if algorithm == "released" else algorithm
    config.rounds = 60
    config.data.name = "digits"
    config.data.clients = 20
    config.data.partition = "dirichlet"
    config.data.alpha = 0.5
    config.data.private_rows = 200
    config.data.test_rows = 360
    config.model.name = "mlp"
    config.model.hidden = (256, 256)
    config.pretraining.steps = 400
    config.pretraining.batch_size = 64
    config.pretraining.learning_rate = 0.1
    config.pretraining.dropout = 0.3
    config.cohort.size = 10
    config.client.steps = 20
    config.client.batch_size = 32
    config.client.learning_rate = 0.1
    config.p1 = config.p2 = 0.2
    config.bits = 4
    if algorithm == "fedlpp":
        config.lora.rank = 8
    config.block_size = 64
    if algorithm == "released":
        as_released(config)
    return config
