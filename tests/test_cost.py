"""Cost: what PyTorch's own counter and the parameters of a network written by hand say."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toys
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from corenas.cost import Cost
from corenas.export import export_subnet
from corenas.mutable import Elastic, LayerCost, apply, conv_cost, linear_cost, mutables, norm_cost
from corenas.space import SearchSpace
from corenas.value import Dimension, as_value, at_least, equals, make_divisible, rounded
from corenas.variables import Categorical, Condition, Float, Int

# -- a set of toy mutables --------------------------------------------------------------------------------------------


class Conv(nn.Conv2d):
    def __init__(self, inputs, outputs, kernel=1, stride=1, bias=True):
        inputs, outputs = Dimension.of(inputs), Dimension.of(outputs)
        super().__init__(inputs.allocated, outputs.allocated, as_value(kernel).largest, stride, bias=bias)
        self.elastic = Elastic({"inputs": inputs, "outputs": outputs, "kernel": as_value(kernel)})

    def forward(self, x):
        i, o, k = sum(self.elastic.choice["inputs"]), sum(self.elastic.choice["outputs"]), self.elastic.choice["kernel"]
        bias = None if self.bias is None else self.bias[:o]
        return F.conv2d(x, self.weight[:o, :i, :k, :k], bias, self.stride, k // 2)

    def cost(self, positions):
        values = self.elastic.values
        inputs, outputs, kernel = values["inputs"].size, values["outputs"].size, values["kernel"]
        return conv_cost(inputs, outputs, kernel * kernel, positions, 1, self.bias is not None)


class Norm(nn.BatchNorm2d):
    def __init__(self, features):
        self_values = {"outputs": as_value(features)}
        super().__init__(self_values["outputs"].largest)
        self.elastic = Elastic(self_values)

    def forward(self, x):
        n = self.elastic.choice["outputs"]
        return F.batch_norm(x, self.running_mean[:n], self.running_var[:n], self.weight[:n], self.bias[:n])

    def cost(self, positions):
        return norm_cost(self.elastic.values["outputs"], self.affine)


class Linear(nn.Linear):
    def __init__(self, inputs, outputs):
        super().__init__(as_value(inputs).largest, as_value(outputs).largest)
        self.elastic = Elastic({"inputs": as_value(inputs), "outputs": as_value(outputs)})

    def forward(self, x):
        o, i = self.elastic.choice["outputs"], self.elastic.choice["inputs"]
        return F.linear(x, self.weight[:o, :i], self.bias[:o])

    def cost(self, positions):
        return linear_cost(self.elastic.values["inputs"], self.elastic.values["outputs"], positions, True)


class Depth(nn.Module):
    def __init__(self, blocks, depth):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.elastic = Elastic({"depth": depth})

    def gates(self):
        return [(block, at_least(self.elastic.values["depth"], i + 1)) for i, block in enumerate(self.blocks)]

    def forward(self, x):
        for i in range(self.elastic.choice["depth"]):
            x = self.blocks[i](x)
        return x


class Mixed(nn.Module):
    def __init__(self, candidates, op):
        super().__init__()
        self.candidates = nn.ModuleDict(candidates)
        self.elastic = Elastic({"op": op})

    def gates(self):
        return [(module, equals(self.elastic.values["op"], name)) for name, module in self.candidates.items()]

    def forward(self, x):
        return self.candidates[self.elastic.choice["op"]](x)


class Resize(nn.Module):
    resizes = ("side",)

    def __init__(self, side):
        super().__init__()
        self.elastic = Elastic({"side": side})

    def forward(self, x):
        return F.interpolate(x, (self.elastic.choice["side"],) * 2)


class Twice(nn.Module):
    """One convolution, run at full size and at half of it."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return self.conv(x), self.conv(x[..., ::2, ::2])[..., :1, :1]


