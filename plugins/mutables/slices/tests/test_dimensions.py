"""Layers with several parts: concatenation, split with shuffle, qkv, depthwise after them; against a plain network."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from corenas.cost import Cost
from corenas.export import export_subnet
from corenas.mutable import Elastic, LayerCost, apply
from corenas.space import SearchSpace
from corenas.value import Dimension
from corenas.variables import Categorical
from corenas_mutable_slices import Conv2dSlice, LinearSlice

SPACE = SearchSpace([Categorical("a", (2, 3, 5)), Categorical("b", (1, 4)), Categorical("half", (2, 3, 4)),
                     Categorical("head", (2, 4)), Categorical("kernel", (3, 5))])  # fmt: skip


class Split(nn.Module):
    """Channels in two halves, the first of which `main` transforms; then the halves are shuffled."""

    def __init__(self, half):
        super().__init__()
        self.main = Conv2dSlice(half, half, 1)
        self.elastic = Elastic({"halves": Dimension.of([half, half])})

    def forward(self, x):
        first, second = x.split(self.elastic.choice["halves"], 1)
        return torch.stack([self.main(first), second], 2).flatten(1, 2)


class Attention(nn.Module):
    """Two heads; forward: (n, tokens, 3 · 2 · head) -> (n, tokens, 2 · head)."""

    def __init__(self, head):
        super().__init__()
        self.elastic = Elastic({"outputs": head * 2})

    def cost(self, tokens):
        return LayerCost(flops=tokens * tokens * self.elastic.values["outputs"] * 2)

    def forward(self, qkv):
        q, k, v = qkv.unflatten(2, (3, 2, self.elastic.choice["outputs"] // 2)).permute(2, 0, 3, 1, 4).unbind(0)
        return ((q @ k.transpose(2, 3)).softmax(3) @ v).transpose(1, 2).flatten(2)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        a, b, half, head, kernel = (SPACE.value(key) for key in SPACE.keys)
        both, halves = Dimension.of([a, b]), Dimension.of([half, half])
        self.left, self.right = Conv2dSlice(3, a, 3), Conv2dSlice(3, b, 1)
        self.depthwise = Conv2dSlice(both, both, kernel, groups="depthwise")
        self.join, self.split = Conv2dSlice(both, halves, 1), Split(half)
        self.after = Conv2dSlice(half * 2, half * 2, 3, groups="depthwise", bias=False)
        self.qkv, self.attention = LinearSlice(half * 2, [head * 2] * 3), Attention(head)
        self.out = LinearSlice(head * 2, 7)

    def forward(self, x):
        x = self.depthwise(torch.cat([self.left(x), self.right(x)], 1))
        x = self.after(self.split(self.join(x)))
        return self.out(self.attention(self.qkv(x.flatten(2).transpose(1, 2))))


class Plain(nn.Module):
    """The subnet of an arch written out by hand, each weight picked by the numbers of its channels."""

    def __init__(self, net, a, b, half, head, kernel):
        super().__init__()
        both, halves = [*range(a), *range(5, 5 + b)], [*range(half), *range(4, 4 + half)]
        qkv = [part * 8 + i for part in range(3) for i in range(2 * head)]
        edge = (5 - kernel) // 2
        w = {name: p.detach() for name, p in net.named_parameters()}
        picked = {
            "left": (w["left.weight"][:a], w["left.bias"][:a]), "right": (w["right.weight"][:b], w["right.bias"][:b]),
            "depthwise": (w["depthwise.weight"][both][:, :, edge : edge + kernel, edge : edge + kernel],
                          w["depthwise.bias"][both]),
            "join": (w["join.weight"][halves][:, both], w["join.bias"][halves]),
            "main": (w["split.main.weight"][:half, :half], w["split.main.bias"][:half]),
            "after": (w["after.weight"][: 2 * half], None),
            "qkv": (w["qkv.weight"][qkv][:, : 2 * half], w["qkv.bias"][qkv]),
            "out": (w["out.weight"][:, : 2 * head], w["out.bias"]),
        }  # fmt: skip
        for name, (weight, bias) in picked.items():
            cls = nn.Linear if weight.dim() == 2 else nn.Conv2d
            groups = len(weight) if name in ("depthwise", "after") else 1
            shape = () if weight.dim() == 2 else (weight.shape[2], 1, weight.shape[2] // 2, 1, groups)
            layer = cls(weight.shape[1] * groups, len(weight), *shape, bias=bias is not None)
            layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
            self.add_module(name, layer)
        self.half, self.head = half, head

    def forward(self, x):
        x = self.join(self.depthwise(torch.cat([self.left(x), self.right(x)], 1)))
        first, second = self.main(x[:, : self.half]), x[:, self.half :]
        x = torch.cat([t[:, i : i + 1] for i in range(self.half) for t in (first, second)], 1)
        q, k, v = self.qkv(self.after(x).flatten(2).transpose(1, 2)).split(2 * self.head, 2)
        heads = [
            (F.softmax(q[..., h] @ k[..., h].mT, 2) @ v[..., h]) for h in (slice(self.head), slice(self.head, None))
        ]
        return self.out(torch.cat(heads, 2))


@pytest.mark.parametrize("seed", range(6))
def test_cost_apply_and_export_are_those_of_the_plain_network(seed):
    torch.manual_seed(seed)
    net, images = Net(), torch.randn(2, 3, 6, 6)
    cost = Cost(net, SPACE, images[:1])
    for arch in SPACE.decode(SPACE.draw(np.random.default_rng(seed), 8)):
        plain = Plain(net, **arch)
        with apply(net, arch):
            torch.testing.assert_close(net(images), plain(images), atol=1e-6, rtol=1e-5)
        exported = export_subnet(net, arch, images[:1])
        torch.testing.assert_close(exported(images), plain(images), atol=1e-6, rtol=1e-5)
        assert {n: p.shape for n, p in exported.named_parameters()}.keys() >= {"left.weight", "qkv.bias"}
        with FlopCounterMode(display=False) as counter:
            plain(images[:1])
        found = cost.of([arch])[0]
        assert found["flops"] == counter.get_total_flops() // 2
        assert (
            found["params"]
            == sum(p.numel() for p in plain.parameters())
            == sum(p.numel() for p in exported.parameters())
        )
