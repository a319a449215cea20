# SPDX-License-Identifier: Apache-2.0
"""Patches of photographs, 63 dimensions: affine beside spline couplings, nats beside seconds.

The two photographs come with scikit-learn. Each patch of 8 x 8 gray pixels is dequantized and scaled to [0, 1]. Its
mean is subtracted and its last pixel dropped, since the others determine it (as in Uria et al. 2013, section 5.2). The
patches to test on come from the lower fifth of each photograph.
"""

import numpy as np
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor

from pyro_realnvp import (
    AffineCoupling,
    Compose,
    Flow,
    InvertibleLinear,
    SplineCoupling,
    TriangularAffine,
    fit,
    real_nvp,
)

from .tables import print_table

SIZE, NUM_TRAIN, NUM_TEST, NUM_STEPS = 8, 50_000, 10_000, 2000


def patches(images: list[np.ndarray], num: int, rng: np.random.RandomState) -> np.ndarray:
    rows = []
    for k in range(num):
        image = images[k % len(images)]
        top, left = (rng.randint(n - SIZE + 1) for n in image.shape)
        rows.append(image[top : top + SIZE, left : left + SIZE].ravel())
    x = (np.array(rows) + rng.rand(num, SIZE**2)) / 256
    return (x - x.mean(1, keepdims=True))[:, :-1]


def data() -> tuple[Tensor, Tensor]:
    rng = np.random.RandomState(0)
    gray = [image.mean(-1).round() for image in load_sample_images().images]
    cuts = [int(0.8 * len(image)) for image in gray]
    above = patches([image[:cut] for image, cut in zip(gray, cuts)], NUM_TRAIN, rng)
    below = patches([image[cut:] for image, cut in zip(gray, cuts)], NUM_TEST, rng)
    return torch.tensor(above, dtype=torch.float32), torch.tensor(below, dtype=torch.float32)


def main() -> None:
    train, test = data()
    dim, mean, tril = train.shape[1], train.mean(0), torch.linalg.cholesky(train.T.cov())
    normal = torch.distributions.MultivariateNormal(mean, scale_tril=tril)
    rows = [["a normal", "", f"{normal.log_prob(test).mean():.2f}", "", ""]]
    sizes = [(AffineCoupling, 8), (AffineCoupling, 16), (SplineCoupling, 2), (SplineCoupling, 4)]
    for coupling, num_couplings in sizes:
        torch.manual_seed(0)
        options = {"hidden_dims": (128, 128), "coupling": coupling, "between": InvertibleLinear}
        learned = real_nvp(dim, num_couplings=num_couplings, **options)
        flow = Flow(Compose([learned, TriangularAffine(dim).start_at(mean, tril)]))  # starts as the normal
        # The patches are whitened by their covariance; their quartiles are far closer, since most patches are smooth.
        history = fit(flow, train, num_steps=NUM_STEPS, validation=0.02, standardize=False, seed=0, progress=False)
        with torch.no_grad():
            score = torch.cat([flow().log_prob(some) for some in test.split(1000)]).mean()
        times = [f"{history.seconds:.0f}", f"{1e3 * history.seconds / len(history.loss):.1f}"]
        rows.append([coupling.__name__, num_couplings, f"{score:.2f}", *times])
    title = f"{NUM_TRAIN} patches, {dim} dimensions, {NUM_STEPS} steps of 256"
    print_table(title, ["", "couplings", "nats per test patch", "seconds", "ms a step"], rows)
