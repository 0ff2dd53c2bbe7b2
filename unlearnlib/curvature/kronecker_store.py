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
from unlearnlib.weights import parameters

SIDES = ("eigenvalues", "left", "right")


class FactorStore:
    """The blocks of one curvature in ``folder``, which is made, or has to hold the same curvature already.

    The ``settings`` are what decides which curvature it is, as JSON values; ``factors.json`` has them. Raises
    ValueError, naming the setting, if the folder holds another curvature, OSError if it cannot be used.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, index = folder, folder / "factors.json"
        with distributed.together():
            if index.exists():
                found = json.loads(index.read_text(encoding="utf-8"))
                other = [name for name in {**settings, **found} if found.get(name) != settings.get(name)]
                if other:
                    raise ValueError(
                        f"the factors in {folder} were built with other {', '.join(other)}: name another folder"
                    )
        with distributed.together():
            if distributed.rank() == 0 and not index.exists():
                if folder.exists() and any(folder.iterdir()):
                    raise ValueError(f"{folder} has other things in it and no factors.json: name another folder")
                with cache.atomic_file(index) as temporary:
                    temporary.write_text(json.dumps(settings, indent=1), encoding="utf-8")

    def there(self, blocks: list[Block]) -> list[bool]:
        """Which blocks are in the folder, as their owners see it."""
        found = torch.tensor([block.mine and self._path(block).exists() for block in blocks], dtype=torch.uint8)
        distributed.sum_over([found])
        return found.bool().tolist()

    def put(self, block: Block) -> Block:
        """Write a block, if it is this process's, and return it as :meth:`get` gives it."""
        if not block.mine:
            return block
        tensors = {side: getattr(block, side) for side in SIDES if getattr(block, side) is not None}
        with cache.atomic_file(self._path(block)) as temporary:
            save_file({side: x.cpu().contiguous() for side, x in tensors.items()}, temporary)
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


def hash_of(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names, formats, shapes and numbers."""
    found = hashlib.sha256()
    for name, x in tensors.items():
        found.update(f"{name} {x.dtype} {tuple(x.shape)} ".encode())
        found.update(distributed.whole(x.detach()).cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def settings_of(model: PreTrainedModel, sequences: Tensor, seed: int, corrected: bool) -> dict[str, Any]:
    """What decides which factors come out: the weights, the sequences, the drawn labels and the method."""
    return {
        "method": "ekfac" if corrected else "kfac",
        "weights": hash_of(parameters(model)),
        "sequences": hash_of({"sequences": sequences}),
        "seed": seed,
    }
