"""Keys before their rotation: where they are in a graph, in which layout, however it is spelled."""

import pytest
import torch
from loki_compile.passes.rotary import before_rotation, rotated_pairs
from torch import fx, nn
from toy_capture import normal_graph
from toy_options import BATCH, HEAD_DIM, HIDDEN, KV_HEADS

pytestmark = pytest.mark.covers

TOKENS = 5
SHAPE = (BATCH, KV_HEADS, TOKENS, HEAD_DIM)


def halves(x, cos, sin):
    """Rotates the last dimension as two halves, as most libraries do."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def pairs(x, cos, sin):
    """Rotates pairs of neighbours by complex phases, as Meta's llama does."""
    phases = torch.complex(cos, sin)[..., : x.shape[-1] // 2]
    numbers = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(numbers * phases).flatten(-2).type_as(x)


class Keys(nn.Module):
    """(B,T,HIDDEN) to the keys of `make`, with what `make` may use."""

    def __init__(self, make):
        super().__init__()
        self.make = make
        self.k = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM)
        self.norm = nn.Parameter(torch.rand(HEAD_DIM) + 0.5)
        self.table = nn.Parameter(torch.randn(TOKENS, HEAD_DIM))

    def forward(self, x, cos, sin):
        return self.make(self, x, cos, sin)


def tokens_first(self, x):
    return self.k(x).view(*x.shape[:2], KV_HEADS, HEAD_DIM)


def heads_first(self, x):
    return tokens_first(self, x).transpose(1, 2)


def rotated_heads_first(self, x, cos, sin):
    return halves(heads_first(self, x), cos, sin)


def rotated_tokens_first(self, x, cos, sin):
    return halves(tokens_first(self, x), cos[:, None], sin[:, None]).transpose(1, 2)


def rotated_in_complex_numbers(self, x, cos, sin):
    return pairs(heads_first(self, x), cos, sin)


def rotated_before_heads_are_split(self, x, cos, sin):
    """All heads by the same angles, while they are one dimension."""
    cos, sin = (y.repeat(1, KV_HEADS) for y in (cos, sin))
    k = halves(self.k(x), cos, sin)
    return k.view(*x.shape[:2], KV_HEADS, HEAD_DIM).transpose(1, 2)


def rotated_behind_a_norm(self, x, cos, sin):
    k = heads_first(self, x)
    return halves(k * k.pow(2).mean(-1, keepdim=True).rsqrt() * self.norm, cos, sin)


def rotated_in_part(self, x, cos, sin):
    turned, kept = heads_first(self, x).split([4, HEAD_DIM - 4], -1)
    return torch.cat((halves(turned, cos[:, :4], sin[:, :4]), kept), -1)


def is_parameter(node):
    return "parameters" in node.name


def inputs_of(tokens=TOKENS):
    angles = torch.randn(tokens, HEAD_DIM)
    return torch.randn(BATCH, tokens, HIDDEN), angles.cos(), angles.sin()


def found_in(module, inputs):
    """The graph of the keys, and what comes before their rotation."""
    gm = normal_graph(module, *inputs)
    (keys,) = gm.graph.output_node().args[0]
    return gm, before_rotation(keys, keys.meta["example_value"].ndim - 2, is_parameter)


def value_of(node, gm, module, inputs):
    """What a node of the graph computes."""
    graph, mapping = fx.Graph(), {}
    for old in gm.graph.nodes:
        if old.op != "output":
            mapping[old] = graph.node_copy(old, mapping.__getitem__)
    graph.output(mapping[node])
    values = dict(zip(("l_x_", "l_cos_", "l_sin_"), inputs, strict=True))
    values["l_self_modules_k_parameters_weight_"] = module.k.weight
    values["l_self_modules_k_parameters_bias_"] = module.k.bias
    values["l_self_parameters_norm_"] = module.norm
    return fx.GraphModule(gm, graph)(*(values[n.name] for n in graph.find_nodes(op="placeholder")))


