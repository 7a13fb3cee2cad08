"""Moments against a dense float64 computation over the same tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llm_snp.core import moments as moments_module
from llm_snp.core.moments import Moments

N, M, D = 230, 12, 5


def data(offset: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x (N, M), correlated, and a residual r (N, D) that depends on it; float32, as a model gives them."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(N, M, generator=g) @ torch.randn(M, M, generator=g) / M**0.5 + torch.randn(M, generator=g)
    r = x @ torch.randn(M, D, generator=g) + 0.3 * torch.randn(N, D, generator=g) + 2.0
    return x + offset, r


def collect(
    x: Tensor, r: Tensor | None = None, groups: int = 1, centred: bool = True, batches: tuple[int, ...] = (64, 7, 159)
) -> Moments:
    moments: Moments | None = None
    start = 0
    for size in batches:
        rows = slice(start, start + size)
        batch = None if r is None else r[rows]
        if moments is None:
            moments = Moments.like(x[rows], batch, groups, centred)
        moments.add(x[rows], batch)
        start += size
    assert moments is not None
    assert start == x.shape[0]
    return moments


@pytest.mark.parametrize("centred", [True, False])
def test_against_dense_float64(centred: bool) -> None:
    x, r = data()
    moments = collect(x, r, centred=centred)
    x, r = x.double(), r.double()
    about_x, about_r = (x.mean(0), r.mean(0)) if centred else (torch.zeros(M), torch.zeros(D))
    xc, rc = x - about_x, r - about_r
    assert moments.tokens == N
    torch.testing.assert_close(moments.mean, x.mean(0), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(moments.covariance, xc.T @ xc / N, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(moments.uncentred, x.T @ x / N, atol=1e-5, rtol=1e-5)
    assert moments.residual_covariance is not None
    torch.testing.assert_close(moments.residual_covariance, rc.T @ xc / N, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(moments.mean_residual, r.mean(0), atol=1e-6, rtol=1e-6)
    assert moments.residual_variance == pytest.approx((rc.square().sum() / N).item(), rel=1e-5)


@pytest.mark.parametrize("centred", [True, False])
def test_huge_offset(centred: bool) -> None:
    """Mean 1e4, deviation 1: products of unshifted fp32 values would leave nothing of the covariance."""
    x, r = data(offset=1e4)
    moments = collect(x, r, centred=centred)
    exact, target = x.double(), r.double()
    xc = exact - exact.mean(0)
    covariance = xc.T @ xc / N
    second = exact.T @ exact / N
    naive = (x.T @ x).double() / N - torch.outer(exact.mean(0), exact.mean(0))
    assert (naive - covariance).abs().max() > 1.0
    torch.testing.assert_close(moments.mean, exact.mean(0), atol=1e-6, rtol=1e-10)
    if centred:
        torch.testing.assert_close(moments.covariance, covariance, atol=1e-5, rtol=1e-5)
        cross = (target - target.mean(0)).T @ xc / N
    else:
        torch.testing.assert_close(moments.covariance, second, atol=0.0, rtol=1e-9)
        cross = target.T @ exact / N
    torch.testing.assert_close(moments.uncentred, second, atol=0.0, rtol=1e-9)
    torch.testing.assert_close(moments.residual_covariance, cross, atol=1e-5, rtol=1e-5)


def test_channel_far_from_the_others_keeps_its_variance() -> None:
    x, _ = data()
    x[:, 3] = x[:, 3] * 1e-2 + 300.0
    exact = x.double()
    assert collect(x).covariance[3, 3].item() == pytest.approx(exact[:, 3].var(correction=0).item(), rel=1e-4)


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("centred", [True, False])
def test_groups_are_the_diagonal_blocks(groups: int, centred: bool) -> None:
    x, _ = data(offset=3.0)
    grouped, full = collect(x, groups=groups, centred=centred), collect(x, centred=centred)
    w = M // groups
    assert grouped.covariance.shape == grouped.uncentred.shape == (groups, w, w)
    for i in range(groups):
        block = slice(i * w, (i + 1) * w)
        torch.testing.assert_close(grouped.covariance[i], full.covariance[block, block], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(grouped.uncentred[i], full.uncentred[block, block], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grouped.mean, full.mean)


def test_covariance_is_exactly_symmetric() -> None:
    covariance = collect(data(offset=50.0)[0]).covariance
    assert torch.equal(covariance, covariance.mT)


def test_half_precision_input_is_summed_in_full() -> None:
    x = data()[0].half()
    moments = collect(x, batches=(N,))
    exact = x.double()
    torch.testing.assert_close(moments.mean, exact.mean(0), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(moments.covariance, exact.T.cov(correction=0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("centred", [True, False])
def test_merge_of_unequal_parts_is_one_pass(centred: bool) -> None:
    x, r = data(offset=20.0)
    whole = collect(x, r, centred=centred)
    part = Moments.like(x[:64], r[:64], centred=centred)
    other = part.empty()
    part.add(x[:64], r[:64])
    part.add(x[64:71], r[64:71])
    other.add(x[71:], r[71:])
    both = part.merge(other)
    assert (part.tokens, other.tokens, both.tokens) == (71, N - 71, N)
    assert both.centred == centred
    for name in ("mean", "covariance", "uncentred", "residual_covariance", "mean_residual"):
        torch.testing.assert_close(getattr(both, name), getattr(whole, name), atol=1e-12, rtol=1e-12)
    assert both.residual_variance == pytest.approx(whole.residual_variance, rel=1e-12)
    # The parts are as they were.
    torch.testing.assert_close(part.mean, x[:71].double().mean(0), atol=1e-5, rtol=1e-6)


def test_merge_with_empty_changes_nothing_and_needs_the_same_shift() -> None:
    x, r = data()
    moments = collect(x, r)
    empty = moments.empty()
    assert empty.tokens == 0
    assert empty.power == 0.0
    same = moments.merge(empty)
    assert torch.equal(same.second, moments.second)
    assert same.cross is not None
    assert torch.equal(same.cross, moments.cross)
    assert moments.tokens == N
    with pytest.raises(ValueError, match="shift"):
        moments.merge(collect(x + 1.0, r))


def test_empty_keeps_shape_shift_and_centring_but_shares_no_sums() -> None:
    x, _ = data()
    moments = collect(x, groups=3, centred=False)
    second = moments.second.clone()
    empty = moments.empty()
    assert torch.equal(empty.shift, moments.shift)
    assert not empty.centred
    assert empty.cross is None
    assert empty.residual is None
    empty.add(x)
    assert torch.equal(moments.second, second)
    torch.testing.assert_close(empty.second, second, atol=1e-3, rtol=1e-5)


def test_without_residual() -> None:
    moments = collect(data()[0])
    assert moments.residual_covariance is None
    assert moments.mean_residual is None
    assert moments.residual_variance == 0.0


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan"), 1e30])
def test_one_bad_activation_is_seen(bad: float) -> None:
    x, r = data()
    assert collect(x, r).finite
    for row in (3, 200):  # in the first batch it reaches the shift, later only the sums
        broken = x.clone()
        broken[row, 4] = bad
        assert not collect(broken, r).finite


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_one_bad_residual_is_seen(bad: float) -> None:
    x, r = data()
    r[200, 1] = bad
    assert not collect(x, r).finite


def test_input_is_not_modified() -> None:
    x, r = data()
    before_x, before_r = x.clone(), r.clone()
    collect(x, r)
    assert torch.equal(x, before_x)
    assert torch.equal(r, before_r)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("columns", [4, 4096])
def test_strips_and_wide_sites(monkeypatch: pytest.MonkeyPatch, centred: bool, columns: int) -> None:
    """Products strip by strip, in float64 and in the float32 of wide sites, against all at once."""
    monkeypatch.setattr("llm_snp.core.linalg.STRIP_ROWS", 5)
    monkeypatch.setattr("llm_snp.core.linalg.FLOAT64_COLUMNS", columns)
    x, r = data(offset=3.0)
    moments = collect(x, r, centred=centred)
    assert moments.covariance.dtype == (torch.float32 if columns < M else torch.float64)
    exact = x.double() - (x.double().mean(0) if centred else 0.0)
    target = r.double() - (r.double().mean(0) if centred else 0.0)
    torch.testing.assert_close(moments.covariance.double(), exact.T @ exact / N, atol=1e-5, rtol=1e-5)
    assert moments.residual_covariance is not None
    torch.testing.assert_close(moments.residual_covariance.double(), target.T @ exact / N, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
def test_tokens_may_follow_after_the_covariance_was_asked_for(centred: bool, groups: int) -> None:
    x, r = data(offset=3.0)
    asked = Moments.like(x[:64], r[:64], groups, centred)
    for rows in (slice(0, 64), slice(64, 71), slice(71, N)):
        asked.add(x[rows], r[rows])
        assert torch.isfinite(asked.covariance).all()
    whole = collect(x, r, groups, centred)
    torch.testing.assert_close(asked.covariance, whole.covariance, atol=1e-10, rtol=1e-10)
    merged = asked.merge(asked.empty())
    torch.testing.assert_close(merged.covariance, whole.covariance, atol=1e-10, rtol=1e-10)
    assert asked.covariance.data_ptr() == asked.second.data_ptr()


def test_reduce_sums_what_other_processes_have() -> None:
    """Three processes with the same tokens: twice more of every sum."""
    x, r = data()
    moments, once = collect(x, r), collect(x, r)
    assert torch.isfinite(moments.covariance).all()
    moments.reduce(lambda tensor: tensor.mul_(3))  # type: ignore[arg-type, return-value]
    assert moments.tokens == 3 * N
    torch.testing.assert_close(moments.covariance, once.covariance)
    torch.testing.assert_close(moments.mean, once.mean)
    torch.testing.assert_close(moments.residual_covariance, once.residual_covariance)
    assert moments.residual_variance == pytest.approx(once.residual_variance)


def cut_off(exact: Tensor) -> Tensor:
    """float64 to float32 towards zero, as matrix units round their sums."""
    nearest = exact.float()
    further = nearest.double().abs() > exact.abs()
    return torch.where(further, torch.nextafter(nearest, torch.zeros_like(nearest)), nearest)


def by_matrix_units(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ right as matrix units give it: 16 exact products at a time are added to a float32 sum, which is cut off."""
    assert left.dtype == right.dtype
    assert left.dtype in moments_module.HALF
    assert len(left) <= moments_module.PIECE_TOKENS
    total = torch.zeros(left.shape[1], right.shape[1])
    for start in range(0, len(left), 16):
        rows = slice(start, start + 16)
        total = cut_off(total.double() + left[rows].double().mT @ right[rows].double())
    return total


