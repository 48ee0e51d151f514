"""The networks u(z, r, t, y), conditioned on a label and on two times: a DiT and a U-Net.

DiT with adaLN-Zero (arXiv 2212.09748) is MeanFlow's for ImageNet, the U-Net (arXiv 2011.13456) its
network for CIFAR-10. The one time of a diffusion model becomes a pair r <= t (arXiv 2505.13447v1,
Tab. 1c and App. A); the blocks are untouched. Everywhere in this project t = 1 is noise, t = 0 is
data, and the order of arguments is the paper's: net(z, r, t, y). The second half of the file reads
weights, ours and public ones.

    net = build("B/4", dict(shape=(4, 32, 32), classes=range(1000)))
    u = net(z, r, t, y)                    # average velocity between r and t, shaped like z
"""

import hashlib
import json
import math
import pickle
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

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

# name: blocks at each size, width of the first convolution. arXiv 2505.13447v1, App. A.
UNETS = {"unet": (4, 128)}

# What the network sees of (r, t), and of the guidance omega. Whatever it sees, what is trained and
# differentiated is u as a function of (z, r, t): arXiv 2505.13447v1, Sec. 4.3.
CONDITIONINGS = {
    "t,t-r":       lambda r, t, omega: (t, t - r),
    "t,r":         lambda r, t, omega: (t, r),
    "t,r,t-r":     lambda r, t, omega: (t, r, t - r),
    "t-r":         lambda r, t, omega: (t - r,),
    "t,t-r,omega": lambda r, t, omega: (t, t - r, omega),
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
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, heads, N, D / heads)
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
    """adaLN and a linear map to the pixels of each patch: (B, N, D) -> (B, N, C p p)."""

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

    omega = 1.0  # where y holds labels only

    def __init__(
        self, channels, size, num_classes, depth, width, heads, patch, conditioning="t,t-r"
    ):
        super().__init__()
        if size % patch:
            raise ValueError(f"pictures of size {size} do not divide into patches of {patch}")
        self.channels, self.size, self.patch = channels, size, patch
        self.num_classes = self.null_label = num_classes
        self.time_variables = CONDITIONINGS[conditioning]
        num_times = len(self.time_variables(0, 0, 0))

        self.patch_embed = nn.Linear(channels * patch * patch, width)
        positions = sincos_positions(size // patch, width)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)  # (N, D), fixed
        self.time_embed = nn.ModuleList(TimeEmbedder(width) for _ in range(num_times))
        self.label_embed = nn.Embedding(num_classes + 1, width)  # the last row is the null label's
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final = FinalLayer(width, patch * patch * channels)
        self.initialize()

    def initialize(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.label_embed.weight, std=0.02)
        for embed in self.time_embed:
            nn.init.normal_(embed.mlp[0].weight, std=0.02)
            nn.init.normal_(embed.mlp[2].weight, std=0.02)
        # When training starts, zero gates make every block the identity and u is 0.
        gates = [block.adaln[1] for block in self.blocks]
        for layer in [*gates, self.final.adaln[1], self.final.linear]:
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def forward(self, z, r, t, y):
        """z: (B, C, H, W); r, t: (B,) in [0, 1], at least float32 -> u like z.

        y: (B,) int64, or (B, 2) float32, a label and omega.
        """
        omega = torch.full_like(t, self.omega)
        if y.dim() == 2:
            y, omega = y[:, 0].long(), y[:, 1]
        x = F.pixel_unshuffle(z, self.patch).flatten(2).transpose(1, 2)  # (B, N, C p p)
        x = self.patch_embed(x) + self.pos_embed  # (B, N, D)
        c = self.label_embed(y)  # (B, D)
        for embed, time in zip(self.time_embed, self.time_variables(r, t, omega), strict=True):
            c = c + embed(time)  # (B, D)
        for block in self.blocks:
            x = block(x, c)  # (B, N, D)
        x = self.final(x, c).transpose(1, 2)  # (B, C p p, N)
        x = x.unflatten(2, (self.size // self.patch, -1))  # (B, C p p, H / p, W / p)
        return F.pixel_shuffle(x, self.patch)  # (B, C, H, W)


class Resample(nn.Module):
    """Half or twice the size, by a fixed filter: (B, C, H, W) -> (B, C, H', W')."""

    def __init__(self, up):
        super().__init__()
        line = torch.tensor([1.0, 3.0, 3.0, 1.0]) / (4 if up else 8)
        self.resize = F.conv_transpose2d if up else F.conv2d
        self.kernel = nn.Parameter(torch.outer(line, line)[None, None], requires_grad=False)

    def forward(self, x):
        channels = x.shape[1]
        kernel = self.kernel.expand(channels, 1, 4, 4)
        return self.resize(x, kernel, stride=2, padding=1, groups=channels)


class Dropout(nn.Module):
    """nn.Dropout, but the mask does not depend on the memory layout, which compilation changes."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training:
            return x
        return x * (torch.rand(x.shape, device=x.device) >= self.p) / (1 - self.p)


class UNetBlock(nn.Module):
    """Two convolutions, shifted by the conditioning c, and a shortcut; then maybe attention.

    x: (B, inputs, H, W), c: (B, D) -> (B, outputs, H', W'). resample: None, "down" or "up".
    """

    def __init__(self, inputs, outputs, width, attention=False, resample=None):
        super().__init__()
        self.inputs = inputs
        self.norm1, self.conv1 = norm(inputs), conv(inputs, outputs)
        self.shift = nn.Linear(width, outputs)
        self.norm2, self.conv2 = norm(outputs), conv(outputs, outputs)
        self.dropout = Dropout(0.2)
        self.resample = Resample(resample == "up") if resample else nn.Identity()
        changes = inputs != outputs or resample
        self.skip = conv(inputs, outputs, 1) if changes else nn.Identity()
        self.attention = attention
        if attention:
            self.norm3 = norm(outputs)
            self.qkv, self.proj = conv(outputs, 3 * outputs, 1), conv(outputs, outputs, 1)

    def forward(self, x, c):
        h = self.conv1(self.resample(F.silu(self.norm1(x)))) + self.shift(c)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        x = (h + self.skip(self.resample(x))) * 0.5**0.5
        if not self.attention:
            return x
        h = self.qkv(self.norm3(x)).flatten(2).transpose(1, 2)[:, None].contiguous()
        h = F.scaled_dot_product_attention(*h.chunk(3, -1)).flatten(1, 2)  # (B, H W, C)
        h = self.proj(h.transpose(1, 2).unflatten(2, x.shape[2:]))  # (B, C, H, W)
        return (x + h) * 0.5**0.5  # x first: torch.func.jvp needs its memory layout


class UNet(nn.Module):
    """The average velocity u_theta(z, r, t | y) by the first paper's network for CIFAR-10.

    channels, size, num_classes, conditioning: as of DiT; size a multiple of 4. width: of the first
    convolution, half of all others'; depth: blocks at each of the three sizes.
    """

    def __init__(self, channels, size, num_classes, depth, width, conditioning="t,t-r"):
        super().__init__()
        if size % 4:
            raise ValueError(f"pictures of size {size} are not halved twice")
        self.channels, self.size = channels, size
        self.num_classes = self.null_label = num_classes
        self.time_variables = CONDITIONINGS[conditioning]
        num_times, wide = len(self.time_variables(0, 0, 0)), 2 * width
        d = 4 * width  # of the conditioning

        def block(inputs=wide, **options):
            return UNetBlock(inputs, wide, d, **options)

        self.time_embed = nn.Sequential(
            nn.Linear(256 * num_times, d), nn.SiLU(), nn.Linear(d, d), nn.SiLU()
        )
        self.augment_embed = nn.Linear(6, 256 * num_times, bias=False)
        if num_classes:
            self.label_embed = nn.Embedding(num_classes + 1, 256 * num_times)
        self.conv_in = conv(channels, width)
        down, up = dict(resample="down"), dict(resample="up")
        encoder = [block(width)] + [block() for _ in range(depth - 1)]  # size
        encoder += [block(**down)] + [block(attention=True) for _ in range(depth)]  # size / 2
        encoder += [block(**down)] + [block() for _ in range(depth)]  # size / 4
        decoder = [block(attention=True), block()] + [block(2 * wide) for _ in range(depth + 1)]
        decoder += [block(**up)] + [block(2 * wide) for _ in range(depth)]  # size / 2
        decoder += [block(2 * wide, attention=True)]
        decoder += [block(**up)] + [block(2 * wide) for _ in range(depth)]  # size
        decoder += [block(wide + width)]
        self.blocks, self.encoder_depth = nn.ModuleList(encoder + decoder), len(encoder)
        self.norm_out, self.conv_out = norm(wide), conv(wide, channels)
        self.initialize()

    def initialize(self):
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:  # when training starts, every block is close to its shortcut
            nn.init.xavier_uniform_(block.conv2.weight, gain=1e-5)
            if block.attention:
                nn.init.xavier_uniform_(block.qkv.weight, gain=0.2**0.5)
                nn.init.xavier_uniform_(block.proj.weight, gain=1e-5)
        nn.init.xavier_uniform_(self.conv_out.weight, gain=1e-5)

    def forward(self, z, r, t, y):
        """z: (B, C, H, W); r, t: (B,) in [0, 1], at least float32 -> u like z.

        y: (B,) int64, or (B, 7) float32, a label and the six of `prepare_latents.augment`.
        """
        waves = [fourier(time) for time in self.time_variables(r, t, None)]  # (B, 256) each
        c = torch.cat(waves, dim=-1)
        augmentation = torch.zeros(z.shape[0], 6, dtype=t.dtype, device=z.device)
        if y is not None and len(y.shape) == 2:
            augmentation, y = y[:, 1:], y[:, 0].long()
        c = c + self.augment_embed(augmentation)
        if self.num_classes:
            c = c + self.label_embed(y)
        c = self.time_embed(c)  # (B, D)
        skips = [self.conv_in(z)]
        for block in self.blocks[: self.encoder_depth]:
            skips.append(block(skips[-1], c))  # (B, C, H, W), (B, C, H / 2, W / 2), ...
        x = skips[-1]
        for block in self.blocks[self.encoder_depth :]:
            if block.inputs > x.shape[1]:
                x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, c)
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, C, H, W)


def build(name, meta, conditioning="t,t-r"):
    """The network of CONFIGS[name] or UNETS[name] for a dataset whose meta.json is `meta`.

    ValueError where it does not suit the size of the pictures.
    """
    (channels, size, width), classes = meta["shape"], len(meta["classes"])
    if size != width:
        raise ValueError(f"pictures of {size} x {width} are not square")
    if name in UNETS:
        return UNet(channels, size, classes, *UNETS[name], conditioning)
    return DiT(channels, size, classes, *CONFIGS[name], conditioning)


def norm(width):
    return nn.GroupNorm(32, width, eps=1e-6)


def conv(inputs, outputs, kernel=3):
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


def fourier(t):
    """sin, then cos, of t at 128 frequencies from 1 to 1e-4: (B,) -> (B, 256)."""
    freqs = 10000 ** -(torch.arange(128, device=t.device, dtype=t.dtype) / 127)
    args = t[:, None] * freqs
    return torch.cat([args.sin(), args.cos()], dim=-1)


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


# ---------------------------------------------------------------------------- their weights
# In the checkpoints of train.py, in public files, and in files of any kind.

CHECKPOINT_FORMAT = 2  # raised when a reader of the old one would misread the new
LATENT_SCALE = 0.18215  # brings the latents of Stable Diffusion's VAE to unit variance
PIXELS = dict(vae=None, scale=1 / 127.5, shift=-1.0)
LATENTS = dict(vae="unknown", scale=LATENT_SCALE, shift=0.0)
SAFETENSORS = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16)
SAFETENSORS |= dict(I64=torch.int64, I32=torch.int32, U8=torch.uint8, BOOL=torch.bool)
# Names in public weights, which follow DiT's code, and ours; names of py-meanflow's U-Net.
DIT_NAMES = {
    "t_embedder": "time_embed.0", "h_embedder": "time_embed.1", "r_embedder": "time_embed.1",
    "x_embedder.proj": "patch_embed", "y_embedder.embedding_table": "label_embed",
    "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2", "adaLN_modulation": "adaln", "final_layer": "final",
}  # fmt: skip
UNET_NAME = re.compile(r"(?:(enc|dec)\.(\d+)x\d+_)?([a-z_]+)(\d*)\.(?:(\w+)\.)?(weight|bias)")
# What names of entries say that hold averages, and what torch's wrappers add to those of weights.
AVERAGE = re.compile(r"(?<![a-z])(?:ema|EMA|shadow|swa|average|(?<!exp_)avg)(?![a-z])")
WRAPPER = re.compile(r"\b_(orig_mod|\w+_wrapped_module)\.")


def load(path, conditioning="t,t-r"):
    """(EMA network on the CPU, its checkpoint), of train.py, --export or public weights.

    Public weights give a dict with the keys of a checkpoint. Those of flow matching, which know t
    alone, take the `conditioning` asked for. Ends the script where a file does not fit.
    """
    checkpoint = load_file(path)
    public = {"x_embedder.proj.weight": from_dit, "map_layer0.weight": from_unet}
    try:
        if {"ema", "meta"} <= checkpoint.keys():
            checkpoint = read_checkpoint(path)
        else:
            state, entry = weights_in(checkpoint, path, *public)
            (convert,) = (public[name] for name in public if name in state)
            checkpoint = convert(state, path, conditioning)
            told = "{model}, conditioned on {conditioning}".format(**checkpoint["args"])
            note = f"note: {path} is taken for {checkpoint['kind']}: {told}; weights: {entry}"
            checkpoint |= dict(step=0, note=note)
        args = checkpoint["args"]
        net = build(args["model"], checkpoint["meta"], args["conditioning"])
        load_strictly(net, checkpoint["ema"], path)
        if "SiT" in checkpoint.get("kind", "") and predicts_noise(net):
            fail(f"{path} predicts the noise, as DiT does, and not the velocity, as SiT does")
    except Exception as error:  # what a file lacks shows in many ways
        fail(f"{path}: model.py has no network with such weights ({error!r:.200})")
    return net.eval(), checkpoint


def read_checkpoint(path):
    """What train.py or --export saved in a file, memory-mapped; nothing in it is executed."""
    checkpoint = load_file(path)
    if lacking := {"ema", "step", "args", "meta"} - checkpoint.keys():
        fail(f"{path} is no checkpoint of train.py: it lacks {min(lacking)}")
    if checkpoint.get("format") != CHECKPOINT_FORMAT:
        fail(f"{path} was saved by another version of the code")
    return checkpoint


def exported(checkpoint):
    """What --export keeps of a checkpoint: the EMA network, without the paths of its run."""
    names = "model", "conditioning", "omega_range"
    args = {name: value for name, value in checkpoint["args"].items() if name in names and value}
    kept = {name: checkpoint[name] for name in ("ema", "meta", "step")}
    return kept | dict(args=args, format=CHECKPOINT_FORMAT)


def from_dit(state, path, conditioning):
    """The checkpoint, but for its step, of public weights under DiT's names.

    Weights of MeanFlow have a second time embedder, of t - r. SiT's (flow matching, arXiv
    2401.08740) lack it. SiT's time is 1 - t and its velocity x - e, so u(z, r, t) = -SiT(z, 1 - t),
    which is folded into the weights. Embedders of other times than t, which `conditioning` asks
    for, start at 0.
    """
    if any("noise_labels" in name for name in state):
        fail(f"{path}: alphaflow's weights need its own statistics of latents, not known here")
    ours, sit = {}, not any("h_embedder" in name or "r_embedder" in name for name in state)
    for name, value in state.items():
        for theirs, our in DIT_NAMES.items():
            name = name.replace(theirs, our)
        ours[name] = value
    width, channels, patch, _ = ours["patch_embed.weight"].shape
    ours["patch_embed.weight"] = ours["patch_embed.weight"].flatten(1)
    ours["pos_embed"] = ours["pos_embed"].squeeze(0)
    size = patch * math.isqrt(len(ours["pos_embed"]))
    classes = [str(k) for k in range(len(ours["label_embed.weight"]) - 1)]  # without the null label
    for name in ("final.linear.weight", "final.linear.bias"):
        rows = rearrange(ours[name], "(p q c) ... -> c p q ...", p=patch, q=patch)
        ours[name] = (-rows[:channels] if sit else rows).flatten(0, 2)
    depth = len({name.split(".")[1] for name in ours if name.startswith("blocks.")})
    names = [name for name, (d, w, _, p) in CONFIGS.items() if (d, w, p) == (depth, width, patch)]
    if not names:
        fail(f"{path}: no --model has {depth} blocks of width {width} and patches of {patch}")
    if sit:
        if not conditioning.startswith("t,"):
            fail(f"--conditioning {conditioning}: {path} is conditioned on t")
        of_t = {name: value for name, value in ours.items() if "time_embed.0" in name}
        for i in range(1, len(CONDITIONINGS[conditioning](0, 0, 0))):
            for name, value in of_t.items():
                name = name.replace("embed.0", f"embed.{i}")
                ours[name] = value * 0 if "mlp.2" in name else value
        # cos((1 - t) f) and sin((1 - t) f) are linear functions of cos(t f) and sin(t f).
        of_cos, of_sin = ours["time_embed.0.mlp.0.weight"].double().chunk(2, dim=1)
        cos, sin = sinusoids(torch.ones(1).double(), 2 * of_cos.shape[1]).chunk(2, dim=1)
        rows = [of_cos * cos + of_sin * sin, of_cos * sin - of_sin * cos]
        ours["time_embed.0.mlp.0.weight"] = torch.cat(rows, dim=1)
    meta = dict(shape=[channels, size, size], classes=classes, source="")
    return dict(
        kind="SiT's velocity" if sit else "MeanFlow's", ema=ours,
        args=dict(model=names[0], conditioning=conditioning if sit else "t,t-r"),
        meta=meta | (PIXELS if channels == 3 else LATENTS),
    )  # fmt: skip


@torch.no_grad()
def predicts_noise(net):
    """Whether it is DiT's: as SiT's it has the same names, but finds the noise of step 999."""
    z = torch.randn(1, net.channels, net.size, net.size, generator=torch.Generator().manual_seed(0))
    step, null = torch.full((1,), 1.0 - 999), torch.tensor([net.null_label])
    return F.cosine_similarity(-net(z, step, step, null).flatten(), z.flatten(), dim=0) > 0.5


def from_unet(state, path, conditioning):
    """Like `from_dit`, of py-meanflow's network for CIFAR-10: EDM's U-Net with two times.

    Its weights come in the order of ours, sorted by their names: the encoder's from the largest
    size to the smallest, the decoder's back. The filters are the same.
    """
    blocks = ["map_layer", "conv", "in", "up", "down", "block", "aux_norm", "aux_conv"]
    parts = ["", "norm0", "conv0", "affine", "norm1", "conv1", "skip", "norm2", "qkv", "proj"]

    def place(name):
        half, size, block, number, part, kind = UNET_NAME.fullmatch(name).groups("")
        size = int(size or 0) * (1 if half == "dec" else -1)
        half, block, part = ["", "enc", "dec"].index(half), blocks.index(block), parts.index(part)
        return half, size, block, number, part, kind == "bias"

    ours = {"augment_embed.weight": state.pop("map_augment.weight", torch.zeros(512, 6))}
    theirs = [name for name in state if not name.endswith("resample_filter")]
    if odd := [name for name in theirs if not UNET_NAME.fullmatch(name)]:
        fail(f"{path} has {odd[0]}, which is not in py-meanflow's U-Net")
    size = max(map(int, re.findall(r"(\d+)x", " ".join(theirs))))
    meta = dict(shape=[3, size, size], classes=[], source="") | PIXELS
    weights = build("unet", meta).state_dict()
    ours |= {name: weight for name, weight in weights.items() if name.endswith("kernel")}
    names = [name for name in weights if name not in ours]
    if len(names) != len(theirs):
        fail(f"{path} has {len(theirs)} weights, and py-meanflow's U-Net {len(names)}")
    pairs = zip(names, sorted(theirs, key=place), strict=True)
    ours |= {name: state[their] for name, their in pairs}
    args = dict(model="unet", conditioning="t,t-r")
    return dict(kind="MeanFlow's", args=args, meta=meta, ema=ours)


class Skipped(dict):
    """Stands in for all that torch does not read in a file: its classes are not made or called."""

    __init__ = __setstate__ = append = extend = lambda *_: None
    __hash__ = object.__hash__


def load_file(path):
    """The dict in a .safetensors file, or in one of torch.save; nothing in it is executed."""
    try:
        if Path(path).suffix.lower() == ".safetensors":
            return read_safetensors(path)
        names, zipped = ["argparse.Namespace"], zipfile.is_zipfile(path)  # not before torch 1.6
        if zipped:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        known = {"collections.defaultdict": lambda *_: {}}
        with torch.serialization.safe_globals([(known.get(n, Skipped), n) for n in names]):
            return {**torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)}
    except OSError as error:
        fail(f"{path}: {error.strerror or error}")
    except pickle.UnpicklingError:
        fail(f"{path} is damaged, or more than tensors{advice(path)}")
    except Exception as error:  # torch.load alone raises a dozen kinds for a damaged file
        fail(f"{path} is no whole file of weights ({error!r:.300})")


def advice(path):
    """For a file of torch.save that load_file refuses: its entries, and how to get at the dicts."""
    find = lambda _, module, name: dict if name == "OrderedDict" else Skipped  # noqa: E731
    stand_ins = dict(find_class=find, persistent_load=lambda *_: Skipped())
    try:
        with zipfile.ZipFile(path) as file:
            (pickled,) = (name for name in file.namelist() if name.endswith("/data.pkl"))
            found = type("", (pickle.Unpickler,), stand_ins)(file.open(pickled)).load()
        kept = [name for name, value in found.items() if type(value) is dict]
    except Exception:  # not a zip file, or damaged, or no dict
        return ""
    way = f"torch.load({str(path)!r}, weights_only=False)"
    way = f"{{k: {way}[k] for k in {kept}}}" if kept else f"dict({way})"
    entries = ", ".join(map(str, [*found][:9]))
    return f' ({entries}); if you trust it, read the new.pt of torch.save({way}, "new.pt")'


def weights_in(found, path, *anchors):
    """({name: tensor} of a network in a dict by `load_file`, the name of the entry that held it).

    A network is found by a weight that has the name of one of `anchors`. What stands in front of
    all its names (DDP's module., Lightning's model.), or what wrappers put inside, is taken off. Of
    several sets of weights, as training scripts save them, the averaged one is taken.
    """
    sets, dicts, entries = {}, [("", found)], {}
    for where, inner in dicts:  # grows meanwhile, by the dicts inside but for optimisers
        for name, value in inner.items():
            entries[f"{where}{name}"] = value
            if isinstance(value, dict) and not str(name).startswith("opt") and len(dicts) < 1000:
                dicts.append((f"{where}{name}.", value))
        state = {WRAPPER.sub("", str(name)): v for name, v in inner.items() if torch.is_tensor(v)}
        counts = [name for name in state if name.endswith("n_averaged")]  # by AveragedModel
        averaged = tuple(name.removesuffix("n_averaged") + "module." for name in counts)
        fronts = [name.removesuffix(a) for name in state for a in anchors if name.endswith(a)]
        for front in fronts:
            entry = (where + front).strip(".") + "(average)" * front.startswith(averaged)
            ours = {k.removeprefix(front): v for k, v in state.items() if k.startswith(front)}
            sets[entry or "all"] = ours
    if not sets:
        names = ", ".join(name for name, value in entries.items() if torch.is_tensor(value))
        fail(f"{path} has {names[:99] or 'no tensor'} ... but no {' or '.join(anchors)}")
    # Of py-meanflow's three averages, the one its demo draws with.
    best = max(sets, key=lambda entry: (len(AVERAGE.findall(entry)), entry.endswith("ema1")))
    if AVERAGE.search(best):
        return sets[best], best if len(sets) == 1 else f"{best} of {', '.join(sets)}"
    if len(sets) > 1:
        fail(f"{path} holds several networks and no average: {', '.join(sets)}")
    beside = (name for name, value in entries.items() if isinstance(value, (dict, list)))
    unread = [name for name in beside if AVERAGE.search(name)]
    lacks = f"the average {unread[0]} cannot be read" if unread else "no average found"
    return sets[best], f"{best} ({lacks})"


def read_safetensors(path):
    """8 bytes of length, a JSON header of that length, then the raw little-endian tensors."""
    data = np.memmap(path, np.uint8, "r")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header, data = json.loads(data[8:start].tobytes()), data[start:]
    header.pop("__metadata__", None)
    state = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if entry["dtype"] not in SAFETENSORS or begin == end:
            continue  # of a type or size that no network here has
        if not 0 <= begin <= end <= len(data):
            raise ValueError(f"{name} does not lie within the file")
        # Copied, since nothing aligns a tensor to its element size.
        tensor = torch.from_numpy(data[begin:end].copy()).view(SAFETENSORS[entry["dtype"]])
        state[name] = tensor.reshape(entry["shape"])
    return state


def load_strictly(net, state, path):
    """Every weight of `net` from `state` and nothing left over, else end the script."""
    ours = net.state_dict()
    lacking, unknown = ours.keys() - state.keys(), state.keys() - ours.keys()
    kinds = [{k: (v.shape, v.is_floating_point()) for k, v in w.items()} for w in (ours, state)]
    other = {k for k in ours.keys() & state.keys() if kinds[0][k] != kinds[1][k]}
    wrong = [(lacking, "lacks"), (unknown, "has unknown"), (other, "has misshapen")]
    if faults := [f"{fault} {len(names)} weights, {min(names)}" for names, fault in wrong if names]:
        fail(f"{path} {'; '.join(faults)}")
    fitting = {name: state[name].to(ours[name].dtype) for name in ours}
    # A network on the meta device has no memory of its own: it takes the tensors themselves.
    net.load_state_dict(fitting, assign=any(weight.is_meta for weight in ours.values()))


def fingerprint(state):
    """Short hash of the names and values of tensors."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def fail(message):
    """End the script with one line on standard error and exit code 1."""
    sys.exit(f"{Path(sys.argv[0]).name}: {message}")
