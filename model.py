"""The network u(z, r, t, y): a Diffusion Transformer conditioned on a label and on two times.

DiT with adaLN-Zero (arXiv 2212.09748), its blocks untouched; the one time of a diffusion model
becomes a pair r <= t (MeanFlow, arXiv 2505.13447v1, Tab. 1c and App. A). Everywhere in this project
t = 1 is noise, t = 0 is data, and the order of arguments is the paper's: net(z, r, t, y).

    net = DiT.from_config("B/4", channels=4, size=32, num_classes=1000)
    u = net(z, r, t, y)                    # average velocity between r and t, shaped like z
"""

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

# name: depth, width, heads, patch. B to XL: arXiv 2505.13447v1, Tab. 4; S: arXiv 2212.09748.
CONFIGS = {
    "tiny":  (4, 128, 4, 4),
    "S/4":   (12, 384, 6, 4),
    "S/2":   (12, 384, 6, 2),
    "B/4":   (12, 768, 12, 4),
    "B/2":   (12, 768, 12, 2),
    "M/2":   (16, 1024, 16, 2),
    "L/2":   (24, 1024, 16, 2),
    "XL/2":  (28, 1152, 16, 2),
    "XL/2+": (28, 1152, 16, 2),  # the same network; the recipe is its own
}  # fmt: skip

# What the network sees of (r, t). Whatever it sees, what is trained and differentiated is u as a
# function of (z, r, t): arXiv 2505.13447v1, Sec. 4.3.
CONDITIONINGS = {
    "t,t-r":   lambda r, t: (t, t - r),
    "t,r":     lambda r, t: (t, r),
    "t,r,t-r": lambda r, t: (t, r, t - r),
    "t-r":     lambda r, t: (t - r,),
}  # fmt: skip


class TimeEmbedder(nn.Module):
    """Sinusoids of a time in [0, 1], then an MLP: (B,) -> (B, D)."""

    def __init__(self, width, frequencies=256):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        return self.mlp(sinusoids(t, self.frequencies))


class Attention(nn.Module):
    """Multi-head self-attention: (B, N, D) -> (B, N, D)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, heads, D / heads)
        q, k, v = qkv.transpose(1, 3).unbind(2)  # 3 x (B, heads, N, D / heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Transformer block; shifts, scales and gates are read off the conditioning c (adaLN-Zero)."""

    def __init__(self, width, heads, mlp_ratio=4):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_ratio * width),
            nn.GELU(approximate="tanh"),
            nn.Linear(mlp_ratio * width, width),
        )
        self.adaln = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        # Each (B, 1, D):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(c)[:, None].chunk(6, -1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1))  # (B, N, D)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))  # (B, N, D)


class FinalLayer(nn.Module):
    """adaLN and a linear map to the pixels of each patch: (B, N, D) -> (B, N, p * p * C)."""

    def __init__(self, width, out):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out)
        self.adaln = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaln(c)[:, None].chunk(2, -1)  # (B, 1, D)
        return self.linear(modulate(self.norm(x), shift, scale))


