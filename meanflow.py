"""The MeanFlow objective and its sampler (arXiv 2505.13447v1), in the paper's order.

    z = (1 - t) x + t e,   v = e - x                                       interpolation
    v~ = omega v + kappa u(z, t, t | y) + (1 - omega - kappa) u(z, t, t)   guidance, Eq. 21
    u_tgt = v~ - (t - r) du/dt,   du/dt = JVP of u along (v~, 0, 1)        target, Eq. 10 and 18
    loss = sg(w) |u - sg(u_tgt)|^2,   w = 1 / (|u - u_tgt|^2 + c)^p        adaptive weight, Eq. 22
    z_r = z_t - (t - r) u(z_t, r, t)                                       sampling, Eq. 12

t = 1 is noise, t = 0 is data, r <= t. A network is any callable net(z, r, t, y) -> u shaped like z.
`textbook_loss` is the algorithm as printed, `loss` the same at about two thirds of the cost.
"""

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

aten = torch.ops.aten

# ---------------------------------------------------------------------------- the objective


@dataclass(frozen=True)
class Objective:
    """The constants of the loss; the defaults are MeanFlow without guidance.

    omega, kappa: guidance inside the target, Eq. 21; the effective scale is omega / (1 - kappa).
    Guidance applies where t is in cfg_interval and the label is not null_label.
    tangent: (dr, dt) of the JVP; values other than (0, 1) are for the ablation of Tab. 1b.
    p, c: adaptive weight, Eq. 22. differs: c = 1e-3 as in the paper; the JAX code has 0.01.
    """

    null_label: int = 0
    omega: float = 1.0
    kappa: float = 0.0
    cfg_interval: tuple = (0.0, 1.0)
    tangent: tuple = (0.0, 1.0)
    p: float = 1.0
    c: float = 1e-3

    @property
    def guided(self):
        return (self.omega, self.kappa) != (1, 0)


def expand(a, like):
    """(B,) -> (B, 1, 1, 1), to broadcast over `like`."""
    return a.view(-1, *[1] * (like.dim() - 1))


def interpolate(x, e, t):
    """z = (1 - t) x + t e and its conditional velocity v = e - x. x, e: (B, ...), t: (B,)."""
    t = expand(t, x)
    return (1 - t) * x + t * e, e - x


def drop_labels(y, null_label, p, generator=None):
    """Each label becomes the null label with probability p. y: (B,) int64.

    differs: labels are dropped whatever r and t are. The authors' code drops only among the first
    rows of a batch, which all have r = t there, so its null label never meets r < t.
    """
    drop = torch.rand(y.shape, generator=generator, device=y.device) < p
    return torch.where(drop, null_label, y)


def guided_velocity(v, u_label, u_null, t, y, objective):
    """v~ of Eq. 21 (Eq. 19 if kappa = 0); returns v where guidance does not apply. All (B, ...)."""
    omega, kappa, (lo, hi) = objective.omega, objective.kappa, objective.cfg_interval
    guided = omega * v + kappa * u_label + (1 - omega - kappa) * u_null
    return torch.where(expand((t >= lo) & (t <= hi) & (y != objective.null_label), v), guided, v)


def target(v, r, t, dudt):
    """u_tgt = v~ - (t - r) du/dt, Eq. 10 and 18."""
    return v - expand(t - r, v) * dudt


def weighted_error(u, u_tgt, weight, objective):
    """Mean of w |u - u_tgt|^2, w = 1 / (|.|^2 + c)^p without gradient, Eq. 22; and the errors.

    |.|^2 is summed over C, H, W. weight: (B,) alpha or beta; it multiplies the loss after the
    adaptive weight, which would otherwise cancel it (arXiv 2511.19065v2, App. B).
    The errors are |u - u_tgt|^2 / (C H W) of each sample, (B,), without gradient. Use them to
    monitor training: with p = 1 the loss stays near 1 however good u is.
    """
    squared_error = (u - u_tgt).square().flatten(1).sum(1)  # (B,)
    w = 1 / (squared_error.detach() + objective.c) ** objective.p  # (B,)
    return (weight * w * squared_error).mean(), squared_error.detach() / u[0].numel()


