"""Checks of image files: whether they exist, can be read, and have the size given in the annotations."""

import os
import re
import reprlib
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Set, Tuple, Union

from detectron2.data import DatasetMapper
from PIL import Image

from ..errors import NO_PIXELS, D2kdError

#: Maximum number of images of a data set whose headers are read for their size; this takes less than a second.
HEADERS_READ = 1000
NAMES_SHOWN = 3
ORIENTATION = 0x0112
# First letters of PIL's modes of gray images that RGB has no room for.
DEEP = {"I": "integers of more than 8 bits", "F": "floating-point numbers"}
ROTATED = (5, 6, 7, 8)  # EXIF orientations that swap width and height


def check_image_files(
    json_file: str, image_root: Union[str, Path], images: Sequence[Tuple[str, int, int]], read_headers: bool
) -> None:
    """Checks that all images exist and, if ``read_headers`` is set, that a sample of them have the right size.

    Args:
        json_file: the annotation file that lists the images.
        image_root: the folder that their file names are relative to.
        images: file name, width and height of each image.
        read_headers: whether to read the headers of some images.

    Raises:
        D2kdError: an image is missing or cannot be used; the message names the first ones and how to fix it.
    """
    if not os.path.isdir(image_root):
        raise D2kdError(f"the image folder {image_root} of {json_file} does not exist; put the images there")
    missing = missing_files(image_root, [name for name, *_ in images])
    if missing:
        first = ", ".join(map(reprlib.repr, missing[:NAMES_SHOWN]))
        raise D2kdError(
            f"{len(missing)} of {len(images)} images named in {json_file} are not in {image_root}, such as {first}; "
            "put the images there or set the folder that the file names are relative to"
        )
    if read_headers:
        for name, width, height in images[:: -(-len(images) // HEADERS_READ)]:
            path = os.path.join(image_root, name)
            reason = read_fault(path, (width, height), decode=False)
            if reason:
                raise D2kdError(f"the image {path} of {json_file} cannot be used: {reason}; fix the file or its entry")


def missing_files(folder: Union[str, Path], names: Sequence[str]) -> List[str]:
    """Returns the file names, relative to a folder, that do not exist. Lists folders instead of checking each file."""
    there: Dict[str, Set[str]] = {}
    missing = []
    for name in names:
        path = os.path.join(folder, name)
        parent, base = os.path.split(path)
        if parent not in there:
            there[parent] = _files_in(parent)
        # isfile() is for file systems that ignore case.
        if base not in there[parent] and not os.path.isfile(path):
            missing.append(name)
    return missing


def _files_in(folder: str) -> Set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_symlink() or entry.is_file()}
    except OSError:
        return set()


def image_fault(entry: Any, error: Exception) -> str:
    """Describes what is wrong with the image of a dataset dict for which a mapper failed.

    Args:
        entry: detectron2's dataset dict.
        error: the exception raised by the mapper.

    Returns:
        A description that names the file, or "" if the image is not the cause.
    """
    if not (isinstance(entry, Mapping) and "file_name" in entry):
        return ""
    size = (entry["width"], entry["height"]) if {"width", "height"} <= entry.keys() else None
    reason = read_fault(entry["file_name"], size, decode=True)
    if not reason and re.search(NO_PIXELS, str(error)):
        reason = "a side of it has a pixel or less after resizing"
    if not reason and isinstance(error, OSError):  # by now it can be read again
        reason = error_text(error)
    return reason and f"the image {entry['file_name']} (id {entry.get('image_id')!r}) cannot be used: {reason}"


def reads_as_detectron2(mapper: Any) -> bool:
    """Whether a mapper reads images as detectron2's own does, which clips all numbers to 0...255."""
    return isinstance(mapper, DatasetMapper) and type(mapper).__call__ is DatasetMapper.__call__


def check_image(entry: Any) -> None:
    """Raises ValueError if detectron2's mapper would read the image of a dataset dict wrongly, or forever."""
    if isinstance(entry, Mapping) and "file_name" in entry:
        reason = read_fault(entry["file_name"], None, decode=False)
        if reason:
            raise ValueError(reason)


def read_fault(path: str, size: Optional[Tuple[int, int]], decode: bool) -> str:
    """Returns why an image cannot be read the way detectron2 reads it, or "" if it can.

    Gray images of more than 8 bits cannot: detectron2 converts them to RGB, which clips them.

    Args:
        path: the file.
        size: the required width and height, if known.
        decode: whether to also read the pixels.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        return "it is no regular file"  # opening a pipe waits for somebody to write to it
    try:
        with Image.open(path) as image:
            if image.mode.startswith(tuple(DEEP)):
                return f"its pixels are {DEEP[image.mode[0]]} (mode {image.mode}), which would be clipped to 0...255"
            is_rotated = _orientation(image) in ROTATED
            found = image.size[::-1] if is_rotated else image.size
            if decode:
                image.convert("RGB")
    except Exception as error:  # PIL's readers raise many types of errors for damaged files
        return error_text(error)
    if size is None or size == found:
        return ""
    rotated = " after rotation by its EXIF orientation" if is_rotated else ""
    return f"it has {found[0]} x {found[1]} pixels{rotated}, but the annotations say {size[0]} x {size[1]}"


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ORIENTATION)
    except Exception:  # like detectron2, treat damaged EXIF data as missing
        return None


def error_text(error: Exception) -> str:
    """Returns an error as one line, without the path that the operating system adds."""
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
