"""Small architectures of torchvision, timm and transformers, with inputs.

Fresh models are changed so that comparisons are informative.

Smallest sensible variants; transformers by small configurations. Nothing is downloaded: weights are
random.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from impatient import load_model
from impatient.inputs import call_model

CLASSES = 10
VOCABULARY = 99
Batch = Callable[[int], Any]
BatchNorm = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model by its spec, inputs of a given batch size, and what its outputs mean."""

    spec: str
    batch: Batch
    task: str = "classification"

    @property
    def library(self) -> str:
        return self.spec.split(":")[0]

    @property
    def name(self) -> str:
        return self.spec.split(":")[1]


def build(architecture: Architecture) -> nn.Module:
    """Build an informative model in eval mode, with random weights of a fixed seed."""
    torch.manual_seed(0)
    model = load_model(architecture.spec, num_classes=CLASSES)
    make_informative(model, architecture.batch)
    return model.eval()


# --- inputs ---------------------------------------------------------------------------------------


def images(size: int, channels: int = 3) -> Batch:
    return lambda batch: torch.randn(batch, channels, size, size)


def video(frames: int, size: int, *, channels_first: bool = True) -> Batch:
    shape = (3, frames) if channels_first else (frames, 3)
    return lambda batch: torch.randn(batch, *shape, size, size)


def named_images(size: int) -> Batch:
    return lambda batch: {"pixel_values": torch.randn(batch, 3, size, size)}


def sound(samples: int) -> Batch:
    return lambda batch: {"input_values": torch.randn(batch, samples)}


def text(batch: int) -> dict[str, Tensor]:
    """Make padded token ids.

    Every text ends once, with the highest id of the vocabulary, where T5 and BART classify.
    """
    tokens = torch.randint(3, VOCABULARY - 1, (batch, 12))
    tokens[:, 8] = VOCABULARY - 1
    mask = torch.ones(batch, 12, dtype=torch.long)
    mask[0, 9:] = 0
    return {"input_ids": tokens.masked_fill(mask == 0, 0), "attention_mask": mask}


# --- weights --------------------------------------------------------------------------------------


def make_informative(model: nn.Module, batch: Batch) -> None:
    """Change fresh models so that their outputs depend on the input.

    They have zero heads, tiny layer scales, and batch-norm statistics that fit no data.
    """
    for layer in model.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            _enliven(layer, name, parameter.data)
    norms = [layer for layer in model.modules() if isinstance(layer, BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    if not norms:
        return
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        call_model(model.train(), batch(8))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _enliven(layer: nn.Module, name: str, values: Tensor) -> None:
    largest = values.abs().max().item() if values.numel() else 1.0
    if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) and values.dim() > 1:
        inputs = values[0].numel()
        # zero, or too small for anything to come through
        if largest == 0.0 or values.std() < 0.3 / inputs**0.5:
            nn.init.kaiming_uniform_(values, a=5**0.5)
    elif isinstance(layer, BatchNorm) and name == "weight" and largest < 0.11:
        nn.init.uniform_(values, 0.5, 1.5)
    elif largest < 0.11 and bool((values == values.flatten()[0]).all()):
        # a constant: a layer scale, a gain, a bias
        nn.init.normal_(
            values, std=0.02
        ) if largest == 0.0 and values.numel() > 1 else nn.init.uniform_(values, 0.2, 0.6)


# --- the list -------------------------------------------------------------------------------------


# four layers of width 32
_WIDTH_32 = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def _listed(
    library: str, batch: Batch, *names: str, task: str = "classification"
) -> list[Architecture]:
    return [Architecture(f"{library}:{name}", batch, task) for name in names]


def _config(name: str, batch: Batch, **options: Any) -> Architecture:
    """Configure a model of transformers. Options of None are left out."""
    given = {key: value for key, value in options.items() if value is not None}
    listed = ",".join(f"{key}={value}".replace(" ", "") for key, value in given.items())
    return Architecture(f"transformers:{name}Config:{listed}", batch)


def _text(name: str, **options: Any) -> Architecture:
    """Configure a text encoder of four layers of width 32."""
    usual = {"vocab_size": VOCABULARY, **_WIDTH_32, "pad_token_id": 0}
    return _config(name, text, **{**usual, **options})


def _vision(name: str) -> Architecture:
    """Configure a vision transformer of four layers of width 32."""
    return _config(name, named_images(32), image_size=32, patch_size=8, **_WIDTH_32)


def _pictures(name: str, size: int = 64, **options: Any) -> Architecture:
    return _config(name, named_images(size), **options)


def _sound(name: str) -> Architecture:
    options = {
        **_WIDTH_32,
        "conv_dim": [32, 32, 32],
        "conv_stride": [5, 4, 4],
        "conv_kernel": [10, 4, 4],
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 2,
        "num_feat_extract_layers": 3,
    }
    return _config(name, sound(2400), **options)


# of models that call their width by other names
_NO_WIDTH = dict.fromkeys(_WIDTH_32)
_SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [1, 2, 2],
    "num_heads": [1, 2, 2],
    "window_size": 4,
}
_PYRAMID = {"depths": [1, 2, 2, 1], "hidden_sizes": [8, 16, 24, 32]}
_BART = {
    **_NO_WIDTH,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "eos_token_id": VOCABULARY - 1,
}

