"""The bound of kernels tested three ways: fp64 truth, plain torch in the dtypes of storage, the kernel."""

import pytest
import torch


def assert_three_way(kernel, transcribed, truth, what, extra=0.0):
    """The kernel's largest error is at most torch's, but for the one rounding to the dtype of storage.

    extra: by how much more it may be off, where it adds in an order of its own.
    """
    if not kernel.numel():
        return
    kernel, transcribed, truth = (tensor.flatten() for tensor in (kernel, transcribed, truth))
    error = (kernel.double() - truth).abs()
    worst = error.argmax()
    rounding = torch.finfo(kernel.dtype).eps * truth.abs().max() + torch.finfo(kernel.dtype).tiny + extra
    bound = (transcribed.double() - truth).abs().max() + rounding
    assert error[worst] <= bound, (
        f"{what}, worst at {worst.item()}: {kernel[worst].item()} for {truth[worst].item()},"
        f" error {error[worst].item():.3e} > {bound.item():.3e}"
    )


def check_sums(result, truths, what):
    """Each difference carries the rounding of A in fp32, a few 2^-24 of what it cancelled from."""
    assert result.negative.item() == sum(truth.negative.item() for truth in truths), f"negative of {what}"
    assert result.nonfinite.item() == 0, f"nonfinite of {what}"
    penalty = sum(truth.penalty.item() for truth in truths)
    cancelled = sum(truth.cancelled.item() for truth in truths)
    # |Σ(d+e)² − Σd²| <= 2·√Σd²·√Σe² + Σe²
    rounding = 4e-7 * (penalty * cancelled) ** 0.5 + 1e-13 * cancelled
    assert result.penalty.item() == pytest.approx(penalty, rel=1e-6, abs=rounding), f"penalty of {what}"
    square = sum(truth.gradient_square.item() for truth in truths)
    steepest = max(truth.largest_gradient.item() for truth in truths)
    rounding = steepest * (4e-7 * (square * cancelled) ** 0.5 + steepest * 1e-13 * cancelled)
    assert result.gradient_square.item() == pytest.approx(square, rel=1e-6, abs=rounding), f"gradient_square of {what}"
