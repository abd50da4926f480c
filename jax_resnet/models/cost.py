"""The cost of a network, counted from its trace, without compiling or running it."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params


@dataclass(frozen=True)
class Cost:
    """The cost of a function's convolutions and matrix products; nothing else is counted.

    Activations are the elements of their outputs, as in Radosavovic et al. 2020, "Designing network
    design spaces".
    """

    multiply_adds: int  # half the floating-point operations
    activations: int


def cost(function: Callable[..., Any], *args: Any) -> Cost:
    """Count the cost of `function(*args)`; args may be abstract."""
    products = list(_products(jax.make_jaxpr(function)(*args).jaxpr))
    multiply_adds = sum(outputs * terms for outputs, terms in products)
    return Cost(multiply_adds, activations=sum(outputs for outputs, _ in products))


def _products(jaxpr: Any, times: int = 1) -> Iterator[tuple[int, int]]:
    """Yield each convolution's and matrix product's output elements and multiply-adds for each.

    `times` counts how often `jaxpr` runs, which is more than once inside a scan.
    """
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            out_features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
            yield times * math.prod(eqn.outvars[0].aval.shape), math.prod(kernel) // out_features
        elif eqn.primitive.name == "dot_general":
            shape = eqn.invars[0].aval.shape
            contracted = eqn.params["dimension_numbers"][0][0]
            terms = math.prod(shape[d] for d in contracted)
            yield times * math.prod(eqn.outvars[0].aval.shape), terms
        length = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for inner in jaxprs_in_params(eqn.params):
            yield from _products(inner, times * length)
