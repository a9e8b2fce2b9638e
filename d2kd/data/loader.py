"""Training batches that depend on seed and iteration only, so that a resumed run sees the batches it would have seen.

detectron2's own loader starts from the first image whenever a run starts, and the random numbers of its workers depend
on those drawn before. Here every sample has its own seed.
"""

import itertools
import logging
import os
import random
import signal
import threading
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetFromList, build_detection_train_loader
from detectron2.data.build import trivial_batch_collator
from detectron2.data.samplers import GroupedBatchSampler, TrainingSampler
from detectron2.utils import comm
from detectron2.utils.serialize import PicklableWrapper
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from ..errors import D2kdError
from ..keys import key, setting
from ..private import train_loader_from_config
from .bad_images import BAD_IMAGES
from .images import check_image, image_fault, reads_as_detectron2
from .randomness import SAMPLES, seeded

TRIES = 100


class SeededDataset(Dataset):
    """Samples that depend only on a seed and their position in the training stream.

    Args:
        dataset: dataset dicts by index.
        mapper: maps a dataset dict to a sample, or to None to have another one drawn instead.
        seed: of the run.
        skip_bad_images: also draw another one if an image cannot be read. ``bad_images`` of the sample, a dict, then
            describes what is wrong with the images it replaces, by file name.
    """

    def __init__(self, dataset: Any, mapper: Callable[[Any], Any], seed: int, skip_bad_images: bool = False) -> None:
        self.dataset = dataset
        self.mapper = PicklableWrapper(mapper)
        self._checks_images = reads_as_detectron2(mapper)
        self.seed = seed
        self.skip_bad_images = skip_bad_images

    def __getitem__(self, place: Tuple[int, int]) -> Any:
        """Returns the sample for (index in the data set, position in the stream).

        Raises:
            D2kdError: an image cannot be read, or the mapper returned None for many samples in a row.
        """
        index, position = place
        faults: Dict[str, str] = {}
        with seeded(self.seed, SAMPLES, position):
            for _ in range(TRIES):
                sample = self._sample(self.dataset[index], faults)
                if sample is not None:
                    return {**sample, BAD_IMAGES: faults} if faults else sample
                index = random.randrange(len(self.dataset))
        first = "".join(f", the first: {fault}" for fault in list(faults.values())[:1])
        raise D2kdError(f"{TRIES} images in a row could not be used{first}; check the training set's files")

    def _sample(self, entry: Any, faults: Dict[str, str]) -> Any:
        """Maps a dataset dict to a sample; returns None and records the fault if the image cannot be read."""
        try:
            if self._checks_images:
                check_image(entry)
            return self.mapper(entry)
        except Exception as error:
            fault = image_fault(entry, error)
            if not fault:
                raise
            if not self.skip_bad_images:
                skip = setting("DATALOADER.SKIP_BAD_IMAGES", True)
                raise D2kdError(f"{fault}; fix the file or its entry, or set {skip} to train without it") from error
        faults[entry["file_name"]] = fault
        return None


class ResumableBatches(Sampler):
    """Batches of (index, position) of this process, starting at any iteration.

    A batch is that of its micro-batches, one after the other. Each of these is the batch that one of as many processes
    would get: it takes its share of this process's stream.

    Args:
        sampler: an endless stream of indices.
        groups: the group of each index; a micro-batch holds indices of one group.
        batch_size: number of images in a micro-batch.
        accumulate: number of micro-batches.
    """

    def __init__(self, sampler: Sampler, groups: Sequence[int], batch_size: int, accumulate: int = 1) -> None:
        self.sampler = sampler
        self.groups = groups
        self.batch_size = batch_size
        self.accumulate = accumulate
        #: Iteration of the first batch. Set it before iterating.
        self.start = 0

    def __iter__(self) -> Iterator[List[Tuple[int, int]]]:
        shares = [_Share(x, i, self.accumulate) for i, x in enumerate(itertools.tee(self.sampler, self.accumulate))]
        # Created here because they keep indices that do not fill a batch yet. Skipping reads indices, not images.
        batches = enumerate(zip(*(GroupedBatchSampler(share, self.groups, self.batch_size) for share in shares)))
        for iteration, parts in itertools.islice(batches, self.start, None):
            yield [place for i, part in enumerate(parts) for place in self._places(part, iteration, i)]

    def _places(self, batch: List[int], iteration: int, micro_batch: int) -> Iterator[Tuple[int, int]]:
        """Adds the positions in the stream of all processes, so that augmentation does not depend on their number."""
        processes = comm.get_world_size()
        worker, workers = micro_batch * processes + comm.get_rank(), self.accumulate * processes
        for drawn, index in enumerate(batch, iteration * self.batch_size):
            yield index, drawn * workers + worker


class _Share(Sampler):
    """One of a number of equal shares of a stream of indices: every so many-th."""

    def __init__(self, stream: Iterator[int], first: int, number: int) -> None:
        self._stream, self._first, self._number = stream, first, number

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(self._stream, self._first, None, self._number)