@pytest.mark.parametrize(
    "make, heads",
    [
        (rotated_heads_first, 0),
        (rotated_tokens_first, 0),
        (rotated_in_complex_numbers, 0),
        (rotated_before_heads_are_split, KV_HEADS),
        (rotated_in_part, 0),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
@torch.no_grad()
def test_keys_before_rotation_come_in_the_layout_of_those_after_it(make, heads):
    module, inputs = Keys(make).eval(), inputs_of()
    gm, found = found_in(module, inputs)
    before = found.restore(value_of(found.node, gm, module, inputs))
    assert found.heads == heads and before.shape == SHAPE
    torch.testing.assert_close(before, heads_first(module, inputs[0]))
    assert not torch.allclose(before, make(module, *inputs))


@torch.no_grad()
def test_a_norm_in_front_of_the_rotation_is_no_rotation():
    module, inputs = Keys(rotated_behind_a_norm).eval(), inputs_of()
    gm, found = found_in(module, inputs)
    before = found.restore(value_of(found.node, gm, module, inputs))
    k = heads_first(module, inputs[0])
    torch.testing.assert_close(before, k * k.pow(2).mean(-1, keepdim=True).rsqrt() * module.norm)


def one_head(self, x, cos, sin):
    """(B,T,D): no dimension for heads."""
    return halves(self.k(x)[..., :HEAD_DIM], cos, sin)


@torch.no_grad()
def test_keys_of_one_head_need_no_dimension_for_it():
    module, inputs = Keys(one_head).eval(), inputs_of()
    gm, found = found_in(module, inputs)
    before = found.restore(value_of(found.node, gm, module, inputs))
    torch.testing.assert_close(before, module.k(inputs[0])[..., :HEAD_DIM])


def not_rotated(self, x, cos, sin):
    return heads_first(self, x)


def normalised(self, x, cos, sin):
    return heads_first(self, x) * self.norm


def learnt_positions(self, x, cos, sin):
    """A parameter is added for each token."""
    return heads_first(self, x) + self.table


def scaled_by_numbers(self, x, cos, sin):
    """What they are multiplied by is no parameter, and the same for every token."""
    return heads_first(self, x) * cos[0]


def without_weights(self, x, cos, sin):
    return halves(x[:, None, :, :HEAD_DIM].repeat(1, KV_HEADS, 1, 1), cos, sin)


def positions_before_the_projection(self, x, cos, sin):
    return heads_first(self, x * cos[:, :1])


@pytest.mark.parametrize(
    "make",
    [
        not_rotated,
        normalised,
        learnt_positions,
        scaled_by_numbers,
        without_weights,
        positions_before_the_projection,
    ],
    ids=lambda f: f.__name__,
)
def test_keys_that_nothing_rotates_are_none(make):
    assert found_in(Keys(make).eval(), inputs_of())[1] is None


def test_as_many_tokens_as_heads_could_be_either():
    with pytest.raises(ValueError, match="use another batch length"):
        found_in(Keys(rotated_tokens_first).eval(), inputs_of(KV_HEADS))


def test_heads_in_front_of_the_batch_are_refused():
    def make(self, x, cos, sin):
        k = halves(tokens_first(self, x)[..., :6], cos[:, None, :6], sin[:, None, :6])
        return k.permute(2, 0, 1, 3)

    with pytest.raises(ValueError, match="do not line up"):
        found_in(Keys(make).eval(), inputs_of())


# ------------------------------------------------------------------------- which dims turn together


def pairs_in(make):
    gm = normal_graph(Keys(make).eval(), *inputs_of())
    (keys,) = gm.graph.output_node().args[0]
    return rotated_pairs(keys, TOKENS, HEAD_DIM, is_parameter, {})


def normalised_behind_a_rotation(self, x, cos, sin):
    k = rotated_heads_first(self, x, cos, sin)
    return k * k.pow(2).mean(-1, keepdim=True).rsqrt() * self.norm


def interleaved_to_halves(self, x, cos, sin):
    """Neighbours turn, and what comes of them lies in two halves."""
    k = heads_first(self, x)
    return halves(torch.cat((k[..., ::2], k[..., 1::2]), -1), cos, sin)


HALVES = tuple((d, d + HEAD_DIM // 2) for d in range(HEAD_DIM // 2))


@pytest.mark.parametrize(
    "make, expected",
    [
        (rotated_heads_first, HALVES),
        (rotated_tokens_first, HALVES),
        (rotated_behind_a_norm, HALVES),
        (interleaved_to_halves, HALVES),
        (rotated_in_complex_numbers, tuple((d, d + 1) for d in range(0, HEAD_DIM, 2))),
        (rotated_in_part, ((0, 2), (1, 3))),
        (normalised_behind_a_rotation, ()),  # every dim depends on all
        (scaled_by_numbers, ()),
        (not_rotated, ()),
        (normalised, ()),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_dims_that_turn_together_are_told_by_what_they_depend_on(make, expected):
    assert pairs_in(make) == expected


def test_layers_of_equal_calls_are_asked_once():
    known = {}
    gm = normal_graph(Keys(rotated_heads_first).eval(), *inputs_of())
    (keys,) = gm.graph.output_node().args[0]
    first = rotated_pairs(keys, TOKENS, HEAD_DIM, is_parameter, known)
    (spelled,) = known
    known[spelled] = ((7, 7),)
    assert first == HALVES
    assert rotated_pairs(keys, TOKENS, HEAD_DIM, is_parameter, known) == ((7, 7),)
