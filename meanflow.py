"""The MeanFlow objective and its sampler (arXiv 2505.13447v1), in the paper's order.

    z = (1 - t) x + t e,   v = e - x                                       interpolation
    v~ = omega v + kappa u(z, t, t | y) + (1 - omega - kappa) u(z, t, t)   guidance, Eq. 21
    u_tgt = v~ - (t - r) du/dt,   du/dt = JVP of u along (v~, 0, 1)        target, Eq. 10 and 18
    loss = sg(w) |u - sg(u_tgt)|^2,   w = 1 / (|u - u_tgt|^2 + c)^p        adaptive weight, Eq. 22
    z_r = z_t - (t - r) u(z_t, r, t)                                       sampling, Eq. 12

t = 1 is noise, t = 0 is data, r <= t. A network is any callable net(z, r, t, y) -> u shaped like z.
`textbook_loss` is the algorithm as printed, `loss` the same at about two thirds of the cost.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

# ---------------------------------------------------------------------------- the objective


@dataclass(frozen=True)
class Objective:
    """The constants of the loss; the defaults are MeanFlow without guidance.

    omega, kappa: guidance inside the target, Eq. 21; the effective scale is omega / (1 - kappa).
    omega = 1 and kappa = 0 is none, whatever the labels bring.
    Guidance applies where t is in cfg_interval and the label is not null_label. Labels y (B, 2)
    bring an omega of their own, for a network that is conditioned on it.
    tangent: (dr, dt) of the JVP; values other than (0, 1) are for the ablation of Tab. 1b.
    jvp_velocity: the JVP goes along v~ ("target"), or ("network") along the network's own velocity
    u(z, t, t | y), which has less variance (arXiv 2512.02012, Sec. 4); the target keeps v~.
    p, c: adaptive weight, Eq. 22. differs: c = 1e-3 as in the paper; the JAX code has 0.01.
    """

    null_label: int = 0
    omega: float = 1.0
    kappa: float = 0.0
    cfg_interval: tuple = (0.0, 1.0)
    tangent: tuple = (0.0, 1.0)
    jvp_velocity: str = "target"
    p: float = 1.0
    c: float = 1e-3

    @property
    def guided(self):
        return (self.omega, self.kappa) != (1, 0)

    @property
    def needs_velocity(self):
        """Whether a step needs u(z, t, t | y) where r < t."""
        return self.kappa != 0 or self.jvp_velocity == "network"


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
    if y.dim() == 2:
        y, omega = y[:, 0], expand(y[:, 1], v)
    guided = omega * v + kappa * u_label + (1 - omega - kappa) * u_null
    return torch.where(expand((t >= lo) & (t <= hi) & (y != objective.null_label), v), guided, v)


def null_labels(y, objective):
    """y with the null label for every label, (B,) or (B, 2)."""
    y = y.clone()
    y.view(len(y), -1)[:, 0] = objective.null_label
    return y


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
    with torch.no_grad():
        u_label = net(z, t, t, y) if objective.needs_velocity else 0
        if objective.guided:
            u_null = net(z, t, t, null_labels(y, objective))
            v = guided_velocity(v, u_label, u_null, t, y, objective)
    along = u_label.to(v) if objective.jvp_velocity == "network" else v
    dr, dt = (torch.full_like(t, d) for d in objective.tangent)
    with sdpa_kernel(SDPBackend.MATH), AttentionOutsideAutocast():  # others have no JVP
        u, dudt = jvp(lambda z, r, t: net(z, r, t, y), (z, r, t), (along, dr, dt))
    u_tgt = target(v, r, t, dudt).detach()
    return weighted_error(u, u_tgt, weight, objective)


class AttentionOutsideAutocast(TorchFunctionMode):
    """Runs attention outside autocast: under CUDA's, its JVP has no backward."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        attends = function is F.scaled_dot_product_attention
        with torch.autocast(args[0].device.type, enabled=False) if attends else nullcontext():
            return function(*args, **kwargs or {})


# ---------------------------------------------------------------------------- the economical step


