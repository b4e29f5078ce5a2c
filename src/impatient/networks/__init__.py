"""Models cut into stages, heads, and the networks of the papers."""

from impatient.networks.anytimenet import (
    AnytimeNet,
    BaseResNet,
    GrowingNetwork,
    SectionedNetwork,
)
from impatient.networks.cascade import Cascade
from impatient.networks.combined_exits import RunningEnsemble
from impatient.networks.ensemble import EANN
from impatient.networks.given_weights import GivenWeights, load_weights
from impatient.networks.growth import Schedule
from impatient.networks.heads import FeatureShape
from impatient.networks.multi_exit import MultiExitNetwork, attach_exits
from impatient.networks.pretrained import Loaded
from impatient.networks.recalibration import recalibrate
from impatient.networks.resnet import PreActResNet, preact_resnet_imagenet
from impatient.networks.specs import load_model, load_with_weights, transform_of
from impatient.networks.stages import StagedRun
from impatient.networks.transforms import Resizing, Transform
from impatient.networks.vgg import SmallVGG
from impatient.networks.zoo import load_zoo, zoo_names

__all__ = [
    "EANN",
    "AnytimeNet",
    "BaseResNet",
    "Cascade",
    "FeatureShape",
    "GivenWeights",
    "GrowingNetwork",
    "Loaded",
    "MultiExitNetwork",
    "PreActResNet",
    "Resizing",
    "RunningEnsemble",
    "Schedule",
    "SectionedNetwork",
    "SmallVGG",
    "StagedRun",
    "Transform",
    "attach_exits",
    "load_model",
    "load_weights",
    "load_with_weights",
    "load_zoo",
    "preact_resnet_imagenet",
    "recalibrate",
    "transform_of",
    "zoo_names",
]
