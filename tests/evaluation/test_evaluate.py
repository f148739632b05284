import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from timm_spinal.errors import UserError
from timm_spinal.evaluation.evaluate import evaluate


class Answers(torch.nn.Module):
    """Logits that are the first pixels of the image."""

    def forward(self, images):
        return images[:, 0, 0, :7]


def dataset(logits, targets):
    images = torch.zeros(len(logits), 1, 1, 8)
    images[:, 0, 0, :7] = logits
    return [(image, int(target) if target.ndim == 0 else target) for image, target in zip(images, targets)]


def run(logits, targets, batch_size=4, **kwargs):
    accelerator = Accelerator()
    loader = accelerator.prepare(DataLoader(dataset(logits, targets), batch_size=batch_size))
    return evaluate(accelerator, Answers(), loader, **kwargs)


def test_exact_values():
    set_seed(0)
    logits, targets = torch.randn(11, 7), torch.arange(11) % 7
    metrics = run(logits, targets)
    order = logits.argsort(dim=1, descending=True)
    assert metrics['images'] == 11 and metrics['nonfinite'] == 0
    assert metrics['top1'] == pytest.approx(100 * (order[:, 0] == targets).float().mean().item())
    assert metrics['top5'] == pytest.approx(100 * (order[:, :5] == targets[:, None]).any(1).float().mean().item())
    assert metrics['loss'] == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item(), abs=1e-6)
    assert run(logits, targets, batch_size=11)['loss'] == pytest.approx(metrics['loss'], abs=1e-6)


def test_unreadable_rows_do_not_count():
    logits = torch.eye(7)
    targets = torch.tensor([0, 1, 2, -1, -1, 0, 0])
    metrics = run(logits, targets, batch_size=2)
    assert metrics['images'] == 5
    assert metrics['top1'] == pytest.approx(60.)
    one_right, one_wrong = math.log(math.e + 6) - 1, math.log(math.e + 6)
    assert metrics['loss'] == pytest.approx((3 * one_right + 2 * one_wrong) / 5, abs=1e-6)


def test_nothing_readable():
    with pytest.raises(UserError, match='no readable image'):
        run(torch.eye(7), torch.full((7,), -1))


def test_nan_logits_are_counted():
    logits = torch.eye(7)
    logits[2, 3], logits[4, 0] = math.nan, math.inf
    metrics = run(logits, torch.arange(7))
    assert metrics['nonfinite'] == 2 and math.isnan(metrics['loss'])


def test_first_of_several_outputs_counts():
    class Two(Answers):
        def forward(self, images):
            return super().forward(images), None

    accelerator = Accelerator()
    loader = accelerator.prepare(DataLoader(dataset(torch.eye(7), torch.arange(7)), batch_size=3))
    assert evaluate(accelerator, Two(), loader)['top1'] == 100.


def test_eval_mode_without_gradients():
    class Probe(Answers):
        def forward(self, images):
            assert not self.training and not torch.is_grad_enabled()
            return super().forward(images)

    accelerator = Accelerator()
    loader = accelerator.prepare(DataLoader(dataset(torch.eye(7), torch.arange(7)), batch_size=3))
    evaluate(accelerator, Probe().train(), loader)


TWO_PROCESSES = """
import json, sys, torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tests.evaluation.test_evaluate import Answers, dataset
from timm_spinal.evaluation.evaluate import evaluate

accelerator = Accelerator()
assert accelerator.num_processes == 2
torch.manual_seed(0)
for count in (11, 1, 8):
    logits, targets = torch.randn(count, 7), torch.arange(count) % 7
    loader = accelerator.prepare(DataLoader(dataset(logits, targets), batch_size=2))
    metrics = evaluate(accelerator, Answers(), loader)
    exact = torch.nn.functional.cross_entropy(logits, targets).item()
    right = 100 * (logits.argmax(1) == targets).float().mean().item()
    assert metrics['images'] == count, metrics
    pairs = torch.eye(7)[targets] + torch.eye(7)[(targets + 2) % 7]
    loader = accelerator.prepare(DataLoader(dataset(logits, pairs), batch_size=2))
    found = evaluate(accelerator, Answers(), loader, multi_label=True)
    both = 100 * (pairs.gather(1, logits.topk(2).indices).sum(1) == 2).float().mean().item()
    bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, pairs).item()
    assert found['images'] == count and abs(found['exact'] - both) < 1e-4 and abs(found['loss'] - bce) < 1e-6, found
    assert abs(metrics['loss'] - exact) < 1e-6 and abs(metrics['top1'] - right) < 1e-4, (metrics, exact, right)
accelerator.print('exact')
accelerator.end_training()
"""


@pytest.mark.slow
def test_two_processes_count_every_image_once(tmp_path, launch):
    (tmp_path / 'check.py').write_text(TWO_PROCESSES)
    assert 'exact' in launch(2, str(tmp_path / 'check.py')).stdout


def test_crops_are_averaged_as_probabilities():
    """Five images of ten crops in batches of two; one image cannot be read."""
    torch.manual_seed(0)
    logits, targets = 3 * torch.randn(5, 10, 7), torch.tensor([0, 1, 2, -1, 4])
    images = torch.zeros(5, 10, 1, 1, 8)
    images[:, :, 0, 0, :7] = logits
    accelerator = Accelerator()
    loader = accelerator.prepare(DataLoader(list(zip(images, targets.tolist())), batch_size=2))
    metrics = evaluate(accelerator, Answers(), loader)
    mean, good = logits.softmax(-1).mean(1), targets >= 0
    assert metrics['images'] == 4
    assert metrics['loss'] == pytest.approx(-mean[good].gather(1, targets[good, None]).log().mean().item(), rel=1e-5)
    assert metrics['top1'] == pytest.approx(100 * (mean.argmax(1) == targets)[good].float().mean().item())
    assert not torch.equal(mean.argmax(1), logits.mean(1).argmax(1))  # the mean of logits is another answer
