# SPDX-License-Identifier: Apache-2.0
"""`RealNVPClassifier` and `RealNVPOutlierDetector` beside scikit-learn's, on the tables that come with it.

The flows take few steps, since so few rows are learned by heart in more.
"""

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.covariance import EllipticEnvelope
from sklearn.datasets import load_breast_cancer, load_iris, load_wine
from sklearn.discriminant_analysis import QuadraticDiscriminantAnalysis
from sklearn.ensemble import IsolationForest
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import KFold, StratifiedKFold, cross_validate
from sklearn.naive_bayes import GaussianNB

from pyro_realnvp import RealNVPClassifier, RealNVPDensity, RealNVPOutlierDetector

from .tables import print_table

DENSITY = RealNVPDensity(num_steps=200, random_state=0)
TABLES = {"iris": load_iris, "wine": load_wine, "breast cancer": load_breast_cancer}
RARE = {"iris": 1, "wine": 0, "breast cancer": 0}  # the class whose rows are outliers: versicolor, 0, malignant
CONTAMINATION = 0.05
CLASSIFIERS = {
    "RealNVPClassifier": RealNVPClassifier(DENSITY),
    "QuadraticDiscriminantAnalysis": QuadraticDiscriminantAnalysis(reg_param=0.01),  # cancer needs some
    "GaussianNB": GaussianNB(),
}
DETECTORS = {
    "RealNVPOutlierDetector": RealNVPOutlierDetector(DENSITY),
    "EllipticEnvelope": EllipticEnvelope(random_state=0),
    "IsolationForest": IsolationForest(random_state=0),
}


def classify(classifier: BaseEstimator, name: str) -> list[str]:
    """The accuracy, and the mean of -log p(class), in nats, of 5 folds."""
    x, y = TABLES[name](return_X_y=True)
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    found = cross_validate(classifier, x, y, cv=folds, scoring=["accuracy", "neg_log_loss"], error_score="raise")
    return [f"{found['test_accuracy'].mean():.3f}", f"{-found['test_neg_log_loss'].mean():.3f}"]


def detect(detector: BaseEstimator, name: str) -> list[str]:
    """The area under the ROC curve: with outliers in new rows alone, and with some among the training rows."""
    x, y = TABLES[name](return_X_y=True)
    inliers, outliers = x[y != RARE[name]], x[y == RARE[name]]
    new, among = [], []
    for train, test in KFold(3, shuffle=True, random_state=0).split(inliers):
        detector.fit(inliers[train])
        new.append(area(detector, inliers[test], outliers))
    for seed in range(3):
        num = round(len(inliers) * CONTAMINATION / (1 - CONTAMINATION))
        few = np.random.default_rng(seed).choice(outliers, num, replace=False)
        detector.fit(np.concatenate([inliers, few]))
        among.append(area(detector, inliers, few))
    return [f"{np.mean(areas):.3f}" for areas in (new, among)]


def area(detector: BaseEstimator, inliers: np.ndarray, outliers: np.ndarray) -> float:
    is_outlier = np.repeat([0, 1], [len(inliers), len(outliers)])
    return roc_auc_score(is_outlier, -detector.score_samples(np.concatenate([inliers, outliers])))


def main() -> None:
    for name in TABLES:
        rows = [[method, *classify(classifier, name)] for method, classifier in CLASSIFIERS.items()]
        print_table(f"{name}: classes", ["", "accuracy", "-log p, nats"], rows)
    for name in TABLES:
        rows = [[method, *detect(detector, name)] for method, detector in DETECTORS.items()]
        print_table(f"{name}: outliers, area under the ROC curve", ["", "new rows", "training rows"], rows)