class DiT(nn.Module):
    """The average velocity u_theta(z, r, t | y).

    channels, size: images are (channels, size, size), pixels or latents; size a multiple of patch.
    num_classes: labels are 0 .. num_classes - 1, and num_classes itself is the null label; with 0
    classes the null label is the only one. conditioning: a key of CONDITIONINGS.
    """

    carries_tangents = True  # forward takes a tangent, see Dual below
    checkpointing = False  # keep only each block's input for the backward, which runs it again

    def __init__(
        self, channels, size, num_classes, depth, width, heads, patch, conditioning="t,t-r"
    ):
        super().__init__()
        if size % patch:
            raise ValueError(f"pictures of size {size} do not divide into patches of {patch}")
        self.channels, self.size, self.num_classes, self.patch = channels, size, num_classes, patch
        self.time_variables = CONDITIONINGS[conditioning]
        num_times = len(self.time_variables(torch.zeros(()), torch.zeros(())))

        self.patch_embed = nn.Linear(channels * patch * patch, width)
        # A parameter that is not trained: DDP would broadcast a buffer in every forward.
        positions = sincos_positions(size // patch, width)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)  # (N, D)
        self.time_embed = nn.ModuleList(TimeEmbedder(width) for _ in range(num_times))
        self.label_embed = nn.Embedding(num_classes + 1, width)  # the last row is the null label's
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final = FinalLayer(width, patch * patch * channels)
        self.initialize()

    @classmethod
    def from_config(cls, name, channels, size, num_classes, conditioning="t,t-r"):
        return cls(channels, size, num_classes, *CONFIGS[name], conditioning)

    @property
    def null_label(self):
        return self.num_classes

    def initialize(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.label_embed.weight, std=0.02)
        for embed in self.time_embed:
            nn.init.normal_(embed.mlp[0].weight, std=0.02)
            nn.init.normal_(embed.mlp[2].weight, std=0.02)
        # When training starts, zero gates make every block the identity and u is 0.
        gates = [block.adaln[1] for block in self.blocks]
        for layer in [*gates, self.final.adaln[1], self.final.linear]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, z, r, t, y, tangent=None):
        """z: (B, C, H, W); r, t: (B,) in [0, 1], at least float32; y: (B,) int64 -> u like z.

        With the tangent (dz, dr, dt) of the last m samples: u and, (m, C, H, W) and without
        gradient, the derivative of their u along it.
        """
        x = self.to_patches(z)  # (B, N, C p p)
        c = self.label_embed(y)  # (B, D)
        if tangent is not None:
            dz, dr, dt = tangent
            x, r, t = Dual(x, self.to_patches(dz)), Dual(r, dr), Dual(t, dt)
            c = Dual(c, torch.zeros_like(c[-len(dr) :]))
        x = self.patch_embed(x) + self.pos_embed  # (B, N, D)
        for embed, time in zip(self.time_embed, self.time_variables(r, t), strict=True):
            c = c + embed(time)  # (B, D)
        for block in self.blocks:
            x = checkpointed(block, x, c) if self.checkpointing else block(x, c)  # (B, N, D)
        x = self.final(x, c)  # (B, N, p p C)
        if tangent is not None:
            return self.to_picture(x.value), self.to_picture(x.tangent)
        return self.to_picture(x)

    def to_patches(self, z):
        p = self.patch
        return rearrange(z, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)

    def to_picture(self, x):
        p = self.patch
        return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=self.size // p, p=p, q=p)


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


