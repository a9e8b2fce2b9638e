"""The command line of train_net.py: one entry point for both config styles, on one or many processes."""

import argparse
import os
import sys
from contextlib import nullcontext
from typing import ContextManager, List, NamedTuple, Optional, Type

import torch
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.utils import comm
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from ..config import find_config
from ..data.checks import check_datasets
from ..data.coco import Remark
from ..errors import (
    EXIT_BUG,
    EXIT_INTERRUPTED,
    EXIT_MISTAKE,
    PLEASE_REPORT,
    D2kdError,
    exit_status,
    known_mistakes,
    mistake_in_traceback,
)
from ..keys import lazy_keys
from .devices import check_num_gpus
from .estimate import Processes
from .hooks import EXIT_PREEMPTED, Preempted
from .launch import (
    check_address,
    ctrl_c_ends_children,
    end_with_launcher,
    join_torchrun,
    once_per_machine,
    sigterm_for_children,
    under_torchrun,
)
from .logs import log_remarks, run_logs
from .recipe import Recipe
from .run import dry_run, evaluate, train
from .run_folder import ALLOW, RunFolder
from .sources import Sources, describe_sources
from .styles import is_lazy, load_recipe
from .trainer import Trainer
from .values import check_batch, check_values, check_weights_file

EXIT_DIED = 1
RESUME = "the same command with --resume continues from the last checkpoint"

EPILOG = f"""
Examples:

Train a student with CrossKD on 8 GPUs (a .py config is a LazyConfig):
    $ python train_net.py --config-file configs/crosskd_retinanet_R18.yaml --num-gpus 8
    $ python train_net.py --config-file configs/lazy/crosskd_retinanet_R18.py --num-gpus 8

Train a teacher or a plain baseline with a plain config:
    $ python train_net.py --config-file configs/retinanet_R50.yaml --num-gpus 8

Train on your own data; number and names of classes come from the file, for the teacher too:
    $ python train_net.py --config-file cfg.yaml --train-data train.json:images --val-data val.json:images

Change options at the end, in the style of the config:
    $ python train_net.py --config-file cfg.yaml SOLVER.MAX_ITER 100 MODEL.DISTILL.CROSSKD.CUT 2
    $ python train_net.py --config-file cfg.py train.max_iter=100 model.methods.0.cut=2

Look at one batch before a long run: wiring, losses, weights that are far off, time and memory:
    $ python train_net.py --config-file cfg.yaml --dry-run

Evaluate; no teacher is needed:
    $ python train_net.py --config-file cfg.yaml --eval-only MODEL.WEIGHTS output/model_final.pth

Without a GPU, --num-gpus counts processes on the CPU. torchrun works as well, and restarts when a process dies:
    $ torchrun --nproc-per-node 8 --max-restarts 3 train_net.py --config-file cfg.yaml

Train in mixed precision, float16 or bfloat16 (on the CPU always bfloat16):
    $ python train_net.py --config-file cfg.yaml SOLVER.AMP.ENABLED True SOLVER.AMP.DTYPE bfloat16

Continue after any interruption, as if there had been none; without a checkpoint, start:
    $ python train_net.py --config-file cfg.yaml --resume

On SIGTERM (Slurm's preemption) a run finishes the iteration, saves itself and exits with status {EXIT_PREEMPTED}.
A mistake is reported in one sentence, with exit status {EXIT_MISTAKE}; a bug with its traceback, with {EXIT_BUG};
a process that dies ends all others, with {EXIT_DIED}.
"""


def main(argv: Optional[List[str]] = None, trainer: Type[Trainer] = Trainer) -> int:
    """Runs train_net.py.

    Args:
        argv: command-line arguments; by default the process's own.
        trainer: what runs; a subclass with methods of your own.

    Returns:
        Exit status: 0; 1 for a bug, or if one of several processes died; 2 for a mistake of the user, reported in one
        sentence; 75 if SIGTERM stopped the run, which has saved itself; 130 after Ctrl-C.
    """
    args = parser().parse_args(argv)
    # torchrun --max-restarts repeats the command as it was.
    args.resume = args.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    try:
        return exit_status(lambda: _run(args, trainer))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def parser() -> argparse.ArgumentParser:
    """detectron2's arguments and d2kd's."""
    arguments = default_argument_parser(EPILOG)
    arguments.set_defaults(dist_url="auto")  # detectron2's own is the same port for all runs of a user
    arguments.add_argument(
        ALLOW,
        action="store_true",
        help="let --resume continue although config, teacher or data have changed",
    )
    arguments.set_defaults(data=None)  # what load_recipe reads of these
    arguments.add_argument(
        "--train-data",
        action="append",
        default=[],
        metavar="DATA",
        help="own data to train on, which also set the number of classes of student and teacher: ann.json:images "
        "(COCO), a YOLO data.yaml, or a folder in Pascal VOC's layout; may be given several times",
    )
    arguments.add_argument(
        "--val-data", action="append", default=[], metavar="DATA", help="own data to evaluate on, named likewise"
    )
    arguments.add_argument(
        "--val-split",
        type=float,
        default=0.0,
        metavar="FRACTION",
        help="take a fraction of the images of --train-data for evaluation, always the same ones",
    )
    arguments.add_argument(
        "--dry-run",
        action="store_true",
        help="run one batch, show how student, teacher and methods fit, what each loss is and how strongly it pulls at "
        "the FPN, what both detectors cost to run, how long the training takes and with how much memory; write nothing",
    )
    return arguments


