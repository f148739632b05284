"""A teacher that lies on the Hub."""
import pytest
import torch
from safetensors.torch import load_file

from timm_spinal.errors import UserError
from timm_spinal.training.teacher import load_teacher

from .conftest import REPO, send


@pytest.mark.usefixtures('both_ways')
def test_teacher_from_the_hub(hub, run):
    assert send(run) == 0
    model = load_teacher(f'hf-hub:{REPO}')
    weights = load_file(run / 'model.safetensors')
    assert model.num_classes == 10 and all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    with pytest.raises(UserError, match='teacher hf-hub:me/nothing: ') as error:
        load_teacher('hf-hub:me/nothing')
    assert '\n' not in str(error.value)
