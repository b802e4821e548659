"""FedQSN in JAX: federated learning in which the server's model is the secret.

`federate` is the one call for a model and clients' arrays of your own. The rest are the pure parts
that it is made of: masks and quantizers, proxy transforms, client update, aggregation, rounds.
"""

import importlib
from typing import Any

_PUBLIC = {
    "api.own_model": ("Federated", "federate"),
    "runs.trained": ("Trained", "load"),
    "audit.case": ("OwnModel",),
    "audit.running": ("audit_run",),
    "audit.scene": ("AuditSettings",),
    "config.schema": ("Config", "ConfigError", "default_config", "resolve"),
    "protocol.sites": ("MaskSite", "Sites", "embedding_rules", "find_sites"),
    "protocol.broadcast": ("Broadcast",),
    "protocol.masks": ("draw_masks", "hide"),
    "protocol.quantization": ("NormalFloat", "SymmetricNormalFloat", "Quantized", "Uniform"),
    "protocol.proxy": (
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
    "rounds.client": ("ClientResult", "ClientUpdate", "Training", "make_client_update"),
    "rounds.aggregation": (
        "Aggregator",
        "Contribution",
        "make_aggregator",
        "make_running_mean",
    ),
    "rounds.client_axis": ("ClientAxis", "ClientWork", "sample_cohort", "sum_over_clients"),
    "protocol.upload": ("Upload", "quantize_delta", "quantized_upload", "whole_upload"),
    "rounds.participation": ("Participation",),
    "rounds.method": ("Method",),
    "rounds.federation": (
        "Evaluation",
        "Federation",
        "ServerState",
        "make_federation",
    ),
    "rounds.calls": ("make_rounds",),
    "protocol.layout": ("Layout",),
    "protocol.lora": ("Lora", "find_adapters"),
    "core.trees": ("TensorRoles", "select_trained"),
    "protocol.algorithms": (
        "Algorithm",
        "Promise",
        "fedavg",
        "fedlpp",
        "fedq",
        "fedqsn",
        "fedsn",
        "make_algorithm",
    ),
    "protocol.wire": ("decode_proxy", "decode_update", "encode_proxy", "encode_update"),
    "rounds.evaluation": ("make_client_evaluator", "make_evaluator"),
    "prompting.prompted_model": (
        "Distillation",
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
    "core.tasks": ("Task", "classification"),
    "data.population": ("ClientData", "FederatedData", "HeldOut", "from_clients"),
    "data.streamed": ("HostData",),
    "models.functional": ("in_compute_dtype", "linen_apply", "linen_init", "nnx_split"),
    "models.language.families": ("LanguageModel", "make_language_model"),
    "models.language.pretrained": (
        "Pretrained",
        "load_pretrained",
        "read_config",
        "save_pretrained",
    ),
    "models.language.transformer": ("Execution",),
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
