#!/usr/bin/env python3
"""Trains and evaluates detectors and distilled students; see ``python train_net.py --help``."""

import sys

from d2kd.engine import main

if __name__ == "__main__":
    sys.exit(main())
