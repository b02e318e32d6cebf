"""k-NN on features that lie on the disk: the network is not run again, and every evaluator works like this.

nearfar features runs/my labeled/train features/train
nearfar features runs/my labeled/val features/val
python examples/knn_on_features.py features/train features/val
"""

import argparse
from pathlib import Path

from nearfar.eval.features.store import FeatureStore
from nearfar.eval.knn import knn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("train", type=Path, help="features with labels, which vote")
    parser.add_argument("val", type=Path, help="features with labels, which are scored")
    arguments = parser.parse_args()

    train, val = FeatureStore.open(arguments.train), FeatureStore.open(arguments.val)  # memory-mapped
    if train.labels is None or val.labels is None:
        parser.error("both folders must hold labels: write them from images in class folders")
    for k, top1 in knn(train.x, train.labels, val.x, val.labels, ks=(1, 20)).items():
        print(f"{k}-NN: {top1:.1f} % of {len(val.x)} images")


if __name__ == "__main__":
    main()
