"""Fine-tune a model from a recipe, or go on with the run of its name.

    ray job submit --runtime-env jobs/runtime_env.yaml -- \
        python jobs/train.py my.yaml lora.rank=8

On a cluster, checkpoint.storage and every path in the recipe name folders that all nodes share.
"""

import sys

from burnish.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
