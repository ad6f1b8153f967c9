"""Layers of transformers keep to what searchable layers promise, and compute what torch's own compute."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import corenas_mutable_attention
from corenas.cost import Cost
from corenas.export import export_subnet
from corenas.mutable import Elastic, apply
from corenas.space import SearchSpace
from corenas.testing.distributions import distribution_checks
from corenas.testing.mutables import costs_what_its_export_costs, mutable_checks
from corenas.value import Constant, Dimension
from corenas.variables import Variable
from corenas_mutable_attention import (
    LayerNormSlice,
    MultiHeadAttention,
    ParameterSlice,
    PatchEmbedding,
    RelativePosition,
    qkv,
)
from corenas_mutable_slices import ElasticDepth, LinearSlice

WIDTH, HEADS, HEAD_DIM = Variable("w", (4, 6, 8)), Variable("h", (1, 2, 3)), Variable("d", (2, 4))
TOKENS = 5  # a class token and a map of 2x2


class Shifted(nn.Module):
    """Tokens with a bare parameter added."""

    def __init__(self):
        super().__init__()
        self.elastic = Elastic({"outputs": Dimension.of(WIDTH)})
        self.shift = ParameterSlice(1, TOKENS, WIDTH)
        nn.init.normal_(self.shift.weight)

    def forward(self, x):
        return x + self.shift()


def joint(arch):
    """The shape of q, k and v side by side."""
    return 2, TOKENS, 3 * arch["h"] * arch.get("d", 4)


def relative():
    attention = MultiHeadAttention(HEADS, HEAD_DIM, grid=2, distance=1)
    for parameter in attention.parameters():
        nn.init.normal_(parameter)
    return attention


LAYERS = {
    "norm": (lambda: LayerNormSlice(WIDTH, 1e-6), lambda arch: (2, TOKENS, arch["w"])),
    "norm of parts": (lambda: LayerNormSlice([WIDTH, 3]), lambda arch: (2, arch["w"] + 3)),
    "patches": (lambda: PatchEmbedding(3, WIDTH, 4), lambda arch: (2, 3, 8, 12)),
    "patches of parts": (lambda: PatchEmbedding([WIDTH, 1], [WIDTH, 2], 2), lambda arch: (2, arch["w"] + 1, 4, 6)),
    "qkv": (lambda: qkv(WIDTH, HEADS, HEAD_DIM), lambda arch: (2, TOKENS, arch["w"])),
    "qkv with the bias in front": (
        lambda: qkv(WIDTH, HEADS, HEAD_DIM, front_bias=True),
        lambda arch: (2, TOKENS, arch["w"]),
    ),
    "attention": (lambda: MultiHeadAttention(HEADS, 4), joint),
    "attention of any size": (lambda: MultiHeadAttention(HEADS, HEAD_DIM), joint),
    "relative attention": (relative, joint),
    "parameter": (Shifted, lambda arch: (2, TOKENS, arch["w"])),
}


@pytest.mark.parametrize("check", mutable_checks)
@pytest.mark.parametrize("name", LAYERS)
def test_conforms(name, check):
    if name == "relative attention" and check is costs_what_its_export_costs:
        pytest.skip("its tables state their own cost: see the test of attention's cost")
    make, shape = LAYERS[name]
    check(make, shape=shape)


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_mutable_attention")


# -- attention --------------------------------------------------------------------------------------------------------


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_qkv_and_attention_are_torchs_multi_head_attention():
    theirs = nn.MultiheadAttention(8, 2, batch_first=True).double()
    nn.init.normal_(theirs.in_proj_bias)
    linear, attention, x = qkv(8, 2, 4).double(), MultiHeadAttention(2, 4), noise(3, 6, 8)
    linear.load_state_dict({"weight": theirs.in_proj_weight, "bias": theirs.in_proj_bias})
    with torch.no_grad():
        ours = theirs.out_proj(attention(linear(x)))
        torch.testing.assert_close(ours, theirs(x, x, x)[0], rtol=1e-12, atol=1e-12)


def test_fewer_heads_are_the_first_ones():
    linear, attention = qkv(WIDTH, HEADS, 4).double(), MultiHeadAttention(HEADS, 4)
    x = noise(2, 6, 8)
    with torch.no_grad():
        every = attention(linear(x))
        for heads in (1, 2):
            arch = {"w": 8, "h": heads}
            with apply(linear, arch), apply(attention, arch):
                torch.testing.assert_close(attention(linear(x)), every[..., : 4 * heads])


def test_with_the_bias_in_front_queries_keys_and_values_are_those_of_autoformers_code():
    linear, x = qkv(WIDTH, HEADS, 4, front_bias=True).double(), noise(2, TOKENS, 8)
    nn.init.normal_(linear.bias)
    # Its layer has the rows of queries, keys and values in turns: row 3 j + i is the j-th of the i-th.
    rows = linear.weight.detach().unflatten(0, (3, -1)).transpose(0, 1).flatten(0, 1)
    for heads in (1, 2):
        with apply(linear, {"w": 8, "h": heads}):
            n = 3 * 4 * heads
            sampled = torch.cat([rows[i:n:3, :8] for i in range(3)])  # `sample_weight` of qkv_super.py
            torch.testing.assert_close(linear(x), nn.functional.linear(x, sampled, linear.bias[:n]))
            torch.testing.assert_close(linear.export()(x), linear(x))


def dense(q, k, v, tables, grid, distance):
    """AutoFormer's attention: a vector of keys and one of values for each pair of tokens, written out."""
    place = torch.arange(grid[0] * grid[1])
    row, column = place // grid[1], place % grid[1]
    vectors = {}
    for name, (rows, columns) in tables.items():
        pairs = rows[0] + columns[0]
        pairs = pairs.expand(1 + len(place), 1 + len(place), -1).clone()
        for i in place:
            for j in place:
                down, right = (int(x[j] - x[i]) for x in (row, column))
                index = [max(-distance, min(distance, apart)) + distance + 1 for apart in (down, right)]
                pairs[1 + i, 1 + j] = rows[index[0]] + columns[index[1]]
        vectors[name] = pairs
    scores = torch.einsum("nhid,nhjd->nhij", q, k) + torch.einsum("nhid,ijd->nhij", q, vectors["keys"])
    weights = (scores / q.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("nhij,nhjd->nhid", weights, v) + torch.einsum("nhij,ijd->nhid", weights, vectors["values"])


@pytest.mark.parametrize(("grid", "distance"), [((3, 3), 3), (3, 1), (1, 1), (4, 2), ((2, 4), 3), ((5, 1), 2)])
def test_relative_positions_are_those_of_autoformer(grid, distance):
    attention = MultiHeadAttention(2, 4, grid, distance).double()
    for parameter in attention.parameters():
        nn.init.normal_(parameter)
    grid = (grid, grid) if isinstance(grid, int) else grid
    q, k, v = noise(3, 2, 2, 1 + grid[0] * grid[1], 4)
    tables = {"keys": attention.keys, "values": attention.vectors}
    tables = {name: (own.rows.weight, own.columns.weight) for name, own in tables.items()}
    side_by_side = torch.stack([q, k, v]).permute(1, 3, 0, 2, 4).flatten(2)
    with torch.no_grad():
        expected = dense(q, k, v, tables, grid, distance).transpose(1, 2).flatten(2)
        torch.testing.assert_close(attention(side_by_side), expected, rtol=1e-12, atol=1e-12)


def test_a_table_has_a_vector_for_each_distance_and_one_for_the_class_token():
    position = RelativePosition(64, grid=14, distance=14)
    assert {tuple(p.shape) for p in position.parameters()} == {(30, 64)}  # AutoFormer's at 224 pixels
    assert not position.state_dict().keys() & {"row_apart", "column_apart"}


@pytest.mark.parametrize("distance", [0, 2])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_costs_both_products_however_torch_computes_them(device, distance):
    table = {"heads": [1, 2, 3], "head_dim": [2, 4], "depth": [1, 2]}
    space = SearchSpace.from_table(table)
    heads, head_dim, depth = (space.value(key) for key in table)
    blocks = []
    for _ in range(2):
        attention = MultiHeadAttention(heads, head_dim, grid=2, distance=distance)
        blocks.append(nn.Sequential(qkv(6, heads, head_dim), attention, LinearSlice(heads * head_dim, 6)))
    model, example = nn.Sequential(ElasticDepth(blocks, depth)).eval(), torch.zeros(1, TOKENS, 6)
    cost = Cost(model, space, example)
    for arch in space:
        plain = export_subnet(model, arch, example)
        params = sum(p.numel() for p in plain.parameters())
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            plain.to(device)(example.to(device))
        found = cost.of([arch])[0]
        assert (found["flops"], found["params"]) == (counter.get_total_flops() // 2, params), arch
        if not distance:
            inner = arch["heads"] * arch["head_dim"]
            linear = TOKENS * inner * 6 * 4
            assert found["flops"] == arch["depth"] * (linear + 2 * TOKENS * TOKENS * inner)


# -- bare parameters --------------------------------------------------------------------------------------------------


def test_a_parameter_has_its_first_elements_along_each_axis_of_each_part():
    parameter = ParameterSlice(2, [WIDTH, 3], HEADS)
    nn.init.normal_(parameter.weight)
    assert parameter.weight.shape == (2, 11, 3)
    with apply(parameter, {"w": 4, "h": 2}):
        expected = torch.cat([parameter.weight[:, :4, :2], parameter.weight[:, 8:, :2]], 1)
        assert torch.equal(parameter(), expected)
        exported = parameter.export()
    assert isinstance(exported, nn.Parameter)
    assert torch.equal(exported, expected)
    assert parameter.cost(Constant(7)).params({"w": 4, "h": 2}) == expected.numel()


def test_a_parameter_of_one_part_is_a_view():
    parameter = ParameterSlice(1, WIDTH)
    with apply(parameter, {"w": 4}):
        assert parameter().data_ptr() == parameter.weight.data_ptr()


def test_an_exported_network_has_the_parameter_itself_and_no_call():
    model = nn.Sequential(Shifted())
    plain = export_subnet(model, {"w": 4}, torch.zeros(1, TOKENS, 4))
    assert [(node.op, node.target) for node in plain.graph.nodes][1] == ("get_attr", "layer_0_shift")
    assert {name: tuple(p.shape) for name, p in plain.named_parameters()} == {"layer_0_shift": (1, TOKENS, 4)}
    before = plain.layer_0_shift.clone()
    nn.init.zeros_(model[0].shift.weight)
    assert torch.equal(plain.layer_0_shift, before)  # a copy
    plain(torch.zeros(2, TOKENS, 4)).sum().backward()
    assert torch.equal(plain.layer_0_shift.grad, torch.full_like(before, 2.0))


def test_a_parameter_that_stands_twice_is_one_in_the_exported_network():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = ParameterSlice(WIDTH)
            nn.init.normal_(self.scale.weight)

        def forward(self, x):
            return (x * self.scale()).tanh() * self.scale()

    plain = export_subnet(Twice(), {"w": 6}, torch.zeros(1, 6))
    assert [tuple(p.shape) for p in plain.parameters()] == [(6,)]


# -- layer norm, patches, drop path -----------------------------------------------------------------------------------


def test_a_layer_norm_sees_the_active_features_alone():
    norm, x = LayerNormSlice(WIDTH, 1e-3).double(), noise(2, 5, 4)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    with apply(norm, {"w": 4}), torch.no_grad():
        expected = F.layer_norm(x, (4,), norm.weight[:4], norm.bias[:4], 1e-3)
        torch.testing.assert_close(norm(x), expected)
        assert norm.export().eps == 1e-3


def test_patches_do_not_overlap():
    embedding, x = PatchEmbedding(3, WIDTH, 4).double(), noise(2, 3, 8, 12)
    with apply(embedding, {"w": 6}), torch.no_grad():
        out = embedding(x)
        weight, bias = embedding.weight[:6], embedding.bias[:6]
        one = torch.einsum("nchw,ochw->no", x[:, :, 4:8, 8:12], weight) + bias
    assert out.shape == (2, 6, 2, 3)
    torch.testing.assert_close(out[:, :, 1, 2], one)


def test_a_person_finds_its_layers_by_dir():
    assert {"LayerNormSlice", *corenas_mutable_attention._MODULES["layers"]} <= {*dir(corenas_mutable_attention)}