def textbook_loss(net, x, e, r, t, y, weight=1.0, objective=Objective()):
    """Algorithm 1 as printed, with Eq. 21's guidance: for reading, the tests and --bench.

    x, e: (B, C, H, W) data and noise; r, t: (B,); y: (B,) labels. Returns like `weighted_error`.
    """
    z, v = interpolate(x, e, t)  # (B, C, H, W)
    if objective.guided:
        with torch.no_grad():
            u_label = net(z, t, t, y) if objective.kappa else 0
            u_null = net(z, t, t, torch.full_like(y, objective.null_label))
        v = guided_velocity(v, u_label, u_null, t, y, objective)
    dr, dt = (torch.full_like(t, d) for d in objective.tangent)
    with sdpa_kernel(SDPBackend.MATH):  # the only attention with forward-mode derivatives
        u, dudt = jvp(lambda z, r, t: net(z, r, t, y), (z, r, t), (v, dr, dt))
    u_tgt = target(v, r, t, dudt).detach()
    return weighted_error(u, u_tgt, weight, objective)


# ---------------------------------------------------------------------------- the economical step


def loss(net, x, e, r, t, y, num_neq, weight=1.0, objective=Objective(), v_noise=None):
    """`textbook_loss` of a batch whose first samples have r = t and whose last num_neq have r < t.

    Three things make it cheaper. Where r = t the JVP is multiplied by zero, so it is computed only
    for the last samples. The target has no gradient, so the JVP needs no graph and is computed in
    the one forward of the whole batch (`WithTangent`). Where r = t, that forward also gives the
    u(z, t, t | y) that guidance needs. num_neq is fixed, so all shapes are static.

    net: any network. A `WithTangent`, also inside DDP, computes du/dt in its forward; for others
    torch.func.jvp does. v_noise: like x, added to the target where r = t.
    """
    if not isinstance(net, (WithTangent, DistributedDataParallel)):
        net = WithTangent(net, carried=False)
    bare = net.module if isinstance(net, DistributedDataParallel) else net  # for no-grad forwards
    n = len(x) - num_neq  # samples with r = t
    z, v = interpolate(x, e, t)  # (B, C, H, W)
    v_eq, v_neq = v[:n], v[n:]

    if objective.guided:
        with torch.no_grad():
            u_null = bare(z, t, t, torch.full_like(y, objective.null_label))  # (B, C, H, W)
            u_label = bare(z[n:], t[n:], t[n:], y[n:]) if objective.kappa and num_neq else 0
        v_neq = guided_velocity(v_neq, u_label, u_null[n:], t[n:], y[n:], objective)
    u, dudt = net(z, r, t, y, v_neq, objective.tangent)  # (B, C, H, W), (num_neq, C, H, W)
    if objective.guided:
        v_eq = guided_velocity(v_eq, u[:n].detach(), u_null[:n], t[:n], y[:n], objective)
    if v_noise is not None:
        v_eq = v_eq + v_noise[:n]
    u_tgt = torch.cat([v_eq, target(v_neq, r[n:], t[n:], dudt)])  # (B, C, H, W)
    return weighted_error(u, u_tgt, weight, objective)


def corruption(v, k, generator=None):
    """k |v| N(0, I), noise for the target where r = t: arXiv 2511.19065v2, Sec. 4.1 and Fig. 3.

    differs: the paper does not say over what |v| is taken; here it is over C, H, W of a sample.
    """
    size = expand(v.flatten(1).norm(dim=1), v)
    return k * size * torch.randn(v.shape, generator=generator, device=v.device)


# ---------------------------------------------------------------------------- sampling


@torch.no_grad()
def sample(net, e, y, nfe=1, velocity=False, times=None):
    """Images from noise e: (B, C, H, W) in `nfe` evaluations under labels y: (B,).

    Each step is z_r = z_t - (t - r) u(z_t, r, t), Eq. 12; nfe = 1 is x = e - u(e, 0, 1). If
    velocity is True, u(z_t, t, t) replaces u(z_t, r, t): Euler on the instantaneous velocity
    (arXiv 2511.19065v2, Tab. 5). times: decreasing; None is uniform from 1 to 0.
    """
    times = torch.linspace(1, 0, nfe + 1).tolist() if times is None else times
    z = e
    for t, r in pairwise(times):
        t_batch = z.new_full((len(z),), t)  # (B,)
        r_batch = t_batch if velocity else torch.full_like(t_batch, r)
        z = z - (t - r) * net(z, r_batch, t_batch, y).to(z.dtype)
    return z


# ---------------------------------------------------------------------------- task affinity


