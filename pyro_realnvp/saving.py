# SPDX-License-Identifier: Apache-2.0
"""Files that hold the state of a module. They contain only data, so that reading one runs no code."""

import difflib
import io
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_FORMAT, _VERSION = "pyro_realnvp", 1
_MODULE = "the state of a module"


def save(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes the state of a :class:`Flow`, or of any other module, to a file: all parameters, masks, permutations and
    statistics, and a description of the architecture.

    The file is replaced as a whole: at any moment, even after a crash, the path holds the whole old file or the whole
    new one.

    Args:
        module: a :class:`Flow`, :class:`DequantizedFlow`, :class:`AutoRealNVP`, a bijection, or any other module.
        path: the file to write.

    Raises:
        RuntimeError: The file cannot be written; an existing file is unchanged.

    Example:
        >>> import tempfile
        >>> from pyro_realnvp import Flow, real_nvp
        >>> path = tempfile.mkdtemp() + "/flow.pt"
        >>> save(Flow(real_nvp(2)), path)
        >>> flow = load(Flow(real_nvp(2)), path)
    """
    write(path, _MODULE, {"architecture": describe(module), "state": module.state_dict()})


def load(module: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Reads a file of :func:`save` into a module of the same architecture, and returns the module.

    The module stays on its device. The file is read as data (``weights_only=True``), so that even one from an untrusted
    source runs no code.

    Args:
        module: a module built with the same options as the one that was saved.
        path: the file to read.

    Raises:
        FileNotFoundError: The file does not exist.
        RuntimeError: The file is damaged, or contains more than data.
        ValueError: The file was not written by :func:`save`, or holds another architecture or dtype. The module is
            unchanged.
    """
    content = read(path, _MODULE)
    check_architecture(module, content["architecture"], content["state"], path)
    module.load_state_dict(content["state"])
    return module


def write(path: str | os.PathLike[str], kind: str, content: dict[str, Any]) -> None:
    """Writes a file of this kind, which replaces any old one as a whole: it is written beside it, and then renamed."""
    path = Path(os.path.realpath(path))  # a link stays, and the file it points to is replaced
    temporary = path.with_name(path.name + ".tmp")
    buffer = io.BytesIO()  # torch writes into memory, since its own file writer does not survive a full disk
    torch.save({"format": _FORMAT, "version": _VERSION, "kind": kind} | content, buffer)
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())  # the content must be on the disk before its new name is
        os.replace(temporary, path)
    except OSError as error:
        if temporary.is_file():
            temporary.unlink()
        raise RuntimeError(f"{path} could not be written ({error}): what was there before is unchanged") from error


def read(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """Returns the content of a file of this kind, on the CPU. Raises the errors that :func:`load` describes."""
    with open(path, "rb") as file:
        try:
            damaged = zipfile.ZipFile(file).testzip()  # checks the checksums, which torch.load does not
        except zipfile.BadZipFile:
            damaged = "it is no complete zip archive"
        if damaged:
            raise RuntimeError(
                f"{path} is no file of pyro_realnvp, or was truncated or changed ({damaged}): "
                "use a backup copy, or remove it"
            )
        file.seek(0)
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise RuntimeError(
                f"{path} was not loaded, since it contains objects that could run code: pyro_realnvp writes only "
                "tensors and plain values, so the file is not its own"
            ) from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{path} is no file of pyro_realnvp: if torch.save wrote it, read it with torch.load")
    if content.get("version") != _VERSION:
        raise ValueError(
            f"{path} has the format of version {content.get('version')}, but this pyro_realnvp reads {_VERSION}: "
            "read it with the release that wrote it"
        )
    if content.get("kind") != kind:
        raise ValueError(f"expected {kind} in {path}; got {content.get('kind')}")
    return content


def describe(module: nn.Module) -> list[str]:
    """Describes what a state_dict leaves out: the class and the plain options of each submodule, one on each line."""
    lines = []
    for name, part in module.named_modules():
        options = getattr(part, "architecture_repr", part.extra_repr)()
        # An address in the repr of an option would differ in each process.
        lines.append(re.sub(r" at 0x\w+", "", f"{name}: {type(part).__name__}({options})"))
    return lines


def check_architecture(
    module: nn.Module, lines: list[str], state: Mapping[str, Any], path: str | os.PathLike[str]
) -> None:
    """Raises a ValueError if a module differs from the saved one in layers, options, shapes or dtypes."""
    problem = _difference(describe(module), lines) or _difference(_shapes(module.state_dict()), _shapes(state))
    if problem:
        raise ValueError(
            f"{path} holds another architecture: {problem}. Build the module with the options that it was saved with"
        )


def _shapes(state: Mapping[str, Any]) -> list[str]:
    """Describes the shape and dtype of each tensor of a state, one on each line."""
    return [f"{name}: {tuple(v.shape)} of {v.dtype}" for name, v in state.items() if isinstance(v, Tensor)]


def _difference(here: list[str], there: list[str]) -> str:
    """Describes the first difference between two lists of lines; returns an empty string if they are equal."""
    for tag, i, j, k, m in difflib.SequenceMatcher(None, here, there, autojunk=False).get_opcodes():
        if tag != "equal":
            mine, theirs = "; ".join(here[i : min(j, i + 3)]), "; ".join(there[k : min(m, k + 3)])
            return f"here is {mine or 'nothing'}, where the file has {theirs or 'nothing'}"
    return ""
