"""The MeanFlow objective and its samplers (arXiv 2505.13447v1), in the paper's order.

    z = (1 - t) x + t e,   v = e - x                                       interpolation
    v~ = omega v + kappa u(z, t, t | y) + (1 - omega - kappa) u(z, t, t)   guidance, Eq. 21
    u_tgt = v~ - (t - r) du/dt,   du/dt = JVP of u along (v~, 0, 1)        target, Eq. 10 and 18
    loss = sg(w) |u - sg(u_tgt)|^2,   w = 1 / (|u - u_tgt|^2 + c)^p        adaptive weight, Eq. 22
    z_r = z_t - (t - r) u(z_t, r, t)                                       sampling, Eq. 12

t = 1 is noise, t = 0 is data, r <= t. A network is any callable net(z, r, t, y) -> u shaped like z.

A batch is laid out with its r = t samples first and its r < t samples last, in fixed numbers: where
r = t the JVP is multiplied by zero, so it is taken of the last slice alone, and slices keep shapes
static. Nothing in the target needs a gradient, so no graph of it is ever built.
"""

import warnings
from itertools import pairwise

import torch
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel


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


def guided_velocity(v, u_label, u_null, omega, kappa):
    """v~ of Eq. 21, or 19 where kappa = 0; the effective guidance scale is omega / (1 - kappa)."""
    return omega * v + kappa * u_label + (1 - omega - kappa) * u_null


def corruption(v, k, generator=None):
    """k |v| N(0, I), to spoil the target where r = t: arXiv 2511.19065v1, Sec. 4.1 and Fig. 3.

    differs: the paper does not say over what |v| is taken; here it is over C, H, W of a sample.
    """
    size = expand(v.flatten(1).norm(dim=1), v)
    return k * size * torch.randn(v.shape, generator=generator, device=v.device)


def total_derivative(net, z, r, t, y, v, tangent=(0.0, 1.0)):
    """du/dt = v . du/dz + dr . du/dr + dt . du/dt by one JVP, Eq. 8. tangent: (dr, dt).

    The tangents other than (0, 1) are the deliberately wrong ones of Tab. 1b.
    """
    dr, dt = tangent
    tangents = (v, torch.full_like(r, dr), torch.full_like(t, dt))
    # A JVP of a compiled module would not be compiled, and would spoil what is: hence forward. Of
    # scaled_dot_product_attention's backends, MATH alone has forward-mode derivatives.
    forward = getattr(net, "forward", net)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        return jvp(lambda z, r, t: forward(z, r, t, y), (z, r, t), tangents)[1]


def value_and_derivative(net, bare, z, r, t, y, v, tangent=(0.0, 1.0)):
    """u of all samples, with its graph, and du/dt along v, (m, ...), of the last m, without one.

    A DiT gives both at once, its tangents carried along with the forward (model.Dual). Any other
    network is differentiated by total_derivative, and so is from then on one that has refused.
    """
    if len(v) == 0:
        return net(z, r, t, y).to(v.dtype), v
    last = slice(len(z) - len(v), len(z))
    if getattr(bare, "carries_tangents", False):
        dr, dt = (torch.full_like(t[last], d) for d in tangent)
        try:
            u, dudt = net(z, r, t, y, (v, dr, dt))
            return u.to(v.dtype), dudt.to(v.dtype)
        except torch.OutOfMemoryError:
            raise
        except (NotImplementedError, AttributeError, TypeError, RuntimeError) as error:
            # A layer of a fork: were it wrong without a Dual, too, that shows below.
            why = f"{type(error).__name__}: {error}; see RULES in model.py"
            warnings.warn(f"du/dt by the slower torch.func.jvp from here on; {why}", stacklevel=2)
            bare.carries_tangents = False
    u = net(z, r, t, y).to(v.dtype)
    return u, total_derivative(bare, z[last], r[last], t[last], y[last], v, tangent)


def target(v, r, t, dudt):
    """u_tgt = v~ - (t - r) du/dt, Eq. 10 and 18."""
    return v - expand(t - r, v) * dudt


def adaptive_weight(squared_error, p=1.0, c=1e-3):
    """w = 1 / (|Delta|^2 + c)^p, Eq. 22, without gradient. |Delta|^2: (B,), summed over C, H, W.

    differs: c = 1e-3 as the paper says; the authors' code has 0.01.
    """
    return 1 / (squared_error.detach() + c) ** p


