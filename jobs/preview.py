"""Show what of each row is trained and what is not.

    ray job submit --runtime-env jobs/runtime_env.yaml -- \
        python jobs/preview.py my.yaml --json --limit 20

On a cluster, checkpoint.storage and every path in the recipe name folders that all nodes share.
"""

import sys

from burnish.cli import main

if __name__ == "__main__":
    sys.exit(main(["preview", *sys.argv[1:]]))
