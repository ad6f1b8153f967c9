"""Weights of AutoFormer's supernets, by the names of its code.

What its code computes with them is written out here for one arch, with torch's functions alone. The code itself agrees
as well: four subnets each of its tiny and its small supernet, to 4e-8, which is the single precision of its softmax.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from corenas import SearchSpace, apply
from corenas.errors import UserError
from corenas.supernet import build_supernet
from corenas_backbone_vit import VisionTransformer
from corenas_mutable_slices import LinearSlice

TABLE = {
    "width": [48, 64],
    "resolution": 28,
    "patch": 7,
    "pool": "mean",
    "relative_position": 2,
    "norm_eps": 1e-5,
    "stages": [{"depth": [1, 2, 3], "head_dim": 16, "block": {"heads": [1, 2], "mlp_ratio": [1.5, 2.0]}}],
}
WIDTH, INNER, MLP, TOKENS = 72, 32, 144, 17
"""Of the supernet whose weights they are: wider than any arch, as AutoFormer's is."""


def drawn():
    """A state dict in which no two features are alike."""
    shapes = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, TOKENS, WIDTH),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
    }
    shapes |= {"patch_embed_super.proj.weight": (WIDTH, 1, 7, 7), "patch_embed_super.proj.bias": (WIDTH,)}
    for path in ("blocks.0.", "blocks.1.", "blocks.2."):
        layers = {"attn.qkv": (3 * INNER, WIDTH), "attn.proj": (WIDTH, INNER), "fc1": (MLP, WIDTH), "fc2": (WIDTH, MLP)}
        for name, shape in {**layers, "attn_layer_norm": (WIDTH,), "ffn_layer_norm": (WIDTH,)}.items():
            shapes |= {f"{path}{name}.weight": shape, f"{path}{name}.bias": shape[:1]}
        shapes |= {f"{path}attn.rel_pos_embed_{a}.embeddings_table_{b}": (6, 16) for a in "kv" for b in "vh"}
    shapes |= {"head.weight": (10, WIDTH), "head.bias": (10,)}
    generator = torch.Generator().manual_seed(0)
    draw = lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return {name: draw(shape) / (shape[-1] ** 0.5 if len(shape) == 2 else 1) for name, shape in shapes.items()}


def computed(state, arch, x):
    """What a subnet gives for images, by the first features of each tensor."""
    width = arch["width"]

    def norm(path, x):
        return F.layer_norm(x, (width,), state[f"{path}.weight"][:width], state[f"{path}.bias"][:width])

    def linear(path, x, outputs):
        return F.linear(x, state[f"{path}.weight"][:outputs, : x.shape[-1]], state[f"{path}.bias"][:outputs])

    x = F.conv2d(x, state["patch_embed_super.proj.weight"], state["patch_embed_super.proj.bias"], 7)[:, :width]
    token = state["cls_token"][..., :width].expand(len(x), -1, -1)
    x = torch.cat([token, x.flatten(2).transpose(1, 2)], 1) + state["pos_embed"][..., :width]
    for j in range(arch["stages.0.depth"]):
        path, heads = f"blocks.{j}.", arch[f"stages.0.blocks.{j}.heads"]
        inner = 16 * heads
        weight = state[f"{path}attn.qkv.weight"][: 3 * inner, :width]  # queries, keys and values take turns
        thirds = torch.cat([weight[i::3] for i in range(3)])
        qkv = F.linear(norm(f"{path}attn_layer_norm", x), thirds, state[f"{path}attn.qkv.bias"][: 3 * inner])
        queries, keys, values = qkv.unflatten(2, (3, heads, 16)).permute(2, 0, 3, 1, 4)
        of_keys, of_values = (positions(state, f"{path}attn.rel_pos_embed_{which}.") for which in "kv")
        scores = queries @ keys.transpose(2, 3) + torch.einsum("bhqd,qkd->bhqk", queries, of_keys)
        shares = (scores / 4).softmax(-1)
        mixed = shares @ values + torch.einsum("bhqk,qkd->bhqd", shares, of_values)
        x = x + linear(f"{path}attn.proj", mixed.transpose(1, 2).flatten(2), width)
        more = F.gelu(
            linear(f"{path}fc1", norm(f"{path}ffn_layer_norm", x), int(width * arch[f"stages.0.blocks.{j}.mlp_ratio"]))
        )
        x = x + linear(f"{path}fc2", more, width)
    return linear("head", norm("norm", x)[:, 1:].mean(1), 10)


def positions(state, path):
    """The embedding of each pair of tokens: of how many rows and columns of patches they are apart, at most 2."""
    table = torch.zeros(TOKENS, TOKENS, 16, dtype=torch.float64)
    for which, place in (("v", lambda n: n // 4), ("h", lambda n: n % 4)):
        rows = state[f"{path}embeddings_table_{which}"]
        table += rows[0]
        for a in range(16):
            for b in range(16):
                table[1 + a, 1 + b] += rows[min(max(place(b) - place(a), -2), 2) + 3] - rows[0]
    return table


class Head(nn.Module):
    """A linear layer, as a task has."""

    def __init__(self, dims):
        super().__init__()
        self.classifier = LinearSlice(dims[-1], 10)

    def forward(self, features):
        return self.classifier(features[-1].flatten(1))


def built(folder, space, **options):
    torch.save({"model": drawn()}, folder / "supernet.pth")
    task = SimpleNamespace(head=Head, example=torch.zeros(1, 1, 28, 28))
    backbone = VisionTransformer(weights=str(folder / "supernet.pth"), in_channels=1, **options)
    return build_supernet(backbone, space, task).double().eval()


@pytest.mark.parametrize("narrow", [{}, {"stages.0.depth": [1, 2], "width": [48]}])
def test_subnets_of_a_released_supernet_compute_what_its_code_computes(tmp_path, narrow):
    space, x = SearchSpace.from_table(TABLE).narrow(narrow), torch.randn(2, 1, 28, 28, dtype=torch.float64)
    model, rng = built(tmp_path, space, front_bias=True), np.random.default_rng(0)
    for arch in (space.largest(), space.smallest(), *(space.sample(rng) for _ in range(4))):
        with torch.no_grad(), apply(model, arch):
            torch.testing.assert_close(model(x), computed(drawn(), arch, x), rtol=1e-4, atol=1e-4)


def test_a_backbone_whose_subnets_have_other_biases_is_refused(tmp_path):
    with pytest.raises(UserError, match="a supernet of AutoFormer") as caught:
        built(tmp_path, SearchSpace.from_table(TABLE))
    assert "`front_bias = true`" in (caught.value.faults[0].hint or "")