class Net(nn.Module):
    """Everything at once: resize, slices, elastic depth in which a block is mixed, plain and shared layers, a head."""

    def __init__(self, space):
        super().__init__()
        v = space.value
        width, inner = make_divisible(v("width") * 1.5, 4), rounded(v("width") * v("ratio"))
        self.resize = Resize(v("side"))
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.widen = nn.Sequential(Conv(8, width, v("kernel"), stride=2, bias=False), Norm(width), nn.ReLU())
        mixed = Mixed({"conv": Conv(width, width, 3), "skip": nn.Identity(), "wide": nn.Sequential(
            Conv(width, inner), nn.Hardswish(), Conv(inner, width))}, v("op"))  # fmt: skip
        self.stage = Depth([nn.Sequential(Conv(width, width, v("kernel")), Norm(width)), mixed], v("depth"))
        self.twice = Twice(Conv(width, width))
        self.tokens = Linear(width, inner)
        self.head = nn.Linear(5, 7)
        self.reduce = Linear(inner, 5)

    def forward(self, x):
        x = self.widen(self.grouped(self.stem(self.resize(x))))
        large, small = self.twice(self.stage(x))
        x = self.tokens((large + small).flatten(2).transpose(1, 2))
        return self.head(self.reduce(x.mean(1)))


def net_space():
    return SearchSpace([
        Int("side", 16, 32, 8), Categorical("width", (4, 8, 12)), Categorical("ratio", (0.5, 2.0)),
        Categorical("kernel", (1, 3, 5)), Int("depth", 0, 2),
        Categorical("op", ("skip", "conv", "wide"), when=[Condition("depth", frozenset({2}))]),
    ])  # fmt: skip


