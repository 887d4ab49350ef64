"""How Ray Train hands the stream to its workers. A module of its own: Ray's data actors import it, and it is light."""

from typing import Any

from ray.data import DataIterator, Dataset, ExecutionOptions
from ray.train import DataConfig


class OrderedSplit(DataConfig):  # type: ignore[misc]  # Ray is read as untyped
    """Gives worker w every `world_size`-th block of each data set, in order, with none dropped.

    Data tasks run on nodes with the labels of `label_selector` only, where it is given.
    """

    def __init__(self, label_selector: dict[str, str] | None = None) -> None:
        self._options = ExecutionOptions(preserve_order=True, label_selector=label_selector)
        super().__init__(execution_options=self._options)

    def configure(
        self, datasets: dict[str, Dataset], world_size: int, worker_handles: Any, worker_node_ids: Any, **kwargs: Any
    ) -> list[dict[str, DataIterator]]:
        """One iterator a data set for each worker."""
        splits: list[dict[str, DataIterator]] = [{} for _ in range(world_size)]
        for name, dataset in datasets.items():
            dataset = dataset.copy(dataset)
            dataset.set_name(name)
            dataset.context.execution_options = self._options
            # Ray Train's own split (equal=True) drops the remainder; here every step is filled up already.
            for worker, iterator in enumerate(dataset.streaming_split(world_size, equal=False)):
                splits[worker][name] = iterator
        return splits
