"""The command line of train_net.py: one entry point for both config styles, on one or many processes."""

import argparse
import logging
import multiprocessing
import os
import signal
import sys
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Dict, Iterator, List, Optional

import torch
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch.multiprocessing.spawn import ProcessExitedException

from .. import inspection
from ..errors import D2kdError
from . import lazy_run, yaml_run
from .checks import check_num_gpus
from .run_folder import ALLOW, RunFolder
from .run_hooks import EXIT_PREEMPTED, Preempted

EXIT_MISTAKE = 2

EPILOG = f"""
Examples:

Train a student with CrossKD on 8 GPUs (a .py config is a LazyConfig):
    $ python train_net.py --config-file configs/crosskd_retinanet_R18.yaml --num-gpus 8
    $ python train_net.py --config-file configs/lazy/crosskd_retinanet_R18.py --num-gpus 8

Train a teacher or a plain baseline: the same with a plain config:
    $ python train_net.py --config-file configs/retinanet_R50.yaml --num-gpus 8

Change options, at the end, in the config's own style:
    $ python train_net.py --config-file cfg.yaml SOLVER.MAX_ITER 100 MODEL.DISTILL.CROSSKD.CUT 2
    $ python train_net.py --config-file cfg.py train.max_iter=100 model.methods.0.cut=2

Look at one batch before a long run: wiring, losses, and whose weight is far off:
    $ python train_net.py --config-file cfg.yaml --dry-run

Evaluate; no teacher is needed:
    $ python train_net.py --config-file cfg.yaml --eval-only MODEL.WEIGHTS output/model_final.pth

Without a GPU, --num-gpus counts processes on the CPU. torchrun works as well:
    $ torchrun --nproc-per-node 8 train_net.py --config-file cfg.yaml

Go on after an interruption, whatever it was, as if there had been none; without a checkpoint it starts:
    $ python train_net.py --config-file cfg.yaml --resume

On SIGTERM (Slurm's preemption) a run finishes the iteration, saves itself and exits with status {EXIT_PREEMPTED}.
A mistake is told in one sentence, with exit status {EXIT_MISTAKE}.
"""


def main(argv: Optional[List[str]] = None) -> int:
    """Runs train_net.py.

    Args:
        argv: command-line arguments; by default the process's own.

    Returns:
        Exit status: 0; 2 for a mistake of the user, which is told in one sentence; 75 if SIGTERM stopped the run, which
        has saved itself.
    """
    args = parser().parse_args(argv)
    # torchrun --max-restarts repeats the command as it was.
    args.resume = args.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    try:
        if not args.config_file:
            raise D2kdError("name a config: --config-file configs/crosskd_retinanet_R18.yaml")
        check_num_gpus(args.num_gpus)
        cfg = style(args).prepare(args)  # mistakes show here, before any process is started
        if args.dry_run:
            print(inspection.dry_run(*style(args).model_and_batch(cfg)))
            return 0
        if not args.eval_only:
            style(args).run_folder(cfg).check(args.resume, args.allow_config_change)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            _join_torchrun()
            work(args)
        elif args.num_gpus * args.num_machines > 1:
            with _sigterm_for_children():
                launch(work, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args=(args,))
        else:
            work(args)
    except D2kdError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_MISTAKE
    except Preempted:
        return _preempted()
    except ProcessExitedException as error:
        if error.exit_code == EXIT_PREEMPTED:
            return _preempted()
        if error.exit_code != EXIT_MISTAKE:
            raise
        return EXIT_MISTAKE  # the worker has said what was wrong
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def parser() -> argparse.ArgumentParser:
    """detectron2's arguments and d2kd's."""
    arguments = default_argument_parser(EPILOG)
    arguments.add_argument(
        ALLOW, action="store_true", help="let --resume go on although config or teacher are not the run's"
    )
    arguments.add_argument(
        "--dry-run",
        action="store_true",
        help="run one batch, show how student, teacher and methods fit, what each loss is and how strongly it pulls at "
        "the FPN, and write nothing",
    )
    return arguments


def style(args: argparse.Namespace) -> ModuleType:
    """The module for the config's style."""
    return lazy_run if args.config_file.endswith(".py") else yaml_run


def work(args: argparse.Namespace) -> Dict[str, Any]:
    """What each process does."""
    try:
        cfg = style(args).prepare(args)
        folder = style(args).run_folder(cfg)
        if not args.eval_only:
            style(args).set_seed(cfg, _seed(folder, args.resume))
        default_setup(cfg, args)
        setup_logger(folder.path, distributed_rank=comm.get_rank(), name="d2kd")
        logging.getLogger("detectron2.engine.train_loop").addFilter(_is_no_mistake)
        if comm.is_main_process() and not args.eval_only:
            style(args).run_folder(cfg).record()
        return style(args).run(args, cfg)
    except D2kdError as error:
        if comm.get_world_size() == 1:
            raise
        if comm.is_main_process():
            print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_MISTAKE)


def _seed(folder: RunFolder, resume: bool) -> int:
    """The config's seed; if that is negative, the one of the run that is resumed, or a random one."""
    seed = folder.seed()
    if seed < 0 and resume:
        seed = folder.saved_seed()
    return seed if seed >= 0 else comm.shared_random_seed()


def _is_no_mistake(record: logging.LogRecord) -> bool:
    """Keeps tracebacks of mistakes, which are told in one sentence at the end, out of detectron2's log."""
    return not (record.exc_info and isinstance(record.exc_info[1], D2kdError))


def _preempted() -> int:
    print("stopped by SIGTERM and saved; the same command with --resume goes on", file=sys.stderr)
    return EXIT_PREEMPTED


@contextmanager
def _sigterm_for_children() -> Iterator[None]:
    """Hands SIGTERM on to the processes that this one has started, and waits for them."""

    def hand_on(signum: int, _: Any) -> None:
        for child in multiprocessing.active_children():
            child.terminate()

    previous = signal.signal(signal.SIGTERM, hand_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _join_torchrun() -> None:
    """Joins the process group that torchrun describes in the environment."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