def by_hand(arch, image):
    """The plain network of an arch, its flops by `FlopCounterMode`, the elements of its layers' outputs."""
    width = max(4, int(arch["width"] * 1.5 + 2) // 4 * 4)
    width += 4 if width < 0.9 * arch["width"] * 1.5 else 0
    inner, k = round(arch["width"] * arch["ratio"]), arch["kernel"]
    stem = [nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.Conv2d(8, 8, 3, padding=1, groups=4),
            nn.Conv2d(8, width, k, 2, k // 2, bias=False), nn.BatchNorm2d(width), nn.ReLU()]  # fmt: skip
    stage = [nn.Conv2d(width, width, k, padding=k // 2), nn.BatchNorm2d(width)] if arch["depth"] > 0 else []
    if arch["depth"] > 1 and arch["op"] == "conv":
        stage.append(nn.Conv2d(width, width, 3, padding=1))
    if arch["depth"] > 1 and arch["op"] == "wide":
        stage += [nn.Conv2d(width, inner, 1), nn.Hardswish(), nn.Conv2d(inner, width, 1)]
    twice, tokens, reduce, head = (
        nn.Conv2d(width, width, 1),
        nn.Linear(width, inner),
        nn.Linear(inner, 5),
        nn.Linear(5, 7),
    )
    trunk = nn.Sequential(*stem, *stage)
    everything = nn.ModuleList([trunk, twice, tokens, reduce, head])
    elements = []
    for module in everything.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda module, args, output: elements.append(output.numel()))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        x = trunk(F.interpolate(image, (arch["side"],) * 2))
        x = twice(x) + twice(x[..., ::2, ::2])[..., :1, :1]
        head(reduce(tokens(x.flatten(2).transpose(1, 2)).mean(1)))
    return {
        "flops": counter.get_total_flops() // 2,
        "params": sum(p.numel() for p in everything.parameters()),
        "activations": sum(elements),
    }


IMAGE = torch.zeros(1, 3, 20, 20)


def test_a_supernet_costs_what_networks_written_by_hand_cost():
    space = net_space()
    cost = Cost(Net(space), space, IMAGE)
    archs = [*space][::5]
    assert len(archs) > 50
    assert cost.of(archs) == [by_hand(arch, IMAGE) for arch in archs]


def test_many_archs_at_once_cost_what_they_cost_one_by_one():
    space = net_space()
    cost = Cost(Net(space), space, IMAGE)
    codes = space.draw(np.random.default_rng(0), 300)
    together = cost(codes)
    assert set(together) == {"flops", "params", "activations"}
    for metric, column in together.items():
        assert column.dtype == np.int64
        assert column.tolist() == [cost(codes[i : i + 1])[metric].item() for i in range(len(codes))]
    assert [row["flops"] for row in cost.of(space.decode(codes))] == together["flops"].tolist()
    assert cost.of([]) == []


def test_the_cost_of_an_arch_is_the_sum_of_its_rows_of_the_tables():
    space = net_space()
    cost = Cost(Net(space), space, IMAGE)
    codes = space.draw(np.random.default_rng(0), 300)
    for metric in ("flops", "params", "activations"):
        tables = cost.tables(metric)
        assert len({frozenset(keys) for keys, _ in tables}) == len(tables) > 4
        sums = np.zeros(len(codes), np.int64)
        for keys, table in tables:
            own = [codes[:, space.keys.index(key)] for key in keys]
            sums += table[np.ravel_multi_index(own, [len(space[key].choices) for key in keys])] if keys else table[0]
        assert sums.tolist() == cost(codes)[metric].tolist()


def test_a_narrower_space_costs_the_same_under_its_own_codes():
    space = net_space()
    cost = Cost(Net(space), space, IMAGE)
    narrow = space.narrow({"depth": [2, 0], "width": [12, 4], "side": [24], "op": ["wide", "conv"]})
    archs = [*narrow]
    assert cost.on(narrow).of(archs) == cost.of(archs)
    assert cost.on(narrow)(narrow.encode(archs))["flops"].tolist() == cost(space.encode(archs))["flops"].tolist()
    assert cost.space is space


def test_the_model_is_left_as_it_was():
    space = net_space()
    model = Net(space).train()
    model.stage.blocks[0].eval()
    apply(model, space.smallest())
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    choices = [dict(mutable.elastic.choice) for mutable in mutables(model)]
    seed = torch.get_rng_state()

    def check():
        assert [module.training for module in model.modules()] == modes
        assert all(p.device.type == "cpu" for p in model.parameters())
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
        assert [dict(mutable.elastic.choice) for mutable in mutables(model)] == choices
        assert not any(module._forward_hooks for module in model.modules())
        assert torch.equal(torch.get_rng_state(), seed)

    Cost(model, space, IMAGE)
    check()
    with pytest.raises(RuntimeError):
        Cost(model, space, torch.zeros(1, 5, 20, 20))  # too many channels: the stem raises
    check()


def test_a_model_that_has_no_weights_in_memory_has_a_cost_too():
    space = net_space()
    with torch.device("meta"):
        model = Net(space)
    assert Cost(model, space, IMAGE).of([space.default()]) == [by_hand(space.default(), IMAGE)]


def test_a_batch_of_several_costs_what_one_costs():
    space = net_space()
    one, several = (Cost(Net(space), space, torch.zeros(n, 3, 20, 20)) for n in (1, 4))
    assert one.of([space.default()]) == several.of([space.default()])


def test_products_too_large_for_a_table_are_computed_by_column():
    space = SearchSpace([Int("a", 1, 300), Int("b", 1, 300), Categorical("k", (1, 3))])
    a, b, k = map(space.value, "abk")
    model = nn.Sequential(Conv(3, a, k), Conv(a, b, k), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Linear(b, 10))
    cost = Cost(model, space, torch.zeros(1, 3, 8, 8))
    codes = space.draw(np.random.default_rng(0), 200)
    expected = []
    for arch in space.decode(codes):
        i, o, taps = arch["a"], arch["b"], arch["k"] ** 2
        expected.append(
            (64 * taps * (3 * i + i * o) + 10 * o, taps * (3 * i + i * o) + i + o + 10 * o + 10, 64 * (i + o) + 10)
        )
    assert [*zip(*(column.tolist() for column in cost(codes).values()), strict=True)] == expected
    narrow = space.narrow({"a": [300, 7], "b": [2, 299]})
    archs = [*narrow]
    assert cost.on(narrow).of(archs) == cost.of(archs)


def test_a_continuous_width_is_computed_by_column():
    space = SearchSpace([Float("ratio", 0.25, 2.0), Categorical("k", (1, 3)), Float("unused", 0, 1)])
    width = make_divisible(space.value("ratio") * 32, 8)
    model = nn.Sequential(Conv(3, width, space.value("k")), Conv(width, 4))
    cost = Cost(model, space, torch.zeros(1, 3, 4, 4))
    archs = space.decode(space.draw(np.random.default_rng(0), 50))
    widths = [width(arch) for arch in archs]
    assert len(set(widths)) > 5
    params = [w * 3 * arch["k"] ** 2 + w + w * 4 + 4 for w, arch in zip(widths, archs, strict=True)]
    assert [row["params"] for row in cost.of(archs)] == params


def test_one_block_that_a_stage_repeats_has_its_weights_once_and_its_flops_each_time():
    space = SearchSpace([Int("depth", 0, 4)])
    model = Depth([Conv(3, 3, 3, bias=False)] * 4, space.value("depth"))
    rows = Cost(model, space, torch.zeros(1, 3, 8, 8)).of([*space])
    assert [row["flops"] for row in rows] == [81 * 64 * d for d in range(5)]
    assert [row["params"] for row in rows] == [0, 81, 81, 81, 81]
    assert [row["activations"] for row in rows] == [192 * d for d in range(5)]


def test_a_layer_that_two_candidates_share_counts_wherever_one_of_them_runs():
    space = SearchSpace([Categorical("op", ("a", "b", "none"))])
    shared = nn.Conv2d(3, 3, 1)
    candidates = {"a": nn.Sequential(shared), "b": nn.Sequential(shared, nn.Conv2d(3, 3, 1)), "none": nn.Identity()}
    rows = Cost(Mixed(candidates, space.value("op")), space, torch.zeros(1, 3, 2, 2)).of([*space])
    assert [(row["flops"], row["params"]) for row in rows] == [(36, 12), (72, 24), (0, 0)]


def test_a_layer_that_stands_twice_at_different_sizes_counts_both():
    space = SearchSpace([Int("unused", 0, 1)])
    conv = nn.Conv2d(3, 3, 1, bias=False)
    model = nn.Sequential(nn.Sequential(conv), nn.AvgPool2d(2), nn.Sequential(conv))
    assert Cost(model, space, torch.zeros(1, 3, 8, 8)).of([space.default()]) == [
        {"flops": 9 * (64 + 16), "params": 9, "activations": 3 * (64 + 16)}
    ]


def test_a_layer_that_is_called_again_at_some_sizes_only_counts_as_often_as_it_is_called():
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1, bias=False)

        def forward(self, x):
            return self.conv(self.conv(x)) if x.shape[-1] > 2 else self.conv(x)

    space = SearchSpace([Int("side", 2, 6, 2)])
    rows = Cost(nn.Sequential(Resize(space.value("side")), Again()), space, torch.zeros(1, 3, 8, 8)).of([*space])
    assert [(row["flops"], row["params"]) for row in rows] == [(9 * 4, 9), (2 * 9 * 16, 9), (2 * 9 * 36, 9)]


def test_candidates_that_only_a_deep_stage_runs_are_found():
    space = SearchSpace([Int("outer", 0, 3), Int("inner", 0, 2), Categorical("op", ("none", "a", "b"))])
    conv = {name: nn.Conv2d(3, 3, k, padding=k // 2, bias=False) for name, k in (("a", 3), ("b", 5))}
    mixed = Mixed({"none": nn.Identity(), **conv}, space.value("op"))
    model = Depth(
        [nn.Identity(), nn.Identity(), Depth([nn.Identity(), mixed], space.value("inner"))], space.value("outer")
    )
    for arch in itertools.product(range(4), range(3), ("none", "a", "b")):
        choices = dict(zip(space.keys, arch, strict=True))
        runs = arch[0] == 3 and arch[1] == 2
        expected = 9 * {"none": 0, "a": 9, "b": 25}[arch[2]] * runs
        assert Cost(model, space, torch.zeros(1, 3, 4, 4)).of([choices])[0]["params"] == expected


def test_a_model_of_another_precision_than_the_example_costs_the_same():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = Conv(3, WIDTH["width"], 3)
            self.gate = Conv(WIDTH["width"], WIDTH["width"])

        def forward(self, x):
            x = self.conv(x)
            return x * self.gate(x.mean((2, 3), keepdim=True))

    model, example = Gate(), torch.zeros(1, 3, 4, 4)
    expected = Cost(model, WIDTH, example).of(WIDTH)
    for kind in (torch.float64, torch.bfloat16):
        assert Cost(model.to(kind), WIDTH, example).of(WIDTH) == expected


WIDTH = SearchSpace([Categorical("width", (4, 8))])


def test_a_size_that_depends_on_an_undeclared_variable_is_an_error():
    class Shrink(Resize):
        resizes = ()

    space = SearchSpace([Int("side", 2, 4), Categorical("op", ("a", "b"))])
    mixed = Mixed({"a": nn.Identity(), "b": nn.AvgPool2d(2)}, space.value("op"))
    candidates = Mixed({"a": nn.Identity(), "b": nn.Conv2d(3, 3, 1)}, space.value("op"))
    with pytest.raises(ValueError, match="a mutable that resizes must declare `resizes`"):
        Cost(nn.Sequential(Shrink(space.value("side")), nn.Conv2d(3, 3, 1)), space, torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="a mutable that resizes must declare `resizes`"):
        Cost(nn.Sequential(mixed, nn.Conv2d(3, 3, 1), candidates), space, torch.zeros(1, 3, 4, 4))


class First(nn.Module):
    """The first output of a layer, of its inputs by place or by keyword."""

    def __init__(self, layer, **keywords):
        super().__init__()
        self.layer, self.keywords = layer, keywords

    def forward(self, *inputs):
        out = self.layer(*inputs, **self.keywords)
        return out[0] if isinstance(out, tuple) else out


def tokens(*shape):
    return torch.zeros(1, *shape)


@pytest.mark.parametrize(("layer", "example"), [
    (nn.ConvTranspose1d(4, 6, 4, 2, groups=2), (tokens(4, 9),)),
    (nn.ConvTranspose2d(3, 6, (4, 2), (2, 3), 1), (tokens(3, 5, 7),)),
    (nn.ConvTranspose3d(2, 3, 3, 2), (tokens(2, 3, 4, 5),)),
    (First(nn.MultiheadAttention(8, 2, batch_first=True)), (tokens(6, 8),) * 3),
    (First(nn.MultiheadAttention(8, 4, kdim=5, vdim=3, batch_first=True, add_zero_attn=True), need_weights=False),
     (tokens(6, 8), tokens(9, 5), tokens(9, 3))),
    (nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), (tokens(6, 8),)),
    (First(nn.LSTM(5, 7, 2, bidirectional=True, proj_size=3, batch_first=True)), (tokens(6, 5),)),
    (First(nn.GRU(5, 7, 2, batch_first=True)), (tokens(6, 5),)),
    (First(nn.LSTMCell(5, 7)), (tokens(5),)),
], ids=lambda part: type(getattr(part, "layer", part)).__name__)  # fmt: skip
def test_layers_of_which_not_the_output_alone_counts_cost_what_torch_counts(layer, example):
    space = SearchSpace([Int("unused", 0, 1)])
    (cost,) = Cost(layer, space, example).of([space.default()])
    plain = torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH)
    with plain[0], plain[1], FlopCounterMode(display=False) as counter:
        layer.train()(*example)
    assert cost["flops"] == counter.get_total_flops() // 2 > 0
    assert cost["params"] == sum(p.numel() for p in layer.parameters())


def test_activations_are_those_of_the_layers_inside():
    space = SearchSpace([Int("unused", 0, 1)])

    def activations(layer, *example):
        return Cost(layer, space, example).of([space.default()])[0]["activations"]

    assert activations(nn.ConvTranspose2d(3, 6, 2, 2), tokens(3, 5, 7)) == 6 * 10 * 14
    assert activations(First(nn.MultiheadAttention(8, 2, batch_first=True)), *[tokens(6, 8)] * 3) == 4 * 6 * 8
    assert activations(First(nn.GRU(5, 7, batch_first=True)), tokens(6, 5)) == 6 * 2 * 3 * 7
    assert activations(nn.Bilinear(3, 4, 5), tokens(6, 3), tokens(6, 4)) == 6 * 5


def test_a_bilinear_layer_costs_its_weights_at_each_position():
    space = SearchSpace([Int("unused", 0, 1)])
    (cost,) = Cost(nn.Bilinear(3, 4, 5), space, (tokens(6, 3), tokens(6, 4))).of([space.default()])
    assert (cost["flops"], cost["params"]) == (6 * 3 * 4 * 5, 3 * 4 * 5 + 5)


def test_weights_tied_between_layers_count_once_wherever_one_of_them_runs():
    space = SearchSpace([Categorical("op", ("a", "b")), Int("depth", 1, 2), Categorical("width", (4, 6))])

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(10, 6), nn.Linear(6, 10, bias=False)
            self.head.weight = self.embedding.weight
            self.mixed = Mixed({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)}, space.value("op"))
            second = nn.Linear(6, 6, bias=False)
            second.weight = self.mixed.candidates["b"].weight
            self.stage = Depth([nn.Identity(), second], space.value("depth"))
            self.first, self.second = (toys.Linear(space.value("width"), 6) for _ in range(2))
            self.second.weight = self.first.weight

        def forward(self, x):
            x = self.stage(self.mixed(self.embedding(x)))
            few = x[..., : sum(self.first.elastic.choice["inputs"])]
            return self.head(x), self.first(few), self.second(few)

    cost = Cost(Tied(), space, torch.zeros(1, 3, dtype=torch.long))
    for arch in space:
        by_hand = 60 + 36 + 6 + (36 if arch["op"] == "a" and arch["depth"] == 2 else 0) + 6 * arch["width"]
        by_hand += 2 * 6  # two biases
        assert cost.of([arch])[0]["params"] == by_hand
        plain = export_subnet(Tied().eval(), arch, torch.zeros(1, 3, dtype=torch.long))
        assert sum(p.numel() for p in plain.parameters()) == by_hand


def test_what_a_layer_says_of_itself_counts():
    class Attention(nn.Module):
        """q k v of the same width; flops of the products grow with the square of the tokens."""

        def __init__(self):
            super().__init__()
            self.elastic = Elastic({"outputs": as_value(4)})

        def cost(self, positions):
            return LayerCost(flops=positions * positions * 8)

        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x), None

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Attention()

        def forward(self, x):
            return self.attention(x)[0]

    space = SearchSpace([Int("unused", 0, 1)])
    with FlopCounterMode(display=False) as counter:
        Model()(torch.zeros(1, 6, 4))
    assert (
        Cost(Model(), space, torch.zeros(1, 6, 4)).of([space.default()])[0]["flops"] == counter.get_total_flops() // 2
    )


def test_variables_of_a_model_that_the_space_lacks_are_told():
    space = SearchSpace([Categorical("width", (4, 8))])
    with pytest.raises(ValueError, match=r"depends on 'wdth', which the space lacks: did you mean 'width'"):
        Cost(Conv(Categorical("wdth", (4, 8)), 1, 3), space, torch.zeros(1, 4, 8, 8))


class Silent(nn.Conv2d):
    """A mutable with parameters that does not say what it costs."""

    def __init__(self, outputs):
        super().__init__(3, outputs.largest, 1)
        self.elastic = Elastic({"outputs": outputs})

    def forward(self, x):
        return super().forward(x)[:, : self.elastic.choice["outputs"]]


def test_a_mutable_with_parameters_that_states_no_cost_is_refused_by_its_path():
    space = SearchSpace([Categorical("width", (4, 8))])
    model = nn.Sequential(nn.Identity(), nn.Sequential(Silent(space["width"])))
    with pytest.raises(ValueError, match=r"1\.0, a Silent, is a mutable with parameters .* method `cost\(positions\)`"):
        Cost(model, space, torch.zeros(1, 3, 4, 4))


class TwoInputs(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.image, self.clip = Conv(3, width, 1), nn.Conv3d(3, 4, (2, 1, 1))

    def forward(self, image, clip, scale=1):
        return {"image": self.image(image) * scale, "clip": self.clip(clip)}


def test_an_example_may_be_any_tree_of_inputs():
    space = SearchSpace([Categorical("width", (4, 8))])
    model = TwoInputs(space["width"])
    image, clip = torch.zeros(1, 3, 5, 5), torch.zeros(1, 3, 2, 6, 6)
    wanted = [25 * 3 * width + 36 * 4 * 6 for width in (4, 8)]
    for example in ((image, clip), [image, clip, 2], {"clip": clip, "image": image}):
        assert [cost["flops"] for cost in Cost(model, space, example).of([{"width": 4}, {"width": 8}])] == wanted


class Whole(nn.Module):
    """A module that says what all of it costs; its layers would say something else."""

    def __init__(self, width):
        super().__init__()
        self.width, self.layer = width, Conv(3, width)

    def forward(self, x):
        return self.layer(x)

    def whole_cost(self, example):
        yield LayerCost(flops=self.width * example.numel(), params=self.width)
        yield LayerCost(activations=self.width * 2, params=as_value(5))


def test_a_module_that_says_what_all_of_it_costs_is_taken_by_its_word_behind_gates_too():
    space = SearchSpace([Int("depth", 0, 1), Categorical("width", (4, 8))])
    width, image = space.value("width"), torch.zeros(1, 3, 2, 2)

    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.whole, self.elastic = Whole(width), Elastic({"depth": space.value("depth")})

        def forward(self, x):
            return self.whole(x) if self.elastic.choice["depth"] else x

        def gates(self):
            return [(self.whole, at_least(space.value("depth"), 1))]

    archs = [{"depth": 0, "width": 8}, {"depth": 1, "width": 4}, {"depth": 1, "width": 8}]
    wanted = [(0, 0, 0), (48, 9, 8), (96, 13, 16)]
    assert [(*cost.values(),) for cost in Cost(Gate(), space, image).of(archs)] == wanted
    free = Cost(nn.Sequential(Whole(width), Conv(width, 2)), space, image).of(archs[2:])
    assert free == [{"flops": 96 + 8 * 2 * 4, "params": 13 + 18, "activations": 16 + 8}]
    added = Cost.adding(Whole(width).whole_cost(image), space)
    assert [(*cost.values(),) for cost in added.of(archs)] == [wanted[2], *wanted[1:]]


def test_a_backbone_alone_has_a_cost_and_is_exported():
    space, task = toys.make_space(), toys.Task()
    whole = toys.small.supernet(space, task).eval()
    for arch in (space.smallest(), space.largest()):
        (body,), (all_of_it,) = (Cost(part, space, task.example).of([arch]) for part in (whole.backbone, whole))
        assert all_of_it["flops"] - body["flops"] == 3 * arch["width"]
        plain = export_subnet(whole.backbone, arch, task.example)
        assert sum(p.numel() for p in plain.parameters()) == body["params"]


class Products(nn.Module):
    """Tokens (n, t, 8) -> the same shape, by products that are no layers."""

    def __init__(self, way):
        super().__init__()
        self.way, self.linear = way, nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.rand(8, 8))

    def forward(self, x):
        y = self.linear(x)
        ways = {
            "@": lambda: x @ y.transpose(1, 2) @ y,
            "matmul": lambda: torch.matmul(torch.matmul(x, y.mT), y),
            "bmm": lambda: torch.bmm(torch.bmm(x, y.mT), y),
            "einsum": lambda: torch.einsum("ntc,nsc,nsd->ntd", x, y, y),
            "sdpa": lambda: F.scaled_dot_product_attention(x[:, None], y[:, None], y[:, None])[:, 0],
            "linear": lambda: F.linear(y, self.weight),
            "parameter": lambda: y @ self.weight,
            "conv": lambda: F.conv1d(y.mT, self.weight[:, :, None]).mT,
        }
        return ways[self.way]()


@pytest.mark.parametrize("way", ["@", "matmul", "bmm", "einsum", "sdpa", "linear", "parameter", "conv"])
def test_products_that_are_no_layers_cost_what_torch_counts(way):
    class Twice(nn.Module):
        """A block of which a second one runs in deep archs alone."""

        def __init__(self, depth):
            super().__init__()
            self.first, self.second, self.elastic = Products(way), Products(way), Elastic({"depth": depth})

        def gates(self):
            return [(self.second, at_least(self.elastic.values["depth"], 2))]

        def forward(self, x):
            x = self.first(x)
            return self.second(x) if self.elastic.choice["depth"] > 1 else x

    space, x = SearchSpace([Int("d", 1, 2)]), torch.rand(2, 6, 8)
    model = Twice(space.value("d"))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        Products(way)(x[:1])
    once = counter.get_total_flops() // 2
    found = Cost(model, space, x[:1]).of([{"d": 1}, {"d": 2}])
    assert [cost["flops"] for cost in found] == [once, 2 * once]
    assert [cost["params"] for cost in found] == [136, 272]


def test_products_that_follow_from_an_arch_are_refused():
    class Gram(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.conv = Conv(3, width)

        def forward(self, x):
            y = self.conv(x).flatten(2)
            return y @ y.mT

    space = SearchSpace([Int("w", 4, 8, step=4)])
    with pytest.raises(ValueError, match="Gram computes products itself"):
        Cost(Gram(space.value("w")), space, torch.rand(1, 3, 4, 4))
