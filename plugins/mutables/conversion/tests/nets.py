"""Networks as a user would write them."""

import torch
import torch.nn.functional as F
from torch import nn


class Functional(nn.Module):
    """Concatenation, chunks, sums, resizing, a functional convolution with a bare weight, groups."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 32, 3, padding=1)
        self.b = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.c = nn.Conv2d(32, 32, 5, padding=2)
        self.n = nn.BatchNorm2d(32)
        self.w = nn.Parameter(torch.randn(48, 96, 1, 1) * 0.1)
        self.d = nn.Conv2d(48, 24, 3, padding=1, groups=4)
        self.out = nn.Linear(24 + 32, 10)

    def forward(self, x):
        a = F.relu(self.a(x))
        p, q = torch.chunk(F.relu(self.b(a)), 2, dim=1)
        q = self.n(self.c(q)) + p
        u = F.interpolate(q, size=a.shape[-2:], mode="nearest")
        y = torch.cat([a, u, F.interpolate(p, scale_factor=2.0)], 1)
        z = self.d(F.relu(F.conv2d(y, self.w)))
        return self.out(torch.cat([z.mean((2, 3)), a.amax((2, 3))], 1))


class Shared(nn.Module):
    """The same block twice, and one convolution for two resolutions."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        layers = nn.Conv2d(32, 64, 1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 32, 3, padding=1)
        self.block = nn.Sequential(*layers)
        self.head = nn.Conv2d(32, 16, 1)
        self.fc = nn.Linear(32, 10)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.block(x)
        y = self.head(x)
        x = F.avg_pool2d(x, 2)
        x = x + self.block(x)
        return self.fc(torch.cat([y.mean((2, 3)), self.head(x).mean((2, 3))], 1))


class TwoInputs(nn.Module):
    """An image and a table, by keyword or not; `values` and `choice` are names of its own."""

    def __init__(self):
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU())
        self.values = nn.Sequential(nn.Linear(7, 64), nn.ReLU())
        self.choice = nn.Sequential(nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, image, table):
        return {"logits": self.choice(torch.cat([self.image(image).mean((2, 3)), self.values(table)], 1))}


class Branching(nn.Module):
    """Control flow that depends on values: it has to be refused."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(3, 16, 1)

    def forward(self, x):
        y = self.a(x) if x.mean() > 0 else self.b(x)  # HERE
        return y.mean((2, 3))


class Encoder(nn.Module):
    """torch's own transformer layers over words."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(100, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0)
        self.enc = nn.TransformerEncoder(layer, 3)
        self.fc = nn.Linear(64, 5)

    def forward(self, ids):
        return self.fc(self.enc(self.emb(ids)).mean(1))


class Literal(nn.Module):
    """Literal numbers in forward: a slice that no attribute names."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 32, 3, padding=1)
        self.b = nn.Conv2d(16, 32, 3, padding=1)
        self.c = nn.Conv2d(48, 32, 3, padding=1)
        self.fc = nn.Linear(32, 10)

    def forward(self, x):
        x = self.a(x)
        x = torch.cat([self.b(x[:, :16]), x[:, 16:]], 1)  # LITERAL
        return self.fc(self.c(x).mean((2, 3)))


class UNet(nn.Module):
    """An encoder and a decoder with skips between them, transposed convolutions, two kinds of norms."""

    def __init__(self):
        super().__init__()

        def two(i, o):
            first = nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU()
            return nn.Sequential(*first, nn.Conv2d(o, o, 3, padding=1), nn.GroupNorm(4, o), nn.ReLU())

        self.d1, self.d2, self.d3 = two(3, 16), two(16, 32), two(32, 64)
        self.u2, self.u1 = nn.ConvTranspose2d(64, 32, 2, 2), nn.ConvTranspose2d(32, 16, 2, 2)
        self.c2, self.c1 = two(64, 32), two(32, 16)
        self.out = nn.Conv2d(16, 2, 1)

    def forward(self, x):
        a = self.d1(x)
        b = self.d2(F.max_pool2d(a, 2))
        c = self.d3(F.max_pool2d(b, 2))
        x = self.c2(torch.cat([self.u2(c), b], 1))
        return self.out(self.c1(torch.cat([self.u1(x), a], 1)))


class RMSNorm(nn.Module):
    """A norm by the root of the mean square."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