def loss(
    net, x, e, r, t, y, num_neq, weight, bare=None, null_label=None, omega=1.0, kappa=0.0,
    cfg_interval=(0.0, 1.0), tangent=(0.0, 1.0), p=1.0, c=1e-3, v_noise=None,
):  # fmt: skip
    """MeanFlow loss of a batch whose last num_neq samples have r < t and whose others have r = t.

    x, e: (B, C, H, W) data and noise; r, t: (B,); y: (B,) labels, of which some may be null_label.
    weight: (B,) alpha(t) of the r = t samples, beta(t - r) of the others. It multiplies the loss
    after the adaptive weight, which would otherwise cancel it (arXiv 2511.19065v1, App. B).
    net runs once, with a graph; bare is the same network without its DDP wrapper, for guidance, and
    for du/dt where it carries no tangents.
    omega, kappa: guidance, in force where t is in cfg_interval and the label is not null.
    v_noise: like x, added to the target of the r = t samples to corrupt it.

    Returns the mean loss and |u - u_tgt|^2 / (C H W) of each sample, (B,), without gradient. It is
    the second that tells of progress: with p = 1 the loss of a sample is 1 however good u is.
    """
    bare = net if bare is None else bare
    eq, neq = slice(0, len(x) - num_neq), slice(len(x) - num_neq, len(x))
    z, v = interpolate(x, e, t)  # (B, C, H, W)

    guided = omega != 1 or kappa != 0
    if guided:
        # Needed: u(z, t, t) under the null label for all and, if kappa is not 0, under their own
        # for all. Of the latter the training forward computes the r = t samples'.
        extra = neq if kappa else slice(0, 0)
        y_null = torch.full_like(y, null_label)
        z_tt, t_tt, y_tt = (torch.cat([a, b[extra]]) for a, b in ((z, z), (t, t), (y_null, y)))
        with torch.no_grad():
            u_null, u_label = bare(z_tt, t_tt, t_tt, y_tt).to(v.dtype).tensor_split([len(x)])
        inside = (t >= cfg_interval[0]) & (t <= cfg_interval[1]) & (y != null_label)

    def guide(part, u_label):
        if not guided:
            return v[part]
        v_guided = guided_velocity(v[part], u_label, u_null[part], omega, kappa)
        return torch.where(expand(inside[part], v), v_guided, v[part])

    v_neq = guide(neq, u_label if kappa else 0)  # first, since the JVP goes along it
    u, dudt = value_and_derivative(net, bare, z, r, t, y, v_neq, tangent)
    v_eq = guide(eq, u[eq].detach())
    if v_noise is not None:
        v_eq = v_eq + v_noise[eq]
    u_tgt = torch.cat([v_eq, target(v_neq, r[neq], t[neq], dudt)])  # (B, C, H, W)

    squared_error = (u - u_tgt).square().flatten(1).sum(1)  # (B,)
    losses = weight * adaptive_weight(squared_error, p, c) * squared_error  # (B,)
    return losses.mean(), squared_error.detach() / x[0].numel()


@torch.no_grad()
def sample(net, e, y, nfe=1, velocity=False, times=None):
    """Images from noise e: (B, C, H, W) in `nfe` evaluations under labels y: (B,).

    Each step is z_r = z_t - (t - r) u(z_t, r, t), Eq. 12; nfe = 1 is x = e - u(e, 0, 1). With
    velocity, u(z_t, t, t) takes the place of u(z_t, r, t): Euler on the instantaneous velocity
    (arXiv 2511.19065v1, Tab. 5). times: decreasing, uniform from 1 to 0 where not given.
    """
    times = torch.linspace(1, 0, nfe + 1).tolist() if times is None else times
    z = e
    for t, r in pairwise(times):
        t_batch = torch.full_like(z[:, 0, 0, 0], t)  # (B,)
        r_batch = t_batch if velocity else torch.full_like(t_batch, r)
        z = z - (t - r) * net(z, r_batch, t_batch, y).to(z.dtype)
    return z


def expand(a, like):
    """(B,) -> (B, 1, 1, 1), to broadcast over `like`."""
    return a.view(-1, *[1] * (like.dim() - 1))
