"""Data sets that a command line names."""

from pathlib import Path
from typing import Optional, Tuple

from detectron2.data import DatasetCatalog

from ..data.own import OwnData, prepare_own_data


def find_data(text: str, folder: Path) -> Tuple[str, Optional[OwnData]]:
    """Finds a data set and registers it, if it is the user's own.

    Args:
        text: own data as for train_net.py's --val-data, or the name of a registered data set; "" for none.
        folder: where own data that are not in COCO's format are converted to.

    Returns:
        Its registered name, "" for none, and own data.

    Raises:
        D2kdError: it cannot be read.
    """
    if not text or text in DatasetCatalog:
        return text, None
    data = prepare_own_data((), [text], 0.0, folder)
    data.register()
    return data.val[0].name, data
