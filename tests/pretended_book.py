"""Makes the pretended accelerator the one on which the book computes: for a startup file of a notebook's kernel.

There is then a file ``on_pretended`` in the cache folder, from when a model is first put there.
"""

import copy

import pretended_accelerator
import safetensors.torch
import torch
from transformers import PreTrainedModel

from unlearnlib import cache, models
from unlearnlib.models import loading


def default_device():
    (cache.cache_folder() / "on_pretended").touch()
    return torch.device(pretended_accelerator.NAME, 0)


for module in (loading, models):
    module.default_device = default_device
save_model, save_tensors = PreTrainedModel.save_pretrained, safetensors.torch.save_file


def save_pretrained(self, *args, **kwargs):
    """Safetensors reads the memory of tensors, and those of this device have none."""
    save_model(copy.deepcopy(self).to("cpu"), *args, **kwargs)


def save_file(tensors, *args, **kwargs):
    save_tensors({name: tensor.cpu() for name, tensor in tensors.items()}, *args, **kwargs)


PreTrainedModel.save_pretrained, safetensors.torch.save_file = save_pretrained, save_file
