"""Invariant 3: what is hidden leaves no trace in a payload."""

import ast
import inspect

import jax
import numpy as np
import pytest
from wire_cases import COMPILE_FAST, assert_same

from fedqsn_jax.protocol import layout, wire
from fedqsn_jax.protocol.layout import Layout
from fedqsn_jax.protocol.proxy import (
    chain,
    client_mask,
    identity,
    quantize,
    server_mask,
    whole_proxy,
)
from fedqsn_jax.protocol.quantization import NormalFloat


@pytest.mark.parametrize("quantizer", [None, NormalFloat(4, 4)])
def test_hidden_values_of_the_server_leave_no_trace(model, set_hidden, quantizer):
    first = identity() if quantizer is None else quantize(quantizer)
    transform = chain(first, server_mask(0.4), client_mask(0.3))
    whole = whole_proxy(model.params, model.sites)
    init = jax.jit(transform.init, compiler_options=COMPILE_FAST)
    state = init(jax.random.key(5), whole)

    @jax.jit
    def make(params):
        prepared = transform.prepare(state, whole_proxy(params, model.sites))
        return transform.apply(jax.random.key(6), state, prepared)

    def payload(params):
        proxy = make(params)
        return wire.encode_proxy(proxy), proxy.visible

    expected, visible = payload(model.params)
    assert not all(mask.all() for mask in visible.values())
    for value in (np.nan, np.inf, 1e30):
        assert payload(set_hidden(model.params, model.sites, visible, value))[0] == expected
    everything = {path: np.ones_like(mask) for path, mask in visible.items()}
    shown = {path: everything[path] & ~np.asarray(mask) for path, mask in visible.items()}
    assert payload(set_hidden(model.params, model.sites, shown, 1e30))[0] != expected


def test_hidden_values_of_a_client_leave_no_trace(model, set_hidden):
    visible = {site.path: np.arange(site.columns)[None] % 3 > 0 for site in model.sites}
    layout = Layout.of(whole_proxy(model.params, model.sites).replace(visible=visible))
    expected = wire.encode_update(model.params, visible, layout)
    for value in (0.0, np.nan, 1e30):
        changed = set_hidden(model.params, model.sites, visible, value)
        assert wire.encode_update(changed, visible, layout) == expected
    zeroed = set_hidden(model.params, model.sites, visible, 0.0)
    assert_same(wire.decode_update(expected, layout), (zeroed, visible))


def test_wire_imports_nothing_that_holds_secrets():
    own = set()
    for module in (wire, layout):
        tree = ast.parse(inspect.getsource(module))
        own |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        own |= {
            each.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for each in node.names
        }
    allowed = (
        "core.trees",
        "core.types",
        "protocol.layout",
        "protocol.proxy",
        "protocol.quantization",
        "protocol.sites",
    )
    assert {name for name in own if name.startswith("fedqsn_jax")} == {
        f"fedqsn_jax.{name}" for name in allowed
    }
