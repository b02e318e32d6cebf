"""Put LGP, GAug and PRR on a timm model and see what each adds and what it keeps.

    python examples/ideas_on_timm.py vit_tiny_patch16_224

The model's own weights stay (but for its position embedding, which LGP makes unnecessary), so that a pretrained one
can be taken further: `timm.create_model(name, pretrained=True)`.
"""

import argparse

import timm
import torch
from torch import nn

from nearfar.ssl.backbones import add_gaug, add_lgp, add_prr


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", nargs="?", default="vit_tiny_patch16_224", help="a timm model that cuts patches")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = timm.create_model(arguments.name, num_classes=0).eval()
    kept = model.state_dict()
    images = torch.randn(2, 3, *model.default_cfg["input_size"][1:])
    print(f"{arguments.name}: {parameters(model):,} parameters")
    for add in (add_lgp, add_gaug, add_prr):
        before = parameters(model)
        add(model)
        print(f"{add.__name__}: {parameters(model) - before:+,} parameters")
    lost = kept.keys() - {name.replace("patch_embed.proj.proj.", "patch_embed.proj.") for name in model.state_dict()}
    with torch.no_grad():
        print(f"features {tuple(model.forward_features(images).shape)}; gone: {', '.join(sorted(lost)) or 'nothing'}")


if __name__ == "__main__":
    main()
