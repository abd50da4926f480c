"""What a network costs, counted from its trace, without compiling or running it."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params


def multiply_adds(function: Callable[..., Any], *args: Any) -> int:
    """Multiply-adds of the convolutions and matrix products in `function(*args)`; args may be abstract.

    Twice this number is the usual count of floating-point operations.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: Any) -> int:
    macs = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            kernel, numbers = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"]
            per_output = math.prod(kernel) // kernel[numbers.rhs_spec[0]]
            macs += math.prod(eqn.outvars[0].aval.shape) * per_output
        elif eqn.primitive.name == "dot_general":
            contracted = eqn.params["dimension_numbers"][0][0]
            shape = eqn.invars[0].aval.shape
            macs += math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[d] for d in contracted)
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        macs += times * sum(_count(inner) for inner in jaxprs_in_params(eqn.params))
    return macs
