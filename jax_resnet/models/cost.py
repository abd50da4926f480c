"""What a network costs, counted from its trace, without compiling or running it."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params


@dataclass(frozen=True)
class Cost:
    """What the convolutions and matrix products of a function come to; nothing else of it is counted."""

    multiply_adds: int  # half the usual count of floating-point operations
    activations: int  # the numbers that they give: Radosavovic et al. 2020, "Designing network design spaces"


def cost(function: Callable[..., Any], *args: Any) -> Cost:
    """The cost of `function(*args)`; args may be abstract."""
    products = list(_products(jax.make_jaxpr(function)(*args).jaxpr))
    return Cost(sum(outputs * terms for outputs, terms in products), sum(outputs for outputs, _ in products))


def _products(jaxpr: Any, times: int = 1) -> Iterator[tuple[int, int]]:
    """For each convolution and matrix product, the elements it gives and the multiply-adds behind each of them."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            kernel, numbers = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"]
            yield times * math.prod(eqn.outvars[0].aval.shape), math.prod(kernel) // kernel[numbers.rhs_spec[0]]
        elif eqn.primitive.name == "dot_general":
            shape, contracted = eqn.invars[0].aval.shape, eqn.params["dimension_numbers"][0][0]
            yield times * math.prod(eqn.outvars[0].aval.shape), math.prod(shape[d] for d in contracted)
        length = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for inner in jaxprs_in_params(eqn.params):
            yield from _products(inner, times * length)
