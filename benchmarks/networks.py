"""Networks that were not written for this project, by name: what `any_model.py` tries.

Each entry makes (model, example arguments, example keyword arguments) with random weights. Packages
of their own (torchvision, timm, transformers) are imported only where an entry asks for them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers_networks import TRANSFORMERS
from vision_networks import VISION

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]

TORCHVISION = {
    "alexnet": 224,
    "convnext_tiny": 64,
    "densenet121": 64,
    "efficientnet_b0": 64,
    "efficientnet_v2_s": 64,
    "googlenet": 64,
    "inception_v3": 299,
    "maxvit_t": 224,
    "mnasnet0_5": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "regnet_x_400mf": 64,
    "regnet_y_400mf": 64,
    "resnet18": 64,
    "resnet50": 64,
    "resnext50_32x4d": 64,
    "shufflenet_v2_x0_5": 64,
    "squeezenet1_1": 64,
    "swin_t": 64,
    "swin_v2_t": 64,
    "vgg11": 64,
    "vgg11_bn": 64,
    "vit_b_16": 224,
    "wide_resnet50_2": 64,
}

TIMM = {
    "convnextv2_atto": 64,
    "fasternet_t0": 64,
    "hgnetv2_b0": 64,
    "mobilevitv2_050": 64,
    "repvit_m0_9": 64,
    "starnet_s1": 64,
    "cait_xxs24_224": 224,
    "coat_lite_tiny": 224,
    "convmixer_768_32": 64,
    "convnext_atto": 64,
    "cspresnet50": 64,
    "davit_tiny": 224,
    "deit_tiny_patch16_224": 224,
    "densenet121": 64,
    "dla34": 64,
    "edgenext_xx_small": 64,
    "efficientformer_l1": 224,
    "efficientnet_b0": 64,
    "ese_vovnet19b_slim": 64,
    "eva02_tiny_patch14_224": 224,
    "fastvit_t8": 64,
    "focalnet_tiny_srf": 224,
    "ghostnet_050": 64,
    "hrnet_w18_small": 64,
    "inception_next_tiny": 64,
    "lcnet_050": 64,
    "levit_128s": 224,
    "mixer_s32_224": 224,
    "mobilenetv3_small_100": 64,
    "mobilenetv4_conv_small": 64,
    "mobileone_s0": 64,
    "mobilevit_xxs": 64,
    "mvitv2_tiny": 224,
    "nf_regnet_b0": 64,
    "poolformer_s12": 64,
    "pvt_v2_b0": 64,
    "regnety_002": 64,
    "repvgg_a0": 64,
    "resmlp_12_224": 224,
    "resnest14d": 64,
    "rexnet_100": 64,
    "swin_tiny_patch4_window7_224": 224,
    "tiny_vit_5m_224": 224,
    "twins_svt_small": 224,
    "vit_tiny_patch16_224": 224,
    "vit_tiny_r_s16_p8_224": 224,
    "xcit_nano_12_p16_224": 224,
}


def _images(size: int) -> tuple[Tensor]:
    return (torch.randn(2, 3, size, size),)


def _torchvision(name: str, size: int) -> Built:
    import torchvision

    options = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(torchvision.models, name)(num_classes=100, **options)
    return model, _images(size), {}


def _timm(name: str, size: int) -> Built:
    import timm

    return timm.create_model(name, num_classes=100), _images(size), {}


def _tokens(length: int = 16, vocabulary: int = 100) -> Tensor:
    return torch.randint(0, vocabulary, (2, length))


def _bert() -> Built:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=100,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        num_labels=5,
    )
    mask = torch.ones(2, 16, dtype=torch.int64)
    return (
        BertForSequenceClassification(config),
        (),
        {"input_ids": _tokens(), "attention_mask": mask},
    )


def _distilbert() -> Built:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(
        vocab_size=100, dim=64, n_layers=2, n_heads=4, hidden_dim=128, num_labels=5
    )
    mask = torch.ones(2, 16, dtype=torch.int64)
    return (
        DistilBertForSequenceClassification(config),
        (),
        {"input_ids": _tokens(), "attention_mask": mask},
    )


def _hf_vit() -> Built:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=64,
        patch_size=16,
        num_labels=10,
    )
    return ViTForImageClassification(config), (), {"pixel_values": _images(64)[0]}


def _decoder() -> Built:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    return LlamaForCausalLM(config), (), {"input_ids": _tokens()}


class UNet(nn.Module):
    """Two levels, skip connections by concatenation, transposed convolutions on the way up."""

    def __init__(self) -> None:
        super().__init__()

        def block(i: int, o: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(inplace=True)
            )

        self.down1, self.down2, self.middle = block(3, 16), block(16, 32), block(32, 64)
        self.up2 = nn.ConvTranspose2d(64, 32, 2, stride=2)
        self.up1 = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.side2, self.side1 = block(64, 32), block(32, 16)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        deep = self.middle(F.max_pool2d(two, 2))
        two = self.side2(torch.cat([self.up2(deep), two], dim=1))
        one = self.side1(torch.cat([self.up1(two), one], dim=1))
        return self.head(one)


class PyramidBackbone(nn.Module):
    """A detector's backbone with a feature pyramid: three outputs, in a dict."""

    def __init__(self) -> None:
        super().__init__()
        widths = (16, 32, 64)
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU())
            for i, o in zip((16, *widths), widths, strict=False)
        )
        self.lateral = nn.ModuleList(nn.Conv2d(w, 24, 1) for w in widths)
        self.smooth = nn.ModuleList(nn.Conv2d(24, 24, 3, padding=1) for _ in widths)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        maps = [lateral(f) for lateral, f in zip(self.lateral, features, strict=True)]
        for level in (1, 0):
            up = F.interpolate(maps[level + 1], scale_factor=2.0, mode="nearest")
            maps[level] = maps[level] + up
        return {
            f"p{i}": smooth(m) for i, (smooth, m) in enumerate(zip(self.smooth, maps, strict=True))
        }


