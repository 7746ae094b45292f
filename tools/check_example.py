"""Check a converted LLaVE-0.5B against the example that its authors publish.

    python tools/check_example.py --model DIR --image PHOTO

PHOTO is the cat and dog picture of the authors' repository. Prints the cosines beside the published
ones and fails if they differ by more than half precision explains.
"""

from __future__ import annotations

import argparse
import sys

from llave_jax import Embedder

# The authors' demo puts a space, not a newline, behind the image.
QUERY = "<image> Represent the given image with the following question: What is in the image"
PUBLISHED = {"A cat and a dog": 0.4802, "A cat and a tiger": 0.3413}
# The published numbers were computed in float16.
TOLERANCE = 0.01


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="converted LLaVE-0.5B")
    parser.add_argument("--image", required=True, help="the picture of the authors' example")
    args = parser.parse_args()
    model = Embedder.from_pretrained(args.model, dtype="float32")
    query, *targets = model.encode([{"text": QUERY, "image": args.image}, *PUBLISHED])
    agrees = True
    for (text, published), target in zip(PUBLISHED.items(), targets, strict=True):
        cosine = float(query @ target)
        agrees &= abs(cosine - published) <= TOLERANCE
        print(f"{text:20} {cosine:.4f}   published {published:.4f}")
    print("agrees" if agrees else f"differs by more than {TOLERANCE}")
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
