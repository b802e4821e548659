"""FedQSN in JAX: federated learning in which the server's model is the secret.

`federate` is the one call for a model and clients' arrays of your own. The rest are the pure parts
that it is made of: masks and quantizers, proxy transforms, client update, aggregation, rounds. All
of them are shown in ``api/README.md``.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # For type checkers and editors; at run time each name is imported when it is first used. One
    # test holds the two lists together.
    from fedqsn_jax.api.head_from_moments import (
        NewHead as NewHead,
        head_from_moments as head_from_moments,
    )
    from fedqsn_jax.api.own_model import (
        Federated as Federated,
        federate as federate,
    )
    from fedqsn_jax.audit.case import (
        OwnModel as OwnModel,
    )
    from fedqsn_jax.audit.running import (
        audit_run as audit_run,
    )
    from fedqsn_jax.audit.scene import (
        AuditSettings as AuditSettings,
    )
    from fedqsn_jax.config.schema import (
        Config as Config,
        ConfigError as ConfigError,
        default_config as default_config,
        resolve as resolve,
    )
    from fedqsn_jax.core.tasks import (
        Task as Task,
        classification as classification,
    )
    from fedqsn_jax.core.trees import (
        TensorRoles as TensorRoles,
        select_trained as select_trained,
    )
    from fedqsn_jax.data.population import (
        ClientData as ClientData,
        FederatedData as FederatedData,
        HeldOut as HeldOut,
        from_clients as from_clients,
    )
    from fedqsn_jax.data.streamed import (
        HostData as HostData,
    )
    from fedqsn_jax.models.functional import (
        in_compute_dtype as in_compute_dtype,
        linen_apply as linen_apply,
        linen_init as linen_init,
        nnx_split as nnx_split,
        nnx_update as nnx_update,
    )
    from fedqsn_jax.models.language.families import (
        LanguageModel as LanguageModel,
        make_language_model as make_language_model,
    )
    from fedqsn_jax.models.language.pretrained import (
        Pretrained as Pretrained,
        load_pretrained as load_pretrained,
        read_config as read_config,
        save_pretrained as save_pretrained,
    )
    from fedqsn_jax.models.language.transformer import (
        Execution as Execution,
    )
    from fedqsn_jax.prompting.prompted_model import (
        Distillation as Distillation,
        add_prompts as add_prompts,
        alternating as alternating,
        auxiliary_encoder as auxiliary_encoder,
        distil as distil,
        parts_of as parts_of,
        prompted_apply as prompted_apply,
        prompted_encoder as prompted_encoder,
        returning as returning,
        take_layers as take_layers,
    )
    from fedqsn_jax.protocol.algorithms import (
        Algorithm as Algorithm,
        Promise as Promise,
        fedavg as fedavg,
        fedlpp as fedlpp,
        fedq as fedq,
        fedqsn as fedqsn,
        fedsn as fedsn,
        make_algorithm as make_algorithm,
    )
    from fedqsn_jax.protocol.broadcast import (
        Broadcast as Broadcast,
    )
    from fedqsn_jax.protocol.layout import (
        Layout as Layout,
    )
    from fedqsn_jax.protocol.lora import (
        Lora as Lora,
        find_adapters as find_adapters,
    )
    from fedqsn_jax.protocol.masks import (
        draw_masks as draw_masks,
        hide as hide,
    )
    from fedqsn_jax.protocol.proxy import (
        Proxy as Proxy,
        ProxyTransform as ProxyTransform,
        chain as chain,
        client_mask as client_mask,
        dequantize_proxy as dequantize_proxy,
        effective_params as effective_params,
        identity as identity,
        quantize as quantize,
        select_columns as select_columns,
        server_mask as server_mask,
        whole_proxy as whole_proxy,
    )
    from fedqsn_jax.protocol.quantization import (
        NormalFloat as NormalFloat,
        Quantized as Quantized,
        SymmetricNormalFloat as SymmetricNormalFloat,
        Uniform as Uniform,
    )
    from fedqsn_jax.protocol.sites import (
        MaskSite as MaskSite,
        Sites as Sites,
        embedding_rules as embedding_rules,
        find_sites as find_sites,
    )
    from fedqsn_jax.protocol.upload import (
        Upload as Upload,
        quantize_delta as quantize_delta,
        quantized_upload as quantized_upload,
        whole_upload as whole_upload,
    )
    from fedqsn_jax.protocol.wire import (
        decode_proxy as decode_proxy,
        decode_update as decode_update,
        encode_proxy as encode_proxy,
        encode_update as encode_update,
    )
    from fedqsn_jax.rounds.aggregation import (
        Aggregator as Aggregator,
        Contribution as Contribution,
        make_aggregator as make_aggregator,
        make_running_mean as make_running_mean,
    )
    from fedqsn_jax.rounds.calls import (
        make_rounds as make_rounds,
    )
    from fedqsn_jax.rounds.client import (
        ClientResult as ClientResult,
        ClientUpdate as ClientUpdate,
        Training as Training,
        make_client_update as make_client_update,
    )
    from fedqsn_jax.rounds.client_axis import (
        ClientAxis as ClientAxis,
        ClientWork as ClientWork,
        sample_cohort as sample_cohort,
        sum_over_clients as sum_over_clients,
    )
    from fedqsn_jax.rounds.evaluation import (
        make_client_evaluator as make_client_evaluator,
        make_evaluator as make_evaluator,
    )
    from fedqsn_jax.rounds.federation import (
        Evaluation as Evaluation,
        Federation as Federation,
        ServerState as ServerState,
        make_federation as make_federation,
    )
    from fedqsn_jax.rounds.method import (
        Method as Method,
    )
    from fedqsn_jax.rounds.participation import (
        Participation as Participation,
    )
    from fedqsn_jax.runs.trained import (
        Trained as Trained,
        load as load,
    )

_PUBLIC = """
api.head_from_moments: NewHead head_from_moments
api.own_model: Federated federate
audit.case: OwnModel
audit.running: audit_run
audit.scene: AuditSettings
config.schema: Config ConfigError default_config resolve
core.tasks: Task classification
core.trees: TensorRoles select_trained
data.population: ClientData FederatedData HeldOut from_clients
data.streamed: HostData
models.functional: in_compute_dtype linen_apply linen_init nnx_split nnx_update
models.language.families: LanguageModel make_language_model
models.language.pretrained: Pretrained load_pretrained read_config save_pretrained
models.language.transformer: Execution
protocol.algorithms: Algorithm Promise fedavg fedlpp fedq fedqsn fedsn make_algorithm
protocol.broadcast: Broadcast
protocol.layout: Layout
protocol.lora: Lora find_adapters
protocol.masks: draw_masks
protocol.proxy: Proxy ProxyTransform chain client_mask effective_params identity quantize
protocol.proxy: server_mask
protocol.quantization: NormalFloat Quantized SymmetricNormalFloat Uniform
protocol.sites: MaskSite Sites find_sites
protocol.upload: Upload quantized_upload
protocol.wire: decode_proxy decode_update encode_proxy encode_update
rounds.aggregation: Aggregator make_aggregator make_running_mean
rounds.calls: make_rounds
rounds.client: ClientUpdate make_client_update
rounds.client_axis: ClientAxis sample_cohort
rounds.evaluation: make_client_evaluator make_evaluator
rounds.federation: Evaluation Federation ServerState make_federation
rounds.method: Method
rounds.participation: Participation
runs.trained: Trained load
"""
"""A module a line, and its names."""

_PARTS = """
prompting.prompted_model: Distillation add_prompts alternating auxiliary_encoder distil parts_of
prompting.prompted_model: prompted_apply prompted_encoder returning take_layers
protocol.masks: hide
protocol.proxy: dequantize_proxy select_columns whole_proxy
protocol.sites: embedding_rules
protocol.upload: quantize_delta whole_upload
rounds.aggregation: Contribution
rounds.client: ClientResult Training
rounds.client_axis: ClientWork sum_over_clients
"""
"""Names that can be imported from here, as ever, but serve only those who build other methods."""


def _by_name(listed: str) -> dict[str, str]:
    lines = (line.partition(": ") for line in listed.split("\n") if line)
    return {name: module for module, _, names in lines for name in names.split()}


__all__ = sorted(_by_name(_PUBLIC))
_MODULES = _by_name(_PUBLIC + _PARTS)


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: a mistake in a command should not cost JAX."""
    if name not in _MODULES:
        raise AttributeError(f"module 'fedqsn_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fedqsn_jax.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
