"""Kronecker factors in a folder: a file for each matrix, whole or not there, for a later request to find."""

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from unlearnlib import cache, distributed
from unlearnlib.curvature.kronecker_blocks import Block

PASSING = {"_name_or_path", "transformers_version", "architectures", "dtype"}
"""Settings of a model that change as it is saved and loaded; the format of its weights is seen in the weights."""
SIDES = ("eigenvalues", "left", "right")


class FactorStore:
    """The blocks of one curvature in ``folder``, which is made, or has to hold the same curvature already.

    The ``settings`` are what decides which curvature it is, as JSON values; ``factors.json`` has them. Raises
    ValueError, naming the setting, if the folder holds another curvature or other things, OSError if it cannot be
    used.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, index = folder, folder / "factors.json"
        with distributed.together():
            if index.exists():
                found = _read(index)
                other = [name for name in {**settings, **found} if found.get(name) != settings.get(name)]
                if other:
                    raise ValueError(
                        f"the factors in {folder} were built with other {', '.join(other)}: name another folder"
                    )
        with distributed.together():
            if distributed.rank() == 0 and not index.exists():
                names = {path.name for path in folder.iterdir()} if folder.exists() else set()
                names = {name for name in names if not name.startswith(".")}  # as a killed run may have left
                if names and index.name not in names:  # another run may have made it a moment ago
                    raise ValueError(f"{folder} has other things in it and no factors.json: name another folder")
                with cache.atomic_file(index) as temporary:
                    temporary.write_text(json.dumps(settings, indent=1), encoding="utf-8")

    def there(self, blocks: list[Block]) -> list[bool]:
        """Which blocks are in the folder, as their owners see it."""
        found = torch.tensor([block.mine and self._path(block).exists() for block in blocks], dtype=torch.uint8)
        distributed.sum_over([found])
        return found.bool().tolist()

    def put(self, block: Block) -> Block:
        """Write a block, if it is this process's, and return it as :meth:`get` gives it.

        Raises OSError if it cannot be written, as on a full disk.
        """
        if not block.mine:
            return block
        tensors = {side: getattr(block, side) for side in SIDES if getattr(block, side) is not None}
        with cache.atomic_file(self._path(block)) as temporary:
            try:
                save_file({side: x.cpu().contiguous() for side, x in tensors.items()}, temporary)
            except safetensors.SafetensorError as error:
                raise OSError(f"{self._path(block)} cannot be written: {error}") from error
        return self.get(block)

    def get(self, block: Block) -> Block:
        """The block as it is in the folder: read from there when it is used, as the system finds it fit.

        Raises OSError if its file is damaged.
        """
        if not block.mine:
            return block
        try:
            tensors = load_file(self._path(block))
        except safetensors.SafetensorError as error:
            raise OSError(f"{self._path(block)} is damaged ({error}): delete it, and it is built again") from error
        return Block(block.names, block.layers, block.form, **tensors, owner=block.owner)

    def _path(self, block: Block) -> Path:
        return self.folder / f"{cache.json_hash(block.names)[:16]}.safetensors"


def _read(index: Path) -> dict[str, Any]:
    """The settings in ``factors.json``."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"))
    except ValueError:  # no JSON, or no text
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{index} is damaged, and nothing else says what the factors are of: name another folder")
    return found


def hash_of(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names, formats, shapes and numbers."""
    found = hashlib.sha256()
    for name, x in tensors.items():
        found.update(f"{name} {x.dtype} {tuple(x.shape)} ".encode())
        found.update(distributed.whole(x.detach()).cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def settings_of(model: PreTrainedModel, sequences: Tensor, seed: int, corrected: bool) -> dict[str, Any]:
    """What decides which factors come out: the model, the sequences, the drawn labels and the method.

    Of the model that is every weight, trained or frozen, and its configuration but for where it lay and as what.
    Which weights are trained decides only whose factors are built.
    """
    configuration = json.loads(model.config.to_json_string(use_diff=False))
    return {
        "method": "ekfac" if corrected else "kfac",
        "configuration": cache.json_hash(_without(configuration, PASSING)),
        "weights": hash_of(dict(model.named_parameters())),
        "sequences": hash_of({"sequences": sequences}),
        "seed": seed,
    }


def _without(settings: Any, names: set[str]) -> Any:
    """Nested settings without those of these names."""
    if not isinstance(settings, dict):
        return settings
    return {name: _without(value, names) for name, value in settings.items() if name not in names}
