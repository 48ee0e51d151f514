"""The distribution of (t, r) and the weights of the losses, in training of a given length.

The base distribution of times is MeanFlow's (arXiv 2505.13447v1, Sec. 4.3). Around it stand the
three parts of the improved training (arXiv 2511.19065v2, Sec. 5 and App. B): the progressive weight
beta on samples with r < t, and two ways to form the instantaneous velocity early, a weight alpha on
samples with r = t (MinSNR's) or DTD's curriculum over times. `Schedule` joins them for a run:

    schedule = Schedule(steps, lognorm_quantile, accel="dtd", progressive=True)
    t, r, weight = schedule.sample(num_eq, num_neq, step)      # the inputs of meanflow.loss
    schedule.update(v_error, step)                             # after each step

A base distribution is given by its quantile function q -> t. Uniform q samples from it, uniform q
near 1 samples only its largest times, and a midpoint rule in q integrates over it.
"""

from functools import partial

import torch
from torch import nn


def lognorm_quantile(q, mu=-0.4, sigma=1.0):
    """Quantiles of sigmoid(N(mu, sigma^2)), arXiv 2505.13447v1, Sec. 4.3. q: any shape, [0, 1]."""
    return torch.sigmoid(mu + sigma * torch.special.ndtri(q))


def uniform_quantile(q, mu=None, sigma=None):
    """Quantiles of U(0, 1); mu and sigma are accepted and not used. q: any shape, in [0, 1]."""
    return q


TIME_SAMPLERS = {"lognorm": lognorm_quantile, "uniform": uniform_quantile}


def sample_t_r(num_eq, num_neq, quantile, mass=1.0, pairs=None, generator=None):
    """Times of a batch whose first num_eq samples have r = t and whose last num_neq have r < t.

    Both times are drawn independently and t is the larger; r is set to t *afterwards*, so samples
    with r = t see the distribution of the larger of two draws (arXiv 2505.13447v1, Sec. 4.3).

    mass: the share of the base distribution in use, its largest times (float or 0-d tensor in
    (0, 1]); below 1 in DTD's early stages. pairs: (2, K) from `time_pairs`, from which (t, r) of
    the samples with r < t are then drawn. Returns t, r: (num_eq + num_neq,) float32, on the
    generator's device.
    """
    device = generator.device if generator else "cpu"
    q = 1 - mass * torch.rand(2, num_eq + num_neq, generator=generator, device=device)
    times = quantile(q)
    t, r = times.amax(0), times.amin(0)
    if pairs is not None:
        pick = torch.randint(pairs.shape[1], (num_neq,), generator=generator, device=device)
        t[num_eq:], r[num_eq:] = pairs[:, pick]
    r[:num_eq] = t[:num_eq]
    return t, r


def midpoints(n):
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def time_pairs(quantile, gap, grid=1024):
    """All pairs (t, r) from a lattice of quantiles whose gap t - r lies in `gap`: (2, K).

    The pairs are equally likely, so a mean over them is an expectation over r < t samples with such
    gaps (midpoint rule). K is 0 where no pair has such a gap.
    """
    a, b = torch.cartesian_prod(*[quantile(midpoints(grid))] * 2).T
    t, r = torch.maximum(a, b), torch.minimum(a, b)
    inside = (t - r >= gap[0]) & (t - r <= gap[1])
    return torch.stack([t[inside], r[inside]])


def mean_over_v_samples(function, quantile, grid=100_000):
    """E[function(t)] over samples with r = t: the larger of two draws, whose q has density 2 q."""
    q = midpoints(grid)
    return (2 * q * function(quantile(q))).mean().item()


def beta_lambda(quantile, pairs=None):
    """lambda = 1 / E[1 - dt], arXiv 2511.19065v2, Sec. 5, over `pairs`, else over two draws.

    The larger of two draws has density 2 q, the smaller 2 - 2 q. Default times: lambda = 1.3045.
    """
    q = midpoints(100_000)
    dt = (4 * q - 2) * quantile(q) if pairs is None else pairs[0] - pairs[1]
    return 1 / (1 - dt.mean().item())


def beta(dt, s, lam):
    """Progressive weight 1 - s + lambda s (1 - dt) of a gap dt = t - r. arXiv 2511.19065v2, Sec. 5.

    s = 1 - (i / T)^k falls from 1 to 0 over training: at s = 1 short gaps weigh most and the mean
    weight is 1; at s = 0 every gap weighs 1.
    """
    return 1 - s + lam * s * (1 - dt)


def minsnr(t, gamma=5.0):
    """t^2 min(SNR, gamma), SNR = (1 - t)^2 / t^2: Min-SNR (arXiv 2303.09556) for a velocity loss.

    On the linear path x = z - t v, so Min-SNR's squared error of x is t^2 times that of v.
    """
    return torch.minimum((1 - t) ** 2, gamma * t**2)


# Weights alpha(t) of samples with r = t, by the name of their --accel; each takes (t, gamma).
# differs: the papers do not say how alpha is scaled. Schedule divides it by `mean_over_v_samples`,
# so alpha re-weights the samples with r = t among themselves and keeps their total weight.
ALPHAS = {"minsnr": minsnr}


