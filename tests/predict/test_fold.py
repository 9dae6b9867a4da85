from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from detfamily.backbones.resnet import ResNet
from detfamily.backbones.small import SmallBackbone
from detfamily.backbones.timm import TimmBackbone
from detfamily.predict.fold import count_batch_norms, fold_batch_norms, folded_conv


def lived(module: nn.Module) -> nn.Module:
    """Norms as after a training: each with statistics of its own."""
    torch.manual_seed(0)
    for one in module.modules():
        if getattr(one, "running_var", None) is not None:
            for name, low, high in (
                *(("running_mean", -0.5, 0.5), ("running_var", 0.5, 2.0)),
                *(("weight", 0.5, 1.5), ("bias", -0.5, 0.5)),
            ):
                if getattr(one, name) is not None:
                    getattr(one, name).data.uniform_(low, high)
    return module.eval()


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(6), nn.BatchNorm2d(6, affine=False), FrozenBatchNorm2d(6)])
@pytest.mark.parametrize(
    "conv", [nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3, 2, 1, 2, groups=2, bias=False, padding_mode="reflect")]
)
def test_one_convolution_gives_what_two_modules_gave(conv: nn.Conv2d, norm: nn.Module) -> None:
    conv, norm = conv.double(), lived(norm).double()
    x = torch.randn(2, 4, 9, 11, dtype=torch.float64)
    one = folded_conv(conv, norm)
    torch.testing.assert_close(one(x), norm(conv(x)), rtol=1e-12, atol=1e-12)
    assert one.bias is not None and one is not conv


def resnet(norm: Callable[[int], nn.Module] = FrozenBatchNorm2d, name: str = "resnet18") -> nn.Module:
    return ResNet(name, stages=[2, 3, 4, 5], norm=norm, frozen_stages=2, weights=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("backbone", "norms"),
    [
        (lambda: SmallBackbone(8, [8, 16, 16], [2, 3, 4]), 10),
        (resnet, 20),
        (lambda: resnet(nn.BatchNorm2d), 20),
        (lambda: resnet(name="resnet50"), 53),
        (lambda: TimmBackbone("resnet18", [3, 4, 5], pretrained=False), 20),
        (lambda: TimmBackbone("mobilenetv3_small_050", [3, 4, 5], pretrained=False), 34),
    ],
)
def test_backbones_answer_as_before_without_their_norms(backbone: Callable[[], nn.Module], norms: int) -> None:
    before = lived(backbone())
    assert count_batch_norms(before) == norms
    after, folded = fold_batch_norms(before)
    assert (folded, count_batch_norms(after), count_batch_norms(before)) == (norms, 0, norms)
    pixels = torch.randn(2, 3, 96, 70)
    with torch.no_grad():
        exact = [one.double() for one in before.double()(pixels.double())]
        for given, wanted in zip(after(pixels), exact, strict=True):
            assert (given - wanted).norm() < 1e-5 * wanted.norm()


class Lying(nn.Module):
    """Two convolutions that share no norm in the way that their order suggests."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.first(x) + self.norm(self.second(x))]


class OfOneSize(nn.Sequential):
    def forward(self, x: Tensor) -> list[Tensor]:
        assert x.shape[-1] == 224
        return [super().forward(x)]


def test_what_would_change_the_answer_is_left_alone() -> None:
    for backbone in (lived(Lying()), lived(OfOneSize(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))):
        after, folded = fold_batch_norms(backbone)
        assert after is backbone and folded == 0 and count_batch_norms(after) == 1


def test_a_convolution_that_is_used_twice_is_left_alone() -> None:
    conv = nn.Conv2d(3, 3, 1)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Sequential(conv, nn.BatchNorm2d(3))
            self.b = nn.Sequential(conv, nn.BatchNorm2d(3))

        def forward(self, x: Tensor) -> list[Tensor]:
            return [self.b(self.a(x))]

    backbone = lived(Twice())
    assert fold_batch_norms(backbone) == (backbone, 0)