def sinusoids(t, dim, max_period=10000):
    """cos, then sin, of t at dim / 2 frequencies max_period^-(2 i / dim): (B,) -> (B, dim).

    differs: DiT feeds integer steps up to 999. Here t in [0, 1] goes in as it is, as in the code of
    MeanFlow's authors: 1000 t would multiply d/dt, and the rounding error of the JVP, by 1000.
    """
    freqs = max_period ** -(torch.arange(dim // 2, device=t.device, dtype=t.dtype) / (dim // 2))
    args = t[:, None] * freqs
    return torch.cat([args.cos(), args.sin()], dim=-1)


def sincos_positions(grid, width):
    """Fixed 2-D position embedding: (grid^2, width), first half from the column, then the row."""
    freqs = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    args = torch.arange(grid, dtype=torch.float64)[:, None] * freqs
    line = torch.cat([args.sin(), args.cos()], dim=-1)  # (grid, width / 2)
    column, row = line.repeat(grid, 1), line.repeat_interleave(grid, dim=0)
    return torch.cat([column, row], dim=-1).float()


# ---------------------------------------------------------------------------- tangents

aten = torch.ops.aten


class Dual:
    """A value of a batch, (B, ...), and the tangent of its last m samples, (m, ...).

    torch's functions, and so its modules, take a Dual for a tensor: they compute the value as ever,
    with its graph, and the tangent by the function's rule in RULES, without one. That is
    forward-mode differentiation of m samples alone, and no layer runs twice. A function that has no
    rule raises, and so does anything that a tensor knows and a Dual does not.
    """

    def __init__(self, value, tangent):
        self.value, self.tangent = value, tangent.to(value.dtype)
        self.dtype, self.device = value.dtype, value.device

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name, kwargs = function.__name__, kwargs or {}
        if name not in RULES and name not in LINEAR:
            raise NotImplementedError(f"no rule for the tangent of {name}")
        if any(isinstance(a, Dual) for a in kwargs.values()):
            raise NotImplementedError(f"a Dual as a named argument of {name}")
        with torch.no_grad():  # the tangent first, as the function may work in place
            if name in LINEAR:
                dy = function(*each(args, lambda a: a.tangent, zero), **kwargs)
            else:
                d = each(args, lambda a: a.tangent, lambda a: 0)
                dy = RULES[name](d, *each(args, lambda a: a.value[-len(a.tangent) :]), **kwargs)
        y = function(*each(args, lambda a: a.value), **kwargs)
        if isinstance(y, torch.Tensor):
            result = Dual(y, dy.expand(-1, *y.shape[1:]))
        else:
            result = tuple(map(Dual, y, dy))
        sizes = []
        each([*args, result], lambda a: sizes.append((len(a.value), len(a.tangent))))
        if len(set(sizes)) > 1:
            raise NotImplementedError(f"{name} does not leave the batch as it is")
        return result

    def __getattr__(self, name):  # x.cos() is torch.cos(x)
        if not callable(function := getattr(torch, name, None)):
            raise AttributeError(f"a Dual has no {name}")
        return partial(function, self)

    def __getitem__(self, index):
        if not isinstance(index, tuple) or index[0] != slice(None):
            raise NotImplementedError("a part of the batch")
        return Dual(self.value[index], self.tangent[index])

    def __eq__(self, other):
        raise NotImplementedError("a comparison of a Dual")

    def __bool__(self):
        raise NotImplementedError("a Dual as a condition")

    def __add__(self, other):
        return torch.add(self, other)

    def __sub__(self, other):
        return torch.sub(self, other)

    def __mul__(self, other):
        return torch.mul(self, other)

    __radd__, __rmul__ = __add__, __mul__


def checkpointed(block, x, c):
    """block(x, c), of which only the inputs are kept: the backward runs it again."""
    if not isinstance(x, Dual):
        return checkpoint(block, x, c, use_reentrant=False)

    def unpacked(x, dx, c, dc):  # since torch.compile lets tensors alone through
        y = block(Dual(x, dx), Dual(c, dc))
        return y.value, y.tangent

    args = x.value, x.tangent, c.value, c.tangent
    return Dual(*checkpoint(unpacked, *args, use_reentrant=False))


def each(args, of_dual, of_constant=lambda a: a):
    """The arguments of a torch function, lists of them too: each Dual through of_dual, the others
    through of_constant."""
    return [
        each(a, of_dual, of_constant)
        if isinstance(a, (list, tuple))
        else (of_dual if isinstance(a, Dual) else of_constant)(a)
        for a in args
    ]


def zero(a):
    """The tangent of a constant, where a function is linear; what is no tensor stays as it is."""
    return torch.zeros_like(a) if isinstance(a, torch.Tensor) else a


def layer_norm_tangent(d, x, shape, weight=None, bias=None, eps=1e-5):
    _, mean, rstd = torch.native_layer_norm(x, shape, None, None, eps)
    only_x = (True, False, False)
    dx = aten.native_layer_norm_backward(d[0], x, shape, mean, rstd, None, None, only_x)[0]
    return dx if weight is None else dx * weight


def attention_tangent(d, q, k, v):
    (dq, dk, dv), scale = d, q.shape[-1] ** -0.5
    p = (scale * q @ k.mT).softmax(-1)  # (m, heads, N, N)
    p_ds = p * (scale * (dq @ k.mT + q @ dk.mT))
    return (p_ds - p * p_ds.sum(-1, keepdim=True)) @ v + p @ dv


# Tangents by the name of the function: from the tangents d of its arguments, 0 for a constant, and
# the arguments. The Jacobians of SiLU, GELU and the normalisation are symmetric: their backward is
# their forward derivative. The attention's matrix is computed anew: flash attention keeps none.
RULES = {
    "add": lambda d, a, b: d[0] + d[1],
    "sub": lambda d, a, b: d[0] - d[1],
    "mul": lambda d, a, b: d[0] * b + a * d[1],
    "cos": lambda d, x: -x.sin() * d[0],
    "sin": lambda d, x: x.cos() * d[0],
    "silu": lambda d, x, inplace=False: aten.silu_backward(d[0], x),
    "gelu": lambda d, x, approximate="none": aten.gelu_backward(d[0], x, approximate=approximate),
    "linear": lambda d, x, weight, bias=None: F.linear(d[0], weight),
    "layer_norm": layer_norm_tangent,
    "scaled_dot_product_attention": attention_tangent,
}
# Linear functions: the function itself, of the tangents.
LINEAR = {"cat", "chunk", "unbind", "transpose", "unflatten", "flatten"}
