"""The command line of train_net.py: one entry point for both config styles, on one or many processes."""

import argparse
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, ContextManager, Dict, Iterator, List, Optional
from uuid import uuid4

import torch
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from ..diagnose import dry_run as inspection
from ..errors import EXIT_MISTAKE, D2kdError, told_in_one_sentence
from . import lazy_run, yaml_run
from .checks import check_address, check_num_gpus
from .hooks import EXIT_PREEMPTED, Preempted
from .run_folder import ALLOW, RunFolder

EXIT_DIED = 1
# Key of the name of the current attempt in torchrun's store.
ATTEMPT = "d2kd_attempt"
# Seconds in which processes have to save themselves after SIGTERM.
LEAVE_WITHIN = 600

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

Without a GPU, --num-gpus counts processes on the CPU. torchrun works as well, and goes on by itself when one dies:
    $ torchrun --nproc-per-node 8 --max-restarts 3 train_net.py --config-file cfg.yaml

Mixed precision, in float16 or bfloat16 (on the CPU always bfloat16):
    $ python train_net.py --config-file cfg.yaml SOLVER.AMP.ENABLED True SOLVER.AMP.DTYPE bfloat16

Go on after an interruption, whatever it was, as if there had been none; without a checkpoint it starts:
    $ python train_net.py --config-file cfg.yaml --resume

On SIGTERM (Slurm's preemption) a run finishes the iteration, saves itself and exits with status {EXIT_PREEMPTED}.
A mistake is told in one sentence, with exit status {EXIT_MISTAKE}; a process that dies ends all, with {EXIT_DIED}.
"""


def main(argv: Optional[List[str]] = None) -> int:
    """Runs train_net.py.

    Args:
        argv: command-line arguments; by default the process's own.

    Returns:
        Exit status: 0; 1 if one of several processes died; 2 for a mistake of the user, which is told in one sentence;
        75 if SIGTERM stopped the run, which has saved itself.
    """
    args = parser().parse_args(argv)
    # torchrun --max-restarts repeats the command as it was.
    args.resume = args.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    try:
        if not args.config_file:
            raise D2kdError("name a config: --config-file configs/crosskd_retinanet_R18.yaml")
        check_num_gpus(args.num_gpus)
        with _telling(args):
            cfg = style(args).prepare(args)  # mistakes show here, before any process is started
            if args.dry_run:
                print(inspection.dry_run(*style(args).model_and_batch(cfg)))
                return 0
        style(args).run_folder(cfg).make()
        if not args.eval_only:
            style(args).run_folder(cfg).check(args.resume, args.allow_config_change)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            _join_torchrun()
            work(args)
        elif args.num_gpus * args.num_machines > 1:
            check_address(args.dist_url, args.num_machines, args.machine_rank)
            with _sigterm_for_children():
                launch(work, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args=(args,))
        else:
            work(args)
    except (D2kdError, ProcessRaisedException) as error:  # the latter from a worker, see D2kdError
        print(f"error: {D2kdError(error)}", file=sys.stderr)
        return EXIT_MISTAKE
    except Preempted:
        return _preempted()
    except ProcessExitedException as error:
        if error.exit_code == EXIT_PREEMPTED:
            return _preempted()
        print(f"error: {error.msg}; the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        return EXIT_DIED
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def parser() -> argparse.ArgumentParser:
    """detectron2's arguments and d2kd's."""
    arguments = default_argument_parser(EPILOG)
    arguments.set_defaults(dist_url="auto")  # detectron2's own is the same port for all runs of a user
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
    cfg = style(args).prepare(args)
    folder = style(args).run_folder(cfg)
    with folder.telling(lambda: f"{args.config_file} cannot be run"):
        if not args.eval_only:
            style(args).set_seed(cfg, _seed(folder, args.resume))
        default_setup(cfg, args)
        setup_logger(folder.path, distributed_rank=comm.get_rank(), name="d2kd")
        logging.getLogger("detectron2.engine.train_loop").addFilter(_is_no_traceback)
        if comm.is_main_process() and not args.eval_only:
            style(args).run_folder(cfg).record()
        return style(args).run(args, cfg)


def _seed(folder: RunFolder, resume: bool) -> int:
    """The config's seed; if that is negative, the one of the run that is resumed, or a random one."""
    seed = folder.seed()
    if seed < 0 and resume:
        seed = folder.saved_seed()
    return seed if seed >= 0 else comm.shared_random_seed()


def _telling(args: argparse.Namespace) -> ContextManager[None]:
    """For what happens while the run's folder is not known yet."""
    return told_in_one_sentence(
        lambda: f"{args.config_file} cannot be read", Path(tempfile.gettempdir(), "d2kd_traceback.txt")
    )


def _is_no_traceback(record: logging.LogRecord) -> bool:
    """Keeps tracebacks out of detectron2's log: errors are told in one sentence at the end."""
    return not record.exc_info


def _preempted() -> int:
    print("stopped by SIGTERM and saved; the same command with --resume goes on", file=sys.stderr)
    return EXIT_PREEMPTED


@contextmanager
def _sigterm_for_children() -> Iterator[None]:
    """Hands SIGTERM on to the processes that this one has started, waits for them, and kills them if they hang.

    One that waits for another in a collective cannot do that itself: there no handler of Python's runs.
    """

    def hand_on(signum: int, _: Any) -> None:
        for child in multiprocessing.active_children():
            if signum == signal.SIGALRM:
                child.kill()
            else:
                child.terminate()
        signal.alarm(LEAVE_WITHIN)

    previous = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGALRM)}
    try:
        yield
    finally:
        signal.alarm(0)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _join_torchrun() -> None:
    """Joins the process group that torchrun describes in the environment.

    torchrun gives a restarted run the store of the first attempt, where the addresses of processes stand that are gone
    (pytorch issue 135712). So each attempt writes below a name of its own.
    """
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, world_size = next(torch.distributed.rendezvous("env://"))
    if rank == 0:
        store.set(ATTEMPT, uuid4().hex)
    own_part = torch.distributed.PrefixStore(store.get(ATTEMPT).decode(), store)
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo", store=own_part, rank=rank, world_size=world_size)
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    comm.synchronize()
    if rank == 0:  # all have read it, and the next attempt shall wait for its own
        store.delete_key(ATTEMPT)