@pytest.fixture
def matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that has them."""
    monkeypatch.setattr(moments_module, "_by_matrix_units", lambda x: x.dtype in moments_module.HALF)
    monkeypatch.setattr(moments_module, "_product", by_matrix_units)


TOKENS, CHANNELS, OUTPUTS = 6144, 24, 6


def far_from_zero(dtype: torch.dtype, ratio: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Correlated 16-bit x (n, m), means of both signs and `ratio` times their spread, and a residual r (n, d) fp32.

    The spread of the channels falls to a thousandth; r depends on x, is as far from zero, and its spread falls, too.
    """
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, CHANNELS, generator=g) @ torch.randn(CHANNELS, CHANNELS, generator=g) / CHANNELS**0.5
    x = x / x.std(0)
    r = x @ torch.randn(CHANNELS, OUTPUTS, generator=g) / CHANNELS**0.5 + torch.randn(TOKENS, OUTPUTS, generator=g)
    side = torch.where(torch.arange(CHANNELS) % 2 == 0, 1.0, -1.0)
    x = ((x + ratio * side) * torch.logspace(0, -3, CHANNELS)).to(dtype)
    return x, (r + ratio) * torch.logspace(0, -6, OUTPUTS)


@pytest.mark.usefixtures("matrix_units")
@pytest.mark.parametrize("ratio", [0.0, 1.0, 10.0, 100.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("centred", [True, False])
def test_matrix_units_give_the_moments(centred: bool, dtype: torch.dtype, ratio: float) -> None:
    """However far from zero: errors next to the spread, or to the root mean square, and no eigenvalue is lost."""
    x, r = far_from_zero(dtype, ratio)
    moments = collect(x, r, centred=centred, batches=(512, 4608, 1024))
    x, r = x.double(), r.double()
    expected = torch.linalg.eigvalsh(x.mT.corrcoef())[0].item()
    spread = x.std(0, correction=0)
    mean_error = (moments.mean - x.mean(0)) / spread
    assert moments.mean_residual is not None
    torch.testing.assert_close(moments.mean_residual, r.mean(0), rtol=1e-6, atol=0.0)
    if centred:
        x, r = x - x.mean(0), r - r.mean(0)
        inside = moments.covariance
    else:
        inside = moments.covariance - torch.outer(moments.mean, moments.mean)
    size, of_r = x.square().mean(0).sqrt(), r.square().mean(0).sqrt()
    assert moments.residual_covariance is not None
    error = (moments.covariance - x.mT @ x / TOKENS) / torch.outer(size, size)
    of_cross = (moments.residual_covariance - r.mT @ x / TOKENS) / torch.outer(of_r, size)
    eps = torch.finfo(dtype).eps
    assert error.abs().max() < eps / 32
    assert mean_error.abs().max() < eps / 64
    # In bfloat16, 1000 spreads from zero, a channel is constant but for a few tokens: of these r is rounded.
    assert of_cross.abs().max() < (eps if ratio == 1000.0 else eps / 32)
    assert torch.linalg.eigvalsh(inside / torch.outer(spread, spread))[0].item() > 0.5 * expected > 0.0
    assert moments.residual_variance == pytest.approx(r.square().sum().item() / TOKENS, rel=1e-6)


@pytest.mark.usefixtures("matrix_units")
def test_unshifted_products_would_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the emulation shows of the products that were: it is not too kind."""
    monkeypatch.setattr(moments_module, "_short_mean", lambda x: torch.zeros(x.shape[1]))
    x, r = far_from_zero(torch.float16, 100.0)
    covariance = collect(x, r, batches=(512, 4608, 1024)).covariance
    spread = x.double().std(0, correction=0)
    assert torch.linalg.eigvalsh(covariance / torch.outer(spread, spread))[0] < -0.01


@pytest.mark.usefixtures("matrix_units")
@pytest.mark.parametrize("columns", [8, 4096])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_matrix_units_strip_by_strip(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, columns: int) -> None:
    """In the float32 of wide sites as well."""
    x, r = far_from_zero(dtype, 10.0)
    whole = collect(x, r, batches=(512, 4608, 1024))
    monkeypatch.setattr("llm_snp.core.linalg.STRIP_ROWS", 5)
    monkeypatch.setattr("llm_snp.core.linalg.FLOAT64_COLUMNS", columns)
    parts = collect(x, r, batches=(512, 4608, 1024))
    size, of_r = whole.covariance.diagonal().sqrt(), whole.residual
    assert of_r is not None
    error = (parts.covariance - whole.covariance) / torch.outer(size, size)
    assert error.abs().max() < 1e-6
    assert parts.residual_covariance is not None
    assert whole.residual_covariance is not None
    error = (parts.residual_covariance - whole.residual_covariance) / torch.outer(of_r / TOKENS, size)
    assert error.abs().max() < 1e-6


@pytest.mark.usefixtures("matrix_units")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_groups_are_multiplied_in_full_where_there_are_matrix_units(dtype: torch.dtype) -> None:
    x, _ = far_from_zero(dtype, 100.0)
    grouped = collect(x, groups=3, batches=(512, 4608, 1024))
    exact = x.double()
    exact = exact - exact.mean(0)
    for i, block in enumerate(exact.view(TOKENS, 3, -1).unbind(1)):
        spread = block.square().mean(0).sqrt()
        error = (grouped.covariance[i] - block.mT @ block / TOKENS) / torch.outer(spread, spread)
        assert error.abs().max() < 1e-4


@pytest.mark.usefixtures("matrix_units")
def test_range_of_float16() -> None:
    """Neither the distance of two numbers from each other nor a tiny residual is beyond it."""
    x, r = data()
    x = (3e4 + 1e4 * x / x.std(0)).clamp(-6.5e4, 6.5e4).half()
    x[::50, 0] = -6.5e4  # from a mean of +27000
    r = r * torch.logspace(-12, 6, D)
    moments = collect(x, r)
    assert moments.finite
    exact, target = x.double() - x.double().mean(0), r.double() - r.double().mean(0)
    spread, size = exact.square().mean(0).sqrt(), target.square().mean(0).sqrt()
    error = (moments.covariance - exact.mT @ exact / N) / torch.outer(spread, spread)
    assert error.abs().max() < 1e-3
    assert moments.residual_covariance is not None
    error = (moments.residual_covariance - target.mT @ exact / N) / torch.outer(size, spread)
    assert error.abs().max() < 1e-3


@pytest.mark.usefixtures("matrix_units")
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_matrix_units_let_nothing_bad_through(bad: float) -> None:
    x, r = data()
    for row in (3, 200):
        broken, error = x.half(), r.clone()
        broken[row, 4] = error[row, 1] = bad
        assert not collect(broken).finite
        assert not collect(x.half(), error).finite


def test_a_constant_channel_has_no_variance() -> None:
    x = data()[0].half()
    x[:, 2] = 17.3
    short = moments_module._short_mean(x)
    assert short[2] == x[0, 2]
    assert torch.equal(short, short.half().float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_torch_without_fp32_sums_of_16_bit_products(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """torch 2.6 has no `out_dtype`, and the CPU refuses it: float32 products then."""
    few = torch.zeros(4, 4, dtype=dtype)
    moments_module._gives_sums.cache_clear()
    assert not moments_module._gives_sums(few.device, dtype)
    monkeypatch.setattr(moments_module, "_product", by_matrix_units)
    moments_module._gives_sums.cache_clear()
    assert moments_module._gives_sums(few.device, dtype) == ("dtype" in torch.ops.aten.mm.overloads())
    monkeypatch.setattr(torch.ops.aten.mm, "overloads", lambda: ["default", "out"])
    moments_module._gives_sums.cache_clear()
    assert not moments_module._gives_sums(few.device, dtype)
    moments_module._gives_sums.cache_clear()
