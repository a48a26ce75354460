"""Agreement of all ranks on a call, before any rank sends keys or values."""

import json
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from flexmoba.distributed.ranks import all_gather
from flexmoba.runtime import has_values

_BYTES = 2048  # of a description; all ranks send as many
_LONGEST_ERROR = 1024
_LENGTH = "length"  # the only value that may differ


def describe(q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values by name that all ranks must share, and the length of this rank's shard."""
    needs_grad = torch.is_grad_enabled()
    described = {
        _LENGTH: q.shape[2],
        "batch size": q.shape[0],
        "number of query heads": q.shape[1],
        "number of KV heads": k.shape[1],
        "head dim": q.shape[3],
        "head dim of values": v.shape[3],
        "dtype": str(q.dtype),
        "requires_grad of q, k and v": [needs_grad and x.requires_grad for x in (q, k, v)],
    }
    return described | {name: _plain(value) for name, value in options.items()}


def _plain(value: Any) -> Any:
    """Returns a value that JSON keeps. Functions become one name, and long values a checksum."""
    if isinstance(value, Tensor):
        shown = [str(value.dtype), *value.shape]
        return [*shown, _checksum(value.tolist())] if has_values(value) else shown
    if isinstance(value, Mapping):
        return f"a dict with checksum {_checksum(sorted((str(x), y) for x, y in value.items()))}"
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return "a function" if callable(value) else repr(value)


def _checksum(value: Any) -> int:
    return zlib.crc32(repr(value).encode())


def agree(mine: Mapping[str, Any] | Exception, mesh: DeviceMesh) -> tuple[int, ...]:
    """Compares the descriptions of all ranks, by one small all-gather.

    Args:
        mine: The description from `describe`, or the error of this rank's arguments.
        mesh: The ranks.

    Returns:
        The number of tokens of each rank.

    Raises:
        ValueError: The descriptions differ, or the arguments of another rank are wrong. All ranks
            then raise an error.
        Exception: ``mine``, if it is an error.
    """
    if mesh.size() == 1 and not isinstance(mine, Exception):
        return (mine[_LENGTH],)
    described = {"error": str(mine)[:_LONGEST_ERROR]} if isinstance(mine, Exception) else {**mine}
    data = torch.tensor(list(_encoded(described)), dtype=torch.uint8).to(mesh.device_type)
    gathered = all_gather(data, mesh.get_group(), mesh.size()).wait()
    all_described = [json.loads(bytes(row)) for row in gathered.tolist()]
    if isinstance(mine, Exception):
        raise mine
    for rank, described in enumerate(all_described):
        if "error" in described:
            raise ValueError(f"the arguments of rank {rank} are wrong: {described['error']}")
    _check_same(all_described)
    return tuple(described[_LENGTH] for described in all_described)


def agree_on_lengths(
    k: Tensor, mesh: DeviceMesh, check: Callable[[], None] | None = None
) -> tuple[int, ...]:
    """Returns the number of tokens of each rank, and compares shapes and dtypes of keys.

    If ``check`` raises on one rank, all ranks raise an error.
    """
    mine: dict[str, Any] | Exception
    try:
        if check is not None:
            check()
        mine = {
            _LENGTH: k.shape[2],
            "batch size": k.shape[0],
            "number of KV heads": k.shape[1],
            "head dim": k.shape[3],
            "dtype": str(k.dtype),
        }
    except (TypeError, ValueError, NotImplementedError) as error:
        mine = error
    return agree(mine, mesh)


def _encoded(described: Mapping[str, Any]) -> bytes:
    """Returns a description as ``_BYTES`` bytes; one that is too long becomes an error."""
    text = json.dumps(described).encode()
    if len(text) > _BYTES:
        text = json.dumps({"error": "its message is too long to send"}).encode()
    return text.ljust(_BYTES)


def _check_same(all_described: list[dict[str, Any]]) -> None:
    first = all_described[0]
    for name, value in first.items():
        for rank, described in enumerate(all_described):
            if name != _LENGTH and described[name] != value:
                raise ValueError(
                    f"all ranks must pass the same {name}, got {value!r} on rank 0 and "
                    f"{described[name]!r} on rank {rank}; only the number of tokens may differ"
                )
