"""Search the space of a recipe with Ray Tune.

    ray job submit --runtime-env jobs/runtime_env.yaml -- \
        python jobs/sweep.py my-sweep.yaml

On a cluster, checkpoint.storage and every path in the recipe name folders that all nodes share.
"""

import sys

from burnish.cli import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
