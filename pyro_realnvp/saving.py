# SPDX-License-Identifier: Apache-2.0
"""Files that hold the state of a module. They are data only: reading one runs no code."""

import difflib
import io
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

_FORMAT, _VERSION = "pyro_realnvp", 1
_MODULE = "the state of a module"


def save(module: nn.Module, path: str | os.PathLike) -> None:
    """Writes the state of a :class:`Flow`, or of any other module, to a file: all parameters, masks, permutations and
    statistics, and a description of the architecture.

    The file is replaced as a whole: whatever happens, there is the old one or the new one.

    Args:
        module: a :class:`Flow`, :class:`DequantizedFlow`, :class:`AutoRealNVP`, a bijection, or any module.
        path: the file.

    Raises:
        RuntimeError: the file cannot be written; the one that was there is as before.

    Example:
        >>> import tempfile
        >>> from pyro_realnvp import Flow, real_nvp
        >>> path = tempfile.mkdtemp() + "/flow.pt"
        >>> save(Flow(real_nvp(2)), path)
        >>> flow = load(Flow(real_nvp(2)), path)
    """
    write(path, _MODULE, {"architecture": describe(module), "state": module.state_dict()})


def load(module: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Reads the file of :func:`save` into a module of the same architecture, on the module's device; returns it.

    The file is read as data (``weights_only=True``): one from a stranger runs no code.

    Args:
        module: built by the same code as the one that was saved.
        path: the file.

    Raises:
        FileNotFoundError: there is none.
        RuntimeError: it is damaged, or holds more than data.
        ValueError: it is no file of :func:`save`, or holds another architecture or dtype. The module is as before.
    """
    content = read(path, _MODULE)
    check_architecture(module, content["architecture"], content["state"], path)
    module.load_state_dict(content["state"])
    return module


def write(path: str | os.PathLike, kind: str, content: dict) -> None:
    """Puts a new file in the place of the old one, if there is one."""
    path = Path(os.path.realpath(path))
    temporary = path.with_name(path.name + ".tmp")
    buffer = io.BytesIO()  # not straight into the file: torch's writer does not survive a full disk
    torch.save({"format": _FORMAT, "version": _VERSION, "kind": kind} | content, buffer)
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if temporary.is_file():
            temporary.unlink()
        raise RuntimeError(f"{path} could not be written ({error}): what was there before is unchanged") from error


def read(path: str | os.PathLike, kind: str) -> dict:
    """The content of a file of this kind, on the CPU."""
    with open(path, "rb") as file:
        try:
            damaged = zipfile.ZipFile(file).testzip()  # the checksums, which torch.load passes over
        except zipfile.BadZipFile:
            damaged = "it does not end as it should"
        if damaged:
            raise RuntimeError(
                f"{path} is no file of pyro_realnvp, or was truncated or changed ({damaged}): take a copy, or remove it"
            )
        file.seek(0)
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise RuntimeError(
                f"{path} was not loaded, since it holds more than tensors and plain values, which could run code: "
                "pyro_realnvp writes no such file"
            ) from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{path} is no file of pyro_realnvp: was it written by torch.save?")
    if content.get("version") != _VERSION:
        raise ValueError(
            f"{path} has the format of version {content.get('version')}, but this pyro_realnvp reads {_VERSION}: "
            "read it with the release that wrote it"
        )
    if content.get("kind") != kind:
        raise ValueError(f"expected {kind} in {path}; got {content.get('kind')}")
    return content


def describe(module: nn.Module) -> list[str]:
    """The architecture, as far as it is no state: the class and the plain options of each submodule."""
    lines = []
    for name, part in module.named_modules():
        options = getattr(part, "architecture_repr", part.extra_repr)()
        lines.append(re.sub(r" at 0x\w+", "", f"{name}: {type(part).__name__}({options})"))
    return lines


def check_architecture(module: nn.Module, lines: list[str], state: Mapping, path: str | os.PathLike) -> None:
    """Raises an error where a module differs from a saved one: in layers, options, shapes or dtypes."""
    problem = _difference(describe(module), lines) or _difference(_shapes(module.state_dict()), _shapes(state))
    if problem:
        raise ValueError(
            f"{path} holds another architecture: {problem}. Build the module with the options that it was saved with"
        )


def _shapes(state: Mapping) -> list[str]:
    return [f"{name}: {tuple(v.shape)} of {v.dtype}" for name, v in state.items() if isinstance(v, Tensor)]


def _difference(here: list[str], there: list[str]) -> str:
    """The first difference, in words."""
    for tag, i, j, k, m in difflib.SequenceMatcher(None, here, there, autojunk=False).get_opcodes():
        if tag != "equal":
            mine, theirs = "; ".join(here[i : min(j, i + 3)]), "; ".join(there[k : min(m, k + 3)])
            return f"here is {mine or 'nothing'}, where the file has {theirs or 'nothing'}"
    return ""
