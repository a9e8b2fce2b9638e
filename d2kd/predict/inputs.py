"""Images and videos that a command line names."""

from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, List, Sequence, Set, Tuple

import cv2
import numpy as np

from ..data.formats import IMAGE_SUFFIXES
from ..errors import D2kdError

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
#: What videos are written as.
VIDEO_SUFFIX = ".mp4"
DEFAULT_FPS = 25.0  # for files that do not say


@dataclass(frozen=True)
class Input:
    """An image or a video.

    Attributes:
        path: the file.
        name: its file with detections, relative to the output folder.
    """

    path: Path
    name: str

    @property
    def is_video(self) -> bool:
        """Whether it is a video, by its suffix."""
        return self.path.suffix.lower() in VIDEO_SUFFIXES


def find_inputs(paths: Sequence[str]) -> List[Input]:
    """Finds images and videos.

    Args:
        paths: files, and folders, which are searched to any depth.

    Returns:
        Them in order, with different names.

    Raises:
        D2kdError: a path does not exist, a folder holds no image and no video, or a file is neither.
    """
    found: List[Input] = []
    taken: Set[str] = set()
    for path in map(Path, paths):
        for file in _files(path):
            relative = file.relative_to(path) if path.is_dir() else Path(file.name)
            name = _unique(relative.with_suffix(VIDEO_SUFFIX) if Input(file, "").is_video else relative, taken)
            found.append(Input(file, name))
    return found


def _files(path: Path) -> List[Path]:
    suffixes = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)
    known = f"known are {' '.join(suffixes)}"
    if not path.exists():
        raise D2kdError(f"{path}: no such file or folder; name images, folders of images, or videos")
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
        if not files:
            raise D2kdError(f"{path} holds no image and no video ({known}); name another folder")
        return files
    if path.suffix.lower() not in suffixes:
        raise D2kdError(f"{path} is no image and no video by its suffix; {known}")
    return [path]


def _unique(path: Path, taken: Set[str]) -> str:
    name, number = path.as_posix(), 1
    while name in taken:
        number += 1
        name = path.with_name(f"{path.stem}_{number}{path.suffix}").as_posix()
    taken.add(name)
    return name


class Video:
    """A video that is read frame by frame, each (H, W, 3) uint8, BGR.

    Args:
        path: the file.

    Raises:
        D2kdError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        reader = self._open()
        self.size = int(reader.get(cv2.CAP_PROP_FRAME_WIDTH)), int(reader.get(cv2.CAP_PROP_FRAME_HEIGHT))
        rate = reader.get(cv2.CAP_PROP_FPS)
        self.fps = rate if 0 < rate < 1000 else DEFAULT_FPS
        self._count = int(reader.get(cv2.CAP_PROP_FRAME_COUNT))
        has_frame, _ = reader.read()
        reader.release()
        if not has_frame:
            raise D2kdError(f"the video {path} cannot be read: there is no frame in it; convert it to mp4, for example")

    def _open(self) -> cv2.VideoCapture:
        reader = cv2.VideoCapture(str(self.path))
        if not reader.isOpened():
            raise D2kdError(f"the video {self.path} cannot be read; convert it to a format that OpenCV knows, like mp4")
        return reader

    def __len__(self) -> int:
        """The number of frames, as the file says; 0 if it does not."""
        return max(self._count, 0)

    def __iter__(self) -> Iterator[np.ndarray]:
        reader = self._open()
        try:
            while True:
                has_frame, frame = reader.read()
                if not has_frame:
                    return
                yield frame
        finally:
            reader.release()


def video_writer(path: Path, fps: float, size: Tuple[int, int]) -> cv2.VideoWriter:
    """Starts a video; frames are (H, W, 3) uint8, BGR.

    Args:
        path: the file to write.
        fps: frames per second.
        size: width and height.

    Raises:
        D2kdError: it cannot be written.
    """
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), fps, size)
    if not writer.isOpened():
        raise D2kdError(f"the video {path} cannot be written; choose another --output")
    return writer
