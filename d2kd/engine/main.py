"""The command line of train_net.py: one entry point for both config styles, on one or many processes."""

import argparse
import os
import sys
from types import ModuleType
from typing import Any, Dict, List, Optional

import torch
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch.multiprocessing.spawn import ProcessExitedException

from ..errors import D2kdError
from . import lazy_run, yaml_run
from .checks import check_num_gpus

EXIT_MISTAKE = 2

EPILOG = """
Examples:

Train a student with CrossKD on 8 GPUs (a .py config is a LazyConfig):
    $ python train_net.py --config-file configs/crosskd_retinanet_R18.yaml --num-gpus 8
    $ python train_net.py --config-file configs/lazy/crosskd_retinanet_R18.py --num-gpus 8

Train a teacher or a plain baseline: the same with a plain config:
    $ python train_net.py --config-file configs/retinanet_R50.yaml --num-gpus 8

Change options, at the end, in the config's own style:
    $ python train_net.py --config-file cfg.yaml SOLVER.MAX_ITER 100 MODEL.DISTILL.CROSSKD.CUT 2
    $ python train_net.py --config-file cfg.py train.max_iter=100 model.methods.0.cut=2

Evaluate; no teacher is needed:
    $ python train_net.py --config-file cfg.yaml --eval-only MODEL.WEIGHTS output/model_final.pth

Without a GPU, --num-gpus counts processes on the CPU. torchrun works as well:
    $ torchrun --nproc-per-node 8 train_net.py --config-file cfg.yaml
"""


def main(argv: Optional[List[str]] = None) -> int:
    """Runs train_net.py.

    Args:
        argv: command-line arguments; by default the process's own.

    Returns:
        Exit status: 0, or 2 for a mistake of the user, which is told in one sentence.
    """
    args = default_argument_parser(EPILOG).parse_args(argv)
    try:
        if not args.config_file:
            raise D2kdError("name a config: --config-file configs/crosskd_retinanet_R18.yaml")
        check_num_gpus(args.num_gpus)
        style(args).prepare(args)  # mistakes show here, before any process is started
        if "TORCHELASTIC_RUN_ID" in os.environ:
            _join_torchrun()
            work(args)
        else:
            launch(work, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args=(args,))
    except D2kdError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_MISTAKE
    except ProcessExitedException as error:
        if error.exit_code != EXIT_MISTAKE:
            raise
        return EXIT_MISTAKE  # the worker has said what was wrong
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def style(args: argparse.Namespace) -> ModuleType:
    """The module for the config's style."""
    return lazy_run if args.config_file.endswith(".py") else yaml_run


def work(args: argparse.Namespace) -> Dict[str, Any]:
    """What each process does."""
    try:
        cfg = style(args).prepare(args)
        default_setup(cfg, args)
        output_dir = cfg.OUTPUT_DIR if hasattr(cfg, "OUTPUT_DIR") else cfg.train.output_dir
        setup_logger(output_dir, distributed_rank=comm.get_rank(), name="d2kd")
        return style(args).run(args, cfg)
    except D2kdError as error:
        if comm.get_world_size() == 1:
            raise
        if comm.is_main_process():
            print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_MISTAKE)


def _join_torchrun() -> None:
    """Joins the process group that torchrun describes in the environment."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
