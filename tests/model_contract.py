"""What every model owes its caller, on a grid or on a graph."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

BATCH = 3


def n_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def tapped(model: nn.Module, *inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The forecast and each tap's activation, caught by a forward hook."""
    caught: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(path).register_forward_hook(
            lambda _module, _inputs, output, name=name: caught.update({name: output})
        )
        for name, path in model.taps.items()
    ]
    forecast = model(*inputs)
    for handle in handles:
        handle.remove()
    return forecast, caught


def double(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(part.double() if part.is_floating_point() else part for part in inputs)


class ModelContract:
    """An implementation gives `make`, `sizes` and `inputs` of `BATCH` samples, ``x`` first."""

    sizes: dict[str, int]
    may_be_zero: tuple[str, ...] = ()

    @pytest.fixture
    def make(self) -> Callable[..., nn.Module]:
        """Build a small model with other options."""
        raise NotImplementedError

    def inputs(self, seed: int = 0) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def test_seed_decides_the_model(self, make):
        forecasts = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            forecasts.append(make()(*self.inputs()))
        assert torch.equal(forecasts[0], forecasts[1])
        assert not torch.equal(forecasts[0], forecasts[2])

    def test_samples_are_independent(self, make):
        model, inputs = make().double(), double(self.inputs())
        whole = model(*inputs)
        for i in range(BATCH):
            alone = [part[i, None] if len(part) == BATCH else part for part in inputs]
            torch.testing.assert_close(model(*alone)[0], whole[i], rtol=1e-9, atol=1e-11)

    def test_without_dropout_eval_forecasts_as_train_does(self, make):
        model = make()
        assert torch.equal(model.train()(*self.inputs()), model.eval()(*self.inputs()))

    def test_every_parameter_is_trained(self, make):
        model = make().double()
        model(*double(self.inputs())).square().mean().backward()
        for name, p in model.named_parameters():
            assert p.grad is not None, name
            assert bool(torch.isfinite(p.grad).all()), name
            assert p.grad.abs().max() > 1e-12, name

    def test_gradient_in_the_input_is_exact(self, make):
        model, (x, *rest) = make().double(), double(self.inputs())
        direction = double(self.inputs(seed=1))[0]
        x.requires_grad_()
        model(x, *rest).square().sum().backward()
        with torch.no_grad():
            step = 1e-5
            up = model(x + step * direction, *rest).square().sum()
            down = model(x - step * direction, *rest).square().sum()
        expected = (up - down) / (2 * step)
        torch.testing.assert_close((x.grad * direction).sum(), expected, rtol=1e-6, atol=1e-7)

    def test_keeps_float64(self, make):
        model = make()
        single = model(*self.inputs())
        exact = model.double()(*double(self.inputs()))
        assert exact.dtype == torch.float64
        torch.testing.assert_close(single.double(), exact, rtol=1e-3, atol=1e-4)

    def test_autocast_stays_near_float32(self, make):
        model = make()
        exact = model(*self.inputs())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = model(*self.inputs())
            loss = rough.float().square().mean()
        loss.backward()
        assert (rough.float() - exact).norm() / exact.norm() < 0.05
        assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())

    def test_state_dict_carries_the_model(self, make):
        torch.manual_seed(0)
        source = make()
        torch.manual_seed(1)
        target = make()
        target.load_state_dict(source.state_dict())
        assert torch.equal(source(*self.inputs()), target(*self.inputs()))

    def test_inputs_are_left_alone(self, make):
        given = self.inputs()
        make()(*given)
        assert all(torch.equal(a, b) for a, b in zip(given, self.inputs(), strict=True))

    @pytest.mark.usefixtures("as_shipped")
    def test_sizes_are_integers_of_any_library(self, make):
        forecasts = []
        for kind in (int, np.int64):
            torch.manual_seed(0)
            model = make(**{name: kind(n) for name, n in self.sizes.items()})
            forecasts.append(model(*self.inputs()))
        assert torch.equal(*forecasts)

    @pytest.mark.usefixtures("as_shipped")
    @pytest.mark.parametrize("value", [0, -1, 2.5, True, np.float64(2), list(range(10**5))])
    def test_refuses_other_sizes(self, make, value: Any):
        for argument in set(self.sizes) - (set(self.may_be_zero) if value == 0 else set()):
            message = rf"^`{argument}` is .{{1,40}}, expected an integer of at least [01]\.$"
            with pytest.raises(ValueError, match=message):
                make(**{argument: value})
