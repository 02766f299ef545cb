"""Sharded tensors in safetensors files, by torch.distributed.checkpoint: one file a process, no pickle.

Files written by n processes can be read by any number, and into whole tensors too. Importing torch's part
takes seconds, so it is imported where it is used.
"""

from pathlib import Path

from torch import Tensor


def write(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write this process's shards to `folder`. Every process calls it.

    Raises:
        OSError: in every process, when one of them could not write.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:  # a BaseException
        raise OSError(_first(error.failures.values())) from error


def read(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors`, sharded or whole, in place.

    Raises:
        OSError: a file is missing or damaged, or a tensor is not in them.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)))
    except CheckpointException as error:
        raise OSError(_first(error.failures.values())) from error


def _first(failures: object) -> str:
    error = next(iter(failures))[0]  # pyright: ignore[reportCallIssue, reportArgumentType] (exception, traceback)
    return str(error).splitlines()[0] if str(error) else type(error).__name__