class DTD(nn.Module):
    """Curriculum over times (arXiv 2403.10348), p_acc of arXiv 2511.19065v2, Sec. 5.

    The base distribution is cut into `clusters` slices of equal mass, and stage n trains on the n
    noisiest (largest t), which are the easiest. When the smoothed v-loss has not improved for
    `patience` steps in a row, the next slice is added. The last stage uses all times.
    State is kept in tensors on the device, so that a GPU is never waited for.

    differs: the papers leave three things open. Times: t and r are both drawn from the slices in
    use, which also keeps early gaps short. Loss: the unweighted squared error per dimension,
    smoothed by an EMA; the adaptively weighted loss is always about 1. Length: stage n begins by
    step cap * steps * (n - 1) / (clusters - 1), so all times are in use after that share `cap`.
    """

    SMOOTHING = 0.95  # of the loss's EMA: a window of about 20 steps

    def __init__(self, steps, clusters=20, patience=200, cap=0.2):
        super().__init__()
        self.clusters, self.patience, self.last = clusters, patience, max(cap * steps, 1)
        self.register_buffer("stage", torch.tensor(1.0))
        self.register_buffer("smoothed", torch.tensor(torch.inf))  # inf: no loss seen in this stage
        self.register_buffer("best", torch.tensor(torch.inf))
        self.register_buffer("waited", torch.tensor(0.0))

    @property
    def mass(self):
        """n / clusters, the share of the base distribution in use: 0-d tensor for `sample_t_r`."""
        return self.stage / self.clusters

    @torch.no_grad()
    def update(self, v_loss, step):
        """Update with the v-loss of `step` (0-d, the same on all ranks): sets the next stage."""
        first = self.smoothed.isinf()
        smoothed = torch.where(first, v_loss, torch.lerp(v_loss, self.smoothed, self.SMOOTHING))
        waited = torch.where(smoothed < self.best, 0.0, self.waited + 1)
        latest = 1 + int((self.clusters - 1) * min((step + 1) / self.last, 1))
        stage = (self.stage + (waited >= self.patience)).clamp(min=latest, max=self.clusters)
        moved = stage > self.stage  # another stage has another loss
        self.smoothed.copy_(torch.where(moved, torch.inf, smoothed))
        self.best.copy_(torch.where(moved, torch.inf, torch.minimum(self.best, smoothed)))
        self.waited.copy_(torch.where(moved, 0.0, waited))
        self.stage.copy_(stage)


class Schedule(nn.Module):
    """The times and weights of a run of `steps` steps: arXiv 2511.19065v2, Sec. 5.

    Samples with r = t learn the instantaneous velocity v, samples with r < t the average velocity
    u. To learn v early, accel is the name of a weight in ALPHAS for the former, or "dtd" for a
    curriculum over the times of both; "none" is MeanFlow. progressive: whether beta weighs the
    latter, short gaps t - r first. quantile: of the base distribution of times. gap: (lo, hi)
    restricts t - r where r < t (Sec. 4.2); ValueError where the distribution gives no such gaps.
    A module, for the state of DTD and for its device.
    """

    def __init__(
        self, steps, quantile, accel="none", progressive=False, gap=None, beta_k=1.0,
        snr_gamma=5.0, dtd_clusters=20, dtd_patience=200, dtd_cap=0.2,
    ):  # fmt: skip
        super().__init__()
        if accel not in ("none", *ALPHAS, "dtd"):
            raise ValueError(f"there is no accel {accel}")
        self.steps, self.quantile, self.accel = steps, quantile, accel
        self.progressive, self.beta_k = progressive, beta_k
        pairs = time_pairs(quantile, gap) if gap else None
        if gap and not pairs.numel():
            raise ValueError(f"this distribution of times gives no gaps of {gap}")
        self.lam = beta_lambda(quantile, pairs)
        self.register_buffer("pairs", pairs.float() if gap else None, persistent=False)
        if accel in ALPHAS:
            self.alpha = partial(ALPHAS[accel], gamma=snr_gamma)
            self.alpha_mean = mean_over_v_samples(self.alpha, quantile)
        self.dtd = DTD(steps, dtd_clusters, dtd_patience, dtd_cap)

    def s(self, step):
        return 1 - (step / self.steps) ** self.beta_k

    def sample(self, num_eq, num_neq, step, generator=None):
        """t, r and weight, (num_eq + num_neq,) each, of a batch whose first num_eq have r = t."""
        mass = self.dtd.mass if self.accel == "dtd" else 1.0
        t, r = sample_t_r(num_eq, num_neq, self.quantile, mass, self.pairs, generator)
        weight = torch.ones_like(t)
        if self.accel in ALPHAS:
            weight[:num_eq] = self.alpha(t[:num_eq]) / self.alpha_mean
        if self.progressive:
            weight[num_eq:] = beta((t - r)[num_eq:], self.s(step), self.lam)
        return t, r, weight

    def update(self, v_error, step):
        """After `step`, with the mean error where r = t (0-d, the same on all ranks)."""
        if self.accel == "dtd":
            self.dtd.update(v_error, step)

    def state(self, step):
        """For a row of metrics: {"s": s, "stage": n}, of those that are in use."""
        of_beta = {"s": self.s(step)} if self.progressive else {}
        return of_beta | ({"stage": int(self.dtd.stage)} if self.accel == "dtd" else {})
