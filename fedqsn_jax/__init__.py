"""FedQSN in JAX: federated learning in which the server's model is the secret.

`federate` is the one call for a model and clients' arrays of your own. The rest are the pure parts
that it is made of: masks and quantizers, proxy transforms, client update, aggregation, rounds.
"""

import importlib
from typing import Any

_PUBLIC = {
    "own_model": ("Federated", "federate"),
    "trained": ("Trained", "load"),
    "config": ("Config", "ConfigError", "default_config", "resolve"),
    "masking": ("MaskSite", "draw_masks", "embedding_rules", "find_sites", "hide"),
    "quantization": ("NormalFloat", "SymmetricNormalFloat", "Quantized", "Uniform"),
    "proxy": (
        "Proxy",
        "ProxyTransform",
        "chain",
        "client_mask",
        "dequantize_proxy",
        "effective_params",
        "identity",
        "quantize",
        "select_columns",
        "server_mask",
        "whole_proxy",
    ),
    "client": ("ClientResult", "ClientUpdate", "Training", "make_client_update"),
    "aggregation": ("Aggregator", "Contribution", "make_aggregator"),
    "cohort": ("ClientAxis", "ClientWork", "sample_cohort", "sum_over_clients"),
    "upload": ("Upload", "quantize_delta", "quantized_upload", "whole_upload"),
    "participation": ("Participation",),
    "rounds": ("Federation", "ServerState", "make_federation", "make_rounds"),
    "layout": ("Layout",),
    "lora": ("Lora", "find_adapters"),
    "trainable": ("select_trained",),
    "algorithms": ("Algorithm", "fedavg", "fedlpp", "fedq", "fedqsn", "fedsn", "make_algorithm"),
    "wire": ("decode_proxy", "decode_update", "encode_proxy", "encode_update"),
    "metrics": ("make_evaluator",),
    "client_metrics": ("make_client_evaluator",),
    "fedsp": (
        "add_prompts",
        "alternating",
        "auxiliary_encoder",
        "distil",
        "parts_of",
        "prompted_apply",
        "prompted_encoder",
        "returning",
        "take_layers",
    ),
    "tasks": ("Task", "classification"),
    "data.federated": ("ClientData", "FederatedData", "from_clients"),
    "data.streamed": ("HostData",),
    "data.held_out": ("HeldOut",),
    "models.adapters": ("in_compute_dtype", "linen_apply", "linen_init", "nnx_split"),
    "models.language": ("LanguageModel", "make_language_model"),
    "models.pretrained": ("Pretrained", "load_pretrained", "read_config", "save_pretrained"),
    "models.transformer": ("Execution",),
}
_MODULES = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: a mistake in a command should not cost JAX."""
    if name not in _MODULES:
        raise AttributeError(f"module 'fedqsn_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fedqsn_jax.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
