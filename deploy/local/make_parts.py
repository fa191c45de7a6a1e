"""Renders the pictures that the demo's cameras show, into `deploy/local/parts/<product>/<kind>-<number>.jpg`.

Run once in `.venv-training`, when the rendered products change; the result is committed, so that the demo needs no
training environment. The seed is not one that any model was trained, calibrated or measured on.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import cv2

PARTS = Path(__file__).with_name("parts")
# Those that models_repo/ holds a model of.
PRODUCTS = ("fastener-tray", "cable-set")
SEED = 20261123
AMOUNTS = {"good": 32, "logical_anomalies": 16, "structural_anomalies": 16}
JPEG_QUALITY = 85


def main() -> int:
    """Render, convert to JPEG, and replace what was there."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [str(Path(sys.executable).with_name("logicrd-train")), "scenes", "--out", scratch]
        amounts = ["--train", "2", "--validation", "2", "--test", str(max(AMOUNTS.values())), "--seed", str(SEED)]
        for product in PRODUCTS:
            subprocess.run([*command, "--product", product, *amounts], check=True)
            target = PARTS / product
            target.mkdir(parents=True, exist_ok=True)
            for old in target.glob("*.jpg"):
                old.unlink()
            for kind, amount in AMOUNTS.items():
                for number, path in enumerate(sorted((Path(scratch) / product / "test" / kind).glob("*.png"))[:amount]):
                    name = f"{kind.removesuffix('_anomalies')}-{number:02d}.jpg"
                    picture = cv2.imread(str(path))
                    if picture is None:
                        raise OSError(f"{path} cannot be read back")
                    cv2.imwrite(str(target / name), picture, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return 0


if __name__ == "__main__":
    sys.exit(main())