def _from_config(cfg: CfgNode, **kwargs: Any) -> Dict[str, Any]:
    own = {
        **{"seed": cfg.SEED, "skip_bad_images": cfg.DATALOADER.SKIP_BAD_IMAGES},
        "accumulate": cfg.SOLVER.ACCUMULATE,
    }
    return {**train_loader_from_config(cfg, **kwargs), **own}


def images_per_worker(total_batch_size: int, processes: int, accumulate: int = 1) -> int:
    """Returns the number of images of a batch that each micro-batch of each process has.

    Raises:
        D2kdError: the batch cannot be divided by the number of processes and micro-batches.
    """
    if total_batch_size < 1 or total_batch_size % (processes * accumulate):
        micro_batches = f" with {accumulate} micro-batches each ({key('SOLVER.ACCUMULATE')})" if accumulate > 1 else ""
        raise D2kdError(
            f"a batch of {total_batch_size} images cannot be divided by {processes} processes{micro_batches}; set "
            f"{key('SOLVER.IMS_PER_BATCH')} to a multiple"
        )
    return total_batch_size // (processes * accumulate)


@configurable(from_config=_from_config)
def build_train_loader(
    dataset: Union[List[Any], Dataset],
    *,
    mapper: Callable[[Any], Any],
    sampler: Optional[Sampler] = None,
    total_batch_size: int,
    aspect_ratio_grouping: bool = True,
    num_workers: int = 0,
    collate_fn: Optional[Callable[[List[Any]], Any]] = None,
    seed: int = 0,
    skip_bad_images: bool = False,
    accumulate: int = 1,
    **kwargs: Any,
) -> DataLoader:
    """Builds a loader like :func:`detectron2.data.build_detection_train_loader`, whose stream can be resumed.

    Batches are the same for any ``num_workers``. An iterable data set cannot be resumed and gets detectron2's own
    loader.

    Args:
        dataset: dataset dicts, as a list or by index.
        mapper: maps a dataset dict to a sample.
        sampler: an endless stream of indices; by default detectron2's :class:`TrainingSampler`.
        total_batch_size: images of a batch over all processes.
        accumulate: micro-batches into which each process divides its part; each has images of one group.
        aspect_ratio_grouping: whether the images of a batch are either all wider than high or all not.
        num_workers: number of loading processes.
        collate_fn: makes a batch from a list of samples; by default the list itself.
        seed: of the run, not negative; determines augmentation, and the order unless ``sampler`` is given.
        skip_bad_images: replace images that cannot be read; see :class:`SeededDataset`.
        **kwargs: of :class:`torch.utils.data.DataLoader`.

    Raises:
        D2kdError: the batch cannot be divided by the number of processes.
    """
    batch_size = images_per_worker(total_batch_size, comm.get_world_size(), accumulate)
    if isinstance(dataset, IterableDataset):
        return build_detection_train_loader(
            dataset,
            mapper=mapper,
            sampler=sampler,
            total_batch_size=total_batch_size,
            aspect_ratio_grouping=aspect_ratio_grouping,
            num_workers=num_workers,
            collate_fn=collate_fn,
            **kwargs,
        )
    groups = [_aspect(entry) if aspect_ratio_grouping else 0 for entry in _entries(dataset)]
    sampler = sampler or TrainingSampler(len(groups), seed=seed)
    samples = DatasetFromList(dataset, copy=False) if isinstance(dataset, list) else dataset
    return DataLoader(
        SeededDataset(samples, mapper, seed, skip_bad_images),
        batch_sampler=ResumableBatches(sampler, groups, batch_size, accumulate),
        num_workers=num_workers,
        collate_fn=collate_fn or trivial_batch_collator,
        worker_init_fn=_ignore_sigterm_of_others,
        generator=torch.Generator(),  # otherwise each start of a run draws from the model's random numbers
        **kwargs,
    )


def start_at(loader: Any, iteration: int) -> None:
    """Makes a loader start with the batch of an iteration; warns if it is of a kind that cannot."""
    batches = getattr(loader, "batch_sampler", None)
    if isinstance(batches, ResumableBatches):
        batches.start = iteration
    elif iteration > 0:
        logging.getLogger(__name__).warning(
            "The data loader is not d2kd's, so the order of images starts over: the resumed run is not exact."
        )


def _entries(dataset: Union[List[Any], Dataset]) -> Iterator[Any]:
    return (dataset[index] for index in range(len(dataset)))  # type: ignore[arg-type]


def _aspect(entry: Any) -> int:
    """The group of an image, as in detectron2: 0 if it is wider than high, else 1."""
    return 0 if entry["width"] > entry["height"] else 1


def _ignore_sigterm_of_others(_: int) -> None:
    """Makes a worker end on SIGTERM from its parent only.

    Slurm signals all processes of a job, but the main process needs its workers to finish the iteration. When the main
    process ends with an error, Python sends its workers SIGTERM and waits for them.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=_wait_for_parent, args=(os.getppid(),), daemon=True).start()


def _wait_for_parent(parent: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)