class KeywordSpotting(nn.Module):
    """Conv1d on 40 mel bands, 12 words."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Sequential(nn.Conv1d(40, 64, 5, 2, 2), nn.BatchNorm1d(64), nn.ReLU())
        self.depthwise = nn.Conv1d(64, 64, 9, padding=8, dilation=2, groups=64, bias=False)
        self.norm = nn.BatchNorm1d(64)
        self.pointwise = nn.Conv1d(64, 64, 1)
        self.head = nn.Linear(64, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.front(x)
        x = x + F.relu(self.pointwise(self.norm(self.depthwise(x))))
        return self.head(x.mean(dim=-1))


class _Gate(nn.Module):
    """Skips its layer where the input is small: depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if x.abs().mean() > 0.01:
            return F.relu(self.layer(x))
        return x


class DataDependent(nn.Module):
    """A network with data-dependent control flow in one submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.gate = _Gate()
        self.head = nn.Sequential(
            nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.classify = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.head(self.gate(F.relu(self.stem(x)))))


class Speech(nn.Module):
    """A convolution and a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Conv1d(40, 32, 5, padding=2)
        self.recurrent = nn.GRU(32, 32, batch_first=True, bidirectional=True)
        self.head = nn.Linear(64, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.front(x)).transpose(1, 2)
        x, _ = self.recurrent(x)
        return self.head(x[:, -1])


class Encoder(nn.Module):
    """torch's own transformer encoder."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation="gelu")
        self.body = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(1))


NETWORKS: dict[str, Callable[[], Built]] = {
    **{f"torchvision/{n}": (lambda n=n, s=s: _torchvision(n, s)) for n, s in TORCHVISION.items()},
    **{f"timm/{n}": (lambda n=n, s=s: _timm(n, s)) for n, s in TIMM.items()},
    "transformers/bert": _bert,
    "transformers/distilbert": _distilbert,
    "transformers/vit": _hf_vit,
    "transformers/llama": _decoder,
    **TRANSFORMERS,
    **VISION,
    "own/unet": lambda: (UNet(), _images(32), {}),
    "own/pyramid": lambda: (PyramidBackbone(), _images(64), {}),
    "own/keyword_spotting": lambda: (KeywordSpotting(), (torch.randn(2, 40, 50),), {}),
    "own/data_dependent": lambda: (DataDependent(), _images(32), {}),
    "own/gru": lambda: (Speech(), (torch.randn(2, 40, 50),), {}),
    "own/transformer_encoder": lambda: (Encoder(), (torch.randn(2, 12, 32),), {}),
}
