"""Settings of `quantize`: which backend makes which scheme by which method, and what makes no sense together."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pennyweight.recipe import ACTIVATIONS, CALIBRATED, PER_CHANNEL, Quantize
from pennyweight.recipe.quantizing import CAPABILITIES

TEXT = {"calibrate": {"source": "text"}}
MADE = [
    (backend, method, scheme)
    for backend, methods in CAPABILITIES.items()
    for method, schemes in methods.items()
    for scheme in schemes
    if scheme != "auto"
]


def settings(backend: str | None, method: str, scheme: str) -> dict[str, Any]:
    text = TEXT if method in CALIBRATED else {}
    return {"scheme": scheme, "method": method, **({"backend": backend} if backend else {}), **text}


@pytest.mark.parametrize(("backend", "method", "scheme"), MADE)
def test_every_backend_makes_what_it_says(backend: str, method: str, scheme: str) -> None:
    step = Quantize(**settings(backend, method, scheme))
    assert step.maker == backend
    assert Quantize(**step.model_dump()) == step  # as a resolved recipe spells it


@pytest.mark.parametrize(
    ("method", "scheme", "maker"),
    [
        ("rtn", "w4a16", "pennyweight"),
        ("gptq", "w3a16", "pennyweight"),
        ("awq", "w8a16", "pennyweight"),
        ("rtn", "w8a8", "llm-compressor"),
        ("gptq", "w4a8", "llm-compressor"),
        ("smoothquant", "w8a8", "llm-compressor"),
        ("rtn", "fp8", "llm-compressor"),
        ("autoround", "w4a16", "auto-round"),
    ],
)
def test_backend_is_chosen_by_scheme_and_method(method: str, scheme: str, maker: str) -> None:
    assert Quantize(**settings(None, method, scheme)).maker == maker


@pytest.mark.parametrize("backend", ["pennyweight", "auto-round", "gptqmodel"])
@pytest.mark.parametrize("scheme", ACTIVATIONS)
def test_only_llm_compressor_rounds_activations(backend: str, scheme: str) -> None:
    with pytest.raises(ValidationError, match=rf"backend {backend} makes no {scheme} by rtn; llm-compressor does"):
        Quantize(scheme=scheme, backend=backend)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scheme": "fp8", "method": "gptq", **TEXT}, "nothing makes fp8 by gptq; fp8 has rtn"),
        ({"scheme": "w4a16", "method": "smoothquant", **TEXT}, "nothing makes w4a16 by smoothquant"),
        ({"scheme": "w8a8", "method": "smoothquant"}, "method smoothquant needs calibration text"),
        ({"scheme": "fp8", "kv_cache": "fp8"}, "kv_cache needs calibration text"),
        ({"scheme": "w4a16", "backend": "pennyweight", "kv_cache": "fp8", **TEXT}, "add `backend: llm-compressor`"),
        ({"scheme": "w4a8", "symmetric": False}, "without zero points; remove `symmetric`"),
        ({"scheme": "w8a8", "head": "w8a16"}, "the head of a w8a8 checkpoint stays as it is"),
        ({"scheme": "w8a8", "embedding": "w8a16"}, "leaves the embedding as it is"),
        ({"scheme": "w4a16", "smoothing": 0.8}, "`smoothing` needs method: smoothquant"),
        ({"scheme": "w4a16", "iterations": 20}, "`iterations` needs method: autoround"),
        ({"scheme": "w4a16", "dampening": 0.1}, "`dampening` needs method: gptq"),
        ({"scheme": "w8a8", "scales": "mse"}, "`scales` is for backend pennyweight"),
    ],
)
def test_what_makes_no_sense_together(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Quantize(**given)
    assert message in str(caught.value)


@pytest.mark.parametrize("scheme", PER_CHANNEL)
@pytest.mark.parametrize("extra", [{"group_size": 64}, {"symmetric": False}])
def test_schemes_by_channel_have_no_groups(scheme: str, extra: dict[str, Any]) -> None:
    with pytest.raises(
        ValidationError, match=f"{scheme} has one scale for each output channel; remove `{next(iter(extra))}`"
    ):
        Quantize(scheme=scheme, **extra)
    assert " g" not in Quantize(scheme=scheme).describe()
