"""Write a run's newest checkpoint as a model folder.

    ray job submit --runtime-env jobs/runtime_env.yaml -- \
        python jobs/export.py /shared/runs/quickstart /shared/models/quickstart

On a cluster, checkpoint.storage and every path in the recipe name folders that all nodes share.
"""

import sys

from burnish.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
