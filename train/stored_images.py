"""Pictures stored inside the rows' parquet files: only the rows that are asked for are decoded."""

import io
from collections import OrderedDict
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from train.lerobot_folder import RECOPY
from vla.errors import DataError
from vla.images import Bars, resize_with_pad

PNG = b"\x89PNG\r\n\x1a\n"
KEEP_BYTES = 2 << 30  # encoded pictures of one camera kept in memory


class ImageFrames:
    """The frames of one camera of a data set in image mode, by row.

    Row groups (LeRobot writes one for each episode) are read when first needed; as many as fit into
    `keep_bytes` stay, still encoded. Threads may read at once; at worst both fetch a group.

    Args:
        files: in the order in which their rows are numbered.
        key: the camera's column.
    """

    def __init__(self, files: list[Path], key: str, keep_bytes: int = KEEP_BYTES) -> None:
        self._key, self._keep_bytes = key, keep_bytes
        self._groups: list[tuple[Path, int]] = []  # (G,) file and row group
        starts = [0]
        for path in files:
            meta = pq.read_metadata(path)
            for group in range(meta.num_row_groups):
                self._groups.append((path, group))
                starts.append(starts[-1] + meta.row_group(group).num_rows)
        self._starts = np.array(starts)  # (G + 1,) first row of each group
        self._kept: OrderedDict[int, pa.Array] = OrderedDict()

    def read(self, rows: np.ndarray, size: int, out: np.ndarray, bars: Bars = "centred") -> None:
        """Fill `out` (B, size, size, 3) uint8 with the frames of `rows` (B,)."""
        groups = np.searchsorted(self._starts, rows, side="right") - 1
        for group in np.unique(groups):
            encoded = self._encoded(int(group))
            for i in np.flatnonzero(groups == group):
                data = encoded[int(rows[i] - self._starts[group])].as_buffer()
                out[i] = resize_with_pad(self._decode(data, int(rows[i])), size, bars)

    def _encoded(self, group: int) -> pa.Array:
        """(rows of the group,) encoded pictures."""
        found = self._kept.pop(group, None)
        if found is None:
            found = self._fetch(group)
            while self._kept and sum(a.nbytes for a in list(self._kept.values())) + found.nbytes > self._keep_bytes:
                self._kept.popitem(last=False)
        self._kept[group] = found
        return found

    def _fetch(self, group: int) -> pa.Array:
        path, number = self._groups[group]
        try:
            # In this thread: a pool of threads inherited through a fork would never answer.
            table = pq.ParquetFile(path).read_row_group(number, columns=[f"{self._key}.bytes"], use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"Cannot read {self._key!r} from {path}: {error}. {RECOPY}") from error
        encoded = table.column(self._key).combine_chunks().field("bytes")
        if encoded.null_count:
            raise DataError(f"{path} has rows without a picture in {self._key!r}. {RECOPY}")
        return encoded

    def _decode(self, data: pa.Buffer, row: int) -> np.ndarray:
        raw = np.frombuffer(data, np.uint8)
        if raw[: len(PNG)].tobytes() == PNG:
            picture = cv2.imdecode(raw, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
            if picture is not None:
                return np.asarray(picture)
        try:  # JPEG decoders differ in the last bit; this is the one that LeRobot uses
            return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        except (UnidentifiedImageError, OSError) as error:
            raise DataError(
                f"The picture of row {row} in {self._key!r} cannot be decoded: {error}. {RECOPY}"
            ) from error
