"""The words that fields of a configuration may have as values."""

FEDSP = "fedsp"
ALGORITHMS = ("fedavg", "fedsn", "fedq", "fedqsn", "fedlpp", FEDSP)
CODEBOOKS = ("normal_float", "symmetric_normal_float", "uniform")
IMAGE_SETS = ("digits", "mnist", "emnist", "cifar10")
TEXT = "text"
DATA_SETS = (*IMAGE_SETS, TEXT)
IMAGE_MODELS = ("mlp", "cnn", "resnet18")
LANGUAGE = "language"
MODELS = (*IMAGE_MODELS, LANGUAGE)
STEMS = ("cifar", "imagenet")
OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "linear")
ATTENTIONS = ("auto", "xla", "cudnn")
POOLINGS = ("auto", "cls", "mean")
SERVER_OPTIMIZERS = ("sgd", "adagrad", "adam", "yogi", "lamb", "adafactor")
PARTITIONS = ("dirichlet", "shards", "natural", "iid")
COMPUTE_DTYPES = ("float32", "bfloat16")
RESIDENCES = ("auto", "device", "host")
PARALLELISM = ("auto", "scan", "vmap", "mesh")
MASKS_PER = ("round", "client")
COHORT_SAMPLING = ("without_replacement", "poisson")
RULES = ("delta", "from_sent", "interpolate")
TUNED = ("prompts", "classifier")
CLASSIFICATION = ("sst2", "rte", "qnli", "mnli", "mrpc", "qqp")
"""The tasks of the package whose rows have a label; of others texts are written."""