def loss(net, x, e, r, t, y, num_neq, weight=1.0, objective=Objective(), v_noise=None):
    """`textbook_loss` of a batch whose first samples have r = t and whose last num_neq have r < t.

    Three things make it cheaper. Where r = t the JVP is multiplied by zero, so it is computed only
    for the last samples. The target has no gradient, so the JVP needs no graph. Where r = t, the
    training forward also gives the u(z, t, t | y) that guidance needs. num_neq is fixed, so all
    shapes are static.

    net: any network, also inside DDP. v_noise: like x, added to the target where r = t.
    """
    bare = net.module if isinstance(net, DistributedDataParallel) else net  # for no-grad forwards
    n = len(x) - num_neq  # samples with r = t
    z, v = interpolate(x, e, t)  # (B, C, H, W)
    v_eq, v_neq = v[:n], v[n:]

    def inputs(part):
        return z[part], r[part], t[part], y if y is None else y[part]

    z_neq, r_neq, t_neq, y_neq = inputs(slice(n, None))
    with torch.no_grad():
        u_null, u_neq = z, v_neq  # where they are not needed
        if objective.guided:
            u_null = bare(z, t, t, null_labels(y, objective))  # (B, C, H, W)
        if objective.needs_velocity and num_neq:
            u_neq = bare(z_neq, t_neq, t_neq, y_neq)
    if objective.guided:
        v_neq = guided_velocity(v_neq, u_neq, u_null[n:], t_neq, y_neq, objective)
    along = u_neq.to(z.dtype) if objective.jvp_velocity == "network" else v_neq
    # Dropout and other random layers must draw the same numbers for u and for du/dt. If there are
    # any, the last samples run by themselves, from the same state of the generators.
    with torch.random.fork_rng([z.device] if z.is_cuda else []):
        before = random_state(z.device)
        dudt = derivative(bare, z_neq, r_neq, t_neq, y_neq, along, objective.tangent)
        draws = random_state(z.device) != before
    parts = [slice(n, None), slice(n)] if draws and 0 < num_neq < len(x) else [slice(None)]
    u = torch.cat([net(*inputs(part)).to(z.dtype) for part in parts][::-1])  # (B, C, H, W)

    if objective.guided:
        v_eq = guided_velocity(v_eq, u[:n].detach(), u_null[:n], t[:n], y[:n], objective)
    if v_noise is not None:
        v_eq = v_eq + v_noise[:n]
    u_tgt = torch.cat([v_eq, target(v_neq, r_neq, t_neq, dudt)])  # (B, C, H, W)
    return weighted_error(u, u_tgt, weight, objective)


def derivative(net, z, r, t, y, v, tangent=(0.0, 1.0)):
    """du/dt = v . du/dz + dr . du/dr + dt . du/dt, Eq. 8, without gradient: like v, (m, C, H, W).

    Runs eagerly, because a compiled block would drop the tangents without an error.
    """
    if len(v) == 0:
        return v
    duals = zip((z, r, t), (v, *(torch.full_like(t, d) for d in tangent)), strict=True)
    eager = torch.compiler.set_stance("force_eager")
    with torch.no_grad(), eager, sdpa_kernel(SDPBackend.MATH), LinearTangents(), dual_level():
        u = net(*(make_dual(a.clone(), da) for a, da in duals), y)  # make_dual refuses some views
        return unpack_dual(u).tangent.to(z.dtype)


class LinearTangents(TorchFunctionMode):
    """The tangent of a linear layer is the layer of the tangent, without its bias.

    torch's own rule does twice the work: it also multiplies by the weights' tangent, which is 0.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        linear = function in (F.linear, F.conv2d, F.conv_transpose2d)
        return (partial(self.linear, function) if linear else function)(*args, **kwargs or {})

    def linear(self, function, input, weight, bias=None, *args, **kwargs):
        x, dx = unpack_dual(input)
        constant = all(p is None or unpack_dual(p).tangent is None for p in (weight, bias))
        if dx is None or not constant:
            return function(input, weight, bias, *args, **kwargs)
        dy = function(dx, weight, None, *args, **kwargs)
        return make_dual(function(x, weight, bias, *args, **kwargs), dy)


def random_state(device):
    """Of the generators that a network on this device draws from, to be compared."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return [state.numpy().tobytes() for state in states]


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
        return torch.autograd.grad(value, trained, allow_unused=True, materialize_grads=True)

    def dot(a, b):
        return torch.stack([(p * q).sum() for p, q in zip(a, b, strict=True)]).sum()

    of_v, cosines = gradient(0), []
    for pairs in pairs_of_gaps:
        of_u = gradient(len(x), pairs)
        cosines.append(dot(of_u, of_v) / (dot(of_u, of_u) * dot(of_v, of_v)).sqrt())
    return torch.stack(cosines)