ARCHITECTURES: tuple[Architecture, ...] = (
    *_listed(
        "torchvision",
        images(64),
        "alexnet",
        "vgg11",
        "vgg11_bn",
        "resnet18",
        "resnet50",
        "resnext50_32x4d",
        "wide_resnet50_2",
        "densenet121",
        "googlenet",
        "googlenet:aux_logits=True",
        "mobilenet_v2",
        "mobilenet_v3_small",
        "efficientnet_b0",
        "efficientnet_v2_s",
        "regnet_x_400mf",
        "regnet_y_400mf",
        "shufflenet_v2_x0_5",
        "squeezenet1_1",
        "mnasnet0_5",
        "convnext_tiny",
        "vit_b_32:image_size=64",
        "swin_t",
        "swin_v2_t",
    ),
    *_listed(
        "torchvision",
        images(64),
        "lraspp_mobilenet_v3_large:weights_backbone=None",
        task="segmentation",
    ),
    *_listed("torchvision", images(96), "inception_v3"),
    *_listed("torchvision", images(224), "maxvit_t"),
    *_listed("torchvision", video(8, 32), "r3d_18", "r2plus1d_18"),
    *_listed("torchvision", video(8, 64), "swin3d_t"),
    *_listed(
        "timm",
        images(64),
        "resnet26d",
        "resnetv2_50",
        "seresnet18",
        "skresnet18",
        "resnest14d",
        "res2net50_14w_8s",
        "convnextv2_atto",
        "efficientnet_lite0",
        "mobilenetv4_conv_small",
        "mobileone_s0",
        "ghostnet_050",
        "hrnet_w18_small",
        "dla34",
        "dm_nfnet_f0",
        "eca_nfnet_l0",
        "nf_regnet_b1",
        "repvgg_a0",
        "tresnet_m",
        "hgnetv2_b0",
        "selecsls42b",
        "ese_vovnet19b_slim",
        "rexnet_100",
        "repvit_m0_9",
        "fastvit_t8",
        "poolformer_s12",
        "edgenext_xx_small",
        "mobilevit_xxs",
        "mobilevitv2_050",
        "cspresnet50",
        "dpn48b",
        "fbnetc_100",
        "lcnet_050",
        "inception_next_atto",
        "caformer_s18",
        "starnet_s050",
        "swiftformer_xs",
        "shvit_s1",
        "mambaout_femto",
        "pvt_v2_b0",
        "efficientvit_b0",
        "davit_tiny",
        "focalnet_tiny_srf",
        "xception41",
        "convmixer_768_32",
        "vit_tiny_patch16_224:img_size=64",
        "deit_tiny_patch16_224:img_size=64",
        "deit_tiny_distilled_patch16_224:img_size=64",
        "deit3_small_patch16_224:img_size=64,depth=6",
        "beit_base_patch16_224:img_size=64,embed_dim=96,depth=6,num_heads=4",
        "swin_tiny_patch4_window7_224:img_size=64,window_size=4",
        "swinv2_tiny_window8_256:img_size=64,window_size=4",
        "cait_xxs24_224:img_size=64",
        "xcit_nano_12_p16_224",
        "mixer_s32_224:img_size=64",
        "resmlp_12_224:img_size=64",
        "gmlp_ti16_224:img_size=64",
        "convit_tiny:img_size=64",
        "twins_svt_small:img_size=64",
        "pit_ti_224:img_size=64",
        "tnt_s_patch16_224:img_size=64",
        "nextvit_small",
        "volo_d1_224:img_size=64",
        "mvitv2_tiny:img_size=64",
    ),
    *_listed(
        "timm",
        images(96),
        "inception_resnet_v2",
        "botnet26t_256:img_size=96",
        "coat_lite_tiny:img_size=96",
    ),
    *_listed("timm", images(56), "eva02_tiny_patch14_224:img_size=56"),
    *_listed(
        "timm",
        images(128),
        "visformer_tiny:img_size=128",
        "maxvit_pico_rw_256:img_size=128",
        "nest_tiny:img_size=128",
        "sequencer2d_s:img_size=128",
        "lambda_resnet26t",
    ),
    *_listed(
        "timm",
        images(224),
        "levit_128s",
        "efficientformer_l1",
        "efficientformerv2_s0",
        "tiny_vit_5m_224",
        "coatnet_nano_rw_224",
        "gcvit_xxtiny",
        "hiera_tiny_224",
        "efficientvit_m0",
    ),
    *_listed("timm", images(240), "crossvit_9_240"),
    _text("Bert"),
    _text("Roberta"),
    _text("XLMRoberta"),
    _text("Electra", embedding_size=16),
    _text("Albert", embedding_size=16),
    _text("MPNet"),
    _text("RemBert", input_embedding_size=16),
    _text("DistilBert", **_NO_WIDTH, dim=32, n_layers=4, n_heads=2, hidden_dim=64),
    _text("MobileBert", embedding_size=16, intra_bottleneck_size=16, true_hidden_size=16),
    _text("DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"], pooler_hidden_size=32),
    _text("Deberta", relative_attention=True, pos_att_type=["p2c", "c2p"], pooler_hidden_size=32),
    _text(
        "Funnel", **_NO_WIDTH, block_sizes=[2, 2, 2], d_model=32, n_head=2, d_head=16, d_inner=64
    ),
    _text(
        "SqueezeBert", embedding_size=32, q_groups=1, k_groups=1, v_groups=1, intermediate_groups=1
    ),
    _text("ConvBert", embedding_size=16),
    _text("RoFormer", embedding_size=32),
    _text("FNet", tpu_short_seq_length=12),
    _text("ModernBert", global_attn_every_n_layers=2),
    _text("Canine"),
    _text("GPT2", **_NO_WIDTH, n_embd=32, n_layer=4, n_head=2, n_positions=32),
    _text("GPTNeoX"),
    _text(
        "OPT",
        word_embed_proj_dim=32,
        ffn_dim=64,
        max_position_embeddings=32,
        intermediate_size=None,
    ),
    _text(
        "Bloom",
        n_layer=4,
        n_head=2,
        num_hidden_layers=None,
        num_attention_heads=None,
        intermediate_size=None,
    ),
    _text("Llama", num_key_value_heads=2),
    _text("Qwen2", num_key_value_heads=2),
    _text("Mistral", num_key_value_heads=2),
    _text("XLNet", **_NO_WIDTH, d_model=32, n_layer=4, n_head=2, d_inner=64),
    _text(
        "T5",
        **_NO_WIDTH,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        eos_token_id=VOCABULARY - 1,
        decoder_start_token_id=0,
    ),
    _text("Bart", **_BART),
    _vision("ViT"),
    _vision("DeiT"),
    _vision("Beit"),
    _vision("Dinov2"),
    _vision("Dinov2WithRegisters"),
    _vision("ViTMSN"),
    _pictures("Swin", 32, **_SWIN),
    _pictures("Swinv2", 32, **_SWIN),
    _pictures("ConvNext", **_PYRAMID),
    _pictures("ConvNextV2", **_PYRAMID),
    _pictures("ResNet", embedding_size=8, **_PYRAMID),
    _pictures("RegNet", embedding_size=8, groups_width=4, **_PYRAMID),
    _pictures("Bit", embedding_size=8, num_groups=4, **_PYRAMID),
    _pictures("MobileNetV1", depth_multiplier=0.25),
    _pictures("MobileNetV2", depth_multiplier=0.35),
    _pictures(
        "EfficientNet", image_size=64, width_coefficient=0.5, depth_coefficient=0.5, hidden_dim=640
    ),
    _pictures("MobileViT", image_size=64),
    _pictures("MobileViTV2", image_size=64, width_multiplier=0.5),
    _pictures("PoolFormer", **_PYRAMID),
    _pictures("Segformer", num_attention_heads=[1, 1, 2, 2], **_PYRAMID),
    _pictures("Pvt", image_size=64, num_attention_heads=[1, 1, 2, 2], **_PYRAMID),
    _pictures("PvtV2", image_size=64, num_attention_heads=[1, 1, 2, 2], **_PYRAMID),
    _pictures("Cvt", embed_dim=[8, 16, 32], num_heads=[1, 1, 2], depth=[1, 2, 3]),
    _pictures(
        "Levit",
        image_size=64,
        hidden_sizes=[16, 24, 32],
        num_attention_heads=[1, 2, 2],
        depths=[2, 2, 2],
        key_dim=[8, 8, 8],
    ),
    _pictures("FocalNet", image_size=64, embed_dim=8, depths=[1, 2, 2, 1]),
    _pictures("SwiftFormer", depths=[1, 2, 2, 1], embed_dims=[8, 16, 24, 32]),
    _pictures(
        "Hiera", image_size=[64, 64], embed_dim=8, depths=[1, 2, 2, 1], num_heads=[1, 1, 2, 2]
    ),
    _pictures("HGNetV2"),
    _sound("Wav2Vec2"),
    _sound("Hubert"),
    _sound("WavLM"),
    _config(
        "AST",
        lambda batch: {"input_values": torch.randn(batch, 64, 32)},
        **_WIDTH_32,
        max_length=64,
        num_mel_bins=32,
        patch_size=8,
        frequency_stride=8,
        time_stride=8,
    ),
    _config(
        "VideoMAE",
        lambda batch: {"pixel_values": video(4, 32, channels_first=False)(batch)},
        image_size=32,
        patch_size=8,
        num_frames=4,
        **_WIDTH_32,
    ),
)