def affinity(net, x, e, y, sample_times, pairs_of_gaps, objective):
    """Cosine of the gradient of the r = t loss with that of the r < t loss in each range of gaps,
    arXiv 2511.19065v2, Sec. 4.3: (ranges,). Does not modify .grad.

    sample_times(num_eq, num_neq, pairs=None) -> t, r; pairs_of_gaps: `schedules.time_pairs` of
    each range. differs: the paper does not say which samples and weights are used. Here all the
    gradients are of one batch, as a whole with r = t or with r < t, without alpha and beta.
    """
    trained = [p for p in net.parameters() if p.requires_grad]

    def gradient(num_neq, pairs=None):
        t, r = sample_times(len(x) - num_neq, num_neq, pairs=pairs)
        value, _ = loss(net, x, e, r, t, y, num_neq, 1.0, objective)
        return torch.autograd.grad(value, trained)

    def dot(a, b):
        return torch.stack([(p * q).sum() for p, q in zip(a, b, strict=True)]).sum()

    of_v, cosines = gradient(0), []
    for pairs in pairs_of_gaps:
        of_u = gradient(len(x), pairs)
        cosines.append(dot(of_u, of_v) / (dot(of_u, of_u) * dot(of_v, of_v)).sqrt())
    return torch.stack(cosines)


# ---------------------------------------------------------------------------- tangents


class WithTangent(nn.Module):
    """net(z, r, t, y), whose one forward can also give du/dt of the last samples of a batch.

    This module is what DDP wraps. carried: the tangents pass through the network beside the values,
    as `Dual`s; otherwise torch.func.jvp runs those samples again. stochastic: whether the network
    draws random numbers; then the JVP runs the whole batch, to draw the same. By default, this is
    whether it has dropout modules. `check_tangents` finds out both.
    """

    def __init__(self, net, carried=True, stochastic=None):
        super().__init__()
        self.net, self.carried, self.stochastic = net, carried, stochastic
        if stochastic is None:
            self.stochastic = any(isinstance(module, _DropoutNd) for module in self.modules())

    def forward(self, z, r, t, y, v=None, tangent=(0.0, 1.0)):
        """u (B, C, H, W); with v (m, C, H, W), the velocity of the last m samples, (u, du/dt).

        du/dt = v . du/dz + dr . du/dr + dt . du/dt of those m, Eq. 8, without gradient.
        """
        if v is None:
            return self.net(z, r, t, y).to(z.dtype)
        n = len(z) - len(v)
        dr, dt = (torch.full_like(t[n:], d) for d in tangent)
        if len(v) == 0:
            u, dudt = self.net(z, r, t, y), v
        elif self.carried:
            label = None if y is None else Dual(y, torch.zeros_like(y[n:]))
            u = self.net(Dual(z, v), Dual(r, dr), Dual(t, dt), label)
            u, dudt = u.value, u.tangent
        else:
            devices = [z.device] if z.is_cuda else []
            with torch.random.fork_rng(devices) if self.stochastic else nullcontext():
                u = self.net(z, r, t, y)
            first, tangents = n, (v, dr, dt)
            if self.stochastic:
                first = 0
                tangents = [torch.cat([a.new_zeros(n, *a.shape[1:]), a]) for a in tangents]
            some = tuple(a[first:].clone() for a in (z, r, t))  # torch.compile fails with views
            y = None if y is None else y[first:]
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
                dudt = jvp(lambda z, r, t: self.net(z, r, t, y), some, tuple(tangents))[1]
            dudt = dudt[n - first :]
        return u.to(z.dtype), dudt.to(z.dtype)