def rotated(x, base=100.0):
    """Rotary embedding of (n, heads, tokens, features)."""
    half = x.shape[-1] // 2
    angles = torch.outer(torch.arange(x.shape[-2]), base ** (-torch.arange(half) / half)).to(x)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


class DecoderBlock(nn.Module):
    """Grouped-query attention and a gated MLP."""

    def __init__(self, dim, heads, groups, hidden):
        super().__init__()
        self.heads, self.groups, self.head_dim = heads, groups, dim // heads
        self.norm1, self.norm2 = RMSNorm(dim), RMSNorm(dim)
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, groups * self.head_dim, bias=False)
        self.v = nn.Linear(dim, groups * self.head_dim, bias=False)
        self.o = nn.Linear(dim, dim, bias=False)
        self.gate, self.up = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        n, t, _ = x.shape
        y = self.norm1(x)
        q = rotated(self.q(y).view(n, t, self.heads, self.head_dim).transpose(1, 2))
        k = rotated(self.k(y).view(n, t, self.groups, self.head_dim).transpose(1, 2))
        v = self.v(y).view(n, t, self.groups, self.head_dim).transpose(1, 2)
        k, v = (z.repeat_interleave(self.heads // self.groups, dim=1) for z in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(n, t, self.heads * self.head_dim))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """A small language model, the words' embedding tied to the head."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(50, 32)
        self.blocks = nn.ModuleList(DecoderBlock(32, 8, 4, 64) for _ in range(3))
        self.norm = RMSNorm(32)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids):
        x = self.emb(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Unknown(nn.Module):
    """An operation that no rule is about."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x):
        x = torch.trapezoid(torch.special.bessel_j0(self.a(x)).unsqueeze(-1).expand(-1, -1, 2), dim=-1)
        x = torch.renorm(x, 2, 0, 1.0)  # UNKNOWN
        return self.c(F.relu(self.b(x)))


class Residual(nn.Module):
    """A residual block with a depthwise convolution."""

    def __init__(self, width, inner):
        super().__init__()
        self.expand, self.norm1 = nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.depthwise = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.project, self.norm3 = nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        y = F.relu(self.norm1(self.expand(x)))
        return x + self.norm3(self.project(F.relu(self.norm2(self.depthwise(y)))))


def tiny(num_classes=10, in_channels=3):
    """A network that computes in no time."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 16, 5, stride=2, padding=2, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Sequential(*(Residual(16, 32) for _ in range(3))),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, num_classes),
    )


def small_resnet(classes=10, in_channels=1):
    """A residual network for digits."""
    from torchvision.models.resnet import BasicBlock, ResNet

    net = ResNet(BasicBlock, [2, 2, 1, 1], num_classes=classes)
    net.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    return net


class Lazy(nn.Module):
    """Where pixels are is worked out at the first run, and kept."""

    def __init__(self):
        super().__init__()
        self.stem, self.hidden, self.head = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 24), nn.Linear(24, 10)
        self.embed = nn.Linear(3, 16)
        self.register_buffer("places", torch.zeros(1, 3), persistent=False)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        if len(self.places) != x.shape[1]:
            places = torch.zeros(x.shape[1], 3, device=x.device)
            places[:, 0] = torch.arange(x.shape[1], device=x.device)
            self.places = places
        return self.head(F.relu(self.hidden(x + self.embed(self.places))).mean(1))


class Passing(nn.Module):
    """A residual block that hands on what it was told beside the image, or wraps what it gives."""

    def __init__(self, wraps):
        super().__init__()
        self.wraps, self.wide, self.narrow = wraps, nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 16, 1)

    def forward(self, x, size=None):
        x = x + self.narrow(F.relu(self.wide(x)))
        return (x,) if self.wraps else (x, size)


class Tuples(nn.Module):
    """Blocks as MViT and those of transformers have them."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 10)
        self.first = nn.ModuleList(Passing(False) for _ in range(2))
        self.second = nn.ModuleList(Passing(True) for _ in range(3))

    def forward(self, x):
        x = self.stem(x)
        size = [*x.shape[2:]]
        for block in self.first:
            x, size = block(x, size)
        for block in self.second:
            x = block(x)[0]
        return self.head(x.mean((2, 3))) / size[0]
