"""How well models are converted to supernets: the table of plugins/mutables/conversion/README.md; run by hand.

Of each model: the seconds that its conversion takes (processor time, checks included), its variables, flops of the
smallest over those of the largest arch, the difference of the largest to the model as it was; and of how many archs
(the largest, the smallest, random ones) the export computes the same, and the cost is that of the export as torch
counts it.

    OMP_NUM_THREADS=1 uv run python tests/benchmarks/conversion.py [--archs N] [--image N] [MODEL…]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from corenas.errors import UserError
from corenas.export import TOLERANCE, difference
from corenas.mutable import apply, call_model
from corenas_mutable_conversion import convert
from corenas_mutable_conversion.models import build_model, shape_of

TORCHVISION = (
    "resnet18 resnet50 mobilenet_v2 mobilenet_v3_large efficientnet_b0 densenet121 googlenet inception_v3 "
    "shufflenet_v2_x1_0 regnet_y_400mf resnext50_32x4d convnext_tiny vit_b_16 swin_t mnasnet1_0 squeezenet1_0 vgg11_bn"
)
TIMM = (
    "deit_tiny_patch16_224 gernet_s mobilenetv4_conv_small resnest14d repvgg_a0 efficientformer_l1 "
    "tf_efficientnet_lite0 nfnet_f0 mobilevit_s poolformer_s12 mixer_s32_224 levit_128s edgenext_small"
)
MODELS = [
    f"{library}:{name}" for library, names in (("torchvision", TORCHVISION), ("timm", TIMM)) for name in names.split()
]


def alive(model: nn.Module) -> nn.Module:
    """Give statistics, and scales that are nearly zero, some life: fresh networks can compute nearly nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) * 0.1)
                module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
                module.weight.copy_(torch.rand(module.weight.shape, generator=generator) + 0.5)
        for weight in model.parameters():
            if weight.dim() > 0 and weight.abs().max() <= 1e-3:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return model.eval()


def counted(network: nn.Module, example: Any) -> tuple[int, int]:
    """Flops and params of a network as torch counts them."""
    network.requires_grad_(False)  # torch's counter stumbles over parameters that are inputs of modules
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call_model(network, example)
    return counter.get_total_flops() // 2, sum(weight.numel() for weight in network.parameters())


def measured(name: str, archs: int, image: int | None) -> dict[str, Any]:
    """The row of a model."""
    torch.manual_seed(0)
    model = alive(build_model(name))
    shape = (3, image, image) if image else (3, 299, 299) if "inception" in name else shape_of(model)
    example = torch.randn(1, *shape)
    original = alive(build_model(name))
    original.load_state_dict(model.state_dict())
    start = time.process_time()
    try:
        made = convert(model, example)
    except UserError as error:
        return {"model": name, "refused": str(error).splitlines()[0]}
    seconds = time.process_time() - start
    rng = np.random.default_rng(1)
    tried = [made.space.largest(), made.space.smallest(), *(made.space.sample(rng) for _ in range(archs))]
    same = exact = 0
    for arch in tried:
        network = made.plain(arch).eval()
        with apply(made.supernet, arch):
            same += difference(network, made.supernet, example) <= TOLERANCE
        meta = network.to("meta")
        cost = made.cost.of([arch])[0]
        exact += counted(meta, tree_map_only(torch.Tensor, lambda t: t.to("meta"), example)) == (
            cost["flops"],
            cost["params"],
        )
    with apply(made.supernet, made.space.largest()):
        error = difference(original, made.supernet, example)
    most, least = (cost["flops"] for cost in made.cost.of([made.space.largest(), made.space.smallest()]))
    return {
        "model": name.partition(":")[2],
        "s": f"{seconds:.1f}",
        "variables": len(made.space.keys),
        "smallest / largest flops": f"{least / most:.3f}",
        "difference": f"{error:.1e}",
        "exports equal": f"{same}/{len(tried)}",
        "costs exact": f"{exact}/{len(tried)}",
        "not searchable": len([finding for finding in made.left if finding.axis == "outputs"]),
    }


def main() -> None:
    """Print a row for each model as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", default=MODELS)
    parser.add_argument("--archs", type=int, default=5)
    parser.add_argument("--image", type=int, help="side of the images, where a model takes others than its own")
    options = parser.parse_args()
    for i, name in enumerate(options.models):
        row = measured(name, options.archs, options.image)
        if not i:
            print("| " + " | ".join(row) + " |\n|" + " --- |" * len(row))
        print("| " + " | ".join(map(str, row.values())) + " |", flush=True)


if __name__ == "__main__":
    main()