def _run(args: argparse.Namespace, trainer: Type[Trainer]) -> int:
    """Runs the command, in as many processes as it asks for; returns the exit status."""
    if not args.config_file:
        raise D2kdError("name a config: --config-file configs/crosskd_retinanet_R18.yaml")
    check_num_gpus(args.num_gpus)
    try:
        with lazy_keys(is_lazy(args.config_file)):
            _start(args, trainer)
    except Preempted:
        return _preempted()
    except KeyboardInterrupt:
        return _ended(f"interrupted; {RESUME}", EXIT_INTERRUPTED)
    except ProcessExitedException as error:
        if error.exit_code == EXIT_PREEMPTED:
            return _preempted()
        return _ended(f"error: {error.msg}; {RESUME}", EXIT_DIED)
    except ProcessRaisedException as error:
        if mistake_in_traceback(error.msg) is not None:
            raise D2kdError(error.msg) from None
        return _ended(f"{error.msg}\nbug: {PLEASE_REPORT}", EXIT_BUG)
    return 0


def _start(args: argparse.Namespace, trainer: Type[Trainer]) -> None:
    if under_torchrun() and not args.dry_run:
        join_torchrun()
        recipe = load_recipe(args)
        _work(args, trainer, once_per_machine(lambda: _check(args, recipe)), recipe)
        return
    recipe = load_recipe(args)
    checked = _check(args, recipe)
    if args.dry_run:
        print(*(text for _, text in checked.remarks), sep="\n")
        with known_mistakes():
            print(dry_run(recipe, trainer, _processes(args)))
    elif args.num_gpus * args.num_machines > 1:
        check_address(args.dist_url, args.num_machines, args.machine_rank)
        with sigterm_for_children(), ctrl_c_ends_children():
            arguments = (args, trainer, checked)
            launch(_work, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args=arguments)
    else:
        _work(args, trainer, checked, recipe)


class Checked(NamedTuple):
    """What the checks before a run have found: what to log about the data, and what the run learns from."""

    remarks: List[Remark]
    sources: Sources


def _processes(args: argparse.Namespace) -> Processes:
    """The processes that a run with these arguments has, or those of torchrun, which are not joined yet."""
    if under_torchrun():
        count = int(os.environ["WORLD_SIZE"])
        return Processes(count, count // int(os.environ["LOCAL_WORLD_SIZE"]))
    return Processes(max(1, args.num_gpus * args.num_machines), args.num_machines)


def _check(args: argparse.Namespace, recipe: Recipe) -> Checked:
    """Checks what can be checked before anything is built, once per machine.

    Raises:
        D2kdError: something is wrong.
    """
    check_values(recipe)
    if not args.eval_only:
        check_weights_file(recipe)
        check_batch(recipe, _processes(args).total)
    sets = [*([] if args.eval_only else recipe.train_sets), *recipe.test_sets]
    remarks = [args.data.remark()] if args.data else []
    remarks += check_datasets(sets, recipe.num_classes, evaluated=recipe.test_sets)
    sources = {} if args.dry_run or args.eval_only else describe_sources(recipe)
    if not args.dry_run:
        folder = RunFolder(recipe, args.data)
        folder.make()
        with _lock(folder, args):
            if not args.eval_only:
                folder.check(args.resume, args.allow_config_change, sources)
    return Checked(remarks, sources)


def _lock(folder: RunFolder, args: argparse.Namespace) -> ContextManager[None]:
    """Locks the folder of a run for the one process that writes there, or for what starts it."""
    return folder.lock() if args.machine_rank == 0 and comm.is_main_process() else nullcontext()


def _work(args: argparse.Namespace, trainer: Type[Trainer], checked: Checked, recipe: Optional[Recipe] = None) -> None:
    """What each process does; one that was started loads the config itself."""
    if recipe is None:
        end_with_launcher()
    with lazy_keys(is_lazy(args.config_file)):
        recipe = recipe or load_recipe(args)
        folder = RunFolder(recipe, args.data)
        logs = os.path.join(folder.path, "inference") if args.eval_only else folder.path  # config.yaml is the run's
        with _lock(folder, args), run_logs(logs), known_mistakes():
            if not args.eval_only:
                recipe = recipe.with_seed(folder.saved_seed() if args.resume else -1)
            args.config_file = find_config(args.config_file)  # detectron2 reads it; it may be a name of the zoo
            default_setup(recipe.changed("OUTPUT_DIR", logs).config, args)
            if comm.is_main_process():
                log_remarks(checked.remarks)
                if not args.eval_only:
                    RunFolder(recipe, args.data).record(checked.sources)
            do = evaluate if args.eval_only else train
            do(recipe, trainer, args.resume)


def _preempted() -> int:
    return _ended("stopped by SIGTERM and saved; the same command with --resume continues", EXIT_PREEMPTED)


def _ended(message: str, status: int) -> int:
    print(message, file=sys.stderr)
    return status
