# SPDX-License-Identifier: Apache-2.0
"""
Tables
======

``RealNVPDensity`` is a scikit-learn estimator: it goes into cross-validation, pipelines and grid searches. Here it
learns the density of benign breast tissue in 30 measurements, and finds malignant tissue because it is unlikely under
this density.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import IsolationForest
from sklearn.metrics import average_precision_score, precision_recall_curve
from sklearn.model_selection import GridSearchCV, KFold, cross_val_score, train_test_split
from sklearn.neighbors import KernelDensity
from sklearn.preprocessing import StandardScaler

from pyro_realnvp import RealNVPDensity, plots

parser = argparse.ArgumentParser(description="Density and anomalies of breast tissue.")
parser.add_argument("--num-steps", type=int, default=600)
parser.add_argument("--out", type=Path, help="folder for the pictures; by default they are shown")
args, _ = parser.parse_known_args()

# %%
# The data
# --------
# There are 357 benign tissues and 212 malignant ones. The models are trained on two thirds of the benign ones and see
# no malignant one before the test.
data = load_breast_cancer()
benign, malignant = data.data[data.target == 1], data.data[data.target == 0]
train, rest = train_test_split(benign, test_size=1 / 3, random_state=0)
test = np.concatenate([rest, malignant])
is_malignant = np.repeat([False, True], [len(rest), len(malignant)])

# %%
# A density, and its hyper-parameters
# -----------------------------------
# The score is the mean log-likelihood of held-out rows, in nats, so cross-validation can compare any two densities.
# (The columns are standardized for the kernels. The flow would do so by itself, but score in the original units.)
scaler = StandardScaler().fit(train)
z = scaler.transform(train)
folds = KFold(3, shuffle=True, random_state=0)
bandwidths = {"bandwidth": np.geomspace(0.1, 2, 20)}
kernels = GridSearchCV(KernelDensity(), bandwidths, cv=folds).fit(z)
kernel_score = cross_val_score(kernels.best_estimator_, z, cv=folds, scoring=lambda f, x, y=None: f.score(x) / len(x))
search = GridSearchCV(
    RealNVPDensity(num_steps=args.num_steps, patience=300, random_state=0), {"num_couplings": [4, 16]}, cv=folds
).fit(z)
flow = search.best_estimator_
print("held-out log-likelihood, nats per row")
print(f"  kernels, bandwidth {kernels.best_params_['bandwidth']:.2f}: {kernel_score.mean():8.2f}")
for parameters, score in zip(search.cv_results_["params"], search.cv_results_["mean_test_score"]):
    print(f"  flow, {parameters['num_couplings']:2d} couplings:      {score:8.2f}")

# %%
# Anomalies
# ---------
# The less likely a row is, the more anomalous it is. Rows with a score above a threshold are flagged. Precision is the
# fraction of the flagged rows that are malignant; recall is the fraction of the malignant rows that are flagged.
forest = IsolationForest(random_state=0).fit(z)
test = scaler.transform(test)
scores = {
    "flow": -flow.score_samples(test),
    "kernels": -kernels.best_estimator_.score_samples(test),
    "isolation forest": -forest.score_samples(test),
}
print("average precision")
for name, score in scores.items():
    print(f"  {name + ':':18s}{average_precision_score(is_malignant, score):.3f}")

# %%
# Pictures
# --------
# The pictures show precision over recall, the scores of both kinds of tissue, two of the measurements (of real rows and
# of samples), and the loss.
fig, axes = plt.subplots(1, 4, figsize=(17, 4), layout="constrained")
for name, score in scores.items():
    precision, recall, _ = precision_recall_curve(is_malignant, score)
    axes[0].plot(recall, precision, label=name)
axes[0].set(xlabel="recall", ylabel="precision", title="finding the malignant ones", ylim=(None, 1.01))
axes[0].legend()
surprise = np.clip(scores["flow"], None, np.quantile(scores["flow"], 0.9))
bins = np.linspace(surprise.min(), surprise.max(), 40)
axes[1].hist([surprise[~is_malignant], surprise[is_malignant]], bins, stacked=True, label=["benign", "malignant"])
axes[1].set(xlabel=r"$-\log p$ (nats; the last bin holds all beyond)", title="how unlikely they are")
axes[1].legend()
drawn = scaler.inverse_transform(flow.sample(len(train), random_state=0))
for rows, label in ((train, "rows"), (drawn, "samples")):
    axes[2].scatter(rows[:, 0], rows[:, 5], s=6, alpha=0.6, label=label)
axes[2].set(xlabel=data.feature_names[0], ylabel=data.feature_names[5], title="two of thirty columns")
axes[2].legend()
plots.plot_loss(flow.history_, ax=axes[3])
if args.out:
    args.out.mkdir(parents=True, exist_ok=True)
    fig.savefig(args.out / "tabular.png", dpi=120)
    print(f"picture in {args.out.resolve()}")
else:
    plt.show()
