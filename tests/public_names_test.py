"""The package's names: typed, shown in a document, and those of earlier versions still there."""

import ast
import re
import textwrap

from locations import PACKAGE
from mypy import api

import fedqsn_jax

# Those of version 6d8e85d.
EARLIER_NAMES = """
Aggregator Algorithm ClientAxis ClientData ClientResult ClientUpdate ClientWork Config
ConfigError Contribution Execution Federated FederatedData Federation HeldOut HostData
LanguageModel Layout Lora MaskSite NormalFloat Participation Pretrained Proxy ProxyTransform
Quantized ServerState SymmetricNormalFloat Task Trained Training Uniform Upload add_prompts
alternating auxiliary_encoder chain classification client_mask decode_proxy decode_update
default_config dequantize_proxy distil draw_masks effective_params embedding_rules encode_proxy
encode_update fedavg federate fedlpp fedq fedqsn fedsn find_adapters find_sites from_clients
hide identity in_compute_dtype linen_apply linen_init load load_pretrained make_aggregator
make_algorithm make_client_evaluator make_client_update make_evaluator make_federation
make_language_model make_rounds nnx_split parts_of prompted_apply prompted_encoder quantize
quantize_delta quantized_upload read_config resolve returning sample_cohort save_pretrained
select_columns select_trained server_mask sum_over_clients take_layers whole_proxy whole_upload
"""
EARLIER = re.findall(r"\w+", EARLIER_NAMES)


def test_earlier_names_can_still_be_imported():
    for name in EARLIER:
        assert getattr(fedqsn_jax, name).__module__.startswith("fedqsn_jax."), name


def test_type_checkers_and_python_have_the_same_names():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.asname: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(typed) >= set(fedqsn_jax.__all__) | set(EARLIER)
    for name, module in typed.items():
        value = getattr(fedqsn_jax, name)
        assert value is getattr(__import__(module, fromlist=[name]), name), name


def test_every_public_name_is_shown_in_a_document():
    shown = "".join(path.read_text() for path in PACKAGE.rglob("README.md"))
    assert set(fedqsn_jax.__all__) <= set(re.findall(r"\w+", shown))


def test_a_script_of_a_users_has_real_types(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """\
            import numpy as np
            from flax import nnx
            from fedqsn_jax import (
                NormalFloat, chain, client_mask, federate, find_sites, load, nnx_split, quantize
            )
            rows = {"image": np.ones((3, 2)), "label": np.zeros(3)}
            model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
            result = federate(model, [rows], rows, rounds=2)
            reveal_type(result.history)
            reveal_type(result.tensors[0])
            reveal_type(load("runs/own").round)
            reveal_type(chain(quantize(NormalFloat(4, 64)), client_mask(0.2)).apply)
            reveal_type(find_sites(nnx_split(model)[0])[0].columns)
            federate(model, 3, rows)
            find_sites()
            """
        )
    )
    # As a user's mypy: the package is installed and says that it has types.
    told, problems, status = api.run(["--no-error-summary", "--strict", str(script)])
    assert (problems, status) == ("", 1), told
    types = re.findall(r'Revealed type is "(.*)"', told)
    ours = [re.sub(r"\b(fedqsn_jax|jax)\.[\w.]*\.(?=\w)", "", each) for each in types]
    assert ours[:3] == ["list[dict[str, Any]]", "TensorRow", "int"], told
    assert re.fullmatch(r"def \(.*\) -> Proxy", ours[3]), told
    assert ours[4] == "int", told
    errors = re.findall(r"script\.py:(\d+): error: .*\[([\w-]+)\]", told)
    assert errors == [("14", "arg-type"), ("15", "call-arg")], told
