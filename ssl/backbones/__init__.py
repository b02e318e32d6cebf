"""Images to tokens: our ViT and Vision Mamba and any timm model behind one contract, and the parts they are made of.

tokens.py is the contract, factory.py every backbone by name, adapter.py the contract around a network. lgp.py,
lgp_vim.py, gaug.py, prr.py, rope.py and scan.py (scan_triton.py on GPUs) hold one idea each, attention.py the product
they share; vit.py and vim.py are our models, token_model.py what they have in common, timm_grafts.py the ideas on a
loaded timm model. weights.py reads public weight files, published.py downloads timm's, described.py builds what a file
of weights describes.
"""

from nearfar.ssl.backbones import _torchvision as _torchvision  # isort: skip  (before anything imports timm)

from nearfar.ssl.backbones.described import create_described
from nearfar.ssl.backbones.factory import create
from nearfar.ssl.backbones.gaug import GaugBias
from nearfar.ssl.backbones.lgp import LGPPatchEmbed, bands_permuted
from nearfar.ssl.backbones.lgp_vim import VimLGPPatchEmbed
from nearfar.ssl.backbones.prr import prr
from nearfar.ssl.backbones.scan import choose_scan, selective_scan
from nearfar.ssl.backbones.timm_grafts import add_gaug, add_lgp, add_prr
from nearfar.ssl.backbones.tokens import Backbone, Tokens, pad_to_multiple
from nearfar.ssl.backbones.vim import VisionMamba
from nearfar.ssl.backbones.vit import VisionTransformer
from nearfar.ssl.backbones.weights import load_weights

__all__ = [
    "Backbone",
    "GaugBias",
    "LGPPatchEmbed",
    "Tokens",
    "VimLGPPatchEmbed",
    "VisionMamba",
    "VisionTransformer",
    "add_gaug",
    "add_lgp",
    "add_prr",
    "bands_permuted",
    "choose_scan",
    "create",
    "create_described",
    "load_weights",
    "pad_to_multiple",
    "prr",
    "selective_scan",
]
