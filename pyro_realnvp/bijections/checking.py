# SPDX-License-Identifier: Apache-2.0
"""A check of a bijection, to run on one that you have written yourself."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributions import Transform


@dataclass
class Report:
    """The outcome of :func:`check_bijection`, which prints as one line for each property."""

    name: str
    findings: list[tuple[bool, str, str]] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every property holds."""
        return all(ok for ok, _, _ in self.findings)

    def add(self, ok: bool, what: str, found: str) -> None:
        self.findings.append((bool(ok), what, found))

    def __repr__(self) -> str:
        lines = [f"{'ok  ' if ok else 'FAIL'}  {what:<38} {found}" for ok, what, found in self.findings]
        return "\n".join([f"check_bijection({self.name}): {'passed' if self.passed else 'FAILED'}", *lines])


def check_bijection(f: Transform, x: Tensor, *, tolerance: float | None = None) -> Report:
    r"""Checks at x that f is a bijection: :math:`f^{-1}(f(x)) = x` and :math:`f(f^{-1}(y)) = y`.

    It also checks the shapes, compares :math:`\log|\det \partial y / \partial x|` with the Jacobian that autograd
    computes, and requires finite gradients.

    Args:
        f: a bijection of your own or of this package, or any transform of Pyro or torch. Condition it first if it
            takes a context.
        x: the inputs, of shape ``batch_shape + event_shape``; float64 gives the sharpest check.
        tolerance: the largest permitted error, relative to 1 + the magnitude of the expected values; by default 1e-8
            in float64 and 1e-3 otherwise.

    Returns:
        A report to print.

    Raises:
        ValueError: a property does not hold; the message is the report.

    Example:
        >>> import torch
        >>> from pyro_realnvp import real_nvp
        >>> print(check_bijection(real_nvp(2).double(), torch.randn(5, 2, dtype=torch.float64)))
        check_bijection(Compose): passed
        ok    shape of f(x)                          (5, 2)
        ...
    """
    if tolerance is None:
        tolerance = 1e-8 if x.dtype == torch.float64 else 1e-3
    report = Report(type(f).__name__)
    with torch.no_grad():
        y = f(x)
        report.add(y.shape == f.forward_shape(x.shape), "shape of f(x)", f"{tuple(y.shape)}")
        ladj = f.log_abs_det_jacobian(x, y)
        report.add(
            ladj.shape == y.shape[: y.dim() - f.codomain.event_dim], "shape of log|det J|", f"{tuple(ladj.shape)}"
        )
        report.add(bool(y.isfinite().all() and ladj.isfinite().all()), "f(x) and log|det J| are finite", "")
        # The memory of f compares tensors by identity, so that a clone makes f compute the way back.
        back = f.inv(y.clone())
        report.add(back.shape == f.inverse_shape(y.shape), "shape of f.inv(y)", f"{tuple(back.shape)}")
        _compare(report, "f.inv(f(x)) = x", back, x, tolerance)
        _compare(report, "f(f.inv(y)) = y", f(back.clone()), y, tolerance)
        _compare(report, "log|det J| of f.inv", f.inv.log_abs_det_jacobian(y.clone(), back.clone()), -ladj, tolerance)
    with torch.enable_grad():
        x = x.detach().expand(f.inverse_shape(y.shape)).clone().requires_grad_()
        y = f(x)
        if not y.requires_grad:
            report.add(False, "f(x) has a gradient", "it is detached from x")
        else:
            _compare(report, "log|det J| = autograd's", ladj, _autograd_ladj(y, x, f.codomain.event_dim), tolerance)
            parameters = [p for p in f.parameters() if p.requires_grad] if isinstance(f, nn.Module) else []
            total = y.sum() + f.log_abs_det_jacobian(x, y).sum()
            gradients = torch.autograd.grad(total, [x, *parameters], allow_unused=True)
            unused = sum(g is None for g in gradients)
            finite = all(bool(g.isfinite().all()) for g in gradients if g is not None)
            report.add(finite, "gradients are finite", f"of x and {len(parameters)} parameters ({unused} unused)")
    if not report.passed:
        raise ValueError(str(report))
    return report


def _compare(report: Report, what: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    if got.shape[got.dim() - want.dim() :] != want.shape:
        report.add(False, what, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}")
        return
    error = (
        ((got - want).abs() / (1 + want.abs())).nan_to_num(torch.inf, torch.inf).amax().item() if got.numel() else 0.0
    )
    report.add(error <= tolerance, what, f"relative error {error:.1e} (tolerance {tolerance:.0e})")


def _autograd_ladj(y: Tensor, x: Tensor, event_dim: int) -> Tensor:
    """Returns log|det dy/dx| of each event from the Jacobian.

    The events of a batch do not depend on each other, so the gradient of a sum over the batch holds one row of the
    Jacobian of each event.
    """
    batch_shape = y.shape[: y.dim() - event_dim]
    entries = y.reshape(*batch_shape, -1).unbind(-1) if y.numel() else ()
    rows = [torch.autograd.grad(entry.sum(), x, retain_graph=True)[0].reshape(*batch_shape, -1) for entry in entries]
    return torch.linalg.slogdet(torch.stack(rows, -2)).logabsdet if rows else y.new_zeros(batch_shape)
