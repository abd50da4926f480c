import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jax_resnet.models.cost import Cost, cost


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def product(m, k, n):
    """The cost of an [m, k] matrix times a [k, n] one."""
    return Cost(m * k * n, m * n)


def convolution(x, kernel, **options):
    return jax.lax.conv_general_dilated(x, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)


def test_matrix_products():
    assert cost(jnp.matmul, array(2, 3), array(3, 5)) == product(2, 3, 5)
    assert cost(jnp.matmul, array(7, 2, 3), array(7, 3, 5)) == Cost(7 * 2 * 3 * 5, 7 * 2 * 5)
    assert cost(lambda x, y: jnp.einsum("abij,cij->abc", x, y), array(2, 3, 4, 5), array(6, 4, 5)) == product(6, 20, 6)


@pytest.mark.parametrize(
    ("padding", "stride", "groups", "side"),
    [("VALID", 1, 1, 5), ("SAME", 1, 1, 7), (((1, 1), (1, 1)), 2, 1, 4), ("SAME", 1, 4, 7)],
)
def test_convolutions(padding, stride, groups, side):
    counted = cost(
        lambda x, w: convolution(x, w, padding=padding, window_strides=(stride, stride), feature_group_count=groups),
        array(2, 7, 7, 8),
        array(3, 3, 8 // groups, 12),
    )
    outputs = 2 * side * side * 12
    assert counted == Cost(outputs * 9 * 8 // groups, outputs)


def test_convolution_along_a_line():
    layer = nnx.eval_shape(lambda: nnx.Conv(1, 1, (5,), padding=2, use_bias=False, rngs=nnx.Rngs(0)))
    assert cost(nnx.Conv.__call__, layer, array(3, 40, 1)) == Cost(3 * 40 * 5, 3 * 40)


def test_inside_loops_and_calls():
    def loop(x, w):
        def body(x, _):
            return jax.jit(lambda x: jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=3)[0])(x), None

        return jax.nn.relu(jax.lax.scan(body, x, length=5)[0]) @ w

    assert cost(loop, array(2, 4), array(4, 4)) == Cost(16 * 2 * 4 * 4, 16 * 2 * 4)


def test_nothing_else_counts():
    assert cost(lambda x: jax.nn.softmax(nnx.avg_pool(x, (2, 2)).sum((1, 2)) * 2), array(1, 8, 8, 3)) == Cost(0, 0)


def test_of_real_arrays():
    assert cost(jnp.matmul, jnp.ones((2, 3)), jnp.ones((3, 5))).multiply_adds == 30