@torch.no_grad()
def check_tangents(net, shape):
    """(reason, stochastic) of a network to be trained, where z is (B, *shape).

    reason: '' where Duals give the du/dt of torch.func.jvp, else what prevents it, in one line.
    stochastic: whether the network draws random numbers, as dropout does. ValueError where the
    output of a sample depends on other samples. Tests a copy with random weights, because a new
    network gives 0; they are scaled so that signals keep their size. Uses three samples, two of
    them with tangents.
    """
    net, device = copy.deepcopy(net), next(net.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    for parameter in net.parameters():
        std = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1
        parameter.normal_(std=std, generator=generator)
    z, v = torch.randn(2, 3, *shape, generator=generator, device=device)
    t = torch.tensor([0.3, 0.6, 0.9], device=device)
    batch = t / 2, t, torch.zeros_like(t, dtype=torch.long), v[1:]
    cuda, precision = device.type == "cuda", torch.get_float32_matmul_precision()

    def random_state():
        return torch.cat([torch.get_rng_state(), *([torch.cuda.get_rng_state()] if cuda else [])])

    with torch.random.fork_rng([device] if cuda else []):
        torch.manual_seed(0)
        state, u = random_state(), net(z, *batch[:3])
        stochastic = not torch.equal(random_state(), state)
        torch.manual_seed(0)
        change = net(torch.cat([v[:1], z[1:]]), *batch[:3]) - u  # of the first sample alone
        if change[1:].norm() > 1e-3 * u[1:].norm():
            raise ValueError("the network mixes samples, or its random numbers are not torch's")
        torch.set_float32_matmul_precision("highest")  # TF32 would hide a small difference
        try:
            WithTangent(net)(z, *batch)  # as in training; what follows is without dropout
            found = WithTangent(net.eval())(z, *batch)
        except Exception as error:  # the network has run above, so the error is the Dual's
            return " ".join(f"{type(error).__name__}: {error}".split()), stochastic
        else:
            expected = WithTangent(net, carried=False)(z, *batch)
        finally:
            torch.set_float32_matmul_precision(precision)
    difference = max((a - b).norm() / b.norm() for a, b in zip(found, expected, strict=True))
    reason = "" if difference < 1e-3 else f"it differs by {difference:.1e} from torch.func.jvp's"
    return reason, stochastic


def method(function, reflected=False):
    return lambda *args: function(*(args[::-1] if reflected else args))


def variadic(function):  # x.view(2, -1) is x.view((2, -1))
    return lambda x, *n: function(x, n[0] if isinstance(n[0], (tuple, list)) else n)


class Dual:
    """A value of a batch, (B, ...), and the tangent of its last m samples, (m, ...).

    torch's functions, and so its modules, accept a Dual in place of a tensor. The value is computed
    as usual, and the tangent by the function's rule in RULES, without a graph: forward-mode
    differentiation of m samples, in which no layer runs twice. A function without a rule raises
    NotImplementedError.
    """

    def __init__(self, value, tangent):
        self.value, self.tangent = value, tangent.to(value.dtype)
        self.dtype, self.device, self.shape = value.dtype, value.device, value.shape

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name, kwargs = function.__name__, kwargs or {}
        if name == "dropout":  # one mask for value and tangent
            kept = function(torch.ones_like(args[0].value), *args[1:], **kwargs)
            return args[0] * Dual(kept, torch.zeros_like(args[0].tangent))
        if name not in RULES and name not in LINEAR:
            raise NotImplementedError(f"no rule for the tangent of {name}")
        with torch.no_grad():  # the tangent first: the function may modify its input
            if name in LINEAR:
                dy = function(*each(args, lambda a: a.tangent, zero), **kwargs)
            else:
                d = each(args, lambda a: a.tangent, lambda a: 0)
                dy = RULES[name](d, *each(args, lambda a: a.value[-len(a.tangent) :]), **kwargs)
        y = function(*each(args, lambda a: a.value), **kwargs)
        if isinstance(y, torch.Tensor):
            return Dual(y, dy.expand(-1, *y.shape[1:]))
        return tuple(map(Dual, y, dy))

    def __getattr__(self, name):  # x.cos() is torch.cos(x)
        return partial(getattr(torch, name), self)

    def __getitem__(self, index):
        return Dual(self.value[index], self.tangent[index])

    def long(self):
        return Dual(self.value.long(), self.tangent)

    view = reshape = variadic(torch.reshape)
    permute = variadic(torch.permute)
    __neg__, __pow__ = method(torch.neg), method(torch.pow)
    __add__ = __radd__ = method(torch.add)
    __mul__ = __rmul__ = method(torch.mul)
    __sub__, __rsub__ = method(torch.sub), method(torch.sub, reflected=True)
    __truediv__, __rtruediv__ = method(torch.div), method(torch.div, reflected=True)


def each(args, of_dual, of_constant=lambda a: a):
    """of_dual of each Dual and of_constant of everything else, also inside lists."""
    return [
        each(a, of_dual, of_constant)
        if isinstance(a, (list, tuple))
        else (of_dual if isinstance(a, Dual) else of_constant)(a)
        for a in args
    ]


def zero(a):
    """The tangent of a constant in a linear function; a non-tensor is returned unchanged."""
    return torch.zeros_like(a) if isinstance(a, torch.Tensor) else a


def softmax_tangent(d, x, dim, _stacklevel=3, dtype=None):
    p = x.softmax(dim)
    return p * (d[0] - (p * d[0]).sum(dim, keepdim=True))


def layer_norm_tangent(d, x, shape, weight=None, bias=None, eps=1e-5):
    _, mean, rstd = torch.native_layer_norm(x, shape, None, None, eps)
    only_x = (True, False, False)
    dx = aten.native_layer_norm_backward(d[0], x, shape, mean, rstd, None, None, only_x)[0]
    return dx if weight is None else dx * weight


def group_norm_tangent(d, x, groups, weight=None, bias=None, eps=1e-5):
    shape = len(x), x.shape[1], x[0, 0].numel(), groups
    _, mean, rstd = torch.native_group_norm(x, None, None, *shape, eps)
    only_x = (True, False, False)
    dx = aten.native_group_norm_backward(d[0], x, mean, rstd, None, *shape, only_x)[0]
    return dx if weight is None else dx * expand(weight, x[0])


def rms_norm_tangent(d, x, shape, weight=None, eps=None):
    dims = tuple(range(-len(shape), 0))
    if eps is None:  # torch computes a bfloat16 norm in float32
        eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    rstd = (x.square().mean(dims, keepdim=True) + eps).rsqrt()
    dx = rstd * (d[0] - x * rstd**2 * (x * d[0]).mean(dims, keepdim=True))
    return dx if weight is None else dx * weight


def attention_tangent(d, q, k, v):
    (dq, dk, dv), scale = d, q.shape[-1] ** -0.5
    p = (scale * q @ k.mT).softmax(-1)  # (m, heads, N, N)
    p_ds = p * (scale * (dq @ k.mT + q @ dk.mT))
    return (p_ds - p * p_ds.sum(-1, keepdim=True)) @ v + p @ dv


# The tangent of a function, by its name. A rule takes the tangents d of the arguments, 0 for
# constants, and the arguments. The Jacobians of SiLU, GELU and the normalisation are symmetric, so
# their backward is their forward derivative. Attention recomputes its matrix: flash stores none.
RULES = {
    "add": lambda d, a, b: d[0] + d[1],
    "sub": lambda d, a, b: d[0] - d[1],
    "mul": lambda d, a, b: d[0] * b + a * d[1],
    "div": lambda d, a, b: (d[0] - a / b * d[1]) / b,
    "pow": lambda d, x, n: n * x ** (n - 1) * d[0],  # n is a number
    "neg": lambda d, x: -d[0],
    "exp": lambda d, x: x.exp() * d[0],
    "square": lambda d, x: 2 * x * d[0],
    "sqrt": lambda d, x: d[0] / (2 * x.sqrt()),
    "cos": lambda d, x: -x.sin() * d[0],
    "sin": lambda d, x: x.cos() * d[0],
    "tanh": lambda d, x: (1 - x.tanh() ** 2) * d[0],
    "sigmoid": lambda d, x: x.sigmoid() * (1 - x.sigmoid()) * d[0],
    "relu": lambda d, x, inplace=False: (x > 0) * d[0],
    "silu": lambda d, x, inplace=False: aten.silu_backward(d[0], x),
    "gelu": lambda d, x, approximate="none": aten.gelu_backward(d[0], x, approximate=approximate),
    "softmax": softmax_tangent,
    "embedding": lambda d, y, weight, *_, **__: weight.new_zeros(*y.shape, weight.shape[1]),
    "linear": lambda d, x, weight, bias=None: F.linear(d[0], weight),
    "conv2d": lambda d, x, w, bias=None, *a, **k: F.conv2d(d[0], w, None, *a, **k),
    "conv_transpose2d": lambda d, x, w, bias=None, *a, **k: F.conv_transpose2d(
        d[0], w, None, *a, **k
    ),
    "group_norm": group_norm_tangent,
    "layer_norm": layer_norm_tangent,
    "rms_norm": rms_norm_tangent,
    "scaled_dot_product_attention": attention_tangent,
    "reshape": lambda d, x, shape: d[0].reshape(len(d[0]), *shape[1:]),  # shape[0]: B or -1
}
# Linear functions are applied to the tangents themselves.
LINEAR = {"cat", "stack", "chunk", "split", "unbind", "transpose", "permute", "unsqueeze", "mean"}
LINEAR |= {"sum", "unflatten", "flatten", "pixel_unshuffle", "pixel_shuffle"}


def checkpointed(block, x, c):
    """Activation checkpointing: keeps only the inputs of block(x, c) and runs it again in backward.

    The tensors of Duals are passed one by one, because torch.compile requires it."""
    if not isinstance(x, Dual):
        return checkpoint(block, x, c, use_reentrant=False)

    def unpacked(x, dx, c, dc):
        y = block(Dual(x, dx), Dual(c, dc))
        return y.value, y.tangent

    args = x.value, x.tangent, c.value, c.tangent
    return Dual(*checkpoint(unpacked, *args, use_reentrant=False))
