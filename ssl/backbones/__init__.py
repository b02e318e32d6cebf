"""Images to tokens: our vision transformer and any timm model behind one contract."""

from nearfar.ssl.backbones import _torchvision as _torchvision  # isort: skip  (before anything imports timm)

from nearfar.ssl.backbones.errors import UserError
from nearfar.ssl.backbones.gaug import GaugBias
from nearfar.ssl.backbones.lgp import LGPPatchEmbed
from nearfar.ssl.backbones.prr import prr
from nearfar.ssl.backbones.tokens import Backbone, Tokens, pad_to_multiple
from nearfar.ssl.backbones.vit import VisionTransformer
from nearfar.ssl.backbones.zoo import create

__all__ = [
    "Backbone",
    "GaugBias",
    "LGPPatchEmbed",
    "Tokens",
    "UserError",
    "VisionTransformer",
    "create",
    "pad_to_multiple",
    "prr",
]
